"""custom_dataset.py: batches from a class of the user's own."""

import sys
import textwrap

import pytest
import torch
from datasets import prompts

from library.data.custom_dataset import CustomData
from library.data.preview import show_batches
from library.options.options import DatasetOptions
from library.support.errors import UserError

# A class as sd-scripts' users write it; VALUES is what changes from test to test.
MODULE = """
import torch

class Mine:
    told = {}

    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset):
        self.arguments = (tokenizer, max_token_length, resolution, debug_dataset)

    def __len__(self):
        return 5

    def __getitem__(self, index):
        batch = {
            "input_ids_list": [torch.tensor([[49406, 49408, index] + [49407] * 74] * 2)],
            "loss_weights": torch.tensor([1.0, 0.5]),
            "latents": torch.full((2, 4, 8, 6), float(index)),
        }
        batch.update(VALUES)
        return {key: value for key, value in batch.items() if value is not None}

    def add_replacement(self, before, after):
        self.told["replacement"] = (before, after)

    def set_current_step(self, step):
        self.told["step"] = step

    def set_max_train_steps(self, steps):
        self.told["steps"] = steps

class Empty(Mine):
    def __len__(self):
        return 0

class Failing(Mine):
    def __init__(self, *_):
        raise RuntimeError("no server")
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the data of a class in a module that holds it; keyword arguments replace keys of its batches."""

    def made(name="Mine", *, words=None, templates=None, masked_loss=False, train_inpainting=False, **values):
        (tmp_path / "my_data.py").write_text(textwrap.dedent(MODULE).replace("VALUES", repr(values)))
        (tmp_path / "broken_data.py").write_text("class Mine\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "my_data", raising=False)
        options = DatasetOptions(
            dataset_class=f"my_data.{name}" if "." not in name else name,
            resolution=(64, 48),
            masked_loss=masked_loss,
            train_inpainting=train_inpainting,
        )
        return CustomData(options, words or prompts(), max_token_length=75, templates=templates, seed=1)

    return made


def test_batches_in_another_order_every_epoch(make):
    data = make()
    assert data.dataset.arguments == (None, 75, "64,48", False)
    assert (data.order.num_batches, data.resolution) == (5, (64, 48))
    loader = data.loader()
    orders = []
    for epoch in (1, 2):
        loader.set_epoch(epoch, 0)
        orders.append([int(batch.latents[0, 0, 0, 0]) for batch in loader])
    assert [sorted(order) for order in orders] == [[0, 1, 2, 3, 4]] * 2
    assert orders[0] != orders[1]


def test_a_batch_has_all_that_is_needed(make):
    batch = next(iter(make().loader()))
    assert (batch.latents.shape, batch.images, batch.masks) == ((2, 4, 8, 6), None, None)
    assert [ids.shape for ids in batch.input_ids] == [(2, 1, 77)]
    assert batch.has_token.tolist() == [True, True]
    assert batch.loss_weights.tolist() == [1.0, 0.5]
    assert batch.size_conditioning.tolist() == [[64, 48, 0, 0, 64, 48]] * 2
    assert len(set(batch.seeds)) == 2
    assert batch.weight == 1.0


def test_workers_and_processes(make):
    data = make()
    alone = [(batch.keys, batch.seeds) for batch in data.loader()]
    assert [(batch.keys, batch.seeds) for batch in data.loader(workers=1)] == alone
    shares = [list(data.loader(process_index=i, num_processes=2)) for i in (0, 1)]
    assert [len(batch) for batch in shares[1]] == [2, 2, 0]
    assert [batch.weight for batch in shares[0]] == [1.0, 1.0, 2.0]


def test_the_class_is_told_what_sd_scripts_would_tell_it(make):
    data = make(words=prompts(2))
    assert data.dataset.told["replacement"] == ("mychar", "mychar mychar1")
    list(data.loader(accumulation=2, max_steps=9))
    assert (data.dataset.told["steps"], data.dataset.told["step"]) == (9, 2)
    data = make(words=prompts(2), templates=["a {}"])
    assert data.dataset.told["replacement"] == ("", ["a mychar mychar1"])


def test_captions_stand_in_for_ids(make):
    batch = next(iter(make(input_ids_list=None, captions=["mychar", "girl"], words=prompts(2, encoders=2)).loader()))
    assert [ids.shape for ids in batch.input_ids] == [(2, 1, 77)] * 2
    assert batch.input_ids[0][0, 0, :4].tolist() == [49406, 49408, 49409, 49407]
    assert batch.has_token.tolist() == [True, False]


def test_pixels_masks_and_sizes(make):
    values = {"latents": None, "images": [[[[0.5] * 8] * 16] * 3] * 2, "alpha_masks": [[[0.25] * 8] * 16] * 2}
    sizes = {"original_sizes_hw": [[30, 20]] * 2, "crop_top_lefts": [[1, 2]] * 2, "target_sizes_hw": [[16, 8]] * 2}
    batch = next(iter(make(**values, **sizes).loader()))
    assert (batch.images.shape, batch.latents) == ((2, 3, 16, 8), None)
    assert batch.masks.shape == (2, 1, 16, 8)
    assert batch.masks.unique().tolist() == [0.25]
    assert batch.size_conditioning.tolist() == [[30, 20, 1, 2, 16, 8]] * 2
    masks = {"conditioning_images": [[[[0.0] * 8] * 16] * 3] * 2}
    assert next(iter(make(**values, **masks, masked_loss=True).loader())).masks.unique().tolist() == [0.5]
    assert next(iter(make(**values, **masks).loader())).masks.unique().tolist() == [0.25]


def test_the_report_says_whether_the_word_is_there(make):
    assert make().check().warnings == []
    report = make(input_ids_list=None, captions=["a", "b"]).check()
    assert "5 batches of my_data.Mine" in report.text
    assert "49408" in report.warnings[0]


def test_debug_dataset_shows_the_first_batches(make, capsys):
    data = make(input_ids_list=None, captions=["mychar", "girl"])
    show_batches(data.loader(), data.prompts)
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("Batch")] == [
        f"Batch {number}: latents [2, 4, 8, 6], loss weights [1.0, 0.5]" for number in (1, 2, 3)
    ]
    assert shown.count("ids: 49406 [49408] 49407\n") == 3


