"""Saved directories: stock modules only, the same vectors in plain sentence-transformers, and no state left behind."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny_models import FAMILIES

import gen2embed_mteb
from gen2embed_mteb import Gen2Embed, HierarchicalPrompt
from gen2embed_mteb.embedder.export import export

pytestmark = pytest.mark.slow

ROOT = Path(gen2embed_mteb.__file__).parents[1]
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None

# What a user of the directory runs, who has sentence-transformers and nothing else in mind. Prints one line a family.
CLIENT = """
import json, sys
sys.path = [path for path in sys.path if path]
if sys.argv[1] == "with":
    import gen2embed_mteb
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
pictures = [Image.open(path) for path in sys.argv[3:5]]
inputs = ["a red circle", {"text": "Find a page.\\n"}, pictures[0]]
inputs += [{"image": pictures[1], "text": "<|image_1|>\\nWhat?"}]
for directory in sys.argv[5:]:
    try:
        model = SentenceTransformer(directory)
        vectors = np.concatenate([model.encode_query(inputs), model.encode_document(inputs), model.encode(inputs)])
        np.save(sys.argv[2] + "/" + directory.replace("/", "_"), vectors)
        print("done", directory)
    except ImportError as error:
        print("ImportError", directory, str(error).splitlines()[0])
