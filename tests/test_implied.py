"""Implied maps: what mixers do that form no weights, as maps whose product with the values is the layer's output."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import headway.probe.look
from headway import mixers, models
from headway.mask import Mask
from headway.mixers import Implied, Mixer
from headway.positions import build_positions, positions_of
from headway.spec import PositionSpec, convert

ROWS, LENGTH, CONTEXT, WIDTH = 2, 9, 6, 16
CASES: list[dict[str, Any]] = [
    {"name": "identity"},
    {"name": "average"},
    {"name": "fourier"},
    *({"name": "linformer", "heads": 2, "rank": 4, "length": 9, "sharing": s} for s in ("none", "headwise")),
    *({"name": "performer", "heads": 2, "features": 8, "kernel": kernel} for kernel in ("softmax", "relu")),
    *({"name": "linear", "heads": 2, "kind": kind} for kind in ("plain", "retention", "gated", "delta")),
    {"name": "linear", "heads": 2, "kind": "plain", "bidirectional": True},
    {"name": "ssm", "head_dim": 8, "state_size": 4},
    {"name": "ssm", "head_dim": 8, "state_size": 4, "groups": 2},
]  # fmt: skip
CONVOLUTIONS: list[dict[str, Any]] = [
    {"name": "conv", "kernel": 3},
    {"name": "conv", "kernel": 4, "dilation": 2, "gated": False},
    {"name": "conv", "kernel": 5, "depthwise": True},
    {"name": "conv", "kernel": 40, "depthwise": True, "decay": True},
]

SHIFTING = """
import torch
from headway.mixers import Implied, Mixer

class Shift(Mixer):
    CAN = frozenset({"causal"})
    def __init__(self, width, *, positions=None):
        super().__init__()
    def forward(self, x, *, mask, pos, state=None, context=None):
        return torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
    def implied(self, x, *, mask, pos, context=None, rows=None):
        return Implied(torch.ones(x.shape[1] - 1).diag(-1)[None, None], x[:, None], lambda y: y[:, 0])
