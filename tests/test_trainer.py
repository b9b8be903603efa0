"""The whole training through the real scripts: what learns, what must not change, and what the file is worth."""

import copy
from functools import cache
from unittest.mock import patch

import pytest
import torch
from runs import TOKEN, arguments, run, trainers, write_dataset  # noqa: F401  (a fixture)
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from library import run as run_module
from library.model.base_model import BaseModel
from library.training import divergence_guard
from library.training.denoising import DenoisingTask

CAPTION = f"a photo of {TOKEN}, smiling"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Four photographs of two shapes, every caption with the word."""
    return write_dataset(
        tmp_path_factory.mktemp("data"), dataset="enable_bucket = true\nmin_bucket_reso = 64", caption=CAPTION
    )


@pytest.fixture
def untouched(monkeypatch):
    """Pairs (module, copy of its state when it was loaded) of every model that a run loads."""
    pairs = []
    for part in ("text_encoders", "unet", "vae"):
        original = getattr(BaseModel, part)

        def recorded(self, *args, original=original, **kwargs):
            loaded = original(self, *args, **kwargs)
            for module in loaded if isinstance(loaded, list) else [loaded]:
                pairs.append((module, copy.deepcopy(module.state_dict())))
            return loaded

        monkeypatch.setattr(BaseModel, part, recorded)
    return pairs


def model_of(family: str, request, single_file: bool = False):
    return request.getfixturevalue(f"tiny_{family}" + ("_file" if single_file else ""))


FAMILIES = ["sd1", "sd2", "sdxl"]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_rows_learn(family, count, dataset, tmp_path, request, trainers, untouched):  # noqa: F811
    argv = arguments(family, model_of(family, request), dataset, tmp_path, f"--num_vectors_per_token={count}")
    gradients = []

    def look(optimizer, *_):
        gradients.append([p.grad.norm(dim=1) for group in optimizer.param_groups for p in group["params"]])

    hook = register_optimizer_step_pre_hook(look)
    try:
        assert run(family, argv) == 0
    finally:
        hook.remove()
    (trainer,) = trainers
    widths = {"sd1": [32], "sd2": [64], "sdxl": [32, 64]}[family]
    owned = [p for group in trainer.setup.learner.choice.optimizer.param_groups for p in group["params"]]
    assert [tuple(p.shape) for p in owned] == [(count, width) for width in widths]
    state = [t for s in trainer.setup.learner.choice.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    assert max(t.numel() for t in state) == count * max(widths)
    assert len(gradients) == 2
    assert all((norms > 0).all() for norms in gradients[0])
    for start, rows in zip(trainer.setup.starts, trainer.setup.rows.rows, strict=True):
        assert ((rows - start).norm(dim=1) > 1e-3).all()
    assert len(untouched) == len(widths) + 2
    for module, before in untouched:
        after = {
            name.replace("token_embedding.table.", "token_embedding."): t for name, t in module.state_dict().items()
        }
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("extension", ["safetensors", "pt"])
@pytest.mark.parametrize("single_file", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_pipeline_gives_the_trained_models_latents(
    family,
    single_file,
    extension,
    dataset,
    tmp_path,
    request,
    trainers,  # noqa: F811
):
    folder = request.getfixturevalue("folder_of_file")(family) if single_file else model_of(family, request)
    plain = plain_pipeline(folder)
    argv = arguments(family, model_of(family, request, single_file), dataset, tmp_path)
    argv += ["--num_vectors_per_token=3", f"--save_model_as={extension}", "--max_train_steps=3"]
    assert run(family, argv) == 0
    (trainer,) = trainers
    file = tmp_path / f"{TOKEN}.{extension}"
    prompt, settings = (
        f"a {TOKEN} in a park",
        {"num_inference_steps": 3, "output_type": "latent", "height": 64, "width": 64},
    )

    fresh = fresh_pipeline(folder)
    load_as_printed(fresh, family, file)
    wanted = fresh(prompt, generator=torch.Generator().manual_seed(3), **settings).images

    with torch.no_grad():
        word = trainer.job.word
        texts = [word.placeholder.expand(prompt), ""]
        ids = [torch.stack(pair) for pair in zip(*(word.prompts.encode(text) for text in texts), strict=True)]
        conditioning = trainer.setup.prompt_encoder.encode(ids)
    embeds = {"prompt_embeds": conditioning.context[:1], "negative_prompt_embeds": conditioning.context[1:]}
    if conditioning.pooled is not None:
        embeds |= {"pooled_prompt_embeds": conditioning.pooled[:1]}
        embeds |= {"negative_prompt_embeds": torch.zeros_like(conditioning.context[1:])}
        embeds |= {"negative_pooled_prompt_embeds": torch.zeros_like(conditioning.pooled[:1])}
    with patch.object(plain, "unet", trainer.setup.task.unet):
        got = plain(**embeds, generator=torch.Generator().manual_seed(3), **settings).images
    untaught = plain(prompt, generator=torch.Generator().manual_seed(3), **settings).images
    taught = (untaught - wanted).abs().max()
    assert taught > 1e-2
    # Random weights and guidance amplify float32's rounding, which differs between processors: by up to 2e-4 of 9.
    assert (got - wanted).abs().max() < 3e-4 * taught


@cache
def plain_pipeline(folder):
    """A pipeline that never gets an embedding, loaded once."""
    return fresh_pipeline(folder)


def fresh_pipeline(folder):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_as_printed(pipe, family, file):
    """Run the very lines that the end of a run prints for diffusers."""
    from library.output.report import diffusers_snippet

    keys = ["clip_l", "clip_g"] if family == "sdxl" else ["emb_params"]
    exec(diffusers_snippet(file, TOKEN, keys), {"pipe": pipe})


@pytest.mark.parametrize("flag", ["--use_object_template", "--use_style_template"])
def test_templates_need_no_captions(flag, tmp_path, tiny_sd1):
    data = write_dataset(tmp_path, caption=None)
    assert run("sd1", arguments("sd1", tiny_sd1, data, tmp_path / "out", flag, "--num_vectors_per_token=2")) == 0
    assert load_file(tmp_path / "out" / f"{TOKEN}.safetensors")["emb_params"].shape == (2, 32)


# ---- what stops a run


def plain_run(model, dataset, folder, *more: str) -> int:
    return run("sd1", arguments("sd1", model, dataset, folder, "--max_train_steps=3", *more))


@pytest.mark.parametrize("limit", ["0", "1"])
def test_a_gradient_that_is_not_finite_never_reaches_the_rows(limit, dataset, tmp_path, tiny_sd1, monkeypatch, capsys):
    """The loss is still finite: only the gradient tells, here in the third step."""
    original, calls = DenoisingTask.losses, []

    def losses(task, batch, **details):
        calls.append(task)
        found = original(task, batch, **details)
        found.register_hook(lambda grad: grad * (torch.nan if len(calls) == 3 else 1))
        return found

    monkeypatch.setattr(DenoisingTask, "losses", losses)
    assert plain_run(tiny_sd1, dataset, tmp_path, f"--max_grad_norm={limit}") == 1
    assert "the gradient of step 3 is NaN or infinite" in capsys.readouterr().err
    (kept,) = tmp_path.iterdir()
    assert kept.name == f"{TOKEN}-step00000002.safetensors"
    monkeypatch.setattr(DenoisingTask, "losses", original)
    assert plain_run(tiny_sd1, dataset, tmp_path, f"--max_grad_norm={limit}", "--max_train_steps=2") == 0
    assert torch.equal(load_file(kept)["emb_params"], load_file(tmp_path / f"{TOKEN}.safetensors")["emb_params"])


@pytest.mark.parametrize(("silent", "code"), [(2, 0), (3, 1)])
def test_first_steps_that_teach_nothing_may_be_chance(silent, code, dataset, tmp_path, tiny_sd1, monkeypatch, capsys):
    """A black mask or a timestep of pure noise gives a gradient of zero once; a run that gets no other is stopped."""
    original, calls = DenoisingTask.losses, []

    def losses(task, batch, **details):
        calls.append(task)
        return original(task, batch, **details) * (len(calls) > silent)

    monkeypatch.setattr(divergence_guard, "MAX_SILENT_STEPS", 3)
    monkeypatch.setattr(DenoisingTask, "losses", losses)
    assert plain_run(tiny_sd1, dataset, tmp_path) == code
    stopped = "in 3 steps the new vectors received a gradient of exactly zero" in capsys.readouterr().err
    assert stopped == bool(code)
    assert len(list(tmp_path.iterdir())) == 1 - code


def test_fp16_steps_that_overflow_for_ever_stop_the_run(dataset, tmp_path, tiny_sd1, monkeypatch, trainers, capsys):  # noqa: F811
    """fp16 needs a GPU; its gradient scaler, whose part it is to skip such steps, works on the CPU as well."""
    original, calls = DenoisingTask.losses, []

    def losses(task, batch, **details):
        calls.append(task)
        found = original(task, batch, **details)
        found.register_hook(lambda grad: grad * (torch.inf if len(calls) != 2 else 1))
        return found

    begin = run_module.train_and_save

    def with_scaler(job):
        job.accelerator.scaler = torch.amp.GradScaler("cpu")
        return begin(job)

    monkeypatch.setattr(divergence_guard, "MAX_OVERFLOWS", 2)
    monkeypatch.setattr(DenoisingTask, "losses", losses)
    monkeypatch.setattr(run_module, "train_and_save", with_scaler)
    assert plain_run(tiny_sd1, dataset, tmp_path, "--max_train_steps=9", "--lr_scheduler=linear") == 1
    assert len(calls) == 4
    # Of the three steps that are done the scaler skipped two, and the schedule with them.
    assert trainers[0].setup.learner.schedule.get_last_lr() == pytest.approx([0.01 * (1 - 1 / 9)])
    assert "the gradient of step 4 is NaN or infinite" in capsys.readouterr().err
    rows = load_file(tmp_path / f"{TOKEN}-step00000003.safetensors")["emb_params"]
    assert torch.isfinite(rows).all()


def test_whatever_ends_a_run_what_was_learned_is_kept(dataset, tmp_path, tiny_sd1, monkeypatch, capsys):
    original, calls = DenoisingTask.losses, []

    def losses(task, batch, **details):
        calls.append(batch)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return original(task, batch, **details)

    monkeypatch.setattr(DenoisingTask, "losses", losses)
    assert plain_run(tiny_sd1, dataset, tmp_path, "--max_train_steps=5") == 1
    assert load_file(tmp_path / f"{TOKEN}-step00000002.safetensors")["emb_params"].isfinite().all()
    said = capsys.readouterr().err
    assert "The vectors of step 2 are kept in" in said
    assert "error: The device's memory is full: out of memory Give the run less to hold" in said
