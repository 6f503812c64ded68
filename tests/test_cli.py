"""The command line, as people type it."""

import contextlib
import io
import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from mmeb_files import colour_rows, write_images, write_table
from sentence_transformers import SentenceTransformer

from gen2embed_mteb import Gen2Embed, cli
from gen2embed_mteb.mini import benchmark
from gen2embed_mteb.mini.tasks import tasks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small MMEB-mini: 12 rows a dataset, 16 training pairs."""
    root = tmp_path_factory.mktemp("mini")
    small = [replace(task, num_train=min(task.num_train, 16)) for task in tasks(benchmark.train_digits)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "NUM_QUERIES", 12)
        benchmark.ensure("eval", root)
        patch.setattr(benchmark, "tasks", lambda _: small)
        benchmark.ensure("train", root)
    benchmark.ensure("crepe", root)
    return root


def evaluate(data, output, *more):
    words = ["evaluate", "--model_name", "gen2embed-mini", "--benchmark", "mmeb-mini", "--data_dir", str(data)]
    return cli.main([*words, "--output_dir", str(output), *more])


def test_evaluate_writes_results_and_prints_the_table(data, tmp_path, capsys):
    assert evaluate(data, tmp_path, "--prompt-mode", "hierarchical", "--subsets", "ColorShape", "Scenes_t2i") == 0
    printed = capsys.readouterr().out
    assert "ColorShape" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["datasets"]) == {"ColorShape", "Scenes_t2i"}
    assert results["prompt_mode"] == "hierarchical"
    assert results["datasets"]["ColorShape"]["num_queries"] == 12
    assert json.loads((tmp_path / "ColorShape_score.json").read_text())["num_pred"] == 12


def test_the_official_flags_run_on_mmebs_own_form(tmp_path, capsys):
    """`--model_name_or_path`, `--data_dir`, `--eval_split` as the paper's README has them, V1 rows, a name of MMEB."""
    data = tmp_path / "data"
    write_table(data / "VOC2007" / "test-00000-of-00001.parquet", colour_rows(["red", "blue"]))
    write_images(data / "img")
    words = ["evaluate", "--model_name_or_path", "gen2embed-mini", "--prompt_mode", "none", "--eval_split", "test"]
    words += ["--data_dir", str(data), "--output_dir", str(tmp_path / "out"), "--subsets", "VOC2007"]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "out" / "VOC2007_score.json").read_text())["num_pred"] == 2
    assert "VOC2007" in capsys.readouterr().out


def test_another_prompt_in_the_same_folder_is_refused(data, tmp_path, capsys):
    only = ("--subsets", "Digits", "--limit", "3")
    assert evaluate(data, tmp_path, "--prompt_mode", "none", *only) == 0
    assert evaluate(data, tmp_path, "--prompt_mode", "system", *only) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert evaluate(data, tmp_path, "--prompt_mode", "system", *only, "--overwrite") == 0


def test_a_missing_image_fails_the_run_past_the_rate_and_not_below(data, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / "images" / "Digits" / "00000.png").unlink()
    only = ("--subsets", "Digits")
    assert evaluate(copy, tmp_path / "strict", *only) == 1
    assert capsys.readouterr().out.endswith(
        "\nFailed: 1 of 12 rows were set aside, see errors.jsonl; that is more than --max_error_rate 0.001\n"
    )
    assert evaluate(copy, tmp_path / "lenient", *only, "--max_error_rate", "0.5") == 0
    results = json.loads((tmp_path / "lenient" / "results.json").read_text())
    assert results["datasets"]["Digits"]["num_errors"] == 1
    assert results["datasets"]["Digits"]["num_queries"] == 11


@pytest.mark.parametrize("name", ["sugarcrepe-mini", "sugarcrepe++-mini"])
def test_sugarcrepe_mini_runs(data, tmp_path, name, capsys):
    words = ["evaluate", "--model_name", "gen2embed-mini", "--benchmark", name, "--data_dir", str(data)]
    assert cli.main([*words, "--output_dir", str(tmp_path), "--limit", "4"]) == 0
    assert "replace_att" in capsys.readouterr().out


