"""Damaged image files, found before a model is loaded: a truncated one would end a run at its place in an epoch."""

from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor

from library.data.image_sets import ImageSet
from library.data.images import check_decodes
from library.data.metadata_files import FolderCache
from library.support.errors import UserError, counted, first_names
from library.support.processes import count, rank, usable_cores
from library.support.progress_bar import progress_bar

_MOST_READERS = 16  # threads; a large WebP takes hundreds of megabytes
_MANY = 200  # images; fewer take no time that is worth a progress bar


def check_whole(sets: Iterable[ImageSet]) -> None:
    """Decode every image and mask that is not known to be whole; of several processes each looks at a share.

    Raises UserError that names those that cannot be decoded. Folders with ``cache_info`` note those that can.
    """
    sets = list(sets)
    known = frozenset().union(*(found.whole for found in sets))
    files = dict.fromkeys(path for found in sets for path in (*found.paths, *(found.masks or ())))
    paths = [path for path in files if path not in known][rank() :: count()]
    damaged = _damaged(paths)
    if count() == 1:  # several would overwrite each other's notes
        _note(sets, set(paths) - damaged.keys())
    if damaged:
        raise UserError(_message(damaged))


def _damaged(paths: Sequence[str]) -> dict[str, str]:
    """What is wrong with the files that cannot be decoded."""
    bar = progress_bar("Checking images", len(paths), "image", silent=rank() > 0 or len(paths) < _MANY)
    problems = {}
    with bar, ThreadPoolExecutor(min(usable_cores(), _MOST_READERS)) as readers:
        for path, problem in zip(paths, readers.map(_problem, paths), strict=True):
            if problem:
                problems[path] = problem
            bar.update()
    return problems


def _problem(path: str) -> str | None:
    try:
        check_decodes(path)
    except UserError as error:
        return str(error)
    return None


def _message(damaged: dict[str, str]) -> str:
    problem, *others = damaged.values()
    if not others:
        return problem
    names = first_names([*damaged][1:])
    return f"{problem} {counted(len(others), 'more image')} cannot be read: {names}."


def _note(sets: Sequence[ImageSet], whole: Set[str]) -> None:
    by_folder: dict[str, set[str]] = defaultdict(set)
    for found in sets:
        if found.subset.cache_info and not found.subset.read_only:
            by_folder[found.subset.source] |= whole & set(found.paths)
    for folder, paths in by_folder.items():
        if paths:
            FolderCache(folder).note_whole(paths)
