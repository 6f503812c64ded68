"""Checks of the JSON files in a model's folder: the files come from others, and libraries do what they ask for.

sentence-transformers passes the content of `sentence_bert_config.json` to loaders that unpickle, fetch and write; so
everything that `gen2embed export` does not write is refused there. Other programs write `config.json` and the files of
processors, with many ordinary keys: there only keys that load, fetch or run something are refused, and numbers that are
too large.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gen2embed_mteb.embedder.chat_formats.chat_format import ChatFormat
from gen2embed_mteb.embedder.families import FAMILIES, OWN_CLASSES, family_of
from gen2embed_mteb.embedder.model_folder.weight_files import ModelFolderError

TRANSFORMER = "Transformer"
_BASE = "sentence_transformers.base.modules"
_SENTENCE = "sentence_transformers.sentence_transformer.modules"
_BEHIND = ("Normalize", "Dense", "LayerNorm", "Dropout", "Router")
MODULES = {
    f"{package}{module}": module.rpartition(".")[2]
    for package, modules in {
        "sentence_transformers.models.": ("Transformer", "Pooling", *_BEHIND),
        f"{_BASE}.": ("transformer.Transformer", "normalize.Normalize", "dense.Dense", "router.Router"),
        f"{_SENTENCE}.": ("Transformer", "Pooling", "pooling.Pooling", "layer_norm.LayerNorm", "dropout.Dropout"),
    }.items()
    for module in modules
}
"""The known types in `modules.json`, under their present and earlier import paths."""

ATTENTION = {
    "eager": None,
    "sdpa": None,
    "flex_attention": None,
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}
"""Kinds of attention, and the package that each needs; without it, transformers would fetch code from the hub."""
DTYPES = ("float32", "float16", "bfloat16", "auto")
MAX_LAYERS = 1000
MAX_ENTRIES = 1000
MAX_LABELS = 100_000
MAX_LEAST_PIXELS = 2**26
"""The most pixels to which an image processor may enlarge an image."""

AGAIN = "write the folder again: gen2embed export BASE_MODEL OUT"

# Keys that are refused anywhere in `config.json`, and what each would do.
_FORBIDDEN = {
    "quantization_config": "quantised weights are not read; use the model's plain weights",
    "transformers_weights": "weights are read from model.safetensors only",
    "fusion_config": "it replaces layers",
    "kernel_config": "it fetches code",
    "distributed_config": "",
    "per_layer_config": "",
    "gguf_file": "weights are read from model.safetensors only",
    "experts_implementation": "it fetches code",
    "_experts_implementation": "it fetches code",
    "use_pretrained_backbone": "it fetches weights",
    "backbone": "it fetches weights",
}
# Keys with the number of layers or experts, and keys of the same words with the width of one (which the weights bound).
_COUNTS, _SIZES = re.compile("layer|depth|block|expert"), re.compile("size|dim|width|interval|multiple|index")
_TEXT_MODELS = ("llama", "mistral", "qwen2")
_VISION_MODELS = ("clip_vision_model", "siglip_vision_model")


def refuse(path: Path, what: str, remedy: str = AGAIN) -> ModelFolderError:
    """Return the error for a file of a model's folder."""
    return ModelFolderError(f"{path}: {what}; {remedy}")


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, at all depths."""
    stack = [(key, value)]
    while stack:
        key, value = stack.pop()
        yield key, value
        if isinstance(value, dict):
            stack.extend((str(name), inner) for name, inner in value.items())
        elif isinstance(value, list):
            stack.extend(("", inner) for inner in value if isinstance(inner, (dict, list)))


def check_code(path: Path, settings: dict[str, Any], trust_remote_code: bool, *, has_own: bool = False) -> None:
    """Refuse a file that names Python code to run, unless the caller trusts it.

    Args:
        path: The file.
        settings: What it says.
        trust_remote_code: Whether the caller trusts the code.
        has_own: Whether this package has classes for the model, so that the code is not needed.
    """
    for key, value in walk(settings):
        if key == "trust_remote_code" and value:
            raise refuse(path, "it sets trust_remote_code, which is only the caller's to say", "remove that key")
        if key == "auto_map" and value and not (trust_remote_code or has_own):
            raise refuse(
                path,
                "it names Python code of its own (auto_map), and not to run it would give another model",
                "read that code, then pass trust_remote_code=True",
            )


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Check that no key of `config.json` fetches or runs something, and that no number is too large."""
    for key, value in walk(config):
        if key in _FORBIDDEN and value not in (None, False, {}):
            reason = f" ({_FORBIDDEN[key]})" if _FORBIDDEN[key] else ""
            raise refuse(path, f"{key} is refused{reason}", "remove that key if the model works without it")
        if key in ("attn_implementation", "_attn_implementation"):
            _check_attention(path, key, value)
        elif key in ("dtype", "torch_dtype"):
            named = list(value.values()) if isinstance(value, dict) else [value]
            if any(name is not None and name not in DTYPES for name in named):
                raise refuse(path, f"{key} is {value!r}; known: {', '.join(DTYPES)}", "correct that key")
        elif key == "num_labels":
            _check_number(path, key, value, MAX_LABELS)
        elif isinstance(value, (int, float)) and _COUNTS.search(key) and not _SIZES.search(key):
            _check_number(path, key, value, MAX_LAYERS)
        elif isinstance(value, list) and len(value) > MAX_ENTRIES:
            raise refuse(path, f"{key} has {len(value)} entries; at most {MAX_ENTRIES} are read", "correct that key")
    if config.get("model_type") == "llava_next":
        for part, known in (("text_config", _TEXT_MODELS), ("vision_config", _VISION_MODELS)):
            found = (config.get(part) or {}).get("model_type") if isinstance(config.get(part), dict) else None
            if found is not None and found not in known:
                raise refuse(path, f"{part} is of type {found!r}; known: {', '.join(known)}", "use another model")


