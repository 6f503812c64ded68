"""Checks every model family that the tests know, and writes what was found: which facts hold, and by how much.

python benchmarks/families.py --output benchmarks/results/families.json --pages

Each family is a tiny model with random weights, of its real classes and processor. `--real NAME=MODEL[:GGUF_FILE]`
adds a model with real weights. `--templates FOLDER` says which published chat templates (`NAME.jinja`) are detected.
Families whose processors need torchvision are checked where it is installed. `--pages` writes the table into the pages
that show it.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers.utils import is_torchvision_available

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.chat_formats.detection import detect
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import as_text
from gen2embed_mteb.inspection.model_checks import check_model
from gen2embed_mteb.storage.developer_files import write_atomic, write_json
from trainers import SahaLoss
from trainers.batches.collation import CellReader
from trainers.loss.saha_loss import TEMPERATURE

ROOT = Path(__file__).resolve().parents[1]
_TABLE = re.compile(r"(<!-- families table -->\n\n).*?(<!-- end of the table -->)", re.S)
PHI = "phi3_v"
_FOLDER = re.compile(r"(?<=[ =])/[^ ]*/")


def main() -> None:
    """Check all families, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--templates", type=Path, default=None)
    parser.add_argument("--real", action="append", default=[], metavar="NAME=MODEL[:GGUF_FILE]")
    parser.add_argument("--pages", action="store_true", help="write the table into README.md and the guide")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)

    families = {}
    for name in known():
        with tempfile.TemporaryDirectory() as folder:
            families[name] = facts(write(name, Path(folder) / name))
        print(name, families[name], flush=True)
    real = {}
    for text in arguments.real:
        name, _, model = text.partition("=")
        source, _, file = model.partition(":")
        real[name] = facts(source, gguf_file=file) if file else facts(source)
        print(name, real[name], flush=True)
    record = {
        "families": families,
        "real": real,
        "templates": templates(arguments.templates) if arguments.templates else {},
        "versions": {**installed_versions(), "torchvision": _version_of_torchvision()},
        "command": _FOLDER.sub("", " ".join(["python", *sys.argv])),
    }
    write_json(arguments.output, record)
    print(as_text(rows(record)))
    if arguments.pages:
        for page, table in tables(record).items():
            path = ROOT / page
            text = _TABLE.sub(lambda found, new=table: f"{found[1]}{new}\n{found[2]}", path.read_text("utf-8"))
            write_atomic(path, text.encode())


