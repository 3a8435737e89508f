"""CCT: Semi-Supervised Semantic Segmentation with Cross-Consistency Training
(Ouali, Hudelot, Tami; CVPR 2020; arXiv 2003.09005, whose version 3 holds the supplement)

A shared encoder h and a main decoder g are trained on labelled images. For an unlabelled image x_u
the encoder's output z = h(x_u) is perturbed K times. Each perturbed z goes to its own auxiliary
decoder g_a^k, whose prediction must match that of g on the clean z. So L_u trains h and the
auxiliary decoders, never g; L_s trains h and g, never the auxiliary decoders. Only h and g are used
at inference.

Map (paper -> this file)
  Eq. 1 supervised CE           cross_entropy           Sec. 3.2.3 feature-based  f_noise, f_drop
  Eq. 2 L_u over K decoders     train                     guided, I-VAT         con_msk, .., i_vat
  Eq. 3 L = L_s + w_u L_u       train                     random                  dropout
  Eq. 4 ab-CE                   without_easy_pixels     Sec. 4.1, Table 11        Segmenter, Decoder
  Eq. 7-9 MSE, KL, JS           distance                Sec. 4.2 mIoU             evaluate
  Eq. 10 pairwise loss          pairwise                Sec. 4.4.1 K per type     PERTURBATIONS, --k
  Eq. 13-15 I-VAT               i_vat, adversarial      App. A Mean Teacher, VAT  train, input_vat
  Eq. 16, Fig. 8 w_u(t)         consistency_weight      App. B.2 masking          --confidence
  Eq. 17 eta(t)                 eta                     App. F multi-scale        predict
  App. C Algorithm 1            train                   Table 12                  Config, PRESETS
  Not here: image-level labels (Eq. 5, 6) and two domains (Sec. 3.4, Eq. 11, 12).

Deviations: what the paper says, what the authors' code does, what is done here and why
  D1  Eq. 7 to 9 sum over the classes. The code takes their mean, for which lambda_u = 30 was
      chosen, and so do we.
  D2  The code's JS has both divergences reversed and is unbounded; ours is Eq. 9. With --confidence
      every distance is a mean over the pixels that are kept; the code's KL divides by another
      number, its JS keeps all.
  D3  The code computes the pairwise loss of Eq. 10, a sum over classes, but never trains with it;
      here it is added to L, without w_u and --confidence (--pairwise 1).
  D4  The ramp of w_u is Gaussian in Sec. 3.2.2, in the code and here, exp in Eq. 16 (--ramp exp).
      Both begin at e^-5 instead of 0.
  D5  F-Drop's threshold is drawn from [.6, .9] in the paper, which we follow, from [.7, .9] in the
      code. The paper's "10 to 40 %" of the cells is not what a threshold on the activity drops.
  D6  I-VAT: with the xi = 1e-6 of paper and code, and the code's 1e-8 in the norm, r_adv is
      rounding noise of a length below 0.05. We take xi = 0.1 and exact norms; --vat-released is the
      code's.
  D7  G-Cutout: the paper's 0.4 is a share of the box's area, the code's and ours of each of its
      sides. The code takes blobs with more than 50 contour points; we take those of 64 pixels or
      more. Context is class 0, whatever it is: --background.
  D8  The last sub-pixel layer has a ReLU in the code and here, none in Table 11: --no-last-relu.
  D9  The poly policy is printed as 1 - (t/N)^.9; the code's (1 - t/N)^.9 is used here. The ResNet's
      learning rate is a tenth of the others in the code and here, equal in the paper.
  D10 The ramp of ab-CE is 0.5 of the training in Table 12, 0.4 in App. K, in the code and here. The
      code's threshold stops at 0.894; ours goes on to the 0.9 of Eq. 17. As in the code, B pixels
      are kept at least: here of the images of each process.
  D11 The code replays augmented labelled batches from a cache, and its baseline takes fewer steps.
      Here every sample is augmented anew, and the baseline takes as many steps.
  D12 The crop is 321 in the paper, 320 in the code and here. Other sizes are padded to multiples of
      8 by reflection; L_s leaves padding out, L_u counts it. With --multi-scale each scale is
      padded on its own; the code pads once and squeezes.
  D13 The authors' ResNet begins with three 3x3 convolutions; ours is torchvision's, for its
      weights.
  D14 The ICNR head hardly trains from scratch (--weights none). There, its sub-pixel convolutions
      start as the identity, lifted over the ReLUs by a bias, and the backbone has the learning rate
      of the heads. z has 512 channels with ResNet-50, 128 with the ResNet-18 of shapes.
  D15 On several GPUs the code has BN statistics per GPU; here BN, losses and draws are those of one
      batch.
  D16 Mean Teacher and VAT are not in the code, and the paper gives no constants: the teacher is in
      eval mode and decays by --ema, VAT has I-VAT's constants.

Commands
  python cct.py                                               first run: shapes, on a CPU in minutes
  python cct.py --supervised                                  its baseline; again: resumes
  python cct.py --data voc --download --labeled 1464          the paper's Table 1
  torchrun --nproc_per_node=2 cct.py --data voc               the same on 2 GPUs, 5 + 5 images each
  python cct.py --evaluate runs/.../last.pt --multi-scale     score a checkpoint
  python cct.py --predict runs/.../last.pt --images photos/   palette PNGs
"""
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import transforms as T
from common.backbones import PSP, ResNet, load_weights
from common.checkpoint import load_network, open_checkpoint, same_classes
from common.command_line import check_needs, parse, run, run_name
from common.datasets import DATASETS, check_classes, choose_labelled, open_dataset
from common.inference import Examples, predict_folder
from common.miou import ConfusionMatrix
from common.random import mix
from common.regions import find_blobs
from common.run_folder import RunFolder
from common.runtime import Runtime
from common.schedules import RAMPS, make_teacher, poly, ramp, set_lr, update_ema
from common.settings import ANY, BaseConfig, option
from common.streams import Stream, endless, once

