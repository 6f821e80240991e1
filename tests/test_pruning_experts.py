"""Pruning experts: families, files that transformers reads alone, padding, 16-bit models, layers of one's own."""
import copy

import pytest
import torch
from forked import python
from torch import nn
from transformers import (GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM,
                          Qwen3MoeConfig, Qwen3MoeForCausalLM)

from compresslab.ledger import measure
from compresslab.mixtures import expert_tokens
from compresslab.pruning.experts import prune_experts, remove_experts, sites, track_usage
from compresslab.pruning.removal import ProgressivePruningScheduler
from compresslab.quant.experts import quantize_experts
from compresslab.store import load, save, stored_bytes
from compresslab.surgery import params

SIZES = dict(vocab_size=64, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
MAKERS = dict(
    mixtral=lambda: MixtralForCausalLM(MixtralConfig(**SIZES, head_dim=10, intermediate_size=52, num_local_experts=6, num_experts_per_tok=2)),
    qwen2=lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, intermediate_size=52, moe_intermediate_size=28, shared_expert_intermediate_size=36, num_experts=6, num_experts_per_tok=2)),
    qwen3=lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, head_dim=10, intermediate_size=52, moe_intermediate_size=28, num_experts=6, num_experts_per_tok=4)),
    olmoe=lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, intermediate_size=28, num_experts=6, num_experts_per_tok=2)),
    gpt_oss=lambda: GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=10, intermediate_size=52, num_local_experts=6, num_experts_per_tok=2)))
FIRST = "model.layers.0.mlp.experts"


class Mixture(nn.Module):
    """An own layer with a linear router and a list of experts, and what they say added to a shared expert's word."""
    def __init__(self, width=40, n=6, top_k=2):
        super().__init__()
        self.router, self.shared, self.top_k = nn.Linear(width, n), nn.Linear(width, width), top_k
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 52), nn.GELU(), nn.Linear(52, width)) for _ in range(n))

    def forward(self, x):
        weight, chosen = self.router(x).topk(self.top_k)
        weight, out = weight.softmax(-1), self.shared(x)
        for e, expert in enumerate(self.experts):
            *where, k = (chosen == e).nonzero(as_tuple=True)
            if len(k): out = out.index_put((*where,), weight[(*where, k)][:, None]*expert(x[(*where,)]), accumulate=True)
        return out


def tiny(name="mixtral"):
    torch.manual_seed(0)
    if name == "list":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=52)).eval()
        for layer in model.model.layers: layer.mlp = Mixture()
    else: model = MAKERS[name]().eval()
    for p in model.parameters():
        if p.ndim > 1: nn.init.normal_(p, std=.15)
        elif (p == 0).all(): nn.init.normal_(p, std=.1)
    return model


def tokens(n=4, length=40, seed=1):
    return [torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(seed + i)) for i in range(n)]


def logits(model, ids=tokens(1, 30, 99)[0]):
    with torch.no_grad(): return model(ids).logits


@pytest.mark.parametrize("name", [*MAKERS, "list"])
def test_routers_follow(name):
    """Equal to the original whose own routers are made never to choose the others, by -inf in their logits' place."""
    model, original = tiny(name), tiny(name)
    for site in sites(model).values(): remove_experts(site, [0, 2, 3, 5])
    for site in sites(original).values():
        router = site.block.get_submodule(site.router)
        router.bias, mask = getattr(router, "bias", None), torch.zeros(6)
        mask[[1, 4]] = -torch.inf
        if router.bias is not None: router.bias.data += mask
        else:                                                                    # a column for a constant input
            router.weight = nn.Parameter(torch.cat([router.weight, mask.clamp(min=-1e9)[:, None]], 1))
            router.hidden_dim += 1
            router.register_forward_pre_hook(lambda m, args: (torch.cat([args[0], torch.ones_like(args[0][..., :1])], -1),))
    torch.testing.assert_close(logits(model), logits(original), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*MAKERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merge", [False, True])
def test_saved_loaded_and_generating(name, dtype, merge, tmp_path):
    tiny(name).save_pretrained(tmp_path/"whole")
    model = type(tiny(name)).from_pretrained(tmp_path/"whole", dtype=dtype)      # whose rotary tables stay in float32, unlike after `.to(dtype)`
    model.set_experts_implementation("eager")                                    # PyTorch's own 16-bit grouped product refuses these odd widths
    before, ids = params(model), tokens(1, 7)[0]
    prune_experts(model, tokens(), keep=3, merge=merge, progress=False)
    assert params(model) < before and logits(model).dtype == dtype and logits(model).isfinite().all()
    save(model, tmp_path/"ours")
    model.save_pretrained(tmp_path/"theirs")
    for again in (load(tmp_path/"ours"), type(model).from_pretrained(tmp_path/"theirs", dtype=dtype)):
        again.set_experts_implementation("eager")
        assert torch.equal(logits(again), logits(model))
        words = [m.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0) for m in (model, again)]
        assert torch.equal(*words)
    config = model.config.to_dict()
    assert 3 in (config.get("num_local_experts"), config.get("num_experts")) and config["num_experts_per_tok"] == min(3, tiny(name).config.num_experts_per_tok)


