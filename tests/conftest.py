from collections.abc import Callable
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  the hook finds it by name

# shapes in signatures are checked while the tests run
install_import_hook(["megatron_cp.context"], "tests.typecheck.check")

type Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a recipe into an empty current folder; its name comes back."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "run.yaml") -> str:
        Path(name).write_text(text)
        return name

    return write
