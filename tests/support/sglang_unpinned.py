"""Lets SGLang's LoRA run without a GPU's driver, by never pinning host memory.

SGLang's LoRA pins host memory whatever the device, which is an error without a driver; memory that is not pinned has
the same contents. Every process of the server loads this test plugin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def register() -> None:
    """Make torch ignore every request for pinned memory."""
    import torch

    def unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def wrapped(*args: Any, **options: Any) -> torch.Tensor:
            options.pop("pin_memory", None)
            return make(*args, **options)

        return wrapped

    for name in ("tensor", "empty", "zeros"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor, *args: tensor  # type: ignore[method-assign]
