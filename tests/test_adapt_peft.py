"""PEFT's own adapters give the same outputs here, and ours the same there, over tiny random models of four families."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import oracle, output, saved
from torch import Tensor

from headway import adapt as adapting
from headway import load
from headway.adapt import attach, save

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
