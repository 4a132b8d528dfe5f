"""Kept attention: a recomputation repeats neither its forward nor what it sends, and changes no bit."""

from collections import Counter

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_cp.comm import in_process
from megatron_cp.context import ALGORITHMS, BACKENDS
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.dropout import DropoutSeed
from megatron_cp.context.keep import keeping
from megatron_cp.context.layouts import indices
from megatron_cp.context.slices import KeptKeys, attend_slice
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.kernels.reference import ReferenceKernel
from megatron_cp.planner.memory import kept_attention
from megatron_cp.planner.model import Transformer
from megatron_cp.planner.parallel import Parallel
from megatron_cp.planner.work import RankConfig
from tests.cases import slow_unless
from tests.context.dense import problem
from tests.context.test_sinks import grid_for

HEADS, KV_HEADS, DIM = 8, 2, 8
LAYERS = 2


class CountedKernel(ReferenceKernel):
    """The reference, which counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def forward(self, *args, **choices):
        self.calls["forward"] += 1
        return super().forward(*args, **choices)

    def backward(self, *args, **choices):
        self.calls["backward"] += 1
        return super().backward(*args, **choices)


def plain(function, *args):
    return function(*args)


def recomputed(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


def kept(function, *args):
    return checkpoint(keeping(function), *args, use_reentrant=True)


def trained(fabric, task, backend, around, call=None, **choices):
    """Outputs and gradients of two layers of attention behind a product, bytes sent, and kernel calls."""
    grid = grid_for(backend, fabric.size)
    axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
    mine, kernel = torch.tensor(indices("zigzag", len(task.q), fabric.size, fabric.rank)), CountedKernel()
    how = plan(backend, cp=fabric, causal=task.causal, window=task.window, kernel=kernel, **axes, **choices)
    leaves = [x[mine].requires_grad_() for x in task[:3]]

    def layers(q, k, v):
        for layer in range(LAYERS):
            q = attend(q * (layer + 1.5), k * 1.5, v * 0.5, how, **(call or {}))
        return q

    out = around(layers, *leaves)
    made = out.detach().clone()
    out.backward(task.dout[mine])
    return [made, *(leaf.grad for leaf in leaves)], how.sent, kernel.calls


def assert_kept(ranks, backend, **choices):
    task = problem(12 * ranks, HEADS, KV_HEADS, causal=True)
    runs = {
        around: in_process(ranks, lambda fabric, around=around: trained(fabric, task, backend, around, **choices))
        for around in (plain, kept, recomputed)
    }
    for once, again, twice in zip(*(runs[around] for around in (plain, kept, recomputed)), strict=True):
        assert all(map(torch.equal, once[0], again[0])), "no bit changes"
        assert again[1:] == once[1:], "as many bytes and kernel calls as without recomputation"
        # what is not kept is repeated
        assert twice[2]["forward"] == 2 * once[2]["forward"]
        assert twice[1] > once[1] or ranks == 1


# without a kernel of its own rsa has no calls to count, but bytes
@pytest.mark.parametrize("ranks", slow_unless([3], [2, 3, 4, 8]), ids=lambda n: f"p{n}")
@pytest.mark.parametrize("backend", ALGORITHMS)
def test_kept_attention_is_computed_and_sent_once(backend, ranks):
    if BACKENDS.get(backend).needs_grid and ranks == 3:
        ranks = 4
    assert_kept(ranks, backend)


OTHERS = {
    "one rank": (1, "zigzag", {}),
    "one rank, heads": (1, "ulysses", {}),
    "chunks": (2, "zigzag", {"chunks": 2}),
    "a negative scale": (2, "zigzag", {"softmax_scale": -0.3}),
    "documents": (2, "all-gather", {"call": {"documents": [0, 5, 24]}, "document_layout": "blocks"}),
    "a fixed sink": (2, "ulysses", {"call": {"sink": -0.5}}),
    "alibi": (2, "zigzag", {"alibi": [2.0 ** -(n + 1) for n in range(HEADS)]}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_kept_attention_of_other_calls_is_computed_and_sent_once(case):
    ranks, backend, choices = OTHERS[case]
    assert_kept(ranks, backend, **choices)


def test_a_learned_sink_and_dropped_weights_are_those_of_the_forward():
    task, how = problem(12, HEADS, KV_HEADS, causal=True), plan("zigzag", kernel="reference", dropout=0.5)
    seeds = iter([3, 4, 5, 6])

    def run(around):
        leaves = [x.clone().requires_grad_() for x in (*task[:3], torch.linspace(-1, 1, HEADS, dtype=torch.float64))]
        seed = DropoutSeed(torch.tensor([1]), 0) if around is plain else None
        out = around(
            lambda q, k, v, sink: attend(
                q * 2, k, v, how, sink=sink, dropout_seed=seed or DropoutSeed(torch.tensor([next(seeds) // 3]), 0)
            ),
            *leaves,
        )
        out.backward(task.dout)
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    # the recomputation draws another seed, which nothing reads
    assert all(map(torch.equal, run(plain), run(kept)))


@pytest.mark.parametrize("backend", ["zigzag", "ulysses"])
def test_slices_of_a_sequence_are_computed_and_sent_once(backend):
    task = problem(48, HEADS, KV_HEADS, causal=True)

    def run(fabric, around):
        kernel, keys = CountedKernel(), KeptKeys((range(24), range(24, 48)))
        how, leaves, outs = plan(backend, cp=fabric, kernel=kernel), [], []
        places = [torch.tensor(indices("zigzag", 24, 2, fabric.rank)) + tokens.start for tokens in keys.tokens]
        for number, mine in enumerate(places):
            leaves.append([x[mine].requires_grad_() for x in task[:3]])
            outs.append(
                around(
                    lambda q, k, v, number=number: attend_slice(q * 2, k * 2, v * 2, how, keys, number), *leaves[number]
                )
            )
        made = [out.detach().clone() for out in outs]
        for number in (1, 0):
            outs[number].backward(task.dout[places[number]])
        return [*made, *(leaf.grad for each in leaves for leaf in each)], how.sent, kernel.calls

    runs = [in_process(2, lambda fabric, around=around: run(fabric, around)) for around in (plain, kept, recomputed)]
    for once, again, twice in zip(*runs, strict=True):
        assert all(map(torch.equal, once[0], again[0]))
        assert again[1:] == once[1:]
        assert twice[1] > once[1]
        assert twice[2]["forward"] > once[2]["forward"]


def one_call(around, grad=True):
    kernel = CountedKernel()
    how, (q, k, v, *_) = plan("zigzag", kernel=kernel), problem(4, 2, 2, causal=True)
    q = q.requires_grad_(grad)
    return around(lambda q: attend(q * 2, k, v, how), q), kernel.calls


def test_what_is_no_reentrant_checkpoint_runs_as_ever():
    # called at once
    out, calls = one_call(lambda f, q: keeping(f)(q))
    out.sum().backward()
    assert calls == {"forward": 1, "backward": 1}
    # without gradients, where no backward pass follows
    with torch.no_grad():
        assert one_call(lambda f, q: checkpoint(keeping(f), q, use_reentrant=True))[1] == {"forward": 1}
    # torch's other checkpoint runs its forward with gradients
    out, calls = one_call(lambda f, q: checkpoint(keeping(f), q, use_reentrant=False))
    out.sum().backward()
    assert calls == {"forward": 2, "backward": 1}


def test_a_checkpoint_within_a_kept_one_repeats_its_attention():
    out, calls = one_call(lambda f, q: kept(lambda x: kept(f, x) * 2, q))
    expected, _ = one_call(lambda f, q: f(q) * 2)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert calls == {"forward": 2, "backward": 1}


def test_a_second_backward_pass_computes_again():
    out, calls = one_call(kept)
    for _ in range(2):
        out.sum().backward(retain_graph=True)
    assert calls == {"forward": 2, "backward": 2}


@pytest.mark.parametrize("more", [1, -1])
def test_a_recomputation_with_other_calls_is_an_error(more):
    how, (q, k, v, *_) = plan("zigzag", kernel="reference"), problem(4, 2, 2, causal=True)
    counts = iter([2, 2 + more])

    def layers(q):
        for _ in range(next(counts)):
            q = attend(q, k, v, how)
        return q

    out = kept(layers, q.requires_grad_())
    with pytest.raises(AssertionError, match="attention call"):
        out.sum().backward()


def test_a_changed_output_is_an_error_of_torch():
    out, _ = one_call(lambda f, q: kept(lambda x: f(x).mul_(2), q))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def saved_bytes(fabric, backend, task):
    """Bytes that a checkpoint saves of one attention, beside its inputs."""
    storages = {}
    grid = grid_for(backend, fabric.size)
    axes = {axis: fabric.subset(grid.members(axis, fabric.rank)) for axis in ("inner", "outer")} if grid else {}
    mine = torch.tensor(indices("zigzag", len(task.q), fabric.size, fabric.rank))
    how = plan(backend, cp=fabric, kernel="reference", **axes)
    leaves = [x[mine].float().requires_grad_() for x in task[:3]]

    def pack(x):
        storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = kept(lambda q, k, v: attend(q * 2, k * 2, v * 2, how), *leaves)
    given = {x.untyped_storage()._cdata for x in leaves}
    out.sum().backward()
    return sum(size for key, size in storages.items() if key not in given)


@pytest.mark.parametrize("ranks", slow_unless([2], [2, 4]), ids=lambda n: f"p{n}")
@pytest.mark.parametrize("backend", [name for name in ALGORITHMS if not BACKENDS.get(name).capabilities.over_time])
def test_the_estimate_counts_what_is_kept(backend, ranks):
    tokens = 12 * ranks
    task, grid = problem(tokens, HEADS, KV_HEADS, causal=True, dim=DIM, batch=1), grid_for(backend, ranks)
    model = Transformer(
        name="x", layers=1, hidden=64, ffn=64, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, vocab=64, gated=False
    )
    parallel = Parallel(
        cp=ranks, backend=backend, grid=grid, recompute="full", keep_attention=True, precision="float32"
    )
    rank = RankConfig(model=model, parallel=parallel, cluster=load_cluster("dgx-h100-ib"), seq=tokens)
    for size in in_process(ranks, lambda fabric: saved_bytes(fabric, backend, task)):
        assert size == pytest.approx(kept_attention(rank))


def test_chunks_wait_in_host_memory_and_only_the_output_is_counted():
    model = Transformer(
        name="x", layers=1, hidden=64, ffn=64, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, vocab=64, gated=False
    )
    rank = RankConfig(
        model=model,
        parallel=Parallel(cp=2, backend="fpdt", recompute="full", keep_attention=True, precision="float32"),
        cluster=load_cluster("dgx-h100-ib"),
        seq=64,
    )
    assert kept_attention(rank) == 32 * 4 * HEADS * DIM
