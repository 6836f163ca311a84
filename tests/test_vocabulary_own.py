"""Claims about tokenizers trained on the spot that are read as published ones: the same ids, with marks around them."""

from __future__ import annotations

import pytest

from headway.text import BOS, EOS, TokenizerSpec
from headway.text import Tokenizer as Own
from headway.vocabulary import PublishedTokenizer
from headway.vocabulary.own import dressed

TEXTS = ["one two three", "a <eos> in the text", "two lines\nof text"]


@pytest.fixture(params=["characters", "whitespace", "bpe"])
def own(request: pytest.FixtureRequest) -> Own:
    return Own.train(TokenizerSpec(kind=request.param), TEXTS, ["<mask>"])


def test_ids_are_the_same_between_the_marks(own: Own) -> None:
    found = dressed(own)
    for text in [*TEXTS, "unseen words, <mask> and <bos>"]:
        assert found.encode(text).ids == [BOS, *own.encode(text), EOS]
    assert found.vocab == own.vocab and (found.bos, found.eos, found.mask) == (BOS, EOS, own.special("<mask>"))


def test_a_pair_ends_twice_and_its_second_part_is_of_another_type(own: Own) -> None:
    one, two = own.encode("one two"), own.encode("three")
    found = dressed(own).encode("one two", "three")
    assert found.ids == [BOS, *one, EOS, *two, EOS]
    assert found.types == [0] * (len(one) + 2) + [1] * (len(two) + 1)


def test_what_learned_from_lower_case_lowers_and_keeps_places(own: Own) -> None:
    found = dressed(own, lowercase=True)
    assert found.encode("One TWO").ids == found.encode("one two").ids == [BOS, *own.encode("one two"), EOS]
    assert found.encode("One TWO").offsets == found.encode("one two").offsets


def test_it_outlives_its_record(own: Own) -> None:
    found = dressed(own, lowercase=True)
    again = PublishedTokenizer.from_record(found.record())
    assert all(again.encode(text, "TWO").ids == found.encode(text, "TWO").ids for text in TEXTS)
