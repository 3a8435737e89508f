"""c3_semiseg.py against the paper: each piece versus a slow, obvious version, or numbers worked out
by hand; then whole steps."""
import copy
import json
import math
from functools import partial
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CTX, batch_of, column, count, ids, last, normal, run_here, same_state
from PIL import Image
from torch import nn

import c3_semiseg as c3
from common.command_line import parse
from common.datasets import choose_labelled
from common.random import Random
from common.schedules import set_lr
from common.settings import from_saved

C = 5  # classes in most tests


def config(**values):
    return c3.Config(**dict(backbone="resnet18", backbone_layers=2, weights="none",
                            backbone_lr_mult=1.0) | values)


def gradient(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


# ---- network and teacher

def full_size(**values):
    """The paper's network, without storage"""
    cfg = config(backbone="resnet101", backbone_layers=4, weights="imagenet", **values)
    with torch.device("meta"):
        return c3.Segmenter(cfg, 19)


def test_numbers_of_parameters():
    net = full_size(aspp_rates=(6, 12, 18, 24))
    assert count(net.net) == 43_901_068
    assert count(net.net, trained=True) == 43_795_724  # BN is frozen
    assert count(net.projection) == 590_336
    assert count(full_size().net.head) == 700_454  # the two branches that work in the release


@pytest.mark.parametrize("weights, std", [("imagenet", 0.01), ("none", 1 / math.sqrt(3 * 128))])
def test_from_scratch_batch_normalisation_learns_and_heads_start_larger(weights, std):
    torch.manual_seed(0)
    net = c3.Segmenter(config(weights=weights), C).train()
    assert net.projection[0].weight.std().item() == pytest.approx(std, rel=0.03)
    before = {name: b.clone() for name, b in net.named_buffers()}
    net(normal(0, 2, 3, 32, 32))
    assert same_state(before, dict(net.named_buffers())) == (weights == "imagenet")
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.weight.requires_grad for norm in norms} == {weights == "none"}


@pytest.mark.parametrize("m, warmup, kept", [
    (1, True, 0), (2, True, 8 / 9), (25, True, 0.99), (2, False, 0.99)])
def test_teacher_is_copied_and_then_averaged(m, warmup, kept):
    teacher, student = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
    student.weight.data.zero_()
    student.running_mean.fill_(7.0)
    c3.update_teacher(teacher, student, m, config(ema_warmup=warmup))
    assert teacher.weight.item() == pytest.approx(kept)
    assert teacher.running_mean.item() == pytest.approx(7 * (1 - kept))


# ---- photometry and geometry

