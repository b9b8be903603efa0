"""One caption for one image: lines, wildcards, tags, dropout, templates and the expansion of the token.

Pure functions on strings and a ``random.Random``. Whatever the rules say, the token survives them: it is never
dropped, cut off by the warm-up or torn apart by a separator. Only the user's own choice among lines and ``{a|b}``
alternatives can leave it out; :func:`token_presence` tells beforehand whether that can happen.
"""

import itertools
import math
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from library.embedding.placeholder import Placeholder

# The published lists of the diffusers example `textual_inversion.py`; the object list is also the beginning of the
# paper's own. The style list holds "a close-up painting" twice, as published: it is drawn twice as often.
OBJECT_TEMPLATES: tuple[str, ...] = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
STYLE_TEMPLATES: tuple[str, ...] = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)

# `{{` and `}}` stand for the signs themselves; `{a|b}` is a choice. The content is possessive, so that an even run of
# closing braces is all literal: "{{{a|b}}}" is a "{" and a choice between "a" and "b}".
_WILDCARD = re.compile(r"\{\{|\}\}|\{((?:\}\}|[^}])++)\}")
_LITERAL_BRACES = re.compile(r"\{\{|\}\}")
_CLOSING_BRACE = re.compile(r"(?<!\})(?:\}\})*+\}")  # the last of an odd run
# While a caption is worked on, each name of the token is one character of this private-use plane, by its row.
_FIRST_MARK = 0x100000
_MARK = "[\U00100000-\U0010fffd]"
_MARKS = re.compile(f"{_MARK}+")
_SPACE_BETWEEN_MARKS = re.compile(rf"(?<={_MARK})\s+(?={_MARK})")
_MARK_BESIDE_LETTER = re.compile(rf"(?<=[A-Za-z0-9])(?={_MARK})|(?<={_MARK})(?=[A-Za-z0-9])")
# Of a caption with more variants than this, as many random ones are looked at instead of all; fewer where each of them
# is put together from very many pieces.
_VARIANT_LIMIT = 1000
_PIECE_LIMIT = 2_000_000


@dataclass(frozen=True)
class CaptionRules:
    """What happens to the captions of one subset. Field names are those of the dataset file without ``caption_``.

    ``warmup_step`` below 1 is a share of all training steps. Rates are probabilities in [0, 1]. ``rejoin`` is not set
    there: it cuts captions into tags and joins them again with all of them in their order.
    """

    prefix: str | None = None
    suffix: str | None = None
    separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    shuffle: bool = False
    wildcard: bool = False
    dropout_rate: float = 0.0
    dropout_every_n_epochs: int = 0
    tag_dropout_rate: float = 0.0
    warmup_min: int = 1
    warmup_step: float = 0
    rejoin: bool = False

    @property
    def rearranges(self) -> bool:
        """Whether captions are cut into tags and joined again."""
        return self.rejoin or self.shuffle or self.warmup_step > 0 or self.tag_dropout_rate > 0

    def rewritten(self, rewrite: Callable[[str], str]) -> "CaptionRules":
        """The same rules, ``rewrite`` applied to every text in them, so that they fit captions rewritten likewise."""
        names = ("prefix", "suffix", "separator", "keep_tokens_separator", "secondary_separator")
        given = {name: text for name in names if (text := getattr(self, name))}
        # A separator must not become empty.
        changed: dict[str, Any] = {name: rewrite(text) or text for name, text in given.items()}
        return replace(self, **changed)


def deterministic_rules(rules: CaptionRules) -> CaptionRules:
    """The same rules with nothing shuffled, dropped or held back; only lines and wildcards are still drawn.

    Tags are joined as in the training: where it leaves no separator, there is none.
    """
    deterministic = replace(
        rules, dropout_rate=0.0, dropout_every_n_epochs=0, tag_dropout_rate=0.0, rejoin=rules.rearranges
    )
    return replace(deterministic, shuffle=False, warmup_step=0)


@dataclass(frozen=True)
class CaptionMoment:
    """When a caption is drawn: optimizer steps done, steps of the whole run, and the epoch, counted from 1."""

    step: int = 0
    max_steps: int = 0
    epoch: int = 0


_START = CaptionMoment()


def process_caption(
    caption: str,
    rules: CaptionRules,
    placeholder: Placeholder,
    rng: random.Random,
    moment: CaptionMoment = _START,
    templates: Sequence[str] | None = None,
) -> str:
    """Return the text to tokenize for this draw of the image, with the token expanded to all its vectors.

    ``templates`` (with ``{}`` for the word) replace the caption altogether. A dropped caption keeps the word alone,
    or nothing if the word was not in it: a regularisation image must not become an image of the new concept.
    """
    dropped = _is_dropped(rules, rng, moment)
    if templates:
        return placeholder.expanded if dropped else rng.choice(templates).replace("{}", placeholder.expanded)
    text = _mark(_decorate(rng.choice(_candidate_lines(caption, rules)), rules), placeholder)
    if rules.wildcard:
        pieces = _choices(text)
        text = "".join(rng.choice(piece) if number % 2 else piece[0] for number, piece in enumerate(pieces))
    if dropped:
        return placeholder.expanded if placeholder.found_in(_unmark(text, placeholder)) else ""
    return _finish(_arrange_tags(text, rules, placeholder, rng, moment), rules, placeholder)


