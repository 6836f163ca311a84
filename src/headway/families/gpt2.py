"""GPT-2 (Radford et al. 2019): a decoder with learned positions and pre-norm; its matrices are stored transposed."""

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
    published_ids,
    published_labels,
)

TYPES = ("gpt2",)
HEADS = {  # what each architecture puts behind the stack
    "GPT2Model": (),
    "GPT2LMHeadModel": ("lm",),
    "GPT2ForSequenceClassification": ("classify",),
    "GPT2ForTokenClassification": ("tokens",),
    "GPT2ForQuestionAnswering": ("spans",),
}


def read(config: Config) -> Published:
    config.expect("scale_attn_weights", True)
    config.expect("scale_attn_by_inverse_layer_idx", False)
    config.expect("reorder_and_upcast_attn", False)
    config.expect("add_cross_attention", False)
    config.ignore("embd_pdrop", "attn_pdrop", "classifier_dropout", "n_ctx", "summary_type", "summary_use_proj",
                  "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "is_decoder")  # fmt: skip
    width, vocab, length = config.size("n_embd"), config.size("vocab_size"), config.size("n_positions", 1024)
    block = {
        "mixer": {"name": "attention", "heads": config.size("n_head"), "bias": True},
        "feedforward": {"hidden": config.size("n_inner", 4 * width),
                        "activation": config.choose("activation_function", ACTIVATIONS, "gelu_new")},
        "norm": "layer",
        "norm_eps": config.take("layer_norm_epsilon", 1e-5, float),
        "wiring": "pre",
    }  # fmt: skip
    labels = config.labels()
    heads = {
        "lm": {"outputs": vocab, "bias": False, "tie": config.take("tie_word_embeddings", True, bool)},
        "classify": {"pool": "last", "outputs": len(labels), "bias": False, "labels": labels},
        "tokens": {"outputs": len(labels), "labels": labels},
        "spans": {"outputs": 2},
    }
    spec = {
        "kind": "decoder",
        "width": width,
        "vocab": vocab,
        "dropout": config.take("resid_pdrop", 0.1, float),
        "stack": {
            "blocks": [block],
            "repeat": config.depth("n_layer"),
            "positions": {"name": "learned", "length": length},
        },
        "heads": {name: heads[name] for name in HEADS[config.ending(HEADS, default="GPT2LMHeadModel")]},
    }
    facts = Facts(family="gpt2", type="gpt2", max_tokens=length, bos=config.take("bos_token_id", None, int),
                  eos=config.ids("eos_token_id"), pad=config.take("pad_token_id", None, int),
                  original=config.original())  # fmt: skip
    masks = ("*.attn.bias", "*.attn.masked_bias")  # old files hold the causal mask
    return Published(spec, facts, rules(spec), "transformer.", masks)


def rules(spec: dict[str, Any]) -> list[Rule]:
    """Their names by ours."""
    found = [Rule(("embedding.weight",), ("transformer.wte.weight",)),
             Rule(("stack.positions.table.weight",), ("transformer.wpe.weight",))]  # fmt: skip
    for i in range(spec["stack"]["repeat"]):
        ours, theirs = f"stack.blocks.{i}", f"transformer.h.{i}"
        attention, feedforward = f"{ours}.mixer.inner", f"{ours}.feedforward.inner"
        found += linear(f"{ours}.mixer.before", f"{theirs}.ln_1")
        found += transposed((f"{attention}.query", f"{attention}.key_value"), f"{theirs}.attn.c_attn")
        found += transposed((f"{attention}.out",), f"{theirs}.attn.c_proj")
        found += linear(f"{ours}.feedforward.before", f"{theirs}.ln_2")
        found += transposed((f"{feedforward}.enter",), f"{theirs}.mlp.c_fc")
        found += transposed((f"{feedforward}.leave",), f"{theirs}.mlp.c_proj")
    found += linear("stack.norm", "transformer.ln_f")
    heads = spec["heads"]
    if "lm" in heads:
        found += linear("heads.lm.out", "lm_head", bias=False)  # where it is tied, it may be left out
    if "classify" in heads:
        found += linear("heads.classify.out", "score", bias=False)
    if "tokens" in heads:
        found += linear("heads.tokens.out", "classifier")
    if "spans" in heads:
        found += linear("heads.spans.out", "qa_outputs")
    return found


def transposed(ours: tuple[str, ...], theirs: str) -> list[Rule]:
    """The rules of what GPT-2 calls a Conv1D, x W + b."""
    weight, bias = (tuple(f"{name}.{part}" for name in ours) for part in ("weight", "bias"))
    return [Rule(weight, (f"{theirs}.weight",), True), Rule(bias, (f"{theirs}.bias",))]


def write(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    block, stack, heads = spec["stack"]["blocks"][0], spec["stack"], spec["heads"]
    return {
        **facts.original,
        "architectures": [published_ending("gpt2", HEADS, heads)],
        "model_type": "gpt2",
        "n_embd": spec["width"],
        "vocab_size": spec["vocab"],
        "n_positions": stack["positions"]["length"],
        "n_layer": stack["repeat"],
        "n_head": block["mixer"]["heads"],
        "n_inner": block["feedforward"]["hidden"],
        "activation_function": published_activation(block["feedforward"]["activation"]),
        "resid_pdrop": spec["dropout"],
        "layer_norm_epsilon": block["norm_eps"],
        "tie_word_embeddings": heads.get("lm", {}).get("tie", True),
        "bos_token_id": facts.bos,
        "eos_token_id": published_ids(facts.eos),
        "pad_token_id": facts.pad,
        **published_labels(spec),
    }


def tiny() -> list[dict[str, Any]]:
    small = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 99, "n_positions": 40,
             "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
    return [
        *({**small, "architectures": [name], **({"num_labels": 3} if "Classif" in name else {})} for name in HEADS),
        {**small, "architectures": ["GPT2LMHeadModel"], "n_inner": 48, "activation_function": "relu",
         "tie_word_embeddings": False, "pad_token_id": None},
    ]  # fmt: skip
