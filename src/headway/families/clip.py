"""CLIP (2103.00020): a text and an image tower whose projections meet; also each tower alone.

The text's vector is read where it ends: at its first end token, or in old files, whose eos_token_id says 2 and lies, at
its largest id. The image's is its class token's, after a norm.
"""

from __future__ import annotations

import math
from typing import Any

from headway.families import ACTIVATIONS, Config, Facts, Published, Rule, linear, published_activation
from headway.families.vit import patches

TYPES = ("clip", "clip_text_model", "clip_vision_model")
ARCHITECTURES = {
    "clip": ("CLIPModel",),
    "clip_text_model": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
}
# What old files say of writing texts, which no tower does
UNUSED = """bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dropout early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores prefix remove_invalid_values repetition_penalty suppress_tokens temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings top_k top_p torchscript typical_p use_bfloat16
    attention_dropout""".split()  # noqa: SIM905


def read(config: Config) -> Published:
    kind = config.data["model_type"]
    architecture = config.ending(ARCHITECTURES[kind], default=ARCHITECTURES[kind][0])
    if kind == "clip":
        return _dual(config)
    text, alone = kind == "clip_text_model", not architecture.endswith("WithProjection")
    outputs = None if alone else config.size("projection_dim", 512)
    config.ignore("projection_dim")
    if text:
        spec, facts = _text(config, outputs)
    else:
        spec = _image(config, outputs)
        facts = Facts(family="clip", type=kind, pooling=next(iter(spec["heads"])), original=config.original())
    prefix = "text_model." if text else "vision_model."
    return Published(spec, facts, (text_rules if text else image_rules)(spec, ""), prefix, ("*position_ids",))


def _dual(config: Config) -> Published:
    config.ignore(*UNUSED)
    outputs = config.size("projection_dim", 512)
    towers = {}
    for name, theirs in (("text", "text_config"), ("image", "vision_config")):
        config.ignore(theirs)
        # where an old file has both, transformers reads this one
        told = config.inner(f"{theirs}_dict" if config.data.get(f"{theirs}_dict") else theirs)
        told.ignore("projection_dim")
        if name == "text":
            towers[name], facts = _text(told, outputs)
        else:
            towers[name] = _image(told, outputs)
        told.finish()
    scale = config.take("logit_scale_init_value", 2.6592, float)
    if not 0 <= scale <= 10:
        raise ValueError(f"{config.where}: logit_scale_init_value is {scale}; a logarithm from 0 to 10 is expected")
    spec = {"kind": "dual", "towers": towers, "scale": math.exp(scale)}
    facts = Facts(family="clip", type="clip", max_tokens=facts.max_tokens, bos=facts.bos, eos=facts.eos, pad=facts.pad,
                  original=config.original())  # fmt: skip
    found = [Rule(("scale",), ("logit_scale",), shape=())]
    found += text_rules(towers["text"], "towers.text.") + image_rules(towers["image"], "towers.image.")
    return Published(spec, facts, found, "", ("*position_ids",))


def _block(config: Config, hidden: int, heads: int) -> dict[str, Any]:
    config.ignore(*UNUSED)
    config.expect("is_decoder", False)
    config.expect("is_encoder_decoder", False)
    config.expect("add_cross_attention", False)
    config.expect("pruned_heads", {})
    return {
        "mixer": {"name": "attention", "heads": config.size("num_attention_heads", heads), "bias": True},
        "feedforward": {"hidden": config.size("intermediate_size", hidden),
                        "activation": config.choose("hidden_act", ACTIVATIONS, "quick_gelu")},
        "norm": "layer",
        "norm_eps": config.take("layer_norm_eps", 1e-5, float),
    }  # fmt: skip


def _text(config: Config, outputs: int | None) -> tuple[dict[str, Any], Facts]:
    length, end = config.size("max_position_embeddings", 77), config.take("eos_token_id", 49407, int)
    pool: dict[str, Any] = {"pool": "largest"} if end == 2 else {"pool": "end", "end": end}
    spec: dict[str, Any] = {
        "kind": "decoder",
        "width": config.size("hidden_size", 512),
        "vocab": config.size("vocab_size", 49408),
        "stack": {
            "blocks": [_block(config, 2048, 8)],
            "repeat": config.depth("num_hidden_layers", 12),
            "positions": {"name": "learned", "length": length},
        },
        "heads": _head(pool, outputs),
    }
    facts = Facts(family="clip", type="clip_text_model", max_tokens=length, bos=config.take("bos_token_id", 49406, int),
                  eos=(end,), pad=config.take("pad_token_id", 1, int), pooling=next(iter(spec["heads"])),
                  original=config.original())  # fmt: skip
    return spec, facts


def _image(config: Config, outputs: int | None) -> dict[str, Any]:
    config.ignore("bos_token_id", "eos_token_id", "pad_token_id")
    made = patches(config, 32)
    if made["image"][0] != made["image"][1]:
        raise ValueError(f"{config.where}: image_size is {made['image']}; CLIP's pictures are squares")
    block = _block(config, 3072, 12)
    return {
        "kind": "vision",
        "width": config.size("hidden_size", 768),
        "patches": {**made, "bias": False},
        "stack": {
            "blocks": [block],
            "repeat": config.depth("num_hidden_layers", 12),
            "positions": {"name": "none"},
            "first_norm": True,
            "final_norm": False,
        },
        "heads": _head({"pool": "first", "before": "layer", "norm_eps": block["norm_eps"]}, outputs),
    }


def _head(pool: dict[str, Any], outputs: int | None) -> dict[str, Any]:
    return {"pool": pool} if outputs is None else {"project": {**pool, "outputs": outputs, "bias": False}}


