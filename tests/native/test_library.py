"""Tests of the native experts compiled into a program of their own: under sanitizers, and for CPUs that are not here.
The judge is the float64 product of support/experts.py."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.experts import error
from support.instruction_sets import INSTRUCTION_SET
from support.native_sample import (
    COMPILER,
    FIXED_ADDRESSES,
    HIDDEN,
    TOKENS,
    Sample,
    make_sample,
    needs_compiler,
    needs_set,
    usable_variants,
)
from support.native_sample import SOURCES as DRIVER

from k26_plugins.common.experts.native.build import FLAGS, SOURCES, VARIANTS, variants

ARM_COMPILER = "aarch64-linux-gnu-g++"
# This finds the mnemonic in a line of objdump, which has the address, the bytes and the instruction.
INSTRUCTION = re.compile(r"^ +[0-9a-f]+:\t[0-9a-f ]+\t([\w.]+)", re.MULTILINE)
BRANCH = {"jne", "je", "jmp", "call", "bl", "b", "b.ne", "b.eq", "cbz", "cbnz"}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return make_sample(tmp_path_factory.mktemp("native"))


def run(
    sample: Sample, folder: Path, compiler: str, *flags: str, emulator: tuple[str, ...] = ()
) -> tuple[torch.Tensor, str]:
    """Compile and run the program, assert that its results are right, and return them and the instruction set that it
    names."""
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
    """Return the result of this CPU's best instruction set, computed under ASan and UBSan."""
    assert COMPILER is not None
    flags = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wl,--no-as-needed", "-lgomp")
    return run(sample, tmp_path_factory.mktemp("here"), COMPILER, *VARIANTS[usable_variants()[0]].flags, *flags)[0]


@needs_compiler
@needs_set
def test_address_and_undefined_behaviour_sanitizers(here: torch.Tensor) -> None:
    """Both kinds of threads run, and every tensor is allocated with exactly its size, so that the sanitizers see an
    access beyond it."""
    assert here.isfinite().all()


@needs_compiler
@needs_set
def test_thread_sanitizer(sample: Sample, here: torch.Tensor, tmp_path: Path) -> None:
    """Three threads on two NUMA nodes run, with a batch of jobs in flight."""
    assert COMPILER is not None
    flags = ("-g1", "-fsanitize=thread", *VARIANTS[usable_variants()[0]].flags)
    assert torch.equal(run(sample, tmp_path, COMPILER, *flags, emulator=FIXED_ADDRESSES)[0], here)


def made(name: str, folder: Path) -> Path:
    """Compile a program of the drivers' folder for this CPU, and return its path."""
    assert COMPILER is not None
    program = folder / name
    flags = [
        flag for flag in (*FLAGS, *VARIANTS[usable_variants()[0]].flags) if flag not in ("-O3", "-fPIC", "-shared")
    ]
    command = [COMPILER, *flags, "-O1", f"-I{SOURCES}", str(DRIVER / f"{name}.cpp"), "-o", str(program), "-ldl"]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr[-3000:]
    return program


@pytest.fixture(scope="module")
def pages_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("pages", tmp_path_factory.mktemp("pages"))


