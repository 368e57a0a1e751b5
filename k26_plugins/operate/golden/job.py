"""Run the computation of a golden file.

The whole batch goes through one layer after the other, and the state is written to disk after each layer, so that a run
that is killed can be continued. The first pass computes the prompts and the first token of each answer, every later
pass one more token of each answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from k26_plugins import __version__
from k26_plugins.common.checkpoint import StreamedCheckpoint, fingerprint
from k26_plugins.common.prompt.tokenizer import KimiTokenizer
from k26_plugins.common.reference.decoder import rms_norm
from k26_plugins.operate.golden import memory
from k26_plugins.operate.golden.embed import embed_prompts, embed_tokens, largest_number_of_patches
from k26_plugins.operate.golden.file import FORMAT, Golden, GoldenPrompt
from k26_plugins.operate.golden.head import Answers, Other, answers
from k26_plugins.operate.golden.layers import Choice, Keys, Layer, Stream
from k26_plugins.operate.golden.prompts import Prompt
from k26_plugins.operate.golden.state import State
from k26_plugins.operate.golden.variants import (
    BASELINE,
    BY_NAME,
    MODEL,
    SUSPECT_IMAGES,
    SUSPECT_TEXTS,
    SUSPECT_TOKENS,
    VARIANTS,
    Variant,
)

NORM = "language_model.model.norm.weight"


class GoldenJob:
    """The computation of one golden file. The constructor works out how much memory it takes; `run` does the work."""

    def __init__(
        self, checkpoint: StreamedCheckpoint, prompts: Sequence[Prompt], out: Path, top_k: int, answer_tokens: int
    ) -> None:
        """Read the headers and work out what the run takes.

        out: the golden file; the state goes to a folder beside it. top_k: likeliest tokens to keep at each position.
        answer_tokens: tokens of each prompt's greedy answer, at least 1; each token after the first is another pass
        over the layers.
        """
        self.checkpoint, self.prompts, self.out = checkpoint, prompts, out
        self.top_k, self.num_passes = top_k, answer_tokens
        self.config = checkpoint.config
        self.fingerprint = fingerprint(checkpoint)
        self.state_folder = out.with_name(f"{out.name}.state")
        lengths = [len(prompt.token_ids) for prompt in prompts]
        suspects = [self._suspect_prompts(variant) for variant in VARIANTS if variant.is_suspect]
        self.carried = memory.Carried(
            tokens=sum(lengths),
            suspect_tokens=sum(min(lengths[index], SUSPECT_TOKENS) for chosen in suspects for index in chosen),
            longest=max(lengths),
            patches=largest_number_of_patches(prompts, checkpoint.folder),
        )
        self.stages = memory.peak(self.config, self.carried, top_k)

    @property
    def peak_bytes(self) -> int:
        """Bytes of memory that the run takes at most, beyond what the process has already."""
        return max(self.stages.values())

    @property
    def steps(self) -> int:
        """Number of layers that the batch goes through, counted over all passes."""
        return self.num_passes * self.config.text.num_hidden_layers

    @torch.inference_mode()
    def run(self, on_step: Callable[[int], None] = lambda done: None) -> Golden:
        """Do the work that is left, write the golden file, delete the state and return the golden file's content.

        on_step: called with the number of layers that are done, of `steps`. Raises StateError, CheckpointError.
        """
        with memory.threads_for(self.config.text):
            return self._run(on_step)

    def _run(self, on_step: Callable[[int], None]) -> Golden:
        memory.give_back_freed_memory()
        state = State(self.state_folder, self._identity())
        layers = self.config.text.num_hidden_layers
        number, passed, tensors = state.latest()
        tokens = [list(prompt.token_ids) for prompt in self.prompts]
        for done in range(self.num_passes):
            found = state.answers(done)
            if found is None:
                active = self._active(tokens)
                resumed = tensors if number == done and passed >= 0 else None
                found = self._pass(state, done, active, tokens, resumed, max(passed, 0) if resumed else 0, on_step)
                state.keep_answers(done, found)
            for index, token in zip(found["active"].tolist(), found["answer"].tolist(), strict=True):
                tokens[index].append(token)
            on_step((done + 1) * layers)
        golden = self._assemble(state, tokens)
        golden.save(self.out)
        state.discard()
        return golden

    def _pass(
        self,
        state: State,
        number: int,
        active: list[int],
        tokens: list[list[int]],
        resumed: dict[str, torch.Tensor] | None,
        passed: int,
        on_step: Callable[[int], None],
    ) -> dict[str, torch.Tensor]:
        """Take the batch through every layer once and return the pass's answers, as tensors to be saved.

        The batch is all prompt tokens in pass 0, and the last token of each active answer in later passes. resumed: the
        state after `passed` layers of this pass, if an earlier process left one.
        """
        streams = self._streams(number, active)
        choices: list[Choice] = []
        if resumed is not None:
            for stream in streams:
                stream.hidden = resumed[stream.variant.name]
            if "experts" in resumed:
                kept = (resumed[name].unbind(1) for name in ("experts", "gaps"))
                choices = [Choice(*both) for both in zip(*kept, strict=True)]
        elif number == 0:
            embed_prompts(self.checkpoint, self.prompts, streams)
        else:
            last = embed_tokens(self.checkpoint, torch.tensor([tokens[index][-1] for index in active]))
            for stream in streams:
                stream.hidden = last.to(stream.variant.dtype)
        resumed = None
        layers = self.config.text.num_hidden_layers
        for index in range(passed, layers):
            layer = Layer(self.checkpoint, index)
            keys = layer.attend(streams, _joined(state.keys(number, index)))
            # No pass follows the last one, so nothing would read its keys.
            if number < self.num_passes - 1:
                named = {f"{variant}.{prompt}": value for (variant, prompt), value in keys.items()}
                state.keep_keys(number, index, named)
            chosen = layer.feed_forward(streams)
            if chosen is not None:
                choices.append(chosen)
            hidden = {stream.variant.name: stream.hidden for stream in streams}
            state.keep(number, index + 1, {**hidden, **_stacked(choices)})
            on_step(number * layers + index + 1)
        found = self._answers(streams, tokens, number)
        ends = torch.tensor(streams[0].lengths).cumsum(0) - 1
        named = {
            "active": torch.tensor(active),
            "lengths": torch.tensor(streams[0].lengths),
            "answer": found.top_ids[ends, 0],
            "top_ids": found.top_ids,
            "top_logprobs": found.top_logprobs,
            "target_logprobs": found.target_logprobs,
            "baseline_kl": found.kl[0],
            **(_stacked(choices) or {name: torch.empty(len(found.top_ids), 0, 0) for name in ("experts", "gaps")}),
        }
        for stream, values in zip(streams[1:], found.others, strict=True):
            named[f"other.{stream.variant.name}"] = values
        return named

    def _streams(self, number: int, active: list[int]) -> list[Stream]:
        streams = []
        for variant in VARIANTS:
            if variant.is_suspect and number:
                continue
            prompts = self._suspect_prompts(variant) if variant.is_suspect else active
            if not prompts:
                continue
            whole = [len(self.prompts[index].token_ids) if number == 0 else 1 for index in prompts]
            lengths = [min(length, SUSPECT_TOKENS) for length in whole] if variant.is_suspect else whole
            streams.append(Stream(variant, variant.config(self.config.text), prompts, lengths, torch.empty(0)))
        return streams

    def _suspect_prompts(self, variant: Variant) -> list[int]:
        numbered = list(enumerate(self.prompts))
        texts = [index for index, prompt in numbered if not prompt.images][:SUSPECT_TEXTS]
        images = [index for index, prompt in numbered if prompt.images][:SUSPECT_IMAGES]
        return images if variant.on_images_only else sorted(texts + images)

    def _active(self, tokens: list[list[int]]) -> list[int]:
        """Return the numbers of the prompts whose answer goes on.

        An answer ends after a stop token, and after the placeholder of an image, for which there is no image.
        """
        ends = (self.config.eos_token_id, self.config.media_placeholder_token_id)
        return [
            index
            for index, prompt in enumerate(self.prompts)
            if len(tokens[index]) == len(prompt.token_ids) or tokens[index][-1] not in ends
        ]

    def _answers(self, streams: list[Stream], tokens: list[list[int]], number: int) -> Answers:
        norm = self.checkpoint.tensor(NORM)
        normed = [
            rms_norm(stream.hidden, norm.to(stream.variant.dtype), self.config.text.rms_norm_eps) for stream in streams
        ]
        model = streams[0]
        starts = dict(zip(model.prompts, [0, *torch.tensor(model.lengths).cumsum(0).tolist()], strict=False))
        targets: list[int] = []
        for index in model.prompts:
            targets += [*(tokens[index][1:] if number == 0 else []), -1]
        others = []
        for stream, hidden in zip(streams[1:], normed[1:], strict=True):
            rows = [
                torch.arange(starts[index], starts[index] + length)
                for index, length in zip(stream.prompts, stream.lengths, strict=True)
            ]
            others.append(Other(hidden, torch.cat(rows)))
        return answers(self.checkpoint, normed[0], torch.tensor(targets), others, self.top_k)

    def _assemble(self, state: State, tokens: list[list[int]]) -> Golden:
        parts: list[dict[str, list[torch.Tensor]]] = [{} for _ in self.prompts]
        for number in range(self.num_passes):
            found = state.answers(number)
            assert found is not None, "every pass has ended"
            lengths = found["lengths"].tolist()
            whole = ("top_ids", "top_logprobs", "target_logprobs", "baseline_kl", "experts", "gaps")
            for name in (*whole, f"other.{BASELINE}"):
                for index, value in zip(found["active"].tolist(), found[name].split(lengths), strict=True):
                    parts[index].setdefault(name, []).append(value)
            for stream in self._streams(number, found["active"].tolist())[2:]:
                values = found[f"other.{stream.variant.name}"].split(stream.lengths)
                for index, value in zip(stream.prompts, values, strict=True):
                    parts[index].setdefault(stream.variant.name, []).append(value)
        prompts = []
        for index, (prompt, found_parts) in enumerate(zip(self.prompts, parts, strict=True)):
            joined = {name: torch.cat(values) for name, values in found_parts.items()}
            following = joined["target_logprobs"]
            # A pass does not know the token that it generates. The answer is greedy, so that token is the likeliest
            # one.
            unknown = following.isnan()
            following[unknown] = joined["top_logprobs"][unknown, 0]
            prompts.append(
                GoldenPrompt(
                    name=prompt.name,
                    request=prompt.request,
                    text=prompt.text,
                    num_prompt_tokens=len(prompt.token_ids),
                    token_ids=tokens[index],
                    top_ids=joined["top_ids"],
                    top_logprobs=joined["top_logprobs"],
                    next_logprobs=following,
                    baseline_logprobs=joined[f"other.{BASELINE}"],
                    baseline_kl=joined["baseline_kl"],
                    experts=joined["experts"].to(torch.int16),
                    gaps=joined["gaps"],
                    suspects={name: value for name, value in joined.items() if name in BY_NAME and name != MODEL},
                    images=prompt.images,
                )
            )
        text, tokenizer = self.config.text, KimiTokenizer(self.checkpoint.folder)
        answered = [prompt.top_ids[prompt.num_prompt_tokens - 1 :] for prompt in prompts]
        info = {
            "fingerprint": self.fingerprint,
            "version": __version__,
            "vocab_size": text.vocab_size,
            "special_tokens": tokenizer.named,
            # `k26 verify` needs the bytes to match the tokens of endpoints that report tokens as text.
            "token_bytes": {
                str(token): tokenizer.token_bytes(token).hex() for token in torch.cat(answered).unique().tolist()
            },
            "first_moe_layer": text.first_k_dense_replace,
            "num_experts": text.n_routed_experts,
            "eos_token_id": self.config.eos_token_id,
            "media_placeholder_token_id": self.config.media_placeholder_token_id,
        }
        return Golden(info, prompts)

    def _identity(self) -> str:
        """Return a hash of everything that must be the same for a run to continue from a state."""
        inputs = {
            "version": __version__,
            "format": FORMAT,
            "weights": self.fingerprint,
            "top_k": self.top_k,
            "passes": self.num_passes,
            "variants": [variant.name for variant in VARIANTS],
            "prompts": [
                [
                    prompt.name,
                    prompt.request,
                    prompt.token_ids,
                    [hashlib.sha256(image).hexdigest() for image in prompt.images],
                ]
                for prompt in self.prompts
            ],
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _stacked(choices: list[Choice]) -> dict[str, torch.Tensor]:
    """Return the layers' choices stacked to `[T, layers, K + N]`; empty if no MoE layer has been passed yet."""
    if not choices:
        return {}
    return {
        "experts": torch.stack([choice.experts for choice in choices], 1),
        "gaps": torch.stack([choice.gaps for choice in choices], 1),
    }


def _joined(passes: list[dict[str, torch.Tensor]]) -> Keys:
    """Return each prompt's keys of all passes so far, concatenated."""
    joined: dict[tuple[str, int], list[torch.Tensor]] = {}
    for kept in passes:
        for name, value in kept.items():
            variant, prompt = name.split(".")
            joined.setdefault((variant, int(prompt)), []).append(value)
    return {key: torch.cat(parts) for key, parts in joined.items()}
