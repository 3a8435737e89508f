"""s4GAN + MLMT: Semi-Supervised Semantic Segmentation with High- and Low-level Consistency (Mittal, Tatarchenko, Brox;
TPAMI 2021)

Branch A (s4GAN): a segmentation network S plays the generator against an image-level discriminator D, which sees class
maps together with their image. On unlabelled images S matches D's feature statistics of true maps, and trains on its
own predictions where they fool D. Branch B (MLMT): a multi-label classifier with a Mean Teacher says which classes an
image holds. The branches share the labelled images and nothing else; at test time a class that the classifier rejects
is removed from the segmentation. Paper: arXiv 1908.05724.

Map (paper -> this file)
  Eq. 1 L_ce                     cross_entropy             Sec. 4.1.2 D, Fig. 3        Discriminator
  Eq. 2 L_fm                     feature_matching          input of D                  one_hot, unit_range
  Eq. 3 L_st, gate               self_training             Sec. 4.1.2 S, Table 2       Segmenter
  Eq. 4 L_S                      train_s4gan               Sec. 4.1.2 classifiers      Classifier
  Eq. 5 L_D                      discriminator_loss        Sec. 4.2 mIoU               evaluate
  Eq. 6 L_MT                     multi_label, consistency  Table 5 thresholds          count_heuristics
  Eq. 7 fusion                   fuse, gate                Fig. 12 ROC, AUC            roc, classifier_scores
  Sec. 4.1.3 schedules           make_optimizer, PRESETS   Table 6 standard GAN        adversarial
  Table 7 image-level labels     --weak, train_mlmt        Fig. 11 scores of D         log.csv's columns d_*

Deviations (paper / authors' code / here, and why)
  D1  ASPP: DeepLabv2's 4 rates / only 2 of 4 used (return inside the loop) / 4; --aspp-rates 6,12.
  D2  Backbone lr: 2.5e-4 / listed thrice, about 7.5e-4 / 2.5e-4; --backbone-lr-mult 3. The first knob to try.
      Head: - / ten times / as code, --head-lr-mult.
  D3  BN of S: - / affine fixed, batch statistics / as code (--bn affine); with --weights none BN learns.
  D4  Stride: - / on the 1x1, where torchvision's weights have it on the 3x3 / as code; --stride-on 3x3.
  D5  Input: - / VOC 0..255 less the mean, Cityscapes BGR / as code; --input torchvision, as for all other data.
  D6  VOC augmentation: scale, flip / off by default / on, scale 0.5, 0.6 .. 1.6. PASCAL-Context: as VOC / short side
      252..1010, blur; the centre 512x512 is scored / as code.
  D7  Eq. 1, 3: sums, D(S(x)) >= gamma without the image / means over valid pixels and passing images, > / means, >=.
  D8  D: dropout after all 4 convolutions / Dropout2d after 3 / as code; --d-dropout elementwise. Pooling is adaptive.
  D9  Eq. 2 norm: - / L1, mean over the 512 features / as code. Eq. 5: a maximised sum / 1/2 (BCE + BCE) / as code.
  D10 Gate: - / score with dropout, before D's update, not at step 0 / as code; --gate-eval scores without dropout.
  D11 Image for D: - / batch min-max, of true maps with another batch's span / own span; --real-span ce.
  D12 Void in the maps: - / zero vectors, in true maps only / as code; --void mask_both.
  D13 Eq. 6: softmax CE on several classes / sigmoid and BCE / as code. Consistency: MSE on all images / cosine of
      logits on unlabelled ones / as paper; --cons cosine, --cons-on unlabelled. Its weight ramps up as in the code.
  D14 Teacher: EMA / min(1 - 1/(t+1), .999), its fc drawn anew, own BN statistics / as code, but a copy of the student.
      Optimiser, epochs, batches, image size and the two views of branch B: - / given / as code.
  D15 Eq. 7: on probabilities, G the student / on logits (a class set to 0 beats negative ones), background gated, the
      teacher / on probabilities, background never gated, the teacher.
  D16 Standard GAN (Table 6): named only / absent / -log D(fake) on unlabelled images, weight --lambda-adv.
  D17 DeepLabv3+: backbone not said / a WRN-38 script that does not run / ResNet, stride 16.
  D18 1/8 of 10582 is 1323 here, 1322 in the code. PASCAL-Context's padding: - / background / ignored; --pad-label 0.
  D19 Several GPUs: one global batch: BN, losses, statistics of Eq. 2 and dropout of D do not depend on their number.

Commands
  python s4gan_mlmt.py                                          first run: shapes, both branches, on a CPU in minutes
  python s4gan_mlmt.py --data voc --root data --labeled 1/8     Table 1: s4GAN, then MLMT, then their fusion
  torchrun --nproc_per_node=2 s4gan_mlmt.py --data voc          the same on 2 GPUs, 4 + 4 images each
  python s4gan_mlmt.py --data voc --supervised                  DeepLabv2; the same command again resumes a run
  python s4gan_mlmt.py --data voc --branch s4gan --loss ce+fm   Table 6
  python s4gan_mlmt.py --evaluate runs/A/last.pt --classifier runs/A/mlmt/last.pt  or --predict .., --images photos/
"""
import copy
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms.v2 import functional as tvf

from common import checkpoint
from common import transforms as T
from common.backbones import RESNETS, DeepLabV2, DeepLabV3Plus, load_weights
from common.datasets import DATASETS, choose_labelled, open_dataset
from common.inference import panel, predict_folder
from common.log import Log
from common.miou import ConfusionMatrix
from common.pictures import line_plot
from common.runtime import Runtime, mix
from common.schedules import poly, set_lr, update_ema
from common.settings import Size, UserError, from_dict, keep_config, option, parse, run
from common.streams import Scored, Stream, endless, once

LOSSES = ("ce", "ce+sgan", "ce+fm", "ce+fm+st")  # Table 6


# ------------------------------------------------------------------------------------------------ settings

