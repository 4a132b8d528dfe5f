"""Islands meet at the steps that a schedule says."""

import pytest

from megatron_cp.replicas.sync_steps import is_read, phases_of, syncs


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("1", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("4", [4, 8]),
        # one-shot
        ("10", [10]),
        # post-local
        ("1:1,4:3", [1, 2, 3, 6, 9]),
        # ever more often; the step before another phase is a sync
        ("1:4,6:2,9:1", [4, 5, 7, 8, 9, 10]),
    ],
)
def test_islands_meet_at_every_h_th_step_of_a_phase(text: str, met: list[int]) -> None:
    assert [step for step in range(1, 11) if syncs(phases_of(text), step)] == met


def test_weights_are_read_at_the_end_and_at_every_so_many_steps() -> None:
    assert [step for step in range(1, 13) if is_read(step, 11, (4, 6))] == [4, 6, 8, 11, 12]
    assert not is_read(3, None, ())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("often", "is H or STEP:H,STEP:H, numbers of steps, got 'often'"),
        ("1:2,3", "numbers of steps, got '1:2,3'"),
        ("1:2:3", "numbers of steps, got '1:2:3'"),
        ("-1", "numbers of steps, got '-1'"),
        ("0", "at least one step between two syncs"),
        ("1:0,5:2", "at least one step between two syncs"),
        ("2:1", "the first phase begins at step 1"),
        ("1:4,1:2", "every other after the one before"),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        phases_of(text)
