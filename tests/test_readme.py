"The front pages: every link and picture exists, every command and recipe that they name is real."
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", re.sub(r"`[^`]*`", "", text)) if "://" not in t]
    assert page.startswith(("CONTRIBUTING", "CHANGELOG")) or targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


@pytest.mark.parametrize("page", PAGES[:3])
def test_make_targets_and_recipes_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M)) <= targets
    for recipe in re.findall(r"recipes/[\w.-]+\.yaml", text):
        assert isinstance(yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8")), dict)


def test_first_screen_of_the_readme_has_the_two_commands_and_what_the_first_prints():
    first = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:60])
    assert re.search(r"^make run", first, re.M) and re.search(r"^make test", first, re.M)
    printed = re.search(r"<!-- make-run -->\s*```(.*?)```", first, re.S)
    assert printed and "held-out questions" in printed[1] and "report.html" in printed[1]
