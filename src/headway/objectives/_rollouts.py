"""Rollouts: answers that a model draws for prompts, and how likely it finds them.

pi(y | x) = prod_t softmax(logits_t / temperature)[y_t], over the ids that may be written. Each answer's randomness is
its prompt's own (`luck`), so that batching changes no answer, and a step that is taken again draws the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import msgspec
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.adapt import bare
from headway.adapt._base import adaptation_of
from headway.data.batches import Batch, padded
from headway.generate.answers import threads
from headway.generate.texts import ids_of
from headway.generate.write import Options, tokens
from headway.loaded import Facts, Loaded
from headway.models import seq2seq
from headway.text import BOS, EOS, PAD, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Prompts(Batch):
    """`valid` is false at padding. `luck`: a number that each prompt's draws are a function of. `texts` and `expected`:
    each prompt as it was given, and what is listed as right for it."""

    ids: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None
    luck: Int[Tensor, " B"]
    texts: tuple[str, ...]
    expected: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What was drawn for B prompts: N answers, equally many for each, one after the other, `ids` with the end.

    Per token: `log_p` under the policy that drew them (None where only that policy learns from them), `reference` under
    the start (None where nothing is to be kept near it), `advantages`; `values` and `returns` where there is a value
    head. `rewards`: per answer.
    """

    prompts: Int[Tensor, "B T"]
    prompts_valid: Bool[Tensor, "B T"] | None
    ids: Int[Tensor, "N U"]
    valid: Bool[Tensor, "N U"]
    rewards: Float[Tensor, " N"]
    log_p: Float[Tensor, "N U"] | None
    reference: Float[Tensor, "N U"] | None
    advantages: Float[Tensor, "N U"] | None = None
    values: Float[Tensor, "N U"] | None = None
    returns: Float[Tensor, "N U"] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a checkpoint."""
        return {f.name: t for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Experience:
        """The way back of `tensors`."""
        return cls(**{"prompts_valid": None, "log_p": None, "reference": None, **tensors})  # type: ignore[arg-type]

    def but(self, **changed: Tensor) -> Experience:
        return replace(self, **changed)  # type: ignore[arg-type]


class Policy:
    """A network as one that writes: a decoder behind its prompts, or an encoder-decoder behind its sources.

    Its weights are taken as they lie, never packed. With dropout it is another one every time: use it within `still`.
    """

    def __init__(self, net: nn.Module, start: Loaded, temperature: float) -> None:
        training = net.training
        self.player = Loaded(net, start.spec, start.source, start.target, facts=facts_of(start))
        net.train(training)  # what is loaded is there to be used, not trained
        self.net: Any = net
        self.temperature = temperature
        never = torch.tensor(self.player.facts.bad, dtype=torch.long)
        self.never = never.to(self.player.device)

    @torch.no_grad()
    def write(self, prompts: Prompts, how: Options, copies: int = 1) -> list[list[int]]:
        """So many answers to each prompt, one after the other, with their ends where they came to one."""
        rows = rows_of(prompts.ids, prompts.valid)
        numbers = [luck * copies + i for luck in prompts.luck.tolist() for i in range(copies)]
        found: list[list[int]] = [[] for _ in numbers]
        with threads(self.player.parameters * len(numbers)):
            for token in tokens(self.player, rows, how, numbers, copies=copies):
                found[token.row].append(token.id)
        return found

    def text(self, ids: Sequence[int]) -> str:
        """What an answer says."""
        ended = [i for i, token in enumerate(ids) if token in self.player.facts.eos]
        said, reader = list(ids[: ended[0]] if ended else ids), self.player.target
        return reader.decode(said) if said and reader is not None else ""

    def states(
        self, prompts: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"] | None, ids: Int[Tensor, "N U"]
    ) -> Float[Tensor, "N U C"]:
        """The hidden states that each token of the answers is said from; the last answers' padding means nothing."""
        copies = len(ids) // len(prompts)
        if isinstance(self.net, seq2seq.Model):
            memory = self.net.encode(prompts, valid)  # once for all answers to it
            seen = None if memory.valid is None else memory.valid.repeat_interleave(copies, 0)
            first = torch.full_like(ids[:, :1], self.player.facts.start)  # type: ignore[arg-type]
            memory = seq2seq.Memory(memory.x.repeat_interleave(copies, 0), seen)
            return self.net.states(torch.cat([first, ids[:, :-1]], 1), memory)
        before = [row for row in rows_of(prompts, valid) for _ in range(copies)]
        longest = self.player.max_tokens  # what is cut is padding: an answer was written within it
        both = [(row + answer[:-1])[:longest] for row, answer in zip(before, ids.tolist(), strict=True)]
        read, there = (t.to(ids.device) for t in padded(both, self.player.padding))
        x = self.net(read, None if bool(there.all()) else there)
        last = torch.tensor([len(row) - 1 for row in before], device=ids.device)[:, None]
        at = (last + torch.arange(ids.shape[1], device=ids.device)).clamp(max=read.shape[1] - 1)
        return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))

    def log_p(
        self, states: Float[Tensor, "N U C"], ids: Int[Tensor, "N U"], valid: Bool[Tensor, "N U"]
    ) -> Float[Tensor, "N U"]:
        """Of each token of the answers; 0 at their padding."""
        head = self.net.head_of(states) if isinstance(self.net, seq2seq.Model) else self.net.head("lm", states)
        logits = (head.float() / self.temperature).index_fill(-1, self.never, float("-inf"))
        return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].masked_fill(~valid, 0.0)


