"""Tests that an engine's server loads a checkpoint with as many tensors as the published one, 208,550, of tiny sizes.

The reference model in float32 is the judge of what the server then answers.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from support.agreement import divergence
from support.load_checks import CHANGES, SAID
from support.server import Server, StartError

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.reference.kimi_k26 import KimiK26
from k26_plugins.common.tiny.checkpoint import TinySizes, make_tiny

NUM_TENSORS = 208_550
SIZES = TinySizes(layers=61, experts=384, top_k=8, vision_layers=27, shards=64)
PROMPT = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0))
# Sixty layers of random weights amplify bfloat16's rounding: the mean KL divergence of the reference in bfloat16 from
# itself in float32 is 0.13; for the answer after another token it would be 0.7.
MAX_MEAN_KL = 0.3


class FullCountTests:
    """Tests that each engine's tests derive, and run with that engine's server."""

    def serve(self, folder: Path, log: Path) -> AbstractContextManager[Server]:
        raise NotImplementedError

    def logprobs(self, server: Server, prompt: list[int]) -> torch.Tensor:
        """Return the server's log-probabilities after each token of the prompt but the last.

        The result is `[num_tokens − 1, vocab_size]`.
        """
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        folder = tmp_path_factory.mktemp("full") / "checkpoint"
        make_tiny(folder, SIZES)
        yield folder
        shutil.rmtree(folder)

    def test_a_server_with_as_many_tensors_as_the_published_checkpoint(self, folder: Path, tmp_path: Path) -> None:
        checkpoint = Checkpoint(folder)
        assert len(checkpoint.table) == NUM_TENSORS
        expected = KimiK26(checkpoint, torch.float32).logprobs(PROMPT)[:-1]
        with self.serve(folder, tmp_path / "log") as server:
            served = self.logprobs(server, PROMPT.tolist())
            gigabytes = sum(spec.num_bytes for spec in checkpoint.table.values()) / 1e9
            assert re.search(rf"weights: {gigabytes:.1f} GB in [\d.]+ s", server.log.read_text())
        assert divergence(served, expected).mean().item() <= MAX_MEAN_KL

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_file_that_changes_while_a_server_loads_it(self, folder: Path, tmp_path: Path, change: str) -> None:
        """If a file is cut, touched or removed while it is loaded, the start ends by itself and its log names the
        file."""
        copy = shutil.copytree(folder, tmp_path / "copy")
        try:
            with (
                changed_when_mapped(copy, change) as changed,
                pytest.raises(StartError) as ended,
                self.serve(copy, tmp_path / "log"),
            ):
                pass
        finally:
            shutil.rmtree(copy)
        assert ended.value.__cause__ is None, "it did not end by itself"
        said = rf"CheckpointError: .*{changed[0].name} (was )?{SAID[change]} while it was loaded"
        assert re.search(said, ended.value.log), ended.value.log[-3000:]


@contextmanager
def changed_when_mapped(folder: Path, change: str) -> Iterator[list[Path]]:
    """Change, within the block, the first of the folder's files that a child of this process is seen to have mapped.

    change: a key of CHANGES. Yields a list into which the changed file is put; raises AssertionError at the end of the
    block if no file was seen.
    """
    changed: list[Path] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and not changed:
            for process in psutil.Process().children(recursive=True):
                with suppress(OSError):  # it has ended
                    maps = Path(f"/proc/{process.pid}/maps").read_text()
                    if found := re.search(rf"{folder}/\S+\.safetensors", maps):
                        changed.append(Path(found[0]))
                        CHANGES[change](changed[0])
                        break
            time.sleep(0.1)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield changed
    finally:
        over.set()
        watching.join()
    assert changed, "no file was seen to be mapped"
