"The museum of bugs: our own code passes every catcher, and every specimen makes its catcher fail for the reason on its label."
import re

import catchers
import pytest
from specimens import CONTROLS, MUSEUM, packing_with_one_long_context

COURSES = {  # "Bugs that shipped in well-known courses, which our checks must catch"
    "LoRA scaled by alpha instead of alpha/r": ["LoraScaledByAlpha"],
    "LoRA on square layers only": ["LoraOnSquareLayersOnly"],
    "a DPO reference without no_grad": ["dpo_reference_without_no_grad"],
    "PPO's sign": ["ppo_with_the_wrong_sign"],
    "accumulation divided per micro-batch instead of by target tokens": ["accumulation_divided_per_micro_batch"],
    "resume through half precision and without RNG state": ["resume_through_half_precision", "resume_without_random_state"],
    "Adam's epsilon inside the root": ["AdamWithEpsilonInsideTheRoot"],
    "NF4 with infinite ends": ["nf4_with_infinite_ends"],
}


@pytest.mark.parametrize("name", sorted(catchers.OURS))
def test_our_own_code_passes(name):
    getattr(catchers, name)(catchers.OURS[name])


@pytest.mark.parametrize("specimen", MUSEUM, ids=lambda s: s.name)
def test_every_specimen_makes_its_catcher_fail(specimen):
    with pytest.raises(AssertionError) as caught:  # anything else is a crash, not a catch
        getattr(catchers, specimen.catcher)(specimen.implementation)
    assert specimen.refused_for in str(caught.value).splitlines()[0]


@pytest.mark.parametrize("name", sorted(catchers.OURS))
def test_a_specimen_without_its_mistake_passes(name):
    getattr(catchers, name)(CONTROLS[name])


def test_a_first_token_that_is_learned_from_the_document_before_is_caught():
    "Half of the mistake of `packing_with_one_long_context`: positions start again, and attention keeps apart, but not the targets."
    def apart_but_for_the_targets(examples):
        return {**CONTROLS["packing_keeps_documents_apart"](examples), "labels": packing_with_one_long_context(examples)["labels"]}

    with pytest.raises(AssertionError, match="three documents cost"):
        catchers.packing_keeps_documents_apart(apart_but_for_the_targets)


def test_the_collection_is_complete():
    names = [s.name for s in MUSEUM]
    assert len(set(names)) == len(names)
    assert {s.name for s in MUSEUM if s.found_in == "courses"} == {name for group in COURSES.values() for name in group}
    tracked = [s.found_in for s in MUSEUM if s.found_in != "courses"]
    assert len(set(tracked)) == len(tracked) >= 10
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", source) for source in tracked)
    assert {s.catcher for s in MUSEUM} == set(catchers.OURS) == set(CONTROLS)  # none that has never caught anything, or that refuses what is right
    assert all(s.harm and s.refused_for for s in MUSEUM) and all(getattr(catchers, name).__doc__ for name in catchers.OURS)
