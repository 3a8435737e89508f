"""s4gan_mlmt.py against the paper: each piece versus a slow, obvious version or numbers worked out by hand; its runs."""
import copy
import csv
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import kill, run_script, same_state, start_script, wait_for
from PIL import Image
from torch import nn

import fixtures
import s4gan_mlmt as s4
from common import checkpoint
from common import transforms as T
from common.datasets import choose_labelled, open_dataset
from common.miou import ConfusionMatrix
from common.runtime import Random, Runtime, mix
from common.schedules import poly, update_ema
from common.settings import UserError, parse
from common.streams import Stream

C = 4
CTX = Runtime("cpu", "fp32")


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config(data="shapes", **values):
    cfg, _ = parse(s4.Config, s4.PRESETS, ["--data", data])
    for name, value in dict(dict(bn="affine", head_lr_mult=10.0, mlmt_weights="none"), **values).items():
        setattr(cfg, name, value)
    return cfg


def labels(seed, b=2, size=(6, 7), void=0.2):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, (b, *size))
    return torch.from_numpy(np.where(rng.random(y.shape) < void, 255, y))


# ---- networks

@pytest.mark.parametrize("classes, expected", [(21, 44_048_532), (60, 46_924_080), (19, 43_901_068)])
def test_size_of_s_and_groups_of_its_optimiser(classes, expected):
    with torch.device("meta"):
        net = s4.Segmenter(config("voc"), classes)
    assert sum(p.numel() for p in net.parameters()) == expected == 42_500_160 + 73_732 * classes
    optimizer = s4.make_optimizer(net, config("voc"))
    (body, head), ids = (group["params"] for group in optimizer.param_groups), set()
    for parameter in [*body, *head]:
        ids.add(id(parameter))
    norms = {id(p) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert (len(body), len(head), len(ids)) == (104, 8, 112) and not ids & norms
    assert sum(p.numel() for p in body) == 42_394_816 and [g["lr_mult"] for g in optimizer.param_groups] == [1.0, 10.0]
    adam = s4.make_optimizer(net, config("voc", backbone_lr_mult=3.0, optimizer="adam"))
    assert [(len(g["params"]), g["lr_mult"]) for g in adam.param_groups] == [(104, 3.0), (8, 10.0)]
    assert all(not net.get_parameter(name).requires_grad for name, p in net.named_parameters() if id(p) in norms)
    assert net(torch.empty(1, 3, 33, 41, device="meta")).shape == (1, classes, 33, 41)


def test_flags_of_the_network_reach_it():
    with torch.device("meta"):
        two = s4.Segmenter(config("voc", aspp_rates=(6, 12), stride_on="3x3"), 21).net
        plus = s4.Segmenter(config("voc", network="deeplabv3plus"), 21)
    assert len(two.head.branches) == 2 and two.body.layer2[0].conv2.stride == (2, 2)
    assert len(s4.make_optimizer(plus, config("voc")).param_groups[0]["params"]) == 104
    assert plus(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 21, 64, 64)


def test_s_has_two_passes_with_their_own_batch_statistics():
    net = s4.Segmenter(config(bn="affine"), C).train()
    x, x_u = normal(0, 2, 3, 32, 32), 3 + normal(1, 3, 3, 32, 32)
    before = net.net.body.bn1.running_mean.clone()
    both = net(x, x_u)
    assert torch.equal(both[0], net(x)) and torch.equal(both[1], net(x_u))
    assert not torch.equal(before, net.net.body.bn1.running_mean)  # learnt, although weight and bias are fixed


@pytest.mark.parametrize("classes, expected", [(21, 2_778_561), (60, 2_818_497), (19, 2_776_513)])
def test_size_and_shapes_of_d(classes, expected):
    with torch.device("meta"):
        d = s4.Discriminator(classes)
        assert sum(p.numel() for p in d.parameters()) == expected == 1024 * (classes + 3) + 2_753_985
        for height, width, last in ((321, 321, (20, 20)), (256, 512, (16, 32))):
            x = torch.empty(2, classes + 3, height, width)
            for conv in d.convs:
                x = conv(x)
            assert x.shape == (2, 512, *last)
            score, feature = d(torch.empty(2, classes, height, width), torch.empty(2, 3, height, width))
            assert score.shape == (2,) and feature.shape == (2, 512)


class Masks:
    """Stands for common.runtime.Random; remembers what it drew"""

    def __init__(self, seed=0):
        self.generator, self.drawn = torch.Generator().manual_seed(seed), []

    def uniform(self, *shape):
        self.drawn.append(torch.rand(shape, generator=self.generator))
        return self.drawn[-1]


@pytest.mark.parametrize("dropout", ["spatial", "elementwise"])
def test_d_against_plain_layers(dropout):
    d, maps, image, rng = s4.Discriminator(C, 4, dropout), normal(0, 2, C, 37, 32), normal(1, 2, 3, 37, 32), Masks()
    score, feature = d(maps, image, rng)
    x = torch.cat([maps, image], 1)  # maps first, image last
    for k, conv in enumerate(d.convs):
        x = nn.LeakyReLU(0.2)(conv(x))
        if k < len(rng.drawn):
            x = x * 2 * (rng.drawn[k] >= 0.5)
    assert len(rng.drawn) == (3 if dropout == "spatial" else 4)
    assert {m.shape[2:] for m in rng.drawn} == ({(1, 1)} if dropout == "spatial" else {(18, 16), (9, 8), (4, 4), (2, 2)})
    pooled = nn.AvgPool2d(x.shape[2:])(x).flatten(1)
    assert torch.allclose(feature, pooled, atol=1e-6) and torch.allclose(score, d.fc(pooled)[:, 0], atol=1e-6)
    assert torch.equal(d(maps, image)[0], d(maps, image)[0]) and not torch.allclose(d(maps, image, Masks(1))[0], score)


def test_classifier_has_the_papers_size():
    with torch.device("meta"):
        g = s4.Classifier(config("voc"), 21)
    assert sum(p.numel() for p in g.parameters()) == 42_543_189
    g = s4.Classifier(config(), C).train()
    x, x_u = normal(0, 2, 3, 40, 40), normal(1, 3, 3, 40, 40) * 2
    both = g(x, x_u)
    assert [part.shape for part in both] == [(2, C), (3, C)]
    assert torch.equal(both[0], g(x)) and torch.equal(both[1], g(x_u))


# ---- inputs

@pytest.mark.parametrize("kind", ["torchvision", "caffe", "city"])
def test_prepare_gives_the_input_of_the_released_code(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    x = s4.Segmenter(config(input=kind), C).prepare(T.normalise(torch.from_numpy(pixels).permute(2, 0, 1))[None])[0]
    rgb = pixels.astype(np.float64)
    expected = {"torchvision": (rgb / 255 - T.IMAGENET_MEAN) / T.IMAGENET_STD,
                "caffe": rgb[..., ::-1][..., ::-1] - (122.67891434, 116.66876762, 104.00698793),
                "city": (rgb[..., ::-1] - (73.15835921, 82.90891754, 72.39239876)) / 255}[kind]
    assert np.allclose(x.permute(1, 2, 0).numpy(), expected, atol=1e-4)


def test_one_hot_has_zeros_in_void():
    y = labels(0)
    maps = s4.one_hot(y, C)
    for b, i, j in np.ndindex(*y.shape):
        expected = [float(c == y[b, i, j]) for c in range(C)]
        assert maps[b, :, i, j].tolist() == expected
    assert torch.equal(maps.sum(1), (y != 255).float()) and (y == 255).any()


def test_unit_range_of_a_batch_and_of_two_processes():
    x, other = normal(0, 2, 3, 4, 4), 5 * normal(1, 2, 3, 4, 4)
    scaled = s4.unit_range(x, CTX)
    assert scaled.min() == 0 and scaled.max() == 1 and torch.allclose(scaled, (x - x.min()) / (x.max() - x.min()))
    foreign = s4.unit_range(x, CTX, other)
    assert foreign.min() == 0 and torch.allclose(foreign, (x - x.min()) / (other.max() - other.min()))
    assert torch.equal(s4.unit_range(torch.full((1, 3, 2, 2), 7.0), CTX), torch.zeros(1, 3, 2, 2))
    two = types.SimpleNamespace(gather=lambda mine: torch.cat([mine, torch.stack([other.min(), other.max()])[None]]))
    whole = s4.unit_range(torch.cat([x, other]), CTX)
    assert torch.allclose(s4.unit_range(x, two), whole[:2])


# ---- losses

def test_eq1_cross_entropy():
    logits, y = normal(0, 2, C, 6, 7), labels(1)
    valid = [at for at in np.ndindex(*y.shape) if y[at] != 255]
    terms = [-logits[b, :, i, j].log_softmax(0)[y[b, i, j]].item() for b, i, j in valid]
    assert s4.cross_entropy(logits, y, CTX).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert s4.cross_entropy(torch.zeros(2, 21, 6, 7), y, CTX).item() == pytest.approx(3.0445, abs=1e-4)
    logits.requires_grad_()
    nothing = s4.cross_entropy(logits, torch.full_like(y, 255), CTX)
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()


def test_eq2_feature_matching():
    real, fake = normal(0, 3, 512), normal(1, 5, 512)
    gaps = [abs(sum(real[b, k] for b in range(3)) / 3 - sum(fake[b, k] for b in range(5)) / 5) for k in range(512)]
    slow = sum(gaps) / 512
    assert s4.feature_matching(real, fake, CTX).item() == pytest.approx(slow.item(), rel=1e-5)
    assert s4.feature_matching(torch.zeros(2, 512), torch.ones(7, 512), CTX) == 1
    assert s4.feature_matching(real, real[[2, 0, 1]], CTX) == pytest.approx(0, abs=1e-7)


def test_eq2_gradient_over_two_processes_is_that_of_one():
    """The mean of the two local gradients, as DDP takes it, is the gradient of the global batch's loss."""
    real, x, weight = normal(0, 4, 8), normal(1, 4, 5), normal(2, 5, 8).requires_grad_()
    one = s4.feature_matching(real, x @ weight, CTX)
    expected, = torch.autograd.grad(one, weight)
    total = 0
    for rows, others in ((slice(0, 2), slice(2, 4)), (slice(2, 4), slice(0, 2))):
        theirs = iter([real[others].mean(0), (x @ weight)[others].mean(0).detach()])
        two = types.SimpleNamespace(mean=lambda mine: (mine.detach() + next(theirs)) / 2)
        loss = s4.feature_matching(real[rows], x[rows] @ weight, two)
        assert loss.item() == pytest.approx(one.item(), rel=1e-5)
        total = total + torch.autograd.grad(loss, weight)[0] / 2
    assert torch.allclose(total, expected, atol=1e-6) and expected.abs().max() > 0.01


def test_eq3_self_training():
    logits = normal(0, 3, C, 4, 5).requires_grad_()
    passed = torch.tensor([0.59, 0.60, 0.61]) >= 0.6
    loss = s4.self_training(logits, passed, CTX)
    loss.backward()
    terms = []
    for b, i, j in np.ndindex(3, 4, 5):
        if b in (1, 2):
            p = logits[b, :, i, j].detach().softmax(0)
            terms.append(-math.log(p[p.argmax()]))
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert not logits.grad[0].any() and logits.grad[1:].abs().sum() > 0
    assert s4.self_training(logits[1:], torch.tensor([True, True]), CTX).item() == pytest.approx(loss.item(), rel=1e-6)
    y = logits.detach().argmax(1)  # y* is a constant: the gradient is that of a cross-entropy with fixed labels
    expected, = torch.autograd.grad(F.cross_entropy(logits[1:], y[1:]), logits)
    assert torch.allclose(logits.grad, expected, atol=1e-7)
    none = s4.self_training(logits, torch.zeros(3, dtype=torch.bool), CTX)
    none.backward()
    assert none == 0 and torch.isfinite(logits.grad).all()


def test_eq5_and_the_standard_gan_loss():
    real, fake = normal(0, 5), normal(1, 5)
    slow = -sum(math.log(1 / (1 + math.exp(-r))) for r in real) / 5 / 2
    slow -= sum(math.log(1 - 1 / (1 + math.exp(-f))) for f in fake) / 5 / 2
    assert s4.discriminator_loss(real, fake).item() == pytest.approx(slow, rel=1e-5)
    assert s4.discriminator_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(0.693147, abs=1e-6)
    slow = -sum(math.log(1 / (1 + math.exp(-f))) for f in fake) / 5
    assert s4.adversarial(fake).item() == pytest.approx(slow, rel=1e-5)


def test_eq6_supervised_and_consistency():
    logits, z = normal(0, 3, C), torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    g = 1 / (1 + (-logits.double()).exp())
    slow = -sum(math.log(g[b, c]) if z[b, c] else math.log(1 - g[b, c]) for b, c in np.ndindex(3, C)) / 12
    assert s4.multi_label(logits, z).item() == pytest.approx(slow, rel=1e-5)
    student, teacher = normal(1, 3, C).requires_grad_(), normal(2, 3, C).requires_grad_()
    loss = s4.consistency("mse", student, teacher)
    a, b = student.tolist(), teacher.tolist()
    slow = sum((1 / (1 + math.exp(-a[i][c])) - 1 / (1 + math.exp(-b[i][c]))) ** 2 for i, c in np.ndindex(3, C)) / 12
    assert loss.item() == pytest.approx(slow, rel=1e-5)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    sure = 100 * torch.ones(1, 2)
    assert s4.consistency("mse", teacher, teacher) == 0 and s4.consistency("mse", sure, -sure) == 1
    q = normal(3, 2, C)
    for factor, expected in ((1, 0), (3, 0), (-1, 2)):
        assert s4.consistency("cosine", factor * q, q).item() == pytest.approx(expected, abs=1e-6)
    one = 1 - (student[0] @ teacher[0] / student[0].norm() / teacher[0].norm())
    assert s4.consistency("cosine", student[:1], teacher[:1]).item() == pytest.approx(one.item(), rel=1e-5)


def test_schedules_of_section_4_1_3_and_of_the_released_mlmt():
    voc = config("voc")
    assert [s4.consistency_weight(e, voc) for e in (0, 10, 11, 35, 60, 99)] == pytest.approx([0, 0, 0.02, 0.5, 1, 1])
    assert s4.consistency_weight(35, config("voc", lambda_cons=3.0, burn_in=30)) == pytest.approx(0.3)
    assert [s4.mlmt_lr(e, voc) for e in (0, 10, 50, 99)] == pytest.approx([0.03, 0.029268, 0.01505, 1.0738e-4], rel=1e-4)
    assert [voc.lr * poly(i, 40000) for i in (0, 10000, 30000)] == pytest.approx([2.5e-4, 1.92972e-4, 7.17936e-5], rel=1e-5)
    assert [2.5e-4 * poly(17500, 35000), 1e-4 * poly(17500, 35000)] == pytest.approx([1.33972e-4, 5.35887e-5], rel=1e-5)


def test_teacher_is_the_mean_of_the_students_and_keeps_its_statistics():
    student = nn.BatchNorm1d(3)
    teacher, history = copy.deepcopy(student), [student.weight.detach().clone()]
    teacher.running_mean += 5
    for t in range(1, 6):
        with torch.no_grad():
            student.weight += normal(t, 3)
        student(normal(t, 4, 3))
        history.append(student.weight.detach().clone())
        update_ema(teacher, student, min(1 - 1 / (t + 1), 0.999), "keep")
    assert torch.allclose(teacher.weight, sum(history) / 6, atol=1e-6)
    assert torch.equal(teacher.running_mean, torch.full((3,), 5.0))


# ---- fusion, heuristics, ROC

def test_eq7_fusion():
    cfg = config(tau=0.2)
    p, g = normal(0, 3, C, 5, 6).softmax(1), torch.tensor([[0.0, 0.2, 0.21, 0.9], [0.9, 0, 0, 0], [0.1, 1, 1, 1]])
    fused = s4.fuse(p, g, cfg).argmax(1)
    for b, i, j in np.ndindex(3, 5, 6):
        kept = [c for c in range(C) if c == 0 or g[b, c] > 0.2]
        assert fused[b, i, j] == max(kept, key=lambda c: p[b, c, i, j])
    assert not (fused[0] == 1).any() and not fused[1].any() and torch.equal(fused[2], p[2].argmax(0))
    was_background = p.argmax(1) == 0
    assert not fused[was_background].any()
    classes = [set(s4.fuse(p, g, config(tau=tau)).argmax(1)[0].flatten().tolist()) for tau in (0.1, 0.2, 0.5, 0.95)]
    assert all(fewer <= more for more, fewer in zip(classes, classes[1:])) and len(classes[0]) > len(classes[-1])
    logits = torch.tensor([-1.0, -2, -3])[None, :, None, None]  # the released code would answer 1
    assert s4.gate(logits.softmax(1), torch.tensor([[True, False, True]])).argmax(1).item() == 0


def test_fusion_with_another_background_or_none():
    p = torch.tensor([0.1, 0.6, 0.3, 0.0]).view(1, C, 1, 1)
    nothing = torch.zeros(1, C)
    assert s4.fuse(p, nothing, config(background=(2,))).argmax(1).item() == 2
    assert s4.fuse(p, nothing, config(background=(3,))).argmax(1).item() == 3  # although its probability underflowed
    assert torch.equal(s4.fuse(p, nothing, config(background=())), p)  # no class would be left: nothing is removed


class Stub(nn.Module):
    """A "segmenter" whose logits are a fixed random function of the image's mean, piecewise constant, and of noise"""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.calls = classes, []

    def prepare(self, x):
        return x

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        seed = int(1000 * x.double().abs().sum()) % 10_000
        coarse = F.interpolate(normal(seed, len(x), self.classes, 5, 5), x.shape[2:], mode="nearest")
        return 3 * coarse + normal(seed + 1, len(x), self.classes, *x.shape[2:])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fixtures.make_folder(tmp_path_factory.mktemp("s4") / "folder", n_val=4)


def test_heuristics_against_loops(root):
    data, cfg = open_dataset("folder", str(root)), config("folder", count_step=150, eval_size="full", workers=0)
    (t, common), (of_class, joint) = s4.count_heuristics(Stub(C), data, cfg, CTX)
    cases = []  # (p, y) of every image
    for i in range(len(data.val)):
        x, y = T.ForScoring()(data.val.image(i), data.val.mask(i))
        cases.append((Stub(C)(x[None]).softmax(1)[0].numpy(), y.numpy()))

    def filtered(thresholds):
        """Confusion of all images when classes below their thresholds are left out"""
        confusion = ConfusionMatrix(C, "cpu")
        for p, y in cases:
            first, q = p.argmax(0), p.copy()
            for c in range(1, C):
                if (first == c).sum() < thresholds[c]:
                    q[c] = 0
            confusion.update(torch.from_numpy(q.argmax(0)), torch.from_numpy(y))
        return confusion

    scores = {150 * k: filtered([150 * k] * C).miou() for k in range(1, 13)}
    assert scores[t] == max(scores.values()) == common.miou() and len(set(scores.values())) > 2
    best = [0]
    for c in range(1, C):
        ious = [filtered([150 * k if other == c else 0 for other in range(C)]).iou()[c] for k in range(13)]
        best.append(150 * max(range(13), key=lambda k: (ious[k], -k)))
    assert of_class == best and len(set(best)) > 1
    assert torch.equal(joint.matrix, filtered(best).matrix)


@pytest.mark.parametrize("seed", range(4))
def test_roc_against_counting_pairs(seed):
    score, truth = normal(seed, 40), (normal(seed + 9, 40) > 0).float()
    if seed % 2:
        score = score.round()  # ties
    fpr, tpr, area = s4.roc(score, truth)
    pairs = [(s > o) + 0.5 * (s == o) for s in score[truth == 1] for o in score[truth == 0]]
    assert area == pytest.approx(float(sum(pairs)) / len(pairs), abs=1e-9)
    for threshold in score.unique():
        kept = score >= threshold
        point = [((kept & (truth == is_true)).sum() / (truth == is_true).sum()).item() for is_true in (0, 1)]
        assert any(np.allclose(point, other) for other in zip(fpr.tolist(), tpr.tolist()))
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1) and len(fpr) == len(score.unique()) + 1


def test_auc_leaves_out_the_background_and_classes_without_a_value():
    truth = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 0, 1.0]])
    scores = torch.tensor([[0.0, 0.9, 0.5, 0.1], [1, 0.2, 0.1, 0.8], [1, 0.3, 0.1, 0.05]])
    macro, micro, *_ = s4.auc(scores, truth, config())
    assert macro == pytest.approx((1 + 0.5) / 2)  # of classes 1 and 3; 2 never occurs, 0 is the background
    positives, negatives = [0.9, 0.3, 0.8, 0.05], [0.2, 0.5, 0.1, 0.1, 0.1]
    assert micro == pytest.approx(sum(p > n for p in positives for n in negatives) / 20)
    assert s4.auc(scores, truth, config(background=()))[0] == pytest.approx((0.25 + 1 + 0.5) / 3)


