"""Encoder and decoder: the same stack, learning what is hidden or what comes next (1810.04805, 1706.03762)."""

from __future__ import annotations

import math
import time
from typing import Any

import msgspec
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.compare import tasks, trial
from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Line, Plot, Table
from headway.compare.claims._trials import of_trials
from headway.compare.tasks.prose import MASK
from headway.compare.trial import Trial
from headway.machine import synchronise
from headway.recipe import OptimizerSpec

SECTION = "D"
TITLE = "Encoder and decoder"
SAID = "An encoder gives the better vectors, a decoder the better next word; a decoder sees nothing of the future."
METHOD = (
    "One stack, one text, one budget, trained both ways; a linear probe, the next byte, a changed future, a stream."
)
SURE = 2.0  # standard errors
RULE = (
    "Four parts: the encoder's vectors are better by two standard errors in a probe; the decoder tells the next byte "
    "in fewer bits; a changed last byte changes nothing before it in the decoder, to the bit, and something in the "
    "encoder; a window's stream costs the same memory at any length. It holds where all are so, in part where some are."
)
SECONDS = (30.0, 200.0)
LENGTH, WINDOW = 128, 32
RATES = OptimizerSpec(lr=3e-3, matrix_lr=0.02, warmup=20, weight_decay=0.0)
ATTENTION: dict[str, Any] = {"name": "attention", "heads": 2}


def measure(how: How) -> Found:
    """Trains both and asks them the four questions."""
    base = Trial(
        task={"name": "prose"},
        mixers=(ATTENTION,),
        length=LENGTH,
        hidden=128,
        steps=200 if how.quick else 3000,
        rows=16,
        every=10_000,
        test_rows=128,
        enough=None,
        optimizer=RATES,
        seed=how.seed,
    )
    trials = {"decoder": base, "encoder": msgspec.structs.replace(base, task={"name": "prose", "hidden": 0.15})}
    nets, outcomes = {}, {}
    for i, (name, one) in enumerate(trials.items()):
        tell = lambda done, of, i=i, name=name: how.tell(f"training the {name}", 0.4 * (i + done / of))
        nets[name], outcomes[name] = trial.train(one, how.device, tell)
    how.tell("probing", 0.85)
    random = np.random.default_rng([how.seed, 2])
    text = tasks.build({"name": "prose", "part": "test"}).batch(random, 512, LENGTH).to(torch.device(how.device))
    probed = {name: probe(net, how) for name, net in nets.items()}
    probed["encoder, untrained"] = probe(untrained(trials["encoder"], how), how)
    bits = {name: last_byte(net, text.ids, name == "encoder") for name, net in nets.items()}
    leaks = {name: leak(net, text.ids[:16]) for name, net in nets.items()}
    how.tell("streaming", 0.95)
    lengths = (256, 1024) if how.quick else (256, 1024, 4096)
    streams = streaming(how, lengths)
    error = 100 * math.sqrt(2 * 0.25 / PROBED)
    parts = {
        "vectors": probed["encoder"] - probed["decoder"] > SURE * error,
        "next byte": bits["decoder"] < bits["encoder"],
        "future": leaks["decoder"] == 0 < leaks["encoder"],
        "stream": len({found[1] for found in streams["decoder, window 32"]}) == 1,
    }
    rows = tuple(
        (name, round(probed[name], 1), round(bits[name], 3) if name in bits else None, leaks.get(name))
        for name in probed
    )
    columns = ("", "probe, % right", "bits for the last byte", "change before a changed last byte, at most")
    return Found(
        verdict=HOLDS if all(parts.values()) else PARTLY if any(parts.values()) else FAILS,
        because=f"so: {', '.join(k for k, v in parts.items() if v) or 'none'}; "
        f"not so: {', '.join(k for k, v in parts.items() if not v) or 'none'}. Probe: "
        + ", ".join(f"{name} {right:.1f}%" for name, right in probed.items())
        + "; bits for the last byte: "
        + ", ".join(f"{name} {found:.2f}" for name, found in bits.items()),
        tables=(
            Table(title="The same stack, trained both ways", columns=columns, rows=rows),
            stream_table(streams, lengths),
        ),
        plots=(
            Plot(
                title="One more token of a long stream",
                sentence="A decoder with a state reads one token; an encoder reads the whole row again.",
                x="tokens so far",
                y="milliseconds a token",
                lines=tuple(
                    Line(name=name, points=tuple((float(n), ms) for n, (ms, _) in zip(lengths, found, strict=True)))
                    for name, found in streams.items()
                ),
                log_x=True,
                log_y=True,
            ),
        ),
        notes=(
            "The probe: a linear map from the mean of the hidden states to the package that bytes of source are from "
            f"(8 packages, chance 12.5%), on files not seen; error {error:.1f} points.",
            f"The decoder's own loss: {outcomes['decoder'].loss / math.log(2):.3f} bits a byte. The encoder tells the "
            "last byte with a mask in its place, and was asked only this way; masks are what it was trained on.",
        ),
        settings=of_trials(how, trials),
    )


PROBED = 1000  # rows that the probe is tested on


