"""Every notebook's own cells, by nbdev's rules, one test a notebook."""
import io
import sys
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/"nbs").rglob("*.ipynb")
                   if "reports" not in p.parts and not any(part.startswith((".", "_")) for part in p.parts))


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook, monkeypatch):
    config = get_config(ROOT)
    said = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", said)   # where nbdev writes the failing cell's number and its traceback
    flags = config.tst_flags.split() if isinstance(config.tst_flags, str) else config.tst_flags
    passed, _ = run_notebook(ROOT/notebook, skip_flags=flags, basepath=ROOT, profile=False, cell_timeout=config.cell_timeout)
    if not passed: pytest.fail(f"{notebook}\n{said.getvalue()}", pytrace=False)
