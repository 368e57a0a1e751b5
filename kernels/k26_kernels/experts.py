"""Compute the routed sum of a layer on a GPU: choose kernels, their configs and their parts of the workspace."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

from k26_kernels.align import COLUMNS, counts_bytes, global_experts, max_blocks, moe_align_block_size
from k26_kernels.combine import reduce_kernel, silu_and_mul_kernel
from k26_kernels.config import (
    SINGLE,
    SINGLE_TOKENS,
    GemmConfig,
    KernelConfig,
    Shape,
    checked,
    choose,
    kernel_configs,
    measured,
)
from k26_kernels.dependent import launch_options
from k26_kernels.layout import PACK_FACTOR, repack
from k26_kernels.moe_gemm import moe_gemm_kernel
from k26_kernels.target import Device, device_of
from k26_kernels.unpack import INTERPRETED

# Tokens that are computed at a time: at the model's sizes and 8 experts a token their workspace is 1.2 GB.
TOKENS_AT_ONCE = 8192
# Up to this many token–expert pairs, an expert's output stays float32 until the sum over experts. For more pairs the
# memory traffic of float32 would cost noticeable time.
EXACT_PAIRS = 4096
# Up to this many pairs, a GEMM of sorted pairs may be cut along K. For more pairs two things would be noticeable: the
# time to sum w13's partials, which reads those of all ranks' pairs, and the partials' memory.
SPLIT_PAIRS = 256
# Programs to launch for each SM, by variant of the GEMM: as many as the SM holds at a time. How many these are is known
# only after a variant's first launch, which compiles it and takes PROGRAMS_AT_FIRST. Computing the number beforehand
# would mean guessing at registers, which change with Triton's version. No result depends on the number.
PROGRAMS_AT_FIRST = 4
programs_per_sm: dict[tuple[object, ...], int] = {}
_ALIGNMENT = 256
_REDUCE_BLOCK = 1024


@dataclass(slots=True)
class KernelExperts:
    """A layer's experts in the kernels' layout: the checkpoint's tensors, rearranged in place.

    `E` is the number of experts on this rank, `H` the hidden size and `I` this rank's part of the intermediate size.
    All four tensors are contiguous and on one GPU.
    """

    w13_packed: torch.Tensor
    """int32 `[E, 2 I, H / 8]`."""
    w13_scale: torch.Tensor
    """bfloat16 `[E, 2 I, H / 32]`."""
    w2_packed: torch.Tensor
    """int32 `[E, H, I / 8]`."""
    w2_scale: torch.Tensor
    """bfloat16 `[E, H, I / 32]`."""
    device: Device
    shape: Shape

    @classmethod
    def from_checkpoint(
        cls, w13_packed: torch.Tensor, w13_scale: torch.Tensor, w2_packed: torch.Tensor, w2_scale: torch.Tensor
    ) -> KernelExperts:
        """Take over the checkpoint's tensors and rearrange them in place.

        w13_packed: int32 `[E, 2 I, H / 8]`, the gate projection's rows, then the up projection's. w13_scale: bfloat16
        `[E, 2 I, H / 32]`. w2_packed: int32 `[E, H, I / 8]`. w2_scale: bfloat16 `[E, H, I / 32]`. All are contiguous
        and on the device that computes, a CUDA or ROCm GPU (or the CPU under Triton's interpreter). Raises ValueError
        for a device that the kernels do not support, and unless H and I are multiples of 128.
        """
        experts = cls.from_repacked(w13_packed, w13_scale, w2_packed, w2_scale)
        repack(w13_packed, w13_scale, experts.device.target.fragment, gated=True)
        repack(w2_packed, w2_scale, experts.device.target.fragment, gated=False)
        return experts

    @classmethod
    def from_repacked(
        cls, w13_packed: torch.Tensor, w13_scale: torch.Tensor, w2_packed: torch.Tensor, w2_scale: torch.Tensor
    ) -> KernelExperts:
        """Take over tensors that are in the kernels' layout already.

        Shapes, dtypes, devices and errors are those of `from_checkpoint`.
        """
        shape = Shape(w2_packed.shape[1], w2_packed.shape[2] * PACK_FACTOR, w13_packed.shape[0])
        return cls(w13_packed, w13_scale, w2_packed, w2_scale, device_of(w13_packed.device), shape)


@dataclass(frozen=True, slots=True)
class Plan:
    """The host's decisions for a batch. They follow from its size alone, so that nothing waits for the device."""

    config: KernelConfig
    sorted: bool
    split_w13: int
    split_w2: int
    num_pairs: int
    max_blocks: int
    weighted: torch.dtype
    """The dtype of an expert's output, before the sum over experts."""
    sections: dict[str, tuple[int, int]]
    """Offset and size in bytes of each part of the workspace."""
    bytes: int


def choose_split_k(tiles: float, in_features: int, block_size: int, num_sms: int) -> int:
    """Return into how many parts a GEMM is cut along K so that its tiles fill the GPU: a power of two.

    A part keeps at least four steps, because with fewer steps starting up costs more than the other SMs gain.
    """
    parts = 1
    while (
        tiles * parts < 2 * num_sms
        and in_features % (2 * parts * block_size) == 0
        and in_features // (2 * parts) >= 4 * block_size
    ):
        parts *= 2
    return parts


def expected_blocks(num_tokens: int, top_k: int, num_experts: int, global_experts: int, block_size: int) -> float:
    """Return how many blocks there are if experts are chosen evenly: one for each local expert that a token chose.

    With more tokens than fill these blocks, the number follows from the number of pairs.
    """
    chosen = min(1.0, top_k / global_experts)
    touched = num_experts * (1 - (1 - chosen) ** num_tokens)
    return max(touched, num_tokens * chosen * num_experts / block_size)


@lru_cache(maxsize=4096)
def make_plan(
    device: Device, shape: Shape, num_tokens: int, top_k: int, global_experts: int, batch_invariant: bool = False
) -> Plan:
    """Return the plan for a batch of at most TOKENS_AT_ONCE tokens. global_experts: how many there are on all ranks."""
    choices = kernel_configs(device, shape)
    name = choose(choices, num_tokens, num_tokens * top_k / global_experts, batch_invariant)
    return plan_of(device, shape, choices[name], name != SINGLE, num_tokens, top_k, global_experts, batch_invariant)


def plan_of(
    device: Device,
    shape: Shape,
    config: KernelConfig,
    is_sorted: bool,
    num_tokens: int,
    top_k: int,
    global_experts: int,
    batch_invariant: bool = False,
) -> Plan:
    """Return the plan that `make_plan` makes with a given config. is_sorted: whether pairs are sorted by expert."""
    num_pairs = num_tokens * top_k
    splits = [1, 1]
    # Batch-invariant sums have one order for all batches.
    if not batch_invariant and (not is_sorted or num_pairs <= SPLIT_PAIRS):
        blocks = num_pairs * shape.num_experts / global_experts
        if is_sorted:
            blocks = expected_blocks(num_tokens, top_k, shape.num_experts, global_experts, config.BLOCK_SIZE_M)
        out_features = (2 * shape.intermediate_size, shape.hidden_size)
        in_features = (shape.hidden_size, shape.intermediate_size)
        splits = [
            choose_split_k(blocks * n / gemm.BLOCK_SIZE_N, k, gemm.BLOCK_SIZE_K, device.num_sms)
            for n, k, gemm in zip(out_features, in_features, (config.w13, config.w2), strict=True)
        ]
    # Batch-invariant outputs have one dtype for all batches.
    weighted = torch.float32 if num_pairs <= EXACT_PAIRS and not batch_invariant else torch.bfloat16
    sizes = {
        "activated": 2 * num_pairs * shape.intermediate_size,
        "weighted": weighted.itemsize * splits[1] * num_pairs * shape.hidden_size,
    }
    if splits[0] > 1:
        sizes["partials"] = 4 * splits[0] * num_pairs * 2 * shape.intermediate_size
    if is_sorted:
        sizes["sorted_pairs"] = 4 * num_pairs
        # The table has room for the smallest blocks, so that more tokens never need a smaller one.
        smallest = min(choice.BLOCK_SIZE_M for choice in kernel_configs(device, shape).values())
        sizes["blocks"] = 4 * (1 + COLUMNS.value * max_blocks(num_pairs, shape.num_experts, smallest))
        sizes["counts"] = counts_bytes(num_pairs, shape.num_experts)
    sections, total = sections_of(sizes)
    most = max_blocks(num_pairs, shape.num_experts, config.BLOCK_SIZE_M) if is_sorted else num_pairs
    return Plan(config, is_sorted, splits[0], splits[1], num_pairs, most, weighted, sections, total)


def sections_of(sizes: dict[str, int]) -> tuple[dict[str, tuple[int, int]], int]:
    """Lay out the parts of a workspace one behind the other; return each part's (offset, size) and the bytes of all."""
    sections, offset = {}, 0
    for section, size in sizes.items():
        sections[section] = (offset, size)
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    return sections, offset


def use_configs(device: Device, shape: Shape, configs: dict[str, Any]) -> None:
    """Use measured configs for experts of this size in this process. Raises ValueError as `config.checked` does.

    device: as `device_of` returns it. shape: its number of experts does not matter. configs: for each of the config
    names in configs/default.json the fields of a `KernelConfig`, as `dataclasses.asdict` gives them.
    """
    measured[device, shape.hidden_size, shape.intermediate_size] = checked(configs, device.target.name, shape)
    make_plan.cache_clear()


def workspace_bytes(
    experts: KernelExperts,
    num_tokens: int,
    top_k: int,
    global_experts: int | None = None,
    batch_invariant: bool = False,
) -> int:
    """Return the bytes of workspace that `fused_experts` needs for up to `num_tokens` tokens of `top_k` experts each.

    The workspace is a uint8 tensor of at least so many elements on the device of `experts`. global_experts: the length
    of the expert map; by default there is none. batch_invariant: as it will be passed to `fused_experts`.
    """
    shape, total = experts.shape, global_experts or experts.shape.num_experts
    # The bytes grow with the tokens, except where GEMMs may be cut along K and where float32 outputs end.
    cut = max(SINGLE_TOKENS, SPLIT_PAIRS // top_k)
    ends = (*range(1, cut + 1), EXACT_PAIRS // top_k, TOKENS_AT_ONCE)
    counts = {min(num_tokens, end) for end in ends} - {0}
    plans = (make_plan(experts.device, shape, count, top_k, total, batch_invariant) for count in counts)
    return max((plan.bytes for plan in plans), default=0)


def fused_experts(
    hidden_states: torch.Tensor,
    experts: KernelExperts,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Return Σ weight · down(silu(gate · x) · (up · x)) over each token's local experts, `[num_tokens, hidden_size]`.

    hidden_states: bfloat16 `[num_tokens, hidden_size]`. topk_ids: integers `[num_tokens, top_k]`, −1 for none.
    topk_weights: float32 `[num_tokens, top_k]`. expert_map: int32 `[num_global_experts]`, the local index of a global
    id or −1; without it the ids are local. out: contiguous `[num_tokens, hidden_size]`, of any floating dtype; by
    default a new bfloat16 tensor. workspace: contiguous uint8, at least `workspace_bytes` elements; by default it is
    allocated. All tensors are on the device of `experts`.

    The same inputs give the same bits at every call. With `batch_invariant` a token has the same bits in any batch,
    which is slower if an expert has many tokens. Raises ValueError for inputs of another shape or dtype, or too small a
    workspace.

    Examples:
        Two experts whose weights are all 1 / 128 get a token of ones: gate and up are 1, and the sum is silu(1) = 0.7311,
        rounded to bfloat16. Without a GPU the example needs TRITON_INTERPRET=1.

        >>> device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        >>> ones = torch.full((2, 256, 16), -0x66666667, dtype=torch.int32, device=device)  # eight nibbles of 9 = 1 + 8
        >>> scale = torch.full((2, 256, 4), 1 / 128, dtype=torch.bfloat16, device=device)
        >>> experts = KernelExperts.from_checkpoint(ones, scale, ones[:, :128].clone(), scale[:, :128].clone())
        >>> x = torch.ones(1, 128, dtype=torch.bfloat16, device=device)
        >>> ids, weights = torch.tensor([[0, 1]], device=device), torch.tensor([[0.5, 0.5]], device=device)
        >>> fused_experts(x, experts, ids, weights)[0, 0].item()
        0.73046875
    """
    num_tokens, top_k = topk_ids.shape
    hidden_size = experts.shape.hidden_size
    if hidden_states.shape != (num_tokens, hidden_size) or hidden_states.dtype != torch.bfloat16:
        raise ValueError(
            f"hidden_states are {hidden_states.dtype} {list(hidden_states.shape)}, "
            f"expected torch.bfloat16 {[num_tokens, hidden_size]}."
        )
    if topk_weights.shape != topk_ids.shape or topk_weights.dtype != torch.float32:
        raise ValueError(
            f"topk_weights are {topk_weights.dtype} {list(topk_weights.shape)}, "
            f"expected torch.float32 {list(topk_ids.shape)}."
        )
    if out is None:
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    elif out.shape != hidden_states.shape or not out.is_contiguous():
        raise ValueError(f"out is {list(out.shape)}, expected a contiguous {list(hidden_states.shape)}.")
    x, ids, weights = hidden_states.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    num_global = global_experts(expert_map, experts.shape.num_experts)
    counts = [min(TOKENS_AT_ONCE, num_tokens - start) for start in range(0, num_tokens, TOKENS_AT_ONCE)]
    plans = [make_plan(experts.device, experts.shape, count, top_k, num_global, batch_invariant) for count in counts]
    needed = max((plan.bytes for plan in plans), default=0)
    workspace = enough_workspace(workspace, needed, x.device)
    for index, plan in enumerate(plans):
        here = slice(index * TOKENS_AT_ONCE, index * TOKENS_AT_ONCE + counts[index])
        Launcher(experts, plan, workspace, ids[here], weights[here], expert_map).run(x[here], out[here])
    return out


def enough_workspace(workspace: torch.Tensor | None, needed: int, device: torch.device) -> torch.Tensor:
    """Return the caller's workspace, or a new one, uint8 `[needed]` on `device`.

    Raises ValueError if the caller's is too small or not uint8.
    """
    if workspace is None:
        return torch.empty(needed, dtype=torch.uint8, device=device)
    if workspace.dtype != torch.uint8 or workspace.numel() < needed:
        raise ValueError(
            f"the workspace is {workspace.numel()} of {workspace.dtype}, expected {needed} of torch.uint8."
        )
    return workspace


class Launcher:
    """The launches of one plan, in their order."""

    def __init__(
        self,
        experts: KernelExperts,
        plan: Plan,
        workspace: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> None:
        """Keep the inputs of the launches, and cut the workspace into the plan's sections.

        plan: for as many token–expert pairs as `topk_ids` has elements. workspace: contiguous uint8, at least
        `plan.bytes` elements. topk_ids: integers `[num_tokens, top_k]`. topk_weights: float32 `[num_tokens, top_k]`.
        expert_map: int32 `[num_global_experts]`, or None if the ids are local. All are contiguous and on the device of
        `experts`.
        """
        self.experts, self.plan = experts, plan
        self.topk_ids, self.topk_weights, self.expert_map = topk_ids, topk_weights, expert_map
        self.sections = {name: workspace[at : at + size] for name, (at, size) in plan.sections.items()}
        self.has_map = expert_map is not None
        self.map = topk_ids if expert_map is None else expert_map
        self.num_global = global_experts(expert_map, experts.shape.num_experts)
        self.options = launch_options(experts.device.target.dependent)

    def section(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a part of the workspace, by its name in `Plan.sections`, as a one-dimensional tensor of this dtype."""
        return self.sections[name].view(dtype)

    def run(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Launch everything that writes the routed sum of `x` to `out`.

        x: bfloat16 `[num_tokens, hidden_size]`. out: `[num_tokens, hidden_size]`, of any floating dtype. Both are
        contiguous and on the device of the experts.
        """
        plan, shape = self.plan, self.experts.shape
        num_pairs, hidden_size = plan.num_pairs, shape.hidden_size
        if plan.sorted:
            moe_align_block_size(
                self.topk_ids,
                self.expert_map,
                shape.num_experts,
                plan.config.BLOCK_SIZE_M,
                self.section("sorted_pairs", torch.int32),
                self.section("blocks", torch.int32),
                self.section("counts", torch.int32),
                dependent=self.experts.device.target.dependent,
            )
        activated = self.section("activated", torch.bfloat16)
        w13 = self.experts.w13_packed, self.experts.w13_scale
        top_k = self.topk_ids.shape[1]
        if plan.split_w13 == 1:
            self.gemm(x, *w13, activated, plan.config.w13, top_k, "silu_and_mul", 1)
        else:
            partials, size = self.section("partials", torch.float32), shape.intermediate_size
            self.gemm(x, *w13, partials, plan.config.w13, top_k, "partial", plan.split_w13)
            block = 256
            silu_and_mul_kernel[(num_pairs, triton.cdiv(size, block))](
                partials, activated, num_pairs * 2 * size, I=size, SPLIT_K=plan.split_w13, BLOCK=block, **self.options
            )
        weighted = self.section("weighted", plan.weighted)
        w2 = self.experts.w2_packed, self.experts.w2_scale
        self.gemm(activated, *w2, weighted, plan.config.w2, 1, "weighted", plan.split_w2)
        reduce_kernel[(len(x), triton.cdiv(hidden_size, _REDUCE_BLOCK))](
            weighted, self.topk_ids, self.map, out, num_pairs, shape.num_experts, self.num_global,
            H=hidden_size, TOP_K=top_k, SPLIT_K=plan.split_w2, HAS_MAP=self.has_map, BLOCK=_REDUCE_BLOCK,
            **self.options,
        )  # fmt: skip

    def gemm(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        scale: torch.Tensor,
        out: torch.Tensor,
        config: GemmConfig,
        pairs_per_x: int,
        epilogue: str,
        split_k: int,
    ) -> None:
        """Launch `moe_gemm_kernel` with these arguments.

        x: bfloat16, one row of K inputs for each `pairs_per_x` pairs. packed: int32 `[E, N, K / 8]`. scale: bfloat16
        `[E, N, K / 32]`. out: in the shape and dtype that `moe_gemm_kernel` lists for the epilogue. All are contiguous.
        """
        plan, device = self.plan, self.experts.device
        out_features, in_features = packed.shape[1], packed.shape[2] * PACK_FACTOR
        tiles = plan.max_blocks * (out_features // config.BLOCK_SIZE_N) * split_k
        variant = (
            device, config, plan.config.BLOCK_SIZE_M, plan.sorted, out_features, in_features, pairs_per_x, epilogue, split_k,
            out.dtype, self.has_map,
        )  # fmt: skip
        grid = min(tiles, device.num_sms * programs_per_sm.get(variant, PROGRAMS_AT_FIRST))
        sorted_pairs, blocks = (
            self.section(name, torch.int32) if plan.sorted else self.topk_ids for name in ("sorted_pairs", "blocks")
        )
        compiled = moe_gemm_kernel[(grid,)](
            x, packed, scale, out, self.topk_ids, self.map, self.topk_weights, sorted_pairs, blocks,
            plan.num_pairs, self.experts.shape.num_experts, self.num_global,
            N=out_features, K=in_features, PAIRS_PER_X=pairs_per_x, EPILOGUE=epilogue,
            SORTED=plan.sorted, HAS_MAP=self.has_map, SPLIT_K=split_k,
            BLOCK_SIZE_M=plan.config.BLOCK_SIZE_M, BLOCK_SIZE_N=config.BLOCK_SIZE_N, BLOCK_SIZE_K=config.BLOCK_SIZE_K,
            FRAGMENT=device.target.fragment, PACKED_MATH=not (device.target.amd or INTERPRETED.value),
            WAIT=device.target.waits and not INTERPRETED.value,
            num_warps=config.num_warps, num_stages=config.num_stages, **device.target.options, **self.options,
        )  # fmt: skip
        if variant not in programs_per_sm and compiled is not None:  # None from the interpreter
            metadata = compiled.metadata
            threads = metadata.num_warps * metadata.target.warp_size
            columns = getattr(metadata, "tmem_size", None) or 0
            programs_per_sm[variant] = device.programs_per_sm(threads, compiled.n_regs, metadata.shared, columns)