PERTURBATIONS = {  # decoders of each type in "CCT" (Sec. 4.4.1); their hyper-parameters: Table 12
    "i_vat": 2, "dropout": 6, "g_cutout": 6, "con_msk": 2, "obj_msk": 2, "f_drop": 6, "f_noise": 6}
SEMI = dict(supervised=False)  # what a flag needs to have an effect
CCT = SEMI | dict(method="cct")


# ---------------------------------------------------------------------- settings

@dataclass
class Config(BaseConfig):
    data: str = option("shapes", "dataset", DATASETS, group="run", scoring=True)
    epochs: float | None = option(None, "passes over the unlabelled images, instead of --steps",
                                  within=(0.001, 1e6), replaces="steps", group="run")
    method: str = option("cct", "use of the unlabelled images (Table 4)",
                         ("cct", "mean_teacher", "vat"), group="consistency", needs=SEMI)
    lambda_u: float = option(30.0, "final weight of L_u (Table 12)", within=(0, 1e6), needs=SEMI)
    ramp: str = option("gaussian", "how w_u rises to lambda_u (Sec. 3.2.2; Eq. 16: exp)",
                       tuple(RAMPS), needs=SEMI)
    ramp_length: float = option(0.1, "over which share of the steps it rises (Table 12)",
                                within=(0, 1), needs=SEMI)
    perturbations: tuple[str, ...] = option(tuple(PERTURBATIONS), "types of decoders (Fig. 5, 6)",
                                            tuple(PERTURBATIONS), needs=CCT)
    k: int | None = option(None, "decoders of each type [6; 2 of i_vat, con_msk, obj_msk]",
                           within=(1, 1000), needs=CCT)
    distance: str = option("mse", "d(.,.) of Eq. 7, 8, 9", ("mse", "kl", "js"), needs=CCT)
    confidence: float = option(0.0, "keep pixels of main probability above this (App. B.2: 0.5)",
                               within=(0, 1), needs=CCT)
    pairwise: float = option(0.0, "weight of the loss over 8 random decoders (Eq. 10)",
                             within=(0, 1e6), needs=CCT)
    drop_range: tuple[float, float] = option((0.6, 0.9), "F-Drop: range of gamma; released 0.7 0.9",
                                             within=(0, 1),
                                             needs=CCT | dict(perturbations="f_drop"))
    noise: float = option(0.3, "F-Noise: amplitude (Table 12)", within=(0, 100),
                          needs=CCT | dict(perturbations="f_noise"))
    dropout: float = option(0.5, "DropOut: rate (Table 12)", within=(0, 0.999),
                            needs=CCT | dict(perturbations="dropout"))
    cutout: float = option(0.4, "G-Cutout: share of each side of the box (Table 12)", within=(0, 1),
                           needs=CCT | dict(perturbations="g_cutout"))
    background: tuple[int, ...] = option((0,), "ids of the classes that are context in Con-Msk, "
                                               "Obj-Msk and G-Cutout; all others are objects",
                                         within=(0, 254), needs=CCT)
    vat_eps: float = option(2.0, "I-VAT, VAT: norm of the perturbation (Eq. 15)", within=(0, 1e6),
                            needs=SEMI | dict(method=("cct", "vat")))
    vat_xi: float = option(0.1, "I-VAT, VAT: step of the power iteration (Eq. 13)",
                           within=(1e-9, 1e6),
                           needs=SEMI | dict(method=("cct", "vat"), vat_released=False))
    vat_released: bool = option(False, "I-VAT as released (D6)", needs=CCT)
    ema: float = option(0.999, "Mean Teacher: decay after the ramp-up, 0.99 within it",
                        within=(0, 1), needs=SEMI | dict(method="mean_teacher"))

    shift: int = option(0, "random shift of up to this many pixels", within=(0, 10000),
                        group="augmentation")
    long_side: int | None = option(None, "resize the longer side to this, times --scale (App. I)",
                                   within=(8, 100000), replaces="size")
    scale: tuple[float, float] = option((1.0, 1.0), "range of random rescaling (Sec. 4.3)",
                                        within=(0.01, 100), needs=dict(long_side=ANY))
    multi_scale: bool = option(False, "score with 5 scales and flips (App. F)", scoring=True)

    decoder_init: str | None = option(None, "initial weights of the sub-pixel convolutions [icnr; "
                                            "identity with --weights none]",
                                      ("icnr", "identity"), group="network")
    last_relu: bool = option(True, "ReLU after the last sub-pixel convolution, as released")
    supervised_loss: str = option("ce", "L_s: ce (Eq. 1) or ab_ce (Eq. 4)", ("ce", "ab_ce"),
                                  group="optimisation")
    eta_final: float = option(0.9, "ab-CE: final threshold (Eq. 17)", within=(0, 1),
                              needs=dict(supervised_loss="ab_ce"))
    eta_length: float = option(0.4, "ab-CE: ramp, as a share of the steps (App. K; Table 12: 0.5)",
                               within=(0, 1), needs=dict(supervised_loss="ab_ce"))
    batch: int = option(10, "labelled images per step over all processes; as many unlabelled",
                        within=(2, 100000), scoring=True)
    optimizer: str = option("sgd", "sgd (momentum 0.9) or adam", ("sgd", "adam"))
    lr: float = option(0.01, "learning rate of PSP and decoders (Table 12)", within=(0, 1000))
    backbone_lr_mult: float | None = option(None, "share of --lr for the ResNet [0.1; 1 with "
                                                  "--weights none]",
                                            within=(0, 1000))
    weight_decay: float = option(1e-4, "on every parameter (Table 12)", within=(0, 1000))


