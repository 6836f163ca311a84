"""Claims about recipes: the built-in ones work, and a mistake in one is a line that says what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import task

from headway import models, objectives
from headway.image import ImageSpec
from headway.objectives._tools import Tools
from headway.recipe import Budget, Recipe, built_in, read
from headway.text import Tokenizer, TokenizerSpec


def refusal(source: Any, overrides: list[str] | None = None) -> str:
    with pytest.raises(ValueError) as fault:
        read(source, overrides or [])
    assert "\n" not in str(fault.value)
    return str(fault.value)


def specs(recipe: Recipe) -> dict[str, dict[str, Any]]:
    found = {name: entry.model for name, entry in (recipe.models or {}).items()}
    return found | ({"model": recipe.model} if recipe.model is not None else {})


@pytest.mark.parametrize("name", sorted(built_in()))
def test_every_built_in_recipe_parses_and_its_models_build(name: str) -> None:
    recipe = read(name)
    assert recipe.name == name
    objective = objectives.build(recipe.objective)
    tokenizer = Tokenizer.train(TokenizerSpec(), ["abc"], objective.EXTRA)
    extra = {name: tokenizer.special(name) for name in objective.EXTRA}
    tools = Tools(tokenizer, tokenizer, ("one", "two"), extra, 256, False, None, (1, 1), ImageSpec(size=(8, 8)))
    objective.ready(tools)
    for spec in specs(recipe).values():
        if "load" not in spec:
            models.build(objective.spec(spec, tools))


def test_the_built_in_recipes_are_told_by_their_first_line() -> None:
    assert {"demo", "pronounce"} <= built_in().keys()
    assert all(len(line) > 20 and not line.startswith("#") for line in built_in().values())


def test_the_models_of_the_demo_are_of_one_size() -> None:
    sizes = {
        name: sum(p.numel() for p in models.build({**spec, "source_vocab": 42, "target_vocab": 43}).parameters())
        for name, spec in specs(read("demo")).items()
    }
    assert len(sizes) == 4
    assert max(sizes.values()) <= 1.1 * min(sizes.values()), sizes


# keys and values


def test_a_misspelt_key_names_the_nearest() -> None:
    assert refusal(task("x", bach_tokens=5)) == "recipe: unknown key 'bach_tokens'; did you mean 'batch_tokens'?"
    assert "'optimizer.warm_up'; did you mean 'warmup'?" in refusal(task("x", optimizer={"warm_up": 5}))
    assert "'data.inputs'; did you mean 'input'?" in refusal(task("x", data={"source": "x", "inputs": "a"}))
    assert "did you mean 'kind'?" in refusal(task("x", tokenizers={"input": {"knd": "characters"}}))
    several = {**task("x"), "model": None, "models": {"a": {"model": {}, "titel": "A"}}}
    assert "did you mean 'title'?" in refusal(several)


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"seed": "seven"}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"beams": 0}, "beams"),
        ({"evaluations": 0}, "evaluations"),
        ({"test_limit": 0}, "test_limit"),
        ({"budget": {"steps": "many"}}, "budget.steps"),
        ({"precision": "fp8"}, "precision"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name"),
        ({"tokenizers": {"input": {"kind": "letters"}}}, "tokenizers.input.kind"),
        ({"data": "cmudict"}, "data"),
        ({"model": [1]}, "model"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_by_its_place(changed: dict[str, Any], place: str) -> None:
    assert f"`{place}`" in refusal(task("x", **changed))


def test_a_recipe_has_either_a_model_or_models() -> None:
    both, neither = task("x", models={"a": {"model": {}}}), task("x", model=None)
    for wrong in (both, neither):
        assert "either `model` (headway train) or `models` (headway compare)" in refusal(wrong)


@pytest.mark.parametrize("budget", [{}, {"steps": 5, "seconds": 1}, {"steps": -5}, {"seconds": 0}, {"tokens": -1.5}])
def test_a_budget_is_one_number_above_zero(budget: dict[str, float]) -> None:
    said = refusal(task("x", budget=budget))
    assert "budget" in said


def test_a_budget_is_spent_from_zero_to_one() -> None:
    assert Budget(steps=10).fraction(99.0, 5, 10**9) == 0.5
    assert Budget(tokens=100).fraction(99.0, 5, 25) == 0.25
    assert Budget(seconds=4.0).fraction(3.0, 10**9, 10**9) == 0.75
    assert Budget(steps=10).fraction(0.0, 11, 0) == 1.0


# files


def test_a_fault_in_yaml_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\ndata: {source: y\nmodel: [\n", "utf-8")
    assert refusal(path).startswith(f"{path}:3: not valid YAML")
    path.write_text("name: x\n\tdata: y\n", "utf-8")
    assert refusal(path).startswith(f"{path}:2: not valid YAML")


def test_a_recipe_in_another_encoding_is_named_by_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("name: caf\u00e9\n".encode("latin-1"))
    assert refusal(path) == f"{path}: not UTF-8 at byte 9; save the recipe as UTF-8"


def test_a_key_that_stands_twice_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\noptimizer:\n  lr: 1\n  warmup: 2\n  lr: 3\n", "utf-8")
    assert f"{path}:5: 'lr' stands twice; keep one of them" in refusal(path)


def test_a_recipe_that_holds_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a: &a [*a, *a]\n", "utf-8")
    assert "holds itself" in refusal(path)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n", "7"])
def test_a_file_that_holds_no_mapping_is_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    assert "a recipe is a mapping of keys to values" in refusal(path)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['echo']", "data: !!python/name:os.system"])
def test_a_recipe_runs_no_code(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    assert "not valid YAML" in refusal(path)


def test_a_missing_recipe_names_what_there_is() -> None:
    assert "did you mean 'demo'?" in refusal("dmeo")
    assert "neither a file nor built in" in refusal("runs/nothing.yaml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert "neither a file nor built in" in refusal(tmp_path)


# --set


def test_any_key_can_be_set() -> None:
    changed = read(
        "pronounce",
        [
            "optimizer.lr=1e-3",
            "seed=7",
            "name=other",
            "budget.steps=5",
            "data.lowercase=true",
            "model.encoder.repeat=1",
            "model.decoder.blocks.0.feedforward.activation=silu",
            "optimizer.betas=[0.8, 0.9]",
            "test_limit=null",
        ],
    )
    assert (changed.optimizer.lr, changed.seed, changed.name, changed.data.lowercase) == (1e-3, 7, "other", True)
    assert changed.budget == Budget(steps=5)
    assert changed.model is not None
    assert changed.model["encoder"]["repeat"] == 1
    assert changed.model["decoder"]["blocks"][0]["feedforward"]["activation"] == "silu"
    assert changed.optimizer.betas == (0.8, 0.9)
    assert changed.test_limit is None


def test_what_is_not_set_stays() -> None:
    assert read("pronounce", ["seed=0"]) == read("pronounce")


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("seed", "expected key=value"),
        ("=5", "expected key=value"),
        ("optimizer.lr=[", "not valid YAML"),
        ("optimiser.lr=1", "did you mean 'optimizer'?"),
        ("name.deep=1", "has no keys"),
        ("model.encoder.blocks.7.norm=rms", "no place in a list of 2"),
        ("optimizer.lr=fast", "optimizer.lr"),
    ],
)
def test_a_setting_that_cannot_be_is_explained(assignment: str, words: str) -> None:
    assert words in refusal("pronounce", [assignment])


# what a recipe names


def build(changed: dict[str, Any]) -> str:
    spec = {**read("pronounce").model, "source_vocab": 42, "target_vocab": 43}  # type: ignore[dict-item]
    with pytest.raises(ValueError) as fault:
        models.build({**spec, **changed})
    assert "\n" not in str(fault.value)
    return str(fault.value)


def test_an_unknown_name_names_the_nearest() -> None:
    block = lambda name: {"encoder": {"blocks": [{"mixer": {"name": name, "heads": 2}}]}}
    assert "no mixer 'atention'; did you mean 'attention'?" in build(block("atention"))
    assert "no model 'seq2sec'; did you mean 'seq2seq'?" in build({"kind": "seq2sec"})
    assert "no model 'None'; there is" in build({"kind": None})
    with pytest.raises(ValueError, match=r"no objective 'seqseq'; did you mean 'seq2seq'\?"):
        objectives.build({"name": "seqseq"})
    with pytest.raises(ValueError, match=r"unknown key 'smoothin'; did you mean 'smoothing'\?"):
        objectives.build({"smoothin": 0.1})
    mixer = {"encoder": {"blocks": [{"mixer": {"name": "attention", "head": 2}}]}}
    assert "did you mean 'heads'?" in build(mixer)


def test_a_mixer_from_outside_is_never_imported_by_a_recipe() -> None:
    said = build({"encoder": {"blocks": [{"mixer": {"name": "antigravity.mixer"}}]}})
    assert "pass --plugin antigravity.mixer" in said


def test_a_model_that_cannot_work_says_why() -> None:
    assert "give one of its blocks a cross mixer" in build({"decoder": {"blocks": [{"mixer": {"name": "rnn"}}]}})
    assert "come from the tokenizers and are still 0" in build({"source_vocab": 0})
    assert "width" in build({"width": 0})
