"""The quantized key/value cache under real models: generation, search, cropping, windows, and what it costs."""
import math

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import compresslab as cl
from compresslab.blocks import pack
from compresslab.data import documents
from compresslab.quant.grid import dequantize, fit_grid, quantize
from compresslab.quant.kv import QuantizedKVCache, cached_logits
from compresslab.store import find_tokenizer


@pytest.fixture(scope="module")
def stories(stories260k):
    model, tokenizer, _ = stories260k
    return model, tokenizer, torch.tensor([[1] + tokenizer("Once upon a time, there was a little girl named Lily.", add_special_tokens=False)["input_ids"]])


@pytest.mark.parametrize("residual_length, axes", [(0, ("channel", "token")), (0, ("token", "channel")), (32, ("channel", "token"))])
def test_known_text_in_8_bits(stories, residual_length, axes):
    """Greedy generation through 8-bit keys and values is the float one, which holds the published continuation."""
    model, tokenizer, ids = stories
    cache = QuantizedKVCache(8, residual_length=residual_length, keys=axes[0], values=axes[1])
    out = model.generate(ids, past_key_values=cache, max_new_tokens=120, do_sample=False)
    assert torch.equal(out, model.generate(ids, max_new_tokens=120, do_sample=False))
    assert "She loved to play outside in the park. One day, she saw a big, red ball." in tokenizer.decode(out[0], skip_special_tokens=True)
    assert sum(cache.layers[0].counts) >= 96 - residual_length, "the text was read from packed tokens"


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(prompt_lookup_num_tokens=4), dict(num_beams=2, num_return_sequences=2)])
def test_searches(stories, options):
    """Beam search reorders the cache, prompt lookup crops it: both write what they write through floats."""
    model, _, ids = stories
    cache = QuantizedKVCache(8, residual_length=0)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=80, do_sample=False, **options)
    assert torch.equal(out, model.generate(ids, max_new_tokens=80, do_sample=False, **options))
    assert cache.layers[-1].counts


def test_assisted_by_a_model(stories):
    model, _, ids = stories
    cache = QuantizedKVCache(8, residual_length=0)
    out = model.generate(ids, past_key_values=cache, assistant_model=model, max_new_tokens=60, do_sample=False)
    assert torch.equal(out, model.generate(ids, max_new_tokens=60, do_sample=False))


def test_padded_batch_is_the_single_rows(stories):
    """Two prompts of different lengths in one batch continue as each does alone."""
    model, tokenizer, ids = stories
    other = torch.tensor([[1] + tokenizer("Tom had a big dog.", add_special_tokens=False)["input_ids"]])
    width = ids.shape[1]
    assert other.shape[1] < width
    batch = torch.cat([ids, torch.nn.functional.pad(other, (width - other.shape[1], 0))])
    mask = torch.cat([torch.ones_like(ids), torch.nn.functional.pad(torch.ones_like(other), (width - other.shape[1], 0))])
    def go(x, m): return model.generate(x, attention_mask=m, past_key_values=QuantizedKVCache(8, residual_length=8), max_new_tokens=60, do_sample=False)
    together = go(batch, mask)
    assert torch.equal(together[:1], go(ids, mask[:1]))
    assert torch.equal(together[1:, width:], go(other, torch.ones_like(other))[:, other.shape[1]:])


def test_codes_against_the_grid_in_float64(stories):
    """What a real model's attention reads is (code - zero)*scale of the keys that it made, group by group; old codes never change."""
    model, _, ids = stories
    text = model.generate(ids, max_new_tokens=130, do_sample=False)[:, :128]
    full, cache = DynamicCache(), QuantizedKVCache(4, residual_length=0)
    with torch.no_grad(): model(text, past_key_values=full), model(text[:, :96], past_key_values=cache)
    layer = cache.layers[0]                                  # deeper layers' keys depend on attention
    old = [t.clone() for ts in layer.stored for t in ts]
    with torch.no_grad(): model(text[:, 96:], past_key_values=cache)
    assert all(torch.equal(a, b[:, :, :3]) for a, b in zip(old, (t for ts in layer.stored for t in ts)))
    for x, back, axis in ((full.layers[0].keys, layer.keys, "channel"), (full.layers[0].values, layer.values, "token")):
        rows = x.unflatten(2, (-1, 32)).transpose(3, 4).reshape(-1, 32) if axis == "channel" else x.reshape(-1, x.shape[3])
        scale, zero = fit_grid(rows, 4, rows.shape[1], search=False)
        want = (quantize(rows, scale, zero, 4, rows.shape[1]).double() - zero.double())*scale.double()
        assert torch.allclose(want.float(), dequantize(quantize(rows, scale, zero, 4, rows.shape[1]), scale, zero, rows.shape[1]))
        if axis == "channel": want = want.view(*x.shape[:2], -1, x.shape[3], 32).transpose(3, 4)
        wrong = (back.double() - want.reshape(x.shape)).abs() > 1e-5     # float noise may move a key across the middle of two points
        assert wrong.double().mean() < .002


