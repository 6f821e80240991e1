"""The cache of clusters on real models and real text: quality at equal bytes, a fresh process, the command line."""
import copy
import json
import math
import os
from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from compresslab.blocks import Blocks, pack

from compresslab.data import documents
from compresslab.recursive.layer import RecursiveCompression, recursive_modules
from compresslab.recursive.training import Parachute, cache_metrics, finetune, weigh
from compresslab.store import find_tokenizer, load, save

ENV = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", COLUMNS="160")


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


SMALL = dict(recent=8, block=8)
OPTIONS = {"threshold": dict(similarity_threshold=.6), "percentile": dict(adaptive_threshold=.3), "schedule": dict(similarity_threshold=(.9, .8, .7, .6, .5, .5)), "level 2": dict(similarity_threshold=.7, level2_threshold=.4, window=32),
           "position": dict(similarity_threshold=.6, position_weight=.3, sinks=3), "floor": dict(adaptive_threshold=.1, floor=.6), "one layer": dict(similarity_threshold=.5, compression_layers=(1,)), "residuals": dict(similarity_threshold=.5, use_residuals=True),
           "residuals, level 2": dict(similarity_threshold=.5, use_residuals=True, residual_bits=2, level2_threshold=.4, window=32), "quantized": dict(similarity_threshold=.6, cluster_bits=4), "quantized, level 2": dict(similarity_threshold=.6, cluster_bits=8, level2_threshold=.4, window=32)}


def compressed(original, option, modulator=True):
    """A copy under an option, with corrections of thresholds that are not zero."""
    layers = original.config.num_hidden_layers
    if isinstance(option.get("similarity_threshold"), tuple): option = option | dict(similarity_threshold=option["similarity_threshold"][:layers])
    model = RecursiveCompression(**SMALL, **option).apply(copy.deepcopy(original))
    if modulator:
        torch.manual_seed(0)
        for m in recursive_modules(model).values(): torch.nn.init.normal_(m.modulator.weight)
    return model


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["pylm", "stories260k"])
def test_a_changed_token_changes_no_logit_before_it(subjects, name, option):
    """To the last bit, read at once and through a cache."""
    original, blocks = subjects[name]
    model, ids = compressed(original, OPTIONS[option]), blocks.input_ids[:1, :96]
    other = ids.clone(); other[:, 70] = (ids[:, 70] + 7) % original.config.vocab_size
    with torch.no_grad():
        one, two = (model(x, use_cache=False).logits for x in (ids, other))
        assert torch.equal(one[:, :70], two[:, :70]) and not torch.equal(one[:, 70], two[:, 70])
        assert not torch.equal(one, original(ids).logits)
        cache = DynamicCache(config=model.config); pieces = torch.cat([model(ids[:, a:a + n], past_key_values=cache).logits for a, n in ((0, 63), (63, 1), (64, 1), (65, 7), (72, 24))], 1)
    near = dict(atol=3e-2, rtol=3e-2) if "cluster_bits" in OPTIONS[option] else dict(atol=2e-3, rtol=2e-3)         # a number that rounds the other way is a whole step of the grid away
    torch.testing.assert_close(pieces, one, **near)


