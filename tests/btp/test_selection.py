"""Selectors and their tensor functions against naive loops in float64, written from the papers' words."""

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from btp import Plan, Stage, ops, prune
from btp.anatomy import anatomy_of
from btp.selection import SELECTORS, ImageTokens
from btp.testing import SelectorContract, image_tokens


class TestSelectors(SelectorContract):
    pass


@pytest.mark.gpu
class TestSelectorsOnCuda(SelectorContract):
    device = "cuda"

    @pytest.fixture(autouse=True)
    def _needs_cuda(self):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device on this machine")

    def test_nothing_waits_for_the_device(self, selector, attention_weight):
        tokens = self._tokens()
        self._select(selector, tokens, 9, attention_weight)  # fills the per-grid tables
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._select(selector, tokens, 9, attention_weight)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def cosine(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)


def naive_farthest_first(features, num_pick, taken=()):
    picked, free = list(taken), [i for i in range(len(features)) if i not in taken]
    picks = []
    for _ in range(num_pick):

        def distance(i):
            rivals = picked or [j for j in range(len(features)) if j != i]
            return min(1 - cosine(features[i], features[j]) for j in rivals)

        best = max(free, key=lambda i: (distance(i), -i))
        picks.append(best)
        picked.append(best)
        free.remove(best)
    return picks


def naive_grid_order(rows, columns):
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    order = [0]
    while len(order) < len(cells):
        gaps = {
            i: min(abs(r - cells[j][0]) + abs(c - cells[j][1]) for j in order)
            for i, (r, c) in enumerate(cells)
            if i not in order
        }
        order.append(max(gaps, key=lambda i: (gaps[i], -i)))
    return order


def naive_attended(scores, num_pick, oversample):
    by_score = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    candidates = by_score[: min(max(num_pick, math.floor(oversample * num_pick + 0.5)), len(scores))]
    early = [i for i in candidates if i < len(scores) / 2]
    late = [i for i in candidates if i >= len(scores) / 2]
    return (early + late)[:num_pick]


def naive_balanced(features, scores, origins, grid, num_keep, stage):
    num_attended = math.floor(stage.attention_weight * num_keep + 0.5)
    picked = naive_attended(scores, num_attended, stage.oversample)
    num_feature = (num_keep - num_attended) // 8
    place = {cell: step for step, cell in enumerate(naive_grid_order(*grid))}
    by_place = sorted((i for i in range(len(scores)) if i not in picked), key=lambda i: place[origins[i]])
    picked = picked + by_place[: num_keep - num_attended - num_feature]
    return sorted(picked + naive_farthest_first(features, num_feature, picked))


def random_view(seed, batch=2, grid=(5, 6), num_alive=22):
    generator = torch.Generator().manual_seed(seed)
    origin = torch.rand(batch, grid[0] * grid[1], generator=generator).argsort(dim=1)[:, :num_alive].sort(dim=1).values
    hidden = torch.randn(batch, num_alive, 7, generator=generator, dtype=torch.float64)
    logits = torch.randn(batch, num_alive, generator=generator, dtype=torch.float64)
    return image_tokens(origin, grid, hidden, logits)


@pytest.mark.parametrize("seed", range(8))
def test_farthest_first_is_the_greedy_loop(seed):
    tokens = random_view(seed)
    fresh = ops.farthest_first(tokens.hidden, 9)
    taken = torch.tensor([[0, 5, 7], [1, 2, 21]])
    more = ops.farthest_first(tokens.hidden, 9, taken)
    for row in range(2):
        features = tokens.hidden[row].tolist()
        assert fresh[row].tolist() == naive_farthest_first(features, 9)
        assert more[row].tolist() == naive_farthest_first(features, 9, taken[row].tolist())


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 4), (5, 3), (6, 6)])
def test_grid_rank_is_the_greedy_loop(grid):
    rank = ops.grid_farthest_first_rank(*grid, torch.device("cpu"))
    assert rank.argsort().tolist() == naive_grid_order(*grid)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("attention_weight", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("oversample", [1.0, 1.5, 3.7])
@pytest.mark.parametrize("num_keep", [1, 11, 20])
def test_balanced_is_the_naive_loop(seed, attention_weight, oversample, num_keep):
    tokens = random_view(seed)
    stage = Stage(layer=0, keep=0.5, attention_weight=attention_weight, oversample=oversample)
    selected = SELECTORS["balanced"](tokens, num_keep, stage)
    for row in range(2):
        wanted = naive_balanced(
            tokens.hidden[row].tolist(),
            tokens.attention[row].tolist(),
            tokens.origin_BN[row].tolist(),
            tokens.grid,
            num_keep,
            stage,
        )
        assert selected[row].tolist() == wanted


@pytest.mark.parametrize("oversample", [1.0, 1.5, 3.7])
def test_attention_is_the_naive_loop_and_ties_go_to_the_lower_index(oversample):
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 1.0, 1.0, 2.0]])
    tokens = image_tokens(torch.arange(8)[None], (2, 4), torch.zeros(1, 8, 2), logits)
    stage = Stage(layer=0, keep=0.5, selector="attention", oversample=oversample)
    selected = SELECTORS["attention"](tokens, 3, stage)
    assert selected[0].tolist() == sorted(naive_attended(tokens.attention[0].tolist(), 3, oversample))


