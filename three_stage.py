"""Three-Stage: A Three-Stage Self-Training Framework for Semi-Supervised Semantic Segmentation
(Ke, Aviles-Rivero, Pandey, Reddy, Schoenlieb; IEEE TIP 2022)

A DeepLabv2 f is trained several times from the same pretrained weights. Stage 1 sees the labelled
images L; its argmax gives a pseudo-mask for every image of L u U. Stage 2 adds consistency between
f on a strongly augmented image and f's EMA teacher on the weak one, and a second task: a branch g
on f's shared layers predicts the pseudo-masks, so that their errors never become a target of f. The
teacher of Stage 2 writes better masks for Stage 3, whose g shares all but the classifier with f.
Only f is kept.

Map (paper -> this file)
  Eq. 1 L_con                 consistency            Sec. III-A A, B (common/) strong, warp
  Eq. 2 L_seg, Eq. 3 L_pl     cross_entropy          Sec. III-A EMA theta'     alpha
  Eq. 4, 5 L^(2), L^(3)       train_stage            Sec. III-B y^ = argmax f  write_pseudo_masks
  Algorithm 1                 train                  Sec. IV-A mIoU            evaluate
  Table I, VII f, g^, g~      Segmenter, Branch      Sec. IV-B minibatches     Minibatches, BALANCE
  Table II, III, IV           PRESETS, --weights     Fig. 2 curves             log.csv
  Table V CR, T2, SA, N2      --lambda-con 0, --lambda-pl 0, --no-strong, --branch-stage3 ghat
  Table VI EMA                --ema 0                Fig. 4, 5             stage*/predictions.png
  Fig. 3 lambda_1 = lambda_2  --lambda-con and --lambda-pl

Deviations: what the paper says, what the authors' code does (--released), what we do, and why
  D1  In the paper Sub-batch 1 (from L u U) has 1 to 3 images of a minibatch, Sub-batch 2 (from L)
      the others. In the code it is the other way round, as here: else there would be almost no
      consistency.
  D2  The paper leaves open whether L_con's target is hard. The code and we take the teacher's
      argmax, without threshold or ramp; --con-target soft takes its probabilities.
  D3  Algorithm 1 scores the student and writes the masks with it (--writer student). The code takes
      the EMA teacher (Stage 1: the student), as here, but scores its best epoch, we its last step.
      The other network's scores are logged, too.
  D4  The paper gives no EMA decay. The code's is 0.99, then 0.995, 0.9975 and 0.999 from 20k, 40k
      and 50k of 60k steps on; ours changes at the same shares of --steps.
  D5  The paper's learning rate is 3e-5. The code gives the backbone a tenth of it, but updates its
      shortcuts 4 times a step, and its other layers but conv1 3 times. Here the backbone is updated
      once, with .1 (conv1), .4 (shortcuts) or .3 (the rest) of --lr: --lr-groups.
  D6  Every stage of the paper has 60k steps. The code's Stage 1 has 20k (Cityscapes, of 4 images)
      or 10k (VOC), and so has ours, of --batch images; --stage1-share 1 is the paper's.
  D7  The paper's ASPP has four rates, and ours; the code adds up the first two only, by mistake:
      --aspp-rates 6,12. The code's g has C + 1 outputs, the paper's and ours C.
  D8  The paper only cites RandAugment and Cutout. Ours are the code's, but they work on RGB (not on
      the normalised crop), always fill with grey, and move an image and its masks by one map.
  D9  L_con and L_pl ignore what A moves in from outside; L_pl also padding and Cityscapes' ego
      vehicle (the code: a fixed mask; here: void in every labelled mask). Cutouts are not ignored.
  D10 From scratch (--weights none) frozen BN and N(0, 0.01) cannot train: BN learns (--bn), the
      teacher averages its statistics, conv6 starts as torchvision's ResNets do, and all layers have
      one learning rate.
  D11 The stride of conv3 is on the first 1x1 convolution, as in the code, although torchvision's
      weights were trained with it on the 3x3: --stride-on.
  D12 The baseline (--supervised) is Stage 1, as in the code, but with the steps of all stages.
  D13 Labels are drawn by --seed; the authors' are the first of a stored permutation: --split. On
      VOC write 1/100, 1/50, 1/20 or 1/8: a bare count is drawn from VOC's own train list.

Commands
  python three_stage.py                                       first run: shapes, on a CPU in minutes
  python three_stage.py --supervised                          its baseline; run it again to resume
  python three_stage.py --data voc --download --labeled 1/50  the paper's Table III, 212 labels
  torchrun --nproc_per_node=2 three_stage.py --data voc       the same on 2 GPUs, 5 images each
  python three_stage.py --evaluate runs/.../last.pt           score a checkpoint
  python three_stage.py --evaluate model_best.pth --data cityscapes    score the authors' checkpoint
  python three_stage.py --predict runs/.../last.pt --images photos/                     palette PNGs
"""
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tvf

