"""Compressed contexts: real SQuAD as tokens, its official scores, real models end to end, several processes, and a compressor that learns."""
import json
import random
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from compresslab.data import squad
from compresslab.gist.compressors import COMPRESSORS
from compresslab.gist.qa import CompressionConfig, ablation_table, answer, grid, load_reader, mentions, questions_of, run_ablations, run_single_ablation, write_rows
from compresslab.gist.reader import CONTROLS, Questions, Reader, model_positions, qa_loss, read_row, squad_scores
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


def test_processes_find_the_same_numbers(pylm, code, tmp_path):
    """Two runs at a time in processes of their own end like the same runs here."""
    base = CompressionConfig(model=str(pylm), data=str(code), template="\n# {question}:", ending="\n", train_examples=8, valid_examples=8, max_answer=4, precision="no")
    runs = grid(base, architectures=("conv",), target_lengths=(8,), controls=("no_context",))
    without = lambda results: [{k: v for k, v in r.items() if "seconds" not in k} for r in results]
    apart, here = run_ablations(runs, tmp_path/"apart", processes=2, progress=False), run_ablations(runs, tmp_path/"here", progress=False)
    assert without(apart) == without(here) and ablation_table(here).shape[0] == 2
    for r in here: assert torch.equal(*(next(iter(load_reader(tmp_path/f/r["run"]).learned().values())) for f in ("apart", "here")))
    with pytest.raises(RuntimeError, match="failed: .*was not found"): run_ablations([replace(base, architecture=a, model="nowhere") for a in ("conv", "gist")], tmp_path/"bad", processes=2, progress=False)