def memory(x, found, seen):
    """All storages behind the tensors that an object leads to."""
    if id(x) in seen: return found
    seen.add(id(x))
    if torch.is_tensor(x): found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    elif isinstance(x, dict): [memory(v, found, seen) for v in x.values()]
    elif isinstance(x, (list, tuple)): [memory(v, found, seen) for v in x]
    elif hasattr(x, "__dict__"): memory(vars(x), found, seen)
    return found


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_cache_are_those_of_the_accounting(subjects, option, dtype):
    """Formula, tensors, and the memory behind them, while decoding."""
    original, blocks = subjects["pylm"]
    model = compressed(copy.deepcopy(original).to(dtype), OPTIONS[option]); cache = DynamicCache(config=model.config); w = dtype.itemsize
    with torch.no_grad():
        for a, b in ((0, 80), (80, 81), (81, 97), (97, 98), (98, 99)): model(blocks.input_ids[:1, a:b], past_key_values=cache)
    for l in cache.layers:
        if not hasattr(l, "levels"): continue
        H, d, T = 4, 32, l.recent["keys"].shape[2]
        total = T*(2*H*d*w + 9) + (512*4 if l.histogram is not None else 0)
        for x in l.levels:
            K = int((x.unpack() if hasattr(x, "unpack") else x).counts.shape[1]); blockwise = l.storage(d) if l.storage else None
            total += 12*K + (2*H*-(-K//blockwise.group_size)*blockwise.nbytes if blockwise else K*2*H*d*w)
        if l.residuals is not None: R = l.residuals.owner.shape[1]; total += R*(2*H*l.form.count*l.form.bits//8 + 2*H*d//8 + 2*H + 8)
        assert l.nbytes == total
        assert sum(memory(vars(l), {}, set()).values()) - l.tally.untyped_storage().nbytes() == total
        counted = sum(int((x.unpack() if hasattr(x, "unpack") else x).counts.sum()) for x in l.levels) + T + (0 if l.residuals is None else int((l.residuals.owner >= 0).sum()))
        assert counted == l.get_seq_length() == 99


def test_the_parachute_recovers_from_a_harmful_threshold(subjects):
    """All that leaves the recent tokens merges, until the parachute has seen what that costs."""
    original, blocks = subjects["stories260k"]
    def read(parachute):
        model, lost = RecursiveCompression(similarity_threshold=.85).apply(copy.deepcopy(original)), []
        for m in recursive_modules(model).values(): m.shift.fill_(-1.)
        with torch.no_grad():
            for i in range(12):
                ids = blocks.input_ids[i % 6:i % 6 + 1, 256*(i//6):256*(i//6) + 256]; loss, reference = (m(ids, labels=ids).loss.item() for m in (model, original)); lost.append(loss - reference)
                if parachute: parachute.update(model, loss, reference)
        return sum(lost[:2])/2, sum(lost[-3:])/3
    (_, without), (first, last) = read(None), read(Parachute(tolerance=.02, limits=(-1., 1.), rate=3.))
    print(f"nats lost: {without:.3f} without, {first:.3f} at first and {last:.3f} at last with the parachute")
    assert without > .04 and first > .04 and last < .02


@pytest.mark.parametrize("how", [dict(do_sample=False), dict(do_sample=False, num_beams=2)], ids=["greedy", "beams"])
@pytest.mark.parametrize("option", ["level 2", "residuals", "quantized"])
def test_generate_in_a_batch_with_padding(subjects, option, how):
    """Each row writes what it writes alone; it is padded by whole blocks."""
    original, blocks = subjects["stories260k"]
    model, ids = compressed(original, OPTIONS[option], modulator=False), blocks.input_ids[:2, :64].clone(); mask = torch.ones_like(ids); mask[1, :24] = 0; ids[1, :24] = 0
    how = how | dict(max_new_tokens=16, pad_token_id=0, eos_token_id=None)
    both = model.generate(ids, attention_mask=mask, **how)
    for i, start in enumerate((0, 24)): assert torch.equal(model.generate(ids[i:i + 1, start:], attention_mask=mask[i:i + 1, start:], **how)[0], both[i, start:])


def test_a_single_token_costs_few_operations(subjects):
    """What a token is compared with does not change what it reads: corrections that are all zero, or none."""
    original, blocks = subjects["stories260k"]; ids = blocks.input_ids[:1, :60]
    plain, zero = (RecursiveCompression(**SMALL, similarity_threshold=.7, modulator=m).apply(copy.deepcopy(original)) for m in (False, True))
    with torch.no_grad(): assert torch.equal(plain(ids).logits, zero(ids).logits)
    loss = zero(ids, labels=ids).loss; loss.backward()
    assert any(m.modulator.weight.grad.abs().sum() > 0 for m in recursive_modules(zero).values())


@pytest.mark.slow
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
    forked.python(code, env=ENV)


def test_command_line(tiny, tmp_path):
    def run(*args): return forked.command("recursive", *args, env=ENV)
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
    done = run("train", tiny, "--output", tmp_path/"q", "--epochs", 0, "--similarity-threshold", .6, "--recent", 8, "--cluster-bits", 4, "--use-residuals", "--residual-bits", 2)
    assert done.returncode == 0, done.stderr
    plan = next(iter(recursive_modules(load(tmp_path/"q")).values())).plan
    assert (plan.cluster_bits, plan.residual_bits, plan.residual_sparsity) == (4, 2, .5)
    done = run("generate", tmp_path/"q", "--prompt", "def f(x):"*9, "--max-new-tokens", 8, "--parachute")
    assert done.returncode == 0 and "parachute shifted" in done.stderr
    for wrong, why in ((("--residual-bits", 2), "--residual-bits does nothing without --use-residuals"), (("--epochs", 0, "--parachute"), "does nothing without training")):
        done = run("train", tiny, "--output", tmp_path/"r", *wrong)
        assert done.returncode and why in " ".join(done.stderr.replace("│", " ").split()) and "Traceback" not in done.stderr and not (tmp_path/"r").exists()
    done = run("evaluate", tiny)
    assert done.returncode == 1 and "no layer of this model keeps clusters" in done.stderr and "Traceback" not in done.stderr
