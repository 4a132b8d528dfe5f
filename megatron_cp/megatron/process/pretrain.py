"""Pretrain a GPT where only PyPI's megatron-core is installed.

The wheel has `megatron.training` but no pretrain_gpt.py. This is the same program on the same public calls: parse and
validate, make the model's config, and hand a dataset provider and a forward step to `pretrain`.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage, print_rank_0

from megatron_cp.comm import GroupFabric
from megatron_cp.corpus.conversations import encoder
from megatron_cp.megatron.arguments.entry import refuse_unread
from megatron_cp.megatron.batches.provider import PlannedFeeds
from megatron_cp.megatron.layers.batches import PLANNED, cut_by_documents, cuts_by_documents, planner_of, plans_samples
from megatron_cp.megatron.process import summary
from megatron_cp.megatron.process.conversation_samples import Conversations, ConversationsConfig
from megatron_cp.megatron.process.eod_documents import MockTextsCutAtEod, TextsCutAtEod
from megatron_cp.megatron.process.launch import launched
from megatron_cp.megatron.process.planned_samples import with_layouts
from megatron_cp.megatron.run import cuts_at_eod, packs_documents, plans_batches, say

# times the largest loss so far; as in Megatron's own script
SPIKY_LOSS_FACTOR = 10
# what a batch of whole sequences, which is not packed, does not have
PACKED_KEYS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")


def datasets(samples: Sequence[int | None], vp_stage: int | None = None) -> list[Any]:
    """Build train, validation and test datasets of the requested sizes, of mock data with --mock-data."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    kind, config_of = _kind_of_dataset()
    config = config_of(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size if args.sequence_parallel else 0,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        inter_document_masking=args.dataloader_inter_document_masking,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
    )
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    # on every rank, so that all of them refuse a device that auto knows no cluster for
    planner = planner_of(args) if plans_samples(args) else None
    needed = functools.partial(_reads_data, vp_stage)
    built: list[Any] = BlendedMegatronDatasetBuilder(kind, samples, needed, config).build()
    return with_layouts(built, planner) if planner else built


# rank 0 of each tensor-parallel group is not the only one that may build: the builder asks _reads_data
datasets.is_distributed = True  # type: ignore[attr-defined]


def _kind_of_dataset() -> tuple[type[MegatronDataset], Callable[..., GPTDatasetConfig]]:
    args = get_args()
    if args.sft:
        encode = encoder(get_tokenizer(), args.chat_template)
        return Conversations, functools.partial(ConversationsConfig, encode=encode)
    if cuts_at_eod(args):
        return MockTextsCutAtEod if args.mock_data else TextsCutAtEod, GPTDatasetConfig
    return MockGPTDataset if args.mock_data else GPTDataset, GPTDatasetConfig


def _has_mtp(vp_stage: int | None) -> bool:
    args = get_args()
    layout = get_args().pipeline_model_parallel_layout
    return bool(
        mtp_on_this_rank(layout, mtp_num_layers=args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)
        if args.mtp_num_layers
        else False
    )


def _reads_data(vp_stage: int | None = None) -> bool:
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return False
    # every stage's attention needs the ends of documents
    if packs_documents(get_args()):
        return True
    return bool(is_first_or_last_pipeline_stage(vp_stage)) or _has_mtp(vp_stage)


