"""Claims about learning from rewards: grpo and ppo by hand, what they draw, and that both learn, on both kinds."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from objective import gradients, made
from safetensors.torch import load_file
from tiny import prepared_task, write_pairs

import headway
from headway import objectives
from headway.generate.write import Options
from headway.objectives import _rewards, grpo, ppo
from headway.objectives._rollouts import Experience, Policy, Prompts
from headway.quantize import is_prepared
from headway.recipe import Recipe, read
from headway.train.data import Prepared
from headway.train.loop import Trainer
from headway.train.network import network, spec_of

HERE = __name__  # where the rewards of a user's own stand, as `--plugin` would import them
BLOCK = {"mixer": {"name": "attention", "heads": 2}, "feedforward": {"hidden": 32}}
DECODER = {
    "kind": "decoder",
    "width": 16,
    "dropout": 0.1,
    "stack": {"positions": {"name": "rotary"}, "blocks": [BLOCK]},
}


def begins_with_a(prompt: str, answer: str) -> float:
    """The bandit: one arm of the first token pays."""
    return float(answer.strip().startswith("A"))


def long(prompt: str, answer: str) -> float:
    return float(len(answer))


def not_finite(prompt: str, answer: str) -> float:
    return math.nan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and two models that have learned next to nothing: where rewards begin."""
    folder = tmp_path_factory.mktemp("rewards")
    pairs = write_pairs(folder / "pairs.tsv", rows=120)
    recipe, prepared = prepared_task(pairs, model={**tiny_seq2seq(), "dropout": 0.1})
    save(recipe, prepared, folder / "seq2seq")
    lines = pairs.read_text("utf-8").replace("\t", " ").splitlines()[1:]
    (folder / "lines.txt").write_text("\n".join(lines), "utf-8")
    data = {"source": str(folder / "lines.txt"), "unit": "line"}
    recipe, prepared = prepared_task(pairs, data=data, model=DECODER, objective={"name": "causal"})
    save(recipe, prepared, folder / "decoder")
    return folder


def tiny_seq2seq() -> dict[str, Any]:
    stack = {"positions": {"name": "learned", "length": 32}, "blocks": [BLOCK]}
    looks = {**stack, "blocks": [{**BLOCK, "cross": {"name": "attention", "heads": 2}}]}
    return {"kind": "seq2seq", "width": 16, "encoder": stack, "decoder": looks}


def save(recipe: Recipe, prepared: Prepared, folder: Path) -> None:
    assert recipe.model is not None
    torch.manual_seed(0)
    spec = spec_of(recipe.model, prepared)
    prepared.objective.loaded(network(spec, prepared.tools), spec, prepared.tools).save(folder)


def task(folder: Path, kind: str, name: str, reward: str = "per", **changed: Any) -> dict[str, Any]:
    objective = {"name": name, "reward": reward, "tokens": 6, **changed.pop("objective", {})}
    return {
        "data": {"source": str(folder / "pairs.tsv")},
        "model": {"load": str(folder / kind)},
        "objective": objective,
        "budget": {"steps": 6},
        "batch_tokens": 2048,
        "max_tokens": 20,
        "precision": "fp32",
        "evaluations": 2,
        "checkpoint_seconds": 600,
        "optimizer": {"name": "adamw", "lr": 1e-2, "warmup": 2},
        **changed,
    }


def recipe_of(folder: Path, kind: str, name: str, reward: str = "per", **changed: Any) -> Recipe:
    return read(task(folder, kind, name, reward, **changed))


