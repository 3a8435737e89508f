"""Device, precision and processes: one code path for CPU and CUDA, one process and torchrun."""
import os
import time
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from common.random import Random
from common.settings import UserError, say

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Runtime:
    """Where and how a run computes. `main` is true on the one process that prints and writes."""

    def __init__(self, device="auto", precision="auto"):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no CUDA device is visible to PyTorch; use --device "
                            "cpu, or check the driver")
        cuda = device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cpu")
        if cuda:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            try:
                torch.cuda.set_device(self.device)
            except RuntimeError as error:
                raise UserError(f"process {self.rank} of {self.world} cannot use GPU "
                                f"{self.device.index} of {torch.cuda.device_count()} (torchrun's "
                                f"--nproc_per_node must not exceed the number of GPUs): "
                                f"{str(error).splitlines()[0]}") from None
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        self.compute_in(precision)
        self.new_scaler()
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1),
                                    device_id=self.device if cuda else None)

    def compute_in(self, precision):
        """Choose the precision: auto, fp32, bf16 or fp16."""
        cuda = self.device.type == "cuda"
        if precision == "auto" and cuda:
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if bf16 else "fp16"
        elif precision == "auto":
            precision = "fp32"
        if precision == "fp16" and not cuda:
            raise UserError("--precision fp16 needs a CUDA device; on the CPU use fp32 or bf16")
        self.precision = precision

    def __str__(self):
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else "CPU"
        return f"{self.world} x {name}, {self.precision}, torch {torch.__version__}"

    def say(self, text):
        """Print a line for the user, once."""
        if self.main:
            say(text)

    def new_scaler(self):
        """Begin with a fresh gradient scaler, as every training does; it acts with fp16 only."""
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def autocast(self):
        """Context in which networks compute in the run's precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    def place(self, module):
        """To the device, in channels_last order; of several processes, every BatchNorm2d becomes a
        synchronised one, in place."""
        for norm in module.modules() if self.world > 1 else ():
            if type(norm) is nn.BatchNorm2d:  # a frozen one has nothing to synchronise
                norm.__class__ = SyncBatchNorm  # parameters, buffers and settings stay as they are
        return module.to(self.device, memory_format=torch.channels_last)

    def wrap(self, module, compiled=False):
        """The module for training: compiled if asked, wrapped in DDP if there are several
        processes. The module itself stays as it is, for images of any size."""
        if compiled:
            module = torch.compile(module)
        if self.world == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        module = DistributedDataParallel(module, device_ids=ids)
        module.broadcast_buffers = False  # synchronised BN keeps them equal
        return module

    def share(self, count, flag="--batch"):
        """This process's share of a global batch. Raises UserError if it cannot be split evenly."""
        if count % self.world:
            raise UserError(f"{flag} {count} cannot be split over {self.world} processes; use a "
                            f"multiple of {self.world}")
        return count // self.world

    def sum(self, tensor):
        """Sum over processes (of a detached copy)."""
        tensor = tensor.detach().clone()
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor):
        """Mean over processes."""
        return self.sum(tensor) / self.world

    def count(self, mask):
        """Mean over the processes of the number of true entries of a bool tensor.

        A loss that divides its local sum by this number is, once DDP has averaged the gradients,
        the mean over the global batch. At least 1 in all, so that an empty batch gives 0.
        """
        return self.mean(mask.sum()).clamp(min=1 / self.world)

    def gather(self, tensor):
        """Concatenation along dim 0 of every process's (equally shaped) detached tensor."""
        if self.world == 1:
            return tensor.detach()
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.detach().contiguous())
        return torch.cat(parts)

    def extremes(self, tensor):
        """Smallest and largest value in the tensors of all processes, 0-d and detached."""
        low, high = self.gather(torch.stack([tensor.amin(), tensor.amax()])[None]).unbind(1)
        return low.min(), high.max()

    def average_grads(self, parameters):
        """Average the gradients of parameters outside the DDP wrapper, in one collective."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.world > 1 and grads:
            flat = self.mean(torch.cat([g.flatten() for g in grads]))
            for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
                grad.copy_(part.view_as(grad))

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def close(self):
        """Leave the group of processes."""
        if dist.is_initialized():
            # destroy_process_group holds the GIL and waits for gloo's threads, which need the GIL
            # to free their last tensors: without a pause this is a deadlock (torch 2.11)
            time.sleep(0.5)
            dist.destroy_process_group()

    def random(self, *key):
        """Random numbers for this process's share of a global batch, a pure function of `key`."""
        return Random(key, self.device, self.rank, self.world)


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes, whose batches have equal sizes.
    torch's SyncBatchNorm allows unequal sizes, and for that the host waits for the GPU."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            world = dist.get_world_size()
            parts = self.running_mean.new_zeros(world, 2, self.num_features)
            unused = torch.zeros_like(parts[0])
            local = torch.batch_norm_update_stats(x, *unused, 0.0)  # mean and variance, both [C]
            torch.stack(local, out=parts[dist.get_rank()])
            dist.all_reduce(parts)  # every process has filled its own row, the others are 0
            means, variances = parts.unbind(1)
            between, mean = torch.var_mean(means, 0, correction=0)
            var = variances.mean(0) + between  # Chan et al.; means of squares would cancel digits
            count = x.numel() // self.num_features * world
            if self.track_running_stats:
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return _Normalise.apply(x, self.weight, self.bias, mean, var, self.eps, count)


class _Normalise(torch.autograd.Function):
    """x^ * weight + bias, x^ = (x - mean) / sqrt(var + eps): `mean` and `var` are those of the
    `count` values that all processes have per channel, and depend on x in the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps, count):
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.count = count
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """dx = scale * (dy - mean(dy) - x^ * mean(dy * x^)), scale = weight / sqrt(var + eps), with
        means over all processes; weight and bias get this process's sums, which DDP averages"""
        x, weight, mean, var = ctx.saved_tensors
        inverse_std = torch.rsqrt(var + ctx.eps)
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse_std, True, ctx.eps, [False, True, True])
        sums = torch.stack([grad_weight, grad_bias])  # of dy * x^ and of dy
        dist.all_reduce(sums)
        scale = weight * inverse_std
        at_x, constant = scale * sums / -ctx.count
        grad_x = F.batch_norm(x, mean, var, at_x, constant, eps=ctx.eps)
        grad_x.addcmul_(grad, scale[:, None, None])
        return grad_x, grad_weight, grad_bias, None, None, None, None
