"""CCT: Semi-Supervised Semantic Segmentation with Cross-Consistency Training (Ouali, Hudelot, Tami; CVPR 2020)

A shared encoder h and a main decoder g are trained on labelled images. For an unlabelled image the encoder's output
z = h(x_u) is perturbed K times, and each perturbed z goes to its own auxiliary decoder g_a^k, whose prediction must
match that of g on the clean z. So L_u trains h and the auxiliary decoders, never g; L_s trains h and g, never the
auxiliary decoders. Only h and g are used at inference. Paper: arXiv 2003.09005 (v3 has the supplement).

Map (paper -> this file)
  Eq. 1 supervised CE            cross_entropy             Sec. 3.2.3 perturbations   f_noise, f_drop, con_msk, obj_msk,
  Eq. 2 L_u, K decoders          cross_consistency                                    g_cutout, i_vat, dropout
  Eq. 3 L = L_s + w_u L_u        train, last lines         Sec. 4.1, Table 11         Segmenter, Decoder
  Eq. 4 ab-CE                    annealed_cross_entropy    Sec. 4.2 mIoU              evaluate
  Eq. 7-9 MSE, KL, JS            distance                  Sec. 4.4.1 K per type      PERTURBATIONS, --k
  Eq. 10, B.2 pairwise, masking  cross_consistency         App. A Mean Teacher, VAT   train, input_vat
  Eq. 13-15 I-VAT                adversarial               App. C Algorithm 1         train
  Eq. 16 w_u(t), Fig. 8 ramps    consistency_weight        App. F multi-scale         predict
  Eq. 17 eta(t)                  eta                       Table 12                   Config, PRESETS
  Not here: image-level labels (Eq. 5, 6) and two domains (Sec. 3.4, Eq. 11, 12).

Deviations (paper / authors' code / here, and why)
  D1  Distances: Eq. 7-9 sum over classes / mean over classes / mean, because lambda_u = 30 was tuned with it.
  D2  JS: Eq. 9 / KLs reversed, unbounded / Eq. 9.     D3  Pairwise loss: added to L / never trained / --pairwise 1.
  D4  w_u: Gaussian (3.2.2) and exp (Eq. 16) / Gaussian / Gaussian, --ramp exp. It starts at lambda_u e^-5, not at 0.
  D5  F-Drop: gamma in [.6, .9] / [.7, .9] / paper. "10-40 %" is not what a threshold on z'/max drops: --drop-quantile.
  D6  I-VAT: xi 1e-6 / same, + 1e-8 in the norm: r_adv is rounding noise of length < 0.05, not 2 / xi 0.1, exact norm.
  D7  G-Cutout: area 0.4 / side 0.4 of blobs with > 50 contour points / side 0.4 of blobs with >= 64 pixels.
  D8  Last sub-pixel layer: no ReLU in Table 11 / ReLU / ReLU, --no-last-relu. Logits are then >= 0.
  D9  poly: 1 - (t/N)^.9 (misprint) / (1 - t/N)^.9 / as code. ResNet's lr: 0.01 / 0.001 / as code.
  D10 ab-CE ramp: 0.5 (Table 12), 0.4 (App. K) / 0.4, stops at 0.894 / 0.4, goes on to 0.9 as Eq. 17 does.
  D11 Labelled epochs: - / augmented batches cached and replayed / fresh augmentation. Baseline: - / fewer steps / same.
  D12 Crop 321 / 320 / 320; sizes not divisible by 8 are padded by reflection, the logits cropped, also in training.
  D13 Stem: - / three 3x3 convolutions / torchvision's ResNet with its 7x7 stem, because its weights are there.
  D14 From scratch (--weights none) the paper's ICNR head hardly trains: its sub-pixel convolutions then start as the
      identity (nearest-neighbour upsampling of the 1x1 logits, lifted over the ReLUs by a bias), and the backbone has
      the same lr as the heads.
  D15 Several GPUs: - / DataParallel, BN per GPU / one global batch: synchronised BN, losses and draws.
  D16 Mean Teacher, VAT: constants not given / absent / teacher in eval mode, decay --ema; VAT has I-VAT's constants.

Commands
  python cct.py                                                   first run: shapes, on a CPU in minutes
  python cct.py --data voc --root data --download --labeled 1464  the paper's Table 1
  torchrun --nproc_per_node=2 cct.py --data voc --labeled 1464    the same on 2 GPUs, 5 + 5 images each
  python cct.py --data voc --supervised                           its baseline; the same command again resumes a run
  python cct.py --evaluate runs/.../last.pt --multi-scale         or --predict runs/.../last.pt --images photos/
"""
import copy
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import checkpoint
from common import transforms as T
from common.backbones import PSP, RESNETS, ResNet, load_weights
from common.datasets import DATASETS, choose_labelled, open_dataset
from common.inference import panel, predict_folder
from common.log import Log
from common.miou import ConfusionMatrix
from common.regions import find_blobs
from common.runtime import Runtime, mix
from common.schedules import RAMPS, poly, ramp, set_lr, update_ema
from common.settings import Size, UserError, exclusive, from_dict, keep_config, option, parse, run
from common.streams import Scored, Stream, endless, once

PERTURBATIONS = {  # name: decoders of this type in "CCT" (Sec. 4.4.1; Table 12 has the hyper-parameters)
    "i_vat": 2, "dropout": 6, "g_cutout": 6, "con_msk": 2, "obj_msk": 2, "f_drop": 6, "f_noise": 6}


# ------------------------------------------------------------------------------------------------ settings

