"""A trace's tokens come in blocks: each once per pass, document by document, on the side of its document."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from predictor_service.training.token_blocks import Split, TokenBlock, TraceBlocks, split_of
from promoe.errors import InvalidInput, ModelMismatch, ModelNotFound
from promoe.hint import ObservedKind
from promoe.trace_events import LayerEvent, StepEvent
from promoe.trace_file import TraceReader, TraceWriter
from tests.predictor_service.made_up_traces import HIDDEN, LAYERS, PER_TOKEN, LearnableModel, header_of, learnable_spec

DOCUMENTS, TOKENS, PROMPT = 12, 12, 3


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LearnableModel().write_trace(tmp_path_factory.mktemp("traces") / "a.trace", DOCUMENTS)


def blocks_of(path: Path, kind: ObservedKind = ObservedKind.ROUTER_INPUT, **settings: float) -> list[TokenBlock]:
    source = TraceBlocks([path], kind, settings.get("held_out", 0.3), 0, int(settings.get("block_nbytes", 1 << 30)))
    return [block for split in Split for block in source(split)]


def signatures_of(block: TokenBlock) -> list[bytes]:
    """Each token's routing over all layers and its hidden states."""
    tokens = range(len(block.document_N))
    return [block.topk_ids_LNK[:, token].tobytes() + block.hidden_SND[:, token].tobytes() for token in tokens]


def test_every_token_comes_once(trace: Path) -> None:
    blocks = blocks_of(trace)
    signatures = [signature for block in blocks for signature in signatures_of(block)]
    assert len(signatures) == DOCUMENTS * TOKENS
    assert len(set(signatures)) == len(signatures)
    assert sum(int(block.is_decode_N.sum()) for block in blocks) == DOCUMENTS * (TOKENS - PROMPT)


@pytest.mark.parametrize("block_nbytes", [1, 2000, 5000])
def test_small_blocks_hold_the_same(trace: Path, block_nbytes: int) -> None:
    whole = {signature for block in blocks_of(trace) for signature in signatures_of(block)}
    small = blocks_of(trace, block_nbytes=block_nbytes)
    assert len(small) > 4
    assert {signature for block in small for signature in signatures_of(block)} == whole
    assert max(block.hidden_SND.nbytes for block in small) < block_nbytes + 12 * TOKENS * LAYERS * HIDDEN


def test_a_block_has_what_the_trace_has(trace: Path) -> None:
    source = TraceBlocks([trace], ObservedKind.ROUTER_INPUT, 1e-9, 0)
    (block,) = source(Split.TRAIN)
    events = [event for event in TraceReader(trace) if isinstance(event, LayerEvent)]
    hidden = (block.hidden_SND.astype(np.uint32) << 16).view(np.float32)
    for layer in range(LAYERS):
        recorded = [event for event in events if event.layer == layer]
        np.testing.assert_array_equal(hidden[layer], np.concatenate([event.router_input_RD for event in recorded]))
        np.testing.assert_array_equal(block.topk_ids_LNK[layer], np.concatenate([e.topk_ids_TK for e in recorded]))
    np.testing.assert_array_equal(block.document_N, np.repeat(np.arange(DOCUMENTS), TOKENS))


def test_layer_inputs_come_with_the_last_output(trace: Path) -> None:
    (block, *_) = blocks_of(trace, ObservedKind.LAYER_INPUT)
    assert block.hidden_SND.shape[::2] == (LAYERS + 1, HIDDEN)
    assert block.topk_ids_LNK.shape[::2] == (LAYERS, PER_TOKEN)


def test_a_document_is_on_one_side_in_every_pass(trace: Path) -> None:
    source = TraceBlocks([trace], ObservedKind.ROUTER_INPUT, 0.4, 0)
    sides = {split: [s for block in source(split) for s in signatures_of(block)] for split in Split}
    again = {split: [s for block in source(split) for s in signatures_of(block)] for split in Split}
    assert sides == again
    assert all(len(tokens) % TOKENS == 0 and tokens for tokens in sides.values())
    assert not set(sides[Split.TRAIN]) & set(sides[Split.HELD_OUT])


def test_the_share_of_held_out_documents_is_what_was_asked_for() -> None:
    held_out = sum(split_of(f"d{number}", 0.2, 7) is Split.HELD_OUT for number in range(4000))
    assert 700 < held_out < 900
    differ = sum(split_of(f"d{number}", 0.5, 1) is not split_of(f"d{number}", 0.5, 2) for number in range(1000))
    assert 400 < differ < 600


def test_tokens_of_requests_that_run_at_once_are_sorted_out(tmp_path: Path) -> None:
    """Two runs' steps, taken in turns and told as one batch each, are the same documents."""
    model, path = LearnableModel(), tmp_path / "b.trace"
    one, other = list(model.events(1, seed=1)), list(model.events(1, seed=2))
    with TraceWriter(path, header_of(learnable_spec())) as writer:
        for left, right in zip(one, other, strict=True):
            if isinstance(left, StepEvent):
                assert isinstance(right, StepEvent)
                theirs = tuple(replace(span, request_id="r9") for span in right.spans)
                writer.append(replace(left, spans=left.spans + theirs))
                continue
            assert isinstance(left, LayerEvent)
            assert isinstance(right, LayerEvent)
            assert left.router_input_RD is not None
            assert right.router_input_RD is not None
            writer.append(
                replace(
                    left,
                    topk_ids_TK=np.concatenate([left.topk_ids_TK, right.topk_ids_TK]),
                    rows=tuple(range(2 * len(left.rows))),
                    router_input_RD=np.concatenate([left.router_input_RD, right.router_input_RD]),
                    layer_input_RD=None,
                    last_output_RD=None,
                )
            )
    (batched,) = TraceBlocks([path], ObservedKind.ROUTER_INPUT, 1e-9, 0)(Split.TRAIN)
    alone = []
    for seed in (1, 2):
        single = model.write_trace(tmp_path / f"{seed}.trace", 1, seed=seed)
        (block,) = TraceBlocks([single], ObservedKind.ROUTER_INPUT, 1e-9, 0)(Split.TRAIN)
        alone += signatures_of(block)
    assert signatures_of(batched) == alone


def test_a_step_that_lacks_a_layer_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "gaps.trace"
    with TraceWriter(path, header_of(learnable_spec())) as writer:
        for event in LearnableModel().events(2):
            if not (isinstance(event, LayerEvent) and event.layer == 2 and event.step == 3):
                writer.append(event)
    blocks = blocks_of(path, held_out=1e-9)
    assert sum(len(block.document_N) for block in blocks) == 2 * TOKENS - 1


def test_a_trace_without_hidden_states_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bare.trace"
    with TraceWriter(path, header_of(learnable_spec())) as writer:
        for event in LearnableModel().events(2):
            writer.append(replace(event, router_input_RD=None) if isinstance(event, LayerEvent) else event)
    with pytest.raises(InvalidInput, match="no router_input"):
        blocks_of(path)
    assert blocks_of(path, ObservedKind.LAYER_INPUT)


def test_traces_of_two_models_are_refused(trace: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.trace"
    with TraceWriter(other, header_of(replace(learnable_spec(), fingerprint="deadbeef"))):
        pass
    with pytest.raises(ModelMismatch, match=r"0badcafe.*deadbeef"):
        TraceBlocks([trace, other], ObservedKind.ROUTER_INPUT, 0.1, 0)


def test_no_trace_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        TraceBlocks([tmp_path / "none.trace"], ObservedKind.ROUTER_INPUT, 0.1, 0)
