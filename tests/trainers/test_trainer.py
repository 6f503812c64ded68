"""`SahaTrainer` on tiny models: what reaches the model, what is trained, what is saved, what resuming gives."""

from __future__ import annotations

import io
import shutil
from functools import partial
from pathlib import Path

import datasets
import kills
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from PIL import Image
from safetensors.torch import load_file
from samples import sample_of
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from tiny_models import FAMILIES
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.families import FAMILIES as RECORDS
from gen2embed_mteb.embedder.model_folder.adapters import has_adapter, new_adapter
from gen2embed_mteb.embedder.prompts.strategies import REPRESENT_IMAGE, REPRESENT_TEXT, SYSTEM, strategy
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.storage.atomic import ForeignFileError
from trainers.batches.collation import CellReader
from trainers.batches.dataset import DatasetClusters
from trainers.batches.sampler import EpochOfSampler, SahaBatchSampler
from trainers.loss.saha_loss import SahaLoss
from trainers.output.figures import without_times
from trainers.recipe import SahaTrainingArguments
from trainers.trainer import SahaTrainer, roles_of

WORDS = ("red", "blue", "green", "grey", "black", "white", "pink", "brown")
CLUSTERS = DatasetClusters(("colours",), np.arange(8).reshape(4, 2), np.zeros(4, np.int64), 8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Eight pictures of noise, not square."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(8):
        pixels = random.integers(0, 255, (40, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def rows():
    """Queries of a picture and a text, candidates of text alone but for one."""
    query = [{"text": f"<|image_1|>\nWhich colour, {word}?\n", "image": [f"{n}.png"]} for n, word in enumerate(WORDS)]
    positive = [{"text": word * (number + 1), "image": []} for number, word in enumerate(WORDS)]
    positive[3]["image"] = ["3.png"]
    return datasets.Dataset.from_dict({"query": query, "positive": positive})


def model_of(directory, dora=None, **options):
    model = Gen2Embed(directory, device="cpu", **options)
    if dora is not None:
        torch.manual_seed(0)
        new_adapter(model[0].model, RECORDS[model[0].config.model_type].lora_targets, dora=dora)
    return model


def arguments(output, **options):
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "warmup_steps": 2, "learning_rate": 1e-3}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    settings |= {"batch_sampler": partial(SahaBatchSampler, sampling=CLUSTERS), "logging_steps": 1}
    return SahaTrainingArguments(output_dir=str(output), **(settings | options))


OWN = ("evaluator", "query_prompt_in_training", "card_section")


def trainer_of(model, output, rows, root, **options):
    own = {name: options.pop(name) for name in OWN if name in options}
    own |= {"images": ImageSource(root), "resize": "processor", "loss": SahaLoss(model, mini_batch_size=2)}
    return SahaTrainer(model, arguments(output, **options), rows, **own)


def adapter_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


# What reaches the model


def rendered(trainer, rows, column):
    batch = trainer.data_collator([rows[number] for number in range(4)])
    ids, mask = batch[f"{column}_input_ids"], batch[f"{column}_attention_mask"].bool()
    return [trainer.model.tokenizer.decode(row[kept]) for row, kept in zip(ids, mask, strict=True)]


def test_queries_are_trained_with_the_representation_prompt_candidates_without(tiny_dir, tmp_path, rows, root):
    trainer = trainer_of(model_of(tiny_dir("qwen2_vl")), tmp_path, rows, root)
    for text, word in zip(rendered(trainer, rows, "query"), WORDS, strict=False):
        assert text.startswith(
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        )
        assert text.endswith(f"Which colour, {word}?\n{REPRESENT_IMAGE}<|im_end|>\n<|im_start|>assistant\n")
    texts = rendered(trainer, rows, "positive")
    assert (
        texts[0] == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not [text for text in texts if REPRESENT_TEXT.strip() in text or REPRESENT_IMAGE.strip() in text]
    assert "<|image_pad|>" in texts[3]


def test_the_official_code_left_it_off_but_kept_the_system_prompt(tiny_dir, tmp_path, rows, root):
    model = model_of(tiny_dir("qwen2_vl"))
    trainer = trainer_of(model, tmp_path, rows, root, query_prompt_in_training=False)
    for text, word in zip(rendered(trainer, rows, "query"), WORDS, strict=False):
        assert text.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
        assert text.endswith(f"Which colour, {word}?\n<|im_end|>\n<|im_start|>assistant\n")


def test_a_prompt_whose_sides_differ_otherwise_cannot_be_trained_as_the_official_code_did():
    columns = ("query", "positive", "negative_1")
    roles = {"query": "query", "positive": "document", "negative_1": "document"}
    assert roles_of(columns, strategy("hierarchical")) == roles
    official = roles_of(columns, strategy("hierarchical"), query_prompt_in_training=False)
    assert set(official.values()) == {"document"}
    for name in ("system-q", "qd-rein"):
        with pytest.raises(ValueError, match=f"with the prompt {name!r}: its queries differ"):
            roles_of(columns, strategy(name), query_prompt_in_training=False)


def test_roles_of_the_users_own_stay(tiny_dir, tmp_path, rows, root):
    model = model_of(tiny_dir("qwen2_vl"))
    own = {"query": "document", "positive": "query"}
    trainer = trainer_of(model, tmp_path, rows, root, router_mapping=own)
    assert rendered(trainer, rows, "positive")[0].endswith(f"red{REPRESENT_TEXT}<|im_end|>\n<|im_start|>assistant\n")


def test_a_square_of_448_pixels_arrives(tiny_dir, tmp_path, rows, root):
    """32 x 32 patches of 14 pixels, whatever the picture's shape; the tiny processor's own limit is raised for it."""
    model = model_of(tiny_dir("qwen2_vl"))
    model.processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1280}
    trainer = SahaTrainer(model, arguments(tmp_path), rows, images=ImageSource(root))
    batch = trainer.data_collator([rows[0], rows[3]])
    assert batch["query_image_grid_thw"].tolist() == [[1, 32, 32]] * 2
    assert batch["positive_image_grid_thw"].tolist() == [[1, 32, 32]]
    picture = trainer.data_collator.preprocess_fn.content(rows[0]["query"]).images[0]
    assert picture.size == (448, 448)
    with Image.open(root / "0.png") as original:
        assert np.array_equal(picture, original.resize((448, 448), Image.Resampling.BICUBIC))


def test_every_form_of_a_cell_is_the_same_input(tiny_dir, root, tmp_path):
    reader = CellReader(model_of(tiny_dir("qwen2_vl")), ImageSource(root))
    data = (root / "1.png").read_bytes()
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
    stored = {"bytes": data, "path": None}
    from_datasets = datasets.Dataset.from_dict({"image": [str(root / "1.png")]}).cast_column("image", datasets.Image())
    forms = [picture, stored, {"bytes": None, "path": "1.png"}, from_datasets[0]["image"]]
    forms += [{"text": None, "image": form} for form in (picture, stored, "1.png", ["1.png"])]
    forms += [{"image": "1.png"}, {"text": None, "images": ["1.png"]}]
    want = reader.content(picture)
    assert all(reader.content(form) == want for form in forms)
    assert reader.content("1.png").text == "1.png"  # a string is text
    assert reader.content({"text": "red", "image": None}).images == ()
    features = reader(["red", stored], task="document")
    assert len(features["input_ids"]) == 2
    assert len(features["image_grid_thw"]) == 1


def test_a_picture_outside_of_the_folder_is_refused(tiny_dir, root, tmp_path):
    model = model_of(tiny_dir("qwen2_vl"))
    (tmp_path / "inside").mkdir()
    reader = CellReader(model, ImageSource(tmp_path / "inside"))
    with pytest.raises(ImageError, match="leads outside"):
        reader.content({"image": str(root / "1.png")})
    with pytest.raises(TypeError, match=r'"image" must be a PIL image or a path, got int: 3'):
        reader.content({"image": 3})
    with pytest.raises(ValueError, match=r"resize is 'square'; known: processor"):
        ImageOptions(resize="square")


def test_the_length_in_training_is_not_the_models_own(tiny_dir):
    model = model_of(tiny_dir("qwen2_vl"))
    own = model.max_seq_length
    text = "many words " * 500
    assert CellReader(model, max_length=90)([text])["input_ids"].shape == (1, 90)
    assert (
        CellReader(model, max_length=own + 1)([text])["input_ids"].shape == CellReader(model)([text])["input_ids"].shape
    )
    assert model.max_seq_length == own


def test_rows_are_padded_on_the_right_and_sub_batches_cut_to_their_own_width(tiny_dir, tmp_path, root):
    """Stock left padding runs a sub-batch of short texts at the width of the batch's longest row."""
    texts = ["a", "b", "a long text of many words " * 10, "c"]
    rows = datasets.Dataset.from_dict({"query": [{"text": text} for text in texts], "positive": ["d", "e", "f", "g"]})
    model = model_of(tiny_dir("qwen2_vl"), dora=False)
    trainer = trainer_of(model, tmp_path, rows, root, batch_sampler="batch_sampler")
    batch = trainer.data_collator(list(rows))
    mask = batch["query_attention_mask"]
    assert (mask.diff(dim=1) <= 0).all()
    own = [int(mask[start : start + 2].sum(dim=1).max()) for start in (0, 2)]
    assert own[1] == mask.shape[1] > own[0] + 50
    seen = []
    hook = model[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]["input_ids"].shape[1]))
    trainer.compute_loss(model, trainer._prepare_inputs(batch))
    hook.remove()
    assert seen[:2] == own


