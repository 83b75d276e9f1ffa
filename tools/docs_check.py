"""Check the site without Quarto: `make docs-check`.

nbdev processes nbs/ as for `make docs`; then every page is turned into Markdown the way Quarto does it, read by pandoc,
and written as HTML with MathML and resolved citations to _proc/_pandoc/, where it can be looked at. All faults are
printed at once as `page: problem`. What is looked for is listed beside the functions below.
"""

from __future__ import annotations

import argparse
import ast
import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from execute import WIDGET, cell_options  # noqa: E402

# Prefixes by which Quarto tells a cross-reference from a citation, and the word it puts in its place.
REFERENCES = {
    "fig": "Figure", "tbl": "Table", "eq": "Eq.", "sec": "Section", "lst": "Listing", "thm": "Theorem", "lem": "Lemma",
    "cor": "Corollary", "prp": "Proposition", "def": "Definition", "exm": "Example", "exr": "Exercise", "nte": "Note",
    "tip": "Tip", "wrn": "Warning", "imp": "Important", "cau": "Caution",
}  # fmt: skip
DOLLAR = "\ue000"  # stands for an escaped dollar while pandoc parses: any other dollar left in the text is stray
TRACEBACK = "Traceback (most recent call last)"
MACHINE_PATH = re.compile(
    r"(?<![\w./:~-])/(?:home|root|Users|tmp|mnt|private|opt|var/folders|workspaces?)/[\w.+-]+|[A-Z]:\\\\?Users\\"
)
REMOTE = re.compile(r"^(?:https?:)?//", re.I)
REMOTE_IN_SCRIPT = re.compile(r"(?:https?:)?//[\w.-]+/[^\s\"'<>)]+\.(?:m?js|css|woff2?)\b|//(?:cdn|unpkg)[\w.-]*", re.I)


@dataclass
class Page:
    "A page of the site: what it says, where it goes, what is wrong with it."

    name: str  # file in the processed folder, such as 00_core.ipynb
    output: str = ""  # the HTML file Quarto makes of it
    markdown: str = ""
    html: str = ""
    problems: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)


# 1. The notebooks as they are committed.


def mixes_imports(source: str) -> bool:
    """Does nbdev run this cell, without the cells before it, to document what is exported?

    It runs exported cells and every cell with an import, and puts the outputs of that run on the page. Names from earlier
    demonstrations are missing then, so imports need a cell of their own.
    """
    options = cell_options(source)
    if options.keys() & {"export", "exports", "exporti", "exec_doc"} or options.get("eval", "").lower() == "false":
        return False
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a magic, or not for Python
        return False
    kinds = [type(node) for statement in body for node in ast.walk(statement)]
    return bool({ast.Import, ast.ImportFrom} & set(kinds)) and bool({ast.Expr, ast.Assign} & set(kinds))


def check_source(path: Path) -> list[str]:
    "Sources stored as one string, missing kernel name, imports among other code, text that nbdev throws away."
    nb = json.loads(path.read_text(encoding="utf-8"))
    problems = []
    for i, cell in enumerate(nb["cells"]):
        if isinstance(cell["source"], str) and cell["source"]:
            problems.append(f"cell {i}: source is one string, not a list of lines (Quarto loses its line breaks)")
        if cell["cell_type"] != "code":
            continue
        where = f"cell {cell.get('id', i)}"
        if mixes_imports(text_of(cell["source"])):
            problems.append(f"{where}: imports and other code in one cell (nbdev runs it alone when it builds the page)")
        if any(out.get("name") == "stderr" for out in cell["outputs"]):
            problems.append(f"{where}: output of standard error is committed")
    if not nb.get("metadata", {}).get("kernelspec", {}).get("name"):
        problems.append("no kernelspec: JupyterLab would ask for a kernel (tools/execute.py adds it)")
    title = next((c for c in nb["cells"] if c["cell_type"] == "markdown"), None)
    lines = [line for line in "".join(title["source"]).splitlines() if line.strip()] if title else []
    if not any(re.match(r"# \S", line) for line in lines):
        problems.append("the first text cell has no title (`# Title` and one `> description` line)")
    else:
        lost = [line for line in lines if not re.match(r"# \S", line)]
        lost = lost[1:] if lost and lost[0].startswith("> ") else lost
        lost = [line for line in lost if not re.match(r"- \S.*:.*\S", line)]
        problems += [f"nbdev drops this line of the title cell, move it to the next cell: {line[:60]}" for line in lost]
    return problems


