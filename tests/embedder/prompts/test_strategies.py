"""Rendered prompts, character by character, against a reading of the paper (Sec. III-B, Tables III and IV)."""

from __future__ import annotations

import hashlib
import re
from itertools import product

import pytest
from PIL import Image
from tiny_models import FAMILIES

from gen2embed_mteb import Gen2Embed, HierarchicalPrompt
from gen2embed_mteb.embedder.families import FAMILIES as RECORDS
from gen2embed_mteb.embedder.families import chat_template, prompt_of
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.model_folder.compat import install
from gen2embed_mteb.embedder.prompts.strategies import STRATEGIES, TABLE_IV, TASK_STRATEGIES, strategy
from gen2embed_mteb.errors import Gen2EmbedError

install()  # a stock processor without torchvision
PICTURE = Image.new("RGB", (64, 64), "teal")

# The texts, typed from the paper: (system of queries, of candidates, text-only query, query with image, … candidate).
S = "Given an image, summarize the provided image in one word. Given only text, describe the text in one word."
T, I = "\nRepresent the given text in one word.", "\nRepresent the given text/image in one word."  # noqa: E741
T_NO_OW, I_NO_OW = "\nRepresent the given text.", "\nRepresent the given text/image."
UNIME = "\nSummary above sentence in one word:", "\nSummary above image in one word:"
E5_V = "\nSummary above sentence in one word: ", "\nSummary above image in one word: "
VLADVA = "\nSummarize the provided text in one word:", "\nSummarize the provided image in one word:"
TEXTS = {
    "none": ("", "", "", "", "", ""),
    "system-q": (S, "", "", "", "", ""),
    "system-d": ("", S, "", "", "", ""),
    "system": (S, S, "", "", "", ""),
    "hierarchical": (S, S, T, I, "", ""),
    "d-rein": (S, S, "", "", T, I),
    "qd-rein": (S, S, T, I, T, I),
    "unime": ("", "", *UNIME, *UNIME),
    "e5-v": ("", "", *E5_V, *E5_V),
    "unime-readme": ("", "", *E5_V, *E5_V),
    "vladva": ("", "", *VLADVA, *VLADVA),
    **{
        f"{system}+q:{query}+d:{document}": (
            *({"sys": (S, S), "nosys": ("", "")}[system]),
            *({"off": ("", ""), "rep": (T_NO_OW, I_NO_OW), "rep-ow": (T, I)}[query]),
            *({"off": ("", ""), "rep": (T_NO_OW, I_NO_OW), "rep-ow": (T, I)}[document]),
        )
        for system, query, document in product(("sys", "nosys"), ("off", "rep", "rep-ow"), ("off", "rep", "rep-ow"))
    },
}
CUSTOM = {
    "quotes": ("say \"this\" and 'that'", "d", ' "q" ', " 'i' ", "", ""),
    "backslashes": ("C:\\new\\table \\", "\\u0041 \\x41", "\\n", "\\\\", "\\'", '\\"'),
    "newlines": ("\n\nfirst\r\nsecond\tthird\n", "\n", "\n\n", "\r", "\u2028", "\x85"),
    "emoji": ("🦊 représente 画像 ñ", "\U0001f9d1\u200d\U0001f680", "é", "e\u0301", "ß", "\x00\x07"),
    "jinja": ("{{ 7 * 7 }} {% set x = 1 %} {# gone #}", "-%} }}", "%}", "{%- endif -%}", "}} -%}\n", "{'a': 1}"),
}

# What the user passes, and how many images come with it.
SAMPLES = {
    "text": ("a red circle", 0),
    "image": ("", 1),
    "image and text": ("What is it?", 1),
    "two images": ("", 2),
    "two images and text": ("Which one?", 2),
}
ODDITIES = {
    "marker and image": ("<|image_1|>\nWhat is it?\n", 1),
    "marker without image": ("<|image_1|>\nFind a page about foxes.\n", 0),
    "marker in the middle": ("Look: <|image_1|> is it red?", 1),
    "marker at the end": ("Is it red? <|image_1|>", 1),
    "two markers, two images": ("<|image_1|> or <|image_2|>?", 2),
    "two markers, one image": ("<|image_1|> or <|image_2|>?", 1),
    "one marker, two images": ("A <|image_1|> B", 2),
    "the same marker twice": ("<|image_1|> and <|image_1|>", 2),
    "marker without image, in the middle": ("Look: <|image_1|> gone", 0),
    "trailing newline": ("a red circle\n", 0),
    "leading and trailing blanks": ("  \n a red circle \n\n ", 0),
    "no such marker": ("<|image_10|> <|image|> <image_1>", 0),
    "empty": ("", 0),
    "looks like Jinja": ("{{ messages }} {% if %}", 0),
    "looks like a number": ("007", 0),
}


