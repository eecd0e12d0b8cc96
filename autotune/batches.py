"""Examples made ready for the model: pictures encoded once, prompts in batches that lose little to padding.

Shapes: B rows of a batch, S tokens of a prompt, K of them kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from autotune.data import Example
from autotune.prompts import expected_text, prompt_inputs
from btp.encoding import join_pictures, split_pictures
from btp.families import anatomy_of
from btp.prefix import encode_images

__all__ = ["Batch", "Branch", "Prompts"]

IMAGES_AT_ONCE = 8
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Branch:
    """Samples that go on together after a prefill: the row of it that each starts from, and the rest of its prompt."""

    samples: list[int]
    rows: list[int]
    rests: list[list[int]]


@dataclass(frozen=True, slots=True)
class Batch:
    """One prefill, and what goes on after it."""

    inputs: dict[str, Any]
    branches: list[Branch]

    @property
    def num_samples(self) -> int:
        return sum(len(branch.samples) for branch in self.branches)


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture, the samples that ask about it, and with how many tokens, it and one after it included, they begin."""

    samples: list[int]
    num_image_tokens: int
    num_shared: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_image_tokens, self.num_shared


class Prompts:
    """The prompts of a fixed list of examples. Each picture is encoded once, however often it is asked about.

    guesses: the expected answers, in the tokens that the model would say them in.
    """

    def __init__(self, model: Any, processor: Any, examples: Sequence[Example]) -> None:
        self._processor, self._examples, self._device = processor, examples, str(model.device)
        self._image_mask = anatomy_of(model).image_mask
        encode = partial(processor.tokenizer.encode, add_special_tokens=False)
        self.guesses: list[list[int]] = [encode(expected_text(processor, e)) for e in examples]
        self._lengths = [len(encode(e.question)) for e in examples]
        self._encoded: dict[str, Any] = {}  # by picture; empty where the model takes none, or they do not come apart
        self._num_image_tokens: dict[str, int] = {}  # by picture
        self._encode_images(model)

    def whole(self, samples: Iterable[int], batch_size: int) -> list[Batch]:
        """Batches of whole prompts: equally many image tokens, of one length wherever that fills half a batch."""

        def fits(group: Sequence[int], sample: int) -> bool:
            (num_image_tokens, length, *_), (own_num, own_length, *_) = self._order(group[0]), self._order(sample)
            same_picture_size = num_image_tokens == own_num and len(group) < batch_size
            return same_picture_size and (length == own_length or 2 * len(group) < batch_size)

        groups = _grouped(sorted(samples, key=self._order), fits)
        return [
            Batch(self._inputs(group), [Branch(group, list(range(len(group))), [[] for _ in group])])
            for group in groups
        ]

    def by_picture(self, whole: Sequence[Batch], batch_size: int) -> list[Batch]:
        """The same samples, in batches of what all questions about a picture share, a row each picture.

        That is the prompt up to the first token after the picture. Where prompts part before, they stay whole.
        """
        ids = {sample: own for batch in whole for sample, own in _ids(batch)}
        about: dict[str, list[int]] = {}
        for sample in sorted(ids):
            about.setdefault(self._examples[sample].image_id, []).append(sample)
        pictures = [self._picture(own, [ids[sample] for sample in own]) for own in about.values()]
        alone = [sample for picture in pictures if not picture.num_shared for sample in picture.samples]
        groups = _grouped(
            sorted((picture for picture in pictures if picture.num_shared), key=lambda picture: picture.shape),
            lambda group, picture: group[0].shape == picture.shape and len(group) < batch_size,
        )
        return [*self.whole(alone, batch_size), *(self._shared(group, ids, batch_size) for group in groups)]

    def _picture(self, samples: list[int], ids: Sequence[list[int]]) -> _Picture:
        """num_shared is 0 where the prompts part too early."""
        (is_image_S,) = self._image_mask({"input_ids": torch.tensor([ids[0]])})
        num_image_tokens = int(is_image_S.sum())
        if not num_image_tokens:
            return _Picture(samples, 0, 0)
        num_shared = int(is_image_S.nonzero().max()) + 2
        alike = all(own[:num_shared] == ids[0][:num_shared] and len(own) > num_shared for own in ids)
        return _Picture(samples, num_image_tokens, num_shared if alike else 0)

    def _shared(self, pictures: Sequence[_Picture], ids: Mapping[int, list[int]], batch_size: int) -> Batch:
        num_shared = pictures[0].num_shared
        row_of = {sample: row for row, picture in enumerate(pictures) for sample in picture.samples}
        rests = {sample: ids[sample][num_shared:] for sample in row_of}
        length = {sample: len(rest) + len(self.guesses[sample]) for sample, rest in rests.items()}
        branches = _grouped(
            sorted(row_of, key=lambda sample: (-length[sample], sample)),
            lambda group, sample: len(group) < 2 * batch_size and 3 * length[sample] > 2 * length[group[0]],
        )
        inputs = _first_tokens(self._inputs([picture.samples[0] for picture in pictures]), num_shared)
        return Batch(inputs, [Branch(b, [row_of[s] for s in b], [rests[s] for s in b]) for b in branches])

    def _order(self, sample: int) -> tuple[int, int, int, int]:
        num_image_tokens = self._num_image_tokens[self._examples[sample].image_id]
        return num_image_tokens, self._lengths[sample], len(self.guesses[sample]), sample

    def _encode_images(self, model: Any) -> None:
        firsts = list({e.image_id: e for e in self._examples}.values())
        for start in range(0, len(firsts), IMAGES_AT_ONCE):
            chunk = firsts[start : start + IMAGES_AT_ONCE]
            names = [e.image_id for e in chunk]
            inputs = prompt_inputs(self._processor, chunk, self._device)
            self._num_image_tokens.update(zip(names, self._image_mask(inputs).sum(dim=1).tolist(), strict=True))
            with torch.inference_mode():
                encoded = encode_images(model, inputs).get("mm_encoder_outputs")
            pictures = None if encoded is None else split_pictures(encoded["image"])
            if pictures is not None:
                self._encoded.update(zip(names, pictures, strict=True))

    def _inputs(self, samples: Sequence[int]) -> dict[str, Any]:
        examples = [self._examples[sample] for sample in samples]
        inputs = prompt_inputs(self._processor, examples, self._device)
        if not self._encoded:
            return inputs
        pictures = join_pictures([self._encoded[e.image_id] for e in examples])
        kept = {name: value for name, value in inputs.items() if name not in ("pixel_values", "pixel_attention_mask")}
        return {**kept, "mm_encoder_outputs": {"image": pictures}}


def _grouped(items: Iterable[T], fits: Callable[[Sequence[T], T], bool]) -> list[list[T]]:
    """Consecutive items together, as long as the next one fits the group."""
    groups: list[list[T]] = []
    for item in items:
        if groups and fits(groups[-1], item):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _ids(batch: Batch) -> Iterator[tuple[int, list[int]]]:
    """Each sample of a batch of whole prompts with its prompt's tokens."""
    masks = batch.inputs["attention_mask"].bool()
    for sample, ids_S, real_S in zip(batch.branches[0].samples, batch.inputs["input_ids"], masks, strict=True):
        yield sample, ids_S[real_S].tolist()


def _first_tokens(inputs: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
    """Inputs of left-padded prompts with so many tokens of each, and no pads."""
    ids_BS = inputs["input_ids"]
    start_B1 = inputs["attention_mask"].argmax(dim=1, keepdim=True)
    index_BK = start_B1 + torch.arange(num_tokens, device=ids_BS.device)
    return {
        name: value.gather(1, index_BK) if isinstance(value, Tensor) and value.shape == ids_BS.shape else value
        for name, value in inputs.items()
    }
