"""The projector's start: from ViT features to the decoder's own word embeddings of what lies under each patch.

First in closed form, as in the random-feature regression of Rahimi and Recht (2007), except that the features begin
with the directions of the patch heads, which already tell the words apart: with random ones alone a third fewer kinds
lie nearest to their own word. Then by gradient, on fresh pictures.

Shapes: B pictures, N = 196 image tokens, F width of the vision tower, M = B x N tokens, D width of the decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["agreement", "regression_loss", "solve"]


def solve(projector: Any, heads: nn.ModuleDict, features_BNF: Tensor, ideal_BND: Tensor, kind_BN: Tensor) -> None:
    """Set the projector by ridge regression (ridge 1e-3 of the mean variance) from its hidden layer to `ideal_BND`."""
    features_MF, ideal_MD, kind_M = features_BNF.flatten(0, 1), ideal_BND.flatten(0, 1).double(), kind_BN.flatten()
    _start_hidden(projector.linear_1, heads, features_MF[kind_M > 0])
    hidden_MD = F.gelu(projector.linear_1(features_MF)).double()
    weight_M1 = _weights(kind_M).double()[:, None]
    mean_hidden, mean_ideal = ((weight_M1 * x).sum(0) / weight_M1.sum() for x in (hidden_MD, ideal_MD))
    X, Y = hidden_MD - mean_hidden, ideal_MD - mean_ideal
    gram = X.T @ (weight_M1 * X)
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram, X.T @ (weight_M1 * Y))
    projector.linear_2.weight.copy_(solution.T)
    projector.linear_2.bias.copy_(mean_ideal - mean_hidden @ solution)


def _start_hidden(layer: nn.Linear, heads: nn.ModuleDict, busy_MF: Tensor) -> None:
    """Head directions, then random ones, each at about unit variance over the patches with something on them."""
    nn.init.orthogonal_(layer.weight)
    layer.weight.mul_(1 / busy_MF.std(0))
    directions = torch.cat([head.weight for head in heads.children() if isinstance(head, nn.Linear)])
    num_directions = min(len(directions), len(layer.weight))
    layer.weight[:num_directions] = directions[:num_directions]
    layer.weight.mul_(1.5 / (busy_MF @ layer.weight.T).std(0)[:, None])
    layer.bias.copy_(-(busy_MF @ layer.weight.T).mean(0))
    layer.bias[:num_directions] -= 1.0  # so that the activation lets only the stronger half of a word's scores through


def _weights(kind_M: Tensor) -> Tensor:
    """Patches with something on them weigh as much, together, as the empty ones; grazed ones as the empty."""
    busy = kind_M > 0
    return torch.where(busy, (~busy).sum() / busy.sum(), 1.0)


def regression_loss(tokens_BND: Tensor, ideal_BND: Tensor, kind_BN: Tensor) -> Tensor:
    """Weighted mean squared distance, 0-d, of the projected tokens from the sums of words."""
    weight = _weights(kind_BN.flatten())
    distance = (tokens_BND.float() - ideal_BND).square().sum(-1).flatten()
    return (weight * distance).sum() / weight.sum()


@torch.no_grad()
def agreement(tokens_BND: Tensor, ideal_BND: Tensor, kind_BN: Tensor, kinds: Tensor) -> dict[str, float]:
    """R² over the patches with something on them, and the share of these whose word of kind is the nearest.

    kinds: the embedding (number of kinds, D) of each kind's word; the other words of a patch are taken off first.
    """
    busy = kind_BN > 0
    told, ideal, kind = tokens_BND.float()[busy], ideal_BND[busy], kind_BN[busy]
    left = (told - ideal).square().sum() / (ideal - ideal.mean(0)).square().sum()
    nearest = torch.cdist(told - ideal + kinds[kind], kinds).argmin(1)
    return {"r2": 1 - left.item(), "nearest": (nearest == kind).float().mean().item()}
