"""What does not depend on the plan, once: the encoded pictures, and the dense layers before a plan's first stage.

Shapes: B batch, S tokens of the prompt, D hidden size.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from btp.decode import attach_layout, layout_of
from btp.encoding import noting
from btp.errors import RealizationError
from btp.families import anatomy_of
from btp.plan import Plan
from btp.prefill import CacheLayout

__all__ = ["DensePrefix", "cache_of_rows", "discount_masked", "encode_images", "resume"]


def encode_images(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with `pixel_values` replaced by the encoded images, for model(...) and model.generate(...).

    Where this version of transformers takes no encoded images in the model's forward (`mm_encoder_outputs`), or there
    are no pixels, the inputs come back unchanged. Works inside and outside `prune`. `generate` repeats the features in
    place for several beams or sequences, so encode anew for each such call.
    """
    result = dict(inputs)
    takes_encoded = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    if result.get("pixel_values") is None or not takes_encoded:
        return result
    encode = cast(Any, model).model.get_image_features
    names = [name for name in inspect.signature(encode).parameters if name in result]
    with torch.no_grad(), noting(anatomy_of(model), []):
        encoded = cast(Any, model).model.get_image_features(**{n: result[n] for n in names}, return_dict=True)
    for name in ("pixel_values", "pixel_attention_mask"):
        result.pop(name, None)
    return {**result, "mm_encoder_outputs": {"image": encoded}}


class DensePrefix:
    """What the first decoder layers make of one prompt (or batch): the same under every plan that prunes later.

    Born empty; `resume` fills it as deep as the plans that use it go, and reads what is there. It holds, a layer each,
    the keys and values, and, at the depths where a plan's first stage was, the hidden states. A prefix belongs to the
    inputs it was filled with, and to the weights.
    """

    def __init__(self) -> None:
        self._output_BSD: dict[int, Tensor] = {}  # by depth d: what layer d - 1 returned
        self._caches: list[Any] = []  # by layer: its part of the key-value cache

    @property
    def depths(self) -> tuple[int, ...]:
        """The layers that a prefill can be resumed before, rising."""
        return tuple(sorted(self._output_BSD))

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors held."""
        held = [*self._output_BSD.values(), *(part for layer in self._caches for part in (layer.keys, layer.values))]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    def save(self, path: Path) -> None:
        """Write everything to a file, for `load` by this version of transformers alone."""
        torch.save((self._output_BSD, self._caches), path)

    @classmethod
    def load(cls, path: Path, device: torch.device | str) -> Self:
        """What `save` wrote. The file is unpickled, so load only what this program has saved itself."""
        prefix = cls()
        prefix._output_BSD, prefix._caches = torch.load(path, map_location=device, weights_only=False)
        return prefix

    def _run_layer(
        self,
        forward: Callable[..., Tensor],
        layer: int,
        start: int,
        end: int,
        hidden_BSD: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Stand in for layer `layer` of a prefill that is resumed before `start` and pruned not before `end`."""
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length(layer):  # nothing to resume with, or new tokens on a filled cache
            return forward(hidden_BSD, *args, **kwargs)
        if layer >= start:
            output_BSD = forward(hidden_BSD, *args, **kwargs)
            if layer == len(self._caches):
                self._caches.append(copy.copy(cache.layers[layer]))
            if layer == end - 1:
                self._output_BSD[end] = output_BSD
            return output_BSD
        kept_BSD = self._output_BSD[start]
        if kept_BSD.shape != hidden_BSD.shape:
            raise RealizationError(
                f"a dense prefix must be resumed with the inputs it was filled with, of shape {tuple(kept_BSD.shape)}, "
                f"got {tuple(hidden_BSD.shape)}; give every batch a DensePrefix of its own, and prune by the same plan"
            )
        cache.layers[layer] = copy.copy(self._caches[layer])
        return kept_BSD if layer == start - 1 else hidden_BSD


@contextmanager
def resume(model: nn.Module, plan: Plan, prefix: DensePrefix) -> Iterator[None]:
    """Inside `prune(model, plan)`: let a prefill start where the prefix ends instead of at the first layer.

    The layers before the plan's first stage run at most once for a prefix; what they gave is handed out again, bit by
    bit. A plan without stages uses what is there and adds nothing. Everything around these layers (embedding, masks,
    positions, DeepStack's additions, the stages themselves) happens as ever, since it is the layers' own `forward` that
    is shadowed. A forward without a cache runs as if there were no prefix, and so do new tokens on a filled one.

    Raises RealizationError, out of the prefill, for inputs of another shape than the prefix was filled with.
    """
    anatomy = anatomy_of(model)
    end = plan.stages[0].layer if plan.stages else max(prefix.depths, default=0)
    start = max((depth for depth in prefix.depths if depth <= end), default=0)
    with ExitStack() as cleanup:
        for index, layer in enumerate(anatomy.layers[:end]):
            shadowed = vars(layer).get("forward")
            layer.forward = partial(prefix._run_layer, layer.forward, index, start, end)
            cleanup.callback(_restore_forward, layer, shadowed)
        yield


def _restore_forward(layer: nn.Module, shadowed: Callable[..., Any] | None) -> None:
    del layer.forward
    if shadowed is not None:
        layer.forward = shadowed


def cache_of_rows(cache: Any, rows: Sequence[int], num_layers: int) -> Any:
    """A cache of these rows of the batch, pruned or dense, in the given order and as often as given.

    The cache it is taken from stays as it is, and new tokens go into one of the two alone.
    """
    layout = layout_of(cache, num_layers)
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    index_K = torch.tensor(rows, device=cache.layers[0].keys.device)
    if rows != list(range(len(cache.layers[0].keys))):
        taken.batch_select_indices(index_K)
        if layout is not None:
            attach_layout(taken, _layout_of_rows(layout, index_K))
    return taken


def _layout_of_rows(layout: CacheLayout, index_K: Tensor) -> CacheLayout:
    return replace(
        layout,
        columns=tuple(_rows(columns_BK, index_K) for columns_BK in layout.columns),
        shifts=tuple(_rows(shift_B1, index_K) for shift_B1 in layout.shifts),
        next_position=_rows(layout.next_position, index_K),
    )


def discount_masked(cache: Any, num_masked_B1: Tensor, num_layers: int) -> None:
    """Say that this many of each row's new tokens in a cache are masked for good: positions go on without them."""
    layout = layout_of(cache, num_layers)
    if layout is not None:
        attach_layout(cache, replace(layout, next_position=layout.next_position - num_masked_B1))


def _rows(tensor: Tensor | None, index_K: Tensor) -> Any:
    return tensor if tensor is None or len(tensor) == 1 else tensor[index_K.to(tensor.device)]
