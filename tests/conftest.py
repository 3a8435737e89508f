"""Helpers that run a script as its users do: as a process, in a folder of its own."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)
ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")

TINY = ["--data", "folder", "--labeled", "5", "--batch", "2", "--k", "1", "--backbone", "resnet18", "--backbone-layers", "2",
        "--weights", "none", "--device", "cpu", "--long-side", "48", "--crop", "32", "--lr", "0.01", "--workers", "0",
        "--eval-every", "100", "--save-every", "1", "--log-every", "1"]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a minute or more; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def run_script(*arguments, script="cct.py", processes=1, check=0, timeout=120):
    """Run a script to its end. -> its output (stdout and stderr); fails unless the exit status is `check`."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    process = subprocess.Popen([*launch, str(ROOT / script), *map(str, arguments)], env=ENV, cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == check, output
    return output


def start_script(*arguments, script="cct.py"):
    """Start a script and return its process (in a process group of its own, so that its workers die with it)."""
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, arguments)], env=ENV, cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def kill(process):
    """kill -9 the process and its workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    process.stdout.close()


def wait_for(condition, timeout=60):
    end = time.time() + timeout
    while not condition():
        assert time.time() < end, "timed out"
        time.sleep(0.005)


def same_state(a, b):
    """Are two nested checkpoints equal to the bit?"""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Flags of a run of seconds, on a folder dataset of a dozen images; --out and --steps are the test's."""
    import fixtures
    return [*TINY, "--root", str(fixtures.make_folder(tmp_path_factory.mktemp("data") / "folder"))]


def run_here(*arguments):
    """Run cct.py's main in this process: faster than run_script by the start of Python."""
    import cct
    cct.main([*map(str, arguments)])
