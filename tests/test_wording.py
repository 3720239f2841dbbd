"""Numbers with their nouns."""

import pytest

from ibpcore.wording import counted


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (2, "image", "2 images"),
        (1, "property", "1 property"),
        (3, "property", "3 properties"),
        (10, "class", "10 classes"),
        (2, "batch", "2 batches"),
        (2, "epoch", "2 epochs"),
        (60000, "test image", "60,000 test images"),
    ],
)
def test_a_noun_is_in_the_plural_where_that_is_needed(number, noun, text):
    assert counted(number, noun) == text
