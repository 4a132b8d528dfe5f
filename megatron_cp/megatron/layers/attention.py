"""Context-parallel attention in the core-attention slot of Megatron's layers."""

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_cp.comm import Fabric, GroupFabric, SingleFabric
from megatron_cp.context import AUTO as AUTO_BACKEND
from megatron_cp.context import BACKENDS, DEFAULT
from megatron_cp.context.alibi import COLUMNS as ALIBI_COLUMNS
from megatron_cp.context.alibi import alibi_slopes
from megatron_cp.context.attend import Plan, Sizes, attend, plan
from megatron_cp.context.auto import default_cluster, settle
from megatron_cp.context.document_layouts import AUTO as AUTO_LAYOUT
from megatron_cp.context.dropout import DropoutSeed
from megatron_cp.context.latent import attend_latent
from megatron_cp.context.self_check import TOKENS, CheckedHeads, Deviation, deviation
from megatron_cp.context.slices import SlicesInFlight, attend_slice
from megatron_cp.errors import Refused
from megatron_cp.hardware.cluster import Cluster
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.kernels import AUTO as AUTO_KERNEL
from megatron_cp.kernels import KERNELS, Kernel, choose
from megatron_cp.megatron.arguments.context import refuse_unsupported
from megatron_cp.megatron.flags.context import HEAD_FIRST, AttentionFlags, on_stripes, takes_placement
from megatron_cp.megatron.layers.packed import PackedStream
from megatron_cp.megatron.machine.facts import device_of_run

CAUSAL = {AttnMaskType.causal: True, AttnMaskType.no_mask: False}


