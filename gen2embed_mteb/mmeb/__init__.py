"""MMEB: the dataset table, readers of its files, scoring by Precision@1, the evaluation run and its reports."""

from gen2embed_mteb.mmeb.datasets import MMEB, Benchmark, DatasetInfo

__all__ = ["MMEB", "Benchmark", "DatasetInfo"]
