"""RoBERTa (1907.11692), and with it XLM-R (1911.02116) and CamemBERT (1911.03894): BERT with other heads, whose
positions begin behind the id of padding."""

from __future__ import annotations

from typing import Any

from headway.families import ACTIVATIONS, Config, Facts, Published, Rule, linear, published_activation, published_labels
from headway.families.bert import body

TYPES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
POOL = {"pool": "first", "dense": True, "activation": "tanh"}
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
    width, eps = config.size("hidden_size"), config.take("layer_norm_eps", 1e-12, float)
    vocab, pad, labels = config.size("vocab_size"), config.take("pad_token_id", 1, int), config.labels()
    length = config.size("max_position_embeddings", 512) - pad - 1
    if not 0 <= pad <= 15 or length < 1:
        raise ValueError(f"{config.where}: pad_token_id is {pad} and leaves {length} positions; expected 1 or so")
    mixer = {"name": "attention", "heads": config.size("num_attention_heads"), "bias": True}
    hidden = {"hidden": config.size("intermediate_size"),
              "activation": config.choose("hidden_act", ACTIVATIONS, "gelu")}  # fmt: skip
    block = {"mixer": mixer, "feedforward": hidden, "norm": "layer", "norm_eps": eps, "wiring": "post"}
    heads = {
        "pool": POOL,
        "lm": {"dense": True, "activation": "gelu", "norm": "layer", "norm_eps": eps, "outputs": vocab, "tie": True},
        "classify": {**POOL, "outputs": len(labels), "labels": labels},
        "tokens": {"outputs": len(labels), "labels": labels},
        "spans": {"outputs": 2},
    }
    architecture = config.architecture or f"{TYPES[kind]}Model"
    if (ending := architecture.removeprefix(TYPES[kind])) not in HEADS:
        known = ", ".join(TYPES[kind] + ending for ending in HEADS)
        raise ValueError(f"{config.where}: architecture {architecture} is not read; there is {known}")
    spec = {
        "kind": "encoder",
        "width": width,
        "vocab": vocab,
        "types": config.size("type_vocab_size", 2),
        "dropout": config.take("hidden_dropout_prob", 0.1, float),
        "stack": {
            "blocks": [block],
            "repeat": config.depth("num_hidden_layers"),
            "positions": {"name": "learned", "length": length, "offset": pad + 1},
            "first_norm": True,
            "final_norm": False,
        },
        "heads": {name: heads[name] for name in HEADS[ending]},
    }
    facts = Facts(family="roberta", type=kind, max_tokens=length, bos=config.take("bos_token_id", 0, int),
                  eos=config.ids("eos_token_id"), pad=pad, original=config.original())  # fmt: skip
    unused = () if "pool" in spec["heads"] else ("*pooler.dense.*",)
    return Published(spec, facts, rules(spec), "roberta.", ("*position_ids", *unused))


def rules(spec: dict[str, Any]) -> list[Rule]:
    """Their names by ours."""
    found, heads = body(spec, "roberta"), spec["heads"]
    if "pool" in heads:
        found += linear("heads.pool.dense", "roberta.pooler.dense")
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
    block, stack, heads = spec["stack"]["blocks"][0], spec["stack"], spec["heads"]
    ending = next((name for name, kept in HEADS.items() if set(kept) == set(heads)), None)
    if ending is None:
        raise ValueError(f"{facts.type}: no published architecture has the heads {', '.join(heads) or 'none'}")
    return {
        **facts.original,
        "architectures": [TYPES[facts.type] + ending],
        "model_type": facts.type,
        "hidden_size": spec["width"],
        "vocab_size": spec["vocab"],
        "type_vocab_size": spec["types"],
        "hidden_dropout_prob": spec["dropout"],
        "num_hidden_layers": stack["repeat"],
        "num_attention_heads": block["mixer"]["heads"],
        "intermediate_size": block["feedforward"]["hidden"],
        "hidden_act": published_activation(block["feedforward"]["activation"]),
        "layer_norm_eps": block["norm_eps"],
        "max_position_embeddings": stack["positions"]["length"] + stack["positions"]["offset"],
        "pad_token_id": facts.pad,
        "bos_token_id": facts.bos,
        "eos_token_id": facts.eos[0] if len(facts.eos) == 1 else list(facts.eos) or None,
        **published_labels(spec),
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
