"""Batches of whole clusters: what every epoch must keep, on any clusters, by property tests and by hand."""

import pickle
from collections import Counter
from functools import partial

import datasets
import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers import DatasetClusters, SahaBatchSampler
from trainers.sampling.files import SampledClusters, SamplingError, read_sampling, write_sampling


def rows_of(count):
    return datasets.Dataset.from_dict({"query": [str(row) for row in range(count)]})


def clusters_of(*subsets, num_rows, positives=None):
    """Clusters from a list of lists of rows a subset, -1 where a row is missing."""
    return DatasetClusters(
        tuple(f"s{number}" for number in range(len(subsets))),
        np.array([cluster for subset in subsets for cluster in subset], dtype=np.int64),
        np.repeat(np.arange(len(subsets)), [len(subset) for subset in subsets]),
        num_rows,
        None if positives is None else np.array(positives, dtype=np.int64),
    )


def sampler_of(clusters, batch_size, **options):
    return SahaBatchSampler(rows_of(clusters.num_rows), batch_size, sampling=clusters, num_processes=1, **options)


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def pairs_of(batches, width):
    return [tuple(batch[at : at + width]) for batch in batches for at in range(0, len(batch), width)]


def test_three_clusters_make_two_batches_of_two_and_one_comes_again():
    sampler = sampler_of(clusters_of([[0, 3], [1, 4], [2, 5]], num_rows=6), 4)
    assert len(sampler) == 2
    assert (sampler.num_repeated, sampler.num_fillers) == (1, 0)
    for epoch in range(5):
        batches = epoch_of(sampler, epoch)
        assert [len(batch) for batch in batches] == [4, 4]
        assert all(len(set(batch)) == 4 for batch in batches)
        counts = Counter(pairs_of(batches, 2))
        assert counts.keys() == {(0, 3), (1, 4), (2, 5)}
        assert sorted(counts.values()) == [1, 1, 2]


def test_fillers_come_from_the_same_subset_and_share_no_positive_with_the_step_where_that_can_be():
    # Rows 0 to 5 are one subset with the labels a, a, b, b, c, d; rows 6 to 8 another. Cluster (0, 2) lacks a row: only
    # rows 4 and 5 have labels that the step does not have.
    first, second = [[0, 2, -1], [1, 3, 4], [5, 0, 2]], [[6, 7, 8]]
    clusters = clusters_of(first, second, num_rows=9, positives=[0, 0, 1, 1, 2, 3, 4, 5, 6])
    sampler = sampler_of(clusters, 3, mix_subsets=False)
    seen = set()
    for epoch in range(20):
        filled = [cluster for cluster in pairs_of(epoch_of(sampler, epoch), 3) if cluster[:2] == (0, 2)]
        assert len(filled) == 1
        seen.add(filled[0][2])
        assert sampler.num_fillers == 1
    assert seen == {4, 5}
    # With all clusters in the step every row is in it, and what remains is that the cluster's own positives differ.
    whole = sampler_of(clusters, 12)
    for epoch in range(20):
        (batch,) = epoch_of(whole, epoch)
        filler = next(cluster for cluster in pairs_of([batch], 3) if cluster[:2] == (0, 2))[2]
        assert filler in {4, 5}


def test_rows_that_no_cluster_names_are_never_fillers():
    """They were set aside by sampling: their images cannot be opened."""
    sampler = sampler_of(clusters_of([[0, -1, -1], [2, 4, 6]], num_rows=8), 3)
    for epoch in range(10):
        assert {row for batch in epoch_of(sampler, epoch) for row in batch} <= {0, 2, 4, 6}


