"""s4gan_mlmt.py against the paper: each piece versus a slow, obvious version or numbers worked out
by hand; both branches step by step in plain PyTorch; what its runs leave behind."""
import copy
import math
import shutil
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CTX, batch_of, column, count, last, normal, run_here, same_state, settled
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tvf

import fixtures
import s4gan_mlmt as s4
from common import checkpoint
from common import transforms as T
from common.datasets import choose_labelled, open_dataset
from common.miou import ConfusionMatrix
from common.photometry import gaussian_blur, turn_hue
from common.random import Random, mix
from common.roc import auc, in_words, roc
from common.settings import UserError
from common.streams import Stream

C = 4
config = partial(settled, s4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fixtures.make_folder(tmp_path_factory.mktemp("s4") / "folder", n_val=4)


# ---- networks

@pytest.mark.parametrize("flags, total, body, head", [
    ("", 44_048_532, 104, 8), ("--optimizer adam", 44_048_532, 104, 8),
    ("--aspp-rates 6,12", 43_274_346, 104, 4), ("--weights none", 44_048_532, 312, 8),
    ("--network deeplabv3plus", 59_344_309, 104, 29)])
def test_size_of_s_and_groups_of_its_optimiser(flags, total, body, head):
    cfg = config(f"--data voc --backbone-lr-mult 3 {flags}")
    with torch.device("meta"):
        net = s4.Segmenter(cfg, 21)
    assert count(net) == total
    groups = s4.make_optimizer(net, cfg).param_groups
    assert [len(group["params"]) for group in groups] == [body, head]  # BN learns from scratch only
    assert [group["lr_mult"] for group in groups] == [3.0, 1.0 if cfg.weights == "none" else 10.0]
    assert net(torch.empty(2, 3, 65, 81, device="meta")).shape == (2, 21, 65, 81)


def test_sizes_of_d_and_of_the_classifier():
    with torch.device("meta"):
        networks = s4.Discriminator(21), s4.Classifier(config("--data voc"), 21)
    assert [count(network) for network in networks] == [2_778_561, 42_543_189]


@pytest.mark.parametrize("network, shape", [(s4.Segmenter, (C, 32, 32)), (s4.Classifier, (C,))])
def test_two_passes_have_their_own_batch_statistics(network, shape):
    net = network(config("--weights imagenet"), C).train()
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    x = normal(0, 2, 3, 32, 32)
    x_u = 3 + normal(1, 3, 3, 32, 32)
    logits, logits_u = net(x, x_u)
    assert logits.shape == (2, *shape) and logits_u.shape == (3, *shape)
    assert torch.equal(logits, net(x)) and torch.equal(logits_u, net(x_u))
    assert not torch.equal(before, norm.running_mean)  # in S too, whose BN weights are fixed


@pytest.mark.parametrize("dropout, sides", [("spatial", [(1, 1)] * 3),
                                            ("elementwise", [(18, 16), (9, 8), (4, 4), (2, 2)])])
def test_d_against_plain_layers(dropout, sides):
    d = s4.Discriminator(C, 4, dropout)
    maps = normal(0, 2, C, 37, 32)
    image = normal(1, 2, 3, 37, 32)
    score, feature = d(maps, image, Random((1,)))
    rng = Random((1,))
    x = torch.cat([maps, image], 1)  # maps first, image last
    for k, conv in enumerate(d.convs):
        x = nn.LeakyReLU(0.2)(conv(x))
        if k < len(sides):
            x = x * 2 * (rng.uniform(*x.shape[:2], *sides[k]) >= 0.5)
    pooled = nn.AvgPool2d(x.shape[2:])(x).flatten(1)
    assert torch.allclose(feature, pooled, atol=1e-6)
    assert torch.allclose(score, d.fc(pooled)[:, 0], atol=1e-6)
    assert torch.equal(d(maps, image)[0], d(maps, image)[0])  # no dropout without rng


# ---- losses

def test_eq2_expectations_over_several_processes():
    fake = normal(1, 5, 8).requires_grad_()
    processes = types.SimpleNamespace(mean=lambda local: local.detach() + 7)
    mean = s4.global_mean(fake, processes)
    assert torch.allclose(mean, fake.mean(0) + 7)
    mean.sum().backward()
    assert torch.allclose(fake.grad, torch.full((5, 8), 1 / 5))  # DDP takes the processes' mean


def test_eq3_self_training():
    logits = normal(0, 3, C, 4, 5)
    passed = torch.tensor([False, True, True])
    expected = F.cross_entropy(logits[1:], logits[1:].argmax(1)).item()
    assert s4.self_training(logits, passed).item() == pytest.approx(expected, rel=1e-5)
    assert s4.self_training(logits, passed, 4).item() == pytest.approx(expected / 2, rel=1e-5)
    assert s4.self_training(logits, passed & False) == 0


def test_eq6_consistency_trains_the_student_only():
    student = normal(1, 3, C).requires_grad_()
    teacher = normal(2, 3, C).requires_grad_()
    (s4.consistency("mse", student, teacher) + s4.consistency("cosine", student, teacher)).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


# ---- fusion, heuristics, ROC

def test_eq7_fusion():
    p = normal(0, 3, C, 5, 6).softmax(1)
    g = torch.tensor([[0.0, 0.2, 0.21, 0.9], [0.9, 0, 0, 0], [0.1, 1, 1, 1]])
    fused = s4.fuse(p, g > 0.2).argmax(1)
    for b, i, j in np.ndindex(3, 5, 6):
        kept = [c for c in range(C) if c == 0 or g[b, c] > 0.2]
        assert fused[b, i, j] == max(kept, key=lambda c: p[b, c, i, j])
    p = torch.tensor([0.1, 0.6, 0.3, 0.0]).view(1, C, 1, 1)
    nothing = torch.zeros(1, C, dtype=torch.bool)
    assert s4.fuse(p, nothing, (3,)).argmax(1).item() == 3  # although its probability underflowed
    assert torch.equal(s4.fuse(p, nothing, ()), p)  # no class would be left: nothing is removed
    assert not nothing.any()


def confusion_without(removed, cases):
    """Of all images (p [C, H, W], y), less the classes that are removed (bool [C]) from each"""
    confusion = ConfusionMatrix(C, "cpu")
    for (p, y), without in zip(cases, removed, strict=True):
        q = p * ~without[:, None, None]
        q[0] = p[0]  # the background stays
        confusion.update(q.argmax(0), y)
    return confusion


@pytest.fixture
def stubs():
    """Networks of one layer. The segmenter's logits depend on the image's size too, as BN's do."""
    torch.manual_seed(2)
    segmenter = nn.Sequential(nn.Conv2d(3, C, 5, padding=2), nn.InstanceNorm2d(C), nn.Dropout())
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, C), nn.Dropout())
    classifier.size = (16, 16)
    return segmenter.eval(), classifier.eval()


