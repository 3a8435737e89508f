"""C3-SemiSeg: Contrastive Semi-supervised Segmentation via Cross-set Learning and Dynamic
Class-balancing (Zhou, Xu, Zhang, Gao, Heng; ICCV 2021)

A student is trained with an EMA teacher. The teacher sees weakly augmented unlabelled crops, the
student CutMix mixtures of labelled (weak) and unlabelled (strong) crops; its outputs are un-mixed.
DCRS keeps pixels of which the teacher is sure, by a moving threshold per class; there the student
must match it. InfoNCE on pixel embeddings pulls classes apart. Only DeepLabv2 is used at inference.

Map (paper -> this file)
  Eq. 1 L_sup                   cross_entropy           Sec. 3.2, 4.1 A, A^     augment, photometry
  Eq. 2 L_consist               consistency             Sec. 3.3 hard anchors   sample
  Eq. 3, 5 L_contrast           contrastive, contrast   Sec. 3.4 DCRS           confident_pixels
  Eq. 4 CutMix                  boxes, pairing, swap    Sec. 4.1 lambda_1       consistency_weight
  Eq. 6 threshold EMA           class_thresholds        Fig. 1 CNN, SEG, PROJ   Segmenter
  Eq. 7 L_total                 train                   Sec. 3.1 teacher, alpha update_teacher
  Table 1, 2 PRESETS; 3 --lambda-1, --contrast; 4 --contrast, --sampling; 5 --teacher-aug,
  --student-aug; 6 --mix; 7 --dcrs      Fig. 2 predictions.png      Sec. 4.1 mIoU evaluate

Deviations: what the paper says, what the authors' code does (--released), what we do, and why
  D1  DeepLabv2's ASPP has four rates. The code returns too early and uses only 6 and 12. So do
      we, as its results belong to these two: --aspp-rates 6,12,18,24 takes all.
  D2  Eq. 2 sums over the classes. The code takes the mean, to which lambda_1 = 50 belongs, and so
      do we on its datasets and shapes; the other presets take the sum and 2.63 = 50 / 19.
  D3  Eq. 1 and 2 are means per image, the code's are per GPU. Here --groups stands for the GPUs:
      means, CutMix pairs and contrast stay within a group; the number of processes has no effect.
  D4  Added by the code and us (in brackets: how to undo it): Eq. 5 times 1.5 (--contrast-scale 1),
      contrast in the burn-in (--no-contrast-burn-in), rises of lambda_2 (--contrast-ramp 0) and of
      the EMA's decay (--no-ema-warmup). Keys of labelled pixels are the teacher's in the paper
      (--keys teacher), the student's in the code and here: detached when unlabelled images are
      contrasted too, else with gradient.
  D5  The code never contrasts class 0, the road; nor do we on its datasets: --skip-classes none.
      And it trains on the black corners that rotation makes in unlabelled crops; we do not.
  D6  The paper has one learning rate. The code's backbone has a tenth of it and three updates per
      step (conv1 one, shortcuts four); ours has 0.3 of it and one update.
  D7  D_U is train without D_L in the paper and here. In the code it is all of train on BDD100K, and
      on Cityscapes train without the D_L of seed 12345, whatever the seed. On BDD100K the code's
      D_U has neither RandAugment nor rescaling; ours has both.
  D8  The code's numbers are the student's best epoch; ours are the student's after the last step.
  D9  From scratch (--weights none) frozen BN and heads of N(0, 0.01) do not train. BN learns there,
      the teacher averages its statistics, and heads have PyTorch's initialisation.
  D10 Half of the anchors are hard; the others are random in the paper, predicted correctly in the
      code and here. A class with no more than --anchors cells in an image has no anchors.
  D11 Ten epochs of burn-in are 9 x 250 steps in the code, and that share of the steps here. Also
      from the code: when lambda_1's t begins, the first thresholds, the boxes' area, the constants
      of jitter and RandAugment.

Commands
  python c3_semiseg.py                                        first run: shapes, on a CPU in minutes
  python c3_semiseg.py --supervised                           its baseline; run it again to resume
  python c3_semiseg.py --data cityscapes --labeled 100        the paper's Table 1
  torchrun --nproc_per_node=4 c3_semiseg.py --data cityscapes  the same on 4 GPUs, 4 + 4 images
  python c3_semiseg.py --evaluate runs/.../last.pt            score a checkpoint
  python c3_semiseg.py --evaluate best_model.pth --data cityscapes   score the authors' checkpoint
  python c3_semiseg.py --predict runs/.../last.pt --images photos/   palette PNGs
"""
import math
import sys
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tvf

