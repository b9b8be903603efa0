"""batched_data.py: image folders and classes of the user's own have all that a training asks of its data."""

import inspect

import pytest
from datasets import data_of, make_image, prompts

from library.data.batched_data import BatchedData
from library.data.custom_dataset import CustomData
from library.options.options import DatasetOptions

MEMBERS = [name for name in vars(BatchedData) if not name.startswith("_")]


class TwoBatches:
    """As small as ``--dataset_class`` takes it."""

    def __init__(self, *_):
        import torch

        self.batch = {"captions": ["mychar"], "images": torch.zeros(1, 3, 64, 64)}

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return self.batch


@pytest.fixture(params=["folders", "class"])
def data(request, tmp_path):
    if request.param == "class":
        return CustomData(DatasetOptions(dataset_class=f"{__name__}.TwoBatches"), prompts())
    for number in range(4):
        make_image(tmp_path / "a" / f"{number}.png", (64, 64), "mychar")
    return data_of(tmp_path, {"resolution": 64, "subsets": [{"image_dir": str(tmp_path / "a"), "num_repeats": 2}]})


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_is_there_and_takes_what_the_protocol_says(name, data):
    wanted = inspect.getattr_static(BatchedData, name)
    found = getattr(data, name)
    if isinstance(wanted, property):
        assert not callable(found)
        return
    parameters = [each for each in inspect.signature(wanted).parameters.values() if each.name != "self"]
    by_name = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    inspect.signature(found).bind(*(None for each in parameters if each.name not in by_name), **by_name)


def test_it_trains_on_batches(data):
    share = {"process_index": 1, "num_processes": 2}
    loader = data.loader(**share, accumulation=2, max_steps=3, workers=0, persistent=True, pin_memory=False)
    loader.set_epoch(1, 0)
    assert len(list(loader)) == len(loader) == -(-data.order.num_batches // 2)
    assert data.validation_loader(**share) is None
    assert data.check().lines[0].startswith("Training data: ")
    assert isinstance(data.fingerprint, str)
    assert (data.concept() is None) == (data.table is None)