# 2. From a processed notebook to the Markdown that Quarto makes of it.


def text_of(value: str | list[str]) -> str:
    "Notebook strings are stored whole or as lines."
    return value if isinstance(value, str) else "".join(value)


def fenced(text: str, attributes: str) -> str:
    "A code block whose fence is longer than any in the text."
    longest = max((len(m) for m in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence} {attributes}\n{text.rstrip()}\n{fence}\n\n"


def yaml_options(source: str) -> tuple[dict, str]:
    "The `#| key: value` lines of a cell as YAML, and the code without them."
    lines = source.splitlines()
    n = next((i for i, line in enumerate(lines) if not re.match(r"\s*#\s*\|", line)), len(lines))
    head = "\n".join(re.sub(r"^\s*#\s*\| ?", "", line) for line in lines[:n] if ":" in line or line.startswith("#|  "))
    try:
        options = yaml.safe_load(head) or {}
    except yaml.YAMLError:
        options = {"_invalid": head}
    bare = cell_options(source)
    return {**bare, **options} if isinstance(options, dict) else bare, "\n".join(lines[n:]).strip("\n")


def check_text_output(page: Page, where: str, text: str) -> None:
    "Raw tracebacks and absolute paths of a machine in what a cell printed."
    if TRACEBACK in text:
        page.problems.append(f"{where}: raw traceback in the output")
    own = [p for p in {str(ROOT), sys.prefix} if len(p) > 4 and p in text]
    found = MACHINE_PATH.search(text)
    if own or found:
        page.problems.append(f"{where}: absolute path of a machine in the output: {own[0] if own else found[0]}")


def attribute(text: str) -> str:
    "A value between double quotes in a Markdown attribute."
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def figure_markdown(page: Page, where: str, options: dict, file: str, n: int) -> str:
    "A picture with caption, label and alternative text, and complaints about those that are missing."
    label, caption, alt = (str(options.get(k) or "").strip() for k in ("label", "fig-cap", "fig-alt"))
    if not alt:
        page.problems.append(f"{where}: figure without alternative text (#| fig-alt)")
    if not label.startswith("fig-") or not caption:
        page.problems.append(f"{where}: figure without `#| label: fig-...` and `#| fig-cap`, so it has no number")
    identity = f"#{label} " if label and n == 0 else ""
    return f"![{caption if n == 0 else ''}]({file}){{{identity}alt={attribute(alt or '?')}}}\n\n"


def output_markdown(page: Page, where: str, options: dict, out: dict, media: Path, state: dict) -> str:
    "One output of a cell as Markdown; pictures go to files."
    kind = out["output_type"]
    if kind == "error":
        page.problems.append(f"{where}: error output {out.get('ename', '')}: {out.get('evalue', '')}")
        return ""
    if kind == "stream":
        text = text_of(out["text"])
        check_text_output(page, where, text)
        return text + "\n\n" if options.get("output") == "asis" else fenced(text, "{.text}")
    data = {k: text_of(v) for k, v in out.get("data", {}).items() if not k.endswith("+json")}
    if WIDGET in out.get("data", {}) or {"application/javascript", "text/html"} & data.keys():
        page.problems.append(f"{where}: a widget, script or HTML output, for which Quarto loads scripts from another host")
        return ""
    for kind in ("text/markdown", "text/latex"):
        if kind in data:
            check_text_output(page, where, data[kind])
            return data[kind] + "\n\n"
    for kind, suffix in (("image/svg+xml", "svg"), ("image/png", "png"), ("image/jpeg", "jpg")):
        if kind in data:
            file = f"{Path(page.name).stem}-{state['image']}.{suffix}"
            state["image"] += 1
            media.mkdir(parents=True, exist_ok=True)
            raw = data[kind].encode() if suffix == "svg" else base64.b64decode(data[kind])
            (media / file).write_bytes(raw)
            n, state["in_cell"] = state["in_cell"], state["in_cell"] + 1
            return figure_markdown(page, where, options, f"{media.name}/{file}", n)
    text = data.get("text/plain", "")
    check_text_output(page, where, text)
    return fenced(text, "{.text}") if text else ""


def cell_markdown(page: Page, where: str, cell: dict, media: Path, state: dict) -> str:
    "A code cell with its outputs, as its options ask."
    options, code = yaml_options(text_of(cell["source"]))
    if "_invalid" in options:
        page.problems.append(f"{where}: cell options are not YAML: {options['_invalid'].splitlines()[0][:60]}")
    if options.get("include") in (False, "false"):
        return ""
    parts = []
    if options.get("echo") not in (False, "false") and code.strip():
        parts.append(fenced(code, "{.python}"))
    state["in_cell"] = 0
    outputs = [] if options.get("output") in (False, "false") else cell.get("outputs", [])
    shown = "".join(output_markdown(page, where, options, out, media, state) for out in outputs)
    label = str(options.get("label") or "")
    if label.startswith("tbl-"):
        shown = f"::: {{#{label}}}\n\n{shown}\n{options.get('tbl-cap', '')}\n\n:::\n\n"
    elif label.startswith("fig-") and not state["in_cell"]:
        page.problems.append(f"{where}: labelled {label} but its output has no picture")
    if shown:
        parts.append(f":::::: {{.cell-output}}\n\n{shown}\n::::::\n\n")
    return "".join(parts)


def notebook_markdown(page: Page, nb: dict, media: Path) -> str:
    "The whole notebook as one Markdown text."
    parts, state = [], {"image": 0, "in_cell": 0}
    for i, cell in enumerate(nb["cells"]):
        source = text_of(cell["source"])
        if cell["cell_type"] == "code":
            parts.append(cell_markdown(page, f"cell {cell.get('id', i)}", cell, media, state))
        elif cell["cell_type"] == "markdown" or source.startswith("---"):
            parts.append(source + "\n\n")
    return "".join(parts)


def front_matter(markdown: str) -> dict:
    "The YAML block a page begins with."
    match = re.match(r"\s*---\n(.*?)\n---\s*\n", markdown, re.S)
    data = yaml.safe_load(match[1]) if match else None
    return data if isinstance(data, dict) else {}


def load_page(path: Path, media: Path) -> Page:
    "Read one processed page, notebook or .qmd."
    page = Page(path.name)
    text = path.read_text(encoding="utf-8")
    page.markdown = notebook_markdown(page, json.loads(text), media) if path.suffix == ".ipynb" else text
    front = front_matter(page.markdown)
    page.output = front.get("output-file") or path.with_suffix(".html").name
    if not front.get("title"):
        page.problems.append("no title")
    return page


# 3. Pandoc: Markdown to a syntax tree, checks on the tree, tree to HTML.


@cache
def pandoc_path() -> str:
    "The pandoc that comes with pypandoc-binary, or the one on PATH."
    try:
        import pypandoc

        return pypandoc.get_pandoc_path()
    except (ImportError, OSError):
        return shutil.which("pandoc") or "pandoc"


def pandoc(arguments: list[str], text: str, cwd: Path) -> tuple[str, list[str]]:
    "Run pandoc on a text; its output and its warnings, one string each."
    done = subprocess.run([pandoc_path(), *arguments], input=text, capture_output=True, encoding="utf-8", cwd=cwd)
    warnings = [" ".join(w.split()) for w in re.split(r"^\[WARNING\] ", done.stderr, flags=re.M) if w.strip()]
    return done.stdout, warnings if done.returncode == 0 else [f"pandoc failed: {' '.join(done.stderr.split())}"]


def walk(node: object) -> Iterator[dict]:
    "Every element of a pandoc tree, parents first."
    if isinstance(node, dict):
        if "t" in node:
            yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)


