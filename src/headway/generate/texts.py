"""Texts: prompts become ids, ids become text as they are written, and a stop string ends it where it begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from headway.generate.answers import Generation, threads
from headway.generate.write import Options, Written, beams, tokens
from headway.loaded import Loaded, follow
from headway.spec import convert
from headway.vocabulary import PublishedTokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]  # a text, messages of a chat, or ids
UNFINISHED = "\ufffd"  # what half a character decodes to


class Text:
    """The text of one row, as far as it is certain: half a character and what may begin a stop string wait.

    Without a tokenizer there are ids alone, and the text is empty.
    """

    def __init__(self, tokenizer: PublishedTokenizer | None, stop: tuple[str, ...], before: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop, self.before = tokenizer, stop, list(before[-8:])
        self.ids: list[int] = []
        self.log_probabilities: list[float] = []
        self.given, self.text, self.stopped = 0, "", False
        self.lead = len(self._decode(self.before))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids) if ids and self.tokenizer is not None else ""

    def add(self, id: int, log_probability: float, ended: bool) -> str:
        """Takes one token; returns what may be shown now."""
        self.keep(id, log_probability, ended)
        self.read()
        found = [at for text in self.stop if (at := self.text.find(text)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return self._show(self.text if ended or self.stopped else self._certain())

    def keep(self, id: int, log_probability: float, ended: bool) -> None:
        """Takes one token without reading it, where nobody watches and nothing stops it; `read` at the end."""
        self.log_probabilities.append(log_probability)
        if not ended:
            self.ids.append(id)

    def read(self) -> None:
        """The text of what was kept."""
        self.text = self._decode(self.before + self.ids)[self.lead :]  # with what came before: spaces depend on it

    def rest(self) -> str:
        """What waited, once nothing more comes."""
        return self._show(self.text)

    def _certain(self) -> str:
        sure = self.text.rstrip(UNFINISHED)
        for text in self.stop:
            for length in range(min(len(text) - 1, len(sure)), 0, -1):
                if sure.endswith(text[:length]):
                    sure = sure[:-length]
                    break
        return sure

    def _show(self, text: str) -> str:
        new, self.given = text[self.given :], max(self.given, len(text))
        return new


def options(given: Mapping[str, Any]) -> Options:
    """Checked options; `max_tokens` and `stop` as people write them."""
    named = {("tokens" if key == "max_tokens" else key): value for key, value in given.items() if value is not None}
    if isinstance(named.get("stop"), str):
        named["stop"] = (named["stop"],)
    return convert(named, Options, "generate")


def generate(
    model: Loaded,
    prompts: Sequence[Prompt],
    how: Options,
    *,
    chat: bool = False,
    task: str | None = None,
    batch: int = 8,
    first: int = 0,
) -> list[Generation]:
    """One text for each prompt, in order; batching changes no answer. `first`: the number of the first prompt, where
    they are a part of more, for each one's randomness."""
    if isinstance(prompts, str):
        raise ValueError(f"generate takes a list of prompts, not one: generate([{prompts[:40]!r}])")
    if batch < 1:
        raise ValueError(f"generate: batch is how many prompts go together, 1 or more, not {batch}")
    rows = [ids_of(model, prompt, chat=chat, task=task) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, Generation] = {}
    for group in (order[i : i + batch] for i in range(0, len(order), batch)):
        if follow(model.net, group, anew=True) and how.beams > 1:
            raise ValueError("generate: beams change places, and adapters chosen by rows= do not: leave out beams")
        with threads(model.parameters * how.beams * len(group)):
            if how.beams > 1:
                answers = beams(model, [rows[i] for i in group], how)
                found |= {i: _whole(model, rows[i], answer, how) for i, answer in zip(group, answers, strict=True)}
            else:
                found |= zip(
                    group, _rows(model, [rows[i] for i in group], how, [first + i for i in group]), strict=True
                )
    return [found[i] for i in range(len(rows))]


