"""Facts about the datasets that VLM2Vec evaluates, by VLM2Vec's names."""

from __future__ import annotations

from functools import cache

from gen2embed_mteb.mmeb import MMEB, DatasetInfo


@cache
def known_datasets() -> dict[str, DatasetInfo]:
    """Return the datasets of MMEB, then those of MMEB-mini, in the order of reports, by each of their names."""
    from gen2embed_mteb.mini.benchmark import MMEB_MINI

    return {name: dataset for dataset in (*MMEB.datasets, *MMEB_MINI.datasets) for name in dataset.folders}


def candidates_are_queries(name: str) -> bool:
    """Return whether a dataset's candidates are encoded as queries: those of RefCOCO-Matching have an instruction."""
    dataset = known_datasets().get(name)
    return dataset is not None and dataset.candidates_as_queries