def test_long_text_bytes_and_quality(pylm):
    """Held-out code through a cropped, reused cache: 4 bits cost little, 2 bits more, and chunks say what single tokens say."""
    model, tokenizer = cl.load(pylm).float(), find_tokenizer(str(pylm))
    ids = pack(documents("python-stdlib", "valid"), tokenizer, 512, max_tokens=4096).input_ids[:4]
    def nll(cache, chunk=32, rows=slice(None)):
        q = cached_logits(model, ids[rows], cache, 256, chunk).log_softmax(-1)
        return -q.gather(-1, ids[rows, 256:, None]).mean().item()/math.log(2)
    exact = nll(full := DynamicCache())
    sizes, losses = {}, {}
    for bits in (8, 4, 2):
        cache = QuantizedKVCache(bits)
        losses[bits], sizes[bits] = nll(cache) - exact, cache.nbytes
    assert abs(losses[8]) < .005 and losses[4] < .05 and losses[4] < losses[2] < .5, losses
    in_floats = sum(l.keys.nbytes + l.values.nbytes for l in full.layers)
    assert in_floats/2/sizes[4] > 2.5                        # against 16 bits: recent tokens are in float32 here
    assert abs(nll(QuantizedKVCache(4), 1, slice(1)) - nll(QuantizedKVCache(4), 32, slice(1))) < 2e-3
    before = [t.clone() for t in cache.layers[0].stored[0]]
    cache.crop(-200)
    with torch.no_grad(): again = model(ids[:, 312:344], past_key_values=cache).logits
    assert torch.isfinite(again).all() and cache.get_seq_length() == 344
    whole = 312//32
    assert all(torch.equal(a[:, :, :whole], b[:, :, :whole]) for a, b in zip(before, cache.layers[0].stored[0]))


def test_encoder_decoder(shared):
    """Arabic to Latin characters through two 8-bit caches."""
    import json
    folder = shared("models/aren-transliteration")
    vocab = json.loads((folder/"char_vocab.json").read_text())
    model, ids = cl.load(folder), {c: i for i, c in enumerate(vocab["source"])}
    for word in ("بغداد", "دمشق", "مدينة"):
        x = torch.tensor([[ids[c] for c in word]])
        cache = EncoderDecoderCache(QuantizedKVCache(8, 4, residual_length=0), QuantizedKVCache(8, 4, residual_length=0))
        a, b = (model.generate(x, max_new_tokens=20, num_beams=1, do_sample=False, **kw) for kw in (dict(past_key_values=cache), {}))
        assert torch.equal(a, b) and cache.cross_attention_cache.layers[0].counts


def test_refusals_leave_the_cache_usable(stories):
    model, _, ids = stories
    for bad, says in ((dict(bits=9), "bits=9"), (dict(group_size=0), "group_size=0"), (dict(residual_length=-1), "residual_length=-1"), (dict(keys="row"), "keys='row'")):
        with pytest.raises(ValueError, match=says): QuantizedKVCache(**bad)
    cache = QuantizedKVCache(8, 8, residual_length=0)
    with torch.no_grad(): model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="belongs to another batch or model"), torch.no_grad(): model(ids.repeat(2, 1), past_key_values=cache)
    k = cache.layers[0].keys
    bad = torch.full((1, k.shape[1], 8, k.shape[3]), float("inf"))
    with pytest.raises(ValueError, match=f"keys of layer 0 hold inf at row 0, head 0, token {ids.shape[1]}"): cache.layers[0].update(bad, bad)
    assert torch.equal(k, cache.layers[0].keys)
    out = model.generate(torch.cat([ids, ids[:, 1:]], 1), past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert out.shape[1] == 2*ids.shape[1] - 1 + 5
