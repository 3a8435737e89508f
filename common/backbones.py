"""Backbones: torchvision's ResNets, dilated; PSP; DeepLabv2; DeepLabv3+."""
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd.function import once_differentiable
from torchvision.models.segmentation.deeplabv3 import ASPP as PooledASPP

from common.transforms import IMAGENET_MEAN, IMAGENET_STD

INPUT_SCALES = {  # mean, divisor, order is B, G, R?: input = (RGB of 0..255 - mean) / divisor
    "imagenet": None,  # as common.transforms.normalise
    "caffe": ((122.67891434, 116.66876762, 104.00698793), 1, False),
    "bgr": ((72.39239876, 82.90891754, 73.15835921), 255, True)}


class ResNet(nn.Sequential):
    """torchvision's ResNet without its classifier, strides of layer3 and layer4 made dilations.

    [B, 3, H, W] -> [B, out_channels, ceil(H/8), ceil(W/8)]. `layers` keeps the first 2, 3 or all 4
    of layer1..4. The 3x3 convolutions of layer3 have dilations 1, 2, 2, ..; layer4: 2, 4, 4; as in
    torchvision (bottlenecks only). stride 16: layer4 alone, 1, 2, 2. bn: see hold_bn.
    stem: 7x7, or deep, see deepen. input_scale: see Rescale.
    """

    def __init__(self, name, layers=4, stride=8, bn="learn", stem="7x7",
                 input_scale="imagenet"):
        super().__init__()
        net = getattr(torchvision.models, name)(weights=None)
        if stem == "deep":
            deepen(net)
        if stride == 8:
            dilate(net.layer3, 2)
        dilate(net.layer4, 4 if stride == 8 else 2)
        if input_scale != "imagenet":
            self.rescale = Rescale(input_scale)
        parts = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        for part in parts[:4 + layers]:
            self.add_module(part, getattr(net, part))
        self.out_channels = net.fc.in_features // 2 ** (4 - layers)  # every layer doubles them
        self.bn = bn
        hold_bn(self, bn)

    def train(self, mode=True):
        super().train(mode)
        hold_bn(self, self.bn)
        return self


def deepen(net):
    """Give torchvision's ResNet three 3x3 convolutions of 64, 64 and 128 channels, the first with
    stride 2, instead of the 7x7 one (torchcv's 3x3resnet50): 123,776 more parameters in ResNet-50.
    """
    def conv(inside, outside, stride=1):
        return nn.Conv2d(inside, outside, 3, stride, 1, bias=False)

    net.conv1 = nn.Sequential(
        conv(3, 64, 2), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        conv(64, 64), nn.BatchNorm2d(64), nn.ReLU(inplace=True), conv(64, 128))
    net.bn1 = nn.BatchNorm2d(128)
    net.inplanes = 128
    net.layer1 = net._make_layer(type(net.layer1[0]), 64, len(net.layer1))
    for module in (*net.conv1.modules(), *net.layer1.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Rescale(nn.Module):
    """Images that are normalised as torchvision does -> pixels of INPUT_SCALES"""

    def __init__(self, name):
        super().__init__()
        mean, divisor, self.bgr = INPUT_SCALES[name]
        scale = 255 * torch.tensor(IMAGENET_STD) / divisor
        shift = (255 * torch.tensor(IMAGENET_MEAN) - torch.tensor(mean)) / divisor
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)

    def forward(self, x):
        x = x * self.scale + self.shift
        return x.flip(1) if self.bgr else x


def dilate(layer, dilation):
    """Replace a ResNet layer's stride 2 by dilation; the 3x3 that had the stride gets half."""
    for conv in (m for m in layer.modules() if isinstance(m, nn.Conv2d)):
        d = dilation // 2 if conv.stride == (2, 2) else dilation
        conv.stride = (1, 1)
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (d, d)


class PSP(nn.Module):
    """Pyramid pooling (Zhao et al. 2017). Output >= 0.

    Bins 1, 2, 3, 6, each average-pooled, 1x1-projected to in/4 channels and resized back, are
    concatenated with the input and fused by a 3x3 convolution to in/4 channels, but at least 128.
    """

    def __init__(self, in_channels):
        super().__init__()
        branch = in_channels // 4
        self.out_channels = max(branch, 128)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(b), nn.Conv2d(in_channels, branch, 1, bias=False),
                          nn.BatchNorm2d(branch), nn.ReLU()) for b in (1, 2, 3, 6))
        joined = in_channels + 4 * branch
        self.fuse = nn.Sequential(nn.Conv2d(joined, self.out_channels, 3, padding=1, bias=False),
                                  nn.BatchNorm2d(self.out_channels), nn.ReLU())

    def forward(self, x):
        """[B, in, h, w] -> [B, max(in/4, 128), h, w]"""
        pooled = [F.interpolate(branch(x), x.shape[2:], mode="bilinear", align_corners=False)
                  .to(x.dtype) for branch in self.branches]  # autocast resizes in fp32
        return self.fuse(torch.cat([x, *pooled], 1))


