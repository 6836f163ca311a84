"""Loaded: a network with all that using it needs: spec, facts, tokenizers, what its pictures look like.

It turns texts into ids, and gives the raw tensors behind everything else: `hidden` and `logits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway import __version__
from headway.image import ImageSpec
from headway.mask import Mask
from headway.models import reads_pictures, seq2seq
from headway.quantize import is_prepared, mix_for, packs, prepare, restore
from headway.spec import Strict
from headway.store import write_folder
from headway.text import UNK, Tokenizer
from headway.vocabulary import PublishedTokenizer

MAX_TOKENS = 2**24  # the longest text any model here may claim to take


def follow(net: nn.Module, rows: Sequence[int], *, anew: bool = False) -> bool:
    """Says which rows the batches to come have, of all inputs (`anew`) or of the batch before: where each input has an
    adapter of its own, they go with them. Returns whether each has."""
    known = vars(net).get("adaptation")  # `headway.adapt` stands above, and knows what to do
    return known is not None and known.follow(rows, anew)


class Facts(Strict, frozen=True):
    """What using a model needs to know besides its spec.

    family, type: whose published checkpoints it is like. max_tokens: the longest input, in tokens. bos, eos, pad: ids;
    `eos` may be several. start: what a decoder begins with; forced_bos, forced_eos: what it must write first, and last.
    bad: ids that are never written. pooling: how `embed` makes one vector of many ("mean", "first", "last", "pool" for
    the head of that name); normalize: whether it is scaled to length one. prefixes: what inputs begin with, by task.
    generation: the checkpoint's own defaults. globals: the tokens that see and are seen by all (2004.05150) in the task
    of a head, or to "generate": the first one, or all before the first with this id. lowercase: it learned from lower
    case alone. original: harmless fields of the configuration it came with, for the way back.
    """

    family: str = ""
    type: str = ""
    max_tokens: int | None = None
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    start: int | None = None
    forced_bos: int | None = None
    forced_eos: int | None = None
    bad: tuple[int, ...] = ()
    pooling: str | None = None
    normalize: bool = False
    prefixes: dict[str, str] = {}
    generation: dict[str, Any] = {}
    globals: dict[str, Literal["first"] | int] = {}
    lowercase: bool = False
    original: dict[str, Any] = {}


class Inputs(NamedTuple):
    """A batch of texts: padded on the right; `valid` is None where nothing is padding, `types` where none differ."""

    ids: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None
    types: Int[Tensor, "B T"] | None


class Loaded:
    """A network with its tokenizers, ready to use. `source` reads what goes in, `target` what comes out."""

    def __init__(
        self,
        net: nn.Module,
        spec: dict[str, Any],
        source: Tokenizer | PublishedTokenizer | None = None,
        target: Tokenizer | PublishedTokenizer | None = None,
        *,
        facts: Facts | None = None,
        image: ImageSpec | None = None,
        max_tokens: int | None = None,
        lowercase: bool | None = None,
    ) -> None:
        self.net: Any = net.eval()
        self._parameters = sum(p.numel() for p in net.parameters())  # counted before they may be packed
        self.spec, self.image = spec, image
        self.origin = ""  # what it was loaded from
        self.source, self.target = source, target if target is not None else source
        given = {"max_tokens": max_tokens, "lowercase": lowercase}
        told = {key: value for key, value in given.items() if value is not None}
        self.facts = msgspec.structs.replace(facts or Facts(), **told)

    @property
    def kind(self) -> str:
        """encoder, decoder, seq2seq, vision, convnet or dual."""
        return self.spec["kind"]

    @property
    def max_tokens(self) -> int | None:
        """The longest input, in tokens."""
        return self.facts.max_tokens

    @property
    def lowercase(self) -> bool:
        return self.facts.lowercase

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def parameters(self) -> int:
        """How many numbers were learned; a shared one counts once, and packing changes none."""
        if not is_prepared(self.net):
            self._parameters = sum(p.numel() for p in self.net.parameters())
        return self._parameters

    @property
    def tokenizer(self) -> PublishedTokenizer:
        """The published tokenizer, or a ValueError where there is none."""
        if not isinstance(self.source, PublishedTokenizer):
            raise ValueError(
                "this model came without a published tokenizer: give it ids, or load it with its tokenizer"
            )
        return self.source

    def encode(self, text: str) -> list[int]:
        """The ids the network reads, checked against what it takes."""
        if isinstance(self.source, PublishedTokenizer):
            ids = self.source.encode(text).ids
        elif self.source is not None:
            ids = self.source.encode(text.lower() if self.lowercase else text)
        else:
            raise ValueError("this model has no tokenizer: give it ids")
        if not ids:
            raise ValueError("cannot answer an empty text: give at least one character")
        self.check_length(len(ids), text)
        return ids

    def check_length(self, tokens: int, text: str = "") -> None:
        """Refuses what is longer than the model takes."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            what = repr(text[:40]) if text else "the input"
            raise ValueError(f"{what} has {tokens} tokens; this model takes {self.max_tokens}: shorten it")

    def inputs(self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, truncate: bool = False) -> Inputs:
        """A batch of texts, or of pairs of texts, with the specials that the checkpoint puts around them.

        What is longer than the model takes is an error, or cut at its end where `truncate` asks for it.
        """
        found = [self.tokenizer.encode(text, None if pairs is None else pairs[i]) for i, text in enumerate(texts)]
        fitted = [self.fitted(e.ids, e.types, text, truncate) for e, text in zip(found, texts, strict=True)]
        rows, types = [ids for ids, _ in fitted], [kinds for _, kinds in fitted]
        return self.batch(rows, types)

    def fitted(self, ids: list[int], types: list[int], text: str, truncate: bool) -> tuple[list[int], list[int]]:
        """A text's ids and types as long as the model takes: cut at the end only where `truncate` asks for it."""
        if not ids:
            raise ValueError(f"{text[:40]!r} has no tokens: give at least one character")
        limit = self.max_tokens
        if limit is None or len(ids) <= limit:
            return ids, types
        if not truncate:
            self.check_length(len(ids), text)
        closing = ids[-1:] if ids[-1] in (self.tokenizer.sep, self.tokenizer.eos) else []
        return ids[: limit - len(closing)] + closing, types[:limit]

    @property
    def vocab(self) -> int | None:
        """How many ids the network reads; None where it reads none."""
        return self.spec.get("vocab", self.spec.get("source_vocab"))

    @property
    def padding(self) -> int:
        """An id to pad with, which nobody reads; old files name one (-1) that no table of embeddings has."""
        pad = self.facts.pad or 0
        return pad if 0 <= pad < (self.vocab or pad + 1) else 0

    def batch(self, rows: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> Inputs:
        """Rows of ids as one batch, padded on the right."""
        if not rows:
            raise ValueError("a batch has one row or more, and this one has none")
        longest = max(len(row) for row in rows)
        pad = self.padding
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        valid = None
        if any(len(row) < longest for row in rows):
            valid = torch.arange(longest, device=self.device) < lengths[:, None]
        kinds = None
        if types is not None and self.spec.get("types", 0) > 1 and any(any(row) for row in types):
            kinds = torch.tensor([[*row, *[0] * (longest - len(row))] for row in types], device=self.device)
        return Inputs(ids, valid, kinds)

    @torch.inference_mode()
    def hidden(
        self,
        inputs: Sequence[str] | Inputs | Int[Tensor, "B T"] | Float[Tensor, "B c h w"],
        valid: Bool[Tensor, "B T"] | None = None,
        *,
        mask: Mask | None = None,
    ) -> Float[Tensor, "B T C"]:
        """The last hidden states of texts, ids or pixels; `valid` is false at padding, whose states mean nothing.

        An encoder-decoder's are those of its encoder. `mask` narrows who sees whom (segments, global tokens).
        """
        self._refuse_towers()
        if reads_pictures(self.kind):
            return self.net(self._pixels(inputs, valid, mask))
        given = self._given(inputs, valid)
        if isinstance(self.net, seq2seq.Model):
            return self.net.encode(given.ids, given.valid, mask).x[:, -given.ids.shape[1] :]  # a prompt's have no text
        more = {} if given.types is None else {"types": given.types}  # which decoders do not have
        return self.net(given.ids, given.valid, mask=mask, **more)

    @torch.inference_mode()
    def logits(
        self,
        inputs: Sequence[str] | Inputs | Int[Tensor, "B T"] | Float[Tensor, "B c h w"],
        valid: Bool[Tensor, "B T"] | None = None,
        *,
        head: str | None = None,
        target: Int[Tensor, "B U"] | None = None,
        mask: Mask | None = None,
    ) -> Float[Tensor, "B *T O"]:
        """What a head (the only one, or "lm") makes of texts, ids or pixels. An encoder-decoder also needs `target`.

        Without a `mask`, an encoder's tokens are global as the head's task would have it (`Facts.globals`).
        """
        if isinstance(self.net, seq2seq.Model):
            if target is None or head is not None:
                raise ValueError("the logits of an encoder-decoder are of target ids: pass target=, and no head=")
            given = self._given(inputs, valid)
            return self.net.decode(target.to(self.device), self.net.encode(given.ids, given.valid, mask))
        self._refuse_towers()
        if target is not None:
            raise ValueError(f"target= is for encoder-decoders, and this is a {self.kind}: leave it out")
        name = head or self.only_head()
        if reads_pictures(self.kind):
            return self.net.head(name, self.net(self._pixels(inputs, valid, mask)))
        given = self._given(inputs, valid)
        mask = self.global_tokens(name, given) if mask is None else mask
        return self.net.head(name, self.hidden(given, mask=mask), given.ids, given.valid)

    def global_tokens(self, task: str, given: Inputs) -> Mask | None:
        """The mask that makes tokens global as `Facts.globals` has it for a task; None where it says nothing."""
        rule = self.facts.globals.get(task)
        if rule is None:
            return None
        if rule == "first":
            return Mask(window=(None, None), globals=torch.ones_like(given.ids[:, :1], dtype=torch.bool))
        there = torch.ones_like(given.ids, dtype=torch.bool) if given.valid is None else given.valid
        ends = given.ids.eq(rule) & there
        if not bool(ends.any(1).all()):
            row = int(ends.any(1).int().argmin())
            raise ValueError(f"row {row} has no separator (id {rule}) behind its question, whose tokens are global in "
                             f"'{task}': give question and context, or say which are with mask=")  # fmt: skip
        length = (ends.cumsum(1).eq(0) & there).sum(1, keepdim=True)
        return Mask(window=(None, None), globals=torch.arange(ends.shape[1], device=length.device) < length)

    def only_head(self) -> str:
        """The head that is meant where none is named."""
        heads = list(self.spec.get("heads", {}))
        if "lm" in heads or len(heads) == 1:
            return "lm" if "lm" in heads else heads[0]
        raise ValueError(f"this model has {', '.join(heads) or 'no'} heads: say which with head=")

    def _refuse_towers(self) -> None:
        if self.kind == "dual":
            there = ", ".join(self.net.towers)
            raise ValueError(f"this model has two towers ({there}), each with states of its own: embed gives vectors")

    def _pixels(self, inputs: Any, valid: Tensor | None, mask: Mask | None) -> Tensor:
        if not isinstance(inputs, Tensor) or inputs.ndim != 4:
            raise ValueError("this model takes pixels, a tensor (B, channels, height, width): headway.image makes them")
        if valid is not None or mask is not None:
            raise ValueError("valid= and mask= are for tokens, and this model takes pixels: leave them out")
        return inputs.to(self.device)

    def _given(self, inputs: Any, valid: Tensor | None) -> Inputs:
        if valid is not None and not isinstance(inputs, Tensor):
            raise ValueError("valid= is for ids; texts, and Inputs, tell their own padding: leave it out")
        if isinstance(inputs, Inputs):
            return inputs
        if isinstance(inputs, str):
            raise ValueError(f"give a list of texts, not one: [{inputs[:40]!r}]")
        if not isinstance(inputs, Tensor):
            return self.inputs(list(inputs))
        self.check_length(inputs.shape[1])
        if (
            (vocab := self.vocab)
            and inputs.numel()
            and not 0 <= (wrong := int(inputs.min())) <= (most := int(inputs.max())) < vocab
        ):
            raise ValueError(
                f"id {wrong if wrong < 0 else most} is outside this model's {vocab} ids (0 to {vocab - 1})"
            )
        return Inputs(inputs.to(self.device), None if valid is None else valid.to(self.device), None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, or of what flows between them where they are rounded."""
        return next(p.dtype for p in self.net.parameters() if p.is_floating_point())

    def pack(self, quantize: str | None = None) -> None:
        """Lays a published model's weights out for fast inference on this CPU (int8: rounds them too), in place.

        What uses a model does it by itself, and `save` undoes it; `unpack` before training.
        """
        on_cpu = self.device.type == "cpu"
        if quantize is None:
            if on_cpu and self.facts.family and packs(self.dtype) and not is_prepared(self.net):
                prepare(self.net, None, self.dtype)
            return
        self.unpack()
        if not on_cpu:
            raise ValueError(f"quantize='{quantize}' is for a CPU, and this model is on {self.device}: leave it out")
        prepare(self.net, quantize, self.dtype, mix_for(self.kind))

    def unpack(self) -> None:
        """The weights as PyTorch holds them: to train, change or save them."""
        if is_prepared(self.net):
            restore(self.net)

    def unknown(self, text: str) -> list[str]:
        """The pieces of a text that the model never saw in training."""
        if not isinstance(self.source, Tokenizer):
            return []
        text = text.lower() if self.lowercase else text
        pieces = text if len(self.source.encode(text)) == len(text) else text.split()
        return sorted({piece for piece in pieces if self.source.encode(piece) == [UNK]})

    def save(self, folder: str | Path) -> None:
        """Writes the model as a Headway folder, atomically."""
        self.unpack()
        record = {
            "headway": __version__,
            "model": msgspec.to_builtins(self.spec),
            "facts": msgspec.to_builtins(self.facts),
        }
        if self.image is not None:
            record["image"] = msgspec.to_builtins(self.image)
        records: dict[str, Any] = {"spec": record}
        if self.source is not None:
            records["source"] = self.source.record()
        if self.target is not None and self.target is not self.source:
            records["target"] = self.target.record()
        write_folder(Path(folder), {"model": self.net.state_dict()}, records)