def experience(seed: int = 0, answers: int = 4, length: int = 3) -> Experience:
    """Numbers of which every case is among: ratios beyond the clip on both sides, answers of differing length."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(answers, length, generator=random)
    lengths = torch.tensor([length, 1, 2, length][:answers])
    return Experience(
        prompts=torch.zeros(answers // 2, 2, dtype=torch.long),
        prompts_valid=None,
        ids=torch.zeros(answers, length, dtype=torch.long),
        valid=torch.arange(length) < lengths[:, None],
        rewards=torch.randn(answers, generator=random),
        log_p=draw() - 2,
        reference=draw() - 2,
        values=draw(),
    )


def built(**options: Any) -> Any:
    objective: Any = objectives.build({"reward": "per", **options})
    objective.limit = 5
    return objective


# by hand


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("lengths", [True, False])
def test_the_loss_of_grpo_is_that_of_the_paper(std: bool, lengths: bool) -> None:
    objective = built(name="grpo", answers=2, std=std, lengths=lengths, beta=0.3, clip=0.1)
    objective.held = objective.weigh([experience()])
    (one,) = objective.held
    log_p = one.log_p + 0.3 * torch.randn(4, 3)
    by_hand, clipped = 0.0, set()
    for i in range(4):
        group = [float(one.rewards[j]) for j in (i // 2 * 2, i // 2 * 2 + 1)]
        better = float(one.rewards[i]) - sum(group) / 2
        if std:
            better /= np.std(group) + 1e-4
        count = int(one.valid[i].sum())
        for t in range(count):
            ratio = math.exp(log_p[i, t] - one.log_p[i, t])
            near = min(max(ratio, 0.9), 1.1)
            clipped.add((near != ratio, better > 0))
            assert one.reference is not None
            q = math.exp(one.reference[i, t] - log_p[i, t])
            loss = -min(ratio * better, near * better) + 0.3 * (q - math.log(q) - 1)
            by_hand += loss / (count if lengths else 5) / 4
    assert {(True, True), (True, False)} <= clipped
    assert float(objective.loss(torch.nn.Identity(), torch.zeros(4, 3, 1), log_p, one)) == pytest.approx(
        by_hand, rel=1e-5
    )


def test_nothing_is_gained_beyond_the_clip() -> None:
    log_p = torch.tensor([[0.5, -0.5], [0.5, -0.5]], requires_grad=True)
    better = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    one = experience(answers=2, length=2).but(log_p=torch.zeros(2, 2), advantages=better)
    grpo.clipped(log_p, one, 0.2).sum().backward()
    assert log_p.grad is not None and torch.equal(log_p.grad != 0, torch.tensor([[False, True], [True, False]]))


def test_the_divergence_is_an_estimate_of_kl_that_is_never_negative() -> None:
    p, q = torch.randn(2, 50).log_softmax(-1)
    drawn = torch.multinomial(p.exp(), 200_000, replacement=True)
    found = grpo.divergence(p[drawn][None], q[drawn][None])
    assert float(found.min()) >= 0
    assert float(found.mean()) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=0.03)


def test_advantages_are_the_sums_of_the_definition() -> None:
    one, gamma, lam = experience(1), 0.9, 0.8
    rewards = torch.randn(4, 3)
    assert one.values is not None
    found = ppo.advantages(rewards, one.values, one.valid, gamma, lam)
    for i in range(4):
        count = int(one.valid[i].sum())
        r, v = rewards[i, :count].tolist(), [*one.values[i, :count].tolist(), 0.0]
        for t in range(count):
            by_hand = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, count))
            assert float(found[i, t]) == pytest.approx(by_hand, rel=1e-5, abs=1e-6)
        assert not found[i, count:].any()


def test_the_loss_of_ppo_is_that_of_the_paper() -> None:
    objective = built(name="ppo", beta=0.3, clip=0.1, value=0.5, value_clip=0.2, gamma=1.0, lam=1.0)
    objective.held = objective.weigh([experience(2), experience(3)])
    one, before = objective.held[0], experience(2)
    log_p, values = one.log_p + 0.3 * torch.randn(4, 3), torch.randn(4, 3)
    objective.valued = lambda net, states: values
    returns, plain = {}, []
    for other in (before, experience(3)):
        for i, t in other.valid.nonzero().tolist():
            assert other.reference is not None and other.values is not None
            near = [0.3 * float(other.log_p[i, k] - other.reference[i, k]) for k in range(t, int(other.valid[i].sum()))]
            told = float(other.rewards[i]) - sum(near)  # lambda = 1: all that comes, and no value
            plain.append(told - float(other.values[i, t]))
            if other is before:
                returns[i, t] = told
    by_hand = 0.0
    for (i, t), told in returns.items():
        assert before.values is not None
        old, new = float(before.values[i, t]), float(values[i, t])
        better = (told - old - np.mean(plain)) / np.std(plain)
        ratio = math.exp(log_p[i, t] - one.log_p[i, t])
        near_value = old + min(max(new - old, -0.2), 0.2)
        by_hand += -min(ratio * better, min(max(ratio, 0.9), 1.1) * better)
        by_hand += 0.5 * max((new - told) ** 2, (near_value - told) ** 2) / 2
    by_hand /= len(plain)
    assert float(objective.loss(torch.nn.Identity(), torch.zeros(4, 3, 1), log_p, one)) == pytest.approx(
        by_hand, rel=1e-4
    )


# what is drawn


def prompts_of(prepared: Prepared, count: int = 5) -> Prompts:
    """Of differing lengths, so that there is padding."""
    examples: Any = prepared.batches._examples
    chosen = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))[:: len(examples) // count][:count]
    batch = prepared.objective.collate([examples[i] for i in chosen], np.random.default_rng(0))
    assert batch.valid is not None
    return batch


def part_of(batch: Prompts, part: slice) -> Prompts:
    objective_answers = batch.targets // len(batch.texts)
    valid = None if batch.valid is None else batch.valid[part]
    texts = batch.texts[part]
    return Prompts(
        ids=batch.ids[part], valid=valid, luck=batch.luck[part], texts=texts, expected=batch.expected[part],
        tokens=0, targets=len(texts) * objective_answers,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_answers_are_found_as_likely_as_each_by_itself(folder: Path, kind: str) -> None:
    prepared, net = made(recipe_of(folder, kind, "grpo", objective={"epochs": 2}))
    batch, policy = prompts_of(prepared), prepared.objective.policy(net)
    answers = policy.write(batch, Options(temperature=1.0, tokens=6), 3)
    assert len(answers) == 15 and len({len(answer) for answer in answers}) > 1
    one = prepared.objective.experience(net, batch)
    found = policy.log_p(policy.states(batch.ids, batch.valid, one.ids), one.ids, one.valid)
    torch.testing.assert_close(found, one.log_p)
    facts = policy.player.facts
    with torch.no_grad():
        for i, (ids, there) in enumerate(zip(one.ids, one.valid, strict=True)):
            row = i // 8
            prompt = batch.ids[row] if batch.valid is None else batch.ids[row][batch.valid[row]]
            if kind == "decoder":
                x = net(torch.cat([prompt, ids[there]])[None])
                logits = net.head("lm", x)[0, len(prompt) - 1 : -1]
            else:
                read = torch.cat([torch.tensor([facts.start]), ids[there]])[None]
                logits = net(prompt[None], read)[0, :-1]
            logits[:, list(facts.bad)] = float("-inf")
            by_hand = logits.log_softmax(-1).gather(1, ids[there][:, None])[:, 0]
            torch.testing.assert_close(one.log_p[i][there], by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_the_likeliest_answer_is_what_the_model_generates(folder: Path, kind: str) -> None:
    prepared, net = made(recipe_of(folder, kind, "grpo"))
    batch, policy = prompts_of(prepared), prepared.objective.policy(net)
    written = policy.write(batch, Options(tokens=6))
    model = headway.load(folder / kind)
    how = {} if kind == "seq2seq" else {"max_tokens": 6}
    found = model.generate(list(batch.texts), **how)
    for ids, one in zip(written, found, strict=True):
        assert [token for token in ids if token not in policy.player.facts.eos] == one.ids[:6]


def test_drawn_tokens_come_as_often_as_they_are_likely(folder: Path) -> None:
    prepared, net = made(recipe_of(folder, "seq2seq", "grpo"))
    batch = part_of(prompts_of(prepared), slice(0, 1))
    policy = prepared.objective.policy(net)
    drawn = [answer[0] for answer in policy.write(batch, Options(temperature=1.0, tokens=1), 6000)]
    ids = torch.tensor([[token] for token in sorted(set(drawn))])
    with torch.no_grad():
        log_p = policy.log_p(policy.states(batch.ids, batch.valid, ids), ids, torch.ones_like(ids, dtype=torch.bool))
    shares = np.bincount(drawn)[ids[:, 0].numpy()] / len(drawn)
    np.testing.assert_allclose(shares, log_p.exp()[:, 0].numpy(), atol=0.025)


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_batching_changes_no_answer(folder: Path, kind: str) -> None:
    prepared, net = made(recipe_of(folder, kind, "grpo"))
    batch, policy = prompts_of(prepared), prepared.objective.policy(net)
    how = Options(temperature=1.0, tokens=6)
    whole = policy.write(batch, how, 3)
    parts = [policy.write(part_of(batch, part), how, 3) for part in (slice(0, 2), slice(2, None))]
    assert whole == [*parts[0], *parts[1]]
    assert len({tuple(answer) for answer in whole[:3]}) > 1, "answers to one prompt differ"


# the gradient


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_micro_batches_are_one_batch(folder: Path, kind: str, name: str) -> None:
    prepared, net = made(recipe_of(folder, kind, name, f"{HERE}.long"))
    batch = prompts_of(prepared)
    found = []
    for batches in ([batch], [part_of(batch, slice(0, 2)), part_of(batch, slice(2, None))]):
        prepared.objective.begin(net)
        found.append(gradients(prepared, net, batches))
    assert found[0][0] == pytest.approx(found[1][0])
    assert any(bool(grad.any()) for grad in found[0][1])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_a_step_leaves_the_model_as_training_has_it(folder: Path, kind: str) -> None:
    prepared, net = made(recipe_of(folder, kind, "grpo"))
    net.train()
    names = set(net.state_dict())
    gradients(prepared, net, [prompts_of(prepared)])
    assert all(module.training for module in net.modules()), "dropout is on again"
    assert not is_prepared(net) and set(net.state_dict()) == names
    assert all(p.grad is not None for p in net.parameters())


def test_the_model_is_kept_near_its_start(folder: Path) -> None:
    far = {}
    for beta in (0.0, 3.0):
        options = {"beta": beta, "epochs": 2, "tokens": 3}
        recipe = recipe_of(folder, "seq2seq", "grpo", f"{HERE}.begins_with_a", objective=options, batch_tokens=512)
        prepared, net = made(recipe)
        one = prepared.objective.experience(net, prompts_of(prepared))
        if beta:
            torch.testing.assert_close(one.reference, one.log_p)  # it has not moved yet
        else:
            assert one.reference is None
        model = trained(recipe, prepared, 16)
        far[beta] = prepared.objective.distance(model, [row[0] for row in prepared.splits.train[:20]])
    assert 0 < far[3.0] < far[0.0] / 3


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_an_adapted_model_is_its_own_reference(folder: Path, tmp_path: Path, name: str) -> None:
    adapter = {"method": "lora", "rank": 2, "targets": "*.mixer.query"}
    given = recipe_of(folder, "seq2seq", name, f"{HERE}.long", adapt=adapter, objective={"epochs": 2}, batch_tokens=512)
    prepared, _ = made(given)
    assert given.model is not None
    trainer = Trainer(given, given.model, given.optimizer, prepared, tmp_path)
    with trainer._stream() as trainer.stream:
        for _ in range(3):
            trainer._step()
    one = prepared.objective.experience(trainer.model, prompts_of(prepared))
    start = Policy(headway.load(folder / "seq2seq").net, prepared.tools.start, 1.0)  # type: ignore[arg-type]
    with torch.no_grad():
        near = start.log_p(start.states(one.prompts, one.prompts_valid, one.ids), one.ids, one.valid)
    assert torch.equal(one.reference, near) and not torch.equal(one.log_p, near)
    trainer.save()
    last = max((tmp_path / "checkpoints").glob("step-*"))
    held = set(load_file(last / "model.safetensors"))
    assert all("adapters" in key or key.startswith("value.") for key in held)
    assert any(key.startswith("value.") for key in held) == (name == "ppo")
    held_out = [row[0] for row in prepared.splits.train[:20]]
    model = prepared.objective.loaded(trainer.model, trainer.spec, prepared.tools)
    assert prepared.objective.distance(model, held_out) != 0


def test_dropout_stays_on_only_where_it_is_asked_for(folder: Path) -> None:
    said = {}
    for on in (False, True):
        prepared, net = made(recipe_of(folder, "seq2seq", "grpo", f"{HERE}.long", objective={"dropout": on}))
        net.train()
        batch, found = prompts_of(prepared), []
        for seed in (0, 1):
            torch.manual_seed(seed)
            prepared.objective.backward(net, [batch], float(batch.targets), lambda part: nullcontext())
            found.append(prepared.objective.held[0].ids.tolist())
        said[on] = found
    assert said[False][0] == said[False][1] and said[True][0] != said[True][1]


# learning


def trained(recipe: Recipe, prepared: Prepared, steps: int) -> Any:
    """After so many steps of the loop's own, without a folder."""
    assert recipe.model is not None
    trainer = Trainer(recipe, recipe.model, recipe.optimizer, prepared, Path("nowhere"))
    with trainer._stream() as trainer.stream:
        trainer.model.train()
        for _ in range(steps):
            trainer._step()
    return prepared.objective.loaded(trainer.model, trainer.spec, prepared.tools)


