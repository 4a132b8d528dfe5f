"""Run every rank's loop alone, on tensors without data, and note what it does: any sequence length, any rank count."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from megatron_cp.comm import Done, Fabric, Handle, MessageError, axes_of
from megatron_cp.comm.fabric import (
    all_to_all_by_exchange,
    check_batch,
    check_gathered,
    check_parts,
    form,
    row_form,
    size_in_bytes,
)
from megatron_cp.context import AUTO, BACKENDS
from megatron_cp.context.checks import check_documents
from megatron_cp.context.document_layouts import STREAM
from megatron_cp.context.function import run as attend
from megatron_cp.context.function import run_latent
from megatron_cp.context.masks import Mask
from megatron_cp.context.merging import ASSUMED, BY_TORCH, SEVERAL, Merging
from megatron_cp.context.partials import accumulator_dtype
from megatron_cp.context.plan import Plan, plan
from megatron_cp.context.tiles import tiles
from megatron_cp.context.trace.events import (
    Compute,
    Event,
    HostCopy,
    Matmul,
    Message,
    Pass,
    Post,
    Problem,
    Step,
    Touch,
    Trace,
    Wait,
    match,
)
from megatron_cp.context.trace.live import LiveBytes
from megatron_cp.context.trace.rings import neighbours, shared
from megatron_cp.errors import Refused
from megatron_cp.kernels import Kernel, Window


def record(problem: Problem, merging: Merging | None = None) -> Trace:
    """Return the trace of a backend at a problem, without computing or sending anything.

    Partial results are merged as on the problem's device, or as `merging` says.

    Raises ValueError for what the backend refuses and UnmatchedError for a loop whose ranks would hang.
    """
    forward, backward = _passes(problem, merging)
    for run in (forward, backward):
        match(run)
    return Trace(problem, forward, backward, _relayout(problem, forward, backward))


def plan_on(problem: Problem, fabric: Fabric, kernel: str | Kernel) -> Plan:
    """Make the plan of one rank of a problem."""
    inner = outer = None
    entry = BACKENDS.get(problem.backend)
    if entry.name == AUTO:
        raise Refused(f"{AUTO!r} has no loop of its own; take what megatron_cp.context.auto.decide names")
    if problem.grid and entry.takes_grid:
        inner, outer = axes_of(problem.grid, fabric)
    return plan(
        problem.backend,
        cp=fabric,
        inner=inner,
        outer=outer,
        causal=problem.causal,
        window=problem.window,
        kernel=kernel,
        placement=problem.placement,
        layout=problem.layout,
        chunks=problem.chunks,
        stripe=problem.stripe,
        document_layout=STREAM if problem.cut else problem.document_layout,
    )


def _passes(problem: Problem, merging: Merging | None = None) -> tuple[Pass, Pass]:
    # refused before a share of the sequence is taken
    if problem.documents is not None:
        check_documents(problem.documents, problem.seq, problem.ranks)
    assert len(problem.held) == problem.ranks
    forward, backward = zip(*(record_rank(problem, rank, merging) for rank in range(problem.ranks)), strict=True)
    rows = () if any(isinstance(event, Compute) for event, _ in forward[0]) else _rows(problem)
    return Pass(forward, problem.head_dim, rows), Pass(backward, problem.head_dim, rows)


def _rows(problem: Problem) -> tuple[int, ...]:
    """Return the work of each rank's own queries with the whole sequence."""
    whole = (range(problem.seq),)
    return tuple(
        sum(tile.pairs for run in runs for tile in tiles((run,), whole, problem.mask)) * problem.heads
        for runs in _in_place(problem).held
    )


def _in_place(problem: Problem) -> Problem:
    """Return the problem whose ranks' tokens lie as the loop wants them."""
    wanted = BACKENDS.get(problem.backend).layout
    if wanted is not None:
        return replace(problem, layout=wanted, cut=False)
    return problem if problem.document_layout == STREAM else replace(problem, cut=True)


def _relayout(problem: Problem, *passes: Pass) -> list[int]:
    """Return the extra bytes that every rank sends because its tokens do not lie as the loop wants them."""
    if _in_place(problem) == problem:
        return [0] * problem.ranks
    native = _passes(_in_place(problem))
    ours, theirs = ([sum(sent) for sent in zip(*(run.sent for run in both), strict=True)] for both in (passes, native))
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def record_rank(
    problem: Problem, rank: int, merging: Merging | None = None
) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Record one rank's forward and backward steps."""
    assumed = ASSUMED.set(merging or (SEVERAL if problem.device == "cuda" else BY_TORCH))
    try:
        return _record_rank(problem, rank)
    finally:
        ASSUMED.reset(assumed)


