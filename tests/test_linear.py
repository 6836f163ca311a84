"""Linear attention of each kind: the contract, and the equations of its paper, token by token."""

from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headway import mixers
from headway.block import Stack
from headway.mask import Mask
from headway.positions import Positions, Rotary, positions_of
from headway.spec import BlockSpec, PositionSpec, StackSpec
from headway.testing import check_mixer

KINDS = ["plain", "retention", "gated", "delta"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("further", [{}, {"heads": 2, "head_dim": 6, "positions": "none"}])
def test_it_keeps_its_contract(kind: str, further: dict[str, Any]) -> None:
    held = check_mixer("linear", kind=kind, **further)
    assert {"streamed_equals_parallel", "padding_changes_nothing", "activations_are_as_stated"} <= set(held)
    assert ("packing_changes_nothing" in held) == (kind != "plain")


def test_it_keeps_its_contract_in_both_directions() -> None:
    assert "padding_changes_nothing" in check_mixer("linear", kind="plain", bidirectional=True)


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # the compiler warns of itself
@pytest.mark.parametrize("kind", KINDS)
def test_compiling_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the compiler cannot trace a check of shapes
    assert "compiled_equals_eager" in check_mixer("linear", compiled=True, kind=kind)


# --- Each kind against its equations


def made(kind: str, width: int = 8, positions: Positions | None = None, **options: Any) -> Any:
    named = {"name": "linear", "kind": kind, "heads": 2, **options}
    mixer = mixers.build(named, width, positions or Positions()).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)  # far from where it starts: every part is to matter
    return mixer


def mixed(mixer: Any, x: Tensor, mask: Mask) -> Tensor:
    return mixer(x, mask=mask, pos=positions_of(mask.valid, len(x), x.shape[1], x.device))


def by_hand(mixer: Any, x: Tensor, h: int) -> Tensor:
    """The outputs of one head for one row, before norm and gate."""
    size = mixer.head_dim
    q, k, v = (t[:, h * size : (h + 1) * size] for t in mixer.enter(x).split(2 * size, -1)[:3])
    s, z, outputs = torch.zeros(size, size, dtype=x.dtype), torch.zeros(size, dtype=x.dtype), []
    for t in range(len(x)):
        match mixer.kind:
            case "plain":
                s, z = s + torch.outer(F.elu(k[t]) + 1, v[t]), z + F.elu(k[t]) + 1
                query = F.elu(q[t]) + 1
                outputs.append(query @ s / (query @ z))
            case "retention":
                turn = lambda y, t=t: mixer.positions.rotate(y[None, None, None], torch.tensor([[t]]))[0, 0, 0]
                s = (1 - 2.0 ** (-5 - h)) * s + torch.outer(turn(k[t]), v[t])
                outputs.append(turn(q[t]) @ s / size**0.5)
            case "gated":
                fade = mixer.forget(x[t])[h * size : (h + 1) * size].sigmoid() ** (1 / 16)
                s = fade[:, None] * s + torch.outer(k[t], v[t])
                outputs.append(q[t] @ s / size**0.5)
            case "delta":
                beta, rate = mixer.rates(x[t])[[h, 2 + h]]
                fade = (-mixer.steps.a_log[h].exp() * F.softplus(rate + mixer.steps.bias[h])).exp()
                query, key = (F.silu(y[t]) / F.silu(y[t]).norm() for y in (q, k))
                s = fade * (s - beta.sigmoid() * torch.outer(key, key @ s))
                s = s + beta.sigmoid() * torch.outer(key, F.silu(v[t]))
                outputs.append(query @ s)
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_its_equations_head_by_head(kind: str) -> None:
    mixer, x = made(kind, positions=Rotary(4, 10000.0).double()), torch.randn(70, 8, dtype=torch.double)
    heads = [by_hand(mixer, x, h) for h in range(2)]
    if kind == "retention":
        heads = [F.layer_norm(y, (4,)) for y in heads]
    elif kind != "plain":
        heads = [F.rms_norm(y, (4,), mixer.norm.weight) for y in heads]
    y = torch.cat(heads, -1)
    if kind != "plain":
        y = y * F.silu(mixer.enter(x)[:, -8:])
    torch.testing.assert_close(mixed(mixer, x[None], Mask(causal=True))[0], mixer.out(y), atol=1e-5, rtol=1e-5)