# What is trained


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_sit_on_every_layer_of_the_language_model_alone(tiny_dir, family, dora):
    model = model_of(tiny_dir(family), dora=dora)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    targets = RECORDS[family].lora_targets
    kinds = ("lora_A", "lora_B", *(["lora_magnitude_vector"] if dora else []))
    assert len(trained) == 2 * len(targets) * len(kinds)  # two layers
    assert all("language_model.layers." in name and "lora_" in name for name in trained)
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in trained} == set(targets)


def test_the_adapter_is_the_recipes(tiny_dir):
    model = model_of(tiny_dir("qwen2_vl"), dora=True, model_kwargs={"dtype": torch.bfloat16})
    config = model[0].model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (8, 64, 0.1, True)
    assert config.init_lora_weights == "gaussian"
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32}
    assert model[0].model.language_model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16


def test_memory_is_pinned_where_there_is_an_accelerator_to_pin_it_for(tmp_path):
    arguments = SahaTrainingArguments(output_dir=str(tmp_path))
    assert arguments.dataloader_pin_memory == torch.accelerator.is_available()
    assert not SahaTrainingArguments(output_dir=str(tmp_path), dataloader_pin_memory=False).dataloader_pin_memory


def test_the_stock_trainer_does_not_look_for_examples_that_the_card_does_not_show(
    tiny_dir, tmp_path, rows, root, capfd
):
    texts = datasets.Dataset.from_dict({"query": list(WORDS), "positive": list(WORDS)})
    for dataset in (rows, texts):
        model = model_of(tiny_dir("qwen2_vl"))
        trainer_of(model, tmp_path, dataset, root)
        assert model.model_card_data.widget == []
    assert "widget examples" not in capfd.readouterr().err


