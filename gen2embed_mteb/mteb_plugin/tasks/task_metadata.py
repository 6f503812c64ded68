"""The metadata of every task: mteb's `TaskMetadata`, filled from the table of datasets and the facts below.

MMEB converts existing datasets to its own form. Domains and the year are those of the original datasets. There is no
single licence: MMEB collects data under many terms, and does not state them per dataset.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mteb.abstasks.task_metadata import TaskMetadata

from gen2embed_mteb.mini.benchmark import VERSION
from gen2embed_mteb.mmeb.datasets import DatasetInfo, Form
from gen2embed_mteb.mteb_plugin.names import task_name
from gen2embed_mteb.sugarcrepe.scoring import SUGARCREPE_PLUS_BENCHMARK

HUB_ID = "TIGER-Lab/MMEB-eval"
HUB_REVISION = "2f069730be515ea60778413777816b53e2d2a697"
"""The revision of the hub's dataset that is read, its `images.zip` included."""

SUGARCREPE_PLUS_HUB_ID = "Aman-J/SugarCrepe_pp"
SUGARCREPE_PLUS_HUB_REVISION = "dea2a1b6f9e1069c609f676aa55ec61e9b65fb61"

_FORM_REFERENCE = "https://arxiv.org/abs/2410.05160"
"""MMEB's paper, which describes the form of MMEB-mini."""

MAIN_SCORE = "mmeb_precision_at_1"
STRICT_SCORE = "mmeb_precision_at_1_strict"

MMEB_CITATION = """@inproceedings{jiang2025vlm2vec,
  author = {Jiang, Ziyan and Meng, Rui and Yang, Xinyi and Yavuz, Semih and Zhou, Yingbo and Chen, Wenhu},
  booktitle = {The Thirteenth International Conference on Learning Representations},
  title = {{VLM2Vec}: Training Vision-Language Models for Massive Multimodal Embedding Tasks},
  year = {2025},
}"""

SUGARCREPE_PLUS_CITATION = """@inproceedings{dumpala2024sugarcrepe,
  author = {Dumpala, Sri Harsha and Jaiswal, Aman and Sastry, Chandramouli and Milios, Evangelos and Oore, Sageev and
Sajjad, Hassan},
  booktitle = {Advances in Neural Information Processing Systems},
  title = {{SUGARCREPE++} Dataset: Vision-Language Model Sensitivity to Semantic and Lexical Alterations},
  year = {2024},
}"""

CATEGORIES: dict[Form, str] = {
    "label": "it2t",
    "question": "it2t",
    "text-to-image": "t2it",
    "dialogue-to-image": "t2it",
    "image-to-image": "it2it",
}
"""The modalities of a form's queries and candidates in mteb's letters, such as `it2t`: image and text to text."""


class _Facts(NamedTuple):
    """Facts about a dataset's source: year of publication, domains and subtypes in mteb's words, and the question."""

    year: int
    domains: tuple[str, ...]
    subtypes: tuple[str, ...]
    asks: str


_OBJECTS, _SCENES, _QA, _PAIRS = (
    ("Object recognition",),
    ("Scene recognition",),
    ("Question answering",),
    ("Image Text Retrieval",),
)

