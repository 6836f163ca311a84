"""Prepared linears say what nn.Linear says, row by row, in less memory."""

import copy
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from headway import mixers
from headway.layers import FeedForward
from headway.mask import Mask
from headway.positions import Positions
from headway.quantize import CHUNK, Int8Embedding, Int8Linear, PackedLinear, nbytes, prepare, restore
from headway.rounding import blockwise, hadamard, round_weight
from headway.spec import FeedForwardSpec

WAYS = [(None, torch.float32), (None, torch.bfloat16), ("int8", torch.float32), ("int8", torch.bfloat16)]
FAR = {(None, torch.float32): 1e-6, (None, torch.bfloat16): 0.005, ("int8", torch.float32): 0.013}
FAR["int8", torch.bfloat16] = 0.015


class Tied(nn.Module):
    """An embedding, a small linear between, and a head with the embedding's table."""

    def __init__(self, vocab: int = 1200, width: int = 96) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)
        self.between = nn.Linear(width, width)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.between(self.embed(ids)))


def error(y: Tensor, right: Tensor) -> float:
    return float(((y.float() - right).norm() / right.norm()).detach())


def fast(linear: nn.Linear, quantize: str | None, dtype: torch.dtype, mix: int = 16) -> nn.Module:
    net = nn.Sequential(copy.deepcopy(linear))
    prepare(net, quantize, dtype, mix)
    assert not isinstance(net[0], nn.Linear)
    return net[0]