PRESETS = {
    "shapes": dict(labeled="40", steps=1000, batch=6, flip=True, shift=6, backbone="resnet18",
                   backbone_layers=2, weights="none", optimizer="adam", lr=3e-3, k=1, lambda_u=15.0,
                   vat_eps=5.0, ema=0.99, workers=0, eval_every=250, save_every=100),
    "voc": dict(labeled="1464", epochs=50, long_side=400, scale=(0.5, 2.0), crop=(320, 320),
                flip=True),
    "cityscapes": dict(labeled="100", epochs=50, batch=4, size=(512, 1024), eval_size="train"),
    "camvid": dict(labeled="100", epochs=50, size=(360, 480), eval_size="train", eval_every=270),
    "folder": dict(epochs=50, long_side=400, scale=(0.5, 2.0), crop=(320, 320), flip=True),
    "sunrgbd": dict(labeled="1500", epochs=100, size=(480, 640), eval_size="train"),
}
PRESETS["sunrgbd13"] = PRESETS["sunrgbd"]
PRESETS |= dict.fromkeys(("pcontext", "bdd100k"), PRESETS["folder"] | dict(labeled="1/8"))
PRESETS["pcontext59"] = PRESETS["pcontext"] | dict(background=())  # these are not in the paper


def settle(cfg, given):
    """Fill in what one setting decides about others. Raises UserError for contradictions."""
    check_needs(cfg, given)
    scratch = cfg.weights == "none"
    if cfg.decoder_init is None:
        cfg.decoder_init = "identity" if scratch else "icnr"
    if cfg.backbone_lr_mult is None:
        cfg.backbone_lr_mult = 1.0 if scratch else 0.1
    cfg.out = cfg.out or run_name("cct", cfg, given)


# ---------------------------------------------------------------------- model (Sec. 4.1)

class Decoder(nn.Module):
    """Table 11: 1x1 convolution to C channels, then three sub-pixel convolutions (1x1 to 4C, ReLU,
    PixelShuffle). Main and auxiliary decoders have this one architecture and share no weights.
    512 C + 12 C^2 + 12 C parameters.
    """

    def __init__(self, in_channels, num_classes, init="icnr", last_relu=True):
        super().__init__()
        self.last_relu = last_relu
        self.adapt = nn.Conv2d(in_channels, num_classes, 1, bias=False)
        self.subpixel = nn.ModuleList(nn.Conv2d(num_classes, 4 * num_classes, 1) for _ in range(3))
        nn.init.kaiming_normal_(self.adapt.weight, nonlinearity="relu")
        for conv in self.subpixel:
            init_subpixel_(conv, init)
        if init == "identity":  # lifts the logits above the ReLUs; softmax ignores a common shift
            nn.init.constant_(self.subpixel[0].bias, 4.0)

    def forward(self, z):
        """z [B, 512, h, w] -> logits [B, C, 8h, 8w]"""
        x = self.adapt(z)
        for i, conv in enumerate(self.subpixel):
            x = conv(x)
            if i < 2 or self.last_relu:
                x = F.relu_(x)
            x = F.pixel_shuffle(x, 2)
        return x


