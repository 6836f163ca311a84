"""The recurrences in chunks against their definitions, token by token: outputs, states and gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headway.recurrence import Steps, delta, delta_stepwise, flops, kept_bytes, recur, restart, stepwise

KINDS = ["none", "same", "fixed", "head", "channel", "delta"]
KEYS, VALUES = 6, 5


def call(
    kind: str, length: int, strength: float = 0.1, *, rows: int = 2, heads: int = 2, dtype: Any = torch.float64
) -> dict[str, Tensor]:
    """Inputs of `recur`, or, with a beta, of `delta`. Decays are `strength` at most, and some of them nearly 0."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(rows, heads, *shape, dtype=dtype)

    given = {"q": drawn(length, KEYS), "k": drawn(length, KEYS) / KEYS**0.5, "v": drawn(length, VALUES)}
    if kind != "none":
        shape = (length, KEYS) if kind == "channel" else (length,)
        given["decay"] = -strength * torch.rand(rows, heads, *shape, dtype=dtype) ** 3
    if kind == "same":
        given["decay"] = given["decay"][:1, :, :1].expand(rows, -1, length)
    if kind == "delta":
        given["k"] = torch.nn.functional.normalize(given["k"], dim=-1)
        given["beta"] = drawn(length).sigmoid()
    return given


def run(function: Any, given: dict[str, Tensor], **options: int) -> dict[str, Tensor]:
    """Outputs, the last state, and the gradients of one fixed function of both."""
    inputs = {name: t.clone().requires_grad_() for name, t in given.items()}
    y, s = function(**inputs, **options)
    weigh = lambda t: (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum()
    found = torch.autograd.grad(weigh(y) + weigh(s), list(inputs.values()))
    return {"y": y, "s": s, **dict(zip(inputs, found, strict=True))}


def definition(given: dict[str, Tensor]) -> Any:
    return delta_stepwise if "beta" in given else stepwise


def chunked(given: dict[str, Tensor]) -> Any:
    return delta if "beta" in given else recur


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, want in expected.items():
        got, want = found[name].detach().double(), want.detach().double()
        off = float((got - want).abs().max() / (1 + want.abs().max()))
        assert off <= tolerance, f"{name} is off by {off:.2g}"


@settings(max_examples=100)
@given(
    kind=st.sampled_from(KINDS),
    length=st.integers(1, 3) | st.integers(7, 9) | st.integers(15, 17) | st.integers(31, 34),
    chunk=st.sampled_from([1, 6, 8, 16]),
    strength=st.sampled_from([0.0, 0.1, 5.0, 50.0, 1e4]),
    started=st.booleans(),
    precise=st.booleans(),
)
def test_chunks_equal_the_definition_with_its_gradients(
    kind: str, length: int, chunk: int, strength: float, started: bool, precise: bool
) -> None:
    torch.manual_seed(length)
    given = call(kind, length, strength, dtype=torch.float64 if precise else torch.float32)
    if started:
        given["state"] = torch.randn(2, 2, KEYS, VALUES, dtype=given["v"].dtype)
    wide = {name: t.double() for name, t in given.items()}
    agree(run(chunked(given), given, chunk=chunk), run(definition(given), wide), 1e-10 if precise else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [63, 64, 65, 200, 257, 700])
def test_the_default_chunk_equals_the_definition(kind: str, length: int) -> None:
    given = call(kind, length, rows=1, dtype=torch.float32)
    wide = {name: t.double() for name, t in given.items()}
    agree(run(chunked(given), given), run(definition(given), wide), 1e-5)


@pytest.mark.parametrize("length", [64, 100, 256, 700])
def test_a_decay_that_is_the_same_of_all_tokens_is_any_other(length: int) -> None:
    given = call("same", length, 2.0)
    assert given["decay"].stride(2) == 0
    for found, wanted in zip(recur(**given), stepwise(**given), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_is_the_sum_over_all_earlier_tokens(kind: str) -> None:
    """The state written out as a product of matrices, which no code here does."""
    given = call(kind, 5, 2.0, rows=1, heads=1)
    q, k, v, *_ = (given[name][0, 0] for name in ("q", "k", "v"))
    eye, s = torch.eye(KEYS, dtype=q.dtype), torch.zeros(KEYS, VALUES, dtype=q.dtype)
    wanted = []
    for t in range(5):
        fade = eye if kind == "none" else torch.diag(given["decay"][0, 0, t].exp().expand(KEYS))
        beta = given["beta"][0, 0, t] if kind == "delta" else torch.ones(())
        remove = eye - beta * torch.outer(k[t], k[t]) if kind == "delta" else eye
        s = remove @ fade @ s + beta * torch.outer(k[t], v[t])
        wanted.append(s.T @ q[t])
    y, last = definition(given)(**given)
    torch.testing.assert_close(y[0, 0], torch.stack(wanted))
    torch.testing.assert_close(last[0, 0], s)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_continues_where_another_call_ended(kind: str) -> None:
    given = call(kind, 40)
    whole, end = chunked(given)(**given, chunk=8)
    parts, s = [], None
    for part in (slice(0, 13), slice(13, 14), slice(14, 40)):
        y, s = chunked(given)(**{name: t[:, :, part] for name, t in given.items()}, state=s, chunk=8)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(s, end)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 9])
