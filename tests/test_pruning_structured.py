"""Structured pruning of a real pretrained model: smaller files, plain transformers, measured on text that was not calibrated on."""
import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import compresslab as cl
from compresslab.blocks import pack
from compresslab.data import documents
from compresslab.pruning.structured import block_influence, drop_layers, keep_layers, prune_channels, prune_heads, prune_hidden
from compresslab.store import stored_bytes
from compresslab.train import evaluate


@pytest.fixture(scope="module")
def stories(stories260k):
    """The model, calibration blocks and held-out blocks, of different stories."""
    model, tokenizer, texts = stories260k
    calibration, valid = (pack(documents(str(texts), split), tokenizer, 256, max_tokens=n) for split, n in (("train", 16*256), ("valid", 8000)))
    return model, [row[None] for row in calibration.input_ids[calibration.attention_mask.all(1)]], valid


def nll(model, valid): return evaluate(model, valid, progress=False).nll


@pytest.mark.parametrize("prune, share", [(prune_channels, .25), (prune_channels, .5), (prune_heads, .5), (prune_hidden, .25)])
def test_making_up_helps_and_the_file_is_ordinary(stories, tmp_path, prune, share):
    model, calibration, valid = stories
    with_, without = (prune(copy.deepcopy(model), calibration, share, compensate=c, progress=False) for c in (True, False))
    assert nll(model, valid) < nll(with_, valid) < nll(without, valid)
    model.save_pretrained(tmp_path/"original"); with_.save_pretrained(tmp_path/"pruned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path/"pruned").eval()
    ids = valid.input_ids[:2]
    with torch.no_grad(): assert torch.equal(again(ids).logits, with_(ids).logits)
    assert stored_bytes(tmp_path/"pruned") < stored_bytes(tmp_path/"original")
    prompt = ids[:, :8]
    assert torch.equal(*(again.generate(prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False, use_cache=c) for c in (True, False)))


def test_influence_finds_a_dispensable_layer(stories):
    """The layer that ShortGPT's measure drops is cheaper to lose than the one it holds dearest."""
    model, calibration, valid = stories
    before = {n: t.clone() for n, t in model.state_dict().items()}
    influence = block_influence(model, [dict(input_ids=x) for x in calibration], progress=False)["model.layers"]
    small = drop_layers(copy.deepcopy(model), calibration, n=1, progress=False)
    dearest = keep_layers(copy.deepcopy(model), {"model.layers": [i for i in range(len(influence)) if i != influence.index(max(influence))]})
    assert nll(small, valid) < nll(dearest, valid)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
