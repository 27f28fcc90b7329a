"""A page in headless Chromium, where there is one: its script has run. `.ci/browser` tests more of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from races import canned_race

from steprule.lab.reporting.command import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_script_of_a_page_runs(tmp_path: Path) -> None:
    page = report([canned_race(tmp_path / "race", task="</script>").path])
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'chromium'}")
    dumped = subprocess.run(
        [str(CHROMIUM), *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    points = re.findall(r'class="p[^"]*" d="[^"]*"([^>]*)>', dumped)
    assert len(points) > 300
    with_words = [point for point in points if "aria-label" in point]
    # Legends have a sample of each mark without words.
    assert len(with_words) == page.read_text(encoding="utf-8").count("<title>") - 1 - dumped.count(
        'class="bar"'
    )
    assert all('tabindex="-1"' in point for point in with_words)
    assert dumped.count("<button") > 5
