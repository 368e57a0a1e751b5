"""The native experts beyond what every backend is tested for: threads, instruction sets, building, forks, exits."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from support.experts import error, inputs, judge, make_weights, route
from support.instruction_sets import INSTRUCTION_SET
from support.native_sample import usable_variants

from k26_plugins.common.experts import ExpertsError, ExpertWeights, create_experts, reference_experts
from k26_plugins.common.experts.native import NativeExperts, backend, build
from k26_plugins.common.experts.native.build import VARIANTS, BuildError, library
from k26_plugins.common.experts.native.threads import Threads, process_threads
from k26_plugins.common.host import cores
from k26_plugins.common.host.cores import Core

REASON = NativeExperts.unsupported(make_weights(1, 128, 64))
needs_native = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_amx = pytest.mark.skipif("amx" not in usable_variants(), reason="no amx here")
# The goal is 4e-3. What remains above 3e-5 is the rounding of the result to bfloat16, 1.7e-3.
TOLERANCE, FLOAT_TOLERANCE = 2.5e-3, 1e-4
PARTS = [(0, 1), (1, 3), (3, 6), (6, 23)]
SHAPES = [
    (1, 2, 8, 128, 64),
    (3, 4, 4, 128, 32),
    (17, 1, 8, 192, 96),
    (130, 2, 3, 128, 64),
    (1, 8, 8, 2048, 512),
    (9, 2, 3, 544, 64),
    (77, 1, 1, 2048, 32),  # in tiles, over the inputs in two parts
]


def each_variant() -> list[object]:
    """The library's instruction sets as a test's parameter; one that this CPU lacks is skipped with that reason."""
    usable = [] if REASON else usable_variants()
    return [
        pytest.param(name, marks=pytest.mark.skipif(name not in usable, reason=REASON or f"this CPU has no {name}"))
        for name in VARIANTS
    ]


def load(weights: ExpertWeights) -> NativeExperts:
    return NativeExperts.load(weights.copy_of(list(range(weights.num_experts))))


def use(monkeypatch: pytest.MonkeyPatch, threads: Threads) -> None:
    monkeypatch.setattr(backend, "process_threads", lambda: threads)


@pytest.mark.parametrize("variant", each_variant())
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts", "hidden", "inner"), SHAPES, ids=str)
def test_instruction_sets(
    variant: str,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    inner: int,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, str], None],
) -> None:
    threads = Threads(library(variant))
    use(monkeypatch, threads)
    weights = make_weights(num_experts, hidden, inner)
    ids, topk_weights = route(num_tokens, top_k, num_experts)
    x = inputs(num_tokens, hidden)
    expected = judge(weights, x, ids, topk_weights)
    reference = reference_experts(x.double(), ids, topk_weights, weights.expert, num_experts)
    assert error(reference, expected) <= 1e-12
    experts = load(weights)
    assert error(experts.apply(x, ids, topk_weights), expected) <= TOLERANCE
    assert error(experts.apply(x.float(), ids, topk_weights), expected) <= FLOAT_TOLERANCE
    assert error(experts.apply(x.half(), ids, topk_weights), expected) <= TOLERANCE
    record_property(INSTRUCTION_SET, f"native {threads.instruction_set}")


def repacked_plainly(packed: torch.Tensor, scale: torch.Tensor, *, gated: bool) -> list[torch.Tensor]:
    """The bytes and scales of an expert's projection as `kernel.hpp` describes them, row by row and word by word."""
    rows, words = packed.shape
    inner = rows // 2
    # Two tiles of gate, then the two of up.
    firsts = [at for pair in range(0, inner, 32) for at in (pair, pair + 16, inner + pair, inner + pair + 16)]
    tiles = firsts if gated else range(0, rows, 16)
    u = unpack_from_int32(packed, 4, torch.Size((rows, 8 * words))).to(torch.int32) + 8
    lanes = [u[first + row, 8 * word :][:8] for first in tiles for word in range(words) for row in range(16)]
    scales = [scale[first + row, group] for first in tiles for group in range(words // 4) for row in range(16)]
    return [torch.cat([lane[:4] + 16 * lane[4:] for lane in lanes]).to(torch.uint8), torch.stack(scales)]


@pytest.mark.parametrize("variant", each_variant())
def test_repacked_bytes(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every instruction set and any number of threads, also where a tile is not a multiple of a vector long."""
    weights = make_weights(2, 96, 160)
    w13 = [repacked_plainly(weights.w13_packed[i], weights.w13_scale[i], gated=True) for i in range(2)]
    w2 = [repacked_plainly(weights.w2_packed[i], weights.w2_scale[i], gated=False) for i in range(2)]
    for team in (1, 3):
        use(monkeypatch, Threads(library(variant), team=team))
        found = load(weights).weights
        for expert in range(2):
            assert torch.equal(found.w13_packed[expert].view(torch.uint8).flatten(), w13[expert][0])
            assert torch.equal(found.w13_scale[expert].flatten(), w13[expert][1])
            assert torch.equal(found.w2_packed[expert].view(torch.uint8).flatten(), w2[expert][0])
            assert torch.equal(found.w2_scale[expert].flatten(), w2[expert][1])


@needs_native
def test_same_bits_on_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tokens alone, some together, and values at which rounding or the exponential could differ."""
    weights = make_weights(4, 544, 96)
    ids, topk_weights = route(23, 2, 4)
    x = inputs(23, 544)
    x[3], x[4], x[5] = x[3] * 1e-20, x[4] * 3e4, 0
    x[6, 5] = float("inf")
    results = []
    for name in usable_variants():
        use(monkeypatch, Threads(library(name)))
        experts = load(weights)
        results.append(torch.cat([experts.apply(x[i:j].float(), ids[i:j], topk_weights[i:j]) for i, j in PARTS]))
    assert results[0][[*range(6), *range(7, 23)]].isfinite().all()
    assert all(torch.equal(result.view(torch.int32), results[0].view(torch.int32)) for result in results)


@needs_native
def test_same_bits_with_any_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's threads and ours, one to three of them, on one node and on two, twice each."""
    weights = make_weights(6, 192, 160)
    ids, topk_weights = route(90, 3, 6)
    ids[5:20, 1] = -1
    x = inputs(90, 192)
    cpu = min(os.sched_getaffinity(0))
    teams = [Threads(library(), team=count) for count in (1, 2, 3)]
    one_node = [Threads(library(), pool=[Core(0, cpu)] * count, team=0) for count in (1, 2, 3)]
    two_nodes = Threads(library(), pool=[Core(0, cpu), Core(0, cpu), Core(1, cpu)], team=0)
    results = []
    for threads in [*teams, *one_node, two_nodes]:
        use(monkeypatch, threads)
        experts = load(weights)
        results += [experts.apply(x, ids, topk_weights) for _ in range(2)]
    assert error(results[0], judge(weights, x, ids, topk_weights)) <= TOLERANCE
    assert all(torch.equal(result, results[0]) for result in results)


@needs_native
def test_a_token_does_not_depend_on_its_batch() -> None:
    """Also across the bounds of the tokens and of the groups of inputs that are computed at a time."""
    weights = make_weights(4, 544, 32)
    experts = load(weights)
    ids, topk_weights = route(1100, 2, 4)
    x = inputs(1100, 544)
    together = experts.apply(x, ids, topk_weights)
    for part in (slice(0, 1), slice(1000, 1030), slice(1099, 1100)):
        assert torch.equal(experts.apply(x[part], ids[part], topk_weights[part]), together[part])


@needs_native
def test_submitted_work() -> None:
    """Several at once, waited for in another order or not at all; arguments dropped meanwhile; results of apply."""
    weights = make_weights(4, 128, 64)
    experts = load(weights)
    ids, topk_weights = route(40, 2, 4)
    x = inputs(40, 128)
    expected = experts.apply(x, ids, topk_weights)
    waiting = [experts.submit(x.clone(), ids.clone(), topk_weights.clone()) for _ in range(5)]
    del waiting[1]
    assert torch.equal(experts.apply(x, ids, topk_weights), expected)
    assert all(torch.equal(wait(), expected) for wait in reversed(waiting))
    strided = torch.empty(40, 256, dtype=torch.bfloat16)[:, ::2]
    assert experts.submit(x, ids, topk_weights, out=strided)() is strided
    assert torch.equal(strided, expected)


@needs_native
def test_calls_from_several_threads() -> None:
    layers = [load(make_weights(4, 128, 64, seed)) for seed in range(3)]
    ids, topk_weights = route(33, 2, 4)
    x = inputs(33, 128)
    expected = [layer.apply(x, ids, topk_weights) for layer in layers]
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(30):
            layer = (number + turn) % 3
            result = (
                layers[layer].submit(x, ids, topk_weights)() if turn % 2 else layers[layer].apply(x, ids, topk_weights)
            )
            if not torch.equal(result, expected[layer]):
                wrong.append(layer)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_native
def test_what_is_not_finite_stays_so() -> None:
    weights = make_weights(2, 128, 64)
    experts = load(weights)
    x = inputs(3, 128)
    x[1, 7] = float("nan")
    x[2, 7] = float("inf")
    result = experts.apply(x, torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1))
    assert result[0].isfinite().all()
    assert not result[1].isfinite().any()
    assert not result[2].isfinite().any()
    assert not experts.apply(torch.zeros(1, 128), torch.zeros(1, 1), torch.ones(1, 1)).any()


@needs_native
def test_arguments_that_are_refused() -> None:
    experts = load(make_weights(2, 128, 64))
    x, ones = inputs(2, 128), torch.ones(2, 1)
    nobody = torch.full((2, 1), -1)
    with pytest.raises(ExpertsError, match=r"hidden_states has shape \[2, 64\]"):
        experts.apply(inputs(2, 64), nobody, ones)
    with pytest.raises(ExpertsError, match=r"topk_weights has shape \[1, 1\]"):
        experts.apply(x, nobody, ones[:1])
    with pytest.raises(ExpertsError, match=r"out has shape \[1, 128\]"):
        experts.apply(x, nobody, ones, out=torch.empty(1, 128))


@needs_native
def test_a_forked_child_computes() -> None:
    experts = load(make_weights(4, 128, 64))
    ids, topk_weights = route(5, 2, 4)
    x = inputs(5, 128)
    expected = experts.apply(x, ids, topk_weights)
    left_over = experts.submit(x, ids, topk_weights)
    child = os.fork()
    if child == 0:
        # pytest must not run on in the child, whatever happens.
        try:
            same = torch.equal(experts.apply(x, ids, topk_weights), expected)
            del left_over
            os._exit(0 if same else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(left_over(), expected)


@needs_native
def test_a_process_ends_with_work_in_flight() -> None:
    program = (
        "import torch; from support.experts import *; from k26_plugins.common.experts.native import NativeExperts\n"
        "experts = NativeExperts.load(make_weights(4, 256, 256)); ids, weights = route(200, 2, 4)\n"
        "wait = experts.submit(inputs(200, 256), ids, weights)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Exception ignored" not in done.stderr


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine on which nothing was compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    yield tmp_path
    library.cache_clear()


def test_without_a_compiler(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "variants", lambda: ["avx512", "avx2"])
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert create_experts(make_weights(2, 128, 64)).name == "cpu"
    assert "native is not, because no C++ compiler is found (c++, g++, clang++): install GCC" in caplog.text


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("#!/bin/sh\necho 'error: no such option' >&2; exit 1\n", "error: no such option"),
        ("#!/bin/sh\nexit 3\n", "status 3"),
    ],
    ids=["says why", "silent"],
)
def test_a_compiler_that_fails(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, message: str) -> None:
    script = empty_cache / "compiler"
    script.write_text(compiler)
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(BuildError, match=f"compiler cannot compile it .*{message}.*: install GCC"):
        build.build("avx512")
    assert not list(empty_cache.rglob("*.so"))


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "k26-plugins").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BuildError, match="set XDG_CACHE_HOME"):
        build.build("avx512")


