"""Recipes: killed processes, every key of the reference's configuration, a user's stage, and mistakes; on data/pylm and small models."""
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import begin, command

from compresslab.blocks import Blocks
from compresslab.recipe import BLOCKS, REFERENCE, Recipe, Rows
from compresslab.stages import STAGES, stage
from compresslab.store import load, save, stored_bytes
from compresslab.train import evaluate

torch.set_num_threads(1)
ENV = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TQDM_DISABLE="1", COLUMNS="200")


def texts(folder):
    """A small corpus with its three parts."""
    import sysconfig
    files = [p.read_text()[:4000] for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-h]*.py"))][:48]
    folder.mkdir()
    for part, some in dict(train=files[:36], valid=files[36:42], test=files[42:]).items(): (folder/f"{part}.txt").write_text("<|endoftext|>".join(some))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory): return texts(tmp_path_factory.mktemp("corpus")/"text")


PYLM = """
data: {{text: {text}, length: 64, samples: 4, valid_tokens: 500, test_tokens: 500}}
target: {{ratio: 3, retained_accuracy: 0.1}}
storage: {{entropy: true}}
stages:
  - lowrank.embedding: {{rank: 96, method: weighted}}
  - distillation.kd: {{tokens: 1500, batch_size: 4, save_minutes: 0, feature_weight: 0}}
  - quant.gptq: {{bits: 4, embeddings: true, refine: 0}}
"""


def start(recipe, model, out):
    return begin("run", recipe, "--model", model, "--out", out, "--device", "cpu", env=ENV)


@pytest.mark.slow
def test_killed_at_three_moments_and_resumed_ends_with_the_same_file(pylm, corpus, tmp_path):
    recipe = tmp_path/"recipe.yaml"; recipe.write_text(PYLM.format(text=corpus))
    stages = tmp_path/"a"/"stages"
    moments = [lambda: (stages/"1-lowrank.embedding"/"stage.json").exists(),                     # between two stages
               lambda: [*(stages/"2-distillation.kd"/"checkpoint").glob("history.json")],        # inside a training
               lambda: [*(stages/"3-quant.gptq"/"checkpoint").glob("*.safetensors")]]            # inside a calibrated stage
    for reached in moments:
        process, limit = start(recipe, pylm, tmp_path/"a"), time.time() + 200
        while not reached() and process.poll() is None and time.time() < limit: time.sleep(.005)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL); process.wait()
        for f in (stages/"2-distillation.kd"/"checkpoint").glob("history.json"): spent = json.loads(f.read_text())["history"][-1]["seconds"]
    for name in ("a", "b"):
        process = start(recipe, pylm, tmp_path/name); said, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    files = [sorted(p.name for p in (tmp_path/n/"model").iterdir()) for n in "ab"]
    assert files[0] == files[1] and all((tmp_path/"a"/"model"/f).read_bytes() == (tmp_path/"b"/"model"/f).read_bytes() for f in files[0])
    summary, ledger = json.loads((tmp_path/"a"/"summary.json").read_text()), json.loads((tmp_path/"a"/"ledger.json").read_text())
    assert summary["final_bytes"] == stored_bytes(tmp_path/"a"/"model") == ledger[-1]["stored_bytes"] and len(ledger) == 4
    assert [t["met"] for t in summary["targets"]] == [True, True] and "ratio 3: met" in said
    assert summary["stages"][1]["seconds"] > spent > 0                                           # of all the runs that it took
    assert not [*stages.glob("*/checkpoint")] and not [*stages.glob("*/.*")]


@pytest.fixture(scope="module")
def taught(tiny, corpus, tmp_path_factory):
    """The random Llama after a little training, so that accuracies are not zero; and rows for it."""
    from compresslab.train import fit
    model = load(tiny).float()
    g = torch.Generator().manual_seed(0)
    def rows(n, low, high):
        ids = (torch.arange(32)[None] + torch.randint(low, high, (n, 1), generator=g)) % 260
        return Blocks(ids, ids.clone(), torch.ones_like(ids), 100*n, n)
    data = dict(train=rows(64, 0, 180), valid=rows(8, 180, 200), test=rows(8, 200, 220), calibration=[*rows(12, 220, 250).input_ids])
    fit(model, data["train"], steps=60, batch_size=8, lr=.01, progress=False)
    return model, data


