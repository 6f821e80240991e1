"""Shared by all tests: where real data lies, and small models made on the spot."""
import os
import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("COMPRESSLAB_TEST_DATA", ROOT.parent/"shared"/"data"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background job ignores Ctrl-C, and what it starts inherits that


@pytest.fixture(scope="session")
def shared():
    """A function that gives the path of real data, or skips the test and says what is missing."""
    def get(name):
        if not (SHARED/name).exists(): pytest.skip(f"{name} is not in {SHARED}")
        return SHARED/name
    return get


@pytest.fixture(scope="module")
def stories260k(shared):
    """A real model of 260 thousand parameters, its tokenizer, and the folder of the stories it was trained on; a fresh one for each module."""
    import compresslab as cl
    from compresslab.store import find_tokenizer
    folder, texts = shared("models/stories260k"), shared("tinystories")
    return cl.load(folder).float(), find_tokenizer(str(folder)), texts


@pytest.fixture
def pylm():
    folder = ROOT/"data"/"pylm"
    assert (folder/"model.safetensors").exists(), "data/pylm ships with the project"
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Llama with a byte-level tokenizer, saved to a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(["def f(x): return x\n"], trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>", "<pad>"],
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>", pad_token="<pad>", padding_side="left")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=40, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, head_dim=10,
                                         num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=1))
    folder = tmp_path_factory.mktemp("models")/"tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
