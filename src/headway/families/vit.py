"""ViT (2010.11929): a picture's patches as tokens, with a class token before them; DeiT (2012.12877) adds a second one.

DeiT's distillation token has a classifier of its own: the two are averaged, or the class token's serves alone.
"""

from __future__ import annotations

from typing import Any

from headway.families import ACTIVATIONS, Config, Facts, Published, Rule, linear, published_activation, published_labels

TYPES = {"vit": "ViT", "deit": "DeiT"}
HEADS = {"Model": "pool", "ForImageClassification": "classify", "ForImageClassificationWithTeacher": "teacher"}


def read(config: Config) -> Published:
    kind = config.take("model_type")
    config.ignore("attention_probs_dropout_prob", "encoder_stride")
    width, eps = config.size("hidden_size", 768), config.take("layer_norm_eps", 1e-12, float)
    config.expect("pooler_output_size", width)
    block = {
        "mixer": attention(config, 12),
        "feedforward": {"hidden": config.size("intermediate_size", 3072),
                        "activation": config.choose("hidden_act", ACTIVATIONS, "gelu")},
        "norm": "layer",
        "norm_eps": eps,
    }  # fmt: skip
    ending = config.ending(HEADS if kind == "deit" else list(HEADS)[:2], TYPES[kind])
    labels = config.labels()
    heads = {
        "pool": {"pool": "first", "dense": True, "activation": config.choose("pooler_act", ACTIVATIONS, "tanh")},
        "classify": {"pool": "first", "outputs": len(labels), "labels": labels},
        "teacher": {"pool": "first_two", "outputs": len(labels), "labels": labels},
    }
    spec = {
        "kind": "vision",
        "width": width,
        "patches": {**patches(config, 16), "prefix": ("class", "distillation")[: 1 + (kind == "deit")]},
        "dropout": config.take("hidden_dropout_prob", 0.0, float),
        "stack": {"blocks": [block], "repeat": config.depth("num_hidden_layers", 12), "positions": {"name": "none"}},
        "heads": {"pool" if HEADS[ending] == "pool" else "classify": heads[HEADS[ending]]},
    }
    pooling = "pool" if HEADS[ending] == "pool" else "first"
    facts = Facts(family="vit", type=kind, pooling=pooling, original=config.original())
    return Published(spec, facts, rules(spec, f"{kind}."), f"{kind}.")


def attention(config: Config, heads: int) -> dict[str, Any]:
    bias = config.take("qkv_bias", True, bool)
    return {"name": "attention", "heads": config.size("num_attention_heads", heads), "bias": bias, "out_bias": True}


def patches(config: Config, patch: int) -> dict[str, Any]:
    """The size of pictures and of their patches; a pair (height, width) where they are no squares."""
    image, square = side(config, "image_size", 224), side(config, "patch_size", patch)
    if square[0] != square[1]:
        raise ValueError(f"{config.where}: patch_size is {square[0]} x {square[1]}; Headway's patches are squares")
    return {"image": image, "patch": square[0], "channels": config.size("num_channels", 3)}


def side(config: Config, name: str, default: int) -> tuple[int, int]:
    """A size in pixels as (height, width)."""
    found = config.take(name, default, (int, list))
    pair = tuple(found) if isinstance(found, list) else (found, found)
    if len(pair) != 2 or not all(type(edge) is int and 1 <= edge <= 2**14 for edge in pair):
        raise ValueError(f"{config.where}: '{name}' is {found!r}, and should be a size in pixels, or height and width")
    return pair[0], pair[1]


def rules(spec: dict[str, Any], prefix: str) -> list[Rule]:
    """Their names by ours."""
    found = picture_rules(spec, f"{prefix}embeddings")
    for i in range(spec["stack"]["repeat"]):
        ours, theirs = f"stack.blocks.{i}", f"{prefix}encoder.layer.{i}"
        found += attention_rules(ours, theirs, spec)
        found += linear(f"{ours}.mixer.before", f"{theirs}.layernorm_before")
        found += linear(f"{ours}.feedforward.before", f"{theirs}.layernorm_after")
        found += linear(f"{ours}.feedforward.inner.enter", f"{theirs}.intermediate.dense")
        found += linear(f"{ours}.feedforward.inner.leave", f"{theirs}.output.dense")
    found += linear("stack.norm", f"{prefix}layernorm")
    if "pool" in spec["heads"]:
        found += linear("heads.pool.dense", f"{prefix}pooler.dense")
    elif spec["heads"]["classify"]["pool"] == "first_two":
        found += linear("heads.classify.out", ("cls_classifier", "distillation_classifier"))
    else:
        found += linear("heads.classify.out", "classifier")
    return found


