"""Pictures to pixels, as a checkpoint's own preprocessor_config.json says: a shell over Pillow.

In this order, as the published ViT, DeiT, CLIP and BiT (DINOv2) processors do it: to RGB, resize, crop, and
`(value * rescale - mean) / std`. A pixel has 256 values, so that line is evaluated 256 times and looked up.
What they do not agree upon is decided here: pictures stand upright (EXIF), what is transparent is white, 16 bits
are scaled to 8 and not cut off, and of several frames none is chosen in silence.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from msgspec import Meta
from torch import Tensor

from headway.spec import Strict, convert

if TYPE_CHECKING:
    import PIL.Image

Edge = Annotated[int, Meta(ge=1, le=2**14)]
# height, width; not tuple[Edge, Edge]: in a union with an Edge, msgspec 0.22 crashes on it
Pair = Annotated[tuple[Edge, ...], Meta(min_length=2, max_length=2)]
Channels = tuple[float, float, float]

# what decodes pixels and nothing else: Pillow would hand an EPS to Ghostscript
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic"]
RESAMPLES: tuple[Resample, ...] = get_args(Resample)  # in the order of Pillow's numbers, 0 to 3
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
THIRTY_TWO_BITS = ("I", "F")
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa")
ORIENTATION = 0x0112  # the EXIF tag; 2 to 8 are turned or mirrored


class ImageSpec(Strict, frozen=True, kw_only=True):
    """What a checkpoint wants of its pictures.

    `size`: of the shortest edge, or (height, width) whatever the proportions, or None to leave it. `crop`: (height,
    width) out of the middle, with black where the picture is smaller. `mean`, `std`: of the rescaled channels, RGB.
    """

    size: Edge | Pair | None
    crop: Pair | None = None
    resample: Resample = "bicubic"
    rescale: float = 1 / 255
    mean: Channels = (0.5, 0.5, 0.5)
    std: Channels = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if not all(math.isfinite(number) for number in (self.rescale, *self.mean, *self.std)):
            raise ValueError("rescale, mean and std must be finite numbers")
        if self.rescale <= 0 or min(self.std) <= 0:
            raise ValueError(f"rescale ({self.rescale}) and std {self.std} must be above 0")


# --- the checkpoint's file ---

_HALF: Channels = (0.5, 0.5, 0.5)
_CLIP: tuple[Channels, Channels] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_SQUARE = {"default_to_square": True, "image_mean": _HALF, "image_std": _HALF}
_SHORTEST = {"default_to_square": False, "resample": 3, "size": 224, "do_center_crop": True, "crop_size": 224,
             "image_mean": _CLIP[0], "image_std": _CLIP[1]}  # fmt: skip

# what each processor does where its file says nothing; old files say very little
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {**_SQUARE, "resample": 2, "size": 224},
    "DeiT": {**_SQUARE, "resample": 3, "size": 256, "do_center_crop": True, "crop_size": 224},
    "CLIP": _SHORTEST,
    "Bit": _SHORTEST,
}

# keys that leave the pixels alone: names, where tensors go, how they are handed over
_IGNORED = (
    "image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys", "model_input_names",
    "return_tensors", "data_format", "input_data_format", "device", "disable_grouping", "image_seq_length",
    "transformers_version",
)  # fmt: skip


class _Sides(Strict, frozen=True, kw_only=True):
    """A size as newer files write it; the other ways of giving one belong to other processors."""

    height: Edge | None = None
    width: Edge | None = None
    shortest_edge: Edge | None = None


class _Published(Strict, frozen=True, kw_only=True):
    """The keys that change the pixels."""

    do_resize: bool = True
    size: Edge | Pair | _Sides
    default_to_square: bool
    resample: Annotated[int, Meta(ge=0, le=3)]
    do_center_crop: bool = False
    crop_size: Edge | Pair | _Sides | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: float | Channels
    image_std: float | Channels
    do_convert_rgb: bool = True  # where it is false, only RGB pictures work there, and they are the same here
    do_pad: Literal[False] = False


def from_published(config: dict[str, Any], where: object, processor: str | None = None) -> ImageSpec:
    """The spec that a preprocessor_config.json says; `where` names the file in an error.

    `processor` ("ViTImageProcessor") is for old files that do not name theirs: its defaults fill what is not said. A
    key that might change the pixels and is not known, and every processor but ViT, DeiT, CLIP and BiT, is a ValueError.
    """
    name = config.get("image_processor_type") or config.get("feature_extractor_type") or processor
    if name is None:
        raise ValueError(f"{where}: names no image_processor_type; say which, as in processor='ViTImageProcessor'")
    defaults = _DEFAULTS.get(_family(name))
    if defaults is None:
        known = ", ".join(f"{family}ImageProcessor" for family in _DEFAULTS)
        raise ValueError(f"{where}: the image processor {name!r} is not known; there is {known}")
    if "auto_map" in config:
        raise ValueError(f"{where}: auto_map asks for code of the checkpoint to be run, and Headway runs none")
    said = {key: value for key, value in config.items() if key not in _IGNORED and value is not None}
    found = convert({**defaults, **said}, _Published, str(where))
    try:
        return ImageSpec(
            size=_size(found.size, found.default_to_square) if found.do_resize else None,
            crop=_crop(found.crop_size) if found.do_center_crop else None,
            resample=RESAMPLES[found.resample],
            rescale=found.rescale_factor if found.do_rescale else 1.0,
            mean=_channels(found.image_mean) if found.do_normalize else (0.0, 0.0, 0.0),
            std=_channels(found.image_std) if found.do_normalize else (1.0, 1.0, 1.0),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def to_published(spec: ImageSpec) -> dict[str, Any]:
    """A preprocessor_config.json that gives the same pixels elsewhere; nothing in it is left to defaults."""
    config: dict[str, Any] = {
        # the one processor that always took sizes of either kind is CLIP's; ViT's took no crop
        "image_processor_type": "CLIPImageProcessor"
        if spec.crop or isinstance(spec.size, int)
        else "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": spec.size is not None,
        "resample": RESAMPLES.index(spec.resample),
        "do_center_crop": spec.crop is not None,
        "do_rescale": True,
        "rescale_factor": spec.rescale,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    if spec.size is not None:
        config["size"] = {"shortest_edge": spec.size} if isinstance(spec.size, int) else _sides(spec.size)
    if spec.crop is not None:
        config["crop_size"] = _sides(spec.crop)
    return config


def _family(name: object) -> str:
    """The CLIP of CLIPImageProcessor, CLIPImageProcessorFast and, as it was called before, CLIPFeatureExtractor."""
    match = re.fullmatch(r"(\w+?)(?:ImageProcessor|FeatureExtractor)(?:Fast|Pil)?", str(name))
    return match.group(1) if match else ""


def _size(size: int | Pair | _Sides, square: bool) -> int | Pair:
    if isinstance(size, int):
        return (size, size) if square else size
    if isinstance(size, tuple):
        return size
    match (size.height, size.width, size.shortest_edge):
        case (int(height), int(width), None):
            return height, width
        case (None, None, int(edge)):
            return edge
    raise ValueError("size needs a height and a width, or a shortest_edge alone")


def _crop(size: int | Pair | _Sides | None) -> Pair:
    if size is None:
        raise ValueError("do_center_crop is true, and there is no crop_size")
    found = _size(size, square=True)
    if isinstance(found, int):
        raise ValueError("crop_size needs a height and a width")
    return found


def _channels(value: float | Channels) -> Channels:
    return value if isinstance(value, tuple) else (value, value, value)


def _sides(size: Pair) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


# --- pictures ---


class _Refused(ValueError):
    """A reason of our own; the name of the picture is put before it."""


def read_image(source: Any, name: str = "picture") -> PIL.Image.Image:
    """An upright picture of mode RGB, of a path, of a file's bytes, of a PIL image or of a uint8 H x W (x C) array.

    `name` is what an error calls a source that has no name. C is 1, 3 or 4 (RGBA). Files are read in the formats of
    `FORMATS`. Of a PIL image with several frames the present one is taken; such a file is refused, since somebody must
    choose. A picture of more pixels than `PIL.Image.MAX_IMAGE_PIXELS` is refused before it is decoded. Colour profiles
    are not applied. Needs `pip install pillow`.
    """
    Image = _pillow()
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
    elif isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or name
    with _reading(name):
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        if isinstance(source, (np.ndarray, Tensor)):
            return _upright_rgb(_of_array(source))
        if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
            raise _Refused(f"a {type(source).__name__} is no picture: give a path, bytes, a PIL image or a uint8 array")
        with _file(source) as file, _open(file) as opened:
            return _upright_rgb(opened)


def check_file(path: Path) -> None:
    """Refuses a file that is no picture, or not one of a sane size, as `read_image` does, by its header alone."""
    with _reading(str(path)), _file(path) as file, _open(file):
        pass


def pixels(images: Sequence[Any], spec: ImageSpec) -> Float[Tensor, "B 3 H W"]:
    """The pictures (whatever `read_image` reads) as a checkpoint wants them, bit for bit what its own processor gives.

    That is transformers' Pillow backend. All must come out of one size, which a `spec` with a crop or with a height
    and a width sees to. One picture is decoded at a time.
    """
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"pictures come in a list, and this is a {type(images).__name__}: put it in one")
    if not images:
        raise ValueError("no pictures: give at least one")
    table = levels(spec)
    out = np.empty((0, 3, 0, 0), np.float32)
    for i, source in enumerate(images):
        name = str(source) if isinstance(source, (str, os.PathLike)) else f"picture {i}"
        fitted = _fitted(read_image(source, name), spec, name)
        if i == 0:
            out = np.empty((len(images), 3, *fitted.shape[:2]), np.float32)
        if fitted.shape[:2] != out.shape[2:]:
            (h, w), (first_h, first_w) = fitted.shape[:2], out.shape[2:]
            raise ValueError(
                f"picture {i} comes out as {h} x {w} (height x width) and the first as {first_h} x {first_w}: this "
                "checkpoint resizes to no one size, so give those of a size together"
            )
        for c in range(3):
            np.take(table[c], fitted[..., c], out=out[i, c], mode="clip")
    return torch.from_numpy(out)


def levels(spec: ImageSpec) -> Float[np.ndarray, "3 256"]:
    """What each of a channel's 256 values becomes."""
    values = np.arange(256) * spec.rescale  # in double precision, as published
    channels = np.array([spec.mean, spec.std], np.float32)[..., None]
    return (values.astype(np.float32) - channels[0]) / channels[1]


