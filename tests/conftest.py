"""Helpers that run a script as its users do: here, or as a process in a folder of its own."""
import contextlib
import csv
import functools
import importlib
import io
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
from common.command_line import parse  # noqa: E402
from common.runtime import Runtime  # noqa: E402
from common.settings import UserError  # noqa: E402
from common.streams import to_device  # noqa: E402
torch.set_num_threads(1)
CTX = Runtime("cpu", "fp32")
ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")

SCRIPTS = ("cct", "three_stage", "c3_semiseg", "s4gan_mlmt")
TINY = {  # flags of a run of seconds on a folder dataset, and those that --supervised refuses
    "cct": ("--steps 6 --batch 2 --long-side 48 --crop 32 --lr 0.01", "--k 1"),
    "three_stage": ("--steps 2 --batch 4 --aspp-rates 1,2 --crop 32 --scale 0.5 0.7 --lr 0.01",
                    "--batch-l 2 --cutout 8 --ema 0.99"),
    "c3_semiseg": ("--steps 6 --batch 2 --groups 1 --long-side 48 --crop 32 --lr 0.01 --aspp-rates 1,2",
                   "--burn-in 0.5 --anchors 2 --consist-ramp 0 --contrast-ramp 0"),
    "s4gan_mlmt": ("",
                   "--steps 3 --batch 2 --aspp-rates 1,2 --crop 32 --scale 0.5 0.7 --lr 0.01 --d-width 4 --gamma 0.5 --lr-d 0.003 "
                   "--mlmt-size 32 --mlmt-batch 2 --mlmt-batch-u 2 --mlmt-epochs 2"),
}
SMALL = ("--data folder --labeled 5 --backbone resnet18 --backbone-layers 2 --weights none --device cpu "
         "--workers 0 --eval-every 100 --save-every 1 --log-every 1")
STEPS = {"cct": 6, "three_stage": 5, "c3_semiseg": 6, "s4gan_mlmt": 9}  # of these runs, in all


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --slow only")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def folder_data(tmp_path_factory):
    """The root of a folder dataset of a dozen images"""
    import fixtures
    return fixtures.make_folder(tmp_path_factory.mktemp("data") / "folder")


@pytest.fixture(scope="session")
def bare(folder_data):
    """Flags of a run of seconds, by script, that fit --supervised too; --out is the test's"""
    return {script: [*SMALL.split(), *TINY[script][0].split(), "--root", str(folder_data)] for script in SCRIPTS}


@pytest.fixture(scope="session")
def tiny(bare):
    """Flags of a run of seconds with the method itself, by script"""
    return {script: [*bare[script], *TINY[script][1].split()] for script in SCRIPTS}


@pytest.fixture(scope="session")
def whole(tmp_path_factory, tiny):
    """script -> (folder, output, seconds) of a run that nobody disturbed; made once"""
    @functools.cache
    def run(script):
        folder, output, start = tmp_path_factory.mktemp("whole") / "run", io.StringIO(), time.perf_counter()
        with contextlib.redirect_stdout(output):
            run_here(script, *tiny[script], "--out", folder)
        return folder, output.getvalue(), time.perf_counter() - start
    return run


@pytest.fixture
def scaled(monkeypatch):
    """Losses are scaled, as on a GPU in fp16."""
    def new_scaler(ctx):
        ctx.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(Runtime, "new_scaler", new_scaler)


def settled(script, flags):
    """The settings of a command line"""
    cfg, given = parse(script.Config, script.PRESETS, flags.split())
    script.settle(cfg, given)
    return cfg


def run_here(script, *arguments):
    """Run a script's main in this process: faster than run_script by the start of Python."""
    importlib.import_module(script).main([*map(str, arguments)])


def start_script(script, *arguments, processes=1):
    """Start a script and return its process, which leads a process group with its workers in it."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen([*launch, str(ROOT / f"{script}.py"), *map(str, arguments)], env=ENV, cwd=ROOT,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True, preexec_fn=listen)


def listen():
    """Listen to SIGHUP, which is ignored if the tests themselves run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def run_script(script, *arguments, processes=1, check=0, timeout=120):
    """Run a script to its end. -> its output; fails unless the exit status is `check`."""
    process = start_script(script, *arguments, processes=processes)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end(process, signal.SIGKILL)
        raise
    assert process.returncode == check, output
    return output


def end(process, number):
    """Send a signal to the process and its workers. -> its output"""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    return process.communicate(timeout=60)[0]


def wait_for(condition, timeout=60):
    end = time.time() + timeout
    while not condition():
        assert time.time() < end, "timed out"
        time.sleep(0.005)


def steps_done(folder):
    """Number of training steps that the logs of a run know of"""
    return sum(len(column(log.parent, "lr")) for log in folder.rglob("log.csv"))


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(seed, *shape, high=5):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def count(*modules, trained=False):
    """Number of parameters"""
    return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad or not trained)


def error_of(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def batch_of(stream, step, size):
    """What `endless` makes of the samples of a step"""
    samples = [stream[step * size + k] for k in range(size)]
    return to_device(torch.utils.data.default_collate(samples), "cpu")


def column(folder, name):
    """{step: value} of a column of a run's log"""
    with open(Path(folder) / "log.csv") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def last(folder):
    """last.pt, less the settings that may differ between a run and its resumption"""
    from common import checkpoint
    state = checkpoint.load(Path(folder) / "last.pt")
    for name in ("workers", "save_every", "stages", "root"):
        state["config"].pop(name, None)
    return state


def same_state(a, b):
    """Are two nested checkpoints equal to the bit?"""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def same_run(a, b):
    """Do two run folders hold the same checkpoints, pseudo-masks and losses, to the bit?"""
    def files(folder, pattern):
        return sorted(path.relative_to(folder) for path in Path(folder).rglob(pattern))
    assert files(a, "last.pt") == files(b, "last.pt") and files(a, "pseudo/*.png") == files(b, "pseudo/*.png")
    for name in files(a, "last.pt"):
        assert same_state(last(Path(a, name).parent), last(Path(b, name).parent)), name
    for name in files(a, "pseudo/**/*.png"):
        assert Path(a, name).read_bytes() == Path(b, name).read_bytes(), name
    for name in files(a, "log.csv"):
        assert untimed(Path(a, name)) == untimed(Path(b, name)), name


def untimed(log):
    """The rows of a log less what the clock says"""
    with open(log) as file:
        return [{name: text for name, text in row.items() if name not in ("seconds", "images_per_s", "data_wait")}
                for row in csv.DictReader(file)]