@pytest.mark.parametrize("name, level, expected, error", [
    ("invert", 3, lambda v: 255 - v, 0), ("posterize", 9.9, lambda v: v // 32 * 32, 0),
    ("solarize", 9.9, lambda v: torch.where(v >= 253, 255 - v, v), 0),
    ("solarize_add", 10, lambda v: torch.where(v < 128, v + 110, v), 0),
    ("brightness", 10, lambda v: (1.9 * v).clamp(max=255), 1),
    ("contrast", 10, lambda v: (1.9 * v - 0.9 * 127).clamp(0, 255), 2)])
def test_operations_at_their_levels(name, level, expected, error):
    v = torch.arange(256)
    gray = c3.tvf.to_pil_image(v.byte().view(1, 1, 256).expand(3, 1, 256))
    out = c3.tvf.pil_to_tensor(c3.OPS[name](gray, level))
    assert (out - expected(v)).abs().max() <= error


def picture():
    return c3.tvf.to_pil_image(ids(0, 3, 20, 24, high=256).byte())


def test_color_jitter_is_four_adjustments_in_the_drawn_order():
    rng = Mock()
    rng.uniform.side_effect = [np.array([0.5, 1.5, 0.7]), 0.2]
    rng.permutation.return_value = [2, 0, 3, 1]
    expected = c3.tvf.adjust_brightness(c3.tvf.adjust_saturation(picture(), 0.7), 0.5)
    expected = c3.tvf.adjust_contrast(c3.tvf.adjust_hue(expected, 0.2), 1.5)
    assert c3.T.colour_jitter(picture(), rng, 0.5, 0.25) == expected
    assert rng.uniform.call_args_list == [call(0.5, 1.5, 3), call(-0.25, 0.25)]


def test_rand_augment_applies_operations_half_of_the_time_at_up_to_level_10():
    rng = Mock()
    rng.choice.return_value = ["invert", "brightness", "solarize"]
    rng.normal.side_effect = [9.0, 10.7, 9.5]
    rng.random.side_effect = [0.5, 0.4, 0.49]
    expected = c3.OPS["solarize"](c3.OPS["brightness"](picture(), 10), 9.5)
    assert c3.rand_augment(picture(), rng) == expected
    rng.choice.assert_called_once_with(list(c3.OPS), 2)  # with replacement
    assert len(c3.OPS) == 10 and rng.normal.call_args == call(10, 0.5)


def test_rotate_makes_a_window_of_the_rotated_image_and_marks_what_it_invents():
    image = ids(0, 3, 40, 60, high=256).byte()
    mask = ids(1, 40, 60, high=5).byte()
    for angle in (-10, 0, 7):
        expected = c3.tvf.pil_to_tensor(c3.tvf.to_pil_image(image).rotate(angle, Image.Resampling.BILINEAR))
        labels = c3.tvf.rotate(mask[None], angle, fill=255)[0]
        for size, top, left in (((40, 60), 0, 0), ((20, 24), 20, 0), ((20, 24), 3, 36), ((99, 24), 0, 30)):
            rng = Mock()
            rng.integers.side_effect = [angle, top, left]
            x, y = c3.rotate(image, mask, 10, size, rng)
            window = np.s_[..., top:top + size[0], left:left + size[1]]
            assert torch.equal(x, expected[window])
            assert (y == labels[window]).float().mean() > 0.99  # ties of the nearest pixel
            assert rng.integers.call_args_list[0] == call(-10, 11)
    x, y = c3.rotate(torch.full_like(image, 200), mask, 10, (40, 60), np.random.default_rng(3))
    assert (y == 255).any() and (x[:, y == 255] < 110).all()


def frame():
    r = np.random.default_rng(0)
    image = r.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    return image, r.integers(0, C, (50, 70), dtype=np.uint8)


def views(seed=0, **values):
    cfg = config(**dict(crop=(32, 48), teacher_aug="W", student_aug="W") | values)
    return c3.augment(cfg, False, frame()[0], None, np.random.default_rng(seed))[0]


def test_both_views_share_their_geometry():
    for seed in range(6):
        weak, strong, valid = views(seed)
        assert torch.equal(weak, strong)
        again, jittered, same = views(seed, student_aug="S")
        assert torch.equal(weak, again) and torch.equal(valid, same)
        assert not torch.equal(weak, jittered)
    teacher, student, _ = views(teacher_aug="SR", student_aug="SR")
    assert not torch.equal(teacher, student)  # independent draws (Table 5)


def test_invented_corners_and_padding_are_not_valid():
    for seed in range(8):
        weak, _, valid = views(seed, rotate=45, crop=(50, 70))
        is_black = (weak == 0).all(0)
        assert is_black.any() and not is_black[valid].any()
    padded = views(0, rotate=0, crop=(60, 48))[2]
    assert padded[:50].all() and not padded[50:].any()


def test_labelled_view_is_a_window_with_its_mask_and_no_photometry():
    image, mask = frame()
    crop = partial(c3.augment, config(crop=(32, 48), rotate=0, flip=False), True)
    x, y = crop(image, mask, np.random.default_rng(3))
    windows = [(i, j) for i in range(19) for j in range(23) if torch.equal(
        torch.from_numpy(image[i:i + 32, j:j + 48]).permute(2, 0, 1), x)]
    (i, j), = windows
    assert np.array_equal(mask[i:i + 32, j:j + 48], y.numpy())


@pytest.mark.parametrize("values, sizes", [
    (dict(scales=(0.5, 1.0, 2.0)), {(25, 35), (50, 70), (100, 140)}),
    (dict(size=(20, 30)), {(20, 30)}), (dict(long_side=35), {(25, 35)})])
def test_sizes_of_labelled_views(values, sizes):
    augment = partial(c3.augment, config(rotate=0, **values), True)
    assert {augment(*frame(), np.random.default_rng(seed))[1].shape for seed in range(20)} == sizes


# ---- CutMix

def test_boxes_are_rectangles_of_half_the_area():
    box = c3.boxes(400, (256, 512), Random(("boxes",)))[:, 0]
    rows, columns = box.any(2).sum(1), box.any(1).sum(1)
    assert torch.equal(box.sum((1, 2)), rows * columns)
    assert (box.float().mean((1, 2)) - 0.5).abs().max() <= 0.0025
    assert (rows.min(), rows.max()) == pytest.approx((128, 256), abs=3)
    assert rows.log2().mean().item() == pytest.approx(7.5, abs=0.05)  # of 256 * 0.5^u
    top = box.any(2).float().argmax(1) / (256 - rows).clamp(min=1)
    assert top[rows < 200].mean().item() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("mode", ["cross", "intra"])
@pytest.mark.parametrize("groups", [1, 3])
def test_mixtures_are_complementary_and_swapping_again_unmixes_them(mode, groups):
    n = 4  # labelled images in a group
    half = groups * n
    x = normal(0, 2 * half, 3, 16, 20)
    order = c3.pairing(mode, groups, n, Random())
    box = c3.boxes(half, (16, 20), Random())
    mixed, (a, b) = c3.swap(x[order], box), x[order].chunk(2)
    inside = box.expand_as(a)
    assert torch.equal(mixed[:half][inside], b[inside])
    assert torch.equal(mixed[:half][~inside], a[~inside])
    assert torch.equal(mixed[:half] + mixed[half:], a + b)
    assert torch.equal(c3.swap(mixed, box)[order.argsort()], x)
    few = c3.swap(x[order][..., ::4, ::4], box)  # the box at the nearest pixels
    assert torch.equal(few, mixed[..., ::4, ::4])
    group = torch.arange(groups).repeat_interleave(n).repeat(2)
    assert torch.equal(*group[order].chunk(2))  # pairs stay in one
    cross = (order[:half] < half) != (order[half:] < half)
    assert mode == "cross" or not cross.any()


def test_pairs_are_by_chance_or_none():
    order = c3.pairing("cross", 20000, 4, Random()) < 80000
    pairs = (order[:80000] != order[80000:]).sum().item() / 20000
    assert pairs == pytest.approx(16 / 7, abs=0.03)  # 4 pairs, each cross-set with 4 of 7
    assert c3.pairing("none", 3, 4, Random()).tolist() == list(range(24))


# ---- DCRS

def naive_thresholds(q, valid, old, s, beta):
    """Sort each class's confidences in Python"""
    new = []
    confidence, predicted = q.max(1)
    for c, before in enumerate(old):
        values = sorted(confidence[valid & (predicted == c)].tolist(), reverse=True)
        new.append(beta * before + (1 - beta) * values[int(len(values) * s)] if values else before)
    return new


@pytest.mark.parametrize("s", [0.0, 0.4, 0.99])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_eq6_equals_sorting_class_by_class(s, beta):
    q, valid = (3 * normal(0, 3, 6, 9, 11)).softmax(1), normal(1, 3, 9, 11) > -1
    q[:, 4] = 0  # an absent class keeps its threshold
    old = [0.9, 0.5, 0.1, 0.7, 0.33, 0.2]
    thresholds = torch.tensor(old)
    y, keep = c3.confident_pixels(q, valid, thresholds, config(dcrs=s, dcrs_beta=beta), CTX)
    assert thresholds.tolist() == pytest.approx(naive_thresholds(q, valid, old, s, beta), rel=1e-6)
    assert torch.equal(keep, valid & (q.amax(1) >= thresholds[q.argmax(1)]))
    assert torch.equal(y, torch.where(keep, q.argmax(1), 255))
    before = thresholds.clone()
    _, keep = c3.confident_pixels(q, valid, thresholds, config(dcrs=1.0), CTX)  # off
    assert torch.equal(keep, valid) and torch.equal(thresholds, before)
    c3.confident_pixels(q, valid & False, thresholds, config(), CTX)  # no class is there
    assert torch.equal(thresholds, before)


# ---- losses and ramps

def naive_pooled(values, keep, groups):
    parts = [v[k] for v, k in zip(values.double().view(groups, -1), keep.view(groups, -1))]
    return sum(part.mean() if len(part) else part.sum() for part in parts) / groups


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_eq1_cross_entropy(groups):
    logits, y = normal(0, 4, C, 6, 7).requires_grad_(), ids(1, 4, 6, 7)
    y[0, 3:] = 255  # uneven counts
    y[3] = 255  # with 4 groups one is empty
    values = -logits.double().log_softmax(1).gather(1, y.clamp(max=C - 1)[:, None])[:, 0]
    expected = naive_pooled(values, y != 255, groups)
    loss = c3.cross_entropy(logits, y, groups)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


@pytest.mark.parametrize("groups, divide", [(1, True), (2, True), (2, False)])
def test_eq2_consistency(groups, divide):
    logits = normal(0, 4, C, 6, 7).requires_grad_()
    q = (2 * normal(1, 4, C, 6, 7)).softmax(1)
    keep = normal(2, 4, 6, 7) > 0.3
    keep[1:3, 2:] = False
    values = -(q.double() * logits.double().softmax(1).log()).sum(1) / (C if divide else 1)
    expected = naive_pooled(values, keep, groups)
    loss = c3.consistency(logits, q, keep, groups, divide)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def test_losses_of_nothing_are_zero_with_a_graph():
    logits, f = normal(0, 2, C, 4, 4).requires_grad_(), normal(1, 4, 3).requires_grad_()
    q = logits.detach().softmax(1)
    rows = f[None]
    classes = torch.tensor([[0, 0, 1, 1]])
    for loss, x in ((c3.cross_entropy(logits, torch.full((2, 4, 4), 255), 2), logits),
                    (c3.consistency(logits, q, torch.zeros(2, 4, 4, dtype=torch.bool), 2), logits),
                    (c3.contrastive(rows, rows, classes, classes > 9), f),
                    (c3.contrastive(rows[:, :0], rows[:, :0], classes[:, :0], classes[:, :0] > 9), f),
                    (c3.contrastive(rows, rows, 0 * classes, classes < 9), f)):  # no negatives
        assert loss == 0
        assert not gradient(loss, x).any()


def naive_contrastive(f, keys, classes, valid, tau):
    """Eq. 5, one pair at a time, as it is printed"""
    f, keys = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (f, keys))
    rows = [i for i in range(len(f)) if valid[i]]
    total = 0
    for i in rows:
        e = {j: (f[i] @ keys[j] / tau).exp() for j in rows}
        negatives = sum(e[k] for k in rows if classes[k] != classes[i])
        positives = [j for j in rows if classes[j] == classes[i] and j != i]
        terms = sum((e[j] / (e[j] + negatives)).log() for j in positives)
        total = total - terms / max(len(positives), 1)
    return total / len(rows)


