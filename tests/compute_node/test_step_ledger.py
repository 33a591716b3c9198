"""The ledger numbers steps and says who ended since the one before."""

from compute_node.step_ledger import Phase, StepLedger, TokenSpan
from promoe.hint import StepSpan, StepStart


def ledger_with_log() -> tuple[StepLedger, list[StepStart]]:
    ledger = StepLedger()
    log: list[StepStart] = []
    ledger.listeners = (log.append,)
    return ledger, log


def test_steps_count_up_from_one_and_every_listener_hears_of_them_in_order() -> None:
    ledger, log = ledger_with_log()
    order: list[str] = []
    ledger.listeners = (*ledger.listeners, lambda _: order.append("a"), lambda _: order.append("b"))
    ledger.begin_step([TokenSpan("x", 3, Phase.PREFILL), TokenSpan("y", 1, Phase.DECODE)])
    ledger.end_step()
    ledger.begin_step([TokenSpan("x", 1, Phase.DECODE)])
    assert log == [
        StepStart(1, (StepSpan("x", 3, True), StepSpan("y", 1, False))),
        StepStart(2, (StepSpan("x", 1, False),)),
    ]
    assert (log[0].num_tokens, ledger.step) == (4, 2)
    assert order == ["a", "b"] * 2


def test_an_end_is_told_once_with_the_next_step() -> None:
    ledger, log = ledger_with_log()
    ledger.begin_step([TokenSpan("x", 3, Phase.PREFILL), TokenSpan("y", 2, Phase.PREFILL)])
    ledger.end_step()
    ledger.take("y")
    ledger.take("x")
    ledger.take("x")
    ledger.begin_step([TokenSpan("z", 1, Phase.PREFILL)])
    ledger.begin_step([TokenSpan("z", 1, Phase.DECODE)])
    assert [start.ended_request_ids for start in log] == [(), ("y", "x"), ()]


def test_who_was_never_in_a_step_does_not_end() -> None:
    ledger, log = ledger_with_log()
    assert ledger.take("cancelled while it waited").decode.hits == 0
    ledger.begin_step([])
    assert log[0].ended_request_ids == ()


def test_an_end_is_told_when_nobodys_rows_are_computed_any_more() -> None:
    ledger, _ = ledger_with_log()
    seen: list[tuple[TokenSpan, ...]] = []
    ledger.end_listeners = (lambda: seen.append(ledger.spans),)
    ledger.begin_step([TokenSpan("x", 3, Phase.PREFILL)])
    assert seen == []
    ledger.end_step()
    assert seen == [()]
