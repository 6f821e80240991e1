"""Context compressors on real hidden states; gist tokens on a real model: masked and cached, trained, kept on disk, asked by another process."""
import copy
import os
import subprocess
import sys

import pytest
import torch
from forked import python
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import compresslab as cl
from compresslab.data import documents
from compresslab.gist.cache import cached_logits, compress, generate, gist_memory, load_cache, save_cache
from compresslab.gist.compressors import COMPRESSORS, make_compressor
from compresslab.gist.masks import SEES, add_gist_token, gist_examples, gist_forward, gist_loss
from compresslab.store import find_tokenizer
from compresslab.train import fit

G = 63


@pytest.fixture(scope="module")
def stories():
    """A trained model with a gist token, its tokenizer, and pieces of stories as (prompt, question, answer)."""
    from conftest import SHARED
    folder = SHARED/"models"/"stories260k"
    if not folder.exists(): pytest.skip(f"stories260k is not in {SHARED}")
    model, tokenizer = cl.load(folder).float(), find_tokenizer(str(folder))
    gist_id = add_gist_token(model, tokenizer)
    def pieces(split, n, prompt=96, question=4, answer=28):
        out = []
        for text in documents(str(SHARED/"tinystories"), split)["text"]:
            ids, whole = [1] + tokenizer(text, add_special_tokens=False)["input_ids"], prompt + question + answer
            out += [(ids[a:a+prompt], ids[a+prompt:a+prompt+question], ids[a+prompt+question:a+whole]) for a in range(0, len(ids) - whole + 1, whole)]
            if len(out) >= n: break
        return out[:n]
    return model, tokenizer, gist_id, pieces


def tokenized(tokenizer, texts, side):
    tokenizer.padding_side = side
    if tokenizer.pad_token is None: tokenizer.pad_token = tokenizer.eos_token
    return dict(tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_is_masked_on_real_text(stories, attention, side):
    """Prompts of 20 to 400 tokens through a tokenizer, eight times compressed or not at all: logits agree to 1e-4, and greedy text is the same."""
    model, tokenizer, gist_id, pieces = stories
    model = copy.deepcopy(model); model.set_attn_implementation(attention)
    story = tokenizer.decode([t for p, q, a in pieces("train", 5) for t in p + q + a], skip_special_tokens=True)
    prompts, questions = [story[:n] for n in (60, 300, 1000)], ["One day, ", "The little girl named Lily said ", "He"]
    for n_gist in (1, 16):
        told = [p + "<gist>"*n_gist for p in prompts]
        cache, asked = compress(model, tokenized(tokenizer, told, side), gist_id), tokenized(tokenizer, questions, side)
        with torch.no_grad(): cached = cached_logits(model, cache, asked)
        for i in range(3):
            ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (told[i], questions[i])]
            with torch.no_grad(): masked = gist_forward(model, dict(input_ids=torch.tensor([ids[0] + ids[1]])), gist_id).logits[0, -len(ids[1]):]
            assert (cached[i][asked["attention_mask"][i].bool()] - masked).abs().max() < 1e-4
            alone = generate(model, cache.select([i]), dict(input_ids=torch.tensor([ids[1]])), 12, do_sample=False, eos_token_id=None)
            assert torch.equal(alone[0], generate(model, cache, asked, 12, do_sample=False, eos_token_id=None)[i])
        assert cache.nbytes == 2*5*3*4*n_gist*8*4                   # keys and values, layers, prompts, heads, gists, channels, bytes


