"""Time the way from a video file to patches: the core's, vLLM's loaders' and transformers' processor's, in one run.

    python kernels/bench/video.py [--save]      in an environment with vLLM; torchvision and torchcodec where they load

Each of them runs in its own process, on the same two H.264 files of 1280 × 720 pixels at 30 frames a second, of which
two frames a second are used. The figures are how many frames of the file are handled in a second (best of two runs),
and the peak of the memory that the process took beyond what it had once the file was in memory. vLLM's loaders only
decode; its fused processor makes the patches.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import av
import numpy as np
from bench.kept import keep, machine
from bench.media import declare_torchvision_operators, fused_processor
from PIL import Image

from k26_plugins.common.multimodal.image import MediaConfig
from k26_plugins.common.multimodal.video import read_chunks

SIZE, RATE, USED = (1280, 720), 30, 2
SECONDS = (10, 30)
RUNS = 2


def make_file(file: Path, seconds: int) -> None:
    """Write a video of a moving picture with noise that does not repeat: about 7 Mbit a second, as cameras write."""
    width, height = SIZE
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 24, (height, width, 3), dtype=np.uint8)
    ground = np.asarray(Image.effect_noise((64, 36), 90).resize((2 * width, height)).convert("RGB")) // 2
    with av.open(str(file), "w") as output:
        stream: Any = output.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(seconds * RATE):
            start = index * 4 % width
            frame = ground[:, start : start + width] + np.roll(noise, rng.integers(0, width, 2), axis=(0, 1))
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())


def core(data: bytes) -> Any:
    """Return the patches that the core makes of a video file."""
    return [chunk.patches for chunk in read_chunks(data, MediaConfig())]


def vllm_frames(codec: str) -> Callable[[bytes], Any]:
    """Return the function by which vLLM's loader decodes the frames of a video file. codec: the loader's backend."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    loader = VIDEO_LOADER_REGISTRY.load("opencv")
    return lambda data: np.asarray(loader.load_bytes(data, fps=USED, backend=codec)[0])


def vllm_patches(codec: str) -> Callable[[bytes], Any]:
    """Return the function by which vLLM's loader and its fused processor make patches of a video file."""
    load, processor, size = vllm_frames(codec), fused_processor(), MediaConfig().temporal_merge_kernel_size

    def patches(data: bytes) -> Any:
        frames = [Image.fromarray(frame) for frame in load(data)]
        chunks = [frames[start : start + size] for start in range(0, len(frames), size)]
        media = [{"type": "video_chunk", "video_chunk": chunk} for chunk in chunks]
        return processor.preprocess(media, do_rescale=False, do_normalize=False)["pixel_values"]

    return patches


def transformers_patches() -> Callable[[bytes], Any]:
    """Return the function by which transformers makes patches of a video file: float32, since it always normalizes."""
    from transformers.models.kimi_k25.video_processing_kimi_k25 import Kimi_K25VideoProcessor

    processor = Kimi_K25VideoProcessor()

    def patches(data: bytes) -> Any:
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            file.write(data)
            file.flush()
            return processor([file.name], return_tensors="pt", fps=USED)["pixel_values_videos"]

    return patches


CONTENDERS: dict[str, tuple[str, Callable[[], Callable[[bytes], Any]]]] = {
    "core (PyAV), patches": ("av", lambda: core),
    "vLLM opencv, frames": ("vllm", lambda: vllm_frames("opencv")),
    "vLLM opencv + fused, patches": ("vllm", lambda: vllm_patches("opencv")),
    "vLLM torchcodec, frames": ("torchcodec", lambda: vllm_frames("torchcodec")),
    "vLLM torchcodec + fused, patches": ("torchcodec", lambda: vllm_patches("torchcodec")),
    "transformers torchcodec, float32 patches": ("torchvision", transformers_patches),
}


def measure(name: str, file: Path) -> dict[str, float]:
    """Run a contender in this process, and return its elapsed seconds, its CPU seconds and its megabytes."""
    declare_torchvision_operators()
    run = CONTENDERS[name][1]()
    data = file.read_bytes()
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    clocks, cpus = [], []
    for _ in range(RUNS):
        start, used = time.perf_counter(), time.process_time()
        run(data)
        clocks.append(time.perf_counter() - start)
        cpus.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": min(clocks), "cpu_seconds": min(cpus), "megabytes": (peak - before) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the results beside this file, named by date and CPU")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    here = machine()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], Path(arguments.one[1]))))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for seconds in SECONDS:
            file = Path(folder) / f"{seconds}.mp4"
            make_file(file, seconds)
            print(f"{seconds} s, {seconds * RATE} frames, {seconds * USED} used, {file.stat().st_size / 1e6:.1f} MB")
            for name, (needed, _) in CONTENDERS.items():
                if find_spec(needed) is None:
                    print(f"  {name:42} not here: no {needed}")
                    continue
                command = [sys.executable, __file__, "--one", name, str(file)]
                run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLLM_PLUGINS": ""})
                if run.returncode:
                    print(f"  {name:42} failed: {run.stderr.strip().splitlines()[-1]}")
                    continue
                found = json.loads(run.stdout.splitlines()[-1])
                rate = round(seconds * RATE / found["seconds"])
                results.append({"video_seconds": seconds, "who": name, "frames_per_second": rate, **found})
                print(
                    f"  {name:42} {rate:6,} frames/s  {found['cpu_seconds']:6.2f} s of all cores  "
                    f"{found['megabytes']:6,.0f} MB"
                )
    if arguments.save:
        keep("video", {"machine": here, "size": SIZE, "results": results})


if __name__ == "__main__":
    main()
