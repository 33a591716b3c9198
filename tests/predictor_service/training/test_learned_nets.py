"""Layers that were not shown cost nothing and teach nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from predictor_service.training.learned_nets import LearnedNets
from predictor_service.training.token_batch import BlockTensors, SignatureMap, TokenBatch
from predictor_service.training.trainee import Geometry
from tests.predictor_service.made_up_traces import EXPERTS, HIDDEN, LAYERS, PER_TOKEN, LearnableModel

LOOKAHEADS = (1, 2)


def make_nets() -> LearnedNets:
    torch.manual_seed(0)
    weight_LED = torch.from_numpy(LearnableModel().routers_LED)
    signature = SignatureMap(weight_LED, torch.zeros(LAYERS, EXPERTS))
    scale_2LD = torch.stack([torch.zeros(LAYERS, HIDDEN), torch.ones(LAYERS, HIDDEN)])
    return LearnedNets(Geometry(LAYERS, EXPERTS, PER_TOKEN, HIDDEN), LOOKAHEADS, 12, signature, scale_2LD)


def batch_of(nets: LearnedNets, seen_layers: list[int]) -> TokenBatch:
    block = LearnableModel().block(6, seed=3)
    seen_SN = np.zeros(block.hidden_SND.shape[:2], np.bool_)
    seen_SN[seen_layers] = True
    tensors = BlockTensors(replace(block, seen_SN=seen_SN), EXPERTS, max(LOOKAHEADS) + 1, nets.signature)
    return tensors.batch(tensors.decode_N)


@pytest.mark.parametrize("seen_layers", [[0, 2, 4], [3], list(range(LAYERS))])
def test_leaving_layers_out_changes_no_loss_and_no_gradient(
    seen_layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    nets, reference = make_nets(), make_nets()
    monkeypatch.setattr(reference, "_shown", lambda _: slice(None))
    batch = batch_of(nets, seen_layers)
    loss, reference_loss = nets.loss(batch), reference.loss(batch)
    assert loss.item() == pytest.approx(reference_loss.item(), rel=1e-6)
    loss.backward()
    reference_loss.backward()
    for ours, theirs in zip(nets.parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_only_layers_that_were_shown_are_scored() -> None:
    nets = make_nets()
    scored = nets.scored(batch_of(nets, [0, 2, 4]))
    assert len(scored.scores_PABE) == len(scored.routed_PABE) == len(scored.valid_PAB) == 3
    assert bool(scored.valid_PAB[:, 0, :-1].any(dim=1).all())