@dataclass
class Config:
    data: str = option("shapes", "dataset", DATASETS, group="run")
    root: str = option("data", "folder of the data: the dataset's own or its parent")
    download: bool = option(False, "let torchvision download the data (voc)")
    labeled: str = option("all", "labelled images: a count (1464), a fraction (1/8) or all")
    split: str = option("", "file that lists the labelled images, instead of a seeded draw")
    seed: int = option(0, "seed of the draw, the initialisation and the augmentation", within=(0, None))
    supervised: bool = option(False, "the baseline: --loss ce, --mlmt-method cnn, and without --branch only branch A")
    branch: str = option("both", "train S (branch A), the classifier (B), or both", ("s4gan", "mlmt", "both"))
    steps: int = option(35000, "training steps of branch A (Sec. 4.1.3)", within=(1, None))
    out: str = option("", "run folder [runs/s4gan_mlmt-<data>-<labeled>-seed<k>]; the same command resumes it")
    evaluate: str = option("", "score this checkpoint, of either branch, and exit")
    predict: str = option("", "write palette PNGs of --images with this checkpoint of branch A and exit")
    images: str = option("", "folder of images for --predict")
    classifier: tuple[str, ...] | None = option(None, "with --evaluate or --predict: checkpoint of branch B for the "
                                                      "fusion; after a comma others, for their ROC curves alone")
    segmenter: str = option("", "with --branch mlmt: checkpoint of a branch A to fuse with in the end")

    size: Size | None = option(None, "resize every image to this size", group="images")
    scale: tuple[float, float] = option((1.0, 1.0), "range of random rescaling, in steps of 0.1", within=(0.01, None))
    short_side: tuple[int, int] | None = option(None, "range of the shorter side's random length (pcontext)", within=(1, None))
    crop: Size | None = option(None, "random crop")
    pad_label: int = option(T.IGNORE, "label of what a crop has too little; the released code has 0 on pcontext",
                           within=(0, 255))
    blur: float = option(0.0, "probability of a Gaussian blur of radius U(0, 1) (pcontext)", within=(0, 1))
    flip: bool = option(False, "random horizontal flip")
    shift: int = option(0, "random shift of up to this many pixels", within=(0, None))
    input: str = option("torchvision", "what S is fed: torchvision's normalisation, caffe: 0..255 less the mean "
                                       "(released, VOC), city: BGR less a mean (released, Cityscapes)",
                        ("torchvision", "caffe", "city"))
    eval_size: str = option("full", "score at the original size or (train) at --size, --eval-crop", ("full", "train"))
    eval_pad: Size | None = option(None, "pad images to this for S, and crop the logits (voc: 505)")
    eval_crop: int | None = option(None, "score the centre square of the image resized to this shorter side (pcontext)",
                                  within=(1, None))

    network: str = option("deeplabv2", "S (Table 2)", ("deeplabv2", "deeplabv3plus"), group="network")
    backbone: str = option("resnet101", "its ResNet", RESNETS)
    backbone_layers: int = option(4, "keep only the first 2 or 3 layers of the ResNets, for small images (not of DeepLabv3+)",
                                 (2, 3, 4))
    weights: str = option("imagenet", "backbone weights: imagenet (torchvision), none, or a state-dict file (COCO)")
    bn: str | None = option(None, "BN of S's ResNet: affine (batch statistics, weight and bias fixed), frozen, learn "
                                  "[affine; learn with --weights none]", ("frozen", "affine", "learn"))
    aspp_rates: tuple[int, ...] = option((6, 12, 18, 24), "dilations of DeepLabv2's classifier; released code 6,12",
                                          within=(1, None))
    stride_on: str = option("1x1", "convolution of a bottleneck with the stride; torchvision 3x3", ("1x1", "3x3"))
    d_width: int = option(64, "channels of D's first convolution, doubled by each of the next three", within=(1, None))

    loss: str = option("ce+fm+st", "L_S (Table 6)", LOSSES, group="s4GAN")
    lambda_fm: float = option(0.1, "weight of L_fm (Eq. 4)")
    lambda_st: float = option(1.0, "weight of L_st (Eq. 4)")
    lambda_adv: float = option(0.01, "weight of the standard GAN loss (ce+sgan)")
    gamma: float = option(0.6, "score of D from which a prediction is trained on (Eq. 3)")
    gate_eval: bool = option(False, "take that score without dropout")
    d_dropout: str = option("spatial", "channels after 3 convolutions, or elements after 4", ("spatial", "elementwise"))
    void: str = option("zero", "true maps are 0 where ignored, or the predicted ones too", ("zero", "mask_both"))
    real_span: str = option("own", "range that scales D's images of true maps; released: the ce batch's", ("own", "ce"))

    mlmt_method: str = option("mlmt", "Mean Teacher, or a supervised cnn (Table 5)", ("mlmt", "cnn"), group="MLMT")
    mlmt_backbone: str = option("resnet101", "the classifier (Sec. 4.1.2)", RESNETS)
    mlmt_weights: str | None = option(None, "its weights, as --weights [imagenet; none with --weights none]")
    mlmt_size: Size = option((320, 320), "its input size")
    mlmt_epochs: int = option(100, "passes over the labelled images", within=(1, None))
    mlmt_batch: int = option(16, "labelled images per step over all processes", within=(1, None))
    mlmt_batch_u: int = option(80, "unlabelled images per step", within=(1, None))
    mlmt_lr: float = option(0.03, "its learning rate, cosine per epoch down to 1e-4", within=(0, None))
    mlmt_weight_decay: float = option(1e-5, "its weight decay", within=(0, None))
    mlmt_blur: tuple[float, float] = option((0.1, 2.0), "range of the strong view's blur, in pixels")
    weak: bool = option(False, "image-level labels for all other images that have a mask (Table 7)")
    lambda_cons: float = option(1.0, "final weight of L_cons (Eq. 6)")
    cons: str = option("mse", "L_cons: mse of probabilities, or 1 - cosine of logits (released)", ("mse", "cosine"))
    cons_on: str = option("all", "images of L_cons (released: unlabelled)", ("all", "unlabelled"))
    burn_in: int = option(10, "epochs before L_cons")
    ema: float = option(0.999, "the teacher's final decay", within=(0, 1))
    ema_buffers: str = option("keep", "the teacher's BN statistics: its own (keep), or the student's", ("keep", "copy"))

    tau: float = option(0.2, "classifier probability up to which a class is removed (Eq. 7)", group="fusion")
    background: tuple[int, ...] = option((0,), "ids of the classes that are never removed, or none")
    heuristics: bool = option(False, "with --evaluate: remove classes by their number of pixels instead (Table 5)")
    count_step: int = option(1000, "its thresholds: 1 to 12 times this many pixels", within=(1, None))

    batch: int = option(8, "images per step over all processes, of each of the 3 streams", group="optimisation",
                       within=(1, None))
    optimizer: str = option("sgd", "of S: sgd (momentum 0.9) or adam", ("sgd", "adam"))
    lr: float = option(2.5e-4, "base learning rate of S (Sec. 4.1.3)", within=(0, None))
    backbone_lr_mult: float = option(1.0, "the backbone's multiple of it; the released code amounts to 3", within=(0, None))
    head_lr_mult: float | None = option(None, "the classification layers' multiple of it [10; 1 with --weights none]",
                                        within=(0, None))
    weight_decay: float = option(5e-4, "of S (Sec. 4.1.3)", within=(0, None))
    lr_d: float = option(1e-4, "learning rate of D (Sec. 4.1.3)", within=(0, None))

    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"), group="machine")
    precision: str = option("auto", "auto is bf16 (fp16 on old GPUs) on CUDA and fp32 on CPU",
                            ("auto", "fp32", "bf16", "fp16"))
    compile: bool = option(False, "torch.compile S and the classifier")
    workers: int = option(4, "processes that decode and augment, per stream", within=(0, None))
    eval_every: int = option(1000, "steps between evaluations", within=(1, None))
    save_every: int = option(500, "steps between checkpoints", within=(1, None))
    log_every: int = option(20, "steps between log lines", within=(1, None))


PRESETS = {
    "shapes": dict(labeled="40", steps=600, batch=6, flip=True, shift=6, backbone="resnet18", backbone_layers=2,
                   weights="none", aspp_rates=(1, 2, 3, 6), d_width=32, lambda_fm=1.0, gamma=0.55, optimizer="adam",
                   lr=1e-3, lr_d=3e-4, mlmt_backbone="resnet18", mlmt_size=(64, 64), mlmt_epochs=100, mlmt_batch=10,
                   mlmt_batch_u=10, mlmt_weight_decay=5e-3, mlmt_blur=(0.1, 0.6), lambda_cons=5.0, ema=0.99, tau=0.02,
                   count_step=50, workers=0, eval_every=200, save_every=100),
    "voc": dict(labeled="1/8", scale=(0.5, 1.6), crop=(321, 321), flip=True, input="caffe",
                eval_pad=(505, 505)),
    "pcontext": dict(labeled="1/8", steps=50000, short_side=(252, 1010), crop=(321, 321), blur=0.5, flip=True,
                     eval_size="train", eval_crop=512),
    "cityscapes": dict(labeled="1/8", batch=5, branch="s4gan", size=(512, 1024), crop=(256, 512),
                       flip=True, input="city", eval_size="train", gamma=0.7, lr_d=1e-5, background=()),
    "camvid": dict(labeled="100", steps=10000, branch="s4gan", size=(360, 480), crop=(321, 321), flip=True,
                   eval_size="train", background=()),
    "folder": dict(scale=(0.5, 1.6), crop=(321, 321), flip=True),
}
PRESETS |= {  # not in the paper
    "pcontext59": PRESETS["pcontext"] | dict(background=()),
    "bdd100k": PRESETS["cityscapes"] | dict(size=(512, 910), input="torchvision"),
    **dict.fromkeys(("sunrgbd", "sunrgbd13"), PRESETS["camvid"] | dict(labeled="1500", size=(480, 640)))}
