"""The reference page of dataset files: ``python -m library.data.dataset_page > docs/dataset.md``."""

from collections.abc import Iterator

from library.data.schema import (
    DATASET,
    DREAMBOOTH,
    FILE,
    FINETUNING,
    GENERAL,
    MASK,
    OPTION_NAMES,
    SUBSET,
    Key,
    known_keys,
)
from library.options.options import declared_options
from library.options.reference_page import default_of, escaped, help_of, table

INTRODUCTION = """\
# The dataset file

`--dataset_config` names a TOML file (or a JSON file with the same keys) that says where the images and captions are and
what is done to them. Every dataset file of sd-scripts works. A misspelt key, a key in the wrong table and a value of
the wrong type stop the run before a model is loaded, with the nearest known key. `--debug_dataset` shows what becomes
of the images: captions, token ids, buckets and crops.

```toml
[general]                         # values for all datasets
caption_extension = ".txt"
enable_bucket = true

[[datasets]]                      # images of one resolution and batch size
resolution = 512                  # what the model was made for: 512, 768 or 1024
batch_size = 4

  [[datasets.subsets]]            # one folder
  image_dir = "images/mychar"
  num_repeats = 10

  [[datasets.subsets]]            # another one
  image_dir = "images/mychar_faces"
  num_repeats = 2
  flip_aug = true
```

A key that a subset leaves out takes the value of its `[[datasets]]`, then that of `[general]`, then that of the
command-line option in the table below, and at last the default. There may be several `[[datasets]]`, for example one of
512 and one of 768 pixels; every batch comes from one of them.

## Images and captions

Without a `metadata_file` a subset is a folder: all images in it (not in folders inside it), each with a text file of
the same name beside it.

```text
images/mychar/
  1.jpg
  1.txt      mychar, 1girl, blonde hair, blue eyes, smiling
  2.png
  2.txt      mychar, 1girl, walking in a park
```

- JPEG, PNG, WebP, BMP and AVIF are read. EXIF orientation is applied, transparency is laid on white.
- A caption is the first line of its file, in UTF-8. It must hold the placeholder token, as a whole word in any letter
  case. With `enable_wildcard`, `{red|blue} hair` stands for one of the two, and several lines for one of them, drawn at
  each use.
- `num_repeats` says how often each image is used in an epoch, so that folders of different sizes count alike.
- Without a dataset file, `--train_data_dir` takes a folder of folders named `10_girl`: 10 repeats, and `girl` as the
  caption of the images that have none. `--reg_data_dir` is the same for regularization images.

## Metadata files

A `metadata_file` holds captions and tags in place of caption files. Either JSON, an object by image:

```json
{
  "1.jpg": {"caption": "mychar smiling", "tags": "1girl, blonde hair"},
  "park/2.png": {"caption": "mychar walking in a park"}
}
```

or JSON Lines (`.jsonl`), an object a line:

```json
{"image_path": "1.jpg", "caption": "mychar smiling", "tags": "1girl, blonde hair"}
{"image_path": "park/2.png", "caption": "mychar walking in a park"}
```

Names are relative to `image_dir`, and the ending of the file may be left out; images outside of `image_dir` need
`--allow_outside_images`. The tags follow the caption after `caption_separator`. A dataset has either subsets with
metadata files or subsets without.

```toml
[[datasets]]
resolution = 512

  [[datasets.subsets]]
  image_dir = "images/listed"
  metadata_file = "images/listed.json"

  [[datasets.subsets]]
  image_dir = "images/more"
  metadata_file = "images/more.jsonl"
```

## Masks

With `--masked_loss` only the white parts of a mask count, which keeps backgrounds out of the embedding vectors. Masks
are images of the same names in another folder:

```toml
[[datasets]]
resolution = 512

  [[datasets.subsets]]
  image_dir = "images/mychar"
  conditioning_data_dir = "images/mychar_masks"
```

or the images' own transparency:

```toml
[[datasets]]
resolution = 512

  [[datasets.subsets]]
  image_dir = "images/cut_out"
  alpha_mask = true
```

## Regularization images and validation

```toml
[[datasets]]
resolution = 512
validation_split = 0.2            # a fifth of the images only measures: a validation loss after every epoch

  [[datasets.subsets]]
  image_dir = "images/mychar"
  num_repeats = 10

  [[datasets.subsets]]
  image_dir = "images/girls"
  is_reg = true
  class_tokens = "girl"           # the caption of images that have none
```

Regularization images keep LoRA and fine-tuning from forgetting. Here the model cannot forget, and an image whose
caption lacks the placeholder token teaches nothing, so they are rarely of use.

The tables below are made from `library/data/schema.py`: `python -m library.data.dataset_page > docs/dataset.md`.
"""

