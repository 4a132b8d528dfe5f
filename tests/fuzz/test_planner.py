"""Estimates and plans of any sizes are finite, or are refused in one line."""

import json
import math

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cp.context import BACKENDS
from megatron_cp.pipeline import SCHEDULES
from tests.fuzz.commands import asked
from tests.fuzz.conftest import Cases, cases
from tests.fuzz.strategies import HOSTILE, mostly

pytestmark = pytest.mark.slow

SIZES = st.sampled_from(["1", "2", "4", "8"]) | st.sampled_from(["3", "6", "0", "-1", "16"])
FLAGS = {
    "--tensor-model-parallel-size": SIZES,
    "--pipeline-model-parallel-size": SIZES,
    "--context-parallel-size": SIZES,
    "--cp-comm-type": st.sampled_from([entry.name for entry in BACKENDS]) | st.just("p2p"),
    "--pp-schedule": st.sampled_from(SCHEDULES.names),
    "--num-layers-per-virtual-pipeline-stage": SIZES,
    "--micro-batch-size": SIZES,
    "--seq-length": st.sampled_from(["8192", "131072", "8191", "1", "0"]),
    "--recompute-granularity": st.sampled_from(["full", "selective"]),
    "--window-size": st.sampled_from(["128,0", "0,0", "-1,0"]),
    "--hierarchical-context-parallel-sizes": SIZES,
}
NODES = ["--nproc-per-node", "8", "--nnodes", "8"]
# a case takes a second, and a plan ten
few = hypothesis.settings(max_examples=cases or 8)
fewer = hypothesis.settings(max_examples=cases or 3)


@few
@given(st.data())
def test_estimate(counted: Cases, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(FLAGS)), max_size=4, unique=True))
    words = [word for name in names for word in (name, data.draw(mostly(None, HOSTILE)) or data.draw(FLAGS[name]))]
    with counted.one():
        code, said = asked("estimate", "models/llama3.1-8b", *NODES, "--cluster", "dgx-h100-ib", "--json", *words)
        counted.refused += code != 0
        if code == 0:
            found = json.loads(said[said.index("{") :])
            assert math.isfinite(found["step_seconds"])
            assert found["step_seconds"] > 0


@fewer
@given(
    gpus=st.sampled_from([8, 16, 64, 1, 0, 7, 3, -1]),
    seq=st.sampled_from([8192, 131072, 1000, 1, 0]),
    batch=st.sampled_from(["4M", "64K", "8192", "1", "0", "x"]),
    model=st.sampled_from(["llama3.2-1b", "llama3.1-8b", "llama2-70b", "nothing"]),
)
def test_plan(counted: Cases, gpus: int, seq: int, batch: str, model: str) -> None:
    with counted.one():
        words = ["--model", model, "--gpus", str(gpus), "--seq", str(seq), "--tokens-per-batch", batch]
        code, said = asked("plan", *words, "--cluster", "dgx-h100-ib", "--json")
        counted.refused += code != 0
        if code == 0:
            for one in json.loads(said[said.index("[") :]):
                assert math.isfinite(one["step_seconds"])
                assert one["step_seconds"] > 0
