"""Islands wait for each other at a sync on their hosts, so that one that is gone is named and the others end.

A host notices at once when the process at the other end of a connection has ended. Processes that have noticed end too,
and would pass for gone themselves: so each notes in the run's store that it has arrived.
"""

from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cp.comm import GroupFabric, Transfer
from megatron_cp.errors import CannotRun


def open_connections(timeout_minutes: int | None) -> None:
    """Connect the hosts of the ranks that hold this shard, one of each island; all call it in the first step."""
    group = parallel_state.get_inter_distributed_optimizer_instance_group()
    _hosts(tuple(dist.get_process_group_ranks(group)), timeout_minutes)


def wait_for_all(step: int, timeout_minutes: int | None) -> None:
    """Return once every island has come to the sync of a step.

    Raises RuntimeError with the islands that are gone, or did not come within --distributed-timeout-minutes.
    """
    group = parallel_state.get_inter_distributed_optimizer_instance_group()
    ranks = tuple(dist.get_process_group_ranks(group))
    hosts = _hosts(ranks, timeout_minutes)
    store = dist.distributed_c10d._get_default_store()
    store.set(_arrival(dist.get_rank()), str(step))
    others = [island for island in range(hosts.size) if island != hosts.rank]
    messages: dict[int, Transfer] = {}
    failed = []
    for island in others:
        try:
            messages[island] = hosts.exchange([(torch.zeros(1), island)], [(torch.zeros(1), island)])
        except RuntimeError:
            failed.append(island)
    for island, message in messages.items():
        try:
            message.wait()
        except RuntimeError:
            failed.append(island)
    gone = [island for island in sorted(failed) if _last_arrival(store, ranks[island]) != step]
    if failed:
        raise CannotRun(_line(step, gone or failed, ranks))


@lru_cache(1)
def _hosts(ranks: tuple[int, ...], timeout_minutes: int | None) -> GroupFabric:
    timeout = None if timeout_minutes is None else timedelta(minutes=timeout_minutes)
    made = dist.new_group(list(ranks), timeout, "gloo", use_local_synchronization=True, group_desc="ISLANDS")
    assert isinstance(made, dist.ProcessGroup)
    return GroupFabric(made)


def _arrival(rank: int) -> str:
    return f"megatron_cp/sync/{rank}"


def _last_arrival(store: dist.Store, rank: int) -> int:
    """Return the step of the last sync that a rank has come to, 0 before the first."""
    return int(store.get(_arrival(rank))) if store.check([_arrival(rank)]) else 0


def _line(step: int, gone: list[int], ranks: tuple[int, ...]) -> str:
    named = ", ".join(f"island {island} (rank {ranks[island]})" for island in gone)
    left = len(ranks) - len(gone)
    way_out = (
        f"--num-distributed-optimizer-instances {left}" if left > 1 else "one island, which is a run without islands"
    )
    return (
        f"step {step}: {named} did not come to the sync, its process has ended or is out of reach; start again from "
        f"the last checkpoint, on the ranks of the others with {way_out}"
    )
