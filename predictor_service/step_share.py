"""The part of a step that belongs to some of its requests, as if they had been alone in it."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from promoe.hint import LayerRouting, Observation, StepSpan, StepStart


class StepShare:
    """Of one step; `start` has the requests' spans only.

    Args:
        whole: the step as it is.
        takes: whether a request belongs to this part; None: all do.
    """

    def __init__(self, whole: StepStart, takes: Callable[[str], bool] | None = None) -> None:
        self.start = whole
        self._is_whole = True
        if takes is None:
            return
        spans: list[StepSpan] = []
        # Of each span of the whole step: the row behind it, and by how much its rows are fewer in the part, or None.
        # Never a thing per row: a node may say that a prompt has any number of tokens.
        self._ends: list[int] = []
        self._shifts: list[int | None] = []
        end = left_out = 0
        for span in whole.spans:
            end += span.num_tokens
            is_taken = takes(span.request_id)
            self._ends.append(end)
            self._shifts.append(left_out if is_taken else None)
            if is_taken:
                spans.append(span)
            else:
                left_out += span.num_tokens
        if len(spans) < len(whole.spans):
            self.start = replace(whole, spans=tuple(spans))
            self._is_whole = False

    def of(self, observation: Observation) -> Observation | None:
        """What this part's rows are in it; None when none of them were sampled."""
        if self._is_whole:
            return observation
        rows_of_part = [self._row_of(row) for row in observation.rows]
        places = [place for place, row in enumerate(rows_of_part) if row is not None]
        if not places:
            return None
        hidden_RD = observation.hidden_RD
        places_R = np.array(places, np.intp)
        return replace(
            observation,
            rows=tuple(row for row in rows_of_part if row is not None),
            num_tokens=self.start.num_tokens,
            hidden_RD=None if hidden_RD is None else hidden_RD[places_R],
            routings=tuple(
                LayerRouting(routing.layer, routing.topk_ids_RK[places_R], routing.ready)
                for routing in observation.routings
            ),
        )

    def _row_of(self, row: int) -> int | None:
        """In the part; None for another part's, and for one that the step does not have."""
        span = bisect_right(self._ends, row)
        shift = self._shifts[span] if span < len(self._shifts) else None
        return None if shift is None else row - shift
