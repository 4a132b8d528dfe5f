"""Parse counts as people write them: `4M`, `4e6` and `4194304`.

K, M and G are powers of 1024, as in "128K tokens" and "a batch of 4M tokens", which mean 131,072 and 4,194,304. An
exponent means a power of ten: `4e6` is 4,000,000.
"""

import re
from decimal import Decimal

from megatron_cp.errors import Refused

UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
# more than any run has tokens
LARGEST = 2**63 - 1

_COUNT = re.compile(
    r"(\d{1,3}(?:,\d{3})+|\d{1,19}(?:\.\d{1,19})?|\.\d{1,19})(?:e\+?(\d{1,2}))?\s*([a-z]*)", re.A | re.I
)


# as many as 64 bits hold; Python refuses to convert texts of thousands
MOST_DIGITS = 18


def is_whole(text: str) -> bool:
    """True if `text` is the digits of a whole number, and not more of them than any size or count has."""
    return text.isdecimal() and len(text) <= MOST_DIGITS


def many(number: int, what: str) -> str:
    """Return `1 document`, `2,000 documents`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def count(text: str, what: str) -> int:
    """Return the number that `text` means; `what` is the flag or key of the value, for the error.

    Raises ValueError for an unknown unit, for a text that is not a number, and for numbers that are not whole or not
    positive.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise Refused(f"{what} takes a count such as 4M, 4e6 or 4194304, got {text!r}")
    digits, exponent, unit = match[1].replace(",", ""), int(match[2] or 0), match[3].upper()
    if unit not in UNITS:
        raise Refused(f"{what}: unknown unit {match[3]!r} in {text!r}; use K, M or G (powers of 1024), or e3, e6, e9")
    value = Decimal(digits).scaleb(exponent) * UNITS[unit]
    if value != value.to_integral_value() or not 0 < value <= LARGEST:
        raise Refused(f"{what} takes a positive whole number up to 2**63 - 1, got {text!r}")
    return int(value)