def facts_of(start: Loaded) -> Facts:
    """What writing needs to know; of an encoder-decoder that Headway trained, our own ids, as `search` has them."""
    if start.kind == "seq2seq" and isinstance(start.source, Tokenizer):
        return msgspec.structs.replace(start.facts, start=BOS, eos=(EOS,), bad=(PAD, BOS))
    facts = start.facts
    forced = {"forced_bos": facts.forced_bos, "forced_eos": facts.forced_eos}
    if told := [name for name, value in forced.items() if value is not None]:
        raise ValueError(f"model.load: this checkpoint has tokens that it must write ({told[0]}), which no reward can "
                         "teach: take one without")  # fmt: skip
    if "generate" in facts.globals:
        raise ValueError("model.load: this checkpoint writes with global tokens, which rollouts do not know: take "
                         "one without")  # fmt: skip
    return facts


def prompt_of(start: Loaded, text: str, chat: bool) -> list[int]:
    """The ids of a prompt, as the model reads it when it is used."""
    if isinstance(start.source, Tokenizer):
        if chat:
            raise ValueError("objective.chat: this model has no chat template: leave it out")
        return [*start.encode(text), EOS]
    ids = ids_of(start, text, chat=chat)
    start.check_length(len(ids), text)
    return ids


def rows_of(ids: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"] | None) -> list[list[int]]:
    """Each row's ids without its padding, which stands on the right."""
    if valid is None:
        return ids.tolist()
    return [row[:length] for row, length in zip(ids.tolist(), valid.sum(1).tolist(), strict=True)]


@contextmanager
def start_of(net: nn.Module, start: Loaded | None) -> Iterator[nn.Module]:
    """The network as it was before it learned anything here: without its adapters, or the checkpoint it came from."""
    if adaptation_of(net) is not None and (start is None or adaptation_of(start.net) is None):
        with bare(net):
            yield net
    else:
        assert start is not None
        yield start.net.to(next(net.parameters()).device)


Drawn = tuple[Prompts, Int[Tensor, "N U"], Bool[Tensor, "N U"]]


def drawn(policy: Policy, rows: Sequence[Sequence[int]], how: Options, pad: int, together: int) -> Iterator[Drawn]:
    """One answer to each row of ids, `together` at a time: prompts, the ids that were drawn, and where they are."""
    for first in range(0, len(rows), together):
        part = rows[first : first + together]
        ids, valid = (t.to(policy.player.device) for t in padded(part, pad))
        luck = torch.arange(first, first + len(part))
        batch = Prompts(ids=ids, valid=valid, luck=luck, texts=(), expected=(), tokens=0, targets=0)
        said, there = padded(policy.write(batch, how), pad)
        yield batch, said.to(ids.device), there.to(ids.device)


@contextmanager
def still(net: nn.Module) -> Iterator[None]:
    """Without dropout, so that the policy that is weighed is the one that wrote."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)
