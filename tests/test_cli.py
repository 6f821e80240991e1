"""The command line as a person uses it: whole processes."""
import json
import os
import signal
import sys
import time

import pytest
from forked import begin, command

from compresslab.cli import main
from compresslab.store import stored_bytes

ENV = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", COLUMNS="160")


def run(*args, **env): return command(*args, env=dict(ENV, **env))


def test_compress_and_measure(tiny, tmp_path):
    done = run("compress", tiny, "--bits", 4, "--embeddings", "--samples", 8, "--max-tokens", 2000, "--out", tmp_path/"m")
    assert done.returncode == 0, done.stderr
    assert "gptq 4 bits" in done.stdout and "original" in done.stdout and "Traceback" not in done.stderr
    first, second = json.loads((tmp_path/"m"/"ledger.json").read_text())
    assert second["stored_bytes"] == stored_bytes(tmp_path/"m") and first["stored_bytes"] == stored_bytes(tiny)
    measured = run("measure", tmp_path/"m", "--max-tokens", 2000, "--no-timing", "--json")
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)["nll"] == pytest.approx(second["nll"], abs=1e-9)
    assert not (tmp_path/"m.resume").exists()


def test_ctrl_c_then_the_same_command_ends_with_the_same_file(tiny, tmp_path):
    args = ["compress", tiny, "--bits", 3, "--samples", 120, "--max-tokens", 1000, "--out", tmp_path/"m"]
    process = begin(*args, env=ENV)
    resume, limit = tmp_path/"m.resume", time.time() + 120
    while time.time() < limit and process.poll() is None and not [*resume.glob("*.safetensors")]: time.sleep(.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in err and "stopped" in err and "Traceback" not in err, err
    assert [*resume.glob("*.safetensors")] and not (tmp_path/"m").exists()
    assert run(*args).returncode == 0
    straight = run(*args[:-1], tmp_path/"n")
    assert straight.returncode == 0 and (tmp_path/"m"/"model.safetensors").read_bytes() == (tmp_path/"n"/"model.safetensors").read_bytes()


def broken_model(tiny, tmp_path):
    import shutil
    folder = tmp_path/"broken"
    shutil.copytree(tiny, folder)
    weights = folder/"model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


MISTAKES = {
    "unknown model": (lambda t, p: ("compress", "no/such/model"), "Tried: the path"),
    "unknown Hub name": (lambda t, p: ("measure", "nobody/nothing"), "the Hugging Face Hub (it cannot be reached)"),
    "unknown width": (lambda t, p: ("compress", t, "--bits", 11), "bits=11 is not supported: use 2 to 8"),
    "truncated weights": (lambda t, p: ("compress", broken_model(t, p)), "is truncated or not a safetensors file"),
    "no model folder": (lambda t, p: ("measure", p), "config.json is missing"),
    "empty calibration": (lambda t, p: ((p/"empty.txt").write_text("") or ("compress", t, "--calibration", p/"empty.txt", "--on", "python-stdlib", "--max-tokens", 500, "--out", p/"m")), "is empty"),
    "missing calibration": (lambda t, p: ("compress", t, "--calibration", "no-such-corpus", "--on", "python-stdlib", "--max-tokens", 500, "--out", p/"m"), "Tried: the path"),
    "out is something else": (lambda t, p: ((p/"theirs").mkdir() or (p/"theirs"/"notes").write_text("x") and ("compress", t, "--out", p/"theirs")), "compresslab did not write it"),
    "out is the model": (lambda t, p: ("compress", t, "--out", t), "is the model itself"),
    "measured text was seen": (lambda t, p: ("compress", t, "--calibration", "python-stdlib:valid", "--on", "python-stdlib:valid", "--out", p/"m"), "choose another with --on"),
    "bad group size": (lambda t, p: ("compress", t, "--group-size", "-1"), "group_size=-1 is not supported"),
    "no such device": (lambda t, p: ("measure", t, "--device", "cuda:99"), "--device cuda:99"),
    "no recipe": (lambda t, p: ("run", p/"no.yaml"), "The project has some in recipes/"),
    "unknown part": (lambda t, p: ("measure", t, "--on", "python-stdlib:tset"), "split 'tset' is unknown"),
    "unknown report": (lambda t, p: ("report", "quantt"), "did you mean 'quant'?"),
    "unknown parameter": (lambda t, p: ("report", "quant", "-p", "width=3"), "did you mean 'widths'?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(mistake, tiny, tmp_path, monkeypatch, capfd):
    args, says = MISTAKES[mistake]
    monkeypatch.setattr(sys, "argv", ["compresslab", *map(str, args(tiny, tmp_path))])
    with pytest.raises(SystemExit) as end: main()
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 1 and len(lines) == 1 and says in lines[0], err
    assert "Traceback" not in out + err


def test_a_full_disk_while_saving_keeps_the_finished_layers(tiny, tmp_path, monkeypatch, capfd):
    import compresslab as cl
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    argv = ["compresslab", "compress", str(tiny), "--samples", "8", "--max-tokens", "500", "--out", str(tmp_path/"m")]
    with monkeypatch.context() as patch:
        patch.setattr(cl, "save", full); patch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit): main()
    assert "error: " in capfd.readouterr().err and len([*(tmp_path/"m.resume").glob("*.safetensors")]) == 3
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end: main()
    assert end.value.code == 0 and (tmp_path/"m"/"model.safetensors").exists() and not (tmp_path/"m.resume").exists()


def test_debug_shows_the_trace(): assert "Traceback" in run("compress", "no/such/model", "--debug").stderr


def test_version():
    import compresslab
    assert run("--version").stdout.strip() == compresslab.__version__


def test_doctor_and_data(tmp_path):
    said = run("doctor").stdout
    assert "torch" in said and "python-stdlib" in said
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"train.txt").write_text("hello")
    assert "mine" in run("data", "list", COMPRESSLAB_DATA=str(tmp_path)).stdout