def _fitted(image: PIL.Image.Image, spec: ImageSpec, name: str) -> UInt8[np.ndarray, "H W 3"]:
    """Resized and cropped."""
    Image = _pillow()
    width, height = image.size
    if isinstance(spec.size, int):  # a long and narrow picture may become a giant
        edge, short = spec.size, min(width, height)
        height, width = (edge if side == short else int(edge * side / short) for side in (height, width))
    elif spec.size is not None:
        height, width = spec.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{name}: {image.size[0]} x {image.size[1]} pixels, scaled to a shortest edge of {spec.size}, are "
            f"{width} x {height}, more than PIL.Image.MAX_IMAGE_PIXELS ({Image.MAX_IMAGE_PIXELS}): cut it before"
        )
    array = np.asarray(image.resize((width, height), Image.Resampling(RESAMPLES.index(spec.resample))))
    return array if spec.crop is None else _middle(array, *spec.crop)


def _middle(array: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """The middle of a picture; of an odd rest, more is cut at the end, and more is black at the beginning."""
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    inside = array[max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    if inside.shape[:2] == (height, width):
        return inside
    out = np.zeros((height, width, 3), np.uint8)
    top, left = max(-top, 0), max(-left, 0)
    out[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return out


def _file(source: Any) -> io.BufferedIOBase:
    """The bytes of a picture, to be closed by us: Pillow leaves a file open where it gives up."""
    file: io.BufferedIOBase
    if not isinstance(source, (str, os.PathLike)):
        size, file = len(source), io.BytesIO(source)
    else:
        path = Path(source)
        if not path.is_file():  # a pipe would be waited for
            what = "a folder" if path.is_dir() else "no such file"
            raise _Refused(f"{what}; nothing is fetched, so download it first" if "://" in str(source) else what)
        size, file = path.stat().st_size, path.open("rb")
    if size == 0:
        file.close()
        raise _Refused("an empty file")
    return file


def _open(file: io.BufferedIOBase) -> PIL.Image.Image:
    """A picture whose header was read, if it is a still one of a sane size."""
    Image = _pillow()
    Image.init()  # else Pillow does not know all of its formats
    image = Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    limit, (width, height) = Image.MAX_IMAGE_PIXELS, image.size
    if limit is not None and width * height > limit:
        raise _Refused(f"{width} x {height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS ({limit}); raise that")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's, whose first picture is the photo
        raise _Refused("it has several frames or pages: choose one (PIL.Image.open, seek, copy) and give that")
    return image


def _upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    Image = _pillow()
    if 0 in image.size:
        raise _Refused(f"{image.size[0]} x {image.size[1]} pixels: there is nothing to see")
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
    if image.mode in THIRTY_TWO_BITS:
        raise _Refused(f"mode {image.mode} (32 bits) does not say what is white: convert it to 8 bits before")
    if image.mode in SIXTEEN_BITS:
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.mode in TRANSPARENT or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _of_array(array: np.ndarray | Tensor) -> PIL.Image.Image:
    shape = tuple(array.shape)
    if str(array.dtype).removeprefix("torch.") != "uint8":
        raise _Refused(f"an array of {array.dtype}: give uint8, 0 to 255")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[-1] not in (1, 3, 4)):
        hint = "; permute(1, 2, 0) brings the channels last" if len(shape) == 3 and shape[0] in (1, 3, 4) else ""
        raise _Refused(f"an array of shape {shape}: give height x width, or height x width x 1, 3 or 4{hint}")
    if 0 in shape:
        raise _Refused(f"an array of shape {shape}: there is nothing to see")
    values = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    return _pillow().fromarray(np.ascontiguousarray(values[..., 0] if shape[2:] == (1,) else values))


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Whatever goes wrong with a picture is one line that names it. Decoders raise whatever they like."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except _Refused as error:
        raise ValueError(f"{name}: {error}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not a picture, or in no format that is read ({', '.join(FORMATS)})") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: cannot be read as a picture ({reason})") from None


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("pictures are read by Pillow: pip install pillow") from None
    return Image
