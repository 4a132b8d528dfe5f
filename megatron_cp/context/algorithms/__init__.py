"""Context-parallel algorithms, one file per paper."""
