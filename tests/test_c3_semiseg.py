"""c3_semiseg.py against the paper: each piece versus a slow, obvious version, or numbers worked out by hand; then runs."""
import copy
import csv
import hashlib
import json
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import kill, run_script, same_state, start_script, wait_for
from torch import nn

import c3_semiseg as c3
import fixtures
from common import checkpoint
from common.datasets import choose_labelled
from common.runtime import Random, Runtime
from common.schedules import poly, set_lr
from common.settings import UserError, parse

C = 5
CTX = Runtime("cpu", "fp32")
TINY = ["--data", "folder", "--labeled", "5", "--batch", "2", "--groups", "1", "--backbone", "resnet18", "--backbone-layers",
        "2", "--weights", "none", "--device", "cpu", "--long-side", "48", "--crop", "32", "--lr", "0.01", "--workers", "0",
        "--eval-every", "100", "--save-every", "1", "--log-every", "1", "--burn-in", "0.5", "--views", "2",
        "--aspp-rates", "1,2", "--consist-ramp", "0", "--contrast-ramp", "0"]


def config(**values):
    small = dict(backbone="resnet18", backbone_layers=2, weights="none", bn="learn", head_init="pytorch", backbone_lr_mult=1.0)
    return c3.Config(**{**small, **values})


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(seed, *shape, ignore=0.3, high=C):
    y = torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < ignore, 255, y)


