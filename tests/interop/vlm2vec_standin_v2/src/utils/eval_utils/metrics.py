"""Figures of a ranking with one relevant name."""

import numpy as np


class RankingMetrics:
    def __init__(self, metric_list, k_list=(1, 5, 10)):
        self.metric_list = metric_list
        self.k_list = k_list

    def evaluate(self, predictions):
        ranks = [row["prediction"].index(row["label"]) for row in predictions]
        figures = {"hit": lambda rank: 1.0, "mrr": lambda rank: 1 / (rank + 1)}
        return {
            f"{name}@{k}": float(np.mean([figures[name](rank) if rank < k else 0.0 for rank in ranks]))
            for name in self.metric_list
            for k in self.k_list
        }
