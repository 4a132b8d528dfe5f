"""Threads that talk over gloo do not interrupt each other."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

from megatron_cp.comm import uninterrupted_sends
from megatron_cp.megatron.cpu import cpu_runtime
from tests.ranks import run_ranks


def scheduling() -> int:
    return os.sched_getscheduler(0)


def in_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(scheduling()))
    thread.start()
    thread.join()
    return found[0]


def chosen_before() -> list[int]:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with uninterrupted_sends():
        inside = scheduling()
    return [inside, scheduling()]


def test_threads_that_start_inside_do_not_interrupt_and_the_scheduling_is_put_back() -> None:
    assert scheduling() == os.SCHED_OTHER
    with uninterrupted_sends():
        with uninterrupted_sends():
            assert scheduling() == os.SCHED_BATCH
        assert scheduling() == in_new_thread() == os.SCHED_BATCH
    assert scheduling() == in_new_thread() == os.SCHED_OTHER


def test_scheduling_that_somebody_chose_stays() -> None:
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(chosen_before).result() == [os.SCHED_IDLE, os.SCHED_IDLE]


def under_the_cpu_runtime() -> list[int]:
    with cpu_runtime():
        inside = scheduling()
    return [inside, scheduling()]


def test_training_on_a_cpu_runs_so() -> None:
    assert run_ranks(1, under_the_cpu_runtime) == [[os.SCHED_BATCH, os.SCHED_OTHER]]
