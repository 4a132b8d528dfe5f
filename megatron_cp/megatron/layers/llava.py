"""Megatron's LLaVAModel under context parallelism: tiles are dealt to the ranks, as by MM-SP of LongVILA.

Upstream's model asserts TransformerEngine's attention in the language model's layers, encodes every tile on every rank,
and makes the whole sequence of embeddings there before each keeps its share. Here a rank encodes its share of the
tiles, embeds its share of the text, and gets the embeddings of tiles that it attends with. Which token stands where,
labels and loss masks are upstream's own doing.
"""

from copy import copy
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.multimodal.llava_model import (
    IGNORE_INDEX,
    LLaVAModel,
    _load_state_dict_hook_ignore_extra_state,
)
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad

from megatron_cp.comm import GroupFabric, SingleFabric
from megatron_cp.context import DEFAULT
from megatron_cp.context.frames import FramePlace
from megatron_cp.context.plan import plan
from megatron_cp.context.redeal import deal_frames, place_frames
from megatron_cp.context.sharding import shard
from megatron_cp.errors import Refused
from megatron_cp.megatron.layers.specs import SpecProvider, local_block_spec, local_layer_spec

PAD = 0
"""Number of a position without a token; texts count up from 1, embeddings of tiles down from -1."""
LANGUAGE_MODELS_OF_THEIR_OWN = ("nemotron5-hybrid", "nemotron6-moe")


class LLaVASpecs(NamedTuple):
    """Specs for `ContextParallelLLaVA`, without TransformerEngine."""

    language: TransformerBlockSubmodules
    vision: ModuleSpec
    projection: MLPSubmodules


def llava_specs(language: TransformerConfig, vision: TransformerConfig) -> LLaVASpecs:
    """Return local specs: context-parallel attention in the language model, Megatron's own in the vision tower.

    A tile is encoded whole, and may have an odd number of tokens.
    """
    provider = SpecProvider(vision)
    tower = local_layer_spec(vision, provider, moe=False)
    attention = tower.submodules.self_attention
    attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    attention.submodules.core_attention = DotProductAttention
    linears = {"linear_fc1": provider.column_parallel_linear(), "linear_fc2": provider.row_parallel_linear()}
    return LLaVASpecs(local_block_spec(language, SpecProvider(language)), tower, MLPSubmodules(**linears))


class Sources(NamedTuple):
    """Upstream's combined sequence.

    numbers:   [b S] of the token that stands at each position: see PAD
    labels:    [b S] or None
    loss_mask: [b S] or None
    """

    numbers: Tensor
    labels: Tensor | None
    loss_mask: Tensor | None


