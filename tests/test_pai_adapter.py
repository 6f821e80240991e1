"""The perforatedai package itself, where it can be had: COMPRESSLAB_PERFORATEDAI=folder of `pip install --no-deps --target`."""
import copy

import pytest
import torch
from safetensors.torch import load_file
from test_pai import IDS, logits, make, pairs

from compresslab.pai.adapter import VERSION, find_perforatedai, fit_with_perforatedai, import_perforatedai
from compresslab.pai.dendrites import n_dendrites, perforate
from compresslab.pai.tracker import DendriteSettings
from compresslab.train import evaluate


@pytest.fixture
def package():
    try: return find_perforatedai()
    except (ImportError, FileNotFoundError) as e: pytest.skip(str(e))


def fake(folder, code):
    (folder/"perforatedai").mkdir()
    (folder/"perforatedai"/"__init__.py").write_text(code)
    (folder/f"perforatedai-{VERSION}.dist-info").mkdir()
    (folder/f"perforatedai-{VERSION}.dist-info"/"METADATA").write_text(f"Metadata-Version: 2.1\nName: perforatedai\nVersion: {VERSION}\n")
    return folder


@pytest.mark.parametrize("code, message", (("import pdb; pdb.set_trace()", "opened its debugger"), ("import os; os._exit(0)", "ended with code 0 and no result")))
def test_prompts_and_exits_are_errors(tmp_path, code, message):
    folder = tmp_path/"package"; folder.mkdir()
    with pytest.raises(RuntimeError, match=message): fit_with_perforatedai(perforate(make("llama")), pairs(4), pairs(4), tmp_path/"run", epochs=1, package=fake(folder, code), progress=False)


@pytest.mark.parametrize("kind", ("t5", "gpt2", "resnetbk"))
def test_what_the_package_trained_is_ours_to_the_last_bit(package, kind, tmp_path):
    model = make(kind)
    for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)): dropout.p = 0.
    plain = copy.deepcopy(model)
    run = fit_with_perforatedai(perforate(model, exclude="router|experts"), pairs(), pairs(16), tmp_path/"run", epochs=9, settings=DendriteSettings("fixed", 2, max_dendrites=2, improvement_threshold=0.),
                                batch_size=8, lr=3e-3, precision="no", progress=False)
    assert run.apart == 0. and run.best_dendrites == n_dendrites(model) > 0
    assert evaluate(model, pairs(16), progress=False).nll == pytest.approx(run.best, rel=1e-5)
    file = import_perforatedai(plain, load_file(tmp_path/"run"/"run"/"best_model.pt"))                 # the file that it wrote itself
    assert n_dendrites(file) == run.best_dendrites and torch.equal(logits(file), logits(model))