@dataclass
class Config:
    data: str = option("shapes", "dataset", DATASETS, group="run")
    root: str = option("data", "folder of the data: the dataset's own or its parent")
    download: bool = option(False, "let torchvision download the data (voc)")
    labeled: str = option("all", "labelled images: a count (1464), a fraction (1/8) or all")
    split: str = option("", "file that lists the labelled images, instead of a seeded draw")
    seed: int = option(0, "seed of the draw, the initialisation and the augmentation", within=(0, None))
    supervised: bool = option(False, "the baseline: labelled images only, same network, same number of steps")
    method: str = option("cct", "use of the unlabelled images (Table 4)", ("cct", "mean_teacher", "vat"))
    steps: int | None = option(None, "training steps (instead of --epochs)", within=(1, None))
    epochs: float | None = option(None, "passes over the unlabelled images (Table 12)", within=(0.001, None))
    out: str = option("", "run folder [runs/cct-<data>-<labeled>-seed<k>]; the same command resumes the run in it")
    evaluate: str = option("", "score this checkpoint and exit")
    predict: str = option("", "write palette PNGs of --images with this checkpoint and exit")
    images: str = option("", "folder of images for --predict")

    size: Size | None = option(None, "resize every image to this size", group="images")
    long_side: int | None = option(None, "resize the longer side to this, times --scale (App. I)", within=(1, None))
    scale: tuple[float, float] = option((1.0, 1.0), "range of random rescaling (Sec. 4.3)", within=(0.01, None))
    crop: Size | None = option(None, "random crop")
    flip: bool = option(False, "random horizontal flip")
    shift: int = option(0, "random shift of up to this many pixels", within=(0, None))
    eval_size: str = option("full", "score at the original size (full) or at --size (train)", ("full", "train"))
    multi_scale: bool = option(False, "score with 5 scales and flips (App. F)")

    backbone: str = option("resnet50", "encoder (Sec. 4.1)", RESNETS, group="network")
    backbone_layers: int = option(4, "keep only the first 2 or 3 layers of the ResNet, for small images", (2, 3, 4))
    weights: str = option("imagenet", "backbone weights: imagenet (torchvision), none, or a state-dict file")
    decoder_init: str | None = option(None, "sub-pixel convolutions: icnr (paper; default with weights) or identity "
                                            "(default with --weights none)", ("icnr", "identity"))
    last_relu: bool = option(True, "ReLU after the last sub-pixel convolution, as in the authors' code")

    perturbations: tuple[str, ...] = option(tuple(PERTURBATIONS), "types of auxiliary decoder (Fig. 5, 6)",
                                            tuple(PERTURBATIONS), group="consistency")
    k: int | None = option(None, "auxiliary decoders per type; without it 6 each, and 2 of i_vat, con_msk, obj_msk")
    lambda_u: float = option(30.0, "final weight of L_u (Table 12)")
    ramp: str = option("gaussian", "shape of its ramp-up (Sec. 3.2.2; Eq. 16 is exp)", tuple(RAMPS))
    ramp_length: float = option(0.1, "length of the ramp-up, as a share of the steps (Table 12)")
    distance: str = option("mse", "d(.,.) of Eq. 7, 8, 9", ("mse", "kl", "js"))
    confidence: float = option(0.0, "keep only pixels with main probability above this (App. B.2 has 0.5)")
    pairwise: float = option(0.0, "weight of the pairwise loss over 8 random decoders (Eq. 10)")
    drop_range: tuple[float, float] = option((0.6, 0.9), "F-Drop: range of the threshold; released code 0.7 0.9")
    drop_quantile: bool = option(False, "F-Drop: drop the share 1-gamma of the cells instead of those above gamma*max")
    noise: float = option(0.3, "F-Noise: amplitude (Table 12)")
    dropout: float = option(0.5, "DropOut: rate (Table 12)")
    cutout: float = option(0.4, "G-Cutout: dropped share of the box (Table 12)")
    cutout_of: str = option("side", "G-Cutout: the share is of each side (released code) or of the area",
                            ("side", "area"))
    background: tuple[int, ...] = option((0,), "ids of the classes that count as context in the guided masks")
    vat_eps: float = option(2.0, "I-VAT and VAT: norm of the perturbation (Eq. 15)")
    vat_xi: float = option(0.1, "I-VAT and VAT: step of the power iteration (Eq. 13)")
    vat_released: bool = option(False, "I-VAT as released: uniform start, xi 1e-6, norm + 1e-8 (numerically inert)")

    ema: float = option(0.999, "Mean Teacher: decay of the teacher after the ramp-up, 0.99 within it", within=(0, 1))

    supervised_loss: str = option("ce", "L_s: ce (Eq. 1) or ab_ce (Eq. 4)", ("ce", "ab_ce"), group="optimisation")
    eta_final: float = option(0.9, "ab-CE: final threshold (Eq. 17)")
    eta_length: float = option(0.4, "ab-CE: ramp length as a share of the steps (App. K; Table 12 has 0.5)")
    batch: int = option(10, "labelled images per step over all processes; as many unlabelled ones", within=(1, None))
    optimizer: str = option("sgd", "sgd (momentum 0.9) or adam", ("sgd", "adam"))
    lr: float = option(0.01, "learning rate of PSP module and decoders (Table 12)", within=(0, None))
    backbone_lr_mult: float | None = option(None, "backbone's share of it [0.1; 1 with --weights none]", within=(0, None))
    weight_decay: float = option(1e-4, "on every parameter (Table 12)", within=(0, None))

    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"), group="machine")
    precision: str = option("auto", "auto is bf16 (fp16 on old GPUs) on CUDA and fp32 on CPU",
                            ("auto", "fp32", "bf16", "fp16"))
    compile: bool = option(False, "torch.compile the encoder")
    workers: int = option(4, "processes that decode and augment, per stream", within=(0, None))
    eval_every: int = option(1000, "steps between evaluations", within=(1, None))
    save_every: int = option(500, "steps between checkpoints", within=(1, None))
    log_every: int = option(20, "steps between log lines", within=(1, None))


