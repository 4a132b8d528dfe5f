"""These tests need TransformerEngine's wheels, which `bash scripts/te.sh` gets; without them none is collected."""

import warnings

from tests import ranks
from tests.te import stand_in

if stand_in.is_needed():
    ranks.preload("tests.te.preload")
    with warnings.catch_warnings():
        # both say what the machine lacks when they are imported
        warnings.simplefilter("ignore")
        stand_in.install()
        import megatron.training  # noqa: F401
else:
    collect_ignore_glob = ["test_*.py"]
