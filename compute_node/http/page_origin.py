"""Whether a change is asked for by this node's own page, or by a program: other web pages must not get a browser to do
it, whose user may be let in where they are not."""

from typing import Final
from urllib.parse import urlsplit

from fastapi import Request

from compute_node.http.api_error import ApiError
from compute_node.http.http_server import is_loopback

_OWN_SITES: Final = ("same-origin", "none")


class PageOrigin:
    """Checks a request before it changes anything. Programs send none of what browsers say of themselves.

    Args:
        trusted: further origins, as `compute.http_cors_origins` has them.
        is_open: no key is needed. Then a name that is not this machine's own is not believed either: another site's
            name may have been made to point here.
    """

    def __init__(self, trusted: tuple[str, ...], is_open: bool) -> None:
        self._trusted = frozenset(trusted)
        self._is_open = is_open

    async def check(self, request: Request) -> None:
        """A dependency of the routes that change something.

        Raises:
            ApiError: the request is not JSON, or comes from somebody else's page.
        """
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise ApiError(415, f"content-type is {content_type!r}; allowed: application/json.")
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
        is_from_page = origin is not None or site is not None
        if not is_from_page or origin in self._trusted:
            return
        host = request.headers.get("host", "")
        is_own = site in _OWN_SITES if site is not None else origin == f"{request.url.scheme}://{host}"
        if not is_own or (self._is_open and not _is_address(host)):
            raise ApiError(
                403,
                f"This change was asked for by a page of {origin or 'another site'}; allowed: the page of this node, "
                "and those of compute.http_cors_origins.",
                code="foreign_page",
            )


def _is_address(host: str) -> bool:
    """An address in figures, or this machine's own name: no name service can have changed it."""
    name = urlsplit(f"//{host}").hostname or ""
    return is_loopback(name) or name.replace(".", "").isdecimal() or ":" in name
