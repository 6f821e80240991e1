"""Bregman iterations and outlier shares on the project's own model."""
import pytest
import torch

import compresslab as cl
from compresslab.blocks import calibration_blocks
from compresslab.pruning.bregman import bregman, outlier_shares
from compresslab.pruning.magnitude import sparsity_table
from compresslab.store import find_tokenizer, stored_bytes
from compresslab.train import evaluate

torch.set_num_threads(1)
OPTIONS = dict(include=r"layers\.[01]\.", progress=False)


@pytest.fixture(scope="module")
def rows():
    return [b["input_ids"] for b in calibration_blocks("python-stdlib", find_tokenizer("pylm"), samples=8, length=128)]


def test_bregman_beats_wanda_at_equal_sparsity_and_its_zeros_are_not_stored(pylm, rows, tmp_path):
    valid = cl.held_out(pylm, max_tokens=2000, length=128)
    pruned = bregman(cl.load(pylm).float(), rows, sparsity=.7, iterations=10, **OPTIONS)
    wanda = cl.wanda(cl.load(pylm).float(), rows, sparsity=.7, **OPTIONS)
    for m in (pruned, wanda): assert sparsity_table(m, include=OPTIONS["include"]).sparsity.mean() == pytest.approx(.7, abs=.01)
    assert evaluate(pruned, valid, progress=False).nll < evaluate(wanda, valid, progress=False).nll - .1
    cl.save(pruned, tmp_path/"m")
    assert stored_bytes(tmp_path/"m") < .9*2*stored_bytes(pylm)          # the original's file is in 16 bits, this one in 32
    ids = rows[0]
    with torch.no_grad(): assert torch.equal(cl.load(tmp_path/"m")(ids).logits, pruned(ids).logits)


def test_outlier_shares_help_wanda(pylm, rows):
    model = cl.load(pylm).float()
    shares = outlier_shares(model, rows, .7, progress=False)
    assert len(shares) == 42 and shares["model.layers.0.mlp.up_proj"] < .62 < .7 < shares["model.layers.3.mlp.up_proj"]
    valid = cl.held_out(pylm, max_tokens=2000, length=128)
    owl, uniform = (evaluate(cl.wanda(cl.load(pylm).float(), rows, sparsity=s, progress=False), valid, progress=False).nll for s in (shares, .7))
    assert owl < uniform - .3