def test_rebalancing_prefers_the_first_half():
    logits = torch.arange(8.0)[None]  # attention grows with the position
    tokens = image_tokens(torch.arange(8)[None], (2, 4), torch.zeros(1, 8, 2), logits)
    plain = SELECTORS["attention"](tokens, 3, Stage(layer=0, keep=0.5))
    balanced = SELECTORS["attention"](tokens, 3, Stage(layer=0, keep=0.5, oversample=2.0))
    assert plain.tolist() == [[5, 6, 7]]
    assert balanced.tolist() == [[2, 3, 7]]


def test_nothing_is_computed_that_is_not_read():
    def never():
        raise AssertionError("read")

    tokens = ImageTokens(torch.arange(16)[None], (4, 4), never, never)
    unread = SELECTORS["balanced"](tokens, 7, Stage(layer=0, keep=0.5, attention_weight=0.0))
    assert unread.tolist() == [sorted(naive_grid_order(4, 4)[:7])]
    for name in ("uniform", "random"):
        assert SELECTORS[name](tokens, 7, Stage(layer=0, keep=0.5)).shape == (1, 7)


def test_attention_is_computed_once():
    calls = []

    def read():
        calls.append(1)
        return torch.zeros(1, 4), torch.ones(1, 4)

    tokens = ImageTokens(torch.arange(4)[None], (2, 2), lambda: torch.zeros(1, 4, 2), read)
    assert (tokens.attention_logits - tokens.attention).tolist() == [[1.0] * 4]
    assert len(calls) == 1
    assert tokens.coordinates.tolist() == [[[0, 0], [0, 1], [1, 0], [1, 1]]]


def test_uniform_spreads_over_the_grid():
    tokens = image_tokens(torch.arange(64)[None], (8, 8), torch.zeros(1, 64, 2), torch.zeros(1, 64))
    selected = SELECTORS["uniform"](tokens, 16, Stage(layer=0, keep=0.25))[0]
    blocks = {(int(i) // 8 // 2, int(i) % 8 // 2) for i in selected}
    assert len(blocks) == 16  # one in each 2 x 2 block


def test_random_is_nested_and_the_same_for_every_row():
    tokens = image_tokens(torch.arange(30).expand(3, -1), (5, 6), torch.zeros(3, 30, 2), torch.zeros(3, 30))
    many = SELECTORS["random"](tokens, 20, Stage(layer=0, keep=0.5))
    few = SELECTORS["random"](tokens, 5, Stage(layer=0, keep=0.5))
    assert torch.equal(many[0].expand(3, -1), many)
    assert set(few[0].tolist()) < set(many[0].tolist())


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_the_attention_row_is_the_layers_own(llava, inputs_for, kernel, padding, monkeypatch, device):
    """Against the whole attention matrix, from the layer's own projections, after an earlier cut."""
    model, inputs = llava(kernel, device=device), inputs_for(3, padding=padding, device=device)
    seen, wanted = [], []

    def spy(tokens, num_keep, stage):
        if stage.layer == 2:
            seen.append((tokens.attention, tokens.attention_logits))
        return torch.arange(num_keep, device=tokens.origin_BN.device).expand(len(tokens.origin_BN), -1)

    def layer_input(module, args, kwargs):  # sees what the layer gets without a cut there
        wanted.append(naive_row(model, module, args[0], kwargs, inputs.get("attention_mask")))

    monkeypatch.setitem(SELECTORS, "spy", spy)
    first = Stage(layer=1, keep=0.6, selector="spy")
    with torch.no_grad(), prune(model, Plan(stages=(first, Stage(layer=2, keep=0.2, selector="spy")))):
        model(**inputs)
    with torch.no_grad(), prune(model, Plan(stages=(first,))):
        handle = model.model.language_model.layers[2].register_forward_pre_hook(layer_input, with_kwargs=True)
        model(**inputs)
        handle.remove()
    for got, naive in zip(seen[0], wanted[0], strict=True):
        torch.testing.assert_close(got.double(), naive, rtol=1e-4, atol=1e-5)


def naive_row(model, layer, hidden, kwargs, padding_mask):
    """Softmax and logits of the last prompt token in float64, over image tokens only; 15 are left, in place."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*normed.shape[:2], -1, attention.head_dim)
    query, key = (project(normed).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
    query, key = apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
    key = repeat_kv(key, attention.num_key_value_groups)
    logits = (query.double() @ key.double().mT) * attention.head_dim**-0.5
    rows = []
    for row in range(len(hidden)):
        padded = torch.zeros(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        last, num_pads, left = hidden.shape[1] - 1, 0, True
        if padding_mask is not None:
            num_pads, left = int((padding_mask[row] == 0).sum()), bool(padding_mask[row, 0] == 0)
            if left:
                padded[:num_pads] = True
            else:
                last -= num_pads
        per_head = logits[row, :, last, : last + 1].masked_fill(padded[: last + 1], -torch.inf)
        # 6 text tokens come after the image
        image = slice(last - 6 - 15 + 1, last - 6 + 1)
        rows.append((per_head.softmax(dim=-1).mean(0)[image], logits[row, :, last].mean(0)[image]))
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


def test_identity_and_grid(llava):
    anatomy = anatomy_of(llava())
    assert anatomy.grid == (5, 5)
    assert anatomy.identity.architecture == "LlavaForConditionalGeneration"
    assert (anatomy.identity.num_layers, anatomy.identity.hidden_size, anatomy.identity.num_image_tokens) == (4, 32, 25)