def test_no_auc_where_all_classes_are_in_all_images(tmp_path):
    undefined, fine = s4.auc(torch.rand(3, C), torch.ones(3, C), config()), s4.auc(torch.rand(3, C), torch.eye(C)[1:], config())
    assert math.isnan(undefined[0]) and math.isnan(undefined[1])
    s4.roc_picture(dict(a=undefined), tmp_path / "none.png")
    s4.roc_picture(dict(a=undefined, b=fine), tmp_path / "one.png")
    assert not (tmp_path / "none.png").exists() and (tmp_path / "one.png").exists()


def test_presence_is_the_set_of_ids():
    y = labels(3, b=6, size=(2, 2))
    expected = [[float(c in y[b].unique().tolist()) for c in range(C)] for b in range(6)]
    assert s4.presence(y, C).tolist() == expected and 0 < sum(map(sum, expected)) < 24


class StubClassifier(nn.Module):
    """Logits that depend on the image's mean colour"""

    size = (16, 16)

    def forward(self, x):
        assert x.shape[2:] == (16, 16)
        return 4 * normal(7, 3, C)[torch.arange(3)].T.mul(x.mean((2, 3))[:, None]).sum(2)


@pytest.mark.parametrize("flags", [dict(), dict(eval_size="train", size=(40, 48)), dict(eval_size="train", eval_crop=32),
                                   dict(eval_size="full", size=(40, 48), eval_crop=32), dict(eval_pad=(96, 96))])
