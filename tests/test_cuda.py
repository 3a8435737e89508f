"""What only a GPU can show: mixed precision, compilation, and that no step waits for it."""
import importlib
import math

import pytest
import torch
import torch.distributed as dist
from conftest import SCRIPTS, column, run_here
from torch import nn

from common import checkpoint
from common.log import Log
from common.random import Random
from common.run_folder import RunFolder
from common.runtime import SyncBatchNorm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LOSSES = {"cct": ("loss_s", "loss_u"), "three_stage": ("loss_seg", "loss_con"),
          "c3_semiseg": ("loss_sup", "loss_consist"), "s4gan_mlmt": ("loss_ce", "loss_fm")}


class CpuDraws(Random):
    """The numbers of the CPU on any device; a GPU's generator gives others."""

    def __init__(self, key=(0,), device="cpu", rank=0, world=1):
        super().__init__(key, "cpu", rank, world)
        self.device = device

    def shared(self, *shape):
        return torch.rand(shape, generator=self.generator).to(self.device)

    def _rows(self, draw, batch, shape):
        numbers = draw((batch * self.world, *shape), generator=self.generator)
        return numbers[self.rank * batch:(self.rank + 1) * batch].to(self.device)


def train(tiny, script, out, *flags):
    run_here(script, *tiny[script], "--device", "cuda", *flags, "--out", out)
    return {name: column(out, name) for name in LOSSES[script]}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", ["--precision fp32", "--precision bf16", "--precision fp16",
                                   "--precision bf16 --compile --workers 2"])
def test_losses_are_those_of_the_cpu(tiny, tmp_path, monkeypatch, script, flags):
    monkeypatch.setattr("common.runtime.Random", CpuDraws)
    early = ["--burn-in", 0, "--dcrs", 1] if script == "c3_semiseg" else []  # all losses in step 1, of all pixels
    run_here(script, *tiny[script], *early, "--out", tmp_path / "cpu")
    found = train(tiny, script, tmp_path / "cuda", *early, *flags.split())
    for name, values in found.items():
        expected = column(tmp_path / "cpu", name)
        assert values.keys() == expected.keys() and all(map(math.isfinite, values.values()))
        first = min(expected)  # later ones drift apart
        assert values[first] == pytest.approx(expected[first], rel=0.1 if "16" in flags else 0.02, abs=0.002)
    for path in (tmp_path / "cuda").rglob("last.pt") if "fp16" in flags else ():
        scaler = checkpoint.load(path).get("scaler", dict(_growth_tracker=1))
        assert scaler["_growth_tracker"] > 0  # its last step was taken, not skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_synchronised_bn_of_one_process_is_pytorchs(tmp_path, dtype):
    torch.manual_seed(0)
    x, dy = (3 * torch.randn(2, 4, 8, 9, 7, device="cuda") + 1).to(dtype)
    weight, bias = torch.randn(2, 8)
    results = []
    dist.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1)
    for kind in (nn.BatchNorm2d, SyncBatchNorm):
        norm = kind(8)
        norm.load_state_dict(norm.state_dict() | dict(weight=weight, bias=bias))
        norm = norm.to("cuda")
        mine = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        y = norm(mine)
        y.backward(dy)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        results.append([y, mine.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    dist.destroy_process_group()
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch, script):
    expected = train(tiny, script, tmp_path / "whole", "--precision", "fp32")
    save = checkpoint.save

    def save_and_die(path, state):
        save(path, state)
        raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, "save", save_and_die)
        train(tiny, script, tmp_path / "torn", "--precision", "fp32")
    found = train(tiny, script, tmp_path / "torn", "--precision", "fp32")
    for name, values in found.items():
        assert values == pytest.approx(expected[name], rel=0.05, abs=0.01)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_step_waits_for_the_gpu(tiny, tmp_path, monkeypatch, script):
    """PyTorch itself stops a step that does. Log lines, evaluations and checkpoints may: they end the watch, and
    the next step begins it."""
    def watched_from(call, mode):
        def with_mode(*arguments, **values):
            torch.cuda.set_sync_debug_mode("default")
            result = call(*arguments, **values)
            torch.cuda.set_sync_debug_mode(mode)
            return result
        return with_mode
    module = importlib.import_module(script)
    places = [(RunFolder, "stop_if_asked", "error"), (RunFolder, "save", "default"), (Log, "flush", "default")]
    places += [(module, name, "default") for name in ("evaluate", "evaluate_classifier") if hasattr(module, name)]
    for owner, name, mode in places:
        monkeypatch.setattr(owner, name, watched_from(getattr(owner, name), mode))
    try:
        train(tiny, script, tmp_path, "--log-every", 1000, "--save-every", 1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
