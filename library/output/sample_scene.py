"""The image and the hole of a sample prompt for an inpainting model."""

import random

import torch
from torch import Tensor

from library.data.buckets import Size, covering_size
from library.data.images import Framing, check_mask_size, check_resized, frame_image, frame_mask, image_size, to_tensor
from library.data.random_masks import preview_mask
from library.output.sample_prompts import SamplePrompt
from library.support.errors import UserError


def scene(prompt: SamplePrompt) -> tuple[Tensor, Tensor]:
    """The image of a sample prompt, float32 [3, H, W] in [-1, 1], and its hole, [1, H, W].

    The image is resized to cover the prompt's size and cropped, the mask likewise. Without a mask, an ellipse that
    depends on the prompt's seed is hidden; without an image, all is.
    """
    size = prompt.width, prompt.height
    if prompt.image is None:
        return torch.zeros(3, *size[::-1]), torch.ones(1, *size[::-1])
    given = image_size(prompt.image)
    framing = _framing(prompt, prompt.image, given)
    pixels = frame_image(prompt.image, framing).pixels
    if prompt.mask_image is not None:
        hole = frame_mask(prompt.mask_image, given, framing, image_path=prompt.image) >= 0.5
    else:
        hole = preview_mask(size, random.SystemRandom() if prompt.seed is None else random.Random(prompt.seed))
    return to_tensor(pixels), torch.from_numpy(hole)[None].float()


def check_scene(prompt: SamplePrompt) -> None:
    """Raise UserError, naming the prompt, where its image or its mask cannot be used; it reads headers only."""
    if prompt.image is None:
        return
    try:
        size = image_size(prompt.image)
        _framing(prompt, prompt.image, size)
        if prompt.mask_image is not None:
            check_mask_size(image_size(prompt.mask_image), prompt.mask_image, size, prompt.image)
    except UserError as error:
        raise UserError(f'The sample prompt "{prompt.prompt:.60}": {error}') from error


def _framing(prompt: SamplePrompt, image: str, given: Size) -> Framing:
    """How an image of the size ``given`` is resized and cropped. Raises UserError if it would grow beyond measure."""
    size = prompt.width, prompt.height
    resized = covering_size(given, size)
    check_resized(image, given, resized, size)
    return Framing(resized, size)