def untrained(one: Trial, how: How) -> Any:
    torch.manual_seed(how.seed)
    return trial.build(one, tasks.build(one.task)).to(how.device).eval()


@torch.no_grad()
def probe(net: Any, how: How, ridge: float = 1.0) -> float:
    """Percent right of a ridge regression from mean hidden states to one-hot labels, on files not trained on."""
    task = tasks.build({"name": "sources"})
    random = np.random.default_rng([how.seed, 3])
    x, y = [], []
    for part, rows in ((task, 2 * PROBED), (task.held_out(), PROBED)):
        batch = part.batch(random, rows, LENGTH)
        valid = batch.valid if batch.valid is not None else torch.ones_like(batch.ids, dtype=torch.bool)
        ids = (batch.ids - 1).clamp(min=0).to(how.device)  # bytes, as prose has them
        means = []
        for some, there in zip(ids.split(128), valid.to(how.device).split(128), strict=True):
            hidden = net(some, there) * there[..., None]
            means.append(hidden.sum(1) / there.sum(1, keepdim=True))
        x.append(torch.cat(means).double().cpu())
        y.append(batch.targets[:, 0])
    mean, size = x[0].mean(0), x[0].std(0) + 1e-6
    train, test = (torch.cat([(t - mean) / size, torch.ones(len(t), 1).double()], 1) for t in x)
    wanted = torch.nn.functional.one_hot(y[0], task.answers).double()
    weights = torch.linalg.solve(train.T @ train + ridge * torch.eye(train.shape[1]).double(), train.T @ wanted)
    return 100 * float(((test @ weights).argmax(1) == y[1]).double().mean())


@torch.no_grad()
def last_byte(net: Any, ids: Int[Tensor, "B T"], masked: bool) -> float:
    """Bits for the last byte of each row, told from all before it."""
    if masked:
        read = torch.cat([ids[:, :-1], torch.full_like(ids[:, :1], MASK)], 1)
        logits = net.head("answer", net(read))[:, -1]
    else:
        logits = net.head("answer", net(ids[:, :-1]))[:, -1]
    return float(torch.nn.functional.cross_entropy(logits.float(), ids[:, -1])) / math.log(2)


@torch.no_grad()
def leak(net: Any, ids: Int[Tensor, "B T"]) -> float:
    """The greatest change of any hidden number before the last token, when that is another."""
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 256
    before: Float[Tensor, "B S C"] = net(ids)[:, :-1]
    return float((net(other)[:, :-1] - before).abs().max())


def streaming(how: How, lengths: tuple[int, ...]) -> dict[str, list[tuple[float, int | None]]]:
    """Milliseconds for one more token after so many, the best of a few, and the bytes that are kept for it."""
    base = Trial(task={"name": "prose"}, mixers=(ATTENTION,), hidden=128, seed=how.seed)
    window = msgspec.structs.replace(base, mixers=({**ATTENTION, "window": (WINDOW, 0)},))
    both = msgspec.structs.replace(base, task={"name": "prose", "hidden": 0.15})
    decoders = {"decoder": untrained(base, how), f"decoder, window {WINDOW}": untrained(window, how)}
    found: dict[str, list[tuple[float, int | None]]] = {
        name: [step_of(net, n, how.device) for n in lengths] for name, net in decoders.items()
    }
    encoder = untrained(both, how)
    ids = torch.zeros(1, max(lengths), dtype=torch.long, device=how.device)
    with torch.no_grad():
        found["encoder, reading again"] = [
            (best_of(lambda n=n: encoder(ids[:, :n]), how.device), None) for n in lengths
        ]  # type: ignore[misc]
    return found


@torch.no_grad()
def step_of(net: Any, length: int, device: str) -> tuple[float, int]:
    """One more token behind `length` tokens of a stream."""
    states = net.init_state(1, length + 64)
    ids = torch.zeros(1, length + 64, dtype=torch.long, device=device)
    pos = torch.arange(length + 64, device=device)[None]
    net(ids[:, :length], pos=pos[:, :length], state=states)
    at = iter(range(length, length + 64))

    def one() -> None:
        n = next(at)
        net(ids[:, n : n + 1], pos=pos[:, n : n + 1], state=states)

    milliseconds = best_of(one, device)
    return milliseconds, sum(state.nbytes for pair in states for state in pair if state is not None)


def best_of(run: Any, device: str, times: int = 8) -> float:
    taken = []
    for _ in range(times):
        synchronise(torch.device(device))
        began = time.perf_counter()
        run()
        synchronise(torch.device(device))
        taken.append(time.perf_counter() - began)
    return 1000 * min(taken)


def stream_table(streams: dict[str, list[tuple[float, int | None]]], lengths: tuple[int, ...]) -> Table:
    columns = ("", *(f"ms a token after {n}" for n in lengths), *(f"kB kept after {n}" for n in lengths))
    rows = tuple(
        (
            name,
            *(round(ms, 3) for ms, _ in found),
            *(None if kept is None else round(kept / 1000, 1) for _, kept in found),
        )
        for name, found in streams.items()
    )
    return Table(title="A long stream", columns=columns, rows=rows)
