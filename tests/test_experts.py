"""Experts of a mixture: routing that goes wrong, sizes that do not fit, files that were tampered with."""
import copy
import json
import warnings

import pytest
import torch
from forked import python
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from compresslab.mixtures import expert_tokens, mixtures
from compresslab.quant.experts import ROUTER, PackedExperts, quantize_experts
from compresslab.quant.ptq import gptq
from compresslab.store import load, save, stored_bytes
from compresslab.surgery import params

SIZES = dict(vocab_size=64, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
MAKERS = dict(
    mixtral=lambda: MixtralForCausalLM(MixtralConfig(**SIZES, head_dim=10, intermediate_size=52, num_local_experts=4, num_experts_per_tok=2)),
    qwen2=lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, intermediate_size=52, moe_intermediate_size=28, shared_expert_intermediate_size=36, num_experts=6, num_experts_per_tok=2)),
    olmoe=lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, intermediate_size=28, num_experts=6, num_experts_per_tok=2)),
    gpt_oss=lambda: GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=10, intermediate_size=52, num_local_experts=4, num_experts_per_tok=2)))
FIRST = "model.layers.0.mlp.experts"


def tiny(name="mixtral"):
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    for p in model.parameters():
        if p.ndim > 1: nn.init.normal_(p, std=.15)
    if name == "gpt_oss":
        for layer in model.model.layers: nn.init.zeros_(layer.self_attn.sinks), nn.init.zeros_(layer.mlp.router.bias)
    return model


def tokens(n=4, length=40, seed=1):
    return [torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(seed + i)) for i in range(n)]


def logits(model, ids=tokens(1, 30, 99)[0]):
    with torch.no_grad(): return model(ids).logits


def skewed(expert, strength):
    """A Mixtral whose first router, with the layer's inputs, is tilted against one expert: the larger the strength, the rarer."""
    model = tiny()
    read = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda m, args: read.append(args[0].flatten(0, -2)))
    for x in tokens(8): logits(model, x)
    handle.remove()
    x = torch.cat(read)
    against = torch.linalg.lstsq(torch.cat([x, .1*torch.eye(40)]), torch.cat([torch.ones(len(x)), torch.zeros(40)])[:, None]).solution.flatten()
    model.model.layers[0].mlp.gate.weight.data[expert] -= strength*against
    return model


def untouched(model, call, match):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=match) as error: call()
    assert "\n" not in str(error.value)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t.nan_to_num(7), after[n].nan_to_num(7)) for n, t in before.items())
    assert not any(isinstance(m, PackedExperts) for m in model.modules())


def test_the_floor_serves_a_rare_expert():
    """Few tokens of its own, and other text afterwards: all of the layer's tokens tell more than these few."""
    model = skewed(2, 3.)
    calibration = tokens(6)
    n = expert_tokens(model, calibration)[FIRST]
    assert 0 < n[2] < 60 < n.sum()/4, n
    error = {}
    other = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    other = model.model.layers[0].post_attention_layernorm(other)
    index, ones = torch.full((500, 1), 2), torch.ones(500, 1)
    with torch.no_grad(): y = model.model.layers[0].mlp.experts(other, index, ones)
    for minimum in (0, None):
        packed = quantize_experts(copy.deepcopy(model), calibration, bits=3, minimum_tokens=minimum, include=FIRST, progress=False)
        with torch.no_grad(): error[minimum] = (packed.model.layers[0].mlp.experts(other, index, ones) - y).square().mean().item()
    assert error[None] < .9*error[0], error


def never(expert):
    """A gpt-oss whose second router never chooses one expert."""
    model = tiny("gpt_oss")
    model.model.layers[1].mlp.router.bias.data[expert] = -1e4
    return model


def test_an_expert_that_is_never_reached_is_named():
    model = never(1)
    assert expert_tokens(model, tokens())["model.layers.1.mlp.experts"].tolist()[1] == 0
    untouched(model, lambda: quantize_experts(model, tokens(), progress=False), "model.layers.1.mlp.experts: no calibration token reaches expert 1: calibrate on more text, or pass unreached")
    for kw in (dict(calibration=tokens()), dict(calibration=tokens(), minimum_tokens=0), dict(method="rtn")):
        model = quantize_experts(never(1), unreached="quantize", progress=False, **kw)
        assert logits(model).isfinite().all()


