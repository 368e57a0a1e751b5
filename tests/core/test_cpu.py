"""Tests of what is read of the CPU, from files written here as Linux writes them on x86-64 and on ARM."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from k26_plugins.common.host import cpu

X86 = "processor\t: 0\nmodel name\t: AMD EPYC 9354\nflags\t\t: fpu avx2 avx512f\npower management:\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nBogoMIPS\t: 2000.00\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\n\n"


@pytest.mark.parametrize(
    ("text", "flags", "model"),
    [(X86, {"fpu", "avx2", "avx512f"}, "AMD EPYC 9354"), (ARM, {"fp", "asimd", "asimddp", "i8mm"}, None)],
)
def test_the_first_cpu_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, flags: set[str], model: str | None
) -> None:
    """ARM's file has features and no name, so the architecture stands for the name."""
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    monkeypatch.setattr(cpu, "_CPUINFO", file)
    assert cpu.cpu_flags() == flags
    assert cpu.cpu_model() == (model or platform.machine())


def test_without_the_file_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "none")
    assert cpu.cpu_flags() == frozenset()
    assert cpu.cpu_model() == platform.machine()
