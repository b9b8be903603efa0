"""A mean over the latest of many values, for what jumps too much to be read as it is."""


class RunningMean:
    """A mean that forgets: over about the latest ``over`` values, and unbiased from the first one on."""

    def __init__(self, over: float) -> None:
        self._keep = 1 - 2 / (over + 1)
        self._total = self._weight = 0.0

    def add(self, value: float) -> float:
        """The mean with one more value."""
        self._total = self._keep * self._total + (1 - self._keep) * value
        self._weight = self._keep * self._weight + (1 - self._keep)
        return self._total / self._weight


def readable_span(count: int) -> float:
    """Over how many of ``count`` values a mean is calm and still shows where they go."""
    return min(max(count / 10, 4), 100)
