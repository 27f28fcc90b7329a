"""`steprule report`: what it reads, what the page says, and what it refuses."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
from lab import SOURCE, assert_refused, everything_in, run
from races import CANNED, SEEDS, canned_race
from reports import make_run

from steprule.lab.errors import LabError
from steprule.lab.event_files import begin_events, event_of, read_events
from steprule.lab.racing.folder import RaceFolder
from steprule.lab.reporting import command
from steprule.lab.reporting.command import report, write_report
from steprule.lab.reporting.race_figures import medians_of_best
from steprule.lab.reporting.words import Words

OPTIMIZERS, TRIALS = [label for _, label, *_ in CANNED], 16
BENCHES = SOURCE.parent / "benchmarks/results/epyc-2-cores"


class Read(HTMLParser):
    """A page as a reader without JavaScript and without pictures has it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", [""]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self._open[-1] not in ("script", "style"):
            self.text += data + " "


def page_of(*paths: Path, language: str = "en") -> Read:
    """The page of these, read back."""
    file = report(paths, paths[0].parent / "page.html", language)
    return Read(file.read_text(encoding="utf-8"))


def make_race(path: Path, task: str = "mnist", complete: bool = True) -> Path:
    return canned_race(path, task, complete).path


def points_of(page: Read) -> int:
    """How many points have a text for the pointer and for screen readers."""
    return sum(tag in ("path", "circle") and "p" in (a.get("class") or "").split() for tag, a in page.tags)


@pytest.fixture
def race(tmp_path: Path) -> Path:
    return make_race(tmp_path / "race")


# Races


def test_a_race_says_who_won_first_and_has_every_number(race: Path) -> None:
    page = page_of(race)
    verdict = RaceFolder(race).read_verdict()
    assert verdict is not None
    assert (
        page.text.index(verdict.sentences[0]) < page.text.index("95 % interval") < page.text.index("Training")
    )
    assert all(sentence in page.text for sentence in (*verdict.sentences, *verdict.notes))
    for label in OPTIMIZERS:
        assert label in page.text
    assert (
        "steprule race --task mnist --optimizers adamw,lion,torch:SGD,mine.py:Signum --minutes 10" in page.text
    )
    assert "steprule train --task mnist --optimizer lion --lr 0.0008" in page.text
    assert f"All trainings ({len(OPTIMIZERS) * (TRIALS + len(SEEDS))} rows)" in page.text
    for title in ("Training", "Learning rate", "Final loss", "What tuning buys", "Time of a step", "State"):
        assert title in page.text
    assert points_of(page) > 4 * len(OPTIMIZERS) * TRIALS


def test_trials_that_were_chosen_default_or_diverged_are_marked(race: Path) -> None:
    page = page_of(race)
    trials = [trial for trial in RaceFolder(race).read_trials() if trial.stage == "tune"]
    classes = [str(a.get("class")) for _, a in page.tags]
    # On the logarithmic and on the linear chart.
    assert classes.count("ring") == 2 * sum(trial.default for trial in trials) == 2 * len(OPTIMIZERS)
    assert classes.count("p cross") == 2 * sum(trial.diverged for trial in trials) > 0
    faint = sum(trial.stopped_at is not None and not trial.diverged for trial in trials)
    finals = len(OPTIMIZERS) * len(SEEDS)
    assert classes.count("p faint") == 2 * (faint + finals)
    assert len(re.findall(r"AdamW, lr 0.001: [\d.]+, the default", page.text)) == 2


def test_the_chosen_trial_is_marked(tmp_path: Path) -> None:
    from dataclasses import replace

    folder = canned_race(tmp_path / "race")
    trials = folder.read_trials()
    chosen = replace(trials[3], setting={"lr": 6e-3}, stopped_at=None)
    folder.write_trials([chosen if trial is trials[3] else trial for trial in trials])
    page = page_of(folder.path)
    assert len(re.findall(r"AdamW, lr 0.006: [\d.]+, chosen", page.text)) == 2
    assert len(re.findall("AdamW 0.006 [\\d.]+ chosen", " ".join(page.text.split()))) == 1


