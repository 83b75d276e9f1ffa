"""Re-execute notebooks in place and keep the committed files reproducible: `make notebooks`.

    python tools/execute.py nbs/*.ipynb            # all but the cells flagged slow or cuda
    python tools/execute.py --slow nbs/01_stages.ipynb
    python tools/execute.py --check nbs/*.ipynb    # execute, write nothing, fail if an output would change

Cells flagged `#| slow` or `#| cuda` keep the outputs they have unless the flag is asked for; `#| eval: false` cells are
never run. A notebook in which a cell fails is left as it was. Otherwise it is cleaned as `nbdev_clean` does and replaced
in one step, so a second run gives the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import copy
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

import nbformat
from execnb.nbio import dict2nb, nb2str
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.clean import clean_nb
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("slow", "cuda")
WIDGET = "application/vnd.jupyter.widget-view+json"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXT = {b"tEXt", b"zTXt", b"iTXt", b"tIME"}  # software version, dates
PROGRESS = re.compile(r"\d+%\|.*\| *\d+/\d+ \[|\d+it \[\d+:\d+")  # how tqdm draws a bar
ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class NotebookError(Exception):
    "A notebook that could not be executed: which cell, and why."


def cell_options(source: str) -> dict[str, str]:
    "The `#| name` and `#| name: value` lines at the top of a cell; a bare name has the value ''."
    options = {}
    for line in source.splitlines():
        if not line.strip() or line.startswith("%%"):
            continue
        match = re.match(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$", line)
        if not match:
            break
        options[match[1]] = match[2].strip("\"'")
    return options


def is_flagged(source: str, flags: Iterable[str] = FLAGS) -> bool:
    "Does the cell carry one of these flags?"
    return not cell_options(source).keys().isdisjoint(flags)


def is_run(cell, allowed: Collection[str]) -> bool:
    "Is this cell executed when the flags in `allowed` were asked for?"
    if cell.cell_type != "code" or not cell.source.strip():
        return False
    options = cell_options(cell.source)
    return options.get("eval", "").lower() != "false" and not any(f in options and f not in allowed for f in FLAGS)


def strip_png(data: bytes) -> bytes:
    "The same picture without the chunks that name a software version or a date."
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at < len(data):
        size = 12 + int.from_bytes(data[at : at + 4], "big")  # length, type, data, checksum
        if data[at + 4 : at + 8] not in PNG_TEXT:
            kept.append(data[at : at + size])
        at += size
    return b"".join(kept)


def last_state(text: str) -> str:
    "What a terminal would show: carriage returns overwrite, progress bars and colours are gone."
    lines = (line.rstrip("\r").rsplit("\r", 1)[-1] for line in ANSI.sub("", text).split("\n"))
    return "\n".join(line for line in lines if not PROGRESS.search(line))


def clean_outputs(outputs: list) -> list:
    "Outputs without standard error, progress bars and whatever changes from run to run."
    kept: list = []
    for out in outputs:
        if out.output_type == "stream":
            if out.name == "stderr":
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += out.text  # one stream, however the kernel cut it
                continue
        elif WIDGET in out.get("data", {}):
            continue
        elif "image/png" in out.get("data", {}):
            picture = strip_png(base64.b64decode(out.data["image/png"]))
            out.data["image/png"] = base64.b64encode(picture).decode()
        kept.append(out)
    for out in kept:
        if out.output_type == "stream":
            out.text = last_state(out.text)
    return [o for o in kept if o.output_type != "stream" or o.text.strip()]


def kernel_environment(threads: int, scratch: Path) -> dict[str, str]:
    "The environment of a kernel: no user settings of IPython or matplotlib, fixed hashing, a fixed number of threads."
    (scratch / "matplotlibrc").touch()
    return {
        **os.environ,
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(scratch),
        "IPYTHONDIR": str(scratch / "ipython"),
        "TERM": "dumb",
        # without a GPU DeepSpeed says so, with the time of day, wherever `transformers` imports it
        **({} if shutil.which("nvidia-smi") else {"DS_ACCELERATOR": "cpu"}),
    }


def describe(index: int, cell) -> str:
    "How a message names a cell: number, id and first line of code."
    code = [line for line in cell.source.splitlines() if line.strip() and not line.lstrip().startswith("#|")]
    return f"cell {index} (id {cell.get('id', '?')}): {code[0].strip()[:80] if code else ''}"


def run_cells(nb, cwd: Path, allowed: Collection[str], threads: int, timeout: int) -> None:
    "Execute the cells of `nb` in one fresh kernel; outputs are replaced in place."
    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(cwd)}},
        record_timing=False,
        store_widget_state=False,
        ipython_hist_file="",
        extra_arguments=["--IPKernelApp.log_level=40"],
    )
    client.log.setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as scratch, client.setup_kernel(env=kernel_environment(threads, Path(scratch))):
        for index, cell in enumerate(nb.cells):
            if not is_run(cell, allowed):
                continue
            try:
                client.execute_cell(cell, index)
            except CellTimeoutError:
                raise NotebookError(f"{describe(index, cell)}\n    ran past {timeout} s") from None
            except DeadKernelError:
                raise NotebookError(f"{describe(index, cell)}\n    the kernel died") from None
            except CellExecutionError as e:
                trace = ANSI.sub("", e.traceback).strip().replace("\n", "\n    ")
                raise NotebookError(f"{describe(index, cell)}\n    {e.ename}: {e.evalue.strip().splitlines()[0] if e.evalue.strip() else ''}\n    {trace}") from None
            cell.outputs = clean_outputs(cell.outputs)


def cleaned(nb) -> str:
    "The text `nbdev_clean` would leave, from a notebook in memory."
    cfg = get_config(path=ROOT)
    data = dict2nb(nbformat.from_dict(copy.deepcopy(nb)))
    for cell in data.cells:
        if cell.cell_type == "code":
            for out in cell.outputs:
                for holder, key in [(out, "text")] + [(out.get("data", {}), k) for k in out.get("data", {})]:
                    text = holder.get(key)
                    if isinstance(text, str) and (key == "text" or key.startswith("text/") or key == "image/svg+xml"):
                        holder[key] = text.splitlines(keepends=True)
    clean_nb(
        data,
        clear_all=False,
        allowed_metadata_keys=cfg.get("allowed_metadata_keys").split(),
        allowed_cell_metadata_keys=cfg.get("allowed_cell_metadata_keys").split(),
        clean_ids=cfg.clean_ids,
    )
    return nb2str(data)


def replace_file(path: Path, text: str) -> None:
    "Write `text` to `path` so that a reader sees the old file or the new one, never a part."
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(name, path.stat().st_mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def execute(
    path: Path,  # the notebook
    allowed: Collection[str] = (),  # flags whose cells are run too
    threads: int = 2,  # OpenMP threads of the kernel
    timeout: int = 900,  # seconds a cell may take
    write: bool = True,  # replace the file
) -> bool:  # did anything change?
    "Re-execute one notebook in the folder it lies in. Raises NotebookError and writes nothing if a cell fails."
    before = path.read_text(encoding="utf-8")
    nb = nbformat.reads(before, as_version=4)
    # Without a kernel's name JupyterLab asks the reader for one.
    nb.metadata.setdefault("kernelspec", {"display_name": "python3", "language": "python", "name": "python3"})
    run_cells(nb, path.resolve().parent, allowed, threads, timeout)
    after = cleaned(nb)
    if write and after != before:
        replace_file(path, after)
    return after != before


def main(argv: list[str] | None = None) -> int:
    "Execute the notebooks given; returns 1 if any failed, or differs under --check."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--slow", action="store_true", help="run cells flagged slow as well")
    parser.add_argument("--cuda", action="store_true", help="run cells flagged cuda as well")
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of the kernels (default 2)")
    parser.add_argument("--timeout", type=int, help="seconds a cell may take (default 900, with --slow or --cuda 7200)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a notebook would change")
    args = parser.parse_args(argv)
    missing = [p for p in args.notebooks if p.suffix != ".ipynb" or not p.is_file()]
    if missing:
        parser.error("not a notebook: " + ", ".join(map(str, missing)))
    allowed = [f for f in FLAGS if getattr(args, f)]
    timeout = args.timeout or (7200 if allowed else 900)
    bad = []
    for path in args.notebooks:
        print(f"{path} ...", flush=True)
        try:
            changed = execute(path, allowed, args.threads, timeout, write=not args.check)
        except NotebookError as e:
            bad.append(path)
            print(f"{path}: {e}\n{path}: left as it was", file=sys.stderr, flush=True)
            continue
        if changed and args.check:
            bad.append(path)
        print(f"{path} {'differs' if changed and args.check else 'changed' if changed else 'unchanged'}", flush=True)
    if bad:
        print(f"failed: {', '.join(map(str, bad))}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
