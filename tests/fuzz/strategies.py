"""Bytes and texts near to valid ones."""

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

# what broke readers before, and what breaks others
HOSTILE = st.sampled_from(
    [
        *("", " ", "0", "-1", "1e308", "nan", "inf", "null", "true", "[]", "{}", "[1, [2]]", "${", "${X}", "${X:-"),
        *("\0", "\ufeff", "'", '"', ":", "- ", "*a", "&a", "!!python/name:os.system", "9" * 400, "%", "\t", "漢字"),
        "9" * 5000,
    ]
)


def mostly(value: Any, other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """`value` in four of five cases."""
    return st.integers(0, 4).flatmap(lambda draw: other if draw == 4 else st.just(value))


@st.composite
def changed(draw: DrawFn, whole: str) -> str:
    """A text with one to three lines taken out, doubled, swapped or written over."""
    lines = whole.splitlines(keepends=True)
    for _ in range(draw(mostly(1, st.integers(2, 3)))):
        at, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        kind = draw(st.sampled_from(["drop", "double", "swap", "value", "insert", "cut"]))
        if kind == "drop" and len(lines) > 1:
            del lines[at]
        elif kind == "double":
            lines.insert(other, lines[at])
        elif kind == "swap":
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == "value":
            head, colon, _ = lines[at].partition(":")
            lines[at] = f"{head}{colon} {draw(HOSTILE)}\n"
        elif kind == "insert":
            column = draw(st.integers(0, len(lines[at])))
            lines[at] = lines[at][:column] + draw(HOSTILE | st.text(max_size=5)) + lines[at][column:]
        else:
            lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))]
    return "".join(lines)


@st.composite
def damaged(draw: DrawFn, whole: bytes) -> bytes:
    """Bytes cut off, written over, taken out or put in."""
    found = bytearray(whole)
    for _ in range(draw(mostly(1, st.integers(2, 3)))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        kind = draw(st.sampled_from(["cut", "over", "out", "in"]))
        if kind == "cut":
            del found[at:]
        elif kind == "over":
            new = draw(st.binary(min_size=1, max_size=8))
            found[at : at + len(new)] = new
        elif kind == "out":
            del found[at : at + draw(st.integers(1, 64))]
        else:
            found[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(found)
