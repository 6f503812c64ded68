"""Finds what works on Linux alone, or with CUDA alone, in source code: by its syntax tree, not by its text."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_POSIX_NAMES = """
os: fork forkpty register_at_fork getuid geteuid getgid getegid setuid setgid setsid getpgid killpg kill link symlink
os: chown lchown fchown fchmod mkfifo mknod uname getloadavg nice statvfs fstatvfs sched_getaffinity sched_setaffinity
os: posix_fadvise posix_fallocate pread pwrite fdatasync sync waitpid wait wait3 wait4 WNOHANG getpriority sendfile
os: O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_CLOEXEC O_SYNC memfd_create pipe2 sysconf openpty ttyname
signal: SIGKILL SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGQUIT SIGCHLD SIGPIPE SIGSTOP SIGCONT setitimer getitimer alarm pause
signal: ITIMER_REAL pthread_sigmask pthread_kill sigwait siginterrupt
select: epoll poll kqueue
time: clock_gettime tzset
"""
POSIX_ONLY = frozenset(
    f"{module}.{name}"
    for module, _, names in (line.partition(": ") for line in _POSIX_NAMES.strip().splitlines())
    for name in names.split()
)
POSIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix")
POSIX_METHODS = ("symlink_to", "hardlink_to", "lchmod")
PLACES = ("/dev/", "/proc/", "/sys/", "/tmp/", "/etc/", "/usr/")
_TEXT_METHODS = ("read_text", "write_text")


class Finding(NamedTuple):
    """What was found.

    Attributes:
        file: The file, from the root.
        rule: The rule: `posix`, `cuda`, `float64`, `text`, `rename`, `slash`, or `start`.
        name: What it is, such as `os.fork`.
        line: Where.
    """

    file: str
    rule: str
    name: str
    line: int


def findings(path: Path, root: Path) -> Iterator[Finding]:
    """Yield what a file has that does not run everywhere.

    Args:
        path: The file.
        root: The folder that file names are relative to.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    name = path.relative_to(root).as_posix()
    documentation = {id(text) for node in ast.walk(tree) for text in _documentation(node)}
    for node in ast.walk(tree):
        if id(node) not in documentation:
            for rule, what in _of(node):
                yield Finding(name, rule, what, getattr(node, "lineno", 0))


def _documentation(node: ast.AST) -> list[ast.AST]:
    """Return the texts among a body's statements: docstrings of modules, classes, functions and fields."""
    body = getattr(node, "body", None)
    texts = [one.value for one in body if isinstance(one, ast.Expr)] if isinstance(body, list) else []
    return [text for text in texts if isinstance(text, ast.Constant)]


def _of(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        yield from (("posix", one.name) for one in node.names if one.name in POSIX_MODULES)
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if module in POSIX_MODULES:
            yield "posix", module
        names = (f"{module}.{one.name}" for one in node.names)
        yield from (("posix", name) for name in names if name in POSIX_ONLY)
    elif isinstance(node, ast.Attribute):
        yield from _attribute(node)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        if node.value.startswith(PLACES):
            yield "posix", node.value
        if "%-" in node.value and node.value.startswith("%"):
            yield "posix", node.value
        if node.value == "cuda" or node.value.startswith("cuda:"):
            yield "cuda", repr(node.value)
        if node.value in ("fork", "forkserver"):
            yield "start", node.value
    elif isinstance(node, ast.Call):
        yield from _call(node)


def _attribute(node: ast.Attribute) -> Iterator[tuple[str, str]]:
    owner = _dotted(node.value)
    if f"{owner}.{node.attr}" in POSIX_ONLY:
        yield "posix", f"{owner}.{node.attr}"
    if owner == "torch.cuda" and node.attr != "is_available":
        yield "cuda", f"torch.cuda.{node.attr}"
    if owner == "torch" and node.attr in ("float64", "double"):
        yield "float64", f"torch.{node.attr}"


def _call(node: ast.Call) -> Iterator[tuple[str, str]]:
    function = node.func
    method = function.attr if isinstance(function, ast.Attribute) else ""
    name = _dotted(function)
    given = {one.arg for one in node.keywords}
    if method == "TemporaryDirectory" and "ignore_cleanup_errors" not in given:
        yield "posix", "TemporaryDirectory"  # Windows deletes no file that is mapped into memory
    if "dir_fd" in given or "src_dir_fd" in given:
        yield "posix", "dir_fd"
    if method in POSIX_METHODS:
        yield "posix", f".{method}"
    if method == "cuda" and not node.args:
        yield "cuda", ".cuda()"
    if method == "pin_memory" or any(one.arg == "pin_memory" and _is_true(one.value) for one in node.keywords):
        yield "cuda", "pin_memory"
    if method == "double" and not node.args:
        yield "float64", ".double()"
    if name == "os.rename" or (method == "rename" and len(node.args) == 1 and not node.keywords):
        yield "rename", name if name == "os.rename" else ".rename"
    if "encoding" not in given and _is_text(name, method, node):
        yield "text", name or f".{method}"
    if (
        method == "split"
        and [getattr(one, "value", None) for one in node.args[:1]] == ["/"]
        and _is_str_call(function.value)
    ):
        yield "slash", 'str(…).split("/")'
    if name == "str" and node.args and _is_relative(node.args[0]):
        yield "slash", "str(….relative_to(…))"
    if name in ("multiprocessing.Process", "mp.Process", "multiprocessing.Pool", "mp.Pool"):
        yield "start", name


def _is_text(name: str, method: str, node: ast.Call) -> bool:
    """Return whether a call opens a text without saying its encoding, which is another on Windows."""
    if method in _TEXT_METHODS:  # read_text(encoding), write_text(text, encoding)
        return len(node.args) <= (method == "write_text")
    modes = [one.value for one in node.keywords if one.arg == "mode"]
    if name in ("open", "io.open", "gzip.open", "bz2.open", "lzma.open"):
        modes += node.args[1:2]
        default = "r" if name in ("open", "io.open") else "rb"
    elif method == "open" and (not node.args or _is_mode(node.args[0])):
        modes += node.args[:1]
        default = "r" if not node.args and not node.keywords else "rb"
    elif method in ("NamedTemporaryFile", "TemporaryFile"):
        modes += node.args[:1]
        default = "w+b"
    else:
        return any(one.arg in ("text", "universal_newlines") and _is_true(one.value) for one in node.keywords)
    mode = modes[0] if modes else ast.Constant(default)
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


def _is_mode(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Constant) else None
    return isinstance(value, str) and 0 < len(value) < 4 and set(value) <= set("rwabtx+")


def _is_true(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_str_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _dotted(node.func) == "str"


def _is_relative(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "relative_to"


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""
