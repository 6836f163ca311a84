"""FlexAttention is told exactly what the mask says; block masks are made once and not kept for longer than needed."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from drawn import scenes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headway.attend import attend, call_of
from headway.kernels import flex
from headway.mask import Mask


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    flex._kept.clear()
    yield
    flex._kept.clear()


def heads(rows: int, count: int, length: int, width: int = 16) -> Tensor:
    return torch.randn(rows, count, length, width)


@given(scenes(2), st.booleans())
def test_the_mask_as_code_is_the_mask(scene: tuple, placed: bool) -> None:
    (one, two), q_pos, k_pos = scene
    (rows, queries), keys = q_pos.shape, k_pos.shape[1]
    at = (q_pos, k_pos) if placed else (torch.arange(queries)[None], torch.arange(keys)[None])
    b, query, key = torch.arange(rows)[:, None, None], torch.arange(queries)[:, None], torch.arange(keys)
    for mask in (one, one & two):
        allowed = flex.mask_mod_of(mask, rows, *(at if placed else (None, None)))(b, b, query, key)
        assert torch.equal(allowed.expand(rows, queries, keys), mask.allows(*at).expand(rows, queries, keys))


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_cap_and_bias_as_code_are_cap_and_bias(shape: tuple[int, int]) -> None:
    scores, bias = torch.randn(2, 3, 4, 5), torch.randn(*shape, 4, 5)
    at = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    made = lambda *given: flex.score_mod_of(*given)(scores, *at)
    torch.testing.assert_close(made(bias, None), scores + bias)
    torch.testing.assert_close(made(bias, 0.7), 0.7 * torch.tanh(scores / 0.7) + bias)
    assert flex.score_mod_of(None, None) is None


@given(scenes(), st.integers(1, 3))
def test_blocks_are_seen_in_part_or_whole_as_the_mask_says(scene: tuple, block: int) -> None:
    (mask,), q_pos, k_pos = scene
    rows = q_pos.shape[0]
    allowed = mask.allows(q_pos, k_pos).expand(rows, q_pos.shape[1], -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", block)
        made, seen = flex._make(mask, q_pos, k_pos, rows)
    assert torch.equal(seen, allowed.any(1))
    told = {
        "partly": (made.kv_num_blocks, made.kv_indices),
        "whole": (made.full_kv_num_blocks, made.full_kv_indices),
    }
    for row in range(rows):
        for start in range(0, q_pos.shape[1], block):
            found = {name: listed(*both, row, start // block) for name, both in told.items()}
            want: dict[str, list[int]] = {"partly": [], "whole": []}
            for at in range(0, k_pos.shape[1], block):
                tile = allowed[row, start : start + block, at : at + block]
                if tile.all() and tile.numel() == block**2:
                    want["whole"].append(at // block)
                elif tile.any():
                    want["partly"].append(at // block)
            assert found == want


def listed(counts: Tensor, indices: Tensor, row: int, at: int) -> list[int]:
    return indices[row, 0, at, : int(counts[row, 0, at])].tolist()


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many block masks have been made."""
    made, make = [], flex._make
    monkeypatch.setattr(flex, "_make", lambda *given, **named: made.append(1) or make(*given, **named))
    return lambda: len(made)


def test_layers_share_a_block_mask_until_its_tensors_change_or_die(count: Callable[[], int]) -> None:
    q, pos = heads(2, 1, 20), torch.arange(20).expand(2, -1)
    valid = torch.ones(2, 20, dtype=torch.bool)
    layer = lambda mask: flex.blocks_of(q, q, mask & Mask(window=(4, 0)), pos, pos)
    for _ in range(3):
        layer(Mask(causal=True, valid=valid))
    assert count() == 1
    layer(Mask(valid=valid))
    assert count() == 2
    valid[0, 3] = False
    _, seen = layer(Mask(causal=True, valid=valid))
    assert count() == 3 and seen is not None and not seen[0, 3]
    held = weakref.ref(valid)
    del valid
    gc.collect()
    assert held() is None
    flex.blocks_of(q, q, Mask(causal=True), None, None)
    assert len(flex._kept) == 1


def test_a_mask_without_tensors_is_known_by_its_facts(count: Callable[[], int]) -> None:
    for rows in (1, 2, 1):
        flex.blocks_of(heads(rows, 1, 20), heads(rows, 1, 20), Mask(causal=True, window=(3, None)), None, None)
    assert count() == 1
    for mask in (Mask(causal=True, window=(4, None)), Mask(causal=True, window=(4, None), sinks=1)):
        flex.blocks_of(heads(1, 1, 20), heads(1, 1, 20), mask, None, None)
    assert count() == 3
    for size in range(20, 40):
        flex.blocks_of(heads(1, 1, size), heads(1, 1, size), Mask(causal=True), None, None)
    assert len(flex._kept) <= 8


