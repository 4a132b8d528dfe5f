"""When things happen on a cluster: what small cases must come to, worked out by hand."""

from dataclasses import replace

import pytest

from megatron_cp.context.trace.events import Compute, HostCopy, Message, Pass, Post, Problem, Step, Touch, Wait
from megatron_cp.context.trace.record import record
from megatron_cp.context.trace.simulate import simulate
from megatron_cp.hardware.cluster import Cluster, Link
from megatron_cp.hardware.cluster_file import load_cluster, shipped_clusters

LINK = Link(bytes_per_s=10.0, latency_s=0.0, ports="shared")
CLUSTER = Cluster(
    name="test",
    dtype="float32",
    flops_forward=8.0,
    flops_backward=8.0,
    call_s=0.0,
    touch_bytes_per_s=1.0,
    host_bytes_per_s=1.0,
    ranks_per_node=2,
    inside=LINK,
    between=replace(LINK, bytes_per_s=1.0),
)
CALL = Compute(1, 1, 1, 1, 2, False, False)


def one_pass(*ranks):
    return Pass(tuple(tuple(Step(event, 0) for event in events) for events in ranks), 2)


def post(batch, group, sends=(), recvs=()):
    return Post(batch, group, tuple(Message(*x) for x in sends), tuple(Message(*x) for x in recvs))


def to_each_other(ranks, size):
    group = tuple(range(ranks))
    others = [[(peer, size) for peer in group if peer != rank] for rank in group]
    return one_pass(*([post(0, group, peers, peers), Wait(0)] for peers in others))


def test_a_rank_does_one_thing_after_the_other():
    # 4 * 2 operations at 8 per second, then 3 bytes at 1 per second
    played = simulate(one_pass([CALL, Touch(3)], [CALL]), CLUSTER)
    assert played.time == 4.0
    assert played.ideal == 1.0


def test_a_message_travels_beside_the_computation_and_starts_when_both_are_there():
    sender = [CALL, post(0, (0, 1), sends=[(1, 20)]), CALL]
    receiver = [post(0, (0, 1), recvs=[(0, 20)]), Wait(0)]
    played = simulate(one_pass(sender, receiver), CLUSTER)
    assert [(flight.start, flight.end) for flight in played.flights] == [(1.0, 3.0)]
    assert played.time == 3.0
    assert played.busy(1) == 0.0


def test_a_shared_port_carries_one_neighbour_s_messages_after_the_other_s():
    own = replace(CLUSTER, ranks_per_node=4, inside=replace(LINK, ports="per-neighbour"))
    shared = replace(CLUSTER, ranks_per_node=4)
    assert simulate(to_each_other(4, 10), own).time == pytest.approx(1.0)
    assert simulate(to_each_other(4, 10), shared).time == pytest.approx(3.0)


def test_links_between_nodes_are_a_level_of_their_own():
    # each rank sends 10 bytes to its neighbour at 10 per second, and to two ranks of the other node at 1 per second
    played = simulate(to_each_other(4, 10), CLUSTER)
    assert played.time == pytest.approx(20.0)
    assert max(flight.end for flight in played.flights if flight.inside) == pytest.approx(1.0)


def test_latency_and_the_computing_rank_s_own_part_in_a_transfer():
    slow = replace(CLUSTER, inside=replace(LINK, latency_s=0.5, busy_s_per_byte=0.25))
    played = simulate(to_each_other(2, 10), slow)
    # 20 bytes sent and received take 5 s of the rank's own time; the message itself is there after 1.5 s
    assert played.flights[0].end == pytest.approx(1.5)
    assert played.time == pytest.approx(5.0)


def test_each_message_takes_its_part_of_the_computing_rank():
    played = simulate(to_each_other(2, 1), replace(CLUSTER, inside=replace(LINK, busy_s_per_message=3.0)))
    assert played.time == pytest.approx(3.0)
    # between two waiting ranks the latency comes on top; sequences that share messages share both
    slow = replace(LINK, latency_s=0.5, busy_s_per_message=3.0)
    assert slow.least_s == pytest.approx(3.5)
    assert slow.shared_by(2).least_s == pytest.approx(1.75)


def test_host_copies_run_beside_and_the_pass_ends_with_them():
    played = simulate(one_pass([HostCopy(2), CALL, HostCopy(2)]), CLUSTER)
    assert played.time == pytest.approx(4.0)


def test_more_ranks_than_one_node_has():
    with pytest.raises(ValueError, match="is one node of 2 ranks"):
        simulate(to_each_other(4, 10), replace(CLUSTER, between=None))


@pytest.mark.parametrize("name", shipped_clusters())
def test_shipped_clusters_are_complete(name):
    assert load_cluster(name).flops_forward > 0


def seconds(backend, ports, ranks=8):
    cluster = load_cluster("a100-ib")
    # slow enough for the links to decide
    cluster = replace(cluster, inside=replace(cluster.inside, bytes_per_s=5e9, ports=ports))
    return simulate(record(Problem(backend, ranks, 2**16, 8, 8, 128, causal=False)).forward, cluster).time


def test_token_ring_gains_from_a_port_per_neighbour_and_not_behind_a_switch():
    assert seconds("tokenring", "per-neighbour") < 0.75 * seconds("zigzag", "per-neighbour")
    assert seconds("tokenring", "shared") > 0.95 * seconds("zigzag", "shared")


def test_zigzag_is_nearer_to_ideal_than_a_contiguous_ring():
    cluster = load_cluster("h100-ib")
    zigzag, ring = (
        simulate(record(Problem(name, 8, 2**17, 8, 8, 128, causal=True)).forward, cluster)
        for name in ("zigzag", "ring")
    )
    # the last rank of the contiguous ring computes 15 of the 8 that an even share would be
    assert ring.time / zigzag.time == pytest.approx(15 / 8, rel=0.1)
