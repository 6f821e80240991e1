"""BK-Core against dense inverses at length, what it costs to remember, and the pipeline on a real model and real text."""
import copy

import pytest
import torch

import compresslab as cl
from compresslab.blocks import pack
from compresslab.data import documents
from compresslab.resnetbk.core import bk_core
from compresslab.resnetbk.model import ResNetBKCache, ResNetBKConfig, ResNetBKForCausalLM
from compresslab.store import find_tokenizer, stored_bytes
from compresslab.train import evaluate, fit


@pytest.mark.parametrize("imag", [.1, 1.])
def test_a_long_sequence_equals_the_dense_inverse(imag):
    torch.manual_seed(0)
    n, a = 2048, 2*torch.randn(2048)
    b, c = torch.rand(n - 1) + .2, torch.rand(n - 1) + .2
    T = torch.diag(a.to(torch.complex128)) + torch.diag(b.to(torch.complex128), 1) + torch.diag(c.to(torch.complex128), -1) - imag*1j*torch.eye(n, dtype=torch.complex128)
    exact = torch.linalg.inv(T).diagonal()
    for method in ("sequential", "scan"):
        got = bk_core(a, imag*1j, b, c, causal=False, method=method)
        assert got.dtype == torch.complex64 and ((got - exact).abs()/exact.abs()).max() < 1e-5
    one, two = (bk_core(a, imag*1j, b, c, method=m) for m in ("sequential", "scan"))
    assert ((one - two).abs()/one.abs()).max() < 1e-5
    assert abs(one[-1] - torch.linalg.solve(T, torch.eye(n, dtype=T.dtype)[:, -1])[-1]) < 1e-5*abs(one[-1])       # the last causal value is the last of the whole


def test_gradients_of_a_long_sequence_equal_those_of_the_dense_inverse():
    torch.manual_seed(0)
    n = 300
    a, b, c = torch.randn(n, dtype=torch.float64), torch.rand(n - 1, dtype=torch.float64) + .2, torch.rand(n - 1, dtype=torch.float64) + .2
    z, up = torch.tensor(.2 + .05j, dtype=torch.complex128), torch.randn(n, dtype=torch.complex128)
    def grads(f): leaves = [t.clone().requires_grad_() for t in (a, b, c, z)]; (f(*leaves)*up).real.sum().backward(); return [t.grad for t in leaves]
    dense = lambda a, b, c, z: torch.linalg.inv(torch.diag(a).to(torch.complex128) + torch.diag(b, 1) + torch.diag(c, -1) - z*torch.eye(n, dtype=torch.complex128)).diagonal()
    for method in ("sequential", "scan"):
        for got, want in zip(grads(lambda a, b, c, z: bk_core(a, z, b, c, causal=False, method=method)), grads(dense)): assert torch.allclose(got, want, rtol=1e-6, atol=1e-8)


def test_memory_does_not_grow_with_the_text():
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(ResNetBKConfig(vocab_size=64, d_model=16, n_layers=2, num_experts=2)).eval()
    size = lambda cache: sum(layer.recurrent_states[0].nbytes for layer in cache.layers)
    ids = torch.randint(64, (1, 5000))
    with torch.no_grad():
        short, long = model(ids[:, :10], use_cache=True), model(ids, use_cache=True)
        cache = ResNetBKCache(2)
        for piece in ids.split(700, 1): out = model(piece, past_key_values=cache)
    assert size(short.past_key_values) == size(long.past_key_values) == size(cache)
    assert torch.allclose(out.logits[:, -1], long.logits[:, -1], atol=1e-4)


def test_a_fresh_process_knows_the_class(tmp_path):
    import subprocess, sys
    torch.manual_seed(0)
    cl.save(ResNetBKForCausalLM(ResNetBKConfig(vocab_size=64, d_model=16, n_layers=2)), tmp_path/"m")
    said = subprocess.run([sys.executable, "-c", f"import compresslab, transformers; print(type(transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path/'m')!r})).__name__)"], capture_output=True, text=True)
    assert said.stdout.strip().endswith("ResNetBKForCausalLM"), said.stderr


@pytest.mark.slow
def test_the_pipeline_on_a_real_llama(stories260k, tmp_path):
    model, tokenizer, texts = stories260k
    before = copy.deepcopy(model.state_dict())
    train, valid = (pack(documents(str(texts/n)), tokenizer, 128, max_tokens=m) for n, m in (("train.txt", 60_000), ("valid.txt", 4000)))
    small, metrics = cl.CompressionPipeline(model, target_compression=12, optimizer="adamw", lr=.003, stage_lr=.001).run_pipeline(train, valid, .5, 1, 1, save_dir=tmp_path/"run", progress=False)
    stages = metrics["stage_metrics"]
    assert metrics["compression_achieved"] and metrics["compression_ratio"] == stored_bytes(tmp_path/"run"/"original_model")/stored_bytes(tmp_path/"run"/"final_model")
    assert stages["qat"]["final_perplexity"] < 1.2*metrics["original_perplexity"] and stages["qat"]["bytes"] < stored_bytes(tmp_path/"run"/"original_model")/6
    uniform = tokenizer.vocab_size
    assert metrics["original_perplexity"] < stages["distillation"]["final_perplexity"] < uniform/3                 # it has kept something
    assert evaluate(small, valid, progress=False).ppl == pytest.approx(stages["distillation"]["final_perplexity"], rel=1e-6)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_a_trained_model_reads_code_and_is_causal(pylm):
    tokenizer = find_tokenizer(str(pylm))
    blocks = pack(documents("python-stdlib:train").shuffle(seed=0), tokenizer, 64, max_tokens=60_000)
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(ResNetBKConfig(vocab_size=len(tokenizer), n_layers=2, num_experts=2, d_ff=128))
    history = fit(model, blocks, tokens=60_000, batch_size=8, lr=.02, optimizer="muon", precision="no", progress=False)
    assert sum(h["loss"] for h in history[-10:])/10 < 7.3 < history[0]["loss"]
    ids = blocks.input_ids[:2]
    with torch.no_grad():
        base = model(ids).logits
        for j in (1, 17, 40, 63):
            other = ids.clone(); other[:, j] = (other[:, j] + 1) % len(tokenizer)
            assert torch.equal(model(other).logits[:, :j], base[:, :j])
