"""C3-SemiSeg: Contrastive Semi-supervised Segmentation via Cross-set Learning and Dynamic Class-balancing
(Zhou, Xu, Zhang, Gao, Heng; ICCV 2021)

A student is trained with an EMA teacher. The teacher sees weakly augmented unlabelled crops; the student sees CutMix
mixtures drawn from labelled (weak) and unlabelled (strong) crops together. Its outputs are un-mixed, so that labels and
the teacher's outputs need no mixing. DCRS keeps the pixels on which the teacher is confident, by one moving threshold
per class; there the student must agree with the teacher, and an InfoNCE loss on pixel embeddings pulls classes apart
across all images. Only DeepLabv2 is used at inference, neither teacher nor projection head.

Map (paper -> this file)
  Eq. 1 L_sup                  cross_entropy            Sec. 3.2, 4.1 A, A^          Augment, color_jitter, rand_augment
  Eq. 2 L_consist              consistency              Sec. 3.3 hard anchors        sample_views
  Eq. 3, 5 L_contrast          contrastive, contrast    Sec. 3.4 DCRS                confident, class_thresholds
  Eq. 4 CutMix                 boxes, swap, pairing     Sec. 4.1 lambda_1, ramps     consistency_weight, contrast_weight
  Eq. 6 threshold EMA          confident                Fig. 1 student, teacher      Segmenter, update_teacher
  Eq. 7 L_total                train, last lines        Table 3 to 7                 --lambda-1, --contrast, --mix, ..

Deviations (paper / authors' code / here, and why)
  D1  ASPP: four rates / returns after the first sum, so only 6 and 12 work / 6 and 12, --aspp-rates 6,12,18,24.
  D2  Eq. 2: sum over classes / mean over classes / mean on Cityscapes and BDD100K, as lambda_1 = 50 was tuned with it;
      the sum with 2.63 = 50 / 19 on data with other numbers of classes: --no-divide-by-classes --lambda-1 2.63.
  D3  Eq. 1, 2: per image, then images / pooled per GPU / pooled in each of --groups, which stand for the GPUs' batches:
      CutMix pairs and contrast stay in a group too, DCRS spans all. N processes with the same --groups equal one.
  D4  Eq. 5: - / times tau / 0.1 / as code, --contrast-scale 1. Positives: own position left out, as in the code.
  D5  Contrast: all classes / never class 0, the road / as code on its two datasets only: --skip-classes.
  D6  Labelled anchors' keys: teacher's / the student's own, detached / as code (saves a pass), --keys teacher.
  D7  Burn-in: purely supervised / contrast on labelled images, both sides trained / as code, --no-contrast-burn-in.
      Ten epochs / 9 x 250 steps / as code. lambda_2: constant / 250-step ramp / as code. lambda_1 counts from its end.
  D8  DCRS: start not given / 0.9 / 0.9. s = 1: all kept / an error leaves 0.9 / all kept.
  D9  Rotation: within 10 degrees / integer, the black corners of unlabelled crops are trained on / they are left out of
      consistency, DCRS and contrast, --no-mask-invalid. Unlabelled frames are rotated after the resizing, not before.
  D10 EMA: 0.99 / min(1 - 1/(4m+1), 0.99), m-th step / as code, --no-ema-warmup.
  D11 lr: one / backbone tenth, but three updates per step by a duplicated list / backbone * 0.3, each updated once.
      Poly: the step's number not said / 1..N, the last step has lr 0 / 0..N-1.
  D12 Unlabelled images: train - D_L / broken for BDD and for other seeds than the first / train - D_L.
      Draws: - / with replacement / every image once per pass. BDD's strong view: as Cityscapes / jitter only / paper.
  D13 Scored: - / student of the best epoch / student, last step; best and the teacher's mIoU (miou_teacher) beside it.
      Images: - / OpenCV's bilinear / antialiased bilinear. D_U alone (Table 4): the logits go nearest / bilinear.
  D14 Several GPUs: - / losses per GPU / the same thanks to D3; BN, where it learns, is synchronised.
  D15 From scratch (--weights none) frozen BN and N(0, 0.01) heads cannot train: BN learns (the teacher averages its
      statistics too), heads have PyTorch's initialisation, the backbone has the lr of the heads.

Commands
  python c3_semiseg.py                                                  first run: shapes, on a CPU in minutes
  python c3_semiseg.py --data cityscapes --root data --labeled 100      Table 1, its first seed; also 372, 744, all
  torchrun --nproc_per_node=4 c3_semiseg.py --data cityscapes           the same on 4 GPUs, 4 + 4 images each
  python c3_semiseg.py --data cityscapes --labeled 100 --supervised     its baseline
  python c3_semiseg.py --data bdd100k --labeled 233                     Table 2; the same command again resumes a run
  python c3_semiseg.py --evaluate runs/.../last.pt --eval-net teacher   score the other network
  python c3_semiseg.py --predict runs/.../last.pt --images photos/      palette PNGs
"""
import copy
import hashlib
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from common import checkpoint
from common import transforms as T
from common.backbones import RESNETS, DeepLabV2, load_weights, upsample
from common.datasets import DATASETS, choose_labelled, open_dataset
from common.inference import panel, predict_folder
from common.log import Log
from common.miou import ConfusionMatrix
from common.runtime import Runtime, mix
from common.schedules import poly, ramp, set_lr, update_ema
from common.settings import Size, UserError, exclusive, from_dict, keep_config, option, parse, run
from common.streams import Scored, Stream, endless, once

VIEWS = ("W", "S", "SR")  # weak; colour jitter; colour jitter and RandAugment (Table 5)


# ------------------------------------------------------------------------------------------------ settings

