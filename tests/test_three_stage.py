"""three_stage.py against the paper: each piece versus a slow, obvious version, the augmentation to the
pixel, and what is special in runs of several stages."""
import copy
import json
import math
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CTX, batch_of, column, count, ids, last, normal, run_here, same_run, same_state
from PIL import Image
from torch import nn

import fixtures
import three_stage as ts
from common import checkpoint
from common.datasets import open_dataset
from common.randaugment import source_map
from common.settings import UserError, from_saved
from common.transforms import normalise

C = 5


def config(**values):
    small = dict(backbone="resnet18", backbone_layers=2, weights="none", bn="learn", aspp_rates=(1, 2),
                 lambda_con=0.5, lambda_pl=0.5, batch_l=2, workers=0)
    return ts.Config(**small | values)


PAPER = ts.Config(bn="frozen", lr_groups="released", lambda_pl=0.5)


# ---- networks (Tables I, VII)

@pytest.fixture(scope="module")
def full_size():
    """The paper's networks of Stages 1, 2, 3 for 21 classes, without storage"""
    with torch.device("meta"):
        return [ts.MultiTask(PAPER, 21, stage) for stage in (1, 2, 3)]


def test_numbers_of_parameters(full_size):
    f = full_size[0].f
    assert (count(f), count(f, trained=True)) == (44_048_532, 43_943_188)
    ghat, gtilde = full_size[1].branch, full_size[2].branch
    assert (count(ghat.conv6), count(ghat.conv6, trained=True)) == (4_402_176, 4_390_912)
    assert (count(ghat), count(gtilde)) == (5_176_404, 1_548_372)
    assert [count(net) for net in full_size] == [44_048_532, 49_224_936, 45_596_904]


def test_conv6_is_conv5_at_half_width(full_size):
    conv5, conv6 = full_size[1].f.body.layer4, full_size[1].branch.conv6
    for one, half in zip(conv5.modules(), conv6.modules(), strict=True):
        assert type(one) is type(half)
        if isinstance(one, nn.Conv2d):
            for name in ("kernel_size", "stride", "dilation", "padding"):
                assert getattr(one, name) == getattr(half, name)
            assert one.out_channels == 2 * half.out_channels


def test_every_trained_tensor_once_with_its_learning_rate(full_size):
    for net in full_size:
        groups = ts.make_optimizer(net, PAPER).param_groups
        rates = [(id(p), group["lr"]) for group in groups for p in group["params"]]
        trained = {id(p): name for name, p in net.named_parameters() if p.requires_grad}
        assert sorted(p for p, _ in rates) == sorted(trained)
        for p, rate in rates:
            expected = 3e-5
            if trained[p].startswith("f.body"):
                expected = 1.2e-5 if "downsample" in trained[p] else 9e-6
            if trained[p] == "f.body.conv1.weight":
                expected = 3e-6
            assert rate == pytest.approx(expected), trained[p]


@pytest.mark.parametrize("bn, std", [("frozen", 0.01), ("learn", math.sqrt(2 / (9 * 64)))])
def test_initialisation(bn, std):
    """Pretrained: N(0, 0.01). From scratch: conv6 as torchvision's. f starts alike in all stages."""
    cfg = config(bn=bn, backbone="resnet50", branch_stage3="ghat")
    one, two, three = (ts.MultiTask(cfg, C, stage) for stage in (1, 2, 3))
    assert two.branch.conv6[1].conv2.weight.std().item() == pytest.approx(std, rel=0.03)
    for conv in (*two.f.head.branches, *two.branch.aspp.branches):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert same_state(one.f.state_dict(), two.f.state_dict())
    assert same_state(one.f.state_dict(), three.f.state_dict())
    assert not torch.equal(two.branch.aspp.branches[0].weight, three.branch.aspp.branches[0].weight)
    cfg.lambda_pl = 0.0
    assert ts.MultiTask(cfg, C, 2).branch is None  # Table V, row d


