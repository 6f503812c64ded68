"""The base class of errors, and what becomes one line on the terminal."""

import ast
import errno
import io
from pathlib import Path

import pytest

from gen2embed_mteb.errors import Gen2EmbedError, is_of_the_system, one_line, run_command

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
