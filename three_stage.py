"""Three-Stage Self-Training for Semi-Supervised Semantic Segmentation (Ke, Aviles-Rivero, Pandey, Reddy, Schoenlieb)

A DeepLabv2 f is trained several times from the same pretrained weights. Stage 1 sees the labelled images L; its argmax
gives a pseudo-mask for every training image of L u U. Stage 2 adds consistency between f on a strongly augmented image
and f's EMA teacher on the weak one, and a second task: a branch g on f's shared layers predicts the pseudo-masks, so
that their errors shape the features and are never a target of f. Its teacher writes better masks, from which Stage 3
starts over with a branch that shares all but the classifier. Only f is kept. TIP 2022.

Map (paper -> this file)
  Eq. 1 L_con                    consistency               Sec. III-A A, B            strong, warp
  Eq. 2 L_seg, Eq. 3 L_pl        cross_entropy             Sec. III-A theta'          alpha, train_stage
  Eq. 4, 5 L^(2), L^(3)          train_stage, last lines   Sec. III-B y^ = argmax f   write_pseudo_masks
  Alg. 1                         train                     Sec. IV-B batches, lambda  balance, PRESETS
  Tables I, VII f, g^, g~        Segmenter, Branch         Sec. IV-A mIoU             evaluate
  Table II, III, IV              PRESETS, --weights        Fig. 2 curves              two columns of log.csv
  Table V CR, T2, SA, N2         --lambda-con 0, --lambda-pl 0, --no-strong, --branch-stage3 ghat
  Table VI EMA                   --ema 0                   Fig. 3 lambda, Fig. 4, 5   --lambda-con, stage_panel

Deviations (paper / authors' code / here, and why)
  D1  Sub-batch sizes: L u U 1, L 4 or 9 / labelled 1, mixed 4 or 9 / as code: else there is almost no consistency.
  D2  Target of L_con: the teacher's output / its argmax / argmax, --con-target soft. No threshold, no ramp anywhere.
  D3  Evaluated, and writer of the masks: student / EMA teacher (Stage 1: student), last weights / as code; both logged.
  D4  EMA: decay not given / 0.99, .995 at 20k, .9975 at 40k, .999 at 50k of 60k steps / the same shares of --steps.
  D5  lr: 3e-5 / backbone 0.1 of it, but repeated updates make it .1 (conv1), .3, .4 (shortcuts) / these: --lr-groups.
  D6  Stage 1: 60k steps / 20k of batch 4 (Cityscapes), 10k (VOC) / those steps of --batch; --stage1-share 1 is 60k.
  D7  ASPP: four rates / the first two, by mistake / four, --aspp-rates 6,12. Outputs of g: C / C + 1 / C.
  D8  A: RandAugment, Cutout / 14 operations of random level, 3 cutouts, on the normalised crop's min-max range / the
      same on RGB (--aug-space minmax). Fill: - / grey, then altered by later operations / grey to the end.
  D9  B: - / image and labels warped by separate calls, up to 0.3 % of the pixels apart / one index map for all.
  D10 Ignored: - / in both losses what A moves in from outside; in L_pl padding and Cityscapes' ego vehicle (a drawn
      mask) / the same, the latter as the pixels that are void in every labelled mask (--static-void). Pixels under
      cutouts count, --ignore-cut; padding counts in L_con, --con-ignore-padding.
  D11 From scratch (--weights none) frozen BN and N(0, 0.01) cannot train: BN then learns (--bn), the EMA covers its
      statistics, conv6 starts as torchvision's ResNets do, and every layer has the same lr.
  D12 Stride of conv3: - / on the first 1x1 / as code, although torchvision's weights had it on the 3x3: --stride-on.
  D13 VOC's scales: random / {0.5, .., 1.5}, window resized / same set, image resized, then cropped.
  D14 Baseline (--supervised): not described / absent / Stage 1, for as many steps as all stages together.
  D15 Labels: the first of a stored permutation of all images / same / a seeded draw, theirs with --split. On VOC write
      1/100, 1/50, 1/20 or 1/8: a bare count is drawn from VOC's own train list, as other papers do.
  D16 Cityscapes at 512x1024: - / mean and majority of 2x2 pixels, also at validation / antialiased and nearest pixel.

Commands
  python three_stage.py                                             first run: shapes, all stages, on a CPU in minutes
  python three_stage.py --supervised                                its baseline; the same command again resumes a run
  python three_stage.py --data voc --root data --labeled 1/50       Table III, 212 labels
  python three_stage.py --data voc --labeled 1/50 --weights resnet101COCO-41f33a49.pth --input-scale caffe  Table IV
  torchrun --nproc_per_node=2 three_stage.py --data voc --labeled 1/50      the same on 2 GPUs, 5 images each
  python three_stage.py --data voc --labeled 1/50 --stages 4        a run of 3 stages goes on with a fourth
  python three_stage.py --evaluate runs/.../last.pt                 or --predict runs/.../last.pt --images photos/
"""
import copy
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from common import checkpoint
from common import transforms as T
from common.backbones import ASPP, RESNETS, DeepLabV2, hold_bn, load_weights, upsample
from common.datasets import DATASETS, choose_labelled, open_dataset
from common.inference import predict_folder
from common.log import Log
from common.miou import ConfusionMatrix
from common.pictures import prediction_panel, save_mask
from common.runtime import Runtime, mix
from common.schedules import update_ema
from common.settings import Size, UserError, from_dict, keep_config, option, parse, run
from common.streams import Scored, Stream, endless, once, to_device

BALANCE = {  # Sec. IV-B, from this many labels on: (labels, labelled images of a minibatch, lambda_1 = lambda_2)
    "cityscapes": ((100, 1, 1 / 2), (1488, 3, 1 / 2)),
    "voc": ((106, 1, 1 / 4), (529, 1, 5 / 4), (1323, 2, 5 / 8))}
LR_GROUPS = {  # learning rates of conv1, the other backbone layers, and their shortcuts, as shares of --lr (D5)
    "released": (0.1, 0.3, 0.4), "nominal": (0.1, 0.1, 0.1), "literal": (1.0, 1.0, 1.0)}
ALPHA = ((1 / 3, 0.99), (2 / 3, 0.995), (5 / 6, 0.9975), (math.inf, 0.999))  # D4: until this share of a stage's steps
GREY = 127  # what A fills in


# ------------------------------------------------------------------------------------------------ settings

