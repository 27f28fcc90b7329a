"""Logs of a user's own loop, and where the numbers of a run go besides its own file."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import OWN_TASK, assert_refused, metrics_in, run

import steprule
from steprule.lab import Logger, event_files
from steprule.lab.errors import LabError
from steprule.lab.event_files import begin_events, event_of, read_events
from steprule.lab.reporting.command import report
from steprule.lab.run_folder import EVENTS

OWN = (
    "train",
    "--task",
    "own.py:task",
    "--optimizer",
    "adamw",
    "--set",
    "foreach=False",
    "--epochs",
    "1",
    "--out",
    "one",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN_TASK)
    return tmp_path


def train_by_hand(log: Logger, optimizer: Any, model: torch.nn.Module, steps: int = 3) -> None:
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        optimizer.step()
        log(step=step, loss=loss)


# The logger


def test_a_loop_of_ones_own_has_a_log_and_a_page(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = steprule.AdamW(
        model, lr=0.1, foreach=False, modifiers=[steprule.Metrics(), steprule.GlobalNormClip(1e-3)]
    )
    with Logger(tmp_path / "mine", optimizer) as log:
        train_by_hand(log, optimizer, model)
        log.log(split="validation", loss=torch.tensor(0.25), accuracy=99)
    *train, validation = metrics_in(tmp_path / "mine")
    assert [line["step"] for line in train] == [1, 2, 3]
    assert {"split", "step", "loss", "lr", "gradient_norm", "update_to_weight", "seconds"} == set(train[0])
    assert train[0]["lr"] == 0.1
    # Before clipping, and of the last step.
    assert train[-1]["gradient_norm"] == pytest.approx(optimizer.metrics()["gradient_norm"])
    assert train[-1]["gradient_norm"] > 1e-2
    assert train[-1]["update_to_weight"] == pytest.approx(optimizer.metrics()["update_to_weight"])
    expected = {"split": "validation", "step": 3, "loss": 0.25, "accuracy": 99.0}
    assert {key: validation[key] for key in expected} == expected
    page = report([tmp_path / "mine"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "validation loss 0.250" in page
    for quantity in ("Gradient norm", "Update relative to weights", "Learning rate"):
        assert quantity in page


def test_what_other_optimizers_measure(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 1)
    made = {
        "torch": (torch.optim.SGD(model.parameters(), lr=0.1), {"lr"}),
        "clip": (
            steprule.SGD(model, lr=0.1, foreach=False, modifiers=[steprule.GlobalNormClip(1.0)]),
            {"lr", "gradient_norm"},
        ),
        "plain": (steprule.SGD(model, lr=0.1, foreach=False), {"lr"}),
        "skip": (steprule.SGD(model, lr=0.1, foreach=False, nonfinite="skip"), {"lr", "skipped_steps"}),
    }
    for name, (optimizer, more) in made.items():
        with Logger(tmp_path / name, optimizer) as log:
            train_by_hand(log, optimizer, model, steps=1)
            optimizer.zero_grad()
            model(torch.full((2, 3), math.inf)).sum().backward()
            if name == "skip":
                optimizer.step()
            log(loss=math.nan)
        last = metrics_in(tmp_path / name)[-1]
        assert set(last) == {"split", "step", "loss", "seconds", *more}
        assert last["loss"] is None
        assert last["step"] == 2
        assert last.get("skipped_steps", 1) == 1
    page = report([tmp_path / "skip"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "train loss ∞" in page  # NaN ranks behind all numbers


def test_a_log_goes_on_after_a_step(tmp_path: Path) -> None:
    with Logger(tmp_path / "mine") as log:
        for step in range(1, 6):
            log(step=step, loss=step)
    with open(tmp_path / "mine/metrics.jsonl", "ab") as stream:
        stream.write(b'{"split": "train", "st')  # the process was killed
    with Logger(tmp_path / "mine", continue_after=3) as log:
        log(loss=40)
    lines = metrics_in(tmp_path / "mine")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_what_a_logger_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Logger(tmp_path / "mine") as log:
        log(loss=1)
        for numbers, told in (
            ({"loss": "a"}, "loss is of type str"),
            ({"seconds": 1}, "'seconds' is written by"),
        ):
            with pytest.raises(TypeError, match=told):
                log(**numbers)
        with pytest.raises(TypeError, match="must be one number"):
            log(loss=torch.ones(2))
    before = (tmp_path / "mine/metrics.jsonl").read_bytes()
    for path, options, told in (
        ("mine", {}, "already holds a log"),
        ("file", {}, "cannot make the folder"),
        ("new", {"to": "tensorbord"}, "Did you mean 'tensorboard'?"),
        ("new", {"to": ["wandb"]}, "--log wandb needs wandb: pip install wandb"),
    ):
        with pytest.raises(LabError, match=told):
            Logger(tmp_path / path, **options)
    assert (tmp_path / "mine/metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "new").exists()


# TensorBoard


def test_the_checksum_is_the_known_one() -> None:
    """The check value of CRC-32C, as catalogues of checksums give it, is 0xE3069283."""
    turned = 0xE3069283 >> 15 | (0xE3069283 << 17) & 0xFFFFFFFF
    assert event_files._masked_crc(b"123456789") == (turned + 0xA282EAD8) & 0xFFFFFFFF


def test_an_event_is_written_as_tensorboard_does() -> None:
    """Against the bytes that TensorBoard 2.21's own classes give for the same event."""
    written = event_of(300, 2.5, {"loss/train": 0.5})
    assert written[12:-4].hex() == ("09000000000000044010ac022a130a110a0a6c6f73732f747261696e150000003f")
    assert begin_events(1.0)[12:-4] == bytes.fromhex("09000000000000f03f1a0d") + b"brain.Event:2"


