"""Tests of the native experts in a device's stream and in its graphs, as a program under sanitizers.

The device's runtime is a stand-in (`support/native/device_runtime.cpp`). Python's side is tested in
tests/core/test_in_stream.py.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.native_sample import (
    COMPILER,
    FIXED_ADDRESSES,
    SOURCES,
    make_sample,
    needs_compiler,
    needs_set,
    usable_variants,
)

from k26_plugins.common.experts.native.build import FLAGS, VARIANTS
from k26_plugins.common.experts.native.build import SOURCES as LIBRARY

# The meaning of the program's exit status; a status of 66 comes from TSan.
FAILURES = {
    3: "a call that may not be", 4: "other bits", 5: "late", 6: "the fork's bits", 7: "numbers", 8: "not late", 9: "memory"
}  # fmt: skip


@needs_compiler
@needs_set
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_replays_have_the_bits_of_calls_and_a_hung_worker_ends_them(sanitizer: str, tmp_path: Path) -> None:
    """The program runs steps of two layers, in graphs of three batch sizes and outside them, always with new data. It
    also has a stream that is late, a fork, and an exit while steps run."""
    assert COMPILER is not None
    program = tmp_path / "program"
    common = [flag for flag in FLAGS if flag not in ("-O3", "-fPIC", "-shared")]
    flags = (*common, "-O1", "-g1", f"-fsanitize={sanitizer}", *VARIANTS[usable_variants()[0]].flags, "-Wl,--wrap=mmap")
    command = [COMPILER, *flags, f"-I{LIBRARY}", str(SOURCES / "stream_driver.cpp"), "-o", str(program), "-ldl"]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr[-3000:]
    # Leaks are not looked for, because graphs and what they call live until the process ends.
    options = {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    run = [*FIXED_ADDRESSES, str(program), str(make_sample(tmp_path).given), "3"]
    for rest in (["150"], ["5", "exit"]):
        done = subprocess.run(
            [*run, *rest],
            env={**os.environ, **options},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, (rest, FAILURES.get(done.returncode), done.stderr[-3000:])
