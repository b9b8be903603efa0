"""What a short run is given: a small dataset with its file, and a command line. Imports nothing heavy."""

from pathlib import Path

from photos import make_photos

FAMILY_FLAGS = {"sd1": [], "sd2": ["--v2", "--v_parameterization"], "sdxl": []}
TOKEN = "mychar"


def write_dataset(folder: Path, general: str = "", dataset: str = "", subset: str = "", **photos) -> Path:
    """Draw photographs (see ``make_photos``) and write a dataset file that names them; returns the file."""
    images = folder / "images"
    make_photos(images, **photos)
    file = folder / "dataset.toml"
    file.write_text(
        f"[general]\ncaption_extension = '.txt'\n{general}\n[[datasets]]\nresolution = 64\nbatch_size = 2\n{dataset}\n"
        f"[[datasets.subsets]]\nimage_dir = '{images.as_posix()}'\n{subset}\n",
        encoding="utf-8",
    )
    return file


def write_shuffled_dataset(folder: Path) -> Path:
    """Five photographs in batches of two, with captions that are shuffled."""
    return write_dataset(folder, count=5, subset="shuffle_caption = true", caption=f"{TOKEN}, red, green, blue")


def arguments(family: str, model: Path, dataset: Path | None, output: Path, *more: str) -> list[str]:
    """The command line of a short run; ``more`` is appended and may override. ``--no_report=false`` adds the report."""
    given = [f"--pretrained_model_name_or_path={model}", f"--output_dir={output}", f"--token_string={TOKEN}"]
    given += ["--init_word=girl", "--max_train_steps=2", "--learning_rate=1e-2", "--seed=1", "--cache_latents"]
    given += ["--max_data_loader_n_workers=0", "--no_report", *FAMILY_FLAGS[family]]
    if dataset is not None:
        given.append(f"--dataset_config={dataset}")
    return [*given, *more]