class CoreAttention(MegatronModule):
    """softmax(q k^T * scale) v over the whole sequence, of which each context-parallel rank holds its zigzag share.

    Constructor and forward are Megatron's core-attention contract. The algorithm is `cp_comm_type` (None: zigzag);
    AttentionFlags are read from the attributes of the config (`cp_kernel`, `cp_placement`, …) where it has them.
    With `auto` the backend is chosen here for the length `cp_seq_length`, and without it at the first call; the cluster
    is `cp_cluster` or the one that ships for this machine's GPU.
    Nothing is kept from forward to backward outside autograd, so the call can be recomputed at will.
    `softmax_type` gives every query head a sink: "learnable" one in the parameter `softmax_offset`, which has the name,
    the shape and the checkpoints of Megatron's own, "off-by-one" one of 0; `cp_sink` fixes one for all heads.

    Raises ValueError, in the constructor where the config says so and else before any communication, for what the
    attention cannot do: packed sequences other than one stream, dropout by a kernel that has none, bias, mask tensors,
    logit statistics.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        refuse_unsupported(config, f"layer {self.layer_number}")
        if num_splits is not None:
            self._refuse(f"num_splits {num_splits}", "leave it out")
        # Query-key layer scaling divides before and multiplies after a half-precision product: the kernels here keep
        # scores in fp32, so that the scale as a whole is this one.
        plain_scale = 1.0 / math.sqrt(k_channels or config.kv_channels)
        self.softmax_scale = plain_scale if softmax_scale is None else softmax_scale
        # the values of multi-latent attention are narrower than its keys
        self.cp_comm_type = cp_comm_type or DEFAULT
        self.flags = AttentionFlags.of(config)
        self._key_dim, self._value_dim = k_channels or config.kv_channels, v_channels or config.kv_channels
        self._widest_head = max(self._key_dim + (ALIBI_COLUMNS if self.flags.alibi else 0), self._value_dim)
        # Megatron's default rate is not 0, and a kernel that was not asked for must not slow the run down
        named = self.flags.kernel != AUTO_KERNEL and KERNELS.get(self.flags.kernel).drops
        self._drops = named and self.attention_dropout > 0
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number)
        self.window = config.window_size if windowed else None
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp", "hcp"])
        self.pg_collection = pg_collection
        self.softmax_offset = self._learnable_sinks() if config.softmax_type == "learnable" else None
        self._fixed_sink = 0.0 if config.softmax_type == "off-by-one" else self.flags.sink
        self._causal = self._is_causal(attn_mask_type)
        self.plan = self._plan(self._causal)
        # shapes of the last call: an equal call needs no comparison, because Megatron cuts a batch for all ranks alike
        self._shapes: tuple[torch.Size, torch.Size] | None = None
        # set by a pipeline schedule that runs sequences in slices
        self.in_slices: SlicesInFlight | None = None
        self._sliced_shapes: set[tuple[torch.Size, torch.Size]] = set()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | Tensor | int | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend: query s b h d, key s b g d, value s b g dv with h a multiple of g, returns s b (h dv).

        With `cp_latent` key is the latent s b 1 (r p), value the weight h e r of the up-projection (`attend_latent`).
        With the documents of a packed stream they are t h d and t g d, and t (h d) is returned. All ranks of the
        context-parallel group communicate. `s` is this rank's share of the sequence.
        """
        self._refuse_call(query, key, attention_mask, attention_bias, packed_seq_params)
        if isinstance(packed_seq_params, PackedStream):
            # t h d -> s b h d, of one sequence
            query, key = query.unsqueeze(1), key.unsqueeze(1)
            value = value if self.flags.latent else value.unsqueeze(1)
            return self._attend(query, key, value, attn_mask_type, packed_seq_params).squeeze(1)
        return self._attend(query, key, value, attn_mask_type, None)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask_type: AttnMaskType | Tensor | int | None,
        stream: PackedStream | None,
    ) -> Tensor:
        causal = self._is_causal(self.attn_mask_type if attn_mask_type is None else attn_mask_type)
        shapes, made = (query.shape, key.shape), self.plan if causal == self._causal else self._plan(causal)
        if self.in_slices and (kept := self.in_slices.of(self)):
            agreed, packed = shapes in self._sliced_shapes, stream and stream.in_slice
            out = attend_slice(query, key, value, made, *kept, agreed=agreed, documents=packed)
            self._sliced_shapes.add(shapes)
            return out.flatten(2)
        sink = self._fixed_sink if self.softmax_offset is None else self.softmax_offset
        documents = stream and stream.documents
        agreed = shapes == self._shapes
        if stream and stream.group:
            # the plan of the step, on which the ranks have agreed, has all sizes
            made, agreed = replace(made, cp=stream.group), True
        if self.flags.latent:
            out = attend_latent(query, key.squeeze(2), value, made, sink=sink, documents=documents, agreed=agreed)
        else:
            seed = self._dropout_seed(query) if self.training and self._drops else None
            out = attend(query, key, value, made, sink=sink, documents=documents, agreed=agreed, dropout_seed=seed)
        self._shapes = shapes
        # s b h d -> s b (h d)
        return out.flatten(2)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return the sinks, split over tensor-parallel ranks by heads as Megatron's own attention keeps them."""
        if self.softmax_offset is None:
            return {}
        own = {"softmax_offset": self.softmax_offset}
        groups = {"tp_group": self.pg_collection.tp, "dp_cp_group": (metadata or {})["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(own, prefix, {"softmax_offset": 0}, sharded_offsets, **groups)

    def describe(self, device: str) -> str:
        """Return what runs on such a device: algorithm, kernel with its reason, sizes."""
        kernel, reason = self.kernel(device)
        axes = f" = {self.plan.axes.inner.size} inner * {self.plan.axes.outer.size} outer" if self.plan.axes else ""
        stages = self.config.pipeline_model_parallel_size
        stage = f", on this one of {stages} pipeline stages" if stages > 1 else ""
        why = f"; auto: {self.plan.why}" if self.plan.why else ""
        name = self.plan.backend.name
        what = f"{name} (chosen at the first call)" if name == AUTO_BACKEND else name
        what += " of the latent" if self.flags.latent else ""
        return f"{what}, kernel {kernel.name} ({reason}), CP={self.plan.cp.size}{axes}{stage}{why}"

    def deviation(self, device: torch.device) -> Deviation:
        """Return how much this attention differs from dense attention on a small batch; all ranks call it together."""
        sizes = self._sizes(TOKENS * self.plan.cp.size)
        heads = CheckedHeads(sizes.heads, sizes.kv_heads, self._key_dim, self._value_dim)
        sink = self._fixed_sink if self.softmax_offset is None else 0.0
        return deviation(settle(self.plan, sizes), heads, self.config.params_dtype, device, sink)

    def kernel(self, device: str) -> tuple[Kernel, str]:
        """Return the kernel that computes on such a device, and why."""
        return choose(
            self.flags.kernel,
            device=device,
            dtype=str(self.config.params_dtype).removeprefix("torch."),
            head_dim=self._widest_head,
            deterministic=self.plan.deterministic,
            softcap=self.flags.softcap,
            drops=self._drops,
        )

    def _dropout_seed(self, query: Tensor) -> DropoutSeed:
        """Draw a seed, alike on ranks that share tensors or tokens; Megatron's recomputation draws it again."""
        tensor = self.pg_collection.tp.rank() if self.config.tensor_model_parallel_size > 1 else 0
        tracker = get_cuda_rng_tracker()
        alike = tracker.fork(get_data_parallel_rng_tracker_name()) if tracker.is_initialized() else nullcontext()
        with alike:
            drawn = torch.randint(1 << 62, (1,), device=query.device)
        return DropoutSeed(drawn, tensor * query.shape[2])

    def _slopes(self) -> list[float] | None:
        """Return the slope of each query head of this tensor-parallel rank, where the model has ALiBi."""
        if not self.flags.alibi:
            return None
        slopes, tensor = alibi_slopes(self.config.num_attention_heads), self.pg_collection.tp.rank()
        heads = len(slopes) // self.config.tensor_model_parallel_size
        return slopes[tensor * heads : (tensor + 1) * heads]

    def _learnable_sinks(self) -> torch.nn.Parameter:
        """Return a logit for each query head of this tensor-parallel rank."""
        config = self.config
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        sinks = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            config.init_method(sinks)
        # without these marks Megatron counts the first rank's heads only in the norm of the gradients
        set_tensor_model_parallel_attributes(sinks, is_parallel=True, dim=0, stride=1)
        return sinks

    def _plan(self, causal: bool) -> Plan:
        inner, outer = self._hierarchy()
        if inner is None and BACKENDS.get(self.cp_comm_type).needs_grid:
            self._refuse(
                f"cp_comm_type {self.cp_comm_type!r} without two axes of ranks",
                "give two hierarchical_context_parallel_sizes (--hierarchical-context-parallel-sizes INNER OUTER)",
            )
        made = plan(
            self.cp_comm_type,
            cp=_fabric(self.pg_collection.cp, self.config.context_parallel_size),
            inner=inner,
            outer=outer,
            causal=causal,
            window=self.window,
            softmax_scale=self.softmax_scale,
            kernel=self.flags.kernel,
            placement=self._placement(),
            chunks=self.flags.chunks,
            deterministic=self.config.deterministic_mode,
            stripe=self.flags.stripe if on_stripes(BACKENDS.get(self.cp_comm_type)) else 1,
            cluster=self._cluster(),
            softcap=self.flags.softcap,
            document_layout=self.flags.document_layout,
            dropout=self.attention_dropout if self._drops else 0.0,
            alibi=self._slopes(),
        )
        seq = getattr(self.config, "cp_seq_length", None)
        return made if seq is None else settle(made, self._sizes(seq))

    def _placement(self) -> str:
        # the flag is for all layers, while each may have an algorithm of its own
        return self.flags.placement if takes_placement(BACKENDS.get(self.cp_comm_type)) else HEAD_FIRST

    def _cluster(self) -> Cluster | None:
        """Return the cluster that `auto` weighs, of one rank in every tensor-parallel group."""
        chooses = BACKENDS.get(self.cp_comm_type).name == AUTO_BACKEND or self.flags.document_layout == AUTO_LAYOUT
        if not chooses or self.config.context_parallel_size == 1:
            return None
        name = self.flags.cluster
        cluster = load_cluster(name) if name else default_cluster(device_of_run())
        return cluster.every(self.config.tensor_model_parallel_size)

    def _sizes(self, seq: int) -> Sizes:
        config, tensor = self.config, self.config.tensor_model_parallel_size
        heads, groups = config.num_attention_heads // tensor, max(1, (config.num_query_groups or 1) // tensor)
        dtype = str(config.params_dtype).removeprefix("torch.")
        return Sizes(seq, heads, groups, self._widest_head, dtype, device_of_run())

    def _hierarchy(self) -> tuple[Fabric | None, Fabric | None]:
        groups = self.pg_collection.hcp
        if not groups or self.config.context_parallel_size == 1:
            return None, None
        if len(groups) != 2:
            self._refuse(f"{len(groups)} hierarchical context-parallel sizes", "give two, the inner one first")
        return GroupFabric(groups[0]), GroupFabric(groups[1])

    def _is_causal(self, mask: AttnMaskType | Tensor | int) -> bool:
        kind = mask if isinstance(mask, AttnMaskType) else AttnMaskType(int(mask))
        if kind not in CAUSAL:
            self._refuse(f"the mask type {kind.name!r}", "use causal or no_mask")
        return CAUSAL[kind]

    def _refuse_call(self, query: Tensor, key: Tensor, mask: Any, bias: Any, packed: Any) -> None:
        if packed is not None and not isinstance(packed, PackedStream):
            self._refuse(
                f"packed sequences of format {packed.qkv_format} outside of a GPTModel or HybridModel",
                "use megatron_cp.context.documents, or unpacked samples",
            )
        if bias is not None:
            self._refuse("an additive bias (attention_bias)", "use rotary or learned positions")
        if mask is not None:
            self._refuse(
                f"a mask tensor (attention_mask of shape {tuple(mask.shape)})",
                "pass --no-create-attention-mask-in-dataloader, the mask type says all",
            )
        if self.training and self.attention_dropout > 0 and not self._drops:
            self._refuse(
                f"dropout (attention_dropout {self.attention_dropout}) by cp_kernel {self.flags.kernel!r}",
                "pass --attention-dropout 0, or --cp-kernel "
                + " or ".join(entry.name for entry in KERNELS if entry.drops),
            )
        if query.shape[0] != key.shape[0]:
            self._refuse(f"{query.shape[0]} queries over {key.shape[0]} keys", "make both sequences equally long")

    def _refuse(self, what: str, way_out: str) -> None:
        raise Refused(f"layer {self.layer_number}: megatron-cp's attention does not do {what}; {way_out}")


def _fabric(group: torch.distributed.ProcessGroup, size: int) -> Fabric:
    # a model on one rank can be built without torch.distributed
    return SingleFabric() if size == 1 else GroupFabric(group)
