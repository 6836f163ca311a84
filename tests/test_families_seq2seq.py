"""Every encoder-decoder equals transformers: hidden states, logits, attention maps, and what it writes with a cache."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from published import TINY, ids_and_padding, label, oracle, saved
from torch import Tensor, nn

import headway
from headway import families
from headway.attend import explain_layers
from headway.generate.step import step_of
from headway.loaded import Facts, Loaded

CLOSE = 3e-5
SPECS = {case: families.read(families.family(case[0]).tiny()[case[1]], "x").spec for case in TINY}
CASES = [case for case, spec in SPECS.items() if spec["kind"] == "seq2seq"
         and all(block["mixer"]["name"] == "attention" for block in spec["encoder"]["blocks"])]  # fmt: skip
NEW = 12


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    apart = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
    assert apart < CLOSE, apart


def batch(model: Loaded, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Source ids, which of them are no padding, and target ids."""
    ids, valid = ids_and_padding(model.spec["source_vocab"] - 1, 3, 12, side)
    target = torch.randint(5, model.spec["target_vocab"] - 1, (3, 8))
    target[:, 0] = model.facts.start
    return torch.where(valid, ids, model.facts.pad or 0), valid, target


def answers(case: tuple[str, int], ids: Tensor, valid: Tensor, target: Tensor, side: str) -> list[tuple[Any, Tensor]]:
    """transformers' outputs and the rows they are of. What stands behind padding on the left is asked for alone:
    some families of theirs count padding as positions, and ours never."""
    asked = [(slice(i, i + 1), valid[i]) for i in range(len(ids))] if side == "left" else [(slice(0, len(ids)), None)]
    found = []
    for rows, kept in asked:
        given, mask = (ids[rows], valid[rows]) if kept is None else (ids[rows][:, kept], valid[rows][:, kept])
        with torch.no_grad():
            found.append((oracle(case)(input_ids=given, attention_mask=mask.long(), decoder_input_ids=target[rows],
                                       output_attentions=True), torch.arange(len(ids))[rows]))  # fmt: skip
    return found


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_encoder_states_and_logits_equal_transformers(case: tuple[str, int], side: str) -> None:
    model = headway.load(saved(case))
    ids, valid, target = batch(model, side)
    keep = None if side == "none" else valid
    hidden, logits = model.hidden(ids, keep), model.logits(ids, keep, target=target)
    for theirs, rows in answers(case, ids, valid, target, side):
        states = theirs.encoder_last_hidden_state
        seen = valid[rows] if len(rows) > 1 else torch.ones(states.shape[:2], dtype=torch.bool)
        close(hidden[rows][valid[rows]], states[seen])
        said = theirs.logits if "logits" in theirs else model.net.head_of(theirs.last_hidden_state)
        close(logits[rows], said.detach())


@pytest.mark.parametrize("case", [c for c in CASES if c[0] != "led"], ids=label)  # windows: test_families_longformer
def test_attention_maps_equal_transformers(case: tuple[str, int]) -> None:
    model = headway.load(saved(case))
    ids, valid, target = batch(model, "right")
    maps = maps_of(model, ids, valid, target)
    ((theirs, _),) = answers(case, ids, valid, target, "right")
    seen = valid[:, None, :, None]
    wanted = [*theirs.encoder_attentions, *pairs(theirs.decoder_attentions, theirs.cross_attentions)]
    for (name, found), other in zip(maps.items(), wanted, strict=True):
        close(*((found * seen, other * seen) if name.startswith("encoder") else (found, other)))


def pairs(one: Any, two: Any) -> list[Tensor]:
    return [tensor for both in zip(one, two, strict=True) for tensor in both]


