"""Distillation on real models: what the cache promises, kills, several processes, two tokenizers, an encoder-decoder."""
import copy
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from compresslab.blocks import Blocks, pack

from compresslab.data import documents
from compresslab.distillation.losses import CachedLogits, align, byte_logits, cache_logits, first_bytes
from compresslab.distillation.trainer import DistillationLoss, DistillationTrainer

QUIET = dict(precision="no", progress=False)


def smaller(teacher, seed=0, **kw):
    """The teacher's architecture with other sizes, at random weights."""
    config = teacher.config.to_dict() | dict(dtype="float32") | kw
    config.pop("head_dim", None)
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**config))


def gradient(student, loss, batch):
    student.zero_grad()
    loss(student, batch)[0].backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.fixture
def stories(stories260k):
    """A real model of stories with its tokenizer, and stories for it to read."""
    teacher, tokenizer, texts = stories260k
    docs = documents(str(texts/"train.txt"))
    return teacher, tokenizer, docs


def test_cached_gradients_are_the_live_ones(stories, tmp_path):
    """At 99.9% of the mass, for students that know nothing, something, and much."""
    teacher, tokenizer, docs = stories
    text = pack(docs.select(range(16)), tokenizer, 256, "document")
    sizes = dict(hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    trained, chopped = smaller(teacher, **sizes), copy.deepcopy(teacher)
    DistillationTrainer(teacher, trained, feature_weight=0).train(text, steps=30, batch_size=8, lr=5e-3, **QUIET)
    chopped.model.layers, chopped.config.num_hidden_layers = chopped.model.layers[:3], 3
    for temperature in (1., 2.):
        kept = cache_logits(teacher, text, tmp_path/f"{temperature}", temperature=temperature, progress=False)
        assert ("teacher_ids" in kept[0]) == (temperature == 1.) and kept.k < 512
        for student in (smaller(teacher, **sizes), chopped, trained):
            loss = DistillationLoss(teacher, student, temperature=temperature, alpha=1., feature_weight=0)
            live, cached = (gradient(student, loss, next(iter(DataLoader(data, 12)))) for data in (text, kept))
            assert (live - cached).norm() < 1e-3*live.norm(), (temperature, kept.k)


def test_the_cache_saves_a_third_of_the_time(pylm, tmp_path):
    """The promise is 1.5 times as fast; measured, over two times. The least of eight steps each, twice at most."""
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(pylm, dtype=torch.float32), AutoTokenizer.from_pretrained(pylm)
    text = pack(documents("python-stdlib"), tokenizer, 128, max_tokens=127*32)
    kept = cache_logits(teacher, text, tmp_path/"kept", progress=False)

    def step(data):
        student = smaller(teacher, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
        history = DistillationTrainer(teacher, student, feature_weight=0).train(data, steps=8, batch_size=4, **QUIET)
        return min(b["seconds"] - a["seconds"] for a, b in zip(history, history[1:]))
    assert any(step(text) > 1.5*step(kept) for _ in range(3))


KILLED = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from compresslab.blocks import pack
from compresslab.data import documents
from compresslab.distillation.losses import cache_logits
model, folder = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32), sys.argv[2]
text = pack(documents("python-stdlib"), AutoTokenizer.from_pretrained(sys.argv[1]), 64, max_tokens=63*160)
cache_logits(model, text, folder, k=20, batch_size=4, shard_rows=8, progress=False)
"""


@pytest.mark.slow
def test_a_killed_cache_goes_on(pylm, tmp_path):
    """SIGKILL in the middle: whole shards are kept, the rest is made, and it is as if nothing had happened."""
    script = tmp_path/"cache.py"
    script.write_text(KILLED)
    run = [sys.executable, str(script), str(pylm), str(tmp_path/"killed")]
    process = subprocess.Popen(run)
    while len([*(tmp_path/"killed").glob("*.safetensors")]) < 3:
        assert process.poll() is None
        time.sleep(.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    text = pack(documents("python-stdlib"), AutoTokenizer.from_pretrained(pylm), 64, max_tokens=63*160)
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path/"killed").glob("*.safetensors")}
    with pytest.raises(ValueError, match=f"{-(-len(text)//8) - len(before)} of {-(-len(text)//8)} shards are missing"): CachedLogits(tmp_path/"killed", text)
    teacher = AutoModelForCausalLM.from_pretrained(pylm, dtype=torch.float32)
    kept, whole = (cache_logits(teacher, text, tmp_path/name, k=20, batch_size=4, shard_rows=8, progress=False) for name in ("killed", "whole"))
    assert all(f.stat().st_mtime_ns == before.get(f.name, f.stat().st_mtime_ns) for f in (tmp_path/"killed").iterdir())
    for i in (0, 30, len(text) - 1):
        for k, v in whole[i].items(): assert torch.equal(v, kept[i][k]), k


@pytest.mark.slow
def test_two_tokenizers_on_real_models(stories, shared):
    """A model of single characters and one with 512 pieces tell the next byte of the same text; the first teaches a student of the second kind more than the text alone does."""
    speller, pieces, docs = stories
    folder = shared("models/babyllama-361")
    teacher, characters = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    train, valid = (align(docs.select(r), pieces, characters, length=120, max_bytes=n) for r, n in ((range(60), 24_000), (range(100, 110), 2000)))
    for model, tokenizer, ids, at in ((speller, pieces, "input_ids", "student_at"), (teacher, characters, "teacher_input_ids", "teacher_at")):
        first, right, n = first_bytes(tokenizer, model.config.vocab_size), 0, 0
        for row in (valid[i] for i in range(len(valid))):
            where = row[at][row[at] >= 0]
            with torch.no_grad(): said = byte_logits(model(row[ids][None]).logits[0, where], first)
            right += int((said.argmax(-1) == first[row[ids][where + 1]]).sum())
            n += len(where)
        assert right > .65*n, (right, n)                     # by chance, a space: .4
    results = {}
    for alpha in (0., .7):
        trainer = DistillationTrainer(teacher, smaller(speller, num_hidden_layers=2), temperature=1., alpha=alpha, feature_weight=0, tokenizers=(pieces, characters))
        trainer.train(train, steps=60, batch_size=8, lr=5e-3, **QUIET)
        results[alpha] = trainer.evaluate(valid, progress=False)
    assert results[.7].divergence < results[0.].divergence - .05 and results[.7].bpb < results[0.].bpb


def test_an_encoder_decoder_that_people_use(shared):
    """Pegasus: all terms, in both stacks, and a student that learns."""
    teacher = AutoModelForSeq2SeqLM.from_pretrained(shared("models/aren-transliteration"), dtype=torch.float32, attn_implementation="eager")
    config = copy.deepcopy(teacher.config)
    config.decoder_layers = config.num_decoder_layers = 1
    torch.manual_seed(0)
    student = type(teacher)(config)
    g = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(4, teacher.config.vocab_size, (24, 12), generator=g) for _ in range(2))
    labels[::2, 8:] = -100
    mask = torch.ones_like(ids)
    mask[::3, 9:] = 0
    rows = [dict(input_ids=i, attention_mask=m, labels=y) for i, m, y in zip(ids, mask, labels)]
    trainer = DistillationTrainer(teacher, student, attention_weight=.5)
    assert {*trainer.layer_map} == {"encoder", "decoder"} and trainer.layer_map["decoder"] == {0: teacher.config.decoder_layers - 1}
    before, start = copy.deepcopy(teacher.state_dict()), trainer.evaluate(rows, progress=False)
    history = trainer.train(rows, steps=40, batch_size=8, lr=3e-3, **QUIET)
    end = trainer.evaluate(rows, progress=False)
    assert end.divergence < .8*start.divergence and all(history[-1][k] < history[0][k] for k in ("soft", "feature", "attention"))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


SCRIPT = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from compresslab.blocks import Blocks
from compresslab.distillation.trainer import DistillationTrainer
out, accumulate = sys.argv[1], int(sys.argv[2])
def model(hidden, seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True))
student, ids = model(24, 1), torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(1))
trainer = DistillationTrainer(model(32, 0), student)
history = trainer.train(Blocks(ids, ids, torch.ones_like(ids), 1, 1), steps=5, batch_size=4, accumulate=accumulate, precision="no", progress=False)
assert history[-1]["tokens"] == 5*2*4*16, history[-1]
torch.save(dict(student.state_dict()) | dict(trainer.projections.state_dict()), out)
"""


def test_two_processes_equal_one(tmp_path, monkeypatch):
    """One process with twice the batches a step is run here, two under torch's launcher."""
    script = tmp_path/"train.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path/"one.pt"), "2"])
    exec(SCRIPT, {})
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path/"two.pt"), "1"],
                         capture_output=True, text=True, timeout=300, env=dict(os.environ, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"))
    assert run.returncode == 0, run.stderr[-2000:]
    one, two = torch.load(tmp_path/"one.pt"), torch.load(tmp_path/"two.pt")
    assert {"decoder_0.weight", "decoder_1.weight"} <= one.keys()
    for k in one: torch.testing.assert_close(one[k], two[k], rtol=1e-3, atol=1e-4)


def test_a_batch_without_labels_stops_before_the_step(pylm):
    """Nothing to score is a loss that is no number: the run stops where it is, and says where."""
    teacher = AutoModelForCausalLM.from_pretrained(pylm, dtype=torch.float32)
    student = smaller(teacher, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    before = copy.deepcopy(student.state_dict())
    ids = torch.ones(4, 8, dtype=torch.int64)
    with pytest.raises(FloatingPointError, match="at step 0: lower lr .* or check the data"):
        DistillationTrainer(teacher, student).train(Blocks(ids, torch.full_like(ids, -100), torch.ones_like(ids), 1, 1), steps=2, **QUIET)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
