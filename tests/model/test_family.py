"""Prompts to conditioning and the U-Net call, for both families."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_data import GOLDEN_DIR, golden_arrays, golden_cases
from safetensors import safe_open
from tiny_models import build_pipeline, build_unet, text_config
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.model.family import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, Conditioning
from library.support.errors import UserError

BOS, EOS, NEW = 49406, 49407, 49408


@pytest.fixture(scope="module")
def golden_encoders():
    """The two tiny CLIP models of the golden cases, keyed te1 and te2."""
    with safe_open(GOLDEN_DIR / "text_encoding_models.safetensors", "pt") as file:
        configs = {name: json.loads(value) for name, value in file.metadata().items()}
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    return {name: _golden_encoder(config, tensors, name) for name, config in configs.items()}


def _golden_encoder(config: dict, tensors: dict, name: str):
    projected = config.pop("class") == "CLIPTextModelWithProjection"
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**config)).eval()
    state = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    if not projected:
        state = {k.removeprefix("text_model."): v for k, v in state.items()}
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("case", golden_cases("text_encoding"))
def test_golden_text_encoding(case, golden_encoders):
    arrays = golden_arrays("text_encoding")
    ids = [torch.tensor(one) for one in case["input_ids"]]
    if case["model"] == "sdxl":
        encoders, family, clip_skip = [golden_encoders["te1"], golden_encoders["te2"]], STABLE_DIFFUSION_XL, None
    else:
        encoders, family, clip_skip = [golden_encoders["te1"]], STABLE_DIFFUSION, case["clip_skip"]
    with torch.no_grad():
        got = family.encode_prompts(encoders, ids, clip_skip, end_of_text=50)
    names = ("h1", "h2", "pool") if case["model"] == "sdxl" else ("h",)
    wanted = [arrays[case["npz_prefix"] + name] for name in names]
    np.testing.assert_allclose(got.context.numpy(), np.concatenate(wanted[: len(ids)], axis=-1), atol=2e-5)
    if case["model"] == "sdxl":
        np.testing.assert_allclose(got.pooled.numpy(), wanted[2], atol=2e-5)


@pytest.mark.parametrize("case", golden_cases("sdxl_size_embeddings"))
def test_golden_size_embeddings(case):
    """The U-Net's own sinusoids of the six sizes, in the order in which the family hands them over."""
    sizes = torch.tensor([[*case["original_hw"], *case["crop_top_left"], *case["target_hw"]]])
    seen = {}
    unet = build_unet("sdxl", addition_time_embed_dim=256, projection_class_embeddings_input_dim=64 + 6 * 256)
    unet.add_embedding.register_forward_pre_hook(lambda _, args: seen.update(embedding=args[0]))
    conditioning = Conditioning(torch.zeros(1, 77, 96), torch.zeros(1, 64))
    with torch.no_grad():
        STABLE_DIFFUSION_XL.predict_noise(unet, torch.zeros(1, 4, 8, 8), torch.tensor([0]), conditioning, sizes)
    wanted = golden_arrays("sdxl_size_embeddings")[case["npz_key"]]
    # A sine of 1000 radians: the last bit of a float32 angle is 6e-5, and processors round it differently.
    np.testing.assert_allclose(seen["embedding"][:, 64:].numpy(), wanted, atol=5e-4)


def prompt(*body: int) -> list[int]:
    """One window of 77 ids, padded with EOS."""
    return [BOS, *body, *[EOS] * (76 - len(body))]


def encoder_with_new_rows(encoder, count: int = 2):
    """The encoder with ``count`` more table rows, as ids 49408 and up."""
    encoder.resize_token_embeddings(49408 + count, mean_resizing=False)
    return encoder.requires_grad_(False).eval()


def sdxl_encoders() -> list:
    torch.manual_seed(0)
    first = CLIPTextModel(text_config(32, 4, "quick_gelu"))
    second = CLIPTextModelWithProjection(text_config(64, 1, "gelu"))
    return [encoder_with_new_rows(first), encoder_with_new_rows(second)]


@pytest.mark.parametrize("eos_in_config", [49407, 2])
@pytest.mark.parametrize("body", [(320, 1125, 539), (320, 1125, NEW, NEW + 1), (NEW,)])
def test_pooled_vector_is_read_at_the_first_eos(body, eos_in_config):
    """Also with ids above EOS, and with the old configuration that makes transformers read at the largest id."""
    encoders = sdxl_encoders()
    encoders[1].text_model.eos_token_id = eos_in_config
    ids = torch.tensor([[prompt(*body)], [prompt(320, *body)]])
    with torch.no_grad():
        got = STABLE_DIFFUSION_XL.encode_prompts(encoders, [ids, ids])
        states = encoders[1].text_model(input_ids=ids[:, 0]).last_hidden_state
        wanted = [states[row, 1 + row + len(body)] @ encoders[1].text_projection.weight.T for row in (0, 1)]
    torch.testing.assert_close(got.pooled, torch.stack(wanted), atol=1e-6, rtol=0)


