"""`gen2embed train` as people type it: what it writes, that a killed run can go on, and every mistake's one error."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from samples import sample_of
from sentence_transformers import SentenceTransformer
from tiny_any import write_any
from tiny_models import write_tiny

from gen2embed_mteb import Gen2Embed, cli
from gen2embed_mteb.mini import benchmark
from gen2embed_mteb.mini.tasks import tasks
from trainers.fine_tuning import parse
from trainers.output.folder import _require_same
from trainers.recipe import recipe_batch

SUBSETS = ("Digits", "Scenes_t2i")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A cache folder with a small MMEB-mini: two training sets of 16 rows, evaluation sets of 6."""
    folder = tmp_path_factory.mktemp("cache")
    small = [replace(task, num_train=16) for task in tasks(benchmark.train_digits)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "tasks", lambda _: small)
        patch.setattr(benchmark, "NUM_QUERIES", 6)
        patch.setenv("XDG_CACHE_HOME", str(folder))
        benchmark.ensure("train")
        benchmark.ensure("eval")
    return folder


@pytest.fixture(autouse=True)
def _cached(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def data(home):
    return home / "gen2embed" / f"mmeb-mini-{benchmark.VERSION}" / "MMEB-train"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny("qwen2_vl", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def sampled(home, data, model, tmp_path_factory):
    """What `gen2embed sample` writes for k = 1."""
    folder = tmp_path_factory.mktemp("sampled")
    assert sample(folder, data, "--model_name", str(model), "--num_hard_negatives", "1") == 0
    return folder


def sample(folder, data, *more):
    words = ["sample", "--data_dir", str(data), "--output_dir", str(folder), "--subsets", *SUBSETS]
    return cli.main([*words, "--pool_multiplier", "2", *more])


def words(model, sampled, output, *more):
    begin = ["train", "--model_name", str(model), "--processed_data_path", str(sampled), "--output_dir", str(output)]
    begin += ["--num_epochs", "1", "--batch_size", "8", "--sub_batch_size", "4", "--resize", "processor"]
    return [*begin, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--save_steps", "1", *more]


@pytest.fixture(scope="module")
def trained(sampled, model, home, tmp_path_factory):
    """An undisturbed run of 5 steps, evaluated after the second, the fourth and the last."""
    output = tmp_path_factory.mktemp("trained") / "model"
    evaluation = ["--eval_benchmark", "mmeb-mini", "--eval_subsets", *SUBSETS, "--eval_steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        assert cli.main(words(model, sampled, output, *evaluation)) == 0
    return output


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_the_result_is_a_model_its_adapter_and_their_history(trained, model):
    merged, adapted = Gen2Embed(trained), Gen2Embed(trained / "adapter")
    plain = SentenceTransformer(str(trained))
    want = adapted.encode_query(["a red circle"])
    assert np.abs(merged.encode_query(["a red circle"]) - want).max() < 1e-5
    assert np.abs(plain.encode_query(["a red circle"]) - want).max() < 1e-5
    assert np.abs(Gen2Embed(model).encode_query(["a red circle"]) - want).max() > 1e-6
    assert merged.max_seq_length == Gen2Embed(model).max_seq_length  # 1,024 was for training
    record = json.loads((trained / "train.json").read_text())
    assert record["recipe"]["lora_alpha"] == 64
    assert record["recipe"]["dora"]
    assert record["arguments"]["learning_rate"] == 5e-5
    assert set(record["sampling"]) == set(SUBSETS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("readout", "norm"), sample_of([("pre-mlp", "true"), ("drop-1", "false")], [("pre-mlp", "true")])
)
def test_training_with_a_readout(model, data, tmp_path, readout, norm):
    """What does not run is not trained; the result names its readout, and so does the checkpoint."""
    sampled, output = tmp_path / "sampled", tmp_path / "out"
    flags = ["--readout", readout, "--readout_norm", norm]
    assert sample(sampled, data, "--model_name", str(model), "--num_hard_negatives", "1", *flags) == 0
    assert cli.main(words(model, sampled, output, "--max_steps", "2", "--learning_rate", "0.01", *flags)) == 0
    last = [name for name in adapter(output) if ".layers.1." in name]
    assert not [name for name in last if "down_proj" in name]
    assert bool([name for name in last if "q_proj" in name]) == (readout == "pre-mlp")
    merged = Gen2Embed(output)
    adapted, checkpoint = Gen2Embed(output / "adapter"), Gen2Embed(output / "checkpoint-2")
    want = adapted.encode_query(["a red circle"])
    for found in (merged, adapted, checkpoint):
        assert (found.readout, found.readout_norm) == (readout, norm == "true")
        assert np.abs(found.encode_query(["a red circle"]) - want).max() < 1e-5
    assert np.abs(SentenceTransformer(str(output)).encode_query(["a red circle"]) - want).max() < 1e-5
    plain = Gen2Embed(model, readout=readout, readout_norm=norm == "true")
    assert np.abs(plain.encode_query(["a red circle"]) - want).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", sample_of(["qwen3_5", "gemma3", "idefics3", "internvl", "llava_onevision"], ["idefics3"])
)
@pytest.mark.exhaustive
def test_a_family_not_written_by_hand_from_sampling_to_a_plain_model(family, data, tmp_path):
    """Recurrent layers, sliding windows, padded images, tiles in one tensor, side features."""
    model, sampled, output = write_any(family, tmp_path / family), tmp_path / "sampled", tmp_path / "out"
    assert sample(sampled, data, "--model_name", str(model), "--num_hard_negatives", "1") == 0
    assert cli.main(words(model, sampled, output, "--max_steps", "2", "--learning_rate", "0.01")) == 0
    merged, adapted = Gen2Embed(output), Gen2Embed(output / "adapter")
    inputs = ["a red circle", {"image": Image.effect_noise((90, 60), 64).convert("RGB"), "text": "What?"}]
    want = adapted.encode_query(inputs)
    assert np.abs(merged.encode_query(inputs) - want).max() < 1e-5
    assert np.abs(SentenceTransformer(str(output)).encode_query(inputs) - want).max() < 1e-5
    assert np.abs(Gen2Embed(model).encode_query(inputs) - want).max() > 1e-4
    evaluate = ["evaluate", "--benchmark", "mmeb-mini", "--model_name", str(output), "--subsets", *SUBSETS]
    assert cli.main([*evaluate, "--output_dir", str(tmp_path / "evaluated")]) == 0


def test_a_model_of_text_alone_refuses_images_and_samples_nothing(data, tmp_path, capsys):
    model = write_any("llama", tmp_path / "llama")
    status = sample(tmp_path / "sampled", data, "--model_name", str(model), "--num_hard_negatives", "1")
    assert status == 2
    assert "takes text alone (model type 'llama')" in capsys.readouterr().err
    assert list((tmp_path / "sampled").glob("*.parquet")) == []


def test_training_and_evaluating_a_model_of_text_alone_on_images_is_refused_early(data, tmp_path, capsys):
    """`train` looks at the first rows before it reads the data, and loads no weights."""
    model, sampled = write_any("llama", tmp_path / "llama"), tmp_path / "sampled"
    assert sample(sampled, data, "--method", "in-batch") == 0
    (model / "model.safetensors").rename(tmp_path / "weights")
    assert cli.main(words(model, sampled, tmp_path / "out")) == 2
    assert "llama takes text alone (it has no image processor), and there are images in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "weights").rename(model / "model.safetensors")
    evaluate = ["evaluate", "--benchmark", "mmeb-mini", "--model_name", str(model), "--subsets", *SUBSETS]
    assert cli.main([*evaluate, "--output_dir", str(tmp_path / "evaluated")]) == 2
    assert "takes text alone (model type 'llama'), and there are images in Digits" in capsys.readouterr().err
    assert not (tmp_path / "evaluated").exists()


def test_a_benchmark_with_images_for_a_model_of_text_alone_is_refused_before_training(tmp_path, capsys):
    model = write_any("llama", tmp_path / "llama")
    rows = "".join(json.dumps({"anchor": f"a {n}", "positive": f"p {n}"}) + "\n" for n in range(8))
    (tmp_path / "pairs.jsonl").write_text(rows)
    begin = ["sample", "--data_dir", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "sampled")]
    assert cli.main([*begin, "--method", "in-batch"]) == 0
    evaluation = ["--eval_benchmark", "mmeb-mini", "--eval_subsets", *SUBSETS]
    assert cli.main(words(model, tmp_path / "sampled", tmp_path / "out", *evaluation)) == 2
    assert "takes text alone (it has no image processor), and there are images in Digits" in capsys.readouterr().err


def test_evaluation_during_training_is_that_of_the_model_at_that_step(trained, tmp_path):
    """Step 2's figures are those of checkpoint 2, evaluated on its own: nothing stale is kept between steps."""
    names = sorted(path.name for path in (trained / "eval" / "mmeb-mini").iterdir())
    assert names == ["step-2", "step-4", "step-5"]
    for step, folder in ((2, trained / "checkpoint-2"), (5, trained / "adapter")):
        reported = json.loads((trained / "eval" / "mmeb-mini" / f"step-{step}" / "results.json").read_text())
        evaluate = ["evaluate", "--benchmark", "mmeb-mini", "--model_name", str(folder), "--subsets", *SUBSETS]
        assert cli.main([*evaluate, "--output_dir", str(tmp_path / str(step))]) == 0
        alone = json.loads((tmp_path / str(step) / "results.json").read_text())
        assert reported["datasets"] == alone["datasets"]
        assert reported["overall"] == alone["overall"]
        assert not (trained / "eval" / "mmeb-mini" / f"step-{step}" / "embeddings").exists()
    fingerprints = [
        json.loads((trained / "eval" / "mmeb-mini" / f"step-{step}" / "results.json").read_text())["fingerprint"]
        for step in (2, 5)
    ]
    assert fingerprints[0] != fingerprints[1]
    metrics = json.loads((trained / "train.json").read_text())["metrics"]
    assert metrics["eval_mmeb-mini_overall"] == reported["overall"]


def test_the_card_names_data_files_and_figures(trained, sampled, data):
    card = (trained / "README.md").read_text()
    record = json.loads((sampled / "Digits.json").read_text())
    for expected in (
        "MMEB-train (original, 2 subsets)",
        "### Hard Negatives",
        "`saha`",
        "`num_hard_negatives` 1",
        str(data),
        record["sha256"],
        record["model"]["fingerprint"],
        "MMEB-mini Precision@1",
        "dataset_Digits",
    ):
        assert expected in card


def test_more_matryoshka_dimensions_than_the_model_has(sampled, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trainers.fine_tuning._load", None)  # nothing is loaded
    more = ["--matryoshka_dims", "64", "8"]
    line = mistake(capsys, *words(model, sampled, tmp_path / "out", *more))
    assert "matryoshka_dims has 64, but vectors of the model have 32 dimensions; pass 32 or fewer" in line
    assert not (tmp_path / "out").exists()


def test_whole_vectors_without_a_loss_of_their_own_are_warned_of(sampled, model, tmp_path, caplog):
    (tmp_path / "file").touch()
    for dims, said in (("16", True), ("32", False)):
        caplog.clear()
        assert cli.main([*words(model, sampled, tmp_path / "file"), "--matryoshka_dims", dims]) == 2
        assert ("whole vectors, of 32 dimensions, get no loss of their own" in caplog.text) == said


@pytest.mark.slow
def test_matryoshka_training_reports_every_width(sampled, model, tmp_path):
    output = tmp_path / "out"
    more = ["--matryoshka_dims", "32", "8", "--matryoshka_weights", "1", "0.5", "--max_steps", "1"]
    evaluation = ["--eval_benchmark", "mmeb-mini", "--eval_subsets", *SUBSETS]
    assert cli.main(words(model, sampled, output, *more, *evaluation)) == 0
    metrics = json.loads((output / "train.json").read_text())["metrics"]
    evaluate = ["evaluate", "--benchmark", "mmeb-mini", "--model_name", str(output), "--subsets", *SUBSETS]
    for width, key, name in ((None, "overall", "step-1"), (8, "dim_8_overall", "step-1-dim8")):
        again = ["--truncate_dim", str(width)] if width else []
        assert cli.main([*evaluate, *again, "--output_dir", str(tmp_path / name)]) == 0
        alone = json.loads((tmp_path / name / "results.json").read_text())
        assert alone["overall"] == metrics[f"eval_mmeb-mini_{key}"]
        reported = json.loads((output / "eval" / "mmeb-mini" / name / "results.json").read_text())
        assert reported["datasets"] == alone["datasets"]
    assert "eval_mmeb-mini_dim_32_overall" not in metrics  # it is that of whole vectors
    card = (output / "README.md").read_text()
    section = card[card.index("### Matryoshka Dimensions") : card.index("### Framework Versions")]
    figures = [f"{100 * metrics[f'eval_mmeb-mini_{key}']:.1f}" for key in ("overall", "dim_8_overall")]
    rows = [line.replace(" ", "") for line in section.splitlines() if line.startswith("|")][2:]
    assert rows == [f"|32|1|{figures[0]}|", f"|8|0.5|{figures[1]}|"]
    assert "MatryoshkaLoss" in card


@pytest.mark.slow
@pytest.mark.parametrize("method", ["saha", pytest.param("hn", marks=pytest.mark.exhaustive)])
def test_several_positives_and_explicit_negatives_are_trained_by_the_same_command(model, tmp_path, method):
    rows = [
        {
            "anchor": f"find number {n}",
            "positive": [f"number {n}", f"no. {n}"][: 1 + n % 2],
            "negative": [f"minus {n}"] * (n % 3),
        }
        for n in range(16)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    begin = ["sample", "--data_dir", str(data), "--output_dir", str(tmp_path / "sampled"), "--model_name", str(model)]
    assert cli.main([*begin, "--method", method, "--num_hard_negatives", "1", "--pool_multiplier", "2"]) == 0
    more = ["--num_epochs", "2", "--matryoshka_dims", "32", "8", "--explicit_negatives", "1", "--batch_size", "4"]
    assert cli.main([*words(model, tmp_path / "sampled", tmp_path / "out", *more), "--save_steps", "100"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- Positives: 24 in subsets whose queries have several" in card
    assert "- Explicit negatives in the data: 10" in card
    assert ("<code>negative_2</code>" in card) == (method == "hn")  # the second one was mined
    assert json.loads((tmp_path / "out" / "train.json").read_text())["recipe"]["explicit_negatives"] == 1
    page = ["inspect", str(tmp_path / "sampled" / "pairs.parquet")]
    assert cli.main(page) == 0
    assert "its explicit negative" in (tmp_path / "sampled" / "pairs.html").read_text()


@pytest.mark.parametrize(
    ("method", "columns"), [("in-batch", ["query", "positive"]), ("hn", ["negative_1", "negative_2"])]
)
def test_the_baselines_are_trained_by_the_same_command(data, model, tmp_path, method, columns):
    assert (
        sample(tmp_path / method, data, "--model_name", str(model), "--method", method, "--num_hard_negatives", "2")
        == 0
    )
    more = ["--save_strategy", "no", "--activation_checkpointing", "--no_dora", "--max_steps", "2"]
    assert cli.main(words(model, tmp_path / method, tmp_path / "out", *more)) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"<code>{column}</code>" in card for column in columns)
    weights = adapter(tmp_path / "out")
    assert not [name for name in weights if "magnitude" in name]
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)


def test_unimes_loss_is_trained_by_the_same_command(data, model, tmp_path):
    """Its k is the loss's own, whatever the sampling files have; the losses are told apart in card and record."""
    assert sample(tmp_path / "pairs", data, "--method", "in-batch") == 0
    more = ["--save_strategy", "no", "--max_steps", "1", "--subsets", "Digits", "--batch_size", "16"]
    unime = ["--loss", "unime", "--beta", "0.2", "--num_hard_negatives", "3", "--unime_variant", "official"]
    found = {}
    for name, flags in (("unime", unime), ("saha", []), ("in-batch", ["--loss", "in-batch"])):
        assert cli.main(words(model, tmp_path / "pairs", tmp_path / name, *more, *flags)) == 0
        found[name] = json.loads((tmp_path / name / "train.json").read_text())
    assert {one["recipe"]["loss"] for one in found.values()} == set(found)
    assert found["unime"]["recipe"]["beta"] == 0.2
    losses = {name: one["metrics"]["train_loss"] for name, one in found.items()}
    assert losses["unime"] != losses["saha"]
    assert losses["saha"] < losses["in-batch"]  # of sixteen digits some are equal
    card = (tmp_path / "unime" / "README.md").read_text()
    assert "UnimeLoss" in card and '"num_hard_negatives": 3' in card and '"variant": "official"' in card
    assert '"mask_equal_positives": false' in (tmp_path / "in-batch" / "README.md").read_text()


def test_the_record_of_an_earlier_version_names_no_loss(tmp_path):
    record = {"recipe": {"loss": "saha", "beta": None, "dora": True}, "arguments": {}, "sampling": {}}
    _require_same({"recipe": {"dora": True}}, record, tmp_path)
    with pytest.raises(ValueError, match="was trained with loss 'saha', not 'unime'"):
        _require_same({"recipe": {"dora": True}}, {**record, "recipe": {"loss": "unime", "dora": True}}, tmp_path)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bits(trained, sampled, model, tmp_path, preloaded):
    """Also without the evaluations of the other run, which leave training as it is."""
    output = tmp_path / "model"
    process = preloaded.start(["-m", "gen2embed_mteb.cli", *words(model, sampled, output)])
    deadline = time.monotonic() + 120
    while not (output / "checkpoint-1" / "trainer_state.json").is_file():
        assert not process.ended(), process.wait().stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert not (output / "adapter").exists()
    # As a kill in the middle of saving leaves it.
    shutil.copytree(output / "checkpoint-1", output / "checkpoint-9")
    (output / "checkpoint-9" / "trainer_state.json").unlink()
    assert cli.main(words(model, sampled, output, "--resume_from_checkpoint", "true")) == 0
    want, got = adapter(trained), adapter(output)
    assert want.keys() == got.keys()
    assert all((want[name] == got[name]).all() for name in want)


# Mistakes: one error each, before a model is loaded unless it is about the model


def mistake(capsys, *arguments):
    assert cli.main([*arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("gen2embed train: error: ")
    return line


NO_MODEL = "/nowhere/no-model"


def test_sampling_files_of_other_data(sampled, data, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    file = other / "Digits" / "original-00000-of-00001.parquet"
    table = pq.read_table(file)
    pq.write_table(table.slice(1), file)
    line = mistake(capsys, *words(NO_MODEL, sampled, tmp_path / "out", "--data_dir", str(other)))
    assert f"{sampled / 'Digits.json'}: made with other rows than these" in line


def test_sampling_files_of_another_k(sampled, data, tmp_path, capsys):
    line = mistake(capsys, *words(NO_MODEL, sampled, tmp_path / "out", "--num_hard_negatives", "7"))
    assert "sampled with k = 1, not --num_hard_negatives 7" in line
    mixed = tmp_path / "mixed"
    assert sample(mixed, data, "--method", "in-batch") == 0
    for name in ("Digits.json", "Digits.parquet"):
        shutil.copy(sampled / name, mixed / name)
    line = mistake(capsys, *words(NO_MODEL, mixed, tmp_path / "out"))
    assert "method in-batch with k = 0" in line
    assert "method saha with k = 1" in line


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--batch_size", "7"], "batch_size is 7, but a cluster has 2 rows (k + 1); pass a multiple"),
        (["--batch_size", "64"], "a step takes 32"),
        (["--image_dir", "/nowhere"], "/nowhere: no such folder or zip archive; pass an existing --image_dir"),
        (["--data_dir", "/nowhere"], "/nowhere: no such folder or file; pass an existing --data_dir"),
        (["--processed_data_path", "/nowhere"], "/nowhere.json: not found; pass a file that gen2embed sample wrote"),
        (["--subsets", "Digit"], "subset 'Digit' was not sampled, only Digits, Scenes_t2i; see --subsets"),
        (["--resize", "448"], "resize is '448'; known: processor, official, square-448"),
        (["--lora_rank", "0"], "lora_rank is 0; pass 1 or more"),
        (["--matryoshka_dims", "32", "8", "8"], "matryoshka_dims is 32 8 8: 8 comes after 8; pass each once"),
        (["--matryoshka_weights", "1"], "matryoshka_weights without matryoshka_dims would have no effect"),
        (["--loss", "infonce"], "loss is 'infonce'; known: saha, in-batch, unime"),
        (["--beta", "0.1"], "beta is 0.1, but loss is saha; pass --loss unime, or leave it out"),
        (["--loss", "unime", "--beta", "nan"], "beta is nan; pass a finite number"),
        (["--loss", "unime", "--num_hard_negatives", "0"], "num_hard_negatives is 0; pass 1 or more"),
        (["--loss", "unime", "--unime_variant", "code"], "unime_variant is 'code'; known: paper, official"),
        (["--eval_benchmark", "mmeb"], "eval_data_dir is needed for eval_benchmark mmeb"),
        (["--eval_benchmark", "mmeb-mini", "--eval_subsets", "Digit"], "Digit"),
        (["--batch_sampler", "no_duplicates"], "leave it out, batches are made of clusters"),
        (["--resume_from_checkpoint", "/nowhere"], "/nowhere is no whole checkpoint"),
    ],
)
def test_mistakes_that_show_before_a_model_is_loaded(sampled, tmp_path, capsys, more, expected):
    assert expected in mistake(capsys, *words(NO_MODEL, sampled, tmp_path / "out", *more))


def test_a_folder_without_sampling_files(tmp_path, capsys):
    line = mistake(capsys, *words(NO_MODEL, tmp_path, tmp_path / "out"))
    assert f"{tmp_path}: no sampling files there; pass the --output_dir of gen2embed sample" in line


def test_adapter_targets_that_match_nothing(sampled, model, tmp_path, capsys):
    line = mistake(capsys, *words(model, sampled, tmp_path / "out", "--lora_targets", "q_proj", "query"))
    assert "adapter target 'query' matches no layer of Qwen2VLModel's language model; it has down_proj" in line
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_run_in_it(trained, sampled, model, capsys):
    line = mistake(capsys, *words(model, sampled, trained))
    assert "holds checkpoint-5 of an earlier run; pass --resume_from_checkpoint true" in line
    line = mistake(capsys, *words(model, sampled, trained, "--resume_from_checkpoint", "true", "--no_dora"))
    assert "checkpoint-5 was trained with dora True, not False; resume with the same" in line


def test_an_unknown_flag(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["train", "--processed_data_path", "x", "--output_dir", "y", "--lora_rang", "8"])
    assert error.value.code == 2
    assert "--lora_rang" in capsys.readouterr().err


# The recipe


def test_the_recipe_is_the_default(sampled, tmp_path, monkeypatch):
    flags = ["--processed_data_path", str(sampled), "--output_dir", str(tmp_path), "--report_to", "none"]
    config, args = parse(flags)
    assert config.model_name == "gen2embed"
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout, config.dora) == (8, 64, 0.1, True)
    assert (config.temperature, config.sub_batch_size, config.max_length) == (0.02, 16, 1024)
    assert (config.resize, config.mask_equal_positives, config.query_prompt_in_training) == ("square-448", True, True)
    assert (args.num_train_epochs, args.learning_rate, args.warmup_steps) == (1.5, 5e-5, 100)
    assert args.lr_scheduler_type == "linear"
    assert args.optim.startswith("adamw_torch")
    assert args.per_device_train_batch_size == 2048
    assert args.bf16 == torch.cuda.is_available()
    assert not parse([*flags, "--use_cpu"])[1].bf16
    config, args = parse(
        [*flags, "--no_dora", "--no-mask-equal-positives", "--weight_decay", "0.1", "--batch-size", "4"]
    )
    assert (config.dora, config.mask_equal_positives) == (False, False)
    assert (args.weight_decay, args.per_device_train_batch_size) == (0.1, 4)


def test_the_recipes_batch_is_shared_among_processes(monkeypatch):
    assert recipe_batch("saha", 8) == recipe_batch("saha", 16) == 2048
    assert recipe_batch("in-batch", 1) == recipe_batch("hn", 1) == 1024
    assert recipe_batch("saha", 10) == 2040
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert recipe_batch("saha", 8) == 256
