"""T5 (1910.10683), T5 v1.1 and Flan (2210.11416), mT5 (2010.11934): an encoder-decoder with a learned bias by distance.

Scores are q k^T + bias[bucket(k_pos - q_pos)], not scaled; no biases in the maps, RMS norms, heads of a width of their
own. The first T5 has one table for both embeddings and the head, which reads x / sqrt(width); later ones have a head
of their own and gated feed-forwards. Sums inside overflow float16 (65,504), so it is read as bfloat16 or float32.
"""

from __future__ import annotations

from typing import Any

from headway.families import ACTIVATIONS, Config, Facts, Published, Rule, linear, published_activation
from headway.families.bart import answers, published_answers

TYPES = ("t5", "mt5")
REFUSES = {"float16": "T5 overflows float16 on the way: load it as bfloat16 or float32"}
NAMES = {  # an encoder alone, a bare model (it gets the tied head, as transformers would give it), one with a head
    "t5": ("T5EncoderModel", "T5Model", "T5ForConditionalGeneration", "T5WithLMHeadModel"),
    "mt5": ("MT5EncoderModel", "MT5Model", "MT5ForConditionalGeneration"),
}


def read(config: Config) -> Published:
    kind = config.data["model_type"]
    architecture = config.ending(NAMES[kind], default=NAMES[kind][1])
    alone, bare = architecture == NAMES[kind][0], architecture == NAMES[kind][1]
    config.expect("is_decoder", False)
    config.expect("is_encoder_decoder", True, *[False] * alone)
    config.ignore("classifier_dropout", "n_positions", "output_past")
    width, vocab, layers = config.size("d_model"), config.size("vocab_size"), config.depth("num_layers")
    heads, feedforward = config.size("num_heads"), _feedforward(config)
    mixer = {"name": "attention", "heads": heads, "head_dim": config.size("d_kv", 64), "scale": 1.0}
    buckets = {"name": "buckets", "buckets": config.size("relative_attention_num_buckets", 32),
               "distance": config.size("relative_attention_max_distance", 128)}  # fmt: skip
    eps = config.take("layer_norm_epsilon", 1e-6, float)
    tied = config.take("tie_word_embeddings", True, bool)
    scaled = config.take("scale_decoder_outputs", tied, bool) and kind != "mt5"

    def stack(depth: int, cross: dict[str, Any] | None) -> dict[str, Any]:
        block = {"mixer": mixer, "cross": cross, "feedforward": feedforward, "norm": "rms", "norm_eps": eps}
        return {"blocks": [block], "repeat": depth, "positions": {**buckets, "both": cross is None}}

    spec: dict[str, Any] = {"width": width, "dropout": config.take("dropout_rate", 0.1, float)}
    encoder, decoder = stack(layers, None), stack(config.depth("num_decoder_layers", layers), mixer)
    if alone:
        spec |= {"kind": "encoder", "vocab": vocab, "stack": encoder, "heads": {}}
    else:
        spec |= {
            "kind": "seq2seq",
            "source_vocab": vocab,
            "target_vocab": vocab,
            "encoder": encoder,
            "decoder": decoder,
            "share": True,
            "tie": bare or scaled,
            "head_bias": False,
            "logit_scale": width**-0.5 if scaled else 1.0,
        }
    facts = Facts(family="t5", type=kind, **answers(config, config.take("pad_token_id", 0, int)))
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # in old files, read by nobody
    return Published(spec, facts, rules(spec), ignore=(unused,))


def _feedforward(config: Config) -> dict[str, Any]:
    """`feed_forward_proj` is an activation, or one behind "gated-"; there "gelu" means its tanh form."""
    said = config.take("feed_forward_proj", "gated-gelu" if config.data["model_type"] == "mt5" else "relu", str)
    gated = said.startswith("gated-")
    name = "gelu_new" if said == "gated-gelu" else said.removeprefix("gated-")
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{config.where}: 'feed_forward_proj' is {said!r}; Headway knows relu and gated-gelu, and so on"
        )
    config.expect("is_gated_act", gated)
    config.expect("dense_act_fn", name)
    return {"hidden": config.size("d_ff"), "activation": ACTIVATIONS[name], "gated": gated, "bias": False}