def test_evaluate_against_loops(root, flags):
    data, cfg = open_dataset("folder", str(root)), config("folder", workers=0, tau=0.5, batch=3, **flags)
    alone, fused = evaluated = s4.evaluate(Stub(C), data, cfg, CTX, StubClassifier())
    truth, (scores,) = s4.classifier_scores([StubClassifier()], data, cfg, CTX)
    expected, batches = [[[0] * C for _ in range(C)] for _ in evaluated], []
    transform = T.ForScoring()
    if cfg.eval_size == "train":
        transform = T.ForScoring((40, 48)) if cfg.size else lambda i, m: s4.centre_square(i, m, None, 32)
    samples = [transform(data.val.image(i), data.val.mask(i)) for i in range(len(data.val))]
    for samples in ([samples[:3], samples[3:]] if cfg.eval_size == "train" else [[sample] for sample in samples]):
        x, y = torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples]).long()
        padded = F.pad(x, (0, 96 - x.shape[3], 0, 96 - x.shape[2])) if cfg.eval_pad else x
        p = Stub(C)(padded)[..., :x.shape[2], :x.shape[3]].softmax(1)
        g = StubClassifier()(F.interpolate(x, (16, 16), mode="bilinear", antialias=True)).sigmoid()
        batches.append((g, torch.stack([torch.stack([(mask == c).any() for c in range(C)]) for mask in y])))
        for b in range(len(y)):
            kept = [c for c in range(C) if c == 0 or g[b, c] > 0.5]
            for true, q in zip(y[b].flatten().tolist(), p[b].flatten(1).T.tolist()):
                if true != 255:
                    expected[0][true][q.index(max(q))] += 1
                    expected[1][true][max(kept, key=q.__getitem__)] += 1
    assert alone.matrix.tolist() == expected[0] and fused.matrix.tolist() == expected[1] != expected[0]
    assert torch.allclose(scores, torch.cat([g for g, _ in batches]))
    assert torch.equal(truth, torch.cat([z for _, z in batches]).float())


