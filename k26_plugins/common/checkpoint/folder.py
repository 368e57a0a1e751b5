"""Where a checkpoint's files lie: a folder of the user's, or the hub's cache with its links."""

from __future__ import annotations

from pathlib import Path

from k26_plugins.common.checkpoint.header import INDEX_FILE, CheckpointError, weight_files
from k26_plugins.common.checkpoint.saved_state import saved_state_files


def local_folder(name: str | Path, revision: str | None = None, cache_dir: str | None = None) -> Path | None:
    """The folder itself, or the cached snapshot of a name on the hub; None where its files are not all here yet.

    Nothing is downloaded: an engine fetches the rest of a snapshot, and what arrives is checked while it is loaded.
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
    """The folder, and None where a file that its index names is not here: a download that an engine goes on with."""
    try:
        here = all(file.exists() for file in weight_files(folder))
    except CheckpointError:
        return None
    return folder if here else None


def weights_folder(name: str | Path, revision: str | None = None, cache_dir: str | None = None) -> Path | None:
    """The folder that `local_folder` finds, None where it has an index and none of its files.

    Engines keep the small files of an object store's checkpoint in such a folder and stream the weights; others load dummy
    weights. Where real ones are wanted and missing, the engine says so. A state that an engine saved is there, whatever
    index was copied beside it.
    """
    folder = local_folder(name, revision, cache_dir)
    if (
        folder is not None
        and (folder / INDEX_FILE).exists()
        and not any(file.exists() for file in weight_files(folder))
        and not saved_state_files(folder)
    ):
        return None
    return folder
