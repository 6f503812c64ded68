"""The generative model around an embedder's own base model: the same tensors, and the output layer.

The class of the generative model is built without memory (device "meta"); then the embedder's base model is put into
its place. What remains is the output layer: it is tied to the input embeddings, or it is read from the model's folder.
Cost: no copy of a weight; an output layer that is not tied is read, which is the only new memory.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from gen2embed_mteb.embedder.model_folder import checks as model_folder
from gen2embed_mteb.embedder.model_folder.weight_files import INDEX_FILE, WEIGHTS_FILE, read_header, weight_files
from gen2embed_mteb.errors import Gen2EmbedError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Task = Literal["text-generation", "any-to-any"]
"""How sentence-transformers calls a generative model of text alone, and one that takes images too."""


def generation_class(config: Any) -> tuple[Task, Any]:
    """Return how sentence-transformers calls the generative model of a configuration, and its class in transformers.

    Args:
        config: The configuration of the embedder's model.

    Raises:
        Gen2EmbedError: transformers has no generative class for it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    kinds: tuple[tuple[Task, Any], ...] = (
        ("any-to-any", AutoModelForMultimodalLM),
        ("text-generation", AutoModelForCausalLM),
    )
    for task, auto in kinds:
        if type(config) in auto._model_mapping:
            return task, auto._model_mapping[type(config)]
    raise Gen2EmbedError(
        f"transformers has no generative class for models of type {config.model_type!r}: they can embed, but neither "
        "write nor judge; use another model"
    )


def generation_model(embedder: SentenceTransformer, source: str, revision: str = "") -> Any:
    """Return the generative model whose base model is the embedder's own, by reference.

    Args:
        embedder: The embedding model.
        source: The folder or the hub id that it was loaded from; its output layer is read there if it is not tied.
        revision: The commit on the hub; empty for a folder.

    Raises:
        Gen2EmbedError: There is no generative class, it holds its base model in another form, or the folder has no
            output layer and the embeddings are not tied.
    """
    base: Any = embedder[0].model
    config = copy.deepcopy(base.config)
    _, kind = generation_class(config)
    with torch.device("meta"):
        model = kind(config)
    place = model.base_model_prefix
    if type(getattr(model, place, None)) is not type(base):
        raise Gen2EmbedError(
            f"{kind.__name__} does not hold the embedder's {type(base).__name__} as a whole, so that no generative "
            "model can share its weights; use another model"
        )
    setattr(model, place, base)
    model.tie_weights()
    missing = [name for name, tensor in model.named_parameters() if tensor.device.type == "meta"]
    missing += [name for name, tensor in model.named_buffers() if tensor.device.type == "meta"]
    if missing:
        _read(model, missing, source, revision)
    options = getattr(base, "generation_config", None)
    if options is not None:
        model.generation_config = copy.deepcopy(options)
    return model.eval()


def _read(model: Any, names: list[str], source: str, revision: str) -> None:
    """Read what the base model does not have: the output layer, from the folder of the base model."""
    from safetensors import safe_open

    found = model_folder.find(source, revision=revision or None, local_files_only=True)
    folder = (model_folder.find_base(found, token=None, cache_dir=None, local_files_only=True) or found).folder
    places = _places(folder)
    base: Any = getattr(model, model.base_model_prefix)
    for name in names:
        # Older checkpoints of multimodal models keep the output layer inside their language model.
        there = [key for key in places if key == name or key.endswith(f".{name}")]
        if len(there) != 1:
            raise Gen2EmbedError(
                f"{folder}: no weight {name!r}, and the embeddings are not tied: this folder was written for embedding "
                "alone. Load the base model that it was made of, with its adapter: Gen2Embed(BASE_MODEL, adapter=…)"
            )
        with safe_open(places[there[0]], "pt") as file:
            tensor = file.get_tensor(there[0])
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        due = tuple(getattr(module, last).shape)
        if tuple(tensor.shape) != due:
            raise Gen2EmbedError(
                f"{places[there[0]]}: {there[0]} is {tuple(tensor.shape)} instead of {due}; copy or download it again"
            )
        tensor = tensor.to(base.device, base.dtype)
        setattr(module, last, torch.nn.Parameter(tensor, requires_grad=False))


def _places(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor in a folder; none for a folder without safetensors (GGUF)."""
    index = folder / INDEX_FILE
    if not (folder / WEIGHTS_FILE).is_file() and not index.is_file():
        return {}
    files = weight_files(folder, model_folder.read_settings(index) if index.is_file() else None)
    return {name: path for path in files for name in read_header(path)}