@needs_native
def test_a_library_that_cannot_be_loaded(empty_cache: Path) -> None:
    for name in build.variants():
        build.build(name).write_bytes(b"cut off")
    assert "its library cannot be loaded" in str(NativeExperts.unsupported(make_weights(1, 128, 64)))


def test_compiled_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that start together, and one that comes later."""
    compiled: list[Path] = []

    def compile_slowly(target: Path, flags: tuple[str, ...]) -> None:
        compiled.append(target)
        threading.Event().wait(0.2)
        target.touch()

    monkeypatch.setattr(build, "_compile", compile_slowly)
    ranks = [threading.Thread(target=build.build, args=("avx512",)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert compiled == [build.build("avx512")]


def test_which_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU has and torch was not told to do without."""
    x86, arm = (
        set().union(*(variant.needs for variant in VARIANTS.values() if variant.machine == machine))
        for machine in ("x86_64", "aarch64")
    )
    for capability, missing, expected in (
        ("AVX512", set(), ["amx", "avx512_vnni", "avx512", "avx2_vnni", "avx2"]),
        ("AVX512", {"amx_tile"}, ["avx512_vnni", "avx512", "avx2_vnni", "avx2"]),
        ("AVX512_BF16", {"avx_vnni", "amx_bf16"}, ["avx512_vnni", "avx512", "avx2"]),
        ("AVX512", {"avx512_vnni", "avx_vnni"}, ["avx512", "avx2"]),
        ("AVX2", set(), ["avx2_vnni", "avx2"]),
        ("AVX2", {"avx512f", "avx_vnni"}, ["avx2"]),
        ("DEFAULT", {"asimddp"}, []),
        ("SVE256", set(), ["neon_i8mm", "neon_dotprod"]),
        ("DEFAULT", {"i8mm"}, ["neon_dotprod"]),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        flags = frozenset((x86 if capability.startswith("AVX") else arm) - missing)
        monkeypatch.setattr(build, "cpu_flags", lambda flags=flags: flags)
        assert build.variants() == expected
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(build, "cpu_flags", frozenset)
    with pytest.raises(BuildError, match="it needs AVX2, AVX512 or ARM's dot product and torch finds DEFAULT"):
        build._best_library()


def test_a_compiler_too_old_for_the_best_set(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def compile_old(target: Path, flags: tuple[str, ...]) -> None:
        tried.append(target.name.split("-")[1])
        raise BuildError(f"unrecognized option in {flags}")

    monkeypatch.setattr(build, "_compile", compile_old)
    monkeypatch.setattr(build, "variants", lambda: ["avx2_vnni", "avx2"])
    with pytest.raises(BuildError, match="-mavxvnni"):
        library()
    assert tried == ["avx2_vnni", "avx2"]


@needs_native
@pytest.mark.skipif("amx" in usable_variants(), reason="this system gives AMX's registers")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86-64's")
def test_a_system_that_refuses_amx(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Asked for in truth: the next set is taken, and the log says so."""
    best = usable_variants()[0]
    library.cache_clear()
    monkeypatch.setattr(build, "variants", lambda: ["amx", best])
    with pytest.raises(BuildError, match="the system refuses the registers of amx"):
        library("amx")
    with caplog.at_level(logging.WARNING):
        assert Threads(library()).instruction_set == Threads(library(best)).instruction_set
    assert f"run on {best} and not on the faster amx: the system refuses the registers" in caplog.text
    library.cache_clear()


@needs_native
@needs_amx
def test_a_system_that_gives_amx_and_refuses_it_to_this_process() -> None:
    """By a signal stack that has no room for AMX's registers: Linux looks at those of all threads."""
    program = (
        "import ctypes; memory = ctypes.create_string_buffer(8192)\n"
        "class Stack(ctypes.Structure):\n"
        "    _fields_ = [('at', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]\n"
        "stack = Stack(ctypes.addressof(memory), 0, len(memory))\n"
        "assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0\n"
        "import logging; logging.basicConfig()\n"
        "from support.experts import *; from k26_plugins.common.experts import create_experts\n"
        "from k26_plugins.common.experts.native.threads import process_threads\n"
        "experts = create_experts(make_weights(2, 128, 64), 'native')\n"
        "experts.apply(inputs(40, 128), *route(40, 2, 2)); print(process_threads().instruction_set)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "AVX512 with VNNI"
    assert "not on the faster amx: the system refuses the registers of amx (No space left on device)" in done.stderr


@needs_native
@needs_amx
def test_amx_beside_torchs_own() -> None:
    """torch's bfloat16 product uses the same registers on the same threads, in other shapes: neither disturbs the other."""
    torch.manual_seed(0)
    a, b = torch.randn(64, 512).bfloat16(), torch.randn(512, 256).bfloat16()
    experts = load(make_weights(4, 128, 64))
    ids, topk_weights = route(90, 2, 4)
    x = inputs(90, 128)
    product, expected = a @ b, experts.apply(x, ids, topk_weights)
    for _ in range(5):
        assert torch.equal(experts.apply(x, ids, topk_weights), expected)
        assert torch.equal(a @ b, product)
    assert error(product, a.double() @ b.double()) <= 1e-2


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight CPUs on two nodes, CPU i and i + 4 the two threads of a core."""
    monkeypatch.setattr(cores, "allowed_cpus", lambda: {1, 2, 3, 4, 5, 6, 7})
    monkeypatch.setattr(cores, "_read", lambda file: str(int(file.parts[-3][3:]) % 4))
    monkeypatch.setattr(cores, "_node", lambda cpu: cpu % 4 // 2)
    assert cores.cores() == [Core(0, 1), Core(0, 4), Core(1, 2), Core(1, 3)]
    assert cores.cores(2) == [Core(0, 1), Core(1, 2)]


def test_cores_of_a_rank_whose_threads_are_pinned_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way vLLM's and SGLang's CPU workers pin themselves; a thread that is free does not count."""
    monkeypatch.setattr(cores, "_affinities", lambda: [{2}, {3}, {0, 1, 2, 3}])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2})
    assert cores.allowed_cpus() == {2, 3}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert cores.allowed_cpus() == {0, 1}


@needs_native
def test_the_setting_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K26_CPU_THREADS", "0")
    with pytest.raises(ValueError, match="K26_CPU_THREADS is '0'"):
        Threads(library())
    monkeypatch.setenv("K26_CPU_THREADS", "1")
    Threads(library()).start_pool()
    assert process_threads() is process_threads()


@needs_native
def test_whose_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [Core(0, 0), Core(0, 1)]
    for torch_threads, chosen, team in ((4, two, 4), (1, two, 0), (1, two[:1], 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=torch_threads: count)
        assert Threads(library(), pool=chosen).team == team
