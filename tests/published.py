"""Published checkpoints for tests: tiny random ones, made by transformers, of any family that Headway reads."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway import families

TINY = [
    (name, i) for name in families.names() for i in range(len(families.family(name).tiny()))
]  # one case an architecture


def label(case: tuple[str, int]) -> str:
    config = families.family(case[0]).tiny()[case[1]]
    return config.get("architectures", [config["model_type"]])[0] + f"-{case[1]}"


@functools.cache
def oracle(case: tuple[str, int]) -> Any:
    """transformers' model of a tiny configuration, its weights enlarged so that a mistake shows."""
    import transformers

    config = dict(families.family(case[0]).tiny()[case[1]])
    kind = config.pop("model_type")
    made = transformers.AutoConfig.for_model(kind, **config)
    made._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, config["architectures"][0])(made).eval()
    if config.get("tie_word_embeddings") is False and hasattr(model, "lm_head"):  # as in the files of T5 v1.1
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue  # a table that is computed
            if parameter.ndim > 1:
                parameter.normal_(std=0.25 if "embed" not in name else 0.6)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


@functools.cache
def saved(case: tuple[str, int]) -> Path:
    """The same in a folder, as transformers writes it."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="headway-tiny-"))
    oracle(case).save_pretrained(folder)
    return folder


def ids_and_padding(vocab: int, rows: int, length: int, side: str) -> tuple[Tensor, Tensor]:
    """Random ids (none of the first few, which are specials) and which of them are no padding."""
    torch.manual_seed(1)
    ids = torch.randint(5, vocab, (rows, length))
    valid = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows if side != "none" else 0):
        missing = (2 * row) % (length - 2)
        if missing and side == "right":
            valid[row, -missing:] = False
        elif missing:
            valid[row, :missing] = False
    return ids, valid


def output(found: Any) -> Tensor:
    """The one tensor that a head of transformers gives; start and end of a span side by side."""
    for name in ("logits", "prediction_logits", "text_embeds", "image_embeds"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    if getattr(found, "start_logits", None) is not None:
        return torch.stack([found.start_logits, found.end_logits], -1)
    return found.pooler_output