@pytest.mark.parametrize(
    ("kind", "name", "epochs"),
    [
        ("seq2seq", "grpo", 1),
        ("decoder", "ppo", 1),
        pytest.param("decoder", "grpo", 2, marks=pytest.mark.long),
        pytest.param("seq2seq", "grpo", 2, marks=pytest.mark.long),
        pytest.param("seq2seq", "ppo", 2, marks=pytest.mark.long),
    ],
)
def test_a_bandit_is_learned(folder: Path, kind: str, name: str, epochs: int) -> None:
    options = {"beta": 0.0, "epochs": epochs, "tokens": 2}
    recipe = recipe_of(
        folder,
        kind,
        name,
        f"{HERE}.begins_with_a",
        objective=options,
        budget={"steps": 80},
        batch_tokens=512 if name == "grpo" else 256,
    )
    prepared, net = made(recipe)
    batch = prepared.curve.batch(0)
    first = prepared.objective.experience(net, batch).rewards.mean() if name == "grpo" else 0.2
    model = trained(recipe, prepared, 40)
    policy = prepared.objective.policy(model.net)
    answers = policy.write(batch, Options(temperature=1.0, tokens=2), 8)
    last = prepared.objective.rewards(policy, batch, answers).mean()
    assert first < 0.5 and last > 0.9, (first, last)


