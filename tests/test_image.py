"""Pictures: bit for bit the pixels of the published processors; every bad picture is one line that names it."""

import importlib
import io
import json
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from headway.image import ImageSpec, from_published, pixels, read_image, to_published
from headway.spec import convert

try:  # transformers imports it wherever it is installed; the oracles here are those of Pillow and need none
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):  # it is missing, or built for another PyTorch
    sys.modules["torchvision"] = None  # type: ignore[assignment]

FAMILIES = ["vit", "deit", "clip", "bit"]
NAMES = {"vit": "ViT", "deit": "DeiT", "clip": "CLIP", "bit": "Bit"}
DINOV2 = {
    "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "resample": 3,
    "crop_size": {"height": 224, "width": 224}, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "rescale_factor": 0.00392156862745098,
}  # fmt: skip
TINY = ImageSpec(size=(8, 8))


def oracle(family: str, **options: Any) -> Any:
    """transformers' processor that resizes with Pillow."""
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return getattr(module, f"{NAMES[family]}ImageProcessorPil")(**options)


def wanted(processor: Any, images: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack(processor(images)["pixel_values"]))


def photos() -> list[Path]:
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [folder / "china.jpg", folder / "flower.jpg"]


def picture(width: int = 13, height: int = 9, mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(noise, "RGBA") if mode == "RGBA" else Image.fromarray(noise[..., :3]).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- equal to the published processors ---


@pytest.mark.parametrize("family", FAMILIES)
def test_photos_give_the_pixels_of_the_published_processor_bit_for_bit(family: str) -> None:
    processor = oracle(family)
    spec = from_published(processor.to_dict(), "preprocessor_config.json")
    opened = [Image.open(path) for path in photos()]
    assert torch.equal(pixels(photos(), spec), wanted(processor, opened))


def test_dinov2s_own_file_gives_its_own_pixels() -> None:
    options = {key: value for key, value in DINOV2.items() if key != "image_processor_type"}
    assert torch.equal(
        pixels(photos(), from_published(DINOV2, "dinov2")),
        wanted(oracle("bit", **options), [Image.open(path) for path in photos()]),
    )


def test_digits_give_the_pixels_of_the_published_processor_bit_for_bit() -> None:
    from sklearn.datasets import load_digits

    digits = [(digit * 15.9).astype(np.uint8) for digit in load_digits().images[:10]]
    processor = oracle("clip")
    grey = [Image.fromarray(digit) for digit in digits]  # there, an array of two dimensions is an error
    assert torch.equal(pixels(digits, from_published(processor.to_dict(), "clip")), wanted(processor, grey))


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
@pytest.mark.parametrize("width, height", [(1, 1), (2, 7), (7, 2), (13, 9), (64, 64), (101, 33), (33, 100), (5, 40)])
@pytest.mark.parametrize(
    "family, options",
    [
        ("vit", {"size": {"height": 8, "width": 12}}),
        ("deit", {"size": {"height": 17, "width": 16}, "crop_size": {"height": 8, "width": 12}}),
        ("clip", {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 7}}),
        ("bit", {"size": {"shortest_edge": 9}, "crop_size": {"height": 12, "width": 4}}),  # black above and below
        ("bit", {"size": {"height": 4, "width": 7}, "crop_size": {"height": 7, "width": 12}}),  # black all around
    ],
)
def test_tiny_pictures_too(family: str, options: dict[str, Any], width: int, height: int, resample: int) -> None:
    processor = oracle(family, resample=resample, **options)
    image = picture(width, height)
    got = pixels([image], from_published(json.loads(processor.to_json_string()), family))
    assert torch.equal(got, wanted(processor, [image]))


