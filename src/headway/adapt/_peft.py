"""PEFT's format (github.com/huggingface/peft), both ways: adapter_config.json and adapter_model.safetensors.

Names are translated by the family's weight rules. What fits nowhere is an error that names it; a field of the
configuration that changes the result is honoured or refused. Prefix tuning is PEFT's, of the decoder's attention to
itself; of prompt tuning for encoder-decoders, PEFT itself uses the first half alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from headway.adapt import _peft_lora as lora
from headway.adapt._base import Record, adapted, known_of, plain, refuse_merged
from headway.adapt._peft_names import TASKS, Names, Piece, Run, is_linear
from headway.adapt._targets import WHOLE, Place, find, places
from headway.families import Config
from headway.header import refuse_pickle, shown
from headway.store import read_json, replacing, unshared
from headway.weights import open_weights

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
METHODS = {"LORA": "lora", "IA3": "ia3", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
TOKENS = ("prefix", "prompt")
# What says how it was trained or found, is told by the tensors' names and shapes, or means nothing alone
HARMLESS = """peft_type base_model_name_or_path inference_mode revision auto_mapping peft_version target_modules
exclude_modules layers_to_transform layers_pattern feedforward_modules fan_in_fan_out modules_to_save megatron_core
qalora_group_size prefix_projection encoder_hidden_size prompt_tuning_init prompt_tuning_init_text
tokenizer_name_or_path tokenizer_kwargs init_ia3_weights init_weights num_transformer_submodules num_attention_heads
num_layers token_dim num_virtual_tokens r lora_alpha rank_pattern alpha_pattern lora_dropout use_rslora use_dora
bias""".split()  # noqa: SIM905


def attach(model: Any, folder: Path, name: str) -> Any:
    """Gives a loaded model the adapter in a folder that PEFT wrote; it then acts."""
    from headway.adapt import adapt

    if not (folder / FILE).is_file() and (old := folder / "adapter_model.bin").is_file():
        refuse_pickle(old)
    config = configuration(read_json(folder / CONFIG, dict), folder / CONFIG)
    method, where = METHODS[config["peft_type"]], str(folder / FILE)
    names = Names(model, plain(model))
    tensors = dict(open_weights(folder / FILE))
    held, rest = _sorted_out(tensors, names, where)
    heads, biases = _beside(rest, names, where, config.get("bias", "none") if method == "lora" else "none")
    _refuse_first(method, names)
    reader = _Tokens if method in TOKENS else _Linears
    made = reader(method, config, held, names, where)
    given = tuple(sorted({ours.split(".")[1] for ours in heads}))
    adapt(model, method, targets=made.targets, name=name, heads=given, **made.options)
    with torch.no_grad():
        made.fill(name)
        _fill_biases(names, name, biases)
        own = names.net.state_dict()
        for ours, tensor in heads.items():
            own[ours].copy_(tensor)
    return model


def configuration(data: dict[str, Any], where: Path) -> dict[str, Any]:
    """The fields that are there, once all are known."""
    data = {key: value for key, value in data.items() if value not in (None, False, {}, [], "")}
    config = Config(data, str(where))
    config.ignore(*HARMLESS, "task_type")
    if data.get("peft_type") not in METHODS:
        raise ValueError(f"{where}: peft_type is {data.get('peft_type')!r}; Headway reads {', '.join(METHODS)}")
    config.expect("init_lora_weights", *lora.HARMLESS_STARTS)
    config.finish()
    if data.get("bias", "none") not in lora.BIAS:
        raise ValueError(f"{where}: bias is {data['bias']!r}; there is {', '.join(lora.BIAS)}")
    return data


def _sorted_out(
    tensors: Mapping[str, Tensor], names: Names, where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """What is an adapter's, by module of theirs and by what it is there; and all else, by its name in their model."""
    held: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        linears = key.startswith("base_model.model.")  # what stands before all tokens is saved without "model."
        name = key.removeprefix("base_model.model." if linears else "base_model.")
        found = re.fullmatch(r"(.*?)\.?(lora_A\.weight|lora_B\.weight|lora_magnitude_vector|ia3_l|prompt_embeddings)"
                             r"(\.weight)?", name)  # fmt: skip
        if found is None:
            if ".original_module." not in name:  # what a head was before, which PEFT keeps and does not use
                rest[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
            continue
        module, what = found[1], lora.ENDINGS.get(found[2], found[2])
        if what != "prompt_embeddings" and not names.known(module, names.weights):
            raise ValueError(f"{where}: {shown(key)} is for a module that this model has not, or that no adapter can "
                             "stand at: attach it to the model that it was made with")  # fmt: skip
        held.setdefault(module, {})[what] = tensor
    return held, rest


def _beside(
    rest: Mapping[str, Tensor], names: Names, where: str, bias: str
) -> tuple[dict[str, Tensor], list[tuple[Piece, Tensor]]]:
    """What a file holds besides adapters: tensors of heads by our names, and changes of biases by piece. What equals
    the model's own is nothing new."""
    own = names.net.state_dict()
    heads: dict[str, Tensor] = {}
    biases: list[tuple[Piece, Tensor]] = []
    for name, tensor in rest.items():
        ours, module = names.ours(name), name.removesuffix(".bias")
        pieces = names.known(module, names.biases) if name.endswith(".bias") else []
        if ours is not None and own[ours].shape == tensor.shape:
            if torch.equal(own[ours].cpu(), tensor.to(own[ours].dtype)):
                continue
            if ours.startswith("heads.") and not _tied(names, ours):
                heads[ours] = tensor
                continue
        if pieces and bias != "none" and sum(p.end - p.begin for p in pieces) == len(tensor):
            change = tensor - names.rows_of(pieces, lambda module: module.bias.detach()).cpu()
            biases += [(piece, change[piece.rows]) for piece in pieces]
            continue
        raise ValueError(f"{where}: {shown(name)} {tuple(tensor.shape)} fits nothing here that an adapter may change "
                         "(its own parameters, new heads, biases that train with LoRA)")  # fmt: skip
    return heads, biases


def _tied(names: Names, ours: str) -> bool:
    """Whether a head's weight is the embedding's, which stays frozen."""
    own = names.net.state_dict(keep_vars=True)
    return sum(tensor is own[ours] for tensor in own.values()) > 1


def _refuse_first(method: str, names: Names) -> None:
    heads = names.spec.get("heads", {})
    if method == "prompt" and any(head.get("pool") == "first" for name, head in heads.items() if name != "pool"):
        raise ValueError("peft: with prompt tuning its heads pool the first token of the prompt, ours the first of the "
                         "text, so that outputs would differ: choose prefix, or format='headway'")  # fmt: skip


class _Linears:
    """LoRA and (IA)^3: what stands at linears."""

    def __init__(self, method: str, config: Any, held: Any, names: Names, where: str) -> None:
        self.names, self.method = names, method
        self.pieces = {name: names.known(name, names.weights) for name in held}
        self.options: dict[str, Any] = {}
        self.pairs: dict[str, lora.Pair] = {}
        if not held:
            raise ValueError(f"{where}: holds no {method} at all")
        if method == "lora":
            pairs = lora.pairs_of(held, bool(config.get("use_dora")), where)
            wrong = [name for name, pair in pairs.items() if not lora.fits(pair, self.pieces[name], names)]
            self.options, self.pairs = lora.in_common(pairs, config, where)
        else:
            self.scales = {name: parts["ia3_l"] for name, parts in held.items() if parts.keys() == {"ia3_l"}}
            wrong = [name for name in held if name not in self.scales or not self._scales_fit(name)]
        if wrong:
            raise ValueError(f"{where}: {len(wrong)} adapters do not fit this model's linears; first: {wrong[0]}")
        self.places = [(name, piece, _place(piece, names)) for name, pieces in self.pieces.items() for piece in pieces]
        self.targets = _patterns([place for _, _, place in self.places], names)

    def _scales_fit(self, name: str) -> bool:
        pieces, scale = self.pieces[name], self.scales[name]
        module = self.names.modules[pieces[0].ours]
        if getattr(module, "is_residual_output", False):
            return tuple(scale.shape) == (1, module.in_features)
        return tuple(scale.shape) == (sum(piece.end - piece.begin for piece in pieces), 1)

    def fill(self, name: str) -> None:
        for theirs, piece, place in self.places:
            adapter: Any = self.names.modules[place.name].adapters[name][place.part]  # type: ignore[union-attr,index]
            if self.method == "lora":
                lora.fill(adapter, self.pairs[theirs], piece)
            else:
                scale = self.scales[theirs].flatten()
                adapter.scale.copy_(scale if adapter.inputs else scale[piece.rows])


class _Tokens:
    """Prefix and prompt tuning: what stands before all tokens."""

    def __init__(self, method: str, config: Any, held: Any, names: Names, where: str) -> None:
        table = held.get("", {}).get("prompt_embeddings")
        if table is None or len(held) > 1:
            raise ValueError(f"{where}: {method} tuning holds prompt_embeddings, and this file has other adapters")
        length = config.get("num_virtual_tokens", 0)
        self.method, self.names, self.stack = method, names, _stack_of(method, names)
        self.depth = len(names.modules[self.stack].blocks)  # type: ignore[arg-type]
        width = _prefix_width(names, self.stack) if method == "prefix" else names.spec["width"]
        allowed = (length, 2 * length) if (method, names.kind) == ("prompt", "seq2seq") else (length,)
        if table.ndim != 2 or table.shape[0] not in allowed or table.shape[1] != width:
            raise ValueError(f"{where}: prompt_embeddings is {tuple(table.shape)}, and {length} tokens of this model "
                             f"are {(length, width)}")  # fmt: skip
        self.table, self.targets = table[:length], (self.stack,)
        self.options = {"length": length, **({"at": "self"} if method == "prefix" else {})}

    def fill(self, name: str) -> None:
        adapter = self.names.modules[self.stack].adapters[name][WHOLE]  # type: ignore[union-attr,index]
        if self.method == "prefix":
            layers = self.table.chunk(self.depth, 1)
            adapter.parts["self"].table.copy_(torch.cat([layers[i] for i in _read_by(self.names, self.depth)], 1))
        else:
            adapter.prompt.copy_(self.table + _first_type(self.names))


def _stack_of(method: str, names: Names) -> str:
    if names.kind == "seq2seq":
        return "decoder" if method == "prefix" else "encoder"
    return "stack"


def _read_by(names: Names, depth: int) -> list[int]:
    """Which layer of what is stored each layer reads: in encoder-decoders PEFT gives layer i that of layer 2i, counted
    round and round, as it lays two stacks' prefixes out behind each other and cuts them into pairs."""
    return [2 * i % depth if names.kind == "seq2seq" else i for i in range(depth)]


def _prefix_width(names: Names, stack: str) -> int:
    """Of keys and values of all layers."""
    mixers = [block.mixer.inner for block in names.modules[stack].blocks]  # type: ignore[union-attr]
    if len({(mixer.kv_heads, mixer.head_dim) for mixer in mixers}) != 1:
        raise ValueError("peft: prefix tuning there has layers of one width, and here they differ: format='headway'")
    return sum(2 * mixer.kv_heads * mixer.head_dim for mixer in mixers)


def _first_type(names: Names) -> Tensor | float:
    """What is added to each of PEFT's virtual tokens in models that tell types of tokens apart."""
    types = getattr(names.net, "types", None)
    return 0.0 if types is None else types.weight[0].detach()


def _place(piece: Piece, names: Names) -> Place:
    """Where the adapter of a piece stands: at a module, or at a part of its outputs."""
    rows = (piece.begin, piece.end)
    for place in places(names.net, lambda module, _: is_linear(module)):
        outputs = place.outputs or slice(0, place.module.out_features)  # type: ignore[arg-type]
        if place.name == piece.ours and (outputs.start, outputs.stop) == rows:
            return place
    raise ValueError(f"peft: {piece.theirs} is a part of {piece.ours} that no adapter can stand at alone")


def _patterns(wanted: Sequence[Place], names: Names) -> tuple[str, ...]:
    """Patterns that mean these places and no others: one for all layers where it can be."""
    exact = tuple(dict.fromkeys(place.shown for place in wanted))
    short = tuple(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in exact))
    found = find(names.net, short, lambda module, _: is_linear(module), who="peft")
    same = {(place.name, place.part) for place in found} == {(place.name, place.part) for place in wanted}
    return short if same else exact