def test_what_is_trained_is_a_model_like_any_other(folder: Path, tmp_path: Path) -> None:
    result = headway.train(task(folder, "seq2seq", "ppo"), out=tmp_path / "run")
    assert {"reward", "kl", "per", "wer"} <= set(result["metrics"]) and result["reward"] == pytest.approx(
        -result["per"], abs=0.3
    )
    model = headway.load(tmp_path / "run")
    assert not hasattr(model.net, "value"), "the value head was for training"
    assert model.generate(["abc"])[0].text is not None


@pytest.mark.parametrize("name", ["grpo", pytest.param("ppo", marks=pytest.mark.long)])
def test_a_run_goes_on_amid_the_epochs_of_its_answers(folder: Path, tmp_path: Path, name: str) -> None:
    recipe = recipe_of(folder, "seq2seq", name, objective={"epochs": 3}, checkpoint_seconds=0)
    weights = []
    for stop in (None, 4):
        prepared, _ = made(recipe)
        out = tmp_path / str(stop)
        out.mkdir()
        assert recipe.model is not None
        if stop is not None:
            trainer = Trainer(recipe, recipe.model, recipe.optimizer, prepared, out)
            with trainer._stream() as trainer.stream:
                trainer.model.train()
                for _ in range(stop):
                    trainer._step()
            trainer.save()
        trainer = Trainer(recipe, recipe.model, recipe.optimizer, prepared, out)
        assert trainer.resume() == (stop is not None)
        trainer.fit()
        last = max((out / "checkpoints").glob("step-*"))
        lines = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
        weights.append(((last / "model.safetensors").read_bytes(), lines))
    assert weights[0] == weights[1]
    assert len(set(weights[0][1])) == 2, "six steps, two sets of answers"


