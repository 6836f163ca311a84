"""BERT (1810.04805), and with it MiniLM (2002.10957): an encoder with learned positions, types, post-norm."""

from __future__ import annotations

from collections.abc import Callable
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

TYPES = ("bert",)
POOL = {"pool": "first", "dense": True, "activation": "tanh"}
HEADS = {  # what each architecture puts behind the stack
    "BertModel": ("pool",),
    "BertForPreTraining": ("lm", "next"),
    "BertForNextSentencePrediction": ("next",),
    "BertForMaskedLM": ("lm",),
    "BertForSequenceClassification": ("classify",),
    "BertForTokenClassification": ("tokens",),
    "BertForQuestionAnswering": ("spans",),
}


def read(config: Config) -> Published:
    config.expect("is_decoder", False)
    config.expect("add_cross_attention", False)
    config.expect("position_embedding_type", "absolute")
    config.expect("tie_word_embeddings", True)
    config.expect("directionality", "bidi")
    config.expect("pooler_type", "first_token_transform")
    config.ignore("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head")
    config.ignore("attention_probs_dropout_prob", "classifier_dropout", "bos_token_id", "eos_token_id")
    length, activation = config.size("max_position_embeddings", 512), config.choose("hidden_act", ACTIVATIONS, "gelu")
    mixer = {"name": "attention", "heads": config.size("num_attention_heads"), "bias": True}
    positions = {"name": "learned", "length": length}
    heads = {**heads_of(config, activation), "next": {**POOL, "outputs": 2, "labels": ("next", "random")}}
    kept = {name: heads[name] for name in HEADS[config.ending(HEADS, default="BertModel")]}
    blocks = [{"mixer": mixer, **block_of(config)}]
    spec = encoder(config, blocks, config.depth("num_hidden_layers"), positions, kept)
    pad = config.take("pad_token_id", 0, int)
    facts = Facts(family="bert", type="bert", max_tokens=length, pad=pad, original=config.original())
    unused = () if {"pool", "next", "classify"} & set(spec["heads"]) else ("*pooler.dense.*", "cls.seq_relationship.*")
    return Published(spec, facts, rules(spec), "bert.", ("*position_ids", *unused))


def block_of(config: Config) -> dict[str, Any]:
    """A block of BERT's and of those that follow it, but for what mixes its tokens."""
    activation = config.choose("hidden_act", ACTIVATIONS, "gelu")
    hidden = {"hidden": config.size("intermediate_size"), "activation": activation}
    eps = config.take("layer_norm_eps", 1e-12, float)
    return {"feedforward": hidden, "norm": "layer", "norm_eps": eps, "wiring": "post"}


def heads_of(config: Config, activation: str) -> dict[str, Any]:
    """The heads that they have in common; `activation`: of the masked model's."""
    vocab, eps, labels = config.size("vocab_size"), config.take("layer_norm_eps", 1e-12, float), config.labels()
    lm = {"dense": True, "activation": activation, "norm": "layer", "norm_eps": eps, "outputs": vocab, "tie": True}
    return {
        "pool": POOL,
        "lm": lm,
        "classify": {**POOL, "outputs": len(labels), "labels": labels},
        "tokens": {"outputs": len(labels), "labels": labels},
        "spans": {"outputs": 2},
    }


def encoder(
    config: Config, blocks: list[dict[str, Any]], repeat: int, positions: dict[str, Any], heads: dict[str, Any]
) -> dict[str, Any]:
    """The spec that they have in common."""
    return {
        "kind": "encoder",
        "width": config.size("hidden_size"),
        "vocab": config.size("vocab_size"),
        "types": config.size("type_vocab_size", 2),
        "dropout": config.take("hidden_dropout_prob", 0.1, float),
        "stack": {"blocks": blocks, "repeat": repeat, "positions": positions, "first_norm": True, "final_norm": False},
        "heads": heads,
    }


