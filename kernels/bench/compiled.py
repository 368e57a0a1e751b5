"""Compile every kernel in every shipped configuration for every target, and show figures of the code. Needs no GPU.

    cd kernels && python -m bench.compiled                     a table
    cd kernels && python -m bench.compiled --json FILE         and the figures, with which the tests compare

Registers and spills are read from the binary, the matrix instruction and the widths of loads from the assembly.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from k26_kernels.align import PAIRS_AT_ONCE, PAIRS_RANKED, align_kernel, count_kernel, place_kernel
from k26_kernels.batched import TOKENS_WRITTEN, table_kernel
from k26_kernels.combine import reduce_kernel, silu_and_mul_kernel
from k26_kernels.config import INVARIANT, SINGLE, GemmConfig, KernelConfig, Shape, default_configs
from k26_kernels.moe_gemm import moe_gemm_kernel
from k26_kernels.target import TARGETS, Device, Target
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

LAYER = Shape(7168, 2048, 384)
# A rank's layer under tensor parallel 8. For some block sizes its w2 has a config that differs from that of LAYER.
SHARD = Shape(7168, 256, 384)
TOP_K = 8


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel with its compile-time arguments for one target."""

    name: str
    target: str
    kernel: str
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    float32_out: bool = False


@dataclass(frozen=True)
class Facts:
    """Figures of a compiled variant. Loads and instructions are counted in the assembly, which may be unrolled."""

    name: str
    target: str
    threads: int
    registers: int
    """Registers of each thread."""
    spilled_bytes: int
    shared_memory: int
    """Bytes of shared memory of a program."""
    tensor_memory: int
    """Columns of tensor memory of a program, on sm_100; 0 elsewhere."""
    programs_per_sm: int
    """Number of programs that an SM of the smallest GPU of the family holds at a time."""
    matrix_instructions: dict[str, int]
    """Number of matrix instructions, by instruction."""
    weight_loads: dict[str, int]
    """Number of the widest loads from global memory, by instruction."""
    evict_first_loads: int
    """Number of asynchronous copies whose data the cache is told to evict first; 0 on AMD."""
    shuffles: int
    loop_instructions: int
    """Machine instructions that a warp issues for a step along K; 0 on AMD and for kernels without such a loop."""
    tile_instructions: int
    """Machine instructions for a tile besides those of its steps; 0 if a tile is a single step, counted above."""
    waits_first: bool
    """Whether the machine code waits for the launch before it, ahead of every access to the GPU's memory."""


KERNELS = {
    "moe_gemm": (moe_gemm_kernel, "*bf16 *i32 *bf16 {out} *i32 *i32 *fp32 *i32 *i32 i32 i32 i32"),
    "align": (align_kernel, "*i32 *i32 *i32 *i32 i32 i32 i32"),
    "table": (table_kernel, "*i32 *i32 *i32 i32 i32"),
    "count": (count_kernel, "*i32 *i32 *i32 i32 i32 i32"),
    "place": (place_kernel, "*i32 *i32 *i32 *i32 *i32 i32 i32 i32"),
    "silu_and_mul": (silu_and_mul_kernel, "*fp32 *bf16 i32"),
    "reduce": (reduce_kernel, "*bf16 *i32 *i32 *bf16 i32 i32 i32"),
}


def gemm_variant(
    target: Target, shape: Shape, name: str, config: KernelConfig, gemm_config: GemmConfig, gated: bool, split_k: int
) -> Variant:
    """Return the variant of the GEMM kernel for one config.

    name: the config's. gated: whether it is the w13 GEMM, with SiLU and gate; else w2. split_k: in how many parts K is
    cut.
    """
    hidden_size, intermediate_size = shape.hidden_size, shape.intermediate_size
    out_features, in_features = (2 * intermediate_size, hidden_size) if gated else (hidden_size, intermediate_size)
    constants = {
        "N": out_features,
        "K": in_features,
        "PAIRS_PER_X": TOP_K if gated else 1,
        "EPILOGUE": "weighted" if not gated else "silu_and_mul" if split_k == 1 else "partial",
        "SORTED": not name.startswith(SINGLE),
        "HAS_MAP": True,
        "SPLIT_K": split_k,
        "BLOCK_SIZE_M": config.BLOCK_SIZE_M,
        "BLOCK_SIZE_N": gemm_config.BLOCK_SIZE_N,
        "BLOCK_SIZE_K": gemm_config.BLOCK_SIZE_K,
        "FRAGMENT": target.fragment,
        "PACKED_MATH": not target.amd,
        "WAIT": target.waits,
        "DEPENDENT": target.dependent,
    }
    label = f"{'w13' if gated else 'w2'} {name}{'' if split_k == 1 else ' split'}"
    float32 = split_k > 1 or (not gated and config.BLOCK_SIZE_M <= 16)
    return Variant(label, target.name, "moe_gemm", constants, gemm_config.num_warps, gemm_config.num_stages, float32)


