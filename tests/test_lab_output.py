"""What a stream cannot take ends no command: other encodings, closed pipes, full disks. Logs and options."""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from lab import SOURCE, run

import steprule
from steprule.lab.cli import main
from steprule.lab.optimizers import parse_settings

COMMAND = (sys.executable, "-c", "from steprule.lab.cli import main; main()")
TASK = """
import os, numpy
from torch import nn
from steprule.lab import Task, accuracy
def task():
    x = numpy.random.default_rng(0).normal(size=(12, 2)).astype("float32")
    y = (x[:, 0] > 0).astype("int64")
    print("θ ← θ")
    return Task(nn.Linear(2, 2), (x, y), (x, y), nn.functional.cross_entropy, score=accuracy, epochs=3)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    (tmp_path / "own.py").write_text(TASK, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "shift_jis"])
@pytest.mark.parametrize(
    "command", ["list", "show adabelief", "--help", "train --task own.py:task", "show ада"]
)
def test_output_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str, command: str) -> None:
    written = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr("sys.stdout", written[0])
    monkeypatch.setattr("sys.stderr", written[1])
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert sys.stdout is written[0]
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in written)
    assert (ended.value.code, "Traceback" in err) == (2 if "ада" in command else 0, False), err
    if (encoding, command) == ("ascii", "show adabelief"):
        assert "\\u2190" in out


@pytest.mark.parametrize(
    ("redirected", "code", "told"),
    [
        ("list | true", "0", ""),
        ("train --task own.py:task | true", "0", ""),
        ("list >&-", "0", ""),
        ("list >/dev/full", "2", "steprule: the output could not be written: No space left on device."),
    ],
)
def test_output_that_no_one_reads(folder: Path, redirected: str, code: str, told: str) -> None:
    script = f"{shlex.join(COMMAND)} {redirected}; echo code ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert f"code {code}" in done.stdout
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.stderr.count("\n") == bool(told)
    if "train" in redirected:
        assert (folder / "runs/own-task-adabelief-1/curves.svg").exists(), (
            "a training does not depend on its log"
        )


def test_a_terminal_keeps_a_line_for_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    command = [*COMMAND, "train", "--task", "own.py:task"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # the other side is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "\n")
    for epoch in (1, 2, 3):
        kept = rf"^epoch {epoch}/3  loss \d\.\d+  validation loss \d\.\d+, accuracy \d+\.\d+ %  ETA 0:\d\d$"
        assert re.search(kept, text, re.MULTILINE), text
    assert "━" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_pipe_gets_a_line_for_every_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "train", "--task", "own.py:task")
    lines = [line for line in answer.out.splitlines() if line.startswith("epoch ")]
    pattern = r"epoch (\d)/3  loss \d\.\d+  validation loss \d\.\d+, accuracy \d+\.\d+ %  ETA 0:\d\d"
    matches = [re.fullmatch(pattern, line) for line in lines]
    assert [match and match[1] for match in matches] == ["1", "2", "3"]


@pytest.mark.parametrize("name", ["a  b", "it's", "$HOME", "-x", "ü", "a;b", "(1)*"])
def test_the_command_to_resume_with_can_be_pasted(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stops = f"""
def loss(output, target):
    if os.environ.get("STOP_LATE") and os.path.exists({name!r} + "/checkpoint.pt"):
        raise KeyboardInterrupt
    return nn.functional.cross_entropy(output, target)
"""
    own = TASK.replace("nn.functional.cross_entropy, score", "loss, score") + stops
    (folder / "own.py").write_text(own, encoding="utf-8")
    monkeypatch.setenv("STOP_LATE", "1")
    stopped = run(capsys, "train", "--task", "own.py:task", "--out", name)
    assert stopped.code == 130
    command = shlex.split(stopped.err.strip().partition("with: steprule ")[2])
    assert command == ["train", "--resume", "--out", name]
    monkeypatch.setenv("STOP_LATE", "")
    assert run(capsys, *command).code == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'exp_avg':'bf16','exp_avg_sq':'bf16'}", {"exp_avg": "bf16", "exp_avg_sq": "bf16"}),
        ('{"exp_avg": "bf16"}', {"exp_avg": "bf16"}),
        ("{exp_avg: bf16, exp_avg_sq: none}", {"exp_avg": "bf16", "exp_avg_sq": None}),
        ("{}", {}),
        ("0.9,0.95", (0.9, 0.95)),
        ("(0.9, 0.95)", (0.9, 0.95)),
        ("[0.9, 0.95]", (0.9, 0.95)),
        ("none, 1e-3", (None, 1e-3)),
        ("bf16, int8", ("bf16", "int8")),
        ("true", True),
        ("inf", float("inf")),
        ("-1", -1),
        ("strong_wolfe", "strong_wolfe"),
        ("'bf16'", "bf16"),
        ("1=2", "1=2"),
    ],
)
def test_values_of_settings(text: str, value: object) -> None:
    assert parse_settings(None, [f"name={text}"]) == {"name": value}


@pytest.mark.parametrize("text", ["{'a':'b'", "{a}", "{'a', 'b'}", "{a:}"])
def test_a_dict_that_is_none(capsys: pytest.CaptureFixture[str], text: str) -> None:
    answer = run(capsys, "train", "--set", f"state_dtype={text}")
    assert answer.code == 2
    assert "must be NAME={'key': value, 'key': value}" in answer.err


def test_a_dict_reaches_the_optimizer_and_the_resumed_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--set", "state_dtype={'exp_avg':'bf16','exp_avg_sq':'bf16'}", "--out", "one")
    assert (
        run(capsys, "train", "--task", "own.py:task", "--optimizer", "adamw", "--epochs", "1", *given).code == 0
    )
    assert run(capsys, "train", "--resume", "--epochs", "2", *given).code == 0
    state = steprule.load_checkpoint(folder / "one/checkpoint.pt")["optimizer"]["state"]
    assert str(state[0]["exp_avg"].dtype) == "torch.bfloat16"
