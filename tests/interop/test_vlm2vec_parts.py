"""The parts of the adapter, each by itself: options, the start-up file, stubs, the output folder, the engine."""

import hashlib
import importlib
import io
import json
import logging
import os
import pickle
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES
from vlm2vec_files import STANDINS

from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.storage.atomic import ForeignFileError
from vlm2vec_adapter import startup
from vlm2vec_adapter.__main__ import main
from vlm2vec_adapter.datasets import candidates_are_queries
from vlm2vec_adapter.options import Options, UsageError, take_options, wants_us
from vlm2vec_adapter.results import output
from vlm2vec_adapter.results.report import read_run, write
from vlm2vec_adapter.results.vector_files import VectorFileError, VectorFiles
from vlm2vec_adapter.scripts.engine import KEY, Engine, Sample
from vlm2vec_adapter.scripts.session import Session
from vlm2vec_adapter.scripts.stubs import PACKAGES, stubbed
from vlm2vec_adapter.startup import command_for

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
        (["--gen2embed_exif_orientation", "perhaps"], "'perhaps'; pass true or false"),
    ],
)
def test_options_that_cannot_be_used_are_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take_options(words, {})


def test_exif_orientation_reaches_images_by_path_and_the_record_of_the_run(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (70, 40)).save(tmp_path / "a.jpg", exif=exif)
    model_args = SimpleNamespace(model_name="gen2embed-mini", checkpoint_path=None, lora=False)
    found = []
    for words in ([], ["--gen2embed_exif_orientation", "true"]):
        session = Session(take_options(words, {})[0], "v1", Share(), lambda _: {})
        session._data_args = SimpleNamespace(max_len=None)
        images = session.images_in(str(tmp_path))
        assert images is not None
        found.append((images.open("a.jpg").size, images.facts("a.jpg").size, session._settings(model_args)))
    (lying, facts, before), (upright, turned, after) = found
    assert (lying, facts) == ((70, 40), (70, 40))
    assert (upright, turned) == ((40, 70), (40, 70))
    assert after == {**before, "exif_orientation": True}


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


@pytest.fixture
def vector_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> VectorFiles:
    """`pickle` of this process, with the record of a folder behind it for as long as the test runs."""
    for name in ("dump", "load"):
        monkeypatch.setattr(pickle, name, getattr(pickle, name))
    files = VectorFiles(tmp_path, partial(output.noted, tmp_path), partial(output.note, tmp_path))
    files.install()
    return files


def put(folder: Path, name: str, value: Any) -> None:
    """Write a file as VLM2Vec does."""
    with (folder / name).open("wb") as file:
        pickle.dump(value, file)


def get(folder: Path, name: str) -> Any:
    """Read a file as VLM2Vec does."""
    with (folder / name).open("rb") as file:
        return pickle.load(file)


V1 = (np.arange(6, dtype=np.float32).reshape(2, 3), [{"text": "a", "img_path": "b"}] * 2)
V2 = {"cand": np.arange(3, dtype=np.float32), "andere ü": np.ones(3, dtype=np.float32)}
DATASETS: dict[str, dict[str, Any]] = {"A": {}, "B": {}}


class Trap:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sprung),)


@pytest.mark.usefixtures("vector_files")
def test_vectors_of_a_run_are_read_back_by_the_next(tmp_path: Path) -> None:
    output.claim(tmp_path, SETTINGS, DATASETS, {})
    put(tmp_path, "A_qry", V1)
    put(tmp_path, "A_tgt", V2)
    put(tmp_path, "B_qry", V2["cand"])
    record = output.read_record(tmp_path)
    assert record is not None
    assert record["files"]["B_tgt"] is None  # named before it is written
    for name, rows in (("A_qry", 2), ("A_tgt", 2), ("B_qry", 3)):
        data = (tmp_path / name).read_bytes()
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "rows": rows}
        assert record["files"][name] == entry
    before = sorted(path.name for path in tmp_path.iterdir())
    output.check(tmp_path, SETTINGS, DATASETS)
    output.set_aside_unfinished(tmp_path, DATASETS)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    found, pairs = get(tmp_path, "A_qry")
    np.testing.assert_array_equal(found, V1[0])
    assert pairs == V1[1]
    assert {key: value.tolist() for key, value in get(tmp_path, "A_tgt").items()} == {
        key: value.tolist() for key, value in V2.items()
    }


