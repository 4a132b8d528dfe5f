"""Times of schemes on a cluster, the choice of the least, and the bytes of a layer."""

import pytest

from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.linear_trace import peak_bytes
from megatron_cp.tensor.cost import LayerLinears, Placing, cheapest, linear_times, placings
from megatron_cp.tensor.place import GridSize

H100 = load_cluster("h100-ib")
DTYPE = "bfloat16"


def layer(tokens, hidden=8192, kv=1024, ffn=28672):
    return LayerLinears(tokens, hidden, hidden + 2 * kv, hidden, 2 * ffn, ffn)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1024, 131072])
def test_the_choice_takes_no_longer_than_any_other_placing(ranks, tokens):
    chosen = cheapest(layer(tokens), ranks, H100, DTYPE, split=False)
    times = {one: linear_times(layer(tokens), one, H100, DTYPE, split=False).total for one in placings(ranks)}
    assert times[chosen.placing] == min(times.values())
    assert chosen.why.startswith(f"{chosen.placing} takes ")
    assert "on h100-ib, " in chosen.why


def test_only_grids_of_the_scheme_are_considered_where_it_is_named():
    for scheme in ("2d", "2.5d"):
        chosen = cheapest(layer(4096), 8, H100, DTYPE, split=False, scheme=scheme).placing
        assert chosen.scheme == scheme
        assert chosen.size.weights > 1


def test_a_bias_leaves_weights_where_they_are():
    assert cheapest(layer(10**6), 8, H100, DTYPE, split=False, bias=True).placing.size == (8, 1)


def test_a_grid_sends_less_for_many_tokens_and_more_for_few():
    square, line = GridSize(2, 2), GridSize(4, 1)
    many, few = (
        sum(layer(n).sent(square, split=False)) / sum(layer(n).sent(line, split=False)) for n in (10**6, 10**3)
    )
    assert many < 0.6
    assert few > 1.5


def test_a_ring_hides_all_but_one_piece_and_collectives_nothing():
    shown = {
        engine: linear_times(layer(65536), Placing("flux", GridSize(8, 1), engine), H100, DTYPE, split=False)
        for engine in ("ring", "collective")
    }
    assert shown["ring"].forward == pytest.approx(shown["collective"].forward / 8)
    assert shown["ring"].products > shown["collective"].products


def test_panels_hide_all_but_one_shard_of_the_weights_and_no_tokens():
    """Weights are hidden but for one of their panels; on a square grid tokens are gathered before the products."""
    line, square = GridSize(1, 8), GridSize(2, 4)
    shown = {
        (engine, size): linear_times(layer(16384), Placing("2d", size, engine), H100, DTYPE, split=False)
        for engine in ("collective", "ring", "panels")
        for size in (line, square)
    }
    # without tokens to gather, what is left are the weights' gradients
    assert shown["panels", line].weight == pytest.approx(shown["collective", line].weight / 8)
    assert shown["panels", line].forward < shown["collective", line].forward / 2
    assert shown["panels", line].products > shown["collective", line].products
    # a ring of two hides half of what tokens take
    of_tokens = 2 * (shown["collective", square].forward - shown["ring", square].forward)
    assert of_tokens < shown["panels", square].forward < shown["collective", square].forward


@pytest.mark.parametrize("size", [GridSize(1, 4), GridSize(2, 2)])
def test_panels_keep_less_than_a_gathered_weight(size):
    few = layer(1024)
    ring, panels = (peak_bytes(few, Placing("2d", size, engine), DTYPE) for engine in ("ring", "panels"))
    # a weight of all neighbours and its gradient against parts of one
    assert panels < 0.8 * ring


def test_a_cube_sends_what_its_linears_and_exchanges_do():
    """The counts of a run of 8 ranks on 2 x 2 x 2, per layer and microbatch: the MLP's, and attention's as flux."""
    small = LayerLinears(64, 64, 192, 64, 192, 96)
    mlp = small.sent_on_cube(2, split=False) - sum(small.of_attention.sent(GridSize(8, 1), split=False))
    assert mlp == 9216 + 5632 + 4 * 64 * 64 / 8 / 2
    times = linear_times(layer(65536), Placing("3d", GridSize(8, 1)), H100, DTYPE, split=False)
    assert min(times) > 0


def test_weight_gradients_apart_gather_once_more():
    placing = Placing("flux", GridSize(8, 1), "collective")
    together, apart = (linear_times(layer(65536), placing, H100, DTYPE, split=split) for split in (False, True))
    assert apart[:3] == together[:3]
    assert apart.weight == pytest.approx(2 * together.weight)


def test_memory_of_a_cube_is_what_its_largest_linear_gathers_and_makes():
    layer = LayerLinears(tokens=16, hidden=8, attention=24, query=8, first=64, second=32)
    # forward of the first: x 32, W 128, y 256 and half of it again; forward of the second: 128 + 64 + 32 + 16
    # backward of the first: dy 256, W 128, dx 32 and half of it, W's gradient 128; of the second: 32 + 64 + 192 + 64
    assert layer.at_work_on_cube(2) == max(32 + 128 + 384, 240, 256 + 128 + 48 + 128, 352)
