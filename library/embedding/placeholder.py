"""The token as text: the names of its vectors, where they stand in a caption, and their expansion.

Everything that reads a caption or a prompt (training, checks, samples, saved hints) goes through this module, so the
word means the same everywhere. Ids and vectors are the business of ``tokenizer.py``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

# A name ends where no ASCII letter or digit follows: `mychar_(x)` and `mycharの` hold the token, `mychars` does not.
_BEFORE, _AFTER = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"


@dataclass(frozen=True)
class Placeholder:
    """The token and its ``count`` vectors, named ``T, T1, T2, …``.

    Matching ignores case and wants whole words, a boundary being "no ASCII letter or digit beside it".
    """

    text: str
    count: int = 1

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The N names in vector order."""
        return (self.text, *(f"{self.text}{i}" for i in range(1, self.count)))

    @property
    def expanded(self) -> str:
        """All N names joined by spaces: what one occurrence of the word stands for."""
        return " ".join(self.names)

    @cached_property
    def _longest_first(self) -> list[int]:
        # So that "mychar1" is never read as "mychar" where a name ends in a sign that is no letter or digit.
        return sorted(range(self.count), key=lambda row: -len(self.names[row]))

    @cached_property
    def _any_name(self) -> re.Pattern[str]:
        """Each name is a group of its own, in the order of ``_longest_first``."""
        names = "|".join(f"({re.escape(self.names[row])})" for row in self._longest_first)
        return re.compile(f"{_BEFORE}(?:{names}){_AFTER}", re.IGNORECASE)

    @cached_property
    def _run_or_word(self) -> re.Pattern[str]:
        run = r"\s+".join(map(re.escape, self.names))
        return re.compile(f"{_BEFORE}(?:{run}|{re.escape(self.text)}){_AFTER}", re.IGNORECASE)

    def found_in(self, text: str) -> bool:
        """Whether the word, or any one of its vectors' names, stands in ``text``."""
        return self._any_name.search(text) is not None

    def expand(self, text: str) -> str:
        """Replace each occurrence of the word by the names of all its vectors.

        A run that is expanded already stays as it is, and so does the name of a single later vector (``mychar2``).
        """
        if self.count == 1:
            return text
        return self._run_or_word.sub(lambda _: self.expanded, text)

    def replace(self, text: str, word: str) -> str:
        """Write ``word`` in place of each occurrence of this one, expanded or not, and of each single vector's name."""
        return self._any_name.sub(lambda _: word, self._run_or_word.sub(lambda _: word, text))

    def rewrite_between(self, text: str, rewrite: Callable[[str], str]) -> str:
        """Apply ``rewrite`` to what stands before, between and behind the names, which stay as they are."""
        pieces: list[str] = []
        end = 0
        for found in self._any_name.finditer(text):
            pieces += [rewrite(text[end : found.start()]), found[0]]
            end = found.end()
        return "".join([*pieces, rewrite(text[end:])])

    def split(self, text: str) -> list[str | int]:
        """Cut ``text`` into plain pieces (str) and vector numbers (int), in order; empty pieces are left out.

        The text is taken as it stands; call :meth:`expand` first.
        """
        pieces: list[str | int] = []
        end = 0
        for found in self._any_name.finditer(text):
            group = found.lastindex or 0  # never 0: each name is a group
            pieces += [text[end : found.start()], self._longest_first[group - 1]]
            end = found.end()
        return [piece for piece in [*pieces, text[end:]] if piece != ""]