assert ("gen2embed_mteb" in sys.modules) == (sys.argv[1] == "with")
"""


@pytest.fixture(scope="module")
def files(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(2)]
    for picture, path in zip(pictures, paths, strict=False):
        picture.save(path)
    return [str(path) for path in paths]


@pytest.fixture
def client(request, files, tmp_path):
    """`client(mode, directories)`: runs `CLIENT` in a process of its own, in another folder, and returns its lines."""

    def lines(mode: str, directories: list[Path]) -> list[str]:
        arguments = [mode, str(tmp_path), *files, *map(str, directories)]
        python = request.getfixturevalue("preloaded" if mode == "with" else "preloaded_stock")
        done = python.run(["-c", CLIENT, *arguments], cwd=tmp_path, check=True)
        return [line for line in done.stdout.splitlines() if line.startswith(("done", "ImportError"))]

    return lines


def in_memory(model: Gen2Embed, pictures: list) -> np.ndarray:
    inputs = ["a red circle", {"text": "Find a page.\n"}, pictures[0]]
    inputs += [{"image": pictures[1], "text": "<|image_1|>\nWhat?"}]
    return np.concatenate([model.encode_query(inputs), model.encode_document(inputs), model.encode(inputs)])


@pytest.mark.exhaustive
def test_after_importing_the_package_plain_sentence_transformers_gives_the_same_vectors(
    tiny, exported, client, pictures, tmp_path
):
    directories = [exported(family) for family in FAMILIES] + [exported("qwen2_vl", prompt_mode="d-rein")]
    lines = client("with", directories)
    assert lines == [f"done {directory}" for directory in directories]
    models = [tiny(family) for family in FAMILIES] + [tiny("qwen2_vl", prompt_mode="d-rein")]
    for directory, model in zip(directories, models, strict=True):
        vectors = np.load(tmp_path / f"{str(directory).replace('/', '_')}.npy")
        assert np.abs(vectors - in_memory(model, pictures)).max() < 1e-6, directory


def test_without_importing_the_package(tiny, exported, client, pictures, tmp_path):
    """Where torchvision is present all families do, to the same vectors; where it is not, those without videos do."""
    directories = [exported(family) for family in FAMILIES]
    lines = client("without", directories)
    assert len(lines) == len(FAMILIES)
    for family, directory, line in zip(FAMILIES, directories, lines, strict=True):
        if HAS_TORCHVISION or family == "llava_next":
            assert line == f"done {directory}"
            vectors = np.load(tmp_path / f"{str(directory).replace('/', '_')}.npy")
            assert np.abs(vectors - in_memory(tiny(family), pictures)).max() < 1e-6
        else:
            assert line.startswith("ImportError")
            assert "torchvision" in line.lower()


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_modules_only(tiny, exported, family):
    modules = json.loads((exported(family) / "modules.json").read_text())
    assert len(modules) == 3
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert not [path for path in exported(family).rglob("*") if path.suffix in (".py", ".bin", ".pt", ".pkl")]
    model = SentenceTransformer(str(exported(family)))
    assert [type(module) for module in model] == [Transformer, Pooling, Normalize]
    stored = load_file(exported(family) / "model.safetensors")
    assert not [name for name in stored if "lm_head" in name]
    assert len(stored) == len(tiny(family)[0].model.state_dict())


def test_nothing_of_the_machine_is_written(tiny_dir, tmp_path):
    """Neither the path of the base model, nor a token."""
    Gen2Embed(tiny_dir("qwen2_vl"), token="hf_this_is_a_secret").save_pretrained(str(tmp_path / "model"))
    for path in (tmp_path / "model").rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            assert "hf_this_is_a_secret" not in text, path
            assert str(tiny_dir("qwen2_vl")) not in text, path


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips_leave_no_state_behind(tiny_dir, tmp_path, pictures, family):
    model = Gen2Embed(tiny_dir(family))
    model.save_pretrained(str(tmp_path / "first"))
    want = in_memory(model, pictures)
    again = Gen2Embed(tmp_path / "first")
    # Cutting and padding of every kind, by the call and by the processing, in both directions.
    again.encode_query(["word " * 300, "fox"], processing_kwargs={"text": {"max_length": 150}})
    again.preprocess(["word " * 300, {"image": pictures[0]}], max_length=160)
    again.encode_document([{"text": "word " * 300, "image": pictures[1]}, "fox"])
    again.save_pretrained(str(tmp_path / "second"))
    third = Gen2Embed(tmp_path / "second")
    third.save_pretrained(str(tmp_path / "third"))
    state = json.loads((tmp_path / "second" / "tokenizer.json").read_text())
    assert (state["truncation"], state["padding"]) == (None, None)
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json", "config.json", "modules.json"):
        contents = {(tmp_path / step / name).read_bytes() for step in ("first", "second", "third")}
        assert len(contents) == 1, name
    assert np.abs(in_memory(third, pictures) - want).max() < 1e-6


def test_a_tokenizer_that_comes_with_truncation_is_saved_without(tiny_dir, tmp_path):
    """As plain sentence-transformers leaves it behind after a call with max_length."""
    model = Gen2Embed(tiny_dir("qwen2_vl"))
    model.tokenizer.backend_tokenizer.enable_truncation(max_length=7)
    model.save_pretrained(str(tmp_path / "model"))
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_text())["truncation"] is None
    # ... and one that is loaded with it does not cut the prompt.
    path = tmp_path / "model" / "tokenizer.json"
    state = json.loads(path.read_text())
    state["truncation"] = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(state))
    want = Gen2Embed(tiny_dir("qwen2_vl")).encode_query("a fox")
    assert np.abs(Gen2Embed(tmp_path / "model").encode_query("a fox") - want).max() < 1e-6


def test_an_exported_directory_keeps_its_prompt(tiny, exported, tmp_path):
    assert Gen2Embed(exported("qwen2_vl", prompt_mode="d-rein")).prompt_mode == "d-rein"
    own = HierarchicalPrompt('say "this"\n', "C:\\new 🦊", "{{ 1 }}", "\n'", "", "é")
    Gen2Embed(exported("qwen2_vl"), prompt_mode=own).save_pretrained(str(tmp_path / "own"))
    again = Gen2Embed(tmp_path / "own")
    assert again.prompt == own
    assert again.prompt_mode == "custom"
    plain = SentenceTransformer(str(tmp_path / "own"))
    assert np.abs(plain.encode_query("a fox") - again.encode_query("a fox")).max() < 1e-6


def test_an_exported_directory_takes_another_prompt_or_layout(tiny, exported, pictures):
    other = Gen2Embed(exported("qwen2_vl"), prompt_mode="none", layout="official")
    assert (other.prompt_mode, other.layout) == ("none", "official")
    want = in_memory(tiny("qwen2_vl", prompt_mode="none", layout="official"), pictures)
    assert np.abs(in_memory(other, pictures) - want).max() < 1e-6


def test_half_precision_is_kept_on_disk(tiny_dir, tmp_path):
    model = Gen2Embed(tiny_dir("qwen2_vl"), model_kwargs={"dtype": torch.bfloat16})
    model.save_pretrained(str(tmp_path / "model"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}
    assert np.abs(Gen2Embed(tmp_path / "model").encode_query("a fox") - model.encode_query("a fox")).max() < 1e-6


def test_the_official_layout_is_not_saved_without_its_positions(tiny, tmp_path):
    with pytest.raises(ValueError, match="layout='official' cannot be saved"):
        tiny("qwen2_vl", layout="official").save_pretrained(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()
    # Where positions are 1-D anyway there is nothing to lose.
    tiny("llava_next", layout="official").save_pretrained(str(tmp_path / "llava"))
    assert (tmp_path / "llava" / "modules.json").is_file()


def test_export_writes_what_save_pretrained_does(tiny_dir, exported, tmp_path):
    written = export(tiny_dir("qwen2_vl"), tmp_path / "deep" / "model", prompt_mode="d-rein")
    reference = exported("qwen2_vl", prompt_mode="d-rein")
    names = sorted(str(path.relative_to(written)) for path in written.rglob("*"))
    assert names == sorted(str(path.relative_to(reference)) for path in reference.rglob("*"))
    for name in names:
        if (written / name).is_file():
            assert (written / name).read_bytes() == (reference / name).read_bytes(), name
    # Exported once more it keeps its prompt, unless told otherwise.
    assert Gen2Embed(export(written, tmp_path / "again")).prompt_mode == "d-rein"
    assert Gen2Embed(export(written, tmp_path / "other", prompt_mode="none")).prompt_mode == "none"


def test_export_never_writes_into_what_exists(tiny_dir, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("taken", "file"):
        with pytest.raises(FileExistsError, match=rf"{name} is not an empty directory"):
            export(tiny_dir("qwen2_vl"), tmp_path / name)
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert (export(tiny_dir("qwen2_vl"), tmp_path / "empty") / "modules.json").is_file()


def test_another_sentence_transformer_is_refused(tiny_dir, exported, tmp_path):
    """A VLM saved with mean pooling, as sentence-transformers makes one of a base model, is no Gen2Embed."""
    modules = [module for module in SentenceTransformer(str(exported("qwen2_vl")))]  # noqa: C416
    modules[1] = Pooling(32, pooling_mode="mean")
    SentenceTransformer(modules=modules).save_pretrained(str(tmp_path / "mean"))
    with pytest.raises(ValueError, match=r"mean pools by 'mean', not by last token.*`gen2embed export`"):
        Gen2Embed(tmp_path / "mean")


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_read_by_pillow_whatever_is_installed(tiny, exported, family):
    """Pillow and torchvision resample differently: the directory says which of the two its vectors come from."""
    assert type(tiny(family).processor.image_processor).__name__.endswith("Pil")
    settings = json.loads((exported(family) / "sentence_bert_config.json").read_text())
    assert settings["processor_kwargs"] == {"use_fast": False}
    loaded = SentenceTransformer(str(exported(family)))
    assert type(loaded.processor.image_processor).__name__.endswith("Pil")
    processor = json.loads((exported(family) / "processor_config.json").read_text())
    assert ("video_processor" in processor) is (family != "llava_next")