# What the keys mean that fall back on no option: default, meaning.
_OWN = {
    "general": ("", "Values for all datasets."),
    "datasets": ("", "The datasets, each begun with [[datasets]]; at least one."),
    "subsets": ("", "The subsets, each begun with [[datasets.subsets]]; at least one."),
    "validation_split": ("`0.0`", "Share of the images that is held out for a validation loss after every epoch."),
    "validation_seed": ("", "Seed that chooses the images held out. Unset: --seed."),
    "network_multiplier": ("`1.0`", "Has no effect here; sd-scripts weakens a LoRA network with it."),
    "custom_attributes": ("", "Has no effect here; sd-scripts hands it to scripts of other kinds."),
    "class_tokens": (
        "",
        "Caption of images that have no caption file. With it only .caption files are found by default.",
    ),
    "image_dir": (
        "",
        "Folder of the images. Required, except beside a metadata_file, whose names are relative to it.",
    ),
    "metadata_file": ("", "JSON or JSON Lines file with the captions and tags of the images; see above."),
    "is_reg": ("`false`", "These are regularization images: --prior_loss_weight weighs them."),
}
_IMAGES_FROM = {DREAMBOOTH: "a folder", FINETUNING: "a metadata file", MASK: "a folder with masks"}
_LEVELS = (FILE, GENERAL, DATASET, SUBSET)
# The tables of the page: the levels at which their keys may stand.
_TABLES = {
    (FILE,): "Tables of the file",
    (GENERAL, DATASET): "Keys of `[general]` and `[[datasets]]`",
    (DATASET,): "Keys of `[[datasets]]` only",
    (GENERAL, DATASET, SUBSET): "Keys of `[general]`, `[[datasets]]` and `[[datasets.subsets]]`",
    (SUBSET,): "Keys of `[[datasets.subsets]]` only",
}
_OPTIONS = dict(declared_options())


def page() -> str:
    """Return the whole page as Markdown: the introduction, and a table for the keys of the same levels."""
    columns = ("key", "value", "default", "option", "meaning")
    tables = [table(title, columns, map(_row, _keys(levels))) for levels, title in _TABLES.items()]
    return "\n".join([INTRODUCTION, *tables])


def _keys(levels: tuple[str, ...]) -> Iterator[str]:
    """The keys that may stand at these levels and no other, in the schema's order."""
    everywhere = dict.fromkeys(name for level in _LEVELS for name in _known(level))
    return (name for name in everywhere if levels == tuple(level for level in _LEVELS if name in _known(level)))


def _known(level: str) -> dict[str, Key]:
    """The keys that may stand at a level, of whichever kind the subsets are."""
    return {name: key for kind in _IMAGES_FROM for name, key in known_keys(level, kind).items()}


def _row(name: str) -> tuple[str, ...]:
    """The cells of one key."""
    key = next(_known(level)[name] for level in _LEVELS if name in _known(level))
    option = OPTION_NAMES.get(name, name)
    if option in _OPTIONS:
        default, shown, meaning = default_of(_OPTIONS[option]), f"`--{option}`", help_of(_OPTIONS[option])
    else:
        default, shown, meaning = _OWN[name][0], "", escaped(_OWN[name][1])
    return f"`{name}`", escaped(key.description), default, shown, f"{meaning}{_restriction(name)}"


def _restriction(name: str) -> str:
    """For which subsets a key is, where it is not for all."""
    if name not in _known(SUBSET):
        return ""
    kinds = [words for kind, words in _IMAGES_FROM.items() if name in known_keys(SUBSET, kind)]
    return "" if len(kinds) == len(_IMAGES_FROM) else f" (Only where images come from {' or '.join(kinds)}.)"


if __name__ == "__main__":
    print(page(), end="")
