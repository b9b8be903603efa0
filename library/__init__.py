"""Textual Inversion for Stable Diffusion: the package that both training scripts share."""
