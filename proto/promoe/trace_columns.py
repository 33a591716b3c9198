"""The columns of a trace file: trace events as rows of an Arrow table, and back.

One row per event in the order of the trace; `kind` says which columns a row fills, the others are null. Hidden states
are the little-endian bytes of bfloat16, row-major: it has float32's range (residual streams have outliers that float16
turns into infinity), and models that compute in it lose nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Final, TypeAlias

import numpy as np
import pyarrow as pa

from promoe.hint import Float32Array, Hint, IdArray, StepSpan
from promoe.hint_wire import decode_tensor, encode_tensor
from promoe.ids import ExpertId
from promoe.model_spec import Dtype
from promoe.trace_events import HintEvent, HintFate, LayerEvent, LoadEvent, LoadReason, StepEvent, TraceEvent
from promoe.v1 import predictor_pb2
from promoe.wire import DTYPE_TO_WIRE


class RowKind(Enum):
    """Which event a row is; the value is what the file has in `kind`."""

    STEP = 0
    HINT = 1
    LOAD = 2
    LAYER = 3


HIDDEN_COLUMNS: Final = ("layer_input", "router_input", "last_output")
"""Most of a file's bytes, where hidden states were recorded at all."""

SCHEMA: Final = pa.schema(
    [
        ("kind", pa.uint8()),
        ("at_s", pa.float64()),
        ("step", pa.uint64()),
        ("layer", pa.uint16()),
        # Steps.
        ("span_request_ids", pa.list_(pa.string())),
        ("span_num_tokens", pa.list_(pa.uint32())),
        ("span_is_prefill", pa.list_(pa.bool_())),
        ("ended_request_ids", pa.list_(pa.string())),
        ("link_bytes_per_s", pa.float64()),
        # Hints; `look` is a load's, too.
        ("observed_step", pa.uint64()),
        ("observed_layer", pa.uint16()),
        ("experts", pa.list_(pa.uint16())),
        ("scores", pa.list_(pa.float32())),
        ("num_expected", pa.uint32()),
        ("version", pa.string()),
        ("fate", pa.string()),
        ("latency_s", pa.float64()),
        ("look", pa.uint32()),
        # Loads; `end_s` is a layer's, too.
        ("begin_s", pa.float64()),
        ("end_s", pa.float64()),
        ("expert", pa.uint16()),
        ("reason", pa.string()),
        ("nbytes", pa.uint64()),
        ("is_paused", pa.bool_()),
        # Layers.
        ("num_tokens", pa.uint32()),
        ("topk_ids", pa.list_(pa.uint16())),
        ("hits", pa.list_(pa.uint16())),
        ("misses", pa.list_(pa.uint16())),
        ("late", pa.list_(pa.uint16())),
        ("stall_s", pa.float64()),
        ("rows", pa.list_(pa.uint32())),
        ("layer_input", pa.binary()),
        ("router_input", pa.binary()),
        ("last_output", pa.binary()),
    ]
)

_ARRAY_COLUMNS: Final = ("topk_ids", "experts", "scores")
"""Lists that are arrays in the event, too; the others are tuples."""

Row: TypeAlias = Mapping[str, object]
_ROW_NBYTES: Final = 128
_ITEM_NBYTES: Final = 4


def row_of(event: TraceEvent) -> Row:
    """The columns that this event fills."""
    if isinstance(event, LayerEvent):
        return _layer_row(event)
    if isinstance(event, LoadEvent):
        return {
            "kind": RowKind.LOAD.value,
            "at_s": event.at_s,
            "begin_s": event.begin_s,
            "end_s": event.end_s,
            "layer": event.expert.layer,
            "expert": event.expert.expert,
            "reason": event.reason.value,
            "nbytes": event.nbytes,
            "look": event.look,
            "is_paused": event.is_paused,
        }
    if isinstance(event, StepEvent):
        return {
            "kind": RowKind.STEP.value,
            "at_s": event.at_s,
            "step": event.step,
            "span_request_ids": [span.request_id for span in event.spans],
            "span_num_tokens": [span.num_tokens for span in event.spans],
            "span_is_prefill": [span.is_prefill for span in event.spans],
            "ended_request_ids": list(event.ended_request_ids),
            "link_bytes_per_s": event.link_bytes_per_s,
        }
    return _hint_row(event)


