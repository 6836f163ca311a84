"""The configurations of well-known checkpoints are read as they are published, down to the number of weights."""

from __future__ import annotations

from typing import Any

import pytest
from test_families_vision import KNOWN as PICTURES

from headway import families, models
from headway.loaded import Facts
from headway.transfer import blank

BERT = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "num_attention_heads": 12,
        "num_hidden_layers": 12, "transformers_version": "4.6.0.dev0", "use_cache": True}  # fmt: skip
ROBERTA = {**BERT, "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-5, "max_position_embeddings": 514,
           "pad_token_id": 1, "type_vocab_size": 1}  # fmt: skip
LLAMA = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
         "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "use_cache": True}  # fmt: skip
KNOWN: dict[str, tuple[dict[str, Any], int]] = {
    "bert-base-multilingual": (
        {**BERT, "architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": 119547, "type_vocab_size": 2,
         "directionality": "bidi", "max_position_embeddings": 512, "pad_token_id": 0, "pooler_fc_size": 768,
         "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
         "pooler_type": "first_token_transform"}, 177_974_523),
    "roberta-base": ({**ROBERTA, "architectures": ["RobertaForMaskedLM"], "model_type": "roberta",
                      "vocab_size": 50265}, 124_697_433),
    "xlm-roberta-base": ({**ROBERTA, "architectures": ["XLMRobertaForMaskedLM"], "model_type": "xlm-roberta",
                          "output_past": True, "position_embedding_type": "absolute", "vocab_size": 250002},
                         278_295_186),
    "distilbert-sst2": (
        {"activation": "gelu", "architectures": ["DistilBertForSequenceClassification"], "attention_dropout": 0.1,
         "dim": 768, "dropout": 0.1, "finetuning_task": "sst-2", "hidden_dim": 3072,
         "id2label": {"0": "NEGATIVE", "1": "POSITIVE"}, "initializer_range": 0.02,
         "label2id": {"NEGATIVE": 0, "POSITIVE": 1}, "max_position_embeddings": 512, "model_type": "distilbert",
         "n_heads": 12, "n_layers": 6, "output_past": True, "pad_token_id": 0, "qa_dropout": 0.1,
         "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 30522},
        66_955_010),
    "gpt2": (
        {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
         "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
         "layer_norm_epsilon": 1e-5, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
         "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
         "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
         "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257},
        124_439_808),
    "smollm2-135m": (
        {**LLAMA, "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 576,
         "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
         "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
         "pad_token_id": 2, "pretraining_tp": 1, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
         "tie_word_embeddings": True, "transformers.js_config": {"dtype": "q4"}, "vocab_size": 49152}, 134_515_008),
    "llama-3.2-1b": (
        {**LLAMA, "architectures": ["LlamaForCausalLM"], "bos_token_id": 128000,
         "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_size": 2048,
         "intermediate_size": 8192, "max_position_embeddings": 131072,
         "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
         "num_key_value_heads": 8, "pretraining_tp": 1, "rope_theta": 500000.0, "tie_word_embeddings": True,
         "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                          "original_max_position_embeddings": 8192}, "vocab_size": 128256}, 1_235_814_400),
    "mistral-7b-v0.1": (
        {**LLAMA, "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096,
         "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 10000.0,
         "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000}, 7_241_732_096),
    "qwen2.5-0.5b": (
        {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645,
         "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
         "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
         "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
         "vocab_size": 151936}, 494_032_768),
    "qwen3-0.6b": (
        {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645,
         "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
         "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
         "num_key_value_heads": 8, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
         "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936}, 596_049_920),
}  # fmt: skip


@pytest.mark.parametrize("name", [*KNOWN, *PICTURES])
def test_a_known_configuration_gives_the_known_number_of_weights(name: str) -> None:
    config, weights = (KNOWN | PICTURES)[name]
    found = families.read(config, name)
    with blank():
        net = models.assemble(found.spec)
    assert sum(p.numel() for p in net.parameters()) == weights
    ruled = {ours for rule in found.rules for ours in rule.ours}
    assert ruled == set(net.state_dict())


def test_facts_are_those_of_the_file() -> None:
    def facts(name: str) -> Facts:
        return families.read(KNOWN[name][0], name).facts

    assert facts("llama-3.2-1b").eos == (128001, 128008, 128009) and facts("llama-3.2-1b").bos == 128000
    assert facts("roberta-base").max_tokens == 512 and facts("roberta-base").pad == 1
    assert facts("gpt2").eos == (50256,) and facts("gpt2").pad is None


def test_windows_and_scalings_are_those_of_the_file() -> None:
    stacks = {name: families.read(config, name).spec["stack"] for name, (config, _) in KNOWN.items()}
    assert stacks["mistral-7b-v0.1"]["blocks"][0]["mixer"]["window"] == (4095, 0)
    assert "window" not in stacks["qwen2.5-0.5b"]["blocks"][0]["mixer"]
    assert stacks["llama-3.2-1b"]["positions"] == {
        "name": "rotary",
        "base": 500000.0,
        "scaling": {"name": "llama3", "factor": 32.0, "low": 1.0, "high": 4.0, "trained": 8192},
    }


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("smollm2-135m", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'type' is 'yarn'; there is default"),
        ("smollm2-135m", {"rope_scaling": {"type": "linear", "factor": 4.0, "beta": 1}}, "'beta' .* may change"),
        ("smollm2-135m", {"rope_interleaved": True}, "'rope_interleaved' is True, which changes the result"),
        ("smollm2-135m", {"sliding_window": 64}, "'sliding_window' is 64, which changes the result"),
        ("qwen3-0.6b", {"layer_types": ["full_attention"]}, "layer_types is no list of 28"),
        ("qwen3-0.6b", {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window is not true"),
        ("qwen2.5-0.5b", {"attention_bias": True}, "'attention_bias' is True, which changes the result"),
        ("mistral-7b-v0.1", {"architectures": ["MixtralForCausalLM"]}, "architecture MixtralForCausalLM is not read"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is True"),
        ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "architecture GPT2DoubleHeadsModel is not read"),
        ("roberta-base", {"pad_token_id": 600}, "pad_token_id is 600 and leaves -87 positions"),
        ("roberta-base", {"is_decoder": True}, "'is_decoder' is True, which changes the result"),
        ("bert-base-multilingual", {"pooler_type": "mean"}, "'pooler_type' is 'mean', which changes the result"),
        ("distilbert-sst2", {"activation": "mish"}, "'activation' is 'mish'; "),
        ("distilbert-sst2", {"id2label": None, "num_labels": 10**12}, "'num_labels' is 1000000000000, and should be"),
    ],
)  # fmt: skip
def test_what_would_change_the_result_is_refused_by_name(name: str, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        families.read({**KNOWN[name][0], **change}, "config.json")


def test_a_family_that_a_file_names_is_one_that_there_is() -> None:
    with pytest.raises(ValueError, match=r"no family 'bret'.* 'bert'"):
        families.family("bret")