ROOM = dict(mode="all", targets=dict(compression_ratio=1.5, retained_accuracy=.2, max_rank_fraction=.3), seed=0,
            branches=dict(lra=dict(rank=14, sparsity=.3, enable_structural=True, enable_tensor_lra=False), kv=dict(cache_tokens=20, student_hidden=32, activation_matching_weight=.1),
                          blt=dict(embedding_reduction=2, latent_dim=12, multimodal=False), sparsity=dict(target_sparsity=.4, enable_outlier_weighting=False, bregman_iterations=2)),
            distillation=dict(kl_weight=1., activation_weight=.1, token_budget=1024, hierarchical_lora=False),
            finetune=dict(max_tokens=1024, learning_rate=1e-3, patience=None, ppl_tolerance=None), evaluation=dict(timing=False, score="top1"),
            logging=dict(progress=False), storage=dict(dtype="auto", entropy=False, keep="all"))
ONLY = dict(lra="lra", kv="kv", blt="blt", sparsity="sparsity")

# key -> its other value, the branch to run (None: the model's training alone), and what shows the difference
KEYS = {
    "mode": ("blt", "lra+blt", "file"),
    "targets.compression_ratio": (400., "blt", "verdict"), "targets.retained_accuracy": (.999999, "blt", "verdict"), "targets.max_rank_fraction": (.1, "lra", "file"),
    "branches.lra.rank": (8, "lra", "file"), "branches.lra.sparsity": (.6, "lra", "file"), "branches.lra.enable_structural": (False, "lra", "file"),
    "branches.kv.cache_tokens": (12, "kv", "file"), "branches.kv.student_hidden": (24, "kv", "file"), "branches.kv.activation_matching_weight": (2., "kv", "file"),
    "branches.blt.embedding_reduction": (8, "blt", "file"), "branches.blt.latent_dim": (6, "blt", "file"),
    "branches.sparsity.target_sparsity": (.6, "sparsity", "file"), "branches.sparsity.enable_outlier_weighting": (True, "sparsity", "file"), "branches.sparsity.bregman_iterations": (5, "sparsity", "file"),
    "distillation.kl_weight": (9., "train", "file"), "distillation.activation_weight": (3., "train", "file"), "distillation.token_budget": (2048, "train", "file"), "distillation.hierarchical_lora": (2, "train", "file"),
    "finetune.max_tokens": (2048, "train", "file"), "finetune.learning_rate": (1e-2, "train", "file"),
    "finetune.patience": (1, "train", "stages"), "finetune.ppl_tolerance": (5., "train", "stages"),
    "evaluation.timing": (True, "blt", "row"), "evaluation.score": ("nll", "blt", "summary"), "logging.trackers": ("tensorboard", "train", "logs"), "logging.progress": (True, "blt", "bars"),
    "storage.dtype": ("bfloat16", "blt", "file"), "storage.entropy": (True, "blt", "file"), "storage.keep": ("final", "blt", "folders"), "storage.out": ("other", "blt", "place")}
ELSEWHERE = {"branches.lra.enable_tensor_lra", "branches.blt.multimodal", "finetune.mmlu_target", "evaluation.tasks", "evaluation.limit", "evaluation.shots", "evaluation.data"} # tests of their own below


def configured(key, value, branch):
    config = copy.deepcopy(ROOM); config["mode"] = "blt" if branch == "train" else branch
    if branch != "train": config.pop("finetune"), config["branches"]["kv"].update(student_hidden=32)
    if branch not in ("train", "kv"): config.pop("distillation")
    if branch == "kv": config["distillation"].update(activation_weight=0.)
    if "lra" not in branch: config["targets"].pop("max_rank_fraction")
    *path, last = key.split("."); at = config
    for p in path: at = at[p]
    if value is not None: at[last] = value
    return config


RESULTS = {}
def result(config, taught, out, monkeypatch):
    """A run's files and words; the same configuration runs once."""
    name = json.dumps(config, sort_keys=True)
    if name not in RESULTS:
        recipe = Recipe.from_yaml(config)
        monkeypatch.chdir(out)
        run = recipe.run(*taught, out=None if recipe.out else out/"run", device="cpu")
        folder = run.folder
        RESULTS[name] = dict(file=(folder/"model"/"model.safetensors").read_bytes(), verdict=run.summary["targets"], stages=[(s["name"], s["nll"], s["notes"]) for s in run.summary["stages"]], row=run.ledger.rows[-1].decode is None,
                             summary=run.summary["score"], folders=sorted(p.parent.name for p in folder.glob("stages/*/model")), place=folder.name, logs=len([*folder.rglob("events.out.tfevents*")]))
    return RESULTS[name]


