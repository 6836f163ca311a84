"""Contrastive: what belongs together is near, all else in the batch is far (SimCSE 2104.08821; CLIP 2103.00020).

softmax: -sum_i log exp(s(a_i, b_i)) / sum_j exp(s(a_i, b_j)), of two towers both ways, halved; sigmoid (SigLIP
2303.15343): -sum_ij log sigma(+-(s(a_i, b_j))), + where i = j. Ranks share their vectors; micro-batches are one batch:
vectors first, then the loss of all of them, then each one's way back, made anew (GradCache, 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.data.batches import Batch, Order
from headway.data.examples import Example
from headway.data.shuffled import Shuffled
from headway.data.sources import Values
from headway.heads import HeadSpec, pool
from headway.hub import Loaded
from headway.objectives import Base, Loss, Score, Unfit, with_vocabulary
from headway.objectives._gather import alone, gathered
from headway.objectives._pictures import batch_of, stored
from headway.objectives._recall import chance, ngrams, recall
from headway.objectives._tools import Tools
from headway.objectives._vectors import hidden, read, text_of, tower_tools
from headway.recipe import Recipe
from headway.use.embed import POOLS

PAIRS: dict[str, dict[str, str]] = {
    "dropout": {"text": "source"},
    "second": {"text": "source", "second": "source"},
    "negative": {"text": "source", "second": "source", "negative": "source"},
    "target": {"input": "source", "target": "target"},
    "image": {"image": "image", "text": "source"},
}
TEMPERATURE = 0.05


@dataclass(frozen=True, kw_only=True)
class Paired(Batch):
    """`ids`: of an encoder, all sides one after the other; of two towers, the first one's, where it reads text.
    `other_ids`, or `pixels`: the other tower's."""

    ids: Int[Tensor, "B T"]
    types: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None
    other_ids: Int[Tensor, "D S"] | None = None
    other_valid: Bool[Tensor, "D S"] | None = None
    pixels: Float[Tensor, "D 3 H W"] | None = None


