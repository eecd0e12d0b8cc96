"""What is known of a plan's answers, sample by sample, and how parts of it are put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

__all__ = ["Realised", "Scores", "in_order", "joined"]

Realised = Counter[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Scores:
    """Per-sample answers, scores in [0, 1], and distances from the dense model, in the order of the examples.

    realised: the image tokens by layer that prefills had, each with the number of samples that had them. kl, nll:
    means over the tokens of the dense model's own answer, its end included, of KL(dense || pruned) in nats, and of
    -log p under the pruned model.
    """

    answers: tuple[str, ...]
    scores: tuple[float, ...]
    realised: tuple[tuple[tuple[int, ...], int], ...]
    kl: tuple[float, ...]
    nll: tuple[float, ...]

    @property
    def commonest(self) -> tuple[int, ...]:
        """The image tokens by layer that most prefills had."""
        return max(self.realised, key=lambda counted: counted[1])[0]


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of the parts' samples, one part after the other."""
    realised: Realised = Counter()
    for part in parts:
        realised.update(dict(part.realised))
    return Scores(
        answers=tuple(chain.from_iterable(part.answers for part in parts)),
        scores=tuple(chain.from_iterable(part.scores for part in parts)),
        realised=tuple(sorted(realised.items())),
        kl=tuple(chain.from_iterable(part.kl for part in parts)),
        nll=tuple(chain.from_iterable(part.nll for part in parts)),
    )


def in_order(parts: Sequence[Scores], samples: Sequence[int]) -> Scores:
    """The scores of all the parts' samples, by their rising numbers; these come in the order of the parts."""
    whole = joined(parts)
    order = sorted(range(len(samples)), key=samples.__getitem__)
    return Scores(
        answers=tuple(whole.answers[place] for place in order),
        scores=tuple(whole.scores[place] for place in order),
        realised=whole.realised,
        kl=tuple(whole.kl[place] for place in order),
        nll=tuple(whole.nll[place] for place in order),
    )
