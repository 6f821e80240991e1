"""Factored and trimmed vocabularies on real models, from their files."""
import copy
import json
import random

import pytest
import torch
from forked import python
from transformers import AutoTokenizer

import compresslab as cl
from compresslab.blocks import pack
from compresslab.data import documents
from compresslab.lowrank.embedding import factorize_embedding, token_counts
from compresslab.lowrank.vocabulary import trim_vocabulary
from compresslab.quant.ptq import gptq
from compresslab.store import find_tokenizer, load, save, stored_bytes
from compresslab.train import distil, evaluate, fit


@pytest.mark.slow
def test_a_quarter_of_the_embeddings_bytes_costs_at_most_two_percent(pylm, tmp_path):
    model, tokenizer = load(pylm, dtype=torch.float32), find_tokenizer(pylm)
    held = cl.held_out(pylm, "python-stdlib:valid", max_tokens=8000)
    before = evaluate(model, held, progress=False).bpb
    factorize_embedding(model, "python-stdlib", rank=212, samples=48, steps=150, tokenizer=tokenizer, progress=False)
    blocks = pack(documents("python-stdlib").shuffle(seed=1), tokenizer, 256, max_tokens=16_000).input_ids[:60]
    head = "model.embed_tokens.weight"
    gptq(model.bfloat16(), [*blocks.split(6)], bits={f"{head}.left": 4, f"{head}.right": 8}, group_size=0, symmetric=True, embeddings=True, progress=False)
    save(model, tmp_path/"m", tokenizer)
    whole = 4096*256*2
    taken = whole - (stored_bytes(pylm) - stored_bytes(tmp_path/"m"))
    assert taken <= whole/4
    ratio = evaluate(load(tmp_path/"m", dtype=torch.float32), held, progress=False).bpb/before
    assert ratio <= 1.02, ratio


@pytest.mark.slow
def test_recovery_of_a_quarter_of_the_numbers(pylm):
    model, tokenizer = load(pylm, dtype=torch.float32), find_tokenizer(pylm)
    held = cl.held_out(pylm, "python-stdlib:valid", max_tokens=3000)
    small = factorize_embedding(copy.deepcopy(model), "python-stdlib", share=.25, samples=12, steps=50, tokenizer=tokenizer, progress=False)
    before = evaluate(small, held, progress=False).bpb
    text = pack(documents("python-stdlib").shuffle(seed=0), tokenizer, 256, max_tokens=20_000)
    fit(small, text, loss=distil(model), tokens=10_000, lr=5e-4, optimizer="muon", batch_size=2, progress=False)
    assert evaluate(small, held, progress=False).bpb < .98*before
    assert small.lm_head.weight is small.model.embed_tokens.weight


FRESH = """
import sys, torch, compresslab
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("def f(x):\\n    return", return_tensors="pt")["input_ids"]
with torch.no_grad(): torch.save((ids, model(ids).logits), sys.argv[1] + "/out.pt")
"""


def test_trimmed_factored_and_quantized_loads_in_a_fresh_process(tiny, tmp_path):
    model, tokenizer = load(tiny), AutoTokenizer.from_pretrained(tiny)
    model, tokenizer = trim_vocabulary(model, tokenizer, ["def f(x): return x\n"]*3, keep=20, progress=False)
    ids = tokenizer("def f(x):\n    return", return_tensors="pt")["input_ids"]
    factorize_embedding(model, [ids], share=.5, steps=5, progress=False)
    gptq(model, [ids], bits=4, group_size=8, embeddings=True, progress=False)
    folder = save(model, tmp_path/"m", tokenizer)
    python(FRESH, folder)
    found, logits = torch.load(folder/"out.pt")
    assert torch.equal(found, ids)
    with torch.no_grad(): assert torch.equal(logits, model(ids).logits)


def unicode_texts(n):
    draw = random.Random(1)
    def character():
        while 0xD800 <= (c := draw.choice((draw.randrange(9, 127), draw.randrange(0x110000)))) < 0xE000: pass
        return chr(c)
    return ["".join(character() for _ in range(draw.randrange(1, 200))) for _ in range(n)]


