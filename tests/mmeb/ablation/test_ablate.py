"""The ablation's table: every row is what a run of `evaluate` with its settings gives, and nothing is encoded twice."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmeb_files import M, colour_rows, eval_row, write_images, write_table

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.bulk.store import StoreMismatchError
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.config import AblationOptions, EvaluationConfig
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.embedder.prompts.strategies import REPRESENT_IMAGE, REPRESENT_TEXT, SYSTEM
from gen2embed_mteb.embedder.readouts.choice import Readout
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import image_source, open_bulk_encoder
from gen2embed_mteb.mini import benchmark as mini
from gen2embed_mteb.mini.benchmark import MMEB_MINI
from gen2embed_mteb.mini.places import evaluation_places
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.mmeb.ablation.ablate import AblationResult, FitInputs, ablate
from gen2embed_mteb.mmeb.ablation.ablation_report import ablation_json, check_ablation_reports, table, write_ablation
from gen2embed_mteb.mmeb.ablation.prompt_vectors import ItemGroup, PromptVectors, Words
from gen2embed_mteb.mmeb.evaluate import evaluate

SCORES = {"cosine": {}, "csls": {"scoring": "csls"}}


def config_of(data: Path, output: Path, **more: Any) -> EvaluationConfig:
    return EvaluationConfig(
        data_dir=str(data), image_dir=str(data), output_dir=str(output), model_name="tiny", fingerprint="f", **more
    )


def figures(result: AblationResult) -> dict[tuple[str, str, str, str], list[tuple[int, int, int, int]]]:
    return {
        (one.prompt, one.readout.name, one.calibration, one.scoring): [
            (score.num_correct, sum(row.strict for row in score.rows), len(score.rows), score.num_errors)
            for score in one.scores
        ]
        for one in result.combinations
    }


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five rows of one dataset whose queries are images, one of them missing; a row without candidates; texts."""
    root = tmp_path_factory.mktemp("colours")
    rows = colour_rows(["red", "green", "blue", "white", "black"])
    rows.append(eval_row(f"{M}\nName the colour\n", "img/none.png", [("red", ""), ("blue", "")]))
    rows.append(eval_row("Name a colour\n", "", []))
    write_table(root / "VOC2007" / "test-0.parquet", rows)
    pairs = [(f"a {name} wall", f"img/{name}.png") for name in ("red", "green", "blue")]
    rows = [eval_row(f"{M}\nFind: {text}\n", image, [(text, image), ("another", "")]) for text, image in pairs]
    write_table(root / "OVEN" / "test-0.parquet", rows)
    write_images(root / "img")
    return root


def test_what_prompts_say_around_an_item_is_said_once(tiny: Any, colours: Path, tmp_path: Path) -> None:
    model, config = tiny("qwen2_vl"), config_of(colours, tmp_path)
    names = ("none", "system", "hierarchical")
    vectors = PromptVectors(model, (Readout(),), names, config, image_source(config), "evaluated")
    assert vectors.all_words() == [
        Words("", "", "document"),
        Words(SYSTEM, "", "document"),
        Words(SYSTEM, REPRESENT_TEXT, "document"),
        Words(SYSTEM, REPRESENT_IMAGE, "document"),
    ]
    text, image = Item("a"), Item(f"{M}\na", ("img/red.png",))
    for item in (text, image):
        assert vectors.words("system", "document", item) == vectors.words("hierarchical", "document", item)
        assert vectors.words("system", "query", item) == vectors.words("system", "document", item)
    assert vectors.words("hierarchical", "query", text) != vectors.words("hierarchical", "query", image)


