"""s4GAN + MLMT: Semi-Supervised Semantic Segmentation with High- and Low-level Consistency
(Mittal, Tatarchenko, Brox; TPAMI 2021; arXiv 1908.05724)

Branch A (s4GAN): a segmentation network S plays the generator against a discriminator D, which sees
class maps with their image. On unlabelled images S matches D's statistics of true maps, and trains
on its own predictions where these fool D. Branch B (MLMT): a classifier with a Mean Teacher says
which classes an image holds. The branches share nothing but the labelled images; at test time a
class that the classifier rejects is removed from the segmentation.

Map (paper -> this file)
  Eq. 1 L_ce             cross_entropy            Sec. 3.1 input of D       one_hot, unit_range
  Eq. 2 L_fm             feature_matching         Sec. 3.2 x and x'         two_views, strong_view
  Eq. 3 L_st             self_training            Sec. 4.1.1 mIoU           evaluate
  Eq. 4 L_S              train_s4gan              Sec. 4.1.2 S, classifier  Segmenter, Classifier
  Eq. 5 L_D              discriminator_loss       Sec. 4.1.2 D, Fig. 3      Discriminator
  Eq. 6 L_MT             multi_label, consistency Sec. 4.1.3 schedules      train_s4gan, PRESETS
  Eq. 7 fusion           fuse                     Table 5 thresholds        count_heuristics
  Fig. 11 scores of D    log.csv's columns d_*    Table 6 standard GAN      adversarial
  Fig. 12 ROC            evaluate_classifier      Table 7 image labels      --weak, --tags

Deviations: what the paper says, what the authors' code does (--released), what we do, and why
  D1  The code uses two of DeepLabv2's four branches, because it returns inside the loop over them;
      here all four: --aspp-rates 6,12 is the code's.
  D2  The code gives its optimiser the ResNet's convolutions three times (conv1 once, shortcuts
      four): try --backbone-lr-mult 3. As in the code, the last layers have 10 times --lr.
  D3  BN of S works on batch statistics with fixed weights, as in the code; from scratch (--weights
      none) the weights learn. The scale of the input cancels in it, so all data are normalised for
      torchvision's weights, where the code has 0..255 (VOC) and BGR (Cityscapes): --input-scale.
      The stride of layer2 is on a 1x1 convolution, as in the code; --stride-on 3x3 puts it where
      torchvision's weights had it. Of COCO weights the code also takes the classifier, we do not.
  D4  VOC is flipped and scaled by 0.5 to 1.6, in the code only on demand. PASCAL-Context is scaled
      by about 0.7 to 2.7 and scored on the central 512x512, as in the code, which also blurs it and
      counts its padding as background (--pad-label 0). The code's Cityscapes batch is 8.
  D5  Eq. 1 and 3 are sums; the code and we take means, in Eq. 3 over the images that pass. An image
      passes if D >= gamma in the paper and here, if D > gamma in the code.
  D6  D has dropout after all four convolutions in the paper; the code and we drop channels after
      three: --d-dropout elementwise is the paper's. We pool globally; the code, a fixed window.
  D7  The images that D sees are scaled to 0..1 over their batch; the code scales those of true maps
      by the range of another batch. As in the code, only true maps are 0 at ignored pixels.
  D8  Eq. 2 leaves the norm open, Eq. 5 the factor: L1 with a mean, and 1/2, as in the code.
  D9  As in the code, D's score that selects images for L_st is computed before D's update, with
      dropout; in step 0 no image is selected.
  D10 Eq. 6 prints a softmax cross-entropy, which allows one class per image; the code and we take
      sigmoids. L_cons is the paper's; the code's is --cons cosine --cons-on unlabelled. The paper
      gives no ramp of lambda_cons, and no optimiser or views of branch B: ours are the code's, but
      all images of a batch get the operations of the jitter in one order.
  D11 The teacher (decay min(1 - 1/(t+1), 0.999), BN statistics of its own, used at test time) is
      the code's, but starts as a copy of the student.
  D12 The code fuses logits: a removed class gets 0, which beats negative logits; and the background
      can be removed. Here probabilities are fused, and the background is never removed.
  D13 The standard GAN of Table 6 is not in the code: here -log D on unlabelled images. The code's
      DeepLabv3+ does not run; ours is a ResNet of stride 16. On several GPUs all is as with one.

Commands
  python s4gan_mlmt.py                                    first run: shapes, on a CPU in minutes
  python s4gan_mlmt.py --supervised                       its baseline; run it again to resume
  python s4gan_mlmt.py --data voc --labeled 1/8           Table 1: s4GAN, MLMT, their fusion
  torchrun --nproc_per_node=2 s4gan_mlmt.py --data voc    the same on 2 GPUs, 4 + 4 images each
  python s4gan_mlmt.py --evaluate runs/.../last.pt --classifier runs/.../mlmt/last.pt
  python s4gan_mlmt.py --evaluate runs/.../mlmt/last.pt   AUC and roc.png of a classifier (Fig. 12)
  python s4gan_mlmt.py --evaluate VOC_30000.pth --data voc      score the authors' checkpoint
  python s4gan_mlmt.py --predict runs/.../last.pt --images photos/                    palette PNGs
"""
import math
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import transforms as T
from common.backbones import INPUT_SCALES, DeepLabV2, DeepLabV3Plus
from common.cache import cached
from common.checkpoint import load_network, open_checkpoint, same_classes
from common.command_line import check_needs, parse, run, run_name
from common.datasets import DATASETS, check_classes, choose_labelled, open_dataset
from common.datasets.tags import Tagged
from common.files import make_folder
from common.inference import Examples, predict_folder, scored_batches
from common.miou import ConfusionMatrix
from common.photometry import colour_jitter, gaussian_blur
from common.random import mix
from common.regions import count_pixels
from common.roc import auc, in_words, roc_picture
from common.run_folder import RunFolder
from common.runtime import Runtime
from common.schedules import make_teacher, momentum_sgd, poly, set_lr, update_ema
from common.settings import ANY, RESNETS, BaseConfig, Size, UserError, option
from common.streams import Stream, endless
from common.weights import load_weights