@torch.no_grad()
def test_heuristics_against_loops(root, stubs):
    net, _ = stubs
    data = open_dataset("folder", str(root))
    images = [T.for_scoring(data.val.image(i), data.val.mask(i)) for i in range(len(data.val))]
    cases = [(net(T.normalise(x[None])).softmax(1)[0], y) for x, y in images]
    counts = torch.stack([p.argmax(0).flatten().bincount(minlength=C) for p, _ in cases])
    cfg = config("--data folder --workers 0")
    cfg.heuristics = 309
    assert (counts == 3 * 309).any()  # a class exactly at a threshold stays
    (threshold, common), (of_class, joint) = s4.count_heuristics(net.train(), data, cfg, CTX)

    def filtered(*thresholds):
        return confusion_without(counts < torch.tensor(thresholds), cases)

    steps = range(0, 13 * 309, 309)
    scores = {t: filtered(t, t, t, t).miou() for t in steps[1:]}
    assert scores[threshold] == max(scores.values()) == common.miou()
    best = [0]
    for c in range(1, C):
        alone = [filtered(*(t * (other == c) for other in range(C))) for t in steps]
        ious = [confusion.iou()[c] for confusion in alone]
        best.append(steps[ious.index(max(ious))])
    assert of_class == best and len(set(best)) > 1
    assert torch.equal(joint.matrix, filtered(*best).matrix)


