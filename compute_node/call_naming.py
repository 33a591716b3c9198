"""Gives every gRPC call its name, as `http.edge` does for HTTP: for log lines of what serves it, and for the caller."""

from typing import TYPE_CHECKING

from promoe.log_format import REQUEST_ID, TRACEPARENT
from promoe.request_id import REQUEST_ID_HEADER, TRACEPARENT_HEADER, request_id_of

if TYPE_CHECKING:
    from promoe.rpc import CallContext


async def name_call(context: "CallContext") -> None:
    """Takes the caller's own name for its request from the metadata, or makes one; the initial metadata say which."""
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    request_id = request_id_of(metadata.get(REQUEST_ID_HEADER, ""))
    REQUEST_ID.set(request_id)
    TRACEPARENT.set(metadata.get(TRACEPARENT_HEADER, ""))
    await context.send_initial_metadata(((REQUEST_ID_HEADER, request_id),))
