"""Loading by sentence-transformers, after the folder was checked, and with a check of every weight."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from sentence_transformers.base.modality import InputFormatter
from sentence_transformers.sentence_transformer.modules import Transformer

from gen2embed_mteb.embedder.chat_formats.detection import Detected
from gen2embed_mteb.embedder.chat_formats.header import own_template, parts_of, prompt_of, template_with_prompt
from gen2embed_mteb.embedder.chat_formats.probing import chat_format_of, template_of, try_template
from gen2embed_mteb.embedder.families import Family, carried_by_own, chat_template, family_of
from gen2embed_mteb.embedder.families.phi3v.registration import MODEL_TYPE
from gen2embed_mteb.embedder.families.phi3v.weights import check_copy
from gen2embed_mteb.embedder.model_folder import checks as model_folder
from gen2embed_mteb.embedder.model_folder.adapters import load_adapter
from gen2embed_mteb.embedder.model_folder.gguf_files import dense_options, forget_gguf
from gen2embed_mteb.embedder.model_folder.settings import MODULES, TRANSFORMER
from gen2embed_mteb.embedder.model_folder.supported import check_supported, processor_error, reading_part
from gen2embed_mteb.embedder.model_folder.weight_files import ModelFolderError, Tensor, read_index, weight_files
from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt
from gen2embed_mteb.errors import Gen2EmbedError, one_line

logger = logging.getLogger(__name__)

UNUSED = re.compile(r"(^|\.)lm_head\.|rotary_emb\.inv_freq$|\.position_ids$")
"""Tensors of generative checkpoints that embedding does not need: the output layer, and constants that are computed."""

_PARTS = re.compile(r"^((thinker|model|language_model|visual|vision_tower|vision_model)\.)+")
"""The prefix of a layer's name, which differs between versions of transformers."""


def load_modules(model: Any, stock: Callable[..., Any], name: str, **options: Any) -> Any:
    """Check a model's folder, then load its modules; this replaces `SentenceTransformer._load_modules`.

    Args:
        model: The `SentenceTransformer` that is being built.
        stock: Its own `_load_modules`.
        name: A folder or a hub id.
        options: The arguments of `_load_modules`.

    Returns:
        What `stock` returns.

    Raises:
        FileNotFoundError: There is no such model.
        ModelFolderError: A file of the model is refused, or the weights are not those of its architecture.
    """
    hub: dict[str, Any] = {
        "token": options.get("token"),
        "cache_dir": options.get("cache_folder"),
        "local_files_only": bool(options.get("local_files_only")),
    }
    source = model_folder.find(name, **hub, revision=options.get("revision"))
    if not (source.folder / model_folder.MODULES_FILE).is_file():
        # `modules_for` checks this folder, and the base model of an adapter.
        return stock(name, **{**options, "revision": source.revision or options.get("revision")})
    model_folder.fetch_weights(source, **hub)
    model_folder.check(source, trust_remote_code=bool(options.get("trust_remote_code")))
    if source.revision is None:
        return stock(name, **options)
    # From here on no unchecked file is fetched, unless the caller trusts the repository's code, wherever it is.
    local = hub["local_files_only"] or not options.get("trust_remote_code")
    loaded = stock(name, **{**options, "revision": source.revision, "local_files_only": local})
    if not hub["local_files_only"]:
        model.model_card_data.set_base_model(name, revision=source.revision)
    return loaded


def module_classes() -> Mapping[str, type[torch.nn.Module]]:
    """Return the names that `modules.json` may use for a Transformer, each with the class that loads it."""
    return {reference: CheckedTransformer for reference, kind in MODULES.items() if kind == TRANSFORMER}


