"""Factorized stacks: against numpy, on larger and on real weights, and in other families."""
import copy

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM, Wav2Vec2Config, Wav2Vec2Model

from compresslab.lowrank.tensors import FactoredConv, FactoredExperts, SharedFactors, factorize_tensors, factored_conv, shared_numbers, tucker, tucker_ranks
from compresslab.mixtures import is_fused
from compresslab.store import load, save
from compresslab.surgery import params


@pytest.mark.parametrize("shape,ranks", [((5, 12, 20), (7, 9)), ((40, 9, 6), (4, 2)), ((1, 16, 16), (5, 5))])
def test_higher_order_svd_is_numpys(shape, ranks):
    w = np.random.default_rng(0).normal(size=shape) + np.random.default_rng(1).normal(size=shape[1:])
    (n, r, c), (p, q) = shape, ranks
    u = np.linalg.svd(w.transpose(1, 0, 2).reshape(r, -1), full_matrices=False)[0][:, :p]
    v = np.linalg.svd(w.transpose(2, 0, 1).reshape(c, -1), full_matrices=False)[0][:, :q]
    expected = np.einsum("rp,npq,cq->nrc", u, np.einsum("nrc,rp,cq->npq", w, u, v), v)
    a, g, b = tucker(torch.tensor(w), ranks, rounds=0)
    assert np.allclose((a @ g @ b).numpy(), expected, atol=1e-9)
    a, g, b = tucker(torch.tensor(w), ranks)
    assert np.square(w - (a @ g @ b).numpy()).sum() <= np.square(w - expected).sum() + 1e-9


def test_ranks_fill_the_budget():
    w = torch.randn(16, 64, 48)
    for share in (.05, .2, .5, .9):
        p, q = tucker_ranks(w, share)
        used = shared_numbers(p, q, w.shape)
        assert share*w.numel() - (64 + 16*q) < used <= share*w.numel()


def test_upcycled_experts_share_what_they_are_copies_of(pylm, tmp_path):
    "Four copies of a real MLP are four times one matrix: about two thirds of the numbers hold them all, exactly."
    dense = load(pylm, dtype=torch.float32)
    config = {k: v for k, v in dense.config.to_dict().items() if k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "rope_parameters", "bos_token_id", "eos_token_id")}
    moe = MixtralForCausalLM(MixtralConfig(**config, num_local_experts=4, num_experts_per_tok=2)).eval()
    moe.load_state_dict({k: v for k, v in dense.state_dict().items() if ".mlp." not in k}, strict=False)
    with torch.no_grad():
        for a, b in zip(dense.model.layers, moe.model.layers):
            b.mlp.experts.gate_up_proj[:] = torch.cat([a.mlp.gate_proj.weight, a.mlp.up_proj.weight]); b.mlp.experts.down_proj[:] = a.mlp.down_proj.weight
    ids = torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): before = moe(ids).logits; assert (before - dense(ids).logits).abs().max() < 1e-3
    whole = params(moe)
    factorize_tensors(moe, share=.72, include="layers.3", progress=False)
    m = moe.model.layers[3].mlp.experts
    assert isinstance(m.gate_up_proj, SharedFactors) and isinstance(m.down_proj, SharedFactors) and params(moe) < whole - .27*4*3*256*704
    with torch.no_grad():
        after = moe(ids).logits; assert (after - before).abs().max() < 1e-2
        assert torch.equal(load(save(moe, tmp_path/"m"))(ids).logits, after)


@pytest.mark.parametrize("form", ["own", "shared", "best"])
def test_shared_experts_beside_routed_ones_stay(form, tmp_path):
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=64, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=52, moe_intermediate_size=28, shared_expert_intermediate_size=36, num_experts=6, num_experts_per_tok=2)).eval()
    state = copy.deepcopy(model.state_dict())
    samples = [dict(input_ids=torch.randint(0, 64, (2, 30)), attention_mask=(torch.arange(30) >= torch.tensor([[0], [9]])).long()) for _ in range(3)]
    factorize_tensors(model, samples, share=.6, form=form, progress=False)
    assert sum(isinstance(m, FactoredExperts) for m in model.modules()) == 2 and not any(is_fused(m) for m in model.modules())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items() if n in state)
    with torch.no_grad(): assert torch.equal(load(save(model, tmp_path/"m"))(**samples[1]).logits, model(**samples[1]).logits)


def test_an_expert_that_no_token_reaches():
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=40, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=10, intermediate_size=52, num_local_experts=8, num_experts_per_tok=1)).eval()
    for form in ("own", "shared"):
        made = factorize_tensors(copy.deepcopy(model), [torch.tensor([[1, 2, 3]])], share=.6, form=form, progress=False)
        assert all(torch.isfinite(t).all() for t in made.state_dict().values())


def test_convolutions_of_a_speech_encoder(tmp_path):
    torch.manual_seed(0)
    model = Wav2Vec2Model(Wav2Vec2Config(hidden_size=40, num_hidden_layers=1, num_attention_heads=4, intermediate_size=52, conv_dim=(16, 24, 24), conv_kernel=(10, 3, 3), conv_stride=(5, 2, 2), num_feat_extract_layers=3, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=32)).eval()
    before = params(model)
    factorize_tensors(model, share=.5, exclude="conv_layers.0", progress=False)
    assert sum(isinstance(m, FactoredConv) for m in model.modules()) == 2 and params(model) < before
    x = torch.randn(2, 2000)
    with torch.no_grad(): assert torch.equal(load(save(model, tmp_path/"m"))(x).last_hidden_state, model(x).last_hidden_state)


def test_a_kernel_of_its_ranks_is_exact():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(24, 32, 3, padding=1)
    with torch.no_grad(): conv.weight.copy_(torch.einsum("op,pqab,qi->oiab", torch.randn(32, 6), torch.randn(6, 5, 3, 3), torch.randn(5, 24)))
    x, made = torch.randn(1, 24, 8, 8), factored_conv(conv, .3)
    with torch.no_grad(): assert (made(x) - conv(x)).abs().max() < 1e-3*conv(x).abs().max()


def test_factorize_takes_experts_along():
    from transformers import MixtralConfig, MixtralForCausalLM
    from compresslab.lowrank.linear import FactoredLinear, factorize
    from compresslab.lowrank.tensors import FactoredExperts
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=40, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, head_dim=10, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)).eval()
    samples = [torch.randint(0, 64, (2, 30)) for _ in range(6)]
    factorize(model, samples, share=.5, exclude=r"\.gate$", enable_tensor_lra=True, progress=False)
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count(FactoredExperts.__name__) == 2 and kinds.count(FactoredLinear.__name__) == 8
    assert model(samples[0]).logits.isfinite().all()


def test_quantizing_after_factors_advises_nothing_that_cannot_help():
    from compresslab.quant.ptq import rtn
    def said(model):
        with pytest.warns(UserWarning, match="stay in float") as seen: rtn(model, progress=False)
        return str(seen[0].message)
    torch.manual_seed(0)
    moe = MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=40, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, head_dim=10, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64)).eval()
    assert "quantize_experts packs experts" in said(copy.deepcopy(moe))
    assert "quantize_experts" not in said(factorize_tensors(moe, share=.6, progress=False))
