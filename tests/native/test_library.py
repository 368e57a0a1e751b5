"""The native experts as a program of their own: with sanitizers, and compiled for CPUs that are not here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.experts import error, inputs, judge, make_weights, route
from support.instruction_sets import INSTRUCTION_SET

from k26_plugins.common.experts.native.build import COMPILERS, FLAGS, SOURCES, VARIANTS, variants

DRIVER = Path(__file__).parent.parent / "support" / "native"
COMPILER = next(filter(None, map(shutil.which, COMPILERS)), None)
TOKENS, TOP_K, EXPERTS, HIDDEN, INNER = 23, 2, 4, 256, 96

needs_compiler = pytest.mark.skipif(COMPILER is None, reason=f"no C++ compiler ({', '.join(COMPILERS)})")


class Sample(NamedTuple):
    given: Path
    expected: torch.Tensor


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A layer and a batch, with values at which rounding or the exponential of two instruction sets could differ."""
    weights = make_weights(EXPERTS, HIDDEN, INNER)
    ids, topk_weights = route(TOKENS, TOP_K, EXPERTS)
    ids[9, 1] = -1
    x = inputs(TOKENS, HIDDEN)
    x[3], x[4], x[5] = x[3] * 1e-20, x[4] * 3e4, 0
    given = tmp_path_factory.mktemp("native") / "given"
    tensors = (weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale, x, ids, topk_weights)
    sizes = torch.tensor([EXPERTS, HIDDEN, INNER, TOKENS, TOP_K])
    given.write_bytes(b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in (sizes, *tensors)))
    return Sample(given, judge(weights, x, ids, topk_weights))


def run(
    sample: Sample, folder: Path, compiler: str, *flags: str, emulator: tuple[str, ...] = ()
) -> tuple[torch.Tensor, str]:
    """What the program computes, and the instruction set that it names."""
    program, result = folder / "program", folder / "result"
    common = [flag for flag in FLAGS if flag not in ("-O3", "-fPIC", "-shared")]
    command = [compiler, *common, "-O0", *flags, f"-I{SOURCES}", str(DRIVER / "driver.cpp"), "-o", str(program), "-ldl"]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr[-3000:]
    done = subprocess.run(
        [*emulator, str(program), str(sample.given), str(result), "3"],
        env={**os.environ, "UBSAN_OPTIONS": "halt_on_error=1", "TSAN_OPTIONS": "halt_on_error=1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    values = torch.frombuffer(bytearray(result.read_bytes()), dtype=torch.float32).view(3, TOKENS, HIDDEN)
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert error(values[0], sample.expected) <= 1e-4
    return values[0], done.stdout.strip()


@pytest.fixture(scope="module")
def here(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The result of this CPU's best instruction set, with what ASan and UBSan have to say."""
    assert COMPILER is not None
    flags = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wl,--no-as-needed", "-lgomp")
    return run(sample, tmp_path_factory.mktemp("here"), COMPILER, *VARIANTS[variants()[0]].flags, *flags)[0]


needs_set = pytest.mark.skipif(not variants(), reason="this CPU has no instruction set of the native experts")


@needs_compiler
@needs_set
def test_address_and_undefined_behaviour_sanitizers(here: torch.Tensor) -> None:
    """Both kinds of threads; every tensor is of exactly its size."""
    assert here.isfinite().all()


@needs_compiler
@needs_set
def test_thread_sanitizer(sample: Sample, here: torch.Tensor, tmp_path: Path) -> None:
    """Three threads on two nodes, and a batch of jobs in flight."""
    assert COMPILER is not None
    # Its shadow memory leaves no room for the addresses that newer kernels choose at random.
    fixed = ("setarch", "-R") if shutil.which("setarch") else ()
    flags = ("-g1", "-fsanitize=thread", *VARIANTS[variants()[0]].flags)
    assert torch.equal(run(sample, tmp_path, COMPILER, *flags, emulator=fixed)[0], here)


@needs_compiler
@needs_set
def test_avx512_lane_by_lane(
    sample: Sample, here: torch.Tensor, tmp_path: Path, record_property: Callable[[str, str], None]
) -> None:
    """Its intrinsics in plain C++: the same bits. VNNI's product is written as an instruction, which this does not run."""
    assert COMPILER is not None
    result, name = run(sample, tmp_path, COMPILER, "-D__AVX512F__", f"-I{DRIVER / 'avx512'}")
    assert name == "AVX512"
    assert torch.equal(result, here)
    record_property(INSTRUCTION_SET, f"native {name} (emulated)")


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")) or not variants(),
    reason="needs an x86 CPU, aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu and qemu-user)",
)
def test_arm_under_an_emulator(
    sample: Sample, here: torch.Tensor, tmp_path: Path, record_property: Callable[[str, str], None]
) -> None:
    result, name = run(
        sample,
        tmp_path,
        "aarch64-linux-gnu-g++",
        "-static",
        *VARIANTS["neon_dotprod"].flags,
        emulator=("qemu-aarch64",),
    )
    assert name == "NEON with dot product"
    assert torch.equal(result, here)
    record_property(INSTRUCTION_SET, f"native {name} (qemu)")
