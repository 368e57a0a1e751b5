"""Tests of the wheels of a release, which bring the native experts without a compiler."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support.native_sample import usable_variants

from k26_plugins.common.experts.native.build import VARIANTS, file_name, variants

ROOT = Path(__file__).parent.parent.parent
MACHINES = sorted({variant.machine for variant in VARIANTS.values()})

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("wheel") is None or not shutil.which(f"{platform.machine()}-linux-gnu-g++"),
    reason=f"needs the package wheel and {platform.machine()}-linux-gnu-g++",
)


def by_machine(folder: Path) -> dict[str, Path]:
    """Return the wheels of a folder by their machine, with "any" for the wheel without a library."""
    return {
        next((machine for machine in MACHINES if file.stem.endswith(machine)), "any"): file for file in folder.iterdir()
    }


def libraries(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {Path(name).name: archive.read(name) for name in archive.namelist() if name.endswith(".so")}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the wheels, with one instruction set for each machine: this CPU's best, and one of ARM's."""
    if not variants():
        pytest.skip("this CPU has no instruction set of the native experts")
    spec = importlib.util.spec_from_file_location("wheels_script", ROOT / "ci/wheels.py")
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.VARIANTS = {name: VARIANTS[name] for name in (usable_variants()[0], "neon_dotprod")}
    folder = tmp_path_factory.mktemp("wheels")
    script.wheels(folder)
    return by_machine(folder)


def test_native_serves_where_no_compiler_is(wheels: dict[str, Path], tmp_path: Path) -> None:
    """pip installs the wheel, so its platform tag is checked too. torch comes from this environment."""
    site, empty, cache = (tmp_path / name for name in ("site", "empty", "cache"))
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheels[platform.machine()])], check=True)
    program = (
        "import k26_plugins; from support.experts import make_weights\n"
        "from k26_plugins.common.experts import create_experts\n"
        "print(k26_plugins.__file__, create_experts(make_weights(2, 128, 64), 'native').name)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {
        "PATH": str(empty),
        "PYTHONPATH": os.pathsep.join((str(site), str(ROOT / "tests"))),
        "XDG_CACHE_HOME": str(cache),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=empty, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(site / "k26_plugins/__init__.py"), "native"]
    assert not cache.exists()


@pytest.mark.parametrize("machine", MACHINES)
def test_a_wheel_is_of_one_architecture(wheels: dict[str, Path], machine: str) -> None:
    if machine not in wheels:
        pytest.skip(f"no {machine}-linux-gnu-g++ (Debian: g++-{machine.replace('_', '-')}-linux-gnu)")
    # The ELF standard numbers the architectures in this field of the header.
    number = {"x86_64": 62, "aarch64": 183}[machine]
    assert [int.from_bytes(file[18:20], "little") for file in libraries(wheels[machine]).values()] == [number]
    assert not libraries(wheels["any"])


@pytest.mark.parametrize("machine", MACHINES)
def test_a_wheel_loads_on_old_systems(wheels: dict[str, Path], machine: str) -> None:
    """A wheel loads on all systems on which torch's own wheels load, which ask for glibc 2.28."""
    if machine not in wheels:
        pytest.skip(f"no {machine}-linux-gnu-g++ (Debian: g++-{machine.replace('_', '-')}-linux-gnu)")
    asked = re.search(r"-manylinux_2_(\d+)_", wheels[machine].name)
    assert asked is not None
    assert int(asked[1]) <= 28


@pytest.mark.long
def test_a_release_has_every_instruction_set(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "ci/wheels.py"), str(tmp_path)], cwd=ROOT, check=True)
    found = by_machine(tmp_path)
    for machine in set(MACHINES) & set(found):
        expected = {file_name(name) for name, variant in VARIANTS.items() if variant.machine == machine}
        assert set(libraries(found[machine])) == expected
