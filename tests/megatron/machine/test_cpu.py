"""The CPU runtime: torch.cuda answers for the CPU inside, and everything is as before outside."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_cp.megatron.arguments import checks
from megatron_cp.megatron.arguments.known_flags import parser
from megatron_cp.megatron.machine import cpu
from megatron_cp.megatron.machine.facts import Machine
from megatron_cp.megatron.rebind import find
from tests.megatron.pretraining import pretrain_losses, tiny
from tests.ranks import RankError, run_ranks

TARGETS = [target for entry in cpu.REPLACEMENTS for target in entry.targets]


def bindings() -> dict[str, tuple[bool, int]]:
    """Of every name in the table: whether its owner has it itself, and which object it is."""
    found = {}
    for target in TARGETS:
        owner, attribute = find(target)
        own = vars(owner).get(attribute)
        found[target] = (attribute in vars(owner), id(own if own is not None else getattr(owner, attribute)))
    return found


def all_put_back() -> list[str]:
    before = bindings()
    inside = {}

    def fail() -> None:
        with cpu.cpu_runtime():
            inside.update(bindings())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    kept = [target for target in TARGETS if inside[target] == before[target]]
    return kept + [target for target in TARGETS if bindings()[target] != before[target]]


def test_every_name_is_replaced_inside_and_put_back_after_an_error() -> None:
    assert run_ranks(1, all_put_back) == [[]]


def truth() -> list[Any]:
    before = torch.cuda.is_available()
    with cpu.cpu_runtime() as outer:
        with cpu.cpu_runtime() as inner:
            pass
        inside = torch.cuda.is_available()
        # torch's own code asks here, and must not look for streams
        accelerator = torch.accelerator.is_available()
    return [before, outer, inner, inside, accelerator, torch.cuda.is_available(), cpu.active()]


def test_availability_is_true_inside_only_and_contexts_nest() -> None:
    assert run_ranks(1, truth) == [[False, True, True, True, False, False, False]]


def on_a_gpu_machine() -> bool:
    torch.cuda.is_available = lambda: True
    before = bindings()
    with cpu.cpu_runtime() as on:
        return not on and bindings() == before


def test_nothing_is_touched_where_there_is_a_gpu() -> None:
    assert run_ranks(1, on_a_gpu_machine) == [True]


def devices() -> set[str]:
    with cpu.cpu_runtime():
        made = [
            torch.zeros(2, device="cuda"),
            torch.tensor([1.0], device=torch.cuda.current_device()),
            torch.empty(3, device=torch.device("cuda", 0)),
            torch.empty(1, device="cpu", pin_memory=True),
            torch.ones(2).cuda(),
            torch.ones(2).to("cuda", torch.float64),
            torch.ones(2).to(device="cuda:0"),
            torch.ones(2).new_zeros(2, device="cuda"),
            torch.nn.Linear(2, 2).cuda(torch.cuda.current_device()).weight,
        ]
    return {tensor.device.type for tensor in made}


def test_everything_that_is_allocated_on_cuda_is_on_the_cpu() -> None:
    assert run_ranks(1, devices) == [{"cpu"}]


def dtype_after_to() -> tuple[torch.dtype, str, str]:
    with cpu.cpu_runtime():
        moved = torch.ones(2).to("cuda", torch.bfloat16)
        return moved.dtype, moved.type(), torch.ones(1).type(torch.float64).type()


def test_moving_keeps_the_dtype_and_the_type_has_cudas_name() -> None:
    expected = (torch.bfloat16, "torch.cuda.BFloat16Tensor", "torch.cuda.DoubleTensor")
    assert run_ranks(1, dtype_after_to) == [expected]


def forked_streams() -> list[list[float]]:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    with cpu.cpu_runtime():
        torch.manual_seed(1)
        tracker = CudaRNGStatesTracker()
        tracker.add("other", 2)
        first = torch.rand(2)
        with tracker.fork("other"):
            other = torch.rand(2)
        second = torch.rand(2)
        torch.manual_seed(1)
        alone = torch.rand(4)
        torch.manual_seed(2)
        seeded = torch.rand(2)
    return [torch.cat([first, second]).tolist(), alone.tolist(), other.tolist(), seeded.tolist()]


def test_the_trackers_stream_is_its_own_and_leaves_the_default_one_alone() -> None:
    ((interrupted, alone, other, seeded),) = run_ranks(1, forked_streams)
    assert interrupted == alone
    assert other == seeded


def memory() -> tuple[int, int, int]:
    with cpu.cpu_runtime():
        before = torch.cuda.max_memory_allocated()
        block = torch.ones(64 * 2**20)
        held = torch.cuda.max_memory_allocated()
        del block
        return before, held, torch.cuda.max_memory_allocated()


def test_peak_memory_is_the_processes_and_stays() -> None:
    ((before, held, after),) = run_ranks(1, memory)
    assert before > 0
    assert held - before > 200 * 2**20
    # the kernel brings its own peak up to date only every some pages
    assert after >= held - 2**20


def event_milliseconds() -> float:
    with cpu.cpu_runtime():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)
        end.record()
        return float(start.elapsed_time(end))


def test_events_measure_time() -> None:
    assert run_ranks(1, event_milliseconds)[0] > 0.1


def test_every_replacement_says_why_and_no_name_is_replaced_twice() -> None:
    assert all(entry.reason for entry in cpu.REPLACEMENTS)
    assert len(TARGETS) == len(set(TARGETS))


def test_only_what_differs_is_filled_in_and_reported() -> None:
    args = SimpleNamespace(transformer_impl="local", apply_rope_fusion=True, hidden_size=4)
    changed = checks.fill_arguments(args, Machine(te=False))
    assert changed == ["--no-rope-fusion"]
    assert vars(args) == {"transformer_impl": "local", "apply_rope_fusion": False, "hidden_size": 4}


def test_what_is_filled_in_is_an_argument_of_megatrons() -> None:
    known = {action.dest for action in parser()._actions}
    names = [
        name for name, *_ in (*checks.WITHOUT_TE, *checks.LOW_PRECISION, *checks.WITHOUT_GPU, *checks.FSDP_WITHOUT_GPU)
    ]
    assert [name for name in names if name not in known] == []


LOW = {"fp8": "hybrid", "use_precision_aware_optimizer": True, "main_grads_dtype": "bf16"}


def test_a_cpu_computes_in_the_models_precision_and_says_so() -> None:
    args = SimpleNamespace(**LOW, fp4=None)
    changed = checks.fill_arguments(args, Machine(gpu=False, te=False))
    assert changed == ["no --fp8-format", "no --use-precision-aware-optimizer", "--main-grads-dtype fp32"]
    assert vars(args) == {
        "fp8": None,
        "fp4": None,
        "use_precision_aware_optimizer": False,
        "main_grads_dtype": "fp32",
    }


def test_fp8_on_a_cpu_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(checks, "say", said.append)
    checks.complete(SimpleNamespace(spec=["own.spec"], async_save=False, fp8="hybrid"), Machine(gpu=False, te=False))
    assert said == ["this machine has no GPU: no --fp8-format"]


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("fp8", "--fp8-format"),
        ("use_precision_aware_optimizer", "--use-precision-aware-optimizer"),
        ("main_grads_dtype", "--main-grads-dtype"),
    ],
)
def test_a_gpu_without_transformer_engine_refuses_its_precisions(name: str, flag: str) -> None:
    args = SimpleNamespace(**{name: LOW[name]})
    with pytest.raises(ValueError, match=f"{flag} needs transformer-engine, which is not installed"):
        checks._refuse_without_te(args, Machine(gpu=True, te=False))
    checks._refuse_without_te(args, Machine(gpu=True, te=True))
    checks._refuse_without_te(args, Machine(gpu=False, te=False))


def test_a_cpu_refuses_a_dispatcher_of_gpu_kernels() -> None:
    args = SimpleNamespace(moe_token_dispatcher_type="flex", num_experts=4)
    way_out = "--moe-token-dispatcher-type flex sends .*; pass --moe-token-dispatcher-type alltoall"
    with pytest.raises(RankError, match=way_out) as refused:
        run_ranks(2, pretrain_losses, tiny("--num-experts 4 --moe-token-dispatcher-type flex"))
    assert len(refused.value.errors) == 2
    with pytest.raises(ValueError, match=way_out):
        checks._refuse_without_gpu(args, Machine(gpu=False))
    checks._refuse_without_gpu(args, Machine(gpu=True))
    checks._refuse_without_gpu(SimpleNamespace(moe_token_dispatcher_type="flex", num_experts=None), Machine(gpu=False))
