"""Every report runs to its end in the smoke profile, and leaves what a report must leave."""
import json

import pytest

from compresslab.report import headline, reports, run_report


DATA = dict(pai="scitldr") # What a report reads that does not come with the project


@pytest.mark.slow
@pytest.mark.parametrize("name", reports())
def test_smoke(name, tmp_path, request, monkeypatch):
    if name in DATA: monkeypatch.setenv("COMPRESSLAB_DATA", str(request.getfixturevalue("shared")(DATA[name]).parent))
    run = run_report(name, "smoke", folder=tmp_path, progress=False)
    record = json.loads((run/"run.json").read_text())
    assert record["status"] == "finished" and record["versions"]["torch"] and record["machine"]["cores"]
    assert json.loads((run/"metrics.json").read_text())
    page = (run/"report.html").read_text()
    assert "data:image/png;base64" in page and "<script" not in page
    assert str(run/"report.html") in headline(run)
