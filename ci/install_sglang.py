"""Install SGLang into the environment that runs this script, and what lets it start without a GPU's driver.

    python ci/install_sglang.py 0.5.23
    python ci/install_sglang.py 0.7.2 --kt      # KTransformers' fork of it
    LD_LIBRARY_PATH="$(python ci/install_sglang.py --driver)" python -m sglang.launch_server --device cpu …

PyPI has only SGLang's CUDA build. To be loaded, its compiled operators need libcuda.so.1, which a GPU's driver brings,
and nothing else of a GPU. This script builds a library of that name in which every driver call answers "no device"
(CUDA's error 100). The fork also asks for the GPU's capability when it is imported, and is told 0.0. Both are for this
project's tests on machines without a GPU; nobody should serve with them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from packages import install

DRIVER = Path(sys.prefix) / "lib" / "no-cuda-device"
NO_DEVICE = 100
# This code runs at the start of every process of the environment, before torch is imported.
NO_CAPABILITY = """
import sys
from importlib.machinery import PathFinder


class NoCapability:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torch.cuda":
            return None
        sys.meta_path.remove(cls)
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            module.get_device_capability = lambda device=None: (0, 0)

        spec.loader.exec_module = execute_and_patch
        return spec


sys.meta_path.insert(0, NoCapability)
"""
# A symbol of the driver begins with `cu` and a capital letter; those of the runtime (`cudaMalloc`) come with torch's
# wheels.
DRIVER_SYMBOL = re.compile(r"\bU (cu[A-Z]\w*)")


def driver_symbols(package: Path) -> set[str]:
    """Return the driver's symbols that the compiled operators of a package need."""
    found: set[str] = set()
    for library in package.rglob("*.so"):
        listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
        found |= set(DRIVER_SYMBOL.findall(listed.stdout))
    return found


def build_driver(symbols: set[str]) -> None:
    """Build a libcuda.so.1 with these symbols, each of which is a function that reports that there is no device."""
    DRIVER.mkdir(parents=True, exist_ok=True)
    source = "".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in sorted(symbols))
    with tempfile.NamedTemporaryFile("w", suffix=".c") as file:
        file.write(source)
        file.flush()
        output = DRIVER / "libcuda.so.1"
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{output.name}", "-o", output, file.name], check=True)


def install_fork(version: str, packages: Path) -> None:
    """Install KTransformers' fork, and the code that tells it a GPU's capability. packages: the folder for packages."""
    install(f"sglang-kt=={version}")
    # The fork's operators come in parts, in five packages of which sglang-kt requires four. The first import puts the
    # parts together and then fails, because the driver that the operators need is not built yet.
    install("--no-deps", f"ktransformers=={version}")
    subprocess.run([sys.executable, "-c", "import sgl_kernel"], check=False, capture_output=True)
    (packages / "k26_no_capability.py").write_text(NO_CAPABILITY, encoding="utf-8")
    (packages / "k26_no_capability.pth").write_text("import k26_no_capability\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", nargs="?", help="a release of sglang, such as 0.5.23")
    parser.add_argument("--kt", action="store_true", help="sglang-kt, KTransformers' fork, of that version")
    parser.add_argument("--driver", action="store_true", help="only print the folder for LD_LIBRARY_PATH")
    arguments = parser.parse_args()
    if arguments.driver:
        print(DRIVER)
        return
    if arguments.version is None:
        parser.error("give a version")
    packages = Path(sysconfig.get_path("platlib"))
    if arguments.kt:
        install_fork(arguments.version, packages)
    else:
        install(f"sglang=={arguments.version}")
    build_driver(driver_symbols(packages / "sgl_kernel"))


if __name__ == "__main__":
    main()
