"""Run the vision encoder once and reuse its result: what comes before the decoder does not depend on the plan."""

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from btp.encoding import noting
from btp.families import anatomy_of

__all__ = ["encode_images"]


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
