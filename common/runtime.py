"""Device, precision, processes and randomness: one code path for CPU and CUDA, one process and torchrun."""
import os
import signal
import time
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.settings import UserError


class Runtime:
    """Where and how a run computes. `main` is true on the one process that prints and writes."""

    def __init__(self, device="auto", precision="auto"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no CUDA device is visible to PyTorch; use --device cpu, or check the driver")
        cuda = device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if precision == "auto":
            precision = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if cuda else "fp32"
        if precision == "fp16" and not cuda:
            raise UserError("--precision fp16 needs a CUDA device; on the CPU use fp32 or bf16")
        self.precision = precision
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.new_scaler()
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        self._stop = False

    def __str__(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{self.world} x {name}, {self.precision}, torch {torch.__version__}"

    def new_scaler(self):
        """Begin with a fresh gradient scaler, as every training does; without fp16 it does nothing."""
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def wrap(self, module):
        """DistributedDataParallel with synchronised batch normalisation, or the module itself when it is alone."""
        if self.world == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)  # SyncBN keeps buffers equal

    def synchronise_bn(self, module):
        """Replace BatchNorm2d by a synchronised one when there are several processes (before the optimiser is made)."""
        if self.world == 1:
            return module
        if self.device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(module)
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                sync = CpuSyncBatchNorm(child.num_features, child.eps, child.momentum)
                sync.load_state_dict(child.state_dict())
                sync.weight, sync.bias = child.weight, child.bias  # with their requires_grad
                sync.train(child.training)
                setattr(module, name, sync)
            else:
                self.synchronise_bn(child)
        return module

    def share(self, count, flag="--batch"):
        """This process's share of a global batch of `count`. Raises UserError when it cannot be split evenly."""
        if count % self.world:
            raise UserError(f"{flag} {count} cannot be split over {self.world} processes; use a multiple of {self.world}")
        return count // self.world

    def sum(self, tensor):
        """Sum over processes (in place on a detached copy)."""
        tensor = tensor.detach().clone()
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor):
        """Mean over processes."""
        return self.sum(tensor) / self.world

    def global_mean(self, total, count):
        """total / count as if all processes' shares were one batch, with the gradient that DDP's averaging expects.

        total: scalar with a graph; count: scalar tensor. An empty count gives 0 with a graph.
        """
        return total / (self.sum(count) / self.world).clamp(min=1 / self.world)

    def gather(self, tensor):
        """Concatenation along dim 0 of every process's (equally shaped) detached tensor."""
        if self.world == 1:
            return tensor.detach()
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.detach().contiguous())
        return torch.cat(parts)

    def average_grads(self, parameters):
        """Average the gradients of parameters that live outside the DDP wrapper, in one collective."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.world > 1 and grads:
            flat = self.mean(torch.cat([g.flatten() for g in grads]))
            for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
                grad.copy_(part.view_as(grad))

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def catch_sigterm(self, catch=True):
        """From now on SIGTERM only raises a flag, read by `stopping`; with `catch` off it ends the process at once."""
        signal.signal(signal.SIGTERM, (lambda *_: setattr(self, "_stop", True)) if catch else signal.SIG_DFL)

    def stopping(self, due=True):
        """True once any process got SIGTERM. With several processes the answer is only asked for when `due`."""
        if self.world == 1:
            return self._stop
        return due and bool(self.sum(torch.tensor(float(self._stop), device=self.device)))

    def close(self):
        """Leave the group of processes."""
        if dist.is_initialized():
            time.sleep(0.5)  # gloo's threads need the GIL to let go of their last tensors, and the group's end, which
            dist.destroy_process_group()  # holds the GIL, waits for them: too early, it waits for ever (torch 2.11)

    def random(self, *key):
        """Random numbers for this process's share of a global batch, a pure function of `key` (ints or strings)."""
        return Random(key, self.device, self.rank, self.world)


def mix(*key):
    """A 63-bit seed from ints and strings, well spread: neighbouring keys give unrelated streams."""
    words = [byte for part in key for byte in (str(part) + "/").encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


class Random:
    """Draws for a batch that may be shared out over processes: every process sees the same global batch of numbers
    and takes its own rows, so that N processes train exactly as one with the same global batch."""

    def __init__(self, key=(0,), device="cpu", rank=0, world=1):
        self.generator = torch.Generator(device=device).manual_seed(mix(*key))
        self.device, self.rank, self.world = device, rank, world

    def uniform(self, batch, *shape):
        """U[0, 1), [batch, *shape]: one draw per sample."""
        return self._rows(torch.rand, batch, shape)

    def normal(self, batch, *shape):
        """N(0, 1), [batch, *shape]: one draw per sample."""
        return self._rows(torch.randn, batch, shape)

    def shared(self, *shape):
        """U[0, 1), [*shape]: the same numbers on every process (one draw for the whole batch)."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def _rows(self, draw, batch, shape):
        numbers = draw((batch * self.world, *shape), generator=self.generator, device=self.device)
        return numbers[self.rank * batch:(self.rank + 1) * batch]


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch statistics over all processes' samples. torch's SyncBatchNorm does the same, on accelerators only."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _SumOverProcesses.apply(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        var = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]