def _record_rank(problem: Problem, me: int) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    tokens, dtype = problem.seq // problem.ranks, getattr(torch, problem.dtype)
    q, k, v, dout = (
        torch.empty(tokens, 1, heads, problem.head_dim, dtype=dtype, device="meta")
        for heads in (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
    )
    for tensor in (q, k, v):
        tensor.requires_grad_()
    if problem.latent is not None:
        rank, rotary = problem.latent
        k = torch.empty(tokens, 1, 1, rank + rotary, dtype=dtype, device="meta", requires_grad=True)
        v = torch.empty(problem.heads, 2 * problem.head_dim - rotary, rank, dtype=dtype, device="meta")
        v.requires_grad_()
    with Recorder(q, k, v, dout) as recorder:
        fabric = RecordingFabric(recorder, tuple(range(problem.ranks)), me, problem.ranks_per_node)
        made = plan_on(problem, fabric, RecordingKernel(recorder, problem.windows))
        if problem.latent is not None:
            out = run_latent(q, k, v, made, packed=problem.packed)
        else:
            out = attend(q, k, v, made, packed=problem.packed)
        forward = recorder.take()
        out.backward(dout)
        return forward, recorder.take()


class Recorder(LiveBytes):
    """Notes what runs inside the block: events from fabric and kernel, memory from every operation on tensors."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__(*inputs)
        self._steps: list[Step] = []
        self._touched, self._kernels, self._batches, self.backward = 0, 0, 0, False
        self._forms: dict[tuple, tuple] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _kind(func)
        if kind == "in place":
            result = args[0]
            if self._is_host(result) or (len(args) > 1 and self._is_host(args[1])):
                self.note(HostCopy(size_in_bytes(result)))
                return result
        else:
            run = partial(self._shaped, func) if kind == "new" else func
            result = super().__torch_dispatch__(run, types, args, kwargs)
        if func.overloadpacket.__name__ in ("bmm", "mm"):
            self.note(Matmul(2 * result.numel() * args[0].shape[-1], self.backward))
        elif kind != "free":
            touched = [size_in_bytes(x) for x in tree_iter((args, kwargs, result)) if isinstance(x, Tensor)]
            self._touched += sum(touched)
            self._kernels += bool(touched)
        return result

    def _is_host(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._host

    def _shaped(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the result of an operation that makes a tensor; its shape is found once, which takes torch long."""
        key = (func, *(_form(leaf) for leaf in tree_iter((args, kwargs))))
        if key not in self._forms:
            result = func(*args, **kwargs)
            self._forms[key] = _form(result)
            return result
        size, stride, dtype = self._forms[key]
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")

    def check_device(self, tensors: Sequence[Tensor]) -> None:
        """Raise MessageError for a tensor that is not in the memory of the ranks' device."""
        for tensor in tensors:
            if tensor.device.type != "meta" or self._is_host(tensor):
                raise MessageError(f"messages must be in device memory, got {form(tensor)} in host memory")

    def note(self, event: Event) -> None:
        """Append an event, after what was touched before it."""
        if self._touched:
            self._append(Touch(self._touched, self._kernels))
        self._append(event)

    def post(
        self,
        group: tuple[int, ...],
        sends: Sequence[Message],
        recvs: Sequence[Message],
        buffers: Sequence[object],
        collective: str = "",
    ) -> Handle:
        """Note a batch of messages; the handle notes the wait, and holds on to the buffers until then."""
        batch, self._batches = self._batches, self._batches + 1
        self.note(Post(batch, group, tuple(sends), tuple(recvs), collective))
        return _Pending(self, batch, buffers)

    @property
    def noted(self) -> int:
        """Number of steps since the last `take`."""
        return len(self._steps)

    def take(self) -> tuple[Step, ...]:
        """Return the steps since the last call, closed by what was touched at the end."""
        self._append(Touch(self._touched, self._kernels))
        steps, self._steps, self.backward = tuple(self._steps), [], True
        return steps

    def _append(self, event: Event) -> None:
        self._steps.append(Step(event, self.peak))
        self._touched, self._kernels, self.peak = 0, 0, self.now


# they reserve memory and write nothing, or are views that do not say so
_UNTOUCHED = "empty empty_like new_empty empty_strided new_empty_strided host_empty _unsafe_view".split()


# a loop calls a few dozen of torch's operators
@lru_cache(512)
def _kind(func: Any) -> str:
    """Classify an operation without data: "free" touches nothing, "in place" makes nothing, "new" makes one tensor."""
    name, arguments, results = func.overloadpacket.__name__, func._schema.arguments, func._schema.returns
    if func.is_view or name in _UNTOUCHED:
        return "free"
    changed = arguments[0].alias_info if arguments else None
    if name.endswith("_") and changed is not None and changed.is_write:
        return "in place"
    # our custom operations note what they do themselves
    makes = [(str(result.type), result.alias_info) for result in results] == [("Tensor", None)]
    takes = bool(arguments) and "Tensor" in str(arguments[0].type)
    return "new" if func.namespace == "aten" and makes and takes else "other"


def _form(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


class RecordingFabric:
    """A rank of `members` whose messages are noted instead of sent."""

    def __init__(self, recorder: Recorder, members: tuple[int, ...], me: int, per_node: int | None = None) -> None:
        self._recorder, self._members, self._per_node = recorder, members, per_node
        self.rank, self.size, self.sent = members.index(me), len(members), 0

    def exchange(self, sends: Sequence[tuple[Tensor, int]], recvs: Sequence[tuple[Tensor, int]]) -> Handle:
        check_batch(self, sends, recvs)
        self._recorder.check_device([tensor for tensor, _ in chain(sends, recvs)])
        if not sends and not recvs:
            return Done()
        self.sent += sum(size_in_bytes(tensor) for tensor, _ in sends)
        return self._recorder.post(self._members, self._messages(sends), self._messages(recvs), [*sends, *recvs])

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(member // self._per_node if self._per_node else 0 for member in self._members)

    def all_gather(self, local: Tensor) -> Tensor:
        gathered = local.new_empty((self.size, *local.shape))
        self.start_all_gather(gathered, local.contiguous()).wait()
        return gathered

    def start_all_gather(self, gathered: Tensor, local: Tensor) -> Handle:
        return self._collective("gather", gathered, local)

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        check_parts(self, whole)
        # added up on the way, so that one buffer takes all parts
        part = whole.new_empty(whole.shape[1:])
        self.start_reduce_scatter(part, whole.contiguous()).wait()
        return part

    def start_reduce_scatter(self, part: Tensor, whole: Tensor) -> Handle:
        return self._collective("scatter", whole, part)

    def _collective(self, name: str, whole: Tensor, part: Tensor) -> Handle:
        """Note the messages of a collective that goes around rings of the ranks, each with its share of every part."""
        check_gathered(self, whole, part)
        self._recorder.check_device([whole, part])
        size, what = (self.size - 1) * size_in_bytes(part), f"{row_form(part)} in a {name}"
        if not size:
            return Done()
        self.sent += size
        ahead, behind = neighbours(self.nodes, self.rank)
        sends, recvs = (
            [Message(self._members[peer], share, what) for peer, share in shared(size, peers).items()]
            for peers in (ahead, behind)
        )
        return self._recorder.post(self._members, sends, recvs, [whole, part], name)

    def all_to_all(self, rows: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
        return all_to_all_by_exchange(self, rows, sends, recvs)

    def subset(self, ranks: Sequence[int]) -> "RecordingFabric":
        members = tuple(self._members[rank] for rank in ranks)
        return RecordingFabric(self._recorder, members, self._members[self.rank], self._per_node)

    def _messages(self, transfers: Sequence[tuple[Tensor, int]]) -> list[Message]:
        return [Message(self._members[peer], size_in_bytes(tensor), row_form(tensor)) for tensor, peer in transfers]


class _Pending:
    """A batch in flight; a second wait has no effect."""

    def __init__(self, recorder: Recorder, batch: int, buffers: Sequence[object]) -> None:
        self._recorder, self._batch, self._waited = recorder, batch, False
        self._buffers = buffers

    def wait(self) -> None:
        if not self._waited:
            self._recorder.note(Wait(self._batch))
        self._waited, self._buffers = True, ()

    def done(self) -> bool:
        return False


class RecordingKernel:
    """Results without values, as large as a fused kernel's."""

    name = "recording"

    def __init__(self, recorder: Recorder, windows: bool) -> None:
        self._recorder, self.windows = recorder, windows

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, window: Window | None = None
    ) -> tuple[Tensor, Tensor]:
        self._note(q, k, causal, window, backward=False)
        out = torch.empty_like(q) if q.shape[3] == v.shape[3] else q.new_empty((*q.shape[:3], v.shape[3]))
        return out, q.new_empty(q.shape[:3], dtype=accumulator_dtype(q))

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
        window: Window | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._note(q, k, causal, window, backward=True)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def _note(self, q: Tensor, k: Tensor, causal: bool, window: Window | None, *, backward: bool) -> None:
        assert q.numel() * k.numel(), "an empty tile never reaches a kernel"
        assert not causal or len(q) == len(k), "a causal tile has as many queries as keys"
        batches, band = q.shape[1], Mask(*window) if window else None
        self._recorder.note(
            Compute(len(q), len(k), batches * q.shape[2], batches * k.shape[2], q.shape[3], causal, backward, band)
        )
