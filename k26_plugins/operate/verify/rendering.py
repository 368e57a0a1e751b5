"""Compare the prompt tokens that an endpoint makes of messages with the golden ones, and name the kind of mistake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from k26_plugins.operate.golden import Prompt
from k26_plugins.operate.verify.endpoint import Rendered

TOKENIZER_REMEDY = (
    "transformers 5.4 to 5.5.3 packs Kimi's special tokens densely: let the plugin's tokenizer serve (`k26 doctor` says "
    "whether it is active), or install transformers 5.5.4 or later"
)
TEMPLATE_REMEDY = (
    "serve with the checkpoint's own chat_template.jinja, and thinking on unless the request says otherwise"
)
MEDIA_REMEDY = "check that the engine's image processor is the plugin's: `k26 doctor`"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A prompt for which the endpoint's tokens differ from the golden ones, with the remedy."""

    prompt: str
    message: str
    remedy: str


def compare_rendering(prompt: Prompt, rendered: Rendered, special: Mapping[str, int]) -> Mismatch | None:
    """Compare the endpoint's prompt tokens, or their number if it reports no token ids, with the golden ones.

    special: ids of the special tokens by name. Returns None if the tokens are the same.
    """
    expected = prompt.token_ids
    found = rendered.token_ids
    if found is None:
        if rendered.count == len(expected):
            return None
        message = f"{rendered.count} prompt tokens, expected {len(expected)}"
        remedy = MEDIA_REMEDY if prompt.images else TEMPLATE_REMEDY
        if rendered.count == len(expected) - 1 and expected[-1] == special["<think>"]:
            message += ": one less, as without the <think> that opens the answer"
        return Mismatch(prompt.name, message, remedy)
    if found == expected:
        return None
    names = {token: name for name, token in special.items()}

    def show(tokens: list[int], index: int) -> str:
        return f"{names.get(tokens[index], 'token')} ({tokens[index]})" if index < len(tokens) else "its end"

    first = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    message = f"position {first}: {show(found, first)}, expected {show(expected, first)}"
    shifts = {b - a for a, b in zip(expected, found, strict=False) if a != b}
    shifted_special = all(a in names for a, b in zip(expected, found, strict=False) if a != b)
    if len(found) == len(expected) and len(shifts) == 1 and shifted_special:
        return Mismatch(prompt.name, f"{message}: special tokens are shifted by {shifts.pop():+d}", TOKENIZER_REMEDY)
    opener = special["<think>"]
    if expected[-1] == opener and found == expected[:-1]:
        return Mismatch(prompt.name, f"{message}: the <think> that opens the answer is missing", TEMPLATE_REMEDY)
    if (
        prompt.images
        and first < len(expected)
        and special["<|media_pad|>"] in (expected[first], *found[first : first + 1])
    ):
        counts = [tokens.count(special["<|media_pad|>"]) for tokens in (found, expected)]
        message = f"{message}: images take {counts[0]} tokens, expected {counts[1]}"
        return Mismatch(prompt.name, message, MEDIA_REMEDY)
    remedy = TOKENIZER_REMEDY if len(found) == len(expected) else TEMPLATE_REMEDY
    return Mismatch(prompt.name, message, remedy)
