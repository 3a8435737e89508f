"""CCT: Semi-Supervised Semantic Segmentation with Cross-Consistency Training
(Ouali, Hudelot, Tami; CVPR 2020; arXiv 2003.09005, whose version 3 holds the supplement)

A shared encoder h and a main decoder g are trained on labelled images. For an unlabelled image x_u
the encoder's output z = h(x_u) is perturbed K times. Each perturbed z goes to its own auxiliary
decoder g_a^k, whose prediction must match that of g on the clean z. So L_u trains h and the
auxiliary decoders, never g; L_s trains h and g, never the auxiliary decoders. Only h and g are used
at inference. With image-level labels (Sec. 3.3), pseudo-labels of the unlabelled images train the
g_a^k, too. With several datasets (Sec. 3.4), h is shared, and each has decoders of its own.

Map (paper -> this file)
  Eq. 1 supervised CE        cross_entropy         Sec. 3.2.3 perturbations  f_noise to i_vat
  Eq. 2, 6 L_u, L_w          train_auxiliary       Sec. 3.3, Fig. 9 CAMs     weak_labels
  Eq. 3, 5 L, Algorithm 1    train                 Sec. 3.4 domains          Domain, train
  Eq. 4 ab-CE                without_easy_pixels   Sec. 4.1, Table 11        Encoder, Decoder
  Eq. 7-9 MSE, KL, JS        distance              Sec. 4.2 mIoU             evaluate
  Eq. 10 pairwise loss       pairwise              Sec. 4.4.1 K per type     PERTURBATIONS, --k
  Eq. 11 L_adv               domain_loss           App. A Mean Teacher, VAT  train, input_vat
  Eq. 12 lambda_adv          reverse_gradient      App. B.2 masking          --confidence
  Eq. 13-15 I-VAT            i_vat, common/vat.py  App. D, Fig. 2, 7         --format smoothness
  Eq. 16, 17, Fig. 8 ramps   ramped_weight, eta    App. F multi-scale        predict
  Table 8 g_d                Discriminator         Table 12                  Config, PRESETS

Deviations: what the paper says, what the authors' code does (--released), what we do, and why
  D1  Eq. 7 to 9 sum over classes; the code and we take the mean, to which lambda_u = 30 belongs.
  D2  The code's JS has both divergences reversed and is unbounded; ours is Eq. 9. With --confidence
      every distance is a mean over the pixels that are kept, in the code the MSE alone.
  D3  The code computes the pairwise loss of Eq. 10, a sum over classes, but never trains with it;
      here it is added to L, without w_u and --confidence (--pairwise 1).
  D4  The ramp of w_u is Gaussian in Sec. 3.2.2, in the code and here, exp in Eq. 16 (--ramp exp).
  D5  F-Drop's threshold is drawn from [.6, .9] in the paper, which we follow, from [.7, .9] in the
      code. The paper's "10 to 40 %" of the cells is not what a threshold on the activity drops.
  D6  I-VAT: with xi = 1e-6 (paper, code) and the code's 1e-8 in the norm, r_adv is rounding noise
      shorter than 0.05. Here xi = 0.1, and norms are exact; --vat-released is the code's.
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
  D13 The authors' ResNet begins with three 3x3 convolutions; ours begins as its --weights do:
      torchvision's with one of 7x7, torchcv's 3x3resnet50-imagenet.pth with three of 3x3.
  D14 The ICNR head hardly trains from scratch. So with --weights none its sub-pixel convolutions
      start as the identity, with a bias that keeps the ReLUs active, and the backbone has the
      heads' learning rate.
  D15 On several GPUs the code's BN is per GPU; here BN, losses and draws are those of one batch.
  D16 Mean Teacher and VAT are not in the code, and the paper gives no constants: the teacher is in
      eval mode and decays by --ema, VAT has I-VAT's constants.
  D17 Domains: the paper leaves open batch and steps. Here an epoch is one pass over the domain with
      the most unlabelled images, and as many steps of the others; BN and the ramps are shared.
  D18 Eq. 11 prints 1 - log g_d for log(1 - g_d). g_d has two channels in Table 8, so L_adv is a
      cross-entropy here, over labelled and unlabelled images. g_d minimises L_adv (unweighted); h
      gets -lambda_adv times its gradient, without a ramp; leaky ReLUs have the slope 0.2.
  D19 Weak labels: the paper pretrains h as the classifier; the code, and we, train a separate
      network by SGD without momentum (give its weak/last.pt to --weights to begin with it). Its
      layer4 is dilated here. As in the code, the CRF refines the labels of each threshold, and the
      results are then combined; in the paper it refines the combined labels.

Commands
  python cct.py                                               first run: shapes, on a CPU in minutes
  python cct.py --supervised                                  its baseline; run it again to resume
  python cct.py --data voc --download --labeled 1464          the paper's Table 1
  torchrun --nproc_per_node=2 cct.py --data voc               on 2 GPUs, 5 + 5 images each
  python cct.py --evaluate runs/.../last.pt --multi-scale     score a checkpoint
  python cct.py --evaluate best_model.pth --data voc          score the authors' checkpoint
  python cct.py --predict runs/.../last.pt --images photos/   palette PNGs
"""
import math
import sys
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import transforms as T
from common.backbones import PSP, ResNet
from common.cam import weak_labels
from common.cache import cached
from common.checkpoint import load_network, open_checkpoint, same_classes
from common.command_line import check_needs, parse, run, run_name
from common.datasets import DATASETS
from common.domains import (GIVEN_FOR_EACH, Domain, mean_miou, saved_domains, say_tables,
                            settings_of_domains)
