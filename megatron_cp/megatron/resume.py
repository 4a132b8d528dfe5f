"""Resume the distributed optimizer with torch's own AdamW, that is without Apex and transformer-engine.

Torch's Adam counts steps per parameter, in a tensor of the parameter's state; the fused ones count per group. Megatron
0.19 stores one count per group and has two gaps on the way back. A fresh optimizer has no state yet, so that there is
no count to read and loading stops at an assertion. And loading hands one and the same tensor to all parameters, which
each of them then advances, so that the bias correction of Adam is wrong from the first step on.
"""

from collections.abc import Callable
from typing import Any

import torch


def state_dict(old: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The optimizer's common state; parameters that were never stepped first get the state of step 0.

    That is what AdamW itself would begin with, so a save before the first step is right too. Raises RuntimeError when
    this rank's shard has no parameter at all, for then there is nowhere to count.
    """
    parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
    if not parameters:
        raise RuntimeError(
            "the distributed optimizer gave this rank no parameters, and torch's AdamW keeps its step count with them; "
            "use fewer data-parallel ranks or install transformer-engine"
        )
    for parameter in parameters:
        _begin(self.optimizer.state[parameter], parameter)
    return old(self, *args, **kwargs)


def load_state_dict(old: Callable[..., Any], self: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Load as Megatron does, then give every parameter a step count of its own, as the checkpoint has it."""
    steps = {float(group["step"]) for group in state["optimizer"]["param_groups"]}
    if len(steps) != 1:
        raise ValueError(
            f"the checkpoint's parameter groups are at different steps, {sorted(steps)}; start with --no-load-optim"
        )
    result = old(self, state, *args, **kwargs)
    for parameter_state in self.optimizer.state.values():
        parameter_state["step"] = torch.tensor(*steps, dtype=torch.float32)
    return result


def set_states(old: Callable[..., Any], self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
    """Copy one parameter's tensors from the checkpoint, all but the step count, which the groups bring.

    In fp32 the main parameter is a view of the model's, which may be written to only without autograd.
    """
    with torch.no_grad():
        # Megatron leaves out what is not a tensor
        return old(self, model_param, {**tensors, "step": None})


def _begin(state: dict[str, Any], parameter: torch.Tensor) -> None:
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
