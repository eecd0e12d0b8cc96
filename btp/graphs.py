"""A prefill launched as one CUDA graph: the decoder's thousands of kernels replayed by one call of the driver.

At batch 1 a prefill waits for its launches, so that fewer tokens save nothing until the launches go. A plan has static
shapes by construction, and so its prefill can be recorded once and replayed.

What is recorded is the language model's forward under `prune`: every layer with its selectors and slices. Around it
everything runs as ever: the embedding, the vision encoder and the merging before it, whose shapes depend on the
pictures and which wait for the device, and after it the head of the one last token. What needs a value on the host (the
places of image tokens and pads, the masks, tables by grid) is found out in a pass before the recording.

Shapes: B batch, S tokens of the prompt.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from btp.anatomy import Anatomy
from btp.capture import (
    Bucket,
    Buffers,
    Capture,
    CaptureError,
    CudaCapture,
    Loans,
    Watch,
    same_masks,
    standing_in,
)
from btp.decode import attach_layout, layout_of
from btp.encoding import Notes, attach_notes, notes_of
from btp.errors import RealizationError
from btp.families import anatomy_of
from btp.plan import Plan
from btp.prefill import Promise, Trace, check_promises
from btp.prefix import encode_images
from btp.pruning import is_pruned, prune

__all__ = ["GraphedPrefill"]


class GraphedPrefill:
    """`graphed(**inputs)` is the prefill `model(**inputs, use_cache=True, logits_to_keep=1)` under the plan, replayed.

    plan: None for the dense model, which gets the same treatment. Logits, cache and trace are bit for bit those of an
    eager launch. The first call of a bucket records (about four prefills); later ones copy their inputs into the
    graph's memory and replay. A bucket is: names, shapes and dtypes of all inputs; where the image tokens are among the
    ids; every other integer or boolean input, value by value (pads, grids, positions); the attention kernel. The
    `max_graphs` latest buckets are kept, each with its own memory. The inputs may be on the CPU, where telling the
    bucket costs no wait; on the device it costs one transfer an integer input, before the vision encoder.

    Life cycle: the logits are yours. The tensors of cache and trace lie in the graph's memory until the bucket's next
    replay, before which every one that is still held gets a copy of its own: drop the cache, or decode on it, and
    nothing is copied. Views of these tensors, slices of a cropped cache too, are overwritten: clone them. Decode inside
    `prune(model, plan)`. A selector that broke its promise is told by the next call, or by `check`. Weights may change
    in place; moved ones are recorded anew, replaced ones are not seen. One thread and one stream at a time.

    Where recording is impossible the prefill is launched eagerly, and `fallback_because` says why; it is None after a
    replay. Reasons: no CUDA device, a model on several devices, a conditional stage, inputs without ids or with a mask
    of its own making, or a model or selector that reads a value on the host or takes a shape from one.

    Raises RealizationError inside `prune`, for inputs that are no processor's, and as `prune` does.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan | None = None,
        *,
        max_graphs: int = 8,
        capture: Callable[[torch.device], Capture] | None = None,
    ) -> None:
        self._model, self._anatomy = cast(Any, model), anatomy_of(model)
        self._plan = Plan(stages=()) if plan is None else plan
        self._max_graphs, self._capture = max_graphs, capture
        self._graphs: list[tuple[Bucket, _Graph | str]] = []  # or why there is none; the latest last
        self._promises: list[Promise] = []
        self.trace = Trace()
        self.fallback_because: str | None = None

    @property
    def num_graphs(self) -> int:
        """Recorded buckets that are kept."""
        return sum(isinstance(graph, _Graph) for _, graph in self._graphs)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        self._check_call(inputs)
        self.check()
        self.trace = Trace()
        device = self._model.device
        given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        try:
            _check_inputs(inputs)
            given = encode_images(self._model, given)
            graph = self._graph_for(Bucket(self._anatomy, device, inputs), given)
        except CaptureError as error:
            self.fallback_because = str(error)
            return self._launch_eagerly(given)
        output = graph.run(given)
        self.fallback_because, self.trace, self._promises = None, graph.lent_trace(), list(graph.promises)
        return output

    def _launch_eagerly(self, inputs: dict[str, Any]) -> Any:
        with prune(self._model, self._plan) as self.trace:
            return self._model(**inputs, use_cache=True, logits_to_keep=1)

    def check(self) -> None:
        """Raise RealizationError if a selector broke its promise in the latest replay. Waits for the device."""
        check_promises(self._promises)

    def _check_call(self, inputs: Mapping[str, Any]) -> None:
        if is_pruned(self._model):
            raise RealizationError(
                "a graphed prefill must be called outside of prune(), got a model that is inside one; it applies its "
                "own plan: leave the `with`, or call the model"
            )
        ours = {"past_key_values", "use_cache", "logits_to_keep", "labels"} & inputs.keys()
        if ours:
            raise RealizationError(
                f"a graphed prefill must get what the processor returns, got {', '.join(sorted(ours))} with it; it "
                "starts on an empty cache and gives the last token's logits: call the model for anything else"
            )

    def _graph_for(self, bucket: Bucket, given: dict[str, Any]) -> "_Graph":
        place = next((place for place, (known, _) in enumerate(self._graphs) if known == bucket), None)
        graph = None if place is None else self._graphs.pop(place)[1]
        if graph is None or (isinstance(graph, _Graph) and not graph.is_current()):
            try:
                graph = self._recorded(given)
            except CaptureError as error:
                graph = str(error)
        self._graphs = [*self._graphs, (bucket, graph)][-self._max_graphs :]
        if isinstance(graph, str):
            raise CaptureError(graph)
        return graph

    def _recorded(self, given: dict[str, Any]) -> "_Graph":
        devices = sorted({str(parameter.device) for parameter in self._model.parameters()})
        conditional = [stage.layer for stage in self._plan.stages if stage.attention_below is not None]
        if conditional:
            raise CaptureError(f"the stage before layer {conditional[0]} is conditional: the host has to ask each time")
        if len(devices) > 1:
            raise CaptureError(f"a graph is of one device, and the model is on {', '.join(devices)}")
        if self._capture is None and not devices[0].startswith("cuda"):
            raise CaptureError(f"only a CUDA device has graphs, and the model is on {devices[0]}")
        return _Graph(self._anatomy, self._plan, (self._capture or CudaCapture)(self._model.device), given)


