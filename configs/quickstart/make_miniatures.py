"""Train the miniature Stable Diffusion models of the quickstart from nothing, on the world that ``world.py`` draws.

    python configs/quickstart/make_miniatures.py vae
    python configs/quickstart/make_miniatures.py sd
    python configs/quickstart/make_miniatures.py sdxl
    python configs/quickstart/make_miniatures.py sd --sharpen
    python configs/quickstart/make_miniatures.py sdxl --sharpen

``vae`` comes first, ``sd`` second, and ``sdxl`` starts from ``sd``; ``--sharpen`` goes on from the end of either, with
more robots and less noise, and writes a diffusers folder into ``--output``. Each stage keeps its result (and, while it
runs, checkpoints from which it can continue) in ``--work``. Everything derives from ``--seed``; another one wants
another ``--work``. The shipped models came from these stages with other random draws, so the same commands do not give
the very same weights. One stage more, ``concepts``, draws the pictures to learn from.
"""

import argparse
import copy
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import world
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from miniature_vae import draw_pictures, new_vae, to_signed, train_vae
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "tokenizer"
BATCH = 32
PICTURES = 24576
TABLE_SPREAD = 0.014  # standard deviation of the token table's entries in Stable Diffusion 1
SIDE = world.SIZE // 8  # of the latents
LATENT_SPREAD = 0.25  # of the scaled latents: lower than the usual 1, so that even coarse content is lost in the noise


# --- text ----------------------------------------------------------------------------------------------------------


class Vocabulary:
    """The CLIP tokens that the world's captions use, numbered from 0 while training: all other rows stay zero."""

    def __init__(self, captions: list[str]) -> None:
        tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        encoded = tokenizer(["", *captions], padding="max_length", max_length=77).input_ids
        self.full_size = len(tokenizer)
        encoded = torch.tensor(encoded)
        self.used = torch.cat([encoded.unique(), torch.tensor([0])]).unique()  # id 0 fills up SDXL's second encoder
        numbers = torch.searchsorted(self.used, encoded)
        self.empty, self.captions = numbers[0], numbers[1:]
        self.start, self.end = int(self.empty[0]), int(self.empty[-1])

    def text_config(self, width: int, layers: int) -> CLIPTextConfig:
        """A CLIP text encoder that knows only the used tokens."""
        return CLIPTextConfig(
            vocab_size=len(self.used),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            bos_token_id=self.start,
            eos_token_id=self.end,
            pad_token_id=self.end,
        )

    def full(self, encoder: CLIPTextModel) -> CLIPTextModel:
        """The same encoder with the whole CLIP vocabulary; unused tokens have rows of zeros.

        The token and position tables are scaled to ``TABLE_SPREAD``, and with them all that is added to their sum, so
        the normalised states stay as they are: learning rates known from Stable Diffusion then mean the same here.
        """
        config = copy.deepcopy(encoder.config)
        config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = (
            self.full_size,
            49406,
            49407,
            49407,
        )
        scale = table_scale(encoder)
        config.layer_norm_eps *= scale**2
        state = encoder.state_dict()
        for name, tensor in state.items():
            if (
                name.endswith(("token_embedding.weight", "position_embedding.weight"))
                or ".out_proj." in name
                or ".fc2." in name
            ):
                state[name] = tensor * scale
            if name.endswith("token_embedding.weight"):
                table = torch.zeros(self.full_size, tensor.shape[1])
                table[self.used] = state[name]
                state[name] = table
        whole = type(encoder)(config)
        whole.load_state_dict(state)
        return whole.eval()


def table_scale(encoder: CLIPTextModel) -> float:
    """What brings the encoder's token table to ``TABLE_SPREAD``."""
    return TABLE_SPREAD / encoder.get_input_embeddings().weight.std().item()


