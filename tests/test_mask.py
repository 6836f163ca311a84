"""A mask means what a loop over every pair of tokens says, alone and combined."""

import pytest
import torch
from drawn import scenes
from hypothesis import given
from torch import Tensor

from headway.mask import Mask


def by_hand(mask: Mask, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """The meaning of every field, one pair of tokens at a time."""
    allowed = torch.zeros(*q_pos.shape, k_pos.shape[1], dtype=torch.bool)
    for b, i, j in torch.cartesian_prod(*map(torch.arange, allowed.shape)).view(-1, 3).tolist():
        q, k = int(q_pos[b, i]), int(k_pos[b, j])
        allowed[b, i, j] = (
            k != -1
            and (mask.valid is None or bool(mask.valid[b, j]))
            and (not mask.causal or k <= q or k < prefix_of(mask, b))
            and (mask.window is None or is_near(mask, b, q, k))
            and (mask.segments is None or same_segment(mask, b, i, j))
        )
    return allowed


def prefix_of(mask: Mask, row: int) -> int:
    return int(mask.prefix[row]) if isinstance(mask.prefix, Tensor) else mask.prefix


def is_near(mask: Mask, row: int, q: int, k: int) -> bool:
    assert mask.window is not None
    left, right = mask.window
    inside = (left is None or q - k <= left) and (right is None or k - q <= right)
    marked = set() if mask.globals is None else set(mask.globals[row].nonzero()[:, 0].tolist())
    return inside or k < mask.sinks or q in marked or k in marked


def same_segment(mask: Mask, row: int, i: int, j: int) -> bool:
    assert mask.segments is not None
    keys = mask.segments if mask.key_segments is None else mask.key_segments
    return bool(mask.segments[row, i] == keys[row, j])


def full(mask: Mask, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """`allows`, spread over the queries that it does not tell apart."""
    return mask.allows(q_pos, k_pos).expand(-1, q_pos.shape[1], -1)


@given(scenes())
def test_allows_is_what_every_pair_by_hand_gives(scene: tuple[list[Mask], Tensor, Tensor]) -> None:
    (mask,), q_pos, k_pos = scene
    assert torch.equal(full(mask, q_pos, k_pos), by_hand(mask, q_pos, k_pos))


@given(scenes(count=2))
def test_and_allows_exactly_what_both_allow(scene: tuple[list[Mask], Tensor, Tensor]) -> None:
    (a, b), q_pos, k_pos = scene
    assert torch.equal(full(a & b, q_pos, k_pos), by_hand(a, q_pos, k_pos) & by_hand(b, q_pos, k_pos))


@given(scenes(count=4))
def test_and_stays_exact_however_it_is_nested(scene: tuple[list[Mask], Tensor, Tensor]) -> None:
    (a, b, c, d), q_pos, k_pos = scene
    every = torch.stack([by_hand(mask, q_pos, k_pos) for mask in (a, b, c, d)]).all(0)
    assert torch.equal(full((a & b) & (c & d), q_pos, k_pos), every)
    assert torch.equal(full(a & (b & (c & d)), q_pos, k_pos), every)


@given(scenes(count=2))
def test_a_combined_mask_states_the_facts_of_both(scene: tuple[list[Mask], Tensor, Tensor]) -> None:
    (a, b), _, _ = scene
    merged, stated = (a & b).facts, a.facts | b.facts
    vague = {"bidirectional", "prefix", "sinks", "globals"}  # a stricter mask may undo what relaxes
    assert stated - vague <= merged <= stated
    assert ("bidirectional" in merged) == ("causal" not in merged)


def test_padding_is_merged_even_where_windows_are_not() -> None:
    there = torch.tensor([[True, False]])
    merged = Mask(window=(1, 0)) & Mask(window=(2, 0), sinks=1, valid=there)
    assert merged.valid is there and all(other.valid is None for other in merged.also)


def test_plain_windows_merge_into_the_narrower_one() -> None:
    merged = Mask(window=(4, None)) & Mask(window=(2, 3)) & Mask(causal=True)
    assert (merged.window, merged.causal, merged.also) == ((2, 3), True, ())


def test_a_mask_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Mask().causal = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prefix": 3}, "add causal=True"),
        ({"prefix": torch.tensor([3])}, "add causal=True"),
        ({"sinks": 1}, "add window="),
        ({"globals": torch.ones(1, 2, dtype=torch.bool)}, "add window="),
        ({"window": (-1, 0)}, "not (-1, 0)"),
        ({"key_segments": torch.zeros(1, 2, dtype=torch.long)}, "segments="),
    ],
)
def test_a_mask_that_means_nothing_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Mask(**fields)  # type: ignore[arg-type]
    assert words in str(caught.value) and "\n" not in str(caught.value)
