"""VLM2Vec's scripts with `--model_backbone gen2embed`: what they write is what Gen2Embed says, however they are run.

The scripts are the stand-ins beside this file, and VLM2Vec's own where VLM2VEC_V1 or VLM2VEC_V2 names a checkout.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from environments import Environment
from mmeb_files import M
from PIL import Image
from preloaded import Preloaded
from vlm2vec_files import NUM_ROWS, STANDINS, SUBSETS, flags, run, write_data

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.embedder.model_folder.adapters import new_adapter, save_adapter
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.images.resizing import ensure_min_side
from gen2embed_mteb.mini import model_dir
from gen2embed_mteb.mini.benchmark import MMEB_MINI
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.mmeb.evaluate import evaluate

pytestmark = pytest.mark.slow

MODEL = ["--model_backbone", "gen2embed", "--model_name", "gen2embed-mini"]
MAX_LEN = 256


class Checkout(NamedTuple):
    """A repository to run: VLM2Vec's own or its stand-in."""

    generation: str
    root: Path

    @property
    def script(self) -> str:
        return str(self.root / "eval.py")


def _checkouts() -> list[Any]:
    found = [pytest.param(Checkout(name, STANDINS / f"vlm2vec_standin_{name}"), id=name) for name in ("v1", "v2")]
    for name in ("v1", "v2"):
        variable = f"VLM2VEC_{name.upper()}"
        root = Path(os.environ.get(variable, "")).absolute()
        absent = pytest.mark.skipif(not os.environ.get(variable), reason=f"{variable} names no checkout of VLM2Vec")
        found.append(pytest.param(Checkout(name, root), id=f"{name}-real", marks=absent))
    return found


CHECKOUTS = _checkouts()
REAL = CHECKOUTS[2:]
ONE_IN_THE_GATE = [pytest.param(*CHECKOUTS[0].values, marks=pytest.mark.exhaustive, id="v1"), *CHECKOUTS[1:]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("vlm2vec") / "data")


@pytest.fixture(scope="module")
def rerun(data: Path, preloaded: Preloaded) -> Callable[..., Any]:
    """For runs beside the first ones, which are processes of their own from the start."""
    return partial(preloaded.run, cwd=data, HF_DATASETS_CACHE=str(data / "cache"))


@pytest.fixture(scope="module")
def finished(data: Path) -> Callable[[Checkout], tuple[Path, str]]:
    """`finished(checkout)`: the output folder of a plain run, and what it said on standard error."""
    done: dict[Checkout, tuple[Path, str]] = {}

    def output_of(checkout: Checkout) -> tuple[Path, str]:
        if checkout not in done:
            output = data.parent / f"out-{checkout.generation}-{len(done)}"
            words = [*flags(checkout.generation, output), "--max_len", str(MAX_LEN)]
            result = run(["-m", "vlm2vec_adapter", checkout.script, *MODEL, *words], data, PYTHONHASHSEED="1")
            done[checkout] = output, result.stderr
        return done[checkout]

    return output_of