def projections(ours: str, theirs: str) -> list[Rule]:
    """Of one mixer: into queries, keys and values."""
    return linear(f"{ours}.query", f"{theirs}.query") + linear(
        f"{ours}.key_value", (f"{theirs}.key", f"{theirs}.value")
    )


def body(spec: dict[str, Any], root: str, project: Callable[[str, str], list[Rule]] = projections) -> list[Rule]:
    """Their names by ours, heads apart; they begin with `root`."""
    found = [Rule(("embedding.weight",), (f"{root}.embeddings.word_embeddings.weight",)),
             Rule(("types.weight",), (f"{root}.embeddings.token_type_embeddings.weight",)),
             Rule(("stack.positions.table.weight",), (f"{root}.embeddings.position_embeddings.weight",)),
             *linear("stack.first_norm", f"{root}.embeddings.LayerNorm")]  # fmt: skip
    for i in range(len(spec["stack"]["blocks"]) * spec["stack"]["repeat"]):
        ours, theirs = f"stack.blocks.{i}", f"{root}.encoder.layer.{i}"
        found += project(f"{ours}.mixer.inner", f"{theirs}.attention.self")
        found += linear(f"{ours}.mixer.inner.out", f"{theirs}.attention.output.dense")
        found += linear(f"{ours}.mixer.after", f"{theirs}.attention.output.LayerNorm")
        found += linear(f"{ours}.feedforward.inner.enter", f"{theirs}.intermediate.dense")
        found += linear(f"{ours}.feedforward.inner.leave", f"{theirs}.output.dense")
        found += linear(f"{ours}.feedforward.after", f"{theirs}.output.LayerNorm")
    return found


def rules(spec: dict[str, Any]) -> list[Rule]:
    """Their names by ours."""
    found = body(spec, "bert")
    heads = spec["heads"]
    if "pool" in heads:
        found += linear("heads.pool.dense", "bert.pooler.dense")
    if "lm" in heads:
        found += linear("heads.lm.dense", "cls.predictions.transform.dense")
        found += linear("heads.lm.norm", "cls.predictions.transform.LayerNorm")
        found.append(Rule(("heads.lm.out.weight",), ("cls.predictions.decoder.weight",)))  # tied: may be left out
        found.append(Rule(("heads.lm.out.bias",), ("cls.predictions.bias",)))
    if "next" in heads:
        found += linear("heads.next.dense", "bert.pooler.dense") + linear("heads.next.out", "cls.seq_relationship")
    if "classify" in heads:
        found += linear("heads.classify.dense", "bert.pooler.dense") + linear("heads.classify.out", "classifier")
    if "tokens" in heads:
        found += linear("heads.tokens.out", "classifier")
    if "spans" in heads:
        found += linear("heads.spans.out", "qa_outputs")
    return found


def write(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**written(spec, facts), "architectures": [published_ending("bert", HEADS, spec["heads"])]}


def written(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """What their configurations have in common."""
    stack = spec["stack"]
    block, positions = stack["blocks"][0], stack["positions"]
    return {
        **facts.original,
        "model_type": facts.type,
        "hidden_size": spec["width"],
        "vocab_size": spec["vocab"],
        "type_vocab_size": spec["types"],
        "hidden_dropout_prob": spec["dropout"],
        "num_hidden_layers": len(stack["blocks"]) * stack["repeat"],
        "num_attention_heads": block["mixer"]["heads"],
        "intermediate_size": block["feedforward"]["hidden"],
        "hidden_act": published_activation(block["feedforward"]["activation"]),
        "layer_norm_eps": block["norm_eps"],
        "max_position_embeddings": positions["length"] + positions.get("offset", 0),
        "pad_token_id": facts.pad,
        **published_labels(spec),
    }


def tiny() -> list[dict[str, Any]]:
    small = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
             "intermediate_size": 48, "vocab_size": 99, "max_position_embeddings": 40, "type_vocab_size": 3,
             "hidden_dropout_prob": 0.1, "layer_norm_eps": 1e-12}  # fmt: skip
    return [{**small, "architectures": [name], **({"num_labels": 3} if "Classif" in name else {})} for name in HEADS]
