"""Place stages on a V in Megatron, which itself places them on the loop only.

Megatron numbers stages along the loop: chunk c of rank r is stage c * p + r, and whatever it decides for a chunk
(layers and their numbers, embedding, head, loss, data) it decides from (r, c). On the V every other chunk runs up the
ranks: chunk c of rank r is the stage that the loop has on rank p - 1 - r. Such a chunk is built, fed and run as if its
rank were that one: it is given the pipeline's group numbered from the other end, and meanwhile Megatron's own rank is
set to it.

Two more things follow from first and last stage being on one rank: tied embeddings are two weights of rank 0, and
losses have to be sent to the last rank, where Megatron looks for them.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_cp.comm import TensorForm, Wire, backwards, hand_over, packed, unpacked
from megatron_cp.errors import CannotRun
from megatron_cp.megatron.run import Settings
from megatron_cp.pipeline.placement import vee


def rank_on_loop(rank: int, chunk: int, p: int) -> int:
    """Return the rank that holds this stage on the loop; the chunk is the same there."""
    return vee(p, chunk + 1).of_rank[rank][chunk] % p


@contextmanager
def seen_as(rank: int) -> Iterator[None]:
    """Let Megatron take this process for that rank of the pipeline."""
    parallel_state.set_pipeline_model_parallel_rank(rank)
    try:
        yield
    finally:
        # Megatron then asks the group again
        parallel_state.set_pipeline_model_parallel_rank(None)


class OnLoop:
    """Stages on the loop, as Megatron places them.

    pipes: copies of the model on the ranks
    """

    pipes = 1

    def seen(self, chunk: Any) -> AbstractContextManager[None]:
        """Return a context for a forward of this model chunk; the loop needs none."""
        return nullcontext()

    def groups_to_finalize(self, groups: Any, chunks: list[Any]) -> Any:
        """Return the groups in which gradients are reduced at the end of a step."""
        return groups

    def first_micro(self, chunk: int, micros: int) -> int:
        """Return the first of a step's microbatches in a model chunk, in which quantised weights are made anew."""
        return 0

    def feed(self, iterators: list[Any], chunks: list[Any], micros: int) -> list[Any]:
        """Return the data iterator of each model chunk, which Megatron has made."""
        return iterators

    def add_tokens(self, tokens: Tensor, group: Any) -> None:
        """Leave the tokens as one last stage has counted them."""

    def add_gradients(self, chunks: list[Any], group: Any, whole: bool) -> None:
        """Leave the gradients of the only copy of each weight."""

    def to_last_rank(self, store: list[Any], group: Any, micros: int | None) -> list[Any]:
        """Return what the last stage left behind, which the pipeline's last rank prints and logs."""
        return store


class OnV(OnLoop):
    """Stages on the V, where the last one is on the pipeline's first rank."""

    def __init__(self) -> None:
        self._forms: dict[int, Any] = {}

    def seen(self, chunk: Any) -> AbstractContextManager[None]:
        """Let Megatron take this process for the rank that holds this model chunk's stage on the loop."""
        return seen_as(pipeline_of(chunk).rank())

    def groups_to_finalize(self, groups: Any, chunks: list[Any]) -> Any:
        """Return groups in which the pipeline's last rank is the one that has counted tokens."""
        found = copy.copy(groups)
        found.pp = pipeline_of(chunks[-1])
        return found

    def to_last_rank(self, store: list[Any], group: Any, micros: int | None) -> list[Any]:
        """Send what the last stage left behind to the pipeline's last rank, which prints and logs it.

        micros: microbatches of a training step, None outside of training. In the first step of so many the last rank is
                told which tensors come; from then on their bytes travel alone, and no host waits for its device.

        Raises RuntimeError for tensors of other shapes, dtypes or names than in the first step of as many microbatches.
        """
        first, last = 0, group.size() - 1
        form = tree_map_only(Tensor, TensorForm.of, store)
        known = self._forms.get(micros) if micros is not None else None
        if known is None:
            known = hand_over(group, first, last, form)
            if micros is not None:
                self._forms[micros] = known
        if group.rank() == first and form != known:
            raise CannotRun(
                f"the loss function returned {form}, in an earlier step {known}, and the last rank cannot know it; "
                "return tensors of the same names and shapes in each step, or take a schedule on the loop"
            )
        forms = tree_leaves(known)
        if not all(isinstance(leaf, TensorForm) for leaf in forms):
            # values that are no tensors, which a loss function of Megatron's own never returns
            found = hand_over(group, first, last, _moved(store, "cpu"))
            return store if group.rank() == first else _moved(found, torch.cuda.current_device())
        device = torch.cuda.current_device()
        if forms and group.rank() == first:
            Wire(group).send(packed(tree_leaves(store), device), last).wait()
        if not forms or group.rank() != last:
            return store
        message = torch.empty(sum(one.bytes for one in forms), dtype=torch.uint8, device=device)
        Wire(group).receive(message, first).wait()
        tensors = iter(unpacked(message, forms))
        return tree_map_only(TensorForm, lambda _: next(tensors), known)


