"""Mixed precision of a real pretrained model: bytes on disk within the budget, and better than one width for all."""
import copy

import pytest
import torch

import compresslab as cl
from compresslab.blocks import pack
from compresslab.data import documents
from compresslab.quant.mixed import choose_widths, mixed_precision, packed_widths, sensitivity
from compresslab.quant.ptq import gptq, rtn
from compresslab.store import stored_bytes
from compresslab.train import evaluate


@pytest.fixture(scope="module")
def stories(stories260k):
    """The model, calibration blocks and held-out blocks, of different stories."""
    model, tokenizer, texts = stories260k
    calibration, valid = (pack(documents(str(texts), split), tokenizer, 128, max_tokens=n) for split, n in (("train", 48*128), ("valid", 30_000)))
    return model, [row[None] for row in calibration.input_ids[calibration.attention_mask.all(1)]], valid


@pytest.mark.parametrize("embeddings", [False, True])
def test_better_than_three_bits_at_its_bytes(stories, tmp_path, embeddings):
    model, calibration, valid = stories
    options = dict(embeddings=embeddings, progress=False)
    uniform = cl.save(gptq(copy.deepcopy(model), calibration, bits=3, **options), tmp_path/"uniform")
    mixed = cl.save(mixed_precision(copy.deepcopy(model), calibration, stored_bytes(uniform), **options), tmp_path/"mixed")
    assert .99*stored_bytes(uniform) < stored_bytes(mixed) <= stored_bytes(uniform)
    nll = {folder.name: evaluate(cl.load(folder), valid, progress=False).nll for folder in (uniform, mixed)}
    assert nll["mixed"] < nll["uniform"], nll
    assert len({*packed_widths(cl.load(mixed)).values()}) > 1


def test_budgets_on_disk_and_the_sum_of_costs(stories, tmp_path):
    """Any budget is kept by the file; the model comes back from the measurement bit for bit; at 4 bits costs add up to the measured one within a factor of two."""
    model, calibration, _ = stories
    before = {n: t.clone() for n, t in model.state_dict().items()}
    table = sensitivity(model, calibration, embeddings=True, progress=False)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    least, most = (table.rest + table.total()[b] for b in (2, 8))
    for budget in range(least, most, (most - least)//7):
        packed = mixed_precision(copy.deepcopy(model), None, budget, method=rtn, measured=table, progress=False)
        assert stored_bytes(cl.save(packed, tmp_path/"m")) <= budget
        assert packed_widths(packed).items() >= choose_widths(table, budget).items()
    with pytest.raises(ValueError, match="is below the smallest possible"): mixed_precision(model, calibration, least - 1, measured=table)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    joint, ids = gptq(copy.deepcopy(model), calibration, bits=4, embeddings=True, progress=False), torch.cat(calibration[3::4])
    with torch.no_grad(): p, q = (m(ids).logits[:, :-1].log_softmax(-1) for m in (model, joint))
    measured = (p.exp()*(p - q)).sum(-1).mean().item()
    assert .5 < measured/table.total("kl")[4] < 2, (measured, table.total("kl")[4])
