"""A check from outside: easy-VQA (MIT, https://github.com/vzhou842/easy-VQA), drawn by others and never trained on.

One flat shape on white, 64 pixels a side; questions about its kind and colour, some with a negation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import datasets

__all__ = ["easy_vqa"]


def easy_vqa(num_questions: int, seed: int = 0) -> datasets.Dataset:
    """Columns image, question, answer, task ("exact"): a seeded draw from easy-VQA's test questions, capitalised.

    Raises ImportError, with the way out, where the package is not installed.
    """
    import datasets

    try:
        from easy_vqa import get_test_image_paths, get_test_questions
    except ImportError as error:
        raise ImportError(f"easy_vqa() needs easy-VQA's pictures, got: {error}; run `pip install easy-vqa`") from error
    asked, answers, pictures = get_test_questions()
    paths = get_test_image_paths()
    chosen = np.random.default_rng(seed).permutation(len(asked))[:num_questions]
    text = datasets.Value("string")
    return datasets.Dataset.from_dict(
        {
            "image": [paths[pictures[i]] for i in chosen],
            "question": [asked[i].capitalize() for i in chosen],
            "answer": [answers[i] for i in chosen],
            "task": ["exact"] * len(chosen),
        },
        features=datasets.Features(image=datasets.Image(), question=text, answer=text, task=text),
    )
