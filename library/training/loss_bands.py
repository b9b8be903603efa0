"""The loss by how noisy the image was: a mean over all timesteps hides that each part learns at its own pace."""

import math

from torch import Tensor

from library.training.diffusion import NUM_TIMESTEPS

BANDS = tuple((low, low + NUM_TIMESTEPS // 4 - 1) for low in range(0, NUM_TIMESTEPS, NUM_TIMESTEPS // 4))


class LossBands:
    """Collects the losses of training samples with their timesteps; nothing waits for the device until they are read.

    Of several processes each collects its own samples.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Tensor]] = []

    def see(self, timesteps: Tensor, losses: Tensor) -> None:
        """Note the ``losses`` [B] at ``timesteps`` [B]; those of a measurement, which teach nothing, do not count."""
        if losses.requires_grad:
            self._seen.append((timesteps, losses.detach()))

    def take(self) -> dict[str, float]:
        """The mean loss of each band since the last call, by its name ("loss/0-249"); bands without samples are out."""
        seen = [
            pair for timesteps, losses in self._seen for pair in zip(timesteps.tolist(), losses.tolist(), strict=True)
        ]
        self._seen = []
        found = {}
        for low, high in BANDS:
            values = [loss for timestep, loss in seen if low <= timestep <= high and math.isfinite(loss)]
            if values:
                found[band_name(low, high)] = sum(values) / len(values)
        return found


def band_name(low: int, high: int) -> str:
    """What a band's loss is called in the metrics file."""
    return f"loss/{low}-{high}"
