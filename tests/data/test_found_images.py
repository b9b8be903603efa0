"""What is found before anything heavy is imported, and that mistakes found there are told without it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from library.data.found_images import find_images
from library.options.options import Options, declared_options
from library.support.errors import UserError

ROOT = Path(__file__).parents[2]


def folder_of_images(folder: Path, caption: str) -> Path:
    """Two images with the same caption."""
    folder.mkdir(exist_ok=True)
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def dataset_file(folder: Path, subset: str) -> Path:
    """A dataset file of one subset, given as it stands in the file."""
    file = folder / "data.toml"
    file.write_text(
        f"[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{subset}\n",
        encoding="utf-8",
    )
    return file


def told(script: str, *arguments: str) -> tuple[int, str, set[str]]:
    """Exit code, what was said, and the packages that the script had imported by then, in a process of its own."""
    code = (
        f"import json, sys, {script} as script\n"
        "try: code = script.main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code or 0\n"
        "print(json.dumps([code, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    code, packages = json.loads(done.stdout.splitlines()[-1])
    return code, done.stdout + done.stderr, set(packages)


def run_with(file: Path, *more: str) -> list[str]:
    given = ["--pretrained_model_name_or_path=/nowhere.safetensors", f"--output_dir={file.parent / 'out'}"]
    return [*given, "--token_string=mychar", f"--dataset_config={file}", *more]


def test_a_training_says_at_once_what_it_loads_and_leaves_bitsandbytes_out(tmp_path):
    images = folder_of_images(tmp_path / "images", "mychar")
    file = dataset_file(tmp_path, f"image_dir = '{images.as_posix()}'")
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"no model")
    code, said, packages = told("train_textual_inversion", *run_with(file, f"--pretrained_model_name_or_path={model}"))
    assert code == 1
    assert said.index("Loading PyTorch") < said.index(f"error: {model}")
    assert {"torch", "diffusers", "transformers"} <= packages
    assert "bitsandbytes" not in packages


@pytest.mark.parametrize(("extension", "looked_for"), [("'.caption'", ".caption"), ("'txt'", ".txt")])
def test_images_without_captions_are_told_which_files_were_looked_for(extension, looked_for, tmp_path):
    images = folder_of_images(tmp_path / "images", "mychar")
    for path in images.glob("*.txt"):
        path.rename(path.with_suffix(".tags"))
    file = dataset_file(tmp_path, f"image_dir = '{images.as_posix()}'\ncaption_extension = {extension}")
    with pytest.raises(UserError, match=rf'No image has a caption.*2 images.*\{looked_for} beside.*"mychar"'):
        found(file, "mychar")


def found(file: Path, token: str, *, template: bool = False):
    values = {name: option.default for name, option in declared_options()}
    values |= {"dataset_config": str(file), "token_string": token, "use_object_template": template}
    return find_images(Options.from_values(values), "sd")


def test_what_is_found_is_handed_on(tmp_path):
    images = folder_of_images(tmp_path / "images", "mychar on a chair")
    everything = found(dataset_file(tmp_path, f"image_dir = '{images.as_posix()}'"), "mychar")
    ((found_set,),) = everything.sets
    assert found_set.captions == ["mychar on a chair"] * 2
    assert found_set.sizes.tolist() == [[64, 64]] * 2
    assert [config.batch_size for config in everything.configs] == [1]


def test_templates_need_no_captions_and_a_known_word_is_left_to_its_own_check(tmp_path):
    """For "cat", which the model knows, "no caption holds it" would be the wrong advice."""
    images = folder_of_images(tmp_path / "images", "a photo")
    file = dataset_file(tmp_path, f"image_dir = '{images.as_posix()}'")
    for token, template in (("mychar", True), ("cat", False)):
        assert found(file, token, template=template).sets
