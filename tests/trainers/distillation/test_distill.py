"""`gen2embed distill` as people type it: what is learned, what is written, and what stays as it was to the last bit."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tiny_any import write_any

from gen2embed_mteb import Gen2Embed, cli
from gen2embed_mteb.errors import Gen2EmbedError
from trainers.distillation.distill import _student, distill, parse
from trainers.distillation.loss import DistillationLoss
from trainers.distillation.trainer import check_unchanged, digests

TEXTS = [f"{color} {shape} number {number % 4}" for number, (color, shape) in enumerate(
    (color, shape) for color in ("red", "green", "blue", "pale") for shape in ("dog", "cat", "owl", "cow")
)]  # fmt: skip
VECTORS = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)


@pytest.fixture
def data(tmp_path):
    """Eight pairs of texts, and a teacher's vectors of them."""
    rows = [{"anchor": TEXTS[2 * n], "positive": TEXTS[2 * n + 1]} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(tmp_path / "vectors.npy", VECTORS)
    return tmp_path


def words(model, data, output, *more, teacher=None):
    begin = ["distill", "--model_name", str(model), "--data_dir", str(data / "pairs.jsonl")]
    begin += teacher or ["--teacher_vectors", str(data / "vectors.npy")]
    begin += ["--output_dir", str(output), "--batch_size", "4", "--warmup_steps", "0", "--learning_rate", "0.01"]
    return [*begin, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--save_steps", "2", *more]


def in_half(folder, copy):
    """A copy of a model whose weights are bfloat16."""
    shutil.copytree(folder, copy)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return copy


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_the_language_model_learns_and_all_else_is_bit_for_bit_as_before(tiny_dir, data, tmp_path, family):
    source = write_any("llama", tmp_path / "llama") if family == "llama" else tiny_dir(family)
    source = in_half(source, tmp_path / "half")
    flags = ["--max_steps", "12", "--save_strategy", "no", "--tau", "0.2", "--sub_batch_size", "8"]
    assert cli.main(words(source, data, tmp_path / "out", *flags)) == 0
    before, after = Gen2Embed(source, prompt_mode="unime"), Gen2Embed(tmp_path / "out")
    assert after.prompt_mode == "unime"
    loss = DistillationLoss(before, VECTORS, tau=0.2)
    errors = [
        float(loss.calculate_loss([[torch.from_numpy(model.encode(TEXTS))]], torch.arange(16)[:, None]))
        for model in (before, after)
    ]
    assert errors[1] < 0.9 * errors[0]
    plain = SentenceTransformer(str(tmp_path / "out")).encode(TEXTS)
    assert np.abs(plain - after.encode(TEXTS)).max() < 0.02  # bfloat16

    old, new = before[0].model.state_dict(), after[0].model.state_dict()
    assert old.keys() == new.keys()
    assert {value.dtype for value in new.values()} == {torch.bfloat16}
    changed = {name for name in old if not torch.equal(old[name].view(torch.uint8), new[name].view(torch.uint8))}
    assert changed == {
        name
        for name in old
        if name.endswith("_proj.weight") and ("language_model" in name or family == "llama")
    }  # fmt: skip
    in_file = load_file(tmp_path / "out" / "model.safetensors")
    vision = {name for name in old if "vis" in name or "projector" in name}
    assert all(torch.equal(in_file[name].view(torch.uint8), old[name].view(torch.uint8)) for name in vision)
    assert bool(vision) == (family != "llama")


def test_the_adapter_on_its_base_model_is_the_merged_model(tiny_dir, data, tmp_path):
    assert cli.main(words(tiny_dir("qwen2_vl"), data, tmp_path / "out", "--max_steps", "2")) == 0
    merged, adapted = Gen2Embed(tmp_path / "out"), Gen2Embed(tmp_path / "out" / "adapter", prompt_mode="unime")
    assert np.abs(merged.encode(TEXTS) - adapted.encode(TEXTS)).max() < 1e-5
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (32, 16, 0.05)
    assert not settings["use_dora"]
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["command"] == "distill"
    assert record["counts"] == {"rows": 8, "texts": 16, "rejected": 0}
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("### Distillation", "vectors.npy", "8 pairs of texts", "teacher-student", "DistillationLoss"):
        assert said in card
    picture = torch.randint(0, 255, (56, 56, 3), dtype=torch.uint8).numpy()
    from PIL import Image

    assert merged.encode([Image.fromarray(picture)]).shape == (1, 32)


@pytest.mark.slow
def test_a_model_teaches_and_the_result_is_trained_on(exported, tiny_dir, data, tmp_path):
    """Texts of one column, a teacher by name, its vectors beside the result; then stage 2 begins with the result."""
    (data / "pairs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    teacher = ["--teacher", str(exported("qwen2_vl")), "--teacher_prompt", "Say: "]
    output = tmp_path / "out"
    assert cli.main(words(tiny_dir("llava_next"), data, output, "--max_steps", "1", teacher=teacher)) == 0
    assert (tmp_path / "out-teacher" / "manifest.json").is_file()
    pairs = [{"anchor": TEXTS[n], "positive": TEXTS[n + 8]} for n in range(8)]
    (data / "stage2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    sample = ["sample", "--method", "in-batch", "--data_dir", str(data / "stage2.jsonl")]
    assert cli.main([*sample, "--output_dir", str(tmp_path / "sampled")]) == 0
    train = ["train", "--model_name", str(output), "--processed_data_path", str(tmp_path / "sampled"), "--use_cpu"]
    train += ["--loss", "unime", "--batch_size", "4", "--max_steps", "1", "--report_to", "none"]
    assert cli.main([*train, "--output_dir", str(tmp_path / "second")]) == 0
    assert Gen2Embed(tmp_path / "second").prompt_mode == "unime"


@pytest.mark.slow
def test_a_run_that_ended_before_it_was_written_goes_on_to_the_same_bits(tiny_dir, data, tmp_path, monkeypatch):
    model = tiny_dir("qwen2_vl")
    assert cli.main(words(model, data, tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr("trainers.distillation.trainer.check_unchanged", fails)
        assert cli.main(words(model, data, tmp_path / "cut", "--save_total_limit", "1")) == 2
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-4"]
    resume = ["--save_total_limit", "1", "--resume_from_checkpoint", "true"]
    assert cli.main(words(model, data, tmp_path / "cut", *resume)) == 0
    whole, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    assert cli.main(words(model, data, tmp_path / "cut", *resume)) == 0
    np.save(data / "vectors.npy", VECTORS + 1)
    assert cli.main(words(model, data, tmp_path / "cut", *resume)) == 2


def fails(*_):
    raise Gen2EmbedError("a bit differs")


def test_a_changed_bit_is_found():
    weights = {"visual.a.weight": torch.randn(3, 4), "language.q.weight": torch.randn(4, 4), "b": torch.zeros(2)}
    before = digests(weights, ["language.q"])
    assert before.keys() == {"visual.a.weight", "b"}
    check_unchanged({**weights, "language.q.weight": torch.zeros(4, 4)}, before)
    for other in (-torch.zeros(2), torch.zeros(2, dtype=torch.float64), torch.zeros(1, 2)):
        with pytest.raises(
            Gen2EmbedError, match="1 tensors that have no adapter were not written as they were, the fi"
        ):
            check_unchanged({**weights, "b": other}, before)
    with pytest.raises(Gen2EmbedError, match=r"the first visual.a.weight"):
        check_unchanged({"b": weights["b"]}, before)


# Mistakes: one error each


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--teacher", "x"], "of teacher and teacher_vectors both is given; pass one of them"),
        (["--teacher_prompt", "x"], "teacher_prompt is given without teacher, whose vectors come from a file"),
        (["--tau", "0"], "tau is 0.0; pass a positive number"),
        (["--direction", "x"], "direction is 'x'; known: teacher-student, student-teacher"),
        (["--lora_dropout", "1"], "lora_dropout is 1.0; pass a share"),
        (["--batch_size", "9"], "has 8 usable rows, but a step takes 9; pass a smaller --batch_size"),
        (["--data_dir", "/nowhere"], "/nowhere: no such folder or file"),
        (["--eval_strategy", "epoch"], "eval_strategy is epoch, but nothing is evaluated here"),
        (["--limit", "7"], "but the data has 7 rows of 2"),
    ],
)
def test_mistakes_that_show_before_a_model_is_loaded(data, tmp_path, capsys, more, said):
    assert cli.main(words("/nowhere/no-model", data, tmp_path / "out", *more)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("gen2embed distill: error: ")
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_calibrated_model_is_refused(tiny_dir, data, tmp_path, capsys):
    model = Gen2Embed(tiny_dir("qwen2_vl"), prompt_mode="unime", device="cpu")
    model.calibrate([f"{text} one" for text in TEXTS] * 4, [f"{text} two" for text in TEXTS] * 4)
    model.save_pretrained(str(tmp_path / "calibrated"))
    assert cli.main(words(tmp_path / "calibrated", data, tmp_path / "out")) == 2
    assert "is calibrated, which training would make wrong" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_qlora_without_bitsandbytes_says_what_to_install(data, tmp_path, capsys):
    assert cli.main(words("/nowhere/no-model", data, tmp_path / "out", "--qlora")) == 2
    assert "qlora needs bitsandbytes, which is not installed: pip install 'gen2embed[qlora]'" in capsys.readouterr().err


def test_the_published_settings_are_the_defaults(monkeypatch):
    flags = ["--data_dir", "x", "--teacher", "y", "--output_dir", "z", "--report_to", "none"]
    config, args = parse(flags)
    assert (args.num_train_epochs, args.learning_rate, args.warmup_steps) == (2, 5e-4, 100)
    assert args.per_device_train_batch_size == 768
    assert (config.lora_rank, config.lora_alpha, config.dora) == (32, 16, False)
    assert (config.tau, config.direction, config.diagonal) == (0.05, "teacher-student", False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    from trainers.distillation.config import batch_per_process

    assert batch_per_process() == 96


def test_with_qlora_the_result_is_in_the_models_own_type(tiny_dir, data, tmp_path):
    """Trained in four bits, merged into the plain weights; runs where bitsandbytes is installed."""
    pytest.importorskip("bitsandbytes")
    config, args = parse(words(tiny_dir("qwen2_vl"), data, tmp_path / "out", "--max_steps", "2", "--qlora")[1:])
    layer = _student(config, args)[0].model.get_decoder().layers[0].mlp.up_proj
    assert type(layer.base_layer).__name__ == "Linear4bit"
    distill(config, args)
    merged, adapted = Gen2Embed(tmp_path / "out"), Gen2Embed(tmp_path / "out" / "adapter", prompt_mode="unime")
    assert np.abs(merged.encode(TEXTS) - adapted.encode(TEXTS)).max() < 1e-5
    before = load_file(tiny_dir("qwen2_vl") / "model.safetensors")
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        value.dtype for value in before.values()
    }