def table(data: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a dataset, V1 columns."""
    rows: list[dict[str, Any]] = pq.read_table(data / "MMEB-eval" / name / "test-00000-of-00001.parquet").to_pylist()
    return rows


def vectors(output: Path, generation: str, data: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """What a run wrote for a dataset, by the rows of its table: queries (n, d), candidates (n, k, d)."""
    queries, candidates = (pickle.loads((output / f"{name}_{side}").read_bytes()) for side in ("qry", "tgt"))
    rows = table(data, name)
    if generation == "v1":
        of_query, of_candidate = (
            {(pair["text"], pair["img_path"]): vector for vector, pair in zip(*found, strict=True)}
            for found in (queries, candidates)
        )
        found = [of_query[row["qry_text"], row["qry_img_path"]] for row in rows]
        keys = [list(zip(row["tgt_text"], row["tgt_img_path"], strict=True)) for row in rows]
    else:
        infos = [json.loads(line) for line in (output / f"{name}_info.jsonl").read_text().splitlines()]
        by_label = {info["label_name"]: (vector, info) for vector, info in zip(queries, infos, strict=True)}
        v2 = pq.read_table(data / "MMEB-eval-V2" / name / "test-00000-of-00001.parquet").to_pylist()
        keys = [_names(name, row) for row in v2]
        of_candidate = candidates
        found = [by_label[names[0]][0] for names in keys]
        assert all(by_label[names[0]][1]["cand_names"] == names for names in keys)
    return np.stack(found), np.stack([np.stack([of_candidate[key] for key in row]) for row in keys])


def _names(name: str, row: dict[str, Any]) -> list[str]:
    """V2's names of a row's candidates."""
    form = MMEB.select([name]).datasets[0].form
    if form in ("label", "question"):
        return list(row["tgt_text"])
    if form == "text-to-image":
        return list(row["tgt_img_path"])
    pairs = zip(row["tgt_img_path"], row["tgt_text"], strict=True)
    return [f"{path}:{text.strip(chr(34))}" for path, text in pairs]


def score(output: Path, name: str) -> float:
    found = json.loads((output / f"{name}_score.json").read_text())
    return float(found.get("acc", found.get("hit@1")))


def content(data: Path, text: str, path: str) -> dict[str, Any]:
    """An input as the stock path of sentence-transformers takes it, put together without any of the adapter's code."""
    if not path:
        return {"text": text.removeprefix(f"{M}\n")}
    with Image.open(data / "images" / path) as image:
        return {"text": text, "image": ensure_min_side(image.convert("RGB"))}


@pytest.mark.parametrize("checkout", ONE_IN_THE_GATE)
def test_vectors_are_gen2embeds_own(finished: Any, data: Path, checkout: Checkout) -> None:
    model = Gen2Embed("gen2embed-mini", max_length=MAX_LEN, device="cpu")
    output, _ = finished(checkout)
    for name in SUBSETS:
        queries, candidates = vectors(output, checkout.generation, data, name)
        rows = table(data, name)
        expected = model.encode_query([content(data, row["qry_text"], row["qry_img_path"]) for row in rows])
        np.testing.assert_allclose(queries, expected, atol=1e-4, err_msg=f"{name}, queries")
        encode = model.encode_query if name == "RefCOCO-Matching" else model.encode_document
        for row, found in zip(rows, candidates, strict=True):
            pairs = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
            expected = encode([content(data, text, path) for text, path in pairs])
            np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=f"{name}, candidates")


@pytest.mark.parametrize("checkout", ONE_IN_THE_GATE)
def test_vectors_are_unit_rows_and_scores_follow_from_them(finished: Any, data: Path, checkout: Checkout) -> None:
    output, _ = finished(checkout)
    for name in SUBSETS:
        queries, candidates = vectors(output, checkout.generation, data, name)
        np.testing.assert_allclose(np.linalg.norm(queries, axis=-1), 1, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(candidates, axis=-1), 1, atol=1e-5)
        similarities = np.einsum("nd,nkd->nk", queries, candidates)
        assert score(output, name) == pytest.approx((similarities.argmax(axis=1) == 0).mean()), name


