"""Dendrites on real and odd models, and a run that is killed from outside."""
import copy
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from compresslab.pai.dendrites import add_dendrites, drop_dendrites, finalize, growth, n_dendrites, perforate, perforated
from compresslab.pai.tracker import DendriteSettings, DendriteTracker, fit_with_dendrites
from compresslab.quant.ptq import gptq
from compresslab.resnetbk.model import ResNetBKConfig, ResNetBKForCausalLM
from compresslab.store import load, save
from compresslab.surgery import params

IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def make(kind):
    torch.manual_seed(0)
    t5 = dict(vocab_size=64, d_model=40, d_kv=10, d_ff=52, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=.1)
    if kind == "llama": model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=40, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, head_dim=10, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True))
    if kind == "gpt2": model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=40, n_layer=2, n_head=4, n_positions=64))
    if kind == "t5": model = T5ForConditionalGeneration(T5Config(**t5))
    if kind == "gated": model = T5ForConditionalGeneration(T5Config(**t5, feed_forward_proj="gated-gelu"))
    if kind == "resnetbk": model = ResNetBKForCausalLM(ResNetBKConfig(vocab_size=64, d_model=24, n_layers=4, n_groups=2, n_seq=32, num_experts=2))
    return model.eval()


def logits(model):
    with torch.no_grad(): return model(IDS, **(dict(labels=IDS) if model.config.is_encoder_decoder else {})).logits


def shake(model, seed):
    for p in model.parameters(): p.data += .05*torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)


KINDS = ("llama", "gpt2", "t5", "gated", "resnetbk")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_growing_changes_no_bit_and_every_file_brings_the_model_back(kind, dtype, tmp_path):
    make(kind).save_pretrained(tmp_path/"base")
    model = type(make(kind)).from_pretrained(tmp_path/"base", dtype=dtype).eval()                      # rotary frequencies stay in float32, as they will
    out, before = logits(model), params(model)
    perforate(model)
    for n in (1, 2):
        expected = growth(model)
        add_dendrites(model, seed=n)
        assert torch.equal(logits(model), out) and params(model) - before == expected
        shake(model, n)
        before, out = params(model), logits(model)
        save(model, tmp_path/f"raw{n}")
        plain = finalize(copy.deepcopy(model))
        plain.save_pretrained(tmp_path/f"plain{n}")
        text = model.generate(IDS[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
        for other in (plain, load(tmp_path/f"raw{n}"), load(tmp_path/f"plain{n}"), type(model).from_pretrained(tmp_path/f"plain{n}", dtype=dtype)):
            assert torch.equal(logits(other), out) and n_dendrites(other) == n
            assert torch.equal(other.generate(IDS[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0), text)


def test_forced_ties_of_t5_stay_tied_and_never_get_dendrites():
    model = add_dendrites(perforate(make("t5")))
    assert model.shared.weight is model.lm_head.weight is model.encoder.embed_tokens.weight
    assert not {"shared", "lm_head"} & {n.rpartition(".")[2] for n in perforated(model)}
    assert len(perforated(model)) == 2*6 + 2*10


def test_layers_that_share_a_weight_are_left_alone():
    model = make("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    assert not [n for n in perforated(perforate(model)) if "up_proj" in n]


def test_quantizing_a_model_with_dendrites(tmp_path):
    model = add_dendrites(perforate(make("llama")))
    shake(model, 0)
    before = logits(model)
    gptq(model, [IDS], bits=8, group_size=8, progress=False)
    assert type(model.model.layers[0].mlp.up_proj.main).__name__ == type(model.model.layers[0].mlp.up_proj.dendrites["0"].up).__name__ == "PackedLinear"
    assert torch.equal(logits(load(save(model, tmp_path/"m"))), logits(model)) and (logits(model) - before).abs().max() < .2*before.abs().max()
    with pytest.raises(ValueError, match="not serializable"): finalize(model).save_pretrained(tmp_path/"plain")
    assert torch.equal(logits(load(save(model, tmp_path/"again"))), logits(model))


def pairs(n=48):
    ids = torch.randint(1, 64, (n, 12), generator=torch.Generator().manual_seed(1))
    return [dict(input_ids=x, labels=x.flip(0)) for x in ids]


@pytest.mark.parametrize("precision", ("no", "bf16"))
def test_t5_trains_through_dendrite_phases_under_gradient_checkpointing(precision, tmp_path):
    model = perforate(make("gated"))
    model.activation_checkpointing_enable()
    frozen = {}
    def look(model, history):
        if tracker_phase(tmp_path) == "dendrites": frozen.setdefault(len(history), copy.deepcopy({n: p for n, p in model.named_parameters() if ".dendrites." not in n}))
    def tracker_phase(folder): return json.loads((folder/"run"/"tracker.json").read_text())["state"]["phase"]
    run = fit_with_dendrites(model, pairs(), pairs(16), tmp_path/"run", epochs=6, batch_size=16, lr=5e-3, progress=False, precision=precision, on_step=look,
                             settings=DendriteSettings("fixed", 2, p_epochs_to_switch=2, max_dendrites=1))
    assert [r["phase"][0] for r in run.records] == list("nnddnn") and n_dendrites(model) == run.state.best_dendrites
    first, *others = frozen.values()
    assert others and all(torch.equal(p, other[n]) for other in others for n, p in first.items())      # the neurons did not move
    steps = [r["loss"] for r in run.records]
    assert steps[-1] < steps[0]


def killable(folder, slow=0.):
    return fit_with_dendrites(perforate(make("t5")), pairs(), pairs(16), folder, epochs=7, batch_size=8, lr=5e-3, progress=False, on_step=lambda m, h: time.sleep(slow),
                              settings=DendriteSettings("fixed", 2, p_epochs_to_switch=3, max_dendrites=1))


def test_a_kill_from_outside_in_a_dendrite_phase_costs_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); from test_pai import killable; killable({str(tmp_path/'cut')!r}, .3)"
    cut, tracker = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads())), stderr=subprocess.PIPE), tmp_path/"cut"/"tracker.json"
    for _ in range(2400):
        time.sleep(.05)
        if cut.poll() is not None: pytest.fail(cut.stderr.read().decode()[-2000:])
        state = json.loads(tracker.read_text())["state"] if tracker.exists() else {}
        if state.get("phase") == "dendrites" and state["epoch"] == 3: break
    time.sleep(.7)                                                                # within the second epoch of three
    cut.send_signal(signal.SIGKILL); cut.wait()
    assert json.loads(tracker.read_text())["state"]["phase"] == "dendrites"
    straight, again = killable(tmp_path/"straight"), killable(tmp_path/"cut")
    a, b = straight.model.state_dict(), again.model.state_dict()
    assert straight.records == again.records and a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def test_pylm_grows_and_is_weighed(pylm, tmp_path):
    from compresslab.store import stored_bytes
    model = load(pylm)
    before = stored_bytes(save(model, tmp_path/"before"))
    perforate(model, include="mlp", rank=8)
    more = growth(model)
    add_dendrites(model)
    for layer in perforated(model).values(): layer.dendrites["0"].to_neuron.data.normal_()           # zeros would be stored as such
    after = stored_bytes(save(finalize(model), tmp_path/"after"))
    each = next(model.parameters()).element_size()
    assert 0 < after - before - more*each < 300*len(model.state_dict())            # the numbers, and a header


