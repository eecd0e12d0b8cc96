"""The trials benchmark in small: it runs, both ways agree, and its arithmetic is right."""

import json
import math
from itertools import islice

import pytest
import torch

from benchmarks import trials
from btp.cost import image_token_flops, tokens_per_layer
from btp.plan import Plan

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one small run wrote."""
    path, threads = tmp_path_factory.mktemp("trials") / "small.json", torch.get_num_threads()
    try:
        assert trials.main(["--small", "--commit", "abc", "--out", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    return json.loads(path.read_text())


def test_both_ways_agree_sample_by_sample(found):
    run = found["compared"]
    assert [row["plan"] for row in run["trials"]] == ["btp_paper", "btp_released", "drawn 0"]
    assert [row["differing_samples"] for row in run["trials"]] == [[], [], []]
    assert all(row["repeats_itself"] for row in run["trials"])
    assert run["decodes_because"] is None
    assert run["num_samples"] == 12


def test_ratios_come_from_the_seconds(found):
    run = found["compared"]
    naive_s, first_s, again_s = (sum(row[key] for row in run["trials"]) for key in ("naive_s", "first_s", "again_s"))
    assert run["ratio"] == pytest.approx(naive_s / first_s)
    assert run["ratio_again"] == pytest.approx(naive_s / again_s)
    assert run["ratio_with_preparation"] == pytest.approx(naive_s / (first_s + run["prepare_s"]))
    assert run["trials_per_minute"] == pytest.approx(60 * 3 / first_s)
    assert run["ratio_again"] > 1.5  # a tiny batch on a busy machine; far more at full size


def test_growth_is_fitted_over_growing_sizes(found):
    for name, sizes in (("samples", [2, 6, 12]), ("image_tokens", [16, 36, 64]), ("stages", [1, 2, 3, 4])):
        assert [int(size) for size in found["growth"][name]["seconds"]] == sizes
        assert min(found["growth"][name]["seconds"].values()) > 0
    assert 0.2 < found["growth"]["samples"]["exponent"] < 1.5


def test_where_it_was_measured_is_told(found):
    assert {"command", "date", "machine", "versions", "device", "threads"} <= found.keys()
    assert found["commit"] == "abc"
    assert found["threads"] == 1


def test_the_table_has_a_line_a_plan(found):
    text = trials.table(found)
    assert all(f"| {row['plan']} |" in text for row in found["compared"]["trials"])
    assert f"ratio {found['compared']['ratio']:.1f}" in text


def test_slopes_of_known_curves():
    assert trials.exponent({size: 3.0 * size**1.7 for size in (2, 5, 9)}) == pytest.approx(1.7)
    assert trials.slope([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx(2.0)


def test_draws_are_seeded_and_spend_the_share():
    sizes = {"num_layers": 8, "num_image_tokens": 256, "hidden_size": 192, "intermediate_size": 512}
    one, other = (list(islice(trials.drawn_plans(**sizes), 5)) for _ in range(2))
    assert one == other
    assert len(set(one)) == 5
    dense = image_token_flops(tokens_per_layer(Plan(stages=()), 8, 256), 192, 512)
    for plan in one:
        share = image_token_flops(tokens_per_layer(plan, 8, 256), 192, 512) / dense
        assert trials.SHARE - trials.TOLERANCE < share <= trials.SHARE
        assert all(num > 0 or stage.keep == 0 for num, stage in zip(plan.num_kept(256), plan.stages, strict=True))


def test_a_random_model_has_the_grid_it_was_asked_for():
    model, processor = trials.random_model(6, {"hidden_size": 96, "num_attention_heads": 3}, {}, "cpu", torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.config.text_config.hidden_size == 96
    examples = trials.from_dataset(trials.reference.dataset("calibrate"), "")[:2]
    inputs = trials.prompt_inputs(processor, examples, "cpu")
    assert int((inputs["input_ids"][0] == model.config.image_token_index).sum()) == 36 == math.prod((6, 6))
    seconds, scores = trials.seconds_of(trials.Evaluator(model, processor, examples), Plan(stages=()))
    assert seconds > 0
    assert len(scores.answers) == 2