def pipeline_of(chunk: Any) -> Any:
    """Return the pipeline's group as a model chunk on the V was given it.

    Raises RuntimeError where the model was not built by `build_stages`.
    """
    group = get_attr_wrapped_model(chunk, "pg_collection").pp
    vp_stage = get_attr_wrapped_model(chunk, "vp_stage")
    own = parallel_state.get_pipeline_model_parallel_group()
    if group.rank() != rank_on_loop(own.rank(), vp_stage, own.size()):
        raise CannotRun(
            "a schedule on the V needs the model of a config's builder, and this script hands a model provider to "
            "pretrain(); hand it a model config, or take a schedule on the loop"
        )
    return group


def build_stages(
    old: Callable[..., Any], settings: Settings, build: Callable[..., Any], groups: Any, vp_size: int | None, *args: Any
) -> Any:
    """Build this rank's chunks as stages on the V; tied embeddings start out equal."""
    if not settings.pipeline.on_v:
        return old(build, groups, vp_size, *args)
    assert vp_size, "a rank has chunks on the V"
    other_way = backwards(groups.pp)
    own, p = groups.pp.rank(), groups.pp.size()

    def build_on_v(_: Any, *, vp_stage: int, **processes: bool) -> Any:
        rank = rank_on_loop(own, vp_stage, p)
        mine = copy.copy(groups)
        # the two ends of the model are on one rank: no group exchanges embeddings
        mine.pp, mine.embd = other_way if vp_stage % 2 else groups.pp, None
        stage = vp_stage * p + rank
        with seen_as(rank):
            return build(mine, pre_process=stage == 0, post_process=stage == vp_size * p - 1, vp_stage=vp_stage)

    chunks = old(build_on_v, groups, vp_size, *args)
    if pair := tied(chunks):
        with torch.no_grad():
            pair[1].copy_(pair[0])
    return chunks


def tied(chunks: list[Any]) -> tuple[Tensor, Tensor] | None:
    """Return the embedding and its copy in the last stage, where both are on this rank and are one weight."""
    first, last = (
        get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True) for chunk in (chunks[0], chunks[-1])
    )
    if not (first.pre_process and last.post_process and last.share_embeddings_and_output_weights):
        return None
    return first.shared_embedding_or_output_weight(), last.shared_embedding_or_output_weight()


def add_tied_gradients(
    old: Callable[..., Any], settings: Settings, chunks: list[Any], *args: Any, **kwargs: Any
) -> None:
    """Give both tied weights the sum of their gradients, which the loop's first and last rank reduce to each other."""
    if settings.pipeline.on_v:
        add_up_tied(chunks)
    elif not settings.pipeline.two_copies:
        # with two copies the sums over them come first
        old(chunks, *args, **kwargs)


def add_up_tied(chunks: list[Any]) -> None:
    """Give both tied weights the sum of their gradients, where the first and the last of these chunks have them."""
    if pair := tied(chunks):
        ours, copied = pair[0].main_grad, pair[1].main_grad  # type: ignore[attr-defined]
        ours.add_(copied)
        copied.copy_(ours)


def feed_stages(old: Callable[..., Any], settings: Settings, provider: Any) -> Any:
    """Build the data iterators of one chunk where its stage needs data."""
    if not settings.pipeline.on_v:
        return old(provider)
    own = parallel_state.get_pipeline_model_parallel_group()
    with seen_as(rank_on_loop(own.rank(), provider.keywords["vp_stage"], own.size())):
        return old(provider)


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, device) for entry in value)
    return value
