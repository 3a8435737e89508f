"""Virtual adversarial perturbations (Miyato et al. 2018), as in CCT, App. G; used by cct.py alone,
and made to be copied."""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # whose rounding would exceed xi * r
def adversarial(z, logits_of, rng, xi=0.1, eps=2.0, released=False):
    """Eq. 13-15: the direction of length eps, per sample, in which the prediction changes most.

    logits_of: z -> logits [B, C, H, W]. rng: a common.random.Random. One power iteration, in
    float32. -> (r_adv like z, the clean prediction p [B, C, H, W]), both constants.
    released: the numbers of CCT's code, with which r_adv is rounding noise.
    """
    clean = z.detach().float()
    with torch.no_grad():
        p = logits_of(clean).float().softmax(1)
    start = rng.normal(*z.shape)
    if released:
        start = rng.uniform(*z.shape) - 0.5
        xi = 1e-6
    r = unit(start, released).requires_grad_()  # Eq. 13
    with torch.enable_grad():
        log_q = logits_of(clean + xi * r).float().log_softmax(1)
        kl = F.kl_div(log_q, p, reduction="sum") / len(z)
        # Eq. 14; unlike backward() this leaves the decoder's .grad alone
        gradient, = torch.autograd.grad(kl, r)
    return eps * unit(gradient, released), p  # Eq. 15


def unit(d, released=False):
    """Scale every sample to length 1. Divides by the largest entry first: tiny squares underflow.
    released: as the code, with 1e-8 added to the length"""
    dims = tuple(range(1, d.dim()))
    if released:
        return d / (d.square().sum(dims, keepdim=True).sqrt() + 1e-8)
    d = d / d.abs().amax(dims, keepdim=True).clamp(min=torch.finfo(d.dtype).tiny)
    return d / d.square().sum(dims, keepdim=True).sqrt().clamp(min=1e-12)


def input_vat(net, x, rng, xi=0.1, eps=2.0, **arguments):
    """VAT: -> (x + r_adv, the clean prediction p). Batch normalisation uses the batch's statistics,
    but does not update the running ones. arguments: further ones of net."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    r, p = adversarial(x, partial(net, **arguments), rng, xi, eps)
    for norm in norms:
        norm.track_running_stats = True
    return x + r, p
