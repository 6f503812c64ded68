"""Times Algorithm 1 (variant `official`), a per-query FAISS implementation of it, and its matrix products alone.

python benchmarks/mining.py --output benchmarks/results/mining.json
python benchmarks/mining.py --output benchmarks/results/mining.json --cases large

Cases (d = 1536, k = 7, m = 6): `one-to-one` has 20,000 queries and candidates, `labels` 8,000 queries over 100 labels,
and `large` 100,000 queries and candidates, without the peer, which would take hours. Each case runs in a process of its
own. Cases already in the output are kept unless they are run again.

The peer is a plain version of Algorithm 1. One query at a time, it asks an `IndexFlatIP` for 2 m k candidates, gathers
the owners of each candidate, and computes their products with the query. It is timed twice: with all vectors in one
array, from which a candidate's owners are gathered in one call; and with one vector per query in a dictionary, as the
official code keeps them, from which the owners' vectors are put together for each candidate. All must form identical
clusters.

The bare products are those that no implementation can avoid, given the clusters: every query that is unused when its
turn comes is multiplied with all candidates, and with labels also with the queries that are free at that time. They are
measured alone, 512 rows at a time.

The data: the two vectors of a pair have a part in common, and the pairs of a topic (100 pairs per topic) have the
topic's vector in common, so that a pool holds candidates of the query's topic first and of others after them. A
labelled query is its label's vector with noise. All vectors are random, of unit length, and rounded to multiples of
2^-11. Then every float32 sum is exact in any order, and the peer's order of two almost equal scores does not depend on
rounding.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.storage.developer_files import write_json

WIDTH, K, M, SEED = 1536, 7, 6, 0
CASES = {"one-to-one": (20_000, 20_000), "labels": (8_000, 100), "large": (100_000, 100_000)}
MIB = 1 << 20

Matrix = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


def make(queries: int, candidates: int) -> tuple[Matrix, Matrix, Indices]:
    """Make the data, a part at a time, so that the process needs hardly more memory than the data."""
    rng = np.random.default_rng(SEED)
    left, right = np.empty((queries, WIDTH), np.float32), np.empty((candidates, WIDTH), np.float32)

    def fill(out: Matrix, *parts: Matrix) -> None:
        for row in range(len(out)):
            vector = sum((part[row] for part in parts), rng.standard_normal(WIDTH, np.float32))
            out[row] = np.round(vector / np.linalg.norm(vector) * 2048) / 2048

    if queries != candidates:
        fill(right)
        positives = rng.integers(0, candidates, queries)
        for start in range(0, queries, 1000):
            fill(left[start : start + 1000], 20 * right[positives[start : start + 1000]])
        return left, right, positives
    topics = rng.standard_normal((max(1, queries // 100), WIDTH), np.float32)
    order = rng.permutation(queries)
    for start in range(0, queries, 1000):
        rows = slice(start, start + 1000)
        shared = topics[order[rows] % len(topics)] + 1.5 * rng.standard_normal((len(order[rows]), WIDTH), np.float32)
        fill(left[rows], shared)
        fill(right[rows], shared)
    return left, right, np.arange(queries)


def peer(queries: Matrix, candidates: Matrix, positives: Indices, dictionary: bool) -> list[list[int]]:
    """Run the official procedure, one query at a time; with `dictionary`, also one vector at a time."""
    import faiss
    import torch

    index = faiss.IndexFlatIP(WIDTH)
    index.add(candidates)
    one_by_one = dict(enumerate(queries))
    owners = [np.flatnonzero(positives == candidate) for candidate in range(len(candidates))]
    used = np.zeros(len(queries), bool)
    formed: list[list[int]] = []
    for phase in (1, 2):
        taken = np.zeros(len(queries), bool)
        for query in np.flatnonzero(~used):
            if taken[query]:
                continue
            # A few more than needed are asked for, as FAISS does not say which of several equal ones come last.
            scores, found = index.search(queries[query][None], min(2 * M * K + 16, len(candidates)))
            ranked = found[0][np.lexsort((found[0], -scores[0]))][: 2 * M * K]
            members: list[tuple[float, int]] = []
            for candidate in ranked[ranked != positives[query]]:
                if not len(owners[candidate]):
                    continue
                group = owners[candidate]
                if dictionary:
                    group = group[~taken[group]]
                    if not len(group):
                        continue
                    rows = [torch.tensor(one_by_one[owner])[None] for owner in group.tolist()]
                    similarity = (torch.cat(rows) @ torch.tensor(one_by_one[query])).numpy()
                else:
                    similarity = queries[group] @ queries[query]
                    similarity[taken[group]] = -np.inf
                best = int(similarity.argmax())
                if taken[group[best]]:
                    continue
                members.append((float(similarity[best]), int(group[best])))
                if len(members) == M * K * phase:
                    break
            if members:
                cluster = [int(query), *(member for _, member in sorted(members)[:K])]
                formed.append(cluster)
                used[cluster] = taken[cluster] = True
    return formed


def bare(queries: Matrix, candidates: Matrix, anchors: Indices, members: Indices, phase: Indices) -> dict[str, Any]:
    """Time the products that the clusters need, alone."""
    import torch

    first = phase == 1
    size = (members >= 0).sum(1) + 1
    turns = int(first.sum()) + len(queries) - int(size[first].sum())
    left, right = torch.from_numpy(queries), torch.from_numpy(candidates)
    labels = len(queries) != len(candidates)
    free = len(queries) - np.concatenate(([0], np.cumsum(size[first])))
    multiplied = 0
    started = time.perf_counter()
    for start in range(0, turns, 512):
        rows = left[start : min(start + 512, turns)]
        rows @ right.T
        multiplied += len(rows) * len(right)
        if labels:
            owners = int(free[min(start, len(free) - 1)])
            rows @ left[:owners].T
            multiplied += len(rows) * owners
    seconds = time.perf_counter() - started
    return {"turns": turns, "products": multiplied, "seconds": seconds, "gflops": 2e-9 * multiplied * WIDTH / seconds}


def memory(name: str) -> int:
    """Return the value of a line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no line {name}")


