"""AWQ and SmoothQuant on a real pretrained model, measured on text that was not calibrated on."""
import copy
import warnings

import pytest
import torch

import compresslab as cl
from compresslab.blocks import pack
from compresslab.data import documents
from compresslab.calibration import calibration_inputs, targets
from compresslab.quant.ptq import gptq, rtn
from compresslab.quant.scaling import awq, fold, layer_folds, scale_channels, smoothquant
from compresslab.surgery import walk
from compresslab.train import evaluate


@pytest.fixture(scope="module")
def stories(stories260k):
    model, tokenizer, texts = stories260k
    held_out = pack(documents(str(texts), "valid"), tokenizer, 128, "document")
    calibration = calibration_inputs(model, str(texts/"train.txt"), 64, 128, 0, None, targets(model))
    return model, calibration, held_out


def nll(model, held_out): return evaluate(model, held_out, progress=False).nll


def test_every_group_folds_and_the_logits_stay(stories):
    model, calibration, held_out = stories
    scaled = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")                       # a group that keeps its scale would warn
        scale_channels(scaled, calibration, 3, progress=False)
    ids = held_out.input_ids[:8]
    with torch.no_grad(): a, b = model(ids).logits, scaled(ids).logits
    assert (a - b).abs().max() < 1e-4*a.abs().max()
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, scaled.model.layers[0].mlp.down_proj.weight)


@pytest.mark.parametrize("bits", [4, 3])
def test_awq_is_below_rounding(stories, bits):
    """And behind GPTQ, as the chapter says."""
    model, calibration, held_out = stories
    with_awq, rounded, with_gptq = (nll(method, held_out) for method in (
        awq(copy.deepcopy(model), calibration, bits, progress=False), rtn(copy.deepcopy(model), bits, progress=False), gptq(copy.deepcopy(model), calibration, bits, progress=False)))
    assert with_gptq < with_awq < rounded, (with_gptq, with_awq, rounded)


def test_awq_survives_saving(stories, tmp_path):
    model, calibration, held_out = stories
    packed = awq(copy.deepcopy(model), calibration[:4], 3, steps=4, embeddings=True, progress=False)
    ids = held_out.input_ids[:2]
    with torch.no_grad(): assert torch.equal(packed(ids).logits, cl.load(cl.save(packed, tmp_path/"awq"))(ids).logits)


def test_smoothquant_removes_the_damage_of_outliers(stories):
    """The same function with channels 64 times as large; the kernel rounds the activations."""
    model, calibration, held_out = stories
    hard, before = copy.deepcopy(model), nll(model, held_out)
    scale = torch.ones(64)
    scale[[3, 40]] = 1/64
    for visit in walk(hard, calibration[:1], progress=False):
        for f in layer_folds(hard, visit):
            if "norm" in f.source: fold(hard, f, scale)
    assert nll(hard, held_out) == pytest.approx(before, abs=1e-4)
    plain = nll(rtn(copy.deepcopy(hard), 8, 0, True, "int8", progress=False), held_out)
    smooth = nll(smoothquant(hard, calibration, progress=False), held_out)
    assert plain - before > 3*abs(smooth - before), (before, plain, smooth)


def test_stopped_in_the_middle_it_still_computes_the_same(stories, monkeypatch):
    model, calibration, held_out = stories
    half, count = copy.deepcopy(model), []

    def stop(*args):
        count.append(1)
        if len(count) == 7: raise KeyboardInterrupt
        return fold(*args)
    monkeypatch.setattr("compresslab.quant.scaling.fold", lambda m, f, s: stop(m, f, s) if m is half else fold(m, f, s))
    with pytest.raises(KeyboardInterrupt): awq(half, calibration[:4], 3, steps=4, progress=False)
    ids = held_out.input_ids[:4]
    with torch.no_grad(): a, b = model(ids).logits, half(ids).logits
    assert len(count) == 7 and (a - b).abs().max() < 1e-4*a.abs().max()
