"""Whole tables, action for action: lists taken from the papers, and torch's own schedules as a second oracle."""

import pytest
from torch.distributed.pipelining import schedules as oracle

from megatron_cp.pipeline.action import Action, Overlap, flat
from megatron_cp.pipeline.build import build
from tests.pipeline.played import scheduled

# lists of one rank; a and b are its first and second chunk, B an input gradient, BW a full backward
GOLDEN = {
    ("zb-h1", 4, 6): {
        0: "F0 F1 F2 F3 B0 W0 F4 B1 W1 F5 B2 W2 B3 W3 B4 W4 B5 W5",
        1: "F0 F1 F2 B0 F3 B1 W0 F4 B2 W1 F5 B3 W2 B4 W3 B5 W4 W5",
        2: "F0 F1 B0 F2 B1 F3 B2 W0 F4 B3 W1 F5 B4 W2 B5 W3 W4 W5",
        3: "F0 B0 F1 B1 F2 B2 F3 B3 W0 F4 B4 W1 F5 B5 W2 W3 W4 W5",
    },
    ("zb-h2", 4, 7): {
        0: "F0 F1 F2 F3 F4 F5 F6 B0 W0 B1 W1 B2 W2 B3 W3 B4 W4 B5 W5 B6 W6",
        1: "F0 F1 F2 F3 F4 B0 F5 B1 F6 B2 W0 B3 W1 B4 W2 B5 W3 B6 W4 W5 W6",
        2: "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 W0 B5 W1 B6 W2 W3 W4 W5 W6",
        3: "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 W0 W1 W2 W3 W4 W5 W6",
    },
    ("izb:2", 2, 4): {
        0: "Fa0 Fa1 Fb0 Fb1 Bb0 Wb0 Fa2 Bb1 Wb1 Fa3 Ba0 Wa0 Fb2 Ba1 Wa1 Fb3 Bb2 Wb2 Bb3 Wb3 Ba2 Wa2 Ba3 Wa3",
        1: "Fa0 Fa1 Fb0 Bb0 Fb1 Bb1 Wb0 Fa2 Ba0 Wb1 Fa3 Ba1 Wa0 Fb2 Bb2 Wa1 Fb3 Bb3 Wb2 Ba2 Wb3 Ba3 Wa2 Wa3",
    },
    ("izb:2", 4, 8): {
        3: "Fa0 Fa1 Fa2 Fa3 Fb0 Bb0 Fb1 Bb1 Fb2 Bb2 Fb3 Bb3 Wb0 Fa4 Ba0 Wb1 Fa5 Ba1 Wb2 Fa6 Ba2 Wb3 Fa7 Ba3 Wa0 "
        "Fb4 Bb4 Wa1 Fb5 Bb5 Wa2 Fb6 Bb6 Wa3 Fb7 Bb7 Wb4 Ba4 Wb5 Ba5 Wb6 Ba6 Wb7 Ba7 Wa4 Wa5 Wa6 Wa7",
    },
    ("zb-v", 2, 4): {
        0: "Fa0 Fa1 Fa2 Fb0 Bb0 Wb0 Fb1 Bb1 Wb1 Fa3 Ba0 Wa0 Fb2 Bb2 Wb2 Ba1 Wa1 Fb3 Bb3 Wb3 Ba2 Wa2 Ba3 Wa3",
        1: "Fa0 Fb0 Fa1 Fb1 Bb0 Wb0 Fa2 Ba0 Wa0 Fb2 Bb1 Wb1 Fa3 Ba1 Wa1 Fb3 Bb2 Wb2 Ba2 Bb3 Ba3 Wa2 Wb3 Wa3",
    },
    ("zb-v", 4, 7): {
        3: "Fa0 Fb0 Fa1 Fb1 Fa2 Fb2 Fa3 Fb3 Bb0 Wb0 Fa4 Ba0 Wa0 Fb4 Bb1 Wb1 Fa5 Ba1 Wa1 Fb5 Bb2 Wb2 Fa6 Ba2 Wa2 Fb6 "
        "Bb3 Wb3 Ba3 Bb4 Ba4 Bb5 Ba5 Bb6 Ba6 Wa3 Wb4 Wb5 Wb6 Wa4 Wa5 Wa6",
    },
    ("v-half", 4, 6): {
        0: "Fa0 Fa1 Fa2 Fa3 Fa4 Fb0 Bb0 Wb0 Fb1 Bb1 Wb1 Fb2 Ba0 Bb2 Wb2 Fb3 Wa0 Fa5 Ba1 Bb3 Wb3 Fb4 Bb4 Wb4 Ba2 Wa1 "
        "Wa2 Fb5 Bb5 Ba3 Wb5 Ba4 Wa3 Wa4 Ba5 Wa5",
    },
    ("v-min", 4, 6): {
        3: "Fa0 Fb0 Fa1 Fb1 Bb0 Ba0 Wb0 Wa0 Fa2 Fb2 Bb1 Ba1 Wb1 Wa1 Fa3 Fb3 Bb2 Ba2 Wb2 Wa2 Fa4 Fb4 Bb3 Ba3 Wb3 Wa3 "
        "Fa5 Fb5 Bb4 Ba4 Wb4 Wa4 Bb5 Ba5 Wb5 Wa5",
    },
    ("dualpipe-v", 2, 4): {
        0: "Fa0 Fa1 Fa2 Fb0 Bb0 Wb0 Fb1 Fa3 BWb1 Fb2 BWa0 BWb2 Fb3 BWa1 BWb3 Ba2 Wa2 Ba3 Wa3",
        1: "Fa0 Fb0 Fa1 Fb1 Fa2 BWb0 Fb2 BWa0 Fa3 BWb1 Fb3 BWa1 BWb2 BWa2 Bb3 Ba3 Wb3 Wa3",
    },
}
KINDS = {"F": "F", "B": "I", "W": "W", "BW": "B"}