@dataclass
class Config:
    data: str = option("shapes", "dataset", DATASETS, group="run")
    root: str = option("data", "folder of the data: the dataset's own or its parent")
    download: bool = option(False, "let torchvision download the data (voc)")
    labeled: str = option("all", "labelled images: a count (372), a fraction (1/8) or all")
    split: str = option("", "file that lists the labelled images, instead of a seeded draw")
    seed: int = option(0, "seed of the draw, the initialisation and the augmentation; the paper's: 12345, 23456, 34567",
                      within=(0, None))
    supervised: bool = option(False, "the baseline: labelled images only, same network, same number of steps")
    steps: int | None = option(25000, "training steps (Sec. 4.1)", within=(1, None))
    epochs: float | None = option(None, "passes over the unlabelled images, instead of --steps", within=(0.001, None))
    out: str = option("", "run folder [runs/c3_semiseg-<data>-<labeled>-seed<k>]; the same command resumes it")
    evaluate: str = option("", "score this checkpoint and exit")
    predict: str = option("", "write palette PNGs of --images with this checkpoint and exit")
    images: str = option("", "folder of images for --predict")

    size: Size | None = option(None, "resize every image to this size", group="images")
    long_side: int | None = option(None, "resize the longer side to this, instead of --size", within=(1, None))
    scales: tuple[float, float, float] = option((1.0, 1.0, 1.0), "random rescaling by one of three factors (BDD100K)",
                                                within=(0.01, None))
    crop: Size | None = option(None, "random crop")
    flip: bool = option(True, "random horizontal flip")
    rotate: int = option(10, "random rotation by up to this many degrees (Sec. 4.1)", within=(0, 180))
    student_aug: str = option("SR", "student's view of unlabelled images: weak, jitter, jitter + RandAugment", VIEWS)
    teacher_aug: str = option("W", "teacher's view of them (Table 5)", VIEWS)
    mask_invalid: bool = option(True, "leave the corners that rotation invents out of the losses on unlabelled images")
    eval_size: str = option("full", "score at the original size (full) or at --size (train)", ("full", "train"))
    eval_net: str = option("student", "network of the headline, best.pt and predictions", ("student", "teacher"))

    backbone: str = option("resnet101", "encoder CNN (Sec. 4.1)", RESNETS, group="network")
    backbone_layers: int = option(4, "keep only the first 2 or 3 layers of the ResNet, for small images", (2, 3, 4))
    weights: str = option("imagenet", "backbone weights: imagenet (torchvision), none, or a state-dict file")
    stride_on: str = option("1x1", "the bottleneck's strided convolution; released: 1x1", ("1x1", "3x3"))
    aspp_rates: tuple[int, ...] = option((6, 12), "dilations of SEG; the paper's ASPP has 6,12,18,24", within=(1, None))
    bn: str | None = option(None, "batch normalisation: frozen (default with weights), affine (weight and bias frozen) or "
                                  "learn (default with --weights none)", ("frozen", "affine", "learn"))
    head_init: str | None = option(None, "SEG and PROJ: normal = N(0, 0.01) (default with weights) or pytorch (default "
                                         "with --weights none)", ("normal", "pytorch"))

    lambda_1: float = option(50.0, "final weight of L_consist (Sec. 4.1); 0: without it (Table 3)", group="consistency")
    consist_ramp: float = option(0.16, "length of its ramp-up from the end of the burn-in, as a share of the steps")
    divide_by_classes: bool = option(True, "Eq. 2 over C, as released; without it take lambda_1 = 2.63")
    burn_in: float = option(0.09, "share of the steps without unlabelled images (Sec. 4.1: ten epochs); 1: all", within=(0, 1))
    ema: float = option(0.99, "decay alpha of the teacher (Sec. 4.1)", within=(0, 1))
    ema_warmup: bool = option(True, "smaller decay in the teacher's first 25 steps, as released")
    mix: str = option("cross", "CutMix (Table 6): cross pairs by chance, cross_strict a labelled with an unlabelled image",
                      ("cross", "cross_strict", "intra", "none"))
    dcrs: float = option(0.8, "DCRS: share s of a class's pixels to keep (Table 7); 1: all of them", within=(0, None))
    dcrs_beta: float = option(0.9, "DCRS: decay of the thresholds (Eq. 6)", within=(0, 1))
    dcrs_init: float = option(0.9, "DCRS: their start")

    contrast: str = option("both", "images whose embeddings are contrasted (Table 4)",
                           ("both", "labelled", "unlabelled", "none"), group="contrast")
    lambda_2: float = option(0.1, "weight of L_contrast (Sec. 4.1)")
    contrast_ramp: float = option(0.01, "length of its ramp-up from step 0, as a share of the steps; 0: none")
    contrast_burn_in: bool = option(True, "contrast of labelled images in the burn-in too, as released")
    contrast_scale: float | None = option(None, "factor of Eq. 5 [tau / 0.1 as released; the paper's is 1]")
    tau: float = option(0.15, "temperature (Sec. 4.1)", within=(0.001, None))
    views: int = option(20, "pixels per class and image; classes with more cells than that are sampled (Sec. 4.1)",
                       within=(2, None))
    sampling: str = option("hard", "half of them from wrong predictions, or all random (Table 4)", ("hard", "random"))
    keys: str = option("student", "whose embeddings are the keys of labelled anchors", ("student", "teacher"))
    skip_classes: tuple[int, ...] = option((), "classes without contrast; released: 0, the road")

    batch: int = option(16, "labelled images per step over all processes; as many unlabelled", group="optimisation",
                       within=(1, None))
    groups: int = option(4, "independent groups of a batch, as the paper's 4 GPUs; a multiple of the processes")
    lr: float = option(1.2e-4, "learning rate of SEG and PROJ (Sec. 4.1, Adam)", within=(0, None))
    backbone_lr_mult: float | None = option(None, "backbone's share of it [0.3; 1 with --weights none]", within=(0, None))

    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"), group="machine")
    precision: str = option("auto", "auto is bf16 (fp16 on old GPUs) on CUDA and fp32 on CPU",
                            ("auto", "fp32", "bf16", "fp16"))
    compile: bool = option(False, "torch.compile the student")
    workers: int = option(8, "processes that decode and augment, per stream", within=(0, None))
    eval_every: int = option(1000, "steps between evaluations", within=(1, None))
    save_every: int = option(500, "steps between checkpoints", within=(1, None))
    log_every: int = option(20, "steps between log lines", within=(1, None))


