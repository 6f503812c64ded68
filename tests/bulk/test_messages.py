"""Messages between processes: values and arrays as they were, and an error where the other side has ended."""

import os

import numpy as np
import pytest

from gen2embed_mteb.bulk.messages import read_message, write_message


def test_a_message_arrives_as_it_was_sent() -> None:
    reading, writing = (os.fdopen(end, mode, 0) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    value = {"texts": ["é \udce9", ""], "paths": [["a.png"], []], "none": None}
    arrays = {
        "floats": np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not contiguous
        "bytes": np.arange(256, dtype=np.uint8),
        "numbers": np.array([[1, -2]], dtype=np.int64),
        "mask": np.array([True, False]),
        "none": np.zeros((0, 7), np.float32),
        "one": np.array(5),
    }
    write_message(writing, value, arrays)
    write_message(writing, "next")
    said, found = read_message(reading)
    assert said == value
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert np.array_equal(found[name], array), name
    assert read_message(reading) == ("next", {})
    writing.write(b"\x05")  # the beginning of a length
    writing.close()
    with pytest.raises(EOFError):
        read_message(reading)