WRONG = {
    "--data_dir": ["evaluate", "--benchmark", "mmeb"],
    "hierarchical": ["evaluate", "--benchmark", "mmeb-mini", "--prompt_mode", "hierarchic"],
    "batch_size": ["evaluate", "--benchmark", "mmeb-mini", "--batch_size", "0"],
    "not an empty directory": ["export", "gen2embed-mini", "."],
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_input_says_what_to_do_and_exits_with_2(said, capsys, data, tmp_path, monkeypatch):
    words = WRONG[said]
    monkeypatch.chdir(data)
    if "evaluate" in words:
        words = [*words, "--model_name", "gen2embed-mini", "--output_dir", str(tmp_path)]
        words += ["--data_dir", str(data)] if "mmeb-mini" in words else []
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.exhaustive
def test_export_then_plain_sentence_transformers(tmp_path):
    out = tmp_path / "gen2embed"
    assert cli.main(["export", "gen2embed-mini", str(out), "--prompt_mode", "system"]) == 0
    code = (
        "import gen2embed_mteb; from sentence_transformers import SentenceTransformer; "
        "print(SentenceTransformer('gen2embed').encode(['a red circle']).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 192)"


def test_export_with_a_readout(tmp_path):
    out = tmp_path / "model"
    words = ["export", "gen2embed-mini", str(out), "--readout", "drop-1", "--readout_norm", "false"]
    assert cli.main(words) == 0
    want = Gen2Embed("gen2embed-mini", readout="drop-1", readout_norm=False).encode_query(["a red circle"])
    assert np.abs(SentenceTransformer(str(out)).encode_query(["a red circle"]) - want).max() < 1e-6


def test_evaluate_with_a_readout_keeps_its_results_apart(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--model_name", "gen2embed-mini", "--benchmark", "mmeb-mini", "--data_dir", str(data)]
    words += ["--subsets", "Digits", "--limit", "2"]
    digests = set()
    for more, name in (
        ([], "last"),
        (["--readout", "pre-mlp"], "pre-mlp"),
        (["--readout-norm", "false"], "last-raw"),
        (["--readout", "pre-mlp", "--readout_norm", "false"], "pre-mlp-raw"),
    ):
        assert cli.main([*words, *more]) == 0
        folder = "-".join(["hierarchical", *name.replace("last", "").strip("-").split()])
        results = json.loads((tmp_path / "results/mmeb-mini/gen2embed-mini" / folder / "results.json").read_text())
        assert results.get("readout", "last") == name
        title = (tmp_path / "results/mmeb-mini/gen2embed-mini" / folder / "results.md").read_text().splitlines()[0]
        assert title.endswith("prompt `hierarchical`" + (f", readout `{name}`" if more else ""))
        digests.add(results["fingerprint"])
    assert len(digests) == 4


def test_a_calibrated_folder_applied_gives_the_figures_of_the_folder_itself(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = Gen2Embed("gen2embed-mini", device="cpu")
    colors, shapes = ("red", "blue", "green", "white"), ("circle", "square", "triangle", "star", "cross")
    texts = [f"{n} {color} {shape}" for n in ("a", "the", "two") for color in colors for shape in shapes]
    model.calibrate(texts, texts, means="side", data="texts")
    model.save_pretrained("calibrated")
    words = ["evaluate", "--benchmark", "mmeb-mini", "--data_dir", str(data), "--subsets", "Scenes_t2i", "Pointing"]
    mini = [*words, "--model_name", "gen2embed-mini"]
    assert cli.main(mini) == 0
    vectors = tmp_path / "results/mmeb-mini/gen2embed-mini/hierarchical/embeddings"
    before = {path.name: path.stat().st_mtime_ns for path in vectors.glob("*.npy")}
    assert before
    assert cli.main([*mini, "--calibration", "calibrated"]) == 0
    assert cli.main([*mini, "--scoring", "csls"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in vectors.glob("*.npy")} == before  # nothing was encoded again
    assert "Transductive: 24 unlabelled queries of the evaluation itself were used" in capsys.readouterr().out
    assert cli.main([*words, "--model_name", "calibrated"]) == 0
    root = tmp_path / "results/mmeb-mini"
    folders = sorted(path.relative_to(root).as_posix() for path in root.glob("*/*"))
    names = ["hierarchical", "hierarchical-calibrated-calibrated", "hierarchical-csls"]
    assert folders == ["calibrated/hierarchical", *(f"gen2embed-mini/{name}" for name in names)]
    itself, plain, applied, csls = (json.loads((root / name / "results.json").read_text()) for name in folders)
    for figures in ("datasets", "meta_tasks", "overall"):
        assert applied[figures] == itself[figures]
    for results in (applied, itself):
        assert results["method"]["unlabelled_inputs"] == [{"count": 120, "of": "texts"}]
        assert not results["method"]["transductive"]
    assert applied["fingerprint"] == plain["fingerprint"] == csls["fingerprint"] != itself["fingerprint"]
    assert cli.main([*mini, "--prompt_mode", "system", "--calibration", "calibrated"]) == 2
    assert "was calibrated with the prompt hierarchical, the model has system" in capsys.readouterr().err
    assert cli.main([*mini, "--calibration", "nowhere"]) == 2
    assert "no such folder: 'nowhere' (given as calibration" in capsys.readouterr().err
    crepe = ["evaluate", "--benchmark", "sugarcrepe-mini", "--data_dir", str(data), "--model_name", "gen2embed-mini"]
    assert cli.main([*crepe, "--calibration", "own"]) == 2
    assert "captions of its own record" in capsys.readouterr().err


ABLATION = ["evaluate", "--model_name", "gen2embed-mini", "--benchmark", "mmeb-mini", "--ablation"]


def test_the_ablation_tables_what_it_is_asked_for(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = [{"query": f"the number {number}", "positive": f"{number} things"} for number in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = [*ABLATION, "--data_dir", str(data), "--subsets", "Digits", "--limit", "4"]
    words += ["--ablation_data", "pairs.jsonl", "--ablation_prompts", "system"]
    words += ["--ablation_readouts", "last", "pre-mlp-raw"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "choosing on the test" in printed
    assert "calibration own" in printed
    results = json.loads((tmp_path / "results/mmeb-mini/gen2embed-mini/ablation/ablation.json").read_text())
    names = ("prompt", "readout", "calibration", "scoring")
    assert [tuple(one[name] for name in names) for one in results["combinations"]] == [
        ("system", readout, calibration, scoring)
        for readout in ("last", "pre-mlp-raw")
        for calibration in ("none", "fitted")
        for scoring in ("cosine", "csls")
    ]
    assert results["combinations"][2]["method"]["unlabelled_inputs"] == [{"count": 120, "of": "pairs.jsonl"}]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prompt_mode", "none"], "--prompt_mode cannot be combined with --ablation"),
        (["--scoring", "csls", "--readout", "last"], "--readout, --scoring cannot be combined with --ablation"),
        (["--benchmark", "sugarcrepe-mini"], "--ablation is for mmeb and mmeb-mini"),
        (["--ablation_prompts", "hierarchic"], "Did you mean 'hierarchical'?"),
        (["--ablation_prompts", "none", "None"], "ablation_prompts is none, none; name each once"),
        (["--ablation_readouts", "first"], "unknown readout 'first'"),
        (["--ablation_data", "nowhere"], "nowhere"),
        (["--benchmark", "mmeb"], "--data_dir is needed for --benchmark mmeb"),
    ],
)
def test_an_ablation_that_cannot_be_made_is_refused_before_a_model_is_loaded(more, said, data, capsys, monkeypatch):
    monkeypatch.setattr("gen2embed_mteb.embedder.model.Gen2Embed", None)
    place = [] if "mmeb" in more else ["--data_dir", str(data)]
    assert cli.main([*ABLATION, *place, *more]) == 2
    assert said in capsys.readouterr().err


def test_settings_of_an_ablation_need_it(data, tmp_path, capsys):
    assert evaluate(data, tmp_path, "--ablation_prompts", "none") == 2
    assert "ablation_prompts without ablation would have no effect; pass --ablation, too" in capsys.readouterr().err


def test_doctor_reports_what_is_installed(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "sentence-transformers" in printed
    assert "torchvision" in printed


def demo(data, output, *more):
    return cli.main(["demo", "--data_dir", str(data), "--output_dir", str(output), *more])


def columns_of(printed, label):
    """The figures of one row of the demo's table."""
    line = next(line for line in printed.splitlines() if line.startswith(f"{label}  "))
    return line.removeprefix(label).split()


@pytest.fixture(scope="module")
def demonstrated(data, tmp_path_factory):
    """What the whole demo printed, and its folder; it was run there before, with other settings."""
    output = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert demo(data, output, "--limit", "1", "--max_steps", "1") == 0
        printed.truncate(printed.seek(0))
        assert demo(data, output, "--limit", "2", "--max_steps", "2") == 0
    return printed.getvalue(), output


def test_the_demo_shows_the_tuned_model_beside_the_zero_shot_ones_and_the_paper(demonstrated):
    printed, output = demonstrated
    header = columns_of(printed, " " * len("gen2embed-mini, hierarchical + SaHa"))
    assert header[-4:] == ["IND", "OOD", "Overall", "Digits"]
    assert columns_of(printed, "paper, hierarchical + SaHa")[-4:] == ["70.8", "62.0", "66.9", "–"]
    before, after = (
        float(columns_of(printed, f"gen2embed-mini, {label}")[-2]) for label in ("hierarchical", "hierarchical + SaHa")
    )
    gain = re.search(r"Gain over zero-shot.*overall ([+-]\d+\.\d)", printed)
    assert float(gain[1]) == pytest.approx(after - before, abs=0.11)
    results = json.loads((output / "tuned" / "results.json").read_text())
    assert f"{100 * results['overall']:.1f}" == f"{after:.1f}"
    assert results["prompt_mode"] == "hierarchical"
    assert results["fingerprint"] != json.loads((output / "hierarchical" / "results.json").read_text())["fingerprint"]
    photos = next(line for line in printed.splitlines() if line.startswith("photo "))
    assert photos.split()[2:] == ["none", "hierarchical", "hierarchical", "+", "SaHa"]


def test_the_demos_model_is_one_that_plain_sentence_transformers_loads(demonstrated):
    folder = demonstrated[1] / "gen2embed-mini-saha"
    plain, ours, base = SentenceTransformer(str(folder)), Gen2Embed(folder / "adapter"), Gen2Embed("gen2embed-mini")
    want = ours.encode_query(["a red circle"])
    assert np.abs(plain.encode_query(["a red circle"]) - want).max() < 1e-5
    assert np.abs(base.encode_query(["a red circle"]) - want).max() > 1e-4
    assert json.loads((folder / "train.json").read_text())["arguments"]["max_steps"] == 2
    assert not list(folder.glob("checkpoint-*"))


def test_the_demo_prints_lines_for_people(demonstrated):
    printed, output = demonstrated
    assert "{" not in printed
    assert "train_runtime" in (output / "training.log").read_text()


def test_the_demo_ends_in_a_page_with_everything_inside(demonstrated):
    output = demonstrated[1]
    page = (output / "report.html").read_text()
    assert page.count("data:image/") > 50
    assert "http://" not in page
    assert "https://" not in page
    assert "Gain over zero-shot" in page
    assert page.count("<svg") == page.count("<div class='drawing'>") == 3
    assert "PCA of each panel by itself" in page
    assert page.count("class='bar model-2'") == len(benchmark.MMEB_MINI.datasets)
    assert page.count("<div class='mode'>hierarchical + SaHa</div>") == page.count("<div class='mode'>none</div>") > 0
    clusters = output / re.search(r"<a href='([^']+)'", page)[1]
    assert clusters.read_text().count("<section class='cluster'>") > 0
    assert "data:image/" in clusters.read_text()


@pytest.mark.exhaustive
def test_the_demo_without_fine_tuning(data, tmp_path, capsys):
    assert demo(data, tmp_path, "--limit", "1", "--max_steps", "0") == 0
    printed = capsys.readouterr().out
    assert "gen2embed-mini, hierarchical" in printed
    assert "SaHa" not in printed.partition("Precision@1")[2].partition("\n")[2]
    assert "SaHa" not in (tmp_path / "report.html").read_text()
    assert demo(data, tmp_path, "--max_steps", "-1") == 2
    assert "max_steps" in capsys.readouterr().err


def test_evaluate_with_a_phrase_keeps_its_results_apart(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--model_name", "gen2embed-mini", "--benchmark", "mmeb-mini", "--data_dir", str(data)]
    words += ["--subsets", "Digits", "Scenes_t2i", "--limit", "2"]
    assert cli.main([*words, "--pooling", "phrase"]) == 2
    assert "prompt_mode 'hierarchical' has none on both sides; pass prompt_mode='lens'" in capsys.readouterr().err
    digests = set()
    for more, folder, readout in (([], "lens", "last"), (["--pooling", "phrase"], "lens-phrase", "last, phrase mean")):
        assert cli.main([*words, "--prompt_mode", "lens", *more]) == 0
        results = json.loads((tmp_path / "results/mmeb-mini/gen2embed-mini" / folder / "results.json").read_text())
        assert results.get("readout", "last") == readout
        assert results["prompt_mode"] == "lens"
        digests.add(results["fingerprint"])
    assert len(digests) == 2
