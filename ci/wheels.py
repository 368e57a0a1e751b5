"""The wheels of a release, with the C++ experts compiled: for x86-64, for aarch64, and without for everything else.

    python ci/wheels.py dist

Needs the package and `wheel` in the environment, and of Debian g++ and g++-aarch64-linux-gnu; an architecture without its
compiler is left out, with a line that says so. A wheel's platform tag is the C library that its files ask for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from k26_plugins.common.experts.native.build import COMPILED, SOURCES, VARIANTS, file_name, flags

ROOT = Path(__file__).parent.parent
# The C++ library stays outside, torch brings it: linked in, it asks for a C library as new as the compiler's.
OLD_GLIBC = ("-include", str(Path(__file__).parent / "old_glibc.h"))


def wheels(folder: Path) -> list[Path]:
    """Write them to the folder."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (pure,) = folder.glob("*-py3-none-any.whl")
    found = [pure]
    for machine in sorted({variant.machine for variant in VARIANTS.values()}):
        if shutil.which(f"{machine}-linux-gnu-g++"):
            found.append(with_library(pure, machine))
        else:
            print(f"no wheel for {machine}: {machine}-linux-gnu-g++ is not found", file=sys.stderr)
    return found


def with_library(pure: Path, machine: str) -> Path:
    """The wheel with the library for each instruction set of the machine."""
    with tempfile.TemporaryDirectory() as scratch:
        run(sys.executable, "-m", "wheel", "unpack", "--dest", scratch, str(pure))
        (unpacked,) = Path(scratch).iterdir()
        compiled = unpacked / COMPILED.relative_to(ROOT)
        compiled.mkdir()
        names = [name for name, variant in VARIANTS.items() if variant.machine == machine]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(partial(compile_for, machine, compiled), names))
        run(sys.executable, "-m", "wheel", "pack", "--dest-dir", scratch, str(unpacked))
        tag = f"manylinux_2_{c_library(compiled)}_{machine}"
        packed = Path(scratch) / pure.name
        run(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, str(packed))
        (tagged,) = Path(scratch).glob(f"*{machine}.whl")
        return Path(shutil.copy(tagged, pure.parent))


def compile_for(machine: str, folder: Path, variant: str) -> None:
    command = [f"{machine}-linux-gnu-g++", *flags(variant), *OLD_GLIBC, "-s", str(SOURCES / "experts.cpp")]
    run(*command, "-o", str(folder / file_name(variant)))


def c_library(folder: Path) -> int:
    """The minor version of the oldest glibc that has every symbol which the files ask for."""
    listed = [run("readelf", "--dyn-syms", "--wide", str(file)) for file in folder.iterdir()]
    return max(int(minor) for minor in re.findall(r"@GLIBC_2\.(\d+)", "".join(listed)))


def run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    for made in wheels(Path(sys.argv[1])):
        print(made)
