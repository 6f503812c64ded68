"""What a model will read: its prompt as text, for each kind of input, and how the chat format was found.

Cost: the processor is loaded, a second or less; no weights are read or fetched (except with a GGUF file, which holds
everything).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from gen2embed_mteb.embedder.chat_formats.detection import render, unprompted_text
from gen2embed_mteb.embedder.chat_formats.header import own_template, parts_of, prompt_of, template_with_prompt
from gen2embed_mteb.embedder.chat_formats.probing import takes_images, template_of
from gen2embed_mteb.embedder.families import Family, chat_template, family_of
from gen2embed_mteb.embedder.model_folder import checks as model_folder
from gen2embed_mteb.embedder.model_folder import compat
from gen2embed_mteb.embedder.model_folder.checked_loading import detected_or_reason, load_config
from gen2embed_mteb.embedder.model_folder.loading import processor_options
from gen2embed_mteb.embedder.model_folder.supported import check_supported, processor_error
from gen2embed_mteb.embedder.prompts.slots import DEFAULT_SLOTS, known_slots
from gen2embed_mteb.embedder.prompts.strategies import (
    DEFAULT,
    TASK_STRATEGIES,
    HierarchicalPrompt,
    strategy,
    task_prompt,
)
from gen2embed_mteb.embedder.short_names import resolve
from gen2embed_mteb.names import Side

TEXT = "a red circle"
INPUTS = (
    ("a text", TEXT, 0),
    ("an image", "", 1),
    ("an image and a text", TEXT, 1),
    ("two images and a text", TEXT, 2),
)
"""The inputs that are shown: name, text, and number of images."""


def inspect_prompt(
    model: str | Path,
    *,
    prompt_mode: str | HierarchicalPrompt | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    dataset: str | None = None,
) -> str:
    """Return what a model will read, as a readable text.

    Args:
        model: Hub id, directory or short name of a base model, an adapter or an exported model.
        prompt_mode: The name of a strategy, or a prompt of the caller's own; `None` as in `Gen2Embed`.
        revision: Branch, tag or commit on the hub.
        gguf_file: The GGUF file of the folder to read.
        dataset: A dataset whose words the texts get (`freeret` and `lens`); `None`: those that fit any.

    Raises:
        FileNotFoundError: There is no such model.
        Gen2EmbedError: The dataset is unknown, or the strategy says nothing of a task. A file is refused, the type of
            model cannot be used, or no chat format fits its template.
    """
    opened = open_prompt(model, prompt_mode=prompt_mode, revision=revision, gguf_file=gguf_file, dataset=dataset)
    processor, family, detected, named = opened.processor, opened.family, opened.detected, opened.prompt_name
    lines = [
        f"model: {opened.name} (type {opened.config.model_type}, "
        f"{'images and text' if takes_images(processor) else 'text alone'})",
        f"prompt: {named}",
    ]
    if named in TASK_STRATEGIES:
        slots = DEFAULT_SLOTS if dataset is None else known_slots(dataset)
        lines += [f"{slot} of {dataset or 'any dataset'}: {text}" for slot, text in asdict(slots).items()]
    if not isinstance(detected, str):
        lines += [f"chat format: {detected.chat_format.to_json()}", *(f"- {reason}" for reason in detected.reasons)]
        said = unprompted_text(own_template(template_of(processor)), detected.chat_format, opened.special_tokens)
        lines.append(f"under the strategy none the template says by itself: {repr(said) if said else 'nothing'}")
    else:
        lines.append(f"chat format: the template of {family.name}, written by hand")
        lines += [f"- {detected}"] if detected else []
    for side in get_args(Side):
        for kind, text, images in INPUTS:
            if images and not takes_images(processor):
                continue
            rendered = opened.rendered(side, text, images)
            lines += ["", f"{side}, {kind}:", *(f"    {line}" for line in rendered.split("\n"))]
    return "\n".join(lines)


@dataclass(frozen=True)
class OpenedPrompt:
    """The processor of a model, and the chat template that carries the prompt; no weights.

    Attributes:
        name: The model's name or path.
        config: Its configuration.
        processor: Its processor, or its tokenizer if it takes text alone.
        family: Its family.
        prompt_name: The name of the prompt's strategy.
        detected: The chat format that was found, or why none was looked for.
        template: The chat template with the prompt.
    """

    name: str | Path
    config: Any
    processor: Any
    family: Family
    prompt_name: str
    detected: Any
    template: str

    @property
    def special_tokens(self) -> dict[str, Any]:
        """The special tokens that templates use, by name."""
        return dict(getattr(self.processor, "tokenizer", self.processor).special_tokens_map)

    def rendered(self, side: Side, text: str, images: int) -> str:
        """Return what the model reads of an input, with one placeholder per image."""
        parts = [{"type": "image"}] * images + ([{"type": "text", "text": text}] if text else [])
        return render(self.template, [{"role": "user", "content": parts}], side, self.special_tokens)


def open_prompt(
    model: str | Path,
    *,
    prompt_mode: str | HierarchicalPrompt | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    dataset: str | None = None,
) -> OpenedPrompt:
    """Open a model's processor with a prompt; see `inspect_prompt` for arguments and errors."""
    name, config, source, shared = _opened_config(model, revision, gguf_file)
    processor = _processor(source, shared)
    family = family_of(config.model_type)
    # A model's own template may begin like one of those written by hand.
    known = parts_of(processor.chat_template) if family.tries_own_template else None
    found = known.prompt if known else None if family.is_generic else prompt_of(processor.chat_template)
    prompt = strategy(prompt_mode) if prompt_mode is not None else found or strategy(DEFAULT)
    named = prompt.name
    if dataset is not None:
        prompt = task_prompt(named, known_slots(dataset))
    detected = detected_or_reason(processor, family) if family.tries_own_template else ""
    if isinstance(detected, str):
        template = chat_template(family, prompt)
    else:
        template = template_with_prompt(own_template(template_of(processor)), prompt, detected.chat_format)
    return OpenedPrompt(name, config, processor, family, named, detected, template)


