"""Names: which rows of which published linear are which rows of ours, by the family's weight rules.

What is one linear there may be two here (GPT-2's c_attn), and the other way round (keys and values; gate and up).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headway.adapt import _int8
from headway.adapt._base import own_class
from headway.families import Published
from headway.families._export import published_form
from headway.loaded import Loaded

TASKS = {"lm": "CAUSAL_LM", "classify": "SEQ_CLS", "tokens": "TOKEN_CLS", "spans": "QUESTION_ANS"}


class Piece(NamedTuple):
    """Rows `begin` to `end` of a module of ours are those of theirs from row `to` on."""

    theirs: str
    ours: str
    begin: int
    end: int
    to: int

    @property
    def rows(self) -> slice:
        """Of theirs."""
        return slice(self.to, self.to + self.end - self.begin)


class Run(NamedTuple):
    """Rows of one of our adapters, from `begin` on, and the piece of theirs that they stand for."""

    adapter: Any
    piece: Piece
    begin: int

    @property
    def rows(self) -> slice:
        """Of the adapter."""
        return slice(self.begin, self.begin + self.piece.end - self.piece.begin)


class Names:
    """Both names of what a model has. `weights`, `biases`: of its linears, and of all that has a bias; `tensors`: ours
    of theirs, where one is one."""

    def __init__(self, model: Loaded, net: nn.Module) -> None:
        if not isinstance(model, Loaded):
            raise ValueError("peft: names are translated by a loaded model's family: give the model, not its network")
        found, config, spec = published_form(model)
        self.net, self.spec, self.kind = net, spec, spec["kind"]
        self.modules = dict(net.named_modules())
        only_body = not set(spec.get("heads", {})) - {"pool"}
        self.prefix = found.prefix if only_body and config["architectures"][0].endswith("Model") else ""
        self.root = found.prefix
        self.transposed = any(rule.transpose for rule in found.rules)
        self.weights = list(self._pieces(found, ".weight", is_linear))
        self.biases = list(self._pieces(found, ".bias", lambda module: module.bias is not None))
        self.tensors = {
            self._shown(rule.theirs[0]): rule.ours[0]
            for rule in reversed(found.rules)
            if len(rule.ours) == len(rule.theirs) == 1 and not rule.transpose and rule.shape is None
        }

    @property
    def task(self) -> str:
        """PEFT's word for what the model does."""
        if self.kind == "seq2seq":
            return "SEQ_2_SEQ_LM"
        heads = [head for head in TASKS if head in self.spec["heads"] and (head != "lm" or self.kind == "decoder")]
        return TASKS[heads[0]] if heads else "FEATURE_EXTRACTION"

    def _shown(self, theirs: str) -> str:
        return theirs.removeprefix(self.prefix)

    def _pieces(self, found: Published, ending: str, fits: Callable[[Any], bool]) -> Iterator[Piece]:
        told: set[str] = set()
        for rule in found.rules:
            ours, theirs = [[n.removesuffix(ending) for n in names] for names in (rule.ours, rule.theirs)]
            if not ours or not all(n.endswith(ending) for n in rule.ours) or told & set(ours):
                continue
            modules = [self.modules[name] for name in ours]
            if not all(hasattr(module, ending[1:]) and fits(module) for module in modules):
                continue
            told.update(ours)
            rows = [len(_tensor(module, ending)) for module in modules]
            if len(theirs) == 1:
                starts = [0, *accumulate(rows)]
                for name, count, at in zip(ours, rows, starts, strict=False):
                    yield Piece(self._shown(theirs[0]), name, 0, count, at)
            else:
                each = rows[0] // len(theirs)
                for i, name in enumerate(theirs):
                    yield Piece(self._shown(name), ours[0], i * each, (i + 1) * each, 0)

    def known(self, theirs: str, among: list[Piece]) -> list[Piece]:
        """What a module of theirs is here, by its name with or without the prefix of the family's body."""
        names = {theirs, self._shown(theirs), self.root + theirs}
        return [piece for piece in among if piece.theirs in names]

    def ours(self, theirs: str) -> str | None:
        """Our name of a tensor of theirs that is one here; None where there is none."""
        names = (theirs, self._shown(theirs), self.root + theirs)
        return next((self.tensors[name] for name in names if name in self.tensors), None)

    def theirs(self, ours: str) -> str:
        """The way back."""
        found = next((theirs for theirs, name in self.tensors.items() if name == ours), None)
        if found is None:
            raise ValueError(f"peft: {ours} has no published name of its own: save with format='headway'")
        return found

    def runs(self, adapter: Any, module: str, among: list[Piece]) -> list[Run]:
        """All that one of our adapters stands for."""
        whole = self.modules[module]
        outputs = adapter.outputs or slice(0, len(_tensor(whole, ".bias" if not is_linear(whole) else ".weight")))
        found = []
        for piece in among:
            low, high = max(outputs.start, piece.begin), min(outputs.stop, piece.end)
            if piece.ours == module and low < high:
                part = piece._replace(begin=low, end=high, to=piece.to + low - piece.begin)
                found.append(Run(adapter, part, low - outputs.start))
        if not found:
            raise ValueError(f"peft: {module} has no published name: save with format='headway'")
        return found

    def rows_of(self, pieces: list[Piece], of: Callable[[Any], Tensor]) -> Tensor:
        """What is theirs, put together of rows of ours: `of` a module."""
        ordered = sorted(pieces, key=lambda piece: piece.to)
        return torch.cat([of(self.modules[piece.ours])[piece.begin : piece.end] for piece in ordered])


def is_linear(module: Any) -> bool:
    return own_class(module) in (nn.Linear, _int8.RoundedLinear)


def _tensor(module: Any, ending: str) -> Tensor:
    return _int8.weight_of(module) if ending == ".weight" else module.bias
