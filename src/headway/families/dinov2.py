"""DINOv2 (2304.07193), plain and with registers (2309.16588): a ViT of scaled branches, for pictures of any size.

Its classifier reads the class token beside the mean of the patches.
"""

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
from headway.families.vit import attention, attention_rules, patches, picture_rules, written

TYPES = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
HEADS = {"Model": "pool", "ForImageClassification": "classify"}


def read(config: Config) -> Published:
    kind = config.take("model_type")
    config.ignore("attention_probs_dropout_prob", "drop_path_rate")
    config.ignore("out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states")
    width = config.size("hidden_size", 768)
    registers = config.size("num_register_tokens", 4) if kind == "dinov2_with_registers" else 0
    made = patches(config, 14 if kind == "dinov2" else 16)
    if made["image"][0] != made["image"][1]:
        raise ValueError(f"{config.where}: image_size is {made['image']}; DINOv2's positions are those of a square")
    block = {
        "mixer": attention(config, 12),
        "feedforward": _feedforward(config, width),
        "norm": "layer",
        "norm_eps": config.take("layer_norm_eps", 1e-6, float),
        "layer_scale": config.take("layerscale_value", 1.0, float),
    }
    ending = config.ending(HEADS, TYPES[kind])
    labels = config.labels()
    heads = {
        "pool": {"pool": "first"},
        "classify": {"pool": "first_and_mean", "prefix": 1 + registers, "outputs": len(labels), "labels": labels},
    }
    spec = {
        "kind": "vision",
        "width": width,
        "patches": {**made, "prefix": ("class",), "registers": registers, "interpolate": True,
                    "antialias": registers > 0,
                    "mask": config.take("use_mask_token", True, bool) if kind == "dinov2" else True},
        "dropout": config.take("hidden_dropout_prob", 0.0, float),
        "stack": {"blocks": [block], "repeat": config.depth("num_hidden_layers", 12), "positions": {"name": "none"}},
        "heads": {HEADS[ending]: heads[HEADS[ending]]},
    }  # fmt: skip
    facts = Facts(family="dinov2", type=kind, pooling="first", original=config.original())
    return Published(spec, facts, rules(spec, f"{kind}."), f"{kind}.")


def _feedforward(config: Config, width: int) -> dict[str, Any]:
    hidden = width * config.size("mlp_ratio", 4)
    if config.take("use_swiglu_ffn", False, bool):
        config.ignore("hidden_act")
        return {"hidden": _gated(hidden), "activation": "silu", "gated": True}
    return {"hidden": hidden, "activation": config.choose("hidden_act", ACTIVATIONS, "gelu")}


def _gated(hidden: int) -> int:
    """A gated feed-forward's width: two thirds, to a multiple of 8, so that it has as many weights."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def rules(spec: dict[str, Any], prefix: str) -> list[Rule]:
    """Their names by ours."""
    found = picture_rules(spec, f"{prefix}embeddings")
    gated = spec["stack"]["blocks"][0]["feedforward"].get("gated")
    enter, leave = ("weights_in", "weights_out") if gated else ("fc1", "fc2")
    for i in range(spec["stack"]["repeat"]):
        ours, theirs = f"stack.blocks.{i}", f"{prefix}encoder.layer.{i}"
        found += attention_rules(ours, theirs, spec)
        found += linear(f"{ours}.feedforward.inner.enter", f"{theirs}.mlp.{enter}")
        found += linear(f"{ours}.feedforward.inner.leave", f"{theirs}.mlp.{leave}")
        for branch, place in (("mixer", 1), ("feedforward", 2)):
            found += linear(f"{ours}.{branch}.before", f"{theirs}.norm{place}")
            found.append(Rule((f"{ours}.{branch}.behind.weight",), (f"{theirs}.layer_scale{place}.lambda1",)))
    found += linear("stack.norm", f"{prefix}layernorm")
    return found + (linear("heads.classify.out", "classifier") if "classify" in spec["heads"] else [])


def write(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    heads, block, width = spec["heads"], spec["stack"]["blocks"][0], spec["width"]
    ending = published_ending(facts.type, {name: (head,) for name, head in HEADS.items()}, heads)
    hidden, gated = block["feedforward"]["hidden"], block["feedforward"].get("gated", False)
    ratio = next((r for r in range(1, 65) if (_gated(r * width) if gated else r * width) == hidden), None)
    if ratio is None:
        raise ValueError(f"{facts.type}: a feed-forward of {hidden} is no multiple of the width, {width}, as published")
    config = {
        **written(spec, facts),
        "architectures": [TYPES[facts.type] + ending],
        "mlp_ratio": ratio,
        "use_swiglu_ffn": gated,
        "layerscale_value": block["layer_scale"],
        **published_labels(spec),
    }
    if not gated:
        config["hidden_act"] = published_activation(block["feedforward"]["activation"])
    if facts.type == "dinov2":
        return {**config, "use_mask_token": spec["patches"]["mask"]}
    return {**config, "num_register_tokens": spec["patches"]["registers"]}


def tiny() -> list[dict[str, Any]]:
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 28,
             "patch_size": 7}  # fmt: skip
    given: list[tuple[str, str, dict[str, Any]]] = [
        ("dinov2", "Model", {}),
        ("dinov2", "Model", {"use_swiglu_ffn": True, "use_mask_token": False}),
        ("dinov2", "ForImageClassification", {"num_labels": 3, "qkv_bias": False}),
        ("dinov2_with_registers", "Model", {"num_register_tokens": 3}),
        ("dinov2_with_registers", "ForImageClassification", {"num_labels": 3, "use_swiglu_ffn": True}),
    ]
    return [{**small, "model_type": kind, "architectures": [TYPES[kind] + name], **more} for kind, name, more in given]
