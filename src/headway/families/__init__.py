"""Families: published checkpoints read as Headway's own models. One file a family, found by `model_type`.

Each file defines TYPES, the `model_type`s that it reads; `read(config) -> Published`, strict about every field that
changes the maths; `write(spec, facts) -> dict`, the configuration back; and `tiny() -> list[dict]`, small random
configurations that the parity tests draw from; REFUSES, where it has one, says why a dtype would go wrong.
Weights go through `Rule`s, both ways.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, NamedTuple

import msgspec

from headway.loaded import Facts
from headway.spec import nearest
from headway.transfer import Rule

REQUIRED: Any = object()
MAX_DEPTH = 1024  # as `StackSpec.repeat` has it
MAX_LABELS = 2**18

# What says nothing about how a checkpoint computes: how it was trained, stored, or called by another library
HARMLESS = frozenset(
    """_name_or_path architectures chunk_size_feed_forward dtype gradient_checkpointing initializer_factor
    initializer_range label2id model_type output_attentions output_hidden_states problem_type return_dict
    task_specific_params tokenizer_class torch_dtype transformers_version use_cache _attn_implementation
    attn_implementation sep_token_id cls_token_id mask_token_id pretraining_tp id2label num_labels
    return_dict_in_generate finetuning_task output_past _num_labels
    transformers.js_config""".split()  # noqa: SIM905
)

ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "tanh": "tanh", "quick_gelu": "quick_gelu"}  # fmt: skip


class Published(NamedTuple):
    """A published checkpoint in our words. `prefix`: what the names in the rules begin with, and which a file of the
    bare model leaves out. `ignore`: patterns of names that a file may hold and the model does not need: tables that are
    computed, heads of the training that its architecture leaves out."""

    spec: dict[str, Any]
    facts: Facts
    rules: list[Rule]
    prefix: str = ""
    ignore: tuple[str, ...] = ()

    def rules_for(self, names: Collection[str]) -> list[Rule]:
        """The rules for a file that holds these names, with the prefix left out where a file of the bare model leaves
        it out."""
        rules = [Rule((), (name,)) for name in names if any(fnmatchcase(name, pattern) for pattern in self.ignore)]
        if not self.prefix or any(name.startswith(self.prefix) for name in names):
            return self.rules + rules
        short = lambda rule: rule._replace(theirs=tuple(name.removeprefix(self.prefix) for name in rule.theirs))
        return [short(rule) for rule in self.rules] + rules


class Config:
    """A published configuration, read strictly: `finish` refuses what nobody asked for."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data, self.where, self.read = data, where, set(HARMLESS)
        if data.get("auto_map"):
            raise ValueError(f"{where}: auto_map asks to run code that came with the weights; Headway never does")

    @property
    def architecture(self) -> str:
        """The first of `architectures`, or ""."""
        found = self.data.get("architectures") or [""]
        if not isinstance(found, list) or not isinstance(found[0], str):
            raise ValueError(f"{self.where}: architectures is a list of names, not {found!r}")
        return found[0]

    def ending(self, endings: Collection[str], family: str = "", default: str = "Model") -> str:
        """The architecture, one of `endings` behind the family's name; `default` where none is told."""
        architecture = self.architecture or family + default
        if (found := architecture.removeprefix(family)) not in endings:
            known = ", ".join(family + ending for ending in endings)
            raise ValueError(f"{self.where}: architecture {architecture} is not read; there is {known}")
        return found

    def take(self, name: str, default: Any = REQUIRED, kind: type | tuple[type, ...] | None = None) -> Any:
        """A field's value; of `kind` where one is given (ints pass for floats)."""
        self.read.add(name)
        value = self.data.get(name)
        if value is None:
            if default is REQUIRED:
                raise ValueError(f"{self.where}: '{name}' is missing, and the model's shape depends on it")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and type(value) is int:
            value = float(value)
        if kind is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):  # type: ignore[arg-type]
            raise ValueError(f"{self.where}: '{name}' is {value!r}, and should be {kinds[0].__name__}")  # type: ignore[union-attr]
        return value

    def size(self, name: str, default: Any = REQUIRED) -> int:
        """A whole number of at least 1."""
        value = self.take(name, default, int)
        if value is not None and not 1 <= value <= 2**24:
            raise ValueError(f"{self.where}: '{name}' is {value}, and should be from 1 to {2**24}")
        return value

    def depth(self, name: str, default: Any = REQUIRED) -> int:
        """How many layers: rules are made for each before anything else looks at the number."""
        if (layers := self.size(name, default)) > MAX_DEPTH:
            raise ValueError(f"{self.where}: '{name}' is {layers}, and a stack has at most {MAX_DEPTH} blocks here")
        return layers

    def expect(self, name: str, *allowed: Any) -> None:
        """A field that changes the maths, and of which Headway knows the values `allowed`; absent is right too."""
        self.read.add(name)
        if (value := self.data.get(name)) is not None and value not in allowed:
            known = " or ".join(repr(a) for a in allowed) or "none"
            raise ValueError(f"{self.where}: '{name}' is {value!r}, which changes the result; Headway knows {known}")

    def choose(self, name: str, table: dict[str, Any], default: str) -> Any:
        """One of the words of `table`, as its value there."""
        value = self.take(name, default, str)
        if value not in table:
            raise ValueError(f"{self.where}: '{name}' is {value!r}{nearest(value, table)}")
        return table[value]

    def ignore(self, *names: str) -> None:
        """Fields that change nothing here."""
        self.read.update(names)

    def inner(self, name: str) -> Config:
        """The configuration inside a field, or an empty one."""
        return Config(self.take(name, {}, dict), f"{self.where}: {name}")

    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's outputs, from `id2label`, or as many as `num_labels` (two by default)."""
        self.read.update(("id2label", "num_labels"))
        named = self.data.get("id2label")
        if named is None:
            count = self.take("num_labels", 2, int)
            if not 0 <= count <= MAX_LABELS:
                raise ValueError(f"{self.where}: 'num_labels' is {count}, and should be from 0 to {MAX_LABELS}")
            return tuple(f"LABEL_{i}" for i in range(count))
        try:
            pairs = sorted((int(key), str(value)) for key, value in named.items())
        except (AttributeError, ValueError, TypeError):
            raise ValueError(f"{self.where}: id2label is a mapping of numbers to names, not {named!r:.60}") from None
        if [key for key, _ in pairs] != list(range(len(pairs))):
            raise ValueError(f"{self.where}: id2label names {len(pairs)} labels that are not numbered from 0")
        return tuple(value for _, value in pairs)

    def ids(self, name: str) -> tuple[int, ...]:
        """One id or several."""
        found = self.take(name, [], (int, list))
        ids = tuple(found) if isinstance(found, list) else (found,)
        if not all(type(i) is int for i in ids):
            raise ValueError(f"{self.where}: {name} is an id or a list of them, not {found!r}")
        return ids

    def bad_words(self) -> tuple[int, ...]:
        """Ids that are never written."""
        words = self.take("bad_words_ids", [], list)
        if not all(isinstance(ids, list) and len(ids) == 1 and type(ids[0]) is int for ids in words):
            raise ValueError(f"{self.where}: bad_words_ids is read where each word is one id, not {words!r:.60}")
        return tuple(ids[0] for ids in words)

    def original(self) -> dict[str, Any]:
        """The harmless fields that are there, for the way back."""
        kept = HARMLESS - {"architectures", "model_type", "id2label", "label2id", "num_labels", "dtype", "torch_dtype"}
        return {name: self.data[name] for name in sorted(kept) if name in self.data}

    def finish(self) -> None:
        """Refuses the fields that nobody read, for they might change the maths."""
        if unknown := sorted(name for name, value in self.data.items() if name not in self.read and value is not None):
            raise ValueError(
                f"{self.where}: '{unknown[0]}' ({self.data[unknown[0]]!r:.40}) is a field that Headway does not know "
                f"and that may change the result ({len(unknown)} such): remove it if it does not"
            )


