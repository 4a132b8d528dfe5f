# in megatron_cp/context/__init__.py: the loader, which imports the algorithm with its first use
def _kv_gather() -> Loop[Any]:
    from megatron_cp.context.algorithms import kv_gather

    return kv_gather


# and the entry in the list
BACKENDS = Registry(
    "context-parallel backend",
    [
        ...,
        Backend(
            name="kv-gather",
            load=_kv_gather,
            paper="docs/examples/extending/kv_gather.py",
            what="every rank gathers K and V at once",
            traffic=TrafficFormula(full="2(p-1)U"),
            layout="contiguous",
            capabilities=Capabilities(weighed="never"),
        ),
    ],
)
