"""We replace or delete only what we can prove to be ours."""

import ast
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage import atomic
from gen2embed_mteb.storage.atomic import (
    ForeignFileError,
    new_token,
    remove_stale,
    temporary_of,
    write_atomic,
    write_in_scratch,
)
from gen2embed_mteb.storage.new_folder import damage, new_folder
from gen2embed_mteb.storage.owned_folder import LEDGER, LOCK, OwnedFolder

ROOT = Path(__file__).parents[2]
PACKAGES = ("gen2embed_mteb", "trainers", "vlm2vec_adapter")


def _tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (LEDGER, LOCK)
    }


def _but_for_access(path: Path) -> dict[str, int]:
    """What the system knows of a file, link or folder, but for when it was last read, which reading may change."""
    found = os.lstat(path)
    return {name: getattr(found, name) for name in dir(found) if name.startswith("st_") and "atime" not in name}


def test_ours_is_replaced_and_removed(tmp_path: Path) -> None:
    folder = OwnedFolder(tmp_path / "new", "sample")
    folder.write("a.json", b"1")
    folder.write("a.json", b"2")
    folder.write("deep/er/b", b"3")
    assert _tree(tmp_path / "new") == {"a.json": b"2", "deep/er/b": b"3"}
    assert OwnedFolder(tmp_path / "new", "sample").owns("a.json")
    assert folder.remove("a.json")
    assert not folder.remove("a.json")
    assert _tree(tmp_path / "new") == {"deep/er/b": b"3"}


def test_the_ledger_has_our_name_version_and_digests(tmp_path: Path) -> None:
    OwnedFolder(tmp_path, "sample").write("a", b"abc")
    ledger = json.loads((tmp_path / LEDGER).read_bytes())
    assert ledger["made_by"] == "gen2embed"
    assert ledger["version"] == "0.1.0"
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", FIPS 180-4
    assert ledger["files"] == {"a": {"writer": "sample", "sha256": [digest]}}


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"the user's"),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(path.with_name("elsewhere")),
        os.mkfifo,
    ],
    ids=["file", "folder", "dangling link", "fifo"],
)
def test_what_others_made_is_refused(tmp_path: Path, make) -> None:
    make(tmp_path / "a.json")
    before = _but_for_access(tmp_path / "a.json")
    folder = OwnedFolder(tmp_path, "sample")
    for act in (
        lambda: folder.check(["a.json"]),
        lambda: folder.write("a.json", b"ours"),
        lambda: folder.remove("a.json"),
    ):
        with pytest.raises(ForeignFileError, match=r"a\.json"):
            act()
    assert _but_for_access(tmp_path / "a.json") == before


def test_a_file_of_ours_that_was_edited_is_the_users(tmp_path: Path) -> None:
    folder = OwnedFolder(tmp_path, "evaluate")
    folder.write("results.md", b"ours")
    (tmp_path / "results.md").write_bytes(b"ours, with notes")
    with pytest.raises(ForeignFileError, match="was changed since"):
        folder.write("results.md", b"newer")
    assert (tmp_path / "results.md").read_bytes() == b"ours, with notes"


def test_another_command_s_file_is_foreign(tmp_path: Path) -> None:
    OwnedFolder(tmp_path, "sample").write("train.json", b"the record of a subset called train")
    with pytest.raises(ForeignFileError, match="written by gen2embed sample"):
        OwnedFolder(tmp_path, "train").write("train.json", b"the record of a training run")


def test_the_same_bytes_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    inode = (tmp_path / "a").stat().st_ino
    OwnedFolder(tmp_path, "sample").write("a", b"x")
    write_atomic(tmp_path / "a", b"x")
    assert (tmp_path / "a").stat().st_ino == inode
    with pytest.raises(ForeignFileError):
        write_atomic(tmp_path / "a", b"y")


def test_an_input_is_never_an_output(tmp_path: Path) -> None:
    folder = OwnedFolder(tmp_path, "sample")
    folder.write("train.parquet", b"clusters")
    with pytest.raises(ForeignFileError, match="is an input"):
        folder.check(["train.parquet"], inputs=[tmp_path / "x" / ".." / "train.parquet"])


