"""What each option about the model, the word, number formats, memory and compilation does, through the real script."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import accelerate
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from option_effects import Bench, captions_of, plan, shows
from runs import TOKEN, arguments, write_dataset
from safetensors.torch import load_file, save_file
from tiny_models import build_pipeline, build_unet, ldm_vae, save_folder

from library import run as run_module
from library.data.captions import OBJECT_TEMPLATES, STYLE_TEMPLATES
from library.data.latent_cache import LatentCache
from library.model import base_model, device_settings, runtime, weight_files
from library.model import vae as frozen_vae
from library.model.base_model import BaseModel
from library.model.frozen_layers import FrozenConv2d, FrozenLinear, dequantize, quantize
from library.model.vae import vae_fingerprint
from library.options.options import RuntimeOptions
from library.training.state import TrainingState

# One step with weights that lie elsewhere in memory: on some processors sums are then made in another order.
ALIKE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_sd1, tiny_sd2, tiny_sdxl):
    models = {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}
    return Bench(models, write_dataset(tmp_path_factory.mktemp("data"), count=2))


def table_of(folder, encoder="text_encoder"):
    weights = load_file(folder / encoder / "model.safetensors")
    return next(value for key, value in weights.items() if key.endswith("token_embedding.weight"))


def id_of(job, word):
    return job.word.prompts.tokenizers[0].encode(word, add_special_tokens=False)[0]


# ---- model


@shows("pretrained_model_name_or_path", "init_word", "v2")
def test_base_model(bench, tmp_path, folder_of_file, tiny_sd1_file, tiny_sd2_file):
    outcome = bench.plain()
    table = table_of(bench.models["sd1"])
    assert torch.equal(outcome.setup.starts[0][0], table[id_of(outcome.job, "girl")])
    dog = bench("--init_word=dog")
    assert torch.equal(dog.setup.starts[0][0], table[id_of(dog.job, "dog")])

    from_folder, from_file = (
        bench(f"--pretrained_model_name_or_path={path}") for path in (folder_of_file("sd1"), tiny_sd1_file)
    )
    torch.testing.assert_close(from_file.rows[0][0], from_folder.rows[0][0], **ALIKE)
    assert from_file.metadata()["ti.base_model"] == tiny_sd1_file.name
    other = bench(f"--pretrained_model_name_or_path={save_folder('sd1', tmp_path / 'other', seed=5)}")
    assert torch.equal(other.setup.starts[0][0], table_of(tmp_path / "other")[id_of(other.job, "girl")])

    second = bench.plain("sd2")
    assert second.tensors()["emb_params"].shape == (1, 64)
    assert second.job.word.prompts.encode("a")[0][0, -1] == 0  # SD 2 pads with "!"
    assert outcome.job.word.prompts.encode("a")[0][0, -1] == 49407
    assert second.metadata()["modelspec.architecture"] == "stable-diffusion-v2-768-v/textual-inversion"
    assert outcome.metadata()["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert "add --v2" in bench(f"--pretrained_model_name_or_path={tiny_sd2_file}", code=1).said


@shows("vae", "no_half_vae")
def test_vae(bench, tmp_path, bfloat16_cpu):
    vae = build_pipeline("sd1", seed=7).vae
    vae.save_pretrained(tmp_path / "vae")
    save_file({key: value.contiguous() for key, value in ldm_vae(vae).items()}, tmp_path / "vae.safetensors")
    plain = bench.plain().batches[0][0].latents
    from_folder, from_file = (
        bench(f"--vae={tmp_path / name}").batches[0][0].latents for name in ("vae", "vae.safetensors")
    )
    assert torch.equal(from_folder, from_file)
    assert (from_folder - plain).abs().max() > 1e-2
    half = bench(f"--vae={tmp_path / 'vae'}", "--mixed_precision=bf16", "--cache_latents=false")
    assert half.setup.task.vae.dtype == torch.bfloat16
    bfloat16_cpu(False)
    slow = bench(f"--vae={tmp_path / 'vae'}", "--mixed_precision=bf16", "--cache_latents=false")
    assert slow.setup.task.vae.dtype == torch.float32
    assert slow.setup.task.unet.dtype == torch.bfloat16
    assert torch.allclose(torch.tensor(half.setup.task.vae.fingerprint), torch.tensor(vae_fingerprint(vae)), atol=0.5)
    bfloat16_cpu(True)
    full = bench("--no_half_vae", "--mixed_precision=bf16", "--cache_latents=false")
    assert full.setup.task.vae.dtype == next(full.setup.task.vae.vae.parameters()).dtype == torch.float32
    assert full.setup.task.unet.dtype == torch.bfloat16


@shows("clip_skip")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_clip_skip(bench, family):
    """The k-th last hidden state, with the final norm for SD 1 and without it for SDXL, whose default is k = 2."""
    for skip in (None, 1, 2, 3):
        outcome = bench.plain(family) if skip is None else bench(f"--clip_skip={skip}", family=family)
        encoder = outcome.setup.prompt_encoder
        ids = [windows.unsqueeze(0) for windows in outcome.job.word.prompts.encode("a cat")]
        with torch.no_grad():
            context = encoder.encode(ids).context
            outputs = [
                model(w[0], output_hidden_states=True) for model, w in zip(encoder.text_encoders, ids, strict=True)
            ]
            if family == "sdxl":
                expected = torch.cat([output.hidden_states[-(skip or 2)] for output in outputs], dim=-1)
            else:
                norm = encoder.text_encoders[0].final_layer_norm
                expected = norm(outputs[0].hidden_states[-(skip or 1)])
        assert torch.allclose(context, expected, atol=1e-6)
        if skip is not None:
            assert outcome.metadata()["modelspec.encoder_layer"] == str(skip)


@shows("tokenizer_cache_dir")
def test_tokenizer_cache(tmp_path, bench):
    folder = tmp_path / "openai_clip-vit-large-patch14"
    shutil.copytree(bench.models["sd2"] / "tokenizer", folder)  # pads with "!"
    argv = arguments("sd1", bench.models["sd1"], bench.dataset, tmp_path)
    tokens = plan("sd1", [*argv, f"--tokenizer_cache_dir={tmp_path}"]).job.word.prompts.encode("a")[0]
    assert tokens[0, -2] == 0
    assert plan("sd1", argv).job.word.prompts.encode("a")[0][0, -2] == 49407
    elsewhere = plan("sd1", [*argv, f"--tokenizer_cache_dir={tmp_path / 'nothing'}"])
    assert "holds no openai_clip-vit-large-patch14" in elsewhere.said


@shows("disable_mmap_load_safetensors")
def test_reading_without_mapping(bench, tiny_sd1_file):
    opened = []
    original = weight_files._open_safetensors

    def recorded(path, mmap):
        opened.append(mmap)
        return original(path, mmap)

    flags = [f"--pretrained_model_name_or_path={tiny_sd1_file}"]
    with patch.object(weight_files, "_open_safetensors", recorded):
        mapped = bench(*flags)
        read = bench(*flags, "--disable_mmap_load_safetensors")
    assert opened == [True, False]
    torch.testing.assert_close(mapped.rows[0][0], read.rows[0][0], **ALIKE)


# ---- the word


@shows("token_string", "num_vectors_per_token", "init_word")
def test_word(tmp_path, bench):
    data = write_dataset(tmp_path, caption="a photo of zxqvword", count=2)
    named = bench("--token_string=zxqvword", "--num_vectors_per_token=3", dataset=data)
    assert named.files == ["zxqvword.safetensors"]
    assert named.batches[0][0].captions == ["a photo of zxqvword zxqvword1 zxqvword2"] * 2
    assert named.batches[0][0].input_ids[0][0, 0, 4:8].tolist() == [49408, 49409, 49410, 49407]
    assert named.tensors("zxqvword.safetensors")["emb_params"].shape == (3, 32)
    assert torch.equal(*named.setup.starts[0][:2])
    two_words = bench("--num_vectors_per_token=2", "--init_word=cat dog")
    table = table_of(bench.models["sd1"])
    expected = table[[id_of(two_words.job, word) for word in ("cat", "dog")]]
    assert torch.equal(two_words.setup.starts[0], expected)
    average = bench("--init_word=")
    assert "start from the average of all words" in average.said
    assert (average.setup.starts[0] - table.mean(dim=0)).std() == pytest.approx(table.std(dim=0).mean(), rel=0.5)


@shows("weights")
def test_continuing_from_a_file(bench):
    first = bench.plain(steps=2)
    more = bench(f"--weights={first.folder / TOKEN}.safetensors")
    assert torch.equal(more.setup.starts[0], first.rows[1][0])
    assert torch.equal(more.setup.starts[0], first.tensors()["emb_params"])


@shows("use_object_template", "use_style_template")
def test_templates(bench, tmp_path):
    argv = arguments("sd1", bench.models["sd1"], bench.dataset, tmp_path, "--num_vectors_per_token=2")
    for flags, templates in (
        (["--use_object_template"], OBJECT_TEMPLATES),
        (["--use_style_template"], STYLE_TEMPLATES),
        (["--use_object_template", "--use_style_template"], OBJECT_TEMPLATES),
    ):
        planned = plan("sd1", [*argv, *flags])
        seen = {caption for epoch in range(1, 11) for caption in captions_of(planned, epoch)}
        assert seen <= {template.replace("{}", f"{TOKEN} {TOKEN}1") for template in templates}
        assert len(seen) > 8


@shows("max_token_length")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_long_captions(bench, tmp_path, family):
    words = " ".join(["sun hat sea sky"] * 25)  # a hundred tokens before the word
    data = write_dataset(tmp_path, caption=f"{words} {TOKEN}", count=2)
    assert "--max_token_length" in bench(family=family, dataset=data, code=1).said  # the word is cut off
    for length, chunks in ((150, 2), (225, 3)):
        outcome = bench(f"--max_token_length={length}", family=family, dataset=data)
        assert all(ids.shape == (2, chunks, 77) for ids in outcome.batches[0][0].input_ids)
        ids = [windows[:1] for windows in outcome.batches[0][0].input_ids]
        context = outcome.setup.prompt_encoder.encode(ids).context
        assert context.shape[1] == length + 2
        for rows, start in zip(outcome.rows[0], outcome.setup.starts, strict=True):
            assert (rows - start).norm() > 1e-3


@shows("preserve_embedding_norm")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_preserved_norm(bench, family):
    free, kept = (
        bench("--learning_rate=0.1", *flags, family=family, steps=2) for flags in ([], ["--preserve_embedding_norm"])
    )
    tables = [table_of(bench.models[family], name) for name in ("text_encoder", "text_encoder_2")[: len(kept.rows[1])]]
    for table, free_rows, rows in zip(tables, free.rows[1], kept.rows[1], strict=True):
        usual = table.norm(dim=1).median().item()
        assert rows.norm(dim=1).tolist() == pytest.approx([usual], rel=0.02)
        assert free_rows.norm() > 1.5 * usual


# ---- number formats


@shows("mixed_precision", "full_bf16", "full_fp16")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_half_precision(bench, family):
    def dtypes(outcome):
        frozen = [outcome.setup.task.unet, *outcome.setup.prompt_encoder.text_encoders]
        rows = outcome.setup.rows.rows
        state = [t for s in outcome.setup.learner.choice.optimizer.state.values() for t in s.values()]
        return [next(m.parameters()).dtype for m in frozen], {t.dtype for t in (*rows, *state)}

    plain, half = bench.plain(family), bench("--mixed_precision=bf16", family=family)
    full = bench("--mixed_precision=bf16", "--full_bf16", family=family)
    assert set(dtypes(plain)[0]) == {torch.float32}
    for outcome in (half, full):
        assert set(dtypes(outcome)[0]) == {torch.bfloat16}
        assert dtypes(outcome)[1] == {torch.float32}
        assert outcome.judged[0].prediction.dtype == outcome.draws[0].noise.dtype == torch.float32
        assert outcome.losses[0] == pytest.approx(plain.losses[0], rel=0.02)
    assert torch.equal(full.rows[0][0], half.rows[0][0])
    assert "--full_bf16: the frozen models are held in bf16" in full.said
    assert "--full_fp16 needs --mixed_precision fp16" in bench("--full_fp16", family=family, code=1).said


@shows("mixed_precision", "full_fp16")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 is possible here")
def test_fp16_without_a_gpu_becomes_bf16(bench, monkeypatch):
    half = bench("--mixed_precision=bf16")
    for flags in (["--mixed_precision=fp16"], ["--mixed_precision=fp16", "--full_fp16"], []):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no" if flags else "fp16")
        outcome = bench(*flags)
        assert "fp16 needs a GPU and none is used: bf16 is used instead" in outcome.said
        assert outcome.setup.task.unet.dtype == torch.bfloat16
        assert torch.equal(outcome.rows[0][0], half.rows[0][0])


@shows("mixed_precision")
@pytest.mark.parametrize("capable", [True, False])
def test_a_cpu_that_is_slow_in_bf16_is_told_of(capable, bfloat16_cpu, monkeypatch, caplog):
    monkeypatch.setattr(runtime, "computes_on_cpu", lambda: True)
    bfloat16_cpu(capable)
    runtime.choose_precision(RuntimeOptions(mixed_precision="no"))
    assert not caplog.records
    runtime.choose_precision(RuntimeOptions(mixed_precision="bf16"))
    assert ("bf16 is slow here: this CPU has no instructions for bfloat16" in caplog.text) is not capable
    monkeypatch.setattr(runtime, "computes_on_cpu", lambda: False)
    caplog.clear()
    runtime.choose_precision(RuntimeOptions(mixed_precision="bf16"))
    assert not caplog.records


@shows("mixed_precision")
def test_precision_given_wins_over_that_of_the_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert runtime.choose_precision(RuntimeOptions()).dtype == torch.bfloat16
    assert runtime.choose_precision(RuntimeOptions(mixed_precision="no")).dtype == torch.float32


@shows("mixed_precision")
def test_fp16_beside_a_gpu_that_is_left_alone_becomes_bf16(monkeypatch):
    """``accelerate launch --cpu --mixed_precision fp16`` on a machine with a GPU has no gradient scaler."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert runtime.choose_precision(RuntimeOptions()).dtype == torch.float16
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert runtime.choose_precision(RuntimeOptions()).dtype == torch.bfloat16


