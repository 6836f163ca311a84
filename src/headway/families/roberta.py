"""RoBERTa (1907.11692), and with it XLM-R (1911.02116) and CamemBERT (1911.03894): BERT with other heads, whose
positions begin behind the id of padding."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from headway.families import Config, Facts, Published, Rule, linear, published_ending, published_ids
from headway.families.bert import block_of, body, encoder, heads_of, written

TYPES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
HEADS = {  # what each architecture puts behind the stack
    "Model": ("pool",),
    "ForMaskedLM": ("lm",),
    "ForSequenceClassification": ("classify",),
    "ForTokenClassification": ("tokens",),
    "ForQuestionAnswering": ("spans",),
}


def read(config: Config) -> Published:
    kind = config.take("model_type")
    config.expect("is_decoder", False)
    config.expect("add_cross_attention", False)
    config.expect("position_embedding_type", "absolute")
    config.expect("tie_word_embeddings", True)
    config.ignore("attention_probs_dropout_prob", "classifier_dropout")
    pad = config.take("pad_token_id", 1, int)
    length = config.size("max_position_embeddings", 512) - pad - 1
    if not 0 <= pad <= 15 or length < 1:
        raise ValueError(f"{config.where}: pad_token_id is {pad} and leaves {length} positions; expected 1 or so")
    mixer = {"name": "attention", "heads": config.size("num_attention_heads"), "bias": True}
    positions = {"name": "learned", "length": length, "offset": pad + 1}
    heads = heads_of(config, "gelu")
    kept = {name: heads[name] for name in HEADS[config.ending(HEADS, TYPES[kind])]}
    blocks = [{"mixer": mixer, **block_of(config)}]
    spec = encoder(config, blocks, config.depth("num_hidden_layers"), positions, kept)
    facts = Facts(family="roberta", type=kind, max_tokens=length, bos=config.take("bos_token_id", 0, int),
                  eos=config.ids("eos_token_id"), pad=pad, original=config.original())  # fmt: skip
    unused = () if "pool" in spec["heads"] else ("*pooler.dense.*",)
    return Published(spec, facts, rules(spec), "roberta.", ("*position_ids", *unused))


def rules(spec: dict[str, Any]) -> list[Rule]:
    """Their names by ours."""
    return body(spec, "roberta") + tail(spec["heads"], "roberta")


def tail(heads: Collection[str], root: str) -> list[Rule]:
    """Those of the heads."""
    found: list[Rule] = []
    if "pool" in heads:
        found += linear("heads.pool.dense", f"{root}.pooler.dense")
    if "lm" in heads:
        found += linear("heads.lm.dense", "lm_head.dense") + linear("heads.lm.norm", "lm_head.layer_norm")
        found.append(Rule(("heads.lm.out.weight",), ("lm_head.decoder.weight",)))  # tied: may be left out
        found.append(Rule(("heads.lm.out.bias",), ("lm_head.bias",)))
        found.append(Rule(("heads.lm.out.bias",), ("lm_head.decoder.bias",)))  # the same again, in some files
    if "classify" in heads:
        found += linear("heads.classify.dense", "classifier.dense")
        found += linear("heads.classify.out", "classifier.out_proj")
    if "tokens" in heads:
        found += linear("heads.tokens.out", "classifier")
    if "spans" in heads:
        found += linear("heads.spans.out", "qa_outputs")
    return found


def write(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {
        **written(spec, facts),
        "architectures": [TYPES[facts.type] + published_ending(facts.type, HEADS, spec["heads"])],
        "bos_token_id": facts.bos,
        "eos_token_id": published_ids(facts.eos),
    }


def tiny() -> list[dict[str, Any]]:
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
             "vocab_size": 99, "max_position_embeddings": 42, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
             "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
    names = [("roberta", ending) for ending in HEADS] + [("xlm-roberta", "ForMaskedLM"), ("xlm-roberta", "Model"),
                                                         ("camembert", "ForTokenClassification")]  # fmt: skip
    return [
        {**small, "model_type": kind, "architectures": [TYPES[kind] + ending],
         **({"num_labels": 3} if "Classif" in ending else {})}
        for kind, ending in names
    ]  # fmt: skip