@pytest.mark.parametrize("name", ["../a", "/a", "", "a/../../b", LEDGER])
def test_no_name_leads_out_or_to_the_ledger(tmp_path: Path, name: str) -> None:
    with pytest.raises(Gen2EmbedError):
        OwnedFolder(tmp_path / "f", "sample").write(name, b"x")


@pytest.mark.parametrize("content", [b"{}", b"not json", b'{"made_by": "gen2embed", "format": 1, "files": []}', b"[1]"])
def test_a_ledger_that_is_none_proves_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / LEDGER).write_bytes(content)
    with pytest.raises(ForeignFileError):
        OwnedFolder(tmp_path, "sample").write("a", b"y")
    assert (tmp_path / "a").read_bytes() == b"x"


@pytest.mark.parametrize("calls", range(1, 7))
def test_a_kill_at_any_step_leaves_a_file_that_is_ours(tmp_path: Path, calls: int) -> None:
    """Every rename and fsync of a write is a place to be killed at; the next run replaces the file all the same."""
    OwnedFolder(tmp_path, "sample").write("a", b"old")
    code = f"""
import os, pathlib
left = {calls}
def dying(stock):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os._exit(9)
        return stock(*args, **kwargs)
    return call
os.fsync = dying(os.fsync)
pathlib.Path.replace = dying(pathlib.Path.replace)
from gen2embed_mteb.storage.owned_folder import OwnedFolder
OwnedFolder({str(tmp_path)!r}, "sample").write("a", b"new")
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == 9
    assert (tmp_path / "a").read_bytes() in (b"old", b"new")
    OwnedFolder(tmp_path, "sample").write("a", b"newest")
    assert (tmp_path / "a").read_bytes() == b"newest"


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "f", "export") as folder:
        (folder / "a").write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "f", "export") as folder:
        (folder / "a").write_bytes(b"whole")
        assert not (tmp_path / "f").exists()
    assert _tree(tmp_path / "f") == {"a": b"whole"}
    assert damage(tmp_path / "f", "export") is None
    (tmp_path / "f" / "a").write_bytes(b"cut")
    assert damage(tmp_path / "f", "export") is not None
    with pytest.raises(ForeignFileError), new_folder(tmp_path / "f", "export"):
        pass


def test_adopting_moves_all_or_nothing(tmp_path: Path) -> None:
    folder = OwnedFolder(tmp_path, "train")
    (tmp_path / "config.json").write_bytes(b"of another model")
    with pytest.raises(ForeignFileError, match=r"config\.json"), folder.scratch() as scratch:
        (scratch / "adapter").mkdir()
        (scratch / "adapter" / "a").write_bytes(b"1")
        (scratch / "config.json").write_bytes(b"2")
        folder.adopt(scratch)
    assert _tree(tmp_path) == {"config.json": b"of another model"}
    (tmp_path / "config.json").unlink()
    for content in (b"2", b"3"):
        with folder.scratch() as scratch:
            (scratch / "config.json").write_bytes(content)
            assert folder.adopt(scratch) == ["config.json"]
    assert _tree(tmp_path) == {"config.json": b"3"}


def test_a_tree_is_removed_only_if_all_of_it_is_ours(tmp_path: Path) -> None:
    folder = OwnedFolder(tmp_path, "train")
    folder.write("steps/1/a", b"x")
    OwnedFolder(tmp_path / "steps" / "1" / "eval", "evaluate").write("b", b"y")
    (tmp_path / "steps" / "notes.txt").write_bytes(b"the user's")
    with pytest.raises(ForeignFileError, match=r"notes\.txt"):
        folder.remove_tree("steps")
    assert len(_tree(tmp_path)) == 3
    (tmp_path / "steps" / "notes.txt").unlink()
    assert folder.remove_tree("steps")
    assert _tree(tmp_path) == {}
    assert not folder.owns("steps/1/a")


def test_a_tree_is_checked_without_a_change_and_each_ledger_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OwnedFolder(tmp_path, "mini")
    for number in range(20):
        folder.write(f"images/{number}.png", b"x")
    reads: list[Path] = []
    stock = OwnedFolder.read_ledger
    monkeypatch.setattr(OwnedFolder, "read_ledger", lambda self: (reads.append(self.path), stock(self))[1])
    folder.check_tree("images")
    assert sorted(reads) == [tmp_path]
    folder.check_tree("there is none")
    (tmp_path / "images" / "mine.png").write_bytes(b"y")
    before = _tree(tmp_path)
    with pytest.raises(ForeignFileError, match=r"mine\.png"):
        folder.check_tree("images")
    (tmp_path / "link").symlink_to("images")
    with pytest.raises(ForeignFileError, match="link"):
        folder.check_tree("link")
    assert _tree(tmp_path) == before


def test_changed_names_what_the_ledger_knows_otherwise(tmp_path: Path) -> None:
    folder = OwnedFolder(tmp_path, "mini")
    for name in "abc":
        folder.write(name, b"x")
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_bytes(b"y")
    (tmp_path / "d").write_bytes(b"of another")
    assert folder.changed("abcd") == ["a", "b"]
    assert OwnedFolder(tmp_path / "none", "mini").changed("a") == []


def test_setting_aside_keeps_everything(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        (tmp_path / "a.npy").write_bytes(content)
        atomic.set_aside(tmp_path / "a.npy")
    assert sorted(path.read_bytes() for path in tmp_path.glob("a.npy.set-aside-*")) == [b"one", b"two"]
    assert len(list(tmp_path.iterdir())) == 2


def test_only_what_the_digest_proves_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert not atomic.remove_proved(path, "0" * 64)
    (tmp_path / "link").symlink_to(path)
    assert not atomic.remove_proved(tmp_path / "link", atomic.sha256_of(path))
    assert path.exists()
    assert atomic.remove_proved(path, atomic.sha256_of(path))
    assert not path.exists()
    assert not atomic.remove_proved(path, "0" * 64)


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "字" * 85])
def test_a_name_may_be_as_long_as_the_file_system_has_it(tmp_path: Path, name: str) -> None:
    OwnedFolder(tmp_path, "sample").write(name, b"x")
    assert _tree(tmp_path) == {name: b"x"}


def test_stale_temporary_files_of_ours_alone_are_removed(tmp_path: Path) -> None:
    names = [".a.0123456789ab.gen2embed-tmp", ".a.tmp", ".a.0123456789ab.tmp", ".x.gen2embed-tmp", "a.npy"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".b.0123456789ab.gen2embed-tmp").write_bytes(b"")  # of a process at work
    atomic.remove_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], ".b.0123456789ab.gen2embed-tmp"])


DELETING = {"rmtree", "unlink", "rmdir", "removedirs", "rename", "renames", "move", "copyfile", "copytree"}
WRITING = {"write_text", "write_bytes"}
OWNERS = [f"gen2embed_mteb/storage/{name}.py" for name in ("atomic", "held_folder", "new_folder", "owned_folder")]
ALLOWED = {
    "gen2embed_mteb/storage/developer_files.py": "replaces what a benchmark's --output names",
    # What each of these may do beside those above, and why.
    "gen2embed_mteb/mini/pretrain.py": "a developers' tool that writes the embedded model",
    "gen2embed_mteb/distributed/encoder.py": "notes, under temporary names with a token of this run",
    "gen2embed_mteb/distributed/shared_folder.py": "a probe, under a temporary name with a token of this run",
    "gen2embed_mteb/distributed/worker.py": "the note whose temporary name the driver made up for this shard",
    "gen2embed_mteb/encode_command/report.py": "a file of a scratch folder",
    "gen2embed_mteb/encode_command/row_images.py": "images in a folder of `held_folder`",
    "gen2embed_mteb/serving/plain_client.py": "a folder of tempfile, new and empty",
}


def test_known_names_are_the_writers_own(tmp_path: Path) -> None:
    OwnedFolder(tmp_path, "sample").write("b", b"x")
    folder = OwnedFolder(tmp_path, "train")
    folder.write("c/d", b"x")
    folder.write("a", b"x")
    (tmp_path / "a").unlink()
    assert folder.known() == ["a", "c/d"]
    assert OwnedFolder(tmp_path / "nowhere", "train").known() == []


def test_damage_names_the_first_fault(tmp_path: Path) -> None:
    with new_folder(tmp_path / "f", "train") as folder:
        for name in ("a", "b"):
            (folder / name).write_bytes(b"x")
    assert damage(tmp_path / "f", "train") is None
    assert damage(tmp_path / "f", "sample") == "it has no ledger of gen2embed sample"
    (tmp_path / "f" / "b").write_bytes(b"y")
    assert damage(tmp_path / "f", "train") == "b was changed since gen2embed wrote it"
    (tmp_path / "f" / "a").unlink()
    assert damage(tmp_path / "f", "train") == "a is missing"
    assert damage(tmp_path / "nowhere", "train") == "it has no ledger of gen2embed train"


def test_several_processes_write_into_one_new_folder(tmp_path: Path) -> None:
    token = new_token()
    with new_folder(tmp_path / "f", "train", token) as folder:
        assert folder == temporary_of(tmp_path / "f", token)
        (folder / "a").write_bytes(b"x")
    assert damage(tmp_path / "f", "train") is None


def test_a_library_s_file_is_replaced_in_a_temporary_folder_alone(tmp_path: Path) -> None:
    with OwnedFolder(tmp_path, "train").scratch() as scratch:
        (scratch / "README.md").write_bytes(b"of a library")
        write_in_scratch(scratch / "README.md", b"ours")
        assert (scratch / "README.md").read_bytes() == b"ours"
    (tmp_path / "README.md").write_bytes(b"the user's")
    with pytest.raises(ForeignFileError, match="in no temporary folder"):
        write_in_scratch(tmp_path / "README.md", b"ours")
    assert (tmp_path / "README.md").read_bytes() == b"the user's"


def test_a_temporary_folder_s_own_ledger_is_not_adopted(tmp_path: Path) -> None:
    folder = OwnedFolder(tmp_path / "f", "train")
    with folder.scratch() as scratch:
        OwnedFolder(scratch, "save").write("a", b"x")
        assert folder.adopt(scratch) == ["a"]
    assert folder.known() == ["a"]


def test_young_leftovers_are_deleted_where_no_other_process_can_be(tmp_path: Path) -> None:
    folder = OwnedFolder(tmp_path, "train")
    left = temporary_of(tmp_path / "checkpoint-1", new_token())
    left.mkdir()
    mine = tmp_path / ".mine.gen2embed-tmp"
    mine.write_bytes(b"x")
    remove_stale(tmp_path)
    assert left.is_dir()
    with folder.exclusive():
        remove_stale(tmp_path, older_than=0)
    assert not left.exists()
    assert mine.exists()  # not a name of ours


def test_a_file_that_was_written_but_not_noted_is_noted_by_the_next_run(tmp_path: Path) -> None:
    folder = OwnedFolder(tmp_path, "train")
    folder.write("a", b"old")
    folder._announce({"a": sha256(b"new").hexdigest()})  # killed behind this, and behind the rename
    (tmp_path / "a").write_bytes(b"new")
    folder.write("a", b"new")
    ledger = json.loads((tmp_path / LEDGER).read_bytes())
    assert ledger["files"]["a"]["sha256"] == [sha256(b"new").hexdigest()]


def _forbidden(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        mode = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
        if (
            name in DELETING | WRITING
            or (name == "replace" and (len(node.args) == 1 or owner == "os") and not node.keywords)
            or (name == "remove" and owner == "os")
            or (name == "put" and isinstance(node.func, ast.Name))  # `storage.atomic.put` asks for no proof
            or (name == "open" and any(isinstance(m, str) and set(m) & set("wax+") and len(m) <= 3 for m in mode))
        ):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    return found


def test_nothing_else_deletes_or_replaces() -> None:
    walked = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    found = [
        place
        for path in walked
        if path.relative_to(ROOT).as_posix() not in {*OWNERS, *ALLOWED}
        for place in _forbidden(path)
    ]
    assert found == []


def test_commands_for_users_do_not_write_as_developers_tools_do() -> None:
    users = [
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if "developer_files" in path.read_text(encoding="utf-8")
    ]
    assert users == ["gen2embed_mteb/mini/pretrain.py"]
