"""Answer a message with the reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k26_plugins.cli.console import Folder, err, fail


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="The user's message.", show_default=False)],
    image: Annotated[list[Path] | None, typer.Option(help="An image that comes before the text; repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 32,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the smallest set with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    thinking: Annotated[bool, typer.Option(help="Thinking mode, or instant.")] = True,
) -> None:
    """Answer a message with the plain reference model, on the CPU.

    Weights are read from the mapped files when they are touched, so that the published checkpoint works too, slowly.
    """
    import torch

    from k26_plugins.common.checkpoint import Checkpoint, CheckpointError
    from k26_plugins.common.config import ConfigError
    from k26_plugins.common.media import MediaConfig, MediaError, normalise, open_image, preprocess
    from k26_plugins.common.multimodal import KimiK26
    from k26_plugins.common.prompt.chat import expand_media_placeholders, render
    from k26_plugins.common.prompt.tokenizer import KimiTokenizer, TokenizerError

    try:
        checkpoint = Checkpoint(folder)
        tokenizer = KimiTokenizer(folder)
        tokenizer.check(checkpoint.config)
        media = [[open_image(path.read_bytes())] for path in image or []]
        parts: list[dict[str, str]] = [{"type": "image"} for _ in media]
        text = render(
            [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}], folder, thinking=thinking
        )
        # The prompt's own text may name control tokens; here the user is the one at the keyboard.
        token_ids = tokenizer.encode_prompt(text)
        pixel_values = grid_thw = None
        if media:
            media_config = MediaConfig.from_path(folder)
            patches, grids = preprocess(media, media_config)
            pixel_values = torch.from_numpy(normalise(patches, media_config))
            grid_thw = torch.from_numpy(grids)
            counts = [h * w // media_config.merge_kernel_size**2 for _, h, w in grids.tolist()]
            placeholder = checkpoint.config.media_placeholder_token_id
            token_ids = expand_media_placeholders(token_ids, counts, placeholder)
        with err.status("reading the checkpoint"):
            model = KimiK26(checkpoint)
    except (CheckpointError, ConfigError, MediaError, TokenizerError, OSError) as error:
        fail(error)
    answer: list[int] = []
    printed = 0
    for token in model.generate(
        torch.tensor(token_ids),
        pixel_values,
        grid_thw,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    ):
        answer.append(token)
        whole = tokenizer.decode(answer)
        # A character may take several tokens: what does not decode yet waits.
        if not whole.endswith("\ufffd"):
            typer.echo(whole[printed:], nl=False)
            printed = len(whole)
    typer.echo(tokenizer.decode(answer)[printed:])
