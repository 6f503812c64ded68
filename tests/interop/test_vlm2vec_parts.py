"""The parts of the adapter, each by itself: options, the start-up file, stubs, the output folder, the engine."""

import importlib
import io
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES
from vlm2vec_files import STANDINS

from gen2embed_mteb.image_source import ImageSource
from gen2embed_mteb.images import ImageError
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.sharing import Share
from vlm2vec_adapter import output
from vlm2vec_adapter.__main__ import main
from vlm2vec_adapter.datasets import candidates_are_queries
from vlm2vec_adapter.engine import KEY, Engine, Sample
from vlm2vec_adapter.options import Options, UsageError, take_options, wants_us
from vlm2vec_adapter.report import read_run, write
from vlm2vec_adapter.session import Session
from vlm2vec_adapter.startup import command_for
from vlm2vec_adapter.stubs import PACKAGES, stubbed

SCRIPT = str(STANDINS / "vlm2vec_standin_v1" / "eval.py")


def test_our_options_are_taken_out_and_theirs_are_left() -> None:
    words = ["--model_name", "m", "--gen2embed_batch_tokens=512", "--gen2embed-layout", "official", "--lora", "True"]
    options, rest = take_options(words, {"GEN2EMBED_PROMPT_MODE": "none", "GEN2EMBED_LAYOUT": "native"})
    assert options == Options(batch_tokens=512, layout="official", prompt_mode="none")
    assert rest == ["--model_name", "m", "--lora", "True"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gen2embed_promt_mode", "none"], "Did you mean --gen2embed_prompt_mode"),
        (["--gen2embed_prompt_mode", "nonesuch"], "unknown prompt_mode 'nonesuch'"),
        (["--gen2embed_layout", "bare"], "known: auto, native, official"),
        (["--gen2embed_resize", "big"], "known: processor, official, square-448"),
        (["--gen2embed_batch_tokens", "many"], "'many'; pass a whole number"),
        (["--gen2embed_batch_tokens", "0"], "is 0; pass 1 or more"),
        (["--gen2embed_adapter", "--lora"], "--gen2embed_adapter needs a value"),
    ],
)
def test_options_that_cannot_be_used_are_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take_options(words, {})


def test_the_backbone_is_recognised_in_every_spelling() -> None:
    assert wants_us(["--model_backbone", "gen2embed"])
    assert wants_us(["--lora", "True", "--model-backbone=gen2embed"])
    assert not wants_us(["--model_backbone", "qwen2_vl", "--model_name", "gen2embed"])
    assert not wants_us(["--model_backbone"])


def sources_of(checkpoint: str | None, lora: bool, adapter: str | None = None) -> Any:
    session = Session(Options(adapter=adapter), "v1", Share(), lambda _: {})
    return session._sources(SimpleNamespace(model_name="base", checkpoint_path=checkpoint, lora=lora))[:2]


def test_vlm2vecs_flags_say_which_weights_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert sources_of(None, False) == ("base", None)
    assert sources_of(None, False, "own") == ("base", "own")
    assert sources_of("tuned", True) == ("base", "tuned")
    assert sources_of("tuned", False) == ("tuned", None)
    assert sources_of("tuned", False, "own") == ("tuned", "own")
    assert sources_of(str(tmp_path), False) == ("base", str(tmp_path))
    with pytest.raises(UsageError, match="tuned and --gen2embed_adapter own are both adapters"):
        sources_of("tuned", True, "own")


@pytest.mark.parametrize(
    ("sources", "layout"),
    [
        (("Qwen/Qwen2-VL-2B-Instruct", "Y-J-Ju/SaHa-Qwen2-VL-2B-Instruct"), "official"),
        (("/cache/models--Y-J-Ju--SaHa-Qwen2-VL-7B-Instruct/snapshots/0", None), "official"),
        (("Qwen/Qwen2-VL-2B-Instruct", "checkpoints/qwen2-vl-2b-saha"), "native"),
    ],
)
def test_released_checkpoints_get_the_layout_they_were_trained_in(sources: Any, layout: str) -> None:
    assert Options().layout_for(*sources) == layout
    assert Options(layout="native").layout_for(*sources) == "native"
    assert Options(layout="official").layout_for(*sources) == "official"


