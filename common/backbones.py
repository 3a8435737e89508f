"""Backbones and their weights: torchvision's ResNets dilated to output stride 8, PSP, DeepLabv2, DeepLabv3+."""
import re
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPP as PooledASPP

from common import checkpoint
from common.settings import UserError

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier, the strides of layer3 and layer4 replaced by dilation.

    [B, 3, H, W] -> [B, out_channels, ceil(H/8), ceil(W/8)]. `layers` keeps the first 2, 3 or all 4 of layer1..4.
    Dilations of the 3x3 convolutions are those of torchvision's `replace_stride_with_dilation=[False, True, True]`,
    which torchvision offers for the bottleneck ResNets only: layer3 1,2,2,..; layer4 2,4,4.
    stride 16: layer3 keeps its stride, and layer4 has 1,2,2.
    """

    def __init__(self, name="resnet50", layers=4, stride=8):
        super().__init__()
        net = getattr(torchvision.models, name)(weights=None)
        if stride == 8:
            dilate(net.layer3, 2)
        dilate(net.layer4, 4 if stride == 8 else 2)
        for part in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")[:4 + layers]:
            self.add_module(part, getattr(net, part))
        last = getattr(net, f"layer{layers}")
        self.out_channels = [m for m in last.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


def dilate(layer, dilation):
    """Replace a ResNet layer's stride 2 by dilation: the strided 3x3 gets half of it, every other 3x3 all of it."""
    for conv in (m for m in layer.modules() if isinstance(m, nn.Conv2d)):
        d = dilation // 2 if conv.stride == (2, 2) else dilation
        conv.stride = (1, 1)
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (d, d)


class PSP(nn.Module):
    """Pyramid pooling (Zhao et al. 2017): bins 1, 2, 3, 6, each average-pooled, 1x1-projected to in/4 channels and
    resized back; concatenated with the input and fused by a 3x3 convolution to in/4 channels, but to no fewer than 128.
    Output >= 0."""

    def __init__(self, in_channels, bins=(1, 2, 3, 6)):
        super().__init__()
        branch = in_channels // 4
        self.out_channels = out = max(branch, 128)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(b), nn.Conv2d(in_channels, branch, 1, bias=False),
                          nn.BatchNorm2d(branch), nn.ReLU()) for b in bins)
        self.fuse = nn.Sequential(nn.Conv2d(in_channels + len(bins) * branch, out, 3, padding=1, bias=False),
                                  nn.BatchNorm2d(out), nn.ReLU())

    def forward(self, x):
        """[B, in, h, w] -> [B, max(in/4, 128), h, w]"""
        pooled = [F.interpolate(branch(x), x.shape[2:], mode="bilinear", align_corners=False) for branch in self.branches]
        return self.fuse(torch.cat([x, *pooled], 1))


class DeepLabResNet(ResNet):
    """DeepLabv2's body: a ResNet to output stride 8 as Caffe has it, which differs from torchvision's in three things.

    The max-pooling rounds up (321 -> 41, 512 -> 65 cells); every 3x3 of layer3 / layer4 is dilated by 2 / 4, the first
    one too; the stride of layer2 sits on the first 1x1 of a bottleneck (`stride_on="3x3"`: where torchvision's weights
    were trained with it). The names of the tensors are torchvision's.
    """

    def __init__(self, name="resnet101", layers=4, stride_on="1x1"):
        super().__init__(name, layers)
        self.maxpool.ceil_mode = True
        for layer, dilation in (("layer3", 2), ("layer4", 4)):
            for conv in (m for m in getattr(self, layer, nn.Module()).modules() if isinstance(m, nn.Conv2d)):
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (dilation, dilation)
        first = self.layer2[0]
        if stride_on == "1x1" and hasattr(first, "conv3"):
            first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)


class ASPP(nn.Module):
    """DeepLabv2's classifier: 3x3 convolutions with bias, one per rate (= dilation = padding), whose outputs are summed.

    Weights N(0, 0.01), biases as PyTorch draws them. 4 * (9 * in_channels + 1) * C parameters with four rates.
    """

    def __init__(self, in_channels, num_classes, rates=(6, 12, 18, 24)):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(in_channels, num_classes, 3, padding=r, dilation=r) for r in rates)
        for conv in self.branches:
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, x):
        """[B, in, h, w] -> [B, C, h, w]"""
        return sum(conv(x) for conv in self.branches)