A = dict(branch=("s4gan", "both"))  # what a flag needs to have an effect
B = dict(branch=("mlmt", "both"))
GAN = A | dict(supervised=False)
ST = GAN | dict(lambda_st=ANY)
MT = B | dict(supervised=False)


# ---------------------------------------------------------------------- settings

@dataclass
class Config(BaseConfig):
    data: str = option("shapes", "dataset", DATASETS, group="run", scoring=True)
    steps: int = option(35000, "training steps of S (Sec. 4.1.3)", within=(1, None), needs=A)
    crop: Size | None = option(None, "random crop", needs=A)
    flip: bool = option(False, "random horizontal flip", needs=A)
    eval_size: str = option("full", "score at the original size, at --size, or on a central square "
                            "of 512x512", ("full", "train", "centre"), scoring=True)
    backbone: str = option("resnet101", "ResNet of S and of the classifier", RESNETS)
    branch: str = option("both", "train the segmenter S (s4gan), the classifier (mlmt), or both",
                         ("s4gan", "mlmt", "both"), group="branches", free=True)
    classifier: str = option("", "fuse S with the classifier of this file", free=True, scoring=True)
    tau: float = option(0.2, "fusion removes classes of at most this probability (Eq. 7)",
                        within=(0, 1), scoring=True)
    background: tuple[int, ...] = option((0,), "ids of classes that are never removed, or none",
                                         within=(0, 254), scoring=True)
    heuristics: int = option(0, "remove classes of fewer than N, 2N, .. 12N pixels (Table 5)",
                             within=(0, 10**9), needs=dict(evaluate=ANY), free=True, scoring=True)

    lambda_fm: float = option(0.1, "weight of feature matching (Eq. 4)", within=(0, 1e6),
                              group="s4GAN: losses of S, discriminator D", needs=GAN)
    lambda_st: float = option(1.0, "weight of self-training (Eq. 4)", within=(0, 1e6), needs=GAN)
    lambda_adv: float = option(0.0, "weight of -log D (of Table 6)", within=(0, 1e6), needs=GAN)
    gamma: float = option(0.6, "lowest score of D to train on (Eq. 3)", within=(0, 1), needs=ST)
    d_dropout: str = option("spatial", "D's dropout: of channels, or of single values (D6)",
                            ("spatial", "elementwise"), needs=GAN)
    d_width: int = option(64, "channels of D's first convolution", within=(1, 4096), needs=GAN)
    lr_d: float = option(1e-4, "learning rate of D (Sec. 4.1.3)", within=(0, 1000), needs=GAN)

    mlmt_size: Size = option((320, 320), "input size", group="MLMT: the classifier", needs=B)
    mlmt_epochs: int = option(100, "passes over the labelled images", within=(1, 10**6), needs=B)
    mlmt_batch: int = option(16, "labelled images per step", within=(2, 100000), needs=B)
    mlmt_batch_u: int = option(80, "unlabelled images per step", within=(2, 100000), needs=MT)
    mlmt_lr: float = option(0.03, "first learning rate, cosine to 1e-4", within=(0, 1000), needs=B)
    mlmt_weight_decay: float = option(1e-5, "weight decay", within=(0, 1000), needs=B)
    mlmt_blur: tuple[float, float] = option((0.1, 2.0), "strong view: range of the blur, in pixels",
                                            within=(0, 100), needs=MT)
    weak: bool = option(False, "use the image-level labels of all other images (Table 7)", needs=B)
    tags: str = option("", "file of these labels, for images without a mask: a line per image, "
                       "`name, class, class`", needs=B | dict(weak=True))
    lambda_cons: float = option(1.0, "final weight of L_cons (Eq. 6)", within=(0, 1e6), needs=MT)
    cons: str = option("mse", "distance in L_cons, consistency (D10)", ("mse", "cosine"), needs=MT)
    cons_on: str = option("all", "images that L_cons is for (D10)", ("all", "unlabelled"), needs=MT)
    ema: float = option(0.999, "final decay of the teacher (D11)", within=(0, 1), needs=MT)

    scale: tuple[float, float] = option((1.0, 1.0), "range of random rescaling, in steps of 0.1",
                                        within=(0.01, 100), group="augmentation", needs=A)
    pad_label: int = option(255, "label of the padding of images smaller than --crop (D4)",
                            within=(0, 255), needs=A | dict(crop=ANY))
    shift: int = option(0, "random shift of up to this many pixels", within=(0, 10000), needs=A)
    eval_pad: Size | None = option(None, "pad scored images to this size", needs=A, scoring=True)

    batch: int = option(8, "labelled images per step over all processes; as many unlabelled",
                        within=(2, 100000), group="optimisation", scoring=True)
    network: str = option("deeplabv2", "architecture of S (Table 2)",
                          ("deeplabv2", "deeplabv3plus"), needs=A)
    aspp_rates: tuple[int, ...] = option((6, 12, 18, 24), "dilations of DeepLabv2's head (D1)",
                                         within=(1, 1000), needs=A | dict(network="deeplabv2"))
    stride_on: str = option("1x1", "convolution that has a bottleneck's stride (D3)",
                            ("1x1", "3x3"), needs=A | dict(network="deeplabv2"))
    input_scale: str = option("imagenet", "scale of S's pixels: torchvision's, or the code's (D3)",
                              tuple(INPUT_SCALES), needs=A | dict(network="deeplabv2"))
    optimizer: str = option("sgd", "sgd (momentum 0.9) or adam, for S", ("sgd", "adam"), needs=A)
    lr: float = option(2.5e-4, "learning rate of S (Sec. 4.1.3)", within=(0, 1000), needs=A)
    backbone_lr_mult: float = option(1.0, "learning rate of S's ResNet, times --lr (D2)",
                                     within=(0, 1000), needs=A)
    head_lr_mult: float | None = option(None, "times --lr for S's last layers [10; 1 from scratch]",
                                        within=(0, 1000), needs=A)
    weight_decay: float = option(5e-4, "weight decay of S (Sec. 4.1.3)", within=(0, 1000), needs=A)