FREE = ("root", "download", "branch", "out", "evaluate", "predict", "images", "classifier", "segmenter", "heuristics",
        "device", "workers", "compile", "eval_every", "save_every", "log_every")  # may differ when a run is resumed
OF_B = ("mlmt_method", "mlmt_backbone", "mlmt_weights", "mlmt_size", "mlmt_epochs", "mlmt_batch", "mlmt_batch_u", "mlmt_lr",
        "mlmt_weight_decay", "mlmt_blur", "weak", "lambda_cons", "cons", "cons_on", "burn_in", "ema",
        "ema_buffers")  # and these, until branch B has a checkpoint


# ------------------------------------------------------------------------------------------------ models (Sec. 4.1.2)

class Segmenter(nn.Module):
    """S: single-scale DeepLabv2, or DeepLabv3+."""

    def __init__(self, cfg, num_classes):
        super().__init__()
        if cfg.network == "deeplabv2":
            self.net = DeepLabV2(num_classes, cfg.backbone, cfg.backbone_layers, cfg.aspp_rates, cfg.stride_on, cfg.bn)
        else:
            self.net = DeepLabV3Plus(num_classes, cfg.backbone, cfg.bn)
        mean, std = torch.tensor(T.IMAGENET_MEAN), torch.tensor(T.IMAGENET_STD)
        scale, shift = torch.ones(3), torch.zeros(3)
        if cfg.input == "caffe":
            scale, shift = 255 * std, 255 * mean - torch.tensor((122.67891434, 116.66876762, 104.00698793))
        elif cfg.input == "city":  # the mean is applied to B, G, R in this order
            scale, shift = std, mean - torch.tensor((72.39239876, 82.90891754, 73.15835921)) / 255
        self.bgr = cfg.input == "city"
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)

    def prepare(self, x):
        """Images normalised as for torchvision's weights -> what S and D are fed (--input)"""
        x = x * self.scale + self.shift
        return x.flip(1) if self.bgr else x

    def forward(self, x, x_u=None):
        """Prepared images [B, 3, H, W] -> logits [B, C, H, W], two of them in two passes: each its own BN statistics"""
        logits = self.net(x)
        return logits if x_u is None else (logits, self.net(x_u))


class Discriminator(nn.Module):
    """D: four 4x4 convolutions of stride 2, leaky ReLU 0.2 and dropout 0.5, global average pooling, one linear layer.

    64, 128, 256, 512 channels: 1024 (C + 3) + 2,753,985 parameters.
    """

    def __init__(self, num_classes, width=64, dropout="spatial"):
        super().__init__()
        channels = [num_classes + 3, width, 2 * width, 4 * width, 8 * width]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip(channels, channels[1:]))
        self.fc, self.dropout = nn.Linear(8 * width, 1), dropout

    def forward(self, maps, image, rng=None):
        """Class maps [B, C, H, W] + their image [B, 3, H, W] in 0..1 -> (logit of the score [B], D_k of Eq. 2 [B, 512])

        rng: common.runtime.Random for the dropout masks, drawn for the global batch; None: no dropout.
        """
        x = torch.cat([maps, image], 1)
        for k, conv in enumerate(self.convs):
            x = F.leaky_relu(conv(x), 0.2)
            if rng and self.dropout == "elementwise":
                x = x * (2 * (rng.uniform(*x.shape) >= 0.5)).to(x.dtype)
            elif rng and k < 3:
                x = x * (2 * (rng.uniform(*x.shape[:2], 1, 1) >= 0.5)).to(x.dtype)
        feature = x.float().mean((2, 3))
        return self.fc(feature)[:, 0].float(), feature


class Classifier(nn.Module):
    """G, and its teacher H: torchvision's ResNet with a new last layer; one sigmoid per class, background included."""

    def __init__(self, cfg, num_classes):
        super().__init__()
        self.body, self.size = getattr(torchvision.models, cfg.mlmt_backbone)(weights=None), cfg.mlmt_size
        for part in ("fc", *("layer4", "layer3")[:4 - cfg.backbone_layers]):
            setattr(self.body, part, nn.Identity())
        channels = [m for m in self.body.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x, x_u=None):
        """[B, 3, h, w] -> logits [B, C]; with x_u a second pass, with BN statistics of its own"""
        logits = self.fc(self.body(x))
        return logits if x_u is None else (logits, self.fc(self.body(x_u)))


# ------------------------------------------------------------------------------------------------ inputs of D

def one_hot(y, num_classes):
    """Labels [B, H, W] -> true maps [B, C, H, W]; all zero where a pixel is ignored"""
    return (y[:, None] == torch.arange(num_classes, device=y.device)[:, None, None]).float()


def unit_range(x, ctx, span_of=None):
    """(x - min) / (max - min), over all values of the global batch. span_of: another batch whose max - min is taken"""
    def extremes(batch):
        low, high = ctx.gather(torch.stack([batch.amin(), batch.amax()])[None]).unbind(1)
        return low.min(), high.max()
    low, high = extremes(x)
    other = (low, high) if span_of is None else extremes(span_of)
    return (x - low) / (other[1] - other[0]).clamp(min=1e-6)


# ------------------------------------------------------------------------------------------------ losses and ramps

def cross_entropy(logits, y, ctx):
    """Eq. 1: L_ce = mean over valid pixels of H(y, S(x)). logits [B, C, H, W], y [B, H, W], 255 ignored -> scalar"""
    total = F.cross_entropy(logits.float(), y, ignore_index=T.IGNORE, reduction="sum")
    return ctx.global_mean(total, (y != T.IGNORE).sum())


def feature_matching(real, fake, ctx):
    """Eq. 2: L_fm = 1/512 || E[D_k(y_l + x_l)] - E[D_k(S(x_u) + x_u)] ||_1. features [B, 512] each -> scalar

    E is the mean over the global batch: what the local mean lacks of it is added as a constant, so that the local
    gradients are the global ones, which DDP then averages.
    """
    def expectation(features):
        local = features.float().mean(0)
        return local + (ctx.mean(local) - local).detach()
    return (expectation(real) - expectation(fake)).abs().mean()


def self_training(logits, passed, ctx):
    """Eq. 3: L_st = mean over the pixels of the images with D(S(x_u)) >= gamma of H(y*, S(x_u)), y* = argmax S(x_u)

    logits [B, C, H, W], passed bool [B] -> scalar, 0 when none passes. y* is a constant, the logits are not.
    """
    logits = logits.float()
    per_image = F.cross_entropy(logits, logits.detach().argmax(1), reduction="none").mean((1, 2))
    return ctx.global_mean((per_image * passed).sum(), passed.sum())


def adversarial(fake):
    """Table 6, standard GAN: L_adv = -E[log D(S(x_u) + x_u)]. Logits of D's score [B] -> scalar"""
    return F.softplus(-fake).mean()


def discriminator_loss(real, fake):
    """Eq. 5, negated and halved: L_D = -1/2 E[log D(y_l + x_l)] - 1/2 E[log(1 - D(S(x_u) + x_u))]. Logits [B] each"""
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def multi_label(logits, z):
    """Eq. 6: L_cce, binary cross-entropy, mean over images and classes. logits [B, C], z multi-hot [B, C] -> scalar"""
    return F.binary_cross_entropy_with_logits(logits.float(), z.float())


