"""Fast linears for inference on a CPU: weights laid out once for oneDNN, or in int8 with a scale a channel and a token.

They replace nn.Linear inside a loaded network; there is never a second model. The int8 one is
y = s_x s_w (round(x H / s_x) round(W H / s_w)^T), with s_x a row's and s_w a channel's largest magnitude over 127.
H mixes each 16 neighbouring channels (a Hadamard matrix, its own inverse): so outlier channels are spread before they
are rounded, as in QuaRot (2404.00456), with nothing to calibrate. Per-token scales: LLM.int8 (2208.07339).
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn

from headway.joint import Joint, Part, linear_of
from headway.layers import FeedForward
from headway.rounding import MIX, TINY, WORTH, Rounded, blockwise, hadamard

CHUNK = 256  # rows quantized at a time, so that what lies between two operations stays in the cache


def prepare(net: nn.Module, quantize: str | None = None, dtype: torch.dtype = torch.float32, mix: int = MIX) -> None:
    """Makes the linears of `net` fast for inference on this CPU, in place; each original is released as it goes.

    quantize: None, or "int8" for weights and activations in 8 bits. dtype: float32 or bfloat16, of all parameters and
    of what flows between the linears (buffers keep theirs). mix: how many channels a Hadamard matrix mixes before they
    are rounded; 1 saves its time (5-15% of a long batch) and costs accuracy. Linears of under 65,536 weights stay. An
    embedding whose table is also a linear's weight keeps working: it shares the memory in float32, has an int8 table
    beside the packed one in int8, and its own copy in bfloat16 (where a packed head is twice as fast).
    ValueError, before anything changes, where the machine lacks the engine or the network does not fit.
    """
    _check(net, quantize, dtype, mix)
    _give_back()
    trained = {name for name, parameter in net.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    net.trained = trained  # type: ignore[assignment]  # for `restore`: a base that adapters stand on is frozen
    net.requires_grad_(False).eval()
    _join(net, dtype, mix)
    if quantize:
        for module in net.modules():
            if isinstance(module, FeedForward):
                module.at_once = CHUNK
    linears = _worth(net)
    places, fast = _places(net), dict[nn.Module, nn.Module]()
    tables: dict[int, list[nn.Embedding]] = {}  # by their weight, which a linear may share
    for module in net.modules():
        if type(module) is nn.Embedding:
            tables.setdefault(id(module.weight), []).append(module)
    for name, parameter in net.named_parameters():
        if ".adapters." in name:
            continue  # they stay in fp32
        if quantize is None or not any(parameter is linear.weight for linear in linears):
            parameter.data = parameter.data.to(dtype)
    while linears:
        linear = linears.pop()
        tied = tables.get(id(linear.weight), [])
        if quantize == "int8":
            rounded = Rounded.of(linear.weight, dtype, mix)
            fast[linear] = Int8Linear(rounded.data, rounded.scales, linear.bias, dtype, mix)
            fast |= {table: Int8Embedding(rounded.data, rounded.scales, dtype, mix) for table in tied}
            del rounded
        elif torch.backends.mkldnn.is_available():
            fast[linear] = PackedLinear(linear.weight, linear.bias, tied[0] if tied else None)
        _replace(places, fast)
        fast.clear()
        del linear, tied
        if quantize:  # packed weights are as large as those they replace, and come to lie where those lay
            _give_back()
    _give_back()


def roundings(net: nn.Module, dtype: torch.dtype, mix: int = MIX) -> dict[str, Rounded]:
    """What the weights that `prepare` makes int8 can be read into, by name, so that they never stand in full precision.

    For a network whose parameters are on the meta device; empty where this machine or dtype has no int8, of which
    `prepare` then tells.
    """
    if dtype not in (torch.float32, torch.bfloat16) or _lacks(True, dtype):
        return {}
    worth = set(_worth(net))
    names = {linear.weight: name for name, linear in net.named_modules() if linear in worth}
    return {f"{name}.weight": Rounded.blank(weight.shape, dtype, mix) for weight, name in names.items()}


def mix_for(kind: str) -> int:
    """How many channels to mix in a kind of model: where many tokens go together, spreading outliers costs time, and
    vectors need it less than likelihoods do."""
    return 1 if kind in ("encoder", "vision", "dual") else MIX


def packs(dtype: torch.dtype) -> bool:
    """Whether `prepare` can lay out weights of this dtype on this machine without rounding them."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def restore(net: nn.Module) -> None:
    """Undoes `prepare` in place, to the bit, as far as the dtype held it; a ValueError for int8, which forgets."""
    held = [module for module in net.modules() if isinstance(module, Prepared)]
    if any(not isinstance(module, PackedLinear) for module in held):
        raise ValueError("int8 weights are rounded and cannot be restored: load the model again, without quantize")
    _replace(_places(net), {module: module.unpacked() for module in held if isinstance(module, PackedLinear)})
    _replace(_places(net), {module: module.apart() for module in net.modules() if isinstance(module, Part)})
    for name, parameter in net.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in net.trained)  # type: ignore[operator]