PRESETS = {
    "shapes": dict(labeled="40", steps=600, batch=6, flip=True, shift=6, backbone="resnet18",
                   backbone_layers=2, weights="none", aspp_rates=(1, 2, 3, 6), d_width=32,
                   lambda_fm=1.0, gamma=0.55, optimizer="adam", lr=1e-3, lr_d=3e-4,
                   mlmt_size=(64, 64), mlmt_batch=10, mlmt_batch_u=10, mlmt_weight_decay=5e-3,
                   mlmt_blur=(0.1, 0.6), lambda_cons=5.0, ema=0.99, weak=True, mlmt_epochs=15,
                   workers=0, eval_every=200, save_every=100),
    "voc": dict(labeled="1/8", scale=(0.5, 1.6), crop=(321, 321), flip=True, eval_pad=(505, 505)),
    "pcontext": dict(labeled="1/8", steps=50000, scale=(0.7, 2.7), crop=(321, 321), flip=True,
                     eval_size="centre"),
    "cityscapes": dict(labeled="1/8", batch=5, branch="s4gan", size=(512, 1024), crop=(256, 512),
                       flip=True, eval_size="train", gamma=0.7, lr_d=1e-5, background=()),
    "camvid": dict(labeled="100", steps=10000, branch="s4gan", size=(360, 480), crop=(321, 321),
                   flip=True, eval_size="train", background=()),
    "folder": dict(scale=(0.5, 1.6), crop=(321, 321), flip=True),
}
PRESETS |= {  # not in the paper
    "pcontext59": PRESETS["pcontext"] | dict(background=()),
    "bdd100k": PRESETS["cityscapes"] | dict(size=(512, 910)),
    "sunrgbd": PRESETS["camvid"] | dict(labeled="1500", size=(480, 640)),
    "sunrgbd13": PRESETS["camvid"] | dict(labeled="1500", size=(480, 640))}
RELEASED_SETTINGS = {  # D1, D2, D10; D3, D4
    "all": dict(aspp_rates=(6, 12), backbone_lr_mult=3.0, cons="cosine", cons_on="unlabelled"),
    "voc": dict(steps=40000, scale=(1.0, 1.0), flip=False, input_scale="caffe"),
    "pcontext": dict(steps=60000, pad_label=0),
    "cityscapes": dict(steps=40000, batch=8, input_scale="bgr")}
BODY = r"(conv1|bn1|layer\d)\."
RELEASED = (  # files of the authors' code: S; a classifier
    dict(names={r"layer5\.conv2d_list\.([01])": r"net.head.branches.\1", "layer5": None,  # D1
                BODY: r"net.body.\1."}, classes="net.head.branches.0.weight"),
    dict(names={"fc": "fc", BODY: r"body.\1."}, classes="fc.weight", part="mlmt"))
OF_B = ["tau", "background"]  # may change until branch B has begun
OF_B += [field.name for field in fields(Config)
         if field.metadata["needs"].get("branch") == B["branch"]]


def settle(cfg, given):
    """Fill in what one setting decides about others. Raises UserError for contradictions."""
    if cfg.supervised and "branch" not in given:
        cfg.branch = "s4gan"
    check_needs(given, cfg)
    if cfg.classifier:
        raise UserError("--classifier works with --evaluate or --predict only")
    for name, branches in (("tau", ("both",)), ("background", B["branch"])):
        if name in given and cfg.branch not in branches:
            raise UserError(f"--{name} has no effect with --branch {cfg.branch}")
    if cfg.network == "deeplabv3plus" and given.get("backbone_layers", 4) < 4:
        raise UserError("--network deeplabv3plus has all 4 layers: drop --backbone-layers")
    if cfg.head_lr_mult is None:
        cfg.head_lr_mult = 1.0 if cfg.weights == "none" else 10.0
    cfg.out = cfg.out or run_name("s4gan_mlmt", cfg, given)


# ---------------------------------------------------------------------- model (Sec. 4.1.2)

class Segmenter(nn.Module):
    """S: single-scale DeepLabv2, or DeepLabv3+"""

    def __init__(self, cfg, num_classes):
        super().__init__()
        bn = "learn" if cfg.weights == "none" else "affine"  # D3
        if cfg.network == "deeplabv2":
            self.net = DeepLabV2(num_classes, cfg.backbone, cfg.backbone_layers, cfg.aspp_rates,
                                 cfg.stride_on, bn, cfg.input_scale)
        else:
            self.net = DeepLabV3Plus(num_classes, cfg.backbone, bn)

    def forward(self, x, x_u=None):
        """[B, 3, H, W] -> logits [B, C, H, W]; of x_u too, with BN statistics of its own"""
        logits = self.net(x)
        return logits if x_u is None else (logits, self.net(x_u))