def test_bad_input_is_one_line():
    model = tiny()
    model.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = float("nan")
    for kw in (dict(calibration=tokens()), dict(method="rtn")):
        untouched(model, lambda: quantize_experts(model, progress=False, **kw), "model.layers.1.mlp.experts: the down weight of expert 3 holds NaN")
    model = tiny()
    untouched(model, lambda: quantize_experts(model, [torch.full((1, 9), 64)], progress=False), "64")
    untouched(model, lambda: quantize_experts(model, [torch.full((1, 9), -1)], progress=False), "-1")
    untouched(model, lambda: quantize_experts(model, progress=False), "needs calibration")
    untouched(model, lambda: quantize_experts(model, tokens(), bits=9), "bits=9 is not supported")
    untouched(model, lambda: quantize_experts(model, tokens(), group_size=-32), "group_size=-32 is not supported")
    untouched(model, lambda: quantize_experts(model, tokens(), include="nothing"), "no experts to compress")
    dense = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=52))
    untouched(dense, lambda: quantize_experts(dense, tokens()), "LlamaForCausalLM has no experts to compress")


@pytest.mark.parametrize("group_size", [0, 7, 32, 1000])
@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_that_do_not_divide(group_size, symmetric, tmp_path):
    model = tiny()
    before = logits(model)
    quantize_experts(model, tokens(), bits=8, group_size=group_size, symmetric=symmetric, progress=False)
    assert (logits(model) - before).abs().mean() < .03*before.abs().mean()
    assert torch.equal(logits(load(save(model, tmp_path/"m"))), logits(model))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_loaded_and_generating(name, dtype, tmp_path):
    model = tiny(name).to(dtype)
    model.set_experts_implementation("eager")                                   # PyTorch's own 16-bit grouped product refuses these odd widths
    count, size = params(model), stored_bytes(save(model, tmp_path/"whole"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_experts(model, tokens(), unreached="quantize", progress=False)
        gptq(model, tokens(), bits=8, exclude=ROUTER, progress=False)           # does not say that experts stay in float
    again = load(save(model, tmp_path/"packed"))
    assert torch.equal(logits(model), logits(again)) and logits(again).dtype == dtype
    assert params(model) == params(again) == count and stored_bytes(tmp_path/"packed") < size
    ids = tokens(1, 7)[0]
    words = [m.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0) for m in (model, again)]
    assert torch.equal(*words) and words[0].shape == (2, 15)


def test_a_fresh_process_loads_it(tmp_path):
    """`import compresslab` alone is enough, for transformers' own loader too."""
    model = quantize_experts(tiny(), method="rtn", progress=False)
    save(model, tmp_path/"m")
    torch.save(logits(model), tmp_path/"logits.pt")
    code = """
import sys, torch, compresslab
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/m")
ids = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(99))
with torch.no_grad(): assert torch.equal(model(ids).logits, torch.load(sys.argv[1] + "/logits.pt"))
"""
    python(code, tmp_path)


@pytest.mark.parametrize("change, match", [
    (lambda e: e["gate_up_proj"].update(shape=[52, 40]), "shape .* does not fit"),
    (lambda e: e["down_proj"].update(bits=12), "bits=12 is not supported"),
    (lambda e: e["down_proj"].update(group_size=0), "group_size"),
    (lambda e: e.pop("down_proj"), "is damaged at 'model.layers.0.mlp.experts'")])
def test_a_tampered_list_is_refused(change, match, tmp_path):
    save(quantize_experts(tiny(), method="rtn", progress=False), tmp_path/"m")
    file = tmp_path/"m"/"compresslab.json"
    about = json.loads(file.read_text())
    change(about["modules"][FIRST])
    file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=match): load(tmp_path/"m")


def test_padding_on_either_side_changes_nothing():
    """The counts and the packed bits of the first layer, where no attention to padding has mixed anything in."""
    model = tiny()
    plain = [dict(input_ids=x) for x in tokens()]
    right = [dict(input_ids=nn.functional.pad(x, (0, 9), value=5), attention_mask=nn.functional.pad(torch.ones_like(x), (0, 9))) for x in tokens()]
    assert torch.equal(expert_tokens(model, plain)[FIRST], expert_tokens(model, right)[FIRST])
    one, two = (quantize_experts(copy.deepcopy(model), c, include=FIRST, progress=False).get_submodule(FIRST).state_dict() for c in (plain, right))
    same = torch.cat([(one[n] == two[n]).flatten() for n in one]).float().mean().item()
    assert same > .99, same                                                     # but for a rare tie


def test_layers_can_be_left_out_and_done_later():
    model = tiny()
    quantize_experts(model, tokens(), include=FIRST, progress=False)
    assert [*mixtures(model)] == ["model.layers.1.mlp.experts"]
    quantize_experts(model, tokens(), bits=3, progress=False)
    assert sum(isinstance(m, PackedExperts) for m in model.modules()) == 2


def test_a_packed_model_is_copied_and_cast():
    model = quantize_experts(tiny(), method="rtn", progress=False)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(model), logits(twin))
    exact = logits(model)
    assert (logits(twin.bfloat16()).float() - exact).abs().mean() < .05*exact.abs().mean()
