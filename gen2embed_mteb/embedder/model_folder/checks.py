"""Finding the folder of a model or an adapter, and checking it before any library reads it.

Folders come from others. Without these checks their files could make libraries unpickle, import, fetch, write elsewhere
or run for ever (`settings` and `adapter_settings` list the keys). A hub model is first fetched into the hub's cache,
and then loaded from there at the commit that was checked, so that exactly the checked files are loaded.

Cost: JSON files and the headers of weight files are read; no weight is.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple

from gen2embed_mteb.embedder.families import OWN_CLASSES, family_of
from gen2embed_mteb.embedder.model_folder.adapter_settings import base_of, check_adapter
from gen2embed_mteb.embedder.model_folder.gguf_files import check_gguf
from gen2embed_mteb.embedder.model_folder.settings import (
    check_code,
    check_config,
    check_module,
    check_modules,
    check_processor,
    check_router,
    check_sentence_config,
    check_transformer,
    refuse,
)
from gen2embed_mteb.embedder.model_folder.weight_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    ModelFolderError,
    Tensor,
    read_header,
    read_headers,
    weight_files,
)

ADAPTER_FILE, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES_FILE, TRANSFORMER_FILE = "modules.json", "sentence_bert_config.json"
TEMPLATE_FILE = "chat_template.json"
PROCESSOR_FILES = (
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "special_tokens_map.json",
    TEMPLATE_FILE,
)
MAX_SETTINGS_BYTES = 16 * 2**20
"""The largest file of settings that is read; tokenizers and indices may be larger."""
MAX_TEXT_BYTES = 256 * 2**20
"""The largest file that is read as a whole."""

# The files that are fetched of a hub model, besides its weights.
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "README.md"]
_LEGACY = "sentence_*_config.json"


class Source(NamedTuple):
    """The place of a model or an adapter.

    Attributes:
        name: The name to pass to libraries: the folder, or the hub id.
        folder: The folder with its files.
        revision: The commit on the hub; `None` for a folder of the user.
    """

    name: str
    folder: Path
    revision: str | None


def as_given(name: str | Path, what: str = "model") -> str:
    """Return the name of a model or an adapter, with `~` expanded, if it is a folder or may be a hub id.

    Raises:
        FileNotFoundError: The name is a path, and there is no folder there.
    """
    text = str(name)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return str(path)
    if text and path.exists():
        raise FileNotFoundError(f"{text} is a file, not the folder of a {what}")
    if isinstance(name, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", text):
        raise FileNotFoundError(
            f"no such folder: {text!r} (given as {what}; a hub id has the form ORGANISATION/NAME, short names are "
            "gen2embed and gen2embed-mini)"
        )
    return text


def find(
    name: str | Path,
    what: str = "model",
    *,
    token: bool | str | None = None,
    cache_dir: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Source:
    """Return where a model or an adapter is; for a hub model, fetch everything but the weights.

    Args:
        name: A folder or a hub id.
        what: `model`, `adapter`, …, for messages.
        token: Hub token.
        cache_dir: Where hub files are kept.
        revision: A branch, tag or commit of the hub.
        local_files_only: Whether to use only files on this machine.

    Raises:
        FileNotFoundError: There is neither such a folder nor such a hub model, or it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    text = as_given(name, what)
    if Path(text).is_dir():
        return Source(text, Path(text), None)
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        folder = str(
            snapshot_download(text, revision=revision, allow_patterns=_SMALL_FILES, ignore_patterns=["*/*"], **hub)
        )
        commit = Path(folder).name
        modules = Path(folder) / MODULES_FILE
        below = [path for _, path in check_modules(modules, _read(modules)) if path] if modules.is_file() else []
        if below:
            wanted = [f"{path}/{file}" for path in below for file in ("config.json", WEIGHTS_FILE)]
            snapshot_download(text, revision=commit, allow_patterns=wanted, **hub)
    except ModelFolderError:
        raise
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no such folder: {text!r} (given as {what}), and it cannot be had from the hub: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
    return Source(text, Path(folder), commit)


