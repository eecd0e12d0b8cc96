"""One prefill under a plan: born when the decoder starts on a prompt, dropped when it is through.

Layer by layer it decides who stays and slices everything the layer is given; this is the only place that does.

Shapes: B batch, S tokens of the whole prompt, L tokens in the sequence as it stands, N image tokens alive, K kept,
D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from btp import masks, ops
from btp.anatomy import Anatomy
from btp.cost import tokens_per_layer
from btp.encoding import Notes
from btp.errors import RealizationError
from btp.plan import Plan, Stage
from btp.positions import Positions
from btp.reading import Reading
from btp.selection import SELECTORS

__all__ = ["CacheLayout", "Prefill", "Promise", "Trace", "check_promises"]


@dataclass(frozen=True, eq=False)
class Promise:
    """Whether a selector's indices are distinct, sorted and in range, as a boolean on the device."""

    selector: str
    kept: Tensor


@dataclass(eq=False)
class Trace:
    """Which image tokens each decoder layer of the latest prefill saw. Empty for a prompt without images.

    alive: one (B, K) tensor a layer, rising indices into 0..num_image_tokens-1. promises: of its selectors, until they
    are looked at, before the next prefill or at the end of the `with`.
    """

    alive: list[Tensor] = field(default_factory=list)
    num_image_tokens: int = 0
    promises: list[Promise] = field(default_factory=list)

    @property
    def counts(self) -> tuple[int, ...]:
        """Surviving image tokens a layer, zeros included."""
        return tuple(alive_BK.shape[1] for alive_BK in self.alive)

    @property
    def dense(self) -> bool:
        """True when the latest prefill dropped nothing: no image in the prompt, or no stage that removes any."""
        return all(count == self.num_image_tokens for count in self.counts)


@dataclass(frozen=True, eq=False)
class CacheLayout:
    """What a pruned prefill left in the key-value cache. It rides on the cache object, so copies keep it.

    columns: by depth, the prompt positions (B, K) whose keys are there; depth 0 is before the first cut, all of them.
    depth_of_layer: which depth each decoder layer is at. shifts: by depth, how much lower the positions of new tokens
    are than in the unpruned sequence, (B, 1); None where positions were kept. next_position: of the first new token in
    the unpruned sequence, (B, 1).
    """

    prompt_length: int
    columns: tuple[Tensor | None, ...]
    depth_of_layer: tuple[int, ...]
    shifts: tuple[Tensor | None, ...]
    next_position: Tensor

    def num_cached(self, layer: int) -> int:
        """Prompt tokens that went through the layer, and into its cache unless a sliding window dropped them."""
        columns_BK = self.columns[self.depth_of_layer[layer]]
        return self.prompt_length if columns_BK is None else columns_BK.shape[1]


def check_promises(promises: list[Promise]) -> None:
    """Raise RealizationError for a selector that broke its contract; forget the others. Reads the device."""
    broken = [promise.selector for promise in promises if not bool(promise.kept)]
    promises.clear()
    if broken:
        raise RealizationError(
            f"a selector must return distinct, sorted indices of tokens that are there, but '{broken[0]}' returned "
            "others; look for NaN in the weights or an overflow in float16, then run btp.testing.SelectorContract on it"
        )