from common import checkpoint
from common import transforms as T
from common.backbones import ASPP, INPUT_SCALES, DeepLabV2, hold_bn, upsample
from common.cache import cached
from common.checkpoint import load_network, open_checkpoint, same_classes
from common.command_line import check_needs, parse, run, run_name
from common.datasets import DATASETS, choose_labelled, open_dataset
from common.datasets.pseudo import mask_path, read_mask
from common.inference import Examples, predict_folder, scored_batches
from common.miou import ConfusionMatrix
from common.pictures import save_mask
from common.randaugment import strong, warp
from common.random import mix
from common.run_folder import RunFolder
from common.runtime import Runtime
from common.schedules import make_teacher, update_ema
from common.settings import ANY, RESNETS, BaseConfig, UserError, flag, option
from common.streams import Stream, endless, to_device
from common.weights import load_weights, read_weights

BALANCE = {  # Sec. IV-B: (from this many labels on, labelled images of a minibatch, both lambdas)
    "cityscapes": ((0, 1, 1 / 2), (1448, 3, 1 / 2)),  # 1448 in the text, 1488 in Table II
    "voc": ((0, 1, 1 / 4), (529, 1, 5 / 4), (1323, 2, 5 / 8))}
LR_GROUPS = {  # shares of --lr: conv1, the other layers of the backbone, their shortcuts (D5)
    "released": (0.1, 0.3, 0.4),  # what the repeated updates of the code amount to
    "nominal": (0.1, 0.1, 0.1),  # what the code means to do
    "literal": (1.0, 1.0, 1.0)}  # the paper's one learning rate
SEMI = dict(supervised=False)  # what a flag needs to have an effect


# ---------------------------------------------------------------------- settings

@dataclass
class Config(BaseConfig):
    data: str = option("shapes", "dataset", DATASETS, group="run", scoring=True)
    steps: int = option(60000, "training steps of each stage (Sec. IV-B)", within=(1, None))
    flip: bool = option(True, "random horizontal flip")
    backbone: str = option("resnet101", "body of f (Sec. IV-B)", RESNETS)

    stages: int = option(3, "number of stages; a finished run can be continued with more",
                         within=(1, 100), group="self-training", needs=SEMI, free=True)
    stage1_share: float = option(1.0, "length of Stage 1 as a share of --steps (D6)",
                                 within=(0.001, 100), needs=dict(masks=""))
    masks: str = option("", "train only the last of --stages, on the pseudo-masks of this folder",
                        needs=SEMI | dict(stages=tuple(range(2, 101))))
    lambda_con: float | None = option(None, "lambda_1, weight of L_con [Sec. IV-B, else 1/2]",
                                      within=(0, 1e6), needs=SEMI)
    lambda_pl: float | None = option(None, "lambda_2, weight of L_pl [Sec. IV-B, else 1/2]",
                                     within=(0, 1e6), needs=SEMI)
    con_target: str = option("hard", "target of L_con (D2)", ("hard", "soft"), needs=SEMI)
    ema: float | None = option(None, "decay of the teacher [0.99 to 0.999, D4]; 0: none (Table VI)",
                               within=(0, 1), needs=SEMI)
    branch_stage3: str = option("gtilde", "branch of Stage 3 on; ghat: Stage 2's (Table V, no N2)",
                                ("gtilde", "ghat"), needs=SEMI | dict(stages=tuple(range(3, 101))))
    writer: str = option("teacher", "who is scored and writes masks; Algorithm 1: student (D3)",
                         ("teacher", "student"), needs=SEMI)

    scale: tuple[float, float] = option((1.0, 1.0), "range of random rescaling, in steps of 0.1",
                                        within=(0.1, 100), group="images")
    shift: int = option(0, "random shift of up to this many pixels", within=(0, 10000))
    static_void: bool = option(False, "ignore in L_pl what is void in every labelled mask (D9)",
                               needs=SEMI | dict(size=ANY))
    strong: bool = option(True, "strong augmentation A, B (Table V, SA)", needs=SEMI)
    cutout: int = option(32, "side of a cutout in pixels", within=(0, 10000),
                         needs=SEMI | dict(strong=True))

    aspp_rates: tuple[int, ...] = option((6, 12, 18, 24), "dilations of the classifiers (D7)",
                                         within=(1, 1000), group="network")
    input_scale: str = option("imagenet", "what --weights expect; caffe: 0..255 less the mean; "
                              "bgr: 0..1 less the mean, blue first", tuple(INPUT_SCALES))
    bn: str | None = option(None, "batch normalisation [frozen; learn with --weights none]",
                            ("frozen", "learn"))
    stride_on: str = option("1x1", "convolution that has conv3's stride (D11)", ("1x1", "3x3"))

    batch: int = option(10, "images per step over all processes, labelled ones included",
                        within=(1, 100000), group="optimisation", scoring=True)
    batch_l: int | None = option(None, "labelled images in a batch, Stage 2 on [Sec. IV-B, else 1]",
                                 within=(1, 100000), needs=SEMI)
    lr: float = option(3e-5, "learning rate of the new layers, constant (Adam)", within=(0, 1000))
    lr_groups: str | None = option(None, "backbone's shares of --lr (D5): released .1 to .4, "
                                   "nominal .1, literal 1 [released; literal from scratch]",
                                   tuple(LR_GROUPS))