def gradient(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def rng(*key):
    return Random(key or ("test",))


# ---- network and teacher

def full_size(**values):
    """The paper's networks, without storage"""
    cfg = config(backbone="resnet101", backbone_layers=4, bn="frozen", head_init="normal", **values)
    with torch.device("meta"):
        return c3.Segmenter(cfg, 19)


def count(module, trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def test_inv2_parameters():
    net = full_size(aspp_rates=(6, 12, 18, 24))
    assert count(net.net) == 43_901_068 and count(net.net, True) == 43_795_724
    assert count(net.net.head) == 1_400_908 and count(net.projection) == 590_336
    assert count(full_size().net.head) == 700_454  # the two branches that work in the release
    assert full_size(contrast="none").projection is None and full_size(supervised=True).projection is None


@pytest.mark.parametrize("size, cells", [((256, 512), (33, 65)), ((512, 512), (65, 65)), ((512, 1024), (65, 129)),
                                         ((720, 1280), (91, 161))])
def test_inv1_shapes(size, cells):
    net = full_size().eval()
    logits, f = net(torch.empty(1, 3, *size, device="meta"))
    assert logits.shape == (1, 19, *size) and f.shape == (1, 256, *cells)


def test_inv1_all_branches_that_there_are_learn():
    net = c3.Segmenter(config(aspp_rates=(1, 2, 3)), C)
    logits, f = net(normal(0, 2, 3, 32, 32))
    (logits.sum() + f.sum()).backward()
    assert len(net.net.head.branches) == 3 and all(p.grad is not None for p in net.parameters())


def test_segmenter_is_deeplab_and_a_projection_of_its_features():
    net, x = c3.Segmenter(config(bn="frozen"), C), normal(0, 2, 3, 40, 48)
    logits, f = net(x)
    torch.testing.assert_close(logits, net.net(x))  # what is left at inference (inv. 25)
    z = net.net.body(x)
    first, _, second = net.projection
    torch.testing.assert_close(f, second(F.relu(first(z))))


def test_head_initialisation():
    torch.manual_seed(0)
    for init, expected in (("normal", 0.01), ("pytorch", 1 / math.sqrt(3 * 128))):
        weight = c3.Segmenter(config(head_init=init), C).projection[0].weight
        assert weight.std().item() == pytest.approx(expected, rel=0.03), init


@pytest.mark.parametrize("bn", ["frozen", "affine", "learn"])
def test_inv3_batch_normalisation(bn):
    net = c3.Segmenter(config(bn=bn), C).train()
    before = {name: b.clone() for name, b in net.named_buffers()}
    optimizer = c3.make_optimizer(net, config())
    for seed in range(3):
        optimizer.zero_grad()
        net(normal(seed, 2, 3, 32, 32))[0].square().mean().backward()
        optimizer.step()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 10 and all(p.requires_grad == (bn == "learn") for m in norms for p in m.parameters())
    assert same_state(before, dict(net.named_buffers())) == (bn == "frozen")


def test_inv25_optimizer():
    cfg = config(bn="frozen", backbone_lr_mult=0.3, lr=1.2e-4)
    student = c3.Segmenter(cfg, C)
    optimizer = c3.make_optimizer(student, cfg)
    body, heads = optimizer.param_groups
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in student.parameters() if p.requires_grad)
    assert {id(p) for p in body["params"]} <= {id(p) for p in student.net.body.parameters()}
    assert all(group["weight_decay"] == 0 and group["betas"] == (0.9, 0.999) for group in (body, heads))
    set_lr(optimizer, 1.2e-4 * poly(12500, 25000))
    assert (body["lr"], heads["lr"]) == (pytest.approx(0.3 * 6.4306e-5, 1e-4), pytest.approx(6.4306e-5, 1e-4))


@pytest.mark.parametrize("warmup, values", [(True, (1, 0.8888889, 0.8205128, 0.7722474, 0.7354737)),
                                            (False, (1, 0.99, 0.99 ** 2, 0.99 ** 3, 0.99 ** 4))])
def test_inv5_teacher(warmup, values):
    cfg = config(ema_warmup=warmup)
    teacher, student = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
    nn.init.constant_(student.weight, 1.0)
    student.running_mean.fill_(7.0)
    teacher.weight.data.fill_(-3.0)
    for m, value in enumerate(values, 1):
        c3.update_teacher(teacher, student, m, cfg)
        assert teacher.weight.item() == pytest.approx(value, rel=1e-6), m
        assert teacher.running_mean.item() == pytest.approx(7 * value), m  # BN learns: its statistics are averaged too
        student.weight.data.zero_()
        student.running_mean.zero_()


def test_teacher_keeps_frozen_statistics_and_reaches_its_final_decay():
    teacher, student, cfg = nn.BatchNorm2d(1), nn.BatchNorm2d(1), config(bn="frozen")
    student.weight.data.zero_()
    student.running_mean.fill_(7.0)
    c3.update_teacher(teacher, student, 25, cfg)
    assert teacher.weight.item() == pytest.approx(0.99) and teacher.running_mean.item() == 0


# ---- photometry and geometry

class Script:
    """A rng that returns what it is told, call by call"""

    def __init__(self, **values):
        self.values = {name: iter(sequence) for name, sequence in values.items()}

    def __getattr__(self, name):
        return lambda *_: next(self.values[name])


def picture(seed=0, *size):
    return torch.randint(0, 256, (3, *(size or (20, 24))), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_operations_at_their_levels():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(3, 1, 256).contiguous()
    v = torch.arange(256)
    def run(name, x, level):
        return c3.tvf.pil_to_tensor(c3.OPS[name](c3.tvf.to_pil_image(x), level))
    ops = {name: lambda level, name=name: run(name, x, level)[0, 0].long() for name in c3.OPS}
    assert len(ops) == 10
    assert torch.equal(ops["invert"](3), 255 - v)
    assert torch.equal(ops["posterize"](10), v // 16 * 16) and torch.equal(ops["posterize"](9.9), v // 32 * 32)
    assert torch.equal(ops["solarize"](10), v)  # threshold 256: nothing to invert
    assert torch.equal(ops["solarize"](9.9), torch.where(v >= 253, 255 - v, v))
    assert torch.equal(ops["solarize_add"](10), torch.where(v < 128, v + 110, v))
    assert (ops["brightness"](10) - (1.9 * v).clamp(max=255)).abs().max() <= 1
    assert (ops["brightness"](0) - 0.1 * v).abs().max() <= 1
    assert (ops["contrast"](10) - (1.9 * v - 0.9 * 127).clamp(0, 255)).abs().max() <= 2
    assert torch.equal(ops["color"](10), v)  # gray stays gray
    flat = (x // 4 + 50)
    assert run("autocontrast", flat, 5)[0, 0, [0, 255]].tolist() in ([0, 255], [0, 254])  # truncated
    assert torch.equal(run("equalize", x, 5), x)
    assert not torch.equal(run("equalize", picture() // 3, 5), picture() // 3)
    assert not torch.equal(run("sharpness", picture(), 10), picture())


@pytest.mark.parametrize("colour", [(200, 30, 90), (0, 0, 0), (128, 128, 128)])
def test_inv11_photometry_moves_no_pixel(colour):
    x = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 9, 12).contiguous()
    for seed in range(12):
        out = c3.photometry(x, "SR", np.random.default_rng(seed))
        assert out.dtype == torch.uint8 and torch.equal(out, out[:, :1, :1].expand_as(out))


def test_color_jitter_is_four_adjustments_in_the_drawn_order():
    x = c3.tvf.to_pil_image(picture())
    script = Script(uniform=[np.array([0.5, 1.5, 0.7]), 0.2], permutation=[np.array([2, 0, 3, 1])])
    expected = c3.tvf.adjust_saturation(x, 0.7)
    expected = c3.tvf.adjust_hue(c3.tvf.adjust_brightness(expected, 0.5), 0.2)
    assert c3.color_jitter(x, script) == c3.tvf.adjust_contrast(expected, 1.5)
    asked = []
    c3.color_jitter(x, types.SimpleNamespace(permutation=np.arange, uniform=lambda *a: asked.append(a) or np.zeros(a[2:])))
    assert asked == [(0.5, 1.5, 3), (-0.25, 0.25)]


def test_rand_augment_draws():
    """Two of ten with replacement, each applied half of the time, at a level of 10 or a little less"""
    seen = []
    ops = {name: lambda x, level, name=name: seen.append((name, level)) or x for name in c3.OPS}
    generator, counts = np.random.default_rng(0), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c3, "OPS", ops)
        for _ in range(2000):
            before = len(seen)
            c3.rand_augment(None, generator)
            counts.append(len(seen) - before)
    shares = [counts.count(k) / 2000 for k in (0, 1, 2)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    names, levels = zip(*seen)
    assert all(abs(names.count(name) / len(names) - 0.1) < 0.03 for name in c3.OPS)
    assert max(levels) == 10 and np.mean(np.array(levels) == 10) == pytest.approx(0.5, abs=0.05)
    assert 10 - np.mean(levels) == pytest.approx(0.5 / math.sqrt(2 * math.pi), rel=0.1)


def test_rotate():
    image, mask = torch.full((3, 40, 60), 200, dtype=torch.uint8), torch.full((40, 60), 4, dtype=torch.uint8)
    out, turned = c3.rotate(image, mask, 10, Script(integers=[10]))
    invented = turned == 255
    assert set(turned.unique().tolist()) == {4, 255} and 0.03 < invented.float().mean() < 0.2
    fade = F.max_pool2d(F.pad(invented[None].float(), (1, 1, 1, 1), value=1), 5, 1, 1)[0] == 1  # the image is bilinear
    assert (out[:, ~fade] == 200).all() and (out[:, invented] < 110).all()
    assert (out[:, invented] == 0).float().mean() > 0.4
    assert c3.rotate(image, mask, 10, Script(integers=[0]))[0] is image
    mark = torch.zeros(41, 41, dtype=torch.uint8)
    mark[20, 40] = 1  # a point on the right goes up when the angle is positive
    assert c3.rotate(image[:, :41, :41], mark, 10, Script(integers=[10]))[1].eq(1).nonzero().tolist() in ([[16, 40]], [[17, 40]])
    asked = []
    c3.rotate(image, mask, 10, types.SimpleNamespace(integers=lambda *limits: asked.append(limits) or 0))
    assert asked == [(-10, 11)]


def frame(seed=0):
    r = np.random.default_rng(seed)
    return r.integers(0, 256, (50, 70, 3), dtype=np.uint8), r.integers(0, C, (50, 70), dtype=np.uint8)


def views(seed=0, **values):
    cfg = config(**{**dict(crop=(32, 48), teacher_aug="W", student_aug="W"), **values})
    return c3.Augment(cfg, False)(frame()[0], None, np.random.default_rng(seed))[0]


def test_inv11_both_views_share_their_geometry():
    for seed in range(6):
        weak, strong, valid = views(seed)
        assert torch.equal(weak, strong) and weak.shape == (3, 32, 48) and valid.shape == (32, 48)
        again, jittered, same = views(seed, student_aug="S")
        assert torch.equal(weak, again) and torch.equal(valid, same) and not torch.equal(weak, jittered)
    teacher, student, _ = views(teacher_aug="SR", student_aug="SR")
    assert not torch.equal(teacher, student)  # independent draws (Table 5)


def test_invented_corners_are_not_valid():
    invented = [views(seed, rotate=45, crop=(50, 70)) for seed in range(8)]
    black = (0 - torch.tensor(c3.T.IMAGENET_MEAN)) / torch.tensor(c3.T.IMAGENET_STD)
    shares = []
    for weak, _, valid in invented:
        is_black = (weak - black[:, None, None]).abs().amax(0) < 1e-5
        assert not is_black[valid].any() and (is_black.any() or (~valid).float().mean() < 0.05)
        shares.append((~valid).float().mean().item())
    assert max(shares) > 0.15
    assert all(views(seed, rotate=45, crop=(50, 70), mask_invalid=False)[2].all() for seed in range(8))
    assert views(0, rotate=0)[2].all() and not views(0, rotate=0, crop=(60, 48))[2][50:].any()  # padding is invented too


def test_labelled_view():
    cfg = config(crop=(32, 48), rotate=0, flip=False)
    image, mask = frame()
    x, y = c3.Augment(cfg, True)(image, mask, np.random.default_rng(3))
    where = [(i, j) for i in range(19) for j in range(23)
             if torch.equal(c3.T.normalise(torch.from_numpy(image[i:i + 32, j:j + 48]).permute(2, 0, 1)), x)]
    assert len(where) == 1
    (i, j), = where
    assert np.array_equal(mask[i:i + 32, j:j + 48], y.numpy())  # no photometry, and the mask goes along
    turned = [c3.Augment(config(crop=(32, 48)), True)(image, mask, np.random.default_rng(s))[1] for s in range(6)]
    assert any((y == 255).any() for y in turned)
    rescaled = c3.Augment(config(scales=(0.5, 1.0, 2.0), rotate=0), True)
    sizes = {rescaled(image, mask, np.random.default_rng(s))[1].shape for s in range(20)}
    assert sizes == {(25, 35), (50, 70), (100, 140)}
    assert c3.Augment(config(size=(20, 30)), True)(image, mask, np.random.default_rng(0))[0].shape == (3, 20, 30)
    assert c3.Augment(config(long_side=35), True)(image, mask, np.random.default_rng(0))[0].shape == (3, 25, 35)


# ---- CutMix

def test_inv8_boxes():
    box = c3.boxes(400, (256, 512), rng("boxes"))[:, 0]
    rows, columns = box.any(2).sum(1), box.any(1).sum(1)
    assert box.dtype == torch.bool and torch.equal(box.sum((1, 2)), rows * columns)  # a full rectangle
    assert 128 <= rows.min() and rows.max() <= 256 and 256 <= columns.min() and columns.max() <= 512
    assert (box.float().mean((1, 2)) - 0.5).abs().max() <= 0.0025
    assert rows.float().mean().item() / 256 == pytest.approx(0.7213, abs=0.02)
    top = box.any(2).float().argmax(1) / (256 - rows).clamp(min=1)
    assert top[rows < 200].mean().item() == pytest.approx(0.5, abs=0.06) and top.min() == 0
    assert torch.equal(box[:40], c3.boxes(400, (256, 512), rng("boxes"))[:40, 0])


@pytest.mark.parametrize("mode", ["cross", "cross_strict", "intra", "none"])
@pytest.mark.parametrize("groups", [1, 3])
def test_inv9_conservation(mode, groups):
    n, x = 4, normal(0, 2 * groups * 4, 3, 16, 20)
    order, box = c3.pairing(mode, groups, n, rng()), c3.boxes(groups * n, (16, 20), rng("b"))
    mixed, (a, b) = c3.swap(x[order], box), x[order].chunk(2)
    assert torch.equal(mixed[:groups * n] + mixed[groups * n:], a + b)
    inside = box.expand_as(a)
    assert torch.equal(mixed[:groups * n][inside], b[inside]) and torch.equal(mixed[:groups * n][~inside], a[~inside])
    assert torch.equal(c3.swap(mixed, box)[order.argsort()], x)  # un-mixing, to the bit
    member = torch.arange(groups).repeat_interleave(n).repeat(2)  # group of every image
    assert torch.equal(*member[order].chunk(2))
    cross = (order[:groups * n] < groups * n) != (order[groups * n:] < groups * n)
    assert order.sort().values.tolist() == list(range(2 * groups * n))
    assert mode != "cross_strict" or cross.all()
    assert mode != "intra" or not cross.any()
    assert mode != "none" or torch.equal(order, order.sort().values)


def test_inv10_pairs_by_chance():
    order = c3.pairing("cross", 20000, 4, rng("chance")) < 80000
    assert (order[:80000] != order[80000:]).sum().item() / 20000 == pytest.approx(16 / 7, abs=0.03)


def test_box_at_feature_scale_is_the_nearest_pixel():
    box, x = torch.zeros(1, 1, 256, 16, dtype=torch.bool), torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 33, 16)
    box[:, :, [0, 7, 15, 248]] = True  # inv. 22: rows 0, 7, 15, 23, .. 248
    assert c3.swap(x, box)[0, 0, :, 0].nonzero().flatten().tolist() == [0, 1, 2, 32]


# ---- DCRS

def probabilities(confidence, classes, c=3):
    """q [1, C, 1, N] whose argmax and maximum are given; the rest is spread over the other classes"""
    q = ((1 - torch.tensor(confidence)) / (c - 1)).expand(c, -1).clone()
    q[torch.tensor(classes), torch.arange(len(classes))] = torch.tensor(confidence)
    return q[None, :, None]


def run_dcrs(q, thresholds, valid=None, ctx=CTX, **values):
    valid = torch.ones(q.shape[0], *q.shape[2:], dtype=torch.bool) if valid is None else valid
    return c3.confident(q, valid, thresholds, config(**values), ctx)


def toy():
    confidence = [0.95 - 0.05 * i for i in range(10)] + [0.99, 0.98, 0.40, 0.35, 0.341]
    return probabilities([0.99 if c == 0.95 else c for c in confidence], [0] * 10 + [1] * 5)


def test_inv15_worked_example():
    confidence, classes = [.95, .9, .85, .8, .75, .7, .65, .6, .55, .5, .99, .98, .40, .35, .30], [0] * 10 + [1] * 5
    q, thresholds = probabilities(confidence, classes, c=5), torch.full((5,), 0.9)  # .30 is still the largest of five
    expected = {1: (.865, .84, 2, 2), 10: (.67204, .50921, None, None), 22: (.58447, .35909, None, None),
                60: (.55063, .30108, 8, 4)}
    for step in range(1, 61):
        predicted, keep = run_dcrs(q, thresholds)
        if step in expected:
            first, second, kept_0, kept_1 = expected[step]
            assert thresholds.tolist() == pytest.approx([first, second, 0.9, 0.9, 0.9], abs=1e-5)
            assert kept_0 is None or (keep[..., :10].sum(), keep[..., 10:].sum()) == (kept_0, kept_1)
    assert predicted.flatten().tolist() == classes


def naive_thresholds(q, valid, old, s, beta):
    """Sort each class's confidences in Python"""
    new = []
    confidence, predicted = q.max(1)
    for c, before in enumerate(old):
        values = sorted((v for v, k, ok in zip(confidence.flatten().tolist(), predicted.flatten().tolist(),
                                               valid.flatten().tolist()) if k == c and ok), reverse=True)
        new.append(beta * before + (1 - beta) * values[int(len(values) * s)] if values else before)
    return new


@pytest.mark.parametrize("s", [0.0, 0.4, 0.8, 0.99])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_eq6_equals_sorting(s, beta):
    q, valid = (3 * normal(0, 3, 6, 9, 11)).softmax(1), normal(1, 3, 9, 11) > -1
    q[:, 4] = 0  # an absent class
    old = [0.9, 0.5, 0.1, 0.7, 0.33, 0.2]
    thresholds = torch.tensor(old)
    predicted, keep = run_dcrs(q, thresholds, valid, dcrs=s, dcrs_beta=beta)
    assert thresholds.tolist() == pytest.approx(naive_thresholds(q, valid, old, s, beta), rel=1e-6)
    assert thresholds[4] == torch.tensor(0.33)
    assert torch.equal(keep, valid & (q.amax(1) >= thresholds[q.argmax(1)])) and torch.equal(predicted, q.argmax(1))
    if beta == 0:  # inv. 16: floor(n s) + 1 of n
        for c in (0, 1, 2, 3, 5):
            mine = (predicted == c) & valid
            assert keep[mine].sum() == int(mine.sum() * s) + 1


def test_inv16_share_of_many_values():
    confidence = (torch.randperm(100_000, generator=torch.Generator().manual_seed(0)) + 1) / 200_000 + 0.5
    q = torch.stack([confidence, 1 - confidence])[None, :, None]
    assert run_dcrs(q, torch.zeros(2), dcrs_beta=0.0)[1].float().mean().item() == pytest.approx(0.80001, abs=1e-7)


def test_inv17_dcrs_off_and_absent_classes():
    q, thresholds = toy(), torch.full((3,), 0.9)
    for s in (1.0, 2.0):
        assert run_dcrs(q, thresholds, dcrs=s)[1].all() and torch.equal(thresholds, torch.full((3,), 0.9))
    valid = torch.zeros(1, 1, 15, dtype=torch.bool)
    for _ in range(100):
        keep = run_dcrs(q, thresholds, valid)[1]
    assert not keep.any() and torch.equal(thresholds, torch.full((3,), 0.9))  # nothing valid: no pixel, no update


def test_dcrs_sees_the_pixels_of_all_processes():
    q, together = (2 * normal(0, 4, C, 6, 7)).softmax(1), torch.full((C,), 0.9)
    _, keep = run_dcrs(q, together)
    keys = []
    send = types.SimpleNamespace(gather=lambda x: keys.append(x) or x)
    receive = types.SimpleNamespace(gather=lambda _: torch.cat(keys))
    for rank in (0, 1):
        run_dcrs(q[2 * rank:2 * rank + 2], torch.full((C,), 0.9), ctx=send)
    for rank in (0, 1):
        thresholds = torch.full((C,), 0.9)
        _, mine = run_dcrs(q[2 * rank:2 * rank + 2], thresholds, ctx=receive)
        assert torch.equal(thresholds, together) and torch.equal(mine, keep[2 * rank:2 * rank + 2])
    assert keep.any() and not keep.all()


# ---- losses and ramps

def naive_pooled(values, keep, groups):
    parts = [v[k] for v, k in zip(values.double().view(groups, -1), keep.view(groups, -1))]
    return sum(part.mean() if len(part) else torch.zeros(()).double() for part in parts) / groups


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_eq1_cross_entropy(groups):
    logits, y = normal(0, 4, C, 6, 7).requires_grad_(), ids(1, 4, 6, 7)
    y[:2, 3:] = 255  # uneven counts
    y[3] = 255  # with 4 groups one is empty
    values = -logits.double().log_softmax(1).gather(1, y.clamp(max=C - 1)[:, None])[:, 0]
    expected, loss = naive_pooled(values, y != 255, groups), c3.cross_entropy(logits, y, groups)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))
    if groups == 1:
        torch.testing.assert_close(loss, F.cross_entropy(logits, y, ignore_index=255))


def test_inv12_supervised():
    y = ids(0, 2, 6, 7, high=19)
    logits = torch.zeros(2, 19, 6, 7, requires_grad=True)
    assert c3.cross_entropy(logits, y, 1).item() == pytest.approx(math.log(19))
    loss = c3.cross_entropy(logits + 9 * normal(0, 2, 19, 6, 7) * (y == 255)[:, None], y, 1)
    assert loss.item() == pytest.approx(math.log(19)) and not gradient(loss, logits).transpose(0, 1)[:, y == 255].any()
    empty = c3.cross_entropy(logits, torch.full_like(y, 255), 2)
    assert empty == 0 and not gradient(empty, logits).any()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("divide", [True, False])
def test_eq2_consistency(groups, divide):
    logits, q = normal(0, 4, C, 6, 7).requires_grad_(), (2 * normal(1, 4, C, 6, 7)).softmax(1)
    keep = normal(2, 4, 6, 7) > 0.3
    keep[1:3, 2:] = False
    values = -(q.double() * logits.double().softmax(1).log()).sum(1) / (C if divide else 1)
    expected, loss = naive_pooled(values, keep, groups), c3.consistency(logits, q, keep, groups, divide)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def test_inv13_inv14_consistency():
    uniform, keep = torch.zeros(1, 19, 3, 3), normal(0, 1, 3, 3) > 0
    q = uniform.softmax(1)
    assert c3.consistency(uniform, q, keep, 1).item() == pytest.approx(0.1549705)
    assert 50 * c3.consistency(uniform, q, keep, 1).item() == pytest.approx(7.748524)
    q, p = torch.tensor([.7, .2, .1]).view(1, 3, 1, 1), torch.tensor([.5, .3, .2]).view(1, 3, 1, 1)
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    assert c3.consistency(p.log(), q, one, 1, False).item() == pytest.approx(0.8869414)
    assert c3.consistency(p.log(), q, one, 1).item() == pytest.approx(0.2956471)
    logits = p.log().requires_grad_()
    nothing = c3.consistency(logits, q, ~one, 1)
    assert nothing == 0 and not gradient(nothing, logits).any()
    logits, q, keep = normal(1, 2, C, 4, 4), normal(2, 2, C, 4, 4).softmax(1), normal(3, 2, 4, 4) > 0
    loss, hidden = c3.consistency(logits, q, keep, 1), ~keep[:, None]
    twice = (x.repeat(2, *[1] * (x.dim() - 1)) for x in (logits, q, keep))
    torch.testing.assert_close(loss, c3.consistency(*twice, 1))
    other = logits + 3 * hidden * normal(4, 2, C, 4, 4), torch.where(hidden, 1 / C, q)
    torch.testing.assert_close(loss, c3.consistency(*other, keep, 1))


def naive_contrastive(f, keys, classes, valid, tau):
    """Eq. 5, one pair at a time, as it is printed"""
    f, keys = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (f, keys))
    rows, total = [i for i in range(len(f)) if valid[i]], 0
    for i in rows:
        e = {j: (f[i] @ keys[j] / tau).exp() for j in rows}
        negatives = sum(e[k] for k in rows if classes[k] != classes[i])
        positives = [j for j in rows if classes[j] == classes[i] and j != i]
        total = total - sum((e[j] / (e[j] + negatives)).log() for j in positives) / max(len(positives), 1)
    return total / len(rows)


@pytest.mark.parametrize("rows", [512, 7, 1])
def test_eq5_equals_the_double_loop(rows):
    f, keys = normal(0, 26, 8).requires_grad_(), normal(1, 26, 8).requires_grad_()
    classes, valid = ids(2, 26, ignore=0, high=3), normal(3, 26) > -0.8
    assert 15 < valid.sum() < 26
    expected, loss = naive_contrastive(f, keys, classes, valid, 0.15), c3.contrastive(f, keys, classes, valid, 0.15, rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for x in (f, keys):
        torch.testing.assert_close(gradient(loss, x), gradient(expected, x))
        assert not gradient(loss, x)[~valid].any()
    order = torch.randperm(26, generator=torch.Generator().manual_seed(0))  # inv. 20
    torch.testing.assert_close(c3.contrastive(f[order], keys[order], classes[order], valid[order], 0.15, rows), loss)
    torch.testing.assert_close(c3.contrastive(7 * f, 0.1 * keys, classes, valid, 0.15, rows), loss)


def test_eq5_both_sides_of_one_tensor_learn():
    f, classes, valid = normal(0, 12, 8).requires_grad_(), ids(2, 12, ignore=0, high=3), torch.ones(12, dtype=torch.bool)
    both, expected = c3.contrastive(f, f, classes, valid, 0.15, 5), naive_contrastive(f, f, classes, valid, 0.15)
    torch.testing.assert_close(gradient(both, f), gradient(expected, f))
    one = c3.contrastive(f, f.detach(), classes, valid, 0.15, 5)
    assert one == both and not torch.allclose(gradient(one, f), gradient(both, f))


def test_inv18_inv19_inv20_worked_examples():
    f = torch.tensor([[1, 0], [.6, .8], [0, 1], [-1, 0]], requires_grad=True)
    classes, every = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    loss = c3.contrastive(f, f.detach(), classes, every, 0.15)
    assert loss.item() == pytest.approx(1.736970, abs=1e-5) and 1.5 * loss.item() == pytest.approx(2.605455, abs=2e-5)
    keys = torch.tensor([[.8, .6], [1, 0], [0, 1], [-.6, .8]])
    loss = c3.contrastive(f, keys, classes, every, 0.15)
    assert loss.item() == pytest.approx(0.137220, abs=1e-5) and gradient(loss, f).any()
    two = torch.eye(2).repeat_interleave(2, 0)
    assert c3.contrastive(two, two, classes, every, 0.15).item() == pytest.approx(0.002542034, rel=1e-4)
    one = c3.contrastive(f, f, torch.zeros(4, dtype=torch.long), every, 0.15)
    assert one == 0 and torch.equal(gradient(one, f), torch.zeros(4, 2))
    none = c3.contrastive(f, f, classes, ~every, 0.15)
    assert none == 0 and torch.equal(gradient(none, f), torch.zeros(4, 2))


def test_eq5_memory_stays_bounded():
    """Nothing of the size n x n is kept for the backward pass"""
    sizes, f = [], normal(0, 300, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        c3.contrastive(f, f.detach(), ids(0, 300, ignore=0), torch.ones(300, dtype=torch.bool), 0.15, rows=20)
    assert sizes and max(sizes) <= 300 * 5


# ---- sampling (inv. 21, 22)

def grid(hard, easy, others=50):
    """One image: class 1 with so many hard and easy cells, the rest is ignored; -> classes, predicted [1, N]"""
    classes = torch.full((1, hard + easy + others), 255)
    classes[0, :hard + easy] = 1
    predicted = torch.where(torch.arange(classes.shape[1]) < hard, 0, 1)[None]
    return classes, predicted


@pytest.mark.parametrize("available, kept", [
    ((50, 50), (10, 10)), ((5, 100), (5, 15)), ((100, 5), (15, 5)), ((15, 6), (14, 6)), ((0, 40), (0, 20)),
    ((40, 0), (20, 0)), ((10, 11), (10, 10)), ((9, 12), (9, 11))])
def test_inv21_hard_and_easy(available, kept):
    classes, predicted = grid(*available)
    cells, present = c3.sample_views(classes, predicted, rng().uniform(*classes.shape), C)
    mine = cells[0, 1]
    assert present.tolist() == [[False, True, False, False, False]] and len(set(mine.tolist())) == 20
    assert ((mine < available[0]).sum(), (mine >= available[0]).sum()) == kept and mine.max() < sum(available)


def test_inv21_more_than_twenty_cells():
    for hard, easy, present in ((10, 10, False), (0, 20, False), (11, 10, True), (0, 21, True)):
        classes, predicted = grid(hard, easy)
        assert c3.sample_views(classes, predicted, rng().uniform(*classes.shape), C)[1][0, 1] == present
    assert c3.sample_views(*grid(2, 2), rng().uniform(1, 54), C, views=3)[1][0, 1]
    assert not c3.sample_views(*grid(2, 1), rng().uniform(1, 53), C, views=3)[1][0, 1]


def test_sampling_is_uniform_and_within_its_class():
    classes, predicted = ids(0, 3, 200), ids(4, 3, 200, ignore=0)
    for seed in range(3):
        for hard in (True, False):
            cells, present = c3.sample_views(classes, predicted, rng(seed).uniform(3, 200), C, 8, hard)
            assert cells.shape == (3, C, 8) and present.all()
            for b, c in np.ndindex(3, C):
                assert (classes[b, cells[b, c]] == c).all() and len(set(cells[b, c].tolist())) == 8
                wrong = (predicted[b, cells[b, c]] != c).sum()
                n = [((classes[b] == c) & ((predicted[b] == c) == easy)).sum() for easy in (False, True)]
                assert not hard or wrong == (min(n[0], 4) if n[1] >= 4 else 8 - n[1])
    times = torch.zeros(70)
    classes, predicted = grid(20, 30, 20)
    for seed in range(600):
        times[c3.sample_views(classes, predicted, rng(seed).uniform(1, 70), C)[0][0, 1]] += 1 / 600
    assert (times[:20] - 10 / 20).abs().max() < 0.09 and (times[20:50] - 10 / 30).abs().max() < 0.09 and not times[50:].any()
    times.zero_()
    for seed in range(600):
        times[c3.sample_views(classes, predicted, rng(seed).uniform(1, 70), C, hard=False)[0][0, 1]] += 1 / 600
    assert (times[:50] - 20 / 50).abs().max() < 0.09


def image_set(seed, b=2):
    """(embeddings, keys, class map, logits) of b images of 32x48 whose grid is 8x12; every class is large enough"""
    coarse = torch.randint(0, 4, (b, 4, 6), generator=torch.Generator().manual_seed(seed))
    classes = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    classes[:, :2] = 255
    return [normal(seed, b, 6, 8, 12).requires_grad_(), normal(seed + 1, b, 6, 8, 12), classes, normal(seed + 2, b, 4, 32, 48)]


def naive_contrast(sets, groups, cfg, r):
    """The same sampling, image by image and class by class, then Eq. 5 within each group"""
    members = [([], [], []) for _ in range(groups)]
    for f, keys, classes, logits in sets:
        rows, columns = ([k * big // few for k in range(few)] for big, few in zip(classes.shape[1:], f.shape[2:]))
        small = classes[:, rows][:, :, columns]
        predicted = F.interpolate(logits, f.shape[2:], mode="bilinear", align_corners=False).argmax(1)
        u = r.uniform(len(f), len(rows) * len(columns))
        for b in range(len(f)):
            for c in set(range(4)) - set(cfg.skip_classes):
                cells = (small[b].flatten() == c).nonzero().flatten()
                if len(cells) <= cfg.views:
                    continue
                wrong = predicted[b].flatten()[cells] != c
                hard, easy = (sorted(cells[w].tolist(), key=lambda cell: u[b, cell].item()) for w in (wrong, ~wrong))
                half = cfg.views // 2
                k = min(len(hard), half) if len(easy) >= cfg.views - half else cfg.views - len(easy)
                chosen = hard[:k] + easy[:cfg.views - k] if cfg.sampling == "hard" else sorted(
                    cells.tolist(), key=lambda cell: u[b, cell].item())[:cfg.views]
                at = members[b * groups // len(f)]
                at[0].extend(f[b].flatten(1).T[chosen])
                at[1].extend(keys[b].flatten(1).T[chosen])
                at[2].extend([c] * len(chosen))
    losses = [naive_contrastive(torch.stack(f), torch.stack(k), c, [True] * len(c), cfg.tau) for f, k, c in members]
    return sum(losses) / groups


@pytest.mark.parametrize("values", [{}, dict(sampling="random"), dict(skip_classes=(0, 2)), dict(contrast_scale=1.0),
                                    dict(tau=0.5)])
@pytest.mark.parametrize("groups, kinds", [(1, 2), (2, 2), (2, 1)])
def test_eq5_over_labelled_and_unlabelled_images(groups, kinds, values):
    cfg, sets = config(views=4, **values), [image_set(0), image_set(10)][:kinds]
    loss = c3.contrast(sets, groups, cfg, rng("views"))
    scale = 1.0 if cfg.contrast_scale else cfg.tau / 0.1
    expected = scale * naive_contrast(sets, groups, cfg, rng("views"))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and loss > 1
    for f, keys, _, _ in sets:
        torch.testing.assert_close(gradient(loss, f), gradient(expected, f))
        assert not keys.requires_grad


def test_contrast_of_nothing_is_zero_with_a_graph():
    images = image_set(0)
    images[2] = torch.full_like(images[2], 255)
    loss = c3.contrast([images], 2, config(views=6), rng())
    assert loss == 0 and not gradient(loss, images[0]).any()


def test_inv22_class_map_at_feature_scale():
    """The sampled cells' classes are those of rows 0, 7, 15, 23, .. of 256"""
    seen = []
    f, classes = normal(0, 1, 3, 33, 65), torch.arange(256)[None, :, None].expand(1, 256, 512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c3, "sample_views", lambda classes, *_: seen.append(classes) or (
            torch.zeros(1, 2, 20, dtype=torch.long), torch.zeros(1, 2, dtype=torch.bool)))
        c3.contrast([(f, f, classes, normal(1, 1, 2, 256, 512))], 1, config(), rng())
    rows = seen[0].view(33, 65)[:, 0].tolist()
    assert rows[:5] == [0, 7, 15, 23, 31] and rows[-3:] == [232, 240, 248]


def test_inv6_inv7_schedules():
    cfg = parse(c3.Config, c3.PRESETS, ["--data", "cityscapes"])[0]
    values = [c3.consistency_weight(2250 + t, cfg) for t in (0, 1000, 2000, 3000, 4000, 22749)]
    assert values == pytest.approx([0.336897, 3.002733, 14.325240, 36.580781, 50, 50], abs=1e-5)
    assert c3.consistency_weight(2249, cfg) == 0
    assert [c3.contrast_weight(t, cfg) for t in (0, 250, 9999)] == pytest.approx([6.7379e-4, 0.1, 0.1], rel=1e-4)
    assert [poly(k, 25000) for k in (1, 6250, 12500, 25000)] == pytest.approx([0.99996400, 0.77188951, 0.53588673, 0])
    bdd = c3.Config(**c3.PRESETS["bdd100k"])
    shares = (bdd.burn_in, bdd.consist_ramp, bdd.contrast_ramp)
    assert [round(bdd.steps * share) for share in shares] == [4500, 4000, 250]


def test_section_4_1_is_the_default():
    cfg = parse(c3.Config, c3.PRESETS, ["--data", "cityscapes"])[0]
    paper = dict(steps=25000, batch=16, lr=1.2e-4, crop=(256, 512), size=(512, 1024), tau=0.15, views=20, dcrs=0.8,
                 dcrs_beta=0.9, lambda_1=50, lambda_2=0.1, ema=0.99, rotate=10, flip=True, backbone="resnet101", groups=4, seed=12345)
    assert {name: getattr(cfg, name) for name in paper} == paper
    assert round(cfg.burn_in * cfg.steps) == 2250 and cfg.skip_classes == (0,) and cfg.aspp_rates == (6, 12)


@pytest.mark.parametrize("seed, head", [(12345, [1687, 2342, 392, 1338, 76, 42]), (23456, [1490, 930, 2124, 2684, 182, 654]),
                                        (34567, [696, 2808, 480, 905, 1723, 1855])])
def test_inv24_published_splits(seed, head):
    class Train:
        keys = range(2975)

        def __len__(self):
            return 2975

        def has_mask(self, i):
            return True
    data = types.SimpleNamespace(train=Train(), voc_train=frozenset(), notes=())
    lists = {n: choose_labelled(data, str(n), "", seed) for n in (6, 100, 372, 744)}
    assert lists[6][0] == sorted(head)
    assert {n: len(unlabelled) for n, (_, unlabelled) in lists.items()} == {6: 2969, 100: 2875, 372: 2603, 744: 2231}
    assert set(lists[6][0]) < set(lists[100][0]) < set(lists[372][0]) < set(lists[744][0])
    assert all(not set(a) & set(b) for a, b in lists.values())


def test_published_lists_are_recognised(monkeypatch):
    keys, names = ["jena_000088_000019", "aachen_000000_000019"], "train/aachen/aachen_000000_000019\ntrain/jena/jena_000088_000019"
    monkeypatch.setitem(c3.PUBLISHED, 5, {2: hashlib.sha256(names.encode()).hexdigest()[:16]})
    assert c3.published(config(data="cityscapes", seed=5), keys) == ["labelled images: the published list of 2 for seed 5"]
    assert c3.published(config(data="cityscapes", seed=5), [*keys[:1], "bochum_000000_000313"])[0].count("NOT the published") == 1
    assert c3.published(config(data="camvid", seed=5), keys) == c3.published(config(data="cityscapes", seed=6), keys) == []


# ---- runs

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return [*TINY, "--root", str(fixtures.make_folder(tmp_path_factory.mktemp("data") / "folder"))]


def here(*arguments):
    c3.main([*map(str, arguments)])


def last(folder):
    state = checkpoint.load(folder / "last.pt")
    state["config"].pop("out")
    return state


def column(folder, name):
    with open(folder / "log.csv") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """A run of 6 steps, 3 of them burn-in, that nobody disturbed"""
    folder = tmp_path_factory.mktemp("whole") / "run"
    here(*tiny, "--steps", 6, "--out", folder)
    return folder


def test_run_folder(whole, capsys, tiny):
    files = {"config.json", "log.csv", "last.pt", "best.pt", "curves.png", "predictions.png"}
    assert {path.name for path in whole.iterdir()} >= files
    assert sorted(column(whole, "loss_sup")) == sorted(column(whole, "loss_contrast")) == [1, 2, 3, 4, 5, 6]
    assert sorted(column(whole, "loss_consist")) == sorted(column(whole, "kept")) == [4, 5, 6]
    assert sorted(column(whole, "miou")) == sorted(column(whole, "miou_teacher")) == [6]
    assert column(whole, "w_consist") == {4: 2.63, 5: 2.63, 6: 2.63}
    here(*tiny, "--steps", 6, "--out", whole)  # finished: only scored again
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("final: mIoU ")


def test_inv5_inv23_burn_in_and_first_step(tiny, tmp_path, monkeypatch):
    """In the burn-in neither teacher, thresholds nor unlabelled images are touched; its end copies the student."""
    states, views, save, augment = {}, [], checkpoint.save, c3.Augment.__call__

    def record(path, state):
        save(path, state)
        if path.name == "last.pt":
            states[state["step"]] = last(path.parent)

    def count_views(self, *arguments):
        views.append((self.labelled, len(states)))
        return augment(self, *arguments)
    monkeypatch.setattr(checkpoint, "save", record)
    monkeypatch.setattr(c3.Augment, "__call__", count_views)
    here(*tiny, "--steps", 6, "--out", tmp_path / "run")
    assert same_state(states[1]["teacher"], states[3]["teacher"])
    assert not same_state(states[1]["student"], states[3]["student"])
    assert torch.equal(states[3]["thresholds"], torch.full((4,), 0.9))
    assert not torch.equal(states[4]["thresholds"], states[3]["thresholds"])
    assert min(step for labelled, step in views if not labelled) == 3
    assert same_state(states[4]["teacher"], states[3]["student"])  # to the bit, BN statistics included
    for name, w in states[5]["teacher"].items():
        if w.is_floating_point():
            alpha = 1 - 1 / 9
            torch.testing.assert_close(w, alpha * states[4]["teacher"][name] + (1 - alpha) * states[4]["student"][name])


def test_inv4_teacher_gets_no_gradient(tiny, tmp_path, monkeypatch):
    networks, mode = [], []
    forward = c3.Segmenter.forward

    def watch(self, x):
        logits, f = forward(self, x)
        if not any(self is net for net in networks):
            networks.append(self)
        mode.append((networks.index(self), self.training, logits.requires_grad, len(x)))
        return logits, f
    monkeypatch.setattr(c3.Segmenter, "forward", watch)
    here(*tiny, "--steps", 2, "--out", tmp_path / "run")
    student, teacher = networks
    assert mode == [(0, True, True, 2), (1, False, False, 2), (0, True, True, 4)]  # burn-in; teacher; one mixed batch
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())


@pytest.mark.parametrize("keys", ["student", "teacher"])
def test_four_steps_by_hand(tiny, tmp_path, keys):
    """Two steps of the burn-in and two behind it, from the samples, boxes and weights on: image by image, Eq. 1 to 7."""
    here(*tiny, "--steps", 4, "--lr", 2e-4, "--burn-in", 0.5, "--consist-ramp", 1, "--contrast-ramp", 0.5, "--lambda-1", 50,
         "--lambda-2", 0.5, "--divide-by-classes", "--dcrs-init", 0.3, "--dcrs-beta", 0.5, "--keys", keys, "--out", tmp_path)
    cfg = c3.from_dict(c3.Config, json.loads((tmp_path / "config.json").read_text()))
    data = c3.open_dataset("folder", tiny[-1])
    labelled, unlabelled = choose_labelled(data, "5", "", 0)
    stream_l = c3.Stream(data.train, labelled, c3.Augment(cfg, True), 0, "labelled", True)
    stream_u = c3.Stream(data.train, unlabelled, c3.Augment(cfg, False), 0, "unlabelled", False)
    torch.manual_seed(c3.mix(0, "init"))
    student, thresholds, expected = c3.Segmenter(cfg, 4).train(), [0.3] * 4, []
    start = {name: w.clone() for name, w in student.named_parameters()}
    optimizer = torch.optim.Adam(student.parameters())
    for step in range(4):
        lr = 2e-4 * (1 - step / 4) ** 0.9
        optimizer.param_groups[0]["lr"] = lr
        x_l, y_l = (torch.stack(part) for part in zip(*(stream_l[2 * step + k] for k in range(2))))
        draw, w_consist, w_contrast = CTX.random(0, "views", step), 0.0, 0.5 * math.exp(-5 * max(0, 1 - step / 2) ** 2)
        row = {}
        if step < 2:
            logits, f = student(x_l)
            loss_consist, sets = 0, [(f, f, y_l, logits)]
        else:
            at = 2 * (step - 2)
            x_t, x_s, valid = (torch.stack(part) for part in zip(*(stream_u[at + k] for k in range(2))))
            if step == 2:
                teacher = copy.deepcopy(student).eval()
            else:  # alpha of the second step is 8/9; so are BN's statistics averaged
                with torch.no_grad():
                    mine = student.state_dict()
                    teacher.load_state_dict({name: 8 / 9 * w + 1 / 9 * mine[name] if w.is_floating_point() else w
                                             for name, w in teacher.state_dict().items()})
            with torch.no_grad():
                q, keys_u = teacher(x_t)
                _, keys_l = teacher(x_l)
                q = q.softmax(1)
            cut = CTX.random(0, "cutmix", step)
            order, box = c3.pairing("cross", 1, 2, cut).tolist(), c3.boxes(2, (32, 32), cut)
            images, mixed = [*x_l, *x_s], [None] * 4
            for k in range(2):
                a, b = images[order[k]], images[order[k + 2]]
                mixed[k], mixed[k + 2] = torch.where(box[k], b, a), torch.where(box[k], a, b)
            outputs, logits, f = student(torch.stack(mixed)), [None] * 4, [None] * 4
            for k in range(2):  # every image's own pixels, from the two mixtures that they went to
                for parts, output in zip((logits, f), outputs):
                    inside = F.interpolate(box[k][None].float(), output.shape[2:])[0] > 0
                    parts[order[k]] = torch.where(inside, output[k + 2], output[k])
                    parts[order[k + 2]] = torch.where(inside, output[k], output[k + 2])
            logits, f = torch.stack(logits), torch.stack(f)
            thresholds = naive_thresholds(q, valid, thresholds, 0.8, 0.5)
            confidence, predicted = q.max(1)
            keep = valid & (confidence >= torch.tensor(thresholds)[predicted])
            loss_consist = -(q * logits[2:].log_softmax(1)).sum(1)[keep].mean() / 4
            w_consist = 50 * math.exp(-5 * (1 - (step - 2) / 4) ** 2)
            row = dict(loss_consist=loss_consist, w_consist=w_consist, kept=keep.float().mean(),
                       threshold=sum(thresholds) / 4)
            sets = [(f[:2], keys_l if keys == "teacher" else f[:2].detach(), y_l, logits[:2]),
                    (f[2:], keys_u, torch.where(keep, predicted, 255), logits[2:])]
            logits = logits[:2]
        loss_sup = F.cross_entropy(logits, y_l, ignore_index=255)
        loss_contrast = 1.5 * naive_contrast(sets, 1, cfg, draw)
        optimizer.zero_grad()
        (loss_sup + w_consist * loss_consist + w_contrast * loss_contrast).backward()
        optimizer.step()
        expected.append(dict(loss_sup=loss_sup, loss_contrast=loss_contrast, w_contrast=w_contrast, lr=lr, **row))
    assert 0 < expected[2]["kept"] < 1 and 0 < expected[3]["kept"] < 1
    for name in expected[-1]:
        got = column(tmp_path, name)
        assert got == pytest.approx({k + 1: torch.as_tensor(row[name]).item() for k, row in enumerate(expected)
                                     if name in row}, rel=2e-3), name
    end = last(tmp_path)["student"]
    apart = torch.cat([(end[name] - w.detach()).abs().flatten() for name, w in student.named_parameters()])
    moved = torch.cat([(end[name] - w).abs().flatten() for name, w in start.items()])
    assert moved.mean() > 2e-4 and (apart < 0.05 * moved.mean()).float().mean() > 0.98


@pytest.mark.parametrize("workers", [0, 1])
def test_kill_9_then_resume_is_bit_equal(whole, tiny, tmp_path, workers):
    """One kill in the burn-in, or one behind it"""
    folder, arguments = tmp_path / "run", [*tiny, "--steps", 6, "--workers", workers]
    process = start_script(*arguments, "--out", folder, script="c3_semiseg.py")
    wait_for(lambda: process.poll() is not None or (folder / "log.csv").exists()
             and len((folder / "log.csv").read_text().splitlines()) > 1 + 3 * workers)
    kill(process)
    here(*arguments, "--out", folder)
    expected, got = last(whole), last(folder)
    assert expected["config"].pop("workers") == 0 and got["config"].pop("workers") == workers
    assert same_state(expected, got) and column(whole, "loss_sup") == column(folder, "loss_sup")


class Killed(Exception):
    pass


@pytest.mark.parametrize("at, flags", [
    (1, ["--supervised"]), (1, []), (2, ["--precision", "bf16"]), (3, ["--bn", "frozen", "--keys", "teacher", "--mix", "intra"]),
    (3, ["--contrast", "none", "--dcrs", "1", "--eval-net", "teacher"])])
def test_settings_train_and_resume(tiny, tmp_path, monkeypatch, at, flags):
    """Cut off after a checkpoint before, at or behind the end of the burn-in, every setting ends with the same bits."""
    arguments, save = [*tiny, *flags, "--steps", 4], checkpoint.save
    here(*arguments, "--out", tmp_path / "whole")

    def save_and_die(path, state):
        save(path, state)
        if state["step"] == at:
            raise Killed
    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(Killed):
        here(*arguments, "--out", tmp_path / "torn")
    monkeypatch.setattr(checkpoint, "save", save)
    here(*arguments, "--out", tmp_path / "torn")
    assert same_state(last(tmp_path / "whole"), last(tmp_path / "torn"))


def test_two_processes_equal_one(tiny, tmp_path):
    """Same losses, thresholds and weights as one process with the same groups. In the burn-in the projection head gets no
    gradient here: data parallelism must not wait for one."""
    arguments = [*tiny, "--batch", 4, "--groups", 2, "--steps", 4, "--lr", 1e-4, "--keys", "teacher", "--lambda-2", 1,
                 "--no-contrast-burn-in", "--dcrs-init", 0.2]
    here(*arguments, "--out", tmp_path / "one")
    output = run_script(*arguments, "--out", tmp_path / "two", script="c3_semiseg.py", processes=2)
    assert "2 x CPU" in output and output.count("final: mIoU") == 1
    for name in ("loss_sup", "loss_consist", "loss_contrast", "kept", "threshold"):
        one, two = column(tmp_path / "one", name), column(tmp_path / "two", name)
        assert list(one) == list(two) and len(one) == (4 if name in ("loss_sup", "loss_contrast") else 2), name
        assert max(one.values()) > 0, name
        assert list(one.values()) == pytest.approx(list(two.values()), rel=2e-3), name
    contrast = list(column(tmp_path / "two", "loss_contrast").values())
    assert contrast[:2] == [0, 0] and min(contrast[2:]) > 0
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    torch.testing.assert_close(one["thresholds"], two["thresholds"], rtol=1e-3, atol=0)
    for name in one["student"]:
        torch.testing.assert_close(one["student"][name].float(), two["student"][name].float(), rtol=1e-2, atol=1e-3)


def test_every_flag_of_the_method_changes_the_training(tiny, tmp_path, monkeypatch):
    """No dead option: each of these leads to other weights than the default after three steps."""
    monkeypatch.setattr(c3, "panel", lambda *_: types.SimpleNamespace(save=lambda _: None))  # pictures take most of the time
    monkeypatch.setattr(c3.Log, "curves", lambda _: None)
    base = [*tiny, "--steps", 3, "--save-every", 3, "--burn-in", 0.4, "--lr", 1e-3, "--dcrs-init", 0.2, "--dcrs-beta", 0.5]
    here(*base, "--out", tmp_path / "default")
    default = last(tmp_path / "default")["net"]
    for k, flags in enumerate([
            ["--supervised"], ["--mix", "cross_strict"], ["--mix", "intra"], ["--mix", "none"], ["--contrast", "labelled"],
            ["--contrast", "unlabelled"], ["--contrast", "none"], ["--sampling", "random"], ["--lambda-1", 0], ["--lambda-2", 9],
            ["--teacher-aug", "S"], ["--student-aug", "W"], ["--student-aug", "S"], ["--dcrs", 0.3], ["--dcrs", 1],
            ["--dcrs-beta", 0.1], ["--dcrs-init", 0.9], ["--skip-classes", "0,1"], ["--tau", 0.5], ["--views", 4],
            ["--contrast-scale", 1],
            ["--divide-by-classes"], ["--keys", "teacher"], ["--ema", 0.1], ["--no-ema-warmup"], ["--burn-in", 0.7],
            ["--no-contrast-burn-in"], ["--consist-ramp", 1], ["--contrast-ramp", 1], ["--groups", 2], ["--bn", "frozen"],
            ["--bn", "affine"], ["--head-init", "normal"], ["--aspp-rates", "1,2,3"], ["--backbone-lr-mult", 0.1], ["--rotate", 0],
            ["--no-flip"], ["--scales", 1, 1.5, 2], ["--crop", 40], ["--long-side", 64], ["--seed", 1], ["--labeled", 4],
            ["--no-mask-invalid", "--rotate", 45]]):
        reference = default
        if "--no-mask-invalid" in flags:  # at 10 degrees few crops have corners that are invented
            here(*base, "--rotate", 45, "--out", tmp_path / "turned")
            reference = last(tmp_path / "turned")["net"]
        here(*base, *flags, "--out", tmp_path / str(k))
        net = last(tmp_path / str(k))["net"]
        assert net.keys() != reference.keys() or any(not torch.equal(net[name], reference[name]) for name in net), flags


def test_stride_on_moves_the_stride():
    strides = [c3.make_net(config(backbone="resnet50", stride_on=where), C).body.layer2[0] for where in ("1x1", "3x3")]
    assert [(b.conv1.stride, b.conv2.stride) for b in strides] == [((2, 2), (1, 1)), ((1, 1), (2, 2))]


def test_epochs_count_passes_over_the_unlabelled_images(tiny, tmp_path):
    here(*tiny, "--epochs", 0.5, "--out", tmp_path / "run")  # 4 unlabelled images, 2 per step
    assert last(tmp_path / "run")["step"] == 1


def test_all_labelled_uses_all_images_twice(tiny, tmp_path, capsys):
    here(*tiny, "--labeled", "all", "--steps", 1, "--out", tmp_path / "run")
    assert "6 labelled and 3 unlabelled" in capsys.readouterr().out
    root = fixtures.make_folder(tmp_path / "data", n_unlabeled=0)
    here(*tiny, "--root", root, "--labeled", "all", "--steps", 2, "--out", tmp_path / "full")
    assert "6 labelled and 6 unlabelled" in capsys.readouterr().out


def test_evaluate_and_predict(whole, tiny, tmp_path, capsys):
    root = tiny[-1]
    here("--evaluate", whole / "last.pt", "--root", root)
    student = capsys.readouterr().out.splitlines()[-1]
    assert f"mIoU {100 * column(whole, 'miou')[6]:.1f} on 2 val images, student" in student
    here("--evaluate", whole / "last.pt", "--root", root, "--eval-net", "teacher")
    teacher = capsys.readouterr().out.splitlines()[-1]
    assert f"mIoU {100 * column(whole, 'miou_teacher')[6]:.1f} on 2 val images, teacher" in teacher
    state = last(whole)
    assert not any("projection" in name for name in state["net"]) and any("projection" in name for name in state["student"])
    assert all(torch.equal(w, state["student"]["net." + name]) for name, w in state["net"].items())
    here("--predict", whole / "last.pt", "--images", f"{root}/images/val", "--out", tmp_path / "png")
    assert sorted(p.suffix for p in (tmp_path / "png").iterdir()) == [".png", ".png"]


def test_the_teacher_as_the_headline(tiny, tmp_path, capsys):
    """From the burn-in's end on: before, there is only the student, and its best is forgotten."""
    here(*tiny, "--steps", 4, "--eval-every", 1, "--eval-net", "teacher", "--out", tmp_path)
    assert sorted(column(tmp_path, "miou_student")) == [3, 4] and sorted(column(tmp_path, "miou")) == [1, 2, 3, 4]
    assert column(tmp_path, "best")[3] == column(tmp_path, "miou")[3]
    state, best = last(tmp_path), checkpoint.load(tmp_path / "best.pt")
    assert state["net_is"] == best["net_is"] == "teacher" and best["step"] in (3, 4)
    assert same_state(dict(state["net"]), {name[4:]: w for name, w in state["teacher"].items() if name.startswith("net.")})
    here("--evaluate", tmp_path / "last.pt", "--root", tiny[-1], "--eval-net", "student")
    assert f"mIoU {100 * column(tmp_path, 'miou_student')[4]:.1f} on 2 val images, student" in capsys.readouterr().out


@pytest.mark.parametrize("flags, said", [
    ("--groups 3 --batch 4", "--batch 4 cannot be divided into 3 groups"), ("--groups 0", "--groups 0 cannot be spread"),
    ("--batch 3 --mix intra", "needs an even number"), ("--views 1", "--views: 1: expected at least 2"),
    ("--tau 0", "--tau: 0: expected"), ("--dcrs -1", "--dcrs: -1: expected"), ("--burn-in 2", "at least 0 and at most 1"),
    ("--aspp-rates 0,6", "--aspp-rates: 0: expected at least 1"), ("--steps 3 --epochs 2", "--steps and --epochs"),
    ("--size 40", "--size and --long-side"), ("--skip-classes 4", "has the classes 0 to 3"),
    ("--supervised --eval-net teacher", "--eval-net teacher: there is none"), ("--labeled 100000", "100000"),
    ("--weights nowhere.pth --steps 1", "no such file")])
def test_mistakes(tiny, tmp_path, capsys, flags, said):
    with pytest.raises((UserError, SystemExit)) as stop:
        here(*tiny, *flags.split(), "--out", tmp_path / "run")
    assert said in f"{stop.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("data", ["cityscapes", "bdd100k", "camvid", "voc"])
def test_real_formats(tmp_path, capsys, data):
    """Trees in the datasets' real formats, with each preset's own augmentation; --eval-size at the two sizes."""
    root = getattr(fixtures, f"make_{data}")(tmp_path / "data")
    small = ["--backbone", "resnet18", "--backbone-layers", 2, "--weights", "none", "--aspp-rates", "1,2", "--batch", 2,
             "--groups", 1, "--steps", 2, "--burn-in", 0.5, "--workers", 0, "--crop", "40x48"]
    small += {"voc": ["--long-side", 64], "bdd100k": []}.get(data, ["--size", "48x64"])
    here("--data", data, "--root", root, "--labeled", 2, *small, "--out", tmp_path / "run")
    output = capsys.readouterr().out
    assert "2 labelled" in output and "final: mIoU" in output
    evaluate, scored = ["--evaluate", tmp_path / "run/last.pt", "--root", root, "--eval-size"], []
    if data in ("voc", "bdd100k"):
        with pytest.raises(UserError, match="--eval-size train scores at --size, which is not set here"):
            here(*evaluate, "train")
        return
    for eval_size in ("full", "train"):
        here(*evaluate, eval_size)
        scored.append(capsys.readouterr().out)
    assert scored[0] != scored[1]


def test_mistakes_with_checkpoints(whole, tiny, tmp_path):
    root = tiny[-1]
    with pytest.raises(UserError, match="both networks are in last.pt"):
        here("--evaluate", whole / "best.pt", "--root", root, "--eval-net", "teacher")
    here(*tiny, "--steps", 2, "--burn-in", 1, "--out", tmp_path / "early")
    with pytest.raises(UserError, match="after the burn-in"):
        here("--evaluate", tmp_path / "early/last.pt", "--root", root, "--eval-net", "teacher")
    with pytest.raises(UserError, match="--lr has no effect"):
        here("--evaluate", whole / "best.pt", "--lr", 1)
    with pytest.raises(UserError, match="--tau was 0.15, now 0.5"):
        here(*tiny, "--steps", 6, "--out", whole, "--tau", 0.5)
    with pytest.raises(UserError, match="--groups 4 cannot be spread over 3 processes"):
        c3.check(config(batch=4), 4, 3)


@pytest.mark.slow
def test_compile(tiny, tmp_path):
    run = [*tiny, "--steps", 3, "--lr", 1e-4, "--burn-in", 0.4, "--dcrs-init", 0.2]
    here(*run, "--out", tmp_path / "eager")
    here(*run, "--compile", "--out", tmp_path / "compiled")
    for name in ("loss_sup", "loss_consist", "loss_contrast"):
        eager, compiled = column(tmp_path / "eager", name), column(tmp_path / "compiled", name)
        assert min(eager.values()) > 0 and eager == pytest.approx(compiled, rel=1e-2), name