class ASPP(nn.Module):
    """DeepLabv2's classifier: the sum of 3x3 convolutions, one per rate (= dilation = padding).

    Weights N(0, 0.01), biases as PyTorch draws them. (9 * in_channels + 1) * C parameters per rate.
    """

    def __init__(self, in_channels, num_classes, rates=(6, 12, 18, 24)):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, num_classes, 3, padding=r, dilation=r) for r in rates)
        for conv in self.branches:
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, x):
        """[B, in, h, w] -> [B, C, h, w]"""
        return sum(conv(x) for conv in self.branches)


class DeepLabV2(nn.Module):
    """Single-scale DeepLabv2: `body`, a ResNet to output stride 8, and `head` (ASPP).

    As in Caffe, three things differ from torchvision's ResNet. The max-pooling rounds up (321 ->
    41, 512 -> 65 cells); every 3x3 of layer3 / layer4 is dilated by 2 / 4, the first too; the
    stride of layer2 sits on a bottleneck's first 1x1 (`stride_on="3x3"`: where torchvision's
    weights were trained with it).
    """

    def __init__(self, num_classes, name, layers=4, rates=(6, 12, 18, 24),
                 stride_on="1x1", bn="learn", input_scale="imagenet"):
        super().__init__()
        self.body = ResNet(name, layers, bn=bn, input_scale=input_scale)
        self.body.maxpool.ceil_mode = True
        for layer, dilation in (("layer3", 2), ("layer4", 4)):  # stride is 1 now: none is halved
            dilate(getattr(self.body, layer, nn.Module()), dilation)
        first = self.body.layer2[0]
        if stride_on == "1x1" and hasattr(first, "conv3"):
            first.conv1.stride = (2, 2)
            first.conv2.stride = (1, 1)
        self.head = ASPP(self.body.out_channels, num_classes, rates)

    def forward(self, x):
        """[B, 3, H, W] -> logits [B, C, H, W]"""
        return upsample(self.head(self.body(x)), x.shape[2:])


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+ (Chen et al. 2018) on a ResNet at output stride 16.

    torchvision's ASPP, resized to stride 4, joined with 48 channels made from layer1; two 3x3.
    """

    def __init__(self, num_classes, name, bn="learn"):
        super().__init__()
        self.body = ResNet(name, stride=16, bn=bn)
        self.aspp = PooledASPP(self.body.out_channels, [6, 12, 18])
        low = self.body.out_channels // 8  # channels of layer1
        self.low = nn.Sequential(nn.Conv2d(low, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU())
        self.fuse = nn.Sequential(
            nn.Conv2d(304, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
            nn.Conv2d(256, num_classes, 1))

    def forward(self, x):
        """[B, 3, H, W] -> logits [B, C, H, W]"""
        size = x.shape[2:]
        for name, part in self.body.named_children():
            x = part(x)
            if name == "layer1":
                low = self.low(x)
        x = F.interpolate(self.aspp(x), low.shape[2:], mode="bilinear", align_corners=False)
        return upsample(self.fuse(torch.cat([x, low], 1)), size)


def upsample(x, size):
    """Bilinear resizing that maps corner to corner, as DeepLab resizes logits.

    In fp32, as interpolated bf16 logits are often equal, and argmax would take the lower class.
    """
    return F.interpolate(x.float(), size, mode="bilinear", align_corners=True)


def hold_bn(module, policy):
    """Apply a policy to all batch normalisation of a module; to be repeated after every .train().

    frozen: a constant affine map (running statistics, nothing trained). affine: batch statistics,
    which update the running ones, but weight and bias fixed. statistics: running statistics, but
    weight and bias learn. learn: ordinary.
    """
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            if policy in ("frozen", "affine"):
                norm.requires_grad_(False)
            if policy in ("frozen", "statistics"):
                norm.eval()
            if policy == "frozen" and type(norm) is nn.BatchNorm2d:
                norm.__class__ = FrozenBatchNorm  # parameters and buffers stay as they are


class FrozenBatchNorm(nn.BatchNorm2d):
    """Running statistics and weights that never change. PyTorch's BatchNorm2d keeps its input for
    the backward pass, and so half of all that a ResNet saves; nothing needs it here. (torchvision's
    FrozenBatchNorm2d would make bf16 fp32.)"""

    def forward(self, x):
        return _ConstantMap.apply(x, self.running_mean, self.running_var, self.weight, self.bias,
                                  self.eps)


class _ConstantMap(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, of which x alone has a gradient"""

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, eps):
        ctx.save_for_backward(var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        var, weight = ctx.saved_tensors
        grad_x = F.batch_norm(grad, torch.zeros_like(var), var, weight, eps=ctx.eps)
        return grad_x, None, None, None, None, None
