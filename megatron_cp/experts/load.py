"""Loads of experts: how many tokens each of them sees."""


def zipf(experts: int, rows: int, skew: float) -> list[int]:
    """Return rows for each of the experts, busiest first: row shares of 1 / rank^skew, rounded to a sum of `rows`."""
    weights = [(rank + 1) ** -skew for rank in range(experts)]
    shares = [rows * weight / sum(weights) for weight in weights]
    sizes = [int(share) for share in shares]
    # the largest remainders get what rounding down left
    for at in sorted(range(experts), key=lambda at: sizes[at] - shares[at])[: rows - sum(sizes)]:
        sizes[at] += 1
    return sizes