class Discriminator(nn.Module):
    """D: four 4x4 convolutions of stride 2 (64 to 512 channels) with leaky ReLUs, dropout after
    three (D6), global average pooling, one linear layer. 1024 (C + 3) + 2,753,985 parameters."""

    def __init__(self, num_classes, width=64, dropout="spatial"):
        super().__init__()
        channels = [num_classes + 3, width, 2 * width, 4 * width, 8 * width]
        self.convs = nn.ModuleList(nn.Conv2d(channels[k], channels[k + 1], 4, stride=2, padding=1)
                                   for k in range(4))
        self.fc = nn.Linear(8 * width, 1)
        self.dropout = dropout

    def forward(self, maps, image, rng=None):
        """Class maps [B, C, H, W], their image [B, 3, H, W] in 0..1 -> (the score's logit [B], D_k
        of Eq. 2 [B, 512]). rng: common.random.Random for the dropout, or None."""
        x = torch.cat([maps, image], 1)
        for k, conv in enumerate(self.convs):
            x = F.leaky_relu(conv(x), 0.2)
            if rng and (k < 3 or self.dropout == "elementwise"):
                shape = x.shape if self.dropout == "elementwise" else (*x.shape[:2], 1, 1)
                x = x * (2 * (rng.uniform(*shape) >= 0.5)).to(x.dtype)  # 2 = 1 / (1 - 0.5)
        feature = x.float().mean((2, 3))
        return self.fc(feature)[:, 0].float(), feature


class Classifier(nn.Module):
    """G, and its teacher H: torchvision's ResNet with a new last layer, one sigmoid per class."""

    def __init__(self, cfg, num_classes):
        super().__init__()
        self.size = cfg.mlmt_size
        self.body = getattr(torchvision.models, cfg.backbone)(weights=None)
        channels = self.body.fc.in_features // 2 ** (4 - cfg.backbone_layers)  # each layer doubles
        self.body.fc = nn.Identity()
        for k in range(cfg.backbone_layers + 1, 5):
            setattr(self.body, f"layer{k}", nn.Identity())
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x, x_u=None):
        """[B, 3, h, w] -> logits [B, C]; of x_u too, with BN statistics of its own"""
        logits = self.fc(self.body(x))
        return logits if x_u is None else (logits, self.fc(self.body(x_u)))


def one_hot(y, num_classes):
    """Labels [B, H, W] -> true maps [B, C, H, W]; all zero where a pixel is ignored"""
    return (y[:, None] == torch.arange(num_classes, device=y.device)[:, None, None]).float()


def unit_range(x, low, high):
    """(x - low) / (high - low). low, high: 0-d tensors, the extremes of the batch"""
    return (x - low) / (high - low).clamp(min=1e-6)


# ---------------------------------------------------------------------- losses and ramps

def cross_entropy(logits, y, count=None):
    """Eq. 1: L_ce = mean over valid pixels of H(y, S(x)). logits [B, C, H, W] -> scalar

    y [B, H, W], 255 ignored. count: the number to divide by (with several processes, their mean
    number of valid pixels); None: y's own. 0 with a graph if all is ignored.
    """
    total = F.cross_entropy(logits.float(), y, ignore_index=255, reduction="sum")
    if count is None:
        count = (y != 255).sum().clamp(min=1)
    return total / count


def feature_matching(real, fake):
    """Eq. 2: L_fm = 1/512 || E[D_k(y_l + x_l)] - E[D_k(S(x_u) + x_u)] ||_1, E the mean over images.
    real [B, 512], fake [B', 512] -> scalar"""
    return (real.float().mean(0) - fake.float().mean(0)).abs().mean()


def self_training(logits, passed, count=None):
    """Eq. 3: L_st = mean over the pixels of the images that passed of H(y*, S(x_u)) -> scalar

    y* = argmax S(x_u), a constant. logits [B, C, H, W]; passed: bool [B], D(S(x_u)) >= gamma.
    count: the number of images to divide by; None: of those that passed. 0 if none did.
    """
    logits = logits.float()
    pseudo = logits.detach().argmax(1)
    per_image = F.cross_entropy(logits, pseudo, reduction="none").mean((1, 2))
    if count is None:
        count = passed.sum().clamp(min=1)
    return (per_image * passed).sum() / count


def adversarial(fake):
    """Standard GAN (Table 6): L_adv = -E[log D(S(x_u) + x_u)]. Logits of D's score [B] -> scalar"""
    return F.softplus(-fake).mean()


def discriminator_loss(real, fake):
    """Eq. 5, negated and halved: L_D = -1/2 E[log D(y_l + x_l)] - 1/2 E[log(1 - D(S(x_u) + x_u))].
    Logits [B] each -> scalar"""
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def multi_label(logits, z):
    """Eq. 6: L_cce, binary cross-entropy, mean over images and classes -> scalar
    logits [B, C]; z [B, C]: 1 for the classes of the image, else 0"""
    return F.binary_cross_entropy_with_logits(logits.float(), z.float())


def consistency(kind, student, teacher):
    """Eq. 6: L_cons = || G(x) - H(x') ||^2, mean over images and classes. logits [B, C] -> scalar
    mse: of the sigmoids. cosine: 1 - cos of the logits. The teacher is a constant."""
    student = student.float()
    teacher = teacher.detach().float()
    if kind == "cosine":
        return (1 - F.cosine_similarity(student, teacher)).mean()
    return F.mse_loss(student.sigmoid(), teacher.sigmoid())


def consistency_weight(epoch, cfg):
    """Eq. 6: lambda_cons; 0 for a tenth of the epochs, then a linear ramp over half of them"""
    burn_in = cfg.mlmt_epochs / 10
    return cfg.lambda_cons * min(1.0, max(0.0, 2 * (epoch - burn_in) / cfg.mlmt_epochs))


def mlmt_lr(epoch, cfg):
    """Cosine from --mlmt-lr to 1e-4 over the epochs, constant within each"""
    low = min(1e-4, cfg.mlmt_lr)
    return low + (cfg.mlmt_lr - low) * (1 + math.cos(math.pi * epoch / cfg.mlmt_epochs)) / 2


