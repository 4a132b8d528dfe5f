"""Registry of context-parallel algorithms. Pure: an algorithm's loop is imported with its first use."""

from typing import Any

from megatron_cp.context.backend import PLACEMENTS, Backend, Capabilities
from megatron_cp.context.loop import Loop
from megatron_cp.context.traffic import TrafficFormula
from megatron_cp.registry import Registry

__all__ = [
    "ALGORITHMS",
    "AUTO",
    "BACKENDS",
    "BASELINE",
    "DEFAULT",
    "PLACEMENTS",
    "Backend",
    "Capabilities",
    "TrafficFormula",
]


def _ring() -> Loop[Any]:
    from megatron_cp.context.algorithms import ring

    return ring


def _bidirectional() -> Loop[Any]:
    from megatron_cp.context.algorithms import bidirectional

    return bidirectional


def _all_gather() -> Loop[Any]:
    from megatron_cp.context.algorithms import all_gather

    return all_gather


def _ulysses() -> Loop[Any]:
    from megatron_cp.context.algorithms import ulysses

    return ulysses


def _usp() -> Loop[Any]:
    from megatron_cp.context.algorithms import usp

    return usp


def _double_ring() -> Loop[Any]:
    from megatron_cp.context.algorithms import double_ring

    return double_ring


def _tokenring() -> Loop[Any]:
    from megatron_cp.context.algorithms import tokenring

    return tokenring


def _distflash() -> Loop[Any]:
    from megatron_cp.context.algorithms import distflash

    return distflash


def _fpdt() -> Loop[Any]:
    from megatron_cp.context.algorithms.fpdt import FPDT

    return FPDT()


def _rsa() -> Loop[Any]:
    from megatron_cp.context.algorithms import rsa

    return rsa


def _wallfacer() -> Loop[Any]:
    from megatron_cp.context.algorithms import wallfacer

    return wallfacer


def _startrail() -> Loop[Any]:
    from megatron_cp.context.algorithms import startrail

    return startrail


def _auto() -> Loop[Any]:
    raise AssertionError("auto has no loop of its own: nothing is chosen yet")


AUTO = "auto"

