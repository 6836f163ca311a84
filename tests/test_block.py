"""Each wiring is its drawing, written out by hand; stacks mix any blocks; what is missing is said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headway.block import Block, ParallelBlock, Stack, build_block, reorder
from headway.layers import initialise
from headway.mask import Mask
from headway.positions import Positions
from headway.spec import StackSpec, convert
from headway.state import Cross, KeyValue, Recurrent, Ring

WIDTH, LENGTH = 16, 5
ATTENTION = {"name": "attention", "heads": 4}
FULL_BLOCK = {"mixer": ATTENTION, "cross": ATTENTION, "feedforward": {"hidden": 24}}


def stack(*blocks: dict, dropout: float = 0.0, **fields: Any) -> Stack:
    built = Stack(convert({"blocks": list(blocks), **fields}, StackSpec), WIDTH, dropout)
    initialise(built, built.branches)
    for name, parameter in built.named_parameters():  # norms that are not all one, so that their order shows
        if "before" in name or "behind" in name or "after" in name:
            torch.nn.init.normal_(parameter, mean=1.0)
    return built


def scene(rows: int = 2) -> dict[str, Any]:
    return {
        "x": torch.randn(rows, LENGTH, WIDTH),
        "mask": Mask(causal=True),
        "pos": torch.arange(LENGTH).expand(rows, -1),
        "context": torch.randn(rows, 3, WIDTH),
    }


def parts(block: Block, pos: Tensor, context: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """The three inner modules as plain functions of the tokens."""
    assert block.mixer and block.cross and block.feedforward
    mixer, cross, feedforward = block.mixer.inner, block.cross.inner, block.feedforward.inner
    return [
        lambda h: mixer(h, mask=Mask(causal=True), pos=pos),
        lambda h: cross(h, mask=Mask(), pos=pos, context=context),
        feedforward,
    ]


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("wiring", ["pre", "post", "sandwich", "parallel"])
def test_a_wiring_is_its_drawing(wiring: str, norm: str) -> None:
    block = stack(FULL_BLOCK | {"wiring": wiring, "norm": norm}).blocks[0]
    given = scene()
    x = given["x"]
    y, residuals = x, (block.mixer, block.cross, block.feedforward)
    for residual, part in zip(residuals, parts(block, given["pos"], given["context"]), strict=True):
        if wiring == "pre":
            y = y + part(residual.before(y))
        elif wiring == "post":
            y = residual.after(y + part(y))
        elif wiring == "sandwich":
            y = y + residual.behind(part(residual.before(y)))
        else:
            y = y + part(residual.before(x))
    torch.testing.assert_close(block(**given), y)
    assert isinstance(block, ParallelBlock) == (wiring == "parallel")


@pytest.mark.parametrize("absent", ["mixer", "cross", "feedforward"])
def test_an_absent_part_is_left_out(absent: str) -> None:
    spec = convert({"blocks": [FULL_BLOCK | {absent: None}]}, StackSpec).blocks[0]
    block = build_block(spec, WIDTH, Positions(), 0.0)
    assert getattr(block, absent) is None
    given = scene()
    y = given["x"]
    for name in ("mixer", "cross", "feedforward"):
        if name != absent:
            only = Block(
                *(getattr(block, part) if part == name else None for part in ("mixer", "cross", "feedforward"))
            )
            y = only(y, **{key: value for key, value in given.items() if key != "x"})
    torch.testing.assert_close(block(**given), y)


def test_a_stack_is_positions_then_its_blocks_then_a_norm() -> None:
    built, given = stack(FULL_BLOCK, repeat=2, positions={"name": "learned", "length": 8}), scene()
    y = built.positions.embed(given["x"], given["pos"])
    for block in built.blocks:
        y = block(y, **{key: value for key, value in given.items() if key != "x"})
    torch.testing.assert_close(built(**given), built.norm(y))
    assert len(built.blocks) == 2 and built.branches == 6
    assert built.blocks[0].mixer.inner.query.weight is not built.blocks[1].mixer.inner.query.weight


def test_a_learned_table_is_saved_once() -> None:
    names = stack(FULL_BLOCK, FULL_BLOCK, positions={"name": "learned"}).state_dict()
    assert [name for name in names if "table" in name] == ["positions.table.weight"]


def test_a_stack_deeper_than_any_is_refused_before_it_is_built() -> None:
    with pytest.raises(ValueError, match="at most 4096 blocks; this one has 5120"):
        stack(*[{"feedforward": {}}] * 5, repeat=1024)


def test_the_last_norm_can_be_left_out() -> None:
    assert isinstance(stack(FULL_BLOCK, final_norm=False).norm, torch.nn.Identity)
    assert isinstance(stack(FULL_BLOCK | {"norm": "rms"}).norm, torch.nn.RMSNorm)


HYBRID = (
    {"mixer": {"name": "conv", "kernel": 2}, "feedforward": {"hidden": 8}},
    {"mixer": ATTENTION | {"window": [2, 0]}},
    {"mixer": {"name": "rnn", "hidden": 8}, "cross": {"name": "summary"}},
    {"mixer": ATTENTION, "wiring": "parallel", "feedforward": {"hidden": 8, "gated": True}},
)


def test_a_hybrid_streams_as_it_reads_in_parallel_and_its_rows_reorder() -> None:
    built, given = stack(*HYBRID), scene(rows=3)
    states = built.init_state(3, LENGTH)
    assert [type(own) for own, _ in states] == [Recurrent, Ring, Recurrent, KeyValue]
    assert [type(cross) for _, cross in states] == [type(None), type(None), Cross, type(None)]
    rows = torch.tensor([2, 0, 0])
    with torch.no_grad():
        whole = built(**given)
        steps = []
        for t in range(LENGTH):
            if t == 3:
                reorder(states, rows)
                given |= {"x": given["x"][rows], "context": given["context"][rows]}
            here = {**given, "x": given["x"][:, t : t + 1], "pos": given["pos"][:, t : t + 1]}
            steps.append(built(**here, state=states))
    torch.testing.assert_close(torch.cat(steps[:3], 1), whole[:, :3])
    torch.testing.assert_close(torch.cat(steps[3:], 1), whole[rows, 3:])


def test_padding_changes_nothing_in_a_hybrid() -> None:
    built, given = stack(*HYBRID), scene(rows=1)
    alone = built(**given)
    for left in (True, False):
        valid = torch.tensor([[False] * 2 + [True] * LENGTH])
        valid = valid if left else valid.flip(1)
        x = torch.randn(1, LENGTH + 2, WIDTH).masked_scatter(valid[..., None], given["x"])
        pos = torch.where(valid, valid.cumsum(1) - 1, -1)
        y = built(x, mask=Mask(causal=True, valid=valid), pos=pos, context=given["context"])
        torch.testing.assert_close(y[valid], alone[0], atol=1e-5, rtol=1e-5)


def test_dropout_is_on_every_branch_and_on_the_embeddings() -> None:
    built, given = stack(FULL_BLOCK, dropout=0.5), scene()
    assert [module.p for module in built.modules() if type(module).__name__ == "Dropout"] == [0.5] * 4
    assert not torch.equal(built(**given), built(**given))
    built.eval()
    assert torch.equal(built(**given), built(**given))


def test_a_missing_context_is_said() -> None:
    given = scene() | {"context": None}
    with pytest.raises(ValueError, match="has a cross mixer and was given no context"):
        stack(FULL_BLOCK)(**given)


def test_an_empty_stack_is_refused() -> None:
    with pytest.raises(ValueError, match="this one has none"):
        stack()
    with pytest.raises(ValueError, match="`int` >= 1 at `repeat`"):
        stack(FULL_BLOCK, repeat=0)


def test_head_widths_that_no_rotation_fits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"differ: \[4, 8\]"):
        stack({"mixer": ATTENTION}, {"mixer": {"name": "attention", "heads": 2}})
