"""INT4 experts behind one interface; `create_experts` is the one place where a backend is chosen."""

from __future__ import annotations

import logging
import time
from functools import cache
from importlib.metadata import entry_points

from k26_plugins.common import metrics
from k26_plugins.common.experts.base import (
    Batches,
    Expert,
    ExpertsBackend,
    ExpertsError,
    ExpertWeights,
    RoutedExperts,
    Sizes,
)
from k26_plugins.common.experts.cpu import CpuExperts
from k26_plugins.common.experts.native import NativeExperts
from k26_plugins.common.experts.reference import ReferenceExperts, reference_experts
from k26_plugins.common.experts.selftest import self_test_error
from k26_plugins.common.experts.triton import TritonExperts
from k26_plugins.common.model.int4 import GROUP_SIZE
from k26_plugins.common.settings import BACKENDS_GROUP, CORE_BACKENDS, backend_names

__all__ = [
    "BACKENDS",
    "Batches",
    "Expert",
    "ExpertWeights",
    "ExpertsBackend",
    "ExpertsError",
    "RoutedExperts",
    "create_experts",
    "find_backend",
    "place_memory",
    "reference_experts",
    "why_unsupported",
]

logger = logging.getLogger(__name__)

BACKENDS: dict[str, type[ExpertsBackend]] = dict(
    zip(CORE_BACKENDS, (TritonExperts, NativeExperts, CpuExperts, ReferenceExperts), strict=True)
)


def find_backend(name: str) -> type[ExpertsBackend]:
    """The backend of this name. Raises ExpertsError where there is none, or what it needs is not installed."""
    if name in BACKENDS:
        return BACKENDS[name]
    for point in entry_points(group=BACKENDS_GROUP):
        if point.name == name:
            try:
                found: type[ExpertsBackend] = point.load()
            except ImportError as error:
                raise ExpertsError(f"the experts backend {name!r} cannot be imported: {error}.") from error
            return found
    raise ExpertsError(f"no experts backend {name!r}: choose auto or one of {', '.join(backend_names())}.")


def why_unsupported(sizes: Sizes, backend: str = "auto") -> str | None:
    """Why no backend that `create_experts` may take supports experts of these sizes, or None: before they are loaded.

    On torch's meta device none is asked for: a part of the model that is never loaded, as of a server of encoders, lies
    there. Raises ExpertsError for a name that no backend has.
    """
    if sizes.device.type == "meta":
        return None
    if sizes.intermediate_size % GROUP_SIZE:
        return (
            f"tensor parallelism leaves {sizes.intermediate_size} of moe_intermediate_size on a rank, which is no multiple "
            f"of the INT4 group of {GROUP_SIZE}: choose a smaller tensor parallel size, or add expert parallelism"
        )
    refused: list[str] = []
    for candidate in _candidates(sizes, backend):
        reason = candidate.unsupported(sizes)
        if reason is None:
            return None
        refused.append(_refusal(candidate, reason))
    return "; ".join(refused) or f"there are none for {sizes.device}"


def place_memory(weights: ExpertWeights, backend: str = "auto") -> None:
    """Prepare the memory of weights that are yet to be loaded for the backend that `create_experts` will try first."""
    for candidate in _candidates(weights, backend):
        if candidate.unsupported(weights) is None:
            candidate.place(weights)
            return


def _candidates(sizes: Sizes, backend: str) -> list[type[ExpertsBackend]]:
    if backend != "auto":
        return [find_backend(backend)]
    return [one for one in BACKENDS.values() if one.device_type in (None, sizes.device.type)]


def _refusal(candidate: type[ExpertsBackend], reason: str) -> str:
    return f"{candidate.name} is not, because {reason.rstrip('.')}"


def create_experts(
    weights: ExpertWeights, backend: str = "auto", *, update: bool = False, batches: Batches | None = None
) -> ExpertsBackend:
    """Choose a backend for these weights and give them to it.

    `auto` takes the first that supports the weights on their device and passes the self-test with them; a backend that
    fails is named in a warning. A backend given by name is taken or refused, never replaced. update: these are new weights
    of a layer that is there. batches: for which the backend makes itself ready. Raises ExpertsError.
    """
    refused: list[str] = []
    for candidate in _candidates(weights, backend):
        reason = candidate.unsupported(weights)
        if reason is None:
            began = time.perf_counter()
            error, reason = _self_test(candidate, weights)
            seconds = time.perf_counter() - began
            if reason is None and batches is not None:
                reason = _make_ready(candidate, weights, batches)
            if reason is None:
                metrics.experts_loaded(candidate.name, error, seconds, update=update)
                if refused:
                    _warn_once(f"experts backend {candidate.name} is used: {'; '.join(refused)}")
                return candidate.load(weights)
        refused.append(_refusal(candidate, reason))
    raise ExpertsError(
        f"no experts backend can be used on {weights.device}: {'; '.join(refused)}. Serving would give garbage. "
        f"Check the checkpoint with `k26 check`, and report this with the device's name."
    )


@cache
def _warn_once(message: str) -> None:
    """Every layer of a model has the same to say."""
    logger.warning(message)


def _self_test(candidate: type[ExpertsBackend], weights: ExpertWeights) -> tuple[float, str | None]:
    """The error, and why a backend must not serve these weights, naming the device and the error, or None."""
    try:
        error = self_test_error(candidate, weights)
    except Exception as failure:  # whatever a compiler or a driver raises: the next backend may still serve
        return float("inf"), f"its self-test on {weights.device} ended with {type(failure).__name__}: {failure}"
    limit = candidate.tolerance
    if error <= limit:
        return error, None
    return error, f"it failed the self-test on {weights.device}, relative error {error:.3g} (limit {limit:g})"


def _make_ready(candidate: type[ExpertsBackend], sizes: Sizes, batches: Batches) -> str | None:
    """Why a backend's kernels cannot serve batches of every size, or None."""
    try:
        candidate.make_ready(sizes, batches)
    except Exception as failure:  # as in the self-test, of a size that it does not reach
        return f"its kernels cannot be compiled for {sizes.device}: {type(failure).__name__}: {failure}"
    return None
