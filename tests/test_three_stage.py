"""three_stage.py against the paper: equations, networks, the augmentation to the pixel, and runs of seconds."""
import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import random
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import kill, run_script, same_state, start_script, wait_for
from PIL import Image
from torch import nn

import fixtures
import three_stage as ts
from common import checkpoint
from common.datasets import open_dataset
from common.runtime import Runtime
from common.settings import UserError, parse, run
from common.transforms import IGNORE, IMAGENET_MEAN, IMAGENET_STD

C = 5
CTX = Runtime("cpu", "fp32")


def config(**values):
    small = dict(backbone="resnet18", backbone_layers=2, weights="none", bn="learn", lr_groups="literal", aspp_rates=(1, 2),
                 steps=6000, lambda_con=0.5, lambda_pl=0.5, batch_l=2, device="cpu", workers=0)
    return ts.Config(**{**small, **values})


def paper(**values):
    return ts.Config(**{**dict(bn="frozen", lr_groups="released", lambda_con=0.5, lambda_pl=0.5, batch_l=1), **values})


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(seed, *shape, classes=C):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def count(*modules, trainable=False):
    seen = {id(p): p for m in modules for p in m.parameters() if p.requires_grad or not trainable}
    return sum(p.numel() for p in seen.values())


# ---- networks (Tables I, VII)

@pytest.fixture(scope="module")
def full_size():
    """The paper's networks of Stages 1, 2, 3 for 21 classes, without storage"""
    with torch.device("meta"):
        return [ts.MultiTask(paper(), 21, stage) for stage in (1, 2, 3)]


def test_parameters_are_the_papers(full_size):
    f = full_size[0].f
    assert count(f) == 44_048_532 and count(f, trainable=True) == 43_943_188
    blocks = [f.body.layer1, f.body.layer2, f.body.layer3, f.body.layer4]
    assert [count(b) for b in blocks] == [215_808, 1_219_584, 26_090_496, 14_964_736]
    assert [count(b, trainable=True) for b in blocks] == [212_992, 1_212_416, 26_017_792, 14_942_208]
    assert count(f.body.conv1) == 9_408 and count(f.head) == 4 * (9 * 2048 * 21 + 21)
    ghat, gtilde = full_size[1].branch, full_size[2].branch
    assert count(ghat.conv6) == 4_402_176 and count(ghat.conv6, trainable=True) == 4_390_912
    assert (count(ghat), count(gtilde)) == (5_176_404, 1_548_372) and full_size[0].branch is None
    assert [count(net) for net in full_size] == [44_048_532, 49_224_936, 45_596_904]
    with torch.device("meta"):
        city = [ts.MultiTask(paper(), 19, stage) for stage in (1, 2, 3)]
    assert [count(net) for net in city] == [43_901_068, 49_003_736, 45_301_976]
    assert [count(net.branch) for net in city[1:]] == [5_102_668, 1_400_908]


@pytest.mark.parametrize("size, cells", [((321, 321), (41, 41)), ((256, 512), (33, 65)), ((512, 1024), (65, 129))])
def test_shapes(full_size, size, cells):
    x = torch.empty(1, 3, *size, device="meta")
    for net in full_size:
        z4, z5 = net.f.features(x)
        assert z4.shape == (1, 1024, *cells) and z5.shape == (1, 2048, *cells)
        logits, logits_g = net(x)
        assert logits.shape == (1, 21, *size) and (logits_g is None or logits_g.shape == (1, 21, *size))
    assert full_size[1].branch.conv6(full_size[1].f.features(x)[0]).shape == (1, 1024, *cells)


def test_conv6_is_conv5_at_half_width(full_size):
    conv5, conv6 = full_size[1].f.body.layer4, full_size[1].branch.conv6
    for one, two in zip(conv5.modules(), conv6.modules(), strict=True):
        assert type(one) is type(two)
        if isinstance(one, nn.Conv2d):
            assert (one.kernel_size, one.stride, one.dilation, one.padding) == (two.kernel_size, two.stride, two.dilation,
                                                                                 two.padding)
            assert two.out_channels * 2 == one.out_channels
    assert conv6[0].downsample[0].weight.shape == (1024, 1024, 1, 1) and conv6[1].conv2.dilation == (4, 4)


def test_every_trainable_tensor_once_with_its_learning_rate(full_size):
    for net, tensors in zip(full_size, (112, 130, 120)):
        groups = ts.make_optimizer(net, paper()).param_groups
        held = [id(p) for group in groups for p in group["params"]]
        assert len(held) == len(set(held)) == tensors
        assert set(held) == {id(p) for p in net.parameters() if p.requires_grad}
        assert all(g["betas"] == (0.9, 0.999) and g["weight_decay"] == 0 and g["eps"] == 1e-8 for g in groups)
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        for name, p in net.named_parameters():
            if p.requires_grad:
                expected = 3e-5 if not name.startswith("f.body") else 3e-6 if name == "f.body.conv1.weight" else \
                    1.2e-5 if "downsample" in name else 9e-6
                assert rates[id(p)] == pytest.approx(expected), name
        assert sum(len(g["params"]) for g in groups if g["lr"] == pytest.approx(1.2e-5)) == 4
    for kind, rates in (("nominal", {3e-6, 3e-5}), ("literal", {3e-5})):
        groups = ts.make_optimizer(full_size[1], paper(lr_groups=kind)).param_groups
        assert {round(g["lr"], 9) for g in groups} == rates


def test_initialisation():
    """Pretrained: N(0, 0.01), frozen BN that does nothing. From scratch: as torchvision's. f alike in all stages."""
    nets = [ts.MultiTask(config(bn=bn, backbone="resnet50", backbone_layers=2), C, 2) for bn in ("frozen", "learn")]
    frozen, learnt = (net.branch.conv6[1].conv2 for net in nets)
    assert frozen.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert learnt.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.03)
    for net in nets:
        for conv in [*net.f.head.branches, *net.branch.aspp.branches]:
            assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    x = normal(0, 1, 256, 2, 2)
    bn = nets[0].train().branch.conv6[0].bn3
    torch.testing.assert_close(bn(x), x / math.sqrt(1 + 1e-5))
    stages = [ts.MultiTask(config(), C, stage) for stage in (1, 2, 3)]
    for net in stages[1:]:
        assert same_state(stages[0].f.state_dict(), net.f.state_dict())
    ghat = [ts.MultiTask(config(branch_stage3="ghat"), C, stage).branch.aspp.branches[0].weight for stage in (2, 3)]
    assert ghat[0].shape == ghat[1].shape and not torch.equal(*ghat)  # a draw of its own in every stage
    assert ts.MultiTask(config(lambda_pl=0.0), C, 3).branch is None  # Table V, row d


@pytest.mark.parametrize("name, layers", [("resnet18", 2), ("resnet18", 3), ("resnet34", 4), ("resnet50", 2), ("resnet50", 3)])
def test_small_networks(name, layers):
    x = normal(0, 2, 3, 33, 41)
    for stage, kind in ((2, "gtilde"), (3, "gtilde"), (3, "ghat")):
        net = ts.MultiTask(config(backbone=name, backbone_layers=layers, branch_stage3=kind), C, stage)
        z4, z5 = net.f.features(x)
        logits, logits_g = net(x)
        assert logits.shape == logits_g.shape == (2, C, 33, 41)
        if net.branch.conv6:
            out = net.branch.conv6(z4)
            assert out.shape[2:] == z5.shape[2:] and out.shape[1] * 2 == z5.shape[1]
        assert (net.branch.conv6 is not None) == (stage == 2 or kind == "ghat")