def test_roc_against_counting_pairs():
    score = (8 * normal(0, 40)).round()  # with some ties
    true = normal(9, 40) > 0
    fpr, tpr, area = roc(score, true.float())
    wins = [(p > n) + 0.5 * (p == n) for p in score[true] for n in score[~true]]
    assert area == pytest.approx(float(sum(wins)) / len(wins), abs=1e-9)
    thresholds = [math.inf, *score.unique().flip(0)]
    for rates, chosen in ((fpr, score[~true]), (tpr, score[true])):
        assert rates.tolist() == [(chosen >= t).double().mean() for t in thresholds]


def test_auc_leaves_out_classes_without_a_value():
    truth = torch.tensor([[1, 0, 0], [0, 0, 1], [1, 0, 1.0]])
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.1, 0.8], [0.3, 0.1, 0.05]])
    macro, micro, _ = auc(scores, truth)
    assert macro == pytest.approx((1 + 0.5) / 2)  # of classes 0 and 2; 1 never occurs
    wins = [p > n for p in (0.9, 0.3, 0.8, 0.05) for n in (0.2, 0.5, 0.1, 0.1, 0.1)]
    assert micro == pytest.approx(sum(wins) / 20)
    macro, micro, _ = auc(scores, torch.ones(3, 3))
    assert math.isnan(macro) and "every class is in all" in in_words(macro, micro)
    one_image = torch.tensor([[1.0, 0.0, 1.0]])  # each class is in all images or in none
    macro, micro, _ = auc(torch.tensor([[0.9, 0.2, 0.1]]), one_image)
    assert in_words(macro, micro).endswith("in all scored images or in none; micro 0.5000")
    thirds = auc(torch.tensor([[0.9], [0.8], [0.7], [0.6]]), torch.tensor([[0], [1], [0], [0]]))
    assert thirds[0] == pytest.approx(2 / 3, rel=1e-12)  # the mean is not rounded to float32


@pytest.mark.parametrize("flags", ["", "--eval-size train --size 40x48", "--eval-size centre",
                                   "--eval-pad 96"])
@torch.no_grad()
def test_evaluate_against_loops(root, stubs, flags):
    data = open_dataset("folder", str(root))
    cfg = config(f"--data folder --workers 0 --tau 0.5 --batch 3 {flags}")
    net, classifier = stubs
    transform = partial(T.for_scoring, size=cfg.scoring_size)
    if cfg.eval_size == "centre":
        transform = partial(T.centre_square, side=512)
    cases = []
    truth = []
    scores = []
    for i in range(len(data.val)):
        x, y = transform(data.val.image(i), data.val.mask(i))
        x = T.normalise(x)
        height, width = y.shape
        padded = F.pad(x, (0, 96 - width, 0, 96 - height)) if cfg.eval_pad else x
        cases.append((net(padded[None])[0, :, :height, :width].softmax(0), y))
        small = F.interpolate(x[None], (16, 16), mode="bilinear", antialias=True)
        scores.append(classifier(small).sigmoid()[0])
        truth.append(torch.tensor([float((y == c).any()) for c in range(C)]))
    alone = confusion_without(torch.zeros(len(cases), C, dtype=torch.bool), cases).matrix
    fused = confusion_without(torch.stack(scores) <= 0.5, cases).matrix
    assert torch.equal(s4.evaluate(net.train(), data, cfg, CTX)[0].matrix, alone)
    assert torch.equal(s4.evaluate(net, data, cfg, CTX, classifier)[0].matrix, fused)
    assert not torch.equal(alone, fused)
    areas = s4.evaluate_classifier(classifier.train(), data, cfg, CTX)
    slow = auc(torch.stack(scores)[:, 1:], torch.stack(truth)[:, 1:])  # without the background
    assert areas[:2] == pytest.approx(slow[:2], nan_ok=True)


