"""Access to the page: a token for every request, checks against other web sites, and headers of every answer.

The page shows private images and changes files, and every web site that is open in the same browser can send requests
to this computer. So a request needs the token of this start of the server (other users and programs do not know it),
the address of this server as Host (a foreign name that resolves to 127.0.0.1 is DNS rebinding), and no sign of another
page as its origin.
"""

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
UNKNOWN = "Open the address that `dino explore` printed: it contains a token, which is new at every start."
FOREIGN = "This request comes from another page or address. Open the address that `dino explore` printed."


def new_token() -> str:
    """Return 256 random bits as text of an address."""
    return secrets.token_urlsafe(32)


class Guard:
    """ASGI application that passes on the requests of the page and refuses all others.

    The address that the command prints, `/?token=...`, sets a cookie, which the requests of the page carry.
    """

    def __init__(self, application: Application, token: str, port: int) -> None:
        self.application, self.token = application, token
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self.cookie = f"dino-{port}"  # browsers share cookies between the ports of a computer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 to a foreign request and 401 to one without the token; add headers to every answer."""
        if scope["type"] != "http":  # the page has no web sockets, and the server starts no lifespan
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        opening = scope["path"] == "/" and self._is_token(
            *parse_qs(scope["query_string"].decode("latin-1")).get("token", ())
        )
        if self._is_foreign(headers, opening):
            status, reason = 403, FOREIGN
        elif opening or self._is_token(*self._cookies(headers)):
            status, reason = 200, ""
        else:
            status, reason = 401, UNKNOWN

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                added = dict(HEADERS)
                if opening and status == 200:
                    added["set-cookie"] = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((n.encode(), v.encode()) for n, v in added.items())]
                if b"cache-control" not in present:
                    message["headers"].append((b"cache-control", b"no-store"))
            await send(message)

        if status == 200:
            await self.application(scope, receive, send_with_headers)
        else:
            plain = [(b"content-type", b"text/plain; charset=utf-8")]
            await send_with_headers({"type": "http.response.start", "status": status, "headers": plain})
            await send({"type": "http.response.body", "body": f"{reason}\n".encode()})

    def _is_foreign(self, headers: list[tuple[str, str]], opening: bool) -> bool:
        """Return True for another Host or origin. A link in another page may open the page, as it has the token."""
        hosts, origins, sites = (
            [value for name, value in headers if name == header] for header in ("host", "origin", "sec-fetch-site")
        )
        if len(hosts) != 1 or hosts[0] not in self.hosts or any(origin != f"http://{hosts[0]}" for origin in origins):
            return True
        return not opening and any(site not in ("same-origin", "none") for site in sites)

    def _cookies(self, headers: list[tuple[str, str]]) -> list[str]:
        jar = SimpleCookie()
        for name, value in headers:
            if name == "cookie":
                try:
                    jar.load(value)
                except CookieError:
                    continue
        return [jar[self.cookie].value] if self.cookie in jar else []

    def _is_token(self, *given: str) -> bool:
        return len(given) == 1 and secrets.compare_digest(given[0].encode(), self.token.encode())
