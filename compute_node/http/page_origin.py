"""Whether a change is asked for by this node's own page, or by a program: other web pages must not get a browser to do
it, whose user may be let in where they are not."""

from typing import Final

from fastapi import Request

from compute_node.http.api_error import ApiError

_OWN_SITES: Final = ("same-origin", "none")


class PageOrigin:
    """Checks a request before it changes anything. Programs send none of what browsers say of themselves.

    Args:
        trusted: further origins, as `compute.http_cors_origins` has them.
    """

    def __init__(self, trusted: tuple[str, ...]) -> None:
        self._trusted = frozenset(trusted)

    async def check(self, request: Request) -> None:
        """A dependency of the routes that change something.

        Raises:
            ApiError: the request is not JSON, or comes from somebody else's page.
        """
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise ApiError(415, f"content-type is {content_type!r}; allowed: application/json.")
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
        if origin in self._trusted:
            return
        own = f"{request.url.scheme}://{request.headers.get('host', '')}"
        # Behind a proxy the page's own origin has another name; what a browser says of the site is still true.
        is_own = site in _OWN_SITES if site is not None else origin in (None, own)
        if not is_own:
            raise ApiError(
                403,
                f"This change was asked for by a page of {origin or 'another site'}; allowed: the page of this node, "
                "and those of compute.http_cors_origins.",
                code="foreign_page",
            )
