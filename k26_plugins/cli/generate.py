"""`k26 generate`: answer a message with the reference model."""

from __future__ import annotations

from pathlib import Path

import click

from k26_plugins.cli.command import PATH, Argument, Command
from k26_plugins.cli.console import err, fail, folder_argument


@click.command(cls=Command)
@folder_argument
@click.argument("prompt", cls=Argument, about="The user's message.")
@click.option("--image", type=PATH, multiple=True, help="An image that comes before the text; repeatable.")
@click.option("--max-new-tokens", default=32, help="Tokens to generate at most.")
@click.option("--temperature", default=0.0, help="0 takes the likeliest token.")
@click.option("--top-p", default=1.0, help="Draw from the smallest set with this probability.")
@click.option("--seed", default=0, help="Of the drawing.")
@click.option("--thinking/--no-thinking", default=True, help="Thinking mode, or instant.")
def generate(
    folder: Path,
    prompt: str,
    image: tuple[Path, ...],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    thinking: bool,
) -> None:
    """Answer a message with the plain reference model, on the CPU.

    Weights are read from the mapped files when they are needed, so the published checkpoint works too, but slowly.
    """
    import torch

    from k26_plugins.common.checkpoint import Checkpoint, CheckpointError
    from k26_plugins.common.model.config import ConfigError
    from k26_plugins.common.multimodal.image import MediaConfig, MediaError, normalize, open_image, preprocess
    from k26_plugins.common.prompt.chat import expand_media_placeholders, render
    from k26_plugins.common.prompt.tokenizer import KimiTokenizer, TokenizerError
    from k26_plugins.common.reference.kimi_k26 import KimiK26

    try:
        checkpoint = Checkpoint(folder)
        tokenizer = KimiTokenizer(folder)
        tokenizer.check(checkpoint.config)
        media = [[open_image(path.read_bytes())] for path in image]
        parts: list[dict[str, str]] = [{"type": "image"} for _ in media]
        text = render(
            [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}], folder, thinking=thinking
        )
        # A control token that the prompt's text names becomes that token: here the user is the operator, who may do so.
        token_ids = tokenizer.encode_prompt(text)
        pixel_values = grid_thw = None
        if media:
            media_config = MediaConfig.from_path(folder)
            patches, grids = preprocess(media, media_config)
            pixel_values = torch.from_numpy(normalize(patches, media_config))
            grid_thw = torch.from_numpy(grids)
            counts = [h * w // media_config.merge_kernel_size**2 for _, h, w in grids.tolist()]
            placeholder = checkpoint.config.media_placeholder_token_id
            token_ids = expand_media_placeholders(token_ids, counts, placeholder)
        with err().status("reading the checkpoint"):
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
        # A character may take several tokens: text is printed only when its last character is whole.
        if not whole.endswith("\ufffd"):
            click.echo(whole[printed:], nl=False)
            printed = len(whole)
    click.echo(tokenizer.decode(answer)[printed:])
