"""Environments of their own, in which what an installation puts on a machine is asked from outside.

They are real (``venv`` and ``pip install``) but borrow the heavy dependencies of the running one through a ``.pth``
line, which keeps them cheap: nothing is downloaded.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("GEN2EMBED_", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout, built without a network."""
    # fmt: off
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-index", "--no-build-isolation",
               "--wheel-dir", str(folder), str(ROOT)]
    # fmt: on
    subprocess.run(command, check=True, cwd=folder)
    (built,) = folder.glob("gen2embed-*.whl")
    return built


class Environment:
    """A virtual environment that sees the running one's dependencies, after its own packages."""

    def __init__(self, path: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
        self.python = path / "bin" / "python"
        self.site = Path(self.run("import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        self.elsewhere = path / "elsewhere"
        self.elsewhere.mkdir()
        parent = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
        # Such a line extends sys.path only: start-up hooks of the running environment stay out. "zz": after our own.
        (self.site / "zz_dependencies.pth").write_text("\n".join(sorted(parent)) + "\n", encoding="utf-8")

    def install(self, *arguments: str) -> None:
        """``pip install`` of local files."""
        # fmt: off
        command = ["-m", "pip", "--python", str(self.python), "install", "-qq", "--no-deps", "--no-index",
                   "--no-build-isolation", "--ignore-installed", *arguments]
        # fmt: on
        subprocess.run([sys.executable, *command], check=True, cwd=self.elsewhere)

    def run(
        self, code: str, *flags: str, cwd: Path | None = None, expect: int = 0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run ``code`` in a fresh interpreter, in a folder that has nothing to do with the checkout.

        ``expect`` is the exit status that is asserted.
        """
        return self._run([*flags, "-c", code], cwd, expect, variables)

    def script(self, name: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a console script: one that was installed here, or a borrowed dependency's, but for its interpreter."""
        script = self.python.parent / name
        if not script.exists():
            borrowed = (Path(sys.executable).parent / name).read_text(encoding="utf-8")
            script.write_text("\n".join([f"#!{self.python}", *borrowed.splitlines()[1:]]) + "\n", encoding="utf-8")
        return self._run([str(script), *words], None, 0, variables)

    def _run(
        self, arguments: list[str], cwd: Path | None, expect: int, variables: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
        result = subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd or getattr(self, "elsewhere", None),
            env={**kept, "HF_HUB_OFFLINE": "1", **variables},
            text=True,
            capture_output=True,
            check=False,
        )
        assert result.returncode == expect, result.stderr
        return result