def _layer_row(event: LayerEvent) -> Row:
    row: dict[str, object] = {
        "kind": RowKind.LAYER.value,
        "at_s": event.at_s,
        "end_s": event.end_s,
        "step": event.step,
        "layer": event.layer,
        "num_tokens": event.topk_ids_TK.shape[0],
        "topk_ids": event.topk_ids_TK.reshape(-1),
        "hits": event.hits,
        "misses": event.misses,
        "late": event.late,
        "stall_s": event.stall_s,
        "rows": event.rows,
    }
    for name, hidden_RD in zip(
        HIDDEN_COLUMNS, (event.layer_input_RD, event.router_input_RD, event.last_output_RD), strict=True
    ):
        if hidden_RD is not None:
            row[name] = encode_tensor(hidden_RD, Dtype.BFLOAT16).data
    return row


def _hint_row(event: HintEvent) -> Row:
    hint = event.hint
    return {
        "kind": RowKind.HINT.value,
        "at_s": event.at_s,
        "step": hint.step,
        "layer": hint.layer,
        "observed_step": hint.observed_step,
        "observed_layer": hint.observed_layer,
        "experts": hint.experts,
        "scores": hint.scores,
        "num_expected": hint.num_expected,
        "version": hint.version,
        "fate": event.fate.value,
        "latency_s": event.latency_s,
        "look": event.look,
    }


def row_nbytes(row: Row) -> int:
    """About how much the row takes before compression."""
    nbytes = _ROW_NBYTES
    for value in row.values():
        if isinstance(value, bytes):
            nbytes += len(value)
        elif isinstance(value, np.ndarray):
            nbytes += value.nbytes
        elif isinstance(value, tuple):
            nbytes += _ITEM_NBYTES * len(value)
    return nbytes


def batch_of(rows: Sequence[Row]) -> pa.RecordBatch:
    """Rows as columns."""
    columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in SCHEMA]
    return pa.record_batch(columns, schema=SCHEMA)