PRESETS = {
    "shapes": dict(labeled="40", steps=1000, batch=6, flip=True, shift=6, backbone="resnet18", backbone_layers=2,
                   weights="none", optimizer="adam", lr=3e-3, k=1, lambda_u=15.0, vat_eps=5.0, ema=0.99, workers=0,
                   eval_every=250, save_every=100),
    "voc": dict(labeled="1464", epochs=50, batch=10, long_side=400, scale=(0.5, 2.0), crop=(320, 320), flip=True),
    "cityscapes": dict(labeled="100", epochs=50, batch=4, size=(512, 1024), eval_size="train"),
    "camvid": dict(labeled="100", epochs=50, batch=10, size=(360, 480), eval_size="train", eval_every=270,
                   save_every=135),
    "folder": dict(epochs=50, batch=10, long_side=400, scale=(0.5, 2.0), crop=(320, 320), flip=True),
}
PRESETS |= dict.fromkeys(("sunrgbd", "sunrgbd13"), dict(labeled="1500", epochs=100, size=(480, 640), eval_size="train"))
PRESETS |= dict.fromkeys(("pcontext", "pcontext59", "bdd100k"), PRESETS["folder"] | dict(labeled="1/8"))  # not in the paper
FREE = ("root", "download", "out", "evaluate", "predict", "images", "device", "workers", "compile", "eval_every",
        "save_every", "log_every")  # may differ between a run and its resumption


# ------------------------------------------------------------------------------------------------ model (Sec. 4.1)

class Decoder(nn.Module):
    """Table 11: 1x1 convolution to C channels, then three sub-pixel convolutions (1x1 to 4C, ReLU, PixelShuffle).

    Main and auxiliary decoders have this one architecture and share no weights. 512C + 12C^2 + 12C parameters.
    """

    def __init__(self, in_channels, num_classes, init="icnr", last_relu=True):
        super().__init__()
        self.last_relu = last_relu
        self.adapt = nn.Conv2d(in_channels, num_classes, 1, bias=False)
        self.subpixel = nn.ModuleList(nn.Conv2d(num_classes, 4 * num_classes, 1) for _ in range(3))
        nn.init.kaiming_normal_(self.adapt.weight, nonlinearity="relu")
        for conv in self.subpixel:
            icnr_(conv, init)
        if init == "identity":  # lifts the logits into the linear part of the ReLUs; softmax does not see a common shift
            nn.init.constant_(self.subpixel[0].bias, 4.0)

    def forward(self, z):
        """z [B, 512, h, w] -> logits [B, C, 8h, 8w]"""
        x = self.adapt(z)
        for i, conv in enumerate(self.subpixel):
            x = F.pixel_shuffle(self.act(conv(x), i), 2)
        return x

    def columns(self, z):
        """The same logits as [C, 64*B*h*w], one column per pixel, without moving a pixel.

        All layers are 1x1, so pixels do not mix, and a loss that is a mean over pixels need not know where they stand:
        the 4C rows of a layer's output are read as C rows of four times the columns, which is no copy. Column
        ((s3*4 + s2)*4 + s1)*B*h*w + cell is sub-pixel s1, s2, s3 of a cell (see columns_to_image).
        """
        x = self.adapt.weight.flatten(1) @ z.permute(1, 0, 2, 3).reshape(z.shape[1], -1)  # [C, B*h*w]
        for i, conv in enumerate(self.subpixel):
            x = torch.addmm(conv.bias[:, None], conv.weight.flatten(1), x)
            x = self.act(x, i).view(conv.in_channels, -1)
        return x

    def act(self, x, i):
        return F.relu_(x) if i < 2 or self.last_relu else x


def columns_to_image(columns, b, h, w):
    """Put pixels in Decoder.columns' order in their places: [..., 64*B*h*w] -> [..., B, 8h, 8w]"""
    x = columns.view(-1, 2, 2, 2, 2, 2, 2, b, h, w)  # .., (dy dx) of s3, of s2, of s1, cell
    return x.permute(0, 7, 8, 5, 3, 1, 9, 6, 4, 2).reshape(*columns.shape[:-1], b, 8 * h, 8 * w)


@torch.no_grad()
def icnr_(conv, init):
    """ICNR: the four sub-pixels of a class start with one weight row, so the layer starts as nearest upsampling.

    icnr (paper): a Kaiming-normal C x C matrix, biases as PyTorch draws them. identity: the identity matrix and no
    bias, so that the decoder starts as the nearest-neighbour upsampling of the 1x1 convolution's logits.
    """
    c = conv.in_channels
    kernel = nn.init.kaiming_normal_(torch.empty(c, c)) if init == "icnr" else torch.eye(c)
    conv.weight.copy_(kernel.repeat_interleave(4, 0)[:, :, None, None])
    if init == "identity":
        conv.bias.zero_()