def test_a_scalar_in_a_tensor_is_read(tmp_path: Path) -> None:
    """As newer writers store scalars: Summary.Value.tensor, with a float of 32 bits in one of two ways."""
    for tensor in ("080112002a040000003f", "0801120022040000003f"):
        data = bytes.fromhex(tensor)
        value = b"\x0a\x04loss" + b"\x42" + bytes([len(data)]) + data
        summary = b"\x0a" + bytes([len(value)]) + value
        event = b"\x10\x07" + b"\x2a" + bytes([len(summary)]) + summary
        (tmp_path / "a.tfevents").write_bytes(event_files.record_of(event))
        assert [(x.tag, x.step, x.value) for x in read_events(tmp_path / "a.tfevents")] == [("loss", 7, 0.5)]


def test_a_run_is_mirrored_for_tensorboard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, *OWN, "--log", "tensorboard")
    assert (answer.code, answer.err) == (0, "")
    assert_mirrored(folder / "one")
    assert run(capsys, "train", "--resume", "--out", "one", "--epochs", "2", "--log", "tensorboard").code == 0
    assert_mirrored(folder / "one")


def assert_mirrored(path: Path) -> None:
    lines = metrics_in(path)
    expected = [
        (name if name == "lr" else f"{name}/{line['split']}", line["step"], pytest.approx(line[name], rel=1e-6))
        for line in lines
        for name in ("loss", "accuracy", "lr")
        if line.get(name) is not None
    ]
    assert [(x.tag, x.step, x.value) for x in read_events(path / EVENTS)] == expected


# wandb and trackio


class Server(types.ModuleType):
    """A module with the functions that wandb and trackio have."""

    def __init__(self, name: str, fails_at: str = "") -> None:
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        self.calls: list[tuple[str, Any]] = []
        self._fails_at = fails_at

    def _call(self, name: str, *given: Any) -> None:
        if name == self._fails_at:
            raise ConnectionError("no\nserver")
        self.calls.append((name, given))

    def init(self, project: str, name: str, config: dict[str, Any]) -> None:
        self._call("init", project, name, config["optimizer"])

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._call("log", step, numbers)

    def finish(self) -> None:
        self._call("finish")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_is_mirrored_on_a_server(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    server = Server(name)
    monkeypatch.setitem(sys.modules, name, server)
    answer = run(capsys, *OWN, "--log", name)
    assert (answer.code, answer.err) == (0, "")
    first, *logged, last = server.calls
    assert first == ("init", ("steprule", "one", "AdamW"))
    assert last == ("finish", ())
    lines = metrics_in(folder / "one")
    assert [given[0] for _, given in logged] == [line["step"] for line in lines]
    train = lines[0]
    assert logged[0][1][1] == {
        "loss/train": train["loss"],
        "accuracy/train": train["accuracy"],
        "lr": train["lr"],
    }


@pytest.mark.parametrize("fails_at", ["init", "log", "finish"])
def test_a_server_that_fails_stops_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Server("wandb", fails_at))
    answer = run(capsys, *OWN, "--log", "tensorboard,wandb")
    assert answer.code == 0
    assert answer.err == "steprule: --log wandb ends here, the run goes on: no server\n"
    assert_mirrored(folder / "one")


def test_nothing_is_begun_with_a_place_that_is_not_there(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert_refused(run(capsys, *OWN, "--log", "wandb"), "--log wandb needs wandb: pip install wandb")
    assert_refused(run(capsys, *OWN, "--log", "mlflow"), "--log mlflow: there is no such place for numbers")
    assert not (folder / "one").exists()


def test_a_run_with_metrics_logs_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *OWN[:4], "adamw+metrics", *OWN[5:]).code == 0
    line = json.loads((folder / "one/metrics.jsonl").read_text().splitlines()[0])
    assert line["gradient_norm"] > 0
    assert 0 < line["update_to_weight"] < 1