_MMEB: dict[str, _Facts] = {
    "ImageNet-1K": _Facts(2012, ("Web", "Scene"), _OBJECTS, "the class of a photo, of 1,000"),
    "N24News": _Facts(2021, ("News",), ("Topic classification",), "the section of a news photo with its caption"),
    "HatefulMemes": _Facts(2020, ("Social",), ("Sentiment/Hate speech",), "whether a meme is hateful"),
    "VOC2007": _Facts(2007, ("Web", "Scene"), _OBJECTS, "the object in a photo, of 20"),
    "SUN397": _Facts(2010, ("Scene",), _SCENES, "the kind of scene, of 397"),
    "Place365": _Facts(2017, ("Scene",), _SCENES, "the kind of place, of 365"),
    "ImageNet-A": _Facts(2019, ("Web",), _OBJECTS, "the class of photos that mislead classifiers"),
    "ImageNet-R": _Facts(2020, ("Web",), _OBJECTS, "the class of drawings, paintings and toys"),
    "ObjectNet": _Facts(2019, ("Scene",), _OBJECTS, "the object, from unusual angles and places"),
    "Country211": _Facts(2021, ("Scene",), _SCENES, "the country in which a photo was taken"),
    "OK-VQA": _Facts(2019, ("Web", "Encyclopaedic"), _QA, "the answer, which takes knowledge from outside the photo"),
    "A-OKVQA": _Facts(2022, ("Web", "Encyclopaedic"), _QA, "the answer, which takes knowledge and reasoning"),
    "DocVQA": _Facts(2020, ("Non-fiction",), ("Rendered Texts Understanding",), "the answer in a scanned document"),
    "InfographicsVQA": _Facts(2021, ("Web",), ("Rendered Texts Understanding",), "the answer in an infographic"),
    "ChartQA": _Facts(2022, ("Web",), ("Rendered Texts Understanding",), "the answer in a chart"),
    "Visual7W": _Facts(2016, ("Web", "Scene"), _QA, "the answer to a question on a photo"),
    "ScienceQA": _Facts(2022, ("Academic",), _QA, "the answer to a school question with a figure"),
    "VizWiz": _Facts(2018, ("Web", "Scene"), _QA, "the answer to a blind person's question on their photo"),
    "GQA": _Facts(2019, ("Web", "Scene"), _QA, "the answer to a compositional question on a photo"),
    "TextVQA": _Facts(2019, ("Web", "Scene"), _QA, "the answer, read in the photo"),
    "VisDial": _Facts(2017, ("Web", "Spoken"), ("Conversational retrieval",), "the photo that a dialogue is about"),
    "CIRR": _Facts(2021, ("Web", "Scene"), _PAIRS, "the photo that differs from a given one as told"),
    "VisualNews_t2i": _Facts(2021, ("News",), _PAIRS, "the photo of a news caption"),
    "VisualNews_i2t": _Facts(2021, ("News",), _PAIRS, "the caption of a news photo"),
    "MSCOCO_t2i": _Facts(2014, ("Web", "Scene"), _PAIRS, "the photo of a caption"),
    "MSCOCO_i2t": _Facts(2014, ("Web", "Scene"), _PAIRS, "the caption of a photo"),
    "NIGHTS": _Facts(2023, ("Constructed",), ("Duplicate Image Retrieval",), "the picture that people find most alike"),
    "WebQA": _Facts(2021, ("Encyclopaedic", "Web"), _QA, "the photo with caption that answers a question"),
    "OVEN": _Facts(2023, ("Encyclopaedic",), _QA, "the article with picture that answers a question on a photo"),
    "FashionIQ": _Facts(2019, ("E-commerce",), _PAIRS, "the garment that differs from a given one as told"),
    "EDIS": _Facts(2023, ("News",), _PAIRS, "the photo with headline of a news caption"),
    "Wiki-SS-NQ": _Facts(2024, ("Encyclopaedic",), _QA, "the screenshot of an article that answers a question"),
    "MSCOCO": _Facts(2014, ("Web", "Scene"), _OBJECTS, "the part of a photo that shows a named object"),
    "Visual7W-Pointing": _Facts(2016, ("Web", "Scene"), _QA, "the part of a photo that answers a question"),
    "RefCOCO": _Facts(2014, ("Web", "Scene"), _OBJECTS, "the part of a photo that an expression refers to"),
    "RefCOCO-Matching": _Facts(2014, ("Web", "Scene"), _OBJECTS, "the same thing, referred to in a cropped photo"),
}


