"""These tests need transformers, which `bash scripts/hf.sh` gets; without it none is collected."""

from importlib.util import find_spec

if find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]