def inline_lists(node: object) -> Iterator[list]:
    "Every list of elements in a pandoc tree."
    if isinstance(node, list):
        if node and all(isinstance(x, dict) and "t" in x for x in node):
            yield node
        for value in node:
            yield from inline_lists(value)
    elif isinstance(node, dict):
        for value in node.values():
            yield from inline_lists(value)


def attr_of(element: dict) -> list | None:
    "[identifier, classes, pairs] of an element that can carry them."
    where = {"Header": 1, "Div": 0, "Span": 0, "Code": 0, "CodeBlock": 0, "Link": 0, "Image": 0, "Figure": 0, "Table": 0}
    return element["c"][where[element["t"]]] if element["t"] in where else None


def label_equations(tree: dict) -> None:
    "Turn `$$ ... $$ {#eq-name}` into an element with that identifier."
    for inlines in inline_lists(tree):
        for i, element in enumerate(inlines):
            if element["t"] != "Math" or element["c"][0]["t"] != "DisplayMath":
                continue
            after = i + 1
            while after < len(inlines) and inlines[after]["t"] == "Space":
                after += 1
            label = inlines[after]["c"] if after < len(inlines) and inlines[after]["t"] == "Str" else ""
            if match := re.match(r"\{#(eq-[\w:.-]+)\}(.*)$", str(label)):
                rest = [{"t": "Str", "c": match[2]}] if match[2] else []
                inlines[i : after + 1] = [{"t": "Span", "c": [[match[1], [], []], [dict(element)]]}, *rest]


