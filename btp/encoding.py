"""What is known of encoded pictures beyond their features: the grids their tokens lie on, and the [CLS] attention.

`generate` encodes pictures before it calls any module, and keeps nothing but the result. So for a while the result
carries these notes, as an attribute.

Shapes: N image tokens of a prompt.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor

from btp.anatomy import Anatomy
from btp.ops import Grids

__all__ = ["Notes", "join_pictures", "notes_of", "noting", "split_pictures"]

_ATTRIBUTE = "_btp_notes"


@dataclass(frozen=True, eq=False)
class Notes:
    """Of the pictures encoded together, in order. grids: a picture each; None where all pictures have the model's own.

    cls_attention: one value an image token, all pictures in a row, (sum of N,); None where the encoder has no [CLS].
    """

    grids: tuple[Grids, ...] | None
    cls_attention: Tensor | None


def notes_of(encoded: object) -> Notes | None:
    """The notes that encoded pictures carry; None when they were encoded out of sight."""
    return getattr(encoded, _ATTRIBUTE, None)


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
            setattr(encoded, _ATTRIBUTE, latest[0])
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
    cls_attention = None
    if anatomy.cls_attention is not None:
        with torch.no_grad():
            cls_attention = anatomy.cls_attention.read(recorded["query"], recorded["key"], inputs)
    return Notes(grids, cls_attention)


def split_pictures(encoded: Any) -> list[Any] | None:
    """Pictures encoded together, a picture each, for join_pictures; None where there is more to them than features."""
    features, notes = encoded.pooler_output, notes_of(encoded)
    if isinstance(features, Tensor) or notes is None or getattr(encoded, "deepstack_features", None) is not None:
        return None
    grids = [None if notes.grids is None else (own,) for own in notes.grids or features]
    sizes = [len(picture) for picture in features]
    cls_attention = [None] * len(sizes) if notes.cls_attention is None else notes.cls_attention.split(sizes)
    return [(picture, Notes(*own)) for picture, *own in zip(features, grids, cls_attention, strict=True)]


def join_pictures(pictures: Sequence[Any]) -> Any:
    """Encoded pictures out of split_pictures together again, in the given order, as mm_encoder_outputs' "image"."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    features: Any = [picture for picture, _ in pictures]
    all_notes = [notes for _, notes in pictures]
    grids = None if all_notes[0].grids is None else tuple(own for notes in all_notes for own in notes.grids)
    cls_attention = None if all_notes[0].cls_attention is None else torch.cat([n.cls_attention for n in all_notes])
    encoded = BaseModelOutputWithPooling(pooler_output=features)
    setattr(encoded, _ATTRIBUTE, Notes(grids, cls_attention))
    return encoded