# --- the denoisers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """How a denoiser is trained for a while; ``suffix`` tells its checkpoint from that of the other phase.

    ``robots`` is how many times as often as other pictures those of robots are drawn. Timesteps are drawn as
    u ** ``timestep_power``, u uniform, and the loss at a timestep has the weight sqrt((1 - signal) / signal), held
    between ``least_weight`` and 5.
    """

    suffix: str
    seed: int  # added to --seed
    steps: dict[str, int]
    rate: float
    climb: int  # steps
    descent: float  # share of the steps
    robots: float
    timestep_power: float
    least_weight: float


# Composition is decided where there is much noise; the spikes of a star that is a robot's head where there is little.
COMPOSE = Phase(
    suffix="",
    seed=1,
    steps={"sd": 9000, "sdxl": 2000},
    rate=1e-3,
    climb=200,
    descent=0.3,
    robots=1.0,
    timestep_power=0.7,
    least_weight=0.5,
)
SHARPEN = Phase(
    suffix="_sharp",
    seed=77,
    steps={"sd": 4000, "sdxl": 4000},
    rate=7e-4,
    climb=100,
    descent=0.7,
    robots=2.5,
    timestep_power=1.0,
    least_weight=1.0,
)


class Miniature(torch.nn.Module):
    """Text encoders and U-Net of one model; ``encoders`` holds one (SD) or two (SDXL)."""

    def __init__(self, vocabulary: Vocabulary, xl: bool) -> None:
        super().__init__()
        self.xl = xl
        if xl:
            second = CLIPTextModelWithProjection(vocabulary.text_config(96, 3))
            self.encoders = torch.nn.ModuleList([CLIPTextModel(vocabulary.text_config(64, 3)), second])
        else:
            self.encoders = torch.nn.ModuleList([CLIPTextModel(vocabulary.text_config(64, 2))])
        width = sum(encoder.config.hidden_size for encoder in self.encoders)
        extra = {}
        if xl:
            extra = {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 16,
                "projection_class_embeddings_input_dim": 96 + 6 * 16,
                "use_linear_projection": True,
            }
        self.unet = UNet2DConditionModel(
            sample_size=SIDE,
            block_out_channels=(32, 64, 128, 128),
            layers_per_block=1,
            cross_attention_dim=width,
            attention_head_dim=4,
            norm_num_groups=16,
            # The finest level only sharpens what the others lay out, and costs little without attention.
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            **extra,
        ).to(memory_format=torch.channels_last)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor, sizes: torch.Tensor
    ) -> torch.Tensor:
        """Predicted noise [B, 4, 16, 16]; ids [B, 77] of compact numbers, sizes [B, 6] (used by SDXL only)."""
        if not self.xl:
            return self.unet(noisy, timesteps, self.encoders[0](ids).last_hidden_state).sample
        # SDXL's second tokenizer fills up with id 0 instead of the end token.
        after_end = (ids == self.encoders[1].config.eos_token_id).cumsum(dim=1) > 1
        inputs = (ids, ids.masked_fill(after_end, 0))
        outputs = [encoder(own, output_hidden_states=True) for encoder, own in zip(self.encoders, inputs, strict=True)]
        context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        conditions = {"text_embeds": outputs[1].text_embeds, "time_ids": sizes}
        return self.unet(noisy, timesteps, context, added_cond_kwargs=conditions).sample


def noise_scheduler() -> DDIMScheduler:
    """The schedule of Stable Diffusion."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def checkpoint_of(work: Path, xl: bool, phase: Phase) -> Path:
    """Where the state of a denoiser in a phase is kept."""
    return work / f"{'sdxl' if xl else 'sd'}{phase.suffix}.pt"


@torch.no_grad()
def world_latents(work: Path, count: int, seed: int) -> tuple[torch.Tensor, list[str], float]:
    """Latents in the VAE's own scale [count, 4, 16, 16], captions, the latents' spread; kept in ``work``."""
    kept = work / "latents.pt"
    if kept.exists():
        return torch.load(kept)
    pictures, captions = draw_pictures(count, seed)
    vae = AutoencoderKL.from_pretrained(work / "vae").to(memory_format=torch.channels_last)
    batches = [vae.encode(to_signed(part).to(memory_format=torch.channels_last)) for part in pictures.split(128)]
    latents = torch.cat([batch.latent_dist.mean for batch in batches]).contiguous()
    result = (latents, captions, latents.std().item())
    torch.save(result, kept)
    return result


def draw_timesteps(count: int, power: float) -> torch.Tensor:
    """Timesteps, evenly with a power of 1; below 1 with a density that grows with the noise."""
    return (torch.rand(count) ** power * 1000).long().clamp(max=999)


def learning_rate_at(step: int, steps: int, phase: Phase) -> float:
    """A short climb, a plateau, a long descent."""
    return phase.rate * min(1.0, (step + 1) / phase.climb, max(0.01, (steps - step) / (phase.descent * steps)))