def variants() -> Iterator[Variant]:
    """Yield every variant that is shipped: the small kernels, and the GEMMs in every config."""
    hidden_size, intermediate_size = LAYER.hidden_size, LAYER.intermediate_size
    sort = {"BINS": 512, "PAIRS_AT_ONCE": PAIRS_AT_ONCE, "HAS_MAP": True}
    small: dict[str, dict[str, Any]] = {
        "align": {**sort, "BLOCK_SIZE_M": 16},
        "table": {"BLOCK_SIZE_M": 16, "BINS": 512, "TOKENS_WRITTEN": TOKENS_WRITTEN},
        "count": sort,
        "place": {**sort, "BLOCK_SIZE_M": 16, "PAIRS_RANKED": PAIRS_RANKED},
        "silu_and_mul": {"I": intermediate_size, "SPLIT_K": 2, "BLOCK": 256},
        "reduce": {"H": hidden_size, "TOP_K": TOP_K, "SPLIT_K": 1, "HAS_MAP": True, "BLOCK": 1024},
    }
    for target in TARGETS.values():
        for name, constants in small.items():
            of_target = {"DEPENDENT": target.dependent, "FRAGMENT": target.fragment}
            own = {key: value for key, value in of_target.items() if key in KERNELS[name][0].arg_names}
            yield Variant(name, target.name, name, {**constants, **own})
        for name, config in default_configs(target.name).items():
            yield gemm_variant(target, LAYER, name, config, config.w13, True, 1)
            yield gemm_variant(target, LAYER, name, config, config.w2, False, 1)
            if name in (SINGLE, INVARIANT):
                yield gemm_variant(target, LAYER, name, config, config.w13, True, 2)
        for name, config in default_configs(target.name, SHARD.intermediate_size).items():
            if config.w2 != default_configs(target.name)[name].w2:
                yield replace(gemm_variant(target, SHARD, name, config, config.w2, False, 1), name=f"w2 {name} short")


def compile_variant(variant: Variant) -> Facts:
    """Compile a variant, and return its figures."""
    target = TARGETS[variant.target]
    function, types = KERNELS[variant.kernel]
    out = "*fp32" if variant.float32_out else "*bf16"
    arguments = [name for name in function.arg_names if name not in variant.constants]
    signature = dict(zip(arguments, types.format(out=out).split(), strict=True))
    pointers = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(function, signature=signature, constexprs=variant.constants, attrs=pointers)
    gpu = GPUTarget("hip", target.name, 64) if target.amd else GPUTarget("cuda", int(target.name[3:]), 32)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **target.options}
    if variant.constants.get("DEPENDENT"):
        options["launch_pdl"] = True
    compiled = triton.compile(source, target=gpu, options=options)
    read = read_amd if target.amd else read_nvidia
    facts = read(compiled.asm)
    threads, metadata = variant.num_warps * gpu.warp_size, compiled.metadata
    columns = getattr(metadata, "tmem_size", None) or 0
    return Facts(
        variant.name,
        variant.target,
        shared_memory=metadata.shared,
        tensor_memory=columns,
        programs_per_sm=Device(target, "", 0).programs_per_sm(threads, facts["registers"], metadata.shared, columns),
        threads=threads,
        **facts,
    )


def count(pattern: str, text: str) -> dict[Any, int]:
    """Return how often each string that the pattern's group matches is in the text."""
    return dict(Counter(re.findall(pattern, text, re.MULTILINE)))


