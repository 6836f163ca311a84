"""Patches: a picture becomes the tokens that the published models make of it, at the trained size and at others."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headway.layers import initialise
from headway.patches import Patches, flat, unflat

try:  # transformers imports it wherever it is installed; no model needs it
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):  # it is missing, or built for another PyTorch
    sys.modules["torchvision"] = None  # type: ignore[assignment]

WIDTH, IMAGE, PATCH = 24, 20, 4
TINY = {"hidden_size": WIDTH, "image_size": IMAGE, "patch_size": PATCH}
FAMILIES = ["vit", "deit", "dinov2", "dinov2_with_registers", "clip"]
SIZES = [(20, 20), (8, 8), (28, 28), (12, 32), (32, 12), (4, 4), (4, 100)]  # (4, 100): as many squares, elsewhere


def oracle(family: str, image: int = IMAGE) -> nn.Module:
    """The published embeddings, every parameter drawn anew: fresh ones are zeros in places, and would hide a swap."""
    import transformers.models as models

    options: dict[str, Any] = {**TINY, "image_size": image}
    match family:
        case "vit":
            module = models.vit.modeling_vit.ViTEmbeddings(models.vit.ViTConfig(**options))
        case "deit":
            module = models.deit.modeling_deit.DeiTEmbeddings(models.deit.DeiTConfig(**options))
        case "dinov2":
            module = models.dinov2.modeling_dinov2.Dinov2Embeddings(models.dinov2.Dinov2Config(**options))
        case "dinov2_with_registers":
            room = models.dinov2_with_registers
            config = room.Dinov2WithRegistersConfig(num_register_tokens=3, **options)
            module = room.modeling_dinov2_with_registers.Dinov2WithRegistersEmbeddings(config)
        case _:
            module = models.clip.modeling_clip.CLIPVisionEmbeddings(models.clip.CLIPVisionConfig(**options))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def ours(family: str, published: nn.Module, image: int = IMAGE, **options: Any) -> Patches:
    """The same, its weights by reshapes alone."""
    patches = Patches(
        WIDTH,
        image=(image, image),
        patch=PATCH,
        prefix=("class", "distillation") if family == "deit" else ("class",),
        registers=3 if family == "dinov2_with_registers" else 0,
        bias=family != "clip",
        **options,
    )
    there = published.state_dict()
    names = {
        "tokens.class.weight": "class_embedding" if family == "clip" else "cls_token",
        "tokens.distillation.weight": "distillation_token",
        "registers.weight": "register_tokens",
        "positions.weight": "position_embedding.weight" if family == "clip" else "position_embeddings",
        "project.weight": "patch_embedding.weight" if family == "clip" else "patch_embeddings.projection.weight",
        "project.bias": "patch_embeddings.projection.bias",
    }
    patches.load_state_dict(
        {key: there[names[key]].reshape(value.shape) for key, value in patches.state_dict().items()}
    )
    return patches


def theirs(family: str, published: nn.Module, pixels: Tensor, interpolate: bool) -> Tensor:
    if family.startswith("dinov2"):
        return published(pixels)
    return published(pixels, interpolate_pos_encoding=interpolate)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("image", [20, 22])  # of 22 pixels, the patches leave two out
def test_tokens_are_those_of_the_published_model(family: str, image: int) -> None:
    published = oracle(family, image)
    pixels = torch.randn(2, 3, image, image)
    with torch.no_grad():
        got, expected = ours(family, published, image)(pixels), theirs(family, published, pixels, False)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_sizes_are_interpolated_as_the_published_model_does(family: str, size: tuple[int, int]) -> None:
    published = oracle(family)
    patches = ours(family, published, interpolate=True, antialias=family == "dinov2_with_registers")
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(patches(pixels), theirs(family, published, pixels, True), atol=1e-5, rtol=0)


def test_smoothing_matters_where_the_grid_shrinks() -> None:
    published = oracle("dinov2_with_registers")
    pixels = torch.randn(1, 3, 8, 8)
    smooth = ours("dinov2_with_registers", published, interpolate=True, antialias=True)(pixels)
    rough = ours("dinov2_with_registers", published, interpolate=True)(pixels)
    assert (smooth - rough).abs().max() > 0.03


@pytest.mark.parametrize("columns", [1, 2])
def test_a_picture_of_one_column_is_interpolated_too(columns: int) -> None:
    """PyTorch 2.13 is wrong where it smooths a channels-last table down to one column, as transformers has it do."""
    patches = Patches(4, image=(20, 20), patch=4, interpolate=True, antialias=True)
    with torch.no_grad():
        patches.project.weight.zero_()
        patches.project.bias.zero_()
        patches.tokens["class"].weight.zero_()
        table = patches.positions.weight[1:].double().T.reshape(1, 4, 5, 5).contiguous()
        options = {"mode": "bicubic", "align_corners": False, "antialias": True}
        expected = nn.functional.interpolate(table, (25, columns), **options).flatten(2).transpose(1, 2).float()
        torch.testing.assert_close(patches(torch.zeros(1, 3, 100, 4 * columns))[:, 1:], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_published_model(family: str) -> None:
    published = oracle(family)
    patches = ours(family, published, interpolate=True, antialias=family == "dinov2_with_registers")
    pixels, weight = torch.randn(2, 3, 12, 16), torch.randn(WIDTH)
    (theirs(family, published, pixels, True) @ weight).square().sum().backward()
    (patches(pixels) @ weight).square().sum().backward()
    expected = sorted(float(p.grad.norm()) for p in published.parameters() if p.grad is not None)
    got = sorted(float(p.grad.norm()) for p in patches.parameters())
    assert got == pytest.approx(expected, rel=1e-4)


def test_a_linear_over_squares_is_a_convolution_of_their_stride() -> None:
    convolution = nn.Conv2d(5, WIDTH, 3, 3)
    patches = Patches(WIDTH, image=(12, 6), patch=3, channels=5, prefix=())
    with torch.no_grad():
        patches.project.weight.copy_(flat(convolution.weight))
        patches.project.bias.copy_(convolution.bias)
        patches.positions.weight.zero_()
        pixels = torch.randn(2, 5, 12, 6)
        expected = convolution(pixels).flatten(2).transpose(1, 2)
        torch.testing.assert_close(patches(pixels), expected, atol=1e-5, rtol=0)
    assert torch.equal(unflat(flat(convolution.weight), 3), convolution.weight)


def test_strides_of_the_pixels_do_not_matter() -> None:
    patches = Patches(WIDTH, image=(8, 8), patch=4)
    pixels = torch.randn(2, 3, 8, 8)
    last = pixels.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(patches(last), patches(pixels), atol=1e-6, rtol=0)


def test_what_stands_where() -> None:
    patches = Patches(4, image=(8, 12), patch=4, prefix=("class", "distillation"), registers=3)
    assert (patches.grid, patches.prefix_count) == ((2, 3), 5)
    with torch.no_grad():
        patches.positions.weight.copy_(torch.arange(8.0)[:, None].expand(8, 4))
        patches.tokens["class"].weight.fill_(100)
        patches.tokens["distillation"].weight.fill_(200)
        patches.registers.weight.fill_(300)
        tokens = patches(torch.zeros(2, 3, 8, 12)) - torch.cat([torch.zeros(5, 4), patches.project.bias.expand(6, 4)])
    expected = [100, 201, 300, 300, 300, 2, 3, 4, 5, 6, 7]  # registers stand nowhere; squares row by row
    for row in tokens:
        torch.testing.assert_close(row, torch.tensor(expected).float()[:, None].expand(11, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix, registers", [((), 0), ((), 2), (("class",), 0), (("class",), 2)])
def test_with_and_without_tokens_before(prefix: tuple[str, ...], registers: int) -> None:
    patches = Patches(4, image=(8, 8), patch=4, prefix=prefix, registers=registers)
    assert patches(torch.zeros(3, 3, 8, 8)).shape == (3, len(prefix) + registers + 4, 4)
    assert set(patches.state_dict()) == {"project.weight", "project.bias", "positions.weight"} | {
        f"tokens.{name}.weight" for name in prefix
    } | ({"registers.weight"} if registers else set())


def test_a_batch_is_its_pictures_one_by_one() -> None:
    patches = Patches(WIDTH, image=(8, 8), patch=4, registers=1)
    pixels = torch.randn(3, 3, 8, 8)
    alone = torch.cat([patches(picture[None]) for picture in pixels])
    torch.testing.assert_close(patches(pixels), alone, atol=1e-5, rtol=0)


def test_half_precision_interpolates_at_full_precision() -> None:
    patches = Patches(WIDTH, image=(20, 20), patch=4, interpolate=True)
    pixels = torch.randn(1, 3, 8, 8)
    half = Patches(WIDTH, image=(20, 20), patch=4, interpolate=True).bfloat16()
    half.load_state_dict(patches.state_dict())
    tokens = half(pixels)
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), patches(pixels), atol=0.06, rtol=0)


def test_the_one_table_initialises_it() -> None:
    patches = Patches(64, image=(32, 32), patch=8, registers=4)
    initialise(patches, 2)
    assert abs(float(patches.positions.weight.detach().std()) - 1) < 0.1
    assert abs(float(patches.project.weight.detach().std()) * (3 * 64) ** 0.5 - 1) < 0.1


def test_what_cannot_be_is_one_line_that_says_why() -> None:
    patches = Patches(4, image=(8, 8), patch=4)
    with pytest.raises(ValueError, match=r"8 x 12 pixels, and the positions are for 8 x 8: .* interpolate=True"):
        patches(torch.zeros(1, 3, 8, 12))
    with pytest.raises(ValueError, match="1 channels, and the patches are of 3"):
        patches(torch.zeros(1, 1, 8, 8))
    patches.interpolate = True
    assert patches(torch.zeros(1, 3, 8, 12)).shape == (1, 7, 4)
    with pytest.raises(ValueError, match="9 x 12 pixels are no whole number of patches of 4"):
        patches(torch.zeros(1, 3, 9, 12))
    with pytest.raises(ValueError, match="0 x 12 pixels are no whole number"):
        patches(torch.zeros(1, 3, 0, 12))
    with pytest.raises(ValueError, match="a patch of 9 pixels does not fit into 8 x 8"):
        Patches(4, image=(8, 8), patch=9)
    with pytest.raises(ValueError, match="names a token twice"):
        Patches(4, image=(8, 8), patch=4, prefix=("class", "class"))