@shows("fp8_base")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_eight_bit_base(bench, family):
    plain, quantized = bench.plain(family, steps=2), bench("--fp8_base", family=family, steps=2)
    layers = [m for m in quantized.setup.task.unet.modules() if isinstance(m, FrozenLinear | FrozenConv2d)]
    assert len(layers) > 50
    assert {layer.weight.dtype for layer in layers} == {torch.float8_e4m3fn}
    assert quantized.losses == pytest.approx(plain.losses, rel=0.02)
    assert quantized.losses != plain.losses
    for start, one, two in zip(quantized.setup.starts, *quantized.rows, strict=True):
        assert (one - start).norm() > 1e-3
        assert (two - one).norm() > 1e-3
    # The gradient of a random U-Net is of the size of the rounding: what it must equal is that of the rounded weights.
    rounded = bench(family=family, steps=2, patches=[patch.object(base_model, "freeze_layers", round_weights)])
    assert quantized.losses == pytest.approx(rounded.losses, rel=1e-5)
    for ours, exact in zip(quantized.rows[1], rounded.rows[1], strict=True):
        assert torch.allclose(ours, exact, atol=1e-4)


def round_weights(unet: torch.nn.Module, *, float8: bool, fill: Callable[[torch.nn.Module, str], None]) -> None:
    """Give the layers that 8 bits can hold the values that those would have."""
    for name, layer in unet.named_modules():
        fill(layer, f"{name}.")
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            layer.weight.data = dequantize(*quantize(layer.weight), layer.weight.dtype)


