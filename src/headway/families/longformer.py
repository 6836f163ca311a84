"""Longformer (2004.05150): RoBERTa over windows, whose global tokens look with projections of their own.

Which tokens are global is the task's: the first one to classify a text, the question's to answer it; else none.
"""

from __future__ import annotations

from typing import Any

from headway.families import ACTIVATIONS, Config, Facts, Published, Rule, linear, published_activation, published_labels

TYPES = ("longformer",)
POOL = {"pool": "first", "dense": True, "activation": "tanh"}
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
    width, eps = config.size("hidden_size"), config.take("layer_norm_eps", 1e-12, float)
    vocab, depth, pad = (
        config.size("vocab_size"),
        config.depth("num_hidden_layers"),
        config.take("pad_token_id", 1, int),
    )
    length = config.size("max_position_embeddings") - pad - 1  # rows of the table up to that of padding stand unused
    hidden = {"hidden": config.size("intermediate_size"),
              "activation": config.choose("hidden_act", ACTIVATIONS, "gelu")}  # fmt: skip
    block = {"feedforward": hidden, "norm": "layer", "norm_eps": eps, "wiring": "post"}
    blocks, repeat = windowed(config, block, config.size("num_attention_heads"), depth)
    labels = config.labels()
    heads = {
        "pool": POOL,
        "lm": {"dense": True, "activation": "gelu", "norm": "layer", "norm_eps": eps, "outputs": vocab, "tie": True},
        "classify": {**POOL, "outputs": len(labels), "labels": labels},
        "tokens": {"outputs": len(labels), "labels": labels},
        "spans": {"outputs": 2},
    }
    architecture = config.architecture or "LongformerModel"
    if architecture not in HEADS:
        raise ValueError(f"{config.where}: architecture {architecture} is not read; there is {', '.join(HEADS)}")
    spec = {
        "kind": "encoder",
        "width": width,
        "vocab": vocab,
        "types": config.size("type_vocab_size", 2),
        "dropout": config.take("hidden_dropout_prob", 0.1, float),
        "stack": {
            "blocks": blocks,
            "repeat": repeat,
            "positions": {"name": "learned", "length": length, "offset": pad + 1},
            "first_norm": True,
            "final_norm": False,
        },
        "heads": {name: heads[name] for name in HEADS[architecture]},
    }
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
    found = [Rule(("embedding.weight",), ("longformer.embeddings.word_embeddings.weight",)),
             Rule(("types.weight",), ("longformer.embeddings.token_type_embeddings.weight",)),
             Rule(("stack.positions.table.weight",), ("longformer.embeddings.position_embeddings.weight",)),
             *linear("stack.first_norm", "longformer.embeddings.LayerNorm")]  # fmt: skip
    for i in range(len(spec["stack"]["blocks"]) * spec["stack"]["repeat"]):
        ours, theirs = f"stack.blocks.{i}", f"longformer.encoder.layer.{i}"
        found += projections(f"{ours}.mixer.inner", f"{theirs}.attention.self")
        found += linear(f"{ours}.mixer.inner.out", f"{theirs}.attention.output.dense")
        found += linear(f"{ours}.mixer.after", f"{theirs}.attention.output.LayerNorm")
        found += linear(f"{ours}.feedforward.inner.enter", f"{theirs}.intermediate.dense")
        found += linear(f"{ours}.feedforward.inner.leave", f"{theirs}.output.dense")
        found += linear(f"{ours}.feedforward.after", f"{theirs}.output.LayerNorm")
    heads = spec["heads"]
    if "pool" in heads:
        found += linear("heads.pool.dense", "longformer.pooler.dense")
    if "lm" in heads:
        found += linear("heads.lm.dense", "lm_head.dense") + linear("heads.lm.norm", "lm_head.layer_norm")
        found += linear("heads.lm.out", "lm_head.decoder")  # both tied: they may be left out
        found.append(Rule(("heads.lm.out.bias",), ("lm_head.bias",)))
    if "classify" in heads:
        found += linear("heads.classify.dense", "classifier.dense")
        found += linear("heads.classify.out", "classifier.out_proj")
    if "tokens" in heads:
        found += linear("heads.tokens.out", "classifier")
    if "spans" in heads:
        found += linear("heads.spans.out", "qa_outputs")
    return found


def projections(ours: str, theirs: str) -> list[Rule]:
    """Of one mixer: into queries, keys and values, and those of global tokens."""
    found = linear(f"{ours}.query_key", (f"{theirs}.query", f"{theirs}.key"))
    found += linear(f"{ours}.value", f"{theirs}.value")
    for part in ("query", "key", "value"):
        found += linear(f"{ours}.global_{part}", f"{theirs}.{part}_global")
    return found


def write(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    stack, heads = spec["stack"], tuple(spec["heads"])
    architecture = next((name for name, kept in HEADS.items() if set(kept) == set(heads)), None)
    if architecture is None:
        raise ValueError(f"longformer: no published architecture has the heads {', '.join(heads) or 'none'}")
    block, positions, windows = stack["blocks"][0], stack["positions"], published_windows(stack)
    return {
        **facts.original,
        "architectures": [architecture],
        "model_type": "longformer",
        "hidden_size": spec["width"],
        "vocab_size": spec["vocab"],
        "type_vocab_size": spec["types"],
        "hidden_dropout_prob": spec["dropout"],
        "num_hidden_layers": len(windows),
        "num_attention_heads": block["mixer"]["heads"],
        "attention_window": windows,
        "intermediate_size": block["feedforward"]["hidden"],
        "hidden_act": published_activation(block["feedforward"]["activation"]),
        "layer_norm_eps": block["norm_eps"],
        "max_position_embeddings": positions["length"] + positions["offset"],
        "pad_token_id": facts.pad,
        "sep_token_id": facts.globals["spans"],
        **published_labels(spec),
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
