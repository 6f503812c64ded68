"""The prediction of one row."""

import numpy as np


def get_pred(qry_t, tgt_t, normalization=False):
    scores = np.dot(tgt_t, qry_t)
    if normalization:
        scores = scores / (np.linalg.norm(tgt_t, axis=1) * np.linalg.norm(qry_t))
    return scores, np.argmax(scores)