# ---------------------------------------------------------------------- data (Sec. 4.1)

def augment(cfg, image, mask, rng):
    """Training transform of branch A, the same for labelled and unlabelled images."""
    image, mask = T.to_tensors(image, mask)
    if cfg.size:
        image, mask = T.resize(image, mask, cfg.size)
    low, high = cfg.scale
    scale = low + 0.1 * int(rng.integers(round((high - low) / 0.1) + 1))
    image, mask = T.resize(image, mask, [round(side * scale) for side in image.shape[1:]])
    if cfg.crop:
        image, mask = T.random_crop(image, mask, cfg.crop, rng, cfg.pad_label)
    if cfg.shift:
        image, mask = T.random_shift(image, mask, cfg.shift, rng)
    if cfg.flip:
        image, mask = T.random_flip(image, mask, rng)
    return image, mask


def two_views(cfg, image, tags, rng):
    """Training transform of branch B -> (weak views for student and teacher, z [C]: the tags)"""
    image, z = T.to_tensors(image, tags)
    image, _ = T.resize(image, None, cfg.mlmt_size)
    teacher, _ = T.random_flip(image, None, rng)
    student, _ = T.random_flip(image, None, rng)
    return (student, teacher), z


def strong_view(x, step, cfg, ctx):
    """The student's view of unlabelled images: x [B, 3, h, w] with jitter and blur"""
    rng = ctx.random(cfg.seed, "strong view", step)
    order = np.random.default_rng(mix(cfg.seed, "jitter", step)).permutation(4)
    x = colour_jitter(T.denormalise(x), rng.uniform(len(x), 4), order, 0.4, 0.1)
    x = gaussian_blur(x, rng.uniform(len(x)), *cfg.mlmt_blur)
    return T.normalise(x).contiguous(memory_format=torch.channels_last)


def streams(data, labelled, unlabelled, step, cfg, ctx):
    """-> endless iterators, from this step on, of (images [B, 3, H, W], masks), of images, and of
    (images, masks) whose true maps D sees, drawn independently of the first"""
    transform = partial(augment, cfg)
    stream_l = Stream(data.train, labelled, transform, cfg.seed, "labelled", True)
    stream_u = Stream(data.train, unlabelled, transform, cfg.seed, "unlabelled", False)
    stream_r = Stream(data.train, labelled, transform, cfg.seed, "real", True)
    share = ctx.share(cfg.batch)
    return [endless(stream, share, step, cfg.workers, ctx)
            for stream in (stream_l, stream_u, stream_r)]


# ---------------------------------------------------------------------- fusion and evaluation

def fuse(p, keep, background=(0,)):
    """Eq. 7: class maps p [B, C, H, W] >= 0, with -1 where a class is neither kept nor background
    (the paper has 0, to which p of a kept class may underflow).

    keep: bool [B, C], G(x)_c > tau. Without a background, an image that would lose all its classes
    stays as it is."""
    keep = keep.clone()
    keep[:, list(background)] = True
    keep |= ~keep.any(1, keepdim=True)
    return p.masked_fill(~keep[:, :, None, None], -1.0)


@torch.no_grad()
def predict(net, x, cfg, ctx, classifier=None):
    """Logits [B, C, H, W] of x at its own size; with a classifier the fused probabilities"""
    height, width = x.shape[2:]
    bottom, right = (max(0, side - n) for side, n in zip(cfg.eval_pad or (0, 0), (height, width)))
    with ctx.autocast():
        logits = net(F.pad(x, (0, right, 0, bottom)))[..., :height, :width].float()
    if classifier is None:
        return logits
    g = classify(classifier, x, ctx)
    return fuse(logits.softmax(1), g > cfg.tau, cfg.background)


@torch.no_grad()
def classify(classifier, x, ctx):
    """Probabilities [B, C] of the classes in x, which is resized to the classifier's input size"""
    x = F.interpolate(x, classifier.size, mode="bilinear", align_corners=False, antialias=True)
    with ctx.autocast():
        return classifier(x).float().sigmoid()


def evaluate(net, data, cfg, ctx, classifier=None):
    """Protocol: whole images, single scale, logits at image size, argmax (with a classifier, after
    Eq. 7); one confusion matrix over the split; 255 ignored; each image once.
    -> (ConfusionMatrix, rows of the panel)"""
    net.eval()
    confusion = ConfusionMatrix(len(data.classes), ctx.device)
    examples = Examples(len(data.val), ctx)
    for x, y in scored_batches(data, cfg, ctx):
        prediction = predict(net, x, cfg, ctx, classifier).argmax(1)
        confusion.update(prediction, y)
        examples.add(x, y, prediction)
    confusion.reduce()
    net.train()
    return confusion, examples.rows


def evaluate_classifier(classifier, data, cfg, ctx):
    """Fig. 12, over the classes that may be removed. -> macro AUC, micro AUC, its curve"""
    classifier.eval()
    table = torch.zeros(2, len(data.val), len(data.classes), device=ctx.device)  # truth, scores
    first = ctx.rank
    for x, y in scored_batches(data, cfg, ctx):
        rows = slice(first, first + len(x) * ctx.world, ctx.world)
        table[0, rows] = (count_pixels(y, len(data.classes)) > 0).float()
        table[1, rows] = classify(classifier, x, ctx)
        first += len(x) * ctx.world
    classifier.train()
    removable = [c for c in range(len(data.classes)) if c not in cfg.background]
    truth, scores = ctx.sum(table)[..., removable].cpu()
    return auc(scores, truth)


