"""A short run that is killed, or meets a full disk, at its n-th file event; forked, so that torch is imported once.

Run as a program it works through all events of one kind and prints what it found as JSON; see ``test_kills.py``.
"""

import builtins
import errno
import io
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "remove", "rmdir", "link")
FREEING = ("unlink", "remove", "rmdir")  # what a full disk does not refuse: there it is no event


class Events:
    """Counts what a process does to files below ``folder`` and strikes at number ``at`` (from 1; 0: never)."""

    def __init__(self, folder: Path, at: int, kind: str):
        self.folder, self.at, self.kind, self.count = str(folder), at, kind, 0

    def install(self) -> None:
        """Wrap opening for writing, writing and all calls that change folders."""
        opened = io.open

        def opening(file, mode="r", *args, **kwargs):
            if not (set(mode) & set("wax+") and self._ours(file)):
                return opened(file, mode, *args, **kwargs)
            self.event("open", file)
            return Written(opened(file, mode, *args, **kwargs), self)

        io.open = builtins.open = opening
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, call: Callable) -> Callable:
        def wrapped(target, *args, **kwargs):
            if name == "fsync" or "dir_fd" in kwargs or self._ours(target):
                self.event(name, target)
            return call(target, *args, **kwargs)

        return wrapped

    def _ours(self, file) -> bool:
        return isinstance(file, str | os.PathLike) and str(Path(file).absolute()).startswith(self.folder)

    def event(self, name: str, target) -> None:
        """Count one event, and strike if it is the one, or a later one on a full disk."""
        if self.kind == "full" and name in FREEING:
            return
        self.count += 1
        if self.kind == "kill" and self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "full" and self.at and self.count >= self.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


class Written:
    """A file whose writes are events; a process killed there has written half of it."""

    def __init__(self, file, events: Events):
        self._file, self._events = file, events

    def write(self, content) -> int:
        """Write in two parts, with the event between them."""
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._events.event("write", self._file.name)
        return half + self._file.write(content[half:])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __iter__(self):
        return iter(self._file)

    def __getattr__(self, name):
        return getattr(self._file, name)


def in_child(work: Callable[[], int], log: Path) -> int:
    """Do ``work`` in a fork of this process; its output goes to ``log``. Returns the exit code, or -signal."""
    child = os.fork()
    if not child:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = 99
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class World:
    """A tiny model that is loaded once, a dataset, and runs on them."""

    def __init__(self, model: Path, folder: Path):
        import torch
        from runs import write_dataset

        from library import run as training  # noqa: F401 - whatever a fork would import
        from library.model import runtime
        from library.model.base_model import BaseModel
        from library.model.family import FAMILIES
        from library.options.options import ModelOptions

        torch.set_num_threads(1)  # before any work: a pool of threads does not survive a fork
        runtime._use_all_cores = lambda: None
        self.model, self.folder = model, folder
        self.data = folder / "data"
        self.dataset = write_dataset(self.data, count=3, size=(64, 64), subset="cache_info = true")
        base = BaseModel.open(ModelOptions(pretrained_model_name_or_path=str(model)), FAMILIES["sd"])
        for part in ("text_encoders", "unet", "vae"):
            _already_loaded(BaseModel, part, getattr(base, part)(torch.float32, torch.device("cpu")))
        _already_loaded(BaseModel, "tokenizers", base.tokenizers())

    def argv(self, out: Path, *more: str) -> list[str]:
        """A run of four steps, two an epoch, that saves all that can be saved."""
        from runs import arguments

        flags = ["--max_train_steps=4", "--save_every_n_steps=1", "--save_last_n_steps=1", "--save_every_n_epochs=1"]
        flags += ["--save_state", "--num_vectors_per_token=2", "--cache_latents_to_disk"]
        return arguments("sd1", self.model, self.dataset, out, *flags, *more)

    def run(self, out: Path, *more: str, events: Events | None = None) -> tuple[int, str]:
        """The exit code and what was said."""
        log = out.with_suffix(".log")

        def work() -> int:
            from runs import run

            tempfile.tempdir = str(out.with_suffix(".tmp"))
            if events:
                events.install()
            code = run("sd1", self.argv(out, *more))
            if events and not events.at:
                log.with_suffix(".count").write_text(str(events.count))
            return code

        return in_child(work, log), log.read_text(errors="replace")


