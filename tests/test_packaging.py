"""What an installation puts on a machine: wheel and editable, each in an environment of its own, asked from outside."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from environments import ROOT, Environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gen2embed_mteb

pytestmark = pytest.mark.slow

LOADED = "import sys; print(*sorted(sys.modules))"
HOOKED = "import sys; print('_Finder' in [type(f).__name__ for f in sys.meta_path])"
ENCODE_MINI = """
from sentence_transformers import SentenceTransformer
print(SentenceTransformer("gen2embed-mini", device="cpu").encode_query(["a red circle"]).shape[0])
"""


@pytest.fixture(scope="module", params=["wheel", pytest.param("editable", marks=pytest.mark.exhaustive)])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """An environment with Gen2Embed installed in one of the two ways."""
    environment = Environment(tmp_path_factory.mktemp(request.param))
    environment.install(*([str(wheel)] if request.param == "wheel" else ["--editable", str(ROOT)]))
    return environment


@pytest.fixture
def from_wheel(wheel: Path, tmp_path: Path) -> Iterator[Environment]:
    """An environment of one test's own, to be damaged."""
    environment = Environment(tmp_path / "environment")
    environment.install(str(wheel))
    yield environment
    shutil.rmtree(environment.site)


def test_wheel_holds_what_is_needed_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"gen2embed_mteb", "trainers", "vlm2vec_adapter", "_gen2embed_hook.py", "gen2embed_hook.pth"}
    data = [
        path.relative_to(ROOT).as_posix()
        for pattern in (
            "gen2embed_mteb/**/*.jinja",
            "gen2embed_mteb/mini/model/*",
            "gen2embed_mteb/*/data/*.json",
            "*/py.typed",
        )
        for path in ROOT.glob(pattern)
    ]
    assert {Path(name).suffix for name in data} >= {".jinja", ".safetensors", ".json", ".typed"}
    assert "gen2embed_mteb/embedder/families/templates/chatml.jinja" in data
    assert set(data) <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_version_and_pins_agree_with_the_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    assert pins["torch"] == "2.13.0"
    assert "torch==2.13.0 " in (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
    version = gen2embed_mteb.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{version}]" in changes or f"What will be {version}." in changes


@pytest.fixture(scope="module")
def printed(installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What one process prints by name, as sentence-transformers takes seconds to import."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "gen2embed").mkdir()
    code = f"""
import os
{ENCODE_MINI}
os.chdir({str(folder)!r})
try:
    SentenceTransformer("gen2embed", device="cpu", local_files_only=True)
except (OSError, ValueError) as error:  # an empty folder is no model, and it is the folder that is complained about
    print("Qwen" in str(error), "gen2embed" in str(error))
from gen2embed_mteb import Gen2Embed, HierarchicalPrompt
import gen2embed_mteb
print(Gen2Embed.__name__, HierarchicalPrompt.__name__, hasattr(gen2embed_mteb, "Gen2Embedd"))
"""
    lines = installed.run(code).stdout.splitlines()
    return dict(zip(("short name", "folder", "names"), (line.split() for line in lines), strict=True))


def test_short_name_loads_from_any_folder(printed: dict[str, list[str]]) -> None:
    assert printed["short name"] == ["1"]


@pytest.mark.exhaustive  # test_mteb_mmeb runs `mteb` from a wheel
def test_mteb_knows_models_tasks_and_benchmarks_without_an_import_of_ours(installed: Environment) -> None:
    code = """
import mteb
print(mteb.get_model_meta("gen2embed").name, mteb.get_model_meta("gen2embed-mini").name)
print([task.metadata.name for task in mteb.get_tasks(["MMEB-ImageNet-1K", "MMEB-mini-Digits"])])
print(len(mteb.get_benchmark("MMEB").tasks), len(mteb.get_benchmark("MMEB-mini").tasks))
"""
    result = installed.run(code)
    assert result.stdout.splitlines() == [
        "Gen2Embed/Qwen2-VL-2B-Instruct Gen2Embed/gen2embed-mini",
        "['MMEB-ImageNet-1K', 'MMEB-mini-Digits']",
        "36 16",
    ]
    assert "gen2embed" not in result.stderr.lower()


@pytest.mark.exhaustive
def test_mteb_knows_none_of_them_with_the_hook_off(installed: Environment) -> None:
    without = installed.run("import mteb; mteb.get_model_meta('gen2embed-mini')", expect=1, GEN2EMBED_NO_HOOK="1")
    assert "KeyError" in without.stderr


def test_folder_of_that_name_wins(printed: dict[str, list[str]]) -> None:
    assert printed["folder"] == ["False", "True"]


def test_start_up_imports_the_hook_alone(installed: Environment) -> None:
    with_hook = set(installed.run(LOADED).stdout.split())
    hook = installed.site / "gen2embed_hook.pth"
    hidden = hook.rename(hook.with_suffix(".off"))
    try:
        without = set(installed.run(LOADED).stdout.split())
    finally:
        hidden.rename(hook)
    assert with_hook - without == {"_gen2embed_hook"}


def test_package_imports_nothing_but_the_standard_library(installed: Environment) -> None:
    code = """
import sys
before = set(sys.modules)
import gen2embed_mteb
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(tops - set(sys.stdlib_module_names)))
assert {"Gen2Embed", "HierarchicalPrompt", "__version__"} <= set(dir(gen2embed_mteb))
"""
    assert installed.run(code).stdout.split() == ["gen2embed_mteb"]


def test_public_names_are_found_and_others_refused(printed: dict[str, list[str]]) -> None:
    assert printed["names"] == ["Gen2Embed", "HierarchicalPrompt", "False"]


@pytest.mark.exhaustive
def test_opt_out_leaves_the_interpreter_untouched_until_the_package_is_imported(installed: Environment) -> None:
    assert installed.run(HOOKED).stdout.split() == ["True"]
    assert installed.run(HOOKED, GEN2EMBED_NO_HOOK="0").stdout.split() == ["True"]
    assert installed.run(HOOKED, GEN2EMBED_NO_HOOK="1").stdout.split() == ["False"]
    code = f"""
from sentence_transformers import SentenceTransformer
try:
    SentenceTransformer("gen2embed-mini", device="cpu")
except OSError:
    print("unknown")
import gen2embed_mteb
{ENCODE_MINI}
"""
    assert installed.run(code, GEN2EMBED_NO_HOOK="1").stdout.split() == ["unknown", "1"]


@pytest.mark.exhaustive
def test_python_starts_and_libraries_import_when_half_of_it_was_removed(from_wheel: Environment) -> None:
    code = "import sentence_transformers; print('fine')"
    shutil.rmtree(from_wheel.site / "gen2embed_mteb")
    result = from_wheel.run(code)
    assert (result.stdout.split(), "gen2embed" in result.stderr.lower()) == (["fine"], False)

    (from_wheel.site / "_gen2embed_hook.py").write_text("def start(:\n", encoding="utf-8")  # a broken copy
    assert from_wheel.run("print('fine')").stderr == ""
    (from_wheel.site / "_gen2embed_hook.py").unlink()
    assert from_wheel.run("print('fine')").stderr == ""


@pytest.mark.exhaustive
def test_uninstalling_leaves_nothing_behind(from_wheel: Environment) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(from_wheel.python), "uninstall", "-qq", "-y", "gen2embed"]
    subprocess.run(command, check=True)
    left = {path.name for path in from_wheel.site.iterdir() if path.name != "__pycache__"}
    assert left == {"zz_dependencies.pth"}
    assert from_wheel.run(HOOKED).stdout.split() == ["False"]
