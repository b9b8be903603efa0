"""What a run has come to, in one word with its reason: the same on the console, in the JSON report and on the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from library.output.report import BARELY_MOVED_PERCENT
from library.output.vector_meter import VectorState, far_times

# Of the distance that the start's images have to the training images. Words that a model knows, drawn twice from the
# same noise, differ by a few percent.
LEARNED_BELOW, NOT_LEARNED_ABOVE = 0.85, 0.95

LEARNED, HARDLY_CHANGED, NOT_LEARNED, TOO_FAR, UNCLEAR = (
    "LEARNED",
    "HARDLY CHANGED",
    "NOT LEARNED",
    "TOO FAR",
    "UNCLEAR",
)


@dataclass(frozen=True)
class Verdict:
    """One of the words above, and a sentence that says why."""

    verdict: str
    reason: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"


@dataclass(frozen=True)
class Distances:
    """Of images to the training images: those of the start (its ``label``), and those of the token."""

    label: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """How many times as far the token's images are."""
        return self.after / max(self.before, 1e-9)


def judge(vectors: Sequence[VectorState], distances: Distances | None, *, samples: bool) -> Verdict:
    """The verdict on trained ``vectors``: by what was measured, where it was, and by how far they went.

    ``samples``: whether there are sample images to look at.
    """
    if all(not vector.moved.percent >= BARELY_MOVED_PERCENT for vector in vectors):
        return Verdict(
            HARDLY_CHANGED,
            f"every vector moved less than {BARELY_MOVED_PERCENT:g} % of its length, so images look as those of the "
            "start. Raise --learning_rate or --max_train_steps, and check that the captions hold the token.",
        )
    if times := far_times(vectors):
        return Verdict(
            TOO_FAR,
            f"norms of up to {times:,.0f} times a usual word's drown out the rest of a prompt. Lower --learning_rate, "
            "or use a file saved earlier in the run.",
        )
    if distances is None:
        return Verdict(UNCLEAR, _nothing_measured(samples))
    if distances.ratio <= LEARNED_BELOW:
        return Verdict(LEARNED, f"{_compared(distances)}.")
    if distances.ratio > NOT_LEARNED_ABOVE:
        return Verdict(
            NOT_LEARNED,
            f"{_compared(distances)}. Train for more steps or at another --learning_rate, and look at the images and "
            "captions.",
        )
    return Verdict(UNCLEAR, f"{_compared(distances)}, which may be chance. Look at the sheet of the learning report.")


def _compared(distances: Distances) -> str:
    return (
        f"images drawn with the token are {distances.ratio:.2f} times as far from the training images as those of "
        f"{distances.label}"
    )


def _nothing_measured(samples: bool) -> str:
    if samples:
        return "nothing was measured. Look at the sample images, or add --learning_report for a number."
    return "nothing was measured. Add --learning_report for a number, or --sample_prompts for images to look at."