def _worth(net: nn.Module) -> list[nn.Linear]:
    return [m for m in net.modules() if type(m) is nn.Linear and m.weight.numel() >= WORTH]


def is_prepared(net: nn.Module) -> bool:
    """Whether `prepare` has changed it."""
    return any(isinstance(module, Prepared | Part) for module in net.modules())


def _join(net: nn.Module, dtype: torch.dtype, mix: int) -> None:
    """Queries, keys and values of the same tokens become one product. Keys and values of a context stay apart."""
    for name, module in list(net.named_modules()):
        parts = [getattr(module, part, None) for part in ("query", "key_value")]
        if ".cross." in f".{name}." or not all(type(part) is nn.Linear for part in parts):
            continue
        one, two = parts
        assert isinstance(one, nn.Linear) and isinstance(two, nn.Linear)
        if one.in_features != two.in_features or (one.bias is None) != (two.bias is None):
            continue
        weight: nn.Parameter
        if isinstance(one.weight, Rounded) or isinstance(two.weight, Rounded):
            weight = Rounded.beside(*(Rounded.of(linear.weight, dtype, mix) for linear in (one, two)))
        else:
            weight = nn.Parameter(torch.cat([one.weight, two.weight]), requires_grad=False)
        bias = None if one.bias is None else nn.Parameter(torch.cat([one.bias, two.bias]), requires_grad=False)
        joint = Joint(linear_of(weight, bias), 2)
        module.query = Part(joint, 0, one.out_features)
        module.key_value = Part(joint, one.out_features, len(weight))


def nbytes(net: nn.Module) -> int:
    """Bytes that the weights of `net` take, prepared or not; what is shared counts once, buffers count too."""
    held: dict[int, int] = {}
    for module in net.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, Prepared):
            held[id(module)] = module.packed_bytes
            tensors += module.tensors()
        held |= {t.data_ptr() or id(t): t.nbytes for t in tensors}
    return sum(held.values())


class Prepared(nn.Module):
    """What stands in for a linear or embedding. Packed for this machine only, so never saved or copied."""

    packed_bytes = 0  # held in a layout that is no tensor

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = torch.empty(0, dtype=dtype)  # all that mixers ask of a weight: its dtype and device

    def tensors(self) -> list[Tensor]:
        """The plain tensors it holds."""
        return [value for value in vars(self).values() if isinstance(value, Tensor) and not value.is_mkldnn]

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__}: prepared weights are packed for this machine and cannot be saved, loaded or"
            " copied; use the network as it was before headway.quantize.prepare"
        )

    _save_to_state_dict = _load_from_state_dict = __getstate__ = refuse

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.weight.dtype}"