def consistency(kind, student, teacher):
    """Eq. 6: L_cons = || G(x) - H(x') ||^2, mean over images and classes. student, teacher: logits [B, C]

    mse: of the sigmoids. cosine: 1 - cos of the logits (released code). The teacher is a constant.
    """
    student, teacher = student.float(), teacher.detach().float()
    if kind == "cosine":
        return (1 - F.cosine_similarity(student, teacher)).mean()
    return F.mse_loss(student.sigmoid(), teacher.sigmoid())


def consistency_weight(epoch, cfg):
    """lambda_cons, from 0 after --burn-in epochs up to its final value within half of the epochs"""
    return cfg.lambda_cons * min(1.0, max(0.0, 2 * (epoch - cfg.burn_in) / cfg.mlmt_epochs))


def mlmt_lr(epoch, cfg):
    """Cosine from --mlmt-lr to 1e-4 over the epochs, constant within each"""
    low = min(1e-4, cfg.mlmt_lr)
    return low + (cfg.mlmt_lr - low) * (1 + math.cos(math.pi * epoch / cfg.mlmt_epochs)) / 2


# ------------------------------------------------------------------------------------------------ data (Sec. 4.1)

class Augment:
    """Training transform of branch A, the same for labelled and unlabelled images."""

    def __init__(self, cfg):
        self.cfg = cfg

    def __call__(self, image, mask, rng):
        cfg, (image, mask) = self.cfg, T.to_tensors(image, mask)
        if cfg.size:
            image, mask = T.resize(image, mask, cfg.size)
        (height, width), (low, high) = image.shape[1:], cfg.scale
        scale = low + 0.1 * int(rng.integers(round((high - low) / 0.1) + 1))
        if cfg.short_side:
            scale = int(rng.integers(cfg.short_side[0], cfg.short_side[1] + 1)) / min(height, width)
        image, mask = T.resize(image, mask, (round(height * scale), round(width * scale)))
        image, (height, width) = T.normalise(image), image.shape[1:]
        if cfg.crop:
            image, mask = T.pad_to(image, mask, cfg.crop)
            if mask is not None:
                mask[height:], mask[:, width:] = cfg.pad_label, cfg.pad_label
            image, mask = T.random_crop(image, mask, cfg.crop, rng)
        if cfg.blur and rng.random() < cfg.blur:
            image = blurred(image, (0, 1), rng)
        if cfg.shift:
            image, mask = T.random_shift(image, mask, cfg.shift, rng)
        if cfg.flip:
            image, mask = T.random_flip(image, mask, rng)
        return image, mask


def two_views(image, mask, rng, cfg, num_classes, strong):
    """Training transform of branch B -> (views of student and teacher, multi-hot z of the mask's classes).

    Weak view: flip. Strong view, of the student on unlabelled images: colour jitter .4, .4, .4, .1, flip, blur.
    """
    image, mask = T.to_tensors(image, mask)
    z = None if mask is None else presence(mask[None].long(), num_classes)[0]
    teacher = T.resize(image, None, cfg.mlmt_size)[0]
    student = jittered(teacher, rng) if strong else teacher
    student, teacher = (T.random_flip(T.normalise(view), None, rng)[0] for view in (student, teacher))
    return (blurred(student, cfg.mlmt_blur, rng) if strong else student, teacher), z


def presence(y, num_classes):
    """Which classes occur in each mask: [B, H, W], 255 ignored -> float [B, C] of 0 and 1"""
    return torch.zeros(len(y), 256, device=y.device).scatter_(1, y.flatten(1), 1.0)[:, :num_classes]


def jittered(image, rng):
    """Brightness, contrast, saturation by U(.6, 1.4) and hue by U(-.1, .1), in random order"""
    low, high = (0.6, 0.6, 0.6, -0.1), (1.4, 1.4, 1.4, 0.1)
    changes = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    for k in rng.permutation(4):
        image = changes[k](image, float(rng.uniform(low[k], high[k])))
    return image


def blurred(image, sigmas, rng):
    """Gaussian blur of a standard deviation drawn from the range, in pixels"""
    sigma = max(float(rng.uniform(*sigmas)), 0.01)
    return tvf.gaussian_blur(image, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma, sigma])


def centre_square(image, mask, rng=None, side=512):
    """Scoring transform of PASCAL-Context: shorter side resized to `side`, then the central square, of the mask too"""
    image, mask = T.to_tensors(image, mask)
    scale = side / min(image.shape[1:])
    image, mask = T.resize(image, mask, [round(length * scale) for length in image.shape[1:]])
    return T.normalise(tvf.center_crop(image, [side, side])), tvf.center_crop(mask[None], [side, side])[0]


# ------------------------------------------------------------------------------------------------ fusion, evaluation

def gate(p, keep):
    """Deactivate class maps: p [B, C, H, W] >= 0, keep bool [B, C] -> p, less than 0 where a class is not kept

    Less than 0, so that it cannot win against a kept class that underflowed to 0. An image that would lose all its
    classes, which can only happen without a background, stays as it is.
    """
    keep = keep | ~keep.any(1, keepdim=True)
    return p.masked_fill(~keep[:, :, None, None], -1.0)


def always_kept(num_classes, cfg, device):
    """bool [C]: the background. UserError if it is no class of the dataset"""
    if any(c >= num_classes for c in cfg.background):
        raise UserError(f"--background {','.join(map(str, cfg.background))}: {cfg.data} has classes 0..{num_classes - 1}")
    return torch.tensor([c in cfg.background for c in range(num_classes)], device=device)


def fuse(p, g, cfg):
    """Eq. 7: the maps S(x)_c of the classes with G(x)_c <= tau are removed. p [B, C, H, W], g [B, C], probabilities"""
    return gate(p, (g > cfg.tau) | always_kept(p.shape[1], cfg, p.device))


@torch.no_grad()
def predict(net, x, cfg, ctx, classifier=None):
    """S's logits [B, C, H, W] of x at its own size; with a classifier the fused probabilities instead (Eq. 7)"""
    height, width = x.shape[2:]
    padded = net.prepare(x)
    if cfg.eval_pad:
        padded = F.pad(padded, (0, max(0, cfg.eval_pad[1] - width), 0, max(0, cfg.eval_pad[0] - height)))
    with ctx.autocast():
        logits = net(padded)[..., :height, :width].float()
    return fuse(logits.softmax(1), classify(classifier, x, ctx), cfg) if classifier else logits


@torch.no_grad()
def classify(classifier, x, ctx):
    """Probabilities [B, C] of the classes in x, which is resized to the classifier's input size"""
    x = F.interpolate(x, classifier.size, mode="bilinear", align_corners=False, antialias=True)
    with ctx.autocast():
        return classifier(x).float().sigmoid()


def scored_batches(data, cfg, ctx):
    """(rows, images, masks) of this process's share of the scored split; rows: their places in the split"""
    size, side = scoring_size(cfg), cfg.eval_crop if cfg.eval_size == "train" else None
    transform = partial(centre_square, side=side) if side else T.ForScoring(size)
    scored, done = Scored(data.val, transform, ctx), 0
    batch = cfg.batch if size or side or data.name == "shapes" else 1  # images of one size are batched
    for x, y in once(scored, batch, cfg.workers, ctx):
        yield list(scored.mine[done:done + len(x)]), x, y
        done += len(x)


