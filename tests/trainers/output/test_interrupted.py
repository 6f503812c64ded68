"""`gen2embed train` that is killed, stopped, out of room, or started again; and folders that it must not touch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kills
import pytest
from samples import sample_of

from gen2embed_mteb import cli
from gen2embed_mteb.launcher import ORPHANED, end_with_launcher
from gen2embed_mteb.storage.owned_folder import OwnedFolder

pytestmark = pytest.mark.slow

KILLS = Path(kills.__file__)
COLOURS = ("red", "blue", "green", "grey", "black", "white", "pink", "brown")


@pytest.fixture(scope="module")
def begin(tiny_dir, tmp_path_factory):
    """The flags of a run of 4 steps, two an epoch, but for `--output_dir`."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"query": f"Which colour, {word}?", "positive": word} for word in COLOURS]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampled = tmp_path_factory.mktemp("sampled")
    words = ["sample", "--data_dir", str(folder / "train.jsonl"), "--columns", "query", "positive"]
    assert cli.main([*words, "--method", "in-batch", "--output_dir", str(sampled)]) == 0
    flags = ["--model_name", str(tiny_dir("qwen2_vl")), "--processed_data_path", str(sampled), "--batch_size", "4"]
    flags += ["--sub_batch_size", "2", "--num_epochs", "2", "--use_cpu", "--report_to", "none"]
    return [*flags, "--disable_tqdm", "true", "--save_steps", "1", "--logging_steps", "3", "--warmup_steps", "2"]