class CheckedTransformer(Transformer):
    """A `Transformer` that checks what it loads; after loading, the object becomes a stock `Transformer`.

    Weights are read from safetensors only. A weight that is missing, left over or of another shape is an error, and a
    model that is larger than its weights is refused before memory is allocated for it. `adapters.load_adapter` attaches
    an adapter in the folder.
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        prompt: HierarchicalPrompt | None = None,
        config: Any = None,
        **options: Any,
    ) -> None:
        """Load the model.

        Args:
            model_name_or_path: A folder or a hub id.
            prompt: The prompt of a base model whose own template is to carry it: its chat format is found, and the
                template replaced.
            config: The configuration of a base model, if it was loaded before.
            options: The other arguments of the stock class.
        """
        self._prompt, self._config, self._reads_processor = prompt, config, False
        try:
            super().__init__(model_name_or_path, **options)
        except Gen2EmbedError:
            raise
        except Exception as error:
            if not self._reads_processor:
                raise
            raise processor_error(model_name_or_path, error) from error
        if self.tokenizer is None or not hasattr(self.tokenizer, "backend_tokenizer"):
            raise Gen2EmbedError(
                f"{model_name_or_path}: no tokenizer of the package tokenizers can be made of its files, which is "
                "needed to cut texts; use a folder with a tokenizer.json"
            )
        prepare_tokenizer(self.tokenizer)
        prompt = prompt_of(self.processor.chat_template)
        if prompt is not None:  # use the template of this version, not the one in the folder
            renew_template(self, family_of(self.config.model_type), prompt)
        del self._prompt, self._config, self._reads_processor
        self.__class__ = Transformer

    def infer_modalities(self, model: Any, processor: Any) -> Any:
        """Find the chat format first, if a prompt is given; this is called once model and processor are loaded."""
        self._reads_processor = False
        ensure_padding(getattr(processor, "tokenizer", processor))
        if self._prompt is not None:
            self._write_prompt(processor, family_of(self.config.model_type), self._prompt)
            self.input_formatter = InputFormatter(self.config.model_type, "structured", processor)
        found = super().infer_modalities(model, processor)
        message = found[0].get("message", {})
        if (message.get("method"), message.get("method_output_name")) != ("forward", "last_hidden_state"):
            raise Gen2EmbedError(
                f"models of type {self.config.model_type!r} give no last hidden state for a conversation (their class "
                f"{type(model).__name__} gives {message.get('method_output_name')}); use another model"
            )
        return found

    def _write_prompt(self, processor: Any, family: Family, prompt: HierarchicalPrompt) -> None:
        """Write a prompt into the model's own chat template, or that of its family if its own cannot carry it."""
        found = detected_or_reason(processor, family)
        if isinstance(found, str):
            if found:
                logger.warning("%s", found)
            processor.chat_template = chat_template(family, prompt)
            return
        for reason in found.reasons:
            logger.info("chat format: %s", reason)
        set_template(processor, template_with_prompt(own_template(template_of(processor)), prompt, found.chat_format))
        self.processing_kwargs = found.chat_format.processing_kwargs

    def _load_config(self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]) -> tuple[Any, bool]:
        if self._config is not None:
            return self._config, False
        source, hub = _source(model_name_or_path, config_kwargs)
        base = _base(source, hub)
        options = {key: value for key, value in config_kwargs.items() if key != "subfolder"}
        if base is not source:
            options["revision"] = base.revision
        config = load_config(base, options)
        check_supported(config)  # before the weights are read
        return config, base is not source

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: Any,
        config: Any,
        backend: str,
        is_peft_model: bool,
        **model_kwargs: Any,
    ) -> Any:
        from transformers import AutoModel

        if backend != "torch":
            return super()._load_model(
                model_name_or_path, transformer_task, config, backend, is_peft_model, **model_kwargs
            )
        source, hub = _source(model_name_or_path, model_kwargs)
        base = _base(source, hub)
        if base is not source:
            model_kwargs["revision"] = base.revision
        model_kwargs.pop("subfolder", None)
        trusted, gguf_file = bool(model_kwargs.get("trust_remote_code")), model_kwargs.get("gguf_file")
        tensors = model_folder.check(base, trust_remote_code=trusted, gguf_file=gguf_file)
        if gguf_file is None:
            check_size(base, config, tensors, trusted)
            model_kwargs |= {"use_safetensors": True, "weights_only": True}
        else:
            model_kwargs |= dense_options()
        model, found = AutoModel.from_pretrained(
            base.name,
            config=config,
            **model_kwargs,
            ignore_mismatched_sizes=True,  # `check_keys` below reports them
            output_loading_info=True,
        )
        check_keys(base, model, found)
        if gguf_file is not None:
            forget_gguf(model)
        elif config.model_type == MODEL_TYPE:
            check_copy(weight_files(base.folder, read_index(base.folder)), model)
        if base is not source:
            load_adapter(model, str(source.folder))
        self._reads_processor = True  # what the stock class loads next
        return model


