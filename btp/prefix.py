"""Run the vision tower once and reuse its result: what comes before the decoder does not depend on the plan."""

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

__all__ = ["encode_images"]


def encode_images(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with `pixel_values` replaced by the encoded images, for model(...) and model.generate(...).

    Where this version of transformers takes no encoded images in the model's forward (`mm_encoder_outputs`), or there
    are no pixels, the inputs come back unchanged. Works inside and outside `prune`. generate() with beams or several
    return sequences repeats tensors only, so give it pixels instead.
    """
    result = dict(inputs)
    takes_encoded = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    if result.get("pixel_values") is None or not takes_encoded:
        return result
    names = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")
    image_inputs = {name: result.pop(name) for name in names if name in result}
    with torch.no_grad():
        encoded = cast(Any, model).get_image_features(**image_inputs, return_dict=True)
    return {**result, "mm_encoder_outputs": {"image": encoded}}
