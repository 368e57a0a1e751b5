"""The native experts in the tests' own process. Importing this compiles them where they are not."""

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
"""Why this machine cannot run them, or None."""

needs_native = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_amx = pytest.mark.skipif("amx" not in usable_variants(), reason="no amx here")


def run_apart(program: str) -> subprocess.CompletedProcess[str]:
    """What a program said that ran to its end in a process of its own, with this one's path of imports."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def load(weights: ExpertWeights) -> NativeExperts:
    return NativeExperts.load(weights.copy_of(list(range(weights.num_experts))))
