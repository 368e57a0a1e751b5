"""Build the tokenizer that the engines use: a fast Hugging Face tokenizer from `tiktoken.model`, without remote code.

transformers' own conversion of this file splits text by a generic pattern and, in some releases, shifts the ids of the
special tokens. This module uses Kimi's pattern and the ids of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, normalizers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.generic import PaddingStrategy
from transformers.utils.hub import cached_file

from k26_plugins.common.model.config import ARCHITECTURE
from k26_plugins.common.prompt.chat import TEMPLATE_FILE, TemplateInput, own_template, prepare
from k26_plugins.common.prompt.control_tokens import MARK, QUOTED_SIGN, unescape
from k26_plugins.common.prompt.special_tokens import VIDEO_PLACEHOLDER
from k26_plugins.common.prompt.thinking import template_options
from k26_plugins.common.prompt.tokenizer import RANKS_FILE, SPLIT_PATTERN, KimiTokenizer, TokenizerError
from k26_plugins.common.settings import CONTROL_TOKENS, ENGINE, PROMPTS, TOOL_IDS

SETTINGS_FILE = "tokenizer_config.json"
# Beginnings of the control tokens that stay visible in decoded text, because the engines' parsers look for them there.
VISIBLE = ("<think>", "</think>", "<|tool_call")
# If the last message has this key, it is continued. For engines that cannot pass `continue_final_message`.
CONTINUE_KEY = "k26_continue"


class KimiTokenizerFast(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Kimi's tokenizer as a Hugging Face fast tokenizer.

    It is a class of its own because engines patch a tokenizer's class, and reload tokenizers of transformers' generic
    class.
    """

    escape_messages = True
    escape_tools = True
    kimis_ids = True
    # The template that came with the tokenizer; the user may set another one as `chat_template`.
    kimi_template: str | None = None
    # The text that the rendered prompt has in place of a video.
    video_place = VIDEO_PLACEHOLDER
    # The same tokenizer on the tiktoken library, which encodes several times as fast.
    plain: KimiTokenizer | None = None

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Encode by tiktoken if only token ids are asked for.

        The tokenizers library handles the rest: offsets, pairs of texts, and tensors of several texts.
        """
        texts = text if isinstance(text, list) else [text]
        tensors = kwargs.get("return_tensors")
        easy = texts and all(isinstance(one, str) for one in texts) and (tensors is None or isinstance(text, str))
        if self.plain is None or self._has_added_tokens(self.plain) or args or not easy or not _wants_ids_only(kwargs):
            encoded: BatchEncoding = super()._encode_plus(text, *args, **kwargs)
            return encoded
        keep = slice(None)
        strategy, limit = kwargs.get("truncation_strategy", _WHOLE), kwargs.get("max_length")
        if strategy != _WHOLE and limit:
            keep = slice(limit) if self.truncation_side == "right" else slice(-limit, None)
        token_ids = [self.plain.encode_prompt(one)[keep] for one in texts]
        data: dict[str, Any] = {"input_ids": token_ids}
        if kwargs.get("return_attention_mask") is not False:
            data["attention_mask"] = [[1] * len(ids) for ids in token_ids]
        if isinstance(text, str):
            data = {name: values[0] for name, values in data.items()}
        return BatchEncoding(data, tensor_type=tensors, prepend_batch_axis=tensors is not None)

    def _has_added_tokens(self, plain: KimiTokenizer) -> bool:
        """Return whether tokens were added, which tiktoken does not know.

        The count is the tokenizers library's, because vLLM makes `len` return the number that it had at the start.
        """
        return bool(super().__len__() != plain.vocab_size)

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Decode sequences of token ids; decode each id of a flat list by itself.

        transformers 4 does so too, and KTransformers' SGLang relies on it for logprobs. transformers 5 would join the
        ids of a flat list to one text.
        """
        if isinstance(sequences, list) and sequences and isinstance(sequences[0], int):
            sequences = [[token_id] for token_id in sequences]
        texts: list[str] = super().batch_decode(sequences, *args, **kwargs)
        return texts

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation as transformers' method does, with two differences.

        Tools are declared in the form that the model expects, and text in messages that spells a control token stays
        text. `thinking` may have the forms and names that `thinking.template_options` takes.
        """
        kwargs = template_options(kwargs)
        chat_template = chat_template or self.chat_template
        parsed_arguments = chat_template != self.kimi_template
        if isinstance(chat_template, str):
            chat_template = chat_template.replace(VIDEO_PLACEHOLDER, self.video_place)

        def ready(messages: Any) -> TemplateInput:
            return prepare(
                messages,
                tools,
                escape_messages=self.escape_messages,
                escape_tools=self.escape_tools,
                parsed_arguments=parsed_arguments,
                kimis_ids=self.kimis_ids and not parsed_arguments,
            )

        if conversation and CONTINUE_KEY in conversation[-1]:
            kwargs |= {"continue_final_message": True, "add_generation_prompt": False}
        if conversation and isinstance(conversation[0], list | tuple):
            given = ready([])
            batch: Any = [ready(messages).messages for messages in conversation]
        else:
            given = ready(conversation)
            batch = given.messages
        if given.tools_ts_str is not None:
            kwargs.setdefault("tools_ts_str", given.tools_ts_str)
        return super().apply_chat_template(batch, tools=given.tools, chat_template=chat_template, **kwargs)


_WHOLE = TruncationStrategy.DO_NOT_TRUNCATE
# Arguments of `_encode_plus` that it handles itself or that do not change a text's ids (the tokenizer adds no token at
# the ends of a text).
_WITHOUT_EFFECT = {
    "add_special_tokens", "max_length", "stride", "padding_side", "verbose", "return_tensors", "return_attention_mask",
    "truncation_strategy",
}  # fmt: skip


def _wants_ids_only(kwargs: Mapping[str, Any]) -> bool:
    """Return whether the arguments of `_encode_plus` ask only for token ids.

    Other arguments with an empty value count as not given.
    """
    others = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
    padding = others.pop("padding_strategy", PaddingStrategy.DO_NOT_PAD)
    return bool(padding == PaddingStrategy.DO_NOT_PAD and not any(others.values()))


def tokenizer_folder(path_or_name: str | Path, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """Return the folder with a model's tokenizer files.

    This is `path_or_name` if it is a folder, else the snapshot in the hub's cache to which the files are downloaded.
    """
    folder = Path(path_or_name)
    if folder.is_dir():
        return folder
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    for name in (SETTINGS_FILE, TEMPLATE_FILE):
        cached_file(str(path_or_name), name, **where, _raise_exceptions_for_missing_entries=False)
    return Path(str(cached_file(str(path_or_name), RANKS_FILE, **where))).parent


def is_this_model(path_or_name: str | Path, revision: str | None = None) -> bool:
    """Return whether the folder, or the model on the hub, has a config.json of this architecture."""
    where: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        file = cached_file(str(path_or_name), "config.json", **where)
        config = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return False
    return ARCHITECTURE in (config.get("architectures") or [])


def core_serves_prompts(path_or_name: str | Path, revision: str | None = None) -> bool:
    """Return whether the core tokenizes and renders the prompts of a checkpoint of this model.

    The engine does so if the user chose it by `K26_PROMPTS`, or if the checkpoint has a `tokenizer.json` and no
    `tiktoken.model`; transformers reads the former.
    """
    if PROMPTS.read() == ENGINE:
        return False
    where: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}

    def has(name: str) -> bool:
        return cached_file(str(path_or_name), name, **where) is not None

    return has(RANKS_FILE) or not has("tokenizer.json")


def load_hf_tokenizer(
    folder: str | Path, *, video_place: str = VIDEO_PLACEHOLDER, escape_messages: bool = True, **kwargs: Any
) -> KimiTokenizerFast:
    """Build the tokenizer of a checkpoint's folder; `kwargs` go to its constructor. Raises TokenizerError.

    video_place: the text in place of a video in a rendered chat; an adapter that inserts the video's chunks among token
    ids needs control tokens there. escape_messages: False for an adapter that marks the messages before its engine
    processes them.

    As with the published tokenizer, the name of a control token in text becomes the control token, because chat prompts
    are rendered to text. Names that `control_tokens.escape` marked stay text.
    """
    folder = Path(folder)
    reference = KimiTokenizer(folder)
    tokenizer = TikTokenConverter(vocab_file=str(folder / RANKS_FILE), pattern=SPLIT_PATTERN).converted()
    added = [
        AddedToken(name, normalized=False, special=not name.startswith(VISIBLE))
        for name in sorted(reference.special, key=reference.special.__getitem__)
    ]
    # The library looks for control tokens in the text before it is normalized, so the marks are removed after that.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(MARK, ""), normalizers.Replace(QUOTED_SIGN, unescape(QUOTED_SIGN))]
    )
    # The tokens get consecutive ids after the ranks, so they are added in the order of their ids.
    tokenizer.add_tokens(added)
    settings = _read_settings(folder / SETTINGS_FILE)
    template = folder / TEMPLATE_FILE
    if template.exists():
        settings.setdefault("chat_template", template.read_text(encoding="utf-8"))
    settings.setdefault("chat_template", own_template())
    built = KimiTokenizerFast(tokenizer_object=tokenizer, **{**settings, **kwargs})
    _compare(built, reference)
    built.plain = reference
    built.kimi_template = built.chat_template
    built.escape_tools = CONTROL_TOKENS.read() == "text"
    built.escape_messages = escape_messages and built.escape_tools
    built.video_place = video_place
    built.kimis_ids = TOOL_IDS.read() == "kimi"
    return built


def _read_settings(file: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "clean_up_tokenization_spaces": False,
    }
    if file.exists():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{file} is not readable as JSON ({error}): download it again.") from error
        settings.update({name: content[name] for name in ("model_max_length", "chat_template") if name in content})
    return settings


def _compare(built: KimiTokenizerFast, reference: KimiTokenizer) -> None:
    for name, token_id in reference.special.items():
        if built.convert_tokens_to_ids(name) != token_id:
            raise TokenizerError(
                f"the tokenizers library gave {name} the id {built.convert_tokens_to_ids(name)}, expected {token_id}: "
                f"install the versions of tokenizers and transformers that your engine asks for."
            )
    for text in ("Hello, world!", "中文English混合", "I'm 1234567890\r\n  x", "Ünï ÇODE's été"):
        if built.encode(text, add_special_tokens=False) != reference.encode(text):
            raise TokenizerError(
                f"the tokenizers library splits {text!r} otherwise than the model does: install the versions of "
                f"tokenizers and transformers that your engine asks for."
            )
