"""What each lever of a recipe does, through the real scripts, held against references that are made by hand."""

import pytest
import torch
from option_effects import Bench, plan, shows
from photos import make_photos
from PIL import Image
from runs import arguments, write_dataset
from test_option_effects_learning import moved

from library import run as run_module

SGD = ["--optimizer_type=SGD", "--learning_rate=1"]
NORMALIZED = [*SGD, "--normalize_sample_gradients"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_sd1, tiny_sdxl):
    models = {"sd1": tiny_sd1, "sdxl": tiny_sdxl}
    return Bench(models, write_dataset(tmp_path_factory.mktemp("data"), count=4))


# ---- the gradient of each sample


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three images with masks and three regularisation images in one batch, one of them without the token."""
    folder = tmp_path_factory.mktemp("mixed")
    masks = folder / "masks"
    masks.mkdir()
    for number in (1, 2, 3):
        Image.linear_gradient("L").resize((96, 80)).rotate(90 * number).save(masks / f"photo_{number}.png")
    make_photos(folder / "others", count=3)
    (folder / "others" / "photo_2.txt").write_text("a photo")
    subset = f"[[datasets.subsets]]\nis_reg = true\nimage_dir = '{(folder / 'others').as_posix()}'"
    file = write_dataset(folder, subset=subset, count=3)
    file.write_text(file.read_text().replace("batch_size = 2", "batch_size = 6"))
    return file


def sample_gradients(outcome, batch):
    """The gradient of each sample's own loss by itself, from a backward of its own, by encoder."""
    rows, found = outcome.setup.rows, []
    rows.assign(outcome.setup.starts)
    for number in range(len(batch)):
        rows.zero_grad()
        if batch.has_token[number]:
            outcome.setup.task.losses(batch)[number].backward()
        found.append([torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in rows.rows])
    return found


def reference(outcome):
    """The sum of the first step's normalized gradients, times what each sample counts, by encoder."""
    sums, samples = [torch.zeros_like(each) for each in outcome.setup.starts], 0
    for batch in outcome.batches[0]:
        samples += len(batch)
        for gradients, weight in zip(sample_gradients(outcome, batch), batch.loss_weights.tolist(), strict=True):
            norm = torch.cat([each.flatten() for each in gradients]).norm()
            for total, each in zip(sums, gradients, strict=True):
                total += weight * each / (norm + 1e-12)
    return [total / samples for total in sums]


@shows("normalize_sample_gradients")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(
    "more",
    [
        ["--num_vectors_per_token=2"],
        ["--gradient_accumulation_steps=2"],
        ["--max_token_length=150", "--masked_loss", "--prior_loss_weight=0.3", "--cache_text_encoder_outputs"],
    ],
    ids=["plain", "accumulated", "masks and cached prompts"],
)
def test_normalized_gradients_are_those_of_separate_backwards(family, more, bench, mixed):
    """Of a batch with masks, regularisation images and their weight, and captions without the token."""
    dataset = mixed if "--masked_loss" in more else bench.dataset
    if dataset is mixed:
        more = [*more, f"--conditioning_data_dir={mixed.parent / 'masks'}"]
    outcome = bench(*NORMALIZED, *more, family=family, dataset=dataset)
    expected = reference(outcome)
    for encoder, each in enumerate(expected):
        assert each.norm() > 0.01
        # Of whole networks in float32; test_sample_gradients.py is exact.
        assert (moved(outcome, encoder) + each).norm() < 1e-3 * each.norm()
    if dataset is mixed:
        weights = sorted(outcome.batches[0][0].loss_weights.tolist())
        assert weights == pytest.approx([0.3, 0.3, 0.3, 1, 1, 1])
    assert outcome.metadata()["ti.normalize_sample_gradients"] == "True"
    assert "the gradient norm is not clipped" in outcome.said


def with_scaler(monkeypatch, scale):
    """fp16 needs a GPU; its gradient scaler works on the CPU as well."""
    begin = run_module.train_and_save

    def begun(job):
        job.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return begin(job)

    monkeypatch.setattr(run_module, "train_and_save", begun)


def test_the_scale_of_fp16_does_not_change_normalized_gradients(bench, monkeypatch):
    plain = bench(*NORMALIZED)
    with_scaler(monkeypatch, 1024.0)
    scaled = bench(*NORMALIZED)
    assert (moved(scaled) - moved(plain)).norm() < 1e-3 * moved(plain).norm()