def test_every_key_of_the_reference_has_a_test():
    known = {f"{k}.{s}" if k not in ONLY else f"branches.{k}.{s}" for k, block in REFERENCE.items() for s in block}
    known |= {f"{k}.{s}" for k in ("evaluation", "logging") for s in BLOCKS[k]} | {"mode"}
    assert known == {*KEYS} | ELSEWHERE


@pytest.mark.parametrize("key", KEYS)
def test_every_key_changes_the_model_or_the_run(key, taught, tmp_path, monkeypatch, capfd):
    value, branch, where = KEYS[key]
    if key == "logging.progress": return progress_shows(key, value, branch, taught, tmp_path, monkeypatch, capfd)
    (tmp_path/"a").mkdir(), (tmp_path/"b").mkdir()
    base, other = configured(key, None, branch), configured(key, value, branch)
    if key == "mode": base["mode"] = "lra+blt"; other["targets"].pop("max_rank_fraction", None)
    if key in ("finetune.patience", "finetune.ppl_tolerance"):
        for c in (base, other): c["finetune"].update(max_tokens=105*512, learning_rate=.03)       # one evaluation, after 100 steps
    a, b = result(base, taught, tmp_path/"a", monkeypatch), result(other, taught, tmp_path/"b", monkeypatch)
    assert a[where] != b[where], f"{key} changes nothing"
    if where == "verdict": assert a["file"] == b["file"]


def progress_shows(key, value, branch, taught, tmp_path, monkeypatch, capfd):
    for wanted in (False, True):
        Recipe.from_yaml(configured(key, wanted, branch)).run(*taught, out=tmp_path/str(wanted), device="cpu")
        said = capfd.readouterr().err
        assert ("recipe 1/1 lowrank.embedding" in said) == wanted


def test_tensors_of_experts_are_factored_where_the_reference_asks(taught, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=280, hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64)).eval()
    runs = [Recipe.from_yaml(dict(mode="lra", branches=dict(lra=dict(rank=10, enable_tensor_lra=on)))).run(model, taught[1], tmp_path/str(on), device="cpu", progress=False) for on in (False, True)]
    assert runs[1].summary["final_bytes"] < .75*runs[0].summary["final_bytes"]
    assert "FactoredExperts" in {type(m).__name__ for m in runs[1].model().modules()}
    none = Recipe.from_yaml(dict(mode="lra", branches=dict(lra=dict(rank=10, enable_tensor_lra=True)))).run(*taught, tmp_path/"llama", device="cpu", progress=False)
    assert "no fused experts" in none.summary["stages"][0]["notes"]["enable_tensor_lra"]


def test_multimodal_takes_the_other_embeddings_too(taught, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=280, n_embd=40, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)).eval()
    ranks = {on: Recipe.from_yaml(dict(mode="blt", branches=dict(blt=dict(latent_dim=8, multimodal=on)))).run(model, taught[1], tmp_path/str(on), device="cpu", progress=False).summary["stages"][0]["notes"]["ranks"] for on in (False, True)}
    assert {*ranks[True]} - {*ranks[False]} == {"transformer.wpe"}


def own_mmlu(folder):
    for part, n in dict(dev=5, test=12).items():
        (folder/"mmlu"/part).mkdir(parents=True); (folder/"mmlu"/part/f"letters_{part}.csv").write_text("".join(f'"{i} is?",a,b,c,d,{"ABCD"[i % 4]}\n' for i in range(n)))
    return folder