def expected(family: str, texts: tuple[str, ...], role: str, text: str, images: int, *, bare: bool = False) -> str:
    """The conversation as method and template of the family have it; independent of `gen2embed_mteb`."""
    qwen = family != "llava_next"
    marker = ("<|image_pad|>" if bare else "<|vision_start|><|image_pad|><|vision_end|>") if qwen else "<image>"
    system = texts[0] if role == "query" else texts[1]
    suffix = texts[(2 if role == "query" else 4) + (images > 0)]
    pieces = re.split(r"<\|image_[1-9]\|>", text)
    if len(pieces) == 1:
        user = marker * images + text
    else:
        slots = [0] * (len(pieces) - 1)
        for number in range(images):  # one for each marker, the surplus at the last
            slots[min(number, len(slots) - 1)] += 1
        user = pieces[0] + "".join(marker * slot + piece for slot, piece in zip(slots, pieces[1:], strict=True))
    if not qwen:
        end = "[/INST]" if suffix.endswith(" ") else " [/INST]"  # one blank, as E5-V and UniME publish it
        return f"[INST] {system}\n{user}{suffix}{end}" if system else f"[INST] {user}{suffix}{end}"
    turn = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{turn}<|im_start|>user\n{user}{suffix}<|im_end|>\n<|im_start|>assistant\n"


def messages(text: str, images: int) -> list[dict]:
    content = [{"type": "image"}] * images + ([{"type": "text", "text": text}] if text else [])
    return [{"role": "user", "content": content}]


def sample(text: str, images: int) -> object:
    if not images:
        return text
    pictures = [PICTURE] * images if images > 1 else PICTURE
    return {"text": text, "image": pictures} if text else {"image": pictures}


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request, exported):
    """A family's name and the stock processor of its exported directory."""
    from transformers import AutoProcessor

    return request.param, AutoProcessor.from_pretrained(exported(request.param))


def test_every_strategy_has_the_texts_of_the_paper():
    assert set(STRATEGIES) == {*TEXTS, *TASK_STRATEGIES}
    assert TABLE_IV == ("none", "system-q", "system-d", "system", "qd-rein", "d-rein", "hierarchical")
    for name, texts in TEXTS.items():
        prompt = strategy(name)
        assert texts == (
            prompt.query_system,
            prompt.document_system,
            prompt.query_text,
            prompt.query_image,
            prompt.document_text,
            prompt.document_image,
        ), name


