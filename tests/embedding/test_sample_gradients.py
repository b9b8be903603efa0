"""The normalized gradient of each sample is that of a backward of its own."""

import pytest
import torch
from datasets import prompts
from tiny_models import build_pipeline

from library.embedding.prompt_encoder import PromptEncoder
from library.embedding.sample_gradients import with_normalized_gradients
from library.embedding.tokenizer import TrainableRows, token_table
from library.model.family import FAMILIES

CAPTIONS = ["a mychar in a park", "mychar mychar2", "no such word", "the red, red mychar of my own"]
SHARES = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def encoder(request):
    """Text encoders in float64 with three vectors of a word, and prompts of two windows."""
    pipeline = build_pipeline(request.param)
    encoders = [pipeline.text_encoder.double().requires_grad_(False)]
    if request.param == "sdxl":
        encoders.append(pipeline.text_encoder_2.double().requires_grad_(False))
    rows = TrainableRows([token_table(each).weight[[320, 1125, 2368]] for each in encoders]).double()
    family = FAMILIES["sdxl" if request.param == "sdxl" else "sd"]
    return PromptEncoder(family, encoders, prompts(3, limit=150, encoders=len(encoders)), rows)


def ids_of(encoder, captions):
    encoded = [encoder.prompts.encode(encoder.prompts.placeholder.expand(caption)) for caption in captions]
    return [torch.stack(ids) for ids in zip(*encoded, strict=True)]


def losses(conditioning, captions):
    """One number a sample, of any size, that all of its conditioning takes part in."""
    weights = torch.linspace(-1, 1, conditioning.context[0].numel(), dtype=torch.float64)
    scale = torch.tensor([10.0 ** len(caption) / 1e12 for caption in captions], dtype=torch.float64)
    found = (conditioning.context.flatten(1) * weights).sum(1).square()
    return scale * (found if conditioning.pooled is None else found + conditioning.pooled.square().sum(1))


def gradients(encoder):
    found = [rows.grad.clone() for rows in encoder.rows.rows]
    encoder.rows.zero_grad()
    return found


@pytest.mark.parametrize("cached", [False, True])
def test_they_equal_separate_backwards(cached, encoder):
    """With samples whose gradients differ by ten orders of magnitude, one that lacks the word, one that weighs 0."""
    encoder._cache.clear()
    singles = []
    for caption in CAPTIONS:
        losses(encoder.encode(ids_of(encoder, [caption])), [caption]).sum().backward()
        singles.append(gradients(encoder))
    norms = [torch.cat([each.flatten() for each in single]).norm() for single in singles]
    assert norms[2] == 0
    assert norms[3] > 1e6 * norms[1] > 0
    expected = [
        sum(share * each / (norm + 1e-12) for share, norm, each in zip(SHARES.tolist(), norms, of_encoder, strict=True))
        for of_encoder in zip(*singles, strict=True)
    ]
    if cached:
        assert encoder.cache([ids_of(encoder, [caption]) for caption in CAPTIONS]) == (1, 3)
    weighed = losses(encoder.encode(ids_of(encoder, CAPTIONS), SHARES), CAPTIONS) * SHARES
    weighed.sum().backward()
    for found, wanted in zip(gradients(encoder), expected, strict=True):
        assert wanted.norm() > 0.1
        assert (found - wanted).abs().max() < 1e-6


def test_a_gradient_that_is_not_finite_stays_so():
    """The guard must see it, and fp16's scaler."""
    rows = torch.ones(2, 3, requires_grad=True)
    (copies,) = with_normalized_gradients([rows], torch.ones(2))
    copies.backward(torch.tensor([1.0, torch.inf]).reshape(2, 1, 1).expand(2, 2, 3))
    assert not torch.isfinite(rows.grad).all()
