"""Sweeps as people run them: whole processes, several of them, some of them killed."""
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

pytest.importorskip("optuna", reason="pip install 'compresslab[sweep]'")
from compresslab.cli import main
from compresslab.sweep import Sweep
from compresslab.sweep_config import _parameter, draw_value, n_points, read_sweep, should_stop, stopping_bands

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT/"sweeps").glob("*.yaml"))
ENV = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TQDM_DISABLE="1", COLUMNS="160")
COMMAND = [str(Path(sys.executable).with_name("compresslab")), "sweep"]

PROGRAM = """
import json, os, sys, time
x = int(sys.argv[1].split("=")[1])
def log(what): open("log", "a").write(f"{what} {x} {os.getpid()} {os.getppid()}\\n")
log("start")
for epoch in range(1, 4):
    open(os.environ["COMPRESSLAB_SWEEP_REPORT"], "a").write(json.dumps(dict(epoch=epoch, loss=abs(x - 4) + 1/epoch)) + "\\n")
    while os.path.exists("wait"): time.sleep(.02)
log("end")
"""


@pytest.fixture
def grid(tmp_path):
    """A grid of eight points whose program writes down when it starts and ends."""
    (tmp_path/"program.py").write_text(PROGRAM)
    (tmp_path/"grid.yaml").write_text(yaml.safe_dump(dict(program="program.py", method="grid", metric=dict(name="loss", goal="minimize"), parameters=dict(x=dict(min=0, max=7)))))
    return tmp_path


def agent(folder, *args):
    return subprocess.Popen([*COMMAND, "agent", "grid.yaml", "--heartbeat", "1", *args], cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def logged(folder): return [line.split() for line in (folder/"log").read_text().splitlines()] if (folder/"log").exists() else []


def wait_until(true, seconds=60):
    limit = time.time() + seconds
    while not true():
        assert time.time() < limit, "it took too long"
        time.sleep(.02)


def alive(pid):
    try: os.kill(int(pid), 0)
    except ProcessLookupError: return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text() if Path(f"/proc/{pid}/status").exists() else True


@pytest.fixture(scope="module")
def postgresql():
    """The URL of a PostgreSQL server of our own, in a temporary folder."""
    found = shutil.which("initdb") or next(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None)
    if not found: pytest.skip("PostgreSQL's programs are not here: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="pip install 'compresslab[sweep]'")
    binaries, folder = Path(found).resolve().parent, Path(tempfile.mkdtemp())
    who = {}
    if os.geteuid() == 0:                                # PostgreSQL refuses to run as root
        import pwd
        try: user = next(pwd.getpwnam(n) for n in ("postgres", "nobody") if n in {p.pw_name for p in pwd.getpwall()})
        except StopIteration: pytest.skip("PostgreSQL does not run as root, and there is no other user")
        os.chown(folder, user.pw_uid, user.pw_gid)
        who = dict(user=user.pw_uid, group=user.pw_gid, extra_groups=[])
    quiet = dict(cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **who)
    made = subprocess.run([binaries/"initdb", "-D", folder/"data", "-U", "lab", "-A", "trust", "-N", "-E", "UTF8", "--no-locale"], **quiet)
    if made.returncode: pytest.skip(f"initdb does not run here: {made.stderr.strip().splitlines()[-1]}")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    server = subprocess.Popen([binaries/"postgres", "-D", folder/"data", "-p", str(port), "-k", folder, "-h", "127.0.0.1", "-F"], **(quiet | dict(stderr=subprocess.DEVNULL)))
    wait_until(lambda: subprocess.run([binaries/"pg_isready", "-h", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL).returncode == 0)
    yield f"postgresql://lab@127.0.0.1:{port}/postgres"
    server.send_signal(signal.SIGINT)
    server.wait(20)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_two_agents_one_killed_in_the_middle(grid, backend, request):
    """Nothing is created beforehand: the agents race for that too."""
    url = request.getfixturevalue("postgresql") if backend == "postgresql" else None
    storage = ["--storage", url] if url else []
    (grid/"wait").touch()                                                             # every program stops after its first epoch
    first, second = agent(grid, *storage), agent(grid, *storage)
    wait_until(lambda: {int(parent) for *_, parent in logged(grid)} >= {first.pid, second.pid} or first.poll() or second.poll(), 120)
    assert first.poll() is None and second.poll() is None, [p.communicate()[1] for p in (first, second) if p.poll()]
    _, again, orphan, _ = next(line for line in logged(grid) if int(line[3]) == first.pid)
    time.sleep(.5)                                                                    # the first epoch is in the storage
    first.kill(); first.wait()
    (grid/"wait").unlink()
    said, err = second.communicate(timeout=90)
    assert second.returncode == 0, err
    assert "8 of 8 done" in said and "Traceback" not in err
    sweep = Sweep("grid", url, grid/"out"/"sweeps"/"grid")
    table, ends = sweep.table(), Counter(x for what, x, *_ in logged(grid) if what == "end")
    assert table.state.tolist() == ["finished"]*8 and table.x.tolist() == list(range(8)) and (table.epochs == 3).all()
    assert table.attempts.tolist() == [2 if x == int(again) else 1 for x in range(8)] # one attempt died; its point was taken up once
    starts = Counter(x for what, x, *_ in logged(grid) if what == "start")
    assert starts == Counter(str(x) for x in range(8)) + Counter([again])             # no other point ran twice
    if sys.platform == "linux": assert not alive(orphan) and set(ends.values()) == {1} # the dead agent's program went with it
    assert sweep.best()["config"] == dict(x=4) and sweep.status()["finished"] == 8
    assert len([t for t in sweep.study.get_trials() if t.state.name == "COMPLETE"]) == 8


def test_ctrl_c_gives_the_point_back(grid, monkeypatch):
    (grid/"wait").touch()
    process = agent(grid)
    wait_until(lambda: logged(grid), 120)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "stopped" in err and "Traceback" not in err
    pid = logged(grid)[-1][2]
    wait_until(lambda: not alive(pid), 5)
    (grid/"wait").unlink()
    monkeypatch.chdir(grid)
    assert Sweep("grid").agent(progress=False) == 8
    table = Sweep("grid").table()
    assert table.attempts.tolist() == [2] + [1]*7 and set(table.state) == {"finished"}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f.stem)
def test_shipped_sweeps_are_valid_here_and_for_wandb(file):
    jsonschema = pytest.importorskip("jsonschema")
    theirs = yaml.safe_load(file.read_text())                                         # as W&B's command line reads it
    jsonschema.validate(theirs, json.loads((ROOT/"tests"/"wandb_sweep_schema.json").read_text()))
    assert read_sweep(theirs) == read_sweep(file) and n_points(read_sweep(file)) < 100
    assert file.stem == theirs["name"] and theirs["program"] == "compresslab.pai.summarize"


def test_wandbs_schema_refuses_what_we_refuse():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT/"tests"/"wandb_sweep_schema.json").read_text())
    good = dict(method="random", metric=dict(name="loss"), run_cap=3, parameters=dict(x=dict(min=0., max=1.)))
    jsonschema.validate(good, schema)
    for change in (dict(parametres={}), dict(parameters=dict(x=dict(min="low", max=1.))), dict(metric=dict(nmae="loss")), dict(early_terminate=dict(type="hyperband", eta=3))):
        with pytest.raises(jsonschema.ValidationError): jsonschema.validate(good | change, schema)
        with pytest.raises(ValueError): read_sweep(good | change)


