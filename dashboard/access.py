"""Who may see the page: whoever has the token, at an address that the server expects."""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REFUSAL = (
    "401: the token is missing or wrong; open the address with ?token=... that the run, or `launch.py dashboard`, "
    "printed when it started\n"
)
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class TokenGate:
    """Lets requests through that bring the token: as `Authorization: Bearer`, or in the cookie that `?token=` gave.

    `?token=` is answered with the cookie (HttpOnly, SameSite=Strict) and a redirect to `/`, so that the token stays in
    neither the address bar nor the history. Everything else gets 401 and one line. Comparisons take the same time
    wherever the texts differ. Every answer carries `HEADERS`.
    """

    def __init__(self, app: ASGIApp, token: str, cookie: str) -> None:
        """`cookie`: its name, of this server alone: cookies are shared by all ports of a host."""
        self._app, self._token, self._cookie = app, token, cookie
        # A token that a person chose may hold what a cookie may not.
        self._mark = hashlib.sha256(f"cookie {token}".encode()).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        await (self._answer(scope) or self._app)(scope, receive, guarded)

    def _answer(self, scope: Scope) -> Response | None:
        """What to say instead of the page; None lets the request through."""
        offered = parse_qs(scope["query_string"].decode("latin-1")).get("token")
        if offered is not None and _equal(offered[-1], self._token):
            redirect = RedirectResponse("/", status_code=303)
            redirect.set_cookie(self._cookie, self._mark, httponly=True, samesite="strict", path="/")
            return redirect
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        carried = cookie_parser(headers.get("cookie", "")).get(self._cookie, "")
        allowed = _equal(carried, self._mark) or (scheme.lower() == "bearer" and _equal(bearer, self._token))
        if allowed and offered is None:
            return None
        return PlainTextResponse(REFUSAL, status_code=401, headers={"WWW-Authenticate": "Bearer"})


def _equal(offered: str, right: str) -> bool:
    return hmac.compare_digest(offered.strip().encode(), right.encode())