def mmeb_metadata(dataset: DatasetInfo) -> TaskMetadata:
    """Return the metadata of a dataset of MMEB.

    Args:
        dataset: One of `MMEB.datasets`.
    """
    facts = _MMEB[dataset.name]
    domain = "in-domain: MMEB-train has its training split" if dataset.in_domain else "out of MMEB-train's domain"
    return _metadata(
        "MMEB",
        dataset,
        dataset_source={"path": HUB_ID, "revision": HUB_REVISION, "name": dataset.name},
        description=f"{dataset.name} in MMEB's form ({dataset.meta_task}, {domain}). Asked for: {facts.asks}, among "
        "the candidates of each query. Instructions are part of the texts.",
        reference="https://huggingface.co/datasets/TIGER-Lab/MMEB-eval",
        date=(f"{facts.year}-01-01", f"{facts.year}-12-31"),
        domains=list(facts.domains),
        task_subtypes=list(facts.subtypes),
        license="not specified",
        annotations_creators="derived",
        sample_creation="found",
        bibtex_citation=MMEB_CITATION,
    )


def mini_metadata(dataset: DatasetInfo) -> TaskMetadata:
    """Return the metadata of a dataset of MMEB-mini.

    Args:
        dataset: One of `MMEB_MINI.datasets`.
    """
    return _metadata(
        "MMEB-mini",
        dataset,
        dataset_source={"path": "gen2embed/MMEB-mini", "revision": VERSION, "name": dataset.name},
        description=f"{dataset.name} of MMEB-mini ({dataset.meta_task}): pictures of coloured shapes, or scanned "
        "digits, in MMEB's form; drawn on this machine, the same everywhere, without a download.",
        reference=_FORM_REFERENCE,
        date=("2026-01-01", "2026-12-31"),
        domains=["Constructed"],
        task_subtypes=["Object recognition"],
        license="apache-2.0",
        annotations_creators="algorithmic",
        sample_creation="rendered",
        bibtex_citation="",
    )


def sugarcrepe_plus_metadata(name: str, mini: bool) -> TaskMetadata:
    """Return the metadata of SugarCrepe++, or of SugarCrepe++-mini.

    Args:
        name: The task's name.
        mini: Whether it is SugarCrepe++-mini.
    """
    source = {"path": "gen2embed/SugarCrepePlusPlus-mini", "revision": VERSION}
    hub = {"path": SUGARCREPE_PLUS_HUB_ID, "revision": SUGARCREPE_PLUS_HUB_REVISION}
    rule = (
        "Two captions of an image that mean the same, and a negative that differs little from them. ITT (main score): "
        "both captions are closer to the image than the negative is. TOT: the captions are closer to each other than "
        "either is to the negative. A tie is wrong."
    )
    return TaskMetadata(
        name=name,
        dataset=source if mini else hub,
        description=f"{rule} Drawn on this machine: pictures of coloured shapes."
        if mini
        else f"{rule} Images of COCO.",
        type="Compositionality",
        category="i2t",
        modalities=["image", "text"],
        reference="https://arxiv.org/abs/2406.11171",
        eval_splits=["test"],
        eval_langs={name: ["eng-Latn"] for name in SUGARCREPE_PLUS_BENCHMARK.sets},
        main_score="accuracy_itt",
        date=("2026-01-01", "2026-12-31") if mini else ("2024-01-01", "2024-12-31"),
        domains=["Constructed"] if mini else ["Web", "Scene"],
        task_subtypes=["Caption Pairing"],
        license="apache-2.0" if mini else "not specified",
        annotations_creators="algorithmic" if mini else "LM-generated and reviewed",
        dialect=[],
        sample_creation="rendered" if mini else "LM-generated and verified",
        bibtex_citation="" if mini else SUGARCREPE_PLUS_CITATION,
    )


def _metadata(benchmark: str, dataset: DatasetInfo, *, dataset_source: dict[str, str], **fields: Any) -> TaskMetadata:
    return TaskMetadata(
        name=task_name(benchmark, dataset),
        dataset=dataset_source,
        type="Any2AnyRetrieval",
        category=CATEGORIES[dataset.form],
        modalities=["text", "image"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=MAIN_SCORE,
        dialect=[],
        **fields,
    )
