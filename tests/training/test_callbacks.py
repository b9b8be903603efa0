"""callbacks.py: one more entry of the list hears of all that happens, and the loop knows nothing of it."""

from unittest.mock import patch

from option_effects import train
from runs import TOKEN, arguments, write_dataset

from library import trainer
from library.training.callbacks import Callback, Callbacks


class Diary(Callback):
    """Writes down what it is told, with step and epoch where it is told of them."""

    def __init__(self):
        self.lines = []

    def on_start(self, progress, state):
        self.lines.append(("start", progress.step, progress.epoch, state and state.step))

    def after_step(self, progress, result):
        assert result.loss > 0
        assert result.rates == {"lr": 0.01}
        assert result.smoothed > 0
        assert result.seconds > 0
        self.lines.append(("step", progress.step, progress.epoch))

    def after_epoch(self, progress):
        assert progress.epoch_closed
        self.lines.append(("epoch", progress.step, progress.epoch))

    def after_validation(self, progress, loss):
        assert loss > 0
        self.lines.append(("validation", progress.step, progress.epoch))

    def after_samples(self, progress, images):
        assert all(image.shape == (64, 64, 3) for image in images.values())
        self.lines.append(("samples", progress.step, list(images)))

    def after_save(self, progress, action):
        self.lines.append((action.kind, progress.step, action.name))

    def after_result(self, path):
        assert path.is_file()
        self.lines.append(("result", path.name))

    def close(self):
        self.lines.append(("closed",))

    def after_training(self, path):
        assert path.is_file()
        self.lines.append(("done", path.name))


def written(tmp_path, model, *flags):
    """The diary of a run of three steps, two an epoch."""
    diary, happenings = Diary(), trainer.happenings

    def with_diary(*given):
        callbacks, saving = happenings(*given)
        callbacks.entries.append(diary)
        return callbacks, saving

    folder = tmp_path / "out"
    argv = [*arguments("sd1", model, tmp_path / "dataset.toml", folder, "--max_train_steps=3"), *flags]
    train("sd1", argv, folder, patch.object(trainer, "happenings", with_diary))
    return diary.lines


def test_an_entry_hears_of_everything_in_order(tmp_path, tiny_sd1):
    write_dataset(tmp_path, dataset="validation_split = 0.2", count=5)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1")
    flags = ["--save_every_n_steps=2", "--save_state", f"--sample_prompts={prompts}", "--sample_every_n_steps=2"]
    file, state = f"{TOKEN}.safetensors", f"{TOKEN}-state"
    middle = f"{TOKEN}-step00000002"
    end = [("step", 3, 2), ("validation", 3, 2), ("epoch", 3, 2), ("state", 3, state), ("save", 3, file)]
    end += [("result", file), ("closed",), ("done", file)]
    validated = [("validation", 2, 1), ("epoch", 2, 1)]
    assert written(tmp_path, tiny_sd1, *flags) == [
        ("start", 0, 0, None),
        ("step", 1, 1),
        *(("save", 2, f"{middle}.safetensors"), ("state", 2, f"{middle}-state"), ("samples", 2, [0]), ("step", 2, 1)),
        *(*validated, *end),
    ]
    resumed = written(tmp_path, tiny_sd1, *flags, f"--resume={tmp_path / 'out' / f'{middle}-state'}")
    assert resumed == [("samples", 2, []), ("start", 2, 1, 2), *validated, *end]  # none of the samples was missing


def test_the_list_passes_everything_on():
    moments = {name for name in vars(Callback) if not name.startswith("_")}
    assert moments == vars(Callbacks).keys() & moments
