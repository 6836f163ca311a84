"""Claims about PyTorch's fused kernels where Headway steps around them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headway.attend import attend
from headway.mask import Mask

VALID = torch.arange(9) < torch.tensor([9, 4, 0])[:, None]
CASES = {
    "full": (Mask(), False),
    "causal": (Mask(causal=True), False),
    "padded": (Mask(valid=VALID), False),
    "causal, padded, with a bias": (Mask(causal=True, valid=VALID), True),
}


def grown(mask: Mask, biased: bool, kv_heads: int, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Output and gradients of one call on the same numbers, rounded to bf16 and computed in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda heads: torch.randn(3, heads, 9, 8, generator=generator).bfloat16().to(dtype).requires_grad_()
    q, k, v = draw(4), draw(kv_heads), draw(kv_heads)
    bias = torch.randn(1, 4, 9, 9, generator=generator).bfloat16().to(dtype) if biased else None
    y = attend(q, k, v, mask, bias=bias, backend=backend)
    weight = torch.randn(y.shape, generator=generator).bfloat16().to(dtype)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), weight)]


@pytest.mark.parametrize("mask,biased", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_short_training_in_bf16_leaves_the_slow_kernel_and_is_as_exact_as_the_reference(
    monkeypatch: pytest.MonkeyPatch, mask: Mask, biased: bool, kv_heads: int
) -> None:
    exact = grown(mask, biased, kv_heads, torch.float32, "reference")
    plain = grown(mask, biased, kv_heads, torch.bfloat16, "reference")
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", None)
        found = grown(mask, biased, kv_heads, torch.bfloat16, "sdpa")
    for truth, slow, fast in zip(exact, plain, found, strict=True):
        assert fast.dtype == torch.bfloat16
        assert (fast - truth).norm() <= 1.5 * (slow - truth).norm()


def test_without_gradients_the_fused_kernel_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **n: calls.append(1) or fused(*a, **n))
    q = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16)
    attend(q, q, q)
    with torch.no_grad():
        attend(q.requires_grad_(), q, q)
    assert len(calls) == 2