@pytest.mark.parametrize(
    "family", ["qwen2_vl", pytest.param("idefics3", marks=[pytest.mark.slow, pytest.mark.exhaustive])]
)
def test_vectors_are_those_of_a_model_with_the_prompt(
    family: str, tiny_dir: Any, colours: Path, tmp_path: Path
) -> None:
    folder, config = tiny_dir(family), config_of(colours, tmp_path)
    model, readouts = Gen2Embed(folder, device="cpu"), (Readout(), Readout("pre-mlp", norm=False))
    names = ("none", "system", "hierarchical", "qd-rein")
    vectors = PromptVectors(model, readouts, names, config, image_source(config), "evaluated")
    items = [Item("a red wall"), Item(f"{M}\nWhich colour?", ("img/red.png",)), Item(M, ("img/blue.png",))]
    groups = [ItemGroup("query", items, ""), ItemGroup("document", items, "")]
    for words in vectors.all_words():
        model.set_prompt(words.prompt)
        vectors.encode(words, groups)
    # 3 items as said by none; 3 by system and by the candidates of hierarchical; 3 with the representation prompt
    assert vectors.num_encoded == 9
    for name, (place, one) in itertools.product(names, enumerate(readouts)):
        alone = Gen2Embed(folder, device="cpu", prompt_mode=name, readout=one.state, readout_norm=one.norm)
        bulk = open_bulk_encoder(
            PrefixEncoder(alone),
            config,
            image_source(config),
            folder=tmp_path / f"{name}-{one.name}",
            fingerprint="alone",
        )
        for side in ("query", "document"):
            bulk.add(side, items)
            found = np.split(vectors.under(name).vectors(side, items), 2, axis=1)[place]
            np.testing.assert_allclose(found * 2**0.5, bulk.vectors(side, items), atol=2e-6, err_msg=f"{name} {side}")


@pytest.mark.slow
def test_rows_with_faults_are_set_aside_under_every_prompt(tiny_dir: Any, colours: Path, tmp_path: Path) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", prompt_mode="qd-rein")
    config = config_of(colours, tmp_path, subsets=("VOC2007", "OVEN"), max_error_rate=1.0)
    options = AblationOptions(ablation=True, ablation_readouts=("last", "drop-9"))
    result = ablate(model, MMEB, config, options)
    assert model.prompt_mode == "qd-rein"
    found = figures(result)
    assert list(found) == [(name, "last", "none", how) for name in options.ablation_prompts for how in SCORES]
    for name, how in itertools.product(options.ablation_prompts, SCORES):
        alone = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", prompt_mode=name)
        run = replace(config, output_dir=str(tmp_path / f"{name}-{how}"), **SCORES[how])
        expected = evaluate(PrefixEncoder(alone), MMEB, run)
        assert found[name, "last", "none", how] == [
            (score.num_correct, sum(row.strict for row in score.rows), len(score.rows), score.num_errors)
            for score in expected.scores
        ]
        assert sorted(result.errors) == sorted(expected.errors)
    assert [len(score.rows) for score in result.combinations[0].scores] == [5, 3]
    assert result.num_scored == 8
    # Left out, and named: a readout of more layers than there are, and maps of too few inputs.
    assert list(result.left_out) == ["readout drop-9", "calibration own"]
    assert "leaves none" in result.left_out["readout drop-9"]
    assert "calibration on" in result.left_out["calibration own"]


def test_reports_and_a_resumed_run(tiny_dir: Any, colours: Path, tmp_path: Path) -> None:
    config = config_of(colours, tmp_path / "out", subsets=("OVEN",))
    options = AblationOptions(ablation=True, ablation_prompts=("none", "Hierarchical"), ablation_readouts=("last",))
    check_ablation_reports(config, options, "mmeb")
    first = ablate(Gen2Embed(tiny_dir("qwen2_vl"), device="cpu"), MMEB, config, options)
    write_ablation(first, config, options)
    again = ablate(Gen2Embed(tiny_dir("qwen2_vl"), device="cpu"), MMEB, config, options)
    assert (first.num_encoded > 0, again.num_encoded) == (True, 0)
    written, second = (ablation_json(result, config, options) for result in (first, again))
    assert written | {"seconds": 0} == second | {"seconds": 0}
    assert json.loads((tmp_path / "out" / "ablation.json").read_text()) == written
    assert "choosing on the test" in written["note"]
    assert (tmp_path / "out" / "ablation_errors.jsonl").read_bytes() == b""
    head, *rows = table(first)
    assert head[6:] == ["backbone", "forwards per query", "unlabelled inputs", "transductive", "rerank k"]
    assert [row[:4] for row in rows] == [
        ["none", "last", "none", "cosine"],
        ["none", "last", "none", "csls"],
        ["hierarchical", "last", "none", "cosine"],
        ["hierarchical", "last", "none", "csls"],
    ]
    assert [row[6:] for row in rows[:2]] == [["tiny", "1", "0", "no", "0"], ["tiny", "1", "3 own queries", "yes", "0"]]
    lines = (tmp_path / "out" / "ablation.md").read_text().splitlines()
    assert lines[-4].split(" | ")[:3] == ["| none", "last", "none"]
    check_ablation_reports(config, options, "mmeb")
    other = replace(options, ablation_prompts=("none",))
    with pytest.raises(StoreMismatchError, match="ablation_prompts is \\['none', 'hierarchical'\\] there"):
        check_ablation_reports(config, other, "mmeb")
    check_ablation_reports(replace(config, overwrite=True), other, "mmeb")
    with pytest.raises(StoreMismatchError, match="limit is None there and 2 now"):
        check_ablation_reports(replace(config, limit=2), options, "mmeb")