def count_heuristics(net, data, cfg, ctx):
    """Table 5: a class that has fewer than T predicted pixels in an image is removed from it.

    Threshold: the T, 1 to 12 times --heuristics, of the best mIoU. Class-wise: the T_c, or 0, of
    the best IoU_c when class c alone is filtered. Both are tuned on the scored images.
    -> (T, its ConfusionMatrix), ([T_c], theirs)"""
    net.eval()
    num_classes = len(data.classes)
    thresholds = cfg.heuristics * torch.arange(13, device=ctx.device)
    tally = torch.zeros(3, 13, num_classes, dtype=torch.int64, device=ctx.device)
    for x, y in scored_batches(data, cfg, ctx):
        prediction = predict(net, x, cfg, ctx).argmax(1)
        keep = count_pixels(prediction, num_classes) >= thresholds[:, None, None]  # [13, B, C]
        hits = count_pixels(prediction.where(prediction == y, 255), num_classes)
        predicted = count_pixels(prediction.where(y != 255, 255), num_classes)
        tally[0] += (keep * hits).sum(1)
        tally[1] += (keep * predicted).sum(1)
        tally[2] += count_pixels(y, num_classes).sum(0)
    hits, predicted, true = ctx.sum(tally).double()
    iou = (hits / (true + predicted - hits)).nan_to_num(0)  # [13, C]
    of_class = thresholds[iou.argmax(0)]  # the smallest of equally good ones
    of_class[list(cfg.background)] = 0
    rules = [*thresholds[1:], of_class]
    confusions = [ConfusionMatrix(num_classes, ctx.device) for _ in rules]
    for x, y in scored_batches(data, cfg, ctx):
        p = predict(net, x, cfg, ctx).softmax(1)
        counts = count_pixels(p.argmax(1), num_classes)
        for rule, confusion in zip(rules, confusions):
            confusion.update(fuse(p, counts >= rule, cfg.background).argmax(1), y)
    for confusion in confusions:
        confusion.reduce()
    best = max(range(12), key=lambda k: confusions[k].miou())
    return (int(rules[best]), confusions[best]), (of_class.tolist(), confusions[12])


# ---------------------------------------------------------------------- training

def train(cfg):
    """Train, or resume, the run in cfg.out; ends with the `final:` line. -> mIoU (B: AUC), 0..1"""
    ctx = Runtime(cfg.device, cfg.precision)
    data = open_dataset(cfg.data, cfg.root, cfg.download)
    labelled, unlabelled = choose_labelled(data, cfg.labeled, cfg.split, cfg.seed)
    unlabelled = unlabelled or labelled  # all are labelled: every stream has all of them
    check_classes("background", cfg.background, data)
    check_classes("pad-label", {cfg.pad_label} - {T.IGNORE}, data)
    needed = None if cfg.weak else labelled
    tagged = Tagged(data, labelled, cfg.tags, cfg.background, needed)  # errors come before branch A
    if cfg.branch == "both":  # errors come now, not after branch A
        ctx.share(cfg.mlmt_batch, "--mlmt-batch")
        if not cfg.supervised:
            ctx.share(cfg.mlmt_batch_u, "--mlmt-batch-u")
    begun = (Path(cfg.out) / "mlmt/last.pt").exists()
    folder = RunFolder("s4gan_mlmt", cfg, ctx, data, free=() if begun else OF_B)
    data = cached(data, cfg.size, cfg, ctx)

    if cfg.branch != "mlmt":
        net, confusion = train_s4gan(data, labelled, unlabelled, folder, cfg, ctx)
    if cfg.branch == "s4gan":
        folder.finish(confusion)
        return confusion.miou()
    part = folder.part("mlmt")
    kept = [data.classes[c] for c in cfg.background]
    ctx.say(f"classes that the fusion never removes (--background): {', '.join(kept) or 'none'}")
    classifier, macro, words = train_mlmt(data, tagged, labelled, unlabelled, part, cfg, ctx)
    if cfg.branch == "mlmt":
        part.finish(result=words)
        return macro
    fused, examples = evaluate(net, data, cfg, ctx, classifier)  # Eq. 7
    folder.log.evaluated(cfg.steps, miou_fused=fused.miou())
    folder.show(examples)
    alone = f"{100 * confusion.miou():.1f} alone ({folder.best_score})"
    folder.finish(fused, f"mIoU {100 * fused.miou():.1f} fused, {alone}")
    return fused.miou()


