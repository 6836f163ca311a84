"""What a trial promises: it learns what its mixer can, repeats, tests at other lengths, and tells what that cost."""

import msgspec
import pytest
import torch

from headway import mixers
from headway.compare import tasks, trial
from headway.compare.trial import Outcome, Trial
from headway.positions import Positions
from headway.recipe import OptimizerSpec

ATTENTION = {"name": "attention", "heads": 1}
SHORT = {"task": {"name": "motif"}, "mixers": ({"name": "conv", "kernel": 5},), "length": 24, "width": 16, "depth": 1}
FAST = OptimizerSpec(warmup=5, lr=1e-2, matrix_lr=0.05, weight_decay=0.0)


def short(**changed: object) -> Trial:
    return Trial(**{**SHORT, "steps": 60, "rows": 32, "test_rows": 128, "optimizer": FAST, **changed})


def test_a_convolution_finds_a_pattern_and_what_mixes_nothing_does_not() -> None:
    found = trial.run(short(steps=150)).accuracy[24]
    blind = trial.run(short(steps=150, mixers=({"name": "identity"},))).accuracy[24]
    assert found > 0.9 > 0.6 > blind


def test_the_same_trial_gives_the_same_accuracy() -> None:
    one, again, other = trial.run(short()), trial.run(short()), trial.run(short(seed=1))
    assert (one.accuracy, one.loss, one.curve) == (again.accuracy, again.loss, again.curve)
    assert one.loss != other.loss


def test_a_trial_survives_json() -> None:
    one = short(tested=(48,), examples=64)
    assert msgspec.json.decode(msgspec.json.encode(one), type=Trial) == one
    outcome = trial.run(one)
    assert msgspec.json.decode(msgspec.json.encode(outcome), type=Outcome) == outcome


def test_what_was_learned_is_tested_at_other_lengths_too() -> None:
    outcome = trial.run(short(tested=(48, 12)))
    assert sorted(outcome.accuracy) == [12, 24, 48] and all(count == 128 for count in outcome.asked.values())


def test_few_examples_are_learned_by_heart() -> None:
    """Held-out accuracy falls far behind; else `examples` would not bound what is seen."""
    many, few = trial.run(short(steps=100, width=32)), trial.run(short(steps=100, width=32, examples=16))
    assert few.accuracy[24] < many.accuracy[24] - 0.2


def test_training_ends_where_it_knows_enough() -> None:
    outcome = trial.run(short(steps=400, every=10, enough=0.6))
    assert outcome.steps < 400 and outcome.curve[-1][0] == outcome.steps
    assert outcome.curve[-1][1] >= 0.6 > max(accuracy for _, accuracy, _ in outcome.curve[:-1])


def test_a_blend_takes_its_mixers_in_turn() -> None:
    net = trial.build(short(mixers=({"name": "conv"}, {"name": "rnn"}), depth=4), tasks.build({"name": "mqar"}))
    assert [type(block.mixer.inner).__name__ for block in net.stack.blocks] == ["Conv", "Rnn", "Conv", "Rnn"]


def test_what_a_mixer_cannot_do_is_refused_in_one_line() -> None:
    linformer = {"name": "linformer", "heads": 1, "length": 64, "rank": 8}
    with pytest.raises(ValueError, match="linformer cannot do causal"):
        trial.run(short(task={"name": "mqar"}, mixers=(linformer,), length=64))


def test_a_window_remembers_a_bounded_number_of_tokens_and_full_attention_all() -> None:
    task = tasks.build({"name": "mqar"})
    bytes_at = lambda mixer, length: trial.state_bytes(trial.build(short(mixers=(mixer,), width=32), task), length)
    window = {**ATTENTION, "window": (7, 0)}
    assert bytes_at(ATTENTION, 128) == 2 * bytes_at(ATTENTION, 64)
    assert bytes_at(window, 128) == bytes_at(window, 64)


def test_state_is_the_sum_of_what_the_layers_say() -> None:
    net = trial.build(short(mixers=({"name": "rnn"},), depth=3), tasks.build({"name": "counting"}))
    one = mixers.build({"name": "rnn"}, 16, Positions()).cost(24).state_bytes
    assert trial.state_bytes(net, 24) == 3 * one


def test_what_cannot_stream_has_no_state() -> None:
    assert trial.run(short(mixers=({"name": "fourier"},), steps=4)).state_bytes is None


def test_longer_rows_keep_more_for_the_way_back() -> None:
    task = tasks.build({"name": "counting"})
    net = trial.build(short(mixers=(ATTENTION,)), task)
    import numpy as np

    kept = [trial.kept_bytes(net, task.batch(np.random.default_rng(0), 1, length)) for length in (32, 64)]
    assert 1.9 < kept[1] / kept[0] < 4.1


def test_a_trial_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trial.run(short(steps=2))
    assert torch.equal(torch.rand(1), expected)


def test_the_error_of_an_accuracy_shrinks_with_the_questions() -> None:
    outcome = trial.run(short(steps=4))
    asked = lambda n: msgspec.structs.replace(outcome, accuracy={24: 0.5}, asked={24: n})
    assert asked(100).error(24) == pytest.approx(0.05) and asked(400).error(24) == pytest.approx(0.025)