from common.inference import Examples, predict_folder, scored_batches
from common.miou import ConfusionMatrix
from common.random import mix
from common.regions import find_blobs, random_rectangles
from common.run_folder import RunFolder
from common.runtime import Runtime
from common.schedules import (RAMPS, make_teacher, momentum_sgd, poly, ramp, set_lr,
                              update_ema)
from common.settings import ANY, BaseConfig, UserError, option
from common.streams import Stream, endless
from common.vat import adversarial, input_vat
from common.weights import DEEP_STEM, load_weights, stem_of

PERTURBATIONS = {  # decoders of each type in "CCT" (Sec. 4.4.1); their hyper-parameters: Table 12
    "i_vat": 2, "dropout": 6, "g_cutout": 6, "con_msk": 2, "obj_msk": 2, "f_drop": 6, "f_noise": 6}
SEMI = dict(supervised=False)  # what a flag needs to have an effect
CCT = SEMI | dict(method="cct")
VAT = SEMI | dict(method=("cct", "vat"), perturbations="i_vat")
WEAK = CCT | dict(weak=True)
TYPE = {name: CCT | dict(perturbations=name) for name in PERTURBATIONS}


# ---------------------------------------------------------------------- settings

@dataclass
class Config(BaseConfig):
    data: str = option("shapes", f"dataset: {', '.join(DATASETS)}; several: a+b (Sec. 3.4), then "
                       "also in --root, --labeled, --split, --tags", group="run", scoring=True)
    format: str = option("palette", "files of --predict: palette PNGs, what a test server takes, "
                         "or maps of the distances between neighbours (Fig. 2, 7)",
                         ("palette", "voc", "cityscapes", "bdd100k", "smoothness"),
                         needs=dict(predict=ANY), free=True, scoring=True)
    epochs: float | None = option(None, "passes over the unlabelled images, instead of --steps",
                                  within=(0.001, 1e6), replaces="steps", group="run")
    method: str = option("cct", "use of the unlabelled images (Table 4)",
                         ("cct", "mean_teacher", "vat"), group="consistency", needs=SEMI)
    lambda_u: float = option(30.0, "final weight of L_u (Table 12)", within=(0, 1e6), needs=SEMI)
    ramp: str = option("gaussian", "how w_u rises to lambda_u (D4)", tuple(RAMPS), needs=SEMI)
    ramp_length: float = option(0.1, "its length, a share of the steps", within=(0, 1), needs=SEMI)
    perturbations: tuple[str, ...] = option(tuple(PERTURBATIONS), "types of decoders (Fig. 5, 6)",
                                            tuple(PERTURBATIONS), needs=CCT)
    k: int | None = option(None, "decoders of each type [6; 2 of i_vat, con_msk, obj_msk]",
                           within=(1, 1000), needs=CCT)
    distance: str = option("mse", "d(.,.) of Eq. 7, 8, 9", ("mse", "kl", "js"), needs=CCT)
    confidence: float = option(0.0, "L_u: only pixels where g is surer than this (App. B.2: 0.5)",
                               within=(0, 1), needs=CCT)
    pairwise: float = option(0.0, "weight of the loss of Eq. 10", within=(0, 1e6), needs=CCT)
    drop_range: tuple[float, float] = option((0.6, 0.9), "F-Drop: range of gamma; released 0.7 0.9",
                                             within=(0, 1), needs=TYPE["f_drop"])
    noise: float = option(0.3, "F-Noise: amplitude", within=(0, 100), needs=TYPE["f_noise"])
    dropout: float = option(0.5, "DropOut: rate", within=(0, 0.999), needs=TYPE["dropout"])
    cutout: float = option(0.4, "G-Cutout: share of each side of the box (Table 12)", within=(0, 1),
                           needs=TYPE["g_cutout"])
    background: tuple[int, ...] = option((0,), "ids of the classes that are context, or none (D7)",
                                         within=(0, 254), needs=CCT)
    vat_eps: float = option(2.0, "I-VAT, VAT: norm of r_adv (Eq. 15)", within=(0, 1e6), needs=VAT)
    vat_xi: float = option(0.1, "I-VAT, VAT: step of the power iteration (Eq. 13)",
                           within=(1e-9, 1e6), needs=VAT | dict(vat_released=False))
    vat_released: bool = option(False, "I-VAT as released (D6)", needs=TYPE["i_vat"])
    ema: float = option(0.999, "Mean Teacher: decay after the ramp-up, 0.99 within it",
                        within=(0, 1), needs=SEMI | dict(method="mean_teacher"))

    lambda_adv: float = option(0.0, "weight of L_adv, of several domains (Eq. 12; Table 12: 0.02)",
                               within=(0, 1e6), needs=CCT, group="domains and image-level tags")
    weak: bool = option(False, "pseudo-labels from image-level tags (Sec. 3.3)", needs=CCT)
    tags: str = option("", "file of the tags: a line per image, `name, class, class`; without it, "
                           "they are the classes of the masks", needs=WEAK)
    lambda_w: float = option(0.4, "final weight of L_w (Eq. 5)", within=(0, 1e6), needs=WEAK)
    weak_epochs: int = option(5, "epochs of the classifier", within=(1, 10**6), needs=WEAK)
    weak_lr: float = option(0.1, "learning rate of the classifier", within=(0, 1000), needs=WEAK)
    thresholds: tuple[float, float] = option((0.05, 0.3), "of CAMs: background below, object above",
                                             within=(0, 1), needs=WEAK)
    crf: bool = option(True, "refine the pseudo-labels by a dense CRF", needs=WEAK)

    shift: int = option(0, "random shift of up to this many pixels", within=(0, 10000),
                        group="augmentation")
    long_side: int | None = option(None, "resize the longer side to this, times --scale (App. I)",
                                   within=(8, 100000), replaces="size")
    scale: tuple[float, float] = option((1.0, 1.0), "range of random rescaling (Sec. 4.3)",
                                        within=(0.01, 100), needs=dict(long_side=ANY))
    multi_scale: bool = option(False, "score with 5 scales and flips (App. F)", scoring=True)

    stem: str | None = option(None, "first convolutions of the ResNet (D13) [what --weights have]",
                              ("7x7", "deep"), group="network")
    last_relu: bool = option(True, "ReLU after the last sub-pixel convolution, as released")
    supervised_loss: str = option("ce", "L_s: ce (Eq. 1) or ab_ce (Eq. 4)", ("ce", "ab_ce"),
                                  group="optimisation")
    eta_length: float = option(0.4, "ab-CE: ramp, as a share of the steps (App. K; Table 12: 0.5)",
                               within=(0, 1), needs=dict(supervised_loss="ab_ce"))
    batch: int = option(10, "labelled images per step over all processes; as many unlabelled",
                        within=(2, 100000), scoring=True)
    optimizer: str = option("sgd", "sgd (momentum 0.9) or adam", ("sgd", "adam"))
    lr: float = option(0.01, "learning rate of PSP and decoders (Table 12)", within=(0, 1000))
    backbone_lr_mult: float | None = option(None, "share of --lr for ResNet [0.1; 1 from scratch]",
                                            within=(0, 1000))
    weight_decay: float = option(1e-4, "on every parameter (Table 12)", within=(0, 1000))