# ---- images

def test_augment_scales_in_tenths_crops_and_pads():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    mask = np.random.default_rng(1).integers(0, 3, (30, 40)).astype(np.uint8)
    cfg = config("--scale 0.5 1.6 --no-flip --shift 0")
    augment = partial(s4.augment, cfg)
    sides = {tuple(augment(image, None, np.random.default_rng(k))[0].shape[1:]) for k in range(100)}
    assert sides == {(3 * s, 4 * s) for s in range(5, 17)}
    cfg.scale = (1.0, 1.0)
    cfg.crop = (36, 44)
    for cfg.pad_label in (255, 0):
        x, y = augment(image, mask, np.random.default_rng(0))
        assert torch.equal(y[:30, :40], torch.from_numpy(mask))
        assert (y[30:] == cfg.pad_label).all() and (y[:, 40:] == cfg.pad_label).all()
        assert x[:, 30:, 0].T.tolist() == 6 * [T.MEAN_COLOUR]
        assert torch.equal(x[:, :30, :40], torch.from_numpy(image).permute(2, 0, 1))


def test_two_views():
    cfg = config("--mlmt-size 32")
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    tags = np.array([False, False, True, False])
    plain, _ = T.resize(torch.from_numpy(image).permute(2, 0, 1), None, (32, 32))
    seen = set()
    for k in range(12):
        views, z = s4.two_views(cfg, image, tags, np.random.default_rng(k))
        assert z.tolist() == [0, 0, 1, 0]
        assert all(torch.equal(view, plain) or torch.equal(view, plain.flip(2)) for view in views)
        seen.add(tuple(torch.equal(view, plain) for view in views))
    assert len(seen) == 4  # the flips are independent
    assert s4.two_views(cfg, image, None, np.random.default_rng(0))[1] is None


def test_strong_view_is_torchvisions_jitter_and_blur_with_numbers_of_each_image():
    cfg = config("--mlmt-blur 0.5 1")
    x = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    out = T.denormalise(s4.strong_view(T.normalise(x), 4, cfg, CTX))
    rng = CTX.random(cfg.seed, "strong view", 4)
    amounts = (2 * rng.uniform(3, 4) - 1).tolist()
    sigmas = 0.5 + 0.5 * rng.uniform(3)
    order = np.random.default_rng(mix(cfg.seed, "jitter", 4)).permutation(4)
    for image, (brightness, contrast, saturation, hue), sigma, ours in zip(x, amounts, sigmas, out):
        steps = [lambda x, f=brightness: tvf.adjust_brightness(x, 1 + 0.4 * f),
                 lambda x, f=contrast: tvf.adjust_contrast(x, 1 + 0.4 * f),
                 lambda x, f=saturation: tvf.adjust_saturation(x, 1 + 0.4 * f),
                 lambda x, f=hue: tvf.adjust_hue(x, 0.1 * f)]
        for k in order:
            image = steps[k](image)
        padded = F.pad(image[None], [3] * 4, mode="replicate")
        expected = tvf.gaussian_blur(padded, [7, 7], [float(sigma)] * 2)[0, :, 3:-3, 3:-3]
        assert torch.allclose(ours, expected, atol=1e-5)


def test_grey_images_have_no_hue_and_no_blur_changes_nothing():
    x = torch.tensor([0.0, 0.4, 1.0])[:, None, None, None].expand(3, 3, 2, 2)
    assert torch.allclose(turn_hue(x, torch.full((3, 1, 1, 1), 0.3)), x)
    u = torch.tensor([0.0, 0.1, 1.0])
    assert torch.allclose(gaussian_blur(x, u, 0, 50), x)  # of one colour
    x = torch.rand(3, 3, 9, 8)
    assert torch.equal(gaussian_blur(x, u, 0, 0), x)


