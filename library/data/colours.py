"""``--color_aug``: images whose colours are shifted a little, at random."""

import random

import numpy as np


def color_augment(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """In a third of the calls turn the hue of uint8 [H, W, 3] by up to 16 degrees, or bend its gamma by up to 5 %."""
    if rng.random() > 0.33:
        return pixels
    if rng.random() > 0.5:
        return shift_hue(pixels, rng.uniform(-16, 16))
    return shift_gamma(pixels, rng.uniform(0.95, 1.05))


def shift_gamma(pixels: np.ndarray, gamma: float) -> np.ndarray:
    """Raise values, taken as [0, 1], to the power of ``gamma``: black and white stay."""
    table = (np.arange(256) / 255) ** gamma * 255
    bent: np.ndarray = table.round().astype(np.uint8)[pixels]
    return bent


def shift_hue(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """Turn the hue of uint8 [H, W, 3] by ``degrees``; saturation, value and greys stay."""
    colours = pixels.astype(np.float32)
    value, chroma = colours.max(2), np.ptp(colours, axis=2)
    red, green, blue = np.moveaxis(colours, 2, 0)
    safe = np.where(chroma > 0, chroma, 1)
    sextant = np.select(
        [value == red, value == green], [(green - blue) / safe, 2 + (blue - red) / safe], 4 + (red - green) / safe
    )
    # Each channel is full within one sextant of its own hue, falls to nothing over the next: the usual HSV formula.
    turned = [(shift + sextant + degrees / 60) % 6 for shift in (5, 3, 1)]
    mixed = [value - chroma * np.minimum(t, 4 - t).clip(0, 1) for t in turned]
    return np.stack(mixed, axis=2).round().clip(0, 255).astype(np.uint8)