BACKENDS = Registry(
    "context-parallel backend",
    [
        Backend(
            name="zigzag",
            load=_ring,
            paper="arXiv:2310.01889 on the head-tail layout",
            what="ring of K and V, balanced under a causal mask",
            traffic=TrafficFormula(full="2(p-1)U", causal="3/4 of it", backward="2(p-1)(U + Ug)"),
            aliases=("p2p",),
            capabilities=Capabilities(planned=True, latent=True),
        ),
        Backend(
            name="bidirectional",
            load=_bidirectional,
            paper="arXiv:2310.01889 on the head-tail layout",
            what="ring of K and V both ways, early halves up and late ones down",
            traffic=TrafficFormula(
                full="2(p-1)U", causal="3/4 of it", backward="2(p-1)(U + Ug)", where="half of it each way"
            ),
        ),
        Backend(
            name="ring",
            load=_ring,
            paper="arXiv:2310.01889",
            what="ring of K and V over contiguous pieces",
            traffic=TrafficFormula(full="2(p-1)U", causal="1/2 of it", backward="2(p-1)(U + Ug)"),
            layout="contiguous",
            capabilities=Capabilities(latent=True),
        ),
        Backend(
            name="striped",
            load=_ring,
            paper="arXiv:2311.09431",
            what="ring of K and V, every p-th token on a rank",
            traffic=TrafficFormula(
                full="2(p-1)U",
                causal="2(p-1)U",
                backward="2(p-1)(U + Ug)",
                backward_causal="2(p-1)(U + Ug)",
                causal_sense="at most",
            ),
            layout="striped",
            # a window on stripes is a multitude of small tiles: never fast, and long to record
            capabilities=Capabilities(weighed="without window", latent=True),
        ),
        Backend(
            name="all-gather",
            load=_all_gather,
            paper="arXiv:2407.21783, 3.3.2",
            what="every rank gathers K and V, group by group of KV heads",
            traffic=TrafficFormula(
                full="2(p-1)U", causal="3/4 of it", backward="2(p-1)(U + Ug)", where="all of it by a collective"
            ),
            aliases=("all_gather", "allgather"),
            capabilities=Capabilities(planned=True, by_nodes=True),
        ),
        Backend(
            name="ulysses",
            load=_ulysses,
            paper="arXiv:2309.14509",
            what="heads for tokens and back",
            traffic=TrafficFormula(full="(p-1)/p (2Uq + 2U)", backward="(p-1)/p (2Uq + 2U)", per_kv_head=True),
            aliases=("a2a",),
            capabilities=Capabilities(heads="all", sinks="inside", planned=True),
        ),
        Backend(
            name="usp",
            load=_usp,
            paper="arXiv:2405.07719",
            what="Ulysses on one axis, ring on the other",
            traffic=TrafficFormula(
                full="(u-1)/u (2Uq + 2U) + 2(r-1)U",
                causal="(u-1)/u (2Uq + 2U) + 3/2 (r-1)U",
                backward="(u-1)/u (2Uq + 2U) + 2(r-1)(U + Ug)",
                backward_causal="(u-1)/u (2Uq + 2U) + 3/2 (r-1)(U + Ug)",
                axes="ur",
                per_kv_head=True,
                where="p = u r",
            ),
            aliases=("a2a+p2p",),
            capabilities=Capabilities(grid="needed", placement=True, heads="axis", sinks="inside", planned=True),
        ),
        Backend(
            name="double-ring",
            load=_double_ring,
            paper="arXiv:2406.18485",
            what="rings of K and V inside windows of ranks, and between the windows meanwhile",
            traffic=TrafficFormula(
                full="2W(w-1)U + 2(W-1)U",
                causal="3/4 of it",
                backward="2W(w-1)(U + Ug) + 2(W-1)(U + Ug)",
                axes="wW",
                where="p = w W",
            ),
            aliases=("double_ring",),
            capabilities=Capabilities(grid="needed"),
        ),
        Backend(
            name="tokenring",
            load=_tokenring,
            paper="arXiv:2412.20501",
            what="ring of queries, partial results straight home",
            traffic=TrafficFormula(full="(p-1)(2Uq + Us)", causal="3/4 of it", backward="(p-1)(3Uq + 2Us)"),
        ),
        Backend(
            name="distflash",
            load=_distflash,
            paper="arXiv:2310.03294",
            what="early ranks help late ones, everything lent directly",
            traffic=TrafficFormula(
                full="2(p-1)U",
                causal="(3p-2)/4 U + p/8 (2Uq + Us)",
                backward="2(p-1)(U + Ug)",
                backward_causal="(3p-2)/4 (U + Ug) + p/8 (3Uq + 2Us)",
                causal_sense="at most",
            ),
            layout="contiguous",
            capabilities=Capabilities(chunks=False),
        ),
        Backend(
            name="fpdt",
            load=_fpdt,
            paper="arXiv:2408.16978",
            what="Ulysses in chunks over time, what waits lies in host memory",
            traffic=TrafficFormula(full="(p-1)/p (2Uq + 2U)", backward="(p-1)/p (2Uq + 2U)", per_kv_head=True),
            capabilities=Capabilities(
                heads="all", over_time=True, any_positions=False, sinks="inside", weighed="never"
            ),
        ),
        Backend(
            name="rsa",
            load=_rsa,
            paper="arXiv:2105.13120",
            what="ring of K, then of V, over whole rows of scores; takes a bias, shows probabilities",
            traffic=TrafficFormula(full="2(p-1)U", causal="3/4 of it", backward="2(p-1)(U + Ug)"),
            capabilities=Capabilities(bias=True, softcap=False, weighed="never"),
        ),
        Backend(
            name="wallfacer",
            load=_wallfacer,
            paper="arXiv:2407.00611, tiles of arXiv:2512.20968",
            what="queries of a row of ranks meet keys of a column of ranks",
            traffic=TrafficFormula(
                full="(a-1)(2Uq + Us) + 2(c-1)U",
                causal="(4c-1)/(4c) (a-1)(2Uq + Us) + 3/2 (c-1)U",
                backward="(a-1)(3Uq + 2Us) + 2(c-1)(U + Ug)",
                backward_causal="(4c-1)/(4c) (a-1)(3Uq + 2Us) + 3/2 (c-1)(U + Ug)",
                axes="ac",
                where="p = a c",
            ),
            capabilities=Capabilities(grid="optional"),
        ),
        Backend(
            name="startrail",
            load=_startrail,
            paper="arXiv:2407.00611",
            what="teams of C ranks gather queries and keys, keys of teams go around C rings",
            traffic=TrafficFormula(
                full="(C-1)(2Uq + 2U + Us) + 2U p/C",
                backward="(C-1)(3Uq + 2U + 2Us) + 2(U + Ug) p/C",
                sense="at most",
                axes="C",
                where="C² divides p",
            ),
            capabilities=Capabilities(grid="optional", teams=True),
        ),
        Backend(
            name=AUTO,
            load=_auto,
            paper="the cost model of megatron-cp trace",
            what="the fastest of the others for these sizes on a cluster, and says why",
            capabilities=Capabilities(grid="optional", weighed="never"),
        ),
    ],
    group="megatron_cp.backends",
)

DEFAULT = "zigzag"
"""The backend where none is asked for."""

BASELINE = "ring"
"""The backend that critical paths are compared with."""

ALGORITHMS = [entry.name for entry in BACKENDS.own if entry.name != AUTO]
"""The backends of this project that have a loop of their own."""