@pytest.mark.parametrize("checkout", ONE_IN_THE_GATE)
def test_scores_equal_those_of_gen2embed_evaluate(
    finished: Any, data: Path, tmp_path: Path, checkout: Checkout
) -> None:
    tables = {"v1": "MMEB-eval", "v2": "MMEB-eval-V2"}[checkout.generation]
    config = EvaluationConfig(
        data_dir=str(data / tables),
        image_dir=str(data / "images"),
        output_dir=str(tmp_path),
        subsets=SUBSETS,
        fingerprint="one model",
    )
    model = Gen2Embed("gen2embed-mini", max_length=MAX_LEN, device="cpu")
    result = evaluate(PrefixEncoder(model), MMEB, config)
    output, _ = finished(checkout)
    assert {item.dataset.name: item.precision_at_1 for item in result.scores} == pytest.approx(
        {name: score(output, name) for name in SUBSETS}, abs=1e-3
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("checkout", ONE_IN_THE_GATE)
def test_neither_seed_nor_workers_nor_processes_matter(
    finished: Any, data: Path, tmp_path: Path, checkout: Checkout
) -> None:
    output, _ = finished(checkout)  # one process, no workers, PYTHONHASHSEED=1
    words = [checkout.script, *MODEL, *flags(checkout.generation, tmp_path), "--max_len", str(MAX_LEN)]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "vlm2vec_adapter"]
    run([*torchrun, *words, "--dataloader_num_workers", "1"], data, PYTHONHASHSEED="random")  # per process
    for name in SUBSETS:
        assert score(tmp_path, name) == score(output, name), name
        expected = vectors(output, checkout.generation, data, name)
        for found, wanted in zip(vectors(tmp_path, checkout.generation, data, name), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("checkout", ONE_IN_THE_GATE)
def test_the_log_names_what_is_stubbed_and_what_runs(finished: Any, checkout: Checkout) -> None:
    _, log = finished(checkout)
    assert "gen2embed: VLM2Vec's own modelling code, not run here, stubbed: src." in log
    assert "prompt 'hierarchical', layout 'native'" in log
    if checkout.generation == "v2":
        assert "not installed, not needed here, stubbed: cv2, decord" in log


@pytest.mark.exhaustive
def test_a_folder_of_another_configuration_is_refused(finished: Any, data: Path, rerun: Callable[..., Any]) -> None:
    checkout = CHECKOUTS[0].values[0]
    output, _ = finished(checkout)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    words = ["-m", "vlm2vec_adapter", checkout.script, *MODEL, *flags("v1", output), "--max_len", str(MAX_LEN)]
    result = rerun(words, GEN2EMBED_PROMPT_MODE="none")
    assert result.returncode == 2
    assert f"{output} was made with prompt_mode 'hierarchical', not 'none'" in result.stderr
    assert "name another --encode_output_path" in result.stderr
    assert before == {path.name: path.stat().st_mtime_ns for path in output.iterdir()}


@pytest.mark.exhaustive
@pytest.mark.parametrize("checkout", ONE_IN_THE_GATE)
def test_a_killed_run_goes_on_where_it_stopped(
    finished: Any, data: Path, rerun: Callable[..., Any], tmp_path: Path, checkout: Checkout
) -> None:
    output, _ = finished(checkout)
    shutil.copytree(output, tmp_path / "out")
    half = tmp_path / "out" / "NIGHTS_tgt"
    whole = half.read_bytes()
    half.write_bytes(whole[: whole.rindex(b".", 0, -1) + 1])  # a full stop is how a whole one ends, too
    (tmp_path / "out" / "NIGHTS_score.json").write_text('{"hit@1": 0.123, "acc": 0.123}')
    kept = (tmp_path / "out" / "VOC2007_qry").stat().st_mtime_ns
    words = ["-m", "vlm2vec_adapter", checkout.script, "--model_backbone=gen2embed", *MODEL[2:]]
    words += [*flags(checkout.generation, tmp_path / "out"), "--max_len", str(MAX_LEN)]
    result = rerun(words, check=True)
    assert "NIGHTS_tgt is half written" in result.stderr
    assert (tmp_path / "out" / "VOC2007_qry").stat().st_mtime_ns == kept
    assert half.read_bytes() == whole
    assert score(tmp_path / "out", "NIGHTS") == score(output, "NIGHTS")


TRAP = "cos\nmkdir\n(Vsprung\ntR."
"""A pickle that makes a folder where it is loaded."""


@pytest.mark.parametrize("checkout", ONE_IN_THE_GATE)
def test_a_pickle_of_others_is_never_loaded(
    finished: Any, data: Path, rerun: Callable[..., Any], tmp_path: Path, checkout: Checkout
) -> None:
    output, _ = finished(checkout)
    words = ["-m", "vlm2vec_adapter", checkout.script, *MODEL]

    def run_in(folder: Path) -> Any:
        return rerun([*words, *flags(checkout.generation, folder), "--max_len", str(MAX_LEN)])

    # In the place of vectors that were encoded: set aside, and encoded again.
    changed = tmp_path / "changed"
    shutil.copytree(output, changed)
    (changed / "NIGHTS_tgt").write_text(TRAP)
    (changed / "NIGHTS_score.json").unlink()
    assert run_in(changed).returncode == 0
    assert [path.read_text() for path in changed.glob("NIGHTS_tgt.set-aside-*")] == [TRAP]
    assert score(changed, "NIGHTS") == score(output, "NIGHTS")
    # With a copied record, or with none: refused.
    for record in (True, False):
        foreign = tmp_path / f"foreign-{record}"
        foreign.mkdir()
        if record:
            shutil.copy(output / "gen2embed.json", foreign)
        for ending in ("qry", "tgt"):
            (foreign / f"NIGHTS_{ending}").write_text(TRAP)
        refused = run_in(foreign)
        assert refused.returncode == 2
        assert len(refused.stderr.strip().splitlines()[-1:]) == 1
        assert "vlm2vec_adapter: error:" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert (foreign / "NIGHTS_qry").read_text() == TRAP
    assert not (data / "sprung").exists()
    run(["-c", f"import pickle; pickle.loads({TRAP.encode()!r})"], data)
    (data / "sprung").rmdir()  # the trap was one


@pytest.mark.parametrize("checkout", ONE_IN_THE_GATE)
@pytest.mark.exhaustive
def test_killed_while_vectors_are_written_the_next_run_ends_alike(
    finished: Any, data: Path, rerun: Callable[..., Any], tmp_path: Path, checkout: Checkout
) -> None:
    output, _ = finished(checkout)
    folder = tmp_path / "out"
    words = [checkout.script, *MODEL, *flags(checkout.generation, folder), "--max_len", str(MAX_LEN)]
    dying = f"""
import os
from vlm2vec_adapter.results import vector_files
class Dying(vector_files._Digesting):
    def write(self, data):
        if self._file.name.endswith("NIGHTS_tgt"):
            self._file.write(data[:len(data) // 2])
            self._file.flush()
            os._exit(9)
        return super().write(data)
vector_files._Digesting = Dying
from vlm2vec_adapter.__main__ import main
main({words!r})
"""
    assert rerun(["-c", dying]).returncode == 9
    assert (folder / "NIGHTS_tgt").exists()
    result = rerun(["-m", "vlm2vec_adapter", *words], check=True)
    assert "NIGHTS_tgt is half written" in result.stderr
    for name in SUBSETS:
        for ending in ("qry", "tgt"):
            assert (folder / f"{name}_{ending}").read_bytes() == (output / f"{name}_{ending}").read_bytes()
        assert score(folder, name) == score(output, name)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DoRA adapter of gen2embed-mini that changes its vectors."""
    import torch

    folder = tmp_path_factory.mktemp("adapter")
    model = Gen2Embed("gen2embed-mini", device="cpu")
    torch.manual_seed(0)
    new_adapter(model[0].model, ("q_proj", "v_proj"), rank=2)
    with torch.no_grad():
        for name, weight in model[0].model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    save_adapter(model[0].model, folder)
    return folder


@pytest.mark.exhaustive
def test_enabled_a_plain_script_runs_and_loads_an_adapter(
    data: Path, adapter: Path, wheel: Path, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "env")
    environment.install(str(wheel))
    python, site = str(environment.python), environment.site

    checkout = CHECKOUTS[0].values[0]
    subset = ("OK-VQA",)
    words = [checkout.script, *MODEL, *flags("v1", tmp_path / "out", subset), "--gen2embed_prompt_mode", "system"]
    words += ["--lora", "True", "--checkpoint_path", str(adapter)]
    before = sorted(path.name for path in site.iterdir())
    assert "Written" in run(["-m", "vlm2vec_adapter", "enable"], data, python=python).stdout
    run(words, data, python=python)
    assert "Deleted" in run(["-m", "vlm2vec_adapter", "disable"], data, python=python).stdout
    assert sorted(path.name for path in site.iterdir()) == before
    plain = run(words, data, python=python, check=False)
    assert plain.returncode != 0
    assert "vlm2vec_adapter" not in plain.stderr

    rows = table(data, "OK-VQA")
    model = Gen2Embed(model_dir(), adapter=adapter, prompt_mode="system", device="cpu")
    expected = model.encode_query([content(data, row["qry_text"], row["qry_img_path"]) for row in rows])
    queries, _ = vectors(tmp_path / "out", "v1", data, "OK-VQA")
    np.testing.assert_allclose(queries, expected, atol=1e-4)
    without = Gen2Embed(model_dir(), prompt_mode="system", device="cpu")
    assert np.abs(without.encode_query([rows[1]["qry_text"]]) - model.encode_query([rows[1]["qry_text"]])).max() > 1e-2


@pytest.mark.exhaustive
def test_the_report_holds_both_generations(finished: Any, data: Path) -> None:
    folders = {name: finished(checkout.values[0])[0] for name, checkout in zip(("v1", "v2"), CHECKOUTS, strict=False)}
    words = ["-m", "vlm2vec_adapter", "report", *map(str, folders.values()), "--metadata", "url=https://example.org"]
    shown = run(words, data).stdout
    overall = {name: 100 * np.mean([score(folder, subset) for subset in SUBSETS]) for name, folder in folders.items()}
    for name, figure in overall.items():
        line = next(line for line in shown.splitlines() if line.startswith(f"{name}: gen2embed-mini"))
        assert line.split()[-1] == f"{figure:.1f}"
    assert "paper, IV: + Q-Rein." in shown
    assert f"{len(SUBSETS)} of MMEB's 36 datasets" in shown
    for name, folder in folders.items():
        entry = json.loads((folder / "leaderboard.json").read_text())
        assert entry["metadata"]["model_name"] == "gen2embed-mini"
        assert entry["metadata"]["url"] == "https://example.org"
        assert entry["metadata"]["embedding_dimension"] == 192
        found = {key: value["hit@1"] for key, value in entry["metrics"]["image"].items()}
        assert found == {subset: score(folder, subset) for subset in SUBSETS}, name
        assert all(value["num_pred"] == NUM_ROWS for value in entry["metrics"]["image"].values())
    assert "| paper, IV: + Q-Rein. |" in (folders["v1"] / "report.md").read_text()


@pytest.mark.parametrize("checkout", REAL)
def test_mmeb_mini_on_the_real_repository(tmp_path: Path, checkout: Checkout) -> None:
    root = tmp_path / "mini"
    run(["-m", "vlm2vec_adapter", "mini", str(root)], tmp_path)
    words = flags(checkout.generation, tmp_path / "out", MMEB_MINI.names)
    run(["-m", "vlm2vec_adapter", checkout.script, *MODEL, *words, "--per_device_eval_batch_size", "64"], root)
    config = EvaluationConfig(
        data_dir=str(root / "MMEB-eval"),
        image_dir=str(root / "images"),
        output_dir=str(tmp_path / "ours"),
        fingerprint="-",
    )
    result = evaluate(PrefixEncoder(Gen2Embed("gen2embed-mini", device="cpu")), MMEB_MINI, config)
    assert {item.dataset.name: item.precision_at_1 for item in result.scores} == pytest.approx(
        {name: score(tmp_path / "out", name) for name in MMEB_MINI.names}, abs=1e-3
    )
