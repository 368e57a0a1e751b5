"""Decides which layers of a model get the core's INT4 experts, and has an engine's quantization configuration give
them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from k26_plugins.common.adapters.engine import UnsupportedEngineError
from k26_plugins.common.experts.base import LayerSizes
from k26_plugins.common.experts.tuned import backend_for, installed_engine
from k26_plugins.common.settings import ENGINE


def require_config(quant_config: Any, expected: type, engine: str, remedy: str) -> None:
    """Raise UnsupportedEngineError if an engine has read the INT4 checkpoint as another quantization than expected.

    engine: the engine's name and version for the message. remedy: what the message advises.
    """
    if not isinstance(quant_config, expected):
        raise UnsupportedEngineError(
            f"{engine} read the INT4 checkpoint as {type(quant_config).__name__}, expected "
            f"{expected.__name__}: {remedy}."
        )


def answer_with(quant_config: Any, method: str, ours: Callable[[Any], Any]) -> None:
    """Have `quant_config.method(layer, …)` return `ours(layer)`, or the engine's own answer where `ours` returns None.

    The object gets a class of its own, derived from its old one, so that the configuration of another model in the same
    process stays as it is.
    """
    kept = type(quant_config)

    def answer(self: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        found = ours(layer)
        return getattr(kept, method)(self, layer, *args, **kwargs) if found is None else found

    quant_config.__class__ = type("K26QuantConfig", (kept,), {method: answer})


def backend_of_layer(
    chosen: str,
    sizes: Callable[[], LayerSizes],
    distribution: str,
    logger: logging.Logger,
    *,
    by_name: bool,
    serves: Callable[[str], bool],
) -> str | None:
    """Return the name of the core's backend for a layer, or None if the layer is left to the engine.

    chosen: a backend's name, ENGINE for the engine's own experts, or `auto`. sizes: returns the layer's sizes; with
    `by_name` it is not called, because a layer that is never loaded (that of a server of the encoder alone) is on no
    device. distribution: the engine's distribution. by_name: whether the engine's experts may not take the core's
    place, whatever was measured to be faster. serves: returns whether a backend can serve the layer, and logs why it
    cannot.

    Raises OutcomeError as `backend_for` does.
    """
    if chosen == "auto" and not by_name:
        chosen = backend_for(chosen, sizes(), installed_engine(distribution), logger)
    return chosen if chosen != ENGINE and serves(chosen) else None


@cache
def core_serves_layer(
    logger: logging.Logger, engine: str, backend_name: str, device: torch.device, reason: str | None
) -> bool:
    """Return whether the core's experts take a layer, and log the decision.

    The function is cached, so that a decision that all layers of a model share is logged once. reason: why the core's
    experts cannot serve the layer, None if they can. Layers on the meta device are never loaded, so nothing is logged of
    them.
    """
    if reason is None:
        if device.type != "meta":
            logger.info("k26-plugins: INT4 experts run on the core (%s).", backend_name)
        return True
    logger.warning("k26-plugins: %s's own INT4 experts are kept; the core's cannot serve here: %s.", engine, reason)
    return False