def train_s4gan(data, labelled, unlabelled, folder, cfg, ctx):
    """Branch A. -> (S, its ConfusionMatrix)"""
    torch.manual_seed(mix(cfg.seed, "init"))  # the same initial weights on every process
    num_classes = len(data.classes)
    net = Segmenter(cfg, num_classes)
    discriminator = Discriminator(num_classes, cfg.d_width, cfg.d_dropout)
    if folder.is_new:
        load_weights(net.net.body, cfg.backbone, cfg.weights, ctx.say)
    net = ctx.place(net)
    discriminator = ctx.place(discriminator)
    optimizer = make_optimizer(net, cfg)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), cfg.lr_d, (0.9, 0.99), fused=True)
    gan = not cfg.supervised
    step = folder.resume(cfg.batch * (3 if gan else 1), cfg.steps, net=net, optimizer=optimizer,
                         discriminator=discriminator, optimizer_d=optimizer_d, scaler=ctx.scaler)
    wrapped = ctx.wrap(net, cfg.compile)
    batches_l, batches_u, batches_r = streams(data, labelled, unlabelled, step, cfg, ctx)
    folder.introduce(labelled, unlabelled, step, f"branch A: {cfg.steps} steps")

    net.train()
    while step < cfg.steps:
        folder.stop_if_asked(step)
        if step > 0 and step % cfg.eval_every == 0:
            confusion, examples = evaluate(net, data, cfg, ctx)
            folder.scored(step, confusion.miou(), examples)
        lr = cfg.lr * poly(step, cfg.steps)
        set_lr(optimizer, lr)
        set_lr(optimizer_d, cfg.lr_d * poly(step, cfg.steps))
        with folder.log.waiting():
            x_l, y_l = next(batches_l)
            x_u = next(batches_u) if gan else None
            x_r, y_r = next(batches_r) if gan else (None, None)
        optimizer.zero_grad()
        optimizer_d.zero_grad()
        torch.manual_seed(mix(cfg.seed, "dropout", step, ctx.rank))  # that of DeepLabv3+
        rng = [ctx.random(cfg.seed, "discriminator", step, k) for k in range(4)]  # D's dropout
        discriminator.requires_grad_(False)  # S learns through D, and D nothing from it
        with ctx.autocast():
            if gan:
                logits_l, logits_u = wrapped(x_l, x_u)
                image_u = unit_range(x_u, *ctx.extremes(x_u))
                image_r = unit_range(x_r, *ctx.extremes(x_r))
                fake = logits_u.float().softmax(1)
                real = one_hot(y_r, num_classes)
                d_fake, f_fake = discriminator(fake, image_u, rng[0])
                _, f_real = discriminator(real, image_r, rng[1])
            else:
                logits_l = wrapped(x_l)
        loss = loss_ce = cross_entropy(logits_l, y_l, ctx.count(y_l != T.IGNORE))  # Eq. 1
        terms = dict(loss_ce=loss_ce)
        if gan:
            loss_fm = feature_matching(global_mean(f_real, ctx), global_mean(f_fake, ctx))  # Eq. 2
            passed = (d_fake.detach().sigmoid() >= cfg.gamma) & (step > 0)  # D9
            loss_st = self_training(logits_u, passed, ctx.count(passed))  # Eq. 3
            loss = loss + cfg.lambda_fm * loss_fm + cfg.lambda_st * loss_st  # Eq. 4
            loss = loss + cfg.lambda_adv * adversarial(d_fake)  # Table 6
            terms |= dict(loss_fm=loss_fm, loss_st=loss_st, passed=passed.float().mean())
        ctx.scaler.scale(loss).backward()
        if gan:  # D, on the same maps
            discriminator.requires_grad_(True)
            with ctx.autocast():
                d_fake, _ = discriminator(fake.detach(), image_u, rng[2])
                d_real, _ = discriminator(real, image_r, rng[3])
            loss_d = discriminator_loss(d_real, d_fake)  # Eq. 5
            ctx.scaler.scale(loss_d).backward()
            ctx.average_grads(discriminator.parameters())
            ctx.scaler.step(optimizer_d)
            terms |= dict(loss_d=loss_d, d_real=d_real.detach().sigmoid().mean(),  # Fig. 11
                          d_fake=d_fake.detach().sigmoid().mean())
        ctx.scaler.step(optimizer)
        ctx.scaler.update()
        step += 1
        folder.log.add(step, **terms, lr=lr)
        if step % cfg.save_every == 0 or step % cfg.eval_every == 0 or step == cfg.steps:
            folder.save(step)
    confusion, examples = evaluate(net, data, cfg, ctx)
    folder.scored(step, confusion.miou(), examples)
    return net, confusion


