"""The Hugging Face hub: what a run saves goes up, and a state to go on from comes down."""

import logging
import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download

from library.options.output import REPO_TYPES, HubOptions
from library.support.errors import UserError, first_line, survived

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

_STATE = re.compile(r"(?P<repo>[^/:]+/[^/:]+)/(?P<path>[^:]+?)/?(?::(?P<revision>[^:]*))?(?::(?P<type>[^:]*))?")


class HubUpload:
    """Uploads to one repository, each file in a commit of its own."""

    def __init__(self, api: HfApi, repo_id: str, options: HubOptions) -> None:
        self.api, self.repo_id = api, repo_id
        self.repo_type = options.huggingface_repo_type or "model"
        self.folder = (options.huggingface_path_in_repo or "").strip("/")
        self.background = options.async_upload
        self.waiting: list[Future[CommitInfo]] = []

    @classmethod
    def open(cls, options: HubOptions) -> "HubUpload | None":
        """Find ``--huggingface_repo_id`` or make it, private unless it is to be public; None where none is given.

        Raises UserError where the hub cannot be reached or the token may not write there.
        """
        repo_id = options.huggingface_repo_id
        if repo_id is None:
            return None
        uploads = cls(HfApi(token=options.huggingface_token), repo_id, options)
        private = options.huggingface_repo_visibility != "public"
        asking = f"--huggingface_repo_id {repo_id}"
        api, kind = uploads.api, uploads.repo_type
        sdk = "static" if kind == "space" else None
        _ask(
            asking,
            lambda: api.create_repo(repo_id, repo_type=kind, space_sdk=sdk, private=private, exist_ok=True),
        )
        _ask(asking, lambda: api.auth_check(repo_id, repo_type=kind, write=True))
        logger.info("Saved files are uploaded to %s %s on the Hugging Face hub.", uploads.repo_type, repo_id)
        return uploads

    def upload(self, path: Path) -> None:
        """Upload a file, or a folder with its files, as it is now; in the background if that was asked for.

        A failure is said and changes nothing else: the file is there.
        """
        with survived(self._failure(path.name)):
            files = [file for file in sorted(path.iterdir()) if file.is_file()] if path.is_dir() else [path]
            # Read now: a checkpoint may be removed again before the background comes to it.
            contents = [(file.relative_to(path.parent).as_posix(), file.read_bytes()) for file in files]
            done = self.api.create_commit(  # type: ignore[call-overload]  # declared for True and for False only
                self.repo_id,
                [
                    CommitOperationAdd("/".join(filter(None, (self.folder, name))), content)
                    for name, content in contents
                ],
                commit_message=f"Add {path.name}",
                repo_type=self.repo_type,
                run_as_future=self.background,
            )
            if self.background:
                done.add_done_callback(lambda future: self._say_failure(path.name, future))
                self.waiting.append(done)

    def finish(self) -> None:
        """Wait for what is still on its way."""
        if pending := [future for future in self.waiting if not future.done()]:
            logger.info("Waiting for %d uploads to the Hugging Face hub.", len(pending))
        for future in self.waiting:
            future.exception()
        self.waiting = []

    def _failure(self, name: str) -> str:
        return f"{name} was not uploaded to {self.repo_id}; the training goes on."

    def _say_failure(self, name: str, future: Future[CommitInfo]) -> None:
        with survived(self._failure(name)):
            future.result()


def download_state(place: str, file: str, token: str | None) -> Path:
    """Download ``file`` of the state at ``user/name/path[:revision[:type]]``; returns the folder it is in now.

    Raises UserError for another form, and where the hub cannot be reached or has no such file.
    """
    found = _STATE.fullmatch(place)
    kind = (found["type"] or "model") if found else None
    if found is None or kind not in REPO_TYPES:
        raise UserError(
            f'--resume "{place}": with --resume_from_huggingface it must be user/name/path, then :revision and '
            f":type if need be, such as user/name/mychar-state:main:dataset. Types are {', '.join(REPO_TYPES)}."
        )
    path, revision = f"{found['path']}/{file}", found["revision"] or None
    return Path(
        _ask(
            f"--resume {place}",
            lambda: hf_hub_download(found["repo"], path, revision=revision, repo_type=kind, token=token),
        )
    ).parent


def _ask(asking: str, question: Callable[[], Found]) -> Found:
    """The hub's answer; UserError with its reason, in whatever form the hub's library gives it."""
    try:
        return question()
    except Exception as error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"{asking}: the request to the Hugging Face Hub failed ({reason}). Check the name, the access token "
            "(HF_TOKEN) and the connection."
        ) from error
