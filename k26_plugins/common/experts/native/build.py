"""Load the C++ of this folder as a library, from the wheel or compiled once per machine and kept in the user's cache.

The source uses no header of torch or Python, so the library fits every version of both and compiles in seconds.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from k26_plugins.common.host.cache_folder import cache_folder
from k26_plugins.common.host.cpu import cpu_flags

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
# The libraries that a wheel for one architecture brings. A checkout has no such folder.
COMPILED = SOURCES / "compiled"


class Variant(NamedTuple):
    """The library for one instruction set."""

    machine: str
    """The architecture, as `uname -m` names it."""
    capability: str
    """The capability that torch must report, which can be less than the CPU's (ATEN_CPU_CAPABILITY); empty for any."""
    needs: frozenset[str]
    """The features that the CPU must have, as Linux names them."""
    flags: tuple[str, ...]
    """The compiler's flags beside FLAGS."""


def _avx(capability: str, *needs: str) -> Variant:
    flags = (f"-m{name.replace('_', '-' if name.startswith('amx') else '')}" for name in needs)
    return Variant("x86_64", capability, frozenset(needs), tuple(flags))


AVX2, AVX512 = ("avx2", "fma"), ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma")
# The instruction sets that the source is written for, best first.
VARIANTS = {
    "amx": _avx("AVX512", *AVX512, "avx512_vnni", "amx_tile", "amx_bf16"),
    "avx512_vnni": _avx("AVX512", *AVX512, "avx512_vnni"),
    "avx512": _avx("AVX512", *AVX512),
    "avx2_vnni": _avx("AVX2", *AVX2, "avx_vnni"),
    "avx2": _avx("AVX2", *AVX2),
    "neon_i8mm": Variant("aarch64", "", frozenset({"asimd", "asimddp", "i8mm"}), ("-march=armv8.2-a+dotprod+i8mm",)),
    "neon_dotprod": Variant("aarch64", "", frozenset({"asimd", "asimddp"}), ("-march=armv8.2-a+dotprod",)),
}
# torch's names for what an x86 CPU can do, each included in the next. What torch reports on ARM does not matter here.
CAPABILITIES = ("", "AVX2", "AVX512")
COMPILERS = ("c++", "g++", "clang++")
# Without contraction (`-ffp-contract=off`) the operations are the same, whatever the compiler inlines where.
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")


class BuildError(RuntimeError):
    """Raised if this machine cannot have the library. The message is the reason and the remedy, in half a sentence."""


@cache
def library(variant: str | None = None) -> ctypes.CDLL:
    """Return the library for this CPU, or that of a given one of VARIANTS. Raises BuildError if it cannot be had."""
    if variant is None:
        return _best_library()
    made = build(variant)
    try:
        loaded = ctypes.CDLL(str(made))
    except OSError as error:
        raise BuildError(
            f"its library cannot be loaded ({error}): delete it, or set XDG_CACHE_HOME to a folder"
        ) from error
    loaded.k26_refusal.restype = ctypes.c_int64
    if refusal := loaded.k26_refusal():
        raise BuildError(
            f"the system refuses the registers of {variant} ({os.strerror(refusal)}): Linux gives them since 5.16, if every "
            "thread's alternate signal stack is large enough for them"
        )
    return loaded


def _best_library() -> ctypes.CDLL:
    """Return the library of the best instruction set for which the compiler and Linux are new enough.

    GCC knows AVX-VNNI and AMX from version 11 on, and Linux gives AMX's registers from 5.16 on.
    """
    first: BuildError | None = None
    for name in variants():
        try:
            found = library(name)
        except BuildError as error:
            first = first or error
            continue
        if first:
            logger.warning("The CPU experts run on %s and not on the faster %s: %s", name, variants()[0], first)
        return found
    capability = torch.backends.cpu.get_cpu_capability()
    raise first or BuildError(f"it needs AVX2, AVX512 or ARM's dot product and torch finds {capability}")


def variants() -> list[str]:
    """Return the instruction sets that this CPU has and torch was not told to do without, best first."""
    found = torch.backends.cpu.get_cpu_capability()
    allowed = CAPABILITIES[: 1 + max(i for i, name in enumerate(CAPABILITIES) if found.startswith(name))]
    flags = cpu_flags()
    return [name for name, variant in VARIANTS.items() if variant.capability in allowed and variant.needs <= flags]


def file_name(variant: str) -> str:
    """Return the file name of a compiled library, which changes with the source and with the compiler's flags."""
    digest = hashlib.sha256(" ".join(flags(variant)).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.hpp")]):
        digest.update(source.read_bytes())
    return f"experts-{variant}-{digest.hexdigest()[:16]}.so"


def flags(variant: str) -> tuple[str, ...]:
    """Return the compiler's flags for an instruction set."""
    return (*FLAGS, *VARIANTS[variant].flags)


def build(variant: str) -> Path:
    """Return the path of the compiled library, from the wheel or the cache; compile it if neither has it.

    Raises BuildError if it cannot be compiled or kept.
    """
    name = file_name(variant)
    if (COMPILED / name).exists():
        return COMPILED / name
    folder = cache_folder()
    target = folder / name
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The ranks of a machine start together: one of them compiles, and the others wait.
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(target, flags(variant))
    except OSError as error:
        raise BuildError(f"its library cannot be kept in {folder} ({error}): set XDG_CACHE_HOME to a folder") from error
    return target


def _compile(target: Path, flags: tuple[str, ...]) -> None:
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, (named,) if named else COMPILERS)), None)
    if compiler is None:
        tried = named or ", ".join(COMPILERS)
        raise BuildError(f"no C++ compiler is found ({tried}): install GCC 8 or newer, or name one in CXX")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = [compiler, *flags, str(SOURCES / "experts.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = next(
                (line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}"
            )
            raise BuildError(
                f"{compiler} cannot compile it ({said.strip()}): install GCC 8 or newer, or name one in CXX"
            )
        made.replace(target)