PRESETS = {
    "shapes": dict(labeled="40", steps=420, stage1_share=0.38, batch=12, batch_l=6, shift=6,
                   cutout=16, backbone="resnet18", backbone_layers=2, aspp_rates=(1, 3, 6),
                   weights="none", lr=1.5e-3, ema=0.98, lambda_con=0.25, lambda_pl=1.0, workers=0,
                   eval_every=210, save_every=105),
    "voc": dict(labeled="1/50", stage1_share=1 / 6, scale=(0.5, 1.5), crop=(321, 321)),
    "cityscapes": dict(labeled="100", stage1_share=1 / 3, batch=5, size=(512, 1024),
                       crop=(256, 512), static_void=True, eval_size="train"),
    "camvid": dict(labeled="100", steps=10000, stage1_share=1 / 3, batch=5, size=(360, 480),
                   crop=(256, 384), eval_size="train"),
    "folder": dict(steps=20000, stage1_share=1 / 3, scale=(0.5, 1.5), crop=(321, 321)),
}
PRESETS |= dict.fromkeys(("pcontext", "pcontext59", "bdd100k", "sunrgbd", "sunrgbd13"),
                         PRESETS["folder"] | dict(labeled="1/8"))  # not in the paper


RELEASED_SETTINGS = {"all": dict(aspp_rates=(6, 12), lr_groups="released")}  # D5, D7
RELEASED = (dict(names={  # files of the authors' code
    r"layer5\.conv2d_list\.([01])": r"head.branches.\1", "layer5|layer4_2": None,  # D7; no g
    r"(conv1|bn1|layer\d)\.": r"body.\1."}, classes="head.branches.0.weight",
    settings=dict(bn="frozen", stride_on="1x1")),)


def settle(cfg, given):
    """Fill in what one setting decides about others. Raises UserError for contradictions."""
    check_needs(given, cfg)
    for name, weight in (("con_target", "lambda_con"), ("static_void", "lambda_pl"),
                         ("branch_stage3", "lambda_pl")):
        if name in given and getattr(cfg, weight) == 0:
            raise UserError(f"{flag(name)} has no effect with {flag(weight)} 0: drop one of them")
    if any(round(10 * s, 6) % 1 for s in cfg.scale):
        raise UserError(f"--scale {cfg.scale[0]} {cfg.scale[1]}: expected multiples of 0.1")
    scratch = cfg.weights == "none"
    if cfg.bn is None:
        cfg.bn = "learn" if scratch else "frozen"
    if cfg.lr_groups is None:
        cfg.lr_groups = "literal" if scratch else "released"
    cfg.out = cfg.out or run_name("three_stage", cfg, given)


def balance(cfg, labels):
    """Sec. IV-B: fill in --batch-l and the lambdas by the dataset and the number of labels."""
    rows = BALANCE.get(cfg.data, ((0, 1, 1 / 2),))
    _, batch_l, weight = [row for row in rows if row[0] <= labels][-1]
    for name, value in dict(batch_l=batch_l, lambda_con=weight, lambda_pl=weight).items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    if cfg.batch_l >= cfg.batch and cfg.stages > 1 and not cfg.supervised:
        raise UserError(f"--batch {cfg.batch} --batch-l {cfg.batch_l}: expected at least one image "
                        f"beside the labelled ones")


# ---------------------------------------------------------------------- model (Table I, VII)