def read(line, stages):
    actions = []
    for word in line.split():
        letters = word.rstrip("0123456789")
        kind = letters.rstrip("ab")
        actions.append(Action(stages[letters.endswith("b")], KINDS[kind], int(word[len(letters) :])))
    return tuple(actions)


@pytest.mark.parametrize(("name", "p", "m"), GOLDEN)
def test_lists_of_the_papers(name, p, m):
    schedule = scheduled(name, p, m)
    for rank, line in GOLDEN[name, p, m].items():
        assert schedule.table[rank] == read(line, schedule.placement.of_rank[rank])


def torch_table(kind, p, m, v):
    """What torch's schedule class computes for every rank, without process group or modules."""
    return [tuple(flat(cells)) for cells in torch_cells(kind, p, m, v)]


def torch_cells(kind, p, m, v):
    """The same with what torch overlaps as one cell."""
    return [tuple(cell_of(action) for action in torch_rank(kind, p, m, v, rank) if action) for rank in range(p)]


def torch_rank(kind, p, m, v, rank):
    made = object.__new__(kind)
    made.pp_group_size, made.rank, made.n_local_stages = p, rank, v
    made._n_microbatches, made.num_stages = m, p * v
    made.number_of_rounds = max(1, m // p)
    made.microbatches_per_round = m // made.number_of_rounds
    return made._calculate_single_rank_operations(rank)


def cell_of(action):
    parts = [
        Action(part.stage_index, part.computation_type.value, part.microbatch_index)
        for part in action.sub_actions or (action,)
    ]
    return Overlap(*parts) if len(parts) == 2 else parts[0]


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 4), (4, 2, 8), (8, 2, 16), (8, 4, 24), (4, 3, 12), (5, 2, 10)])
def test_izb_is_torchs_interleaved_zero_bubble(p, v, m):
    assert list(scheduled(f"izb:{v}", p, m).table) == torch_table(oracle.ScheduleInterleavedZeroBubble, p, m, v)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 16), (4, 4), (3, 5), (5, 20)])
def test_zb_v_is_torchs(p, m):
    assert list(scheduled("zb-v", p, m).table) == torch_table(oracle.ScheduleZBVZeroBubble, p, m, 2)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 7), (4, 8), (4, 11), (8, 20)])
def test_dualpipe_v_is_torchs(p, m):
    assert list(scheduled("dualpipe-v", p, m).table) == torch_table(oracle.ScheduleDualPipeV, p, m, 2)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 7), (4, 8), (4, 11), (8, 20)])
def test_overlaps_of_dualpipe_v_are_torchs(p, m):
    assert list(build("dualpipe-v", p, m, overlapped=True).table) == torch_cells(oracle.ScheduleDualPipeV, p, m, 2)


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 4), (4, 2, 8), (4, 3, 12), (8, 4, 16)])
def test_interleaved_is_torchs(p, v, m):
    assert list(scheduled(f"interleaved:{v}", p, m).table) == torch_table(oracle.ScheduleInterleaved1F1B, p, m, v)


@pytest.mark.parametrize(("p", "m"), [(2, 3), (4, 4), (4, 9), (8, 24)])
def test_one_chunk_of_izb_is_h1(p, m):
    assert scheduled("izb:1", p, m).table == scheduled("zb-h1", p, m).table