@pytest.mark.parametrize("mode", [*TABLE_IV, "unime", "e5-v", "vladva"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_gen2embed_renders_each_strategy(tiny, family, mode):
    model = tiny(family, prompt_mode=mode)
    for role, (text, images) in product(("query", "document"), SAMPLES.values()):
        assert model.render(sample(text, images), role) == expected(family, TEXTS[mode], role, text, images)


@pytest.mark.parametrize("mode", [*TABLE_IV, "unime"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_the_exported_processor_renders_each_strategy(exported, family, mode):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(exported(family, prompt_mode=mode))
    for role, (text, images) in product(("query", "document"), SAMPLES.values()):
        rendered = processor.apply_chat_template(messages(text, images), add_generation_prompt=True, task=role)
        assert rendered == expected(family, TEXTS[mode], role, text, images)


@pytest.mark.slow
def test_every_strategy_renders_every_sample_in_both_layouts(stock):
    family, processor = stock
    for mode, layout in product(TEXTS, ("native", "official")):
        template = chat_template(RECORDS[family], strategy(mode), layout)
        for role, (text, images) in product(("query", "document"), SAMPLES.values()):
            rendered = processor.apply_chat_template(
                messages(text, images), chat_template=template, add_generation_prompt=True, task=role
            )
            assert rendered == expected(family, TEXTS[mode], role, text, images, bare=layout == "official")


@pytest.mark.parametrize("name", ODDITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_oddities_of_mmeb(tiny, exported, family, name):
    from transformers import AutoProcessor

    text, images = ODDITIES[name]
    processor = AutoProcessor.from_pretrained(exported(family))
    for role in ("query", "document"):
        want = expected(family, TEXTS["hierarchical"], role, text, images)
        assert tiny(family).render(sample(text, images), role) == want
        assert processor.apply_chat_template(messages(text, images), add_generation_prompt=True, task=role) == want


@pytest.mark.parametrize("name", CUSTOM)
def test_texts_of_ones_own(stock, name):
    family, processor = stock
    prompt = HierarchicalPrompt(*CUSTOM[name])
    template = chat_template(RECORDS[family], prompt)
    assert prompt_of(template) == prompt
    for role, (text, images) in product(("query", "document"), SAMPLES.values()):
        rendered = processor.apply_chat_template(
            messages(text, images), chat_template=template, add_generation_prompt=True, task=role
        )
        assert rendered == expected(family, CUSTOM[name], role, text, images)


def test_golden_qwen_query_with_image(tiny):
    # The row of a visual question in MMEB, newline at its end included.
    row = {"text": "<|image_1|>\nRepresent the given image with the following question: What?\n", "image": PICTURE}
    assert tiny("qwen2_vl").render(row, "query") == (
        "<|im_start|>system\nGiven an image, summarize the provided image in one word. Given only text, describe the "
        "text in one word.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\nRepresent the "
        "given image with the following question: What?\n\nRepresent the given text/image in one word.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_golden_llava_query_and_candidate(tiny):
    assert tiny("llava_next").render("a red circle", "query") == (
        "[INST] Given an image, summarize the provided image in one word. Given only text, describe the text in one "
        "word.\na red circle\nRepresent the given text in one word. [/INST]"
    )
    assert tiny("llava_next", prompt_mode="none").render({"image": PICTURE}, "document") == "[INST] <image> [/INST]"


@pytest.mark.parametrize("mode", ["unime", "e5-v"])
def test_golden_llava_has_one_blank_before_the_end_of_the_turn(tiny, mode):
    model = tiny("llava_next", prompt_mode=mode)
    for role in ("query", "document"):
        assert model.render("a dog", role) == "[INST] a dog\nSummary above sentence in one word: [/INST]"
        assert model.render(PICTURE, role) == "[INST] <image>\nSummary above image in one word: [/INST]"
    # What the user ends with is the user's.
    assert tiny("llava_next", prompt_mode="none").render("a dog ", "query") == "[INST] a dog  [/INST]"


# SHA-256 of every strategy's renderings of SAMPLES on both sides, but for `unime` and `e5-v` of LLaVA-NeXT. `unime` had
# the texts of `unime-readme` when they were computed.
RENDERED = {
    "qwen": "ad7a9241d67b7a54551ee8825a7c21e7b875d5ed63a8da7198135affef0f887d",
    "llava_next": "c5fd0d6e44308f89676dd7fc0e95faf30f9b85b78b9806be75a462bf10cb1e19",
}


def test_renderings_stay_as_they_are_to_the_byte(stock):
    family, processor = stock
    digest = hashlib.sha256()
    for mode, (text, images), role in product(TEXTS, SAMPLES.values(), ("query", "document")):
        if mode == "unime-readme" or (mode in ("unime", "e5-v") and family == "llava_next"):
            continue
        template = chat_template(RECORDS[family], strategy("unime-readme" if mode == "unime" else mode))
        digest.update(
            processor.apply_chat_template(
                messages(text, images), chat_template=template, add_generation_prompt=True, task=role
            ).encode()
        )
    assert digest.hexdigest() == RENDERED["llava_next" if family == "llava_next" else "qwen"]


def test_golden_official_layout_has_a_bare_marker(tiny):
    assert tiny("qwen2_vl", prompt_mode="none", layout="official").render({"image": PICTURE}, "query") == (
        "<|im_start|>user\n<|image_pad|><|im_end|>\n<|im_start|>assistant\n"
    )


def test_golden_no_system_text_means_no_system_turn(tiny):
    # Qwen's own template would put in "You are a helpful assistant."
    assert tiny("qwen2_5_vl", prompt_mode="none").render("hi", "query") == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_refcoco_matching_candidates_are_rendered_as_queries(tiny):
    # Their instruction is a query's; evaluation encodes them with task="query", hence the representation prompt.
    text = "<|image_1|> Represent the portion of the image that follows the language expressions: a dog\n"
    for family in FAMILIES:
        rendered = tiny(family).render({"text": text, "image": PICTURE}, "query")
        assert rendered == expected(family, TEXTS["hierarchical"], "query", text, 1)
        assert "a dog\n\nRepresent the given text/image in one word." in rendered


def test_without_a_side_an_input_counts_as_a_candidate(tiny):
    for family, mode in product(FAMILIES, ("system-q", "system-d", "hierarchical", "d-rein")):
        model = tiny(family, prompt_mode=mode)
        assert model.render("a fox") == model.render("a fox", "document") != model.render("a fox", "query")


def test_numbered_markers_name_their_images(tiny, pictures):
    # "<|image_2|> … <|image_1|>": the second image comes first, in the text and among the pixels.
    model, texts = tiny("qwen2_vl"), ("<|image_2|> then <|image_1|>", "<|image_1|> then <|image_2|>")
    swapped = model.preprocess([{"text": texts[0], "image": pictures[:2]}])
    plain = model.preprocess([{"text": texts[1], "image": pictures[1::-1]}])
    assert (swapped["pixel_values"] == plain["pixel_values"]).all()
    assert (swapped["input_ids"] == plain["input_ids"]).all()


@pytest.mark.parametrize("name", ["Hierarchical", "HIERARCHICAL", "hierarchical"])
def test_names_are_found_in_any_case(name):
    assert strategy(name) == HierarchicalPrompt()
    assert strategy("qd_rein") == STRATEGIES["qd-rein"]


def test_an_unknown_mode_is_refused_with_the_known_ones(tiny_dir):
    from gen2embed_mteb import Gen2Embed

    with pytest.raises(ValueError, match=r"unknown prompt_mode 'hierarchicel'.*Did you mean 'hierarchical'") as error:
        strategy("hierarchicel")
    assert all(name in str(error.value) for name in STRATEGIES)
    with pytest.raises(ValueError, match="unknown prompt_mode 'nonsense'"):
        Gen2Embed(tiny_dir("qwen2_vl"), prompt_mode="nonsense")


def test_a_prompt_takes_strings_only():
    with pytest.raises(TypeError, match=r"HierarchicalPrompt.query_system must be a str, got None"):
        HierarchicalPrompt(query_system=None)


def test_names_of_prompts():
    assert HierarchicalPrompt().name == "hierarchical"
    assert HierarchicalPrompt(query_text="!").name == "custom"
    for name, prompt in STRATEGIES.items():
        assert STRATEGIES[prompt.name] == prompt, name  # two names may stand for the same texts


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next", "qwen3_vl"])
def test_a_prompt_that_is_set_later_is_that_of_a_model_loaded_with_it(family, tiny_dir):
    model = Gen2Embed(tiny_dir(family), device="cpu")
    before = model.encode_query(["a red circle"])
    for mode in ("none", "qd-rein", "e5-v"):
        model.set_prompt(mode)
        loaded = Gen2Embed(tiny_dir(family), device="cpu", prompt_mode=mode)
        assert (model.prompt_mode, fingerprint(model)) == (loaded.prompt_mode, fingerprint(loaded))
        for name in ("encode_query", "encode_document"):
            found, expected = (getattr(one, name)(["a red circle"]) for one in (model, loaded))
            assert (found == expected).all()
    model.set_prompt("hierarchical")
    assert (model.encode_query(["a red circle"]) == before).all()


def test_the_prompt_of_a_calibrated_model_stays(tiny_dir):
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    texts = [f"text {number}" for number in range(60)]
    model.calibrate(texts, texts)
    model.set_prompt("hierarchical")
    with pytest.raises(Gen2EmbedError, match="calibrated with its own prompt"):
        model.set_prompt("none")


def test_a_strategy_with_texts_per_dataset_needs_a_model_of_its_own(tiny_dir):
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    with pytest.raises(Gen2EmbedError, match="load the model again, with prompt_mode='lens'"):
        model.set_prompt("lens")
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", prompt_mode="freeret")
    with pytest.raises(Gen2EmbedError, match="texts per dataset"):
        model.set_prompt("none")
