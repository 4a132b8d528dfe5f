"""Merging partial results: single ones are kept as they came, and what a merge costs is counted."""

import pytest
import torch

from megatron_cp.comm import SingleFabric
from megatron_cp.context.attend import attend, plan
from megatron_cp.context.merge import SoftmaxMerge, Sum
from megatron_cp.context.merging import ASSUMED, BY_TORCH, ONE_BY_ONE, SEVERAL
from megatron_cp.context.trace.events import Problem
from megatron_cp.context.trace.merge_cost import merge_cost
from megatron_cp.context.trace.record import record
from megatron_cp.kernels import choose

POLICIES = {"torch": BY_TORCH, "one by one": ONE_BY_ONE, "several": SEVERAL}
TOKENS, HEADS, DIM = 24, 4, 16


def attention(rows, dtype):
    return torch.randn(rows, 2, HEADS, DIM, dtype=dtype), torch.randn(rows, 2, HEADS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_single_result_is_kept_as_it_came(dtype):
    out, lse = attention(TOKENS, dtype)
    merge, total = SoftmaxMerge(out), Sum(out)
    merge.add(slice(None), out, lse)
    total.add(slice(0, TOKENS), out)
    assert merge.result()[0] is out
    assert merge.result()[1] is lse
    assert total.result() is out
    assert torch.equal(total.exact(), out.float())


def test_torch_merges_and_adds_each_result_as_it_comes():
    out, lse = attention(TOKENS, torch.bfloat16)
    half, half_lse = attention(TOKENS // 2, torch.bfloat16)
    merge, total, late = SoftmaxMerge(out), Sum(out), slice(TOKENS // 2, TOKENS)
    for rows, x, statistics in ((slice(0, TOKENS), out, lse.clone()), (late, half, half_lse)):
        merge.add(rows, x, statistics)
        total.add(rows, x)
    summed, merged, log_sum = out.float(), out.float(), lse.clone()
    summed[late] += half
    merged[late].lerp_(half.float(), (half_lse - lse[late]).sigmoid()[..., None])
    log_sum[late] = torch.logaddexp(lse[late], half_lse)
    assert torch.equal(total.result(), summed.bfloat16())
    assert torch.equal(total.exact(), summed)
    assert torch.equal(merge.result()[0], merged.bfloat16())
    assert torch.equal(merge.result()[1], log_sum)


@pytest.mark.parametrize("rows", [slice(0, 0), slice(8, 16)])
def test_rows_without_a_result_are_zero_and_their_lse_is_minus_infinity(rows):
    out, lse = attention(rows.stop - rows.start, torch.bfloat16)
    merge, total = SoftmaxMerge(torch.empty(TOKENS, *out.shape[1:])), Sum(torch.empty(TOKENS, *out.shape[1:]))
    if len(out):
        merge.add(rows, out, lse)
        total.add(rows, out)
    others = [row for row in range(TOKENS) if not rows.start <= row < rows.stop]
    assert (merge.result()[0][others] == 0).all()
    assert (merge.result()[1][others] == -torch.inf).all()
    assert (total.result()[others] == 0).all()


def test_float64_has_no_fused_kernel():
    # it would be interpreted, or fail for want of a GPU
    before = ASSUMED.set(SEVERAL)
    try:
        out, lse = attention(TOKENS, torch.float64)
        merge = SoftmaxMerge(out)
        for _ in range(3):
            merge.add(slice(0, TOKENS), out, lse.double())
    finally:
        ASSUMED.reset(before)
    assert merge.result()[0].dtype == torch.float64


def test_attention_of_one_rank_is_the_kernel_s_to_the_bit():
    q, k, v, dout = (torch.randn(64, 1, HEADS, DIM, dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    kernel = choose("torch", device="cpu", dtype="bfloat16", head_dim=DIM)[0]
    out = attend(*leaves, plan("ring", cp=SingleFabric(), causal=True, kernel=kernel, layout="contiguous"))
    grads = torch.autograd.grad(out, leaves, dout)
    scale = DIM**-0.5
    expected, lse = kernel.forward(q.detach(), k.detach(), v.detach(), scale=scale, causal=True)
    rounded = expected.bfloat16()
    parts = kernel.backward(dout, q.detach(), k.detach(), v.detach(), rounded, lse, scale=scale, causal=True)
    assert torch.equal(out, rounded)
    assert all(torch.equal(found, part.bfloat16()) for found, part in zip(grads, parts, strict=True))


@pytest.mark.parametrize("merging", POLICIES)
def test_one_rank_and_the_kernels_of_ulysses_touch_nothing(merging):
    alone = record(Problem("ring", 1, 1024, layout="contiguous"), POLICIES[merging])
    assert [touch for run in (alone.forward, alone.backward) for touch in run.touched] == [(0, 0), (0, 0)]
    size = 1024 // 4 * 8 * 64 * 2
    # q, k and v are packed, own parts copied on arrival, out is put into place: nothing goes to float32 and back
    (forward, *_) = record(Problem("ulysses", 4, 1024), POLICIES[merging]).forward.touched
    assert forward.size <= 2 * (3 + 3 / 4 + 1 / 4 + 1 / 4 + 1) * size + 2 * size


# bytes that pack K and V into one message, and kernels and bytes that widen 7 parts of dK and dV each for theirs
PACKED, WIDENED = 4 * 2**22 * 2, 377_487_360
# kernels and bytes of a middle rank, forward and backward; out and dq have 2**24 elements, dk and dv 2**22
GOLDEN = {
    "torch": ((45, 1_896_873_984 + PACKED), (42, 1_686_110_208 + WIDENED)),
    "one by one": ((9, 1_066_139_648 + PACKED), (39, 1_551_892_480 + WIDENED)),
    # forward 15 bytes an element, 6.5 parts and the result in bfloat16, and 7.5 lse of 2**17 rows
    "several": ((2, 255_590_400 + PACKED), (18, 377_487_360 + WIDENED)),
}


def zigzag(seq):
    return Problem("zigzag", 8, seq, 32, 8, 128)


@pytest.mark.parametrize("policy", POLICIES)
def test_kernels_and_bytes_between_the_calls_of_the_attention_kernel(policy):
    found = merge_cost(zigzag(2**15), POLICIES[policy], rank=4)
    assert tuple((cost.kernels, cost.size) for cost in found) == GOLDEN[policy]


def test_merging_several_results_at_a_time_takes_its_share_of_the_attention():
    shares, packed = {}, {}
    for policy, merging in POLICIES.items():
        for seq in (2**15, 2**17):
            costs = [merge_cost(zigzag(seq), merging, rank) for rank in range(8)]
            for name, column in zip(("forward", "backward"), zip(*costs, strict=True), strict=True):
                shares[policy, seq, name] = [cost.share for cost in column]
                middle = column[4]
                # K and V are packed once beside the merges
                packed[seq, name] = middle.share * PACKED * seq / 2**15 / middle.size
                print(
                    f"{policy:>10} {seq // 1024:4}K {name:8} kernels {middle.kernels:3} {middle.size / 1e6:6.0f} MB "
                    f"{middle.share:6.1%}, of the rank with most {max(cost.share for cost in column):6.1%}, "
                    f"peak {max(cost.peak for cost in column) / 1e6:5.0f} MB"
                )
    middle = {case: ranks[4] for case, ranks in shares.items()}
    # torch took 40 % and 10 %, and one result at a time 22 % and 5.5 %
    assert middle["torch", 2**15, "forward"] - packed[2**15, "forward"] == pytest.approx(0.40, abs=0.005)
    assert middle["torch", 2**17, "forward"] - packed[2**17, "forward"] == pytest.approx(0.10, abs=0.005)
    assert middle["one by one", 2**15, "forward"] - packed[2**15, "forward"] <= 0.225
    assert middle["one by one", 2**17, "forward"] - packed[2**17, "forward"] <= 0.056
    for name in ("forward", "backward"):
        assert max(shares["several", 2**15, name]) <= 0.08
        assert max(shares["several", 2**17, name]) - packed[2**17, name] <= 0.031
        assert middle["several", 2**17, name] <= 0.03


@pytest.mark.parametrize("seq", [2**15, 2**17, 2**20])
def test_waiting_results_take_256_mib_each_at_most(seq):
    several, torch_s = (
        [max(run.peak) for run in (trace.forward, trace.backward)]
        for trace in (record(zigzag(seq), merging) for merging in (SEVERAL, BY_TORCH))
    )
    forward, backward = (ours - theirs for ours, theirs in zip(several, torch_s, strict=True))
    # out, or dq, dk and dv
    assert forward <= 2**28
    assert backward <= 3 * 2**28
    # two parts of a million tokens take what torch takes for a float32 copy of one
    if seq == 2**20:
        assert forward <= 0.01 * torch_s[0]
