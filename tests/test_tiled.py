"""The tiled twin equals the definition whatever the size of its tiles, and never holds a T x S matrix."""

import pytest
import torch
from drawn import scenes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headway.attend import attend, explain
from headway.kernels import tiled
from headway.mask import Mask


def both(tile: int, inputs: dict[str, Tensor], **named: object) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients, by the reference and in tiles of that size."""

    def run(backend: str) -> list[Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiled, "TILE", tile)
            y = attend(**inputs, **named, backend=backend)
            probe = torch.linspace(-1, 1, y.numel()).to(y.dtype).view_as(y)
            return [y, *torch.autograd.grad((y * probe).sum(), list(inputs.values()))]

    return run("reference"), run("tiled")


def made(rows: int, heads: int, groups: int, queries: int, keys: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"q": (rows, heads, queries, 4), "k": (rows, groups, keys, 4), "v": (rows, groups, keys, 3)}
    return {name: torch.randn(*shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


@given(st.data(), scenes(2), st.integers(1, 3))
def test_tiles_of_any_size_equal_the_definition(data: st.DataObject, scene: tuple, tile: int) -> None:
    (one, two), q_pos, k_pos = scene
    mask = data.draw(st.sampled_from([one, one & two]))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    (rows, queries), keys = q_pos.shape, k_pos.shape[1]
    groups, shared = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    inputs = made(rows, groups * shared, groups, queries, keys, dtype)
    named = {"q_pos": q_pos, "k_pos": k_pos, "scale": 0.4, "softcap": data.draw(st.sampled_from([None, 0.7]))}
    if data.draw(st.booleans()):
        shape = data.draw(st.sampled_from([(rows, groups * shared), (1, groups * shared), (rows, 1), (1, 1)]))
        inputs["bias"] = torch.randn(*shape, queries, keys, dtype=dtype).requires_grad_()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for want, got in zip(*both(tile, inputs, mask=mask, **named), strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@given(st.data(), scenes(2))
def test_a_part_of_a_mask_allows_that_part_of_what_it_allows(data: st.DataObject, scene: tuple) -> None:
    (one, two), q_pos, k_pos = scene
    first, last = (sorted(data.draw(st.tuples(*[st.integers(0, t.shape[1])] * 2))) for t in (q_pos, k_pos))
    queries, keys = slice(*first), slice(*last)
    for mask in (one, one & two):
        whole = mask.allows(q_pos, k_pos).expand(-1, q_pos.shape[1], -1)
        part = tiled.part_of(mask, queries, keys).allows(q_pos[:, queries], k_pos[:, keys])
        assert torch.equal(part.expand(-1, queries.stop - queries.start, -1), whole[:, queries, keys])


@given(scenes(), st.integers(1, 3))
def test_nan_at_a_key_nobody_sees_stays_there_whatever_the_tile(scene: tuple, tile: int) -> None:
    (mask,), q_pos, k_pos = scene
    (rows, queries), keys = q_pos.shape, k_pos.shape[1]
    unseen = ~mask.allows(q_pos, k_pos).expand(rows, queries, keys).any(1)[:, None, :, None]
    inputs = made(rows, 2, 1, queries, keys, torch.float64)
    poisoned = {
        name: t if name == "q" else t.detach().masked_fill(unseen, float("nan")).requires_grad_()
        for name, t in inputs.items()
    }
    _, clean = both(tile, inputs, mask=mask, q_pos=q_pos, k_pos=k_pos)
    _, found = both(tile, poisoned, mask=mask, q_pos=q_pos, k_pos=k_pos)
    assert all(torch.equal(one, two) for one, two in zip(clean, found, strict=True))


def test_half_precision_is_summed_in_full_precision() -> None:
    inputs = made(1, 2, 1, 300, 300, torch.float64)
    half = {name: t.detach().bfloat16().requires_grad_() for name, t in inputs.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in half.items()}
    mask = Mask(causal=True, window=(99, 0))
    for want, got in zip(both(64, exact, mask=mask)[0], both(64, half, mask=mask)[1], strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, atol=0.01, rtol=2**-8)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.nbytes = max([self.nbytes, *made])
        return out


def test_nothing_of_the_size_of_all_scores_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE", 16)
    inputs = made(1, 1, 1, 96, 96, torch.float32)
    sizes = {}
    for backend in ("tiled", "reference"):
        with Largest() as largest:
            attend(**inputs, mask=Mask(causal=True), softcap=2.0, backend=backend).sum().backward()
        sizes[backend] = largest.nbytes
    assert sizes["tiled"] <= 4 * 96 * 4 and sizes["reference"] >= 4 * 96 * 96


def test_it_is_taken_where_the_scores_of_a_capped_call_would_hurt() -> None:
    q = torch.empty(1, 1, 1024, 4)
    assert explain(q, q, q, softcap=2.0).startswith("tiled: PyTorch has no soft-cap")
    assert "tiled" not in explain(q, q, q) and "tiled" not in explain(q[:, :, 1:], q, q, softcap=2.0)


def test_dropout_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="tiled cannot: dropout would need"):
        attend(q, q, q, dropout=0.1, backend="tiled")
