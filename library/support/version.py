"""This trainer's name and version, for ``--version`` and the files that it writes."""

import importlib.metadata
import tomllib
from pathlib import Path

DISTRIBUTION = "textual-inversion-trainer"


def version() -> str:
    """The version: from the checkout's ``pyproject.toml``, else from the installed distribution."""
    project_file = Path(__file__).parents[2] / "pyproject.toml"
    if project_file.is_file():
        project = tomllib.loads(project_file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == DISTRIBUTION:
            return str(project["version"])
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