class PackedLinear(Prepared):
    """x W^T + b with W in the layout of oneDNN. weight: (outputs, inputs), float32 or bfloat16; bias: (outputs).

    table: the embedding whose weight it is. In float32 the weight then stays as it is, for both, until `spread`.
    A row's result is the same bits in any batch (of two rows or more, where the weight stays).
    """

    def __init__(
        self, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None, table: nn.Embedding | None = None
    ) -> None:
        super().__init__(weight.shape[1], weight.shape[0], weight.dtype)
        weight, share = weight.detach(), table is not None and weight.dtype == torch.float32
        self.bias = None if bias is None else bias.detach()
        self.layout = weight if share else torch.ops.mkldnn._reorder_linear_weight(weight)
        self.of_many = self.layout  # for more rows than one
        self.packed_bytes = 0 if share else weight.nbytes
        self.product = torch.ops.mkldnn._linear_pointwise.default._op
        self.table = (table,)  # in a tuple, it is nobody's child

    def spread(self) -> None:
        """Packs a copy of a weight that an embedding shares: a third less time for 4 to 16 rows, its bytes more."""
        if not self.of_many.is_mkldnn:
            self.of_many = torch.ops.mkldnn._reorder_linear_weight(self.layout)
            self.packed_bytes = self.layout.nbytes

    def unpacked(self) -> nn.Linear:
        """The linear that it was; tied again where it was tied."""
        bias = None if self.bias is None else nn.Parameter(self.bias)
        if self.table[0] is not None:
            return linear_of(self.table[0].weight, bias)
        plain = self.layout.to_dense() if self.layout.is_mkldnn else self.layout
        return linear_of(nn.Parameter(plain.clone() if plain.is_inference() else plain), bias)

    def forward(self, x: Float[Tensor, "*S K"]) -> Float[Tensor, "*S N"]:
        if x.requires_grad or x.dtype != self.weight.dtype:
            raise ValueError(_unfit(x, self.weight.dtype))
        layout = self.layout if x.numel() == self.in_features else self.of_many
        return self.product(x, layout, self.bias, "none", [], "")


class Int8Linear(Prepared):
    """x W^T + b in 8 bits. rounded, scales: what `round_weight(W, mix)` gives; bias: (outputs); dtype: the network's.

    Input in any floating type, answered in the same. A row's result does not depend on the others: exactly so among
    batches of two rows or more; alone, a value on the edge between two roundings may fall to the other side (in one row
    of a thousand, by 0.05% of the largest output).
    """

    def __init__(
        self,
        rounded: Int8[Tensor, "N K"],
        scales: Float[Tensor, " N"],
        bias: Float[Tensor, " N"] | None,
        dtype: torch.dtype = torch.float32,
        mix: int = MIX,
    ) -> None:
        outputs, inputs = rounded.shape
        super().__init__(inputs, outputs, dtype)
        self.bias = None if bias is None else bias.detach().float()
        self.hadamard = hadamard(inputs, mix)
        with _fbgemm():
            about: dict[str, Any] = {"scales": scales.double(), "zero_points": torch.zeros(outputs, dtype=torch.long)}
            weight = torch._empty_per_channel_affine_quantized((0, inputs), **about, axis=0, dtype=torch.qint8)
            weight.set_(rounded.untyped_storage(), rounded.storage_offset(), rounded.shape, rounded.stride())  # no copy
            self.packed = torch.ops.quantized.linear_prepack(weight, None)
        # FBGEMM: rounds x / scale to whole numbers, multiplies, and answers in float32
        self.product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default._op
        self.packed_bytes = rounded.nbytes + 3 * scales.nbytes  # beside weights: scales, zero points, sums of columns
        self.of_one, self.of_some = self._of_one(), self._of_some()

    def forward(self, x: Float[Tensor, "*S K"]) -> Float[Tensor, "*S N"]:
        if x.requires_grad:
            raise ValueError(_unfit(x, self.weight.dtype))
        rows = x.reshape(-1, self.in_features).float()
        count = rows.shape[0]
        if count == 1:
            y = self.of_one(rows)
        elif count <= CHUNK:
            y = self.of_some(rows)
        else:
            y = rows.new_empty(count, self.out_features)
            for part, out in zip(rows.split(CHUNK), y.split(CHUNK), strict=True):
                self.of_some(part, out)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _of_one(self) -> Callable[[Tensor], Tensor]:
        """`forward` for one token alone, `Float[1 1 K]` in float32, without what it need not ask.

        The scale goes in as a number: half the operations, and one row is bound by their overhead.
        """
        mixing, product, packed, bias = self.hadamard, self.product, self.packed, self.bias
        size, inputs, outputs, mm, aminmax = len(mixing), self.in_features, self.out_features, torch.mm, torch.aminmax

        def apply(x: Tensor) -> Tensor:  # `blockwise` written out: this runs a hundred times a token
            row = x.view(1, inputs) if size == 1 else mm(x.view(-1, size), mixing).view(1, inputs)
            least, most = aminmax(row)
            y = product(row, max(most.item(), -least.item(), TINY) / 127, 128, packed)
            return (y if bias is None else y.add_(bias)).view(1, 1, outputs)

        return apply

    def _of_some(self) -> Callable[..., Tensor]:
        """The same for two rows to `CHUNK`, `Float[R K]` in float32, each with a scale of its own; `out`: its place."""
        mixing, product, packed, bias = self.hadamard, self.product, self.packed, self.bias
        size, inputs = len(mixing), self.in_features

        def apply(rows: Tensor, out: Tensor | None = None) -> Tensor:
            if size > 1:
                rows = torch.mm(rows.reshape(-1, size), mixing).view(-1, inputs)
            largest = rows.abs().amax(-1, keepdim=True).clamp_min_(TINY)
            y = product(rows / largest, 1 / 127, 128, packed)
            if bias is None:
                return torch.mul(y, largest, out=out) if out is not None else y.mul_(largest)
            return torch.addcmul(bias, y, largest, out=out)

        return apply


