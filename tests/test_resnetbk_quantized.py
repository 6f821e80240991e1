"""Quantized and pruned parts of ResNet-BK: architectures, fresh processes, 16-bit models, real text."""
import copy

import pytest
import torch
from forked import python

from compresslab.blocks import pack

from compresslab.data import documents
from compresslab.pruning.experts import prune_experts
from compresslab.pruning.removal import ProgressivePruningScheduler
from compresslab.quant.complex import complex_error
from compresslab.quant.experts import quantize_experts
from compresslab.quant.ptq import rtn
from compresslab.quant.qat import convert, prepare_qat
from compresslab.resnetbk.core import bk_core
from compresslab.resnetbk.experts import PrunedMoELayer, QuantizedMoELayer
from compresslab.resnetbk.model import BKMixer, ResNetBKConfig, ResNetBKForCausalLM
from compresslab.resnetbk.quantized import PerChannelQuantizedBKCore, QuantizedBKCore, QuantizedBKMixer, quantize_core
from compresslab.store import find_tokenizer, load, save, stored_bytes
from compresslab.surgery import replace
from compresslab.train import evaluate, fit

SHAPES = dict(plain=dict(), mlp=dict(num_experts=0), uncoupled=dict(coupling=False), unbiased=dict(bias=False), groups=dict(n_groups=2, n_layers=4), narrow=dict(n_channels=3),
              untied=dict(tie_word_embeddings=False), wide=dict(v_max=3.))


def tiny(**kwargs):
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(ResNetBKConfig(**dict(dict(vocab_size=61, d_model=16, n_layers=2, num_experts=3, top_k=2, bos_token_id=0, eos_token_id=None, pad_token_id=1), **kwargs))).eval()
    for p in model.parameters(): p.data.add_(.2*torch.randn_like(p))
    return model


def tokens(n=3, seed=1):
    return [torch.randint(2, 61, (2, 40), generator=torch.Generator().manual_seed(seed + i)) for i in range(n)]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_architecture_is_quantized_stored_causal_and_recurrent(shape, tmp_path):
    model, ids = tiny(**SHAPES[shape]), tokens(1, seed=9)[0]
    exact, coarse = model(ids).logits, quantize_core(copy.deepcopy(model), tokens(), bits=4)(ids).logits
    quantize_core(model, tokens())
    got = model(ids, use_cache=False).logits
    assert 0 < (got - exact).norm() < .2*exact.norm() and (got - exact).norm() < .5*(coarse - exact).norm()        # random weights, amplified by the norms; a token may change its expert
    again = load(save(model, tmp_path/"out"))
    assert torch.equal(again(ids).logits, got) and {type(m) for n, m in again.named_modules() if n.endswith(".mixer")} == {QuantizedBKMixer}
    other = ids.clone(); other[:, 20] = (other[:, 20] - 1) % 59 + 2
    assert torch.equal(model(other, use_cache=False).logits[:, :20], got[:, :20])
    cache, out = None, []
    for part in ids.split(7, 1):
        piece = model(part, past_key_values=cache, use_cache=True); cache = piece.past_key_values; out.append(piece.logits)
    assert torch.allclose(torch.cat(out, 1), got, atol=1e-3)


@torch.no_grad()
def test_padded_on_the_left_like_alone():
    model, ids = quantize_core(tiny(), tokens()), tokens(1, seed=9)[0]
    padded = torch.cat((torch.ones(1, 11, dtype=torch.long), ids[:1, 11:]), 1)
    alone = model.generate(ids[:1, 11:], max_new_tokens=6, do_sample=False)[0, -6:]
    assert torch.equal(model.generate(padded, attention_mask=(padded != 1).long(), max_new_tokens=6, do_sample=False)[0, -6:], alone)


@torch.no_grad()
def test_loads_in_a_fresh_process_and_in_bfloat16(tmp_path):
    model, ids = rtn(quantize_core(tiny(), tokens()), bits=8, exclude="router", progress=False), torch.arange(2, 30)[None]
    want = model(ids).logits.double().sum().item()
    save(model, tmp_path/"out")
    code = ("import sys, torch, compresslab, compresslab.resnetbk.quantized; from transformers import AutoModelForCausalLM; m = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval();"
            "torch.set_grad_enabled(False); print(m(torch.arange(2, 30)[None]).logits.double().sum().item())")
    assert float(python(code, tmp_path/"out").split()[-1]) == want
    half = load(tmp_path/"out", dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16 and half(ids).logits.isfinite().all()
    assert quantize_core(tiny().bfloat16(), tokens())(ids).logits.isfinite().all()


@torch.no_grad()
def test_composes_with_weights_trained_in_rounding(tmp_path):
    model, ids = quantize_core(tiny(), tokens()), tokens(1, seed=9)[0]
    prepare_qat(model, bits=4, exclude="router")
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    mixer = model.model.layers[0].mixer
    assert mixer.shift_real.grad.abs().sum() > 0 and mixer.v_proj.weight.grad.abs().sum() > 0
    before = model.eval()(ids).logits
    convert(model)
    assert (model(ids).logits - before).norm() < .005*before.norm()             # the packed product sums in another order, and a sum on the edge of two grid points may fall to the other side
    assert torch.equal(load(save(model, tmp_path/"out"))(ids).logits, model(ids).logits)


@torch.no_grad()
def test_calibration_again_forgets_the_first_and_an_open_one_is_not_used():
    a, z = 2 + torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0)).tanh(), torch.tensor([.1 + .1j, .3j, -.5 + .2j, .5j])
    core = PerChannelQuantizedBKCore(30, 4)
    for scale in (.1, 1.):
        core.start_calibration(); core(2 + scale*(a - 2), z); core.end_calibration()
    fresh = PerChannelQuantizedBKCore(30, 4); fresh.start_calibration(); fresh(a, z); fresh.end_calibration()
    assert torch.equal(core(a, z), fresh(a, z))
    core.start_calibration()
    with pytest.raises(RuntimeError, match="started already"): core.start_calibration()
    with pytest.raises(RuntimeError, match="not calibrated"): core.to_int8_inference()
    with pytest.raises(RuntimeError, match="nothing was seen"): core.end_calibration()
    core(a, z); core.end_calibration()
    assert torch.equal(core(a, z), fresh(a, z))
    state = copy.deepcopy(fresh.state_dict())
    loaded = PerChannelQuantizedBKCore(30, 4); loaded.load_state_dict(state)
    assert torch.equal(loaded(a, z), fresh(a, z))


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_more_bits_are_nearer_in_both_forms(bits):
    a, z = 2 + torch.randn(4, 64, 6, generator=torch.Generator().manual_seed(0)).tanh(), torch.complex(-torch.rand(6), torch.linspace(.05, .6, 6))
    for causal in (True, False):
        errors = []
        for b in (bits, bits + 1 if bits < 8 else 4):
            core = PerChannelQuantizedBKCore(64, 6, bits=b, causal=causal); core.start_calibration(); core(a, z); core.end_calibration()
            errors.append(complex_error(bk_core(a, z, dim=1, causal=causal), core(a, z))["sqnr"])
        assert (errors[1] > errors[0]) == (bits < 8)


