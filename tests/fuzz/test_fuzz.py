"""Every target's seeds and a few of its inputs; see the package for the long run."""

import pytest

from fuzz.pictures import BASES, FORMS
from fuzz.running import check
from fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_inputs_work_or_are_refused_in_a_sentence(target):
    check(target, target.quick)


@pytest.mark.parametrize("kind", FORMS)
def test_an_image_taken_apart_and_put_together_is_the_same(kind):
    read, write = FORMS[kind]
    for base in BASES[kind]:
        assert write(read(base)) == base