def test_a_tuning_shows_the_defaults_beside_what_it_chose(tmp_path: Path) -> None:
    from dataclasses import replace

    folder = canned_race(tmp_path / "tune")
    plan, trials, verdict = folder.read_plan(), folder.read_trials(), folder.read_verdict()
    assert verdict is not None
    own = [trial for trial in trials if trial.optimizer == "adamw"]
    again = [
        replace(trial, number=trial.number + 5, default=True, loss=2 * (trial.loss or 1), setting={"lr": 1e-3})
        for trial in own
        if trial.stage == "seeds"
    ]
    first = next(one for one in verdict.standings if one.optimizer == "adamw")
    default = replace(first, label="AdamW at its defaults", setting={"lr": 1e-3}, loss=0.31, lowest=False)
    folder.write_plan(replace(plan, kind="tune", contestants=plan.contestants[:1]))
    folder.write_trials([*own, *again])
    folder.write_verdict(replace(verdict, standings=[first, default]))
    page = page_of(folder.path)
    assert "mnist: AdamW, tuned" in page.text
    assert "0.310" in page.text
    assert page.text.count("AdamW at its defaults, seed 1: ") == 2
    assert "stopped at step 165 of 550" in page.text
    assert page.text.count("AdamW, seed 1: ") == 2
    chinese = report([folder.path], tmp_path / "zh.html", "zh").read_text(encoding="utf-8")
    assert "AdamW（默认值）（lr 0.001）最终损失为 0.310。" in chinese
    assert " ended at " not in chinese


def test_a_race_that_is_not_complete_says_so(tmp_path: Path) -> None:
    page = page_of(make_race(tmp_path / "half", complete=False))
    assert "Not complete: 42 of 84 trainings are done." in page.text
    assert "Learning rate" in page.text


def test_a_race_that_has_only_a_plan_has_a_page(tmp_path: Path) -> None:
    path = make_race(tmp_path / "race", complete=False)
    (path / "trials.jsonl").unlink()
    shutil.rmtree(path / "curves")
    assert "Not complete: 0 of 84" in page_of(path).text


def test_the_page_lies_in_the_folder_of_the_race(race: Path) -> None:
    write_report(race)
    first = (race / "report.html").read_bytes()
    assert report([race]) == race / "report.html"
    assert (race / "report.html").read_bytes() == first