def evaluate(net, data, cfg, ctx, classifier=None):
    """Protocol: whole images, single scale, logits at image size, argmax; one confusion matrix over the split; 255
    ignored. Each image is scored exactly once, on one process. -> [ConfusionMatrix], with a classifier a second one,
    of the fusion"""
    networks = [net, classifier] if classifier else [net]
    confusions = [ConfusionMatrix(len(data.classes), ctx.device) for _ in networks]
    for network in networks:
        network.eval()
    for _, x, y in scored_batches(data, cfg, ctx):
        logits = predict(net, x, cfg, ctx)
        confusions[0].update(logits.argmax(1), y)
        if classifier:
            confusions[1].update(fuse(logits.softmax(1), classify(classifier, x, ctx), cfg).argmax(1), y)
    for network, confusion in zip(networks, confusions):
        confusion.reduce()
        network.train()
    return confusions


def scoring_size(cfg):
    """Size to which images are resized to be scored (Cityscapes, CamVid); None: their own, or --eval-crop's square"""
    if cfg.eval_size == "train" and not (cfg.size or cfg.eval_crop):
        raise UserError("--eval-size train scores at --size, which is not set here: give --size, or --eval-size full")
    return cfg.size if cfg.eval_size == "train" else None


@torch.no_grad()
def count_heuristics(net, data, cfg, ctx):
    """Table 5: remove a class where S gives it fewer than T pixels of an image. T is tuned on the scored split itself.

    Threshold: one T for all classes, of 1 .. 12 times --count-step, the best in mIoU. Class-wise: T_c, or 0, with the
    best IoU_c when c alone is filtered; then all are applied together. -> (T, its ConfusionMatrix), ([T_c], theirs)
    """
    net.eval()
    c, background = len(data.classes), always_kept(len(data.classes), cfg, ctx.device)
    steps = cfg.count_step * torch.arange(13, device=ctx.device)
    common, joint = [ConfusionMatrix(c, ctx.device) for _ in steps[1:]], ConfusionMatrix(c, ctx.device)
    tally = torch.zeros(3, 13, c, dtype=torch.int64, device=ctx.device)  # hits, predicted, true pixels per T and class

    def count(classes, where):
        """[B, H, W] -> pixels of each class where it holds, [B, C]"""
        counts = torch.zeros(len(classes), 256, dtype=torch.int64, device=ctx.device)
        return counts.scatter_add_(1, classes.flatten(1), where.flatten(1).long())[:, :c]

    for _, x, y in scored_batches(data, cfg, ctx):
        p = predict(net, x, cfg, ctx).softmax(1)
        first, valid = p.argmax(1), y != T.IGNORE
        pixels = count(first, torch.ones_like(first))
        keep = pixels >= steps[:, None, None]  # [13, B, C]
        tally[0] += (keep * count(first, first == y)).sum(1)
        tally[1] += (keep * count(first, valid)).sum(1)
        tally[2] += count(y, valid).sum(0)
        for k, confusion in enumerate(common, 1):
            confusion.update(gate(p, keep[k] | background).argmax(1), y)
    hits, predicted, true = ctx.sum(tally).double()
    iou = (hits / (true + predicted - hits)).nan_to_num(0)
    of_class = torch.where(background, 0, steps[iou.argmax(0)])  # argmax: the smallest of equally good ones
    for _, x, y in scored_batches(data, cfg, ctx):
        p = predict(net, x, cfg, ctx).softmax(1)
        first = p.argmax(1)
        joint.update(gate(p, (count(first, torch.ones_like(first)) >= of_class) | background).argmax(1), y)
    for confusion in (*common, joint):
        confusion.reduce()
    best = max(range(12), key=lambda k: common[k].miou())
    return (int(steps[best + 1]), common[best]), (of_class.tolist(), joint)


def classifier_scores(classifiers, data, cfg, ctx):
    """-> truth [N, C] of 0 and 1, and for each classifier its probabilities [N, C], on every process"""
    table = torch.zeros(1 + len(classifiers), len(data.val), len(data.classes), device=ctx.device)
    for classifier in classifiers:
        classifier.eval()
    for rows, x, y in scored_batches(data, cfg, ctx):
        table[0, rows] = presence(y, len(data.classes))
        for k, classifier in enumerate(classifiers, 1):
            table[k, rows] = classify(classifier, x, ctx)
    for classifier in classifiers:
        classifier.train()
    truth, *scores = ctx.sum(table).cpu()
    return truth, scores


def roc(score, truth):
    """One point per distinct threshold, from (0, 0): score [N], truth [N] of 0 and 1 -> (fpr, tpr, area under them)

    NaN if all or none are true.
    """
    order = score.argsort(descending=True)
    score, truth = score[order], truth[order].double()
    last = torch.cat([score[1:] != score[:-1], torch.ones(1, dtype=torch.bool)])  # of its group of equal scores
    tp, fp = truth.cumsum(0)[last], (1 - truth).cumsum(0)[last]
    fpr, tpr = (F.pad(n, (1, 0)) / n[-1] for n in (fp, tp))
    return fpr, tpr, torch.trapezoid(tpr, fpr).item()


def auc(scores, truth, cfg):
    """Fig. 12: (macro, micro, fpr, tpr) over the classes that the fusion may remove. micro pools all (image, class)"""
    classes = ~always_kept(scores.shape[1], cfg, scores.device)
    scores, truth = scores[:, classes], truth[:, classes]
    areas = torch.tensor([roc(s, t)[2] for s, t in zip(scores.T, truth.T)])
    fpr, tpr, micro = roc(scores.flatten(), truth.flatten())
    return areas.nanmean().item(), micro, fpr, tpr


def in_words(macro, micro):
    """The AUCs as a line for the user"""
    if math.isnan(macro):
        return "AUC not defined, because every class is in all scored images or in none"
    return f"AUC macro {macro:.4f}, micro {micro:.4f}"


def roc_picture(curves, path):
    """curves: {name: what auc returns}. No picture where AUC is not defined, as if all classes are in all images"""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = {f"{name}, AUC {micro:.4f}": torch.stack([fpr, tpr], 1).tolist()
             for name, (_, micro, fpr, tpr) in curves.items() if not math.isnan(micro)}
    if lines:
        line_plot([("true positive rate, all classes pooled (Fig. 12)", lines)], path, "false positive rate")


# ------------------------------------------------------------------------------------------------ training

def train(cfg):
    """Train, or resume, the branches of cfg.branch in cfg.out, then score them; ends with the `final:` line.
    -> final mIoU, 0..1; of a classifier alone its macro AUC"""
    ctx = Runtime(cfg.device, cfg.precision)
    cfg.precision = ctx.precision  # config.json has what `auto` came to: a resumption must not change it
    data = open_dataset(cfg.data, cfg.root, cfg.download)
    labelled, unlabelled = choose_labelled(data, cfg.labeled, cfg.split, cfg.seed)  # one draw for both branches
    unlabelled = unlabelled or list(range(len(data.train)))  # all are labelled: every stream has all of them
    always_kept(len(data.classes), cfg, ctx.device)
    folder, say = Path(cfg.out), partial(print, flush=True) if ctx.main else lambda *_: None
    started = (folder / "mlmt/last.pt").exists()
    if cfg.branch != "s4gan" and not started:  # mistakes that concern branch B are told now, not after branch A
        ctx.share(cfg.mlmt_batch, "--mlmt-batch")
        ctx.share(cfg.mlmt_batch_u, "--mlmt-batch-u")
        load_weights(Classifier(cfg, 1).body, cfg.mlmt_backbone, cfg.mlmt_weights, lambda _: None, "--mlmt-weights")
    if ctx.main:
        folder.mkdir(parents=True, exist_ok=True)
        keep_config(folder, cfg, FREE if started else FREE + OF_B)
    ctx.barrier()
    ctx.catch_sigterm()
    about = dict(script="s4gan_mlmt", config=asdict(cfg), classes=list(data.classes), palette=torch.from_numpy(data.palette))
    say(f"{ctx}; {cfg.data}: {len(labelled)} labelled and {len(unlabelled)} unlabelled images, {len(data.val)} to score "
        f"({data.scored_on})")
    if cfg.branch != "s4gan" and PRESETS[cfg.data].get("branch") == "s4gan":
        data.notes += ("most classes are in most images here: expect little of the classifier (Sec. 4.2.1)",)
    for note in data.notes:
        say(note)
    net = classifier = None
    if cfg.segmenter:
        net, _, state = load(cfg.segmenter, ctx, branch="s4gan")
        if state["classes"] != about["classes"]:
            raise UserError(f"--segmenter {cfg.segmenter} was trained on other classes than those of --data {cfg.data}")
    if cfg.branch != "mlmt":
        net, confusion, best = train_s4gan(cfg, data, labelled, unlabelled, folder, about, ctx)
        result, summary = confusion.miou(), f"mIoU {100 * confusion.miou():.1f} ({best})"
    if cfg.branch != "s4gan":
        classifier, result, summary = train_mlmt(cfg, data, labelled, unlabelled, folder / "mlmt", about, ctx)
    if net and classifier:
        say(f"classifier: {summary}")
        alone, fused = evaluate(net, data, cfg, ctx, classifier)
        say(f"segmentation alone:\n{alone.table(data.classes)}\nwith fusion (Eq. 7):")
        if ctx.main:
            panel(partial(predict, net.eval(), cfg=cfg, ctx=ctx, classifier=classifier.eval()), data, scoring_size(cfg),
                  ctx.device).save(folder / "predictions.png")
        confusion, result = fused, fused.miou()
        summary = f"mIoU {100 * result:.1f} (fusion; {100 * alone.miou():.1f} without it)"
    if net:
        say(confusion.table(data.classes))
    say(f"final: {summary} {folder}")
    ctx.close()
    return result


