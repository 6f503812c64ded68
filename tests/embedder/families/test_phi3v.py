"""Phi-3.5-V: pixels and tokens by slow oracles, the model against transformers' own Phi-3, batches of any mixture."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradients import gradients
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from tiny_phi3v import HIDDEN, TOWER, weights, write_phi3v
from torch.nn import functional

from gen2embed_mteb import Gen2Embed, cli
from gen2embed_mteb.embedder.families.phi3v.image_processing import (
    Phi3VImageProcessor,
    num_image_tokens,
    tiled_size,
)
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.model_folder.adapters import load_adapter, new_adapter, save_adapter
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.embedder.prompts.strategies import strategy
from gen2embed_mteb.errors import Gen2EmbedError
from trainers import SahaLoss, SahaTrainer
from trainers.recipe import OFFICIAL_TARGETS

PUBLISHED = os.environ.get("GEN2EMBED_PHI3V", "")
needs_published = pytest.mark.skipif(not PUBLISHED, reason="GEN2EMBED_PHI3V names no folder of reference values")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phi3v(tmp_path_factory.mktemp("phi3v") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Gen2Embed:
    return Gen2Embed(folder, device="cpu", processor_kwargs={"num_crops": 2})


# Pixels


@pytest.mark.parametrize(
    ("size", "at_4", "at_16"),
    [
        ((336, 336), 757, 2509),
        ((28, 28), 757, 2509),
        ((640, 480), 757, 1921),
        ((480, 640), 757, 1933),
        ((1000, 300), 601, 1909),
        ((300, 1000), 625, 1957),
        ((336, 1344), 781, 2557),
        ((1920, 1080), 757, 2353),
        ((2000, 100), 745, 2473),
        ((50, 8000), 781, 2653),
    ],
)
def test_published_numbers_of_tokens(size: tuple[int, int], at_4: int, at_16: int) -> None:
    assert (num_image_tokens(size, 1), num_image_tokens(size, 4), num_image_tokens(size, 16)) == (313, at_4, at_16)


def test_the_number_of_columns_is_the_largest_that_fits() -> None:
    random = np.random.default_rng(0)
    for _ in range(2000):
        low, high = sorted(random.integers(8, 3000, 2).tolist())
        most = int(random.integers(1, 30))
        ratio = high / low
        fitting = [s for s in range(1, most + 1) if s * math.ceil(s / ratio) <= most]
        width, height, whole = tiled_size((high, low), most)
        assert width == 336 * max(fitting)
        assert height == int(width / ratio)
        assert whole % 336 == 0
        assert 0 <= whole - height < 336
    assert tiled_size((210, 190), 1)[1] == 303  # in integers 304
    with pytest.raises(Gen2EmbedError, match="differ by 5000 to 1"):
        tiled_size((5000, 1), 4)


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (200, 40), (336, 336)])
def test_pixels_by_a_slow_oracle(size: tuple[int, int]) -> None:
    image, most = noise(*size), 3
    high = size[0] < size[1]
    turned = image.transpose(Image.Transpose.TRANSPOSE) if high else image
    width, height, whole = tiled_size(turned.size, most)
    canvas = np.full((whole, width, 3), 255, dtype=np.uint8)
    top = (whole - height) // 2
    canvas[top : top + height] = np.asarray(turned.resize((width, height), Image.Resampling.BILINEAR))
    if high:
        canvas = canvas.transpose(1, 0, 2)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = np.stack(
        [
            (canvas[..., c].astype(np.float32) / np.float32(255) - np.float32(mean[c])) / np.float32(std[c])
            for c in range(3)
        ]
    )
    found = Phi3VImageProcessor(num_crops=most)([image])
    rows, columns = pixels.shape[1] // 336, pixels.shape[2] // 336
    assert found["image_sizes"].tolist() == [[336 * rows, 336 * columns]]
    crops = found["pixel_values"][0].numpy()
    assert crops.shape == (most + 1, 3, 336, 336)
    for row in range(rows):
        for column in range(columns):
            tile = pixels[:, 336 * row : 336 * row + 336, 336 * column : 336 * column + 336]
            assert np.array_equal(crops[1 + row * columns + column], tile)
    assert not crops[1 + rows * columns :].any()
    whole_view = functional.interpolate(torch.from_numpy(pixels)[None], size=(336, 336), mode="bicubic")
    assert np.array_equal(crops[0], whole_view[0].numpy())


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "4"])
def test_a_number_of_crops_that_is_none(wrong: Any) -> None:
    with pytest.raises(Gen2EmbedError, match="num_crops is"):
        Phi3VImageProcessor(num_crops=wrong)


@needs_published
def test_published_digests_of_pixels() -> None:
    for name, wanted in json.loads(Path(PUBLISHED, "preprocessing.json").read_text()).items():
        picture, most = name.split("/")
        found = Phi3VImageProcessor(num_crops=int(most))(Image.open(Path(PUBLISHED, f"images/{picture}.png")))
        assert hashlib.sha256(found["pixel_values"][0].numpy().tobytes()).hexdigest() == wanted["sha256_float32"]
        assert found["num_img_tokens"] == [wanted["num_img_tokens"]]


# Tokens


def test_a_text_with_images_is_tokenized_in_pieces(model: Gen2Embed) -> None:
    processor, image = model.processor, noise(64, 64)
    text = "<|user|>\n<|image_1|>\na<|end|>\n<|assistant|>\n"
    ids = processor(text=text, images=[image], padding=True)["input_ids"][0]
    tokens = num_image_tokens((64, 64), 2)
    assert list(ids) == [1, 32010, 29871, 13, *[32044] * tokens, 1, 29871, 13, 29900, 32007, 29871, 13, 32001]
    plain = processor(text="<|user|>\na<|end|>\n<|assistant|>\n")["input_ids"][0]
    assert list(plain) == [1, 32010, 29871, 13, 29900, 32007, 29871, 13, 32001]


def test_images_go_where_their_numbers_are(model: Gen2Embed) -> None:
    images = [noise(64, 64, 0), noise(64, 64, 1)]
    features = model.processor(text="<|image_2|>a<|image_1|>a<|image_2|>", images=images, return_tensors="pt")
    alone = [model.processor.image_processor([image])["pixel_values"][0] for image in images]
    for found, number in zip(features["pixel_values"], (1, 0, 1), strict=True):
        assert torch.equal(found, alone[number])
    with torch.inference_mode():
        assert torch.isfinite(model[0].model(**features).last_hidden_state).all()


@pytest.mark.parametrize(
    ("text", "count", "said"),
    [
        ("<|image_2|>", 1, "numbered from 1 without gaps"),
        ("<|image_1|><|image_3|>", 2, "numbered from 1 without gaps"),
        ("<|image_1|>", 2, "2 images, but the texts have marks of 1"),
        ("a", 1, "1 images, but the texts have marks of 0"),
    ],
)
def test_marks_that_do_not_fit_the_images(model: Gen2Embed, text: str, count: int, said: str) -> None:
    with pytest.raises(Gen2EmbedError, match=said):
        model.processor(text=text, images=[noise(8, 8)] * count)


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    write_phi3v(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(Gen2EmbedError, match=r"becomes \[1, 32010, 13\]"):
        Gen2Embed(tmp_path, device="cpu")


@needs_published
def test_published_token_ids() -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(Path(PUBLISHED, "tiny_c"))
    for case in json.loads(Path(PUBLISHED, "tokenization.json").read_text()):
        images = [Image.new("RGB", tuple(size)) for size in case["image_sizes_wh"]]
        wanted = [32044 if token < 0 else token for token, count in case["input_ids_run_length"] for _ in range(count)]
        assert list(processor(text=case["text"], images=images or None)["input_ids"][0]) == wanted


# The prompt


@pytest.mark.parametrize(
    ("mode", "item", "wanted"),
    [
        ("unime", {"text": "A man."}, "<|user|>\nA man.\nSummary above sentence in one word:<|end|>\n<|assistant|>\n"),
        ("unime", {"image": 1}, "<|user|>\n<|image_1|>\nSummary above image in one word:<|end|>\n<|assistant|>\n"),
        (
            "unime-readme",
            {"image": 1},
            "<|user|>\n<|image_1|>\nSummary above image in one word: <|end|>\n<|assistant|>\n",
        ),
        (
            "hierarchical",
            {"text": "Which of <|image_1|> and <|image_2|>?", "image": 2},
            f"<|system|>\n{strategy('system').query_system}<|end|>\n<|user|>\nWhich of <|image_1|> and <|image_2|>?"
            "\nRepresent the given text/image in one word.<|end|>\n<|assistant|>\n",
        ),
    ],
)
def test_renderings(model: Gen2Embed, mode: str, item: dict[str, Any], wanted: str) -> None:
    images = [noise(8, 8)] * item.get("image", 0)
    before = model.prompt_mode
    model.set_prompt(mode)
    try:
        assert model.render({**item, **({"image": images} if images else {})}, "query") == wanted
    finally:
        model.set_prompt(before)


def test_control_tokens_of_users_do_not_act(model: Gen2Embed) -> None:
    hostile = "".join(token.content for token in model.tokenizer.added_tokens_decoder.values())
    for token in model.preprocess([hostile], task="query")["input_ids"][0].tolist():
        assert token < 32000 or token in (32006, 32007, 32010, 32001)
    ids = model.preprocess([hostile], task="query")["input_ids"][0].tolist()
    assert [ids.count(token) for token in (1, 32006, 32007, 32010, 32001, 32044)] == [1, 1, 2, 1, 1, 0]


# The model


def test_image_embeddings_by_a_slow_oracle(model: Gen2Embed) -> None:
    """Tiles, the separator, the global view; every row of a grid with its end; the states before the last layer."""
    from transformers.models.clip.modeling_clip import CLIPVisionModel

    features = model.processor.image_processor([noise(400, 100)], num_crops=3)
    (height, width) = features["image_sizes"][0].tolist()
    assert (height, width) == (336, 1008)
    inner = model[0].model
    given = weights()
    start = "model.vision_embed_tokens.img_processor.vision_model."
    tower = CLIPVisionModel(inner.config.tower_config()).eval()
    tower.load_state_dict({name.removeprefix(start): value for name, value in given.items() if name.startswith(start)})
    with torch.inference_mode():
        states = tower(features["pixel_values"][0], output_hidden_states=True).hidden_states[-2][:, 1:]
        found = inner.get_image_features(features["pixel_values"], features["image_sizes"]).pooler_output

    def block(crop: int, row: int, column: int) -> torch.Tensor:
        patches = [states[crop, (2 * row + i) * 24 + 2 * column + j] for i in (0, 1) for j in (0, 1)]
        return torch.cat(patches)

    separators = (given[f"model.vision_embed_tokens.{name}_GN"].reshape(-1) for name in ("glb", "sub"))
    between, end = separators
    tokens = []
    for row in range(12):
        tokens += [block(1 + tile, row, column) for tile in range(3) for column in range(12)] + [end]
    tokens.append(between)
    for row in range(12):
        tokens += [block(0, row, column) for column in range(12)] + [end]
    name = "model.vision_embed_tokens.img_projection"
    hidden = functional.linear(torch.stack(tokens), given[f"{name}.0.weight"], given[f"{name}.0.bias"])
    wanted = functional.linear(functional.gelu(hidden), given[f"{name}.2.weight"], given[f"{name}.2.bias"])
    assert len(wanted) == num_image_tokens((400, 100), 3)
    assert (found - wanted).abs().max() < 2e-6


@pytest.mark.parametrize("length", [5, 64, 65, 90])
def test_texts_are_those_of_phi_3_in_transformers(tmp_path: Path, length: int) -> None:
    from transformers import Phi3Config, Phi3Model

    ours = Gen2Embed(write_phi3v(tmp_path / "m", original_max=64), device="cpu")[0].model
    config = Phi3Config(
        **{"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2},
        max_position_embeddings=131072,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.2, 1.7, 2.5],
            "long_factor": [1.0, 3.0, 15.0, 60.0],
        },
    )
    theirs = Phi3Model(config).eval()
    given = {name.removeprefix("model."): value for name, value in weights().items()}
    theirs.load_state_dict({name: value for name, value in given.items() if name in theirs.state_dict()})
    ids = torch.randint(3, 32000, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found, wanted = (one(input_ids=ids).last_hidden_state for one in (ours, theirs))
    assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("side", ["query", "document"])
def test_rows_beside_longer_ones(tmp_path: Path, side: Any) -> None:
    """A row of 300 tokens has the long factors, and its neighbours still the short ones, in every way of encoding."""
    model = Gen2Embed(write_phi3v(tmp_path / "m", original_max=250), device="cpu")
    items = ["a", {"text": "a b c"}, "x " * 120, "long " * 70]
    encode = model.encode_query if side == "query" else model.encode_document
    alone = np.concatenate([encode([item]) for item in items])
    lengths = [model.preprocess([item], task=side)["input_ids"].shape[1] for item in items]
    assert lengths[1] <= 250 < lengths[-1]
    assert np.abs(encode(items) - alone).max() < 1e-5
    encoder = PrefixEncoder(model)
    for rows in ([0, 1], [0, 3], [1, 2, 3], [3]):
        given = [items[row] if isinstance(items[row], dict) else {"text": items[row]} for row in rows]
        batch = encoder.prepare(side, given)
        assert batch.num_shared == 0 if 3 in rows else batch.num_shared > 0
        assert np.abs(encoder.encode_prepared(side, batch) - alone[rows]).max() < 1e-5
    # What a common factor would do: the short row's vector turns.
    inner = model[0].model
    with torch.inference_mode():
        features = model.preprocess(["a"], task=side)
        right = inner(**{key: features[key] for key in ("input_ids", "attention_mask")}).last_hidden_state[0, -1]
        inner.language_model.rotary_emb.limit = 1
        wrong = inner(**{key: features[key] for key in ("input_ids", "attention_mask")}).last_hidden_state[0, -1]
        inner.language_model.rotary_emb.limit = 250
    assert functional.cosine_similarity(right, wrong, dim=0) < 0.999


def test_batched_is_single(model: Gen2Embed) -> None:
    items = ["a", noise(64, 64), {"text": "Which <|image_1|>?", "image": noise(90, 300)}, "a b " * 9]
    items += [{"text": "two", "image": [noise(30, 60), noise(300, 30)]}]
    for encode in (model.encode_query, model.encode_document):
        alone = np.concatenate([encode([item]) for item in items])
        assert np.abs(encode(items) - alone).max() < 1e-5
        assert np.abs(np.linalg.norm(alone, axis=1) - 1).max() < 1e-6
    encoder = PrefixEncoder(model)
    dicts = [{"text": "a"}, {"image": items[1]}, items[2], items[4]]
    vectors = encoder.encode_prepared("query", encoder.prepare("query", dicts))
    assert np.abs(vectors - model.encode_query(dicts)).max() < 1e-5


def test_text_is_cut_and_the_prompt_is_not(model: Gen2Embed) -> None:
    features = model.preprocess(["word " * 500], task="query", max_length=230)
    ids = features["input_ids"][0].tolist()
    assert len(ids) <= 230
    assert ids[-4:] == [32007, 29871, 13, 32001]
    image = {"image": noise(64, 64), "text": "word " * 500}
    assert model.preprocess([image], task="query", max_length=900)["input_ids"].shape[1] <= 900


def test_tokens_are_counted_as_they_are(model: Gen2Embed) -> None:
    items = [("a b", []), ("", [(64, 64)]), ("which", [(300, 80)]), ("two", [(64, 64), (64, 64)])]
    counts = model.count_tokens([text for text, _ in items], [sizes for _, sizes in items], "query")
    for (text, sizes), count in zip(items, counts, strict=True):
        given = {"text": text, "image": [noise(*size) for size in sizes]} if sizes else text
        assert abs(model.preprocess([given], task="query")["input_ids"].shape[1] - count) <= 2


# Loading


def test_weights_in_two_files_and_a_copy_of_the_embedding(folder: Path, model: Gen2Embed, tmp_path: Path) -> None:
    given = weights()
    copy = "model.vision_embed_tokens.wte.weight"
    given[copy] = given["model.embed_tokens.weight"].clone()
    names = sorted(given)
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    files = {name: f"model-0000{1 + (index % 2)}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: given[n] for n in names if files[n] == file}, str(tmp_path / file), metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    loaded = Gen2Embed(tmp_path, device="cpu", processor_kwargs={"num_crops": 2})
    assert np.array_equal(loaded.encode(["a"]), model.encode(["a"]))
    given[copy][7, 3] += 1
    save_file(
        {n: given[n] for n in names if files[n] == files[copy]}, str(tmp_path / files[copy]), metadata={"format": "pt"}
    )
    with pytest.raises(Gen2EmbedError, match=r"wte\.weight differs from the token embedding"):
        Gen2Embed(tmp_path, device="cpu")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_keys_must_be_those_of_the_model(tmp_path: Path, change: str) -> None:
    write_phi3v(tmp_path)
    given = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del given["model.vision_embed_tokens.sub_GN"]
    else:
        given["model.vision_embed_tokens.other.weight"] = torch.zeros(TOWER)
    save_file(given, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(Gen2EmbedError, match=r"sub_GN|other"):
        Gen2Embed(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embd_layer": {"hd_transform_order": "glb_sub"}}, "hd_transform_order is 'glb_sub'"),
        ({"img_processor": {"layer_idx": -1}}, "layer_idx is -1"),
        ({"rope_scaling": {"type": "yarn", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}}, "type is 'yarn'"),
    ],
)
def test_other_models_of_this_type_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Gen2EmbedError, match=said):
        Gen2Embed(write_phi3v(tmp_path, **changes), device="cpu")


def test_the_number_of_crops_is_part_of_the_fingerprint(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = {most: Gen2Embed(folder, device="cpu", processor_kwargs={"num_crops": most}) for most in (4, 16)}
    assert "num_crops" not in caplog.text
    assert found[16].processor.image_processor.num_crops == 16
    default = Gen2Embed(folder, device="cpu")
    assert "num_crops is 4, as its folder says; 16 is advised" in caplog.text
    assert fingerprint(default) == fingerprint(found[4]) != fingerprint(found[16])
    with pytest.raises(Gen2EmbedError, match=r"num_crops is a setting of Phi-3\.5-V"):
        Gen2Embed("gen2embed-mini", device="cpu", processor_kwargs={"num_crops": 4})


def test_export_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    model = Gen2Embed(folder, device="cpu")
    with pytest.raises(Gen2EmbedError, match="'phi3_v', for which transformers has no class, cannot be saved"):
        model.save_pretrained(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_stock_loaders_find_it_and_ask_nothing(folder: Path, model: Gen2Embed) -> None:
    code = """
