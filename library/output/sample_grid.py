"""The sample images of a run in one image: a row for each time they were drawn, a column for each prompt."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from library.output.metrics_file import Line, moment, sample_files, spread
from library.output.thumbnails import small_image
from library.support.atomic_files import write_png

GRID_ENDING, PREVIEW_ENDING = "_grid.png", ".preview.png"
_RUN = "run"  # the note in a file that says whose it is
_TILE = 256  # pixels of the longer side at most; small images keep their size
_LABEL_SIZE = 16
_LINE = 20
_PROMPT_LINES = 3
_GAP = 6
_NARROWEST = 128  # of a column


def sample_grid(folder: Path, lines: Sequence[Line], prompts: Sequence[str]) -> Image.Image | None:
    """The grid of the images in ``folder`` that the ``lines`` of a run's metrics name; None while there are none.

    ``prompts`` are the texts by number. Of many rows some are shown, from all over the run. A file that is gone leaves
    its place empty.
    """
    drawn = sample_files(lines)
    steps = spread(list(drawn))
    columns = sorted({number for names in drawn.values() for number in names if number < len(prompts)})
    tiles = {
        (step, number): tile
        for step in steps
        for number in columns
        if (name := drawn[step].get(number)) and (tile := small_image(folder / name, _TILE))
    }
    if not tiles:
        return None
    return _drawn(tiles, steps, {number: prompts[number] for number in columns})


def write_for_run(path: Path, image: Image.Image, run: str) -> None:
    """Write a PNG file that says which run it is of; one of another run is kept under a number. Raises UserError."""
    notes = PngInfo()
    notes.add_text(_RUN, run)
    write_png(path, image, notes, keep_old=path.exists() and run_of_image(path) != run)


def run_of_image(path: Path) -> str | None:
    """The run that a file of :func:`write_for_run` is of; None where it does not say so, or is not there."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return str(image.info[_RUN]) if _RUN in image.info else None
    except OSError:
        return None


def _drawn(
    tiles: Mapping[tuple[int, int], Image.Image], steps: Sequence[int], prompts: Mapping[int, str]
) -> Image.Image:
    font = ImageFont.load_default(_LABEL_SIZE)
    width = max(_NARROWEST, *(tile.width for tile in tiles.values()))
    height = max(tile.height for tile in tiles.values())
    headings = [_heading(prompt, font, width) for prompt in prompts.values()]
    left = 3 * _GAP + max(round(font.getlength(moment(step))) for step in steps)
    top = 2 * _GAP + _LINE * max(map(len, headings))
    grid = Image.new("RGB", (left + len(prompts) * (width + _GAP), top + len(steps) * (height + _GAP)), "white")
    draw = ImageDraw.Draw(grid)
    for row, step in enumerate(steps):
        upper = top + row * (height + _GAP)
        draw.text((_GAP, upper + (height - _LINE) // 2), moment(step), fill="black", font=font)
    for column, (number, heading) in enumerate(zip(prompts, headings, strict=True)):
        over = left + column * (width + _GAP)
        draw.multiline_text((over, _GAP), "\n".join(heading), fill="black", font=font, spacing=_LINE - _LABEL_SIZE)
        for row, step in enumerate(steps):
            if tile := tiles.get((step, number)):
                upper = top + row * (height + _GAP)
                grid.paste(tile, (over + (width - tile.width) // 2, upper + (height - tile.height) // 2))
    return grid


def _heading(prompt: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """As much of a prompt as fits above its column."""
    letters = max(8, int(width * len(prompt) / max(1, font.getlength(prompt))))
    return textwrap.wrap(prompt, letters, max_lines=_PROMPT_LINES, placeholder=" …")
