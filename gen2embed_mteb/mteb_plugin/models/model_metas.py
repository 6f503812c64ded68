"""The models as mteb lists them: its record made of each row of the table in `model_table.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mteb.models.model_meta import ModelMeta, ScoringFunction

from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.prompts.strategies import DEFAULT
from gen2embed_mteb.mteb_plugin.models.model_table import COMMITS, HUB_MODELS, ORGANISATION, OWN_TEMPLATE, Model, mini
from gen2embed_mteb.mteb_plugin.models.revisions import inputs_digest, pairs_digest, revision_of

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

CITATION = """@article{ju2025generator,
  author = {Ju, Yeong-Joon and Lee, Seong-Whan},
  journal = {arXiv preprint arXiv:2508.00955},
  title = {From Generator to Embedder: Harnessing Innate Abilities of Multimodal LLMs via Building Zero-Shot
Discriminative Embedding Model},
  year = {2025},
}"""


class Gen2EmbedMeta(ModelMeta):
    """mteb's record of a model, whose revision is found when it is first asked for.

    It takes reading the weights, which importing mteb must not wait for.
    """

    def __getattribute__(self, name: str) -> Any:
        """Find the revision on first use.

        mteb 2.26 reads `ModelMeta.revision` as a plain field, and pydantic 2 keeps fields in the instance's
        `__dict__`, where no property of that name is asked.
        """
        if name == "revision":
            fields = super().__getattribute__("__dict__")
            if fields.get("revision") is None:
                options = fields["loader_kwargs"]
                commit = COMMITS.get(options["source"])
                own = options["source"] in OWN_TEMPLATE
                prompt = options.get("prompt_mode", DEFAULT)
                found = revision_of(options["source"], options["layout"], commit, own_template=own, prompt_mode=prompt)
                if found is not None and fields["model_type"] == ["cross-encoder"]:
                    found = f"{found}-{pairs_digest()}"
                fields["revision"] = found
        return super().__getattribute__(name)

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        """As in pydantic, with the revision found."""
        _ = self.revision
        return dict(super().model_dump(**kwargs))

    def _resolve_extras_groups(self) -> list[str]:
        """Of mteb's extras none is needed: images go through Pillow where torchvision is absent."""
        return []


RERANKER = "-reranker"
"""What the names of rerankers end in."""


def as_meta(model: Model, *, reranker: bool = False) -> Gen2EmbedMeta:
    """Make mteb's record of a model of the table.

    Args:
        model: The model.
        reranker: Whether the record is of the reranker of the same weights.
    """
    size = None if model.num_parameters is None else round(model.num_parameters * model.parameter_bytes / 2**20)
    on_hub = not Path(model.source).is_dir()
    return Gen2EmbedMeta(
        loader=load_reranker if reranker else load_gen2embed,
        loader_kwargs={
            "source": model.source,
            "layout": model.layout,
            **({} if model.prompt_mode is None or reranker else {"prompt_mode": model.prompt_mode}),
        },
        name=f"{model.name}{RERANKER}" if reranker else model.name,
        revision=None,
        release_date=model.released,
        languages=["eng-Latn"],  # the language of the prompt, and the one that the model cards state
        n_parameters=model.num_parameters,
        n_embedding_parameters=model.num_embedding_parameters,
        memory_usage_mb=size,
        max_tokens=model.max_tokens,
        embed_dim=None if reranker else model.dimensions,
        license=model.license,
        open_weights=True,
        public_training_code=model.training_code,
        public_training_data=model.training_data,
        framework=["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
        reference=f"https://huggingface.co/{model.source}" if on_hub else None,
        similarity_fn_name=None if reranker else ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=None if model.training_datasets is None else set(model.training_datasets),
        adapted_from=model.adapted_from,
        modalities=["text", "image"] if model.takes_images else ["text"],
        model_type=["cross-encoder" if reranker else "dense"],
        citation=CITATION if model.has_article else None,
    )


def meta_of(model: Gen2Embed) -> Gen2EmbedMeta:
    """Make mteb's record of a loaded model, whose revision follows from all that decides its vectors.

    Args:
        model: The model; its weights are read for the revision, about one second per gigabyte.
    """
    known = next((row for row in (*HUB_MODELS, mini()) if row.source == model.source), None)
    row = known or Model(f"{ORGANISATION}/{Path(model.source).resolve().name}", (), model.source, has_article=False)
    row = replace(
        row,
        layout=model.layout,
        takes_images=model.takes_images,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_tokens=model.max_seq_length,
        dimensions=model.get_embedding_dimension(),
    )
    revision = f"{fingerprint(model)[:32]}-{inputs_digest(model.layout, generic=model.chat_format is not None)}"
    return as_meta(row).model_copy(update={"revision": revision})


def load_gen2embed(name: str, revision: str | None = None, **kwargs: Any) -> Any:
    """Load a model for mteb; see `encoder.load`, which is imported when it is needed."""
    from gen2embed_mteb.mteb_plugin.models.encoder import load

    return load(name, revision, **kwargs)


def load_reranker(name: str, revision: str | None = None, **kwargs: Any) -> Any:
    """Load a reranker for mteb; see `reranker.load`, which is imported when it is needed."""
    from gen2embed_mteb.mteb_plugin.models.reranker import load

    return load(name, revision, **kwargs)


def wrap(model: Gen2Embed) -> Any:
    """Make the encoder of a model that was handed to mteb as an object.

    Args:
        model: The model; its results are filed under a revision that follows from its fingerprint.
    """
    from gen2embed_mteb.mteb_plugin.models.encoder import Gen2EmbedEncoder

    encoder = Gen2EmbedEncoder(model)
    encoder.mteb_model_meta = meta_of(model)
    return encoder
