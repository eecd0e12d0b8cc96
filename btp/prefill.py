"""One prefill under a plan: born when the decoder starts on a prompt, dropped when it is through.

Layer by layer it decides who stays and slices everything the layer is given; this is the only place that does.

Shapes: B batch, S tokens in the sequence as it stands, N image tokens alive, K kept, D hidden size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from btp import masks, ops
from btp.anatomy import Anatomy
from btp.cost import tokens_per_layer
from btp.errors import RealizationError
from btp.plan import Plan, Stage
from btp.selection import SELECTORS, ImageTokens

__all__ = ["CacheLayout", "Prefill", "Trace"]


@dataclass(eq=False)
class Trace:
    """Which image tokens each decoder layer of the latest prefill saw. Empty for a prompt without images.

    alive: one (B, K) tensor a layer, rising indices into 0..num_image_tokens-1.
    """

    alive: list[Tensor] = field(default_factory=list)
    num_image_tokens: int = 0

    @property
    def counts(self) -> tuple[int, ...]:
        """Surviving image tokens a layer, zeros included."""
        return tuple(alive_BK.shape[1] for alive_BK in self.alive)


@dataclass(frozen=True, eq=False)
class CacheLayout:
    """What a pruned prefill left in the key-value cache. It rides on the cache object, so copies keep it.

    columns: by depth, the prompt positions (B, K) whose keys are there; depth 0 is before the first cut, all of them.
    depth_of_layer: which depth each decoder layer is at. reset: positions were renumbered at each depth.
    """

    prompt_length: int
    columns: tuple[Tensor | None, ...]
    depth_of_layer: tuple[int, ...]
    reset: bool

    def num_cached(self, layer: int) -> int:
        """Prompt tokens in the layer's cache."""
        columns_BK = self.columns[self.depth_of_layer[layer]]
        return self.prompt_length if columns_BK is None else columns_BK.shape[1]


