"""Compare published runs (configs/published/runs.yaml) with their estimates."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import median
from typing import Any, NamedTuple

from megatron_cp.config import configs_folder
from megatron_cp.context.choose import Record
from megatron_cp.grid import Grid
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.planner.estimate import Estimate, estimate
from megatron_cp.planner.model import Transformer, model_of
from megatron_cp.planner.parallel import Parallel
from megatron_cp.recipe import recipe
from megatron_cp.yaml_file import parse

PAIRS = {"causal": Fraction(1, 2), "all": Fraction(1)}


class PublishedRun(NamedTuple):
    """A published run: the reported figure, in `unit`, and the estimate of it."""

    name: str
    source: str
    unit: str
    reported: float
    predicted: float
    estimate: Estimate

    @property
    def error(self) -> float:
        """Error relative to the reported figure; above 0 where the estimate is too fast."""
        return self.predicted / self.reported - 1


class Summary(NamedTuple):
    """Median and largest of the relative errors of all rows."""

    median: float
    worst: float


def published(record: Record | None) -> list[PublishedRun]:
    """Return every published run with its estimate."""
    from ruamel.yaml import YAML

    runs = parse(configs_folder() / "published" / "runs.yaml", YAML(typ="safe").load)
    return [_row(run, record) for run in runs]


def summary(rows: Sequence[PublishedRun]) -> Summary:
    """Return the median and the largest absolute error."""
    sizes = [abs(row.error) for row in rows]
    return Summary(median(sizes), max(sizes))


def _row(run: Mapping[str, Any], record: Record | None) -> PublishedRun:
    sizes = dict(run["parallel"])
    grid = Grid(*sizes.pop("grid")) if "grid" in sizes else None
    cluster = load_cluster(run["cluster"])
    found = estimate(_model(run["model"]), Parallel(**sizes, grid=grid), cluster, run["seq"], record)
    unit, reported = next(iter(run["reported"].items()))
    return PublishedRun(
        name=run["name"],
        source=run["source"],
        unit=unit,
        reported=reported,
        predicted=_figure(found, unit, run["reported"].get("pairs")),
        estimate=found,
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
