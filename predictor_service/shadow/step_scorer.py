"""Scores one session's hints against the routing that followed: of whoever made them, and of a candidate beside it.

Only steps in which every token is decoded and was shown are scored: a hint is for the union over the tokens. Knows no
wire and no process.
"""

from collections.abc import Callable, Sequence

from predictor_service.shadow.tally import StepComparison, VersionTally
from promoe.hint import Hint, LayerRouting, Observation, StepStart

_Visit = tuple[int, int]
"""Step and layer."""


class StepScorer:
    """Of one session. Hints are filed after the routings that came with them: who predicts what is known, is late.

    Args:
        tally_of: of a version.
        shadow: the candidate's version; empty for none.
        compared: is told of each step that both were scored in.
    """

    def __init__(
        self, tally_of: Callable[[str], VersionTally], shadow: str, compared: Callable[[StepComparison], None]
    ) -> None:
        self._tally_of = tally_of
        self._shadow = shadow
        self._compared = compared
        self._start: StepStart | None = None
        self._is_scored = False
        # By the visit of a layer and version: the newest hint.
        self._hints: dict[_Visit, dict[str, Hint]] = {}
        # Of the running step, by version: experts found, and layers. And all that were routed in those layers.
        self._found: dict[str, int] = {}
        self._routed = 0

    def begin_step(self, start: StepStart) -> None:
        """The step before is over."""
        self.end_step()
        self._start = start
        self._is_scored = bool(start.spans) and not any(span.is_prefill for span in start.spans)
        self._hints = {visit: hints for visit, hints in self._hints.items() if visit[0] >= start.step}

    def end_step(self) -> None:
        """Closes the running step's account."""
        if self._start is not None and self._found:
            self._compare(self._start)
        for version in self._found:
            self._tally_of(version).steps += 1
        self._found, self._routed = {}, 0

    def observe(self, observation: Observation, hints: Sequence[Hint]) -> None:
        """What a layer's routing was, and what everybody says then."""
        start = self._start
        if start is None or observation.step != start.step:
            return
        if self._is_scored and len(observation.rows) == observation.num_tokens:
            for routing in observation.routings:
                self._score(start, routing)
        for hint in hints:
            self._hints.setdefault((hint.step, hint.layer), {})[hint.version] = hint

    def _score(self, start: StepStart, routing: LayerRouting) -> None:
        hints = self._hints.pop((start.step, routing.layer), {})
        makers = [version for version in hints if version != self._shadow]
        if not hints or len(makers) > 1:
            # Nobody said anything, or two did, each of a part of the requests.
            return
        routed = set(routing.topk_ids_RK.ravel().tolist())
        # Who says nothing where another one does, finds nothing there.
        versions = {*self._found, *hints, *([self._shadow] if self._shadow else [])}
        if not makers and start.version and start.version != self._shadow:
            versions.add(start.version)
        for version in versions:
            self._add(version, hints.get(version), routed, routing.ready)
        self._routed += len(routed)

    def _add(self, version: str, hint: Hint | None, routed: set[int], ready: Sequence[int] | None) -> None:
        tally = self._tally_of(version)
        tally.layers += 1
        tally.routed += len(routed)
        self._found.setdefault(version, 0)
        if hint is None:
            return
        experts: list[int] = hint.experts.tolist()
        head = set(experts[: hint.num_expected])
        tally.hinted += len(head)
        tally.correct += len(routed & head)
        tally.ready += len(head.intersection(ready or ()))
        found = len(routed.intersection(experts[: len(routed)]))
        tally.found += found
        self._found[version] += found

    def _compare(self, start: StepStart) -> None:
        makers = [version for version in self._found if version != self._shadow]
        if not self._shadow or self._shadow not in self._found or len(makers) != 1 or not self._routed:
            return
        self._compared(
            StepComparison(
                request_ids=tuple(span.request_id for span in start.spans),
                active_version=makers[0],
                shadow_version=self._shadow,
                active_score=self._found[makers[0]] / self._routed,
                shadow_score=self._found[self._shadow] / self._routed,
            )
        )
