"""`k26 media`: show what the model sees of an image or a video."""

from __future__ import annotations

from pathlib import Path

import click

from k26_plugins.cli.command import PATH, Argument, Command
from k26_plugins.cli.console import fail, out
from k26_plugins.cli.reports import require_writable


@click.command(cls=Command)
@click.argument("file", cls=Argument, type=PATH, metavar="FILE", about="An image or a video.")
@click.option("--sheet", type=PATH, help="Where the picture goes. [default: FILE-k26.png, here]")
@click.option("--checkpoint", type=PATH, help="Take its preprocessor_config.json. [default: the published settings]")
def media(file: Path, sheet: Path | None, checkpoint: Path | None) -> None:
    """Show what the model sees of an image or a video: frames, grid of patches, tokens, and a picture of the frames.

    The picture shows the frames as the model gets them, padding included, shrunk to 320 pixels.
    """
    from rich.table import Table

    from k26_plugins.common.multimodal.contact_sheet import Frame, contact_sheet, thumbnail, unpatchify
    from k26_plugins.common.multimodal.image import MediaConfig, MediaError, open_image, preprocess
    from k26_plugins.common.multimodal.video import read_chunks

    target = sheet or Path(f"{file.stem}-k26.png")
    require_writable(target)
    table = Table("", "frames", "grid t × h × w", "tokens")
    frames: list[Frame] = []
    total = 0
    try:
        config = MediaConfig() if checkpoint is None else MediaConfig.from_path(checkpoint)
        data = file.read_bytes()
        try:
            patches, grids = preprocess([[open_image(data)]], config)
        except MediaError as not_an_image:
            try:
                for chunk in read_chunks(data, config):
                    _, grid_h, grid_w = chunk.grid_thw
                    table.add_row(
                        chunk.timestamp,
                        ", ".join(map(str, chunk.indices)),
                        f"{len(chunk.indices)} × {grid_h} × {grid_w}",
                        str(chunk.num_tokens),
                    )
                    total += chunk.num_tokens
                    for index, pixels in zip(chunk.indices, unpatchify(chunk.patches, chunk.grid_thw), strict=True):
                        frames.append(thumbnail(pixels, f"{chunk.timestamp}  #{index}"))
            except MediaError as not_a_video:
                fail(f"{file} as an image: {not_an_image} As a video: {not_a_video}")
        else:
            _, grid_h, grid_w = (int(size) for size in grids[0])
            total = grid_h * grid_w // config.merge_kernel_size**2
            table.add_row("image", "1", f"1 × {grid_h} × {grid_w}", str(total))
            frames.append(thumbnail(unpatchify(patches, (1, grid_h, grid_w))[0], file.name))
        contact_sheet(frames).save(target)
    except (MediaError, OSError) as error:
        fail(error)
    out().print(table)
    click.echo(f"{len(frames):,} frames, {total:,} tokens; picture: {target}")