def test_a_fresh_process_answers_from_the_file(stories, tmp_path):
    """Logits of a saved cache, read by another process with the saved model, are the same bit for bit; the damaged file is named."""
    model, tokenizer, gist_id, _ = stories
    cl.save(model, tmp_path/"model", tokenizer=tokenizer)
    cache = compress(model, tokenized(tokenizer, ["Lily had a red ball.<gist><gist>"], "left"), gist_id)
    save_cache(cache, tmp_path/"prompt")
    code = ("import sys, torch, compresslab as cl; torch.set_num_threads(1)\n"
            "from compresslab.gist.cache import load_cache, cached_logits\n"
            "ids = torch.tensor([[5, 6, 7]])\n"
            "with torch.no_grad(): torch.save(cached_logits(cl.load(sys.argv[1] + '/model'), load_cache(sys.argv[1] + '/prompt'), dict(input_ids=ids)), sys.argv[1] + '/logits.pt')")
    python(code, tmp_path)
    with torch.no_grad(): here = cached_logits(cl.load(tmp_path/"model"), cache, dict(input_ids=torch.tensor([[5, 6, 7]])))
    assert torch.equal(torch.load(tmp_path/"logits.pt"), here)
    with open(tmp_path/"prompt"/"gist.safetensors", "r+b") as f: f.truncate(100)
    with pytest.raises(ValueError, match="gist.safetensors is truncated or was changed"): load_cache(tmp_path/"prompt")
    with pytest.raises(FileNotFoundError, match="compresslab.json is missing"): load_cache(tmp_path/"nothing")
    with pytest.raises(ValueError, match="not a gist cache"):
        (tmp_path/"model"/"gist.safetensors").write_bytes(b"")
        load_cache(tmp_path/"model")


@pytest.mark.slow
def test_a_real_model_learns_gists(stories):
    """Stories, 96 tokens in 12: trained to use gists, a model continues unseen stories better than one trained for as long without the beginning,
    and better than itself with the gists hidden; untrained, gists only disturb it."""
    model, _, gist_id, pieces = stories
    train, valid = (gist_examples(pieces(s, n), gist_id, 12, length=512) for s, n in (("train", 1600), ("valid", 100)))
    def nll(m, sees):
        with torch.no_grad(): return gist_loss(gist_id, sees)(m, valid[:]).item()
    worth = dict(untrained_gist=nll(model, "gist"), untrained_nothing=nll(model, "nothing"))
    for sees in ("nothing", "gist"):
        m = copy.deepcopy(model)
        fit(m, train, loss=gist_loss(gist_id, sees), steps=80, batch_size=8, lr=3e-4, precision="no", progress=False)
        worth[sees] = nll(m, sees)
    worth["hidden"] = nll(m, "nothing")
    assert worth["gist"] < worth["nothing"] - .005 and worth["gist"] < worth["hidden"] - .005 and worth["untrained_gist"] > worth["untrained_nothing"], worth


def test_encoder_decoder_learns_gists():
    """A tiny T5 remembers one word through a gist, and guesses when the gist is hidden too."""
    words = torch.randint(2, 14, (1200,), generator=torch.Generator().manual_seed(0)).tolist()
    pairs, got = gist_examples([([w, 40 + i % 3], [50], [w]) for i, w in enumerate(words)], G, encoder_decoder=True), {}
    for sees in ("gist", "nothing"):
        torch.manual_seed(0)
        t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=40, d_kv=10, d_ff=52, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.))
        fit(t5, pairs, loss=gist_loss(G, sees), steps=100, batch_size=32, lr=1e-2, precision="no", progress=False)
        with torch.no_grad(): got[sees] = (gist_forward(t5, pairs[:300], G, sees).logits[:, 0].argmax(-1) == pairs[:300]["labels"][:, 0]).float().mean().item()
    assert got["gist"] > .7 and got["nothing"] < .3, got