def _fill_biases(names: Names, name: str, changes: Sequence[tuple[Piece, Tensor]]) -> None:
    for piece, change in changes:
        covered = 0
        for part, adapter in _parts(names.modules[piece.ours], name):
            if not part.startswith("bias_"):
                continue
            outputs = adapter.outputs or slice(0, len(adapter.shift))
            low, high = max(outputs.start, piece.begin), min(outputs.stop, piece.end)
            if low < high:
                adapter.shift[low - outputs.start : high - outputs.start] = change[
                    low - piece.begin : high - piece.begin
                ]
                covered += high - low
        if covered < len(change) and bool(change.any()):
            raise ValueError(f"peft: the bias of {piece.theirs} changed, and no adapter of biases stands there")


def _parts(module: Any, name: str) -> list[tuple[str, Any]]:
    """The adapters of a name at a module, by the part of its outputs."""
    adapters = getattr(module, "adapters", {})
    return list(adapters[name].items()) if name in adapters else []


# --- writing


def save(model: Any, folder: Path, name: str, base: str = "") -> None:
    """Writes one adapter of a loaded model as a folder that PEFT loads, atomically."""
    net, known = plain(model), known_of(model)
    refuse_merged(known, "before format='peft'")
    record = known.records[name]
    if record.method not in METHODS.values():
        raise ValueError(
            f"save: PEFT's format has {', '.join(METHODS.values())}, not {record.method}: format='headway'"
        )
    names = Names(model, net)
    _refuse_first(record.method, names)
    write = _tokens_to if record.method in TOKENS else _linears_to
    tensors, config = write(name, record, names)
    root = "base_model." if record.method in TOKENS else "base_model.model."
    saved = _heads_to(record, names)
    tensors |= {root + theirs: tensor for theirs, tensor in saved.items()}
    modules = sorted({theirs.rpartition(".")[0] for theirs in saved})
    config |= {"task_type": names.task, "inference_mode": True, "base_model_name_or_path": base or None,
               "modules_to_save": modules or None}  # fmt: skip
    with replacing(folder) as fresh:
        whole = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        save_file(unshared(whole), fresh / FILE, {"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _heads_to(record: Record, names: Names) -> dict[str, Tensor]:
    """The tensors of the heads that train, by their names; and of the one that PEFT asks for with every such model."""
    asked = next((f"heads.{head}.out." for head, task in TASKS.items() if head != "lm" and task == names.task), None)
    wanted = tuple(f"heads.{head}." for head in record.heads) + ((asked,) if asked else ())
    saved = {}
    for ours, tensor in names.net.state_dict().items():
        if ours.startswith(wanted) and wanted:
            if _tied(names, ours):
                raise ValueError(
                    f"save: {ours} is the embedding, too, which PEFT would not load back: format='headway'"
                )
            saved[names.theirs(ours)] = tensor
    return saved


def _linears_to(name: str, record: Record, names: Names) -> tuple[dict[str, Tensor], dict[str, Any]]:
    runs: dict[str, list[Run]] = {}
    shifts: dict[str, list[Run]] = {}
    for module, wrapped in adapted(names.net):
        for part, adapter in wrapped.adapters[name].items() if name in wrapped.adapters else ():  # type: ignore[operator]
            bias = part.startswith("bias_")
            for run in names.runs(adapter, module, names.biases if bias else names.weights):
                (shifts if bias else runs).setdefault(run.piece.theirs, []).append(run)
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {"target_modules": sorted(runs), "fan_in_fan_out": names.transposed}
    if record.method == "lora":
        pairs = {theirs: lora.joined(own, names.known(theirs, names.weights), names) for theirs, own in runs.items()}
        for theirs, pair in pairs.items():
            for ending, tensor in zip(lora.ENDINGS, pair, strict=True):
                if tensor is not None:
                    tensors[f"base_model.model.{theirs}.{ending}"] = tensor
        config |= lora.configuration(pairs, record.options)
    else:
        inputs = sorted(theirs for theirs, own in runs.items() if own[0].adapter.inputs)
        for theirs, own in runs.items():
            tensors[f"base_model.model.{theirs}.ia3_l"] = _scale_to(own, names.known(theirs, names.weights))
        config |= {"peft_type": "IA3", "feedforward_modules": inputs}
    for theirs, own in shifts.items():
        whole = names.rows_of(names.known(theirs, names.biases), lambda module: module.bias.detach()).clone()
        for run in own:
            whole[run.piece.rows] += run.adapter.shift.detach()[run.rows]
        tensors[f"base_model.model.{theirs}{'.base_layer' if theirs in runs else ''}.bias"] = whole
    return tensors, config


def _scale_to(runs: Sequence[Run], pieces: Sequence[Piece]) -> Tensor:
    """PEFT's vector of a linear of theirs; rows that nothing scales have ones."""
    if runs[0].adapter.inputs:
        return runs[0].adapter.scale.detach()[None]
    whole = torch.ones(sum(piece.end - piece.begin for piece in pieces), 1)
    for run in runs:
        whole[run.piece.rows, 0] = run.adapter.scale.detach().cpu()[run.rows]
    return whole


def _tokens_to(name: str, record: Record, names: Names) -> tuple[dict[str, Tensor], dict[str, Any]]:
    stack = _stack_of(record.method, names)
    found = [(place, adapter) for place, module in adapted(names.net) for _, adapter in _parts(module, name)]
    adapter = found[0][1]
    config = {"num_virtual_tokens": adapter.length, "num_transformer_submodules": 1}
    if record.method == "prompt":
        config |= {"peft_type": "PROMPT_TUNING", "token_dim": names.spec["width"]}
        return {"prompt_embeddings": (adapter.prompt - _first_type(names)).detach()}, config
    if [place for place, _ in found] != [stack] or list(adapter.parts) != ["self"]:
        had = ", ".join(f"{place} ({', '.join(one.parts)})" for place, one in found)
        raise ValueError(f"save: PEFT's prefix tuning is of the {stack}'s attention to itself, and this one "
                         f"is of {had}: make it with targets='{stack}', at='self', or format='headway'")  # fmt: skip
    _prefix_width(names, stack)
    mixers = [block.mixer.inner for block in names.modules[stack].blocks]  # type: ignore[union-attr]
    config |= {"peft_type": "PREFIX_TUNING", "num_layers": len(mixers), "num_attention_heads": mixers[0].kv_heads,
               "token_dim": mixers[0].kv_heads * mixers[0].head_dim, "encoder_hidden_size": names.spec["width"],
               "num_transformer_submodules": 2 if names.kind == "seq2seq" else 1}  # fmt: skip
    layers = adapter.parts["self"].whole().detach().chunk(len(mixers), 1)
    stored = [torch.zeros_like(layer) for layer in layers]
    for layer, at in zip(layers, order := _read_by(names, len(mixers)), strict=True):
        stored[at] = layer
    if not all(torch.equal(stored[at], layer) for layer, at in zip(layers, order, strict=True)):
        raise ValueError(f"save: of an encoder-decoder with {len(mixers)} layers PEFT reads every second one's prefix, "
                         "twice, and here they differ: save with format='headway'")  # fmt: skip
    return {"prompt_embeddings": torch.cat(stored, 1)}, config
