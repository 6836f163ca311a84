"""The loop: one model, one budget, exact to the bit, and nothing lost.

Batches, dropout and rate at a step are pure functions of (seed, step, share of the budget spent), so that a run resumed
from a checkpoint goes on as if it had never stopped. Under a budget of seconds the share is measured, and no two runs
are the same; only training counts against it, not evaluating or saving.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headway import machine
from headway.data.batches import Order
from headway.data.loader import Stream
from headway.hub import Loaded
from headway.recipe import OptimizerSpec, Recipe
from headway.store import check_fit, read_folder, write_folder
from headway.train import checkpoint
from headway.train.data import Prepared, all_of
from headway.train.network import network, spec_of
from headway.train.optim import build_optimizers, set_rate
from headway.train.ranks import Ranks, like, restore, whole

KEPT = 2  # checkpoints


class Interrupted(Exception):
    """Somebody asked the run to stop; it is saved and resumes. `terminated`: by SIGTERM, not by Ctrl-C."""

    def __init__(self, terminated: bool) -> None:
        super().__init__("terminated" if terminated else "interrupted")
        self.terminated = terminated


@dataclass(frozen=True)
class Status:
    """What a watcher sees after each step: loss in nats a token (smoothed), share of the budget, seconds left."""

    step: int
    fraction: float
    loss: float
    tokens_per_second: float
    seconds_left: float


@dataclass
class Progress:
    """What has been spent, and what was seen; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    evaluations: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains one model of a recipe in `folder`; `watch` is called after every step."""

    def __init__(
        self,
        recipe: Recipe,
        model: dict[str, Any],
        optimizer: OptimizerSpec,
        prepared: Prepared,
        folder: Path,
        watch: Callable[[Status], None] = lambda status: None,
        ranks: Ranks | None = None,
    ) -> None:
        self.recipe, self.prepared, self.folder, self.watch = recipe, prepared, folder, watch
        self.ranks = ranks or Ranks()
        self.parts = recipe.accumulate // self.ranks.size  # micro-batches that this rank takes in a step
        self.objective = prepared.objective
        self.spec = spec_of(model, prepared)
        torch.manual_seed(recipe.seed)
        self.device = self.ranks.device
        self.model = network(self.spec, prepared.tools).to(self.device)
        self.ranks.spread(self.model, recipe.parallel)
        self.optimizer = optimizer
        self.optimizers = build_optimizers(self.model, optimizer)
        self.best: dict[str, Tensor] = {}
        self.progress = Progress()
        self.loss = math.nan
        self.bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and machine.fast_bf16())
        self.log: list[str] = []

    def fit(self) -> Loaded:
        """Trains to the end of the budget and returns the best model seen, by validation loss."""
        self.model.train()
        saved = time.monotonic()
        with _listening() as asked, self._stream() as self.stream:
            while self._fraction() < 1.0:
                self._step()
                if self._fraction() >= self.progress.evaluations / self.recipe.evaluations:
                    self._evaluate()
                self.watch(self._status())
                late = time.monotonic() - saved > self.recipe.checkpoint_seconds
                stop, terminated, due = self.ranks.sum(bool(asked), asked[:1] == [signal.SIGTERM], late)
                if stop:
                    self.save()
                    raise Interrupted(bool(terminated))
                if due:
                    self.save()
                    saved = time.monotonic()
            if self.progress.curve[-1]["step"] != self.progress.step:
                self._evaluate()
            self.save()
        return self.objective.loaded(self._best(), self.spec, self.prepared.tools)

    def _best(self) -> nn.Module:
        """The network with its best weights; a whole one, where ranks share it."""
        self.model.load_state_dict(self.best)
        if self.ranks.size == 1:
            return self.model
        net, best = network(self.spec, self.prepared.tools).to(self.device), whole(self.best)
        net.load_state_dict(best)
        return net

    def _stream(self) -> Stream:
        """The batches from this step on; a step takes `accumulate` of them, dealt out to the ranks in turn."""
        first = self.progress.step * self.recipe.accumulate + self.ranks.rank
        return Stream(self.prepared.batches, first, self.recipe.workers, self.ranks.size)

    def _step(self) -> None:
        began = time.perf_counter()
        progress, step = self.progress, self.progress.step
        batches = [next(self.stream).to(self.device) for _ in range(self.parts)]
        set_rate(self.optimizers, self.optimizer, step, self._fraction())
        targets, tokens = self.ranks.sum(sum(b.targets for b in batches), sum(b.tokens for b in batches))
        # gradients are averaged over the ranks, and shall be summed
        sums = self.objective.backward(self.model, batches, targets / self.ranks.size, self._scope)
        plain, count = self.ranks.sum(*sums)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.optimizer.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        value = self._finite(plain / count, "loss")
        self.loss = value if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * value
        progress.step, progress.tokens = step + 1, progress.tokens + int(tokens)
        progress.seconds = self.ranks.firsts(progress.seconds + time.perf_counter() - began)
        self.log.append(json.dumps({"step": step, "loss": value, "seconds": round(progress.seconds, 3)}))

    @contextmanager
    def _scope(self, part: int) -> Iterator[None]:
        """Micro-batch `part` of this step: its own dropout, and the precision."""
        number = self.progress.step * self.recipe.accumulate + part * self.ranks.size + self.ranks.rank
        torch.manual_seed((self.recipe.seed << 40) + number)
        self.ranks.hold_gradients(self.model, part + 1 < self.parts)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            yield

    def _finite(self, value: float, what: str) -> float:
        if math.isfinite(value):
            return value
        spec = self.optimizer
        raise ValueError(
            f"the {what} is {value} at step {self.progress.step}: lower optimizer.lr ({spec.lr}), optimizer.matrix_lr "
            f"({spec.matrix_lr}) or optimizer.clip ({spec.clip}) and start anew with --overwrite"
        )

    def _fraction(self) -> float:
        return self.recipe.budget.fraction(self.progress.seconds, self.progress.step, self.progress.tokens)

    def _status(self) -> Status:
        spent, fraction = self.progress.seconds, self._fraction()
        left = spent / fraction - spent if fraction else math.inf
        speed = self.progress.tokens / max(spent, 1e-9)
        return Status(self.progress.step, fraction, self.loss, speed, left)

    def _evaluate(self) -> None:
        """One point of the learning curve; the best weights so far are kept."""
        value = self._finite(self.valid_loss(self.prepared.curve), "validation loss")
        progress = self.progress
        progress.evaluations = int(self._fraction() * self.recipe.evaluations) + 1
        progress.curve.append(
            {
                "step": progress.step,
                "seconds": round(progress.seconds, 2),
                "tokens": progress.tokens,
                "loss": self.loss,
                "valid_loss": value,
            }
        )
        if value < progress.best_loss:
            progress.best_loss = value
            self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    @torch.no_grad()
    def valid_loss(self, batches: Order) -> float:
        """Nats a target, without smoothing or dropout."""
        self.model.eval()
        plain, count = 0.0, 0.0
        for batch, counts in all_of(batches, self.ranks.rank, self.ranks.size):
            loss = self.objective(self.model, batch.to(self.device))
            if counts:
                plain, count = plain + float(loss.plain), count + loss.tokens
        self.model.train()
        plain, count = self.ranks.sum(plain, count)
        return plain / max(1, count)

    def save(self) -> None:
        """A checkpoint of this very step, and the log up to it."""
        tensors = {
            "model": whole(self.model.state_dict()),
            "best": whole(self.best),
            "optimizer": whole(checkpoint.optimizer_tensors(self.optimizers)),
        }
        if self.ranks.first:
            self._write(tensors)
        self.ranks.wait()

    def _write(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        folder = self.folder / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:  # first: a resume cuts what is too much
            file.writelines(line + "\n" for line in self.log)
        self.log.clear()
        target = folder / f"step-{self.progress.step:09d}"
        if target == checkpoint.latest(folder):
            return
        write_folder(
            target,
            tensors,
            {
                "progress": {**vars(self.progress), "loss": self.loss},
                "spec": self.spec,
                "data": self.prepared.fingerprint,
            },
        )
        checkpoint.prune(folder, KEPT)

    def resume(self) -> bool:
        """Goes back to the newest checkpoint; false where there is none yet."""
        found = checkpoint.latest(self.folder / "checkpoints")
        if found is None:
            self._cut_log()
            return False
        tensors, records = read_folder(found)
        if records["spec"] != self.spec:
            raise ValueError(f"{found}: was made by another model spec; resume with the recipe it began with")
        if records["data"] != self.prepared.fingerprint:
            raise ValueError(f"{found}: was made from other data than {self.recipe.data.source} holds now; start anew")
        check_fit(self.model, tensors["model"], found)
        restore(self.model, tensors["model"])
        checkpoint.restore_optimizers(self.optimizers, tensors["optimizer"])
        own = self.model.state_dict()
        self.best = {name: like(value, own[name]) for name, value in tensors["best"].items()}
        self.loss = records["progress"].pop("loss")
        self.progress = Progress(**records["progress"])
        self._cut_log()
        return True

    def _cut_log(self) -> None:
        """Drops lines of steps that a killed run took after its last checkpoint."""
        path = self.folder / "log.jsonl"
        if not path.is_file() or not self.ranks.first:
            return
        lines = path.read_text("utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[: self.progress.step]), "utf-8")


@contextmanager
def _listening() -> Iterator[list[int]]:
    """Holds the signal once Ctrl-C or SIGTERM came, so that a step is finished and saved; a second stops at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