def test_tasks_are_scored_for_the_original_and_the_final_file(tiny, corpus, tmp_path, monkeypatch):
    """`evaluation: {tasks, limit, shots, data}` and the reference's `mmlu_target`."""
    pytest.importorskip("lm_eval", reason="pip install 'compresslab[eval]'")
    from compresslab.tasks import task_scores
    data = own_mmlu(tmp_path/"tasks")
    config = dict(mode="blt", branches=dict(blt=dict(latent_dim=12)), data=dict(text=str(corpus), length=32, samples=2, train_tokens=2000, valid_tokens=200, test_tokens=200),
                  finetune=dict(max_tokens=256, mmlu_target=.01), evaluation=dict(limit=8, shots=1, data=str(data), score="mmlu"), logging=dict(progress=False))
    run = Recipe.from_yaml(config).run(tiny, out=tmp_path/"run", device="cpu")
    original, final = (run.summary["tasks"][k]["mmlu"] for k in ("original", "final"))
    assert (final["n"], final["shots"]) == (8, 1) and original == json.loads(json.dumps(task_scores(tiny, "mmlu", data, 8, 1, progress=False)["mmlu"]))
    assert final == json.loads(json.dumps(task_scores(tmp_path/"run"/"model", "mmlu", data, 8, 1, progress=False)["mmlu"]))
    assert run.summary["targets"] == [dict(name="mmlu", wanted=.01, reached=final["value"], met=final["value"] >= .01)] and run.ledger.rows[-1].scores == {"mmlu": final["value"]}
    assert run.summary["retention"] == (final["value"]/original["value"] if original["value"] else None)
    assert "| mmlu | acc |" in (tmp_path/"run"/"summary.md").read_text() and "<td>mmlu</td>" in (tmp_path/"run"/"summary.html").read_text()
    monkeypatch.setattr("compresslab.recipe.task_scores", None)                                  # kept, not scored again; and no stage runs anew
    assert Recipe.from_yaml(config).run(tiny, out=tmp_path/"run", device="cpu").summary == run.summary
    monkeypatch.undo()
    config["finetune"]["mmlu_target"], config["evaluation"]["shots"], config["evaluation"]["limit"], config["evaluation"]["tasks"] = 1.1, 0, 4, ["mmlu"]
    other = Recipe.from_yaml(config).run(tiny, out=tmp_path/"run", device="cpu").summary
    assert not other["targets"][0]["met"] and (other["tasks"]["final"]["mmlu"]["n"], other["tasks"]["final"]["mmlu"]["shots"]) == (4, 0) and "not met" in (tmp_path/"run"/"summary.md").read_text()


