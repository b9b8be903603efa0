"""The grid of a run's sample images and the preview beside its embedding."""

import numpy as np
import pytest
from PIL import Image
from runs import TOKEN, arguments, run, write_dataset

from library.output.sample_grid import run_of_image, sample_grid, write_for_run

REPORT = "--no_report=false"


def written(folder, name, colour, size=(64, 48)) -> str:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(folder / name)
    return name


def found(grid: Image.Image, colour) -> tuple[int, int, int, int]:
    """The box of a colour in a grid: left, top, and what is behind it."""
    rows, columns = np.nonzero((np.asarray(grid) == colour).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_rows_are_moments_and_columns_prompts(tmp_path):
    red, green, blue = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    lines = [
        {"step": 0, "samples": {"0": written(tmp_path, "a.png", red)}},
        {"step": 5, "loss": 1.0},
        {"step": 10, "samples": {"1": written(tmp_path, "b.png", blue, (512, 256)), "0": "gone.png"}},
        {"step": 10, "samples": {"0": written(tmp_path, "c.png", green)}},
    ]
    grid = sample_grid(tmp_path, lines, [f"a photo of {TOKEN} " + "in a very long sentence " * 9, ""])
    assert grid is not None
    boxes = {colour: found(grid, colour) for colour in (red, green, blue)}
    sizes = {colour: (right - left, low - top) for colour, (left, top, right, low) in boxes.items()}
    assert sizes == {red: (64, 48), green: (64, 48), blue: (256, 128)}
    assert boxes[red][0] == boxes[green][0] < boxes[blue][0]
    assert boxes[red][1] < boxes[blue][1] < boxes[green][1]  # the small one is in the middle of the row
    # Labels above and beside, and none of them reaches into an image.
    ink = np.asarray(grid.convert("L")) < 128
    assert ink[: boxes[red][1] - 40, boxes[red][0] :].any()
    assert ink[boxes[red][1] :, :80].any()


def test_without_images_there_is_none(tmp_path):
    assert sample_grid(tmp_path, [], ["a"]) is None
    assert sample_grid(tmp_path, [{"step": 1, "samples": {"0": "gone.png"}}], ["a"]) is None
    lines = [{"step": 1, "samples": {"7": written(tmp_path, "a.png", "red")}}]  # of more prompts than there are now
    assert sample_grid(tmp_path, lines, ["a"]) is None


@pytest.mark.parametrize("other", ["a run", None])
def test_only_a_file_of_the_same_run_is_replaced(other, tmp_path, caplog):
    file = tmp_path / "a_grid.png"
    if other:
        write_for_run(file, Image.new("RGB", (1, 1)), other)
    else:
        file.write_bytes(b"not an image")
    before = file.read_bytes()
    for size in (2, 3):
        write_for_run(file, Image.new("RGB", (size, size)), "this run")
    assert (tmp_path / "a_grid-1.png").read_bytes() == before
    assert run_of_image(file) == "this run"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a_grid-1.png", "a_grid.png"]
    assert caplog.text.count("was kept") == 1


def test_a_run_grows_its_grid_and_leaves_a_preview(tmp_path, tiny_sd1):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a photo of {TOKEN} --w 64 --h 64 --s 1 --d 1\na dog --w 72 --h 64 --s 1 --d 2\n")
    out = tmp_path / "out"
    argv = arguments("sd1", tiny_sd1, write_dataset(tmp_path), out, REPORT, f"--sample_prompts={prompts}")
    argv += ["--sample_every_n_steps=1", "--sample_at_first", "--learning_rate=1"]
    heights = []
    for steps in (1, 2):
        # The second run is another one: what the first has left is kept.
        assert run("sd1", [*argv, f"--max_train_steps={steps}"]) == 0
        grid = Image.open(out / "sample" / f"{TOKEN}_grid.png").convert("RGB")
        heights.append(grid.height)
    assert heights[1] - heights[0] == 64 + 6
    pixels = np.asarray(grid)
    for file in (out / "sample").glob(f"{TOKEN}_[0-9e]*.png"):
        if file.stat().st_mtime < (out / f"{TOKEN}-1.safetensors").stat().st_mtime:
            continue
        wanted = np.asarray(Image.open(file))
        places = np.lib.stride_tricks.sliding_window_view(pixels[..., 0], wanted.shape[:2])
        assert (places == wanted[..., 0]).all(axis=(2, 3)).any(), file
    newest = max((out / "sample").glob(f"{TOKEN}_000002_00_*.png"), key=lambda path: path.stat().st_mtime_ns)
    preview = np.asarray(Image.open(out / f"{TOKEN}.preview.png"))
    np.testing.assert_array_equal(preview, np.asarray(Image.open(newest)))
    assert (out / f"{TOKEN}-1.preview.png").is_file()
    assert (out / "sample" / f"{TOKEN}_grid-1.png").is_file()
