"""Tests how an engine's loader with the plugin loads a checkpoint: its memory, and its errors about files that change.

The loads run in a separate process, `python -m support.load_checks FOLDER`, which prints a report as one line of JSON.
"""

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
# This checkpoint has 1 GB, all but 5 % of it in experts.
SIZES = TinySizes(hidden_size=1024, moe_intermediate_size=1024, layers=LAYERS, experts=64, shards=LAYERS)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 4)


def touch(file: Path) -> None:
    os.utime(file, ns=(0, 0))


CHANGES: dict[str, Callable[[Path], None]] = {"cut": cut, "touched": touch, "gone": Path.unlink}
SAID = {"cut": "changed", "touched": "changed", "gone": "vanished"}

HELD = 512 * 2**20
"""The bytes that a load may use beside the weights: half of the size of all files."""


def report_of(folder: Path) -> dict[str, Any]:
    """Make a checkpoint in `folder`, run `main` on it in a process, and return the report that it prints."""
    make_quick(folder, SIZES)
    command = [sys.executable, "-m", "support.load_checks", str(folder)]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=500)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


class LoadTests:
    """Tests that each engine's tests derive, and run with that engine."""

    @pytest.fixture(scope="class")
    def report(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        return report_of(tmp_path_factory.mktemp("loading") / "checkpoint")

    def test_memory_is_that_of_the_weights_and_a_few_windows(self, report: dict[str, Any]) -> None:
        """Loading the published checkpoint may take 2 GB on top of the weights; loading this one, whose weights are 1
        GB in all, may take a quarter of a GB."""
        assert report["weights"] > 800 * 2**20
        assert report["beyond_the_weights"] < 256 * 2**20

    def test_memory_is_held_under_a_limit(self, report: dict[str, Any]) -> None:
        """A load succeeds under a limit of memory that does not suffice to hold all tensors at once."""
        assert report["limited"] == "loaded"
        assert "Cannot allocate memory" in report["holding_all"]

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_file_that_changes_while_a_part_of_it_is_copied(self, report: dict[str, Any], change: str) -> None:
        """If a file is cut, touched or removed while one of its tensors is copied, the load ends with an error that
        names the file, even when the bytes to be copied are gone."""
        assert report["said"][change].startswith("CheckpointError: ")
        assert f"{report['file']} " in report["said"][change]
        assert f"{SAID[change]} while it was loaded" in report["said"][change]


def main() -> None:
    """Load the checkpoint in the folder that the command line names in several ways, and print the report."""
    from support.whole_load import build

    folder = Path(sys.argv[1])
    built = build(folder)
    held = sum(parameter.nbytes for parameter in built.model.parameters())
    # This resets the process's peak, so that the peak read below is the load's.
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
    """A mode that calls `change` just before a tensor with the values of `tensor` is copied from a file.

    `tensor` must not share memory with that file.
    """

    def __init__(self, tensor: torch.Tensor, change: Callable[[], object]) -> None:
        super().__init__()
        self._tensor, self._change = tensor, change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.copy_ and args[1].dtype == torch.int32 and torch.equal(args[1], self._tensor):
            self._change()
        return func(*args, **(kwargs or {}))


def said_by(load: Callable[[], object]) -> str:
    """Return the type and text of the exception that `load` raises, or `loaded`."""
    try:
        load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


@contextmanager
def limited_to(num_bytes: int) -> Iterator[None]:
    """Limit the bytes of memory that this process may write to until the block ends.

    The mapped files count as well, because they are mapped writable.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def memory(kind: str) -> int:
    """Return a figure of this process's memory in bytes.

    kind: VmRSS for the resident memory, VmHWM for its peak, VmData for the memory that `limited_to` limits.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


if __name__ == "__main__":
    main()
