"""Linformer: its equation, whichever way it is computed; layers share what they say; the impossible is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headway import mixers
from headway.block import Stack
from headway.layers import initialise
from headway.mask import Mask
from headway.mixers.linformer import Linformer, from_package
from headway.positions import Alibi, Positions, positions_of
from headway.spec import StackSpec, convert
from headway.store import read_folder, write_folder
from headway.testing import check_mixer

SHARING = ["none", "headwise", "key-value", "layerwise"]
WIDTH = 8


def made(width: int = WIDTH, **options: Any) -> Linformer:
    built = mixers.build({"name": "linformer", "heads": 2, "length": 9, **options}, width, Positions())
    assert isinstance(built, Linformer)
    return built.double()


def tokens(length: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.double, requires_grad=True)


def mixed(mixer: Any, x: Tensor, mask: Mask | None = None, context: Tensor | None = None) -> Tensor:
    return mixer(x, mask=mask or Mask(), pos=positions_of(None, len(x), x.shape[1], x.device), context=context)


def by_hand(mixer: Linformer, x: Tensor, context: Tensor) -> Tensor:
    """The paper's equation 7, head by head: softmax(Q_h (E_h K_h)^T / sqrt(D)) F_h V_h."""
    count, size, rank = mixer.heads, mixer.head_dim, mixer.rank
    matrices = mixer.shorten.weight.view(-1, rank, mixer.length)[..., : context.shape[1]]
    q, k, v = mixer.query(x), mixer.key(context), mixer.value(context)
    read = []
    for h in range(count):
        e, f = (matrices[h], matrices[count + h]) if mixer.sharing == "none" else (matrices[0], matrices[-1])
        own = slice(h * size, (h + 1) * size)
        scores = q[..., own] @ (e @ k[..., own]).mT / size**0.5
        read.append(scores.softmax(-1) @ (f @ v[..., own]))
    return mixer.out(torch.cat(read, -1))


@pytest.mark.parametrize(("rank", "positions"), [(4, "none"), (70, "rotary")])
@pytest.mark.parametrize("sharing", SHARING)
def test_every_sharing_keeps_the_contract(sharing: str, rank: int, positions: str) -> None:
    held = check_mixer("linformer", heads=4, rank=rank, length=64, sharing=sharing, positions=positions)
    assert {"padding_changes_nothing", "context_padding_changes_nothing", "flops_are_as_stated"} <= set(held)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("rank", [3, 8])  # fewer and more than there are tokens, so that both orders are taken
@pytest.mark.parametrize("sharing", SHARING)
def test_linformer_is_its_equation_with_its_gradients(sharing: str, rank: int, across: bool) -> None:
    mixer, x = made(rank=rank, sharing=sharing), tokens(6)
    context = tokens(5) if across else None
    inputs = [x, *mixer.parameters(), *([] if context is None else [context])]
    results = []
    for y in (mixed(mixer, x, context=context), by_hand(mixer, x, x if context is None else context)):
        probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y, *torch.autograd.grad((y * probe).sum(), inputs)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("length", [24, 10])