def make_optimizer(net, cfg):
    """Two groups that hold every trained parameter of S once: the ResNet, and all else"""
    body = {id(p) for p in net.net.body.parameters()}
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if id(p) in body], lr_mult=cfg.backbone_lr_mult),
              dict(params=[p for p in trained if id(p) not in body], lr_mult=cfg.head_lr_mult)]
    if cfg.optimizer == "sgd":
        return momentum_sgd(groups, cfg.lr, cfg.weight_decay)
    return torch.optim.Adam(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def global_mean(features, ctx):
    """E of Eq. 2 over the global batch, [1, 512]. The other processes' part is a constant: averaged
    by DDP, the gradients are then those of one process."""
    local = features.mean(0, keepdim=True)
    return local + (ctx.mean(local) - local).detach()


def train_mlmt(data, tagged, labelled, unlabelled, folder, cfg, ctx):
    """Branch B. -> (the network used at test time, its macro AUC, a line about it)"""
    if cfg.weak:  # the classes of all images, and L_cons on all of them (Table 7)
        labelled = unlabelled = list(range(len(data.train)))
    semi = not cfg.supervised
    epoch_length = math.ceil(len(labelled) / cfg.mlmt_batch)
    steps = cfg.mlmt_epochs * epoch_length
    torch.manual_seed(mix(cfg.seed, "init", "mlmt"))
    student = Classifier(cfg, len(data.classes))
    if folder.is_new:
        load_weights(student.body, cfg.backbone, cfg.weights, ctx.say)
    student = ctx.place(student)
    teacher = make_teacher(student) if semi else None
    classifier = teacher or student
    optimizer = momentum_sgd([dict(params=list(student.parameters()))], cfg.mlmt_lr,
                             cfg.mlmt_weight_decay, nesterov=True)
    ctx.new_scaler()
    step = folder.resume(cfg.mlmt_batch + semi * cfg.mlmt_batch_u, steps, net=classifier,
                         student=student, optimizer=optimizer, scaler=ctx.scaler)
    wrapped = ctx.wrap(student, cfg.compile)
    views = partial(two_views, cfg)
    stream_l = Stream(tagged, labelled, views, cfg.seed, "mlmt labelled", True)
    stream_u = Stream(tagged, unlabelled, views, cfg.seed, "mlmt unlabelled", False)
    share_l = ctx.share(cfg.mlmt_batch, "--mlmt-batch")
    share_u = ctx.share(cfg.mlmt_batch_u, "--mlmt-batch-u") if semi else 0
    batches_l = endless(stream_l, share_l, step, cfg.workers, ctx)
    batches_u = endless(stream_u, share_u, step, cfg.workers, ctx)
    folder.introduce(labelled, unlabelled, step, f"branch B: {steps} steps")

    student.train()
    classifier.train()  # the teacher has BN statistics of its own views
    while step < steps:
        folder.stop_if_asked(step)
        if step > 0 and step % cfg.eval_every == 0:
            macro, micro, _ = evaluate_classifier(classifier, data, cfg, ctx)
            folder.scored(step, macro, name="auc_macro", auc_micro=micro)
        epoch = step // epoch_length
        lr = mlmt_lr(epoch, cfg)
        w_c = consistency_weight(epoch, cfg)
        set_lr(optimizer, lr)
        with folder.log.waiting():
            (x_l, x_l2), z_l = next(batches_l)
            x_u, x_u2 = next(batches_u) if semi else (None, None)
        if semi:
            x_u = strong_view(x_u, step, cfg, ctx)
        optimizer.zero_grad()
        with ctx.autocast():
            if semi:
                g_l, g_u = wrapped(x_l, x_u)
                with torch.no_grad():
                    h_l, h_u = teacher(x_l2, x_u2)
            else:
                g_l = wrapped(x_l)
        loss = loss_cce = multi_label(g_l, z_l)  # Eq. 6
        terms = dict(loss_cce=loss_cce)
        if semi:
            if cfg.cons_on == "all":
                g_u = torch.cat([g_l, g_u])
                h_u = torch.cat([h_l, h_u])
            loss_cons = consistency(cfg.cons, g_u, h_u)
            loss = loss + w_c * loss_cons  # Eq. 6
            terms |= dict(loss_cons=loss_cons, w_c=w_c)
        ctx.scaler.scale(loss).backward()
        ctx.scaler.step(optimizer)
        ctx.scaler.update()
        step += 1
        if semi:
            update_ema(teacher, student, min(1 - 1 / (step + 1), cfg.ema), buffers="keep")
        folder.log.add(step, **terms, lr=lr)
        if step % cfg.save_every == 0 or step % cfg.eval_every == 0 or step == steps:
            folder.save(step)
    macro, micro, curve = evaluate_classifier(classifier, data, cfg, ctx)
    folder.scored(step, macro, name="auc_macro", auc_micro=micro)
    if ctx.main:
        roc_picture(*curve, micro, folder.path / "roc.png")
    return classifier.eval(), macro, in_words(macro, micro)


# ---------------------------------------------------------------------- command line

def open_network(path, cfg, given, ctx):
    """-> (S, or the classifier, in a checkpoint, its settings, its contents)"""
    cfg, state = open_checkpoint("s4gan_mlmt", path, cfg, given, ctx, RELEASED, RELEASED_SETTINGS)
    network = Classifier if state.get("part") == "mlmt" else Segmenter
    net = load_network(network(cfg, len(state["classes"])), state, path, ctx.device)
    return net.eval(), cfg, state


def score(net, classifier, data, cfg, ctx):
    """--evaluate: say what there is to say of a network of either branch. -> its score in words"""
    if isinstance(net, Classifier):
        out = Path(cfg.out or Path(cfg.evaluate).parent)
        make_folder(out)  # told now if roc.png cannot be written there
        macro, micro, curve = evaluate_classifier(net, data, cfg, ctx)
        if ctx.main:
            roc_picture(*curve, micro, out / "roc.png")
        return in_words(macro, micro)
    confusion, _ = evaluate(net, data, cfg, ctx, classifier)
    ctx.say(confusion.table(data.classes))
    if cfg.heuristics:
        for threshold, filtered in count_heuristics(net, data, cfg, ctx):
            ctx.say(f"at least {threshold} pixels, tuned on these images: mIoU "
                    f"{100 * filtered.miou():.1f}")
    return f"mIoU {100 * confusion.miou():.1f}, {'fused' if classifier else 'single scale'},"


def main(argv=None):
    cfg, given = parse(Config, PRESETS, argv, __doc__, RELEASED_SETTINGS)
    if not cfg.evaluate and not cfg.predict:
        settle(cfg, given)
        train(cfg)
        return
    ctx = Runtime(cfg.device, cfg.precision)
    path = cfg.evaluate or cfg.predict
    parsed = cfg
    net, cfg, state = open_network(path, parsed, given, ctx)
    classifier = None
    if cfg.classifier:
        classifier, of_b, other = open_network(cfg.classifier, parsed, {}, ctx)
        if not isinstance(classifier, Classifier) or other["classes"] != state["classes"]:
            raise UserError(f"--classifier {cfg.classifier} is not a checkpoint of branch B with "
                            f"these classes: expected a file such as runs/.../mlmt/last.pt")
        cfg.tau = given.get("tau", of_b.tau)  # S may have been trained before these were set
        cfg.background = given.get("background", of_b.background)
    elif "tau" in given:
        raise UserError("--tau has no effect without --classifier")
    check_classes("background", cfg.background, SimpleNamespace(**state))
    if isinstance(net, Classifier) and (cfg.predict or cfg.classifier or cfg.heuristics):
        raise UserError(f"{path} is a classifier, which segments nothing: give a checkpoint of "
                        f"branch A, such as runs/.../last.pt")
    if cfg.evaluate:
        data = open_dataset(cfg.data, cfg.root)
        same_classes(data, state, path)
        result = score(net, classifier, data, cfg, ctx)
        ctx.say(f"{path} (step {state['step']}): {result} on {len(data.val)} "
                f"{data.scored_on} images")
    else:
        network = partial(predict, net, cfg=cfg, ctx=ctx, classifier=classifier)
        predict_folder(network, cfg, state["palette"], ctx)
    ctx.close()


if __name__ == "__main__":
    sys.exit(run(main))