def text_rules(spec: dict[str, Any], tower: str) -> list[Rule]:
    found = [Rule((f"{tower}embedding.weight",), ("text_model.embeddings.token_embedding.weight",)),
             Rule((f"{tower}stack.positions.table.weight",), ("text_model.embeddings.position_embedding.weight",)),
             *_stack_rules(spec, tower, "text_model"),
             *linear(f"{tower}stack.norm", "text_model.final_layer_norm")]  # fmt: skip
    if "project" in spec["heads"]:
        found += linear(f"{tower}heads.project.out", "text_projection", bias=False)
    return found


def image_rules(spec: dict[str, Any], tower: str) -> list[Rule]:
    made, width, theirs = spec["patches"], spec["width"], "vision_model.embeddings"
    square = (width, made["channels"], made["patch"], made["patch"])
    name = "project" if "project" in spec["heads"] else "pool"
    found = [Rule((f"{tower}patches.tokens.class.weight",), (f"{theirs}.class_embedding",), False, (width,)),
             Rule((f"{tower}patches.project.weight",), (f"{theirs}.patch_embedding.weight",), False, square),
             Rule((f"{tower}patches.positions.weight",), (f"{theirs}.position_embedding.weight",)),
             *linear(f"{tower}stack.first_norm", "vision_model.pre_layrnorm"),
             *_stack_rules(spec, tower, "vision_model"),
             *linear(f"{tower}heads.{name}.before", "vision_model.post_layernorm")]  # fmt: skip
    if name == "project":
        found += linear(f"{tower}heads.project.out", "visual_projection", bias=False)
    return found


def _stack_rules(spec: dict[str, Any], tower: str, model: str) -> list[Rule]:
    found = []
    for i in range(spec["stack"]["repeat"]):
        ours, theirs = f"{tower}stack.blocks.{i}", f"{model}.encoder.layers.{i}"
        attention = f"{theirs}.self_attn"
        found += linear(f"{ours}.mixer.before", f"{theirs}.layer_norm1")
        found += linear(f"{ours}.mixer.inner.query", f"{attention}.q_proj")
        found += linear(f"{ours}.mixer.inner.key_value", (f"{attention}.k_proj", f"{attention}.v_proj"))
        found += linear(f"{ours}.mixer.inner.out", f"{attention}.out_proj")
        found += linear(f"{ours}.feedforward.before", f"{theirs}.layer_norm2")
        found += linear(f"{ours}.feedforward.inner.enter", f"{theirs}.mlp.fc1")
        found += linear(f"{ours}.feedforward.inner.leave", f"{theirs}.mlp.fc2")
    return found


def write(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    if facts.type != "clip":
        name = {"clip_text_model": "Text", "clip_vision_model": "Vision"}[facts.type]
        if set(spec["heads"]) not in ({"pool"}, {"project"}):
            raise ValueError(f"{facts.type}: no published architecture has the heads {', '.join(spec['heads'])}")
        ending = "WithProjection" if "project" in spec["heads"] else ""
        return {**facts.original, "architectures": [f"CLIP{name}Model{ending}"], **_written(spec, facts)}
    towers = spec["towers"]
    return {
        **facts.original,
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": towers["text"]["heads"]["project"]["outputs"],
        "logit_scale_init_value": _logarithm(spec["scale"]),
        "text_config": _written(towers["text"], facts),
        "vision_config": _written(towers["image"], facts),
    }


def _written(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """The configuration of one tower."""
    block, head = spec["stack"]["blocks"][0], next(iter(spec["heads"].values()))
    config = {
        "hidden_size": spec["width"],
        "num_hidden_layers": spec["stack"]["repeat"],
        "num_attention_heads": block["mixer"]["heads"],
        "intermediate_size": block["feedforward"]["hidden"],
        "hidden_act": published_activation(block["feedforward"]["activation"]),
        "layer_norm_eps": block["norm_eps"],
    }
    if head.get("outputs"):
        config["projection_dim"] = head["outputs"]
    if spec["kind"] == "vision":
        made = spec["patches"]
        return {**config, "model_type": "clip_vision_model", "image_size": made["image"][0],
                "patch_size": made["patch"], "num_channels": made["channels"]}  # fmt: skip
    return {**config, "model_type": "clip_text_model", "vocab_size": spec["vocab"],
            "max_position_embeddings": spec["stack"]["positions"]["length"], "bos_token_id": facts.bos,
            "eos_token_id": facts.eos[0], "pad_token_id": facts.pad}  # fmt: skip


def _logarithm(scale: float) -> float:
    """The shortest number whose exponential it is."""
    exact = math.log(scale)
    return next((short for digits in range(17) if math.exp(short := round(exact, digits)) == scale), exact)


def tiny() -> list[dict[str, Any]]:
    small = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "projection_dim": 20}
    text = {**small, "hidden_size": 32, "vocab_size": 99, "max_position_embeddings": 40, "bos_token_id": 97,
            "eos_token_id": 98, "pad_token_id": 1}  # fmt: skip
    image = {**small, "hidden_size": 40, "image_size": 30, "patch_size": 8}
    both = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 20}
    old = {**text, "eos_token_id": 2, "bos_token_id": 0, "hidden_act": "gelu"}
    alone = {"clip_text_model": text, "clip_vision_model": image}
    return [
        {**both, "text_config": text, "vision_config": image},
        {**both, "text_config": old, "vision_config": {**image, "hidden_act": "gelu"}, "logit_scale_init_value": 3.21},
        *({"model_type": kind, "architectures": [name], **alone[kind]}
          for kind in alone for name in ARCHITECTURES[kind]),
    ]  # fmt: skip
