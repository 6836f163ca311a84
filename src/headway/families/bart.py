"""BART (1910.13461), mBART (2001.08210) and Marian (1804.00344): encoder-decoders of one file layout.

BART is post-norm with learned positions and a norm behind them; mBART is BART pre-norm; Marian is BART with computed
sinusoidal positions and no norm behind them. A bare model has the tied head that transformers would give it.
"""

from __future__ import annotations

import math
from typing import Any

from headway.families import ACTIVATIONS, Config, Facts, Published, Rule, linear, published_activation, published_ids

TYPES = ("bart", "mbart", "marian")
NAMES = {  # a bare model, and one with the bias of its head
    "bart": ("BartModel", "BartForConditionalGeneration"),
    "mbart": ("MBartModel", "MBartForConditionalGeneration"),
    "marian": ("MarianModel", "MarianMTModel"),
}
SINUSOIDAL = {"name": "sinusoidal"}
# How a checkpoint would have its answers searched: told in Facts.generation, changed by nobody
SEARCH = """num_beams max_length min_length length_penalty early_stopping no_repeat_ngram_size repetition_penalty
    do_sample temperature top_k top_p num_return_sequences diversity_penalty num_beam_groups max_new_tokens
    encoder_no_repeat_ngram_size min_new_tokens renormalize_logits remove_invalid_values""".split()  # noqa: SIM905


def read(config: Config) -> Published:
    kind = config.data["model_type"]
    bare = config.ending(NAMES[kind], default=NAMES[kind][0]) == NAMES[kind][0]
    _expect_wiring(config, kind)
    width, vocab = config.size("d_model"), config.size("vocab_size")
    length = config.size("max_position_embeddings", 1024)
    config.expect("decoder_vocab_size", vocab)
    activation = config.choose("activation_function", ACTIVATIONS, "gelu")
    positions = SINUSOIDAL if kind == "marian" else {"name": "learned", "length": length, "offset": 2}

    def stack(side: str) -> dict[str, Any]:
        mixer = {"name": "attention", "heads": config.size(f"{side}_attention_heads", 16), "bias": True}
        hidden = {"hidden": config.size(f"{side}_ffn_dim", 4096), "activation": activation}
        block = {"mixer": mixer, "cross": mixer if side == "decoder" else None, "feedforward": hidden, "norm": "layer",
                 "wiring": "pre" if kind == "mbart" else "post"}  # fmt: skip
        return {"blocks": [block], "repeat": config.depth(f"{side}_layers", 12), "positions": positions,
                "first_norm": kind != "marian", "final_norm": kind == "mbart"}  # fmt: skip

    spec = {
        "kind": "seq2seq",
        "width": width,
        "source_vocab": vocab,
        "target_vocab": vocab,
        "encoder": stack("encoder"),
        "decoder": stack("decoder"),
        "dropout": config.take("dropout", 0.1, float),
        "tie": True,
        "share": True,
        "head_bias": not bare,
        "embed_scale": math.sqrt(width) if config.take("scale_embedding", False, bool) else 1.0,
    }
    facts = Facts(family="bart", type=kind, max_tokens=length, **answers(config))
    unused = ("*coder.version", *["*coder.embed_positions.weight"] * (kind == "marian"))
    return Published(spec, facts, rules(spec), "model.", unused)


def _expect_wiring(config: Config, kind: str) -> None:
    """Old files say in so many words what `model_type` says by now."""
    pre = kind == "mbart"
    config.expect("is_encoder_decoder", True)
    config.expect("is_decoder", False)
    config.expect("tie_word_embeddings", True)
    config.expect("share_encoder_decoder_embeddings", True)
    config.expect("normalize_before", pre)
    config.expect("add_final_layer_norm", pre)
    config.expect("normalize_embedding", kind != "marian")
    config.expect("static_position_embeddings", kind == "marian")
    config.expect("extra_pos_embeddings", 2)
    config.ignore("attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std",
                  "classifier_dropout", "classif_dropout", "num_hidden_layers", "add_bias_logits", "output_past",
                  "_num_labels", "prefix", "force_bos_token_to_be_generated", "student_encoder_layers",
                  "student_decoder_layers", "save_step", "replacing_rate")  # fmt: skip


def answers(config: Config, start: int | None = None) -> dict[str, Any]:
    """The facts of how inputs and answers begin and end; `start` is what a decoder begins with by default."""
    ends = config.ids("forced_eos_token_id")
    if len(ends) > 1:
        raise ValueError(f"{config.where}: forced_eos_token_id names {len(ends)} ids, and one can be written last")
    tasks = config.take("task_specific_params", {}, dict)
    return {
        "bos": config.take("bos_token_id", None, int),
        "eos": config.ids("eos_token_id"),
        "pad": config.take("pad_token_id", None, int),
        "start": config.take("decoder_start_token_id", start, int),
        "forced_bos": config.take("forced_bos_token_id", None, int),
        "forced_eos": ends[0] if ends else None,
        "bad": config.bad_words(),
        "prefixes": {name: task["prefix"] for name, task in tasks.items()
                     if isinstance(task, dict) and isinstance(task.get("prefix"), str)},
        "generation": {name: value for name in SEARCH if (value := config.take(name, None)) is not None},
        "original": config.original(),
    }  # fmt: skip