SUM = dict(divide_by_classes=False, lambda_1=2.63)  # what lambda_1 = 50 is over 19 classes, for any number of them
PRESETS = {
    "shapes": dict(labeled="40", steps=1000, batch=6, groups=1, crop=(80, 80), backbone="resnet18", backbone_layers=2,
                   weights="none", aspp_rates=(1, 3), lr=1.5e-3, lambda_1=25.0, views=8, burn_in=0.15, consist_ramp=0.3,
                   workers=0, eval_every=250, save_every=100),
    "cityscapes": dict(labeled="100", seed=12345, size=(512, 1024), crop=(256, 512), eval_size="train",
                       skip_classes=(0,), eval_every=250),
    "bdd100k": dict(labeled="233", steps=20000, batch=8, scales=(0.75, 1.0, 1.25), crop=(512, 512), skip_classes=(0,),
                    burn_in=0.225, consist_ramp=0.2, contrast_ramp=0.0125),
    "camvid": SUM | dict(labeled="100", steps=10000, batch=8, groups=2, size=(360, 480), crop=(256, 320),
                         eval_size="train", eval_every=250),
    "voc": SUM | dict(labeled="1464", long_side=400, scales=(0.75, 1.0, 1.25), crop=(320, 320)),
    "pcontext": SUM | dict(labeled="1/8", long_side=400, scales=(0.75, 1.0, 1.25), crop=(320, 320)),
    "folder": SUM | dict(steps=10000, batch=8, groups=2, long_side=400, scales=(0.75, 1.0, 1.25), crop=(320, 320)),
}
PRESETS["pcontext59"] = PRESETS["pcontext"]
PRESETS |= dict.fromkeys(("sunrgbd", "sunrgbd13"), PRESETS["folder"] | dict(labeled="1/8"))  # not in the paper
FREE = ("root", "download", "out", "evaluate", "predict", "images", "device", "workers", "compile", "eval_every",
        "save_every", "log_every")  # may differ between a run and its resumption


# ------------------------------------------------------------------------------------------------ model (Fig. 1, Sec. 4.1)

class Segmenter(nn.Module):
    """CNN, SEG and PROJ of Fig. 1; student and teacher are one each. Only `net` (CNN and SEG) is used at inference."""

    def __init__(self, cfg, num_classes):
        super().__init__()
        self.net = make_net(cfg, num_classes)
        self.projection = None
        if cfg.contrast != "none" and not cfg.supervised:
            z = self.net.body.out_channels
            self.projection = nn.Sequential(nn.Conv2d(z, 256, 1), nn.ReLU(), nn.Conv2d(256, 256, 1))
        for conv in self.heads():
            if cfg.head_init == "pytorch":
                conv.reset_parameters()
            else:
                nn.init.normal_(conv.weight, std=0.01)

    def heads(self):
        """The convolutions of SEG and PROJ"""
        return [m for part in (self.net.head, self.projection or nn.Sequential()) for m in part.modules()
                if isinstance(m, nn.Conv2d)]

    def forward(self, x):
        """[B, 3, H, W] -> logits [B, C, H, W] in float32, embeddings [B, 256, h, w] or None"""
        z = self.net.body(x)
        logits = upsample(self.net.head(z).float(), x.shape[2:])
        return logits, self.projection and self.projection(z)


def make_net(cfg, num_classes):
    """DeepLabv2, all that inference needs"""
    return DeepLabV2(num_classes, cfg.backbone, cfg.backbone_layers, cfg.aspp_rates, cfg.stride_on, cfg.bn)


def update_teacher(teacher, student, m, cfg):
    """At the teacher's m-th step: a copy of the student for m = 1, then teacher <- alpha teacher + (1 - alpha) student.

    alpha = min(1 - 1 / (4m + 1), 0.99), the first term only with --ema-warmup. Frozen BN has nothing to average.
    """
    if m == 1:
        return teacher.load_state_dict(student.state_dict())
    alpha = min(1 - 1 / (4 * m + 1), cfg.ema) if cfg.ema_warmup else cfg.ema
    update_ema(teacher, student, alpha, buffers="keep" if cfg.bn == "frozen" else "ema")


# ------------------------------------------------------------------------------------------------ augmentation (Sec. 3.2)

def color_jitter(x, rng):
    """S: brightness, contrast and saturation by factors in [0.5, 1.5], hue by up to 0.25 turns, in random order.

    x: PIL image (a third of a tensor's time); here and below no pixel moves.
    """
    adjust = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    amount = [*rng.uniform(0.5, 1.5, 3), rng.uniform(-0.25, 0.25)]
    for i in rng.permutation(4):
        x = adjust[i](x, float(amount[i]))
    return x


def solarize_add(x, amount):
    """Add to the values below 128"""
    return x.point([v + amount if v < 128 else v for v in range(256)] * 3)  # at most 127 + 110


OPS = {  # RandAugment's photometric operations: (image, level 0..10) -> image
    "autocontrast": lambda x, level: tvf.autocontrast(x),
    "equalize": lambda x, level: tvf.equalize(x),
    "invert": lambda x, level: tvf.invert(x),
    "posterize": lambda x, level: tvf.posterize(x, int(0.4 * level)),
    "solarize": lambda x, level: tvf.solarize(x, int(25.6 * level)),  # 256: nothing to do
    "solarize_add": lambda x, level: solarize_add(x, int(11 * level)),
    "color": lambda x, level: tvf.adjust_saturation(x, 0.18 * level + 0.1),
    "contrast": lambda x, level: tvf.adjust_contrast(x, 0.18 * level + 0.1),
    "brightness": lambda x, level: tvf.adjust_brightness(x, 0.18 * level + 0.1),
    "sharpness": lambda x, level: tvf.adjust_sharpness(x, 0.18 * level + 0.1),
}


