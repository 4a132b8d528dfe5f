"""Context-parallel attention and pipeline schedules for stock Megatron-LM."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_cp.context.attend import attend
    from megatron_cp.context.plan import plan
    from megatron_cp.context.sharding import positions, shard, unshard

__all__ = ["attend", "plan", "positions", "shard", "unshard"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch is imported with the first use of these, not by `import megatron_cp`
    if name == "attend":
        from megatron_cp.context.attend import attend

        return attend
    if name == "plan":
        from megatron_cp.context.plan import plan

        return plan
    if name in __all__:
        from megatron_cp.context import sharding

        return getattr(sharding, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
