"""Real JupyterLab in real Chromium: open a notebook, Run All Cells, and judge the file that was saved."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from execute import is_flagged  # noqa: E402

# nbdev_test runs every notebook's cells. What only JupyterLab can show (a browser, menus, widgets) is the same for all of them, so one is
# opened each time. `make lab-test` opens all.
EACH_TIME = ["00_core.ipynb"]
NOTEBOOKS = sorted(p.name for p in (ROOT / "nbs").glob("[0-9]*.ipynb")) if os.environ.get("LAB") == "all" else EACH_TIME
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
START_S = 120  # until the server answers, or the page is there
RUN_S = 600  # until the last cell is done

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (chromium, chromium-browser or google-chrome)"),
]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def copy_without_long_cells(source: Path, target: Path) -> None:
    "Run All would run the slow and the CUDA cells too: they are taken out, and all outputs with them."
    nb = json.loads(source.read_text(encoding="utf-8"))
    nb["cells"] = [c for c in nb["cells"] if c["cell_type"] != "code" or not is_flagged("".join(c["source"]))]
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
            options = "".join(line for line in cell["source"] if line.startswith("#|"))
            if re.search(r"eval:\s*false", options):
                cell["source"] = ["pass  # shown on the page, not run"]
    target.write_text(json.dumps(nb), encoding="utf-8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "(address, token, folder) of a JupyterLab server in a copy of nbs/ that knows no user settings."
    home = tmp_path_factory.mktemp("lab")
    folder = home / "nbs"
    shutil.copytree(ROOT / "nbs", folder, ignore=shutil.ignore_patterns("*.ipynb", "*.py", ".*", "__pycache__"))
    for name in NOTEBOOKS:
        if (ROOT / "nbs" / name).exists():
            copy_without_long_cells(ROOT / "nbs" / name, folder / name)
    notification = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    notification.parent.mkdir(parents=True)
    notification.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    token, port = secrets.token_hex(16), free_port()
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    options = [f"--ServerApp.ip=127.0.0.1 --ServerApp.port={port} --ServerApp.port_retries=0 --IdentityProvider.token={token}"]
    options += [f"--ServerApp.root_dir={folder}"]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *" ".join(options).split()]
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for_server(server, f"{address}/api/status?token={token}", home / "server.log")
            yield address, token, folder
        finally:
            server.terminate()  # the server ends its kernels
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_for_server(server, url, log):
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


def kernel_state(address, token):
    "States of the server's kernels, such as ['idle']."
    request = urllib.request.Request(f"{address}/api/kernels", headers={"Authorization": f"token {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return [k["execution_state"] for k in json.load(answer)]


def errors_in(nb):
    found = []
    for i, cell in enumerate(nb["cells"]):
        for out in cell.get("outputs", []):
            if out["output_type"] == "error":
                found.append(f"cell {i} ({cell['id']}): {out['ename']}: {out['evalue']}")
    return found


def run_all_cells(page):
    "Run -> Run All Cells, as a reader does it. A click on a menu that is still opening is lost, so it is looked at twice."
    for _ in range(3):
        page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
        item = page.locator(".lm-Menu-item[data-command='runmenu:run-all']")
        item.wait_for(timeout=10_000)
        page.wait_for_timeout(500)
        item.click()
        try:  # a cell is waiting or done
            page.wait_for_selector(".jp-InputPrompt >> text=/\\[(\\*|\\d+)\\]/", timeout=10_000)
            return
        except playwright.TimeoutError:
            page.keyboard.press("Escape")
    pytest.fail("Run -> Run All Cells started nothing")


def wait_until_run(page, path, address, token):
    "Save until the file on disk says that every code cell was executed, or that one failed."
    end = time.monotonic() + RUN_S
    while True:
        page.wait_for_timeout(1000)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(500)
        try:
            nb = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:  # read while the server was writing it
            assert time.monotonic() < end, f"after {RUN_S} s the saved notebook is still not JSON"
            continue
        waiting = [i for i, c in enumerate(nb["cells"]) if c["cell_type"] == "code" and "".join(c["source"]).strip()]
        waiting = [i for i in waiting if nb["cells"][i]["execution_count"] is None]
        failed = errors_in(nb)
        if failed or (not waiting and set(kernel_state(address, token)) == {"idle"}):  # earlier notebooks keep theirs
            return nb
        assert time.monotonic() < end, f"after {RUN_S} s these cells had not run: {waiting}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all_cells_in_jupyterlab(lab, browser, name, tmp_path):
    assert (ROOT / "nbs" / name).exists(), f"nbs/{name} is missing"
    address, token, folder = lab
    context = browser.new_context(viewport={"width": 1280, "height": 1600})
    page = context.new_page()
    hosts, complaints = set(), []
    page.on("request", lambda r: hosts.add(r.url.split("/")[2]) if r.url.startswith("http") else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    try:
        page.goto(f"{address}/lab/tree/{name}?token={token}&reset", timeout=START_S * 1000)
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=START_S * 1000)
        page.wait_for_selector("#jp-main-statusbar >> text=/\\| Idle$/", timeout=START_S * 1000)
        assert page.locator(".jp-Dialog").count() == 0, page.locator(".jp-Dialog").inner_text()
        run_all_cells(page)
        nb = wait_until_run(page, folder / name, address, token)
        page.screenshot(path=tmp_path / "lab.png")
    finally:
        context.close()
    assert errors_in(nb) == []
    code = [c for c in nb["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    assert code, "a notebook without code proves nothing"
    assert all(c["execution_count"] for c in code)
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1)), "not run once, in order, in a fresh kernel"
    assert complaints == []
    assert hosts == {address.split("/")[2]}, "the notebook loaded something from another host"