def test_targets_that_match_nothing_are_refused(tiny_dir):
    model = model_of(tiny_dir("qwen2_vl"))
    for target in ("query_key_value", "fc1"):  # the second is a layer of the vision tower
        with pytest.raises(
            ValueError, match=rf"adapter target {target!r} matches no layer of Qwen2VLModel's .* q_proj"
        ):
            new_adapter(model[0].model, ["q_proj", target])
    assert not has_adapter(model[0].model)
    new_adapter(model[0].model, ["q_proj"])
    with pytest.raises(ValueError, match="has an adapter already; merge it first"):
        new_adapter(model[0].model, ["q_proj"])


@pytest.mark.parametrize("dora", [False, True])
def test_training_changes_the_adapter_and_nothing_else(tiny_dir, tmp_path, rows, root, dora):
    model = model_of(tiny_dir("qwen2_vl"), dora=dora)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer_of(model, tmp_path, rows, root, warmup_steps=0).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(adapter_of(model))
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def gradients(model, trainer, rows):
    torch.manual_seed(3)
    model.train()
    model.zero_grad()
    trainer.compute_loss(model, trainer._prepare_inputs(trainer.data_collator([rows[n] for n in range(4)]))).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_gradient_checkpointing_changes_no_gradient(tiny_dir, tmp_path, rows, root):
    model = model_of(tiny_dir("qwen2_vl"), dora=True)
    trainer = trainer_of(model, tmp_path, rows, root)
    plain = gradients(model, trainer, rows)
    model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    checkpointed = gradients(model, trainer, rows)
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], rtol=1e-5, atol=1e-7), name