def test_transformers_alone_reads_it(tmp_path):
    model = prune_experts(tiny("qwen2"), tokens(), keep=2, progress=False)
    model.save_pretrained(tmp_path/"m")
    torch.save(logits(model), tmp_path/"logits.pt")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/m")
ids = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(99))
with torch.no_grad(): assert torch.equal(model(ids).logits, torch.load(sys.argv[1] + "/logits.pt"))
assert "compresslab" not in sys.modules
"""
    python(code, tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "qwen2", "list"])
def test_padding_changes_nothing(name):
    """In the first layer, where no attention to padding has mixed anything in."""
    model = tiny(name)
    plain = [dict(input_ids=x) for x in tokens()]
    right = [dict(input_ids=nn.functional.pad(x, (0, 9), value=5), attention_mask=nn.functional.pad(torch.ones_like(x), (0, 9))) for x in tokens()]
    one, two = track_usage(model, plain), track_usage(model, right)
    for column in ("tokens", "share", "probability", "reap"): torch.testing.assert_close(one.of(FIRST, column), two.of(FIRST, column))
    assert one.of(FIRST, "tokens").tolist() == expert_tokens(model, plain)[FIRST].tolist()
    a, b = (prune_experts(copy.deepcopy(model), c, keep=3, progress=False) for c in (plain, right))
    routers = [sites(m)[FIRST].block.get_submodule(sites(m)[FIRST].router).weight for m in (a, b)]
    assert torch.equal(*routers)


def untouched(model, call, match):
    before, config = {n: t.clone() for n, t in model.state_dict().items()}, model.config.to_dict()
    with pytest.raises(ValueError, match=match) as error: call()
    assert "\n" not in str(error.value) and model.config.to_dict() == config
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t.nan_to_num(7), after[n].nan_to_num(7)) for n, t in before.items())


@pytest.mark.parametrize("kw, match", [
    (dict(keep=7), "keep=7: model.layers.0.mlp.experts has only 6 experts"),
    (dict(keep=0), "keep=0 would leave layers without experts"),
    (dict(keep=True), "keep=True would leave"),
    (dict(), "say either keep"),
    (dict(prune_threshold=.95), "would leave model.layers.0.mlp.experts without experts"),
    (dict(keep=3, method="magic"), "method='magic' is not supported"),
    (dict(keep=3, include="nothing"), "no experts to compress")])
@pytest.mark.parametrize("name", ["mixtral", "list"])
def test_bad_input_is_one_line(name, kw, match):
    model = tiny(name)
    untouched(model, lambda: prune_experts(model, tokens(), progress=False, **kw), match)


def test_a_block_that_cannot_be_read_is_named():
    model = tiny("list")
    model.model.layers[1].mlp.experts[0].append(nn.Tanh())
    untouched(model, lambda: prune_experts(model, tokens(), keep=3, merge=True, progress=False), "do not end with a linear layer")
    assert logits(prune_experts(model, tokens(), keep=3, progress=False)).isfinite().all()
    model.model.layers[1].mlp.router = nn.Sequential(nn.Linear(40, 3), nn.Linear(3, 6, bias=False), nn.LayerNorm(6))
    untouched(model, lambda: prune_experts(model, tokens(), keep=2, progress=False), "model.layers.1.mlp.experts: the routing of its Mixture cannot be read")


def test_training_goes_on_after_the_scheduler():
    model = tiny().train()
    model.config.output_router_logits = True
    scheduler = ProgressivePruningScheduler(target_experts=1, prune_epochs=[1, 2], progress=False)
    for epoch, left in enumerate((6, 4, 1)):
        assert scheduler.step_epoch(model, epoch, tokens()) == (epoch > 0) and model.training
        assert model.config.num_local_experts == model.num_experts == left and model.num_experts_per_tok == min(2, left)
        loss = model(tokens()[0], labels=tokens()[0], output_router_logits=True).loss       # with the balancing loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_pruned_then_packed(tmp_path):
    """Experts fewer, then in 4 bits: smaller on disk each time, and measured from the file."""
    model = tiny()
    sizes = [stored_bytes(save(model, tmp_path/"whole"))]
    prune_experts(model, tokens(), keep=3, progress=False)
    sizes.append(stored_bytes(save(model, tmp_path/"pruned")))
    quantize_experts(model, tokens(), unreached="quantize", progress=False)
    sizes.append(stored_bytes(save(model, tmp_path/"packed")))
    assert sizes[0] > sizes[1] > sizes[2] and measure(tmp_path/"packed", on=None, timing=False, progress=False).params == params(model)
    with pytest.raises(ValueError, match="no experts to compress"): prune_experts(model, tokens(), keep=2)
