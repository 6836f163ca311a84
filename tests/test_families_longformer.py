"""Longformer and LED with global tokens equal transformers: states, maps, what each task makes global by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from published import TINY, ids_and_padding, label, oracle, output, saved
from safetensors.torch import load_file, save_file
from torch import Tensor

import headway
from headway import families
from headway.generate.write import Options, beams, tokens
from headway.loaded import Loaded
from headway.mask import Mask

CLOSE = 3e-5
CASES = [case for case in TINY if case[0] in ("longformer", "led")]
BY_NAME = {label(case).rpartition("-")[0]: case for case in CASES}
SOME = [BY_NAME[name] for name in ("LongformerModel", "LongformerForMaskedLM", "LEDForConditionalGeneration")]
SEP, LENGTH = 4, 21  # 21 is no multiple of a window


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers says that it pads."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    apart = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
    assert apart < CLOSE, apart


def batch(model: Loaded, side: str, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, which of them are no padding, and which are global: a few of each row, and none of the last."""
    ids, valid = ids_and_padding(99, 4, length, side)
    is_global = (torch.rand(4, length) < 0.2) & valid
    is_global[3] = False
    return torch.where(valid, ids, model.facts.pad or 0), valid, is_global


def by_position(is_global: Tensor, valid: Tensor) -> Mask:
    """A mask's global tokens are told by position, which counts the tokens that are there."""
    rows = [flags[there] for flags, there in zip(is_global, valid, strict=True)]
    return Mask(window=(None, None), globals=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))


def encoded(case: tuple[str, int], ids: Tensor, valid: Tensor, is_global: Tensor, **more: Any) -> Any:
    """What transformers' encoder gives; positions count the tokens that are there, on either side of padding."""
    net = oracle(case)
    with torch.no_grad():
        if case[0] == "led":
            return net.base_model.encoder(ids, valid.long(), is_global.long(), **more)
        pos = (valid.cumsum(1) - 1).clamp(min=0) + 2
        return net.base_model(ids, valid.long(), is_global.long(), position_ids=pos, **more)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("case", SOME, ids=label)
def test_hidden_states_with_global_tokens_equal_transformers(case: tuple[str, int], side: str) -> None:
    model = headway.load(saved(case))
    ids, valid, is_global = batch(model, side)
    ours = model.hidden(ids, None if side == "none" else valid, mask=by_position(is_global, valid))
    if case[0] == "led" and side == "left":  # there, their positions count padding: each row alone
        alone = [(i[v][None], v[v][None], g[v][None]) for i, v, g in zip(ids, valid, is_global, strict=True)]
        close(ours[valid], torch.cat([encoded(case, *row).last_hidden_state[0] for row in alone]))
    else:
        close(ours[valid], encoded(case, ids, valid, is_global).last_hidden_state[valid])
    without = model.hidden(ids, None if side == "none" else valid)
    assert (ours - without)[:3][valid[:3]].abs().max() > 0.1, "global tokens that change nothing prove nothing"


@pytest.mark.parametrize("length", [1, 3, 8, 40])
def test_texts_shorter_and_longer_than_the_window_equal_transformers(length: int) -> None:
    case = BY_NAME["LongformerForMaskedLM"]
    model = headway.load(saved(case))
    ids = torch.randint(5, 99, (2, length))
    valid = torch.ones_like(ids, dtype=torch.bool)
    close(model.hidden(ids), encoded(case, ids, valid, ~valid).last_hidden_state)
    close(model.hidden(ids, mask=by_position(valid, valid)), encoded(case, ids, valid, valid).last_hidden_state)


def test_a_text_longer_than_the_table_of_positions_is_refused() -> None:
    model = headway.load(saved(BY_NAME["LongformerModel"]))
    assert model.max_tokens == 40  # of 42 rows, two are unused
    with pytest.raises(ValueError, match="41 tokens; this model takes 40"):
        model.hidden(torch.full((1, 41), 7))


