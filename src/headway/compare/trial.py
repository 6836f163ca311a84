"""Trial: one small model learns one task under one budget; what it reached, how fast, and in how much memory.

The model is a stack of the mixers that a trial names, in turn, and all else is the same for every one of them. A trial
is data, and so is its outcome: the same trial on the same machine gives the same accuracy, to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from headway import mixers, models
from headway.compare import tasks
from headway.compare.tasks import Batch, Task
from headway.machine import kept_for_the_way_back, synchronise
from headway.positions import Positions
from headway.recipe import Above0, OptimizerSpec, Positive
from headway.spec import PositionSpec, Size, Strict
from headway.train.optim import build_optimizers, set_rate

Tell = Callable[[int, int], None]  # steps done, and of how many
SILENT: Tell = lambda done, of: None
WARM = 3  # steps that no clock counts
CHECK = 128  # rows of a look at how far it has come


class Trial(Strict, frozen=True):
    """Everything an outcome depends on, the machine's speed apart.

    task, mixers: {"name": ..., option: value}; layers take the mixers in turn, so several are a blend. hidden: of the
    feed-forward behind each mixer; None leaves it out. positions: as a stack's. examples: different rows to learn from
    (None: new ones at every step). tested: further lengths to test at, beside the one trained at. enough: training ends
    at this accuracy, looked at every `every` steps on held-out rows.
    """

    task: dict[str, Any]
    mixers: tuple[dict[str, Any], ...]
    length: Size = 64
    steps: Positive = 500
    rows: Positive = 64
    width: Size = 64
    depth: Size = 2
    hidden: Size | None = None
    positions: PositionSpec = PositionSpec()
    optimizer: OptimizerSpec = OptimizerSpec(warmup=20, weight_decay=0.0)
    examples: Positive | None = None
    test_rows: Positive = 512
    tested: tuple[Size, ...] = ()
    enough: Above0 | None = 0.995
    every: Positive = 50
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0


class Outcome(Strict, frozen=True):
    """accuracy: share of what was asked that was answered right, at each length tested, of `asked` questions there.
    loss: nats a question at the trained length, and of each eighth of its rows, first to last (None where
    nothing is asked). curve: (step, held-out accuracy, loss). tokens_per_second: in training, by
    this machine. kept_bytes: what a training step keeps for the way back, a row. state_bytes: what a stream remembers
    of a row of that length, None of what cannot stream. steps: taken, fewer than allowed where it knew enough."""

    accuracy: dict[int, float]
    asked: dict[int, int]
    loss: float
    loss_by_eighth: tuple[float | None, ...]
    steps: int
    seconds: float
    tokens_per_second: float
    parameters: int
    kept_bytes: int
    state_bytes: int | None
    curve: tuple[tuple[int, float, float], ...]

    def error(self, length: int) -> float:
        """The standard error of an accuracy, from the number of questions: how far another test set would differ."""
        p, n = self.accuracy[length], max(1, self.asked[length])
        return (max(p * (1 - p), 1 / n) / n) ** 0.5


def build(trial: Trial, task: Task) -> nn.Module:
    """The untrained model of a trial: a decoder where the task or a mixer goes one way alone, else an encoder."""
    both_ways = all("bidirectional" in mixers.build(one, trial.width, Positions()).can for one in trial.mixers)
    feedforward = None if trial.hidden is None else {"hidden": trial.hidden}
    blocks = [{"mixer": trial.mixers[i % len(trial.mixers)], "feedforward": feedforward} for i in range(trial.depth)]
    return models.build(
        {
            "kind": "encoder" if both_ways and not task.causal else "decoder",
            "width": trial.width,
            "vocab": task.vocabulary,
            "stack": {"blocks": blocks, "positions": trial.positions},
            "heads": {"answer": {"outputs": task.answers, "pool": "mean" if task.pooled else "none"}},
        }
    )


def run(trial: Trial, device: torch.device | str = "cpu", tell: Tell = SILENT) -> Outcome:
    """Trains and tests; a ValueError of one line where a mixer cannot do the task at all."""
    return train(trial, device, tell)[1]


def train(trial: Trial, device: torch.device | str = "cpu", tell: Tell = SILENT) -> tuple[Any, Outcome]:
    """The same, with the model that was trained."""
    task, on = tasks.build(trial.task), torch.device(device)
    with torch.random.fork_rng(devices=[on] if on.type == "cuda" else []):
        torch.manual_seed(trial.seed)
        net: Any = build(trial, task).to(on)
        source = _Source(trial, task, on)
        test = draw(task.held_out(), trial, trial.length, trial.test_rows)
        kept, state = kept_bytes(net, test.rows(slice(1)).to(on)), state_bytes(net, trial.length)
        steps, seconds, curve = _fit(net, trial, source, test, on, tell)
    scores = {trial.length: score(net, test, on, trial.rows)}
    for length in trial.tested:
        scores[length] = score(net, draw(task.held_out(), trial, length, trial.test_rows), on, trial.rows)
    speed = max(0, steps - WARM) * trial.rows * trial.length / seconds if seconds else 0.0
    return net.eval(), Outcome(
        accuracy={length: found.accuracy for length, found in scores.items()},
        asked={length: found.asked for length, found in scores.items()},
        loss=scores[trial.length].loss,
        loss_by_eighth=scores[trial.length].by_eighth,
        steps=steps,
        seconds=seconds,
        tokens_per_second=speed,
        parameters=sum(p.numel() for p in net.parameters()),
        kept_bytes=kept,
        state_bytes=state,
        curve=curve,
    )


def draw(task: Task, trial: Trial, length: int, rows: int) -> Batch:
    """Rows to test with: never those of training, and the same for every mixer."""
    return task.batch(np.random.default_rng([trial.seed, 1, length]), rows, length)


class _Source:
    """Batches to learn from: new rows at every step, or the same few in a new order each time round."""

    def __init__(self, trial: Trial, task: Task, on: torch.device) -> None:
        self.trial, self.task, self.on = trial, task, on
        self.random = np.random.default_rng([trial.seed, 0])
        self.fixed, self.order = None, np.zeros(0, dtype=np.int64)
        if trial.examples is not None:
            self.fixed = task.batch(self.random, trial.examples, trial.length).to(on)

    def next(self) -> Batch:
        if self.fixed is None:
            return self.task.batch(self.random, self.trial.rows, self.trial.length).to(self.on)
        while len(self.order) < self.trial.rows:
            self.order = np.concatenate([self.order, self.random.permutation(len(self.fixed.ids))])
        taken, self.order = np.split(self.order, [self.trial.rows])
        return self.fixed.rows(torch.from_numpy(taken).to(self.on))


def _fit(
    net: nn.Module, trial: Trial, source: _Source, test: Batch, on: torch.device, tell: Tell
) -> tuple[int, float, tuple[tuple[int, float, float], ...]]:
    """Steps taken, seconds of those behind the first few, making batches and looking apart; and what the looks saw."""
    optimizers, curve, seconds, step = build_optimizers(net, trial.optimizer), [], 0.0, 0
    net.train()
    for step in range(1, trial.steps + 1):
        batch = source.next()
        synchronise(on)
        began = time.perf_counter()
        set_rate(optimizers, trial.optimizer, step - 1, (step - 1) / trial.steps)
        loss_of(net, batch).backward()
        nn.utils.clip_grad_norm_(net.parameters(), trial.optimizer.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        synchronise(on)
        seconds += time.perf_counter() - began if step > WARM else 0.0
        tell(step, trial.steps)
        if step % trial.every == 0 and step < trial.steps:
            seen = score(net, test.rows(slice(CHECK)), on, trial.rows)
            curve.append((step, seen.accuracy, seen.loss))
            if trial.enough is not None and curve[-1][1] >= trial.enough:
                break
    return step, seconds, tuple(curve)


def logits_of(net: Any, batch: Batch) -> Tensor:
    """Of each answer asked: `Float[N A]`, in the order of `batch.targets[batch.counts]`."""
    hidden = net(batch.ids, batch.valid)
    if net.heads["answer"].spec.pool == "none":
        return net.head("answer", hidden[batch.counts][None], None, None)[0]  # no head for what is not asked
    return net.head("answer", hidden, batch.ids, batch.valid)


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of what is asked, in nats."""
    return F.cross_entropy(logits_of(net, batch).float(), batch.targets[batch.counts])


