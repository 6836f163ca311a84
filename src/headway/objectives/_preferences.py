"""Preferences: prompts and answers to them of which some are liked better, as batches, and how likely answers are.

log p(y | x) = sum_t log p(y_t | x, y_<t), over the answer and its end alone. What is too long is cut only where asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.data.batches import IGNORE, Batch, asked, padded
from headway.data.examples import Example
from headway.data.sources import Values
from headway.generate.texts import ids_of
from headway.hub import Loaded
from headway.objectives import Unfit
from headway.objectives._tools import Tools

Truncate = Literal["prompt", "answer"] | None
PAIRED = {"prompt": "source", "chosen": "source", "rejected": "source"}
UNPAIRED = {"prompt": "source", "answer": "source", "label": "plain"}


@dataclass(frozen=True, kw_only=True)
class Answers(Batch):
    """N rows of a prompt and an answer; `labels`: the token that follows where it is the answer's (`said` of them in
    all), else IGNORE. `valid` is None where no row is padded. Of pairs, all that were chosen come before all that were
    rejected. Unpaired answers are `liked` or not; behind them come their prompts with each other's answers."""

    ids: Int[Tensor, "N T"]
    labels: Int[Tensor, "N T"]
    valid: Bool[Tensor, "N T"] | None
    said: int
    liked: Bool[Tensor, " M"] | None = None


def rows_of(rows: Sequence[tuple[Any, Any]], pad: int, targets: int, liked: Tensor | None = None) -> Answers:
    """A batch of prompts, each with an answer."""
    both = [[*prompt, *answer] for prompt, answer in rows]
    ids, valid = padded([row[:-1] for row in both], pad)
    labels, _ = padded([[IGNORE] * (len(prompt) - 1) + list(answer) for prompt, answer in rows], IGNORE)
    whole = bool(valid.all())
    return Answers(
        ids=ids,
        labels=labels,
        valid=None if whole else valid,
        said=sum(len(answer) for _, answer in rows),
        liked=liked,
        tokens=int(valid.sum()),
        targets=targets,
    )


def log_p(net: Any, batch: Answers) -> Float[Tensor, " N"]:
    """How likely each answer is: log p(y | x). The vocabulary is asked at the answers' tokens alone."""
    x = net(batch.ids, batch.valid)
    at = asked(batch.labels, batch.said)
    logits = net.head("lm", x.flatten(0, 1)[at][None])[0]
    each = -F.cross_entropy(logits.float(), batch.labels.flatten()[at], reduction="none")
    return each.new_zeros(len(x)).index_add(0, at // x.shape[1], each)


class Reader:
    """Turns rows into ids. `chat`: prompts stand in the checkpoint's chat template, and answers end as its turns do.

    `truncate`: what is longer than `max_tokens` loses the prompt's beginning, or the answer's end; None refuses it.
    """

    def __init__(self, chat: bool, truncate: Truncate) -> None:
        if chat and truncate == "prompt":
            raise ValueError(
                "objective.truncate: a prompt in a chat template has a beginning that must stay; use answer"
            )
        self.chat, self.truncate = chat, truncate
        self.start: Loaded | None = None

    def prompt(self, text: str) -> list[int]:
        """The ids of a prompt, as the model reads it when it is used."""
        assert self.start is not None, "`spec` has seen to that"
        try:
            return ids_of(self.start, text, chat=self.chat)
        except ValueError as problem:
            raise Unfit(str(problem)) from None

    def answer(self, text: str, tools: Tools) -> list[int]:
        """The ids of an answer, and its end."""
        ids = tools.ids(text)
        if not ids:
            raise Unfit(f"the answer {text[:40]!r} has no tokens: give at least one")
        return ids if tools.eos is None else [*ids, tools.eos]

    def fitted(self, prompt: list[int], answers: list[list[int]], text: str, limit: int) -> tuple[list[int], ...]:
        """The prompt and its answers, each with it within `limit` tokens."""
        longest = max(map(len, answers))
        if len(prompt) + longest <= limit:
            return prompt, *answers
        told = f"the prompt {text[:40]!r} has {len(prompt)} tokens and its longest answer {longest}"
        if self.truncate is None:
            raise Unfit(f"{told}, and max_tokens is {limit}: raise it, or set objective.truncate")
        room = limit - (longest if self.truncate == "prompt" else len(prompt))
        if room < 1:
            raise Unfit(f"{told}, and max_tokens={limit} leaves no room for what objective.truncate={self.truncate} "
                        "cuts: raise it")  # fmt: skip
        if self.truncate == "prompt":
            return prompt[-room:], *answers
        return prompt, *(answer[:room] for answer in answers)

    def pair(self, row: Values, tools: Tools) -> Example:
        """prompt, chosen, rejected."""
        text, chosen, rejected = apart(row)
        answers = [self.answer(chosen, tools), self.answer(rejected, tools)]
        found = self.fitted(self.prompt(text), answers, text, tools.max_tokens)
        if found[1] == found[2]:
            raise Unfit(f"both answers to the prompt {text[:40]!r} are the same tokens once they are read (and cut): "
                        "leave it out, or raise max_tokens")  # fmt: skip
        return found


def apart(row: Values) -> Values:
    """A prompt and its two answers, which differ."""
    text, chosen, rejected = row
    if chosen == rejected:
        raise Unfit(f"both answers to the prompt {text[:40]!r} are {chosen[:40]!r}: a pair has two; leave it out")
    return row


LIKED = {"1": True, "true": True, "good": True, "0": False, "false": False, "bad": False}


def liked(label: Any, text: str) -> bool:
    """Whether an answer was liked, as the column says."""
    found = LIKED.get(str(label).strip().lower())
    if found is None:
        raise Unfit(f"the label of the prompt {text[:40]!r} is {str(label)[:40]!r}; it is one of {', '.join(LIKED)}")
    return found


def by_length(train: Sequence[Values], rows: Sequence[Values]) -> dict[str, Any]:
    """How often the shorter answer (or the longer one, whichever was chosen more often in training) was chosen."""
    shorter = sum((len(chosen) < len(rejected)) - (len(chosen) > len(rejected)) for _, chosen, rejected in train) >= 0
    right = sum(len(chosen) < len(rejected) if shorter else len(chosen) > len(rejected) for _, chosen, rejected in rows)
    return {"preference_accuracy_baseline": right / max(1, len(rows)),
            "baseline": f"the {'shorter' if shorter else 'longer'} answer"}  # fmt: skip
