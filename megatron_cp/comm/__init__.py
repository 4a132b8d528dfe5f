"""How ranks talk: over torch.distributed, between threads of one process, or not at all with a single rank."""

from megatron_cp.comm.distributed import (
    GroupFabric,
    Wire,
    backwards,
    collective,
    connected,
    fabric_of,
    hand_over,
    wires,
)
from megatron_cp.comm.fabric import (
    Done,
    Fabric,
    Gathering,
    Handle,
    Members,
    Message,
    MessageError,
    Peers,
    SingleFabric,
    Transfer,
    axes_of,
    largest,
    values_of_all,
)
from megatron_cp.comm.in_process import LocalFabric, in_process
from megatron_cp.comm.packed import TensorForm, packed, unpacked

__all__ = [
    "Done",
    "Fabric",
    "Gathering",
    "GroupFabric",
    "Handle",
    "LocalFabric",
    "Members",
    "Message",
    "MessageError",
    "Peers",
    "SingleFabric",
    "TensorForm",
    "Transfer",
    "Wire",
    "axes_of",
    "backwards",
    "collective",
    "connected",
    "fabric_of",
    "hand_over",
    "in_process",
    "largest",
    "packed",
    "unpacked",
    "values_of_all",
    "wires",
]
