"""The base class of errors, and what becomes one line on the terminal."""

import ast
import errno
import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from preloaded import Preloaded

from gen2embed_mteb.errors import Gen2EmbedError, full_disk_as_os_error, is_of_the_system, one_line, run_command

ROOT = Path(__file__).parents[1]
PACKAGES = ("gen2embed_mteb", "trainers", "vlm2vec_adapter")


def _raise(error: BaseException) -> None:
    raise error


def test_ours_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("gen2embed x", lambda: _raise(Gen2EmbedError("k is 0;\npass 1 or more"))) == 2
    assert capsys.readouterr().err == "gen2embed x: error: k is 0; pass 1 or more\n"


def test_a_full_disk_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("gen2embed x", lambda: _raise(OSError(errno.ENOSPC, "No space left on device", "a/b"))) == 2
    assert capsys.readouterr().err == (
        "gen2embed x: error: [Errno 28] No space left on device: 'a/b'; "
        "free space on that disk, then run the same command again\n"
    )


def test_ctrl_c_is_one_line_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("gen2embed x", lambda: _raise(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\ngen2embed x: interrupted; run the same command again to go on\n"


@pytest.mark.parametrize("dropped_by", ["a destructor", "the callback of a weak reference", "a library, in silence"])
def test_ctrl_c_that_is_dropped_is_repeated(dropped_by: str) -> None:
    """Python prints what is raised in a destructor or a weak reference's callback, and goes on."""
    code = f"""
import os, signal, sys, time, weakref
from gen2embed_mteb import errors
silent = {"silence" in dropped_by}
errors.REPEAT_SECONDS = 0.2 if silent else 1000
def interrupted(*_):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
class Destructor:
    __del__ = interrupted
class Watched:
    pass
def run():
    if {dropped_by == "a destructor"}:
        Destructor()
    elif not silent:
        watched = Watched()
        reference = weakref.ref(watched, interrupted)
        del watched
    else:
        try:
            interrupted()
        except BaseException:  # as libraries do, which is what is tested
            pass
    print("went on", flush=True)
    time.sleep(60)
sys.exit(errors.run_command("x", run))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == "went on\n"
    assert done.returncode == 130
    assert done.stderr == "\nx: interrupted; run the same command again to go on\n"


def test_workers_leave_ctrl_c_to_the_process_that_forked_them() -> None:
    """Python would print a traceback for a worker that has just started, before any code of its own runs."""
    code = """
import multiprocessing, os, signal, sys, time
from gen2embed_mteb import errors
def run():
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=time.sleep, args=(60,), daemon=True) for _ in range(4)]
    for worker in workers:
        worker.start()
        os.kill(worker.pid, signal.SIGINT)
    time.sleep(0.5)
    print([worker.is_alive() for worker in workers], flush=True)
    os.kill(os.getpid(), signal.SIGINT)
sys.exit(errors.run_command("x", run))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == "[True, True, True, True]\n"
    assert done.returncode == 130
    assert done.stderr == "\nx: interrupted; run the same command again to go on\n"


def test_other_errors_in_destructors_are_printed() -> None:
    code = """
from gen2embed_mteb import errors
class Faulty:
    def __del__(self):
        raise ValueError("a bug")
errors.run_command("x", Faulty)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: a bug" in done.stderr


def test_handlers_are_as_before_when_the_command_has_ended() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM), sys.unraisablehook
    assert run_command("x", lambda: 0) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM), sys.unraisablehook) == before


def test_the_command_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        assert run_command("x", lambda: _raise(KeyboardInterrupt()), go_on="pass --resume") == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # a second Ctrl-C ends the process at once
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\nx: interrupted; pass --resume to go on\n"
    assert run_command("x", lambda: _raise(OSError(errno.EDQUOT, "Quota exceeded", "a")), go_on="pass --resume") == 2
    assert capsys.readouterr().err.endswith("; free space on that disk, then pass --resume\n")


@pytest.mark.parametrize("writer", ["safetensors", "torch", "python"])
@pytest.mark.slow
def test_libraries_on_a_disk_without_room(tmp_path: Path, writer: str, preloaded: Preloaded) -> None:
    """A limit on the size of files fails as a full disk does: in the middle of a write, in the library's own way."""
    code = f"""
import resource, sys, torch, safetensors.torch
from gen2embed_mteb.errors import full_disk_as_os_error
weights = {{"a": torch.zeros(100_000)}}
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
path = {str(tmp_path / "file")!r}
try:
    with full_disk_as_os_error({str(tmp_path)!r}):
        if {writer!r} == "torch":
            torch.save(weights, path)
        elif {writer!r} == "safetensors":
            safetensors.torch.save_file(weights, path)
        else:
            open(path, "wb").write(bytes(400_000))
except OSError as error:
    assert error.filename == {str(tmp_path)!r}, error.filename
    sys.exit(error.errno)
"""
    done = preloaded.run(["-c", code])
    assert done.returncode == errno.EFBIG, done.stderr


def test_an_error_on_a_disk_with_room_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), full_disk_as_os_error(tmp_path / "not" / "there"):
        raise RuntimeError("a bug")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("of a library"), TypeError("a bug"), RuntimeError("another")])
def test_everything_else_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_command("gen2embed x", lambda: _raise(error))


@pytest.mark.parametrize("error", [Gen2EmbedError("x"), OSError("x"), KeyboardInterrupt()])
def test_verbose_keeps_every_traceback(error: BaseException) -> None:
    with pytest.raises(type(error)):
        run_command("gen2embed x", lambda: _raise(error), show_tracebacks=True)


def test_the_line_prints_on_any_terminal() -> None:
    assert one_line(Gen2EmbedError("a\nb\tc  d\x1b[31m \ud83d é")) == "a b c d\\x1b[31m \\ud83d é"
    assert one_line(MemoryError()) == "MemoryError"


def test_no_code_of_ours_raises_a_bare_value_error() -> None:
    """A bare ValueError of ours would end in a traceback, although the user can mend it."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and getattr(node.exc.func, "id", "") == "ValueError"
    ]
    assert found == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.ENOSPC, "No space left"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (MemoryError(), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (OSError("image file is truncated"), False),
        (ValueError("bad"), False),
    ],
)
def test_errors_of_the_system_are_told_from_those_of_a_file(error: Exception, expected: bool) -> None:
    assert is_of_the_system(error) is expected
    wrapped = Gen2EmbedError("cannot be read")
    wrapped.__cause__ = error
    assert is_of_the_system(wrapped) is expected


def test_a_reason_holds_no_memory_address() -> None:
    """Repeated runs write the same `errors.jsonl`: the address in the `repr` of an object differs from run to run."""
    lines = {one_line(ValueError(f"cannot read {stream!r}, nor {stream!r}")) for stream in (io.BytesIO(), io.BytesIO())}
    assert lines == {"cannot read <_io.BytesIO object>, nor <_io.BytesIO object>"}
    assert one_line(ValueError("at 0x1f of 0xff")) == "at 0x1f of 0xff"
