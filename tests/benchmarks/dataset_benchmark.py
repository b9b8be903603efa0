"""How long it takes to find, size, caption, check, bucket and order many images, and how much memory that needs.

    python tests/benchmarks/dataset_benchmark.py --pictures 10000

Pillow alone, reading sizes and orientations of the same files, is measured beside it: the ratio says more than seconds
do. The images are made in a temporary folder first (JPEG, half of them with EXIF data, and tag captions).
"""

import argparse
import gc
import io
import random
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers import CLIPTokenizer

from library.data.buckets import BucketRules
from library.data.config import DatasetConfig, SubsetConfig
from library.data.training_data import TrainingData
from library.embedding.placeholder import Placeholder
from library.embedding.tokenizer import PromptTokenizer

_WORDS = [f"{first}{second}" for first in ("red ", "old ", "big ", "odd ") for second in ("cat", "hat", "sky", "sea")]


def make_images(folder: Path, count: int) -> None:
    """Write ``count`` small JPEG files of many shapes, each with a caption of twenty tags."""
    rng = random.Random(0)
    files = [_jpeg(width, height, exif) for width in range(64, 200, 8) for height in (64, 80, 96) for exif in (0, 1)]
    for number in range(count):
        with (folder / f"picture_{number:06}.jpg").open("wb") as file:
            file.write(rng.choice(files))
            # Readers ignore what is behind the end of a JPEG: files as long as photographs, in little room.
            file.truncate(rng.randrange(100_000, 5_000_000))
        tags = ", ".join(["mychar", *rng.choices(_WORDS, k=20), f"number {number}"])
        (folder / f"picture_{number:06}.txt").write_text(tags)


def _jpeg(width: int, height: int, exif: int) -> bytes:
    image, file, tags = Image.effect_noise((width, height), 60).convert("RGB"), io.BytesIO(), Image.Exif()
    if exif:
        tags[0x0112], tags[0x010F] = 6, "a camera"
    image.save(file, "JPEG", exif=tags)
    return file.getvalue()


def memory() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def pillow_alone(folder: Path) -> None:
    """Read the size and orientation of every image with nothing but Pillow."""
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as image:
            _ = image.size, image.getexif().get(0x0112)


def timed(label: str, work, yardstick: float | None = None) -> tuple[object, float]:
    """Run ``work``; print seconds by the clock and of the processor; return what it made, and the latter."""
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    ratio = f"{processor / yardstick:8.2f} x Pillow" if yardstick else ""
    print(f"{label:<40} {clock:8.3f} s, processor {processor:8.3f} s {ratio}")
    return result, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--cache-info", action="store_true", help="also measure a second start with cache_info")
    arguments = parser.parse_args()
    tokenizer = CLIPTokenizer.from_pretrained(Path(__file__).parents[2] / "configs" / "tokenizer")
    prompts = PromptTokenizer([tokenizer], Placeholder("mychar", 4))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder, arguments.pictures)
        timed("Pillow alone, the first time", lambda: pillow_alone(folder))
        _, yardstick = timed("Pillow alone, sizes and orientations", lambda: pillow_alone(folder))
        measure(folder, prompts, yardstick, cache_info=False)
        if arguments.cache_info:
            measure(folder, prompts, yardstick, cache_info=True)
            print("again, with metadata_cache.json:")
            measure(folder, prompts, yardstick, cache_info=True)


def measure(folder: Path, prompts: PromptTokenizer, yardstick: float, *, cache_info: bool) -> None:
    subset = SubsetConfig("dreambooth", image_dir=str(folder), cache_info=cache_info)
    config = DatasetConfig("dreambooth", 4, BucketRules((512, 512), enabled=True), (subset,))
    gc.collect()
    before = memory()
    data, found = timed("found, sized, captions read, bucketed", lambda: TrainingData([config], prompts, seed=1))
    _, checked = timed("checked", data.check)
    _, ordered = timed("ordered", lambda: data.order.epoch(1))
    timed("ordered again", lambda: data.order.epoch(2))
    total = found + checked + ordered
    print(f"all: processor {total:.3f} s, {total / yardstick:.2f} x Pillow, {memory() - before:.1f} MB more")


if __name__ == "__main__":
    main()