def rand_augment(x, rng):
    """R: two of ten operations, with replacement, each applied with probability 1/2 at level N(10, 0.5) in [0, 10]"""
    for name in rng.choice(list(OPS), 2):
        level = float(min(max(rng.normal(10, 0.5), 0), 10))
        if rng.random() < 0.5:
            x = OPS[name](x, level)
    return x


def photometry(x, kind, rng):
    """One of VIEWS of an image, uint8 [3, H, W] -> the same"""
    if kind == "W":
        return x
    x = color_jitter(tvf.to_pil_image(x), rng)
    return tvf.pil_to_tensor(rand_augment(x, rng) if kind == "SR" else x)


def rotate(image, mask, degrees, rng):
    """By an integer angle of -degrees..degrees about the centre; what enters is black / ignore."""
    angle = int(rng.integers(-degrees, degrees + 1))
    if angle:
        image, mask = tvf.to_pil_image(image), tvf.to_pil_image(mask[None])
        image = tvf.pil_to_tensor(tvf.rotate(image, angle, InterpolationMode.BILINEAR, fill=0))
        mask = tvf.pil_to_tensor(tvf.rotate(mask, angle, InterpolationMode.NEAREST, fill=T.IGNORE))[0]
    return image, mask


def boxes(count, size, rng):
    """The rectangles of Eq. 4: half of the area, random aspect, anywhere inside. -> bool [count, 1, H, W], True in them

    u ~ U[0, 1): height H 0.5^u, width W 0.5^(1-u).
    """
    (u, *place), inside = rng.uniform(count, 3).T, []
    for side, share, where in zip(size, (0.5 ** u, 0.5 ** (1 - u)), place):
        length = (side * share).round()
        start = ((side - length) * where).round()
        offset = torch.arange(side, device=u.device) - start[:, None]
        inside.append((offset >= 0) & (offset < length[:, None]))
    return (inside[0][:, :, None] & inside[1][:, None])[:, None]


def pairing(mode, groups, n, rng):
    """Which image stands where: [2 groups n] indices into the n labelled images of every group, then the unlabelled.

    Position i is mixed with i + groups n. cross: a random permutation of a group's images; cross_strict: every labelled
    with an unlabelled one; intra: labelled i with i + n/2, and so the unlabelled; none: everyone stays.
    """
    l = torch.arange(groups * n, device=rng.device).view(groups, n)
    u = l + groups * n
    if mode == "cross":
        l, u = torch.cat([l, u], 1).gather(1, rng.uniform(groups, 2 * n).argsort(1)).chunk(2, 1)
    elif mode == "cross_strict":
        u = u.gather(1, rng.uniform(groups, n).argsort(1))
    elif mode == "intra":
        (a, b), (c, d) = l.chunk(2, 1), u.chunk(2, 1)
        l, u = torch.cat([a, c], 1), torch.cat([b, d], 1)
    return torch.cat([l.flatten(), u.flatten()])


def swap(x, box):
    """Eq. 4 for a batch: images i and i + n/2 exchange what is inside box i, which makes two complementary mixtures.

    x [n, C, h, w]; box bool [n/2, 1, H, W], taken at the nearest pixel where sizes differ. Its own inverse.
    """
    if box.shape[2:] != x.shape[2:]:
        box = F.interpolate(box.float(), x.shape[2:], mode="nearest") > 0
    a, b = x.chunk(2)
    return torch.cat([torch.where(box, b, a), torch.where(box, a, b)])


# ------------------------------------------------------------------------------------------------ DCRS (Sec. 3.4)

def class_thresholds(key, s, num_classes):
    """delta_{t,c}: the confidence of number floor(n_c s) of class c's n_c pixels, counted from 0 down from the surest.

    key: int64 [N], class * 2^32 - (bits of the float32 confidence), whose order is by class and then by falling
    confidence, so that one sort does all. -> (delta [C], n [C]); delta of a class without pixels means nothing.
    """
    key, first = key.sort().values, torch.arange(num_classes + 1, device=key.device) << 32
    start = torch.searchsorted(key, first - 2 ** 32, right=True)  # keys of class c are in (first[c - 1], first[c]]
    n = start.diff()
    at = start[:-1] + (n.double() * s).long()
    return (first[:-1] - key[at.clamp(max=len(key) - 1)]).int().view(torch.float32), n


def confident(q, valid, thresholds, cfg, ctx):
    """DCRS: M = [confidence >= threshold of the predicted class], after the thresholds' own update in place (Eq. 6):
    delta^_{t,c} = beta delta^_{t-1,c} + (1 - beta) delta_{t,c}, for the classes predicted anywhere in the global batch.

    q: the teacher's probabilities [B, C, H, W]; valid bool [B, H, W]. -> (classes [B, H, W], M bool [B, H, W])
    """
    confidence, predicted = q.max(1)
    if cfg.dcrs >= 1:
        return predicted, valid
    key = (torch.where(valid, predicted, len(thresholds)) << 32) - confidence.view(torch.int32)
    delta, n = class_thresholds(ctx.gather(key.flatten()), cfg.dcrs, len(thresholds))
    thresholds.copy_(torch.where(n > 0, cfg.dcrs_beta * thresholds + (1 - cfg.dcrs_beta) * delta, thresholds))
    return predicted, valid & (confidence >= thresholds[predicted])


# ------------------------------------------------------------------------------------------------ losses and ramps

def pooled_mean(values, keep, groups):
    """Mean over groups of the mean over a group's kept pixels (0 if none). values, bool keep: [B, H, W] -> scalar"""
    total, count = (values * keep).view(groups, -1).sum(1), keep.view(groups, -1).sum(1)
    return (total / count.clamp(min=1)).mean()


