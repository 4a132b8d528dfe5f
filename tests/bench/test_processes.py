"""Ranks of a measurement print to stderr: stdout belongs to the answer."""

import subprocess
import sys

RANKS = """
import os
from megatron_cp.bench.processes import on_ranks

def body(fabric, device):
    os.write(1, b"a library's line\\n")
    print("our line")
    return fabric.rank

if __name__ == "__main__":
    print(on_ranks(2, body))
"""


def test_what_ranks_print_does_not_reach_stdout(tmp_path):
    (tmp_path / "measure.py").write_text(RANKS)
    done = subprocess.run([sys.executable, tmp_path / "measure.py"], capture_output=True, text=True, check=True)
    assert done.stdout == "[0, 1]\n"
    assert done.stderr.count("a library's line") == done.stderr.count("our line") == 2
