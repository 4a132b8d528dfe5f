"""Exchange of tokens and features between the ranks of an axis: an all-to-all with equal parts."""

from torch import Tensor

from megatron_cp.comm import Fabric


def tokens_to_features(x: Tensor, fabric: Fabric) -> Tensor:
    """Give each of w ranks its share of the features: x [s, w f] -> [w, s, f], part i with the tokens of rank i."""
    # s (w f) -> w s f
    return _swap(x.unflatten(1, (fabric.size, -1)).transpose(0, 1).contiguous(), fabric)


def features_to_tokens(x: Tensor, fabric: Fabric) -> Tensor:
    """Give each of w ranks its share of the tokens: x [w, s, f], part i for rank i -> [s, w f]."""
    # w s f -> s (w f)
    return _swap(x.contiguous(), fabric).transpose(0, 1).flatten(1)


def _swap(parts: Tensor, fabric: Fabric) -> Tensor:
    ones = [1] * fabric.size
    return fabric.all_to_all(parts, ones, ones)