def cross_entropy(logits, y, groups):
    """Eq. 1: L_sup = mean over valid pixels of H(y, f(x)). logits [B, C, H, W], y [B, H, W], 255 ignored -> scalar"""
    loss = F.cross_entropy(logits.float(), y, ignore_index=T.IGNORE, reduction="none")
    return pooled_mean(loss, y != T.IGNORE, groups)


def consistency(logits, q, keep, groups, divide_by_classes=True):
    """Eq. 2: L_consist = mean over confident pixels of -sum_c q_c log p_c, over C as released (D2).

    logits [B, C, H, W] of the student; q [B, C, H, W] the teacher's probabilities (constant); keep = M bool [B, H, W]
    """
    loss = pooled_mean(-(q * logits.float().log_softmax(1)).sum(1), keep, groups)
    return loss / logits.shape[1] if divide_by_classes else loss


def sample_views(classes, predicted, u, num_classes, views=20, hard=True):
    """Segmentation-aware sampling: `views` distinct cells of every class with more than `views` cells, in every image.

    Half of them are hard (predicted otherwise), half easy; if one kind is short, the other fills up. hard=False: all at
    random. classes [B, N] (255: none), predicted [B, N], u [B, N] ~ U[0, 1) -> (cells [B, C, V], present bool [B, C])
    """
    easy = (classes == predicted) | (not hard)
    kind = torch.where(classes == T.IGNORE, 2 * num_classes, 2 * classes + easy)  # [B, N]: 2c hard, 2c+1 easy
    order = (kind + u.double()).argsort(1)  # by kind, and at random within it
    count = torch.zeros(len(u), 2 * num_classes + 1, dtype=torch.long, device=u.device)
    count.scatter_add_(1, kind, torch.ones_like(kind))
    start = count.cumsum(1) - count
    n_hard, n_easy, first_hard, first_easy = (x[:, k:-1:2, None] for x in (count, start) for k in (0, 1))  # [B, C, 1]
    half, slot = views // 2, torch.arange(views, device=u.device)
    take = torch.where(n_easy >= views - half, n_hard.clamp(max=half), views - n_easy)  # so many hard ones
    at = torch.where(slot < take, first_hard + slot, first_easy + slot - take).clamp(0, order.shape[1] - 1)
    return order.gather(1, at.flatten(1)).view(at.shape), (n_hard + n_easy)[..., 0] > views


def contrastive(f, keys, classes, valid, tau, rows=512):
    """Eq. 5: mean over anchors i of 1/|P_i| sum_{j in P_i} -log[ e^{s_ij} / (e^{s_ij} + sum_{k in N_i} e^{s_ik}) ],
    s_ij = <f_i, k_j> / tau; P_i: the keys of i's class but its own; N_i: the keys of other classes.

    f, keys [n, D], normalised here; classes [n]; valid bool [n]: rows that exist. -> scalar, 0 without valid anchors
    Each term is softplus(log sum_{k in N_i} e^{s_ik} - s_ij). No n x n matrix is built, but one of `rows` anchors at a
    time, again in the backward pass: with n = 12,160 (32 images, 19 classes, 20 views) a float32 block is 24 MiB instead
    of 564, and about eight live at once (measured: 200 MB).
    """
    f, keys = F.normalize(f.float(), dim=1), F.normalize(keys.float(), dim=1)

    def block(f_i, keys, i):
        s = f_i @ keys.T / tau  # [rows, n]
        same = classes[i:i + rows, None] == classes
        negatives = s.masked_fill(same | ~valid, -1e9).logsumexp(1, keepdim=True)
        own = torch.arange(len(keys), device=f.device) == torch.arange(i, i + len(f_i), device=f.device)[:, None]
        positive = same & valid & ~own
        loss = (F.softplus(negatives - s) * positive).sum(1) / positive.sum(1).clamp(min=1)
        return (loss * valid[i:i + rows]).sum()

    total = sum(recompute(block, f[i:i + rows], keys, i, use_reentrant=False, preserve_rng_state=False)
                for i in range(0, len(f), rows))
    return total / valid.sum().clamp(min=1)


def contrast(sets, groups, cfg, rng):
    """L_contrast over labelled and unlabelled images together: mean over groups of Eq. 5, times a factor (D4).

    sets: for each kind of image (embeddings [B, D, h, w], their keys [B, D, h, w], classes [B, H, W], 255 where they are
    not to be used, the student's logits [B, C, H, W])
    """
    anchors, others, present = [], [], []
    for f, keys, classes, logits in sets:
        for c in cfg.skip_classes:
            classes = classes.masked_fill(classes == c, T.IGNORE)
        classes = F.interpolate(classes[:, None].float(), f.shape[2:], mode="nearest").long().flatten(1)  # [B, h*w]
        logits = F.interpolate(logits.detach(), f.shape[2:], mode="bilinear", align_corners=False)
        predicted = logits.argmax(1).flatten(1)
        cells, found = sample_views(classes, predicted, rng.uniform(*classes.shape), logits.shape[1], cfg.views,
                                    cfg.sampling == "hard")
        at = cells.flatten(1)[:, None].expand(-1, f.shape[1], -1)  # [B, D, C*V]
        for rows, x in ((anchors, f), (others, keys)):
            rows.append(x.flatten(2).gather(2, at).transpose(1, 2).reshape(groups, -1, f.shape[1]))
        present.append(found[..., None].expand(-1, -1, cfg.views).reshape(groups, -1))
    anchors, others, present = (torch.cat(x, 1) for x in (anchors, others, present))  # [groups, n, D], [groups, n]
    c = sets[0][3].shape[1]
    row_class = torch.arange(present.shape[1], device=present.device) // cfg.views % c  # rows: image, class, view
    loss = sum(contrastive(anchors[g], others[g], row_class, present[g], cfg.tau) for g in range(groups)) / groups
    return loss * (cfg.tau / 0.1 if cfg.contrast_scale is None else cfg.contrast_scale)


