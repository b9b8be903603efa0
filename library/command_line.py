"""What both scripts do around a training: parse, run, and turn a user's mistake into one sentence and an exit code."""

import argparse
import sys
from collections.abc import Sequence

from library.arguments import parse
from library.console import allow_any_text, hold_back, release, set_up_logging
from library.errors import UserError
from library.interruptions import ended_gently
from library.processes import ended_at_once


def run(parser: argparse.ArgumentParser, family: str, arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and train; return 0, 1 for a user's mistake, or 130 when interrupted (Ctrl-C, SIGTERM).

    Everything heavy is imported after the arguments are known to be good, so that ``--help`` and mistakes answer at
    once. Where the run has several processes, this one ends here (see ``ended_at_once``).
    """
    return ended_at_once(lambda: _run(parser, family, arguments))


def _run(parser: argparse.ArgumentParser, family: str, arguments: Sequence[str] | None) -> int:
    allow_any_text()
    hold_back()
    try:
        options = parse(parser, arguments)
        set_up_logging(options.runtime)
        from library.training import train

        with ended_gently():
            train(options, family)
    except UserError as error:
        release()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0
