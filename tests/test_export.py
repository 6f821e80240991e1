"""Exports that plain transformers reads in a process without compresslab."""
import copy
import json
import warnings

import pytest
import torch
from forked import python
from safetensors.torch import load_file

import compresslab as cl
from compresslab.quant.linear import PackedEmbedding, PackedLinear
from compresslab.interchange import export, pack_words
from compresslab.store import find_tokenizer, stored_bytes
from compresslab.surgery import replace

pytest.importorskip("compressed_tensors", reason="compressed-tensors reads the exports: pip install compressed-tensors")

READER = """
import sys, torch, transformers
auto, ids, out, *folders = sys.argv[1:]
ids, logits = torch.load(ids), []
for folder in folders:
    model = getattr(transformers, auto).from_pretrained(folder)
    extra = dict(decoder_input_ids=ids) if model.config.is_encoder_decoder else {}
    with torch.no_grad(): logits.append(model(ids, **extra).logits)
assert "compresslab" not in sys.modules
torch.save(logits, out)
"""


@pytest.fixture
def read(tmp_path):
    """A function: the logits of folders, by plain transformers in a fresh process."""
    def get(ids, *folders, auto="AutoModelForCausalLM"):
        torch.save(ids, tmp_path/"ids.pt")
        python(READER, auto, tmp_path/"ids.pt", tmp_path/"logits.pt", *folders)
        return torch.load(tmp_path/"logits.pt")
    return get


def logits(model, ids):
    extra = dict(decoder_input_ids=ids) if model.config.is_encoder_decoder else {}
    with torch.no_grad(): return model(ids, **extra).logits


def dense(model):
    """A copy with plain layers in the place of packed ones: what a reader must compute, bit for bit."""
    model = copy.deepcopy(model)
    for name, m in [*model.named_modules()]:
        if not isinstance(m, (PackedLinear, PackedEmbedding)): continue
        new = torch.nn.Embedding(*m.weight.shape) if isinstance(m, PackedEmbedding) else torch.nn.Linear(*m.weight.shape[::-1], bias=m.bias is not None)
        new.weight.data = m.weight.dequantize().to(model.dtype)
        if getattr(m, "bias", None) is not None: new.bias = m.bias
        replace(model, name, new)
    return model


def check(model, vocab, there, n=30):
    """Equal to the dense copy; near the packed model, whose kernels round activations to 16 bits."""
    assert torch.equal(logits(dense(model), ids(n, vocab)), there)
    assert (logits(model, ids(n, vocab)) - there).abs().max() < 1e-3*there.abs().max()


def ids(n, vocab=250): return torch.randint(0, vocab, (2, n), generator=torch.Generator().manual_seed(0))


def quietly(*args, **kw):
    """`export`, and the text of its warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return export(*args, progress=False, **kw), " ".join(str(w.message) for w in said)


def by_hand(folder, name, args):
    """A layer's weight from the file: the package's unpacking and the formula."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    t = {k.removeprefix(f"{name}.weight_"): v for k, v in load_file(folder/"model.safetensors").items() if k.startswith(f"{name}.weight_")}
    rows, cols = t["shape"].tolist()
    spread = lambda x: x.float().repeat_interleave(args["group_size"] or cols, 1)
    z = 0 if args["symmetric"] else spread(unpack_from_int32(t["zero_point"], args["num_bits"], (rows, t["scale"].shape[1]), packed_dim=0))
    return (unpack_from_int32(t["packed"], args["num_bits"], (rows, cols)).float() - z)*spread(t["scale"])


def test_words_are_those_of_the_package():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    for bits in (4, 8):
        for cols in (1, 7, 8, 33, 172):
            codes = torch.randint(0, 2**bits, (5, cols))
            assert torch.equal(pack_words(codes, bits), pack_to_int32((codes - 2**(bits - 1)).to(torch.int8), bits))


def test_every_grid_gives_equal_weights_and_logits(tiny, tmp_path, read):
    """W4A16 and W8A16, symmetric or not, groups of 4 and 8 and whole rows; rows of 40 and 72 do not fill whole words of 8 groups."""
    kinds = [(bits, size, symmetric) for bits in (4, 8) for size in (4, 8, 0) for symmetric in (True, False)]
    models, folders = [], []
    for bits, size, symmetric in kinds:
        model = cl.rtn(cl.load(tiny), bits, size, symmetric, progress=False)
        folder, said = quietly(model, folder=tmp_path/f"{bits}-{size}-{symmetric}")
        (group,) = json.loads((folder/"config.json").read_text())["quantization_config"]["config_groups"].values()
        assert not said and group["weights"]["num_bits"] == bits and group["weights"]["strategy"] == ("group" if size else "channel")
        for name, m in model.named_modules():
            if isinstance(m, PackedLinear): assert torch.equal(by_hand(folder, name, group["weights"]), m.weight.dequantize())
        models.append(model); folders.append(folder)
    for model, there in zip(models, read(ids(30), *folders)): check(model, 250, there)