@pytest.mark.usefixtures("vector_files")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickled_arrays_is_read(tmp_path: Path, protocol: int) -> None:
    output.claim(tmp_path, SETTINGS, DATASETS, {})
    for name, value in (("A_qry", (V1[0], V1[1], np.float32(2), np.asfortranarray(V1[0]), V1[0][:, ::2])),):
        with (tmp_path / name).open("wb") as file:
            pickle.dump(value, file, protocol)
        for found, wanted in zip(get(tmp_path, name), value, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.usefixtures("vector_files")
def test_other_pickles_are_read_and_written_as_ever(tmp_path: Path) -> None:
    output.claim(tmp_path, SETTINGS, DATASETS, {})
    (tmp_path / "sub").mkdir()
    for name in ("other.pkl", "sub/A_qry"):
        put(tmp_path, name, {"a": SimpleNamespace(b=1)})
        assert get(tmp_path, name)["a"].b == 1
    memory = io.BytesIO()
    pickle.dump({1: SimpleNamespace()}, memory)
    memory.seek(0)
    assert list(pickle.load(memory)) == [1]


@pytest.mark.usefixtures("vector_files")
def test_what_this_project_did_not_write_is_not_unpickled(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    output.claim(tmp_path, SETTINGS, DATASETS, {})
    put(tmp_path, "A_qry", V1)
    for name in ("A_qry", "B_tgt", "C_qry"):  # changed, named and not written yet, never named
        (tmp_path / name).write_bytes(trap)
        with pytest.raises(VectorFileError, match=f"{name} is not what this project wrote"):
            get(tmp_path, name)
    # The folder of somebody who forged record, ledger and digest alike.
    output.note(tmp_path, "A_qry", {"sha256": hashlib.sha256(trap).hexdigest(), "size": len(trap), "rows": 2})
    (tmp_path / "A_qry").write_bytes(trap)
    with pytest.raises(VectorFileError, match=r"A_qry asks for posix\.mkdir"):
        get(tmp_path, "A_qry")
    assert not sprung.exists()
    pickle.loads(trap)
    assert sprung.exists()  # the trap was one


@pytest.mark.usefixtures("vector_files")
@pytest.mark.parametrize("damage", ["cut", "cut at a full stop", "empty", "longer", "one bit", "another's"])
def test_a_damaged_file_is_renamed_and_its_dataset_encoded_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    output.claim(tmp_path, SETTINGS, DATASETS, {})
    for name in ("A_qry", "A_tgt", "B_qry", "B_tgt"):
        put(tmp_path, name, (np.full((3, 5), 46, np.uint8), []))  # 46 is a full stop, as which every pickle ends
    for name in "AB":
        (tmp_path / f"{name}_score.json").write_text('{"hit@1": 1.0}')
    whole = (tmp_path / "A_tgt").read_bytes()
    place = whole.index(b"....") + 2
    content = {
        "cut": whole[: len(whole) // 2],
        "cut at a full stop": whole[:place],
        "empty": b"",
        "longer": whole + b".",
        "one bit": whole[:place] + b"/" + whole[place + 1 :],
        "another's": pickle.dumps(["the user's own"]),
    }[damage]
    (tmp_path / "A_tgt").write_bytes(content)
    output.check(tmp_path, SETTINGS, DATASETS)
    with caplog.at_level(logging.WARNING):
        output.set_aside_unfinished(tmp_path, DATASETS)
    assert "A_tgt is half written or was changed since" in caplog.text
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    kept = {name for name in names if "set-aside" in name}
    assert names - kept == {"A_qry", "B_qry", "B_tgt", "B_score.json", "gen2embed.json"}
    assert sorted(name.partition(".set-aside")[0] for name in kept) == ["A_score.json", "A_tgt"]
    assert content in [(tmp_path / name).read_bytes() for name in kept]


@pytest.mark.usefixtures("vector_files")
@pytest.mark.parametrize("lines", [b"", b"{}\n", b"{}\n{}", b"{}\n{}\n{}\n"])
def test_facts_of_fewer_or_more_queries_than_vectors_are_renamed(tmp_path: Path, lines: bytes) -> None:
    """V2 pairs the two by their place, and would score as many as the shorter has."""
    output.claim(tmp_path, SETTINGS, DATASETS, {})
    put(tmp_path, "A_qry", V1[0])
    (tmp_path / "A_info.jsonl").write_bytes(b"{}\n{}\n")
    output.set_aside_unfinished(tmp_path, DATASETS)
    assert (tmp_path / "A_info.jsonl").exists()
    (tmp_path / "A_info.jsonl").write_bytes(lines)
    output.set_aside_unfinished(tmp_path, DATASETS)
    assert not (tmp_path / "A_info.jsonl").exists()
    assert [path.read_bytes() for path in tmp_path.glob("A_info.jsonl.set-aside-*")] == [lines]
    assert (tmp_path / "A_qry").exists()


@pytest.mark.usefixtures("vector_files")
@pytest.mark.parametrize("name", ["C_qry", "C_tgt", "C_info.jsonl", "C_score.json", "C_pred.txt", "C_pred.jsonl"])
def test_files_of_others_are_refused_where_vlm2vec_would_take_them(tmp_path: Path, name: str) -> None:
    output.claim(tmp_path, SETTINGS, DATASETS, {})
    (tmp_path / name).write_bytes(b"another backbone's")
    output.check(tmp_path, SETTINGS, DATASETS)
    for act in (output.check, lambda *known: output.claim(*known, {})):
        with pytest.raises(output.OutputMismatchError, match=f"{name} was not written by a run of this project"):
            act(tmp_path, SETTINGS, {"C": {}})
    assert (tmp_path / name).read_bytes() == b"another backbone's"


@pytest.mark.parametrize("name", ["A_score.json", "A_info.jsonl", "A_pred.txt"])
def test_a_score_of_another_backbone_is_not_taken_for_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(output.OutputMismatchError, match=f"{name} was not written by a run"):
        output.claim(tmp_path, SETTINGS, DATASETS, {})


@pytest.mark.usefixtures("vector_files")
def test_files_that_end_like_vectors_and_are_not_of_the_run_stay(tmp_path: Path) -> None:
    output.claim(tmp_path, SETTINGS, DATASETS, {})
    for name in ("notes_qry", "thesis_tgt", "_qry", "AA_qry"):
        (tmp_path / name).write_text("mine")
    output.check(tmp_path, SETTINGS, DATASETS)
    output.set_aside_unfinished(tmp_path, DATASETS)
    output.claim(tmp_path, SETTINGS, DATASETS, {})
    for name in ("notes_qry", "thesis_tgt", "_qry", "AA_qry"):
        assert (tmp_path / name).read_text() == "mine"


def test_a_link_in_the_place_of_vectors_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    output.claim(folder, SETTINGS, DATASETS, {})
    (tmp_path / "precious").write_text("mine")
    (folder / "A_qry").symlink_to(tmp_path / "precious")  # VLM2Vec would write through it
    with pytest.raises(output.OutputMismatchError, match="A_qry was not written"):
        output.check(folder, SETTINGS, DATASETS)


@pytest.mark.usefixtures("vector_files")
def test_a_copied_or_edited_record_proves_nothing(tmp_path: Path) -> None:
    output.claim(tmp_path, SETTINGS, DATASETS, {})
    put(tmp_path, "A_qry", V1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "gen2embed.json").write_bytes((tmp_path / "gen2embed.json").read_bytes())
    (other / "A_qry").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(output.OutputMismatchError, match=r"gen2embed\.json is a copy, was changed"):
        output.check(other, SETTINGS, DATASETS)
    assert output.noted(other, "A_qry") is None
    assert output.mirror(other, tmp_path) == {}
    edited = json.loads((tmp_path / "gen2embed.json").read_bytes())
    edited["files"]["B_qry"] = edited["files"]["A_qry"]
    (tmp_path / "gen2embed.json").write_text(json.dumps(edited))
    with pytest.raises(output.OutputMismatchError, match="proves nothing"):
        output.check(tmp_path, SETTINGS, DATASETS)
    # A folder that is copied as a whole goes on.
    whole = tmp_path / "whole"
    output.claim(whole, SETTINGS, DATASETS, {})
    shutil.copytree(whole, tmp_path / "copy")
    output.check(tmp_path / "copy", SETTINGS, DATASETS)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        '{"settings": {}, "datasets": [], "model": {}, "files": {}}',
        '{"settings": {}, "datasets": {"A": 1}, "model": {}, "files": {}}',
        '{"settings": null, "datasets": {}, "model": {}, "files": {}}',
        '{"settings": {}, "datasets": {}, "model": {}, "files": {"A_qry": "whole"}}',
        '{"settings": {}, "datasets": {}, "model": {}, "files": {"A_qry": {"sha256": "0", "size": 1, "rows": 1}}}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:30],
)
def test_a_damaged_record_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "gen2embed.json").write_text(content)
    (tmp_path / "A_score.json").write_text('{"acc": 0.5, "num_correct": 1, "num_pred": 2}')
    for act in (lambda: output.check(tmp_path, SETTINGS, DATASETS), lambda: read_run(tmp_path)):
        with pytest.raises(output.OutputMismatchError, match=r"gen2embed\.json cannot be read") as caught:
            act()
        assert len(str(caught.value)) < 400


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    held = output.lock(tmp_path / "out")
    with pytest.raises(output.OutputMismatchError, match="another run is writing there"):
        output.lock(tmp_path / "out")
    held.release()
    output.lock(tmp_path / "out").release()


@pytest.mark.usefixtures("vector_files")
def test_a_second_process_sees_finished_datasets_and_writes_none_of_the_firsts_files(tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    assert output.mirror(tmp_path / "nothing yet", second) == {}
    output.claim(tmp_path, SETTINGS, {**DATASETS, "C": {}}, {})
    for name in ("A_qry", "A_tgt", "B_qry", "C_qry", "C_tgt"):
        put(tmp_path, name, V1)
    (tmp_path / "C_tgt").write_bytes((tmp_path / "C_tgt").read_bytes()[:-9] + b".")
    shown = output.mirror(tmp_path, second)
    assert sorted(path.name for path in second.iterdir()) == sorted(shown) == ["A_qry", "A_tgt"]
    VectorFiles(second, shown.get, shown.__setitem__).install()
    np.testing.assert_array_equal(get(second, "A_qry")[0], V1[0])
    put(second, "B_qry", V1)
    np.testing.assert_array_equal(get(second, "B_qry")[0], V1[0])


def test_vectors_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    output.check(tmp_path, SETTINGS, {})
    (tmp_path / "VOC2007_qry").write_bytes(b".")
    with pytest.raises(output.OutputMismatchError, match=r"holds VOC2007_qry, but no gen2embed\.json"):
        output.claim(tmp_path, SETTINGS, {}, {})


def test_the_start_up_file_of_others_is_neither_replaced_nor_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / startup.FILE
    monkeypatch.setattr(startup, "_path", lambda: path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(startup.__file__).parents[1]), *sys.path]))
    assert startup.disable() is None
    assert startup.enable() == startup.enable() == path
    assert path.read_text() == startup.LINES
    for content in (startup.LINES + "import more\n", "", startup.LINES[:-1]):
        path.write_text(content)
        for act in (startup.enable, startup.disable):
            with pytest.raises(ForeignFileError, match=startup.FILE):
                act()
        assert path.read_text() == content
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(ForeignFileError):
        startup.disable()
    path.unlink()
    startup.enable()
    assert startup.disable() == path
    assert not path.exists()


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
    defaults = {"batch_tokens": 40, "image_options": ImageOptions()}
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