def _check_attention(path: Path, key: str, value: Any) -> None:
    for name in value.values() if isinstance(value, dict) else [value]:
        if name is None:
            continue
        if not isinstance(name, str) or name not in ATTENTION:
            raise refuse(path, f"{key} is {str(value)[:120]!r}; known: {', '.join(ATTENTION)}", "remove that key")
        package = ATTENTION[name]
        if package is not None and find_spec(package) is None:
            raise refuse(path, f"{key} is {name!r}, and {package} is not installed", "install it, or remove that key")


def _check_number(path: Path, key: str, value: Any, most: float) -> None:
    if isinstance(value, bool) or value is None:
        return
    if not isinstance(value, (int, float)) or not abs(value) <= most:
        raise refuse(path, f"{key} is {str(value)[:40]}; at most {most} is read", "correct that key")


def check_processor(path: Path, settings: dict[str, Any]) -> None:
    """Check that a file of a processor or tokenizer names known classes, no files elsewhere, and bounded sizes."""
    for key, value in walk(settings):
        if value in (None, [], ()) or (key in ("init_inputs", "gguf_file", "tokenizer_object") and not value):
            continue
        if key in ("init_inputs", "gguf_file", "tokenizer_object"):
            raise refuse(path, f"{key} is refused", "remove that key")
        if key in _CLASSES and not _is_class(key, value):
            raise refuse(path, f"{key} {str(value)[:80]!r} is not a class of transformers", "use another model")
        if key == "chat_template" and not _is_template(value):
            raise refuse(path, "chat_template is neither a text nor texts with a name", "correct that key")
        if key in ("min_pixels", "shortest_edge"):
            _check_number(path, key, value, MAX_LEAST_PIXELS)
        if key in ("patch_size", "merge_size", "temporal_patch_size", "num_additional_image_tokens"):
            for side in value.values() if isinstance(value, dict) else [value]:  # Pixtral states height and width
                _check_number(path, key, side, MAX_ENTRIES)
        if key == "image_grid_pinpoints" and (not isinstance(value, list) or len(value) > MAX_ENTRIES):
            raise refuse(path, f"{key} is not a list of at most {MAX_ENTRIES} sizes", "correct that key")
        if key == "fast_tokenizer_files" and any(Path(str(name)).name != name for name in value):
            raise refuse(path, f"{key} names files elsewhere", "remove that key")


def _is_template(value: Any) -> bool:
    """Return whether transformers reads this as chat templates: a text, or several by name."""
    if isinstance(value, list):
        texts = [one.get(key) if isinstance(one, dict) else None for one in value for key in ("name", "template")]
    else:
        texts = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(text, str) for text in texts)


