"""How long one linear takes, weights rotated out of the cache: `python bench/linears.py [ROUNDS]`.

Microseconds by shape, way and rows. Headway's ways are those of `headway.quantize`; the others are what PyTorch offers.
One run passes over copies of the weights, as a decoding step does over layers: weights come from memory, code does not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import interleave, save, spread
from torch import Tensor, nn

from headway.quantize import prepare
from headway.rounding import round_weight

SHAPES = {
    "GPT-2 124M": [(768, 2304), (768, 768), (768, 3072), (3072, 768), (768, 50257)],
    "SmolLM2-135M": [(576, 576), (576, 384), (576, 3072), (1536, 576), (576, 49152)],
    "MiniLM": [(384, 384), (384, 768), (384, 1536), (1536, 384)],
}
ROWS = (1, 8, 64, 256, 2048)
APART = 2**26  # bytes of all copies of one weight: twice this machine's last cache


def prepared(weight: Tensor, quantize: str | None, dtype: torch.dtype, mix: int = 16) -> Callable[[Tensor], Tensor]:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone())
    net = nn.Sequential(linear)
    prepare(net, quantize, dtype, mix)
    return net[0]


def plain(weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weight = weight.to(dtype)
    return lambda x: F.linear(x, weight)


def transposed(weight: Tensor) -> Callable[[Tensor], Tensor]:
    weight = weight.T.contiguous()
    return lambda x: torch.mm(x, weight)


def unpacked_int8(weight: Tensor) -> Callable[[Tensor], Tensor]:
    rounded, scales = round_weight(weight, 1)

    def run(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return torch._int_mm((x / scale).round_().to(torch.int8), rounded.T) * scale * scales

    return run


def weights_only(weight: Tensor) -> Callable[[Tensor], Tensor]:
    rounded, scales = round_weight(weight, 1)
    scales = scales.bfloat16()
    return lambda x: torch._weight_int8pack_mm(x, rounded, scales)


WAYS: dict[str, tuple[torch.dtype, int, Callable[[Tensor], Callable[[Tensor], Tensor]]]] = {
    "fp32 F.linear": (torch.float32, 4, lambda w: plain(w, torch.float32)),
    "fp32 transposed": (torch.float32, 4, transposed),
    "fp32 headway": (torch.float32, 4, lambda w: prepared(w, None, torch.float32)),
    "bf16 F.linear": (torch.bfloat16, 2, lambda w: plain(w, torch.bfloat16)),
    "bf16 headway": (torch.bfloat16, 2, lambda w: prepared(w, None, torch.bfloat16)),
    "int8 headway": (torch.float32, 1, lambda w: prepared(w, "int8", torch.float32)),
    "int8 headway, mix=1": (torch.float32, 1, lambda w: prepared(w, "int8", torch.float32, 1)),
    "int8 _int_mm": (torch.float32, 1, unpacked_int8),
    "int8 weights only": (torch.bfloat16, 1, weights_only),
}


Ways = dict[str, list[Callable[[Tensor], Tensor]]]


def copies(inputs: int, outputs: int) -> Ways:
    """Each way as often as it takes to fill `APART` bytes."""
    made: Ways = {}
    for name, (_, size, make) in WAYS.items():
        count = 1 + APART // (inputs * outputs * size)
        made[name] = [make(torch.randn(outputs, inputs) * inputs**-0.5) for _ in range(count)]
    return made


def sides(ways: Ways, rows: int, inputs: int) -> dict[str, Callable[[], None]]:
    """A pass over all copies of each way; over three where the products, not the weights, take the time."""

    def side(name: str) -> Callable[[], None]:
        x = torch.randn(rows, inputs).to(WAYS[name][0])

        def run() -> None:
            for linear in ways[name][: length(ways, name, rows)]:
                linear(x)

        return run

    return {name: side(name) for name in ways}


def length(ways: Ways, name: str, rows: int) -> int:
    return len(ways[name]) if rows < 64 else min(3, len(ways[name]))


def main(rounds: int) -> None:
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    with torch.inference_mode():
        for model, inputs, outputs in ((m, *shape) for m, shapes in SHAPES.items() for shape in shapes):
            ways = copies(inputs, outputs)
            of_shape = results[f"{model} {inputs}->{outputs}"] = {name: {} for name in ways}
            for rows in ROWS if outputs < 10_000 else (1, 8):
                turns = max(3, rounds // (1 + rows // 64))
                for name, values in interleave(sides(ways, rows, inputs), turns).items():
                    of_shape[name][str(rows)] = {
                        k: round(1e6 * v / length(ways, name, rows), 1) for k, v in spread(values).items()
                    }
    save("linears", {"unit": "microseconds by shape, way and rows", "results": results})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
