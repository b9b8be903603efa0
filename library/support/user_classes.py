"""Classes that the user names on the command line, and the ``key=value`` arguments for them.

Optimizers and learning-rate schedulers share this: import by dotted path, arguments by Python literal, and mistakes
answered with the option they were made in.
"""

import ast
import importlib
import inspect
import keyword
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from library.support.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

# Packages whose name on PyPI is not the one that is imported.
_T = TypeVar("_T")
PIP_NAMES = {"lion_pytorch": "lion-pytorch"}


def literal_arguments(option: str, items: Iterable[str] | None) -> dict[str, Any]:
    """Read ``key=value`` texts; each value is a Python literal such as ``0.1``, ``(0.9,0.99)``, ``True`` or ``'text'``.

    ``option`` (``--optimizer_args``) is named in the UserError for a malformed item.
    """
    arguments: dict[str, Any] = {}
    for item in items or ():
        if item.count("=") != 1:
            raise UserError(f'{option}: "{item}" must be one key=value, for example weight_decay=0.01.')
        key, value = item.split("=")
        if not key.isidentifier() or keyword.iskeyword(key):
            raise UserError(f'{option}: "{key}" in "{item}" is no name. Write key=value without spaces.')
        if key in arguments:
            logger.warning('%s gives "%s" more than once; the last one counts.', option, key)
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            arguments[key] = ast.literal_eval(value)
            continue
        raise UserError(
            f'{option}: the value "{value}" of "{key}" cannot be read. Write a number, True, False, None, a tuple '
            f"such as (0.9,0.99), or a string in quotes: {key}='text'."
        )
    return arguments


def load_class(option: str, module: str, name: str) -> type:
    """Import the class ``name`` from ``module``; a missing class or package is a UserError naming ``option``."""
    try:
        source = importlib.import_module(module)
    except Exception as error:  # a module of the user's own may fail in any way
        package = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise UserError(
                f"{option}: {name} needs the Python package {package}, which is not installed. Install it with: pip "
                f"install {PIP_NAMES.get(package, package)}. If it is a module of your own, name its folder in the "
                "environment variable PYTHONPATH."
            ) from error
        raise UserError(f"{option}: {module} cannot be imported: {type(error).__name__}: {error}.") from error
    found = getattr(source, name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(source).items() if isinstance(value, type)]
        raise UserError(f"{option}: {module} has no class {name}.{did_you_mean(name, classes)}")
    return found


def construct(
    option: str, make: Callable[..., _T], *positional: Any, fixed: dict[str, Any], given: dict[str, Any]
) -> _T:
    """Call ``make(*positional, **fixed, **given)``, a class or a function; its refusal becomes a UserError.

    ``given`` are the user's arguments from ``option``; ``fixed`` (the learning rate, …) have options of their own and
    cannot be among them.
    """
    clash = next((key for key in given if key in fixed), None)
    if clash:
        raise UserError(f'{option} cannot set "{clash}" of {make.__name__}, because another option does.')
    parameters = inspect.signature(make).parameters
    names = [name for name in list(parameters)[len(positional) :] if name not in fixed]
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = next((key for key in given if key not in names), None)
    if unknown and not open_ended:
        takes = f"It takes {', '.join(names)}." if names else "It takes none."
        raise UserError(f'{option}: {make.__name__} has no argument "{unknown}".{did_you_mean(unknown, names)} {takes}')
    try:
        return make(*positional, **fixed, **given)
    except (TypeError, ValueError, AssertionError, NotImplementedError, AttributeError, KeyError) as error:
        raise UserError(f"{option}: {make.__name__} refuses its arguments: {error}") from error
