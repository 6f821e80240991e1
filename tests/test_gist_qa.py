"""Compressed contexts: real SQuAD as tokens, its official scores, real models end to end, several processes, and a compressor that learns."""
import json
import random
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification, BertTokenizer, GPT2Config, GPT2LMHeadModel

from compresslab.data import squad
from compresslab.gist import qa
from compresslab.gist.compressors import COMPRESSORS
from compresslab.gist.cost import context_costs, forward_flops, kv_bytes, questions_to_pay
from compresslab.gist.qa import CompressionConfig, ablation_table, answer, grid, load_reader, mentions, questions_of, run_ablations, run_single_ablation, squad_scores, write_rows
from compresslab.gist.reader import CONTROLS, Questions, Reader, model_positions, qa_loss, read_row, run_name
from compresslab.store import find_tokenizer, load


@pytest.fixture(scope="module")
def tokenizer():
    from conftest import ROOT
    return find_tokenizer(str(ROOT/"data"/"pylm"))


@pytest.fixture
def code(tokenizer, tmp_path):
    """A folder of questions to pieces of Python code."""
    write_rows(mentions(tokenizer, "valid", docs=20), tmp_path/"code", "train")
    return write_rows(mentions(tokenizer, "test", docs=20), tmp_path/"code", "valid")


def test_squad_rows_keep_their_answers(shared, tokenizer):
    """Real questions: nothing is refused, a window of any size holds the answer that it is cut around, and short contexts stay whole."""
    for split in ("train", "valid"):
        rows = squad(str(shared("squad")), split).shuffle(seed=0).select(range(250))
        for row in rows:
            got = read_row(row, tokenizer, CompressionConfig(max_context=96), 512)
            whole = tokenizer(row["context"], add_special_tokens=False)["input_ids"]
            assert got["context"] == whole[:96] if len(whole) <= 96 else len(got["context"]) == 96
            inside, said = tokenizer.decode(got["context"]), row["answers"]["text"][0]
            assert said in inside or len(tokenizer(said)["input_ids"]) > 80
            assert tokenizer.decode(got["answer"][:-1]).strip() == said.strip() and row["question"] in tokenizer.decode(got["question"])


def test_scores_are_the_official_ones(shared):
    """On real references, with predictions that are right, cut, reordered, from another question or empty."""
    theirs = pytest.importorskip("torchmetrics.functional.text").squad
    rows, rng = squad(str(shared("squad/dev-v1.1.json"))).shuffle(seed=1).select(range(400)), random.Random(0)
    def spoiled(text, other):
        words = text.split()
        return rng.choice([text, text.upper() + ".", " ".join(words[:-1]) or "x", " ".join(reversed(words)), other, "the " + text, f"in {text} of"])
    said = [spoiled(rng.choice(r["answers"]["text"]), rows[rng.randrange(400)]["answers"]["text"][0]) for r in rows]
    ours = squad_scores(said, [r["answers"]["text"] for r in rows])
    other = theirs([dict(prediction_text=p, id=r["id"]) for p, r in zip(said, rows)], [dict(answers=r["answers"], id=r["id"]) for r in rows])
    assert abs(ours["f1"] - other["f1"].item()) < 1e-3 and abs(ours["em"] - other["exact_match"].item()) < 1e-3 and 20 < ours["em"] < ours["f1"] < 95


def test_squad_end_to_end(shared, tmp_path):
    """A real small model on real SQuAD, all losses, every compressor's shape; the run is written down, and loaded again it says the same."""
    base = CompressionConfig("gist", 8, str(shared("models/stories260k")), str(shared("squad")), loss_weights=dict(teacher_forcing=1., generation=.2, contrastive=.2, reconstruction=.1, distillation=.2),
                             train_examples=16, valid_examples=12, batch_size=4, max_context=128, max_answer=8, layers=2, train_encoder=True)
    metrics = run_single_ablation(base, tmp_path, progress=False)
    place = tmp_path/metrics["run"]
    assert {p.name for p in place.iterdir()} >= {"checkpoint.safetensors", "config.json", "metrics.json", "sample_predictions.json"}
    assert 0 <= metrics["final_em"] <= metrics["final_f1"] <= 100 and 8 < metrics["compression_ratio"] <= 16
    history = json.loads((place/"train.json").read_text())
    assert len(history) == 4 and all(k in history[0] for k in base.loss_weights)
    tokenizer, reader = find_tokenizer(base.model), load_reader(place)
    valid = questions_of(base, tokenizer, 512, progress=False)[1]
    assert [s["prediction"] for s in json.loads((place/"sample_predictions.json").read_text())] == answer(reader, valid, tokenizer, progress=False)


