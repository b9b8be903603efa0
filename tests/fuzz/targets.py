"""All targets, in the order of a run's own steps."""

from fuzz import models, pictures, tensors, texts, written

TARGETS = (*texts.TARGETS, *pictures.TARGETS, *tensors.TARGETS, *written.TARGETS, *models.TARGETS)
