"""SGLang's LoRA without a driver: it pins host memory whatever the device, which without one is an error.

A plugin of the tests' own, in each process of the server. Memory that is not pinned has the same contents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def register() -> None:
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
