"""Each scheme is its paper's formula, and none of them sees a length or an offset."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.positions import Alibi, Learned, Positions, Rotary, Sinusoidal, build_positions, positions_of
from headway.spec import PositionSpec


def test_positions_count_the_tokens_that_are_there() -> None:
    valid = torch.tensor([[True, True, False], [False, True, True], [True, True, True], [False, False, False]])
    pos = positions_of(valid, 4, 3, valid.device)
    assert pos.tolist() == [[0, 1, -1], [-1, 0, 1], [0, 1, 2], [-1, -1, -1]]
    assert positions_of(None, 2, 3, valid.device).tolist() == [[0, 1, 2]] * 2


@given(st.integers(-20, 20), st.integers(0, 50), st.integers(0, 50))
def test_rotary_scores_depend_only_on_the_distance(shift: int, at: int, other: int) -> None:
    rotary = Rotary(8, 10000.0).double()
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, generator=generator, dtype=torch.double) for _ in range(2))
    score = lambda i, j: (rotary.rotate(q, torch.tensor([[i]])) * rotary.rotate(k, torch.tensor([[j]]))).sum()
    torch.testing.assert_close(score(at + shift, other + shift), score(at, other), atol=1e-5, rtol=1e-5)


def test_rotary_turns_each_pair_by_its_own_angle() -> None:
    base, at = 100.0, 3
    x = torch.randn(1, 1, 1, 6)
    y = Rotary(6, base).rotate(x, torch.tensor([[at]]))[0, 0, 0]
    for i in range(3):
        turned = complex(*x[0, 0, 0, [i, i + 3]].tolist()) * complex(*(f(at * base ** (-2 * i / 6)) for f in CIRCLE))
        assert y[i].item() == pytest.approx(turned.real, abs=1e-5)
        assert y[i + 3].item() == pytest.approx(turned.imag, abs=1e-5)


CIRCLE = (math.cos, math.sin)


def test_sinusoidal_is_the_formula() -> None:
    width, base, at = 8, 10000.0, 5
    y = Sinusoidal(width, base).embed(torch.zeros(1, 1, width), torch.tensor([[at]]))[0, 0]
    angles = [at / base ** (2 * i / width) for i in range(width // 2)]
    expected = [f(angle) for f in (math.sin, math.cos) for angle in angles]
    torch.testing.assert_close(y, torch.tensor(expected))


def test_alibi_is_a_slope_a_head_times_the_distance() -> None:
    bias = Alibi().bias(4, torch.tensor([[3]]), torch.tensor([[0, 3, 5]]))
    slopes = [2 ** (-8 * h / 4) for h in (1, 2, 3, 4)]
    expected = torch.tensor([[-s * d for d in (3, 0, 2)] for s in slopes])
    torch.testing.assert_close(bias, expected[None, :, None])


def test_learned_positions_are_looked_up_by_position_not_by_index() -> None:
    learned = Learned(4, 6)
    y = learned.embed(torch.zeros(1, 2, 4), torch.tensor([[5, 2]]))
    assert torch.equal(y[0], learned.table.weight[[5, 2]])


@pytest.mark.parametrize("pos", [torch.arange(7)[None], torch.tensor([[6]])])
def test_a_text_or_a_stream_past_the_learned_end_is_refused(pos: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"7 tokens, and the learned positions end at 6: .* positions\.length"):
        Learned(4, 6).embed(torch.zeros(1, pos.shape[1], 4), pos)


@pytest.mark.parametrize("name", ["none", "learned", "sinusoidal", "rotary", "alibi"])
def test_an_offset_is_nothing_but_another_position(name: str) -> None:
    scheme = build_positions(PositionSpec(name=name, length=9), 8, 4)  # type: ignore[arg-type]
    x, q, pos = torch.randn(2, 9, 8), torch.randn(2, 3, 9, 4), torch.arange(9).expand(2, -1)
    later = slice(4, None)
    assert torch.equal(scheme.embed(x, pos)[:, later], scheme.embed(x[:, later], pos[:, later]))
    assert torch.equal(scheme.rotate(q, pos)[:, :, later], scheme.rotate(q[:, :, later], pos[:, later]))
    whole, part = scheme.bias(3, pos, pos), scheme.bias(3, pos[:, later], pos)
    assert (whole is None) == (part is None)
    assert whole is None or part is None or torch.equal(whole[:, :, later], part)


def test_each_name_builds_its_scheme() -> None:
    kinds = {"none": Positions, "learned": Learned, "sinusoidal": Sinusoidal, "rotary": Rotary, "alibi": Alibi}
    for name, kind in kinds.items():
        assert type(build_positions(PositionSpec(name=name), 8, 4)) is kind  # type: ignore[arg-type]
    assert type(build_positions(PositionSpec(name="rotary"), 8, None)) is Positions  # nothing there to turn


def test_widths_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="head_dim is 5"):
        build_positions(PositionSpec(name="rotary"), 10, 5)
    with pytest.raises(ValueError, match="width is 7"):
        build_positions(PositionSpec(name="sinusoidal"), 7, None)
