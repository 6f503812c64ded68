"""Which files of a model's folder are sent to the hub, and the figures that its card gets.

Only files whose purpose is known by their name are sent: weights in safetensors, settings, tokenizer, templates, card
and licence. Everything else is left out with a reason: a pickle may run code where it is loaded, checkpoints hold
optimizer states, and logs and records name folders of the user's machine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run_folder import RESULTS
from gen2embed_mteb.hub.plans import CARD, LeftOut, Plan, PlannedFile, fault_of, names_in, planned, require_folder

_WEIGHTS = r"(model|adapter_model)(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|[\w.-]+\.gguf"
_SETTINGS = (
    r"config\.json|config_sentence_transformers\.json|sentence_[a-z_]*config\.json|modules\.json|generation_config\.json"
    r"|adapter_config\.json|[a-z_]*processor_config\.json|tokenizer[\w.-]*\.json|tokenizer\.model|vocab\.(json|txt)"
    r"|merges\.txt|added_tokens\.json|special_tokens_map\.json|readout\.json|calibration\.json|chat_template\.(jinja|json)"
    r"|router_config\.json"
)
_TEXTS = r"README\.md|(LICEN[CS]E|NOTICE)(\.(txt|md))?"
SENT = re.compile(rf"{_WEIGHTS}|{_SETTINGS}|{_TEXTS}")
"""The names of files that are sent, in the folder itself and in those of its modules."""
DECISIVE = re.compile(rf"(.*/)?({_WEIGHTS}|{_SETTINGS})")
_MODULE = re.compile(r"\d+_[A-Z]\w*/|\w+_\d+_[A-Z]\w*/|additional_chat_templates/")
_TEMPLATE = re.compile(r"[\w.-]+\.jinja")
_HOMES = r"/home/|/root/|/Users/|[A-Za-z]:\\+Users\\+"
"""Where people's folders lie on Linux, macOS and Windows; a pattern to search for, no place of one machine."""
_ADAPTER = "adapter_config.json"
_PATH = re.compile(r"(?<![\w./:])(?:/[\w.+@-]+){2,}")
_MOST_SEARCHED = 1 << 20
_PLACEHOLDER = "sentence_transformers_model_id"
_USAGE = """## Queries and documents

Queries have another prompt than documents. Plain `encode` encodes everything as documents.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{repo_id}")
queries = model.encode_query(["a red circle"])
documents = model.encode_document(["a red disc", "a blue square"])
print(model.similarity(queries, documents))
```
"""
_MARKS = ("config.json", "adapter_config.json", "modules.json")
_REASONS = (
    (r"checkpoint-\d+.*/", "a checkpoint: optimizer states, not a model to load"),
    (r"(optimizer|scheduler|rng_state|scaler).*|.*\.(pt|pth|bin|pkl|pickle|ckpt|npy|npz)", "a pickle or a raw array"),
    (r"runs/|wandb/|.*\.(log|out|err)|events\.out.*|emissions\.csv", "a log"),
    (
        r"train\.json|timing\.json|distill\.json|trainer_state\.json|figures\.json",
        "a record; it names folders of this machine",
    ),
    (r"adapter/", "the adapter alone; push this folder by itself"),
    (r"eval/|embeddings/|images-cache/", "results or vectors, not the model; the card has figures"),
    (r"\..*", "hidden"),
    (r".*\.py", "code is never sent"),
)


def model_plan(folder: str | Path, repo_id: str, results: Sequence[str] = ()) -> Plan:
    """Say what of a model's folder is sent.

    Args:
        folder: What `export`, `train`, `calibrate` or `save_pretrained` wrote.
        repo_id: The repository, which the card names.
        results: Output folders of `gen2embed evaluate` on this model, whose tables the card gets.

    Raises:
        Gen2EmbedError: It is no folder of a model, its weights are not in safetensors, or the results are of another.
    """
    root = require_folder(Path(folder).expanduser())
    if not any((root / mark).is_file() for mark in _MARKS):
        raise Gen2EmbedError(
            f"{root}: neither a model ({', '.join(_MARKS)}) nor sampling files; pass what export, train or sample wrote"
        )
    files: list[PlannedFile] = []
    left_out: list[LeftOut] = []
    for name in names_in(root):
        if name.endswith("/") and _MODULE.fullmatch(name):
            _take_module(root, name, files, left_out)
        elif name.endswith("/") or not SENT.fullmatch(name):
            left_out.append(LeftOut(name, _reason(name)))
        elif reason := fault_of(root / name):
            left_out.append(LeftOut(name, reason))
        elif name == CARD:
            card = with_usage((root / CARD).read_text("utf-8", "replace"), repo_id)
            files.append(planned(CARD, with_figures(card, root, results).encode()))
        else:
            files.append(planned(name, root / name))
    names = {file.name for file in files}
    if results and CARD not in names:
        raise Gen2EmbedError(f"{root}: no {CARD} to which figures could be added; export or train writes one")
    if not any(re.fullmatch(_WEIGHTS, name) and not name.endswith(".json") for name in names):
        raise Gen2EmbedError(
            f"{root}: no weights in safetensors, and pickles are not sent; write it again with gen2embed export"
        )
    _require_shards(root, names)
    return Plan(root, "model", tuple(files), tuple(left_out), _notes(root, files), DECISIVE)


