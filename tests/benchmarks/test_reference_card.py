"""The cards of the reference VLMs are what the benchmark writes from their figures."""

import json

import pytest

from benchmarks.reference_card import SUBJECTS, card


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_card_is_written_from_its_figures_and_recipe(name: str) -> None:
    subject = SUBJECTS[name]
    text = (subject.weights.parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    figures = json.loads(text.rpartition("<!-- ")[2].partition(" -->")[0])
    recipe = json.loads((subject.weights.parent / "recipe.json").read_text(encoding="utf-8"))
    assert card(subject, figures, recipe) == text
    assert f"**{figures['dense']['macro'][0]:.3f} [" in text
