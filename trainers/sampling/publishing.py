"""Which files of a sampling folder are sent to the hub, and their card.

Per subset, the clusters and their record are sent, after both were read and compared. Everything else is left out:
vectors, images, and the files that copy texts of the training data, which have their owners' licence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gen2embed_mteb.evaluation.tables import Table, as_markdown
from gen2embed_mteb.hub.addresses import is_address
from gen2embed_mteb.hub.plans import CARD, LeftOut, Plan, PlannedFile, fault_of, names_in, planned, require_folder
from trainers.batches.sampled import read_samplings
from trainers.sampling.files import MEANING, Sampling, SamplingError, subset_files
from trainers.sampling.records import OFFICIAL_SUFFIX, read_record

_DECISIVE = re.compile(r"[^/]+\.(parquet|json)")
_REASONS = (
    (r"embeddings/", "vectors; `sample` makes them again"),
    (r"images-cache/", "images of the training data"),
    (rf".*{re.escape(OFFICIAL_SUFFIX)}", "copies rows of the training data, which have their owners' licence"),
    (r"errors\.jsonl", "names files of this machine"),
    (r".*\.html", "a page with images of the training data"),
    (r"\..*", "hidden"),
    (r".*\.(log|out|err)", "a log"),
)


def is_sampled(folder: Path) -> bool:
    """Return whether a folder holds sampling files.

    Args:
        folder: The folder; it may be missing.
    """
    for path in sorted(folder.glob("*.parquet")) if folder.is_dir() else ():
        try:
            read_record(path.with_suffix(".json"))
        except SamplingError:
            continue
        return True
    return False


def sampling_plan(folder: Path, repo_id: str) -> Plan:
    """Say what of a sampling folder is sent.

    Args:
        folder: The `--output_dir` of `gen2embed sample`.
        repo_id: The repository, for the card.

    Raises:
        SamplingError: A file is damaged, or a table has no record.
    """
    root = require_folder(folder)
    samplings = read_samplings(str(root))
    ours = {name for sampling in samplings for name in subset_files(sampling.record["subset"])[:2]}
    files: list[PlannedFile] = []
    left_out: list[LeftOut] = []
    for name in names_in(root):
        reason = fault_of(root / name) if name in ours else _reason(name)
        if name == CARD and not fault_of(root / name):
            files.append(planned(name, root / name))
        elif reason:
            left_out.append(LeftOut(name, reason))
        else:
            files.append(planned(name, root / name))
    if not any(file.name == CARD for file in files):
        files.append(planned(CARD, dataset_card(samplings, repo_id).encode()))
    return Plan(
        root,
        "dataset",
        tuple(sorted(files, key=lambda file: file.name)),
        tuple(left_out),
        _notes(samplings),
        _DECISIVE,
    )


def _reason(name: str) -> str:
    return next((reason for pattern, reason in _REASONS if re.fullmatch(pattern, name)), "no sampling file")


def _notes(samplings: Sequence[Sampling]) -> tuple[str, ...]:
    """Return a note for every folder of this machine that the records name."""
    data = [sampling.record["data"] for sampling in samplings]
    local = sorted(
        {str(one[key]) for one in data for key in ("data_dir", "image_dir", "source") if _is_local(one[key])}
    )
    if not local:
        return ()
    return (
        f"the records name places of this machine ({', '.join(local[:3])}); who trains on them passes --data_dir and "
        "--image_dir",
    )


def _is_local(place: str) -> bool:
    return bool(place) and (Path(place).is_absolute() or place.startswith(("~", "..")))


def dataset_card(samplings: Sequence[Sampling], repo_id: str) -> str:
    """Return the card of a repository with sampling files; equal files give the same card.

    Args:
        samplings: The sampling files of one run.
        repo_id: The repository.
    """
    first = samplings[0].record
    method, data, model = first["method"], first["data"], first["model"]
    settings = {name: value for name, value in first["settings"].items() if value not in (None, False)}
    source = str(data["data_dir"])
    known = source if is_address(source) or not _is_local(source) else Path(source).name
    subsets = [sampling.record["subset"] for sampling in samplings]
    lines = [
        "---",
        "tags:",
        *(f"- {tag}" for tag in ("gen2embed", "hard-negatives", "multimodal", "sentence-transformers")),
        "task_categories:",
        "- feature-extraction",
        "configs:",
        *(line for name in subsets for line in _config(name)),
        "---",
        "",
        f"# {repo_id.rpartition('/')[2]}",
        "",
        "Negatives for contrastive training, chosen offline by `gen2embed sample` "
        "([Gen2Embed](https://arxiv.org/abs/2508.00955)). The files hold row numbers, no texts and no images: the "
        "training data is needed beside them, and its licence applies to it.",
        "",
        f"- Method: `{method}`; {MEANING[method]}",
        f"- Settings: {', '.join(f'`{name}` {value}' for name, value in settings.items())}",
        f"- Training data: `{known}`, split `{data['split']}`"
        + (f", the first {data['limit']:,} rows" if data["limit"] else ""),
    ]
    if model["fingerprint"]:
        by = " ".join(filter(None, (_shown_model(model["name"]), model["revision"])))
        lines.append(f"- Sampled by `{by}`, prompt `{model['prompt_mode']}`, fingerprint `{model['fingerprint']}`")
    lines += ["", as_markdown(_table(samplings)), "", "## Use", "", *_use(repo_id, known)]
    return "\n".join(lines) + "\n"


def _shown_model(name: str) -> str:
    return Path(name).name if _is_local(name) else name


def _config(subset: str) -> list[str]:
    quoted = json.dumps(subset, ensure_ascii=False)
    return [f"- config_name: {quoted}", f"  data_files: {json.dumps(subset_files(subset)[0], ensure_ascii=False)}"]


def _table(samplings: Sequence[Sampling]) -> Table:
    table: Table = [["Subset", "Rows", "Clusters", "Phase 1", "Phase 2", "Set aside", "Digest of the rows", "SHA-256"]]
    for sampling in samplings:
        record: dict[str, Any] = sampling.record
        counts = [
            record["data"]["num_rows"],
            *(record["counts"][name] for name in ("clusters", "phase_1", "phase_2", "errors")),
        ]
        digests = [f"`{record['data']['digest']}`", f"`{record['sha256']}`"]
        table.append([record["subset"], *(f"{count:,}" for count in counts), *digests])
    return table


def _use(repo_id: str, data: str) -> list[str]:
    return [
        "```bash",
        f"gen2embed train --processed_data_path hf://datasets/{repo_id} --data_dir {data} \\",
        "    --model_name MODEL --output_dir OUT",
        "```",
        "",
        "Training refuses rows whose digest is another. A row of a table is a cluster: `anchor` and `members` are row",
        "numbers of the split, from 0; `phase` is 1 or 2 (Algorithm 1); `similarities` has one cosine per member.",
        "`SUBSET.json` holds every setting, the counts and the digests.",
    ]
