"""How fast `k26 golden` goes through experts of the published size, against what the disk can read.

    python kernels/bench/golden.py FOLDER             a table; FOLDER takes 3.2 GB, made once
    python kernels/bench/golden.py FOLDER --save      and a JSON file in kernels/bench/results

Two MoE layers of 64 experts of 7168 × 2048, random, and the published model's ways to carry a prompt. Its files are dropped
from the page cache before each run. A prompt set is as large as leaves as many tokens to an expert as the named number does
in the published model, with its 384 experts. The projection for the published model is its 23,040 experts at this rate: a
projection, nobody has run it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from k26_plugins.common.checkpoint import StreamedCheckpoint, expert_bytes
from k26_plugins.common.config import TextConfig
from k26_plugins.common.tiny import TinySizes
from k26_plugins.operate.golden import GoldenJob, read_prompts

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.quick import make_quick

EXPERTS, LAYERS = 64, 2
PUBLISHED_EXPERTS = TextConfig().n_routed_experts
ALL_EXPERTS = 60 * PUBLISHED_EXPERTS
TOKENS = (400, 2000, 8000)
"""Prompt tokens on the published model."""
PROMPT = 100
"""Tokens of one prompt."""


def drop(folder: Path) -> None:
    """Out of the page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(folder: Path) -> float:
    """Bytes a second of plain reading, one thread."""
    drop(folder)
    block, done, start = bytearray(16 << 20), 0, time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(block):
                done += count
    return done / (time.perf_counter() - start)


def measure(folder: Path, tokens: int) -> dict[str, float]:
    count = max(1, round(tokens * EXPERTS / PUBLISHED_EXPERTS / PROMPT))
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, StreamedCheckpoint(folder) as checkpoint:
        prompts = Path(scratch) / "prompts.jsonl"
        lines = [json.dumps({"id": str(index), "text": (f"{index:03d} " * PROMPT)[:PROMPT]}) for index in range(count)]
        prompts.write_text("\n".join(lines))
        job = GoldenJob(checkpoint, read_prompts(prompts, folder), Path(scratch) / "golden", 64, 1)
        drop(folder)
        start = time.perf_counter()
        job.run()
        seconds = time.perf_counter() - start
        rate = checkpoint.bytes_read / seconds
        return {
            "tokens": tokens,
            "tokens_here": job.carried.tokens,
            "seconds": round(seconds, 1),
            "bytes_per_second": round(rate),
            "projected_hours": round(ALL_EXPERTS * expert_bytes(TextConfig()) / rate / 3600, 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint is, or is made")
    parser.add_argument("--save", action="store_true", help="write the results beside this file, named by date")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if not folder.exists():
        sizes = TinySizes(
            layers=1 + LAYERS, experts=EXPERTS, top_k=8, hidden_size=7168, moe_intermediate_size=2048, vision_layers=1
        )
        make_quick(folder, sizes)
    disk = disk_rate(folder)
    table = Table("tokens", "seconds", "GB/s", "of the disk", "published model, a pass, projected")
    found = []
    for tokens in TOKENS:
        row = measure(folder, tokens)
        found.append({**row, "share_of_disk": round(row["bytes_per_second"] / disk, 3)})
        share, hours = found[-1]["share_of_disk"], row["projected_hours"]
        table.add_row(
            str(tokens), f"{row['seconds']}", f"{row['bytes_per_second'] / 1e9:.2f}", f"{share:.0%}", f"{hours} h"
        )
    Console().print(f"the disk: {disk / 1e9:.2f} GB/s; {torch.get_num_threads()} threads")
    Console().print(table)
    if arguments.save:
        machine = {"date": str(date.today()), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
        content = {"machine": {**machine, "disk_bytes_per_second": round(disk)}, "results": found}
        file = Path(__file__).parent / "results" / f"golden-{date.today()}-{torch.get_num_threads()}t.json"
        file.write_text(json.dumps(content, indent=1) + "\n")
        Console().print(f"wrote {file}")


if __name__ == "__main__":
    main()