def train_s4gan(cfg, data, labelled, unlabelled, folder, about, ctx):
    """Branch A. -> (S, its ConfusionMatrix, where it was best)"""
    share, num_classes, adversary = ctx.share(cfg.batch), len(data.classes), cfg.loss != "ce"
    torch.manual_seed(mix(cfg.seed, "init"))  # the same initial weights on every process
    net, discriminator = Segmenter(cfg, num_classes), Discriminator(num_classes, cfg.d_width, cfg.d_dropout)
    if not (folder / "last.pt").exists():
        load_weights(net.net.body, cfg.backbone, cfg.weights, print if ctx.main else lambda _: None)
    net = ctx.synchronise_bn(net).to(ctx.device, memory_format=torch.channels_last)
    discriminator.to(ctx.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(net, cfg)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), cfg.lr_d, betas=(0.9, 0.99), fused=True)
    holders = dict(net=net, discriminator=discriminator, optimizer=optimizer, optimizer_d=optimizer_d, scaler=ctx.scaler)
    step, best, best_step = resume(folder / "last.pt", holders, ctx)
    wrapped = ctx.wrap(net)
    if cfg.compile:
        net.compile()
    streams = [Stream(data.train, indices, Augment(cfg), cfg.seed, name, name != "unlabelled") for name, indices in
               (("labelled", labelled), ("unlabelled", unlabelled), ("real", labelled))]
    batches_l, batches_u, batches_r = (endless(stream, share, step, cfg.workers, ctx) for stream in streams)
    log = Log(folder, cfg.steps, cfg.log_every, step, cfg.batch * (3 if adversary else 1), ctx.device, ctx.main, ctx.mean)
    log.say(f"branch A ({cfg.loss}): {cfg.steps} steps" + (f", resumed at {step}" if step else ""))

    def save(name, **state):
        log.flush()  # stops the run here if a loss was not finite, the last good checkpoint kept
        if ctx.main:
            checkpoint.save(folder / name, about | dict(branch="s4gan", net=net.state_dict(), step=step) | state)

    def save_all():
        save("last.pt", best=best, best_step=best_step, **{name: h.state_dict() for name, h in holders.items()})

    def score():
        nonlocal best, best_step
        confusion, = evaluate(net, data, cfg, ctx)
        if confusion.miou() > best:
            best, best_step = confusion.miou(), step
            save("best.pt", miou=best)
        log.evaluated(step, miou=confusion.miou(), best=best)
        if ctx.main:
            net.eval()
            network = partial(predict, net, cfg=cfg, ctx=ctx)
            panel(network, data, scoring_size(cfg), ctx.device).save(folder / "predictions.png")
            net.train()
            log.curves({"losses": "loss", "mIoU": ("miou", "best"), "learning rate": "lr",
                        "scores of D (Fig. 11), share of images trained on": ("d_", "passed")})
        return confusion

    net.train()
    while step < cfg.steps and not ctx.stopping(due=step % cfg.log_every == 0):
        rate = poly(step, cfg.steps)
        set_lr(optimizer, cfg.lr * rate)
        set_lr(optimizer_d, cfg.lr_d * rate)
        with log.waiting():
            x_l, y_l = next(batches_l)
            if adversary:
                x_u, (x_r, y_r) = next(batches_u), next(batches_r)  # r: true maps, drawn independently of l
        x_l = net.prepare(x_l)
        optimizer.zero_grad()
        optimizer_d.zero_grad()
        torch.manual_seed(mix(cfg.seed, "dropout", step, ctx.rank))  # of DeepLabv3+'s classifier; D's has its own
        discriminator.requires_grad_(False)  # S learns through D, D nothing from it
        with ctx.autocast():
            if adversary:
                x_u, x_r = net.prepare(x_u), net.prepare(x_r)
                logits_l, logits_u = wrapped(x_l, x_u)
            else:
                logits_l = wrapped(x_l)
        loss = loss_ce = cross_entropy(logits_l, y_l, ctx)  # Eq. 1
        terms = dict(loss_ce=loss_ce.detach())
        if adversary:
            fake = logits_u.float().softmax(1), unit_range(x_u, ctx)
            real = one_hot(y_r, num_classes), unit_range(x_r, ctx, x_l if cfg.real_span == "ce" else None)
            if cfg.void == "mask_both":
                fake = fake[0] * (y_r != T.IGNORE)[:, None], fake[1]
            run_d = partial(pass_through, discriminator, step=step, cfg=cfg, ctx=ctx)
            d_fake, f_fake = run_d(fake, 0)
        if cfg.loss == "ce+sgan":
            loss_adv = adversarial(d_fake)
            loss = loss + cfg.lambda_adv * loss_adv
            terms |= dict(loss_adv=loss_adv.detach())
        elif adversary:
            loss_fm = feature_matching(run_d(real, 1)[1], f_fake, ctx)  # Eq. 2
            loss = loss + cfg.lambda_fm * loss_fm
            terms |= dict(loss_fm=loss_fm.detach())
        if cfg.loss == "ce+fm+st":
            with torch.no_grad():
                gate_score = (run_d(fake, None)[0] if cfg.gate_eval else d_fake).sigmoid()
            passed = (gate_score >= cfg.gamma) & (step > 0)
            loss_st = self_training(logits_u, passed, ctx)  # Eq. 3
            loss = loss + cfg.lambda_st * loss_st  # Eq. 4
            terms |= dict(loss_st=loss_st.detach(), passed=passed.float().mean())
        ctx.scaler.scale(loss).backward()
        if adversary:  # D, on the same maps
            discriminator.requires_grad_(True)
            (d_fake, _), (d_real, _) = run_d([part.detach() for part in fake], 2), run_d(real, 3)
            loss_d = discriminator_loss(d_real, d_fake)  # Eq. 5
            ctx.scaler.scale(loss_d).backward()
            ctx.average_grads(discriminator.parameters())
            d_real, d_fake = (d.detach().sigmoid().mean() for d in (d_real, d_fake))
            terms |= dict(loss_d=loss_d.detach(), d_real=d_real, d_fake=d_fake)
        ctx.scaler.step(optimizer)
        if adversary:
            ctx.scaler.step(optimizer_d)
        ctx.scaler.update()
        step += 1
        log.add(step, **terms, lr=cfg.lr * rate)
        if step % cfg.eval_every == 0 and step < cfg.steps:
            score()
        if step % cfg.save_every == 0 or step == cfg.steps:
            save_all()
    if step < cfg.steps:
        save_all()
        log.say(f"SIGTERM: saved at step {step} of branch A; the same command resumes")
        raise SystemExit(143)
    confusion = score()
    log.close()
    return net, confusion, f"best {100 * best:.1f} at step {best_step}"