class Segmenter(nn.Module):
    """f = g o h: dilated ResNet + PSP module (the encoder h), and the main decoder g."""

    def __init__(self, cfg, num_classes):
        super().__init__()
        self.backbone = ResNet(cfg.backbone, cfg.backbone_layers)
        self.psp = PSP(self.backbone.out_channels)
        self.main = Decoder(self.psp.out_channels, num_classes, cfg.decoder_init, cfg.last_relu)

    def encode(self, x):
        """h: [B, 3, H, W] -> z >= 0, [B, 512, ceil(H/8), ceil(W/8)]; H, W are padded to multiples of 8 by reflection"""
        bottom, right = (8 - x.shape[2] % 8) % 8, (8 - x.shape[3] % 8) % 8  # torch.compile cannot do -n % 8
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom), mode="reflect" if min(x.shape[2:]) > 7 else "replicate")
        return self.psp(self.backbone(x))

    def decode(self, z, size):
        """g: logits at the image size (H, W), the padding cropped away"""
        return self.main(z)[..., :size[0], :size[1]]

    def forward(self, x, x_u=None, decode_u=False):
        """Logits of x; with x_u also its z, or its logits. Two passes: each batch has its own BN statistics."""
        logits = self.decode(self.encode(x), x.shape[2:])
        if x_u is None:
            return logits
        z = self.encode(x_u)
        return logits, (self.decode(z, x_u.shape[2:]) if decode_u else z)


class Auxiliary(nn.Module):
    """The K auxiliary decoders g_a^k and the perturbation that each of them owns, in a fixed order."""

    def __init__(self, cfg, in_channels, num_classes):
        super().__init__()
        self.names = [name for name, count in PERTURBATIONS.items() if name in cfg.perturbations
                      for _ in range(cfg.k or count)]
        self.decoders = nn.ModuleList(
            Decoder(in_channels, num_classes, cfg.decoder_init, cfg.last_relu) for _ in self.names)
        context = torch.tensor([c in cfg.background for c in range(num_classes)])
        self.register_buffer("is_object", ~context, persistent=False)


# ------------------------------------------------------------------------------------------------ perturbations (Sec. 3.2.3)
# z: [B, 512, h, w]. rng: common.runtime.Random, whose draws are a function of (seed, step, decoder).
# Masks are constants; the gradient flows through z itself.

def f_noise(z, rng, amplitude=0.3):
    """F-Noise: z~ = z * N + z with N ~ U(-0.3, 0.3), one N for the whole batch (App. L)"""
    noise = amplitude * (2 * rng.shared(1, *z.shape[1:]) - 1)
    return z * (1 + noise)


def f_drop(z, rng, low=0.6, high=0.9, quantile=False):
    """F-Drop: zero the most active cells, those with z' >= gamma ~ U(0.6, 0.9), z' the channel sum over its maximum.

    quantile: zero the share 1 - gamma of each sample's cells, which is what "10 % to 40 %" in the paper needs.
    """
    activity, gamma = z.detach().float().mean(1).flatten(1), low + (high - low) * rng.shared(1)  # [B, h*w]
    if quantile:
        rank = (gamma * activity.shape[1]).long().clamp(max=activity.shape[1] - 1)
        threshold = activity.sort(1).values[:, rank]  # [B, 1]
    else:
        threshold = gamma * activity.amax(1, keepdim=True)
    return z * (activity < threshold).view(len(z), 1, *z.shape[2:])


def dropout(z, rng, p=0.5):
    """DropOut: spatial dropout, whole channels of a sample; survivors are scaled by 1 / (1 - p)"""
    keep = rng.uniform(*z.shape[:2], 1, 1) >= p
    return z * (keep / (1 - p)).to(z.dtype)


def con_msk(z, objects):
    """Con-Msk: hide the context, keep the detected objects. objects: bool [B, 8h, 8w], sampled at every 8th pixel"""
    return z * objects[:, None, ::8, ::8]


def obj_msk(z, objects):
    """Obj-Msk: hide the detected objects, keep the context"""
    return z * ~objects[:, None, ::8, ::8]


def g_cutout(z, blobs, rng, share=0.4, of="side"):
    """G-Cutout: zero a random rectangle in the bounding box of every detected object.

    blobs: from find_blobs on [B, 8h, 8w]. share: of each side of the box, or of its area. All rectangles of the batch
    are painted at once: their corners go into a difference image, whose double cumulative sum counts the covers.
    """
    (y0, x0, y1, x1), valid = blobs
    (b, _, h, w), side = z.shape, share if of == "side" else share ** 0.5
    u = rng.uniform(b, 2, 64 * h * w).transpose(0, 1).reshape(2, -1)
    rectangle = []
    for start, stop, draw in ((y0, y1, u[0]), (x0, x1, u[1])):
        length = stop - start
        offset = (draw * ((length * (1 - side)).long() + 1)).long()
        rectangle.append((start + offset, start + offset + (length * side).long()))
    (top, bottom), (left, right) = rectangle
    sample = torch.arange(b, device=z.device).repeat_interleave(64 * h * w)
    corners = torch.zeros(b * (8 * h + 1) * (8 * w + 1), dtype=torch.int32, device=z.device)
    for y, x, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        at = (sample * (8 * h + 1) + y) * (8 * w + 1) + x
        corners.index_add_(0, at.clamp(0, len(corners) - 1), sign * valid.int())
    covers = corners.view(b, 8 * h + 1, 8 * w + 1).cumsum(1).cumsum(2)
    return z * (covers[:, None, :-1:8, :-1:8] == 0)


def i_vat(z, logits_of, rng, xi=0.1, eps=2.0, released=False):
    """I-VAT: z~ = z + r_adv (App. G). logits_of: z -> logits [C, N] of this very decoder"""
    return z + adversarial(z, logits_of, rng, xi, eps, released)[0]


