"""Adapters become part of the weights and leave them again; a base in 8 bits lets them learn all the same."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from adapted import DECODER, IDS, logits, stirred, tiny
from torch import nn

from headway import adapt
from headway.adapt._int8 import RoundedLinear, weight_of
from headway.quantize import nbytes


@pytest.mark.parametrize("how", [{"rslora": True}, {"dora": True}, {"targets": ["blocks.*", "lm.out"]}])
def test_merging_changes_no_answer_and_unmerging_restores_every_bit(how: dict[str, object]) -> None:
    model = tiny()
    before, weights = logits(model), {key: t.clone() for key, t in model.net.state_dict().items()}
    stirred(adapt(model, "lora", rank=4, **how))
    apart = logits(model)
    merged = adapt.merge(model)
    assert merged.modules and merged.error == 0
    torch.testing.assert_close(logits(model), apart, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="unmerge"), adapt.bare(model):
        pass
    adapt.unmerge(model)
    assert torch.equal(logits(model), apart)
    assert all(torch.equal(model.net.state_dict()[key], tensor) for key, tensor in weights.items())
    with adapt.bare(model):
        assert torch.equal(logits(model), before)


def test_weighted_adapters_merge_as_they_act() -> None:
    model = tiny()
    stirred(adapt(model, "lora", name="a"), 1)
    stirred(adapt(model, "bitfit", name="b"), 2)
    adapt.use(model, {"a": 0.5, "b": 0.25})
    apart = logits(model)
    adapt.merge(model)
    torch.testing.assert_close(logits(model), apart, rtol=1e-5, atol=1e-5)


def test_a_folded_model_is_an_ordinary_one() -> None:
    model = stirred(adapt(tiny(), "lora", rank=4))
    apart, names = logits(model), set(tiny().net.state_dict())
    adapt.fold(model)
    torch.testing.assert_close(logits(model), apart, rtol=1e-5, atol=1e-5)
    assert set(model.net.state_dict()) == names and all(p.requires_grad for p in model.net.parameters())
    assert type(model.net.stack.blocks[0].mixer.inner.query) is nn.Linear


def test_an_8_bit_base_takes_a_third_of_the_memory_and_its_gradient_is_exact() -> None:
    model = tiny()
    whole = nbytes(model.net)
    stirred(adapt(model, "lora", rank=2, quantize="int8"))
    assert nbytes(model.net) < 0.5 * whole
    linear = next(m for m in model.net.modules() if type(m) is RoundedLinear)
    x = torch.randn(4, 7, linear.in_features, requires_grad=True)
    plain = nn.functional.linear(x, weight_of(linear), linear.bias)
    torch.testing.assert_close(linear(x), plain)
    given = torch.randn_like(plain)
    (own,) = torch.autograd.grad(linear(x), x, given)
    (expected,) = torch.autograd.grad(plain, x, given)
    torch.testing.assert_close(own, expected)
    model.net.head("lm", model.net(IDS)).square().mean().backward()
    assert all(p.grad is not None for p in model.net.parameters() if p.requires_grad)


def test_a_rounded_table_is_looked_up_in_its_own_precision_as_any_other() -> None:
    model = tiny()
    plain = model.net.embedding(IDS)
    adapt(model, "lora", quantize="int8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.net.embedding(IDS)
    assert torch.equal(found, model.net.embedding(IDS)) and found.dtype == plain.dtype
    torch.testing.assert_close(found, plain, rtol=0, atol=float(plain.detach().abs().max()) / 50)


def test_an_8_bit_base_gives_nearly_what_the_model_gave() -> None:
    model = tiny()
    before = logits(model)
    adapt(model, "lora", quantize="int8")
    now = logits(model)
    assert 0 < (now - before).norm() / before.norm() < 0.02
    assert torch.equal(logits(copy.deepcopy(model.net)), now)


def test_merging_into_8_bits_tells_its_error_and_is_undone() -> None:
    model = stirred(adapt(tiny(), "lora", rank=4, quantize="int8"))
    apart = logits(model)
    merged = adapt.merge(model)
    assert 0 < merged.error < 0.01
    assert 0 < (logits(model) - apart).norm() / apart.norm() < 0.05
    adapt.unmerge(model)
    assert torch.equal(logits(model), apart)
    adapt.fold(model)
    torch.testing.assert_close(logits(model), apart, rtol=1e-4, atol=1e-4)


def test_an_adapter_learned_on_8_bits_fits_the_whole_model(tmp_path: Path) -> None:
    model = stirred(adapt(tiny(), "lora", rank=4, quantize="int8"))
    adapt.save(model, tmp_path / "one")
    other = adapt.attach(tiny(), tmp_path / "one")
    own, whole = logits(model), logits(other)
    assert 0 < (own - whole).norm() / whole.norm() < 0.05


def test_new_heads_stay_whole_on_an_8_bit_base() -> None:
    model = adapt(tiny(), "lora", heads=["classify"], quantize="int8")
    assert type(model.net.heads["classify"].out) is nn.Linear
    assert model.net.heads["classify"].out.weight.requires_grad
    assert DECODER["heads"]["lm"]["tie"] and model.net.heads["lm"].out.rounded is model.net.embedding.rounded


def test_dora_merges_as_it_acts_beside_another_change() -> None:
    model = tiny()
    stirred(adapt(model, "lora", rank=2, name="a"), 1)
    stirred(adapt(model, "lora", rank=2, dora=True, name="b"), 2)
    adapt.use(model, ["a", "b"])
    apart = logits(model)
    adapt.merge(model)
    torch.testing.assert_close(logits(model), apart, rtol=1e-4, atol=1e-4)


def test_nothing_is_taken_away_from_merged_weights() -> None:
    model = stirred(adapt(tiny(), "lora", rank=2))
    adapt.merge(model)
    with pytest.raises(ValueError, match="unmerge"):
        adapt.remove(model, "default")
    with pytest.raises(ValueError, match="unmerge"):
        adapt.save(model, "never", format="peft")
    adapt.unmerge(model)
    adapt.remove(model, "default")


def test_a_refused_fold_leaves_an_8_bit_base_as_it_was() -> None:
    model = stirred(adapt(tiny(), "bottleneck", size=4, quantize="int8"))
    before = logits(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        adapt.fold(model)
    assert any(type(m) is RoundedLinear for m in model.net.modules())
    assert torch.equal(logits(model), before)


def test_ia3_learns_upon_8_bits() -> None:
    model = stirred(adapt(tiny(), "ia3", quantize="int8"))
    model.net.head("lm", model.net(IDS)).square().mean().backward()
    assert all(p.grad is not None for p in model.net.parameters() if p.requires_grad)
