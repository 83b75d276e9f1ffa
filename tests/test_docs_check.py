"""Every fault that `make docs-check` looks for, on a page of a few lines that has it; and a page that has none."""

import base64
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import docs  # noqa: E402
import docs_check  # noqa: E402

BIB = "@misc{hu2021lora,\n  title = {LoRA},\n  author = {Hu, Edward},\n  year = {2021}\n}\n"
# one white pixel
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTjEIAAAAABJRU5ErkJggg=="
FIGURE = "#| label: fig-loss\n#| fig-cap: Loss in nats.\n#| fig-alt: A falling line.\nplt.plot(loss)"
CLEAN = r"""
The loss of @eq-loss falls, see @fig-loss and @sec-proof; LoRA [@hu2021lora] costs \$2 an hour.

$$ L(\theta) = -\sum_t \log p_\theta(x_t \mid x_{<t}) $$ {#eq-loss}

## Proof {#sec-proof}

A link [back](#sec-proof), one to [another page](other.qmd#api-fit), inline $\beta = 0.1$, code `"$HOME"`.

::: {.callout-note collapse="true"}
## 中文
这里有公式 $\frac{a}{b}$。
:::
"""
OTHER = "---\ntitle: Other\n---\n\n## fit {#api-fit}\n\nText.\n"


def markdown(text):
    return {"cell_type": "markdown", "id": "text", "metadata": {}, "source": text.strip("\n").splitlines(True)}


def code(source, *outputs):
    return {
        "cell_type": "code",
        "id": "code",
        "metadata": {},
        "execution_count": None,
        "source": source.splitlines(True),
        "outputs": list(outputs),
    }


def picture(data=PNG):
    return {"output_type": "display_data", "metadata": {}, "data": {"image/png": data, "text/plain": ["<Figure>"]}}


def printed(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text.splitlines(True)}


def shown(mime, text):
    return {"output_type": "display_data", "metadata": {}, "data": {mime: text.splitlines(True)}}


