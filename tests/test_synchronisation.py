"""A training step never waits for its device: no call of a kind that does, in the folders that run in a step.

`tests/context/trace/test_in_flight.py` holds the same of what the loops of context parallelism execute.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.imports import FILES, PACKAGE, tree

IN_A_STEP = (
    *("comm/", "context/", "kernels/", "pipeline/", "tensor/"),
    *("megatron/layers/", "megatron/pipeline/", "megatron/tensor/"),
    *("experts/choices.py", "megatron/experts/choices.py"),
)
# recordings and proofs, on tensors without data or on a CPU
OFFLINE = "context/trace/"
WAITING = {"item", "tolist", "cpu", "numpy", "synchronize", "nonzero", "is_nonzero", "masked_select", "unique"}
# objects travel pickled, through the host of either side
OBJECTS = ("_object", "_object_list")
# our own of that kind
WRAPPING = {"hand_over"}
# with "cpu" among their arguments
COPYING = {"to", "_moved"}
# file -> calls, each for the reason beside it
ALLOWED = {
    # when groups are made, and the functions of WRAPPING
    "comm/distributed.py": ["dist.all_gather_object", "dist.recv_object_list", "dist.send_object_list"],
    # forms of losses in a step's first call, and of evaluations; losses that are no tensors
    "megatron/pipeline/v_placement.py": ["_moved", "hand_over", "hand_over"],
    # slopes when a plan is made, and the comparison at a run's start
    "context/alibi.py": ["slopes.tolist"],
    "context/self_check.py": [
        "((ours.double() - theirs[mine]).abs().max() / theirs.abs().max()).nan_to_num(nan=torch.inf).item"
    ],
    # shapes at a layer's first call, the plan of a step before it begins, and costs once they are measured
    "comm/fabric.py": ["gathered.flatten(0, 1).tolist", "gathered.max(dim=0).values.tolist"],
    # the places of frames, which are in the token ids; backward of a frame that stands in several places
    "context/redeal.py": [
        "(ids == placeholder).nonzero",
        "(ids == placeholder).nonzero().tolist",
        "(nth == number).nonzero",
    ],
    "megatron/layers/llava.py": [
        "first.nonzero",
        "first.nonzero().tolist",
        "num_image_tiles.tolist",
        "numbers[first].tolist",
    ],
    # an op is chosen once for each shape
    "kernels/torch_sdpa.py": ["end.synchronize"],
    # sizes of what a stage moves to its peer, in the first step
    "pipeline/saved.py": ["count.item", "sizes.tolist"],
    # ends of documents in a batch, which the data loader makes on the CPU
    "megatron/pipeline/slices.py": ["ends.tolist"],
    # the layout of a batch, on its way with the tokens; the ends of documents are read before it
    "megatron/layers/batches.py": ["planned[0].tolist"],
    # of the last rank, where Megatron reads what it logs
    "megatron/experts/choices.py": ["counts.tolist"],
    # the end of the measured steps of --pp-profile-steps
    "pipeline/clock.py": ["torch.cuda.synchronize"],
}


def waiting(root: ast.AST) -> Iterator[str]:
    """Calls for which the host waits until the device has come to them."""
    for node in ast.walk(root):
        if isinstance(node, ast.Call) and waits(node):
            yield ast.unparse(node.func)


def waits(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute):
        name = call.func.attr
        return name in WAITING or name.endswith(OBJECTS) or (name in COPYING and to_the_host(call))
    return isinstance(call.func, ast.Name) and (
        call.func.id in WRAPPING or (call.func.id in COPYING and to_the_host(call))
    )


def to_the_host(call: ast.Call) -> bool:
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(isinstance(value, ast.Constant) and value.value == "cpu" for value in given)


def test_no_step_waits_for_its_device() -> None:
    found = {}
    for path in FILES:
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(IN_A_STEP) and not name.startswith(OFFLINE) and (calls := sorted(waiting(tree(path)))):
            found[name] = calls
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        *("loss.item()", "x.sum().tolist()", "torch.cuda.synchronize()", "x.to(d).cpu()", "x.to('cpu')"),
        *("x.to(device='cpu', copy=True)", "dist.send_object_list(box)", "dist.all_gather_object(found, x)"),
        *("hand_over(group, 0, 1, store)", "_moved(store, 'cpu')"),
    ],
)
def test_a_call_that_waits_is_noticed(code: str) -> None:
    assert list(waiting(ast.parse(code)))


@pytest.mark.parametrize("code", ["x.to(device)", "torch.device('cpu')", "x.copy_(y, non_blocking=True)"])
def test_other_calls_are_not(code: str) -> None:
    assert not list(waiting(ast.parse(code)))
