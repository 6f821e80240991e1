"""Every block of code that the README and the docs only show, run on small models; what cells run, test_notebooks runs."""
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from forked import command

import compresslab as cl
from compresslab._modidx import d as index

ROOT = Path(__file__).resolve().parents[1]
SHORTER = [  # the same lines, for small models and less text
    (r"(tokens=)[\d.]+e\d", r"\g<1>1e3"), (r"epochs=\d+", "epochs=1"), (r"steps=500", "steps=2"), (r"iterations=30", "iterations=2"), (r"n=1000, new=255", "n=4, new=16"),
    (r"(factorize_embedding\(.*share=.25)\)", r"\1, steps=5)"), (r"limit=200", "limit=2"), (r"texts, pairs\)", "texts, pairs, warmup_steps=2, task_steps=2)"), (r'"python-stdlib"(?=\)|, (share|sparsity|bits|keep|n=|prune|pattern))', "few"), (r"ratio=100,", 'ratio=20, data=dict(text="python-stdlib", length=64, train_tokens=20000, valid_tokens=1000, test_tokens=1000, samples=4), tokens=2e3, batch_size=4,'), (r"budget_bytes=2_500_000", "budget_bytes=1_200_000"), (r'data="squad"', "**SMALL_SQUAD"), (r"target_lengths=\(32, 64, 128\)", "target_lengths=(4,)"),
    (r'"gist", 32', '"gist", 4'), (r"target_compression=100", "target_compression=20"), (r'data="/data"', "data=tasks"), (r"save_dir=", "qat_epochs=.1, pruning_epochs=.1, distillation_epochs=.2, save_dir="),
    (r"--ratio 100", "--ratio 4"), (r"(compresslab playbook .*)", r"\1 --tokens 2000 --seq-len 64"), (r"recipes/10x.yaml", "recipe.yaml"), (r"2_000_000", "20_000"), (r"(compresslab compress .*)", r"\1 --samples 2 --max-tokens 1000"), (r"(compresslab measure .*)", r"\1 --max-tokens 1000"), (r"(recursive train .*)", r"\1 --epochs .01 --max-tokens 2000 --max-length 64"),
]
ELSEWHERE = (  # lines that other tests run, or nothing here can
    "git clone", "make demo", "vllm serve",                              # .ci/run installs a clone; no vLLM here
    "compresslab report ", "compresslab reports", "papermill ",          # test_reports and chapter 90c run all reports
    "compresslab studio", "compresslab sweep agent", "compresslab sweep status", "compresslab sweep best", "python -m compresslab.pai.summarize",   # test_studio, test_sweep, test_pai_summarize
)
MIXTURES = ("07_mixtures", "15_experts", "22_experts", "30b_tensors")    # chapters whose `model` is a mixture of experts
TOLD = {"train_epoch(model, optimizer)": "stands for anybody's loop", "fit_with_perforatedai": "needs perforatedai: test_pai_adapter runs it"}


def blocks():
    for path in sorted((ROOT/"nbs").rglob("*.ipynb")):
        if any(part.startswith((".", "_")) for part in path.parts) or "reports" in path.parts: continue
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", "".join(cell["source"]), re.S | re.M): yield path, kind or "sh", text


BLOCKS = list(blocks())
SLOW = ("ablate(", "run_ablations(", "playbook(", "recipe.run(out=")
PYTHON = [pytest.param(path, text, id=f"{path.stem}-{i}", marks=pytest.mark.slow if any(call in text for call in SLOW) else []) for i, (path, kind, text) in enumerate(BLOCKS) if kind == "python"]
LINES = dict.fromkeys(line for _, kind, text in BLOCKS if kind in ("sh", "bash") for line in (re.sub(r"\s+#.*", "", x) for x in text.splitlines()) if line)


