"""Install kt-kernel's CPU experts into the environment that runs this script, and nothing else of its wheel.

    python ci/install_kt_kernel.py 0.7.2

kt-kernel 0.7 also brings `sgl_kernel`, `deep_gemm` and `triton_kernels`, which would overwrite upstream SGLang's, and pins
torch 2.9.1. The CPU experts need neither those packages nor that version of torch.
"""

from __future__ import annotations

import argparse
import shutil
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from packages import install, pip

WANTED = ("kt_kernel/", "kt_kernel.libs/", "kt_kernel-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="a release of kt-kernel, such as 0.7.2")
    version: str = parser.parse_args().version
    folder = Path(sysconfig.get_path("platlib"))
    for old in folder.glob("kt_kernel*"):
        shutil.rmtree(old)
    with tempfile.TemporaryDirectory() as scratch:
        pip("download", "--quiet", "--no-deps", "--dest", scratch, f"kt-kernel=={version}")
        # kt-kernel's CPU experts import gguf, which k26-plugins does not require.
        install("gguf>=0.17")
        with zipfile.ZipFile(next(Path(scratch).glob("kt_kernel-*.whl"))) as wheel:
            members = [name for name in wheel.namelist() if name.startswith(WANTED)]
            wheel.extractall(folder, members)


if __name__ == "__main__":
    main()
