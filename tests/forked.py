"""Processes forked from one that has the large libraries imported and has done nothing else: as clean as a new one, and some seconds sooner. What a library reads of the environment when it is imported (TQDM_DISABLE is such) is that of the tests."""
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["nbdev.test", "datasets", "matplotlib.pyplot", "pandas", "torch", "transformers.models.auto.modeling_auto", "transformers.trainer_utils"])


def _child(work, out, err, cwd, env):
    for stream, fd, file in ((sys.stdout, 1, out), (sys.stderr, 2, err)): stream.flush(); os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.environ.clear(); os.environ.update(env); os.chdir(cwd)
    work[0](*work[1:])


def forked(work, *args, cwd=".", env=None):
    """work(*args) in a process of its own: what subprocess.run tells of a command."""
    with tempfile.TemporaryDirectory() as d:
        out, err = Path(d)/"out", Path(d)/"err"; out.touch(); err.touch()
        process = PROCESSES.Process(target=_child, args=((work, *args), str(out), str(err), str(cwd), dict(os.environ if env is None else env)))
        process.start(); process.join()
        return subprocess.CompletedProcess([work.__name__, *args], process.exitcode, out.read_text(), err.read_text())


def _main(*args):
    from transformers.utils import logging
    from compresslab.cli import main
    logging.set_verbosity_error()                                   # as the command asks for in its environment, which is read when transformers is imported
    sys.argv = ["compresslab", *args]
    main()


def command(*args, cwd=".", env=None):
    """The command line `compresslab ARGS`."""
    return forked(_main, *map(str, args), cwd=cwd, env=env)