def shorter(text):
    for old, new in SHORTER: text = re.sub(old, new, text)
    return text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small model where the docs have `data/pylm`, and a recipe."""
    from transformers import LlamaConfig, LlamaForCausalLM
    folder, words = tmp_path_factory.mktemp("docs"), cl.store.find_tokenizer(str(ROOT/"data"/"pylm"))
    torch.manual_seed(0)
    small = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
                                         bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id))
    cl.save(small, folder/"data"/"pylm", words)
    cl.rtn(small, 4, embeddings=True, progress=False); cl.save(small, folder/"out"/"pylm-gptq4", words)
    recipe = next(text for path, kind, text in BLOCKS if kind == "yaml" and path.stem == "80_recipe")
    (folder/"recipe.yaml").write_text(recipe.replace("tokens: 4e6", "tokens: 1e3").replace("rank: 96", "rank: 16").replace("data: python-stdlib", "data: {text: python-stdlib, length: 64, train_tokens: 20000, valid_tokens: 1000, test_tokens: 1000, samples: 4}").replace("ratio: 10,", "ratio: 3,"))
    shutil.copytree(ROOT/"sweeps", folder/"sweeps")
    return folder


def stands_for(name, chapter, place, shared):
    """What a name in a block means that the block does not make itself."""
    from compresslab.blocks import Blocks
    from compresslab.data import documents
    from compresslab.pai.small_t5 import Pairs
    from compresslab.store import find_tokenizer
    words, ids = find_tokenizer(place/"data"/"pylm"), lambda n: torch.randint(3, 4096, (n, 64), generator=torch.Generator().manual_seed(n))
    rows = lambda n: Blocks(ids(n), ids(n), torch.ones(n, 64, dtype=torch.long), n*200, n)
    load = lambda: cl.load(place/"data"/"pylm").float()
    def mixture():
        from transformers import MixtralConfig, MixtralForCausalLM
        torch.manual_seed(0); c = load().config
        return MixtralForCausalLM(MixtralConfig(vocab_size=c.vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, max_position_embeddings=512, pad_token_id=c.pad_token_id, bos_token_id=c.bos_token_id, eos_token_id=c.eos_token_id))
    def with_name(m): m.config.name_or_path = m.name_or_path = str(place/"data"/"pylm"); return m           # where a corpus by name finds the tokenizer
    if name == "tasks":
        return shared("mmlu").parent
    if name == "SMALL_SQUAD": return dict(data=str(shared("squad")), model=str(place/"data"/"pylm"), train_examples=8, valid_examples=4, batch_size=4, max_context=128)
    if name == "objective":
        def objective(config): yield config["dropout-rate"]
        return objective
    made = dict(model=mixture if chapter in MIXTURES else load, mixture=mixture, teacher=load, original=load, another=load, third=load, student=lambda: cl.student_of(load(), layers=1, progress=False), text=lambda: rows(16), blocks=lambda: rows(16), train=lambda: rows(64), valid=lambda: rows(8),
                few=lambda: [*ids(8)[:, None]], tokenizer=lambda: words, student_tokenizer=lambda: words, teacher_tokenizer=lambda: words, ids=lambda: ids(1)[:, :8], folder=lambda: place/"out"/"trimmed", documents=lambda: documents("python-stdlib:valid").select(range(2)),
                texts=lambda: list(documents("python-stdlib:valid").select(range(20))["text"]), pairs=lambda: lambda tokenizer: Pairs([[5, 6, 7]]*8, [[5]]*8, 16, 8))
    if name in made:
        thing = made[name]()
        return with_name(thing) if isinstance(thing, torch.nn.Module) else thing
    homes = [m for m, names in index["syms"].items() if f"{m}.{name}" in names]
    return getattr(import_module(homes[0]), name) if homes else None


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """The same in a folder of the test's own, where it now is."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("TQDM_DISABLE", "1")
    return tmp_path


@pytest.mark.parametrize("path, text", PYTHON)
def test_python(path, text, place, here, shared):
    if told := next((why for what, why in TOLD.items() if what in text), None): pytest.skip(told)
    text = shorter(text); tree = ast.parse(text)
    chapter = path.stem
    wanted = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    names, own = dict(cl=cl), re.search(r"default_exp (\S+?)\"", path.read_text())
    if own: names |= vars(import_module(f"compresslab.{own[1]}"))
    for k in wanted - names.keys():
        found = stands_for(k, chapter, place, shared)
        if found is not None: names[k] = found
    exec(compile(tree, str(path), "exec"), names)


@pytest.mark.parametrize("line", LINES)
def test_shell(line, here):
    if line.startswith(ELSEWHERE): pytest.skip("other tests run it")
    program, *rest = shlex.split(shorter(line))
    run = command(*rest, cwd=here) if program == "compresslab" else subprocess.run([Path(sys.executable).with_name(program), *rest], cwd=here, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
