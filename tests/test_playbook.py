"""The playbook as a command, in one process and in two; its options; the presets."""
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch

from compresslab.playbook import RATIOS
from compresslab.recipe import Recipe
from compresslab.store import load, save, stored_bytes

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
ENV = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TQDM_DISABLE="1", COLUMNS="200")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small corpus with its three parts."""
    import sysconfig
    files = [p.read_text()[:4000] for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-h]*.py"))][:48]
    folder = tmp_path_factory.mktemp("corpus")/"text"; folder.mkdir()
    for part, some in dict(train=files[:36], valid=files[36:42], test=files[42:]).items(): (folder/f"{part}.txt").write_text("<|endoftext|>".join(some))
    return folder


def command(*args): return forked.command("playbook", *args, env=ENV)


def test_the_command_with_all_its_options(tiny, corpus, tmp_path):
    """Every option of the reference's run is read and changes the recipe or the rows."""
    better = load(tiny).float()
    with torch.no_grad(): better.model.norm.weight.mul_(1.5)
    save(better, tmp_path/"better")
    (tmp_path/"more").mkdir(); (tmp_path/"more"/"train.txt").write_text("class A:\n    pass\n"*200)
    done = command(tiny, "--ratio", 9, "--data", corpus, "--out", tmp_path/"run", "--teacher", tiny, "--teacher-checkpoint", tmp_path/"better"/"model.safetensors", "--distill-data", "teacher", "--finetune-data", tmp_path/"more"/"train.txt",
                   "--seq-len", 48, "--stride", 24, "--max-chunks", 40, "--batch-size", 2, "--lr", 1e-3, "--tokens", 2000, "--retained", 0.01, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    recipe, summary = (json.loads((tmp_path/"run"/n).read_text()) for n in ("recipe.json", "summary.json"))
    settings = dict(recipe["stages"])
    assert recipe["data"]["stride"] == 24 and recipe["data"]["length"] == 48 and recipe["data"]["train_tokens"] == 39*24 + 48 and recipe["teacher"].endswith("original")
    assert {s["written"] for s in settings.values() if "written" in s} == {500} and settings["finetune"]["tokens"] == 200 and {s["batch_size"] for s in settings.values() if "batch_size" in s} == {2}
    assert torch.equal(load(tmp_path/"run"/"original").model.norm.weight, better.model.norm.weight) and [*(tmp_path/"run"/"stages").glob("*/written.json")]
    assert summary["bytes_ratio"] >= 9 and f"{summary['final_bytes']:,} bytes of" in done.stdout and "retained; 0.01 asked for:" in done.stdout
    assert summary["final_bytes"] == stored_bytes(tmp_path/"run"/"model")


def test_tasks_are_scored_for_both_models(tiny, corpus, tmp_path, shared, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install 'compresslab[eval]'")
    monkeypatch.setitem(ENV, "COMPRESSLAB_DATA", str(shared("sst2").parent))
    done = command(tiny, "--ratio", 9, "--data", corpus, "--out", tmp_path/"run", "--seq-len", 48, "--max-chunks", 20, "--batch-size", 2, "--tokens", 500, "--tasks", "sst2", "--limit", 6, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path/"run"/"summary.json").read_text())["tasks"]
    assert scores["final"]["sst2"]["n"] == scores["original"]["sst2"]["n"] == 6
    assert f"sst2 {scores['final']['sst2']['value']:.4f} ±" in done.stdout and f"before {scores['original']['sst2']['value']:.4f}" in done.stdout


@pytest.mark.slow
def test_two_processes(tiny, corpus, tmp_path):
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "compresslab.cli"]
    done = subprocess.run([*launcher, "playbook", tiny, "--ratio", "9", "--data", corpus, "--out", tmp_path/"run", "--seq-len", "48", "--max-chunks", "40", "--batch-size", "2", "--tokens", "2000"], env=dict(ENV, ACCELERATE_USE_CPU="true"), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved to") == 1
    summary = json.loads((tmp_path/"run"/"summary.json").read_text())
    steps = {s["name"].split()[1]: s["notes"].get("steps") for s in summary["stages"]}
    for name, s in json.loads((tmp_path/"run"/"recipe.json").read_text())["stages"]:
        if "tokens" in s: assert steps[name] == round(s["tokens"]/(2*2*48))
    assert summary["targets"][0]["met"]


def test_what_cannot_be_is_one_line(tiny, corpus, tmp_path):
    for args, said in ((["--ratio", "0.5"], "above 1"), (["--ratio", "100000"], "cannot be met"), (["--ratio", "4", "--teacher-checkpoint", str(tmp_path/"no.bin")], "is not there"), (["--ratio", "4", "--vocabulary", "many"], "a number of tokens, bytes, or patches")):
        failed = command(tiny, *args, "--data", corpus, "--out", tmp_path/"run")
        assert failed.returncode == 1 and said in failed.stderr and len(failed.stderr.strip().splitlines()) == 1, failed.stderr


@pytest.mark.parametrize("ratio", RATIOS)
def test_presets_are_recipes(ratio):
    read = Recipe.from_yaml(ROOT/"recipes"/f"{ratio}x.yaml")
    assert read.target["retained_accuracy"] == RATIOS[ratio] and read.target["bytes"] == int(stored_bytes(ROOT/"data"/"pylm")/ratio)


@pytest.mark.slow
def test_killed_at_three_random_moments_and_resumed_ends_with_the_same_file(tiny, corpus, tmp_path):
    """On the route with a price on bits; the moments differ from one run of this test to the next."""
    def start(out): return forked.begin("playbook", tiny, "--ratio", 9, "--data", corpus, "--out", out, "--seq-len", 48, "--max-chunks", 60, "--batch-size", 2, "--tokens", 6000, "--device", "cpu", env=ENV)
    def begun(process, out):
        while process.poll() is None and not (out/"stages").exists(): time.sleep(.005)
        return time.time()
    whole = start(tmp_path/"whole"); at = begun(whole, tmp_path/"whole"); _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    assert "quant.coded" in [n for n, _ in json.loads((tmp_path/"whole"/"recipe.json").read_text())["stages"]]
    lasts, waited = time.time() - at, []
    for _ in range(3):
        process = start(tmp_path/"cut"); begun(process, tmp_path/"cut"); waited.append(random.uniform(0, lasts/4)); time.sleep(waited[-1])
        process.kill(); process.communicate()
    last = start(tmp_path/"cut"); _, err = last.communicate(timeout=300)
    assert last.returncode == 0, (waited, err)
    names = sorted(p.name for p in (tmp_path/"whole"/"model").iterdir())
    assert all((tmp_path/"cut"/"model"/n).read_bytes() == (tmp_path/"whole"/"model"/n).read_bytes() for n in names), waited