PRESETS = {
    "shapes": dict(labeled="40", steps=1000, batch=6, flip=True, shift=6, backbone="resnet18",
                   backbone_layers=2, weights="none", optimizer="adam", lr=3e-3, k=1, lambda_u=15.0,
                   vat_eps=5.0, ema=0.99, weak_epochs=10, workers=0, eval_every=250,
                   save_every=100),
    "voc": dict(labeled="1464", epochs=50, long_side=400, scale=(0.5, 2.0), crop=(320, 320),
                flip=True),
    "cityscapes": dict(labeled="100", epochs=50, batch=4, size=(512, 1024), eval_size="train"),
    "camvid": dict(labeled="100", epochs=50, size=(360, 480), eval_size="train", eval_every=270),
    "sunrgbd": dict(labeled="1500", epochs=100, size=(480, 640), eval_size="train"),
}
PRESETS["folder"] = PRESETS["voc"] | dict(labeled="all")
PRESETS["sunrgbd13"] = PRESETS["sunrgbd"]
PRESETS["camvid+cityscapes"] = PRESETS["cityscapes"] | dict(labeled="50")  # Table 2
PRESETS["cityscapes+sunrgbd13"] = PRESETS["cityscapes"] | dict(labeled="1500", epochs=100)
PRESETS["pcontext"] = PRESETS["bdd100k"] = PRESETS["folder"] | dict(labeled="1/8")
PRESETS["pcontext59"] = PRESETS["pcontext"] | dict(background=())  # these three: not in the paper
PRESET_OF_EACH = (  # what a domain takes from its own preset
    "size", "long_side", "scale", "crop", "flip", "shift", "eval_size", "background")
RELEASED_SETTINGS = {"all": dict(drop_range=(0.7, 0.9), vat_released=True),  # D5, D6
                     "voc": dict(epochs=80.0)}
RELEASED = (dict(names={  # files of the authors' code
    **{rf"encoder\.base\.0\.0\.{theirs}\.": f"encoder.backbone.{ours}."
       for theirs, ours in DEEP_STEM.items()},
    r"encoder\.base\.": "encoder.backbone.layer",
    r"encoder\.psp\.stages": "encoder.psp.branches",
    r"encoder\.psp\.bottleneck": "encoder.psp.fuse",
    r"main_decoder\.upsample\.0": "decoders.0.adapt",
    **{rf"main_decoder\.upsample\.{k + 1}\.conv": f"decoders.0.subpixel.{k}" for k in range(3)},
    "aux_decoders": None}, classes="decoders.0.adapt.weight", settings=dict(stem="deep")),)


