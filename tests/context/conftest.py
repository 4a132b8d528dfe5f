import pytest
import torch


@pytest.fixture(autouse=True)
def nan_in_empty_tensors(monkeypatch):
    """Unwritten memory reads as NaN, so that a forgotten slice cannot pass by luck."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            # on "meta" nothing is read, and a recording would count the fill
            return tensor.fill_(torch.nan) if tensor.is_floating_point() and not tensor.is_meta else tensor

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