def burn_in_end(cfg):
    """The first step that uses unlabelled images, and the teacher"""
    return cfg.steps if cfg.supervised else round(cfg.burn_in * cfg.steps)


def consistency_weight(step, cfg):
    """lambda_1(t) = 50 exp(-5 (1 - t/4000)^2), t from the end of the burn-in and up to 4000 (D7); 0 before"""
    start = burn_in_end(cfg)
    return cfg.lambda_1 * ramp("gaussian", step - start, cfg.consist_ramp * cfg.steps) if step >= start else 0.0


def contrast_weight(step, cfg):
    """lambda_2(t) = 0.1 exp(-5 (1 - t/250)^2), t from the first step and up to 250 (D7)"""
    return cfg.lambda_2 * ramp("gaussian", step, cfg.contrast_ramp * cfg.steps)


# ------------------------------------------------------------------------------------------------ data (Sec. 4.1)

class Augment:
    """Weak augmentation of a labelled image, or the two views of an unlabelled one, whose geometry is drawn once.

    Labelled: rotation of the finished crop, (x, y). Unlabelled: of the whole frame, which invents fewer pixels,
    ((teacher's view, student's view, valid bool [H, W]), None).
    """

    def __init__(self, cfg, labelled):
        self.cfg, self.labelled = cfg, labelled

    def __call__(self, image, mask, rng):
        cfg, (image, mask) = self.cfg, T.to_tensors(image, mask)
        scale, size = float(rng.choice(cfg.scales)), cfg.size or image.shape[1:]
        if cfg.long_side:
            scale, size = scale * cfg.long_side / max(image.shape[1:]), image.shape[1:]
        image, mask = T.resize(image, mask, [max(1, round(side * scale)) for side in size])
        if not self.labelled:
            mask = torch.zeros(image.shape[1:], dtype=torch.uint8)  # what geometry invents becomes 255
            image, mask = rotate(image, mask, cfg.rotate, rng)
        if cfg.crop:
            image, mask = T.random_crop(*T.pad_to(image, mask, cfg.crop), cfg.crop, rng)
        if cfg.flip:
            image, mask = T.random_flip(image, mask, rng)
        if self.labelled:
            image, mask = rotate(image, mask, cfg.rotate, rng)
            return T.normalise(image), mask
        views = (T.normalise(photometry(image, kind, rng)) for kind in (cfg.teacher_aug, cfg.student_aug))
        return (*views, (mask != T.IGNORE) | (not cfg.mask_invalid)), None


# ------------------------------------------------------------------------------------------------ evaluation

@torch.no_grad()
def predict(net, x, cfg, ctx):
    """Logits [B, C, H, W] of x at its own size"""
    with ctx.autocast():
        return net(x).float()


def evaluate(net, data, cfg, ctx):
    """Protocol: whole images, single scale, logits at image size, argmax; one confusion matrix over the split; 255
    ignored. Each image is scored exactly once, on one process. -> ConfusionMatrix"""
    training = net.training
    net.eval()
    confusion, size = ConfusionMatrix(len(data.classes), ctx.device), scoring_size(cfg)
    batch = cfg.batch if size or data.name == "shapes" else 1  # images of one size are batched
    for x, y in once(Scored(data.val, T.ForScoring(size), ctx), batch, cfg.workers, ctx):
        confusion.update(predict(net, x, cfg, ctx).argmax(1), y)
    confusion.reduce()
    net.train(training)
    return confusion


def scoring_size(cfg):
    """Size at which images are scored; None: each at its own (Cityscapes: 512x1024, BDD100K: its own 720x1280)"""
    if cfg.eval_size == "train" and not cfg.size:
        raise UserError("--eval-size train scores at --size, which is not set here: give --size, or --eval-size full")
    return cfg.size if cfg.eval_size == "train" else None


# ------------------------------------------------------------------------------------------------ training

