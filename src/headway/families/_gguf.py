"""A GGUF file as a published checkpoint: its metadata as a configuration, its tensors under transformers' names.

Format and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway import families
from headway.families import Config, Published
from headway.gguf import Gguf, GgufTensors, unpermute
from headway.positions import Rotary
from headway.spec import RotaryScaling, nearest

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_FREQS = "rope_freqs.weight"  # not learned: how much slower llama3's scaling makes each angle


class Renamed(Mapping[str, Tensor]):
    """The tensors of a file under transformers' names, each made when it is asked for; `heads`, by name, of those whose
    rows are to be put back in order."""

    def __init__(self, tensors: GgufTensors, heads: dict[str, int]) -> None:
        self._tensors, self._heads = tensors, heads
        self._theirs = {_name(name): name for name in tensors if name != ROPE_FREQS}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._tensors.shapes
        return {ours: shapes[theirs] for ours, theirs in self._theirs.items()}

    def __getitem__(self, name: str) -> Tensor:
        theirs = self._theirs[name]
        part = theirs.split(".")[-2] if "." in theirs else ""
        return unpermute(self._tensors[theirs], self._heads[part]) if part in self._heads else self._tensors[theirs]

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first row, rows), a few megabytes at a time; whole, where rows are to be put back in order."""
        for name in names:
            theirs = self._theirs[name]
            if "." in theirs and theirs.split(".")[-2] in self._heads:
                yield name, 0, self[name]
            else:
                yield from ((name, start, rows) for _, start, rows in self._tensors.stream([theirs]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._theirs)

    def __len__(self) -> int:
        return len(self._theirs)


def read(file: Gguf, where: Path) -> tuple[Published, Renamed]:
    """What the file's metadata says of the model, and its weights; a key or kind that is not known is a ValueError."""
    kind = file.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{where}: GGUF architecture {kind!r:.40} is not read{nearest(str(kind), ARCHITECTURES)}")
    told = Config(_under(f"{kind}.", file.metadata), f"{where}: {kind}")
    config = _config(told, kind, file, where)
    told.finish()
    found = families.read(config, str(where))
    permuted = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return found, Renamed(file.tensors, permuted if kind == "llama" else {})


def _config(told: Config, kind: str, file: Gguf, where: Path) -> dict[str, Any]:
    """transformers' configuration of the same model."""
    shapes = file.tensors.shapes
    told.ignore("rope.scaling.finetuned", "rope.scaling.original_context_length", "vocab_size")
    width, heads = told.size("embedding_length"), told.size("attention.head_count")
    head_dim = told.size("attention.key_length", max(width // heads, 1))
    for other in ("attention.value_length", "rope.dimension_count"):
        told.expect(other, head_dim)
    if len(shape := shapes.get("token_embd.weight", ())) != 2:
        raise ValueError(f"{where}: token_embd.weight is missing or no matrix, so there is no model here")
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": shape[0],
        "hidden_size": width,
        "num_hidden_layers": told.depth("block_count"),
        "intermediate_size": told.size("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": told.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _short(told.take("attention.layer_norm_rms_epsilon", kind=float)),
        "max_position_embeddings": told.size("context_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": _rope(told, head_dim, file, where),
        **_specials(Config(_under("tokenizer.ggml.", file.metadata), f"{where}: tokenizer.ggml")),
    }
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_output.bias" in shapes
    if kind == "llama":
        config["mlp_bias"] = "blk.0.ffn_down.bias" in shapes
    return config


def _rope(told: Config, head_dim: int, file: Gguf, where: Path) -> dict[str, Any]:
    base = _short(told.take("rope.freq_base", 10000.0, float))
    scaling = told.choose("rope.scaling.type", {"none": "default", "linear": "linear"}, "none")
    factor = told.take("rope.scaling.factor", 1.0, float)
    if ROPE_FREQS not in file.tensors:
        return {"rope_type": scaling, "rope_theta": base, **({"factor": factor} if scaling == "linear" else {})}
    slower = file.tensors[ROPE_FREQS].float()
    llama3 = RotaryScaling(name="llama3", factor=max(float(slower.max()), 1.0))  # the file tells no more than this
    wanted = Rotary(head_dim, base).rates / Rotary(head_dim, base, llama3).rates
    if scaling != "default" or slower.shape != wanted.shape or not torch.allclose(slower, wanted, rtol=1e-4):
        raise ValueError(f"{where}: {ROPE_FREQS} is not the scaling of Llama 3 (factor {llama3.factor:g}); not read")
    return {"rope_type": "llama3", "rope_theta": base, "factor": llama3.factor, "low_freq_factor": llama3.low,
            "high_freq_factor": llama3.high, "original_max_position_embeddings": llama3.trained}  # fmt: skip


def _specials(told: Config) -> dict[str, Any]:
    """The ids that begin and end a text, or a turn of a chat."""
    ends = [told.take(f"{name}_token_id", None, int) for name in ("eos", "eot", "eom")]
    return {
        "bos_token_id": told.take("bos_token_id", None, int),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
        "pad_token_id": told.take("padding_token_id", None, int),
    }


def _under(prefix: str, metadata: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def _short(value: float) -> float:
    """The number that was meant by one stored in four bytes."""
    return float(f"{value:.7g}")


def _name(theirs: str) -> str:
    """transformers' name of a tensor; one that is not known stays as it is, and is refused by it."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", theirs)
    if not found or found[2] not in NAMES:
        return theirs
    layer = f"model.layers.{int(found[1])}." if found[1] else ""
    return f"{layer}{NAMES[found[2]]}.{found[3]}"
