"""The table of all results, written anew with every row, so that a run that is cut short leaves what it found."""

import json
from pathlib import Path
from typing import NamedTuple

Figure = str | int | float


class Row(NamedTuple):
    """One case of a step. verdict: "ok", "wrong", "failed", "left out", or empty for a mere measurement."""

    case: str
    figures: dict[str, Figure]
    verdict: str = ""


class Table:
    """Rows with the steps they come from, in `gpu_check.md` and `gpu_check.json` of a folder.

    title: the device and the versions that the figures hold for
    """

    def __init__(self, folder: Path, title: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._title = folder, title
        self.rows: list[tuple[str, Row]] = []
        self.write()

    def add(self, step: str, row: Row) -> None:
        """Append a row, print it and write both files."""
        self.rows.append((step, row))
        print(f"{step:14s} {row.case}: {_words(row)}", flush=True)
        self.write()

    def write(self) -> None:
        """Write both files."""
        lines = [f"# {self._title}", "", "| step | case | found |", "|---|---|---|"]
        lines += [f"| {step} | {row.case} | {_words(row)} |" for step, row in self.rows]
        (self._folder / "gpu_check.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rows = [{"step": step, **row._asdict()} for step, row in self.rows]
        text = json.dumps({"title": self._title, "rows": rows}, indent=1)
        (self._folder / "gpu_check.json").write_text(text + "\n", encoding="utf-8")

    @property
    def broken(self) -> list[str]:
        """Rows that say that something is wrong, as step and case."""
        return [f"{step}: {row.case}" for step, row in self.rows if row.verdict in ("wrong", "failed")]


def _words(row: Row) -> str:
    figures = [f"{name} {_number(value)}" if name else _number(value) for name, value in row.figures.items()]
    text = ", ".join([row.verdict, *figures] if row.verdict else figures)
    return text.replace("|", "/").replace("\n", " ")


def _number(value: Figure) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
