"""The measure of `benchmarks/false_negatives.py`, by hand."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.mmeb.readers import TrainRow
from trainers.sampling.files import SampledClusters


@pytest.fixture(scope="module")
def measure():
    path = Path(__file__).parents[2] / "benchmarks" / "false_negatives.py"
    spec = importlib.util.spec_from_file_location("false_negatives", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MEANING = np.array([0, 0, 1, 2, 1])
CLUSTERS = SampledClusters(
    anchors=np.array([0, 3]),
    members=np.array([[1, 2, 4], [2, 4, -1]]),
    phase=np.array([1, 1]),
    similarities=np.zeros((2, 3), np.float32),
)


def test_chosen_negatives(measure):
    # Row 1 means what row 0 means; rows 2 and 4, alike, mean something else than row 3.
    assert measure.count_chosen(CLUSTERS, MEANING) == {"false": 1, "chosen": 5}
    assert measure.count_chosen(CLUSTERS, MEANING, np.array([1])) == {"false": 0, "chosen": 2}


def test_all_ordered_pairs(measure):
    # 4 x 3 and 3 x 2 ordered pairs; (0, 1), (2, 4) in the first and (2, 4) in the second, each both ways.
    assert measure.count_all_pairs(CLUSTERS, MEANING) == {"false": 6, "chosen": 18}


def test_random_candidates(measure):
    class Subset:
        def rows(self):
            texts = ("a", "b", "c", "d", "c")  # rows 2 and 4 share a candidate: no unlabelled positive there
            return iter([TrainRow(i, Item("q"), Item(text), None) for i, text in enumerate(texts)])

    # Five queries, three other candidates each; only rows 0 and 1 have an unlabelled positive, one each.
    assert measure.count_random(Subset(), MEANING) == {"false": 2, "chosen": 15}
    assert measure.rate({"false": 2, "chosen": 15}) == pytest.approx(2 / 15)
    assert measure.rate({"false": 0, "chosen": 0}) == 0