from common import transforms as T
from common.backbones import DeepLabV2, upsample
from common.cache import cached
from common.checkpoint import load_network, open_checkpoint, same_classes
from common.command_line import check_needs, parse, run, run_name
from common.datasets import DATASETS, check_classes, choose_labelled, open_dataset
from common.inference import Examples, predict_folder, scored_batches
from common.miou import ConfusionMatrix
from common.random import mix
from common.run_folder import RunFolder
from common.runtime import Runtime
from common.schedules import make_teacher, poly, ramp, set_lr, update_ema
from common.settings import ANY, RESNETS, BaseConfig, UserError, option
from common.streams import Stream, endless
from common.weights import load_weights

SEMI = dict(supervised=False)  # what a flag needs to have an effect
CONSIST = SEMI | dict(lambda_1=ANY)
CONTRAST = SEMI | dict(contrast=("both", "labelled", "unlabelled"))
LABELLED = SEMI | dict(contrast=("both", "labelled"))
VIEWS = ("W", "S", "SR")  # weak; colour jitter; colour jitter and RandAugment (Table 5)


# ---------------------------------------------------------------------- settings

@dataclass
class Config(BaseConfig):
    data: str = option("shapes", "dataset", DATASETS, group="run", scoring=True)
    flip: bool = option(True, "random horizontal flip (Sec. 4.1)")
    backbone: str = option("resnet101", "encoder CNN (Sec. 4.1)", RESNETS)

    burn_in: float = option(0.09, "share of the steps before unlabelled images are used (D11)",
                            within=(0, 1), group="consistency", needs=SEMI)
    lambda_1: float = option(50.0, "final weight of L_consist", within=(0, 1e6), needs=SEMI)
    consist_ramp: float = option(0.16, "its ramp: share of the steps", within=(0, 1), needs=CONSIST)
    divide_by_classes: bool = option(True, "mean over classes in Eq. 2 (D2)", needs=CONSIST)
    ema: float = option(0.99, "decay alpha of the teacher (Sec. 4.1)", within=(0, 1), needs=SEMI)
    ema_warmup: bool = option(True, "smaller decay in its first 24 steps (D4)", needs=SEMI)
    mix: str = option("cross", "CutMix pairs (Table 6)", ("cross", "intra", "none"), needs=SEMI)
    dcrs: float = option(0.8, "DCRS: share s of a class to keep", within=(0, 1), needs=SEMI)
    dcrs_beta: float = option(0.9, "DCRS: decay beta of Eq. 6", within=(0, 1), needs=SEMI)
    teacher_aug: str = option("W", "teacher's view of D_U (Table 5)", VIEWS, needs=SEMI)
    student_aug: str = option("SR", "student's view of D_U (Table 5)", VIEWS, needs=SEMI)

    contrast: str = option("both", "images whose embeddings are contrasted (Table 4)",
                           ("both", "labelled", "unlabelled", "none"), group="contrast", needs=SEMI)
    lambda_2: float = option(0.1, "weight of L_contrast", within=(0, 1e6), needs=CONTRAST)
    contrast_ramp: float = option(0.01, "its ramp: share of steps", within=(0, 1), needs=CONTRAST)
    contrast_burn_in: bool = option(True, "contrast labelled images in the burn-in too (D4)",
                                    needs=LABELLED | dict(burn_in=ANY))
    contrast_scale: float = option(1.5, "factor of Eq. 5 (D4)", within=(0, 1e6), needs=CONTRAST)
    tau: float = option(0.15, "temperature of Eq. 5", within=(0.001, 1000), needs=CONTRAST)
    anchors: int = option(20, "anchors per class and image", within=(2, 10000), needs=CONTRAST)
    sampling: str = option("hard", "anchors: half of them wrongly predicted, or any (Table 4)",
                           ("hard", "random"), needs=CONTRAST)
    keys: str = option("student", "source of D_L's keys", ("student", "teacher"), needs=LABELLED)
    skip_classes: tuple[int, ...] = option((), "ids of classes that are not contrasted (D5)",
                                           within=(0, 254), needs=CONTRAST)

    long_side: int | None = option(None, "resize the longer side to this", within=(8, 100000),
                                   replaces="size", group="augmentation")
    scales: tuple[float, float, float] = option((1.0, 1.0, 1.0), "random rescaling by one of these",
                                                within=(0.01, 100))
    rotate: int = option(10, "random rotation by up to this many degrees", within=(0, 180))

    aspp_rates: tuple[int, ...] = option((6, 12), "dilations of SEG (D1)", within=(1, 10000),
                                         group="network")
    batch: int = option(16, "labelled images per step over all processes; as many unlabelled",
                        within=(1, 100000), group="optimisation", scoring=True)
    groups: int = option(4, "parts treated apart; at least one per process", within=(1, 100000))
    lr: float = option(1.2e-4, "learning rate of SEG and PROJ (Sec. 4.1)", within=(0, 1000))
    backbone_lr_mult: float | None = option(None, "share of --lr for the CNN [0.3; 1 from scratch]",
                                            within=(0, 1000))