def open_config(model: str | Path, *, revision: str | None = None) -> tuple[str | Path, Any]:
    """Return the name and the configuration of a model that can be used; its `config.json` alone is needed.

    Args:
        model: See `inspect_prompt`.
        revision: Likewise.

    Raises:
        FileNotFoundError: There is no such model.
        Gen2EmbedError: A file is refused, or the type of model cannot be used.
    """
    name, config, _, _ = _opened_config(model, revision, None)
    return name, config


def _opened_config(
    model: str | Path, revision: str | None, gguf_file: str | None
) -> tuple[str | Path, Any, model_folder.Source, dict[str, Any]]:
    name = resolve(model) or model_folder.as_given(model)
    hub: dict[str, Any] = {"token": None, "cache_dir": None, "local_files_only": Path(name).is_dir()}
    source = model_folder.find(name, **hub, revision=revision)
    source = model_folder.find_base(source, **hub) or source
    if gguf_file is not None:
        model_folder.fetch_weights(source, **hub, gguf_file=gguf_file)
    model_folder.check(source, gguf_file=gguf_file, with_weights=False)
    compat.install()
    shared = {**hub, "revision": source.revision, **({"gguf_file": gguf_file} if gguf_file else {})}
    config = load_config(source, shared)
    check_supported(config)
    return name, config, source, shared


def _processor(source: model_folder.Source, shared: dict[str, Any]) -> Any:
    from transformers import AutoProcessor

    try:
        with compat.quiet_loading():
            return AutoProcessor.from_pretrained(source.name, **processor_options(source, shared))
    except Exception as error:  # whatever it raises follows from the files, or from a missing package
        raise processor_error(source.name, error) from error
