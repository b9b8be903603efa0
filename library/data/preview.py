"""``--debug_dataset``: what the model will see of the data, as a table and as a contact sheet, without loading it."""

import itertools
import math
import textwrap
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from library.data.batch_order import BatchSampler
from library.data.batches import Batch, Sample
from library.data.captions import CaptionMoment
from library.data.image_entry import ImageEntry
from library.data.image_table import ImageTable
from library.data.images import read_image
from library.data.samples import SampleSource
from library.data.training_data import TrainingData
from library.embedding.tokenizer import PromptTokenizer

_SHOWN = 30  # images in the table and on the sheet
_SHOWN_BATCHES = 3  # of a dataset class of the user's own
_COLUMNS = 6
_TILE = 320  # pixels of the sheet for one image, along each side
_GAP = 8  # pixels around it
_CELL = _TILE + 2 * _GAP
_TEXT_SIZE, _LINE = 15, 19  # pixels of the text below it
_MOST_LINES = 40
_GROUND, _DIMMED = (211, 211, 211), 0.7  # what is cropped away is mixed with the ground in this share
_VEIL = (255, 0, 0)  # over what a mask for inpainting hides
SHEET_NAME = "debug_dataset.png"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class _Drawn:
    index: int
    sample: Sample


def show_dataset(data: TrainingData, output_dir: str | None = None, max_steps: int = 0) -> Path | None:
    """Print buckets and samples; write the contact sheet into ``output_dir``, if given, and return its path.

    ``max_steps`` are those of the run, for a token warm-up that is a share of them.
    """
    source = data.source(max_steps)
    print(bucket_table(data.table))
    drawn = list(_first_draws(data, source))
    total = len(data.table)
    shown = f"the first {len(drawn)} of {total:,} images" if len(drawn) < total else f"all {total} images"
    print(f"\nSamples: {shown}, each as it is first drawn in epoch 1. Ids in [brackets] are new tokens.")
    for number, one in enumerate(drawn, start=1):
        print(f"\n{number:3}. {sample_text(data.table[one.index], data.prompts, one.sample)}")
    if output_dir is None:
        return None
    file = Path(output_dir) / SHEET_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(data.table, drawn).save(file)
    print(f"\nWhat the model sees of these images (what is cropped away is dimmed) is in {file}.")
    return file


def show_batches(batches: Iterable[Batch], prompts: PromptTokenizer) -> None:
    """Print the samples of the first batches that a dataset of the user's own gives."""
    for number, batch in enumerate(itertools.islice(batches, _SHOWN_BATCHES), start=1):
        kind, pictures = ("pixels", batch.images) if batch.latents is None else ("latents", batch.latents)
        shape = [] if pictures is None else list(pictures.shape)
        print(f"Batch {number}: {kind} {shape}, loss weights {batch.loss_weights.tolist()}")
        for row, key in enumerate(batch.keys):
            print(f"  {key}: {batch.captions[row] or '(no caption given)'}")
            for encoder, ids in enumerate(batch.input_ids):
                print(f"    {_ids_text(prompts, encoder, ids[row])}")


def _first_draws(data: TrainingData, source: SampleSource) -> Iterator[_Drawn]:
    """The first draw of each image in epoch 1, in training order, as many as are shown."""
    seen: set[int] = set()
    for ref in BatchSampler(data.order):
        for offset, index in enumerate(ref.indices):
            if len(seen) < _SHOWN and index not in seen:
                seen.add(index)
                moment = CaptionMoment(ref.step, source.max_steps, ref.epoch)
                yield _Drawn(index, source.sample(index, moment, ref.position + offset))


def bucket_table(table: ImageTable) -> str:
    """All buckets with their numbers of images, samples and batches, one a line."""
    lines = [f"{'dataset':>7}  {'bucket':>11}  {'images':>8}  {'samples':>8}  {'batches':>8}"]
    for each in table.in_buckets():
        dataset, size = each.bucket.dataset + 1, "x".join(map(str, each.bucket.size))
        lines.append(f"{dataset:>7}  {size:>11}  {each.images:>8}  {each.samples:>8}  {each.batches:>8}")
    return "\n".join(lines)


def sample_text(entry: ImageEntry, prompts: PromptTokenizer, sample: Sample) -> str:
    """A paragraph on one sample: file, sizes and crop, caption, ids."""
    width, height = entry.image_size
    bucket = entry.bucket
    resized, cut = sample.cut.resized, sample.cut
    right, bottom = resized[0] - bucket[0] - cut.left, resized[1] - bucket[1] - cut.top
    crop = f"crop left {cut.left}, top {cut.top}, right {right}, bottom {bottom}" if resized != bucket else "no crop"
    notes = [", mirrored"] if sample.flipped else []
    notes += [", masked"] if sample.mask is not None else []
    notes += [f", {sample.hole.mean():.0%} hidden"] if sample.hole is not None else []
    notes += [f", loss weight {sample.loss_weight:g}"] if sample.loss_weight != 1 else []
    lines = [
        sample.key,
        f"{width}x{height}, resized to {resized[0]}x{resized[1]}, bucket {bucket[0]}x{bucket[1]}, {crop}"
        + "".join(notes),
        f"caption: {sample.caption}",
        *(_ids_text(prompts, number, ids) for number, ids in enumerate(sample.input_ids)),
    ]
    if not sample.has_token:
        lines.append("The token is not among them: this sample teaches it nothing.")
    return "\n".join(
        [
            lines[0],
            *(textwrap.fill(line, 112, initial_indent=" " * 5, subsequent_indent=" " * 10) for line in lines[1:]),
        ]
    )


