"""Choices of experts that routers make, counted where they are made: the host waits for no device."""

import torch
from torch import Tensor


class Choices:
    """Counts of the choices that tokens make in each layer, and of those that each expert gets.

    layers:  of the whole model
    experts: of the layer that has most
    """

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self._counts = torch.zeros(layers, 1 + experts, dtype=torch.int64, device=device)

    def add(self, layer: int, made: int, sent: Tensor) -> None:
        """Add those of a microbatch of a layer, by its place in the model.

        made: by all tokens
        sent: [T, E], True where an expert gets a token that has chosen it
        """
        counts = self._counts[layer]
        counts[0] += made
        counts[1 : 1 + sent.shape[1]] += sent.sum(0)

    def take(self) -> Tensor:
        """Return [layers, 1 + experts], choices first and then those of each expert, and begin at zero again."""
        taken = self._counts.clone()
        self._counts.zero_()
        return taken
