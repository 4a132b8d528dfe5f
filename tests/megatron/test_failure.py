"""A step that fails half-way ends the job soon, says where it failed first of all, and the next start goes on."""

import re
import time

import pytest

from tests.megatron import failing_run
from tests.megatron.pipeline.test_schedules import MODEL, TWO, assert_bit_equal, run
from tests.megatron.pretraining import tiny
from tests.ranks import RankError, run_ranks

SCHEDULE = (TWO, "--pp-schedule zb-h1", "--train-iters 4")
WHERE = "pipeline rank 1 failed at 1F1: stage 1, microbatch 1"


def seconds_since_failure(log):
    return time.monotonic() - float(re.search(r"fails at ([\d.]+) s", log)[1])


def test_a_failing_rank_ends_all_ranks():
    with pytest.raises(RankError) as error:
        run_ranks(2, failing_run.train, tiny(MODEL, *SCHEDULE))
    assert seconds_since_failure(error.value.log) < 30
    assert error.value.errors[1].startswith("ZeroDivisionError: on purpose")
    assert WHERE in error.value.errors[1]
    # what rank 0 says when its peer is gone comes later
    first = re.search(r"Traceback(?:.*\n)*?([\w.]*Error: .*\n.*)", error.value.log)[1]
    assert first.startswith("ZeroDivisionError: on purpose")
    assert WHERE in first


@pytest.mark.slow
def test_a_failed_job_says_where_and_resumes_as_if_unbroken(tmp_path):
    checkpoints = f"--save {tmp_path} --load {tmp_path} --save-interval 2"
    with pytest.raises(RankError, match=WHERE):
        run_ranks(2, failing_run.train, tiny(MODEL, *SCHEDULE, checkpoints))
    log, parameters = run(2, *SCHEDULE, checkpoints)
    assert [step["iteration"] for step in log] == [3, 4]
    whole, expected = run(2, *SCHEDULE)
    assert_bit_equal((log, parameters), (whole[2:], expected))