def test_centre_square_of_pcontext():
    mask = np.tile(np.arange(30, dtype=np.uint8), (20, 1))
    x, y = T.centre_square(np.zeros((20, 30, 3), np.uint8), mask, 40)
    assert x.shape == (3, 40, 40) and y.shape == (40, 40)
    assert y[0, 0] == 5 and y[0, -1] == 24  # columns 10..49 of 60


# ---- runs

S = "--aspp-rates 1,2 --batch 2 --crop 32 --scale 0.5 0.7 --lr 0.01 --steps 6"
GAN = "--d-width 4 --gamma 0.5 --lr-d 0.003"
G = "--mlmt-size 32 --mlmt-batch 2 --mlmt-epochs 2"
BOTH = f"{S} {GAN} {G} --mlmt-batch-u 2 --tau 0.8"


@pytest.fixture(scope="module")
def base(bare, root):
    return f"{' '.join(bare['s4gan_mlmt'])} --root {root} --save-every 100"


def go(flags):
    run_here("s4gan_mlmt", *flags.split())


def assert_logged(folder, rows):
    """The columns of log.csv are those of the plain version, whose rows begin with step 1"""
    for name in rows[0]:
        expected = {k + 1: torch.as_tensor(row[name]).item() for k, row in enumerate(rows)}
        assert column(folder, name) == pytest.approx(expected, rel=2e-3, abs=1e-6), name


def assert_moved_alike(network, start, state):
    """Every parameter went from `start` to its value in `state`, within 1 % of the way it went"""
    for name, parameter in network.named_parameters():
        way = (parameter - start[name]).norm()
        assert (parameter - state[name]).norm() <= 0.01 * way, name
    for name, buffer in network.named_buffers():
        assert torch.allclose(buffer, state[name], rtol=1e-2, atol=2e-3), name


@pytest.mark.parametrize("flags", [
    "--supervised", "--lambda-adv 0.5 --lambda-fm 0", "--lambda-fm 2 --lambda-st 0.7",
    "--gamma 0.51 --head-lr-mult 2", "--d-dropout elementwise --backbone-lr-mult 3"])
