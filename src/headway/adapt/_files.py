"""Saved adapters: a folder of safetensors and JSON with what an adapter learned, how to make it, and the hash of the
weights that it was learned upon. Megabytes, where the model has gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from torch import Tensor

from headway import __version__
from headway.adapt._base import INSIDE, adaptation_of, known_of, plain, state
from headway.adapt._hash import base_hash
from headway.spec import Strict, convert
from headway.store import read_folder, write_folder

M = TypeVar("M")
FILE = "adapter"


class Base(Strict, frozen=True):
    """What an adapter was learned upon: its hash, and where it can be loaded from, if that is known."""

    hash: str
    load: str = ""


class Saved(Strict, frozen=True):
    """adapter.json: `heads` are the specs of those that were trained with it."""

    headway: str
    method: str
    targets: tuple[str, ...]
    options: dict[str, Any]
    base: Base
    heads: dict[str, Any] = {}
    quantize: str | None = None


def save(
    model: Any,
    folder: str | Path,
    *,
    format: str = "headway",
    name: str | None = None,
    base: str = "",
) -> None:
    """Writes one adapter (default: the one in use) as a folder, atomically, in Headway's format or PEFT's.

    base: where its model can be loaded from; with it, `headway.load(folder)` gives the adapted model.
    """
    known = known_of(model)
    name = name or _only(known.weights, known.records)
    if name not in known.records:
        raise ValueError(f"save: this model has no adapter '{name}'; there is {', '.join(known.records)}")
    if format == "peft":
        from headway.adapt import _peft

        return _peft.save(model, Path(folder), name, base)
    if format != "headway":
        raise ValueError(f"save: an adapter's format is headway or peft, not {format!r}; headway.adapt.fold(model) "
                         "makes an ordinary model of both")  # fmt: skip
    net, record = plain(model), known.records[name]
    known.base = known.base or base_hash(net)
    if record.heads and not hasattr(model, "spec"):
        raise ValueError("save: an adapter with heads is saved from the loaded model, which knows their specs, not "
                         "from its network")  # fmt: skip
    heads = {head: msgspec.to_builtins(model.spec["heads"][head]) for head in record.heads}
    base = base or known.source
    where = str(Path(base).resolve()) if base and Path(base).exists() else base
    saved = Saved(headway=__version__, method=record.method, targets=record.targets, options=record.options,
                  base=Base(hash=known.base, load=where), heads=heads, quantize=known.quantize)  # fmt: skip
    tensors = {_shown(key, name): tensor for key, tensor in state(model, name).items()}
    write_folder(Path(folder), {FILE: tensors}, {FILE: msgspec.to_builtins(saved)})


def read(folder: Path) -> tuple[Saved, dict[str, Tensor]]:
    """What `save` wrote, every byte checked."""
    tensors, records = read_folder(folder)
    if FILE not in tensors or FILE not in records:
        raise ValueError(f"{folder}: no adapter here (adapter.json and adapter.safetensors)")
    return convert(records[FILE], Saved, str(folder / f"{FILE}.json")), tensors[FILE]


def attach(model: M, folder: str | Path, *, name: str | None = None, quantize: str | None = None) -> M:
    """Gives a model a saved adapter, in Headway's format or PEFT's, and has it act.

    quantize: "int8" rounds the model, as `adapt` does. A ValueError where it was learned upon other weights, or where
    anything in it does not fit.
    """
    from headway.adapt import adapt

    path = Path(folder)
    name = name or "default"
    if (path / "adapter_config.json").is_file():
        from headway.adapt import _peft

        if quantize is not None:
            raise ValueError(f"{path}: quantize= is for adapters in Headway's format: attach PEFT's without it")
        loaded: Any = model
        with undone(model, name):
            return _peft.attach(loaded, path, name)
    saved, tensors = read(path)
    check_base(model, saved.base.hash, path)
    lacking = sorted(set(saved.heads) - set(getattr(plain(model), "heads", {})))
    if lacking:
        raise ValueError(f"{path}: was trained with the head '{lacking[0]}', which this model has not: load it with "
                         f"headway.load(..., heads={{{lacking[0]!r}: ...}})")  # fmt: skip
    with undone(model, name):
        adapt(
            model,
            saved.method,
            targets=saved.targets,
            name=name,
            heads=tuple(saved.heads),
            quantize=quantize,
            **saved.options,
        )
        fill(model, tensors, name, path)
    return model


@contextmanager
def undone(model: Any, name: str) -> Iterator[None]:
    """Where attaching an adapter fails, others act again as they did, and the same parameters train."""
    from headway.adapt import remove

    net = plain(model)
    known = adaptation_of(net)
    was = None if known is None else (dict(known.weights), known.rows)
    new = known is None or name not in known.records
    trained = [p for p in net.parameters() if p.requires_grad]
    try:
        yield
    except ValueError:
        made = adaptation_of(net)
        if new and made is not None and name in made.records:
            remove(model, name)
            if was is not None:
                made.choose(*was)
            for p in trained:
                p.requires_grad_(True)
        raise


def rebuild(folder: Path, load: Callable[[str, dict[str, Any] | None], Any]) -> Any:
    """The adapted model of a saved adapter that says where its base can be loaded from: `load` takes that and heads."""
    saved, _ = read(folder)
    if not saved.base.load:
        raise ValueError(f"{folder}: an adapter that does not say for which model: load that one, and then "
                         "headway.adapt.attach(model, folder)")  # fmt: skip
    model = load(saved.base.load, saved.heads or None)
    model.origin = saved.base.load
    return attach(model, folder, quantize=saved.quantize)


def check_base(model: Any, expected: str, where: Path) -> None:
    """Refuses an adapter that was learned upon other weights."""
    net = plain(model)
    known = adaptation_of(net)
    found = known.base if known is not None and known.base else base_hash(net)
    if found != expected:
        raise ValueError(f"{where}: was learned upon other weights (hash {expected[:12]}, this model's is "
                         f"{found[:12]}): attach it to the model that it was made with")  # fmt: skip
    if known is not None:
        known.base = found


def fill(model: Any, tensors: dict[str, Tensor], name: str, where: Path) -> None:
    """Gives an adapter its values, all of them and no other."""
    own = {_shown(key, name): tensor for key, tensor in state(model, name).items()}
    wrong = sorted(own.keys() ^ tensors.keys()) or [key for key in own if own[key].shape != tensors[key].shape]
    if wrong:
        raise ValueError(f"{where}: {len(wrong)} tensors do not fit this adapter; first: {wrong[0]}")
    for key, tensor in own.items():
        tensor.detach().copy_(tensors[key])


def _shown(key: str, name: str) -> str:
    """A tensor's name without that of its adapter."""
    return key.replace(f"{INSIDE}{name}.", INSIDE)


def _only(acting: Any, known: Any) -> str:
    if len(acting) == 1:
        return next(iter(acting))
    raise ValueError(f"save: {len(acting)} adapters are in use; say which with name= ({', '.join(known)})")