def test_training_in_bfloat16(tiny_dir, tmp_path, rows, root):
    model = model_of(tiny_dir("qwen2_vl"), dora=True, model_kwargs={"dtype": torch.bfloat16})
    before = adapter_of(model)
    trainer = trainer_of(model, tmp_path, rows, root, bf16=True, activation_checkpointing=True)
    assert np.isfinite(trainer.train().training_loss)
    assert np.abs(np.linalg.norm(model.eval().encode_query(WORDS), axis=1) - 1).max() < 1e-6
    after = adapter_of(model)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_columns_that_would_be_mixed_up_are_refused(tiny_dir, tmp_path):
    rows = datasets.Dataset.from_dict({"query": ["a"], "negative": ["b"], "negative_1": ["c"]})
    with pytest.raises(ValueError, match="columns 'negative' and 'negative_1' would be mixed up"):
        SahaTrainer(model_of(tiny_dir("qwen2_vl")), arguments(tmp_path), rows)


# What is saved, and resumed


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["lora", "dora"])
@pytest.mark.slow
def test_resumed_training_is_uninterrupted_training_bit_for_bit(tiny_dir, tmp_path, rows, root, dora):
    """Six steps of two epochs and a half; the checkpoint is in the middle of the second."""
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3}
    whole = model_of(tiny_dir("qwen2_vl"), dora=dora)
    logs = trainer_of(whole, tmp_path / "run", rows, root, **options)
    logs.train()
    resumed = model_of(tiny_dir("qwen2_vl"), dora=dora)
    torch.manual_seed(11)  # another process has drawn other numbers
    with torch.no_grad():
        for name, parameter in resumed.named_parameters():
            if "lora_" in name:
                parameter.uniform_()
    again = trainer_of(resumed, tmp_path / "again", rows, root, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert again.state.global_step == logs.state.global_step == 6
    want, got = adapter_of(whole), adapter_of(resumed)
    start = adapter_of(model_of(tiny_dir("qwen2_vl"), dora=dora))
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert all(not torch.equal(want[name], start[name]) for name in want)
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (logs, again)]
    assert losses[0] == losses[1]


class Countdown(BaseEvaluator):
    """A figure that gets worse with every step: the first evaluation is of the best model."""

    name, primary_metric = "countdown", "countdown_score"

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        torch.rand(3)  # an evaluation draws numbers; training goes on as if it had not
        metrics = {"countdown_score": 1 / (1 + steps)}
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics


