"""A count means the same however it is written, and what is none is refused by name."""

import pytest

from megatron_cp.units import count, is_whole


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4M", 2**22),
        ("4m", 2**22),
        (" 4 M ", 2**22),
        ("4194304", 2**22),
        ("4,194,304", 2**22),
        ("4096K", 2**22),
        ("4e6", 4_000_000),
        ("4E+6", 4_000_000),
        ("128K", 131072),
        ("1.5K", 1536),
        (".5M", 2**19),
        ("1G", 2**30),
        ("2.5e1", 25),
        ("1", 1),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_counts_are_read_exactly(text: str, value: int) -> None:
    assert count(text, "--tokens-per-batch") == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4 M M",
        *"4Q 4KB 4e 4e-1 e6 -4M +4 0 0K 1.3 1.3K 1e99 1e999999999 nan inf 4,19 1_000 9223372036854775808 ٤".split(),
    ],
)
def test_what_is_no_count_is_one_line_with_the_flag(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--tokens-per-batch") as caught:
        count(text, "--tokens-per-batch")
    assert "\n" not in str(caught.value)


def test_an_unknown_unit_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown unit 'Q' in '4Q'; use K, M or G \(powers of 1024\), or e3, e6, e9"):
        count("4Q", "--tokens-per-batch")


def test_a_whole_number_has_no_more_digits_than_any_size() -> None:
    assert all(map(is_whole, ("0", "8", "9" * 18)))
    assert not any(map(is_whole, ("", "-1", "+1", "1.0", "8 ", "²", "9" * 19, "9" * 5000)))
