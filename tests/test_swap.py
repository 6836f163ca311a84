"""Another mixer in a pretrained model: equal where it says so; weights are where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from published import TINY, ids_and_padding, label, saved
from torch import Tensor

import headway
from headway import models
from headway.hub import Loaded
from headway.mask import Mask
from headway.swap.change import changed
from headway.swap.words import layers_of, mixer_of
from headway.testing import check_mixer

FAMILIES = ("bert", "roberta", "gpt2", "llama", "t5", "vit")
CASES = [case for case in TINY if case[0] in FAMILIES and case[1] % 2 == 0]
NAMES = {"bert": 2, "roberta": 1, "gpt2": 1, "llama": 2}  # a case of each that has logits for all tokens


def original(family: str) -> Loaded:
    return headway.load(saved((family, NAMES[family])))


def ids(length: int, rows: int = 2) -> Tensor:
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(3))


def states(model: Loaded, given: Tensor, **more: Any) -> Tensor:
    """Last hidden states, of an encoder-decoder those of its decoder."""
    with torch.no_grad():
        if model.kind == "seq2seq":
            return model.net.states(given, model.net.encode(given))
        return model.net(given, **more)


# --- what is equal


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_window_over_all_of_the_text_changes_nothing(case: tuple[str, int]) -> None:
    model = headway.load(saved(case))
    given = ids(20)
    if model.kind == "vision":
        given = torch.randn(2, model.spec["patches"]["channels"], *model.spec["patches"]["image"])
    found = headway.swap(model, "attention:window=40")
    if case != ("llama", 6):  # which has a window of its own
        assert found.exactness.tokens == 41
        torch.testing.assert_close(states(found.model, given), states(model, given), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("mixer", ["longformer:window=9", "attention:window=9", "streaming:window=7,sinks=2"])
def test_a_window_equals_the_original_just_as_far_as_it_says(family: str, mixer: str) -> None:
    model = original(family)
    if model.kind == "encoder" and mixer.startswith("streaming"):
        with pytest.raises(ValueError, match="only causal"):
            headway.swap(model, mixer)
        return
    found = headway.swap(model, mixer)
    reach = found.exactness.tokens
    assert reach == 10
    torch.testing.assert_close(states(found.model, ids(reach)), states(model, ids(reach)), atol=2e-5, rtol=1e-4)
    longer = ids(reach + 1)
    assert (states(found.model, longer) - states(model, longer)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_narrow_window_is_the_original_under_that_mask(family: str) -> None:
    model = original(family)
    found = headway.swap(model, "attention:window=3,sinks=2").model
    right = 0 if model.kind == "decoder" else 3
    masked = states(model, ids(30), mask=Mask(window=(3, right), sinks=2))
    torch.testing.assert_close(states(found, ids(30)), masked, atol=2e-5, rtol=1e-4)


def test_padding_still_changes_nothing() -> None:
    found = headway.swap(original("bert"), "longformer:window=4").model
    given, valid = ids_and_padding(99, 4, 20, "right")
    whole = found.hidden(given, valid)
    for row in range(4):
        length = int(valid[row].sum())
        alone = found.hidden(given[row : row + 1, :length])
        torch.testing.assert_close(whole[row : row + 1, :length], alone, atol=2e-5, rtol=1e-4)


def test_heads_that_share_keys_are_copied_for_each_query_head() -> None:
    model = original("llama")
    assert model.spec["stack"]["blocks"][0]["mixer"]["kv_heads"] == 2
    found = headway.swap(model, "longformer:window=30")
    assert "value.weight" in found.weights.copied
    torch.testing.assert_close(states(found.model, ids(20)), states(model, ids(20)), atol=2e-5, rtol=1e-4)


def test_a_scale_of_its_own_goes_into_the_queries() -> None:
    block = {"mixer": {"name": "attention", "heads": 2, "head_dim": 6, "scale": 1.0, "bias": True}}
    spec = {"kind": "decoder", "width": 16, "vocab": 99, "stack": {"blocks": [block], "repeat": 2}}
    model = Loaded(models.build(spec), spec)
    found = headway.swap(model, "longformer:window=30")
    torch.testing.assert_close(states(found.model, ids(20)), states(model, ids(20)), atol=2e-5, rtol=1e-4)


def test_only_the_layers_that_are_named_change() -> None:
    model = original("bert")
    found = headway.swap(model, "conv", "1-2")
    assert [(place.layer, place.after["name"]) for place in found.places] == [(1, "conv"), (2, "conv")]
    names = [block["mixer"]["name"] for block in found.model.spec["stack"]["blocks"]]
    assert names == ["attention", "conv", "conv"]
    kept = {name: tensor for name, tensor in model.net.state_dict().items() if "blocks.1.mixer.inner" not in name
            and "blocks.2.mixer.inner" not in name}  # fmt: skip
    new = found.model.net.state_dict()
    assert all(torch.equal(tensor, new[name]) for name, tensor in kept.items())


def test_either_stack_of_an_encoder_decoder_is_swapped_by_name() -> None:
    model = headway.load(saved(("t5", 0)))
    found = headway.swap(model, "attention:window=2", "decoder.0,encoder")
    stacks = {(place.stack, place.layer, tuple(place.after["window"])) for place in found.places}
    assert stacks == {("decoder", 0, (2, 0)), ("encoder", 0, (2, 2)), ("encoder", 1, (2, 2))}


# --- Longformer as published


def test_a_swapped_roberta_is_the_longformer_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = headway.swap(original("roberta"), "longformer:window=4", context=60).model
    facts = msgspec.structs.replace(found.facts, family="longformer", type="longformer", original={},
                                    globals={"spans": 2})  # fmt: skip
    found.facts = facts
    found.save(tmp_path / "theirs", format="transformers")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "theirs").eval()
    given = ids(48)
    marks = torch.zeros_like(given)
    marks[:, 0] = 1
    mask = Mask(window=(None, None), globals=marks.bool())
    with torch.no_grad():
        wanted = theirs(given, global_attention_mask=marks).logits
    torch.testing.assert_close(found.logits(given, mask=mask), wanted, atol=2e-4, rtol=1e-3)


def test_global_tokens_begin_as_ordinary_attention() -> None:
    model = headway.load(saved(("bert", 4)))  # it classifies by the first token
    found = headway.swap(model, "longformer:window=40")
    assert found.model.facts.globals == {"classify": "first"}
    assert {"global_query.weight", "global_key.bias"} <= set(found.weights.copied)
    torch.testing.assert_close(found.model.logits(ids(20)), model.logits(ids(20)), atol=2e-5, rtol=1e-4)
    narrow = headway.swap(model, "longformer:window=1", [2]).model
    other = ids(20)
    other[:, -1] += 1
    assert not torch.allclose(narrow.logits(other), narrow.logits(ids(20)))  # the first token sees the last one


@pytest.mark.parametrize(("family", "offset"), [("bert", 0), ("roberta", 2)])
def test_learned_positions_are_repeated(family: str, offset: int) -> None:
    model = original(family)
    found = headway.swap(model, "longformer:window=8", context=100)
    table, old = (m.net.stack.positions.table.weight for m in (found.model, model))
    length = len(old) - offset
    assert len(table) == 100 + offset and torch.equal(table[: len(old)], old)
    assert torch.equal(table[offset + length : offset + 2 * length], old[offset:])
    assert found.model.max_tokens == found.original.max_tokens == 100
    assert states(found.model, ids(100)).isfinite().all()
    torch.testing.assert_close(states(found.original, ids(20)), states(model, ids(20)))
    with pytest.raises(ValueError, match="learned positions end at"):
        states(model, ids(100))


def test_rotary_positions_need_no_table() -> None:
    found = headway.swap(original("llama"), "attention:window=8", context=1000)
    assert found.model.max_tokens == 1000 and found.weights.copied == ()


# --- streaming


def test_a_stream_with_sinks_holds_constant_memory_and_equals_one_pass() -> None:
    found = headway.swap(original("llama"), "streaming:window=6,sinks=2").model
    given, held, outputs = ids(60), [], []
    state = found.net.init_state(2, 60)
    with torch.no_grad():
        for start in range(0, 60, 5):
            pos = torch.arange(start, start + 5).expand(2, -1)
            outputs.append(found.net(given[:, start : start + 5], pos=pos, state=state))
            held.append(sum(one.nbytes for one, _ in state if one is not None))
    assert len(set(held[2:])) == 1
    torch.testing.assert_close(torch.cat(outputs, 1), states(found, given), atol=2e-5, rtol=1e-4)


def test_sinks_are_never_farther_than_the_memory_is_long() -> None:
    """Far along a text, moving everything but the sinks farther changes nothing: distances count within the memory."""
    found = headway.swap(original("llama"), "streaming:window=6,sinks=2").model
    still = headway.swap(original("llama"), "attention:window=6,sinks=2").model
    given = ids(30)

    def shifted(model: Loaded, by: int) -> Tensor:
        pos = torch.cat([torch.arange(2), torch.arange(20, 48) + by]).expand(2, -1)
        mixer = model.net.stack.blocks[0].mixer.inner
        with torch.no_grad():
            return mixer(model.net.embedding(given), mask=Mask(causal=True, segments=torch.zeros_like(given)), pos=pos)

    torch.testing.assert_close(shifted(found, 500), shifted(found, 0), atol=1e-4, rtol=1e-3)
    assert (shifted(still, 500) - shifted(still, 0)).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"window": 3, "sinks": 2, "kv_heads": 2, "bias": True},
                                     {"window": 2, "sinks": 0, "qk_norm": True, "positions": "none"}])  # fmt: skip
def test_streaming_keeps_the_contract_of_mixers(options: dict[str, Any]) -> None:
    assert {"streamed_equals_parallel", "padding_changes_nothing"} <= set(check_mixer("streaming", **options))


# --- what is refused


@pytest.mark.parametrize(
    ("family", "mixer", "given", "says"),
    [
        ("gpt2", "linformer", {}, "linformer is not causal"),
        ("bert", "ssm", {}, "ssm is only causal"),
        ("bert", "longformr:window=4", {}, "did you mean 'longformer'"),
        ("bert", "longformer:windw=4", {}, "did you mean 'window'"),
        ("bert", "longformer:window", {}, "write NAME:OPTION=VALUE"),
        ("bert", "longformer:heads=2", {}, "heads=2 does not fit the weights, which have 4"),
        ("bert", "conv", {"layers": "0-9"}, "0-9 is not among the 3 layers, 0 to 2"),
        ("bert", "conv", {"layers": "decoder.1"}, "no stack 'decoder'"),
        ("bert", "conv", {"layers": "first"}, "no stack 'first'"),
        ("bert", "conv", {"context": 10}, "a context of 10 tokens is below the 40"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(family: str, mixer: str, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        headway.swap(original(family), mixer, **given)
    assert "\n" not in str(error.value)


def test_weights_without_a_place_in_the_scores_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bias by distance \(buckets\)"):
        headway.swap(headway.load(saved(("t5", 0))), "longformer:window=4")
    with pytest.raises(ValueError, match="qk_norm=True, which performer has not"):
        headway.swap(headway.load(saved(("llama", 10))), "performer")
    with pytest.raises(ValueError, match=r"either stack: write encoder\.0 or decoder\.0"):
        headway.swap(headway.load(saved(("t5", 0))), "attention:window=4", "0")
    with pytest.raises(ValueError, match="no longest text that could be extended"):
        headway.swap(headway.load(saved(("t5", 0))), "attention:window=4", context=9)
    swapped = headway.swap(original("bert"), "longformer:window=4").model
    with pytest.raises(ValueError, match="layer 0 mixes by longformer"):
        headway.swap(swapped, "conv")


@pytest.mark.parametrize("mixer", ["longformer:window=4", "attention:window=4", "conv"])
def test_an_export_that_would_lose_the_mixer_is_refused(mixer: str, tmp_path: Path) -> None:
    found = headway.swap(original("bert"), mixer).model
    with pytest.raises(ValueError, match="format='headway'"):
        found.save(tmp_path / "theirs", format="transformers")
    assert not (tmp_path / "theirs").exists()
    found.save(tmp_path / "ours")
    again = headway.load(tmp_path / "ours")
    assert torch.equal(again.hidden(ids(20)), found.hidden(ids(20)))
    assert again.facts == found.facts


# --- words


def test_words_of_mixers_and_layers() -> None:
    assert mixer_of("longformer:window=[4,2],dilation=2") == {"name": "longformer", "window": [4, 2], "dilation": 2}
    assert mixer_of("linear:kind=plain") == {"name": "linear", "kind": "plain"}
    assert mixer_of("performer") == {"name": "performer"}
    assert layers_of("0-1,3", {"stack": 4}) == {"stack": [0, 1, 3]}
    assert layers_of([2], {"stack": 4}) == {"stack": [2]}
    assert layers_of(None, {"encoder": 2, "decoder": 1}) == {"encoder": [0, 1], "decoder": [0]}
    assert layers_of("encoder,decoder.0", {"encoder": 2, "decoder": 1}) == {"encoder": [0, 1], "decoder": [0]}


def test_a_new_mixer_takes_only_what_it_names() -> None:
    found = headway.swap(original("gpt2"), "linear:kind=gated")
    new = found.model.net.stack.blocks[0].mixer.inner
    old = original("gpt2").net.stack.blocks[0].mixer.inner
    assert torch.equal(new.enter.weight[:32], old.query.weight)
    assert torch.equal(new.enter.weight[32:96], old.key_value.weight)
    assert {"bias of enter", "bias of out"} == set(found.weights.left)
    assert "enter.weight (its gate)" in found.weights.new and "forget.0.weight" in found.weights.new
    other = headway.swap(original("gpt2"), "conv")
    assert other.weights.kept == () and "query.weight" in other.weights.left


def test_the_same_seed_makes_the_same_model() -> None:
    one, two, three = (headway.swap(original("gpt2"), "conv", seed=seed).model for seed in (0, 0, 1))
    assert torch.equal(states(one, ids(9)), states(two, ids(9)))
    assert not torch.equal(states(one, ids(9)), states(three, ids(9)))


def test_a_dual_model_is_refused() -> None:
    model = headway.load(saved(("clip", 0)))
    with pytest.raises(ValueError, match="a dual has no stack"):
        changed(model, {"name": "conv"})


def test_adapters_go_into_the_weights_before() -> None:
    from headway.adapt import adapt, fold

    model = original("gpt2")
    adapt(model, "lora", rank=2)
    with pytest.raises(ValueError, match="fold"):
        headway.swap(model, "conv")
    fold(model)
    torch.testing.assert_close(
        states(headway.swap(model, "attention:window=40").model, ids(20)), states(model, ids(20))
    )


def test_the_least_exact_of_all_places_is_told() -> None:
    found = headway.swap(headway.load(saved(("t5", 0))), "attention:window=2", "decoder.0,encoder.0")
    assert found.exactness.tokens == 3
