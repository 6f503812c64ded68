"""The models that are registered in mteb: a table of facts about each.

Figures describe the model as it is loaded, without the output layer, which embeddings do not need. Parameters were
counted on models built from the published configurations; commits are those of the weights on the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gen2embed_mteb.embedder.short_names import resolve
from gen2embed_mteb.mini import model_dir
from gen2embed_mteb.mmeb.datasets import MMEB
from gen2embed_mteb.mteb_plugin.models.model_files import facts_of
from gen2embed_mteb.mteb_plugin.names import task_name
from gen2embed_mteb.names import DEFAULT, MINI

ORGANISATION = "Gen2Embed"
MMEB_TRAIN = "https://huggingface.co/datasets/TIGER-Lab/MMEB-train"

# mteb's own tasks on data that is part of MMEB-train, besides our tasks on its 20 in-domain datasets.
_OVERLAPS = {
    "CIRRIT2IRetrieval",
    "HatefulMemesI2TRetrieval",
    "HatefulMemesT2IRetrieval",
    "Imagenet1k",
    "Imagenet1kZeroShot",
    "JinaVDRChartQARetrieval",
    "JinaVDRDocVQARetrieval",
    "JinaVDRInfovqaRetrieval",
    "MSCOCOI2TRetrieval",
    "MSCOCOT2IRetrieval",
    "NIGHTSI2IRetrieval",
    "OKVQAIT2TRetrieval",
    "SUN397",
    "SUN397ZeroShot",
    "VOC2007",
    "VidoreDocVQARetrieval",
    "VidoreInfoVQARetrieval",
    "VisRAGRetChartQA",
    "VisRAGRetInfoVQA",
    "VisualNewsI2TRetrieval",
    "VisualNewsT2IRetrieval",
    "WebQAT2ITRetrieval",
    "WebQAT2TRetrieval",
}


@dataclass(frozen=True)
class Model:
    """The facts about a model; None if a fact is unknown.

    Attributes:
        name: Its name in mteb, `organisation/name`.
        aliases: Other names under which mteb finds it.
        source: The hub id or directory of its weights.
        released: The day since which both its weights and the method are available.
        num_parameters: The number of all parameters, as loaded.
        num_embedding_parameters: The number of parameters of the token embedding.
        parameter_bytes: The number of bytes per parameter, in the type of the published file.
        max_tokens: The length of the longest input in tokens.
        dimensions: The number of dimensions of an embedding.
        license: The licence, by mteb's name or by its address.
        adapted_from: The model from which it was made.
        layout: How images are laid out in the prompt.
        prompt_mode: The name of the prompt that it was trained with; None stands for the default.
        takes_images: Whether inputs may have images.
        training_datasets: The tasks of mteb on whose data it was trained; None if its makers do not say.
        training_code: The address of the code that trained it.
        training_data: The address of the data on which it was trained.
        has_article: Whether the paper describes it.
    """

    name: str
    aliases: tuple[str, ...]
    source: str
    released: str | None = None
    num_parameters: int | None = None
    num_embedding_parameters: int | None = None
    parameter_bytes: int = 2
    max_tokens: int | None = None
    dimensions: int | None = None
    license: str | None = None
    adapted_from: str | None = None
    layout: str = "native"
    prompt_mode: str | None = None
    takes_images: bool = True
    training_datasets: frozenset[str] | None = None
    training_code: str | None = None
    training_data: str | None = None
    has_article: bool = True


COMMITS = {
    "Qwen/Qwen2-VL-2B-Instruct": "895c3a49bc3fa70a340399125c650a463535e71c",
    "Qwen/Qwen2-VL-7B-Instruct": "eed13092ef92e448dd6875b2a00151bd3f7db0ac",
    "Qwen/Qwen2.5-VL-3B-Instruct": "66285546d2b821cf421d4f5eb2576359d3770cd3",
    "Qwen/Qwen2.5-VL-7B-Instruct": "cc594898137f460bfe9f0759e9844b3ce807cfb5",
    "Qwen/Qwen3-VL-2B-Instruct": "89644892e4d85e24eaac8bacfd4f463576704203",
    "Qwen/Qwen3-VL-4B-Instruct": "ebb281ec70b05090aa6165b016eac8ec08e71b17",
    "Qwen/Qwen3-VL-8B-Instruct": "0c351dd01ed87e9c1b53cbc748cba10e6187ff3b",
    "llava-hf/llava-v1.6-mistral-7b-hf": "52320fb52229c8d942b1dcb8b63b3dc8087bc83b",
}
"""The commits that are loaded. The released SaHa checkpoints are not listed: the hub tells their newest commit."""

OWN_TEMPLATE = frozenset(f"Qwen/Qwen3-VL-{size}-Instruct" for size in ("2B", "4B", "8B"))
"""Those of `COMMITS` whose own chat template carries the prompt; the others have one written by hand."""


_PAPER = "2025-08-01"
"""The day of the paper; models with older weights count as released on this day."""


def _zero_shot(
    source: str,
    alias: str,
    parameters: tuple[int, int],
    *,
    max_tokens: int,
    dimensions: int,
    released: str = _PAPER,
    license: str = "apache-2.0",
) -> Model:
    return Model(
        name=f"{ORGANISATION}/{source.partition('/')[2]}",
        aliases=(alias,),
        source=source,
        released=released,
        num_parameters=parameters[0],
        num_embedding_parameters=parameters[1],
        max_tokens=max_tokens,
        dimensions=dimensions,
        license=license,
        adapted_from=source,
    )


def _released(size: str, parameters: tuple[int, int], dimensions: int) -> Model:
    source = f"Y-J-Ju/SaHa-Qwen2-VL-{size}-Instruct"
    in_domain = {task_name("MMEB", dataset) for dataset in MMEB.datasets if dataset.in_domain}
    return Model(
        name=source,
        aliases=(f"gen2embed-saha-qwen2-vl-{size.lower()}",),
        source=source,
        released="2025-08-01",
        num_parameters=parameters[0],
        num_embedding_parameters=parameters[1],
        max_tokens=32768,
        dimensions=dimensions,
        adapted_from=f"Qwen/Qwen2-VL-{size}-Instruct",
        layout="official",
        training_datasets=frozenset(in_domain | _OVERLAPS),
        training_code="https://github.com/yeongjoonJu/Gen2Embed",
        training_data=MMEB_TRAIN,
    )


def _unime(
    name: str,
    alias: str,
    base: str,
    *,
    parameters: tuple[int, int],
    dimensions: int,
    max_tokens: int,
    released: str,
) -> Model:
    """Return a checkpoint of UniME (arXiv 2504.17432), which was trained on MMEB-train, too."""
    in_domain = {task_name("MMEB", dataset) for dataset in MMEB.datasets if dataset.in_domain}
    return Model(
        name=f"DeepGlint-AI/{name}",
        aliases=(alias,),
        source=f"DeepGlint-AI/{name}",
        released=released,
        num_parameters=parameters[0],
        num_embedding_parameters=parameters[1],
        max_tokens=max_tokens,
        dimensions=dimensions,
        adapted_from=base,
        prompt_mode="unime",
        training_datasets=frozenset(in_domain | _OVERLAPS),
        training_code="https://github.com/deepglint/UniME",
        training_data=MMEB_TRAIN,
        has_article=False,
    )


HUB_MODELS = (
    _zero_shot(
        "Qwen/Qwen2-VL-2B-Instruct", "gen2embed-qwen2-vl-2b", (2208985600, 233373696), max_tokens=32768, dimensions=1536
    ),
    _zero_shot(
        "Qwen/Qwen2-VL-7B-Instruct", "gen2embed-qwen2-vl-7b", (7746378240, 544997376), max_tokens=32768, dimensions=3584
    ),
    _zero_shot(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "gen2embed-qwen2.5-vl-3b",
        (3754622976, 311164928),
        max_tokens=128000,
        dimensions=2048,
        license="https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE",
    ),
    _zero_shot(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "gen2embed-qwen2.5-vl-7b",
        (7747169280, 544997376),
        max_tokens=128000,
        dimensions=3584,
    ),
    _zero_shot(
        "Qwen/Qwen3-VL-2B-Instruct",
        "gen2embed-qwen3-vl-2b",
        (2127532032, 311164928),
        max_tokens=262144,
        dimensions=2048,
        released="2025-10-21",
    ),
    _zero_shot(
        "Qwen/Qwen3-VL-4B-Instruct",
        "gen2embed-qwen3-vl-4b",
        (4437815808, 388956160),
        max_tokens=262144,
        dimensions=2560,
        released="2025-10-15",
    ),
    _zero_shot(
        "Qwen/Qwen3-VL-8B-Instruct",
        "gen2embed-qwen3-vl-8b",
        (8144793840, 622329856),
        max_tokens=262144,
        dimensions=4096,
        released="2025-10-15",
    ),
    _zero_shot(
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "gen2embed-llava-next-7b",
        (7435413504, 131334144),
        max_tokens=32768,
        dimensions=4096,
    ),
    _released("2B", (2208985600, 233373696), 1536),
    _released("7B", (7746378240, 544997376), 3584),
    _unime(
        "UniME-Phi3.5-V-4.2B",
        "unime-phi3.5-v",
        "microsoft/Phi-3.5-vision-instruct",
        parameters=(4048120832, 98500608),
        dimensions=3072,
        max_tokens=131072,
        released="2025-04-24",
    ),
    _unime(
        "UniME-LLaVA-1.6-7B",
        "unime-llava-1.6",
        "llava-hf/llava-v1.6-mistral-7b-hf",
        parameters=(7435413504, 131334144),
        dimensions=4096,
        max_tokens=32768,
        released="2025-04-24",
    ),
    _unime(
        "UniME-LLaVA-OneVision-7B",
        "unime-llava-onevision",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        parameters=(7485122080, 544768000),
        dimensions=3584,
        max_tokens=32768,
        released="2025-05-31",  # in that month
    ),
)
"""All models on the hub: base models used zero-shot with the prompt, and the checkpoints of the paper and of UniME."""


def mini() -> Model:
    """Return the embedded model; it was trained on no data of mteb, and not on MMEB-mini's training pairs."""
    source = model_dir()
    facts = facts_of(source)
    return Model(
        name=f"{ORGANISATION}/{MINI}",
        aliases=(MINI,),
        source=str(source),
        released="2026-11-21",
        license="apache-2.0",
        training_datasets=frozenset(),
        has_article=False,
        **facts,
    )


def chosen() -> Model:
    """Return the model of the name `gen2embed`: Qwen2-VL-2B-Instruct, or the model that GEN2EMBED_MODEL names.

    Raises:
        FileNotFoundError: GEN2EMBED_MODEL is a path, and there is no directory there.
        ValueError: The directory there is not a model's.
    """
    source = resolve(DEFAULT) or DEFAULT  # a folder of that name takes precedence, as everywhere
    known = next((model for model in (*HUB_MODELS, mini()) if model.source == source), None)
    if known is not None:
        return known
    directory = Path(source)
    facts = facts_of(directory) if directory.is_dir() else {}
    name = directory.resolve().name if directory.is_dir() else source.rpartition("/")[2]
    return Model(f"{ORGANISATION}/{name}", (), source, has_article=False, **facts)