# ---- images

def test_augment_scales_in_tenths_crops_and_pads():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    mask = np.random.default_rng(1).integers(0, 3, (30, 40)).astype(np.uint8)
    cfg = config(size=None, scale=(0.5, 1.6), crop=None, flip=False, shift=0)
    sides = {tuple(s4.Augment(cfg)(image, mask, np.random.default_rng(k))[0].shape[1:]) for k in range(100)}
    assert sides == {(round(3 * s), round(4 * s)) for s in range(5, 17)}
    cfg.scale, cfg.short_side = (1.0, 1.0), (20, 24)
    sides = {s4.Augment(cfg)(image, mask, np.random.default_rng(k))[0].shape[1] for k in range(60)}
    assert sides == set(range(20, 25))
    cfg.short_side, cfg.crop = None, (36, 44)
    for pad_label in (255, 0):
        cfg.pad_label = pad_label
        x, y = s4.Augment(cfg)(image, mask, np.random.default_rng(0))
        assert torch.equal(y[:30, :40], torch.from_numpy(mask))
        assert (y[30:] == pad_label).all() and (y[:, 40:] == pad_label).all()
        assert not x[:, 30:].any() and torch.equal(x[:, :30, :40], T.normalise(torch.from_numpy(image).permute(2, 0, 1)))
    assert s4.Augment(cfg)(image, None, np.random.default_rng(0))[1] is None
    cfg.crop, cfg.size = (16, 16), (20, 20)
    assert s4.Augment(cfg)(image, mask, np.random.default_rng(0))[1].shape == (16, 16)


def test_blur_smooths_with_the_given_probability():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    sharp = T.normalise(torch.from_numpy(image).permute(2, 0, 1))
    cfg = config(blur=0.5, flip=False, shift=0)
    spread = [s4.Augment(cfg)(image, None, np.random.default_rng(k))[0].std() / sharp.std() for k in range(40)]
    assert 10 <= sum(s > 0.999 for s in spread) <= 34 and min(spread) < 0.6
    dot = torch.zeros(1, 15, 15)
    dot[0, 7, 7] = 1
    blurred = s4.blurred(dot, (1.0, 1.0), np.random.default_rng(0))
    assert blurred[0, 7, 8] / blurred[0, 7, 7] == pytest.approx(math.exp(-0.5), rel=1e-4)


def test_two_views():
    cfg = config(mlmt_size=(32, 32), mlmt_blur=(0.5, 1.0))
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    mask = np.full((40, 50), 255, np.uint8)
    mask[3, 3] = 2  # a single pixel, which resizing would lose
    plain = T.normalise(T.resize(torch.from_numpy(image).permute(2, 0, 1), None, (32, 32))[0])
    seen = set()
    for k in range(12):
        (student, teacher), z = s4.two_views(image, mask, np.random.default_rng(k), cfg, C, False)
        assert z.tolist() == [0, 0, 1, 0]
        for view in (student, teacher):
            assert torch.equal(view, plain) or torch.equal(view, plain.flip(2))
        seen.add((torch.equal(student, plain), torch.equal(teacher, plain)))
    assert len(seen) == 4  # the flips are independent
    (student, teacher), z = s4.two_views(image, None, np.random.default_rng(0), cfg, C, True)
    assert z is None and (torch.equal(teacher, plain) or torch.equal(teacher, plain.flip(2)))
    assert student.std() < 0.8 * plain.std() and student.shape == (3, 32, 32)
    cfg.mlmt_blur = (0.0, 0.0)  # which leaves the jitter
    (student, teacher), _ = s4.two_views(image, None, np.random.default_rng(0), cfg, C, True)
    assert min((student - view).abs().mean() for view in (plain, plain.flip(2))) > 0.05


def test_jitter_changes_brightness_contrast_saturation_and_hue():
    image = torch.from_numpy(np.random.default_rng(0).integers(60, 200, (3, 8, 8)).astype(np.uint8))
    outs = [s4.jittered(image, np.random.default_rng(k)).float() for k in range(60)]
    means = torch.stack([o.mean() for o in outs]) / image.float().mean()
    assert 0.55 < means.min() < 0.75 and 1.25 < means.max() < 1.45
    assert any((o.argmax(0) != image.argmax(0)).any() for o in outs)  # hues turned
    asked, script = [], types.SimpleNamespace(permutation=lambda n: np.array([2, 0, 3, 1]))
    script.uniform = lambda low, high: asked.append((low, high)) or 0.05 + (high > 1) / 2
    expected = s4.tvf.adjust_hue(s4.tvf.adjust_brightness(s4.tvf.adjust_saturation(image, 0.55), 0.55), 0.05)
    assert torch.equal(s4.jittered(image, script), s4.tvf.adjust_contrast(expected, 0.55))
    assert asked == [(0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), (0.6, 1.4)]


def test_centre_square_of_pcontext():
    image = np.zeros((20, 30, 3), np.uint8)
    mask = np.tile(np.arange(30, dtype=np.uint8), (20, 1))
    x, y = s4.centre_square(image, mask, None, 40)
    assert x.shape == (3, 40, 40) and y.shape == (40, 40)
    assert y[0, 0] == 5 and y[0, -1] == 24  # columns 10..49 of 60


def test_voc_is_padded_for_s_and_cropped_back():
    net, x = Stub(C), normal(0, 1, 3, 40, 50)
    out = s4.predict(net, x, config("voc", eval_pad=(64, 60)), CTX)
    assert net.calls == [(1, 3, 64, 60)] and out.shape == (1, C, 40, 50)
    assert torch.equal(out, net(F.pad(x, (0, 10, 0, 24)))[..., :40, :50])
    assert s4.predict(net, x, config("voc", eval_pad=(30, 60)), CTX).shape == (1, C, 40, 50)


# ---- runs

TINY = ("--data folder --labeled 5 --batch 2 --backbone resnet18 --backbone-layers 2 --weights none --aspp-rates 1,2 --d-width 4 "
        "--device cpu --crop 32 --scale 0.5 0.7 --lr 0.01 --gamma 0.5 --lr-d 0.003 --mlmt-backbone resnet34 --mlmt-size 32 "
        "--mlmt-batch 2 --mlmt-batch-u 2 --mlmt-epochs 2 --burn-in 0 --workers 0 --eval-every 100 --save-every 100 "
        "--log-every 1").split()


class Small(nn.Module):
    """Stands for torchvision's resnet34, which is slow to save"""

    def __init__(self, weights=None):
        super().__init__()
        self.conv, self.bn1, self.fc = nn.Conv2d(3, 8, 5, 4, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 1000)

    def forward(self, x):
        return self.fc(F.relu(self.bn1(self.conv(x))).mean((2, 3)))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(torchvision.models, "resnet34", Small)


@pytest.fixture(scope="module")
def tiny(root):
    return [*TINY, "--root", str(root)]


def go(*arguments):
    s4.main([*map(str, arguments)])


def last(folder, name="last.pt"):
    state = checkpoint.load(folder / name)
    for free in ("out", "branch", "save_every"):
        state["config"].pop(free)
    return state


def column(folder, name):
    with open(folder / "log.csv") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def final(output):
    """The last line, but for the folder"""
    return output.strip().splitlines()[-1].rsplit(" ", 1)[0]