# ---- sampling

@pytest.mark.parametrize("available, kept", [
    ((50, 50), (10, 10)), ((5, 100), (5, 15)), ((100, 5), (15, 5)), ((15, 6), (14, 6)),
    ((0, 40), (0, 20)), ((40, 0), (20, 0)), ((9, 12), (9, 11)), ((11, 10), (10, 10)),
    ((10, 10), None), ((0, 20), None)])  # a class needs more cells than are drawn
def test_hard_and_easy_cells_fill_each_other_up(available, kept):
    """One image with so many hard and easy cells of class 1; the other cells are ignored."""
    hard, easy = available
    number = torch.arange(150).view(1, 1, 1, 150)  # stands for a cell's embedding
    classes = torch.where(number[0] < hard + easy, 1, 255)
    logits = F.one_hot((number[0] >= hard).long(), C).permute(0, 3, 1, 2).float()
    f, keys, c, valid = c3.sample(number.float(), 2.0 * number, classes, logits, Random().uniform(1, 150))
    assert torch.equal(2 * f, keys) and valid.all()
    cells = f.flatten().tolist()
    assert c.tolist() == ([[1] * 20] if kept else [[]])
    if kept:
        assert len(set(cells)) == 20 and max(cells) < hard + easy
        assert sum(cell < hard for cell in cells) == kept[0]


