"""vLLM's own parser of this model's answers, with three faults mended.

Streamed, a call without arguments ended with none at all, which is no JSON; and a call that the token limit cut before its
arguments was named after whatever was there of its id. To see the markers it had every special token shown, reserved ones in
the answer's text too: our tokenizer counts the markers among the ordinary tokens.
"""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaFunctionCall, DeltaToolCall
from vllm.parser.kimi_k2 import KimiK2Parser
from vllm.reasoning.kimi_k2_reasoning_parser import KimiK2ReasoningParser
from vllm.tool_parsers.kimi_k2_tool_parser import KimiK2ToolParser

from k26_plugins.common.prompt.output import MARKERS


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

    def adjust_request(self, request: Any) -> Any:
        hidden = set(self.model_tokenizer.all_special_tokens)
        return request if hidden.isdisjoint(MARKERS) else super().adjust_request(request)


class K26ToolParser(KimiK2ToolParser):
    """What the tool-call parser `k26` is."""

    _parser_engine_cls = K26Parser

    def adjust_request(self, request: Any) -> Any:
        return self._parser_engine.adjust_request(request)


class K26ReasoningParser(KimiK2ReasoningParser):
    """What the reasoning parser `k26` is."""

    _parser_engine_cls = K26Parser
