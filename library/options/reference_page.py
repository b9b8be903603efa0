"""The reference page of all options: ``python -m library.options.reference_page > docs/options.md``."""

from collections.abc import Iterable, Sequence
from dataclasses import fields

from library.options.config_file import FILE_OPTIONS
from library.options.declaration import Option, option_of
from library.options.option_types import written
from library.options.options import option_groups

INTRODUCTION = """\
# Options

Both scripts, `train_textual_inversion.py` (Stable Diffusion 1.x and 2.x) and `sdxl_train_textual_inversion.py`
(Stable Diffusion XL), take the same options; `--help` prints them too. They can also stand in a TOML file for
`--config_file`, as `option = value`; what the command line gives wins over the file. A flag that the file switches on
is switched off again with `=false`, for example `--cache_latents=false`. `--output_config` writes such a file from a
command line, and files of the kohya_ss GUI are read as they are.

Relative paths, also those in files, start in the folder that the command is run in. One exception: a path that begins
with `configs/` and does not exist there means the file that comes with the program, so that
`--config_file=configs/quickstart/sd.toml` works from any folder.

Tab completes them, in bash for example once `pip install -e ".[completion]"` is done and `.bashrc` holds the line
`eval "$(train_textual_inversion --print_completion bash)"`; `sdxl_train_textual_inversion` and
`textual_inversion_embedding` have such a line of their own. Other shells are zsh, fish, tcsh and powershell.

This page is made from the declarations in `library/options/`, by
`python -m library.options.reference_page > docs/options.md`.
"""


def page() -> str:
    """Return the whole page as Markdown, one table for each group of options."""
    parts = [INTRODUCTION, _table("Configuration file", FILE_OPTIONS)]
    for group in option_groups().values():
        parts.append(_table(group.__doc__ or "", {declared.name: option_of(declared) for declared in fields(group)}))
    return "\n".join(parts)


def _table(title: str, options: dict[str, Option]) -> str:
    rows = (
        (f"`--{name}`", _value(option), "" if option.is_flag else default_of(option), help_of(option))
        for name, option in options.items()
    )
    return table(title, ("option", "value", "default", "meaning"), rows)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A section of a reference page: a heading, and a table of cells that hold Markdown."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return "\n".join([f"## {title}", "", head, f"|{'---|' * len(columns)}", *body, ""])


def _value(option: Option) -> str:
    if option.is_flag:
        return "flag"
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    kind = option.kind
    return f"{kind}, {option.limits}" if option.limits else kind


def default_of(option: Option) -> str:
    """The option's default as a cell, written as TOML has it; empty where there is none."""
    default = written(option.default)
    if isinstance(default, bool):
        default = str(default).lower()
    return "" if default in (None, "") else f"`{default}`"


def help_of(option: Option) -> str:
    """The option's help as a cell."""
    return escaped(option.whole_help)


def escaped(text: str) -> str:
    """A text as a cell that shows it as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    print(page(), end="")