def test_both_directions_sum_over_all_tokens_that_are_there() -> None:
    mixer, x = made("plain", bidirectional=True), torch.randn(2, 6, 8, dtype=torch.double)
    valid = torch.tensor([[True] * 6, [False, True, True, True, False, False]])
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in mixer.enter(x).chunk(3, -1))
    shares = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).masked_fill(~valid[:, None, None], 0.0)
    wanted = mixer.out((shares / shares.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed(mixer, x, Mask(valid=valid))[valid], wanted[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_any_content_changes_nothing_over_many_chunks(kind: str) -> None:
    mixer, x = made(kind), torch.randn(1, 150, 8, dtype=torch.double)
    alone = mixed(mixer, x, Mask(causal=True))
    for left, right in ((70, 0), (0, 70), (3, 66)):
        valid = F.pad(torch.ones(1, 150, dtype=torch.bool), (left, right))
        padded = F.pad(x, (0, 0, left, right), value=float("nan"))
        torch.testing.assert_close(mixed(mixer, padded, Mask(causal=True, valid=valid))[valid], alone[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 3])
def test_a_padded_token_leaves_a_stream_as_it_was(kind: str, length: int) -> None:
    mixer = made(kind)
    state = mixer.init_state(1, 9)
    state.tensors = (torch.randn_like(state.tensors[0]),)
    before, nothing = state.tensors[0].clone(), torch.zeros(1, length, dtype=torch.bool)
    x = torch.randn(1, length, 8, dtype=torch.double)
    mixer(x, mask=Mask(causal=True, valid=nothing), pos=torch.full((1, length), -1), state=state)
    torch.testing.assert_close(state.tensors[0], before)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_packing_changes_nothing_over_many_chunks(kind: str) -> None:
    mixer, x, sizes = made(kind), torch.randn(1, 150, 8, dtype=torch.double), (10, 90, 1, 49)
    segments = torch.arange(4).repeat_interleave(torch.tensor(sizes))[None]
    pos = torch.cat([torch.arange(size) for size in sizes])[None]
    packed = mixer(x, mask=Mask(causal=True, segments=segments), pos=pos)
    alone = torch.cat([mixed(mixer, part, Mask(causal=True)) for part in x.split(sizes, 1)], 1)
    torch.testing.assert_close(packed, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_in_runs_is_the_layer_on_all_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = made(kind, positions=Rotary(4, 10000.0).double()), torch.randn(2, 100, 8, dtype=torch.double)
    valid = torch.arange(100) < torch.tensor([[100], [45]])
    for mask in (Mask(causal=True), Mask(causal=True, valid=valid)):
        with_gradients = mixed(mixer, x, mask)
        monkeypatch.setattr("headway.mixers.RUN", 33)
        with torch.no_grad():
            torch.testing.assert_close(mixed(mixer, x, mask), with_gradients, atol=1e-6, rtol=1e-6)


def test_a_stack_of_all_kinds_decodes_as_it_prefills() -> None:
    blocks = [BlockSpec(mixer={"name": "linear", "kind": kind, "heads": 2}) for kind in KINDS]
    blocks.append(BlockSpec(mixer={"name": "attention", "heads": 2}))
    stack = Stack(StackSpec(blocks=blocks, positions=PositionSpec(name="rotary")), 16).double().eval()
    x, pos = torch.randn(2, 80, 16, dtype=torch.double), torch.arange(80).expand(2, -1)
    with torch.no_grad():
        whole = stack(x, mask=Mask(causal=True), pos=pos)
        states = stack.init_state(2, 80)
        parts = [
            stack(x[:, part], mask=Mask(causal=True), pos=pos[:, part], state=states)
            for part in (slice(0, 70), *(slice(t, t + 1) for t in range(70, 80)))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=1e-6)


# --- What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 3}, "width 8 is no multiple of 3 heads; set head_dim"),
        ({"kind": "delta", "bidirectional": True}, "delta forgets with time and has no bidirectional form: use kind="),
        ({"kind": "dleta"}, "dleta"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mixers.build({"name": "linear", **options}, 8, Positions())


def test_what_a_kind_cannot_do_is_refused() -> None:
    x = torch.randn(1, 4, 8, dtype=torch.double)
    with pytest.raises(ValueError, match="Linear cannot do bidirectional"):
        mixed(made("gated"), x, Mask())
    with pytest.raises(ValueError, match="Linear cannot do segments"):
        mixed(made("plain"), x, Mask(causal=True, segments=torch.zeros(1, 4, dtype=torch.long)))
    with pytest.raises(ValueError, match="Linear cannot do causal"):
        mixed(made("plain", bidirectional=True), x, Mask(causal=True))
    with pytest.raises(ValueError, match="needs tokens yet to come, so it cannot stream"):
        made("plain", bidirectional=True).init_state(1, 4)


def test_a_stream_of_the_wrong_kind_is_refused() -> None:
    x, mixer = torch.randn(1, 4, 8, dtype=torch.double), made("gated")
    pos, other = torch.arange(4)[None], mixers.build({"name": "attention", "heads": 2}, 8, Positions())
    with pytest.raises(ValueError, match="linear streams with a Recurrent state, not KeyValue"):
        mixer(x, mask=Mask(causal=True), pos=pos, state=other.init_state(1, 4))
    packed = Mask(causal=True, segments=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="cannot stream packed segments"):
        mixer(x, mask=packed, pos=pos, state=mixer.init_state(1, 4))
