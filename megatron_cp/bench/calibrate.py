"""Measure this machine's rates for estimates of whole steps: products by size, norms, activations, cross entropy.

Two processes measure at the same time, as the ranks of a run compute. With GPUs, each process has its own.
"""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from megatron_cp.bench.calls import prepared
from megatron_cp.bench.comparison import DTYPES
from megatron_cp.bench.links import MachineRates, described
from megatron_cp.bench.processes import on_ranks
from megatron_cp.bench.training import step_seconds, trained
from megatron_cp.comm import Fabric, GroupFabric, collective, largest
from megatron_cp.context.trace.events import Compute
from megatron_cp.context.trace.simulate import flops
from megatron_cp.hardware.cluster import COLLECTIVES, Collective
from megatron_cp.kernels import choose
from megatron_cp.recipe.recipe import ENTRY

ROWS = {"cpu": 2048, "cuda": 8192}
SIZES = {"cpu": (32, 64, 128, 256, 512, 1024), "cuda": (128, 256, 512, 1024, 2048, 4096, 8192)}
# a transformer's products are about three times as wide as high
WIDER = 3
WIDTH = {"cpu": 256, "cuda": 4096}
VOCABULARY = {"cpu": 512, "cuda": 32768}
HEAD_DIM = 64
# queries, keys, heads, KV heads, head dim
ATTENTION = {"cpu": (512, 512, 6, 2, 32), "cuda": (8192, 8192, 32, 8, 128)}
ROUNDS, SWEEPS = 5, 7
ROUND_SECONDS = 0.02
# queries, keys and values
MESSAGES = 3
LEAST = """
--mock-data --hidden-size 64 --num-attention-heads 1 --seq-length 64 --max-position-embeddings 64
--micro-batch-size 1 --global-batch-size 1 --train-iters 20 --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 64
--log-interval 1 --eval-interval 20 --eval-iters 0 --save-interval 20 --ckpt-format torch_dist
"""
LAYERS = (1, 9)
# torch's attention for CPUs takes so many keys at once; flash attention's blocks are too short to count
BLOCK_KEYS = {"cpu": 512, "cuda": 0}


class Rates(NamedTuple):
    """Operations per second of products by their smallest dimension, and bytes per second as `work` counts bytes.

    elementwise: norms, residuals, rotary positions and the gated activation, forward and backward
    loss:        the cross entropy, forward and backward
    message:     seconds that a message of a few bytes takes from a rank that computes while it sends and receives
    collectives: an all-gather, a reduce-scatter and an all-reduce, sent by each rank, without a message's time
    attention:   forward and backward, of short sequences as the shipped recipes for a CPU have them
    reserved:    bytes of a process that has loaded the libraries of a training
    step, layer: seconds of a training step and of a layer's microbatch beside the work on tensors
    """

    products: dict[int, float]
    elementwise: float
    loss: float
    message: float
    collectives: dict[Collective, float]
    attention: tuple[float, float]
    block_keys: int
    reserved: float = 0.0
    step: float = 0.0
    layer: float = 0.0


