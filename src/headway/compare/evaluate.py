"""Evaluate: what a model does that is only asked: zero- and few-shot prompting as a measured baseline (2005.14165).

Options are scored by log p(option | prompt), as it is or divided by the option's tokens or bytes; or the model writes,
and a pattern finds its answer. The prompt is read once for all its options.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from msgspec import Meta
from torch import Tensor

from headway import recipe as recipes
from headway.data.batches import padded
from headway.data.sources import DataSpec, Splits, Values, fewer, load_splits
from headway.generate.answers import threads
from headway.generate.texts import generate, ids_of, options
from headway.generate.writer import writer_of
from headway.loaded import Loaded
from headway.spec import Size, Strict, convert, nearest, override

COLUMNS = (
    "input",
    "target",
    "text",
    "second",
    "label",
    "question",
    "context",
    "answer",
    "prompt",
    "chosen",
    "rejected",
)
MOST = 100  # options that training rows may come to, where none are listed
TOGETHER = 8  # prompts of a batch
BUILT_IN: dict[str, dict[str, Any]] = {
    "packages": {
        "name": "packages",
        "title": "Which package of Python's library a docstring is from: prompted, where sentiment learns it",
        "data": {"source": "passages", "held_out": 15},
        "prompt": "Documentation: {text}\nQuestion: Which package of Python's standard library is this from?\nAnswer:",
        "answer": "{label}",
        "limit": 100,
    }
}


class Task(Strict, frozen=True):
    """What is asked, and what is right. `prompt`, `answer` and `options` are templates: {text} is the row's column of
    that role in `data` (text, label, question, ...). `options`: what can be answered; by default every answer of the
    training rows. `before`: what stands between a prompt and its answer, unless in a chat.

    score: by "likelihood" of the options, or by what the model is to "generate": of its text, at most `tokens`, ended
    by any of `stop`, what `pattern` finds (its first group, or all of it) has to be the answer. normalize: whether an
    option's log-probability is divided by its length, and in what.

    shots: examples before each prompt, training rows drawn by `seed`, the same for all, with `between` them. system:
    what comes first. chat: the checkpoint's template, each example a turn. limit: so many held-out rows.
    """

    data: DataSpec
    prompt: str
    answer: str
    name: str = "task"
    title: str = ""
    options: tuple[str, ...] = ()
    before: str = " "
    score: Literal["likelihood", "generate"] = "likelihood"
    normalize: Literal["none", "tokens", "bytes"] = "none"
    pattern: str | None = None
    tokens: Size = 32
    stop: tuple[str, ...] = ()
    shots: Annotated[int, Meta(ge=0, le=1000)] = 0
    between: str = "\n\n"
    system: str = ""
    chat: bool = False
    limit: Annotated[int, Meta(ge=1)] | None = None
    seed: Annotated[int, Meta(ge=0, lt=2**53)] = 0

    def __post_init__(self) -> None:
        for key, text in (
            ("prompt", self.prompt),
            ("answer", self.answer),
            *(("options", one) for one in self.options),
        ):
            named(text, key)
        if not named(self.prompt, "prompt"):
            raise ValueError(f"prompt: {self.prompt[:40]!r} names no column, so every row would ask the same: {{text}}")
        writes = {"pattern": self.pattern, "stop": self.stop}
        if self.score == "likelihood" and (told := [key for key, value in writes.items() if value]):
            raise ValueError(f"{told[0]}: is for score: generate, and options are scored by likelihood: leave it out")
        if self.score == "generate" and (self.options or self.normalize != "none"):
            raise ValueError("options and normalize are for score: likelihood, and this task generates: leave them out")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern: {self.pattern!r} is no regular expression ({error})") from None


def named(template: str, key: str) -> list[str]:
    """The columns that a template names."""
    try:
        parts = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"{key}: {template[:40]!r} is no template ({error}); a brace of its own is {{{{ or }}}}"
        ) from None
    for name, spec, how in parts:
        if name not in COLUMNS or spec or how:
            raise ValueError(f"{key}: no column {{{name}}}{nearest(name, COLUMNS)}; there is {', '.join(COLUMNS)}")
    return list(dict.fromkeys(name for name, _, _ in parts))


def read_task(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Task:
    """A task from a built-in name, a YAML file or a dict, with `overrides` such as "shots=4"."""
    if isinstance(source, str) and source in BUILT_IN:
        data, where = BUILT_IN[source], f"task {source}"
    elif isinstance(source, dict):
        data, where = source, "task"
    elif Path(source).is_file():
        data, where = recipes.parse(Path(source))
    else:
        near = nearest(str(source), BUILT_IN)
        raise ValueError(f"no task '{source}': neither a file nor built in ({', '.join(BUILT_IN)}){near}")
    for assignment in overrides:
        data = override(data, assignment)
    return convert(data, Task, where)


class Question(NamedTuple):
    """`ids`: the prompt as it is sent; `options`: their texts, and `said`, the ids of each; `right`: the answer."""

    ids: list[int]
    options: tuple[str, ...]
    said: tuple[list[int], ...]
    right: str


class Evaluated(NamedTuple):
    """`answers`: what was chosen or found for each question ("" where the pattern found nothing), `wanted` what is
    right. `chance`: accuracy of guessing; `commonest`: of always saying the commonest answer of the training rows."""

    accuracy: float
    error: float
    chance: float
    commonest: float
    rows: int
    unmatched: int
    prompt_tokens: float
    answers: list[str]
    wanted: list[str]

    def record(self) -> dict[str, Any]:
        """The figures alone."""
        return {key: value for key, value in self._asdict().items() if key not in ("answers", "wanted")}


def evaluate(
    model: Loaded,
    task: str | Path | dict[str, Any] | Task,
    *,
    batch: int = TOGETHER,
    show: Callable[[str, Question], None] = lambda text, question: None,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluated:
    """Asks a model the held-out rows of a task. `show` is given each prompt exactly as it is sent, specials included,
    before anything is scored; `watch(done, total)` hears of progress, in questions."""
    task = task if isinstance(task, Task) else read_task(task)
    questions, common = asked(model, task)
    for question in questions:
        show(model.tokenizer.decode(question.ids, specials=True), question)
    model.pack()
    answers: list[str] = []
    for first in range(0, len(questions), batch):
        part = questions[first : first + batch]
        answers += _chosen(model, task, part) if task.score == "likelihood" else _written(model, task, part)
        watch(len(answers), len(questions))
    wanted = [question.right for question in questions]
    right = [answer == good for answer, good in zip(answers, wanted, strict=True)]
    share = sum(right) / len(right)
    guess = sum(1 / len(q.options) for q in questions if q.options) / len(questions)
    return Evaluated(
        accuracy=share,
        error=math.sqrt(share * (1 - share) / len(right)),
        chance=guess,
        commonest=wanted.count(common) / len(wanted),
        rows=len(questions),
        unmatched=answers.count("") if task.score == "generate" else 0,
        prompt_tokens=sum(len(q.ids) for q in questions) / len(questions),
        answers=answers,
        wanted=wanted,
    )


def asked(model: Loaded, task: Task) -> tuple[list[Question], str]:
    """The questions of a task, as this model is asked them, and the commonest answer of the training rows."""
    if model.kind != "decoder" and (task.score == "likelihood" or task.chat):
        raise ValueError(f"evaluate: options and chats are for a decoder, and this is a {model.kind}: take one, or set "
                         "score: generate without chat")  # fmt: skip
    templates = (("prompt", task.prompt), ("answer", task.answer), *(("options", one) for one in task.options))
    roles = list(dict.fromkeys(name for key, text in templates for name in named(text, key)))
    splits = load_splits(task.data, roles)
    rows = fewer(splits.test or splits.valid, task.limit)
    if not rows:
        raise ValueError(f"{task.data.source}: no row is held out to be asked: give more, or raise data.held_out")
    filled: Callable[[str, Values], str] = lambda text, row: text.format_map(
        dict(zip(roles, map(str, row), strict=True))
    )
    answer: Callable[[Values], str] = lambda row: (
        filled(task.answer, row).strip() if task.score == "generate" else filled(task.answer, row)
    )
    common = Counter(map(answer, splits.train))
    listed = task.options or (_listed(common) if task.score == "likelihood" else ())
    shots = [(filled(task.prompt, row), filled(task.answer, row)) for row in _shots(task, splits)]
    found = []
    for number, row in enumerate(rows):
        texts = tuple(filled(one, row) for one in listed)
        right = answer(row)
        if texts and (right not in texts or len(set(texts)) < len(texts)):
            raise ValueError(f"question {number}: the answer {right[:40]!r} has to be one of its options, all of them "
                             f"different: {', '.join(texts)[:80]}")  # fmt: skip
        found.append(_question(model, task, shots, filled(task.prompt, row), texts, right, number))
    return found, common.most_common(1)[0][0]


def _listed(answers: Mapping[str, int]) -> tuple[str, ...]:
    if not 2 <= len(answers) <= MOST:
        raise ValueError(f"options: the training rows have {len(answers)} different answers, and 2 to {MOST} can be "
                         "scored: list options, or set score: generate")  # fmt: skip
    return tuple(sorted(answers))


def _shots(task: Task, splits: Splits) -> list[Values]:
    if task.shots > len(splits.train):
        raise ValueError(f"shots: {task.shots} examples are asked for, and there are {len(splits.train)} training rows")
    chosen = random.Random(task.seed).sample(range(len(splits.train)), task.shots)
    return [splits.train[i] for i in chosen]


def _question(
    model: Loaded,
    task: Task,
    shots: list[tuple[str, str]],
    prompt: str,
    texts: tuple[str, ...],
    right: str,
    number: int,
) -> Question:
    if task.chat:
        messages = [{"role": "system", "content": task.system}] if task.system else []
        for asks, says in shots:
            messages += [{"role": "user", "content": asks}, {"role": "assistant", "content": says}]
        ids = model.tokenizer.chat_ids([*messages, {"role": "user", "content": prompt}])
        said = tuple(model.tokenizer.encode(text, specials=False).ids for text in texts)
    else:
        before = [task.system] if task.system else []
        whole = task.between.join([*before, *(f"{asks}{task.before}{says}" for asks, says in shots), prompt])
        ids, said = split(model, whole, [f"{task.before}{text}" for text in texts])
    longest = len(ids) + max(map(len, said), default=task.tokens if model.kind == "decoder" else 0)
    if model.max_tokens is not None and longest > model.max_tokens:
        raise ValueError(f"question {number}: its prompt and answer have {longest} tokens, and this model takes "
                         f"{model.max_tokens}: give fewer shots, or shorter rows")  # fmt: skip
    if empty := [text for text, one in zip(texts, said, strict=True) if not one]:
        raise ValueError(f"question {number}: the option {empty[0]!r} has no tokens: give at least one character")
    return Question(ids, texts, said, right)


def split(model: Loaded, prompt: str, options: Sequence[str]) -> tuple[list[int], tuple[list[int], ...]]:
    """Ids of a prompt, and of what each option adds, where a token may reach over the seam: then it is the option's."""
    ids = ids_of(model, prompt)
    both = [ids_of(model, prompt + option) for option in options]
    kept = min([len(ids), *(_common(ids, whole) for whole in both)])
    if not kept:
        raise ValueError(f"the prompt {prompt[:40]!r} has no token of its own before its options: make it longer")
    return ids[:kept], tuple(whole[kept:] for whole in both)