@pytest.mark.parametrize("quantize, dtype", WAYS)
@pytest.mark.parametrize("inputs, outputs", [(576, 192), (384, 1536), (257, 300)])  # 257: no two channels can mix
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_close_to_those_in_fp32(
    quantize: str | None, dtype: torch.dtype, inputs: int, outputs: int, bias: bool
) -> None:
    linear, x = nn.Linear(inputs, outputs, bias=bias), torch.randn(40, inputs)
    y = fast(linear, quantize, dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert error(y, linear(x)) < FAR[quantize, dtype]


@pytest.mark.parametrize("quantize, dtype", WAYS)
def test_any_leading_shape_is_taken(quantize: str | None, dtype: torch.dtype) -> None:
    linear = nn.Linear(320, 256)
    module = fast(linear, quantize, dtype)
    for shape in [(320,), (1, 320), (1, 1, 320), (2, 3, 320), (2, 0, 320), (0, 320), (3, 1, 2, 320), (700, 320)]:
        x = torch.randn(shape)
        y = module(x.to(dtype))
        assert y.shape == (*shape[:-1], 256)
        assert not x.numel() or error(y, linear(x)) < FAR[quantize, dtype]


@pytest.mark.parametrize("quantize, dtype", WAYS)
def test_strided_input_gives_what_its_copy_gives_and_stays_as_it_was(quantize: str | None, dtype: torch.dtype) -> None:
    for mix in (1, 16):
        module = fast(nn.Linear(320, 256), quantize, dtype, mix)
        for x in (torch.randn(320, 5).T, torch.randn(5, 640)[:, ::2], torch.randn(1, 320).expand(4, 320)):
            x = x.to(dtype)
            before = x.clone()
            assert torch.equal(module(x), module(x.contiguous()))
            assert torch.equal(x, before)


@pytest.mark.parametrize("quantize, dtype", WAYS)
def test_a_row_does_not_depend_on_the_others(quantize: str | None, dtype: torch.dtype) -> None:
    module = fast(nn.Linear(576, 300), quantize, dtype)
    x = torch.randn(600, 576) * torch.logspace(-3, 3, 600)[:, None]  # rows of very different size
    x = x.to(dtype)
    y = module(x)
    for rows in (2, 3, 64, 257):
        assert torch.equal(module(x[50 : 50 + rows]), y[50 : 50 + rows])
    alone = torch.cat([module(row[None]) for row in x])
    if quantize is None:
        assert torch.equal(alone, y)
    else:
        step = 2**-8 if dtype == torch.bfloat16 else 1e-6
        apart = ((alone - y).float().abs().amax(1) / y.float().abs().amax(1)).double()
        assert apart.max() < 2e-3
        assert (apart > step).double().mean() < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_of_nonsense_harms_itself_alone(bad: float) -> None:
    module = fast(nn.Linear(576, 300), "int8", torch.float32)
    x = torch.randn(4, 576)
    y = module(x)
    x[2, 7] = bad
    spoilt = module(x)
    assert torch.equal(spoilt[[0, 1, 3]], y[[0, 1, 3]])
    assert not spoilt[2].isfinite().any()


def test_zeros_answer_the_bias() -> None:
    linear = nn.Linear(576, 300)
    linear.weight.data[3] = 0
    module = fast(linear, "int8", torch.float32)
    for rows in (1, 5):
        assert torch.equal(module(torch.zeros(rows, 576)), linear.bias.expand(rows, -1))
    assert torch.equal(module(torch.randn(5, 576))[:, 3], linear.bias[3].expand(5))


def test_outlier_channels_survive_because_they_are_mixed_with_their_neighbours() -> None:
    """Two channels are a hundred times as large as the rest, as in real checkpoints, and must not drown it."""
    linear, x = nn.Linear(576, 300, bias=False), torch.randn(64, 576)
    outliers = torch.zeros_like(x)
    outliers[:, [100, 333]] = 100 * torch.randn(64, 2)
    x[:, [100, 333]] = 0
    errors = {}
    for mix in (1, 16):
        said = fast(linear, "int8", torch.float32, mix)(x + outliers) - linear(outliers)
        errors[mix] = error(said, linear(x))
    assert errors[16] < 0.11
    assert errors[16] < errors[1] / 2


def test_hadamard_is_its_own_inverse() -> None:
    for width, size in [(576, 16), (24, 8), (7, 1), (4, 4)]:
        matrix = hadamard(width)
        assert matrix.shape == (size, size)
        assert torch.equal(matrix, matrix.T)
        x = torch.randn(3, width)
        torch.testing.assert_close(blockwise(blockwise(x, matrix), matrix), x, atol=1e-6, rtol=0)


def test_weights_are_rounded_to_the_nearest_of_255_values() -> None:
    weight = torch.randn(5000, 48)
    rounded, scales = round_weight(weight)
    assert rounded.dtype == torch.int8 and int(rounded.min()) >= -127
    assert bool((rounded.abs().amax(1) == 127).all())
    apart = blockwise(weight, hadamard(48)) - rounded * scales[:, None]
    assert bool((apart.abs() <= 0.5001 * scales[:, None]).all())


@pytest.mark.parametrize("quantize, dtype", WAYS)
def test_a_tied_embedding_still_looks_up(quantize: str | None, dtype: torch.dtype) -> None:
    net, ids = Tied(), torch.randint(1200, (2, 9))
    looked, right = net.embed(ids).detach(), net(ids).detach()
    prepare(net, quantize, dtype)
    assert isinstance(net.embed, Int8Embedding if quantize else nn.Embedding)
    assert isinstance(net.head, Int8Linear if quantize else PackedLinear)
    assert type(net.between) is nn.Linear  # too small to be worth it
    assert net.embed(ids).dtype == dtype
    assert error(net.embed(ids), looked) < FAR[quantize, dtype]
    assert error(net(ids), right) < 2 * FAR[quantize, dtype]


def test_a_tied_head_in_fp32_is_kept_once() -> None:
    net = Tied()
    before = nbytes(net)
    prepare(net)
    assert nbytes(net) == before
    assert net.head.layout.data_ptr() == net.embed.weight.data_ptr()


@torch.inference_mode()
def test_a_tied_head_for_many_rows_is_a_copy_that_says_the_same() -> None:
    net, x = Tied(), torch.randn(5, 96)
    prepare(net)
    before, alone, together = nbytes(net), net.head(x[:1]), net.head(x)
    net.head.spread()
    assert torch.equal(net.head(x), together) and torch.equal(net.head(x[:1]), alone)
    assert nbytes(net) == before + net.embed.weight.nbytes
    net.head.spread()
    assert nbytes(net) == before + net.embed.weight.nbytes
    restore(net)
    assert net.head.weight is net.embed.weight


def test_a_module_at_two_places_is_one_module_after() -> None:
    linear = nn.Linear(256, 256)
    net = nn.Sequential(linear, nn.Sequential(nn.ReLU(), linear))
    prepare(net, "int8")
    assert net[0] is net[1][1]


@pytest.mark.parametrize(
    "quantize, dtype, share",
    [("int8", torch.float32, 0.26), (None, torch.bfloat16, 0.501), (None, torch.float32, 1.001)],
)
def test_bytes_are_counted_and_the_originals_released(quantize: str | None, dtype: torch.dtype, share: float) -> None:
    net = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)), nn.LayerNorm(512))
    before = nbytes(net)
    assert before == 4 * (3 * 512 * 513 + 1024)
    gone = [weakref.ref(linear.weight) for linear in net[:3]]
    prepare(net, quantize, dtype)
    gc.collect()
    assert nbytes(net) <= share * before + 3 * 512 * 16 + 4096
    assert all(reference() is None for reference in gone)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_system_gets_the_memory_back() -> None:
    def held() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    warm = nn.Sequential(nn.Linear(512, 512))
    prepare(warm, "int8")
    net = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(40)))
    built = held()
    prepare(net, "int8")
    assert built - held() > 90  # MiB, of 120 that 8 bits save


