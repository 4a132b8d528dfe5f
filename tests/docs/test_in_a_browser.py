"""The built site's pages open in a real browser, and none of them complains."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import browser
from tests.docs.pages import DOCS

# builds the site and starts browsers
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "there is a browser"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--builder", "html", "--fresh-env", "--quiet", str(DOCS), str(folder)]
    subprocess.run([*command, "--doctree-dir", str(folder / "trees")], cwd=DOCS.parent, check=True)
    return folder


def test_no_page_complains(site: Path, tmp_path: Path) -> None:
    names = sorted(path.stem for path in DOCS.glob("*.md"))
    frames = "".join(f'<iframe src="{name}.html" width="600" height="400"></iframe>' for name in names)
    (site / "frames.html").write_text(f"<!doctype html><title>all pages</title>{frames}")
    seen = browser.look(site / "frames.html", tmp_path / "seen.png")
    assert seen.console == []


@pytest.mark.parametrize("name", ["index", "schedules"])
def test_a_page_is_drawn(site: Path, tmp_path: Path, name: str) -> None:
    seen = browser.look(site / f"{name}.html", tmp_path / "seen.png")
    assert seen.console == []
    assert "<h1>" in seen.dom
    # flags in tables keep their two dashes
    assert not re.search("\u2013[a-z]", seen.dom)
    with Image.open(tmp_path / "seen.png") as image:
        # the sides and the page between them have colours of their own
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100
