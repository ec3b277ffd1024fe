"""GET /: a page for people, one static file."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_BODY = (files("quire.server") / "static" / "index.html").read_bytes()


def _digests(tag: str) -> str:
    """The inline contents of a tag as sources of a Content-Security-Policy."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), _BODY, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)


_HEADERS = {
    # Only the page's own script and styles run, and it talks to nobody but this server.
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_digests('script')}; style-src {_digests('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def page(request: Request) -> Response:
    """Answers GET /."""
    return Response(_BODY, headers=_HEADERS, media_type="text/html")


routes = [Route("/", page, methods=["GET"])]
