"""What `steprule` does when all is well: real tasks, own tasks, reports, the rules' pages."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy
import pytest
import torch
from lab import OWN_TASK, SOURCE, assert_refused, metrics_in, results_in, run
from PIL import Image
from rich.console import Console

import steprule
from steprule.catalogue import PRESETS
from steprule.lab.progress import clock, progress_on
from steprule.lab.randomness import seed_everything
from steprule.lab.run_folder import RunConfig
from steprule.lab.tasks import load_task
from steprule.lab.train import Training

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
    return tmp_path


def last(folder: Path, split: str) -> dict[str, float]:
    return [line for line in metrics_in(folder) if line["split"] == split][-1]


def test_the_default_run_learns_to_read_digits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "train")
    assert answer.code == 0
    assert answer.err == ""
    made = folder / "runs/digits-adabelief-1"
    assert sorted(file.name for file in made.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "curves.svg",
        "metrics.jsonl",
    ]
    assert last(made, "test")["accuracy"] >= 97
    assert last(made, "validation")["accuracy"] >= 97
    row = re.search(r"^test +360 +([\d.]+) +([\d.]+) *$", answer.out, re.MULTILINE)
    assert row is not None
    assert row.groups() == (f"{last(made, 'test')['loss']:#.3g}", f"{last(made, 'test')['accuracy']:.2f}")
    config = json.loads((made / "config.json").read_text())
    assert config["optimizer"] == "AdaBelief"
    assert config["hyperparameters"]["betas"] == [0.9, 0.999]
    assert config["facts"]["torch"] == torch.__version__
    svg = (made / "curves.svg").read_text()
    assert svg.startswith("<svg ")
    assert svg.rstrip().endswith("</svg>")
    for text in ("digits with AdaBelief", "cross-entropy (nats)", "accuracy (%)", "epoch (40 steps each)"):
        assert f">{text}" in svg


def test_the_parts_of_the_digits_have_nothing_in_common() -> None:
    task = load_task("digits")
    parts = [task.train, task.validation, task.test]
    images = [pixels.numpy().tobytes() for part in parts for pixels in part[0]]  # type: ignore[index]
    assert len(images) == len(set(images)) == 1797


def test_a_photo_is_saved_beside_what_was_learnt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "train", "--task", "photo", "--optimizer", "ADAM", "--epochs", "1")
    assert answer.code == 0
    made = folder / "runs/photo-adam-1"
    assert "PSNR (dB)" in answer.out
    picture = numpy.asarray(Image.open(made / "picture.png")) / 255
    assert picture.shape == (213, 2 * 320 + 8, 3)
    error = ((picture[:, :320] - picture[:, -320:]) ** 2).mean()
    assert -10 * numpy.log10(error) == pytest.approx(last(made, "test")["PSNR"], abs=0.5)
    assert last(made, "test")["PSNR"] > 16


def test_a_text_is_learnt_and_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steprule.lab.text.topics", dict([*topics.items()][:8]))
    arguments = ("--task", "text", "--epochs", "1", "--schedule", "warmup", "--optimizer", "radam")
    assert run(capsys, "train", *arguments).code == 0
    made = folder / "runs/text-radam-1"
    assert (made / "sample.txt").read_text().startswith("The ")
    assert last(made, "test")["loss"] < metrics_in(made)[0]["loss"]
    rates = [line["lr"] for line in metrics_in(made) if line["split"] == "train"]
    assert rates[0] < rates[-1] == 1e-3
    facts = json.loads((made / "config.json").read_text())["facts"]
    assert re.fullmatch("[0-9a-f]{64}", facts["text sha256"])


def test_no_paragraph_of_the_text_stands_in_two_parts_and_its_hash_is_known() -> None:
    paragraphs = dict.fromkeys(p.strip("\n") for t in topics.values() for p in t.split("\n\n"))
    text = "\n\n".join(paragraphs)
    assert load_task("text").facts["text sha256"] == hashlib.sha256(text.encode()).hexdigest()
    task = load_task("text")
    sizes = [part[0].numel() for part in (task.train, task.validation, task.test)]  # type: ignore[index]
    assert len(text) - 65 < sum(sizes) < len(text)


STRAIGHT_LINE = """
import torch
from steprule.lab import Task
def task():
    x = torch.randn(64, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    return Task(torch.nn.Linear(3, 1), (x, y), (x, y), torch.nn.functional.mse_loss, batch_size=64)
"""


def test_a_rule_that_calls_the_loss_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "line.py").write_text(STRAIGHT_LINE)
    line = ("--task", "line.py:task", "--optimizer", "lbfgs", "--set", "line_search_fn=strong_wolfe")
    answer = run(capsys, "train", *line, "--epochs", "1")
    assert answer.code == 0
    made = folder / "runs/line-task-lbfgs-1"
    assert metrics_in(made)[0]["loss"] > 1
    assert last(made, "validation")["loss"] < 1e-8, "one step of LBFGS makes up to 20 of its own"
    assert re.search(r"^validation +64 +\d\.\d\de-\d\d *$", answer.out, re.MULTILINE)


def test_sophia_is_given_its_curvature(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("train", "--optimizer", "sophia", "--lr", "1e-3", "--epochs", "2")
    assert run(capsys, *arguments).code == 0
    made = folder / "runs/digits-sophia-1"
    state = torch.load(made / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    assert all(entry["hessian"].any() for entry in state.values())
    assert last(made, "test")["accuracy"] > 80


def test_rules_that_use_the_curvature_are_given_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rule in ("adahessian", "sophiah"):
        assert run(capsys, "train", "--optimizer", rule, "--epochs", "1").code == 0
        state = torch.load(folder / f"runs/digits-{rule}-1/checkpoint.pt", weights_only=True)["optimizer"][
            "state"
        ]
        if rule == "adahessian":
            assert all(entry["estimates"] == entry["step"] == 40 for entry in state.values())
        else:
            assert all(entry["hessian"].any() for entry in state.values())


def test_options_reach_the_optimizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.py").write_text(OWN_TASK)
    arguments = ("--optimizer", "AdamW", "--lr", "0.01", "--set", "betas=0.8,0.95", "--set", "amsgrad=true")
    answer = run(capsys, "train", "--task", "own.py:task", *arguments, "--epochs", "1", "--out", "a/b")
    assert answer.code == 0
    (group,) = torch.load(folder / "a/b/checkpoint.pt", weights_only=True)["optimizer"]["param_groups"]
    assert (group["lr"], group["betas"], group["amsgrad"]) == (0.01, (0.8, 0.95), True)
    assert "AdamW, lr 0.01, betas (0.8, 0.95), amsgrad True" in answer.out


def test_a_seed_decides_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.py").write_text(OWN_TASK)
    for name, seed in (("one", "1"), ("again", "1"), ("two", "2")):
        own = ("train", "--task", "own.py:task", "--epochs", "1", "--seed", seed, "--out", name)
        assert run(capsys, *own).code == 0
    metrics = {name: results_in(folder / name) for name in ("one", "again", "two")}
    assert metrics["one"] == metrics["again"]
    assert metrics["one"] != metrics["two"]


def test_the_example_in_the_readme_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", README.read_text(), re.DOTALL)
    (code,) = [text for kind, text in blocks if kind == "python" and "import Task" in text]
    (command,) = [text for kind, text in blocks if kind == "bash" and "mine.py" in text]
    assert len([line for line in code.splitlines() if line]) <= 15
    (folder / "mine.py").write_text(code)
    answer = run(capsys, *command.split()[1:], "--out", "mine")
    assert answer.code == 0, answer.err
    assert last(folder / "mine", "validation")["accuracy"] > 95


def training() -> Training:
    seed_everything(0)
    config = RunConfig("digits", "Adam", {}, "none", epochs=2, batch_size=600, seed=0, threads=1)
    return Training(load_task("digits"), config)


def test_a_terminal_gets_a_line_for_every_epoch_and_one_that_moves() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with progress_on(console, training()) as shown:
        shown.step(3, 1, 2.5)
        shown.validated("loss 1.23, accuracy 12.34 %")
        shown.step(4, 2, 2.25)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    kept = [
        line
        for line in lines
        if line.startswith("epoch 1/2  loss 2.50  validation loss 1.23, accuracy 12.34 %")
    ]
    assert len(kept) == 1
    assert "epoch 2/2" in lines[-1]
    assert "loss 2.25" in lines[-1]
    assert "━" in lines[-1]
    assert max(map(len, lines)) <= 80


def test_a_log_gets_a_line_for_every_epoch_and_every_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("steprule.lab.progress.time.perf_counter", lambda: now[0])
    screen = io.StringIO()
    with progress_on(Console(file=screen, width=80), training()) as shown:
        for step in range(1, 7):
            now[0] += 61.0 if step == 5 else 1.5
            shown.step(step, (step + 2) // 3, step / 10)
            if step % 3 == 0:
                shown.validated("loss 0.300, accuracy 50.00 %")
    assert screen.getvalue().splitlines() == [
        "epoch 1/2  loss 0.200  validation loss 0.300, accuracy 50.00 %  ETA 0:04",
        "epoch 2/2  loss 0.450  step 5/6  ETA 0:13",
        "epoch 2/2  loss 0.500  validation loss 0.300, accuracy 50.00 %  ETA 0:00",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.7, "1:00"), (754, "12:34"), (3723, "1:02:03")]
)
def test_times_are_shown_as_on_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


KNOWN: dict[str, Any] = {
    **steprule.catalogue(),
    **dict(zip(PRESETS, PRESETS, strict=True)),
    **steprule.modifier_catalogue(),
}


def test_list_names_every_rule_and_modifier_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "list").out.splitlines()
    for name, rule in KNOWN.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert steprule.describe(rule).summary in line


@pytest.mark.parametrize("pattern", ["ada", "ADA*", "ada*"])
def test_list_takes_a_pattern(capsys: pytest.CaptureFixture[str], pattern: str) -> None:
    first_words = [line.split()[0] for line in run(capsys, "list", pattern).out.splitlines() if line]
    names = [name for name in steprule.catalogue() if name in first_words]
    starting = [name for name in steprule.catalogue() if name.lower().startswith("ada")]
    assert set(starting) <= set(names)
    assert all("ada" in name.lower() for name in names)


def test_list_takes_a_pattern_of_modifiers(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "list", "*norm_clip").out.splitlines()
    assert [line.split()[0] for line in lines if line][:3] == ["modifier", "global_norm_clip", "norm_clip"]
    assert lines[1].split()[1] == "0"
    assert run(capsys, "list", "average").out.splitlines()[1].split()[1] == "1"


@pytest.mark.parametrize("name", KNOWN)
def test_show_tells_all_that_a_rule_says(capsys: pytest.CaptureFixture[str], name: str) -> None:
    about = steprule.describe(KNOWN[name])
    answer = run(capsys, "show", name.upper())
    assert answer.code == 0
    for text in (about.name, about.summary, about.when, about.state, about.source):
        assert text or name == "metrics"  # which has no source
        assert " ".join(text.split()) in " ".join(answer.out.split())
    for line in about.formula.splitlines():
        assert line in answer.out
    shared = answer.out.partition("shared options")[2]
    own = [hyper for hyper in about.hyperparameters if hyper.name not in SHARED]
    for hyper in about.hyperparameters:
        assert hyper in own or f"{hyper.name}={hyper.default}" in shared
    rows = [line.split()[0] for line in answer.out.splitlines() if line.startswith("    ") and " = " in line]
    assert [row for row in rows if row in {hyper.name for hyper in own}] == [hyper.name for hyper in own]
    for hyper in own:
        row, meaning, *_ = answer.out[answer.out.index(f"    {hyper.name} = ") :].splitlines()
        assert row == f"    {hyper.name} = {hyper.default}"
        assert meaning.strip().startswith(hyper.meaning[:40])


SHARED = (
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "state_dtype",
    "low_precision",
    "modifiers",
    "nonfinite",
)
BOLD_OR_DIM = re.compile(r"\x1b\[[0-9;]*m")


def words(text: str) -> list[str]:
    return BOLD_OR_DIM.sub("", text).split()


@pytest.mark.parametrize("width", [40, 60, 80])
@pytest.mark.parametrize("name", [*KNOWN, ""])
def test_show_and_list_fit_the_terminal_and_break_no_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, width: int
) -> None:
    command = ("show", name) if name else ("list",)
    monkeypatch.setenv("COLUMNS", "500")
    wide = run(capsys, *command).out
    monkeypatch.setenv("COLUMNS", str(width))
    narrow = run(capsys, *command).out
    assert words(narrow) == words(wide)
    lines = narrow.splitlines()
    assert [line for line in lines if len(line) > width and " " in line.strip()] == []
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize("variables", [(), ("FORCE_COLOR",), ("FORCE_COLOR", "NO_COLOR")])
def test_bold_and_dim_are_for_terminals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variables: tuple[str, ...]
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name in variables:
        monkeypatch.setenv(name, "1")
    assert ("\x1b" in run(capsys, "show", "adamw").out) == (variables == ("FORCE_COLOR",))


def test_show_explains_a_rule_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rules.py").write_text(
        "from steprule import Elementwise, hyper\n"
        "class Plain(Elementwise):\n"
        '    """Walk downhill."""\n'
        "    lr: float = hyper(default=0.5, at_least=0, meaning='how far')\n"
        "    @staticmethod\n"
        "    def update(h, p, g, s, t): return -h.lr * g\n"
    )
    answer = run(capsys, "show", "rules.py:Plain")
    assert answer.code == 0
    assert answer.out.startswith(
        "Plain  Walk downhill.\n\nhyper-parameters\n    lr = 0.5\n        how far; at least 0\n"
    )
    assert_refused(run(capsys, "show", "rules.py:plan"), "rules.py has no class 'plan'. Did you mean 'Plain'?")
    assert_refused(run(capsys, "show", "torch:AdamW"), "torch.optim.AdamW is not a rule of steprule")


def test_help_is_quick_to_come() -> None:
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from steprule.lab.cli import main\n"
            "try: main(['list', '--help'])\n"
            "finally: print(*sys.modules, file=sys.stderr)",
        ],
        env={"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=True,
    ).stderr.split()
    assert "typer" in loaded
    for heavy in ("steprule.lab.reporting", "sklearn", "PIL", "steprule.lab.train", "steprule.lab.rules"):
        assert heavy not in loaded
