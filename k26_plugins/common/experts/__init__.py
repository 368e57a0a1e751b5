"""Offer every backend of INT4 experts behind one interface; `create_experts` is the only place that chooses one."""

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
    """Return the backend of this name: one of the core's, or an installed package's entry point.

    Raises ExpertsError if no backend has this name, or if its package cannot be imported.
    """
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
    """Return why no backend that `create_experts` may take supports experts of these sizes, or None if one does.

    The weights need not exist yet. On torch's meta device the answer is None: only a part of the model that is never
    loaded lies there, as in a server that runs the encoders alone. Raises ExpertsError for a name that no backend has.
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
    """Choose a backend for these weights and load them into it.

    `auto` takes the first backend that supports the weights on their device and passes the self-test with them; a
    warning names each backend that was refused. A backend given by name is taken or refused, never replaced.

    update: whether these are new weights of a layer that was loaded before. batches: the batches for which the backend
    compiles its kernels; if None, it compiles nothing beforehand. Raises ExpertsError if no backend can be used.

    Examples:
        Four random experts of hidden size 128 and intermediate size 64; the second token chooses no expert:

        >>> import torch
        >>> from k26_plugins.common.model.int4 import quantize
        >>> w13, w2 = torch.randn(4, 2 * 64, 128), torch.randn(4, 128, 64)
        >>> experts = create_experts(ExpertWeights(*quantize(w13), *quantize(w2)))
        >>> topk_ids, topk_weights = torch.tensor([[0, 3], [-1, -1]]), torch.tensor([[0.7, 0.3], [0.5, 0.5]])
        >>> out = experts.apply(torch.randn(2, 128).to(torch.bfloat16), topk_ids, topk_weights)
        >>> out.shape, out.dtype, out.any(dim=1).tolist()
        (torch.Size([2, 128]), torch.bfloat16, [True, False])
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
    """Log a warning once in a process, because every layer of a model would repeat it."""
    logger.warning(message)


def _self_test(candidate: type[ExpertsBackend], weights: ExpertWeights) -> tuple[float, str | None]:
    """Return the relative error, and why the backend must not serve these weights (with device and error), or None."""
    try:
        error = self_test_error(candidate, weights)
    except Exception as failure:  # whatever a compiler or a driver raises: the next backend may still serve
        return float("inf"), f"its self-test on {weights.device} ended with {type(failure).__name__}: {failure}"
    limit = candidate.tolerance
    if error <= limit:
        return error, None
    return error, f"it failed the self-test on {weights.device}, relative error {error:.3g} (limit {limit:g})"


def _make_ready(candidate: type[ExpertsBackend], sizes: Sizes, batches: Batches) -> str | None:
    """Return why a backend's kernels cannot be compiled for these batches, or None if they were."""
    try:
        candidate.make_ready(sizes, batches)
    except Exception as failure:  # whatever a compiler raises, here for a batch size that the self-test does not run
        return f"its kernels cannot be compiled for {sizes.device}: {type(failure).__name__}: {failure}"
    return None
