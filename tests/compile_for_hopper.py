"""Compiles the Triton kernels for an H100 on a machine without a GPU: run by test_triton.py in its own process."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headway.kernels import _flash_triton as flash

KERNELS = (flash.forward_kernel, flash.queries_kernel, flash.keys_kernel)
VARIANTS = ({"FORTH": True}, {"PLACED": True, "FORTH": True, "BACK": True, "PACKED": True, "HOLES": True})


def compiled(kernel, rows: int, columns: int, warps: int, stages: int, **flags: bool) -> str:
    """The PTX of a kernel for bfloat16 heads of 64."""
    off = dict.fromkeys(("BACK", "FORTH", "PLACED", "PACKED", "HOLES"), False)
    tiles = {"D": 64, "WIDTH": 64, "PRECISION": "ieee", "GRAIN": flash.GRAIN, "ROWS": rows, "COLS": columns}
    constants = {**off, **tiles, **flags}
    signature = {name: "constexpr" if name in constants else kind(name) for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, name in enumerate(signature) if signature[name] not in ("constexpr", "fp32")}
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, at, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def kind(name: str) -> str:
    if name.endswith("_base"):
        return "*bf16"
    if name in ("logsum", "delta"):
        return "*fp32"
    if name in ("q_places", "k_places", "q_segments", "k_segments", "edges"):
        return "*i32"
    return "fp32" if name == "scale" else "i32"


for kernel in KERNELS:
    for flags in VARIANTS:
        ptx = compiled(kernel, *flash.TILES[kernel][-1], **flags)
        print(kernel.__name__, *flags, "wgmma" if "wgmma.mma_async" in ptx else "no tensor cores")