# rewards


def test_built_in_rewards_are_what_they_say() -> None:
    per, match = _rewards.find("per"), _rewards.find("match")
    assert per("w", "A B C", ["A B D", "X"]) == pytest.approx(-1 / 3) and per("w", "X", ["A B", "X"]) == 0
    assert per("w", "", ["A B"]) == -1
    assert match("p", " yes ", ["yes", "no"]) == 1 and match("p", "yes!", ["yes"]) == 0
    found = _rewards.find("match", r"#### (\d+)")
    assert found("p", "so #### 42.", ["42"]) == 1 and found("p", "42", ["42"]) == 0
    shape = _rewards.find("format", r"<a>.*</a>")
    assert not shape.expects and shape("p", "<a>x</a>", []) == 1 and shape("p", "<a>x</a> y", []) == 0
    assert _rewards.find(f"{HERE}.begins_with_a")("p", "A B", []) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"name": "grpo", "reward": "pre"},
            "no reward 'pre' (there is per, match, format, or a dotted path); did you mean 'per'?",
        ),
        (
            {"name": "grpo", "reward": "mine.own"},
            "mine is not imported, and a recipe never runs code: `import mine` before",
        ),
        (
            {"name": "grpo", "reward": f"{HERE}.begin_with_a"},
            "has no function begin_with_a; did you mean 'begins_with_a'",
        ),
        (
            {"name": "grpo", "reward": f"{HERE}.task"},
            "takes (prompt, answer) or (prompt, answer, expected), not (folder",
        ),
        ({"name": "ppo", "reward": "format"}, "format needs one"),
        ({"name": "ppo", "reward": "match", "pattern": "("}, "is no regular expression"),
        ({"name": "grpo", "answers": 1}, "2 or more, not 1"),
        ({"name": "ppo", "epochs": 0}, "answers, epochs and tokens are 1 or more"),
        ({"name": "ppo", "lam": 1.5}, "1.5"),
        (
            {"name": "grpo", "dropout": True, "epochs": 2},
            "moves a policy between the epochs of its answers (2): take one",
        ),
        ({"name": "grpo", "temperature": 0.0}, "temperature and clip are above 0"),
        ({"name": "grpo", "clip_range": 0.2}, "clip_range"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as fault:
        objectives.build(options)
    assert reason in str(fault.value) and "\n" not in str(fault.value)


def test_a_reward_teaches_what_can_write_already(folder: Path) -> None:
    recipe = recipe_of(folder, "seq2seq", "grpo", model=tiny_seq2seq())
    with pytest.raises(ValueError, match="a reward teaches a model that can write already: set model"):
        made(recipe)


def test_a_reward_that_is_no_number_is_told(folder: Path) -> None:
    prepared, net = made(recipe_of(folder, "seq2seq", "grpo", f"{HERE}.not_finite"))
    with pytest.raises(ValueError, match="is nan of the answer"):
        prepared.objective.rehearse(net, prompts_of(prepared), prepared.tools)


def test_a_prompt_that_is_too_long_is_told(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens is 4: raise it"):
        made(recipe_of(folder, "seq2seq", "grpo", max_tokens=4))


@pytest.mark.parametrize("reward", ["shutil.move", "os.renames", "torch.add", f"{HERE}.read"])
def test_a_recipe_calls_no_function_that_is_no_reward(reward: str) -> None:
    with pytest.raises(ValueError, match=r"no module of rewards|was imported there"):
        _rewards.find(reward)
