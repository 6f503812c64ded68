"""Loading models of any family: the same vectors after export in plain sentence-transformers, and clear refusals."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from tiny_any import ANY, TEXT_ONLY

import gen2embed_mteb
from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.chat_formats.chat_format import ChatFormat
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.model_folder import compat
from gen2embed_mteb.embedder.model_folder.loading import text_alone
from gen2embed_mteb.embedder.short_names import resolve
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.inspection.prompt_inspection import inspect_prompt

ROOT = Path(gen2embed_mteb.__file__).parents[1]
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None

# One line a model: its folder, and whether it loaded. The arguments: with or without this package, where vectors go, an
# image, and folders; the name of a folder for text alone begins with "text".
CLIENT = """
import sys
from pathlib import Path
sys.path = [path for path in sys.path if path]
if sys.argv[1] == "with":
    import gen2embed_mteb
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
for folder in map(Path, sys.argv[4:]):
    inputs = ["a red circle", {"text": "Find <image> a <|im_end|> page.\\n"}]
    if not folder.name.startswith("text"):
        picture = Image.open(sys.argv[3])
        inputs += [picture, {"image": picture, "text": "What?"}]
    try:
        model = SentenceTransformer(str(folder), device="cpu")
    except ImportError as error:
        print("ImportError", folder.name)
        continue
    vectors = np.concatenate([model.encode_query(inputs), model.encode_document(inputs)])
    np.save(Path(sys.argv[2]) / folder.name, vectors)
    print("done", folder.name)
