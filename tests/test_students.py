"""Students made of real teachers: what their inheritance is worth on held-out text, before and after training, and whether anyone can load them."""

import pytest
import torch
from forked import python
from transformers import AutoModelForCausalLM

import compresslab as cl
from compresslab.blocks import pack
from compresslab.data import documents
from compresslab.distillation.students import student_of, student_params, student_shape
from compresslab.surgery import params
from compresslab.train import distil, evaluate, fit


@pytest.fixture(scope="module")
def stories(stories260k):
    """A teacher of 260 thousand parameters, token blocks to train on, and held-out ones, of different stories."""
    model, tokenizer, texts = stories260k
    train, valid = (pack(documents(str(texts), split), tokenizer, 128, max_tokens=n) for split, n in (("train", 55_000), ("valid", 8000)))
    return model, train, valid, [row[None] for row in train.input_ids[:64]]


def nll(model, valid): return evaluate(model, valid, progress=False).nll


def test_every_inheritance_beats_random_before_and_after_training(stories):
    teacher, train, valid, on = stories
    made, trained, state = {}, {}, {n: t.clone() for n, t in teacher.state_dict().items()}
    for name, kw in dict(random=dict(initialize="random"), first=dict(widths="first"), picked=dict(widths="pick"), by_weights=dict(calibration=None), rotated={}).items():
        student = student_of(teacher, **{"params_ratio": .4, "calibration": on, "progress": False, **kw})
        assert abs(student.choices.ratio/.4 - 1) < .05
        made[name] = nll(student, valid)
        fit(student, train, loss=distil(teacher), steps=50, batch_size=8, lr=2e-3, precision="no", progress=False)
        trained[name] = nll(student, valid)
    for scores in (made, trained):
        assert scores["rotated"] < scores["picked"] < scores["random"] and scores["by_weights"] < scores["random"], (made, trained)
    assert trained["rotated"] < trained["first"] < trained["random"] and trained["rotated"] < trained["random"] - .5, trained
    assert all(torch.equal(t, state[n]) for n, t in teacher.state_dict().items())


def test_layers_of_the_middle_go_before_those_of_the_ends(stories):
    teacher, _, valid, on = stories
    assert nll(student_of(teacher, layers=4), valid) < nll(student_of(teacher, layers=[0, 1, 2, 3]), valid)


@pytest.mark.parametrize("ratio", [.5, .25, .1, .05])
def test_the_size_asked_for(pylm, ratio):
    teacher = AutoModelForCausalLM.from_pretrained(pylm)
    shape = student_shape(teacher, ratio)
    student = student_of(teacher, **shape)
    assert student.dtype == teacher.dtype and params(student) == student_params(teacher, **shape)
    assert abs(params(student)/params(teacher)/ratio - 1) < .06


def test_a_student_needs_no_compresslab(pylm, tmp_path):
    student = student_of(AutoModelForCausalLM.from_pretrained(pylm, dtype=torch.float32), params_ratio=.25, calibration="python-stdlib", samples=4, progress=False)
    student.save_pretrained(tmp_path)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(): torch.save(student(ids).logits, tmp_path/"logits.pt")
    code = f"""
import sys, torch
sys.modules["compresslab"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
ids = torch.arange(5, 25)[None]
with torch.no_grad(): assert torch.equal(model(ids).logits, torch.load({str(tmp_path/"logits.pt")!r}))
"""
    python(code)
