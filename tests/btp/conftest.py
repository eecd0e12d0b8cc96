"""Models built once for all tests, and the naive references.

One is a dense run in which dropped tokens are masked, layer by layer; the other, attention that gets its mask as flash
attention does.

Shapes: B batch, H query heads, G key heads, Q queries, S keys, E head dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from btp import Plan, Trace, prune
from tests.btp.families import FAMILIES, IMAGE_TOKEN, NUM_LAYERS, decoder_layers, llava_family

__all__ = ["IMAGE_TOKEN", "NUM_LAYERS", "MaskedDense", "build_inputs", "build_llava", "hidden_columns"]


def build_llava(kernel: str = "sdpa", side: int = 5, seed: int = 0) -> Any:
    """LLaVA with side x side image tokens."""
    return llava_family(side).build(kernel, seed)


def build_inputs(
    batch: int = 1, side: int = 5, padding: str = "none", seed: int = 0, device: str = "cpu"
) -> dict[str, Tensor]:
    """Prompts with text before and after one image; with padding, every row has another length."""
    return llava_family(side).inputs(batch, padding, seed, device=device)


@dataclass
class MaskedDense:
    """Hides columns of the dense model from each layer on; hidden_by_layer[i] is (B, S) bool over the prompt."""

    model: Any
    hidden_by_layer: Sequence[Tensor]
    handles: list[Any] = field(default_factory=list)

    def hide(self, index: int, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask, hidden_states = kwargs["attention_mask"], args[0] if args else kwargs["hidden_states"]
        batch, num_queries = hidden_states.shape[:2]
        cache, device = kwargs.get("past_key_values"), hidden_states.device
        num_seen, num_keys = num_queries, num_queries
        if cache is not None:
            num_seen += cache.get_seq_length(index)
            num_keys = cache.get_mask_sizes(num_queries, index)[0]  # a sliding layer forgets what left its window
        own = torch.arange(num_keys - num_queries, num_keys, device=device)  # the column of each query
        if mask is None:
            visible = (torch.arange(num_keys, device=device) <= own[:, None])[None, None].expand(batch, 1, -1, -1)
        else:
            assert mask.dim() == 4, "only eager and sdpa can hide columns from some queries"
            assert mask.shape[-1] == num_keys
            visible = mask if mask.dtype == torch.bool else mask > -1
        hidden = torch.zeros(batch, num_seen, dtype=torch.bool, device=device)
        prompt = self.hidden_by_layer[index]
        hidden[:, : prompt.shape[1]] = prompt
        visible = visible & ~hidden[:, None, None, num_seen - num_keys :]
        # a query that is hidden itself shall still see something; nobody sees what it computes
        visible[:, :, own - own[0], own] = True
        floor = torch.finfo(hidden_states.dtype).min
        bias = torch.zeros(visible.shape, dtype=hidden_states.dtype, device=device).masked_fill(~visible, floor)
        return args, {**kwargs, "attention_mask": bias}

    @contextmanager
    def active(self) -> Iterator[None]:
        for index, layer in enumerate(decoder_layers(self.model)):
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


def naive_flash_attention(
    module: object,
    query_BHQE: Tensor,
    key_BGSE: Tensor,
    value_BGSE: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What flash attention computes: causal up to the last key, pads by a (B, S) mask. Returns (B, Q, H, E), None."""
    batch, num_heads, num_queries = query_BHQE.shape[:3]
    num_keys = key_BGSE.shape[2]
    assert attention_mask is None or attention_mask.shape == (batch, num_keys), "flash attention takes 2-D masks only"
    groups = num_heads // key_BGSE.shape[1]
    key_BHSE, value_BHSE = (states.repeat_interleave(groups, dim=1) for states in (key_BGSE, value_BGSE))
    key_S = torch.arange(num_keys, device=query_BHQE.device)
    query_Q1 = key_S[num_keys - num_queries :, None]
    visible = (key_S <= query_Q1)[None, None]
    if sliding_window is not None:
        visible = visible & (key_S > query_Q1 - sliding_window)
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None, :]
    logits_BHQS = (query_BHQE @ key_BHSE.mT) * scaling
    weights_BHQS = logits_BHQS.masked_fill(~visible, -torch.inf).softmax(dim=-1).nan_to_num(0.0)  # pads see nothing
    return (weights_BHQS @ value_BHSE).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash_convention(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test, models built with "flash_attention_2" run, on any device, and any mask but theirs fails."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", naive_flash_attention)


@pytest.fixture(scope="session")
def family_model() -> Callable[..., Any]:
    """One model for each (family, kernel, device), built once for all tests: pruning leaves no trace."""
    built: dict[tuple[str, str, str], Any] = {}

    def get(name: str, kernel: str = "sdpa", device: str = "cpu") -> Any:
        key = (name, kernel, device)
        if key not in built:
            built[key] = FAMILIES[name].build(kernel).to(device)
        return built[key]

    return get


@pytest.fixture(scope="session")
def llava() -> Callable[..., Any]:
    """One model for each (kernel, side, device), built once for all tests: pruning leaves no trace."""
    built: dict[tuple[str, int, str], Any] = {}

    def get(kernel: str = "sdpa", side: int = 5, device: str = "cpu") -> Any:
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

    def enter(model: Any, input_ids: Tensor, alive: Sequence[Tensor]) -> Any:
        return MaskedDense(model, hidden_columns(input_ids, alive)).active()

    return enter


@pytest.fixture
def assert_equals_masked_dense() -> Callable[..., Trace]:
    """assert_equals(model, inputs, plan): pruned logits are those of the dense run with the dropped tokens masked.

    Compared are the real tokens that survive, within 1e-4. dense: the model of the dense run, if it is another one;
    input_ids: the prompt, where `inputs` has embeddings instead. Returns the trace of the pruned run.
    """

    def check(
        model: Any, inputs: dict[str, Tensor], plan: Plan, *, dense: Any = None, input_ids: Tensor | None = None
    ) -> Trace:
        ids = inputs["input_ids"] if input_ids is None else input_ids
        with torch.no_grad(), prune(model, plan) as trace:
            pruned = model(**inputs).logits
        hidden = hidden_columns(ids, trace.alive)
        with torch.no_grad(), MaskedDense(dense or model, hidden).active():
            whole = (dense or model)(**inputs).logits
        real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        for row, survives in enumerate(~hidden[-1]):
            assert pruned.shape[1] == survives.sum()
            kept = pruned[row][real[row][survives]]
            torch.testing.assert_close(kept, whole[row][survives & real[row]], rtol=1e-4, atol=1e-4)
        return trace

    return check


@pytest.fixture
def hidden_of() -> Callable[[Tensor, Sequence[Tensor]], list[Tensor]]:
    return hidden_columns


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return str(request.param)
