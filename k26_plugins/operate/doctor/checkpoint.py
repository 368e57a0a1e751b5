"""Examine a checkpoint's folder: its tensors, tokenizer files, image preprocessing and chat template."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from k26_plugins.common.checkpoint import (
    CheckpointError,
    Fault,
    Problem,
    StreamedCheckpoint,
    check,
    fingerprint,
    folded,
)
from k26_plugins.common.checkpoint.header import INDEX_FILE, index_of
from k26_plugins.common.model.config import ConfigError, K26Config, read_config_json
from k26_plugins.common.multimodal.image import MediaConfig, MediaError
from k26_plugins.common.prompt.chat import TEMPLATE_FILE
from k26_plugins.common.prompt.tokenizer import RANKS_FILE, KimiTokenizer, TokenizerError
from k26_plugins.operate.doctor.finding import Finding, Level

NUM_SHOWN = 3
REPOSITORY = "moonshotai/Kimi-K2.6"
# A problem with one of OF_FILES is named by its file; a problem with one of OF_TENSORS is named by a tensor, whose file
# the index gives.
OF_FILES = (Fault.MISSING_FILE, Fault.UNFINISHED, Fault.UNREADABLE, Fault.NOT_ITS_END)
OF_TENSORS = (Fault.MISSING, Fault.TRUNCATED, Fault.WRONG_SHAPE, Fault.WRONG_DTYPE)
WEIGHTS = ".safetensors"
SETTINGS_FILE, PREPROCESSOR_FILE = "tokenizer_config.json", "preprocessor_config.json"


def checkpoint_findings(folder: Path) -> list[Finding]:
    """Return whether the checkpoint is whole, with a command that downloads what is missing or damaged."""
    try:
        report = check(folder)
    except (CheckpointError, ConfigError) as error:
        return [Finding(Level.BAD, "checkpoint", str(error), "download it again")]
    findings = []
    if report.problems:
        shown = "; ".join(folded(report.problems)[:NUM_SHOWN])
        detail = f"{len(report.problems)} faults, such as {shown}"
        fix = _mend(folder, report.problems)
        findings.append(Finding(Level.BAD, "checkpoint", detail, f"all of them: k26 check {folder}", fix))
    elif report.other_layout:
        detail = f"this architecture in another layout, which an engine's own code serves: {report.other_layout[0]}"
        findings.append(Finding(Level.NOTE, "checkpoint", detail))
    else:
        with StreamedCheckpoint(folder) as checkpoint:
            mark = fingerprint(checkpoint)
        detail = f"{report.num_tensors:,} tensors, {report.num_bytes:,} bytes, all right; weights {mark[:23]}…"
        findings.append(Finding(Level.OK, "checkpoint", detail))
    try:
        KimiTokenizer(folder).check(K26Config.read(read_config_json(folder))[0])
        findings.append(Finding(Level.OK, "tokenizer", "tiktoken.model and config.json agree on every id"))
    except TokenizerError as error:
        findings.append(
            Finding(
                Level.BAD,
                "tokenizer",
                str(error),
                "some download filters miss tiktoken.model: fetch it",
                _download(folder, RANKS_FILE, SETTINGS_FILE),
            )
        )
    try:
        MediaConfig.from_path(folder)
        findings.append(Finding(Level.OK, "images", "preprocessor_config.json is there"))
    except MediaError as error:
        fix = _download(folder, PREPROCESSOR_FILE)
        findings.append(Finding(Level.BAD, "images", str(error), f"download {PREPROCESSOR_FILE}", fix))
    if not (folder / TEMPLATE_FILE).exists():
        detail = f"no {TEMPLATE_FILE}: the package's own is used by the core, and engines may have none"
        fix = _download(folder, TEMPLATE_FILE)
        findings.append(Finding(Level.NOTE, "chat template", detail, f"download {TEMPLATE_FILE}", fix))
    return findings


def _mend(folder: Path, problems: Sequence[Problem]) -> str:
    """Return the command that makes the faulty files readable or downloads them again; empty if no file is to blame."""
    try:
        index = index_of(folder)
    except CheckpointError:
        return _download(folder, INDEX_FILE)
    named = {problem.name for problem in problems if problem.fault in OF_FILES}
    # An unfinished download's name begins with the name of the file that it belongs to.
    files = {name[: name.index(WEIGHTS) + len(WEIGHTS)] for name in named if WEIGHTS in name}
    files |= {index[problem.name] for problem in problems if problem.fault in OF_TENSORS and problem.name in index}
    closed = sorted(file for file in files if (folder / file).exists() and not os.access(folder / file, os.R_OK))
    if closed:
        return shlex.join(["chmod", "u+r", *(str(folder / file) for file in closed)])
    return _download(folder, *sorted(files))


def _download(folder: Path, *files: str) -> str:
    """Return the command that downloads these files from the published repository; empty without files.

    `--force-download` is needed because `hf` does not download a damaged file again by itself.
    """
    if not files:
        return ""
    return shlex.join(["hf", "download", REPOSITORY, *files, "--local-dir", str(folder), "--force-download"])
