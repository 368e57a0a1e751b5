"""Build the wheels of a release: with compiled C++ experts for x86-64 and for aarch64, and without for everything else.

    python ci/wheels.py dist

The environment needs the package and `wheel`, and Debian's g++ and g++-aarch64-linux-gnu. An architecture whose
compiler is missing is left out, and a line says so. A wheel's platform tag names the C library that its files need.
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
# The C++ library is not linked in, because torch brings one; linked in, it would need a C library as new as the
# compiler's.
OLD_GLIBC = ("-include", str(Path(__file__).parent / "old_glibc.h"))


def wheels(folder: Path) -> list[Path]:
    """Build all wheels into the folder, and return their paths."""
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
    """Return a copy of the wheel with the compiled library for each instruction set of the machine."""
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
    """Compile the C++ experts for one instruction set (variant) of a machine into the folder."""
    command = [f"{machine}-linux-gnu-g++", *flags(variant), *OLD_GLIBC, "-s", str(SOURCES / "experts.cpp")]
    run(*command, "-o", str(folder / file_name(variant)))


def c_library(folder: Path) -> int:
    """Return the minor version of the oldest glibc that has every symbol which the files in the folder need."""
    listed = [run("readelf", "--dyn-syms", "--wide", str(file)) for file in folder.iterdir()]
    return max(int(minor) for minor in re.findall(r"@GLIBC_2\.(\d+)", "".join(listed)))


def run(*command: str) -> str:
    """Run a command, and return its output. Raises CalledProcessError if the command fails."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    for made in wheels(Path(sys.argv[1])):
        print(made)
