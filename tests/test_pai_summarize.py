"""SciTLDR as it is, HP@3 with its controls, and the summarizer experiment as a program that is killed."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("rouge_score", reason="pip install 'compresslab[pai]'")
from compresslab.pai.highlights import controls, highlights, papers, rank_by, rouge, text_of
from compresslab.pai.small_t5 import small_t5
from compresslab.pai.summarize import COMPARISONS, TYPES, Experiment, compare, main, run_experiment, task_pairs
from compresslab.store import load
from compresslab.surgery import params


@pytest.fixture(scope="module")
def scitldr(shared):
    return papers(str(shared("scitldr")))


def test_dev_is_cut_where_the_official_test_part_is_missing(scitldr, shared):
    if scitldr["official"]: pytest.skip("the official test part is here")
    sizes = {k: len(scitldr[k]) for k in ("train", "dev", "test")}
    assert sizes["dev"] + sizes["test"] == 619 and 270 < sizes["dev"] < 350 and 1988 <= sizes["train"] <= 1992
    texts = {k: {text_of(p).lower() for p in scitldr[k]} for k in sizes}
    assert not (texts["dev"] & texts["test"] or texts["train"] & (texts["dev"] | texts["test"]))
    assert papers(str(shared("scitldr"))) == scitldr


def test_controls_on_real_papers(scitldr):
    """On the official test part these are .446, .508, .735 (title), and lead's ROUGE-L is .241."""
    c = controls(scitldr["dev"] + scitldr["test"])
    assert abs(c["random"]["hit@3"] - .45) < .03 and abs(c["lead"]["hit@3"] - .51) < .04 and abs(c["title"]["hit@3"] - .735) < .03
    assert abs(c["lead"]["rougeL"] - .24) < .02 and abs(c["title"]["rougeL"] - .31) < .02
    assert c["ceiling"]["hit@3"] == 1 and c["ceiling"]["P@3"] < .75 and c["ceiling"]["rouge1"] > c["title"]["rouge1"]


def test_other_annotators_find_the_sentence_more_often_than_lead(scitldr):
    several = [p for p in scitldr["dev"] + scitldr["test"] if len(p["references"]) > 1]
    hits = [highlights(p, rank_by(p["references"][1], p))["hit@3"] for p in several]
    assert .55 < sum(hits)/len(hits) < .8


def test_rouge_agrees_with_torchmetrics(scitldr):
    functional = pytest.importorskip("torchmetrics.functional.text")
    for p in scitldr["dev"][:15]:
        theirs = functional.rouge_score(p["sentences"][0], [p["references"]], use_stemmer=True, accumulate="best", rouge_keys=("rouge1", "rougeL"))
        ours = {k: max(rouge(p["sentences"][0], [t])[k] for t in p["references"]) for k in ("rouge1", "rougeL")}
        best = max(p["references"], key=lambda t: rouge(p["sentences"][0], [t])["rouge1"])            # theirs picks one reference by the first key
        assert abs(float(theirs["rouge1_fmeasure"]) - ours["rouge1"]) < 1e-4
        assert float(theirs["rougeL_fmeasure"]) in (pytest.approx(ours["rougeL"], abs=1e-4), pytest.approx(rouge(p["sentences"][0], [best])["rougeL"], abs=1e-4))


@pytest.fixture(scope="module")
def lab(tmp_path_factory, scitldr):
    """A folder with a few real papers and a tiny T5 made from them."""
    folder = tmp_path_factory.mktemp("lab")
    for part, name, n in (("train", "train", 64), ("dev", "dev", 24), ("test", "test", 16)):
        rows = [dict(source=p["sentences"], target=p["references"], title=p["title"]) for p in scitldr[part][:n]]
        (folder/f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    parts = papers(str(folder))
    task = lambda tokenizer: task_pairs(parts["train"], tokenizer, 48, 16)
    small_t5(folder/"t5", [text_of(p) for p in parts["train"]], task, vocab_size=600, length=48, warmup_steps=20, task_steps=20, progress=False, d_model=32, d_kv=8, d_ff=64, num_layers=4)
    return folder


QUICK = dict(n_epochs_to_switch=2, source_length=48, target_length=12, precision="no", lr=3e-3, compression_ratio=.5, dev_papers=8)


def test_every_arm_takes_the_same_steps(lab):
    parts = papers(str(lab))
    assert parts["official"] and len(parts["test"]) == 16
    options = dict(QUICK, dev_papers=-1, max_dendrites=2, p_epochs_to_switch=1, n_epochs_to_switch=1, train_papers=32)
    results = [run_experiment(Experiment(t, model=str(lab/"t5"), **options), lab/"arms"/t, parts, test=True, progress=False, timing=False) for t in TYPES]
    by = {r["arm"]: r for r in results}
    assert {(r["epochs"], r["steps"]) for r in results} == {(5, 10)}
    size = {a: max(e["params"] for e in r["records"]) for a, r in by.items()}
    assert size["C"] == size["C-restart"] == by["C"]["params"] < size["A"] and size["B"] > size["C"] > 0
    for t in TYPES: assert params(load(lab/"arms"/t/"model")) == by[TYPES[t]]["params"]
    assert [(c["arm"], c["than"]) for c in compare(results)] == [*COMPARISONS]


def command(lab, out, *more):
    return [sys.executable, "-m", "compresslab.pai.summarize", f"--data={lab}", f"--model={lab/'t5'}", f"--out={out}", "--test",
            *(f"--{k.replace('_', '-')}={v}" for k, v in QUICK.items()), *more]


ENV = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TQDM_DISABLE="1")


@pytest.mark.slow
def test_killed_in_a_dendrite_phase_it_ends_the_same(lab, tmp_path):
    more = ("--experiment-type=compressed_pai", "--use-pai", "--p-epochs-to-switch=2")
    straight = main([*command(lab, tmp_path/"straight", *more)[3:]])
    report = tmp_path/"report.jsonl"
    process = subprocess.Popen(command(lab, tmp_path/"cut", *more), env=dict(ENV, COMPRESSLAB_SWEEP_REPORT=str(report)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    limit = time.time() + 120
    while not (report.exists() and len(report.read_text().splitlines()) >= 3):                     # in the dendrite phase: epochs 3 and 4
        assert process.poll() is None and time.time() < limit, process.stderr.read()
        time.sleep(.02)
    process.send_signal(signal.SIGKILL); process.wait()
    assert not (tmp_path/"cut"/"result.json").exists()
    report.unlink()
    done = subprocess.run(command(lab, tmp_path/"cut", *more), env=dict(ENV, COMPRESSLAB_SWEEP_REPORT=str(report)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path/"cut"/"result.json").read_text())
    for key in ("records", "test", "dev", "params", "steps", "dendrites"): assert again[key] == json.loads(json.dumps(straight[key])), key
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6] and all("dev/hit@3" in line for line in lines)
    assert {r["phase"] for r in again["records"]} == {"neurons", "dendrites"}


@pytest.mark.parametrize("more,message", [(["--n-epochs-to-swich=3"], "unrecognized arguments: --n-epochs-to-swich=3"), (["--model=no-such-t5"], "error: 'no-such-t5' was not found")], ids=["option", "model"])
def test_bad_input_is_one_line(lab, tmp_path, more, message):
    done = subprocess.run(command(lab, tmp_path/"x", *more), env=ENV, capture_output=True, text=True)
    assert done.returncode and message in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr and not (tmp_path/"x").exists()
