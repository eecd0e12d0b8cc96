"""A learnable schedule: a keep ratio and a lambda before every candidate layer, what it costs, and the plan it is.

Shapes: L decoder layers, C candidate layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from btp.cost import DecoderShape, image_token_flops, tokens_per_layer
from btp.plan import Plan, Stage, round_half_up
from btp.relaxed import RelaxedStage

__all__ = ["Cost", "Schedule", "flops_of"]

Cost = Callable[[Sequence[int]], float]  # of the image tokens by layer, as a share of the dense model's

MIN_DROP = 0.05  # of the tokens that enter a stage, for it to be one
FIRST_WEIGHT = 0.1  # diversity first; from a half, a stage of the reference VLM stayed there and was worse for it
LEAST_WEIGHT = 0.01  # of lambda, for attention to be worth reading
_REACH = 1 / 16  # of the image tokens, up and down, over which a cost's slope is taken: it may rise by steps


def flops_of(decoder: DecoderShape, num_image_tokens: int) -> Cost:
    """The image tokens' FLOPs by the BTP paper's formula, as a share of dense."""
    sizes = decoder.hidden_size, decoder.intermediate_size
    dense = image_token_flops((num_image_tokens,) * decoder.num_layers, *sizes)
    return lambda counts: image_token_flops(counts, *sizes) / dense


@dataclass(frozen=True, eq=False)
class Schedule:
    """Before layers[c], pass_C[c] is the logit of the share of what is alive that stays; weight_C[c] that of lambda.

    So keep ratios fall with depth whatever the numbers are. Both are float64 leaves.
    """

    layers: tuple[int, ...]
    num_layers: int
    num_tokens: int
    attention: Literal["softmax", "logits"]
    pass_C: Tensor
    weight_C: Tensor

    @classmethod
    def even(
        cls,
        layers: Sequence[int],
        num_layers: int,
        num_tokens: int,
        attention: Literal["softmax", "logits"],
        cost: Cost,
        budget: float,
    ) -> Schedule:
        """The same share dropped before every candidate, at the budget; lambda FIRST_WEIGHT."""
        zeros_C = torch.zeros(len(layers), dtype=torch.float64)
        weight_C = (zeros_C + FIRST_WEIGHT).logit()
        return cls(tuple(layers), num_layers, num_tokens, attention, zeros_C, weight_C).fitted(cost, budget)

    @classmethod
    def mean(cls, schedules: Sequence[Schedule]) -> Schedule:
        """Of schedules with the same layers."""
        pass_C = torch.stack([schedule.pass_C for schedule in schedules]).mean(dim=0)
        return schedules[0]._with(pass_C, torch.stack([schedule.weight_C for schedule in schedules]).mean(dim=0))

    def fitted(self, cost: Cost, budget: float) -> Schedule:
        """The keep ratios to the power at which they come nearest to the budget, from below."""
        log_C = torch.nn.functional.logsigmoid(self.pass_C.detach()).clamp(max=-1e-6)
        low, high = 1.0, 0.0  # powers within the budget, and over it
        while low < 1e6 and cost(self._to_the(low, log_C).counts()) > budget:
            low *= 2
        for _ in range(50):
            middle = (low + high) / 2
            fits = cost(self._to_the(middle, log_C).counts()) <= budget
            low, high = (middle, high) if fits else (low, middle)
        return self._to_the(low, log_C)

    @torch.no_grad()
    def fit(self, cost: Cost, budget: float) -> None:
        """Take over the keep ratios of `fitted`, in place."""
        self.pass_C.copy_(self.fitted(cost, budget).pass_C)

    def _to_the(self, power: float, log_C: Tensor) -> Schedule:
        return self._with((power * log_C).exp().logit(eps=1e-6), self.weight_C)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.pass_C, self.weight_C]

    def copy(self) -> Schedule:
        return self._with(self.pass_C.clone(), self.weight_C.clone())

    def stages(self) -> list[RelaxedStage]:
        """What the parameters mean, with their gradients."""
        share_C, weight_C = self._shares(), self.weight_C.sigmoid()
        return [RelaxedStage(i, share_C[c], weight_C[c], self.attention) for c, i in enumerate(self.layers)]

    def values(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Keep ratios and lambdas."""
        return tuple(self._shares().tolist()), tuple(self.weight_C.sigmoid().tolist())

    def counts(self) -> tuple[int, ...]:
        """Image tokens that each layer sees. (L,)"""
        return tuple(max(1, round_half_up(count)) for count in self._tokens().tolist())

    def counts_of(self, plan: Plan) -> tuple[int, ...]:
        return tokens_per_layer(plan, self.num_layers, self.num_tokens)

    def relaxed_cost(self, cost: Cost) -> Tensor:
        """The cost of the whole counts, with the slope of differences around them."""
        counts, tokens_L = list(self.counts()), self._tokens()
        reach = max(1, round_half_up(_REACH * self.num_tokens))
        total = torch.tensor(cost(counts), dtype=torch.float64)
        for layer, count in enumerate(counts):
            low, high = max(0, count - reach), min(self.num_tokens, count + reach)
            above, below = (cost([*counts[:layer], n, *counts[layer + 1 :]]) for n in (high, low))
            total = total + (above - below) / (high - low) * (tokens_L[layer] - tokens_L[layer].detach())
        return total

    def thinned(self, max_stages: int, cost: Cost, budget: float) -> Schedule:
        """Only the stages that matter most, each with a drop of MIN_DROP at least; one stage is always left.

        One by one, the drop is moved to the stage before or after it that carries the fewest tokens past the fewest
        layers, so that the layers see as nearly as many tokens as before; never so that the budget is out of reach.
        """
        keep = dict(zip(self.layers, self.values()[0], strict=True))
        while len(keep) > 1 and (len(keep) > max_stages or min(_drops(keep)) < MIN_DROP):
            moves = [move for move in _moves(keep, self.num_layers) if self._leaves(move[1], cost) <= budget]
            if not moves:
                break
            keep = min(moves, key=lambda move: move[0])[1]
        stay_C = (1 - torch.tensor(_drops(keep), dtype=torch.float64)).clamp(max=1 - 1e-6)
        weight_C = self.weight_C.detach()[[self.layers.index(layer) for layer in keep]]
        return replace(self, layers=tuple(keep))._with(stay_C.logit(), weight_C)

    def least_cost(self, cost: Cost) -> float:
        """With one token in every layer that has a stage before it."""
        return self._leaves(self.layers, cost)

    def _leaves(self, layers: Iterable[int], cost: Cost) -> float:
        first = min(layers)
        return cost((self.num_tokens,) * first + (1,) * (self.num_layers - first))

    def plan(self, cost: Cost, budget: float) -> Plan:
        """The stages, their keep ratios times the largest factor that the budget allows, and what single tokens it
        then still pays for, deepest stage first."""
        low, high = 0.0, 1 / self.values()[0][-1]  # there everything is kept
        while low < (middle := (low + high) / 2) < high:
            fits = cost(self.counts_of(self._plan(self._kept(middle)))) <= budget
            low, high = (middle, high) if fits else (low, middle)
        kept = self._kept(low)
        for place in reversed(range(len(kept))):
            more = [*kept[:place], kept[place] + 1, *kept[place + 1 :]]
            if more == sorted(more, reverse=True) and cost(self.counts_of(self._plan(more))) <= budget:
                kept = more
        return self._plan(kept)

    def _kept(self, factor: float) -> list[int]:
        """Tokens that each stage leaves, its keep ratio times the factor."""
        keep, _ = self.values()
        return [max(1, round_half_up(min(1.0, share * factor) * self.num_tokens)) for share in keep]

    def _plan(self, kept: Sequence[int]) -> Plan:
        """Stages that remove nothing are left out; where lambda is next to nothing, `diversity` does, for less."""
        _, weights = self.values()
        entering = [self.num_tokens, *kept]
        return Plan(
            stages=tuple(
                Stage(
                    layer=layer,
                    keep=count / self.num_tokens,
                    **self._rule(weight),
                )
                for layer, count, before, weight in zip(self.layers, kept, entering[:-1], weights, strict=True)
                if count < before
            )
        )

    def _rule(self, weight: float) -> dict[str, Any]:
        if weight < LEAST_WEIGHT:
            return {"selector": "diversity"}
        return {"selector": "joint", "attention_weight": round(weight, 4), "attention": self.attention}

    def _shares(self) -> Tensor:
        return self.pass_C.sigmoid().cumprod(dim=0)

    def _tokens(self) -> Tensor:
        """Image tokens that each layer sees, not rounded. (L,)"""
        share_C = torch.cat((torch.ones(1, dtype=torch.float64), self._shares()))
        past = [sum(candidate <= layer for candidate in self.layers) for layer in range(self.num_layers)]
        return share_C[past] * self.num_tokens

    def _with(self, pass_C: Tensor, weight_C: Tensor) -> Schedule:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (pass_C, weight_C)]
        return replace(self, pass_C=leaves[0], weight_C=leaves[1])


def _drops(keep: Mapping[int, float]) -> list[float]:
    """Of the tokens that enter each stage, the share that it drops."""
    shares = [1.0, *keep.values()]
    return [1 - after / before for before, after in pairwise(shares)]


def _moves(keep: Mapping[int, float], num_layers: int) -> Iterator[tuple[float, dict[int, float]]]:
    """Every way to be rid of one stage: the share of tokens it moves, times layers, and the keep ratios then."""
    layers = [*keep, num_layers]
    for place, layer in enumerate(keep):
        without = {other: share for other, share in keep.items() if other != layer}
        moved = (keep[layers[place - 1]] if place else 1.0) - keep[layer]
        yield moved * (layers[place + 1] - layer), without
        if place:
            before = layers[place - 1]
            yield moved * (layer - before), {**without, before: keep[layer]}