@pytest.mark.parametrize(
    "options",
    [
        {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 1, "logging_steps": 4},
        pytest.param(
            {"eval_strategy": "epoch", "save_steps": 1, "logging_strategy": "epoch"}, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_steps": 3, "gradient_accumulation_steps": 2},
            marks=pytest.mark.exhaustive,
        ),
        {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "logging_steps": 3, "eval_on_start": True}
        | {"load_best_model_at_end": True, "metric_for_best_model": "countdown_score", "greater_is_better": True}
        | {"save_total_limit": 2, "per_device_train_batch_size": 2, "include_num_input_tokens_seen": "all"},
    ],
    ids=["steps", "epochs", "saved by epochs", "best"],
)
@pytest.mark.slow
def test_a_run_that_goes_on_at_any_checkpoint_ends_in_the_same_files(tiny_dir, tmp_path, rows, root, options):
    """State, card, metrics and model; the last step is within an epoch."""

    def run(checkpoint=None):
        model = model_of(tiny_dir("qwen2_vl"), dora=True)
        settings = {"num_train_epochs": 2.5, "save_strategy": "steps", "evaluator": Countdown(), **options}
        trainer = trainer_of(model, tmp_path / "run", rows, root, **settings)
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        return without_times(outcome.metrics), outcome.training_loss, trainer.state.log_history

    want = run()
    files = kills.content(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    steps = sorted(int(path.name.rpartition("-")[2]) for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert len(steps) >= 2
    for step in sorted({*steps[1::2], steps[-1]}):  # ends of epochs, and the last one
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        (tmp_path / "run" / "model.safetensors").unlink()
        for later in steps:
            if later > step:
                shutil.rmtree(tmp_path / "run" / f"checkpoint-{later}")
        assert run(checkpoint=True) == want
        assert kills.differences(files, kills.content(tmp_path / "run")) == []


def test_only_our_own_checkpoints_are_deleted(tiny_dir, tmp_path, rows, root):
    """The stock trainer deletes whatever folder is called checkpoint-…"""
    for name in ("checkpoint-1000", "checkpoint-0", "checkpoint-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2, "save_total_limit": 1}
    trainer_of(model_of(tiny_dir("qwen2_vl"), dora=True), tmp_path, rows, root, **options).train()
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert left == {"checkpoint-1000", "checkpoint-0", "checkpoint-old", "checkpoint-4"}
    assert all((tmp_path / name / "mine").read_text() == "mine" for name in ("checkpoint-1000", "checkpoint-0"))


def test_a_model_of_others_is_not_replaced(tiny_dir, tmp_path, rows, root):
    shutil.copytree(tiny_dir("qwen2_vl"), tmp_path / "run")
    before = kills.content(tmp_path / "run")
    trainer = trainer_of(model_of(tiny_dir("qwen2_vl"), dora=True), tmp_path / "run", rows, root)
    with pytest.raises(ForeignFileError, match="was not written by gen2embed"):
        trainer.save_model()
    after = {name: digest for name, digest in kills.content(tmp_path / "run").items() if not name.startswith(".")}
    assert after == before


def test_a_checkpoint_without_an_optimizer_is_no_place_to_go_on(tiny_dir, tmp_path, rows, root):
    options = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer_of(model_of(tiny_dir("qwen2_vl"), dora=True), tmp_path, rows, root, **options).train()
    again = trainer_of(model_of(tiny_dir("qwen2_vl"), dora=True), tmp_path, rows, root, **options)
    with pytest.raises(ValueError, match="was saved with save_only_model"):
        again.train(resume_from_checkpoint=True)


def test_a_best_checkpoint_that_is_damaged_is_an_error(tiny_dir, tmp_path, rows, root):
    """The stock trainer logs it, and hands the last model out as the best one."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "countdown_score", "greater_is_better": True}
    trainer = trainer_of(
        model_of(tiny_dir("qwen2_vl"), dora=True), tmp_path, rows, root, evaluator=Countdown(), **options
    )

    class Damaging(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                (tmp_path / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"")

    trainer.add_callback(Damaging())
    with pytest.raises(ValueError, match="checkpoint-1 is no whole checkpoint: adapter_model"):
        trainer.train()


def test_a_checkpoint_is_the_adapter_alone_and_every_key_is_checked(tiny_dir, tmp_path, rows, root):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    model = model_of(tiny_dir("qwen2_vl"), dora=True)
    trainer_of(model, tmp_path, rows, root, **options).train()
    checkpoint = tmp_path / "checkpoint-1"
    stored = load_file(checkpoint / "adapter_model.safetensors")
    assert len(stored) == len(adapter_of(model))
    assert not (checkpoint / "model.safetensors").exists()
    assert np.array_equal(Gen2Embed(checkpoint).encode_query(["red"]), model.eval().encode_query(["red"]))
    other = trainer_of(model_of(tiny_dir("qwen2_vl"), dora=False), tmp_path / "lora", rows, root, **options)
    with pytest.raises(ValueError, match=r"does not fit Qwen2VLModel: 0 missing .*, \d+ unexpected keys"):
        other.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("family", sample_of(FAMILIES, ["qwen2_vl", "llava_next"]))
@pytest.mark.slow
def test_the_saved_model_gives_the_vectors_it_was_trained_to(tiny_dir, tmp_path, rows, root, family):
    model = model_of(tiny_dir(family), dora=True)
    trainer = trainer_of(model, tmp_path, rows, root, max_steps=1, learning_rate=1e-2, warmup_steps=0)
    untrained = model.eval().encode_query(["red"])
    trainer.train()
    trainer.save_model()
    inputs = [{"text": "red"}, {"text": "Which?", "image": Image.open(root / "2.png")}]
    want = model.eval().encode_query(inputs)
    assert np.abs(want[0] - untrained).max() > 1e-3
    for load in (Gen2Embed, SentenceTransformer, lambda path: Gen2Embed(Path(path) / "adapter")):
        assert np.abs(load(str(tmp_path)).encode_query(inputs) - want).max() < 1e-5


def test_a_model_without_an_adapter_is_trained_and_resumed_whole(tiny_dir, tmp_path, rows, root):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    model = model_of(tiny_dir("qwen2_vl"))
    trainer_of(model, tmp_path / "run", rows, root, **options).train()
    resumed = model_of(tiny_dir("qwen2_vl"))
    again = trainer_of(resumed, tmp_path / "again", rows, root, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    got = resumed.state_dict()
    assert all(torch.equal(value, got[name]) for name, value in model.state_dict().items())


def test_the_card_tells_of_data_and_recipe(tiny_dir, tmp_path, rows, root):
    model = model_of(tiny_dir("qwen2_vl"), dora=True)
    model.model_card_data.train_datasets = [{"name": "colours (original)"}]
    trainer = trainer_of(model, tmp_path, rows, root, max_steps=1, card_section="### Hard Negatives\n\n- Method: saha")
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    for expected in ("colours (original)", "SahaLoss", '"mask_equal_positives": true', "`learning_rate`: 0.001"):
        assert expected in card
    assert card.index("### Hard Negatives") < card.index("### Framework Versions")
    assert "generated_from_trainer" in card
    # The usage snippet shows a query as a user passes it, with its picture beside the card.
    assert "'image': 'assets/image_0.jpg'}" in card
    assert "    'red'," in card
    assert Image.open(tmp_path / "assets" / "image_0.jpg").size == (90, 40)


def test_the_epoch_reaches_a_sampler_that_accelerate_wrapped_twice(tiny_dir, tmp_path, rows, root):
    """Several processes that resume within an epoch: the stock loop tells the outer wrapper only."""
    trainer = trainer_of(model_of(tiny_dir("qwen2_vl")), tmp_path, rows, root)
    sampler = SahaBatchSampler(rows, 4, sampling=CLUSTERS, num_processes=1)
    wrapped = SkipBatchSampler(BatchSamplerShard(sampler, num_processes=1, process_index=0), skip_batches=1)
    trainer.callback_handler.train_dataloader = DataLoader(rows, batch_sampler=wrapped)
    trainer.state.epoch = 1.5
    EpochOfSampler(trainer).on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert sampler.epoch == 1