def _common(one: list[int], other: list[int]) -> int:
    return next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def likelihoods(model: Loaded, questions: Sequence[Question]) -> list[Float[Tensor, " O"]]:
    """log p(option | prompt) of each question's options, in nats. Batching changes nothing."""
    said = [ids for question in questions for ids in question.said]
    rows = torch.tensor([i for i, question in enumerate(questions) for _ in question.said], device=model.device)
    ids, there = (t.to(model.device) for t in padded(said, model.padding))
    with threads(model.parameters * len(said)):
        writer = writer_of(model, [question.ids for question in questions], ids.shape[1])
        log_p = writer.first().float().log_softmax(-1)[rows]
        writer.keep(rows)
        total = torch.zeros(len(said), device=model.device)
        for at in range(ids.shape[1]):
            total += log_p.gather(1, ids[:, at, None])[:, 0].masked_fill(~there[:, at], 0.0)
            if at + 1 < ids.shape[1]:
                log_p = writer.next(ids[:, at]).float().log_softmax(-1)
    return list(total.split([len(question.said) for question in questions]))


def _chosen(model: Loaded, task: Task, questions: Sequence[Question]) -> list[str]:
    found = []
    for question, scores in zip(questions, likelihoods(model, questions), strict=True):
        lengths = {
            "none": [1] * len(question.said),
            "tokens": [len(ids) for ids in question.said],
            "bytes": [len(text.encode()) for text in question.options],
        }[task.normalize]
        found.append(question.options[int((scores.cpu() / torch.tensor(lengths)).argmax())])
    return found


def _written(model: Loaded, task: Task, questions: Sequence[Question]) -> list[str]:
    how = options({"max_tokens": task.tokens, "stop": task.stop or None})
    texts = generate(model, [question.ids for question in questions], how, batch=len(questions))
    return [matched(text.text, task.pattern) for text in texts]


def matched(text: str, pattern: str | None) -> str:
    """What a pattern finds in a text: its first group, or all of it; the whole text where there is none."""
    if pattern is None:
        return text.strip()
    found = re.search(pattern, text)
    return "" if found is None else (found[1] if found.re.groups else found[0] or "").strip()
