"""The files that come with the program: ``configs/``, beside ``library/`` in the repository, in it once installed."""

import os
from pathlib import Path, PurePath

_PACKAGE = Path(__file__).parents[1]
CONFIGS = next(
    (folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()), _PACKAGE / "configs"
)


def shipped(path: str) -> str:
    """The path itself, or that of the file or folder that comes with the program.

    ``configs/quickstart/sd.toml`` means the shipped one wherever the folder that the user works in has none of its own.
    """
    parts = PurePath(path).parts
    if parts[:1] != ("configs",) or ".." in parts or os.path.lexists(path):
        return path
    own = CONFIGS.parent / path
    return str(own) if os.path.lexists(own) else path  # Path.exists raises for a name that is too long