@pytest.mark.parametrize(
    "options",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_center_crop": False},
        {"do_resize": False, "crop_size": {"height": 20, "width": 6}},
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
        {"size": {"height": 10, "width": 6}, "crop_size": {"height": 6, "width": 6}},
    ],
)
def test_what_a_file_switches_off_is_off(options: dict[str, Any]) -> None:
    processor = oracle("clip", **options)
    assert torch.equal(
        pixels([picture()], from_published(json.loads(processor.to_json_string()), "clip")),
        wanted(processor, [picture()]),
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBX"])
def test_modes_become_rgb_as_they_do_there(mode: str) -> None:
    image = picture(mode="RGBA").convert("LA").convert("PA") if mode == "PA" else picture(mode=mode)
    processor = oracle("clip")
    assert torch.equal(pixels([image], from_published(processor.to_dict(), "clip")), wanted(processor, [image]))


def test_a_palette_with_a_transparent_colour_becomes_rgb_as_it_does_there(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    path.write_bytes(encoded(picture().quantize(16), transparency=3))
    processor = oracle("bit")
    assert torch.equal(
        pixels([path], from_published(processor.to_dict(), "bit")), wanted(processor, [Image.open(path)])
    )


# --- the file, both ways ---


SPECS = [
    TINY,
    ImageSpec(size=8, crop=(8, 8), resample="lanczos"),
    ImageSpec(size=8, resample="nearest"),
    ImageSpec(size=None, crop=(6, 10), rescale=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    ImageSpec(size=(10, 12), crop=(6, 10), resample="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
    ImageSpec(size=None, rescale=1 / 127.5, mean=(1.0, 1.0, 1.0), std=(1.0, 1.0, 1.0)),
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_written_file_says_the_same_here_and_gives_the_same_pixels_there(spec: ImageSpec) -> None:
    published = json.loads(json.dumps(to_published(spec)))
    assert from_published(published, "written") == spec
    kind = published.pop("image_processor_type").removesuffix("ImageProcessor").lower()
    assert torch.equal(pixels([picture()], spec), wanted(oracle(kind, **published), [picture()]))


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_survives_json(spec: ImageSpec) -> None:
    import msgspec

    assert convert(json.loads(msgspec.json.encode(spec)), ImageSpec) == spec


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_file_written_again_means_the_same(family: str) -> None:
    spec = from_published(oracle(family).to_dict(), family)
    assert from_published(to_published(spec), "again") == spec


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_that_says_nothing_has_the_processors_defaults(family: str) -> None:
    full = from_published(oracle(family).to_dict(), family)
    for name in (f"{NAMES[family]}ImageProcessor", f"{NAMES[family]}ImageProcessorFast"):
        assert from_published({"image_processor_type": name}, family) == full
    assert from_published({"feature_extractor_type": f"{NAMES[family]}FeatureExtractor"}, family) == full
    assert from_published({}, family, processor=f"{NAMES[family]}ImageProcessor") == full
    assert from_published({"size": None, "do_resize": None}, family, processor=f"{NAMES[family]}ImageProcessor") == full


def test_a_plain_number_is_a_square_for_vit_and_the_shortest_edge_for_clip() -> None:
    old = {"do_normalize": True, "do_resize": True, "resample": 2, "size": 384}
    assert from_published({"feature_extractor_type": "ViTFeatureExtractor", **old}, "vit").size == (384, 384)
    clip = from_published({"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 336, **old}, "clip")
    assert (clip.size, clip.crop) == (384, (336, 336))


def test_keys_that_leave_the_pixels_alone_are_ignored() -> None:
    extra = {
        "processor_class": "CLIPProcessor", "_valid_processor_keys": ["images"], "feature_extractor_type": "Other",
        "model_input_names": ["pixel_values"], "device": "cpu", "data_format": "channels_first", "do_pad": False,
    }  # fmt: skip
    assert from_published({**DINOV2, **extra}, "x") == from_published(DINOV2, "x")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"do_padd": True}, "unknown key 'do_padd'; did you mean 'do_pad'"),
        ({"do_pad": True}, "do_pad"),
        ({"pad_size": {"height": 4, "width": 4}}, "unknown key 'pad_size'"),
        ({"rescale_offset": True}, "unknown key 'rescale_offset'"),
        ({"crop_pct": 0.9}, "unknown key 'crop_pct'"),
        ({"do_flip_channel_order": True}, "unknown key 'do_flip_channel_order'"),
        ({"auto_map": {"AutoImageProcessor": "evil.Evil"}}, "auto_map asks for code"),
        ({"image_processor_type": "SamImageProcessor"}, "'SamImageProcessor' is not known"),
        ({"image_processor_type": "ViT"}, "'ViT' is not known"),
        ({"image_processor_type": ["CLIPImageProcessor"]}, "is not known"),
        ({"size": {"longest_edge": 4}}, "longest_edge"),
        ({"size": {"shortest_edge": 4, "longest_edge": 8}}, "longest_edge"),
        ({"size": {"height": 4}}, "size needs a height and a width"),
        ({"size": {}}, "size needs a height and a width"),
        ({"size": {"height": 4, "width": 4, "shortest_edge": 4}}, "size needs a height and a width"),
        ({"size": [4]}, "size"),
        ({"size": [4, 4, 4]}, "size"),
        ({"size": 0}, "size"),
        ({"size": True}, "size"),
        ({"size": 10**9}, "size"),
        ({"size": {"shortest_edge": 10**9}}, "size"),
        ({"crop_size": {"shortest_edge": 4}}, "crop_size needs a height and a width"),
        ({"resample": 4}, "resample"),
        ({"resample": "bicubic"}, "resample"),
        ({"image_std": [0, 1, 1]}, "above 0"),
        ({"image_std": 0}, "above 0"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_mean": [float("nan"), 0, 0]}, "finite"),
        ({"rescale_factor": float("inf")}, "finite"),
        ({"rescale_factor": -1}, "above 0"),
        ({"do_resize": "yes"}, "do_resize"),
    ],
)
def test_what_cannot_be_honoured_is_one_line_that_names_the_file_and_the_key(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^some/preprocessor_config\.json: ") as raised:
        from_published({**DINOV2, **change}, "some/preprocessor_config.json")
    assert reason in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_names_no_processor_asks_for_one() -> None:
    with pytest.raises(ValueError, match=r"x\.json: names no image_processor_type; say which"):
        from_published({"size": 4}, "x.json")
    with pytest.raises(ValueError, match="do_center_crop is true, and there is no crop_size"):
        from_published({"image_processor_type": "ViTImageProcessor", "do_center_crop": True}, "x.json")


# --- sources ---


def test_a_path_bytes_a_picture_and_an_array_give_the_same(tmp_path: Path) -> None:
    image = picture()
    path = tmp_path / "picture.png"
    image.save(path)
    array = np.asarray(image)
    sources = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), image, array, torch.tensor(array)]
    sources += [array[::-1][::-1], torch.tensor(array).permute(2, 0, 1).permute(1, 2, 0)]  # strides are no matter
    together = pixels(sources, TINY)
    assert all(torch.equal(row, together[0]) for row in together)
    assert all(torch.equal(pixels([source], TINY)[0], together[0]) for source in sources)


def test_arrays_of_one_three_and_four_channels() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
    for array, image in [
        (noise[..., 0], Image.fromarray(noise[..., 0])),
        (noise[..., :1], Image.fromarray(noise[..., 0])),
        (noise[..., :3], Image.fromarray(np.ascontiguousarray(noise[..., :3]))),
        (noise, Image.fromarray(noise, "RGBA")),
    ]:
        assert np.array_equal(np.asarray(read_image(array)), np.asarray(read_image(image)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright_whichever_way_the_camera_was_held(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "held.png"
    picture().save(path, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    for source in (path, path.read_bytes(), Image.open(path)):
        assert np.array_equal(np.asarray(read_image(source)), upright)
    assert (upright.shape[0] > upright.shape[1]) == (orientation > 4)
    # there, a processor that is given a path does the same
    if orientation == 6:
        load_image = importlib.import_module("transformers.image_utils").load_image
        assert np.array_equal(np.asarray(load_image(str(path))), upright)


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    for image in (clear, clear.convert("RGBa"), clear.convert("LA")):
        assert np.asarray(read_image(image)).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_cut_off(kind: str) -> None:
    deep = np.array([[0, 257, 257 * 128, 65535]], np.uint16)
    image = read_image(encoded(Image.fromarray(deep), kind))
    assert np.asarray(image)[0, :, 1].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_the_usual_formats_are_read(kind: str) -> None:
    data = encoded(picture(), kind)
    assert np.array_equal(np.asarray(read_image(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_cameras_two_pictures_in_one_file_are_its_photo() -> None:
    photo = encoded(picture(64, 48), "MPO", save_all=True, append_images=[picture(64, 48, seed=1)], quality=95)
    assert Image.open(io.BytesIO(photo)).n_frames == 2
    near = np.asarray(read_image(photo)).astype(int) - np.asarray(picture(64, 48))
    far = np.asarray(read_image(photo)).astype(int) - np.asarray(picture(64, 48, seed=1))
    assert np.abs(near).mean() < np.abs(far).mean() / 1.2


def test_the_present_frame_of_an_opened_animation_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), (value, value, value)) for value in (0, 255)]
    opened = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    opened.seek(1)
    assert np.asarray(read_image(opened)).min() == 255


def test_a_picture_that_was_given_is_not_changed() -> None:
    image = picture(mode="P")
    before = (image.mode, image.tobytes(), image.size)
    pixels([image], TINY)
    assert (image.mode, image.tobytes(), image.size) == before
    array = np.asarray(picture()).copy()
    kept = array.copy()
    pixels([array], TINY)
    assert np.array_equal(array, kept)


# --- hostile ---


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def animation(kind: str) -> bytes:
    return encoded(picture(), kind, save_all=True, append_images=[picture(seed=1)])


def hostile() -> dict[str, bytes]:
    files = {
        "empty.png": b"",
        "text.jpg": b"not a picture at all\n",
        "page.html": b"<html><body>404</body></html>",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "pickle.png": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94",
        "zeros.bmp": b"\0" * 4096,
        "only_a_signature.png": b"\x89PNG\r\n\x1a\n",
        "only_a_signature.jpg": b"\xff\xd8\xff\xe0",
        "only_a_signature.gif": b"GIF89a",
        "only_a_signature.webp": b"RIFF\x00\x00\x00\x00WEBP",
        "only_a_signature.tif": b"II*\0\x08\0\0\0",
        "bomb.png": png_header(100_000, 100_000),
        "half_a_bomb.png": png_header(12_000, 12_000),
        "no_width.png": png_header(0, 8),
        "too_little.png": png_header(64, 64),
        "bomb.ppm": b"P6 99999 99999 255\n" + b"\0" * 64,
        "negative.ppm": b"P6 -4 4 255\n" + b"\0" * 64,
        "bomb.bmp": encoded(picture(), "BMP")[:18] + struct.pack("<ii", 2**30, 2**30) + encoded(picture(), "BMP")[26:],
        "bomb.gif": b"GIF89a\xff\xff\xff\xff" + encoded(picture(), "GIF")[10:],
        "text_bomb.png": encoded(picture())[:33] + text_bomb() + encoded(picture())[33:],
        "animated.gif": animation("GIF"),
        "animated.webp": animation("WEBP"),
        "animated.png": animation("PNG"),
        "pages.tif": animation("TIFF"),
        "whole_numbers.tif": encoded(Image.new("I", (4, 4), 70_000), "TIFF"),
        "floats.tif": encoded(Image.new("F", (4, 4), 0.5), "TIFF"),
        "icon.ico": encoded(picture(16, 16), "ICO"),
    }
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        whole = encoded(picture(40, 30), kind)
        files[f"half.{kind.lower()}"] = whole[: len(whole) // 2]
        files[f"tenth.{kind.lower()}"] = whole[: len(whole) // 10]
    return files


def text_bomb() -> bytes:
    data = b"zTXt" + b"k\0\0" + zlib.compress(b"a" * 2**26)
    return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


HOSTILE = hostile()


@pytest.mark.parametrize("strict", [True, False], ids=["warnings are errors", "warnings are shown"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line_that_names_it(name: str, strict: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(HOSTILE[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        with pytest.raises(ValueError) as raised:
            pixels([picture(), path], TINY)
        said = str(raised.value)
        assert said.startswith(f"{path}: ") and "\n" not in said and "Type-check" not in said
        if HOSTILE[name]:
            with pytest.raises(ValueError, match=r"^picture 1: "):
                pixels([picture(), HOSTILE[name]], TINY)


def test_there_are_forty_hostile_files_and_more() -> None:
    assert len(HOSTILE) >= 40


def test_flipped_bytes_are_a_picture_or_one_line() -> None:
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = np.frombuffer(encoded(picture(40, 30), kind), np.uint8)
        for _ in range(40):
            data = whole.copy()
            where = rng.integers(0, min(len(data), 200), 4)
            data[where] = rng.integers(0, 256, 4)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    assert read_image(data.tobytes(), "flipped").mode == "RGB"
                outcomes["read"] += 1
            except ValueError as error:
                said = str(error)
                assert said.startswith("flipped: ") and "\n" not in said and "Type-check" not in said
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


@pytest.mark.parametrize(
    "source, reason",
    [
        (np.zeros((4, 4, 3), np.float32), "array of float32: give uint8"),
        (np.zeros((4, 4), bool), "array of bool"),
        (torch.zeros(4, 4, 3), "array of torch.float32"),
        (np.zeros((3, 4, 6), np.uint8), r"permute\(1, 2, 0\) brings the channels last"),
        (np.zeros((4, 4, 2), np.uint8), "height x width x 1, 3 or 4"),
        (np.zeros((2, 4, 4, 3), np.uint8), "height x width"),
        (np.zeros(4, np.uint8), "height x width"),
        (np.zeros((0, 4, 3), np.uint8), "nothing to see"),
        (torch.zeros(4, 0, dtype=torch.uint8), "nothing to see"),
        (Image.new("RGB", (0, 4)), "0 x 4 pixels: there is nothing to see"),
        (Image.new("La", (4, 4)), "conversion from La"),
        (Image.new("F", (4, 4)), "mode F"),
        (7, "a int is no picture"),
        (None, "a NoneType is no picture"),
        ([1, 2], "a list is no picture"),
    ],
)
def test_what_is_no_picture_is_one_line(source: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^picture 0: .*{reason}"):
        pixels([source], TINY)


def test_a_missing_file_a_folder_and_an_address_say_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.png: no such file$"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"a folder$"):
        read_image(tmp_path)
    with pytest.raises(ValueError, match=r"https://example\.com/cat\.jpg: no such file; nothing is fetched"):
        read_image("https://example.com/cat.jpg")
    with pytest.raises(ValueError, match=r"no such file$"):
        read_image("a\0b.png")


def test_a_picture_that_would_be_blown_up_is_refused() -> None:
    with pytest.raises(ValueError, match="1 x 50000 pixels, scaled to a shortest edge of 224, are 224 x 11200000"):
        pixels([Image.new("RGB", (1, 50_000))], ImageSpec(size=224, crop=(224, 224)))


def test_pictures_of_two_sizes_that_are_not_resized_to_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"picture 1 comes out as 8 x 16 .* and the first as 8 x 11"):
        pixels([picture(13, 9), picture(20, 10)], ImageSpec(size=8))
    assert pixels([picture(13, 9), picture(13, 9)], ImageSpec(size=8)).shape == (2, 3, 8, 11)


@pytest.mark.parametrize("images", ["photo.jpg", b"bytes", []])
def test_one_picture_is_put_in_a_list(images: Any) -> None:
    with pytest.raises(ValueError, match=r"put it in one|give at least one"):
        pixels(images, TINY)