def check_text(page: Page, tree: dict) -> None:
    "Unrendered text: stray dollars, raw TeX that HTML drops, labels that no equation took."
    for inlines in inline_lists(tree):
        for i, element in enumerate(inlines):
            near = "".join(x["c"] if x["t"] == "Str" else " " for x in inlines[max(0, i - 4) : i + 5] if "c" in x or x["t"] == "Space")
            if element["t"] == "Str" and "$" in element["c"]:
                page.problems.append(f"stray $ (unrendered maths, or write \\$): {near.strip()[:70]}")
            elif element["t"] == "Str" and "{#" in element["c"]:
                page.problems.append(f"label not attached to anything: {element['c'][:60]}")
            elif element["t"] in ("RawInline", "RawBlock") and element["c"][0] in ("tex", "latex"):
                page.problems.append(f"raw TeX is dropped from the page, put it between $$: {element['c'][1][:60]!r}")
    for element in walk(tree):
        if element["t"] == "Para" and element["c"][-1]["t"] == "Str" and element["c"][-1]["c"].endswith("*"):
            near = " ".join(x["c"] for x in element["c"][-4:] if x["t"] == "Str")
            page.problems.append(f"stray * (nbdev sets docstrings between two, so one inside needs backticks): {near}")
    for element in walk(tree):
        if element["t"] == "Str":
            element["c"] = element["c"].replace(DOLLAR, "$")
        elif element["t"] in ("Math", "Code", "CodeBlock", "RawInline", "RawBlock"):
            element["c"][1] = element["c"][1].replace(DOLLAR, r"\$")
        elif element["t"] in ("Link", "Image"):
            element["c"][2] = [s.replace(DOLLAR, "$") for s in element["c"][2]]


def check_references(page: Page, tree: dict, keys: set[str]) -> None:
    "Duplicate labels, undefined cross-references, undefined citations; defined references become links."
    labels = [a[0] for e in walk(tree) if (a := attr_of(e)) and a[0]]
    page.problems += [f"label {name} is defined {n} times" for name, n in Counter(labels).items() if n > 1]
    ordered = list(dict.fromkeys(labels))
    number = {x: sum(y.split("-")[0] == x.split("-")[0] for y in ordered[: i + 1]) for i, x in enumerate(ordered)}
    for element in walk(tree):
        if element["t"] != "Cite":
            continue
        cited = [c["citationId"] for c in element["c"][0]]
        references = [c for c in cited if "-" in c and c.split("-")[0] in REFERENCES]
        page.problems += [f"undefined reference @{c}" for c in references if c not in number]
        page.problems += [f"undefined citation @{c}" for c in cited if c not in references and c not in keys]
        if references:
            links: list[dict] = []
            for c in references:
                text = [{"t": "Str", "c": f"{REFERENCES[c.split('-')[0]]}\xa0{number.get(c, '?')}"}]
                links += [{"t": "Str", "c": ",\xa0"}] if links else []
                links += [{"t": "Link", "c": [["", [], []], text, [f"#{c}", ""]]}] if c in number else text
            element.update(t="Span", c=[["", [], []], links])


def resolve_links(tree: dict, outputs: dict[str, str]) -> None:
    "Links to pages by their source file become links to the HTML; Quarto's fig-alt becomes pandoc's alt."
    for element in walk(tree):
        if element["t"] == "Link":
            target, hash_, anchor = element["c"][2][0].partition("#")
            if target.removeprefix("./") in outputs:
                element["c"][2][0] = outputs[target.removeprefix("./")] + hash_ + anchor
        elif element["t"] in ("Image", "Figure"):
            attr_of(element)[2] = [["alt" if k == "fig-alt" else k, v] for k, v in attr_of(element)[2]]


