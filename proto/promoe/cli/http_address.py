"""Where a stack's OpenAI-compatible HTTP API listens: as asked, or at a port that is free."""

from dataclasses import dataclass
from typing import Final

from promoe.cli.stack_plan import check_port_free, reachable, with_free_port
from promoe.errors import AlreadyRunning, InvalidInput

DEFAULT_HTTP_LISTEN: Final = "127.0.0.1:8080"
NO_HTTP: Final = "none"


@dataclass(frozen=True)
class HttpAddress:
    """What was decided.

    Attributes:
        listen: `host:port`, or empty for no HTTP API.
        is_fallback: the default port was taken by somebody else.
    """

    listen: str
    is_fallback: bool = False

    @property
    def url(self) -> str:
        """What clients on this machine use as their base URL; empty for no HTTP API."""
        return f"http://{reachable(self.listen)}/v1" if self.listen else ""

    def sentence(self) -> str:
        """For people."""
        if not self.listen:
            return "There is no HTTP API, as asked."
        why = f" ({DEFAULT_HTTP_LISTEN} is taken; --http gives another address)" if self.is_fallback else ""
        return f"OpenAI-compatible API: {self.url} · its page: {self.url.removesuffix('v1')}{why}"


def plan_http(asked: str | None) -> HttpAddress:
    """The address that was asked for, or else the default one, or else a free port.

    Args:
        asked: `host:port`; `none` or empty for no HTTP API; None when nobody asked.

    Raises:
        InvalidInput: it is no address.
        AlreadyRunning: it was asked for and is taken.
    """
    if asked in ("", NO_HTTP):
        return HttpAddress("")
    if asked is not None:
        if asked.startswith("unix:"):
            raise InvalidInput(f"{asked!r} is not an address for HTTP; write host:port, or {NO_HTTP}.")
        listen = with_free_port(asked)
        check_port_free(listen, "--http")
        return HttpAddress(listen)
    try:
        check_port_free(DEFAULT_HTTP_LISTEN, "--http")
    except AlreadyRunning:
        return HttpAddress(with_free_port("127.0.0.1:0"), is_fallback=True)
    return HttpAddress(DEFAULT_HTTP_LISTEN)