class Prefill:
    """Carries out the plan on one prompt with images.

    prompt: the inputs of the multimodal module. decoder_inputs: those of the language model; the object's own
    `decoder_inputs` is what the language model shall get instead. notes: what is known of the encoded pictures.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        plan: Plan,
        image_mask_BS: Tensor,
        prompt: Mapping[str, Any],
        decoder_inputs: dict[str, Any],
        notes: Notes | None,
        trace: Trace,
    ) -> None:
        self._anatomy, self._plan, self.trace = anatomy, plan, trace
        self._reading = Reading(anatomy, image_mask_BS, prompt, notes)
        num_image_tokens = self._reading.num_image_tokens
        trace.alive, trace.num_image_tokens = [], num_image_tokens
        self._cuts = _cuts(plan, num_image_tokens)
        self._prompt_length = image_mask_BS.shape[1]
        self._image_BN = self._reading.image_BN
        self._origin_BN = torch.arange(num_image_tokens, device=image_mask_BS.device).expand_as(self._image_BN)
        self._columns: list[Tensor | None] = [None]
        self._shifts: list[Tensor | None] = [None]
        self._depth_of_layer: list[int] = []
        self._sliced: dict[str, dict[str, Any]] = {}
        self._skipped: list[Stage] = []
        self._promises: list[Promise] = []
        self._positions = Positions(anatomy, decoder_inputs, self._reading)
        self._deepstack: Sequence[Tensor] = ()
        self.decoder_inputs = decoder_inputs
        if num_image_tokens and decoder_inputs.get("deepstack_visual_embeds") is not None:
            # The decoder would add these at the places of the unpruned sequence, which it looks for on the host.
            self._deepstack = decoder_inputs["deepstack_visual_embeds"]
            self.decoder_inputs = {**decoder_inputs, "deepstack_visual_embeds": None, "visual_pos_masks": None}

    def enter_layer(self, layer: int, hidden_BLD: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What decoder layer `layer` shall get in place of these hidden states and keyword inputs."""
        stage, num_keep = self._cuts.get(layer, (None, 0))
        if stage is not None and num_keep < self._image_BN.shape[1]:  # one that removes nothing changes no bit
            here = self._sliced_inputs(layer, inputs)
            self._reading.enter(layer, hidden_BLD, here, self._image_BN, self._origin_BN)
            if self._is_due(stage):
                kept_BK = self._cut(stage, num_keep)
                hidden_BLD = ops.take_rows(hidden_BLD, kept_BK)
            else:
                self._skipped.append(stage)
        self.trace.alive.append(self._origin_BN)
        self._depth_of_layer.append(len(self._columns) - 1)
        return hidden_BLD, self._sliced_inputs(layer, inputs)

    def leave_layer(self, layer: int, hidden_BLD: Tensor) -> Tensor:
        """The layer's output with the visual features added that the decoder would have added after it (DeepStack)."""
        if layer >= len(self._deepstack):
            return hidden_BLD
        batch, _, size = hidden_BLD.shape
        feature_BND = self._deepstack[layer].to(hidden_BLD.device, hidden_BLD.dtype).view(batch, -1, size)
        index_BND = self._image_BN.unsqueeze(2).expand(-1, -1, size)
        return hidden_BLD.scatter_add(1, index_BND, ops.take_rows(feature_BND, self._origin_BN))

    def layout(self) -> CacheLayout | None:
        """What the prefill leaves in the cache; None when nothing was dropped."""
        if len(self._columns) == 1:
            return None
        return CacheLayout(
            prompt_length=self._prompt_length,
            columns=tuple(self._columns),
            depth_of_layer=tuple(self._depth_of_layer),
            shifts=tuple(self._shifts),
            next_position=self._positions.after_prompt(),
        )

    def verify(self, output_BLD: Tensor) -> None:
        """Raise RealizationError unless every layer ran with the plan's number of image tokens.

        What its selectors promised goes to the trace: it is asked for when that costs no wait.
        """
        total = self.trace.num_image_tokens
        carried_out = replace(self._plan, stages=tuple(s for s in self._plan.stages if s not in self._skipped))
        planned = tokens_per_layer(carried_out, len(self._anatomy.layers), total)
        output_length = self._prompt_length - total + planned[-1]
        if self.trace.counts != planned or output_BLD.shape[1] != output_length:
            raise RealizationError(
                f"the layers must see the plan's image tokens {planned} and end with {output_length} tokens, got "
                f"{self.trace.counts} and {output_BLD.shape[1]}; another hook or a compiled layer bypasses pruning"
            )
        self.trace.promises += self._promises

    def _is_due(self, stage: Stage) -> bool:
        """Whether a conditional stage's condition holds, in every row. Reads the device, as any condition must."""
        if stage.attention_below is None:
            return True
        return bool((self._reading.cross_attention_shares() < stage.attention_below).all())

    def _cut(self, stage: Stage, num_keep: int) -> Tensor:
        """Decide who stays, note it down, and return the surviving places in the sequence as it stands. (B, K)"""
        with torch.no_grad():
            selected_BK = self._select(stage, num_keep)
        batch, length = self._image_BN.shape[0], self._length()
        num_surviving = length - self._image_BN.shape[1] + num_keep
        image_BK = self._image_BN.gather(1, selected_BK)
        survives_BL = torch.ones(batch, length, dtype=torch.bool, device=image_BK.device)
        survives_BL.scatter_(1, self._image_BN, False).scatter_(1, image_BK, True)
        kept_BK = ops.indices_of(survives_BL, num_surviving)
        columns_BL = self._columns[-1]
        self._columns.append(kept_BK if columns_BL is None else columns_BL.gather(1, kept_BK))
        self._shifts.append(self._positions.shift(num_surviving) if self._plan.positions == "reset" else None)
        self._image_BN = (survives_BL.cumsum(dim=1) - 1).gather(1, image_BK)
        self._origin_BN = self._origin_BN.gather(1, selected_BK)
        self._sliced = {}
        return kept_BK

    def _select(self, stage: Stage, num_keep: int) -> Tensor:
        if num_keep == 0:
            return self._image_BN[:, :0]
        selected_BK = SELECTORS[stage.selector](self._reading.image_tokens(), num_keep, stage)
        wanted, came = (self._image_BN.shape[0], num_keep), f"{type(selected_BK).__name__}"
        if isinstance(selected_BK, Tensor):
            came = f"{selected_BK.dtype} {tuple(selected_BK.shape)}"
        if came != f"{torch.int64} {wanted}":
            raise RealizationError(
                f"a selector must return int64 indices of shape {wanted}, got {came} from '{stage.selector}'; run "
                "btp.testing.SelectorContract on it"
            )
        distinct = (selected_BK.diff(dim=1) > 0).all()
        inside = (selected_BK[:, 0] >= 0).all() & (selected_BK[:, -1] < self._image_BN.shape[1]).all()
        self._promises.append(Promise(stage.selector, distinct & inside))
        return selected_BK.clamp(0, self._image_BN.shape[1] - 1)  # an index out of range would end a CUDA context

    def _length(self) -> int:
        columns_BL = self._columns[-1]
        return self._prompt_length if columns_BL is None else columns_BL.shape[1]

    def _sliced_inputs(self, layer: int, inputs: dict[str, Any]) -> dict[str, Any]:
        """The layer's inputs for the survivors, from those for the whole prompt that the decoder hands every layer.

        Layers of one kind (full or sliding) get the same ones, so each kind is sliced once a depth. `position_ids` is
        always their first K: layers use it only to find packed sequences, where a gap would read as a new sequence.
        """
        columns_BK = self._columns[-1]
        if columns_BK is None:
            return inputs
        kind = str(self._anatomy.window(layer))
        if kind not in self._sliced:
            position_ids = inputs.get("position_ids")
            num_surviving = columns_BK.shape[1]
            self._sliced[kind] = {
                "attention_mask": masks.take_square(inputs.get("attention_mask"), columns_BK),
                "position_embeddings": self._positions.embeddings(
                    layer, inputs["position_embeddings"], columns_BK, reset=self._plan.positions == "reset"
                ),
                "position_ids": None if position_ids is None else position_ids[:, :num_surviving],
            }
        return {**inputs, **self._sliced[kind]}


def _cuts(plan: Plan, num_image_tokens: int) -> dict[int, tuple[Stage, int]]:
    """By layer, the stages that would remove some of all the image tokens, and how many they leave."""
    cuts: dict[int, tuple[Stage, int]] = {}
    for stage, num_keep in zip(plan.stages, plan.num_kept(num_image_tokens), strict=True):
        if num_keep == 0 < min(stage.keep, num_image_tokens):
            raise RealizationError(
                f"keep must leave at least one of the prompt's {num_image_tokens} image tokens, or be 0, got "
                f"{stage.keep:g} before layer {stage.layer}, which rounds to none; raise it, or say 0 to drop them all"
            )
        if num_keep < num_image_tokens:
            cuts[stage.layer] = (stage, num_keep)
    return cuts