def _already_loaded(kind: type, part: str, loaded) -> None:
    setattr(kind, part, lambda *_, **__: loaded)


def damaged(out: Path, wanted: dict[str, bytes]) -> list[str]:
    """What stands under a final name in ``out`` and is not what an undisturbed run writes there."""
    from library.training.state import TrainingState

    found = []
    for path in out.rglob("*") if out.is_dir() else ():
        if any(part.startswith(".") and part.endswith(".tmp") for part in path.relative_to(out).parts):
            continue
        if path.is_dir():
            try:
                TrainingState.read(path)
            except Exception as error:
                found.append(f"{path.name}: {error}")
        elif path.suffix == ".safetensors" and rows_of(path) != wanted.get(path.name):
            found.append(path.name)
    return found


def rows_of(path: Path) -> bytes:
    """The bytes of an embedding file's vectors, or of an error."""
    from safetensors.torch import load_file

    try:
        return load_file(path)["emb_params"].numpy().tobytes()
    except Exception as error:
        return str(error).encode()


def damaged_caches(folder: Path) -> list[str]:
    """Caches of latents and captions that cannot be read."""
    found = []
    for path in _caches(folder):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            else:
                with np.load(path) as arrays:
                    dict(arrays)
        except Exception as error:
            found.append(f"{path.name}: {error}")
    return found


def _caches(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".npz", ".json") and not path.name.startswith(".")]


def _forget_caches(folder: Path) -> None:
    for path in _caches(folder):
        path.unlink()


def unfinished(*folders: Path) -> list[Path]:
    """Temporary files and folders that are there."""
    return [path for folder in folders for path in folder.rglob(".*.tmp")]


def _let_an_hour_pass(paths: list[Path]) -> None:
    for path in paths:
        status = path.stat()
        os.utime(path, (status.st_atime - 3600, status.st_mtime - 3600))


def strike(world: World, kind: str, number: int, wanted: dict[str, bytes]) -> list[str]:
    """Let a run meet its event ``number``, resume it, and return all that is wrong."""
    _forget_caches(world.data)
    out = world.folder / f"{kind}{number}"
    code, said = world.run(out, events=Events(world.folder, number, kind))
    wrong = [] if code == (-signal.SIGKILL if kind == "kill" else 1) else [f"exit code {code}: {said[-800:]}"]
    wrong += ["a traceback"] if "Traceback" in said else []
    wrong += damaged(out, wanted) + damaged_caches(world.data)
    _let_an_hour_pass(unfinished(world.data))
    begun = any(out.glob("*-state"))
    code, said = world.run(out, *(["--resume=latest"] if begun else []))
    if code or rows_of(out / "mychar.safetensors") != wanted["mychar.safetensors"]:
        wrong.append(f"resumed ({begun}): exit code {code}: {said[-800:]}")
    wrong += [f"left over: {path.name}" for path in unfinished(out, world.data)]
    return [f"event {number}: {each}" for each in wrong]


def main(model: str, kind: str, stride: int) -> None:
    """Count the events of a run, strike at every ``stride``-th, and print the counts and what went wrong as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(model), Path(folder))
        code, said = world.run(world.folder / "whole", "--save_last_n_steps=99")
        assert code == 0, said
        wanted = {path.name: rows_of(path) for path in (world.folder / "whole").glob("*.safetensors")}
        _forget_caches(world.data)
        code, said = world.run(world.folder / "counted", events=Events(world.folder, 0, kind))
        assert code == 0, said
        count = int((world.folder / "counted.count").read_text())
        struck = range(1, count + 1, stride)
        wrong = [each for number in struck for each in strike(world, kind, number, wanted)]
        print(json.dumps({"events": count, "struck": len(struck), "wrong": wrong}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