def test_too_few_inputs_to_fit_on_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(Gen2EmbedError, match="calibration on 2 inputs"):
        FitInputs([Item("a")], [Item("b")], None, "two")  # type: ignore[arg-type]


def test_readouts_of_a_model_with_a_readout_are_refused(tiny_dir: Any, colours: Path, tmp_path: Path) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", readout="pre-mlp")
    with pytest.raises(Gen2EmbedError, match="as it was published"):
        ablate(model, MMEB, config_of(colours, tmp_path), AblationOptions(ablation=True))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_figure_is_that_of_a_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini, "NUM_QUERIES", 60)
    data, images = evaluation_places(mini.ensure("eval", tmp_path / "mini"))
    config = EvaluationConfig(
        data_dir=str(data),
        image_dir=str(images),
        output_dir=str(tmp_path / "out"),
        subsets=("Scenes_t2i", "Pointing"),
        fingerprint="f",
    )
    colors, shapes = ("red", "blue", "green", "white"), ("circle", "square", "triangle", "star", "cross")
    texts = [f"{n} {color} {shape}" for n in ("a", "the", "two") for color in colors for shape in shapes]
    inputs = FitInputs([Item(text) for text in texts], [Item(text) for text in texts], image_source(config), "texts")
    options = AblationOptions(
        ablation=True, ablation_prompts=("system", "hierarchical"), ablation_readouts=("last", "pre-mlp-raw")
    )
    result = ablate(Gen2Embed("gen2embed-mini", device="cpu"), MMEB_MINI, config, options, inputs)
    assert not result.left_out
    found = figures(result)
    assert len(found) == 2 * 2 * 3 * 2
    methods = {key: one.method for key, one in zip(found, result.combinations, strict=True)}
    for prompt, readout in itertools.product(options.ablation_prompts, options.readouts):
        loaded = {"prompt_mode": prompt, "readout": readout.state, "readout_norm": readout.norm}
        model = Gen2Embed("gen2embed-mini", device="cpu", **loaded)
        folder = tmp_path / prompt / readout.name
        calibrated = Gen2Embed("gen2embed-mini", device="cpu", **loaded)
        calibrated.calibrate(texts, texts, data="texts")
        calibrated.save_pretrained(str(folder / "calibrated"))
        calibrations = {"none": "", "own": "own", "fitted": str(folder / "calibrated")}
        for calibration, scoring in itertools.product(calibrations, SCORES):
            run = replace(
                config,
                output_dir=str(folder / calibration / scoring),
                embedding_dir=str(folder / "vectors"),
                calibration=calibrations[calibration],
                **SCORES[scoring],
            )
            key = (prompt, readout.name, calibration, scoring)
            scores = evaluate(PrefixEncoder(model), MMEB_MINI, run).scores
            assert found[key] == [
                (score.num_correct, sum(row.strict for row in score.rows), len(score.rows), score.num_errors)
                for score in scores
            ], key
            assert methods[key].transductive == run.transductive
            own = sum(score.num_unlabelled for score in scores)
            used = [(120, "texts")] if calibration == "fitted" else []
            used += [(own, "own inputs" if calibration == "own" else "own queries")] if run.transductive else []
            assert [(one.number, one.of) for one in methods[key].unlabelled] == used


def test_prompts_with_texts_per_dataset_are_refused_by_name() -> None:
    with pytest.raises(Gen2EmbedError, match="freeret, whose texts differ by dataset"):
        AblationOptions(ablation=True, ablation_prompts=("none", "freeret"))
