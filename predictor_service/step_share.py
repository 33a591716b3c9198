"""The part of a step that belongs to some of its requests, as if they had been alone in it."""

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
        # By row of the whole step: which row of the part it is.
        self._row_of: dict[int, int] | None = None
        if takes is None:
            return
        spans: list[StepSpan] = []
        row_of: dict[int, int] = {}
        row = 0
        for span in whole.spans:
            if takes(span.request_id):
                spans.append(span)
                rows = range(row, row + span.num_tokens)
                row_of.update(zip(rows, range(len(row_of), len(row_of) + len(rows)), strict=True))
            row += span.num_tokens
        if len(spans) < len(whole.spans):
            self.start = replace(whole, spans=tuple(spans))
            self._row_of = row_of

    def of(self, observation: Observation) -> Observation | None:
        """What this part's rows are in it; None when none of them were sampled."""
        if self._row_of is None:
            return observation
        places = [place for place, row in enumerate(observation.rows) if row in self._row_of]
        if not places:
            return None
        hidden_RD = observation.hidden_RD
        places_R = np.array(places, np.intp)
        return replace(
            observation,
            rows=tuple(self._row_of[observation.rows[place]] for place in places),
            num_tokens=self.start.num_tokens,
            hidden_RD=None if hidden_RD is None else hidden_RD[places_R],
            routings=tuple(
                LayerRouting(routing.layer, routing.topk_ids_RK[places_R], routing.ready)
                for routing in observation.routings
            ),
        )
