"""Small tokenizers of each published family, trained on the spot: the files of a folder, and transformers' own."""

import base64
import json
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
REAL = [line for line in (ROOT / "docs" / "architecture.md").read_text("utf-8").splitlines() if line.strip()][:120]
HARD = [
    "",
    " ",
    "a",
    "  two  spaces ",
    "tab\tand\nlines\r\n\n",
    "naïve café e\u0301 — “quoted” … it's we'll I'd",
    "日本語 テスト 中文",
    "👍🏽 Ω 한국어 עברית",
    "1234 56,7 3.14",
    "\uff21\uff35ll\u3000\uff57ide \ufb01ne \u2460\xa0x",
    "\u200b zero \ufeff width",
    "<a> [b] {c} x_y",
    "Hello, world! isn't it?",
    "UPPER lower MiXeD",
    "\x00 control \x1b",
]
TEXTS = REAL + HARD
# a real one, by sentencepiece 0.2.3 from four rules: full-width A, the ligature fi, the no-break space, a circled 1
_CHARSMAP = (
    "c-j@yWssIt7zW^XK7n7-G9WCiq$AzA0!m9L-QArc!r~%GH%RURl1q1Y*V5fx0uo9X*LP;FdG0xL&aZRsAVClWAAc0=9u*2=5(eQl"
    "czm>+I0!;=T+vVvWj~SZ=-^m6arg>JNkVdxk&+ao;uBJ{^;IbN)J#J<(vqGCGLnJJ+=>qcS<Nhb&SzvN8#&2AZgTM~A{2aK=HW~7"
    "k(UDGrw|1xLSc$gloAxD6eTG`X(B00IliI-<@tuMsYFGpP?>5}<y)##lN!{f7T@z7b*V#r>d}w}G^P<vX+m?F(UKOlrWI{zLwnlM"
    "kq&gG6J6;-ce>G&9`vRced$Ag`Z0hX7|4$d;wPfQkIv5wVJOiI;}?EqI3pRsXht!XF^p#%6PdtdCNY&M{Khn9Fr8V<WDc{5C5Cy-"
    "<#*<@kOeGe5ldOZGU8ala#pdDHLPYGYuUhhHnEW{Y-U^dU$TSk>|!T-*v&rna)A9D;vh#j%rTB~g5#Vdp3|J-EN3{+IWBU6%Ut3r"
    "SGdkKZgPX$;T~|8JKX0U4|%|29`TeX;U4e@FL=&N{^T{U_=`8Z<!|2ej(_;TfBZ`(4T=ofv=9CV-ZYGw"
)
CHARSMAP = zlib.decompress(base64.b85decode(_CHARSMAP))


def package(name: str) -> Path:
    """Where a package with a checkpoint in it lies, without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{name} is not installed")
    return Path(spec.submodule_search_locations[0])


# Each kind: a folder with the files of its family, and transformers' own tokenizer over the same vocabulary
def bert(folder: Path, lower: bool = True) -> Any:
    core = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lower)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=names))
    vocab = core.get_vocab()
    (folder / "vocab.txt").write_text("".join(f"{t}\n" for t in sorted(vocab, key=lambda t: vocab[t])), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower, "model_max_length": 64}))
    return transformers.BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=lower)


def cased(folder: Path) -> Any:
    return bert(folder, lower=False)


def _merged(folder: Path, names: list[str], core: tokenizers.Tokenizer, **options: Any) -> tuple[dict, list]:  # type: ignore[type-arg]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=names, initial_alphabet=alphabet, **options)
    core.train_from_iterator(TEXTS, trainer)
    core.model.save(str(folder))
    record = json.loads(core.to_str())["model"]
    return record["vocab"], [tuple(merge) for merge in record["merges"]]


def gpt2(folder: Path) -> Any:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab, merges = _merged(folder, ["<|endoftext|>"], core)
    return transformers.GPT2Tokenizer(vocab=vocab, merges=merges)


def roberta(folder: Path) -> Any:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab, merges = _merged(folder, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], core)
    mask = transformers.AddedToken("<mask>", lstrip=True, special=True)
    return transformers.RobertaTokenizer(vocab=vocab, merges=merges, mask_token=mask)


def clip(folder: Path) -> Any:
    core = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    theirs = transformers.CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    core.normalizer, core.pre_tokenizer = theirs.backend_tokenizer.normalizer, theirs.backend_tokenizer.pre_tokenizer
    names = ["<|startoftext|>", "<|endoftext|>"]
    vocab, merges = _merged(folder, names, core, end_of_word_suffix="</w>")
    for letter in pre_tokenizers.ByteLevel.alphabet():  # published ones have every byte at a word's end, too
        vocab.setdefault(letter + "</w>", len(vocab))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges)


def proto(pieces: list[tuple[str, float, int]], kind: int, charsmap: bytes = b"", **flags: bool) -> bytes:
    """A SentencePiece model file, written by Google's protobuf through transformers' definition of it."""
    from transformers.utils import sentencepiece_model_pb2_new as messages

    model = messages.ModelProto()
    for text, score, sort in pieces:
        model.pieces.add(piece=text, score=score, type=sort)
    model.trainer_spec.model_type = kind
    model.trainer_spec.byte_fallback = flags.get("bytes", False)
    model.normalizer_spec.precompiled_charsmap = charsmap
    model.normalizer_spec.remove_extra_whitespaces = flags.get("squeeze", True)
    return model.SerializeToString()


def _unigram() -> list[tuple[str, float, int]]:
    core = tokenizers.Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=400, unk_token="<u>", special_tokens=["<u>"]))
    vocab = json.loads(core.to_str())["model"]["vocab"]
    return [(text, round(score, 4), 1) for text, score in vocab if text != "<u>"]


def t5(folder: Path) -> Any:
    pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), *_unigram()]
    (folder / "spiece.model").write_bytes(proto(pieces, 1, CHARSMAP))
    scores = [piece[:2] for piece in read_back(folder / "spiece.model")]
    extra = [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return transformers.T5Tokenizer(vocab=[*scores, *extra], _spm_precompiled_charsmap=CHARSMAP)


def xlm_roberta(folder: Path) -> Any:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *_unigram()]
    (folder / "sentencepiece.bpe.model").write_bytes(proto(pieces, 1))
    scores = [piece[:2] for piece in read_back(folder / "sentencepiece.bpe.model")][3:]
    first = [(text, 0.0) for text in ("<s>", "<pad>", "</s>", "<unk>")]
    mask = transformers.AddedToken("<mask>", lstrip=True, special=True)
    return transformers.XLMRobertaTokenizer(vocab=[*first, *scores, ("<mask>", 0.0)], mask_token=mask)


def read_back(file: Path) -> list[Any]:
    """The pieces as the file keeps them, scores in single precision."""
    from headway.vocabulary import sentencepiece

    return sentencepiece.read(file.read_bytes()).pieces  # type: ignore[return-value]


KINDS: dict[str, Callable[[Path], Any]] = {
    "bert": bert, "cased": cased, "gpt2": gpt2, "roberta": roberta, "clip": clip, "t5": t5, "xlm_roberta": xlm_roberta
}  # fmt: skip