def stream(
    model: Loaded, prompt: Prompt, how: Options, *, chat: bool = False, task: str | None = None
) -> Iterator[str]:
    """The text of one prompt, in pieces as they are written."""
    if how.beams > 1:
        raise ValueError("stream: beams decide at the end, so there is nothing to show before: leave out beams")
    ids = ids_of(model, prompt, chat=chat, task=task)
    text = _text(model, ids, how)
    writing = tokens(model, [ids], how)
    for token in writing:
        if piece := text.add(token.id, token.log_probability, token.ended):
            yield piece
        if text.stopped:
            writing.close()
            return
    if piece := text.rest():
        yield piece


def ids_of(model: Loaded, prompt: Any, *, chat: bool = False, task: str | None = None) -> list[int]:
    """The ids of a prompt: `chat` puts it into the checkpoint's template, `task` puts the task's prefix before it."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt and isinstance(prompt[0], int):
        if chat or task is not None:
            raise ValueError("generate: chat and task are for texts, and this prompt is ids: leave them out")
        return [int(i) for i in prompt]  # type: ignore[arg-type]
    if task is not None:
        if task not in model.facts.prefixes or not isinstance(prompt, str):
            there = ", ".join(model.facts.prefixes) or "none"
            raise ValueError(f"generate: no prefix for the task '{task}'; this checkpoint names {there}")
        prompt = model.facts.prefixes[task] + prompt
    if not isinstance(prompt, str) and not (
        isinstance(prompt, Sequence) and all(isinstance(m, Mapping) for m in prompt)
    ):
        raise ValueError(f"generate: a prompt is a text, messages of a chat, or ids, not {prompt!r:.60}")
    if chat or not isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return model.tokenizer.chat_ids(messages)
    if not prompt:
        raise ValueError("cannot go on from an empty prompt: give at least one character")
    ids = model.tokenizer.encode(prompt).ids
    if model.kind == "decoder" and len(ids) > 1 and ids[-1] in model.facts.eos:
        ids = ids[:-1]  # a prompt is not at its end
    return ids


def _text(model: Loaded, prompt: Sequence[int], how: Options) -> Text:
    if model.source is None and how.stop:
        raise ValueError("generate: stop strings are looked for in the text, and this model came without a tokenizer")
    return Text(None if model.source is None else model.tokenizer, how.stop, prompt if model.kind == "decoder" else ())


def _rows(model: Loaded, rows: list[list[int]], how: Options, numbers: Sequence[int]) -> list[Generation]:
    texts = [_text(model, row, how) for row in rows]
    finish: list[Literal["end", "stop", "limit"]] = ["limit"] * len(rows)
    writing, stopped = tokens(model, rows, how, numbers), set[int]()
    token = next(writing, None)
    while token is not None:
        text = texts[token.row]
        take = text.add if how.stop else text.keep
        take(token.id, token.log_probability, token.ended)
        if token.ended or text.stopped:
            finish[token.row] = "end" if token.ended else "stop"
            stopped.add(token.row)
        try:
            token = writing.send(stopped)
        except StopIteration:
            break
    for text in texts if not how.stop else []:
        text.read()
    return [
        Generation(t.text, t.ids, _pieces(model, t.ids), sum(t.log_probabilities), tuple(t.log_probabilities), why)
        for t, why in zip(texts, finish, strict=True)
    ]


def _whole(model: Loaded, prompt: Sequence[int], found: Written, how: Options) -> Generation:
    text = _text(model, prompt, how)
    for id in found.ids:
        text.add(id, 0.0, False)
        if text.stopped:
            break
    why: Literal["end", "stop", "limit"] = "stop" if text.stopped else "end" if found.ended else "limit"
    return Generation(text.text, text.ids, _pieces(model, text.ids), sum(found.log_probabilities), (), why)


def _pieces(model: Loaded, ids: list[int]) -> list[str]:
    return model.tokenizer.tokens(ids) if model.source is not None else []