class Prefill:
    """Carries out the plan on one prompt with images."""

    def __init__(
        self, anatomy: Anatomy, plan: Plan, image_mask_BS: Tensor, padding_mask: Tensor | None, trace: Trace
    ) -> None:
        num_image_tokens = _equal_count(image_mask_BS)
        tokens_per_row = anatomy.grid[1]
        if num_image_tokens % (anatomy.grid[0] * tokens_per_row):
            raise RealizationError(
                f"image tokens must come in whole images of {anatomy.grid[0]} x {tokens_per_row}, got "
                f"{num_image_tokens} a prompt; prepare the prompt with the model's own processor"
            )
        trace.alive, trace.num_image_tokens = [], num_image_tokens
        self.trace = trace
        self._anatomy, self._plan = anatomy, plan
        self._grid = (num_image_tokens // tokens_per_row, tokens_per_row)
        self._cuts = _effective_cuts(plan, num_image_tokens)
        self._prompt_length = image_mask_BS.shape[1]
        self._from_end = _last_token_from_end(padding_mask)
        self._image_BN = ops.indices_of(image_mask_BS, num_image_tokens)
        self._origin_BN = torch.arange(num_image_tokens, device=image_mask_BS.device).expand_as(self._image_BN)
        self._columns: list[Tensor | None] = [None]
        self._depth_of_layer: list[int] = []
        self._layer_inputs: dict[str, Any] = {}

    def enter_layer(self, layer: int, hidden_BSD: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What decoder layer `layer` shall get in place of these hidden states and keyword inputs."""
        inputs = {**inputs, **self._layer_inputs}
        if layer in self._cuts:
            stage, num_keep = self._cuts[layer]
            kept_BK = self._cut(stage, num_keep, hidden_BSD, inputs)
            self._layer_inputs = self._slice_inputs(inputs, kept_BK)
            inputs = {**inputs, **self._layer_inputs}
            hidden_BSD = ops.take_rows(hidden_BSD, kept_BK)
        self.trace.alive.append(self._origin_BN)
        self._depth_of_layer.append(len(self._columns) - 1)
        return hidden_BSD, inputs

    def layout(self) -> CacheLayout | None:
        """What the prefill leaves in the cache; None when nothing was dropped."""
        if not self._cuts:
            return None
        return CacheLayout(
            self._prompt_length, tuple(self._columns), tuple(self._depth_of_layer), self._plan.positions == "reset"
        )

    def verify(self, output_BSD: Tensor) -> None:
        """Raise RealizationError unless every layer ran with the plan's number of image tokens."""
        total = self.trace.num_image_tokens
        planned = tokens_per_layer(self._plan, len(self._anatomy.layers), total)
        output_length = self._prompt_length - total + planned[-1]
        if self.trace.counts != planned or output_BSD.shape[1] != output_length:
            raise RealizationError(
                f"the layers must see the plan's image tokens {planned} and end with {output_length} tokens, got "
                f"{self.trace.counts} and {output_BSD.shape[1]}; another hook or a compiled layer bypasses pruning"
            )

    def _cut(self, stage: Stage, num_keep: int, hidden_BSD: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Decide who stays, note it down, and return the surviving places in the sequence as it stands. (B, K)"""
        with torch.no_grad():
            selected_BK = self._select(stage, num_keep, hidden_BSD, inputs)
        batch, length = hidden_BSD.shape[:2]
        num_surviving = length - self._image_BN.shape[1] + num_keep
        image_BK = self._image_BN.gather(1, selected_BK)
        survives_BS = torch.ones(batch, length, dtype=torch.bool, device=image_BK.device)
        survives_BS.scatter_(1, self._image_BN, False).scatter_(1, image_BK, True)
        kept_BK = ops.indices_of(survives_BS, num_surviving)
        columns_BS = self._columns[-1]
        self._columns.append(kept_BK if columns_BS is None else columns_BS.gather(1, kept_BK))
        self._image_BN = (survives_BS.cumsum(dim=1) - 1).gather(1, image_BK)
        self._origin_BN = self._origin_BN.gather(1, selected_BK)
        return kept_BK

    def _select(self, stage: Stage, num_keep: int, hidden_BSD: Tensor, inputs: dict[str, Any]) -> Tensor:
        image_BN = self._image_BN
        if num_keep == 0:
            return image_BN[:, :0]
        tokens = ImageTokens(
            origin_BN=self._origin_BN,
            grid=self._grid,
            read_hidden=lambda: ops.take_rows(hidden_BSD, image_BN),
            read_attention=lambda: self._attention_row(stage.layer, hidden_BSD, inputs),
        )
        selected_BK = SELECTORS[stage.selector](tokens, num_keep, stage)
        wanted = (image_BN.shape[0], num_keep)
        if selected_BK.shape != wanted or selected_BK.dtype != torch.int64:
            raise RealizationError(
                f"a selector must return int64 indices of shape {wanted}, got {selected_BK.dtype} "
                f"{tuple(selected_BK.shape)} from '{stage.selector}'; run btp.testing.SelectorContract on it"
            )
        return selected_BK

    def _attention_row(self, layer: int, hidden_BSD: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Head means of the last prompt token's attention to the image tokens: softmax and raw logits. 2 x (B, N)"""
        batch, length = hidden_BSD.shape[:2]
        last_B1 = torch.full((batch, 1), length - 1, device=hidden_BSD.device) - self._from_end
        logits_BHS = self._anatomy.attention_logits(layer, hidden_BSD, inputs["position_embeddings"], last_B1)
        bias_B1S = masks.key_bias(inputs.get("attention_mask"), last_B1)
        seen_BHS = logits_BHS if bias_B1S is None else logits_BHS + bias_B1S
        means_BS = seen_BHS.softmax(dim=-1).mean(dim=1), logits_BHS.mean(dim=1)
        return means_BS[0].gather(1, self._image_BN), means_BS[1].gather(1, self._image_BN)

    def _slice_inputs(self, inputs: dict[str, Any], kept_BK: Tensor) -> dict[str, Any]:
        """The layer inputs that run along the sequence, for the survivors.

        Renumbered positions are the first K of the old ones, since pads come first. `position_ids` is always those:
        layers use it only to find packed sequences, where a gap would read as a new sequence.
        """
        cosines, sines = inputs["position_embeddings"]
        num_surviving = kept_BK.shape[1]
        if self._plan.positions == "reset":
            embeddings = cosines[:, :num_surviving], sines[:, :num_surviving]
        else:
            embeddings = ops.take_rows(cosines, kept_BK), ops.take_rows(sines, kept_BK)
        position_ids = inputs.get("position_ids")
        return {
            "attention_mask": masks.take_square(inputs.get("attention_mask"), kept_BK),
            "position_embeddings": embeddings,
            "position_ids": None if position_ids is None else position_ids[:, :num_surviving],
        }


def _equal_count(image_mask_BS: Tensor) -> int:
    """Image tokens a row. Reads the device once a prefill; nothing after it does."""
    counts: list[int] = image_mask_BS.sum(dim=1).tolist()
    if len(set(counts)) > 1:
        raise RealizationError(
            f"the rows of a batch must hold equally many image tokens, got {counts}; batch prompts with the same "
            "number of images, or run them one by one"
        )
    return counts[0]


def _effective_cuts(plan: Plan, num_image_tokens: int) -> dict[int, tuple[Stage, int]]:
    """By layer, the stages that remove at least one token. The others are skipped, so they change no bit."""
    cuts: dict[int, tuple[Stage, int]] = {}
    alive = num_image_tokens
    for stage, num_keep in zip(plan.stages, plan.num_kept(num_image_tokens), strict=True):
        if num_keep < alive:
            cuts[stage.layer] = (stage, num_keep)
            alive = num_keep
    return cuts


def _last_token_from_end(padding_mask: Tensor | None) -> Tensor | int:
    """How many pads follow the last prompt token, (B, 1); 0 unless a row is padded on the right."""
    if padding_mask is None or padding_mask.dim() != 2:
        return 0
    return padding_mask.flip(1).to(torch.uint8).argmax(dim=1, keepdim=True)