def settle(cfg, given):
    """Fill in what one setting decides about others. -> {name: Config} of the domains of --data
    a+b, whose images are treated as their own preset says, unless flags do. Raises UserError."""
    cfg.stem = cfg.stem or stem_of(cfg.weights)
    if cfg.backbone_lr_mult is None:
        cfg.backbone_lr_mult = 1.0 if cfg.weights == "none" else 0.1
    cfg.out = cfg.out or run_name("cct", cfg, given)
    if cfg.lambda_adv and "+" not in cfg.data:
        raise UserError(f"--lambda-adv has no effect with --data {cfg.data}, a single domain")
    if "size" in given and "crop" not in given:
        given = given | dict(crop=None)  # that of the preset was for other sizes
        cfg.crop = None
    domains = settings_of_domains(cfg, given, PRESETS, PRESET_OF_EACH)
    check_needs(given, *domains.values())
    return domains


# ---------------------------------------------------------------------- model (Sec. 4.1)

class Decoder(nn.Module):
    """Table 11: 1x1 convolution to C channels, then three sub-pixel convolutions (1x1 to 4C, ReLU,
    PixelShuffle). Main and auxiliary decoders have this one architecture and share no weights.
    512 C + 12 C^2 + 12 C parameters.

    ICNR initialisation: the four sub-pixels of a class start with the same weights, one row of a
    Kaiming-normal C x C matrix; biases as PyTorch draws them. scratch (D14): one row of the
    identity, and biases 4, 0, 0, which makes it nearest upsampling of relu(first layer + 4)."""

    def __init__(self, in_channels, num_classes, scratch=False, last_relu=True):
        super().__init__()
        self.last_relu = last_relu
        self.adapt = nn.Conv2d(in_channels, num_classes, 1, bias=False)
        self.subpixel = nn.ModuleList(nn.Conv2d(num_classes, 4 * num_classes, 1) for _ in range(3))
        nn.init.kaiming_normal_(self.adapt.weight, nonlinearity="relu")
        init = nn.init.eye_ if scratch else nn.init.kaiming_normal_
        for conv in self.subpixel:
            kernel = init(torch.empty(num_classes, num_classes))
            conv.weight.data.copy_(kernel.repeat_interleave(4, 0)[:, :, None, None])
        if scratch:  # 4 lifts the logits above the ReLUs; softmax ignores a common shift
            for conv, bias in zip(self.subpixel, (4.0, 0.0, 0.0)):
                nn.init.constant_(conv.bias, bias)

    def forward(self, z):
        """z [B, 512, h, w] -> logits [B, C, 8h, 8w]"""
        x = self.adapt(z)
        for i, conv in enumerate(self.subpixel):
            x = conv(x)
            if i < 2 or self.last_relu:
                x = F.relu_(x)
            x = F.pixel_shuffle(x, 2)
        return x


class Encoder(nn.Module):
    """h: dilated ResNet and PSP module"""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = ResNet(cfg.backbone, cfg.backbone_layers, stem=cfg.stem)
        self.psp = PSP(self.backbone.out_channels)

    def forward(self, x, x_u=None):
        """[B, 3, H, W] -> z >= 0, [B, 512, ceil(H/8), ceil(W/8)], padded by reflection; with x_u
        also its z. Each batch has its own BN statistics."""
        bottom, right = ((8 - side % 8) % 8 for side in x.shape[2:])  # torch.compile: no -side % 8
        if bottom or right:
            mode = "reflect" if min(x.shape[2:]) > 7 else "replicate"
            x = F.pad(x, (0, right, 0, bottom), mode=mode)
        z = self.psp(self.backbone(x))
        return z if x_u is None else (z, self(x_u))


class Segmenter(nn.Module):
    """f = g o h: the encoder h, and a main decoder g for each domain (Sec. 3.4)"""

    def __init__(self, cfg, nums_classes):
        super().__init__()
        self.encoder = Encoder(cfg)
        channels = self.encoder.psp.out_channels
        self.decoders = nn.ModuleList(Decoder(channels, c, cfg.weights == "none", cfg.last_relu)
                                      for c in nums_classes)

    def forward(self, x, domain=0):
        """[B, 3, H, W] -> logits [B, C, H, W] of a domain's classes"""
        return crop(self.decoders[domain](self.encoder(x)), x)


def crop(logits, x):
    """Logits [B, C, 8h, 8w] at the size of the image x, its padding cropped away"""
    return logits[..., :x.shape[2], :x.shape[3]]


class Auxiliary(nn.Module):
    """The K auxiliary decoders g_a^k of a domain; names[k]: the perturbation that decoder k owns"""

    def __init__(self, cfg, in_channels, num_classes):
        super().__init__()
        self.names = [name for name, count in PERTURBATIONS.items() if name in cfg.perturbations
                      for _ in range(cfg.k or count)]
        scratch = cfg.weights == "none"
        self.decoders = nn.ModuleList(Decoder(in_channels, num_classes, scratch, cfg.last_relu)
                                      for _ in self.names)
        is_object = torch.tensor([c not in cfg.background for c in range(num_classes)])
        self.register_buffer("is_object", is_object, persistent=False)
        self.distance = torch.compile(distance) if cfg.compile else distance  # Eq. 7-9


class Discriminator(nn.Sequential):
    """g_d (Table 8): which domain is each cell of z from? [B, 512, h, w] -> [B, domains, h, w]"""

    def __init__(self, in_channels, num_domains):
        layers = []
        for channels in (64, 128, 256, 512):
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.LeakyReLU(0.2)]
            in_channels = channels
        super().__init__(*layers, nn.Conv2d(512, num_domains, 1))