import sys
from sentence_transformers import SentenceTransformer
from transformers import AutoImageProcessor, AutoModel, AutoProcessor
print(type(AutoImageProcessor.from_pretrained(sys.argv[1])).__name__)
print(type(AutoProcessor.from_pretrained(sys.argv[1])).__name__, type(AutoModel.from_pretrained(sys.argv[1])).__name__)
print(SentenceTransformer(sys.argv[1], device="cpu").encode(["a"]).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Phi3VImageProcessor", "Phi3VProcessor", "Phi3VModel", "(1,", f"{HIDDEN})"]
    assert "could not extend" not in done.stderr


# Adapters


@pytest.mark.parametrize(("targets", "modules"), [(None, 4 * 2), (OFFICIAL_TARGETS, 4 * 2 + 4 * 3)])
def test_adapters_and_the_published_names_of_their_weights(
    folder: Path, tmp_path: Path, targets: Any, modules: int
) -> None:
    model = Gen2Embed(folder, device="cpu")
    official = {"allow_missing": True, "everywhere": True} if targets else {}
    new_adapter(model[0].model, targets or model._family.lora_targets, **official)
    adapted = {name.partition(".lora_A")[0] for name, _ in model[0].model.named_parameters() if ".lora_A" in name}
    assert len(adapted) == modules
    assert any("vision_model" in name for name in adapted) == (targets is not None)
    with torch.no_grad():
        for name, parameter in model[0].model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    items = ["a", noise(64, 64)]
    wanted = model.encode_query(items)
    save_adapter(model[0].model, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    # As peft saves them when it wraps the published class, whose model has all parts side by side.
    renamed = {
        name.replace("base_model.model.", "base_model.model.model.", 1).replace("language_model.", ""): value
        for name, value in state.items()
    }
    assert not set(renamed) & set(state)
    save_file(renamed, str(tmp_path / "adapter_model.safetensors"), metadata={"format": "pt"})
    other = Gen2Embed(folder, device="cpu")
    assert np.abs(other.encode_query(items) - wanted).max() > 1e-3
    load_adapter(other[0].model, tmp_path)
    assert np.abs(other.encode_query(items) - wanted).max() < 1e-6


@pytest.mark.parametrize("original_max", [4096, 250])
def test_a_cached_step_has_the_gradients_of_the_stock_loss(tmp_path: Path, original_max: int) -> None:
    """Also where some rows of a mini-batch have the long factors, so that they cannot share their beginning."""
    model = Gen2Embed(write_phi3v(tmp_path, original_max=original_max), device="cpu").train()
    new_adapter(model[0].model, OFFICIAL_TARGETS, dropout=0.0, allow_missing=True, everywhere=True)
    queries, answers = ["a", "b c", {"image": noise(64, 64)}, "long " * 70], ["one", "two " * 3, "three", "four"]

    def features() -> list[dict[str, Any]]:
        return [model.preprocess(queries, task="query"), model.preprocess(answers, task="document")]

    stock = CachedMultipleNegativesRankingLoss(model, scale=50, mini_batch_size=2)
    wanted = gradients(model, stock(features(), None))
    found = gradients(model, SahaLoss(model, mini_batch_size=2, mask_equal_positives=False)(features()))
    assert any("vision_model" in name for name in wanted)
    assert found.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * largest, name


@pytest.mark.slow
def test_sampled_trained_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    """The result is the adapter, on the base model that it names."""
    rows = [{"query": f"Which colour, {word}?", "positive": word} for word in ("red", "blue", "green", "white")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--model_name", str(folder)]
    sample = ["sample", *model, "--num_crops", "2", "--data_dir", str(tmp_path / "train.jsonl"), "--columns", "query"]
    sample += ["positive", "--num_hard_negatives", "1", "--output_dir", str(tmp_path / "sampled")]
    assert cli.main(sample) == 0
    train = ["train", *model, "--processed_data_path", str(tmp_path / "sampled"), "--batch_size", "4", "--use_cpu"]
    train += ["--sub_batch_size", "2", "--max_steps", "2", "--lora_targets", "official", "--report_to", "none"]
    assert cli.main([*train, "--output_dir", str(tmp_path / "out")]) == 0
    trained = Gen2Embed(tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert any(".lora_A" in name and "vision_model" in name for name, _ in trained[0].model.named_parameters())
    assert np.abs(trained.encode_query(["red"]) - Gen2Embed(folder, device="cpu").encode_query(["red"])).max() > 1e-6


def test_all_weights_cannot_be_trained(folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    data = Dataset.from_list([{"query": "a", "positive": "b"}])
    model = Gen2Embed(folder, device="cpu")
    with pytest.raises(Gen2EmbedError, match=r"'phi3_v', .* cannot be saved, so that only an adapter can be trained"):
        SahaTrainer(model=model, train_dataset=data, loss=SahaLoss(model))


# The raw layout


def test_the_raw_layout_is_the_text_alone(folder: Path, tiny_dir: Any) -> None:
    for place, mark in (
        (folder, "<|image_1|>"),
        (tiny_dir("llava_next"), "<image>"),
        (tiny_dir("qwen2_vl"), "<|image_pad|>"),
    ):
        model = Gen2Embed(place, device="cpu", layout="raw")
        assert model.prompt_mode == "none"
        text = "<|image_1|>\nRepresent it.\n"
        assert model.render({"text": text, "image": noise(64, 64)}, "query") == f"{mark}\nRepresent it.\n"
        assert model.render("a b", "document") == "a b"
        assert model.render("a b", "query", "Find it: ") == "Find it: a b"
        model.set_prompt("unime")
        assert model.render("a b", "query") == "a b\nSummary above sentence in one word:"
        with pytest.raises(Gen2EmbedError, match=r"layout='raw' has no turns, and prompt_mode 'system'"):
            model.set_prompt("system")
        items = ["a b", {"text": text, "image": noise(64, 64)}, "a longer one"]
        alone = np.concatenate([model.encode_query([item]) for item in items])
        assert np.abs(model.encode_query(items) - alone).max() < 1e-5
        encoder = PrefixEncoder(model)
        dicts = [{"text": "a b"}, items[1], {"text": items[2]}]
        assert np.abs(encoder.encode_prepared("query", encoder.prepare("query", dicts)) - alone).max() < 1e-5


def test_the_raw_layout_of_phi_is_what_the_tokenizer_makes_of_the_text(model: Gen2Embed, folder: Path) -> None:
    raw = Gen2Embed(folder, device="cpu", layout="raw")
    ids = raw.preprocess(["a\n"], task="query")["input_ids"][0].tolist()
    assert ids == raw.tokenizer("a\n")["input_ids"] == [1, 29871, 29900, 13]


# Reference values


@needs_published
def test_published_vectors() -> None:
    cases = {case["name"]: case for case in json.loads(Path(PUBLISHED, "end_to_end.json").read_text())}
    model = Gen2Embed(
        Path(PUBLISHED, "tiny_c"), prompt_mode="unime", device="cpu", model_kwargs={"dtype": torch.float32}
    )
    given = {
        "unime_text": ("unime", "document", "A man is crossing the street with a red car parked nearby."),
        "unime_image": ("unime", "document", Image.open(Path(PUBLISHED, "images/wide.png"))),
        "hier_text_query": (
            *("hierarchical", "query"),
            "Find me an everyday image that matches the given caption: A cat.\n",
        ),
        "hier_text_candidate": ("hierarchical", "document", "tabby cat"),
    }
    assert set(given) == set(cases)
    for name, (mode, side, item) in given.items():
        model.set_prompt(mode)
        assert model.render(item, side) == cases[name]["text"]
        encode = model.encode_query if side == "query" else model.encode_document
        assert np.abs(encode([item])[0] - np.array(cases[name]["embedding"])).max() < 1.5e-6