def _ids_text(prompts: PromptTokenizer, number: int, ids: torch.Tensor) -> str:
    """The ids of one tokenizer up to the padding, new ones in brackets."""
    first_new = prompts.first_new_id(number)
    end, pad = prompts.tokenizers[number].eos_token_id, prompts.tokenizers[number].pad_token_id
    chunks = []
    for chunk in ids.tolist():
        while len(chunk) > 2 and chunk[-1] in (end, pad) and chunk[-2] in (end, pad):
            chunk.pop()
        chunks.append(" ".join(f"[{i}]" if i >= first_new else str(i) for i in chunk))
    name = f"ids {number + 1}" if len(prompts.tokenizers) > 1 else "ids"
    return f"{name}: " + " | ".join(chunks)


def contact_sheet(table: ImageTable, drawn: Sequence[_Drawn]) -> Image.Image:
    """The images side by side as the model sees them, dimmed where they are cropped away, with their captions.

    What a mask keeps out of the loss is darkened; what is hidden for inpainting lies under a red veil.
    """
    font = ImageFont.load_default(_TEXT_SIZE)
    labels = [_label(number, one.sample, font) for number, one in enumerate(drawn, start=1)]
    columns = min(_COLUMNS, len(drawn))
    rows = [range(first, min(first + columns, len(drawn))) for first in range(0, len(drawn), columns)]
    heights = [_TILE + 2 * _GAP + max(len(labels[number]) for number in row) * _LINE for row in rows]
    sheet = Image.new("RGB", (columns * _CELL, sum(heights)), _GROUND)
    draw = ImageDraw.Draw(sheet)
    for row, top in zip(rows, itertools.accumulate(heights, initial=0), strict=False):
        for column, number in enumerate(row):
            tile, left = _tile(table[drawn[number].index], drawn[number].sample), column * _CELL + _GAP
            sheet.paste(tile, (left + (_TILE - tile.width) // 2, top + _GAP + (_TILE - tile.height) // 2))
            for line, text in enumerate(labels[number]):
                draw.text((left, top + _GAP + _TILE + line * _LINE), text, fill="black", font=font)
    return sheet


def _tile(entry: ImageEntry, sample: Sample) -> Image.Image:
    """A whole image as large as a tile, and in it what the model sees."""
    seen, cut = _seen(sample), sample.cut
    whole, left = Image.fromarray(read_image(entry.path)), cut.left
    if sample.flipped:
        whole, left = ImageOps.mirror(whole), cut.resized[0] - seen.width - cut.left
    scale = _TILE / max(cut.resized)
    width, height = (max(1, round(side * scale)) for side in cut.resized)
    tile = whole.resize((width, height), Image.Resampling.LANCZOS)
    tile = Image.blend(tile, Image.new("RGB", tile.size, _GROUND), _DIMMED)
    edges = (left, cut.top, left + seen.width, cut.top + seen.height)
    box = [min(round(edge * scale), side) for edge, side in zip(edges, (width, height) * 2, strict=True)]
    size = (max(1, box[2] - box[0]), max(1, box[3] - box[1]))
    tile.paste(seen.resize(size, Image.Resampling.LANCZOS), (box[0], box[1]))
    return tile


def _seen(sample: Sample) -> Image.Image:
    if sample.image is None:
        raise ValueError("a sample of latents cannot be seen")
    pixels = sample.image.permute(1, 2, 0).float()
    if sample.mask is not None:
        pixels = pixels * (0.25 + 0.75 * sample.mask.unsqueeze(-1))
    if sample.hole is not None:
        pixels = pixels.lerp(torch.tensor(_VEIL, dtype=torch.float32), 0.5 * sample.hole.unsqueeze(-1))
    return Image.fromarray(pixels.round().clamp(0, 255).byte().numpy())


def _label(number: int, sample: Sample, font: Font) -> list[str]:
    """The lines below an image: its file's name, and its caption."""
    lines = [*_wrapped(f"{number}. {Path(sample.key).name}", font), *_wrapped(sample.caption, font)]
    return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "…"]


def _wrapped(text: str, font: Font) -> list[str]:
    """A text in lines that are no wider than a tile; words that are wider are cut."""
    lines = [""]
    for word in itertools.chain.from_iterable(_pieces(whole, font) for whole in text.split()):
        joined = f"{lines[-1]} {word}".lstrip()
        if font.getlength(joined) <= _TILE:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def _pieces(word: str, font: Font) -> Iterator[str]:
    while font.getlength(word) > _TILE:
        fitting = bisect_right(range(1, len(word)), _TILE, key=lambda end: math.ceil(font.getlength(word[:end])))
        yield word[:fitting]
        word = word[fitting:]
    yield word
