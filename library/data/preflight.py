"""What can be told about the data before any model is loaded: a report, warnings, and the errors that end a run.

A run that cannot teach the word anything (no caption holds it, or the length limit cuts it off everywhere) must not
start; whatever else looks like a mistake is a warning with a count and the first file names.
"""

# Paths are plain strings here: of very many, Path objects take several times the room and time.
# ruff: noqa: PTH116, PTH123

import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from library.data.captions import CaptionRules, deterministic_rules, process_caption
from library.data.found_images import is_plain, no_word, presence
from library.data.image_table import ImageTable
from library.embedding.placeholder import Placeholder
from library.embedding.tokenizer import PromptTokenizer
from library.support.errors import NAMES_SHOWN, UserError, counted, first_names

_SHOWN_BUCKETS = 12
# Enlarging an image beyond this makes a blur that the word would learn as well.
_BLURRING_SCALE = 2.0
_LEAST_KEPT = 0.5  # of an image's area


@dataclass
class Report:
    """``lines`` say what there is, ``warnings`` what looks wrong; each warning is a paragraph of full sentences."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The lines as one text."""
        return "\n".join(self.lines)


def check(
    table: ImageTable,
    prompts: PromptTokenizer,
    *,
    validation: ImageTable | None = None,
    templates: Sequence[str] | None = None,
) -> Report:
    """Look through everything that was found. Raises UserError where training would be pointless."""
    report = Report(_contents(table, validation))
    if templates:
        _check_templates(prompts, templates, report)
    else:
        _check_presence(table, prompts.placeholder, report)
        _check_lengths(table, prompts, report)
        _warn_of_missing_captions(table, report)
    _warn_of_small_images(table, report)
    _warn_of_cropping(table, report)
    _warn_of_duplicates(table, report)
    return report


def _are(count: int, noun: str) -> str:
    return f"{counted(count, noun)} {'is' if count == 1 else 'are'}"


def _contents(table: ImageTable, validation: ImageTable | None) -> list[str]:
    buckets = table.in_buckets()
    samples, batches = sum(each.samples for each in buckets), sum(each.batches for each in buckets)
    lines = [
        f"Training data: {counted(len(table), 'image')}, {counted(samples, 'sample')} in "
        f"{batches:,} batch{'es' if batches > 1 else ''} an epoch."
    ]
    for number in range(len(table.configs)):
        lines += _dataset_contents(table, number)
    if validation is not None:
        lines.append(f"  {counted(len(validation), 'image')} held out for validation")
    return lines


def _dataset_contents(table: ImageTable, number: int) -> list[str]:
    """One dataset's settings, its subsets and its first buckets."""
    config = table.configs[number]
    width, height = config.buckets.resolution
    buckets = "buckets" if config.buckets.enabled else "no buckets"
    lines = [f"  dataset {number + 1}: {width}x{height}, batch size {config.batch_size}, {buckets}"]
    for part in table.subsets():
        if part.dataset == number:
            kind = " (regularisation)" if part.found.subset.is_reg else ""
            lines.append(f"    {_amount(len(part.drawn), part.samples)}: {part.found.subset.source}{kind}")
    filled = [each for each in table.in_buckets() if each.bucket.dataset == number]
    for each in filled[:_SHOWN_BUCKETS]:
        size = "x".join(map(str, each.bucket.size))
        lines.append(f"    bucket {size:>9}: {_amount(each.images, each.samples)}")
    if len(filled) > _SHOWN_BUCKETS:
        lines.append(f"    … and {len(filled) - _SHOWN_BUCKETS} more buckets")
    return lines


def _amount(pictures: int, samples: int) -> str:
    return f"{counted(pictures, 'image')}, {counted(samples, 'sample')}"


def _check_templates(prompts: PromptTokenizer, templates: Sequence[str], report: Report) -> None:
    word = prompts.placeholder
    texts = [template.replace("{}", word.expanded) for template in templates]
    kept = set().union(*(_rows_in(text, word) - prompts.lost_rows(text) for text in texts))
    _require_rows(kept, prompts)
    report.lines.append(f"  captions are not used: {len(templates)} templates stand in for them")


def _check_presence(table: ImageTable, word: Placeholder, report: Report) -> None:
    """Count the captions without the token; regularisation images are expected to lack it."""
    lacking, partly, regular, held = [], [], 0, 0
    for drawn in (part.drawn for part in table.subsets()):
        answers = [presence(caption, drawn.subset.captions, word) for caption in drawn.captions]
        if drawn.subset.is_reg:
            regular += len(drawn)
            held += sum(answer != "never" for answer in answers)
            continue
        lacking += [path for path, answer in zip(drawn.paths, answers, strict=True) if answer == "never"]
        partly += [path for path, answer in zip(drawn.paths, answers, strict=True) if answer == "sometimes"]
    total = len(table) - regular
    if len(lacking) == total:
        raise no_word(word, lacking)
    if lacking:
        report.warnings.append(
            f"{len(lacking)} of {counted(total, 'caption')} {'lacks' if len(lacking) == 1 else 'lack'} the token "
            f'"{word.text}"; an image without it teaches it nothing: {first_names(lacking)}.'
        )
    if partly:
        report.warnings.append(
            f'{counted(len(partly), "caption")} with the token "{word.text}" only in some lines or {{a|b}} choices; '
            f"where it is not drawn, the image teaches nothing: {first_names(partly)}."
        )
    if regular:
        report.lines.append(
            f"  {counted(regular - held, 'regularisation image')} without the token, as it should be: they cannot "
            "move its vectors"
        )
    if held:
        report.warnings.append(
            f'{held} of {regular} regularisation captions hold the token "{word.text}", so these images teach it as '
            "well. Usually regularisation images show the class without the concept."
        )


