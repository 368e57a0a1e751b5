"""INT4 experts behind one interface; `create_experts` is the one place where a backend is chosen."""

from __future__ import annotations

import logging

from k26_plugins.common.experts.base import Expert, ExpertsBackend, ExpertsError, ExpertWeights
from k26_plugins.common.experts.cpu import CpuExperts
from k26_plugins.common.experts.reference import ReferenceExperts, reference_experts
from k26_plugins.common.experts.selftest import TOLERANCE, self_test_error
from k26_plugins.common.experts.triton import TritonExperts

__all__ = [
    "BACKENDS",
    "Expert",
    "ExpertWeights",
    "ExpertsBackend",
    "ExpertsError",
    "create_experts",
    "reference_experts",
]

logger = logging.getLogger(__name__)

# In the order in which `auto` tries them.
BACKENDS: dict[str, type[ExpertsBackend]] = {
    backend.name: backend for backend in (TritonExperts, CpuExperts, ReferenceExperts)
}


def create_experts(weights: ExpertWeights, backend: str = "auto") -> ExpertsBackend:
    """Choose a backend for these weights and give them to it.

    `auto` takes the first that supports the weights on their device and passes the self-test with them; a backend that
    fails is named in a warning. A backend given by name is taken or refused, never replaced. Raises ExpertsError.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ExpertsError(f"no experts backend {backend!r}: choose auto or one of {', '.join(BACKENDS)}.")
    refused: list[str] = []
    for candidate in BACKENDS.values() if backend == "auto" else (BACKENDS[backend],):
        reason = candidate.unsupported(weights)
        if reason is None:
            reason = _self_test_failure(candidate, weights)
            if reason is None:
                if refused:
                    logger.warning("experts backend %s is used: %s", candidate.name, "; ".join(refused))
                return candidate.load(weights)
        refused.append(f"{candidate.name} is not, because {reason}")
    raise ExpertsError(
        f"no experts backend can be used on {weights.device}: {'; '.join(refused)}. Serving would give garbage. "
        f"Check the checkpoint with `k26 check`, and report this with the device's name."
    )


def _self_test_failure(candidate: type[ExpertsBackend], weights: ExpertWeights) -> str | None:
    """Why a backend must not serve these weights, naming the device and the error, or None."""
    try:
        error = self_test_error(candidate, weights)
    except Exception as failure:  # whatever a compiler or a driver raises: the next backend may still serve
        return f"its self-test on {weights.device} ended with {type(failure).__name__}: {failure}"
    if error <= TOLERANCE:
        return None
    return f"it failed the self-test on {weights.device}, relative error {error:.3g} (limit {TOLERANCE:g})"