def image_set(seed, b=2):
    """(embeddings, keys, classes, logits) of b images of 32x48 with 9x13 cells; large classes"""
    coarse = ids(seed, b, 4, 6, high=4)
    classes = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    classes[:, :2] = 255
    f = normal(seed, b, 6, 9, 13).requires_grad_()
    return f, normal(seed + 1, b, 6, 9, 13), classes, normal(seed + 2, b, 4, 32, 48)


def naive_contrast(sets, groups, cfg, r):
    """The same sampling, image by image and class by class, then Eq. 5 within each group"""
    members = [[] for _ in range(groups)]  # (embedding, key, class)
    for f, keys, classes, logits in sets:
        size = f.shape[2:]
        small = F.interpolate(classes[:, None].float(), size, mode="nearest")
        predicted = F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)
        u = r.uniform(len(f), f[0, 0].numel())
        for b in range(len(f)):
            for c in set(range(4)) - set(cfg.skip_classes):
                cells = (small[b].flatten() == c).nonzero().flatten()
                if len(cells) <= cfg.anchors:
                    continue
                cells = cells[u[b, cells].argsort()]
                wrong = (predicted[b].flatten()[cells] != c) & (cfg.sampling == "hard")
                hard, easy = cells[wrong], cells[~wrong]
                n_hard = max(min(len(hard), cfg.anchors // 2), cfg.anchors - len(easy))
                for cell in (*hard[:n_hard], *easy[:cfg.anchors - n_hard]):
                    pair = f[b].flatten(1)[:, cell], keys[b].flatten(1)[:, cell]
                    members[b * groups // len(f)].append((*pair, c))
    losses = []
    for f, keys, classes in (zip(*group) for group in members):
        every = [True] * len(f)
        losses.append(naive_contrastive(torch.stack(f), torch.stack(keys), classes, every, cfg.tau))
    return sum(losses) / groups


@pytest.mark.parametrize("values, groups", [
    ({}, 2), (dict(contrast="labelled", contrast_scale=1.0), 2),
    (dict(contrast="unlabelled", sampling="random"), 2), (dict(skip_classes=(0, 2), tau=0.5), 1)])
def test_eq5_over_the_chosen_images(values, groups):
    cfg = config(anchors=4, **values)
    kinds = dict(labelled=image_set(0), unlabelled=image_set(10))
    chosen = [kinds[name] for name in kinds if cfg.contrast in ("both", name)]
    loss = c3.contrast(kinds, 3, groups, cfg, CTX)
    draw = CTX.random(cfg.seed, "views", 3)
    expected = cfg.contrast_scale * naive_contrast(chosen, groups, cfg, draw)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and loss > 1
    images = [f for f, *_ in kinds.values()]
    found, wanted = (torch.autograd.grad(x, images, materialize_grads=True) for x in (loss, expected))
    torch.testing.assert_close(found, wanted)


def test_a_gpu_that_is_not_asked_for_the_number_of_rows_computes_the_same(monkeypatch):
    kinds = dict(labelled=image_set(0), unlabelled=image_set(10))
    f = kinds["labelled"][0]
    u = Random().uniform(2, 9 * 13)
    for anchors, rows in ((25, 4 * 25), (30, 3 * 30)):  # all 4 classes; no more than 3 of 31 cells
        cfg = config(anchors=anchors)
        loss = c3.contrast(kinds, 3, 2, cfg, CTX)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            everything = c3.contrast(kinds, 3, 2, cfg, CTX)
            *_, valid = c3.sample(*kinds["labelled"], u, anchors, groups=2)
        assert valid.shape == (2, rows) and not valid.all() and valid.any()
        torch.testing.assert_close(everything, loss)
        torch.testing.assert_close(gradient(everything, f), gradient(loss, f))


@pytest.mark.parametrize("values", [dict(contrast="unlabelled"), dict(contrast_burn_in=False)])
def test_no_contrast_in_the_burn_in(values):
    f, *others = image_set(0)
    loss = c3.contrast(dict(labelled=(f, *others)), 0, 1, config(anchors=4, **values), CTX)
    assert loss == 0 and not gradient(loss, f).any()


def test_weight_of_the_consistency():
    cfg = parse(c3.Config, c3.PRESETS, ["--data", "cityscapes"])[0]
    values = [c3.consistency_weight(2250 + t, cfg) for t in (0, 1000, 2000, 3000, 4000, 22749)]
    assert values == pytest.approx([0.336897, 3.002733, 14.325240, 36.580781, 50, 50], abs=1e-5)


# ---- runs

@pytest.mark.parametrize("keys", ["student", "teacher"])
def test_four_steps_equal_plain_pytorch(scaled, tiny, folder_data, tmp_path, keys):
    """Two steps of the burn-in and two behind it, image by image, Eq. 1 to 7"""
    run_here("c3_semiseg", *tiny["c3_semiseg"], "--steps", 4, "--lr", 2e-4, "--consist-ramp", 0.5,
             "--contrast-ramp", 0.5, "--lambda-1", 50, "--lambda-2", 0.5, "--divide-by-classes",
             "--dcrs-beta", 0.1, "--keys", keys, "--backbone-lr-mult", 0.3, "--out", tmp_path)
    cfg = from_saved(c3.Config, json.loads((tmp_path / "config.json").read_text()))
    data = c3.open_dataset("folder", str(folder_data))
    labelled, unlabelled = choose_labelled(data, "5", "", 0)
    stream_l = c3.Stream(data.train, labelled, partial(c3.augment, cfg, True), 0, "labelled", True)
    stream_u = c3.Stream(data.train, unlabelled, partial(c3.augment, cfg, False), 0, "unlabelled", False)
    torch.manual_seed(c3.mix(0, "init"))
    student = c3.Segmenter(cfg, 4).train()
    thresholds = [0.9] * 4
    heads = [*student.net.head.parameters(), *student.projection.parameters()]
    optimizer = torch.optim.Adam([dict(params=student.net.body.parameters(), lr_mult=0.3), dict(params=heads)])
    for step in range(4):
        lr = 2e-4 * (1 - step / 4) ** 0.9
        set_lr(optimizer, lr)
        x_l, y_l = batch_of(stream_l, step, 2)
        if step < 2:
            logits, f = student(x_l)
            kinds = [(f, f, y_l, logits)]
            values = {}
            loss = 0
        else:
            x_t, x_s, valid = batch_of(stream_u, step - 2, 2)
            if step == 2:
                teacher = copy.deepcopy(student).eval()
            else:
                mine = student.state_dict()
                teacher.load_state_dict({
                    name: 8 / 9 * w + 1 / 9 * mine[name] if w.is_floating_point() else w
                    for name, w in teacher.state_dict().items()})
            with torch.no_grad():
                q, keys_u = teacher(x_t)
                _, keys_l = teacher(x_l)
                q = q.softmax(1)
            cut = CTX.random(0, "cutmix", step)
            order = c3.pairing("cross", 1, 2, cut)
            box = c3.boxes(2, (32, 32), cut)
            outputs = student(c3.swap(torch.cat([x_l, x_s])[order], box))
            logits, f = (c3.swap(output, box)[order.argsort()] for output in outputs)
            thresholds = naive_thresholds(q, valid, thresholds, 0.8, 0.1)
            confidence, predicted = q.max(1)
            keep = valid & (confidence >= torch.tensor(thresholds)[predicted])
            loss_consist = -(q * logits[2:].log_softmax(1)).sum(1)[keep].mean() / 4
            w_consist = 50 * math.exp(-5 * (1 - (step - 2) / 2) ** 2)
            loss = w_consist * loss_consist
            values = dict(loss_consist=loss_consist, w_consist=w_consist, kept=keep.float().mean(),
                          threshold=sum(thresholds) / 4)
            pseudo = torch.where(keep, predicted, 255)
            kinds = [(f[:2], keys_l if keys == "teacher" else f[:2].detach(), y_l, logits[:2]),
                     (f[2:], keys_u, pseudo, logits[2:])]
        loss_sup = F.cross_entropy(logits[:2], y_l, ignore_index=255)
        loss_contrast = 1.5 * naive_contrast(kinds, 1, cfg, CTX.random(0, "views", step))
        w_contrast = 0.5 * math.exp(-5 * max(0, 1 - step / 2) ** 2)
        optimizer.zero_grad()
        (loss + loss_sup + w_contrast * loss_contrast).backward()
        optimizer.step()
        values |= dict(loss_sup=loss_sup, loss_contrast=loss_contrast, w_contrast=w_contrast, lr=lr)
        for name, value in values.items():
            found = column(tmp_path, name)[step + 1]
            assert found == pytest.approx(torch.as_tensor(value).item(), rel=2e-3), name
    assert 0 < keep.float().mean() < 1
    assert list(column(tmp_path, "loss_consist")) == [3, 4]
    assert list(column(tmp_path, "miou_teacher")) == [4]
    trained = last(tmp_path)["student"]
    for name, w in student.named_parameters():  # Adam's step: where a gradient is 0, rounding decides
        assert ((trained[name] - w).abs() > 1e-5).float().mean() < 0.01, name