@dataclass
class Config:
    data: str = option("shapes", "dataset", DATASETS, group="run")
    root: str = option("data", "folder of the data: the dataset's own or its parent")
    download: bool = option(False, "let torchvision download the data (voc)")
    labeled: str = option("all", "labelled images: a count (212), a fraction (1/8) or all")
    split: str = option("", "file that lists the labelled images, instead of a seeded draw")
    seed: int = option(0, "seed of the draw, the initialisation and the augmentation", within=(0, None))
    supervised: bool = option(False, "the baseline: labelled images only, same network, all stages' steps together")
    stages: int = option(3, "number of stages; a finished run can be continued with more", within=(1, None))
    steps: int = option(60000, "training steps of each stage (Sec. IV-B)", within=(1, None))
    stage1_share: float = option(1.0, "length of Stage 1 as a share of them")
    masks: str = option("", "folder of pseudo-masks (runs/.../stage2/pseudo): run the last stage alone, with them")
    check_masks: bool = option(True, "print the mIoU of the pseudo-masks on hidden labels, which nothing else reads")
    out: str = option("", "run folder [runs/three_stage-<data>-<labeled>-seed<k>]; the same command resumes the run")
    evaluate: str = option("", "score this checkpoint and exit")
    predict: str = option("", "write palette PNGs of --images with this checkpoint and exit")
    images: str = option("", "folder of images for --predict")

    size: Size | None = option(None, "resize every image to this size", group="images")
    scale: tuple[float, float] = option((1.0, 1.0), "range of random rescaling, in steps of 0.1 (Sec. IV-B)",
                                        within=(0.01, None))
    crop: Size | None = option(None, "random crop")
    flip: bool = option(True, "random horizontal flip")
    shift: int = option(0, "random shift of up to this many pixels", within=(0, None))
    static_void: bool = option(False, "ignore in L_pl what is void in every labelled mask (Cityscapes: the car itself)")
    eval_size: str = option("full", "score at the original size (full) or at --size (train)", ("full", "train"))

    strong: bool = option(True, "strong augmentation A, B; off: both are the identity (Table V)", group="augmentation")
    draws: int = option(3, "operations drawn per image, each carried out with probability 1/2", within=(0, None))
    cutouts: int = option(3, "number of cutouts", within=(0, None))
    cutout: int = option(32, "side of a cutout in pixels", within=(0, None))
    aug_space: str = option("rgb", "where A works: on RGB, or on the normalised crop's range (released code)",
                            ("rgb", "minmax"))

    backbone: str = option("resnet101", "body of f (Sec. IV-B)", RESNETS, group="network")
    backbone_layers: int = option(4, "keep only the first 2 or 3 layers of the ResNet, for small images", (2, 3, 4))
    aspp_rates: tuple[int, ...] = option((6, 12, 18, 24), "dilations of the classifiers; released code 6,12", within=(1, None))
    weights: str = option("imagenet", "pretrained weights: imagenet (torchvision), none, or a state-dict file")
    input_scale: str = option("imagenet", "their input: of unit variance, or 0..255 less the mean, RGB or BGR",
                              ("imagenet", "caffe", "caffe_bgr"))
    bn: str | None = option(None, "batch normalisation [frozen; learn with --weights none]",
                            ("frozen", "affine", "learn"))
    stride_on: str = option("1x1", "which convolution of a bottleneck has conv3's stride", ("1x1", "3x3"))
    branch_stage3: str = option("gtilde", "branch from Stage 3 on; ghat is Stage 2's (Table V, N2)", ("gtilde", "ghat"))

    lambda_con: float | None = option(None, "lambda_1, weight of L_con [by dataset and labels, else 1/2]; 0: without",
                                      group="self-training")
    lambda_pl: float | None = option(None, "lambda_2, weight of L_pl [likewise]; 0: without g")
    con_target: str = option("hard", "target of L_con: the teacher's argmax or its probabilities", ("hard", "soft"))
    con_ignore_padding: bool = option(False, "leave padding out of L_con")
    ignore_cut: bool = option(False, "leave the pixels under cutouts out of L_con and L_pl")
    ema: float | None = option(None, "decay of the teacher [0.99 to 0.999 in four steps]; 0: no EMA (Table VI)", within=(0, 1))

    batch: int = option(10, "images per step over all processes, labelled ones included", group="optimisation",
                       within=(1, None))
    batch_l: int | None = option(None, "labelled ones among them from Stage 2 on [by dataset and labels, else 1]",
                                within=(1, None))
    lr: float = option(3e-5, "learning rate of the new layers, constant (Adam)", within=(0, None))
    lr_groups: str | None = option(None, "share of the backbone: released (.1 .3 .4), nominal (.1) or literal (1) "
                                         "[released; literal with --weights none]", tuple(LR_GROUPS))
    weight_decay: float = option(0.0, "on every parameter", within=(0, None))

    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"), group="machine")
    precision: str = option("auto", "auto is bf16 (fp16 on old GPUs) on CUDA and fp32 on CPU",
                            ("auto", "fp32", "bf16", "fp16"))
    compile: bool = option(False, "torch.compile the networks")
    workers: int = option(4, "processes that decode and augment, and threads that write masks", within=(0, None))
    eval_every: int = option(1000, "steps between evaluations", within=(1, None))
    save_every: int = option(500, "steps between checkpoints", within=(1, None))
    log_every: int = option(20, "steps between log lines", within=(1, None))


PRESETS = {
    "shapes": dict(labeled="40", steps=420, stage1_share=0.38, batch=12, batch_l=6, shift=6, cutout=16,
                   backbone="resnet18", backbone_layers=2, aspp_rates=(1, 3, 6), weights="none", lr=1.5e-3, ema=0.98,
                   lambda_con=0.25, lambda_pl=1.0, workers=0, eval_every=210, save_every=105),
    "voc": dict(labeled="1/50", stage1_share=1 / 6, scale=(0.5, 1.5), crop=(321, 321)),
    "cityscapes": dict(labeled="100", stage1_share=1 / 3, batch=5, size=(512, 1024), crop=(256, 512), static_void=True,
                       eval_size="train"),
    "camvid": dict(labeled="100", steps=10000, stage1_share=1 / 3, batch=5, size=(360, 480), crop=(256, 384),
                   eval_size="train"),
    "pcontext": dict(labeled="1/8", stage1_share=1 / 6, scale=(0.5, 1.5), crop=(321, 321), lambda_con=0.25,
                     lambda_pl=0.25),
    "bdd100k": dict(labeled="1/8", stage1_share=1 / 3, batch=5, size=(360, 640), crop=(256, 512), eval_size="train"),
    "folder": dict(steps=20000, stage1_share=1 / 3, scale=(0.5, 1.5), crop=(321, 321)),
}
PRESETS["pcontext59"] = PRESETS["pcontext"]
PRESETS |= dict.fromkeys(("sunrgbd", "sunrgbd13"), PRESETS["folder"] | dict(labeled="1/8"))  # not in the paper
FREE = ("root", "download", "check_masks", "out", "evaluate", "predict", "images", "device", "workers", "compile",
        "eval_every", "save_every", "log_every")  # may differ between a run and its resumption


