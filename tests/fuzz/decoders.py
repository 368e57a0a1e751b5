"""Files that no encoder wrote, through the decoders' front: each is shown to the model or is a MediaError.

    python tests/fuzz/decoders.py image --seconds 60      (or: video)

atheris changes valid tiny files of every format; it follows the coverage of the core's and Pillow's Python, the native
decoders it only feeds. Anything else than MediaError, a segmentation fault, 2 GB of memory or 20 s for one input ends the
run with a message and the input's file, which `--again FILE` feeds once more. Needs `pip install -e ".[fuzz]"`.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris

os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder's errors only

sys.path[:0] = [str(Path(__file__).parents[1])]
with atheris.instrument_imports(include=["k26_plugins.common", "PIL"]):
    from PIL import Image
    from support.images import gif_header, png_header, random_image
    from support.videos import make_video

    from k26_plugins.common.multimodal.image import MediaConfig, MediaError, open_image, preprocess
    from k26_plugins.common.multimodal.video import read_chunks

CONFIG = MediaConfig()
# Large enough for every limit to matter, small enough for many inputs in a second.
MAX_PIXELS, MAX_TOKENS = 1_000_000, 500
IMAGES = {
    "PNG": ("RGB", "RGBA", "P", "L", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "P"),
    "TIFF": ("RGB", "L", "I;16"),
    "AVIF": ("RGB",),
    "JPEG2000": ("RGB",),
    "TGA": ("RGB",),
    "PPM": ("RGB",),
    "ICO": ("RGBA",),
    "PCX": ("RGB",),
    "SGI": ("RGB",),
}
VIDEOS = [
    ("mp4", "mpeg4"), ("mp4", "libx264"), ("mp4", "libx265"), ("mp4", "libsvtav1"), ("mov", "libx264"), ("webm", "libvpx"),
    ("webm", "libvpx-vp9"), ("matroska", "ffv1"), ("avi", "mpeg4"), ("mpegts", "mpeg2video"), ("mpeg", "mpeg1video"),
    ("flv", "flv"), ("ogg", "libvpx"), ("3gp", "h263"),
]  # fmt: skip


def image_files() -> Iterator[bytes]:
    for kind, modes in IMAGES.items():
        for mode in modes:
            picture = Image.new(mode, (12, 9), 40000) if mode == "I;16" else random_image(12, 9).convert(mode)
            buffer = io.BytesIO()
            picture.save(buffer, kind)
            yield buffer.getvalue()
    yield from (png_header(30_000, 30_000), gif_header(65_535, 65_535))


def video_files() -> Iterator[bytes]:
    for container, codec in VIDEOS:
        size = {"h263": (128, 96), "mpeg2video": (64, 48)}.get(codec, (32, 32))
        yield make_video(30 if container.startswith("mpeg") else 5, 25, size, container, codec)
    buffer = io.BytesIO()
    first, *others = [random_image(16, 16, seed).convert("P") for seed in range(4)]
    first.save(buffer, "GIF", save_all=True, append_images=others)
    yield buffer.getvalue()


def show_image(data: bytes) -> None:
    preprocess([[open_image(data, MAX_PIXELS)]], CONFIG)


def show_video(data: bytes) -> None:
    for _ in read_chunks(data, CONFIG, MAX_TOKENS):
        pass


KINDS: dict[str, tuple[Callable[[], Iterator[bytes]], Callable[[bytes], None]]] = {
    "image": (image_files, show_image),
    "video": (video_files, show_video),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seconds", type=int, default=60, help="how long; 60")
    parser.add_argument("--seed", type=int, default=1, help="of the changes; 1")
    parser.add_argument("--again", type=Path, help="feed this file once, and no other")
    arguments = parser.parse_args()
    files, show = KINDS[arguments.kind]

    def feed(data: bytes) -> None:
        try:
            show(data)
        except MediaError:
            return

    if arguments.again:
        feed(arguments.again.read_bytes())
        return
    warnings.simplefilter("ignore")  # Pillow's, of damaged TIFF files
    with tempfile.TemporaryDirectory() as folder:
        whole = list(files())
        for number, data in enumerate(whole):
            (Path(folder) / f"{number:02d}").write_bytes(data)

        def change(data: bytes, max_size: int, seed: int) -> bytes:
            """Change few bytes of a whole file half of the time: what libFuzzer makes seldom gets past a container's
            header."""
            rng = random.Random(seed)
            if rng.random() < 0.5:
                return atheris.Mutate(data, max_size)
            changed = bytearray(rng.choice(whole))
            for _ in range(rng.randint(1, 8)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            return bytes(changed)

        limits = [
            f"-max_total_time={arguments.seconds}",
            f"-seed={arguments.seed}",
            "-timeout=20",
            "-rss_limit_mb=2048",
        ]
        options = [*limits, "-max_len=20000", "-print_final_stats=1", "-verbosity=0"]
        atheris.Setup([sys.argv[0], folder, *options], feed, custom_mutator=change)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
