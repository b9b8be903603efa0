"""The images and captions of a run as they are on disk, found before anything heavy is imported.

Most mistakes in a dataset end a run here, at once. What is left needs a tokenizer or the model: see ``preflight``.
"""

import glob
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from library.data.caption_files import caption_extensions
from library.data.captions import CaptionRules, token_presence
from library.data.config import DatasetConfig, check_caching, load_dataset_configs
from library.data.image_sets import ImageSet, load_image_sets
from library.data.image_table import load_tables
from library.data.images import IMAGE_EXTENSIONS, UNREAD_EXTENSIONS
from library.data.latent_files import refuse_shared_names
from library.data.whole_images import check_whole
from library.embedding.placeholder import Placeholder
from library.embedding.text_repair import check_spelling, repaired_around
from library.model.architectures import BUCKET_STEPS, VOCABULARY
from library.options.console import silenced
from library.options.declaration import required
from library.options.options import Options
from library.support.errors import UserError, counted, first_names

_NOT_CAPTIONS = (".npz", ".json", ".safetensors")  # latents, metadata


@dataclass(frozen=True)
class FoundImages:
    """``sets`` holds the image sets of each dataset of ``configs``, in their order."""

    configs: tuple[DatasetConfig, ...]
    sets: tuple[list[ImageSet], ...]


def find_images(options: Options, family: str) -> FoundImages | None:
    """What the options name, or None for a dataset class of the user's own; ``family`` is "sd" or "sdxl".

    Raises UserError for whatever is missing or broken, and where no caption holds the token.
    """
    if options.dataset.dataset_class:
        return None
    configs = load_dataset_configs(options.dataset, bucket_step=BUCKET_STEPS[family])
    check_caching(configs, caching=options.cache.cache_latents)
    sets = tuple(map(load_image_sets, configs))
    _check_tables(configs, sets, to_disk=options.cache.cache_latents_to_disk)
    token = options.token
    word = Placeholder(required(token.token_string, "token_string"), token.num_vectors_per_token)
    check_spelling(word)
    if not (token.use_object_template or token.use_style_template):
        _require_word([found for those in sets for found in those], word)
    if not options.cache.skip_cache_check:
        check_whole(found for those in sets for found in those)
    return FoundImages(configs, sets)


def _check_tables(configs: tuple[DatasetConfig, ...], sets: tuple[list[ImageSet], ...], *, to_disk: bool) -> None:
    """Raise UserError where no table can be made of the images, or two would share a cache file on disk."""
    with silenced():  # what there is to say is said again when the seed is known, which decides what is held out
        tables = filter(None, load_tables(configs, 0, sets))
    if to_disk:
        refuse_shared_names(Path(path) for table in tables for part in table.subsets() for path in part.drawn.paths)


def _require_word(sets: Sequence[ImageSet], word: Placeholder) -> None:
    """Look for the first caption that can hold the token. Raises UserError where there is none."""
    taught = [found for found in sets if not found.subset.is_reg]
    if not taught or _is_known(word):  # both have their own words, later
        return
    for found in taught:
        rules = found.subset.captions.rewritten(lambda text: repaired_around(word, text))
        if any(presence(repaired_around(word, caption), rules, word) != "never" for caption in found.captions):
            return
    if not any(caption.strip() for found in taught for caption in found.captions):
        raise _no_caption(word, taught)
    captions = [caption for found in taught for caption in found.captions]
    raise no_word(word, [path for found in taught for path in found.paths], _spelling_advice(word, captions))


def _no_caption(word: Placeholder, sets: Sequence[ImageSet]) -> UserError:
    """The error for images without any caption; it names the files that were looked for."""
    subsets = [found.subset for found in sets if not found.subset.metadata_file]
    extensions = {end: None for one in subsets for end in caption_extensions(one.caption_extension, one.class_tokens)}
    paths = [path for found in sets for path in found.paths]
    files = f" a file of its name ending in {' or '.join(extensions)} beside it" if extensions else " a caption"
    return UserError(
        f"No image has a caption (looked at {_some(paths)}).{_unread_captions(paths, extensions)} Write for each"
        f'{files}, with the token "{word.text}" in it, or set caption_extension, or use --use_object_template or '
        "--use_style_template."
    )


def _unread_captions(paths: Sequence[str], extensions: Collection[str]) -> str:
    """What to set where files of another extension may be the captions; with the leading space, empty without any."""
    image = Path(paths[0])
    others = {*IMAGE_EXTENSIONS, *UNREAD_EXTENSIONS, *_NOT_CAPTIONS, *extensions}
    beside = sorted(path for path in image.parent.glob(f"{glob.escape(image.stem)}.*") if path.suffix not in others)
    if not beside:
        return ""
    return f' {beside[0]} is not read: for captions in such files set caption_extension = "{beside[0].suffix}".'


def _spelling_advice(word: Placeholder, captions: Iterable[str]) -> str:
    """What the captions have in place of the token, if they do; with the leading space, else empty."""
    letters = re.sub(r"[\W_]", "", word.text)
    alike = re.compile(r"\w*" + r"[\W_]*".join(map(re.escape, letters)) + r"\w*", re.IGNORECASE) if letters else None
    found = next((match[0] for caption in captions if alike and (match := alike.search(caption))), "")
    if found:
        return f' A caption has "{found}", but must hold the token just as it is given.'
    if " " in word.text:
        return f' A token with a space must stand in them just so; one word, such as "{letters}", is easier to write.'
    return ""


def _some(paths: Sequence[str]) -> str:
    return f"{counted(len(paths), 'image')}: {first_names(paths)}"


def _is_known(word: Placeholder) -> bool:
    """Whether the token is a word of the vocabulary, as far as that can be told without the model's tokenizer."""
    return f"{word.text.lower()}</w>" in _vocabulary()


@cache
def _vocabulary() -> frozenset[str]:
    """The bundled vocabulary's tokens, as they are written there."""
    return frozenset(json.loads((VOCABULARY / "vocab.json").read_text(encoding="utf-8")))


def presence(caption: str, rules: CaptionRules, word: Placeholder) -> str:
    """Whether a caption holds the token "always", "sometimes" or "never"; see ``captions.token_presence``."""
    if not is_plain(caption, rules):
        return token_presence(caption, rules, word)
    return "always" if word.found_in(caption) else "never"


def is_plain(caption: str, rules: CaptionRules) -> bool:
    """Whether nothing but the expansion of the word happens to a caption that is not shuffled or dropped."""
    return "\n" not in caption and not (rules.wildcard or rules.secondary_separator or rules.prefix or rules.suffix)


def no_word(word: Placeholder, paths: Sequence[str], advice: str = "") -> UserError:
    """The error for images of which no caption holds the token; ``advice`` is what may be wrong."""
    return UserError(
        f'No caption holds the token "{word.text}", so nothing could be learned (looked at '
        f"{_some(paths)}).{advice} Write --token_string into the captions, set "
        "caption_prefix or class_tokens, or use --use_object_template or --use_style_template."
    )
