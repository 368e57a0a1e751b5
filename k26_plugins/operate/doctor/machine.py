"""Examine the machine: versions of packages, the CPU, the memory, the GPUs and their driver."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

from k26_plugins.common.host.control_groups import cpu_quota, usable_cpus
from k26_plugins.common.host.cpu import cpu_flags, cpu_model
from k26_plugins.common.host.memory import available_bytes, total_bytes
from k26_plugins.operate.accelerators import AcceleratorError, accelerators
from k26_plugins.operate.doctor.finding import Finding, Level

PACKAGES = ("k26-plugins", "torch", "triton", "transformers", "compressed-tensors", "safetensors", "tiktoken")
# These versions of transformers number Kimi's special tokens without the gaps between their ids (transformers issues
# 45356 and 45359). The first version of the pair is the first broken one, the second is the first mended one.
BROKEN_TRANSFORMERS = ((5, 4), (5, 5, 4))


def installed(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """Return the release numbers of a version: (0, 32, 0) for `0.32.0+cpu`; empty if the text is no version.

    A package that was built without its git history may have the version `dev`, which has no numbers.
    """
    try:
        return Version(text).release
    except InvalidVersion:
        return ()


def version_findings() -> list[Finding]:
    """Return the versions of Python and the packages, and a note if transformers breaks Kimi's special tokens."""
    found = {package: installed(package) for package in PACKAGES}
    listed = ", ".join(f"{package} {number}" for package, number in found.items() if number)
    findings = [Finding(Level.OK, "packages", f"Python {platform.python_version()}, {listed}")]
    transformers = found["transformers"]
    if transformers and BROKEN_TRANSFORMERS[0] <= numbers(transformers) < BROKEN_TRANSFORMERS[1]:
        detail = (
            f"transformers {transformers} shifts Kimi's special tokens; the plugin's own tokenizer is not touched by it"
        )
        remedy = "install 5.5.4 or later if anything else tokenizes for this model"
        findings.append(Finding(Level.NOTE, "transformers", detail, remedy, "pip install 'transformers>=5.5.4'"))
    return findings


# By Linux's names: those that the C++ experts tell apart, and bfloat16's for torch.
INSTRUCTION_SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimddp", "i8mm")


def machine_findings() -> list[Finding]:
    """Return the findings about the CPU, the memory and the GPUs."""
    flags = cpu_flags()
    sets = [name for name in INSTRUCTION_SETS if name in flags]
    usable, quota = usable_cpus(), cpu_quota()
    limits = f", {usable} of them for this process" if usable < (os.cpu_count() or 0) else ""
    limits += f" (a control group gives the time of {quota:g})" if quota is not None else ""
    threads = f"{os.cpu_count()} threads{limits}"
    findings = [Finding(Level.OK, "CPU", f"{cpu_model()}, {threads}, {', '.join(sets) or 'no AVX2'}")]
    total, available = total_bytes(), available_bytes()
    findings.append(Finding(Level.OK, "memory", f"{total / 1e9:.1f} GB, {available / 1e9:.1f} GB available"))
    return findings + _gpus()


def _gpus() -> list[Finding]:
    import torch

    try:
        found = accelerators()
    except AcceleratorError as error:
        return [
            Finding(Level.BAD, "GPU", str(error), "a server would start on the CPU, or not at all: mend the driver")
        ]
    if not found:
        return [Finding(Level.NOTE, "GPU", "none")]
    if not torch.cuda.is_available():
        detail = (
            f"{len(found)} × {found[0].name}, driver {found[0].driver}: torch {torch.__version__} does not use them"
        )
        return [Finding(Level.BAD, "GPU", detail, "install the torch build that your engine asks for")]
    findings = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        detail = f"{name}, compute {major}.{minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        findings.append(Finding(Level.OK, f"GPU {index}", f"{detail}, driver {found[0].driver}"))
    return findings