"""


def label(named: dict[str, Any]) -> str:
    return " ".join(str(value) for value in named.values())


def build(named: dict[str, Any]) -> Mixer:
    rotary = build_positions(
        convert({"name": "rotary"}, PositionSpec, "positions"), WIDTH, mixers.head_dim(named, WIDTH)
    )
    mixer = mixers.build(named, WIDTH, rotary).eval()
    with torch.no_grad():  # what starts as a constant is told apart from what is left out
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def valid(lengths: tuple[int, int], size: int, left: bool) -> Tensor:
    there = torch.arange(size)[None] < torch.tensor(lengths)[:, None]
    return there.flip(1) if left else there


def own_masks(mixer: Mixer) -> list[Mask]:
    """All that it can do to its own tokens, the plain ones, padded ones and packed ones."""
    packed = Mask(segments=torch.tensor([[0] * 4 + [1] * 5] * ROWS))
    padded = [Mask(valid=valid((9, 6), LENGTH, left)) for left in (False, True)]
    masks = [more & Mask(causal=causal) for causal in (True, False) for more in (Mask(), packed, *padded)]
    return [mask for mask in masks if mask.facts <= mixer.can]


def seen(mask: Mask, pos: Tensor) -> Tensor:
    """`Bool[B T S]`."""
    return mask.allows(pos, pos).expand(len(pos), pos.shape[1], -1) & (pos >= 0)[..., None]


@torch.no_grad()
def look(mixer: Any, x: Tensor, mask: Mask, pos: Tensor, **more: Any) -> Implied:
    return mixer.implied(x, mask=mask, pos=pos, **more)


@pytest.mark.parametrize("named", CASES, ids=label)
def test_the_map_times_the_values_is_the_layers_own_output(named: dict[str, Any]) -> None:
    mixer = build(named)
    assert own_masks(mixer)
    for mask in own_masks(mixer):
        x, pos = torch.randn(ROWS, LENGTH, WIDTH), positions_of(mask.valid, ROWS, LENGTH, torch.device("cpu"))
        x = x if mask.valid is None else x.masked_fill(~mask.valid[..., None], 1e3)
        found, there = look(mixer, x, mask, pos), pos >= 0
        assert found.values is not None and found.finish is not None
        with torch.no_grad():
            got, wanted = found.finish(found.map @ found.values), mixer(x, mask=mask, pos=pos)
        assert float((got - wanted)[there].abs().max()) < 1e-5 * (1 + float(wanted[there].abs().max())), mask.facts


@settings(max_examples=40)
@given(named=st.sampled_from(CASES), length=st.integers(1, 150), missing=st.integers(0, 149), left=st.booleans())
def test_it_is_at_any_length_with_any_padding(named: dict[str, Any], length: int, missing: int, left: bool) -> None:
    mixer = build({**named, "length": 150} if named["name"] == "linformer" else named)
    there = torch.arange(length)[None] < max(length - missing, 1)
    valid = (there.flip(1) if left else there) if missing else None
    mask = Mask(causal="causal" in mixer.can, valid=valid)
    x, pos = torch.randn(1, length, WIDTH), positions_of(valid, 1, length, torch.device("cpu"))
    found, rows = look(mixer, x, mask, pos), slice(length // 3, length // 3 + 5)
    assert found.values is not None and found.finish is not None
    with torch.no_grad():
        got, wanted = found.finish(found.map @ found.values), mixer(x, mask=mask, pos=pos)
    assert float((got - wanted)[pos >= 0].abs().max()) < 1e-5 * (1 + float(wanted.abs().max()))
    assert not found.map[~seen(mask, pos)[:, None].expand_as(found.map)].any()
    part = look(mixer, x, mask, pos, rows=rows).map
    torch.testing.assert_close(part, found.map[:, :, rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("named", CASES + CONVOLUTIONS, ids=label)
def test_what_the_mask_hides_and_padding_is_exactly_zero(named: dict[str, Any]) -> None:
    mixer = build(named)
    for mask in own_masks(mixer):
        pos = positions_of(mask.valid, ROWS, LENGTH, torch.device("cpu"))
        found = look(mixer, torch.randn(ROWS, LENGTH, WIDTH), mask, pos).map
        hidden = ~seen(mask, pos)[:, None].expand_as(found)
        assert not found[hidden].any(), mask.facts
        assert found.isfinite().all() and found.any()


@pytest.mark.parametrize("named", CASES + CONVOLUTIONS, ids=label)
def test_some_rows_are_those_of_the_whole(named: dict[str, Any]) -> None:
    mixer = build(named)
    for mask in own_masks(mixer):
        x, pos = torch.randn(ROWS, LENGTH, WIDTH), positions_of(mask.valid, ROWS, LENGTH, torch.device("cpu"))
        whole, part = look(mixer, x, mask, pos), look(mixer, x, mask, pos, rows=slice(3, 6))
        assert part.map.shape[2] == 3
        torch.testing.assert_close(part.map, whole.map[:, :, 3:6], rtol=1e-5, atol=1e-6)
        if whole.exact is not None:
            assert part.exact is not None
            torch.testing.assert_close(part.exact(), whole.exact()[:, :, 3:6])


@pytest.mark.parametrize("named", [case for case in CASES if case["name"] in ("performer", "linear", "ssm")], ids=label)
def test_a_long_input_goes_in_runs_from_its_end(named: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = build(named)
    for mask in own_masks(mixer):
        x, pos = torch.randn(ROWS, LENGTH, WIDTH), positions_of(mask.valid, ROWS, LENGTH, torch.device("cpu"))
        at_once = look(mixer, x, mask, pos).map
        with monkeypatch.context() as patched:
            patched.setattr(f"headway.mixers.{named['name']}.RUN", 2)
            for rows in (None, slice(4, 7), slice(0, 1)):
                found = look(mixer, x, mask, pos, rows=rows).map
                torch.testing.assert_close(found, at_once[:, :, rows or slice(None)], rtol=1e-5, atol=1e-6)
                assert not found[at_once[:, :, rows or slice(None)] == 0].any()


@pytest.mark.parametrize("named", [case for case in CASES if case["name"] in ("linformer", "performer")], ids=label)
@pytest.mark.parametrize("left", [None, False, True])
def test_a_context_is_mapped_too(named: dict[str, Any], left: bool | None) -> None:
    mixer, mask = build(named), Mask(valid=None if left is None else valid((6, 3), CONTEXT, left))
    x, context = torch.randn(ROWS, LENGTH, WIDTH), torch.randn(ROWS, CONTEXT, WIDTH)
    pos = torch.arange(LENGTH).expand(ROWS, -1)
    found = look(mixer, x, mask, pos, context=context)
    assert found.values is not None and found.finish is not None
    with torch.no_grad():
        wanted = mixer(x, mask=mask, pos=pos, context=context)
        torch.testing.assert_close(found.finish(found.map @ found.values), wanted, rtol=1e-5, atol=1e-5)
    if mask.valid is not None:
        assert not found.map.mT[~mask.valid[:, None].expand(-1, found.map.shape[1], -1)].any()


@pytest.mark.parametrize("named", CONVOLUTIONS, ids=label)
@pytest.mark.parametrize("causal", [True, False])
def test_a_convolutions_map_is_the_size_of_its_own_derivative(named: dict[str, Any], causal: bool) -> None:
    mixer: Any = build(named)
    mask, pos = Mask(causal=causal), torch.arange(LENGTH)[None]
    found = look(mixer, torch.randn(1, LENGTH, WIDTH), mask, pos)
    assert found.values is None and found.finish is None
    left = mixer.reach if causal else mixer.reach // 2
    zeros = (left, mixer.reach - left)

    def linear_part(x: Tensor) -> Tensor:
        if mixer.depthwise:
            return mixer._channels(x[None], LENGTH, left, zeros)[0]
        return mixer.mix(mixer._windows(x[None], LENGTH, zeros))[0]

    derivative = torch.autograd.functional.jacobian(linear_part, torch.randn(LENGTH, WIDTH))  # T O S C
    torch.testing.assert_close(found.map[0, 0], derivative.permute(0, 2, 1, 3).flatten(2).norm(dim=-1))


def stack(kind: str, *named: dict[str, Any]) -> Any:
    blocks = [{"mixer": mixer} for mixer in named]
    return models.build(
        {"kind": kind, "width": WIDTH, "vocab": 20, "stack": {"positions": {"name": "none"}, "blocks": blocks}}
    ).eval()


def test_a_look_has_each_heads_map_row_by_row() -> None:
    net = stack("encoder", {"name": "linformer", "heads": 2, "rank": 4, "length": 16}, {"name": "fourier"})
    there = valid((9, 6), LENGTH, left=False)
    one = headway.probe.look.look(net, torch.randint(0, 20, (ROWS, LENGTH)), valid=there)
    for layer in range(2):
        seen = one.at(layer)
        whole = look(seen.mixer, seen.x, seen.mask, seen.pos).map
        for row in range(ROWS):
            found = one.implied(layer, 1, row=row)
            torch.testing.assert_close(found.map, whole[row, 1])
            assert found.exact is None and found.error is None
            torch.testing.assert_close(one.implied(layer, 1, row=row, rows=slice(2, 4)).map, found.map[2:4])


def test_more_features_come_nearer_to_the_softmax() -> None:
    def error(features: int) -> float:
        net = stack("decoder", {"name": "performer", "heads": 2, "features": features})
        found = headway.probe.look.look(net, torch.arange(12)[None]).implied(0, 1)
        assert found.exact is not None and found.error is not None
        torch.testing.assert_close(found.map.sum(-1), torch.ones(12))
        torch.testing.assert_close(found.exact.sum(-1), torch.ones(12))
        return found.error

    assert error(4096) < 0.25 * error(8)


@pytest.mark.parametrize(
    ("mixer", "head", "row", "words"),
    [
        ({"name": "attention", "heads": 2}, 0, 0, "forms its weights: use look.map"),
        ({"name": "rnn", "bidirectional": True}, 0, 0, "use look.influence"),
        ({"name": "fourier"}, 2, 0, "no head 2 in layer 0, whose maps are 0 to 1"),
        ({"name": "fourier"}, 0, 1, "no row 1; the rows of this batch are 0 to 0"),
    ],
)
def test_what_has_no_such_map_is_told_in_a_line(mixer: dict[str, Any], head: int, row: int, words: str) -> None:
    one = headway.probe.look.look(stack("encoder", mixer), torch.arange(5)[None])
    with pytest.raises(ValueError) as error:
        one.implied(0, head, row=row)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_mixer_of_ones_own_may_bring_its_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_mixers").mkdir()
    (tmp_path / "my_mixers" / "shift.py").write_text(SHIFTING, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_mixers.shift")
    one = headway.probe.look.look(stack("decoder", {"name": "my_mixers.shift"}), torch.arange(5)[None])
    assert torch.equal(one.implied(0).map, torch.ones(4).diag(-1))