@torch.no_grad()
def init_subpixel_(conv, init):
    """ICNR: the four sub-pixels of a class start with one weight row, as nearest upsampling.

    icnr (paper): a Kaiming-normal C x C matrix, biases as PyTorch draws them. identity: no bias and
    the identity matrix: the decoder starts as nearest upsampling of the first layer's logits.
    """
    c = conv.in_channels
    kernel = nn.init.kaiming_normal_(torch.empty(c, c)) if init == "icnr" else torch.eye(c)
    conv.weight.copy_(kernel.repeat_interleave(4, 0)[:, :, None, None])
    if init == "identity":
        conv.bias.zero_()


class Segmenter(nn.Module):
    """f = g o h: dilated ResNet and PSP module (the encoder h), and the main decoder g."""

    def __init__(self, cfg, num_classes):
        super().__init__()
        self.backbone = ResNet(cfg.backbone, cfg.backbone_layers)
        self.psp = PSP(self.backbone.out_channels)
        self.main = Decoder(self.psp.out_channels, num_classes, cfg.decoder_init, cfg.last_relu)

    def encode(self, x):
        """h: [B, 3, H, W] -> z >= 0, [B, 512, ceil(H/8), ceil(W/8)]; pads by reflection"""
        bottom = (8 - x.shape[2] % 8) % 8  # torch.compile cannot do -n % 8
        right = (8 - x.shape[3] % 8) % 8
        if bottom or right:
            mode = "reflect" if min(x.shape[2:]) > 7 else "replicate"
            x = F.pad(x, (0, right, 0, bottom), mode=mode)
        return self.psp(self.backbone(x))

    def decode(self, z, size):
        """g: logits at the image size (H, W), the padding cropped away"""
        return self.main(z)[..., :size[0], :size[1]]

    def forward(self, x, x_u=None, decode_u=False):
        """Logits of x; with x_u also its z, or its logits. Each batch has its own BN statistics."""
        logits = self.decode(self.encode(x), x.shape[2:])
        if x_u is None:
            return logits
        z = self.encode(x_u)
        return logits, (self.decode(z, x_u.shape[2:]) if decode_u else z)


class Auxiliary(nn.Module):
    """The K auxiliary decoders g_a^k; names[k] is the perturbation that decoder k owns."""

    def __init__(self, cfg, in_channels, num_classes):
        super().__init__()
        self.names = [name for name, count in PERTURBATIONS.items() if name in cfg.perturbations
                      for _ in range(cfg.k or count)]
        self.decoders = nn.ModuleList(
            Decoder(in_channels, num_classes, cfg.decoder_init, cfg.last_relu) for _ in self.names)
        is_object = torch.tensor([c not in cfg.background for c in range(num_classes)])
        self.register_buffer("is_object", is_object, persistent=False)


# ---------------------------------------------------------------------- perturbations (Sec. 3.2.3)
# z: [B, 512, h, w]. rng: common.random.Random, whose draws are a function of (seed, step, decoder).
# Masks are constants; the gradient flows through z itself.

def f_noise(z, rng, amplitude=0.3):
    """F-Noise: z~ = z * N + z with N ~ U(-0.3, 0.3), one N for the whole batch (App. L)"""
    noise = amplitude * (2 * rng.shared(1, *z.shape[1:]) - 1)
    return z * (1 + noise)


def f_drop(z, rng, low=0.6, high=0.9):
    """F-Drop: zero the most active cells, those with z' >= gamma ~ U(0.6, 0.9).

    z' is the sum over the channels (or their mean), divided by its maximum in the sample.
    """
    gamma = low + (high - low) * rng.shared(1)
    activity = z.detach().float().mean(1, keepdim=True)  # [B, 1, h, w]
    return z * (activity < gamma * activity.amax((2, 3), keepdim=True))


def dropout(z, rng, p=0.5):
    """DropOut: spatial dropout, whole channels of a sample; survivors are scaled by 1 / (1 - p)"""
    keep = rng.uniform(*z.shape[:2], 1, 1) >= p
    return z * (keep / (1 - p)).to(z.dtype)


def con_msk(z, objects):
    """Con-Msk: hide the context, keep the detected objects. objects: bool [B, 8h, 8w]"""
    return z * objects[:, None, ::8, ::8]


def obj_msk(z, objects):
    """Obj-Msk: hide the detected objects, keep the context. objects: bool [B, 8h, 8w]"""
    return z * ~objects[:, None, ::8, ::8]