def test_images_cannot_be_cached(make):
    make().use_cache(None)
    with pytest.raises(UserError, match="--cache_latents"):
        make(latents=None, images=[[[[0.0] * 8] * 8] * 3] * 2).use_cache(None)
    assert make().latent_entries() == list(make().first_prompts()) == []


@pytest.mark.parametrize(
    ("name", "phrases"),
    [
        ("nowhere.Mine", ["--dataset_class", "nowhere", "PYTHONPATH"]),
        (".Mine", ["--dataset_class .Mine must be a module and a class"]),
        ("..Mine", ["--dataset_class", "cannot be imported"]),
        ("broken_data.Mine", ["--dataset_class: broken_data cannot be imported: SyntaxError"]),
        ("Mien", ["my_data", "Mien", "Mine"]),
        ("Empty", ["my_data.Empty", "no batches"]),
        ("Failing", ["my_data.Failing", "no server"]),
    ],
)
def test_a_class_that_cannot_be_used_is_an_error(make, name, phrases):
    with pytest.raises(UserError) as error:
        make(name)
    assert all(phrase in str(error.value) for phrase in phrases), error.value


@pytest.mark.parametrize(
    ("values", "phrases"),
    [
        ({"latents": None}, ["latents", "images"]),
        ({"latents": [1.0]}, ['"latents"', "[1]", "[any, 4, any, any]"]),
        ({"latents": None, "images": [[[[0.0]]]]}, ['"images"', "[1, 1, 1, 1]", "[any, 3, any, any]"]),
        ({"loss_weights": [1.0] * 3}, ['"loss_weights"', "[3]", "[2]"]),
        ({"captions": "mychar"}, ['"captions"', "2 texts"]),
        ({"alpha_masks": [[[255.0] * 6] * 8] * 2}, ['"alpha_masks"', "from 255 to 255", "from 0 to 1"]),
        ({"captions": [1, "mychar"]}, ['"captions"', "2 texts"]),
        ({"input_ids_list": ["x"]}, ['"input_ids_list"', "tensor"]),
        ({"input_ids_list": [[[60000] * 77] * 2]}, ['"input_ids_list"', "60000", "49408"]),
        ({"alpha_masks": [[[1.0]]]}, ['"alpha_masks"', "[1, 1, 1]", "[2, any, any]"]),
        ({"crop_top_lefts": 5}, ['"crop_top_lefts"', "[]", "[2, 2]"]),
        ({"latents": "x"}, ['"latents"', "tensor"]),
        ({"input_ids_list": None}, ['"input_ids_list"', '2 "captions"']),
        ({"input_ids_list": None, "captions": ["x"]}, ['"captions"']),
        ({"input_ids_list": []}, ['"input_ids_list"', "0 items", "1"]),
        ({"input_ids_list": [[[1] * 76] * 2]}, ['"input_ids_list"', "[2, 76]", "[2, 77]"]),
        ({"crop_top_lefts": [[1, 2]]}, ['"crop_top_lefts"', "[2, 2]"]),
    ],
)
def test_a_batch_that_cannot_be_used_is_an_error(make, values, phrases):
    with pytest.raises(UserError) as error:
        make(**values).check()
    assert all(phrase in str(error.value) for phrase in ["--dataset_class my_data.Mine", *phrases]), error.value


