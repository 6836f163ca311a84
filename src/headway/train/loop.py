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
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headway import machine
from headway.data.batches import Order
from headway.data.loader import Stream
from headway.hub import Loaded
from headway.recipe import OptimizerSpec, Recipe
from headway.store import append_lines, check_fit, sweep, write_folder, write_text
from headway.train import checkpoint, recompute
from headway.train import watch as watching
from headway.train.average import Average
from headway.train.board import Board
from headway.train.checkpoint import Progress
from headway.train.compiled import compile_feedforwards, told, uncompiled
from headway.train.data import Prepared, all_of
from headway.train.deferred import shared
from headway.train.half import Half
from headway.train.network import learned, network, relearn, spec_of
from headway.train.optim import build_optimizers, set_rate
from headway.train.ranks import Gathered, Ranks, full, like


class Interrupted(Exception):
    """Somebody asked the run to stop; it is saved and resumes. `terminated`: by SIGTERM, not by Ctrl-C."""

    def __init__(self, terminated: bool) -> None:
        super().__init__("terminated" if terminated else "interrupted")
        self.terminated = terminated


@dataclass(frozen=True)
class Status:
    """What a watcher sees after each step: loss in nats a token (smoothed), share of the budget, seconds left; the
    FLOPs a second of its matrix products (forward counted once by PyTorch, times three), and whether they are bf16."""

    step: int
    fraction: float
    loss: float
    tokens_per_second: float
    seconds_left: float
    flops_per_second: float = 0.0
    bf16: bool = False


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
        pure = recipe.precision == "pure-bf16"
        self.model = shared(self.spec, prepared.tools, self.ranks, recipe.parallel, half=pure)
        self.objective.begin(self.model)
        self.optimizer = optimizer
        self.optimizers = build_optimizers(self.model, optimizer)
        self.best: dict[str, Tensor] = {}
        self.average = Average(self.model, optimizer.ema) if optimizer.ema else None
        self.progress = Progress()
        self.bf16 = recipe.precision.endswith("bf16") or (recipe.precision == "auto" and machine.fast_bf16())
        if recipe.activation_checkpointing:
            recompute.recompute(self.model)
        # ranks round what they gather, and keep their parts in fp32
        self.half = Half(self.model) if pure and self.ranks.size == 1 else None
        self.rounded = pure and self.ranks.size > 1
        self.net = self.half.net if self.half else self.model  # what runs forward and back
        if recipe.compile:
            compile_feedforwards(self.net)
        self.log: list[str] = []
        self.board = Board(folder) if recipe.log == "tensorboard" and self.ranks.first else None

    def fit(self) -> Loaded:
        """Trains to the end of the budget and returns the best model seen, by validation loss."""
        self.model.train()
        self.net.train()
        with uncompiled() if self.recipe.compile else nullcontext(), self._as_gathered():
            self.flops_per_token = watching.flops_per_token(
                self.objective, self.model, self.prepared.batches.batch(self.ranks.rank).to(self.device)
            )
        saved = time.monotonic()
        written = closing(self.board) if self.board else nullcontext()
        with written, _listening() as asked, self._stream() as self.stream:
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
        relearn(self.model, self.best)
        recompute.keep_all(self.model)
        if self.ranks.size == 1:
            return self.model
        net = network(self.spec, self.prepared.tools) if self.ranks.first else self.model
        own = net.state_dict() if self.ranks.first else {}
        for name, value in Gathered(self.best).items():
            if self.ranks.first:
                own[name].copy_(value)
        return net.to(self.device)

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
        if self.half:
            self.half.refresh()
        with told() if self.recipe.compile else nullcontext():
            sums = self.objective.backward(self.net, batches, targets / self.ranks.size, self._scope)
        plain, count = self.ranks.sum(*sums)
        norm = float(full(nn.utils.clip_grad_norm_(self.model.parameters(), self.optimizer.clip)))
        value = plain / count
        self._check(value, norm, batches)
        rate = max(group["lr"] for group in self.optimizers[0].param_groups)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.model, step)
        progress.variance = watching.variance(progress.variance, value, progress.loss)
        progress.loss = value if math.isnan(progress.loss) else 0.95 * progress.loss + 0.05 * value
        progress.step, progress.tokens = step + 1, progress.tokens + int(tokens)
        progress.seconds = self.ranks.firsts(progress.seconds + time.perf_counter() - began)
        figures = {"loss": value, "norm": norm, "rate": rate}
        if self.board:
            self.board.write(step, {**figures, "tokens_per_second": progress.tokens / progress.seconds})
        line = {"step": step, **figures, "tokens": progress.tokens}
        self.log.append(json.dumps({**line, "seconds": round(progress.seconds, 3)}))

    @contextmanager
    def _scope(self, part: int) -> Iterator[None]:
        """Micro-batch `part` of this step: its own dropout, and the precision."""
        number = self.progress.step * self.recipe.accumulate + part * self.ranks.size + self.ranks.rank
        torch.manual_seed((self.recipe.seed << 40) + number)
        self.ranks.hold_gradients(self.model, part + 1 < self.parts)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            yield
        if self.half:
            self.half.collect()

    def _as_gathered(self) -> torch.autocast:
        """Weights that ranks round as they gather them ask for bf16 whenever they are used."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.rounded)

    def _check(self, value: float, norm: float, batches: list[Any]) -> None:
        """Stops before a step that would spoil the weights, and keeps what it was to be made of."""
        step = self.progress.step
        why = watching.fault(self.recipe, step, value, norm, self.progress.loss, self.progress.variance)
        if why:
            rank = f"-rank-{self.ranks.rank}" if self.ranks.size > 1 else ""
            folder = self.folder / f"stopped-step-{step:09d}{rank}"
            first = step * self.recipe.accumulate + self.ranks.rank
            watching.keep(folder, step, first, self.ranks.size, batches, why)
            raise ValueError(f"{why} at step {step}: {self._remedy()}; its batch is in {folder}")

    def _remedy(self) -> str:
        spec = self.optimizer
        return (
            f"lower optimizer.lr ({spec.lr}), optimizer.matrix_lr ({spec.matrix_lr}) or optimizer.clip ({spec.clip}) "
            "and start anew with --overwrite"
        )

    def _fraction(self) -> float:
        return self.recipe.budget.fraction(self.progress.seconds, self.progress.step, self.progress.tokens)

    def _status(self) -> Status:
        spent, fraction = self.progress.seconds, self._fraction()
        left = spent / fraction - spent if fraction else math.inf
        speed = self.progress.tokens / max(spent, 1e-9)
        flops = speed * self.flops_per_token / self.ranks.size  # of each
        return Status(self.progress.step, fraction, self.progress.loss, speed, left, flops, self.bf16)

    def _evaluate(self) -> None:
        """One point of the learning curve; the best weights so far are kept."""
        with self.average.inside(self.model) if self.average else nullcontext():
            self._evaluate_weights()

    def _evaluate_weights(self) -> None:
        progress, value = self.progress, self.valid_loss(self.prepared.curve)
        if not math.isfinite(value):
            raise ValueError(f"the validation loss is {value} at step {progress.step}: {self._remedy()}")
        progress.evaluations = int(self._fraction() * self.recipe.evaluations) + 1
        progress.curve.append(
            {
                "step": progress.step,
                "seconds": round(progress.seconds, 2),
                "tokens": progress.tokens,
                "loss": progress.loss,
                "valid_loss": value,
            }
        )
        if self.board:
            self.board.write(progress.step - 1, {"valid_loss": value})  # of the step that was taken last
        if value < progress.best_loss:
            progress.best_loss = value
            self.best = {name: tensor.detach().clone() for name, tensor in learned(self.model).items()}

    @torch.no_grad()
    def valid_loss(self, batches: Order) -> float:
        """Nats a target, without smoothing or dropout."""
        self.model.eval()
        plain, count = 0.0, 0.0
        for batch, counts in all_of(batches, self.ranks.rank, self.ranks.size):
            with self._as_gathered():
                loss = self.objective(self.model, batch.to(self.device))
            if counts:
                plain, count = plain + float(loss.plain), count + loss.tokens
        self.model.train()
        plain, count = self.ranks.sum(plain, count)
        return plain / max(1, count)

    def save(self) -> None:
        """A checkpoint of this very step, and the log up to it."""
        held = {
            "model": learned(self.model),
            "best": self.best,
            "optimizer": checkpoint.optimizer_tensors(self.optimizers),
            **({"average": self.average.tensors} if self.average else {}),
            **({"objective": kept} if (kept := self.objective.kept()) else {}),
        }
        tensors = {name: Gathered(part) if self.ranks.size > 1 else part for name, part in held.items()}
        folder = self.folder / "checkpoints"
        target = folder / f"step-{self.progress.step:09d}"
        if self.ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            append_lines(self.folder / "log.jsonl", self.log)  # first: a resume cuts what is too much
            self.log.clear()
        if self.ranks.firsts(float(target == checkpoint.latest(folder))):
            return
        if self.ranks.first:
            write_folder(
                target,
                tensors,
                {"progress": vars(self.progress), "spec": self.spec, "data": self.prepared.fingerprint},
            )
            checkpoint.prune(folder, self.recipe.keep)
        else:
            for part in tensors.values():  # in the order in which the first rank writes them
                deque(part.values(), maxlen=0)
        self.ranks.wait()

    def resume(self, note: Callable[[str], None] = lambda line: None) -> bool:
        """Goes back to the newest checkpoint that is whole; false where there is none. `note` is told of others."""
        folder = self.folder / "checkpoints"
        saved, faults = checkpoint.newest(folder, whole=self.ranks.size == 1)
        if saved is not None:
            self._restore(saved)
        self.ranks.wait()  # until all have read
        if self.ranks.first:
            for path, fault in faults.items():
                aside = checkpoint.set_aside(path).name
                note(f"{fault.partition(';')[0]}: set aside as {aside}, going on from step {self.progress.step}")
            sweep(self.folder)
            sweep(folder)
            self._cut_log()
        return saved is not None

    def _restore(self, saved: checkpoint.Saved) -> None:
        found, tensors = saved.folder, saved.tensors
        if saved.spec != json.loads(json.dumps(self.spec)):  # there, a key that is a number has become text
            raise ValueError(f"{found}: was made by another model spec; resume with the recipe it began with")
        if saved.data != self.prepared.fingerprint:
            raise ValueError(f"{found}: was made from other data than {self.recipe.data.source} holds now; start anew")
        own = learned(self.model)
        for name in ("model", *(["best"] if tensors["best"] else []), *(["average"] if self.average else [])):
            check_fit(own, tensors.get(name, {}), found / f"{name}.safetensors")
        checkpoint.restore_optimizers(self.optimizers, tensors["optimizer"], found / "optimizer.safetensors")
        relearn(self.model, {name: like(tensors["model"][name], tensor) for name, tensor in own.items()})
        self.best = {name: like(value, own[name]) for name, value in tensors["best"].items()}
        if self.average:
            self.average.restore({name: like(value, own[name]) for name, value in tensors["average"].items()})
        self.objective.restore({k: v.to(self.device) for k, v in tensors.get("objective", {}).items()})
        self.progress = saved.progress

    def _cut_log(self) -> None:
        """Drops lines of steps that a killed run took after its last checkpoint."""
        path = self.folder / "log.jsonl"
        if not path.is_file():
            return
        lines = path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)
        if len(lines) > self.progress.step:
            write_text(path, "".join(lines[: self.progress.step]))


@contextmanager
def _listening() -> Iterator[list[int]]:
    """Holds the signal once Ctrl-C or SIGTERM came, so that a step is finished and saved; a second stops at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