def g_cutout(z, blobs, rng, share=0.4):
    """G-Cutout: zero a random rectangle in the bounding box of every detected object.

    blobs: from find_blobs on [B, 8h, 8w], with room for one per pixel. share: of each side of the
    box. All rectangles of the batch are painted at once: with +1 and -1 at their corners,
    cumulative sums over rows and columns count the rectangles that cover a pixel.
    """
    (y0, x0, y1, x1), valid = blobs
    b, _, h, w = z.shape
    height = 8 * h + 1  # of the difference image
    width = 8 * w + 1
    u = rng.uniform(b, 2, 64 * h * w).transpose(0, 1).reshape(2, -1)
    top, bottom = random_interval(y0, y1, share, u[0])
    left, right = random_interval(x0, x1, share, u[1])
    sample = torch.arange(b, device=z.device).repeat_interleave(64 * h * w)
    corners = torch.zeros(b * height * width, dtype=torch.int32, device=z.device)
    for y, x, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        at = (sample * height + y) * width + x
        corners.index_add_(0, at.clamp(0, len(corners) - 1), sign * valid.int())
    covers = corners.view(b, height, width).cumsum(1).cumsum(2)
    return z * (covers[:, None, :-1:8, :-1:8] == 0)


def random_interval(start, stop, share, u):
    """A part of [start, stop] with that share of its length, where u ~ U[0, 1) puts it"""
    length = ((stop - start) * share).long()
    room = ((stop - start) * (1 - share)).long() + 1
    start = start + (u * room).long()
    return start, start + length


def i_vat(z, decoder, rng, xi=0.1, eps=2.0, released=False):
    """I-VAT: z~ = z + r_adv (App. G), adversarial to this very decoder (z -> logits)"""
    return z + adversarial(z, decoder, rng, xi, eps, released)[0]


