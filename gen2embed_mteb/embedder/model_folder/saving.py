"""Writing a model folder: the files are written to a temporary folder, read back, and only then put in place.

1. Everything is written into a temporary folder.
2. The written files are loaded as any program loads them, but without memory for the weights (device "meta"): names and
   shapes of all weights must be those of the model's class, with none missing and none left over. Otherwise an error is
   raised, and the temporary folder is deleted.
3. The folder is renamed into place. If a folder with files is there already, our files in it are replaced one by one;
   `config.json`, without which nothing loads, is deleted first and written last.

Cost: where an adapter is merged, memory for a second copy of the model.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.modules import Router

from gen2embed_mteb.embedder.families import family_of
from gen2embed_mteb.embedder.model_folder import adapters, compat
from gen2embed_mteb.embedder.readouts.readout import stock_parts, write_readout
from gen2embed_mteb.errors import Gen2EmbedError, full_disk_as_os_error
from gen2embed_mteb.storage.atomic import ForeignFileError, write_in_scratch
from gen2embed_mteb.storage.new_folder import new_folder
from gen2embed_mteb.storage.owned_folder import OwnedFolder

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from torch import nn

logger = logging.getLogger(__name__)

WRITER = "export"
"""The name under which `storage.owned_folder.OwnedFolder` records that we wrote a model folder."""

CONFIG = "config.json"

_DECISIVE = re.compile(
    r"(model|pytorch_model|adapter_model|consolidated)[^/]*\.(safetensors|bin|pt|pth|json)|adapter_config\.json"
    r"|config\.json|config_sentence_transformers\.json|sentence_[a-z_]*config\.json|modules\.json|generation_config\.json"
    r"|[a-z_]*processor_config\.json|tokenizer.*|vocab\..*|merges\.txt|added_tokens\.json|special_tokens_map\.json"
    r"|readout\.json|calibration\.json|chat_template.*|additional_chat_templates/.*"
)
"""Files that a loader finds by name: one that remained from another model would be mixed with the new model."""


def save_merged(
    model: SentenceTransformer | CrossEncoder, path: str, write: Callable[[str], None], kind: Any = None
) -> None:
    """Write a whole model with its adapter merged; the model itself stays as it is.

    Args:
        model: The model.
        path: The folder.
        write: Writes the model into a folder, as sentence-transformers does.
        kind: The class of transformers that loads the folder; `None` stands for `AutoModel`.

    Raises:
        ForeignFileError: A file that must be replaced was not written by this function, or was changed since.
        Gen2EmbedError: The adapter cannot be merged, or the written files do not load as this model.
    """
    transformer = model[0]
    inner = transformer.model
    if kind is None and inner.dtype in (torch.bfloat16, torch.float16):
        logger.warning(
            "%s: plain sentence-transformers normalises in the weights' %s, to a norm of 1 within 4e-3; Gen2Embed in "
            "float32, to 1e-7. For equal vectors in both load it as Gen2Embed, or export with --dtype float32",
            path,
            str(inner.dtype).removeprefix("torch."),
        )
    conversions = getattr(inner, "_weight_conversions", None)
    also_ours: dict[str, bytes] = {}
    with model_folder(path, also_ours) as folder:
        try:
            if adapters.has_adapter(inner):
                transformer.model = adapters.merged_copy(inner)
            # transformers would reverse the renamings of the last file that it loaded, also those of an adapter's file.
            transformer.model._weight_conversions = None
            with stock_parts(transformer.model):
                write(str(folder))
                also_ours |= complete_processor_files(transformer, folder)
                check_written(folder, list(model), transformer.model, kind)
        finally:
            transformer.model = inner
            inner._weight_conversions = conversions


def save_checkpoint(model: SentenceTransformer, path: str, write: Callable[[str], None], *, whole: bool) -> None:
    """Write the adapter of a model, with the files needed to load it on its base model, so that training can resume.

    Args:
        model: The model, with an adapter.
        path: The folder.
        write: Writes the model into a folder, as sentence-transformers does.
        whole: False writes only the adapter and the processor, for a model with a setting that the folder cannot
            express.

    Raises:
        ForeignFileError: A file that must be replaced was not written by this function, or was changed since.
        Gen2EmbedError: The adapter is not the only one, has another name than "default", or was not written completely.
    """
    inner = model[0].model
    if list(inner.peft_config) != ["default"]:
        raise Gen2EmbedError(
            f"{path}: a checkpoint holds one adapter, called 'default', and the model has "
            f"{', '.join(map(repr, inner.peft_config))}; call add_adapter once, without a name"
        )
    also_ours: dict[str, bytes] = {}
    with model_folder(path, also_ours) as folder:
        if not whole:
            adapters.save_adapter(inner, folder)
            model[0].processor.save_pretrained(folder)  # the trainer does so too, after this call
            return
        loaded = getattr(inner, "_hf_peft_config_loaded", False)
        inner._hf_peft_config_loaded = True  # peft's own injection does not set it; transformers saves according to it
        try:
            write(str(folder))
        finally:
            inner._hf_peft_config_loaded = loaded
        also_ours |= complete_processor_files(model[0], folder)
        write_readout(inner, folder)
        adapters.check_adapter(inner, folder)


@contextlib.contextmanager
def model_folder(path: str | Path, also_ours: dict[str, bytes] | None = None) -> Iterator[Path]:
    """Yield a temporary folder to write a model into, and put it in place at the end.

    Args:
        path: The final folder. Files that an earlier call wrote there are replaced, other files stay.
        also_ours: The caller fills it with contents of files that another program may write in place of ours.

    Yields:
        The temporary folder, empty. After an exception it is deleted, and `path` stays as it was.

    Raises:
        ForeignFileError: A file that must be replaced was not written by this function, or was changed since.
        OSError: The disk is full.
    """
    target = Path(os.path.realpath(path))
    others = {} if also_ours is None else also_ours
    with full_disk_as_os_error(target):
        if _can_be_renamed_onto(target):
            with new_folder(target, WRITER) as folder:
                yield folder
        else:
            owned = OwnedFolder(target, WRITER)
            left = _left_of_before(target)
            owned.check(left)
            with owned.scratch() as folder:
                yield folder
                names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
                owned.check([*names, *left])
                for name in sorted(set(left) - names):
                    owned.remove(name)
                owned.adopt(folder, last=CONFIG if CONFIG in names else adapters.CONFIG_FILE)
        for name, data in others.items():
            OwnedFolder(target, WRITER).accept(name, data)


def complete_processor_files(source: Any, folder: Path) -> dict[str, bytes]:
    """Complete a saved processor so that it loads in the same way with and without torchvision.

    The settings of sentence-transformers name which of the two image processors this model used; otherwise transformers
    would choose one by what is installed. Families with a video processor get its settings; without them their
    processor does not load where torchvision is installed.

    Args:
        source: The `Transformer` module that was saved.
        folder: The temporary folder that it was saved to.

    Returns:
        The earlier contents of changed files, by name.
    """
    image_processor = getattr(source.processor, "image_processor", None)
    if image_processor is None:  # a tokenizer alone
        return {}
    path = folder / "sentence_bert_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    pillow = type(image_processor).__name__.endswith("Pil")
    settings["processor_kwargs"] = {"use_fast": not pillow}
    write_in_scratch(path, json.dumps(settings, indent=4).encode())

    path = folder / "processor_config.json"
    before = path.read_bytes()
    settings = json.loads(before)
    image = settings.get("image_processor", {})
    family = family_of(source.config.model_type)
    if family.has_video_processor and "video_processor" not in settings:
        shared = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "size")
        settings["video_processor"] = {
            **{key: image[key] for key in shared if key in image},
            "video_processor_type": {"qwen3_vl": "Qwen3VLVideoProcessor"}.get(
                source.config.model_type, "Qwen2VLVideoProcessor"
            ),
        }
    elif family.is_generic and "video_processor" not in settings and (name := _video_processor(source.processor)):
        settings["video_processor"] = {"video_processor_type": name}
    write_in_scratch(path, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    return {path.name: before}


def _video_processor(processor: Any) -> str:
    """Return the class of the part for videos that is left out without torchvision; an empty text if there is none."""
    import transformers

    name = type(processor).__name__.removesuffix("Processor") + "VideoProcessor"
    wanted = "video_processor" in inspect.signature(type(processor).__init__).parameters
    return name if wanted and name in dir(transformers) else ""


def check_written(folder: Path, modules: list[nn.Module], model: nn.Module, kind: Any = None) -> None:
    """Load the written files without the values of weights, and compare names and shapes of all weights.

    Args:
        folder: The folder.
        modules: The modules that were saved, the transformer first.
        model: The model of the transformer, without an adapter.
        kind: The class of transformers that loads the folder; `None` stands for `AutoModel`.

    Raises:
        Gen2EmbedError: A weight is missing, left over, or of another shape than in the model.
    """
    from transformers import AutoModel

    try:
        with compat.quiet_loading():
            loaded, info = (kind or AutoModel).from_pretrained(
                folder,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="eager",
            )
    except (RuntimeError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _refusal([f"it does not load ({type(error).__name__}: {error})"]) from error
    faults = [
        f"{what} {sorted(map(str, info[key]))[:3]} ({len(info[key])} in all)"
        for key, what in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "left over"),
            ("mismatched_keys", "of another shape than the model's class has them:"),
        )
        if info[key]
    ]
    faults += _differences(_shapes(model.state_dict()), _shapes(loaded.state_dict()))
    for number, module in enumerate(modules):
        for place, part in _parts(module, folder / f"{number}_{type(module).__name__}") if number else ():
            path, state = place / "model.safetensors", part.state_dict()
            if state:
                faults += _differences(_shapes(state), adapters.shapes_in(path) if path.is_file() else {})
    if any(tensor.device.type == "meta" for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor)):
        faults.append("the model in memory has weights without values (device 'meta')")
    if faults:
        raise _refusal(faults)


def _parts(module: nn.Module, folder: Path) -> list[tuple[Path, nn.Module]]:
    """Return a module with its folder; for a `Router` those inside it, each once."""
    if not isinstance(module, Router):
        return [(folder, module)]
    found: dict[int, tuple[Path, nn.Module]] = {}
    for route, parts in module.sub_modules.items():
        for number, part in enumerate(parts):
            found.setdefault(id(part), (folder / f"{route}_{number}_{type(part).__name__}", part))
    return list(found.values())


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _differences(wanted: dict[str, tuple[int, ...]], written: dict[str, tuple[int, ...]]) -> list[str]:
    differing = sorted(name for name in {**wanted, **written} if wanted.get(name) != written.get(name))
    return [
        f"{name}: {written.get(name, 'not there')} instead of {wanted.get(name, 'not there')}" for name in differing[:3]
    ]


def _refusal(faults: list[str]) -> Gen2EmbedError:
    return Gen2EmbedError(
        f"what was written does not load as the model that it was written of: {'; '.join(faults)}. Nothing was kept. "
        "Load the base model and its adapter anew, without changes to its layers, and save again"
    )


def _can_be_renamed_onto(target: Path) -> bool:
    """Return whether nothing is at `target`, or an empty folder that a rename can replace.

    A rename cannot replace a mount point, and must not replace the current folder of this process.
    """
    if not os.path.lexists(target):
        return True
    if not target.is_dir():
        raise ForeignFileError.of(target, "is there already, and no folder")
    return (
        not any(target.iterdir())
        and not os.path.ismount(target)
        and os.access(target.parent, os.W_OK)
        and Path.cwd().resolve() != target
    )


def _left_of_before(target: Path) -> list[str]:
    files = [path.relative_to(target).as_posix() for path in target.glob("*") if path.is_file() or path.is_symlink()]
    files += [path.relative_to(target).as_posix() for path in target.glob("[0-9]*_[A-Z]*/*")]
    files += [path.relative_to(target).as_posix() for path in target.glob("[0-9]*_[A-Z]*/*/*")]
    files += [path.relative_to(target).as_posix() for path in target.glob("additional_chat_templates/*")]
    return sorted(name for name in files if _DECISIVE.fullmatch(name.rpartition("/")[2]) or _DECISIVE.fullmatch(name))
