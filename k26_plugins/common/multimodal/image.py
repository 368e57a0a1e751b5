"""Turn images and video frames into the input of the vision tower: resize, pad, cut into patches, count tokens.

The arithmetic equals that of the model's own preprocessing to the byte: NaViT resize, PIL's bicubic filter, and padding
at the right and the bottom before normalization.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

# PIL's limit for decompression bombs, 2 × 89 million pixels. The largest image that is not shrunk has 51 million.
MAX_PIXELS = 178_956_970
TIMESTAMP_MODES = ("hh:mm:ss.fff", "mm:ss.fff", "mm:ss")
_MAX_THREADS = 4
_PIECE = 2**20


class MediaError(ValueError):
    """An image or a video that cannot be shown to the model. The message tells the client what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaConfig:
    """The settings under `media_proc_cfg` in the checkpoint's preprocessor_config.json."""

    patch_size: int = 14
    merge_kernel_size: int = 2
    in_patch_limit: int = 16384
    """Most patches of an image, before padding."""
    in_patch_limit_each_frame: int | None = 4096
    """Most patches of a video frame; None means the limit of an image."""
    in_patch_limit_video: int | None = None
    """Most patches of all frames of a chunk together; None means no limit."""
    patch_limit_on_one_side: int = 512
    fixed_output_tokens: int | None = None
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    temporal_merge_kernel_size: int = 4
    """Frames of a video chunk; the last chunk may have fewer."""
    sample_fps: float = 2.0
    """Most frames that the model sees of each second of video."""
    timestamp_mode: str = "hh:mm:ss.fff"

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge_kernel_size", "in_patch_limit", "patch_limit_on_one_side"):
            self._require_positive(name)
        for name in ("in_patch_limit_each_frame", "in_patch_limit_video", "fixed_output_tokens"):
            if getattr(self, name) is not None:
                self._require_positive(name)
        self._require_positive("temporal_merge_kernel_size")
        if isinstance(self.sample_fps, bool) or not isinstance(self.sample_fps, int | float) or self.sample_fps <= 0:
            raise MediaError(
                f"preprocessor_config.json: sample_fps is {self.sample_fps!r}, expected a positive number."
            )
        if self.timestamp_mode not in TIMESTAMP_MODES:
            raise MediaError(
                f"preprocessor_config.json: timestamp_mode is {self.timestamp_mode!r}, expected one of "
                f"{', '.join(TIMESTAMP_MODES)}."
            )
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise MediaError(
                    f"preprocessor_config.json: {name} is {getattr(self, name)!r}, expected three numbers."
                )

    def _require_positive(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise MediaError(f"preprocessor_config.json: {name} is {value!r}, expected a positive integer.")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MediaConfig:
        """Read the mapping of a preprocessor_config.json. Raises MediaError."""
        media = config.get("media_proc_cfg")
        if not isinstance(media, Mapping):
            raise MediaError("preprocessor_config.json has no media_proc_cfg: take the file of the published model.")
        known = {item.name for item in fields(cls)}
        values = {name: value for name, value in media.items() if name in known}
        for name, value in values.items():
            if isinstance(value, list):
                values[name] = value[0] if name == "merge_kernel_size" else tuple(value)
        return cls(**values)

    @classmethod
    def from_path(cls, folder: str | Path) -> MediaConfig:
        """Read preprocessor_config.json in a checkpoint's folder. Raises MediaError."""
        file = Path(folder) / "preprocessor_config.json"
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError) as error:
            raise MediaError(f"{file} is not readable ({error}): download it again.") from error


@dataclass(frozen=True, slots=True)
class Resize:
    """How an image is resized: new size and padding in pixels, the grid of patches, and the tokens it takes."""

    width: int
    height: int
    pad_width: int
    pad_height: int
    grid_h: int
    grid_w: int
    num_tokens: int


