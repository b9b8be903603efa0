import random
import time

import pytest
from departures import departure
from golden_data import golden_cases
from hypothesis import given
from hypothesis import strategies as st

from library.data.buckets import (
    BucketChooser,
    BucketRules,
    adjusted_limits,
    bucket_resolutions,
    centre_offset,
    size_conditioning_crop,
)


def rules_of(case):
    return BucketRules(
        resolution=tuple(case["resolution"]),
        enabled=case.get("enable_bucket", True),
        min_reso=case["min_bucket_reso"],
        max_reso=case["max_bucket_reso"],
        steps=case["bucket_reso_steps"],
        no_upscale=case.get("bucket_no_upscale", False),
    )


@pytest.mark.parametrize("case", golden_cases("bucket_resolutions"))
def test_golden_resolutions(case):
    assert rules_of(case).resolutions() == [tuple(size) for size in case["resolutions"]]


@pytest.mark.parametrize("case", golden_cases("bucket_assign"))
def test_golden_assignment(case):
    chooser = BucketChooser(rules_of(case))
    for row in case["rows"]:
        size = (row[0], row[1])
        placement = chooser.place(*size)
        if departure("bucket_assign", case | {"row": row}):
            assert_fits(chooser.rules, size)
            assert min(placement.bucket) == chooser.rules.steps
            continue
        ours = [*size, *placement.bucket, *placement.resized, placement.aspect_error]
        ours += size_conditioning_crop(placement.bucket, size)
        ours += centre_offset(placement.resized, placement.bucket)
        assert ours == row


@pytest.mark.parametrize("case", golden_cases("bucket_sets"))
def test_golden_sets(case):
    chooser = BucketChooser(rules_of(case))
    placements = [chooser.place(*size) for size in case["sizes"]]
    assert [list(placement.bucket) for placement in placements] == case["assigned"]
    buckets = list(dict.fromkeys(placement.bucket for placement in placements))
    assert [list(bucket) for bucket in buckets] == case["resos_in_creation_order"]
    assert [list(bucket) for bucket in sorted(buckets)] == case["resos_sorted"]
    errors = [abs(placement.aspect_error) for placement in placements]
    assert sum(errors) / len(errors) == pytest.approx(case["mean_abs_ar_error"], rel=1e-12)


# Properties

sides = st.integers(1, 6000)
resolutions = st.sampled_from([(512, 512), (768, 512), (1024, 1024), (640, 1152), (500, 700)])


