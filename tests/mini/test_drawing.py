"""MMEB-mini is drawn once, whole, and never over anybody's files."""

import os
import shutil
import subprocess
import sys

import pytest

from gen2embed_mteb import cli
from gen2embed_mteb.mini import benchmark
from gen2embed_mteb.storage.atomic import ForeignFileError
from gen2embed_mteb.storage.owned_folder import LEDGER

pytestmark = pytest.mark.slow


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "NUM_QUERIES", 3)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small `eval`, drawn without an interruption."""
    base = tmp_path_factory.mktemp("drawn") / "root"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "NUM_QUERIES", 3)
        return benchmark.ensure("eval", base)


def tree(folder):
    """Everything in a folder, links and empty folders too."""
    return {
        path.relative_to(folder).as_posix(): path.readlink()
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


FOREIGN = {
    "a file": lambda place: (place.mkdir(parents=True), (place / "mine.jpg").write_bytes(b"x")),
    "a file deep in it": lambda place: ((place / "a/b").mkdir(parents=True), (place / "a/b/c.png").write_bytes(b"x")),
    "hidden": lambda place: ((place / ".git").mkdir(parents=True), (place / ".git/HEAD").write_bytes(b"x")),
    "a link in it": lambda place: (place.mkdir(parents=True), (place / "a").symlink_to("/etc/hostname")),
    "a file in its place": lambda place: (place.parent.mkdir(), place.write_bytes(b"x")),
    "a link in its place": lambda place: (place.parent.mkdir(), place.symlink_to("/usr/share")),
    "a dangling link": lambda place: (place.parent.mkdir(), place.symlink_to("nowhere")),
}


@pytest.mark.parametrize(
    ("part", "place"), [(part, place) for part in benchmark.PLACES for place in benchmark.PLACES[part]]
)
def test_a_users_folder_is_refused_and_left_as_it_was(tmp_path, part, place):
    for number, make in enumerate(FOREIGN.values()):
        base = tmp_path / str(number)
        make(base / place)
        before = tree(base)
        with pytest.raises(ForeignFileError, match=r"not drawn into .*move it away, or choose another folder"):
            benchmark.ensure(part, base)
        assert tree(base) == before


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '{"version": "2", "seed": 8}', '{"images": []}', "[" * 99999]
)
def test_a_users_file_in_the_markers_place_is_refused(tmp_path, content):
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(ValueError, match=r"eval\.json"):
        benchmark.ensure("eval", tmp_path)
    assert tree(tmp_path) == {"eval.json": content.encode()}


def test_a_folder_or_pipe_in_the_markers_place_is_refused(tmp_path):
    for number, make in enumerate((os.mkdir, os.mkfifo)):
        (tmp_path / str(number)).mkdir()
        make(tmp_path / str(number) / "eval.json")
        with pytest.raises(ForeignFileError, match=r"eval\.json"):
            benchmark.ensure("eval", tmp_path / str(number))
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == ["eval.json"]


def draw_for_mteb(base, out):
    import mteb  # noqa: F401 # it loads our tasks

    from gen2embed_mteb.mteb_plugin.tasks.mmeb_tasks import TASKS

    TASKS["MMEB-mini"][0]()._locate()


def draw_captions_for_mteb(base, out):
    import mteb  # noqa: F401

    from gen2embed_mteb.mteb_plugin.tasks.caption_tasks import SugarCrepePlusPlusMini

    SugarCrepePlusPlusMini().load_data()


def draw_for_training(base, out):
    from trainers.config import TrainConfig
    from trainers.fine_tuning import _evaluator
    from trainers.recipe import SahaTrainingArguments

    config = TrainConfig(
        processed_data_path="saha", model_name="gen2embed-mini", eval_benchmark="mmeb-mini", eval_data_dir=str(base)
    )
    _evaluator(config, SahaTrainingArguments(output_dir=out, report_to="none", use_cpu=True, bf16=False))


COMMANDS = ["evaluate", "sugarcrepe", "sugarcrepe++", "demo", "vlm2vec", "mteb", "mteb captions", "train"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_draws_leaves_a_users_folder_alone(tmp_path, monkeypatch, capsys, command):
    """A clone of MMEB-eval and a COCO folder, given where MMEB-mini is to be drawn."""
    base = tmp_path / "clone"
    for name in ("images/VOC2007/1.jpg", "MMEB-eval/VOC2007/test-00000-of-00001.parquet", "val2017/1.jpg"):
        (base / name).parent.mkdir(parents=True)
        (base / name).write_bytes(b"the user's")
    before = tree(base)
    out = str(tmp_path / "out")
    if command in ("evaluate", "sugarcrepe", "sugarcrepe++"):
        name = "mmeb-mini" if command == "evaluate" else f"{command}-mini"
        words = ["evaluate", "--model_name", "gen2embed-mini", "--benchmark", name, "--overwrite"]
        assert cli.main([*words, "--data_dir", str(base), "--output_dir", out]) == 2
    elif command == "demo":
        assert cli.main(["demo", "--data_dir", str(base), "--output_dir", out]) == 2
    elif command == "vlm2vec":
        from vlm2vec_adapter.__main__ import main

        assert main(["mini", str(base)]) == 2
    else:
        start = {"mteb": draw_for_mteb, "mteb captions": draw_captions_for_mteb, "train": draw_for_training}[command]
        monkeypatch.setenv("MMEB_MINI_DIR", str(base))
        with pytest.raises(ForeignFileError, match="not drawn into"):
            start(base, out)
    assert tree(base) == before
    if "mteb" not in command and command != "train":
        assert "move it away, or choose another folder" in capsys.readouterr().err


def test_processes_that_want_it_at_once_draw_it_once(tmp_path, drawn):
    code = """
