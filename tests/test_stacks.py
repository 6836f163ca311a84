"""Every mixer there is, in the stacks that models are made of: encoder, decoder (streamed step by step), hybrid."""

from typing import Any

import pytest
import torch
from test_mixers import NEEDED
from torch import Tensor

from headway import mixers
from headway.block import Stack
from headway.mask import Mask
from headway.positions import positions_of
from headway.spec import BlockSpec, FeedForwardSpec, PositionSpec, StackSpec

WIDTH, LENGTH = 16, 11
NAMES = [name for name in mixers.names() if name != "summary"]  # which has a place in the cross slot alone
OPTIONS: dict[str, dict[str, Any]] = {**NEEDED, "longformer": {"window": [2, 2]}}


def stack(*names: str) -> Stack:
    blocks = [BlockSpec(mixer={"name": n, **OPTIONS.get(n, {})}, feedforward=FeedForwardSpec(hidden=8)) for n in names]
    return Stack(StackSpec(blocks=tuple(blocks), repeat=2, positions=PositionSpec(name="sinusoidal")), WIDTH).eval()


def tokens(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(rows, length, WIDTH)


def run(body: Stack, x: Tensor, mask: Mask, **named: Any) -> Tensor:
    return body(x, mask=mask, pos=positions_of(mask.valid, x.shape[0], x.shape[1], x.device), **named)


def can(name: str) -> frozenset[str]:
    return stack(name).blocks[0].mixer.inner.can


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_gives_a_padded_row_what_it_gives_the_row_alone(name: str) -> None:
    body, x = stack(name), tokens()
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, 6:] = False
    if "bidirectional" not in can(name):
        with pytest.raises(ValueError, match="cannot do bidirectional"):
            run(body, x, Mask(valid=valid))
        return
    y = run(body, x, Mask(valid=valid))
    torch.testing.assert_close(y[0], run(body, x[:1], Mask())[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(y[1, :6], run(body, x[1:, :6], Mask())[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_streamed_step_by_step_equals_the_whole(name: str) -> None:
    body, x = stack(name), tokens()
    if not {"causal", "stream"} <= can(name):
        with pytest.raises(ValueError, match=r"cannot|refuses|causal|stream"):
            run(body, x, Mask(causal=True), state=body.init_state(2, LENGTH))
        return
    state = body.init_state(2, LENGTH)
    with torch.no_grad():
        whole = run(body, x, Mask(causal=True))
        steps = []
        for t in range(LENGTH):
            at = torch.full((2, 1), t)
            steps.append(body(x[:, t : t + 1], mask=Mask(causal=True), pos=at, state=state))
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)
    stated = sum(2 * block.mixer.inner.cost(LENGTH).state_bytes for block in body.blocks)  # two rows
    assert sum(kept.nbytes for pair in state for kept in pair if kept is not None) == stated


@pytest.mark.parametrize("name", NAMES)
def test_a_hybrid_with_attention_trains_every_weight(name: str) -> None:
    mask = next(m for m in (Mask(causal=True), Mask()) if m.facts <= can(name))
    body = stack(name, "attention").train()
    run(body, tokens(), mask).square().sum().backward()
    silent = [n for n, p in body.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent
