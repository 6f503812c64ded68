"""One run of a VLM2Vec script: its arguments, the model, and the replacements that both generations share.

Both scripts parse the command line, load a configuration and a processor by the model's name, call `MMEBModel.load`,
then loop over datasets. `Session` wraps the argument parser, to read the parsed arguments, and replaces the three
loaders for this backbone. The loop over datasets stays VLM2Vec's.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.embedder.model_folder.adapters import CONFIG_FILE
from gen2embed_mteb.embedder.prompts.strategies import strategy
from gen2embed_mteb.images.files import follows_links
from gen2embed_mteb.images.source import ImageSource
from vlm2vec_adapter import BACKBONE
from vlm2vec_adapter.options import Options, UsageError
from vlm2vec_adapter.results import output
from vlm2vec_adapter.results.vector_files import FileEntry, VectorFiles
from vlm2vec_adapter.scripts.engine import Engine

logger = logging.getLogger(__name__)

IGNORED = {"image_resolution": "--gen2embed_resize", "resize_min_pixels": "", "resize_max_pixels": ""}
"""VLM2Vec's flags for resizing by its own processors, and our flag that replaces each."""


class Session:
    """The state of a run.

    Args:
        options: Our options.
        generation: "v1" or "v2".
        share: The rows of every batch that belong to this process. V2 shares the rows itself.
        describe_datasets: Returns the settings that decide the rows of each dataset, from VLM2Vec's `DataArguments`.
    """

    def __init__(
        self,
        options: Options,
        generation: str,
        share: Share,
        describe_datasets: Callable[[Any], Mapping[str, Mapping[str, Any]]],
    ) -> None:
        """Keep the arguments; the rest is known once VLM2Vec has parsed its command line."""
        self.options = options
        self.generation = generation
        self.share = share
        self._describe_datasets = describe_datasets
        self._model_args: Any = None
        self._data_args: Any = None
        self._loading = False
        self._engine: Engine | None = None
        self._images: dict[str, ImageSource] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._folder: Path | None = None
        self._lock: Any = None

    @property
    def engine(self) -> Engine:
        """The model; it exists once the script has called `MMEBModel.load`."""
        if self._engine is None:
            raise RuntimeError("VLM2Vec asked for a batch before it called MMEBModel.load")
        return self._engine

    @property
    def data_args(self) -> Any:
        """VLM2Vec's `DataArguments`."""
        return self._data_args

    def images_in(self, root: str | None) -> ImageSource | None:
        """Return the images in a folder or a zip archive; `None` if `root` is `None` or empty.

        Raises:
            FileNotFoundError: There is no such folder or archive.
        """
        if not root:
            return None
        if root not in self._images:
            self._images[root] = ImageSource(
                Path(root).expanduser(),
                follow_links=follows_links(),
                exif_orientation=self.options.exif_orientation,
            )
        return self._images[root]

    def install(self, model_class: Any) -> None:
        """Replace, in memory, the methods that both generations share.

        Args:
            model_class: VLM2Vec's `MMEBModel`.
        """
        import torch
        import transformers

        self._listen_to(transformers.HfArgumentParser)
        self._answer(transformers.AutoConfig, SimpleNamespace(model_type=BACKBONE))
        self._answer(transformers.AutoProcessor, SimpleNamespace(name=BACKBONE))
        model_class.load = classmethod(lambda _, model_args, *args, **kwargs: self.load(model_args))
        torch.distributed.init_process_group = _with_gloo(torch.distributed.init_process_group)

    def load(self, model_args: Any) -> Engine:
        """Load the model and claim the output folder; this replaces `MMEBModel.load` for this backbone.

        Args:
            model_args: VLM2Vec's `ModelArguments`.

        Raises:
            OutputMismatchError: Another model wrote the output folder.
            ValueError: The model or its adapter cannot be used.
        """
        from gen2embed_mteb.embedder.fingerprint import fingerprint
        from gen2embed_mteb.embedder.model import Gen2Embed

        name, adapter, layout = self._sources(model_args)
        options = self.options
        self._loading = True
        try:
            model = Gen2Embed(
                name,
                prompt_mode=options.prompt_mode,
                adapter=adapter,
                layout=layout,
                max_length=self._data_args.max_len,
                device="cpu",  # the script moves the model
                revision=options.revision,
                min_side=options.min_side,
                model_kwargs={"dtype": options.dtype} if options.dtype else None,
                processor_kwargs={"num_crops": options.num_crops} if options.num_crops else None,
            )
        finally:
            self._loading = False
        model.eval()
        dtype = str(model.dtype).removeprefix("torch.")
        source = f"{name} + {adapter}" if adapter else name
        logger.info("%s: prompt %r, layout %r, %s", source, model.prompt_mode, model.layout, dtype)
        if self._folder is not None and self.share.rank == 0:
            settings = {
                **self._settings(model_args),
                "prompt_mode": model.prompt_mode,
                "dtype": dtype,
                "fingerprint": fingerprint(model),
            }
            facts = {
                "model_backbone": model[0].config.model_type,
                "model_size": f"{sum(weight.numel() for weight in model.parameters()) / 1e9:.2g}B",
                "embedding_dimension": model.get_embedding_dimension(),
                "max_length_tokens": model.max_seq_length,
            }
            output.claim(self._folder, settings, self._describe_datasets(self._data_args), facts)
        self._engine = Engine(
            model,
            batch_tokens=options.batch_tokens,
            image_options=options.image_options(),
            share=self.share if self.generation == "v1" else None,
        )
        return self._engine

    def _sources(self, model_args: Any) -> tuple[str, str | None, Any]:
        """Return the model, its adapter and the layout, from VLM2Vec's flags and ours."""
        name, checkpoint, adapter = model_args.model_name, model_args.checkpoint_path, self.options.adapter
        if checkpoint and (model_args.lora or checkpoint == adapter or (Path(checkpoint) / CONFIG_FILE).is_file()):
            if adapter not in (None, checkpoint):
                raise UsageError(
                    f"--checkpoint_path {checkpoint} and --gen2embed_adapter {adapter} are both adapters; pass one"
                )
            adapter = checkpoint
        elif checkpoint:
            name = checkpoint
        return name, adapter, self.options.layout_for(name, adapter)

    def _settings(self, model_args: Any) -> dict[str, Any]:
        """Return the settings that decide the vectors, as far as they are known before the model is loaded."""
        name, adapter, layout = self._sources(model_args)
        return {
            "generation": self.generation,
            "model": name,
            "adapter": adapter,
            "layout": layout,
            "max_len": self._data_args.max_len,
            "resize": self.options.resize,
            "min_side": self.options.min_side,
            **({"num_crops": self.options.num_crops} if self.options.num_crops else {}),
            **self.options.orientation(),
        }

    def _parsed(self, model_args: Any, data_args: Any) -> None:
        """Check the parsed arguments of the script, before anything is loaded."""
        if model_args.model_backbone != BACKBONE:
            raise UsageError(f"--model_backbone is {model_args.model_backbone!r}; this adapter serves {BACKBONE!r}")
        self._model_args, self._data_args = model_args, data_args
        for flag, ours in IGNORED.items():
            default = getattr(type(data_args), flag, None)
            if getattr(data_args, flag, default) != default:
                logger.warning("--%s is not used%s", flag, f": {ours} says it" if ours else "")
        if model_args.pooling not in ("last", "eos"):
            logger.warning("--pooling %s is not used: this model pools by the last token", model_args.pooling)
        if not data_args.encode_output_path:
            return
        self._folder = Path(data_args.encode_output_path)
        if self.share.rank == 0:
            settings = self._settings(model_args)
            if self.options.prompt_mode:
                settings["prompt_mode"] = strategy(self.options.prompt_mode).name
            datasets = self._describe_datasets(data_args)
            output.check(self._folder, settings, datasets)
            self._lock = output.lock(self._folder)
            output.set_aside_unfinished(self._folder, datasets)
            noted, note = partial(output.noted, self._folder), partial(output.note, self._folder)
            VectorFiles(self._folder, noted, note).install()
        elif self.generation == "v1" and self.share.rank > 0:
            # In v1 every process writes every file. Only the files of the first process are used. The others write to
            # a temporary folder, which shows them the same finished datasets, so that all skip the same ones.
            self._scratch = tempfile.TemporaryDirectory(prefix="gen2embed-", ignore_cleanup_errors=True)
            entries: dict[str, FileEntry] = output.mirror(self._folder, Path(self._scratch.name))
            VectorFiles(Path(self._scratch.name), entries.get, entries.__setitem__).install()
            data_args.encode_output_path = self._scratch.name

    def _listen_to(self, parser_class: Any) -> None:
        stock = parser_class.parse_args_into_dataclasses

        @wraps(stock)
        def parse_args_into_dataclasses(parser: Any, *args: Any, **kwargs: Any) -> Any:
            parsed = stock(parser, *args, **kwargs)
            self._parsed(parsed[0], parsed[1])
            return parsed

        parser_class.parse_args_into_dataclasses = parse_args_into_dataclasses

    def _answer(self, auto_class: Any, answer: Any) -> None:
        """Let `from_pretrained` return `answer` when the script asks for its own model; other calls are unchanged."""
        stock = auto_class.from_pretrained.__func__

        @wraps(stock)
        def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
            if self._model_args is not None and not self._loading:
                asked = self._model_args
                if name in (asked.model_name, asked.checkpoint_path, asked.processor_name):
                    return answer
            return stock(cls, name, *args, **kwargs)

        auto_class.from_pretrained = classmethod(from_pretrained)


def _with_gloo(stock: Any) -> Any:
    """Return `init_process_group` with gloo in place of nccl if there is no GPU; V2 always asks for nccl."""

    @wraps(stock)
    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        import torch

        if backend == "nccl" and not torch.cuda.is_available():
            logger.info("no GPU: processes talk through gloo, not nccl")
            backend = "gloo"
        return stock(backend, *args, **kwargs)

    return init_process_group
