"""Measure how fast `k26 golden` goes through experts of the published size, beside the rates of the disk and the cores.

    python kernels/bench/golden.py FOLDER             a table; FOLDER takes 3.4 GB, made once
    python kernels/bench/golden.py FOLDER --save      and a JSON file in kernels/bench/results

The checkpoint has two MoE layers of 64 experts of 7168 × 2048 with random weights, and is dropped from the page cache
before each run. `of the disk` is the rate at which a run reads, as a share of the rate of plain reading of the same
files. `of a GEMM` is the rate of the experts' GEMMs, as a share of torch's own float32 GEMM of 256 rows. If the share
of the GEMM is high, the cores are the limit; if the share of the disk is high, the disk is.

The time for the published model is the larger of two: that of its GEMMs at the last row's rate, and that of its bytes
at the disk's rate. It is a projection: nobody has run it.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import torch
from bench.cold import drop
from bench.kept import keep, machine
from rich.console import Console
from rich.table import Table
from support.quick import make_quick

from k26_plugins.common.checkpoint import StreamedCheckpoint, expert_bytes
from k26_plugins.common.model.config import TextConfig
from k26_plugins.common.tiny.checkpoint import TinySizes
from k26_plugins.operate.golden import GoldenJob, read_prompts
from k26_plugins.operate.golden.variants import SUSPECT_TEXTS, SUSPECT_TOKENS, VARIANTS

EXPERTS, LAYERS, TOP_K = 64, 2, 8
TOKENS = (64, 256, 1024)
PROMPT = 64
"""Tokens of a prompt."""
TEXT = TextConfig()
OPERATIONS = 3 * 2 * TEXT.hidden_size * TEXT.moe_intermediate_size
"""Floating-point operations of one token in one expert."""
PUBLISHED_PROMPTS = (20, 400)
"""Number of prompts, and tokens of each, for which the projection is made."""


def disk_rate(folder: Path) -> float:
    """Return the bytes a second at which one thread reads the folder's files."""
    drop(folder.glob("*.safetensors"))
    block, done, start = bytearray(16 << 20), 0, time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(block):
                done += count
    return done / (time.perf_counter() - start)


def gemm_rate() -> float:
    """Return the operations a second of torch's float32 GEMM of 256 rows at an expert's shape, on all threads."""
    x, w = torch.randn(256, TEXT.hidden_size), torch.randn(TEXT.moe_intermediate_size, TEXT.hidden_size)
    best = min(timed(lambda: x @ w.T) for _ in range(5))
    return 2 * x.numel() * len(w) / best


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that a function takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(folder: Path, tokens: int) -> dict[str, float]:
    """Run a golden job over prompts of `tokens` tokens in all, and return its figures."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, StreamedCheckpoint(folder) as checkpoint:
        prompts = Path(scratch) / "prompts.jsonl"
        texts = ["".join(draw.choices(string.ascii_letters, k=PROMPT)) for _ in range(tokens // PROMPT)]
        prompts.write_text("\n".join(json.dumps({"id": str(index), "text": text}) for index, text in enumerate(texts)))
        job = GoldenJob(checkpoint, read_prompts(prompts, folder), Path(scratch) / "golden", 64, 1)
        drop(folder.glob("*.safetensors"))
        seconds = timed(job.run)
        return {
            "tokens": tokens,
            "carried": job.carried.all_tokens,
            "seconds": round(seconds, 1),
            "bytes_per_second": round(checkpoint.bytes_read / seconds),
            "operations_per_second": round(job.carried.all_tokens * TOP_K * LAYERS * OPERATIONS / seconds),
        }


def projected_seconds(operations_per_second: float, bytes_per_second: float) -> float:
    """Return the seconds of one pass over the published model at these rates.

    The pass carries all prompts twice, for the model and the bf16 baseline, and SUSPECT_TEXTS prompts for each suspect.
    """
    prompts, length = PUBLISHED_PROMPTS
    suspects = sum(variant.is_suspect and not variant.on_images_only for variant in VARIANTS)
    carried = 2 * prompts * length + suspects * SUSPECT_TEXTS * SUSPECT_TOKENS
    layers = TEXT.num_hidden_layers - TEXT.first_k_dense_replace
    operations = carried * TEXT.num_experts_per_tok * layers * OPERATIONS
    stored = TEXT.n_routed_experts * layers * expert_bytes(TEXT)
    return max(operations / operations_per_second, stored / bytes_per_second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint is, or is made")
    parser.add_argument("--save", action="store_true", help="write the results beside this file, named by date")
    arguments = parser.parse_args()
    here = machine()
    folder: Path = arguments.folder
    if not folder.exists():
        sizes = TinySizes(
            layers=1 + LAYERS,
            experts=EXPERTS,
            top_k=TOP_K,
            hidden_size=TEXT.hidden_size,
            moe_intermediate_size=TEXT.moe_intermediate_size,
            vision_layers=1,
        )
        make_quick(folder, sizes)
    disk, gemm = disk_rate(folder), gemm_rate()
    table = Table("tokens", "with bf16 baseline and suspects", "seconds", "GB/s", "of the disk", "GFLOP/s", "of a GEMM")
    found = []
    for tokens in TOKENS:
        row = measure(folder, tokens)
        found.append(row)
        read, computed = row["bytes_per_second"], row["operations_per_second"]
        shares = f"{read / disk:.0%}", f"{computed / gemm:.0%}"
        figures = f"{read / 1e9:.2f}", shares[0], f"{computed / 1e9:.0f}", shares[1]
        table.add_row(str(tokens), str(row["carried"]), str(row["seconds"]), *figures)
    hours = projected_seconds(found[-1]["operations_per_second"], disk) / 3600
    console = Console()
    console.print(f"disk {disk / 1e9:.2f} GB/s, GEMM {gemm / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads")
    console.print(table)
    prompts, length = PUBLISHED_PROMPTS
    console.print(f"published model, {prompts} prompts of {length} tokens: projected {hours:.1f} h a pass")
    if arguments.save:
        here |= {"disk_bytes_per_second": round(disk), "product_operations_per_second": round(gemm)}
        here |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        keep("golden", {"machine": here, "results": found, "projected_hours": round(hours, 2)})


if __name__ == "__main__":
    main()
