"""Who looks at the pages: logged in with a key, to a session whose token a cookie holds; and pages as they are sent."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Form, Query, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, RedirectResponse, Response

from autotune import pages
from autotune.server.auth import Promoter, Reader
from autotune.server.dashboard import optuna_ui
from autotune.server.entry import SESSION_S
from autotune.server.problems import title
from autotune.server.service import Service, ServiceParameter

__all__ = ["Promoter", "Viewer", "check_form", "error_page", "frame", "render", "router"]

router = APIRouter(include_in_schema=False)
Viewer = Reader
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",  # Plotly's
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "same-origin"}
"""The referrer is for this site alone; without one, browsers would not say where a form comes from."""


def frame(request: Request) -> pages.Frame:
    """What the frame of every page shows of who looks at it."""
    key = getattr(request.state, "key", None)
    return pages.Frame(
        who="" if key is None else key.name,
        scopes=() if key is None else key.scopes,
        csrf=getattr(request.state, "csrf", ""),
        has_optuna=optuna_ui.is_installed(),
        path=request.scope["path"],
    )


def render(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page."""
    text = pages.environment().get_template(template).render(page=frame(request), **values)
    return HTMLResponse(text, status, HEADERS)


def error_page(request: Request, status: int, detail: str, headers: Mapping[str, str]) -> Response:
    page = render(request, "error.html.jinja", status=status, code=status, name=title(status), detail=detail)
    page.headers.update({name: value for name, value in headers.items() if name not in HEADERS})
    return page


def check_form(request: Request, csrf: str) -> None:
    """Raise HTTPException for a form that is not of a page that this session was shown."""
    _check_origin(request)
    if not hmac.compare_digest(csrf.encode(), request.state.csrf.encode()):
        raise HTTPException(403, "a form must be of a page of this session; load the page anew, and send it again")


def _check_origin(request: Request) -> None:
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    own = site in ("same-origin", "none") if site else origin is None or _host(origin) == request.headers.get("host")
    if not own:
        raise HTTPException(403, "a form must be sent from a page of this site, and this one was not")


def _host(origin: str) -> str:
    return urlsplit(origin).netloc


@router.get("/login")
async def look(
    request: Request,
    service: ServiceParameter,
    next: Annotated[str, Query(max_length=4000)] = "/",
    token: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """The form; or in, with the token of a dashboard that was started alone."""
    if token and service.guest is not None:
        return await _entered(request, service, token, next)
    return _form(request, next)


@router.post("/login")
async def log_in(
    request: Request,
    service: ServiceParameter,
    key: Annotated[str, Form(max_length=200)] = "",
    next: Annotated[str, Form(max_length=4000)] = "/",
) -> Response:
    _check_origin(request)
    return await _entered(request, service, key.strip(), next)


@router.post("/logout")
async def log_out(
    request: Request, service: ServiceParameter, csrf: Annotated[str, Form(max_length=200)] = ""
) -> Response:
    """For whoever came in, whatever their key is for."""
    check_form(request, csrf)
    if token := request.cookies.get(service.cookie):
        await service.entry.close(token)
    response = RedirectResponse("/login", 303)
    response.delete_cookie(service.cookie, path="/", httponly=True, samesite="lax", secure=_is_secure(request))
    return response


async def _entered(request: Request, service: Service, text: str, then: str) -> Response:
    try:
        key = await service.entry.key(text, request.client.host if request.client else "")
    except HTTPException as error:
        if error.status_code != 401:
            raise
        return _form(request, then, wrong=True)
    service.rate.count(str(key.id))
    token = await service.entry.open(key)
    response = RedirectResponse(then if _is_here(then) else "/", 303)
    response.set_cookie(
        service.cookie, token, SESSION_S, path="/", httponly=True, samesite="lax", secure=_is_secure(request)
    )
    return response


def _form(request: Request, then: str, *, wrong: bool = False) -> Response:
    then = then if _is_here(then) else "/"
    alone = request.app.state.service.guest is not None
    return render(request, "login.html.jinja", status=401 if wrong else 200, then=then, wrong=wrong, alone=alone)


def _is_here(address: str) -> bool:
    """Whether it is a path on this site, as every browser reads it."""
    return re.fullmatch(r"/(?![/\\])[!-\[\]-~]*", address) is not None


def _is_secure(request: Request) -> bool:
    return "https" in (request.url.scheme, request.headers.get("x-forwarded-proto", "").partition(",")[0].strip())
