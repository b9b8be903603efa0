"""What both scripts do around a training: parse, run, and turn a user's mistake into one sentence and an exit code."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

from library.options.checks import check_given_files
from library.options.console import hold_back, keep_talking, release, set_up_logging
from library.options.parser import OptionParser, parse
from library.support.errors import UserError
from library.support.phase import phase
from library.support.processes import ended_at_once
from library.support.signals import ended_gently, exit_code, signals_handled
from library.support.terminal import fitted

logger = logging.getLogger(__name__)


def run(parser: OptionParser, family: str, arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and train; return 0, 1 for a user's mistake, or what tells how it was interrupted.

    Everything heavy is imported after the arguments are known to be good, so that ``--help`` and mistakes answer at
    once. Without ``arguments`` those of the process are taken, and the process ends with the run; where the run has
    several processes, this one ends here (see ``ended_at_once``).
    """
    keep_talking()
    with signals_handled(own_process=arguments is None):
        return ended_at_once(lambda: _run(parser, family, arguments))


def _run(parser: OptionParser, family: str, arguments: Sequence[str] | None) -> int:
    hold_back()
    try:
        options = parse(parser, arguments)
        # A log file is something that a run writes.
        dry = options.dataset.dry_run
        set_up_logging(replace(options.runtime, console_log_file=None) if dry else options.runtime)
        # Numpy and Pillow take a while too, and a refused option does without them.
        from library.data.found_images import find_images
        from library.model.model_paths import check_paths
        from library.support.imports import lean_imports

        with ended_gently():
            found = find_images(options, family)
            check_paths(options.model)
            check_given_files(options)
        # Imports swallow exceptions: a signal ends the process at once.
        with phase("Loading PyTorch, transformers and diffusers"), lean_imports():
            from library.run import train

        with ended_gently():
            train(options, family, found)
    except UserError as error:
        return _told(str(error))
    except OSError as error:
        if not error.filename:
            raise
        return _told(_unusable(error))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return exit_code()
    return 0


def _told(mistake: str) -> int:
    """Tell a user's mistake, after all that was held back; the exit code."""
    release()
    print(fitted(f"error: {mistake}", sys.stderr), file=sys.stderr)
    return 1


def _unusable(error: OSError) -> str:
    """What the system says of a file or folder that no other part has words for: no permission, a disk that fails."""
    return (
        f"{error.filename} cannot be used: {error.strerror}. Check the path, its permissions and those of the folders "
        "above it, and the disk."
    )