class Segmenter(DeepLabV2):
    """f: conv1 .. conv5 (`body`) and ASPP_1 (`head`). Images come normalised as torchvision does;
    --input-scale caffe turns them back into 0..255 less the mean, for the COCO weights."""

    def __init__(self, cfg, num_classes):
        super().__init__(num_classes, cfg.backbone, cfg.backbone_layers, cfg.aspp_rates,
                         cfg.stride_on, cfg.bn, cfg.input_scale)

    def features(self, x):
        """[B, 3, H, W] -> outputs of the last but one layer and of the last one (conv4, conv5)"""
        *first, last = self.body.children()
        for part in first:
            x = part(x)
        return x, last(x)


class Branch(nn.Module):
    """What g does not share with f. ghat: conv6, which is conv5 at half its width, on the output of
    conv4, and ASPP_2. gtilde: ASPP_3 on the output of conv5."""

    def __init__(self, kind, body, cfg, num_classes):
        super().__init__()
        self.conv6 = None
        channels = body.out_channels
        if kind == "ghat":
            self.conv6 = half_width(list(body.children())[-1], cfg.bn)
            channels = channels // 2
        self.aspp = ASPP(channels, num_classes, cfg.aspp_rates)

    def forward(self, z4, z5, size):
        """outputs of conv4 and conv5 -> logits [B, C, *size]"""
        z = z5 if self.conv6 is None else self.conv6(z4)
        return upsample(self.aspp(z), size)


def half_width(layer, bn):
    """A ResNet layer like this one (blocks, stride, dilation), but of half its width"""
    block = type(layer[0])
    shortcut = layer[0].downsample[0]
    in_channels = shortcut.in_channels
    out_channels = shortcut.out_channels // 2
    down = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, shortcut.stride, bias=False),
                         nn.BatchNorm2d(out_channels))
    planes = out_channels // block.expansion
    first = block(in_channels, planes, shortcut.stride[0], down)
    half = nn.Sequential(first, *[block(out_channels, planes) for _ in layer[1:]])
    dilation = layer[-1].conv2.dilation  # conv2 is a 3x3 convolution in both kinds of blocks
    for conv in (m for m in half.modules() if isinstance(m, nn.Conv2d)):
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = dilation
        if bn == "frozen":
            nn.init.normal_(conv.weight, std=0.01)
        else:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return half


class MultiTask(nn.Module):
    """f, and from Stage 2 on the branch g: one trunk, computed once."""

    def __init__(self, cfg, num_classes, stage):
        super().__init__()
        self.bn = cfg.bn
        self.branch = None
        torch.manual_seed(mix(cfg.seed, "init"))  # f starts alike in every stage and process
        self.f = Segmenter(cfg, num_classes)
        if stage > 1 and cfg.lambda_pl > 0:
            torch.manual_seed(mix(cfg.seed, "branch", stage))
            kind = "ghat" if stage == 2 else cfg.branch_stage3
            self.branch = Branch(kind, self.f.body, cfg, num_classes)
        hold_bn(self, self.bn)

    def forward(self, x, branch=True):
        """[B, 3, H, W] -> logits of f and of g (None without a branch), each [B, C, H, W]"""
        z4, z5 = self.f.features(x)
        logits = upsample(self.f.head(z5), x.shape[2:])
        if not branch or self.branch is None:
            return logits, None
        return logits, self.branch(z4, z5, x.shape[2:])

    def train(self, mode=True):
        super().train(mode)
        hold_bn(self, self.bn)
        return self


def load_pretrained(f, cfg, say):
    """--weights into f: the body, and of a file also the classifier where it fits (COCO for VOC)"""
    load_weights(f.body, cfg.backbone, cfg.weights, say)
    if cfg.weights in ("none", "imagenet"):
        return
    own = f.head.state_dict()
    fits = {}
    for name, tensor in read_weights(cfg.weights).items():
        ours = name.replace("layer5.conv2d_list.", "branches.")  # the COCO file's name for it
        if ours in own and own[ours].shape == tensor.shape:
            fits[ours] = tensor
    f.head.load_state_dict(fits, strict=False)
    say(f"classifier: {', '.join(fits) or 'nothing'} restored")


# ---------------------------------------------------------------------- losses and ramps

def cross_entropy(logits, y, count=None):
    """Eq. 2, 3: mean over valid pixels of H(y, softmax(logits)). logits [B, C, H, W] -> scalar

    L_seg: f on labelled images, y the truth. L_pl: g on all images, y the warped pseudo-masks.
    y [B, H, W], 255 ignored. count: the number to divide by (with several processes, their mean
    number of valid pixels); None: y's own. 0 with a graph if all is ignored.
    """
    total = F.cross_entropy(logits.float(), y, ignore_index=255, reduction="sum")
    if count is None:
        count = (y != 255).sum().clamp(min=1)
    return total / count


