"""Keep the state of an optimizer in files, as ZeRO-Infinity does (arXiv:2104.07857, section 5), and step it by pieces.

The files are mapped into memory: what is in them counts as page cache, which the system writes and drops as it needs
to. The optimizer takes its own step over one piece of the parameters after the other, so that the bits are those of a
step in memory; a piece is copied to the device of its gradients where that is not the host.
"""

import mmap
import os
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of what Adam keeps of every parameter."""
PIECE = 2**22
"""Elements that are stepped together, by default."""


class StatePart(NamedTuple):
    """Elements of one parameter, of the optimizer's group of this number."""

    group: int
    parameter: Tensor
    span: slice


class StateFile:
    """A file with a float32 number, zero at first, for every element of the parameters, mapped into memory.

    It has no name, so that nothing of it is left however the process ends, and no other process can meet it. Its
    place on the disk is taken at once: raises OSError where there is none.
    """

    def __init__(self, directory: str, parameters: Sequence[Tensor]) -> None:
        ends = list(accumulate((each.numel() for each in parameters), initial=0))
        self._starts = dict(zip(parameters, ends, strict=False))
        self.bytes = 4 * ends[-1]
        self._numbers = torch.empty(0)
        self._map: mmap.mmap | None = None
        if not self.bytes:
            return
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, self.bytes)
            # keeps the file open
            self._map = mmap.mmap(file.fileno(), self.bytes)
        self._numbers = torch.frombuffer(self._map, dtype=torch.float32)

    def of(self, parameter: Tensor) -> Tensor:
        """Return the numbers of one of the parameters, in its shape."""
        start = self._starts[parameter]
        return self._numbers[start : start + parameter.numel()].view(parameter.shape)

    def read_ahead(self, piece: Sequence[StatePart]) -> None:
        """Begin to read the numbers of these parts, which are neighbours in the file, without waiting for them."""
        starts = [(self._starts[each.parameter], each.span) for each in piece if each.parameter in self._starts]
        if self._map is None or not starts:
            return
        first = 4 * min(start + span.start for start, span in starts) // mmap.PAGESIZE * mmap.PAGESIZE
        last = 4 * max(start + span.stop for start, span in starts)
        if last > first:
            self._map.madvise(mmap.MADV_WILLNEED, first, last - first)


