"""`import compresslab` is light, and transformers knows our folders whatever is imported first."""
import re, subprocess, sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import compresslab as cl
from compresslab.distillation.patches import BytePatchConfig, BytePatchForCausalLM


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A factored Llama and a ResNet-BK model, stored."""
    out = tmp_path_factory.mktemp("import"); torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))
    cl.save(cl.factorize(llama, share=.5, method="plain"), out/"llama")
    cl.save(BytePatchForCausalLM(BytePatchConfig(hidden_size=16)), out/"bytes")
    cl.save(cl.ResNetBKForCausalLM(cl.ResNetBKConfig(vocab_size=61, d_model=16, n_layers=2, num_experts=0, d_ff=32)), out/"bk")
    return out


def fresh(code, folder="."):
    """Run code in a process of its own, in a folder."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_brings_nothing_heavy():
    fresh("import compresslab, sys; assert 'rtn' in dir(compresslab); assert not {'torch', 'transformers', 'datasets', 'matplotlib', 'optuna', 'gradio'} & {*sys.modules}, 'something heavy came along'")


def test_a_folder_of_its_name_does_not_hide_it(tmp_path):
    """Python started beside the clone has a folder `compresslab` in its place of work."""
    (tmp_path/"compresslab").mkdir()
    assert fresh("import compresslab; print(compresslab.__version__)", tmp_path).strip() == cl.__version__


@pytest.mark.parametrize("code", [
    "import compresslab; from transformers import AutoModelForCausalLM as Auto; Auto.from_pretrained('llama'); Auto.from_pretrained('bk')",
    "from transformers import AutoModelForCausalLM as Auto; import compresslab; Auto.from_pretrained('llama'); Auto.from_pretrained('bk')",
    "import compresslab; from transformers import LlamaForCausalLM; LlamaForCausalLM.from_pretrained('llama')",
    "import compresslab; from transformers import AutoConfig; assert AutoConfig.from_pretrained('bk').model_type == 'resnet_bk'",
    "import compresslab; from transformers import AutoModelForCausalLM as Auto; assert Auto.from_pretrained('bytes').config.order == 1",
    "from compresslab.quant.ptq import gptq; from transformers import AutoModelForCausalLM as Auto; Auto.from_pretrained('llama'); Auto.from_pretrained('bk')",
    "import compresslab; compresslab.load('llama'); compresslab.load('bk'); compresslab.quant.ptq.gptq",
], ids=["ours first", "transformers first", "a class of one family", "the config alone", "bytes in patches", "a room alone", "our own load"])
def test_folders_load_whatever_was_imported_first(folders, code): fresh(code, folders)


def test_names_are_complete_and_unknown_ones_said():
    for name in cl.__all__: assert getattr(cl, name) is not None
    with pytest.raises(AttributeError, match="module 'compresslab' has no attribute 'gtpq'"): cl.gtpq


def test_import_all_knows_every_replacement():
    """What a compresslab.json may name is found, whichever module defines it."""
    written = {name for file in Path(cl.__file__).parent.rglob("*.py") for name in re.findall(r"^@replacement\nclass (\w+)", file.read_text(), re.M)}
    known = fresh("import compresslab; compresslab.import_all(); from compresslab.store import REPLACEMENTS; print(*REPLACEMENTS)").split()
    assert len(written) > 8 and written <= {*known}, written - {*known}
