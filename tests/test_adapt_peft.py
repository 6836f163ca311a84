"""PEFT's own adapters give the same outputs here, and ours the same there, over tiny random models of four families."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import oracle, output, saved
from safetensors.torch import load_file, save_file
from torch import Tensor

from headway import adapt as adapting
from headway import load
from headway.adapt import adapt, attach, save

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

BERT, BERT_TOKENS, GPT2, LLAMA, T5 = ("bert", 4), ("bert", 5), ("gpt2", 1), ("llama", 2), ("t5", 0)
GPT2_CLASSES, LLAMA_CLASSES = ("gpt2", 2), ("llama", 4)
Case = tuple[str, int]
TASKS = {BERT: "SEQ_CLS", BERT_TOKENS: "TOKEN_CLS", GPT2: "CAUSAL_LM", LLAMA: "CAUSAL_LM", T5: "SEQ_2_SEQ_LM",
         GPT2_CLASSES: "SEQ_CLS", LLAMA_CLASSES: "SEQ_CLS"}  # fmt: skip
T5_PREFIX = {"token_dim": 48, "num_attention_heads": 4, "num_layers": 2}  # PEFT takes heads to be width / heads wide


def lora(case: Case, **more: Any) -> Any:
    return peft.LoraConfig(**{"task_type": TASKS[case], "r": 4, "fan_in_fan_out": case[0] == "gpt2", **more})


def ia3(case: Case, **more: Any) -> Any:
    return peft.IA3Config(task_type=TASKS[case], fan_in_fan_out=case[0] == "gpt2", **more)


def prefix(case: Case, **more: Any) -> Any:
    return peft.PrefixTuningConfig(
        task_type=TASKS[case], num_virtual_tokens=5, **(T5_PREFIX if case == T5 else {}), **more
    )


def prompt(case: Case, **more: Any) -> Any:
    return peft.PromptTuningConfig(task_type=TASKS[case], num_virtual_tokens=5, **more)


ALL = {GPT2: ["c_attn", "c_proj", "c_fc"], T5: ["q", "k", "v", "o", "wi", "wo"],
       LLAMA: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}  # fmt: skip
CONFIGS: dict[str, Callable[[Case], Any]] = {
    "lora": lora,
    "lora-all-linears": lambda case: lora(case, target_modules=ALL[case], modules_to_save=None),
    "rslora": lambda case: lora(case, use_rslora=True, lora_alpha=6),
    "dora": lambda case: lora(case, use_dora=True),
    "lora-biases": lambda case: lora(case, bias="lora_only"),
    "lora-all-biases": lambda case: lora(case, bias="all"),
    "lora-of-ranks": lambda case: lora(case, rank_pattern={"0.attn.c_attn": 3, "0.self_attn.q_proj": 3},
                                       alpha_pattern={"1.attn.c_attn": 3, "1.self_attn.q_proj": 3}),
    "ia3": ia3,
    "prefix": prefix,
    "prefix-projected": lambda case: prefix(case, prefix_projection=True, encoder_hidden_size=12),
    "prompt": prompt,
}  # fmt: skip
ASKED = [
    *[(name, case) for name in ("lora", "dora", "ia3", "prefix") for case in (BERT, GPT2, LLAMA, T5)],
    *[("lora-all-linears", case) for case in (GPT2, LLAMA, T5)],
    *[("prompt", case) for case in (BERT_TOKENS, GPT2, LLAMA, T5)],
    *[("lora", case) for case in (GPT2_CLASSES, LLAMA_CLASSES)],
    ("rslora", GPT2), ("rslora", T5), ("lora-biases", BERT), ("lora-biases", GPT2), ("lora-all-biases", BERT),
    ("lora-all-biases", LLAMA), ("lora-of-ranks", GPT2), ("lora-of-ranks", LLAMA), ("prefix-projected", GPT2),
]  # fmt: skip


def theirs(case: Case, config: Any) -> Any:
    """PEFT's model with an adapter that was trained at random: heads and biases, too."""
    model = peft.get_peft_model(copy.deepcopy(oracle(case)), config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                small = "ia3_l" in name or "magnitude" in name or name.endswith("bias")
                parameter.add_(torch.randn_like(parameter) * (0.1 if small else 0.2))
    return model


def inputs(case: Case, *, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    ids, valid = torch.randint(5, 90, (3, 8)), torch.ones(3, 8, dtype=torch.bool)
    if padded:
        valid[1, 6:] = False
        ids[~valid] = 0  # by which the classifiers of GPT-2 and Llama know it
    return ids, valid, torch.randint(5, 90, (3, 6))


def by_peft(model: Any, case: Case, *, padded: bool) -> Tensor:
    ids, valid, target = inputs(case, padded=padded)
    more = {"decoder_input_ids": target} if case == T5 else {}
    with torch.no_grad():
        found = output(model(input_ids=ids, attention_mask=valid.long(), **more))
    return found[:, -8:] if found.ndim == 3 and case != T5 else found  # without the virtual tokens


def by_headway(model: Any, case: Case, *, padded: bool) -> Tensor:
    ids, valid, target = inputs(case, padded=padded)
    return model.logits(ids, valid if padded else None, **({"target": target} if case == T5 else {}))


def same(ours: Tensor, other: Tensor, valid: Tensor | None = None) -> bool:
    if valid is not None and ours.ndim == 3:
        ours, other = ours[valid], other[valid]
    return ours.shape == other.shape and float((ours - other).abs().max()) < 1e-5 * max(1.0, float(other.abs().max()))


def paddings(name: str, case: Case) -> list[bool]:
    # with embeddings instead of ids, their heads cannot see which token is the last, and pool padding
    return [False] if (name, case) in (("prompt", GPT2_CLASSES), ("prompt", LLAMA_CLASSES)) else [False, True]


@pytest.mark.parametrize(
    ("name", "case"), ASKED, ids=lambda one: "-".join(map(str, one)) if type(one) is tuple else one
)
def test_an_adapter_of_peft_gives_the_same_here_and_goes_back(name: str, case: Case, tmp_path: Path) -> None:
    other = theirs(case, CONFIGS[name](case))
    other.save_pretrained(tmp_path / "theirs")
    plain = by_headway(load(saved(case), device="cpu"), case, padded=False)
    ours = attach(load(saved(case), device="cpu"), tmp_path / "theirs")
    save(ours, tmp_path / "ours", format="peft")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(oracle(case)), tmp_path / "ours").eval()
    for padded in paddings(name, case):
        expected, found = by_peft(other, case, padded=padded), by_headway(ours, case, padded=padded)
        valid = inputs(case, padded=padded)[1] if case != T5 else None
        assert same(found, expected, valid)
        assert same(found, by_peft(back, case, padded=padded), valid)
        assert padded or not same(found, plain)
    with adapting.bare(ours):
        if not ours.net.adaptation.records["default"].heads:  # new heads stay
            assert torch.equal(by_headway(ours, case, padded=False), plain)


OURS: list[tuple[str, Case, dict[str, Any]]] = [
    *[("lora", case, {"rank": 3}) for case in (BERT, GPT2, LLAMA, T5)],
    ("lora", GPT2, {"rank": 2, "rslora": True, "targets": "blocks.*.mixer.{q,k,v}"}),
    ("lora", GPT2, {"rank": 2, "dora": True, "targets": "blocks.*.mixer.v"}),
    ("lora", LLAMA, {"rank": 2, "dora": True, "targets": ["blocks.*.mixer.kv", "blocks.1.feedforward.*"]}),
    ("lora", BERT, {"rank": 2, "bias": "all", "heads": ("classify",)}),
    *[("ia3", case, {}) for case in (BERT, GPT2, LLAMA, T5)],
    ("ia3", GPT2, {"targets": "blocks.*.mixer.{q,v,o}"}),
    ("prefix", LLAMA, {"length": 4, "hidden": 6}),
    ("prompt", T5, {"length": 4}),
]


@pytest.mark.parametrize(("method", "case", "options"), OURS, ids=str)
def test_an_adapter_of_ours_gives_the_same_in_peft_and_comes_back(
    method: str, case: Case, options: dict[str, Any], tmp_path: Path
) -> None:
    ours = adapt(load(saved(case), device="cpu"), method, **options)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in ours.net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save(ours, tmp_path, format="peft")
    other = peft.PeftModel.from_pretrained(copy.deepcopy(oracle(case)), tmp_path).eval()
    again = attach(load(saved(case), device="cpu"), tmp_path)
    for padded in (False, True):
        found, valid = by_headway(ours, case, padded=padded), inputs(case, padded=padded)[1] if case != T5 else None
        assert same(found, by_peft(other, case, padded=padded), valid)
        assert same(found, by_headway(again, case, padded=padded), valid)


# --- what is refused


def written(folder: Path, case: Case, config: Any) -> dict[str, Tensor]:
    theirs(case, config).save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def refused(folder: Path, case: Case, pattern: str) -> None:
    model = load(saved(case), device="cpu")
    before = list(model.net.state_dict())
    with pytest.raises(ValueError, match=pattern) as error:
        attach(model, folder)
    assert "\n" not in str(error.value) and list(model.net.state_dict()) == before


@pytest.mark.parametrize(
    ("old", "new", "pattern"),
    [
        ("h.2.attn.c_attn.lora_A", "h.7.attn.c_attn.lora_A", r"h\.7\.attn\.c_attn\.lora_A.* for a module that this mo"),
        (
            "h.2.attn.c_attn.lora_A",
            "h.2.attn.c_proj.lora_A",
            r"c_attn lacks lora_A\.weight|c_proj lacks lora_B\.weight",
        ),
        ("h.2.attn.c_attn.lora_A.weight", "wte.weight", r"transformer\.wte\.weight.* fits nothing here"),
    ],
)
def test_keys_that_do_not_fit_are_named(old: str, new: str, pattern: str, tmp_path: Path) -> None:
    tensors = written(tmp_path, GPT2, lora(GPT2))
    moved = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    assert moved.keys() != tensors.keys()
    save_file(moved, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, GPT2, pattern)


@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"lora_bias": True}, "'lora_bias' .* is a field that Headway does not know"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights' is 'pissa', which changes the result"),
        ({"peft_type": "VERA"}, "peft_type is 'VERA'; Headway reads LORA, IA3"),
        ({"r": 5}, r"c_attn has rank 4, and the configuration says 5"),
        ({"alpha_pattern": {".*attn": 4}}, "is no name of a module"),
        ({"use_dora": True}, "c_attn lacks lora_magnitude_vector"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(
    changed: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    written(tmp_path, GPT2, lora(GPT2))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    refused(tmp_path, GPT2, pattern)


def test_an_adapter_of_another_model_or_a_pickle_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "wide", ("gpt2", 5), lora(GPT2, target_modules=["c_fc"]))  # its feed-forward is 48 wide
    refused(tmp_path / "wide", GPT2, r"3 adapters do not fit this model's linears; first: transformer\.h\.0\.mlp\.c_fc")
    written(tmp_path / "long", GPT2, prefix(GPT2))
    refused(tmp_path / "long", LLAMA, r"prompt_embeddings is \(5, 192\), and 5 tokens of this model are \(5, 96\)")
    written(tmp_path / "old", GPT2, lora(GPT2))
    (tmp_path / "old" / "adapter_model.safetensors").rename(tmp_path / "old" / "adapter_model.bin")
    refused(tmp_path / "old", GPT2, "pickle")


@pytest.mark.parametrize(
    ("case", "method", "options", "pattern"),
    [
        (GPT2, "bottleneck", {}, "PEFT's format has lora, ia3, prefix, prompt, not bottleneck"),
        (T5, "prefix", {}, "is of the decoder's attention to itself"),
        (T5, "prefix", {"targets": "decoder", "at": "self"}, "with 2 layers PEFT reads every second one's prefix"),
        (BERT, "prompt", {}, "its heads pool the first token of the prompt"),
    ],
    ids=str,
)
def test_what_the_format_lacks_is_refused(
    case: Case, method: str, options: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    model = adapt(load(saved(case), device="cpu"), method, **options)
    with pytest.raises(ValueError, match=pattern):
        save(model, tmp_path / "new", format="peft")
    assert not (tmp_path / "new").exists()
