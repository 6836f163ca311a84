"""Our FlashAttention equals the definition: on a GPU where there is one, else under Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import integers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headway.attend import attend, call_of
from headway.kernels import places
from headway.kernels import triton as backend
from headway.mask import Mask

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
few = settings(max_examples=60 if ON_GPU else 16)  # the interpreter takes a second for each


@pytest.fixture(scope="module", autouse=True)
def one_configuration() -> Iterator[None]:
    """Small tiles, so that short sequences have several; and nothing is timed."""
    from headway.kernels import _flash_triton

    kernels = [_flash_triton.tuned_forward, _flash_triton.tuned_queries, _flash_triton.tuned_keys]
    assert ON_GPU or _flash_triton.INTERPRETED, "Triton was imported before TRITON_INTERPRET was set"
    before = [kernel.configs for kernel in kernels]
    for kernel in kernels:
        kernel.configs = kernel.configs[-1:]
    yield
    for kernel, configs in zip(kernels, before, strict=True):
        kernel.configs = configs


def amid_nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that are a part of a larger tensor, NaN all around them."""
    whole = torch.full([size + 2 for size in shape], float("nan"), dtype=dtype, device=DEVICE)
    part = whole[tuple(slice(1, -1) for _ in shape)]
    return part.copy_(torch.randn(*shape))