def reverse_gradient(z, weight):
    """z itself, whose gradient is multiplied by -weight on its way back (App. E)"""
    return z.detach() - weight * (z - z.detach())


# ---------------------------------------------------------------------- perturbations (Sec. 3.2.3)
# z: [B, 512, h, w]. rng: common.random.Random, whose draws are a function of (seed, step, decoder).
# Masks are constants; the gradient flows through z itself.

def f_noise(z, rng, amplitude=0.3):
    """F-Noise: z~ = z * N + z with N ~ U(-0.3, 0.3), one N for the whole batch (App. L)"""
    noise = amplitude * (2 * rng.shared(1, *z.shape[1:]) - 1)
    return z * (1 + noise)


def f_drop(z, rng, low=0.6, high=0.9):
    """F-Drop: zero the most active cells, those with z' >= gamma ~ U(0.6, 0.9). z': the sum over
    the channels (here their mean, which gives the same), divided by its maximum in the sample."""
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
    blobs: from find_blobs on [B, 8h, 8w]. share: of each side of the box."""
    b, _, h, w = z.shape
    u = rng.uniform(b, 2, 64 * h * w).transpose(0, 1).reshape(2, -1)
    covered = random_rectangles(blobs, u, share, (b, 8 * h, 8 * w))
    return z * ~covered[:, None, ::8, ::8]


def i_vat(z, decoder, rng, xi=0.1, eps=2.0, released=False):
    """I-VAT: z~ = z + r_adv (App. G), adversarial to this very decoder (z -> logits)"""
    return z + adversarial(z, decoder, rng, xi, eps, released)[0]


def main_prediction(decoder, auxiliary, z, ctx):
    """What the decoders are compared with and guided by: g on the clean z [B, 512, h, w], a
    constant, because L_u does not train g.
    -> (p [B, C, 8h, 8w], (objects bool [B, 8h, 8w], their blobs))"""
    with torch.no_grad(), ctx.autocast():
        logits = decoder(z).float()
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
    """Eq. 4: y with 255 where the true class's probability reaches the threshold: ab-CE is the
    cross_entropy with these labels. B pixels of the batch are kept at least, ties aside (D10).

    logits [B, C, H, W], y int64 [B, H, W] with 255 ignored -> [B, H, W]
    """
    loss = F.cross_entropy(logits.detach().float(), y, ignore_index=255, reduction="none")
    p_true = torch.where(y == 255, 2.0, (-loss).exp())  # ignored pixels come last
    hardest = p_true.flatten().topk(min(len(y) + 1, y.numel()), largest=False).values
    kth = ((y != 255).sum() - 1).clamp(0, len(hardest) - 1)  # the (B+1)-th, or the last valid one
    return y.masked_fill(p_true >= hardest.gather(0, kth[None]).clamp(min=threshold), 255)


def eta(step, cfg, num_classes):
    """Eq. 17: threshold of ab-CE, from 1/C up to 0.9"""
    t = step / max(cfg.eta_length * cfg.steps, 1)
    low = 1 / num_classes
    return min(0.9, (1 - math.exp(-5 * t)) * (0.9 - low) + low)


def distance(kind, p, logits):
    """Eq. 7-9 at every pixel: d(p, q), q = softmax(logits), mean over classes (D1) -> [B, H, W]

    mse: (p - q)^2.  kl: p log(p/q).  js: KL(p|m)/2 + KL(q|m)/2, m = (p + q)/2.
    p [B, C, H, W]: the target probabilities, float32, a constant; logits [B, C, H, W].
    """
    match kind:
        case "mse":
            d = F.mse_loss(logits.softmax(1, dtype=p.dtype), p, reduction="none")
        case "kl":
            d = torch.xlogy(p, p) - p * logits.log_softmax(1, dtype=p.dtype)
        case "js":
            q = logits.softmax(1, dtype=p.dtype)
            # probabilities may underflow to 0
            log_p, log_q, log_m = (x.clamp(min=1e-30).log() for x in (p, q, (p + q) / 2))
            d = (p * (log_p - log_m) + q * (log_q - log_m)) / 2
    return d.sum(1) / p.shape[1]  # the backward pass of mean(1) would fill [B, C, H, W] once more


def pairwise(logits, mean_q):
    """Eq. 10, its term of one decoder: mean over pixels of sum_c (q_c - mean_q_c)^2 -> scalar

    mean_q [B, C, H, W], the decoders' mean prediction, may be a constant: the gradient of the sum
    over the decoders is the same.
    """
    return (logits.float().softmax(1) - mean_q).square().sum(1).mean()


def domain_loss(logits, domain):
    """Eq. 11: L_adv of one domain's images, cross-entropy of g_d in every cell (D18) -> scalar
    logits [B, domains, h, w]; domain: the true one, a number from 0"""
    return -logits.float().log_softmax(1)[:, domain].mean()


def ramped_weight(final, step, cfg):
    """Eq. 16: w_u(t) = lambda_u times --ramp, which rises over --ramp-length of the steps; Eq. 5:
    w_w(t) = lambda_w times the same (Table 12). final: lambda_u or lambda_w"""
    return final * ramp(cfg.ramp, step, cfg.ramp_length * cfg.steps)


# ---------------------------------------------------------------------- data (Sec. 4.2, 4.3)

def augment(cfg, image, mask, rng):
    """Training transform, the same for labelled and unlabelled images."""
    image, mask = T.to_tensors(image, mask)
    if cfg.long_side:
        low, high = (int(cfg.long_side * s) for s in cfg.scale)
        image, mask = T.resize_long_side(image, mask, int(rng.integers(low, high + 1)))
    elif cfg.size:
        image, mask = T.resize(image, mask, cfg.size)
    if cfg.crop:
        image, mask = T.random_crop(image, mask, cfg.crop, rng)
    if cfg.shift:
        image, mask = T.random_shift(image, mask, cfg.shift, rng)
    if cfg.flip:
        image, mask = T.random_flip(image, mask, rng)
    return image, mask


def classifier_settings(cfg):
    """Settings of augment for the classifier of tags (Sec. 3.3). With --long-side and --crop, as in
    the code: a longer side of 0.8 to 1.6 times --long-side, and crops of 1.6 times --crop."""
    if not (cfg.long_side and cfg.crop):
        return cfg
    crop = tuple(round(1.6 * side) for side in cfg.crop)
    return replace(cfg, scale=(0.8, 1.6), crop=crop)


def streams(domain, step, ctx):
    """-> endless iterators, from this step of the domain on, of (images [B, 3, H, W], masks) and of
    images; with --weak, of (images, pseudo-labels)"""
    cfg = domain.cfg
    train = domain.data.train
    number = domain.number or ""
    transform = partial(augment, cfg)
    stream_l = Stream(train, domain.labelled, transform, cfg.seed, f"labelled{number}", True)
    stream_u = Stream(domain.pseudo or train, domain.unlabelled, transform, cfg.seed,
                      f"unlabelled{number}", cfg.weak)
    share = ctx.share(cfg.batch)
    return [endless(stream, share, step, cfg.workers, ctx) for stream in (stream_l, stream_u)]


# ---------------------------------------------------------------------- evaluation (App. F, I)

@torch.no_grad()
def predict(net, x, domain, cfg, ctx):
    """Logits [B, C, H, W] of x at its own size, in the classes of a domain, whose number is given.
    --multi-scale: mean over 5 scales, mirrored too"""
    with ctx.autocast():
        if not cfg.multi_scale:
            return net(x, domain).float()
        total = 0
        for scale in (0.5, 0.75, 1, 1.25, 1.5):  # App. F
            scaled = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            logits = net(scaled, domain).float() + net(scaled.flip(3), domain).float().flip(3)
            total += F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=True) / 10
        return total


def evaluate(net, domain, ctx):
    """Protocol: whole images, single scale (or --multi-scale), logits at image size, argmax; one
    confusion matrix over the split; 255 ignored; each image once.
    -> (ConfusionMatrix, rows of the panel)"""
    net.eval()
    confusion = ConfusionMatrix(len(domain.data.classes), ctx.device)
    examples = Examples(len(domain.data.val), ctx)
    for x, y in scored_batches(domain.data, domain.cfg, ctx):
        prediction = predict(net, x, domain.number, domain.cfg, ctx).argmax(1)
        confusion.update(prediction, y)
        examples.add(x, y, prediction)
    confusion.reduce()
    net.train()
    return confusion, examples.rows


def evaluate_all(net, domains, folder, step, ctx):
    """Score every domain, and note it. -> {name of a domain: ConfusionMatrix}"""
    confusions = {}
    for domain in domains:
        confusions[domain.name], rows = evaluate(net, domain, ctx)
        folder.show(rows, domain.data)
    each = {f"miou_{name}": confusion.miou() for name, confusion in confusions.items()}
    folder.scored(step, mean_miou(confusions), **(each if len(each) > 1 else {}))
    return confusions


# ---------------------------------------------------------------------- training (Algorithm 1)

def train(cfg, settings):
    """Train, or resume, the run in cfg.out; ends with the `final:` line. -> mIoU, 0..1
    settings: {name: Config} of the domains, which take turns (Sec. 3.4)"""
    ctx = Runtime(cfg.device, cfg.precision)
    ctx.share(cfg.batch)  # a wrong --batch is an error now, not after the classifier of --weak
    domains = [Domain(number, name, settings[name]) for number, name in enumerate(settings)]
    for domain in domains:
        domain.choose_labelled()
    longest = max(math.ceil(len(domain.unlabelled) / cfg.batch) for domain in domains)
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(domains) * longest)
    folder = RunFolder("cct", cfg, ctx, *(domain.data for domain in domains))
    prepare(domains, folder, ctx)

    torch.manual_seed(mix(cfg.seed, "init"))  # the same initial weights on every process
    net, auxiliaries, discriminator = make_networks(cfg, domains)
    if folder.is_new:
        load_weights(net.encoder.backbone, cfg.backbone, cfg.weights, ctx.say)
    net = ctx.place(net)
    heads = nn.ModuleList([net.decoders, auxiliaries, discriminator]).to(ctx.device)
    method = None if cfg.supervised else cfg.method
    teacher = make_teacher(net).eval() if method == "mean_teacher" else None
    optimizer = make_optimizer(net, heads, cfg)
    step = folder.resume(cfg.batch * (2 if method else 1), cfg.steps, net=net,
                         auxiliaries=auxiliaries, discriminator=discriminator, teacher=teacher,
                         optimizer=optimizer, scaler=ctx.scaler)
    encode = ctx.wrap(net.encoder, cfg.compile)
    for domain in domains:
        folder.introduce(domain.labelled, domain.unlabelled, step, data=domain.data)
        done = len(range(domain.number, step, len(domains)))  # steps of this domain
        domain.batches_l, domain.batches_u = streams(domain, done, ctx)

    net.train()
    while step < cfg.steps:
        folder.stop_if_asked(step)
        if step > 0 and step % cfg.eval_every == 0:
            evaluate_all(net, domains, folder, step, ctx)
        domain = domains[step % len(domains)]
        main = net.decoders[domain.number]
        auxiliary = auxiliaries[domain.number]
        lr = cfg.lr * poly(step, cfg.steps)
        set_lr(optimizer, lr)
        with folder.log.waiting():
            x_l, y_l = next(domain.batches_l)
            batch_u = next(domain.batches_u) if method else None
        x_u, y_w = batch_u if cfg.weak else (batch_u, None)  # y_w: pseudo-labels
        optimizer.zero_grad()  # .grad = None: decoders of idle domains neither move nor decay
        if method == "vat":
            rng = ctx.random(cfg.seed, "vat", step)
            x_u, p = input_vat(net, x_u, rng, cfg.vat_xi, cfg.vat_eps, domain=domain.number)
        with ctx.autocast():
            z_l, z_u = encode(x_l, x_u) if method else (encode(x_l), None)
            logits_l = crop(main(z_l), x_l)
        if cfg.supervised_loss == "ab_ce":
            y_l = without_easy_pixels(logits_l, y_l, eta(step, cfg, logits_l.shape[1]))  # Eq. 4
        loss = loss_s = cross_entropy(logits_l, y_l, ctx.count(y_l != T.IGNORE))  # Eq. 1
        terms = dict(loss_s=loss_s)
        if cfg.lambda_adv:  # Eq. 11, 12
            with ctx.autocast():
                guess = discriminator(reverse_gradient(torch.cat([z_l, z_u]), cfg.lambda_adv))
            loss_adv = domain_loss(guess, domain.number)
            loss = loss + loss_adv
            terms |= dict(loss_adv=loss_adv)
        if method == "cct":
            # Eq. 3: L = L_s + w_u L_u, Eq. 5: + w_w L_w; the terms' gradient enters at z
            gradient, losses = train_auxiliary(main, auxiliary, z_u, x_u, y_w, step, cfg, ctx)
            torch.autograd.backward([ctx.scaler.scale(loss), z_u], [None, gradient])
            terms |= losses
        elif method:
            with ctx.autocast():
                logits_u = crop(main(z_u), x_u)
                if method == "mean_teacher":
                    with torch.no_grad():
                        p = teacher(x_u, domain.number).float().softmax(1)
            loss_u = distance("kl" if method == "vat" else "mse", p, logits_u).mean()  # App. A
            w_u = ramped_weight(cfg.lambda_u, step, cfg)  # Sec. 3.2.2, Eq. 16
            ctx.scaler.scale(loss + w_u * loss_u).backward()
            terms |= dict(loss_u=loss_u, w_u=w_u)
        else:
            ctx.scaler.scale(loss).backward()
        ctx.average_grads(heads.parameters())
        ctx.scaler.step(optimizer)
        ctx.scaler.update()
        if teacher is not None:
            ramping = step < cfg.ramp_length * cfg.steps
            update_ema(teacher, net, 0.99 if ramping else cfg.ema)
        step += 1
        folder.log.add(step, **terms, lr=lr)
        if step % cfg.save_every == 0 or step % cfg.eval_every == 0 or step == cfg.steps:
            folder.save(step)
    confusions = evaluate_all(net, domains, folder, step, ctx)
    say_tables(confusions, domains, ctx)
    folder.finish(result=f"mIoU {100 * mean_miou(confusions):.1f} ({folder.best_score})")
    return mean_miou(confusions)


def prepare(domains, folder, ctx):
    """Before the training, for each domain: note its settings for the checkpoints, make its
    pseudo-labels (Sec. 3.3), and open the cache of its images"""
    for domain, about in zip(domains, folder.about["domains"]):
        cfg = domain.cfg
        about["own"] = {name: getattr(cfg, name) for name in (*PRESET_OF_EACH, *GIVEN_FOR_EACH)}
        if cfg.weak:
            part = folder.part("weak" if len(domains) == 1 else f"weak-{domain.name}")
            transform = partial(augment, classifier_settings(cfg))
            domain.pseudo = weak_labels(domain, transform, part, ctx)
        domain.data = cached(domain.data, cfg.size, cfg, ctx)
        if cfg.weak:
            domain.pseudo.split = domain.data.train  # so that its images are cached, too


def make_networks(cfg, domains):
    """-> (f, [its auxiliary decoders of each domain], discriminator or None)"""
    net = Segmenter(cfg, [len(domain.data.classes) for domain in domains])
    channels = net.encoder.psp.out_channels
    auxiliaries = nn.ModuleList(Auxiliary(domain.cfg, channels, len(domain.data.classes))
                                for domain in domains)
    discriminator = Discriminator(channels, len(domains)) if cfg.lambda_adv else None
    return net, auxiliaries, discriminator


def make_optimizer(net, heads, cfg):
    """Two groups: the ResNet, and all else. heads: the decoders and the discriminator"""
    groups = [dict(params=list(net.encoder.backbone.parameters()), lr_mult=cfg.backbone_lr_mult),
              dict(params=[*net.encoder.psp.parameters(), *heads.parameters()], lr_mult=1.0)]
    if cfg.optimizer == "sgd":
        return momentum_sgd(groups, cfg.lr, cfg.weight_decay)
    return torch.optim.Adam(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def train_auxiliary(main, auxiliary, z_u, x_u, y_w, step, cfg, ctx):
    """The backward pass of w_u L_u, w_w L_w and the pairwise loss, one auxiliary decoder at a time,
    so that memory does not grow with K. -> (the gradient at z_u, the losses)
    main: g. z_u [B, 512, h, w] = h(x_u). y_w: pseudo-labels of x_u, or None."""
    w_u = ramped_weight(cfg.lambda_u, step, cfg)  # Sec. 3.2.2, Eq. 16
    w_w = ramped_weight(cfg.lambda_w, step, cfg)  # Eq. 5
    z = z_u.detach().float().requires_grad_()
    p, guides = main_prediction(main, auxiliary, z_u, ctx)
    keep = p.amax(1) > cfg.confidence  # App. B.2
    kept = len(auxiliary.names) * ctx.count(keep)  # Eq. 2: a mean over pixels and decoders
    pseudo_labelled = len(auxiliary.names) * ctx.count(y_w != T.IGNORE) if cfg.weak else None
    paired, mean_q = pairwise_mean(auxiliary, z, guides, step, cfg, ctx)
    losses = dict(loss_u=0.0, w_u=w_u)
    losses |= dict(loss_w=0.0, w_w=w_w) if cfg.weak else {}
    losses |= dict(loss_pairwise=0.0) if paired else {}
    for k in range(len(auxiliary.names)):
        logits_k = auxiliary_logits(k, auxiliary, z, guides, step, cfg, ctx)
        loss_k = (auxiliary.distance(cfg.distance, p, logits_k) * keep).sum() / kept  # Eq. 2, 7-9
        losses["loss_u"] += loss_k.detach()
        total_k = w_u * loss_k
        if cfg.weak:
            loss_w_k = cross_entropy(crop(logits_k, x_u), y_w, pseudo_labelled)  # Eq. 6
            losses["loss_w"] += loss_w_k.detach()
            total_k = total_k + w_w * loss_w_k
        if k in paired:
            loss_pair_k = pairwise(logits_k, mean_q) / len(paired)  # Eq. 10
            losses["loss_pairwise"] += loss_pair_k.detach()
            total_k = total_k + cfg.pairwise * loss_pair_k
        ctx.scaler.scale(total_k).backward()  # into z.grad and the decoder's
    return z.grad.to(z_u.dtype), losses


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


# ---------------------------------------------------------------------- command line

def main(argv=None):
    cfg, given = parse(Config, PRESETS, argv, __doc__, RELEASED_SETTINGS)
    if not cfg.evaluate and not cfg.predict:
        train(cfg, settle(cfg, given))
        return
    ctx = Runtime(cfg.device, cfg.precision)
    path = cfg.evaluate or cfg.predict
    cfg, state = open_checkpoint("cct", path, cfg, given, ctx, RELEASED, RELEASED_SETTINGS)
    if state.get("part"):
        raise UserError(f"{path} is a classifier, which segments nothing: expected a file such as "
                        f"runs/.../last.pt")
    known = state["domains"]
    counts = [len(domain["classes"]) for domain in known]
    net = load_network(Segmenter(cfg, counts), state, path, ctx.device)
    chosen = saved_domains(state, Config, given, path)
    if cfg.evaluate:
        domains = [Domain(*domain) for domain in chosen]
        for domain in domains:
            same_classes(domain.data, known[domain.number], path)
        confusions = {domain.name: evaluate(net, domain, ctx)[0] for domain in domains}
        say_tables(confusions, domains, ctx)
        scales = "5 scales + flips" if cfg.multi_scale else "single scale"
        scored = " + ".join(f"{len(d.data.val)} {d.data.scored_on}" for d in domains)
        ctx.say(f"{path} (step {state['step']}): mIoU {100 * mean_miou(confusions):.1f} on "
                f"{scored} images, {scales}")
    elif len(chosen) > 1 and cfg.format != "smoothness":
        raise UserError(f"{path} knows the domains {', '.join(name for _, name, _ in chosen)}: "
                        f"choose the one whose classes to predict with --data")
    else:
        number, _, cfg = chosen[0]
        network = partial(predict, net.eval(), domain=number, cfg=cfg, ctx=ctx)
        if cfg.format == "smoothness":  # Fig. 2, 7
            network = net.encoder.backbone.requires_grad_(False)
        predict_folder(network, cfg, known[number]["palette"], ctx)
    ctx.close()


if __name__ == "__main__":
    sys.exit(run(main))