def test_it_equals_the_linformer_package_with_its_weights(length: int) -> None:
    package = pytest.importorskip("linformer", reason="the peer is not installed: pip install linformer")
    theirs = package.LinformerSelfAttention(32, 24, k=6, heads=4)
    ours = mixers.build({"name": "linformer", "heads": 4, "rank": 6, "length": 24}, 32, Positions())
    ours.load_state_dict(from_package(theirs.state_dict()))
    x, context = torch.randn(3, length, 32), torch.randn(3, 7, 32)
    torch.testing.assert_close(mixed(ours, x), theirs(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed(ours, x, context=context), theirs(x, context), atol=1e-4, rtol=1e-4)


def test_the_cheaper_of_the_two_orders_is_taken() -> None:
    a_head, shared = (made(rank=4, length=64, sharing=sharing) for sharing in ("none", "headwise"))
    assert shared.cost(64).flops < a_head.cost(64).flops  # E first saves most of the projections
    assert shared.cost(3).flops == a_head.cost(3).flops  # with fewer tokens than the rank it would not


def test_cost_grows_with_the_length_and_not_with_its_square() -> None:
    mixer = made(rank=16, length=4096)
    for what in ("flops", "activation_bytes"):
        short, long = (getattr(mixer.cost(length), what) for length in (1024, 4096))
        assert long < 4.01 * short


def test_padding_may_stand_anywhere() -> None:
    mixer, x = made(rank=3), tokens(6, rows=1)
    there = torch.tensor([[False, True, True, False, True, False]])
    torch.testing.assert_close(mixed(mixer, x, Mask(valid=there))[there], mixed(mixer, x[:, there[0]])[0])


# --- Sharing across the layers of a stack


def stack(*blocks: dict[str, Any], **fields: Any) -> Stack:
    built = Stack(convert({"blocks": list(blocks), **fields}, StackSpec), WIDTH)
    initialise(built, built.branches)
    return built


LAYERWISE = {"name": "linformer", "heads": 2, "rank": 3, "length": 9, "sharing": "layerwise"}


def matrices(built: Stack, slot: str = "mixer") -> list[Tensor]:
    return [getattr(block, slot).inner.shorten.weight for block in built.blocks]


def test_layerwise_is_one_matrix_for_all_layers() -> None:
    tied, apart = (stack({"mixer": LAYERWISE | {"sharing": sharing}}, repeat=3) for sharing in SHARING[:1:-1])
    assert len({id(matrix) for matrix in matrices(tied)}) == 1
    assert len({id(matrix) for matrix in matrices(apart)}) == 3
    count = lambda built: sum(parameter.numel() for parameter in built.parameters())
    assert count(apart) - count(tied) == 2 * 3 * 9


def test_every_layer_teaches_the_one_matrix() -> None:
    built, x = stack({"mixer": LAYERWISE}, repeat=2), torch.randn(2, 5, WIDTH)
    layers, probe, pos = [block.mixer.inner for block in built.blocks], torch.randn_like(x), torch.arange(5)[None]

    def taught() -> list[Tensor]:
        loss = (built(x, mask=Mask(), pos=pos.expand(2, -1)) * probe).sum()
        return list(torch.autograd.grad(loss, list({id(m): m for m in matrices(built)}.values())))

    (whole,) = taught()
    layers[1].shorten = copy.deepcopy(layers[0].shorten)
    torch.testing.assert_close(sum(taught()), whole)


def test_layers_of_another_size_or_slot_share_nothing() -> None:
    both = {"mixer": LAYERWISE, "cross": LAYERWISE}
    built = stack(both, {"mixer": LAYERWISE | {"rank": 2}}, {"mixer": {"name": "conv"}}, both)
    first, last = built.blocks[0], built.blocks[3]
    assert first.mixer.inner.shorten is last.mixer.inner.shorten
    assert first.cross.inner.shorten is last.cross.inner.shorten
    assert first.mixer.inner.shorten is not first.cross.inner.shorten
    assert built.blocks[1].mixer.inner.shorten is not first.mixer.inner.shorten


def test_a_shared_matrix_survives_storing(tmp_path: Path) -> None:
    built, other = (stack({"mixer": LAYERWISE, "feedforward": {"hidden": 8}}, repeat=2) for _ in range(2))
    write_folder(tmp_path / "model", {"model": built.state_dict()}, {})
    other.load_state_dict(read_folder(tmp_path / "model")[0]["model"])
    x, pos = torch.randn(2, 5, WIDTH), torch.arange(5).expand(2, -1)
    torch.testing.assert_close(other(x, mask=Mask(), pos=pos), built(x, mask=Mask(), pos=pos), atol=0, rtol=0)
    assert matrices(other)[0] is matrices(other)[1]


# --- In stacks


def test_it_works_in_an_encoder_beside_other_mixers() -> None:
    built = stack(
        {"mixer": {"name": "conv", "kernel": 3}},
        {"mixer": LAYERWISE, "feedforward": {"hidden": 8}},
        {"mixer": {"name": "attention", "heads": 2}},
    )
    x, valid = torch.randn(2, 6, WIDTH), torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    y = built(x, mask=Mask(valid=valid), pos=positions_of(valid, 2, 6, x.device))
    alone = built(x[1:, 2:], mask=Mask(), pos=torch.arange(4)[None])
    torch.testing.assert_close(y[1:, 2:], alone)


def test_over_a_context_it_streams_step_by_step_in_a_decoder() -> None:
    built = stack({"mixer": {"name": "attention", "heads": 2}, "cross": LAYERWISE}, repeat=2)
    x, context, pos = torch.randn(2, 4, WIDTH), torch.randn(2, 7, WIDTH), torch.arange(4).expand(2, -1)
    with torch.no_grad():
        whole = built(x, mask=Mask(causal=True), pos=pos, context=context)
        state, steps = built.init_state(2, 4), []
        for t in range(4):
            step = slice(t, t + 1)
            steps.append(built(x[:, step], mask=Mask(causal=True), pos=pos[:, step], state=state, context=context))
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    assert all(cross.nbytes == 2 * 4 * 2 * 3 * WIDTH for _, cross in state if cross is not None)


# --- What is refused


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Mask(causal=True), "cannot do causal: each of its 3 keys sums over all tokens of a row, those to come"),
        (Mask(window=(1, 1)), "cannot do window: each of its 3 keys sums over all tokens of a row"),
        (Mask(segments=torch.zeros(2, 6, dtype=torch.long)), "cannot do segments: each of its 3 keys sums over all"),
    ],
)
def test_what_would_mix_too_much_is_refused_with_the_reason(mask: Mask, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mixed(made(rank=3), tokens(6), mask)


def test_it_refuses_to_stream_its_own_tokens() -> None:
    mixer = made(rank=3)
    with pytest.raises(ValueError, match=r"linformer cannot stream: .* streams only in a cross slot"):
        mixer.init_state(2, 6)
    x, pos = tokens(1), torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="cannot do stream: each of its 3 keys"):
        mixer(x, mask=Mask(), pos=pos, state=mixer.init_state(2, 6, cross=True))
    with pytest.raises(ValueError, match=r"streams with a Cross state, not KeyValue: use init_state\(..., cross=True"):
        state = mixers.build({"name": "attention", "heads": 2}, WIDTH, Positions()).init_state(2, 6)
        mixer(x, mask=Mask(), pos=pos, state=state, context=tokens(3))


def test_more_tokens_than_its_length_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="linformer: 10 tokens, and its `length` is 9"):
        mixed(made(), tokens(10))
    with pytest.raises(ValueError, match="linformer: 11 tokens, and its `length` is 9"):
        mixed(made(), tokens(2), context=tokens(11))


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="width 8 is no multiple of 3 heads"):
        made(heads=3)
    with pytest.raises(ValueError, match="ALiBi is a penalty a key"):
        mixers.build({"name": "linformer", "heads": 2}, WIDTH, Alibi())
    with pytest.raises(ValueError, match="at `sharing`"):
        made(sharing="blockwise")
