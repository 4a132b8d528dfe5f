"""Context-parallel attention and pipeline schedules for stock Megatron-LM."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_cp.context.attend import attend

__all__ = ["attend"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch is imported with the first use of attend, not by `import megatron_cp`
    if name == "attend":
        from megatron_cp.context.attend import attend

        return attend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
