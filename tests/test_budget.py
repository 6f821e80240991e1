"""Plans against the files that result: presets on three architectures, real text, the command line."""
import copy

import pytest
import torch
import yaml
from forked import command
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from compresslab.budget import plan
from compresslab.distillation.students import config_values, kept_layers, kept_units
from compresslab.lowrank.embedding import vocabulary_groups
from compresslab.lowrank.linear import put_factors
from compresslab.quant.ptq import rtn
from compresslab.quant.qat import convert, prepare_qat
from compresslab.quant.rate import coded_layers, prepare_coded, room_for, settle
from compresslab.recipe import Recipe
from compresslab.resizing import changed_twin
from compresslab.store import save, stored_bytes
from compresslab.surgery import matrix

torch.set_num_threads(1)
SIZES = { # Large enough that a ten-thousandth is above the floor
    "Llama": lambda d, n: LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=d, intermediate_size=4*d, num_hidden_layers=n, num_attention_heads=d//32, num_key_value_heads=d//64, max_position_embeddings=256)),
    "GPT2": lambda d, n: GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=d, n_layer=n, n_head=d//32, n_positions=256)),
    "T5": lambda d, n: T5ForConditionalGeneration(T5Config(vocab_size=4096, d_model=d, d_kv=32, d_ff=4*d, num_layers=n, num_heads=d//32))}


def built(twin, found):
    """What a plan's stages would leave, with random weights: each room's own functions, without data and training."""
    torch.manual_seed(0)
    settings = dict(found.stages)
    if "distillation.student" in settings:
        shape = dict(settings["distillation.student"])
        kept, units = kept_layers(twin, shape.pop("layers")), kept_units(twin, **shape)
        config = changed_twin(twin, *config_values(twin, kept, units)).config
    else: config = copy.deepcopy(twin.config)
    model = type(twin)(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.02*torch.randn_like(p))
    if "lowrank.embedding" in settings:
        for names in vocabulary_groups(model).values():
            rows, cols = matrix(model.get_submodule(names[0])).shape; r = settings["lowrank.embedding"]["rank"]
            put_factors(model, names, torch.randn(rows, r), torch.randn(r, cols))
    if "quant.coded" in settings:
        bits = settings["quant.coded"]["bits"]; prepare_coded(model, bits)
        model = convert(settle(model, sum(room_for(m.weight.shape, bits) for m in coded_layers(model).values())))
    elif "quant.qat" in settings: model = convert(prepare_qat(model, **{k: v for k, v in settings["quant.qat"].items() if k not in ("tokens", "hard", "optimizer", "lr", "batch_size")}))
    else: rtn(model, progress=False, **settings["quant.gptq"])
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("ratio, width, layers", [(5, 128, 2), (10, 192, 3), (100, 256, 4), *(pytest.param(*large, marks=pytest.mark.slow) for large in ((1000, 512, 6), (10_000, 1024, 8)))])
@pytest.mark.parametrize("family", SIZES)
def test_presets_leave_the_file_that_was_predicted(family, ratio, width, layers, tmp_path):
    with torch.device("meta"): teacher = SIZES[family](width, layers)
    found = plan(teacher, ratio)
    real = stored_bytes(save(built(teacher, found), tmp_path/"m", entropy=found.entropy))
    assert abs(found.predicted/real - 1) < .02 and found.original_bytes/real >= ratio, (found, real)
    coded = plan(teacher, ratio, entropy=True)
    real = stored_bytes(save(built(teacher, coded), tmp_path/"n", entropy=True))
    assert real <= coded.budget and (coded.stages[-1][0] == "quant.gptq" or abs(coded.predicted/real - 1) < .02), (coded, real)     # what has no price is only bounded


@pytest.mark.slow
def test_a_real_model_reaches_what_was_planned(pylm, tmp_path):
    found = plan(pylm, 100, tokens=2000, entropy=True)
    run = found.recipe(data=dict(text="python-stdlib", length=64, train_tokens=4000, valid_tokens=500, test_tokens=500), logging=dict(progress=False)).run(out=tmp_path/"run", device="cpu", progress=False)
    assert 1 <= found.predicted/run.summary["final_bytes"] < 1.02 and run.summary["bytes_ratio"] >= 100 and run.summary["targets"][0]["met"]


def test_the_command(tiny, tmp_path):
    done = command("plan", tiny, "--ratio", "4", "--out", tmp_path/"r.yaml")
    assert done.returncode == 0 and "bytes predicted" in done.stdout, done.stderr
    assert Recipe.from_yaml(tmp_path/"r.yaml").target["bytes"] == int(stored_bytes(tiny)/4) and yaml.safe_load((tmp_path/"r.yaml").read_text())["model"] == str(tiny)
    for wrong, words in ((["--ratio", "100000"], "cannot be met: the smallest LlamaForCausalLM"), ([], "give one of ratio and bytes"), (["--ratio", "4", "--out", str(tiny)], "is a folder")):
        failed = command("plan", tiny, *wrong)
        assert failed.returncode == 1 and words in failed.stderr and "Traceback" not in failed.stderr, failed.stderr
