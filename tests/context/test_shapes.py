"""Attention keeps the shapes that its signatures name, in calls of every kind."""

import subprocess
import sys

import pytest

from tests.cases import slow_unless

QUICK = ["tests/context/test_backends.py", "-k", "test_backend_equals_dense and 3-8-2"]
FEATURES = [f"tests/context/test_{name}.py" for name in ("alibi", "cross", "documents", "dropout", "keep", "sinks")]


@pytest.mark.parametrize("asked", slow_unless([QUICK], [QUICK, FEATURES]), ids=["backends", "features"])
def test_calls_keep_the_shapes_of_their_signatures(asked):
    command = [sys.executable, "-m", "pytest", "--quiet", "--check-shapes", "-p", "no:cacheprovider", *asked]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]


WRONG = """
from tests.typecheck import check_shapes
check_shapes()
import torch
from megatron_cp.context.merge import SoftmaxMerge
like = torch.zeros(4, 1, 2, 8)
SoftmaxMerge(like).add(slice(0, 4), like, torch.zeros({lse}))
"""


def test_a_wrong_shape_is_noticed():
    runs = [
        subprocess.run([sys.executable, "-c", WRONG.format(lse=lse)], capture_output=True, text=True, check=False)
        for lse in ("4, 1, 2", "4, 2")
    ]
    assert [run.returncode for run in runs] == [0, 1], runs[0].stderr
    assert "TypeCheckError" in runs[1].stderr
