"The drift gate: modules equal their notebooks, notebooks are clean, generated pages are up to date, no orphan modules."
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
WATCHED = ("llm_train_course/*.py", "nbs/*.ipynb", "nbs/*.qmd", "nbs/ledger.json", "nbs/images/*.png")


def snapshot() -> dict[str, str]:
    "Checksum of every file that export, clean and the page generator may write."
    return {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for g in WATCHED for p in ROOT.glob(g)}


def orphans() -> list[str]:
    "Modules that no notebook exports: `nbdev_export` leaves them behind when a notebook is renamed."
    made = {p.stem[3:] for p in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")}
    return [p.name for p in (ROOT / "llm_train_course").glob("*.py") if p.stem not in made | {"__init__", "_modidx"}]


def main() -> int:
    before = snapshot()
    for command in ([BIN / "nbdev_export"], [BIN / "nbdev_clean"], [sys.executable, "tools/pages.py"]):
        subprocess.run([str(c) for c in command], cwd=ROOT, check=True)
    after = snapshot()
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    faults = [f"{name}: differs from what the notebooks give" for name in changed]
    faults += [f"llm_train_course/{name}: no notebook exports it" for name in orphans()]
    if faults:
        print("drift:", *faults, sep="\n  ")
        print("The files have been brought up to date: look at them with `git diff` and commit.")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