def run(begin, output, *more):
    return cli.main(["train", *begin, "--output_dir", str(output), *more])


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory):
    """An undisturbed run that ends within its second epoch."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run(begin, output, "--max_steps", "3") == 0
    return output


def one_error(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


# Killed, and out of room


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["some", "full"])
def test_killed_or_out_of_room_it_ends_like_an_undisturbed_run(begin, tmp_path, mode):
    """`kills.py all` does so at every operation; `some` at one of each kind, on a run that deletes checkpoints."""
    words = [*begin, "--max_steps", "3", *(("--save_total_limit", "1") if mode == "some" else ())]
    command = [sys.executable, str(KILLS), mode, str(tmp_path / "out"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same") >= 4


# Started again


def test_a_finished_run_trains_no_step_more(begin, whole, tmp_path, caplog):
    output = shutil.copytree(whole, tmp_path / "out")
    before = kills.content(output)
    again = ("--max_steps", "3", "--resume_from_checkpoint", "true")
    assert run(begin, output, *again) == 0
    assert "was finished before; nothing was trained" in caplog.text
    assert kills.content(output) == before
    # Killed behind the last step: the checkpoint is there, the model is not.
    (output / "model.safetensors").unlink()
    shutil.rmtree(output / "adapter")
    assert run(begin, output, *again) == 0
    assert kills.differences(before, kills.content(output)) == []
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_times_are_in_a_file_of_their_own(whole):
    timing = json.loads((whole / "timing.json").read_text())
    assert [(one["from_step"], one["to_step"]) for one in timing["runs"]] == [(0, 3)]
    assert timing["train_runtime"] == timing["runs"][0]["seconds"] > 0
    assert set(json.loads((whole / "train.json").read_text())["metrics"]) == {"train_loss", "epoch"}
    assert "Training Time" not in (whole / "README.md").read_text()


@pytest.mark.parametrize(
    "name",
    sample_of(["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"], ["optimizer.pt"]),
)
def test_a_damaged_checkpoint_is_passed_over(begin, whole, tmp_path, caplog, name):
    output = shutil.copytree(whole, tmp_path / "out")
    (output / "model.safetensors").unlink()
    data = (output / "checkpoint-3" / name).read_bytes()
    (output / "checkpoint-3" / name).write_bytes(data[: len(data) // 2])
    assert run(begin, output, "--max_steps", "3", "--resume_from_checkpoint", "true") == 0
    assert f"checkpoint-3 is damaged ({name} was changed since gen2embed wrote it)" in caplog.text
    (aside,) = output.glob("checkpoint-3.set-aside-*")
    assert (aside / name).read_bytes() == data[: len(data) // 2]  # nothing of it is lost
    got = {name: digest for name, digest in kills.content(output).items() if ".set-aside-" not in name}
    assert kills.differences(kills.content(whole), got) == []


def test_where_all_are_damaged_it_is_one_line(begin, whole, tmp_path, capsys):
    output = shutil.copytree(whole, tmp_path / "out")
    (output / "model.safetensors").unlink()
    for folder in output.glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink()
    assert run(begin, output, "--max_steps", "3", "--resume_from_checkpoint", "true") == 2
    assert "is whole (checkpoint-3: trainer_state.json is missing); pass another --output_dir" in one_error(capsys)


def test_a_checkpoint_of_another_hand_is_no_place_to_go_on(begin, whole, tmp_path, capsys):
    """Its optimizer is a pickle: without a ledger that proves it, it is not loaded."""
    foreign = shutil.copytree(whole / "checkpoint-2", tmp_path / "given" / "checkpoint-2")
    (foreign / ".gen2embed-files.json").unlink()
    assert run(begin, tmp_path / "out", "--max_steps", "3", "--resume_from_checkpoint", str(foreign)) == 2
    assert "is no whole checkpoint: it has no ledger of gen2embed train" in one_error(capsys)


# Folders of others


def plant(folder, kind, begin):
    """Puts something into an output folder; returns the folder to pass."""
    model, sampled = begin[1], begin[3]
    folder.mkdir()
    if kind == "the model itself":
        return Path(model)
    if kind == "another model":
        shutil.copytree(model, folder, dirs_exist_ok=True)
    elif kind == "the sampling folder":
        return Path(sampled)
    elif kind == "another sampling folder":
        shutil.copytree(sampled, folder, dirs_exist_ok=True)
    elif kind == "the data":
        return Path(json.loads((Path(sampled) / "train.json").read_text())["data"]["data_dir"]).parent
    elif kind == "a file":
        folder.rmdir()
        folder.write_text("mine")
    elif kind == "a checkpoint":
        (folder / "checkpoint-500").mkdir()
        (folder / "checkpoint-500" / "model.safetensors").write_bytes(b"mine")
    elif kind == "an empty checkpoint":
        (folder / "checkpoint-1").mkdir()
    elif kind == "a link":
        (folder / "README.md").symlink_to(Path(sampled) / "train.json")
    elif kind == "another's record":
        OwnedFolder(folder, "sample").write_json("train.json", {})
    else:
        (folder / kind).write_text("mine")
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        *("the model itself", "another model", "the sampling folder", "another sampling folder", "the data", "a file"),
        *("a checkpoint", "an empty checkpoint", "a link", "another's record", "notes.txt", "train.json", "README.md"),
    ],
)
def test_a_folder_with_something_of_others_is_refused_before_any_work(begin, tmp_path, capsys, kind):
    folder = plant(tmp_path / "out", kind, begin)
    before = kills.content(folder) if folder.is_dir() else folder.read_bytes()
    absent = ["/nowhere/no-model" if word == begin[1] and kind != "the model itself" else word for word in begin]
    assert run(absent, folder, "--save_total_limit", "1") == 2
    assert str(folder) in one_error(capsys)
    assert (kills.content(folder) if folder.is_dir() else folder.read_bytes()) == before


def test_logs_may_lie_there_and_our_own_model_is_replaced(begin, tmp_path):
    output = tmp_path / "out"
    (output / "runs").mkdir(parents=True)
    for name in ("train.log", "slurm-1.out", ".hidden", "runs/events"):
        (output / name).write_text("mine")
    flags = ("--max_steps", "1", "--save_strategy", "no")
    assert run(begin, output, *flags) == 0
    first = kills.content(output)
    assert run(begin, output, *flags, "--seed", "7") == 0
    weights = "adapter/adapter_model.safetensors"
    assert kills.content(output)[weights] != first[weights]
    assert all((output / name).read_text() == "mine" for name in ("train.log", "slurm-1.out", ".hidden", "runs/events"))


def test_a_card_that_was_edited_is_not_replaced(begin, whole, tmp_path, capsys):
    output = shutil.copytree(whole, tmp_path / "out")
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)
    (output / "README.md").write_text("my own words")
    assert run(begin, output, "--max_steps", "3", "--resume_from_checkpoint", "true") == 0  # finished: left alone
    assert run(begin, output, "--max_steps", "3") == 2
    assert "README.md was changed since gen2embed wrote it" in one_error(capsys)
    assert (output / "README.md").read_text() == "my own words"


def test_two_runs_in_one_folder(tmp_path):
    folder = OwnedFolder(tmp_path / "out", "train")
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys, time\nfrom gen2embed_mteb.storage.owned_folder import OwnedFolder\n"
            f"with OwnedFolder({str(folder.path)!r}, 'train').exclusive():\n print(1, flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline()
        with pytest.raises(ValueError, match="another gen2embed train is at work in"), folder.exclusive(patience=0.1):
            pass
    finally:
        holder.kill()
        holder.wait()
    with folder.exclusive(patience=0.1):  # a killed process holds nothing
        pass


# Ctrl-C, and launchers


def start(command, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("module", "more", "seconds"),
    [
        (["gen2embed_mteb.cli", "train"], [], 1.0),
        pytest.param(["trainers.train"], [], 1.5, marks=pytest.mark.exhaustive),
        pytest.param(
            *(["gen2embed_mteb.cli", "train"], ["--dataloader_num_workers", "2"], None), marks=pytest.mark.exhaustive
        ),
        pytest.param(["trainers.train"], [], None, marks=pytest.mark.exhaustive),
    ],
    ids=["loading libraries", "module, loading libraries", "training, with workers", "module, training"],
)
def test_ctrl_c_is_one_line(begin, tmp_path, module, more, seconds):
    """Sent to all processes of the terminal, as a terminal does."""
    output = tmp_path / "out"
    words = [*begin, "--output_dir", str(output), "--max_steps", "100000", "--save_total_limit", "1", *more]
    process = start([sys.executable, "-m", *module, *words], start_new_session=True)
    try:
        if seconds is None:
            wait_for(output / "checkpoint-2", process)
        else:
            time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:  # else it would train on beside the other tests
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert [line for line in said.splitlines() if "interrupted" in line] == [
        f"{'gen2embed train' if 'train' in module else 'python -m trainers.train'}: interrupted; run the same command "
        "again with --resume_from_checkpoint true to go on"
    ]
    assert "  File " not in said


@pytest.mark.exhaustive
def test_a_rank_ends_when_its_launcher_is_killed(begin, tmp_path):
    output = tmp_path / "out"
    words = [*begin, "--output_dir", str(output), "--max_steps", "100000", "--save_total_limit", "1"]
    launcher = start([sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "trainers.train", *words])
    wait_for(output / "checkpoint-1", launcher)
    (rank,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{rank}/stat").exists() and Path(f"/proc/{rank}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_only_a_launcher_is_watched():
    assert not end_with_launcher({})
    assert not end_with_launcher({"RANK": "0", "WORLD_SIZE": "2"})  # set by hand, as the README says for sampling
    code = (
        "import os, time\nif os.fork(): time.sleep(0.5); os._exit(0)\n"
        "from gen2embed_mteb.launcher import end_with_launcher\n"
        "assert end_with_launcher({'TORCHELASTIC_RUN_ID': 'x'}); print(os.getpid(), flush=True); time.sleep(600)"
    )
    orphan = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "is gone; this process ends" in orphan.communicate(timeout=60)[1]
    assert ORPHANED == 128 + signal.SIGTERM


# Training arguments that cannot be used


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--load_best_model_at_end", "requires the save and eval strategy to match"),
        ("--fp16 --bf16", "At most one of fp16 and bf16 can be True"),
        ("--dataloader_prefetch_factor 2", "can only be set when data is loaded in a different process"),
        ("--report_to nonsense", "nonsense is not supported"),
        ("--deepspeed /nowhere.json", "deepspeed"),
        ("--fsdp full_shard", "start it with torchrun"),
        ("--optim galore_adamw", "galore_torch"),
        ("--optim_args a", "not enough values to unpack"),
        ("--eval_strategy steps", "--eval_benchmark mmeb-mini"),
        ("--save_strategy best", "`args.metric_for_best_model` must be provided"),
        ('--lr_scheduler_kwargs {"foo":1}', "unexpected keyword argument 'foo'"),
        ("--lr_scheduler_kwargs {foo", "Expecting property name"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps is 0; pass 1 or more"),
        ("--learning_rate nan", "learning_rate is nan; pass a finite number"),
        ("--learning_rate -1", "learning_rate is -1.0; pass 0 or more"),
        ("--adam_beta1 2", "Invalid beta parameter at index 0: 2.0"),
        ("--temperature nan", "temperature is nan"),
        ("--seed -1", "seed is -1; pass 0 or more"),
        ("--dataloader_num_workers -1", "dataloader_num_workers is -1; pass 0 or more"),
        ("--neftune_noise_alpha 5", "neftune_noise_alpha is not supported"),
        ("--push_to_hub", "upload the finished folder"),
    ],
)
def test_flags_that_cannot_be_used_are_one_line(begin, tmp_path, capsys, flags, said):
    assert run(begin, tmp_path / "out", *flags.split()) == 2
    assert said in one_error(capsys)


def test_an_error_of_a_library_elsewhere_keeps_its_traceback(begin, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("a fault in a library")

    monkeypatch.setattr("torch.optim.AdamW.step", broken)
    with pytest.raises(ValueError, match="a fault in a library"):
        run(begin, tmp_path / "out", "--max_steps", "2")