def test_tasks_that_cannot_be_scored_are_refused_before_anything_runs(tiny, corpus, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install 'compresslab[eval]'")
    recipe = Recipe.from_yaml(dict(data=str(corpus), stages=["quant.rtn"], evaluation=dict(tasks="mmlu", data=str(tmp_path/"no"))))
    with pytest.raises(FileNotFoundError, match="is no folder"): recipe.run(tiny, out=tmp_path/"run", device="cpu")
    monkeypatch.setitem(sys.modules, "lm_eval", None); monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    recipe.evaluation["data"] = None
    with pytest.raises(ImportError, match=r"compresslab\[eval\]"): recipe.run(tiny, out=tmp_path/"run", device="cpu")
    assert not (tmp_path/"run"/"stages").exists()


def test_wandb_logs_offline_beside_the_stage(taught, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'compresslab[track]'")
    monkeypatch.setenv("WANDB_MODE", "offline"); monkeypatch.chdir(tmp_path)
    Recipe.from_yaml(dict(logging=dict(trackers=["wandb", "tensorboard"]), stages=[{"finetune": dict(tokens=512, batch_size=4)}])).run(*taught, tmp_path/"run", device="cpu", progress=False)
    place = tmp_path/"run"/"stages"/"1-finetune"
    assert [*place.glob("wandb/offline-run-*/*.wandb")] and [*place.rglob("events.out.tfevents*")] and not (tmp_path/"wandb").exists()


def test_ablation_of_the_references_branches(taught, tmp_path):
    from compresslab.ablation import ablate
    config = dict(mode="all", branches=dict(blt=dict(latent_dim=12), lra=dict(rank=12)), finetune=dict(max_tokens=512))
    table = ablate(config, *taught, tmp_path/"run", device="cpu", progress=False).set_index("left_out")
    assert [*table.index] == ["nothing", "blt", "lra", "finetune"] and table.bytes["lra"] > table.bytes["nothing"] < table.bytes["blt"] and table.bytes["finetune"] == table.bytes["nothing"]
    assert table.tokens.tolist() == [512, 512, 512, 0] and table.nll.notna().all() and "| lra |" in (tmp_path/"run"/"ablation.md").read_text()


def test_what_this_version_cannot_do_is_refused():
    config = dict(mode="blt", branches=dict(blt=dict(latent_dim=8)))
    for more, said in ((dict(evaluation=dict(task=["mmlu"])), "did you mean 'tasks'"), (dict(logging=dict(trakers="wandb")), "did you mean 'trackers'")):
        with pytest.raises(ValueError, match=said): Recipe.from_yaml({**config, **more})


def test_a_users_stage_runs_like_ours(taught, tmp_path):
    @stage("mine.shrink", lambda twin, **_: twin)
    def shrink(model, valid, factor:float=.9):
        with torch.no_grad(): model.model.norm.weight.mul_(factor)
        return model, dict(nll=evaluate(model, valid, progress=False).nll)
    try:
        recipe = Recipe.from_yaml("stages:\n  - mine.shrink: {factor: 5e-1}\n  - quant.rtn: {bits: 8, embeddings: true}")
        plan = recipe.run(*taught, dry_run=True)
        run = recipe.run(*taught, tmp_path/"run", device="cpu", progress=False)
        assert [p["stage"] for p in plan] == ["original", "mine.shrink", "quant.rtn"] and all(abs(p["bytes"]/r.stored_bytes - 1) < .02 for p, r in zip(plan, run.ledger.rows))
        assert run.summary["stages"][0]["notes"]["nll"] == pytest.approx(run.ledger.rows[1].nll, abs=1e-4)
        norm = load(tmp_path/"run"/"stages"/"1-mine.shrink"/"model").model.norm.weight
        assert torch.allclose(norm.float(), taught[0].model.norm.weight/2)
        with pytest.raises(ValueError, match="did you mean 'mine.shrink'"): Recipe.from_yaml("stages: [mine.shrnk]")
        with pytest.raises(ValueError, match="did you mean 'factor'"): Recipe.from_yaml("stages: [mine.shrink: {facto: 1}]")
    finally: STAGES.pop("mine.shrink", None)


def test_an_encoder_decoder_runs_on_pairs(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)).eval()
    def pairs(n, low): return [dict(input_ids=(torch.arange(12) + low + i) % 64, labels=(torch.arange(6) + low + i) % 64) for i in range(n)]
    data = dict(train=pairs(20, 0), valid=pairs(4, 30), test=pairs(4, 40), calibration=[{k: v[None] for k, v in p.items()} for p in pairs(4, 50)])
    recipe = Recipe.from_yaml(dict(stages=[{"pruning.layers": dict(share=.5, method="even")}, {"distillation.kd": dict(tokens=600, batch_size=4)}, {"quant.gptq": dict(embeddings=True)}]))
    plan, run = recipe.run(model, data, dry_run=True), recipe.run(model, data, tmp_path/"run", device="cpu", progress=False)
    assert all(abs(p["bytes"]/r.stored_bytes - 1) < .02 for p, r in zip(plan, run.ledger.rows)) and run.summary["test"]["final"]["tokens"] == 24
    with pytest.raises(ValueError, match="trains on pairs of texts"): recipe.run(model, "python-stdlib", tmp_path/"other", device="cpu")


def test_a_stage_that_raises_leaves_what_was_done(taught, tmp_path):
    @stage("mine.broken")
    def broken(model): raise RuntimeError("a stage of one's own may fail")
    try:
        recipe = Recipe.from_yaml("stages: [quant.rtn, mine.broken]")
        with pytest.raises(RuntimeError, match="may fail"): recipe.run(*taught, tmp_path/"run", device="cpu", progress=False)
        assert len(json.loads((tmp_path/"run"/"ledger.json").read_text())) == 2
        @stage("mine.broken")
        def mended(model): return model
        assert len(recipe.run(*taught, tmp_path/"run", device="cpu", progress=False).ledger.rows) == 3
        @stage("mine.broken")
        def silent(model): pass
        with pytest.raises(TypeError, match="returned a NoneType"): recipe.run(*taught, tmp_path/"other", device="cpu", progress=False)
    finally: STAGES.pop("mine.broken", None)


def test_rows_of_real_text_are_apart():
    rows = Rows(dict(BLOCKS["data"], length=64, samples=4))
    found = {p: {t.strip() for t in docs} for p, docs in rows.texts.items()}
    assert all(not found[a] & found[b] for a in found for b in found if a < b) and len(found["train"]) > 500 and len(found["calibration"]) >= 1


def test_a_smaller_vocabulary_brings_its_own_rows_and_the_teacher_still_teaches(pylm, corpus, tmp_path):
    recipe = Recipe.from_yaml(dict(data=dict(text=str(corpus), length=48, samples=2, train_tokens=4000, valid_tokens=300, test_tokens=300),
        stages=[{"lowrank.vocabulary": dict(keep=900)}, {"distillation.kd": dict(tokens=200, batch_size=2, feature_weight=0)}]))
    run = recipe.run(pylm, None, tmp_path/"run", device="cpu", progress=False)
    assert run.model().config.vocab_size < 2000 and run.ledger.rows[1].stored_bytes < .9*run.ledger.rows[0].stored_bytes
    assert run.ledger.rows[2].bpb < 6                                        # of the same text, in other tokens


MISTAKES = {"stage": ("quant.gtpq: {bits: 4}", "stage 'quant.gtpq' is unknown: did you mean 'quant.gptq'?"), "setting": ("quant.gptq: {bit: 4}", "quant.gptq has no setting 'bit': did you mean 'bits'?"),
            "kind": ("quant.gptq: {bits: four}", "bits is 'four', and should be a number"), "too high a rank": ("lowrank.embedding: {rank: 5000}", "stage 1 (lowrank.embedding): rank 5000"), "width": ("quant.rtn: {bits: 9}", "stage 1 (quant.rtn): ")}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_before_anything_runs(mistake, pylm, corpus, tmp_path):
    text, said = MISTAKES[mistake]
    with pytest.raises(ValueError) as e: Recipe.from_yaml(f"stages:\n  - {text}\n").run(pylm, str(corpus), tmp_path/"run", device="cpu")
    assert said in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"run"/"stages").exists()