@pytest.mark.parametrize("stage", [2, 3])
def test_gradient_routing(stage):
    """L_seg and L_con reach all of f, and neither g nor the teacher. L_pl reaches g and what it shares with
    f: never ASPP_1, in Stage 2 not conv5 either."""
    net = ts.MultiTask(config(backbone_layers=4, bn="frozen"), C, stage)
    x, y = normal(0, 2, 3, 40, 40), ids(1, 2, 40, 40)
    teacher = normal(2, 2, C, 40, 40).requires_grad_()
    index = torch.arange(1600).view(40, 40).expand(2, 40, 40)
    f, g = net(x)
    assert torch.equal(f, net.f(x)) and net(x, branch=False)[1] is None

    def reached(loss):
        net.zero_grad()
        loss.backward(retain_graph=True)
        return {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    of_f = {name for name in trained if name.startswith("f.")}
    assert reached(ts.cross_entropy(f, y)) == of_f
    for target in ("hard", "soft"):
        assert reached(ts.consistency(f, teacher, index, target=target)) == of_f
    assert teacher.grad is None
    not_shared = ("f.head.", "f.body.layer4.") if stage == 2 else "f.head."
    assert reached(ts.cross_entropy(g, y)) == {name for name in trained if not name.startswith(not_shared)}


def test_weights_of_a_file_are_restored_where_they_fit(tmp_path):
    """The body always; the classifier of the authors' COCO file only for as many classes"""
    source = ts.Segmenter(config(), 21)
    state = {f"Scale.{name}": tensor for name, tensor in source.body.state_dict().items()}
    for name, tensor in source.head.state_dict().items():
        state[f"Scale.layer5.conv2d_list.{name.removeprefix('branches.')}"] = tensor
    torch.save(state, tmp_path / "coco.pth")
    cfg = config(weights=str(tmp_path / "coco.pth"), seed=3)
    for classes in (21, 19):
        f = ts.Segmenter(cfg, classes)
        own = copy.deepcopy(f.head.state_dict())
        ts.load_pretrained(f, cfg, print)
        assert same_state(f.body.state_dict(), source.body.state_dict())
        assert same_state(f.head.state_dict(), source.head.state_dict() if classes == 21 else own)


# ---- losses (Eq. 1-5)

@pytest.mark.parametrize("target", ["hard", "soft"])
def test_eq1_consistency(target):
    """Against a loop over the pixels; pooled over all images, not a mean of their means"""
    logits, teacher = normal(0, 2, C, 6, 7), 2 * normal(1, 2, C, 6, 7)
    index = torch.stack([source_map("rotate", 27, 6, 7), source_map("translate_x", 3, 6, 7)]).int()
    terms = []
    for b, v, u in np.ndindex(2, 6, 7):
        if index[b, v, u] >= 0:
            y, x = divmod(int(index[b, v, u]), 7)
            q = teacher[b, :, y, x].double().softmax(0)
            if target == "hard":
                q = F.one_hot(q.argmax(), C)
            terms.append(-(q * logits[b, :, v, u].double().log_softmax(0)).sum().item())
    for count, expected in ((None, np.mean(terms)), (5, sum(terms) / 5)):
        loss = ts.consistency(logits, teacher, index, count, target)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_losses_of_nothing_are_zero_with_a_graph():
    logits = normal(0, 1, C, 4, 4).requires_grad_()
    nowhere, void = torch.full((1, 4, 4), -1), torch.full((1, 4, 4), 255)
    for loss in (ts.cross_entropy(logits, void), ts.consistency(logits, logits, nowhere),
                 ts.consistency(logits, logits, nowhere, target="soft")):
        loss.backward()
        assert loss == 0 and not logits.grad.any()


def test_alpha_changes_at_the_released_steps():
    expected = {0: 0.99, 19999: 0.99, 20000: 0.995, 39999: 0.995, 40000: 0.9975, 49999: 0.9975, 50000: 0.999}
    assert {step: ts.alpha(step, 60000) for step in expected} == expected


@pytest.mark.parametrize("data, labels, expected", [
    ("cityscapes", 744, (1, 0.5, 0.5)), ("cityscapes", 1488, (3, 0.5, 0.5)), ("camvid", 10, (1, 0.5, 0.5)),
    ("voc", 212, (1, 0.25, 0.25)), ("voc", 529, (1, 1.25, 1.25)), ("voc", 1323, (2, 0.625, 0.625))])
def test_batches_and_lambdas_of_the_paper(data, labels, expected):
    cfg = ts.Config(data=data)
    ts.balance(cfg, labels)
    assert (cfg.batch_l, cfg.lambda_con, cfg.lambda_pl) == expected


# ---- data

@pytest.fixture(scope="module")
def data(folder_data):
    return open_dataset("folder", str(folder_data))


def write_masks(data, folder, size=None):
    """Pseudo-masks of class 1 throughout"""
    for i, key in enumerate(data.train.keys):
        fixtures.save_gray(folder / f"{key}.png", np.ones(size or data.train.image(i).shape[:2]))
    return folder


SAMPLE = dict(data="folder", batch=5, crop=(40, 48), seed=1)


def test_minibatches(data, tmp_path, monkeypatch):
    """First the labelled images, whose masks alone are opened; the others cover all images once per pass."""
    labelled = [0, 3, 4]
    opened = []
    mask = data.train.mask
    monkeypatch.setattr(data.train, "mask", lambda i: opened.append(i) or mask(i))
    masks = write_masks(data, tmp_path)
    stream = ts.Minibatches(data, labelled, 2, masks, 2, config(**SAMPLE))
    samples = [stream[p] for p in range(15)]
    assert sorted(opened) == [0, 0, 3, 3, 4, 4]
    for p, (x_w, x_s, index, y, pseudo) in enumerate(samples):
        assert x_w.shape == (3, 40, 48) and index.shape == y.shape == pseudo.shape == (40, 48)
        assert torch.equal(x_w, x_s) == (p % 5 < 2) == (y < 255).any()
        assert p % 5 > 1 or torch.equal(index, torch.arange(40 * 48).view(40, 48))
    every = range(len(data.train))
    assert sorted(stream.mixed.index(k) for k in every) == list(every)
    assert sorted(stream.labelled.index(k) for k in range(3)) == labelled
    plain = ts.Minibatches(data, labelled, 2, masks, 2, config(**SAMPLE, strong=False))[3]
    assert torch.equal(plain[0], plain[1]) and torch.equal(plain[2], samples[0][2])  # no A: all count in L_con
    stage3 = ts.Minibatches(data, labelled, 2, masks, 3, config(**SAMPLE))
    assert not torch.equal(stage3[7][0], samples[7][0])  # drawn anew in every stage


def test_truth_and_pseudo_mask_stay_on_their_image():
    """They are shifted, cropped and flipped together: an image painted from its mask shows it."""
    mask = ids(0, 6, 8).repeat_interleave(10, 0).repeat_interleave(10, 1)
    palette = torch.tensor([[10, 200, 60], [250, 30, 90], [0, 0, 0], [255, 255, 255], [127, 3, 5]]).byte()
    image, maps = palette[mask].permute(2, 0, 1), torch.stack([mask, mask]).byte()
    for seed in range(12):
        x, (y, pseudo) = ts.weak(image, maps, np.random.default_rng(seed), crop=(64, 50), shift=3)
        assert x.shape == (3, 64, 50) and torch.equal(y, pseudo)
        inside = y != 255
        assert torch.equal(x.permute(1, 2, 0)[inside], palette[y[inside].long()])
        assert (x.permute(1, 2, 0)[~inside] == torch.tensor([124, 116, 104])).all()


def test_scales_are_steps_of_a_tenth():
    image, maps = torch.full((3, 100, 120), 200).byte(), torch.ones(2, 100, 120).byte()
    sizes = set()
    for seed in range(150):
        _, m = ts.weak(image, maps, np.random.default_rng(seed), (0.5, 1.5), (150, 180))
        sizes.add((m[0] == 1).sum().item())
        assert torch.equal(m[0], m[1]) and set(m.unique().tolist()) <= {1, 255}
    assert sizes == {round(100 * s / 10) * round(120 * s / 10) for s in range(5, 16)}  # 0.5, 0.6, .., 1.5


def test_static_void_is_what_is_void_in_every_labelled_mask(data, tmp_path, monkeypatch):
    def mask(i):  # void is the upper half, and of image 0 all
        y = np.ones(data.train.image(i).shape[:2], np.uint8)
        y[:len(y) if i == 0 else len(y) // 2] = 255
        return y
    monkeypatch.setattr(data.train, "mask", mask)
    cfg = config(batch=2, size=(8, 8), static_void=True, strong=False)
    pseudo = ts.Minibatches(data, [0, 1], 1, write_masks(data, tmp_path, (8, 8)), 2, cfg)[1][4]
    assert (pseudo[:4] == 255).all() and (pseudo[4:] == 1).all()


@pytest.mark.parametrize("name, shape, classes, said", [
    ("nothing", (90, 90), C, "nothing.png: cannot be read as a mask"),
    ("good", (4, 4), C, r"expected ids .*\(4, 4\), found \(90, 90\)"),
    ("good", (90, 90), 4, "ids 0..3 of .* up to 4"), ("deep", (90, 90), C, "16 bits; expected a PNG of class")])
def test_foreign_or_missing_pseudo_masks(tmp_path, name, shape, classes, said):
    mask = ids(0, 90, 90).numpy()
    fixtures.save_gray(tmp_path / "good.png", mask)
    Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=said):
        ts.read_mask(tmp_path / f"{name}.png", shape, classes)


@pytest.mark.parametrize("size", [None, (40, 48)])
def test_pseudo_masks_are_argmax_f_at_the_size_of_training(data, tmp_path, size):
    f = nn.Conv2d(3, 4, 3, padding=1)  # is a segmenter too
    cfg = config(data="folder", batch=4, size=size, workers=2)
    ts.write_pseudo_masks(f, data, tmp_path, cfg, CTX)
    for i in range(len(data.train)):
        x = torch.from_numpy(data.train.image(i)).permute(2, 0, 1)
        x = normalise(ts.T.resize(x, None, size)[0] if size else x)
        mask = np.array(Image.open(ts.mask_path(tmp_path, data.train, i)))
        assert mask.dtype == np.uint8 and np.array_equal(mask, f(x[None]).argmax(1)[0].numpy())


# ---- runs of several stages

here = partial(run_here, "three_stage")


@pytest.fixture(scope="module")
def flags(tiny):
    return tiny["three_stage"]  # three stages of 1, 2 and 2 steps


@pytest.fixture
def whole(whole):
    return whole("three_stage")[0]


def test_stages_start_over_and_the_last_one_is_the_result(whole, data):
    """Each with an empty optimiser; the teacher is scored from Stage 2 on. The log counts through."""
    states = [last(whole / f"stage{stage}") for stage in (1, 2, 3)]
    assert [state["optimizer"]["state"][0]["step"].item() for state in states] == [1, 2, 2]
    for state, name in zip(states, ("student", "teacher", "teacher")):
        assert ("teacher" in state) == (name == "teacher")
        assert all(torch.equal(w, state[name][f"f.{key}"]) for key, w in state["net"].items())
    assert same_state(last(whole)["net"], states[2]["net"]) and last(whole)["step"] == 5
    f = ts.MultiTask(config(), 4, 1).f.eval()
    f.load_state_dict(states[1]["net"])  # of the teacher, which writes the masks (D3)
    x = normalise(torch.from_numpy(data.train.image(0)).permute(2, 0, 1))[None]
    mask = np.array(Image.open(ts.mask_path(whole / "stage2/pseudo", data.train, 0)))
    assert np.array_equal(mask, f(x).argmax(1)[0].numpy())
    assert column(whole, "stage") == {1: 1, 2: 2, 3: 2, 4: 3, 5: 3}
    assert list(column(whole, "miou_student")) == list(column(whole, "miou_branch")) == [3, 5]


def test_every_stage_has_its_panel_and_the_run_the_last_one(whole):
    panels = [(whole / f"stage{k}/predictions.png").read_bytes() for k in (1, 2, 3)]
    assert len(set(panels)) == 3 and (whole / "predictions.png").read_bytes() == panels[2]


def test_a_teacher_that_stays_near_its_start_is_told(flags, tmp_path, capsys):
    for ema, told in ((0.99, True), (0.1, False)):
        here(*flags, "--ema", ema, "--stages", 2, "--out", tmp_path / str(ema))
        assert ("98 % of the teacher will still be its initial weights" in capsys.readouterr().out) == told


def test_writer_student_is_scored_and_writes_the_masks(flags, tmp_path):
    """Algorithm 1, lines 9 and 13: log.csv has the other network beside it"""
    here(*flags, "--writer", "student", "--ema", 0.99, "--out", tmp_path)
    assert list(column(tmp_path, "miou_teacher")) == [3, 5] and not column(tmp_path, "miou_student")
    state = last(tmp_path / "stage2")
    student = {name[2:]: w for name, w in state["student"].items() if name.startswith("f.")}
    assert all(torch.equal(w, student[name]) for name, w in state["net"].items())


@pytest.mark.parametrize("stage", [2, 3])
def test_two_steps_equal_plain_pytorch(scaled, whole, flags, data, tmp_path, stage):
    """Eq. 4 and 5 with lambdas of 1/4 and 2: losses, Adam and EMA"""
    masks = whole / f"stage{stage - 1}/pseudo"
    here(*flags[:-2], "--masks", masks, "--stages", stage, "--lambda-con", 0.25, "--lambda-pl", 2,  # no --ema
         "--lr", 0.001, "--out", tmp_path)
    cfg = from_saved(ts.Config, json.loads((tmp_path / "config.json").read_text()))
    net = ts.MultiTask(cfg, 4, stage).train()
    teacher = copy.deepcopy(net).eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr)
    labelled, _ = ts.choose_labelled(data, "5", "", 0)
    stream = ts.Minibatches(data, labelled, 2, masks, stage, cfg)
    for step, decay in enumerate((0.99, 0.995)):
        x_w, x_s, index, y, pseudo = batch_of(stream, step, 4)
        f, g = net(x_s)
        target = teacher(x_w)[0].argmax(1)
        moved_target, moved_pseudo = torch.full_like(target, 255), torch.full_like(target, 255)
        for b, v, u in np.ndindex(*index.shape):
            if index[b, v, u] >= 0:
                source = b, *divmod(int(index[b, v, u]), 32)
                moved_target[b, v, u] = target[source]
                moved_pseudo[b, v, u] = pseudo[source]
        pairs = dict(loss_seg=(f[:2], y[:2]), loss_con=(f, moved_target), loss_pl=(g, moved_pseudo))
        losses = {name: F.cross_entropy(*pair, ignore_index=255) for name, pair in pairs.items()}
        for name, loss in losses.items():
            assert column(tmp_path, name)[step + 1] == pytest.approx(loss.item(), rel=1e-3), name
        optimizer.zero_grad()
        (losses["loss_seg"] + losses["loss_con"] / 4 + 2 * losses["loss_pl"]).backward()
        optimizer.step()
        mine = net.state_dict()  # statistics of BN are averaged as well
        averaged = {name: decay * w + (1 - decay) * mine[name] for name, w in teacher.state_dict().items()
                    if w.is_floating_point()}
        teacher.load_state_dict(mine | averaged)
    state = last(tmp_path / f"stage{stage}")
    for name, module, limit in (("student", net, 2e-5), ("teacher", teacher, 2e-6)):
        for key, w in module.state_dict().items():  # where a gradient is 0, rounding decides on Adam's step
            assert ((state[name][key] - w).abs() > limit).float().mean() < 0.01, (name, key)


