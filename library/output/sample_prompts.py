"""The file of ``--sample_prompts``: what to draw during training, as lines of text, as TOML or as JSON."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.output.samplers import check_sampler
from library.support.errors import NAMES_SHOWN, UserError, closest, counted
from library.support.text_files import check_lines, parse_json, parse_toml, read_text

logger = logging.getLogger(__name__)

_SIZE_STEP, _LEAST_SIZE, _MOST_SIZE = 8, 64, 4096  # pixels
_MOST_STEPS = 1000
_SEEDS_END = 2**64  # torch's generators take no more

_Values = dict[str, Any]


@dataclass(frozen=True)
class SamplePrompt:
    """An image to draw: texts, size in pixels, number of steps, guidance scale (no guidance up to 1), and seed.

    Without a seed it is another image each time; without a sampler, ``--sample_sampler`` draws it. Where ``weighted``
    is False, brackets in the texts are just brackets. Inpainting models draw into ``image``, where ``mask_image`` (of
    the same size) is white; both are paths.
    """

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    steps: int = 30
    scale: float = 7.5
    seed: int | None = None
    sampler: str | None = None
    weighted: bool = True
    image: str | None = None
    mask_image: str | None = None


@dataclass(frozen=True)
class _Flag:
    """What may follow the text of a line: the key it stands for in a file, and how its value begins."""

    key: str
    pattern: str
    convert: Callable[[str], Any]
    wanted: str

    def read(self, text: str) -> tuple[Any, bool] | None:
        """The value that ``text`` begins with and whether that is all of it, or None if it begins with no value."""
        found = re.match(self.pattern, text)
        if found is None:
            return None
        try:
            value = self.convert(found[0])
        except ValueError:
            return None
        kept = min(max(value, 1), _MOST_STEPS) if self.key == "sample_steps" else value
        return kept, kept == value and not text[found.end() :].strip()


_FLAGS = {
    "w": _Flag("width", r"\d+", int, "a whole number"),
    "h": _Flag("height", r"\d+", int, "a whole number"),
    "d": _Flag("seed", r"\d+", int, "a whole number from 0 up"),
    "s": _Flag("sample_steps", r"\d+", int, "a whole number"),
    "l": _Flag("scale", r"[\d.]+", float, "a number from 0 up"),
    "n": _Flag("negative_prompt", r".+", str, "a text"),
    "ss": _Flag("sample_sampler", r".+", str, "the name of a sampler"),
    "i": _Flag("image", r".+", str.strip, "the path of an image"),
    "m": _Flag("mask_image", r".+", str.strip, "the path of a mask"),
}
_FLAGS["mk"] = _FLAGS["m"]  # sd-scripts' name, where it has masks
# Flags for models of other kinds, with their keys.
_IDLE = {
    "g": "guidance_scale",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
    "cn": "controlnet_image",
}
_FLAGS |= {name: _Flag(key, r".*", str, "a value") for name, key in _IDLE.items()}


def parse_prompt_lines(lines: Iterable[str]) -> list[_Values]:
    """The keys and values of each line: its text, and after it flags such as `` --w 512 --d 1``.

    Keys are those of TOML and JSON files. Between a flag and its value is one space; the text itself is never a flag.
    Warnings tell of flags that are unknown or cannot be read, which are left out, and of numbers with more behind
    them, where only the number counts. The number of steps is brought between 1 and 1000.
    """
    parsed = [_parsed_line(line) for line in lines]
    _tell([problem for _, problems in parsed for problem in problems])
    return [values for values, _ in parsed]


def _tell(problems: Sequence[str]) -> None:
    """Warn of the first few, and of how many there are besides."""
    for problem in problems[:NAMES_SHOWN]:
        logger.warning("%s", problem)
    if (more := len(problems) - NAMES_SHOWN) > 0:
        logger.warning("%s of sample prompts %s wrong too.", counted(more, "more flag"), "is" if more == 1 else "are")


def _parsed_line(line: str) -> tuple[_Values, list[str]]:
    """The keys and values of a line, and what is wrong with its flags."""
    prompt, *flags = line.split(" --")
    values: _Values = {"prompt": prompt}
    problems = []
    for written in flags:
        name, _, value = written.partition(" ")
        flag = _FLAGS.get(name.lower())
        if flag is None:
            problems.append(
                f'The sample prompt "{prompt}" is followed by "--{written}", which is no flag and is left out. Flags '
                f"are {', '.join(f'--{known}' for known in _FLAGS)}, each with one space and a value behind it."
            )
        elif (read := flag.read(value)) is None:
            problems.append(
                f'The flag "--{written}" of the sample prompt "{prompt}" is left out: it needs one space and '
                f"{flag.wanted}."
            )
        else:
            values[flag.key], complete = read
            if not complete:
                problems.append(f'The flag "--{written}" of the sample prompt "{prompt}" is read as {read[0]}.')
    return values, problems


def read_sample_prompts(path: str | Path) -> list[SamplePrompt]:
    """The prompts in a ``.txt``, ``.toml`` or ``.json`` file, in order.

    A text file holds lines as :func:`parse_prompt_lines` reads them, without blank ones and those that begin with #.
    A TOML file holds a table ``[prompt]``, and for several prompts tables ``[[prompt.subset]]`` that add to it or
    override it. A JSON file holds a list of objects, or of such lines. Sizes are rounded down to a multiple of 8, and
    are at least 64.

    Raises UserError, naming the file, if it cannot be read or holds no prompt, and for values of a wrong type and
    sizes above 4096 pixels.
    """
    path = Path(path)
    file = f'The file "{path}" of --sample_prompts'
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        raise UserError(f"{file} must be a .txt, .toml or .json file, and its name must say so. Rename it.")
    entries = parse(read_text(path, file), file)
    if not entries:
        raise UserError(f"{file} holds no prompt. Write one, for example a line of text in a .txt file.")
    _tell_what_has_no_effect(entries, file)
    return [_sample_prompt(values, f'Prompt {number} in "{path}"') for number, values in enumerate(entries, start=1)]


def _parse_text(text: str, file: str) -> list[_Values]:
    lines = [line.strip() for line in text.split("\n") if not line.startswith("#")]
    return parse_prompt_lines(line for line in lines if line)


def _parse_toml(text: str, file: str) -> list[_Values]:
    content = parse_toml(text, file)
    common = content.pop("prompt", {})
    if content:
        logger.warning("%s: only the table [prompt] is read, and not %s.", file, ", ".join(content))
    subsets = common.pop("subset", [{}] if common else []) if isinstance(common, dict) else None
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise UserError(
            f"{file} must hold one table [prompt] with what the prompts have in common, and for each of them a table "
            '[[prompt.subset]] with prompt = "…".'
        )
    return [common | subset for subset in subsets]


def _parse_json(text: str, file: str) -> list[_Values]:
    entries = parse_json(text, file)
    if not isinstance(entries, list) or not all(isinstance(entry, dict | str) for entry in entries):
        raise UserError(f'{file} must hold a list of objects such as {{"prompt": "…", "seed": 1}}, or of texts.')
    lines = iter(parse_prompt_lines(entry for entry in entries if isinstance(entry, str)))
    return [
        next(lines) if isinstance(entry, str) else {key: value for key, value in entry.items() if value is not None}
        for entry in entries
    ]


_PARSERS = {".txt": _parse_text, ".toml": _parse_toml, ".json": _parse_json}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


# The keys with an effect, and what their values must be.
_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_is_text, "a string in quotes"),
    "negative_prompt": (_is_text, "a string in quotes"),
    "width": (_is_whole, "a whole number of pixels, such as 512"),
    "height": (_is_whole, "a whole number of pixels, such as 512"),
    "sample_steps": (lambda value: _is_whole(value) and 1 <= value <= _MOST_STEPS, "a whole number from 1 to 1000"),
    "scale": (_is_number, "a number, such as 7.5"),
    "seed": (_is_number, "a whole number from 0 up"),
    "sample_sampler": (_is_text, 'the name of a sampler in quotes, such as "ddim"'),
    "image": (_is_text, "the path of an image in quotes"),
    "mask_image": (_is_text, "the path of a mask in quotes"),
}


def _tell_what_has_no_effect(entries: list[_Values], file: str) -> None:
    keys = dict.fromkeys(key for values in entries for key in values)
    idle = [f"{key} (--{name})" for name, key in _IDLE.items() if key in keys]
    if idle:
        logger.warning("%s: these have no effect on models of this kind: %s.", file, ", ".join(idle))
    guesses = {key: closest(key, _KEYS) for key in keys if key not in _KEYS and key not in _IDLE.values()}
    if guesses:
        named = (f'{key} (did you mean "{guess}"?)' if guess else key for key, guess in guesses.items())
        logger.warning("%s: unknown keys, which change nothing: %s.", file, ", ".join(named))


def _sample_prompt(values: _Values, place: str) -> SamplePrompt:
    if "prompt" not in values:
        raise UserError(f'{place} has no text. Give it prompt = "…" in TOML, or "prompt": "…" in JSON.')
    for key, (accepts, wanted) in _KEYS.items():
        if key in values and not accepts(values[key]):
            raise UserError(f"{place}: {key} must be {wanted}, not {values[key]!r:.80}.")
    for key in ("prompt", "negative_prompt"):
        check_lines(values.get(key, ""), f"{place}: {key}")
    return SamplePrompt(
        prompt=values["prompt"],
        negative_prompt=values.get("negative_prompt", SamplePrompt.negative_prompt),
        width=_usable_size(values, "width", place),
        height=_usable_size(values, "height", place),
        steps=values.get("sample_steps", SamplePrompt.steps),
        scale=values.get("scale", SamplePrompt.scale),
        seed=_usable_seed(values, place),
        sampler=_known_sampler(values, place),
        image=values.get("image") or None,
        mask_image=values.get("mask_image") or None,
    )


def _usable_size(values: _Values, key: str, place: str) -> int:
    side: int = values.get(key, getattr(SamplePrompt, key))
    if side > _MOST_SIZE:
        raise UserError(f"{place}: {key} (--{key[0]}) {side} is too large; the most is {_MOST_SIZE} pixels.")
    return max(side - side % _SIZE_STEP, _LEAST_SIZE)


def _usable_seed(values: _Values, place: str) -> int | None:
    seed = values.get("seed")
    if seed is None or (_is_whole(seed) and 0 <= seed < _SEEDS_END):
        return seed
    logger.warning(
        '%s, "%s": the seed (--d) %s is not used, and each image begins with other noise. A seed is a whole number '
        "from 0 up.",
        place,
        values["prompt"],
        seed,
    )
    return None


def _known_sampler(values: _Values, place: str) -> str | None:
    sampler: str = values.get("sample_sampler", "").strip()
    if not sampler:
        return None
    try:
        check_sampler(sampler)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return sampler
