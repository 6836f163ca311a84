"""Hub: where models come from and go to. A model folder holds its spec, weights and tokenizers; no pickle, no code.

`headway.load("runs/demo/transformer").generate(["headway"])` is all there is to using one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway import __version__, machine, models
from headway.data.batches import collate
from headway.generate.search import beam, greedy
from headway.models.seq2seq import Model
from headway.store import check_fit, read_folder, write_folder
from headway.text import UNK, Tokenizer

MAX_TOKENS = 2**16  # the longest text any model here may claim to take
FEW = 2**23  # multiplications of a step below which a second thread costs more to wake than it takes over


class Generation(NamedTuple):
    """One answer: its text, its tokens as ids and as text, and its log-probability in nats."""

    text: str
    ids: list[int]
    tokens: list[str]
    log_probability: float


class Loaded:
    """A network with its tokenizers, ready to use."""

    def __init__(
        self,
        net: Model,
        spec: dict[str, Any],
        source: Tokenizer,
        target: Tokenizer,
        *,
        max_tokens: int,
        lowercase: bool = False,
    ) -> None:
        self.net, self.spec, self.source, self.target = net.eval(), spec, source, target
        self.max_tokens, self.lowercase = max_tokens, lowercase

    @property
    def parameters(self) -> int:
        """How many numbers were learned; a shared one counts once."""
        return sum(p.numel() for p in self.net.parameters())

    def generate(
        self, texts: Iterable[str], *, beams: int = 1, batch: int = 256, penalty: float = 1.0
    ) -> list[Generation]:
        """One answer for each text, greedy or by beam search; batching changes no answer.

        Beams compete by log-probability over length^`penalty`: 0 favours short answers, more than 1 long ones.
        """
        if isinstance(texts, str):
            raise ValueError(f"generate takes a list of texts, not one: generate([{texts[:40]!r}])")
        if batch < 1:
            raise ValueError(f"generate: batch is 1 or more, not {batch}")
        if not 0 <= penalty < math.inf:
            raise ValueError(f"generate: penalty is a finite power of the length, 0 or more, not {penalty}")
        texts = list(texts)
        ids = [self.encode(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        answers: dict[int, Generation] = {}
        for rows in (order[i : i + batch] for i in range(0, len(order), batch)):
            inputs = collate([(ids[i], []) for i in rows])
            device = next(self.net.parameters()).device
            valid = None if inputs.source_valid is None else inputs.source_valid.to(device)
            source = inputs.source.to(device)
            limit = self.max_tokens + 1  # and the end
            with _threads(self.parameters * beams * len(rows)):
                if beams == 1:
                    found = greedy(self.net, source, valid, limit=limit)
                else:
                    found = beam(self.net, source, valid, beams=beams, limit=limit, penalty=penalty)
            for i, (written, score) in zip(rows, found, strict=True):
                answers[i] = Generation(self.target.decode(written), written, self.target.tokens(written), score)
        return [answers[i] for i in range(len(texts))]

    def unknown(self, text: str) -> list[str]:
        """The pieces of a text that the model never saw in training."""
        text = text.lower() if self.lowercase else text
        pieces = text if len(self.source.encode(text)) == len(text) else text.split()
        return sorted({piece for piece in pieces if self.source.encode(piece) == [UNK]})

    def save(self, folder: str | Path) -> None:
        """Writes the model as a folder, atomically."""
        record = {
            "headway": __version__,
            "model": self.spec,
            "max_tokens": self.max_tokens,
            "lowercase": self.lowercase,
        }
        write_folder(
            Path(folder),
            {"model": self.net.state_dict()},
            {"spec": record, "source": self.source.record(), "target": self.target.record()},
        )

    def encode(self, text: str) -> list[int]:
        """The ids the network reads, lowered where it learned from lower case alone."""
        ids = self.source.encode(text.lower() if self.lowercase else text)
        if not ids:
            raise ValueError("cannot answer an empty text: give at least one character")
        if len(ids) > self.max_tokens:
            raise ValueError(f"{text[:40]!r} has {len(ids)} tokens; this model takes {self.max_tokens}: shorten it")
        return ids


def load(folder: str | Path, device: str | torch.device | None = None) -> Loaded:
    """A trained model from the folder that a run or `Loaded.save` wrote; every byte is checked."""
    folder = Path(folder)
    inner = folder / "model"
    if (inner / "spec.json").is_file():
        folder = inner
    if not (folder / "spec.json").is_file():
        raise ValueError(f"{folder}: no model here (no spec.json); name the folder of one model of a finished run")
    tensors, records = read_folder(folder)
    for part in ("spec", "source", "target"):
        if not isinstance(records.get(part), dict):
            raise ValueError(f"{folder / part}.json: missing or not an object; the folder is not a whole model")
    spec = records["spec"]
    limit = spec.get("max_tokens")
    if not isinstance(spec.get("model"), dict) or type(limit) is not int or not 1 <= limit <= MAX_TOKENS:
        raise ValueError(f"{folder / 'spec.json'}: has no 'model', or no 'max_tokens' from 1 to {MAX_TOKENS}")
    source, target = (Tokenizer.load(folder / f"{side}.json") for side in ("source", "target"))
    if (source.vocab, target.vocab) != (spec["model"].get("source_vocab"), spec["model"].get("target_vocab")):
        raise ValueError(f"{folder / 'source.json'}, target.json: not the tokenizers that spec.json was made with")
    net = _network(spec["model"], tensors.get("model", {}), folder).to(device or machine.device())
    return Loaded(
        net, spec["model"], source, target, max_tokens=spec["max_tokens"], lowercase=spec.get("lowercase") is True
    )


def _network(spec: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Model:
    """The network of a spec, but only once its shapes are known to be those of `tensors`."""
    try:
        with torch.device("meta"):  # there, a spec that lies about its sizes costs nothing
            sketch = models.build(spec)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{folder / 'spec.json'}: {str(error).splitlines()[0]}") from None
    if not isinstance(sketch, Model):
        raise ValueError(f"{folder / 'spec.json'}: a {spec['kind']} cannot answer; only seq2seq can")
    check_fit(sketch, tensors, folder / "model.safetensors")
    net = models.build(spec)
    assert isinstance(net, Model)
    net.load_state_dict(tensors)
    return net


@contextmanager
def _threads(work: int) -> Iterator[None]:
    """One thread for little work. The count is the calling thread's own, so nobody else who computes is slowed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if work < FEW else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def safe_name(name: str) -> str:
    """`name` where it can be a folder of its own, else an error: names come from recipes."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(f"'{name}' cannot name a folder: use letters, digits, '.', '_' and '-'")
    return name
