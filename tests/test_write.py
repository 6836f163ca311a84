"""What a decoder writes: greedy, drawn and by beams, alone and in company, whole and in pieces."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published import TINY, label, saved

import headway
from headway import families, models
from headway.generate.sampling import Sampling, draw
from headway.generate.texts import Text, ids_of
from headway.hub import Loaded
from headway.loaded import Facts
from headway.quantize import is_prepared
from headway.vocabulary import PublishedTokenizer
from headway.vocabulary import facts as told

PROSE = [
    "the cat sat on the mat and the dog sat on the log",
    "naïve café, 東京 and Ελλάδα: 🙂",
    "one two three four five",
]
PROMPTS = ["the cat", "one two three", "a", "naïve café 🙂 and then some more of it"]


@functools.cache
def tokenizer() -> PublishedTokenizer:
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds

    core = Tokenizer(kinds.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    core.train_from_iterator(PROSE, trainer)
    return PublishedTokenizer(core, told.Facts(names={"eos": "<end>"}))


@functools.cache
def loaded(limit: int | None = 64, ends: tuple[int, ...] = (0,)) -> Loaded:
    block = {"mixer": {"name": "attention", "heads": 2}, "feedforward": {}}
    spec: dict[str, Any] = {
        "kind": "decoder",
        "width": 32,
        "vocab": tokenizer().vocab,
        "stack": {"blocks": [block], "repeat": 2},
        "heads": {"lm": {"outputs": tokenizer().vocab, "tie": True, "bias": False}},
    }
    torch.manual_seed(3)
    net = models.build(spec)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    return Loaded(net, spec, tokenizer(), facts=Facts(max_tokens=limit, eos=ends))


def greedy_by_definition(model: Loaded, ids: list[int], count: int) -> list[int]:
    """The likeliest next token of the whole text, each time anew."""
    for _ in range(count):
        ids = [*ids, int(model.logits(torch.tensor([ids]))[0, -1].argmax())]
        if ids[-1] in model.facts.eos:
            break
    return ids


def test_greedy_writes_the_likeliest_token_each_time() -> None:
    model = loaded()
    for prompt in PROMPTS:
        ids = tokenizer().encode(prompt).ids
        found = model.generate([prompt], max_tokens=12)[0]
        expected = greedy_by_definition(model, ids, 12)[len(ids) :]
        assert found.ids == [i for i in expected if i not in model.facts.eos]


@pytest.mark.parametrize("how", [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 5}, {"beams": 3}])
def test_company_changes_no_answer(how: dict[str, Any]) -> None:
    together = loaded().generate(PROMPTS, max_tokens=10, **how)
    if "seed" in how:  # a row's randomness is its own, by its number: in smaller batches it is the same
        apart = loaded().generate(PROMPTS, max_tokens=10, batch=1, **how)
    else:
        apart = [loaded().generate([prompt], max_tokens=10, **how)[0] for prompt in PROMPTS]
    for one, two in zip(together, apart, strict=True):
        assert one.ids == two.ids and one.text == two.text and one.finish == two.finish
        assert one.log_probability == pytest.approx(two.log_probability, abs=1e-3)


def test_log_probabilities_are_those_of_the_model() -> None:
    model, ids = loaded(), tokenizer().encode(PROMPTS[0]).ids
    found = model.generate([PROMPTS[0]], max_tokens=8, temperature=2.0, repetition_penalty=1.5, seed=1)[0]
    log_p = model.logits(torch.tensor([ids + found.ids]))[0].log_softmax(-1)
    for i, token in enumerate(found.ids):
        assert found.log_probabilities[i] == pytest.approx(float(log_p[len(ids) + i - 1, token]), abs=1e-4)


def test_a_seed_repeats_and_another_one_does_not() -> None:
    def write(seed: int) -> list[int]:
        return loaded().generate([PROMPTS[0]], max_tokens=20, temperature=2.0, seed=seed)[0].ids

    assert write(1) == write(1)
    assert len({tuple(write(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_a_cut_to_one_token_is_greedy(cut: dict[str, Any]) -> None:
    greedy = loaded().generate(PROMPTS, max_tokens=8)
    drawn = loaded().generate(PROMPTS, max_tokens=8, temperature=3.0, **cut)
    assert [g.ids for g in greedy] == [d.ids for d in drawn]


def test_what_is_drawn_has_the_probabilities_that_it_should() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    luck, count = random.Random(0), 4000
    how = Sampling(temperature=2.0)
    drawn = torch.stack([draw(logits, how, [[]], [luck]).ids for _ in range(count)]).flatten()
    shares = torch.bincount(drawn, minlength=4) / count
    assert torch.allclose(shares, (logits[0] / 2).softmax(-1), atol=0.03)


@given(st.integers(1, 5), st.floats(0.05, 1.0), st.floats(0.0, 0.9), st.integers(0, 10**6))
def test_nothing_that_was_cut_is_ever_drawn(top_k: int, top_p: float, min_p: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(1, 9) * 3
    how = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    token = int(draw(logits, how, [[]], [random.Random(seed)]).ids)
    p = logits[0].topk(top_k).values.softmax(-1)
    rank = int((logits[0] > logits[0, token]).sum())
    assert rank < top_k
    assert rank == 0 or float(p[:rank].sum()) < top_p + 1e-5
    assert float(p[rank]) >= min_p * float(p[0]) - 1e-6


def test_a_repeated_token_is_less_likely_under_a_penalty_and_bad_ones_never_come() -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0]])
    luck = [random.Random(0)]
    assert int(draw(logits, Sampling(), [[0]], luck).ids) == 0
    assert int(draw(logits, Sampling(repetition_penalty=2.0), [[0]], luck).ids) == 1
    assert int(draw(logits, Sampling(), [[]], luck, torch.tensor([0])).ids) == 1


def test_beams_find_what_is_at_least_as_likely_as_greedy() -> None:
    for prompt in PROMPTS:
        greedy = loaded(ends=()).generate([prompt], max_tokens=6)[0]
        found = loaded(ends=()).generate([prompt], max_tokens=6, beams=6, penalty=0.0)[0]
        assert found.log_probability >= greedy.log_probability - 1e-3
        assert loaded(ends=()).generate([prompt], max_tokens=6, beams=1)[0].ids == greedy.ids


def test_a_stop_string_ends_the_text_where_it_begins() -> None:
    whole = loaded(ends=()).generate([PROMPTS[0]], max_tokens=30)[0].text
    stop = whole[5:8]
    found = loaded(ends=()).generate([PROMPTS[0], PROMPTS[1]], max_tokens=30, stop=stop)[0]
    assert found.text == whole[: whole.index(stop)] and found.finish == "stop"
    assert "".join(loaded(ends=()).stream(PROMPTS[0], max_tokens=30, stop=stop)) == found.text


def test_a_stream_in_pieces_is_the_whole_text() -> None:
    for prompt in PROMPTS:
        for seed in range(3):
            how = {"max_tokens": 25, "temperature": 2.5, "seed": seed}
            assert "".join(loaded().stream(prompt, **how)) == loaded().generate([prompt], **how)[0].text


def test_half_a_character_is_not_shown() -> None:
    text, shown = Text(tokenizer(), ()), []
    for id in tokenizer().encode("a🙂b").ids:
        shown.append(text.add(id, 0.0, False))
    assert "".join(shown) == "a🙂b" and not any("\ufffd" in piece for piece in shown)


def test_the_limit_is_the_models_or_the_users() -> None:
    model = loaded(limit=16, ends=())
    ids = tokenizer().encode(PROMPTS[1]).ids
    found = model.generate([PROMPTS[1]], max_tokens=100)[0]
    assert len(found.ids) == 16 - len(ids) and found.finish == "limit"
    assert len(model.generate([PROMPTS[1]], max_tokens=2)[0].ids) == 2
    with pytest.raises(ValueError, match="tokens; this model takes 16"):
        model.generate(["naïve café, 東京 and Ελλάδα: 🙂"], max_tokens=3)


def test_the_end_is_not_part_of_the_text() -> None:
    free = loaded(ends=()).generate([PROMPTS[0]], max_tokens=10)[0]
    stopping = loaded(ends=(free.ids[4],)).generate([PROMPTS[0]], max_tokens=10)[0]
    assert stopping.ids == free.ids[: free.ids.index(free.ids[4])] and stopping.finish == "end"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 5}, "temperature 0 draws nothing"),
        ({"beams": 2, "temperature": 1.0}, "beams keep the likeliest"),
        ({"stop": ""}, "empty string"),
        ({"task": "translate"}, "no prefix for the task"),
        ({"chat": True}, "chat"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        loaded().generate(["the cat"], **given)
    assert "\n" not in str(refused.value)


def test_one_text_or_none_is_refused() -> None:
    with pytest.raises(ValueError, match="takes a list of prompts"):
        loaded().generate("the cat")
    with pytest.raises(ValueError, match="empty prompt"):
        loaded().generate([""])
    assert loaded().generate([]) == []


def test_what_is_no_prompt_no_batch_and_no_device_is_one_line(tmp_path: Path) -> None:
    model = loaded()
    for call, said in (
        (lambda: ids_of(model, None), "a prompt is a text, messages of a chat, or ids, not None"),
        (lambda: ids_of(model, ["a"]), "a prompt is a text, messages of a chat, or ids, not \\['a'\\]"),
        (lambda: model.generate(["a"], batch=0), "batch is how many prompts go together, 1 or more, not 0"),
        (lambda: model.hidden(torch.tensor([[1, 10**6]])), "id 1000000 is outside this model's"),
        (lambda: model.hidden(torch.tensor([[1, -1]])), "id -1 is outside this model's"),
        (lambda: headway.load(tmp_path, "tpu"), "no device 'tpu' here"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_beams_near_the_models_limit_do_not_cut_their_neighbours_short() -> None:
    model, rows = loaded(limit=16, ends=()), [[5] * 14, [6, 7]]
    together = model.generate(rows, max_tokens=20, beams=3)
    assert [len(found.ids) for found in together] == [2, 14]
    assert [found.ids for found in together] == [model.generate([row], max_tokens=20, beams=3)[0].ids for row in rows]


@pytest.mark.parametrize("beams", [1, 2])
def test_what_is_forced_or_forbidden_has_the_models_own_log_probability(beams: int) -> None:
    model = Loaded(loaded().net, loaded().spec, tokenizer(), facts=Facts(max_tokens=64, forced_bos=9, bad=(10, 11)))
    found = model.generate([[5, 6, 7]], max_tokens=4, beams=beams)[0]
    log_p = model.logits(torch.tensor([[5, 6, 7, *found.ids]]))[0, 2:-1].log_softmax(-1)
    assert found.ids[0] == 9 and not {10, 11} & set(found.ids)
    assert found.log_probability == pytest.approx(
        float(log_p.gather(1, torch.tensor(found.ids)[:, None]).sum()), abs=1e-3
    )


def test_chat_and_task_are_not_ignored_for_ids() -> None:
    for wrong in ({"chat": True}, {"task": "translate"}):
        with pytest.raises(ValueError, match="chat and task are for texts, and this prompt is ids"):
            loaded().generate([[5, 6]], **wrong)


def test_ids_may_be_given_instead_of_text() -> None:
    ids = tokenizer().encode(PROMPTS[0]).ids
    assert loaded().generate([ids], max_tokens=5)[0].ids == loaded().generate([PROMPTS[0]], max_tokens=5)[0].ids
    assert msgspec.to_builtins(loaded().facts)["eos"] == [0] or loaded().facts.eos == (0,)


def test_a_model_packs_itself_to_write_and_is_whole_again_when_saved(tmp_path: Path) -> None:
    case = next(case for case in TINY if case[0] == "gpt2" and label(case).startswith("GPT2LMHead"))
    wide = {**families.family("gpt2").tiny()[case[1]], "n_embd": 256}  # narrow maps are left as they are
    model, plain = (hub_build(wide) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in plain.net.state_dict().items()}
    model.net.load_state_dict(before)
    ids = [[5, 6, 7, 8]]
    written = model.generate(ids, max_tokens=6)[0]
    assert is_prepared(model.net) and model.net.heads["lm"].spec.tie
    assert model.parameters == plain.parameters, "what is packed still counts: threads are chosen by it"
    logits = plain.logits(torch.tensor([ids[0] + written.ids]))
    assert logits[0, 3:-1].argmax(-1).tolist() == written.ids
    model.save(tmp_path / "model")
    assert not is_prepared(model.net) and model.net.heads["lm"].out.weight is model.net.embedding.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.net.state_dict().items())
    rounded = headway.load(tmp_path / "model", quantize="int8")
    assert rounded.generate(ids, max_tokens=1)[0].ids
    with pytest.raises(ValueError, match="int8 weights are rounded and cannot be restored"):
        rounded.save(tmp_path / "other")


def hub_build(config: dict[str, Any]) -> Loaded:
    found = families.read(config, "config.json")
    torch.manual_seed(0)
    return Loaded(models.build(found.spec), found.spec, tokenizer(), facts=found.facts)


def test_ids_are_written_without_a_tokenizer() -> None:
    bare = Loaded(loaded().net, loaded().spec, facts=loaded().facts)
    ids = tokenizer().encode(PROMPTS[0]).ids
    found = bare.generate([ids], max_tokens=5)[0]
    assert found.ids == loaded().generate([ids], max_tokens=5)[0].ids and found.text == "" and found.tokens == []
    with pytest.raises(ValueError, match="came without a tokenizer"):
        bare.generate([ids], stop="x")


def test_an_answer_ends_where_the_decoders_learned_positions_do() -> None:
    case = next(case for case in TINY if case[0] == "bart")
    model = headway.load(saved(case))
    length = model.net.decoder.positions.length
    model.facts = msgspec.structs.replace(model.facts, eos=(), forced_eos=None)
    found = model.generate([[5, 6, 7]], max_tokens=10 * length)[0]
    assert len(found.ids) == length and found.finish == "limit"


def test_generation_config_tells_how_a_text_begins_and_ends() -> None:
    told = {
        "eos_token_id": [7, 8],
        "decoder_start_token_id": 3,
        "forced_bos_token_id": 4,
        "bad_words_ids": [[5], [6]],
    }
    facts = families.with_generation(Facts(eos=(8, 9)), told, "generation_config.json")
    assert (facts.eos, facts.start, facts.forced_bos, facts.bad) == ((7, 8, 9), 3, 4, (5, 6))
    with pytest.raises(ValueError, match="eos_token_id is an id or a list of them"):
        families.with_generation(Facts(), {"eos_token_id": ["x"]}, "generation_config.json")
    with pytest.raises(ValueError, match="bad_words_ids is read where each word is one id"):
        families.with_generation(Facts(), {"bad_words_ids": [[5], [6, 7]]}, "generation_config.json")