def test_steps_of_branch_a_are_those_of_the_paper(scaled, base, tmp_path, flags):
    """Eq. 1 to 5: four steps in plain torch."""
    gan = "" if flags == "--supervised" else f"{GAN} --branch s4gan --gamma 0.5135"
    arguments = f"{base} {S} --steps 4 --batch 4 {gan} {flags}"
    go(f"{arguments} --out {tmp_path}")
    cfg = config(arguments)
    data = open_dataset(cfg.data, cfg.root)
    labelled, unlabelled = choose_labelled(data, cfg.labeled, cfg.split, cfg.seed)
    torch.manual_seed(mix(cfg.seed, "init"))
    net = s4.Segmenter(cfg, C).train()
    d = s4.Discriminator(C, cfg.d_width, cfg.d_dropout)
    start = copy.deepcopy(net.state_dict())
    start_d = copy.deepcopy(d.state_dict())
    stream_l = Stream(data.train, labelled, partial(s4.augment, cfg), cfg.seed, "labelled", True)
    stream_u = Stream(data.train, unlabelled, partial(s4.augment, cfg), cfg.seed, "unlabelled", False)
    stream_r = Stream(data.train, labelled, partial(s4.augment, cfg), cfg.seed, "real", True)
    groups = [dict(params=net.net.body.parameters()), dict(params=net.net.head.parameters())]
    optimizer = torch.optim.SGD(groups, 1, 0.9, weight_decay=cfg.weight_decay)
    optimizer_d = torch.optim.Adam(d.parameters(), betas=(0.9, 0.99))
    rows = []
    for step in range(4):
        decay = (1 - step / 4) ** 0.9
        optimizer.param_groups[0]["lr"] = cfg.lr * decay * cfg.backbone_lr_mult
        optimizer.param_groups[1]["lr"] = cfg.lr * decay * cfg.head_lr_mult
        optimizer_d.param_groups[0]["lr"] = cfg.lr_d * decay
        x_l, y_l = batch_of(stream_l, step, 4)
        logits_l = net(x_l)
        loss = F.cross_entropy(logits_l, y_l, ignore_index=255)  # Eq. 1
        rows.append(dict(loss_ce=loss, lr=cfg.lr * decay))
        if gan:
            x_u = batch_of(stream_u, step, 4)
            x_r, y_r = batch_of(stream_r, step, 4)
            logits_u = net(x_u)
            p = logits_u.softmax(1)
            true = torch.stack([(y_r == c).float() for c in range(C)], 1)
            i_u = (x_u - x_u.min()) / (x_u.max() - x_u.min())
            i_r = (x_r - x_r.min()) / (x_r.max() - x_r.min())
            rng = [Random((cfg.seed, "discriminator", step, k)) for k in range(4)]
            score, f_fake = d(p, i_u, rng[0])
            _, f_real = d(true, i_r, rng[1])
            loss_fm = (f_real.mean(0) - f_fake.mean(0)).abs().mean()  # Eq. 2
            loss_adv = -score.sigmoid().log().mean()  # Table 6
            gate = score.sigmoid()
            chosen = [j for j in range(4) if gate[j] >= cfg.gamma and step > 0]
            loss_st = 0
            if chosen:  # Eq. 3
                loss_st = F.cross_entropy(logits_u[chosen], logits_u[chosen].argmax(1))
            loss = loss + cfg.lambda_fm * loss_fm + cfg.lambda_st * loss_st + cfg.lambda_adv * loss_adv
            rows[step] |= dict(loss_fm=loss_fm, loss_st=loss_st, passed=len(chosen) / 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if gan:
            d_fake = d(p.detach(), i_u, rng[2])[0].sigmoid()
            d_real = d(true, i_r, rng[3])[0].sigmoid()
            loss_d = -(d_real.log().mean() + (1 - d_fake).log().mean()) / 2  # Eq. 5
            optimizer_d.zero_grad()  # D learns nothing from the loss of S
            loss_d.backward()
            optimizer_d.step()
            rows[step] |= dict(loss_d=loss_d, d_real=d_real.mean(), d_fake=d_fake.mean())
    assert_logged(tmp_path, rows)
    state = last(tmp_path)
    assert_moved_alike(net, start, state["net"])
    if gan:
        assert_moved_alike(d, start_d, state["discriminator"])
        assert len({row["passed"] for row in rows}) > 1
    else:
        assert same_state(state["discriminator"], start_d) and not (tmp_path / "mlmt").exists()


def with_tags(arguments, folder):
    """Flags of a run whose unlabelled images have tags instead of masks, and {key: names} of the file. One of
    them has a mask that cannot be read, and one labelled image has other tags than its mask."""
    root = fixtures.make_folder(folder / "data")
    data = open_dataset("folder", root)
    (labelled, *_), (masked, *others) = choose_labelled(data, "5", "", 0)
    Path(data.train.masks[masked]).write_text("no mask")
    lines = {data.train.keys[labelled]: ("sky",), data.train.keys[masked]: ("car", "tall tree")}
    lines |= {data.train.keys[i]: ("car",) for i in others}
    fixtures.save_lines(folder / "tags.txt", [", ".join([key, *names]) for key, names in lines.items()])
    return arguments.replace("TAGS", str(folder / "tags.txt")) + f" --root {root}", lines


@pytest.mark.parametrize("flags", ["", "--cons cosine --cons-on unlabelled --ema 0.6",
                                   "--weak --lambda-cons 3", "--weak --tags TAGS --mlmt-batch 3",
                                   "--supervised --mlmt-weight-decay 0.05"])
def test_steps_of_branch_b_are_those_of_the_paper(scaled, base, tmp_path, flags):
    """Eq. 6: three epochs of student and teacher in plain torch."""
    semi = "" if "--supervised" in flags else "--mlmt-batch-u 2"
    arguments = f"{base} --branch mlmt {G} {semi} {flags} --mlmt-epochs 3 --mlmt-lr 0.004"
    lines = {}
    if "--tags" in flags:
        arguments, lines = with_tags(arguments, tmp_path)
    elif "--weak" in flags:
        arguments += f" --root {fixtures.make_folder(tmp_path / 'data')}"
        shutil.rmtree(tmp_path / "data/unlabeled")  # whose images have no mask
    go(f"{arguments} --out {tmp_path}")
    cfg = config(arguments)
    data = open_dataset(cfg.data, cfg.root)
    labelled, unlabelled = choose_labelled(data, cfg.labeled, cfg.split, cfg.seed)
    if cfg.weak:
        labelled = unlabelled = list(range(len(data.train)))

    def z_of(i):
        if data.train.keys[i] in lines:
            return np.array([c == 0 or data.classes[c] in lines[data.train.keys[i]] for c in range(C)])
        return np.array([(data.train.mask(i) == c).any() for c in range(C)])
    split = types.SimpleNamespace(image=data.train.image, mask=z_of)
    torch.manual_seed(mix(cfg.seed, "init", "mlmt"))
    student = s4.Classifier(cfg, C).train().to(memory_format=torch.channels_last)
    teacher = copy.deepcopy(student)
    start = copy.deepcopy(student.state_dict())
    stream_l = Stream(split, labelled, partial(s4.two_views, cfg), cfg.seed, "mlmt labelled", True)
    stream_u = Stream(split, unlabelled, partial(s4.two_views, cfg), cfg.seed, "mlmt unlabelled", False)
    optimizer = torch.optim.SGD(student.parameters(), 1, 0.9, nesterov=True,
                                weight_decay=cfg.mlmt_weight_decay)
    assert math.ceil(len(labelled) / cfg.mlmt_batch) == 3
    rows = []
    for step in range(9):
        epoch = step // 3
        lr = 1e-4 + (0.004 - 1e-4) * (1 + math.cos(math.pi * epoch / 3)) / 2
        optimizer.param_groups[0]["lr"] = lr
        (x_l, x_l2), z = batch_of(stream_l, step, cfg.mlmt_batch)
        g = student(x_l)
        loss = F.binary_cross_entropy(g.sigmoid(), z.float())
        rows.append(dict(loss_cce=loss, lr=lr))
        if semi:
            x_u, x_u2 = batch_of(stream_u, step, 2)
            x_u = s4.strong_view(x_u, step, cfg, CTX)
            first = cfg.mlmt_batch if cfg.cons_on == "unlabelled" else 0
            g = torch.cat([g, student(x_u)])[first:]
            h = torch.cat([teacher(x_l2), teacher(x_u2)])[first:].detach()
            cons = ((g.sigmoid() - h.sigmoid()) ** 2).mean()
            if cfg.cons == "cosine":
                cons = 1 - F.cosine_similarity(g, h, 1).mean()
            w_c = cfg.lambda_cons * (0, 2 * 0.7 / 3, 1)[epoch]  # burn-in: 0.3 epochs
            loss = loss + w_c * cons
            rows[step] |= dict(loss_cons=cons, w_c=w_c)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        alpha = min(1 - 1 / (step + 2), cfg.ema)
        for mine, its in zip(teacher.parameters(), student.parameters()):
            mine.data = alpha * mine.data + (1 - alpha) * its.data
    assert_logged(tmp_path / "mlmt", rows)
    state = last(tmp_path / "mlmt")
    assert_moved_alike(student, start, state["student"])
    if semi:
        assert_moved_alike(teacher, start, state["net"])
    else:
        assert same_state(state["net"], state["student"])


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    go(f"{base} {BOTH} --out {folder}")
    return folder


def test_evaluate_and_predict_repeat_the_run(whole, root, tmp_path, capsys):
    a = whole / "last.pt"
    b = whole / "mlmt/last.pt"
    go(f"--evaluate {a} --classifier {b} --heuristics 99")
    said = capsys.readouterr().out
    assert column(whole, "miou_fused")[6] != column(whole, "miou")[6]
    assert f"mIoU {100 * column(whole, 'miou_fused')[6]:.1f}, fused" in said
    assert said.count("tuned on these images") == 2
    go(f"--evaluate {a} --classifier {b} --tau 1 --background 2")
    changed = checkpoint.load(b)
    changed["config"] |= dict(tau=1.0, background=[2])  # after branch A was trained
    checkpoint.save(tmp_path / "changed.pt", changed)
    said = capsys.readouterr().out
    go(f"--evaluate {a} --classifier {tmp_path}/changed.pt")
    assert capsys.readouterr().out == said
    go(f"--evaluate {b} --out {tmp_path}/b")
    macro = float(capsys.readouterr().out.split("AUC macro ")[1].split(",")[0])
    assert macro == pytest.approx(column(whole / "mlmt", "auc_macro")[6], abs=1e-3)
    assert (tmp_path / "b/roc.png").exists() and (whole / "mlmt/roc.png").exists()
    images = f"--images {root}/images/val --out {tmp_path}/p"
    go(f"--predict {a} --classifier {b} --tau 1 {images}")
    masks = [np.array(Image.open(path)) for path in (tmp_path / "p").iterdir()]
    assert not any(mask.any() for mask in masks)  # every class but the background is removed


def test_missing_tags_are_told_before_branch_a(base, tmp_path):
    with pytest.raises(UserError, match="--weak: 3 of 9 training images have no tags"):
        go(f"{base} {S} --weak --out {tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_branches_one_after_the_other_in_one_folder(whole, base, tmp_path, monkeypatch):
    """Each loads its weights once, and the settings of branch B may change until it has begun."""
    loaded = []
    monkeypatch.setattr(s4, "load_weights", lambda body, *_: loaded.append(type(body).__name__))
    go(f"{base} {S} {GAN} --branch s4gan --out {tmp_path}")
    written = (tmp_path / "last.pt").stat().st_mtime_ns
    go(f"{base} {BOTH} --out {tmp_path}")
    assert (tmp_path / "last.pt").stat().st_mtime_ns == written  # a finished branch A is not repeated
    assert loaded == ["ResNet", "ResNet"]
    assert column(whole, "miou_fused") == column(tmp_path, "miou_fused")
    assert same_state(last(whole / "mlmt")["net"], last(tmp_path / "mlmt")["net"])
    with pytest.raises(UserError, match="--mlmt-batch was 2, now 3"):
        go(f"{base} {BOTH} --mlmt-batch 3 --out {tmp_path}")


@pytest.mark.parametrize("flags, said", [
    ("--evaluate {b} --heuristics 9", "segments no"), ("--predict {b} --images x", "segments nothing"),
    ("--evaluate {a} --classifier {a}", "not a checkpoint of branch B"),
    ("--evaluate {a} --classifier {other}", "with these classes"),
    ("--evaluate {a} --size 8", "--size has no effect on scoring with --eval-size full"),
    ("--evaluate {a} --tau 0.5", "--tau has no effect without --classifier"),
    ("--predict {a} --classifier {b} --background 99 --images x", "--background 99: folder has the classes 0 to"),
    ("--branch s4gan --tau 0.5", "--tau has no effect with --branch s4gan"),
    ("--branch mlmt --tau 0.5", "--tau has no effect with --branch mlmt"),
    ("--branch s4gan --background 1", "--background has no effect with --branch s4gan"),
    ("--branch s4gan --crop 8 --pad-label 50", "--pad-label 50: shapes has the classes"),
    ("--network deeplabv3plus --backbone-layers 2", "has all 4 layers"),
    ("--classifier {b}", "works with --evaluate or --predict")])
def test_networks_that_do_not_fit_are_refused(whole, tmp_path, flags, said):
    paths = dict(a=whole / "last.pt", b=whole / "mlmt/last.pt", other=tmp_path / "other.pt")
    other = checkpoint.load(paths["b"])
    other["domains"][0]["classes"] = ["x"] * C
    checkpoint.save(paths["other"], other)
    with pytest.raises(UserError, match=said):
        go(flags.format(**paths))
