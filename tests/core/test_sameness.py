"""Test of the core's token ids of two hundred conversations against those of vLLM's server, which are recorded."""

from __future__ import annotations

from pathlib import Path

from support.conversations import conversations, core_token_ids, digest, recorded


def test_the_core_gives_what_the_engines_give(tiny_folder: Path) -> None:
    assert {one.name: digest(core_token_ids(tiny_folder, one)) for one in conversations()} == recorded()