def test_dropping_returns_to_the_plain_model():
    model = make("gpt2"); out = logits(model); names = [*model.state_dict()]
    finalize(drop_dendrites(add_dendrites(perforate(model), 2), 2))
    assert [*model.state_dict()] == names and torch.equal(logits(model), out) and not hasattr(model, "hf_quantizer")


def test_a_tracker_in_a_loop_of_ones_own(tmp_path):
    model = perforate(make("llama"))
    tracker = DendriteTracker(model, tmp_path/"run", DendriteSettings(n_epochs_to_switch=1, max_dendrites=1))
    batch, made = dict(input_ids=IDS, labels=IDS), 0
    while not tracker.state.done and tracker.state.epoch < 30:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2); made += 1
        while True:
            for _ in range(5): optimizer.zero_grad(); model(**batch).loss.backward(); optimizer.step()
            with torch.no_grad(): verdict = tracker.add_validation_score(model(IDS.flip(0), labels=IDS.flip(0)).loss.item())
            if verdict.restructured or tracker.state.epoch >= 30: break
    assert made == tracker.state.stage + (not tracker.state.done) or tracker.state.done
    with torch.no_grad(): assert model(IDS.flip(0), labels=IDS.flip(0)).loss.item() == pytest.approx(tracker.state.best, rel=1e-5) or not tracker.state.done


def test_a_fresh_process_reads_a_finalized_folder_by_transformers_alone(tmp_path):
    model = add_dendrites(perforate(make("llama"))); shake(model, 0)
    finalize(model).save_pretrained(tmp_path/"m")
    code = ("import compresslab, torch; from transformers import AutoModelForCausalLM; m = AutoModelForCausalLM.from_pretrained('m').eval(); ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0)); "
            "torch.save(m(ids).logits.detach(), 'logits.pt')")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()), PYTHONPATH=os.pathsep.join(sys.path)), check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path/"logits.pt"), logits(model))