def test_every_architecture_and_control_takes_a_step(tokenizer, code):
    """All of them, all losses, on a model with absolute positions and its own attention matrices: a gradient for all that learns, and none for the model."""
    rows = squad(str(code), "train").select(range(6))
    weights = dict(teacher_forcing=1., generation=.5, contrastive=.5, reconstruction=.5, distillation=.5)
    for name in (*COMPRESSORS, *CONTROLS[:-1]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=40, n_layer=2, n_head=4, n_positions=192, initializer_range=.1))
        config = CompressionConfig(name, 8, loss_weights=weights, layers=1, train_encoder=True, max_answer=8)
        questions = Questions(rows, tokenizer, config, model_positions(model))
        reader = Reader(model, config, tokenizer.bos_token_id).train()
        loss, parts = qa_loss(config.weights, tokenizer.eos_token_id)(reader, questions.batch(range(6)))
        loss.backward()
        assert torch.isfinite(loss) and {*parts} == {*weights} - ({"reconstruction"} if name in CONTROLS else set())
        assert all(p.grad is not None for n, p in reader.learned().items()) and all(p.grad is None for p in reader.parameters() if not p.requires_grad)


@pytest.mark.slow
def test_processes_find_the_same_numbers(pylm, code, tmp_path):
    """Two runs at a time in processes of their own end like the same runs here."""
    base = CompressionConfig(model=str(pylm), data=str(code), template="\n# {question}:", ending="\n", train_examples=8, valid_examples=8, max_answer=4, precision="no")
    runs = grid(base, architectures=("conv",), target_lengths=(8,), controls=("no_context",))
    without = lambda results: [{k: v for k, v in r.items() if "seconds" not in k} for r in results]
    apart, here = run_ablations(runs, tmp_path/"apart", processes=2, progress=False), run_ablations(runs, tmp_path/"here", progress=False)
    assert without(apart) == without(here) and ablation_table(here).shape[0] == 2
    for r in here: assert torch.equal(*(next(iter(load_reader(tmp_path/f/r["run"]).learned().values())) for f in ("apart", "here")))
    with pytest.raises(RuntimeError, match="failed: .*was not found"): run_ablations([replace(base, architecture=a, model="nowhere") for a in ("conv", "gist")], tmp_path/"bad", processes=2, progress=False)


def test_one_process_for_each_gpu(tmp_path, monkeypatch):
    """Where two GPUs are visible, two runs go at a time, each on the one that is free; results keep the order they were asked in."""
    busy, seen, lock = [], [], threading.Lock()
    def elsewhere(config, folder, gpu):
        with lock: assert gpu not in busy; busy.append(gpu); seen.append((gpu, len(busy)))
        time.sleep(.05)
        with lock: busy.remove(gpu)
        return dict(run=run_name(config))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7"); monkeypatch.setattr(qa, "run_elsewhere", elsewhere)
    runs = grid(CompressionConfig(), target_lengths=(8, 16), controls=())
    assert [r["run"] for r in run_ablations(runs, tmp_path, progress=False)] == [run_name(c) for c in runs]
    assert {g for g, _ in seen} == {"4", "7"} and max(n for _, n in seen) == 2 and len(seen) == 8
    assert json.loads((tmp_path/"results_summary.json").read_text())[-1]["run"] == run_name(runs[-1])


def test_a_moved_folder_resumes(pylm, code, tmp_path):
    """The same data elsewhere: the finished run is found, though its folder was moved too."""
    base = CompressionConfig("conv", 8, str(pylm), str(code), template="\n# {question}:", ending="\n", train_examples=8, valid_examples=4, max_answer=4, precision="no")
    first = run_single_ablation(base, tmp_path/"runs", progress=False)
    (tmp_path/"new").mkdir(); shutil.move(code, tmp_path/"new"/"code"); shutil.move(tmp_path/"runs", tmp_path/"new"/"runs")
    def never(model, history): raise AssertionError("trained again")
    assert run_single_ablation(replace(base, data=str(tmp_path/"new"/"code")), tmp_path/"new"/"runs", progress=False, on_step=never) == first
    assert answer(load_reader(tmp_path/"new"/"runs"/first["run"]), questions_of(replace(base, data=str(tmp_path/"new"/"code")), find_tokenizer(str(pylm)), 512, progress=False)[1], find_tokenizer(str(pylm)), progress=False)


