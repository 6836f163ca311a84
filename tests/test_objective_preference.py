"""Claims about learning from preferences: each loss by hand, what is compared with what, and that all of them learn."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from objective import gradients, made
from readers import published
from tiny import prepared_task

import headway
from headway import objectives
from headway.data.builtin import preferences
from headway.objectives import Unfit
from headway.objectives._preferences import liked, log_p
from headway.objectives.preference import paired, unpaired
from headway.recipe import Recipe, read
from headway.train.network import network, spec_of

BLOCK = {"mixer": {"name": "attention", "heads": 2, "bias": False}, "feedforward": {"hidden": 32}}
DECODER = {"kind": "decoder", "width": 16, "stack": {"positions": {"name": "rotary"}, "blocks": [BLOCK]}}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<says>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preferences for answers in capitals, and a decoder that knows next to nothing, with a chat template."""
    folder = tmp_path_factory.mktemp("preferences")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(150)]
    pairs = [{"prompt": f"say {word}", "chosen": word.upper(), "rejected": word} for word in sorted(set(words))]
    alone = [
        {"prompt": pair["prompt"], "answer": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    for name, rows in (("pairs", pairs), ("alone", alone)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (folder / "lines.txt").write_text("\n".join(f"say {w} {w.upper()} {w}" for w in words), "utf-8")
    data = {"source": str(folder / "lines.txt"), "unit": "line"}
    bytes_alone = {"input": {"kind": "bpe", "vocab": 264}}
    recipe, prepared = prepared_task(
        folder, data=data, model=DECODER, objective={"name": "causal"}, tokenizers=bytes_alone, max_tokens=100
    )
    assert recipe.model is not None
    torch.manual_seed(0)
    spec = spec_of(recipe.model, prepared)
    start = prepared.objective.loaded(network(spec, prepared.tools), spec, prepared.tools)
    start.tokenizer.facts = msgspec.structs.replace(start.tokenizer.facts, chat_template=TEMPLATE)
    start.save(folder / "start")
    return folder


def task(folder: Path, name: str = "preference", **changed: Any) -> dict[str, Any]:
    options = changed.pop("objective", {})
    rows = "alone" if options.get("loss") == "kto" else "pairs"
    return {
        "data": {"source": str(folder / f"{rows}.jsonl"), "held_out": 15},
        "model": {"load": str(folder / "start")},
        "objective": {"name": name, **options},
        "budget": {"steps": 40},
        "batch_tokens": 1024,
        "max_tokens": 24,
        "precision": "fp32",
        "evaluations": 2,
        "checkpoint_seconds": 600,
        "optimizer": {"name": "adamw", "lr": 1e-2, "warmup": 2},
        **changed,
    }


def recipe_of(folder: Path, name: str = "preference", **changed: Any) -> Recipe:
    return read(task(folder, name, **changed))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# by hand


def test_dpo_and_ipo_are_their_formulas() -> None:
    chosen, rejected = torch.tensor([1.5, -2.0]), torch.tensor([0.5, 1.0])
    found = paired(chosen, rejected, 0.2, "dpo").tolist()
    assert found == pytest.approx([-math.log(sigmoid(0.2)), -math.log(sigmoid(-0.6))], rel=1e-6)
    found = paired(chosen, rejected, 0.2, "ipo").tolist()
    assert found == pytest.approx([(1.0 - 2.5) ** 2, (-3.0 - 2.5) ** 2], rel=1e-6)


def test_kto_is_its_formula_and_no_gradient_flows_through_its_level() -> None:
    gain = torch.tensor([1.0, -0.5, 2.0, 1.0, 0.0, 0.5], requires_grad=True)  # three answers, then three mismatched
    good = torch.tensor([True, False, False])
    found = unpaired(gain, good, 0.4, (1.5, 0.5))
    wanted = [1.5 * (1 - sigmoid(0.2)), 0.5 * (1 - sigmoid(0.4)), 0.5 * (1 - sigmoid(-0.6))]  # level: 0.5
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert gain.grad is not None and gain.grad[:3].abs().min() > 0 and not gain.grad[3:].any()
    below = torch.tensor([1.0, -9.0])
    assert unpaired(below, torch.tensor([True]), 1.0, (1.0, 1.0)).item() == pytest.approx(1 - sigmoid(1.0))
    assert unpaired(below[:1], torch.tensor([True]), 1.0, (1.0, 1.0)).item() == pytest.approx(1 - sigmoid(1.0))


def test_an_answer_is_as_likely_as_its_own_tokens_and_its_end_whatever_stands_beside_it(folder: Path) -> None:
    prepared, net = made(recipe_of(folder))
    objective: Any = prepared.objective
    net.eval()
    rows = [("say ab", "AB", "ab ab ab"), ("say abcdefgh", "ABCDEFGH", "x")]
    examples = [next(iter(objective.encode(row, prepared.tools))) for row in rows]
    batch = objective.collate(examples, np.random.default_rng(0))
    assert batch.valid is not None and batch.targets == 2
    found = log_p(net, batch).tolist()
    for place, (i, side) in enumerate([(0, 1), (1, 1), (0, 2), (1, 2)]):
        prompt, answer = list(examples[i][0]), list(examples[i][side])
        assert answer[-1] == prepared.tools.eos
        both = torch.tensor([prompt + answer])
        logits: Any = net.head("lm", net(both))  # type: ignore[operator]
        each = logits[0].detach().log_softmax(-1)
        by_hand = sum(float(each[len(prompt) - 1 + t, token]) for t, token in enumerate(answer))
        assert found[place] == pytest.approx(by_hand, abs=1e-4)


# the start


@pytest.mark.parametrize("adapted", [False, True])
def test_the_start_is_the_frozen_base_and_stays_it(folder: Path, adapted: bool) -> None:
    prepared, net = made(recipe_of(folder))
    objective: Any = prepared.objective
    batch = prepared.batches.batch(0)
    if adapted:
        headway.adapt(net, "lora", rank=2)
        objective.reader.start = None  # so that nothing else can be asked
    assert float(objective(net, batch).plain) / batch.targets == pytest.approx(math.log(2), abs=1e-5)
    before = log_p(net, batch).detach()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    now = log_p(net, batch).detach()
    assert (now - before).abs().max() > 1e-2
    assert torch.allclose(objective.gain(net, batch), now - before, atol=1e-4)


def test_gradients_reach_the_adapter_alone_and_micro_batches_are_one_batch(folder: Path) -> None:
    prepared, net = made(recipe_of(folder, batch_tokens=400))
    headway.adapt(net, "lora", rank=2)
    objective: Any = prepared.objective
    rows = [("say ab", "AB", "ab ab"), ("say abc", "ABC", "abc"), ("say h", "H", "h h h"), ("say gh", "GH", "g")]
    examples = [next(iter(objective.encode(row, prepared.tools))) for row in rows]
    whole = [objective.collate(examples, np.random.default_rng(0))]
    parts = [objective.collate(examples[i : i + 2], np.random.default_rng(0)) for i in (0, 2)]
    (one, some), (two, others) = gradients(prepared, net, whole), gradients(prepared, net, parts)
    assert one == pytest.approx(two, rel=1e-5)
    assert 0 < len(some) == sum(p.requires_grad for p in net.parameters()) < len(list(net.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(some, others, strict=True))


# rows


def test_equal_answers_and_what_is_too_long_are_told_in_a_line(folder: Path) -> None:
    prepared, _ = made(recipe_of(folder))
    tell = lambda row, **options: list(built(prepared, **options).encode(row, prepared.tools))
    faults = {
        "both answers to the prompt 'say a' are 'A'": lambda: tell(("say a", "A", "A")),
        "has 0 tokens|no tokens": lambda: tell(("say a", "A", "")),
        "and max_tokens is 24: raise it, or set objective.truncate": lambda: tell(("say a", "A" * 40, "B")),
        "same tokens once they are read": lambda: tell(("say a", "A" * 40, "A" * 39 + "B"), truncate="answer"),
        "leaves no room": lambda: tell(("say " + "a" * 40, "A", "B"), truncate="answer"),
    }
    for message, fault in faults.items():
        with pytest.raises(Unfit, match=message) as told:
            fault()
        assert "\n" not in str(told.value)
    with pytest.raises(Unfit, match="'maybe'; it is one of 1, true, good, 0, false, bad"):
        liked("maybe", "say a")
    assert liked("TRUE", "") and liked("1", "") and not liked("bad", "")


def built(prepared: Any, **options: Any) -> Any:
    objective = objectives.build({"name": "preference", **options})
    objective.ready(prepared.tools)
    return objective


def test_what_is_too_long_loses_the_prompts_beginning_or_the_answers_end_where_asked(folder: Path) -> None:
    prepared, _ = made(recipe_of(folder))
    row = ("say " + "abcdefgh" * 2, "ABCDEFGH", "x")
    whole = built(prepared)
    prompt, answer = whole.reader.prompt(row[0]), whole.reader.answer(row[1], prepared.tools)
    assert len(prompt) + len(answer) > 24
    ((cut, chosen, rejected),) = built(prepared, truncate="prompt").encode(row, prepared.tools)
    assert cut == prompt[len(prompt) + len(answer) - 24 :] and chosen == answer and len(rejected) == 2
    ((kept, chosen, rejected),) = built(prepared, truncate="answer").encode(row, prepared.tools)
    assert kept == prompt and chosen == answer[: 24 - len(prompt)] and len(rejected) == 2


def test_a_prompt_stands_in_the_chat_template_where_asked(folder: Path) -> None:
    prepared, _ = made(recipe_of(folder, max_tokens=60))
    ((prompt, chosen, _),) = built(prepared, chat=True).encode(("say a", "A", "a"), prepared.tools)
    tokenizer = headway.load(folder / "start", "cpu").tokenizer
    assert prompt == tokenizer.chat_ids([{"role": "user", "content": "say a"}])
    assert chosen == [*tokenizer.encode("A", specials=False).ids, prepared.tools.eos]
    with pytest.raises(ValueError, match="truncate: a prompt in a chat template"):
        built(prepared, chat=True, truncate="prompt")


@pytest.mark.long
def test_the_built_in_preferences_are_real_pairs() -> None:
    rows = list(preferences.rows())
    assert 400 < len(rows) < 2000 and len({prompt for prompt, _, _ in rows}) > 0.95 * len(rows)
    assert all(chosen != rejected and chosen.rstrip().endswith(".") for _, chosen, rejected in rows)


# learning


@pytest.mark.parametrize(("loss", "beta"), [("dpo", 0.5), ("ipo", 0.1), ("kto", 0.5)])
def test_each_loss_learns_what_is_liked_and_tells_how_far_it_went(
    loss: str, beta: float, folder: Path, tmp_path: Path
) -> None:
    recipe = task(folder, objective={"loss": loss, "beta": beta})
    result = headway.train(recipe, out=tmp_path / "run")
    assert result["preference_accuracy"] > 0.9 and result["margin"] > 0.1 and result["kl"] > 0
    assert result["test_rows"] > 5 and result["use"] == 'generate {} "TEXT"'
    if loss != "kto":
        assert 0 <= result["preference_accuracy_baseline"] <= 1
    told = headway.load(tmp_path / "run", "cpu").generate(["say abc"], max_tokens=8)
    assert len(told) == 1


def test_a_reward_is_higher_for_what_is_liked(folder: Path, tmp_path: Path) -> None:
    result = headway.train(task(folder, "reward"), out=tmp_path / "run")
    assert result["preference_accuracy"] > 0.9 and result["margin"] > 0
    model = headway.load(tmp_path / "run", "cpu")
    end = model.facts.eos[0]
    ids = [[*model.encode("say abc")[: -1 or None], *model.tokenizer.encode(text, specials=False).ids, end]
           for text in ("ABC", "abc")]  # fmt: skip
    high, low = (float(model.logits(torch.tensor([row]), head="reward")) for row in ids)
    assert high > low


def test_the_rewards_loss_is_bradley_terrys(folder: Path) -> None:
    prepared, net = made(recipe_of(folder, "reward"))
    objective: Any = prepared.objective
    batch = prepared.batches.batch(0)
    chosen, rejected = (side.tolist() for side in objective.rewards(net, batch))
    by_hand = sum(-math.log(sigmoid(a - b)) for a, b in zip(chosen, rejected, strict=True))
    assert float(objective(net, batch).plain) == pytest.approx(by_hand, rel=1e-5)


def test_an_encoder_tells_rewards_of_pairs_of_texts(folder: Path, tmp_path: Path) -> None:
    published(tmp_path / "bert", "BertModel")
    recipe = recipe_of(folder, "reward", model={"load": str(tmp_path / "bert")}, max_tokens=40)
    prepared, net = made(recipe)
    objective: Any = prepared.objective
    batch = prepared.batches.batch(0)
    assert batch.types is not None and batch.types.any()
    objective(net, batch).total.backward()
    with pytest.raises(ValueError, match="chat and truncate are for decoders"):
        made(recipe_of(folder, "reward", objective={"chat": True}, model={"load": str(tmp_path / "bert")}))


def test_options_that_mean_nothing_are_refused(folder: Path) -> None:
    for options, message in (
        ({"beta": 0.0}, "beta is above 0"),
        ({"desirable": 2.0}, "weights above 0 of kto, not 2.0 and 1.0 of dpo"),
        ({"loss": "kto", "undesirable": -1.0}, "weights above 0 of kto"),
    ):
        with pytest.raises(ValueError, match=message):
            objectives.build({"name": "preference", **options})
    for name in ("preference", "reward"):
        with pytest.raises(ValueError, match=r"set model: \{load: FOLDER\}"):
            made(read({**task(folder, name), "model": DECODER}))
