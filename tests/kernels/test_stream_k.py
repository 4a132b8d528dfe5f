"""Stream-K: the kernel equals torch under the interpreter, and its plan counts what programs do."""

import json
import os
import subprocess
import sys

import pytest

from megatron_cp.kernels.stream_k_plan import FIX_UP, HALF, cut, predict, wave_efficiency
from tests.cases import slow_unless

BLOCK = (16, 16, 16)
CLOSE = 1e-5


@pytest.mark.parametrize("count", slow_unless([2], [2, 60]))
def test_the_kernel_equals_torch_on_small_shapes(count):
    pytest.importorskip("triton", reason="Stream-K is written in Triton, which comes with torch for CUDA")
    script = [sys.executable, "-m", "tests.kernels.stream_k_interpreted", str(count)]
    run = subprocess.run(
        script, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["count"] == count + 3
    assert found["worst"] < CLOSE


def steps_of(plan):
    """Steps of each program, and how often each step of each tile is computed, played one by one."""
    done, steps = {}, [0] * plan.programs
    for program in range(plan.programs):
        for tile in range(program, plan.whole, plan.programs):
            for step in range(plan.inner):
                done[tile, step] = done.get((tile, step), 0) + 1
                steps[program] += 1
        first = program * plan.share
        for at in range(first, min(first + plan.share, plan.shared * plan.inner)):
            place = (plan.whole + at // plan.inner, at % plan.inner)
            done[place] = done.get(place, 0) + 1
            steps[program] += 1
    return steps, done


SHAPES = [(1, 16, 1), (33, 50, 40), (80, 129, 100), (160, 16, 100), (160, 129, 40)]


@pytest.mark.parametrize("programs", [1, 3, 4, 7])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_each_step_is_computed_once_and_the_busiest_program_is_predicted(m, n, k, programs):
    plan = cut(m, n, k, BLOCK, programs)
    steps, done = steps_of(plan)
    assert done == {(tile, step): 1 for tile in range(plan.tiles) for step in range(plan.inner)}
    assert max(steps) == plan.busiest
    assert plan.efficiency == pytest.approx(sum(steps) / (programs * max(steps)))
    assert max(steps) - min(steps) <= plan.busiest - plan.whole // programs * plan.inner


@pytest.mark.parametrize(
    ("m", "n", "programs"), [(m, n, g) for m in (16, 80, 160) for n in (16, 129) for g in (1, 4, 7)]
)
def test_wave_efficiency_is_that_of_counted_waves(m, n, programs):
    tiles = cut(m, n, 16, BLOCK, programs).tiles
    waves = len(range(0, tiles, programs))
    assert wave_efficiency(m, n, BLOCK, programs) == pytest.approx(tiles / (waves * programs))


def test_a_last_wave_that_is_nearly_empty_is_where_it_pays():
    # 133 tiles on 132 processors: a second wave for one tile, against shares of two waves' steps
    m, n, k, programs = 133 * 16, 16, 1024, 132
    assert wave_efficiency(m, n, BLOCK, programs) < 0.51
    assert cut(m, n, k, BLOCK, programs).efficiency > 0.98


@pytest.mark.parametrize(("m", "n", "k"), [(1024, 1024, 32768), (2304, 2304, 8192), (4096, 4096, 8192)])
def test_the_prediction_is_that_of_counted_steps(m, n, k):
    plan = cut(m, n, k, HALF.block, 132)
    found, steps = predict(m, n, k, HALF, 132), steps_of(plan)[0]
    work = plan.tiles * plan.inner
    assert found.by_stream == pytest.approx(work / (132 * (max(steps) + FIX_UP)))
    assert found.by_tiles == pytest.approx(work / (132 * plan.inner * len(range(0, plan.tiles, 132))))
    # 32 tiles on 132 processors, and 162: less than 0.65 of the processors' time; 512 fill their waves
    assert found.pays == (m < 4096)
