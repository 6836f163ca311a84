"""What a stream remembers: all of it, in order, for the right rows, and not a byte more than it says."""

import pytest
import torch
from torch import Tensor

from headway.attend import attend
from headway.mask import Mask
from headway.state import Cross, KeyValue, Recurrent, Ring


def tokens(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that name their row and place, values that are ten times them, and positions."""
    place = torch.arange(length, dtype=torch.float)
    k = (100 * torch.arange(rows, dtype=torch.float)[:, None] + place)[:, None, :, None].expand(-1, 2, -1, 3)
    return k, 10 * k, torch.arange(length).expand(rows, -1)


def fed(state: KeyValue | Ring, rows: int, chunks: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    k, v, pos = tokens(rows, sum(chunks))
    for parts in zip(k.split(chunks, 2), v.split(chunks, 2), pos.split(chunks, 1), strict=True):
        out = state.append(*parts, padded=False)
    return out


@pytest.mark.parametrize("capacity", [0, 1, 3, 7, 50])
@pytest.mark.parametrize("chunks", [(7,), (1,) * 7, (2, 4, 1)])
def test_key_values_come_back_whole_whatever_the_capacity(capacity: int, chunks: tuple[int, ...]) -> None:
    for got, want in zip(fed(KeyValue(capacity), 2, chunks), tokens(2, 7), strict=True):
        assert torch.equal(got, want)


def test_slots_that_are_not_filled_stand_at_minus_one() -> None:
    state = KeyValue(5)
    fed(state, 2, (2,))
    assert state.pos is not None and state.pos.tolist() == [[0, 1, -1, -1, -1]] * 2
    fed_more = KeyValue(2)
    fed(fed_more, 1, (2, 1))
    assert fed_more.pos is not None and fed_more.pos.tolist() == [[0, 1, 2, -1]]


def test_reorder_repeats_and_leaves_out_rows() -> None:
    for state in (KeyValue(4), Ring(4)):
        fed(state, 3, (4,))
        state.reorder(torch.tensor([2, 0, 0, 2]))
        assert state.k is not None and state.v is not None
        assert state.k[:, 0, 0, 0].tolist() == [200, 0, 0, 200]
        assert state.v[:, 0, 0, 0].tolist() == [2000, 0, 0, 2000]
        state.reorder(torch.tensor([1]))
        assert state.k[:, 0, 1, 0].tolist() == [1]


def test_reordering_what_is_still_empty_is_no_error() -> None:
    for state in (KeyValue(4), Ring(4), Cross()):
        state.reorder(torch.tensor([0, 0]))
        assert state.nbytes == 0


def test_a_row_that_was_repeated_goes_its_own_way() -> None:
    state = KeyValue(4)
    fed(state, 1, (2,))
    state.reorder(torch.tensor([0, 0]))
    new = torch.tensor([7.0, 8.0]).view(2, 1, 1, 1).expand(2, 2, 1, 3)
    k, _, _ = state.append(new, new, torch.full((2, 1), 2), padded=False)
    assert k[:, 0, :, 0].tolist() == [[0, 1, 7], [0, 1, 8]]


def test_rewinding_forgets_the_last_tokens_and_only_those() -> None:
    state = KeyValue(2)
    fed(state, 2, (6,))
    state.rewind(4)
    new = torch.full((2, 2, 1, 3), 99.0)
    k, _, pos = state.append(new, new, torch.full((2, 1), 4), padded=False)
    assert k[0, 0, :, 0].tolist() == [0, 1, 2, 3, 99]
    assert pos.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_a_rewound_stream_answers_like_one_that_never_went_further() -> None:
    q, k, v = (torch.randn(1, 2, 6, 3) for _ in range(3))
    pos = torch.arange(6)[None]
    state = KeyValue(6)
    state.append(k[:, :, :5], v[:, :, :5], pos[:, :5], padded=False)
    state.rewind(2)
    ks, vs, k_pos = state.append(k[:, :, 2:4], v[:, :, 2:4], pos[:, 2:4], padded=False)
    y = attend(q[:, :, 2:4], ks, vs, Mask(causal=True), q_pos=pos[:, 2:4], k_pos=k_pos)
    whole = attend(q, k, v, Mask(causal=True))
    torch.testing.assert_close(y, whole[:, :, 2:4])


def test_no_state_rewinds_to_what_it_does_not_remember() -> None:
    short = KeyValue(4)
    fed(short, 1, (2,))
    for state, words in ((short, "only 2"), (Ring(2), "ring"), (Recurrent(torch.zeros(1, 2)), "recurrent")):
        with pytest.raises(ValueError, match=words):
            state.rewind(3)


@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (2, 4, 3)])
@pytest.mark.parametrize(("window", "sinks"), [(3, 0), (3, 2), (0, 1), (20, 2), (8, 2)])
def test_a_ring_keeps_its_window_and_its_sinks(window: int, sinks: int, chunks: tuple[int, ...]) -> None:
    ring = Ring(window, sinks)
    fed(ring, 2, chunks)
    kept = sorted({*range(min(sinks, 9)), *range(max(9 - window, 0), 9)})
    assert ring.pos is not None and ring.k is not None
    assert ring.pos.tolist() == [kept] * 2
    assert ring.k[1, 0, :, 0].tolist() == [100 + place for place in kept]


def test_a_ring_finds_the_sinks_behind_padding() -> None:
    ring = Ring(2, sinks=2)
    k, v, _ = tokens(2, 8)
    pos = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [-1, -1, -1, 0, 1, 2, 3, 4]])
    for t in range(8):
        ring.append(k[:, :, t : t + 1], v[:, :, t : t + 1], pos[:, t : t + 1], padded=t < 3)
    assert ring.pos is not None and ring.pos.tolist() == [[0, 1, 6, 7], [0, 1, 3, 4]]
    assert ring.k is not None and ring.k[1, 0, :, 0].tolist() == [103, 104, 106, 107]


def test_a_ring_does_not_grow_with_the_stream() -> None:
    ring = Ring(3, sinks=1)
    fed(ring, 2, (1,) * 10)
    early = ring.nbytes
    fed(ring, 2, (1,) * 50)
    assert ring.nbytes == early == 4 * (2 * 2 * 2 * 3 * 4 + 2 * 8)


def test_bytes_are_those_of_the_tensors() -> None:
    state = KeyValue(4)
    fed(state, 2, (3,))
    assert state.nbytes == 2 * (2 * 2 * 4 * 3 * 4) + 2 * 4 * 8
    assert Recurrent(torch.zeros(2, 3), torch.zeros(5, dtype=torch.double)).nbytes == 24 + 40


def test_a_recurrent_state_reorders_all_that_it_holds() -> None:
    state = Recurrent(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]))
    state.reorder(torch.tensor([1, 1, 0]))
    assert [t[:, 0].tolist() for t in state.tensors] == [[2, 2, 1], [4, 4, 3]]
