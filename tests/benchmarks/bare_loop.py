"""The least that a training can do: the frozen networks forward and backward, on fixed numbers, and nothing else."""

from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from library.data.batches import Batch
from library.training.denoising import DenoisingTask


class BareLoop:
    """Runs plain networks of diffusers and transformers that share the weights of a training's.

    ``batch`` gives shapes and ids. Only a shift of the token embeddings takes a gradient, as the rows of a training do.
    """

    def __init__(self, task: DenoisingTask, batch: Batch, *, checkpointing: bool):
        self.task, device = task, task.prompt_encoder.device
        self.unet = _twin(task.unet)
        self.encoders = [_twin(encoder) for encoder in task.prompt_encoder.text_encoders]
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
            for encoder in self.encoders:
                encoder.gradient_checkpointing_enable()
                encoder.train()
        self.shifts: list[Tensor] = []
        for encoder in self.encoders:
            table = encoder.get_input_embeddings()
            shift = torch.zeros(table.embedding_dim, device=device, dtype=table.weight.dtype, requires_grad=True)
            table.register_forward_hook(lambda _, __, output, shift=shift: output + shift)
            self.shifts.append(shift)
        self.ids = [ids.clamp(max=49407).to(device) for ids in batch.input_ids]
        self.sizes = batch.size_conditioning.to(device)
        latents = batch.latents.to(device)
        self.noisy, self.target = torch.randn_like(latents), torch.randn_like(latents)
        self.timesteps = torch.arange(len(batch), device=device) * 100 + 100

    def step(self) -> None:
        """Forward and backward once."""
        family = self.task.family
        conditioning = family.encode_prompts(self.encoders, self.ids, self.task.prompt_encoder.clip_skip)
        prediction = family.predict_noise(self.unet, self.noisy, self.timesteps, conditioning, self.sizes)
        (prediction - self.target).square().mean().backward()
        for shift in self.shifts:
            shift.grad = None


def _twin(model: nn.Module) -> nn.Module:
    """A plain model of the same class and settings, with the very tensors of ``model`` in it."""
    with init_empty_weights():
        make: Callable = getattr(type(model), "from_config", type(model))
        twin = make(model.config)
    weights = {name.replace("token_embedding.table.", "token_embedding."): t for name, t in model.state_dict().items()}
    twin.load_state_dict(weights, assign=True)
    for name, buffer in twin.named_buffers():  # what is in no state, such as numbers of positions
        twin.get_submodule(name.rpartition(".")[0]).register_buffer(
            name.rpartition(".")[2], buffer.to(model.device), persistent=False
        )
    return twin.requires_grad_(False).eval()