@torch.no_grad()
def maps_of(model: Loaded, ids: Tensor, valid: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The map of every mixer by its name, from what it was given."""
    given: dict[str, tuple[nn.Module, Tensor, dict[str, Any]]] = {}

    def capture(name: str, mixer: nn.Module) -> Any:
        return mixer.register_forward_pre_hook(
            lambda _, inputs, named: given.update({name: (mixer, inputs[0], named)}), with_kwargs=True
        )

    hooks = [capture(name, module) for name, module in model.net.named_modules() if hasattr(module, "map")]
    model.logits(ids, valid, target=target)
    for hook in hooks:
        hook.remove()
    wanted = ("mask", "pos", "context")
    return {name: mixer.map(x, **{key: named[key] for key in wanted if named.get(key) is not None})  # type: ignore[operator]
            for name, (mixer, x, named) in given.items()}  # fmt: skip


@torch.inference_mode()
def written(model: Loaded, ids: Tensor, valid: Tensor | None, flat: bool) -> list[list[int]]:
    """Greedy, with a cache, as a checkpoint's facts would have it; each row to its end."""
    net, facts = model.net, model.facts
    memory, state = net.encode(ids, valid), net.init_state(len(ids), 4)
    step = step_of(net, memory, state) if flat else lambda last, pos: net.decode(last, memory, pos=pos, state=state)
    rows: list[list[int]] = [[] for _ in ids]
    last = torch.full((len(ids), 1), facts.start)
    for t in range(NEW):
        logits = step(last, torch.full_like(last, t))[:, -1]
        logits[:, list(facts.bad)] = float("-inf")
        last = logits.argmax(-1, keepdim=True)
        if t == 0 and facts.forced_bos is not None:
            last = torch.full_like(last, facts.forced_bos)
        if t == NEW - 1 and facts.forced_eos is not None:
            last = torch.full_like(last, facts.forced_eos)
        for row, token in zip(rows, last[:, 0].tolist(), strict=True):
            if not row or row[-1] not in facts.eos:
                row.append(token)
    return rows


def told(facts: Facts) -> dict[str, Any]:
    """What transformers wants to be told, for it keeps such things beside a configuration."""
    return {"decoder_start_token_id": facts.start, "forced_bos_token_id": facts.forced_bos,
            "forced_eos_token_id": facts.forced_eos, "bad_words_ids": [[i] for i in facts.bad] or None}  # fmt: skip


def ended(ids: list[int], eos: tuple[int, ...]) -> list[int]:
    """Up to its end; what follows is padding."""
    return ids[: next((i for i, token in enumerate(ids) if token in eos), len(ids)) + 1]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_greedy_tokens_with_a_cache_equal_transformers(case: tuple[str, int], side: str) -> None:
    model = headway.load(saved(case))
    facts, (ids, valid, _) = model.facts, batch(model, side)
    keep, theirs = None if side == "none" else valid, []
    ours = written(model, ids, keep, flat=True)
    assert written(model, ids, keep, flat=False) == ours
    assert len({tuple(row[1:4]) for row in ours}) > 1, "rows that write the same prove nothing"
    if not hasattr(oracle(case), "generate"):
        return  # a bare model of theirs writes nothing
    asked: list[tuple[Tensor, Tensor | None]] = [(ids, valid.long())]
    if side == "left":
        asked = [(row[there][None], None) for row, there in zip(ids, valid, strict=True)]
    for rows, mask in asked:
        found = oracle(case).generate(
            rows, attention_mask=mask, max_new_tokens=NEW, do_sample=False, num_beams=1, **told(facts)
        )
        theirs += [ended(row[1:].tolist(), facts.eos) for row in found]
    assert ours == theirs


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_decoder_that_streams_gives_the_logits_of_one_that_does_not(case: tuple[str, int]) -> None:
    model = headway.load(saved(case))
    ids, valid, target = batch(model, "right")
    net = model.net
    with torch.no_grad():
        memory, state = net.encode(ids, valid), net.init_state(3, 2)
        pos = torch.arange(8).expand(3, 8)
        parts = [net.decode(target[:, a:b], memory, pos=pos[:, a:b], state=state) for a, b in ((0, 3), (3, 4), (4, 8))]
        close(torch.cat(parts, 1), net.decode(target, memory))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_no_layer_falls_back_to_the_reference(case: tuple[str, int]) -> None:
    model = headway.load(saved(case))
    ids, valid, target = batch(model, "right")
    said = explain_layers(model.net, ids, target, valid)
    assert said.keys() == {name for name, module in model.net.named_modules() if hasattr(module, "CAN")}
    assert not any("reference" in line for line in said.values()), said


@pytest.mark.parametrize("case", CASES, ids=label)
def test_bfloat16_is_as_near_to_float32_as_theirs(case: tuple[str, int]) -> None:
    exact, rough = headway.load(saved(case)), headway.load(saved(case), dtype="bfloat16")
    ids, valid, target = batch(exact, "right")
    wanted, ours = (model.logits(ids, valid, target=target).float() for model in (exact, rough))
    with torch.no_grad():
        said = copy.deepcopy(oracle(case)).to(torch.bfloat16)(
            input_ids=ids, attention_mask=valid.long(), decoder_input_ids=target
        )
    theirs = said.logits if "logits" in said else rough.net.head_of(said.last_hidden_state).detach()
    apart = [float((t.float() - wanted).norm() / wanted.norm()) for t in (ours, theirs)]
    assert 0 < apart[0] < 2 * apart[1], apart


def test_t5_is_not_read_in_float16_which_it_overflows() -> None:
    case = next(case for case in CASES if case[0] == "t5")
    with pytest.raises(ValueError, match=r"T5 overflows float16 .* bfloat16 or float32"):
        headway.load(saved(case), dtype="float16")


BART_LIKE = {
    "_num_labels": 3, "activation_dropout": 0.0, "add_bias_logits": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "classif_dropout": 0.0, "classifier_dropout": 0.0, "decoder_layerdrop": 0.0, "dropout": 0.1,
    "encoder_layerdrop": 0.0,
    "gradient_checkpointing": False, "init_std": 0.02, "is_encoder_decoder": True, "use_cache": True,
    **{f"{side}_{name}": size for side in ("encoder", "decoder")
       for name, size in (("attention_heads", 8), ("ffn_dim", 2048), ("layers", 6))}, "num_hidden_layers": 6,
}  # fmt: skip
PUBLISHED = {  # the fields that well-known files hold
    "flan-t5-base": {
        "architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 768,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
        "n_positions": 512, "num_decoder_layers": 12, "num_heads": 12, "num_layers": 12, "output_past": True,
        "pad_token_id": 0, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
        "task_specific_params": {"to_de": {"max_length": 300, "prefix": "translate English to German: "}},
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": 32128,
    },
    "bart-large-cnn": {
        **BART_LIKE, "activation_function": "gelu", "add_final_layer_norm": False, "d_model": 1024,
        "early_stopping": True, "architectures": ["BartForConditionalGeneration"], "decoder_start_token_id": 2,
        "eos_token_id": 2, "forced_bos_token_id": 0, "forced_eos_token_id": 2, "length_penalty": 2.0, "max_length": 142,
        "max_position_embeddings": 1024, "min_length": 56, "model_type": "bart", "no_repeat_ngram_size": 3,
        "normalize_before": False, "num_beams": 4, "output_past": True, "pad_token_id": 1, "prefix": " ",
        "scale_embedding": False, "static_position_embeddings": False, "vocab_size": 50264,
        "force_bos_token_to_be_generated": True, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
    },
    "opus-mt-en-de": {
        **BART_LIKE, "activation_function": "swish", "add_final_layer_norm": False, "architectures": ["MarianMTModel"],
        "bad_words_ids": [[58100]], "d_model": 512, "decoder_start_token_id": 58100, "decoder_vocab_size": 58101,
        "eos_token_id": 0, "forced_eos_token_id": 0, "max_length": 512, "max_position_embeddings": 512,
        "model_type": "marian", "normalize_before": False, "normalize_embedding": False, "num_beams": 6,
        "pad_token_id": 58100, "scale_embedding": True, "share_encoder_decoder_embeddings": True,
        "static_position_embeddings": True, "vocab_size": 58101,
    },
}  # fmt: skip


def test_published_files_say_how_answers_begin_and_end() -> None:
    flan, cnn, opus = (families.read(config, name).facts for name, config in PUBLISHED.items())
    assert (flan.start, flan.eos, flan.prefixes) == (0, (1,), {"to_de": "translate English to German: "})
    assert (cnn.start, cnn.forced_bos, cnn.forced_eos, cnn.max_tokens) == (2, 0, 2, 1024)
    assert cnn.generation["num_beams"] == 4 and cnn.generation["length_penalty"] == 2.0
    assert (opus.start, opus.pad, opus.bad, opus.eos) == (58100, 58100, (58100,), (0,))


@pytest.mark.parametrize(
    "name,field,value,said",
    [
        ("flan-t5-base", "architectures", ["T5ForTokenClassification"], "T5ForTokenClassification is not read"),
        ("flan-t5-base", "feed_forward_proj", "gated-swoosh", "'feed_forward_proj' is 'gated-swoosh'"),
        ("flan-t5-base", "is_decoder", True, "'is_decoder' is True, which changes the result"),
        ("bart-large-cnn", "normalize_before", True, "'normalize_before' is True, which changes the result"),
        ("bart-large-cnn", "bad_words_ids", [[3, 4]], "bad_words_ids is read where each word is one id"),
        ("opus-mt-en-de", "share_encoder_decoder_embeddings", False, "changes the result; Headway knows True"),
    ],
)
def test_what_would_change_the_result_is_refused(name: str, field: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        families.read({**PUBLISHED[name], field: value}, "config.json")