def detected_or_reason(processor: Any, family: Family) -> Detected | str:
    """Find the chat format of a model's own template; return why the template of its family is used, if it is.

    Args:
        processor: The model's processor, or its tokenizer if it takes text alone.
        family: Its family, which tries the model's own template.

    Returns:
        The format; or else the reason as a sentence, empty where the model has no template, or one of ours.

    Raises:
        Gen2EmbedError: In a generic family, which has no other template: there is none, or no format fits it.
    """
    if family.is_generic:
        return chat_format_of(processor)
    try:
        template = template_of(processor)
    except Gen2EmbedError:
        return ""
    if prompt_of(template) is not None and parts_of(template) is None:  # written by hand, by an earlier export
        return ""
    try:
        return chat_format_of(processor)
    except Gen2EmbedError as error:
        return f"the template of {family.name} written by hand is used, since the model's own cannot be: {error}"


def set_template(processor: Any, template: str) -> None:
    """Give a processor, and its tokenizer, a chat template."""
    processor.chat_template = template
    if getattr(processor, "tokenizer", None) is not None and processor.tokenizer.chat_template is not None:
        processor.tokenizer.chat_template = template


def renew_template(transformer: Transformer, family: Family, prompt: HierarchicalPrompt) -> None:
    """Give a transformer the template of its family with a prompt, in the native layout.

    Args:
        transformer: The module. Its template must be one of ours in a generic family; in one that prefers models' own
            templates it tells which of the two is used.
        family: Its family.
        prompt: The prompt.

    Raises:
        Gen2EmbedError: The family is generic, and the template is not one that Gen2Embed wrote, raises, or runs or
            writes more than is allowed.
    """
    if not carried_by_own(family, transformer.processor.chat_template):
        transformer.processor.chat_template = chat_template(family, prompt)
        return
    parts = parts_of(transformer.processor.chat_template)
    if parts is None:
        raise Gen2EmbedError(
            f"the chat template of this {family.name} model was not written by Gen2Embed, so that it has no place for "
            "the prompt; write the folder again: gen2embed export BASE_MODEL OUT"
        )
    template = template_with_prompt(parts.own, prompt, parts.chat_format)
    try_template(template, transformer.tokenizer)
    set_template(transformer.processor, template)


def ensure_padding(tokenizer: Any) -> None:
    """Let a tokenizer without a padding token pad by another one; the attention mask hides it all the same.

    Many models of text alone have none (Llama, Mistral). The token is saved with the tokenizer.

    Raises:
        Gen2EmbedError: It has no token that could be used.
    """
    if tokenizer is None or tokenizer.pad_token is not None:
        return
    token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    if token is None:
        raise Gen2EmbedError(
            f"{tokenizer.name_or_path}: the tokenizer has no token to pad with; pass one: "
            "processor_kwargs={'pad_token': …}"
        )
    tokenizer.pad_token = token


