"""The cache of clusters on real models and real text: quality at equal bytes, a fresh process, the command line."""
import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from compresslab.data import Blocks, documents, pack
from compresslab.recursive.layer import RecursiveCompression, recursive_modules
from compresslab.recursive.training import cache_metrics, finetune, weigh
from compresslab.store import find_tokenizer, load, save

ENV = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", COLUMNS="160")
COMMAND = [str(Path(sys.executable).with_name("compresslab"))]


def texts(folder, data, rows, split="valid"):
    blocks = pack(documents(str(data), split), find_tokenizer(str(folder)), 512, max_tokens=512*100)
    full = blocks.attention_mask.all(1).nonzero().flatten()
    pick = full[torch.randperm(len(full), generator=torch.Generator().manual_seed(0))[:rows]]
    return Blocks(blocks.input_ids[pick], blocks.labels[pick], blocks.attention_mask[pick], 0, 0)


@pytest.fixture(scope="module")
def subjects(shared):
    root = Path(__file__).resolve().parents[1]/"data"/"pylm"
    stories = shared("models/stories260k")
    return dict(pylm=(load(root).float().eval(), texts(root, "python-stdlib", 6)), stories260k=(load(stories).float().eval(), texts(stories, shared("tinystories"), 6)))


@torch.no_grad()
def masked_ppl(model, blocks, visible):
    mask = torch.where(visible, 0., torch.finfo(torch.float32).min)[None, None]
    logits = torch.cat([model(ids[None], attention_mask=mask, use_cache=False).logits[:, :-1] for ids in blocks.input_ids])
    return math.exp(F.cross_entropy(logits.transpose(1, 2), blocks.labels[:, 1:], ignore_index=-100).item())


@torch.no_grad()
def kept(model, ids):
    """Share of the bytes in the cache after each 16 tokens, as entries."""
    cache, out = DynamicCache(config=model.config), []
    for a in range(0, ids.shape[1], 16):
        model(ids[:, a:a + 16], past_key_values=cache); m = cache_metrics(cache); out.append(m["kv_bytes"]/m["full_bytes"]*(a + 16))
    return torch.tensor(out).repeat_interleave(16)


@pytest.mark.parametrize("name, setting, most, worst", [
    ("pylm", RecursiveCompression(window=256, level2_threshold=.6), .5, 1.05),
    ("pylm", RecursiveCompression(similarity_threshold=.8, window=128, level2_threshold=.38), .27, 1.15),
    ("stories260k", RecursiveCompression(similarity_threshold=.9, window=128, level2_threshold=.75, position_weight=.1), .5, 1.02),
], ids=["pylm-half", "pylm-quarter", "stories-half"])
def test_better_than_a_window_of_the_same_bytes(subjects, name, setting, most, worst):
    """At every length the window may hold the bytes that the clusters take there."""
    original, blocks = subjects[name]
    model = setting.apply(copy.deepcopy(original))
    found, whole, t = weigh(model, blocks, progress=False), weigh(original, blocks, progress=False), torch.arange(512)
    room = torch.stack([kept(model, ids[None]) for ids in blocks.input_ids[:3]]).mean(0)
    window = masked_ppl(original, blocks, (t <= t[:, None]) & (t > t[:, None] - room[:, None].ceil().clamp(min=1)))
    print(f"{name}: {found['share']:.3f} of the bytes, {found['ppl']/whole['ppl']:.4f}x; a window {window/whole['ppl']:.4f}x")
    assert found["share"] <= most and found["ppl"] < worst*whole["ppl"] and found["ppl"] < window


def test_no_leak_on_real_text(subjects):
    original, blocks = subjects["pylm"]
    model = RecursiveCompression(similarity_threshold=.7, window=128, level2_threshold=.4).apply(copy.deepcopy(original))
    ids = blocks.input_ids[:1, :300]; other = ids.clone(); other[:, 200] = 77
    with torch.no_grad(): one, two = (model(x, use_cache=False).logits for x in (ids, other))
    torch.testing.assert_close(one[:, :200], two[:, :200], atol=1e-4, rtol=1e-4)
    assert not torch.equal(one[:, 200], two[:, 200])


def test_a_short_training_keeps_the_promise(subjects):
    """A few steps on other stories, at half of the bytes: at most 1.05 times the perplexity."""
    original, blocks = subjects["stories260k"]
    train = texts(Path(original.config.name_or_path), Path(original.config.name_or_path).parents[1]/"tinystories", 30, "train")
    setting, model = RecursiveCompression(similarity_threshold=.9, window=128, level2_threshold=.75, position_weight=.1), copy.deepcopy(original)
    history = finetune(model, train, setting, steps=5, batch_size=4, lr=3e-5, precision="no", progress=False)
    after, whole = weigh(model, blocks, progress=False), weigh(original, blocks, progress=False)
    print(f"trained: {after['share']:.3f} of the bytes, {after['ppl']/whole['ppl']:.4f}x")
    assert after["ppl"] < 1.05*whole["ppl"] and after["share"] < .5 and history[-1]["contrastive"] > 0


def test_a_fresh_process_reads_it(pylm, tmp_path):
    model = RecursiveCompression(similarity_threshold=.7).apply(load(pylm))
    save(model, tmp_path/"m")
    ids = torch.arange(5, 125)[None]
    with torch.no_grad(): torch.save(model(ids).logits, tmp_path/"logits.pt")
    code = f"import torch, compresslab; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(r'{tmp_path/'m'}'); x = torch.arange(5, 125)[None]; assert torch.equal(m(x).logits, torch.load(r'{tmp_path/'logits.pt'}')); assert m.generate(x, max_new_tokens=3, do_sample=False).shape[1] > 120"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr


def test_command_line(tiny, tmp_path):
    def run(*args): return subprocess.run([*COMMAND, "recursive", *map(str, args)], capture_output=True, text=True, env=ENV)
    done = run("train", tiny, "--output", tmp_path/"m", "--max-length", 96, "--max-tokens", 1500, "--batch-size", 4, "--similarity-threshold", .6, "--recent", 8)
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path/"m"/"metrics.json").read_text())
    assert {"nll", "contrastive", "ratio", "clusters_0", "threshold_2"} <= history[-1].keys() and (tmp_path/"m"/"metrics.png").exists()
    done = run("evaluate", tmp_path/"m", "--max-tokens", 500, "--max-length", 96)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kv_bytes"] < found["full_bytes"] and math.isfinite(found["ppl_uncompressed"])
    done = run("generate", tmp_path/"m", "--prompt", "def f(x):", "--max-new-tokens", 8)
    assert done.returncode == 0 and done.stdout.startswith("def f(x):") and "bytes of cache" in done.stderr
    done = run("evaluate", tiny)
    assert done.returncode == 1 and "no layer of this model keeps clusters" in done.stderr and "Traceback" not in done.stderr
