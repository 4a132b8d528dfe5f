"""Fit the rates of the shipped clusters that no data sheet states, and predict each published run without itself.

The fit minimises the squared logarithmic errors of the published runs and of the rates, both in units of 10%; that of a
rate is against a source apart from these runs. No run is better known: the same model on the same 8 GPUs went from
12,273 to 14,451 tokens/s between two releases of NVIDIA's software.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import exp, expm1, log, log1p
from typing import NamedTuple

from megatron_cp.context.choose import Record
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.published import PublishedRun, published

SPREAD = 0.1
"""Standard deviation of the logarithm of a run's error, and of a rate around its source."""
STEP = 0.05
"""Change of a rate's logarithm by which the dependence of the runs on it is found."""

A100, H100 = ("dgx-a100-80g-ib", "a800-ib"), ("dgx-h100-ib",)


class Rate(NamedTuple):
    """A fitted rate of the clusters named `clusters`.

    known: value from `source`, in operations or bytes per second
    read:  returns the value that a description has
    times: returns the description with the rate times a factor
    """

    name: str
    clusters: tuple[str, ...]
    known: float
    source: str
    read: Callable[[Cluster], float]
    times: Callable[[Cluster, float], Cluster]


def _products(name: str, clusters: tuple[str, ...], dtype: str, known: float, source: str) -> Rate:
    """Return the rate of large matrix products; those of smaller ones are scaled with it."""

    def times(cluster: Cluster, factor: float) -> Cluster:
        gemms = {of: gemm.times(factor) if of == dtype else gemm for of, gemm in cluster.gemms}
        return replace(cluster, gemms=tuple(gemms.items()))

    return Rate(name, clusters, known, source, lambda cluster: cluster.gemm(dtype).rates[-1], times)


def _attention(name: str, clusters: tuple[str, ...], known: float, source: str) -> Rate:
    """Return the rate of attention forward; that of backward is scaled with it."""

    def times(cluster: Cluster, factor: float) -> Cluster:
        forward, backward = cluster.flops_forward * factor, cluster.flops_backward * factor
        return replace(cluster, flops_forward=forward, flops_backward=backward)

    return Rate(name, clusters, known, source, lambda cluster: cluster.flops_forward, times)


def _passes(cluster: Cluster) -> float:
    return cluster.elementwise_bytes_per_s or cluster.touch_bytes_per_s


RATES = (
    _products("bf16 products, A100", A100, "bfloat16", 0.76 * 312e12, "T_W as profiled in arXiv:2401.10241"),
    _attention("attention, A100", A100, 0.68 * 312e12, "FlashAttention-2, arXiv:2307.08691"),
    Rate(
        "passes over memory, A100 and H100",
        (*A100, *H100),
        0.47 * 2039e9,
        "T_F and T_B as profiled in arXiv:2401.10241",
        _passes,
        lambda cluster, factor: replace(cluster, elementwise_bytes_per_s=_passes(cluster) * factor),
    ),
    _products("bf16 products, H100", H100, "bfloat16", 0.62 * 989e12, "assumed, of cuBLAS under load"),
    _products("fp8 products, H100", H100, "fp8", 0.6 * 1979e12, "assumed, of cuBLAS under load"),
    _attention("attention, H100", H100, 0.46 * 989e12, "assumed, FlashAttention-2 to -3, arXiv:2407.08608"),
)
"""The passes of the H100 are taken to reach the same share of its bandwidth as those of the A100."""


class Fit(NamedTuple):
    """Published runs by the shipped rates, with what a fit needs.

    errors: logarithm of each run's predicted over its reported figure
    slopes: change of each error per change of the logarithm of each rate
    behind: logarithm of each shipped rate over its source's
    """

    runs: list[PublishedRun]
    errors: list[float]
    slopes: list[list[float]]
    behind: list[float]

    def changes(self, kept: Sequence[bool]) -> list[float]:
        """Return the changes of the logarithms of the rates that fit the kept runs best."""
        rows = [(error, slope) for error, slope, keep in zip(self.errors, self.slopes, kept, strict=True) if keep]
        size = len(self.behind)
        matrix = [[sum(s[i] * s[j] for _, s in rows) + float(i == j) for j in range(size)] for i in range(size)]
        return _solve(matrix, [-sum(e * s[i] for e, s in rows) - self.behind[i] for i in range(size)])

    def predicted(self, at: int, kept: Sequence[bool]) -> float:
        """Return the relative error of a run by the rates fitted to the kept runs."""
        moved = sum(slope * change for slope, change in zip(self.slopes[at], self.changes(kept), strict=True))
        return expm1(self.errors[at] + moved)


def fit(record: Record) -> Fit:
    """Estimate the published runs by the shipped rates and by each rate a little faster."""
    runs = published(record)
    errors = [log1p(run.error) for run in runs]
    columns = []
    for rate in RATES:
        moved = published(record, lambda cluster, rate=rate: _faster(cluster, rate))  # type: ignore[misc]
        columns.append([(log1p(run.error) - error) / STEP for run, error in zip(moved, errors, strict=True)])
    behind = [log(rate.read(load_cluster(rate.clusters[0])) / rate.known) for rate in RATES]
    return Fit(runs, errors, [list(row) for row in zip(*columns, strict=True)], behind)


class LeftOut(NamedTuple):
    """Runs predicted without themselves.

    errors: relative errors of the fitted runs, by rates fitted without the run, and without all runs of its source
    blind:  runs that no rate was set to
    """

    errors: dict[str, list[float]]
    blind: list[PublishedRun]


def left_out(found: Fit, record: Record) -> LeftOut:
    """Predict each run by a fit without it."""
    numbers, sources = range(len(found.runs)), [run.origin for run in found.runs]
    run = [found.predicted(at, [other != at for other in numbers]) for at in numbers]
    source = [found.predicted(at, [other != sources[at] for other in sources]) for at in numbers]
    return LeftOut({"without it": run, "without its source": source}, published(record, blind=True))


def _faster(cluster: Cluster, rate: Rate) -> Cluster:
    return rate.times(cluster, exp(STEP)) if cluster.name in rate.clusters else cluster


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Return the solution of a positive definite system, by Gaussian elimination."""
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for at in range(size):
        for below in range(at + 1, size):
            share = rows[below][at] / rows[at][at]
            rows[below] = [low - share * high for low, high in zip(rows[below], rows[at], strict=True)]
    found = [0.0] * size
    for at in reversed(range(size)):
        known = sum(rows[at][other] * found[other] for other in range(at + 1, size))
        found[at] = (rows[at][size] - known) / rows[at][at]
    return found
