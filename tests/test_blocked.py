"""Windows in blocks equal the definition, gradients included, in memory that grows with the length times the window."""

import warnings
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headway import mixers
from headway.attend import attend, call_of, explain, explain_layers
from headway.kernels import blocked
from headway.mask import Mask
from headway.positions import Alibi, Positions, positions_of

LENGTH = 37


def blocks_of(size: int) -> AbstractContextManager:
    return mock.patch.object(blocked, "block_size", lambda *_: size)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "block_size", lambda *_: 8)


def tensors(rows: int = 2, heads: int = 4, groups: int = 2, length: int = LENGTH, **named: Any) -> list[Tensor]:
    sizes = [(rows, count, length, 8) for count in (heads, groups, groups)]
    return [torch.randn(size, **named).requires_grad_() for size in sizes]


def with_gradients(inputs: list[Tensor], mask: Mask, backend: str, **named: Any) -> list[Tensor]:
    """The output of queries that are tokens, and the gradients of one fixed function of it."""
    y = attend(*inputs, mask, backend=backend, **named)
    if "q_pos" in named:
        y = y.masked_fill(named["q_pos"][:, None, :, None] < 0, 0.0)
    probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * probe).sum(), inputs)]


def close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, atol=tolerance, rtol=tolerance)


def packed(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three sequences a row and some padding: to which each token belongs, and where it stands in it."""
    segments, pos = torch.zeros(rows, length, dtype=torch.long), torch.full((rows, length), -1)
    for row in range(rows):
        cuts = torch.randint(1, length - 3, (2,), generator=generator).sort().values.tolist()
        for number, (i, j) in enumerate(zip([0, *cuts], [*cuts, length - 3], strict=True)):
            segments[row, i:j], pos[row, i:j] = number, torch.arange(j - i)
    return segments, pos


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Any call that `blocked` answers, and a size of blocks that makes many of them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    rows, groups, length = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(20, 50))
    asked = draw(st.sets(st.sampled_from(["causal", "sinks", "globals", "valid", "segments", "prefix", "also"])))
    left, right = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    rare = lambda *size: torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.1]))
    fields: dict[str, Any] = {"causal": "causal" in asked, "window": (left, right)}
    if "causal" in asked and "prefix" not in asked:
        fields["window"] = (left, draw(st.sampled_from([None, right])))
    if {"causal", "prefix"} <= asked:
        fields["prefix"] = draw(st.sampled_from([9, torch.randint(0, 20, (rows,), generator=generator)]))
    if "sinks" in asked:
        fields["sinks"] = draw(st.integers(1, 5))
    if "globals" in asked:
        fields["globals"] = rare(rows, draw(st.sampled_from([6, length])))
    if "valid" in asked:
        fields["valid"] = ~rare(rows, length)
    if "segments" in asked:
        fields["segments"] = torch.randint(0, 2, (rows, length), generator=generator)
    named: dict[str, Any] = {}
    match draw(st.sampled_from(["indices", "padded", "packed"])):
        case "padded":
            lengths, left_side = torch.randint(0, length + 1, (rows, 1), generator=generator), draw(st.booleans())
            valid = torch.arange(length)[None] < lengths
            pos = positions_of(valid.flip(1) if left_side else valid, rows, length, valid.device)
            named = {"q_pos": pos, "k_pos": pos, "aligned": True}
        case "packed":
            fields["segments"], pos = packed(rows, length, generator)
            named = {"q_pos": pos, "k_pos": pos, "aligned": True}
    mask = Mask(**fields)
    if "also" in asked:
        mask = mask & Mask(window=(left + 2, right + 1), sinks=2, causal=mask.causal and "prefix" not in asked)
    if "globals" not in asked and draw(st.booleans()):
        named["softcap"] = 0.7
    if draw(st.booleans()):
        named["scale"] = 0.3
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    widths = {
        "q": (groups * draw(st.integers(1, 2)), 8),
        "k": (groups, 8),
        "v": (groups, draw(st.sampled_from([8, 5]))),
    }
    for name, (count, width) in widths.items():
        x = torch.randn(rows, count, length, width, generator=generator, dtype=dtype)
        named[name] = x.requires_grad_()
    return {"mask": mask, **named}, draw(st.sampled_from([7, 16]))


@given(calls())
def test_blocks_equal_the_reference_with_their_gradients(drawn: tuple[dict[str, Any], int]) -> None:
    call, size = drawn
    inputs = [call.pop(name) for name in "qkv"]
    with blocks_of(size):
        found = with_gradients(inputs, backend="blocked", **call)
    close(
        found, with_gradients(inputs, backend="reference", **call), 1e-10 if found[0].dtype == torch.float64 else 1e-5
    )


VALID = torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [20]])
POS = positions_of(VALID, 2, LENGTH, VALID.device)
MASKS = {
    "causal": (Mask(causal=True, window=(5, 0)), {}),
    "both sides": (Mask(window=(5, 9), sinks=2), {}),
    "padding": (Mask(window=(5, 9), valid=VALID), {}),
    "padding, by positions": (Mask(causal=True, window=(9, 0)), {"q_pos": POS, "k_pos": POS, "aligned": True}),
    "global tokens": (Mask(window=(5, 3), valid=VALID, globals=torch.arange(9).expand(2, -1) % 4 == 1), {}),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.usefixtures("small_blocks")
def test_in_bf16_it_is_as_near_to_fp32_as_bf16_can_say(name: str) -> None:
    mask, named = MASKS[name]
    low = tensors(dtype=torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in low]
    for got, want in zip(
        with_gradients(low, mask, "blocked", **named), with_gradients(exact, mask, "reference", **named), strict=True
    ):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, atol=2e-2 * float(want.detach().abs().max()), rtol=2e-2)


@pytest.mark.parametrize("name", ["padding", "padding, by positions", "global tokens"])
@pytest.mark.parametrize("backend", ["fused", "plain"])
@pytest.mark.usefixtures("small_blocks")
def test_what_nobody_may_see_never_leaks(name: str, backend: str) -> None:
    mask, named = MASKS[name]
    q, k, v = (t.detach() for t in tensors())
    hidden = ~VALID[:, None, :, None]
    softcap = {"softcap": 1.0} if backend == "plain" and mask.globals is None else {}

    def planted(what: float) -> list[Tensor]:
        inputs = [q.clone(), k.masked_fill(hidden, what), v.masked_fill(hidden, what)]
        return with_gradients([t.requires_grad_() for t in inputs], mask, "blocked", **named, **softcap)

    for poisoned, clean in zip(planted(float("nan")), planted(0.0), strict=True):
        assert torch.equal(poisoned, clean)
    assert not planted(float("nan"))[2].masked_select(hidden).any()


@pytest.mark.parametrize("softcap", [None, 1.0])  # the fused kernel, and the plain one
@pytest.mark.usefixtures("small_blocks")
def test_a_query_that_sees_nothing_gives_zeros_and_takes_no_gradient(softcap: float | None) -> None:
    inputs = tensors(dtype=torch.float64)
    mask = Mask(causal=True, window=(2, 0), valid=torch.arange(LENGTH)[None] >= 20)
    y, *gradients = with_gradients(inputs, mask, "blocked", softcap=softcap)
    assert not y[:, :, :20].any() and bool(y[:, :, 20:].any(-1).all())
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][:, :, :20].any()


@pytest.mark.usefixtures("small_blocks")
def test_padding_at_minus_one_gives_zeros() -> None:
    y = attend(*tensors(), Mask(window=(3, 3), sinks=1), q_pos=POS, k_pos=POS, aligned=True, backend="blocked")
    assert not y.masked_select(POS[:, None, :, None] < 0).any()


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation inside returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


@pytest.mark.parametrize("name", ["plain", "padding", "sinks", "global tokens", "packed"])
def test_no_tensor_of_queries_times_keys_is_made(name: str) -> None:
    length = 1024
    valid = torch.arange(length)[None] < length - 5
    segments, pos = packed(1, length, torch.Generator().manual_seed(0))
    mask, named = {
        "plain": (Mask(causal=True, window=(30, 0)), {}),
        "padding": (Mask(window=(15, 15), valid=valid), {}),
        "sinks": (Mask(causal=True, window=(30, 0), sinks=4), {}),
        "global tokens": (Mask(window=(15, 15), globals=torch.arange(length)[None] < 3), {}),
        "packed": (Mask(causal=True, window=(30, 0), segments=segments), {"q_pos": pos, "k_pos": pos, "aligned": True}),
    }[name]
    inputs = tensors(1, 1, 1, length)
    with Largest() as seen:
        with_gradients(inputs, mask, "blocked", **named)
    assert inputs[0].numel() <= seen.elements <= 2 * inputs[0].numel() < length * length // 50


def test_what_is_kept_for_the_way_back_is_one_number_a_query() -> None:
    inputs, kept = tensors(1, 1, 1, 256), {}
    keep = lambda t: kept.update({t.data_ptr(): t.numel()}) or t
    with blocks_of(8), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = attend(*inputs, Mask(window=(4, 4)), backend="blocked")
    assert kept == {t.data_ptr(): t.numel() for t in [*inputs, y]} | {next(reversed(kept)): 256}


@pytest.mark.usefixtures("small_blocks")
def test_gradients_can_be_asked_for_again_and_not_differentiated() -> None:
    inputs = tensors()
    y = attend(*inputs, Mask(window=(5, 5)), backend="blocked").square().sum()
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    again = torch.autograd.grad(y, inputs, create_graph=True)
    assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again[0].sum().backward()


@pytest.mark.usefixtures("small_blocks")
def test_compiling_changes_nothing() -> None:
    inputs, mask = tensors(), Mask(causal=True, window=(5, 0))
    run = lambda *qkv: 2 * blocked.run(*qkv, mask, None, None, None, 8**-0.5, None, 0.0)
    with warnings.catch_warnings(action="ignore"):  # beartype, here in tests, breaks the graph in places of its own
        y = torch.compile(run, backend="eager")(*inputs) / 2
    probe = torch.linspace(-1, 1, y.numel()).view_as(y)
    found = [y, *torch.autograd.grad((y * probe).sum(), inputs)]
    close(found, with_gradients(inputs, mask, "blocked"), 1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_inference_mode_and_autocast_change_nothing_but_the_type() -> None:
    inputs, mask = tensors(), Mask(causal=True, window=(5, 0))
    plain = with_gradients(inputs, mask, "blocked")
    with torch.inference_mode():
        assert torch.equal(attend(*inputs, mask, backend="blocked"), plain[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(inputs, mask, "blocked")
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    close(found, plain, 3e-2)


@pytest.mark.usefixtures("small_blocks")
def test_heads_may_lie_in_memory_as_they_like() -> None:
    turned = [t.detach().mT.contiguous().mT.requires_grad_() for t in tensors()]
    for mask in (Mask(window=(5, 2)), Mask(window=(5, 2), sinks=1)):
        close(with_gradients(turned, mask, "blocked"), with_gradients(turned, mask, "reference"), 1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_global_tokens_that_are_told_anew_are_counted_anew() -> None:
    flags = torch.zeros(1, LENGTH, dtype=torch.bool)
    inputs, mask = tensors(), Mask(window=(3, 3), globals=flags)
    for at in (4, 30, 11):
        flags[:, at] = True
        close(with_gradients(inputs, mask, "blocked"), with_gradients(inputs, mask, "reference"), 1e-5)


WINDOW = Mask(causal=True, window=(511, 0))


@pytest.mark.parametrize(
    ("length", "mask", "chosen"),
    [
        (4096, WINDOW, "blocked: blocks of 64 queries see 575 keys each, not 4096"),
        (4096, Mask(window=(512, 512)), "blocked"),
        (512, WINDOW, "sdpa"),
        (768, WINDOW, "sdpa"),
        (4096, Mask(causal=True), "sdpa"),
        (4096, Mask(window=(4000, 0)), "sdpa"),
    ],
)
def test_it_is_taken_for_long_windowed_calls_alone(length: int, mask: Mask, chosen: str) -> None:
    q = torch.empty(1, 1, length, 1)
    with mock.patch("headway.attend.ORDER", ["blocked", "sdpa"]):
        assert explain(q, q, q, mask).startswith(chosen)


@pytest.mark.parametrize(
    ("mask", "named", "words"),
    [
        (Mask(causal=True), {}, "the mask has none"),
        (Mask(causal=True, window=(None, 0)), {}, "no bound to the left"),
        (Mask(window=(3, None)), {}, "no bound to the right, and the mask is not causal"),
        (Mask(causal=True, prefix=2, window=(3, None)), {}, "the prefix lets a query see ahead"),
        (Mask(window=(3, 3)), {"q_pos": POS, "k_pos": POS}, "not said to be aligned"),
        (Mask(window=(3, 3)), {"bias": torch.zeros(1, 1, LENGTH, LENGTH)}, "bias"),
        (Mask(window=(3, 3)), {"dropout": 0.5}, "dropout"),
        (MASKS["global tokens"][0], {"softcap": 1.0}, "soft-cap"),
    ],
)
def test_what_it_cannot_do_it_says(mask: Mask, named: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"blocked cannot: .*{words}"):
        attend(*tensors(), mask, backend="blocked", **named)


@pytest.mark.parametrize(
    ("pos", "words"),
    [
        ([0, 1, -1, 2, 3], "in row 0 2 follows -1: pad at the ends only"),
        ([0, 1, 3, 4, 5], "in row 0 3 follows 1"),
        ([0, 1, 2, 0, 1], "in row 0 0 follows 2"),
    ],
)
def test_a_broken_promise_of_alignment_is_an_error_and_not_a_wrong_answer(pos: list[int], words: str) -> None:
    at = torch.tensor([pos])
    inputs, mask = tensors(1, length=5), Mask(window=(1, 1))
    with pytest.raises(ValueError, match=words):
        attend(*inputs, mask, q_pos=at, k_pos=at, aligned=True, backend="blocked")
    with pytest.raises(ValueError, match="stand at the same positions"):
        attend(*inputs, mask, q_pos=at + 1, k_pos=at, aligned=True, backend="blocked")


def test_it_wants_as_many_queries_as_keys() -> None:
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4)
    call = call_of(q, k, k, WINDOW, q_pos=torch.arange(3)[None], k_pos=torch.arange(5)[None], aligned=True)
    assert "not for 3 queries and 5 keys" in blocked.refuses(call)


def test_a_windowed_layer_takes_it_with_and_without_padding_but_not_with_alibi() -> None:
    length, options = 2048, {"name": "attention", "heads": 1, "window": (63, 0)}
    valid = torch.arange(length)[None] < length - 7
    took = {}
    for name, scheme in {"none": Positions(), "alibi": Alibi()}.items():
        layer = torch.nn.ModuleList([mixers.build(options, 4, scheme)])
        layer.forward = lambda x, layer=layer, **named: layer[0](x, **named)
        for mask in (Mask(causal=True), Mask(causal=True, valid=valid)):
            pos = positions_of(mask.valid, 1, length, valid.device)
            with mock.patch("headway.attend.ORDER", ["blocked", "sdpa"]):
                (said,) = explain_layers(layer, torch.randn(1, length, 4), mask=mask, pos=pos).values()
            took[name, mask.valid is not None] = said.split(":")[0]
    assert took == {
        ("none", False): "blocked",
        ("none", True): "blocked",
        ("alibi", False): "sdpa",
        ("alibi", True): "sdpa",
    }