class StateOnDisk:
    """The state of an optimizer of float32 parameters in files; its `step` and `load_state_dict` go through here.

    optimizer: one that updates each element by itself and keeps `names` of it, such as Adam; it has taken no step
    directory: of the files
    weights:   parameters whose values go into a file too
    piece:     elements that are stepped together
    bytes:     in all files
    Raises OSError where the directory cannot hold them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        directory: str,
        *,
        names: tuple[str, ...] = MOMENTS,
        weights: Collection[Tensor] = (),
        piece: int = PIECE,
    ) -> None:
        self._optimizer, self._names = optimizer, names
        self._of_step, self._of_load = optimizer.step, optimizer.load_state_dict
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        moved = {id(each) for each in weights}
        self.weights = [each for each in parameters if id(each) in moved]
        files = {name: StateFile(directory, parameters) for name in names}
        masters = StateFile(directory, self.weights)
        self._files = [*files.values(), masters]
        self.bytes = sum(file.bytes for file in self._files)
        self._kept = {each: {name: file.of(each) for name, file in files.items()} for each in parameters}
        for each in self.weights:
            view = masters.of(each)
            view.copy_(each.data)
            each.data = view
        for each, kept in self._kept.items():
            # torch's Adam counts steps with each parameter
            counts = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
            optimizer.state[each] = {**({"step": torch.tensor(0.0)} if counts else {}), **kept}
        self.pieces = list(_pieces(optimizer.param_groups, piece))
        optimizer.step = self.step  # type: ignore[method-assign, assignment]
        optimizer.load_state_dict = self.load_state_dict  # type: ignore[method-assign]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take the optimizer's step over one piece after the other, while the next one is read ahead."""
        assert closure is None
        counts: dict[int, int] = {}
        self._read_ahead(0)
        for number, piece in enumerate(self.pieces):
            self._read_ahead(number + 1)
            counts.update(self._step_piece([part for part in piece if part.parameter.grad is not None]))
        for number, count in counts.items():
            self._optimizer.param_groups[number]["step"] = count

    def _step_piece(self, piece: list[StatePart]) -> dict[int, int]:
        """Step these elements; return the new count of steps of each group, where the optimizer counts with groups."""
        optimizer = self._optimizer
        groups, state = optimizer.param_groups, optimizer.state
        optimizer.param_groups = [{**group, "params": []} for group in groups]
        optimizer.state = defaultdict(dict)
        try:
            taken = [(part, self._take(part, state[part.parameter])) for part in piece]
            self._of_step()
            for part, stand_in in taken:
                self._put_back(part, stand_in, state[part.parameter])
            stepped = enumerate(optimizer.param_groups)
            return {number: group["step"] for number, group in stepped if group["params"] and "step" in group}
        finally:
            optimizer.param_groups, optimizer.state = groups, state

    def _take(self, part: StatePart, state: dict[str, Any]) -> Tensor:
        """Hand the optimizer the elements as a parameter of its own."""
        gradient = part.parameter.grad
        assert gradient is not None

        def of(tensor: Tensor) -> Tensor:
            return tensor.detach().view(-1)[part.span].to(gradient.device)

        stand_in = torch.nn.Parameter(of(part.parameter))
        stand_in.grad = of(gradient)
        self._optimizer.state[stand_in] = {
            name: of(value) if name in self._names else value.clone() if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        self._optimizer.param_groups[part.group]["params"].append(stand_in)
        return stand_in

    def _put_back(self, part: StatePart, stand_in: Tensor, state: dict[str, Any]) -> None:
        for name, value in self._optimizer.state[stand_in].items():
            if name in self._names:
                _copy_unless_same(state[name].view(-1)[part.span], value)
            elif part.span.stop == part.parameter.numel():
                assert not isinstance(value, Tensor) or value.numel() == 1, f"{name} is in no file"
                state[name] = value
        _copy_unless_same(part.parameter.detach().view(-1)[part.span], stand_in.detach())

    def _read_ahead(self, number: int) -> None:
        for file in self._files if number < len(self.pieces) else ():
            file.read_ahead(self.pieces[number])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as the optimizer does, into the files."""
        self._of_load(state_dict)
        for parameter, kept in self._kept.items():
            loaded = self._optimizer.state[parameter]
            for name, view in kept.items():
                if name in loaded:
                    _copy_unless_same(view, loaded[name])
            loaded.update(kept)

    @contextmanager
    def weights_on(self, device: torch.device) -> Iterator[None]:
        """Let the parameters of the weights' file take gradients of a device; their values cannot be read meanwhile."""
        values = [each.data for each in self.weights]
        for each in self.weights:
            # one element in memory
            each.data = torch.empty(1, device=device).expand(each.shape)
        try:
            yield
        finally:
            for each, value in zip(self.weights, values, strict=True):
                each.data = value


def _pieces(groups: list[dict[str, Any]], elements: int) -> Iterator[list[StatePart]]:
    """Cut the parameters of all groups, in order, into pieces of so many elements, the last of them of fewer."""
    piece: list[StatePart] = []
    room = elements
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            start, size = 0, parameter.numel()
            # a parameter without elements has a count of steps all the same
            while start < size or not size:
                stop = min(start + room, size)
                piece.append(StatePart(number, parameter, slice(start, stop)))
                room, start = room - (stop - start), stop
                if not room:
                    yield piece
                    piece, room = [], elements
                if not size:
                    break
    if piece:
        yield piece


def _copy_unless_same(into: Tensor, value: Tensor) -> None:
    if into.data_ptr() != value.data_ptr():
        into.copy_(value)