def test_a_plain_script_is_started_over_through_the_adapter() -> None:
    asked = ["--model_backbone", "gen2embed"]
    expected = ["-u", "-X", "dev", "-m", "vlm2vec_adapter", SCRIPT, *asked]
    assert command_for(["python", "-u", "-X", "dev", SCRIPT, *asked]) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "vlm2vec_adapter", SCRIPT, "--model_backbone", "gen2embed"],  # what it is started over as
        ["-m", "torch.distributed.run", SCRIPT, "--model_backbone", "gen2embed"],
        ["/bin/torchrun", SCRIPT, "--model_backbone", "gen2embed"],
        ["-c", "print()", SCRIPT, "--model_backbone", "gen2embed"],
        [SCRIPT, "--model_backbone", "qwen2_vl", "--model_name", "gen2embed"],
        [str(Path(__file__)), "--model_backbone", "gen2embed"],
        ["-"],
        [],
    ],
)
def test_any_other_program_starts_as_ever(words: list[str]) -> None:
    assert command_for(["python", *words]) is None


def test_a_stub_can_be_imported_inherited_from_and_not_called() -> None:
    package = next(name for name in ("decord", "deepspeed", "cv2") if importlib.util.find_spec(name) is None)
    with stubbed(["their_modelling_code"]):
        stub = importlib.import_module(f"{package}.inside")
        vendored = importlib.import_module("their_modelling_code.qwen2_vl")

        class Child(stub.Reader.Base):
            pass

    with pytest.raises(ModuleNotFoundError, match=rf"{package}.*is a stub.*install {package}"):
        stub.Reader("clip.mp4")
    with pytest.raises(ModuleNotFoundError, match=r"is a stub.*other backbones"):
        vendored.Qwen2VLForConditionalGeneration.from_pretrained("model")
    with pytest.raises(ModuleNotFoundError):
        Child()
    # The package is as absent as before, for whoever asks later.
    assert not [name for name in sys.modules if name.partition(".")[0] == package]
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{package}'"):
        importlib.import_module(package)


def test_what_is_installed_is_never_stubbed() -> None:
    with stubbed([]):
        assert importlib.import_module("PIL") is sys.modules["PIL"]
        with pytest.raises(ModuleNotFoundError, match="No module named 'not_of_theirs'"):
            importlib.import_module("not_of_theirs")
    assert not PACKAGES.keys() & {"torch", "transformers", "datasets", "peft", "yaml", "numpy", "PIL"}


SETTINGS = {"model": "m", "prompt_mode": "hierarchical", "fingerprint": "abc"}


def test_a_folder_is_kept_by_what_made_it(tmp_path: Path) -> None:
    task = {"VOC2007": {"dataset_split": "test"}}
    output.claim(tmp_path, SETTINGS, task, {"embedding_dimension": 4})
    output.check(tmp_path, SETTINGS, task)
    output.claim(tmp_path, SETTINGS, {"NIGHTS": {"dataset_split": "test"}}, {})
    found = output.read_record(tmp_path)
    assert found is not None
    assert set(found["datasets"]) == {"VOC2007", "NIGHTS"}
    with pytest.raises(output.OutputMismatchError, match="fingerprint 'abc', not 'abd'"):
        output.check(tmp_path, {**SETTINGS, "fingerprint": "abd"}, {})
    with pytest.raises(output.OutputMismatchError, match="VOC2007: dataset_split 'test', not 'train'"):
        output.check(tmp_path, SETTINGS, {"VOC2007": {"dataset_split": "train"}})


def test_one_model_under_two_paths_is_one_model(tmp_path: Path) -> None:
    output.claim(tmp_path, SETTINGS, {}, {})
    output.check(tmp_path, {**SETTINGS, "model": "/elsewhere/m"}, {})
    with pytest.raises(output.OutputMismatchError, match="model 'm', not 'n'; fingerprint 'abc', not 'abd'"):
        output.check(tmp_path, {**SETTINGS, "model": "n", "fingerprint": "abd"}, {})