def calibrate(dtype: str, ranks: int = 2) -> Rates:
    """Measure this machine with `ranks` processes; each figure is the slower rank's."""
    rates, (few, many) = on_ranks(ranks, _rates, dtype)[0], LAYERS
    short, long = (_least_training(layers) for layers in LAYERS)
    rates = rates._replace(reserved=1024.0 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    if torch.cuda.is_available():
        # kernels are launched ahead of the device, so that steps and layers cost no time beside it
        return rates
    layer = max(0.0, long - short) / (many - few)
    return rates._replace(layer=layer, step=max(0.0, short - few * layer))


def _least_training(layers: int) -> float:
    """Return the median seconds of a step of a tiny model, in a run that saves a checkpoint at its end.

    Raises RuntimeError with the first error line of a training that fails.
    """
    with TemporaryDirectory() as folder:
        words = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 1 -m".split(), ENTRY]
        words += [*LEAST.split(), "--num-layers", str(layers), "--save", folder]
        return median(step_seconds(trained(words))[2:])


def as_yaml(links: MachineRates, rates: Rates) -> str:
    """Return the description of one node that `load_cluster` reads, with all rates that an estimate needs."""
    sections, products = links.sections(), rates.products
    peak, (forward, backward) = max(products.values()), rates.attention
    best = max(forward, backward)
    sections["overhead"] = {"step_ms": rates.step * 1e3, "layer_us": rates.layer * 1e6}
    sections["compute"] |= {
        "block_keys": rates.block_keys,
        "peak_tflops": best / 1e12,
        "efficiency_forward": forward / best,
        "efficiency_backward": backward / best,
    }
    sections["memory"] |= {
        "size_gb": psutil.virtual_memory().total / 2e9,
        "reserved_gb": rates.reserved / 1e9,
        "elementwise_gb_per_s": rates.elementwise / 1e9,
        "loss_gb_per_s": rates.loss / 1e9,
    }
    sections["inside"]["busy_us_per_message"] = rates.message * 1e6
    sections["inside"] |= {f"{kind}_gb_per_s": rate / 1e9 for kind, rate in rates.collectives.items()}
    shares = {size: rate / peak for size, rate in products.items()}
    sections["gemm"] = {links.dtype: {"peak_tflops": peak / 1e12, "efficiency": shares}}
    return described(links, "calibrate", sections)


def _rates(fabric: GroupFabric, device: torch.device, dtype: str) -> Rates:
    kind, real = device.type, DTYPES[dtype]
    rows, sizes, width, columns, block = ROWS[kind], SIZES[kind], WIDTH[kind], VOCABULARY[kind], BLOCK_KEYS[kind]
    # random values: pages of zeros can share memory
    whole = torch.randn(rows * width, device=device).to(real)
    passes = [Compute(*ATTENTION[kind], True, backward) for backward in (False, True)]
    kernel, _ = choose("auto", device=kind, dtype=dtype, head_dim=passes[0].head_dim)
    forward, backward = prepared(passes[0], kernel, device, real)
    alone, beside = _messages(fabric, device)
    products: dict[str, Callable[[], object]] = {f"product {size}": _linear(rows, size, device, real) for size in sizes}
    seconds = _seconds(
        fabric,
        device,
        products
        | {name: partial(collective, fabric.group, name, whole) for name in COLLECTIVES}
        | {
            "elementwise": _between_products(rows, width, device, real),
            "loss": _cross_entropy(rows, columns, device, real),
            "forward": forward,
            "backward": backward,
            "alone": alone,
            "beside": beside,
        },
    )
    touched = rows * width * (10 + 12 + (2 + 2) * 3 + (3 + 5) * 3) * real.itemsize
    sent = whole.nbytes * (fabric.size - 1) / fabric.size
    message = max(1e-9, seconds["beside"] - seconds["alone"]) / MESSAGES
    collectives: dict[Collective, float] = {}
    for name in COLLECTIVES:
        rounds, took = 2 if name == "reduce" else 1, seconds[name]
        collectives[name] = rounds * sent / max(took - rounds * message, took / 2)
    return Rates(
        {size: 6 * rows * size * WIDER * size / seconds[f"product {size}"] for size in sizes},
        touched / seconds["elementwise"],
        40 * rows * columns / seconds["loss"],
        message,
        collectives,
        (flops(passes[0], block) / seconds["forward"], flops(passes[1], block) / seconds["backward"]),
        block,
    )


def _messages(fabric: Fabric, device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a computation, alone and while a few small messages are sent and received."""
    there = [torch.zeros(8, device=device) for _ in range(2 * MESSAGES)]
    compute = _linear(ROWS[device.type], SIZES[device.type][0], device, torch.float32)

    def beside() -> None:
        peer = 1 - fabric.rank
        both = [(tensor, peer) for tensor in there] if 0 <= peer < 2 else []
        sent = fabric.exchange(both[:MESSAGES], both[MESSAGES:])
        compute()
        sent.wait()

    return compute, beside


def _linear(rows: int, size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Return a call of a linear layer's three products: forward, input gradient and weight gradient."""
    columns = WIDER * size
    x, weight = (torch.randn(n, size, device=device, dtype=dtype, requires_grad=True) for n in (rows, columns))
    dout = torch.randn(rows, columns, device=device, dtype=dtype)
    return lambda: torch.autograd.grad(functional.linear(x, weight), (x, weight), dout)


def _between_products(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Return a call of a layer's work between its products, without fused kernels; the MLP is three times as wide."""
    hidden, dout = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
    gated = torch.randn(rows, 6 * width, device=device, dtype=dtype)
    heads = torch.randn(rows, 3 * width // HEAD_DIM, HEAD_DIM, device=device, dtype=dtype)
    angles = torch.randn(rows, 1, HEAD_DIM, device=device, dtype=dtype)
    weight = torch.ones(width, device=device, dtype=dtype, requires_grad=True)
    inputs = [hidden.requires_grad_(), gated.requires_grad_(), heads.requires_grad_(), weight]

    def once() -> Sequence[Tensor]:
        normed = functional.rms_norm(hidden, (width,), weight) + functional.rms_norm(hidden, (width,), weight)
        gate, value = gated.chunk(2, dim=-1)
        first, second = heads.chunk(2, dim=-1)
        turned = heads * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
        outputs = (hidden + normed, functional.silu(gate) * value, turned)
        return torch.autograd.grad(outputs, inputs, (dout, gated.detach()[:, : 3 * width], heads.detach()))

    return once


def _cross_entropy(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Return a call of the cross entropy with its gradient in place, as Megatron's vocabulary-parallel one."""
    logits = torch.randn(rows, columns, device=device, dtype=dtype)
    target = torch.zeros(rows, 1, dtype=torch.long, device=device)

    def once() -> Tensor:
        wide = logits.float()
        wide = wide - wide.amax(dim=-1, keepdim=True)
        chosen = wide.gather(1, target)
        exponential = torch.exp(wide)
        total = exponential.sum(dim=-1, keepdim=True)
        loss = total.log() - chosen
        exponential.div_(total)
        exponential.scatter_add_(1, target, -torch.ones_like(loss))
        return exponential.mul_(loss).to(dtype)

    return once


def _seconds(fabric: Fabric, device: torch.device, runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the wall time of each call in a run whose ranks wait for each other: the slowest counts in every round.

    A round repeats a call for as long as ranks compute between two exchanges. The result is the median of several
    sweeps over all calls, because a short disturbance of the machine affects only few sweeps.
    """

    def calls(name: str, count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            runs[name]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return largest(fabric, device, time.perf_counter() - began)[0]

    for name in runs:
        calls(name, 1)
    counts = {name: max(1, round(ROUND_SECONDS / calls(name, 1))) for name in runs}
    sweeps = [
        {name: mean(calls(name, count) for _ in range(ROUNDS)) / count for name, count in counts.items()}
        for _ in range(SWEEPS)
    ]
    return {name: median(sweep[name] for sweep in sweeps) for name in runs}