def set_up(arguments):
    """What train() makes of its flags: cfg as in the run, data, labelled, unlabelled"""
    cfg, _ = parse(s4.Config, s4.PRESETS, [*map(str, arguments)])
    cfg.bn, cfg.head_lr_mult, cfg.mlmt_weights = cfg.bn or "learn", cfg.head_lr_mult or 1.0, "none"
    data = open_dataset(cfg.data, cfg.root)
    return cfg, data, *choose_labelled(data, cfg.labeled, cfg.split, cfg.seed)


def batch_of(stream, step, size):
    samples = [stream[step * size + k] for k in range(size)]
    return torch.utils.data.default_collate(samples)


def assert_moved_alike(network, start, state):
    """Every parameter went from `start` to its value in `state`, within 1 % of the way it went"""
    for name, parameter in network.named_parameters():
        way, error = (parameter - start[name]).norm(), (parameter - state[name]).norm()
        assert error <= 0.01 * way, (name, float(error), float(way))
    for name, buffer in network.named_buffers():
        if name in start:
            assert torch.allclose(buffer, state[name], rtol=1e-2, atol=2e-3), name


def plain_d(d, maps, image, key, dropout):
    x, rng = torch.cat([maps, image], 1), Random(key) if key else None
    for k, conv in enumerate(d.convs):
        x = F.leaky_relu(conv(x), 0.2)
        if rng and (k < 3 or dropout == "elementwise"):
            x = x * 2 * (rng.uniform(*(x.shape if dropout == "elementwise" else (*x.shape[:2], 1, 1))) >= 0.5)
    feature = x.mean((2, 3))
    return torch.sigmoid(d.fc(feature)[:, 0]), feature


@pytest.mark.parametrize("flags", [
    "--loss ce", "--loss ce+sgan --lambda-adv 0.5", "--loss ce+fm --lambda-fm 3", "--lambda-fm 2 --lambda-st 0.7",
    "--gate-eval --gamma 0.51 --bn affine --head-lr-mult 2", "--void mask_both --lambda-fm 5 --real-span ce",
    "--d-dropout elementwise --backbone-lr-mult 3"])
def test_steps_of_branch_a_are_those_of_the_paper(tiny, tmp_path, flags):
    """Eq. 1 to 5: four steps in plain torch, every gradient asked for by name, end with the weights of the script."""
    arguments = [*tiny, "--gamma", 0.5135, "--branch", "s4gan", "--steps", 4, "--batch", 4, *flags.split()]
    go(*arguments, "--out", tmp_path / "run")
    cfg, data, labelled, unlabelled = set_up(arguments)
    torch.manual_seed(mix(cfg.seed, "init"))
    net, d = s4.Segmenter(cfg, C).train(), s4.Discriminator(C, cfg.d_width)
    streams = {name: Stream(data.train, ids, s4.Augment(cfg), cfg.seed, name, name != "unlabelled")
               for name, ids in (("labelled", labelled), ("unlabelled", unlabelled), ("real", labelled))}
    start, start_d = copy.deepcopy(net.state_dict()), copy.deepcopy(d.state_dict())
    weights = [p for p in net.parameters() if p.requires_grad]
    body = {id(p) for p in net.net.body.parameters()}
    optimizer = torch.optim.SGD([dict(params=[p]) for p in weights], 1, momentum=0.9, weight_decay=cfg.weight_decay)
    optimizer_d = torch.optim.Adam(d.parameters(), betas=(0.9, 0.99))
    shares = []
    for step in range(4):
        x_l, y_l = batch_of(streams["labelled"], step, 4)
        x_u, (x_r, y_r) = batch_of(streams["unlabelled"], step, 4), batch_of(streams["real"], step, 4)
        logits_l = net(x_l)
        loss = F.cross_entropy(logits_l, y_l, ignore_index=255)
        if cfg.loss != "ce":
            logits_u = net(x_u)
            p, true = logits_u.softmax(1), torch.stack([(y_r == c).float() for c in range(C)], 1)
            if cfg.void == "mask_both":
                p = p * (y_r != 255)[:, None]
            span = x_l if cfg.real_span == "ce" else x_r
            i_u, i_r = (x_u - x_u.min()) / (x_u.max() - x_u.min()), (x_r - x_r.min()) / (span.max() - span.min())

            def run(maps, image, number):
                key = None if number is None else (cfg.seed, "discriminator", step, number)
                return plain_d(d, maps, image, key, cfg.d_dropout)

            score, f_fake = run(p, i_u, 0)
            if cfg.loss == "ce+sgan":
                loss = loss - cfg.lambda_adv * score.log().mean()
            else:
                loss = loss + cfg.lambda_fm * (run(true, i_r, 1)[1].mean(0) - f_fake.mean(0)).abs().mean()
            if cfg.loss == "ce+fm+st":
                gate = run(p, i_u, None)[0] if cfg.gate_eval else score
                chosen = [j for j in range(4) if gate[j] >= cfg.gamma and step > 0]
                shares.append(len(chosen) / 4)
                if chosen:
                    loss = loss + cfg.lambda_st * F.cross_entropy(logits_u[chosen], logits_u[chosen].argmax(1))
            loss_d = -(run(true, i_r, 3)[0].log().mean() + (1 - run(p.detach(), i_u, 2)[0]).log().mean()) / 2
        grads = torch.autograd.grad(loss, weights)
        if cfg.loss != "ce":
            for parameter, grad in zip(d.parameters(), torch.autograd.grad(loss_d, list(d.parameters()))):
                parameter.grad = grad
            optimizer_d.param_groups[0]["lr"] = cfg.lr_d * (1 - step / 4) ** 0.9
            optimizer_d.step()
        for parameter, grad, group in zip(weights, grads, optimizer.param_groups):
            parameter.grad = grad
            multiple = cfg.backbone_lr_mult if id(parameter) in body else cfg.head_lr_mult
            group["lr"] = cfg.lr * (1 - step / 4) ** 0.9 * multiple
        optimizer.step()
    state = last(tmp_path / "run")
    assert_moved_alike(net, start, state["net"])
    assert_moved_alike(d, start_d, state["discriminator"])
    if shares:
        assert column(tmp_path / "run", "passed") == pytest.approx(dict(enumerate(shares, 1))) and len(set(shares)) > 1


@pytest.mark.parametrize("flags", [
    [], ["--cons", "cosine", "--cons-on", "unlabelled"], ["--mlmt-method", "cnn", "--mlmt-weight-decay", "0.1"],
    ["--ema-buffers", "copy", "--ema", "0.6", "--lambda-cons", "3"], ["--weak"]])
