"""`gen2embed inspect-prompt`: what it prints is what the model reads, without its weights."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image
from tiny_any import ANY, TEXT_ONLY

from gen2embed_mteb.cli import main
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.inspection.prompt_inspection import TEXT, inspect_prompt

PICTURE = Image.new("RGB", (56, 56), "teal")
GIVEN = {
    "a text": TEXT,
    "an image": PICTURE,
    "an image and a text": {"text": TEXT, "image": PICTURE},
    "two images and a text": {"text": TEXT, "image": [PICTURE, PICTURE]},
}


def shown(page: str) -> dict[str, str]:
    """The renderings on a page, by heading."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in page.split("\n"):
        if line.startswith(("query, ", "document, ")):
            heading = line.removesuffix(":")
            found[heading] = []
        elif heading and line.startswith("    "):
            found[heading].append(line[4:])
    return {heading: "\n".join(lines) for heading, lines in found.items()}


@pytest.mark.parametrize("name", [*ANY, "qwen2_vl", "llava_next"])
def test_the_page_shows_what_the_model_reads(tiny, tiny_dir, name):
    page = shown(inspect_prompt(tiny_dir(name)))
    kinds = ["a text"] if name in TEXT_ONLY else list(GIVEN)
    assert set(page) == {f"{side}, {kind}" for side in ("query", "document") for kind in kinds}
    for heading, text in page.items():
        side, _, kind = heading.partition(", ")
        assert text == tiny(name).render(GIVEN[kind], side), heading


def test_no_weights_are_read(tiny_dir, tmp_path):
    folder = shutil.copytree(tiny_dir("gemma3"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert "type gemma3, images and text" in inspect_prompt(folder)


def test_an_export_is_read_back(tiny, tmp_path):
    tiny("llama").save_pretrained(str(tmp_path / "model"))
    page = inspect_prompt(tmp_path / "model")
    assert "prompt: hierarchical" in page
    assert "- The format was read from the exported template." in page
    other = shown(inspect_prompt(tmp_path / "model", prompt_mode="d-rein"))
    assert other["query, a text"] == tiny("llama", prompt_mode="d-rein").render(TEXT, "query")


def test_the_command_prints_the_format_and_why(tiny_dir, capsys):
    assert main(["inspect-prompt", str(tiny_dir("llava")), "--prompt-mode", "none"]) == 0
    page = capsys.readouterr().out
    assert "(type llava, images and text)\nprompt: none\nchat format: {" in page
    assert "- The template moves images out of the text: MMEB's marks <|image_1|> in the text are lost." in page
    assert "- '<s>' is written first: the tokenizer would add it, the template does not." in page
    assert "under the strategy none the template says by itself: nothing" in page


def test_what_the_template_says_by_itself(tiny_dir, tmp_path):
    folder = shutil.copytree(tiny_dir("qwen3"), tmp_path / "model")
    path = folder / "chat_template.jinja"
    first = "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\\nBe nice.<|im_end|>\\n' }}{%- endif -%}"
    path.write_text(first + path.read_text())
    page = inspect_prompt(folder, prompt_mode="none")
    assert "under the strategy none the template says by itself: 'Be nice.'" in page
    assert shown(page)["query, a text"].startswith("<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\n")


def test_a_model_without_a_template_is_refused(tiny_dir, tmp_path, capsys):
    folder = shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(Gen2EmbedError, match="has no chat template"):
        inspect_prompt(folder)
    assert main(["inspect-prompt", str(folder)]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_a_template_that_begins_like_one_of_ours_is_a_model_s_own(tiny_dir, tmp_path):
    folder = shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    path = folder / "chat_template.jinja"
    path.write_text('{%- set prompt = {"a": 1} -%}\n' + path.read_text())
    assert inspect_prompt(folder).splitlines()[1:] == inspect_prompt(tiny_dir("llama")).splitlines()[1:]


@pytest.mark.parametrize("mode", ["freeret", "lens"])
@pytest.mark.parametrize("name", ["qwen2_vl", "llava", "llama"])
def test_the_texts_of_a_dataset(tiny, tiny_dir, capsys, name, mode):
    model = tiny(name, prompt_mode=mode)
    assert main(["inspect-prompt", str(tiny_dir(name)), "--prompt_mode", mode, "--dataset", "n24news"]) == 0
    page = capsys.readouterr().out.removesuffix("\n")
    assert f"prompt: {mode}\nquery of n24news: a news photo with its text\n" in page
    kinds = ["a text"] if name in TEXT_ONLY else list(GIVEN)
    for side in ("query", "document"):
        for kind in kinds:
            expected = model.render(GIVEN[kind], side, model.prompts[f"N24News:{side}"])
            assert shown(page)[f"{side}, {kind}"] == expected
            assert "topic of the news" in expected
    usual = inspect_prompt(tiny_dir(name), prompt_mode=mode)
    assert "aspect of any dataset: the meaning" in usual
    assert shown(usual)["query, a text"] == model.render(TEXT, "query")


def test_a_dataset_or_a_strategy_without_slots_is_refused(tiny_dir):
    with pytest.raises(Gen2EmbedError, match="did you mean 'N24News'"):
        inspect_prompt(tiny_dir("llama"), prompt_mode="lens", dataset="N24")
    with pytest.raises(Gen2EmbedError, match="'hierarchical' has no slots for a task"):
        inspect_prompt(tiny_dir("llama"), dataset="N24News")