def token_presence(caption: str, rules: CaptionRules, placeholder: Placeholder) -> str:
    """Tell whether the token stands in "always" all, "sometimes" only some, or "never" any variant of a caption.

    Variants are the lines and ``{a|b}`` choices that ``rules.wildcard`` opens; the other rules spare the word. Of a
    caption with over 1000 variants a fixed random sample of at most 1000 is looked at. Templates are not considered.
    """
    present = set()
    for line in _candidate_lines(caption, rules):
        text = _mark(_decorate(line, rules), placeholder)
        for variant in _variants(text) if rules.wildcard else [text]:
            present.add(placeholder.found_in(_finish(variant, rules, placeholder)))
            if len(present) == 2:
                return "sometimes"
    return "always" if True in present else "never"


def _is_dropped(rules: CaptionRules, rng: random.Random, moment: CaptionMoment) -> bool:
    by_chance = rules.dropout_rate > 0 and rng.random() < rules.dropout_rate
    every = rules.dropout_every_n_epochs
    return by_chance or (every > 0 and moment.epoch % every == 0)


def _candidate_lines(caption: str, rules: CaptionRules) -> list[str]:
    """The lines one of which is the caption: the first that is not blank, or with wildcards all such lines."""
    lines = [line for line in caption.replace("\r\n", "\n").split("\n") if line.strip()]
    if not lines:
        return [""]
    return lines if rules.wildcard else lines[:1]


def _decorate(line: str, rules: CaptionRules) -> str:
    before = f"{rules.prefix} " if rules.prefix else ""
    after = f" {rules.suffix}" if rules.suffix else ""
    return before + line + after


def _mark(text: str, placeholder: Placeholder) -> str:
    """Put one private-use character for each name of the word, with no space inside a run of names.

    No separator, wildcard or tag rule can then tear the word, whatever signs it consists of.
    """
    pieces = placeholder.split(_MARKS.sub("", text))
    marked = "".join(piece if isinstance(piece, str) else chr(_FIRST_MARK + piece) for piece in pieces)
    return _SPACE_BETWEEN_MARKS.sub("", marked)


def _unmark(text: str, placeholder: Placeholder) -> str:
    """Put the names back, with a space where a letter or digit has come to stand beside them."""

    def names(match: re.Match[str]) -> str:
        return " ".join(placeholder.names[ord(mark) - _FIRST_MARK] for mark in match[0])

    return _MARKS.sub(names, _MARK_BESIDE_LETTER.sub(" ", text))


def _finish(text: str, rules: CaptionRules, placeholder: Placeholder) -> str:
    """Resolve the secondary separator, put the names back and expand the word."""
    if rules.secondary_separator:
        text = text.replace(rules.secondary_separator, rules.separator)
    return placeholder.expand(_unmark(text, placeholder))


def _choices(text: str) -> list[list[str]]:
    """The text in pieces: one string at even places, what may stand there at odd ones."""
    choices, end = [], 0
    for match in _wildcards(text):
        choices += [[text[end : match.start()]], _alternatives(match)]
        end = match.end()
    return [*choices, [text[end:]]]


def _wildcards(text: str) -> Iterator[re.Match[str]]:
    """The matches of ``_WILDCARD``, in a time that grows with the text and not with its square.

    Behind the last brace that closes, each opening one would be followed to the end of the text in vain.
    """
    closed = max((match.end() for match in _CLOSING_BRACE.finditer(text)), default=0)
    yield from _WILDCARD.finditer(text, 0, closed)
    yield from _LITERAL_BRACES.finditer(text, closed)


def _alternatives(match: re.Match[str]) -> list[str]:
    """What a match of ``_WILDCARD`` can become."""
    if match.lastindex is None:
        return [match[0][0]]
    return match[1].replace("{{", "{").replace("}}", "}").split("|")


def _variants(text: str) -> Iterator[str]:
    """All texts that the choices in ``text`` can lead to, or a random sample of very many."""
    choices = _choices(text)
    counts = itertools.accumulate(map(len, choices), operator.mul)
    if all(count <= _VARIANT_LIMIT for count in counts):
        yield from map("".join, itertools.product(*choices))
        return
    rng = random.Random(0)
    for _ in range(min(_VARIANT_LIMIT, 1 + _PIECE_LIMIT // len(choices))):
        yield "".join(map(rng.choice, choices))


def _arrange_tags(
    text: str, rules: CaptionRules, placeholder: Placeholder, rng: random.Random, moment: CaptionMoment
) -> str:
    """Warm up, shuffle and drop tags; where nothing rearranges them the text stays as it is, spaces included."""
    if not rules.rearranges:
        return text
    fixed, flexible, final = _split_tags(text, rules)

    def holds_word(tag: str) -> bool:
        return placeholder.found_in(_unmark(tag, placeholder))

    warmup = _warmup_steps(rules, moment)
    if moment.step < warmup:
        minimum = rules.warmup_min
        count = math.floor(moment.step * (len(flexible) - minimum) / warmup) + minimum
        flexible = [tag for i, tag in enumerate(flexible) if i < count or holds_word(tag)]
    if rules.shuffle:
        rng.shuffle(flexible)
    if rules.tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= rules.tag_dropout_rate or holds_word(tag)]
    return f"{rules.separator} ".join(fixed + flexible + final)


def _warmup_steps(rules: CaptionRules, moment: CaptionMoment) -> float:
    if rules.warmup_step < 1:
        return math.floor(rules.warmup_step * moment.max_steps)
    return rules.warmup_step


def _split_tags(text: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """Return the tags that stay in front, those that may move, and those that stay at the end."""
    keep = rules.keep_tokens_separator
    if keep and keep in text:
        parts = [*text.split(keep, 2), ""][:3]
        fixed, flexible, final = ([tag.strip() for tag in part.split(rules.separator)] for part in parts)
        return [t for t in fixed if t], [t for t in flexible if t], [t for t in final if t]
    tags = [tag.strip() for tag in text.strip().split(rules.separator)]
    return tags[: rules.keep_tokens], tags[rules.keep_tokens :], []
