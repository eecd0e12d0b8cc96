"""What is derived once a machine (dequantised weights, merged weights, sprite sheets), and where it lies."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["cache_folder", "made_once"]


def cache_folder(name: str) -> Path:
    """`$BTP_CACHE_DIR/name`, by default `~/.cache/btp-autotune/name`; not made here."""
    return Path(os.environ.get("BTP_CACHE_DIR", "~/.cache/btp-autotune")).expanduser() / name


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by `make` where it is not there yet: whole or not at all, whoever else makes it meanwhile."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        make(draft)
        draft.chmod(0o755)
        draft.rename(folder)
    except BaseException as error:
        shutil.rmtree(draft)
        if isinstance(error, OSError) and folder.is_dir():  # another process was first, and made the same
            return folder
        raise
    return folder