# ---- memory


@shows("gradient_checkpointing")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_checkpointing_computes_layers_twice(bench, family):
    unet, encoders = BaseModel.unet, BaseModel.text_encoders

    def passes(*flags):
        calls = Counter()

        def watch(model):
            for module in model.modules():
                if type(module).__name__ in ("BasicTransformerBlock", "ResnetBlock2D", "CLIPMLP"):
                    module.register_forward_pre_hook(lambda module, *_: calls.update([type(module).__name__]))
            return model

        patches = (
            patch.object(BaseModel, "unet", lambda *args, **kind: watch(unet(*args, **kind))),
            patch.object(BaseModel, "text_encoders", lambda *args: [watch(one) for one in encoders(*args)]),
            patch("library.setup.check_text_encoders"),  # it encodes without gradients
        )
        return calls, bench(*flags, family=family, patches=patches)

    once, plain = passes()
    twice, saved = passes("--gradient_checkpointing")
    assert len(once) == 3
    # diffusers leaves out the middle's first block, and nothing before the first cross-attention has a gradient.
    # SDXL takes nothing from the last layer of its first text encoder.
    assert twice.pop("ResnetBlock2D") >= 2 * once.pop("ResnetBlock2D") - 2
    assert twice.pop("CLIPMLP") == 2 * once.pop("CLIPMLP") - (family == "sdxl")
    assert twice == {name: 2 * number for name, number in once.items()}
    assert [model.training for model in saved.setup.prompt_encoder.text_encoders] == [True] * len(saved.rows[0])
    assert not saved.setup.task.unet.training
    for ours, theirs in zip(saved.rows[0], plain.rows[0], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@shows("allow_tf32")
def test_tf32_is_said_to_do_nothing_without_a_gpu(bench):
    """What it does where it can: test_device_settings.py, and test_gpu.py."""
    outcome = bench("--allow_tf32")
    assert "--allow_tf32 has no effect: only NVIDIA GPUs" in outcome.said
    assert torch.equal(outcome.rows[0][0], bench.plain().rows[0][0])


@shows("mem_eff_attn", "sdpa")
def test_attention(bench):
    def kinds(outcome):
        return {type(processor) for processor in outcome.setup.task.unet.attn_processors.values()}

    def kernels():
        cuda = torch.backends.cuda
        return cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled()

    plain = bench.plain()
    efficient = bench("--mem_eff_attn")
    assert kernels() == (False, False, True)
    sdpa = bench("--sdpa")
    assert kernels() == (True, True, True)
    assert kinds(plain) == kinds(sdpa) == kinds(efficient) == {AttnProcessor2_0}
    assert efficient.losses == pytest.approx(plain.losses, rel=1e-4)
    assert torch.equal(sdpa.rows[0][0], plain.rows[0][0])
    assert "--sdpa: PyTorch's own attention is the default anyway" in sdpa.said


@shows("xformers")
def test_xformers(bench, monkeypatch):
    """It needs an NVIDIA GPU: here its absence is said, and the switch is seen to reach the U-Net and the VAE."""
    if not torch.cuda.is_available():
        assert "xformers" in bench("--xformers", code=1).said
        monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
        assert "NVIDIA GPUs only" in bench("--xformers", code=1).said
    switched = []
    unet, vae = (
        SimpleNamespace(enable_xformers_memory_efficient_attention=lambda name=name: switched.append(name))
        for name in ("unet", "vae")
    )
    runtime.set_attention(RuntimeOptions(xformers=True), unet, vae)
    assert switched == ["unet", "vae"]
    runtime.set_attention(RuntimeOptions(), unet, vae)
    assert switched == ["unet", "vae"]


def with_small_unet(family, folder):
    """A model whose U-Net has a block of each kind and no more: each layer takes the compiler a second."""
    kinds = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    changes = {"block_out_channels": (32, 64), "layers_per_block": 1}
    changes |= dict(zip(("down_block_types", "up_block_types"), kinds, strict=True))
    if family == "sdxl":
        changes |= {"transformer_layers_per_block": [1, 1], "attention_head_dim": [4, 4]}
    pipeline = build_pipeline(family)
    pipeline.register_modules(unet=build_unet(family, **changes))
    pipeline.save_pretrained(folder)
    return folder


@shows("torch_compile", "dynamo_backend")
@pytest.mark.parametrize(("family", "backend", "steps"), [("sd1", "aot_eager", 1), ("sdxl", "eager", 2)])
def test_compilation(bench, family, backend, steps, tmp_path):
    model = f"--pretrained_model_name_or_path={with_small_unet(family, tmp_path / 'model')}"
    compiled = []
    original = torch.nn.Module.compile

    def recorded(module, *args, **details):
        compiled.append((type(module).__name__, details["backend"]))
        original(module, *args, **details)

    torch._dynamo.reset()
    with patch.object(torch.nn.Module, "compile", recorded):
        faster = bench(model, "--torch_compile", f"--dynamo_backend={backend}", family=family, steps=steps)
        idle = bench("--torch_compile", "--dynamo_backend=no")
        bench(f"--dynamo_backend={backend}")
    encoders = {"sd1": ["CLIPTextModel"], "sdxl": ["CLIPTextModel", "CLIPTextModelWithProjection"]}[family]
    assert compiled == [(name, backend) for name in ["UNet2DConditionModel", *encoders]]
    for module in (faster.setup.task.unet, *faster.setup.prompt_encoder.text_encoders):
        assert module._compiled_call_impl is not None
    plain = bench(model, family=family, steps=steps)
    assert faster.losses == pytest.approx(plain.losses, rel=1e-4)
    for ours, theirs in zip(faster.rows[-1], plain.rows[-1], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-3)
    assert "--torch_compile has no effect" in idle.said
    for missing in ("tvm", "nvprims_nvfuser"):  # a package that is missing; a backend of old PyTorch versions
        said = bench("--torch_compile", f"--dynamo_backend={missing}", code=1).said
        assert f"--dynamo_backend {missing}" in said
        assert "Traceback" not in said


@shows("lowram", "highvram")
def test_loading_to_the_device(bench):
    """Without a GPU nothing differs in memory; what can be seen is the switch in the cache, and that runs agree."""
    plain = bench.plain()
    lowram, highvram = bench("--lowram"), bench("--highvram")
    assert torch.equal(lowram.rows[0][0], plain.rows[0][0])
    assert torch.equal(highvram.rows[0][0], plain.rows[0][0])
    assert "--lowram: the models are loaded straight to the device anyway." in lowram.said
    cleared = []
    with patch.object(torch.cuda, "empty_cache", lambda: cleared.append(True)):
        for highvram in (False, True):
            cleared.clear()
            cache = LatentCache(suffix="_sd.npz", to_disk=False, seed=1, highvram=highvram)
            encoder = bench("--cache_latents=false").setup.task.vae
            encoder_on_gpu = SimpleNamespace(
                device=torch.device("cuda"), encode=encoder.encode, fingerprint=encoder.fingerprint
            )
            cache.fill(plain.job.data.latent_entries(), encoder_on_gpu)
            assert len(cleared) == (0 if highvram else 2)


# ---- several processes


@shows("ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph")
def test_settings_of_several_processes_reach_accelerate(bench):
    """One process has nothing to wait for or to share; the settings are seen on their way."""
    given = []
    original = accelerate.Accelerator

    def recorded(**details):
        given.append({type(handler).__name__: handler for handler in details["kwargs_handlers"]})
        assert details["dynamo_backend"] == "no"  # or accelerate would compile the tiny module of the vectors
        return original(**details)

    flags = ["--ddp_timeout=7", "--ddp_gradient_as_bucket_view", "--ddp_static_graph"]
    with patch.object(accelerate, "Accelerator", recorded):
        bench(*flags)
        bench()
    assert given[0]["InitProcessGroupKwargs"].timeout == timedelta(minutes=7)
    ddp = given[0]["DistributedDataParallelKwargs"]
    assert (ddp.gradient_as_bucket_view, ddp.static_graph) == (True, True)
    assert given[1] == {}


def test_the_compiler_that_accelerates_settings_ask_for_is_used(bench, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with patch.object(runtime, "compile_modules") as compiling:
        bench()
    (asked, modules), _ = compiling.call_args
    assert (asked.torch_compile, asked.dynamo_backend) == (True, "eager")
    assert len(modules) == 2  # the U-Net and the text encoder


def test_weights_lie_as_the_device_is_fastest_with(bench):
    """The order in memory that NVIDIA's tensor cores like, on a CPU: it changes no result beyond rounding."""

    def last(model):
        return {
            layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in model.modules() if wide(layer)
        }

    def wide(layer):
        weight = getattr(layer, "weight", None)
        return weight is not None and weight.ndim == 4 and weight.shape[1] > 1 and weight.shape[2] > 1

    plain = bench("--cache_latents=false")
    with ExitStack() as stack:
        for module in (device_settings, frozen_vae):
            stack.enter_context(patch.object(module, "fastest_format", lambda *_: torch.channels_last))
        outcome = bench("--cache_latents=false")
    for found, where in ((outcome, {True}), (plain, {False})):
        assert last(found.setup.task.unet) == last(found.setup.task.vae.vae) == where
    torch.testing.assert_close(outcome.rows[0][0], plain.rows[0][0], **ALIKE)


def test_the_allocator_is_told_the_sizes_of_the_batches_before_anything_is_loaded(bench):
    events = []
    load = BaseModel.text_encoders

    def loading(model, *details):
        events.append("loaded")
        return load(model, *details)

    with (
        patch.object(run_module, "let_memory_grow", lambda *told: events.append(told)),
        patch.object(BaseModel, "text_encoders", loading),
    ):
        bench()
    assert events == [({(64, 64)}, torch.device("cpu")), "loaded"]


def test_a_state_records_the_precision_that_was_in_force(bench, monkeypatch):
    """It came from the launcher, and a resume without that launcher is to go on in it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    outcome = bench("--save_state")
    assert outcome.setup.task.unet.dtype == torch.bfloat16
    assert TrainingState.read(outcome.folder / f"{TOKEN}-state").options["mixed_precision"] == "bf16"
