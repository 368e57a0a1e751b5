"""Runs the native experts in the tests' own process. Importing this module compiles them if need be."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.experts import make_weights
from support.native_sample import usable_variants

from k26_plugins.common.experts import ExpertWeights
from k26_plugins.common.experts.native import NativeExperts

REASON = NativeExperts.unsupported(make_weights(1, 128, 64))
"""Why this machine cannot run the native experts, or None."""

needs_native = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_amx = pytest.mark.skipif("amx" not in usable_variants(), reason="no amx here")


def run_apart(program: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a separate process with this one's import path, and return what it printed.

    Raises AssertionError if the program does not exit with 0.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def load(weights: ExpertWeights) -> NativeExperts:
    """Load a copy of the weights into the native backend, which repacks its weights in place."""
    return NativeExperts.load(weights.copy_of(list(range(weights.num_experts))))