_CLASSES = {
    "processor_class": r"\w+Processor",
    "image_processor_type": r"(\w+ImageProcessor)(?:Fast|Pil)?",
    "feature_extractor_type": r"(\w+)(?:ImageProcessor|FeatureExtractor)(?:Fast)?",
    "video_processor_type": r"\w+VideoProcessor",
    "tokenizer_class": r"(\w+Tokenizer)(?:Fast)?|TokenizersBackend",
}
"""The names of classes, by key; without the endings of other versions, a name must be one of transformers."""


def _is_class(key: str, value: Any) -> bool:
    """Return whether a file of a processor may name this class: one that transformers itself has."""
    import transformers

    found = re.fullmatch(_CLASSES[key], value) if isinstance(value, str) else None
    if value in OWN_CLASSES:
        return True
    if found is None or value.startswith(("Auto", "Timm")):  # they load what else the folder names
        return False
    stem = found[1] if found.re.groups and found[1] else value
    names = _public_names(transformers)
    return stem in names or f"{stem}ImageProcessor" in names or f"{stem}FeatureExtractor" in names


@cache
def _public_names(module: Any) -> frozenset[str]:
    return frozenset(dir(module))


def check_modules(path: Path, modules: Any) -> list[tuple[str, str]]:
    """Check that `modules.json` lists a Transformer, Pooling, and then stock modules that map a vector to a vector.

    Returns:
        For each module its kind (a value of `MODULES`) and its folder inside the model's folder.
    """
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise refuse(path, "it is not a list of modules")
    found = []
    for module in modules:
        kind = MODULES.get(str(module.get("type")))
        if kind is None:
            known = ", ".join(sorted(set(MODULES.values())))
            raise refuse(path, f"module {str(module.get('type'))[:120]!r} is not one that is run here ({known})")
        extra = sorted(set(module) - {"idx", "name", "path", "type"})
        if extra:
            raise refuse(path, f"{extra[0]!r} is not a key that export writes")
        folder = module.get("path")
        if not isinstance(folder, str) or not re.fullmatch(r"[\w.-]*", folder) or folder in (".", ".."):
            raise refuse(path, f"path {folder!r} is not a folder in the model's")
        found.append((kind, folder))
    kinds = [kind for kind, _ in found]
    if kinds[:2] != [TRANSFORMER, "Pooling"] or not set(kinds[2:]) <= set(_BEHIND) or found[0][1]:
        raise refuse(path, f"modules {', '.join(kinds) or 'none'}: a Transformer in the folder itself, then Pooling, …")
    return found