def fetch_weights(
    source: Source,
    *,
    token: bool | str | None,
    cache_dir: str | None,
    local_files_only: bool,
    gguf_file: str | None = None,
) -> None:
    """Fetch the weights of a hub model or adapter, safetensors or one GGUF file; do nothing for a folder of the user.

    Raises:
        FileNotFoundError: The weights cannot be fetched.
    """
    if source.revision is None:
        return
    from huggingface_hub import snapshot_download

    index = source.folder / INDEX_FILE
    names = [path.name for path in weight_files(source.folder, _read(index))] if index.is_file() else [WEIGHTS_FILE]
    if (source.folder / ADAPTER_FILE).is_file():
        names = [ADAPTER_WEIGHTS]
    if gguf_file is not None:
        names = [gguf_file]
    try:
        snapshot_download(
            source.name,
            revision=source.revision,
            allow_patterns=names,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{source.name}: its weights cannot be had from the hub: {error}") from error


def check(
    source: Source, *, trust_remote_code: bool = False, gguf_file: str | None = None, with_weights: bool = True
) -> dict[str, Tensor]:
    """Check every file of a model that libraries will read.

    Args:
        source: The model, with its weights fetched. It may be an adapter with files of the processor and of
            sentence-transformers.
        trust_remote_code: Whether the caller lets Python code of the folder run.
        gguf_file: The file with configuration, tokenizer and weights, if they are in a GGUF file.
        with_weights: False leaves out the weights, which need not be there then.

    Returns:
        The tensors of its weights; an empty dict for an adapter and a GGUF file, and without weights.

    Raises:
        ModelFolderError: A file asks for something that is refused here, is damaged, or is too large.
    """
    folder = source.folder
    _check_files(folder)
    if (folder / MODULES_FILE).is_file():
        check_modules(folder / MODULES_FILE, _read(folder / MODULES_FILE))
    config, adapter = _optional(folder / "config.json"), _optional(folder / ADAPTER_FILE)
    if gguf_file is not None:
        check_gguf(folder, gguf_file)
    elif config is None and adapter is None:
        gguf = sorted(path.name for path in folder.glob("*.gguf"))
        if gguf:
            raise ModelFolderError(
                f"{folder}: no config.json, but GGUF files ({', '.join(gguf[:5])}); pass the name of one as gguf_file, "
                f"on the command line --gguf_file {gguf[0]}"
            )
        raise ModelFolderError(f"{folder}: no config.json, so it is no model's folder; pass the folder that has it")
    index = _optional(folder / INDEX_FILE)
    base_of_adapter(source)
    has_own = bool(family_of(str((config or {}).get("model_type"))).own_classes)
    if config is not None:
        check_code(folder / "config.json", config, trust_remote_code, has_own=has_own)
        check_config(folder / "config.json", config)
    for name in PROCESSOR_FILES:
        settings = _optional(folder / name)
        if settings is not None:
            names_own = has_own or settings.get("processor_class") in OWN_CLASSES  # an adapter's folder has no config
            check_code(folder / name, settings, trust_remote_code, has_own=names_own)
            check_processor(folder / name, settings)
    if gguf_file is not None:
        return {}
    if not with_weights:
        if (folder / MODULES_FILE).is_file():
            _check_sentence_transformers(folder, config)
        return {}
    if adapter is not None:
        check_adapter_folder(folder)
    elif not (folder / MODULES_FILE).is_file():
        return read_headers(folder, index)
    if (folder / MODULES_FILE).is_file():
        _check_sentence_transformers(folder, config)
    return {} if adapter is not None else read_headers(folder, index)


def check_adapter_folder(folder: Path) -> dict[str, Any]:
    """Check an adapter's settings and the header of its weights, and return the settings.

    Raises:
        FileNotFoundError: The weights are missing.
        ModelFolderError: Something in them is refused.
    """
    _check_files(folder)
    path, weights = folder / ADAPTER_FILE, folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: {folder} is not the folder of an adapter")
    settings = read_settings(path)
    if not weights.is_file():
        raise FileNotFoundError(
            f"{weights} not found: an adapter needs {ADAPTER_WEIGHTS}; pickled .bin weights are not read, convert them"
        )
    check_adapter(path, settings, read_header(weights))
    return settings


def base_of_adapter(source: Source) -> tuple[str, str | None] | None:
    """Return the base model that an adapter names, and its revision; `None` if `source` is not an adapter.

    Raises:
        ModelFolderError: The adapter names no base model, or its folder holds a whole model as well.
    """
    path = source.folder / ADAPTER_FILE
    if not path.is_file():
        return None
    if (source.folder / WEIGHTS_FILE).is_file() or (source.folder / INDEX_FILE).is_file():
        raise ModelFolderError(
            f"{source.folder}: holds a whole model and an adapter ({ADAPTER_FILE}); move one to a folder of its own"
        )
    settings = read_settings(path)
    revision = settings.get("revision")
    return base_of(path, settings), revision if isinstance(revision, str) and revision else None


def find_base(
    source: Source, *, token: bool | str | None, cache_dir: str | None, local_files_only: bool
) -> Source | None:
    """Fetch and return the base model of an adapter; `None` if `source` is not an adapter.

    Raises:
        FileNotFoundError: There is no such model, or it cannot be fetched.
        ModelFolderError: The adapter names no base model, or names another adapter.
    """
    named = base_of_adapter(source)
    if named is None:
        return None
    name, revision = named
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        base = find(name, "base model", **hub, revision=revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source.folder / ADAPTER_FILE} names the base model {name!r}: {error}; pass the base model yourself, and "
            "this folder as adapter="
        ) from error
    if (base.folder / ADAPTER_FILE).is_file():
        raise ModelFolderError(f"{source.folder / ADAPTER_FILE} names {name!r} as base model, which is an adapter")
    fetch_weights(base, **hub)
    return base


