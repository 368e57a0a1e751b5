"""Loading a checkpoint of the full count of tensors: an engine's own loader and ours, in turns, beside reading the files.

    k26 tiny /tmp/full --layers 61 --experts 384 --top-k 8 --vision-layers 27 --shards 64
    python kernels/bench/load.py /tmp/full [--save]       in vLLM's environment or in SGLang's
    python kernels/bench/load.py /tmp/real --make 3x64 [--save]      real sizes: 3 MoE layers of 64 experts, 4.8 GB

The model is built once, by the engine, on the CPU. Then its weights are loaded by the engine's own iterator and matching of
names, and by ours, into the same parameters, which are compared. The engine is spared the experts' shapes, for which these
have no place: a third of the experts' tensors. In the full count's checkpoint sizes are tiny, so that the seconds are those
of the number of tensors, 208,550, and not of their bytes. With real sizes (`--make`, which makes what is not there) the
engine's own loader takes no part, the files are out of the page cache before each turn, and the experts get new memory, as
at a start on a CPU: the system makes a page at its first touch. Reading into new memory is what that takes at the least;
ours into old memory, written to before, is what it takes where no page has to be made.

Ours is timed twice: without repacking, which then follows; and as it is, layers repacked beside the loading of others.
Seconds are the best turn's. A disk that others use reads at another rate a minute later, so the share that reading takes is
the median over the turns, each turn's reading over the same turn's loading.
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
"""Which form the weights have after each."""


def make_real(folder: Path, layers: int, experts: int) -> None:
    """Makes a checkpoint with experts of the published size; all else is tiny."""
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
    block = bytearray(16 << 20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(block):
                pass


def read_into_new(files: list[Path]) -> None:
    """Reads each file into memory as large as a layer's parameter: an allocator would hand smaller memory out again."""
    for file in files:
        new = torch.empty(file.stat().st_size, dtype=torch.uint8)
        with file.open("rb", buffering=0) as opened:
            memory = new.numpy().data
            while memory and (count := opened.readinto(memory)):
                memory = memory[count:]


@contextmanager
def repacking_later() -> Iterator[None]:
    """Inside it no layer is closed beside the loading of others."""
    before = LayerExperts.is_on_host
    LayerExperts.is_on_host = False  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        LayerExperts.is_on_host = before  # type: ignore[method-assign]


def turns(built: Built, files: list[Path], *, cold: bool) -> dict[str, Callable[[], object]]:
    """The functions that are timed, by name, in this order."""

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
    """A number for each parameter that tells others apart: a copy of real sizes would not fit beside them."""
    return [crc32(parameter.data.view(torch.uint8).numpy().data) for parameter in built.model.parameters()]


def clear(built: Built, *, new: bool) -> None:
    """Make the model as it was before any loading. new: the experts get new memory, and lose what they served with."""
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