SUM = dict(divide_by_classes=False, lambda_1=2.63)  # for any number of classes (D2)
PRESETS = {
    "shapes": dict(labeled="40", steps=1000, batch=6, groups=1, crop=(80, 80), backbone="resnet18",
                   backbone_layers=2, weights="none", aspp_rates=(1, 3), lr=1.5e-3, lambda_1=25.0,
                   anchors=8, burn_in=0.15, consist_ramp=0.3, workers=0, eval_every=250,
                   save_every=100),
    "cityscapes": dict(labeled="100", seed=12345, steps=25000, size=(512, 1024), crop=(256, 512),
                       eval_size="train", skip_classes=(0,), eval_every=250),
    "bdd100k": dict(labeled="233", steps=20000, batch=8, scales=(0.75, 1.0, 1.25), crop=(512, 512),
                    skip_classes=(0,), burn_in=0.225, consist_ramp=0.2, contrast_ramp=0.0125),
    "camvid": SUM | dict(labeled="100", steps=10000, batch=8, groups=2, size=(360, 480),
                         crop=(256, 320), eval_size="train", eval_every=250),
    "folder": SUM | dict(steps=10000, batch=8, groups=2, long_side=400, scales=(0.75, 1.0, 1.25),
                         crop=(320, 320)),
}
PRESETS["voc"] = PRESETS["folder"] | dict(labeled="1464", steps=25000, batch=16, groups=4)
PRESETS |= dict.fromkeys(("pcontext", "pcontext59", "sunrgbd", "sunrgbd13"),  # not in the paper
                         PRESETS["folder"] | dict(labeled="1/8"))


RELEASED_SETTINGS = {  # D1, D2, D5
    "all": dict(aspp_rates=(6, 12), divide_by_classes=True, lambda_1=50.0, skip_classes=(0,))}
RELEASED = (dict(names={  # files of the authors' code: student, or teacher
    r"decoder\.conv2d_list\.([01])": r"head.branches.\1", "decoder": None, "body": "body"},  # D1
    classes="head.branches.0.weight"),)


def settle(cfg, given):
    """Fill in what one setting decides about others. Raises UserError for contradictions."""
    check_needs(given, cfg)
    if cfg.supervised:
        cfg.burn_in = 1.0
        cfg.contrast = "none"
    if cfg.backbone_lr_mult is None:
        cfg.backbone_lr_mult = 1.0 if cfg.weights == "none" else 0.3
    if cfg.batch % cfg.groups:
        raise UserError(f"--batch {cfg.batch}: expected a multiple of --groups {cfg.groups}")
    if cfg.dcrs == 1 and "dcrs_beta" in given:
        raise UserError("--dcrs-beta has no effect with --dcrs 1: drop one of the two")
    cfg.out = cfg.out or run_name("c3_semiseg", cfg, given)


# ---------------------------------------------------------------------- model (Fig. 1, Sec. 4.1)

class Segmenter(nn.Module):
    """CNN, SEG and PROJ of Fig. 1; student and teacher are one each. Inference needs only `net`."""

    def __init__(self, cfg, num_classes):
        super().__init__()
        scratch = cfg.weights == "none"  # D9
        self.net = DeepLabV2(num_classes, cfg.backbone, cfg.backbone_layers, cfg.aspp_rates,
                             bn="learn" if scratch else "frozen")
        if scratch:
            for conv in self.net.head.branches:
                conv.reset_parameters()
        self.projection = nn.Sequential()  # made last: SEG's initial weights do not depend on it
        if cfg.contrast != "none":
            first = nn.Conv2d(self.net.body.out_channels, 256, 1)
            self.projection = nn.Sequential(first, nn.ReLU(), nn.Conv2d(256, 256, 1))
        for conv in self.projection[::2] if not scratch else ():
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, x):
        """[B, 3, H, W] -> logits [B, C, H, W] in float32, embeddings [B, 256, h, w]"""
        z = self.net.body(x)
        logits = upsample(self.net.head(z), x.shape[2:])
        return logits, self.projection(z)


def update_teacher(teacher, student, m, cfg):
    """The teacher's m-th step: teacher <- alpha teacher + (1 - alpha) student; a copy for m = 1"""
    alpha = min(1 - 1 / (4 * m + 1), cfg.ema) if cfg.ema_warmup else cfg.ema  # D4
    update_ema(teacher, student, alpha if m > 1 else 0.0, buffers="ema")


# ---------------------------------------------------------------------- augmentation (Sec. 3.2)

def photometry(image, view, rng):
    """One of VIEWS of an image, uint8 [3, H, W] -> the same; no pixel moves. The constants are the
    authors' code's, not in the paper."""
    if view == "W":
        return image
    image = T.colour_jitter(tvf.to_pil_image(image), rng, 0.5, 0.25)
    if view == "SR":
        image = rand_augment(image, rng)
    return tvf.pil_to_tensor(image)


