"""Documents packed into one sequence, and other sets of tokens that see each other, by flash-attn's cu_seqlens.

`Documents` are made once for a microbatch and handed to the attention of every layer, which reads no tensor then.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import count, pairwise
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from megatron_cp.context.document_layouts import planned
from megatron_cp.context.layouts import Layout, PlannedLayout
from megatron_cp.context.masks import CAUSAL, FULL, Mask, Piece, Pieces
from megatron_cp.errors import Refused, shown

_numbers = count(1)
_made: "WeakValueDictionary[int, Documents]" = WeakValueDictionary()


class TokenSet(NamedTuple):
    """Queries and keys, as stretches of positions, that see each other in a band; None is the band of the plan.

    As in flash-attn, the plan's band is that of a stretch whose last query stands at its last key.
    """

    q: range
    kv: range
    band: Mask | None = None


class Documents:
    """The documents of a packed sequence; equal to themselves only.

    sets:   which tokens see each other
    tokens: of the whole sequence
    layout: positions of the tokens that each rank holds, where the batch was cut by its documents; None where by the
            layout of the plan
    """

    def __init__(self, sets: Sequence[TokenSet], tokens: int, layout: Layout | None = None) -> None:
        self.sets, self.tokens, self.number = tuple(sets), tokens, next(_numbers)
        self.layout = layout if layout is None else PlannedLayout(layout)
        self._masks: dict[Mask, Pieces] = {}
        _made[self.number] = self

    def __repr__(self) -> str:
        return f"Documents(<{len(self.sets)} of {self.tokens} tokens>)"

    def __copy__(self) -> "Documents":
        return self

    def __deepcopy__(self, _: object) -> "Documents":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # the number is of this process
        return Documents, (self.sets, self.tokens, self.layout)

    def cut_by(self, layout: Layout) -> "Documents":
        """Return these documents in a batch whose ranks hold the tokens at these positions."""
        return Documents(self.sets, self.tokens, layout)

    def planned(self, name: str, ranks: int, band: Mask = CAUSAL) -> PlannedLayout:
        """Return the positions of each rank's tokens in a layout for documents: stream, document or blocks.

        band: mask whose pairs are the work of the ranks
        Raises ValueError for an unknown name and when the ranks cannot have equally many tokens.
        """
        own = any(each.band is not None for each in self.sets)
        return planned(name, self.mask(FULL if own else band), self.tokens, ranks)

    def mask(self, band: Mask) -> Pieces:
        """Return the mask of these documents under a plan's band, the same object in every layer.

        Raises ValueError for a causal mask or a window over sets that have bands of their own.
        """
        if band not in self._masks:
            if band != FULL and any(each.band is not None for each in self.sets):
                raise Refused(
                    f"prefixes, shared prompts and first tokens bring bands of their own, got a plan with {band}; "
                    "make the plan with causal=False and without a window"
                )
            self._masks[band] = Pieces(_piece(each, band) for each in self.sets)
        return self._masks[band]

    def shortened(self, tokens: int) -> "Documents":
        """Return these documents on a sequence of so many tokens, which the layout of the plan cuts."""

        def at(position: int) -> int:
            return position * tokens // self.tokens

        def band(wide: Mask) -> Mask:
            return Mask(*(limit and max(1, at(limit)) for limit in wide))

        return Documents(
            [
                TokenSet(range(at(q.start), at(q.stop)), range(at(kv.start), at(kv.stop)), own and band(own))
                for q, kv, own in self.sets
            ],
            tokens,
        )

    @cached_property
    def term(self) -> str:
        """Describe the documents in a line that is the same on all ranks that have the same ones."""
        digest = blake2b(repr((self.sets, self.layout)).encode(), digest_size=8).hexdigest()
        return f"{len(self.sets)} sets of {self.tokens} tokens in documents ({digest})"


def numbered(number: int) -> Documents | None:
    """Return the documents of this number, none for 0; raises ValueError when they are gone."""
    if number and number not in _made:
        raise Refused(f"documents {number} of a compiled graph are gone; keep them for as long as the graph is called")
    return _made[number] if number else None


def _piece(tokens: TokenSet, band: Mask) -> Piece:
    q, kv, own = tokens
    return Piece(q, kv, band.shifted(kv.stop - q.stop) if own is None else own)


def documents(cu_seqlens: object, cu_seqlens_kv: object = None) -> Documents:
    """Tokens of one document see each other, as far as the plan's band allows.

    cu_seqlens:    where documents start and end, from 0 to the tokens S of the whole sequence, as flash-attn's;
                   a list or a tensor, which is read once; a document may be empty, a pad tail is one more document
    cu_seqlens_kv: the same of their keys, if these are other stretches; a causal mask is aligned at a document's end
    Raises ValueError for ends that do not start at 0, that fall, or that are no whole numbers.
    """
    ends = as_ends(cu_seqlens, "cu_seqlens")
    keys = ends if cu_seqlens_kv is None else as_ends(cu_seqlens_kv, "cu_seqlens_kv")
    if (len(keys), keys[-1]) != (len(ends), ends[-1]):
        raise Refused(
            f"cu_seqlens and cu_seqlens_kv must hold equally many documents and end at one S, got {len(ends) - 1} to "
            f"{ends[-1]} and {len(keys) - 1} to {keys[-1]}; use empty documents, and pads at the end"
        )
    return Documents(
        [TokenSet(range(*q), range(*kv)) for q, kv in zip(pairwise(ends), pairwise(keys), strict=True)], ends[-1]
    )


def prefixes(cu_seqlens: object, lengths: Sequence[int]) -> Documents:
    """Documents whose first `lengths` tokens are seen by all of the document, the others causally (prefix LM).

    Raises ValueError as `documents` does, and for a prefix that is longer than its document.
    """
    ends = as_ends(cu_seqlens, "cu_seqlens")
    sets: list[TokenSet] = []
    for (start, stop), prefix in zip(pairwise(ends), _lengths(lengths, ends, "prefix"), strict=True):
        sets.append(TokenSet(range(start, stop), range(start, start + prefix), FULL))
        sets.append(TokenSet(range(start + prefix, stop), range(start + prefix, stop), CAUSAL))
    return Documents(sets, ends[-1])


def shared_prompts(cu_seqlens: object, prompts: Sequence[int], answers: Sequence[Sequence[int]]) -> Documents:
    """Documents of a prompt and several answers to it: each token sees the prompt and its own answer, causally.

    prompts: tokens of each document's prompt
    answers: tokens of each of its answers; what is left of a document is one more
    Raises ValueError as `documents` does, and for parts that are longer than their document.
    """
    ends, sets = as_ends(cu_seqlens, "cu_seqlens"), list[TokenSet]()
    prompts = _lengths(prompts, ends, "prompt")
    totals = _lengths([sum(parts) for parts in answers], ends, "answers")
    for (start, stop), prompt, parts, total in zip(pairwise(ends), prompts, answers, totals, strict=True):
        first = start + prompt
        rest = stop - first - total
        if rest < 0 or min(parts, default=0) < 0:
            raise Refused(f"a document of {stop - start} tokens cannot hold a prompt of {prompt} and answers {parts}")
        sets.append(TokenSet(range(start, first), range(start, first), CAUSAL))
        sets.append(TokenSet(range(first, stop), range(start, first), FULL))
        for length in (*parts, rest):
            sets.append(TokenSet(range(first, first + length), range(first, first + length), CAUSAL))
            first += length
    return Documents(sets, ends[-1])


def first_and_window(cu_seqlens: object, first: int, window: int) -> Documents:
    """Documents in which a token sees the `window` tokens before it, itself, and the document's `first` tokens.

    Source: Xiao et al. 2023, arXiv:2309.17453 (StreamingLLM). Raises ValueError as `documents` does.
    """
    for name, value in (("first", first), ("window", window)):
        if type(value) is not int or value < 0:
            raise Refused(f"{name} is a number of tokens, 0 or more, got {shown(value)}")
    ends, sets = as_ends(cu_seqlens, "cu_seqlens"), list[TokenSet]()
    for start, stop in pairwise(ends):
        split = min(start + first, stop)
        sets.append(TokenSet(range(start, stop), range(start, split), CAUSAL))
        sets.append(TokenSet(range(split, stop), range(split, stop), Mask(window, 0)))
    return Documents(sets, ends[-1])


def as_ends(cu_seqlens: object, name: str) -> list[int]:
    """Return the ends of documents as whole numbers; raises ValueError for anything else."""
    device = getattr(getattr(cu_seqlens, "device", None), "type", "cpu")
    if device == "meta":
        raise Refused(f"{name} must hold numbers, got a tensor on device meta; give a list or a tensor on the CPU")
    read: Callable[[], object] = getattr(cu_seqlens, "tolist", lambda: cu_seqlens)
    try:
        ends = read()
    except RuntimeError:
        # a tensor without plain memory
        ends = cu_seqlens
    if not isinstance(ends, list | tuple) or len(ends) < 2 or not all(type(end) is int for end in ends):
        raise Refused(f"{name} must be whole numbers, from 0 to the tokens of the sequence, got {shown(ends)}")
    if ends[0] != 0:
        raise Refused(f"{name} must start at 0, got {ends[0]}; it holds where documents start and end, not lengths")
    fallen = next((index for index, (one, two) in enumerate(pairwise(ends), 1) if two < one), None)
    if fallen is not None:
        raise Refused(f"{name} must not fall, got {ends[fallen]} after {ends[fallen - 1]}; sort the documents")
    return list(ends)


def _lengths(lengths: Sequence[int], ends: Sequence[int], name: str) -> Sequence[int]:
    sizes = [stop - start for start, stop in pairwise(ends)]
    if len(lengths) != len(sizes):
        raise Refused(f"each document needs its {name}, got {len(lengths)} for {len(sizes)} documents")
    for size, length in zip(sizes, lengths, strict=True):
        if type(length) is not int or not 0 <= length <= size:
            raise Refused(f"a {name} has 0 to as many tokens as its document, here {size}, got {shown(length)}")
    return lengths
