"""The controls are what they claim to be: nothing is mixed, all is averaged, all is turned into waves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from headway import mixers
from headway.block import Stack
from headway.layers import initialise
from headway.mask import Mask
from headway.mixers import average, fourier
from headway.positions import Positions, positions_of
from headway.spec import StackSpec, convert
from headway.testing import check_mixer

WIDTH = 6


def made(name: str) -> Any:
    return mixers.build({"name": name}, WIDTH, Positions()).double()


def tokens(rows: int = 2, length: int = 5) -> Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.double, requires_grad=True)


def gradients(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), x)[0]


@pytest.mark.parametrize("width", [15, 16])
@pytest.mark.parametrize("name", ["identity", "average", "fourier"])
def test_every_control_keeps_the_contract(name: str, width: int) -> None:
    held = set(check_mixer(name, width=width))
    assert {"padding_changes_nothing", "flops_are_as_stated"} <= held
    assert ("streamed_equals_parallel" in held) == (name != "fourier")
    assert ("packing_changes_nothing" in held) == (name != "fourier")


def test_identity_mixes_nothing() -> None:
    mixer, x = made("identity"), tokens(1, 4)
    y = mixer(x, mask=Mask(), pos=torch.arange(4)[None])
    torch.testing.assert_close(y, x @ mixer.out.weight.T + mixer.out.bias)
    for t in range(4):
        reached = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)[0].abs().sum(-1)[0] > 0
        assert reached.tolist() == [s == t for s in range(4)]


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(causal=True),
        Mask(valid=torch.tensor([[True, True, True, False, False], [True] * 5])),
        Mask(causal=True, valid=torch.tensor([[False, False, True, True, True], [True] * 5])),
        Mask(causal=True, segments=torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1]])),
        Mask(segments=torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1]])),
    ],
    ids=lambda mask: "-".join(sorted(mask.facts)),
)
def test_an_average_is_the_mean_of_what_a_token_may_see(mask: Mask) -> None:
    mixer, x = made("average"), tokens()
    pos = positions_of(mask.valid, 2, 5, x.device)
    y = mixer(x, mask=mask, pos=pos)
    allowed = mask.allows(pos, pos).expand(2, 5, 5)
    by_hand = [[x[b, allowed[b, t]].mean(0) for t in range(5)] for b in range(2)]
    want, there = mixer.out(torch.stack([torch.stack(row) for row in by_hand])), pos >= 0
    torch.testing.assert_close(y[there], want[there])
    torch.testing.assert_close(gradients(y[there], x), gradients(want[there], x))
    torch.testing.assert_close(mixer.out(average.reference(x, mask, pos))[there], want[there])


def test_a_long_average_in_half_precision_loses_no_terms() -> None:
    mixer = mixers.build({"name": "average"}, WIDTH, Positions()).bfloat16()
    torch.nn.init.eye_(mixer.out.weight)
    torch.nn.init.zeros_(mixer.out.bias)
    x, pos = torch.ones(1, 2000, WIDTH, dtype=torch.bfloat16), torch.arange(2000)[None]
    for mask in (Mask(), Mask(causal=True)):
        assert torch.equal(mixer(x, mask=mask, pos=pos), x)


@pytest.mark.parametrize(("length", "width"), [(1, 1), (1, 4), (2, 3), (5, 6), (6, 5), (8, 8)])
def test_the_fast_transform_is_the_definition_with_its_gradients(length: int, width: int) -> None:
    x = torch.randn(2, length, width, dtype=torch.double, requires_grad=True)
    fast, slow = fourier.transform(x), fourier.reference(x)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(gradients(fast, x), gradients(slow, x))
    torch.testing.assert_close(slow * (length * width) ** 0.5, torch.fft.fft2(x).real)  # FNet's own, without the scale


def test_fourier_takes_half_precision() -> None:
    mixer, x = mixers.build({"name": "fourier"}, WIDTH, Positions()), torch.randn(2, 5, WIDTH)
    pos = torch.arange(5).expand(2, -1)
    half = mixer(x.bfloat16(), mask=Mask(), pos=pos)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), mixer(x, mask=Mask(), pos=pos), atol=0.05, rtol=0.05)


def test_a_row_of_nothing_but_padding_stays_finite() -> None:
    valid = torch.tensor([[False] * 5, [True] * 5])
    for name in ("identity", "average", "fourier"):
        for causal in (False, True) if name != "fourier" else (False,):
            mask = Mask(causal=causal, valid=valid)
            y = made(name)(tokens(), mask=mask, pos=positions_of(valid, 2, 5, valid.device))
            assert y.isfinite().all()


# --- In stacks


def stack(*names: str) -> Stack:
    blocks = [{"mixer": {"name": name} | ({"heads": 2} if name == "attention" else {})} for name in names]
    built = Stack(convert({"blocks": blocks, "positions": {"name": "none"}}, StackSpec), WIDTH)
    initialise(built, built.branches)
    return built


def test_identity_and_average_stream_step_by_step_in_a_hybrid_decoder() -> None:
    built, x, pos = stack("average", "identity", "attention"), torch.randn(2, 5, WIDTH), torch.arange(5).expand(2, -1)
    with torch.no_grad():
        whole = built(x, mask=Mask(causal=True), pos=pos)
        state = built.init_state(2, 5)
        steps = [built(x[:, t : t + 1], mask=Mask(causal=True), pos=pos[:, t : t + 1], state=state) for t in range(5)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    assert [own.nbytes for own, _ in state[:2] if own is not None] == [2 * 4 * WIDTH, 0]


def test_all_controls_work_in_an_encoder_with_padding() -> None:
    built, x = stack("fourier", "average", "identity", "attention"), torch.randn(2, 5, WIDTH)
    valid = torch.tensor([[True] * 5, [False, False, True, True, True]])
    y = built(x, mask=Mask(valid=valid), pos=positions_of(valid, 2, 5, x.device))
    torch.testing.assert_close(y[1:, 2:], built(x[1:, 2:], mask=Mask(), pos=torch.arange(3)[None]))


# --- What is refused


def test_fourier_refuses_to_be_causal_or_a_stream_with_the_reason() -> None:
    x, pos = tokens(), torch.arange(5).expand(2, -1)
    with pytest.raises(ValueError, match="fourier cannot be causal: each output sums over all tokens"):
        made("fourier")(x, mask=Mask(causal=True), pos=pos)
    with pytest.raises(ValueError, match="fourier cannot stream: each output sums over all tokens"):
        stack("fourier").init_state(2, 5)
    with pytest.raises(ValueError, match="Fourier cannot do segments"):
        made("fourier")(x, mask=Mask(segments=torch.zeros(2, 5, dtype=torch.long)), pos=pos)


@pytest.mark.parametrize("name", ["identity", "average"])
def test_a_state_of_another_kind_is_refused(name: str) -> None:
    state = mixers.build({"name": "attention", "heads": 2}, WIDTH, Positions()).init_state(2, 5)
    with pytest.raises(ValueError, match=f"{name} streams with a Recurrent state, not KeyValue"):
        made(name)(tokens(), mask=Mask(causal=True), pos=torch.arange(5).expand(2, -1), state=state)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Mask(), "only under a causal mask"),
        (Mask(causal=True, segments=torch.zeros(2, 5, dtype=torch.long)), "cannot stream packed segments"),
    ],
)
def test_average_streams_nothing_but_the_past_of_one_sequence(mask: Mask, words: str) -> None:
    mixer = made("average")
    with pytest.raises(ValueError, match=words):
        mixer(tokens(), mask=mask, pos=torch.arange(5).expand(2, -1), state=mixer.init_state(2, 5))