def adversarial(z, logits_of, rng, xi=0.1, eps=2.0, released=False):
    """Eq. 13-15: the direction of length eps, per sample, in which the prediction changes most (one power iteration).

    -> (r_adv like z, p [C, N] = the clean prediction), both constants. In float32.
    released: the authors' numbers, with which r_adv is rounding noise of almost no length (D6).
    """
    clean = z.detach().float()
    with torch.no_grad():
        p = logits_of(clean).float().softmax(0)
    xi, start = (1e-6, rng.uniform(*z.shape) - 0.5) if released else (xi, rng.normal(*z.shape))
    r = unit(start, released).requires_grad_()  # Eq. 13
    with torch.enable_grad():
        kl = F.kl_div(logits_of(clean + xi * r).float().log_softmax(0), p, reduction="sum") / len(z)
        gradient, = torch.autograd.grad(kl, r)  # Eq. 14; unlike backward() it leaves the decoder's .grad alone
    return eps * unit(gradient, released), p  # Eq. 15


def unit(d, released=False):
    """Scale every sample to length 1. Dividing by the largest entry first keeps tiny gradients exact."""
    dims = tuple(range(1, d.dim()))
    if released:
        return d / (d.square().sum(dims, keepdim=True).sqrt() + 1e-8)
    d = d / d.abs().amax(dims, keepdim=True).clamp(min=torch.finfo(d.dtype).tiny)
    return d / d.square().sum(dims, keepdim=True).sqrt().clamp(min=1e-12)


# ------------------------------------------------------------------------------------------------ losses and ramps

def cross_entropy(logits, y, ctx):
    """Eq. 1: L_s = mean over valid pixels of H(y, f(x)). logits [B, C, H, W], y [B, H, W] with 255 ignored -> scalar"""
    total = F.cross_entropy(logits.float(), y, ignore_index=T.IGNORE, reduction="sum")
    return ctx.global_mean(total, (y != T.IGNORE).sum())


def annealed_cross_entropy(logits, y, eta, ctx):
    """Eq. 4: L_s = mean over the pixels whose true class has a probability below eta of H(y, f(x)).

    At least one pixel per image is kept: the threshold is no lower than the (B+1)-th smallest probability.
    """
    loss = F.cross_entropy(logits.float(), y, ignore_index=T.IGNORE, reduction="none")
    valid = y != T.IGNORE
    p_true = torch.where(valid, (-loss.detach()).exp(), 2.0).flatten()
    n, batch = ctx.sum(valid.sum()), len(y) * ctx.world
    hardest = ctx.gather(p_true.topk(min(batch + 1, len(p_true)), largest=False).values).sort().values
    floor = hardest[(n - 1).clamp(0, min(batch, len(hardest) - 1))]
    keep = valid & (p_true.view_as(loss) < floor.clamp(min=eta))
    return ctx.global_mean((loss * keep).sum(), keep.sum())


def eta(step, cfg, num_classes):
    """Eq. 17: threshold of ab-CE, from 1/C up to 0.9"""
    t = step / max(cfg.eta_length * cfg.steps, 1)
    return min(cfg.eta_final, (1 - math.exp(-5 * t)) * (cfg.eta_final - 1 / num_classes) + 1 / num_classes)


def distance(kind, p, logits):
    """Eq. 7-9 at every pixel and class. p: main probabilities [C, N] (constant); logits [C, N] of an auxiliary decoder.

    mse: (p - q)^2.  kl: p log(p/q).  js: KL(p|m)/2 + KL(q|m)/2, m = (p + q)/2.  Their mean over C*N is Eq. 7-9 / C.
    """
    if kind == "kl":
        return torch.xlogy(p, p) - p * logits.log_softmax(0)
    q = logits.softmax(0)
    if kind == "mse":
        return F.mse_loss(q, p, reduction="none")
    log_p, log_q, log_m = (x.clamp(min=1e-30).log() for x in (p, q, (p + q) / 2))  # probabilities may underflow to 0
    return (p * (log_p - log_m) + q * (log_q - log_m)) / 2


def consistency_weight(step, cfg):
    """w_u(t): from lambda_u * e^-5 up to lambda_u within the first tenth of the training (Sec. 3.2.2; Eq. 16)"""
    return cfg.lambda_u * ramp(cfg.ramp, step, cfg.ramp_length * cfg.steps)


