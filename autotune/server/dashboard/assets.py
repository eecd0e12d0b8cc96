"""Scripts and styles: open to all, compressed once, and kept by browsers where their address names the content."""

from __future__ import annotations

import functools
import gzip
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from autotune import pages

__all__ = ["router"]

router = APIRouter(include_in_schema=False)
FOR_EVER = "public, max-age=31536000, immutable"
TEXTS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
CHARSET = "; charset=utf-8"


@dataclass(frozen=True, slots=True)
class _Asset:
    content: bytes
    compressed: bytes
    media_type: str
    address: str

    @property
    def tag(self) -> str:
        return f'"{self.address.rpartition("=")[2]}"'


@functools.cache
def _assets() -> dict[str, _Asset]:
    return {path.name: _read(path.name) for path in sorted(pages.STATIC.iterdir()) if path.suffix in TEXTS}


def _read(file: str) -> _Asset:
    path = pages.STATIC / file
    content = path.read_bytes()
    return _Asset(content, gzip.compress(content, mtime=0), TEXTS[path.suffix] + CHARSET, pages.asset(file))


@router.get("/assets/{file}")
def get(file: str, request: Request) -> Response:
    found = _assets().get(file)
    if found is None:
        raise HTTPException(404, f"there must be an asset {file!r}, but there is none")
    named = f"{request.url.path}?{request.url.query}" == found.address
    headers = {"ETag": found.tag, "Vary": "Accept-Encoding", "Cache-Control": FOR_EVER if named else "no-cache"}
    if request.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    if "gzip" not in request.headers.get("accept-encoding", ""):
        return Response(found.content, headers=headers, media_type=found.media_type)
    return Response(found.compressed, headers={**headers, "Content-Encoding": "gzip"}, media_type=found.media_type)