assert ("gen2embed_mteb" in sys.modules) == (sys.argv[1] == "with")
"""


class Saved:
    """`saved / name`: the folder of a generic model, saved when it is first asked for.

    Args:
        tiny: The fixture.
        folder: Where to save.
    """

    def __init__(self, tiny, folder):
        self.tiny, self.folder = tiny, folder

    def __truediv__(self, name):
        if not (self.folder / name).exists():
            self.tiny(name.removeprefix("text-")).save_pretrained(str(self.folder / name))
        return self.folder / name


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """Generic models, saved; those of text alone under names that begin with "text"."""
    return Saved(tiny, tmp_path_factory.mktemp("saved"))


def _name(family: str) -> str:
    return f"text-{family}" if family in TEXT_ONLY else family


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["with", "without"])
def test_plain_sentence_transformers_gives_the_same_vectors(tiny, saved, pictures, tmp_path, mode):
    pictures[0].save(tmp_path / "picture.png")
    env = {**os.environ, "GEN2EMBED_NO_HOOK": "1", "PYTHONPATH": str(ROOT) if mode == "with" else ""}
    arguments = [mode, str(tmp_path), str(tmp_path / "picture.png"), *(str(saved / _name(name)) for name in ANY)]
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("done", "ImportError"))]
    assert [line.split()[1] for line in lines] == [_name(name) for name in ANY]
    for name, line in zip(ANY, lines, strict=True):
        parts = inspect.signature(type(tiny(name).processor).__init__).parameters
        if mode == "without" and "video_processor" in parts and not HAS_TORCHVISION:
            assert line.startswith("ImportError"), name  # transformers' own requirement, as for Qwen2-VL
            continue
        assert line.startswith("done"), name
        inputs = ["a red circle", {"text": "Find <image> a <|im_end|> page.\n"}]
        inputs += [] if name in TEXT_ONLY else [pictures[0], {"image": pictures[0], "text": "What?"}]
        expected = np.concatenate([tiny(name).encode_query(inputs), tiny(name).encode_document(inputs)])
        assert np.abs(np.load(tmp_path / f"{_name(name)}.npy") - expected).max() < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5"])
def test_prompt_and_format_are_read_back_and_the_prompt_can_be_changed(tiny, saved, name, monkeypatch):
    def never(*_, **__):
        raise AssertionError("an exported model is not probed")

    from gen2embed_mteb.embedder.chat_formats import probing

    folder = saved / _name(name)
    monkeypatch.setattr(probing, "detect", never)
    again = Gen2Embed(folder, device="cpu")
    assert (again.prompt_mode, again.chat_format) == ("hierarchical", tiny(name).chat_format)
    assert fingerprint(again) == fingerprint(tiny(name))
    monkeypatch.undo()
    other = Gen2Embed(folder, prompt_mode="d-rein", device="cpu")
    assert other.render("a fox", "document") == tiny(name, prompt_mode="d-rein").render("a fox", "document")
    assert fingerprint(other) != fingerprint(again)


FORMATS = {
    "llama": ChatFormat(system="string", user="string"),
    "qwen3": ChatFormat(system="string", user="string", no_thinking=True),
    "gemma3_text": ChatFormat(),
    "qwen3_5": ChatFormat(no_thinking=True),
    "glm4v": ChatFormat(system="string"),
    "llava": ChatFormat(images_first=True, write_bos=True),
    "llava_onevision": ChatFormat(images_first=True),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_of_a_model_is_found_when_it_is_loaded(tiny, name):
    assert tiny(name).chat_format == FORMATS[name]


def test_the_chat_format_is_part_of_the_fingerprint(tiny_dir):
    model = Gen2Embed(tiny_dir("llama"), device="cpu")
    before = fingerprint(model)
    template = model.processor.chat_template
    model.processor.chat_template = template.replace('"pin_date": false', '"pin_date": true')
    assert model.processor.chat_template != template
    assert fingerprint(model) != before


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_a_model_of_text_alone_refuses_images(tiny, pictures, name):
    model = tiny(name)
    assert not model.takes_images
    assert model.encode_query(["a fox", {"text": "a fox"}]).shape == (2, 32)
    for given in (pictures[0], {"text": "a fox", "image": pictures[0]}):
        with pytest.raises(Gen2EmbedError, match=rf"takes text alone \(model type '{name}'\).* 1 image"):
            model.encode_query([given])


def test_a_template_without_images_takes_a_prompt_as_well(tiny_dir):
    own = "{%- for m in messages -%}[{{ m['role'] }}]{{ m['content'] }}{%- endfor -%}{{ '[answer]' }}"
    model = Gen2Embed(tiny_dir("llama"), device="cpu", processor_kwargs={"chat_template": own}, prompt_mode="unime")
    assert model.render("fox", "query") == ("<|begin_of_text|>[user]fox\nSummary above sentence in one word:[answer]")


def refusal(folder: Path, **options) -> str:
    with pytest.raises(Gen2EmbedError) as error:
        Gen2Embed(folder, device="cpu", **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def copy(tiny_dir, tmp_path):
    """`copy(name)`: a copy of a tiny model that a test may change."""

    def made(name: str) -> Path:
        return Path(shutil.copytree(tiny_dir(name), tmp_path / name))

    return made


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_no_chat_template(copy, name):
    folder = copy(name)
    (folder / "chat_template.jinja").unlink()
    message = refusal(folder)
    assert "has no chat template" in message
    assert "instruction-tuned" in message
    assert "processor_kwargs={'chat_template': …}" in message


def test_no_format_fits(copy):
    folder = copy("llama")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    message = refusal(folder)
    assert "no chat format fits" in message
    assert "the user's text is not there once" in message


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_official_layout_is_for_the_families_of_the_paper(tiny_dir, saved, name):
    for folder in (tiny_dir(name), saved / _name(name)):
        message = refusal(folder, layout="official")
        assert f"layout='official' is not for models of type '{name}'" in message
        assert "llava_next, phi3_v, qwen2_5_vl, qwen2_vl, qwen3_vl" in message


def test_a_template_of_another_program_in_an_export(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "text-llama", tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert "was not written by Gen2Embed" in refusal(folder)


def test_a_header_of_a_later_version_in_an_export(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "text-llama", tmp_path / "model"))
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace('"write_bos"', '"later"', 1), encoding="utf-8")
    assert "update gen2embed" in refusal(folder)


def test_the_processor_needs_torchvision(tiny_dir, copy):
    """An image processor without a Pillow version, as Cohere2 Vision and three other families have it."""
    folder = copy("idefics3")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["image_processor_type"] = "Cohere2VisionImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if HAS_TORCHVISION:
        pytest.skip("torchvision is there")
    message = refusal(folder)
    assert "does not load without torchvision: pip install 'gen2embed[image]'" in message


@pytest.mark.slow
def test_a_package_that_a_processor_needs_is_named(copy):
    if importlib.util.find_spec("num2words") is not None or not HAS_TORCHVISION:
        pytest.skip("needs torchvision, and no num2words")
    folder = copy("idefics3")
    for path in folder.glob("*processor_config.json"):
        path.write_text(path.read_text().replace("Idefics3", "SmolVLM"))
    assert "pip install num2words" in refusal(folder)


def test_widths_are_not_limited_like_numbers_of_layers(tiny_dir, copy):
    """A width is no number of layers: Qwen's experts are wider than any model is deep."""
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "shared_expert_intermediate_size": 5632, "block_dim": 2560})
    )
    Gen2Embed(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 5632}))
    assert "num_experts is 5632" in refusal(folder)