def test_stages_are_connected_by_masks_alone(whole, flags, tmp_path):
    """A stage alone is that of the run; other masks, other weights, but without g (Fig. 2, Table V d)."""
    def stage3(name, masks, *more):
        here(*flags, "--masks", whole / f"stage{masks}/pseudo", *more, "--out", tmp_path / name)
        return last(tmp_path / name / "stage3")["student"]
    assert same_state(stage3("same", 2), last(whole / "stage3")["student"])
    assert not same_state(stage3("other", 1), last(whole / "stage3")["student"])
    assert same_state(*(stage3(f"without{k}", k, "--lambda-pl", 0) for k in (1, 2)))
    assert column(tmp_path / "without1", "loss_con") and not column(tmp_path / "without1", "loss_pl")


def test_more_stages_later(whole, flags, tmp_path):
    """--stages 1, 2, then 3 in one folder is the run of three; fewer stages than there are is refused."""
    for stages in (1, 2, 3):
        here(*flags, "--stages", stages, "--out", tmp_path)
    assert same_state(last(whole / "stage3")["student"], last(tmp_path / "stage3")["student"])
    with pytest.raises(UserError, match=r"holds the stages \[1, 2, 3\], but this command trains 1 to 2"):
        here(*flags, "--stages", 2, "--out", tmp_path)