def rand_augment(image, rng):
    """R: two of ten operations, drawn with replacement. Each runs with probability 1/2, at a level
    of mean 10 and standard deviation 0.5, clipped to [0, 10]. image: PIL"""
    for name in rng.choice(list(OPS), 2):
        level = float(min(max(rng.normal(10, 0.5), 0), 10))
        if rng.random() < 0.5:
            image = OPS[name](image, level)
    return image


OPS = {  # RandAugment's photometric operations: (PIL image, level 0..10) -> image
    "autocontrast": lambda image, level: tvf.autocontrast(image),
    "equalize": lambda image, level: tvf.equalize(image),
    "invert": lambda image, level: tvf.invert(image),
    "posterize": lambda image, level: tvf.posterize(image, int(0.4 * level)),
    "solarize": lambda image, level: tvf.solarize(image, int(25.6 * level)),  # 256: nothing to do
    "solarize_add": lambda image, level: image.point(
        [v + int(11 * level) if v < 128 else v for v in range(256)] * 3),
    "color": lambda image, level: tvf.adjust_saturation(image, 0.18 * level + 0.1),
    "contrast": lambda image, level: tvf.adjust_contrast(image, 0.18 * level + 0.1),
    "brightness": lambda image, level: tvf.adjust_brightness(image, 0.18 * level + 0.1),
    "sharpness": lambda image, level: tvf.adjust_sharpness(image, 0.18 * level + 0.1),
}


def rotate(image, mask, degrees, size, rng):
    """By an integer angle of -degrees..degrees about the centre; what enters is black / ignore.
    Only a random window of the result is made, of `size` (H, W) or what there is of it."""
    height, width = image.shape[1:]
    rows = min(size[0], height)
    columns = min(size[1], width)
    angle = math.radians(int(rng.integers(-degrees, degrees + 1)))
    y = int(rng.integers(height - rows + 1)) - height / 2  # the window's corner from the centre
    x = int(rng.integers(width - columns + 1)) - width / 2
    cos = math.cos(angle)
    sin = math.sin(angle)
    source = (cos, -sin, cos * x - sin * y + width / 2, sin, cos, sin * x + cos * y + height / 2)
    affine = ((columns, rows), Image.Transform.AFFINE, source)
    image = tvf.to_pil_image(image).transform(*affine, Image.Resampling.BILINEAR)
    mask = tvf.to_pil_image(mask[None]).transform(*affine, Image.Resampling.NEAREST, fillcolor=255)
    return tvf.pil_to_tensor(image), tvf.pil_to_tensor(mask)[0]


