"""A GPT of Megatron's, cut into stages on the loop, for measurements without `pretrain()`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_cp.bench.pipeline import GptSize
from megatron_cp.megatron import hooks
from megatron_cp.megatron.layers.specs import SpecProvider, local_layer_spec
from megatron_cp.megatron.machine import cpu
from megatron_cp.megatron.pipeline import two_way
from megatron_cp.megatron.run import Settings

VOCABULARY = 512
HEAD_DIM = 64
BATCHES = 64

Batch = dict[str, Tensor]


@contextmanager
def pipeline_of(ranks: int) -> Iterator[None]:
    """Set up Megatron's groups for a pipeline of `ranks`, data parallel beyond that, and linears that can be split."""
    with cpu.cpu_runtime(), hooks.apply(["weight-queue"]):
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=ranks)
        model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()


class ModelChunks:
    """Model chunks of this rank, v of them, as Megatron would train them, and the batches of every step.

    overlap:   gradients are reduced while backwards go on, as with --overlap-grad-reduce
    sliceable: attention is ours, which takes slices of sequences
    """

    def __init__(self, size: GptSize, v: int, overlap: bool = False, sliceable: bool = False) -> None:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(v if v > 1 else None)
        self.size, self._sliceable = size, sliceable
        config = config_of(size, v)
        self.model = self._built(config, v, overlap)
        config.finalize_model_grads_func = finalize_model_grads
        if overlap:
            functions = [chunk.no_sync for chunk in self.model]
            config.no_sync_func = functions if v > 1 else functions[0]
        generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
        self._tokens = torch.randint(VOCABULARY, (BATCHES, 1, size.seq + 1), generator=generator).cuda()
        self._positions = torch.arange(size.seq)[None].cuda()
        self._counted = torch.ones(1, size.seq).cuda()

    def _built(self, config: TransformerConfig, v: int, overlap: bool) -> list[Any]:
        numbers: Sequence[int | None] = range(v) if v > 1 else (None,)
        return [
            _reducing(config, _stage(config, self.size, number, ours=self._sliceable), overlap) for number in numbers
        ]

    def _feeds(self, m: int) -> list[Iterator[Batch]]:
        return [self._batches(m) for _ in self.model]

    def _batches(self, m: int) -> Iterator[Batch]:
        for tokens in self._tokens[:m]:
            yield {
                "tokens": tokens[:, :-1],
                "labels": tokens[:, 1:],
                "positions": self._positions,
                "loss_mask": self._counted,
            }

    def step(self, function: Callable[..., Any], m: int) -> list[float]:
        """Run one step of a forward-backward function; return the losses of the microbatches, on the last rank."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        losses = function(
            forward_step_func=self._forward_step,
            data_iterator=self._feeds(m),
            model=self.model,
            num_microbatches=m,
            seq_length=self.size.seq,
            micro_batch_size=1,
            forward_only=False,
        )
        return [float(part["loss"]) for part in losses]

    @property
    def gradients(self) -> Tensor:
        """Return a copy of all weights' gradients, in one dimension."""
        return torch.cat([buffer.grad_data for chunk in self.model for buffer in chunk.buffers])

    @property
    def constants(self) -> list[Tensor]:
        """Return tensors that live as long as the model: batches and weights."""
        return [
            self._tokens,
            self._positions,
            self._counted,
            *(weight for chunk in self.model for weight in chunk.parameters()),
        ]

    def _forward_step(self, batches: Iterator[Batch], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(batches)
        output = chunk(batch["tokens"], batch["positions"], None, labels=batch["labels"].contiguous())
        # Megatron's block would keep the input of its last forward alive after its last use
        chunk.module.set_input_tensor(None)
        return output, _loss


class TwoCopies(ModelChunks):
    """One model with a second copy up the ranks, as a schedule with two pipes trains it."""

    def __init__(self, one_copy: ModelChunks, settings: Settings) -> None:
        self._one_copy, self._settings = one_copy, settings
        super().__init__(one_copy.size, 1)

    def _built(self, config: TransformerConfig, v: int, overlap: bool) -> list[Any]:
        def stage(_: Any, groups: ProcessGroupCollection, __: Any) -> list[Any]:
            return [_stage(config, self.size, None, groups)]

        groups = ProcessGroupCollection.use_mpu_process_groups()
        stages = two_way.build_stages(stage, self._settings, stage, groups, None)
        chunks = [_reducing(config, one, overlap) for one in stages]
        with torch.no_grad():
            for ours, theirs in zip(chunks[0].parameters(), self._one_copy.model[0].parameters(), strict=True):
                ours.copy_(theirs)
        two_way.start_equal(chunks, groups.pp)
        return chunks

    def _feeds(self, m: int) -> list[Iterator[Batch]]:
        return [self._batches(m)]

    def step(self, function: Callable[..., Any], m: int) -> list[float]:
        """Run one step; return the losses of both pipes' microbatches on the last rank, as with one copy."""
        losses = super().step(function, m)
        return losses if parallel_state.is_pipeline_last_stage() else []

    @property
    def gradients(self) -> Tensor:
        """Return a copy of the gradients of the stage down the ranks, with those of its other copy."""
        return torch.cat([buffer.grad_data for buffer in self.model[0].buffers])


def _loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    mean = losses.mean()
    # Megatron divides the mean itself by the number of microbatches
    return mean, {"loss": mean.detach().clone()}


def config_of(size: GptSize, v: int) -> TransformerConfig:
    """Return Megatron's configuration of the model, in v chunks per rank."""
    return TransformerConfig(
        num_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=max(1, size.hidden // HEAD_DIM),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=cpu.active(),
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=size.ranks,
        virtual_pipeline_model_parallel_size=v if v > 1 else None,
        # as Megatron's arguments set them
        overlap_p2p_comm=v > 1,
        batch_p2p_comm=v == 1,
        deallocate_pipeline_outputs=True,
    )


def _stage(
    config: TransformerConfig,
    size: GptSize,
    number: int | None,
    groups: ProcessGroupCollection | None = None,
    ours: bool = False,
) -> GPTModel:
    return GPTModel(
        config,
        local_layer_spec(config, SpecProvider(config), moe=False) if ours else get_gpt_layer_local_spec(),
        VOCABULARY,
        size.seq,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
        vp_stage=number,
        pg_collection=groups,
    )


def _reducing(config: TransformerConfig, model: GPTModel, overlap: bool) -> Any:
    reduction = DistributedDataParallelConfig(overlap_grad_reduce=overlap)
    return DistributedDataParallel(config, reduction, model.cuda(torch.cuda.current_device()))
