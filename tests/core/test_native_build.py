"""Tests of building the native experts' library: the compiler, the cache, and which instruction set this machine
gets."""

from __future__ import annotations

import logging
import platform
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.experts import make_weights
from support.native_experts import needs_amx, needs_native, run_apart
from support.native_sample import usable_variants

from k26_plugins.common.experts import create_experts
from k26_plugins.common.experts.native import NativeExperts, build
from k26_plugins.common.experts.native.build import VARIANTS, BuildError, library
from k26_plugins.common.experts.native.threads import Threads


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield an empty cache folder, as on a machine on which nothing was compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    yield tmp_path
    library.cache_clear()


def test_without_a_compiler(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "variants", lambda: ["avx512", "avx2"])
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert create_experts(make_weights(2, 128, 64)).name == "cpu"
    assert "native is not, because no C++ compiler is found (c++, g++, clang++): install GCC" in caplog.text


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("#!/bin/sh\necho 'error: no such option' >&2; exit 1\n", "error: no such option"),
        ("#!/bin/sh\nexit 3\n", "status 3"),
    ],
    ids=["says why", "silent"],
)
def test_a_compiler_that_fails(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, message: str) -> None:
    script = empty_cache / "compiler"
    script.write_text(compiler)
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(BuildError, match=f"compiler cannot compile it .*{message}.*: install GCC"):
        build.build("avx512")
    assert not list(empty_cache.rglob("*.so"))


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "k26-plugins").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BuildError, match="set XDG_CACHE_HOME"):
        build.build("avx512")


@needs_native
def test_a_library_that_cannot_be_loaded(empty_cache: Path) -> None:
    for name in build.variants():
        build.build(name).write_bytes(b"cut off")
    assert "its library cannot be loaded" in str(NativeExperts.unsupported(make_weights(1, 128, 64)))


def test_compiled_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranks start together and one comes later; the library is compiled once for all of them."""
    compiled: list[Path] = []

    def compile_slowly(target: Path, flags: tuple[str, ...]) -> None:
        compiled.append(target)
        threading.Event().wait(0.2)
        target.touch()

    monkeypatch.setattr(build, "_compile", compile_slowly)
    ranks = [threading.Thread(target=build.build, args=("avx512",)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert compiled == [build.build("avx512")]


def test_which_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instruction sets that are taken are those that the CPU has and that torch was not told to do without."""
    x86, arm = (
        set().union(*(variant.needs for variant in VARIANTS.values() if variant.machine == machine))
        for machine in ("x86_64", "aarch64")
    )
    for capability, missing, expected in (
        ("AVX512", set(), ["amx", "avx512_vnni", "avx512", "avx2_vnni", "avx2"]),
        ("AVX512", {"amx_tile"}, ["avx512_vnni", "avx512", "avx2_vnni", "avx2"]),
        ("AVX512_BF16", {"avx_vnni", "amx_bf16"}, ["avx512_vnni", "avx512", "avx2"]),
        ("AVX512", {"avx512_vnni", "avx_vnni"}, ["avx512", "avx2"]),
        ("AVX2", set(), ["avx2_vnni", "avx2"]),
        ("AVX2", {"avx512f", "avx_vnni"}, ["avx2"]),
        ("DEFAULT", {"asimddp"}, []),
        ("SVE256", set(), ["neon_i8mm", "neon_dotprod"]),
        ("DEFAULT", {"i8mm"}, ["neon_dotprod"]),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        flags = frozenset((x86 if capability.startswith("AVX") else arm) - missing)
        monkeypatch.setattr(build, "cpu_flags", lambda flags=flags: flags)
        assert build.variants() == expected
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(build, "cpu_flags", frozenset)
    with pytest.raises(BuildError, match="it needs AVX2, AVX512 or ARM's dot product and torch finds DEFAULT"):
        build._best_library()


def test_a_compiler_too_old_for_the_best_set(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def compile_old(target: Path, flags: tuple[str, ...]) -> None:
        tried.append(target.name.split("-")[1])
        raise BuildError(f"unrecognized option in {flags}")

    monkeypatch.setattr(build, "_compile", compile_old)
    monkeypatch.setattr(build, "variants", lambda: ["avx2_vnni", "avx2"])
    with pytest.raises(BuildError, match="-mavxvnni"):
        library()
    assert tried == ["avx2_vnni", "avx2"]


@needs_native
@pytest.mark.skipif("amx" in usable_variants(), reason="this system gives AMX's registers")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86-64's")
def test_a_system_that_refuses_amx(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The real system is asked for AMX's registers. When it refuses them, the next instruction set is taken, and the
    log says so."""
    best = usable_variants()[0]
    library.cache_clear()
    monkeypatch.setattr(build, "variants", lambda: ["amx", best])
    with pytest.raises(BuildError, match="the system refuses the registers of amx"):
        library("amx")
    with caplog.at_level(logging.WARNING):
        assert Threads(library()).instruction_set == Threads(library(best)).instruction_set
    assert f"run on {best} and not on the faster amx: the system refuses the registers" in caplog.text
    library.cache_clear()


@needs_native
@needs_amx
def test_a_system_that_gives_amx_and_refuses_it_to_this_process() -> None:
    """A thread's signal stack has no room for AMX's registers here, and Linux looks at the signal stacks of all threads
    before it gives the registers."""
    program = (
        "import ctypes; memory = ctypes.create_string_buffer(8192)\n"
        "class Stack(ctypes.Structure):\n"
        "    _fields_ = [('at', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]\n"
        "stack = Stack(ctypes.addressof(memory), 0, len(memory))\n"
        "assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0\n"
        "import logging; logging.basicConfig()\n"
        "from support.experts import *; from k26_plugins.common.experts import create_experts\n"
        "from k26_plugins.common.experts.native.threads import process_threads\n"
        "experts = create_experts(make_weights(2, 128, 64), 'native')\n"
        "experts.apply(inputs(40, 128), *route(40, 2, 2)); print(process_threads().instruction_set)\n"
    )
    done = run_apart(program)
    assert done.stdout.strip() == "AVX512 with VNNI"
    assert "not on the faster amx: the system refuses the registers of amx (No space left on device)" in done.stderr