def test_a_task_called_like_a_tag_is_text(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>&\"'"
    text = report([make_race(tmp_path / "race", task=name)]).read_text()
    assert text.count("<script>") == text.count("</script>") == 1
    assert name in Read(text).text


def test_the_median_of_the_best_of_some_trials() -> None:
    """Against all draws, counted one by one."""
    losses = [0.5, 0.1, 0.3, math.inf, 0.2, math.inf]
    found = medians_of_best(losses)
    for k in range(1, len(losses) + 1):
        best = sorted(min(draw) for draw in itertools.combinations(losses, k))
        assert found[k - 1] == best[math.ceil(len(best) / 2) - 1]


# Trainings


def test_one_run_says_how_it_ended(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    assert "digits: AdamW" in page.text
    assert (
        "After 800 steps in 4.00 s: validation loss 0.0702, test loss 0.0600, test accuracy 97.5." in page.text
    )
    assert "was lowest at step 600, with 0.0608; the last one is 1.15 × as high." in page.text
    assert "steprule train --task digits --optimizer AdamW --lr 0.001 --schedule cosine" in page.text
    for title in ("Loss", "accuracy", "Learning rate", "seconds instead of steps"):
        assert title in page.text


def test_a_run_on_own_data_says_how_to_repeat_it(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", task="file:///home/me/houses.csv?target=price"))
    assert "houses: AdamW" in page.text
    assert "steprule train --data /home/me/houses.csv --target price --optimizer AdamW --lr 0.001" in page.text


def test_a_run_that_stopped_says_where(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:300]) + '{"split": "train", "st')
    assert "It stopped at step 293 of 800." in page_of(path).text


def test_what_a_run_made_is_on_its_page(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "sample.txt").write_text("a sample <of> text")
    (path / "picture.png").write_bytes(b"\x89PNG")
    page = page_of(path)
    assert "a sample <of> text" in page.text
    assert ("src", "data:image/png;base64,iVBORw==") in [pair for _, a in page.tags for pair in a.items()]


def test_runs_that_differ_in_their_seed_are_one_kind(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path / f"runs/a{seed}", "AdamW", seed)
        make_run(tmp_path / f"runs/l{seed}", "Lion", seed, end=0.06)
        make_run(tmp_path / f"runs/m{seed}", "Lion", seed, lr=3e-4, end=0.09)
    page = page_of(tmp_path / "runs")
    assert "digits: 9 trainings" in page.text
    assert "3 kinds of training" in page.text
    assert "AdamW ended with the lowest validation loss, 0.0675 in the mean." in page.text
    assert re.search(r"Lion, lr 0.0003 ended [\d.]+ × as high \(95 % interval", page.text)
    assert "Lion, lr 0.0003" in page.text
    assert "every seed" in page.text
    assert "chance" not in page.text


def test_an_order_on_one_seed_is_called_chance(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", "Lion", end=0.06))
    assert "With fewer than 3 seeds of each, chance may explain this order." in page.text


def test_runs_of_different_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"different tasks \(digits, text\)"):
        report([make_run(tmp_path / "a"), make_run(tmp_path / "b", task="text")])


# What others wrote


def write_csv(file: Path, rows: list[list[Any]]) -> Path:
    with open(file, "w", newline="") as stream:
        csv.writer(stream, delimiter="\t" if file.suffix == ".tsv" else ",").writerows(rows)
    return file


@pytest.mark.parametrize("name", ["log.csv", "log.tsv"])
def test_a_table_with_a_step_column(tmp_path: Path, name: str) -> None:
    rows = [["Step", "train/loss", "val_loss", "note", "time"]]
    rows += [[str(n), 1 / n, 2 / n if n % 2 else "", "a", 1.7e9 + n] for n in range(1, 21)]
    page = page_of(write_csv(tmp_path / name, rows))
    assert "After 20 steps in 19.0 s: validation loss 0.105." in page.text
    assert "train loss" in page.text
    assert "note" not in page.text


def test_json_lines_with_numbers_within(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    lines = [{"_step": n, "eval": {"loss": 1 / n}, "ok": True, "lr": 1e-3} for n in range(1, 5)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"_step": 5, "ev')
    assert "After 4 steps: validation loss 0.250." in page_of(file).text


def test_event_files_are_read(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "logs" / name).mkdir(parents=True)
        records = [begin_events(5.0)]
        records += [event_of(n, 5.0 + n, {"loss/train": 1 / n, "acc": n / 4}) for n in range(1, 5)]
        (tmp_path / "logs" / name / "events.out.tfevents.1.host").write_bytes(b"".join(records) + b"unfinished")
    page = page_of(tmp_path / "logs")
    assert "2 trainings" in page.text
    assert "one ended with the lowest train loss, 0.250; then comes two" in page.text


def test_nan_and_infinity_are_drawn_as_such(tmp_path: Path) -> None:
    rows = [["step", "loss"], [1, 2.0], [2, 1.0], [3, "nan"], [4, "inf"]]
    page = page_of(write_csv(tmp_path / "log.csv", rows))
    assert "not a number" in page.text
    assert "After 4 steps: loss ∞." in page.text


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "epochs,loss\n1,2\n", "line 2: no step. It needs a column called step"),
        ("a.csv", "step,loss\nx,2\n", "line 2: step is 'x', must be a number"),
        ("a.csv", "step,note\n1,a\n", "has no numbers to draw"),
        ("a.csv", "", "has no numbers to draw"),
        ("a.jsonl", '{"step": 1}\nnothing\n{}', "line 2: not JSON"),
        ("a.jsonl", "[1]\n\n", "line 1: a JSON object with a step is needed"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[]", "is not a measurement by `steprule bench`: it has no model"),
        ("a.txt", "", "is not something to report"),
        ("a.tfevents.1", "no events at all", "is damaged or not a TensorBoard event file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LabError, match=re.escape(told)):
        report([tmp_path / name], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_text_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"step,loss\n1,\xff\xfe\n")
    with pytest.raises(LabError, match="not text in UTF-8"):
        report([tmp_path / "a.csv"])


def test_an_event_file_with_a_changed_byte_is_damaged(tmp_path: Path) -> None:
    data = bytearray(begin_events(1.0) + event_of(1, 2.0, {"loss": 0.5}))
    file = tmp_path / "events.out.tfevents.1"
    file.write_bytes(data)
    assert [(x.tag, x.step, x.value) for x in read_events(file)] == [("loss", 1, 0.5)]
    for place in (len(data) - 10, len(data) - 40):
        changed = data.copy()
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(LabError, match="damaged"):
            read_events(file)


# Measurements


def test_a_measurement_says_what_is_faster_and_what_is_not() -> None:
    page = page_of_bench("gpt2.json", "resnet18.json")
    assert "gpt2: steprule's default step is faster than torch's fastest for 4 of 4 rules" in page.text
    assert "It is slower for AdamW (0.944 ×)." in page.text
    assert "steprule bench --model gpt2 --optimizers adamw,rmsprop,nadam,adadelta,adabelief" in page.text
    assert "All ways to step: gpt2 (34 rows)" in page.text


def page_of_bench(*names: str) -> Read:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = report([BENCHES / name for name in names], Path(folder) / "page.html")
        return Read(file.read_text(encoding="utf-8"))


# Pages


def every_page(tmp_path: Path) -> list[list[Path]]:
    rows = [["step", "loss"], [1, 2.0], [2, "nan"]]
    for seed in range(2):
        make_run(tmp_path / f"runs/a{seed}", "AdamW", seed)
    make_run(tmp_path / "runs/b", "Lion")
    return [
        [make_race(tmp_path / "race")],
        [make_race(tmp_path / "half", complete=False)],
        [make_run(tmp_path / "run")],
        [tmp_path / "runs"],
        [tmp_path / "runs/a0", tmp_path / "runs/a1"],
        [write_csv(tmp_path / "log.csv", rows)],
        [BENCHES / "gpt2.json", BENCHES / "resnet18.json"],
    ]


def test_every_page_is_whole_asks_for_nothing_and_is_translated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Words] = []

    def words_of(language: str) -> Words:
        used.append(Words(language))
        return used[-1]

    monkeypatch.setattr(command, "words_of", words_of)
    for paths in every_page(tmp_path):
        text = report(paths, tmp_path / "page.html", "zh").read_text(encoding="utf-8")
        assert not used[-1].untranslated
        page = Read(text)
        assert text.startswith('<!doctype html>\n<html lang="zh">')
        assert "default-src 'none'" in text
        for tag, attributes in page.tags:
            address = attributes.get("src") or attributes.get("href")
            assert address is None or address.startswith("data:"), (tag, address)
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids))
        charts = [a for tag, a in page.tags if tag == "svg" and "chart" in str(a.get("class"))]
        assert charts
        assert all(a.get("aria-label") for a in charts)
        assert len(text) < 500_000


def test_translations_have_the_same_fields() -> None:
    for english, chinese in Words("zh")._known.items():
        fields = [{name for _, name, *_ in Formatter().parse(text) if name} for text in (english, chinese)]
        assert fields[0] == fields[1], english


# The command


def test_the_command_prints_where_the_page_is(race: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "report", str(race), "--out", str(race / "own.html"), "--lang", "zh")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out == f"{race / 'own.html'}\n"


def test_what_the_command_refuses(race: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single, empty, foreign = make_run(tmp_path / "run"), tmp_path / "empty", tmp_path / "mine.html"
    empty.mkdir()
    foreign.write_text("my own page")
    before = everything_in(tmp_path)
    for arguments, told in (
        (["nowhere"], "no such file or folder: nowhere"),
        ([str(race), str(single)], "is a race, which has a page of its own"),
        ([str(empty)], "there is nothing to report in"),
        ([str(single), "--lang", "fr"], "--lang fr: there are pages in en and zh"),
        ([str(single), "--out", str(foreign)], "exists and is no report of steprule"),
        ([str(single), "--out", str(empty)], "is a folder"),
        ([str(single), "--out", str(tmp_path / "no/page.html")], "cannot write"),
        ([str(BENCHES / "gpt2.json"), str(single)], "do not go together"),
        ([str(BENCHES / "matrix-rules.json")], "is not a measurement by `steprule bench`"),
        ([""], "it is empty"),
    ):
        assert_refused(run(capsys, "report", *arguments), told)
    assert everything_in(tmp_path) == before