def cross_consistency(main, auxiliary, z, weight, step, cfg, ctx):
    """Eq. 2: L_u = 1/K sum_k d(g(z), g_a^k(z~_k)), and Eq. 10, both back-propagated here, one decoder at a time.

    main: Decoder g; auxiliary: the K decoders g_a; z: encoder output [B, 512, h, w]; weight: w_u.
    Every decoder's graph is freed before the next one is built, so that memory does not grow with K.
    -> (L_u, L_pairwise, gradient of the weighted and scaled sum w.r.t. z). The decoders' gradients are in their .grad.
    """
    (b, _, h, w), names = z.shape, auxiliary.names
    leaf = z.detach().float().requires_grad_()
    with torch.no_grad(), ctx.autocast():
        logits = main.columns(z)
    p = logits.float().softmax(0)  # the target is a constant: L_u does not train the main decoder
    keep = p.amax(0, keepdim=True) > cfg.confidence if cfg.confidence > 0 else None
    if {"con_msk", "obj_msk", "g_cutout"} & set(names):
        objects = columns_to_image(auxiliary.is_object[logits.argmax(0)], b, h, w)
        blobs = find_blobs(objects) if "g_cutout" in names else None

    def perturbed_logits(k):
        """logits [C, N] of decoder k on its own perturbed version of z"""
        z_k, rng, decoder = leaf, ctx.random(cfg.seed, "perturb", step, k), auxiliary.decoders[k]
        match names[k]:
            case "f_noise": z_k = f_noise(leaf, rng, cfg.noise)
            case "f_drop": z_k = f_drop(leaf, rng, *cfg.drop_range, cfg.drop_quantile)
            case "dropout": z_k = dropout(leaf, rng, cfg.dropout)
            case "con_msk": z_k = con_msk(leaf, objects)
            case "obj_msk": z_k = obj_msk(leaf, objects)
            case "g_cutout": z_k = g_cutout(leaf, blobs, rng, cfg.cutout, cfg.cutout_of)
            case "i_vat": z_k = i_vat(leaf, decoder.columns, rng, cfg.vat_xi, cfg.vat_eps, cfg.vat_released)
        with ctx.autocast():
            return decoder.columns(z_k).float()

    paired = []
    if cfg.pairwise > 0:
        paired = np.random.default_rng(mix(cfg.seed, "pairwise", step)).permutation(len(names))[:8]
        with torch.no_grad():
            mean_q = sum(perturbed_logits(k).softmax(0) for k in paired) / len(paired)
    loss_u = loss_pairwise = torch.zeros((), device=z.device)
    for k in range(len(names)):
        logits_k = perturbed_logits(k)
        d = distance(cfg.distance, p, logits_k)
        d = (d.mean() if keep is None else ctx.global_mean((d * keep).sum(), keep.sum() * len(d))) / len(names)
        total = weight * d
        if k in paired:  # sum_k (q_k - mean)^2 has the same gradient whether its mean is a constant or not
            variance = (logits_k.softmax(0) - mean_q).square().sum(0).mean() / len(paired)
            loss_pairwise, total = loss_pairwise + variance.detach(), total + cfg.pairwise * variance
        loss_u = loss_u + d.detach()
        ctx.scaler.scale(total).backward()
    return loss_u, loss_pairwise, leaf.grad.to(z.dtype)


# ------------------------------------------------------------------------------------------------ data (Sec. 4.2, 4.3)

class Augment:
    """Training transform, the same for labelled and unlabelled images (a class, so that workers can receive it)."""

    def __init__(self, cfg):
        self.cfg = cfg

    def __call__(self, image, mask, rng):
        cfg, (image, mask) = self.cfg, T.to_tensors(image, mask)
        if cfg.long_side:
            low, high = (int(cfg.long_side * s) for s in cfg.scale)
            image, mask = T.resize_long_side(image, mask, int(rng.integers(low, high + 1)))
        elif cfg.size:
            image, mask = T.resize(image, mask, cfg.size)
        image = T.normalise(image)
        if cfg.crop:
            image, mask = T.random_crop(*T.pad_to(image, mask, cfg.crop), cfg.crop, rng)
        if cfg.shift:
            image, mask = T.random_shift(image, mask, cfg.shift, rng)
        if cfg.flip:
            image, mask = T.random_flip(image, mask, rng)
        return image, mask


# ------------------------------------------------------------------------------------------------ evaluation (App. F, I)

@torch.no_grad()
def predict(net, x, cfg, ctx):
    """Logits [B, C, H, W] of x at its own size. --multi-scale: mean over 5 scales, each also mirrored (App. F)"""
    with ctx.autocast():
        if not cfg.multi_scale:
            return net(x).float()
        size, total = x.shape[2:], 0
        for scale in (0.5, 0.75, 1, 1.25, 1.5):
            scaled = x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            logits = net(scaled).float() + net(scaled.flip(3)).float().flip(3)
            total = total + F.interpolate(logits, size, mode="bilinear", align_corners=True) / 10
        return total


def evaluate(net, data, cfg, ctx):
    """Protocol: whole images, single scale (or --multi-scale), logits at image size, argmax; one confusion matrix over
    the split; 255 ignored. Each image is scored exactly once, on one process. -> ConfusionMatrix"""
    net.eval()
    confusion, size = ConfusionMatrix(len(data.classes), ctx.device), scoring_size(cfg)
    batch = cfg.batch if size or data.name == "shapes" else 1  # images of one size are batched
    for x, y in once(Scored(data.val, T.ForScoring(size), ctx), batch, cfg.workers, ctx):
        confusion.update(predict(net, x, cfg, ctx).argmax(1), y)
    confusion.reduce()
    net.train()
    return confusion


def scoring_size(cfg):
    """Size at which images are scored; None: each at its own (App. I: VOC; all others at the training size)"""
    if cfg.eval_size == "train" and not cfg.size:
        raise UserError("--eval-size train scores at --size, which is not set here: give --size, or --eval-size full")
    return cfg.size if cfg.eval_size == "train" else None


# ------------------------------------------------------------------------------------------------ training (Algorithm 1)

