"""LED (2004.05150, section 7): BART whose encoder is a Longformer, for long sources; positions start at row 0.

To write, it makes the source's first token global, as its published checkpoints were trained.
"""

from __future__ import annotations

from typing import Any

from headway.families import ACTIVATIONS, Config, Facts, Published, Rule, linear, published_activation
from headway.families.bart import answers, published_answers
from headway.families.longformer import projections, published_windows, windowed

TYPES = ("led",)
NAMES = ("LEDModel", "LEDForConditionalGeneration")  # a bare model, and one with the bias of its head


def read(config: Config) -> Published:
    architecture = config.ending(NAMES, default=NAMES[0])
    config.expect("is_encoder_decoder", True)
    config.expect("tie_word_embeddings", True)
    config.ignore("attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std",
                  "classifier_dropout", "classif_dropout", "num_hidden_layers")  # fmt: skip
    activation = config.choose("activation_function", ACTIVATIONS, "gelu")
    vocab, lengths = config.size("vocab_size"), {}
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        hidden = {"hidden": config.size(f"{side}_ffn_dim", 4096), "activation": activation}
        heads, depth = config.size(f"{side}_attention_heads", 16), config.depth(f"{side}_layers", 12)
        block = {"feedforward": hidden, "norm": "layer", "wiring": "post"}
        mixer = {"name": "attention", "heads": heads, "bias": True}
        blocks, repeat = (
            windowed(config, block, heads, depth)
            if side == "encoder"
            else ([{**block, "mixer": mixer, "cross": mixer}], depth)
        )
        lengths[side] = config.size(f"max_{side}_position_embeddings", 16384 if side == "encoder" else 1024)
        sides[side] = {"blocks": blocks, "repeat": repeat, "positions": {"name": "learned", "length": lengths[side]},
                       "first_norm": True, "final_norm": False}  # fmt: skip
    spec = {
        "kind": "seq2seq",
        "width": config.size("d_model"),
        "source_vocab": vocab,
        "target_vocab": vocab,
        **sides,
        "dropout": config.take("dropout", 0.1, float),
        "tie": True,
        "share": True,
        "head_bias": architecture != NAMES[0],
    }
    told = answers(config, start=2)
    facts = Facts(family="led", type="led", max_tokens=lengths["encoder"], globals={"generate": "first"}, **told)
    return Published(spec, facts, rules(spec), "led.")


def rules(spec: dict[str, Any]) -> list[Rule]:
    """Their names by ours."""
    found = [Rule(("source.weight",), ("led.shared.weight",)),
             Rule(("source.weight",), ("led.encoder.embed_tokens.weight",)),  # tied, as the next two: may be left out
             Rule(("target.weight",), ("led.decoder.embed_tokens.weight",)),
             Rule(("head.weight",), ("lm_head.weight",))]  # fmt: skip
    if spec["head_bias"]:
        found.append(Rule(("head.bias",), ("final_logits_bias",), transpose=True))  # theirs is one row
    for side in ("encoder", "decoder"):
        found.append(Rule((f"{side}.positions.table.weight",), (f"led.{side}.embed_positions.weight",)))
        found += linear(f"{side}.first_norm", f"led.{side}.layernorm_embedding")
        for i in range(len(spec[side]["blocks"]) * spec[side]["repeat"]):
            ours, theirs = f"{side}.blocks.{i}", f"led.{side}.layers.{i}"
            if side == "encoder":
                found += projections(f"{ours}.mixer.inner", f"{theirs}.self_attn.longformer_self_attn")
                found += linear(f"{ours}.mixer.inner.out", f"{theirs}.self_attn.output")
            else:
                found += _attention(f"{ours}.mixer.inner", f"{theirs}.self_attn")
                found += _attention(f"{ours}.cross.inner", f"{theirs}.encoder_attn")
                found += linear(f"{ours}.cross.after", f"{theirs}.encoder_attn_layer_norm")
            found += linear(f"{ours}.mixer.after", f"{theirs}.self_attn_layer_norm")
            found += linear(f"{ours}.feedforward.inner.enter", f"{theirs}.fc1")
            found += linear(f"{ours}.feedforward.inner.leave", f"{theirs}.fc2")
            found += linear(f"{ours}.feedforward.after", f"{theirs}.final_layer_norm")
    return found


def _attention(ours: str, theirs: str) -> list[Rule]:
    found = linear(f"{ours}.query", f"{theirs}.q_proj")
    found += linear(f"{ours}.key_value", (f"{theirs}.k_proj", f"{theirs}.v_proj"))
    return found + linear(f"{ours}.out", f"{theirs}.out_proj")


def write(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    windows, sides = published_windows(spec["encoder"]), {}
    for side in ("encoder", "decoder"):
        block = spec[side]["blocks"][0]
        sides[f"{side}_attention_heads"] = block["mixer"]["heads"]
        sides[f"{side}_ffn_dim"] = block["feedforward"]["hidden"]
        sides[f"max_{side}_position_embeddings"] = spec[side]["positions"]["length"]
    return {
        **published_answers(facts),
        "architectures": [NAMES[spec["head_bias"]]],
        "model_type": "led",
        "is_encoder_decoder": True,
        "d_model": spec["width"],
        "vocab_size": spec["source_vocab"],
        **sides,
        "encoder_layers": len(windows),
        "decoder_layers": spec["decoder"]["repeat"],
        "attention_window": windows,
        "dropout": spec["dropout"],
        "activation_function": published_activation(spec["encoder"]["blocks"][0]["feedforward"]["activation"]),
    }


def tiny() -> list[dict[str, Any]]:
    small = {"model_type": "led", "d_model": 32, "vocab_size": 99, "max_encoder_position_embeddings": 64,
             "max_decoder_position_embeddings": 40, "encoder_layers": 2, "decoder_layers": 3,
             "encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
             "decoder_ffn_dim": 40}  # fmt: skip
    return [
        {**small, "architectures": ["LEDForConditionalGeneration"], "attention_window": [4, 8]},
        {**small, "architectures": ["LEDModel"], "attention_window": 4},
    ]