def _notes(root: Path, files: Sequence[PlannedFile]) -> tuple[str, ...]:
    """Return a note for every small file that names a folder of this machine, or pictures that are not sent."""
    own = re.compile(rf"({_HOMES}|{re.escape(str(root.resolve()))})[^\s\"'`)\]]*")
    notes = []
    for file in files:
        if Path(file.name).suffix not in (".json", ".md", ".txt") or file.size > _MOST_SEARCHED:
            continue
        data = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        text = data.decode("utf-8", "replace")
        if place := _place_in(file.name, text, own):
            hint = "; write the hub id of the base model there, by which others can load the adapter"
            remedy = hint if file.name == _ADAPTER else ""
            notes.append(f"{file.name} names a place of this machine, {place}, which all readers will see{remedy}")
        if file.name == CARD and "assets/" in text and (root / "assets").is_dir():
            notes.append(f"{CARD} shows pictures of your data in assets/, which are not sent; take these lines out")
    return tuple(notes)


def _place_in(name: str, text: str, own: re.Pattern[str]) -> str:
    """Return a place of this machine that a file names: what `own` matches, or any path that exists."""
    if found := own.search(text):
        return found[0]
    if Path(name).suffix != ".json":
        return next((path for one in _PATH.findall(text) if os.path.lexists(path := one.rstrip("."))), "")
    try:
        content = json.loads(text)
        values = [one for one in _texts_in(content) if Path(one).is_absolute()]
    except (ValueError, RecursionError):
        return ""
    if name == _ADAPTER and isinstance(content, dict):  # a relative path, which others would take for a hub id
        values.append(str(content.get("base_model_name_or_path") or ""))
    return next(filter(_is_folder, values), "")


def _texts_in(value: Any) -> Iterator[str]:
    """Yield the texts of a JSON value, but names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(one)


def _is_folder(path: str) -> bool:
    return "\0" not in path and path not in ("", "/") and Path(path).is_dir()


def _take_module(root: Path, name: str, files: list[PlannedFile], left_out: list[LeftOut]) -> None:
    for inner in names_in(root / name):
        path = name + inner
        templates = name == "additional_chat_templates/" and _TEMPLATE.fullmatch(inner)
        if inner.endswith("/") and _MODULE.fullmatch(inner):
            _take_module(root, path, files, left_out)
        elif inner.endswith("/") or not (SENT.fullmatch(inner) or templates):
            left_out.append(LeftOut(path, _reason(inner)))
        elif reason := fault_of(root / path):
            left_out.append(LeftOut(path, reason))
        else:
            files.append(planned(path, root / path))


def _reason(name: str) -> str:
    return next(
        (reason for pattern, reason in _REASONS if re.fullmatch(pattern, name)), "not known to belong to a model"
    )


def _require_shards(root: Path, names: set[str]) -> None:
    """Refuse a model whose index names weights that are not there."""
    index = "model.safetensors.index.json"
    if index not in names:
        return
    try:
        wanted = set(json.loads((root / index).read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Gen2EmbedError(f"{root / index}: damaged ({error}); write the model again") from error
    if missing := sorted(map(str, wanted - names)):
        raise Gen2EmbedError(f"{root}: {missing[0]} is missing, which {index} names; write the model again")


def with_usage(card: str, repo_id: str) -> str:
    """Return a card that names its repository, and says that there are two sides.

    The card that sentence-transformers writes has a placeholder for the repository, and shows plain `encode` alone.
    A card without the placeholder is returned as it is.

    Args:
        card: The card.
        repo_id: The repository.
    """
    if _PLACEHOLDER not in card:
        return card
    card = card.replace(_PLACEHOLDER, repo_id)
    before, heading, after = card.partition("\n## Model Details\n")
    usage = _USAGE.format(repo_id=repo_id)
    return f"{before.rstrip()}\n\n{usage}{heading}{after}" if heading else f"{card.rstrip()}\n\n{usage}"


def with_figures(card: str, model: Path, results: Sequence[str]) -> str:
    """Return a card with the tables of evaluations behind it.

    Args:
        card: The card, Markdown behind its metadata.
        model: The folder of the model.
        results: Output folders of `gen2embed evaluate`.

    Raises:
        Gen2EmbedError: A folder has no results, or they are of another model.
    """
    if not results:
        return card
    sections = [card.rstrip(), "", "## Evaluation"]
    for place in results:
        folder = Path(place).expanduser()
        try:
            record = json.loads((folder / RESULTS).read_bytes())
            name, table = str(record["model"]), (folder / "results.md").read_text("utf-8")
            facts = f"prompt `{record['prompt_mode']}`, fingerprint `{record['fingerprint']}`"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Gen2EmbedError(
                f"{folder}: no results ({error}); pass an --output_dir of gen2embed evaluate"
            ) from error
        if Path(name).expanduser().resolve() != model.resolve():
            raise Gen2EmbedError(
                f"{folder / RESULTS} is of {name}, not of {model}; evaluate this folder, or leave --results out"
            )
        tables = re.sub(r"^#+ ", "### ", table.strip(), flags=re.M)
        sections += ["", tables, "", f"By `gen2embed evaluate`: {facts}."]
    return "\n".join(sections) + "\n"