def both(inputs: list[Tensor], mask: Mask, **named: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients, by the reference in double precision and by Triton, whose buffers start as NaN."""

    def run(name: str, inputs: list[Tensor]) -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = attend(*inputs, mask, **named, backend=name)
        probe = torch.linspace(-1, 1, y.numel(), device=y.device).to(y.dtype).view_as(y)
        return [y, *torch.autograd.grad((y * probe).sum(), inputs)]

    empty = torch.empty_like
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
        found = run("triton", inputs)
    return run("reference", [t.double() for t in inputs]), found


def check(want: list[Tensor], got: list[Tensor], tolerance: float = 1e-5) -> None:
    for name, one, two in zip(("y", "dq", "dk", "dv"), want, got, strict=True):
        torch.testing.assert_close(two.double(), one, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[Tensor], Mask, dict[str, Tensor]]:
    rows, groups, shared = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1)]))
    queries, keys, width = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.sampled_from([3, 16, 24]))
    asked = draw(st.sets(st.sampled_from(["causal", "window", "valid", "segments"])))
    fields: dict[str, Any] = {"causal": "causal" in asked}
    if "window" in asked:
        fields["window"] = draw(st.tuples(*[st.none() | st.integers(0, 9)] * 2))
    given = draw(st.booleans()) or (queries != keys and bool(asked & {"causal", "window"}))
    named = {}
    if given:
        named["q_pos"] = integers(draw, rows, queries, -1, 20)
        named["k_pos"] = integers(draw, rows, keys, -1, 20)
    if "valid" in asked:
        fields["valid"] = integers(draw, rows, keys, 0, 1).bool().to(DEVICE)
    if "segments" in asked:
        fields["segments"] = integers(draw, rows, queries, 0, 2).to(DEVICE)
        if queries != keys or draw(st.booleans()):
            fields["key_segments"] = integers(draw, rows, keys, 0, 2).to(DEVICE)
    torch.manual_seed(draw(st.integers(0, 99)))
    inputs = [amid_nan(rows, groups * shared, queries, width), *(amid_nan(rows, groups, keys, width) for _ in "kv")]
    return inputs, Mask(**fields), {name: t.to(DEVICE) for name, t in named.items()}


def allowed_by(q: Tensor, k: Tensor, mask: Mask, named: dict[str, Tensor]) -> Tensor:
    at = places(q, k, named.get("q_pos"), named.get("k_pos"))
    return mask.allows(*at).expand(q.shape[0], q.shape[2], -1)


@few
@given(scenes())
def test_it_equals_the_definition_with_its_gradients_and_never_reads_a_key_nobody_sees(scene: tuple) -> None:
    (q, k, v), mask, named = scene
    unseen = ~allowed_by(q, k, mask, named).any(1)[:, None, :, None]
    k, v = (t.masked_fill(unseen, float("nan")) for t in (k, v))
    check(*both([q, k, v], mask, **named, scale=0.4))


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(causal=True),
        Mask(window=(3, 5)),
        Mask(window=(None, 16)),
        Mask(causal=True, window=(17, None)),
    ],
    ids=lambda mask: f"{'causal' if mask.causal else ''}{mask.window or ''}",
)
def test_tiles_in_the_middle_of_what_is_seen_need_no_mask(mask: Mask) -> None:
    check(*both([amid_nan(1, 1, 36, 4) for _ in "qkv"], mask))


def packed(*lengths: int, padding: int) -> tuple[Tensor, Tensor]:
    """Positions and segments of sequences side by side, and padding behind them."""
    pos = torch.cat([*map(torch.arange, lengths), torch.full((padding,), -1)])
    segments = torch.cat([torch.full((length,), i) for i, length in enumerate((*lengths, padding))])
    return pos[None].to(DEVICE), segments[None].to(DEVICE)


def test_packed_sequences_behind_each_other_with_padding() -> None:
    pos, segments = packed(21, 5, 9, padding=6)
    mask = Mask(causal=True, window=(12, None), segments=segments, valid=pos >= 0)
    inputs = [amid_nan(1, 2, 41, 4), amid_nan(1, 1, 41, 4), amid_nan(1, 1, 41, 4)]
    inputs[1][:, :, 35:] = inputs[2][:, :, 35:] = float("nan")
    check(*both(inputs, mask, q_pos=pos, k_pos=pos))


def test_a_key_of_a_segment_without_queries_is_never_read_although_the_last_tile_is_not_full() -> None:
    segments = torch.ones(1, 20, dtype=torch.long, device=DEVICE)
    mask = Mask(segments=segments, key_segments=segments - torch.eye(20, dtype=torch.long, device=DEVICE)[3])
    inputs = [amid_nan(1, 1, 20, 4) for _ in "qkv"]
    inputs[1][:, :, 3] = inputs[2][:, :, 3] = float("nan")
    check(*both(inputs, mask))


def test_a_query_that_sees_nothing_gives_zeros_and_takes_no_gradient() -> None:
    valid = torch.arange(20, device=DEVICE)[None] >= 18
    _, (y, dq, _, _) = both([amid_nan(1, 1, 20, 4) for _ in "qkv"], Mask(causal=True, valid=valid))
    assert not y[:, :, :18].any() and not dq[:, :, :18].any() and bool((y[:, :, 18:] != 0).all())


def test_half_precision_is_summed_in_full_precision() -> None:
    dtype = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter knows no product of bfloat16
    want, got = both([amid_nan(1, 1, 40, 16, dtype=dtype) for _ in "qkv"], Mask(causal=True))
    assert all(t.dtype == dtype for t in got)
    check(want, got, 0.03 if ON_GPU else 0.004)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(causal=True, window=(200, None))], ids="fcw")
def test_long_sequences_on_a_gpu(mask: Mask, width: int, dtype: torch.dtype) -> None:
    inputs = [torch.randn(2, heads, 1000, width, device=DEVICE, dtype=dtype) for heads in (4, 2, 2)]
    check(*both(inputs, mask), 1e-5 if dtype == torch.float32 else 0.03)


@given(st.data())
def test_no_tile_is_left_out_that_holds_something_visible(data: st.DataObject) -> None:
    inputs, mask, named = data.draw(scenes())
    q, k = inputs[:2]
    plan = backend.plan_of(q, k, mask, named.get("q_pos"), named.get("k_pos"), 1.0, 4)
    if plan.q_edges is None or plan.k_edges is None:
        return
    allowed = allowed_by(q, k, mask, named)
    for edges, seen in ((plan.q_edges, allowed), (plan.k_edges, allowed.mT)):
        first, end = (edge.repeat_interleave(4, 1)[:, : seen.shape[1], None] for edge in edges.unbind(1))
        here = torch.arange(seen.shape[2], device=DEVICE)
        assert not (seen & ((here < first) | (here >= end))).any()


def test_tiles_that_cannot_meet_are_left_out() -> None:
    pos, segments = packed(16, 16, padding=8)
    q = torch.empty(1, 1, 40, 4, device=DEVICE)
    plan = backend.plan_of(q, q, Mask(causal=True, segments=segments), pos, pos, 1.0, 4)
    assert plan.q_edges is not None and plan.k_edges is not None and not plan.holes
    firsts, ends = plan.q_edges[0].tolist()
    assert firsts[:8] == [0] * 4 + [16] * 4 and ends == [4, 8, 12, 16, 20, 24, 28, 32, 0, 0]
    firsts, ends = plan.k_edges[0].tolist()
    assert firsts[:8] == list(range(0, 32, 4)) and ends == [16] * 4 + [32] * 4 + [0, 0]


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"mask": Mask(window=(1, 1), sinks=1)}, "its kernels know no sinks"),
        ({"mask": Mask(causal=True, prefix=2)}, "its kernels know no prefix"),
        ({"mask": Mask(window=(2, 2)) & Mask(window=(1, 1), globals=torch.ones(1, 1).bool())}, "know no globals"),
        ({"bias": torch.zeros(1, 1, 2, 2)}, "its kernels know no bias"),
        ({"softcap": 2.0, "dropout": 0.5}, "its kernels know no softcap, dropout"),
        ({"dtype": torch.float64}, "compute in float32, and the call is in float64"),
        ({"width": 160}, "up to 128 wide, values as queries, not 160 and 160"),
        ({"queries": 0}, "there is nothing to compute"),
    ],
)
def test_what_it_cannot_it_says(named: dict[str, Any], words: str) -> None:
    named = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in named.items()}
    size = 1, 1, named.pop("queries", 2), named.pop("width", 4)
    q = torch.zeros(*size, dtype=named.pop("dtype", torch.float32), device=DEVICE)
    with pytest.raises(ValueError, match=f"attend: triton cannot: .*{words}.*; .*reference.* can$"):
        attend(q, q, q, **named, backend="triton")


def test_it_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(1, 1, 2, 4)
    assert backend.refuses(call_of(q, q, q)) == "it needs a GPU, or TRITON_INTERPRET=1"
    with monkeypatch.context() as patch:
        patch.setattr(backend, "find_spec", lambda name: None)
        backend._has_triton.cache_clear()
        assert "not installed" in backend.refuses(call_of(q, q, q))
    backend._has_triton.cache_clear()


def test_it_pays_on_a_gpu_where_another_kernel_needs_a_dense_mask() -> None:
    def said(length: int, mask: Mask, device: str = "cuda") -> str:
        q = torch.empty(1, 1, length, 16, dtype=torch.float16)
        return backend.pays(replace(call_of(q, q, q, mask), device=device))

    local = Mask(window=(9, 9))
    assert "dense mask of 1024 x 1024" in said(1024, local)
    assert not said(1024, Mask(causal=True)) and not said(1023, local) and not said(1024, local, "cpu")


@pytest.mark.long
def test_the_kernels_compile_for_a_hopper_gpu_without_one() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("wgmma") == 6