class Objective(Base):
    """`pairs`: what belongs together: a text with itself under another "dropout", a text and its "second", the same
    with a hard "negative" (encoders); input and "target", or "image" and text (two towers, which learn their
    temperature).

    `loss`: "softmax", or "sigmoid" (two towers). `temperature`: of an encoder's scores (default: 0.05). `pooling`: how
    an encoder's vectors are made, "mean", "first", "last" or a head's name (default: as the checkpoint has it, or
    "mean"). `truncate`: cut texts that are too long.
    """

    def __init__(
        self,
        pairs: Literal["dropout", "second", "negative", "target", "image"] = "second",
        loss: Literal["softmax", "sigmoid"] = "softmax",
        temperature: float | None = None,
        pooling: str | None = None,
        truncate: bool = False,
    ) -> None:
        self.two_towers = pairs in ("target", "image")
        if self.two_towers and (temperature is not None or pooling is not None):
            raise ValueError("objective.temperature and pooling are an encoder's; towers have model.scale and a head")
        if loss == "sigmoid" and not self.two_towers:
            raise ValueError("objective.loss=sigmoid needs the scale and bias of two towers: pairs 'target' or 'image'")
        if temperature is not None and not 0 < temperature < float("inf"):
            raise ValueError(f"objective.temperature is above 0, not {temperature}")
        self.pairs, self.loss, self.truncate = pairs, loss, truncate
        self.temperature, self.pooling = temperature or TEMPERATURE, pooling
        self.sides = {"dropout": 2, "second": 2, "negative": 3}.get(pairs, 1)
        self.METRIC = ("uniformity", True) if pairs == "dropout" else ("recall_at_1", False)
        self.KINDS = ("dual",) if self.two_towers else ("encoder",)

    def columns(self) -> dict[str, str]:
        return PAIRS[self.pairs]

    def ready(self, tools: Tools) -> None:
        self.start, self.image = tools.start, tools.image
        self.tools = [tools, tower_tools(tools)] if self.pairs == "target" else [tools]
        if self.pairs == "image" and self.image is None:
            raise ValueError("no tower says the size of its pictures: give it patches.image")
        if self.pooling is None:
            self.pooling = (tools.start.facts.pooling if tools.start is not None else None) or "mean"

    def spec(self, model: dict[str, Any], tools: Tools) -> dict[str, Any]:
        if not self.two_towers:
            model = with_vocabulary(model, "vocab", tools.vocab, tools.start)
            if self.pooling not in POOLS and self.pooling not in model.get("heads", {}):
                raise ValueError(f"objective.pooling is {', '.join(POOLS)} or a head's name, not '{self.pooling}'")
            return model
        towers = msgspec.to_builtins(model.get("towers", {}))
        if len(towers) != 2 or (self.pairs == "image" and set(towers) != {"image", "text"}):
            wanted = "'image' and 'text'" if self.pairs == "image" else "of any two names"
            raise ValueError(f"model.towers are two, {wanted}; this recipe has {', '.join(towers) or 'none'}")
        width = min(int(tower.get("width", 1)) for tower in towers.values())
        for (name, tower), side in zip(towers.items(), self._tools(tools, list(towers)), strict=True):
            head = {"pool": "mean", "outputs": width, "bias": False}
            tower["heads"] = {"project": head, **tower.get("heads", {})}
            if side is not None:
                towers[name] = with_vocabulary(tower, "vocab", side.vocab, tools.start)
        start = {"scale": 10.0, "bias": -10.0} if self.loss == "sigmoid" and tools.start is None else {}
        return {**start, **model, "towers": towers}

    def _tools(self, tools: Tools, names: Sequence[str]) -> list[Tools | None]:
        """Of each tower in order; None for the one that reads pictures."""
        if self.pairs == "image":
            return [None if name == "image" else tools for name in names]
        return list(self.tools)

    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        text = lambda side, value: text_of(side, value, truncate=self.truncate)
        if self.pairs == "image":
            try:
                return [(stored(row[0]), *text(tools, row[1]))]
            except ValueError as problem:
                raise Unfit(str(problem)) from None
        sides = self.tools if self.pairs == "target" else self.tools * len(row)
        return [tuple(part for side, value in zip(sides, row, strict=True) for part in text(side, value))]

    def sizes(self, example: Example) -> tuple[int, ...]:
        """Tokens of each side; a picture counts as one."""
        if self.pairs == "image":
            return 1, len(example[1])
        lengths = tuple(len(ids) for ids in example[::2])
        return lengths * 2 if self.pairs == "dropout" else lengths

    def batches(self, examples: Sequence[Example], sizes: np.ndarray, *, tokens: int, length: int, seed: int) -> Order:
        return Shuffled(examples, sizes, tokens=tokens, seed=seed, collate=self.collate)

    def collate(self, examples: Sequence[Example], random: np.random.Generator) -> Paired:
        at = 1 if self.pairs == "image" else 0
        side = lambda i: [(example[i], example[i + 1]) for example in examples]
        sides = [0] * 2 if self.pairs == "dropout" else [at] if self.two_towers else range(0, 2 * self.sides, 2)
        found = read([text for i in sides for text in side(i)])
        batch = Paired(ids=found.ids, types=found.types, valid=found.valid, tokens=found.tokens, targets=len(examples))
        if self.pairs == "image":
            assert self.image is not None
            return replace(batch, pixels=batch_of([example[0] for example in examples], self.image))
        if self.pairs == "target":
            other = read(side(2))
            tokens = found.tokens + other.tokens
            return replace(batch, other_ids=other.ids, other_valid=other.valid, tokens=tokens)
        return batch

    def vectors(self, model: nn.Module, batch: Paired) -> list[Float[Tensor, "B P"]]:
        """Of each side, of length one."""
        net: Any = model
        if not self.two_towers:
            x = hidden(net, batch, self.start, "embed")
            return list(F.normalize(self._pooled(net, x, batch).float(), dim=-1).chunk(self.sides))
        names = list(net.towers)
        if self.pairs == "image":
            found = {"image": net.project("image", batch.pixels), "text": net.project("text", batch.ids, batch.valid)}
            return [found[name].float() for name in names]
        one = net.project(names[0], batch.ids, batch.valid)
        return [one.float(), net.project(names[1], batch.other_ids, batch.other_valid).float()]

    def _pooled(self, net: Any, x: Tensor, batch: Paired) -> Tensor:
        if self.pooling in POOLS:
            return pool(x, HeadSpec(pool=self.pooling), None, batch.valid)  # type: ignore[arg-type]
        return net.head(self.pooling, x, batch.ids, batch.valid)

    def compare(self, model: nn.Module, sides: Sequence[Float[Tensor, "B P"]]) -> Float[Tensor, ""]:
        """The loss of these rows among those of all ranks, summed over these."""
        net: Any = model
        shared = model.training and not alone()
        found = [gathered(side) if shared else (side, 0) for side in sides]
        everyone, first = [side for side, _ in found], found[0][1]
        own = torch.arange(first, first + len(sides[0]), device=sides[0].device)
        with torch.autocast(sides[0].device.type, enabled=False):
            if not self.two_towers:
                scores = sides[0] @ torch.cat(everyone[1:]).mT / self.temperature
                return F.cross_entropy(scores, own, reduction="sum")
            scores = net.scores(sides[0], everyone[1])
            if self.loss == "sigmoid":
                sign = 2.0 * F.one_hot(own, len(everyone[1])) - 1
                return -F.logsigmoid(sign * scores).sum()
            back = net.scores(everyone[0], sides[1]).mT if shared else scores.mT
            return (F.cross_entropy(scores, own, reduction="sum") + F.cross_entropy(back, own, reduction="sum")) / 2

    def __call__(self, model: nn.Module, batch: Paired) -> Loss:
        total = self.compare(model, self.vectors(model, batch))
        return Loss(total, total.detach(), batch.targets)

    def backward(
        self, model: nn.Module, batches: Sequence[Any], targets: float, scope: Callable[[int], Any]
    ) -> tuple[float, int]:
        """The micro-batches as one batch, in the memory of one of them and its vectors."""
        if len(batches) == 1:
            return super().backward(model, batches, targets, scope)
        kept = []
        for i, batch in enumerate(batches):
            with scope(i), torch.no_grad():
                kept.append(self.vectors(model, batch))
        sides = [torch.cat(parts).requires_grad_() for parts in zip(*kept, strict=True)]
        with scope(0):
            total = self.compare(model, sides)
            (total / targets).backward()
        slopes = [side.grad.split([len(parts[0]) for parts in kept]) for side in sides if side.grad is not None]
        for i, batch in enumerate(batches):
            with scope(i):  # with the dropout of the first time
                torch.autograd.backward(self.vectors(model, batch), [slope[i] for slope in slopes])
        return float(total.detach()), sum(batch.targets for batch in batches)

    def loaded(self, net: nn.Module, spec: dict[str, Any], tools: Tools) -> Loaded:
        found = super().loaded(net, spec, tools)
        if not self.two_towers:
            found.facts = msgspec.structs.replace(found.facts, pooling=self.pooling, normalize=True)
        elif self.pairs == "target" and tools.start is None:
            found.target = self.tools[1].source
        return found

    @torch.inference_mode()
    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """How often the right one is the nearest (recall_at_1), or among the ten nearest, of all that were held out;
        of texts alone, how evenly they fill the space (uniformity, 2005.10242: lower is better)."""
        how: dict[str, Any] = {"truncate": self.truncate}
        if self.pairs == "dropout":
            x = model.embed([row[0] for row in rows], **how)
            distances = torch.pdist(x).square() if len(x) > 1 else torch.zeros(1)
            return Score({"uniformity": float(distances.mul(-2).exp().mean().log()), "test_rows": len(rows)})
        one, two, right = _distinct(rows, self.pairs != "image")
        more = {"task": list(model.net.towers)[1]} if self.pairs == "target" else {}
        return Score(recall(model.embed(one, **how) @ model.embed(two, **how, **more).T, right))

    def baseline(self, train: Sequence[Values], rows: Sequence[Values], recipe: Recipe) -> dict[str, Any]:
        """Recall by the n-grams of characters that two texts share; of pictures, by chance."""
        if self.pairs == "dropout":
            return {}
        one, two, right = _distinct(rows, self.pairs != "image")
        if self.pairs == "image":
            return chance(right, len(two))
        found = recall(ngrams(one) @ ngrams(two).T, right)
        by = {f"{name}_baseline": value for name, value in found.items() if name.startswith("recall")}
        return {**by, "baseline": "n-grams of characters in common"}


def _distinct(rows: Sequence[Values], texts: bool) -> tuple[list[Any], list[Any], list[list[int]]]:
    """Both sides, each once, and for each of the first which of the second belong to it."""
    places: dict[Any, int] = {}
    right: dict[Any, list[int]] = {}
    one: dict[Any, Any] = {}
    for first, second in (row[:2] for row in rows):
        key = first if isinstance(first, str) else np.asarray(first).tobytes()
        one[key] = first if texts or not isinstance(first, str) else Path(first)  # a str is a text to `embed`
        right.setdefault(key, []).append(places.setdefault(second, len(places)))
    return list(one.values()), list(places), list(right.values())