def published_answers(facts: Facts) -> dict[str, Any]:
    """`answers`, the way back."""
    found = {
        "bos_token_id": facts.bos,
        "eos_token_id": published_ids(facts.eos),
        "pad_token_id": facts.pad,
        "decoder_start_token_id": facts.start,
        "forced_bos_token_id": facts.forced_bos,
        "forced_eos_token_id": facts.forced_eos,
        "bad_words_ids": [[i] for i in facts.bad] or None,
    }
    return {**facts.original, **facts.generation, **found}


def rules(spec: dict[str, Any]) -> list[Rule]:
    """Their names by ours."""
    found = [Rule(("source.weight",), ("model.shared.weight",)),
             Rule(("source.weight",), ("model.encoder.embed_tokens.weight",)),  # tied, as the next two: may be left out
             Rule(("target.weight",), ("model.decoder.embed_tokens.weight",)),
             Rule(("head.weight",), ("lm_head.weight",))]  # fmt: skip
    if spec["head_bias"]:
        found.append(Rule(("head.bias",), ("final_logits_bias",), transpose=True))  # theirs is one row
    for side in ("encoder", "decoder"):
        stack = spec[side]
        if stack["positions"]["name"] == "learned":
            found.append(Rule((f"{side}.positions.table.weight",), (f"model.{side}.embed_positions.weight",)))
        if stack["first_norm"]:
            found += linear(f"{side}.first_norm", f"model.{side}.layernorm_embedding")
        if stack["final_norm"]:
            found += linear(f"{side}.norm", f"model.{side}.layer_norm")
        place = "before" if stack["blocks"][0]["wiring"] == "pre" else "after"
        for i in range(stack["repeat"]):
            found += _block(f"{side}.blocks.{i}", f"model.{side}.layers.{i}", place, side == "decoder")
    return found


def _block(ours: str, theirs: str, place: str, cross: bool) -> list[Rule]:
    found = []
    for mine, other in (("mixer", "self_attn"), ("cross", "encoder_attn"))[: 1 + cross]:
        found += linear(f"{ours}.{mine}.inner.query", f"{theirs}.{other}.q_proj")
        found += linear(f"{ours}.{mine}.inner.key_value", (f"{theirs}.{other}.k_proj", f"{theirs}.{other}.v_proj"))
        found += linear(f"{ours}.{mine}.inner.out", f"{theirs}.{other}.out_proj")
        found += linear(f"{ours}.{mine}.{place}", f"{theirs}.{other}_layer_norm")
    found += linear(f"{ours}.feedforward.inner.enter", f"{theirs}.fc1")
    found += linear(f"{ours}.feedforward.inner.leave", f"{theirs}.fc2")
    return found + linear(f"{ours}.feedforward.{place}", f"{theirs}.final_layer_norm")


def write(spec: dict[str, Any], facts: Facts) -> dict[str, Any]:
    block = spec["encoder"]["blocks"][0]
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("layers", spec[side]["repeat"]),
            ("attention_heads", spec[side]["blocks"][0]["mixer"]["heads"]),
            ("ffn_dim", spec[side]["blocks"][0]["feedforward"]["hidden"]),
        )
    }
    return {
        **published_answers(facts),
        "architectures": [NAMES[facts.type][spec["head_bias"]]],
        "model_type": facts.type,
        "is_encoder_decoder": True,
        "d_model": spec["width"],
        "vocab_size": spec["source_vocab"],
        "max_position_embeddings": facts.max_tokens,
        **sides,
        "dropout": spec["dropout"],
        "activation_function": published_activation(block["feedforward"]["activation"]),
        "scale_embedding": spec["embed_scale"] != 1,
    }


def tiny() -> list[dict[str, Any]]:
    small = {"d_model": 32, "vocab_size": 99, "max_position_embeddings": 40, "encoder_layers": 2, "decoder_layers": 3,
             "encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
             "decoder_ffn_dim": 40}  # fmt: skip
    marian = {"activation_function": "swish", "pad_token_id": 98, "decoder_start_token_id": 98, "eos_token_id": 0,
              "forced_eos_token_id": 0, "bad_words_ids": [[98]]}  # fmt: skip
    return [
        {**small, "model_type": "bart", "architectures": ["BartForConditionalGeneration"], "forced_bos_token_id": 0},
        {**small, "model_type": "bart", "architectures": ["BartModel"], "scale_embedding": True},
        {**small, "model_type": "mbart", "architectures": ["MBartForConditionalGeneration"], "scale_embedding": True,
         "decoder_start_token_id": 9},
        {**small, **marian, "model_type": "marian", "architectures": ["MarianMTModel"], "scale_embedding": True},
    ]  # fmt: skip
