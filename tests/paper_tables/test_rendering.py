"""A table in its three forms: the same cells in the source's order, marks, and rows of ours where they belong."""

import re

import pytest

from gen2embed_mteb.paper_tables.published import NAMES, published
from gen2embed_mteb.paper_tables.rendering import as_latex, as_markdown, as_text
from gen2embed_mteb.paper_tables.view import PUBLISHED, RUN_HERE, OurFigures, View, view_of


def plain(name: str) -> View:
    return view_of(published(name), [], [])


def latex_rows(text: str) -> list[list[str]]:
    """The cells of each line between the rules, one that spans several counted as often; LaTeX's escapes undone."""
    body = text.split(r"\toprule")[1].split(r"\bottomrule", maxsplit=1)[0]
    rows = []
    for line in body.splitlines():
        if not line.endswith(r" \\"):
            continue
        cells = []
        for cell in line.removesuffix(r" \\").split(" & "):
            spanning = re.fullmatch(r"\\multicolumn\{(\d+)\}\{[lc]\}\{(.*)\}", cell)
            cells += [spanning[2]] * int(spanning[1]) if spanning else [cell]
        rows.append([re.sub(r"\\([&%$#_{}])", r"\1", cell) for cell in cells])
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_every_form_has_all_cells_in_the_sources_order(name: str) -> None:
    table, view = published(name), plain(name)
    width = 1 + len(table.columns)
    latex = latex_rows(as_latex(view))
    assert {len(row) for row in latex} == {width}
    markdown = [line[2:-2].split(" | ") for line in as_markdown(view).splitlines() if line.startswith("| ")]
    assert {len(row) for row in markdown} == {width}
    lines = as_text(view).splitlines()
    for row in table.rows:
        wanted = [f"{figure:.{table.decimals}f}" if figure is not None else "–" for figure in row.figures.values()]
        for cells in ([re.sub("[ᵃᵇᶜᵈ]", "", cell) for cell in one] for one in markdown):
            if cells[1:] == [*row.labels, *wanted]:
                assert cells[0] == PUBLISHED
                break
        else:
            pytest.fail(f"{row.name} is not in the Markdown")
        pattern = r"\s+".join(map(re.escape, [*row.labels, *wanted]))
        assert any(re.search(pattern + "$", re.sub("[ᵃᵇᶜᵈ]", "", line)) for line in lines), row.name
        shown = [figure.replace("–", "--") for figure in wanted]
        assert any(
            [re.sub(r"\\textsuperscript\{.\}", "", cell) for cell in one[-len(shown) :]] == shown for one in latex
        )


def test_marks_and_footnotes() -> None:
    text = as_text(plain("II"))
    assert re.search(r"SigLIP +0\.9B .* 34\.8ᵃ\n", text)
    assert re.search(r"UniME \(Phi3\.5-V\) +4\.2B +42\.5 +18\.3 +40\.5 +59\.9 +40\.3ᵇ\n", text)
    flat = re.sub(r"\s+", " ", text)
    assert (
        "it is the plain mean of the four meta-tasks. Over the 36 datasets these columns give: MagicLens 27.8" in flat
    )
    assert "SigLIP 30.7 (the plain mean of the four meta-tasks, 34.95, is near; UniME's Table 1 prints IND 32.3" in flat
    latex = as_latex(plain("V"))
    assert r"64.2\textsuperscript{b} \\" in latex
    assert r"\textsuperscript{a} Printed as published" in latex
    assert plain("V").to_json()["rows"][4]["marks"] == {"overall": "a"}
    assert "ᵃ" not in as_text(plain("VI"))


def test_latex_is_balanced_and_escaped() -> None:
    ours = [OurFigures("a_b&c%", ("SaHa #1 ~", "–"), {"overall": 1.0})]
    latex = as_latex(view_of(published("II"), ours, ["50 % of_all {x} \\ ^"]))
    assert r"here: a\_b\&c\% & SaHa \#1 \textasciitilde{} & -- & --" in latex
    assert r"50 \% of\_all \{x\} \textbackslash{} \textasciicircum{}" in latex
    without = re.sub(r"\\[{}]", "", latex)
    assert without.count("{") == without.count("}")
    for name in NAMES:
        begun = re.findall(r"\\begin\{(\w+\*?)\}", as_latex(plain(name)))
        assert sorted(begun) == sorted(re.findall(r"\\end\{(\w+\*?)\}", as_latex(plain(name))))
    assert r"\cmidrule(lr){5-8}" in as_latex(plain("V"))
    assert r"$\times$ & \checkmark{} & $\times$ & 24.21" in as_latex(plain("III"))


def test_rows_of_ours_stand_where_they_belong() -> None:
    ours = [
        OurFigures("m", ("System-Q",), {"Classification": 50.0, "overall": 12.34}, "System-Q"),
        OurFigures("m", ("prompt x",), {}, ""),
    ]
    view = view_of(published("IV"), ours, [])
    assert [(row.by, row.cells[0]) for row in view.rows][1:3] == [(PUBLISHED, "System-Q"), ("m", "System-Q")]
    assert view.rows[2].cells == ("System-Q", "50.0", "–", "–", "–", "12.3")
    assert (view.rows[-1].group, view.rows[-1].by) == (RUN_HERE, "m")


def test_a_row_per_metric_takes_ours_by_column() -> None:
    ours = [
        OurFigures(model, (), {"ind": figure, "ood": 2.0, "overall": 3.0}, column)
        for model, figure in (("m", 10.0), ("n", 20.0))
        for column in ("baseline", "pool-8")
    ]
    rows = [(row.by, *row.cells) for row in view_of(published("VIII"), ours, []).rows]
    assert rows[0] == (PUBLISHED, "IND", "62.6", "70.8", "70.7", "70.6")
    assert rows[1:3] == [("m", "IND", "10.0", "–", "–", "10.0"), ("n", "IND", "20.0", "–", "–", "20.0")]
    assert rows[7] == ("m", "Avg.", "3.0", "–", "–", "3.0")


def test_short_hours_are_not_rounded_to_nothing() -> None:
    ours = [OurFigures("m", published("VII").rows[1].labels, {"hours": 0.01234}, "In-batch")]
    assert view_of(published("VII"), ours, []).rows[2].cells[4] == "0.012"