class ContextParallelLLaVA(LLaVAModel):
    """LLaVAModel whose language model has the attention of the spec that it is given, ours or any, on all its ranks.

    Arguments, by name, are those of LLaVAModel; the config of the vision tower is of context_parallel_size 1. Tiles are
    dealt evenly by their number.

    Raises ValueError for what is not dealt: pipeline stages, HybridModel, temporal and dynamic resolution, tile tags,
    sound, packed sequences, inference.
    """

    def __init__(
        self, *, language_transformer_config: TransformerConfig, language_transformer_layer_spec: Any, **rest: Any
    ) -> None:
        config = language_transformer_config
        _refuse_model(config, rest)
        # upstream's checks of attention and of TransformerEngine are those of ranks that share sequences
        alone = copy(config)
        alone.context_parallel_size, alone.sequence_parallel = 1, False
        super().__init__(
            language_transformer_config=alone,
            language_transformer_layer_spec=language_transformer_layer_spec,
            **{**rest, "add_decoder": False},
        )
        self.config, self.add_decoder = config, True
        self.context_parallel_lm, self.sequence_parallel_lm = config.context_parallel_size, config.sequence_parallel
        self.language_model = GPTModel(
            config=config,
            transformer_layer_spec=language_transformer_layer_spec,
            vocab_size=rest["language_vocab_size"],
            max_sequence_length=rest["language_max_sequence_length"],
            position_embedding_type=rest.get("language_position_embedding_type", "learned_absolute"),
            scatter_embedding_sequence_parallel=False,
            pg_collection=self.pg_collection,
            **{ours: rest[theirs] for theirs, ours in LANGUAGE_ARGUMENTS.items() if theirs in rest},
        )
        self.language_model.register_load_state_dict_post_hook(_load_state_dict_hook_ignore_extra_state)
        self._language_max_sequence_length = rest["language_max_sequence_length"]
        self._language_is_pipeline_parallel = False
        self.cp_group = self.pg_collection.cp
        # Megatron's layers take tokens in the layout that a plan has by default, whatever their algorithm
        self.plan = plan(DEFAULT, cp=GroupFabric(self.cp_group) if self.context_parallel_lm > 1 else SingleFabric())

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        inference_context: Any = None,
        num_image_tiles: Tensor | None = None,
        image_token_index: int | None = None,
        runtime_gather_output: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return losses [b s], or logits [b s v] without labels, of this rank's tokens, and their loss mask [b s].

        images [tiles 3 h w], input_ids and position_ids [b t], labels and loss_mask [b t] are whole on every rank of
        the context-parallel group. The combined sequence of each sample is padded to what the ranks can share.
        Raises ValueError for tiles that no rank can take: behind the language model's longest sequence.
        """
        _refuse_call({"inference_context": inference_context, **others})
        tiles, token = _tiles(images, num_image_tiles, input_ids), image_token_index
        token = self.image_token_index if token is None else token
        sources = self._sources(images, input_ids, labels, loss_mask, tiles, token)
        embeddings = self._embeddings(images, input_ids, position_ids, sources.numbers, token)
        if self.sequence_parallel_lm:
            embeddings = scatter_to_sequence_parallel_region(embeddings)
        labels, loss_mask = (x if x is None else shard(x, self.plan, dim=1) for x in sources[1:])
        output = self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=attention_mask,
            decoder_input=embeddings,
            labels=labels,
            runtime_gather_output=runtime_gather_output,
        )
        return output, loss_mask

    def _sources(
        self,
        images: Tensor,
        input_ids: Tensor,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        tiles: Tensor,
        token: int,
    ) -> Sources:
        """Combine texts and tiles by upstream's rules, with numbers in the place of embeddings; pad for the ranks."""
        count, each = images.shape[0], self.img_seq_len
        texts = torch.arange(1, input_ids.numel() + 1, device=input_ids.device).view(*input_ids.shape, 1)
        of_tiles = -torch.arange(1, count * each + 1, device=input_ids.device).view(count, each, 1)
        # without a tile upstream wants nothing along its first dim
        of_tiles = of_tiles.transpose(0, 1) if count else of_tiles.view(0, 0, 1)
        combined, labels, loss_mask = self._preprocess_data(
            of_tiles, texts, input_ids, loss_mask, labels, False, None, token, tiles
        )
        # upstream has the tokens first where no ranks share them
        numbers = combined.squeeze(2) if self.context_parallel_lm > 1 else combined.squeeze(2).T
        if (found := int((numbers < 0).sum())) != count * each:
            raise Refused(
                f"{count} tiles of {each} tokens do not fit into {self._language_max_sequence_length} tokens of a "
                f"sequence, which has room for {found} of {count * each}: no rank can take the others; raise "
                "language_max_sequence_length, or give fewer tiles"
            )
        ranks = 2 * self.context_parallel_lm * (self.tensor_model_parallel_size_lm if self.sequence_parallel_lm else 1)
        missing = (0, -numbers.shape[1] % ranks)
        return Sources(
            pad(numbers, missing, value=PAD),
            labels if labels is None else pad(labels, missing, value=IGNORE_INDEX),
            loss_mask if loss_mask is None else pad(loss_mask, missing, value=0),
        )

    def _embeddings(
        self, images: Tensor, input_ids: Tensor, position_ids: Tensor, numbers: Tensor, token: int
    ) -> Tensor:
        """Return the embeddings [s b h] of this rank's tokens, of which it encodes its share of tiles."""
        each, count = self.img_seq_len, images.shape[0]
        first = (numbers < 0) & ((-numbers - 1) % each == 0)
        starts = zip(first.nonzero().tolist(), numbers[first].tolist(), strict=True)
        places = [FramePlace((-number - 1) // each, position, row) for (row, position), number in starts]
        deal = deal_frames(self.plan, [each] * count, places, seq=numbers.shape[1], batch=numbers.shape[0])
        # s b
        mine = shard(numbers.T, self.plan)
        source = (mine - 1).clamp(0).T
        ids = input_ids.masked_fill(input_ids == token, 0).flatten()[source]
        text = self.language_model.embedding(
            input_ids=ids, position_ids=position_ids.expand_as(input_ids).flatten()[source]
        )
        text = text * (mine != PAD).unsqueeze(2)
        if not count:
            return text
        # one tile on a rank without any, so that its vision tower has gradients: of nothing
        encoded = self._encoded(images[list(deal.mine) or [0]], input_ids, position_ids)
        rows = encoded.transpose(0, 1).flatten(0, 1)[: deal.rows]
        return place_frames(rows.to(text.dtype), text, deal, self.plan)

    def _encoded(self, images: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return upstream's projected embeddings [img_seq_len tiles h] of some tiles."""
        # without a decoder upstream's forward ends behind the projection
        self.add_decoder = False
        try:
            encoded, _ = super().forward(images, input_ids, position_ids, None)
        finally:
            self.add_decoder = True
        return encoded


LANGUAGE_ARGUMENTS = {
    "parallel_output": "parallel_output",
    "language_rotary_percent": "rotary_percent",
    "language_rotary_base": "rotary_base",
    "language_rope_scaling": "rope_scaling",
    "language_rope_scaling_factor": "rope_scaling_factor",
    "pre_process": "pre_process",
    "post_process": "post_process",
    "share_embeddings_and_output_weights": "share_embeddings_and_output_weights",
    "vp_stage": "vp_stage",
}
"""Arguments of LLaVAModel that it hands to its language model, and their names there."""


def _tiles(images: Tensor, num_image_tiles: Tensor | None, input_ids: Tensor) -> Tensor:
    if num_image_tiles is None:
        return torch.ones(images.shape[0], dtype=torch.int, device=input_ids.device)
    if int(num_image_tiles.sum()) != images.shape[0]:
        raise Refused(
            f"num_image_tiles must add up to the {images.shape[0]} tiles of images, got {num_image_tiles.tolist()}"
        )
    return num_image_tiles


def _refuse_model(config: TransformerConfig, rest: dict[str, Any]) -> None:
    """Raise Refused for models whose tiles cannot be dealt."""
    if (
        config.pipeline_model_parallel_size > 1
        or not rest.get("add_encoder", True)
        or not rest.get("add_decoder", True)
    ):
        raise Refused(
            "LLaVAModel deals tiles with vision tower and language model on one pipeline stage, got "
            f"pipeline_model_parallel_size {config.pipeline_model_parallel_size}; use tensor or context parallelism"
        )
    kind = getattr(config, "language_model_type", "")
    if kind.startswith(LANGUAGE_MODELS_OF_THEIR_OWN):
        raise Refused(f"LLaVAModel deals tiles to a GPTModel, got language_model_type {kind!r}; use one of its types")
    size = rest["vision_transformer_config"].context_parallel_size
    if size > 1:
        raise Refused(f"the vision tower takes whole tiles, got its context_parallel_size {size}; set it to 1")
    tokens = ("dynamic_resolution", "tile_tags", "sound_model")
    if asked := [name for name in tokens if rest.get(name)]:
        raise Refused(f"LLaVAModel deals tiles of one size to ranks, got {' and '.join(asked)}; leave it out")
    if rest.get("temporal_patch_dim", 1) > 1:
        raise Refused(
            f"LLaVAModel deals single tiles to ranks, got temporal_patch_dim {rest['temporal_patch_dim']}; leave it out"
        )


def _refuse_call(given: dict[str, Any]) -> None:
    if asked := [name for name, value in given.items() if value is not None]:
        raise Refused(
            f"LLaVAModel deals tiles of whole samples in training, got {' and '.join(asked)}; leave it out, or use "
            "Megatron's own class on one context-parallel rank"
        )
