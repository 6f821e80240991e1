"""Every notebook's own cells, by nbdev-test, one test and one process a notebook."""
from pathlib import Path

import pytest
from forked import forked

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/"nbs").rglob("*.ipynb")
                   if "reports" not in p.parts and not any(part.startswith((".", "_")) for part in p.parts))


SLOW = ("20b_calibrated", "21_structured", "22b_removal", "23_schedule", "24_bregman", "15_experts", "16_scaling", "17_rounding", "18_mixed", "13b_rate", "30b_tensors", "31_embedding", "32_kv", "61_layer", "61b_training", "40b_students", "78_pipeline", "81_budget", "82_playbook", "shell", "jupyter", "batch", "library")   # real models, most of a minute or more


def nbdev_test(notebook):
    from nbdev.test import nbdev_test
    nbdev_test(notebook, n_workers=0)


@pytest.mark.parametrize("notebook", [pytest.param(n, marks=pytest.mark.slow if Path(n).stem in SLOW else []) for n in NOTEBOOKS])
def test_notebook(notebook):
    run = forked(nbdev_test, notebook, cwd=ROOT)
    if run.returncode: pytest.fail(run.stdout + run.stderr or f"it ended with {run.returncode}", pytrace=False)      # names the cell's number, its traceback and the notebook
    assert "Success." in run.stdout