@needs_compiler
@needs_set
@pytest.mark.parametrize("nodes", [(0, 1), (0, 0, 1, 1), (0, 0, 0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("inner", [512, 1056])
def test_a_node_reads_the_pages_that_lie_there(nodes: tuple[int, ...], inner: int, pages_program: Path) -> None:
    """The NUMA nodes are pretended and the pages are real, each noted at its first touch. 1056 inputs are 33 groups,
    which two or four threads cannot share evenly."""
    experts, hidden = 3, 1024
    sizes = map(str, (experts, hidden, inner, *nodes))
    shown = subprocess.run([str(pages_program), *sizes], capture_output=True, text=True, timeout=60, check=True).stdout
    pages, own, foreign = map(int, shown.split())
    # Where the tiles of two nodes meet, in each expert and from one expert to the next, they share a page.
    borders = 4 * experts * 2 * len(set(nodes))
    assert own >= pages - borders, "each page is read, by threads of the node where it lies"
    assert foreign <= borders


@needs_compiler
@needs_set
@pytest.mark.parametrize("nodes", [(0, 0), (0, 0, 0, 1, 1, 1), (0, 1)], ids=str)
def test_a_late_thread_leaves_its_work_to_those_of_its_node(nodes: tuple[int, ...], tmp_path: Path) -> None:
    """While the first thread sleeps in its first part, the other threads of its node take all the rest, and no part is
    taken twice."""
    things = 444
    program = made("late", tmp_path)
    shown = subprocess.run([str(program), str(things), *map(str, nodes)], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0
    taken_by = [int(thread) for thread in shown.stdout.split()]
    each = things // len(nodes)
    assert [nodes[thread] for thread in taken_by] == [node for node in nodes for _ in range(each)]
    assert taken_by.count(0) == (each // 2 if nodes.count(nodes[0]) > 1 else each)


@needs_compiler
@needs_set
@pytest.mark.parametrize(("macros", "named"), [((), "AVX512"), (("-D__AMX_BF16__",), "AMX with AVX512")])
def test_avx512_and_amx_lane_by_lane(
    macros: tuple[str, ...],
    named: str,
    sample: Sample,
    here: torch.Tensor,
    tmp_path: Path,
    record_property: Callable[[str, str], None],
) -> None:
    """The intrinsics of AVX512 and AMX, written in plain C++, give the same bits. VNNI's product is written as an
    instruction, which this test does not run."""
    assert COMPILER is not None
    result, name = run(sample, tmp_path, COMPILER, "-D__AVX512F__", *macros, f"-I{DRIVER / 'avx512'}")
    assert name == named
    assert torch.equal(result, here)
    record_property(INSTRUCTION_SET, f"native {name} (emulated)")


@needs_compiler
@pytest.mark.skipif("avx512_vnni" not in variants(), reason="this CPU has no product of AVX-VNNI in AVX512's coding")
def test_avx_vnni_in_the_coding_of_avx512(
    sample: Sample, here: torch.Tensor, tmp_path: Path, record_property: Callable[[str, str], None]
) -> None:
    """The code for AVX2 with AVX-VNNI gives the same bits on a CPU that knows VNNI's product only in the coding of
    AVX512."""
    assert COMPILER is not None
    code = ("-U__AVX512F__", "-D__AVXVNNI__", "-D_mm256_dpwssd_avx_epi32=_mm256_dpwssd_epi32")
    result, name = run(sample, tmp_path, COMPILER, *VARIANTS["avx512_vnni"].flags, *code)
    assert name == "AVX2 with AVX-VNNI"
    assert torch.equal(result, here)
    record_property(INSTRUCTION_SET, f"native {name} (in AVX512's coding)")


@pytest.mark.parametrize(
    ("variant", "named"), [("neon_dotprod", "NEON with dot product"), ("neon_i8mm", "NEON with i8mm")]
)
@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which("qemu-aarch64")) or not variants(),
    reason="needs an x86 CPU, aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu and qemu-user)",
)
def test_arm_under_an_emulator(
    variant: str,
    named: str,
    sample: Sample,
    here: torch.Tensor,
    tmp_path: Path,
    record_property: Callable[[str, str], None],
) -> None:
    flags = ("-static", *VARIANTS[variant].flags)
    result, name = run(sample, tmp_path, ARM_COMPILER, *flags, emulator=("qemu-aarch64", "-cpu", "max"))
    assert name == named
    assert torch.equal(result, here)
    record_property(INSTRUCTION_SET, f"native {name} (qemu)")


@pytest.mark.skipif(
    not (COMPILER and platform.machine() == "x86_64" and shutil.which(ARM_COMPILER) and shutil.which("objdump")),
    reason="needs an x86 compiler, aarch64-linux-gnu-g++ and binutils",
)
def test_instructions_on_arm_against_avx2(tmp_path: Path) -> None:
    """The instructions for a group of a tile, 512 weights, are counted. The code has no branch, so each instruction
    runs once."""
    assert COMPILER is not None

    def listed(source: str, function: str, compiler: str, *flags: str) -> list[str]:
        made = tmp_path / "made.o"
        common = [flag for flag in FLAGS if flag != "-shared"]
        subprocess.run(
            [compiler, *common, *flags, f"-I{SOURCES}", "-c", str(DRIVER / source), "-o", str(made)], check=True
        )
        objdump = "objdump" if compiler == COMPILER else "aarch64-linux-gnu-objdump"
        shown = subprocess.check_output([objdump, f"--disassemble={function}", str(made)], text=True)
        instructions = INSTRUCTION.findall(shown)
        assert not BRANCH.intersection(instructions)
        return instructions

    def count(variant: str) -> tuple[int, int]:
        """Return the number of instructions for one token, whose weights are unpacked in passing, and for four, whose
        weights are unpacked already."""
        compiler = ARM_COMPILER if VARIANTS[variant].machine == "aarch64" else COMPILER
        one, four = (listed("group.cpp", name, str(compiler), *VARIANTS[variant].flags) for name in ("one", "four"))
        return len(one), len(four)

    def count_sve(bits: int) -> int:
        return len(
            listed("group_sve.cpp", "one", ARM_COMPILER, "-march=armv8.2-a+sve+i8mm", f"-msve-vector-bits={bits}")
        )

    avx2, dotprod, i8mm = count("avx2"), count("neon_dotprod"), count("neon_i8mm")
    # GCC 12 makes 139 and 498 instructions on AVX2, 151 and 505 with the dot product, 151 and 357 with i8mm.
    assert avx2[0] <= 145, avx2
    assert max(dotprod[0], i8mm[0]) <= 1.15 * avx2[0], (avx2, dotprod, i8mm)
    assert dotprod[1] <= 1.1 * avx2[1], (avx2, dotprod)
    assert i8mm[1] <= 0.75 * avx2[1], (avx2, i8mm)
    # SVE has no code because one token takes 172 with NEON's 128 bits, and 86 with 256, which only Graviton 3 has.
    assert count_sve(128) >= i8mm[0] > count_sve(256)
