"""Re-execution of notebooks: what is run, what is kept, that it repeats to the byte, and what happens on an error."""

import base64
import sys
import zlib
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import execute  # noqa: E402

NOISY = """
import sys
from tqdm.auto import tqdm
print("one"); print("a warning", file=sys.stderr)
for _ in tqdm(range(2)): pass
for _ in tqdm(range(2), file=sys.stdout): pass
print({"a", "b", "c"}, object())
""".strip()


def write(path, *cells):
    nb = new_notebook(cells=[new_markdown_cell("# Title\n\n> What it is."), *cells])
    for i, cell in enumerate(nb.cells):
        cell.id = f"cell-{i}"
    nbformat.write(nb, path)
    return path


def outputs(path, index):
    return nbformat.read(path, as_version=4).cells[index].outputs


def test_a_second_run_gives_the_same_bytes(tmp_path):
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    kept = new_code_cell("#| slow\n1 / 0", outputs=[new_output("stream", name="stdout", text="kept\n")])
    path = write(
        tmp_path / "a.ipynb", new_code_cell(NOISY), new_code_cell(plot), kept, new_code_cell("#| eval: false\n1 / 0")
    )
    assert execute.execute(path, threads=1)
    first = path.read_bytes()
    assert not execute.execute(path, threads=1)
    assert path.read_bytes() == first
    assert execute.main(["--check", "--threads", "1", str(path)]) == 0

    (stream,) = outputs(path, 1)
    lines = stream.text.splitlines()
    assert lines[0] == "one" and len(lines) == 2 and lines[1].endswith("<object object>")  # no address
    (figure,) = outputs(path, 2)
    assert b"Software" not in base64.b64decode(figure.data["image/png"])
    assert outputs(path, 3)[0].text == "kept\n"
    assert outputs(path, 4) == []
    nb = nbformat.read(path, as_version=4)
    assert [c.id for c in nb.cells] == [f"cell-{i}" for i in range(5)]
    assert nb.metadata.kernelspec.name == "python3"
    assert [p.name for p in tmp_path.iterdir()] == ["a.ipynb"]


def test_flagged_cells_run_when_asked_for_in_the_notebook_folder(tmp_path):
    code = "#| slow\nimport os\nprint(os.getcwd() == os.path.dirname(os.path.realpath('a.ipynb')), os.environ['OMP_NUM_THREADS'])"
    path = write(tmp_path / "a.ipynb", new_code_cell(code), new_code_cell("#| cuda\nprint('cuda')"))
    assert execute.main(["--slow", "--threads", "3", str(path)]) == 0
    assert outputs(path, 1)[0].text == "True 3\n"
    assert outputs(path, 2) == []


def test_an_error_names_notebook_cell_and_cause_and_writes_nothing(tmp_path, capsys):
    bad = write(tmp_path / "bad.ipynb", new_code_cell("print('new')"), new_code_cell("#| label: x\nint('seven')"))
    good = write(tmp_path / "good.ipynb", new_code_cell("print('new')"))
    before = bad.read_bytes()
    assert execute.main(["--threads", "1", str(bad), str(good)]) == 1
    said = capsys.readouterr().err
    for part in ("bad.ipynb: cell 2 (id cell-2): int('seven')", "ValueError: invalid literal", "left as it was"):
        assert part in said
    assert bad.read_bytes() == before
    assert outputs(good, 1)[0].text == "new\n"  # the others are still executed


def test_a_cell_that_hangs_and_a_kernel_that_dies(tmp_path):
    hanging = write(tmp_path / "a.ipynb", new_code_cell("import time\ntime.sleep(60)"))
    with pytest.raises(execute.NotebookError, match="ran past 2 s"):
        execute.execute(hanging, threads=1, timeout=2)
    dying = write(tmp_path / "b.ipynb", new_code_cell("import os\nos._exit(3)"))
    with pytest.raises(execute.NotebookError, match="kernel died"):
        execute.execute(dying, threads=1)


def test_a_missing_notebook_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        execute.main([str(tmp_path / "none.ipynb")])
    assert "none.ipynb" in capsys.readouterr().err


def test_cell_options():
    assert execute.cell_options("#| slow\n#| label: fig-a\n#|eval: false\nx = 1\n#| cuda") == {
        "slow": "",
        "label": "fig-a",
        "eval": "false",
    }
    assert execute.is_flagged("#| slow\nx") and not execute.is_flagged("x\n#| slow")


def test_png_text_is_stripped_and_the_picture_is_kept():
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    picture = [chunk(b"IHDR", b"\0" * 13), chunk(b"IDAT", b"abc"), chunk(b"IEND", b"")]
    noisy = [picture[0], chunk(b"tEXt", b"Software\0x"), chunk(b"tIME", b"1234567"), *picture[1:]]
    assert execute.strip_png(execute.PNG_SIGNATURE + b"".join(noisy)) == execute.PNG_SIGNATURE + b"".join(picture)
    assert execute.strip_png(b"not a png") == b"not a png"