def test_sdxl_context_is_both_encoders_clip_skipped_states_without_norm():
    encoders = sdxl_encoders()
    ids = torch.tensor([[prompt(320, NEW)]])
    with torch.no_grad():
        states = [encoder(ids[0], output_hidden_states=True).hidden_states for encoder in encoders]
        for clip_skip, index in ((None, -2), (2, -2), (1, -1), (3, -3)):
            got = STABLE_DIFFUSION_XL.encode_prompts(encoders, [ids, ids], clip_skip).context
            torch.testing.assert_close(got, torch.cat([s[index] for s in states], dim=-1), atol=1e-6, rtol=0)
    assert got.shape == (1, 77, 96)


@pytest.mark.parametrize("clip_skip", [0, -1, 4, 100])
def test_clip_skip_beyond_the_layers_is_refused(clip_skip):
    encoder = CLIPTextModel(text_config(32, 4, "quick_gelu", layers=3))
    with pytest.raises(UserError, match="3 layers"):
        STABLE_DIFFUSION.encode_prompts([encoder], [torch.tensor([[prompt(320)]])], clip_skip)


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_windows_join_to_one_context(windows):
    encoder = CLIPTextModel(text_config(32, 4, "quick_gelu")).eval()
    ids = torch.tensor([[prompt(320 + 10 * b + n) for n in range(windows)] for b in range(2)])
    with torch.no_grad():
        got = STABLE_DIFFUSION.encode_prompts([encoder], [ids]).context
        alone = [encoder(ids[:, n]).last_hidden_state for n in range(windows)]
    assert got.shape == (2, 75 * windows + 2, 32)
    wanted = torch.cat([alone[0][:, :1], *[states[:, 1:76] for states in alone], alone[-1][:, 76:]], dim=1)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


def _gradients(family, encoders, ids, clip_skip, checkpointing) -> tuple[list[torch.Tensor], int]:
    """Gradients into each encoder's table, and how often the layers ran."""
    runs = []
    for encoder in encoders:
        encoder.train(checkpointing)
        if checkpointing:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
        layers = getattr(encoder, "text_model", encoder).encoder.layers
        for layer in layers:
            layer.layer_norm1.register_forward_hook(lambda *_: runs.append(1))
        encoder.get_input_embeddings().weight.requires_grad_(True).grad = None
    got = family.encode_prompts(encoders, [ids] * len(encoders), clip_skip)
    loss = got.context.square().mean() + (0 if got.pooled is None else got.pooled.square().mean())
    loss.backward()
    return [encoder.get_input_embeddings().weight.grad[NEW:].clone() for encoder in encoders], len(runs)


@pytest.mark.parametrize(
    ("family", "clip_skip", "layers", "recomputed"),
    # A last layer whose output nobody reads has no gradient, and is not computed again.
    [(STABLE_DIFFUSION, None, 3, 3), (STABLE_DIFFUSION, 2, 3, 2), (STABLE_DIFFUSION_XL, None, 6, 5)],
)
def test_gradients_reach_the_input_embeddings_with_and_without_checkpointing(family, clip_skip, layers, recomputed):
    ids = torch.tensor([[prompt(320, NEW, NEW + 1, 539)]])
    plain, plain_runs = _gradients(family, sdxl_encoders()[: len(family.embedding_keys)], ids, clip_skip, False)
    saving, saving_runs = _gradients(family, sdxl_encoders()[: len(family.embedding_keys)], ids, clip_skip, True)
    assert (plain_runs, saving_runs) == (layers, layers + recomputed)
    for one, other in zip(plain, saving, strict=True):
        assert (one.norm(dim=1) > 0).all()
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-4)


def test_sd_prediction_is_the_unets_and_float32():
    pipeline = build_pipeline("sd1")
    unet = pipeline.unet.to(torch.bfloat16)
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    context = torch.randn(2, 77, 32)
    with torch.no_grad():
        got = STABLE_DIFFUSION.predict_noise(unet, noisy, timesteps, Conditioning(context))
        wanted = unet(noisy.bfloat16(), timesteps, context.bfloat16()).sample
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted.float())


def test_sdxl_prediction_keeps_the_sizes_exact_in_bfloat16():
    unet = build_unet("sdxl").to(torch.bfloat16).eval()
    seen = {}
    unet.add_time_proj.register_forward_pre_hook(lambda _, args: seen.update(sizes=args[0]))
    sizes = torch.tensor([[1019, 1021, 3, 5, 1016, 1024]])
    conditioning = Conditioning(torch.randn(1, 77, 96), torch.randn(1, 64))
    with torch.no_grad():
        got = STABLE_DIFFUSION_XL.predict_noise(unet, torch.randn(1, 4, 8, 8), torch.tensor([7]), conditioning, sizes)
    assert got.dtype == torch.float32
    assert seen["sizes"].tolist() == sizes.flatten().tolist()


@pytest.mark.parametrize(
    ("family", "v2", "v_parameterization", "wanted"),
    [
        (STABLE_DIFFUSION, False, False, "stable-diffusion-v1"),
        (STABLE_DIFFUSION, True, False, "stable-diffusion-v2-512"),
        (STABLE_DIFFUSION, True, True, "stable-diffusion-v2-768-v"),
        (STABLE_DIFFUSION_XL, False, False, "stable-diffusion-xl-v1-base"),
    ],
)
def test_modelspec_architecture(family, v2, v_parameterization, wanted):
    options = SimpleNamespace(v2=v2, v_parameterization=v_parameterization)
    assert family.modelspec_architecture(options) == wanted