@st.composite
def tables(draw):
    """Subsets of clusters, some short, each with an anchor of its own, rows in several clusters, few positives."""
    width = draw(st.integers(1, 4))
    subsets, first = [], 0
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(width, 12))
        clusters = []
        # The first cluster is whole, so that the subset has at least as many usable rows as a cluster takes.
        for number, anchor in enumerate(draw(st.permutations(range(size)))[: draw(st.integers(1, size))]):
            others = draw(st.permutations([row for row in range(size) if row != anchor]))
            length = draw(st.integers(0, width - 1)) if number else width - 1
            members = [first + row for row in others[:length]]
            clusters.append([first + anchor, *members, *[-1] * (width - 1 - length)])
        subsets.append(clusters)
        first += size
    positives = draw(st.none() | st.lists(st.integers(0, 5), min_size=first, max_size=first))
    mix = draw(st.booleans())
    smallest = sum(map(len, subsets)) if mix else min(map(len, subsets))
    processes = draw(st.integers(1, min(3, smallest)))
    batch_size = draw(st.integers(1, smallest // processes)) * width
    return (
        clusters_of(*subsets, num_rows=first, positives=positives),
        batch_size,
        processes,
        mix,
        draw(st.integers(0, 9)),
    )


@settings(max_examples=120, deadline=None)
@given(tables())
def test_every_epoch_covers_every_cluster_in_equal_batches_on_every_rank(table):
    clusters, batch_size, processes, mix, seed = table
    width = clusters.width
    make = partial(SahaBatchSampler, sampling=clusters, mix_subsets=mix, num_processes=processes)
    sampler = make(rows_of(clusters.num_rows), batch_size, seed=seed)
    again = pickle.loads(pickle.dumps(make))(rows_of(clusters.num_rows), batch_size, seed=seed)
    again = pickle.loads(pickle.dumps(again))
    sampled = {cluster[0]: cluster for cluster in clusters.rows.tolist()}
    subset_of = {
        row: subset
        for cluster, subset in zip(clusters.rows.tolist(), clusters.subsets.tolist(), strict=True)
        for row in cluster
    }
    for epoch in (0, 1):
        batches = epoch_of(sampler, epoch)
        assert batches == epoch_of(again, epoch)
        assert len(batches) == len(sampler)
        assert {len(batch) for batch in batches} == {batch_size}

        shards = [list(BatchSamplerShard(sampler, processes, rank, even_batches=False)) for rank in range(processes)]
        steps = list(zip(*shards, strict=True))
        assert [batch for step in steps for batch in step] == batches

        fillers, anchors = 0, Counter()
        for step in steps:
            filled = pairs_of(step, width)
            assert len({rows[0] for rows in filled}) == len(filled)  # no cluster twice in a step
            if not mix:
                assert len({subset_of[rows[0]] for rows in filled}) == 1
            for rows in filled:
                assert len(set(rows)) == width
                assert len({subset_of[row] for row in rows}) == 1
                for row, wanted in zip(rows, sampled[rows[0]], strict=True):
                    assert wanted in (row, -1)
                    fillers += wanted == -1
            anchors.update(rows[0] for rows in filled)
        assert anchors.keys() == sampled.keys()
        assert anchors.total() - len(sampled) == sampler.num_repeated
        assert fillers == sampler.num_fillers


def test_seed_and_epoch_decide_the_order():
    clusters = clusters_of([[row, row + 1] for row in range(0, 60, 2)], num_rows=60)
    first, other = sampler_of(clusters, 4, seed=1), sampler_of(clusters, 4, seed=2)
    assert epoch_of(first, 0) == epoch_of(first, 0) != epoch_of(first, 1)
    assert epoch_of(first, 0) != epoch_of(other, 0)
    # A trainer that resumes in epoch 1 makes a new sampler.
    assert epoch_of(sampler_of(clusters, 4, seed=1), 1) == epoch_of(first, 1)


def test_mixed_batches_mix_and_separate_ones_do_not():
    subsets = [[[row, row + 1] for row in range(start, start + 40, 2)] for start in (0, 40)]
    clusters = clusters_of(*subsets, num_rows=80)
    homogeneous = [len({row // 40 for row in batch}) == 1 for batch in epoch_of(sampler_of(clusters, 8), 0)]
    assert not all(homogeneous)
    separate = epoch_of(sampler_of(clusters, 8, mix_subsets=False), 0)
    assert all(len({row // 40 for row in batch}) == 1 for batch in separate)
    of_first = [batch[0] < 40 for batch in separate]
    assert of_first != sorted(of_first) and of_first != sorted(of_first, reverse=True)  # the subsets take turns


def write(folder, name, method="saha", k=2, members=((1, 2), (4, -1))):
    """A sampling file of a subset of six rows, with the anchors 0 and 3."""
    record = {
        "subset": name,
        "method": method,
        "settings": {"num_hard_negatives": k},
        "data": {
            **dict.fromkeys(("data_dir", "image_dir", "source", "split", "digest"), ""),
            **{"columns": [], "image_columns": [], "limit": None, "num_rows": 6},
        },
        "model": dict.fromkeys(("name", "revision", "prompt_mode", "fingerprint"), ""),
        "counts": {
            **dict.fromkeys(("rows", "queries", "candidates", "errors", "phase_1", "phase_2", "reused"), 0),
            **{"clusters": 2, "short": sum(sum(member >= 0 for member in row) < k for row in members)},
        },
        "seconds": {"encode": 0, "mine": 0},
    }
    ids = np.array(members, dtype=np.int64)
    unknown = np.full(ids.shape, np.nan, dtype=np.float32)
    write_sampling(folder, record, SampledClusters(np.array([0, 3]), ids, np.ones(2, dtype=np.int64), unknown))
    return read_sampling(folder / f"{name}.parquet")


def test_sampling_files_of_several_subsets_name_rows_of_their_concatenation(tmp_path):
    first, second = write(tmp_path, "first"), write(tmp_path, "second", members=((5, -1), (-1, -1)))
    clusters = DatasetClusters.of([first, second])
    assert clusters.rows.tolist() == [[0, 1, 2], [3, 4, -1], [6, 11, -1], [9, -1, -1]]
    assert clusters.subsets.tolist() == [0, 0, 1, 1]
    assert (clusters.names, clusters.num_rows, clusters.width) == (("first", "second"), 12, 3)
    assert repr(clusters) == "DatasetClusters(2 subsets, 4 clusters of 3, 12 rows)"
    direct = SahaBatchSampler(rows_of(12), 6, sampling=[first, second])
    assert list(direct) == list(SahaBatchSampler(rows_of(12), 6, sampling=clusters))
    # k members are missing from every cluster, or there are none to miss.
    alone = write(tmp_path, "third", members=((-1, -1), (-1, -1)))
    assert DatasetClusters.of(alone).rows.tolist() == [[0, -1, -1], [3, -1, -1]]
    in_batch = write(tmp_path, "fourth", method="in-batch", k=0, members=((), ()))
    assert DatasetClusters.of(in_batch).rows.tolist() == [[0], [3]]


def test_what_does_not_fit_is_refused_with_a_remedy(tmp_path):
    clusters = clusters_of([[0, 1], [2, 3]], [[4, 5]], num_rows=6)
    with pytest.raises(ValueError, match=r"batch_size is 3, but a cluster has 2 rows \(k \+ 1\); .* such as 4"):
        sampler_of(clusters, 3)
    with pytest.raises(ValueError, match="the dataset has 5 rows, the sampling files are of 6"):
        SahaBatchSampler(rows_of(5), 2, sampling=clusters)
    with pytest.raises(ValueError, match=r"all together: 3 clusters, but a step takes 4 .* lower the batch size$"):
        sampler_of(clusters, 8)
    with pytest.raises(ValueError, match=r"s1: 1 clusters, but a step takes 2 .* mix subsets"):
        sampler_of(clusters, 4, mix_subsets=False)
    with pytest.raises(ValueError, match=r"all together: 3 clusters, but a step takes 4 \(2 x 4 rows, 2 a cluster\)"):
        SahaBatchSampler(rows_of(6), 4, sampling=clusters, num_processes=2)
    with pytest.raises(ValueError, match="subset s1 has 1 rows, a cluster takes 2"):
        sampler_of(clusters_of([[0, 1], [2, 3]], [[4, -1]], num_rows=6), 2)
    with pytest.raises(SamplingError, match=r"method hn are not pairs .* trainers\.training_dataset"):
        DatasetClusters.of(write(tmp_path, "plain", method="hn"))
    with pytest.raises(SamplingError, match=r"k = 3, but .*first.* k = 2; sample all subsets alike"):
        DatasetClusters.of([write(tmp_path, "first"), write(tmp_path, "wider", k=3)])
    with pytest.raises(SamplingError, match="no sampling file"):
        DatasetClusters.of([])


@pytest.mark.parametrize("num_processes", [1, 2])
def test_clusters_of_a_subset_stand_side_by_side_in_a_batch(num_processes):
    subsets = [[[row, row + 1] for row in range(first, first + 16, 2)] for first in (0, 16, 32)]
    clusters = clusters_of(*subsets, num_rows=48)
    sampler = SahaBatchSampler(rows_of(48), 12, sampling=clusters, num_processes=num_processes)
    mixed = 0
    for batch in epoch_of(sampler, 1):
        own = [row // 16 for row in batch[::2]]
        assert own == sorted(own)
        mixed += len(set(own)) > 1
    assert mixed