class Int8Embedding(Prepared):
    """Looks rows up in the int8 table of a tied head. rounded, scales: what `round_weight(table, mix)` gives."""

    def __init__(
        self, rounded: Int8[Tensor, "V C"], scales: Float[Tensor, " V"], dtype: torch.dtype, mix: int = MIX
    ) -> None:
        super().__init__(rounded.shape[0], rounded.shape[1], dtype)
        self.rounded, self.scales = rounded, scales[:, None]
        self.hadamard = hadamard(rounded.shape[1], mix)

    def forward(self, ids: Int[Tensor, "*S"]) -> Float[Tensor, "*S C"]:
        rows = self.rounded[ids] * self.scales[ids]
        return blockwise(rows, self.hadamard).to(self.weight.dtype)


@contextmanager
def _fbgemm() -> Iterator[None]:
    """Packing asks a global which engine to pack for, and warns that quantized tensors will go some day."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*quantized tensor creation", UserWarning)
            yield
    finally:
        torch.backends.quantized.engine = before


Places = dict[nn.Module, list[tuple[nn.Module, str]]]


def _places(net: nn.Module) -> Places:
    """Where each module stands, as parents and names."""
    found: Places = {}
    for parent in net.modules():
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(child, []).append((parent, name))
    return found


def _replace(places: Places, fast: dict[nn.Module, nn.Module]) -> None:
    """Puts each module's replacement wherever it stands, and forgets the module."""
    for module, instead in fast.items():
        for parent, name in places.pop(module, ()):  # a table that two linears share is replaced with the first
            setattr(parent, name, instead)


def _give_back() -> None:
    """Hands freed weights back to the system: glibc keeps them otherwise (of 363 MB, 322 stayed, not 129)."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _check(net: nn.Module, quantize: str | None, dtype: torch.dtype, mix: int) -> None:
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize is None or 'int8', not {quantize!r}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"fast linears compute in torch.float32 or torch.bfloat16, not {dtype}; choose one of the two")
    if mix < 1 or mix & (mix - 1):
        raise ValueError(f"mix is a power of two (1 mixes nothing), not {mix}")
    if type(net) in (nn.Linear, nn.Embedding):
        raise ValueError(f"prepare replaces what lies inside a network; this is a lone {type(net).__name__}: wrap it")
    for name, parameter in net.named_parameters():
        if parameter.device.type != "cpu" or not (parameter.is_floating_point() or isinstance(parameter, Rounded)):
            what = f"{name} is {parameter.dtype} on {parameter.device}"
            raise ValueError(
                f"fast linears are for floating-point weights on a CPU, but {what}; move it, or leave it as is"
            )
    if lacking := _lacks(quantize is not None, dtype):
        raise ValueError(lacking)


def _lacks(quantize: bool, dtype: torch.dtype) -> str:
    """What this machine cannot do, in one line, or nothing."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 arithmetic (it takes AVX-512): use dtype=torch.float32"
    if quantize and "fbgemm" not in torch.backends.quantized.supported_engines:
        return "quantize='int8' runs on FBGEMM, which this build of PyTorch lacks: use quantize=None"
    if quantize and not torch.cpu._is_vnni_supported():
        return "quantize='int8' needs a CPU with VNNI (without it, 8-bit sums overflow): use quantize=None"
    return ""


def _unfit(x: Tensor, dtype: torch.dtype) -> str:
    if x.requires_grad:
        return "a prepared network has no gradients: run it under torch.inference_mode(), or train the original"
    return f"this network was prepared for {dtype} and got {x.dtype}: convert the input, or prepare it for that dtype"
