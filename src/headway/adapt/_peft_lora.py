"""LoRA between PEFT's format and ours: pairs of A and B, and DoRA's lengths, for linears that are cut otherwise there.

Where several of theirs are one of ours, each part has a pair of its own. Where one of theirs is several of ours, they
share A; pairs whose A differ are written as one of their joint rank, [A1; A2] and [B1 0; 0 B2].
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.adapt import _int8
from headway.adapt._peft_names import Names, Piece, Run

BIAS = {"none": "none", "lora_only": "targets", "all": "all"}  # whose biases train, in their words and ours
HARMLESS_STARTS = (True, "gaussian", "orthogonal", "eva")  # others change the weights that LoRA stands on, too
ENDINGS = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "length"}


class Pair(NamedTuple):
    """What PEFT holds of one linear: A is `Float[R K]`, B is `Float[N R]`, DoRA's length `Float[N]` or None."""

    down: Tensor
    up: Tensor
    length: Tensor | None = None


def pairs_of(held: Mapping[str, Mapping[str, Tensor]], dora: bool, where: str) -> dict[str, Pair]:
    """The pairs by module; each has to be whole."""
    wanted = {"down", "up"} | ({"length"} if dora else set())
    for name, parts in held.items():
        if parts.keys() != wanted:
            odd = sorted(parts.keys() ^ wanted)[0]
            what = next(ending for ending, part in ENDINGS.items() if part == odd)
            raise ValueError(f"{where}: {name} {'lacks' if odd in wanted else 'has a needless'} {what}")
    return {name: Pair(**{part: tensor.float() for part, tensor in parts.items()}) for name, parts in held.items()}


def in_common(
    pairs: Mapping[str, Pair], config: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Pair]]:
    """Options that hold for all, and the pairs under them: a lower rank gets zeros, and another scale goes into B."""
    rslora = bool(config.get("use_rslora"))
    ranks = {name: len(pair.down) for name, pair in pairs.items()}
    for name, rank in ranks.items():
        if (told := _of_pattern(config.get("rank_pattern", {}), name, config.get("r", 8), where)) != rank:
            raise ValueError(f"{where}: {name} has rank {rank}, and the configuration says {told}")
    alphas = {
        n: float(_of_pattern(config.get("alpha_pattern", {}), n, config.get("lora_alpha", 8), where)) for n in pairs
    }
    rank = max(ranks.values())
    alpha = next(alphas[name] for name in pairs if ranks[name] == rank)
    made = {}
    for name, pair in pairs.items():
        factor, spare = _scale(ranks[name], alphas[name], rslora) / _scale(rank, alpha, rslora), rank - ranks[name]
        up = pair.up if factor == 1 else pair.up * factor
        made[name] = Pair(F.pad(pair.down, (0, 0, 0, spare)), F.pad(up, (0, spare)), pair.length)
    options = {"rank": rank, "alpha": alpha, "rslora": rslora, "dora": bool(config.get("use_dora")),
               "dropout": float(config.get("lora_dropout", 0.0)), "bias": BIAS[config.get("bias", "none")]}  # fmt: skip
    return options, made


def _scale(rank: int, alpha: float, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def _of_pattern(patterns: Mapping[str, Any], name: str, default: Any, where: str) -> Any:
    """What a pattern says of a module. PEFT reads regular expressions; here they are names, whole or from the end."""
    for pattern, value in patterns.items():
        plain = pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")
        if not re.fullmatch(r"[\w.-]+", plain):
            raise ValueError(f"{where}: the pattern {pattern!r:.60} is no name of a module: write the names out")
        if name == plain or (name.endswith(f".{plain}") and not pattern.startswith("^")):
            return value
    return default


def fits(pair: Pair, pieces: Sequence[Piece], names: Names) -> bool:
    """Whether a pair is of the shape of the linear it is for."""
    rows, inputs = sum(piece.end - piece.begin for piece in pieces), names.modules[pieces[0].ours].in_features
    lengths = pair.length is None or pair.length.numel() == rows
    return pair.down.shape[1:] == (inputs,) and pair.up.shape == (rows, len(pair.down)) and lengths


def fill(adapter: Any, pair: Pair, piece: Piece) -> None:
    """Gives an adapter its part of what PEFT holds."""
    adapter.down.copy_(pair.down)
    adapter.up.copy_(pair.up[piece.rows])
    if pair.length is not None:
        adapter.length.copy_(pair.length.flatten()[piece.rows])


def joined(runs: Sequence[Run], pieces: list[Piece], names: Names) -> Pair:
    """What PEFT holds of a linear of theirs, whose `pieces` those of `runs` are, or some of them."""
    downs: list[Tensor] = []
    which = []
    for run in runs:
        own = run.adapter.down.detach().cpu()
        which.append(next((i for i, other in enumerate(downs) if torch.equal(other, own)), len(downs)))
        downs += [own] if which[-1] == len(downs) else []
    rank = len(downs[0])
    up = torch.zeros(sum(piece.end - piece.begin for piece in pieces), rank * len(downs))
    length = None
    if runs[0].adapter.length is not None:  # of rows that nothing changes: their own
        length = names.rows_of(pieces, lambda module: _int8.weight_of(module).detach().float().norm(dim=1)).cpu()
    for run, i in zip(runs, which, strict=True):
        up[run.piece.rows, i * rank : (i + 1) * rank] = run.adapter.up.detach().cpu()[run.rows]
        if length is not None:
            length[run.piece.rows] = run.adapter.length.detach().cpu()[run.rows]
    return Pair(torch.cat(downs), up, length)


def configuration(pairs: Mapping[str, Pair], options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of adapter_config.json; what was joined keeps its scale by an alpha of its own."""
    rank, alpha, rslora = options["rank"], options["alpha"], options["rslora"]
    other = {name: len(pair.down) for name, pair in pairs.items() if len(pair.down) != rank}
    grown = {name: alpha * (math.sqrt(r / rank) if rslora else r / rank) for name, r in other.items()}
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": options["dropout"],
            "use_rslora": rslora, "use_dora": options["dora"], "rank_pattern": other, "alpha_pattern": grown,
            "bias": next(theirs for theirs, ours in BIAS.items() if ours == options["bias"]),
            "init_lora_weights": True}  # fmt: skip
