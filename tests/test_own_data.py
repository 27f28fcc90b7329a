"""`--data`: a user's own tables, texts, arrays and images become tasks; bad files are named to the line."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import assert_refused, run
from PIL import Image

from steprule.lab import Task
from steprule.lab.errors import LabError
from steprule.lab.own_data.source import Source
from steprule.lab.own_data.task import task
from steprule.lab.tasks import load_task

HEAD = "area,rooms,city,note,price"


def houses(rows: int = 60) -> list[str]:
    """A line of names, then rows: numbers, some missing, words, a text that is never the same, a quantity."""
    cities = ("Rome", "Oslo", "NA")
    return [
        HEAD,
        *(
            f'{40 + 7 * (i % 13)},{i % 5 or ""},{cities[i % 3]},"note, {i}",{100 + 3.5 * i}'
            for i in range(rows)
        ),
    ]


def written(file: Path, lines: list[str]) -> Path:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def of(path: Path, target: str | None = None, **more: Any) -> Task:
    """The task of a source, from its name, as a resumed run loads it."""
    return load_task(Source(path, target, **more).name)


def sizes(made: Task) -> list[int]:
    return [len(part[0]) for part in (made.train, made.validation, made.test) if part is not None]  # type: ignore[index, arg-type]


def part(made: Task, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = getattr(made, name)
    return torch.as_tensor(x), torch.as_tensor(y)


def test_numbers_words_and_missing_values_become_numbers(tmp_path: Path) -> None:
    made = of(written(tmp_path / "houses.csv", houses(100)), "price")
    assert made.facts["target"].startswith("price, numbers; standardised with mean ")
    assert made.facts["inputs"] == "2 columns of numbers, 1 of words (3 different)"
    assert made.facts["left out"] == "note (70 different words)"
    assert sizes(made) == [70, 15, 15]
    x, y = part(made, "train")
    assert x.mean(0)[:2].abs().max() < 0.3
    assert y.mean() == pytest.approx(0, abs=1e-6)
    assert y.std(correction=0) == pytest.approx(1, abs=1e-6)
    assert set(x[:, 2:5].unique().tolist()) == {0.0, 1.0}
    assert (x[:, 2:5].sum(1) == 1).all()
    assert made.score is not None
    assert made.score.name == "R²"
    assert made.model(x).shape == y.shape


def test_classes_are_split_alike(tmp_path: Path) -> None:
    lines = ["a,b,kind", *(f"{i},{i % 7},{'rare' if i % 10 == 0 else 'usual'}" for i in range(200))]
    made = of(written(tmp_path / "x.csv", lines), "kind")
    assert made.facts["target"] == "kind, 2 classes"
    assert sizes(made) == [140, 30, 30]
    for name in ("train", "validation", "test"):
        labels = part(made, name)[1]
        assert labels.dtype == torch.int64
        assert (labels == 0).float().mean() == pytest.approx(0.1)
    rows = torch.cat([part(made, name)[0] for name in ("train", "validation", "test")])
    assert len(rows.unique(dim=0)) == 200


def test_few_whole_numbers_are_classes_and_many_are_a_quantity(tmp_path: Path) -> None:
    few = ["a,y", *(f"{i * 1.5},{i % 4}" for i in range(40))]
    many = ["a,y", *(f"{i * 1.5},{i}" for i in range(40))]
    assert of(written(tmp_path / "few.csv", few), "y").facts["target"] == "y, 4 classes"
    assert of(written(tmp_path / "many.csv", many), "y").facts["target"].startswith("y, numbers")


def test_the_split_the_numbers_and_the_name_are_the_same_each_time(tmp_path: Path) -> None:
    path = written(tmp_path / "my houses?.csv", houses(50))
    one, two = of(path, "price"), of(path, "price")
    for name in ("train", "validation", "test"):
        for left, right in zip(part(one, name), part(two, name), strict=True):
            assert torch.equal(left, right)
    source = Source(path, "a & b=c", tmp_path / "other #1.csv", 20)
    assert Source.named(source.name) == source
    assert one.facts["data sha256"] == two.facts["data sha256"]


def test_scaling_is_learnt_from_the_training_rows_alone(tmp_path: Path) -> None:
    rows = [(float(i), i % 2) for i in range(40)]
    train = written(tmp_path / "train.csv", ["a,y", *(f"{a},{y}" for a, y in rows)])
    other = written(tmp_path / "other.csv", ["y,a", *(f"{y},{a + 1000}" for a, y in rows[:20])])
    made = of(train, "y", validation=other)
    assert made.test is None
    assert sizes(made) == [40, 20]
    values = numpy.arange(40.0)
    expected = (numpy.arange(20) + 1000 - values.mean()) / values.std()
    assert part(made, "validation")[0][:, 0].numpy() == pytest.approx(expected, rel=1e-5)
    written(other, ["y,a", *(f"{y + 7},{a}" for a, y in rows[:20])])
    with pytest.raises(LabError, match=r"other\.csv, line 2, column 'y': the training data have no class '7'"):
        of(train, "y", validation=other)
    written(other, ["y,b", "0,1"])
    with pytest.raises(LabError, match=r"other\.csv has no column 'a', which the training data have"):
        of(train, "y", validation=other)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", "-semicolon.csv"])
def test_tables_may_be_separated_and_packed_in_several_ways(tmp_path: Path, suffix: str) -> None:
    separator = {".tsv": "\t", "-semicolon.csv": ";"}.get(suffix, ",")
    text = "\n".join(separator.join(line) for line in [("a", "y"), *((str(i), str(i % 2)) for i in range(30))])
    path = tmp_path / f"x{suffix}"
    raw = b"\xef\xbb\xbf" + text.encode() + b"\r\n\n"
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    assert of(path, "y").facts["target"] == "y, 2 classes"


def changed(line: int, text: str) -> list[str]:
    lines = houses(40)
    lines[line - 1] = text
    return lines


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (changed(5, "1,2,Rome"), "x.csv, line 5: it has 3 values, but the first line names 5 columns"),
        (
            changed(5, "abc,2,Rome,x,7"),
            "x.csv, line 5, column 'area': 'abc' is not a number, and 39 of the column's 40",
        ),
        (changed(5, "inf,2,Rome,x,7"), "x.csv, line 5, column 'area': inf is not a finite number"),
        (changed(5, "1,2,Rome,x,"), "x.csv, line 5, column 'price': the target is missing"),
        (changed(5, '1,2,"Rome'), "x.csv, line "),
        (changed(1, "area,rooms,area,note,price"), "x.csv, first line: two columns are called 'area'"),
        (changed(1, "area,,city,note,price"), "x.csv, first line: column 2 has no name"),
        (houses(40)[:1], "x.csv has no rows"),
        (houses(10), "there are only 10 rows; at least 20 are needed"),
        ([], "x.csv has no rows"),
        ([HEAD, *["1,2,Rome,x,7"] * 30], "column 'price' has the same value in every row"),
    ],
)
def test_a_bad_table_is_named_to_the_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(LabError) as refused:
        of(written(tmp_path / "x.csv", lines), "price")
    assert message in str(refused.value)


def test_targets_are_asked_for_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", houses(40))
    with pytest.raises(
        LabError, match=r"give the column to predict, --target NAME\. x\.csv has: area, rooms, city"
    ):
        of(path)
    with pytest.raises(LabError, match=r"x\.csv has no column 'prise'\. Did you mean 'price'"):
        of(path, "prise")
    with pytest.raises(LabError, match="column 'note' has 40 different words in 40 rows: these are no classes"):
        of(path, "note")
    (tmp_path / "x.csv").write_bytes(b"a,y\n1,2\n\xff,3\n")
    with pytest.raises(LabError, match=r"x\.csv, line 3: it is not UTF-8"):
        of(path, "y")
    with pytest.raises(LabError, match="no such file or folder"):
        of(tmp_path / "none.csv", "y")
    with pytest.raises(LabError, match="is none of CSV, TSV, Parquet"):
        of(written(tmp_path / "x.xlsx", ["x"]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=80) | st.text('a,;\n"1.e-é \t', max_size=80).map(str.encode))
def test_no_table_fails_otherwise_than_in_one_line(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(raw)
    with pytest.raises(LabError):
        task(Source(path, "a"))


def test_parquet_and_folders_of_hugging_face_are_tables(tmp_path: Path) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")

    columns = {
        "a": [None if i == 3 else i * 0.5 for i in range(40)],
        "b": [i % 2 == 0 for i in range(40)],
        "day": pyarrow.array(range(40), pyarrow.date32()),
        "word": ["x" if i % 3 else None for i in range(40)],
        "y": [i % 2 for i in range(40)],
    }
    table = pyarrow.table(columns)
    parquet.write_table(table, tmp_path / "x.parquet")
    made = of(tmp_path / "x.parquet", "y")
    assert made.facts["inputs"] == "2 columns of numbers, 1 of words (2 different)"
    assert made.facts["left out"] == "day (neither numbers nor words)"
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    with (
        pyarrow.OSFile(str(folder / "data-0.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, table.schema) as w,
    ):
        w.write_table(table)
    again = of(folder, "y")
    assert torch.equal(part(made, "train")[0], part(again, "train")[0])
    (folder / "data-0.arrow").write_bytes(b"no")
    with pytest.raises(LabError, match="saved cannot be read"):
        of(folder, "y")


def png(colour: Any, mode: str = "RGB", size: int = 40) -> bytes:
    held = io.BytesIO()
    Image.new(mode, (size, size), colour).save(held, "PNG")
    return held.getvalue()


def test_pictures_in_a_column_are_images(tmp_path: Path) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")

    pictures = [{"bytes": png((i, 0, 9)), "path": f"{i}.png"} for i in range(30)]
    parquet.write_table(
        pyarrow.table({"image": pictures, "label": [i % 2 for i in range(30)]}), tmp_path / "x.parquet"
    )
    made = of(tmp_path / "x.parquet", "label", size=12)
    x, y = part(made, "train")
    assert x.shape == (22, 3, 12, 12)
    assert x[:, 2].unique().tolist() == [9]
    assert (x[:, 0, 0, 0] % 2 == y).all()


def test_folders_of_images_are_classes(tmp_path: Path) -> None:
    for split, count in (("train", 12), ("val", 4)):
        for kind, colour in (("cat", (250, 0, 0)), ("dog", (0, 250, 0))):
            folder = tmp_path / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(png(colour))
    made = of(tmp_path, size=16)
    assert sizes(made) == [24, 8]
    x, y = part(made, "train")
    assert x.shape == (24, 3, 16, 16)
    assert x.dtype == torch.uint8
    assert ((x[:, 1, 0, 0] > 0).long() == y).all()
    assert made.facts["target"] == "folder, 2 classes"
    assert made.model(x.float()).shape == (24, 2)
    alone = of(tmp_path / "train")
    assert sizes(alone) == [16, 4, 4]
    (tmp_path / "train/cat/3.png").write_bytes(b"not a picture")
    with pytest.raises(LabError, match=r"3\.png cannot be read as an image"):
        of(tmp_path)


def idx(file: Path, values: Any) -> None:
    shape = struct.pack(f">{values.ndim}I", *values.shape)
    file.write_bytes(
        gzip.compress(struct.pack(">HBB", 0, 8, values.ndim) + shape + values.astype("u1").tobytes())
    )


def test_idx_files_are_images_with_labels(tmp_path: Path) -> None:
    draws = numpy.random.default_rng(0)
    for name, count in (("train", 50), ("t10k", 20)):
        idx(tmp_path / f"{name}-images-idx3-ubyte.gz", draws.integers(0, 256, (count, 10, 10)))
        idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", numpy.arange(count) % 5)
    made = of(tmp_path)
    assert sizes(made) == [40, 10, 20]
    assert part(made, "train")[0].shape == (40, 1, 10, 10)
    alone = of(tmp_path / "t10k-images-idx3-ubyte.gz")
    assert sum(sizes(alone)) == 20
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
    with pytest.raises(
        LabError, match=r"t10k-images-idx3-ubyte\.gz cannot be read: it has 1999 bytes of values"
    ):
        of(tmp_path)


def test_arrays_are_rows_or_images(tmp_path: Path) -> None:
    draws = numpy.random.default_rng(0)
    rows, labels = draws.normal(size=(50, 4)), numpy.arange(50) % 3
    numpy.savez(tmp_path / "rows.npz", X=rows, y=labels)
    assert of(tmp_path / "rows.npz").facts["target"] == "y, 3 classes"
    numpy.savez(
        tmp_path / "images.npz", images=draws.integers(0, 255, (50, 8, 8, 3)).astype("u1"), labels=labels
    )
    assert part(of(tmp_path / "images.npz"), "train")[0].shape[1:] == (3, 8, 8)
    numpy.savez(tmp_path / "odd.npz", X=rows, other=labels)
    with pytest.raises(LabError, match=r"odd\.npz has the arrays X, other; it needs inputs"):
        of(tmp_path / "odd.npz")
    assert of(tmp_path / "odd.npz", "other").facts["target"] == "other, 3 classes"
    numpy.savez(tmp_path / "bad.npz", X=rows, y=labels[:9])
    with pytest.raises(LabError, match=r"bad\.npz: X is of shape \(50, 4\) and y of shape \(9,\)"):
        of(tmp_path / "bad.npz")


def test_a_text_is_learnt_by_its_characters(tmp_path: Path) -> None:
    path = written(tmp_path / "poem.txt", ["Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich."] * 60)
    made = of(path)
    x, y = part(made, "train")
    assert torch.equal(x[0, 1:], y[0, :-1])
    count = sum(sizes(made))
    assert sizes(made)[1:] == [count * 15 // 100] * 2
    with pytest.raises(LabError, match="is too short"):
        of(written(tmp_path / "short.txt", ["Hello"]))


def test_train_takes_data_resumes_and_says_what_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
    written(tmp_path / "houses.csv", houses(100))
    given = ("train", "--data", "houses.csv", "--target", "price", "--optimizer", "adamw")
    answer = run(capsys, *given, "--epochs", "2")
    assert answer.code == 0, answer
    assert "left out   note (70 different words)" in answer.out
    assert (tmp_path / "runs/houses-adamw-1/metrics.jsonl").exists()
    answer = run(capsys, *given, "--epochs", "3", "--resume")
    assert answer.code == 0, answer
    assert "after step 6" in answer.out
    written(tmp_path / "houses.csv", houses(101))
    assert "now, but had" in run(capsys, *given, "--epochs", "4", "--resume").err
    assert_refused(run(capsys, "train", "--target", "price"), "--target is a part of --data")
    assert_refused(run(capsys, *given, "--task", "digits"), "give one of them")


def test_a_race_on_a_table_prints_lines_that_train_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "my houses.csv", houses(100))
    answer = run(
        capsys, "tune", "--data", "my houses.csv", "--target", "price", "--minutes", "2", "--epochs", "2",
        "--workers", "1", "--out", "tuned",
    )  # fmt: skip
    assert answer.code == 0, answer
    (line,) = (tmp_path / "tuned/best.txt").read_text().splitlines()
    assert line.startswith(f"steprule train --data '{tmp_path}/my houses.csv' --target price --optimizer AdamW")
