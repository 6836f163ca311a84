"""Distill: a model learns what a teacher says of every target, besides what is right (1503.02531).

(1 - alpha) L(y) + alpha T^2 sum KL(softmax(teacher / T) || softmax(student / T)), around any objective that has logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway import hub, objectives
from headway.data.batches import Order
from headway.data.examples import Example
from headway.data.sources import Values
from headway.hub import Loaded
from headway.objectives import Base, Loss, Score
from headway.objectives._tools import Tools
from headway.recipe import Recipe


class Objective(Base):
    """`teacher`: a model's folder; `of`: the objective that both are asked by, as in a recipe; `temperature`: how flat
    the teacher's answers are made; `alpha`: how much they count beside what is right, all of it at 1.

    A new student reads with its teacher's tokenizers.
    """

    def __init__(self, teacher: str, of: dict[str, Any], temperature: float = 2.0, alpha: float = 0.5) -> None:
        if temperature <= 0 or not 0 <= alpha <= 1:
            raise ValueError(
                f"objective.temperature is above 0 and alpha a share, 0 to 1, not {temperature} and {alpha}"
            )
        self.inner: Base = objectives.build(of)
        kind = type(self.inner)
        if kind.predict is Base.predict or kind.__call__ is not Base.__call__:
            raise ValueError(f"objective.of: {of.get('name')} has no logits that a teacher could give; choose another")
        self.teacher = hub.load(teacher)
        self.temperature, self.alpha = temperature, alpha
        self.KINDS, self.COLUMNS, self.EXTRA = self.inner.KINDS, self.inner.COLUMNS, self.inner.EXTRA
        self.METRIC = self.inner.METRIC
        if self.teacher.kind not in self.KINDS:
            raise ValueError(
                f"{teacher}: is a {self.teacher.kind}, and this objective asks a {' or '.join(self.KINDS)}"
            )

    def __call__(self, model: nn.Module, batch: Any) -> Loss:
        logits, labels = self.inner.predict(model, batch)
        total, plain = self.inner.judge(logits, labels)
        self.teacher.net.to(logits.device)
        with torch.no_grad():
            told, _ = self.inner.predict(self.teacher.net.eval(), batch)
        soft = divergence(logits, told, self.temperature)
        return Loss((1 - self.alpha) * total + self.alpha * soft, plain, batch.targets)

    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """The inner objective's, beside the teacher's own on the same rows."""
        found = self.inner.score(model, rows, tools, recipe)
        taught = self.inner.score(self.teacher, rows, tools, recipe).metrics
        beside = {f"{name}_teacher": value for name, value in taught.items() if not name.endswith("_baseline")}
        return Score({**found.metrics, **beside}, found.rows)

    def baseline(self, train: Sequence[Values], rows: Sequence[Values], recipe: Recipe) -> dict[str, Any]:
        return self.inner.baseline(train, rows, recipe)

    def asked(self, rows: Sequence[Values], limit: int | None) -> Sequence[Values]:
        return self.inner.asked(rows, limit)

    def lender(self) -> Loaded | None:
        return self.teacher if self.teacher.source is not None else None

    def columns(self) -> dict[str, str]:
        return self.inner.columns()

    def ready(self, tools: Tools) -> None:
        mine, theirs = tools.source, self.teacher.source
        if mine is not None and theirs is not None and mine.record() != theirs.record():
            raise ValueError("objective.teacher reads with another tokenizer than model.load: their ids differ")
        heads = msgspec.to_builtins(self.teacher.spec.get("heads", {})).values()
        told = [tuple(head["labels"]) for head in heads if head.get("labels")]
        if tools.labels and told and tools.labels not in told:
            raise ValueError(
                f"objective.teacher tells {', '.join(told[0])}, and the rows have {', '.join(tools.labels)}"
            )
        self.inner.ready(tools)

    def spec(self, model: dict[str, Any], tools: Tools) -> dict[str, Any]:
        return self.inner.spec(model, tools)

    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        return self.inner.encode(row, tools)

    def sizes(self, example: Example) -> tuple[int, ...]:
        return self.inner.sizes(example)

    def batches(self, examples: Sequence[Example], sizes: np.ndarray, *, tokens: int, length: int, seed: int) -> Order:
        return self.inner.batches(examples, sizes, tokens=tokens, length=length, seed=seed)

    def collate(self, examples: Any, random: np.random.Generator) -> Any:
        return self.inner.collate(examples, random)

    def rehearse(self, net: nn.Module, batch: Any, tools: Tools) -> None:
        self.inner.rehearse(net, batch, tools)

    def use(self, tools: Tools) -> str:
        return self.inner.use(tools)

    def loaded(self, net: nn.Module, spec: dict[str, Any], tools: Tools) -> Loaded:
        """With what is known of how to use the teacher, its family apart."""
        made = self.inner.loaded(net, spec, tools)
        if tools.start is not None:
            return made
        facts = msgspec.structs.replace(self.teacher.facts, family="", original={}, max_tokens=tools.max_tokens)
        made.facts, made.target = facts, self.teacher.target
        return made


def divergence(logits: Tensor, told: Tensor, temperature: float) -> Tensor:
    """T^2 sum KL(softmax(told / T) || softmax(logits / T)), of the ids that both have: a table may be padded."""
    known = min(logits.shape[-1], told.shape[-1])
    mine, theirs = ((x[..., :known].float() / temperature).log_softmax(-1) for x in (logits, told))
    return temperature**2 * F.kl_div(mine, theirs, reduction="sum", log_target=True)
