"""A recipe adapts a loaded model: little is kept, nothing else changes, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import task, write_pairs
from torch import Tensor

import headway
from headway import adapt
from headway.adapt._int8 import RoundedLinear
from headway.recipe import OptimizerSpec, Recipe, read
from headway.store import read_folder
from headway.train.data import prepare
from headway.train.loop import Interrupted, Trainer
from headway.train.optim import build_optimizers

LORA = {"method": "lora", "rank": 2, "dropout": 0.1, "targets": "blocks.*.{mixer,cross}.{q,v}"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs.tsv and base/, a tiny trained model."""
    folder = tmp_path_factory.mktemp("base")
    write_pairs(folder / "pairs.tsv", 60)
    headway.train(task(folder / "pairs.tsv", budget={"steps": 2}, evaluations=1), out=folder / "base")
    return folder


def recipe(base: Path, **changed: Any) -> dict[str, Any]:
    few = {"budget": {"steps": 6}, "evaluations": 2}
    given = task(base / "pairs.tsv", **{**few, "model": {"load": str(base / "base")}, "adapt": LORA, **changed})
    return {key: value for key, value in given.items() if key != "tokenizers"}


def trainer(given: dict[str, Any], folder: Path, watch: Any = lambda status: None) -> Trainer:
    read_ = read(given)
    assert read_.model is not None
    folder.mkdir(exist_ok=True)
    return Trainer(read_, read_.model, read_.optimizer, prepare(read_), folder, watch)


def weights(folder: Path) -> dict[str, Tensor]:
    return read_folder(folder)[0]["adapter"]