def boxes(count, size, rng):
    """Rectangles of Eq. 4: height H 0.5^u, width W 0.5^(1-u) with u ~ U[0, 1), anywhere inside.
    -> bool [count, 1, H, W], True inside them"""
    u, *places = rng.uniform(count, 3).unbind(1)
    inside = []
    for side, share, place in zip(size, (0.5 ** u, 0.5 ** (1 - u)), places):
        length = (side * share).round()
        start = ((side - length) * place).round()
        offset = torch.arange(side, device=u.device) - start[:, None]
        inside.append((offset >= 0) & (offset < length[:, None]))  # [count, side]
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def pairing(mode, groups, n, rng):
    """Order [2 groups n] of a batch of groups * n labelled, then as many unlabelled images: place i
    is mixed with place i + groups * n. cross: any two of a group; intra: two of the same kind."""
    labelled = torch.arange(groups * n, device=rng.device).view(groups, n)
    images = torch.cat([labelled, labelled + groups * n], 1)  # [groups, 2n]
    if mode == "cross":
        images = images.gather(1, rng.uniform(groups, 2 * n).argsort(1))
    elif mode == "intra":  # halves: labelled 1, 2, unlabelled 1, 2 -> l 1, u 1, l 2, u 2
        images = images.view(groups, 2, 2, n // 2).transpose(1, 2).reshape(groups, 2 * n)
    first, second = images.chunk(2, 1)
    return torch.cat([first.flatten(), second.flatten()])


def swap(x, box):
    """Eq. 4 for a batch: images i and i + n/2 exchange what is inside box i. x [n, C, h, w]; box
    bool [n/2, 1, H, W], at the nearest pixel if sizes differ. Its own inverse: it un-mixes too."""
    if box.shape[2:] != x.shape[2:]:
        box = F.interpolate(box.float(), x.shape[2:], mode="nearest") > 0
    a, b = x.chunk(2)
    return torch.cat([torch.where(box, b, a), torch.where(box, a, b)])


# ---------------------------------------------------------------------- losses and ramps

def cross_entropy(logits, y, groups=1):
    """Eq. 1: L_sup = mean over valid pixels of H(y, f(x)). logits [B, C, H, W] -> scalar

    y [B, H, W], 255 ignored. groups: equal parts of the batch, over whose means a mean is taken
    (D3). 0 with a graph if all is ignored.
    """
    loss = F.cross_entropy(logits.float(), y, ignore_index=255, reduction="none")
    total = loss.view(groups, -1).sum(1)
    count = (y != 255).view(groups, -1).sum(1)
    return (total / count.clamp(min=1)).mean()


def consistency(logits, q, keep, groups=1, divide_by_classes=True):
    """Eq. 2: L_consist = mean of -sum_c q_c log p_c over confident pixels, / C (D2) -> scalar

    logits [B, C, H, W] of the student, p = softmax(logits); q [B, C, H, W] the teacher's
    probabilities (constant); keep = M bool [B, H, W]; groups: see cross_entropy.
    """
    loss = -(q * logits.float().log_softmax(1)).sum(1) * keep  # [B, H, W]
    total = loss.view(groups, -1).sum(1)
    count = keep.view(groups, -1).sum(1)
    loss = (total / count.clamp(min=1)).mean()
    return loss / logits.shape[1] if divide_by_classes else loss


def class_thresholds(confidence, classes, old, s, beta):
    """Eq. 6: delta^_c <- beta delta^_c + (1 - beta) delta_c, for the classes that are there -> [C]

    delta_c: sort the confidences of class c's n_c pixels in descending order and take the one at
    index floor(n_c s). confidence, classes [N], 255 is no class; old [C].
    """
    confidence, order = confidence.sort(descending=True)
    classes, order = classes[order].sort(stable=True)  # by class; within it still from the largest
    confidence = confidence[order]
    bounds = torch.arange(len(old) + 1, device=old.device, dtype=classes.dtype)
    start = torch.searchsorted(classes, bounds)  # where a class begins
    n = start.diff()
    at = start[:-1] + (n.double() * s).long()
    delta = confidence[at.clamp(max=len(confidence) - 1)]
    return torch.where(n > 0, beta * old + (1 - beta) * delta, old)


def sample(f, keys, classes, logits, u, anchors=20, hard=True, groups=1):
    """Sec. 3.3, 4.1: in every image `anchors` distinct cells of each class that has more of them.

    Half of them are hard (predicted as another class), half easy; if one kind is short, the other
    fills up. hard=False: all at random. f, keys [B, D, h, w]; classes [B, H, W], 255: none; logits
    [B, C, H, W]; u [B, h w] ~ U[0, 1); groups: equal parts of the batch -> their (f, keys [groups,
    n, D], classes, valid bool [groups, n]), the valid ones first
    """
    size = f.shape[2:]
    num_classes = logits.shape[1]
    classes = F.interpolate(classes[:, None].float(), size, mode="nearest").long().flatten(1)
    logits = F.interpolate(logits.detach(), size, mode="bilinear", align_corners=False)
    easy = (classes == logits.argmax(1).flatten(1)) | (not hard)  # [B, h w]
    none = 2 * num_classes  # the kind of cells without a class
    kind = torch.where(classes == 255, none, 2 * classes + easy)  # 2c hard, 2c + 1 easy
    order = (kind + u.double()).argsort(1)  # by kind, and at random within it
    count = torch.zeros(len(u), none + 1, dtype=torch.long, device=u.device)
    count.scatter_add_(1, kind, torch.ones_like(kind))
    start = count.cumsum(1) - count  # where a kind begins in `order`
    count, start = (x[:, :none].reshape(-1, 2) for x in (count, start))  # [B C, hard and easy]
    large = (count.sum(1) > anchors).view(groups, -1)  # [groups, B C / groups]
    most = len(u) // groups * min(num_classes, order.shape[1] // (anchors + 1))  # T, upper bound
    if not u.is_cuda:  # T itself; to ask a GPU for it, the host would have to wait
        most = int(large.sum(1).max())
    large, pair = large.byte().sort(dim=1, descending=True, stable=True)
    first = torch.arange(0, len(count), len(count) // groups, device=u.device)[:, None]
    pair = pair[:, :most] + first  # [groups, T]: rows of `count`, one for an image and class
    n_hard, n_easy = count[pair].split(1, 2)  # [groups, T, 1]
    at_hard, at_easy = start[pair].split(1, 2)
    half = anchors // 2
    take = torch.where(n_easy >= anchors - half, n_hard.clamp(max=half), anchors - n_easy)  # hard
    slot = torch.arange(anchors, device=u.device)
    at = torch.where(slot < take, at_hard + slot, at_easy + slot - take)  # [groups, T, V]
    image = (pair // num_classes)[..., None]
    cells = order[image, at.clamp(0, order.shape[1] - 1)]
    f, keys = (x.flatten(2).transpose(1, 2)[image, cells].flatten(1, 2) for x in (f, keys))
    valid = large[:, :most].bool().repeat_interleave(anchors, 1)  # [groups, n], n = T V
    return f, keys, (pair % num_classes).repeat_interleave(anchors, 1), valid


def contrastive(f, keys, classes, valid, tau=0.15):
    """Eq. 5: mean over anchors i of 1/|P_i| sum_{j in P_i} -log[e^{s_ij} / (e^{s_ij} + n_i)]

    s_ij = <f_i, k_j> / tau; P_i: the keys of i's class but its own; n_i = sum of e^{s_ik} over the
    keys of other classes; a term is softplus(log n_i - s_ij). 0 with a graph if no row is valid.
    f, keys [groups, n, D], normalised here; classes, valid bool [groups, n] -> mean over groups
    """
    f = F.normalize(f.float(), dim=2) / tau
    keys = F.normalize(keys.float(), dim=2)
    s = f @ keys.transpose(1, 2)  # [groups, n, n]
    same = classes[:, :, None] == classes[:, None]
    negatives = s.masked_fill(same | ~valid[:, None], -1e9).logsumexp(2, keepdim=True)
    own = torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    positive = same & valid[:, None] & ~own
    loss = (F.softplus(negatives - s) * positive).sum(2) / positive.sum(2).clamp(min=1)
    return ((loss * valid).sum(1) / valid.sum(1).clamp(min=1)).mean()


def burn_in_end(cfg):
    """The first step that uses unlabelled images, and the teacher"""
    return round(cfg.burn_in * cfg.steps)


def consistency_weight(step, cfg):
    """lambda_1(t) = 50 exp(-5 (1 - t/4000)^2) up to t = 4000, counted from the burn-in's end"""
    return cfg.lambda_1 * ramp("gaussian", step - burn_in_end(cfg), cfg.consist_ramp * cfg.steps)


# ---------------------------------------------------------------------- data (Sec. 4.1)

def augment(cfg, labelled, image, mask, rng):
    """Training transform: the weak view of a labelled image -> (image, mask), or two views of an
    unlabelled one -> ((teacher's view, student's view, valid bool [H, W]), None). As in the code, a
    labelled image is rotated after it is cropped, an unlabelled one before."""
    image, mask = T.to_tensors(image, mask)
    scale = float(rng.choice(cfg.scales))
    size = cfg.size or image.shape[1:]
    if cfg.long_side:
        scale = scale * cfg.long_side / max(image.shape[1:])
    image, mask = T.resize(image, mask, [max(1, round(side * scale)) for side in size])
    crop = cfg.crop or image.shape[1:]
    if not labelled:
        mask = torch.zeros(image.shape[1:], dtype=torch.uint8)  # invented pixels become 255
        image, mask = rotate(image, mask, cfg.rotate, crop, rng)
    image, mask = T.random_crop(image, mask, crop, rng)
    if cfg.flip:
        image, mask = T.random_flip(image, mask, rng)
    if labelled:
        return rotate(image, mask, cfg.rotate, crop, rng)
    x_t = photometry(image, cfg.teacher_aug, rng)
    x_s = photometry(image, cfg.student_aug, rng)
    return (x_t, x_s, mask != T.IGNORE), None


def streams(data, labelled, unlabelled, step, cfg, ctx):
    """-> endless iterators, from this step on, of (images [B, 3, H, W], masks) and of views"""
    two_views = partial(augment, cfg, False)
    stream_l = Stream(data.train, labelled, partial(augment, cfg, True), cfg.seed, "labelled", True)
    stream_u = Stream(data.train, unlabelled, two_views, cfg.seed, "unlabelled", False)
    share = ctx.share(cfg.batch)
    batches_u = endless(stream_u, share, max(step - burn_in_end(cfg), 0), cfg.workers, ctx)
    return endless(stream_l, share, step, cfg.workers, ctx), batches_u


# ---------------------------------------------------------------------- evaluation

@torch.no_grad()
def predict(net, x, ctx):
    """Logits [B, C, H, W] of x at its own size"""
    with ctx.autocast():
        return net(x).float()


def evaluate(net, others, data, cfg, ctx):
    """Protocol: whole images, single scale, logits at image size, argmax; one confusion matrix over
    the split; 255 ignored; each image once. others: {column of log.csv: network}, scored as well.
    -> (ConfusionMatrix of net, {column: mIoU of the others}, rows of the panel)"""
    nets = dict(miou=net) | others
    for network in nets.values():
        network.eval()
    confusions = {name: ConfusionMatrix(len(data.classes), ctx.device) for name in nets}
    examples = Examples(len(data.val), ctx)
    for x, y in scored_batches(data, cfg, ctx):
        for name, network in nets.items():
            prediction = predict(network, x, ctx).argmax(1)
            confusions[name].update(prediction, y)
            if network is net:
                examples.add(x, y, prediction)
    for confusion in confusions.values():
        confusion.reduce()
    net.train()
    return confusions["miou"], {name: confusions[name].miou() for name in others}, examples.rows


# ---------------------------------------------------------------------- training (Sec. 3.1, Fig. 1)

def train(cfg):
    """Train, or resume, the run in cfg.out; ends with the `final:` line. -> mIoU, 0..1"""
    ctx = Runtime(cfg.device, cfg.precision)
    data = open_dataset(cfg.data, cfg.root, cfg.download)
    labelled, unlabelled = choose_labelled(data, cfg.labeled, cfg.split, cfg.seed)
    unlabelled = unlabelled or labelled  # all are labelled: consistency on all of them
    num_classes = len(data.classes)
    check_classes("skip-classes", cfg.skip_classes, data)
    cfg.groups = max(cfg.groups, ctx.world)
    groups = ctx.share(cfg.groups, "--groups")
    if cfg.mix == "intra" and cfg.batch // cfg.groups % 2:
        raise UserError("--mix intra needs an even number of labelled images in each of --groups")
    burn_in = burn_in_end(cfg)
    folder = RunFolder("c3_semiseg", cfg, ctx, data)
    data = cached(data, cfg.size if cfg.scales == (1, 1, 1) else None, cfg, ctx)

    torch.manual_seed(mix(cfg.seed, "init"))  # the same initial weights on every process
    student = Segmenter(cfg, num_classes)
    if folder.is_new:
        load_weights(student.net.body, cfg.backbone, cfg.weights, ctx.say)
    student = ctx.place(student)
    teacher = make_teacher(student).eval()
    thresholds = torch.full((num_classes,), 0.9, device=ctx.device)  # as the code
    optimizer = make_optimizer(student, cfg)
    step = folder.resume(cfg.batch, cfg.steps, net=student.net, student=student, teacher=teacher,
                         thresholds=thresholds, optimizer=optimizer, scaler=ctx.scaler)
    wrapped = ctx.wrap(student, cfg.compile)
    batches_l, batches_u = streams(data, labelled, unlabelled, step, cfg, ctx)
    folder.introduce(labelled, unlabelled, step, f"{cfg.steps} steps, {cfg.groups} groups")

    student.train()
    while step < cfg.steps:
        folder.stop_if_asked(step)
        if step > 0 and step % cfg.eval_every == 0:
            others = dict(miou_teacher=teacher.net) if step > burn_in else {}
            confusion, rest, examples = evaluate(student.net, others, data, cfg, ctx)
            folder.scored(step, confusion.miou(), examples, **rest)
        lr = cfg.lr * poly(step, cfg.steps)
        lambda_1 = consistency_weight(step, cfg)
        lambda_2 = cfg.lambda_2 * ramp("gaussian", step, cfg.contrast_ramp * cfg.steps)  # D4
        set_lr(optimizer, lr)
        if step == burn_in:
            folder.log.flush()  # the next row has more columns, and more images per second
        with folder.log.waiting():
            x_l, y_l = next(batches_l)
            if step >= burn_in:
                x_t, x_s, valid = next(batches_u)
                folder.log.images_per_step = 2 * cfg.batch
        optimizer.zero_grad()
        if step < burn_in:
            with ctx.autocast():
                logits_l, f_l = wrapped(x_l)
            loss_consist = 0.0
            terms = {}
            kinds = dict(labelled=(f_l, f_l, y_l, logits_l))  # keys have a gradient, too
        else:
            update_teacher(teacher, student, step - burn_in + 1, cfg)
            with torch.no_grad(), ctx.autocast():
                logits_t, keys_u = teacher(x_t)
                if cfg.keys == "teacher":
                    _, keys_l = teacher(x_l)
            q = logits_t.softmax(1)
            y_u, keep = confident_pixels(q, valid, thresholds, cfg, ctx)  # Eq. 6
            rng = ctx.random(cfg.seed, "cutmix", step)
            order = pairing(cfg.mix, groups, len(x_l) // groups, rng)
            box = boxes(len(x_l), x_s.shape[2:], rng) & (cfg.mix != "none")
            x_mix = swap(torch.cat([x_l, x_s])[order], box)  # Eq. 4
            with ctx.autocast():
                logits, f = wrapped(x_mix.contiguous(memory_format=torch.channels_last))
            back = order.argsort()  # the inverse of this order
            logits_l, logits_u = swap(logits, box)[back].chunk(2)
            f_l, f_u = swap(f, box)[back].chunk(2)
            loss_consist = consistency(logits_u, q, keep, groups, cfg.divide_by_classes)  # Eq. 2
            terms = dict(loss_consist=loss_consist, w_consist=lambda_1,
                         kept=keep.float().mean(), threshold=thresholds.mean())
            if cfg.keys == "student":
                keys_l = f_l.detach() if cfg.contrast == "both" else f_l  # D4
            kinds = dict(labelled=(f_l, keys_l, y_l, logits_l),
                         unlabelled=(f_u, keys_u, y_u, logits_u))
        loss_sup = cross_entropy(logits_l, y_l, groups)  # Eq. 1
        loss = loss_sup + lambda_1 * loss_consist
        if cfg.contrast != "none":
            loss_contrast = contrast(kinds, step, groups, cfg, ctx)  # Eq. 5
            loss = loss + lambda_2 * loss_contrast  # Eq. 7
            terms |= dict(loss_contrast=loss_contrast, w_contrast=lambda_2)
        ctx.scaler.scale(loss).backward()
        ctx.scaler.step(optimizer)
        ctx.scaler.update()
        step += 1
        folder.log.add(step, loss_sup=loss_sup, **terms, lr=lr)
        if step % cfg.save_every == 0 or step % cfg.eval_every == 0 or step == cfg.steps:
            folder.save(step)
    others = dict(miou_teacher=teacher.net) if step > burn_in else {}
    confusion, rest, examples = evaluate(student.net, others, data, cfg, ctx)
    folder.scored(step, confusion.miou(), examples, **rest)
    folder.finish(confusion)
    return confusion.miou()


def make_optimizer(student, cfg):
    """Adam without weight decay; two groups that hold every trained parameter once"""
    body = [p for p in student.net.body.parameters() if p.requires_grad]
    heads = [*student.net.head.parameters(), *student.projection.parameters()]
    groups = [dict(params=body, lr_mult=cfg.backbone_lr_mult), dict(params=heads, lr_mult=1.0)]
    return torch.optim.Adam(groups, cfg.lr, fused=True)


def confident_pixels(q, valid, thresholds, cfg, ctx):
    """DCRS: M = [confidence >= threshold of the predicted class], after Eq. 6 has moved the
    thresholds [C], in place, by the pixels of all processes.

    q [B, C, H, W]: the teacher's probabilities; valid bool [B, H, W]
    -> (predicted classes, 255 outside of M [B, H, W], M bool [B, H, W])
    """
    confidence, classes = q.max(1)
    keep = valid
    if cfg.dcrs < 1:
        all_confidence = ctx.gather(confidence.flatten())
        all_classes = ctx.gather(classes.masked_fill(~valid, T.IGNORE).byte().flatten())
        moved = class_thresholds(all_confidence, all_classes, thresholds, cfg.dcrs, cfg.dcrs_beta)
        thresholds.copy_(moved)
        keep = valid & (confidence >= thresholds[classes])
    return classes.masked_fill(~keep, T.IGNORE), keep


def contrast(kinds, step, groups, cfg, ctx):
    """L_contrast: mean over the groups of Eq. 5 over sampled pixels of both kinds of images.

    kinds: {labelled and, after the burn-in, unlabelled: (embeddings, their keys [B, D, h, w],
    classes [B, H, W], 255: not to be used, the student's logits [B, C, H, W])}
    """
    chosen = [kinds[name] for name in kinds if cfg.contrast in ("both", name)]
    if not chosen or ("unlabelled" not in kinds and not cfg.contrast_burn_in):  # in the burn-in
        return 0 * kinds["labelled"][0].float().sum()  # 0, but DDP needs a gradient of PROJ
    rng = ctx.random(cfg.seed, "views", step)
    samples = []
    for f, keys, classes, logits in chosen:
        for c in cfg.skip_classes:
            classes = classes.masked_fill(classes == c, T.IGNORE)
        u = rng.uniform(len(f), f[0, 0].numel())
        hard = cfg.sampling == "hard"
        samples.append(sample(f, keys, classes, logits, u, cfg.anchors, hard, groups))
    f, keys, classes, valid = (torch.cat(parts, 1) for parts in zip(*samples))  # D_L's, then D_U's
    return contrastive(f, keys, classes, valid, cfg.tau) * cfg.contrast_scale


# ---------------------------------------------------------------------- command line

def main(argv=None):
    cfg, given = parse(Config, PRESETS, argv, __doc__, RELEASED_SETTINGS)
    if not cfg.evaluate and not cfg.predict:
        settle(cfg, given)
        train(cfg)
        return
    ctx = Runtime(cfg.device, cfg.precision)
    path = cfg.evaluate or cfg.predict
    cfg, state = open_checkpoint("c3_semiseg", path, cfg, given, ctx, RELEASED, RELEASED_SETTINGS)
    net = load_network(Segmenter(cfg, len(state["classes"])).net, state, path, ctx.device)
    if cfg.evaluate:
        data = open_dataset(cfg.data, cfg.root)
        same_classes(data, state, path)
        confusion, _, _ = evaluate(net, {}, data, cfg, ctx)
        ctx.say(confusion.table(data.classes))
        ctx.say(f"{path} (step {state['step']}): mIoU {100 * confusion.miou():.1f} on "
                f"{len(data.val)} {data.scored_on} images, single scale")
    else:
        network = partial(predict, net.eval(), ctx=ctx)
        predict_folder(network, cfg, state["palette"], ctx)
    ctx.close()


if __name__ == "__main__":
    sys.exit(run(main))