def starting_state(work: Path, xl: bool, phase: Phase) -> dict | None:
    """The state that a phase starts from; None where it starts from nothing.

    Ends the program with a sentence where that is missing, unfinished or newer than the phase's own checkpoint.
    """
    if phase is COMPOSE and not xl:
        return None
    from_xl = xl and phase is SHARPEN
    earlier, own = checkpoint_of(work, from_xl, COMPOSE), checkpoint_of(work, xl, phase)
    if not earlier.exists() or (state := torch.load(earlier))["step"] < state["steps"]:
        raise SystemExit(f"{earlier} is missing or not finished: run the stage {'sdxl' if from_xl else 'sd'} first.")
    if own.exists() and own.stat().st_mtime < earlier.stat().st_mtime:
        raise SystemExit(f"{own} is older than {earlier}, which it starts from: move it away to train it anew.")
    return state


def train_denoiser(work: Path, xl: bool, phase: Phase, steps: int, seed: int) -> None:
    """Train text encoders and U-Net together; a file in ``work`` holds averaged weights and what resuming needs."""
    if not (work / "vae").exists():
        raise SystemExit(f"There is no VAE in {work}: run the stage vae first.")
    start = starting_state(work, xl, phase)
    torch.manual_seed(seed + phase.seed)
    latents, captions, spread = world_latents(work, PICTURES, seed)
    latents = latents * (LATENT_SPREAD / spread)
    shares = torch.tensor([phase.robots if "robot" in caption else 1.0 for caption in captions])
    vocabulary = Vocabulary(captions)
    model = Miniature(vocabulary, xl)
    logger.info("%d tokens, U-Net %.2f M parameters", len(vocabulary.used), model.unet.num_parameters() / 1e6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.rate, betas=(0.9, 0.99), weight_decay=1e-3)
    checkpoint = checkpoint_of(work, xl, phase)
    kept = torch.load(checkpoint) if checkpoint.exists() else None
    if kept or phase is SHARPEN:
        state = kept or start
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    elif xl:
        begin_from_sd(model, start["averaged"], vocabulary.captions[:256])
    averaged = copy.deepcopy(model).requires_grad_(False)
    first = 0
    if kept:
        averaged.load_state_dict(kept["averaged"])
        torch.set_rng_state(kept["random"])
        first = kept["step"]
    signal = noise_scheduler().alphas_cumprod
    weights = ((1 - signal) / signal).sqrt().clamp(phase.least_weight, 5.0)
    started, losses = time.monotonic(), []
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, phase)
        chosen = torch.multinomial(shares, BATCH)
        ids = torch.where(torch.rand(BATCH, 1) < 0.1, vocabulary.empty, vocabulary.captions[chosen])
        timesteps, noise = draw_timesteps(BATCH, phase.timestep_power), torch.randn(BATCH, 4, SIDE, SIDE)
        level = signal[timesteps].view(-1, 1, 1, 1)
        noisy = level.sqrt() * latents[chosen] + (1 - level).sqrt() * noise
        errors = (model(noisy, timesteps, ids, draw_sizes(BATCH)) - noise).square().mean(dim=(1, 2, 3))
        loss = (weights[timesteps] * errors).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        kept_share = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - kept_share)
        if (step + 1) % 100 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            logger.info("%s step %d: loss %.4f, %.2f s a step", checkpoint.stem, step + 1, np.mean(losses[-100:]), pace)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {
                "model": model.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            partial = checkpoint.with_suffix(".partial")
            torch.save({**state, "random": torch.get_rng_state(), "step": step + 1, "steps": steps}, partial)
            partial.replace(checkpoint)


def export(work: Path, output: Path, xl: bool, seed: int) -> None:
    """Write the averaged weights as a diffusers folder in half precision; the tokenizer is the one in ``configs``."""
    _, captions, spread = world_latents(work, PICTURES, seed)
    vocabulary = Vocabulary(captions)
    model = Miniature(vocabulary, xl)
    model.load_state_dict(torch.load(checkpoint_of(work, xl, SHARPEN))["averaged"])
    scales = [table_scale(encoder) for encoder in model.encoders]
    encoders = [vocabulary.full(encoder) for encoder in model.encoders]
    if xl:  # SDXL takes states before the final normalisation, so they shrank with the tables.
        undo = torch.cat([torch.full((e.config.hidden_size,), 1 / s) for e, s in zip(encoders, scales, strict=True)])
        for name, parameter in model.unet.named_parameters():
            if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
                parameter.data *= undo
    vae = new_vae()
    vae.load_state_dict(AutoencoderKL.from_pretrained(work / "vae").state_dict())
    factor = 0.13025 if xl else 0.18215
    rescale_latents(vae, LATENT_SPREAD / factor / spread)
    vae.register_to_config(scaling_factor=factor)
    folder = output / ("sdxl" if xl else "sd")
    parts = {"text_encoder": encoders[0], "unet": model.unet, "vae": vae} | (
        {"text_encoder_2": encoders[1]} if xl else {}
    )
    for name, part in parts.items():
        part.half().save_pretrained(folder / name)
        for file in (folder / name).iterdir():
            file.chmod(0o644)  # safetensors files are born unreadable for others
    noise_scheduler().save_pretrained(folder / "scheduler")
    kinds = {
        name: ("transformers" if "encoder" in name else "diffusers", type(part).__name__)
        for name, part in parts.items()
    }
    kinds["scheduler"] = ("diffusers", "DDIMScheduler")
    kinds |= dict.fromkeys(("tokenizer", "tokenizer_2")[: len(encoders)], ("transformers", "CLIPTokenizer"))
    index = {"_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"} | dict(
        sorted(kinds.items())
    )
    if not xl:
        index |= {"safety_checker": (None, None), "feature_extractor": (None, None), "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def rescale_latents(vae: AutoencoderKL, scale: float) -> None:
    """Multiply what the VAE encodes to by ``scale`` and undo it before decoding."""
    channels = vae.config.latent_channels
    vae.quant_conv.weight[:channels] *= scale
    vae.quant_conv.bias[:channels] *= scale
    vae.quant_conv.bias[channels:] += 2 * math.log(scale)
    vae.post_quant_conv.weight /= scale


@torch.no_grad()
def begin_from_sd(model: Miniature, learned: dict[str, torch.Tensor], captions: torch.Tensor) -> None:
    """Start the SDXL miniature where the SD one ended; its second encoder and its size embedding begin mute.

    SDXL's U-Net reads the first encoder before the final normalisation, so that is put into the attention's weights.
    """
    own = model.state_dict()
    for name, tensor in own.items():
        if name in learned and learned[name].numel() == tensor.numel():
            tensor.copy_(learned[name].reshape(tensor.shape))  # 1 × 1 convolutions become linear layers
    first = model.encoders[0]
    spread = first(captions, output_hidden_states=True).hidden_states[-2].std(dim=-1).mean()
    width = first.config.hidden_size
    for name, tensor in own.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            tensor.zero_()
            tensor[:, :width] = learned[name] * learned["encoders.0.final_layer_norm.weight"] / spread
    model.unet.add_embedding.linear_2.weight.zero_()
    model.unet.add_embedding.linear_2.bias.zero_()


def draw_sizes(count: int) -> torch.Tensor:
    """SDXL's size conditioning [count, 6]: original size, crop corner, target size. Random, so that it says nothing."""
    sizes = torch.zeros(count, 6)
    sizes[:, :2] = torch.randint(32, 513, (count, 1))
    sizes[:, 4:] = world.SIZE
    return sizes


def write_concepts(output: Path) -> None:
    """Draw the concepts' pictures and captions into ``mychar`` and ``mystyle``."""
    for name, examples in (("mychar", world.character_concept()), ("mystyle", world.style_concept())):
        (output / name).mkdir(parents=True, exist_ok=True)
        for number, (picture, caption) in enumerate(examples, start=1):
            Image.fromarray(picture).save(output / name / f"{number}.png", optimize=True)
            (output / name / f"{number}.txt").write_text(caption + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the miniature models of the quickstart.")
    parser.add_argument("stage", choices=("concepts", "vae", "sd", "sdxl"))
    parser.add_argument("--work", type=Path, default=Path("output/miniatures"))
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sharpen", action="store_true", help="go on from the finished sd or sdxl")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.sharpen and options.stage not in ("sd", "sdxl"):
        parser.error("--sharpen goes with the stages sd and sdxl")
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage == "concepts":
        write_concepts(options.output)
    elif options.stage == "vae":
        train_vae(options.work, options.seed)
    else:
        phase, xl = SHARPEN if options.sharpen else COMPOSE, options.stage == "sdxl"
        train_denoiser(options.work, xl, phase, options.steps or phase.steps[options.stage], options.seed)
        if options.sharpen:
            export(options.work, options.output, xl, options.seed)


if __name__ == "__main__":
    main()
