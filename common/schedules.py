"""Learning-rate policy, ramp shapes and the EMA update: functions of the global step, so that a
resume needs no state."""
import copy
import math
import sys

import torch

from common.pictures import line_plot


def poly(step, steps):
    """Factor (1 - step/steps)^0.9 of the poly policy; 1 at step 0, 0 at the last."""
    return (1 - step / steps) ** 0.9


def set_lr(optimizer, lr):
    """Give every parameter group `lr` times its own `lr_mult`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)


def momentum_sgd(groups, lr, weight_decay, nesterov=False):
    """SGD with momentum 0.9, whose buffers are zeros from the start. torch's fused SGD would leave
    them uninitialised if fp16's scaler skips the first step, and fails if only some parameters of a
    group have one."""
    optimizer = torch.optim.SGD(groups, lr, 0.9, weight_decay=weight_decay, nesterov=nesterov,
                                fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


RAMPS = {  # shapes on x in [0, 1] (CCT, Fig. 8)
    "gaussian": lambda x: math.exp(-5 * (1 - x) ** 2),
    "exp": lambda x: math.exp(5 * (x - 1)),
    "log": lambda x: 1 - math.exp(-5 * x),
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
}


def ramp(shape, step, length):
    """Value in [0, 1] of the named ramp after `step` of `length` steps; constant after it, and 1
    when length is 0."""
    return RAMPS[shape](min(step / length, 1.0)) if length > 0 else 1.0


def draw_ramps(path):
    """Fig. 8 of CCT as a PNG."""
    curves = {name: [(t, ramp(name, t, 100)) for t in range(101)] for name in RAMPS}
    line_plot([("ramps over 100 steps", curves)], path, x_label="t")


def make_teacher(student):
    """A copy of the student that is never trained, for update_ema."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def update_ema(teacher, student, decay, buffers="copy"):
    """teacher <- decay * teacher + (1 - decay) * student for the parameters.

    buffers (BN statistics): "copy" the student's, "ema" averages them too, "keep" leaves the
    teacher's own. Integer buffers (counters) are copied unless kept.
    """
    averages = list(teacher.parameters())
    sources = [p.detach() for p in student.parameters()]
    copied = {}
    for buffer, source in zip(teacher.buffers(), student.buffers(), strict=True):
        if buffers == "ema" and buffer.is_floating_point():
            averages.append(buffer)
            sources.append(source)
        elif buffers != "keep":
            copied.setdefault(buffer.dtype, []).append((buffer, source))
    torch._foreach_lerp_(averages, sources, 1 - decay)
    for pairs in copied.values():  # one kernel per dtype; with mixed dtypes one per buffer
        torch._foreach_copy_(*zip(*pairs))


if __name__ == "__main__":  # python -m common.schedules ramps.png
    draw_ramps(sys.argv[1])