def consistency(logits, teacher_logits, index, count=None, target="hard"):
    """Eq. 1: L_con = mean over pixels with a source of H(B f'(x), f(Ax)) -> scalar

    logits: f(Ax), teacher_logits: f'(x), a constant, both [B, C, H, W]. index: I [B, H, W], for a
    pixel of Ax its place row * W + column in x, or -1 if it comes from outside. target: the argmax
    (hard) or the softmax (soft) of f'(x). count: the number to divide by; None: the number of
    pixels with a source.
    """
    if count is None:
        count = (index >= 0).sum().clamp(min=1)
    if target == "hard":
        labels = warp(teacher_logits.argmax(1), index, 255)
        return F.cross_entropy(logits.float(), labels, ignore_index=255, reduction="sum") / count
    q = warp(teacher_logits.detach().float().softmax(1), index[:, None], 0.0)
    return -(q * logits.float().log_softmax(1)).sum() / count


def alpha(step, steps, fixed=None):
    """Decay of theta' <- alpha theta' + (1 - alpha) theta after this step of a stage: `fixed`, or
    0.99, then 0.995, 0.9975 and 0.999 from 1/3, 2/3 and 5/6 of its steps on (D4)"""
    if fixed is not None:
        return fixed
    schedule = ((0, 0.99), (1 / 3, 0.995), (2 / 3, 0.9975), (5 / 6, 0.999))  # from this share on
    return [decay for share, decay in schedule if step >= steps * share][-1]


# ---------------------------------------------------------------------- data (Sec. IV-A, IV-B)