def test_the_bundled_model_in_bfloat16(pylm, tmp_path, read):
    """Default: float32, equal to compresslab in float32. In 16 bits: the arithmetic's noise, in fewer bytes."""
    cl.save(cl.rtn(cl.load(pylm), 4, progress=False), tmp_path/"m")
    exact, there = export(tmp_path/"m", "compressed-tensors", progress=False), ids(60, 4096)
    assert exact == tmp_path/"m-compressed-tensors" and find_tokenizer(str(exact)) is not None
    half = export(tmp_path/"m", folder=tmp_path/"half", dtype=torch.float16, progress=False)
    a, b = read(there, exact, half)
    mine = logits(dense(cl.load(tmp_path/"m", dtype=torch.float32)), there)
    assert a.dtype == torch.float32 and torch.equal(a, mine)
    assert (logits(cl.load(tmp_path/"m", dtype=torch.float32), there) - a).abs().max() < 1e-3*a.abs().max()
    assert b.dtype == torch.float16 and 0 < (b - mine).abs().max() < .1
    assert stored_bytes(half) < 1.01*stored_bytes(tmp_path/"m") < stored_bytes(exact) < 1.1*stored_bytes(tmp_path/"m")


@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16])
def test_which_dtype_config_names(tiny, tmp_path, scale):
    """The model's own where it holds the scales exactly."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model = cl.rtn(cl.load(tiny, dtype=dtype), 4, 8, True, progress=False)
        for m in model.modules():
            if isinstance(m, PackedLinear): m.weight.scale = m.weight.scale.to(torch.bfloat16).to(scale)       # exact in both, but stored in one
        for m in model.modules():
            if isinstance(m, PackedLinear) and scale == torch.float16: m.weight.scale[0, 0] = 1 + 2**-10        # not a bfloat16
            elif isinstance(m, PackedLinear): m.weight.scale[0, 0] = 2.**20                                     # not a float16
        named = json.loads((export(model, folder=tmp_path/"m", progress=False)/"config.json").read_text())["dtype"]
        assert named == ("float32" if dtype != scale else str(dtype)[6:])


def test_a_model_in_sixteen_bits_reads_the_same(tiny, tmp_path, read):
    """float16 scales in a float16 model: one rounding of the weights on both sides."""
    models = [cl.rtn(cl.load(tiny, dtype=torch.float16), bits, 8, symmetric, progress=False) for bits, symmetric in ((4, True), (4, False), (8, False))]
    folders = [export(m, folder=tmp_path/str(i), progress=False) for i, m in enumerate(models)]
    for model, there in zip(models, read(ids(30), *folders)):
        assert there.dtype == torch.float16 and torch.equal(there, logits(dense(model), ids(30)))


def test_mixed_bits_biases_and_tied_or_untied_embeddings(tmp_path, read):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    def qwen(tied):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)).eval()
        for m in model.modules():
            if getattr(m, "bias", None) is not None: torch.nn.init.normal_(m.bias)
        return model
    mixed = cl.rtn(cl.rtn(qwen(True), 8, 32, True, include="down_proj|q_proj", progress=False), 4, 16, True, include="gate_proj|up_proj", progress=False)
    tied, untied = (cl.rtn(qwen(t), 4, 32, embeddings=True, progress=False) for t in (True, False))
    made = [quietly(m, folder=tmp_path/str(i)) for i, m in enumerate((mixed, tied, untied))]
    assert [bool(said) for _, said in made] == [False, True, True] and f"model.embed_tokens.weight ({96*64*4:,} bytes" in made[1][1]
    for model, there in zip((mixed, tied, untied), read(ids(30, 96), *(f for f, _ in made))): check(model, 96, there)
    names = [set(load_file(f/"model.safetensors")) for f, _ in made]
    assert "lm_head.weight" not in names[1] and "lm_head.weight_packed" not in names[1] and "lm_head.weight_packed" in names[2]
    config = json.loads((made[0][0]/"config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2 and "model.layers.0.self_attn.k_proj" in config["ignore"] and "dequantize" not in config


def test_an_encoder_decoder_with_three_ties(tmp_path, read):
    from transformers import T5Config, T5ForConditionalGeneration
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, tie_word_embeddings=True)).eval()
    folder, said = quietly(cl.rtn(model, 8, 32, embeddings=True, progress=False), folder=tmp_path/"t5")
    assert "shared.weight" in said
    (there,) = read(ids(12, 96), folder, auto="AutoModelForSeq2SeqLM")
    check(model, 96, there, 12)


def test_stories_whose_width_32_does_not_divide(shared, tmp_path, read):
    path, there = shared("models/stories260k"), ids(40, 512)
    model = cl.rtn(cl.load(path), 4, 32, True, progress=False)
    with pytest.raises(ValueError, match="down_proj: its 172 columns in groups of 32 leave a shorter last group.*group_size that divides.*unpack=True"):
        export(model, folder=tmp_path/"no")
    assert not [*tmp_path.glob("no*")]
    models = [cl.rtn(cl.load(path), 4, 4, progress=False), cl.rtn(cl.load(path), 8, 0, progress=False), model]
    folders = [export(models[0], folder=tmp_path/"four", progress=False), export(models[1], folder=tmp_path/"row", progress=False)]
    folder, said = quietly(model, folder=tmp_path/"floats", unpack=True)
    assert "down_proj" in said and "q_proj" not in said
    for model, out in zip(models, read(there, *folders, folder)): check(model, 512, out, 40)


def test_refusals_are_one_line_and_write_nothing(tiny, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    gpt2 = cl.rtn(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)), 4, 32, progress=False)
    two = cl.rtn(cl.rtn(cl.load(tiny), 8, 8, include="down_proj", progress=False), 4, 8, progress=False)
    between = cl.rtn(cl.load(tiny), 4, 8, progress=False)
    between.model.layers[0].self_attn.q_proj.weight.zeros = lambda: torch.full((40, 5), 7.5)
    for model, kw, message in [(between, {}, "q_proj: its zero points are not all codes of its grid"),
                               (cl.rtn(cl.load(tiny), 3, 8, progress=False), {}, "q_proj: vLLM reads 4 and 8 bits, not 3"),
                               (gpt2, {}, "c_attn: compressed-tensors packs linear layers, not a Conv1D"),
                               (two, {}, "differ in bits, group_size or symmetry"),
                               (cl.load(tiny), {}, "no layer of this model can be written packed"),
                               (two, dict(format="gguf"), "cannot write 'gguf'"),
                               (two, dict(folder=None), "say where"),
                               ("no/such/model", dict(folder=tmp_path/"x"), "was not found")]:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as e: export(model, **dict(dict(folder=tmp_path/"x"), **kw))
        assert "\n" not in str(e.value)
    assert not [*tmp_path.iterdir()]


def test_int8_activations_stay_here_and_that_is_said(tiny, tmp_path):
    model = cl.rtn(cl.load(tiny), 8, 8, True, progress=False)
    model.model.layers[0].mlp.up_proj.activations = "int8"
    _, said = quietly(model, folder=tmp_path/"m")
    assert "model.layers.0.mlp.up_proj with float activations, this model with int8" in said


def test_an_export_after_a_forward_pass_is_the_same(tiny, tmp_path):
    """Kernels may have put the buffers into their own order by then."""
    model = cl.rtn(cl.load(tiny), 4, 8, embeddings=True, progress=False)
    before, _ = quietly(model, folder=tmp_path/"before")
    logits(model, ids(30))
    after, _ = quietly(model, folder=tmp_path/"after")
    assert (before/"model.safetensors").read_bytes() == (after/"model.safetensors").read_bytes()


def test_folders_are_as_safe_as_with_save(tiny, tmp_path):
    model = cl.rtn(cl.load(tiny), 4, 8, True, progress=False)
    mine = tmp_path/"mine"; mine.mkdir(); (mine/"thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="compresslab did not write it"): export(model, folder=mine)
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]
    folder = export(model, folder=tmp_path/"m", progress=False)
    (folder/"NOTES.md").write_text("mine")
    export(cl.rtn(cl.load(tiny), 8, 8, True, progress=False), folder=folder, progress=False)
    assert (folder/"NOTES.md").read_text() == "mine" and '"num_bits": 8' in (folder/"config.json").read_text()
    code = f"""