def navit_resize(width: int, height: int, config: MediaConfig, patch_limit: int | None = None) -> Resize:
    """Compute the resize of an image of `width` × `height` pixels, which is shrunk to the limits but never enlarged.

    docs/model.md, 4.4 gives the rule. patch_limit: most patches, by default those of an image. Raises MediaError for an
    empty image.

    Examples:
        A Full HD image is not shrunk. It is padded to 1932 × 1092 pixels, which are 69 × 39 tokens of 28 × 28 pixels:

        >>> navit_resize(1920, 1080, MediaConfig())
        Resize(width=1920, height=1080, pad_width=12, pad_height=12, grid_h=78, grid_w=138, num_tokens=2691)
    """
    if width <= 0 or height <= 0:
        raise MediaError(f"the image is {width} × {height} pixels, expected at least 1 × 1.")
    patch, limit = config.patch_size, patch_limit or config.in_patch_limit
    longest = config.patch_limit_on_one_side * patch
    scale = min(
        1.0,
        math.sqrt(limit / (max(1.0, width // patch) * max(1.0, height // patch))),
        longest / width,
        longest / height,
    )
    new_width = min(max(1, int(width * scale)), longest)
    new_height = min(max(1, int(height * scale)), longest)
    factor = config.merge_kernel_size * patch
    pad_width, pad_height = -new_width % factor, -new_height % factor
    grid_h, grid_w = (new_height + pad_height) // patch, (new_width + pad_width) // patch
    merged = (grid_h // config.merge_kernel_size) * (grid_w // config.merge_kernel_size)
    tokens = config.fixed_output_tokens or merged
    return Resize(new_width, new_height, pad_width, pad_height, grid_h, grid_w, tokens)


def frame_resize(width: int, height: int, num_frames: int, config: MediaConfig) -> Resize:
    """Compute the resize of every frame in a video chunk of `num_frames` frames, from the size of its first frame.

    Raises MediaError for an empty frame.
    """
    limit = config.in_patch_limit_each_frame or config.in_patch_limit
    if config.in_patch_limit_video is not None:
        limit = min(round(config.in_patch_limit_video / num_frames), limit)
    return navit_resize(width, height, config, limit)


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to RGB; as in the reference, transparency is dropped and EXIF rotation is not applied.

    Levels of more than eight bits are scaled to 0..255, where the reference clips them to white or black. The number of
    pixels in the header is compared with `max_pixels` before anything is decoded. Raises MediaError.
    """
    try:
        with warnings.catch_warnings():
            # The limit below is the bomb check; PIL's warning would only repeat it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_formats())
            check_size(*image.size, max_pixels=max_pixels)
            return to_rgb(image)
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(f"the image has too many pixels: send one of at most {max_pixels:,}.") from error
    except UnidentifiedImageError as error:
        raise MediaError("the data is no image in a format that is known: send PNG, JPEG, WebP or GIF.") from error
    except Exception as error:  # what Pillow's decoders raise on damaged files has no common class
        raise MediaError(f"the image is damaged ({error}): send a whole file.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image in any of PIL's modes to RGB; levels of more than eight bits are scaled, not clipped."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_levels(np.asarray(image))).convert("RGB")
    return image.convert("RGB")


def _levels(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scale gray values `[height, width]` to 0..255.

    The range of the values is the format's: 16 bits for integers, 0 to 1 for floats. If a value lies outside that
    range, the format leaves the range open (32-bit integers, measurements), and the range is that of the values.
    """
    low, high = (0.0, 1.0) if values.dtype.kind == "f" else (0.0, 65535.0)
    shape, values = values.shape, values.ravel()
    known = np.isfinite(values)
    first = known.argmax()
    if known[first]:
        least, most = (reduce(where=known, initial=values[first]) for reduce in (values.min, values.max))
        if least < low or most > high:
            low, high = float(least), float(most)
    levels = np.empty(values.size, dtype=np.uint8)
    # The image is scaled in pieces, because in float64 a large image would take eight times its memory.
    for start in range(0, values.size, _PIECE):
        piece = slice(start, start + _PIECE)
        with np.errstate(invalid="ignore"):  # a damaged file may contain signalling NaNs
            wide = values[piece].astype(np.float64)
        # NaN becomes black; infinities become the brightest and the darkest level.
        scaled = np.nan_to_num(np.clip((wide - low) * (255 / ((high - low) or 1.0)), 0, 255))
        levels[piece] = np.rint(scaled)
    return levels.reshape(shape)


@cache
def _formats() -> list[str]:
    """Return all formats that Pillow reads except EPS.

    For EPS, Pillow starts Ghostscript, an interpreter of programs.
    """
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def check_size(width: int, height: int, kind: str = "image", max_pixels: int = MAX_PIXELS) -> None:
    """Raise MediaError for an image or a video without pixels, or with more than `max_pixels` in a frame.

    kind: `image` or `video`, for the message.
    """
    if width <= 0 or height <= 0:
        raise MediaError(f"the {kind} is {width} × {height} pixels, expected at least 1 × 1.")
    if width * height > max_pixels:
        raise MediaError(f"the {kind} is {width} × {height} pixels, expected at most {max_pixels:,} in all.")


def media_resize(frames: Sequence[Image.Image], config: MediaConfig, *, is_video: bool) -> Resize:
    """Compute the resize of a medium: an image (one frame) or a chunk of video frames. Raises MediaError."""
    check_size(*frames[0].size)
    if is_video:
        return frame_resize(*frames[0].size, len(frames), config)
    return navit_resize(*frames[0].size, config)


def patchify(frames: Sequence[Image.Image], resize: Resize, config: MediaConfig) -> npt.NDArray[np.uint8]:
    """Resize frames, pad them with 0 and cut them into patches.

    frames: of one size. resize: theirs, as `media_resize` returns it. Returns uint8
    `[frames · grid_h · grid_w, 3, patch, patch]`, frame by frame, row by row.
    """
    patch = config.patch_size
    size = (resize.width, resize.height)
    out = np.zeros((len(frames), resize.grid_h, resize.grid_w, 3, patch, patch), dtype=np.uint8)
    padded = np.zeros((resize.grid_h * patch, resize.grid_w * patch, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        rgb = frame if frame.mode == "RGB" else to_rgb(frame)
        padded[: resize.height, : resize.width] = np.asarray(rgb.resize(size, Image.Resampling.BICUBIC))
        out[index] = padded.reshape(resize.grid_h, patch, resize.grid_w, patch, 3).transpose(0, 2, 4, 1, 3)
    return out.reshape(-1, 3, patch, patch)


def normalize(patches: npt.NDArray[np.uint8], config: MediaConfig) -> npt.NDArray[np.float32]:
    """Return float32 (v / 255 − mean) / std of uint8 patches `[N, 3, patch, patch]`.

    Padding becomes (0 − mean) / std.
    """
    levels = np.arange(256, dtype=np.float32)[:, None] / np.float32(255.0)
    mean = np.asarray(config.image_mean, dtype=np.float32)
    # The reference multiplies by the reciprocal; for a std of 0.5 that gives the same bits as dividing.
    table = (levels - mean) * (np.float32(1.0) / np.asarray(config.image_std, dtype=np.float32))
    out = np.empty(patches.shape, dtype=np.float32)
    for channel in range(3):
        np.take(table[:, channel], patches[:, channel], out=out[:, channel])
    return out


def preprocess(
    media: Sequence[Sequence[Image.Image]], config: MediaConfig, *, is_video: Sequence[bool] | None = None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the patches of several media, each a list of frames (one for an image), and their grids.

    The patches are uint8 `[Σ t · h · w, 3, patch, patch]`, the grids (grid_thw) int64 `[num_media, 3]`. is_video: for
    each medium whether it is a chunk of video frames, by default none is. Threads process several media at the same
    time, since PIL's resize releases the interpreter's lock. Raises MediaError.
    """
    video = is_video or [False] * len(media)
    resizes = [media_resize(frames, config, is_video=flag) for frames, flag in zip(media, video, strict=True)]
    grids = np.array(
        [[len(frames), resize.grid_h, resize.grid_w] for frames, resize in zip(media, resizes, strict=True)],
        dtype=np.int64,
    ).reshape(-1, 3)
    if len(media) == 1:
        return patchify(media[0], resizes[0], config), grids
    with ThreadPoolExecutor(max_workers=_MAX_THREADS) as pool:
        parts = list(pool.map(lambda pair: patchify(pair[0], pair[1], config), zip(media, resizes, strict=True)))
    patch = config.patch_size
    return np.concatenate(parts) if parts else np.empty((0, 3, patch, patch), dtype=np.uint8), grids
