"""What is known of an option, in one place: the notices, the comparison on a resume, dataset keys derive from it."""

from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field
from enum import Enum
from itertools import groupby
from typing import Any, TypeVar

from library.options.option_types import (
    boolean,
    face_crop_range,
    int_or_float,
    learning_rate,
    number,
    path,
    resolution,
    shown,
    text,
    text_or_boolean,
    texts,
    whole_number,
)
from library.support.errors import UserError

_T = TypeVar("_T")

# How a reader's values are called on the reference page, and what stands for them in the help.
KINDS: dict[Callable[[Any], Any], tuple[str, str | None]] = {
    boolean: ("flag", None),
    whole_number: ("whole number", "N"),
    number: ("number", "X"),
    int_or_float: ("steps or share", "N"),
    text: ("text", "TEXT"),
    text_or_boolean: ("text", "TEXT"),
    texts: ("list of texts", "KEY=VALUE"),
    path: ("path", "FILE"),
    resolution: ("size", "W[,H]"),
    face_crop_range: ("two numbers", "A,B"),
    learning_rate: ("number or stages", "RATE"),
}


class OnResume(Enum):
    """What happens where a resumed run has another value than the saved state."""

    SAID = "it is said that the run will not be the same"
    RECORDED = "said, and recorded in the embedding files"
    REFUSED = "the run stops"
    OPTIMIZER = "the run stops if these, taken together, name another optimizer"
    STATE_COUNTS = "the value of the state is used"
    FREE = "nothing, for it does not change the vectors, or something else that is compared tells it better"


# The tables of a dataset file that an option is a key of: one per dataset or per subset, or only folders have it.
DATASETS, SUBSETS, FOLDERS = "datasets", "subsets", "folders"


@dataclass(frozen=True)
class Option:
    """All facts about one option; rules about several stand in ``checks``.

    ``above`` is an exclusive, ``at_least`` and ``at_most`` are inclusive limits. ``check`` looks at a value that was
    read and returns what is wrong with it, as the rest of a sentence that begins with the option. ``required`` says
    what the option is where a run cannot do without. ``zero_is_off`` marks counts for which 0 or less means "not
    given". ``secret`` marks what is never written or logged, and names the environment variable that serves instead.
    ``spelling_of`` is the option that an old name stands for; the old one wins.

    ``needs`` are the options ("cache_latents", "loss_type huber") of which one must be in force for this one to have
    an effect, ``yields_to`` those that are used in its place; ``idle`` is why it never has one. ``table`` is where in a
    dataset file the option is a key, which it falls back on, and ``key`` the key's name where that is another.
    ``told`` marks what an embedding file tells of its training, as ``ti.<name>``, where it is not the default.
    """

    help: str
    default: Any = None
    read: Callable[[Any], Any] = text
    choices: tuple[str | int, ...] | None = None
    metavar: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    zero_is_off: bool = False
    check: Callable[[Any], str | None] | None = None
    required: str = ""
    secret: str = ""
    spelling_of: str = ""
    needs: tuple[str, ...] = ()
    yields_to: tuple[str, ...] = ()
    idle: str = ""
    on_resume: OnResume = OnResume.SAID
    table: str = ""
    key: str = ""
    told: bool = False

    @property
    def is_flag(self) -> bool:
        return self.read is boolean

    @property
    def is_place(self) -> bool:
        """Whether values name a file or folder."""
        return self.metavar in ("FILE", "DIR", "MODEL", "VAE")

    @property
    def many(self) -> bool:
        return self.read is texts

    @property
    def kind(self) -> str:
        """What values are, in words."""
        return KINDS[self.read][0]

    @property
    def placeholder(self) -> str | None:
        """What stands for the value in the help; None where the choices do."""
        return self.metavar or (None if self.choices else KINDS[self.read][1])

    @property
    def condition(self) -> str:
        """What ``needs`` asks for, in words: "--loss_type huber or smooth_l1"; empty where there is nothing."""
        by_option = groupby((need.partition(" ") for need in self.needs), key=lambda parts: parts[0])
        groups = ((name, [value for _, _, value in parts if value]) for name, parts in by_option)
        return any_of([f"--{name} {any_of(values)}".rstrip() for name, values in groups])

    @property
    def whole_help(self) -> str:
        """The help, with what the option needs."""
        return f"{self.help} Ignored without {self.condition}." if self.needs else self.help

    @property
    def limits(self) -> str | None:
        """The allowed range in words, or None."""
        low = f"above {self.above}" if self.above is not None else None
        if self.at_least is not None:
            low = f"at least {self.at_least}"
        high = f"at most {self.at_most}" if self.at_most is not None else None
        return " and ".join(part for part in (low, high) if part) or None

    def allows(self, value: float) -> bool:
        """Whether a number lies within the limits."""
        low = (self.at_least is None or value >= self.at_least) and (self.above is None or value > self.above)
        return low and (self.at_most is None or value <= self.at_most)


def any_of(items: Sequence[str]) -> str:
    """The items of a choice in words: "a, b or c"."""
    return " or ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


def option(default: Any, help: str, **details: Any) -> Any:
    """Declare an option as a dataclass field; ``details`` are the other fields of :class:`Option`."""
    declared = Option(help, default, **details)
    return field(default=default, repr=not declared.secret, metadata={"option": declared})


def flag(help: str, **details: Any) -> Any:
    """Declare an option that is off unless its flag is given."""
    return option(False, help, read=boolean, **details)


def option_of(declared: Field[Any]) -> Option:
    """The :class:`Option` that a dataclass field declares."""
    found: Option = declared.metadata["option"]
    return found


def required(value: _T | None, name: str) -> _T:
    """The value of a required option. Raises UserError where it is missing, which the checks say first, and better."""
    if value is None:
        raise UserError(f"--{name} is missing.")
    return value


def checked(option: Option, value: Any) -> Any:
    """Read ``value`` (from a file) and hold it against the option's choices. Raises ArgumentTypeError."""
    result = option.read(value)
    if option.choices and result is not None and result not in option.choices:
        raise ArgumentTypeError(f"{shown(value)} is not one of: {', '.join(str(choice) for choice in option.choices)}.")
    return result