def _check_lengths(table: ImageTable, prompts: PromptTokenizer, report: Report) -> None:
    """Find captions that the length limit cuts, and vectors of the word that stand only in what is cut off."""
    word, measure = prompts.placeholder, _Measure(prompts)
    kept: set[int] = set()
    cut, losing, straying = [], [], []
    for path, caption, rules in _captions(table):
        if len(kept) == word.count and measure.surely_fits(caption, rules):
            continue
        text = _finished(caption, deterministic_rules(rules), word)
        too_long = measure(text) > prompts.capacity
        lost = _lost_rows(text, prompts, measure) if too_long else set()
        if too_long:
            cut.append(path)
        if lost:
            losing.append(path)
        elif too_long and _may_stray(caption, rules, word):
            straying.append(path)
        if len(kept) < word.count:
            kept |= _rows_in(text, word) - lost
    _require_rows(kept, prompts)
    if losing:
        report.warnings.append(
            f'{_are(len(losing), "caption")} so long that vectors of the token "{word.text}" are cut off: '
            f"{first_names(losing)}. Move the token to the front{_longer(prompts)}."
        )
    if straying:
        report.warnings.append(
            f"{_are(len(straying), 'caption')} longer than {prompts.capacity} tokens and shuffled, so the placeholder "
            f'"{word.text}" can end up in what is cut off: {first_names(straying)}. Put it first and set '
            f"keep_tokens = 1{_longer(prompts)}."
        )
    if len(cut) > len(losing):
        report.warnings.append(
            f"{_are(len(cut), 'caption')} longer than {prompts.capacity} tokens; the rest is ignored: "
            f"{first_names(cut)}. Shorten {'it' if len(cut) == 1 else 'them'}{_longer(prompts)}."
        )


def _longer(prompts: PromptTokenizer) -> str:
    return ", or allow longer ones with --max_token_length" if prompts.capacity < 225 else ""


def _captions(table: ImageTable) -> Iterator[tuple[str, str, CaptionRules]]:
    """(path, caption, rules) of every image but the regularisation ones."""
    for drawn in (part.drawn for part in table.subsets()):
        if not drawn.subset.is_reg:
            for path, caption in zip(drawn.paths, drawn.captions, strict=True):
                yield path, caption, drawn.subset.captions


def _finished(caption: str, rules: CaptionRules, word: Placeholder) -> str:
    """One draw of a caption, expanded."""
    if is_plain(caption, rules):  # the common case, tenfold as fast
        return word.expand(caption)
    return process_caption(caption, rules, word, random.Random(0))


def _may_stray(caption: str, rules: CaptionRules, word: Placeholder) -> bool:
    """Whether shuffling can move the word: it stands in a caption, but not among the tags that are kept in front."""
    if not rules.shuffle:
        return False
    text = _with_affixes(caption, rules)
    if rules.keep_tokens_separator and rules.keep_tokens_separator in text:
        fixed = text.split(rules.keep_tokens_separator, 1)[0]
    else:
        fixed = rules.separator.join(text.split(rules.separator)[: rules.keep_tokens])
    return word.found_in(text) and not word.found_in(fixed)


def _with_affixes(caption: str, rules: CaptionRules) -> str:
    return " ".join(filter(None, (rules.prefix, caption, rules.suffix)))


class _Measure:
    """Counts the tokens of texts: words between spaces are tokenized once each and added up."""

    def __init__(self, prompts: PromptTokenizer) -> None:
        self._prompts = prompts
        self._of_word: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """The number of body tokens of an expanded text."""
        return sum(self._length(word) for word in text.split())

    def surely_fits(self, caption: str, rules: CaptionRules) -> bool:
        """Whether no draw of ``caption`` can be too long. False may also mean that it was not worth a closer look."""
        word = self._prompts.placeholder
        text = _with_affixes(caption, rules)
        room = self._prompts.capacity - text.lower().count(word.text.lower()) * (word.count - 1)
        # A token is at least one byte long, so words that were never tokenized need not be for most captions.
        if len(text.encode()) <= room or sum(map(self._at_most, text.split())) <= room:
            return True
        return self(text) <= room

    def _at_most(self, word: str) -> int:
        return self._of_word.get(word) or len(word.encode())

    def _length(self, word: str) -> int:
        length = self._of_word.get(word)
        if length is None:
            length = self._of_word[word] = len(self._prompts.body_ids(word))
        return length


