"""LangChain, LlamaIndex and Haystack: the snippets of the docs give the vectors of both sides, and the trap is real.

Each test is skipped where its framework is not installed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doc_blocks import blocks_of

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

PAGE = "docs/guides/frameworks.md"
FRAMEWORKS = {
    "LangChain": "langchain_huggingface",
    "LlamaIndex": "llama_index.embeddings.huggingface",
    "Haystack": "haystack_integrations.components.embedders.sentence_transformers",
}
QUERY, DOCUMENTS = "a red circle", ["a red disc", "a blue square"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the export of which the snippets speak."""
    from gen2embed_mteb import Gen2Embed

    place = tmp_path_factory.mktemp("frameworks")
    Gen2Embed("gen2embed-mini", device="cpu").save_pretrained(str(place / "exported"))
    return place


@pytest.fixture(scope="module")
def wanted(exported: Path) -> tuple[Any, Any]:
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(exported / "exported"), device="cpu")
    return plain.encode_query(QUERY), plain.encode_document(DOCUMENTS)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_snippet_encodes_both_sides(
    exported: Path, wanted: tuple[Any, Any], framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FRAMEWORKS[framework]
    pytest.importorskip(module, exc_type=ImportError)
    monkeypatch.chdir(exported)
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    (code,) = (block.code for block in blocks_of(PAGE) if f"from {module} import" in block.code)
    made: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(code, PAGE, "exec"), made)
    assert np.abs(np.array(made["query"]) - wanted[0]).max() < 1e-5
    assert np.abs(np.array(made["documents"]) - wanted[1]).max() < 1e-5


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_without_the_remedy_queries_become_documents(
    exported: Path, wanted: tuple[Any, Any], framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page warns of; once a framework does it right, this fails, and the page can say so."""
    module = pytest.importorskip(FRAMEWORKS[framework], exc_type=ImportError)
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    name = str(exported / "exported")
    if framework == "LangChain":
        found = module.HuggingFaceEmbeddings(model_name=name).embed_query(QUERY)
    elif framework == "LlamaIndex":
        found = module.HuggingFaceEmbedding(model_name=name).get_query_embedding(QUERY)
    else:
        embedder = module.SentenceTransformersTextEmbedder(model=name)
        embedder.warm_up()
        found = embedder.run(QUERY)["embedding"]
    from sentence_transformers import SentenceTransformer

    as_document = SentenceTransformer(name, device="cpu").encode_document(QUERY)
    assert np.abs(np.array(found) - as_document).max() < 1e-5
    assert np.abs(np.array(found) - wanted[0]).max() > 1e-2
