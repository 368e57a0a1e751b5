"""Find the folder with a checkpoint's files: the user's own, or a snapshot in the hub's cache."""

from __future__ import annotations

from pathlib import Path

from k26_plugins.common.checkpoint.header import INDEX_FILE, CheckpointError, weight_files
from k26_plugins.common.checkpoint.saved_state import saved_state_files


def local_folder(name: str | Path, revision: str | None = None, cache_dir: str | None = None) -> Path | None:
    """Return `name` if it is a folder, else the snapshot of the model `name` in the hub's cache.

    Return None if the cache does not hold all files of the snapshot. Nothing is downloaded: the engine fetches the rest
    of a snapshot, and the files that arrive are checked while they are loaded.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(str(name), INDEX_FILE, revision=revision, cache_dir=cache_dir)
    except HFValidationError:
        return None
    if not isinstance(index, str):
        return None
    return whole_folder(Path(index).parent)


def whole_folder(folder: Path) -> Path | None:
    """Return `folder`, or None if its weight files are not all there.

    Files are missing, for example, while a download is unfinished; the engine completes it.
    """
    try:
        here = all(file.exists() for file in weight_files(folder))
    except CheckpointError:
        return None
    return folder if here else None


def weights_folder(name: str | Path, revision: str | None = None) -> Path | None:
    """Return the folder that `local_folder` finds, or None if the folder has an index but none of the weight files.

    Engines keep the small files of a checkpoint in an object store in such a folder and stream the weights; others load
    dummy weights. If real weights are wanted and missing, the engine reports it. A state that an engine saved counts as
    weights, even if a checkpoint's index was copied beside it.
    """
    folder = local_folder(name, revision)
    if (
        folder is not None
        and (folder / INDEX_FILE).exists()
        and not any(file.exists() for file in weight_files(folder))
        and not saved_state_files(folder)
    ):
        return None
    return folder
