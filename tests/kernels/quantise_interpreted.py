"""What the kernels for quantised blocks compute under Triton's interpreter, against torch: with TRITON_INTERPRET=1.

Prints one JSON object: what differs by case, in words; nothing where all is equal.
"""

import json
import sys

import torch

from megatron_cp.kernels import fused_quantise
from megatron_cp.replicas.blocks import added, quantised
from tests.kernels import interpreted  # bfloat16 is rounded as on a GPU
from tests.replicas.test_blocks import heavy

assert interpreted._to_nearest


def differences(bits: int, rows: int, block: int, dtype: torch.dtype, keeps: bool) -> list[str]:
    """Compare messages and what is left over to the bit, and sums to rounding."""
    values = heavy(rows, block, rows).to(dtype)
    values[0, :3] = torch.tensor([0.5, 1.5, 127.0])
    values[rows // 2] = 0.0
    mine = heavy(rows, block, 1).bfloat16() if keeps else None
    theirs = None if mine is None else mine.clone()
    expected = quantised(values, bits, theirs)
    messages = torch.zeros_like(expected)
    fused_quantise.quantise(values, bits, mine, messages)
    found = [] if messages.equal(expected) else ["messages"]
    if mine is not None and theirs is not None and not mine.equal(theirs):
        found.append("what is left over")
    peers = torch.stack([quantised(heavy(rows, block, seed), bits) for seed in range(3)])
    total = torch.full((rows, block), torch.nan)
    fused_quantise.add(peers, bits, total)
    if not torch.allclose(total, added(peers, bits), rtol=1e-6, atol=1e-6):
        found.append("sums")
    for strange in (torch.nan, torch.inf):
        values[rows - 1, block - 1] = strange
        fused_quantise.quantise(values, bits, None, messages)
        said = added(messages[None], bits)
        if said[rows - 1].isfinite().all() or not said[: rows - 1].isfinite().all():
            found.append(str(strange))
    return found


def main(cases: list[tuple[int, int, int, str, bool]]) -> None:
    answer = {}
    for bits, rows, block, dtype, keeps in cases:
        answer[f"{bits} {rows} {block} {dtype} {keeps}"] = differences(bits, rows, block, getattr(torch, dtype), keeps)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
