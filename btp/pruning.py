"""Apply a plan to a model for as long as a `with` lasts, and leave no trace.

The life cycle of one forward: the multimodal module's hook notes the prompt's input_ids; the language model's hook
tells prefill (empty cache) from decoding and makes the object that knows what each layer gets; each decoder layer's
hook asks it; when the language model is through, what happened is compared with the plan.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from btp.anatomy import Anatomy
from btp.decode import Decode, attach_layout, layout_of
from btp.encoding import Notes, notes_of, noting
from btp.errors import BTPError, PlanError, RealizationError
from btp.families import anatomy_of
from btp.fitting import check_fit
from btp.plan import Plan
from btp.prefill import CacheLayout, Prefill, Trace, check_promises
from btp.profile import Profile
from btp.sealed import read_object
from btp.selection import SELECTORS

__all__ = ["Trace", "is_pruned", "prune"]

RESOLVERS = "btp.resolvers"
"""The group of entry points that turn a reference into a profile, by its scheme."""
_PRUNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models inside a `with prune`


@contextmanager
def prune(model: nn.Module, plan: Plan | Profile | Path | str, *, allow_device: bool = False) -> Iterator[Trace]:
    """Run `model` by `plan` inside the `with`; the trace tells what the latest prefill kept.

    plan: also the path of a file with a plan or a profile, or a reference such as models:/NAME@ALIAS, which is for
    whoever is installed to resolve it. A bare plan is applied to any model. A profile must fit, or ProfileError tells
    every difference: the model's identity, its dtype and attention kernel, and the device with its software, on which
    alone the profile's latency holds. allow_device makes a warning of the last. The rest of the workload, batch and
    prompt, is not known here and not checked.

    The logits of a pruned prefill cover the surviving tokens only, in order; the last one is the last prompt token's,
    so `generate` and `logits_to_keep=1` work as ever. Decode inside the same `with`, on the cache the prefill
    returned, with masks and positions as if nothing had been dropped. Prompts without images pass untouched.
    One thread at a time, and no copies of the model: a copy made inside the `with` keeps its hooks.

    Raises UnsupportedModelError, PlanError when the plan does not fit the model, and RealizationError when a forward
    cannot be pruned (labels, static caches, unequal image counts in a batch) or did not do what the plan says.
    """
    anatomy = anatomy_of(model)
    plan = _loaded(plan)
    if isinstance(plan, Profile):
        check_fit(plan, anatomy, allow_device)
        plan = plan.plan
    _check_plan(plan, anatomy)
    if anatomy.multimodal in _PRUNED:
        raise RealizationError(
            "a model must be under one plan at a time, got a second prune(); leave the first `with`, or remove() what "
            "autotune.apply gave"
        )
    trace = Trace()
    with ExitStack() as cleanup:
        _PRUNED.add(anatomy.multimodal)
        cleanup.callback(_PRUNED.discard, anatomy.multimodal)
        hooks = _Hooks(anatomy, plan, trace)
        cleanup.enter_context(noting(anatomy, hooks.notes))
        for handle in hooks.register():
            cleanup.callback(handle.remove)
        yield trace
        check_promises(trace.promises)


def is_pruned(model: nn.Module) -> bool:
    """Whether the model is inside a `with prune`."""
    return anatomy_of(model).multimodal in _PRUNED


def _loaded(plan: Plan | Profile | Path | str) -> Plan | Profile:
    """What a path or a reference stands for; anything else as it is."""
    if not isinstance(plan, str | Path):
        return plan
    scheme, found, _ = str(plan).partition(":/")
    if found and scheme == "models":
        return _resolved(str(plan), scheme)
    return Profile.load(plan) if "schema_version" in read_object(plan) else Plan.load(plan)


def _resolved(reference: str, scheme: str) -> Plan | Profile:
    try:
        for point in entry_points(group=RESOLVERS, name=scheme):
            found: Plan | Profile = point.load()(reference)
            return found
    except ModuleNotFoundError as error:
        missing: str | None = str(error)
    else:
        missing = None
    raise BTPError(
        f"{reference} takes something to resolve it, but {missing or 'nothing is installed that does'}; "
        "pip install 'btp-autotune[registry]', or pass a profile's path"
    )


def _check_plan(plan: Plan, anatomy: Anatomy) -> None:
    if not isinstance(plan, Plan):
        raise PlanError(f"plan must be a btp.Plan, a btp.Profile, a path or a reference, got {type(plan).__name__}")
    for stage in plan.stages:
        if stage.layer >= len(anatomy.layers):
            raise PlanError(
                f"a stage's layer must be below the model's {len(anatomy.layers)} layers, got {stage.layer}; "
                "scale the plan to this model's depth"
            )
        if stage.selector not in SELECTORS:
            raise PlanError(
                f"selector must be one of {', '.join(sorted(SELECTORS))}, got '{stage.selector}'; "
                "add your own to btp.selection.SELECTORS"
            )


class _Hooks:
    """The hooks of one `with`, and what they tell each other during one forward."""

    def __init__(self, anatomy: Anatomy, plan: Plan, trace: Trace) -> None:
        self._anatomy, self._plan, self._trace = anatomy, plan, trace
        self._prompt: dict[str, Any] | None = None  # inputs of the multimodal module, until the decoder takes them
        self.notes: list[Notes] = []  # of the pictures encoded since the prompt came in
        self._forward: Prefill | Decode | None = None
        self._cache: object | None = None

    def register(self) -> Iterator[Any]:
        """Register every hook, handing out each handle as soon as it exists."""
        anatomy = self._anatomy
        yield anatomy.model.register_forward_pre_hook(self._check_call, with_kwargs=True)
        yield anatomy.multimodal.register_forward_pre_hook(self._note_prompt, with_kwargs=True)
        yield anatomy.multimodal.register_forward_hook(self._after_multimodal)
        yield anatomy.language_model.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        for index, layer in enumerate(anatomy.layers):
            yield layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
            if anatomy.deepstack:
                yield layer.register_forward_hook(partial(self._after_layer, index))
        yield anatomy.language_model.register_forward_hook(self._after_decoder)

    def _check_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None:
            raise RealizationError(
                "labels must not be given under prune(): logits cover the surviving tokens only, so labels would not "
                "line up; take the logits and compute the loss yourself, or leave the `with`"
            )
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise RealizationError(
                "logits_to_keep must be a count under prune(), got positions: they would point past dropped tokens; "
                "pass a count, or pick positions from the surviving logits"
            )

    def _note_prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forward = None
        self.notes.clear()
        self._prompt = {"input_ids": args[0] if args else None, **kwargs}

    def _before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prompt, self._prompt, self._forward, self._cache = self._prompt, None, None, None
        cache = kwargs.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise RealizationError(
                f"the cache must grow by concatenation, got {type(cache).__name__}: its layers cannot differ in length;"
                " leave cache_implementation unset, or pass a DynamicCache"
            )
        if cache is None or cache.get_seq_length() == 0:
            self._forward = self._start_prefill(prompt, kwargs)
        elif (layout := self._continued(prompt, cache, kwargs)) is not None:
            self._forward = Decode(self._anatomy, layout, prompt, kwargs)
        return None if self._forward is None else (args, self._forward.decoder_inputs)

    def _start_prefill(self, prompt: dict[str, Any] | None, kwargs: dict[str, Any]) -> Prefill | None:
        if prompt is None:
            raise RealizationError(
                "a prefill under prune() must come through the whole model, got a call of its language model alone: "
                "the image tokens cannot be told; call model(input_ids=..., pixel_values=...)"
            )
        check_promises(self._trace.promises)
        encoded = prompt.get("mm_encoder_outputs") or {}
        if prompt.get("pixel_values_videos") is not None or encoded.get("video") is not None:
            raise RealizationError(
                "a prompt under prune() must hold pictures only, got a video, whose tokens no plan speaks of; pass the "
                "frames as pictures, or leave the `with`"
            )
        self._trace.alive, self._trace.num_image_tokens = [], 0
        image_mask_BS = self._anatomy.image_mask(prompt)
        notes = self.notes.pop() if self.notes else notes_of(encoded.get("image"))
        prefill = Prefill(self._anatomy, self._plan, image_mask_BS, prompt, kwargs, notes, self._trace)
        return prefill if self._trace.num_image_tokens else None

    def _continued(self, prompt: dict[str, Any] | None, cache: Any, kwargs: dict[str, Any]) -> CacheLayout | None:
        """What a pruned prefill left in the filled cache that new tokens come on top of."""
        if prompt is not None and kwargs["inputs_embeds"].shape[1] > 1 and self._has_images(prompt):
            raise RealizationError(
                "all image tokens must come in one prefill into an empty cache, got some on a filled one; prefill the "
                "whole conversation at once, without prefill_chunk_size; after a stage before layer 0 `generate` "
                "cannot tell how much of a conversation is cached, so hand model(...) the new tokens alone"
            )
        return layout_of(cache, len(self._anatomy.layers))

    def _has_images(self, prompt: dict[str, Any]) -> bool:
        if prompt.get("input_ids") is not None:
            return bool(self._anatomy.image_mask(prompt).any())
        return prompt.get("pixel_values") is not None or bool(prompt.get("mm_encoder_outputs"))

    def _before_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._forward is None:
            return None
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self._cache = kwargs.get("past_key_values")
        hidden, kwargs = self._forward.enter_layer(index, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def _after_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self._forward is None else self._forward.leave_layer(index, output)

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward, cache, self._forward, self._cache = self._forward, self._cache, None, None
        if isinstance(forward, Prefill):
            forward.verify(output[0])
            if cache is not None:
                attach_layout(cache, forward.layout())

    def _after_multimodal(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._prompt is not None:
            self._prompt = None
            raise RealizationError(
                "the language model's hooks must run in every forward under prune(), but did not; "
                "do not replace or compile the model's modules inside the `with`"
            )