def test_a_batch_that_cannot_be_made_is_named(make, monkeypatch):
    data = make()
    monkeypatch.setattr(type(data.dataset), "__getitem__", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=r"my_data\.Mine fails at batch 0: ZeroDivisionError"):
        data.check()


def test_a_batch_must_be_a_dictionary(make, monkeypatch):
    data = make()
    monkeypatch.setattr(type(data.dataset), "__getitem__", lambda *_: torch.zeros(3))
    with pytest.raises(UserError, match="dictionaries, not Tensor"):
        data.check()


def test_masks_for_inpainting_are_random_or_its_own(make):
    """Lists stand for the images and masks: the module's text holds them."""
    images = torch.rand(2, 3, 8, 16).tolist()
    first, again = (list(make(train_inpainting=True, latents=None, images=images).loader()) for _ in range(2))
    assert all(batch.holes.shape == (2, 1, 8, 16) for batch in first)
    assert all(set(batch.holes.unique().tolist()) == {0, 1} for batch in first)
    assert all(torch.equal(one.holes, other.holes) for one, other in zip(first, again, strict=True))
    assert len({str(hole) for batch in first for hole in batch.holes.tolist()}) == 10
    own = torch.zeros(2, 1, 8, 16)
    own[1, :, :, 4:] = 1
    batch = next(iter(make(train_inpainting=True, images=images, masks=own.tolist()).loader()))
    assert torch.equal(batch.holes, own)
    assert batch.latents is None
    assert batch.images.shape == (2, 3, 8, 16)
    assert next(iter(make(images=images, latents=None, masks=own.tolist()).loader())).holes is None
    with pytest.raises(UserError, match=r'gives "masks" of shape \[2, 1, 8\]; it must be \[2, 1, 8, 16\]'):
        make(train_inpainting=True, images=images, masks=torch.zeros(2, 1, 8).tolist()).check()


@pytest.mark.parametrize("value", [255.0, -1.0])
def test_masks_for_inpainting_on_another_scale_are_an_error(make, value):
    """The U-Net would be given them as they are, and learn from a mask that it has never seen the like of."""
    masks = torch.zeros(2, 1, 8, 16)
    masks[1] = value
    details = {"images": torch.rand(2, 3, 8, 16).tolist(), "masks": masks.tolist()}
    with pytest.raises(UserError, match=r'gives "masks" with values from -?[0-9]+ to [0-9]+; they must be from 0 to 1'):
        make(train_inpainting=True, **details).check()


def test_latents_cannot_be_masked(make):
    with pytest.raises(UserError, match='gives "latents", but masks for --train_inpainting need "images"'):
        make(train_inpainting=True).check()
