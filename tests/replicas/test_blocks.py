"""Quantised blocks are off by half a scale at most, what they leave over comes later, and no strange number is lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cp.replicas import QUANTISATIONS
from megatron_cp.replicas.blocks import Plain, added, quantised, steps, width

BITS = sorted(entry.bits for entry in QUANTISATIONS)
EDGES = torch.tensor([0.0, -0.0, 1e-45, 1e-40, 1.2e-38, 3e38, -3e38, 1.0, -1.0, 0.5])


def heavy(rows: int, block: int, seed: int) -> torch.Tensor:
    """Numbers of very different sizes, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    normal, size = (torch.randn(rows, block, generator=generator) for _ in range(2))
    return normal * (2 * size).exp()


@pytest.mark.parametrize("bits", BITS)
@given(rows=st.integers(0, 5), eighths=st.integers(1, 9), seed=st.integers(0, 1000), power=st.integers(-30, 30))
def test_a_number_is_off_by_half_a_scale_at_most(bits: int, rows: int, eighths: int, seed: int, power: int) -> None:
    values = heavy(rows, 8 * eighths, seed) * 2.0**power
    messages = quantised(values, bits)
    assert messages.shape == (rows, width(bits, 8 * eighths))
    bound = values.abs().amax(1, keepdim=True) / steps(bits) / 2 if rows else values
    assert ((added(messages[None], bits) - values).abs() <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_sum_over_peers_is_off_by_half_of_their_scales_together(bits: int) -> None:
    peers = [heavy(3, 16, seed) for seed in range(5)]
    found = added(torch.stack([quantised(values, bits) for values in peers]), bits)
    bound = sum(values.abs().amax(1, keepdim=True) for values in peers) / steps(bits) / 2
    assert ((found - sum(peers)).abs() <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", BITS)
def test_edges_keep_the_bound(bits: int) -> None:
    for value in EDGES:
        values = torch.zeros(1, 8)
        values[0, 3] = value
        found = added(quantised(values, bits)[None], bits)
        # a scale below the smallest normal number is 0 or rounded itself
        assert torch.allclose(found, values, rtol=1e-6, atol=2e-38)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_a_strange_number_leaves_its_block_strange_and_no_other(bits: int, strange: float) -> None:
    values = heavy(3, 16, 0)
    values[1, 5] = strange
    left = torch.zeros(3, 16, dtype=torch.bfloat16)
    found = added(quantised(values, bits, left)[None], bits)
    assert not found[1].isfinite().all()
    assert found[[0, 2]].isfinite().all()
    assert left.isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_what_is_left_over_comes_later(bits: int) -> None:
    left, said, meant = torch.zeros(2, 16), torch.zeros(2, 16), torch.zeros(2, 16)
    for seed in range(20):
        values = heavy(2, 16, seed)
        said += added(quantised(values, bits, left)[None], bits)
        meant += values
    torch.testing.assert_close(said + left, meant, rtol=1e-5, atol=1e-4)


def test_plain_numbers_are_added_in_float32() -> None:
    coding = Plain(torch.bfloat16)
    ones = coding.encode(torch.ones(4, 1), None)
    assert ones.dtype == torch.bfloat16
    many = coding.add(torch.stack([256 * ones, *[ones] * 3]))
    assert many.tolist() == [[259.0]] * 4
