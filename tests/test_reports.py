"""Every report runs to its end in the smoke profile, and leaves what a report must leave."""
import json

import pytest

from compresslab.report import headline, reports, run_report


@pytest.mark.parametrize("name", reports())
def test_smoke(name, tmp_path):
    run = run_report(name, "smoke", folder=tmp_path, progress=False)
    record = json.loads((run/"run.json").read_text())
    assert record["status"] == "finished" and record["versions"]["torch"] and record["machine"]["cores"]
    assert json.loads((run/"metrics.json").read_text())
    page = (run/"report.html").read_text()
    assert "data:image/png;base64" in page and "<script" not in page
    assert str(run/"report.html") in headline(run)
