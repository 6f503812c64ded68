"""What README and docs say is so: their code runs, prints what they state, and their links, flags and paths exist."""

import ast
import importlib
import importlib.util
import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import PLAIN, ROOT, RUN, blocks_of, pages
from preloaded import Preloaded
from samples import sample_of

pytestmark = pytest.mark.slow

PAGES = pages()
READ_FIRST = ("README.md", "CONTRIBUTING.md", "docs/quickstart.md", "docs/guides/encode.md")
"""The pages whose blocks the gate runs; `make test-all` runs those of all."""
OURS = ("gen2embed_mteb", "trainers", "vlm2vec_adapter")
REPOSITORY = "https://github.com/gen2embed/gen2embed"
_LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def hooks() -> Any:
    """`docs/hooks.py`, which writes the reference of flags."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ran(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, preloaded: Preloaded
) -> dict[str, list[dict[str, Any]]]:
    """What the blocks of each page printed that is to be tested."""
    folder = tmp_path_factory.mktemp("docs")
    chosen = {
        item.callspec.params.get("page")
        for item in request.session.items
        if hasattr(item, "callspec") and "ran" in item.fixturenames
    }
    runs = [page for page in PAGES if any(b.language in RUN and not b.reason for b in blocks_of(page))]
    wanted = [page for page in runs if page in chosen]
    own = dict.fromkeys(name for name in os.environ if name.startswith("GEN2EMBED_"))
    caches = {"HF_HOME": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "cache" / "datasets")}
    command = [str(ROOT / "tests" / "helpers" / "doc_blocks.py"), str(folder), *wanted]
    preloaded.run(command, check=True, cwd=folder, **own, **caches)
    results = {}
    for number, page in enumerate(wanted):
        said = (folder / f"{number}.err").read_text(errors="replace")[-4000:]
        assert (folder / f"{number}.json").is_file(), f"{page}: its process died\n{said}"
        results[page] = json.loads((folder / f"{number}.json").read_text())
        for result in results[page]:
            result["stderr"] = said
    return results


def test_every_block_is_run_or_says_why_not() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            where = f"{page}:{block.line}"
            assert block.language, f"{where}: name the language of this block"
            assert block.language in (*RUN, *PLAIN), f"{where}: {block.language} is neither run nor known as plain text"
            assert block.language in RUN or not block.reason, f"{where}: {block.language} is never run; drop the reason"


@pytest.mark.parametrize("page", PAGES)
def test_what_blocks_import_of_ours_is_there(page: str) -> None:
    """Of every page, also of blocks that are not run."""
    for block in blocks_of(page):
        if block.language != "python" or block.is_output:
            continue
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in OURS:
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name), f"{page}:{block.line}: {node.module} has no {name.name}"


@pytest.mark.parametrize("page", sample_of(PAGES, READ_FIRST))
def test_blocks_run_and_print_what_the_page_states(ran: dict[str, list[dict[str, Any]]], page: str) -> None:
    results = {result["line"]: result for result in ran.get(page, [])}
    printed = ""
    for block in blocks_of(page):
        if block.is_output:
            for line in block.code.splitlines():
                pattern = r"\s+".join(re.escape(word).replace("…", ".*") for word in line.split())
                assert re.search(pattern, printed), f"{page}:{block.line}: {line!r} is not in\n{printed}"
        elif block.language in RUN and not block.reason:
            assert block.line in results, f"{page}:{block.line} was not reached"
            result = results[block.line]
            assert not result["error"], f"{page}:{block.line}\n{result['error']}\n{result['stderr']}"
            printed = result["printed"]


def anchors_of(page: Path, hooks: Any) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    text = hooks.on_page_markdown(page.read_text(encoding="utf-8"))
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_links_lead_somewhere(page: str, hooks: Any) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in _LINK.findall(text):
        if link.startswith(f"{REPOSITORY}/blob/main/"):
            assert (ROOT / link.removeprefix(f"{REPOSITORY}/blob/main/")).exists(), f"{page}: {link}"
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link} leads nowhere"
        assert not anchor or anchor in anchors_of(target, hooks), f"{page}: {link}: no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md") and page != "CHANGELOG.md"])
def test_no_section_is_there_twice(page: str) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    sections = re.findall(r"^## .+$", text, flags=re.M)
    assert len(sections) == len(set(sections)), page


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_flag_is_in_the_reference(hooks: Any) -> None:
    import dataclasses

    from trainers.config import TrainConfig
    from trainers.recipe import SahaTrainingArguments
    from vlm2vec_adapter.options import Options

    listed = {
        command: {name for flag in flags for name in flag.names} for command, (_, flags) in hooks.commands().items()
    }
    text = hooks.reference()
    for command, parser in hooks.parsers().items():
        flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
        assert flags <= listed[command]
        assert all(f"`{flag}`" in text for flag in flags)
    assert {f"--{field.name}" for field in dataclasses.fields(TrainConfig)} <= listed["gen2embed train"]
    own = set(vars(SahaTrainingArguments)["__annotations__"])
    assert {f"--{name}" for name in own} <= listed["gen2embed train"]
    assert {f"--gen2embed_{field.name}" for field in dataclasses.fields(Options)} == listed["python -m vlm2vec_adapter"]
    known = set.union(*listed.values())
    for page in PAGES:
        for block in blocks_of(page):
            for command in re.findall(
                r"^(?:\w+=\S+ )?gen2embed (?:sample|evaluate|export|inspect|demo)\b.*", joined(block.code), re.M
            ):
                assert set(re.findall(r"(--\w+)", command)) <= known, f"{page}:{block.line}"


def joined(code: str) -> str:
    return code.replace("\\\n", " ")


def test_the_flags_page_has_the_place_for_the_reference(hooks: Any) -> None:
    page = (ROOT / "docs" / "reference" / "flags.md").read_text(encoding="utf-8")
    assert "| `--pool_multiplier` |" in hooks.on_page_markdown(page)


def test_what_architecture_names_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:gen2embed_mteb|trainers|vlm2vec_adapter|tests|benchmarks|docs)/[\w./-]*)`", text))
    assert len(paths) > 20
    missing = sorted(path for path in paths if not (ROOT / path).exists())
    assert not missing


def test_an_image_passes_the_files_that_architecture_names(tmp_path: Path) -> None:
    """Six files of ours do the work, and none is called on the way that the page does not name."""
    from PIL import Image

    from gen2embed_mteb import Gen2Embed

    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    way = text.split("## The way of one image", 1)[1].split("\n## ", 1)[0]
    assert len(re.findall(r"^\d+\. `gen2embed_mteb/[\w/]+\.py`", way, re.M)) <= 6
    named = set(re.findall(r"`(gen2embed_mteb/[\w/]+\.py)`", way))

    Image.new("RGB", (64, 64), "red").save(tmp_path / "mug.png")
    inputs = [{"text": "the same, but blue", "image": tmp_path / "mug.png"}]
    model = Gen2Embed("gen2embed-mini", device="cpu")
    model.encode_query(inputs)  # what is imported late is imported now
    called: set[str] = set()
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        model.encode_query(inputs)
    finally:
        sys.setprofile(None)
    ours = {Path(name).relative_to(ROOT).as_posix() for name in called if name.startswith(f"{ROOT}/gen2embed_mteb/")}
    assert ours == named


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        if page.startswith("docs/"):
            assert f" {page.removeprefix('docs/')}\n" in navigation, page


def test_notebooks_are_clean() -> None:
    found = [page for page in PAGES if page.endswith(".ipynb")]
    assert len(found) == 2
    for page in found:
        notebook = json.loads((ROOT / page).read_text(encoding="utf-8"))
        assert notebook["nbformat"] == 4
        for cell in notebook["cells"]:
            assert cell["cell_type"] != "code" or (cell["outputs"] == [] and cell["execution_count"] is None)


def test_metadata_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Repository"] == REPOSITORY
    for version in ("3.11", "3.12", "3.13", "3.14"):
        assert f"Programming Language :: Python :: {version}" in project["classifiers"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert "2508.00955" in citation and "license: Apache-2.0" in citation