def test_early_termination_and_distributions_agree_with_wandbs_own_code():
    """`pip install --no-deps sweeps jsonref` in an environment of its own: it wants an older numpy."""
    stopping = pytest.importorskip("sweeps.hyperband_stopping", exc_type=ImportError)
    from sweeps.params import HyperParameter
    from sweeps.run import RunState, SweepRun
    rng = random.Random(0)
    for _ in range(300):
        goal, strict, eta = rng.choice(["minimize", "maximize"]), rng.random() < .5, rng.choice([2, 3, 1.5, 4])
        rule = dict(type="hyperband", eta=eta, strict=strict) | (dict(min_iter=rng.randint(1, 4)) if rng.random() < .5 else dict(max_iter=rng.randint(8, 30), s=rng.randint(1, 3)))
        histories = [[rng.choice([rng.random(), rng.randint(0, 3)]) for _ in range(rng.randint(1, 20))] for _ in range(rng.randint(1, 9))]
        runs = [SweepRun(name=str(i), state=RunState.finished if i else RunState.running, history=[dict(loss=v) for v in h]) for i, h in enumerate(histories)]
        theirs = stopping.hyperband_stop_runs(runs, dict(method="grid", metric=dict(name="loss", goal=goal), early_terminate=rule, parameters=dict(a=dict(values=[1]))))
        ours = [dict(enumerate(h, 1)) for h in histories]
        assert should_stop(ours[0], ours[1:], **stopping_bands(rule), maximize=goal == "maximize") == (len(theirs) == 1)

    class At:
        def __init__(self, u): self.u = u
        def suggest_float(self, name, low, high, log=False): return math.exp(math.log(low) + self.u*math.log(high/low)) if log else low + self.u*(high - low)
    given = dict(uniform=dict(min=2, max=5.), log_uniform=dict(min=-4, max=-1), log_uniform_values=dict(min=1e-4, max=.1), inv_log_uniform=dict(min=1, max=3), inv_log_uniform_values=dict(min=1e-3, max=.1),
                 normal=dict(mu=1, sigma=2), log_normal=dict(mu=1, sigma=.5), beta=dict(a=2, b=5), q_uniform=dict(min=0, max=10, q=2), q_log_uniform=dict(min=0, max=3, q=.5), q_log_uniform_values=dict(min=1, max=30, q=1),
                 q_normal=dict(mu=3, sigma=2, q=.5), q_log_normal=dict(mu=1, sigma=1, q=1), q_beta=dict(a=2, b=3, q=.1))
    for kind, keys in given.items():
        p = dict(distribution=kind, **keys)
        for u in (.03, .25, .5, .77, .97): assert draw_value(At(u), "x", _parameter("x", p)) == pytest.approx(float(HyperParameter("x", p).ppf(u)), rel=1e-4), kind