def test_steps_of_branch_b_are_those_of_the_paper(tiny, tmp_path, small, flags):
    """Eq. 6: two epochs of student and teacher in plain torch."""
    arguments = [*tiny, *flags, "--branch", "mlmt", "--mlmt-epochs", "3", "--mlmt-lr", "0.1"]
    go(*arguments, "--out", tmp_path / "run")
    cfg, data, labelled, unlabelled = set_up(arguments)
    if cfg.weak:
        unlabelled = list(range(len(data.train)))
        labelled = [i for i in unlabelled if data.train.has_mask(i)]
    torch.manual_seed(mix(cfg.seed, "init", "mlmt"))
    student = s4.Classifier(cfg, C).train()
    teacher, start = copy.deepcopy(student), copy.deepcopy(student.state_dict())

    def view(strong):
        return lambda image, mask, rng: s4.two_views(image, mask, rng, cfg, C, strong)

    streams = (Stream(data.train, labelled, view(False), cfg.seed, "mlmt labelled", True),
               Stream(data.train, unlabelled, view(True), cfg.seed, "mlmt unlabelled", False))
    optimizer = torch.optim.SGD(student.parameters(), 1, momentum=0.9, nesterov=True, weight_decay=cfg.mlmt_weight_decay)
    assert math.ceil(len(labelled) / 2) == 3
    for step in range(9):
        epoch = step // 3
        optimizer.param_groups[0]["lr"] = 1e-4 + (0.1 - 1e-4) * (1 + math.cos(math.pi * epoch / 3)) / 2
        ((x_l, x_l2), z), (x_u, x_u2) = batch_of(streams[0], step, 2), batch_of(streams[1], step, 2)
        g_l = student(x_l)
        loss = F.binary_cross_entropy(g_l.sigmoid(), z.float())
        if cfg.mlmt_method == "mlmt":
            g_u, h_l, h_u = student(x_u), teacher(x_l2).detach(), teacher(x_u2).detach()
            g, h = (g_u, h_u) if cfg.cons_on == "unlabelled" else (torch.cat([g_l, g_u]), torch.cat([h_l, h_u]))
            cons = ((g.sigmoid() - h.sigmoid()) ** 2).mean()
            if cfg.cons == "cosine":
                cons = 1 - F.cosine_similarity(g, h, 1).mean()
            loss = loss + cfg.lambda_cons * min(1, 2 * epoch / 3) * cons
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        alpha = min(1 - 1 / (step + 2), cfg.ema) if cfg.mlmt_method == "mlmt" else 0
        with torch.no_grad():
            for mine, its in zip(teacher.parameters(), student.parameters()):
                mine.copy_(alpha * mine + (1 - alpha) * its)
        if cfg.ema_buffers == "copy" or alpha == 0:
            for mine, its in zip(teacher.buffers(), student.buffers()):
                mine.copy_(its)
    state = last(tmp_path / "run/mlmt")
    assert_moved_alike(student, start, state["student"])
    assert_moved_alike(teacher, start, state["net"])
    assert same_state(state["net"], state["student"]) == (cfg.mlmt_method == "cnn")
    if cfg.mlmt_method == "mlmt":
        assert not torch.allclose(teacher.body.conv.weight, student.body.conv.weight)


def test_who_gets_gradients(tiny, tmp_path, monkeypatch):
    """In the pass of S none reach D, and S gets some through D; in the pass of D none are added to S."""
    made, seen = {}, []

    def remember(name, make):
        def wrapped(*arguments, **named):
            made[name] = make(*arguments, **named)
            return made[name]
        monkeypatch.setattr(s4, name, wrapped)

    remember("Segmenter", s4.Segmenter)
    remember("Discriminator", s4.Discriminator)
    discriminator_loss, average_grads = s4.discriminator_loss, Runtime.average_grads

    def after_s(real, fake):
        assert all(p.grad is None for p in made["Discriminator"].parameters())
        seen.append([p.grad.clone() for p in made["Segmenter"].parameters()])
        return discriminator_loss(real, fake)

    def after_d(ctx, parameters):
        assert all(torch.equal(p.grad, before) for p, before in zip(made["Segmenter"].parameters(), seen[-1]))
        assert all(p.grad is not None and p.grad.any() for p in made["Discriminator"].parameters())
        average_grads(ctx, parameters)

    monkeypatch.setattr(s4, "discriminator_loss", after_s)
    monkeypatch.setattr(Runtime, "average_grads", after_d)
    monkeypatch.setattr(s4, "cross_entropy", lambda logits, y, ctx: 0 * logits.sum())  # S learns from D alone
    go(*tiny, "--branch", "s4gan", "--loss", "ce+fm", "--steps", 2, "--out", tmp_path / "run")
    assert len(seen) == 2 and all(grad.any() for grad in seen[0])


def test_passes_per_step_and_disjoint_streams(tiny, root, tmp_path, monkeypatch):
    """2 passes of S and 4 of D per step; unlabelled images are never labelled ones, and no mask of theirs is opened."""
    counts, images, masks = dict(s=0, d=0), {}, set()
    forward_s, forward_d, get, mask = s4.DeepLabV2.forward, s4.Discriminator.forward, Stream.__getitem__, s4.Stream.index

    def count(name, forward):
        def wrapped(self, *arguments):
            counts[name] += self.training
            return forward(self, *arguments)
        return wrapped

    def index(self, position):
        images.setdefault(self.name, set()).add(mask(self, position))
        return mask(self, position)

    split = type(open_dataset("folder", str(root)).train)
    open_mask = split.mask
    monkeypatch.setattr(split, "mask", lambda self, i: (masks.add(self.images[i]), open_mask(self, i))[1])
    monkeypatch.setattr(s4.DeepLabV2, "forward", count("s", forward_s))
    monkeypatch.setattr(s4.Discriminator, "forward", count("d", forward_d))
    monkeypatch.setattr(Stream, "index", index)
    go(*tiny, "--labeled", "3", "--branch", "s4gan", "--steps", 5, "--out", tmp_path / "run")
    assert counts == dict(s=10, d=20)
    assert images["labelled"] == images["real"] and len(images["labelled"]) == 3 and len(images["unlabelled"]) == 6
    assert not images["labelled"] & images["unlabelled"]
    assert len([path for path in masks if "/val/" not in path]) == 3


