"""Makes a picture of the upper part of a report, for the README; needs chromium.

python benchmarks/report_picture.py benchmarks/results/MACHINE/race-mnist
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT, COLOURS = 1100, 1160, 128


def main() -> None:
    """Write report.png beside the report.html of a folder."""
    parser = argparse.ArgumentParser(description="Make a picture of a report.")
    parser.add_argument("folder", type=Path, help="of a race or a run, with its report.html")
    folder: Path = parser.parse_args().folder
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or not (folder / "report.html").is_file():
        sys.exit(f"report_picture: chromium and {folder / 'report.html'} are needed.")
    with tempfile.TemporaryDirectory() as temporary:
        shot = Path(temporary) / "shot.png"
        options = ("--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}")
        page = (folder / "report.html").resolve().as_uri()
        subprocess.run(
            [chromium, *options, f"--user-data-dir={temporary}/data", f"--screenshot={shot}", page],
            check=True,
            capture_output=True,
        )
        # A page has few colours; with a palette the file is a third as large.
        picture = Image.open(shot).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        picture.save(folder / "report.png", optimize=True)


if __name__ == "__main__":
    main()
