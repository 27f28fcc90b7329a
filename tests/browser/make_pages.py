"""Writes pages of every kind into a folder, for the tests in a browser: `python make_pages.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from races import canned_race
from reports import make_run

from steprule.lab.reporting.command import report

BENCHES = Path(__file__).parents[2] / "benchmarks/results/epyc-2-cores"


def main(folder: Path) -> None:
    """Make what the pages are of, and the pages."""
    made = folder / "made"
    make_run(made / "run")
    for seed in range(3):
        make_run(made / f"runs/a{seed}", "AdamW", seed)
        make_run(made / f"runs/l{seed}", "Lion", seed, end=0.06)
    # A name that must stay text.
    race = canned_race(made / "race", task="</script><script>alert(1)</script>").path
    for name, paths in {
        "race": [race],
        "half": [canned_race(made / "half", complete=False).path],
        "run": [made / "run"],
        "runs": [made / "runs"],
        "bench": [BENCHES / "gpt2.json", BENCHES / "resnet18.json"],
    }.items():
        report(paths, folder / f"{name}.html")
    report([race], folder / "race-zh.html", "zh")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