def _check_inputs(inputs: Mapping[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    if not isinstance(inputs.get("input_ids"), Tensor):
        raise CaptureError("the places of image tokens are told by input_ids, and there are none")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise CaptureError("only a mask of pads, of shape (batch, tokens), belongs to a bucket")


class _Graph:
    """One recording of the language model's forward, and the memory it reads and writes."""

    def __init__(self, anatomy: Anatomy, plan: Plan, capture: Capture, given: dict[str, Any]) -> None:
        self._anatomy, self._capture = anatomy, capture
        self._inputs, self._cls_attention = Buffers(), Buffers()
        self._loans = Loans()
        if "pixel_values" in given:
            raise CaptureError("pictures have to be encoded before the recording, and this transformers takes none")
        notes = _notes(given)
        forward = cast(Any, anatomy.language_model).forward
        with prune(anatomy.model, plan) as self._trace, same_masks(anatomy):
            self._prefill(given)
            self._reads_cls = notes is not None and "cls_attention" in vars(notes)
            with self._static_notes(given), self._static_inputs():
                for run in (capture.warm_up, self._record):
                    with standing_in(anatomy.language_model, partial(self._watched, run, forward)):
                        self._prefill(given)
            self.promises = tuple(self._trace.promises)
        self._weights = [(tensor, tensor.data_ptr()) for tensor in self._watch.outside]

    def run(self, given: dict[str, Any]) -> Any:
        """Logits (B, 1, vocabulary) and cache of another prompt of this bucket, with encoded pictures."""
        self._loans.settle()
        if self._reads_cls:
            self._cls_attention.fill(cast(Notes, _notes(given)).cls_attention)
        with standing_in(self._anatomy.language_model, self._replay):
            return self._prefill(given)

    def is_current(self) -> bool:
        """Whether the weights are where they were when the graph was recorded."""
        return all(tensor.data_ptr() == place for tensor, place in self._weights)

    def _prefill(self, given: dict[str, Any]) -> Any:
        return cast(Any, self._anatomy.model)(**given, use_cache=True, logits_to_keep=1)

    def _record(self, function: Callable[[], Any]) -> Any:
        self._output = self._capture.record(function)
        self._capture.replay()  # recording computes nothing
        return self._output

    def _watched(self, run: Callable[[Callable[[], Any]], Any], forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the language model's forward while its graph is made."""
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:  # to make one of it asks the device; the layers have theirs
            kwargs["attention_mask"] = None

        def watched_forward() -> Any:
            with Watch() as self._watch:
                return forward(*args, **kwargs)

        return run(watched_forward)

    def _replay(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the language model's forward from then on."""
        self._inputs.fill((args, {**kwargs, "attention_mask": None}))
        self._capture.replay()
        return type(self._output)(**{**self._output, "past_key_values": self._lent_cache()})

    def _lent_cache(self) -> Any:
        cache, lend = copy.copy(self._output.past_key_values), self._loans.lend
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in cache.layers:
            layer.keys, layer.values = lend(layer.keys), lend(layer.values)
        layout = layout_of(cache, len(self._anatomy.layers))
        if layout is not None:
            own = {name: tree_map_only(Tensor, lend, getattr(layout, name)) for name in ("columns", "shifts")}
            attach_layout(cache, replace(layout, **own))
        return cache

    def lent_trace(self) -> Trace:
        """Of the latest run."""
        return Trace([self._loans.lend(alive_BK) for alive_BK in self._trace.alive], self._trace.num_image_tokens)

    @contextmanager
    def _static_inputs(self) -> Iterator[None]:
        """Within it the language model gets the graph's memory, before `prune` sees what it gets."""

        def fill(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            mask = kwargs.get("attention_mask")
            args, kwargs = self._inputs.fill((args, {**kwargs, "attention_mask": None}))
            return args, {**kwargs, "attention_mask": mask}

        handle = self._anatomy.language_model.register_forward_pre_hook(fill, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _static_notes(self, given: dict[str, Any]) -> Iterator[None]:
        """Within it the encoded pictures' notes tell their [CLS] attention out of the graph's memory."""
        notes = _notes(given)
        if notes is None or not self._reads_cls:
            yield
            return
        encoded, value = given["mm_encoder_outputs"]["image"], self._cls_attention.fill(notes.cls_attention)
        attach_notes(encoded, Notes(notes.grids, lambda: value))
        try:
            yield
        finally:
            attach_notes(encoded, notes)


def _notes(given: Mapping[str, Any]) -> Notes | None:
    return notes_of((given.get("mm_encoder_outputs") or {}).get("image"))