def train(cfg):
    """Train, or resume, the run in cfg.out; ends with the per-class table and the `final:` line. -> final mIoU, 0..1"""
    ctx = Runtime(cfg.device, cfg.precision)
    cfg.precision = ctx.precision  # config.json has what `auto` came to: a resumption must not change it
    data = open_dataset(cfg.data, cfg.root, cfg.download)
    labelled, unlabelled = choose_labelled(data, cfg.labeled, cfg.split, cfg.seed)
    unlabelled = unlabelled or list(range(len(data.train)))  # all are labelled: D_L = D_U = all (Table 1, Full)
    if cfg.steps is None:
        cfg.steps = math.ceil(cfg.epochs * math.ceil(len(unlabelled) / cfg.batch))
    check(cfg, len(data.classes), ctx.world)
    folder, share, groups, num_classes = Path(cfg.out), ctx.share(cfg.batch), cfg.groups // ctx.world, len(data.classes)
    burn_in = burn_in_end(cfg)
    if ctx.main:
        folder.mkdir(parents=True, exist_ok=True)
        keep_config(folder, cfg, FREE)
    ctx.barrier()

    torch.manual_seed(mix(cfg.seed, "init"))  # the same initial weights on every process
    student = Segmenter(cfg, num_classes)
    resumed = (folder / "last.pt").exists()
    if not resumed:
        load_weights(student.net.body, cfg.backbone, cfg.weights, print if ctx.main else lambda _: None)
    student = ctx.synchronise_bn(student).to(ctx.device, memory_format=torch.channels_last)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    thresholds = torch.full((num_classes,), cfg.dcrs_init, device=ctx.device)
    optimizer = make_optimizer(student, cfg)
    holders = dict(student=student, teacher=teacher, optimizer=optimizer, scaler=ctx.scaler)
    step, best, best_step = 0, 0.0, 0
    if resumed:
        state = checkpoint.load(folder / "last.pt", ctx.device)
        step, best, best_step = state["step"], state["best"], state["best_step"]
        thresholds.copy_(state["thresholds"])
        for name, holder in holders.items():
            holder.load_state_dict(state[name])
        del state  # it would stay on the device
    about = dict(script="c3_semiseg", config=asdict(cfg), classes=list(data.classes), palette=torch.from_numpy(data.palette))
    wrapped = ctx.wrap(student)
    if cfg.compile:
        student.compile()

    stream_l = Stream(data.train, labelled, Augment(cfg, True), cfg.seed, "labelled", True)
    stream_u = Stream(data.train, unlabelled, Augment(cfg, False), cfg.seed, "unlabelled", False)
    batches_l = endless(stream_l, share, step, cfg.workers, ctx)
    batches_u = endless(stream_u, share, max(step - burn_in, 0), cfg.workers, ctx)
    images = cfg.batch * (1 if step < burn_in else 2)
    log = Log(folder, cfg.steps, cfg.log_every, step, images, ctx.device, ctx.main, ctx.mean)
    log.say(f"{ctx}; {cfg.data}: {len(labelled)} labelled and {len(unlabelled)} unlabelled images, {len(data.val)} to "
            f"score ({data.scored_on}); {cfg.steps} steps, unlabelled images from step {burn_in} on; BN {cfg.bn}; "
            f"ASPP rates {', '.join(map(str, cfg.aspp_rates))}" + (f"; resumed at {step}" if step else ""))
    for note in (*data.notes, *published(cfg, [data.train.keys[i] for i in labelled])):
        log.say(note)
    ctx.catch_sigterm()

    def networks():
        """The network of the headline, then the other one, if it exists yet; each with its name"""
        names = ("teacher", "student") if cfg.eval_net == "teacher" else ("student", "teacher")
        return [(name, holders[name].net) for name in names if name == "student" or step > burn_in]

    def save(name, **state):
        log.flush()  # stops the run here if a loss was not finite, the last good checkpoint kept
        if ctx.main:
            kind, net = networks()[0]
            checkpoint.save(folder / name, about | dict(net=net.state_dict(), net_is=kind, step=step) | state)

    def save_all():
        save("last.pt", best=best, best_step=best_step, thresholds=thresholds,
             **{name: h.state_dict() for name, h in holders.items()})

    def score():
        nonlocal best, best_step
        (_, net), *others = networks()
        confusion = evaluate(net, data, cfg, ctx)
        if confusion.miou() > best:
            best, best_step = confusion.miou(), step
            save("best.pt", miou=best)
        log.evaluated(step, miou=confusion.miou(), best=best,
                      **{f"miou_{name}": evaluate(other, data, cfg, ctx).miou() for name, other in others})
        if ctx.main:
            panel(partial(predict, net.eval(), cfg=cfg, ctx=ctx), data, scoring_size(cfg), ctx.device).save(
                folder / "predictions.png")
            student.train()
            log.curves()
        return confusion

    keys_of_teacher = cfg.keys == "teacher" and cfg.contrast in ("both", "labelled")
    student.train()
    while step < cfg.steps and not ctx.stopping(due=step % cfg.log_every == 0):
        lr = cfg.lr * poly(step, cfg.steps)
        lambda_1, lambda_2 = consistency_weight(step, cfg), contrast_weight(step, cfg)
        set_lr(optimizer, lr)
        if step == burn_in:
            log.flush()  # from here on a row has other columns
            log.images_per_step = 2 * cfg.batch
            if cfg.eval_net == "teacher":  # `best` was a student's
                best, best_step = 0.0, 0
        with log.waiting():
            x_l, y_l = next(batches_l)
            x_t, x_s, valid = next(batches_u) if step >= burn_in else (None, None, None)
        optimizer.zero_grad()
        if step < burn_in:
            with ctx.autocast():
                logits_l, f_l = wrapped(x_l)
            on = cfg.contrast_burn_in and cfg.contrast != "unlabelled"
            terms, sets = {}, [(f_l, f_l, y_l, logits_l)] if on else []
        else:
            update_teacher(teacher, student, step - burn_in + 1, cfg)
            with torch.no_grad(), ctx.autocast():
                logits_t, keys = teacher(torch.cat([x_t, x_l]) if keys_of_teacher else x_t)
            q = logits_t[:share].softmax(1)
            rng = ctx.random(cfg.seed, "cutmix", step)
            order = pairing(cfg.mix, groups, share // groups, rng)
            box = boxes(share, x_s.shape[2:], rng) & (cfg.mix != "none")
            x_mix = swap(torch.cat([x_l, x_s])[order], box).contiguous(memory_format=torch.channels_last)  # Eq. 4
            with ctx.autocast():
                mixed = wrapped(x_mix)
            logits, f = (x if x is None else swap(x, box)[order.argsort()] for x in mixed)  # un-mixed, x_l's then x_s's
            logits_l, logits_u = logits.chunk(2)
            classes, keep = confident(q, valid, thresholds, cfg, ctx)  # Eq. 6
            loss_consist = consistency(logits_u, q, keep, groups, cfg.divide_by_classes)  # Eq. 2
            terms = dict(loss_consist=loss_consist, w_consist=lambda_1, kept=keep.float().mean(),
                         threshold=thresholds.mean())
            sets = []
            if cfg.contrast in ("both", "labelled"):
                f_l = f[:share]
                keys_l = keys[share:] if keys_of_teacher else f_l.detach() if cfg.contrast == "both" else f_l
                sets.append((f_l, keys_l, y_l, logits_l))
            if cfg.contrast in ("both", "unlabelled"):
                sets.append((f[share:], keys[:share], classes.masked_fill(~keep, T.IGNORE), logits_u))
        loss_sup = cross_entropy(logits_l, y_l, groups)  # Eq. 1
        loss = loss_sup + lambda_1 * terms.get("loss_consist", 0.0)
        if student.projection:  # Eq. 5; without anchors 0 with a graph: data parallelism needs a gradient everywhere
            rng = ctx.random(cfg.seed, "views", step)
            loss_contrast = contrast(sets, groups, cfg, rng) if sets else 0 * f_l.float().sum()
            loss = loss + lambda_2 * loss_contrast  # Eq. 7: L_sup + lambda_1 L_consist + lambda_2 L_contrast
            terms |= dict(loss_contrast=loss_contrast, w_contrast=lambda_2)
        ctx.scaler.scale(loss).backward()
        ctx.scaler.step(optimizer)
        ctx.scaler.update()
        step += 1
        log.add(step, loss_sup=loss_sup, **terms, lr=lr)
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


PUBLISHED = {  # sha256 of the labelled images' names, by seed, for 100, 372 and 744 of Cityscapes
    12345: {100: "d8bdee2658b37374", 372: "2e4bcf2964a0dc4b", 744: "35a444ee4a394c3e"},
    23456: {100: "f2a14b6bc665208a", 372: "2d6f17aa7def0f88", 744: "05f5784e66e38710"},
    34567: {100: "c619701e3d65d306", 372: "e8bc5c523f177939", 744: "d793d57f69df4c4b"}}


def published(cfg, keys):
    """Lines for the user: is the list of labelled images one of those that the paper used?"""
    known = PUBLISHED.get(cfg.seed, {}).get(len(keys)) if cfg.data == "cityscapes" else None
    if not known:
        return []
    names = "\n".join(sorted(f"train/{key.split('_')[0]}/{key}" for key in keys))
    same = hashlib.sha256(names.encode()).hexdigest().startswith(known)
    return [f"labelled images: {'the' if same else 'NOT the'} published list of {len(keys)} for seed {cfg.seed}"]


def check(cfg, num_classes, world):
    """Raises UserError for settings that contradict each other."""
    if cfg.groups < 1 or cfg.groups % world:
        raise UserError(f"--groups {cfg.groups} cannot be spread over {world} processes: use a multiple of {world}")
    if cfg.batch < 1 or cfg.batch % cfg.groups:
        raise UserError(f"--batch {cfg.batch} cannot be divided into {cfg.groups} groups: use a multiple of {cfg.groups}, "
                        f"or other --groups")
    if cfg.mix == "intra" and burn_in_end(cfg) < cfg.steps and cfg.batch // cfg.groups % 2:
        raise UserError(f"--mix intra pairs labelled images with each other and needs an even number in each of the "
                        f"{cfg.groups} groups, not {cfg.batch // cfg.groups}: change --batch or --groups")
    if cfg.skip_classes and max(cfg.skip_classes) >= num_classes:
        raise UserError(f"--skip-classes {max(cfg.skip_classes)}: {cfg.data} has the classes 0 to {num_classes - 1}")
    if cfg.eval_net == "teacher" and burn_in_end(cfg) >= cfg.steps:
        raise UserError("--eval-net teacher: there is none without unlabelled images (--supervised, --burn-in 1)")


def make_optimizer(student, cfg):
    """Adam without weight decay; every trainable tensor once: CNN at lr * backbone_lr_mult, SEG and PROJ at lr"""
    groups = [dict(params=[p for p in student.net.body.parameters() if p.requires_grad], lr_mult=cfg.backbone_lr_mult),
              dict(params=[p for conv in student.heads() for p in conv.parameters()], lr_mult=1.0)]
    return torch.optim.Adam(groups, cfg.lr, fused=True)


# ------------------------------------------------------------------------------------------------ command line

def load_segmenter(path, given, ctx):
    """-> (net, cfg, state) from a checkpoint, with the flags that make sense for inference on top of its config"""
    state = checkpoint.load(path, ctx.device)
    if not isinstance(state, dict) or state.get("script") != "c3_semiseg":
        raise UserError(f"{path} is not a checkpoint of this script: expected a file such as runs/.../last.pt")
    useless = sorted(set(given) - {*FREE, "data", "size", "eval_size", "eval_net", "batch", "precision"})
    if useless:
        raise UserError(f"--{useless[0].replace('_', '-')} has no effect on a trained network; {path} brings its own settings")
    cfg, weights = from_dict(Config, state["config"], given), state["net"]
    if "eval_net" not in given:
        cfg.eval_net = state["net_is"]
    if cfg.eval_net != state["net_is"]:
        if cfg.eval_net not in state or state["net_is"] == "student" and state["step"] <= burn_in_end(cfg):
            raise UserError(f"{path} holds the {state['net_is']} only; both networks are in last.pt, after the burn-in")
        weights = {name[4:]: w for name, w in state[cfg.eval_net].items() if name.startswith("net.")}
    net = make_net(cfg, len(state["classes"])).to(ctx.device, memory_format=torch.channels_last)
    net.load_state_dict(weights)
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
              f"images, {cfg.eval_net}")
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
    exclusive(cfg, given, "steps", "epochs")
    exclusive(cfg, given, "size", "long_side")
    scoring_size(cfg)  # a mistake in it is told now, not after the first steps
    scratch = cfg.weights == "none"
    cfg.bn = cfg.bn or ("learn" if scratch else "frozen")
    cfg.head_init = cfg.head_init or ("pytorch" if scratch else "normal")
    if cfg.backbone_lr_mult is None:
        cfg.backbone_lr_mult = 1.0 if scratch else 0.3
    labels = Path(cfg.split).stem if cfg.split else cfg.labeled.replace("/", "_")
    kind = "-supervised" if cfg.supervised else ""
    cfg.out = cfg.out or f"runs/c3_semiseg-{cfg.data}-{labels}-seed{cfg.seed}{kind}"
    train(cfg)


if __name__ == "__main__":
    sys.exit(run(main))
