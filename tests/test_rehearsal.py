"""A training step leaves its values on the GPU: the host reads none of them, and waits for no copy.

The scripts take two steps on PyTorch's device "meta", which every machine has. Its tensors have a shape, a
dtype and a device, but no values, so that it is an error to read one. Watch and WatchNumbers add errors where
the host would wait for a GPU without reading, and where devices are mixed. The traceback tells the line.

Not seen: what happens in 16 bits only (this device has no autocast), between processes, with --compile, or
in the steps of the optimisers, which are left out; whether CUDA has a kernel for an operation; a list as an
index, and a mask that is written through; single numbers of the host in an operation, which are allowed.
Evaluation, checkpoints and the log's rows may read: they are not reached, or left out.
"""
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from conftest import run_here
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.datasets.shapes import open_shapes
from common.log import Log
from common.random import Random
from common.run_folder import RunFolder
from common.runtime import Runtime

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class StepsDone(Exception):
    """Ends a run."""


class MetaRuntime(Runtime):
    def __init__(self, device, precision):
        super().__init__("cpu", "fp32")
        self.device = torch.device("meta")

    def random(self, *key):
        draws = Random(key)
        draws.device = self.device
        draws.generator = None  # this device has none
        return draws


class Watch(TorchDispatchMode):
    """Sees every operation, those of the backward pass too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        is_copy = func in COPIES
        in_background = is_copy and (kwargs.get("non_blocking") or True in args[2:])
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if is_copy or tensor.dim() > 0}
        assert len(devices) < 2 or in_background, f"{func} of tensors on {devices}"
        return out


class WatchNumbers(TorchFunctionMode):
    """Sees the calls of torch.tensor and as_tensor, which copy numbers to the device and wait for it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            assert not out.is_meta, f"numbers of the host are copied: {args[0]}"
        return out


@pytest.fixture
def take_steps(tmp_path, monkeypatch):
    """Function that runs a script for two steps on the device meta, and fails where the host would wait"""
    def begin_step(folder, step):
        if step == 0:
            watched.enter_context(Watch())
            watched.enter_context(WatchNumbers())
        if step == 2:
            raise StepsDone

    def run(script, flags):
        monkeypatch.setattr(f"{script}.Runtime", MetaRuntime)
        with pytest.raises(StepsDone), watched:
            run_here(script, *flags.split(), "--workers", 0, "--out", tmp_path / "run")

    watched = ExitStack()
    monkeypatch.setattr(RunFolder, "stop_if_asked", begin_step)  # every training step begins with it
    monkeypatch.setattr(Log, "flush", lambda log: None)
    # c3_semiseg reads a number where that costs no wait, which is on the CPU alone
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        monkeypatch.setattr(optimizer, "step", lambda self: None)
    return run


@pytest.mark.parametrize("script, flags", [
    ("cct", ""), ("cct", "--supervised --supervised-loss ab_ce"), ("cct", "--method mean_teacher"),
    ("cct", "--method vat"), ("cct", "--distance js --confidence 0.5 --pairwise 1 --vat-released"),
    ("cct", "--data shapes+shapes --lambda-adv 0.02 --k 1"), ("cct", "--weak"),  # steps of the classifier
    ("three_stage", ""), ("c3_semiseg", "--burn-in 0.001"),  # one step in the burn-in, one after it
    ("c3_semiseg", "--burn-in 0 --mix intra --keys teacher --sampling random --dcrs 1 --skip-classes 0"),
    ("s4gan_mlmt", "--branch s4gan"), ("s4gan_mlmt", "--branch mlmt"),
    ("s4gan_mlmt", "--branch s4gan --lambda-adv 1 --d-dropout elementwise")])
def test_a_step_stays_on_the_device(script, flags, take_steps):
    take_steps(script, flags)


def test_a_step_with_pseudo_labels_stays_on_the_device(take_steps, monkeypatch):
    monkeypatch.setattr("cct.weak_labels", lambda domain, *_: domain.data.train)
    take_steps("cct", "--weak --k 1")


@pytest.mark.parametrize("flags", ["--stages 2", "--stages 3 --con-target soft --bn frozen"])
def test_a_step_of_a_later_stage_stays_on_the_device(flags, take_steps, tmp_path):
    split = open_shapes().train
    for i, key in enumerate(split.keys):
        Image.fromarray(split.mask(i)).save(tmp_path / f"{key}.png")
    take_steps("three_stage", f"{flags} --masks {tmp_path}")


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: max(x.sum(), 1), lambda x: x.cpu(), lambda x: x[x > 0],
    lambda x: x[:, x.argmax()], lambda x: x.unique(), lambda x: torch.tensor(1.0, device=x.device),
    lambda x: torch.ones(3).to(x.device), lambda x: F.conv2d(x, torch.ones(1, x.shape[1], 1, 1))])
def test_what_makes_the_host_wait_is_seen(wait, take_steps, monkeypatch):
    monkeypatch.setattr("three_stage.cross_entropy", lambda logits, y, count: wait(logits))
    with pytest.raises((RuntimeError, AssertionError), match="(?i)meta|numbers"):
        take_steps("three_stage", "")
