"""`Gen2Embed`: a generative multimodal LLM that serves as a `SentenceTransformer`.

The two-level prompt (paper, Sec. III-B) turns the generative model into an embedding model; no training is needed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gen2embed_mteb.embedder.calibration import fitting as calibrations
from gen2embed_mteb.embedder.calibration.fitting import SHRINKAGE, CalibrationRecord, Means, Order
from gen2embed_mteb.embedder.chat_formats.chat_format import ChatFormat
from gen2embed_mteb.embedder.chat_formats.header import format_of, prompt_of
from gen2embed_mteb.embedder.families import ImageLayout, chat_template, check_layout, check_num_crops
from gen2embed_mteb.embedder.kept_generator import KeepsGenerator
from gen2embed_mteb.embedder.model_folder import adapters, checked_loading, compat, saving, serving_card
from gen2embed_mteb.embedder.model_folder import checks as model_folder
from gen2embed_mteb.embedder.model_folder import loading as modules
from gen2embed_mteb.embedder.passes.behind_pooling import run_modules
from gen2embed_mteb.embedder.passes.one_at_a_time import lock_tokenizer
from gen2embed_mteb.embedder.passes.phrase_pooling import PHRASE_LENGTH, check_pooling_mode, pool_phrase
from gen2embed_mteb.embedder.prompts import dataset_prompts
from gen2embed_mteb.embedder.prompts.named_prompts import NamedPrompts
from gen2embed_mteb.embedder.prompts.strategies import DEFAULT, TASK_STRATEGIES, HierarchicalPrompt, strategy
from gen2embed_mteb.embedder.readouts.choice import Readout, chosen_readout, stored_readout
from gen2embed_mteb.embedder.readouts.readout import readout_of, set_readout
from gen2embed_mteb.embedder.short_names import resolve
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.resizing import MIN_SIDE, ImageOptions
from gen2embed_mteb.names import Pooling

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-\d+")


class Gen2Embed(NamedPrompts, KeepsGenerator):
    """A multimodal embedding model that is made from a generative one by a prompt alone.

    Args:
        name_or_path: A base model (hub id or local directory), an exported directory, an adapter (its base is loaded
            too), or a short name (`gen2embed`, `gen2embed-mini`).
        prompt_mode: A name in `prompts.STRATEGIES` or a `HierarchicalPrompt`; `None` keeps the prompt of an exported
            directory, and is `hierarchical` for anything else.
        adapter: A LoRA or DoRA adapter (hub id or directory) for the base model.
        layout: `native`, images as the family's processor lays them out; `official`, bare image tokens with 1-D
            positions, as the released checkpoints were trained; `raw`, the same without any turn, as UniME and VLM2Vec
            were evaluated on MMEB (the default prompt is then `none`).
        gguf_file: The GGUF file of the folder to load, for a text-only model; needs the extra [gguf].
        readout: Which hidden state becomes the embedding: `last`, `pre-mlp`, `drop-1`, `drop-2`, … (see `readout`);
            `None` keeps that of an exported directory, and is `last` for anything else.
        readout_norm: Whether the decoder's final norm is applied to it; `None` likewise, and is `True`.
        pooling: `last`, the state at the last token; `phrase`, the mean over the tokens of the prompt's phrase
            (`prompt_mode="lens"`), which cannot be exported or trained.
        max_length: Longest input in tokens; longer text is cut, larger images are reduced. `None`: the limit of the
            tokenizer.
        image_root: Folder that image paths are relative to and may not leave; `None` takes paths as they are.
        resize: A name in `images.resizing.RESIZE_POLICIES`; the policy is applied before the processor.
        min_side: Smallest side of an image in pixels. Smaller images, and images whose sides differ by more than 200
            to 1, are enlarged before the processor, as in `evaluate`, `sample` and `train`; 0 never enlarges. See
            `images.resizing.ensure_min_side`.
        exif_orientation: Whether images are turned as their EXIF data says; the reference clients do not turn them.
        kwargs: Options of `SentenceTransformer`: `device`, `truncate_dim`, `revision`, `model_kwargs`, …

    Attributes:
        source: Hub id or directory that the model was loaded from.
        calibration: What the model's calibration was fitted on; `None` if it has none.

    Raises:
        ValueError: The prompt mode, layout or resize policy is unknown, the model cannot be used (see
            `model_folder.supported`), no chat format fits its template, the `backend` is not torch, the adapter does
            not fit, or the model has no state for the readout.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        prompt_mode: str | HierarchicalPrompt | None = None,
        adapter: str | Path | None = None,
        layout: ImageLayout = "native",
        gguf_file: str | None = None,
        readout: str | None = None,
        readout_norm: bool | None = None,
        pooling: Pooling = "last",
        max_length: int | None = None,
        image_root: str | Path | None = None,
        resize: str = "processor",
        min_side: int = MIN_SIDE,
        exif_orientation: bool = False,
        **kwargs: Any,
    ) -> None:
        if prompt_mode is None and layout == "raw":
            prompt_mode = "none"
        if prompt_mode is not None:
            prompt_mode = strategy(prompt_mode)
        check_pooling_mode(pooling, prompt_mode)
        Readout(readout or "last", readout_norm is not False)  # refused before the weights are read
        if kwargs.get("backend", "torch") != "torch":
            raise Gen2EmbedError(
                f"backend={kwargs['backend']!r} is not supported: Gen2Embed runs on torch alone; leave backend out"
            )
        self.image_options = ImageOptions(resize=resize, min_side=min_side, exif_orientation=exif_orientation)
        # sentence-transformers 6.2 calls `_load_default_modules` from its constructor, with arguments of its own only:
        # what that method needs beside them must be on the instance before.
        self._load_options: dict[str, Any] = {
            "prompt_mode": prompt_mode or DEFAULT,
            "adapter": adapter,
            "layout": layout,
            "gguf_file": gguf_file,
        }
        self._is_base = False
        self.calibration: CalibrationRecord | None = None
        self._layout: ImageLayout = layout
        self._pooling: Pooling = pooling
        self.image_root = image_root
        compat.install()
        name = resolve(name_or_path) or model_folder.as_given(name_or_path)
        self.source = name
        self._module_classes = {**vars(self).get("_module_classes", {}), **checked_loading.module_classes()}
        with compat.quiet_loading():
            super().__init__(name, **kwargs)
        if not self._is_base:
            hub: dict[str, Any] = {key: kwargs[key] for key in ("token", "local_files_only") if key in kwargs}
            hub["cache_dir"] = kwargs.get("cache_folder")
            if gguf_file is not None:
                raise Gen2EmbedError(
                    f"{name} is an exported model, gguf_file={gguf_file!r} is for base models: leave it out"
                )
            check_num_crops(self._family, kwargs.get("processor_kwargs"))
            checked_loading.check_pooling(name, self)
            self.calibration = CalibrationRecord.read(Path(name))
            stored = stored_readout(self[0].config, name)
            if self.calibration is not None and (
                adapter is not None
                or prompt_mode not in (None, self.prompt)
                or chosen_readout(readout, readout_norm, stored, name) != stored
                or pooling != "last"
            ):
                logger.warning(
                    "%s was calibrated with its own prompt, readout, pooling and weights; with others it is used "
                    "without calibration. Calibrate it again: gen2embed calibrate",
                    name,
                )
                calibrations.detach(self)
            if adapter is not None:
                adapters.load_adapter(self[0].model, adapter, **hub)
        before = self.prompt
        self._set_prompt(prompt_mode if prompt_mode is not None else before)
        check_pooling_mode(pooling, self.prompt)
        if self._is_base or self.prompt != before:
            dataset_prompts.renew(self, self.prompt, kwargs.get("prompts"))
        self._set_readout(readout, readout_norm)
        checked_loading.prepare_tokenizer(self.tokenizer)
        lock_tokenizer(self.tokenizer)
        # This switches off the tokenizer's warning about long text: `preprocess` cuts text that is too long.
        self.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        if max_length is not None:
            self.max_seq_length = max_length

    def _load_modules(self, model_name_or_path: str, **kwargs: Any) -> Any:
        """Load the modules as the parent class does, but check every file before it is read."""
        return checked_loading.load_modules(self, super()._load_modules, model_name_or_path, **kwargs)

    def _load_default_modules(self, model_name_or_path: str, **kwargs: Any) -> tuple[list[torch.nn.Module], dict]:
        """Build the modules of a model that was not saved by sentence-transformers; the parent class calls this."""
        self._is_base = True
        check_pooling_mode(self._pooling, strategy(self._load_options["prompt_mode"]))  # before the weights are read
        if not kwargs.get("local_files_only") and not Path(model_name_or_path).is_dir():
            self.model_card_data.set_base_model(model_name_or_path, revision=kwargs.get("revision"))
        return modules.modules_for(model_name_or_path, **self._load_options, **kwargs), {}

    @property
    def prompt(self) -> HierarchicalPrompt:
        """The two-level prompt in use."""
        found = prompt_of(self.processor.chat_template)
        return found if found is not None else strategy(DEFAULT)

    @property
    def prompt_mode(self) -> str:
        """The name of the prompt in use, or "custom"."""
        return self.prompt.name

    @property
    def layout(self) -> ImageLayout:
        """How images are laid out in the prompt."""
        return self._layout

    @property
    def pooling(self) -> Pooling:
        """Which tokens' states become the embedding: `last`, or the mean over the `phrase`."""
        return self._pooling

    @property
    def readout(self) -> str:
        """Which hidden state becomes the embedding: `last`, `pre-mlp`, `drop-1`, …"""
        return readout_of(self[0].model).state

    @property
    def readout_norm(self) -> bool:
        """Whether the decoder's final norm is applied to that state."""
        return readout_of(self[0].model).norm

    @property
    def revision(self) -> str:
        """The hub commit that the weights came from; "" for a local directory."""
        return getattr(self[0].config, "_commit_hash", None) or ""

    @property
    def uses_mrope(self) -> bool:
        """Whether positions are three-dimensional (M-RoPE)."""
        return self._family.mrope

    @property
    def chat_format(self) -> ChatFormat | None:
        """How the model's own chat template gets the prompt; `None` where a template written by hand has it."""
        return format_of(self.processor.chat_template)

    def set_prompt(self, prompt_mode: str | HierarchicalPrompt) -> None:
        """Change the two-level prompt, in place; an object that encodes with the old one must not be used any more.

        Args:
            prompt_mode: As for the constructor.

        Raises:
            Gen2EmbedError: The name is unknown; the model is calibrated, which it was with its own prompt; or one of
                the two strategies has texts per dataset.
        """
        prompt = strategy(prompt_mode)
        if prompt != self.prompt and {prompt.name, self.prompt_mode} & set(TASK_STRATEGIES):
            raise Gen2EmbedError(
                f"{self.source}: from {self.prompt_mode!r} to {prompt.name!r}, one of which has texts per dataset; "
                f"load the model again, with prompt_mode={prompt.name!r}"
            )
        if self.calibration is not None and prompt != self.prompt:
            raise Gen2EmbedError(
                f"{self.source} was calibrated with its own prompt ({self.prompt_mode}); use the model that it was "
                "made of"
            )
        self._set_prompt(prompt)

    def _set_prompt(self, prompt: HierarchicalPrompt) -> None:
        check_layout(self._family, self._layout)
        if self._layout == "native":
            checked_loading.renew_template(self[0], self._family, prompt)
        else:
            self.processor.chat_template = chat_template(self._family, prompt, self._layout)
            self[0].processing_kwargs = self._family.processing_kwargs

    def _set_readout(self, state: str | None, norm: bool | None) -> None:
        stored = stored_readout(self[0].config, self.source)
        trained = readout_of(self[0].model)  # an adapter names the one that it was trained for
        if not trained.is_default:
            state, norm = trained.state if state is None else state, trained.norm if norm is None else norm
        set_readout(self[0].model, chosen_readout(state, norm, stored, self.source), self.source)

    def calibrate(
        self,
        queries: Sequence[Any],
        documents: Sequence[Any],
        *,
        shrinkage: float = SHRINKAGE,
        means: Means = "shared",
        order: Order = "model",
        data: str = "",
        **options: Any,
    ) -> CalibrationRecord:
        """Fit an affine map on unlabelled inputs and put it behind the model; an earlier one is replaced.

        See `calibration`. All ways of encoding, `save_pretrained` and the fingerprint include the map.

        Args:
            queries: Inputs like those that will be encoded as queries; some hundreds.
            documents: The same for candidates. They need not belong to the queries.
            shrinkage: How little the directions are evened out, in (0, 1]; 1 subtracts the mean alone.
            means: "shared", one mean for both sides; "side", one for each.
            order: The order of the dimensions: "model", as they are; "variance", so that vectors may be cut short.
            data: What the inputs are, for the record.
            options: Options of `encode`: `batch_size`, `show_progress_bar`, …

        Returns:
            The record.

        Raises:
            Gen2EmbedError: A setting is out of its range, or there are fewer than 100 inputs, or none of a side.
        """
        return calibrations.calibrate(
            self, queries, documents, shrinkage=shrinkage, means=means, order=order, data=data, options=options
        )

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Run the modules as sentence-transformers does, but normalise in float32: bfloat16 norms are off by 1e-3.

        With `pooling="phrase"` the mean over the phrase takes the place of the pooling module.
        """
        parts, counts = list(self.named_children()), input.pop(PHRASE_LENGTH, None)
        if counts is None:
            return run_modules(self, parts, input, **kwargs)
        features = pool_phrase(run_modules(self, parts[:1], input, **kwargs), counts)
        return run_modules(self, parts[2:], features, **kwargs)

    def save(
        self,
        path: str | None,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write stock modules only, adapters merged, so that plain `SentenceTransformer` loads the directory.

        The files are written to a temporary folder, read back, and only then put in place. A folder that was saved
        before is replaced. In a trainer's `checkpoint-STEP` the adapter stays separate from its base model, so that
        training can resume from it.

        Args:
            path: The directory.
            model_name: The name in the model card.
            create_model_card: Whether `README.md` is written.
            train_datasets: Ignored, as in sentence-transformers.
            safe_serialization: Must be true: pickled weights are not written.

        Raises:
            ForeignFileError: A file that this method did not save stands at a path that must be written.
            Gen2EmbedError: Stock modules cannot express a setting (`layout`, `pooling` or `resize`), the adapter
                cannot be merged, or the written files do not load as this model.
        """
        if path is None:
            return
        if not safe_serialization:
            raise Gen2EmbedError("safe_serialization=False would write pickled weights; leave it out")
        checked_loading.prepare_tokenizer(self.tokenizer)
        stock = partial(super().save, model_name=model_name, create_model_card=create_model_card)

        def write(folder: str) -> None:
            stock(folder)
            if self.calibration is not None:
                self.calibration.write(Path(folder))
            elif readout_of(self[0].model).is_default and self.layout == "native":
                serving_card.add_serving(Path(folder) / "README.md", self)

        reason = self.inexpressible
        if _CHECKPOINT.fullmatch(Path(path).name) and adapters.has_adapter(self[0].model):
            saving.save_checkpoint(self, path, write, whole=not reason)
            return
        if self._family.own_classes:
            raise Gen2EmbedError(
                f"{reason} cannot be saved: nothing but Gen2Embed could load the folder. Use {self.source} as it is; "
                "what gen2embed train writes is an adapter"
            )
        if reason:
            raise Gen2EmbedError(
                f"{reason} cannot be saved: no stock module can express it, and a directory without it would give "
                "other vectors. Save a model that was loaded without it, and pass it when you load that"
            )
        saving.save_merged(self, path, write)

    @classmethod
    def _load_with_module_classes(cls, model_name_or_path: str, module_classes: Any, **kwargs: Any) -> Gen2Embed:
        """Load a checkpoint for the stock trainer, which copies its weights: in float32 and on the CPU."""
        kwargs = {"device": "cpu", "model_kwargs": {"dtype": torch.float32}, **kwargs}
        return super()._load_with_module_classes(model_name_or_path, module_classes, **kwargs)

    @property
    def inexpressible(self) -> str:
        """The setting that no stock module can express; an empty string if stock modules can express all."""
        if self._family.own_classes:
            return f"a model of type {self._family.model_type!r}, for which transformers has no class,"
        if self._layout == "official" and self._family.mrope:
            return "layout='official'"
        if self._pooling == "phrase":
            return "pooling='phrase'"
        options = self.image_options
        if options.min_side not in (0, MIN_SIDE):
            return f"min_side={options.min_side}"
        if options.exif_orientation:
            return "exif_orientation=True"
        return f"resize={options.resize!r}" if options.resize != "processor" else ""
