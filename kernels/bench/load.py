"""Time the loading of a checkpoint by an engine's own loader and by ours, in turns, beside plain reading of the files.

    k26 tiny /tmp/full --layers 61 --experts 384 --top-k 8 --vision-layers 27 --shards 64
    python kernels/bench/load.py /tmp/full [--save]       in vLLM's environment or in SGLang's
    python kernels/bench/load.py /tmp/real --make 3x64 [--save]      real sizes: 3 MoE layers of 64 experts, 4.8 GB

The engine builds the model once, on the CPU. Then the weights are loaded into the same parameters in two ways, by the
engine's own iterator and matching of names, and by ours; the results are compared. The engine's loader does not get the
tensors of the experts' shapes, a third of the experts' tensors, because our parameters have no place for them.

The first command makes a checkpoint with the full number of tensors, 208,550, and tiny sizes, so that the seconds are
those of the number of tensors and not of their bytes.

With real sizes (`--make`, which makes the checkpoint if it is not there) the engine's own loader takes no part, the
files are dropped from the page cache before each turn, and the experts get new memory, as when a server starts on a
CPU: the system makes a page at its first touch. "Reading into new memory" is the least time that this takes. "Ours into
old memory", which was written to before, is the time if no page has to be made.

Our loader is timed twice: without repacking, which is timed after it, and as it is used, where layers are repacked
beside the loading of others. Seconds are those of the best turn. A disk that others use reads at another rate a minute
later, so the share that reading takes is the median over the turns of the time of reading divided by the time of
loading in the same turn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from zlib import crc32

from rich.progress import Progress, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import torch
from bench.cold import drop
from bench.kept import keep, machine
from support.whole_load import Built, build

from k26_plugins.common.experts.parameters import LayerExperts
from k26_plugins.common.model.config import TextConfig

READING, INTO_NEW = "reading the files", "reading into new memory"
OWN, OURS, INTO_OLD = "the engine's own loader", "ours", "ours into old memory"
REPACKING, BESIDE = "then repacking", "ours, repacking beside it"
FORMS = {OWN: "loaded", INTO_OLD: "loaded", OURS: "loaded", REPACKING: "repacked", BESIDE: "repacked"}
"""The form that the weights have after each of the timed functions."""


def make_real(folder: Path, layers: int, experts: int) -> None:
    """Make a checkpoint with experts of the published size and everything else tiny. layers: number of MoE layers."""
    from support.quick import make_quick

    from k26_plugins.common.tiny.checkpoint import TinySizes

    text = TextConfig()
    sizes = TinySizes(
        hidden_size=text.hidden_size,
        moe_intermediate_size=text.moe_intermediate_size,
        layers=1 + layers,
        experts=experts,
        shards=1 + layers,
    )
    make_quick(folder, sizes)


def read(files: list[Path]) -> None:
    """Read all files into the same block of memory."""
    block = bytearray(16 << 20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(block):
                pass


def read_into_new(files: list[Path]) -> None:
    """Read each file into new memory as large as a layer's parameter: an allocator would reuse smaller memory."""
    for file in files:
        new = torch.empty(file.stat().st_size, dtype=torch.uint8)
        with file.open("rb", buffering=0) as opened:
            memory = new.numpy().data
            while memory and (count := opened.readinto(memory)):
                memory = memory[count:]


@contextmanager
def repacking_later() -> Iterator[None]:
    """Keep layers from being closed (repacked) beside the loading of others inside the block."""
    before = LayerExperts.is_on_host
    LayerExperts.is_on_host = False  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        LayerExperts.is_on_host = before  # type: ignore[method-assign]


def turns(built: Built, files: list[Path], *, cold: bool) -> dict[str, Callable[[], object]]:
    """Return the functions that are timed, by name and in the order of a turn."""

    def later() -> None:
        with repacking_later():
            built.ours()

    def close() -> None:
        for layer in built.layers.values():
            layer.close()

    other: dict[str, Callable[[], object]] = {OWN: built.own}
    if cold:
        other = {INTO_NEW: lambda: read_into_new(files), INTO_OLD: later}
    return {READING: lambda: read(files), **other, OURS: later, REPACKING: close, BESIDE: built.ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint's folder, such as the one that the first command makes")
    parser.add_argument("--make", metavar="LAYERSxEXPERTS", help="real sizes, the page cache cold")
    parser.add_argument("--runs", type=int, default=2, help="turns of each, of which the best counts (default: 2)")
    parser.add_argument("--save", action="store_true", help="write the results beside this file, named by date and CPU")
    arguments = parser.parse_args()
    cold = arguments.make is not None
    if cold and not arguments.folder.exists():
        make_real(arguments.folder, *map(int, arguments.make.split("x")))
    files = sorted(arguments.folder.glob("*.safetensors"))
    here = machine()
    timed: dict[str, dict[str, float]] = {}
    turn_seconds: dict[str, list[float]] = {}
    seen: dict[str, list[int]] = {}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        task = progress.add_task("building the model")
        built = build(arguments.folder)
        functions = turns(built, files, cold=cold)
        progress.update(task, total=1 + len(functions) * arguments.runs, advance=1)
        for _ in range(arguments.runs):
            for name, function in functions.items():
                progress.update(task, description=name)
                if name in (OWN, INTO_OLD, OURS, BESIDE):
                    clear(built, new=cold and name != INTO_OLD)
                if cold and name != REPACKING:
                    drop(files)
                clock, cpu = time.perf_counter(), time.process_time()
                function()
                took = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
                turn_seconds.setdefault(name, []).append(took["seconds"])
                best = timed.setdefault(name, took)
                timed[name] = {key: round(min(best[key], took[key]), 2) for key in took}
                progress.advance(task)
                if name in FORMS and (weights := weights_of(built)) != seen.setdefault(FORMS[name], weights):
                    raise SystemExit(f"{name}: other weights than those before. No times are shown.")
    for name, took in timed.items():
        turns_of_reading = zip(turn_seconds[READING], turn_seconds[name], strict=True)
        took["reading_over_it"] = round(median(reading / own for reading, own in turns_of_reading), 2)
        took["slowest_turn"] = round(max(turn_seconds[name]), 2)
        print(
            f"{name:26} {took['seconds']:7.2f} s, {took['cpu_seconds']:7.2f} s of the cores, slowest turn "
            f"{took['slowest_turn']:.2f} s; reading takes {took['reading_over_it']:.2f} of it"
        )
    if arguments.save:
        num_bytes = sum(file.stat().st_size for file in files)
        found = {"machine": here, built.engine: built.version, "bytes": num_bytes, "results": timed}
        keep(f"{'load-real' if cold else 'load'}-{built.engine}", found)


def weights_of(built: Built) -> list[int]:
    """Return a checksum of each parameter, because a copy of parameters of real sizes would not fit beside them."""
    return [crc32(parameter.data.view(torch.uint8).numpy().data) for parameter in built.model.parameters()]


def clear(built: Built, *, new: bool) -> None:
    """Make the model as it was before any loading. new: the experts drop what they computed with and get new memory."""
    for layer in built.layers.values():
        layer.open()
    for parameter in built.model.parameters():
        parameter.data.zero_()
    if new:
        for layer in built.layers.values():
            layer.experts._serving = {}
            layer.experts._create()


if __name__ == "__main__":
    main()
