"""What the laboratory measures, against cases whose answer is known."""

import math

import numpy as np
import pytest
import torch

from headway.compare import claims
from headway.compare.claims import (
    FAILS,
    HOLDS,
    OPEN,
    PARTLY,
    How,
    alignment,
    content,
    cross_depends,
    layer_cost,
    locality,
    long_convolution,
    order,
    parallelism,
    path_length,
    square_root,
)
from headway.compare.claims._layers import (
    ATTENTION,
    CONV,
    GRU,
    LSTM,
    caller,
    dependence,
    drawn,
    formed,
    kept_bytes,
    layer,
    stack,
)
from headway.compare.growth import fit

MINE = [
    alignment, content, cross_depends, layer_cost, locality, long_convolution, order, parallelism, path_length,
    square_root,
]  # fmt: skip


def test_every_claim_says_what_is_said_how_it_is_measured_and_by_what_rule() -> None:
    found = claims.names()
    assert [claims.find(name).SECTION for name in found] == sorted(claims.find(name).SECTION for name in found)
    for name in found:
        claim = claims.find(name)
        assert claim.SECTION in "ABCDEFG" and callable(claim.measure)
        for text in (claim.TITLE, claim.SAID, claim.METHOD, claim.RULE):
            assert text and "\n" not in text, name


def test_a_stack_of_kernels_of_3_reaches_exactly_depth_tokens_to_each_side() -> None:
    for depth in (1, 2, 5):
        net = stack([CONV] * depth, 8).double()
        found = dependence(caller(net, False), drawn(1, 15, 8).double())
        apart = (torch.arange(15)[:, None] - torch.arange(15)).abs()
        assert torch.equal(found != 0, apart <= depth)


def test_doubling_kernels_reach_two_to_the_depth_less_one() -> None:
    distances = [1, 2, 4, 8]
    assert path_length.fewest(None, distances, 0) == [math.ceil(math.log2(d + 1)) for d in distances]
    assert path_length.fewest(CONV, distances, 0) == distances
    assert path_length.fewest(ATTENTION, distances, 0) == [1, 1, 1, 1]
    assert path_length.fewest({"name": "identity"}, distances, 0) == [None] * 4


@pytest.mark.parametrize("named", [ATTENTION, LSTM, CONV])
def test_a_causal_layers_jacobian_is_zero_above_the_diagonal(named: dict[str, object]) -> None:
    found = dependence(caller(layer(named, 8), True), drawn(1, 9, 8))
    assert bool((found.triu(1) == 0).all()) and bool((found.diagonal() > 0).all())


def test_dependence_is_the_jacobian_that_autograd_gives() -> None:
    call, x = caller(layer(LSTM, 4).double(), True), drawn(1, 5, 4).double()
    whole = torch.autograd.functional.jacobian(call, x)[0, :, :, 0]  # type: ignore[no-untyped-call]
    torch.testing.assert_close(dependence(call, x), whole.square().sum((1, 3)).sqrt())


def test_a_recurrent_chain_grows_with_length_and_one_of_attention_does_not() -> None:
    chains = {n: float(parallelism.chain(caller(layer(GRU, parallelism.WIDTH), True), n)) for n in (4, 10)}
    found = fit(chains)
    assert found is not None and found.exponent > 0.8
    attention = [parallelism.chain(caller(layer(ATTENTION, parallelism.WIDTH), False), n) for n in (4, 16)]
    assert attention[0] == attention[1]


def test_each_operation_that_waits_for_another_is_a_link() -> None:
    steps = lambda x: x.sin().cos().exp()
    assert parallelism.chain(lambda x: steps(steps(x)), 4) - parallelism.chain(steps, 4) >= 3


def test_a_cost_of_known_exponent_is_fitted_right() -> None:
    for named, exponent in ((ATTENTION, 2.0), (CONV, 1.0), (LSTM, 1.0)):
        found = fit({n: float(layer_cost.flops(named, n, 16)) for n in (2**14, 2**16, 2**18)})
        assert found is not None and found.exponent == pytest.approx(exponent, abs=0.02)


def test_a_formed_map_is_kept_and_a_fused_kernel_keeps_none() -> None:
    net, length = layer(ATTENTION, 16), 512
    kept = []
    for whole in (True, False):
        with formed(whole), torch.enable_grad():
            kept.append(kept_bytes(caller(net, False), drawn(1, length, 16), net))
    assert kept[0] > length * length * 4 > 4 * kept[1]


def test_counted_parameters_are_those_of_the_formulas() -> None:
    for n, width in ((8, 16), (32, 16)):
        said = long_convolution.formulas(n, width)
        for title, named in long_convolution.kinds(n).items():
            assert sum(p.numel() for p in layer(named, width).parameters()) == said[title], title


def test_pairs_are_shared_out_between_before_and_behind() -> None:
    assert long_convolution.share_seen(torch.ones(4, 4).tril()) == (1.0, 0.0)
    assert long_convolution.share_seen(torch.eye(4)) == (0.4, 0.0)
    assert long_convolution.share_seen(torch.ones(4, 4)) == (1.0, 1.0)


def test_maps_that_are_equal_have_not_changed_and_those_apart_have_wholly() -> None:
    one, other = torch.eye(4), torch.eye(4).flip(0)
    assert content.changed(one, 3 * one) == 0 and content.changed(one, other) == 1
    assert content.changed(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])) == pytest.approx(0.5)


def test_what_treats_tokens_alike_is_blind_to_order_and_what_sums_in_order_is_not() -> None:
    assert max(order.errors(lambda x: x + x.mean(1, keepdim=True), 3, 0)) < 1e-12
    assert min(order.errors(lambda x: x.cumsum(1), 3, 0)) > 0.1


def test_the_spread_of_undivided_scores_is_the_root_of_the_width() -> None:
    for width in (16, 256):
        spread, entropy, gradient = square_root.softmax_figures(width, 1.0, 0)
        divided, even, slope = square_root.softmax_figures(width, width**-0.5, 0)
        assert spread == pytest.approx(width**0.5, rel=0.1) and divided == pytest.approx(1, rel=0.1)
        assert entropy < even <= 1 and gradient < 1 and slope > 0


def test_words_are_aligned_with_their_letters_and_the_diagonal_is_where_it_says() -> None:
    sounds = alphabet = [np.array([i % 5] * (1 + i % 3)) for i in range(alignment.LETTERS)]
    letters, said, comes = alignment.words(sounds, np.random.default_rng(0), 6)
    for word, spoken, source in zip(letters.tolist(), said.tolist(), comes.tolist(), strict=True):
        for at, sound in zip(source, spoken, strict=True):
            assert (at == -1 and sound == alignment.SOUNDS + 1) or sound in alphabet[word[at]]
        assert [a for a in source if a >= 0] == sorted(a for a in source if a >= 0)
    there = torch.ones(1, 20, dtype=torch.bool)
    assert alignment.diagonal(there)[0].tolist() == [i // 2 for i in range(20)]


@pytest.mark.parametrize("claim", [cross_depends, order, long_convolution])
def test_quick_claims_find_what_is_known(claim: object) -> None:
    shares: list[float] = []
    found = claim.measure(How(tell=lambda what, share: shares.append(share)))  # type: ignore[attr-defined]
    assert found.verdict == HOLDS, found.because
    assert shares == sorted(shares) or not shares
    for table in found.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_verdicts_are_of_the_four_there_are() -> None:
    assert len({HOLDS, PARTLY, FAILS, OPEN}) == 4
    assert all(hasattr(claim, "SECONDS") for claim in MINE)
