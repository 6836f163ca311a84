"""Convolution: short, dilated and as long as the sequence; every way to compute it is the one sum."""

from typing import Any

import pytest
import torch
from torch import Tensor

from headway import mixers
from headway.block import Stack
from headway.layers import initialise
from headway.mask import Mask
from headway.mixers import conv
from headway.positions import Positions, positions_of
from headway.spec import StackSpec, convert
from headway.testing import check_mixer

WIDTH = 6


def made(**options: Any) -> Any:
    return mixers.build({"name": "conv", **options}, WIDTH, Positions()).double()


def tokens(length: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.double, requires_grad=True)


def mixed(mixer: Any, x: Tensor, mask: Mask) -> Tensor:
    return mixer(x, mask=mask, pos=positions_of(mask.valid, len(x), x.shape[1], x.device))


def toeplitz(x: Tensor, taps: Tensor, dilation: int, left: int) -> Tensor:
    """The sum as one T x T matrix a channel: y_t = sum over s of M_{t,s} x_s."""
    length, matrix = x.shape[1], x.new_zeros(len(taps), x.shape[1], x.shape[1])
    for t in range(length):
        for i in range(taps.shape[1]):
            if 0 <= (s := t + i * dilation - left) < length:
                matrix[:, t, s] = taps[:, i]
    return torch.einsum("cts,bsc->btc", matrix, x)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 3, "dilation": 4},
        {"kernel": 2, "dilation": 9, "gated": False},
        {"kernel": 3, "dilation": 2, "depthwise": True, "decay": True},
        {"kernel": 40, "depthwise": True},
        {"kernel": 33, "dilation": 3, "depthwise": True},
        {"kernel": 128, "depthwise": True, "decay": True, "gated": False},
    ],
    ids=str,
)
def test_dilated_gated_and_long_convolutions_keep_the_contract(options: dict[str, Any]) -> None:
    held = check_mixer("conv", **options)
    assert {"the_future_does_not_leak", "padding_changes_nothing", "streamed_equals_parallel"} <= set(held)
    assert {"state_bytes_are_as_stated", "flops_are_as_stated", "activations_are_as_stated"} <= set(held)


WAYS = [conv.reference, conv.by_windows, conv.by_fourier]


@pytest.mark.parametrize("zeros", ["before", "both", "behind", "none"])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (2, 3), (5, 1), (4, 2), (9, 1)])
def test_every_way_is_the_toeplitz_sum_with_its_gradients(kernel: int, dilation: int, zeros: str) -> None:
    reach = (kernel - 1) * dilation
    left = {"before": reach, "both": reach // 2, "behind": 0, "none": 0}[zeros]
    around = (0, 0) if zeros == "none" else (left, reach - left)
    x, taps = tokens(9), torch.randn(WIDTH, kernel, dtype=torch.double, requires_grad=True)
    want = toeplitz(x, taps, dilation, left)[:, : 9 - (reach if zeros == "none" else 0)]
    probe = torch.linspace(-1, 1, want.numel(), dtype=want.dtype).view_as(want)
    expected = torch.autograd.grad((want * probe).sum(), (x, taps))
    for way in WAYS if want.numel() else []:
        y = way(x, taps, dilation, around)
        torch.testing.assert_close(y, want)
        for got, grad in zip(torch.autograd.grad((y * probe).sum(), (x, taps)), expected, strict=True):
            torch.testing.assert_close(got, grad)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 30, 50, 90])  # shorter than the kernel, as long, longer
@pytest.mark.parametrize(("kernel", "dilation"), [(50, 1), (40, 2), (35, 3)])
def test_a_long_kernel_is_the_toeplitz_sum_at_any_length(kernel: int, dilation: int, length: int, causal: bool) -> None:
    mixer, x = made(kernel=kernel, dilation=dilation, depthwise=True), tokens(length)
    left = mixer.reach if causal else mixer.reach // 2
    h = mixer.mix(toeplitz(x, mixer.taps.weight, dilation, left) + mixer.taps.bias)
    value, gate = h.chunk(2, -1)
    torch.testing.assert_close(mixed(mixer, x, Mask(causal=causal)), mixer.out(value * gate.sigmoid()))


def test_a_kernel_over_the_whole_sequence_reaches_all_of_it() -> None:
    x = tokens(40, rows=1)
    for causal, kernel in ((True, 40), (False, 80)):
        y = mixed(made(kernel=kernel, depthwise=True), x, Mask(causal=causal))
        first, last = (torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)[0][0].abs().sum(-1) for t in (0, -1))
        assert (last > 1e-9).all() and (first > 1e-9).all() == (not causal)


