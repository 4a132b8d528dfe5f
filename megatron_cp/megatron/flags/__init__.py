"""Our flags on Megatron's command line: a class for each parallelism, a field for each flag."""
