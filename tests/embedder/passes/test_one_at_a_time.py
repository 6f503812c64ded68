"""Threads that share a model's tokenizer: a call of one cannot change the settings of a call of another."""

import copy
import pickle
import threading

import numpy as np
import pytest

TEXTS = ["text one", "text number two with more words"]


class Interrupting:
    """A tokenizer's backend that lets another thread run right before it encodes, when the settings are already set."""

    def __init__(self, backend, run):
        vars(self).update(backend=backend, run=run, used=0)

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def __setattr__(self, name, value):
        setattr(self.backend, name, value)

    def encode_batch(self, *args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            vars(self)["used"] += 1
            thread = threading.Thread(target=self.run)
            thread.start()
            thread.join(0.02)  # with the lock, it waits until this call has ended
        return self.backend.encode_batch(*args, **kwargs)


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_counting_in_another_thread_does_not_split_the_prompts_control_tokens(tiny, family, monkeypatch):
    model = tiny(family)
    expected, counts = model.encode_query(TEXTS), model.count_tokens(TEXTS, [[], []])
    wrong = []

    def count():
        if model.count_tokens(TEXTS, [[], []]) != counts:
            wrong.append("count")

    backend = Interrupting(model.tokenizer._tokenizer, count)
    monkeypatch.setattr(model.tokenizer, "_tokenizer", backend)
    assert np.array_equal(model.encode_query(TEXTS), expected)
    assert backend.used > 0 and wrong == []


def test_copies_encode_with_their_own_backend(tiny):
    tokenizer = tiny("llama").tokenizer
    for made in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        made.add_tokens(["<new>"])
        assert len(made("<new>", add_special_tokens=False)["input_ids"]) == 1
        assert len(tokenizer("<new>", add_special_tokens=False)["input_ids"]) > 1
        assert vars(made)["_encode_plus"]._lock is not vars(tokenizer)["_encode_plus"]._lock
