"""Processes forked from one that has the large libraries imported and has done nothing else: as clean as a new one, and some seconds sooner. What a library reads of the environment when it is imported (TQDM_DISABLE is such) is that of the tests."""
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["nbdev.test", "accelerate", "datasets", "matplotlib.pyplot", "numba", "pandas", "torch", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "transformers.trainer_utils"])


def _child(work, out, err, cwd, env):
    for stream, fd, file in ((sys.stdout, 1, out), (sys.stderr, 2, err)): stream.flush(); os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.environ.clear(); os.environ.update(env); os.chdir(cwd)
    work[0](*work[1:])


class Forked:
    """work(*args) in a process of its own, with what tests ask of a subprocess.Popen."""
    def __init__(self, work, *args, cwd=".", env=None):
        self.args, self.folder = [work.__name__, *args], tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name)/name for name in ("out", "err")]
        for file in self.files: file.touch()
        self.process = PROCESSES.Process(target=_child, args=((work, *args), *map(str, self.files), str(cwd), dict(os.environ if env is None else env)))
        self.process.start()

    def poll(self): return self.process.exitcode
    def kill(self): self.process.kill()
    def send_signal(self, number): os.kill(self.process.pid, number)
    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None: raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode
    returncode = property(poll)
    def communicate(self, timeout=None): self.wait(timeout); return tuple(file.read_text() for file in self.files)


def forked(work, *args, cwd=".", env=None):
    """The same to its end: what subprocess.run tells of a command."""
    process = Forked(work, *args, cwd=cwd, env=env)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _main(*args):
    from transformers.utils import logging
    from compresslab.cli import main
    logging.set_verbosity_error()                                   # as the command asks for in its environment, which is read when transformers is imported
    if os.environ.get("TQDM_DISABLE"): logging.disable_progress_bar()   # and so is this
    sys.argv = ["compresslab", *args]
    main()


def _exec(code, *args):
    sys.argv = ["-c", *args]
    exec(compile(code, "<code>", "exec"), dict(__name__="__main__"))


def command(*args, cwd=".", env=None):
    """The command line `compresslab ARGS`."""
    return forked(_main, *map(str, args), cwd=cwd, env=env)


def begin(*args, cwd=".", env=None):
    """The same, begun."""
    return Forked(_main, *map(str, args), cwd=cwd, env=env)


def python(code, *args, cwd=".", env=None):
    """Code that a process of its own runs, and that must not fail: what it prints."""
    run = forked(_exec, code, *map(str, args), cwd=cwd, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