def test_a_second_process_sees_finished_datasets_and_writes_none_of_the_firsts_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    output.mirror(first, second)  # nothing was made yet
    first.mkdir()
    for name, content in (("A_qry", b"x."), ("A_tgt", b"x."), ("B_qry", b"x."), ("C_qry", b"x."), ("C_tgt", b"x")):
        (first / name).write_bytes(content)
    output.mirror(first, second)
    assert sorted(path.name for path in second.iterdir()) == ["A_qry", "A_tgt"]


def test_vectors_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    output.check(tmp_path, SETTINGS, {})
    (tmp_path / "VOC2007_qry").write_bytes(b".")
    with pytest.raises(output.OutputMismatchError, match=r"holds VOC2007_qry, but no gen2embed\.json"):
        output.claim(tmp_path, SETTINGS, {}, {})


PICTURES = ((90, 60, "RGB"), (150, 12, "L"), (40, 100, "RGBA"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(1)
    for number, (width, height, mode) in enumerate(PICTURES):
        pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{number}.png")
    return ImageSource(folder)


SAMPLES = [
    Sample.of("<|image_1|>\nwhat is it\n", "0.png"),
    Sample.of("<|image_1|>\na marker, and no image\n", ""),
    Sample.of("<|image_1|> small\n", "1.png"),
    Sample.of("short", None),
    Sample.of("<|image_1|>\n", "2.png"),
]


def engine_of(model: Any, **settings: Any) -> Engine:
    defaults = {"batch_tokens": 40, "resize_policy": "processor", "min_side": 28}
    return Engine(model, **{**defaults, **settings}).to("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("layout", ["native", "official"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_its_own_vectors(tiny: Any, images: ImageSource, family: str, layout: str) -> None:
    model = tiny(family, layout=layout)
    engine = engine_of(model)
    inputs = [engine._open(sample, images) for sample in SAMPLES]
    assert inputs[1]["text"] == "a marker, and no image\n"
    assert min(inputs[2]["image"].size) == 28
    for side, key, reps, encode in (
        ("query", "qry", "qry_reps", model.encode_query),
        ("document", "tgt", "tgt_reps", model.encode_document),
    ):
        batch = engine.prepare(side, SAMPLES, images)
        assert len(batch.parts) > 1
        found = engine(**{key: {KEY: batch}})
        assert [name for name, value in found.items() if value is not None] == [reps]
        np.testing.assert_allclose(found[reps].numpy(), encode(inputs), atol=1e-4)
    assert model.dtype == torch.float32  # not the bfloat16 that VLM2Vec moves its models to


def test_autocast_around_the_call_changes_nothing(tiny: Any, images: ImageSource) -> None:
    engine = engine_of(tiny("qwen2_vl"))
    batch = {KEY: engine.prepare("query", SAMPLES, images)}
    plain = engine(qry=batch)["qry_reps"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = engine(qry=batch)["qry_reps"]
    assert torch.equal(plain, cast)
    assert cast.dtype == torch.float32


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_processes_share_the_rows_of_a_batch(tiny: Any, images: ImageSource, num_rows: int) -> None:
    samples = SAMPLES[:num_rows]
    whole = engine_of(tiny("qwen2_vl"))
    expected = whole(qry={KEY: whole.prepare("query", samples, images)})["qry_reps"]
    found: dict[int, torch.Tensor] = {}
    for rank in range(2):
        batch = engine_of(tiny("qwen2_vl"), share=Share(rank, 2)).prepare("query", samples, images)
        assert batch.num_rows == num_rows
        for part in batch.parts:
            rows = dict(zip(part.rows, whole._encoder.encode_prepared("query", part.prepared), strict=True))
            assert not rows.keys() & found.keys()
            found |= rows
    np.testing.assert_allclose(np.stack([found[row] for row in range(num_rows)]), expected, atol=1e-5)


def test_an_encoded_image_counts_as_the_file_does(tiny: Any, images: ImageSource) -> None:
    engine = engine_of(tiny("qwen2_vl"))
    data = io.BytesIO()
    images.open("0.png").save(data, "PNG")
    samples = [SAMPLES[0], Sample.of(SAMPLES[0].text, data.getvalue())]
    found = engine(tgt={KEY: engine.prepare("document", samples, images)})["tgt_reps"]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_rows_are_sorted_by_length_whatever_order_they_come_in(tiny: Any, images: ImageSource) -> None:
    engine = engine_of(tiny("qwen2_vl"))
    order = engine.sorted_order("query", SAMPLES, images)
    assert SAMPLES[order[-1]].text == "short"
    assert all(SAMPLES[place].image for place in order[:3])
    reversed_order = engine.sorted_order("query", SAMPLES[::-1], images)
    assert [SAMPLES[place] for place in order] == [SAMPLES[::-1][place] for place in reversed_order]


def test_missing_images_are_named_before_anything_is_encoded(tiny: Any, images: ImageSource) -> None:
    samples = [*SAMPLES, Sample.of("", "gone.png"), Sample.of("", "../escape.png")]
    with pytest.raises(ImageError, match=r"2 images cannot be used \(gone.png: not found"):
        engine_of(tiny("qwen2_vl")).sorted_order("query", samples, images)
    with pytest.raises(ImageError, match="no image folder was given"):
        engine_of(tiny("qwen2_vl")).sorted_order("query", SAMPLES, None)


def test_candidates_are_queries_in_refcoco_matching_alone() -> None:
    assert [name for name in MMEB.names if candidates_are_queries(name)] == ["RefCOCO-Matching"]
    assert candidates_are_queries("Pointing-Matching")  # of MMEB-mini
    assert not candidates_are_queries("a dataset of one's own")


def test_the_report_reads_what_v2s_shell_scripts_leave(tmp_path: Path) -> None:
    for modality, name in (("image", "VOC2007"), ("visdoc", "ViDoRe_docvqa")):
        (tmp_path / modality).mkdir()
        (tmp_path / modality / f"{name}_score.json").write_text(json.dumps({"hit@1": 0.5, "ndcg_linear@5": 0.7}))
    run = read_run(tmp_path)
    assert run.generation == "v2"
    assert run.metrics["visdoc"]["ViDoRe_docvqa"]["ndcg_linear@5"] == 0.7
    assert run.figures == {"VOC2007": 0.5}
    shown = write([tmp_path], {})
    assert "visdoc, ndcg_linear@5" in shown
    assert next(line for line in shown.splitlines() if line.startswith("ViDoRe_docvqa")).split() == [
        "ViDoRe_docvqa",
        "70.0",
    ]
    entry = json.loads((tmp_path / "leaderboard.json").read_text())
    assert set(entry["metrics"]) == {"image", "visdoc"}


def test_the_report_says_where_averages_cannot_be_compared(tmp_path: Path) -> None:
    for folder, names in (("a", ("VOC2007", "OK-VQA")), ("b", ("VOC2007",))):
        (tmp_path / folder).mkdir()
        for name in names:
            scores = {"acc": 0.25, "num_correct": 1, "num_pred": 4}
            (tmp_path / folder / f"{name}_score.json").write_text(json.dumps(scores))
    shown = write([tmp_path / "a", tmp_path / "b"], {})
    assert "averages are over each run's own: v1: a of 2, v1: b of 1" in shown
    entry = json.loads((tmp_path / "a" / "leaderboard.json").read_text())
    found = entry["metrics"]["image"]["VOC2007"]
    assert (found["hit@1"], found["mrr@1"], found["num_data"]) == (0.25, 0.25, 4)
    assert "hit@5" not in found  # v1 does not say


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/eval.py", "--model_backbone", "gen2embed"], "no such file"),
        ([str(Path(__file__)), "--model_backbone", "gen2embed"], "is no checkout of VLM2Vec"),
        ([SCRIPT, "--model_backbone", "qwen2_vl"], "pass --model_backbone gen2embed"),
        ([SCRIPT, "--gen2embed_nonsense", "1"], "unknown option --gen2embed_nonsense"),
        (["report", "/nowhere"], "holds no *_score.json"),
    ],
)
def test_input_that_cannot_be_used_ends_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("vlm2vec_adapter: error: ")
    assert message in error
    assert len(error.splitlines()) == 1