def balance(data, labels):
    """Sec. IV-B: (labelled images of a minibatch, lambda_1 = lambda_2) for a dataset and a number of labels"""
    rows = BALANCE.get(data, ((0, 1, 1 / 2),))
    return max((row for row in rows if row[0] <= labels), default=rows[0])[1:]


# ------------------------------------------------------------------------------------------------ model (Table VII)

class Segmenter(DeepLabV2):
    """f: conv1 .. conv5 (`body`) and ASPP_1 (`head`). Images come normalised as torchvision does; --input-scale caffe
    turns them back into RGB (or BGR) in 0..255 less the mean, which is what the COCO weights expect."""

    def __init__(self, cfg, num_classes):
        super().__init__(num_classes, cfg.backbone, cfg.backbone_layers, cfg.aspp_rates, cfg.stride_on, cfg.bn)
        self.input_scale = cfg.input_scale
        mean, std = (255 * torch.tensor(v)[:, None, None] for v in (T.IMAGENET_MEAN, T.IMAGENET_STD))
        self.register_buffer("scale", std, persistent=False)
        self.register_buffer("offset", mean - torch.tensor((122.67891434, 116.66876762, 104.00698793))[:, None, None],
                             persistent=False)

    def features(self, x):
        """[B, 3, H, W] -> outputs of the last but one block and of the last one (conv4 and conv5)"""
        if self.input_scale != "imagenet":
            x = x * self.scale + self.offset
            x = x.flip(1) if self.input_scale == "caffe_bgr" else x
        *first, last = self.body.children()
        for part in first:
            x = part(x)
        return x, last(x)

    def forward(self, x):
        """[B, 3, H, W] -> logits [B, C, H, W]"""
        return upsample(self.head(self.features(x)[1]), x.shape[2:])


