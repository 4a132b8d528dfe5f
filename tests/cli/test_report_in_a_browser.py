"""The page of `megatron-cp report` draws its curves in a real browser, and nothing in it fails."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from megatron_cp import runlog
from megatron_cp.cli import app
from tests import browser

# each starts a browser
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "there is a browser"),
]

CLICK = """
<script>
const drawn = setInterval(() => {
  const button = [...document.querySelectorAll(".updatemenu-button")].find(one => one.textContent == "tokens");
  if (!button) return;
  clearInterval(drawn);
  button.dispatchEvent(new MouseEvent("click", {bubbles: true}));
  setTimeout(() => document.body.dataset.axis = document.querySelector(".xtitle").textContent, 500);
}, 50);
</script></body>"""


def run_folder(folder: Path, rate: float = 3e-4) -> Path:
    """The logs of a run of 40 iterations with an evaluation, a skipped update, a gradient that is none, and experts."""
    folder.mkdir()
    runlog.note_start(folder, {"recipe": "tiny", "command": "torchrun <b> -m x", "versions": "torch 2", "host": "here"})
    for number in range(1, 41):
        fields = {
            "consumed samples": 16.0 * number,
            "elapsed time per iteration (ms)": 900.0 if number == 1 else 200.0 + number % 7,
            "global batch size": 16.0,
            "learning rate": rate * min(1, number / 10),
            "lm loss": 5.5 / number**0.3,
            "load_balancing_loss": 1.0 + 1 / number,
            "grad norm": float("inf") if number == 20 else 1.0 + 1 / number,
            "memory (MB)": 1000.0,
            "number of skipped iterations": float(number == 30),
        }
        if number == 30:
            del fields["lm loss"]
        runlog.append(folder / runlog.LOG_NAME, runlog.Iteration(number, 40, fields))
    lines = [f"  seq_length ........ 512\n  lr ............. {rate}\n[megatron-cp] layers <i> 1-4: zigzag\n"]
    lines += [f" validation loss at iteration {n} | lm loss value: {5.6 / n**0.3:E} | \n" for n in (20, 40)]
    (folder / "run.log").write_text("".join(lines))
    (folder / "tokens_per_expert").mkdir()
    counted = [
        {"iter": number, "block": "decoder", "layer": layer, "tpe": [[10 * layer, 30], [20, 40 + number]]}
        for number in (10, 20, 30, 40)
        for layer in (1, 2)
    ]
    (folder / "tokens_per_expert/rank0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in counted))
    return folder


def reported(*words: object) -> None:
    done = CliRunner().invoke(app, ["report", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0


def panels(seen: browser.Seen) -> int:
    found = re.search(r'data-drawn="(\d+)"', seen.dom)
    assert found, seen.console
    return int(found[1])


def colours(picture: Path) -> int:
    with Image.open(picture) as image:
        found = image.convert("RGB").getcolors(1 << 24)
    return len(found or [])


def test_a_run_is_drawn_and_its_axis_becomes_tokens(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "one")
    reported(run, "--cluster", "dgx-h100")
    page = run / "report.html"
    page.write_text(page.read_text().replace("</body>", CLICK))
    seen = browser.look(page, tmp_path / "seen.png")
    assert seen.console == []
    assert 'data-axis="tokens"' in seen.dom
    # loss, learning rate, gradient norm, step time, tokens/s, memory, balance, experts
    assert panels(seen) == 8
    assert colours(tmp_path / "seen.png") > 100
    for text in ("validation", "learning rate", "iteration", "skipped iterations", "NaN iterations"):
        assert text in seen.dom


def test_runs_are_compared(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "slow"), run_folder(tmp_path / "fast", rate=1e-3)]
    reported(*runs)
    seen = browser.look(runs[0] / "compare.html", tmp_path / "seen.png")
    assert seen.console == []
    assert panels(seen) == 8
    assert "arguments that differ: 1" in seen.dom
    assert "fast validation" in seen.dom


def test_a_page_that_fails_is_noticed(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "one")
    reported(run)
    page = run / "report.html"
    faults = '<script>nothing.here()</script><img src="https://example.com/x.png"></body>'
    page.write_text(page.read_text().replace("</body>", faults))
    seen = browser.look(page, tmp_path / "seen.png")
    assert any("nothing is not defined" in line for line in seen.console)
    assert any("Content Security Policy" in line for line in seen.console)
