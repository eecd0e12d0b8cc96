"""Tiny random LLaVA models and the naive reference: a dense run in which dropped tokens are masked, layer by layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_TOKEN = 63
NUM_LAYERS = 4


def build_llava(kernel: str = "sdpa", side: int = 5, seed: int = 0) -> LlavaForConditionalGeneration:
    """Four decoder layers, 2 key heads for 4 query heads, side x side image tokens."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=4 * side,
            patch_size=4,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            initializer_range=0.3,  # far from zero, so that attention and logits really differ between tokens
        ),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=side * side,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = kernel
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def build_inputs(
    batch: int = 1, side: int = 5, padding: str = "none", seed: int = 0, device: str = "cpu"
) -> dict[str, Tensor]:
    """Prompts with text before and after one image; with padding, every row has another length."""
    generator = torch.Generator().manual_seed(seed)
    num_text_after = 6
    rows, masks = [], []
    for row in range(batch):
        num_pads = 2 * row + 1 if padding != "none" else 0
        text = torch.randint(2, 60, (4 + num_text_after + 2 * batch - num_pads,), generator=generator)
        image = torch.full((side * side,), IMAGE_TOKEN)
        prompt = torch.cat((torch.tensor([1]), text[:-num_text_after], image, text[-num_text_after:]))
        pads = torch.zeros(num_pads, dtype=torch.long)
        ones = torch.ones_like(prompt)
        left = padding != "right"
        rows.append(torch.cat((pads, prompt) if left else (prompt, pads)))
        masks.append(torch.cat((pads, ones) if left else (ones, pads)))
    inputs = {
        "input_ids": torch.stack(rows),
        "attention_mask": torch.stack(masks),
        "pixel_values": torch.randn(batch, 3, 4 * side, 4 * side, generator=generator),
    }
    if padding == "none":
        del inputs["attention_mask"]
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@dataclass
class MaskedDense:
    """Hides columns of the dense model from each layer on; hidden_by_layer[i] is (B, S) bool over the prompt."""

    model: LlavaForConditionalGeneration
    hidden_by_layer: Sequence[Tensor]
    handles: list[Any] = field(default_factory=list)

    def hide(self, index: int, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask, hidden_states = kwargs["attention_mask"], args[0]
        batch, num_queries = hidden_states.shape[:2]
        cache = kwargs.get("past_key_values")
        num_cached = cache.get_seq_length(index) if cache is not None else 0
        num_keys = num_cached + num_queries
        if mask is None:
            keys = torch.arange(num_keys, device=hidden_states.device)
            visible = (keys <= keys[num_cached:, None])[None, None].expand(batch, 1, -1, -1)
        else:
            visible = mask if mask.dtype == torch.bool else mask > -1
        hidden = torch.zeros(batch, num_keys, dtype=torch.bool, device=hidden_states.device)
        prompt = self.hidden_by_layer[index]
        hidden[:, : prompt.shape[1]] = prompt
        visible = visible & ~hidden[:, None, None, :]
        # a query that is hidden itself shall still see something; nobody sees what it computes
        diagonal = torch.arange(num_queries, device=hidden.device)
        visible = visible.clone()
        visible[:, :, diagonal, num_cached + diagonal] = True
        floor = torch.finfo(hidden_states.dtype).min
        bias = torch.zeros(visible.shape, dtype=hidden_states.dtype, device=hidden.device).masked_fill(~visible, floor)
        return args, {**kwargs, "attention_mask": bias}

    @contextmanager
    def active(self) -> Iterator[None]:
        for index, layer in enumerate(self.model.model.language_model.layers):
            self.handles.append(layer.register_forward_pre_hook(partial(self.hide, index), with_kwargs=True))
        try:
            yield
        finally:
            for handle in self.handles:
                handle.remove()


def hidden_columns(input_ids: Tensor, alive: Sequence[Tensor]) -> list[Tensor]:
    """Per layer, the prompt columns whose image token is not among the alive ones. (B, S) bool"""
    is_image = input_ids == IMAGE_TOKEN
    layers = []
    for alive_BK in alive:
        hidden = is_image.clone()
        for row in range(len(input_ids)):
            places = is_image[row].nonzero().squeeze(1)
            hidden[row, places[alive_BK[row]]] = False
        layers.append(hidden)
    return layers


@pytest.fixture(scope="session")
def llava() -> Callable[..., LlavaForConditionalGeneration]:
    """One model for each (kernel, side, device), shared by all tests: pruning leaves no trace."""
    built: dict[tuple[str, int, str], LlavaForConditionalGeneration] = {}

    def get(kernel: str = "sdpa", side: int = 5, device: str = "cpu") -> LlavaForConditionalGeneration:
        key = (kernel, side, device)
        if key not in built:
            built[key] = build_llava(kernel, side).to(device)
        return built[key]

    return get


@pytest.fixture
def inputs_for() -> Callable[..., dict[str, Tensor]]:
    return build_inputs


@pytest.fixture
def masked_dense() -> Callable[..., Any]:
    """masked_dense(model, input_ids, alive): a context in which the dense model hides what pruning dropped."""

    def enter(model: LlavaForConditionalGeneration, input_ids: Tensor, alive: Sequence[Tensor]) -> Any:
        return MaskedDense(model, hidden_columns(input_ids, alive)).active()

    return enter


@pytest.fixture
def hidden_of() -> Callable[[Tensor, Sequence[Tensor]], list[Tensor]]:
    return hidden_columns


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return str(request.param)
