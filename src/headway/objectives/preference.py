"""Preference: a model learns which answers are liked better, with no reward model between (DPO, 2305.18290).

g = log pi(y | x) - log pi_start(y | x);  DPO -log sigma(beta (g_chosen - g_rejected))
IPO (2310.12036) (g_chosen - g_rejected - 1 / (2 beta))^2;  KTO (2402.01306), of single answers that are liked or not,
1 - sigma(beta (g - z)) or 1 - sigma(beta (z - g)), z = max(0, mean g of prompts with each other's answers).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.data.examples import Example, Examples
from headway.data.sources import Values
from headway.generate.write import Options
from headway.hub import Loaded
from headway.objectives import Base, Loss, Score
from headway.objectives._preferences import (
    PAIRED,
    UNPAIRED,
    Answers,
    Reader,
    Truncate,
    by_length,
    liked,
    log_p,
    rows_of,
)
from headway.objectives._rollouts import Policy, Prompts, drawn, start_of, still
from headway.objectives._tools import Tools
from headway.recipe import Recipe

PROMPTS, DRAWN = 64, 64  # held-out prompts on which the divergence is measured, and tokens of each answer at most
TOGETHER = 8  # of them at a time: each token has the whole vocabulary twice


class Objective(Base):
    """`loss`: dpo or ipo, which read pairs (prompt, chosen, rejected), or kto (prompt, answer, and a label: good or
    bad, 1 or 0). `beta`: how strongly the model is kept near its start. `chat` and `truncate`: see `Reader`.
    `desirable`, `undesirable`: KTO's weights of the two kinds of answer.

    The start is the frozen base of an adapted model, its adapters off: there is no second copy. A model that is tuned
    whole is compared with the checkpoint it came from, which stays in memory beside it, frozen.
    The loss of KTO takes z from its own micro-batch, so there accumulation is close to a large batch, not equal to it;
    alone in a batch, an answer has z = 0.
    """

    KINDS = ("decoder",)
    COLUMNS = PAIRED
    METRIC = ("preference_accuracy", False)

    def __init__(
        self,
        loss: Literal["dpo", "ipo", "kto"] = "dpo",
        beta: float = 0.1,
        chat: bool = False,
        truncate: Truncate = None,
        desirable: float = 1.0,
        undesirable: float = 1.0,
    ) -> None:
        if not 0 < beta < float("inf"):
            raise ValueError(f"objective.beta is above 0, not {beta}")
        if min(desirable, undesirable) <= 0 or (loss != "kto" and (desirable, undesirable) != (1.0, 1.0)):
            raise ValueError(f"objective.desirable and undesirable are weights above 0 of kto, not {desirable} and "
                             f"{undesirable} of {loss}")  # fmt: skip
        self.loss, self.beta, self.weights = loss, beta, (desirable, undesirable)
        self.reader = Reader(chat, truncate)

    def columns(self) -> dict[str, str]:
        return UNPAIRED if self.loss == "kto" else PAIRED

    def ready(self, tools: Tools) -> None:
        self.reader.start, self.pad, self.limit = tools.start, tools.pad, tools.max_tokens
        if tools.start is not None and "lm" not in tools.start.spec.get("heads", {}):
            raise ValueError(f"model.load: a {tools.start.kind} without a head 'lm' cannot write, so it has no "
                             "preferences to learn; objective.name=reward tells how good an answer is")  # fmt: skip

    def spec(self, model: dict[str, Any], tools: Tools) -> dict[str, Any]:
        self._started(tools)
        return model

    def _started(self, tools: Tools) -> Loaded:
        if tools.start is None:
            raise ValueError("preferences teach a model that can write already: set model: {load: FOLDER}")
        return tools.start

    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        """Ids of the prompt, and of the answers; of KTO, those of one and whether it was liked."""
        self._started(tools)
        if self.loss != "kto":
            return [self.reader.pair(row, tools)]
        text, answer, label = row
        good = liked(label, text)
        ids = self.reader.fitted(self.reader.prompt(text), [self.reader.answer(answer, tools)], text, tools.max_tokens)
        return [(*ids, [int(good)])]

    def sizes(self, example: Example) -> tuple[int, ...]:
        """Two rows, each of the prompt and the longer answer; of KTO, any prompt with any answer, twice."""
        if self.loss == "kto":
            return (len(example[0]), len(example[1])) * 2
        return (len(example[0]) + max(len(example[1]), len(example[2])),) * 2

    def collate(self, examples: Sequence[Example], random: np.random.Generator) -> Answers:
        if self.loss != "kto":
            chosen, rejected = ([(example[0], example[i]) for example in examples] for i in (1, 2))
            return rows_of(chosen + rejected, self.pad, len(examples))
        own = [(prompt, answer) for prompt, answer, _ in examples]
        # another row's answer was fitted to its own prompt, and may be too long for this one
        pairs = [(own[i][0], own[i - 1][1]) for i in range(len(own))] if len(own) > 1 else []
        others = [(prompt, answer[: self.limit - len(prompt)]) for prompt, answer in pairs]
        good = torch.tensor([bool(label[0]) for *_, label in examples])
        return rows_of(own + others, self.pad, len(examples), good)

    def __call__(self, model: nn.Module, batch: Answers) -> Loss:
        gain = self.gain(model, batch)
        if batch.liked is None:
            chosen, rejected = gain.chunk(2)
            each = paired(chosen, rejected, self.beta, self.loss)
        else:
            each = unpaired(gain, batch.liked, self.beta, self.weights)
        return Loss(each.sum(), each.detach().sum(), batch.targets)

    def gain(self, model: nn.Module, batch: Answers) -> Float[Tensor, " N"]:
        """How much likelier each answer is than it was at the start, in nats."""
        now = log_p(model, batch)
        with torch.no_grad(), still(model), start_of(model, self.reader.start) as start:
            before = log_p(start, batch)
        return now - before

    # what is told at the end

    def use(self, tools: Tools) -> str:
        return f'generate {{}} "TEXT"{" --chat" if self.reader.chat else ""}'

    @torch.no_grad()
    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """On held-out rows: how often the chosen answer gained more than the rejected one, by how much (`margin`, times
        beta), and how far the model went from its start (`kl`, see `divergence`). Of unpaired answers, how often a
        liked one gained more than one that was not, over all pairs of them."""
        model.unpack()
        order = self.order(Examples(example for row in rows for example in self.encode(row, tools)),
                           tokens=recipe.batch_tokens, length=recipe.max_tokens, seed=0)  # fmt: skip
        better, worse = [], []
        for i in range(len(order)):
            batch = order.batch(i).to(model.device)
            gain = self.gain(model.net, batch)
            if batch.liked is None:
                better.append(gain[: batch.targets])
                worse.append(gain[batch.targets :])
            else:
                own = gain[: batch.targets]
                better.append(own[batch.liked])
                worse.append(own[~batch.liked])
        high, low = torch.cat(better), torch.cat(worse)
        gaps = high - low if self.loss != "kto" else (high[:, None] - low).flatten()
        found: dict[str, float] = {}
        if len(gaps):  # of unpaired answers, all that are held out may be of one kind
            found = {"preference_accuracy": float(gaps.gt(0).float().mean()), "margin": self.beta * float(gaps.mean())}
        prompts = list(dict.fromkeys(row[0] for row in rows))
        return Score({**found, "kl": self.divergence(model, prompts[:PROMPTS], tools), "test_rows": len(rows)})

    def divergence(self, model: Loaded, prompts: Sequence[str], tools: Tools) -> float:
        """KL(model || start) in nats an answer of at most DRAWN tokens: of one answer that the model draws for each
        prompt, exact over the vocabulary at each of its tokens."""
        start, total = self._started(tools), 0.0
        rows, how = [self.reader.prompt(text) for text in prompts], Options(temperature=1.0, tokens=DRAWN)
        for batch, said, there in drawn(Policy(model.net, start, 1.0), rows, how, self.pad, TOGETHER):
            now = self._spread(model.net, start, batch, said, there)
            with start_of(model.net, start) as net:
                before = self._spread(net, start, batch, said, there)
            total += float(F.kl_div(before, now, reduction="sum", log_target=True))
        return total / max(1, len(rows))

    def _spread(
        self, net: nn.Module, start: Loaded, batch: Prompts, said: Tensor, there: Bool[Tensor, "N U"]
    ) -> Float[Tensor, "M V"]:
        """log p of every id at each token of the answers."""
        states = Policy(net, start, 1.0).states(batch.ids, batch.valid, said)[there]
        logits: Tensor = net.head("lm", states[None])  # type: ignore[operator]
        return logits[0].float().log_softmax(-1)

    def baseline(self, train: Sequence[Values], rows: Sequence[Values], recipe: Recipe) -> dict[str, Any]:
        """How far the length of an answer alone would come."""
        return {} if self.loss == "kto" else by_length(train, rows)


def paired(
    chosen: Float[Tensor, " N"], rejected: Float[Tensor, " N"], beta: float, loss: Literal["dpo", "ipo", "kto"]
) -> Float[Tensor, " N"]:
    """DPO or IPO of what the answers of each pair gained."""
    gap = chosen - rejected
    return -F.logsigmoid(beta * gap) if loss == "dpo" else (gap - 1 / (2 * beta)).square()


def unpaired(
    gain: Float[Tensor, " N"], liked: Bool[Tensor, " M"], beta: float, weights: tuple[float, float]
) -> Float[Tensor, " M"]:
    """KTO of M answers' gains, behind which stand those of the prompts with each other's answers."""
    own, others = gain[: len(liked)], gain[len(liked) :].detach()
    level = others.mean().clamp(min=0) if len(others) else others.new_zeros(())
    side = torch.where(liked, 1.0, -1.0)
    weight = torch.where(liked, *weights)
    return weight * (1 - torch.sigmoid(side * beta * (own - level)))
