"""What one input becomes: the rule for keys is the one of training data (`cells`)."""

import io

import pytest
from PIL import Image

from gen2embed_mteb.embedder.preparation.inputs import content_of


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 40), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("absent", ["source", "label", "images", "role_of_nothing"])
def test_a_key_without_a_value_counts_as_absent(absent):
    assert content_of({"text": "a cat", absent: None}).as_messages() == content_of("a cat").as_messages()


def test_a_stored_image_may_stand_beside_keys_without_a_value_and_in_a_bytearray():
    for stored in (
        {"bytes": png("red"), "path": None},
        {"bytes": png("red"), "path": None, "text": None},
        {"bytes": bytearray(png("red"))},
    ):
        content = content_of(stored)
        assert content.text == ""
        assert [image.getpixel((3, 3)) for image in content.images] == [(255, 0, 0)]


def test_a_key_with_a_value_is_refused_by_name():
    with pytest.raises(TypeError, match="label"):
        content_of({"text": "a cat", "label": 3})


@pytest.mark.parametrize("nothing", [{}, {"text": None}, {"image": None, "label": None}, {"image": ""}])
def test_a_dict_of_nothing_is_said_to_hold_nothing(nothing):
    with pytest.raises(ValueError, match="nothing to encode"):
        content_of(nothing)
