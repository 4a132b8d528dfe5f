# the loader, beside the others: the algorithm is imported with its first use
def _kv_gather() -> ModuleType:
    from megatron_cp.context.algorithms import kv_gather

    return kv_gather


# the entry, in the list of BACKENDS
(
    Backend(
        name="kv-gather",
        load=_kv_gather,
        paper="docs/examples/kv_gather.py",
        what="every rank gathers K and V at once",
        traffic=Traffic(full="2(p-1)U"),
        layout="contiguous",
        capabilities=Capabilities(weighed="never"),
    ),
)
