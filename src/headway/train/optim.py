"""Optimisers: AdamW (1711.05101) and Muon, and the rate's way through the budget.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix, found by a few Newton-Schulz
steps: O = U V^T for momentum = U S V^T. Matrices of one shape are stacked, so that a step is a handful of products.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway import machine
from headway.recipe import OptimizerSpec
from headway.train import schedule
from headway.train.ranks import Deal, is_cut, own_part

# Found by You Jiacheng (2025), in use in modded-nanogpt: five steps bring all but tiny singular values near one
STEPS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for matrices; the step is scaled by sqrt(rows / columns) where tall.

    The products run in bf16 where the machine is fast at it, whatever the model's precision: a direction right to two
    digits is all they are for, and momentum and weights stay as they are.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        shares: Mapping[nn.Parameter, float] | None = None,
    ) -> None:
        kind = {p: (tuple(p.shape), (shares or {}).get(p, 1.0)) for p in parameters}
        kinds = sorted(set(kind.values()))
        groups = [{"params": [p for p in parameters if kind[p] == one], "lr": lr * one[1]} for one in kinds]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.products = torch.bfloat16 if machine.fast_bf16() else torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            kept = [own_part(self.state[p]["momentum"]) for p in parameters]
            gradients = [own_part(p.grad) for p in parameters if p.grad is not None]
            torch._foreach_lerp_(kept, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, kept, group["momentum"])
            rows, columns = parameters[0].shape
            steps = self._steps(ahead, parameters[0])
            own = [own_part(p) for p in parameters]
            torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(own, steps, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _steps(self, ahead: Sequence[Tensor], shared: Tensor) -> list[Tensor]:
        """The directions of matrices of one shape; where ranks cut them, each sees some of them whole."""
        if not is_cut(shared):
            return list(orthogonal(torch.stack(list(ahead)), self.products).unbind())
        deal = Deal(shared, len(ahead))
        return deal.back(orthogonal(deal.out(ahead), self.products))


def orthogonal(matrices: Float[Tensor, "N R C"], products: torch.dtype = torch.float32) -> Float[Tensor, "N R C"]:
    """The nearest orthogonal matrix of each in a stack of them, nearly: singular values come out about one.

    `products` is the precision of the iteration x <- a x + (b x x^T + c (x x^T)^2) x, on the smaller side of x.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)).to(products)
    for a, b, c in STEPS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype)
    return x.mT if tall else x


def build_optimizers(model: nn.Module, spec: OptimizerSpec) -> list[torch.optim.Optimizer]:
    """Muon takes the linear maps inside the blocks; AdamW takes the rest, and decays only matrices."""
    inside = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".blocks." in f".{name}" and spec.name == "muon"
        if module.weight.requires_grad
    }
    shares = layer_shares(model, spec.layer_decay)
    rest = [p for p in model.parameters() if p.requires_grad and p not in inside]
    groups = [
        {"params": [p for p in rest if shares[p] == share and (p.ndim > 1) == matrix], "lr": spec.lr * share,
         "weight_decay": spec.weight_decay if matrix else 0.0}
        for share in sorted({shares[p] for p in rest} | {1.0}) for matrix in (True, False)
    ]  # fmt: skip
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, fused=True)]
    ordered = [p for p in model.parameters() if p in inside]
    if ordered:
        optimizers.append(Muon(ordered, spec.matrix_lr, weight_decay=spec.weight_decay, shares=shares))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def layer_shares(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Of each parameter's rate, what is left of the full one: `decay` for every block that stands above it in its
    stack, and once more for what lies below all blocks. What lies behind them (last norms, heads) has all of it."""
    depth: dict[str, int] = {}
    places = {name: re.match(r"(.*\.|)blocks\.(\d+)\.", name) for name, _ in model.named_parameters()}
    for inside in filter(None, places.values()):
        depth[inside[1]] = max(depth.get(inside[1], 0), int(inside[2]) + 1)
    behind = ("heads.", *(f"{stack}norm." for stack in depth))
    shares = {}
    for name, parameter in model.named_parameters():
        if (found := places[name]) is not None:
            above = depth[found[1]] - 1 - int(found[2])
        else:
            above = 0 if name.startswith(behind) else max(depth.values(), default=0)
        shares[parameter] = decay**above
    return shares


def set_rate(optimizers: list[torch.optim.Optimizer], spec: OptimizerSpec, step: int, fraction: float) -> None:
    """Each group's rate at a step, counted from 0, when `fraction` of the budget is spent."""
    share = schedule.scale(spec, step, fraction)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
