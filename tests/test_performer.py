"""Performer: its definition, its limit, what it keeps exact where numbers are large, redrawing, and its peer."""

import copy
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headway import mixers
from headway.attend import attend
from headway.block import Stack
from headway.mask import Mask
from headway.mixers.performer import Performer, features, from_performer_pytorch, orthogonal, reference
from headway.positions import Alibi, Positions, positions_of
from headway.spec import StackSpec, convert
from headway.state import KeyValue, Recurrent
from headway.testing import check_mixer

KERNELS = ["softmax", "relu"]
DIRECTIONS = [Mask(causal=True), Mask()]


def made(width: int = 8, **options: Any) -> Performer:
    mixer = mixers.build({"name": "performer", "heads": 2, **options}, width, Positions()).eval()
    assert isinstance(mixer, Performer)
    return mixer


def mixed(mixer: Performer, x: Tensor, mask: Mask, context: Tensor | None = None, state: Any = None) -> Tensor:
    pos = positions_of(None if context is not None else mask.valid, len(x), x.shape[1], x.device)
    return mixer(x, mask=mask, pos=pos, context=context, state=state)


def by_definition(mixer: Performer, x: Tensor, mask: Mask, context: Tensor | None = None) -> Tensor:
    """The whole mixer with every pair of tokens written out."""
    q = mixer._heads(mixer.query(x))
    k, v = mixer._keys_values(x if context is None else context)
    pos, there = (torch.arange(t.shape[2])[None] for t in (q, k))
    allowed = mask.allows(pos.expand(len(x), -1), there.expand(len(x), -1))[:, None]
    return mixer.out(reference(q, k, v, mixer.projection, mixer.kernel, allowed).transpose(1, 2).flatten(2))


def with_gradients(y: Tensor, mixer: Performer, *inputs: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [*inputs, *mixer.parameters()])]


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "relu"},
        {"heads": 2, "head_dim": 6, "positions": "none", "bias": True, "features": 40},
        {"heads": 1, "features": 7, "redraw": 3},
        {"heads": 8, "kernel": "relu", "features": 1, "positions": "sinusoidal"},
        {"heads": 16, "positions": "none"},
    ],
)
def test_it_keeps_the_contract_in_every_shape(options: dict[str, Any]) -> None:
    held = check_mixer("performer", **options)
    assert {"the_future_does_not_leak", "streamed_equals_parallel", "context_is_written_once"} <= set(held)


# --- The definition, and the limit


@pytest.mark.parametrize("length", [1, 7, 300, 1100])
@pytest.mark.parametrize("mask", DIRECTIONS, ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_its_definition(kernel: str, mask: Mask, length: int) -> None:
    mixer = made(kernel=kernel, bias=True).double()
    x = torch.randn(2, length, 8, dtype=torch.double, requires_grad=True)
    fast = with_gradients(mixed(mixer, x, mask), mixer, x)
    slow = with_gradients(by_definition(mixer, x, mask), mixer, x)
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("kernel", KERNELS)
def test_over_a_padded_context_it_is_its_definition(kernel: str) -> None:
    mixer = made(kernel=kernel).double()
    x, context = (torch.randn(2, n, 8, dtype=torch.double, requires_grad=True) for n in (5, 9))
    mask = Mask(valid=torch.arange(9)[None] < torch.tensor([[9], [4]]))
    fast = with_gradients(mixed(mixer, x, mask, context), mixer, x, context)
    slow = with_gradients(by_definition(mixer, x, mask, context), mixer, x, context)
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("mask", DIRECTIONS, ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_of_padding_alone_change_nothing(kernel: str, mask: Mask) -> None:
    mixer = made(kernel=kernel).double()
    x = torch.randn(2, 1700, 8, dtype=torch.double, requires_grad=True)
    valid = torch.ones(2, 1700, dtype=torch.bool)
    valid[0, :1100], valid[1, 500:] = False, False
    fast = mixed(mixer, x, mask & Mask(valid=valid))
    for row, there in enumerate(valid):
        alone = x[row : row + 1, there].detach().requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad(fast[row, there].square().sum(), x, retain_graph=True)[0][row, there],
            torch.autograd.grad(by_definition(mixer, alone, mask).square().sum(), alone)[0][0],
        )


def test_the_features_of_softmax_estimate_its_kernel_without_bias() -> None:
    q, k = torch.randn(2, 1, 1, 4, 8, dtype=torch.double).mul(0.5)
    w, count = orthogonal(4000 * 8, 8).double(), 4000
    blocks = (features(q, w, "softmax")[0, 0, :, None] * features(k, w, "softmax")[0, 0]).unflatten(-1, (count, 8))
    estimates = blocks.sum(-1) * count
    wanted, error = (q @ k.mT / math.sqrt(8)).exp()[0, 0], estimates.std(-1) / math.sqrt(count)
    assert ((estimates.mean(-1) - wanted).abs() < 4 * error).all() and (error < 0.05 * wanted).all()


def draws(count: int, rows: int, columns: int) -> list[Tensor]:
    return [orthogonal(rows, columns).double() for _ in range(count)]


@pytest.mark.parametrize("mask", DIRECTIONS, ids=["causal", "bidirectional"])
def test_the_error_to_exact_attention_falls_as_the_root_of_the_features(mask: Mask) -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 16) * torch.tensor([0.5, 0.5, 1.0])[:, None, None, None, None]
    exact = attend(q, k, v, mask)
    pos = torch.arange(40)[None]

    def error(count: int) -> float:
        tries = [reference(q, k, v, w.float(), "softmax", mask.allows(pos, pos)[:, None]) for w in draws(12, count, 16)]
        return float(torch.stack([(y - exact).square().mean() for y in tries]).mean().sqrt())

    few, more, most = error(32), error(512), error(8192)
    assert 2.5 < few / more < 6 and 3 < more / most < 5.5, (few, more, most)  # 4 at each sixteenfold, in the limit


