"""A training step never waits for its device: no call of a kind that does, in the folders that run in a step.

`tests/context/trace/test_in_flight.py` holds the same of what the loops of context parallelism execute.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.imports import FILES, PACKAGE, tree

IN_A_STEP = ("comm/", "context/", "kernels/", "megatron/layers/", "megatron/pipeline/", "pipeline/")
# recordings and proofs, on tensors without data or on a CPU
OFFLINE = "context/trace/"
WAITING = {"item", "tolist", "cpu", "numpy", "synchronize", "nonzero", "is_nonzero", "masked_select", "unique"}
# file -> calls, each for the reason beside it
ALLOWED = {
    # shapes at a layer's first call, and costs once they are measured
    "comm/fabric.py": ["gathered.flatten(0, 1).tolist", "gathered.max(dim=0).values.tolist"],
    # an op is chosen once for each shape
    "kernels/torch_sdpa.py": ["end.synchronize"],
    # sizes of what a stage moves to its peer, in the first step
    "pipeline/saved.py": ["count.item", "sizes.tolist"],
    # ends of documents in a batch, which the data loader makes on the CPU
    "megatron/pipeline/slices.py": ["ends.tolist"],
    # the end of the measured steps of --pp-profile-steps
    "pipeline/clock.py": ["torch.cuda.synchronize"],
}


def waiting(root: ast.AST) -> Iterator[str]:
    """Calls for which the host waits until the device has come to them."""
    for node in ast.walk(root):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITING:
            yield ast.unparse(node.func)


def test_no_step_waits_for_its_device() -> None:
    found = {}
    for path in FILES:
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(IN_A_STEP) and not name.startswith(OFFLINE) and (calls := sorted(waiting(tree(path)))):
            found[name] = calls
    assert found == ALLOWED


@pytest.mark.parametrize("code", ["loss.item()", "x.sum().tolist()", "torch.cuda.synchronize()", "x.to(d).cpu()"])
def test_a_call_that_waits_is_noticed(code: str) -> None:
    assert list(waiting(ast.parse(code)))
