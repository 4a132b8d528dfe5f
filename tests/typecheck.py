"""The checker of annotations while tests run; an int is a float, as everywhere in Python."""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_shapes() -> None:
    """Check the shapes in the signatures of attention, which nothing may have imported yet."""
    install_import_hook(["megatron_cp.context"], "tests.typecheck.check")
