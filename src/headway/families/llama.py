"""Llama (2302.13971), and with it Mistral (2310.06825), Qwen2 (2407.10671) and Qwen3 (2505.09388).

Decoders with rotary positions, RMS norms before each branch, grouped heads and a gated feed-forward. Mistral sees a
window; Qwen2 has biases on queries, keys and values alone; Qwen3 normalises each head's queries and keys.
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
    published_ids,
    published_labels,
)

TYPES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
HEADS = {"Model": (), "ForCausalLM": ("lm",), "ForSequenceClassification": ("classify",),
         "ForTokenClassification": ("tokens",)}  # fmt: skip
LLAMA3 = {"low": "low_freq_factor", "high": "high_freq_factor", "trained": "original_max_position_embeddings"}


def read(config: Config) -> Published:
    kind = config.take("model_type")
    config.expect("rope_interleaved", False)
    config.ignore("attention_dropout", "classifier_dropout", "max_window_layers", "is_llama_config")
    width, vocab, depth = config.size("hidden_size"), config.size("vocab_size"), config.depth("num_hidden_layers")
    length = config.size("max_position_embeddings", 32768 if "qwen" in kind else 2048 if kind == "llama" else 131072)
    eps = config.take("rms_norm_eps", 1e-6, float)
    feedforward = {"hidden": config.size("intermediate_size"), "gated": True, "bias": _flag(config, "mlp_bias", kind),
                   "activation": config.choose("hidden_act", ACTIVATIONS, "silu")}  # fmt: skip
    mixer = _attention(config, kind, width, eps)
    layers = [{**mixer, "window": (window - 1, 0)} if window else mixer for window in _windows(config, kind, depth)]
    blocks = [{"mixer": layer, "feedforward": feedforward, "norm": "rms", "norm_eps": eps} for layer in layers]
    if all(block == blocks[0] for block in blocks):
        blocks, depth = blocks[:1], len(blocks)
    else:
        depth = 1
    labels = config.labels()
    heads = {
        "lm": {"outputs": vocab, "bias": False, "tie": config.take("tie_word_embeddings", False, bool)},
        "classify": {"pool": "last", "outputs": len(labels), "bias": False, "labels": labels},
        "tokens": {"outputs": len(labels), "labels": labels},
    }
    ending = config.ending(HEADS, TYPES[kind], "ForCausalLM")
    spec = {
        "kind": "decoder",
        "width": width,
        "vocab": vocab,
        "stack": {"blocks": blocks, "repeat": depth, "positions": _positions(config, length)},
        "heads": {name: heads[name] for name in HEADS[ending]},
    }
    facts = Facts(family="llama", type=kind, max_tokens=length, bos=config.take("bos_token_id", None, int),
                  eos=config.ids("eos_token_id"), pad=config.take("pad_token_id", None, int),
                  original=config.original())  # fmt: skip
    return Published(spec, facts, rules(spec), "model.", ("*rotary_emb.inv_freq",))


def _flag(config: Config, name: str, kind: str) -> bool:
    """A bias that only some of these have; the others compute without one whatever the field says."""
    if kind == "llama" or (kind, name) == ("qwen3", "attention_bias"):
        return config.take(name, False, bool)
    config.expect(name, False)
    return False


def _attention(config: Config, kind: str, width: int, eps: float) -> dict[str, Any]:
    heads = config.size("num_attention_heads")
    bias = _flag(config, "attention_bias", kind)
    mixer = {
        "name": "attention",
        "heads": heads,
        "kv_heads": config.size("num_key_value_heads", heads),
        "head_dim": config.size("head_dim", 128 if kind == "qwen3" else max(width // heads, 1)),
        "bias": bias or kind == "qwen2",
        "out_bias": bias,
    }
    return {**mixer, "qk_norm": True, "norm_eps": eps} if kind == "qwen3" else mixer


def _windows(config: Config, kind: str, depth: int) -> list[int | None]:
    """Layer by layer, how many tokens each sees, itself included; None for all."""
    if kind == "llama":
        config.expect("sliding_window")
        return [None] * depth
    told = config.data.get("sliding_window", 4096) is not None  # null says that there is none
    window = config.size("sliding_window", 4096) if told else config.take("sliding_window", None)
    if kind == "mistral":
        return [window] * depth
    slides = config.take("use_sliding_window", False, bool) and told
    first = config.take("max_window_layers", 28, int) if slides else depth
    types = config.take("layer_types", ["sliding_attention" if i >= first else "full_attention" for i in range(depth)])
    if not isinstance(types, list) or len(types) != depth or set(types) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"{config.where}: layer_types is no list of {depth} of full_attention and sliding_attention")
    if "sliding_attention" in types and not slides:
        raise ValueError(f"{config.where}: layer_types asks for sliding_attention, and use_sliding_window is not true")
    return [window if name == "sliding_attention" else None for name in types]


def _positions(config: Config, length: int) -> dict[str, Any]:
    """Rotary ones, told in `rope_parameters` or, in older files, in `rope_theta` and `rope_scaling`."""
    told = config.inner("rope_parameters" if config.data.get("rope_parameters") else "rope_scaling")
    base = told.take("rope_theta", config.take("rope_theta", 10000.0, float), float)
    word = "rope_type" if "rope_type" in told.data else "type"
    told.ignore("type")
    told.expect("partial_rotary_factor", 1.0)
    name = told.choose(word, {"default": None, "linear": "linear", "llama3": "llama3"}, "default")
    scaling = None
    if name is not None:
        scaling = {"name": name, "factor": told.take("factor", kind=float)}
    if scaling is not None and name == "llama3":
        scaling |= {"low": told.take(LLAMA3["low"], kind=float), "high": told.take(LLAMA3["high"], kind=float),
                    "trained": told.size(LLAMA3["trained"], length)}  # fmt: skip
    told.finish()
    return {"name": "rotary", "base": base, "scaling": scaling}


def rules(spec: dict[str, Any]) -> list[Rule]:
    """Their names by ours."""
    found = [Rule(("embedding.weight",), ("model.embed_tokens.weight",))]
    blocks = spec["stack"]["blocks"] * spec["stack"]["repeat"]
    for i, block in enumerate(blocks):
        mixer, biased = block["mixer"], block["feedforward"]["bias"]
        ours, theirs = f"stack.blocks.{i}", f"model.layers.{i}"
        attention, feedforward = f"{ours}.mixer.inner", f"{ours}.feedforward.inner"
        found += linear(f"{ours}.mixer.before", f"{theirs}.input_layernorm", bias=False)
        found += linear(f"{attention}.query", f"{theirs}.self_attn.q_proj", bias=mixer["bias"])
        pair = (f"{theirs}.self_attn.k_proj", f"{theirs}.self_attn.v_proj")
        found += linear(f"{attention}.key_value", pair, bias=mixer["bias"])
        found += linear(f"{attention}.out", f"{theirs}.self_attn.o_proj", bias=mixer["out_bias"])
        if mixer.get("qk_norm"):
            found += linear(f"{attention}.query_norm", f"{theirs}.self_attn.q_norm", bias=False)
            found += linear(f"{attention}.key_norm", f"{theirs}.self_attn.k_norm", bias=False)
        found += linear(f"{ours}.feedforward.before", f"{theirs}.post_attention_layernorm", bias=False)
        gate_and_up = (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")
        found += linear(f"{feedforward}.enter", gate_and_up, bias=biased)
        found += linear(f"{feedforward}.leave", f"{theirs}.mlp.down_proj", bias=biased)
    found += linear("stack.norm", "model.norm", bias=False)
    if "lm" in spec["heads"]:
        found += linear("heads.lm.out", "lm_head", bias=False)  # where it is tied, it may be left out
    if "classify" in spec["heads"]:
        found += linear("heads.classify.out", "score", bias=False)
    if "tokens" in spec["heads"]:
        found += linear("heads.tokens.out", "score")
    return found


def write(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    stack, heads, kind = spec["stack"], spec["heads"], facts.type
    blocks = stack["blocks"] * stack["repeat"]
    mixer, feedforward = blocks[0]["mixer"], blocks[0]["feedforward"]
    config = {
        **facts.original,
        "architectures": [TYPES[kind] + published_ending(kind, HEADS, heads)],
        "model_type": kind,
        "hidden_size": spec["width"],
        "vocab_size": spec["vocab"],
        "num_hidden_layers": len(blocks),
        "intermediate_size": feedforward["hidden"],
        "hidden_act": published_activation(feedforward["activation"]),
        "num_attention_heads": mixer["heads"],
        "num_key_value_heads": mixer["kv_heads"],
        "head_dim": mixer["head_dim"],
        "rms_norm_eps": blocks[0]["norm_eps"],
        "max_position_embeddings": facts.max_tokens,
        "rope_parameters": _rope(stack["positions"]),
        "tie_word_embeddings": heads.get("lm", {}).get("tie", False),
        "bos_token_id": facts.bos,
        "eos_token_id": published_ids(facts.eos),
        "pad_token_id": facts.pad,
        **published_labels(spec),
    }
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = mixer["out_bias"]
    if kind == "llama":
        config["mlp_bias"] = feedforward["bias"]
    windows = [window[0] + 1 if (window := block["mixer"].get("window")) else None for block in blocks]
    if kind != "llama":
        config["sliding_window"] = next((window for window in windows if window), None)
    if kind in ("qwen2", "qwen3"):
        config["use_sliding_window"] = any(windows)
        config["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    return config


def _rope(positions: dict[str, Any]) -> dict[str, Any]:
    scaling = positions["scaling"]
    told = {"rope_theta": positions["base"], "rope_type": scaling["name"] if scaling else "default"}
    if scaling is not None:
        told["factor"] = scaling["factor"]
        if scaling["name"] == "llama3":
            told |= {theirs: scaling[ours] for ours, theirs in LLAMA3.items()}
    return told


def tiny() -> list[dict[str, Any]]:
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "vocab_size": 99, "max_position_embeddings": 64, "bos_token_id": 1,
             "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    llama3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    linear = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    given: list[tuple[str, str, dict[str, Any]]] = [
        ("llama", "Model", {}),
        ("llama", "ForCausalLM", {"tie_word_embeddings": True}),
        ("llama", "ForCausalLM", {"attention_bias": True, "mlp_bias": True, "rope_parameters": llama3,
                                  "pad_token_id": None, "eos_token_id": [2, 3]}),
        ("llama", "ForCausalLM", {"head_dim": 12, "num_key_value_heads": 1, "rope_parameters": linear}),
        ("llama", "ForSequenceClassification", {"num_labels": 3}),
        ("llama", "ForTokenClassification", {"num_labels": 3}),
        ("mistral", "ForCausalLM", {"sliding_window": 5}),
        ("mistral", "ForCausalLM", {"sliding_window": None, "head_dim": 12}),
        ("qwen2", "ForCausalLM", {"tie_word_embeddings": True}),
        ("qwen2", "ForCausalLM", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("qwen3", "ForCausalLM", {"head_dim": 16, "attention_bias": True}),
        ("qwen3", "ForSequenceClassification", {"head_dim": 16, "num_labels": 3}),
    ]  # fmt: skip
    return [{**small, "model_type": kind, "architectures": [TYPES[kind] + name], **more} for kind, name, more in given]