def train(cfg):
    """Train, or resume, the run in cfg.out; ends with the per-class table and the `final:` line. -> final mIoU, 0..1"""
    ctx = Runtime(cfg.device, cfg.precision)
    cfg.precision = ctx.precision  # config.json has what `auto` came to: a resumption must not change it
    data = open_dataset(cfg.data, cfg.root, cfg.download)
    labelled, unlabelled = choose_labelled(data, cfg.labeled, cfg.split, cfg.seed)
    unlabelled = unlabelled or list(range(len(data.train)))  # all are labelled: consistency on all of them
    if cfg.steps is None:
        cfg.steps = math.ceil(cfg.epochs * math.ceil(len(unlabelled) / cfg.batch))
    if any(c >= len(data.classes) for c in cfg.background):
        raise UserError(f"--background {','.join(map(str, cfg.background))}: {cfg.data} has classes 0..{len(data.classes) - 1}")
    if not 0 <= cfg.dropout < 1:
        raise UserError(f"--dropout {cfg.dropout}: expected a rate of at least 0 and below 1")
    if cfg.batch < 2:
        raise UserError("--batch 1: batch normalisation after the 1x1 pooling of the PSP module needs at least 2 images")
    folder, share, num_classes = Path(cfg.out), ctx.share(cfg.batch), len(data.classes)
    if ctx.main:
        folder.mkdir(parents=True, exist_ok=True)
        keep_config(folder, cfg, FREE)
    ctx.barrier()

    torch.manual_seed(mix(cfg.seed, "init"))  # the same initial weights on every process
    net = Segmenter(cfg, num_classes)
    auxiliary = Auxiliary(cfg, net.psp.out_channels, num_classes).to(ctx.device)
    resumed = (folder / "last.pt").exists()
    if not resumed:
        load_weights(net.backbone, cfg.backbone, cfg.weights, print if ctx.main else lambda _: None)
    net = ctx.synchronise_bn(net).to(ctx.device, memory_format=torch.channels_last)
    teacher = copy.deepcopy(net).requires_grad_(False).eval() if cfg.method == "mean_teacher" else None
    optimizer = make_optimizer(net, auxiliary, cfg)
    holders = dict(net=net, auxiliary=auxiliary, optimizer=optimizer, scaler=ctx.scaler)
    holders |= dict(teacher=teacher) if teacher else {}
    step, best, best_step = 0, 0.0, 0
    if resumed:
        state = checkpoint.load(folder / "last.pt", ctx.device)
        step, best, best_step = state["step"], state["best"], state["best_step"]
        for name, holder in holders.items():
            holder.load_state_dict(state[name])
        del state  # it would stay on the device
    about = dict(script="cct", config=asdict(cfg), classes=list(data.classes), palette=torch.from_numpy(data.palette))
    wrapped = ctx.wrap(net)
    if cfg.compile:
        net.compile()

    streams = [Stream(data.train, indices, Augment(cfg), cfg.seed, name, name == "labelled")
               for name, indices in (("labelled", labelled), ("unlabelled", unlabelled))]
    batches_l, batches_u = (endless(stream, share, step, cfg.workers, ctx) for stream in streams)
    log = Log(folder, cfg.steps, cfg.log_every, step, cfg.batch * (1 if cfg.supervised else 2), ctx.device, ctx.main, ctx.mean)
    log.say(f"{ctx}; {cfg.data}: {len(labelled)} labelled and {len(unlabelled)} unlabelled images, {len(data.val)} to "
            f"score ({data.scored_on}); {cfg.steps} steps" + (f", resumed at {step}" if step else ""))
    for note in data.notes:
        log.say(note)
    ctx.catch_sigterm()

    def save(name, **state):
        log.flush()  # stops the run here if a loss was not finite, the last good checkpoint kept
        if ctx.main:
            checkpoint.save(folder / name, about | dict(net=net.state_dict(), step=step) | state)

    def save_all():
        save("last.pt", best=best, best_step=best_step, **{name: h.state_dict() for name, h in holders.items()})

    def score():
        nonlocal best, best_step
        confusion = evaluate(net, data, cfg, ctx)
        if confusion.miou() > best:
            best, best_step = confusion.miou(), step
            save("best.pt", miou=best)
        log.evaluated(step, miou=confusion.miou(), best=best)
        if ctx.main:
            net.eval()
            panel(partial(predict, net, cfg=cfg, ctx=ctx), data, scoring_size(cfg), ctx.device).save(folder / "predictions.png")
            net.train()
            log.curves()
        return confusion

    net.train()
    while step < cfg.steps and not ctx.stopping(due=step % cfg.log_every == 0):
        lr, w_u = cfg.lr * poly(step, cfg.steps), consistency_weight(step, cfg)
        set_lr(optimizer, lr)
        with log.waiting():
            x_l, y_l = next(batches_l)
            x_u = None if cfg.supervised else next(batches_u)
        optimizer.zero_grad()
        if cfg.method == "vat" and not cfg.supervised:
            x_u, p = input_vat(net, x_u, ctx.random(cfg.seed, "vat", step), cfg)
        with ctx.autocast():
            if cfg.supervised:
                logits_l = wrapped(x_l)
            else:  # u is z (Fig. 3), or logits for the baselines of Table 4
                logits_l, u = wrapped(x_l, x_u, cfg.method != "cct")
        if cfg.supervised_loss == "ce":
            loss_s = cross_entropy(logits_l, y_l, ctx)  # Eq. 1
        else:
            loss_s = annealed_cross_entropy(logits_l, y_l, eta(step, cfg, num_classes), ctx)  # Eq. 4
        loss, terms = loss_s, dict(loss_s=loss_s.detach())
        outputs, grads = [], []
        if not cfg.supervised and cfg.method == "cct":
            loss_u, loss_pairwise, grad_z = cross_consistency(net.main, auxiliary, u, w_u, step, cfg, ctx)  # Eq. 2
            outputs, grads = [u], [grad_z]
            terms |= dict(loss_u=loss_u, w_u=w_u) | (dict(loss_pairwise=loss_pairwise) if cfg.pairwise else {})
        elif not cfg.supervised:
            if cfg.method == "mean_teacher":
                with torch.no_grad(), ctx.autocast():
                    p = as_columns(teacher(x_u)).softmax(0)
            loss_u = distance("mse" if cfg.method == "mean_teacher" else "kl", p, as_columns(u)).mean()  # App. A
            loss = loss_s + w_u * loss_u
            terms |= dict(loss_u=loss_u.detach(), w_u=w_u)
        # Eq. 3: L = L_s + w_u L_u; for CCT, d(w_u L_u)/dz enters the encoder's backward pass at z
        torch.autograd.backward([ctx.scaler.scale(loss), *outputs], [None, *grads])
        ctx.average_grads(auxiliary.parameters())
        ctx.scaler.step(optimizer)
        ctx.scaler.update()
        if teacher:
            update_ema(teacher, net, cfg.ema if step >= cfg.ramp_length * cfg.steps else 0.99)
        step += 1
        log.add(step, **terms, lr=lr)
        if step % cfg.eval_every == 0 and step < cfg.steps:
            score()
        if step % cfg.save_every == 0 or step == cfg.steps:
            save_all()
    if step < cfg.steps:
        save_all()
        log.say(f"SIGTERM: saved at step {step}; the same command resumes")
        raise SystemExit(143)
    confusion = score()
    log.say(confusion.table(data.classes))
    log.say(f"final: mIoU {100 * confusion.miou():.1f} (best {100 * best:.1f} at step {best_step}) {folder}")
    log.close()
    ctx.close()
    return confusion.miou()


