"""Bits per byte after ten minutes: recipe `prose` beside a nanoGPT-style model in plain PyTorch, on the same text.

    python bench/prose.py [--side ours|theirs|theirs-tokens] [--seconds 600] [--set KEY=VALUE ...] [--dry]

Each side is measured alone, takes as many seconds of training as the other (evaluating counts on neither side), keeps
its best weights by the same validation text, is asked for the same held-out text, and is merged into
`results/prose.json`. Theirs is nanoGPT's model with its published CPU settings, reading bytes; `theirs-tokens` reads
the recipe's own tokens instead, so that what the tokenizer brings is told apart from what the training brings.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, save
from nanogpt import NanoGPT
from torch import Tensor, nn

import headway
from headway import recipe as recipes
from headway.data.sources import Values
from headway.train.data import Prepared, prepare

# nanoGPT's README, "I only have a macbook": train_shakespeare_char on a CPU; there for 2,000 steps
LAYERS, HEADS, WIDTH, BLOCK, ROWS = 4, 4, 128, 64, 12
RATE, LEAST, WARMUP, BETAS, DECAY, CLIP, EVERY = 1e-3, 1e-4, 100, (0.9, 0.99), 0.1, 1.0, 250


@dataclass(frozen=True)
class Texts:
    """Each part's texts as numbers below `vocab`, an end around each; `size`: bytes of the held-out part."""

    vocab: int
    train: Tensor
    valid: Tensor
    test: Tensor
    size: int


def texts(prepared: Prepared, tokens: bool) -> Texts:
    """The rows that our side learns from and is asked for, as bytes with a zero between, or as its own tokens."""
    tools, splits = prepared.tools, prepared.splits
    assert tools.eos is not None
    end = tools.eos if tokens else 0

    def stream(rows: Any) -> Tensor:
        found = [end]
        for row in rows:
            found += [*(tools.ids(row[0]) if tokens else row[0].encode()), end]
        return torch.from_numpy(np.asarray(found, np.int64))

    size = sum(len(row[0].encode()) for row in splits.test)
    parts: dict[str, list[Values]] = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    return Texts(tools.vocab if tokens else 256, **{name: stream(rows) for name, rows in parts.items()}, size=size)


@torch.no_grad()
def nats(model: NanoGPT, ids: Tensor) -> float:
    """-log p of each number but the first, summed; in windows that overlap by half, so that each sees half a window."""
    half, total = BLOCK // 2, 0.0
    starts = list(range(0, len(ids) - 1, half))
    for first in range(0, len(starts), 64):
        chosen = starts[first : first + 64]
        rows = [ids[s : s + BLOCK + 1] for s in chosen]
        table = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        labels = table[:, 1:].clone()
        for i, start in enumerate(chosen):
            labels[i, : half if start else 0] = -100  # told by the window before
        logits = model(table[:, :-1].clamp(min=0))
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"))
    return total


def theirs(data: Texts, seconds: float) -> dict[str, Any]:
    """Random windows, AdamW, cosine by the share of the time that is spent; the best weights by the validation text."""
    torch.manual_seed(1337)
    model = NanoGPT(data.vocab, BLOCK, WIDTH, LAYERS, HEADS)
    matrices, rest = ([p for p in model.parameters() if (p.ndim > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, RATE, BETAS, fused=True)
    spent, step, best, kept, curve = 0.0, 0, math.inf, model.state_dict(), []
    while spent < seconds:
        began = time.perf_counter()
        rate = LEAST + 0.5 * (1 + math.cos(math.pi * spent / seconds)) * (RATE - LEAST)
        for group in optimizer.param_groups:
            group["lr"] = min(rate, RATE * (step + 1) / (WARMUP + 1))
        starts = torch.randint(len(data.train) - BLOCK, (ROWS,)).tolist()
        rows = torch.stack([data.train[s : s + BLOCK + 1] for s in starts])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, spent = step + 1, spent + time.perf_counter() - began
        if step % EVERY == 0 or spent >= seconds:
            value = nats(model, data.valid) / len(data.valid)
            curve.append({"step": step, "seconds": round(spent, 2), "loss": float(loss.detach()), "valid_loss": value})
            if value < best:
                best, kept = value, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return {
        "bits_per_byte": nats(model, data.test) / math.log(2) / data.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": {"layers": LAYERS, "heads": HEADS, "width": WIDTH, "block": BLOCK, "rows": ROWS, "rate": RATE},
        "steps": step,
        "tokens": step * ROWS * BLOCK,
        "train_tokens_per_second": step * ROWS * BLOCK / spent,
        "seconds": spent,
        "best_at_step": min(curve, key=lambda point: point["valid_loss"])["step"],
        "curve": curve[:: max(1, len(curve) // 40)],
    }


KEPT = (
    "bits_per_byte", "bits_per_byte_xz_baseline", "bits_per_byte_zstd_baseline", "perplexity", "test_bytes",
    "parameters", "steps", "tokens", "train_tokens_per_second", "seconds", "curve",
)  # fmt: skip


def ours(overrides: list[str]) -> dict[str, Any]:
    """The recipe as anybody runs it."""
    with tempfile.TemporaryDirectory() as folder:
        found = headway.train("prose", out=Path(folder) / "prose", overrides=overrides)
    return {key: found[key] for key in KEPT if key in found}


def merged(figures: dict[str, Any]) -> dict[str, Any]:
    """With what was measured before of the other sides, and how much fewer bits ours takes, where times agree."""
    file = RESULTS / "prose.json"
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    found = {side: {**known, **figures}[side] for side in SIDES if side in {**known, **figures}}
    for side in SIDES[1:]:
        pair = [found[name] for name in ("ours", side) if name in found]
        if len(pair) == 2 and abs(pair[0]["seconds"] - pair[1]["seconds"]) < 0.02 * pair[0]["seconds"]:
            found[f"{side}_over_ours"] = pair[1]["bits_per_byte"] / pair[0]["bits_per_byte"]
    return found


SIDES = ("ours", "theirs", "theirs-tokens")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, action="append")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--set", action="append", default=[], help="of the recipe, as headway train takes it")
    parser.add_argument("--dry", action="store_true", help="print what is found and keep nothing")
    given = parser.parse_args()
    overrides = [f"budget.seconds={given.seconds}", *given.set]
    for side in given.side or SIDES:
        if side == "ours":
            figures = ours(overrides)
        else:
            prepared = prepare(recipes.read("prose", overrides))
            figures = theirs(texts(prepared, side == "theirs-tokens"), given.seconds)
        if given.dry:
            print(json.dumps({side: {k: v for k, v in figures.items() if k != "curve"}}, indent=1))
        else:
            save("prose", merged({side: figures}))
