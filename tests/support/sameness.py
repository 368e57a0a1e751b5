"""Holds images and texts that every engine must turn into the same pixels and token ids, and reads what vLLM gave.

`recorded.json` was written in vLLM's environment by `python tests/support/sameness.py`. Its pixels and grids come from
vLLM's own processor, without the plugin; its token ids come from the tokenizer that the vLLM adapter gives vLLM.
tests/vllm compares vLLM with it, and tests/sglang compares SGLang.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RECORDED = Path(__file__).parent.parent / "sameness" / "recorded.json"
SIZES = [(1, 1), (27, 29), (80, 60), (640, 480), (1000, 700), (333, 1777), (20, 3000), (3840, 2160)]
TEXTS = [
    "Hello, world!",
    "中文English混合, I'm 1234567890\r\n  x",
    "Ünï ÇODE's été — ΑΒΓ дом",
    "def f(x):\n\treturn x  # 🙂\n",
    "日本語テキスト한국어",
]


def image_of(size: tuple[int, int]) -> Image.Image:
    """Return an image, of width × height, whose pixels are the same in every environment, since NumPy promises to keep
    the numbers of this generator."""
    generator = np.random.RandomState(size[0] * 10007 + size[1])
    return Image.fromarray(generator.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def media_line(pixel_values: Any, grid_thw: Any) -> dict[str, Any]:
    """Return what the file holds for one image. pixel_values: float32 `[patches, 3, 14, 14]`."""
    pixels = np.ascontiguousarray(pixel_values, dtype=np.float32)
    return {"sha256": hashlib.sha256(pixels.tobytes()).hexdigest(), "grid_thw": np.asarray(grid_thw).tolist()}


def recorded() -> dict[str, Any]:
    """Return what vLLM gave: under `media` by the image's size, under `prompts` by the text."""
    content: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return content


def from_vllm(folder: Path) -> dict[str, Any]:
    """Return what vLLM gives, to be recorded; runs in vLLM's environment. folder: the tiny checkpoint's."""
    from vllm.transformers_utils.processors.kimi_k25_vision_fused import KimiK25FusedVisionProcessor

    from k26_plugins.vllm.tokenizer import K26Tokenizer

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    processor = KimiK25FusedVisionProcessor(settings["media_proc_cfg"])
    media = {}
    for size in SIZES:
        found = processor.preprocess([{"type": "image", "image": image_of(size)}], do_rescale=True, do_normalize=True)
        media[f"{size[0]}x{size[1]}"] = media_line(found["pixel_values"], found["grid_thws"][0])
    tokenizer = K26Tokenizer.from_pretrained(folder)
    prompts = {
        text: tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        for text in TEXTS
    }
    return {"media": media, "prompts": prompts}


if __name__ == "__main__":
    import tempfile

    from k26_plugins.common.tiny.checkpoint import make_tiny

    with tempfile.TemporaryDirectory() as scratch:
        make_tiny(Path(scratch) / "tiny")
        RECORDED.parent.mkdir(exist_ok=True)
        RECORDED.write_text(json.dumps(from_vllm(Path(scratch) / "tiny"), indent=1, ensure_ascii=False) + "\n")
