"""Reward: a number for each answer, which is higher the better it is liked (Bradley-Terry; 1706.03741, 2203.02155).

-log sigma(r(x, chosen) - r(x, rejected)), r one output of a head: of a decoder's last token, or of an encoder's pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.data.batches import Batch, padded
from headway.data.examples import Example, Examples
from headway.data.sources import Values
from headway.hub import Loaded
from headway.objectives import Base, Loss, Score, Unfit
from headway.objectives._preferences import PAIRED, Reader, Truncate, apart, by_length
from headway.objectives._tools import Tools
from headway.recipe import Recipe

HEAD = "reward"


@dataclass(frozen=True, kw_only=True)
class Texts(Batch):
    """2 N texts, prompt and answer: all that were chosen before all that were rejected; `valid` is None where none is
    padded, `types` where the model has none."""

    ids: Int[Tensor, "N T"]
    types: Int[Tensor, "N T"] | None
    valid: Bool[Tensor, "N T"] | None


class Objective(Base):
    """`chat`, `truncate`: see `Reader`; an encoder reads prompt and answer as a pair of texts, and cuts nothing.

    The number is the output of the head "reward": `model.logits(texts, head="reward")`.
    """

    KINDS = ("decoder", "encoder")
    COLUMNS = PAIRED
    METRIC = ("preference_accuracy", False)

    def __init__(self, chat: bool = False, truncate: Truncate = None) -> None:
        self.reader = Reader(chat, truncate)

    def ready(self, tools: Tools) -> None:
        self.reader.start, self.pad = tools.start, tools.pad
        self.encoder = tools.start is not None and tools.start.kind == "encoder"
        self.typed = tools.start is not None and tools.start.spec.get("types", 0) > 1
        if self.encoder and (self.reader.chat or self.reader.truncate):
            raise ValueError(
                "objective: chat and truncate are for decoders, and this model is an encoder: leave them out"
            )

    def spec(self, model: dict[str, Any], tools: Tools) -> dict[str, Any]:
        self._started(tools)
        heads = msgspec.to_builtins(model.get("heads", {}))
        pool = "mean" if model["kind"] == "encoder" else "last"
        head = {"pool": pool, "bias": False, **heads.get(HEAD, {}), "outputs": 1}  # a bias cancels between answers
        return {**model, "heads": {**heads, HEAD: head}}

    def _started(self, tools: Tools) -> None:
        if tools.start is None:
            raise ValueError("a reward is learned by a model that reads already: set model: {load: FOLDER}")

    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        """Ids and types of the prompt with each answer."""
        self._started(tools)
        if not self.encoder:
            prompt, *answers = self.reader.pair(row, tools)
            both = [[*prompt, *answer] for answer in answers]
            return [tuple(field for ids in both for field in (ids, [0] * len(ids)))]
        text, chosen, rejected = apart(row)
        found = [field for answer in (chosen, rejected) for field in tools.encode(text, answer)]
        longest = max(map(len, found))
        if longest > tools.max_tokens:
            raise Unfit(f"the prompt {text[:40]!r} with its answer has {longest} tokens, and max_tokens is "
                        f"{tools.max_tokens}: raise it")  # fmt: skip
        return [tuple(found)]

    def sizes(self, example: Example) -> tuple[int, ...]:
        return (max(len(example[0]), len(example[2])),) * 2

    def collate(self, examples: Sequence[Example], random: np.random.Generator) -> Texts:
        rows = [(example[i], example[i + 1]) for i in (0, 2) for example in examples]
        ids, valid = padded([ids for ids, _ in rows], self.pad)
        types = padded([kinds for _, kinds in rows], 0)[0] if self.typed else None
        whole = bool(valid.all())
        return Texts(
            ids=ids, types=types, valid=None if whole else valid, tokens=int(valid.sum()), targets=len(examples)
        )

    def rewards(self, model: nn.Module, batch: Texts) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Of the chosen answers, and of the rejected ones."""
        net: Any = model
        more = {} if batch.types is None else {"types": batch.types}
        found = net.head(HEAD, net(batch.ids, batch.valid, **more), batch.ids, batch.valid)
        chosen, rejected = found[:, 0].float().chunk(2)
        return chosen, rejected

    def __call__(self, model: nn.Module, batch: Texts) -> Loss:
        chosen, rejected = self.rewards(model, batch)
        total = -F.logsigmoid(chosen - rejected).sum()
        return Loss(total, total.detach(), batch.targets)

    def use(self, tools: Tools) -> str:
        return "verify {}"  # no command gives the number: `model.logits(texts, head="reward")`

    @torch.no_grad()
    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """How often the chosen answer of a held-out pair has the higher reward, and by how much (`margin`)."""
        model.unpack()
        order = self.order(Examples(example for row in rows for example in self.encode(row, tools)),
                           tokens=recipe.batch_tokens, length=recipe.max_tokens, seed=0)  # fmt: skip
        found = [self.rewards(model.net, order.batch(i).to(model.device)) for i in range(len(order))]
        gaps = torch.cat([chosen - rejected for chosen, rejected in found])
        accuracy = float(gaps.gt(0).float().mean())
        return Score({"preference_accuracy": accuracy, "margin": float(gaps.mean()), "test_rows": len(rows)})

    def baseline(self, train: Sequence[Values], rows: Sequence[Values], recipe: Recipe) -> dict[str, Any]:
        """How far the length of an answer alone would come."""
        return by_length(train, rows)