class Score(NamedTuple):
    """accuracy; asked: questions; loss: in nats, the mean of all, and of the questions in each eighth of the rows."""

    accuracy: float
    asked: int
    loss: float
    by_eighth: tuple[float | None, ...]


@torch.no_grad()
def score(net: nn.Module, batch: Batch, on: torch.device, rows: int) -> Score:
    """How well a batch is answered, `rows` rows at a time."""
    was, right, losses = net.training, 0, []
    net.eval()
    for start in range(0, len(batch.ids), rows):
        part = batch.rows(slice(start, start + rows)).to(on)
        logits, targets = logits_of(net, part).float(), part.targets[part.counts]
        right += int((logits.argmax(-1) == targets).sum())
        losses.append(F.cross_entropy(logits, targets, reduction="none").cpu())
    net.train(was)
    lost, eighth = torch.cat(losses), 8 * batch.counts.nonzero()[:, 1] // batch.counts.shape[1]
    each = tuple(float(lost[eighth == i].mean()) if bool((eighth == i).any()) else None for i in range(8))
    return Score(right / len(lost), len(lost), float(lost.mean()), each)


def kept_bytes(net: nn.Module, batch: Batch) -> int:
    """Bytes that autograd keeps of a batch for the way back, parameters and what enters left out."""
    with kept_for_the_way_back([*net.parameters(), *net.buffers(), batch.ids]) as kept:
        loss_of(net, batch)
    return sum(kept.values())


def state_bytes(net: Any, length: int) -> int | None:
    """What the mixers of a decoder remember of a stream of `length` tokens; None where it, or one of them, cannot."""
    found = [block.mixer.inner for block in net.stack.blocks]
    if not hasattr(net, "init_state") or not all({"stream", "causal"} <= mixer.can for mixer in found):
        return None
    return sum(mixer.cost(length).state_bytes for mixer in found)