def known() -> list[str]:
    """Return the names of the families that can be checked here."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from tiny_any import ANY
    from tiny_models import FAMILIES
    from tiny_torchvision import TORCHVISION

    return [*FAMILIES, *ANY, PHI, *(TORCHVISION if is_torchvision_available() else ())]


def write(name: str, folder: Path) -> Path:
    """Write the tiny model of a family."""
    from tiny_any import write_any
    from tiny_models import FAMILIES, write_tiny
    from tiny_phi3v import write_phi3v
    from tiny_torchvision import TORCHVISION

    if name == PHI:
        return write_phi3v(folder)
    if name in FAMILIES:
        return write_tiny(name, folder)
    return write_any(name, folder, tiny=TORCHVISION.get(name))


def facts(source: str | Path, **options: Any) -> dict[str, Any]:
    """Return what holds for a model.

    Args:
        source: The model.
        options: Options of `Gen2Embed`.

    Returns:
        `checks`, what `gen2embed doctor` finds, by name: [whether it passed, what was measured]; `export`, the largest
        difference of a vector of the exported folder, loaded by sentence-transformers alone, None if there are no stock
        classes to export to; `gradients`, the largest difference of a gradient of the cached loss and of one pass, by
        the largest gradient.
    """
    model = Gen2Embed(source, device="cpu", model_kwargs={"dtype": torch.float32}, **options)
    found: dict[str, Any] = {"images": model.takes_images, "type": model[0].config.model_type}
    inputs: list[Any] = ["a red circle", {"text": "Find a page.\n"}]
    if model.takes_images:
        picture = Image.effect_noise((90, 60), 64).convert("RGB")
        inputs += [{"image": picture}, {"text": "What is it?", "image": picture}]
    found["export"] = None if found["type"] == PHI else _exported(model, inputs)
    found["gradients"] = _gradients(model, inputs)
    found["checks"] = {check.name: [check.passed, check.found] for check in check_model(model)}
    return found


def _exported(model: Gen2Embed, inputs: list[Any]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        plain = SentenceTransformer(folder, device="cpu")
        return float(np.abs(plain.encode_query(inputs) - model.encode_query(inputs)).max())


def _gradients(model: Gen2Embed, inputs: list[Any]) -> float:
    reader = CellReader(model, image_options=model.image_options)
    cells = [one if isinstance(one, dict) else {"text": one} for one in inputs]
    features = [reader(cells, task="query"), reader(cells[::-1], task="document")]
    weights = list(model.parameters())
    queries, candidates = (model(dict(column))["sentence_embedding"] for column in features)
    value = torch.nn.functional.cross_entropy(queries @ candidates.T / TEMPERATURE, torch.arange(len(cells)))
    wanted = torch.autograd.grad(value, weights, allow_unused=True)
    model.zero_grad()
    SahaLoss(model, mini_batch_size=1, mask_equal_positives=False)(features).backward()
    pairs = [(weight.grad, want) for weight, want in zip(weights, wanted, strict=True) if want is not None]
    largest = max(float(want.abs().max()) for _, want in pairs)
    return max(float((got - want).abs().max()) for got, want in pairs) / largest


def templates(folder: Path) -> dict[str, str]:
    """Return for each published template in a folder "detected", or why not."""
    found = {}
    for path in sorted(folder.glob("*.jinja")):
        try:
            detect(path.read_text("utf-8"), {"bos_token": "<s>", "eos_token": "</s>"})
            found[path.stem] = "detected"
        except Gen2EmbedError as error:
            found[path.stem] = str(error)
    return found


def rows(record: dict[str, Any]) -> list[list[str]]:
    """Return the table, with its header.

    Args:
        record: The content of the JSON file.
    """
    table = [["model type", "inputs", "checks", "exported", "gradients", "weights"]]
    for weights, models in (("tiny, random", record["families"]), ("real", record["real"])):
        for name, found in models.items():
            passed = [check[0] for check in found["checks"].values()]
            table.append(
                [
                    f"`{found['type']}`" if weights != "real" else f"`{found['type']}`: {name}",
                    "text, images" if found["images"] else "text",
                    f"{sum(passed)} of {len(passed)}",
                    _rounded(found["export"]),
                    _rounded(found["gradients"]),
                    weights,
                ]
            )
    return table


def tables(record: dict[str, Any]) -> dict[str, str]:
    """Return the tables in Markdown, by the page that shows them.

    Args:
        record: The content of the JSON file.
    """
    whole = [(name, found) for name, found in record["families"].items() if _is_whole(found)]
    real = [f"`{found['type']}` ({name})" for name, found in record["real"].items() if _is_whole(found)]
    detected = [f"`{name}`" for name, found in record["templates"].items() if found == "detected"]
    summary = [
        ["proven on", "models"],
        ["real weights", ", ".join(real)],
        [
            "tiny random weights, texts and images",
            ", ".join(f"`{found['type']}`" for _, found in whole if found["images"]),
        ],
        ["tiny random weights, texts", ", ".join(f"`{found['type']}`" for _, found in whole if not found["images"])],
        ["published chat templates", ", ".join(detected)],
    ]
    return {
        "README.md": _markdown(summary, "| --- | --- |"),
        "docs/guides/prompts_and_families.md": _markdown(rows(record), "| --- | --- | ---: | ---: | ---: | --- |"),
    }


def _is_whole(found: dict[str, Any]) -> bool:
    return (
        all(passed for passed, _ in found["checks"].values())
        and (found["export"] or 0) < 1e-5
        and found["gradients"] < 1e-4
    )


def _markdown(table: list[list[str]], marks: str) -> str:
    header, *lines = ("| " + " | ".join(line) + " |" for line in table)
    return "\n".join([header, marks, *lines, ""])


def _rounded(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0e}" if value else "0"


def _version_of_torchvision() -> str:
    if not is_torchvision_available():
        return ""
    import torchvision

    return str(torchvision.__version__)


if __name__ == "__main__":
    main()
