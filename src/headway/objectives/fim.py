"""Fill in the middle: a decoder learns to write what stands between a beginning and an end (2207.14255).

PSM: <fim_prefix> P <fim_suffix> S <fim_middle> M <eos>. SPM: <fim_prefix> <fim_suffix> S <fim_middle> P M <eos>.
M begins and ends anywhere among the characters, so that words are cut as a cursor cuts them. All is predicted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from headway.data.examples import Example
from headway.data.sources import Values
from headway.generate.write import Options, tokens
from headway.hub import Loaded
from headway.objectives import Score, causal, empty
from headway.objectives._tokens import Tokens, rows_of
from headway.objectives._tools import Tools
from headway.recipe import Recipe
from headway.text import UNK

MARKS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
BROKEN = "\ufffd"  # half a character, where a piece of a long text begins or ends
SPARE = 8  # tokens that a text may grow by where it is cut inside of words
LINES, TOGETHER = 200, 16  # that are completed in the test, and how many at a time


class Gap(NamedTuple):
    """A line of a file, with what stands before and after it; the line breaks go with what is behind them, as they do
    in the tokens of a text that nobody cut."""

    before: str
    line: str
    after: str


class Objective(causal.Objective):
    """`rate`: the share of texts that are rearranged; `spm`: of those, in the order suffix, prefix, middle; `pack`:
    whether short texts share a row."""

    EXTRA = MARKS

    def __init__(self, rate: float = 0.5, spm: float = 0.5, pack: bool = True) -> None:
        super().__init__(pack)
        if not 0 <= rate <= 1 or not 0 <= spm <= 1:
            raise ValueError(f"objective.rate and spm are shares from 0 to 1, not {rate} and {spm}")
        self.rate, self.spm = rate, spm

    def ready(self, tools: Tools) -> None:
        if tools.max_tokens < 4 * SPARE:
            raise ValueError(f"max_tokens={tools.max_tokens} is too short to fill a gap in: give {4 * SPARE} or more")
        self.tools, self.room = tools, tools.max_tokens + 1  # the last token is predicted, and not read
        self.prefix, self.suffix, self.middle = (tools.extra[name] for name in MARKS)
        begin = tools.bos if tools.bos is not None else tools.eos
        self.opening = [] if begin is None else [begin]

    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        """Pieces of the text, bare, and whether each is the first, the last, and may be rearranged."""
        ids = tools.ids(row[0])
        if not ids:
            raise empty(row[0])
        exact = tools.text(ids) == row[0]
        if not exact and UNK not in ids:
            raise ValueError(f"{row[0][:40]!r} is not what this tokenizer gives back, so no gap fits it: use bpe")
        length = self.room - len(self.opening) - len(MARKS) - 1 - SPARE
        for start in range(0, len(ids), length):
            yield ids[start : start + length], (start == 0, start + length >= len(ids), exact)

    def sizes(self, example: Example) -> tuple[int, ...]:
        return (len(example[0]) + len(self.opening) + len(MARKS) + SPARE,)  # at most

    def collate(self, examples: Sequence[Sequence[Example]], random: np.random.Generator) -> Tokens:
        made = [[self.arrange(example, random) for example in row] for row in examples]
        return rows_of([[(ids[:-1], ids[1:]) for ids in row] for row in made], 0)

    def arrange(self, example: Example, random: np.random.Generator) -> list[int]:
        """The ids of a piece with its ends, perhaps rearranged."""
        ids, (first, last, exact) = [int(i) for i in example[0]], example[1]
        begin = self.opening if first else []
        turn, order, *cuts = random.random(4)
        text = self.tools.text(ids) if exact and turn < self.rate else BROKEN
        if BROKEN not in text:
            one, two = sorted(int(cut * (len(text) + 1)) for cut in cuts)
            before, middle, after = (self.tools.ids(part) for part in (text[:one], text[one:two], text[two:]))
            made = [*begin, *self.ordered(before, middle, after, bool(order < self.spm))]
            if len(made) <= self.room:
                return made
        return [*begin, *ids, *([self.tools.end] if last or len(begin) + len(ids) < 2 else [])]

    def ordered(self, before: list[int], middle: list[int], after: list[int], spm: bool = False) -> list[int]:
        """The three parts behind their marks, and the end."""
        if spm:
            return [self.prefix, self.suffix, *after, self.middle, *before, *middle, self.tools.end]
        return [self.prefix, *before, self.suffix, *after, self.middle, *middle, self.tools.end]

    @torch.inference_mode()
    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """Bits per byte, and lines of held-out files completed exactly, from both sides and from the left alone."""
        found = causal.Objective(self.pack).score(model, rows, tools, recipe)
        gaps = lines(rows, min(LINES, recipe.test_limit or LINES))
        if not gaps:
            return found
        prompts = [self.prompt(gap) for gap in gaps]
        left = [[*self.opening, *prefix[-self.room // 2 :]] for prefix in (tools.ids(gap.before) for gap in gaps)]
        shares = {
            "exact_lines": right(gaps, written(model, prompts, tools)),
            "exact_lines_left_alone": right(gaps, written(model, left, tools)),
            "completed_lines": len(gaps),
        }
        return Score({**found.metrics, **shares})

    def baseline(self, train: Sequence[Values], rows: Sequence[Values], recipe: Recipe) -> dict[str, Any]:
        """Compressors, and lines completed by what followed the line before: earlier in the file, or most often."""
        found, gaps = super().baseline(train, rows, recipe), lines(rows, min(LINES, recipe.test_limit or LINES))
        if not gaps:
            return found
        often: dict[str, Counter[str]] = {}
        for row in train:
            text = row[0].split("\n")
            for one, behind in pairwise(text):
                often.setdefault(one, Counter())[behind] += 1
        return {**found, "exact_lines_baseline": right(gaps, [followed(gap, often) for gap in gaps])}

    def prompt(self, gap: Gap) -> list[int]:
        """What the model is to go on from, in PSM: a third of its room before the gap, a third behind it."""
        side = self.room // 3
        before, after = self.tools.ids(gap.before)[-side:], self.tools.ids(gap.after)[:side]
        return [*self.opening, *self.ordered(before, [], after)[:-1]]


def lines(rows: Sequence[Values], count: int) -> list[Gap]:
    """Lines to complete, chosen by hash: of 8 letters or more, with ten lines before them and five behind."""
    found = []
    for row in rows:
        text = row[0].split("\n")
        for i in range(10, len(text) - 5):
            if sum(c.isalnum() for c in text[i]) >= 8:
                key = hashlib.sha256("\n".join(text[i - 10 : i + 5]).encode()).digest()
                found.append((key, row[0], i))
    gaps = []
    for _, text, i in sorted(found)[:count]:
        parts = text.split("\n")
        gaps.append(Gap("\n".join(parts[:i]), parts[i], "\n" + "\n".join(parts[i + 1 :])))
    return gaps


def written(model: Loaded, prompts: Sequence[list[int]], tools: Tools) -> Iterator[str]:
    """What the model writes, greedily, up to the end of the next line."""
    for start in range(0, len(prompts), TOGETHER):
        group = prompts[start : start + TOGETHER]
        rows: list[list[int]] = [[] for _ in group]
        writing, done = tokens(model, group, Options(tokens=48)), set[int]()
        token = next(writing, None)
        while token is not None:
            if not token.ended:
                rows[token.row].append(token.id)
                if "\n" in tools.text(rows[token.row])[1:]:
                    done.add(token.row)
            try:
                token = writing.send(done)
            except StopIteration:
                break
        yield from (tools.text(row).removeprefix("\n").split("\n")[0] for row in rows)


def followed(gap: Gap, often: Mapping[str, Counter[str]]) -> str:
    """What followed the line before where it last stood earlier in the file, or else most often elsewhere."""
    said = gap.before.split("\n")
    for i in range(len(said) - 2, -1, -1):
        if said[i] == said[-1]:
            return said[i + 1]
    known = often.get(said[-1])
    return known.most_common(1)[0][0] if known else ""


def right(gaps: Sequence[Gap], answers: Iterable[str]) -> float:
    """The share of lines that are exactly what stood there."""
    return sum(gap.line.rstrip() == answer.rstrip() for gap, answer in zip(gaps, answers, strict=True)) / len(gaps)
