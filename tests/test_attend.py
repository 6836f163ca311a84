"""Every backend of attention equals its definition, gradients included; what nobody may see never leaks."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from drawn import masks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from headway import kernels, mixers
from headway.attend import attend, call_of, explain, explain_layers, forced, listening, weights
from headway.mask import Mask
from headway.positions import Positions

BACKENDS = ["reference", *kernels.names()]


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """One query at a time, over just the keys it may see."""
    y = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    allowed = mask.allows(torch.arange(q.shape[2])[None], torch.arange(k.shape[2])[None])
    allowed = allowed.expand(q.shape[0], q.shape[2], -1)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).view(-1, 3).tolist():
        keys = allowed[b, t].nonzero()[:, 0]
        if len(keys):
            shares = (k[b, h // group, keys] @ q[b, h, t] / q.shape[-1] ** 0.5).softmax(0)
            y[b, h, t] = shares @ v[b, h // group, keys]
    return y


def heads(rows: int, count: int, length: int, width: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, count, length, width, dtype=dtype, requires_grad=True)


@contextmanager
def where_it_can() -> Iterator[None]:
    """Skips the test of a backend that says that it cannot."""
    try:
        yield
    except ValueError as error:
        if " cannot: " not in str(error):
            raise
        pytest.skip(str(error))


@st.composite
def calls(draw: st.DrawFn) -> dict:
    rows, groups, queries, keys = (draw(st.integers(1, most)) for most in (2, 2, 4, 5))
    count = groups * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()
    call = {
        "q": make(rows, count, queries, 4),
        "k": make(rows, groups, keys, 4),
        "v": make(rows, groups, keys, 3),
        "mask": draw(masks(rows, queries, keys)),
    }
    if queries != keys or draw(st.booleans()):
        call["q_pos"] = torch.randint(-1, 6, (rows, queries), generator=generator)
        call["k_pos"] = torch.randint(-1, 6, (rows, keys), generator=generator)
    if draw(st.booleans()):
        call["bias"] = make(*draw(st.sampled_from([(rows, count), (1, count), (rows, 1), (1, 1)])), queries, keys)
    if draw(st.booleans()):
        call["scale"] = 0.3
    if draw(st.booleans()):
        call["softcap"] = 0.7
    return call


@given(calls())
def test_every_backend_equals_the_reference_with_its_gradients(call: dict) -> None:
    tolerance = 1e-10 if call["q"].dtype == torch.float64 else 1e-5
    inputs = [call[name] for name in ("q", "k", "v", "bias") if name in call]

    def run(backend: str | None) -> list[Tensor]:
        y = attend(**call, backend=backend)
        probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return [y, *torch.autograd.grad((y * probe).sum(), inputs)]

    expected = run("reference")
    for backend in [*BACKENDS, None]:
        try:
            found = run(backend)
        except ValueError as error:  # what it cannot do it says, and names those that can
            assert re.search(rf"{backend} cannot: .+; .*reference.* can$", str(error))
            continue
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@given(st.data())
def test_the_reference_is_the_softmax_over_what_each_query_may_see(data: st.DataObject) -> None:
    mask = data.draw(masks(2, 4, 4))
    q, k, v = heads(2, 4, 4), heads(2, 2, 4), heads(2, 2, 4, width=3)
    torch.testing.assert_close(attend(q, k, v, mask, backend="reference"), by_hand(q, k, v, mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing_gives_zeros_and_takes_no_gradient(backend: str) -> None:
    q, k, v = heads(1, 2, 3), heads(1, 2, 3), heads(1, 2, 3)
    mask = Mask(causal=True, valid=torch.tensor([[False, True, True]]))
    with where_it_can():
        y = attend(q, k, v, mask, backend=backend)
    y.sum().backward()
    assert torch.equal(y[:, :, 0], torch.zeros(1, 2, 4, dtype=y.dtype)) and bool((y[:, :, 1:] != 0).all())
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))
    assert q.grad is not None and not q.grad[:, :, 0].any()


UNSEEN = {
    "padding": (Mask(valid=torch.tensor([[True, True, False, True]])), None, 2),
    "an empty slot": (Mask(causal=True), torch.tensor([[0, 1, -1, 2]]), 2),
    "the future of all": (Mask(causal=True), torch.tensor([[0, 1, 5, 2]]), 2),
    "outside every window": (Mask(window=(1, 0)), torch.tensor([[0, 1, 9, 2]]), 2),
    "another segment": (
        Mask(segments=torch.tensor([[1, 1, 1, 1]]), key_segments=torch.tensor([[1, 1, 2, 1]])),
        None,
        2,
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("why", UNSEEN)
def test_what_nobody_may_see_never_leaks(why: str, backend: str) -> None:
    mask, k_pos, at = UNSEEN[why]
    q_pos = None if k_pos is None else torch.arange(4)[None]
    q, k, v = (heads(1, 2, 4).detach() for _ in range(3))

    def run(planted: float) -> list[Tensor]:
        inputs = [q.clone(), k.clone(), v.clone()]
        inputs[1][:, :, at] = inputs[2][:, :, at] = planted
        inputs = [t.requires_grad_() for t in inputs]
        with where_it_can():
            y = attend(*inputs, mask, q_pos=q_pos, k_pos=k_pos, backend=backend)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    for poisoned, clean in zip(run(float("nan")), run(0.0), strict=True):
        assert torch.equal(poisoned, clean)
    assert not run(float("nan"))[2][:, :, at].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_new_query_among_remembered_keys_equals_the_last_of_all(backend: str) -> None:
    q, k, v = heads(2, 4, 6), heads(2, 2, 6), heads(2, 2, 6)
    with where_it_can():
        whole = attend(q, k, v, Mask(causal=True), backend=backend)
    at, empty = torch.full((2, 1), 5), torch.full((2, 2, 3, 4), float("nan"), dtype=q.dtype)
    k_pos = torch.tensor([0, 1, 2, 3, 4, 5, -1, -1, -1]).expand(2, -1)
    k, v = torch.cat([k, empty], 2), torch.cat([v, empty], 2)
    with where_it_can():
        last = attend(q[:, :, 5:], k, v, Mask(causal=True), q_pos=at, k_pos=k_pos, backend=backend)
    torch.testing.assert_close(last, whole[:, :, 5:])


def test_weights_times_values_is_the_output() -> None:
    q, k, v = heads(2, 4, 5), heads(2, 2, 5), heads(2, 2, 5)
    mask = Mask(causal=True, window=(2, 0))
    shares = weights(q, k, mask)
    assert shares.shape == (2, 4, 5, 5)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 4, 5, dtype=q.dtype))
    torch.testing.assert_close(shares @ v.repeat_interleave(2, 1), attend(q, k, v, mask))


def test_a_low_precision_query_takes_a_bias_of_full_precision() -> None:
    q, k, v = (heads(1, 2, 3, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(1, 2, 3, 3)
    fast, slow = (attend(q, k, v, bias=bias, backend=backend) for backend in ("sdpa", "reference"))
    torch.testing.assert_close(fast, slow, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_on_the_weights(backend: str) -> None:
    q, k = heads(1, 2, 64).detach(), heads(1, 2, 64).detach()
    with where_it_can():
        y = attend(0 * q, k, torch.ones_like(k), dropout=0.5, backend=backend)[..., 0]
    assert y.std() > 0.05 and abs(y.mean() - 1) < 0.1


@pytest.mark.parametrize(
    ("shapes", "mask", "given_positions", "words"),
    [
        ((3, 2, 4, 4), Mask(), "", "3 query heads do not share 2"),
        ((2, 2, 3, 4), Mask(causal=True), "", "3 queries and 4 keys under a causal mask"),
        ((2, 2, 3, 4), Mask(window=(1, 1)), "", "3 queries and 4 keys under a window mask"),
        ((2, 2, 4, 4), Mask(causal=True), "q_pos", "give q_pos and k_pos, or neither"),
        ((2, 2, 4, 4), Mask(window=(1, 1)), "k_pos", "give q_pos and k_pos, or neither"),
    ],
)
def test_a_call_that_means_nothing_is_refused(
    shapes: tuple[int, int, int, int], mask: Mask, given_positions: str, words: str
) -> None:
    count, groups, queries, keys = shapes
    positions = {given_positions: torch.arange(4)[None]} if given_positions else {}
    with pytest.raises(ValueError, match=words):
        attend(heads(1, count, queries), heads(1, groups, keys), heads(1, groups, keys), mask, **positions)


def test_a_backend_that_is_not_there_is_refused_with_those_that_are() -> None:
    q = heads(1, 1, 2)
    with pytest.raises(ValueError, match=r"no backend 'flash'; there is reference, .*sdpa"):
        attend(q, q, q, backend="flash")


@pytest.mark.parametrize(
    ("mask", "positions", "bias"),
    [
        (Mask(), False, False),
        (Mask(causal=True), False, False),
        (Mask(causal=True), True, False),
        (Mask(), False, True),
        (Mask(window=(1, 1)), False, False),
        (Mask(causal=True, valid=torch.ones(1, 4, dtype=torch.bool)), True, False),
    ],
)
def test_explain_tells_how_sdpa_lowers_the_mask(
    mask: Mask, positions: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict = {}
    kernel = torch.nn.functional.scaled_dot_product_attention
    spy = lambda q, k, v, **options: taken.update(options) or kernel(q, k, v, **options)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
    q, at = heads(1, 1, 4), torch.arange(4)[None] if positions else None
    given = {"q_pos": at, "k_pos": at, "bias": torch.zeros(1, 1, 4, 4) if bias else None}
    attend(q, q, q, mask, **given, backend="sdpa")
    said = kernels.find("sdpa").pays(call_of(q, q, q, mask, **given))
    assert ("dense" in said) == (taken.get("attn_mask") is not None)
    assert ("is_causal" in said) == bool(taken.get("is_causal"))
    assert all(fact in said for fact in mask.facts - {"bidirectional"} if "dense" in said)


def test_a_wish_that_cannot_be_is_refused_with_the_backends_that_can() -> None:
    q = heads(1, 1, 2)
    with pytest.raises(
        ValueError, match=r"attend: sdpa cannot: PyTorch's kernels have no logit soft-cap; reference.* can"
    ):
        attend(q, q, q, softcap=2.0, backend="sdpa")


def test_explain_names_the_backend_that_is_then_taken() -> None:
    q = heads(1, 1, 4)
    for named in ({}, {"softcap": 2.0}, {"mask": Mask(causal=True, window=(1, 0))}):
        with listening() as heard:
            attend(q, q, q, **named)
        assert f"{heard[0].backend}: {heard[0].why}" == explain(q, q, q, **named)
        assert heard[0].call == call_of(q, q, q, **named)


def test_every_layer_tells_its_backend() -> None:
    attention = mixers.build({"name": "attention", "heads": 2}, 8, Positions())
    conv = mixers.build({"name": "conv"}, 8, Positions())
    model = nn.ModuleDict({"first": attention, "second": conv})
    model.forward = lambda x, **named: conv(attention(x, **named), **named)
    x, pos = torch.randn(1, 3, 8), torch.arange(3)[None]
    assert explain_layers(model, x, mask=Mask(), pos=pos) == {"first": "sdpa: no mask is needed"}
    with forced("reference"):
        assert explain_layers(model, x, mask=Mask(), pos=pos) == {"first": "reference: asked for"}


def test_a_soft_cap_bounds_the_scores() -> None:
    q, k = 50 * heads(1, 1, 3), heads(1, 1, 3)
    shares = weights(q, k, softcap=1.0)
    assert (shares.amax(-1) / shares.amin(-1)).max() <= torch.e**2 + 1e-9
    with pytest.raises(ValueError, match="softcap bounds the scores and is above 0, not -1"):
        attend(q, k, k, softcap=-1.0)