class BatchRows:
    """The events of one batch; hidden states only where their columns were read.

    Columns become Python lists and flat arrays once, so that an event costs slices only.

    Raises:
        ValueError: while iterating: a row that is no event.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._integers: dict[str, list[int]] = {}
        self._floats: dict[str, list[float]] = {}
        self._texts: dict[str, list[str]] = {}
        self._blobs: dict[str, list[bytes | None]] = {}
        self._bounds: dict[str, list[int]] = {}
        self._items: dict[str, np.ndarray] = {}
        self._id_items: dict[str, list[int]] = {}
        self._text_items: dict[str, list[str]] = {}
        for field, column in zip(batch.schema, batch.columns, strict=True):
            self._take_column(field, column)

    def _take_column(self, field: pa.Field, column: pa.Array) -> None:
        if pa.types.is_list(field.type):
            self._bounds[field.name] = column.offsets.to_pylist()
            if pa.types.is_string(field.type.value_type):
                self._text_items[field.name] = column.values.to_pylist()
            elif field.name in _ARRAY_COLUMNS:
                self._items[field.name] = column.values.to_numpy()
            else:
                self._id_items[field.name] = column.values.to_pylist()
        elif pa.types.is_integer(field.type) or pa.types.is_boolean(field.type):
            self._integers[field.name] = column.to_pylist()
        elif pa.types.is_floating(field.type):
            self._floats[field.name] = column.to_pylist()
        elif pa.types.is_string(field.type):
            self._texts[field.name] = column.to_pylist()
        else:
            self._blobs[field.name] = column.to_pylist()

    def __iter__(self) -> Iterator[TraceEvent]:
        makers: dict[int, Callable[[int], TraceEvent]] = {
            RowKind.STEP.value: self._step,
            RowKind.HINT.value: self._hint,
            RowKind.LOAD.value: self._load,
            RowKind.LAYER.value: self._layer,
        }
        for row, kind in enumerate(self._integers["kind"]):
            if kind not in makers:
                raise ValueError(f"kind is {kind}; allowed: {', '.join(map(str, makers))}")
            yield makers[kind](row)

    def _array(self, name: str, row: int) -> np.ndarray:
        bounds = self._bounds[name]
        return self._items[name][bounds[row] : bounds[row + 1]]

    def _ids(self, name: str, row: int) -> tuple[int, ...]:
        bounds = self._bounds[name]
        return tuple(self._id_items[name][bounds[row] : bounds[row + 1]])

    def _strings(self, name: str, row: int) -> tuple[str, ...]:
        bounds = self._bounds[name]
        return tuple(self._text_items[name][bounds[row] : bounds[row + 1]])

    def _step(self, row: int) -> StepEvent:
        spans = zip(
            self._strings("span_request_ids", row),
            self._ids("span_num_tokens", row),
            self._ids("span_is_prefill", row),
            strict=True,
        )
        return StepEvent(
            at_s=self._floats["at_s"][row],
            step=self._integers["step"][row],
            spans=tuple(StepSpan(request_id, tokens, bool(prefill)) for request_id, tokens, prefill in spans),
            ended_request_ids=self._strings("ended_request_ids", row),
            link_bytes_per_s=self._floats["link_bytes_per_s"][row],
        )

    def _hint(self, row: int) -> HintEvent:
        hint = Hint(
            step=self._integers["step"][row],
            layer=self._integers["layer"][row],
            observed_step=self._integers["observed_step"][row],
            observed_layer=self._integers["observed_layer"][row],
            experts=self._array("experts", row),
            scores=self._array("scores", row),
            num_expected=self._integers["num_expected"][row],
            version=self._texts["version"][row],
        )
        fate = HintFate(self._texts["fate"][row])
        return HintEvent(
            self._floats["at_s"][row], hint, fate, self._floats["latency_s"][row], self._integers["look"][row]
        )

    def _load(self, row: int) -> LoadEvent:
        return LoadEvent(
            at_s=self._floats["at_s"][row],
            begin_s=self._floats["begin_s"][row],
            end_s=self._floats["end_s"][row],
            expert=ExpertId(self._integers["layer"][row], self._integers["expert"][row]),
            reason=LoadReason(self._texts["reason"][row]),
            nbytes=self._integers["nbytes"][row],
            look=self._integers["look"][row],
            is_paused=bool(self._integers["is_paused"][row]),
        )

    def _layer(self, row: int) -> LayerEvent:
        topk_ids: IdArray = self._array("topk_ids", row)
        rows = self._ids("rows", row)
        num_tokens = self._integers["num_tokens"][row]
        return LayerEvent(
            at_s=self._floats["at_s"][row],
            end_s=self._floats["end_s"][row],
            step=self._integers["step"][row],
            layer=self._integers["layer"][row],
            topk_ids_TK=topk_ids.reshape(num_tokens, -1 if num_tokens else 0),
            hits=self._ids("hits", row),
            misses=self._ids("misses", row),
            late=self._ids("late", row),
            stall_s=self._floats["stall_s"][row],
            rows=rows,
            layer_input_RD=self._hidden("layer_input", row, len(rows)),
            router_input_RD=self._hidden("router_input", row, len(rows)),
            last_output_RD=self._hidden("last_output", row, len(rows)),
        )

    def _hidden(self, name: str, row: int, num_rows: int) -> Float32Array | None:
        data = self._blobs[name][row] if name in self._blobs else None
        if data is None or not num_rows:
            return None
        shape = (num_rows, len(data) // (num_rows * Dtype.BFLOAT16.itemsize))
        return decode_tensor(predictor_pb2.Tensor(dtype=DTYPE_TO_WIRE[Dtype.BFLOAT16], shape=shape, data=data))
