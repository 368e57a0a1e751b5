"""vLLM's own parser of this model's tool calls, with two faults mended.

Streamed, a call without arguments ended with none at all, which is no JSON; and a call that the token limit cut before its
arguments was named after whatever was there of its id.
"""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaFunctionCall, DeltaToolCall
from vllm.parser.kimi_k2 import KimiK2Parser
from vllm.tool_parsers.kimi_k2_tool_parser import KimiK2ToolParser


class K26Parser(KimiK2Parser):
    def _handle_tool_end(self, event: Any, deltas: list[Any]) -> None:
        index = event.tool_index
        if index >= len(self._tool_slots):
            return
        slot = self._tool_slots[index]
        if not slot.name_sent and self._extract_tool_id_and_name(slot.name)[1] is None:
            slot.name = ""
            return
        super()._handle_tool_end(event, deltas)
        if slot.name_sent and not slot.args.strip():
            slot.append_args("{}")
            deltas.append(DeltaToolCall(index=index, function=DeltaFunctionCall(arguments="{}")))


class K26ToolParser(KimiK2ToolParser):
    """What the tool-call parser `k26` is."""

    _parser_engine_cls = K26Parser