def pass_through(discriminator, maps_and_image, number, step, cfg, ctx):
    """One of D's passes in a step, each with dropout masks of its own; number None: without dropout"""
    rng = None if number is None else ctx.random(cfg.seed, "discriminator", step, number)
    with ctx.autocast():
        return discriminator(*maps_and_image, rng)


def make_optimizer(net, cfg):
    """S: every trainable parameter once, the ResNet at lr * backbone_lr_mult, all else at lr * head_lr_mult"""
    body = {id(p) for p in net.net.body.parameters()}
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if id(p) in body], lr_mult=cfg.backbone_lr_mult),
              dict(params=[p for p in trained if id(p) not in body], lr_mult=cfg.head_lr_mult)]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, cfg.lr, momentum=0.9, weight_decay=cfg.weight_decay, fused=True)
    return torch.optim.Adam(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def train_mlmt(cfg, data, labelled, unlabelled, folder, about, ctx):
    """Branch B. -> (the network used at test time, its macro AUC, a line about it)"""
    num_classes, semi = len(data.classes), cfg.mlmt_method == "mlmt"
    if cfg.weak:  # image-level labels of all images that have them; L_cons on all images
        labelled, unlabelled = [i for i in range(len(data.train)) if data.train.has_mask(i)], range(len(data.train))
    epoch_length = math.ceil(len(labelled) / cfg.mlmt_batch)
    steps = cfg.mlmt_epochs * epoch_length
    if ctx.main:
        folder.mkdir(exist_ok=True)
    torch.manual_seed(mix(cfg.seed, "init", "mlmt"))
    student = Classifier(cfg, num_classes)
    if not (folder / "last.pt").exists():
        load_weights(student.body, cfg.mlmt_backbone, cfg.mlmt_weights, print if ctx.main else lambda _: None,
                     "--mlmt-weights")
    student = ctx.synchronise_bn(student).to(ctx.device, memory_format=torch.channels_last)
    teacher = copy.deepcopy(student).requires_grad_(False) if semi else student
    optimizer = torch.optim.SGD(student.parameters(), cfg.mlmt_lr, momentum=0.9, nesterov=True,
                                weight_decay=cfg.mlmt_weight_decay, fused=True)
    ctx.new_scaler()
    holders = dict(net=teacher, student=student, optimizer=optimizer, scaler=ctx.scaler)
    step, best, best_step = resume(folder / "last.pt", holders, ctx)
    wrapped = ctx.wrap(student)
    if cfg.compile:
        student.compile()
        teacher.compile()
    views = partial(partial, two_views, cfg=cfg, num_classes=num_classes)
    stream_l = Stream(data.train, labelled, views(strong=False), cfg.seed, "mlmt labelled", True)
    stream_u = Stream(data.train, unlabelled, views(strong=True), cfg.seed, "mlmt unlabelled", False)
    batches_l = endless(stream_l, ctx.share(cfg.mlmt_batch, "--mlmt-batch"), step, cfg.workers, ctx)
    batches_u = endless(stream_u, ctx.share(cfg.mlmt_batch_u, "--mlmt-batch-u"), step, cfg.workers, ctx) if semi else None
    per_step = cfg.mlmt_batch + semi * cfg.mlmt_batch_u
    log = Log(folder, steps, cfg.log_every, step, per_step, ctx.device, ctx.main, ctx.mean)
    log.say(f"branch B ({cfg.mlmt_method}): {len(labelled)} images with class labels"
            + (f", {len(unlabelled)} more for L_cons" if semi else "")
            + f"; {steps} steps in {cfg.mlmt_epochs} epochs" + (f", resumed at {step}" if step else ""))

    def save_all():
        log.flush()
        if ctx.main:
            checkpoint.save(folder / "last.pt", about | dict(branch="mlmt", step=step, best=best, best_step=best_step) |
                            {name: h.state_dict() for name, h in holders.items()})

    def score():
        nonlocal best, best_step
        truth, scores = classifier_scores([teacher, student] if semi else [student], data, cfg, ctx)
        areas = [auc(score, truth, cfg) for score in scores]
        macro, micro = areas[0][:2]
        best, best_step = max((best, best_step), (macro, step), key=lambda pair: pair[0])
        log.evaluated(step, auc_macro=macro, auc_micro=micro, **(dict(auc_student=areas[1][0]) if semi else {}))
        if ctx.main:
            roc_picture(dict(zip(("teacher", "student") if semi else ("cnn",), areas)), folder / "roc.png")
            log.curves({"losses": "loss", "AUC": "auc", "weight and learning rate": ("w_", "lr")})
        return macro, in_words(macro, micro) + (f" (best macro {best:.4f} at step {best_step})" if best else "")

    student.train()
    teacher.train()  # on its own views: batch statistics, and running ones of its own
    while step < steps and not ctx.stopping(due=step % cfg.log_every == 0):
        epoch = step // epoch_length
        lr, w_c = mlmt_lr(epoch, cfg), consistency_weight(epoch, cfg)
        set_lr(optimizer, lr)
        with log.waiting():
            (x_l, x_l2), z_l = next(batches_l)
            if semi:
                x_u, x_u2 = next(batches_u)  # strong, weak
        optimizer.zero_grad()
        with ctx.autocast():
            if semi:
                g_l, g_u = wrapped(x_l, x_u)
                with torch.no_grad():
                    h_l, h_u = teacher(x_l2, x_u2)
            else:
                g_l = wrapped(x_l)
        loss = loss_cce = multi_label(g_l, z_l)
        terms = dict(loss_cce=loss_cce.detach())
        if semi:
            g, h = (g_u, h_u) if cfg.cons_on == "unlabelled" else (torch.cat([g_l, g_u]), torch.cat([h_l, h_u]))
            loss_cons = consistency(cfg.cons, g, h)
            loss = loss_cce + w_c * loss_cons  # Eq. 6
            terms |= dict(loss_cons=loss_cons.detach(), w_c=w_c)
        ctx.scaler.scale(loss).backward()
        ctx.scaler.step(optimizer)
        ctx.scaler.update()
        step += 1
        if semi:
            update_ema(teacher, student, min(1 - 1 / (step + 1), cfg.ema), cfg.ema_buffers)
        log.add(step, **terms, lr=lr)
        if step % cfg.eval_every == 0 and step < steps:
            score()
        if step % cfg.save_every == 0 or step == steps:
            save_all()
    if step < steps:
        save_all()
        log.say(f"SIGTERM: saved at step {step} of branch B; the same command resumes")
        raise SystemExit(143)
    result = score()
    log.close()
    return teacher, *result


def resume(path, holders, ctx):
    """Fill the holders from a checkpoint, if there is one. -> its step, best score and the step of that"""
    if not path.exists():
        return 0, 0.0, 0
    state = checkpoint.load(path, ctx.device)
    for name, holder in holders.items():
        holder.load_state_dict(state[name])
    return state["step"], state["best"], state["best_step"]


# ------------------------------------------------------------------------------------------------ command line

def load(path, ctx, given=(), branch=None):
    """-> (net, cfg, state) from a checkpoint, with the flags that make sense for inference on top of its config"""
    state, where = checkpoint.load(path, ctx.device), {"s4gan": "runs/../last.pt", "mlmt": "runs/../mlmt/last.pt"}
    if not isinstance(state, dict) or state.get("script") != "s4gan_mlmt" or branch not in (None, state["branch"]):
        kind = f"branch {branch}" if branch else "this script"
        raise UserError(f"{path} is not a checkpoint of {kind}: expected a file such as {where[branch or 's4gan']}")
    useful = {*FREE, "data", "size", "eval_size", "eval_pad", "eval_crop", "tau", "background", "count_step", "batch",
              "precision"}
    if useless := sorted(set(given) - (useful - {"branch", "segmenter"})):
        raise UserError(f"--{useless[0].replace('_', '-')} has no effect on a trained network; {path} brings its own")
    cfg = from_dict(Config, state["config"], given)
    network = Segmenter if state["branch"] == "s4gan" else Classifier
    net = network(cfg, len(state["classes"])).to(ctx.device, memory_format=torch.channels_last)
    net.load_state_dict(state["net"])
    return net.eval(), cfg, state


def load_pair(path, ctx, given, branch=None):
    """--evaluate or --predict, and --classifier -> (S or None, {path: classifier}, cfg, state of the first)"""
    net, cfg, state = load(path, ctx, given, branch)
    net, classifiers = (None, {path: net}) if state["branch"] == "mlmt" else (net, {})
    for other in cfg.classifier or ():
        classifiers[other], _, its = load(other, ctx, branch="mlmt")
        if its["classes"] != state["classes"]:
            raise UserError(f"{path} and {other} were trained on different classes")
        draw = [[part["config"][name] for name in ("data", "labeled", "split", "seed")] for part in (state, its)]
        if ctx.main and draw[0] != draw[1]:
            print(f"note: {path} and {other} were not trained with the same labelled images")
    return net, classifiers, cfg, state


def score_checkpoint(cfg, given):
    """--evaluate: table and mIoU of a checkpoint on the scored split, alone and fused; AUC of classifiers; Table 5"""
    ctx = Runtime(cfg.device, cfg.precision)
    net, classifiers, cfg, state = load_pair(cfg.evaluate, ctx, given)
    data = open_dataset(cfg.data, cfg.root, cfg.download)
    if list(data.classes) != state["classes"]:
        names = ", ".join(state["classes"][:3])
        raise UserError(f"{cfg.evaluate} was trained on {len(state['classes'])} classes ({names}, ..), but --data {cfg.data} "
                        f"has {len(data.classes)} others: evaluate it on the dataset it was trained on")
    always_kept(len(data.classes), cfg, ctx.device)
    if cfg.heuristics and not net:
        raise UserError(f"--heuristics removes classes from predictions, and {cfg.evaluate} is a classifier: give a "
                        f"checkpoint of branch A")
    lines = []
    if classifiers:
        truth, scores = classifier_scores(classifiers.values(), data, cfg, ctx)
        areas = {path: auc(score, truth, cfg) for path, score in zip(classifiers, scores)}
        lines += [f"{path}: {in_words(macro, micro)}" for path, (macro, micro, *_) in areas.items()]
        if ctx.main:
            roc_picture(areas, Path(given.get("out") or Path(next(iter(classifiers))).parent) / "roc.png")
    if net and cfg.heuristics:
        (t, common), (of_class, joint) = count_heuristics(net, data, cfg, ctx)
        lines += [f"at least {t} pixels, tuned on these images: mIoU {100 * common.miou():.1f}",
                  f"at least {of_class} pixels, tuned on these images: mIoU {100 * joint.miou():.1f}"]
    if net:
        *alone, confusion = evaluate(net, data, cfg, ctx, next(iter(classifiers.values()), None))
        lines = [confusion.table(data.classes), *lines, *(f"without fusion: mIoU {100 * c.miou():.1f}" for c in alone),
                 f"{cfg.evaluate} (step {state['step']}): mIoU {100 * confusion.miou():.1f} on {len(data.val)} "
                 f"{data.scored_on} images, {'fusion' if alone else 'single scale'}"]
    if ctx.main:
        print(*lines, sep="\n")
    ctx.close()


def predict_images(cfg, given):
    """--predict: a palette PNG of class ids, at the image's own size, for every image of a folder"""
    ctx = Runtime(cfg.device, cfg.precision)
    net, classifiers, cfg, state = load_pair(cfg.predict, ctx, given, "s4gan")
    out = given.get("out") or Path(cfg.predict).parent / "predictions"
    network = partial(predict, net, cfg=cfg, ctx=ctx, classifier=next(iter(classifiers.values()), None))
    count = predict_folder(network, cfg.images, out, state["palette"], scoring_size(cfg), ctx.device)
    print(f"{count} predictions in {out}")


def check(cfg, given):
    """UserError for flags that contradict one another"""
    if cfg.supervised and {"loss", "mlmt_method"} & set(given):
        raise UserError("--supervised uses no unlabelled image, so --loss and --mlmt-method have no meaning with it")
    for name, meant, needs in (("classifier", cfg.evaluate or cfg.predict, "--evaluate or --predict"),
                               ("heuristics", cfg.evaluate, "--evaluate"), ("count_step", cfg.heuristics, "--heuristics"),
                               ("segmenter", cfg.branch == "mlmt", "--branch mlmt")):
        if name in given and not meant:
            raise UserError(f"--{name.replace('_', '-')} works with {needs} only")
    if cfg.network == "deeplabv3plus" and (useless := {"aspp_rates", "stride_on"} & set(given)):
        raise UserError(f"--{sorted(useless)[0].replace('_', '-')} belongs to --network deeplabv2")
    if cfg.data == "cityscapes" and cfg.branch != "s4gan":
        raise UserError("--data cityscapes: most classes are in every image, so that a classifier has nothing to remove, "
                        "and the paper uses s4GAN alone there (Sec. 4.2.1): drop --branch")
    if cfg.bn == "frozen" and cfg.input != "torchvision" and cfg.weights == "imagenet":
        raise UserError(f"--bn frozen keeps the statistics of torchvision's input: --input {cfg.input} does not fit, "
                        f"use --input torchvision")
    if cfg.network == "deeplabv3plus" and cfg.batch < 2:
        raise UserError("--batch 1: batch normalisation after DeepLabv3+'s global pooling needs at least 2 images")


def main(argv=None):
    cfg, given = parse(Config, PRESETS, argv, __doc__.partition("\n\n")[0])
    if cfg.supervised and "branch" not in given:
        cfg.branch = "s4gan"
    check(cfg, given)
    if cfg.evaluate:
        return score_checkpoint(cfg, given)
    if cfg.predict:
        return predict_images(cfg, given)
    scoring_size(cfg)  # a mistake in it is told now, not after the first steps
    if cfg.supervised:
        cfg.loss, cfg.mlmt_method = "ce", "cnn"
    scratch = cfg.weights == "none"
    cfg.bn = cfg.bn or ("learn" if scratch else "affine")
    if cfg.head_lr_mult is None:
        cfg.head_lr_mult = 1.0 if scratch else 10.0
    cfg.mlmt_weights = cfg.mlmt_weights or ("none" if scratch else "imagenet")
    labels = Path(cfg.split).stem if cfg.split else cfg.labeled.replace("/", "_")
    kind = [cfg.loss] * (cfg.loss != LOSSES[-1]) + [cfg.mlmt_method] * (cfg.mlmt_method != "mlmt") + ["weak"] * cfg.weak
    kind = ["supervised"] if cfg.supervised else kind
    cfg.out = cfg.out or "-".join([f"runs/s4gan_mlmt-{cfg.data}-{labels}-seed{cfg.seed}", *kind])
    train(cfg)


if __name__ == "__main__":
    sys.exit(run(main))
