"""Which layers of a model have the core's INT4 experts, and how an engine's quantization configuration answers with them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from k26_plugins.common.adapters.engine import UnsupportedEngineError
from k26_plugins.common.experts.base import LayerSizes
from k26_plugins.common.experts.tuned import backend_for, installed_engine
from k26_plugins.common.settings import ENGINE


def require_config(quant_config: Any, expected: type, engine: str, remedy: str) -> None:
    """Raises UnsupportedEngineError, with the remedy, where an engine has read the INT4 checkpoint as something else.

    engine: with its version.
    """
    if not isinstance(quant_config, expected):
        raise UnsupportedEngineError(
            f"{engine} read the INT4 checkpoint as {type(quant_config).__name__}, expected "
            f"{expected.__name__}: {remedy}."
        )


def answer_with(quant_config: Any, method: str, ours: Callable[[Any], Any]) -> None:
    """Have `quant_config.method(layer, …)` give what `ours(layer)` does, and its own answer where that is None.

    The object's class is replaced by a subclass of its own: the one of another model in the process keeps its.
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
    """The core's backend for a layer; None where the layer is left to the engine.

    chosen: a backend's name, ENGINE for the engine's, or `auto`. by_name: no others may take the core's place, whatever was
    measured to be faster. So sizes are not asked for then: a layer that is never loaded, as of a server of encoders, is on
    no device. distribution: the engine's. serves: whether a backend serves the layer, which says why not.

    Raises OutcomeError as `backend_for`.
    """
    if chosen == "auto" and not by_name:
        chosen = backend_for(chosen, sizes(), installed_engine(distribution), logger)
    return chosen if chosen != ENGINE and serves(chosen) else None


@cache
def core_serves_layer(logger: logging.Logger, engine: str, backend_name: str, reason: str | None) -> bool:
    """Whether the core's experts take a layer, which is said once: every layer of a model has the same to say.

    reason: why they cannot, None where they can.
    """
    if reason is None:
        logger.info("k26-plugins: INT4 experts run on the core (%s).", backend_name)
        return True
    logger.warning("k26-plugins: %s's own INT4 experts are kept; the core's cannot serve here: %s.", engine, reason)
    return False
