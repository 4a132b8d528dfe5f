"""The product of experts is the one that is asked for, or the one that `auto` takes for a device and a dtype."""

import pytest
import torch

from megatron_cp.errors import CannotRun
from megatron_cp.experts import AUTO, GROUPED_MM, LOOP, PRODUCTS, choose, grouped_mm
from megatron_cp.experts.choose import ChosenProduct, slower

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def without_function(monkeypatch):
    """A torch that has no grouped product."""
    monkeypatch.setattr(grouped_mm, "torch_function", lambda: None)
    grouped_mm.lacking.cache_clear()
    yield
    grouped_mm.lacking.cache_clear()


@pytest.fixture
def capable(monkeypatch):
    """A torch whose grouped product takes everything, and a GPU of some compute capability."""

    def made(capability):
        monkeypatch.setattr(choose, "lacking", lambda device, dtype: "")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return made


def test_auto_keeps_the_loop_on_a_cpu_and_says_why():
    found = choose.choose(AUTO, "cpu", FP32, (64, 32))
    assert found.name == LOOP
    assert found.why.startswith("auto: ")
    assert GROUPED_MM in found.why
    assert str(found) == f"loop ({found.why})"


def test_what_is_asked_for_is_taken(capable):
    capable((9, 0))
    assert choose.choose(LOOP, "cuda", BF16, (64, 32)) == ChosenProduct(LOOP)
    for name in (GROUPED_MM, "megablocks"):
        assert choose.choose(name, "cpu", FP32, (64, 32)) == ChosenProduct(GROUPED_MM)


@pytest.mark.parametrize(
    ("dtype", "capability", "widths", "name"),
    [
        (BF16, (9, 0), (64, 32), GROUPED_MM),
        (BF16, (8, 0), (64, 32), GROUPED_MM),
        (BF16, (7, 5), (64, 32), LOOP),
        (FP32, (9, 0), (64, 32), LOOP),
        (BF16, (9, 0), (64, 36), LOOP),
    ],
)
def test_auto_takes_the_grouped_product_where_a_gpu_has_a_kernel_for_it(capable, dtype, capability, widths, name):
    capable(capability)
    assert choose.choose(AUTO, "cuda", dtype, widths).name == name
    assert bool(slower("cuda", dtype)) == (name == LOOP and widths[1] % 8 == 0)


@pytest.mark.parametrize(
    ("dtype", "widths", "message"),
    [
        (BF16, (64, 36, 68), "grouped-mm needs widths that are multiples of 8 in bfloat16, got 36 and 68; use auto or"),
        (FP32, (64, 6), "multiples of 4 in float32, got 6; use auto or loop"),
    ],
)
def test_rows_that_are_not_aligned_are_named(dtype, widths, message):
    with pytest.raises(CannotRun, match=message):
        choose.choose(GROUPED_MM, "cpu", dtype, widths)
    assert choose.choose(AUTO, "cpu", dtype, widths).why.startswith("auto: grouped-mm needs widths")


def test_a_torch_without_the_function_is_named(without_function):
    with pytest.raises(CannotRun, match=r"--moe-grouped-product grouped-mm is not in torch .*; use auto or loop"):
        choose.choose(GROUPED_MM, "cpu", FP32, (64,))
    assert choose.choose(AUTO, "cpu", FP32, (64,)) == ChosenProduct(
        LOOP, f"auto: grouped-mm is not in torch {torch.__version__}"
    )


def test_a_dtype_that_the_function_does_not_take_is_named(monkeypatch):
    def refusing(*args, **kwargs):
        raise NotImplementedError("not here.\nat all")

    monkeypatch.setattr(grouped_mm, "torch_function", lambda: refusing)
    grouped_mm.lacking.cache_clear()
    try:
        assert grouped_mm.lacking("cpu", FP32).endswith("does not take float32 on cpu (not here)")
    finally:
        grouped_mm.lacking.cache_clear()


def test_every_entry_loads_a_product_of_its_name():
    for entry in PRODUCTS:
        assert entry.load().name == entry.name