def test_clipping_stays_where_it_is_asked_for(bench):
    free, clipped = bench(*NORMALIZED), bench(*NORMALIZED, "--max_grad_norm=0.01")
    assert moved(clipped).norm() == pytest.approx(0.01, rel=1e-3)
    assert moved(free).norm() > 0.1
    assert "is not clipped" not in clipped.said


def test_weights_that_normalizing_takes_away_are_said(bench, tmp_path):
    argv = arguments("sd1", bench.models["sd1"], bench.dataset, tmp_path, "--min_snr_gamma=5")
    sentence = "--min_snr_gamma changes the loss that is logged, but not what is learned"
    assert sentence in plan("sd1", [*argv, "--normalize_sample_gradients"]).said
    assert sentence not in plan("sd1", argv).said


# ---- how long a vector may get


def lengths(outcome, step, encoder):
    return outcome.rows[step][encoder].norm(dim=1)


def usual_length(outcome, encoder):
    """The median length of a word that the model knows: tables have rows of zeros too."""
    table = outcome.setup.prompt_encoder.tables[encoder].weight
    return float(torch.median(torch.stack([row.norm() for row in table if row.any()])))


@shows("max_embedding_norm")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_longer_vectors_are_shortened_after_the_step_and_no_others(family, bench):
    """A rate at which the first step makes some longer and the second step all."""
    free = bench("--num_vectors_per_token=3", "--learning_rate=0.05", family=family, steps=2)
    most = [sorted(lengths(free, 0, encoder).tolist())[1] for encoder in range(len(free.setup.starts))]
    share = min(norm / usual_length(free, encoder) for encoder, norm in enumerate(most))
    given = ["--num_vectors_per_token=3", "--learning_rate=0.05", f"--max_embedding_norm={share}"]
    done = bench(*given, family=family, steps=2)
    for encoder in range(len(most)):
        limit = share * usual_length(done, encoder)
        for before, row in zip(free.rows[0][encoder], done.rows[0][encoder], strict=True):
            if before.norm() <= limit * (1 - 1e-6):
                assert torch.equal(row, before)
            else:
                assert torch.allclose(row, before * limit / before.norm(), rtol=1e-5)
        assert lengths(done, 1, encoder).max() <= limit * (1 + 1e-6)
    assert any(
        lengths(free, 0, encoder).max() > share * usual_length(free, encoder) * 1.001 for encoder in range(len(most))
    )
    assert done.metadata()["ti.max_embedding_norm"] == str(share)


def test_a_limit_that_is_not_reached_changes_no_bit(bench):
    plain, done = bench(steps=3), bench("--max_embedding_norm=1000", steps=3)
    assert torch.equal(done.tensors()["emb_params"], plain.tensors()["emb_params"])


def test_the_mean_of_shortened_vectors_is_no_longer(bench):
    done = bench("--max_embedding_norm=1", "--learning_rate=0.1", "--average_last=1", steps=3)
    assert done.tensors()["emb_params"].norm(dim=1).max() <= usual_length(done, 0) * (1 + 1e-6)


def test_a_resumed_run_shortens_as_before(bench):
    more = ["--max_embedding_norm=1", "--learning_rate=0.1", "--save_every_n_steps=2", "--save_state"]
    whole = bench(*more, steps=4)
    state = whole.folder / "mychar-step00000002-state"
    rest = bench(*more, f"--resume={state}", steps=4)
    assert torch.equal(rest.tensors()["emb_params"], whole.tensors()["emb_params"])


def test_a_start_that_is_longer_than_the_limit_is_said(bench):
    """The first step would shorten it without a word: of --weights, everything that they had learned."""
    said = bench("--max_embedding_norm=0.01").said
    assert "--max_embedding_norm=0.01: the vectors that the training starts from are up to " in said
    assert "--max_embedding_norm" not in bench("--max_embedding_norm=1000").said


def test_where_nothing_could_be_shortened_it_is_said(bench, tmp_path):
    argv = arguments("sd1", bench.models["sd1"], bench.dataset, tmp_path, "--max_embedding_norm=2")
    said = plan("sd1", [*argv, "--preserve_embedding_norm"]).said
    assert "--max_embedding_norm is not used: --preserve_embedding_norm wins." in said
    for flag in ("--max_embedding_norm=2", "--preserve_embedding_norm"):
        refused = bench(flag, "--optimizer_type=AdamWScheduleFree", code=1).said
        assert f"{flag.partition('=')[0]}: AdamWScheduleFree saves an average that a change of the vectors'" in refused
    assert (
        "--max_embedding_norm is 0.0; it must be above 0."
        in plan("sd1", [*argv, "--max_embedding_norm=0"], code=1).said
    )