class DeepLabV2(nn.Module):
    """Single-scale DeepLabv2: `body` and `head` (ASPP); logits at the size of the image, resized with align_corners.

    bn: "frozen" (running statistics for ever), "affine" (batch statistics, weight and bias fixed) or "learn".
    """

    def __init__(self, num_classes, name="resnet101", layers=4, rates=(6, 12, 18, 24), stride_on="1x1", bn="learn"):
        super().__init__()
        self.body = DeepLabResNet(name, layers, stride_on)
        self.head = ASPP(self.body.out_channels, num_classes, rates)
        self.bn = bn
        hold_bn(self, bn)

    def forward(self, x):
        """[B, 3, H, W] -> logits [B, C, H, W]"""
        return upsample(self.head(self.body(x)), x.shape[2:])

    def train(self, mode=True):
        super().train(mode)
        hold_bn(self, self.bn)
        return self


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+ (Chen et al. 2018) on a ResNet at output stride 16: torchvision's ASPP (rates 6, 12, 18 and image
    pooling; 256 channels), resized to stride 4, joined with 48 channels made from layer1, two 3x3 convolutions."""

    def __init__(self, num_classes, name="resnet101", bn="learn"):
        super().__init__()
        self.body = ResNet(name, stride=16)
        low = [m for m in self.body.layer1.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features
        self.aspp = PooledASPP(self.body.out_channels, [6, 12, 18])
        self.low = nn.Sequential(nn.Conv2d(low, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU())
        self.fuse = nn.Sequential(nn.Conv2d(304, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
                                  nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
                                  nn.Conv2d(256, num_classes, 1))
        self.bn = bn
        hold_bn(self.body, bn)

    def forward(self, x):
        """[B, 3, H, W] -> logits [B, C, H, W]"""
        size = x.shape[2:]
        for name, part in self.body.named_children():
            x = part(x)
            if name == "layer1":
                low = self.low(x)
        x = F.interpolate(self.aspp(x), low.shape[2:], mode="bilinear", align_corners=False)
        return upsample(self.fuse(torch.cat([x, low], 1)), size)

    def train(self, mode=True):
        super().train(mode)
        hold_bn(self.body, self.bn)
        return self


def upsample(x, size):
    """Bilinear resizing that maps corner to corner, as DeepLab's logits are defined (8 cells + 1 <-> the crop's edges);
    in fp32, because interpolated bf16 logits are equal in many pixels, where argmax would take the lower class."""
    return F.interpolate(x.float(), size, mode="bilinear", align_corners=True)


def hold_bn(module, policy):
    """Apply a policy to all batch normalisation of a module; to be repeated after every .train().

    frozen: a constant affine map (running statistics, nothing trained). affine: batch statistics, which update the
    running ones, but weight and bias fixed. learn: ordinary.
    """
    if policy not in ("frozen", "affine", "learn"):
        raise ValueError(f"bn policy {policy!r}: expected frozen, affine or learn")
    for norm in (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        if policy != "learn":
            norm.requires_grad_(False)
        if policy == "frozen":
            norm.eval()


def load_weights(backbone, name, weights, say=print, flag="--weights"):
    """Fill a backbone from `imagenet` (torchvision's IMAGENET1K_V1, downloaded once), a state-dict file, or `none`.

    A file's keys are matched by name and shape after wrappers (`module.`, `backbone.`, `Scale.`, ..) are stripped;
    what was matched, skipped and missing is said. Raises UserError if nothing, or only some of the layers, matched.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        try:
            kind = torchvision.models.get_model_weights(name).IMAGENET1K_V1  # the papers' features; V2's differ
            state = kind.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise UserError(f"{flag} imagenet: torchvision could not download {name} ({error}); download it elsewhere "
                            f"and pass the file with {flag} FILE, or train from scratch with {flag} none") from error
    else:
        if not Path(weights).is_file():
            raise UserError(f"{flag} {weights}: no such file; expected imagenet, none, or a state-dict file")
        state = checkpoint.load(weights)
        if not isinstance(state, dict):
            raise UserError(f"{flag} {weights}: expected a state dict (names and tensors), not a {type(state).__name__}")
        state = next((state[k] for k in ("state_dict", "model", "net") if isinstance(state.get(k), dict)), state)
    load_matching(backbone, state, weights, say, flag)


def load_matching(module, state, source, say=print, flag="--weights"):
    """Copy the tensors of `state` whose name (less wrapper prefixes) and shape fit `module`, and say what happened."""
    own = module.state_dict()
    wrapper = re.compile(r"^(module|model|backbone|encoder|resnet|base|body|Scale|net)\.")
    matched, skipped = {}, []
    for name, tensor in state.items():
        while name not in own and wrapper.match(name):
            name = wrapper.sub("", name, count=1)
        if name in own and isinstance(tensor, torch.Tensor) and tensor.shape == own[name].shape:
            matched[name] = tensor
        else:
            skipped.append(name)
    missing = [name for name in own if name not in matched and not name.endswith("num_batches_tracked")]
    say(f"weights {source}: {len(matched)} tensors matched, {len(skipped)} skipped{_few(skipped)}, "
        f"{len(missing)} missing{_few(missing)}")
    if missing:
        raise UserError(f"{flag} {source}: {len(missing)} tensors of the backbone are missing or differ in shape "
                        f"({', '.join(missing[:3])}): expected the state dict of the --backbone that was chosen")
    module.load_state_dict(matched, strict=False)


def _few(names):
    return f" ({', '.join(names[:3])}{', ..' if len(names) > 3 else ''})" if names else ""