def cuobjdump(option: str, file: str) -> str:
    """Return what NVIDIA's `cuobjdump`, which comes with Triton, prints about a file for one of its options."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def loop_instructions(sass: str) -> tuple[int, int]:
    """Return the number of instructions of the innermost loop with matrix instructions, and of the next loop around it.

    A loop is a backward jump over a matrix instruction; the shortest is the innermost. The second number leaves out the
    instructions of the innermost loop. All instructions between jump and target are counted, though a branch may skip
    some.
    """
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ )?(\S+)([^;]*);", sass)
    places = {int(address, 16): index for index, (address, _, _) in enumerate(instructions)}
    lengths = []
    for index, (_, operation, operands) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", operands)
        start = places.get(int(target[1], 16)) if operation.startswith("BRA") and target else None
        if start is not None and start < index:
            body = [name for _, name, _ in instructions[start : index + 1]]
            if any(re.match(r"HMMA|HGMMA|UTC\w*MMA", name) for name in body):
                lengths.append(len(body))
    innermost, *around = sorted(lengths) or [0]
    return innermost, around[0] - innermost if around else 0


def read_nvidia(asm: Any) -> dict[str, Any]:
    """Return the figures in the PTX and the cubin of a kernel. asm: what Triton compiled, by kind."""
    ptx = asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, code = (cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", usage)
    assert found, usage
    loads = count(r"(cp\.async\.c[ag]\.shared\.global)(?:\.L2::cache_hint)? \[ *[^\]]*\], \[[^\]]*\], (0x\w+|\d+)", ptx)
    steps, tile = loop_instructions(code)
    wide = {f"cp.async {int(size, 0)}": number for (_, size), number in loads.items()}
    return {
        "registers": int(found[1]),
        "spilled_bytes": int(found[2]) + int(found[3]),
        "matrix_instructions": count(r"(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx),
        "weight_loads": {**wide, **count(r"(ld\.global\S*\.v4\.b32)", ptx)},
        "evict_first_loads": len(re.findall(r"cp\.async\S*\.L2::cache_hint", ptx)),
        "shuffles": len(re.findall(r"shfl\.sync", ptx)),
        "loop_instructions": steps,
        "tile_instructions": tile,
        "waits_first": waits_first(code),
    }


def waits_first(sass: str) -> bool:
    """Return whether ACQBULK, which `griddepcontrol.wait` becomes, stands ahead of every access to the GPU's memory."""
    accesses = re.search(r"\b(LDG|STG|LDGSTS|ATOMG|RED|UBLKCP|UTMALDG)\b", sass)
    wait = re.search(r"\bACQBULK\b", sass)
    return wait is not None and (accesses is None or wait.start() < accesses.start())


def read_amd(asm: Any) -> dict[str, Any]:
    """Return the figures in the AMD assembly of a kernel. asm: what Triton compiled, by kind."""
    code = asm["amdgcn"]
    figures = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)", code)}
    return {
        "registers": figures["vgpr_count"],
        "spilled_bytes": 4 * figures["vgpr_spill_count"] + figures["private_segment_fixed_size"],
        "matrix_instructions": count(r"\b(v_mfma)_", code),
        "weight_loads": count(r"\b((?:global|buffer)_load_dwordx4)\b", code),
        "evict_first_loads": 0,
        # Weights that pass to other threads through shared memory are stored there as single halves of a word.
        "shuffles": len(re.findall(r"ds_bpermute|ds_swizzle|v_permlane|ds_write_b16", code)),
        "loop_instructions": 0,
        "tile_instructions": 0,
        "waits_first": False,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(compile_variant, variants()))
    for facts in results:
        print(
            f"{facts.target:7} {facts.name:18} registers {facts.registers:4} spilled {facts.spilled_bytes:4} "
            f"shared {facts.shared_memory:6} programs {facts.programs_per_sm} {facts.matrix_instructions} "
            f"{facts.weight_loads} shuffles {facts.shuffles} loop {facts.loop_instructions} tile {facts.tile_instructions}"
        )
    if arguments.json:
        document = {"triton": triton.__version__, "facts": [asdict(facts) for facts in results]}
        arguments.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