@pytest.mark.parametrize("name", ["leaderboard.json", "report.md"])
def test_the_report_replaces_only_its_own_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "VOC2007_score.json").write_text('{"acc": 0.25, "num_correct": 1, "num_pred": 4}')
    (tmp_path / name).write_text("mine")
    with pytest.raises(ForeignFileError, match=name):
        write([tmp_path], {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["VOC2007_score.json", name])
    (tmp_path / name).unlink()
    write([tmp_path], {})
    (tmp_path / "VOC2007_score.json").write_text('{"acc": 0.5, "num_correct": 2, "num_pred": 4}')
    write([tmp_path], {})
    assert "50.0" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "scores",
    [
        "",
        "[]",
        "{}",
        '{"acc": null}',
        '{"acc": "1"}',
        '{"acc": [1]}',
        '{"acc": 1.5}',
        '{"hit@1": NaN}',
        '{"acc": -1}',
        '{"hit@1": true}',
        '{"hit@1": 0.5, "ndcg@1": {}}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:30],
)
def test_scores_that_are_none_are_one_line(tmp_path: Path, scores: str) -> None:
    (tmp_path / "VOC2007_score.json").write_text(scores)
    with pytest.raises(Gen2EmbedError, match=r"VOC2007_score\.json") as caught:
        write([tmp_path], {})
    assert len(str(caught.value).splitlines()) == 1


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
