"""A spec survives the way to JSON and back, and a mistake in one is a line that says where, what and what instead."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway import mixers, models
from headway.models import seq2seq
from headway.spec import (
    BlockSpec,
    FeedForwardSpec,
    PositionSpec,
    StackSpec,
    convert,
    nearest,
    number,
    override,
)

BLOCK = {
    "mixer": {"name": "attention", "heads": 4, "window": [3, None]},
    "feedforward": {"hidden": 32, "activation": "silu", "gated": True},
    "norm": "rms",
}
MODEL = {
    "kind": "seq2seq",
    "width": 16,
    "source_vocab": 5,
    "target_vocab": 6,
    "encoder": {"blocks": [BLOCK], "repeat": 2, "positions": {"name": "alibi"}},
    "decoder": {"blocks": [BLOCK | {"cross": {"name": "summary"}}]},
}


def refused(data: Any, kind: Any = StackSpec) -> str:
    with pytest.raises(ValueError) as caught:
        convert(data, kind, "model")
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_spec_survives_json() -> None:
    parsed = models.parse(MODEL)
    again = json.loads(json.dumps(msgspec.to_builtins(parsed)))
    assert convert(again, seq2seq.Spec) == parsed
    assert parsed.encoder.blocks[0].feedforward == FeedForwardSpec(hidden=32, activation="silu", gated=True)


@given(
    st.builds(
        StackSpec,
        blocks=st.lists(
            st.builds(
                BlockSpec,
                mixer=st.none() | st.builds(lambda n: {"name": "conv", "kernel": n}, st.integers(1, 9)),
                feedforward=st.none() | st.builds(FeedForwardSpec),
                wiring=st.sampled_from(["pre", "post", "sandwich", "parallel"]),
            ),
            min_size=1,
            max_size=3,
        ).map(tuple),
        repeat=st.integers(1, 5),
        positions=st.builds(PositionSpec),
        final_norm=st.booleans(),
    )
)
def test_any_stack_survives_json(spec: StackSpec) -> None:
    assert convert(json.loads(json.dumps(msgspec.to_builtins(spec))), StackSpec) == spec


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        PositionSpec().name = "none"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"blocks": [], "repeats": 2}, "unknown key 'repeats'; did you mean 'repeat'?"),
        ({"blocks": [{"mixr": None}]}, "unknown key 'blocks[0].mixr'; did you mean 'mixer'?"),
        ({"blocks": [{}, {"feedforward": {"hiden": 3}}]}, "unknown key 'blocks[1].feedforward.hiden'; did you mean 'h"),
        ({"blocks": [], "positions": {"zzz": 1}}, "unknown key 'positions.zzz'; there is base, both, buckets"),
    ],
)
def test_a_misspelt_key_is_refused_with_its_place_and_the_nearest(data: dict, words: str) -> None:
    message = refused(data)
    assert message.startswith(f"model: {words}"), message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"blocks": [], "repeat": "two"}, "model: Expected `int`, got `str` at `repeat`"),
        ({"blocks": [{"norm": "batch"}]}, "model: Invalid enum value 'batch' at `blocks[0].norm`"),
        ({}, "model: Object missing required field `blocks`"),
        ([], "model: Expected `object`, got `array`"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(data: Any, words: str) -> None:
    assert refused(data) == words


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"name": "atention"}, "no mixer 'atention'; did you mean 'attention'?"),
        ({"name": "attention", "head": 4}, "mixer attention: unknown key 'head'; did you mean 'heads'?"),
        ({"name": "attention"}, "mixer attention: Object missing required field `heads`"),
        ({"name": "attention", "heads": 4, "window": 3}, "mixer attention: Expected `array | null`, got `int` at `w"),
        ({"name": "rnn", "cell": "elman"}, "mixer rnn: Invalid enum value 'elman' at `cell`"),
        ({"heads": 4}, f"a mixer is {{'name': one of {', '.join(mixers.names())}, option: value}}, not "),
    ],
)
def test_a_wrong_mixer_is_refused(named: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        mixers.options(named)
    assert str(caught.value).startswith(words), str(caught.value)


def test_an_unknown_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no model 'seq2sec'; did you mean 'seq2seq'"):
        models.build(MODEL | {"kind": "seq2sec"})


def test_an_override_sets_one_key_and_leaves_the_rest() -> None:
    changed = override(MODEL, "encoder.blocks.0.mixer.heads=2")
    assert changed["encoder"]["blocks"][0]["mixer"] == {"name": "attention", "heads": 2, "window": [3, None]}
    assert MODEL["encoder"]["blocks"][0]["mixer"]["heads"] == 4  # type: ignore[index]
    assert changed["decoder"] == MODEL["decoder"] and changed["width"] == 16


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("a=1e-3", 0.001),
        ("a=-2.5E+4", -25000.0),
        ("a=1", 1),
        ("a=[1e-3, {b: 2e2}]", [0.001, {"b": 200.0}]),
        ("a=true", True),
        ("a=word", "word"),
        ("a=null", None),
        ("a=x=y", "x=y"),
    ],
)
def test_an_override_reads_its_value_as_people_mean_it(assignment: str, value: Any) -> None:
    assert override({"a": 5}, assignment) == {"a": value}


def test_an_override_makes_the_way_to_a_new_key() -> None:
    assert override({"a": None}, "a.b.c=1") == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("encoder.blocks.1.norm=rms", "'1' is no place in a list of 1"),
        ("encoder.blocks.first=3", "'first' is no place in a list of 1"),
        ("width.size=3", "'size' is looked for inside 16"),
        ("width", "expected key=value"),
        ("=3", "expected key=value"),
        ("width=[1", "not valid YAML"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(assignment: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        override(MODEL, assignment)
    message = str(caught.value)
    assert message.startswith(f"--set {assignment}: ") and words in message and "\n" not in message


def test_only_what_is_wholly_a_number_becomes_one() -> None:
    assert [number(text) for text in ("1e-3", "1.e5", "e5", "1e", "v1e3", "1e-3x")] == [
        *(0.001, 1e5),
        *("e5", "1e", "v1e3", "1e-3x"),
    ]


def test_nearest_lists_what_there_is_where_nothing_is_near() -> None:
    assert nearest("qqqq", ["two", "one"]) == "; there is one, two"
