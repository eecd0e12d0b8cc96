"""What is declared of the selectors' reading, held against what they read."""

from dataclasses import fields, replace

import pytest
import torch

from btp import Stage
from btp.selection import PICTURE_ONLY, READS, SELECTORS
from btp.testing import SelectorContract

OTHER = {
    "attention_weight": (0.0, 0.3, 0.6),
    "oversample": (1.0, 2.0, 3.0),
    "attention": ("softmax", "logits"),
    "seeds": (0.0, 0.5),
    "layer": (3,),
    "attention_below": (0.5,),
}
STAGE = Stage(layer=0, keep=0.3, attention_weight=0.4, oversample=1.5, attention="softmax", seeds=0.25)
# Head means of logits and of softmax rank differently, but a view over plain tensors has one head: swap two scores.
VIEW = SelectorContract()._tokens()
VIEW.attention.logits[:, :2] = VIEW.attention.logits[:, :2].flip(1)


def selected(name, view, **settings):
    return SELECTORS[name](view, 9, replace(STAGE, selector=name, **settings))


def test_the_declarations_speak_of_every_selector_and_setting():
    assert set(READS) == set(SELECTORS)
    assert set(SELECTORS) >= PICTURE_ONLY
    assert set(OTHER) == {field.name for field in fields(Stage)} - {"keep", "selector"}


@pytest.mark.parametrize("setting", sorted(OTHER))
@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_a_choice_changes_with_the_settings_it_reads_and_with_no_other(name, setting):
    before = selected(name, VIEW)
    changed = any(not torch.equal(selected(name, VIEW, **{setting: value}), before) for value in OTHER[setting])
    assert changed == (setting in READS[name])


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_only_selectors_of_the_picture_alone_do_without_the_text(name, weight):
    def refuse():
        raise AssertionError("read")

    blind = replace(SelectorContract()._tokens(), read_text=refuse, read_attention=refuse)
    if name in PICTURE_ONLY:
        assert torch.equal(selected(name, blind, attention_weight=weight), selected(name, VIEW))
    elif weight > 0:
        with pytest.raises(AssertionError, match="read"):
            selected(name, blind, attention_weight=weight)