def test_real_encoder_decoder(shared):
    """Pegasus, with absolute positions: its memory without the prompt gives the masked logits; with all to see it is itself."""
    model = cl.load(shared("models/aren-transliteration")).float()
    text = torch.randint(4, 30, (2, 12), generator=torch.Generator().manual_seed(0)); text[:, 6:8] = gist_id = model.config.vocab_size - 1
    labels = torch.randint(4, 30, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(gist_forward(model, dict(input_ids=text, labels=labels), gist_id, "all").logits, model(input_ids=text, labels=labels).logits)
        for sees in SEES:
            masked = gist_forward(model, dict(input_ids=text, labels=labels), gist_id, sees).logits
            assert (model(**gist_memory(model, dict(input_ids=text), gist_id, sees), labels=labels).logits - masked).abs().max() < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mixed_precision_training(attention):
    """bf16 under autocast: finite losses that fall, for three families."""
    ends = dict(vocab_size=64, bos_token_id=0, eos_token_id=0, attn_implementation=attention)
    rows = [([w, 5], [6], [w]) for w in range(10, 42)]
    for model in (LlamaForCausalLM(LlamaConfig(hidden_size=40, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, **ends)), GPT2LMHeadModel(GPT2Config(n_embd=40, n_layer=2, n_head=4, **ends)),
                  T5ForConditionalGeneration(T5Config(d_model=40, d_kv=10, d_ff=52, num_layers=2, num_heads=4, decoder_start_token_id=0, **ends))):
        h = fit(model, gist_examples(rows, G, 2, encoder_decoder=model.config.is_encoder_decoder), loss=gist_loss(G), steps=12, batch_size=16, lr=3e-3, precision="bf16", progress=False)
        assert h[-1]["loss"] < h[0]["loss"]


SCRIPT = """
import sys, torch; torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from compresslab.gist.masks import gist_examples, gist_loss
from compresslab.train import fit
out, accumulate = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
for model in (LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=40, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4)),
              T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=40, d_kv=10, d_ff=52, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.))):
    start, data = {k: v.clone() for k, v in model.state_dict().items()}, gist_examples([([w, 5], [6], [w]) for w in range(10, 42)], 63, 2, encoder_decoder=model.config.is_encoder_decoder)
    h = fit(model, data, loss=gist_loss(63), steps=4, batch_size=8, accumulate=accumulate, lr=1e-3, precision="no", progress=False)
    assert h[-1]["tokens"] == 4*2*8*data[0]["input_ids"].numel(), h[-1]
    torch.save(dict({k: v - start[k] for k, v in model.state_dict().items()}), out + type(model).__name__)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, monkeypatch):
    """A wrapped model takes its gist masks, an encoder-decoder's hook included: two processes change the weights as one with twice the batches a step."""
    (tmp_path/"train.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path/"one"), "2"])
    exec(SCRIPT, {})
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path/"train.py"), str(tmp_path/"two"), "1"],
                         capture_output=True, text=True, timeout=300, env=dict(os.environ, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"))
    assert run.returncode == 0, run.stderr[-2000:]
    for name in ("LlamaForCausalLM", "T5ForConditionalGeneration"):
        one, two = (torch.load(tmp_path/f"{n}{name}") for n in ("one", "two"))
        assert max(v.abs().max() for v in one.values()) > 1e-3
        for k in one: torch.testing.assert_close(one[k], two[k], rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("architecture", COMPRESSORS)
def test_compressors_on_real_hidden_states(pylm, architecture):
    """Hidden states of the bundled model, rows of very different lengths: padding does not matter, gradients reach the model."""
    model, tokenizer = cl.load(pylm).float(), find_tokenizer(str(pylm))
    texts = ["def f(x):\n    return x", "import os, sys\n" * 40, "x = 1"]
    compressor = make_compressor(architecture, model.config.hidden_size, 32)
    batch = tokenized(tokenizer, texts, "left")
    hidden = model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0), output_hidden_states=True).hidden_states[-1]
    out = compressor(hidden, batch["attention_mask"])
    assert out.shape == (3, 32, 256) and out.isfinite().all()
    for i, text in enumerate(texts):
        alone = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False), output_hidden_states=True).hidden_states[-1]
        assert (compressor(alone) - out[i]).abs().max() < 1e-3*out[i].abs().max()
    out.square().mean().backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0
