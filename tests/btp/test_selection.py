"""Selectors and their tensor functions against naive loops in float64, written from the papers' words."""

import math
from dataclasses import replace

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from btp import Plan, Stage, ops, prune
from btp.selection import SELECTORS
from btp.testing import SelectorContract, image_tokens
from btp.tokens import Attention, TextTokens


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


def nearest_half_up(number):
    return math.floor(number + 0.5)


def best(candidates, value):
    """The one of highest value, the lower index of equals."""
    return max(candidates, key=lambda i: (value(i), -i))


class Row:
    """One row of a view, as lists of float64 numbers."""

    def __init__(self, view, row):
        self.features = view.hidden[row].tolist()
        self.cosine = [[cosine(one, other) for other in self.features] for one in self.features]
        self.scores = {"softmax": view.attention.softmax[row].tolist(), "logits": view.attention.logits[row].tolist()}
        self.origins, self.grids = view.origin_BN[row].tolist(), view.grids[row]
        self.key_norms = view.key_norm[row].tolist()
        self.cls = None if view.cls_attention is None else view.cls_attention[row].tolist()
        text = view.text
        real = [t for t, is_real in enumerate(text.instruction_BT[row].tolist()) if is_real]
        self.words = [text.hidden_BTD[row, t].tolist() for t in real]
        self.word_norms = [text.key_norm_BT[row, t].item() for t in real]
        self.all = range(len(self.origins))


def naive_farthest_first(row, num_pick, taken=(), merit=lambda i: 0.0, weight=0.0):
    picked, picks = list(taken), []
    for _ in range(num_pick):

        def value(i):
            rivals = picked or [j for j in row.all if j != i]
            distance = (1 - max((row.cosine[i][j] for j in rivals), default=-1)) / 2
            return weight * merit(i) + (1 - weight) * distance

        picks.append(best([i for i in row.all if i not in picked], value))
        picked.append(picks[-1])
    return picks


def naive_cells(grids):
    cells, top = [], 0
    for rows, columns in grids:
        cells += [(top + r, c) for r in range(rows) for c in range(columns)]
        top += rows
    return cells


def naive_grid_order(grids):
    cells = naive_cells(grids)
    order = [0]
    while len(order) < len(cells):
        gaps = {
            i: min(abs(r - cells[j][0]) + abs(c - cells[j][1]) for j in order)
            for i, (r, c) in enumerate(cells)
            if i not in order
        }
        order.append(best(gaps, gaps.get))
    return order


def naive_spread(row, num_pick, taken=()):
    place = {origin: step for step, origin in enumerate(naive_grid_order(row.grids))}
    return sorted((i for i in row.all if i not in taken), key=lambda i: place[row.origins[i]])[:num_pick]


def naive_attended(scores, num_pick, oversample, boundary):
    by_score = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    candidates = by_score[: max(num_pick, nearest_half_up(oversample * num_pick))]
    early = [i for i in candidates if i < boundary]
    late = [i for i in candidates if i >= boundary]
    return (early + late)[:num_pick]


def naive_attention(row, num_keep, stage):
    return naive_attended(row.scores[stage.attention], num_keep, stage.oversample, len(row.all) / 2)


def naive_balanced(row, num_keep, stage):
    num_attended = nearest_half_up(stage.attention_weight * num_keep)
    picked = naive_attended(row.scores[stage.attention], num_attended, stage.oversample, num_keep)
    num_feature = (num_keep - num_attended) // 8
    picked += naive_spread(row, num_keep - num_attended - num_feature, picked)
    return picked + naive_farthest_first(row, num_feature, picked)


def naive_joint(row, num_keep, stage):
    scores = row.scores[stage.attention]
    low, high = min(scores), max(scores)
    by_score = sorted(row.all, key=lambda i: (-scores[i], i))
    candidates = by_score[: nearest_half_up(stage.oversample * num_keep)] if stage.oversample > 1 else []
    early = [i for i in candidates if i < len(row.all) / 2]
    heirs = dict(zip([*early, *(i for i in by_score if i not in early)], by_score, strict=True))

    def merit(i):
        return (scores[heirs[i]] - low) / (high - low) if high > low else 0.0

    seeds = naive_spread(row, nearest_half_up(stage.seeds * num_keep))
    return seeds + naive_farthest_first(row, num_keep - len(seeds), seeds, merit, stage.attention_weight)