def notebook(*cells, front="---\ntitle: Page\noutput-file: page.html\n---\n"):
    head = {"cell_type": "raw", "id": "head", "metadata": {}, "source": front.splitlines(True)}
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    return {"cells": [head, *cells], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def check(folder, nb, sidebar=("01_page.ipynb", "other.qmd"), navbar=(), files=()):
    "Problems of a site of two pages, of which `nb` is one."
    folder.mkdir(exist_ok=True)
    config = {"bibliography": "references.bib"}
    config["website"] = {"sidebar": {"contents": [{"section": "Part", "contents": list(sidebar)}, {"text": "to come"}]}}
    config["website"]["navbar"] = {"left": [{"text": "x", "href": h} for h in navbar]}
    (folder / "_quarto.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "references.bib").write_text(BIB, encoding="utf-8")
    (folder / "other.qmd").write_text(OTHER, encoding="utf-8")
    (folder / "01_page.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    docs.tidy_notebook(folder / "01_page.ipynb", "https://course.example.org/book")
    for name, text in files:
        (folder / name).write_text(text, encoding="utf-8")
    return docs_check.check_site(folder, folder / "_pandoc")


def test_a_clean_page_passes_and_is_rendered(tmp_path):
    table = shown("text/html", "<table><tr><td>price in $</td></tr></table>")
    nb = notebook(markdown(CLEAN), code(FIGURE, picture()), code("print('$ a')", printed("$ a\n1/2\n")), code("df", table))
    assert check(tmp_path, nb) == []
    html = (tmp_path / "_pandoc" / "page.html").read_text(encoding="utf-8")
    assert html.count("<math") == 3
    assert 'href="#eq-loss">Eq.\xa01</a>' in html and 'href="#fig-loss">Figure\xa01</a>' in html
    assert 'href="other.html#api-fit"' in html and 'alt="A falling line."' in html
    assert "costs $2 an hour" in html and "Hu 2021" in html and "中文" in html
    assert (tmp_path / "_pandoc" / "media" / "01_page-0.png").read_bytes() == base64.b64decode(PNG)


TEXT_FAULTS = {
    "broken link": ("[x](missing.ipynb)", "broken link: missing.ipynb"),
    "broken file link": ("[x](data/run.csv)", "broken link: data/run.csv"),
    "link out of the site": ("[x](../README.md)", "broken link: ../README.md"),
    "absolute link": ("[x](/other.html)", "link is absolute"),
    "broken anchor": ("[x](#nowhere)", "broken anchor: #nowhere"),
    "broken anchor elsewhere": ("[x](other.qmd#nowhere)", "broken anchor: other.html#nowhere"),
    "broken picture": ("![A line](missing.png)", "broken link: missing.png"),
    "undefined figure": ("See @fig-none.", "undefined reference @fig-none"),
    "undefined equation": ("See @eq-none.", "undefined reference @eq-none"),
    "undefined section": ("See [@sec-none].", "undefined reference @sec-none"),
    "undefined table": ("See @tbl-none.", "undefined reference @tbl-none"),
    "undefined citation": ("See [@nobody2020].", "undefined citation @nobody2020"),
    "duplicate section": ("## A {#sec-a}\n\n## B {#sec-a}", "label sec-a is defined 2 times"),
    "duplicate equation": ("$$a$$ {#eq-a}\n\n$$b$$ {#eq-a}", "label eq-a is defined 2 times"),
    "label without equation": ("$$a$$\n\n{#eq-a}", "label not attached to anything: {#eq-a}"),
    "stray dollar": ("costs 5$ in all", "stray $"),
    "docstring with an asterisk": ("*In chunk * V memory, not N * V.*", "stray *"),
    "maths with inner space": ("the loss $ x $ falls", "stray $"),
    "TeX that is not TeX": (r"so $\frac{a}{b$ holds", "unrendered maths: Could not convert TeX math"),
    "unknown command": (r"so $\notacommand{x}$ holds", "unrendered maths: Could not convert TeX math"),
    "raw TeX": ("\\begin{align}\na &= b\n\\end{align}", "raw TeX is dropped"),
    "parentheses": (r"the loss \(x\) falls", "is not rendered, use $"),
    "no alternative text": ("![](pixel.png)", "figure without alternative text"),
    "remote script": ('<script src="https://cdn.example.org/a.js"></script>', "loads from another host: <script>"),
    "remote style": ('<link rel="stylesheet" href="//cdn.example.org/a.css">', "loads from another host: <link>"),
    "remote picture": ('<img src="https://example.org/a.png" alt="a">', "loads from another host: <img>"),
    "script that loads": ('<script>load("https://cdn.example.org/a.js")</script>', "a script names https://cdn"),
    "style that loads": ("<style>@import url(https://fonts.example.org/a)</style>", "a style says @import"),
    "unclosed callout": ("::: {.callout-note}\ntext", "pandoc: "),
}


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_fault_in_text(tmp_path, fault):
    text, message = TEXT_FAULTS[fault]
    problems = check(tmp_path, notebook(markdown(text)), files=[("pixel.png", "")])
    assert [p for p in problems if p.startswith("01_page.ipynb: ") and message in p], problems


ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "bad", "traceback": []}
TRACE = "Traceback (most recent call last):\n  File x\nValueError: bad\n"
UNNUMBERED = "#| fig-alt: A falling line.\nplt.plot(loss)"
CELL_FAULTS = {
    "no alternative text": (code(FIGURE.replace("#| fig-alt: A falling line.\n", ""), picture()), "without alternative text"),
    "no label": (code(UNNUMBERED, picture()), "so it has no number"),
    "figure that is not there": (code(FIGURE), "labelled fig-loss but its output has no picture"),
    "error": (code("f()", ERROR), "error output ValueError: bad"),
    "traceback": (code("f()", printed(TRACE)), "raw traceback in the output"),
    "path of a home": (code("f()", printed("saved to /home/ann/runs\n")), "absolute path of a machine in the output: /home/ann"),
    "path of a temporary folder": (code("f()", shown("text/plain", "'/tmp/tmpabc/x'")), "absolute path of a machine"),
    "path of this checkout": (code("f()", printed(f"saved to {ROOT}/runs\n")), "absolute path of a machine"),
    "path in a table": (code("f()", shown("text/html", "<td>/Users/ann/x</td>")), "absolute path of a machine"),
    "widget": (code("f()", shown("application/javascript", "x()")), "loads scripts from another host"),
    "options that are not YAML": (code("#| fig-cap: a: b: c\nf()"), "cell options are not YAML"),
    "stray dollar in an output": (code("f()", shown("text/markdown", "costs 5$ each")), "stray $"),
}


@pytest.mark.parametrize("fault", CELL_FAULTS)
def test_fault_in_a_cell(tmp_path, fault):
    cell, message = CELL_FAULTS[fault]
    problems = check(tmp_path, notebook(cell))
    assert [p for p in problems if p.startswith("01_page.ipynb: cell code" if "stray" not in message else "01_page") and message in p], problems


def test_hidden_cells_are_not_judged(tmp_path):
    silent = code("#| output: false\nf()", printed(TRACE))
    absent = code("#| include: false\nf()", picture())
    assert check(tmp_path, notebook(silent, absent)) == []


def test_html_outputs_and_own_links_need_no_other_host(tmp_path):
    table = shown("text/html", "<b>`</b> 5$\n\n```\n<i>x</i>")
    link = markdown("See [`fit`](https://course.example.org/book/other.html#api-fit).")
    nb = notebook(link, code("df", table))
    nb["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    assert check(tmp_path, nb) == []
    tidied = json.loads((tmp_path / "01_page.ipynb").read_text())
    assert list(tidied["cells"][2]["outputs"][0]["data"]) == ["text/markdown"] and "widgets" not in tidied["metadata"]
    html = (tmp_path / "_pandoc" / "page.html").read_text(encoding="utf-8")
    assert "<b>`</b> 5$" in html and "<i>x</i>" in html and 'href="other.html#api-fit"' in html
    (tmp_path / "01_page.ipynb").write_text(json.dumps(notebook(code("df", table))), encoding="utf-8")
    (problem,) = docs_check.check_site(tmp_path, tmp_path / "_pandoc")
    assert "Quarto loads scripts from another host" in problem


def test_the_course_names_ten_chapters_and_no_other_host():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    entries = [e for part in config["website"]["sidebar"]["contents"] for e in part.get("contents", [])]
    for number in range(11):
        (entry,) = [e for e in entries if e["text"].startswith(f"{number}. ")]
        written = [p.name for p in (ROOT / "nbs").glob(f"{number:02}_*.ipynb")]
        assert entry.get("href") in (written or [None]), "a chapter is a link if and only if its notebook exists"
    html = config["format"]["html"]
    assert html["html-math-method"] == "mathml" and set(html["theme"]) == {"light", "dark"}
    for name in ("styles.css", "theme.scss"):
        assert "//" not in (ROOT / "nbs" / name).read_text(encoding="utf-8").replace("// ", "")


def test_navigation(tmp_path):
    nb = notebook(markdown("Text."))
    assert check(tmp_path, nb, sidebar=["01_page.ipynb"]) == ["other.qmd: not in the sidebar of _quarto.yml"]
    assert check(tmp_path, nb, sidebar=["01_page.ipynb", {"href": "other.qmd"}, "02_more.ipynb"]) == [
        "_quarto.yml: sidebar entry 02_more.ipynb has no page"
    ]
    assert check(tmp_path, nb, navbar=["https://example.org", "news.qmd"]) == ["_quarto.yml: navbar entry news.qmd has no page"]


def test_all_problems_come_at_once_and_a_page_needs_a_title(tmp_path):
    nb = notebook(markdown("See @fig-none and [x](#nowhere), 5$."), front="---\noutput-file: page.html\n---\n")
    problems = check(tmp_path, nb)
    assert len(problems) == 4
    assert {"01_page.ipynb: no title", "01_page.ipynb: undefined reference @fig-none"} < set(problems)


def test_missing_bibliography(tmp_path):
    check(tmp_path, notebook(markdown("Text.")))
    (tmp_path / "references.bib").unlink()
    assert docs_check.check_site(tmp_path, tmp_path / "_pandoc") == ["_quarto.yml: bibliography references.bib does not exist"]


SOURCE_FAULTS = {
    "one string": (lambda nb: nb["cells"][1].update(source="a\nb"), "source is one string"),
    "standard error": (lambda nb: nb["cells"][1].update(outputs=[printed("w", "stderr")]), "standard error is committed"),
    "imports among code": (lambda nb: nb["cells"][1].update(source=["import a\n", "a.f()"]), "imports and other code"),
    "no kernel": (lambda nb: nb["metadata"].clear(), "no kernelspec"),
    "no title": (lambda nb: nb["cells"][0].update(source=["Text."]), "has no title"),
    "text nbdev drops": (lambda nb: nb["cells"][0]["source"].append("Contents: [a](#a)"), "nbdev drops this line"),
    "second quoted line": (lambda nb: nb["cells"][0]["source"].append("> and more"), "nbdev drops this line"),
}


@pytest.mark.parametrize("fault", [None, *SOURCE_FAULTS])
def test_notebook_source(tmp_path, fault):
    nb = notebook(code("x = 1"), code("import a\nfrom b import c"), code("#| exports\nimport a\nx = 1"))
    nb["cells"][0] = markdown("# Title\n\n> What it is.\n") | {"source": ["# Title\n", "\n", "> What it is.\n"]}
    change, message = SOURCE_FAULTS.get(fault, (lambda nb: None, None))
    change(nb)
    path = tmp_path / "01_page.ipynb"
    path.write_text(json.dumps(nb), encoding="utf-8")
    problems = docs_check.check_source(path)
    assert problems == [] if fault is None else len(problems) == 1 and message in problems[0], problems


def test_api_page_lists_public_names_with_shapes(tmp_path):
    package = tmp_path / "pkg"
    (package / "app").mkdir(parents=True)
    (package / "loss.py").write_text("def mean(x): 'Mean | of x.'\ndef _hidden(): pass\nclass Meter:\n  'Counts.'\n  def add(self, n): 'Add n.'\n")
    (package / "app" / "files.py").write_text(
        'def read(\n    path: str,  # where, *relative*\n    n: int = 1,  # rows\n) -> list:  # (n,) rows\n    "Read rows."\n'
    )
    page = docs.api_page(package, ["03_loss.ipynb", "index.ipynb"])
    assert "[`mean`](03_loss.ipynb#mean)" in page and r"Mean \| of x." in page and "_hidden" not in page
    assert "- `.add(n)`: Add n." in page
    assert r"| `path` | where, \*relative\* |" in page and "| `returns` | (n,) rows |" in page
    assert "read(path: str, n: int=1) -> list" in page
    assert docs.api_page(package, ["03_loss.ipynb", "index.ipynb"]) == page


def test_rendered_site_loads_nothing_from_elsewhere(tmp_path):
    (tmp_path / "ok.html").write_text('<a href="https://example.org">x</a><script src="a.js"></script>')
    (tmp_path / "bad.html").write_text('<link href="https://example.org/a.css" rel="stylesheet"><script src="//cdn/x.js"></script>')
    (tmp_path / "bad.css").write_text('@import "https://example.org/font";')
    found = docs.remote_resources(tmp_path)
    assert [f.split(":")[0] for f in found] == ["bad.css", "bad.html", "bad.html"]


def test_make_docs_says_where_to_get_quarto(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert docs.main([]) == 1
    assert "https://quarto.org/docs/get-started/" in capsys.readouterr().err
