"""The facts of a report: a command and a file that give the same options again, no secret, and true crops."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
from option_effects import plan
from runs import SCRIPTS, arguments, write_dataset

from library.options.options import as_dict
from library.options.parser import parse
from library.output.run_facts import RunFacts, image_facts

# In place of what trains.
LEARNER = SimpleNamespace(
    accelerator=SimpleNamespace(device=torch.device("cpu"), num_processes=1),
    choice=SimpleNamespace(description="AdamW", rates_text="0.01"),
)
SECRETS = ["--huggingface_token=hf-secret", "--wandb_api_key=wandb-secret"]
ODD = [
    "--optimizer_args",
    "weight_decay=0.1",
    "betas=(0.9, 0.99)",
    "--learning_rate=1e-2:1,5e-3",
    "--output_name=it's a $HOME",
    "--v_parameterization=false",
    "--training_comment=two\nlines <b>",
    "--no_report=false",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), dataset="enable_bucket = true\nmin_bucket_reso = 64")


def facts_of(family, model, dataset, folder, *more) -> tuple[RunFacts, dict]:
    argv = arguments(family, model, dataset, folder, *more)
    job = plan(family, argv).job
    facts = (job.results, folder / "a.safetensors", job.data, job.plan, LEARNER)
    return RunFacts.gather(*facts, job.album.prompts), as_dict(job.options)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_command_and_the_file_do_the_run_again(family, dataset, tmp_path, request):
    model = request.getfixturevalue(f"tiny_{family}")
    facts, wanted = facts_of(family, model, dataset, tmp_path, *ODD, *SECRETS)
    # A shell reads it, and tells what it would give to Python.
    told = subprocess.run(
        ["bash", "-c", f"python() {{ printf '%s\\0' \"$@\"; }}\n{facts.command}"], capture_output=True, check=True
    )
    script, *words = told.stdout.decode().split("\0")[:-1]
    assert script == f"{SCRIPTS[family].__name__}.py"
    parser = SCRIPTS[family].setup_parser()
    assert as_dict(parse(parser, words)) == wanted
    file = tmp_path / "again.toml"
    file.write_text(facts.toml, encoding="utf-8")
    assert as_dict(parse(parser, [f"--config_file={file}"])) == wanted


def test_no_secret_is_in_any_of_it(dataset, tmp_path, tiny_sd1):
    facts, _ = facts_of("sd1", tiny_sd1, dataset, tmp_path, *SECRETS)
    assert not [secret for secret in ("hf-secret", "wandb-secret") if secret in repr(facts)]
    assert "huggingface_token" not in repr(facts)


def test_a_seed_that_was_drawn_is_told(dataset, tmp_path, tiny_sd1):
    argv = [word for word in arguments("sd1", tiny_sd1, dataset, tmp_path) if not word.startswith("--seed")]
    job = plan("sd1", argv).job
    facts = RunFacts.gather(job.results, tmp_path / "a.pt", job.data, job.plan, LEARNER, ())
    assert f"--seed={job.data.seed}" in facts.command
    assert dict(facts.details)["Seed"] == str(job.data.seed)


def test_images_with_their_crops(dataset, tmp_path, tiny_sd1):
    table = plan("sd1", arguments("sd1", tiny_sd1, dataset, tmp_path)).job.data.table
    facts = image_facts(table)
    assert [str(fact.path) for fact in facts] == [image.path for image in table]
    for index, fact in enumerate(facts):
        cut, framing = table[index].framing.centre, table[index].framing
        assert fact.lost == pytest.approx(
            1 - framing.bucket[0] * framing.bucket[1] / (framing.resized[0] * framing.resized[1])
        )
        if fact.kept:
            left, top, right, bottom = fact.kept
            assert left * framing.resized[0] == pytest.approx(cut.left)
            assert top * framing.resized[1] == pytest.approx(cut.top)
            assert (right - left) * framing.resized[0] == pytest.approx(framing.bucket[0])
            assert (bottom - top) * framing.resized[1] == pytest.approx(framing.bucket[1])
    assert any(fact.lost > 0.05 for fact in facts)
    assert [str(fact.path) for fact in image_facts(table, most=2)] == [table[0].path, table[len(table) // 2].path]


def test_a_random_crop_is_not_drawn_as_one_place(tmp_path, tiny_sd1):
    data = write_dataset(tmp_path, subset="random_crop = true")
    argv = [word for word in arguments("sd1", tiny_sd1, data, tmp_path) if word != "--cache_latents"]
    table = plan("sd1", argv).job.data.table
    assert [fact.kept for fact in image_facts(table)] == [None] * len(table)
