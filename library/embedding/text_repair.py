"""Text as CLIP's own tokenizer reads it: repaired by ftfy before anything is looked for in it.

CLIP was trained on text that ftfy had repaired, and sd-scripts' tokenizer repairs with it too: curly quotes become
straight, full-width letters and signs plain, ligatures letters, HTML entities signs, and mojibake what was meant.
"""

import re
from functools import lru_cache

import ftfy

from library.embedding.placeholder import Placeholder
from library.support.errors import UserError
from library.support.text_files import check_lines

# Of plain ASCII, only entities and control characters are ever changed.
_PLAIN = re.compile(r"[\t\n -%'-~]*")


def _wide(text: str) -> str:
    """A pattern for ASCII text, each of its signs plain or full-width."""
    return "".join(f"[{re.escape(sign)}{chr(ord(sign) + 0xFEE0)}]" for sign in text)


# "&amp;amp;amp;" is "&" in the end, but ftfy goes over the whole line for each "amp;". Its ways to write "&":
_CODES = f"{_wide('#')}{_wide('0')}{{0,9}}{_wide('38')}|{_wide('#x')}{_wide('0')}{{0,9}}{_wide('26')}"
_AMPERSANDS = re.compile(rf"([&＆])(?:(?:{_wide('amp')}|{_wide('AMP')}|{_CODES}){_wide(';')}){{2,}}")


def repair(text: str) -> str:
    """Return ``text`` with each of its lines repaired; no line is added, whatever ftfy takes for a line break."""
    if _PLAIN.fullmatch(text):
        return text
    return "\n".join(map(_repaired_line, text.split("\n")))


def repaired_around(word: Placeholder, text: str) -> str:
    """Return ``text`` as it is read: repaired around the word's names, which then may be found in more places.

    Around them, for so sd-scripts does: a ``<`` in the word itself does not tell ftfy that this is HTML. Raises
    UserError for a line that is too long to be of a caption.
    """
    check_lines(text, f'The caption "{text[:40]}…"')
    return word.rewrite_between(text, repair)


def check_spelling(word: Placeholder) -> None:
    """Raise UserError for a token that no caption can hold as it is written."""
    text = word.text
    if not text or text != text.strip() or len(text.splitlines()) > 1:
        raise UserError(
            f"--token_string {text!r} cannot be a token: it must not be empty, begin or end with a space, or hold a "
            'line break. Give a made-up word such as "mychar".'
        )
    if (read := repair(text)) != text:
        raise UserError(
            f'--token_string "{text}" would never be found: text is repaired before it is read, and this becomes '
            f'"{read}" in every caption. Give --token_string="{read}", or another made-up token.'
        )


@lru_cache(maxsize=20_000)  # captions come again in every epoch; ftfy takes as long as the tokenizer
def _repaired_line(line: str) -> str:
    if "<" not in line:  # where ftfy leaves entities alone
        line = _AMPERSANDS.sub(r"\1amp;", line)
    return ftfy.fix_text(line).replace("\n", " ")