def naive_pivot(row):
    if row.cls is not None:
        return best(row.all, lambda i: row.cls[i])
    unit = [[x / math.hypot(*feature) for x in feature] for feature in row.features]
    mean = [sum(column) / len(unit) for column in zip(*unit, strict=True)]
    return best(row.all, lambda i: cosine(row.features[i], mean))


def naive_k_center(row, num_keep, stage):
    pivot = naive_pivot(row)
    return [pivot, *naive_farthest_first(row, num_keep - 1, [pivot])]


def naive_max_sum(row, num_keep, stage):
    picked = [naive_pivot(row)]
    while len(picked) < num_keep:
        free = [i for i in row.all if i not in picked]
        picked.append(best(free, lambda i: sum(1 - row.cosine[i][j] for j in picked)))
    return picked


def naive_dpp(row, num_keep, stage):
    """By Schur complements: a pick is eliminated from the whole kernel, unless nothing of it is left."""
    against = [-sum(cosine(feature, word) for word in row.words) / len(row.words) for feature in row.features]
    low, high = min(against), max(against)
    relevance = [(r - low + 1e-6) / (high - low + 1e-6) for r in against]
    kernel = [[relevance[i] * row.cosine[i][j] * relevance[j] for j in row.all] for i in row.all]
    smallest = 1e-6 * max(kernel[i][i] for i in row.all)
    picked = []
    while len(picked) < num_keep:
        left = {i: kernel[i][i] if kernel[i][i] >= smallest else 0.0 for i in row.all if i not in picked}
        pick = best(left, left.get)
        picked.append(pick)
        if left[pick]:
            of_pick, pivot = list(kernel[pick]), kernel[pick][pick]
            kernel = [[kernel[i][j] - of_pick[i] * of_pick[j] / pivot for j in row.all] for i in row.all]
    return picked


