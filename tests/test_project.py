"""The house rules that a program can check."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [["data", "blocks", "surgery", "train", "coding", "store", "interchange", "ledger", "calibration", "allocation", "mixtures", "resizing", "tasks"],
          ["quant", "pruning", "lowrank", "distillation", "gist", "pai"],
          ["recursive", "resnetbk"],
          ["stages", "recipe", "ablation", "budget", "playbook"],
          ["report", "gallery", "sweep_config", "sweep", "cli"]]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = [p for p in sorted((ROOT/"compresslab").rglob("*.py")) if not p.name.startswith("_")]
NOTEBOOKS = [p for p in sorted((ROOT/"nbs").rglob("*.ipynb")) if not any(x.startswith((".", "_")) for x in p.relative_to(ROOT).parts)]


def imported_rooms(module):
    """The top-level modules of compresslab that a file imports, absolutely or relatively."""
    inside = ["compresslab", *module.relative_to(ROOT/"compresslab").parts[:-1]]
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import): names = [a.name.split(".") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[:len(inside) - node.level + 1] if node.level else []
            stem = base + (node.module.split(".") if node.module else [])
            names = [stem] if len(stem) > 1 else [stem + [a.name] for a in node.names]
        else: continue
        yield from {n[1] for n in names if n[0] == "compresslab" and len(n) > 1}


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_down_the_floors(module):
    here = module.relative_to(ROOT/"compresslab").parts[0].removesuffix(".py")
    order = FLOORS[0] + FLOORS[3] + FLOORS[4]                       # within these two floors, from left to right
    for there in imported_rooms(module):
        lower = FLOOR[there] < FLOOR[here] or there == here
        beside = FLOOR[there] == FLOOR[here] and here in order and order.index(there) < order.index(here)
        assert lower or beside, f"{here} imports {there}"


def test_the_floors_are_really_seen():
    assert {*imported_rooms(ROOT/"compresslab"/"quant"/"ptq.py")} >= {"calibration", "quant", "store", "surgery"}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_in_colab_and_holds_no_secrets(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    badge = f"colab.research.google.com/github/compresslab/compresslab/blob/main/{notebook.relative_to(ROOT).as_posix()}"
    assert any(badge in "".join(c["source"]) for c in cells[:3])
    assert not re.search(r"/root/|/home/\w+/", notebook.read_text()), "an output shows someone's home folder"


@pytest.mark.parametrize("notebook", [n for n in NOTEBOOKS if "reports" not in n.parts and n.stem != "index"], ids=lambda p: p.stem)
def test_cells_that_import_can_be_run_alone(notebook):
    """The docs build runs exported cells and cells that import, and no others: an import beside other code would run that code without what it needs."""
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or re.search(r"^#\|\s*(export|hide|eval)", source, re.M): continue
        tree = ast.parse("\n".join("pass" if line.lstrip().startswith(("!", "%")) else line for line in source.split("\n")))
        imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not imports or len(imports) == len(tree.body), f"a cell imports and does more:\n{source}"


def test_constraints_pin_every_declared_dependency():
    import tomllib
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in (ROOT/"constraints.txt").read_text().split()}
    extras = project["optional-dependencies"]
    wanted = {re.split(r"[<>=\[ ]", d)[0].lower() for d in project["dependencies"] + extras["report"] + extras["docs"] + extras["dev"]} - {"compresslab"}
    assert not wanted - pinned


def test_settings_name_only_parameters_that_exist():
    from compresslab.report import report_parameters, reports
    for profile in ("smoke", "cpu", "gpu"):
        for notebook in reports().values(): report_parameters(notebook, profile)


def test_readme_is_made_from_the_index():
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import RegexRemovePreprocessor
    exporter = MarkdownExporter()
    exporter.register_preprocessor(RegexRemovePreprocessor(patterns=[r"#\| hide"]), enabled=True)
    made, _ = exporter.from_filename(str(ROOT/"nbs"/"index.ipynb"))
    assert (ROOT/"README.md").read_text().strip() == made.strip(), "run `make export`"
