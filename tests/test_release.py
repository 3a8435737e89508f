"""The authors' own code against ours: the same weights, batches and random numbers into both.

    RELEASES=folder python -m pytest tests/test_release.py

folder holds clones of github.com/yassouali/CCT, sud0301/semisup-semseg, Amandaynzhou/C3-SemiSeg and
RK621/ThreeStageSelftraining_SemanticSegmentation. Their training functions run, and so do ours (of cct.py: a
loop of its functions), on small images and ResNets of five bottlenecks, in float64, so that nothing but
rounding may differ. A deviation (D1, D2, ..: see a script's docstring) is taken back by a flag of ours, or by
a line in the test that names it. A table of all differences that were seen ends the report.
"""
import contextlib
import importlib
import importlib.abc
import importlib.util
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import CTX
from conftest import settled as config
from PIL import Image
from scipy import ndimage
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import c3_semiseg as c3
import cct
import fixtures
import s4gan_mlmt as s4
import three_stage as ts
from common import randaugment
from common import transforms as T
from common.backbones import PSP
from common.checkpoint import load_network
from common.miou import ConfusionMatrix
from common.regions import find_blobs
from common.runtime import Runtime
from common.schedules import make_teacher, poly, ramp, set_lr
from common.weights import DEEP_STEM

# What is mended in memory, so that the releases run on a CPU with today's packages. Besides: tabs become
# spaces, there is an np.int, .cuda() does nothing; float32 is float64 where a test asks for `double`.
STUBS = ("click", "cv2", "dominate", "dominate.tags", "matplotlib", "matplotlib.cm", "matplotlib.pyplot",
         "requests", "scipy.misc", "scipy.ndimage.morphology", "skimage", "sklearn", "sklearn.cluster",
         "sklearn.metrics", "tensorboard", "torch.utils.tensorboard", "tqdm")  # imported, but not needed here
MOVED = {"utils.helpers": "utils/helper.py"}  # C3-SemiSeg has the file, but imports it by another name
EDITS = {  # file: (text, what it becomes); a text "" is the end of the file
    "ThreeStageSelftraining_SemanticSegmentation/main.py": [
        ("train_seg.submit(**params)", ""),  # it trains when it is imported
        ("'cuda:0'", "'cpu'")],
    "C3-SemiSeg/trainer/__init__.py": [("from __future__ import absolute_import", "")],  # is not at the top
    "C3-SemiSeg/base/__init__.py": [("", "from base.base_model import BaseModel\n"  # the file is empty
                                         "from base.base_dataset import BaseDataSet\n"
                                         "from base.base_dataloader import BaseDataLoader, DataPrefetcher\n"
                                         "from base.base_trainer import BaseTrainer\n")]}
pytestmark = pytest.mark.filterwarnings("ignore")  # of what is deprecated in theirs
LAYERS = [1, 1, 2, 1]  # bottlenecks of the ResNets, theirs and ours
SIZE = 32  # of the images in most training steps
SCRIPTS = ("cct", "three_stage", "c3_semiseg", "s4gan", "mlmt")
TABLE = {}  # (script, what was compared): largest difference


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a release's modules, mended; leaves no file behind"""

    def __init__(self, root):
        self.root = root

    def find_spec(self, name, path=None, target=None):
        file = self.root / MOVED.get(name, name.replace(".", "/") + ".py")
        folder = file.with_suffix("")
        inside = [str(folder)] if any(folder.glob("*.py")) else None
        if not inside and not file.is_file():
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py" if inside else file, loader=self, submodule_search_locations=inside)

    def exec_module(self, module):
        file = Path(module.__spec__.origin)
        text = file.read_text().expandtabs(8) if file.is_file() else ""
        for old, new in EDITS.get(file.relative_to(self.root.parent).as_posix(), []):
            assert old in text, f"{file} is not the file that this test knows"
            text = text.replace(old, new) if old else text + new
        exec(compile(text, file, "exec"), module.__dict__)