def naive_dart(row, num_keep, stage):
    image_pivots = sorted(row.all, key=lambda i: (-row.key_norms[i], i))[: min(4, num_keep)]
    words = [t for _, t in sorted((-norm, t) for t, norm in enumerate(row.word_norms))]
    text_pivots = (words + 4 * words[-1:])[:4]
    pivots = [row.features[i] for i in image_pivots] + [row.words[t] for t in text_pivots]
    picked, rest = list(image_pivots), num_keep - len(image_pivots)
    for place, pivot in enumerate(pivots):
        free = sorted((i for i in row.all if i not in picked), key=lambda i: (cosine(row.features[i], pivot), i))
        picked += free[: rest // 8 + (place < rest % 8)]
    return picked


NAIVE = {
    "attention": naive_attention,
    "balanced": naive_balanced,
    "dart": naive_dart,
    "diversity": lambda row, num_keep, stage: naive_farthest_first(row, num_keep),
    "dpp": naive_dpp,
    "joint": naive_joint,
    "k_center": naive_k_center,
    "max_sum": naive_max_sum,
}
GRIDS = (((5, 6),), ((2, 3), (6, 4)))  # 30 tokens a row
EXACT = ((1, 0, 0, 0), (0, 1, 0, 0), (-1, 0, 0, 0), (0.5, 0.5, 0.5, 0.5), (0.5, -0.5, 0.5, -0.5))


def random_view(seed, *, num_alive=22, cls=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return image_tokens(
        draw(2, 30).argsort(dim=1)[:, :num_alive].sort(dim=1).values,
        GRIDS,
        draw(2, num_alive, 7),
        draw(2, num_alive),
        key_norm_BN=draw(2, num_alive).abs(),
        text=TextTokens(draw(2, 9, 7), draw(2, 9).abs(), torch.arange(9) >= torch.tensor([[2], [6]])),
        cls_attention_BN=draw(2, num_alive) if cls else None,
    )


def tied_view(features, num_levels):
    """Features that float32 holds exactly, many of them the same; everything else on `num_levels` levels."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randint(num_levels, shape, generator=generator).double()

    chosen = torch.randint(len(features), (2, 22), generator=generator)
    words = torch.tensor([EXACT[0], EXACT[1], EXACT[3], EXACT[0]], dtype=torch.float64).expand(2, -1, -1)
    return image_tokens(
        torch.arange(22).expand(2, -1) + 4,
        GRIDS,
        torch.tensor(features, dtype=torch.float64)[chosen],
        draw(2, 22),
        key_norm_BN=draw(2, 22),
        text=TextTokens(words, draw(2, 4), torch.arange(4) >= torch.tensor([[2], [0]])),
        cls_attention_BN=draw(2, 22),
    )


def check(name, view, num_keep, **settings):
    stage = Stage(layer=0, keep=0.5, selector=name, **settings)
    selected = SELECTORS[name](view, num_keep, stage)
    for row in range(2):
        assert selected[row].tolist() == sorted(NAIVE[name](Row(view, row), num_keep, stage))


def test_every_selector_but_the_controls_has_a_naive_loop():
    assert {*NAIVE, "random", "uniform"} == set(SELECTORS)


@pytest.mark.parametrize("num_keep", [1, 3, 5, 11, 20, 22])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(NAIVE))
def test_a_selector_is_its_naive_loop(name, seed, num_keep):
    check(name, random_view(seed), num_keep, attention_weight=0.4, oversample=1.5)
    check(name, random_view(seed, num_alive=30), num_keep, attention_weight=0.4, attention="logits")


@pytest.mark.parametrize("num_keep", [1, 6, 13, 22])
@pytest.mark.parametrize("num_levels", [1, 2])
@pytest.mark.parametrize("features", [EXACT, EXACT[:2], EXACT[3:4]], ids=["several", "two", "constant"])
@pytest.mark.parametrize("name", sorted(NAIVE))
def test_ties_go_to_the_lower_index(name, features, num_levels, num_keep):
    check(name, tied_view(features, num_levels), num_keep, attention_weight=0.5, oversample=1.5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("attention_weight", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("oversample", [1.0, 1.2, 3.7])
@pytest.mark.parametrize("num_keep", [1, 11, 20])
def test_btp_is_the_naive_loop_at_every_setting(seed, attention_weight, oversample, num_keep):
    view = random_view(seed)
    check("balanced", view, num_keep, attention_weight=attention_weight, oversample=oversample)
    for seeds in (0.0, 0.5, 1.0):
        check("joint", view, num_keep, attention_weight=attention_weight, oversample=oversample, seeds=seeds)


@pytest.mark.parametrize("name", ["k_center", "max_sum"])
@pytest.mark.parametrize("num_keep", [1, 4, 15])
def test_without_cls_the_pivot_is_nearest_to_the_mean(name, num_keep):
    view = random_view(5, cls=False)
    check(name, view, num_keep)
    with_cls = SELECTORS[name](random_view(5), 1, Stage(layer=0, keep=0.5))
    assert not torch.equal(with_cls, SELECTORS[name](view, 1, Stage(layer=0, keep=0.5)))


@pytest.mark.parametrize("seed", range(4))
def test_farthest_first_keeps_away_from_what_is_taken(seed):
    view = random_view(seed)
    taken = torch.tensor([[0, 5, 7], [1, 2, 21]])
    for num_pick in (0, 1, 4, 9, 19):  # few and many go by different roads
        picks = ops.farthest_first(view.hidden, num_pick, taken)
        for row in range(2):
            assert picks[row].tolist() == naive_farthest_first(Row(view, row), num_pick, taken[row].tolist())


GRID_CASES = [((1, 1),), ((1, 5),), ((4, 4),), ((5, 3),), ((6, 6),), ((2, 3), (6, 4)), ((3, 4), (1, 1)), ((2, 2),) * 3]


@pytest.mark.parametrize("grids", GRID_CASES)
def test_grid_tables_are_the_naive_loops(grids):
    device = torch.device("cpu")
    cells = naive_cells(grids)
    assert ops.grid_cells(grids, device).tolist() == [list(cell) for cell in cells]
    assert ops.grid_farthest_first_rank(grids, device).argsort().tolist() == naive_grid_order(grids)

    def morton(i):
        row, column = cells[i]
        return sum((column >> bit & 1) << 2 * bit | (row >> bit & 1) << 2 * bit + 1 for bit in range(8))

    assert ops.morton_rank(grids, device).argsort().tolist() == sorted(range(len(cells)), key=morton)


def test_rebalancing_prefers_the_first_half_and_the_released_code_the_first_k():
    logits = torch.arange(12.0)[None]  # attention grows with the position
    tokens = image_tokens(torch.arange(12)[None], ((3, 4),), torch.zeros(1, 12, 2), logits)
    plain, twice = (Stage(layer=0, keep=0.5, attention_weight=1.0, oversample=factor) for factor in (1.0, 3.0))
    assert SELECTORS["attention"](tokens, 3, plain).tolist() == [[9, 10, 11]]
    assert SELECTORS["attention"](tokens, 3, twice).tolist() == [[3, 4, 5]]
    assert SELECTORS["balanced"](tokens, 3, twice).tolist() == [[9, 10, 11]]  # none of the candidates is under 3
    assert SELECTORS["balanced"](tokens, 4, twice).tolist() == [[0, 1, 2, 3]]
    assert SELECTORS["attention"](tokens, 4, twice).tolist() == [[2, 3, 4, 5]]


@pytest.mark.parametrize("num_alive", [21, 22])
@pytest.mark.parametrize("seed", range(4))
def test_both_rebalancings_agree_where_the_stage_keeps_half(seed, num_alive):
    view = random_view(seed, num_alive=num_alive)
    stage = Stage(layer=0, keep=0.5, attention_weight=1.0, oversample=1.6)
    assert torch.equal(SELECTORS["balanced"](view, 11, stage), SELECTORS["attention"](view, 11, stage))


@pytest.mark.parametrize("oversample", [1.0, 1.2, 1.5, 3.7])
@pytest.mark.parametrize("num_keep", [1, 2, 9, 21])
def test_joint_runs_from_diversity_to_attention(oversample, num_keep):
    for view in (random_view(3), tied_view(EXACT, 3), tied_view(EXACT, 1)):
        ends = [Stage(layer=0, keep=0.5, attention_weight=weight, oversample=oversample) for weight in (0.0, 1.0)]
        for stage, name in zip(ends, ("diversity", "attention"), strict=True):
            assert torch.equal(SELECTORS["joint"](view, num_keep, stage), SELECTORS[name](view, num_keep, stage))


def test_joint_moves_through_several_choices():
    view = random_view(3)
    choices = {
        tuple(SELECTORS["joint"](view, 8, Stage(layer=0, keep=0.5, attention_weight=step / 20))[0].tolist())
        for step in range(21)
    }
    assert len(choices) > 4


@pytest.mark.parametrize("num_keep", range(1, 17))
def test_a_token_wanted_twice_is_kept_once(num_keep):
    """What attention, keys and [CLS] like best is what the grid reaches first, and lies farthest from the text."""
    order = naive_grid_order(((4, 4),))
    liked = torch.zeros(1, 16).scatter(1, torch.tensor([order]), torch.arange(16, 0, -1.0)[None])
    hidden = torch.stack((liked[0] - 20, torch.ones(16)), dim=1)[None]
    text = TextTokens(torch.tensor([[[-1.0, 0.0]]]), torch.ones(1, 1), torch.ones(1, 1).bool())
    view = image_tokens(
        torch.arange(16)[None], ((4, 4),), hidden, liked, key_norm_BN=liked, text=text, cls_attention_BN=liked
    )
    stage = Stage(layer=0, keep=0.5, attention_weight=0.5, seeds=0.5)
    for name in NAIVE:
        kept = SELECTORS[name](view, num_keep, stage)[0].tolist()
        assert len(set(kept)) == num_keep
        assert name == "diversity" or order[0] in kept
    first = set(order[: num_keep // 2])
    assert first <= set(SELECTORS["balanced"](view, num_keep, stage)[0].tolist())
    assert first <= set(SELECTORS["joint"](view, num_keep, stage)[0].tolist())


def never():
    raise AssertionError("read")


def test_nothing_is_computed_that_is_not_read():
    unread = {f"read_{name}": never for name in ("hidden", "attention", "key_norm", "text", "cls_attention")}
    view = random_view(0)
    blind = replace(view, **unread)

    def choose(name, tokens, **settings):
        return SELECTORS[name](tokens, 7, Stage(layer=0, keep=0.5, **settings))

    for name in ("uniform", "random"):
        assert torch.equal(choose(name, blind), choose(name, view))
    for attended in ({"name": "attention"}, {"name": "joint", "attention_weight": 1.0, "seeds": 0.5}):
        assert torch.equal(
            choose(tokens=replace(blind, read_attention=view.read_attention), **attended),
            choose(tokens=view, **attended),
        )
    for diverse in ({"name": "diversity"}, {"name": "joint", "attention_weight": 0.0, "seeds": 0.5}):
        assert torch.equal(
            choose(tokens=replace(blind, read_hidden=view.read_hidden), **diverse), choose(tokens=view, **diverse)
        )
    assert choose("balanced", blind, attention_weight=0.0)[0].tolist() == sorted(naive_spread(Row(view, 0), 7))


def test_attention_is_computed_once():
    calls = []

    def read():
        calls.append(1)
        return Attention(torch.zeros(1, 4), torch.ones(1, 4))

    tokens = image_tokens(torch.arange(4)[None], ((2, 2),), torch.zeros(1, 4, 2), torch.zeros(1, 4))
    tokens = replace(tokens, read_attention=read)
    assert (tokens.attention.logits - tokens.attention.softmax).tolist() == [[1.0] * 4]
    assert len(calls) == 1
    assert tokens.coordinates.tolist() == [[[0, 0], [0, 1], [1, 0], [1, 1]]]


@pytest.mark.parametrize("num_keep", [1, 6, 20])
@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_half_precision_is_chosen_from_in_single_precision(name, num_keep):
    source = random_view(7)

    def view(dtype):
        def cast(values):
            return values.bfloat16().to(dtype)

        text = source.text
        return replace(
            source,
            read_hidden=lambda: cast(source.hidden),
            read_attention=lambda: Attention(cast(source.attention.softmax), cast(source.attention.logits)),
            read_key_norm=lambda: cast(source.key_norm),
            read_text=lambda: TextTokens(cast(text.hidden_BTD), cast(text.key_norm_BT), text.instruction_BT),
            read_cls_attention=lambda: cast(source.cls_attention),
        )

    stage = Stage(layer=0, keep=0.5, attention_weight=0.5, oversample=1.5)
    half, single = (SELECTORS[name](view(dtype), num_keep, stage) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(half, single)


def test_uniform_spreads_over_the_grid():
    tokens = image_tokens(torch.arange(64)[None], ((8, 8),), torch.zeros(1, 64, 2), torch.zeros(1, 64))
    selected = SELECTORS["uniform"](tokens, 16, Stage(layer=0, keep=0.25))[0]
    blocks = {(int(i) // 8 // 2, int(i) % 8 // 2) for i in selected}
    assert len(blocks) == 16  # one in each 2 x 2 block


def test_random_is_nested_and_the_same_for_every_row():
    tokens = image_tokens(torch.arange(30).expand(3, -1), ((5, 6),), torch.zeros(3, 30, 2), torch.zeros(3, 30))
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
            seen.append((tokens.attention.softmax, tokens.attention.logits))
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
