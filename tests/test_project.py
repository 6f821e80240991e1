"""The house rules that a program can check."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [["data", "surgery", "train", "store", "ledger"],
          ["quant", "pruning", "lowrank", "distillation", "gist", "recursive", "pai", "resnetbk"],
          ["recipe", "budget", "playbook"],
          ["report", "sweep", "cli"]]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = [p for p in sorted((ROOT/"compresslab").rglob("*.py")) if not p.name.startswith("_")]
NOTEBOOKS = [p for p in sorted((ROOT/"nbs").rglob("*.ipynb")) if not any(x.startswith((".", "_")) for x in p.relative_to(ROOT).parts)]


def room(dotted): return dotted.split(".")[1] if "." in dotted else None


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_down_the_floors(module):
    here = module.relative_to(ROOT/"compresslab").parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(module.read_text())):
        if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compresslab.")): continue
        there = room(node.module)
        assert FLOOR[there] < FLOOR[here] or there == here or (FLOOR[here] == 0 and FLOORS[0].index(there) < FLOORS[0].index(here)) \
            or FLOOR[here] == FLOOR[there] == 3, f"{here} imports {there}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_in_colab_and_holds_no_secrets(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    badge = f"colab.research.google.com/github/compresslab/compresslab/blob/main/{notebook.relative_to(ROOT).as_posix()}"
    assert any(badge in "".join(c["source"]) for c in cells[:3])
    assert not re.search(r"/root/|/home/\w+/", notebook.read_text()), "an output shows someone's home folder"


def test_constraints_pin_every_declared_dependency():
    import tomllib
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in (ROOT/"constraints.txt").read_text().split()}
    extras = project["optional-dependencies"]
    wanted = {re.split(r"[<>=\[ ]", d)[0].lower() for d in project["dependencies"] + extras["report"] + extras["dev"]} - {"compresslab"}
    assert not wanted - pinned


def test_settings_name_only_parameters_that_exist():
    from compresslab.report import report_parameters, reports
    for profile in ("smoke", "cpu", "gpu"):
        for notebook in reports().values(): report_parameters(notebook, profile)
