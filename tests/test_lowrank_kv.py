"""Latent keys and values: real models, against the same in float64, and the claims of the chapter at more tokens."""
import copy

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import compresslab as cl
from compresslab.calibration import aim, group_hessians
from compresslab.blocks import calibration_blocks
from compresslab.lowrank.kv import LatentAttention, cache_bytes, joint_factors, latent_kv, output_metric, put_latents
from compresslab.store import find_tokenizer, load, save
from compresslab.surgery import walk
from compresslab.train import evaluate


@pytest.fixture(scope="module")
def case():
    folder = cl.data.project_root()/"data"/"pylm"
    model, tokenizer = load(folder, dtype=torch.float32), find_tokenizer(str(folder))
    return model, calibration_blocks("python-stdlib", tokenizer, 24, 128), cl.held_out(folder, "python-stdlib:valid", max_tokens=3000)


def test_half_the_cache_for_a_hundredth(case, tmp_path):
    model, blocks, held = case
    dense = evaluate(model, held, progress=False).bpb
    latent = latent_kv(copy.deepcopy(model), blocks, share=.5, progress=False)
    assert evaluate(latent, held, progress=False).bpb < 1.01*dense
    caches, prompt = [], blocks[0]["input_ids"][:, :30]
    for m in (model, latent):
        out = m.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, min_new_tokens=20, do_sample=False, return_dict_in_generate=True)
        caches.append(cache_bytes(out.past_key_values))
    assert caches[0] == 2*caches[1] == 6*49*256*4
    again = load(save(latent, tmp_path/"m"))
    with torch.no_grad(): assert torch.equal(again(prompt).logits, latent(prompt).logits)


def test_aiming_at_the_original_is_not_better(case):
    "What the chapter says of the variant it leaves out."
    model, blocks, held = case
    aimed = copy.deepcopy(model)
    for visit in walk(aimed, blocks, keep_original=True, progress=False):
        a, name = visit.layer.self_attn, f"{visit.name}.self_attn"
        metric = output_metric(visit.original, "self_attn", [None]*len(blocks))
        with torch.no_grad():
            (_, h), = group_hessians(aimed, visit, {f"{name}.k_proj": a.k_proj}, blocks, original=True)
            up, latent = joint_factors(aim(torch.cat([a.k_proj.weight, a.v_proj.weight]), h), 64, h.matrix, metric)
            put_latents(aimed, name, latent, up)
    plain = latent_kv(copy.deepcopy(model), blocks, share=.25, progress=False)
    assert evaluate(plain, held, progress=False).bpb < 1.01*evaluate(aimed, held, progress=False).bpb


def test_float64_agrees_and_rows_of_a_batch_do_not_mix():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=52, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3, head_dim=8, initializer_range=.2)).eval()
    ids = torch.randint(0, 64, (4, 60))
    latent = latent_kv(model, [ids], share=.4, progress=False)
    double = copy.deepcopy(latent).double()
    with torch.no_grad():
        exact = double(ids, use_cache=False).logits
        assert (latent(ids, use_cache=False).logits - exact).abs().max() < 1e-3
        cache, out = DynamicCache(), []
        for i in range(0, 60, 7): out.append(double(ids[:, i:i+7], past_key_values=cache).logits)
        assert (torch.cat(out, 1) - exact).abs().max() < 1e-10
        alone = double(ids[2:3], use_cache=False).logits
        assert (alone - exact[2:3]).abs().max() < 1e-10
        assert cache.layers[0].keys.shape[-1] + cache.layers[0].values.shape[-1] == int(.4*48)


def test_causal():
    "A changed token moves no logit before it."
    torch.manual_seed(0)
    model = latent_kv(LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=52, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, head_dim=8, initializer_range=.2)).eval(), [torch.randint(0, 64, (4, 60))], progress=False)
    ids = torch.randint(0, 64, (1, 40)); other = ids.clone(); other[0, 25] = (ids[0, 25] + 1) % 64
    with torch.no_grad(): a, b = model(ids).logits, model(other).logits
    assert torch.equal(a[:, :25], b[:, :25]) and not torch.equal(a[:, 25:], b[:, 25:])


def test_a_small_public_model(shared):
    "A model with weights from elsewhere, if one of a supported family is here."
    folders = [p.parent for p in sorted(shared("models").rglob("config.json")) if '"LlamaForCausalLM"' in p.read_text() or '"Qwen2ForCausalLM"' in p.read_text()]
    folders = [f for f in folders if any(f.glob("*.safetensors")) and sum(x.stat().st_size for x in f.glob("*.safetensors")) < 2e8]
    if not folders: pytest.skip("no small Llama or Qwen2 in shared models")
    model, tokenizer = load(folders[0], dtype=torch.float32), AutoTokenizer.from_pretrained(folders[0])
    blocks = calibration_blocks("python-stdlib", tokenizer, 6, 96)
    latent = latent_kv(copy.deepcopy(model), blocks, share=.5, progress=False)
    assert all(isinstance(l.self_attn, LatentAttention) for l in latent.model.layers)
    x = blocks[0]["input_ids"][:, :48]
    with torch.no_grad():
        expected, cache = latent(x, use_cache=False).logits, DynamicCache()
        got = torch.cat([latent(x[:, i:i+16], past_key_values=cache).logits for i in range(0, 48, 16)], 1)
    assert (got - expected).abs().max() < 1e-2


def test_padding_does_not_count():
    "What stands in the padding of calibration batches changes nothing."
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=52, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, head_dim=8, initializer_range=.2)).eval()
    ids, mask = torch.randint(0, 64, (4, 60)), (torch.arange(60) >= torch.tensor([[0], [13], [20], [40]])).long()
    other = torch.where(mask.bool(), ids, torch.randint(0, 64, (4, 60)))
    made = [latent_kv(copy.deepcopy(model), [dict(input_ids=x, attention_mask=mask)], share=.4, progress=False) for x in (ids, other)]
    with torch.no_grad(): assert torch.allclose(made[0](ids).logits, made[1](ids).logits, atol=1e-3)