def test_the_input_is_left_as_it_was(kind: str, length: int) -> None:
    given = call(kind, length)
    given["state"] = torch.randn(2, 2, KEYS, VALUES, dtype=torch.float64)
    before = {name: t.clone() for name, t in given.items()}
    chunked(given)(**given, chunk=4)
    assert all(torch.equal(given[name], t) for name, t in before.items())


@pytest.mark.parametrize("kind", ["none", "same", "fixed", "head", "channel"])
@pytest.mark.parametrize("length", [1, 21])
def test_one_query_and_key_may_serve_all_heads(kind: str, length: int) -> None:
    shared = call(kind, length)
    shared["q"], shared["k"] = shared["q"][:, :1], shared["k"][:, :1]
    each = {**shared, "q": shared["q"].repeat(1, 2, 1, 1), "k": shared["k"].repeat(1, 2, 1, 1)}
    for found, wanted in zip(recur(**shared, chunk=8), stepwise(**each), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_keeps_its_state_in_single_precision(kind: str) -> None:
    given = call(kind, 100, rows=1, dtype=torch.float32)
    wanted, _ = definition(given)(**given)
    low = {name: t if name == "decay" else t.bfloat16() for name, t in given.items()}
    for function in (chunked(given), definition(given)):
        y, s = function(**low)
        assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
        assert (y.float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("kind", ["same", "fixed", "head", "channel", "delta"])
def test_a_restart_forgets_all_that_came_before(kind: str) -> None:
    given = call(kind, 20)
    segments = torch.tensor([0] * 7 + [1] * 1 + [2] * 12).expand(2, -1)
    packed = {**given, "decay": restart(given["decay"], segments)}
    parts = [
        definition(given)(**{name: t[:, :, part] for name, t in given.items()})[0]
        for part in (slice(0, 7), slice(7, 8), slice(8, 20))
    ]
    torch.testing.assert_close(chunked(given)(**packed, chunk=8)[0], torch.cat(parts, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 7, 64, 65, 130, 200, 257, 700])
def test_flops_are_those_counted(kind: str, length: int) -> None:
    for shared in (False, True)[: 1 if kind == "delta" else 2]:
        given = call(kind, length, rows=1, heads=3)
        if shared:
            given["q"], given["k"] = given["q"][:, :1], given["k"][:, :1]
        with FlopCounterMode(display=False) as counter:
            chunked(given)(**given)
        assert counter.get_total_flops() == flops(length, 3, KEYS, VALUES, kind, shared=shared)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [64, 256])
def test_kept_bytes_are_about_those_kept(kind: str, length: int) -> None:
    given = call(kind, length, rows=1, heads=3, dtype=torch.float32)
    for name, t in given.items():
        t.requires_grad_(not (kind in ("same", "fixed") and name == "decay"))
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y, _ = chunked(given)(**given)
    assert y.requires_grad and 0.85 < kept_bytes(length, 3, KEYS, VALUES, kind) / sum(kept.values()) < 1.15


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    for kind in KINDS:
        assert kept_bytes(2**16, 1, 64, 64, kind) == pytest.approx(16 * kept_bytes(2**12, 1, 64, 64, kind), rel=0.01)
        assert flops(2**16, 1, 64, 64, kind) == pytest.approx(16 * flops(2**12, 1, 64, 64, kind), rel=0.01)


def test_steps_start_where_the_paper_starts_them() -> None:
    step, decay = Steps(500)(torch.zeros(1, 1, 500))
    assert 0.001 <= step.min() < 0.0015 and 0.06 < step.max() <= 0.1001
    rate = -decay / step
    assert 1 <= rate.min() < 1.5 and 15.5 < rate.max() <= 16.001
