"""The reference page of all options, OPTIONS.md: ``python -m library.options.reference_page > OPTIONS.md``."""

from dataclasses import fields

from library.options.config_file import FILE_OPTIONS
from library.options.declaration import Option, option_of
from library.options.option_types import written
from library.options.options import option_groups

INTRODUCTION = """\
# Options

Both scripts, `train_textual_inversion.py` (Stable Diffusion 1.x and 2.x) and `sdxl_train_textual_inversion.py`
(Stable Diffusion XL), take the same options. They can also stand in a TOML file for `--config_file`, as
`option = value`; what the command line gives wins over the file. A flag that the file switches on is switched off again
with `=false`, for example `--cache_latents=false`.

This page is made from the declarations in `library/`: `python -m library.options.reference_page > OPTIONS.md`.
"""


def page() -> str:
    """Return the whole page as Markdown, one table for each group of options."""
    parts = [INTRODUCTION, _table("Configuration file", FILE_OPTIONS)]
    for group in option_groups().values():
        parts.append(_table(group.__doc__, {declared.name: option_of(declared) for declared in fields(group)}))
    return "\n".join(parts)


def _table(title: str, options: dict[str, Option]) -> str:
    rows = [
        f"| `--{name}` | {_value(option)} | {_default(option)} | {_help(option)} |" for name, option in options.items()
    ]
    return "\n".join([f"## {title}", "", "| option | value | default | meaning |", "|---|---|---|---|", *rows, ""])


def _value(option: Option) -> str:
    if option.is_flag:
        return "flag"
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    kind = option.kind
    return f"{kind}, {option.limits}" if option.limits else kind


def _default(option: Option) -> str:
    return "" if option.default in (None, False, "") else f"`{written(option.default)}`"


def _help(option: Option) -> str:
    return option.whole_help.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    print(page(), end="")
