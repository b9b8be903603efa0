"""Where the description of the data comes from: a dataset file, folder flags, or a metadata file flag."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.data.schema import DREAMBOOTH, FILE, GENERAL, check_table
from library.options.data import DatasetOptions
from library.options.declaration import required
from library.support.errors import UserError, looked_for
from library.support.shipped_files import shipped
from library.support.text_files import parse_json, parse_toml, read_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """One table, and where it stands; ``subsets`` are the tables inside a dataset.

    One that is ``found`` was not named by the user, and counts only if there are images in it.
    """

    place: str
    values: dict[str, Any]
    subsets: tuple["Table", ...] = ()
    found: bool = False


@dataclass(frozen=True)
class Source:
    """The [general] table, checked, and the tables of the datasets and subsets, not checked yet."""

    general: dict[str, Any]
    datasets: tuple[Table, ...]


def find_source(options: DatasetOptions) -> Source:
    """Read whichever of ``--dataset_config``, ``--in_json`` and ``--train_data_dir`` is given, in this order.

    Raises UserError for a file or folder that is missing or cannot be used.
    """
    if options.dataset_config:
        ignored = [f"--{name}" for name in ("train_data_dir", "reg_data_dir", "in_json") if getattr(options, name)]
        if ignored:
            logger.warning("%s: ignored, because --dataset_config describes all images.", ", ".join(ignored))
        return _from_file(Path(shipped(str(options.dataset_config))))
    if options.in_json:
        return _from_metadata_flag(options)
    return _from_folders(options)


def _from_file(file: Path) -> Source:
    content = _parse(file)
    check_table(content, FILE, DREAMBOOTH, str(file))
    general = content.get("general", {})
    check_table(general, GENERAL, DREAMBOOTH, f"{file}, [general]")
    datasets = tuple(_dataset_table(values, file, i) for i, values in enumerate(content.get("datasets", []), 1))
    if not datasets:
        raise UserError(f"{file}: there is no [[datasets]] in it, so there is nothing to train on.")
    return Source(general, datasets)


def _dataset_table(values: dict[str, Any], file: Path, number: int) -> Table:
    place = f"{file}, [[datasets]] number {number}"
    inner = values.get("subsets", [])
    # Any other form is left among the values, whose check refuses it.
    if not (isinstance(inner, list) and all(isinstance(table, dict) for table in inner)):
        return Table(place, values, (Table(place, {}),))
    subsets = (Table(f"{place}, [[datasets.subsets]] number {i}", table) for i, table in enumerate(inner, 1))
    return Table(place, {name: value for name, value in values.items() if name != "subsets"}, tuple(subsets))


def _parse(file: Path) -> dict[str, Any]:
    what = f"The dataset file {file}"
    text = read_text(file, what)
    if file.suffix.lower() == ".toml":
        return parse_toml(text, what)
    if file.suffix.lower() != ".json":
        raise UserError(f'{what} ends in "{file.suffix}"; it must be a .toml or a .json file.')
    content = parse_json(text, what)
    if not isinstance(content, dict):
        raise UserError(f'{what} must hold one JSON object with "general" and "datasets".')
    return content


def _from_metadata_flag(options: DatasetOptions) -> Source:
    if options.reg_data_dir:
        logger.warning("--reg_data_dir: ignored together with --in_json.")
    values = {"metadata_file": options.in_json}
    if options.train_data_dir:
        values["image_dir"] = options.train_data_dir
    subset = Table(f"--in_json {options.in_json}", values)
    return Source({}, (Table("The dataset of --in_json", {}, (subset,)),))


def _from_folders(options: DatasetOptions) -> Source:
    subsets = _folder_tables("train_data_dir", required(options.train_data_dir, "train_data_dir"))
    if options.reg_data_dir:
        tables = _folder_tables("reg_data_dir", options.reg_data_dir)
        subsets += [replace(table, values=table.values | {"is_reg": True}) for table in tables]
    return Source({}, (Table("The dataset of --train_data_dir", {}, tuple(subsets)),))


def _folder_tables(option: str, base: str) -> list[Table]:
    """One subset for each sub-folder ``<repeats>_<class tokens>``, sorted by name."""
    if not Path(base).is_dir():
        problem = "is a file, not a folder" if Path(base).exists() else f"does not exist{looked_for(base)}"
        raise UserError(f"--{option}: {base} {problem}. Check the path.")
    tables = []
    for folder in sorted(path for path in Path(base).iterdir() if path.is_dir()):
        count, _, class_tokens = folder.name.partition("_")
        repeats = _whole_number(count)
        if repeats is None or repeats < 1:
            logger.warning(
                "--%s: %s is ignored; its name does not start with how often it is repeated.", option, folder
            )
            continue
        values = {"image_dir": str(folder), "num_repeats": repeats, "class_tokens": class_tokens}
        tables.append(Table(f"--{option}, folder {folder}", values, found=True))
    if not tables:
        raise UserError(
            f"--{option}: {base} has no sub-folder named <repeats>_<words>, such as 10_mychar. Images that lie in it "
            "directly are not used: move them into one, or name the folder as image_dir in a file for --dataset_config."
        )
    return tables


def _whole_number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
