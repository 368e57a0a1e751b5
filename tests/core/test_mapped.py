"""Tests of files that are mapped and read ahead: their tensors are those that safetensors reads, memory is bounded, and
a file that changes is an error."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from k26_plugins.common.checkpoint import CheckpointError
from k26_plugins.common.checkpoint.engine_files import Progress, engine_files, is_under_way, with_mapped_files
from k26_plugins.common.checkpoint.header import read_header, weight_files
from k26_plugins.common.checkpoint.mapped import mapped_tensors
from k26_plugins.common.model.config import K26Config

SMALL = 4096


@pytest.mark.parametrize("window_bytes", [1, SMALL, 2**30])
def test_the_tensors_are_safetensors_own(tiny_folder: Path, window_bytes: int) -> None:
    files = weight_files(tiny_folder)
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    lengths: list[int] = []
    found = dict(mapped_tensors(files, on_bytes=lengths.append, window_bytes=window_bytes))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert sum(lengths) == sum(tensor.nbytes for tensor in expected.values())


def test_tensors_out_of_step_and_of_no_dimension(tmp_path: Path) -> None:
    """A tensor may begin at an offset that is no multiple of its item size, and may be a single number without
    dimensions."""
    header = {
        "a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [2, 6]},
    }
    text = json.dumps(header).encode()
    data = torch.tensor([1.5], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes() + struct.pack("<f", 2.5)
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    found = dict(mapped_tensors([file]))
    assert found["a"].tolist() == [1.5]
    assert found["b"].shape == ()
    assert found["b"].item() == 2.5


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def change(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\1")
    os.utime(file, ns=(0, 0))


def replace(file: Path) -> None:
    other = file.with_suffix(".other")
    shutil.copy(file, other)
    other.rename(file)


@pytest.mark.parametrize(
    ("happens", "said"), [(cut, "changed"), (change, "changed"), (replace, "changed"), (Path.unlink, "vanished")]
)
def test_a_file_that_changes_while_it_is_loaded(
    tiny_folder: Path, tmp_path: Path, happens: Callable[[Path], None], said: str
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    first = weight_files(folder)[0]
    tensors = mapped_tensors(weight_files(folder), window_bytes=SMALL)
    next(tensors)
    happens(first)
    with pytest.raises(CheckpointError, match=rf"{first.name} (was )?{said} while it was loaded"):
        for _ in tensors:
            pass


def test_a_file_that_is_not_whole_from_the_start(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    last = weight_files(folder)[-1]
    cut(last)
    with pytest.raises(CheckpointError, match=rf"ends after .*{last.name} does: download that file again"):
        list(mapped_tensors(weight_files(folder)))
    last.unlink()
    with pytest.raises(CheckpointError, match=rf"{last.name} cannot be read .*: download it"):
        list(mapped_tensors([*weight_files(tiny_folder), last]))


CUT = """
import mmap, os, sys
from pathlib import Path
import torch
from k26_plugins.common.checkpoint import CheckpointError
from k26_plugins.common.checkpoint.mapped import mapped_tensors
from k26_plugins.common.checkpoint.watched import watched_files

file = Path(sys.argv[1])


def copy_of_what_was_cut(tensor):
    os.truncate(file, file.stat().st_size // 4)
    copy = torch.empty_like(tensor).copy_(tensor)
    assert not copy[-1]


def while_it_is_copied():
    for _, tensor in mapped_tensors([file]):
        copy_of_what_was_cut(tensor)


def after_the_last_was_given():
    with watched_files():
        tensors = dict(mapped_tensors([file]))
        copy_of_what_was_cut(tensors["b"])


def of_somebody_else():
    with watched_files(), file.open("r+b") as stream:
        mapped = mmap.mmap(stream.fileno(), file.stat().st_size)
        os.truncate(file, 0)
        print(mapped[-1])


try:
    globals()[sys.argv[2]]()
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("when", "ends"), [("while_it_is_copied", 0), ("after_the_last_was_given", 0), ("of_somebody_else", -signal.SIGBUS)]
)
def test_a_mapped_file_that_is_cut_within_what_is_copied(tmp_path: Path, when: str, ends: int) -> None:
    """If a file that the plugin has mapped is cut, the error names that file. If a file that others have mapped is cut,
    the process ends as it would without the plugin."""
    file = tmp_path / "model-1.safetensors"
    save_file({name: torch.ones(2**22, dtype=torch.bfloat16) for name in "ab"}, file)
    done = subprocess.run([sys.executable, "-c", CUT, str(file), when], capture_output=True, text=True, check=False)
    assert done.returncode == ends, done.stderr
    assert ("model-1.safetensors was changed while it was loaded" in done.stdout) == (ends == 0)


def test_only_what_is_needed_is_read_ahead(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes between needed tensors are not read ahead, because a rank's experts are spread over a file."""
    files = weight_files(tiny_folder)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, advice: asked.append((start, start + length)))

    def is_read(name: str) -> bool:
        return ".experts." not in name or ".experts.1." in name

    for file in files:
        asked.clear()
        for _ in mapped_tensors([file], is_read):
            pass
        expected = {
            byte for entry in read_header(file) if is_read(entry.name) for byte in range(entry.start, entry.end)
        }
        assert {byte for start, end in asked for byte in range(start, end)} == expected


MEASURE = """
import sys
from pathlib import Path
from k26_plugins.common.checkpoint.mapped import mapped_tensors

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak()
total = sum(float(tensor[::1024].float().sum()) for _, tensor in mapped_tensors([Path(sys.argv[1])]))
print(peak() - before)
"""


def test_memory_is_that_of_a_window(tmp_path: Path) -> None:
    """Tensors that were loaded leave the process's memory. The file has 512 MB in 32 tensors, and every page of each is
    touched."""
    save_file({f"t{index}": torch.zeros(2**23, dtype=torch.bfloat16) for index in range(32)}, tmp_path / "model")
    child = [sys.executable, "-c", MEASURE, str(tmp_path / "model")]
    result = subprocess.run(child, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 192 * 2**20


def test_a_load_of_an_engine(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While an engine loads weights, the plugin reads the files, the engine's filter of experts holds, and one log line
    reports the end."""
    config = K26Config.from_path(tiny_folder)
    files = [str(file) for file in weight_files(tiny_folder)]
    logger = logging.getLogger("engine")
    caplog.set_level(logging.INFO)

    def engine() -> Iterator[tuple[str, torch.Tensor]]:
        assert is_under_way()
        yield from engine_files(files, logger, experts=(1, 3))

    names = [name for name, _ in with_mapped_files(engine(), config, lambda kind, expert: True)]
    assert not is_under_way()
    all_names = [name for file in files for name in load_file(file)]
    assert sorted(names) == sorted(
        name for name in all_names if ".experts." not in name or ".experts.1." in name or ".experts.3." in name
    )
    assert len(caplog.messages) == 1
    assert "weights: 0.0 GB in" in caplog.messages[0]


def test_progress_says_rate_and_time_left() -> None:
    now, said = 0.0, list[str]()
    progress = Progress(100_000_000_000, said.append, lambda: now)
    for second in range(1, 26):
        now = float(second)
        progress.advance(2_000_000_000)
    progress.end()
    assert said == [
        "weights: 20.0 of 100.0 GB, 2.00 GB/s, 40 s left",
        "weights: 40.0 of 100.0 GB, 2.00 GB/s, 30 s left",
        "weights: 50.0 GB in 25.0 s, 2.00 GB/s",
    ]
