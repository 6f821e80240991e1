"""Two processes do what one process does with accumulated gradients."""
import os
import subprocess
import sys

import torch

SCRIPT = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from compresslab.blocks import Blocks
from compresslab.train import fit
out, accumulate = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True))
ids = torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(1))
history = fit(model, Blocks(ids, ids, torch.ones_like(ids), 1, 1), steps=6, batch_size=4, accumulate=accumulate, precision="no", progress=False)
assert history[-1]["tokens"] == 6*2*4*16, history[-1]
torch.save({k: v for k, v in model.state_dict().items()}, out)
"""


def test_two_processes_equal_one(tmp_path):
    script = tmp_path/"train.py"
    script.write_text(SCRIPT)
    for n, out, accumulate in ((1, "one.pt", 2), (2, "two.pt", 1)):
        run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), str(script), str(tmp_path/out), str(accumulate)],
                             capture_output=True, text=True, timeout=300, env=dict(os.environ, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"))
        assert run.returncode == 0, run.stderr[-2000:]
    one, two = torch.load(tmp_path/"one.pt"), torch.load(tmp_path/"two.pt")
    for k in one: torch.testing.assert_close(one[k], two[k], rtol=1e-3, atol=1e-4)


def test_ctrl_c_in_the_middle_of_a_step_is_exact_too(tmp_path):
    """The signal comes inside the loss, with dropout: the step is finished, saved, and the resumed run ends with the same weights."""
    import os
    import signal

    import pytest
    from transformers import GPT2Config, GPT2LMHeadModel

    from compresslab.blocks import Blocks
    from compresslab.train import causal_loss, fit
    ids = torch.randint(0, 64, (40, 16), generator=torch.Generator().manual_seed(1))
    data = Blocks(ids, ids, torch.ones_like(ids), 1, 1)
    calls = []

    def model():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16))

    def interrupted(m, batch):
        calls.append(1)
        value = causal_loss(m, batch)
        if len(calls) == 4: os.kill(os.getpid(), signal.SIGINT)
        return value

    kwargs = dict(steps=9, batch_size=4, accumulate=2, progress=False)
    straight = model()
    whole = fit(straight, data, **kwargs)
    with pytest.raises(KeyboardInterrupt): fit(model(), data, loss=interrupted, checkpoint=tmp_path/"ck", **kwargs)
    resumed = model()
    again = fit(resumed, data, checkpoint=tmp_path/"ck", **kwargs)
    assert [h["loss"] for h in again] == [h["loss"] for h in whole]
    for a, b in zip(straight.parameters(), resumed.parameters()): assert torch.equal(a, b)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