BAD = {
    "misspelt key": ("method: grid\nmetric: {name: loss}\nparametres: {x: {values: [1, 2]}}", "did you mean 'parameters'?"),
    "misspelt distribution": ("method: random\nrun_cap: 3\nmetric: {name: loss}\nparameters: {x: {distribution: log_unifrom_values, min: 1e-6, max: 1}}", "did you mean 'log_uniform_values'?"),
    "seed": ("method: bayes\nrun_cap: 3\nmetric: {name: loss}\nparameters: {seed: {values: [0, 1, 2]}}", "the best seed is the luckiest"),
    "before the first dendrite": ("method: grid\nmetric: {name: loss}\nearly_terminate: {type: hyperband, min_iter: 3}\nparameters: {n-epochs-to-switch: {values: [2, 4]}}", "set min_iter to at least 5"),
    "no end": ("method: bayes\nmetric: {name: loss}\nparameters: {x: {min: 0, max: 1.5}}", "has no end without it"),
    "key twice": ("method: grid\nmetric: {name: loss}\nmetric: {name: acc}\nparameters: {x: {values: [1]}}", "'metric' stands there twice"),
    "not YAML": ("method: [grid", "bad.yaml: while parsing"),
    "not a sweep": ("- 1\n- 2", "not a sweep"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_file_gets_one_line_and_leaves_nothing(mistake, tmp_path, monkeypatch, capfd):
    text, says = BAD[mistake]
    monkeypatch.chdir(tmp_path)
    (tmp_path/"bad.yaml").write_text(text)
    assert_one_line(["create", "bad.yaml"], says, monkeypatch, capfd)
    assert [f.name for f in tmp_path.iterdir()] == ["bad.yaml"]


def assert_one_line(args, says, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["compresslab", "sweep", *map(str, args)])
    with pytest.raises(SystemExit) as end: main()
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 1 and len(lines) == 1 and says in lines[0], err
    assert "Traceback" not in out + err


def test_other_mistakes_get_one_line(grid, monkeypatch, capfd):
    monkeypatch.chdir(grid)
    line = lambda args, says: assert_one_line(args, says, monkeypatch, capfd)
    line(["status", "grid"], "no sweep 'grid'")
    line(["create", "grid.yaml", "--storage", "postgresql://lab:secret@127.0.0.1:9/none"], "postgresql+psycopg://lab:***@127.0.0.1:9/none cannot be opened")
    line(["create", "grid.yaml", "--storage", "redis://x"], "use sqlite:///FILE")
    (grid/"wrong.yaml").write_text((grid/"grid.yaml").read_text().replace("name: loss", "name: dev/loss"))
    line(["agent", "wrong.yaml"], "ended without reporting 'dev/loss': it reported 'epoch', 'loss'; did you mean 'loss'?")
    assert sum(what == "start" for what, *_ in logged(grid)) == 1                     # one run was enough to know
    (grid/"broken.yaml").write_text((grid/"grid.yaml").read_text().replace("program.py", "absent.py"))
    line(["agent", "broken.yaml"], "three runs in a row failed")
    Sweep("grid.yaml").agent(count=2, progress=False)
    before = Sweep("grid").table()
    (grid/"grid.yaml").write_text((grid/"grid.yaml").read_text().replace("max: 7", "max: 9"))
    line(["agent", "grid.yaml"], "holds another sweep 'grid' (parameters.x differs)")
    assert Sweep("grid").table().equals(before)
    record = grid/"out"/"sweeps"/"grid"/"sweep.json"
    kept = record.read_text()
    record.write_text("{")
    line(["create", "grid.yaml"], "is damaged or of an older version")
    record.write_text(kept)


def test_wandb_offline_mirror(grid, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'compresslab[track]'")
    monkeypatch.chdir(grid)
    sweep = Sweep("grid.yaml")
    assert sweep.agent(count=2, wandb="offline", progress=False) == 2
    assert len([*sweep.folder.glob("wandb/offline-run-*/*.wandb")]) == 2


def test_without_wandb_one_line_says_how_to_get_it(grid, monkeypatch):
    monkeypatch.chdir(grid); monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="compresslab\\[track\\]"): Sweep("grid.yaml").agent(wandb="offline", progress=False)
    assert not logged(grid)                                                           # before anything ran


def test_importing_compresslab_leaves_optuna_alone():
    done = subprocess.run([sys.executable, "-c", "import sys, compresslab, compresslab.cli, compresslab.sweep; print('optuna' in sys.modules)"], capture_output=True, text=True, env=ENV)
    assert done.stdout.strip() == "False", done.stderr