def scene() -> tuple[list[Tensor], dict[str, Any]]:
    """All that may be asked for at once; the last 10 queries of row 1 see nothing, keys that nobody sees are NaN."""
    rows, length = 2, 150
    pos = torch.arange(length).expand(rows, -1).clone()
    pos[1, 140:] = -1
    valid = pos >= 0
    valid[0, 0] = False
    mask = Mask(
        causal=True,
        prefix=torch.tensor([5, 0]),
        window=(20, 0),
        sinks=2,
        globals=torch.arange(length).expand(rows, -1) == 7,
        valid=valid,
        segments=(torch.arange(length) // 60).expand(rows, -1),
    ) & Mask(window=(90, 90), sinks=1)
    q, k, v = heads(rows, 4, length), heads(rows, 2, length), heads(rows, 2, length, 24)
    k, v = (t.masked_fill(~valid[:, None, :, None], float("nan")) for t in (k, v))
    named = {"q_pos": pos, "k_pos": pos, "bias": torch.randn(1, 4, length, length), "softcap": 3.0, "scale": 0.3}
    return [q, k, v], {"mask": mask, **named}


def equal(inputs: list[Tensor], named: dict[str, Any]) -> Tensor:
    found = attend(*inputs, **named, backend="flex")
    torch.testing.assert_close(found, attend(*inputs, **named, backend="reference"), atol=1e-5, rtol=1e-5)
    return found


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_it_equals_the_definition_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "_compiled", lambda device: flex_attention)
    inputs, named = scene()
    assert not equal(inputs, named)[1, :, 140:].any()
    q = heads(1, 2, 16)
    equal([q, q, q], {"mask": Mask()})


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
def test_it_equals_the_definition_compiled_and_is_compiled_once_for_further_masks() -> None:
    inputs, named = scene()
    assert not equal(inputs, named)[1, :, 140:].any()
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    again, others = scene()
    equal(again, others)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_equals_the_definition_with_its_gradients_on_a_gpu() -> None:
    inputs, named = scene()
    to = lambda t: t.cuda() if isinstance(t, Tensor) else t
    move = lambda mask: replace(
        mask,
        **{name: to(value) for name, value in vars(mask).items() if isinstance(value, Tensor)},
        also=tuple(map(move, mask.also)),
    )
    named = {name: move(value) if isinstance(value, Mask) else to(value) for name, value in named.items()}
    inputs = [to(t) for t in inputs]

    def run(backend: str) -> list[Tensor]:
        given = [t.clone().requires_grad_() for t in inputs]
        y = attend(*given, **named, backend=backend)
        return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).to(y).view_as(y)).sum(), given)]

    for got, want in zip(run("flex"), run("reference"), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "named", "words"),
    [
        ((1, 1, 15, 16), {}, "starts at 16 tokens and heads 16 wide, not 15 x 15 tokens with heads of 16"),
        ((1, 1, 16, 8), {}, "not 16 x 16 tokens with heads of 8"),
        ((1, 1, 16, 16), {"dropout": 0.1}, "no dropout"),
    ],
)
def test_what_it_cannot_it_says(size: tuple[int, ...], named: dict[str, Any], words: str) -> None:
    q = torch.zeros(size)
    with pytest.raises(ValueError, match=f"attend: flex cannot: .*{words}; .*reference.* can$"):
        attend(q, q, q, **named, backend="flex")


def test_on_the_cpu_it_needs_a_compiler_and_has_no_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 1, 16, 16)
    assert flex.refuses(call_of(q.double(), q, q)).endswith("the call is in float64")
    assert flex.refuses(call_of(q.requires_grad_(), q, q)) == "FlexAttention has no way back on the CPU"
    monkeypatch.setattr(flex, "_compilers", lambda: (False, False))
    with torch.no_grad():
        assert "install g++ or clang++" in flex.refuses(call_of(q, q, q))
    assert "needs Triton" in flex.refuses(replace(call_of(q, q, q), device="cuda"))


def test_it_pays_on_a_gpu_where_another_kernel_needs_a_dense_mask() -> None:
    def said(length: int, mask: Mask, device: str = "cuda", **named: Any) -> str:
        q = torch.empty(1, 1, length, 16, dtype=torch.float16)
        return flex.pays(replace(call_of(q, q, q, mask, **named), device=device))

    sparse = Mask(causal=True, window=(9, 9), sinks=1)
    assert "dense mask" in said(1024, sparse) and "1024 x 1024" in said(1024, Mask(), softcap=2.0)
    assert not said(1024, Mask(causal=True)) and not said(1023, sparse) and not said(1024, sparse, "cpu")


def test_importing_attend_imports_neither_triton_nor_flex_attention() -> None:
    heavy = "{'triton', 'torch.nn.attention.flex_attention', 'torch._inductor'}"
    script = f"import sys, headway.attend; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
