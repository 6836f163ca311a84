"""Pictures, fewer and fewer: a ConvNet and a ViT on digits, as they are and with their pixels shuffled (2010.11929)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headway import models
from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Line, Plot, Row, Table
from headway.data.builtin import digits
from headway.recipe import OptimizerSpec
from headway.train.optim import build_optimizers, set_rate

SECTION = "A"
TITLE = "Pictures: locality as a bias"
SAID = "With little data a convolution beats a Transformer on pictures, as it knows that neighbours belong together."
METHOD = "Accuracy on digits held out as the training rows shrink; and again with all pixels shuffled, one way for all."
SURE = 2.0  # standard errors
RULE = (
    "It holds where, with the fewest rows, the ConvNet is ahead of the ViT by two standard errors, and shuffling the "
    "pixels takes at least half of its lead; in part, where one of both is so."
)
SECONDS = (30.0, 300.0)
RATES = OptimizerSpec(lr=3e-3, matrix_lr=0.01, warmup=10, weight_decay=0.05)
HEAD = {"answer": {"outputs": 10, "pool": "mean"}}
BLOCK = {"mixer": {"name": "attention", "heads": 4}, "feedforward": {"hidden": 128}}
MODELS: dict[str, dict[str, Any]] = {
    "ConvNet": {"kind": "convnet", "width": 16, "image": (8, 8), "depths": (2, 2), "channels": 1, "heads": HEAD},
    "ViT": {
        "kind": "vision",
        "width": 64,
        "patches": {"image": (8, 8), "patch": 2, "prefix": (), "channels": 1},
        "stack": {"positions": {"name": "none"}, "blocks": [BLOCK], "repeat": 3},
        "heads": HEAD,
    },
}
SHUFFLED = "pixels shuffled"


def measure(how: How) -> Found:
    """Both models on both kinds of pictures, with fewer and more rows and several seeds."""
    sizes, steps, seeds = ((100, 1400), 50, 2) if how.quick else ((50, 100, 300, 1400), 300, 3)
    kinds, found = ("as they are", SHUFFLED), {}
    jobs = [(name, kind, size) for name in MODELS for kind in kinds for size in sizes]
    for i, (name, kind, size) in enumerate(jobs):
        how.tell(f"{name}, {size} rows, {kind}", i / len(jobs))
        found[name, kind, size] = [
            learn(MODELS[name], pictures(kind == SHUFFLED, how.seed + seed), size, steps, how.seed + seed, how.device)
            for seed in range(seeds)
        ]
    mean = {job: sum(seen) / len(seen) for job, seen in found.items()}
    least = sizes[0]
    leads = {kind: mean["ConvNet", kind, least] - mean["ViT", kind, least] for kind in kinds}
    error = 100 * (2 * 0.25 / (TESTED * seeds)) ** 0.5
    parts = (leads[kinds[0]] > SURE * error, leads[kinds[0]] > 0 and leads[SHUFFLED] <= leads[kinds[0]] / 2)
    rows: tuple[Row, ...] = tuple(
        (name, kind, *(round(mean[name, kind, n], 1) for n in sizes)) for name in MODELS for kind in kinds
    )
    spread = {
        f"{i},{2 + j}": (round(min(found[name, kind, n]), 1), round(max(found[name, kind, n]), 1))
        for i, (name, kind) in enumerate((name, kind) for name in MODELS for kind in kinds)
        for j, n in enumerate(sizes)
    }
    columns = ("model", "pictures", *(f"accuracy with {n} rows, %" for n in sizes))
    lines = tuple(
        Line(name=f"{name}, {kind}", points=tuple((float(n), mean[name, kind, n]) for n in sizes))
        for name in MODELS
        for kind in kinds
    )
    return Found(
        verdict=HOLDS if all(parts) else PARTLY if any(parts) else FAILS,
        because=f"with {least} rows the ConvNet leads by {leads[kinds[0]]:.1f} points, shuffled by "
        f"{leads[SHUFFLED]:.1f} (error {error:.1f})",
        tables=(Table(title="Accuracy held out", columns=columns, rows=rows, spread=spread),),
        plots=(
            Plot(
                title="Digits learned from fewer rows",
                sentence="Where shuffling lowers a line, the model had made use of who stands beside whom.",
                x="training rows",
                y="accuracy, %",
                lines=lines,
                log_x=True,
            ),
        ),
        settings={"device": how.device, "models": MODELS, "rows": list(sizes), "steps": steps, "seeds": seeds},
    )


TESTED = 360  # rows held out


def pictures(shuffled: bool, seed: int) -> tuple[Tensor, Tensor]:
    """All digits in a drawn order, `Float[N 1 8 8]` from -1 to 1, and their labels; all shuffled alike."""
    rows = list(digits.rows())
    random = np.random.default_rng(seed)
    order, places = random.permutation(len(rows)), np.arange(64)
    pixels = np.stack([rows[i][0] for i in order]).reshape(len(rows), 64)
    places = random.permutation(64) if shuffled else places
    x = torch.from_numpy(pixels[:, places].reshape(-1, 1, 8, 8).astype(np.float32)) / 127.5 - 1
    return x, torch.tensor([int(rows[i][1]) for i in order])


def learn(spec: dict[str, Any], data: tuple[Tensor, Tensor], size: int, steps: int, seed: int, device: str) -> float:
    """Percent right on the first TESTED rows, after learning from the next `size`."""
    x, y = (part.to(device) for part in data)
    torch.manual_seed(seed)
    net: Any = models.build(spec).to(device).train()
    optimizers = build_optimizers(net, RATES)
    for step in range(steps):
        chosen = TESTED + torch.randint(size, (64,), device=device)
        set_rate(optimizers, RATES, step, step / steps)
        F.cross_entropy(net.head("answer", net(x[chosen])), y[chosen]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        right = net.head("answer", net(x[:TESTED])).argmax(1) == y[:TESTED]
    return 100 * float(right.float().mean())