def check_router(path: Path, settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Check the `router_config.json` of a Router behind pooling; return kinds and folders, as `check_modules` does."""
    types, parameters = settings.get("types"), settings.get("parameters", {})
    if set(settings) - {"types", "structure", "parameters"} or not isinstance(types, dict):
        raise refuse(path, "it is not what export writes")
    found = []
    for folder, kind in types.items():
        if MODULES.get(str(kind)) not in _BEHIND[:-1] or not re.fullmatch(r"\w+", folder):
            raise refuse(path, f"module {str(kind)[:120]!r} is not one that is run here ({', '.join(_BEHIND[:-1])})")
        found.append((MODULES[kind], folder))
    structure = settings.get("structure")
    routes = structure.values() if isinstance(structure, dict) else [None]
    if not all(isinstance(route, list) and all(name in types for name in route) for route in routes):
        raise refuse(path, "its structure is not lists of its modules")
    if not isinstance(parameters, dict) or parameters.get("route_mappings"):
        raise refuse(path, "parameters with route_mappings are not read")
    return found


def check_module(path: Path, kind: str, settings: dict[str, Any]) -> None:
    """Check the `config.json` of a module behind the Transformer."""
    _check_values(path, settings, _MODULE_VALUES[kind])


def check_transformer(path: Path, settings: dict[str, Any], model_type: str | None) -> None:
    """Check `sentence_bert_config.json`, which sentence-transformers passes to loaders unchanged.

    Args:
        path: The path of the file, for messages.
        settings: The content of the file.
        model_type: The type of the model in the folder; `None` if the folder holds an adapter and the model is
            elsewhere.
    """
    processing = settings.get("processing_kwargs")
    known = [family.processing_kwargs for family in FAMILIES.values()]
    if model_type is not None:
        known = [family_of(model_type).processing_kwargs]
    if model_type is None or family_of(model_type).tries_own_template:
        known += [ChatFormat(sanitize=sanitize).processing_kwargs for sanitize in (True, False)]
    if processing not in known:
        raise refuse(path, f"processing_kwargs {str(processing)[:120]} are not those that export writes")
    _check_values(path, settings, _TRANSFORMER_VALUES)


def check_sentence_config(path: Path, settings: dict[str, Any]) -> None:
    """Check `config_sentence_transformers.json`."""
    _check_values(path, settings, _SENTENCE_VALUES)


def _check_values(path: Path, settings: dict[str, Any], known: dict[str, Any]) -> None:
    for key, value in settings.items():
        if key not in known:
            raise refuse(path, f"key {key!r} is not one that export writes")
        if not known[key](value):
            raise refuse(path, f"{key} is {str(value)[:120]}, which export does not write")


def _one_of(*values: Any) -> Any:
    return lambda value: any(value is known or (type(value) is type(known) and value == known) for known in values)


def _natural(most: int = 2**31) -> Any:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_modality(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    for name, entry in value.items():
        if not set(name.split("+")) <= {"text", "image", "video", "audio", "message"} or not isinstance(entry, dict):
            return False
        if (entry.get("method"), entry.get("method_output_name")) != ("forward", "last_hidden_state"):
            return False
        if not set(entry) <= {"method", "method_output_name", "format"}:
            return False
        if entry.get("format", "structured") != "structured":
            return False
    return True


_anything = lambda value: True  # noqa: E731
_boolean = _one_of(True, False)
_vector = _one_of("sentence_embedding", None)
_nothing = _one_of({}, None)

_TRANSFORMER_VALUES = {
    "transformer_task": _one_of("feature-extraction"),
    "modality_config": _is_modality,
    "module_output_name": _one_of("token_embeddings"),
    "processing_kwargs": _anything,  # compared as a whole in `check_transformer`
    "unpad_inputs": _one_of(False, None),
    "max_seq_length": lambda value: value is None or _natural()(value),
    "do_lower_case": _one_of(False),
    "processor_kwargs": lambda value: value in ({}, {"use_fast": True}, {"use_fast": False}),
    **dict.fromkeys(("model_kwargs", "config_kwargs", "model_args", "config_args", "tokenizer_args"), _nothing),
}
_MODULE_VALUES = {
    "Pooling": {
        "embedding_dimension": _natural(),
        "word_embedding_dimension": _natural(),
        "pooling_mode": lambda value: isinstance(value, (str, list)),
        "include_prompt": _boolean,
        **{
            f"pooling_mode_{name}": _boolean
            for name in (
                "cls_token",
                "mean_tokens",
                "max_tokens",
                "mean_sqrt_len_tokens",
                "weightedmean_tokens",
                "lasttoken",
            )
        },
    },
    "Normalize": {"module_input_name": _vector, "module_output_name": _vector},
    "Dense": {
        "in_features": _natural(),
        "out_features": _natural(),
        "bias": _boolean,
        "activation_function": lambda value: (
            isinstance(value, str) and re.fullmatch(r"torch\.nn\.modules\.(activation|linear)\.\w+", value) is not None
        ),
        "module_input_name": _vector,
        "module_output_name": _vector,
        "use_residual": _boolean,
    },
    "LayerNorm": {"dimension": _natural()},
    "Dropout": {"dropout": lambda value: isinstance(value, (int, float)) and 0 <= value <= 1},
}
_SENTENCE_VALUES = {
    "__version__": _anything,
    "model_type": _one_of("SentenceTransformer"),
    "prompts": lambda value: (
        isinstance(value, dict) and all(isinstance(text, (str, type(None))) for text in value.values())
    ),
    "default_prompt_name": _is_text,
    "similarity_fn_name": _one_of("cosine", "dot", "euclidean", "manhattan", None),
    "truncate_dim": lambda value: value is None or _natural()(value),
}