def test_death_while_pseudo_masks_are_written(whole, flags, data, tmp_path, monkeypatch):
    """Stage 1's are complete, of Stage 2's there are three; a signal then ends the process at once."""
    written = len(data.train) + 3
    handlers = []
    save = ts.save_mask

    def dying(*arguments):
        handlers.append(signal.getsignal(signal.SIGTERM))
        if len(handlers) > written:
            raise KeyboardInterrupt
        save(*arguments)
    monkeypatch.setattr(ts, "save_mask", dying)
    with pytest.raises(KeyboardInterrupt):
        here(*flags, "--out", tmp_path)
    assert len([*tmp_path.rglob("pseudo/**/*.png")]) == written and set(handlers) == {signal.SIG_DFL}
    monkeypatch.setattr(ts, "save_mask", save)
    here(*flags, "--out", tmp_path)
    same_run(whole, tmp_path)


def test_masks_of_other_weights_are_not_reused(whole, flags, tmp_path):
    """A stage that is trained anew deletes its masks; with a later stage there, nothing is trained."""
    run = shutil.copytree(whole, tmp_path / "run")
    finished = checkpoint.load(run / "stage1/finished.pt")
    checkpoint.save(run / "stage1/finished.pt", finished | dict(labelled=[0]))
    with pytest.raises(UserError, match="stage1 was trained with other labelled images"):
        here(*flags, "--out", run)
    (run / "stage1/last.pt").unlink()
    with pytest.raises(UserError, match=r"holds the stages \[2, 3\], but this command trains 1 to 3"):
        here(*flags, "--out", run)
    for stage in (2, 3):
        shutil.rmtree(run / f"stage{stage}")
    (run / "stage1/finished.pt").unlink()
    for path in run.glob("stage1/pseudo/**/*.png"):  # foreign masks, which a writer would take for its own
        fixtures.save_gray(path, np.zeros(np.array(Image.open(path)).shape))
    here(*flags, "--out", run)
    same_run(whole, run)


def test_masks_that_are_missing_are_told(whole, flags, tmp_path):
    masks = shutil.copytree(whole / "stage1/pseudo", tmp_path / "masks")
    next(masks.rglob("*.png")).unlink()
    with pytest.raises(UserError, match=r"1 of \d+ training images have no pseudo-mask there"):
        here(*flags, "--masks", masks, "--stages", 2, "--out", tmp_path / "run")


def test_supervised_takes_the_steps_of_all_stages(bare, tmp_path):
    here(*bare["three_stage"], "--supervised", "--out", tmp_path)
    assert last(tmp_path / "stage1")["step"] == 1 + 2 + 2
    assert not (tmp_path / "stage2").exists() and not (tmp_path / "stage1/pseudo").exists()
