"""Draw what the model sees of an image or a video: its frames as they were cut into patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

_THUMBNAIL = 320
_LABEL = 16
_COLUMNS = 4
_GAP = 4


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of the sheet, with its label."""

    label: str
    image: Image.Image


def unpatchify(patches: npt.NDArray[np.uint8], grid_thw: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Join patches, uint8 `[t · h · w, 3, patch, patch]`, to frames, uint8 `[t, h · patch, w · patch, 3]`.

    The frames include the padding. grid_thw: (t, h, w), the number of frames and of rows and columns of patches.
    """
    frames, grid_h, grid_w = grid_thw
    patch = patches.shape[-1]
    cut = patches.reshape(frames, grid_h, grid_w, 3, patch, patch)
    return cut.transpose(0, 1, 4, 2, 5, 3).reshape(frames, grid_h * patch, grid_w * patch, 3)


def thumbnail(pixels: npt.NDArray[np.uint8], label: str) -> Frame:
    """Shrink a frame, uint8 `[H, W, 3]`, so that it can be shown beside others."""
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return Frame(label, image)


def contact_sheet(frames: Sequence[Frame]) -> Image.Image:
    """Draw the frames row by row, four in a row, each with its label above it. At least one frame is needed."""
    columns = min(_COLUMNS, len(frames))
    width = max(frame.image.width for frame in frames)
    height = max(frame.image.height for frame in frames) + _LABEL
    rows = math.ceil(len(frames) / columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, frame in enumerate(frames):
        left = _GAP + number % columns * (width + _GAP)
        top = _GAP + number // columns * (height + _GAP)
        draw.text((left, top), frame.label, fill="black")
        sheet.paste(frame.image, (left, top + _LABEL))
    return sheet
