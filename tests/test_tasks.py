"""Tasks by lm-eval: over the public files of MMLU, GSM8K, LAMBADA, SST-2, ARC and BoolQ, against direct computation; packed models; one line where something is missing."""
import json
import math
import sys

import forked
import pytest
import torch

from compresslab.store import find_tokenizer, load, save

pytest.importorskip("lm_eval", reason="pip install 'compresslab[eval]'")
from compresslab.tasks import FILES, find_tasks, local_task, task_scores, task_table  # noqa: E402

torch.set_num_threads(1)
SIZES = {"mmlu": 14042, "gsm8k": 1319, "lambada_openai": 5153, "sst2": 872, "arc_easy": 2376, "arc_challenge": 1172, "boolq": 3270}


def logp(model, tokenizer, prompt, answer):
    """An answer's log probability after a prompt, and whether it is the likeliest: one forward pass of the plain model; what does not fit is cut from the left."""
    whole, n = tokenizer(prompt + answer).input_ids, len(tokenizer(prompt).input_ids)
    answer_ids = whole[n:]; ids = whole[-(model.config.max_position_embeddings + 1):]
    with torch.no_grad(): logits = model(torch.tensor([ids[:-1]])).logits[0, -len(answer_ids):].float()
    picked = logits.log_softmax(-1)[range(len(answer_ids)), answer_ids]
    return picked.sum().item(), logits.argmax(-1).tolist() == answer_ids


@pytest.mark.parametrize("name", SIZES)
def test_the_public_files_are_whole_tasks(name, shared):
    shared(FILES[name][0][0])
    task = local_task(name, shared("mmlu").parent)
    rows = task.eval_docs
    assert len(rows) == SIZES[name] and find_tasks(name, shared("mmlu").parent) == {name: "files"}
    if task.OUTPUT_TYPE == "multiple_choice":
        for row in rows.select(range(50)): assert 0 <= int(task.doc_to_target(row)) < len(task.doc_to_choice(row)) and task.doc_to_text(row).endswith("Answer:")


def test_a_sample_of_mmlu_is_of_many_subjects(shared):
    subjects = {r["subject"] for r in local_task("mmlu", shared("mmlu").parent).eval_docs.select(range(100))}
    assert len(subjects) > 35


def test_multiple_choice_agrees_with_direct_computation(stories260k, shared):
    model, tokenizer, _ = stories260k
    data = shared("sst2").parent
    found = task_scores(model, ["sst2", "arc_easy"], data, limit=20, tokenizer=tokenizer, progress=False)
    for name, score in found.items():
        task = local_task(name, data); right, normed = [], []
        for row in task.eval_docs.select(range(20)):
            choices, target = task.doc_to_choice(row), int(task.doc_to_target(row))
            values = [logp(model, tokenizer, task.doc_to_text(row), f" {c}")[0] for c in choices]
            right.append(max(range(len(values)), key=values.__getitem__) == target)
            normed.append(max(range(len(values)), key=lambda i: values[i]/len(choices[i])) == target)
        assert score["n"] == 20 and score["value"] == pytest.approx(sum(right)/20)
        p = sum(right)/20
        assert score["stderr"] == pytest.approx(math.sqrt(p*(1 - p)/19))
        if name == "arc_easy": assert score["metrics"]["acc_norm"][0] == pytest.approx(sum(normed)/20)


def test_last_words_agree_with_direct_computation_and_long_prompts_are_counted(stories260k, shared, tmp_path):
    model, tokenizer, _ = stories260k
    words = (shared("tinystories")/"valid.txt").read_text().replace("<|endoftext|>", " ").split()
    texts = [" ".join(words[150*i:150*i + n]).rstrip(".,!?\"") for i, n in enumerate([20, 40, 60]*4)] + ["Once upon a time", "Once upon a time, there was a little girl named Lily", " ".join(words[:900])]
    (tmp_path/"lambada").mkdir(); (tmp_path/"lambada"/"lambada_test.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
    found = task_scores(model, "lambada", tmp_path, tokenizer=tokenizer, progress=False)["lambada"]
    direct = [logp(model, tokenizer, t.rpartition(" ")[0], " " + t.rpartition(" ")[2]) for t in texts]
    assert found["value"] == pytest.approx(sum(g for _, g in direct)/len(texts)) and 0 < found["value"] < 1
    assert found["metrics"]["perplexity"][0] == pytest.approx(math.exp(-sum(x for x, _ in direct)/len(texts)), rel=1e-3)
    assert (found["truncated"], found["prompts"]) == (1, len(texts)) and "1 of 15" in task_table({"lambada": found}).to_string()


def test_a_packed_model_scores_as_its_unpacked_self(stories260k, shared, tmp_path):
    from compresslab.quant.ptq import rtn
    model, tokenizer, _ = stories260k
    data = shared("lambada").parent
    packed = rtn(load(shared("models/stories260k")).float(), 8, embeddings=True, progress=False)
    save(packed, tmp_path/"packed", tokenizer)
    was, now = task_scores(model, "lambada", data, limit=30, tokenizer=tokenizer, progress=False), task_scores(tmp_path/"packed", "lambada", data, limit=30, progress=False)
    a, b = (x["lambada"]["metrics"]["perplexity"][0] for x in (was, now))
    assert abs(math.log(b/a)) < .05 and abs(was["lambada"]["value"] - now["lambada"]["value"]) <= 2/30
    assert b != a                                                                # the packed weights were asked, not the original's


def test_generated_answers_are_read(pylm, shared):
    found = task_scores(pylm, "gsm8k", shared("gsm8k").parent, limit=1, batch_size=1, progress=False)["gsm8k"]
    assert found["metric"] == "exact_match strict-match" and found["value"] == 0 and found["n"] == 1 and found["truncated"] == 1        # five examples do not fit beside 256 new tokens


def test_without_the_library_one_line_says_how_to_get_it(pylm, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None); monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ImportError, match=r"pip install 'compresslab\[eval\]'"): task_scores(pylm, "sst2")


def test_the_command(pylm, shared, tmp_path):
    import os
    def command(*args): return forked.command("evaluate", *args, env=dict(os.environ, HF_HUB_OFFLINE="1", COLUMNS="200"))
    done = command(pylm, "--tasks", "sst2", "--limit", 4, "--data", shared("sst2").parent, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sst2"]["n"] == 4
    failed = command(pylm, "--tasks", "sst2", "--data", tmp_path/"no")
    assert failed.returncode == 1 and "is no folder" in failed.stderr and len(failed.stderr.splitlines()) == 1
