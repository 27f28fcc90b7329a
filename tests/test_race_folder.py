"""What is written to the folder of a race is read back as it was, and a damaged file is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from races import canned_race

from steprule.lab.errors import LabError
from steprule.lab.racing.folder import RaceFolder


def test_a_race_is_read_as_it_was_written(tmp_path: Path) -> None:
    first = canned_race(tmp_path / "a")
    second = RaceFolder(tmp_path / "b")
    second.path.mkdir()
    second.write_plan(first.read_plan())
    second.write_trials(first.read_trials())
    verdict = first.read_verdict()
    assert verdict is not None
    second.write_verdict(verdict)
    second.write_best(first.read_best())
    for trial in first.read_trials():
        points = first.read_curve(trial.optimizer, trial.number)
        assert points[-1].step <= trial.steps
        second.write_curve(trial.optimizer, trial.number, points)
    assert files_of(first) == files_of(second)
    assert first.read_plan().contestants[2].ranges["lr"].high == 3.0


def files_of(folder: RaceFolder) -> dict[str, bytes]:
    return {str(x.relative_to(folder.path)): x.read_bytes() for x in folder.path.rglob("*") if x.is_file()}


def test_a_line_that_a_kill_cut_off_does_not_count(tmp_path: Path) -> None:
    folder = canned_race(tmp_path / "a", complete=False)
    assert folder.read_verdict() is None
    assert folder.read_best() == []
    trials = folder.read_trials()
    with open(folder.path / "trials.jsonl", "a") as stream:
        stream.write('{"optimizer": "ad')
    assert folder.read_trials() == trials


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00", '{"kind": 1}'])
def test_a_damaged_plan_is_named(tmp_path: Path, text: str) -> None:
    folder = canned_race(tmp_path / "a")
    (folder.path / "plan.json").write_text(text)
    with pytest.raises(LabError, match=r"plan\.json cannot be read as a part of a race"):
        folder.read_plan()


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"is not the folder of a race: it has no plan\.json"):
        RaceFolder(tmp_path).read_plan()
