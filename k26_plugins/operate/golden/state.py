"""Keep the state of a golden run on disk, so that a killed run continues after the last layer that it finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from k26_plugins.common.checkpoint.tensor_file import save_tensors

IDENTITY = "identity"


class StateError(ValueError):
    """The error for a state that is of another run or cannot be read. The message names the path and the remedy."""


def read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. Raises StateError if it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            # The tensors are copied, because otherwise they would keep the whole file mapped until the layer ends.
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StateError(f"{file} cannot be read ({error}): delete it and run again.") from error


class State:
    """The folder in which a job keeps its state."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Create the folder, or continue with the one that is there.

        identity: a hash of the run's inputs. Raises StateError if the folder belongs to a run with other inputs.
        """
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
        """Return the last pass, its number of finished layers and the tensors kept then; (0, −1, {}) at the start."""
        file = self.folder / "hidden.safetensors"
        if not file.exists():
            return 0, -1, {}
        tensors, metadata = read(file)
        return int(metadata["pass"]), int(metadata["layers"]), tensors

    def keep(self, number: int, layers: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write the state after `layers` layers of pass `number`, in place of the state before."""
        save_tensors(tensors, self.folder / "hidden.safetensors", {"pass": str(number), "layers": str(layers)})

    def keep_keys(self, number: int, layer: int, keys: dict[str, torch.Tensor]) -> None:
        """Write the keys that attention of `layer` computed for the tokens of pass `number`."""
        save_tensors(keys, self._keys(number, layer), {})

    def keys(self, number: int, layer: int) -> list[dict[str, torch.Tensor]]:
        """Return the keys of `layer` from every pass before `number`, in the order of the passes. Raises StateError."""
        return [read(self._keys(earlier, layer))[0] for earlier in range(number)]

    def keep_answers(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write the answers of pass `number`."""
        save_tensors(tensors, self._answers(number), {})

    def answers(self, number: int) -> dict[str, torch.Tensor] | None:
        """Return the answers of pass `number`, or None if that pass has not ended. Raises StateError."""
        return read(self._answers(number))[0] if self._answers(number).exists() else None

    def discard(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)

    def _keys(self, number: int, layer: int) -> Path:
        return self.folder / f"keys-{number:03d}-{layer:03d}.safetensors"

    def _answers(self, number: int) -> Path:
        return self.folder / f"answers-{number:03d}.safetensors"