@pytest.mark.parametrize("changed", [{}, {"adapt": {**LORA, "quantize": "int8"}}, {"optimizer": {"ema": 0.9}}])
def test_a_run_keeps_adapters_alone_and_loads_as_the_adapted_model(
    base: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    result = headway.train(recipe(base, **changed), out=tmp_path / "run")
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    tensors, _ = read_folder(checkpoint)
    assert all(".adapters.default." in name for part in ("model", "best") for name in tensors[part])
    model = headway.load(tmp_path / "run")
    assert {type(m) is RoundedLinear for m in model.net.modules()} == ({True, False} if "adapt" in changed else {False})
    untouched = headway.load(base / "base")
    with adapt.bare(model):
        if "adapt" not in changed:  # else, it is rounded
            assert [g.text for g in model.generate(["abc"])] == [g.text for g in untouched.generate(["abc"])]
    prepared = prepare(read(recipe(base, **changed)))
    loss = [prepared.objective(model.net, batch) for batch, _ in _batches(prepared.valid)]
    assert sum(float(one.plain) for one in loss) / sum(one.tokens for one in loss) == pytest.approx(
        result["valid_loss"], abs=1e-6
    )


def _batches(order: Any) -> Any:
    from headway.train.data import all_of

    return all_of(order)


@pytest.mark.parametrize("changed", [{}, {"optimizer": {"ema": 0.9, "warmup": 2}, "accumulate": 2}])
def test_a_resumed_adapted_run_is_the_uninterrupted_one_to_the_bit(
    base: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    given = recipe(base, **changed)
    trainer(given, tmp_path / "whole").fit().save(tmp_path / "whole" / "model")

    def stop(status: Any) -> None:
        if status.step == 3:
            one.save()
            raise Interrupted(False)

    one = trainer(given, tmp_path / "half", stop)
    with pytest.raises(Interrupted):
        one.fit()
    again = trainer(given, tmp_path / "half")
    assert again.resume()
    again.fit().save(tmp_path / "half" / "model")
    whole, half = weights(tmp_path / "whole" / "model"), weights(tmp_path / "half" / "model")
    assert whole.keys() == half.keys() and all(torch.equal(whole[name], half[name]) for name in whole)


def test_micro_batches_are_one_batch_for_adapters(base: Path, tmp_path: Path) -> None:
    still = {**LORA, "dropout": 0.0}
    steps = {"budget": {"steps": 4}, "evaluations": 1, "adapt": still}
    losses = []
    for accumulate, tokens in ((1, 512), (4, 128)):
        run = trainer(recipe(base, accumulate=accumulate, batch_tokens=tokens, **steps), tmp_path / str(accumulate))
        run.fit()
        losses.append(run.progress.curve[-1]["valid_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_frozen_parameters_stay_and_the_rest_learns(base: Path, tmp_path: Path) -> None:
    given = recipe(base, adapt=None, freeze=["encoder.*", "target.*"])
    run = trainer(given, tmp_path)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.fit()
    changed = {name for name, tensor in run.model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed and not any(name.startswith(("encoder.", "target.")) for name in changed)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_lower_layers_learn_more_slowly(base: Path, tmp_path: Path, name: Any) -> None:
    blocks = [{"mixer": {"name": "attention", "heads": 2}, "feedforward": {"hidden": 32}}]
    net = headway.models.build({"kind": "decoder", "width": 16, "vocab": 20, "stack": {"blocks": blocks, "repeat": 3},
                                "heads": {"lm": {"outputs": 20}}})  # fmt: skip
    spec = OptimizerSpec(name=name, lr=1.0, matrix_lr=1.0, layer_decay=0.5)
    rates = {
        p: group["lr"] for one in build_optimizers(net, spec) for group in one.param_groups for p in group["params"]
    }
    assert len(rates) == len(list(net.parameters()))
    for place, rate in (("embedding", 0.125), ("stack.blocks.0", 0.25), ("stack.blocks.2", 1.0), ("heads", 1.0),
                        ("stack.norm", 1.0)):  # fmt: skip
        assert {rates[p] for p in net.get_submodule(place).parameters()} == {rate}, place


@pytest.mark.parametrize(("changed", "message"), [
    ({"adapt": {"rank": 2}}, "adapt.method: is missing; there is"),
    ({"adapt": {**LORA, "targets": "bloks.*"}}, "matches nothing that lora can change"),
    ({"adapt": {**LORA, "rank": 99}}, "rank 99 is larger than a layer"),
    ({"adapt": None, "freeze": ["encodr.*"]}, "freeze: 'encodr.*' means no parameter that trains"),
    ({"model": {"kind": "seq2seq"}}, "give it model.load"),
])  # fmt: skip
def test_what_a_recipe_cannot_adapt_is_told_before_training(
    base: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as told:
        headway.train(recipe(base, **changed), out=tmp_path / "run")
    assert message in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_an_adapter_whose_base_has_changed_is_refused(base: Path, tmp_path: Path) -> None:
    headway.train(recipe(base, budget={"steps": 1}), out=tmp_path / "run")
    other = tmp_path / "other"
    headway.train(task(base / "pairs.tsv", budget={"steps": 3}), out=other)
    with pytest.raises(ValueError, match="learned upon other weights"):
        adapt.attach(headway.load(other), tmp_path / "run" / "model")
    record = json.loads((tmp_path / "run" / "model" / "adapter.json").read_text("utf-8"))
    assert record["method"] == "lora" and record["base"]["load"] == str(base / "base")


def test_a_recipe_is_read_with_what_it_freezes() -> None:
    given = {"data": {"source": "x"}, "budget": {"steps": 1}, "model": {"load": "y"}, "adapt": LORA, "freeze": ["a.*"]}
    found = read(given)
    assert isinstance(found, Recipe) and found.adapt == LORA and found.freeze == ("a.*",)


def test_an_adapted_run_is_used_in_8_bits_as_part_of_the_weights(base: Path, tmp_path: Path) -> None:
    headway.train(recipe(base), out=tmp_path / "run")
    model = headway.load(tmp_path / "run", quantize="int8")
    assert adapt.adaptation_of(model.net) is None
    assert model.generate(["abc"])[0].text is not None