def make_optimizer(net, auxiliary, cfg):
    """Two groups that hold every parameter once: the ResNet at lr * backbone_lr_mult; PSP and all decoders at lr"""
    groups = [dict(params=list(net.backbone.parameters()), lr_mult=cfg.backbone_lr_mult),
              dict(params=[*net.psp.parameters(), *net.main.parameters(), *auxiliary.parameters()], lr_mult=1.0)]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, cfg.lr, momentum=0.9, weight_decay=cfg.weight_decay, fused=True)
    return torch.optim.Adam(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def as_columns(logits):
    """[B, C, H, W] -> float32 [C, B*H*W]"""
    return logits.transpose(0, 1).flatten(1).float()


def input_vat(net, x, rng, cfg):
    """VAT baseline (App. A): x + r_adv, and the clean prediction p [C, B*H*W]; BN uses the batch and learns nothing"""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    r, p = adversarial(x, lambda x: as_columns(net(x)), rng, cfg.vat_xi, cfg.vat_eps)
    for norm in norms:
        norm.track_running_stats = True
    return x + r, p


# ------------------------------------------------------------------------------------------------ command line

def load_segmenter(path, given, ctx):
    """-> (net, cfg, state) from a checkpoint, with the flags that make sense for inference on top of its config"""
    state = checkpoint.load(path, ctx.device)
    if not isinstance(state, dict) or state.get("script") != "cct":
        raise UserError(f"{path} is not a checkpoint of this script: expected a file such as runs/.../last.pt")
    useless = sorted(set(given) - {*FREE, "data", "size", "eval_size", "multi_scale", "batch", "precision"})
    if useless:
        raise UserError(f"--{useless[0].replace('_', '-')} has no effect on a trained network; {path} brings its own settings")
    cfg = from_dict(Config, state["config"], given)
    net = Segmenter(cfg, len(state["classes"])).to(ctx.device, memory_format=torch.channels_last)
    net.load_state_dict(state["net"])
    return net, cfg, state


def score_checkpoint(cfg, given):
    """--evaluate: per-class table and mIoU of a checkpoint on the scored split"""
    ctx = Runtime(cfg.device, cfg.precision)
    net, cfg, state = load_segmenter(cfg.evaluate, given, ctx)
    data = open_dataset(cfg.data, cfg.root, cfg.download)
    if list(data.classes) != state["classes"]:
        names = ", ".join(state["classes"][:3])
        raise UserError(f"{cfg.evaluate} was trained on {len(state['classes'])} classes ({names}, ..), but --data {cfg.data} "
                        f"has {len(data.classes)} others: evaluate it on the dataset it was trained on")
    confusion = evaluate(net, data, cfg, ctx)
    if ctx.main:
        print(confusion.table(data.classes))
        print(f"{cfg.evaluate} (step {state['step']}): mIoU {100 * confusion.miou():.1f} on {len(data.val)} {data.scored_on} "
              f"images, {'5 scales + flips' if cfg.multi_scale else 'single scale'}")
    ctx.close()


def predict_images(cfg, given):
    """--predict: a palette PNG of class ids, at the image's own size, for every image of a folder"""
    ctx = Runtime(cfg.device, cfg.precision)
    net, cfg, state = load_segmenter(cfg.predict, given, ctx)
    out = given.get("out") or Path(cfg.predict).parent / "predictions"
    count = predict_folder(partial(predict, net.eval(), cfg=cfg, ctx=ctx), cfg.images, out, state["palette"],
                           scoring_size(cfg), ctx.device)
    print(f"{count} predictions in {out}")


def main(argv=None):
    cfg, given = parse(Config, PRESETS, argv, __doc__.partition("\n\n")[0])
    if cfg.evaluate:
        return score_checkpoint(cfg, given)
    if cfg.predict:
        return predict_images(cfg, given)
    if cfg.supervised and "method" in given:
        raise UserError("--supervised uses no unlabelled image, so --method has no meaning with it: drop one of the two")
    exclusive(cfg, given, "steps", "epochs")
    exclusive(cfg, given, "size", "long_side")
    scoring_size(cfg)  # a mistake in it is told now, not after the first steps
    scratch = cfg.weights == "none"
    cfg.decoder_init = cfg.decoder_init or ("identity" if scratch else "icnr")
    if cfg.backbone_lr_mult is None:
        cfg.backbone_lr_mult = 1.0 if scratch else 0.1
    labels = Path(cfg.split).stem if cfg.split else cfg.labeled.replace("/", "_")
    kind = "supervised" if cfg.supervised else cfg.method
    cfg.out = cfg.out or f"runs/cct-{cfg.data}-{labels}-seed{cfg.seed}" + (f"-{kind}" if kind != "cct" else "")
    train(cfg)


if __name__ == "__main__":
    sys.exit(run(main))