def names() -> list[str]:
    """The families there are, by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def family(name: str) -> ModuleType:
    """A family's file by its name."""
    if name not in names():
        raise ValueError(f"no family '{name}'{nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def read(data: dict[str, Any], where: str) -> Published:
    """A published configuration in our words."""
    kind = data.get("model_type")
    known = {t: name for name in names() for t in family(name).TYPES}
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{where}: model_type {kind!r} is no family that Headway reads{nearest(str(kind), known)}")
    config = Config(data, where)
    published = family(known[kind]).read(config)
    config.finish()
    return published


def with_generation(facts: Facts, told: dict[str, Any], where: object) -> Facts:
    """The facts with what generation_config.json says of how a text begins and ends; how to draw is the user's."""
    config = Config({**told, "auto_map": None}, str(where))
    ends, start = config.ids("eos_token_id"), config.take("decoder_start_token_id", facts.start, int)
    return msgspec.structs.replace(
        facts,
        eos=tuple(dict.fromkeys((*ends, *facts.eos))),
        start=start,
        bad=tuple(dict.fromkeys((*facts.bad, *config.bad_words()))),
        forced_bos=config.take("forced_bos_token_id", facts.forced_bos, int),
        forced_eos=config.take("forced_eos_token_id", facts.forced_eos, int),
    )


def linear(ours: str | Iterable[str], theirs: str | Iterable[str], *, bias: bool = True) -> list[Rule]:
    """The rules of a linear map or a norm: weight and, where there is one, bias."""
    mine, others = ((n,) if isinstance(n, str) else tuple(n) for n in (ours, theirs))
    parts = ("weight", "bias") if bias else ("weight",)
    return [Rule(tuple(f"{n}.{part}" for n in mine), tuple(f"{n}.{part}" for n in others)) for part in parts]


def published_ending(kind: str, table: Mapping[str, Collection[str]], heads: Collection[str]) -> str:
    """The architecture of `table` that has these heads; a ValueError where none has."""
    found = next((ending for ending, kept in table.items() if set(kept) == set(heads)), None)
    if found is None:
        raise ValueError(f"{kind}: no published architecture has the heads {', '.join(heads) or 'none'}")
    return found


def published_ids(ids: tuple[int, ...]) -> int | list[int] | None:
    """`Config.ids`, the way back."""
    return ids[0] if len(ids) == 1 else list(ids) or None


def published_activation(ours: str) -> str:
    """The other library's word for an activation."""
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def published_labels(spec: dict[str, Any]) -> dict[str, Any]:
    """`id2label` and `label2id` of the first head that has labels, or of a classifier, which has as many as outputs."""
    labels = next((head["labels"] for name, head in spec["heads"].items() if head.get("labels") and name != "next"), ())
    outputs = next((spec["heads"][name]["outputs"] for name in ("classify", "tokens") if name in spec["heads"]), 0)
    labels = labels or [f"LABEL_{i}" for i in range(outputs)]
    if not labels:
        return {}
    named = {str(i): name for i, name in enumerate(labels)}
    return {"id2label": named, "label2id": {name: i for i, name in enumerate(labels)}}
