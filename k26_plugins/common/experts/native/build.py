"""The C++ of this folder as a library: compiled once per machine by the compiler found there, and kept in the user's cache.

No header of torch or Python is used, so the library fits every version of both and compiles in seconds.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
# The instruction sets that the source is written for, best first.
VARIANTS = {"avx512_vnni": (*AVX512, "-mavx512vnni"), "avx512": AVX512}
COMPILERS = ("c++", "g++", "clang++")
# No contraction: the same operations, whatever the compiler inlines where.
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")


class BuildError(RuntimeError):
    """The library cannot be had on this machine. The message is the reason and the remedy, in half a sentence."""


@cache
def library(variant: str | None = None) -> ctypes.CDLL:
    """The library for this CPU, or for another of VARIANTS that it can run. Raises BuildError."""
    made = build(variant or best_variant())
    try:
        return ctypes.CDLL(str(made))
    except OSError as error:
        raise BuildError(
            f"its library cannot be loaded ({error}): delete it, or set XDG_CACHE_HOME to a folder"
        ) from error


def best_variant() -> str:
    """The best instruction set of this CPU, unless torch was told to do with less. Raises BuildError."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX512"):
        raise BuildError(f"it needs AVX512 and torch finds {capability}")
    return "avx512_vnni" if "avx512_vnni" in cpu_flags() else "avx512"


def cpu_flags() -> frozenset[str]:
    """The instruction sets of this CPU as Linux names them; none where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), ()))


def build(variant: str) -> Path:
    """The compiled library, from the cache if it is there. Raises BuildError."""
    flags = (*FLAGS, *VARIANTS[variant])
    digest = hashlib.sha256(" ".join(flags).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.hpp")]):
        digest.update(source.read_bytes())
    # A home that is not known is left as `~`: the message below then names it.
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    folder = Path(cache_home) / "k26-plugins"
    target = folder / f"experts-{variant}-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The ranks of a machine start together: one compiles, the others wait for it.
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(target, flags)
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