def batch(data_iterator: Iterator[dict[str, torch.Tensor]] | None, vp_stage: int | None = None) -> dict[str, Any]:
    """Return this rank's part of the next microbatch, broadcast over TP and cut over CP; None for unneeded entries.

    Packed documents of several samples are one sequence.
    """
    args = get_args()
    packed = packs_documents(args)
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    mtp = _has_mtp(vp_stage)
    keys = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", *PACKED_KEYS)
    whole: dict[str, Any] = dict.fromkeys(keys)
    if not (first or last or mtp or packed):
        return whole
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    if tp_rank == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        # a blend adds the number of its dataset, which cannot be cut
        whole |= {key: sample[key].cuda(non_blocking=True) for key in keys if key in sample}
    on_this_rank = get_batch_on_this_tp_rank(
        whole,
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    planned, on_this_rank[PLANNED] = on_this_rank[PLANNED], None
    one_stream = flatten_batch_for_packed_sequences(on_this_rank)
    if cuts_by_documents(args):
        return cut_by_documents(one_stream, args, planned)
    cut: dict[str, Any] = get_batch_on_this_cp_rank(
        one_stream,
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
        use_per_sequence_balancing=True,
    )
    return cut


def loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the sum of this rank's token losses, the number of its tokens, and both for the log.

    Without --calculate-per-token-loss Megatron divides the first by the second and averages over the ranks of a
    context-parallel group. Where masks leave ranks different numbers of tokens, the sum is weighted by this rank's
    share of them, so that the average is that of one rank with the whole sequence.
    """
    mask = loss_mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum().detach().to(torch.int)
    machine = get_rerun_state_machine()
    if get_args().check_for_nan_in_loss_and_grad:
        for unusable, text in ((torch.isnan, "found NaN in local forward loss"), (torch.isinf, "found Inf")):
            machine.validate_result(result=total, rejection_func=unusable, message=text, tolerance=0.0, fatal=True)
    if get_args().check_for_spiky_loss:
        spike = functools.partial(machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss")
        machine.validate_result(result=total, rejection_func=spike, message="Spiky loss", tolerance=0.0, fatal=False)
    return total * _share(tokens), tokens, {"lm loss": _logged(total, tokens)}


def _share(tokens: torch.Tensor) -> torch.Tensor | float:
    """This rank's part of the tokens of its context-parallel group, times the ranks; 1 where nothing is averaged."""
    if get_args().calculate_per_token_loss or get_args().context_parallel_size == 1:
        return 1.0
    fabric = GroupFabric(parallel_state.get_context_parallel_group())
    whole = fabric.all_gather(tokens.reshape(1)).sum()
    return fabric.size * tokens / whole.clamp(min=1)


def _logged(total: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the sum and the number of tokens for the log.

    With --sft Megatron's evaluation takes the mean of each rank, and then that over ranks: a context-parallel group's
    sums are shared out evenly, so that each of its ranks has the mean of all.
    """
    both = torch.stack([total.detach(), tokens.to(total.dtype)])
    if not get_args().sft or get_args().context_parallel_size == 1:
        return both
    fabric = GroupFabric(parallel_state.get_context_parallel_group())
    return fabric.all_gather(both).reshape(fabric.size, 2).sum(dim=0) / fabric.size


def forward_step(
    data_iterator: Any, model: Any, *args: Any, return_schedule_plan: bool = False, **kwargs: Any
) -> tuple[Any, Callable[..., Any]]:
    """Run one microbatch through this stage; return its output and the function that turns it into a loss.

    return_schedule_plan: return the plan of its forward and backward in the place of the output
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    if plans_batches(get_args()):
        part = next(data_iterator)
    else:
        part = batch(data_iterator, getattr(_unwrapped(model), "vp_stage", None))
    timers("batch-generator").stop()
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(
        part["tokens"],
        part["position_ids"],
        part["attention_mask"],
        labels=part["labels"],
        loss_mask=part["loss_mask"],
        packed_seq_params=packed_parameters(part),
    )
    return output, functools.partial(loss, part["loss_mask"])


def packed_parameters(part: dict[str, Any]) -> PackedSeqParams | None:
    """Return the parameters of a batch of packed documents, None for one of whole sequences."""
    if "stream" in part:
        return cast("PackedSeqParams", part["stream"])
    if part["cu_seqlens"] is None:
        return None
    ends, longest = part["cu_seqlens"][0], int(part["max_seqlen"][0])
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=get_args().seq_length,
    )


def _unwrapped(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def model_config(args: Any) -> GPTModelConfig:
    """Return the model's config, with the rope factor that Megatron's own function leaves out."""
    config: GPTModelConfig = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor
    return config


def _note(models: list[torch.nn.Module], built: list[torch.nn.Module]) -> list[torch.nn.Module]:
    models.extend(built)
    return built


def run(prepare: Callable[[GPTModelConfig], None] | None = None, **options: Any) -> None:
    """Parse sys.argv and train; `prepare` may change the model's config before the model is built.

    `options` go to Megatron's `pretrain`. Hooks and the CPU runtime are expected to be in force.
    """
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    refuse_unread(args)
    config = model_config(args)
    if prepare is not None:
        prepare(config)
    models: list[torch.nn.Module] = []
    config.post_wrap_hooks.append(functools.partial(_note, models))
    planned = PlannedFeeds()
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        planned if plans_batches(args) else datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        **options,
    )
    # a run that was already complete takes no step
    last = getattr(args, "curr_iteration", args.iteration - 1)
    text = summary.line(models, last + 1 - args.iteration, planned.fabrics)
    if text:
        say(text)


def main() -> None:
    """`torchrun -m megatron_cp.pretrain_gpt FLAGS`."""
    with launched(sys.argv[1:]):
        run()
