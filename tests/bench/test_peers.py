import sys
from importlib.util import find_spec

import pytest
import torch

from megatron_cp.bench.comparison import RefusedError
from megatron_cp.bench.peers import Peer, load
from megatron_cp.kernels.reference import ReferenceKernel

PEER = """
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward


def attend(q, k, v, causal, group):
    return _flash_attn_forward(q, k, v, 0.0, q.shape[-1] ** -0.5, causal)[0]
"""


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn itself is installed")
def test_flash_attn_can_be_imported_only_while_a_peer_is(tmp_path, monkeypatch):
    (tmp_path / "a_peer.py").write_text(PEER)
    monkeypatch.syspath_prepend(tmp_path)
    before, kernel = set(sys.modules), ReferenceKernel()
    attend = load(Peer("a peer", "a-peer", "a_peer", "attend", "contiguous"), kernel)
    assert set(sys.modules) - before == {"a_peer"}
    q, k, v = (torch.randn(12, 2, 3, 8, dtype=torch.bfloat16) for _ in range(3))
    expected, _ = kernel.forward(q, k, v, scale=8**-0.5, causal=True)
    assert torch.equal(attend(q, k, v, True, None), expected.to(q.dtype))
    with pytest.raises(RefusedError, match=r"bfloat16 and float16 only, got torch.float32; give --dtype bfloat16"):
        attend(q.float(), k.float(), v.float(), True, None)
    monkeypatch.delitem(sys.modules, "a_peer")
