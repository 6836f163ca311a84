"""The small parts: dropout drops what it says, a feed-forward is its formula, and weights start as the table says."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway import models
from headway.layers import Dropout, FeedForward, activate, initialise, residual_output
from headway.spec import FeedForwardSpec


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    y = Dropout(p)(torch.ones(400, 501))
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.005)
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    assert len(y.unique()) == 2  # all that stay are scaled alike


@pytest.mark.parametrize("p", [1e-4, 0.9999])
def test_dropout_at_the_ends_still_drops_some_and_keeps_some(p: float) -> None:
    y = Dropout(p)(torch.ones(400, 501))
    assert 0 < (y == 0).float().mean() < 1 and y.isfinite().all()
    assert y.mean().item() == pytest.approx(1, abs=0.1)


def test_dropout_is_the_same_under_the_same_seed_and_else_not() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return Dropout(0.5)(torch.ones(7, 13))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_dropout_draws_each_element_on_its_own() -> None:
    dropped = Dropout(0.5)(torch.ones(20000, 8)) == 0
    together = torch.corrcoef(dropped.T.float()) - torch.eye(8)
    assert together.abs().max() < 0.05


def test_dropout_passes_the_gradient_of_what_stayed() -> None:
    x = torch.randn(50, 9, requires_grad=True)
    y = Dropout(0.25)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y != 0) * torch.tensor(1 / 0.75))


def test_dropout_is_nothing_in_eval_and_at_zero() -> None:
    x = torch.randn(3, 4)
    assert Dropout(0.9).eval()(x) is x and Dropout(0.0)(x) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0])
def test_a_share_that_is_none_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=f"not {p}"):
        Dropout(p)


def test_dropout_keeps_the_type() -> None:
    assert Dropout(0.5)(torch.ones(4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_feed_forward_is_its_formula() -> None:
    x, layer = torch.randn(2, 3, 8), FeedForward(8, FeedForwardSpec(hidden=5, activation="relu"))
    by_hand = F.relu(x @ layer.enter.weight.T + layer.enter.bias) @ layer.leave.weight.T + layer.leave.bias
    torch.testing.assert_close(layer(x), by_hand)


def test_a_gated_feed_forward_multiplies_by_its_second_half() -> None:
    x, layer = (
        torch.randn(2, 3, 8),
        FeedForward(8, FeedForwardSpec(hidden=5, activation="silu", gated=True, bias=False)),
    )
    first, second = layer.enter.weight[:5], layer.enter.weight[5:]
    torch.testing.assert_close(layer(x), (F.silu(x @ first.T) * (x @ second.T)) @ layer.leave.weight.T)
    assert layer.enter.bias is None


def test_a_feed_forward_is_four_times_as_wide_where_nothing_is_said() -> None:
    assert FeedForward(8, FeedForwardSpec()).enter.out_features == 32


def test_each_activation_is_what_its_name_says() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0])
    for name, want in {
        "gelu": [-0.0455, 0, 2.9960],
        "relu": [0, 0, 3],
        "relu2": [0, 0, 9],
        "silu": [-0.2384, 0, 2.8577],
        "tanh": [-0.9640, 0, 0.9951],
    }.items():
        torch.testing.assert_close(activate(x, name), torch.tensor(want, dtype=x.dtype), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="no activation 'swish'"):
        activate(x, "swish")


def spread(parameter: Tensor) -> float:
    assert abs(parameter.mean().item()) < 0.02
    return parameter.std().item()


def test_weights_start_as_the_table_says() -> None:
    parts = nn.ModuleDict(
        {
            "linear": nn.Linear(400, 300),
            "residual": residual_output(nn.Linear(400, 300)),
            "embedding": nn.Embedding(300, 200),
            "lstm": nn.LSTM(50, 100),
            "gru": nn.GRU(50, 100),
        }
    )
    for parameter in parts.parameters():
        nn.init.constant_(parameter, 7.0)
    initialise(parts, depth=9)
    linear, residual, embedding, lstm, gru = parts.values()
    assert spread(linear.weight) == pytest.approx(400**-0.5, rel=0.02)
    assert spread(residual.weight) == pytest.approx(400**-0.5 / 3, rel=0.02)
    assert spread(embedding.weight) == pytest.approx(1, rel=0.02)
    for cell in (lstm, gru):
        assert spread(cell.weight_ih_l0) == pytest.approx(0.1, rel=0.02)
        assert spread(cell.weight_hh_l0) == pytest.approx(0.1, rel=0.02)
    assert not any(t.any() for t in (linear.bias, residual.bias, lstm.bias_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0))
    assert lstm.bias_ih_l0.view(4, 100).mean(1).tolist() == [0, 1, 0, 0]  # PyTorch's order: in, forget, cell, out


def test_a_built_model_starts_with_logits_of_about_one_and_finite_gradients() -> None:
    block = {"mixer": {"name": "attention", "heads": 4}, "feedforward": {}}
    decoder = {"blocks": [block | {"cross": {"name": "attention", "heads": 4}}], "repeat": 4}
    spec = {"kind": "seq2seq", "width": 64, "source_vocab": 50, "target_vocab": 50, "decoder": decoder}
    model = models.build(spec | {"encoder": {"blocks": [block], "repeat": 4}})
    logits = model(torch.randint(50, (4, 9)), torch.randint(50, (4, 7)))
    assert logits.std().item() == pytest.approx(1, abs=0.3)
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