def test_classes_of_other_images_are_read_with_weak_only(tiny, root, tmp_path, small, monkeypatch):
    split, opened = type(open_dataset("folder", str(root)).train), set()
    open_mask = split.mask
    monkeypatch.setattr(split, "mask", lambda self, i: (opened.add(self.images[i]), open_mask(self, i))[1])
    go(*tiny, "--labeled", "2", "--branch", "mlmt", "--out", tmp_path / "run")
    assert len([path for path in opened if "/val/" not in path]) == 2
    go(*tiny, "--labeled", "2", "--branch", "mlmt", "--weak", "--out", tmp_path / "weak")
    assert len([path for path in opened if "/val/" not in path]) == 6


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Both branches, undisturbed"""
    import io
    from contextlib import redirect_stdout
    folder, output = tmp_path_factory.mktemp("whole") / "run", io.StringIO()
    patch = pytest.MonkeyPatch()
    patch.setattr(torchvision.models, "resnet34", Small)
    with redirect_stdout(output):
        go(*tiny, "--steps", 6, "--out", folder)
    patch.undo()
    return folder, output.getvalue()


def test_run_folder_and_output(whole):
    folder, output = whole
    for name in ("config.json log.csv last.pt best.pt curves.png predictions.png mlmt/log.csv mlmt/last.pt mlmt/curves.png "
                 "mlmt/roc.png").split():
        assert (folder / name).exists(), name
    lines = output.strip().splitlines()
    assert lines[-1].startswith("final: mIoU ") and "fusion" in lines[-1] and lines[-1].endswith(str(folder))
    assert output.count("pixel accuracy") == 2 and "segmentation alone" in output and "AUC macro" in output
    assert sorted(column(folder, "loss_ce")) == [*range(1, 7)] == sorted(column(folder / "mlmt", "loss_cce"))
    assert all(len(column(folder, name)) == 6 for name in ("loss_fm", "loss_st", "loss_d", "passed", "d_real", "d_fake"))
    for picture in ("predictions.png", "curves.png", "mlmt/roc.png", "mlmt/curves.png"):
        assert min(Image.open(folder / picture).size) > 200


def test_evaluate_and_predict_repeat_the_run(whole, root, small, tmp_path, capsys):
    folder, output = whole
    fused, alone = (output.strip().splitlines()[-1].split()[k].strip("(") for k in (2, 4))
    a, b = folder / "last.pt", folder / "mlmt/last.pt"
    go("--evaluate", a, "--root", root)
    assert f": mIoU {alone} on" in capsys.readouterr().out.strip().splitlines()[-1]
    go("--evaluate", a, "--classifier", b, "--root", root, "--out", tmp_path / "pair", "--heuristics", "--count-step", 99)
    said = capsys.readouterr().out
    assert f": mIoU {fused} on" in said.strip().splitlines()[-1] and f"without fusion: mIoU {alone}" in said
    assert said.count("tuned on these images") == 2 and (tmp_path / "pair/roc.png").exists()
    go("--evaluate", a, "--classifier", b, "--root", root, "--tau", "0")  # removes nothing
    assert f": mIoU {alone} on" in capsys.readouterr().out.strip().splitlines()[-1]
    go("--evaluate", b, "--classifier", f"{b},{b}", "--root", root, "--out", tmp_path / "b")
    auc = next(line for line in output.splitlines() if line.startswith("classifier")).split("macro ")[1].split()[0]
    assert f"{b}: AUC macro {auc}" in capsys.readouterr().out
    go("--predict", a, "--classifier", b, "--tau", "1", "--images", root / "images/val", "--out", tmp_path / "p")
    for path in (tmp_path / "p").iterdir():
        assert not np.array(Image.open(path)).any()  # every class but the background is removed
    go("--predict", a, "--images", root / "images/val", "--out", tmp_path / "q")
    assert any(np.array(Image.open(path)).any() for path in (tmp_path / "q").iterdir())


class Killed(Exception):
    pass


@pytest.mark.parametrize("saves", [2, 5])  # the third save of each branch is that of its end
def test_stopped_in_a_or_in_b_and_started_again_ends_with_the_same_bits(whole, tiny, small, tmp_path, monkeypatch, saves):
    arguments, save, paths = [*tiny, "--steps", 6, "--save-every", 2, "--out", tmp_path / "torn"], checkpoint.save, []

    def save_and_die(path, state):
        save(path, state)
        if path.name == "last.pt":
            paths.append(path)
            if len(paths) == saves:
                raise Killed
    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(Killed):
        go(*arguments)
    assert last(paths[-1].parent)["step"] == 4 and (paths[-1].parent.name == "mlmt") == (saves == 5)
    begun = (tmp_path / "torn/last.pt").stat().st_mtime_ns
    go(*arguments)
    assert ((tmp_path / "torn/last.pt").stat().st_mtime_ns == begun) == (saves == 5)  # a finished A is not repeated
    for part in (".", "mlmt"):
        assert same_state(last(whole[0] / part), last(tmp_path / "torn" / part))
        name = "loss_ce" if part == "." else "loss_cce"
        assert column(whole[0] / part, name) == column(tmp_path / "torn" / part, name)


def test_branches_one_after_the_other_in_one_folder(whole, tiny, small, tmp_path, capsys):
    for branch in ("s4gan", "mlmt", "both"):
        go(*tiny, "--steps", 6, "--branch", branch, "--out", tmp_path / "run")
    said = capsys.readouterr().out
    assert final(said) == final(whole[1])
    for part in (".", "mlmt"):
        assert same_state(last(whole[0] / part), last(tmp_path / "run" / part))


def test_segmenter_given_to_branch_b_is_fused(whole, tiny, small, tmp_path, capsys):
    go(*tiny, "--branch", "mlmt", "--segmenter", whole[0] / "last.pt", "--out", tmp_path / "run")
    assert final(capsys.readouterr().out) == final(whole[1])
    checkpoint.save(tmp_path / "other.pt", checkpoint.load(whole[0] / "last.pt") | dict(classes=list("abcd")))
    with pytest.raises(UserError, match="other classes"):
        go(*tiny, "--branch", "mlmt", "--segmenter", tmp_path / "other.pt", "--out", tmp_path / "run")


def test_baselines(tiny, small, tmp_path, capsys):
    go(*tiny, "--supervised", "--steps", 2, "--out", tmp_path / "run")
    assert (tmp_path / "run/last.pt").exists() and not (tmp_path / "run/mlmt").exists()
    assert "final: mIoU" in capsys.readouterr().out and "loss_d" not in open(tmp_path / "run/log.csv").readline()
    go(*tiny, "--supervised", "--branch", "both", "--steps", 2, "--out", tmp_path / "both")
    assert same_state(last(tmp_path / "run")["net"], last(tmp_path / "both")["net"])
    assert "loss_cons" not in open(tmp_path / "both/mlmt/log.csv").readline()


def test_kill_9_then_resume_is_bit_equal(whole, tiny, tmp_path):
    arguments = [*tiny, "--branch", "s4gan", "--steps", 6, "--save-every", 1, "--out", tmp_path / "run"]
    process = start_script(*arguments, script="s4gan_mlmt.py")
    wait_for(lambda: process.poll() is not None or (tmp_path / "run/log.csv").exists()
             and len((tmp_path / "run/log.csv").read_text().splitlines()) > 3)
    kill(process)
    assert process.returncode == -9
    go(*arguments)
    assert same_state(last(whole[0]), last(tmp_path / "run"))


def test_two_processes_equal_one(tiny, tmp_path):
    """Both branches; the gate is open for some images, and S learns through the statistics of D."""
    arguments = [*tiny, *("--batch 4 --steps 3 --lambda-fm 20 --lr-d 0.001 --mlmt-backbone resnet18 --mlmt-batch 4 --mlmt-batch-u 4 "
                          "--mlmt-epochs 1 --mlmt-lr 0.01 --burn-in -1 --mlmt-size 64").split()]
    go(*arguments, "--out", tmp_path / "one")
    output = run_script(*arguments, "--out", tmp_path / "two", processes=2, script="s4gan_mlmt.py")
    assert "2 x CPU" in output and output.count("final: mIoU") == 1
    assert max(column(tmp_path / "one", "passed").values()) > 0
    for part, names in ((".", ("loss_ce", "loss_fm", "loss_st", "loss_d", "d_real", "d_fake", "passed", "miou")),
                        ("mlmt", ("loss_cce", "loss_cons", "auc_macro"))):
        for name in names:
            one, two = column(tmp_path / "one" / part, name), column(tmp_path / "two" / part, name)
            assert one == pytest.approx(two, rel=2e-4, abs=1e-6), name
    for part, key in ((".", "net"), (".", "discriminator"), ("mlmt", "net")):
        one, two = last(tmp_path / "one" / part)[key], last(tmp_path / "two" / part)[key]
        for name in one:
            assert torch.allclose(one[name].float(), two[name].float(), rtol=1e-3, atol=2e-4), name


A_FLAGS = """--loss ce; --loss ce+sgan; --loss ce+fm; --lambda-fm 5; --lambda-st 5; --gamma 0.9; --gate-eval;
    --d-dropout elementwise; --void mask_both; --real-span ce; --d-width 8; --lr-d 0.1; --weight-decay 0.1; --backbone-lr-mult 3;
    --head-lr-mult 3; --optimizer adam; --bn affine; --bn frozen; --aspp-rates 1; --input caffe; --input city; --pad-label 0;
    --blur 1; --short-side 40 40; --scale 1 1; --shift 3; --no-flip; --crop 40; --size 40; --seed 1; --supervised"""
B_FLAGS = """--mlmt-method cnn; --mlmt-size 40; --mlmt-epochs 4; --mlmt-batch 2; --mlmt-batch-u 3; --mlmt-lr 0.01;
    --mlmt-weight-decay 0.1; --mlmt-blur 1 1; --weak; --lambda-cons 5; --cons cosine; --cons-on unlabelled; --burn-in 1;
    --ema 0.5; --ema-buffers copy; --seed 1"""


@pytest.fixture
def no_scoring(monkeypatch):
    """Runs that only train: every score is 0, no picture is drawn"""
    monkeypatch.setattr(s4, "evaluate", lambda net, data, *_: [ConfusionMatrix(len(data.classes), "cpu")])
    monkeypatch.setattr(s4, "panel", lambda *_: Image.new("RGB", (1, 1)))
    monkeypatch.setattr(s4.Log, "curves", lambda *_: None)
    monkeypatch.setattr(s4, "roc_picture", lambda *_: None)


def test_every_flag_of_branch_a_changes_the_training(tiny, tmp_path, no_scoring):
    run = [*tiny, "--branch", "s4gan", "--steps", 2, "--lr-d", 0.02, "--gamma", 0.5, "--scale", 0.3, 0.4]
    go(*run, "--out", tmp_path / "default")
    default = last(tmp_path / "default")["net"]
    for k, flags in enumerate(A_FLAGS.split(";")):
        go(*run, *flags.split(), "--out", tmp_path / str(k))
        net = last(tmp_path / str(k))["net"]
        assert any(name not in net or not torch.equal(net[name], default[name]) for name in default), flags


def test_every_flag_of_branch_b_changes_the_training(tiny, tmp_path, small, no_scoring):
    run = [*tiny, "--branch", "mlmt", "--mlmt-epochs", 3, "--mlmt-batch", 3]
    go(*run, "--out", tmp_path / "default")
    default = last(tmp_path / "default/mlmt")["net"]
    for k, flags in enumerate(B_FLAGS.split(";")):
        go(*run, *flags.split(), "--out", tmp_path / str(k))
        net = last(tmp_path / f"{k}/mlmt")["net"]
        assert any(not torch.equal(net[name], default[name]) for name in default), flags


def test_weights_of_either_branch_from_a_file(tiny, small, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save({f"module.{k}": v for k, v in torchvision.models.resnet18().state_dict().items()}, tmp_path / "a.pth")
    torch.save(Small().state_dict(), tmp_path / "b.pth")
    go(*tiny, "--weights", tmp_path / "a.pth", "--mlmt-weights", tmp_path / "b.pth", "--lr", 0, "--mlmt-lr", 0, "--steps", 1,
       "--mlmt-epochs", 1, "--out", tmp_path / "run")
    assert capsys.readouterr().out.count("0 missing") == 2
    a, b = torch.load(tmp_path / "a.pth"), torch.load(tmp_path / "b.pth")
    state = last(tmp_path / "run")
    assert torch.equal(state["net"]["net.body.layer1.0.conv1.weight"], a["module.layer1.0.conv1.weight"])
    assert torch.equal(last(tmp_path / "run/mlmt")["student"]["body.conv.weight"], b["conv.weight"])
    assert (state["config"]["bn"], state["config"]["head_lr_mult"]) == ("affine", 10.0)


def test_deeplabv3plus_and_bf16_resume(tiny, tmp_path, monkeypatch):
    """DeepLabv3+ has dropout of its own, whose draws must not depend on when the run was stopped."""
    flags = " ".join(tiny).replace("--backbone-layers 2 ", "").replace("--aspp-rates 1,2 ", "")
    arguments = [*flags.split(), "--network", "deeplabv3plus", "--precision", "bf16", "--branch", "s4gan", "--steps", 2]
    go(*arguments, "--out", tmp_path / "whole")
    save = checkpoint.save

    def save_and_die(path, state):
        save(path, state)
        if path.name == "last.pt":
            raise Killed
    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(Killed):
        go(*arguments, "--save-every", 1, "--out", tmp_path / "torn")
    monkeypatch.setattr(checkpoint, "save", save)
    go(*arguments, "--save-every", 1, "--out", tmp_path / "torn")
    assert same_state(last(tmp_path / "whole"), last(tmp_path / "torn"))


def test_all_labelled_uses_all_images_as_unlabelled_ones_too(tiny, small, tmp_path, capsys):
    root = fixtures.make_folder(tmp_path / "data", n_unlabeled=0)
    go(*tiny, "--root", root, "--labeled", "all", "--steps", 1, "--mlmt-epochs", 1, "--out", tmp_path / "run")
    assert "6 labelled and 6 unlabelled" in capsys.readouterr().out


def test_mistakes_of_branch_b_are_told_before_branch_a(tiny, small, tmp_path, monkeypatch):
    """And its settings can be changed until it has begun."""
    run = [*tiny, "--steps", 1, "--mlmt-epochs", 1, "--out", tmp_path]
    with pytest.raises(UserError, match="--mlmt-weights nofile.pth: no such file"):
        go(*run, "--mlmt-weights", "nofile.pth")
    assert not list(tmp_path.rglob("*.pt"))
    go(*run, "--branch", "s4gan")
    go(*run, "--mlmt-batch", 3)
    with pytest.raises(UserError, match="--mlmt-batch was 3, now 2"):
        go(*run)


def test_auc_that_is_not_defined_is_said():
    macro, micro, *_ = s4.auc(torch.rand(5, 3), torch.ones(5, 3), config(background=()))
    assert math.isnan(macro) and "every class is in all scored images" in s4.in_words(macro, micro)
    assert s4.in_words(0.5, 0.25) == "AUC macro 0.5000, micro 0.2500"


def test_pairs_that_do_not_belong_together(whole, tiny, small, tmp_path, capsys):
    a, b = whole[0] / "last.pt", checkpoint.load(whole[0] / "mlmt/last.pt")
    checkpoint.save(tmp_path / "seed.pt", b | dict(config=b["config"] | dict(seed=7)))
    go("--evaluate", a, "--classifier", tmp_path / "seed.pt")
    assert "were not trained with the same labelled images" in capsys.readouterr().out
    checkpoint.save(tmp_path / "classes.pt", b | dict(classes=["x"] * 4))
    with pytest.raises(UserError, match="were trained on different classes"):
        go("--evaluate", a, "--classifier", tmp_path / "classes.pt")
    with pytest.raises(UserError, match="was trained on 4 classes .x, x, x, ..., but --data folder has 4 others"):
        go("--evaluate", tmp_path / "classes.pt")


@pytest.mark.parametrize("flags, said", [
    ("--evaluate B --heuristics", "is a classifier"), ("--count-step 5", "--heuristics only"),
    ("--data cityscapes --branch both", "Sec. 4.2.1"), ("--supervised --loss ce+fm", "--loss"),
    ("--heuristics", "--evaluate only"), ("--classifier a.pt", "--predict only"),
    ("--segmenter a.pt", "--branch mlmt only"), ("TINY --background 99", "--background 99"),
    ("--network deeplabv3plus --aspp-rates 6,12", "--aspp-rates belongs"),
    ("--network deeplabv3plus --data voc --batch 1", "at least 2 images"),
    ("--bn frozen --input caffe --weights imagenet", "--input torchvision"), ("--evaluate A --lr 3", "--lr has no effect"),
    ("--evaluate A --classifier A", "not a checkpoint of branch mlmt"),
    ("--predict B --images x", "not a checkpoint of branch s4gan")])
def test_mistakes_are_one_sentence(whole, tiny, small, tmp_path, flags, said):
    words = [str(whole[0] / {"A": "last.pt", "B": "mlmt/last.pt"}[w]) if w in "AB" else w for w in flags.split()]
    words = [*tiny, *words[1:]] if words[0] == "TINY" else words
    with pytest.raises(UserError, match=said) as error:
        go(*words, *([] if "A" in flags.split() or "B" in flags.split() else ["--out", tmp_path / "run"]))
    assert "\n" not in str(error.value)


def test_presets_are_the_papers():
    voc, context, city = (parse(s4.Config, s4.PRESETS, ["--data", data])[0] for data in ("voc", "pcontext", "cityscapes"))
    assert (voc.steps, voc.batch, voc.crop, voc.lr, voc.weight_decay, voc.lr_d) == (35000, 8, (321, 321), 2.5e-4, 5e-4, 1e-4)
    assert (voc.lambda_fm, voc.lambda_st, voc.gamma, voc.lambda_cons, voc.tau) == (0.1, 1.0, 0.6, 1.0, 0.2)
    assert (voc.scale, voc.aspp_rates, voc.input, voc.eval_pad) == ((0.5, 1.6), (6, 12, 18, 24), "caffe", (505, 505))
    assert (context.steps, context.short_side, context.batch, context.gamma) == (50000, (252, 1010), 8, 0.6)
    assert (city.steps, city.batch, city.gamma, city.lr_d, city.branch) == (35000, 5, 0.7, 1e-5, "s4gan")
    assert (voc.mlmt_epochs, voc.mlmt_batch, voc.mlmt_batch_u, voc.mlmt_lr, voc.mlmt_size) == (100, 16, 80, 0.03, (320, 320))


@pytest.mark.slow
def test_compile(tiny, small, tmp_path):
    go(*tiny, "--steps", 2, "--out", tmp_path / "eager")
    go(*tiny, "--steps", 2, "--compile", "--out", tmp_path / "compiled")
    for part, name in ((".", "loss_ce"), ("mlmt", "loss_cce")):
        eager, compiled = column(tmp_path / "eager" / part, name), column(tmp_path / "compiled" / part, name)
        assert list(eager.values()) == pytest.approx(list(compiled.values()), rel=1e-3)