class Branch(nn.Module):
    """What g does not share with f. ghat: conv6, i.e. conv5 at half its width, on conv4's output, and ASPP_2.
    gtilde: ASPP_3 on conv5's output. C outputs."""

    def __init__(self, kind, body, cfg, num_classes):
        super().__init__()
        last = list(body.children())[-1]
        self.conv6 = half_width(last, cfg.bn) if kind == "ghat" else None
        self.aspp = ASPP(body.out_channels // (2 if kind == "ghat" else 1), num_classes, cfg.aspp_rates)

    def forward(self, z4, z5, size):
        """outputs of conv4 and conv5 -> logits [B, C, *size]"""
        return upsample(self.aspp(z5 if self.conv6 is None else self.conv6(z4)), size)


def half_width(layer, bn):
    """A ResNet layer like `layer` (blocks, stride, dilation), but of half its width; the first block has a shortcut"""
    kind, shortcut = type(layer[0]), layer[0].downsample[0]
    inside, outside, stride = shortcut.in_channels, shortcut.out_channels // 2, shortcut.stride
    down = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
    planes = outside // kind.expansion
    blocks = [kind(inside, planes, stride[0], down)] + [kind(outside, planes) for _ in layer[1:]]
    dilation = next(m.dilation for m in reversed(list(layer.modules())) if getattr(m, "kernel_size", 0) == (3, 3))
    for conv in (m for block in blocks for m in block.modules() if isinstance(m, nn.Conv2d)):
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = dilation
        if bn == "frozen":
            nn.init.normal_(conv.weight, std=0.01)
        else:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(*blocks)


class MultiTask(nn.Module):
    """f, and from Stage 2 on the branch g: one trunk, computed once."""

    def __init__(self, cfg, num_classes, stage):
        super().__init__()
        torch.manual_seed(mix(cfg.seed, "init"))  # f starts the same in every stage and on every process
        self.f, self.bn, self.branch = Segmenter(cfg, num_classes), cfg.bn, None
        if stage > 1 and cfg.lambda_pl > 0:
            torch.manual_seed(mix(cfg.seed, "branch", stage))
            self.branch = Branch("ghat" if stage == 2 else cfg.branch_stage3, self.f.body, cfg, num_classes)
        hold_bn(self, self.bn)

    def forward(self, x, branch=True):
        """[B, 3, H, W] -> logits of f and of g (None without a branch), each [B, C, H, W]"""
        z4, z5 = self.f.features(x)
        logits = upsample(self.f.head(z5), x.shape[2:])
        return logits, self.branch(z4, z5, x.shape[2:]) if branch and self.branch else None

    def train(self, mode=True):
        super().train(mode)
        hold_bn(self, self.bn)
        return self


def load_pretrained(f, cfg, say):
    """--weights into f: the body, and of a file also the classifier where its shapes fit (COCO weights for VOC)"""
    load_weights(f.body, cfg.backbone, cfg.weights, say)
    if cfg.weights in ("none", "imagenet"):
        return
    state, own, restored = checkpoint.load(cfg.weights), f.state_dict(), {}
    state = next((state[k] for k in ("state_dict", "model", "net") if isinstance(state.get(k), dict)), state)
    for name, tensor in state.items():
        if found := re.search(r"(?:layer5\.conv2d_list|head\.branches)\.(\d+)\.(weight|bias)$", name):
            mine = f"head.branches.{found[1]}.{found[2]}"
            if mine in own and own[mine].shape == tensor.shape:
                restored[mine] = tensor
    f.load_state_dict(restored, strict=False)
    say(f"classifier: {', '.join(restored) + ' restored' if restored else 'nothing to restore, random'}")


# ------------------------------------------------------------------------------------------------ A and B (Sec. III-A)
# A: strong(image) -> (Ax, I). I [H, W] holds for every pixel the place it comes from, y * W + x, or -1 for outside.
# B: warp(mask, I). Image, teacher's output and pseudo-mask are gathered with this one map.

def enhance(level):
    """factor of Pillow's enhancers: 0.28, 0.46, .., 1.72; level 5 changes nothing"""
    return 0.1 + 0.18 * level


PHOTOMETRIC = {  # (image uint8 [3, H, W], level 1..9) -> image
    "identity": lambda x, m: x,
    "auto_contrast": lambda x, m: tvf.autocontrast(x),
    "equalize": lambda x, m: tvf.equalize(x),
    "solarize": lambda x, m: tvf.solarize(x, (231, 205, 180, 154, 128, 103, 77, 52, 26)[m - 1]),
    "posterize": lambda x, m: tvf.posterize(x, (4, 4, 3, 3, 2, 2, 2, 1, 1)[m - 1]),
    "color": lambda x, m: tvf.adjust_saturation(x, enhance(m)),
    "contrast": lambda x, m: tvf.adjust_contrast(x, enhance(m)),
    "brightness": lambda x, m: tvf.adjust_brightness(x, enhance(m)),
    "sharpness": lambda x, m: tvf.adjust_sharpness(x, enhance(m))}
GEOMETRIC = {"rotate": 3, "shear_x": 0.03, "shear_y": 0.03, "translate_x": 1, "translate_y": 1}  # a level's amount
OPERATIONS = (*PHOTOMETRIC, *GEOMETRIC)


def source_map(name, amount, height, width):
    """I of one geometric operation: int64 [H, W]. The pixel with centre (u, v) takes the pixel that holds its source
    (a u + b v + c, d u + e v + f), as Pillow's nearest-neighbour transforms do. amount: degrees, slope or pixels."""
    u, v = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    match name:
        case "rotate":
            cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
            u, v = u - width / 2, v - height / 2
            x, y = cos * u - sin * v + width / 2, sin * u + cos * v + height / 2
        case "shear_x": x, y = u + amount * v, v
        case "shear_y": x, y = u, amount * u + v
        case "translate_x": x, y = u + amount, v
        case "translate_y": x, y = u, v + amount
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return torch.from_numpy(np.where(inside, np.floor(y) * width + np.floor(x), -1).astype(np.int64))


def warp(x, index, outside):
    """B: gather x [.., H, W] at the places I [.., H, W] (broadcast to x's shape), `outside` where I is -1"""
    index = index.expand(x.shape)
    taken = x.flatten(-2).gather(-1, index.flatten(-2).clamp(min=0).long()).view(x.shape)
    return torch.where(index < 0, outside, taken)


def draw_operations(rng, draws):
    """RandAugment: [(name, level 1..9, sign)] of the drawn operations that are carried out (each with p = 1/2)"""
    names, levels = rng.integers(len(OPERATIONS), size=draws), rng.integers(1, 10, size=draws)
    signs, fires = 1 - 2 * rng.integers(2, size=draws), rng.random(draws) < 0.5
    return [(OPERATIONS[k], int(m), int(s)) for k, m, s, fire in zip(names, levels, signs, fires) if fire]


def strong(image, rng, cfg):
    """A: uint8 [3, H, W] -> (Ax uint8 [3, H, W], I int32 [H, W]). The operations run in the order drawn, each on the
    result of those before it; cutouts touch the image only; what comes from outside the image ends up grey."""
    height, width = image.shape[1:]
    index = torch.arange(height * width).view(height, width)
    for name, level, sign in draw_operations(rng, cfg.draws):
        if name in PHOTOMETRIC:
            image = PHOTOMETRIC[name](image, level)
        else:
            source = source_map(name, sign * level * GEOMETRIC[name], height, width)
            image, index = warp(image, source, GREY), warp(index, source, -1)
    hidden = index < 0
    for y, x in zip(rng.integers(height, size=cfg.cutouts), rng.integers(width, size=cfg.cutouts)):
        top, left = y - cfg.cutout // 2, x - cfg.cutout // 2
        hidden[max(top, 0):top + cfg.cutout, max(left, 0):left + cfg.cutout] = True
    image = torch.where(hidden, GREY, image)
    return image, (torch.where(hidden, -1, index) if cfg.ignore_cut else index).int()


# ------------------------------------------------------------------------------------------------ losses and schedule

def cross_entropy(logits, y, ctx):
    """Eq. 2, 3: mean over valid pixels of -log p_y. logits [B, C, H, W]; y [B, H, W], ids or 255 = ignored -> scalar.

    L_seg: f on the labelled images against the truth. L_pl: g on all images against B(pseudo-masks), pooled.
    """
    total = F.cross_entropy(logits.float(), y.long(), ignore_index=T.IGNORE, reduction="sum")
    return ctx.global_mean(total, (y != T.IGNORE).sum())


def consistency(logits, teacher, index, ctx, target="hard", ignore=None):
    """Eq. 1: L_con = mean over pixels with a source of d_c(f(Ax), B f'(x)), d_c the cross entropy.

    logits: f(Ax), teacher: f'(x), each [B, C, H, W]; index: I [B, H, W]; ignore: bool [B, H, W], pixels of x to leave
    out. hard: the target is B argmax f'(x); soft: B softmax f'(x). The teacher is a constant.
    """
    t = teacher.detach().argmax(1)
    t = warp(t if ignore is None else t.masked_fill(ignore, T.IGNORE), index, T.IGNORE)
    if target == "hard":
        return cross_entropy(logits, t, ctx)
    p, valid = warp(teacher.detach().float().softmax(1), index[:, None], 0.0), t != T.IGNORE
    loss = -(p * logits.float().log_softmax(1)).sum(1)
    return ctx.global_mean((loss * valid).sum(), valid.sum())


def alpha(step, cfg):
    """Decay of theta' <- alpha theta' + (1 - alpha) theta after this step of a stage (D4), or --ema"""
    return cfg.ema if cfg.ema is not None else next(a for until, a in ALPHA if step < until * cfg.steps)


# ------------------------------------------------------------------------------------------------ data (Sec. IV-A, IV-B)

def weak(image, maps, rng, cfg):
    """Scale, shift, crop, flip. image uint8 [3, H, W], maps uint8 [K, H, W] (nearest neighbour; 255 in padding) ->
    (image, maps, padding bool [H, W])"""
    maps = torch.cat([maps, torch.zeros_like(maps[:1])])  # 255 in the last one will be padding
    low, high = (round(10 * s) for s in cfg.scale)
    s = int(rng.integers(low, high + 1)) / 10
    image, maps = T.resize(image, maps, [max(1, round(side * s)) for side in image.shape[1:]])
    crop = cfg.crop or tuple(image.shape[1:])
    dy, dx = (max(c - side, 0) for c, side in zip(crop, image.shape[1:]))
    edges = [dx // 2 + cfg.shift, dy // 2 + cfg.shift, dx - dx // 2 + cfg.shift, dy - dy // 2 + cfg.shift]
    if any(edges):
        image = tvf.pad(image, edges, fill=[round(255 * m) for m in T.IMAGENET_MEAN])
        maps = tvf.pad(maps, edges, fill=T.IGNORE)
    image, maps = T.random_crop(image, maps, crop, rng)
    if cfg.flip:
        image, maps = T.random_flip(image, maps, rng)
    return image, maps[:-1], maps[-1] == T.IGNORE


def normalise(image, padding=None):
    """uint8 [3, H, W] -> float32; padding is exactly 0, which no pixel of an image is in all three channels"""
    image = T.normalise(image)
    return image if padding is None else image.masked_fill(padding, 0.0)


class Weak:
    """Transform of the labelled images of Stage 1 and of the baseline: (image, mask, rng) -> (x, y)."""

    def __init__(self, cfg):
        self.cfg = cfg

    def __call__(self, image, mask, rng):
        image, mask = T.to_tensors(image, mask)
        if self.cfg.size:
            image, mask = T.resize(image, mask, self.cfg.size)
        image, (mask,), padding = weak(image, mask[None], rng, self.cfg)
        return normalise(image, padding), mask


class Minibatches(Dataset):
    """Stages 2, 3, ..: position p is image p mod n of minibatch p div n, of which the first --batch-l are labelled and
    the others are drawn from all training images; two independent, endlessly reshuffled streams.

    A sample is (x weak, x strong, I, y, pseudo-mask). Labelled: both views are the same and I is the identity. Others:
    y is 255 everywhere, because their masks stay closed. masks: folder of pseudo-masks, or None for 255.
    """

    def __init__(self, data, labelled, masks, stage, cfg):
        split, self.num_classes, self.masks, self.cfg = data.train, len(data.classes), masks, cfg
        self.split = split
        self.static = static_void(split, labelled, cfg.size) if cfg.static_void and masks else None
        self.labelled = Stream(split, labelled, None, cfg.seed, f"labelled stage{stage}", True)
        self.mixed = Stream(split, range(len(split)), None, cfg.seed, f"mixed stage{stage}", False)

    def __getitem__(self, position):
        cfg, (step, slot) = self.cfg, divmod(position, self.cfg.batch)
        is_labelled = slot < cfg.batch_l
        stream = self.labelled if is_labelled else self.mixed
        place = step * cfg.batch_l + slot if is_labelled else step * (cfg.batch - cfg.batch_l) + slot - cfg.batch_l
        i, rng = stream.index(place), np.random.default_rng(mix(cfg.seed, stream.name, "sample", place))
        image, y = T.to_tensors(self.split.image(i), self.split.mask(i) if is_labelled else None)
        if cfg.size:
            image, y = T.resize(image, y, cfg.size)
        void = torch.full(image.shape[1:], T.IGNORE, dtype=torch.uint8)
        pseudo = read_mask(mask_path(self.masks, self.split, i), void.shape, self.num_classes) if self.masks else void
        if self.static is not None and self.static.shape == void.shape:
            pseudo = pseudo.masked_fill(self.static, T.IGNORE)
        image, (y, pseudo), padding = weak(image, torch.stack([void if y is None else y, pseudo]), rng, cfg)
        x = x_s = normalise(image, padding)
        index = torch.arange(y.numel(), dtype=torch.int32).view(y.shape)
        if cfg.strong and not is_labelled:
            if cfg.aug_space == "rgb":
                image, index = strong(image, rng, cfg)
                x_s = normalise(image)
            else:  # D8
                low, high = x.min(), x.max()
                image, index = strong(((x - low) / (high - low).clamp(min=1e-6) * 255).byte(), rng, cfg)
                x_s = image.float() / 255 * (high - low) + low
        return x, x_s, index, y, pseudo


def mask_path(folder, split, i):
    return Path(folder) / f"{split.keys[i]}.png"


def read_mask(path, shape, num_classes):
    """A pseudo-mask, uint8 tensor [H, W]. UserError if it is not there, not of this shape or not of these classes."""
    try:
        with Image.open(path) as picture:
            mask = np.array(picture)
    except (OSError, SyntaxError) as error:  # Pillow's errors for missing and damaged files
        raise UserError(f"{path}: cannot be read as a pseudo-mask ({error}), one for each training image") from error
    if mask.shape != shape or mask.dtype != np.uint8 or ((mask >= num_classes) & (mask != T.IGNORE)).any():
        raise UserError(f"{path}: expected a pseudo-mask of 8-bit ids 0..{num_classes - 1} with (height, width) = "
                        f"{tuple(shape)}, found {mask.dtype} {mask.shape} up to {mask.max()}")
    return torch.from_numpy(mask)


def resize_mask(mask, size):
    """[H, W] -> `size` by the nearest pixel, or as it is without a size"""
    return tvf.resize(mask[None], list(size), InterpolationMode.NEAREST_EXACT)[0] if size else mask


def static_void(split, labelled, size):
    """bool [H, W]: pixels that are void in every labelled mask (of the first 100), or None where sizes differ"""
    masks = [resize_mask(torch.from_numpy(split.mask(i)), size) for i in labelled[:100]]
    return None if len({m.shape for m in masks}) > 1 else torch.stack([m == T.IGNORE for m in masks]).all(0)


# ------------------------------------------------------------------------------------------------ evaluation (Sec. IV-A)

@torch.no_grad()
def predict(f, x, ctx):
    """Logits [B, C, H, W] of x at its own size: one scale, no flip, no CRF"""
    with ctx.autocast():
        return f(x).float()


def evaluate(logits_of, names, data, cfg, ctx):
    """Protocol: whole images, single scale, logits at image size, argmax; one confusion matrix over the split; 255
    ignored; each image is scored exactly once, on one process. logits_of: x -> logits for each of `names`.
    -> {name: ConfusionMatrix}"""
    confusions, size = {name: ConfusionMatrix(len(data.classes), ctx.device) for name in names}, scoring_size(cfg)
    batch = cfg.batch if size or data.name == "shapes" else 1  # images of one size are batched
    for x, y in once(Scored(data.val, T.ForScoring(size), ctx), batch, cfg.workers, ctx):
        for confusion, logits in zip(confusions.values(), logits_of(x), strict=True):
            confusion.update(logits.argmax(1), y)
    for confusion in confusions.values():
        confusion.reduce()
    return confusions


def scoring_size(cfg):
    """Size at which images are scored; None: each at its own"""
    if cfg.eval_size == "train" and not cfg.size:
        raise UserError("--eval-size train scores at --size, which is not set here: give --size, or --eval-size full")
    return cfg.size if cfg.eval_size == "train" else None


# ------------------------------------------------------------------------------------------------ pseudo-masks (Sec. III-B)

def write_pseudo_masks(f, data, folder, cfg, ctx):
    """y^_i = argmax f(x_i) for all i in L u U: palette PNGs at the size of training (--size, else the image's own).

    Images go through f in fixed chunks, those of one size together. Chunks do not depend on what is there already, so
    a writer that was killed goes on to the very same files. Threads read and write.
    """
    def load(i):
        image, _ = T.to_tensors(data.train.image(i))
        return normalise(T.resize(image, None, cfg.size)[0] if cfg.size else image)

    paths, jobs = [mask_path(folder, data.train, i) for i in range(len(data.train))], []
    for parent in {path.parent for path in paths}:
        parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max(1, cfg.workers)) as pool:
        for first in range(ctx.rank * cfg.batch, len(paths), ctx.world * cfg.batch):
            groups, chunk = {}, range(first, min(first + cfg.batch, len(paths)))
            if all(paths[i].exists() for i in chunk):
                continue
            for i, x in zip(chunk, pool.map(load, chunk)):
                groups.setdefault(x.shape, []).append((paths[i], x))
            for group in groups.values():
                x = to_device(torch.stack([x for _, x in group]), ctx.device)
                ids = predict(f, x, ctx).argmax(1).byte().cpu().numpy()
                for job in jobs:
                    job.result()  # raises what went wrong in its thread
                jobs = [pool.submit(save_mask, mask, data.palette, path) for (path, _), mask in zip(group, ids)]
        for job in jobs:
            job.result()
    ctx.barrier()


def mask_quality(data, unlabelled, folder, cfg, ctx):
    """mIoU of the pseudo-masks on the unlabelled images' hidden labels, or None where there are none: a diagnosis that
    is printed. Nothing else ever reads these labels."""
    def load(i):
        truth = resize_mask(torch.from_numpy(data.train.mask(i)), cfg.size)
        return read_mask(mask_path(folder, data.train, i), truth.shape, len(data.classes)), truth

    hidden = [i for i in unlabelled if data.train.has_mask(i)]
    confusion, mine = ConfusionMatrix(len(data.classes), ctx.device), hidden[ctx.rank::ctx.world]
    with ThreadPoolExecutor(max(1, cfg.workers)) as pool:
        for first in range(0, len(mine), 64):
            for pseudo, truth in pool.map(load, mine[first:first + 64]):
                confusion.update(pseudo.to(ctx.device), truth.to(ctx.device))
    confusion.reduce()
    return confusion.miou() if hidden else None


# ------------------------------------------------------------------------------------------------ training (Algorithm 1)

def train(cfg):
    """Train, or resume, the run in cfg.out, stage by stage; ends with the `final:` line. -> final mIoU, 0..1"""
    ctx = Runtime(cfg.device, cfg.precision)
    cfg.precision = ctx.precision  # config.json has what `auto` came to: a resumption must not change it
    data = open_dataset(cfg.data, cfg.root, cfg.download)
    labelled, unlabelled = choose_labelled(data, cfg.labeled, cfg.split, cfg.seed)
    batch_l, weight = balance(cfg.data, len(labelled))
    cfg.batch_l = batch_l if cfg.batch_l is None else cfg.batch_l
    cfg.lambda_con, cfg.lambda_pl = (weight if v is None else v for v in (cfg.lambda_con, cfg.lambda_pl))
    if not 1 <= cfg.batch_l < cfg.batch and not cfg.supervised:
        raise UserError(f"--batch {cfg.batch} --batch-l {cfg.batch_l}: expected at least one labelled image among the "
                        f"images of a step, and at least one other")
    folder, lengths = Path(cfg.out), [max(1, round(cfg.stage1_share * cfg.steps)), *[cfg.steps] * (cfg.stages - 1)]
    if cfg.supervised:
        lengths = [sum(lengths)]
    elif cfg.masks:
        lengths[:-1] = [0] * (cfg.stages - 1)
    if (folder / f"stage{cfg.stages + 1}").exists():
        raise UserError(f"--stages {cfg.stages}: {folder} holds a run of more stages; repeat its command, or choose "
                        f"another folder with --out")
    say = partial(print, flush=True) if ctx.main else lambda _: None
    if cfg.masks and cfg.lambda_pl > 0:
        missing = [path for i in range(len(data.train)) if not (path := mask_path(cfg.masks, data.train, i)).exists()]
        if missing:
            raise UserError(f"--masks {cfg.masks}: {len(missing)} of {len(data.train)} training images have no pseudo-mask "
                            f"there, such as {missing[0]}")
    if ctx.main:
        folder.mkdir(parents=True, exist_ok=True)
        keep_config(folder, cfg, FREE if cfg.supervised or cfg.masks else (*FREE, "stages"))
    ctx.barrier()
    say(f"{ctx}; {cfg.data}: {len(labelled)} labelled and {len(unlabelled)} unlabelled images, {len(data.val)} to "
        f"score ({data.scored_on}); {' + '.join(map(str, filter(None, lengths)))} steps")
    for note in data.notes:
        say(note)
    ctx.catch_sigterm()

    scores = []
    for stage in range(cfg.stages if cfg.masks else 1, len(lengths)):
        place = folder / f"stage{stage}"
        if not (place / "finished.pt").exists():
            f, confusion, _ = train_stage(stage, lengths, data, labelled, folder, cfg, ctx)
            if ctx.stopping():
                say(f"SIGTERM: stage {stage} is trained; the same command writes its pseudo-masks and goes on")
                raise SystemExit(143)
            ctx.catch_sigterm(False)  # the masks that are written stay, and the others follow
            write_pseudo_masks(f, data, place / "pseudo", cfg, ctx)
            quality = mask_quality(data, unlabelled, place / "pseudo", cfg, ctx) if cfg.check_masks else None
            if ctx.main:
                checkpoint.save(place / "finished.pt", dict(miou=confusion.miou(), quality=quality))
            del f  # it would stay on the device
            ctx.catch_sigterm()
            ctx.barrier()
        state = checkpoint.load(place / "finished.pt")
        scores.append(f"S{stage} {100 * state['miou']:.1f}")
        say(f"stage {stage} is finished: mIoU {100 * state['miou']:.1f}; pseudo-masks in {place / 'pseudo'}"
            + ("" if state["quality"] is None else f", mIoU {100 * state['quality']:.1f} on hidden labels"))
    _, confusion, best = train_stage(len(lengths), lengths, data, labelled, folder, cfg, ctx)
    say(confusion.table(data.classes))
    if scores:
        say(f"mIoU of the stages: {', '.join(scores)}, S{cfg.stages} {100 * confusion.miou():.1f}")
    say(f"final: mIoU {100 * confusion.miou():.1f} (best {best}) {folder}")
    ctx.close()
    return confusion.miou()


def train_stage(stage, lengths, data, labelled, folder, cfg, ctx):
    """A stage, from the pretrained weights to its last step. lengths: steps of every stage.
    -> (f as it is scored, its ConfusionMatrix, "mIoU at step n" of the best evaluation)"""
    steps, done, is_last = lengths[stage - 1], sum(lengths[:stage - 1]), stage == len(lengths)
    place, share, num_classes = folder / f"stage{stage}", ctx.share(cfg.batch), len(data.classes)
    place.mkdir(exist_ok=True)
    net = MultiTask(cfg, num_classes, stage)
    resumed = (place / "last.pt").exists()
    if not resumed:
        load_pretrained(net.f, cfg, print if ctx.main else lambda _: None)
    net = ctx.synchronise_bn(net).to(ctx.device, memory_format=torch.channels_last)
    teacher = copy.deepcopy(net).requires_grad_(False).eval() if stage > 1 else None
    optimizer = make_optimizer(net, cfg)
    ctx.new_scaler()
    holders = dict(student=net, optimizer=optimizer, scaler=ctx.scaler) | (dict(teacher=teacher) if teacher else {})
    step, best, best_step = 0, 0.0, 0
    if resumed:
        state = checkpoint.load(place / "last.pt", ctx.device)
        step, best, best_step = state["step"] - done, state["best"], state["best_step"]
        for name, holder in holders.items():
            holder.load_state_dict(state[name])
        del state  # it would stay on the device
    about = dict(script="three_stage", config=asdict(cfg), classes=list(data.classes),
                 palette=torch.from_numpy(data.palette), stage=stage)
    wrapped, judge = ctx.wrap(net), teacher or net  # judge: the network that is scored and that writes the masks (D3)
    if cfg.compile:
        net.compile()
        if teacher:
            teacher.compile()

    if stage == 1:
        stream = Stream(data.train, labelled, Weak(cfg), cfg.seed, "labelled stage1", True)
    else:
        masks = Path(cfg.masks or folder / f"stage{stage - 1}/pseudo") if cfg.lambda_pl > 0 else None
        stream = Minibatches(data, labelled, masks, stage, cfg)
    batches = endless(stream, share, step, cfg.workers, ctx)
    rows_l = min(max(cfg.batch_l - ctx.rank * share, 0), share)  # the labelled images among this process's share
    log = Log(folder, sum(lengths), cfg.log_every, done + step, cfg.batch, ctx.device, ctx.main, ctx.mean)
    log.say(f"{'baseline' if cfg.supervised else f'stage {stage}'}: {steps} steps"
            + (f", resumed at {step}" if step else ""))

    def save(path, **state):
        log.flush()  # stops the run here if a loss was not finite, the last good checkpoint kept
        if ctx.main:
            checkpoint.save(path, about | dict(net=judge.f.state_dict(), step=done + step) | state)

    def save_all():
        save(place / "last.pt", best=best, best_step=best_step, **{name: h.state_dict() for name, h in holders.items()})

    @torch.no_grad()
    def all_logits(x):
        with ctx.autocast():
            logits = [z for z in judge(x) if z is not None]
            return logits + ([net(x, branch=False)[0]] if teacher else [])

    def score():
        nonlocal best, best_step
        net.eval()
        names = ["miou", *["miou_branch"] * (net.branch is not None), *["miou_student"] * (teacher is not None)]
        confusions = evaluate(all_logits, names, data, cfg, ctx)
        confusion = confusions["miou"]
        if confusion.miou() > best:
            best, best_step = confusion.miou(), done + step
            save(place / "best.pt", miou=best)
        log.evaluated(done + step, **{name: c.miou() for name, c in confusions.items()}, best=best)
        if ctx.main:
            stage_panel(judge.f, stage, data, folder, cfg, ctx)
            log.curves()
        net.train()
        return confusion

    net.train()
    while step < steps and not ctx.stopping(due=step % cfg.log_every == 0):
        with log.waiting():
            batch = next(batches)
        optimizer.zero_grad()
        if stage == 1:
            x, y = batch
            with ctx.autocast():
                logits, _ = wrapped(x)
            loss = cross_entropy(logits, y, ctx)  # Eq. 2
            terms = dict(loss_seg=loss.detach())
        else:
            x_w, x_s, index, y, pseudo = batch  # labelled images first: their two views are equal
            if cfg.lambda_con > 0:
                with torch.no_grad(), ctx.autocast():
                    logits_t, _ = teacher(x_w, branch=False)
            with ctx.autocast():
                logits, logits_g = wrapped(x_s)
            loss = loss_seg = cross_entropy(logits[:rows_l], y[:rows_l], ctx)  # Eq. 2
            terms = dict(loss_seg=loss_seg.detach())
            if cfg.lambda_con > 0:
                padding = (x_w == 0).all(1) if cfg.con_ignore_padding else None
                loss_con = consistency(logits, logits_t, index, ctx, cfg.con_target, padding)  # Eq. 1
                loss, terms = loss + cfg.lambda_con * loss_con, terms | dict(loss_con=loss_con.detach())
            if cfg.lambda_pl > 0:
                loss_pl = cross_entropy(logits_g, warp(pseudo, index, T.IGNORE), ctx)  # Eq. 3
                loss, terms = loss + cfg.lambda_pl * loss_pl, terms | dict(loss_pl=loss_pl.detach())
        ctx.scaler.scale(loss).backward()  # Eq. 4, 5: L = L_seg + lambda_1 L_con + lambda_2 L_pl
        ctx.scaler.step(optimizer)
        ctx.scaler.update()
        if teacher:
            update_ema(teacher, net, alpha(step, cfg), buffers="ema")
        step += 1
        log.add(done + step, stage=stage, **terms, lr=cfg.lr)
        if step % cfg.eval_every == 0 and step < steps:
            score()
        if step % cfg.save_every == 0 or step == steps:
            save_all()
    if step < steps:
        save_all()
        log.say(f"SIGTERM: saved at step {step} of stage {stage}; the same command resumes")
        raise SystemExit(143)
    confusion = score()
    if is_last:  # the run's result, without the state of the training
        save(folder / "last.pt", miou=confusion.miou())
        if ctx.main and (place / "best.pt").exists():
            checkpoint.save(folder / "best.pt", checkpoint.load(place / "best.pt"))
    log.close()
    return judge.f.eval(), confusion, f"{100 * best:.1f} at step {best_step}"


def make_optimizer(net, cfg):
    """Adam; every trainable parameter once: conv1, the rest of the backbone and its shortcuts at their shares of --lr
    (D5), ASPP_1 and the branch at --lr"""
    conv1, body, shortcut = LR_GROUPS[cfg.lr_groups]
    groups = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            first = name.startswith(("f.body.conv1", "f.body.bn1"))
            share = conv1 if first else shortcut if "downsample" in name else body
            groups.setdefault(share if name.startswith("f.body") else 1.0, []).append(parameter)
    groups = [dict(params=parameters, lr=share * cfg.lr) for share, parameters in groups.items()]
    return torch.optim.Adam(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def stage_panel(f, stage, data, folder, cfg, ctx):
    """Fig. 4, 5: predictions.png with the columns image | Stage 1 | .. | this stage | truth for six scored images.

    A stage's predictions are kept in its folder as panel.pt, for the panels of later stages."""
    chosen = np.linspace(0, len(data.val) - 1, min(6, len(data.val))).astype(int)
    samples = [T.ForScoring(scoring_size(cfg))(data.val.image(i), data.val.mask(i)) for i in chosen]
    found = [predict(f, to_device(x[None], ctx.device), ctx).argmax(1)[0].byte().cpu() for x, _ in samples]
    checkpoint.save(folder / f"stage{stage}/panel.pt", dict(predictions=found))
    earlier = [(k, folder / f"stage{k}/panel.pt") for k in range(1, stage + 1)]
    columns = {f"Stage {k}": checkpoint.load(path)["predictions"] for k, path in earlier if path.exists()}
    rows = [(T.denormalise(x), *(column[row].numpy() for column in columns.values()), y.numpy())
            for row, (x, y) in enumerate(samples)]
    prediction_panel(rows, data.palette, data.classes, ("image", *columns, "truth")).save(folder / "predictions.png")


# ------------------------------------------------------------------------------------------------ command line

def load_segmenter(path, given, ctx):
    """-> (f, cfg, state) from a checkpoint, with the flags that make sense for inference on top of its config"""
    state = checkpoint.load(path, ctx.device)
    if not isinstance(state, dict) or state.get("script") != "three_stage":
        raise UserError(f"{path} is not a checkpoint of this script: expected a file such as runs/.../last.pt")
    useless = sorted(set(given) - {*FREE, "data", "size", "eval_size", "batch", "precision"})
    if useless:
        raise UserError(f"--{useless[0].replace('_', '-')} has no effect on a trained network; {path} brings its own "
                        f"settings")
    cfg = from_dict(Config, state["config"], given)
    f = Segmenter(cfg, len(state["classes"])).to(ctx.device, memory_format=torch.channels_last)
    f.load_state_dict(state["net"])
    return f.eval(), cfg, state


def score_checkpoint(cfg, given):
    """--evaluate: per-class table and mIoU of a checkpoint on the scored split"""
    ctx = Runtime(cfg.device, cfg.precision)
    f, cfg, state = load_segmenter(cfg.evaluate, given, ctx)
    data = open_dataset(cfg.data, cfg.root, cfg.download)
    if list(data.classes) != state["classes"]:
        raise UserError(f"{cfg.evaluate} was trained on {len(state['classes'])} classes "
                        f"({', '.join(state['classes'][:3])}, ..), but --data {cfg.data} has {len(data.classes)} others"
                        f": evaluate it on the dataset it was trained on")
    confusion = evaluate(lambda x: [predict(f, x, ctx)], ["miou"], data, cfg, ctx)["miou"]
    if ctx.main:
        print(confusion.table(data.classes))
        print(f"{cfg.evaluate} (stage {state['stage']}, step {state['step']}): mIoU {100 * confusion.miou():.1f} on "
              f"{len(data.val)} {data.scored_on} images, single scale")
    ctx.close()


def predict_images(cfg, given):
    """--predict: a palette PNG of class ids, at the image's own size, for every image of a folder"""
    ctx = Runtime(cfg.device, cfg.precision)
    f, cfg, state = load_segmenter(cfg.predict, given, ctx)
    out = given.get("out") or Path(cfg.predict).parent / "predictions"
    count = predict_folder(partial(predict, f, ctx=ctx), cfg.images, out, state["palette"], scoring_size(cfg),
                           ctx.device)
    print(f"{count} predictions in {out}")


def main(argv=None):
    cfg, given = parse(Config, PRESETS, argv, __doc__.partition("\n\n")[0])
    if cfg.evaluate:
        return score_checkpoint(cfg, given)
    if cfg.predict:
        return predict_images(cfg, given)
    if cfg.supervised and "masks" in given:
        raise UserError("--supervised uses no pseudo-masks, so --masks has no meaning with it: drop one of the two")
    if cfg.stage1_share <= 0:
        raise UserError(f"--stage1-share {cfg.stage1_share}: expected a share above 0")
    scoring_size(cfg)  # a mistake in it is told now, not after the first steps
    if cfg.scale[0] != cfg.scale[1] and not cfg.crop:
        raise UserError("--scale gives images of many sizes, of which no minibatch can be made: give a --crop with it")
    if cfg.masks and cfg.stages < 2:
        raise UserError("--masks starts the last stage with pseudo-masks, but Stage 1 needs none: give --stages 2 or 3")
    scratch = cfg.weights == "none"
    cfg.bn = cfg.bn or ("learn" if scratch else "frozen")
    cfg.lr_groups = cfg.lr_groups or ("literal" if scratch else "released")
    labels = Path(cfg.split).stem if cfg.split else cfg.labeled.replace("/", "_")
    kind = "supervised" if cfg.supervised else f"stage{cfg.stages}" if cfg.masks else ""
    cfg.out = cfg.out or f"runs/three_stage-{cfg.data}-{labels}-seed{cfg.seed}" + (f"-{kind}" if kind else "")
    train(cfg)


if __name__ == "__main__":
    sys.exit(run(main))