def rules(spec: dict[str, Any]) -> list[Rule]:
    """Their names by ours."""
    if spec["kind"] == "encoder":
        found = [Rule(("embedding.weight",), ("shared.weight",)),
                 Rule(("embedding.weight",), ("encoder.embed_tokens.weight",))]  # fmt: skip
        return found + _stack("stack", "encoder", spec["stack"])
    found = [Rule(("source.weight",), ("shared.weight",)),
             Rule(("source.weight",), ("encoder.embed_tokens.weight",)),  # tied, as the next: may be left out
             Rule(("target.weight",), ("decoder.embed_tokens.weight",)),
             Rule(("head.weight",), ("lm_head.weight",))]  # fmt: skip
    return found + _stack("encoder", "encoder", spec["encoder"]) + _stack("decoder", "decoder", spec["decoder"])


def _stack(ours: str, theirs: str, stack: dict[str, Any]) -> list[Rule]:
    bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias"  # the first layer keeps it for all
    found = linear(f"{ours}.positions.table", bias, bias=False)
    for i in range(stack["repeat"]):
        block, layer = f"{ours}.blocks.{i}", f"{theirs}.block.{i}.layer"
        parts = [("mixer", "SelfAttention"), ("cross", "EncDecAttention")][: 2 if stack["blocks"][0]["cross"] else 1]
        for at, (mine, other) in enumerate(parts):
            maps = f"{layer}.{at}.{other}"
            found += linear(f"{block}.{mine}.before", f"{layer}.{at}.layer_norm", bias=False)
            found += linear(f"{block}.{mine}.inner.query", f"{maps}.q", bias=False)
            found += linear(f"{block}.{mine}.inner.key_value", (f"{maps}.k", f"{maps}.v"), bias=False)
            found += linear(f"{block}.{mine}.inner.out", f"{maps}.o", bias=False)
        last = f"{layer}.{len(parts)}"
        enter = ("wi_0", "wi_1") if stack["blocks"][0]["feedforward"]["gated"] else ("wi",)
        found += linear(f"{block}.feedforward.before", f"{last}.layer_norm", bias=False)
        found += linear(f"{block}.feedforward.inner.enter", [f"{last}.DenseReluDense.{n}" for n in enter], bias=False)
        found += linear(f"{block}.feedforward.inner.leave", f"{last}.DenseReluDense.wo", bias=False)
    return found + linear(f"{ours}.norm", f"{theirs}.final_layer_norm", bias=False)


def write(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    alone = spec["kind"] == "encoder"
    encoder = spec["stack"] if alone else spec["encoder"]
    block, positions = encoder["blocks"][0], encoder["positions"]
    feedforward, scaled = block["feedforward"], not alone and spec["logit_scale"] != 1
    bare = not alone and spec["tie"] and not scaled
    activation = published_activation(feedforward["activation"])
    gated = "gated-gelu" if activation == "gelu_new" else f"gated-{activation}"
    return {
        **published_answers(facts),
        "architectures": [NAMES[facts.type][0 if alone else 1 if bare else 2]],
        "model_type": facts.type,
        "is_encoder_decoder": not alone,
        "d_model": spec["width"],
        "d_kv": block["mixer"]["head_dim"],
        "d_ff": feedforward["hidden"],
        "feed_forward_proj": gated if feedforward["gated"] else activation,
        "num_heads": block["mixer"]["heads"],
        "num_layers": encoder["repeat"],
        "num_decoder_layers": encoder["repeat"] if alone else spec["decoder"]["repeat"],
        "relative_attention_num_buckets": positions["buckets"],
        "relative_attention_max_distance": positions["distance"],
        "layer_norm_epsilon": block["norm_eps"],
        "dropout_rate": spec["dropout"],
        "vocab_size": spec["vocab"] if alone else spec["source_vocab"],
        "tie_word_embeddings": scaled,
        "scale_decoder_outputs": scaled,
    }


def tiny() -> list[dict[str, Any]]:
    small = {"d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99,
             "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10,
             "decoder_start_token_id": 0, "layer_norm_epsilon": 1e-6}  # fmt: skip
    later = {**small, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return [
        {**small, "model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {**later, "model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {**small, "model_type": "t5", "architectures": ["T5Model"], "num_decoder_layers": 3},
        {**later, "model_type": "t5", "architectures": ["T5EncoderModel"]},
        {**later, "model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]},
    ]