def picture_rules(spec: dict[str, Any], theirs: str) -> list[Rule]:
    """Of what turns a picture into tokens."""
    made, width = spec["patches"], spec["width"]
    patch, channels, image = made["patch"], made["channels"], made["image"]
    squares = (image[0] // patch) * (image[1] // patch)
    names = {"class": "cls_token", "distillation": "distillation_token"}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        f"tokens.{name}": (names[name], (1, 1, width)) for name in made["prefix"]
    }
    shapes["positions"] = ("position_embeddings", (1, len(made["prefix"]) + squares, width))
    shapes["project"] = ("patch_embeddings.projection.weight", (width, channels, patch, patch))
    if made.get("registers"):
        shapes["registers"] = ("register_tokens", (1, made["registers"], width))
    found = [Rule((f"patches.{ours}.weight",), (f"{theirs}.{name}",), False, shape)
             for ours, (name, shape) in shapes.items()]  # fmt: skip
    if made.get("mask"):
        found.append(Rule(("patches.mask.weight",), (f"{theirs}.mask_token",)))
    return [*found, Rule(("patches.project.bias",), (f"{theirs}.patch_embeddings.projection.bias",))]


def attention_rules(ours: str, theirs: str, spec: dict[str, Any]) -> list[Rule]:
    """Of one block's attention, as ViT and DINOv2 call it."""
    bias, inner = spec["stack"]["blocks"][0]["mixer"]["bias"], f"{theirs}.attention.attention"
    return [
        *linear(f"{ours}.mixer.inner.query", f"{inner}.query", bias=bias),
        *linear(f"{ours}.mixer.inner.key_value", (f"{inner}.key", f"{inner}.value"), bias=bias),
        *linear(f"{ours}.mixer.inner.out", f"{theirs}.attention.output.dense"),
    ]


def write(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    heads, block = spec["heads"], spec["stack"]["blocks"][0]
    if set(heads) not in ({"pool"}, {"classify"}):
        raise ValueError(f"{facts.type}: no published architecture has the heads {', '.join(heads) or 'none'}")
    name = "teacher" if heads.get("classify", {}).get("pool") == "first_two" else next(iter(heads))
    ending = next(ending for ending, head in HEADS.items() if head == name)
    config = {
        **written(spec, facts),
        "architectures": [TYPES[facts.type] + ending],
        "intermediate_size": block["feedforward"]["hidden"],
        "hidden_act": published_activation(block["feedforward"]["activation"]),
        **published_labels(spec),
    }
    return {**config, "pooler_act": published_activation(heads["pool"]["activation"])} if "pool" in heads else config


def written(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """What ViT's and DINOv2's configurations have in common."""
    made, block = spec["patches"], spec["stack"]["blocks"][0]
    image = made["image"]
    return {
        **facts.original,
        "model_type": facts.type,
        "hidden_size": spec["width"],
        "num_hidden_layers": spec["stack"]["repeat"],
        "num_attention_heads": block["mixer"]["heads"],
        "qkv_bias": block["mixer"]["bias"],
        "layer_norm_eps": block["norm_eps"],
        "hidden_dropout_prob": spec["dropout"],
        "image_size": image[0] if image[0] == image[1] else list(image),
        "patch_size": made["patch"],
        "num_channels": made["channels"],
    }


def tiny() -> list[dict[str, Any]]:
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
             "image_size": 24, "patch_size": 8}  # fmt: skip
    given: list[tuple[str, str, dict[str, Any]]] = [
        ("vit", "Model", {}),
        ("vit", "Model", {"image_size": [16, 30], "qkv_bias": False, "pooler_act": "relu"}),
        ("vit", "ForImageClassification", {"num_labels": 3, "num_channels": 1, "hidden_act": "gelu_new"}),
        ("deit", "Model", {}),
        ("deit", "ForImageClassification", {"num_labels": 3}),
        ("deit", "ForImageClassificationWithTeacher", {"num_labels": 3}),
    ]
    return [{**small, "model_type": kind, "architectures": [TYPES[kind] + name], **more} for kind, name, more in given]