def test_the_plan_is_printed_and_nothing_is_written(pylm, corpus, tmp_path):
    recipe = tmp_path/"recipe.yaml"; recipe.write_text(PYLM.format(text=corpus).replace("entropy: true", "entropy: false"))
    done = command("run", recipe, "--model", pylm, "--out", tmp_path/"a", "--dry-run", env=ENV)
    assert done.returncode == 0 and "quant.gptq" in done.stdout and "predicted bytes" in done.stdout and not (tmp_path/"a").exists(), done.stderr
    bad = command("run", tmp_path/"no.yaml", "--model", pylm, "--out", tmp_path/"a", env=ENV)
    assert bad.returncode == 1 and bad.stderr.startswith("error: ") and len(bad.stderr.splitlines()) == 1


TWO = """
data: {{text: {text}, length: 64, samples: 4, valid_tokens: 500, test_tokens: 500}}
target: {{ratio: 1.5}}
logging: {{progress: false}}
stages:
  - lowrank.embedding: {{rank: 12, method: weighted}}
  - distillation.kd: {{tokens: 4000, batch_size: 2, written: 300}}
  - finetune: {{tokens: 2000, batch_size: 2, patience: 1, evaluate_every: 4}}
  - quant.rtn: {{bits: 8, embeddings: true}}
"""


@pytest.mark.slow
def test_two_processes_of_which_only_one_writes(tiny, corpus, tmp_path):
    """`accelerate launch`: training is shared, everything else happens once; a kill is survived there too."""
    recipe = tmp_path/"recipe.yaml"; recipe.write_text(TWO.format(text=corpus))
    def launch(out, processes): return subprocess.Popen([str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "compresslab.cli",
        "run", str(recipe), "--model", str(tiny), "--out", str(out)], env=dict(ENV, ACCELERATE_USE_CPU="true"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)      # the launcher of several devices, on CPUs
    cut = launch(tmp_path/"cut", 2)
    while cut.poll() is None and not (tmp_path/"cut"/"stages"/"2-distillation.kd"/"begun.json").exists(): time.sleep(.01)
    os.killpg(cut.pid, signal.SIGKILL); cut.communicate()
    files = {}
    for name in ("cut", "whole"):
        process = launch(tmp_path/name, 2); said, err = process.communicate(timeout=400)
        assert process.returncode == 0, err[-3000:]
        assert said.count("saved to") == 1, said                                # one of two speaks
        files[name] = (tmp_path/name/"model"/"model.safetensors").read_bytes()
    assert files["cut"] == files["whole"]
    summary = json.loads((tmp_path/"whole"/"summary.json").read_text())
    assert summary["stages"][1]["notes"]["steps"] == round(4000/(2*2*64))       # the rows of both count
    assert summary["targets"][0]["met"] and not [*(tmp_path/"whole"/"stages").glob("*/.*")]