@st.composite
def bucket_rules(draw, **fixed):
    steps = draw(st.sampled_from([8, 32, 64, 96]))
    values = {
        "resolution": draw(resolutions),
        "enabled": draw(st.booleans()),
        "min_reso": steps * draw(st.integers(1, 5)),
        "max_reso": steps * (1200 // steps + draw(st.integers(0, 10))),
        "steps": steps,
        "no_upscale": draw(st.booleans()),
    }
    return BucketRules(**(values | fixed))


def assert_fits(rules, size):
    """The bucket is allowed, the resized image covers it, keeps its shape, and nothing is cut on both axes."""
    placement = BucketChooser(rules).place(*size)
    (width, height), (resized_width, resized_height) = placement.bucket, placement.resized
    assert resized_width >= width
    assert resized_height >= height
    assert placement.aspect_error == width / height - size[0] / size[1]
    # Rounding to whole pixels moves a side by half a pixel at most.
    scales = sorted([resized_width / size[0], resized_height / size[1]])
    assert scales[1] - scales[0] <= 0.5 / size[0] + 0.5 / size[1] + 1e-9
    if not rules.enabled:
        assert placement.bucket == rules.resolution
        return
    assert width % rules.steps == height % rules.steps == 0
    assert min(width, height) >= rules.steps
    # A side within half a pixel of the next step is rounded up to it; one step by one step is always allowed.
    assert (width - 0.5) * (height - 0.5) <= max(rules.area, rules.steps**2)
    if rules.no_upscale:
        return
    assert placement.bucket in bucket_resolutions(rules)
    cut = (resized_width - width, resized_height - height)
    assert min(cut) <= 0


@given(bucket_rules(), sides, sides)
def test_every_image_fits_its_bucket(rules, width, height):
    assert_fits(rules, (width, height))


@given(bucket_rules(enabled=True, no_upscale=False))
def test_listed_buckets_are_within_the_limits(rules):
    found = bucket_resolutions(rules)
    assert found == sorted(set(found))
    assert {(height, width) for width, height in found} == set(found)
    square = [size for size in found if size[0] == size[1]]
    for width, height in set(found) - set(square):
        assert rules.min_reso <= width <= rules.max_reso
        assert rules.min_reso <= height <= rules.max_reso
        assert width * height <= rules.area
    assert square


@given(bucket_rules(enabled=True, no_upscale=False), sides, sides)
def test_search_equals_the_plain_one(rules, width, height):
    found = bucket_resolutions(rules)
    ratio = width / height
    nearest = min(found, key=lambda size: abs(size[0] / size[1] - ratio))  # min takes the first of equals
    expected = (width, height) if (width, height) in found else nearest
    assert BucketChooser(rules).place(width, height).bucket == expected


def test_of_two_equally_near_the_first_in_the_list_wins():
    rules = BucketRules((512, 512), enabled=True)
    ratios = {width / height: (width, height) for width, height in reversed(bucket_resolutions(rules))}
    low, high = sorted(ratios)[-4:-2]
    middle = (low + high) / 2
    assert middle - low == high - middle  # 4000/1152: both differences are exact
    size = next((w, h) for h in range(1, 2000) for w in [round(middle * h)] if w / h == middle)
    assert BucketChooser(rules).place(*size).bucket == min(ratios[low], ratios[high])


@given(bucket_rules(enabled=True, no_upscale=True), sides, sides)
def test_without_upscaling_only_what_is_under_one_step_grows(rules, width, height):
    placement = BucketChooser(rules).place(width, height)
    thin = min(width, height) * min(1, (rules.area / (width * height)) ** 0.5) < rules.steps + rules.steps / 2
    if not thin:
        assert placement.resized[0] <= width
        assert placement.resized[1] <= height
    if width * height <= rules.area and min(width, height) >= rules.steps:
        assert placement.resized == (width, height)


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((30, 40), (64, 64), (64, 85)),  # smaller than one step
        ((50, 300), (64, 384), (64, 384)),  # the short side is brought to one step, the shape stays
        ((64, 63), (64, 64), (65, 64)),
        ((10, 6000), (64, 4096), (64, 38400)),  # the area stays within 512 x 512
        ((20000, 20), (4096, 64), (64000, 64)),  # larger than the area, shrunk it would be 16 pixels high
        ((100, 100), (64, 64), (100, 100)),
    ],
)
def test_too_small_for_one_step(size, bucket, resized):
    placement = BucketChooser(BucketRules((512, 512), enabled=True, no_upscale=True)).place(*size)
    assert (placement.bucket, placement.resized) == (bucket, resized)


def test_buckets_off_takes_the_resolution():
    rules = BucketRules((500, 300), enabled=False, no_upscale=True)
    placement = BucketChooser(rules).place(1000, 900)
    assert rules.resolutions() == [(500, 300)]
    assert placement.bucket == (500, 300)
    assert placement.resized == (500, 450)


def test_limits_are_adjusted_to_the_steps():
    assert adjusted_limits(BucketRules((512, 512), min_reso=300, max_reso=1000)) == (256, 1024)
    assert adjusted_limits(BucketRules((512, 512), min_reso=256, max_reso=1024)) == (256, 1024)


@given(sides, sides, sides, sides)
def test_conditioning_crop_is_the_image_within_the_bucket(bucket_width, bucket_height, width, height):
    left, top, right, bottom = size_conditioning_crop((bucket_width, bucket_height), (width, height))
    # A side that fills the bucket can be too long by a rounding error; half of that, rounded down, is -1.
    assert -1 <= left <= right <= bucket_width * (1 + 1e-9)
    assert -1 <= top <= bottom <= bucket_height * (1 + 1e-9)
    assert (right - left) / (bottom - top) == pytest.approx(width / height)


@pytest.mark.parametrize(
    "rules",
    [
        BucketRules((512, 512), enabled=True),
        BucketRules((1024, 1024), enabled=True, max_reso=2048, steps=32),
        BucketRules((512, 512), enabled=True, no_upscale=True),
    ],
)
def test_ten_thousand_images_are_placed_quickly(rules):
    rng = random.Random(0)
    sizes = [(rng.randint(200, 4000), rng.randint(200, 4000)) for _ in range(10_000)]
    seconds = []
    for _ in range(3):  # the best of three, since other programs run beside the tests
        chooser = BucketChooser(rules)
        start = time.process_time()
        for size in sizes:
            chooser.place(*size)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1
