"""Loads of a checkpoint by an engine, in a process of its own: how much memory one takes, and what is said of files that
change meanwhile."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.quick import make_quick
from support.server import python_path
from torch.overrides import TorchFunctionMode

from k26_plugins.common.checkpoint.header import read_header
from k26_plugins.common.checkpoint.mapped import mapped_tensors
from k26_plugins.common.checkpoint.table import expert_name
from k26_plugins.common.tiny.checkpoint import TinySizes

LAYERS = 9
# 1 GB, all but 5 % of it in experts.
SIZES = TinySizes(hidden_size=1024, moe_intermediate_size=1024, layers=LAYERS, experts=64, shards=LAYERS)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 4)


def touch(file: Path) -> None:
    os.utime(file, ns=(0, 0))


CHANGES: dict[str, Callable[[Path], None]] = {"cut": cut, "touched": touch, "gone": Path.unlink}
SAID = {"cut": "changed", "touched": "changed", "gone": "vanished"}

HELD = 512 * 2**20
"""Bytes that a load gets beside the weights: half of what all files would take."""


def report_of(folder: Path) -> dict[str, Any]:
    """What `main` prints for a checkpoint that is made here."""
    make_quick(folder, SIZES)
    command = [sys.executable, "-m", "support.load_checks", str(folder)]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=500)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


class LoadTests:
    """Tests that each engine's environment derives and runs with its own engine."""

    @pytest.fixture(scope="class")
    def report(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        return report_of(tmp_path_factory.mktemp("loading") / "checkpoint")

    def test_memory_is_that_of_the_weights_and_a_few_windows(self, report: dict[str, Any]) -> None:
        """With the published checkpoint 2 GB may come on top of the weights; here, where all weights are 1 GB, a
        quarter of that may."""
        assert report["weights"] > 800 * 2**20
        assert report["beyond_the_weights"] < 256 * 2**20

    def test_memory_is_held_under_a_limit(self, report: dict[str, Any]) -> None:
        """The load of the other tests ran within it; it does not suffice to hold all tensors."""
        assert report["limited"] == "loaded"
        assert "Cannot allocate memory" in report["holding_all"]

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_file_that_changes_while_a_part_of_it_is_copied(self, report: dict[str, Any], change: str) -> None:
        """The load ends with its name, also where what is copied is no longer there."""
        assert report["said"][change].startswith("CheckpointError: ")
        assert f"{report['file']} " in report["said"][change]
        assert f"{SAID[change]} while it was loaded" in report["said"][change]


def main() -> None:
    from support.whole_load import build

    folder = Path(sys.argv[1])
    built = build(folder)
    held = sum(parameter.nbytes for parameter in built.model.parameters())
    # From here on the peak is that of the load.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    with limited_to(memory("VmData") + HELD):
        limited = said_by(built.ours)
        peak = memory("VmHWM")
        holding_all = said_by(lambda: list(mapped_tensors(sorted(folder.glob("*.safetensors")))))
    report: dict[str, Any] = {"beyond_the_weights": peak - before - held, "weights": held, "said": {}}
    report |= {"limited": limited, "holding_all": holding_all}
    name = expert_name(LAYERS - 1, 40, "down", "packed")
    file = next(one for one in folder.glob("*.safetensors") if any(entry.name == name for entry in read_header(one)))
    report["file"] = file.name
    for kind, change in CHANGES.items():
        for layer in built.layers.values():
            layer.open()
        whole = shutil.copy2(file, folder / "whole")
        with BeforeCopying(load_file(file)[name].clone(), partial(change, file)):
            report["said"][kind] = said_by(built.ours)
        shutil.move(whole, file)
    print(json.dumps(report))


class BeforeCopying(TorchFunctionMode):
    """Calls `change` when a tensor of these values, which are in memory of their own, is to be copied from a file."""

    def __init__(self, tensor: torch.Tensor, change: Callable[[], object]) -> None:
        super().__init__()
        self._tensor, self._change = tensor, change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.copy_ and args[1].dtype == torch.int32 and torch.equal(args[1], self._tensor):
            self._change()
        return func(*args, **(kwargs or {}))


def said_by(load: Callable[[], object]) -> str:
    try:
        load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


@contextmanager
def limited_to(num_bytes: int) -> Iterator[None]:
    """Limit the bytes that this process may write to: its own memory, and the mapped files, which are mapped
    writable."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def memory(kind: str) -> int:
    """Bytes of this process: VmRSS, VmHWM for its peak, VmData for what `limited_to` limits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


if __name__ == "__main__":
    main()