def _lost_rows(text: str, prompts: PromptTokenizer, measure: _Measure) -> set[int]:
    """Vectors that stand in an expanded text only behind the limit."""
    expanded = prompts.placeholder.expanded
    start = text.lower().find(expanded.lower())
    if start >= 0 and measure(text[: start + len(expanded)]) <= prompts.capacity:
        return set()
    return prompts.lost_rows(text)


def _rows_in(text: str, word: Placeholder) -> set[int]:
    """The vectors that stand in an expanded text."""
    return {piece for piece in word.split(text) if isinstance(piece, int)}


def _require_rows(kept: set[int], prompts: PromptTokenizer) -> None:
    word, capacity = prompts.placeholder, prompts.capacity
    if word.count > capacity:
        raise UserError(
            f"--num_vectors_per_token={word.count} does not fit: a caption has room for {capacity} tokens. Use fewer "
            f"vectors (2 to 4 are common){_longer(prompts)}."
        )
    if missing := [name for row, name in enumerate(word.names) if row not in kept]:
        raise UserError(
            "Every caption cuts off or lacks these vectors of the token, so they could never learn: "
            f"{first_names(missing)}. Only {capacity} tokens of a caption are read. "
            f'Move "{word.text}" to the front of the captions'
            f"{_longer(prompts)}."
        )


def _warn_of_missing_captions(table: ImageTable, report: Report) -> None:
    missing = [path for found in table.sets for path in found.uncaptioned]
    if missing:
        report.warnings.append(
            f"{counted(len(missing), 'image')} without a caption, neither in a file of the same name nor as "
            f"class_tokens: {first_names(missing)}."
        )


def _warn_of_small_images(table: ImageTable, report: Report) -> None:
    """Name images that are enlarged a lot, or at all where ``bucket_no_upscale`` promises otherwise."""
    scale = (table.resized() / table.image_sizes()).max(axis=1)
    own_size = np.array([config.buckets.enabled and config.buckets.no_upscale for config in table.configs])
    own_size = own_size[table.dataset_numbers()]
    tiny = np.flatnonzero(own_size & (scale > 1.01))
    if len(tiny):
        report.warnings.append(
            f"{_are(len(tiny), 'image')} smaller than one bucket step and enlarged in spite of "
            f"bucket_no_upscale: {first_names([table[index].path for index in tiny[: NAMES_SHOWN + 1]])}."
        )
    small = np.flatnonzero(~own_size & (scale >= _BLURRING_SCALE))
    if len(small):
        names = [f"{table[index].path} ({_times(scale[index])})" for index in small[: NAMES_SHOWN + 1]]
        report.warnings.append(
            f"{_are(len(small), 'image')} much smaller than what the model sees and enlarged, so the "
            f"token learns the blur too: {first_names(names)}. Use larger images, a lower resolution or "
            "bucket_no_upscale."
        )


def _warn_of_cropping(table: ImageTable, report: Report) -> None:
    """Name images of which less than half is seen."""
    kept = (table.bucket_sizes() / table.resized()).prod(axis=1)
    cropped = np.flatnonzero(kept < _LEAST_KEPT)
    if len(cropped):
        names = [f"{table[index].path} ({kept[index]:.0%} is seen)" for index in cropped[: NAMES_SHOWN + 1]]
        report.warnings.append(
            f"{counted(len(cropped), 'image')} will lose over half {'its' if len(cropped) == 1 else 'their'} area to "
            f"cropping, because no bucket fits the aspect ratio: {first_names(names)}. Crop by hand, or set "
            "enable_bucket = true and a larger max_bucket_reso."
        )


def _times(scale: float) -> str:
    return f"{scale:.1f} times"


def _warn_of_duplicates(table: ImageTable, report: Report) -> None:
    """Name images of one dataset that look like the same file: equal in size and in samples of their bytes."""
    by_size: dict[tuple[int, int], set[str]] = defaultdict(set)
    for part in table.subsets():
        for path in part.drawn.paths:
            by_size[part.dataset, os.stat(path).st_size].add(path)
    pairs = []
    for (_, size), paths in by_size.items():
        seen: dict[bytes, str] = {}
        for path in sorted(paths) if len(paths) > 1 else ():
            if (other := seen.setdefault(_sampled_bytes(path, size), path)) != path:
                pairs.append(f"{path} = {other}")
    if pairs:
        report.warnings.append(
            f"{counted(len(pairs), 'image')} {'appears' if len(pairs) == 1 else 'appear'} to be copied from others in "
            f"the same dataset; each copy is trained on: {first_names(sorted(pairs))}."
        )


def _sampled_bytes(path: str, size: int) -> bytes:
    """Four kilobytes spread over a file: enough to tell images of equal length apart."""
    with open(path, "rb", buffering=0) as file:
        samples = []
        for part in range(4):
            file.seek(part * max(size - 1024, 0) // 3)
            samples.append(file.read(1024))
        return b"".join(samples)