import sys
from gen2embed_mteb.mini import benchmark
benchmark.NUM_QUERIES = 3
stock = benchmark._WRITERS["eval"]
def counted(root, seed):
    with open(sys.argv[2], "a") as log:
        log.write("drawn\\n")
    stock(root, seed)
benchmark._WRITERS["eval"] = counted
root = benchmark.ensure("eval", sys.argv[1])
assert len(list((root / "MMEB-eval").iterdir())) == len(benchmark.MMEB_MINI.datasets)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "root"), str(tmp_path / "log")]
    workers = [subprocess.Popen(arguments) for _ in range(3)]
    assert [worker.wait(300) for worker in workers] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "drawn\n"
    assert tree(tmp_path / "root") == tree(drawn)


@pytest.mark.parametrize("moves", [*(pytest.param(moves, marks=pytest.mark.exhaustive) for moves in (1, 2, 100)), -1])
def test_killed_between_any_two_moves_it_is_drawn_again_to_the_same_bytes(tmp_path, drawn, small, moves):
    """-1: before the marker is written, when everything else is there."""
    total = sum(path.is_file() for path in drawn.rglob("*")) - 3  # but the marker, the ledger and the locks
    code = f"""
import os, pathlib
from gen2embed_mteb.mini import benchmark
benchmark.NUM_QUERIES = 3
left, stock = {moves if moves > 0 else total}, pathlib.Path.replace
def dying(path, target):
    global left
    if "scratch" in str(path):
        left -= 1
        if left < 0:
            os._exit(9)
    return stock(path, target)
pathlib.Path.replace = dying
write_json = benchmark.OwnedFolder.write_json
benchmark.OwnedFolder.write_json = lambda *args: os._exit(9)
benchmark.ensure("eval", {str(tmp_path / "root")!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert not (tmp_path / "root" / "eval.json").exists()
    assert any((tmp_path / "root" / place).exists() for place in benchmark.PLACES["eval"])
    benchmark.ensure("eval", tmp_path / "root")
    for path in (tmp_path / "root").glob(".scratch.*"):
        shutil.rmtree(path)  # goes after an hour
    assert tree(tmp_path / "root") == tree(drawn)


def test_a_whole_root_is_only_read(tmp_path, drawn, monkeypatch):
    """Also one that an earlier version drew, which has no ledger, and one on a disk that cannot be written."""
    root = tmp_path / "root"
    shutil.copytree(drawn, root)
    for name in (LEDGER, benchmark.LOCK, ".gen2embed-files.lock"):
        (root / name).unlink()
    before = tree(root)

    def refused(*_):
        raise OSError("Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    monkeypatch.setattr("pathlib.Path.mkdir", refused)
    assert benchmark.ensure("eval", root) == root
    assert tree(root) == before


def test_a_root_that_is_not_whole_is_refused(tmp_path, drawn):
    table = "MMEB-eval/Digits/test-00000-of-00001.parquet"
    for name, damage, reason in (
        ("missing", lambda path: path.unlink(), "is missing"),
        ("cut", lambda path: path.write_bytes(path.read_bytes()[:-9]), "was changed"),
        ("edited", lambda path: path.write_bytes(path.read_bytes() + b"x"), "was changed"),
    ):
        shutil.copytree(drawn, tmp_path / name)
        damage(tmp_path / name / table)
        with pytest.raises(ValueError, match=rf"{table} {reason}.*drawn again"):
            benchmark.ensure("eval", tmp_path / name)
    shutil.copytree(drawn, tmp_path / "no images")
    shutil.rmtree(tmp_path / "no images" / "images")
    with pytest.raises(ValueError, match="images is missing"):
        benchmark.ensure("eval", tmp_path / "no images")


@pytest.mark.exhaustive
def test_other_files_in_the_root_stay(tmp_path, small):
    """Such as a part drawn before, a results folder, and vectors."""
    benchmark.ensure("crepe", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    before = {name: data for name, data in tree(tmp_path).items() if name != LEDGER}
    benchmark.ensure("eval", tmp_path)
    assert before.items() <= tree(tmp_path).items()


def test_vlm2vecs_settings_replace_nothing(tmp_path, drawn, capsys):
    from vlm2vec_adapter.__main__ import main

    root = tmp_path / "root"
    shutil.copytree(drawn, root)
    for _ in range(2):
        assert main(["mini", str(root)]) == 0
    assert (root / "ziyjiang/MMEB_Test_Instruct").resolve() == root / "MMEB-eval-V2"
    (root / "image.yaml").write_text("mine")
    assert main(["mini", str(root)]) == 2
    assert "image.yaml was changed" in capsys.readouterr().err
    assert (root / "image.yaml").read_text() == "mine"
    other = tmp_path / "other"
    (other / "ziyjiang/MMEB_Test_Instruct").mkdir(parents=True)
    assert main(["mini", str(other)]) == 2
    assert [path.name for path in other.iterdir()] == ["ziyjiang"]


def test_a_home_folder_is_written_as_a_tilde(tmp_path, drawn, monkeypatch):
    shutil.copytree(drawn, tmp_path / "mini")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert benchmark.ensure("eval", "~/mini") == tmp_path / "mini"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert benchmark.default_root() == tmp_path / "cache" / "gen2embed" / "mmeb-mini-2"
    shutil.copytree(drawn, benchmark.default_root())
    assert benchmark.ensure("eval", "") == benchmark.default_root()
