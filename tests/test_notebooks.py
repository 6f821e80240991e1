"""Every notebook's own cells, by nbdev-test, one test and one process a notebook."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/"nbs").rglob("*.ipynb")
                   if "reports" not in p.parts and not any(part.startswith((".", "_")) for part in p.parts))


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook):
    run = subprocess.run([Path(sys.executable).with_name("nbdev-test"), notebook, "--n-workers", "0"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode: pytest.fail(run.stdout + run.stderr, pytrace=False)      # names the cell's number, its traceback and the notebook
    assert "Success." in run.stdout
