"""Build the site: `make docs`.

nbdev processes nbs/ into _proc/ (signatures and docments are added behind every exported cell), this file adds the API
index, and Quarto renders _proc/ into _docs/. Quarto is a program of its own: https://quarto.org/docs/get-started/.
`make docs-check` does the first half and needs no Quarto.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llm_train_course"
NO_QUARTO = """make docs needs Quarto, which is not on PATH.
  Get it from https://quarto.org/docs/get-started/ (1.5 or later), then run `make docs` again.
  Without it, `make docs-check` renders every page with pandoc and leaves them in _proc/_pandoc/."""
Def = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


# The API index. It is read from source text: nothing is imported, so it is quick and the same everywhere.


def comments_by_line(source: str) -> dict[int, str]:
    "The comment on each line of a module: docments are comments behind arguments."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def is_public(node: ast.stmt) -> bool:
    "A function or class without a leading underscore."
    return isinstance(node, Def) and not node.name.startswith("_")


def argument_texts(node: Def) -> list[str]:
    "The arguments as written, without self; for a class those of its constructor, or its fields."
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is not None:
            return argument_texts(init)
        return [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    texts, depth = [""], 0
    for char in ast.unparse(node.args):  # split at the commas outside brackets
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            texts.append("")
        else:
            texts[-1] += char
    return [t.strip() for t in texts if t.strip() not in ("", "self", "cls")]


def signature(node: Def, width: int = 10_000) -> str:
    "`name(arguments) -> result`; wider than `width`, it gets one argument a line."
    result = f" -> {ast.unparse(node.returns)}" if not isinstance(node, ast.ClassDef) and node.returns else ""
    arguments = argument_texts(node)
    line = f"{node.name}({', '.join(arguments)}){result}"
    return line if len(line) <= width else "\n".join([f"{node.name}(", *(f"    {a}," for a in arguments), f"){result}"])


def summary(node: ast.AST) -> str:
    "The first paragraph of the docstring on one line."
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def docments(node: Def, comments: dict[int, str]) -> list[tuple[str, str]]:
    "(argument, comment) for every documented argument, then the result; for a class without constructor, its fields."
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is not None:
            return [row for row in docments(init, comments) if row[0] != "returns"]
        rows = [(n.target.id, comments.get(n.end_lineno, "")) for n in node.body if isinstance(n, ast.AnnAssign)]
        return [row for row in rows if row[1]]
    if node.end_lineno == node.lineno:
        return []
    a = node.args
    named = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    first_line = node.lineno
    rows = [(arg.arg, comments.get(arg.end_lineno, "")) for arg in named if arg.end_lineno != first_line]
    if node.returns is not None and node.returns.lineno != first_line:
        rows.append(("returns", comments.get(node.returns.end_lineno, "")))
    return [row for row in rows if row[1]]


def escape(text: str) -> str:
    "Text that Markdown takes literally, inside a table too; code between backticks is left alone."
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([\\$*_|<>\[\]@^~#])", r"\\\1", p) for p in parts)


def code(text: str) -> str:
    "An inline code span, also when the text has backticks or a bar."
    return f"`{text}`" if "`" not in text else f"`` {text} ``"


def document(node: Def, comments: dict[int, str], link: str | None) -> list[str]:
    "Lines of the API page about one function or class."
    label = f"[{code(node.name)}]({link})" if link else code(node.name)
    lines = [f"#### {label} {{.unlisted .unnumbered}}", "", "```python", signature(node, 90), "```", ""]
    if summary(node):
        lines += [escape(summary(node)), ""]
    rows = docments(node, comments)
    if rows and not link:  # a chapter's page has the table already
        lines += ["| | |", "|---|---|"] + [f"| {code(name)} | {escape(text)} |" for name, text in rows] + [""]
    if isinstance(node, ast.ClassDef):
        methods = [n for n in node.body if is_public(n) and not isinstance(n, ast.ClassDef)]
        lines += [f"- {code('.' + signature(n))}" + (f": {escape(summary(n))}" if summary(n) else "") for n in methods]
        lines += [""] if methods else []
    return lines


def notebook_of(module: Path, notebooks: list[str]) -> str | None:
    "The notebook that exports a module, if one does: `00_core.ipynb` for core.py."
    return next((n for n in notebooks if re.fullmatch(rf"\d+_{re.escape(module.stem)}\.ipynb", n)), None)


def api_page(package: Path, notebooks: list[str]) -> str:
    "The API reference as a Quarto page: every public function and class, module by module."
    chapters = [(nb, m) for m in package.glob("*.py") if (nb := notebook_of(m, notebooks))]
    modules: list[tuple[str | None, Path]] = sorted(chapters, key=lambda c: c[0])
    modules += [(None, m) for m in sorted(package.glob("app/*.py")) if not m.stem.startswith("_")]
    lines = ["---", "title: API reference", "description: Every public name of the package, module by module.", "---", ""]
    lines += ["Names of a chapter link to the place where the chapter derives them; shapes and units of the arguments",
              "stand there. The modules of `app` are plumbing and are documented here.", ""]  # fmt: skip
    for notebook, path in modules:
        source = path.read_text(encoding="utf-8")
        tree, comments = ast.parse(source), comments_by_line(source)
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        public = [n for n in tree.body if is_public(n)]
        if not public:
            continue
        anchor = name.replace(".", "-").replace("_", "-")
        lines += [f"## {code(name)} {{#api-{anchor}}}", ""]
        lines += [f"Exported from [{notebook}]({notebook}).", ""] if notebook else []
        lines += [escape(summary(tree)), ""] if summary(tree) and not notebook else []
        for node in public:
            lines += document(node, comments, f"{notebook}#{node.name.lower()}" if notebook else None)
    return "\n".join(lines).rstrip("\n") + "\n"


# Processing.


def relative_links(text: str, host: str) -> str:
    "nbdev links names to the published site; inside the site the same links are relative and work offline."
    return text.replace(host.rstrip("/") + "/", "")


def raw_html(html: str) -> str:
    "HTML as Markdown that pandoc passes through."
    fence = "`" * max([3, *(len(m) + 1 for m in re.findall(r"`+", html))])
    return f"{fence}{{=html}}\n{html.rstrip()}\n{fence}\n"


def tidy_notebook(path: Path, host: str) -> None:
    """Make own links relative, and take out what makes Quarto load require.js and jQuery from another host.

    Widget state does, and so does any output of type text/html (extractJupyterWidgetDependencies in Quarto's widgets.ts);
    the same HTML inside Markdown does not.
    """
    nb = json.loads(path.read_text(encoding="utf-8"))
    nb["metadata"].pop("widgets", None)
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = [relative_links(line, host) for line in cell["source"]]
        if "outputs" in cell:  # nbdev has just run the imports, and some of them talk
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "text/html" in data:
                data["text/markdown"] = raw_html("".join(data.pop("text/html")))
            if "text/markdown" in data:
                data["text/markdown"] = relative_links("".join(data["text/markdown"]), host).splitlines(keepends=True)
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def process(workers: int | None = None) -> Path:
    "Everything up to Quarto: nbs/ through nbdev into _proc/, which is returned."
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs

    os.chdir(ROOT)  # nbdev looks for settings.ini from here
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    cfg = get_config(path=ROOT)
    folder = Path(proc_nbs("nbs", n_workers=min(os.cpu_count() or 1, 4) if workers is None else workers, force=True))
    shutil.copy2(ROOT / "_quarto.yml", folder / "_quarto.yml")
    notebooks = sorted(p.name for p in folder.glob("*.ipynb"))
    (folder / "api.qmd").write_text(api_page(PACKAGE, notebooks), encoding="utf-8")
    for name in notebooks:
        tidy_notebook(folder / name, cfg.doc_host.rstrip("/") + "/" + cfg.doc_baseurl.strip("/"))
    return folder


def render(folder: Path, quarto: str) -> Path:
    "Render _proc/ with Quarto and move the result to _docs/, replacing what was there."
    subprocess.run([quarto, "render", "--no-execute"], cwd=folder, check=True)
    target = ROOT / "_docs"
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(folder / "_docs", target)
    return target


def remote_resources(site: Path) -> list[str]:
    "Scripts, style sheets, fonts and pictures a rendered site would load from another host."
    tags = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\"'\s>]+)", re.I)
    sheets = re.compile(r"<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|icon))[^>]*\bhref=[\"']?((?:https?:)?//[^\"'\s>]+)", re.I)
    css = re.compile(r"(?:@import\s+(?:url\()?|url\()\s*[\"']?((?:https?:)?//[^\"')\s]+)", re.I)
    found = []
    for path in sorted(site.rglob("*")):
        patterns = {".html": (tags, sheets, css), ".css": (css,)}.get(path.suffix, ())
        text = path.read_text(encoding="utf-8", errors="replace") if patterns else ""
        found += [f"{path.relative_to(site)}: loads {url}" for p in patterns for url in sorted(set(p.findall(text)))]
    return found


def main(argv: list[str] | None = None) -> int:
    "Process, then render if Quarto is there."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--process-only", action="store_true", help="stop before Quarto, leaving _proc/")
    args = parser.parse_args(argv)
    quarto = shutil.which("quarto")
    if quarto is None and not args.process_only:
        print(NO_QUARTO, file=sys.stderr)
        return 1
    folder = process()
    if args.process_only:
        print(f"processed: {folder.relative_to(ROOT)}/")
        return 0
    remote = remote_resources(site := render(folder, quarto))
    if remote:
        print("\n".join(["the site must work offline, but:", *remote]), file=sys.stderr)
        return 1
    print(f"site: {site.relative_to(ROOT)}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
