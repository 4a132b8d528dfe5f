"""Random cases by hypothesis: a few of fixed seeds by default, `FUZZ_CASES=10000 pytest tests/fuzz` for that many."""

import faulthandler
import os
import secrets
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase

# cases of each test by default, which take three minutes in all
BY_DEFAULT = 40
# a test ends after so many seconds, with fewer cases than were asked for
SECONDS = 20 * 60
# a case that computes for longer, or does not end in ten times as long where other programs run, is a hang: all threads
# are printed, and the process ends
HANG = 60

cases = int(os.environ.get("FUZZ_CASES", "0"))
seed = int(os.environ.get("FUZZ_SEED", secrets.randbits(32)))
hypothesis.settings.register_profile(
    "megatron_cp",
    max_examples=cases or BY_DEFAULT,
    derandomize=not cases,
    # a smaller case is for the person who looks for the fault
    phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if cases else [])],
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[*HealthCheck],
)
hypothesis.settings.load_profile("megatron_cp")


class Over(BaseException):
    """The time of a test is over; hypothesis catches Exceptions, and replays cases that are rejected."""


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """End a test whose time is over as one that has passed."""
    try:
        return (yield)
    except Over:
        return True


class Cases:
    """The cases of one test: how many were run, how many were refused, and the clock that ends it.

    stderr: a descriptor that pytest does not capture
    """

    def __init__(self, stderr: int) -> None:
        self.stderr = stderr
        self.began = time.monotonic()
        self.run = 0
        self.refused = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Run one case; a hang ends the process with the stacks of all threads."""
        if time.monotonic() - self.began > SECONDS:
            raise Over
        self.run += 1
        faulthandler.dump_traceback_later(10 * HANG, exit=True, file=self.stderr)
        # the signal's own action, which ends the process, comes after the stacks
        faulthandler.register(signal.SIGPROF, file=self.stderr, chain=True)
        signal.setitimer(signal.ITIMER_PROF, HANG)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module", autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Give every test of a long run one seed, which is printed and can be given back."""
    if cases:
        for name, function in vars(request.module).items():
            if name.startswith("test_") and hasattr(function, "hypothesis"):
                hypothesis.seed(seed)(function)


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Iterator[Cases]:
    """Count a test's cases and print the count, with the seed of a long run."""
    captured = request.config.pluginmanager.getplugin("capturemanager")
    with captured.global_and_fixture_disabled():
        found = Cases(os.dup(2))
    yield found
    os.close(found.stderr)
    with captured.global_and_fixture_disabled():
        given = f"FUZZ_SEED={seed}" if cases else "fixed seeds"
        took = time.monotonic() - found.began
        print(f"\n{request.node.name}: {found.run} cases, {found.refused} refused, {took:.0f} s, {given}")