def test_trimmed_pylm_reads_every_text_and_says_the_same(pylm, tmp_path):
    model, tokenizer = load(pylm, dtype=torch.float32), find_tokenizer(pylm)
    corpus = [r["text"] for r in documents("python-stdlib").select(range(30))]
    small, trimmed = trim_vocabulary(copy.deepcopy(model), tokenizer, corpus, progress=False)
    kept = tokenizer.convert_tokens_to_ids(trimmed.convert_ids_to_tokens([*range(len(trimmed))]))
    assert 256 < len(kept) < 3800
    for text in corpus + unicode_texts(300) + [r["text"] for r in documents("python-stdlib:valid").select(range(20))]:
        assert trimmed.decode(trimmed(text)["input_ids"]) == text
    for text in corpus: assert [kept[i] for i in trimmed(text)["input_ids"]] == tokenizer(text)["input_ids"]
    new, old = (pack(corpus[:4], t, 256, max_tokens=3000) for t in (trimmed, tokenizer))
    with torch.no_grad(): torch.testing.assert_close(small(new.input_ids[:2]).logits, model(old.input_ids[:2]).logits[..., kept], atol=1e-3, rtol=1e-4)
    assert evaluate(small, new, progress=False).nll <= evaluate(model, old, progress=False).nll + 1e-6
    assert abs(stored_bytes(save(model, tmp_path/"a", tokenizer)) - stored_bytes(save(small, tmp_path/"b", trimmed)) - 4*256*(4096 - len(kept))) < 64
    again = AutoTokenizer.from_pretrained(tmp_path/"b")
    assert again(corpus[0])["input_ids"] == trimmed(corpus[0])["input_ids"] and again.eos_token_id == small.config.eos_token_id


@pytest.mark.parametrize("name", ["stories260k", "babyllama-361"])
def test_real_tokenizers_with_byte_fallback(shared, name):
    folder = shared("models")/name
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    stories = [s.strip() for s in (shared("tinystories")/"valid.txt").read_text().split("<|endoftext|>") if s.strip()][:12]
    small, trimmed = trim_vocabulary(copy.deepcopy(model), tokenizer, stories, progress=False)
    kept = tokenizer.convert_tokens_to_ids(trimmed.convert_ids_to_tokens([*range(len(trimmed))]))
    assert len(kept) < len(tokenizer)
    for text in stories: assert [kept[i] for i in trimmed(text)["input_ids"]] == tokenizer(text)["input_ids"]
    for text in unicode_texts(100):
        ids = trimmed(text)["input_ids"]
        assert trimmed.unk_token_id not in ids or tokenizer.unk_token_id in tokenizer(text)["input_ids"]
        assert trimmed.decode(ids, skip_special_tokens=True) == tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    ids = torch.tensor([trimmed(stories[0])["input_ids"][:200]])
    with torch.no_grad(): torch.testing.assert_close(small(ids).logits, model(torch.tensor(kept)[ids]).logits[..., kept], atol=1e-4, rtol=1e-4)


def test_model_specific_tokenizer_classes_come_back(pylm, tmp_path):
    from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM, T5Tokenizer
    raw = json.loads((pylm/"tokenizer.json").read_text())["model"]
    pieces = [("<pad>", 0.), ("</s>", 0.), ("<unk>", 0.), ("▁", -2.)] + [(c, -5.) for c in "abcdefghijklmnopqrstuvwxyz()"] + [("▁de", -3.), ("def", -3.5), ("▁return", -4.), ("zebra", -4.)]
    for tokenizer in (GPT2Tokenizer(vocab=raw["vocab"], merges=[tuple(m) for m in raw["merges"]]), T5Tokenizer(vocab=pieces, extra_ids=2)):
        size = max(tokenizer.get_vocab().values()) + 1
        model = LlamaForCausalLM(LlamaConfig(vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None))
        _, trimmed = trim_vocabulary(model, tokenizer, ["def f(x): return x"], progress=False)
        assert len(trimmed) < size
        trimmed.save_pretrained(tmp_path/type(tokenizer).__name__)
        again = AutoTokenizer.from_pretrained(tmp_path/type(tokenizer).__name__)
        for text in ("def f(x): return x", "zebra return", "def zebra() </s>"):
            assert again(text)["input_ids"] == trimmed(text)["input_ids"] and trimmed.decode(trimmed(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


def test_counts_of_a_corpus_by_name(pylm):
    counts = token_counts("python-stdlib", 4096, find_tokenizer(pylm), max_tokens=50_000, progress=False)
    assert 50_000 <= counts.sum() < 300_000 and (counts > 0).sum() > 1500