def test_the_rest_takes_the_dtype_and_buffers_keep_theirs() -> None:
    net = nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), nn.Linear(512, 3))
    net.register_buffer("steps", torch.arange(3.0))
    prepare(net, "int8", torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert net.steps.dtype == torch.float32
    assert net(torch.randn(2, 512).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("quantize, dtype", WAYS)
def test_prepared_weights_are_neither_saved_nor_loaded_nor_copied(
    quantize: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    net = Tied()
    saved = net.state_dict()
    prepare(net, quantize, dtype)
    for attempt in (
        net.state_dict,
        lambda: net.load_state_dict(saved),
        lambda: copy.deepcopy(net),
        lambda: torch.save(net, tmp_path / "net.pt"),
    ):
        with pytest.raises(ValueError, match="packed for this machine and cannot be saved"):
            attempt()


def test_what_cannot_be_honoured_is_refused_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(512, 512))
    for wrong, says in [
        ({"quantize": "int4"}, "None or 'int8', not 'int4'"),
        ({"dtype": torch.float16}, "not torch.float16"),
        ({"mix": 12}, "power of two"),
    ]:
        with pytest.raises(ValueError, match=says):
            prepare(net, **wrong)
    with pytest.raises(ValueError, match=r"0\.weight is torch.float32 on meta"):
        prepare(nn.Sequential(nn.Linear(512, 512, device="meta")))
    with pytest.raises(ValueError, match="lone Linear"):
        prepare(nn.Linear(512, 512))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match="VNNI"):
        prepare(net, "int8")
    assert type(net[0]) is nn.Linear and net[0].weight.requires_grad


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_gradients_and_foreign_dtypes_are_refused(quantize: str | None) -> None:
    module = fast(nn.Linear(512, 512), quantize, torch.float32)
    with pytest.raises(ValueError, match="no gradients"):
        module(torch.randn(2, 512, requires_grad=True))
    if quantize is None:
        with pytest.raises(ValueError, match=r"prepared for torch.float32 and got torch.bfloat16"):
            module(torch.randn(2, 512).bfloat16())


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_prepared_weight_still_tells_its_dtype_and_device(quantize: str | None) -> None:
    """Mixers make their states like a weight."""
    module = fast(nn.Linear(512, 512), quantize, torch.bfloat16)
    like = module.weight.new_zeros(2, 3)
    assert like.dtype == torch.bfloat16 and like.device.type == "cpu"


@torch.inference_mode()
@pytest.mark.parametrize("gated", [False, True])
def test_a_feed_forward_in_parts_says_what_it_says_at_once(gated: bool) -> None:
    net = nn.Sequential(FeedForward(256, FeedForwardSpec(gated=gated, activation="gelu")))
    prepare(net, "int8")
    assert net[0].at_once == CHUNK
    for shape in [(1, CHUNK + 1, 256), (3, 300, 256), (2, 5, 256)]:
        x = torch.randn(shape)
        together = net(x)
        net[0].at_once = None
        assert torch.equal(net(x), together)
        net[0].at_once = CHUNK


@pytest.mark.parametrize("name", sorted(set(mixers.names()) - {"summary"}))
def test_every_mixer_runs_in_int8(name: str) -> None:
    """What a mixer reads by itself, kernels and projections of positions, stays as it is."""
    options: dict[str, object] = (
        {"heads": 4} if name not in ("rnn", "conv", "ssm", "average", "identity", "fourier") else {}
    )
    options |= {"length": 512, "rank": 128} if name == "linformer" else {}
    options |= {"kernel": 257, "depthwise": True} if name == "conv" else {}
    width = 256
    mixer = mixers.build({"name": name, **options}, width, Positions()).eval()
    mask = Mask(causal="causal" in type(mixer).CAN)
    x, pos = torch.randn(2, 64, width), torch.arange(64).expand(2, -1)
    with torch.no_grad():
        right = mixer(x, mask=mask, pos=pos)
        prepare(mixer, "int8")
        assert error(mixer(x, mask=mask, pos=pos), right) < 0.05