import resource, signal, compresslab as cl
from compresslab.interchange import export
model = cl.rtn(cl.load({str(tiny)!r}), 4, 8, True, progress=False)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try: export(model, folder={str(folder)!r}, progress=False)
except OSError as e: print("ONE LINE:", e)
"""
    said = python(code)
    assert "ONE LINE:" in said and "what was there is untouched" in said, said
    assert '"num_bits": 8' in (folder/"config.json").read_text() and sorted(p.name for p in tmp_path.iterdir()) == ["m", "mine"]
    weights = folder/"model.safetensors"; data = bytearray(weights.read_bytes()); data[-1] ^= 255; weights.write_bytes(data)
    with pytest.raises(ValueError, match="was changed after it was written"): cl.load(folder)


def test_sharded_and_generating(tiny, tmp_path):
    """The reader's own greedy text is ours."""
    model = cl.rtn(cl.load(tiny), 4, 8, progress=False)
    folder = export(model, folder=tmp_path/"m", max_shard_size="20KB", progress=False)
    assert len([*folder.glob("model-*.safetensors")]) > 1
    code = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained({str(folder)!r}), AutoTokenizer.from_pretrained({str(folder)!r})
print("TEXT", model.generate(**tokenizer("def f(x):", return_tensors="pt"), max_new_tokens=12, do_sample=False)[0].tolist())
assert "compresslab" not in sys.modules
"""
    said = python(code)
    mine = model.generate(**find_tokenizer(str(folder))("def f(x):", return_tensors="pt"), max_new_tokens=12, do_sample=False)[0].tolist()
    assert f"TEXT {mine}" in said, said