def render_page(page: Page, folder: Path, outputs: dict[str, str], bibliography: Path | None, keys: set[str]) -> None:
    "Check one page and fill in its HTML."
    text, fence = [], ""
    for line in page.markdown.splitlines():  # escaped dollars, outside code blocks
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        elif not fence:
            line = re.sub(r"(?<!\\)((?:\\\\)*)\\\$", rf"\1{DOLLAR}", line)
            if re.search(r"(?<!\\)\\\(.+?\\\)", re.sub(r"`[^`]*`", "", line)):
                page.problems.append(f"maths between \\( and \\) is not rendered, use $: {line.strip()[:60]}")
        text.append(line)
    parsed, warnings = pandoc(["-f", "markdown+east_asian_line_breaks", "-t", "json"], "\n".join(text) + "\n", folder)
    page.problems += [f"pandoc: {w}" for w in warnings]
    if not parsed:
        return
    tree = json.loads(parsed)
    label_equations(tree)
    check_text(page, tree)
    check_references(page, tree, keys)
    resolve_links(tree, outputs)
    if "description" in tree["meta"]:
        tree["meta"]["subtitle"] = tree["meta"]["description"]
    arguments = ["-f", "json", "-t", "html5", "-s", "--mathml", "--toc", "--css", "styles.css", "-M", "lang=en"]
    arguments += ["-M", "document-css=true", "-M", "maxwidth=52em", "-M", "mainfont=sans-serif"]
    if bibliography:
        arguments += ["--citeproc", f"--bibliography={bibliography}", "-M", "link-citations=true"]
    page.html, warnings = pandoc(arguments, json.dumps(tree), folder)
    for warning in warnings:
        if "Could not convert TeX math" in warning:
            page.problems.append(f"unrendered maths: {warning}")
        elif not warning.startswith("Citeproc: citation"):  # reported above, by name
            page.problems.append(f"pandoc: {warning}")


# 4. The HTML: pictures, remote resources, links.


class HtmlCheck(HTMLParser):
    "Collects identifiers and links of a page, and faults that only show in its HTML."

    def __init__(self, page: Page) -> None:
        super().__init__()
        self.page, self.inside = page, ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = {k: v or "" for k, v in attrs}
        page = self.page
        page.ids.update(values[k] for k in ("id", "name") if values.get(k) and tag != "meta")
        if tag == "a" and "href" in values:
            page.links.append(values["href"])
        if tag == "img":
            if values.get("alt", "").strip() in ("", "?") and not values.get("src", "").startswith(f"media/{Path(page.name).stem}-"):
                page.problems.append(f"figure without alternative text: {values.get('src', '')[:60]}")
            page.links.append(values.get("src", ""))
        source = values.get("src") or (values.get("href") if tag == "link" else None)
        if tag in ("script", "link", "iframe", "img", "source", "video", "audio", "embed") and REMOTE.match(source or ""):
            page.problems.append(f"loads from another host: <{tag}> {source}")
        self.inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script" and (found := REMOTE_IN_SCRIPT.search(data)):
            self.page.problems.append(f"loads from another host: a script names {found[0]}")
        if self.inside == "style" and (found := re.search(r"(?:@import\s+(?:url\()?|url\()\s*[\"']?(?:https?:)?//[^\"')\s]+", data)):
            self.page.problems.append(f"loads from another host: a style says {found[0]}")


def check_links(page: Page, pages: dict[str, Page], folder: Path, rendered: Path) -> None:
    "Relative links whose file or anchor does not exist; links that leave the site's folder."
    for link in dict.fromkeys(page.links):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            if parts.scheme == "file":
                page.problems.append(f"link to a file of one machine: {link}")
            continue
        target, anchor = unquote(parts.path), unquote(parts.fragment)
        if target.startswith("/"):
            page.problems.append(f"link is absolute, the site may lie in a sub-folder: {link}")
        elif target and target not in pages:
            if not ((folder / target).exists() or (rendered / target).exists()):
                page.problems.append(f"broken link: {link}")
            elif not (folder / target).resolve().is_relative_to(folder.resolve()):
                page.problems.append(f"link leaves the site: {link}")
        elif anchor and anchor not in (pages[target] if target else page).ids:
            page.problems.append(f"broken anchor: {link}")


