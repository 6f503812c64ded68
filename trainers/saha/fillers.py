"""Places for fillers: the queries that both phases of Algorithm 1 leave over (variant `paper`; "filler" is our word).

Each filler joins the first cluster that has room and holds no query with the same positive; a filler that fits nowhere
begins a cluster of its own. The search for that cluster never goes back: a union-find skips the clusters that are full,
and for each positive the search goes on behind the last cluster that was tried for it. Hence each pair of a positive
and a cluster with room is looked at once at most, which takes k + 1 comparisons. Memory: one number per cluster and one
per positive.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainers.saha.scores import Integers


def place_fillers(
    fillers: list[int],
    positives: Integers,
    k: int,
    *,
    anchors: list[int],
    members: list[list[int]],
    phases: list[int],
    sets: Sequence[frozenset[int]] | None = None,
) -> None:
    """Give every filler a place: in the first cluster it fits in, or in one of its own.

    Args:
        fillers: Queries in dataset order, none of them in a cluster.
        positives: (N,) The positive of every query.
        k: The most members that a cluster can have.
        anchors: The anchor of each cluster; a cluster that a filler begins is appended, here and below.
        members: The members of each cluster; a filler that joins a cluster is appended to its members.
        phases: The phase of each cluster; 2 for the clusters that fillers begin.
        sets: All positives of every query, where some have several; a filler then shares none with its cluster.
    """
    following = list(range(len(anchors) + 1))
    for cluster, queries in enumerate(members):
        if len(queries) == k:
            following[cluster] = cluster + 1
    # A cluster that is full, or holds a positive, stays so: no query need look at it again for that positive.
    begin: dict[int | frozenset[int], int] = {}

    def share(one: int, other: int) -> bool:
        return bool(positives[one] == positives[other]) if sets is None else not sets[one].isdisjoint(sets[other])

    for query in fillers:
        positive = int(positives[query]) if sets is None else sets[query]
        cluster = _open_from(following, begin.get(positive, 0))
        while cluster < len(anchors) and any(share(query, one) for one in (anchors[cluster], *members[cluster])):
            cluster = _open_from(following, cluster + 1)
        begin[positive] = cluster + 1
        if cluster == len(anchors):
            anchors.append(query)
            members.append([])
            phases.append(2)
            following.append(cluster + 1)
            continue
        members[cluster].append(query)
        if len(members[cluster]) == k:
            following[cluster] = cluster + 1


def _open_from(following: list[int], cluster: int) -> int:
    """Return the first cluster with room, from one on.

    This is a union-find with path halving: `following` of a cluster with room is the cluster itself.
    """
    while following[cluster] != cluster:
        following[cluster] = following[following[cluster]]
        cluster = following[cluster]
    return cluster
