"""Loads an exported folder in plain sentence-transformers, in a process without this package, and compares vectors.

1. The fixed inputs are written to a temporary folder: texts as JSON, images as PNG.
2. A process of its own loads the exported folder and encodes them. The start-up hook is off there, and the process ends
   with an error if this package was imported all the same.
3. Its vectors are compared with those of `Gen2Embed`, loaded from the same folder.

Cost: two loaded models, one after the other.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gen2embed_mteb.errors import Gen2EmbedError, one_line
from gen2embed_mteb.serving.check import local_vectors
from gen2embed_mteb.serving.comparison import Report, compare
from gen2embed_mteb.serving.samples import SIDES, Sample, samples

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

_MOST_TOLD = 600
_RAISED = re.compile(r"^[\w.]*(?:Error|Exception)\b", re.M)
_PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
folder, model_folder, device = Path(sys.argv[1]), sys.argv[2], sys.argv[3] or None
inputs = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
for (message,) in inputs:
    for part in message["content"]:
        if part["type"] == "image":
            part["image"] = Image.open(folder / part["image"])
model = SentenceTransformer(model_folder, device=device, local_files_only=True)
as_float32 = {"convert_to_tensor": True, "batch_size": 1, "show_progress_bar": False}
for side, encode in (("query", model.encode_query), ("document", model.encode_document)):
    np.save(folder / f"{side}.npy", encode(inputs, **as_float32).float().cpu().numpy(), allow_pickle=False)
assert "gen2embed_mteb" not in sys.modules, "gen2embed_mteb was imported, which this process must do without"
"""


class PlainClientError(Gen2EmbedError):
    """Plain sentence-transformers does not load a folder, or does not encode with it."""


def check_plain(folder: str | Path, model: Gen2Embed) -> Report:
    """Compare plain sentence-transformers with a model that was loaded from the same folder.

    Args:
        folder: The exported folder.
        model: The folder, loaded as `Gen2Embed`.

    Raises:
        PlainClientError: Plain sentence-transformers does not load the folder, or does not encode.
    """
    given = samples(with_images=model.takes_images)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        theirs = _plain_vectors(Path(place), Path(folder).resolve(), given, str(model.device))
    ours = local_vectors(model, given)
    rows = [
        compare(sample.kind, side, ours[side][number], theirs[side][number])
        for number, sample in enumerate(given)
        for side in SIDES
    ]
    return Report(rows, str(model[0].model.dtype).removeprefix("torch."))


def check_export(folder: str | Path, device: str | None = None) -> int:
    """Compare as `check_plain` does, print the result, and return the exit status.

    Args:
        folder: The exported folder.
        device: Where both models run; `None` leaves the choice to sentence-transformers.

    Returns:
        1 if a vector differs, or the folder does not load in plain sentence-transformers; else 0.
    """
    from gen2embed_mteb.embedder.model import Gen2Embed
    from gen2embed_mteb.serving.command import text_of

    try:
        report = check_plain(folder, Gen2Embed(folder, device=device))
    except PlainClientError as error:
        sys.stdout.write(f"Failed: {error}\n")
        return 1
    sys.stdout.write(f"{text_of(report, 'plain sentence-transformers')}\n")
    return int(bool(report.faults))


def _plain_vectors(place: Path, folder: Path, given: list[Sample], device: str) -> dict[str, Any]:
    inputs = []
    for number, sample in enumerate(given):
        names = [f"{number}-{one}.png" for one in range(len(sample.images))]
        for name, image in zip(names, sample.images, strict=True):
            image.save(place / name)
        parts = [{"type": "image", "image": name} for name in names]
        if sample.text or not parts:
            parts.append({"type": "text", "text": sample.text})
        inputs.append([{"role": "user", "content": parts}])
    (place / "inputs.json").write_text(json.dumps(inputs), encoding="utf-8")
    environment = {**os.environ, "GEN2EMBED_NO_HOOK": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(  # noqa: S603 - this interpreter, and a program of ours
        [sys.executable, "-c", _PROGRAM, str(place), str(folder), device],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        raised = list(_RAISED.finditer(done.stderr))
        said = done.stderr[raised[-1].start() :] if raised else done.stderr[-_MOST_TOLD:] or f"status {done.returncode}"
        raise PlainClientError(
            f"plain sentence-transformers cannot use {folder}: {one_line(ValueError(said[:_MOST_TOLD]))}. If it asks "
            "for torchvision, install the extra [image]; with import gen2embed_mteb before it, it needs none"
        )
    return {side: np.load(place / f"{side}.npy", allow_pickle=False) for side in SIDES}