def _check_sentence_transformers(folder: Path, config: dict[str, Any] | None) -> None:
    """Check the files that sentence-transformers reads in a folder with `modules.json`."""
    modules = check_modules(folder / MODULES_FILE, _read(folder / MODULES_FILE))
    legacy = [path for path in folder.glob(_LEGACY) if path.name != TRANSFORMER_FILE]
    if legacy:
        raise refuse(legacy[0], f"only {TRANSFORMER_FILE} is read")
    path = folder / TRANSFORMER_FILE
    if not path.is_file():
        raise refuse(path, "not found")
    check_transformer(path, read_settings(path), None if config is None else str(config.get("model_type")))
    for kind, below in modules[1:]:
        _check_module(folder / below, kind)
    settings_path = folder / "config_sentence_transformers.json"
    if settings_path.is_file():
        check_sentence_config(settings_path, read_settings(settings_path))


def _check_module(folder: Path, kind: str) -> None:
    """Check the folder of a module behind the Transformer, and of the modules of a Router."""
    path = folder / ("router_config.json" if kind == "Router" else "config.json")
    if kind == "Normalize" and not path.is_file():
        return  # earlier versions wrote it without settings
    if not path.is_file():
        raise refuse(path, "not found")
    _check_files(folder)
    settings = read_settings(path)
    if kind == "Router":
        for inner, below in check_router(path, settings):
            _check_module(folder / below, inner)
        return
    check_module(path, kind, settings)
    if kind not in ("Dense", "LayerNorm"):
        return
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise refuse(weights, "not found; pickled weights are not read")
    name, keys = "linear.weight", ["out_features", "in_features"]
    if kind == "LayerNorm":
        name, keys = "norm.weight", ["dimension"]
    shape = tuple(settings.get(key) for key in keys)
    if read_header(weights).get(name, Tensor("", ())).shape != shape:
        raise refuse(path, f"the layer is of shape {shape}, its weights are not")


def _check_files(folder: Path) -> None:
    """Refuse files that are not regular, are too large, or have a format that is unpickled."""
    for path in sorted(folder.iterdir()):
        if re.fullmatch(r"shard-\d+-model-\d+-of-\d+\.safetensors|\.metadata", path.name):
            raise refuse(path, "distributed checkpoints are not read", "save the model as model.safetensors")
        if path.name == "additional_chat_templates" and path.is_dir():
            _check_files(path)
        if path.suffix not in (".json", ".jinja", ".txt", ".model", ".md", ".safetensors"):
            continue
        try:
            found = path.stat()
        except OSError as error:
            raise ModelFolderError(f"{path}: cannot be read ({error.strerror}); copy or download it again") from error
        if not stat.S_ISREG(found.st_mode):
            raise ModelFolderError(f"{path}: not a regular file; a model's folder holds plain files, or links to them")
        if path.suffix != ".safetensors" and found.st_size > MAX_TEXT_BYTES:
            raise ModelFolderError(f"{path}: {found.st_size} bytes; at most {MAX_TEXT_BYTES} are read")
        if path.suffix == ".jinja":
            _check_template(path)


def _check_template(path: Path) -> None:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelFolderError(f"{path}: not a text in UTF-8 ({error}); copy or download it again") from error


def _optional(path: Path) -> dict[str, Any] | None:
    return read_settings(path) if path.is_file() else None


def read_settings(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of settings.

    Raises:
        ModelFolderError: The file does not hold a JSON object.
    """
    found = _read(path)
    if not isinstance(found, dict):
        raise ModelFolderError(f"{path}: not a JSON object; copy or download it again")
    return found


def _read(path: Path) -> Any:
    if path.stat().st_size > MAX_SETTINGS_BYTES and path.name != INDEX_FILE:
        raise ModelFolderError(f"{path}: more than {MAX_SETTINGS_BYTES} bytes of settings")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path}: not JSON ({error}); copy or download it again") from error
