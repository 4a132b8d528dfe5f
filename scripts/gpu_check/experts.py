"""The products of a rank's experts beside experts one by one: equal results first, then time forward and backward."""

from collections.abc import Iterator

from gpu_check.table import Row
from megatron_cp.bench.comparison import WrongResultError
from megatron_cp.bench.experts import ExpertBench, measure

# many small experts; Mixtral's on one of 4 ranks; DeepSeek-V3's on one of 64; each with equal loads and with Zipf's
ON_GPU = tuple(
    ExpertBench(experts, rows, hidden, ffn, skew, "bfloat16", 9)
    for experts, rows, hidden, ffn in ((64, 32768, 2048, 1024), (2, 16384, 4096, 14336), (4, 32768, 7168, 2048))
    for skew in (0.0, 1.0)
)
ON_CPU = (ExpertBench(8, 64, 32, 16, 1.0, "float32", 2),)


def experts(device: str) -> Iterator[Row]:
    """Time each product in turns with experts one by one, and name the one that auto takes."""
    for bench in ON_GPU if device == "cuda" else ON_CPU:
        case = f"{bench.experts} experts, {bench.rows} x {bench.hidden} x {bench.ffn}, Zipf {bench.skew:g}"
        try:
            found, choice = measure(bench, device)
        except WrongResultError as error:
            yield Row(case, {"": str(error)}, "wrong")
            continue
        figures: dict[str, str | float | int] = {f"{each.product} ms": each.median * 1e3 for each in found}
        figures |= {f"{each.product} of {found[0].product}": each.median / found[0].median for each in found[1:]}
        yield Row(case, {**figures, "auto": choice.name}, "ok")
