"""What the dashboard's pages and reports show, as plain data, and the templates that they are made with.

Knows nothing of HTTP: who serves a page, or writes it into a file, hands in what the templates ask for.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

__all__ = ["STATIC", "Frame", "asset", "environment"]

STATIC = Path(__file__).parent / "static"
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """What is about every page. who: the name of the key, or empty; csrf: what its forms must carry.

    has_optuna: whether Optuna's own dashboard is there. path: of this page.
    """

    who: str = ""
    scopes: tuple[str, ...] = ()
    csrf: str = ""
    has_optuna: bool = False
    path: str = "/"


@functools.cache
def environment() -> Environment:
    """The templates: what is put in is escaped, what is missing is an error, and so is NaN in a script's data."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    found.globals["asset"] = asset
    found.filters["urlquote"] = functools.partial(quote, safe="")
    found.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return found


@functools.cache
def asset(file: str) -> str:
    """Where a static file is served, its content's digest with it: another content has another address."""
    digest = hashlib.sha256((STATIC / file).read_bytes()).hexdigest()
    return f"/assets/{file}?v={digest[:12]}"
