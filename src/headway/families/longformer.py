"""Longformer (2004.05150): RoBERTa over windows, whose global tokens look with projections of their own.

Which tokens are global is the task's: the first one to classify a text, the question's to answer it; else none.
"""

from __future__ import annotations

from typing import Any

from headway.families import Config, Facts, Published, Rule, linear, published_ending
from headway.families.bert import block_of, body, encoder, heads_of, written
from headway.families.roberta import tail

TYPES = ("longformer",)
HEADS = {  # what each architecture puts behind the stack
    "LongformerModel": ("pool",),
    "LongformerForMaskedLM": ("lm",),
    "LongformerForSequenceClassification": ("classify",),
    "LongformerForTokenClassification": ("tokens",),
    "LongformerForQuestionAnswering": ("spans",),
}


def read(config: Config) -> Published:
    config.expect("tie_word_embeddings", True)
    config.expect("attention_mode", "longformer")
    config.expect("ignore_attention_mask", False)
    config.ignore("attention_probs_dropout_prob", "classifier_dropout", "bos_token_id", "eos_token_id", "onnx_export")
    depth, pad = config.depth("num_hidden_layers"), config.take("pad_token_id", 1, int)
    length = config.size("max_position_embeddings") - pad - 1  # rows of the table up to that of padding stand unused
    blocks, repeat = windowed(config, block_of(config), config.size("num_attention_heads"), depth)
    positions = {"name": "learned", "length": length, "offset": pad + 1}
    heads = heads_of(config, "gelu")
    kept = {name: heads[name] for name in HEADS[config.ending(HEADS, default="LongformerModel")]}
    spec = encoder(config, blocks, repeat, positions, kept)
    facts = Facts(
        family="longformer",
        type="longformer",
        max_tokens=length,
        pad=pad,
        globals={"classify": "first", "spans": config.take("sep_token_id", 2, int)},
        original=config.original(),
    )
    unused = ["*position_ids"] + ["*pooler.dense.*"] * ("pool" not in spec["heads"])
    return Published(spec, facts, rules(spec), "longformer.", tuple(unused))


def windowed(config: Config, block: dict[str, Any], heads: int, depth: int) -> tuple[list[dict[str, Any]], int]:
    """The blocks of a stack and how often they repeat: each has a window of its own, and often all have the same."""
    told = config.take("attention_window", 512, (int, list))
    windows = told if isinstance(told, list) else [told]
    if any(type(window) is not int or window < 2 or window % 2 for window in windows):
        raise ValueError(f"{config.where}: an attention_window is an even number from 2 on, not {told!r:.60}")
    if isinstance(told, list) and len(windows) != depth:
        raise ValueError(f"{config.where}: {len(windows)} attention windows for {depth} layers: give one a layer")
    alike = len(set(windows)) == 1
    mixer = {"name": "longformer", "heads": heads, "bias": True, "global_projections": True}
    windows, repeat = (windows[:1], depth) if alike else (windows, 1)
    return [{**block, "mixer": {**mixer, "window": window // 2}} for window in windows], repeat


def published_windows(stack: dict[str, Any]) -> list[int]:
    """`attention_window`, one a layer."""
    return [2 * block["mixer"]["window"] for block in stack["blocks"]] * stack["repeat"]


def rules(spec: dict[str, Any]) -> list[Rule]:
    """Their names by ours."""
    return body(spec, "longformer", projections) + tail(spec["heads"], "longformer")


def projections(ours: str, theirs: str) -> list[Rule]:
    """Of one mixer: into queries, keys and values, and those of global tokens."""
    found = linear(f"{ours}.query_key", (f"{theirs}.query", f"{theirs}.key"))
    found += linear(f"{ours}.value", f"{theirs}.value")
    for part in ("query", "key", "value"):
        found += linear(f"{ours}.global_{part}", f"{theirs}.{part}_global")
    return found


def write(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {
        **written(spec, facts),
        "architectures": [published_ending("longformer", HEADS, spec["heads"])],
        "attention_window": published_windows(spec["stack"]),
        "sep_token_id": facts.globals["spans"],
    }


def tiny() -> list[dict[str, Any]]:
    small = {"model_type": "longformer", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
             "intermediate_size": 48, "vocab_size": 99, "max_position_embeddings": 42, "type_vocab_size": 3,
             "attention_window": 4, "hidden_dropout_prob": 0.1, "layer_norm_eps": 1e-5, "sep_token_id": 4}  # fmt: skip
    more: dict[str, dict[str, Any]] = {
        "LongformerForMaskedLM": {"attention_window": [4, 8, 4]},
        "LongformerForSequenceClassification": {"num_labels": 3},
        "LongformerForTokenClassification": {"num_labels": 3, "hidden_act": "relu"},
    }
    return [{**small, "architectures": [name], **more.get(name, {})} for name in HEADS]