def full_maps(found: Any, is_global: Tensor, layer: int, window: int) -> Tensor:
    """transformers' maps over all pairs: theirs are of windows, of global tokens seen, and of global tokens looking."""
    local = found.attentions[layer]
    rows, heads, length, width = local.shape
    slots = width - window - 1
    full = torch.zeros(rows, heads, length, length)
    for row in range(rows):
        places = is_global[row].nonzero()[:, 0]
        full[row][:, :, places] += local[row, :, :, : len(places)]
        for t in range(length):
            low, high = max(t - window // 2, 0), min(t + window // 2 + 1, length)
            begin = slots + low - t + window // 2
            full[row, :, t, low:high] += local[row, :, t, begin : begin + high - low]
        for slot, t in enumerate(places):
            full[row, :, t] = found.global_attentions[layer][row, :, :length, slot]
    return full


@pytest.mark.parametrize("case", SOME, ids=label)
def test_attention_maps_equal_transformers(case: tuple[str, int]) -> None:
    model = headway.load(saved(case))
    ids, valid, is_global = batch(model, "right")
    found = encoded(case, ids, valid, is_global, output_attentions=True)
    maps: list[tuple[Any, Tensor, dict[str, Any]]] = []
    blocks = (model.net.encoder if case[0] == "led" else model.net.stack).blocks
    watch = lambda mixer, given, named: maps.append((mixer, given[0], named))
    hooks = [block.mixer.inner.register_forward_pre_hook(watch, with_kwargs=True) for block in blocks]
    model.hidden(ids, valid, mask=by_position(is_global, valid))
    for hook in hooks:
        hook.remove()
    assert len(maps) == len(blocks)
    for i, (mixer, x, named) in enumerate(maps):
        with torch.inference_mode():
            ours = mixer.map(x, mask=named["mask"], pos=named["pos"])
        close(ours * valid[:, None, :, None], full_maps(found, is_global, i, 2 * mixer.window[0])
              * valid[:, None, :, None])  # fmt: skip


# --- What a task makes global by itself


def asked(side: str) -> tuple[Tensor, Tensor]:
    """Questions and contexts of several lengths, between separators, and which of the ids are no padding."""
    rows = []
    for question, context in ((3, 9), (1, 14), (5, 4)):
        q, c = torch.randint(5, 99, (question,)).tolist(), torch.randint(5, 99, (context,)).tolist()
        rows.append([0, *q, SEP, SEP, *c, SEP])
    longest = max(map(len, rows))
    padded = [[*r, *[1] * (longest - len(r))] if side == "right" else [*[1] * (longest - len(r)), *r] for r in rows]
    ids = torch.tensor(padded)
    return ids, ids.ne(1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["LongformerForSequenceClassification", "LongformerForQuestionAnswering"])
def test_a_head_has_the_global_tokens_that_transformers_gives_it(name: str, side: str) -> None:
    case = BY_NAME[name]
    model = headway.load(saved(case))
    ids, valid = asked(side)
    ours = model.logits(ids, valid)
    for row in range(len(ids)):
        with torch.no_grad():  # alone: their first token is the first padding
            theirs = output(oracle(case)(ids[row][valid[row]][None]))[0]
        close(ours[row] if ours.ndim == 2 else ours[row][valid[row]], theirs)
    assert (ours - model.logits(ids, valid, mask=Mask())).abs().max() > 1e-3, "a mask that is given holds instead"


@pytest.mark.parametrize("name", ["LongformerForMaskedLM", "LongformerForTokenClassification"])
def test_other_heads_have_no_global_tokens(name: str) -> None:
    model = headway.load(saved(BY_NAME[name]))
    ids, valid = asked("right")
    assert torch.equal(model.logits(ids, valid), model.logits(ids, valid, mask=Mask()))


def test_a_new_head_of_that_name_has_them_too() -> None:
    model = headway.load(saved(BY_NAME["LongformerModel"]), heads={"classify": {"outputs": 2, "pool": "first"}})
    ids, valid = asked("right")
    first = Mask(window=(None, None), globals=torch.ones(3, 1, dtype=torch.bool))
    assert torch.equal(model.logits(ids, valid), model.logits(ids, valid, mask=first))
    assert not torch.equal(model.logits(ids, valid), model.logits(ids, valid, mask=Mask()))


def test_a_question_that_no_separator_ends_is_refused() -> None:
    model = headway.load(saved(BY_NAME["LongformerForQuestionAnswering"]))
    ids, valid = asked("right")
    ids[1].masked_fill_(ids[1].eq(SEP), 7)
    with pytest.raises(ValueError, match=r"^row 1 has no separator \(id 4\) .* mask=$"):
        model.logits(ids, valid)
    assert model.logits(ids, valid, mask=Mask()).shape == (*ids.shape, 2)


def test_led_writes_with_the_first_token_global_as_transformers_does_when_told_to() -> None:
    case = BY_NAME["LEDForConditionalGeneration"]
    model = headway.load(saved(case))
    rows = [torch.randint(5, 99, (length,)).tolist() for length in (19, 30, 11)]
    ours: list[list[int]] = [[] for _ in rows]
    for token in tokens(model, rows, Options(tokens=9)):
        ours[token.row].append(token.id)
    plain, told = [], []
    for row in rows:
        ids = torch.tensor([row])
        first = torch.zeros_like(ids)
        first[:, 0] = 1
        how = {"max_new_tokens": 9, "do_sample": False, "num_beams": 1}
        told.append(oracle(case).generate(ids, global_attention_mask=first, **how)[0, 1:].tolist())
        plain.append(oracle(case).generate(ids, **how)[0, 1:].tolist())
    assert ours == told != plain
    assert [found.ids for found in beams(model, rows, Options(tokens=9, beams=1))] == [
        [i for i in row if i not in model.facts.eos] for row in told
    ]


# --- Configurations and files


@pytest.mark.parametrize(
    ("window", "said"),
    [
        (5, "an even number from 2 on, not 5"),
        (0, "an even number from 2 on, not 0"),
        ([4, 4], "2 attention windows for 3 layers"),
        ([4, 4.0, 4], r"an even number from 2 on, not \[4, 4.0, 4\]"),
        ([], "0 attention windows for 3 layers"),
    ],
)
def test_windows_that_are_none_are_refused(window: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^config.json: .*{said}"):
        families.read({**families.family("longformer").tiny()[0], "attention_window": window}, "config.json")


def test_the_published_configuration_takes_4096_tokens() -> None:
    found = families.read(
        {"model_type": "longformer", "attention_mode": "longformer", "attention_window": [512] * 12, "bos_token_id": 0,
         "attention_probs_dropout_prob": 0.1, "eos_token_id": 2, "gradient_checkpointing": False, "hidden_act": "gelu",
         "hidden_dropout_prob": 0.1, "hidden_size": 768, "ignore_attention_mask": False, "initializer_range": 0.02,
         "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 4098, "num_attention_heads": 12,
         "num_hidden_layers": 12, "pad_token_id": 1, "sep_token_id": 2, "type_vocab_size": 1, "vocab_size": 50265},
        "config.json",
    )  # fmt: skip
    stack = found.spec["stack"]
    assert found.facts.max_tokens == 4096 and stack["positions"]["offset"] == 2 and stack["repeat"] == 12
    assert [block["mixer"]["window"] for block in stack["blocks"]] == [256]


def test_a_pooler_that_an_old_file_holds_and_its_head_never_reads_is_left_out(tmp_path: Path) -> None:
    folder = saved(BY_NAME["LongformerForMaskedLM"])
    extra = {"longformer.pooler.dense.weight": torch.ones(32, 32), "longformer.pooler.dense.bias": torch.ones(32)}
    save_file({**load_file(folder / "model.safetensors"), **extra}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())))
    ids = torch.randint(5, 99, (1, 9))
    assert torch.equal(headway.load(tmp_path).logits(ids), headway.load(folder).logits(ids))
