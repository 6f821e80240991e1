"""Two processes do what one process does with accumulated gradients."""
import os
import subprocess
import sys

import torch

SCRIPT = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from compresslab.data import Blocks
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