def test_bad_input(pylm, tokenizer, code, tmp_path):
    """Empty contexts, missing answers, too long contexts get one line before anything is written; a tokenizer without padding token makes no difference."""
    good = squad(str(code), "train").select(range(6)).to_list()
    base = CompressionConfig("conv", 8, model=str(pylm), template="\n# {question}:", ending="\n", epochs=2, batch_size=4, max_answer=4, precision="no")
    def refused(says, config=base, **changed):
        folder = write_rows([*good[:2], dict(good[2], **changed)], tmp_path/"rows", "train"); write_rows(good, folder, "valid")
        with pytest.raises(ValueError, match=says): run_single_ablation(replace(config, data=str(folder)), tmp_path/"runs", progress=False)
        assert not (tmp_path/"runs").exists()
    refused("has an empty context", context=" \n")
    refused("has no answer: SQuAD", answers=dict(text=[], answer_start=[]))
    refused("has no answer span: 'elsewhere' does not stand at character 3", answers=dict(text=["elsewhere"], answer_start=[3]))
    refused("there is room for 100: shorten it", replace(base, max_context=100, too_long="refuse"))
    refused("no room for a context", question="why? "*400)
    rows = squad(str(code), "train").select(range(3))
    bare = find_tokenizer(str(pylm)); bare.pad_token = None
    one, two = (Questions(rows, t, base, 512).batch(range(3)) for t in (tokenizer, bare))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_llmlingua2_reads_what_its_model_prefers(pylm, tokenizer, code, tmp_path):
    """A classifier from a folder, here a random one that reads letters: a run reads exactly M tokens of each context, the likeliest ones."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(p + chr(c) for c in range(33, 127) for p in ("", "##"))]
    torch.manual_seed(0)
    BertForTokenClassification(BertConfig(vocab_size=len(pieces), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=512, initializer_range=.5)).save_pretrained(tmp_path/"lingua")
    BertTokenizer(vocab={p: i for i, p in enumerate(pieces)}, model_max_length=512).save_pretrained(tmp_path/"lingua")
    base = CompressionConfig("llmlingua2", 16, model=str(pylm), data=str(code), lingua=str(tmp_path/"lingua"), template="\n# {question}:", ending="\n", train_examples=8, valid_examples=8, max_answer=4, precision="no")
    metrics = run_single_ablation(base, tmp_path/"runs", progress=False)
    assert metrics["read_tokens"] == 16 and metrics["compression_ratio"] == metrics["context_tokens"]/16
    for row in questions_of(base, tokenizer, 512, progress=False)[1].rows:
        at = iter(tokenizer(tokenizer.decode(row["whole"]), add_special_tokens=False)["input_ids"])
        assert len(row["context"]) == 16 and all(t in at for t in row["context"])          # in the order of the text
    left_out = run_ablations([replace(base, lingua=str(tmp_path/"nothing"))], tmp_path/"runs", progress=False)
    assert "needs the model" in left_out[0]["missing"] and "which is not here" in left_out[0]["missing"]


def test_cost_of_a_real_model(pylm):
    """Operations and bytes of the bundled model with its adapters are the formula's; eight times compressed, the cache is so much smaller, and compressing embeddings costs less than reading."""
    lm = load(pylm, dtype=torch.float32)
    costs = context_costs(lm, (128, 448), 8, CompressionConfig("cross_attention"), repeats=1, progress=False)
    for (N, way), row in costs.iterrows():
        before = 1 + (N if way == "whole" else N//8) + 16
        assert row.first_flops == forward_flops(lm.config, before, rank=8) and row.kv_bytes == kv_bytes(lm.config, before + 15) and row.decode_flops == forward_flops(lm.config, 1, before, rank=8)
    whole, compressed = costs.loc[(448, "whole")], costs.loc[(448, "compressed")]
    assert whole.kv_bytes/compressed.kv_bytes > 5 and whole.first_flops > 5*(compressed.first_flops + compressed.compress_flops) and questions_to_pay(costs).loc[448, "read anew"] >= 1
    assert kv_bytes(lm.config, 1 + 1024 + 32)/kv_bytes(lm.config, 1 + 128 + 32) > 6
    with pytest.raises(ValueError, match="do not fit into the model's 512 positions"): context_costs(lm, (512,), progress=False)


@pytest.mark.slow
def test_a_compressor_learns_real_code(pylm, tokenizer, tmp_path):
    """Forty steps on pieces of the standard library, eight times compressed: most exceptions are named, in files that were never seen."""
    rows, held = (mentions(tokenizer, split, kinds=("exception",), docs=docs, least=12 if split == "train" else 1, most=90 if split == "train" else 8) for split, docs in (("train", 260), ("valid", 50)))
    known = {r["answers"]["text"][0] for r in rows}
    folder = write_rows(rows, tmp_path/"rows", "train"); write_rows([r for r in held if r["answers"]["text"][0] in known], folder, "valid")
    base = CompressionConfig("gist", 16, str(pylm), str(folder), template="\n# {question}:", ending="\n", loss_weights=dict(teacher_forcing=1., contrastive=1.), compressor_lr=2e-3, lora_lr=2e-3, batch_size=16, max_answer=5, epochs=40*16/len(rows), settings=dict(layers=1))
    assert run_single_ablation(base, tmp_path, progress=False)["final_em"] > 60
