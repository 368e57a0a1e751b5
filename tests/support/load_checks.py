"""Loads of a checkpoint by an engine, in a process of its own: how much memory one takes, and what is said of files that
change meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.quick import make_quick

from k26_plugins.common.checkpoint.header import read_header
from k26_plugins.common.checkpoint.table import expert_name
from k26_plugins.common.tiny import TinySizes

LAYERS = 9
# 1 GB, all but 5 % of it in experts.
SIZES = TinySizes(hidden_size=1024, moe_intermediate_size=1024, layers=LAYERS, experts=64, shards=LAYERS)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 4)


def touch(file: Path) -> None:
    os.utime(file, ns=(0, 0))


CHANGES: dict[str, Callable[[Path], None]] = {"cut": cut, "touched": touch, "gone": Path.unlink}


def report_of(folder: Path) -> dict[str, Any]:
    """What `main` prints for a checkpoint that is made here."""
    make_quick(folder, SIZES)
    command = [sys.executable, "-m", "support.load_checks", str(folder)]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}, timeout=500
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


class LoadTests:
    """For the engine of this environment."""

    @pytest.fixture(scope="class")
    def report(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        return report_of(tmp_path_factory.mktemp("loading") / "checkpoint")

    def test_memory_is_that_of_the_weights_and_a_few_windows(self, report: dict[str, Any]) -> None:
        """Of the published checkpoint 2 GB may come on top; here, where all weights are 1 GB, a quarter of that."""
        assert report["weights"] > 800 * 2**20
        assert report["beyond_the_weights"] < 256 * 2**20

    @pytest.mark.parametrize(("change", "said"), list(zip(CHANGES, ("changed", "changed", "vanished"), strict=True)))
    def test_a_file_that_changes_while_a_part_of_it_is_copied(
        self, report: dict[str, Any], change: str, said: str
    ) -> None:
        """The load ends with its name, also where what is copied is no longer there."""
        assert report["said"][change].startswith("CheckpointError: ")
        assert f"{report['file']} " in report["said"][change]
        assert f"{said} while it was loaded" in report["said"][change]


def main() -> None:
    from support.whole_load import build

    folder = Path(sys.argv[1])
    built = build(folder)
    held = sum(parameter.nbytes for parameter in built.model.parameters())
    # From here on the peak is that of the load.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    built.ours()
    report: dict[str, Any] = {"beyond_the_weights": memory("VmHWM") - before - held, "weights": held, "said": {}}
    name = expert_name(LAYERS - 1, 40, "down", "packed")
    file = next(one for one in folder.glob("*.safetensors") if any(entry.name == name for entry in read_header(one)))
    report["file"] = file.name
    for kind, change in CHANGES.items():
        for layer in built.layers.values():
            layer.open()
        whole = shutil.copy2(file, folder / "whole")
        change_before_copying(built.layers[LAYERS - 1].module, lambda change=change: change(file))
        try:
            built.ours()
        except Exception as error:
            report["said"][kind] = f"{type(error).__name__}: {error}"
        shutil.move(whole, file)
    print(json.dumps(report))


def change_before_copying(module: Any, change: Callable[[], None]) -> None:
    """Have `change` called when the engine is to copy one expert's tensor, of which it has a view."""
    parameter = module.w2_weight_packed
    load = parameter.weight_loader

    def weight_loader(param: Any, weight: Any, name: str, shard_id: str, expert_id: int) -> None:
        if expert_id == 40:
            parameter.weight_loader = load
            change()
        load(param, weight, name, shard_id=shard_id, expert_id=expert_id)

    parameter.weight_loader = weight_loader


def memory(kind: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM for the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


if __name__ == "__main__":
    main()
