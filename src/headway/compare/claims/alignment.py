"""Alignment: whether cross-attention learns which part of its source an output comes from (1409.0473, section 5.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headway import models
from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Line, Plot, Table
from headway.probe.alignment import cross_maps

SECTION = "C"
TITLE = "Cross-attention aligns"
SAID = "A translator's cross-attention shows which part of the input each output comes from."
METHOD = (
    "An encoder-decoder learns to spell letters aloud: each letter has one to three sounds, fixed beforehand, so the "
    "true alignment is known. Counted is how often the most weight lies on the letter that a sound comes from."
)
NEAR = 80.0
RULE = (
    f"It holds where the most weight lies on the right letter for {NEAR:g}% of sounds or more, for every seed, and "
    "more often than on the diagonal; in part where only the latter is so."
)
SECONDS = (25.0, 300.0)
LETTERS, SOUNDS, WIDTH, LENGTH = 26, 30, 64, 10
START = SOUNDS  # of the outputs; SOUNDS + 1 fills rows that are done


def measure(how: How) -> Found:
    """Trains with some seeds, each with an alphabet of its own, and compares maps with the truth."""
    seeds, steps = (2, 250) if how.quick else (5, 1500)
    found, curves = [], []
    for k in range(seeds):
        told = lambda share, k=k: how.tell(f"seed {how.seed + k}", (k + share) / seeds)
        scores, curve = learned(how.seed + k, steps, how.device, told)
        found.append(scores)
        curves.append(curve)
    names = (
        "sounds right",
        "most weight on the right letter",
        "that letter is on the diagonal",
        "any letter, by chance",
    )
    columns = [[100 * scores[i] for scores in found] for i in range(len(names))]
    right, diagonal = columns[1], columns[2]
    above = all(a > b for a, b in zip(right, diagonal, strict=True))
    return Found(
        verdict=HOLDS if min(right) >= NEAR and above else PARTLY if above else FAILS,
        because=f"{sum(columns[0]) / seeds:.0f}% of sounds are right, and for {sum(right) / seeds:.0f}% of them the "
        f"most weight lies on the letter they come from; the diagonal would be right for {sum(diagonal) / seeds:.0f}%.",
        tables=(
            Table(
                title="Held-out words, %",
                columns=("", "share"),
                rows=tuple((name, round(sum(c) / seeds, 1)) for name, c in zip(names, columns, strict=True)),
                spread={f"{i},1": (min(c), max(c)) for i, c in enumerate(columns)},
            ),
        ),
        plots=(
            Plot(
                title="Alignment while it learns",
                sentence="The alignment comes up with the answers: it is how the model reads, not something added "
                "later.",
                x="training steps",
                y="most weight on the right letter, %",
                lines=tuple(Line(name=f"seed {how.seed + k}", points=tuple(c)) for k, c in enumerate(curves)),
            ),
        ),
        notes=(
            "Words are random letters. Of real spelling no alignment is given, so a made-up alphabet stands in for it.",
            "The last block's map, averaged over heads; sounds are read from the right answer so far (teacher "
            "forcing).",
        ),
        settings={
            "width": WIDTH,
            "letters": LENGTH,
            "steps": steps,
            "rows": 64,
            "lr": 3e-3,
            "seeds": seeds,
            "seed": how.seed,
        },
    )


def translator() -> Any:
    """One block each way and back; learned positions, by which a decoder tells where a letter stands."""
    block = {"mixer": {"name": "attention", "heads": 2}, "feedforward": {"hidden": 2 * WIDTH}}
    stack = {"blocks": [block], "positions": {"name": "learned", "length": 64}}
    decoder = {**stack, "blocks": [{**block, "cross": {"name": "attention", "heads": 1}}]}
    return models.build({"kind": "seq2seq", "width": WIDTH, "encoder": {**stack, "repeat": 2}, "decoder": decoder,
                         "source_vocab": LETTERS, "target_vocab": SOUNDS + 2})  # fmt: skip


def alphabet(seed: int) -> list[np.ndarray]:
    """One to three sounds for each letter."""
    random = np.random.default_rng([seed, 7])
    return [random.integers(SOUNDS, size=1 + i % 3) for i in range(LETTERS)]


def words(sounds: list[np.ndarray], random: np.random.Generator, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Letters `Int[B S]`, their sounds `Int[B T]`, filled up, and the letter of each sound, -1 where filled."""
    letters = random.integers(LETTERS, size=(rows, LENGTH))
    said = np.full((rows, 3 * LENGTH), SOUNDS + 1)
    comes = np.full((rows, 3 * LENGTH), -1)
    for row, word in enumerate(letters):
        spoken = np.concatenate([sounds[letter] for letter in word])
        said[row, : len(spoken)] = spoken
        comes[row, : len(spoken)] = np.repeat(np.arange(LENGTH), [len(sounds[letter]) for letter in word])
    return torch.from_numpy(letters), torch.from_numpy(said), torch.from_numpy(comes)


def learned(seed: int, steps: int, device: str, told: Any) -> tuple[tuple[float, ...], list[tuple[float, float]]]:
    """Scores at the end, and (step, percent aligned) on the way."""
    torch.manual_seed(seed)
    net, sounds, random = translator().to(device), alphabet(seed), np.random.default_rng([seed, 0])
    held_out = words(sounds, np.random.default_rng([seed, 1]), 128)
    optimizer, curve = torch.optim.AdamW(net.parameters(), lr=3e-3), []
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for step in range(1, steps + 1):
        letters, said, comes = (t.to(device) for t in words(sounds, random, 64))
        logits = net(letters, asked(said))
        F.cross_entropy(logits[comes >= 0], said[comes >= 0]).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        told(step / steps)
        if step % max(1, steps // 10) == 0:
            curve.append((float(step), 100 * scores(net, held_out, device)[1]))
    return scores(net, held_out, device), curve


def asked(said: Tensor) -> Tensor:
    """What a decoder reads to say `said`: a start, then all but the last."""
    return torch.cat([torch.full_like(said[:, :1], START), said[:, :-1]], 1)


@torch.no_grad()
def scores(net: Any, held_out: tuple[Tensor, Tensor, Tensor], device: str) -> tuple[float, float, float, float]:
    """Shares of sounds right, aligned, on the diagonal, and of chance."""
    letters, said, comes = (t.to(device) for t in held_out)
    there = comes >= 0
    logits = net(letters, asked(said))
    looked = cross_maps(net, letters, asked(said))[-1].mean(1).argmax(-1)
    return (
        float((logits.argmax(-1) == said)[there].double().mean()),
        float((looked == comes)[there].double().mean()),
        float((diagonal(there) == comes)[there].double().mean()),
        1 / LENGTH,
    )


def diagonal(there: Tensor) -> Tensor:
    """The letter as far along its word as a sound is along its own."""
    at, long = torch.arange(there.shape[1], device=there.device), there.sum(1, keepdim=True)
    return (at[None] * LENGTH // long).clamp(max=LENGTH - 1)