def test_f_is_a_deeplab_and_the_trunk_is_shared():
    """Perturbing the last block changes f, not g^, but changes g~; perturbing ASPP_1 never changes g."""
    x = normal(0, 1, 3, 40, 40)
    for stage in (2, 3):
        net = ts.MultiTask(config(backbone_layers=3), C, stage).eval()
        f, g = net(x)
        assert torch.equal(f, net.f(x)) and net(x, branch=False)[1] is None
        with torch.no_grad():
            net.f.head.branches[0].weight.add_(0.1)
        f2, g2 = net(x)
        assert not torch.equal(f, f2) and torch.equal(g, g2)
        with torch.no_grad():
            net.f.body.layer3[1].conv2.weight.add_(0.01)
        f3, g3 = net(x)
        assert not torch.equal(f2, f3) and torch.equal(g2, g3) == (stage == 2)
        with torch.no_grad():
            net.f.body.layer2[0].conv1.weight.add_(0.01)
        assert not torch.equal(g3, net(x)[1])


@pytest.mark.parametrize("stage, layers", [(2, 4), (3, 4), (2, 2)])
def test_gradient_routing(stage, layers):
    """L_seg, L_con: everything of f, nothing of g. L_pl: what g is made of; never ASPP_1, in Stage 2 not conv5 either."""
    net = ts.MultiTask(config(backbone_layers=layers, bn="frozen"), C, stage)
    x, y = normal(0, 2, 3, 40, 40), ids(1, 2, 40, 40)
    last = f"f.body.layer{layers}."

    def reached(loss_of):
        net.zero_grad()
        loss_of(*net(x)).backward()
        return {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    of_f = {name for name in trainable if name.startswith("f.")}
    teacher = normal(2, 2, C, 40, 40).requires_grad_()
    index = torch.arange(1600).view(40, 40).expand(2, 40, 40)
    assert reached(lambda f, g: ts.cross_entropy(f, y, CTX)) == of_f
    assert reached(lambda f, g: ts.consistency(f, teacher, index, CTX)) == of_f
    assert reached(lambda f, g: ts.consistency(f, teacher, index, CTX, "soft")) == of_f and teacher.grad is None
    without = {n for n in of_f if n.startswith("f.head.") or (stage == 2 and n.startswith(last))}
    assert reached(lambda f, g: ts.cross_entropy(g, y, CTX)) == trainable - without
    assert not any(name.endswith(("bn1.weight", "bn1.bias")) for name in trainable)


def test_two_rates_of_the_aspp():
    net, x = ts.MultiTask(config(aspp_rates=(6, 12)), C, 3).eval(), normal(0, 1, 3, 40, 40)
    z5 = net.f.features(x)[1]
    assert [conv.dilation for conv in net.f.head.branches] == [(6, 6), (12, 12)] == [c.padding for c in net.branch.aspp.branches]
    torch.testing.assert_close(net.f.head(z5), sum(conv(z5) for conv in net.f.head.branches))


def test_where_the_stride_is():
    for where, strides in (("1x1", [(2, 2), (1, 1)]), ("3x3", [(1, 1), (2, 2)])):
        block = ts.Segmenter(config(backbone="resnet50", stride_on=where), C).body.layer2[0]
        assert [block.conv1.stride, block.conv2.stride] == strides and block.downsample[0].stride == (2, 2)


def test_bn_policies():
    x = normal(0, 4, 3, 40, 40)
    for bn, statistics, affine in (("frozen", False, False), ("affine", True, False), ("learn", True, True)):
        net = ts.MultiTask(config(bn=bn), C, 2).train()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        net(x)
        changed = {name.rsplit(".")[-1] for name, v in net.state_dict().items() if not torch.equal(v, before[name])}
        assert ("running_mean" in changed) == statistics, bn
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {m.training for m in norms} == {statistics} and {m.weight.requires_grad for m in norms} == {affine}
        assert len(norms) == 15 and all(not m.training for m in net.eval().modules())


def test_input_scales():
    """caffe: RGB in 0..255 less the mean; caffe_bgr: the same with the channels reversed."""
    torch.manual_seed(0)
    pixels = torch.randint(256, (1, 3, 24, 24)).float()
    x = (pixels / 255 - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    plain = ts.Segmenter(config(bn="frozen"), C).eval()
    caffe = pixels - torch.tensor([122.67891434, 116.66876762, 104.00698793])[:, None, None]
    for scale, expected in (("imagenet", x), ("caffe", caffe), ("caffe_bgr", caffe.flip(1))):
        f = ts.Segmenter(config(bn="frozen", input_scale=scale), C).eval()
        f.load_state_dict(plain.state_dict())
        torch.testing.assert_close(f(x), plain(expected), rtol=1e-3, atol=1e-3)


def test_pretrained_files(tmp_path, capsys):
    """A file's body is restored in every stage, bit for bit; its classifier only where the shapes fit."""
    source = ts.Segmenter(config(), 21)
    state = {f"Scale.{name}": tensor for name, tensor in source.body.state_dict().items()}
    for k, conv in enumerate(source.head.branches):
        state |= {f"Scale.layer5.conv2d_list.{k}.{name}": tensor for name, tensor in conv.state_dict().items()}
    torch.save(state, tmp_path / "coco.pth")
    cfg = config(weights=str(tmp_path / "coco.pth"), seed=3)
    for stage in (1, 2, 3):
        net = ts.MultiTask(cfg, 21, stage)
        ts.load_pretrained(net.f, cfg, print)
        assert same_state(net.f.state_dict(), source.state_dict())
    assert "head.branches.0.weight, head.branches.0.bias, head.branches.1.weight, head.branches.1.bias restored" in \
        capsys.readouterr().out
    other = ts.MultiTask(cfg, 19, 1)
    before = other.f.head.branches[0].weight.clone()
    ts.load_pretrained(other.f, cfg, print)
    assert torch.equal(before, other.f.head.branches[0].weight) and "nothing to restore" in capsys.readouterr().out
    assert same_state(other.f.body.state_dict(), source.body.state_dict())
    with pytest.raises(UserError, match="no such file"):
        ts.load_pretrained(other.f, config(weights="nowhere.pth"), print)


# ---- A and B (Sec. III-A)

def naive_place(name, amount, width, height, u, v):
    """(column, row) of the source of the pixel (u, v), as Pillow's nearest-neighbour affine transform has it"""
    x, y = u + 0.5, v + 0.5
    if name == "rotate":
        t, dx, dy = math.radians(amount), x - width / 2, y - height / 2
        x, y = math.cos(t) * dx - math.sin(t) * dy + width / 2, math.sin(t) * dx + math.cos(t) * dy + height / 2
    elif name == "shear_x":
        x += amount * y
    elif name == "shear_y":
        y += amount * x
    elif name == "translate_x":
        x += amount
    else:
        y += amount
    return math.floor(x), math.floor(y)


@pytest.mark.parametrize("name", ts.GEOMETRIC)
def test_source_map_pixel_by_pixel(name):
    for level in (-9, -4, 1, 9):
        amount = level * ts.GEOMETRIC[name]
        source = ts.source_map(name, amount, 14, 19)
        for v in range(14):
            for u in range(19):
                x, y = naive_place(name, amount, 19, 14, u, v)
                assert source[v, u] == (y * 19 + x if 0 <= x < 19 and 0 <= y < 14 else -1)


@pytest.mark.parametrize("name", ts.GEOMETRIC)
def test_source_map_is_pillows(name):
    """At most a handful of pixels of a rotation differ from Pillow's own (it rounds its matrix to 15 digits)."""
    picture = Image.fromarray(np.arange(61 * 47, dtype=np.int32).reshape(47, 61) + 1, mode="I")
    for level in (-9, -5, 2, 9):
        amount = level * ts.GEOMETRIC[name]
        matrix = {"shear_x": (1, amount, 0, 0, 1, 0), "shear_y": (1, 0, 0, amount, 1, 0),
                  "translate_x": (1, 0, amount, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, amount)}.get(name)
        moved = picture.rotate(amount) if name == "rotate" else picture.transform(picture.size, Image.Transform.AFFINE, matrix)
        assert (np.array(moved) - 1 != ts.source_map(name, amount, 47, 61).numpy()).sum() <= 3 * (name == "rotate")


@pytest.mark.parametrize("name, amount, square, wide", [
    ("shear_x", 0.27, 89_131, 122_225), ("shear_y", 0.27, 89_131, 95_683), ("translate_x", 9, 100_152, 128_768),
    ("translate_y", -9, 100_152, 126_464), ("rotate", 27, 87_885, 102_958), ("rotate", -27, 87_885, 102_958)])
def test_valid_pixels_at_the_papers_sizes(name, amount, square, wide):
    assert [(ts.source_map(name, amount, *size) >= 0).sum() for size in ((321, 321), (256, 512))] == [square, wide]
    assert (ts.source_map("rotate", 15, 321, 321) >= 0).sum() == 92_629


def forced(monkeypatch, *operations):
    monkeypatch.setattr(ts, "draw_operations", lambda rng, draws: list(operations))


def painted(mask):
    """An image that is a function of its mask, one colour per class"""
    palette = torch.tensor([[10, 200, 60], [250, 30, 90], [0, 0, 0], [255, 255, 255], [127, 3, 5]], dtype=torch.uint8)
    return palette[mask].permute(2, 0, 1), palette


def every_geometric():
    rng = np.random.default_rng(0)
    single = [[(name, level, sign)] for name in ts.GEOMETRIC for level in range(1, 10) for sign in (1, -1)]
    names = list(ts.GEOMETRIC)
    triple = [[(names[rng.integers(5)], int(rng.integers(1, 10)), int(1 - 2 * rng.integers(2))) for _ in range(3)]
              for _ in range(20)]
    return single + triple


def test_image_and_mask_move_together_to_the_pixel(monkeypatch):
    """palette^-1(A(image)) == B(mask) wherever B has a source; elsewhere B is 255 and A grey. Soft and hard B agree."""
    mask = ids(0, 37, 50)
    image, palette = painted(mask)
    moved = 0
    for operations in every_geometric():
        forced(monkeypatch, *operations)
        x, index = ts.strong(image, np.random.default_rng(0), config(cutouts=0))
        b = ts.warp(mask, index, IGNORE)
        valid = index >= 0
        assert torch.equal(x.permute(1, 2, 0)[valid], palette[b[valid]]) and (b[~valid] == IGNORE).all()
        assert (x[:, ~valid] == 127).all() and x.dtype == torch.uint8 and index.dtype == torch.int32
        soft = ts.warp(F.one_hot(mask, C).permute(2, 0, 1).float(), index, 0.0)
        assert torch.equal(soft.argmax(0)[valid], b[valid]) and (soft[:, ~valid] == 0).all()
        moved += (~valid).any().item()
    assert moved > 90


def test_composition_is_one_after_the_other(monkeypatch):
    """I = I1[I2], V = V2 and V1[I2]: the same pixels as two separate warps."""
    mask = ids(1, 30, 41)
    forced(monkeypatch, ("rotate", 9, 1), ("shear_x", 8, -1))
    _, index = ts.strong(painted(mask)[0], np.random.default_rng(0), config(cutouts=0))
    first = ts.warp(mask, ts.source_map("rotate", 27, 30, 41), IGNORE)
    assert torch.equal(ts.warp(mask, index, IGNORE), ts.warp(first, ts.source_map("shear_x", -0.24, 30, 41), IGNORE))


def test_photometric_operations_and_cutouts_do_not_move_pixels(monkeypatch):
    image = torch.randint(90, 201, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    identity = torch.arange(2000).view(40, 50)
    for name in ts.PHOTOMETRIC:
        forced(monkeypatch, (name, 9, 1))
        x, index = ts.strong(image, np.random.default_rng(0), config(cutouts=0))
        assert torch.equal(index, identity.int()) and torch.equal(x, image) == (name == "identity"), name
        x, index = ts.strong(image, np.random.default_rng(0), config(cutouts=3, cutout=10))
        assert torch.equal(index, identity.int()) and 0 < (x == 127).all(0).sum() <= 300
        _, index = ts.strong(image, np.random.default_rng(0), config(cutouts=3, cutout=10, ignore_cut=True))
        assert torch.equal(index < 0, (x == 127).all(0))


def test_order_is_the_drawn_one(monkeypatch):
    """AutoContrast before a rotation sees the image alone, after it the grey corners too; both end with grey corners."""
    image = torch.randint(60, 100, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    results = []
    for operations in ([("auto_contrast", 1, 1), ("rotate", 9, 1)], [("rotate", 9, 1), ("auto_contrast", 1, 1)]):
        forced(monkeypatch, *operations)
        x, index = ts.strong(image, np.random.default_rng(0), config(cutouts=0))
        assert (x[:, index < 0] == 127).all()
        results.append(x[:, index >= 0].max().item())
    assert results[0] > 250 and results[1] < 160  # stretched to the grey 127, which became 255


def test_levels():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16).clone()
    thresholds = [231, 205, 180, 154, 128, 103, 77, 52, 26]
    bits = [4, 4, 3, 3, 2, 2, 2, 1, 1]
    for m in range(1, 10):
        assert torch.equal(ts.PHOTOMETRIC["solarize"](ramp, m), torch.where(ramp >= thresholds[m - 1], 255 - ramp, ramp))
        assert len(ts.PHOTOMETRIC["posterize"](ramp, m).unique()) == 2 ** bits[m - 1]
        bright = ts.PHOTOMETRIC["brightness"](ramp, m)
        assert bright[0, 0, 100 % 16].item() == int(ramp[0, 0, 100 % 16] * ts.enhance(m))
    assert [round(ts.enhance(m), 2) for m in range(1, 10)] == [0.28, 0.46, 0.64, 0.82, 1.0, 1.18, 1.36, 1.54, 1.72]
    colours = torch.randint(256, (3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for name in ("color", "contrast", "brightness", "sharpness"):
        assert torch.equal(ts.PHOTOMETRIC[name](colours, 5), colours) and not torch.equal(ts.PHOTOMETRIC[name](colours, 1), colours)
    assert ts.GEOMETRIC == dict(rotate=3, shear_x=0.03, shear_y=0.03, translate_x=1, translate_y=1)
    assert len(ts.OPERATIONS) == 14


def test_statistics_of_the_draws():
    rng, n = np.random.default_rng(0), 12000
    drawn = [op for _ in range(n) for op in ts.draw_operations(rng, 3)]
    assert len(drawn) / (3 * n) == pytest.approx(0.5, abs=0.01)
    for name in ts.OPERATIONS:
        assert sum(op[0] == name for op in drawn) / len(drawn) == pytest.approx(1 / 14, abs=0.006)
    levels = np.bincount([op[1] for op in drawn], minlength=11) / len(drawn)
    assert levels[0] == levels[10] == 0 and levels[1:10] == pytest.approx(1 / 9, abs=0.008)
    assert np.mean([op[2] for op in drawn]) == pytest.approx(0, abs=0.02)
    geometric = [any(op[0] in ts.GEOMETRIC for op in ts.draw_operations(rng, 3)) for _ in range(n)]
    assert np.mean(geometric) == pytest.approx(0.4457, abs=0.015)
    assert len(ts.draw_operations(np.random.default_rng(1), 300)) > 100 and ts.draw_operations(rng, 0) == []


@pytest.mark.parametrize("size, mean", [((321, 321), 0.0281), ((256, 512), 0.0222)])
def test_coverage_of_the_cutouts(size, mean):
    rng, cfg, image = np.random.default_rng(0), config(draws=0), torch.zeros(3, *size, dtype=torch.uint8)
    areas = [(ts.strong(image, rng, cfg)[0][0] == 127).sum().item() for _ in range(120)]
    assert max(areas) <= 3072 and np.mean(areas) / (size[0] * size[1]) == pytest.approx(mean, abs=0.0008)


def test_strong_is_a_function_of_the_generator():
    image = painted(ids(0, 40, 40))[0]
    runs = [ts.strong(image, np.random.default_rng(seed), config()) for seed in (1, 1, 2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert not torch.equal(runs[0][0], runs[2][0]) and not torch.equal(runs[2][0], runs[3][0])


# ---- losses (Eq. 1-5)

def naive_cross_entropy(logits, y):
    terms = []
    for b, row, column in np.ndindex(*y.shape):
        if y[b, row, column] != 255:
            z = logits[b, :, row, column].double()
            terms.append(-(z[y[b, row, column]] - z.exp().sum().log()).item())
    return sum(terms) / len(terms)


def test_eq2_eq3_cross_entropy():
    logits, y = normal(0, 3, C, 4, 6), ids(1, 3, 4, 6)
    y[0, 0], y[2] = 255, 255
    assert ts.cross_entropy(logits, y.byte(), CTX).item() == pytest.approx(naive_cross_entropy(logits, y), rel=1e-5)
    for c, value in ((21, 3.044522), (19, 2.944439)):
        assert ts.cross_entropy(torch.zeros(1, c, 3, 3), torch.zeros(1, 3, 3).long(), CTX).item() == pytest.approx(value, abs=1e-5)
    rows = logits[:0].requires_grad_()
    assert ts.cross_entropy(rows, y[:0], CTX).item() == 0  # a process without labelled images


def test_eq1_consistency():
    """Hard and soft, against loops over pixels; pooled over all images, not a mean of their means."""
    logits, teacher = normal(0, 2, C, 6, 7), 2 * normal(1, 2, C, 6, 7)
    index = torch.stack([ts.source_map("rotate", 27, 6, 7), ts.source_map("translate_x", 3, 6, 7)]).int()
    ignore = torch.zeros(2, 6, 7, dtype=torch.bool)
    ignore[0, 2] = True
    hard, soft, hard_ignored = [], [], []
    for b, v, u in np.ndindex(2, 6, 7):
        if index[b, v, u] >= 0:
            y, x = divmod(int(index[b, v, u]), 7)
            log_q = logits[b, :, v, u].double().log_softmax(0)
            hard.append(-log_q[teacher[b, :, y, x].argmax()].item())
            soft.append(-(teacher[b, :, y, x].double().softmax(0) * log_q).sum().item())
            if not ignore[b, y, x]:
                hard_ignored.append(hard[-1])
    assert len(hard_ignored) < len(hard) < 84 and (index[0] < 0).sum() != (index[1] < 0).sum()
    assert ts.consistency(logits, teacher, index, CTX).item() == pytest.approx(np.mean(hard), rel=1e-5)
    assert ts.consistency(logits, teacher, index, CTX, "soft").item() == pytest.approx(np.mean(soft), rel=1e-5)
    assert ts.consistency(logits, teacher, index, CTX, ignore=ignore).item() == pytest.approx(np.mean(hard_ignored), rel=1e-5)
    same = torch.arange(42).view(6, 7).expand(2, 6, 7)
    expected = -logits.log_softmax(1).amax(1).mean().item()  # A identity and teacher == student
    assert ts.consistency(logits, logits, same, CTX).item() == pytest.approx(expected, rel=1e-5)


def test_losses_of_nothing_are_zero_with_a_graph():
    logits = normal(0, 1, C, 4, 4).requires_grad_()
    nowhere, void = torch.full((1, 4, 4), -1), torch.full((1, 4, 4), 255)
    for loss in (ts.cross_entropy(logits, void, CTX), ts.consistency(logits, logits, nowhere, CTX),
                 ts.consistency(logits, logits, nowhere, CTX, "soft")):
        loss.backward()
        assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_losses_are_fp32_under_autocast():
    logits = (10 * normal(0, 1, C, 8, 8)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert ts.cross_entropy(logits, ids(0, 1, 8, 8), CTX).dtype == torch.float32
        assert ts.consistency(logits, logits, torch.arange(64).view(1, 8, 8), CTX, "soft").dtype == torch.float32
        logits, g = ts.MultiTask(config(), C, 2).eval()(normal(0, 1, 3, 24, 24))
    assert logits.dtype == g.dtype == torch.float32  # resized in full precision


def test_alpha():
    cfg = config(steps=60000)
    for step, value in ((0, 0.99), (19999, 0.99), (20000, 0.995), (39999, 0.995), (40000, 0.9975), (49999, 0.9975),
                        (50000, 0.999), (59999, 0.999)):
        assert ts.alpha(step, cfg) == value
    assert ts.alpha(34, config(steps=100)) == 0.995 and ts.alpha(99, config(steps=100)) == 0.999
    assert ts.alpha(5, config(ema=0.0)) == 0 and ts.alpha(5, config(ema=0.9)) == 0.9


def test_teacher_follows_weights_and_statistics():
    """theta' after t steps of a still student: (1 - alpha^t) of the way; 0.633968 for 0.99 and 100."""
    student, teacher = ts.MultiTask(config(), C, 2), ts.MultiTask(config(), C, 2)
    start = [v.clone() for v in teacher.state_dict().values() if v.is_floating_point()]
    with torch.no_grad():
        for value in student.state_dict().values():
            value.add_(1)
    for _ in range(100):
        ts.update_ema(teacher, student, 0.99, buffers="ema")
    for name, value in teacher.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value - start.pop(0), torch.full_like(value, 0.633968), rtol=1e-3, atol=1e-3)
    ts.update_ema(teacher, student, 0.0, buffers="ema")  # Table VI: no EMA
    assert same_state(teacher.state_dict(), student.state_dict())


def test_balance_of_the_paper():
    for labels in (100, 372, 744):
        assert ts.balance("cityscapes", labels) == (1, 0.5)
    assert ts.balance("cityscapes", 1488) == (3, 0.5)
    assert [ts.balance("voc", n) for n in (106, 212, 529, 1323)] == [(1, 0.25), (1, 0.25), (1, 1.25), (2, 0.625)]
    assert ts.balance("voc", 50) == (1, 0.25) and ts.balance("voc", 1464) == (2, 0.625) and ts.balance("camvid", 10) == (1, 0.5)
    city, voc = (parse(ts.Config, ts.PRESETS, ["--data", d])[0] for d in ("cityscapes", "voc"))
    assert (city.batch, city.size, city.crop, city.scale, city.lr, city.steps) == (5, (512, 1024), (256, 512), (1, 1), 3e-5, 60000)
    assert (voc.batch, voc.crop, voc.scale, voc.flip, voc.size) == (10, (321, 321), (0.5, 1.5), True, None)
    assert round(city.stage1_share * 60000) == 20000 and round(voc.stage1_share * 60000) == 10000


# ---- data

@pytest.fixture(scope="module")
def folder_data(tmp_path_factory):
    root = fixtures.make_folder(tmp_path_factory.mktemp("data") / "folder")
    return root, open_dataset("folder", str(root))


def write_masks(data, folder, size=None, value=None):
    """Pseudo-masks of the right shapes, random or constant"""
    for i, key in enumerate(data.train.keys):
        shape = size or data.train.image(i).shape[:2]
        mask = ids(i, *shape, classes=4).numpy() if value is None else np.full(shape, value)
        fixtures.save_gray(folder / f"{key}.png", mask)
    return folder


SAMPLE = dict(data="folder", batch=5, batch_l=2, crop=(40, 48), seed=1)


def test_minibatches(folder_data, tmp_path, monkeypatch):
    """The first --batch-l images of a minibatch are labelled ones; the others cover all images once per pass, and only
    labelled images' masks are opened."""
    _, data = folder_data
    labelled, cfg, opened = [0, 3, 4], config(**SAMPLE), []
    mask = data.train.mask
    monkeypatch.setattr(data.train, "mask", lambda i: opened.append(i) or mask(i))
    stream = ts.Minibatches(data, labelled, write_masks(data, tmp_path), 2, cfg)
    samples = [stream[p] for p in range(15)]
    assert sorted(opened) == [0, 0, 3, 3, 4, 4]
    for p, (x, x_s, index, y, pseudo) in enumerate(samples):
        assert x.shape == x_s.shape == (3, 40, 48) and index.shape == y.shape == pseudo.shape == (40, 48)
        assert (x.dtype, index.dtype, y.dtype, pseudo.dtype) == (torch.float32, torch.int32, torch.uint8, torch.uint8)
        identity = torch.arange(40 * 48).view(40, 48)
        if p % 5 < 2:
            assert torch.equal(x, x_s) and torch.equal(index, identity.int()) and (y < 255).any()
        else:
            assert not torch.equal(x, x_s) and (y == 255).all()
    n = len(data.train)
    assert sorted(stream.mixed.index(k) for k in range(n)) == list(range(n))
    assert sorted(stream.labelled.index(k) for k in range(3)) == labelled
    again = ts.Minibatches(data, labelled, tmp_path, 2, cfg)
    assert all(torch.equal(a, b) for a, b in zip(again[7], samples[7]))
    other = ts.Minibatches(data, labelled, tmp_path, 3, cfg)
    assert not torch.equal(other[7][0], samples[7][0])
    weak = ts.Minibatches(data, labelled, None, 2, dataclasses.replace(cfg, strong=False))[7]
    assert torch.equal(weak[0], weak[1]) and torch.equal(weak[2], identity.int()) and (weak[4] == 255).all()
    assert torch.equal(weak[0], samples[7][0])  # the weak view does not depend on A


def test_truth_and_pseudo_mask_stay_on_their_image():
    """Image, truth and pseudo-mask are shifted, cropped and flipped together: an image painted from its mask shows it."""
    mask = ids(0, 6, 8).repeat_interleave(10, 0).repeat_interleave(10, 1)
    image, palette = painted(mask)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x, maps, padding = ts.weak(image, torch.stack([mask, mask]).byte(), rng, config(scale=(1.0, 1.0), crop=(64, 50), shift=3))
        assert x.shape == (3, 64, 50) and torch.equal(maps[0], maps[1])
        assert torch.equal(padding, maps[0] == 255)
        assert torch.equal(x.permute(1, 2, 0)[~padding], palette[maps[0][~padding].long()])


def test_scales_padding_and_flip():
    image, maps = torch.full((3, 100, 120), 200, dtype=torch.uint8), torch.ones(2, 100, 120, dtype=torch.uint8)
    seen = set()
    for seed in range(150):
        x, m, padding = ts.weak(image, maps, np.random.default_rng(seed), config(scale=(0.5, 1.5), crop=(150, 180)))
        seen.add((~padding).sum().item())
        z = ts.normalise(x, padding)
        assert (z[:, padding] == 0).all() and (z[:, ~padding] != 0).all() and (m[:, padding] == 255).all()
        assert (m[:, ~padding] == 1).all()
    assert seen == {round(100 * s / 10) * round(120 * s / 10) for s in range(5, 16)}  # 0.5, 0.6, .., 1.5
    half = image.clone()
    half[..., :60] = 0
    flips = [ts.weak(half, maps, np.random.default_rng(s), config())[0][0, 0, 0].item() for s in range(60)]
    assert 15 < flips.count(200) < 45
    assert all(ts.weak(half, maps, np.random.default_rng(s), config(flip=False))[0][0, 0, 0] == 0 for s in range(9))


def test_value_space_of_a(folder_data):
    """Without operations the student's view is the weak one on RGB; in the min-max space of the released code it is
    darker by up to a grey step of that range, and a cutout is the middle of the range."""
    _, data = folder_data
    for space in ("rgb", "minmax"):
        cfg = config(**SAMPLE, draws=0, cutouts=0, aug_space=space)
        x, x_s, *_ = ts.Minibatches(data, [0], None, 2, cfg)[3]
        low, high = x.min(), x.max()
        assert torch.equal(x, x_s) == (space == "rgb")
        assert -1e-5 < (x - x_s).min() and (x - x_s).max() <= 1.001 * (high - low) / 255
        cut = ts.Minibatches(data, [0], None, 2, dataclasses.replace(cfg, cutouts=1, cutout=200))[3][1]
        middle = low + 127 / 255 * (high - low) if space == "minmax" else ts.normalise(torch.full((3, 1, 1), 127).byte())
        torch.testing.assert_close(cut, middle.expand_as(cut))


def test_static_void(folder_data, tmp_path):
    split = types.SimpleNamespace(mask=lambda i: masks[i])
    masks = [np.array([[255, 255, 1], [0, 255, 2]], np.uint8), np.array([[255, 3, 255], [0, 255, 2]], np.uint8)]
    assert ts.static_void(split, [0, 1], None).tolist() == [[True, False, False], [False, True, False]]
    masks.append(np.zeros((3, 3), np.uint8))
    assert ts.static_void(split, [0, 1, 2], None) is None and ts.static_void(split, [0, 1, 2], (2, 2)).shape == (2, 2)
    _, data = folder_data
    cfg = config(**SAMPLE | dict(size=(40, 48), crop=None, strong=False, static_void=True))
    stream = ts.Minibatches(data, [0, 1], write_masks(data, tmp_path, (40, 48), 1), 2, cfg)
    assert stream.static.dtype == torch.bool
    stream.static = torch.zeros(40, 48, dtype=torch.bool)
    stream.static[5:9] = True
    pseudo = stream[3][4]
    assert (pseudo[5:9] == 255).all() and (pseudo == 255).sum() == 4 * 48  # the flip is left-right


def test_foreign_or_missing_pseudo_masks(folder_data, tmp_path):
    with pytest.raises(UserError, match="nothing.png: cannot be read as a pseudo-mask"):
        ts.read_mask(tmp_path / "nothing.png", (4, 4), C)
    fixtures.save_gray(tmp_path / "small.png", ids(0, 90, 90).numpy())
    with pytest.raises(UserError, match="small.png: expected a pseudo-mask"):
        ts.read_mask(tmp_path / "small.png", (4, 4), C)
    with pytest.raises(UserError, match=r"ids 0..3 with .* up to 4"):
        ts.read_mask(tmp_path / "small.png", (90, 90), 4)
    Image.fromarray(ids(0, 90, 90).numpy().astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="deep.png: expected .* found uint16"):
        ts.read_mask(tmp_path / "deep.png", (90, 90), C)
    (tmp_path / "torn.png").write_bytes((tmp_path / "small.png").read_bytes()[:500])
    with pytest.raises(UserError, match="torn.png: cannot be read"):
        ts.read_mask(tmp_path / "torn.png", (90, 90), C)


class Toy(nn.Module):
    """A segmenter of one convolution, for 4 classes"""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


def stored(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("size", [None, (40, 48)])
def test_pseudo_masks(folder_data, tmp_path, size):
    """One 8-bit PNG of argmax f(x) per training image, at the training size; the same bytes whether written in one go,
    by two processes, or by a writer that was interrupted."""
    _, data = folder_data
    cfg, f = config(data="folder", batch=4, size=size, workers=2), Toy()
    ts.write_pseudo_masks(f, data, tmp_path / "one", cfg, CTX)
    for i in range(len(data.train)):
        x = torch.from_numpy(data.train.image(i)).permute(2, 0, 1)
        x = ts.normalise(ts.T.resize(x, None, size)[0] if size else x)
        ids_ = np.array(Image.open(ts.mask_path(tmp_path / "one", data.train, i)))
        assert ids_.dtype == np.uint8 and np.array_equal(ids_, f(x[None]).argmax(1)[0].numpy())
    whole = stored(tmp_path / "one")
    assert len(whole) == len(data.train) and not list(tmp_path.rglob("*.tmp"))
    for rank in (0, 1):
        half = Runtime("cpu", "fp32")
        half.rank, half.world, half.barrier = rank, 2, lambda: None
        ts.write_pseudo_masks(f, data, tmp_path / "two", cfg, half)
    assert stored(tmp_path / "two") == whole
    for k, name in enumerate(whole):
        if k % 3 == 0:
            (tmp_path / "two" / name).unlink()
    calls = []
    f.register_forward_hook(lambda *_: calls.append(1))
    ts.write_pseudo_masks(f, data, tmp_path / "two", cfg, CTX)
    assert stored(tmp_path / "two") == whole and calls
    calls.clear()
    ts.write_pseudo_masks(f, data, tmp_path / "two", cfg, CTX)
    assert not calls  # nothing left to do


def test_mask_quality_is_that_on_hidden_labels(folder_data, tmp_path):
    _, data = folder_data
    hidden = [1, 2]
    for i in range(len(data.train)):
        ids_ = data.train.mask(i) if i in hidden else np.full(data.train.image(i).shape[:2], 3)
        fixtures.save_gray(tmp_path / f"{data.train.keys[i]}.png", np.where(ids_ == 255, 0, ids_))
    unlabelled = [i for i in range(len(data.train)) if i in hidden or not data.train.has_mask(i)]
    assert len(unlabelled) == 5 and ts.mask_quality(data, unlabelled, tmp_path, config(), CTX) == 1.0
    fixtures.save_gray(tmp_path / f"{data.train.keys[1]}.png", np.zeros(data.train.mask(1).shape))
    assert ts.mask_quality(data, unlabelled, tmp_path, config(), CTX) < 1
    assert ts.mask_quality(data, [i for i in unlabelled if i not in hidden], tmp_path, config(), CTX) is None


# ---- runs

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Flags of a run of three stages of two steps; --out is the test's."""
    root = fixtures.make_folder(tmp_path_factory.mktemp("data") / "folder")
    return ["--data", "folder", "--root", root, "--labeled", 4, "--batch", 4, "--batch-l", 2, "--backbone", "resnet18",
            "--backbone-layers", 2, "--aspp-rates", "1,2", "--weights", "none", "--device", "cpu", "--crop", 40, "--cutout", 8,
            "--lr", 0.003, "--workers", 0, "--steps", 2, "--stage1-share", 1, "--eval-every", 100, "--save-every", 1,
            "--log-every", 1]


def here(*arguments):
    return ts.main([*map(str, arguments)])


def last(folder, stage=3):
    state = checkpoint.load(folder / f"stage{stage}/last.pt")
    for name in ("out", "workers", "stages"):
        state["config"].pop(name)
    return state


def rows(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def column(folder, name):
    return {int(row["step"]): float(row[name]) for row in rows(folder) if row.get(name)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """A run of three stages that nobody disturbed"""
    folder, output = tmp_path_factory.mktemp("whole") / "run", io.StringIO()
    with contextlib.redirect_stdout(output):
        here(*tiny, "--out", folder)
    return folder, output.getvalue()


def same_run(a, b, stages=3):
    for stage in range(1, stages + 1):
        assert same_state(last(a, stage), last(b, stage)), stage
        assert stored(a / f"stage{stage}") == stored(b / f"stage{stage}")
    for name in ("loss_seg", "loss_con", "loss_pl"):
        assert column(a, name) == column(b, name)


def palette():
    return np.concatenate([fixtures.voc_palette()[:1], [[0, 128, 0]], fixtures.voc_palette()[2:3], [[70, 130, 180]]])


def test_run_folder_and_output(whole):
    folder, output = whole
    assert {"config.json", "log.csv", "last.pt", "best.pt", "curves.png", "predictions.png"} <= set(os.listdir(folder))
    final = output.strip().splitlines()[-1]
    assert final.startswith("final: mIoU ") and "(best " in final and final.endswith(str(folder))
    assert "tall tree" in output and "on hidden labels" in output and "mIoU of the stages: S1 " in output
    assert sorted(column(folder, "loss_seg")) == [1, 2, 3, 4, 5, 6] and sorted(column(folder, "loss_con")) == [3, 4, 5, 6]
    assert [column(folder, "stage")[k] for k in range(1, 7)] == [1, 1, 2, 2, 3, 3]
    assert sorted(column(folder, "miou")) == [2, 4, 6] and sorted(column(folder, "miou_student")) == [4, 6]
    assert sorted(column(folder, "miou_branch")) == [4, 6]
    config = json.loads((folder / "config.json").read_text())
    assert (config["lambda_con"], config["bn"], config["batch_l"]) == (0.5, "learn", 2)
    for stage in (1, 2):
        assert len(stored(folder / f"stage{stage}")) == 9 and (folder / f"stage{stage}/finished.pt").exists()
    assert len(checkpoint.load(folder / "stage1/panel.pt")["predictions"]) == 2  # what the panels of later stages show


def test_panel_shows_image_stages_and_truth(whole, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(ts, "prediction_panel", lambda rows, palette, names, titles: shown.append((rows, titles)) or Image.new("L", (1, 1)))
    folder, cfg = whole[0], ts.from_dict(ts.Config, json.loads((whole[0] / "config.json").read_text()))
    data, kept = open_dataset("folder", cfg.root), (folder / "stage3/panel.pt").read_bytes()
    constant = lambda x: torch.eye(4)[2][None, :, None, None].expand(-1, -1, *x.shape[2:])
    ts.stage_panel(constant, 3, data, Path(shutil.copytree(folder, tmp_path / "copy")), cfg, Runtime("cpu"))
    (rows, titles), = shown
    assert tuple(titles) == ("image", "Stage 1", "Stage 2", "Stage 3", "truth") and len(rows) == 2
    for i, (image, first, second, third, truth) in enumerate(rows):
        assert np.abs(image.astype(int) - data.val.image(i)).max() <= 1 and np.array_equal(truth, data.val.mask(i))
        assert np.array_equal(first, checkpoint.load(folder / "stage1/panel.pt")["predictions"][i].numpy())
        assert (third == 2).all() and second.shape == truth.shape
    assert (folder / "stage3/panel.pt").read_bytes() == kept


def test_stages_start_over(whole, tiny):
    """f starts alike in every stage, with an empty optimiser; only the masks connect the stages."""
    states = [last(whole[0], stage) for stage in (1, 2, 3)]
    assert [state["optimizer"]["state"][0]["step"].item() for state in states] == [2, 2, 2]
    assert ["teacher" in state for state in states] == [False, True, True]
    for state in states[1:]:
        f = {name[2:]: value for name, value in state["teacher"].items() if name.startswith("f.")}
        assert same_state(f, dict(state["net"])) and not same_state(f, {n[2:]: v for n, v in state["student"].items()
                                                                       if n.startswith("f.")})
    assert same_state(dict(checkpoint.load(whole[0] / "last.pt")["net"]), dict(states[2]["net"]))


def test_finished_run_is_not_trained_again(whole, tiny, capsys):
    folder, output = whole
    masks, before = stored(folder), last(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("pseudo/*.png")}
    here(*tiny, "--out", folder)
    assert capsys.readouterr().out.strip().splitlines()[-1] == output.strip().splitlines()[-1]
    assert same_state(before, last(folder)) and stored(folder / "stage2") == {k.relative_to("stage2"): v for k, v in
                                                                             masks.items() if k.parts[0] == "stage2"}
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("pseudo/*.png")}


def test_kill_9_at_random_moments_then_resume_is_bit_equal(whole, tiny, tmp_path):
    """Kills fall into every stage, steps and saves alike, and into the writing of pseudo-masks."""
    rng, folder = random.Random(0), tmp_path / "run"
    marks = [lambda: (folder / "stage1/last.pt").exists(), lambda: len(list(folder.glob("stage1/pseudo/train/*.png"))) > 1,
             lambda: (folder / "stage2/last.pt").exists(), lambda: (folder / "stage3/last.pt").exists()]
    for reached in marks:
        process = start_script(*tiny, "--out", folder, script="three_stage.py")
        wait_for(lambda: process.poll() is not None or reached())
        try:
            process.wait(rng.uniform(0, 0.05))
        except Exception:
            kill(process)
    here(*tiny, "--out", folder, "--workers", 1)
    same_run(whole[0], folder)


class Killed(Exception):
    pass


@pytest.mark.parametrize("where, times", [("save_mask", 3), ("save_mask", 12), ("mask_quality", 1)])
def test_death_while_pseudo_masks_are_written(whole, tiny, tmp_path, monkeypatch, where, times):
    original, calls = getattr(ts, where), []

    def dying(*args):
        calls.append(1)
        if len(calls) == times:
            raise Killed
        return original(*args)
    monkeypatch.setattr(ts, where, dying)
    with pytest.raises(Killed):
        here(*tiny, "--out", tmp_path)
    assert 0 < len(stored(tmp_path)) < 18 and not (tmp_path / "stage3").exists()
    monkeypatch.setattr(ts, where, original)
    here(*tiny, "--out", tmp_path)
    same_run(whole[0], tmp_path)


@pytest.mark.parametrize("at, stage, step, said", [
    (3, 1, 2, "stage 1 is trained; the same command writes its pseudo-masks"), (5, 2, 3, "saved at step 1 of stage 2")])
def test_sigterm_saves_and_exits(whole, tiny, tmp_path, monkeypatch, capsys, at, stage, step, said):
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "stopping", lambda self, due=True: calls.append(1) or len(calls) == at)
        with pytest.raises(SystemExit) as stop:
            here(*tiny, "--save-every", 100, "--out", tmp_path)
    assert stop.value.code == 143 and said in capsys.readouterr().out
    assert last(tmp_path, stage)["step"] == step
    here(*tiny, "--save-every", 100, "--out", tmp_path)
    assert same_state(last(whole[0])["student"], last(tmp_path)["student"])


FLAGS = [["--ema", 0.5, "--con-target", "soft", "--precision", "bf16"], ["--lambda-pl", 0],
         ["--ema", 0, "--branch-stage3", "ghat", "--bn", "affine", "--aug-space", "minmax"]]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(map(str, flags)))
def test_other_settings_train_and_resume(tiny, tmp_path, monkeypatch, flags):
    """Cut off in the middle of Stage 2 and of Stage 3 and started again, every setting ends with the same bits."""
    save, deaths = checkpoint.save, {"stage2", "stage3"}
    here(*tiny, *flags, "--out", tmp_path / "whole")

    def save_and_die(path, state):
        save(path, state)
        if path.name == "last.pt" and path.parent.name in deaths:
            deaths.remove(path.parent.name)
            raise Killed
    monkeypatch.setattr(checkpoint, "save", save_and_die)
    for _ in range(2):
        with pytest.raises(Killed):
            here(*tiny, *flags, "--out", tmp_path / "torn")
    here(*tiny, *flags, "--out", tmp_path / "torn")
    same_run(tmp_path / "whole", tmp_path / "torn")


def test_two_processes_equal_one(tiny, tmp_path):
    """With one labelled image, which only the first process has; masks are shared out, and equal."""
    arguments = [*tiny, "--batch-l", 1, "--lr", 1e-4, "--stages", 2]
    here(*arguments, "--out", tmp_path / "one")
    output = run_script(*arguments, "--out", tmp_path / "two", script="three_stage.py", processes=2)
    assert "2 x CPU" in output and output.count("final: mIoU") == 1
    for name in ("loss_seg", "loss_con", "loss_pl"):
        one, two = column(tmp_path / "one", name), column(tmp_path / "two", name)
        assert one and list(one) == list(two) and list(one.values()) == pytest.approx(list(two.values()), rel=2e-3), name
    one, two = last(tmp_path / "one", 2)["student"], last(tmp_path / "two", 2)["student"]
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), rtol=1e-3, atol=1e-3), name


def trained(tiny, folder, *flags, stage=3):
    here(*tiny, *flags, "--save-every", 2, "--no-check-masks", "--out", folder)
    return last(folder, stage)["student"]


def test_every_flag_of_the_method_changes_the_training(whole, tiny, tmp_path, monkeypatch):
    """No dead option: each of these leads to other weights. Run as Stage 2 alone, on the masks of the whole run."""
    monkeypatch.setattr(ts, "stage_panel", lambda *_: None)  # pictures take most of the time
    monkeypatch.setattr(ts.Log, "curves", lambda self: None)
    alone = ["--masks", whole[0] / "stage1/pseudo", "--stages", 2]
    default = trained(tiny, tmp_path / "default", *alone, stage=2)
    assert same_state(default, last(whole[0], 2)["student"])  # a stage on its own is the stage of a run
    for k, flags in enumerate([
            ["--lambda-con", 1], ["--lambda-con", 0], ["--lambda-pl", 1], ["--con-target", "soft"], ["--no-strong"],
            ["--con-ignore-padding"], ["--ignore-cut"], ["--ema", 0], ["--draws", 9], ["--cutouts", 9], ["--cutout", 20],
            ["--aug-space", "minmax"], ["--aspp-rates", "1,3"], ["--bn", "frozen"], ["--lr-groups", "nominal"],
            ["--weight-decay", 0.1], ["--batch-l", 1], ["--seed", 1], ["--no-flip"], ["--shift", 5], ["--scale", 0.8, 0.9],
            ["--crop", 36], ["--labeled", 3], ["--lr", 0.001], ["--input-scale", "caffe"]]):
        student = trained(tiny, tmp_path / str(k), *alone, *flags, stage=2)
        assert student.keys() != default.keys() or any(not torch.equal(student[n], default[n]) for n in student), flags


def test_a_step_of_stage2_by_hand(whole, tiny, tmp_path):
    """Eq. 4 with lambda 1/4 and 2, one Adam step, one EMA step, from the samples of the first minibatch."""
    here(*tiny, "--masks", whole[0] / "stage1/pseudo", "--stages", 2, "--steps", 1, "--lambda-con", 0.25, "--lambda-pl", 2,
         "--out", tmp_path)
    saved, data = json.loads((tmp_path / "config.json").read_text()), open_dataset("folder", str(tiny[3]))
    cfg = ts.from_dict(ts.Config, saved)
    net, teacher = ts.MultiTask(cfg, 4, 2).train(), ts.MultiTask(cfg, 4, 2).eval()
    labelled, _ = ts.choose_labelled(data, "4", "", 0)
    stream = ts.Minibatches(data, labelled, whole[0] / "stage1/pseudo", 2, cfg)
    x_w, x_s, index, y, pseudo = (torch.stack(part) for part in zip(*(stream[p] for p in range(4))))
    f, g = net(x_s)
    target = teacher(x_w)[0].argmax(1)
    b_target, b_pseudo = target.clone(), pseudo.long()
    for b, v, u in np.ndindex(*index.shape):
        place = int(index[b, v, u])
        b_target[b, v, u] = target[b].flatten()[place] if place >= 0 else 255
        b_pseudo[b, v, u] = pseudo[b].flatten()[place] if place >= 0 else 255
    seg, con, pl = (F.cross_entropy(z, t, ignore_index=255) for z, t in ((f[:2], y[:2].long()), (f, b_target), (g, b_pseudo)))
    for name, value in (("loss_seg", seg), ("loss_con", con), ("loss_pl", pl)):
        assert column(tmp_path, name)[1] == pytest.approx(value.item(), rel=1e-4), name
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr)
    (seg + con / 4 + 2 * pl).backward()
    optimizer.step()
    state = last(tmp_path, 2)
    for name, p in net.named_parameters():  # Adam's first step is lr * sign: where a gradient is 0, float error decides
        assert ((state["student"][name] - p).abs() > 1e-5).float().mean() < 1e-3, name
    for name, value in net.state_dict().items():  # statistics of BN are averaged as well
        if value.is_floating_point():
            start = ts.MultiTask(cfg, 4, 2).state_dict()[name] if "running" in name else before[name]
            torch.testing.assert_close(state["teacher"][name], 0.99 * start + 0.01 * value, rtol=1e-4, atol=1e-4)


def test_branch_and_masks_matter_in_stage3(whole, tiny, tmp_path):
    """--branch-stage3; other masks, other weights; without L_pl the masks do not matter (Fig. 2, Table V d)."""
    masks = [whole[0] / f"stage{k}/pseudo" for k in (1, 2)]
    assert "branch.conv6.0.conv1.weight" in trained(tiny, tmp_path / "ghat", "--masks", masks[1], "--branch-stage3", "ghat")
    gtilde = [trained(tiny, tmp_path / str(k), "--masks", masks[k]) for k in (0, 1)]
    assert same_state(gtilde[1], last(whole[0])["student"]) and not same_state(*gtilde)
    without = [trained(tiny, tmp_path / f"without{k}", "--masks", masks[k], "--lambda-pl", 0) for k in (0, 1)]
    assert same_state(*without) and not any(name.startswith("branch") for name in without[0])
    assert column(tmp_path / "without0", "loss_con") and not column(tmp_path / "without0", "loss_pl")


def test_more_stages_later(whole, tiny, tmp_path, capsys):
    """--stages 1, 2, then 3 in one folder is the run of three stages; fewer stages than there are is refused."""
    for stages in (1, 2, 3):
        here(*tiny, "--stages", stages, "--out", tmp_path)
    same_run(whole[0], tmp_path, 2)
    assert same_state(last(whole[0])["student"], last(tmp_path)["student"])
    assert "stage 1 is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a run of more stages"):
        here(*tiny, "--stages", 2, "--out", tmp_path)


def test_supervised_takes_all_steps_on_labelled_images(tiny, tmp_path, monkeypatch):
    opened = set()
    mask = ts.open_dataset

    def opening(*args):
        data = mask(*args)
        read = data.train.mask
        data.train.mask = lambda i: opened.add(i) or read(i)
        return data
    monkeypatch.setattr(ts, "open_dataset", opening)
    here(*tiny, "--supervised", "--stage1-share", 0.5, "--out", tmp_path)
    assert last(tmp_path, 1)["step"] == 1 + 2 + 2 and len(opened) <= 4 and not (tmp_path / "stage2").exists()
    assert not (tmp_path / "stage1/pseudo").exists()


def test_without_check_masks_hidden_labels_stay_closed(tiny, tmp_path, monkeypatch, capsys):
    labelled = []
    monkeypatch.setattr(ts, "mask_quality", lambda *args: labelled.append(args))
    here(*tiny, "--no-check-masks", "--stages", 2, "--out", tmp_path)
    assert not labelled and "hidden" not in capsys.readouterr().out


@pytest.mark.slow
def test_compile(tiny, tmp_path):
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        here(*tiny, *flags, "--stages", 2, "--lr", 1e-4, "--out", tmp_path / name)
    eager, compiled = column(tmp_path / "eager", "loss_con"), column(tmp_path / "compiled", "loss_con")
    assert eager and list(eager.values()) == pytest.approx(list(compiled.values()), rel=1e-2)


def test_contradicting_flags_are_refused(whole, tiny):
    with pytest.raises(UserError, match="--ema was None, now 0.5"):
        here(*tiny, "--out", whole[0], "--ema", 0.5)


def test_masks_that_are_missing_are_told_before_training(whole, tiny, tmp_path):
    masks = shutil.copytree(whole[0] / "stage1/pseudo", tmp_path / "masks")
    next(masks.rglob("*.png")).unlink()
    with pytest.raises(UserError, match="1 of 9 training images have no pseudo-mask there"):
        here(*tiny, "--masks", masks, "--stages", 2, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sigterm_ends_the_writing_of_masks_at_once(tiny, tmp_path, monkeypatch):
    handlers, save = [], ts.save_mask
    monkeypatch.setattr(ts, "save_mask", lambda *args: handlers.append(signal.getsignal(signal.SIGTERM)) or save(*args))
    here(*tiny, "--stages", 2, "--steps", 1, "--out", tmp_path)
    assert set(handlers) == {signal.SIG_DFL} and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def test_non_finite_loss_stops_the_run(tiny, tmp_path):
    with pytest.raises(UserError, match=r"diverged at step \d.*loss_seg"):
        here(*tiny, "--lr", 1e30, "--steps", 4, "--out", tmp_path / "run")


def test_evaluate_and_predict(whole, tiny, tmp_path, capsys):
    folder, output = whole
    assert here("--evaluate", folder / "last.pt") is None
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "(stage 3, step 6)" in line
    assert line.split("mIoU ")[1].split()[0] == output.split("final: mIoU ")[1].split()[0]
    here("--evaluate", folder / "stage1/last.pt", "--root", tiny[3])
    assert "(stage 1, step 2)" in capsys.readouterr().out
    images = tiny[3] / "images/val"
    here("--predict", folder / "last.pt", "--images", images, "--out", tmp_path / "predicted")
    for path in (tmp_path / "predicted").iterdir():
        assert Image.open(path).mode == "P" and Image.open(path).size == Image.open(next(images.glob(path.stem + ".*"))).size
    with pytest.raises(UserError, match="--lr has no effect"):
        here("--evaluate", folder / "last.pt", "--lr", 1)


@pytest.mark.parametrize("flags, said", [
    ("--lamda-con 3", "unrecognized arguments"), ("--batch 2 --batch-l 2", "--batch 2 --batch-l 2: expected at least one"),
    ("--supervised --masks x", "--supervised uses no pseudo-masks"), ("--stages 0", "--stages: 0: expected at least 1"),
    ("--stage1-share 0", "a share above 0"), ("--masks x --stages 1", "Stage 1 needs none"),
    ("--scale 0.5 1.5", "give a --crop"), ("--masks /nowhere", "640 of 640 training images"), ("--weights nowhere.pth", "no such file"),
    ("--con-target mild", "invalid choice"), ("--evaluate README.md", "not a checkpoint"), ("--aspp-rates a", "list of numbers")])
def test_a_users_mistake_is_one_sentence(tmp_path, capsys, flags, said):
    out = [] if flags.startswith("--evaluate") else ["--out", str(tmp_path / "run")]
    try:
        status = run(lambda: ts.main([*flags.split(), *out]))
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and said in error and "Traceback" not in error


@pytest.mark.parametrize("data", ["voc", "cityscapes", "camvid"])
def test_real_formats(tmp_path, capsys, data):
    """Trees in the datasets' real formats, with each preset's own augmentation, through two stages."""
    root = {"voc": fixtures.make_voc, "cityscapes": fixtures.make_cityscapes, "camvid": fixtures.make_camvid}[data](
        tmp_path / "data")
    small = ["--backbone", "resnet18", "--backbone-layers", 2, "--weights", "none", "--aspp-rates", "1,2", "--batch", 2,
             "--steps", 1, "--stages", 2, "--workers", 0, "--crop", "40x48"]
    small += [] if data == "voc" else ["--size", "48x64"]
    here("--data", data, "--root", root, "--labeled", 2, *small, "--out", tmp_path / "run")
    output = capsys.readouterr().out
    assert "final: mIoU" in output and "on hidden labels" in output
    sizes = {Image.open(path).size for path in (tmp_path / "run/stage1/pseudo").glob("*.png")}
    assert (sizes == {(64, 48)}) == (data != "voc") and len(sizes) == (3 if data == "voc" else 1)