def test_taps_beyond_the_sequence_cost_nothing() -> None:
    one, two = (made(kernel=kernel, depthwise=True).cost(64) for kernel in (64, 4096))
    assert one.activation_bytes == two.activation_bytes


# --- Streams


@pytest.mark.parametrize("chunks", [(1,) * 60, (40, 1, 19), (3, 17, 40), (60,)])
def test_a_long_kernel_streams_as_it_reads_in_parallel(chunks: tuple[int, ...]) -> None:
    mixer, x, pos = made(kernel=48, depthwise=True, decay=True), tokens(60), torch.arange(60).expand(2, -1)
    with torch.no_grad():
        state, outputs = mixer.init_state(2, 60), []
        for some, places in zip(x.split(chunks, 1), pos.split(chunks, 1), strict=True):
            outputs.append(mixer(some, mask=Mask(causal=True), pos=places, state=state))
            assert state.nbytes == 2 * 8 * 47 * WIDTH
        torch.testing.assert_close(torch.cat(outputs, 1), mixed(mixer, x, Mask(causal=True)))


def test_a_long_kernel_sees_no_padding_on_either_side() -> None:
    mixer, x = made(kernel=64, depthwise=True), tokens(64, rows=1)
    for causal in (True, False):
        alone = mixed(mixer, x[:, :40], Mask(causal=causal))
        for there in (torch.arange(64) < 40, torch.arange(64) >= 24):
            padded = torch.full_like(x, 1e3)
            padded[:, there] = x[:, :40]
            y = mixed(mixer, padded, Mask(causal=causal, valid=there[None]))
            torch.testing.assert_close(y[:, there], alone)


@pytest.mark.parametrize("kernel", [3, 48])
def test_it_streams_step_by_step_in_a_hybrid_stack(kernel: int) -> None:
    blocks = [
        {"mixer": {"name": "conv", "kernel": kernel, "depthwise": True}, "feedforward": {"hidden": 8}},
        {"mixer": {"name": "conv", "kernel": 3, "dilation": 4}},
        {"mixer": {"name": "attention", "heads": 1}, "feedforward": {"hidden": 8}},
    ]
    built = Stack(convert({"blocks": blocks}, StackSpec), WIDTH)
    initialise(built, built.branches)
    x, pos = torch.randn(2, 50, WIDTH), torch.arange(50).expand(2, -1)
    with torch.no_grad():
        whole = built(x, mask=Mask(causal=True), pos=pos)
        state = built.init_state(2, 50)
        steps = [built(x[:, t : t + 1], mask=Mask(causal=True), pos=pos[:, t : t + 1], state=state) for t in range(50)]
        valid = torch.tensor([[True] * 50, [False] * 30 + [True] * 20])
        padded = built(x, mask=Mask(valid=valid), pos=positions_of(valid, 2, 50, x.device))
        alone = built(x[1:, 30:], mask=Mask(), pos=pos[:1, :20])
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded[1:, 30:], alone, atol=1e-4, rtol=1e-4)


# --- Precision and the start


def test_the_transforms_stay_in_full_precision_under_autocast() -> None:
    x, taps = torch.randn(1, 64, WIDTH), torch.randn(WIDTH, 64) / 8
    want = conv.reference(x, taps, 1, (63, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(conv.by_fourier(x, taps, 1, (63, 0)), want, atol=1e-5, rtol=1e-5)
    half = conv.by_fourier(x.bfloat16(), taps.bfloat16(), 1, (63, 0))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("left", [0, 50, 99])
def test_decay_fades_with_distance_and_keeps_the_energy_of_a_start(left: int) -> None:
    mixer: Any = made(kernel=100, depthwise=True, decay=True)
    window = mixer._window(left)
    torch.testing.assert_close(window.square().mean(1), torch.ones(WIDTH, dtype=window.dtype))
    assert (window.argmax(1) == left).all()
    assert (window[:, left:].diff(dim=1) <= 0).all() and (window[:, : left + 1].diff(dim=1) >= 0).all()
    far = window[:, 99 if left < 50 else 0] / window[:, left]
    assert far[0] < 1e-6 and far[-1] > 0.3 and (far.diff() >= 0).all()


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="conv: decay fades the kernel of each channel: set depthwise=True"):
        made(decay=True)
    with pytest.raises(ValueError, match="kernel 65538, dilation 1: reaches over 65536 tokens"):
        made(kernel=65538, depthwise=True)
    with pytest.raises(ValueError, match="conv streams only under a causal mask"):
        mixer = made(kernel=48, depthwise=True)
        mixer(tokens(1), mask=Mask(), pos=torch.zeros(2, 1, dtype=torch.long), state=mixer.init_state(2, 5))