def test_half_precision_and_bytes():
    a, z = 2 + torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).tanh(), .3 + .2j
    core = QuantizedBKCore(None); core.start_calibration(); core(a, z); core.end_calibration()
    assert core(a.bfloat16(), z).dtype == torch.complex64 and core(torch.cat([a]*50, 1), z).shape == (2, 1000)
    int8 = core.to_int8_inference()
    assert torch.equal(int8(int8.encode(a.bfloat16()), z).dequantize(), core(a.bfloat16(), z))
    assert core.half().diagonal.range.dtype == torch.float32


def test_experts_quantized_pruned_and_stepwise(tmp_path):
    model, ids = tiny(num_experts=6), tokens(1, seed=9)[0]
    small = prune_experts(quantize_core(copy.deepcopy(model), tokens()), tokens(8), keep=3, progress=False)
    quantize_experts(small, tokens(8), bits=4, group_size=128, unreached="quantize", progress=False)
    with torch.no_grad(): assert torch.equal(load(save(small, tmp_path/"out"))(ids).logits, small(ids).logits)
    assert small.config.num_experts == 3 and stored_bytes(tmp_path/"out") < stored_bytes(save(model, tmp_path/"whole"))
    scheduler, left = ProgressivePruningScheduler(target_experts=2, prune_epochs=[2, 4, 6], method="usage", progress=False), []
    for epoch in range(1, 7): scheduler.step_epoch(model, epoch, tokens(8)); left.append(model.config.num_experts)
    assert left == [6, 5, 5, 3, 3, 2]


def test_layers_of_ones_own_learn_and_shrink():
    torch.manual_seed(0)
    layer = PrunedMoELayer(8, 4, prune_threshold=.05, top_k=2, d_ff=16).train()
    layer.router.weight.data[1] = 0
    mix, target = torch.randn(3, 8), torch.randn(8, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=.01)
    for _ in range(30):
        x = (torch.randn(4, 20, 3).abs() @ mix)
        loss = (layer(x) - x @ target).square().mean(); optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert layer.usage.sum() == 30*80*2
    keep = layer.eval().prune(x)
    assert len(keep) == layer.num_experts == len(layer.experts) == layer.router.weight.shape[0] and layer.top_k == min(2, len(keep))
    quantized = QuantizedMoELayer.from_moe(layer, group_size=0, bits=8).quantize_all(x.detach())
    assert quantized.get_compression_ratio() > 1.5 and quantized(x).shape == x.shape


def test_perplexity_on_real_text_with_eight_bits(pylm):
    """Trained for half a minute: 8 bits cost less than a percent on held-out code, and a grid a channel costs least."""
    tokenizer, texts = find_tokenizer(str(pylm)), documents("python-stdlib:train").shuffle(seed=0)
    train, valid = pack(texts.select(range(100)), tokenizer, 128, max_tokens=200_000), pack(documents("python-stdlib:valid").shuffle(seed=0), tokenizer, 128, max_tokens=10_000)
    calibration = [*pack(texts.select(range(400, 450)), tokenizer, 128, max_tokens=6_000).input_ids.split(16)]
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(ResNetBKConfig(vocab_size=len(tokenizer), d_model=48, n_layers=2, bos_token_id=0, eos_token_id=None, pad_token_id=1))
    fit(model, train, tokens=80_000, batch_size=8, lr=.02, optimizer="muon", precision="no", progress=False)
    for m in model.modules():
        if hasattr(m, "balance"): m.balance = None
    base = evaluate(model, valid, progress=False).nll
    for granularity in ("tensor", "channel"):
        for parts in ("shared", "separate"):
            quantized = quantize_core(copy.deepcopy(model), calibration, granularity=granularity, parts=parts)
            assert abs(evaluate(quantized, valid, progress=False).nll - base) < .01
