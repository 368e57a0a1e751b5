"""Kimi-K2.6's images in SGLang: the in-tree class, with the core's pixels on every device."""

from __future__ import annotations

from typing import Any

from k26_plugins.sglang import compat
from k26_plugins.sglang.models.kimi_k26 import KimiK25ForConditionalGeneration

_in_tree = compat.in_tree_media()

# 0.5.10 prepares images nowhere but in the processor, which is the core's.
if hasattr(_in_tree, "KimiGPUProcessorWrapper"):

    class CoreWrapper(_in_tree.KimiGPUProcessorWrapper):  # type: ignore[misc, name-defined]
        """Where there is a GPU the in-tree class resizes on it, by other arithmetic: pixels a few levels apart."""

        def _gpu_call(self, text: Any, images: Any, *args: Any) -> Any:
            return self._cpu_call(text, images, *args, return_tensors="pt")

    # The in-tree class builds it by this name, and copies it for its workers, before a subclass gets a word in.
    _in_tree.KimiGPUProcessorWrapper = CoreWrapper


class K26MediaProcessor(_in_tree.KimiK2_5VLImageProcessor):  # type: ignore[misc, name-defined]
    models = (KimiK25ForConditionalGeneration,)
    # A GPU's JPEG decoder gives other pixels than PIL, and a tensor where the core takes an image.
    gpu_image_decode = False