@pytest.fixture
def release(monkeypatch, tmp_path):
    """release(name of a clone) -> function that imports its modules"""
    def use(name):
        if not os.environ.get("RELEASES"):
            pytest.skip("compares with the authors' code: set RELEASES to a folder that holds clones of it")
        root = Path(os.environ["RELEASES"]).resolve() / name
        if not root.is_dir():
            pytest.skip(f"no clone of {name} in RELEASES")
        finder = Finder(root)
        monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
        hidden.update({n: sys.modules.pop(n) for n in list(sys.modules) if finder.find_spec(n.split(".")[0])})
        return importlib.import_module

    hidden = {}
    known = set(sys.modules)
    for name in STUBS:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.setattr(sys, "argv", ["release"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(np, "int", int, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for kind in (torch.Tensor, nn.Module):
        monkeypatch.setattr(kind, "cuda", lambda self, *_, **__: self)
    torch.manual_seed(0)
    yield use
    for name in set(sys.modules) - known:
        if isinstance(getattr(sys.modules[name], "__loader__", None), Finder):
            del sys.modules[name]
    sys.modules.update(hidden)


@pytest.fixture
def double(monkeypatch):
    """Everything that says float32 computes in float64, on both sides"""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    replace(monkeypatch, torch, float=torch.float64, FloatTensor=torch.DoubleTensor)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def small(monkeypatch):
    """resnet50 is smaller"""
    def resnet(weights=None):
        return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, LAYERS)

    monkeypatch.setattr(torchvision.models, "resnet50", resnet)
    return resnet


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """Prints the largest differences that were seen"""
    yield
    scripts = [script for script in SCRIPTS if any(script == seen for seen, _ in TABLE)]
    lines = [["largest difference", *scripts], ["--"] * (1 + len(scripts))]
    for what in dict.fromkeys(what for _, what in TABLE):
        found = [TABLE.get((script, what), "") for script in scripts]
        lines.append([what, *(f"{x:.0e}" if isinstance(x, float) else str(x) for x in found)])
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        if TABLE:
            print("\n", *("| " + " | ".join(cells) + " |" for cells in lines), sep="\n")


def agree(script, what, found, limit=1e-9):
    """The difference, relative or in pixels or greys, is at most the limit"""
    TABLE[script, what] = max(found, TABLE.get((script, what), 0)) or 0
    assert found <= limit, f"{script}: {what}: {found}"


def differ(ours, theirs, start=None):
    """Largest difference of tensors, or dicts of them, relative to theirs, or to their way from the start"""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs, start = (state and torch.cat([state[n].flatten() for n in theirs])
                               for state in (ours, theirs, start))
    ours, theirs = (torch.as_tensor(x).detach().double() for x in (ours, theirs))
    assert ours.shape == theirs.shape
    way = theirs if start is None else theirs - start
    return (ours - theirs).abs().max().item() / (way.abs().max().item() or 1.0)


def renamed(state, names, drop="num_batches_tracked"):
    """A copy with our names: of the patterns in `names` the first that begins a name is replaced"""
    out = {}
    for name, value in state.items():
        old, new = next(item for item in names.items() if re.match(item[0], name))
        if not re.search(drop, name):
            out[re.sub(f"^{old}", new, name)] = value.detach().clone()
    return out


def joined(nets):
    """One state dict of several networks"""
    return {f"{k}.{n}": v.clone() for k, net in nets.items() for n, v in net.state_dict().items()}


@contextlib.contextmanager
def recorded(monkeypatch, nets, every=1):
    """-> (back-propagated losses, [({name: gradient}, {name: weight})] after `every` steps of optimisers)"""
    losses, steps, count = [], [], itertools.count(1)
    backward = torch.Tensor.backward

    def hook(*_):
        if next(count) % every == 0:
            parameters = {f"{k}.{n}": p for k, net in nets.items() for n, p in net.named_parameters()}
            steps.append(({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None},
                          {n: p.detach().clone() for n, p in parameters.items()}))

    handle = register_optimizer_step_post_hook(hook)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", lambda x: losses.append(x.item()) or backward(x))
        yield losses, steps
    handle.remove()


def agree_steps(script, ours, theirs, names, start, drop="num_batches_tracked", limit=1e-9):
    """Losses, gradients and the way of the weights, of what was recorded; start: their state dict"""
    assert len(ours[0]) == len(theirs[0]) and len(ours[1]) == len(theirs[1]) > 0
    agree(script, "steps: losses", differ(ours[0], theirs[0]), limit)
    gradients, weights = zip(*[[(o, renamed(t, names, drop)) for o, t in zip(*step)]
                               for step in zip(ours[1], theirs[1])])
    agree(script, "steps: first gradient", differ(*gradients[0]), limit)
    agree(script, "steps: all gradients", max(differ(*pair) for pair in gradients), limit)
    start = renamed(start, names, drop)
    agree(script, "steps: way of the weights", max(differ(*pair, start) for pair in weights), limit)


def replace(monkeypatch, module, **values):
    for name, value in values.items():
        monkeypatch.setattr(module, name, value)


def nothing(*_, **__):
    pass


def pretrained(*nets):
    """Weights through which signals pass: N(0, 0.01) is for pretrained networks"""
    for p in (p for net in nets for p in net.parameters() if p.dim() > 1):
        nn.init.kaiming_normal_(p)


def books(tmp_path):
    """A run folder that keeps nothing"""
    folder = MagicMock(first_step=0, path=tmp_path)
    folder.resume.return_value = 0
    folder.log.waiting = contextlib.nullcontext
    return folder


def images(b, size=SIZE):
    return torch.randn(b, 3, size, size)


def masks(b, classes, size=SIZE):
    """Blocks of 8 x 8 pixels, below a void border"""
    y = torch.randint(classes, (b, size // 8, size // 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    y[:, :5] = 255
    return y


def picture():
    """Smooth, of all greys: PIL image of 48 x 56 pixels"""
    small = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(small).resize((56, 48), Image.BICUBIC)


def lr_of(optimizer, nets):
    """{name: the sum of the learning rates with which one step updates the parameter}"""
    rates = [(group["lr"], id(p)) for group in optimizer.param_groups for p in group["params"]]
    return {f"{k}.{n}": torch.tensor(sum((lr for lr, i in rates if i == id(p)), 0.0), dtype=torch.float64)
            for k, net in nets.items() for n, p in net.named_parameters() if p.requires_grad}


def once_each(parameters):
    """The trained ones, without the repeats of theirs"""
    return list({id(p): p for p in parameters if p.requires_grad}.values())


def miou(classes, prediction, y):
    confusion = ConfusionMatrix(classes, "cpu")
    confusion.update(prediction, y)
    return confusion.miou()


class Drawn:
    """A source of random numbers that gives these, one after the other, whatever is asked for"""

    def __init__(self, *numbers):
        self.numbers = iter(numbers)

    def __getattr__(self, _):
        return lambda *_, **__: next(self.numbers)


class Epochs:
    """A loader that goes on where it stood"""

    def __init__(self, batches, length, dataset=None):
        self.batches, self.length, self.dataset = iter(batches), length, dataset

    def __len__(self):
        return self.length

    def __iter__(self):
        return itertools.islice(self.batches, self.length)

    def __getattr__(self, name):
        return getattr(self.dataset, name)


# ---------------------------------------------------------------------- s4GAN and MLMT

S4_NAMES = {r"S\.layer5\.conv2d_list": "S.head.branches", r"S\.": "S.body.", r"D\.fc": "D.fc",  # theirs: ours
            **{rf"D\.conv{k + 1}": f"D.convs.{k}" for k in range(4)}}
MT_NAMES = {r"S\.fc": "S.fc", r"S\.": "S.body."}
UNUSED = r"num_batches_tracked|conv2d_list\.[23]"  # D1: two of their four branches are never reached
S4_FLAGS = "--data voc --backbone resnet50 --weights imagenet --aspp-rates 6,12 "


@pytest.fixture
def s4gan(release, small):
    """Their script, their S and D, and ours with the same weights"""
    load = release("semisup-semseg")
    deeplab = load("model.deeplabv2")
    nets = dict(S=deeplab.ResNet(deeplab.Bottleneck, LAYERS, 5),
                D=load("model.discriminator").s4GAN_discriminator(5, "pascal_voc"))
    pretrained(*nets.values())
    nets["D"].avgpool = nn.AvgPool2d(SIZE // 16)  # D6: theirs fits 321 x 321 alone
    cfg = config(s4, S4_FLAGS + "--batch 2 --crop 32 --gamma 0.5 --steps 3")
    S, D = s4.Segmenter(cfg, 5), s4.Discriminator(5)
    nn.ModuleDict(dict(S=S.net, D=D)).load_state_dict(renamed(joined(nets), S4_NAMES, UNUSED), strict=False)
    return SimpleNamespace(load=load, module=load("train_s4GAN"), nets=nets, S=S, D=D, cfg=cfg)


def test_s4gan_schedules(s4gan):
    """Learning rates of S and D over 35k steps are theirs; D2: their ResNet has 1 (conv1), 3 or 4 (shortcuts)
    updates a step"""
    theirs, cfg = s4gan.module, config(s4, S4_FLAGS)
    theirs.args.num_steps = cfg.steps
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = torch.optim.SGD(s4gan.nets["S"].optim_parameters(theirs.args), theirs.args.learning_rate)
    optimizer_d = torch.optim.Adam(s4gan.nets["D"].parameters(), theirs.args.learning_rate_D)
    ours = s4.make_optimizer(s4gan.S, cfg)
    found = []
    for step in (0, 1, 20000, 34999):
        theirs.adjust_learning_rate(optimizer, step)
        theirs.adjust_learning_rate_D(optimizer_d, step)
        set_lr(ours, cfg.lr * poly(step, cfg.steps))
        a = lr_of(ours, dict(S=s4gan.S.net))
        b = renamed(lr_of(optimizer, dict(S=s4gan.nets["S"])), S4_NAMES, UNUSED)
        for name in a:
            updates = 1 if re.search("head|body.conv1", name) else 4 if "downsample" in name else 3
            found.append(abs(updates * a[name] / b[name] - 1).item())
        found.append(abs(cfg.lr_d * poly(step, cfg.steps) / optimizer_d.param_groups[0]["lr"] - 1))
    agree("s4gan", "learning rates, ramps", max(found))
    assert (theirs.MOMENTUM, theirs.WEIGHT_DECAY) == (ours.defaults["momentum"], cfg.weight_decay)
    assert (theirs.LAMBDA_FM, theirs.LAMBDA_ST) == (cfg.lambda_fm, cfg.lambda_st)
    assert theirs.THRESHOLD_ST == cfg.gamma


def test_s4gan_steps(double, s4gan, monkeypatch, tmp_path):
    """Their main() and our train_s4gan: losses, gradients, weights of S and D in 3 steps, rounding of float64

    Taken back: D2 (each parameter once), D7 (batches of one span)."""
    theirs, cfg, nets = s4gan.module, s4gan.cfg, s4gan.nets
    batches = [[(images(2), masks(2, 5)) for _ in range(cfg.steps)] for _ in range(3)]  # labelled, not, real
    for x, _ in (*batches[0], *batches[2]):
        x[0, 0, 0, :2] = torch.tensor([-9.0, 9.0])
    calls = itertools.count()
    rng = []

    class Drop(nn.Module):  # of channels, by our random numbers: 3 layers, 4 calls of D in a step
        def forward(self, x):
            k = next(calls)
            if k % 3 == 0:
                rng[:] = [CTX.random(cfg.seed, "discriminator", k // 12, k // 3 % 4)]
            return x * (2.0 * (rng[0].uniform(*x.shape[:2], 1, 1) >= 0.5))

    start = joined(nets)
    nets["D"].drop = Drop()
    body = [p for n, p in nets["S"].named_parameters() if "layer5" not in n]
    monkeypatch.setattr(type(nets["S"]), "get_1x_lr_params_NOscale", lambda _: once_each(body))
    loaders = iter([[(x, y.double(), 0, 0, 0) for x, y in part] for part in batches])
    data = SimpleNamespace(DataLoader=lambda *_, **__: next(loaders), sampler=torch.utils.data.sampler)
    vars(theirs).update(data=data, VOCDataSet=lambda *_, **__: range(16), Res_Deeplab=lambda **_: nets["S"],
                        s4GAN_discriminator=lambda **_: nets["D"])
    vars(theirs.args).update(num_classes=5, input_size="32,32", batch_size=2, num_steps=cfg.steps,
                             labeled_ratio=0.5, threshold_st=cfg.gamma, checkpoint_dir=str(tmp_path))
    replace(monkeypatch, torch, load=lambda *_: {}, save=nothing)
    with recorded(monkeypatch, nets, 2) as released:
        theirs.main()

    feeds = iter(batches[0]), iter([x for x, _ in batches[1]]), iter(batches[2])
    replace(monkeypatch, s4, Segmenter=lambda *_: s4gan.S, Discriminator=lambda *_: s4gan.D,
            load_weights=nothing, evaluate=lambda *_: (MagicMock(), ()), streams=lambda *_: feeds)
    folder = books(tmp_path)
    with recorded(monkeypatch, dict(S=s4gan.S.net, D=s4gan.D), 2) as ours:
        s4.train_s4gan(data=SimpleNamespace(classes=range(5)), labelled=[], unlabelled=[],
                       folder=folder, cfg=cfg, ctx=CTX)
    passed = [step.kwargs["passed"].item() for step in folder.log.add.call_args_list]
    assert passed[0] == 0 < sum(passed) < cfg.steps - 1, "self-training of some images, not in the first step"
    agree_steps("s4gan", ours, released, S4_NAMES, start, UNUSED)
    statistics = [{n: v for n, v in state.items() if "running" in n} for state in (
        joined(dict(S=s4gan.S.net)), renamed(joined(nets), S4_NAMES, UNUSED))]
    agree("s4gan", "steps: BN statistics", differ(*statistics))


def test_s4gan_evaluation(double, s4gan, monkeypatch):
    """Their evaluate.py: predictions with and without the classifier 0 pixels apart, mIoU to rounding

    D12: theirs multiplies logits, ours probabilities, which is the same if all logits are positive and the
    classifier sees the background, as here."""
    module = s4gan.load("evaluate")
    s4gan.cfg.eval_pad, s4gan.cfg.tau = (72, 72), 0.2
    nn.init.constant_(s4gan.nets["S"].layer5.conv2d_list[0].bias, 100.0)
    nn.init.constant_(s4gan.S.net.head.branches[0].bias, 100.0)
    x, y = images(3, 64), masks(3, 5, 64)
    x_pad, y_pad = F.pad(x, (0, 8, 0, 8)), F.pad(y, (0, 8, 0, 8), value=255)
    batches = [(x_pad[i:i + 1], y_pad[i:i + 1], [(64, 64)], "", 0) for i in range(3)]
    g = torch.tensor([0.9, 0.19, 0.21, 0.19, 0.21]).repeat(3, 1)
    g[1, 1:] = g[1, 1:].flip(0)
    np.savetxt("scores.txt", g.numpy())
    collected = []
    vars(module).update(Res_Deeplab=lambda **_: s4gan.nets["S"], VOCDataSet=nothing,
                        get_iou=lambda args, pairs, *_: collected.append(pairs))
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *_, **__: batches)
    monkeypatch.setattr(nn, "Upsample", lambda size, real=nn.Upsample, **kw: real((72, 72), **kw))
    monkeypatch.setattr(torch, "load", lambda _: joined(dict(module=s4gan.nets["S"])))
    monkeypatch.setattr(s4, "classify", lambda *_: g)
    for flags in ([], ["--with-mlmt", "--mlmt-file", "scores.txt"]):
        monkeypatch.setattr(sys, "argv", ["evaluate", "--num-classes", "5", *flags])
        module.main()
        ours = s4.predict(s4gan.S.eval(), x, s4gan.cfg, CTX, MagicMock() if flags else None).argmax(1)
        theirs = torch.from_numpy(np.stack([prediction for _, prediction in collected[-1]])).view(3, 64, 64)
        agree("s4gan", "predictions: pixels", int((ours != theirs).sum()), 0)
    matrix = s4gan.load("utils.metric").ConfusionMatrix(5)
    for pair in collected[-1]:
        matrix.addM(matrix.generateM(pair))
    agree("s4gan", "mIoU", abs(miou(5, ours, y) - matrix.jaccard()[0]))


def test_s4gan_images(release, monkeypatch):
    """Crop, padding and flip by the same draws: the same pixels. Scales: 0.5, 0.6, .. 1.6 (D4)"""
    module = release("semisup-semseg")("data.voc_dataset")
    image = np.array(picture().resize((40, 70)))
    mask = np.random.default_rng(0).integers(0, 21, (70, 40), np.uint8)
    module.cv2.imread = lambda path, _: image[:, :, ::-1] if path.endswith("jpg") else mask
    module.cv2.copyMakeBorder = lambda x, top, bottom, left, right, _, value: np.pad(
        x, ((top, bottom), (left, right), (0, 0))[:x.ndim], constant_values=value[0])
    Path("list.txt").write_text("one\n")
    theirs = module.VOCDataSet(".", "list.txt", crop_size=(64, 64), mean=np.zeros(3), scale=False)
    cfg = config(s4, "--data voc --crop 64 --scale 1 1")
    for flip in (0, 1):
        monkeypatch.setattr(module.random, "randint", lambda a, b: min(b, 3))
        monkeypatch.setattr(module.np.random, "choice", lambda n: 1 - flip)
        x, y, *_ = theirs[0]
        ours_x, ours_y = s4.augment(cfg, image, mask, Drawn(0, 3, 0, 0.9 - 0.8 * flip))
        agree("s4gan", "augmentation: pixels", int((ours_y.numpy() != y).sum()), 0)
        wrong = (ours_x.numpy() != x)[:, y != 255]  # their padding: 0 after the mean
        agree("s4gan", "augmentation: pixels", int(wrong.sum()), 0)
    theirs.scale, cfg.scale = True, s4.PRESETS["voc"]["scale"]
    sizes, factors = [], []
    monkeypatch.setattr(T, "resize", lambda x, y, size: sizes.append(size[0]) or (x, y))
    module.cv2.resize = lambda x, _, fx, fy, interpolation: factors.append(fx) or x
    for k in range(12):
        monkeypatch.setattr(module.random, "randint", lambda a, b: min(k, b))
        theirs[0]
        s4.augment(cfg, image, mask, Drawn(k, 0, 0, 0))
    assert sizes == [round(70 * f) for f in factors[::2]] and factors[-1] == 1.6


def test_mlmt_steps(double, release, small, monkeypatch, tmp_path):
    """Their main() of branch B and our train_mlmt, 3 epochs of 2 steps: losses, gradients and weights of the
    student, weights and BN statistics of the teacher; rounding of float64

    Taken back: D10 (--cons cosine --cons-on unlabelled), D11 (their teacher starts as a copy, too)."""
    module = release("semisup-semseg")("train_mlmt")
    nets, start = {}, {}

    def resnet(pretrained):  # the same twice, with the last layer that main() draws next
        torch.manual_seed(1)
        net = small()
        torch.manual_seed(1)
        return net

    def parallel(net):
        nets["T" if nets else "S"] = net
        start.update(start or joined(nets))
        return net

    module.models = SimpleNamespace(resnet101=resnet)
    vars(module.args).update(num_epochs=3, burn_in_epochs=0.3, num_classes=5, evaluation_epochs=0)
    lab = [(images(2, 64), (torch.arange(10).view(2, 5) % 3 == k % 3).double()) for k in range(6)]
    unlab = [(images(3, 64), images(3, 64)) for _ in range(6)]  # weak, strong
    module.create_data_loaders = lambda: (Epochs([((x, x), z) for x, z in lab], 2),
                                          Epochs([(views, 0) for views in unlab], 2), None)
    with monkeypatch.context() as patch, recorded(monkeypatch, nets) as released:
        patch.setattr(nn, "DataParallel", parallel)
        module.main()
    released = released[0], [[{n: v for n, v in part.items() if n[0] == "S"} for part in step]
                             for step in released[1]]

    cfg = config(s4, "--data voc --backbone resnet50 --weights imagenet --branch mlmt --mlmt-epochs 3 "
                     "--mlmt-batch 2 --mlmt-batch-u 3 --cons cosine --cons-on unlabelled")
    ours = s4.Classifier(cfg, 5)
    nn.ModuleDict(dict(S=ours)).load_state_dict(renamed(start, MT_NAMES), strict=False)
    feeds = iter([iter([((x, x), z) for x, z in lab]), iter([(strong, weak) for weak, strong in unlab])])
    replace(monkeypatch, s4, endless=lambda *_: next(feeds), Classifier=lambda *_: ours, load_weights=nothing,
            roc_picture=nothing, evaluate_classifier=lambda *_: (0, 0, ((), ())), strong_view=lambda x, *_: x)
    with recorded(monkeypatch, dict(S=ours)) as mine:
        teacher, *_ = s4.train_mlmt(data=SimpleNamespace(classes=range(5), train=[]), tagged=None,
                                    labelled=range(4), unlabelled=[], folder=books(tmp_path), cfg=cfg, ctx=CTX)
    agree_steps("mlmt", mine, released, MT_NAMES, start, limit=1e-7)
    ours = renamed(joined(dict(S=teacher)), {"": ""})
    agree("mlmt", "steps: way of the teacher", differ(
        ours, renamed(joined(dict(S=nets["T"])), MT_NAMES), renamed(start, MT_NAMES)), 1e-7)


def test_mlmt_images(release, monkeypatch):
    """Strong view: the ranges of jitter and blur, the size, and the chance of a flip are theirs"""
    module = release("semisup-semseg")("train_mlmt")
    views = []
    module.data.DatasetProcessing = lambda *a, **_: views.append(a[4]) or range(9)
    monkeypatch.setattr(module.data, "split_idxs", lambda *_: ([0], [1]))
    module.create_data_loaders()
    resize, jitter, flip, blur, *_ = views[1].aug_transform.transforms
    cfg = config(s4, "--data voc")
    drawn = {}
    replace(monkeypatch, s4, gaussian_blur=lambda x, u, *sigma: drawn.update(u=u, sigma=sigma) or x,
            colour_jitter=lambda x, u, _, factor, hue: drawn.update(factor=factor, hue=hue) or x)
    s4.strong_view(images(999, 2), 0, cfg, CTX)
    assert (1 - drawn["factor"], 1 + drawn["factor"]) == jitter.brightness == jitter.contrast == jitter.saturation
    assert (-drawn["hue"], drawn["hue"]) == jitter.hue
    assert drawn["sigma"] == tuple(blur.sigma) and 0 <= drawn["u"].min() < 0.01 and 0.99 < drawn["u"].max() < 1
    assert (resize.size, flip.p) == (cfg.mlmt_size, 0.5)
    x = torch.arange(6).view(1, 2, 3)
    assert [T.random_flip(x, None, Drawn(u))[0][0, 0, 0] for u in (0.499, 0.5)] == [2, 0]


# ---------------------------------------------------------------------- Three-Stage

RK = "ThreeStageSelftraining_SemanticSegmentation"
TS_NAMES = {r"n\.layer5_2\.conv2d_list": "n.branch.aspp.branches", r"n\.layer4_2": "n.branch.conv6",
            r"n\.layer5\.conv2d_list": "n.f.head.branches", r"n\.": "n.f.body."}


def snake(name):
    """AutoContrast -> auto_contrast"""
    return re.sub("(?<=[a-z])([A-Z])", r"_\1", name).lower()


def three_stage_pair(load, stage):
    """Their network of a stage, for 5 classes, and ours with its weights"""
    deeplab = load("architectures.deeplab2")
    theirs = deeplab.ResNetDeepLab(deeplab.Bottleneck, LAYERS, 5, None, None, doublehead=stage - 1)
    pretrained(theirs)
    if stage > 1:  # D7: the sixth class of their branch, a placeholder, is made impossible
        nn.init.constant_(theirs.layer5_2.conv2d_list[0].bias[5:], -1e4)
    cfg = config(ts, "--data voc --backbone resnet50 --weights imagenet --aspp-rates 6,12 --batch 3 "
                     "--crop 32 --lr-groups nominal")
    ts.balance(cfg, 212)
    ours = ts.MultiTask(cfg, 5, stage)
    state = five(renamed(joined(dict(n=theirs)), TS_NAMES, UNUSED))
    nn.ModuleDict(dict(n=ours)).load_state_dict(state, strict=False)
    return theirs, ours, cfg


def five(state):
    return {n: v[:5] if re.search(r"layer5_2|branch\.aspp", n) else v for n, v in state.items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_three_stage_networks(release, small, stage):
    """f, and g^ or g~ beside it, with frozen BN: equal to the bit in float32"""
    theirs, ours, _ = three_stage_pair(release(RK), stage)
    theirs.freeze_batchnorm()
    x = images(1, 128)
    logits = theirs(x) if stage > 1 else [theirs(x)]
    for mine, released in zip(ours.train()(x), logits):
        agree("three_stage", "networks", differ(mine, released[:, :5]), 0)


def unlabelled_batch(n):
    """As their loader makes it: weak and strong view, pseudo-masks, and where a pixel comes from"""
    row, column = torch.randint(SIZE, (2, n, 1, SIZE, SIZE))
    inside = (torch.rand(n, 1, SIZE, SIZE) < 0.9).byte()
    pseudo = masks(n, 5)
    moved = torch.stack([y[r[0], c[0]] for y, r, c in zip(pseudo, row, column)])[:, None]
    return dict(image=images(n), image_post=images(n), indx=row, indy=column, indmsk=inside,
                pl=pseudo[:, None], pl_post=moved.masked_fill(inside == 0, 255))


def minibatch(sup, both):
    """The same for our loop: x weak, x strong, I, y, pseudo-masks"""
    place = torch.arange(SIZE * SIZE).view(1, SIZE, SIZE).expand(len(sup["image"]), -1, -1)
    if both is None:
        return sup["image"], sup["image"], place, sup["labels"][:, 0], sup["pl"][:, 0]
    index = (both["indx"] * SIZE + both["indy"]).masked_fill(both["indmsk"] == 0, -1)[:, 0]
    y = torch.full_like(index, 255)
    pairs = ((sup["image"], both["image"]), (sup["image"], both["image_post"]), (place, index),
             (sup["labels"][:, 0], y), (sup["pl"][:, 0], both["pl"][:, 0]))
    return [torch.cat(pair) for pair in pairs]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_three_stage_steps(double, release, small, monkeypatch, tmp_path, stage):
    """Their train_seg and our train_stage, 2 to 4 steps: losses, gradients, weights, EMA teacher; rounding

    Taken back: D4 (their decays, of as many steps), D5 (each parameter once; --lr-groups nominal), D7."""
    load = release(RK)
    monkeypatch.setattr(sys, "argv", ["main.py", "5"])  # VOC, Stage 2
    main = load("main")
    theirs, ours, cfg = three_stage_pair(load, stage)
    teacher, *_ = three_stage_pair(load, stage)
    start = five(joined(dict(n=theirs)))
    body = once_each(theirs.pretrained_parameters())
    theirs.pretrained_parameters = lambda: body
    n_l, steps = (2 if stage == 1 else 1), (4 if stage == 2 else 2)
    pairs = [(dict(image=images(n_l), labels=masks(n_l, 5)[:, None], pl=masks(n_l, 5)[:, None]),
              unlabelled_batch(2)) for _ in range(steps)]
    batches = [minibatch(sup, both if stage > 1 else None) for sup, both in pairs]
    main.cf2.use_unlabelleddata = stage > 1
    main.cf2.ema_alpha_list = main.cf2.ema_alpha_list[:60:60 // steps]
    nets = iter([theirs, teacher])
    load("architectures.network_architectures").seg.archs["small"] = lambda *_, **__: next(nets)
    source = MagicMock(num_classes=5, get_mean_std=lambda: (None, None))
    val = [dict(image=images(1), labels=masks(1, 5)[:, None])]
    vars(load("datapipe.datasets")).update(
        eval_data_pipeline=lambda *_: (None, val, None),
        load_dataset=lambda *_, **__: dict(ds_src=source, ds_tgt=source, val_ndx_tgt=[], val_ndx_src=[],
                                           test_ndx_tgt=None, sup_ndx=np.arange(9), unsup_ndx=np.arange(9)))
    loaders = iter([[sup for sup, _ in pairs], [both for _, both in pairs], None])
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *_, **__: next(loaders))
    monkeypatch.setattr(torch, "save", nothing)
    settings = {n: v for n, v in vars(main.para1).items() if n[0] != "_" and n != "job_desc"}
    settings |= dict(arch="small", num_epochs=steps, iters_per_epoch=1, n_sup=9)
    settings |= dict(preds_all=False, save_preds=False)
    with recorded(monkeypatch, dict(n=theirs)) as released:
        main.train_seg(MagicMock(run_dir=str(tmp_path)), **settings)

    teachers = []
    replace(monkeypatch, ts, MultiTask=lambda *_: ours, Minibatches=nothing, load_pretrained=nothing,
            evaluate=lambda *_: (MagicMock(), {}, ()), endless=lambda *_: iter(batches),
            make_teacher=lambda net: teachers.append(make_teacher(net)) or teachers[0])
    with recorded(monkeypatch, dict(n=ours)) as mine:
        ts.train_stage(stage=stage, lengths=[steps] * 3, data=SimpleNamespace(classes=range(5)),
                       labelled=[], folder=books(tmp_path), cfg=cfg, ctx=CTX)
    released = released[0], [[five(part) for part in step] for step in released[1]]
    agree_steps("three_stage", mine, released, TS_NAMES, start, UNUSED)
    if stage > 1:
        agree("three_stage", "steps: way of the teacher", differ(
            renamed(joined(dict(n=teachers[0])), {"": ""}),
            five(renamed(joined(dict(n=teacher)), TS_NAMES, UNUSED)), renamed(start, TS_NAMES, UNUSED)))


def test_three_stage_schedules(release, small, monkeypatch):
    """Learning rates with the repeats of a parameter (D5), decays over 60k steps, weights of losses: equal"""
    load = release(RK)
    monkeypatch.setattr(sys, "argv", ["main.py", "5"])
    main = load("main")
    theirs, ours, cfg = three_stage_pair(load, 2)
    cfg.lr_groups = "released"
    with pytest.warns(UserWarning, match="duplicate"):
        lr = main.para1.learning_rate
        optimizer = torch.optim.Adam([dict(params=theirs.pretrained_parameters(), lr=0.1 * lr),
                                      dict(params=theirs.new_parameters(), lr=lr)])
    a = lr_of(ts.make_optimizer(ours, cfg), dict(n=ours))
    b = renamed(lr_of(optimizer, dict(n=theirs)), TS_NAMES, UNUSED)
    agree("three_stage", "learning rates, ramps", max(abs(a[n] / b[n] - 1).item() for n in b))
    assert a.keys() == b.keys() and (main.para1.opt_type, main.para1.lr_sched) == ("adam", "none")
    assert main.cf2.ema_alpha_list[:60] == [ts.alpha(1000 * epoch, 60000) for epoch in range(60)]
    assert main.cf2.meanT_conweight / 2 / main.cf2.meanT_supweight == cfg.lambda_con == cfg.lambda_pl
    assert (main.cf2.pl_batchsize1, main.cf2.pl_batchsize2) == (cfg.batch_l, 9)


def test_three_stage_masks_and_evaluation(release, small, tmp_path):
    """Pseudo-masks that both write: 0 pixels apart. mIoU of them: rounding"""
    load = release(RK)
    theirs, ours, cfg = three_stage_pair(load, 2)
    split = [np.random.default_rng(k).integers(0, 256, (64, 64, 3), np.uint8) for k in range(3)]
    keys = ["0", "1", "2"]

    class Generated:
        ds = SimpleNamespace(sample_names=keys)

        def __getitem__(self, i):
            return dict(image=T.normalise(T.to_tensors(split[i])[0]).numpy(), index=i)

    written = {}
    sys.modules["cv2"].imwrite = lambda path, y: written.update({Path(path).stem: y})
    load("script_lib").make_preds_for_alldata(theirs, str(tmp_path / "out"), "cpu", Generated())
    train = MagicMock(keys=keys, image=split.__getitem__, __len__=lambda _: 3)
    data = SimpleNamespace(train=train, one_size=False, palette=np.zeros((5, 3), np.uint8))
    cfg.workers = 0
    ts.write_pseudo_masks(ours.f.eval(), data, tmp_path, cfg, CTX)
    mine = np.stack([np.array(Image.open(tmp_path / f"{key}.png")) for key in keys])
    wrong = mine != np.stack([written[key] for key in keys])
    agree("three_stage", "predictions: pixels", int(wrong.sum()), 0)
    score = load("evaluation").EvaluatorIoU(5)
    y = masks(3, 5, 64)
    for truth, prediction in zip(y.numpy(), mine.astype(int)):
        score.sample(truth, prediction, ignore_value=255)
    agree("three_stage", "mIoU", abs(miou(5, torch.from_numpy(mine).long(), y) - score.score().mean()))


def test_three_stage_operations(release, monkeypatch):
    """RandAugment, every operation and level: a pixel comes from the same place, greys differ by a rounding

    D8: their images and their mask of what is outside move by another arithmetic than their places, which
    differs in single pixels; ours is one map."""
    module = release(RK)("apply_rand")
    augment = module.randaugment_seg
    names = {name: snake(name) for name in module.RANDOM_POLICY_OPS}
    assert sorted(names.values()) == sorted(randaugment.OPERATIONS)
    image = picture()
    place = np.arange(48 * 56, dtype=np.uint16).reshape(48, 56)
    pictures = [image.convert("RGBA"), Image.fromarray(place), Image.fromarray(np.ones_like(place, np.uint8))]
    for (original, name), level, sign in itertools.product(names.items(), range(1, 10), (1, -1)):
        monkeypatch.setattr(augment.random, "random", lambda: 0.5 - 0.1 * sign)
        theirs = [np.array(p) for p in augment.NAME_TO_TRANSFORM[original].xform(pictures, level)]
        if name in randaugment.PHOTOMETRIC:
            ours = randaugment.PHOTOMETRIC[name](T.to_tensors(np.array(image))[0], level)
            gap = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs[0][..., :3]).max()
            agree("three_stage", "augmentation: greys", int(gap), 1)
        else:
            index = randaugment.source_map(name, sign * level * randaugment.GEOMETRIC[name], 48, 56).numpy()
            inside = theirs[2] > 0
            wrong = (theirs[1] != index)[inside & (index >= 0)]
            agree("three_stage", "augmentation: pixels", int(wrong.sum()), 0)
            assert (inside != (index >= 0)).sum() <= 2  # D8


def test_three_stage_strong_view(release, monkeypatch):
    """Both strong views by the same draws: chance, order, sign and level of three operations, cutouts: every
    place, and the greys, but for those that D8 moves, to two (theirs are truncated twice)"""
    module = release(RK)("apply_rand")
    image = np.array(picture())
    rng = np.random.default_rng(1)
    original = {snake(name): name for name in module.RANDOM_POLICY_OPS}
    for _ in range(20):
        names = rng.choice([*randaugment.GEOMETRIC, "identity"], 3)
        levels, negative, rows, columns = rng.integers((1, 0, 0, 0), (10, 2, 48, 56), (3, 4)).T
        fires = rng.random(3)
        draws = []
        for name, fire, minus in zip(names, fires, negative):
            draws += [fire, 0.1 + 0.8 * minus] if fire < 0.5 and name != "identity" else [fire]
        monkeypatch.setattr(module.randaugment_seg.random, "random", Drawn(*draws).random)
        monkeypatch.setattr(module.np.random, "choice", lambda ops, n: [original[name] for name in names])
        places = np.stack([rows, columns], 1).flatten()
        monkeypatch.setattr(module.np.random, "randint", Drawn(levels, *places).randint)
        theirs, row, column, inside = module.rand_pascal_index(image.copy())
        rank = np.array([randaugment.OPERATIONS.index(name) for name in names])
        ours, index = randaugment.strong(T.to_tensors(image)[0],
                                         Drawn(rank, levels, negative, fires, rows, columns))
        both = (inside > 0) & (index.numpy() >= 0)
        wrong = (row.astype(int) * 56 + column != index.numpy())[both]
        agree("three_stage", "augmentation: pixels", int(wrong.sum()), 0)
        gap = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).max(2)[both]
        assert (gap > 2).mean() < 0.02  # D8: other places of theirs


# ---------------------------------------------------------------------- C3-SemiSeg

C3_NAMES = {r"n\.decoder\.conv2d_list": "n.net.head.branches", r"n\.body": "n.net.body",
            r"e\.emb_1\.conv_1": "n.projection.0", r"e\.emb_1\.conv_2": "n.projection.2"}
C3_FLAGS = "--data cityscapes --backbone resnet50 --weights imagenet --batch 2 --groups 1 "


def small_c3(load):
    """Their module, whose ResNets are small"""
    load("base")  # before models, which imports it and which it imports
    deeplab = load("models.deeplabv2")
    make_layer = deeplab.ResNet._make_layer
    deeplab.ResNet._make_layer = lambda self, block, planes, blocks, *a, **kw: make_layer(
        self, block, planes, min(blocks, LAYERS[planes.bit_length() - 7]), *a, **kw)
    return deeplab


def c3_pair(load):
    """Their network and embedding, for the 19 classes of Cityscapes, and ours with their weights"""
    deeplab = small_c3(load)
    nets = dict(n=deeplab.DeepLabV2(19, pretrained=False, return_feat_and_logit=True),
                e=load("models.embedding").create_embedding_layer("mlp", embed_dim=256))
    pretrained(*nets.values())
    ours = c3.Segmenter(config(c3, C3_FLAGS), 19)
    nn.ModuleDict(dict(n=ours)).load_state_dict(renamed(joined(nets), C3_NAMES, UNUSED), strict=False)
    return nets, ours


def c3_trainer(load, nets, teachers, cfg):
    """Their CTrainer with the settings of scripts/train_ssl.sh, scaled down; the first of 4 GPUs"""
    losses = load("utils.losses")
    trainer = object.__new__(load("trainer.Ctrainer").CTrainer)
    unlabelled = object.__new__(load("dataloaders.cityscapes").PseudoCityScapesDataset)
    unlabelled.end_percent = 0.8
    yes = dict.fromkeys(("contrastive", "contrastive_cross_set", "mask_contrast"), True)
    no = dict.fromkeys(("contrastive_cross_model", "kld", "cutmix_ablation", "mask_unlabel", "random_sample",
                        "no_fix_teacher_bn"), False)
    half = cfg.steps // 2
    vars(trainer).update(
        args=SimpleNamespace(world_size=4, **yes, **no), contrastive=True, ema=True, use_cb_consist=True,
        cls_balance_threshold=True, rank=1, distributed=False, device="cpu", logger=MagicMock(), log_step=1,
        config=dict(optimizer=dict(type="Adam", differential_lr=True, args=dict(lr=1.2e-4)),
                    arch=dict(args=dict(freeze_bn=True)), train_loader=dict(type="CityScapes"),
                    lr_scheduler=dict(type="Poly"), contrastive=dict(visualize=False),
                    trainer=dict(gamma=0.0)),
        epochs=2, num_classes=19,
        model=nn.DataParallel(nets["n"]), embeddingModule=nn.DataParallel(nets["e"]),
        teacher=nn.DataParallel(teachers["n"]), embeddingModule_t=nn.DataParallel(teachers["e"]),
        iters_per_epoch=4 * half, unlabel_start_epoch=2, start_ema_iter=4 * half, consist_weight=50,
        ema_alpha=0.99, contrastive_start_epoch=1, start_sup_contrastive_iter=0, contrastive_loss_weight=0.1,
        feat_size=(9, 9), rampup=4 * cfg.consist_ramp * cfg.steps,
        contrastive_rampup=4 * cfg.contrast_ramp * cfg.steps,
        cutmix_generator=load("dataloaders.transforms").BoxMaskGenerator(), unlabelled=unlabelled,
        CTLOSS=losses.PixelContrastLoss(temperature=0.15, neg_num=cfg.anchors),
        loss=losses.MaskCrossEntropyLoss2d(ignore_index=255))
    trainer.student = trainer.model
    return trainer


def first_cells(b, n):
    """Numbers by which ours samples the first cells of a kind, as theirs does if randperm is arange"""
    return torch.arange(n).expand(b, n) / n


def test_c3_steps(double, release, small, monkeypatch, tmp_path):
    """Their CTrainer and our train, 2 steps of burn-in and 2 with all: losses, gradients, weights, teacher,
    thresholds of DCRS; rounding of float64

    Taken back: D6 (each parameter once, --backbone-lr-mult 0.1); and what is not among the deviations: their
    learning rate is that of the next step, their ramp of lambda_2 three quarters of a step ahead."""
    load = release("C3-SemiSeg")
    cfg = config(c3, C3_FLAGS + "--crop 64 --anchors 4 --steps 4 --burn-in 0.5 --consist-ramp 0.4 "
                                "--contrast-ramp 0.3 --backbone-lr-mult 0.1")
    nets, ours = c3_pair(load)
    teachers, _ = c3_pair(load)
    start = joined(nets)
    body = once_each(nets["n"].body.parameters())
    monkeypatch.setattr(type(nets["n"].body), "get_1x_lr_params_NOscale", lambda _: body)
    trainer = c3_trainer(load, nets, teachers, cfg)
    labelled = [(images(2, 64), masks(2, 4, 64)) for _ in range(4)]
    unlabelled = [(images(2, 64), images(2, 64)) for _ in range(2)]
    draws = [(torch.rand(1, 4), torch.rand(2, 3)) for _ in range(2)]  # of CutMix: pairs, boxes
    trainer.train_loader = Epochs(labelled, 2)
    trainer.unlabel_loader = Epochs([(*views, masks(2, 4, 64), 0) for views in unlabelled], 2,
                                    trainer.unlabelled)
    trainer._set_optimizer(trainer.config)
    orders = Drawn(*[u.argsort(1)[0] for u, _ in draws])
    numbers = Drawn(*[x for _, u in draws
                      for x in (np.full((2, 1), 0.5), u[:, :1].numpy(), u[:, None, 1:].numpy())])
    load("trainer.Ctrainer").torch = SimpleNamespace(**vars(torch) | dict(randperm=orders.randperm))
    load("utils.losses").torch = SimpleNamespace(**vars(torch) | dict(randperm=torch.arange))
    vars(load("utils.misc").cv2).update(erode=lambda mask, *_, **__: mask, dilate=lambda mask, *_, **__: mask)
    with recorded(monkeypatch, nets) as released, monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "set_detect_anomaly", nothing)
        patch.setattr(np.random, "uniform", numbers.uniform)
        trainer._train_epoch(1)
        trainer._train_epoch(2)

    ctx, kept = Runtime("cpu", "fp32"), {}
    ctx.random = lambda _, name, step: SimpleNamespace(
        uniform=first_cells if name == "views" else Drawn(*draws[step - 2]).uniform, device="cpu")
    views = [(w, s, torch.ones(2, 64, 64, dtype=torch.bool)) for w, s in unlabelled]
    replace(monkeypatch, c3, Runtime=lambda *_: ctx, check_classes=nothing, load_weights=nothing,
            open_dataset=lambda *_: SimpleNamespace(one_size=True, classes=range(19)),
            choose_labelled=lambda *_: ([0], [1]),
            Segmenter=lambda *_: ours, RunFolder=lambda *_, **__: books(tmp_path),
            streams=lambda *_: (iter(labelled), iter(views)), evaluate=lambda *_: (MagicMock(), {}, ()),
            make_teacher=lambda net: kept.setdefault("teacher", make_teacher(net)),
            confident_pixels=lambda *a, real=c3.confident_pixels: kept.update(thresholds=a[2]) or real(*a),
            poly=lambda step, steps: poly(step + 1, steps), ramp=lambda kind, step, length: ramp(
                kind, step + 0.75 * (length == cfg.contrast_ramp * cfg.steps), length))
    with recorded(monkeypatch, dict(n=ours)) as mine:
        c3.train(cfg)
    agree_steps("c3_semiseg", mine, released, C3_NAMES, start, UNUSED)
    agree("c3_semiseg", "steps: way of the teacher", differ(
        renamed(joined(dict(n=kept["teacher"])), {"": ""}), renamed(joined(teachers), C3_NAMES, UNUSED),
        renamed(start, C3_NAMES, UNUSED)))
    thresholds = trainer.unlabelled.cls_conf_threshold
    agree("c3_semiseg", "thresholds", differ(kept["thresholds"], thresholds))
    assert len({*thresholds}) > 2  # of a few classes, they have moved


def test_c3_schedules(release, small):
    """Learning rates, less a step, and lambda_1, over 25k steps: rounding

    D6: their ResNet has a tenth of the rate, and 1 (conv1), 3 or 4 (shortcuts) updates a step; ours 0.3."""
    load = release("C3-SemiSeg")
    cfg = config(c3, C3_FLAGS)
    nets, ours = c3_pair(load)
    trainer = c3_trainer(load, nets, nets, cfg)
    trainer.train_loader, trainer.epochs = range(250), 100
    with pytest.warns(UserWarning, match="duplicate"):
        trainer._set_optimizer(trainer.config)
    optimizer = c3.make_optimizer(ours, cfg)
    set_lr(optimizer, cfg.lr)
    a = lr_of(optimizer, dict(n=ours))
    b = renamed(lr_of(trainer.optimizer, nets), C3_NAMES, UNUSED)
    updates = {n: 1 if "body.conv1" in n else 4 if "downsample" in n else 3 for n in a}
    found = [b[n] / (a[n] / 3 * updates[n] if "body" in n else a[n]) - 1 for n in a]
    for step in range(500):
        trainer.lr_scheduler.step(epoch=step // 250)
        found.append(trainer.optimizer.param_groups[0]["lr"] / (cfg.lr * poly(step + 1, cfg.steps)) - 1)
    rampup = load("utils.lr_scheduler").sigmoid_rampup
    for step in range(2250, 7000, 7):  # 4 GPUs: their counter goes up by 4, from 4 on
        found.append(c3.consistency_weight(step, cfg) / 50 / rampup(4 * (step + 1) - 9 * 1000 - 4, 16000) - 1)
    agree("c3_semiseg", "learning rates, ramps", max(abs(float(x)) for x in found))
    assert (4 * cfg.contrast_ramp * cfg.steps, cfg.lambda_2) == (1000, 0.1)


def test_c3_evaluation(release):
    """mIoU: rounding"""
    y, logits = masks(2, 4, 96), torch.randn(2, 19, 96, 96)
    y[:, 8:16, :19] = torch.arange(19)
    _, _, inter, union = release("C3-SemiSeg")("utils.metrics").eval_metrics(logits, y, 19)
    agree("c3_semiseg", "mIoU", abs(miou(19, logits.argmax(1), y) - (inter / union).mean()), 1e-5)


def test_c3_views(release, monkeypatch):
    """The ten operations of RandAugment at six levels: equal pixels. Jitter, chances, counts: theirs"""
    module = release("C3-SemiSeg")("dataloaders.transforms")
    share, strong, _ = module.build_autoaug_transform(random_grayscale=0.0)
    jitter, augment = strong.transforms[0].transform.transforms[0], strong.transforms[1]
    drawn = []
    rng = SimpleNamespace(permutation=lambda _: (), uniform=lambda a, b, n=None:
                          drawn.extend([(a, b)] * (n or 1)) or ([0] * n if n else 0))
    c3.photometry(torch.zeros(3, 9, 9).byte(), "S", rng)
    assert drawn == [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue]
    operations = {op.aug_fn.__name__.replace("auto_c", "autoc"): op for op in augment.ops}
    assert operations.keys() == c3.OPS.keys() and augment.num_layers == 2
    assert {(op.prob, op.magnitude, op.magnitude_std) for op in augment.ops} == {(0.5, 10, 0.5)}
    assert share.transforms[0].degree == config(c3, C3_FLAGS).rotate
    for (name, op), level in itertools.product(operations.items(), (7.7, 8.6, 9.3, 9.9, 9.99, 10.6)):
        replace(monkeypatch, module.random, random=lambda: 0.4, gauss=lambda *_: level)
        ours = c3.rand_augment(picture(), Drawn([name], level, 0.4))
        agree("c3_semiseg", "augmentation: pixels", int((np.array(ours) != np.array(op(picture()))).sum()), 0)


# ---------------------------------------------------------------------- CCT

CCT_NAMES = {**{rf"n\.encoder\.base\.0\.0\.{theirs}": f"n.backbone.{ours}"
                for theirs, ours in DEEP_STEM.items()},
             r"n\.encoder\.base\.": "n.backbone.layer", r"n\.encoder\.psp\.stages": "n.psp.branches",
             r"n\.encoder\.psp\.bottleneck": "n.psp.fuse", r"n\.main_decoder\.upsample\.0": "n.main.adapt",
             **{rf"n\.main_decoder\.upsample\.{k + 1}\.conv": f"n.main.subpixel.{k}" for k in range(3)},
             **{rf"n\.aux_decoders\.{i}\.upsample\.0": f"n.aux.{i}.adapt" for i in range(7)},
             **{rf"n\.aux_decoders\.{i}\.upsample\.{k + 1}\.conv": f"n.aux.{i}.subpixel.{k}"
                for i in range(7) for k in range(3)}}
KINDS = {"i_vat": "vat", "dropout": "drop", "g_cutout": "cutout", "con_msk": "context_masking",
         "obj_msk": "object_masking", "f_drop": "feature_drop", "f_noise": "feature_noise"}  # ours: theirs


def small_cct(load):
    """Its ResNet is small -> its settings"""
    resnets = load("models.backbones.resnet_models")
    load("models.backbones.resnet_backbone").deepbase_resnet50 = lambda pretrained: resnets.ResNet(
        resnets.Bottleneck, LAYERS, deep_base=True, norm_type="batchnorm")
    return json.loads(Path(load("models").__file__).parents[1].joinpath("configs/config.json").read_text())


def cct_pair(load):
    """Their settings and network, one decoder of each kind, and our parts with its weights"""
    conf = small_cct(load)
    assert [conf["model"][kind] for kind in KINDS.values()] == [cct.PERTURBATIONS[kind] for kind in KINDS]
    conf["model"] |= dict.fromkeys(KINDS.values(), 1)
    losses = load("utils.losses")
    weight = losses.consistency_weight(conf["unsupervised_w"], iters_per_epoch=3, rampup_ends=2)
    theirs = load("models.model").CCT(5, conf["model"], losses.CE_loss, weight, 255, pretrained=False)
    ours = nn.ModuleDict(dict(backbone=cct.ResNet("resnet50", stem="deep"), psp=PSP(2048),
                              main=cct.Decoder(512, 5),
                              aux=nn.ModuleList(cct.Decoder(512, 5) for _ in KINDS)))
    nn.ModuleDict(dict(n=ours)).load_state_dict(renamed(joined(dict(n=theirs)), CCT_NAMES), strict=False)
    return conf, theirs, ours


def contours(mask, *_):
    """Stands in for cv2's: all pixels of a blob; one of a blob that is too small for ours (D7)"""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    blobs = [np.argwhere(labels == k + 1)[:, None, ::-1] for k in range(count)]
    return [blob if len(blob) >= 64 else blob[:1] for blob in blobs], None


def numbers(*shape):
    """In 0..1, and reproducible"""
    return torch.sin(torch.arange(math.prod(shape)) ** 2.0).reshape(shape) / 2 + 0.5


def source(draw):
    return SimpleNamespace(shared=draw, uniform=draw, normal=draw)


def perturbed(kind, decoder, z, objects, kept, cfg):
    """A perturbation of ours by the numbers that theirs is given"""
    fixed = source(lambda *shape: torch.full(shape, 0.6))
    match kind:
        case "i_vat": return cct.i_vat(z, decoder, source(numbers), cfg.vat_xi, cfg.vat_eps, cfg.vat_released)
        case "dropout": return cct.dropout(z, source(lambda *_: kept[:, :, None, None].double()), cfg.dropout)
        case "g_cutout": return cct.g_cutout(z, find_blobs(objects), fixed, cfg.cutout)
        case "con_msk": return cct.con_msk(z, objects)
        case "obj_msk": return cct.obj_msk(z, objects)
        case "f_drop": return cct.f_drop(z, fixed, *cfg.drop_range)
        case "f_noise": return cct.f_noise(z, source(numbers), cfg.noise)


def test_cct_steps(double, release, small, monkeypatch):
    """2 steps of their Trainer with all seven perturbations and of a loop of our functions: losses, gradients
    and weights; rounding of float64, which I-VAT's xi of 1e-6 makes larger

    Taken back: D5 (--drop-range 0.7 0.9), D6 (--vat-released), D7 (blobs)."""
    load = release("CCT")
    torch.manual_seed(1)  # then every perturbation hides something
    sys.modules["tqdm"].tqdm = lambda x, **_: MagicMock(__iter__=lambda _: iter(x))
    conf, theirs, ours = cct_pair(load)
    conf["trainer"] |= dict(epochs=20, val=False)
    start = joined(dict(n=theirs))
    labelled, unlabelled = [[(images(2), masks(2, 5)) for _ in range(2)] for _ in range(2)]
    val = MagicMock(batch_size=1, MEAN=[0], STD=[1], dataset=MagicMock(ignore_index=255, num_classes=5))
    load("base.base_trainer").HTML = MagicMock()
    trainer = load("trainer").Trainer(theirs, None, conf, labelled, unlabelled, 3, val)
    vars(trainer).update(_write_img_tb=nothing, _write_scalars_tb=nothing, _compute_metrics=nothing)
    decoders = load("models.decoders")
    decoders.cv2.findContours = contours
    kept = []
    theirs.aux_decoders[1].dropout.register_forward_hook(lambda _, x, z: kept.append((z != 0).any(3).any(2)))
    theirs.aux_decoders[6].uni_dist = SimpleNamespace(sample=lambda shape: 0.3 * (2 * numbers(*shape) - 1))
    with recorded(monkeypatch, dict(n=theirs)) as released, monkeypatch.context() as patch:
        patch.setattr(decoders.random, "randint", lambda a, b: a + int(0.6 * (b - a + 1)))
        patch.setattr(decoders.np.random, "uniform", lambda a, b: a + (b - a) * 0.6)
        patch.setattr(torch, "rand", lambda shape: numbers(*shape))
        trainer._train_epoch(1)

    cfg = config(cct, "--data voc --steps 60 --drop-range 0.7 0.9 --vat-released --weights imagenet")
    heads = [p for n, p in ours.named_parameters() if not n.startswith("backbone")]
    optimizer = torch.optim.SGD([dict(params=ours.backbone.parameters(), lr_mult=cfg.backbone_lr_mult),
                                 dict(params=heads)], cfg.lr, 0.9, weight_decay=cfg.weight_decay)
    hidden = []
    ours.train()
    with recorded(monkeypatch, dict(n=ours)) as mine:
        for step, ((x_l, y_l), (x_u, _)) in enumerate(zip(labelled, unlabelled)):
            set_lr(optimizer, cfg.lr * poly(step, cfg.steps))
            optimizer.zero_grad()
            loss = cct.cross_entropy(ours.main(ours.psp(ours.backbone(x_l))), y_l)
            z = ours.psp(ours.backbone(x_u))
            logits = ours.main(z).detach()
            for kind, decoder in zip(KINDS, ours.aux):
                changed = perturbed(kind, decoder, z, logits.argmax(1) > 0, kept[step], cfg)
                hidden.append(((z != 0) & (changed == 0)).any().item() or kind in ("i_vat", "f_noise"))
                loss_k = cct.distance(cfg.distance, logits.softmax(1), decoder(changed)).mean()
                loss = loss + cct.ramped_weight(cfg.lambda_u, step, cfg) * loss_k / len(KINDS)
            loss.backward()
            optimizer.step()
    assert all(hidden), "every perturbation is at work"
    agree_steps("cct", mine, (released[0][1::2], released[1]), CCT_NAMES, start)  # [::2]: I-VAT's


def test_cct_losses(double, release):
    """CE, ab-CE and its threshold, MSE, also of confident pixels, KL, pairwise loss: rounding (JS: D2)"""
    losses = release("CCT")("utils.losses")
    logits, other, y = 2 * torch.randn(2, 5, 16, 16), torch.randn(2, 5, 16, 16), masks(2, 5, 16)
    logits.requires_grad_()
    p = other.softmax(1)
    keep = p.amax(1) > 0.5
    mse = cct.distance("mse", p, logits)
    agree("cct", "each loss", differ(cct.cross_entropy(logits, y), losses.CE_loss(logits, y, 255)))
    agree("cct", "each loss", differ(mse.mean(), losses.softmax_mse_loss(logits, p)))
    confident = losses.softmax_mse_loss(logits, p, True, 0.5)
    agree("cct", "each loss", differ(mse[keep].mean(), confident))
    agree("cct", "each loss", differ(cct.distance("kl", p, logits).mean(), losses.softmax_kl_loss(logits, p)))
    three = [torch.randn(2, 5, 16, 16) for _ in range(3)]
    mean = torch.stack(three).softmax(2).mean(0)
    ours = sum(cct.pairwise(x, mean) for x in three) / 3
    agree("cct", "each loss", differ(ours, losses.pair_wise_loss(three)))
    cfg = config(cct, "--data voc --supervised-loss ab_ce --steps 1000")
    bootstrapped = losses.abCE_loss(iters_per_epoch=50, epochs=20, num_classes=5)
    for step in range(0, 400, 57):  # D10: there theirs stops
        eta = cct.eta(step, cfg, 5)
        ours = cct.cross_entropy(logits, cct.without_easy_pixels(logits, y, eta))
        agree("cct", "thresholds", differ(eta, bootstrapped.threshold(step % 50, step // 50)))
        agree("cct", "each loss", differ(ours, bootstrapped(logits, y, 255, step % 50, step // 50)))
    few = losses.abCE_loss(50, 20, 5, thresh=1e-6, ramp_type=None)  # B pixels are kept at least
    ours = cct.cross_entropy(logits, cct.without_easy_pixels(logits, y, 1e-6))
    agree("cct", "each loss", differ(ours, few(logits, y, 255, 0, 0)))


def test_cct_schedules_and_evaluation(double, release, small):
    """Learning rates, w_u and w_w of 1000 steps, mIoU: rounding of float64"""
    load = release("CCT")
    conf = small_cct(load)
    cfg = config(cct, "--data voc --steps 1000 --weights imagenet")
    sgd = conf["optimizer"]["args"]
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], **sgd)
    schedule = load("utils.lr_scheduler").Poly(optimizer, 20, 50)
    ramping = load("utils.losses").consistency_weight(conf["unsupervised_w"], 50, 0, conf["ramp_up"] * 20)
    found = []
    for step in range(1000):
        found.append(optimizer.param_groups[0]["lr"] / (cfg.lr * poly(step, cfg.steps)) - 1)
        w_u = ramping(step // 50, step % 50)
        found.append(cct.ramped_weight(cfg.lambda_u, step, cfg) / w_u - 1)
        found.append(cct.ramped_weight(cfg.lambda_w, step, cfg) / (w_u / ramping.final_w * conf["weakly_loss_w"]) - 1)
        if step < 999:
            schedule.step(epoch=step // 50)
    agree("cct", "learning rates, ramps", max(map(abs, found)))
    assert (sgd["weight_decay"], sgd["momentum"]) == (cfg.weight_decay, 0.9)
    logits, y = torch.randn(2, 5, 64, 64), masks(2, 5, 64)
    _, _, inter, union = load("utils.metrics").eval_metrics(logits, y, 5, 255)
    agree("cct", "mIoU", abs(miou(5, logits.argmax(1), y) - (inter / union).mean()), 1e-5)


def test_cct_images(release, monkeypatch):
    """Longer side 200 to 800, crop, flip by the same draws; bicubic pixels differ by two greys at most"""
    module = release("CCT")("base.base_dataset")
    image, mask = np.array(picture()), np.zeros((48, 56), np.uint8)
    module.cv2.resize = lambda y, size, interpolation: np.zeros(size[::-1], np.uint8)
    theirs = object.__new__(module.BaseDataSet)
    tf = torchvision.transforms
    vars(theirs).update(base_size=400, scale=True, crop_size=320, flip=True, jitter=False,
                        to_tensor=tf.ToTensor(), normalize=tf.Normalize(T.IMAGENET_MEAN, T.IMAGENET_STD))
    draws = {(200, 800): 560, (0, 160): 33, (0, 240): 44}  # of a range, its upper end included: a number
    cfg = config(cct, "--data voc")
    for flip in (False, True):
        replace(monkeypatch, module.random, randint=lambda a, b: draws[a, b], random=lambda: 0.1 + 0.8 * flip)
        x, _ = theirs._augmentation(image.astype(np.float32), mask)
        rng = SimpleNamespace(random=lambda: 0.9 - 0.8 * flip,
                              integers=lambda *r: draws[(0, *r)[-2], r[-1] - 1])
        ours, _ = cct.augment(cfg, image, mask, rng)
        gap = (ours - (255 * T.denormalise(x)).round()).abs().max()
        agree("cct", "augmentation: greys", int(gap), 2)


# ---------------------------------------------------------------------- files

def saved_by(trainer, net):
    """best_model.pth, written by their BaseTrainer"""
    trainer = object.__new__(trainer)
    vars(trainer).update(model=nn.DataParallel(net), optimizer=torch.optim.Adam(net.parameters()),
                         mnt_best=np.float64(0.613), config=dict(arch=dict(args=dict(freeze_bn=True))),
                         checkpoint_dir=".", logger=MagicMock())
    trainer._save_checkpoint(5, save_best=True)
    return "best_model.pth"


def agree_opened(monkeypatch, script, path, x, theirs, flags="", name=None):
    """--evaluate opens their file on four classes, and its network gives their logits of the images x"""
    nets = []
    monkeypatch.setattr(torchvision.models, "resnet101", torchvision.models.resnet50)
    monkeypatch.setattr(script, "load_network", lambda *a: nets.append(load_network(*a)) or nets[0])
    fixtures.make_folder("data/folder")
    flags = f"--data folder --root data/folder --device cpu --workers 0 {flags}"
    script.main(["--evaluate", path, *flags.split()])
    agree(name or script.__name__, "files: logits", differ(nets[0].eval()(x), theirs), 1e-5)


def test_cct_file(release, small, monkeypatch):
    """best_model.pth, of the network with the deep stem: rounding of float32"""
    load = release("CCT")
    conf = small_cct(load)
    theirs = load("models.model").CCT(4, conf["model"], nothing, nothing, 255, pretrained=False).eval()
    path = saved_by(load("base.base_trainer").BaseTrainer, theirs)
    x = images(2, 64)
    agree_opened(monkeypatch, cct, path, x, theirs.main_decoder(theirs.encoder(x)))


def test_s4gan_files(release, small, monkeypatch):
    """VOC_30000.pth for images of 0..255 less the mean; a classifier: rounding of float32"""
    deeplab = release("semisup-semseg")("model.deeplabv2")
    theirs = deeplab.ResNet(deeplab.Bottleneck, LAYERS, 4)
    pretrained(theirs)
    torch.save(nn.DataParallel(theirs).state_dict(), "VOC_30000.pth")
    x = 255 * torch.rand(1, 3, 128, 128)
    mean = torch.tensor((104.00698793, 116.66876762, 122.67891434))[[2, 1, 0], None, None]
    logits = F.interpolate(theirs.eval()(x - mean), (128, 128), mode="bilinear", align_corners=True)
    x = T.normalise(x / 255)
    agree_opened(monkeypatch, s4, "VOC_30000.pth", x, logits, "--input-scale caffe", "s4gan")
    theirs = small()
    theirs.fc = nn.Linear(2048, 4)
    torch.save(nn.DataParallel(theirs).state_dict(), "classifier.pth")
    x = images(2, 64)
    agree_opened(monkeypatch, s4, "classifier.pth", x, theirs.eval()(x), name="mlmt")


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_three_stage_file(release, small, monkeypatch, branch):
    """model_best.pth, of every stage: rounding of float32"""
    deeplab = release(RK)("architectures.deeplab2")
    theirs = deeplab.ResNetDeepLab(deeplab.Bottleneck, LAYERS, 4, None, None, doublehead=branch)
    pretrained(theirs)
    torch.save(theirs.state_dict(), "model_best.pth")
    x = images(1, 128)
    logits = theirs.eval()(x)
    agree_opened(monkeypatch, ts, "model_best.pth", x, logits[0] if branch else logits)


def test_c3_file(release, small, monkeypatch):
    """best_model.pth: rounding of float32"""
    load = release("C3-SemiSeg")
    theirs = small_c3(load).DeepLabV2(4, pretrained=False).eval()
    pretrained(theirs)
    x = images(1, 128)
    agree_opened(monkeypatch, c3, saved_by(load("base.base_trainer").BaseTrainer, theirs), x, theirs(x))