# 5. The site as a whole.


def references_in(contents: object) -> Iterator[str]:
    "Every page a sidebar or navbar names."
    if isinstance(contents, str):
        yield contents
    elif isinstance(contents, list):
        for item in contents:
            yield from references_in(item)
    elif isinstance(contents, dict):
        for key in ("href", "file"):
            if key in contents:
                yield contents[key]
        for key in ("contents", "left", "right", "menu"):
            yield from references_in(contents.get(key, []))


def check_navigation(config: dict, pages: list[Page]) -> list[str]:
    "Pages missing from the sidebar, and entries of sidebar and navbar without a page."
    website = config.get("website", {})
    names = {p.name for p in pages}
    problems = []
    sidebar = set(references_in(website.get("sidebar", {})))
    for where, entries in (("sidebar", sidebar), ("navbar", set(references_in(website.get("navbar", {}))))):
        missing = sorted(e for e in entries - names if not urlsplit(e).scheme)
        problems += [f"_quarto.yml: {where} entry {e} has no page" for e in missing]
    return problems + [f"{p.name}: not in the sidebar of _quarto.yml" for p in pages if p.name not in sidebar]


def bibliography_keys(path: Path) -> set[str]:
    "The keys that references.bib defines."
    return set(re.findall(r"^\s*@\w+\s*\{\s*([^,\s]+)\s*,", path.read_text(encoding="utf-8"), re.M))


def check_site(folder: Path, rendered: Path, jobs: int = 2) -> list[str]:
    "Every problem of the processed pages in `folder` as `page: problem`; HTML is left in `rendered`."
    config = yaml.safe_load((folder / "_quarto.yml").read_text(encoding="utf-8")) or {}
    problems, bibliography = [], None
    if config.get("bibliography"):
        bibliography = (folder / config["bibliography"]).resolve()
        if not bibliography.exists():
            problems.append(f"_quarto.yml: bibliography {config['bibliography']} does not exist")
            bibliography = None
    keys = bibliography_keys(bibliography) if bibliography else set()
    rendered.mkdir(parents=True, exist_ok=True)
    paths = sorted(p for s in ("*.ipynb", "*.qmd") for p in folder.glob(s) if not p.name.startswith("_"))
    pages = [load_page(p, rendered / "media") for p in paths]
    outputs = {p.name: p.output for p in pages}
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda p: render_page(p, folder, outputs, bibliography, keys), pages))
    if (folder / "styles.css").exists():
        shutil.copy2(folder / "styles.css", rendered)
    for page in pages:
        (rendered / page.output).write_text(page.html, encoding="utf-8")
        HtmlCheck(page).feed(page.html)
    by_output = {p.output: p for p in pages}
    for page in pages:
        check_links(page, by_output, folder, rendered)
        problems += [f"{page.name}: {p}" for p in dict.fromkeys(page.problems)]
    return problems + check_navigation(config, pages)


def first_error(trace: str) -> list[str]:
    "The line of a traceback that says what went wrong first."
    return re.findall(r"^\w[\w.]*(?:Error|Exception|Interrupt)\b.*$", trace, re.M)[:1]


def main(argv: list[str] | None = None) -> int:
    "Process with nbdev, check, print every problem."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-process", action="store_true", help="take _proc/ as it is")
    args = parser.parse_args(argv)
    import docs

    problems = [f"{p.name}: {x}" for p in sorted((ROOT / "nbs").glob("[!_.]*.ipynb")) for x in check_source(p)]
    try:
        folder = ROOT / "_proc" if args.no_process else docs.process()
    except Exception as e:  # nbdev reports a cell it cannot run or parse as any kind of exception
        print("\n".join([*problems, f"nbdev: {str(e) or type(e).__name__}", *first_error(str(e.__cause__ or ""))]))
        return 1
    rendered = folder / "_pandoc"
    shutil.rmtree(rendered, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) / "pages"
        problems += check_site(folder, work)
        shutil.copytree(work, rendered)
    pages = len(list(rendered.glob("*.html")))
    if problems:
        print("\n".join(problems))
        print(f"docs-check: {len(problems)} problems on {pages} pages")
        return 1
    print(f"docs-check: {pages} pages, no problem; rendered with pandoc in {rendered.relative_to(ROOT)}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