def test_missing_video_part_is_written_for_where_torchvision_is(tiny, saved):
    compat.install()
    for name in ("glm4v", "internvl", "qwen3_5", "llava_onevision"):
        settings = json.loads((saved / name / "processor_config.json").read_text())
        kind = settings["video_processor"]["video_processor_type"]
        assert kind in dir(transformers), name
    assert "video_processor" not in json.loads((saved / "gemma3" / "processor_config.json").read_text())


@pytest.mark.parametrize("eos", ["<|eot_id|>", None])
def test_a_tokenizer_without_a_padding_token(copy, tmp_path, eos):
    """Llama's has none; what pads is hidden, so that a batch gives what each input alone gives."""
    folder = copy("llama")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"pad_token": None, "eos_token": eos, "bos_token": "<|begin_of_text|>"}
    path.write_text(json.dumps(settings))
    model = Gen2Embed(folder, device="cpu")
    assert model.tokenizer.pad_token == (eos or "<|begin_of_text|>")
    texts = ["a fox", "a much longer text about a red fox"]
    together = model.encode_query(texts)
    assert np.abs(together - np.stack([model.encode_query(text) for text in texts])).max() < 1e-5
    model.save_pretrained(str(tmp_path / "saved"))
    assert np.abs(Gen2Embed(tmp_path / "saved", device="cpu").encode_query(texts) - together).max() < 1e-6


def test_a_tokenizer_with_no_token_to_pad_with(copy):
    folder = copy("qwen3")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": None, "eos_token": None}))
    assert "no token to pad with" in refusal(folder)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "runs more than 200000 lines",
        ),
        ("{{ raise_exception('changed by hand') }}", "raises TemplateError: changed by hand; export the model again"),
    ],
)
def test_an_exported_template_that_was_changed_is_tried_once(exported, tmp_path, added, message):
    folder = shutil.copytree(exported("llama"), tmp_path / "model")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + added)
    with pytest.raises(Gen2EmbedError, match=message):
        Gen2Embed(folder, device="cpu")


def as_processors_have_it(folder, content):
    """Move a folder's chat template to the file that transformers reads for processors alone."""
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": content}))
    return folder


@pytest.mark.parametrize("form", ["text", "named", "list"])
def test_a_tokenizer_s_template_may_be_in_the_file_of_processors(tiny, copy, tmp_path, form):
    folder = copy("llama")
    own = (folder / "chat_template.jinja").read_text()
    named = [{"name": "default", "template": own}, {"name": "tools", "template": "x"}]
    forms = {"text": own, "named": {one["name"]: one["template"] for one in named}, "list": named}
    as_processors_have_it(folder, forms[form])
    model = Gen2Embed(folder, device="cpu")
    expected = tiny("llama").render("a fox", "query")
    assert model.render("a fox", "query") == expected
    assert expected.replace("a fox", "a red circle").split("\n")[0] in inspect_prompt(folder)
    model.save_pretrained(str(tmp_path / "saved"))
    assert Gen2Embed(tmp_path / "saved", device="cpu").render("a fox", "query") == expected


def test_a_tokenizer_s_own_template_comes_first(tiny, copy):
    folder = copy("llama")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ raise_exception('not this') }}"}))
    assert Gen2Embed(folder, device="cpu").render("a", "query") == tiny("llama").render("a", "query")
    own = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": own}))
    assert Gen2Embed(folder, device="cpu").render("a", "query") == tiny("llama").render("a", "query")


def test_a_template_file_that_holds_no_template_is_refused(copy):
    assert "neither a text nor texts with a name" in refusal(as_processors_have_it(copy("llama"), 7))


def test_whether_a_model_takes_images_is_seen_in_its_files(tiny_dir, exported, tmp_path):
    for name, expected in (("llama", "takes text alone"), ("qwen2_vl", ""), ("gemma3", "")):
        for folder in (tiny_dir(name), exported(name)):
            assert (text_alone(folder) == "") is (expected == "")
            assert expected in text_alone(folder)
    assert text_alone(resolve("gen2embed-mini")) == ""
    assert "takes text alone" in text_alone(tiny_dir("qwen2_vl"), gguf_file="a.gguf")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_dir("llama"))}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert "takes text alone" in text_alone(tmp_path)
