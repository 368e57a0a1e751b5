"""What a golden run keeps on disk while it runs, so that a killed one goes on after the last layer that it passed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from k26_plugins.common.checkpoint.tensor_file import save_tensors

IDENTITY = "identity"


class StateError(ValueError):
    """A state that is not of this run. The message names the folder and the remedy."""


def read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises StateError."""
    try:
        with safe_open(file, framework="pt") as opened:
            # Copies: a mapped file would be held to the layer's end.
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StateError(f"{file} cannot be read ({error}): delete it and run again.") from error


class State:
    """The folder of a running job."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Make the folder, or take it over. Raises StateError where it belongs to a run with other inputs."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / "run.json"
        if not mark.exists():
            mark.write_text(json.dumps({IDENTITY: identity}), encoding="utf-8")
        elif json.loads(mark.read_text(encoding="utf-8"))[IDENTITY] != identity:
            raise StateError(
                f"{folder} holds the state of a run with other prompts, options or weights: delete it to begin anew, or "
                f"give another --out."
            )

    def latest(self) -> tuple[int, int, dict[str, torch.Tensor]]:
        """Pass, number of layers passed in it, and the tensors that were kept; (0, −1, {}) at the beginning."""
        file = self.folder / "hidden.safetensors"
        if not file.exists():
            return 0, -1, {}
        tensors, metadata = read(file)
        return int(metadata["pass"]), int(metadata["layers"]), tensors

    def keep(self, number: int, layers: int, tensors: dict[str, torch.Tensor]) -> None:
        """The state after `layers` layers of pass `number`."""
        save_tensors(tensors, self.folder / "hidden.safetensors", {"pass": str(number), "layers": str(layers)})

    def keep_keys(self, number: int, layer: int, keys: dict[str, torch.Tensor]) -> None:
        """What attention of `layer` keeps of the tokens of pass `number`."""
        save_tensors(keys, self._keys(number, layer), {})

    def keys(self, number: int, layer: int) -> list[dict[str, torch.Tensor]]:
        """What attention of `layer` kept of the tokens of every pass before `number`, in order."""
        return [read(self._keys(earlier, layer))[0] for earlier in range(number)]

    def keep_answers(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        save_tensors(tensors, self._answers(number), {})

    def answers(self, number: int) -> dict[str, torch.Tensor] | None:
        """What pass `number` found, None where it has not ended."""
        return read(self._answers(number))[0] if self._answers(number).exists() else None

    def discard(self) -> None:
        shutil.rmtree(self.folder)

    def _keys(self, number: int, layer: int) -> Path:
        return self.folder / f"keys-{number:03d}-{layer:03d}.safetensors"

    def _answers(self, number: int) -> Path:
        return self.folder / f"answers-{number:03d}.safetensors"
