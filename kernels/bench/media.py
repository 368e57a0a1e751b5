"""Time how the core, vLLM's fused processor and transformers' own make patches of images and video frames, in one run.

    python kernels/bench/media.py [--save]      in an environment with vLLM, or with torchvision, or with both

Each figure is the best of several runs on the same pixels, in which the processors take turns; decoding is left out.
The bytes of the core and of vLLM's processor are compared first, and have to be equal. transformers' processor resizes
by torchvision, whose pixels differ by one level, and gives float32 only. PyPI has torchvision only as a CUDA build;
with a CPU torch its Python part is enough:

    pip install --no-deps --target tv torchvision==0.28.0 && PYTHONPATH=tv python kernels/bench/media.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
from bench.kept import keep, machine
from PIL import Image

from k26_plugins.common.multimodal.image import MediaConfig
from k26_plugins.common.multimodal.processor import MediaProcessor

CASES = {
    "image 640x480": ([(640, 480)], 1),
    "image 1920x1080": ([(1920, 1080)], 1),
    "image 3840x2160": ([(3840, 2160)], 1),
    "8 images 1280x720": ([(1280, 720)] * 8, 1),
    "video chunk, 4 frames 1280x720": ([(1280, 720)], 4),
}
RUNS = 9


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    """Return an image of random pixels. size: width and height."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def best(functions: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Return each function's elapsed seconds and CPU seconds, the least of several runs; the functions take turns."""
    found = {name: (float("inf"), float("inf")) for name in functions}
    for _ in range(RUNS):
        for name, function in functions.items():
            start, used = time.perf_counter(), time.process_time()
            function()
            clock, cpu = found[name]
            found[name] = min(clock, time.perf_counter() - start), min(cpu, time.process_time() - used)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write the results beside this file, named by date and CPU")
    arguments = parser.parse_args()
    here = machine()
    settings: dict[str, Any] = {"media_proc_cfg": {"config_type": "MoonViTMediaProcessorConfig", **_settings()}}
    declare_torchvision_operators()
    core = MediaProcessor(settings)
    fused = fused_processor() if find_spec("vllm") else None
    transformers = _transformers() if find_spec("torchvision") else None
    results = []
    for name, (sizes, frames) in CASES.items():
        if frames == 1:
            media: list[dict[str, Any]] = [
                {"type": "image", "image": noise(size, index)} for index, size in enumerate(sizes)
            ]
        else:
            media = [{"type": "video_chunk", "video_chunk": [noise(sizes[0], index) for index in range(frames)]}]
        for normalized in (False, True):
            functions: dict[str, Callable[[], Any]] = {"core": partial(core.preprocess, media, do_normalize=normalized)}
            if fused is not None:
                functions["vllm_fused"] = partial(
                    fused.preprocess, media, do_rescale=normalized, do_normalize=normalized
                )
                ours, theirs = (function()["pixel_values"].numpy().tobytes() for function in functions.values())
                if ours != theirs:
                    raise SystemExit(f"{name}: the core's bytes are not vLLM's.")
            if transformers is not None and normalized:
                of_images, of_videos = transformers
                if frames == 1:
                    images = [medium["image"] for medium in media]
                    functions["transformers"] = partial(of_images, images, return_tensors="pt")
                else:
                    clip = np.stack([np.asarray(frame) for frame in media[0]["video_chunk"]])
                    functions["transformers"] = partial(of_videos, [clip], do_sample_frames=False)
            seconds = best(functions)
            count = len(sizes) * frames
            rates = {key: round(count / clock, 1) for key, (clock, _) in seconds.items()}
            cores = {key: round(1000 * cpu / count, 2) for key, (_, cpu) in seconds.items()}
            kind = "float32" if normalized else "uint8"
            results.append({"case": name, "output": kind, "frames_per_second": rates, "cpu_ms_per_frame": cores})
            print(f"{name:32} {kind:8}", "  ".join(f"{key} {rates[key]:8.1f}/s {cores[key]:7.2f} ms" for key in rates))
    if arguments.save:
        rivals = {"vllm": fused, "transformers": transformers}
        judge = "-".join(name for name, rival in rivals.items() if rival is not None)
        keep(f"media-{judge}", {"machine": here, "results": results})


def fused_processor() -> Any:
    """Return vLLM's fused processor for this model."""
    from vllm.transformers_utils.processors.kimi_k25_vision_fused import KimiK25FusedVisionProcessor

    return KimiK25FusedVisionProcessor(_settings())


def declare_torchvision_operators() -> None:
    """Declare torchvision's operators, so that its Python part can be imported if its compiled operators do not load.

    Nothing here uses these operators. Call this before vLLM is imported: vLLM imports transformers, which imports
    torchvision if it is installed.
    """
    if find_spec("torchvision") is not None and torch.version.cuda is None and "+cpu" not in version("torchvision"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


# torch drops the declarations of a library object that nothing refers to.
_libraries: list[torch.library.Library] = []


def _transformers() -> tuple[Any, Any]:
    """Return transformers' processors for images and for videos."""
    from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor
    from transformers.models.kimi_k25.video_processing_kimi_k25 import Kimi_K25VideoProcessor

    return Kimi_K25ImageProcessor(), Kimi_K25VideoProcessor()


def _settings() -> dict[str, Any]:
    """Return the published settings of preprocessing as vLLM's fused processor takes them."""
    config = MediaConfig()
    names = ("in_patch_limit", "patch_size", "merge_kernel_size", "fixed_output_tokens", "patch_limit_on_one_side",
             "in_patch_limit_each_frame", "in_patch_limit_video", "temporal_merge_kernel_size")  # fmt: skip
    return {**{name: getattr(config, name) for name in names}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


if __name__ == "__main__":
    main()
