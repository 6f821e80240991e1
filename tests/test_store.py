"""Files: fresh processes, generation, sizes, and a disk that refuses."""
import json

import pytest
import torch
from forked import python

import compresslab as cl
from compresslab.quant.grid import grid_bytes
from compresslab.quant.linear import PackedEmbedding, PackedLinear
from compresslab.store import find_tokenizer, stored_bytes

FRESH = """
import sys, torch, compresslab
from transformers import AutoModelForCausalLM
folder, ids, out, how = sys.argv[1:]
model = compresslab.load(folder) if how == "load" else AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad(): torch.save(model(torch.load(ids)).logits, out)
"""


@pytest.mark.parametrize("how", ["load", "from_pretrained"])
@pytest.mark.parametrize("bits", [3, 4])
def test_logits_in_a_fresh_process_are_equal_bit_for_bit(pylm, tmp_path, how, bits):
    model = cl.rtn(cl.load(pylm), bits, embeddings=True, progress=False)
    ids = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): here = model(ids).logits
    cl.save(model, tmp_path/"m")
    torch.save(ids, tmp_path/"ids.pt")
    python(FRESH, tmp_path/"m", tmp_path/"ids.pt", tmp_path/"logits.pt", how)
    assert torch.equal(here, torch.load(tmp_path/"logits.pt"))


def test_bytes_are_the_formula_and_the_promise(pylm, tmp_path):
    model = cl.rtn(cl.load(pylm), 4, embeddings=True, progress=False)
    cl.save(model, tmp_path/"m")
    packed = {p.weight: None for p in model.modules() if isinstance(p, (PackedLinear, PackedEmbedding))}
    formula = sum(grid_bytes(*w.shape, 4, 32) for w in packed) + sum(p.nbytes for p in model.parameters())
    stored, params = stored_bytes(tmp_path/"m"), sum(p.numel() for p in cl.load(pylm).parameters())
    assert abs(stored/formula - 1) < .01
    assert 4*params/stored >= 6.4 and stored_bytes(pylm)/stored >= 3.2


def test_generation_after_load_with_padding(pylm, tmp_path):
    model = cl.rtn(cl.load(pylm), 4, progress=False)
    again = cl.load(cl.save(model, tmp_path/"m"))
    tokenizer = find_tokenizer(str(tmp_path/"m"))
    tokenizer.padding_side = "left"
    batch = tokenizer(["import os\n", "def factorial(n):\n    if n =="], return_tensors="pt", padding=True)
    a, b = (m.generate(**batch, max_new_tokens=12, do_sample=False) for m in (model, again))
    assert torch.equal(a, b) and a.shape[1] == batch["input_ids"].shape[1] + 12
    exact = cl.load(tmp_path/"m", dtype=torch.float32)      # in float32 padding must not matter at all
    assert exact.dtype == torch.float32 and exact.model.layers[0].mlp.up_proj.weight.scale.dtype == torch.float16
    together = exact(**batch).logits[0, -1]
    alone = exact(**tokenizer("import os\n", return_tensors="pt")).logits[0, -1]
    assert (batch["attention_mask"][0] == 0).any() and torch.allclose(together, alone, atol=1e-3)


def test_a_disk_that_refuses_leaves_the_old_folder_whole(tiny, tmp_path):
    """A real write error: the process may write files of a few kilobytes only."""
    cl.save(cl.rtn(cl.load(tiny), 4, progress=False), tmp_path/"m")
    before = {p.name: p.read_bytes() for p in (tmp_path/"m").iterdir()}
    code = f"""
import resource, signal, compresslab as cl
model = cl.load({str(tiny)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try: cl.save(model, {str(tmp_path/'m')!r})
except OSError as e: print("ONE LINE:", e)
"""
    said = python(code)
    assert "ONE LINE:" in said and "what was there is untouched" in said, said
    assert {p.name: p.read_bytes() for p in (tmp_path/"m").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]    # and nothing half-written beside it


@pytest.mark.parametrize("entropy", [False, True])
def test_without_compresslab_nothing_is_made_up(tiny, tmp_path, entropy):
    """Transformers alone would begin the weights that it does not find at random: it is made to refuse. Others may read the file."""
    folder = cl.save(cl.rtn(cl.load(tiny), 4, embeddings=True, progress=False), tmp_path/"m", entropy=entropy)
    code = f"from transformers import AutoModelForCausalLM as A\ntry: A.from_pretrained({str(folder)!r}); print('LOADED')\nexcept RuntimeError as e: print('REFUSED')"
    assert python(code).strip() == "REFUSED"
    assert (folder/"model.safetensors").stat().st_mode == (folder/"config.json").stat().st_mode


def test_tampered_weights_are_refused_by_plain_transformers_too(tiny, tmp_path):
    from transformers import AutoModelForCausalLM
    folder = cl.save(cl.rtn(cl.load(tiny), 4, progress=False), tmp_path/"m")
    weights = folder/"model.safetensors"
    data = bytearray(weights.read_bytes()); data[-1] ^= 255; weights.write_bytes(data)
    with pytest.raises(ValueError, match="was changed after it was written"): AutoModelForCausalLM.from_pretrained(folder)


def test_sharded_files(tiny, tmp_path):
    model = cl.rtn(cl.load(tiny), 4, embeddings=True, progress=False)
    folder = cl.save(model, tmp_path/"m", max_shard_size="20KB")
    assert len([*folder.glob("model-*.safetensors")]) > 1
    ids = torch.arange(20)[None]
    with torch.no_grad(): assert torch.equal(model(ids).logits, cl.load(folder)(ids).logits)
    assert len(json.loads((folder/"compresslab.json").read_text())["files"]) > 1
