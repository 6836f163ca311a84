"""Tokenizers: what is one token, that decoding gives the text back, and that text can never forge a special."""

import json
from pathlib import Path

import pytest

from headway.text import BOS, EOS, PAD, UNK, Tokenizer, TokenizerSpec

TEXTS = ["the cat sat", "a naïve cat", "tab\there\r\nnew line"]
KINDS = [TokenizerSpec("characters"), TokenizerSpec("whitespace"), TokenizerSpec("bpe", vocab=300)]


@pytest.fixture(params=KINDS, ids=lambda spec: spec.kind)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train(request.param, TEXTS)


def test_the_first_four_ids_are_the_specials_and_every_id_is_in_range(tokenizer: Tokenizer) -> None:
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)
    assert tokenizer.tokens([PAD, BOS, EOS, UNK]) == ["<pad>", "<bos>", "<eos>", "<unk>"]
    ids = [i for text in TEXTS for i in tokenizer.encode(text)]
    assert min(ids) == 4 or tokenizer.vocab > 256  # the collected vocabularies leave no hole after the specials
    assert min(ids) >= 4 and max(ids) < tokenizer.vocab


def test_decoding_drops_specials_and_stops_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat sat")
    assert tokenizer.decode(ids) == "the cat sat"
    assert tokenizer.decode([BOS, *ids, UNK, PAD, EOS, *ids]) == "the cat sat"
    assert tokenizer.decode([]) == tokenizer.decode([EOS, *ids]) == ""


@pytest.mark.parametrize("special", ["<pad>", "<bos>", "<eos>", "<unk>"])
def test_text_cannot_forge_a_special(tokenizer: Tokenizer, special: str) -> None:
    forged = Tokenizer.train(TokenizerSpec("whitespace"), [f"{special} cat"])
    assert forged.encode(f"{special} cat") == [UNK, 4]
    assert not {PAD, BOS, EOS} & set(tokenizer.encode(f"the {special} cat {special}"))


def test_a_saved_tokenizer_is_the_same_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    for text in [*TEXTS, "<eos> unseen Ω"]:
        assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode("a cat")) == "a cat"
    assert loaded.vocab == tokenizer.vocab


def test_the_order_of_the_texts_does_not_matter(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> None:
    again = Tokenizer.train(request.node.callspec.params["tokenizer"], reversed(TEXTS))
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize(
    "text", ["a b", " lead and trail ", "<pad>x<eos>", "tab\there\r\nnew\n\nline\x0b", "e\u0301 日本 👍🏽"]
)
def test_characters_and_bytes_are_lossless(text: str) -> None:
    characters = Tokenizer.train(TokenizerSpec("characters"), [text])
    assert len(characters.encode(text)) == len(text)
    assert characters.vocab == 4 + len(set(text))
    assert characters.tokens(characters.encode(text)) == list(text)
    assert characters.decode(characters.encode(text)) == text
    bpe = Tokenizer.train(TokenizerSpec("bpe", vocab=270), TEXTS)  # has not seen the text, yet nothing is unknown
    assert bpe.decode(bpe.encode(text)) == text
    assert UNK not in bpe.encode(text)


def test_whitespace_tokens_are_the_words() -> None:
    tokenizer = Tokenizer.train(TokenizerSpec("whitespace"), ["HH EH D  W\tEY"])
    ids = tokenizer.encode("HH EH XX D")
    assert tokenizer.tokens(ids) == ["HH", "EH", "<unk>", "D"]
    assert tokenizer.decode(ids) == "HH EH D"
    assert tokenizer.vocab == 4 + 5


def test_bpe_grows_to_the_vocabulary_asked_for_and_shortens_text() -> None:
    texts = [f"number{i} cat{i % 7} sat" for i in range(300)]
    small, large = (Tokenizer.train(TokenizerSpec("bpe", vocab=n), texts) for n in (260, 400))
    assert (small.vocab, large.vocab) == (260, 400)
    assert len(small.encode("number12")) == 8 > len(large.encode("number12"))


@pytest.mark.parametrize(
    ("spec", "texts", "message"),
    [
        (TokenizerSpec("bpe", vocab=259), TEXTS, "vocab=259 is too small for bpe.*at least 260"),
        (TokenizerSpec("letters"), TEXTS, "'letters' is unknown: use 'characters', 'whitespace' or 'bpe'"),
        (TokenizerSpec("characters"), [], "cannot train a characters tokenizer"),
        (TokenizerSpec("whitespace"), [" \n"], "cannot train a whitespace tokenizer"),
    ],
)
def test_what_cannot_be_trained_is_refused(spec: TokenizerSpec, texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        Tokenizer.train(spec, texts)


@pytest.mark.parametrize("wrong", [-100, 7])
def test_an_id_outside_the_vocabulary_is_refused(wrong: int) -> None:
    tokenizer = Tokenizer.train(TokenizerSpec(), ["abc"])
    assert tokenizer.vocab == 7
    for read in (tokenizer.decode, tokenizer.tokens):
        with pytest.raises(ValueError, match=rf"id {wrong} is outside this tokenizer's 7 ids \(0 to 6\)"):
            read([4, wrong])


def test_only_our_own_files_load(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Core
    from tokenizers import models

    path = tmp_path / "t.json"
    with pytest.raises(ValueError, match=r"t\.json: no such tokenizer file"):
        Tokenizer.load(path)
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"t\.json: not a tokenizer file"):
        Tokenizer.load(path)
    Core(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(path))
    with pytest.raises(ValueError, match=r"its first ids are \['a', 'b', None, None\].*not saved by headway"):
        Tokenizer.load(path)


def test_a_vocabulary_size_is_refused_where_none_is_taken() -> None:
    with pytest.raises(ValueError, match="vocab is for bpe only"):
        TokenizerSpec("whitespace", vocab=300)


def test_a_file_from_elsewhere_can_neither_cut_nor_stretch_a_text(tmp_path: Path) -> None:
    tokenizer, path = Tokenizer.train(TokenizerSpec(), ["abc"]), tmp_path / "tokenizer.json"
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    cut = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    path.write_text(json.dumps(tokenizer.record() | {"padding": padding, "truncation": cut}), "utf-8")
    assert Tokenizer.load(path).encode("abc") == tokenizer.encode("abc")
    record = tokenizer.record()
    record["model"]["vocab"]["a"] = 400
    path.write_text(json.dumps(record), "utf-8")
    with pytest.raises(ValueError, match="an id lies beyond its 7 tokens"):
        Tokenizer.load(path)
