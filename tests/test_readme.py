"""The README's own code runs, and its tables are complete."""

import re
from pathlib import Path

import pytest
import torch

from btp import SELECTORS, Plan, Stage, presets, prune
from btp.families import _FAMILIES
from btp.testing import SelectorContract
from tests.btp.families import FAMILIES

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(name):
    """The Python between <!-- name --> and <!-- /name -->."""
    between = re.search(rf"<!-- {name} -->\n```python\n(.*?)```\n<!-- /{name} -->", README, re.DOTALL)
    return between[1]


@pytest.fixture(scope="module", autouse=True)
def own_selector():
    exec(compile(block("selector"), "README.md", "exec"), {})
    yield
    del SELECTORS["cls"]


class TestOwnSelector(SelectorContract):
    selectors = ("cls",)


def test_an_own_selector_is_short_and_serves_a_plan():
    assert len(block("selector").splitlines()) < 30
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].inputs(2, padding="left")
    with torch.no_grad(), prune(model, Plan(stages=(Stage(layer=0, keep=0.4, selector="cls"),))) as trace:
        model.generate(**inputs, max_new_tokens=2)
    assert trace.counts == (10,) * 4


def test_the_table_has_every_system():
    for key in presets.SYSTEMS:
        name = {"random": "random_control", "uniform": "uniform_control", "todre_k_center": "todre"}.get(key, key)
        assert f"`{name.removesuffix('_max_sum')}" in README


def test_every_picture_is_there():
    named = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert "docs/dashboard.png" in named
    assert [name for name in named if not (Path(__file__).parents[1] / name).is_file()] == []


def test_the_table_has_every_model_class():
    assert {name for name in _FAMILIES if f"`{name}`" not in README} == set()
