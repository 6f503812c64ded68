"""The revision of a model in mteb, which identifies the weights and the form of their inputs.

mteb stores results under a model's revision, and does not run a task again if a result is found there. So the revision
is `WEIGHTS-INPUTS`: the commit on the hub or a digest of the files in a directory, then a digest of prompt, chat
templates and layout. Results of other weights or of another prompt are never mixed.

Cost: for a directory one pass over its weights, about a second per gigabyte.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from gen2embed_mteb.embedder import families
from gen2embed_mteb.embedder.chat_formats.detection import DETECTION_VERSION
from gen2embed_mteb.embedder.chat_formats.header import open_template
from gen2embed_mteb.embedder.model_folder import checks as model_folder
from gen2embed_mteb.embedder.prompts.strategies import DEFAULT, strategy
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.owned_folder import LEDGER

INPUTS_VERSION = 1
"""Changes whenever mteb's batches are converted to inputs (`inputs.py`) or images are prepared in another way."""

_DECISIVE = (".safetensors", ".json", ".jinja", ".txt", ".model", ".bin", ".gguf")


def inputs_digest(layout: str, *, generic: bool = False, prompt_mode: str = DEFAULT) -> str:
    """Return a digest of everything besides the weights that decides vectors.

    Args:
        layout: How images are laid out in the prompt.
        generic: Whether the model's own chat template carries the prompt: the header before it, and the version of the
            rules by which its chat format is found, are then part of the digest. The template is one of the files.
        prompt_mode: The name of the prompt that the model is loaded with.

    Returns:
        8 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for template in sorted((Path(families.__file__).parent / "templates").glob("*.jinja")):
        digest.update(template.read_bytes())
    settings = {"prompt": strategy(prompt_mode).texts, "layout": layout, "version": INPUTS_VERSION}
    if generic:
        settings |= {"header": open_template(""), "detection": DETECTION_VERSION}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:8]


def pairs_digest() -> str:
    """Return a digest of how a reranker asks about pairs: 8 hexadecimal digits."""
    from gen2embed_mteb.embedder.reranking.framings import FRAMINGS, SWAPPED, pair_template

    asked = [pair_template("", framing) for framing in (*FRAMINGS.values(), SWAPPED)]
    return hashlib.sha256(json.dumps([INPUTS_VERSION, asked]).encode()).hexdigest()[:8]


def directory_digest(directory: Path) -> str:
    """Return a digest of the files of a model that decide its vectors: weights, configurations, templates, tokenizer.

    For an adapter, the digest includes its base model: its files, or the commit that would be loaded.

    Args:
        directory: The model; reading its weights takes about a second per gigabyte.

    Returns:
        40 hexadecimal digits, as for a commit.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix in _DECISIVE and path.name != LEDGER:
            digest.update(f"{path.relative_to(directory).as_posix()} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    named = model_folder.base_of_adapter(model_folder.Source(str(directory), directory, None))
    if named is not None:
        base = Path(named[0]).expanduser()
        if (base / model_folder.ADAPTER_FILE).is_file():
            raise Gen2EmbedError(f"{directory / model_folder.ADAPTER_FILE} names {base} as base model, an adapter")
        digest.update((directory_digest(base) if base.is_dir() else hub_commit(named[0]) or "").encode())
    return digest.hexdigest()[:40]


@cache
def hub_commit(hub_id: str) -> str | None:
    """Return the commit that would be loaded for a hub id: the one in the local cache, or else the hub's newest.

    Args:
        hub_id: The repository.

    Returns:
        40 hexadecimal digits; None if neither can be found. The result is kept for the life of the process.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        for name in ("config.json", "adapter_config.json"):
            cached = try_to_load_from_cache(hub_id, name)
            if isinstance(cached, str):
                return Path(cached).parent.name
        return str(HfApi().model_info(hub_id, timeout=10).sha)
    except Exception:  # offline, unknown, gated, or no hub id: loading the model raises an error that says which
        return None


def revision_of(
    source: str,
    layout: str,
    commit: str | None = None,
    *,
    own_template: bool = False,
    prompt_mode: str = DEFAULT,
) -> str | None:
    """Return the revision of a model.

    Args:
        source: Hub id or directory of its weights.
        layout: How images are laid out in the prompt.
        commit: The commit on the hub, if it is known. Without it a hub model counts as one whose own chat template
            carries the prompt, since its type is not known before it is fetched.
        own_template: Whether the own chat template of the hub model at that commit carries the prompt.
        prompt_mode: The name of the prompt that the model is loaded with.

    Returns:
        `WEIGHTS-INPUTS`; None if the weights cannot be identified, and so cannot be loaded either.
    """
    directory = Path(source)
    weights = directory_digest(directory) if directory.is_dir() else commit or hub_commit(source)
    generic = _tries_own_template(directory, layout) if directory.is_dir() else own_template or commit is None
    return None if weights is None else f"{weights}-{inputs_digest(layout, generic=generic, prompt_mode=prompt_mode)}"


def _tries_own_template(directory: Path, layout: str) -> bool:
    """Return whether the own chat template of the model in a directory is tried; whether it fits is not looked at."""
    path = directory / "config.json"
    if not path.is_file():
        named = model_folder.base_of_adapter(model_folder.Source(str(directory), directory, None))
        base = Path(named[0]).expanduser() if named is not None else directory
        path = base / "config.json"
    config = model_folder.read_settings(path) if path.is_file() else {}
    family = families.family_of(str(config.get("model_type")))
    return family.is_generic or (layout == "native" and family.tries_own_template)
