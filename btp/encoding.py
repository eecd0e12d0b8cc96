"""What is known of encoded pictures beyond their features: the grids their tokens lie on, and the [CLS] attention.

`generate` encodes pictures before it calls any module, and keeps nothing but the result. So for a while the result
carries these notes, as an attribute.

Shapes: N image tokens of a prompt.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from typing import Any, cast

import torch
from torch import Tensor

from btp.anatomy import Anatomy
from btp.ops import Grids

__all__ = ["Notes", "attach_notes", "join_pictures", "notes_of", "noting", "split_pictures"]

_ATTRIBUTE = "_btp_notes"


@dataclass(frozen=True, eq=False)
class Notes:
    """Of the pictures encoded together, in order.

    grids: a picture each; None where all pictures have the model's own. read_cls_attention: None where the encoder has
    no [CLS].
    """

    grids: tuple[Grids, ...] | None
    read_cls_attention: Callable[[], Tensor] | None

    @cached_property
    def cls_attention(self) -> Tensor | None:
        """One value an image token, all pictures in a row; worked out when it is first asked for. (sum of N,)"""
        return None if self.read_cls_attention is None else self.read_cls_attention()


def notes_of(encoded: object) -> Notes | None:
    """The notes that encoded pictures carry; None when they were encoded out of sight."""
    return getattr(encoded, _ATTRIBUTE, None)


def attach_notes(encoded: object, notes: Notes) -> None:
    """Let encoded pictures carry these notes, in place of any they carried."""
    setattr(encoded, _ATTRIBUTE, notes)


@contextmanager
def noting(anatomy: Anatomy, latest: list[Notes]) -> Iterator[None]:
    """Within it, whatever encodes pictures leaves notes on the result, and in `latest`, of which it is the only item.

    `get_image_features` is shadowed on the instance: everything that encodes pictures goes through it, and `generate`
    calls it before any module that could be hooked.
    """
    multimodal = cast(Any, anatomy.multimodal)
    encode, shadowed = multimodal.get_image_features, vars(multimodal).get("get_image_features")

    @wraps(encode)
    def noted(*args: Any, **kwargs: Any) -> Any:
        recorded: dict[str, Tensor] = {}
        with ExitStack() as cleanup:
            for handle in () if anatomy.cls_attention is None else anatomy.cls_attention.record(recorded):
                cleanup.callback(handle.remove)
            encoded = encode(*args, **kwargs)
        latest[:] = [_notes(anatomy, inspect.signature(encode).bind(*args, **kwargs).arguments, recorded)]
        if not isinstance(encoded, tuple):
            attach_notes(encoded, latest[0])
        return encoded

    multimodal.get_image_features = noted
    try:
        yield
    finally:
        del multimodal.get_image_features
        if shadowed is not None:
            multimodal.get_image_features = shadowed


def _notes(anatomy: Anatomy, inputs: Mapping[str, Any], recorded: Mapping[str, Tensor]) -> Notes:
    grids = None if anatomy.picture_grids is None else tuple(anatomy.picture_grids(inputs))
    if anatomy.cls_attention is None:
        return Notes(grids, None)
    read = torch.no_grad()(anatomy.cls_attention.read)
    small = {name: value for name, value in inputs.items() if name != "pixel_values"}  # not to keep them alive
    return Notes(grids, partial(read, recorded["query"].detach(), recorded["key"].detach(), small))


def split_pictures(encoded: Any) -> list[Any] | None:
    """Pictures encoded together, a picture each, for join_pictures; None where there is more to them than features."""
    features, notes = encoded.pooler_output, notes_of(encoded)
    if isinstance(features, Tensor) or notes is None or getattr(encoded, "deepstack_features", None) is not None:
        return None
    grids = [None if notes.grids is None else (own,) for own in notes.grids or features]
    parts: Sequence[Tensor | None] = [None] * len(features)
    if notes.cls_attention is not None:
        parts = notes.cls_attention.split([len(picture) for picture in features])
    return [(picture, _known(own, part)) for picture, own, part in zip(features, grids, parts, strict=True)]


def join_pictures(pictures: Sequence[Any]) -> Any:
    """Encoded pictures out of split_pictures together again, in the given order, as mm_encoder_outputs' "image"."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    features: Any = [picture for picture, _ in pictures]
    notes = [own for _, own in pictures]
    grids = None if notes[0].grids is None else tuple(grids for own in notes for grids in own.grids)
    parts = [own.cls_attention for own in notes]
    encoded = BaseModelOutputWithPooling(pooler_output=features)
    attach_notes(encoded, _known(grids, None if parts[0] is None else torch.cat(parts)))
    return encoded


def _known(grids: tuple[Grids, ...] | None, cls_attention: Tensor | None) -> Notes:
    return Notes(grids, None if cls_attention is None else lambda: cls_attention)
