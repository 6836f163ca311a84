"""DistilBERT (1910.01108): half of BERT's layers, without types of tokens and without a pool."""

from __future__ import annotations

from typing import Any

from headway.families import (
    ACTIVATIONS,
    Config,
    Facts,
    Published,
    Rule,
    linear,
    published_activation,
    published_ending,
    published_labels,
)

TYPES = ("distilbert",)
EPS = 1e-12
HEADS = {  # what each architecture puts behind the stack
    "DistilBertModel": (),
    "DistilBertForMaskedLM": ("lm",),
    "DistilBertForSequenceClassification": ("classify",),
    "DistilBertForTokenClassification": ("tokens",),
    "DistilBertForQuestionAnswering": ("spans",),
}


def read(config: Config) -> Published:
    config.expect("tie_word_embeddings", True)
    config.expect("tie_weights_", True)
    config.ignore("attention_dropout", "qa_dropout", "seq_classif_dropout", "bos_token_id", "eos_token_id",
                  "sinusoidal_pos_embds")  # how the table of positions began; it is in the file  # fmt: skip
    vocab, length, labels = config.size("vocab_size"), config.size("max_position_embeddings", 512), config.labels()
    activation = config.choose("activation", ACTIVATIONS, "gelu")
    block = {
        "mixer": {"name": "attention", "heads": config.size("n_heads"), "bias": True},
        "feedforward": {"hidden": config.size("hidden_dim"), "activation": activation},
        "norm": "layer",
        "norm_eps": EPS,
        "wiring": "post",
    }
    heads = {
        "lm": {"dense": True, "activation": activation, "norm": "layer", "norm_eps": EPS, "outputs": vocab,
               "tie": True},
        "classify": {"pool": "first", "dense": True, "activation": "relu", "outputs": len(labels), "labels": labels},
        "tokens": {"outputs": len(labels), "labels": labels},
        "spans": {"outputs": 2},
    }  # fmt: skip
    spec = {
        "kind": "encoder",
        "width": config.size("dim"),
        "vocab": vocab,
        "dropout": config.take("dropout", 0.1, float),
        "stack": {
            "blocks": [block],
            "repeat": config.depth("n_layers"),
            "positions": {"name": "learned", "length": length},
            "first_norm": True,
            "final_norm": False,
        },
        "heads": {name: heads[name] for name in HEADS[config.ending(HEADS, default="DistilBertModel")]},
    }
    pad = config.take("pad_token_id", 0, int)
    facts = Facts(family="distilbert", type="distilbert", max_tokens=length, pad=pad, original=config.original())
    return Published(spec, facts, rules(spec), "distilbert.", ("*position_ids",))


def rules(spec: dict[str, Any]) -> list[Rule]:
    """Their names by ours."""
    found = [Rule(("embedding.weight",), ("distilbert.embeddings.word_embeddings.weight",)),
             Rule(("stack.positions.table.weight",), ("distilbert.embeddings.position_embeddings.weight",)),
             *linear("stack.first_norm", "distilbert.embeddings.LayerNorm")]  # fmt: skip
    for i in range(spec["stack"]["repeat"]):
        ours, theirs = f"stack.blocks.{i}", f"distilbert.transformer.layer.{i}"
        attention = f"{theirs}.attention"
        found += linear(f"{ours}.mixer.inner.query", f"{attention}.q_lin")
        found += linear(f"{ours}.mixer.inner.key_value", (f"{attention}.k_lin", f"{attention}.v_lin"))
        found += linear(f"{ours}.mixer.inner.out", f"{attention}.out_lin")
        found += linear(f"{ours}.mixer.after", f"{theirs}.sa_layer_norm")
        found += linear(f"{ours}.feedforward.inner.enter", f"{theirs}.ffn.lin1")
        found += linear(f"{ours}.feedforward.inner.leave", f"{theirs}.ffn.lin2")
        found += linear(f"{ours}.feedforward.after", f"{theirs}.output_layer_norm")
    heads = spec["heads"]
    if "lm" in heads:
        found += linear("heads.lm.dense", "vocab_transform") + linear("heads.lm.norm", "vocab_layer_norm")
        found += linear("heads.lm.out", "vocab_projector")  # its weight is tied: may be left out
    if "classify" in heads:
        found += linear("heads.classify.dense", "pre_classifier") + linear("heads.classify.out", "classifier")
    if "tokens" in heads:
        found += linear("heads.tokens.out", "classifier")
    if "spans" in heads:
        found += linear("heads.spans.out", "qa_outputs")
    return found


def write(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    block, stack, heads = spec["stack"]["blocks"][0], spec["stack"], spec["heads"]
    return {
        **facts.original,
        "architectures": [published_ending("distilbert", HEADS, heads)],
        "model_type": "distilbert",
        "dim": spec["width"],
        "vocab_size": spec["vocab"],
        "dropout": spec["dropout"],
        "n_layers": stack["repeat"],
        "n_heads": block["mixer"]["heads"],
        "hidden_dim": block["feedforward"]["hidden"],
        "activation": published_activation(block["feedforward"]["activation"]),
        "max_position_embeddings": stack["positions"]["length"],
        "pad_token_id": facts.pad,
        **published_labels(spec),
    }


def tiny() -> list[dict[str, Any]]:
    small = {"model_type": "distilbert", "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99,
             "max_position_embeddings": 40}  # fmt: skip
    return [{**small, "architectures": [name], **({"num_labels": 3} if "Classif" in name else {})} for name in HEADS]