def run(case: str, with_peer: bool, backend: str, repeats: int) -> dict[str, Any]:
    """Run one case; it must run in a new process, since the peak of memory is that of the whole process."""
    import torch

    from trainers import mine_clusters

    logging.basicConfig(level=logging.WARNING)
    queries, candidates, positives = make(*CASES[case])
    torch.ones(512, 512) @ torch.ones(512, 512)  # the threads are started before memory and time are taken
    before = memory("VmRSS")
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        clusters = mine_clusters(queries, candidates, positives, K, M, "official", backend=backend)
        times.append(time.perf_counter() - started)
    peak = memory("VmHWM")
    products = [bare(queries, candidates, clusters.anchors, clusters.members, clusters.phase) for _ in range(repeats)]
    fastest = min(products, key=lambda product: product["seconds"])
    seconds = min(times)
    result: dict[str, Any] = {
        "queries": len(queries),
        "candidates": len(candidates),
        "width": WIDTH,
        "k": K,
        "m": M,
        "variant": "official",
        "backend": backend,
        "threads": torch.get_num_threads(),
        "clusters": [int((clusters.phase == phase).sum()) for phase in (1, 2)],
        "short_clusters": int((clusters.members < 0).any(1).sum()),
        "seconds": seconds,
        "seconds_all": times,
        "bare": fastest,
        "over_bare": seconds / fastest["seconds"],
        "input_mib": (queries.nbytes + candidates.nbytes) / MIB,
        "peak_above_start_mib": (peak - before) / MIB,
        "peak_above_inputs_mib": (peak - queries.nbytes - candidates.nbytes) / MIB,
    }
    if with_peer:
        import faiss

        result["peer"] = f"faiss {faiss.__version__}, IndexFlatIP"
        ours = [
            [int(a), *(int(p) for p in row if p >= 0)]
            for a, row in zip(clusters.anchors, clusters.members, strict=True)
        ]
        for name, dictionary in (("peer", False), ("dictionary_peer", True)):
            started = time.perf_counter()
            formed = peer(queries, candidates, positives, dictionary)
            result[f"{name}_seconds"] = time.perf_counter() - started
            result[f"{name}_ratio"] = result[f"{name}_seconds"] / seconds
            if ours != formed:
                first = next(i for i, (a, b) in enumerate(zip(ours, formed, strict=False)) if a != b)
                raise AssertionError(f"{case}: cluster {first} is {ours[first]}, the {name}'s {formed[first]}")
        result["identical"] = True
    return result


def processor() -> str:
    """Return the CPU's name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    """Run the cases, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["one-to-one", "labels"])
    parser.add_argument("--no_peer", action="store_true", help="leave the peer out")
    parser.add_argument("--backend", choices=["auto", "faiss", "torch"], default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="ours and the bare products; the fastest counts")
    parser.add_argument("--output", type=Path, default=None, help="results JSON (default: print only)")
    arguments = parser.parse_args()

    if len(arguments.cases) > 1:
        for case in arguments.cases:
            options = ["--backend", arguments.backend, "--repeats", str(arguments.repeats)]
            options += ["--no_peer"] if arguments.no_peer else []
            options += ["--output", str(arguments.output)] if arguments.output else []
            command = [sys.executable, sys.argv[0], "--cases", case, *options]
            subprocess.run(command, check=True)  # noqa: S603 - itself
        return
    case = arguments.cases[0]
    large = case == "large"
    result = run(case, not (arguments.no_peer or large), arguments.backend, 1 if large else arguments.repeats)
    result |= {
        "seed": SEED,
        "command": shlex.join(["python", *sys.argv]),
        "cpu": processor(),
        "versions": installed_versions(),
    }
    of_peer = "– | – | –"
    if "peer_ratio" in result:
        of_peer = f"{result['peer_seconds']:.1f} | {result['peer_ratio']:.1f} | {result['dictionary_peer_ratio']:.1f}"
    print("| case | ours s | bare s | ours / bare | peer s | peer / ours | dictionary / ours | MiB above inputs |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {case} | {result['seconds']:.2f} | {result['bare']['seconds']:.2f} | {result['over_bare']:.2f} "
        f"| {of_peer} | {result['peak_above_start_mib']:.0f} |"
    )
    if arguments.output:
        results = json.loads(arguments.output.read_text(encoding="utf-8"))["cases"] if arguments.output.exists() else {}
        write_json(arguments.output, {"cases": results | {case: result}})


if __name__ == "__main__":
    main()
