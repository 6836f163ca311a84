"""Claims about the optimisers: what Muon does to a matrix, who takes which parameter, and the rate's way."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny import fresh
from torch import nn

from headway.recipe import OptimizerSpec
from headway.train.optim import STEPS, Muon, build_optimizers, orthogonal, set_rate


@pytest.mark.parametrize("rows,columns", [(16, 16), (32, 8), (8, 48)])
@pytest.mark.parametrize("products,error", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_muon_turns_a_matrix_into_a_nearly_orthogonal_one(
    rows: int, columns: int, products: torch.dtype, error: float
) -> None:
    u, _, vt = torch.linalg.svd(torch.randn(3, rows, columns), full_matrices=False)
    spread = torch.logspace(0, -2, min(rows, columns))
    step = orthogonal((u * spread) @ vt * 37.0, products)
    assert step.dtype == torch.float32
    values = torch.linalg.svdvals(step)
    assert float(values.min()) > 0.8
    assert float(values.max()) < 1.2
    turned = u.mT @ step @ vt.mT  # the same directions, only their lengths differ
    off = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
    assert float(off.abs().max()) < error


def test_the_iteration_is_the_published_polynomial() -> None:
    """Step by step, a x + (b x x^T + c (x x^T)^2) x: on singular values, s -> a s + b s^3 + c s^5."""
    u, s, vt = torch.linalg.svd(torch.randn(2, 6, 10, dtype=torch.float64), full_matrices=False)
    values = s / (s.norm(dim=-1, keepdim=True) * 1.02 + 1e-7)
    for a, b, c in STEPS:
        values = a * values + b * values**3 + c * values**5
    found = orthogonal((u * s[:, None]) @ vt, torch.float64)
    torch.testing.assert_close(found, (u * values[:, None]) @ vt)


def test_muon_lowers_a_quadratic() -> None:
    target = torch.randn(12, 8)
    matrix = nn.Parameter(torch.zeros(12, 8))
    optimizer = Muon([matrix], lr=0.05)
    seen = []
    for _ in range(60):
        loss = (matrix - target).square().mean()
        seen.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] < 0.1 * seen[0]
    assert all(later < sooner for sooner, later in pairwise(seen[:20]))


def test_muon_takes_the_matrices_inside_the_blocks_and_every_parameter_is_taken_once() -> None:
    net = fresh("transformer")
    adamw, muon = build_optimizers(net, OptimizerSpec(name="muon"))
    taken = [p for o in (adamw, muon) for group in o.param_groups for p in group["params"]]
    assert len(taken) == len({id(p) for p in taken}) == len(list(net.parameters()))
    inside = {id(p) for group in muon.param_groups for p in group["params"]}
    named = {name for name, p in net.named_parameters() if id(p) in inside}
    assert named and all(".blocks." in name and name.endswith("weight") for name in named)
    assert len(build_optimizers(net, OptimizerSpec(name="adamw"))) == 1
    decayed = {id(p) for g in adamw.param_groups if g["weight_decay"] for p in g["params"]}
    assert all(p.ndim > 1 for p in net.parameters() if id(p) in decayed)


@pytest.mark.parametrize("decay", [1.0, 0.25, 0.0])
def test_the_rate_warms_up_stays_and_decays_to_nothing(decay: float) -> None:
    spec = OptimizerSpec(name="adamw", lr=0.1, warmup=10, decay=decay)
    optimizers = build_optimizers(nn.Linear(2, 2), spec)

    def rate(step: int, fraction: float) -> float:
        set_rate(optimizers, spec, step, fraction)
        return optimizers[0].param_groups[0]["lr"]

    assert rate(0, 0.0) == pytest.approx(0.01)
    assert rate(4, 0.0) == pytest.approx(0.05)
    assert rate(9, 0.0) == rate(500, 0.0) == pytest.approx(0.1)
    left = {1.0: (0.5, 0.1, 0.0), 0.25: (1.0, 0.4, 0.0), 0.0: (1.0, 1.0, 1.0)}[decay]
    found = [rate(500, fraction) / 0.1 for fraction in (0.5, 0.9, 1.0)]
    assert found == pytest.approx(left)
