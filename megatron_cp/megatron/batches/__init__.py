"""Documents of a corpus, divided among groups of data-parallel ranks by a plan of `megatron_cp.batches`."""
