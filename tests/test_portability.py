"""No call of our packages works on Linux alone, or with CUDA alone, outside of the places that are guarded for it.

macOS and Windows are not tested on real machines; this keeps out what is known to fail there.
"""

import os
from pathlib import Path

import pytest
from portability import Finding, findings

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gen2embed_mteb", "trainers", "vlm2vec_adapter")

GUARDED = {
    # What exists on POSIX alone.
    ("gen2embed_mteb/errors.py", "signal.SIGALRM"): "behind hasattr(signal, 'setitimer')",
    ("gen2embed_mteb/errors.py", "signal.setitimer"): "behind hasattr(signal, 'setitimer')",
    ("gen2embed_mteb/errors.py", "signal.ITIMER_REAL"): "behind hasattr(signal, 'setitimer')",
    ("vlm2vec_adapter/launch.py", "fork"): "behind sys.platform == 'linux'",
    ("vlm2vec_adapter/mini.py", ".symlink_to"): "VLM2Vec reads the link, and runs on Linux",
    ("vlm2vec_adapter/results/output.py", ".symlink_to"): "VLM2Vec reads the link, and runs on Linux",
    # What renames: Windows refuses if the name is taken.
    ("gen2embed_mteb/storage/atomic.py", ".rename"): "to a name with twelve random digits",
    # CUDA.
    ("gen2embed_mteb/config.py", "'cuda:'"): "behind torch.cuda.is_available()",
    ("gen2embed_mteb/bulk/workers.py", "fcntl"): "behind suppress(ImportError, AttributeError, OSError)",
    ("gen2embed_mteb/distributed/encoder.py", "'cuda'"): "where the cluster has a GPU, or the caller chose one",
    ("gen2embed_mteb/embedder/passes/prefix_cache.py", "'cuda'"): "compared with the type of the model's device",
    ("gen2embed_mteb/embedder/passes/prefix_cache.py", "pin_memory"): "for a device of the type cuda",
    ("gen2embed_mteb/inspection/doctor.py", "torch.cuda.get_device_name"): "behind torch.cuda.is_available()",
    ("trainers/distillation/distill.py", "torch.cuda.empty_cache"): "behind torch.cuda.is_available()",
    ("trainers/recipe.py", "torch.cuda.is_bf16_supported"): "behind torch.cuda.is_available()",
    ("trainers/saha/scores.py", "'cuda'"): "compared with the type of a device that the caller chose",
    ("trainers/saha/scores.py", "torch.cuda.mem_get_info"): "of a device of the type cuda",
    ("trainers/saha/search.py", "'cuda'"): "behind torch.cuda.is_available(), or compared with a device's type",
    ("trainers/saha/search.py", "torch.cuda.device_count"): "behind torch.cuda.is_available()",
    ("trainers/trainer.py", "torch.cuda.current_device"): "behind torch.cuda.is_available()",
    # MPS has no float64.
    ("gen2embed_mteb/analysis/attention/measure.py", "torch.float64"): "of sums that are on the CPU",
    ("gen2embed_mteb/analysis/attention/measure.py", ".double()"): "of tensors that are on the CPU",
    ("gen2embed_mteb/embedder/calibration/affine_map.py", ".double()"): "of what was read from a file",
    ("gen2embed_mteb/embedder/passes/prefix_cache.py", "torch.float64"): "compared with the type of a model",
    ("gen2embed_mteb/embedder/reranking/health.py", ".double()"): "of what was a NumPy array",
    ("gen2embed_mteb/embedder/reranking/query_scorer.py", "torch.float64"): "compared with the type of a model",
}
"""The places where something is allowed that does not run everywhere, with the guard."""


@pytest.fixture(scope="module")
def found() -> set[Finding]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {one for path in [*files, ROOT / "_gen2embed_hook.py"] for one in findings(path, ROOT)}


def test_nothing_runs_on_one_system_alone_outside_of_guarded_places(found: set[Finding]) -> None:
    wrong = sorted(one for one in found if (one.file, one.name) not in GUARDED)
    assert not wrong, "guard it and name the guard in GUARDED, or write it in another way:\n" + "\n".join(
        f"{one.file}:{one.line}: {one.rule}: {one.name}" for one in wrong
    )


def test_every_guarded_place_still_exists(found: set[Finding]) -> None:
    assert GUARDED.keys() <= {(one.file, one.name) for one in found}


def test_the_rules_find_what_they_are_for(tmp_path: Path) -> None:
    """Each line is found, by the rule that is written behind it; the lines at the end are not."""
    lines = """
os.fork()  # posix
os.sched_getaffinity(0)  # posix
from signal import SIGKILL  # posix
import fcntl  # posix
os.open(p, os.O_NOFOLLOW)  # posix
os.unlink(p, dir_fd=3)  # posix
p.symlink_to(q)  # posix
tempfile.TemporaryDirectory()  # posix
q = "/dev/shm"  # posix
d.strftime("%-d")  # posix
signal.signal(signal.SIGHUP, f)  # posix
torch.cuda.synchronize()  # cuda
model.cuda()  # cuda
torch.device("cuda")  # cuda
DataLoader(d, pin_memory=True)  # cuda
tensor.pin_memory()  # cuda
torch.zeros(1, dtype=torch.float64, device=d)  # float64
tensor.double()  # float64
open(p)  # text
p.open()  # text
p.open("w")  # text
p.read_text()  # text
p.write_text(t)  # text
subprocess.run(c, text=True)  # text
tempfile.NamedTemporaryFile("w")  # text
os.rename(a, b)  # rename
p.rename(q)  # rename
str(p.relative_to(q))  # slash
str(p).split("/")  # slash
multiprocessing.Process(target=f)  # start
multiprocessing.set_start_method("fork")  # start
""".strip().splitlines()
    for number, line in enumerate(lines):
        path = tmp_path / f"{number}.py"
        path.write_text(line, encoding="utf-8")
        assert {one.rule for one in findings(path, tmp_path)} == {line.rpartition("# ")[2]}, line
    fine = tmp_path / "fine.py"
    fine.write_text(
        '"""/dev/null and os.fork() in a docstring."""\n'
        'getattr(os, "O_NOFOLLOW", 0); torch.cuda.is_available(); open(p, "rb"); p.open("rb"); Image.open(p)\n'
        'p.read_text("utf-8"); p.write_text(t, encoding="utf-8"); open(p, encoding="utf-8"); p.replace(q)\n'
        "tempfile.TemporaryDirectory(ignore_cleanup_errors=True)\n"
        "frame.rename(columns=names); np.float64(1); p.relative_to(q).as_posix(); archive.open(member)\n",
        encoding="utf-8",
    )
    assert not list(findings(fine, tmp_path))


def test_files_that_we_write_have_names_that_windows_accepts(tmp_path: Path) -> None:
    import json

    from gen2embed_mteb import cli

    (tmp_path / "pairs.jsonl").write_text(json.dumps({"anchor": "a", "positive": "b"}) + "\n", encoding="utf-8")
    words = ["sample", "--method", "in-batch", "--data_dir", str(tmp_path / "pairs.jsonl")]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    names = [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "out").rglob("*")]
    assert names and not [name for name in names if set(name) & set('<>:"|?*\\') or name.endswith((".", " "))]


def test_a_subset_whose_name_windows_refuses_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers.sampling.records import name_fault

    assert name_fault("a:b") is None
    monkeypatch.setattr(os, "name", "nt")
    assert "Windows" in str(name_fault("a:b")) and name_fault("Scenes_t2i") is None
