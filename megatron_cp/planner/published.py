"""Compare published runs (configs/published/runs.yaml) with their estimates."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from statistics import median
from typing import Any, NamedTuple

from megatron_cp.config import configs_folder
from megatron_cp.context.choose import Record
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.estimate import Estimate, estimate
from megatron_cp.planner.model import Transformer, model_of
from megatron_cp.planner.parallel import Parallel
from megatron_cp.recipe import recipe
from megatron_cp.yaml_file import parse

PAIRS = {"causal": Fraction(1, 2), "all": Fraction(1)}


class PublishedRun(NamedTuple):
    """A published run: the reported figure, in `unit`, and the estimate of it.

    blind: no rate was set with the run in view, and no fit sees it
    """

    name: str
    source: str
    unit: str
    reported: float
    predicted: float
    estimate: Estimate
    blind: bool = False

    @property
    def error(self) -> float:
        """Error relative to the reported figure; above 0 where the estimate is too fast."""
        return self.predicted / self.reported - 1

    @property
    def origin(self) -> str:
        """The paper, or the product whose releases are published, that the run comes from."""
        work = self.source.split(",")[0]
        return work if work.startswith("arXiv") else work.rstrip("0123456789. ")


class Summary(NamedTuple):
    """Median and largest of the relative errors of all rows."""

    median: float
    worst: float


def published(
    record: Record | None, change: Callable[[Cluster], Cluster] = lambda cluster: cluster, blind: bool = False
) -> list[PublishedRun]:
    """Return the published runs that the rates were fitted to, or the others, with their estimates.

    change: returns the cluster of a run as it is to be
    """
    from ruamel.yaml import YAML

    runs = parse(configs_folder() / "published" / "runs.yaml", YAML(typ="safe").load)
    return [_row(run, record, change) for run in runs if run.get("blind", False) is blind]


def summary(errors: Sequence[float]) -> Summary:
    """Return the median and the largest absolute error."""
    sizes = [abs(error) for error in errors]
    return Summary(median(sizes), max(sizes))


def _row(run: Mapping[str, Any], record: Record | None, change: Callable[[Cluster], Cluster]) -> PublishedRun:
    sizes = dict(run["parallel"])
    grid = Grid(*sizes.pop("grid")) if "grid" in sizes else None
    cluster = change(load_cluster(run["cluster"]))
    # none of them had our fused merge
    parallel = Parallel(**sizes, grid=grid, fused_merge=False)
    found = estimate(_model(run["model"]), parallel, cluster, run["seq"], record)
    unit, reported = next(iter(run["reported"].items()))
    return PublishedRun(
        name=run["name"],
        source=run["source"],
        unit=unit,
        reported=reported,
        predicted=_figure(found, unit, run["reported"].get("pairs")),
        estimate=found,
        blind=run.get("blind", False),
    )


def _model(given: str | Mapping[str, Any]) -> Transformer:
    if isinstance(given, str):
        return model_of(recipe.load(f"models/{given}", {}))
    return Transformer(name="GPT", **given)


def _figure(found: Estimate, unit: str, pairs: str | None) -> float:
    if unit == "tokens_per_s_per_gpu":
        return found.tokens_per_s_per_gpu
    if unit == "samples_per_s_per_gpu":
        return found.tokens_per_s_per_gpu / found.seq
    flops = found.flops_per_gpu(PAIRS[pairs or "causal"])
    return flops / 1e12 if unit == "tflops_per_gpu" else flops / found.cluster.gemm("bfloat16").peak