def weak(image, maps, rng, scale=(1, 1), crop=None, shift=0, flip=True):
    """Scale, shift, crop, flip. image uint8 [3, H, W], maps uint8 [K, H, W] (nearest neighbour; 255
    in padding) -> (image, maps)"""
    low, high = (round(10 * s) for s in scale)
    s = int(rng.integers(low, high + 1)) / 10
    image, maps = T.resize(image, maps, [max(1, round(side * s)) for side in image.shape[1:]])
    crop = crop or tuple(image.shape[1:])
    dy, dx = (max(c - side, 0) for c, side in zip(crop, image.shape[1:]))
    edges = [dx // 2 + shift, dy // 2 + shift, dx - dx // 2 + shift, dy - dy // 2 + shift]
    image = tvf.pad(image, edges, fill=T.MEAN_COLOUR)
    maps = tvf.pad(maps, edges, fill=T.IGNORE)
    image, maps = T.random_crop(image, maps, crop, rng)
    return T.random_flip(image, maps, rng) if flip else (image, maps)


class Minibatches(Dataset):
    """Position p is image p mod n of minibatch p div n, n = --batch. Its first `batch_l` images are
    labelled (in Stage 1 all), the others come from all training images: two independent streams.

    A sample is (x weak, x strong, I, y, pseudo-mask). Labelled: both views are the same and I is
    the identity. Others: y is 255, because their masks stay closed. masks: a folder, or None: 255.
    """

    def __init__(self, data, labelled, batch_l, masks, stage, cfg):
        self.data = data
        self.batch_l = batch_l
        self.masks = masks
        self.cfg = cfg
        every = range(len(data.train))
        self.labelled = Stream(data.train, labelled, None, cfg.seed, f"labelled stage{stage}", True)
        self.mixed = Stream(data.train, every, None, cfg.seed, f"mixed stage{stage}", False)
        self.static = None
        if masks and cfg.static_void:  # void in all labelled masks, of which 100 are looked at (D9)
            truths = [T.for_scoring(data.train.image(i), data.train.mask(i), cfg.size)[1]
                      for i in labelled[:100]]
            self.static = (torch.stack(truths) == T.IGNORE).all(0)

    def __getitem__(self, position):
        cfg = self.cfg
        split = self.data.train
        step, slot = divmod(position, cfg.batch)
        is_labelled = slot < self.batch_l
        if is_labelled:
            stream = self.labelled
            place = step * self.batch_l + slot
        else:
            stream = self.mixed
            place = step * (cfg.batch - self.batch_l) + slot - self.batch_l
        i = stream.index(place)
        rng = np.random.default_rng(mix(cfg.seed, stream.name, "sample", place))
        image, y = T.to_tensors(split.image(i), split.mask(i) if is_labelled else None)
        if cfg.size:
            image, y = T.resize(image, y, cfg.size)
        void = torch.full(image.shape[1:], T.IGNORE, dtype=torch.uint8)
        y = y if is_labelled else void
        pseudo = void
        if self.masks:
            pseudo = read_mask(mask_path(self.masks, split, i), y.shape, len(self.data.classes))
        if self.static is not None:
            pseudo = pseudo.masked_fill(self.static, T.IGNORE)
        image, maps = weak(image, torch.stack([y, pseudo]), rng, cfg.scale, cfg.crop, cfg.shift,
                           cfg.flip)
        x_s = image
        index = torch.arange(maps[0].numel(), dtype=torch.int32).view(maps[0].shape)
        if cfg.strong and not is_labelled:
            x_s, index = strong(image, rng, cfg.cutout)
        return image, x_s, index, *maps


# ---------------------------------------------------------------------- evaluation (Sec. IV-A)

@torch.no_grad()
def predict(f, x, ctx):
    """Logits [B, C, H, W] of x at its own size: single scale, no flip, no CRF"""
    with ctx.autocast():
        return f(x).float()


@torch.no_grad()
def evaluate(net, others, data, cfg, ctx):
    """Protocol: whole images, single scale, logits at image size, argmax; one confusion matrix over
    the split; 255 ignored; each image once. Scored are f and g of `net`, and f of the `others`,
    {column of log.csv: network}.
    -> (ConfusionMatrix of f, {column: mIoU of the rest}, rows of the panel)"""
    for network in (net, *others.values()):
        network.eval()
    names = ["miou", *others] if net.branch is None else ["miou", "miou_branch", *others]
    confusions = {name: ConfusionMatrix(len(data.classes), ctx.device) for name in names}
    examples = Examples(len(data.val), ctx)
    for x, y in scored_batches(data, cfg, ctx):
        with ctx.autocast():
            logits = [z for z in net(x) if z is not None]
            logits += [network(x, branch=False)[0] for network in others.values()]
        predictions = [z.argmax(1) for z in logits]
        for name, prediction in zip(names, predictions, strict=True):
            confusions[name].update(prediction, y)
        examples.add(x, y, predictions[0])
    for confusion in confusions.values():
        confusion.reduce()
    rest = {name: confusions[name].miou() for name in names[1:]}
    return confusions["miou"], rest, examples.rows


# ---------------------------------------------------------------------- pseudo-masks (Sec. III-B)

def write_pseudo_masks(f, data, folder, cfg, ctx):
    """y^_i = argmax f(x_i), i in L u U: palette PNGs at the size of training. A batch always holds
    the same images, whichever are written already: after a kill, the same command goes on to the
    very same files."""
    def load(i):
        return T.for_scoring(data.train.image(i), None, cfg.size)[0]

    paths = [mask_path(folder, data.train, i) for i in range(len(data.train))]
    one_size = bool(cfg.size) or data.one_size  # then images are batched
    torch.backends.cudnn.benchmark = one_size
    with ThreadPoolExecutor(max(1, cfg.workers)) as pool:  # reads and writes
        for first in range(ctx.rank * cfg.batch, len(paths), ctx.world * cfg.batch):
            batch = range(first, min(first + cfg.batch, len(paths)))
            if all(paths[i].exists() for i in batch):
                continue
            images = list(pool.map(load, batch))
            images = [torch.stack(images)] if one_size else [image[None] for image in images]
            masks = [mask for x in images
                     for mask in predict(f, to_device(x, ctx.device), ctx).argmax(1).byte().cpu()]
            for saved in [pool.submit(save_mask, mask.numpy(), data.palette, paths[i])
                          for i, mask in zip(batch, masks)]:
                saved.result()  # raises what went wrong in its thread
    ctx.barrier()


# ---------------------------------------------------------------------- training (Algorithm 1)

def train(cfg):
    """Train, or resume, the run in cfg.out, stage by stage; ends with the `final:` line.
    -> mIoU, 0..1

    A stage's folder holds its training, the pseudo-masks it wrote and, once they are complete,
    finished.pt: it is then never repeated. Stages are connected by the masks alone.
    """
    ctx = Runtime(cfg.device, cfg.precision)
    data = open_dataset(cfg.data, cfg.root, cfg.download)
    labelled, unlabelled = choose_labelled(data, cfg.labeled, cfg.split, cfg.seed)
    balance(cfg, len(labelled))
    lengths = [max(1, round(cfg.stage1_share * cfg.steps))] + [cfg.steps] * (cfg.stages - 1)
    if cfg.supervised:
        lengths = [sum(lengths)]
    if cfg.masks:
        lengths = [0] * (cfg.stages - 1) + [cfg.steps]  # the last stage alone
    check_stages(cfg, data)
    folder = RunFolder("three_stage", cfg, ctx, data)
    data = cached(data, cfg.size, cfg, ctx)
    folder.introduce(labelled, unlabelled, 0, f"{sum(lengths)} steps")

    for stage in range(cfg.stages if cfg.masks else 1, len(lengths) + 1):
        part = folder.part(f"stage{stage}", own_log=False)
        finished = part.path / "finished.pt"
        is_last = stage == len(lengths)
        if is_last or not finished.exists():
            f, confusion = train_stage(stage, lengths, data, labelled, part, cfg, ctx)
        if not is_last and not finished.exists():
            folder.catch_signals(False)  # a kill here loses nothing: the command goes on writing
            write_pseudo_masks(f, data, part.path / "pseudo", cfg, ctx)
            if ctx.main:
                checkpoint.save(finished, dict(miou=confusion.miou(), labelled=data.labelled))
            folder.catch_signals()
            ctx.barrier()
        if not is_last:
            state = checkpoint.load(finished)
            if state.get("labelled") != data.labelled:
                raise UserError(f"{part.path} was trained with other labelled images: choose "
                                f"another folder with --out")
            ctx.say(f"stage {stage} is finished: mIoU {100 * state['miou']:.1f}")
    folder.take_over(part)
    part.finish(confusion)
    return confusion.miou()


def check_stages(cfg, data):
    """Raises UserError if cfg.out holds other stages than those that this command trains, or lacks
    the stage whose masks a later one was trained on; and if masks are missing in --masks."""
    first = cfg.stages if cfg.masks else 1
    found = [k for k in range(1, 102) if Path(cfg.out, f"stage{k}/last.pt").exists()]
    if found != list(range(first, cfg.stages + 1))[:len(found)]:
        raise UserError(f"{cfg.out} holds the stages {found}, but this command trains {first} to "
                        f"{cfg.stages}, one after the other: choose another folder with --out")
    if cfg.masks and cfg.lambda_pl > 0:
        paths = [mask_path(cfg.masks, data.train, i) for i in range(len(data.train))]
        if missing := [path for path in paths if not path.exists()]:
            raise UserError(f"--masks {cfg.masks}: {len(missing)} of {len(paths)} training images "
                            f"have no pseudo-mask there, such as {missing[0]}")


def train_stage(stage, lengths, data, labelled, folder, cfg, ctx):
    """A stage, from the pretrained weights to its last step. lengths: steps of every stage.
    -> (f as it is scored, its ConfusionMatrix)

    log.csv: losses without their weights; miou of the network that is scored (D3), miou_branch of
    its g, miou_student or miou_teacher of the other one. `step` counts through all stages.
    """
    steps = lengths[stage - 1]
    net = MultiTask(cfg, len(data.classes), stage)
    if folder.is_new:
        load_pretrained(net.f, cfg, ctx.say)
        shutil.rmtree(folder.path / "pseudo", ignore_errors=True)  # other weights wrote them
    net = ctx.place(net)
    teacher = make_teacher(net).eval() if stage > 1 else None
    scored, others = net, {}  # the network that is scored and writes the masks (D3)
    if stage > 1 and cfg.writer == "teacher":
        scored, others = teacher, dict(miou_student=net)
    elif stage > 1:
        others = dict(miou_teacher=teacher)
    optimizer = make_optimizer(net, cfg)
    ctx.new_scaler()
    step = folder.resume(cfg.batch, sum(lengths), sum(lengths[:stage - 1]), net=scored.f,
                         student=net, teacher=teacher, optimizer=optimizer, scaler=ctx.scaler)
    wrapped = ctx.wrap(net, cfg.compile)
    masks = None
    if net.branch is not None:
        masks = cfg.masks or folder.path.parent / f"stage{stage - 1}/pseudo"
    batch_l = cfg.batch if stage == 1 else cfg.batch_l
    share = ctx.share(cfg.batch)
    n_l = min(max(batch_l - ctx.rank * share, 0), share)  # labelled images, on the first processes
    minibatches = Minibatches(data, labelled, batch_l, masks, stage, cfg)
    batches = endless(minibatches, share, step, cfg.workers, ctx)
    ctx.say(f"stage {stage}: {steps} steps" + (f", resumed at {step}" if step else ""))
    initial = math.prod(alpha(k, steps, cfg.ema) for k in range(steps))  # share left at the end
    if teacher is not None and initial > 0.1:
        ctx.say(f"note: {100 * initial:.0f} % of the teacher will still be its initial weights "
                f"after {steps} steps: give a smaller --ema, or more --steps")

    net.train()
    while step < steps:
        folder.stop_if_asked(step)
        if step > 0 and step % cfg.eval_every == 0:
            confusion, rest, examples = evaluate(scored, others, data, cfg, ctx)
            folder.scored(step, confusion.miou(), examples, **rest)
            net.train()
        with folder.log.waiting():
            x_w, x_s, index, y, pseudo = next(batches)
        optimizer.zero_grad()
        with ctx.autocast():
            logits, logits_g = wrapped(x_s)
        y = y[:n_l]
        loss = loss_seg = cross_entropy(logits[:n_l], y, ctx.count(y != T.IGNORE))  # Eq. 2
        terms = dict(loss_seg=loss_seg)
        if stage > 1 and cfg.lambda_con > 0:
            with torch.no_grad(), ctx.autocast():
                teacher_logits, _ = teacher(x_w, branch=False)
            loss_con = consistency(logits, teacher_logits, index, ctx.count(index >= 0),
                                   cfg.con_target)  # Eq. 1
            loss = loss + cfg.lambda_con * loss_con
            terms |= dict(loss_con=loss_con)
        if logits_g is not None:
            target = warp(pseudo, index, T.IGNORE)
            loss_pl = cross_entropy(logits_g, target, ctx.count(target != T.IGNORE))  # Eq. 3
            loss = loss + cfg.lambda_pl * loss_pl
            terms |= dict(loss_pl=loss_pl)
        ctx.scaler.scale(loss).backward()  # Eq. 4, 5: L = L_seg + lambda_1 L_con + lambda_2 L_pl
        ctx.scaler.step(optimizer)
        ctx.scaler.update()
        if teacher is not None:
            update_ema(teacher, net, alpha(step, steps, cfg.ema), buffers="ema")
        step += 1
        folder.log.add(folder.first_step + step, stage=stage, **terms, lr=cfg.lr)
        if step % cfg.save_every == 0 or step % cfg.eval_every == 0 or step == steps:
            folder.save(step)
    confusion, rest, examples = evaluate(scored, others, data, cfg, ctx)
    folder.scored(step, confusion.miou(), examples, **rest)
    folder.log.close()
    return scored.f.eval(), confusion


def make_optimizer(net, cfg):
    """Adam with groups that hold every trainable parameter once: conv1, the rest of the backbone,
    its shortcuts (D5), and at --lr the classifiers and conv6"""
    conv1, body, shortcut = LR_GROUPS[cfg.lr_groups]
    groups = {}
    for name, parameter in net.named_parameters():
        share = 1.0
        if name.startswith("f.body"):
            share = shortcut if "downsample" in name else body
        if name.startswith(("f.body.conv1", "f.body.bn1")):
            share = conv1
        if parameter.requires_grad:
            groups.setdefault(share, []).append(parameter)
    groups = [dict(params=parameters, lr=share * cfg.lr) for share, parameters in groups.items()]
    return torch.optim.Adam(groups, cfg.lr, fused=True)


# ---------------------------------------------------------------------- command line

def main(argv=None):
    cfg, given = parse(Config, PRESETS, argv, __doc__, RELEASED_SETTINGS)
    if not cfg.evaluate and not cfg.predict:
        settle(cfg, given)
        train(cfg)
        return
    ctx = Runtime(cfg.device, cfg.precision)
    path = cfg.evaluate or cfg.predict
    cfg, state = open_checkpoint("three_stage", path, cfg, given, ctx, RELEASED, RELEASED_SETTINGS)
    net = MultiTask(cfg, len(state["classes"]), stage=1)
    load_network(net.f, state, path, ctx.device)
    if cfg.evaluate:
        data = open_dataset(cfg.data, cfg.root)
        same_classes(data, state, path)
        confusion, _, _ = evaluate(net, {}, data, cfg, ctx)
        ctx.say(confusion.table(data.classes))
        ctx.say(f"{path} (step {state['step']}): mIoU {100 * confusion.miou():.1f} on "
                f"{len(data.val)} {data.scored_on} images, single scale")
    else:
        network = partial(predict, net.f.eval(), ctx=ctx)
        predict_folder(network, cfg, state["palette"], ctx)
    ctx.close()


if __name__ == "__main__":
    sys.exit(run(main))
