"""Look at a page in a real browser, the distribution's own chromium: what it draws and what it complains of."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

NAMES = ("chromium", "chromium-browser")
SECONDS = 120
FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --v=0
""".split()


class Seen(NamedTuple):
    """A page as a browser has it.

    dom:     its elements after the scripts ran, as HTML
    console: every message on the console, errors of scripts and refused loads included
    """

    dom: str
    console: list[str]


def missing() -> str:
    """Why no page can be looked at here, or an empty string."""
    return "" if _browser() else "no chromium here (apt-get install chromium)"


def _browser() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def look(page: Path, picture: Path, size: tuple[int, int] = (1280, 2000)) -> Seen:
    """Open a page, let its scripts run, and write a picture (PNG) of the window."""
    browser = _browser()
    assert browser
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        command += ["--virtual-time-budget=5000", f"--screenshot={picture}", "--dump-dom", page.resolve().as_uri()]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    return Seen(ran.stdout, re.findall(r"^\[[^\]]*:CONSOLE\b[^\]]*\] (.*)$", ran.stderr, re.MULTILINE))