def test_directions_are_orthogonal_in_blocks_and_lengths_are_chi() -> None:
    w = orthogonal(6 * 8 + 3, 8)
    assert w.shape == (51, 8)
    for block in w.split(8):
        gram = block @ block.T
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-5 * gram.max()
    many = orthogonal(8 * 3000, 8)
    squares = many.square().sum(-1)
    assert abs(float(squares.mean()) - 8) < 0.15 and abs(float(squares.var()) - 16) < 1.5  # chi-squared, 8 degrees
    assert many.mean(0).abs().max() < 0.03 and (many.T @ many / len(many) - torch.eye(8)).abs().max() < 0.05
    first = orthogonal(2 * 2000, 2)[::2]
    assert first.mean(0).abs().max() < 0.1  # no sign is preferred


def test_features_are_about_head_dim_times_its_log_in_whole_registers() -> None:
    assert [made(64, heads=64 // d).features for d in (1, 4, 16, 64)] == [16, 16, 48, 272]
    assert made(features=7).projection.shape == (7, 4)


# --- Large numbers


@pytest.mark.parametrize("mask", DIRECTIONS, ids=["causal", "bidirectional"])
@pytest.mark.parametrize("size", [16, 64])
def test_keys_of_norm_30_neither_overflow_nor_lose_their_order(size: int, mask: Mask) -> None:
    mixer = made(size, heads=1)
    for name, weight in (("query", mixer.query.weight), ("key", mixer.key_value.weight[:size])):
        weight.data.copy_(torch.eye(size) * (1 if name == "query" else 30 / size**0.5))
    x = torch.randn(2, 200, size)
    x[:, ::7] *= 0.01  # keys near zero among them, whose features are larger by 50 powers of ten
    x[0, 0] *= 3
    x.requires_grad_()
    fast = with_gradients(mixed(mixer, x, mask), mixer, x)
    exact, y = copy.deepcopy(mixer).double(), x.detach().double().requires_grad_()
    slow = with_gradients(by_definition(exact, y, mask), exact, y)
    for got, want in zip(fast, slow, strict=True):
        assert got.isfinite().all()
        assert (got - want).abs().max() < 3e-4 * (1 + want.abs().max())


def test_where_every_product_underflows_a_token_sees_itself() -> None:
    mixer = made(16, heads=1)
    mixer.query.weight.data.copy_(-100 * torch.eye(16))
    mixer.key_value.weight.data[:16].copy_(100 * torch.eye(16))
    x = torch.randn(1, 3, 16, requires_grad=True)
    y = mixed(mixer, x, Mask(causal=True))
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    torch.testing.assert_close(y[:, 0], mixer.out(mixer._keys_values(x)[1][:, 0, 0]))


@pytest.mark.parametrize("future", [0.0, 1e3])
def test_not_even_the_magnitude_of_the_future_leaks(future: float) -> None:
    mixer, x = made(), torch.randn(1, 200, 8) * 3
    y = mixed(mixer, x, Mask(causal=True))
    changed = torch.cat([x[:, :150], x[:, 150:] * future], 1)
    assert torch.equal(mixed(mixer, changed, Mask(causal=True))[:, :150], y[:, :150])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mask", DIRECTIONS, ids=["causal", "bidirectional"])
def test_nan_in_padding_does_not_leak(mask: Mask, kernel: str) -> None:
    mixer, x = made(kernel=kernel), torch.randn(2, 6, 8)
    valid = torch.tensor([[False, False, True, True, True, True], [True, True, True, True, False, False]])
    y = mixed(mixer, x, mask & Mask(valid=valid))
    x = x.masked_fill(~valid[..., None], torch.nan).requires_grad_()
    again = mixed(mixer, x, mask & Mask(valid=valid))
    assert torch.equal(y[valid], again[valid])
    again[valid].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_a_context_of_padding_alone_gives_nothing() -> None:
    for kernel in KERNELS:
        mixer, x, context = made(kernel=kernel), torch.randn(2, 3, 8), torch.randn(2, 4, 8, requires_grad=True)
        y = mixed(mixer, x, Mask(valid=torch.tensor([[True] * 4, [False] * 4])), context)
        assert y[0].abs().min() > 0 and torch.equal(y[1], torch.zeros_like(y[1]))
        y.sum().backward()
        assert context.grad is not None and context.grad.isfinite().all()


@pytest.mark.parametrize("mask", DIRECTIONS, ids=["causal", "bidirectional"])
def test_under_autocast_features_stay_in_single_precision(mask: Mask) -> None:
    mixer, x = made(64, heads=1), torch.randn(2, 50, 64) * 2
    exact = mixed(mixer, x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mixed(mixer, x, mask)
    assert rounded.dtype == torch.bfloat16
    error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.03
    half = copy.deepcopy(mixer).bfloat16()
    assert mixed(half, x.bfloat16(), mask).dtype == torch.bfloat16


# --- In a stack, streamed; its cost beyond a chunk


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_decoder_stack_streams_what_it_computes_at_once(kernel: str) -> None:
    performer = {"name": "performer", "heads": 2, "kernel": kernel}
    blocks = [{"mixer": performer, "cross": performer, "feedforward": {"hidden": 16}}]
    stack = Stack(convert({"blocks": blocks, "repeat": 2}, StackSpec), 8).eval()
    x, context = torch.randn(2, 140, 8), torch.randn(2, 9, 8)
    pos, there = torch.arange(140).expand(2, -1), Mask(valid=torch.arange(9)[None] < torch.tensor([[9], [5]]))
    with torch.no_grad():
        whole = stack(x, mask=Mask(causal=True), pos=pos, context=context, context_mask=there)
        states, parts = stack.init_state(2, 140), []
        for part, places in zip(x.split([130, 1, 1, 8], 1), pos.split([130, 1, 1, 8], 1), strict=True):
            given = {"mask": Mask(causal=True), "pos": places, "context": context, "context_mask": there}
            parts.append(stack(part, **given, state=states))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 64, 65, 1100])
@pytest.mark.parametrize("kernel", KERNELS)
def test_flops_are_as_stated_at_any_length(kernel: str, length: int) -> None:
    mixer, x, context = made(kernel=kernel), torch.randn(1, length, 8), torch.randn(1, 6, 8)
    for mask, over in ((Mask(causal=True), None), (Mask(), None), (Mask(), context)):
        with FlopCounterMode(display=False) as counter:
            mixed(mixer, x, mask, over)
        stated = mixer.cost(length, None if over is None else 6, causal=mask.causal)
        assert counter.get_total_flops() == stated.flops


# --- Redrawing


def trained(mixer: Performer, steps: range) -> list[Tensor]:
    """Steps as the training loop takes them: the generator is seeded by the number of the step."""
    outputs = []
    mixer.train()
    for step in steps:
        torch.manual_seed(step)
        x = torch.randn(2, 5, 8)
        y = mixed(mixer, x, Mask())
        y.square().sum().backward()
        for parameter in mixer.parameters():
            parameter.data.sub_(0.01 * parameter.grad)
            parameter.grad = None
        outputs.append(y.detach())
    return outputs


def test_features_are_redrawn_every_so_many_training_steps() -> None:
    mixer, seen = made(redraw=3), []
    for step in range(7):
        trained(mixer, range(step, step + 1))
        seen.append(mixer.projection)
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert changed == [False, False, True, False, False, True]


def test_a_resumed_run_redraws_what_the_whole_run_drew() -> None:
    whole = made(redraw=2)
    start, rest = copy.deepcopy(whole), made(redraw=2)
    wanted = trained(whole, range(9))
    assert torch.equal(torch.stack(trained(start, range(5))), torch.stack(wanted[:5]))
    rest.load_state_dict(start.state_dict())
    assert torch.equal(torch.stack(trained(rest, range(5, 9))), torch.stack(wanted[5:]))
    assert {"projection", "steps"} <= set(whole.state_dict()) and int(rest.steps) == 9
    assert torch.equal(rest.projection, whole.projection)


def test_the_way_back_survives_a_redraw() -> None:
    mixer, x = made(redraw=1).train(), torch.randn(1, 4, 8)
    (mixed(mixer, x, Mask()) + mixed(mixer, x, Mask())).sum().backward()


def test_looking_never_redraws() -> None:
    mixer, x = made(redraw=1), torch.randn(2, 5, 8)
    trained(mixer, range(2))
    kept = mixer.projection.clone()
    eager = mixed(mixer.eval(), x, Mask())
    assert torch.equal(mixed(mixer, x, Mask()), eager)
    mixer.train()
    with torch.no_grad():
        assert torch.equal(mixed(mixer, x, Mask()), eager)
    mixed(
        mixer, x, Mask(causal=True), state=mixer.init_state(2, 5)
    )  # a stream keeps sums of the features it began with
    assert torch.equal(mixer.projection, kept) and int(mixer.steps) == 2


def test_without_redraw_the_features_stay() -> None:
    mixer = made()
    kept = mixer.projection.clone()
    trained(mixer, range(3))
    assert torch.equal(mixer.projection, kept)


# --- Beside performer-pytorch, with its weights and features


def peer(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Any]:
    with warnings.catch_warnings(action="ignore"):
        theirs: Any = pytest.importorskip("performer_pytorch.performer_pytorch")
        monkeypatch.setitem(theirs.softmax_kernel.__kwdefaults__, "eps", 0.0)  # it adds a constant to features,
        monkeypatch.setattr(theirs.causal_linear_attention_noncuda, "__defaults__", (128, 0.0))  # and to normalisers
        return theirs, theirs.SelfAttention(16, heads=2, dim_head=8, **{"attn_out_bias": False, **options})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_equals_performer_pytorch(monkeypatch: pytest.MonkeyPatch, kernel: str, causal: bool) -> None:
    _, their = peer(monkeypatch, nb_features=32, causal=causal, generalized_attention=kernel == "relu")
    mixer = made(16, features=32, kernel=kernel)
    mixer.load_state_dict(from_performer_pytorch(their.state_dict()))
    x = torch.randn(2, 300, 16)
    with torch.no_grad():
        torch.testing.assert_close(mixed(mixer, x, Mask(causal=causal)), their(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("biases", [(True, True), (False, True), (True, False)])
def test_biases_map_too(monkeypatch: pytest.MonkeyPatch, biases: tuple[bool, bool]) -> None:
    given = dict(zip(("qkv_bias", "attn_out_bias"), biases, strict=True))
    _, their = peer(monkeypatch, nb_features=24, **given)
    mixer = made(16, features=24, bias=True)
    mixer.load_state_dict(from_performer_pytorch(their.state_dict()))
    x = torch.randn(2, 20, 16)
    with torch.no_grad():
        torch.testing.assert_close(mixed(mixer, x, Mask()), their(x), atol=1e-4, rtol=1e-4)


def test_a_tensor_of_the_peer_that_has_no_place_here_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing here answers to local_attn\.x"):
        from_performer_pytorch({"local_attn.x": torch.zeros(1)})


# --- What is refused


@pytest.mark.parametrize(
    ("mask", "state", "words"),
    [
        (Mask(causal=True, window=(2, 0)), None, "Performer cannot do window"),
        (Mask(segments=torch.zeros(1, 4, dtype=torch.long)), None, "Performer cannot do segments"),
        (Mask(), Recurrent(), "only under a causal mask"),
        (Mask(causal=True), KeyValue(4), "performer streams with a Recurrent, not KeyValue"),
    ],
)
def test_what_it_cannot_honour_is_refused(mask: Mask, state: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mixed(made(), torch.randn(1, 4, 8), mask, state=state)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="width 8 is no multiple of 3 heads"):
        made(heads=3)
    with pytest.raises(ValueError, match="alibi"):
        mixers.build({"name": "performer"}, 8, Alibi())
    with pytest.raises(ValueError, match="a Cross, not Recurrent"):
        mixed(made(), torch.randn(1, 4, 8), Mask(), torch.randn(1, 3, 8), state=made().init_state(1, 4))
