"""Functions shared by all readers; the readers' own tests cover lines and splits."""

import pytest

from modeling_unihyperlora.errors import DataError
from trainers.reading import check_label_names, listed, name_of_id


def test_declared_labels_that_the_adapter_lacks():
    with pytest.raises(DataError, match="does not have: B-X, I-X. It has O, B-PER"):
        check_label_names(["O", "B-X", "I-X"], ["O", "B-PER"], "the adapter")
    check_label_names(["B-PER"], ["O", "B-PER"], "the adapter")


def test_a_label_that_is_named_twice():
    with pytest.raises(DataError, match="The labels of this run name 'yes' twice: no, yes, yes. Name each label once"):
        check_label_names([], ["no", "yes", "yes"], "this run")


def test_ids_are_places_in_the_names():
    assert [name_of_id(number, ["no", "yes"], "here") for number in (0, 1)] == ["no", "yes"]
    for number in (-1, 2):
        with pytest.raises(DataError, match=f"here: id {number} is outside the 2 labels: no, yes"):
            name_of_id(number, ["no", "yes"], "here")


def test_a_long_list_is_cut():
    assert listed([]) == "none"
    assert listed(range(24)).endswith("22, 23")
    assert listed(range(30)).endswith("22, 23 and 6 more")