def adversarial(z, logits_of, rng, xi=0.1, eps=2.0, released=False):
    """Eq. 13-15: the direction of length eps, per sample, in which the prediction changes most.

    logits_of: z -> logits [B, C, H, W]. One power iteration, in float32. -> (r_adv like z, the
    clean prediction p [B, C, H, W]), both constants. released: the authors' numbers (D6).
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
    """Scale every sample to length 1, by its largest entry first: squares of tiny ones underflow.
    released: as the code, with 1e-8 added to the length"""
    dims = tuple(range(1, d.dim()))
    if released:
        return d / (d.square().sum(dims, keepdim=True).sqrt() + 1e-8)
    d = d / d.abs().amax(dims, keepdim=True).clamp(min=torch.finfo(d.dtype).tiny)
    return d / d.square().sum(dims, keepdim=True).sqrt().clamp(min=1e-12)


def main_prediction(net, auxiliary, z, ctx):
    """What the decoders are compared with and guided by: g on the clean z [B, 512, h, w], a
    constant, because L_u does not train g.
    -> (p [B, C, 8h, 8w], (objects bool [B, 8h, 8w], their blobs))"""
    with torch.no_grad(), ctx.autocast():
        logits = net.main(z).float()
    objects = auxiliary.is_object[logits.argmax(1)]
    blobs = find_blobs(objects) if "g_cutout" in auxiliary.names else None
    return logits.softmax(1), (objects, blobs)


def auxiliary_logits(k, auxiliary, z, guides, step, cfg, ctx):
    """g_a^k(z~_k): logits [B, C, 8h, 8w] of decoder k on its perturbation of z [B, 512, h, w]"""
    decoder = auxiliary.decoders[k]
    rng = ctx.random(cfg.seed, "perturb", step, k)
    objects, blobs = guides
    match auxiliary.names[k]:
        case "f_noise": z = f_noise(z, rng, cfg.noise)
        case "f_drop": z = f_drop(z, rng, *cfg.drop_range)
        case "dropout": z = dropout(z, rng, cfg.dropout)
        case "con_msk": z = con_msk(z, objects)
        case "obj_msk": z = obj_msk(z, objects)
        case "g_cutout": z = g_cutout(z, blobs, rng, cfg.cutout)
        case "i_vat": z = i_vat(z, decoder, rng, cfg.vat_xi, cfg.vat_eps, cfg.vat_released)
    with ctx.autocast():
        return decoder(z)


# ---------------------------------------------------------------------- losses and ramps

def cross_entropy(logits, y, count=None):
    """Eq. 1: L_s = mean over valid pixels of H(y, f(x)). logits [B, C, H, W] -> scalar

    y int64 [B, H, W], 255 ignored. count: the number to divide by (with several processes, their
    mean number of valid pixels); None: y's own. 0 with a graph if all is ignored.
    """
    total = F.cross_entropy(logits.float(), y, ignore_index=255, reduction="sum")
    if count is None:
        count = (y != 255).sum().clamp(min=1)
    return total / count


def without_easy_pixels(logits, y, threshold):
    """Eq. 4: y with 255 where the true class's probability reaches the threshold. Eq. 1 of it is
    ab-CE. B pixels of the batch are kept at least, ties aside (D10).

    logits [B, C, H, W], y int64 [B, H, W] with 255 ignored -> [B, H, W]
    """
    loss = F.cross_entropy(logits.detach().float(), y, ignore_index=255, reduction="none")
    p_true = torch.where(y == 255, 2.0, (-loss).exp())  # ignored pixels come last
    hardest = p_true.flatten().topk(min(len(y) + 1, y.numel()), largest=False).values
    kth = ((y != 255).sum() - 1).clamp(0, len(hardest) - 1)  # the (B+1)-th, or the last valid one
    return y.masked_fill(p_true >= hardest[kth].clamp(min=threshold), 255)


def eta(step, cfg, num_classes):
    """Eq. 17: threshold of ab-CE, from 1/C up to 0.9"""
    t = step / max(cfg.eta_length * cfg.steps, 1)
    low = 1 / num_classes
    return min(cfg.eta_final, (1 - math.exp(-5 * t)) * (cfg.eta_final - low) + low)


def distance(kind, p, logits):
    """Eq. 7-9 at every pixel: d(p, q), q = softmax(logits), mean over classes (D1) -> [B, H, W]

    mse: (p - q)^2.  kl: p log(p/q).  js: KL(p|m)/2 + KL(q|m)/2, m = (p + q)/2.
    p: main probabilities [B, C, H, W] (constant); logits [B, C, H, W] of an auxiliary decoder.
    """
    logits = logits.float()
    if kind == "kl":
        return (torch.xlogy(p, p) - p * logits.log_softmax(1)).mean(1)
    q = logits.softmax(1)
    if kind == "mse":
        return (p - q).square().mean(1)
    # probabilities may underflow to 0
    log_p, log_q, log_m = (x.clamp(min=1e-30).log() for x in (p, q, (p + q) / 2))  # js
    return (p * (log_p - log_m) + q * (log_q - log_m)).mean(1) / 2


def pairwise(logits, mean_q):
    """Eq. 10, its term of one decoder: mean over pixels of sum_c (q_c - mean_q_c)^2 -> scalar

    mean_q [B, C, H, W], the decoders' mean prediction, may be a constant: the gradient of the sum
    over the decoders is the same.
    """
    return (logits.float().softmax(1) - mean_q).square().sum(1).mean()


def consistency_weight(step, cfg):
    """Eq. 16: w_u(t) = lambda_u times --ramp, which rises over --ramp-length of the steps"""
    return cfg.lambda_u * ramp(cfg.ramp, step, cfg.ramp_length * cfg.steps)


# ---------------------------------------------------------------------- data (Sec. 4.2, 4.3)

class Augment:
    """Training transform, the same for labelled and unlabelled images."""

    def __init__(self, cfg):
        self.cfg = cfg

    def __call__(self, image, mask, rng):
        cfg = self.cfg
        image, mask = T.to_tensors(image, mask)
        if cfg.long_side:
            low, high = (int(cfg.long_side * s) for s in cfg.scale)
            image, mask = T.resize_long_side(image, mask, int(rng.integers(low, high + 1)))
        elif cfg.size:
            image, mask = T.resize(image, mask, cfg.size)
        image = T.normalise(image)
        if cfg.crop:
            image, mask = T.pad_to(image, mask, cfg.crop)
            image, mask = T.random_crop(image, mask, cfg.crop, rng)
        if cfg.shift:
            image, mask = T.random_shift(image, mask, cfg.shift, rng)
        if cfg.flip:
            image, mask = T.random_flip(image, mask, rng)
        return image, mask


def streams(data, labelled, unlabelled, step, cfg, ctx):
    """-> endless iterators, from this step on, of (images [B, 3, H, W], masks) and of images"""
    stream_l = Stream(data.train, labelled, Augment(cfg), cfg.seed, "labelled", True)
    stream_u = Stream(data.train, unlabelled, Augment(cfg), cfg.seed, "unlabelled", False)
    share = ctx.share(cfg.batch)
    return [endless(stream, share, step, cfg.workers, ctx) for stream in (stream_l, stream_u)]


# ---------------------------------------------------------------------- evaluation (App. F, I)

@torch.no_grad()
def predict(net, x, cfg, ctx):
    """Logits [B, C, H, W] of x at its own size. --multi-scale: mean over 5 scales, mirrored too"""
    with ctx.autocast():
        if not cfg.multi_scale:
            return net(x).float()
        size = x.shape[2:]
        total = 0
        for scale in (0.5, 0.75, 1, 1.25, 1.5):  # App. F
            scaled = x
            if scale != 1:
                scaled = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            logits = net(scaled).float() + net(scaled.flip(3)).float().flip(3)
            total = total + F.interpolate(logits, size, mode="bilinear", align_corners=True) / 10
        return total


def evaluate(net, data, cfg, ctx):
    """Protocol: whole images, single scale (or --multi-scale), logits at image size, argmax; one
    confusion matrix over the split; 255 ignored; each image once.
    -> (ConfusionMatrix, rows of the panel)"""
    was_training = net.training
    net.eval()
    confusion = ConfusionMatrix(len(data.classes), ctx.device)
    examples = Examples(len(data.val), ctx)
    one_size = cfg.scoring_size or data.one_size  # then images are batched
    transform = T.ForScoring(cfg.scoring_size)
    for x, y in once(data.val, transform, cfg.batch if one_size else 1, cfg.workers, ctx):
        prediction = predict(net, x, cfg, ctx).argmax(1)
        confusion.update(prediction, y)
        examples.add(x, y, prediction)
    confusion.reduce()
    net.train(was_training)
    return confusion, examples.rows


# ---------------------------------------------------------------------- training (Algorithm 1)

def train(cfg):
    """Train, or resume, the run in cfg.out; ends with the `final:` line. -> mIoU, 0..1"""
    ctx = Runtime(cfg.device, cfg.precision)
    cfg.precision = ctx.precision  # what `auto` came to must not change when a run is resumed
    data = open_dataset(cfg.data, cfg.root, cfg.download)
    labelled, unlabelled = choose_labelled(data, cfg.labeled, cfg.split, cfg.seed)
    unlabelled = unlabelled or labelled  # all are labelled: consistency on all of them
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * math.ceil(len(unlabelled) / cfg.batch))
    num_classes = len(data.classes)
    check_classes("background", cfg.background, data)
    folder = RunFolder("cct", cfg, data, ctx)

    torch.manual_seed(mix(cfg.seed, "init"))  # the same initial weights on every process
    net = Segmenter(cfg, num_classes)
    auxiliary = Auxiliary(cfg, net.psp.out_channels, num_classes).to(ctx.device)
    if folder.is_new:
        load_weights(net.backbone, cfg.backbone, cfg.weights, ctx.say)
    net = ctx.place(net)
    method = None if cfg.supervised else cfg.method
    teacher = make_teacher(net).eval() if method == "mean_teacher" else None
    optimizer = make_optimizer(net, auxiliary, cfg)
    step = folder.resume(cfg.batch * (2 if method else 1), cfg.steps, net=net, auxiliary=auxiliary,
                         teacher=teacher, optimizer=optimizer, scaler=ctx.scaler)
    wrapped = ctx.wrap(net, cfg.compile)
    batches_l, batches_u = streams(data, labelled, unlabelled, step, cfg, ctx)
    folder.introduce(labelled, unlabelled, step)

    net.train()
    while step < cfg.steps:
        folder.stop_if_asked(step)
        if step > 0 and step % cfg.eval_every == 0:
            confusion, examples = evaluate(net, data, cfg, ctx)
            folder.scored(step, confusion.miou(), examples)
        lr = cfg.lr * poly(step, cfg.steps)
        w_u = consistency_weight(step, cfg)  # Sec. 3.2.2, Eq. 16
        set_lr(optimizer, lr)
        with folder.log.waiting():
            x_l, y_l = next(batches_l)
            x_u = next(batches_u) if method else None
        optimizer.zero_grad()
        if method == "vat":
            x_u, p = input_vat(net, x_u, ctx.random(cfg.seed, "vat", step), cfg)
        with ctx.autocast():
            if x_u is None:
                logits_l = wrapped(x_l)
            else:  # u is z (Fig. 3), or logits for the baselines of Table 4
                logits_l, u = wrapped(x_l, x_u, method != "cct")
        if cfg.supervised_loss == "ab_ce":
            y_l = without_easy_pixels(logits_l, y_l, eta(step, cfg, num_classes))  # Eq. 4
        loss_s = cross_entropy(logits_l, y_l, ctx.count(y_l != T.IGNORE))  # Eq. 1
        terms = dict(loss_s=loss_s)
        if method == "cct":
            z = u.detach().float().requires_grad_()
            p, guides = main_prediction(net, auxiliary, u, ctx)
            keep = p.amax(1) > cfg.confidence  # App. B.2
            kept = ctx.count(keep)
            paired, mean_q = pairwise_mean(auxiliary, z, guides, step, cfg, ctx)
            loss_u = loss_pairwise = 0.0
            for k in range(len(auxiliary.names)):  # one graph at a time, however large K is
                logits_k = auxiliary_logits(k, auxiliary, z, guides, step, cfg, ctx)
                loss_k = (distance(cfg.distance, p, logits_k) * keep).sum() / kept  # Eq. 7-9
                total_k = w_u * loss_k / len(auxiliary.names)  # Eq. 2
                if k in paired:
                    loss_pair_k = pairwise(logits_k, mean_q) / len(paired)  # Eq. 10
                    total_k = total_k + cfg.pairwise * loss_pair_k
                    loss_pairwise += loss_pair_k.detach()
                ctx.scaler.scale(total_k).backward()  # into z.grad and the decoder's
                loss_u += loss_k.detach() / len(auxiliary.names)
            ctx.average_grads(auxiliary.parameters())
            # Eq. 3: L = L_s + w_u L_u; the gradient of the second term enters the encoder at z
            torch.autograd.backward([ctx.scaler.scale(loss_s), u], [None, z.grad.to(u.dtype)])
            terms |= dict(loss_u=loss_u, w_u=w_u)
            if paired:
                terms |= dict(loss_pairwise=loss_pairwise)
        elif method:
            if method == "mean_teacher":
                with torch.no_grad(), ctx.autocast():
                    p = teacher(x_u).float().softmax(1)
            loss_u = distance("kl" if method == "vat" else "mse", p, u).mean()  # App. A
            ctx.scaler.scale(loss_s + w_u * loss_u).backward()
            terms |= dict(loss_u=loss_u, w_u=w_u)
        else:
            ctx.scaler.scale(loss_s).backward()
        ctx.scaler.step(optimizer)
        ctx.scaler.update()
        if teacher is not None:
            ramping = step < cfg.ramp_length * cfg.steps
            update_ema(teacher, net, 0.99 if ramping else cfg.ema)
        step += 1
        folder.log.add(step, **terms, lr=lr)
        if step % cfg.save_every == 0 or step % cfg.eval_every == 0 or step == cfg.steps:
            folder.save(step)
    confusion, examples = evaluate(net, data, cfg, ctx)
    folder.scored(step, confusion.miou(), examples)
    folder.finish(confusion)
    return confusion.miou()


def make_optimizer(net, auxiliary, cfg):
    """Two groups that hold every parameter once: the ResNet, PSP and all decoders"""
    heads = [*net.psp.parameters(), *net.main.parameters(), *auxiliary.parameters()]
    groups = [dict(params=list(net.backbone.parameters()), lr_mult=cfg.backbone_lr_mult),
              dict(params=heads, lr_mult=1.0)]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, cfg.lr, 0.9, weight_decay=cfg.weight_decay, fused=True)
    return torch.optim.Adam(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def pairwise_mean(auxiliary, z, guides, step, cfg, ctx):
    """Eq. 10: -> (the numbers of 8 random decoders, their mean prediction [B, C, 8h, 8w])"""
    if not cfg.pairwise:
        return [], None
    order = np.random.default_rng(mix(cfg.seed, "pairwise", step)).permutation(len(auxiliary.names))
    chosen = order[:8].tolist()
    with torch.no_grad():
        total = sum(auxiliary_logits(k, auxiliary, z, guides, step, cfg, ctx).float().softmax(1)
                    for k in chosen)
    return chosen, total / len(chosen)


def input_vat(net, x, rng, cfg):
    """VAT (App. A): x + r_adv and the clean prediction p; BN uses the batch, learns nothing"""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    r, p = adversarial(x, net, rng, cfg.vat_xi, cfg.vat_eps)
    for norm in norms:
        norm.track_running_stats = True
    return x + r, p


# ---------------------------------------------------------------------- command line

def main(argv=None):
    cfg, given = parse(Config, PRESETS, argv, __doc__)
    if not cfg.evaluate and not cfg.predict:
        settle(cfg, given)
        train(cfg)
        return
    ctx = Runtime(cfg.device, cfg.precision)
    path = cfg.evaluate or cfg.predict
    cfg, state = open_checkpoint("cct", path, Config, given, ctx.device)
    net = load_network(Segmenter(cfg, len(state["classes"])), state, path, ctx.device)
    if cfg.evaluate:
        data = open_dataset(cfg.data, cfg.root)
        same_classes(data, state, path)
        confusion, _ = evaluate(net, data, cfg, ctx)
        ctx.say(confusion.table(data.classes))
        scales = "5 scales + flips" if cfg.multi_scale else "single scale"
        ctx.say(f"{path} (step {state['step']}): mIoU {100 * confusion.miou():.1f} on "
                f"{len(data.val)} {data.scored_on} images, {scales}")
    else:
        out = cfg.out or Path(path).parent / "predictions"
        network = partial(predict, net.eval(), cfg=cfg, ctx=ctx)
        predict_folder(network, cfg, out, state["palette"], ctx)
    ctx.close()


if __name__ == "__main__":
    sys.exit(run(main))
