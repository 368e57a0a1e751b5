"""The checkpoint's state: tensors, tokenizer, template, preprocessing."""

from __future__ import annotations

from pathlib import Path

from k26_plugins.common.checkpoint import CheckpointError, StreamedCheckpoint, check, fingerprint, folded
from k26_plugins.common.config import ConfigError, K26Config, read_config_json
from k26_plugins.common.media import MediaConfig, MediaError
from k26_plugins.common.prompt.chat import TEMPLATE_FILE
from k26_plugins.common.prompt.tokenizer import KimiTokenizer, TokenizerError
from k26_plugins.operate.doctor.finding import Finding, Level

NUM_SHOWN = 3


def checkpoint_findings(folder: Path) -> list[Finding]:
    try:
        report = check(folder)
    except (CheckpointError, ConfigError) as error:
        return [Finding(Level.BAD, "checkpoint", str(error), "download it again")]
    findings = []
    if report.problems:
        shown = "; ".join(folded(report.problems)[:NUM_SHOWN])
        detail = f"{len(report.problems)} faults, such as {shown}"
        findings.append(Finding(Level.BAD, "checkpoint", detail, f"all of them: k26 check {folder}"))
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
            Finding(Level.BAD, "tokenizer", str(error), "some download filters miss tiktoken.model: fetch it")
        )
    try:
        MediaConfig.from_path(folder)
        findings.append(Finding(Level.OK, "images", "preprocessor_config.json is there"))
    except MediaError as error:
        findings.append(Finding(Level.BAD, "images", str(error), "download preprocessor_config.json"))
    if not (folder / TEMPLATE_FILE).exists():
        detail = f"no {TEMPLATE_FILE}: the package's own is used by the core, and engines may have none"
        findings.append(Finding(Level.NOTE, "chat template", detail, f"download {TEMPLATE_FILE}"))
    return findings
