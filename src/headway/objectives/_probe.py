"""Probe: how well a linear classifier tells labels from frozen features (1610.01644), by five-fold cross-validation.

argmin_W -sum_i log softmax(W f(x_i))[y_i] + penalty |W|^2. Features f: the mean of a model's last hidden states, those
of the same model untrained, and which words a text has; all on the same rows, which no model was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway import models
from headway.data.batches import padded
from headway.data.sources import Values
from headway.hub import Loaded
from headway.objectives._tokens import pieces
from headway.objectives._tools import Tools

FOLDS, ROWS, TOGETHER = 5, 2000, 64


def probed(model: Loaded, rows: Sequence[Values], tools: Tools, seed: int) -> dict[str, Any]:
    """Accuracies of the probe on (text, label) rows; of each text its first piece is read."""
    rows = rows[:: -(-len(rows) // ROWS)]
    names = sorted({row[1] for row in rows})
    labels = torch.tensor([names.index(row[1]) for row in rows])
    ids = [next(pieces(row[0], tools))[0] for row in rows]
    counts = labels.bincount()
    torch.manual_seed(seed)
    spec = {key: value for key, value in model.spec.items() if key != "load"}
    untrained = models.build(spec).eval().to(model.device)
    return {
        "probe_accuracy": accuracy(features(model.net, ids, tools.pad), labels),
        "probe_accuracy_untrained_baseline": accuracy(features(untrained, ids, tools.pad), labels),
        "probe_accuracy_words_baseline": accuracy(words(ids, tools.vocab), labels),
        "probe_accuracy_commonest_baseline": float(counts.max()) / len(rows),
        "probe_rows": len(rows),
        "probe_labels": len(names),
    }


def features(net: nn.Module, ids: Sequence[Sequence[int]], pad: int) -> Float[Tensor, "N C"]:
    """The mean of the last hidden states of each text."""
    device = next(net.parameters()).device
    found = []
    for start in range(0, len(ids), TOGETHER):
        table, valid = padded(ids[start : start + TOGETHER], pad)
        x = net(table.to(device), valid.to(device)).float().cpu()
        there = valid[..., None].float()
        found.append((x * there).sum(1) / there.sum(1))
    return torch.cat(found)


def words(ids: Sequence[Sequence[int]], vocab: int) -> Float[Tensor, "N W"]:
    """Which tokens each text has, each weighted by how few texts have it."""
    found = torch.zeros(len(ids), vocab)
    for row, tokens in enumerate(ids):
        found[row, torch.tensor(tokens)] = 1
    found = found[:, found.any(0)]  # what no text has says nothing
    return F.normalize(found * ((1 + len(ids)) / (1 + found.sum(0))).log(), dim=-1)


def accuracy(x: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Of a linear classifier, each row told by one that was trained on the other folds; the best of four penalties."""
    fold = torch.from_numpy(np.random.default_rng(0).permutation(len(x)) % FOLDS)
    x = (x - x.mean(0)) / x.std(0).mean()
    right = []
    for penalty in (1e-3, 1e-2, 1e-1, 1.0):
        told = torch.zeros_like(labels)
        for i in range(min(FOLDS, len(x))):
            w = _fitted(x[fold != i], labels[fold != i], int(labels.max()) + 1, penalty)
            told[fold == i] = (F.pad(x[fold == i], (0, 1), value=1.0) @ w).argmax(1)
        right.append(float((told == labels).float().mean()))
    return max(right)


def _fitted(x: Tensor, labels: Tensor, classes: int, penalty: float) -> Tensor:
    """Weights `Float[C+1 K]`, the last row the bias."""
    with torch.inference_mode(False), torch.enable_grad():
        x, labels = F.pad(x, (0, 1), value=1.0).clone(), labels.clone()
        w = torch.zeros(x.shape[1], classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ w, labels) + penalty * w[:-1].square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
    return w.detach()