def prepare_tokenizer(tokenizer: Any) -> None:
    """Remove the truncation and padding state of earlier calls, which would be saved with the tokenizer."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


def check_pooling(name: str, modules: Iterable[torch.nn.Module]) -> None:
    """Check that an exported model pools by last token.

    Raises:
        Gen2EmbedError: It does not, so that it was not exported by Gen2Embed.
    """
    pooling = next((module for module in modules if hasattr(module, "pooling_mode")), None)
    mode = getattr(pooling, "pooling_mode", None)
    if mode not in ("lasttoken", ("lasttoken",), ["lasttoken"]):
        raise Gen2EmbedError(
            f"{name} pools by {mode!r}, not by last token: it was not exported by Gen2Embed. "
            "Run `gen2embed export` on its base model."
        )


def load_config(source: model_folder.Source, options: dict[str, Any]) -> Any:
    """Load the configuration of a checked model; of one that also speaks, that of the part that reads (`reading_part`).

    Raises:
        ModelFolderError: `transformers` cannot make a configuration from the file.
    """
    from transformers import AutoConfig

    try:
        return reading_part(AutoConfig.from_pretrained(source.name, **options))
    except Exception as error:  # whatever it raises follows from the file
        path = source.folder / "config.json"
        raise ModelFolderError(f"{path}: not a configuration ({type(error).__name__}: {one_line(error)})") from error


def check_size(source: model_folder.Source, config: Any, tensors: dict[str, Tensor], trusted: bool) -> None:
    """Compare the size of the model that a configuration describes with that of its weights, before allocating memory.

    Raises:
        ModelFolderError: The model has more parameters than its weight files, or no such model can be built.
    """
    from transformers import AutoModel

    path = source.folder / "config.json"
    try:
        with torch.device("meta"):
            described = AutoModel.from_config(config, trust_remote_code=trusted)
        size = sum(parameter.numel() for parameter in described.parameters())
    except Exception as error:  # whatever it raises follows from the file
        raise ModelFolderError(
            f"{path}: no model can be made of it ({type(error).__name__}: {one_line(error)})"
        ) from error
    others = getattr(described, "_keys_to_ignore_on_load_unexpected", None) or ()  # those of a talker, for example
    unused = [UNUSED, *map(re.compile, others)]
    held = sum(tensor.size for name, tensor in tensors.items() if not any(one.search(name) for one in unused))
    if size > held:
        there = {_PARTS.sub("", name) for name in tensors}
        lost = next((name for name, _ in described.named_parameters() if _PARTS.sub("", name) not in there), "")
        raise ModelFolderError(
            f"{path}: the model has {size} parameters, its weights only {held}{lost and f' ({lost} is missing)'}; "
            "copy or download the weights again"
        )


def check_keys(source: model_folder.Source, model: torch.nn.Module, found: dict[str, Any]) -> None:
    """Refuse weights that are not exactly those of the architecture.

    Args:
        source: The model, for messages.
        model: The loaded model.
        found: The report of transformers about loading.

    Raises:
        ModelFolderError: A weight is missing, left over, or of another shape.
    """
    missing = sorted(found["missing_keys"])
    unexpected = sorted(name for name in found["unexpected_keys"] if not UNUSED.search(name))
    differing = sorted(found["mismatched_keys"])
    if missing or unexpected or differing:
        shapes = [f"{name} {tuple(there)} instead of {tuple(due)}" for name, there, due in differing[:1]]
        raise ModelFolderError(
            f"{source.folder}: the weights are not those of {type(model).__name__}: {len(missing)} missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}, {len(differing)} of another shape "
            f"{shapes}; copy or download the folder again"
        )


def _source(name: str, options: dict[str, Any]) -> tuple[model_folder.Source, dict[str, Any]]:
    hub: dict[str, Any] = {
        "token": options.get("token"),
        "cache_dir": options.get("cache_dir"),
        "local_files_only": bool(options.get("local_files_only")),
    }
    return model_folder.find(name, **hub, revision=options.get("revision")), hub


def _base(source: model_folder.Source, hub: dict[str, Any]) -> model_folder.Source:
    """Return the base model, fetched, if `source` is an adapter; otherwise return `source`."""
    return model_folder.find_base(source, **hub) or source
