"""Files of the authors' code, made here from our networks by their names: --evaluate, --predict, --weights,
and --released. With the authors' networks themselves: tests/test_release.py."""
import argparse
import importlib
import re

import numpy as np
import pytest
import torch

from conftest import SCRIPTS, run_here

import cct
import s4gan_mlmt as s4
from common import transforms as T
from common.backbones import Rescale, ResNet
from common.command_line import parse
from common.datasets import DATASETS, open_dataset
from common.settings import UserError
from common.weights import DEEP_STEM

HEAD = {r"^(net\.)?head\.branches": "layer5.conv2d_list", r"^(net\.)?body\.": ""}  # ours: theirs
THEIRS = {  # name of a test: (script, names, further tensors, flags of ours)
    "cct": ("cct", {**{rf"^encoder\.backbone\.{ours}\.(?=[wbrn])": f"encoder.base.0.0.{theirs}."
                       for theirs, ours in DEEP_STEM.items()},
                    r"^encoder\.backbone\.layer": "encoder.base.", r"psp\.branches": "psp.stages",
                    r"psp\.fuse": "psp.bottleneck", r"^decoders\.0\.adapt": "main_decoder.upsample.0",
                    r"^decoders\.0\.subpixel\.0": "main_decoder.upsample.1.conv",
                    r"^decoders\.0\.subpixel\.1": "main_decoder.upsample.2.conv",
                    r"^decoders\.0\.subpixel\.2": "main_decoder.upsample.3.conv"},
            ["aux_decoders.0.upsample.0.weight"], "--stem deep --weights none"),
    "three_stage": ("three_stage", HEAD, ["layer5.conv2d_list.3.bias", "layer4_2.0.conv1.weight",
                                          "layer5_2.conv2d_list.0.bias"], "--bn frozen --aspp-rates 6,12"),
    "c3_semiseg": ("c3_semiseg", {r"^head\.branches": "decoder.conv2d_list"}, ["decoder.conv2d_list.2.bias"],
                   "--aspp-rates 6,12"),
    "s4gan": ("s4gan_mlmt", HEAD, ["layer5.conv2d_list.2.weight"], "--aspp-rates 6,12"),
    "mlmt": ("s4gan_mlmt", HEAD, [], "")}


def network(name, cfg, classes):
    """The network of a test that a checkpoint of ours has as `net`"""
    script = importlib.import_module(THEIRS[name][0])
    match name:
        case "cct": return script.Segmenter(cfg, [classes])
        case "mlmt": return script.Classifier(cfg, classes)
        case "c3_semiseg": return script.Segmenter(cfg, classes).net
    return script.Segmenter(cfg, classes)


def renamed(state, names):
    """A state dict with their names: of the patterns in `names` the first that fits is replaced"""
    theirs = {}
    for name, tensor in state.items():
        for pattern, new in names.items():
            name, count = re.subn(pattern, new, name)
            if count:
                break
        theirs[f"module.{name}"] = tensor
    return theirs


@pytest.fixture
def made(folder_data, tmp_path):
    """made(name of a test) -> (our network, file of the authors' code with its weights, its script, flags)"""
    def make(name, **state):
        script, names, more, flags = THEIRS[name]
        module = importlib.import_module(script)
        given = f"--data folder --root {folder_data} --backbone resnet18 {flags}".split()
        cfg, _ = parse(module.Config, module.PRESETS, given)
        net = network(name, cfg, len(open_dataset("folder", folder_data).classes)).eval()
        for n, tensor in net.state_dict().items():
            torch.nn.init.uniform_(tensor, 0.5, 1) if "running" in n else None
        weights = dict.fromkeys([f"module.{n}" for n in more], torch.zeros(1)) | renamed(net.state_dict(), names)
        path = tmp_path / f"{name}.pth"
        torch.save(state | dict(state_dict=weights) if state else weights, path)
        flags = ["--data", "folder", "--root", folder_data, "--device", "cpu", "--workers", 0]
        return net, path, script, flags
    return make


@pytest.mark.parametrize("name", THEIRS)
def test_a_released_file_is_evaluated_with_the_same_weights(made, monkeypatch, capsys, tmp_path, name):
    state = dict(monitor_best=np.float64(0.5), epoch=3, config={"a": [1]}) if name == "cct" else {}
    net, path, script, flags = made(name, **state)
    module = importlib.import_module(script)
    opened = []
    load = module.load_network
    monkeypatch.setattr(module, "load_network", lambda *a: opened.append(load(*a)) or opened[0])
    run_here(script, "--evaluate", path, *flags, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert re.search(r"authors' code for \d+ classes: --backbone resnet18", said) and "(step unknown)" in said
    assert ("deep" in said) == (name == "cct") and ("6,12" in said) == (name != "cct")
    x = torch.randn(2, 3, 64, 72)
    net = net.to(memory_format=torch.channels_last)
    assert torch.equal(net(x), opened[0].eval()(x)) and net(x).abs().max() > 0


def test_s4gan_is_fused_with_a_released_classifier(made, capsys):
    _, path, script, flags = made("s4gan")
    run_here(script, "--evaluate", path, "--classifier", made("mlmt")[1], *flags, "--tau", 0.3)
    assert "fused" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["c3_semiseg", "mlmt"])
def test_released_files_that_do_not_fit_are_told(made, name):
    _, path, script, flags = made(name)
    with pytest.raises(UserError, match=r"has \d+ classes, --data shapes has \d+"):
        run_here(script, "--evaluate", path, "--device", "cpu")
    with pytest.raises(UserError, match="no effect on a trained network"):
        run_here(script, "--evaluate", path, *flags, "--lr", 0.1)
    other = made("c3_semiseg" if name == "cct" else "cct")[1]
    with pytest.raises(UserError, match="nor of its authors' code"):
        run_here(script, "--evaluate", other, *flags)
    state = torch.load(path)
    for more, said in ((torch.ones(1), "nor of its"),
                       (argparse.Namespace(), r"objects beside tensors \(argparse.Namespace\)")):
        torch.save(state | dict(more=more), path)
        with pytest.raises(UserError, match=said):
            run_here(script, "--evaluate", path, *flags)


def test_deep_stem():
    """23,631,808 parameters in ResNet-50; three convolutions, then as torchvision's"""
    with torch.device("meta"):
        net = ResNet("resnet50", stem="deep")
    assert sum(p.numel() for p in net.parameters()) == 23_631_808
    assert ResNet("resnet18", 3, stem="deep")(torch.randn(1, 3, 40, 48)).shape == (1, 256, 5, 6)


def test_cct_takes_the_stem_of_its_weights_and_keeps_it(bare, tmp_path, capsys):
    names = {rf"^{ours}\.(?=[wbrn])": f"{theirs}." for theirs, ours in DEEP_STEM.items()}
    deep = renamed(ResNet("resnet18", stem="deep").state_dict(), names)  # as torchcv's 3x3resnet50-imagenet.pth
    assert "module.conv3.weight" in deep
    torch.save(deep | {"module.fc.weight": torch.zeros(1000, 512)}, tmp_path / "deep.pth")
    flags = [*bare["cct"], "--out", tmp_path / "run", "--weights", tmp_path / "deep.pth",
             "--backbone-layers", 4, "--steps", 1, "--supervised"]
    run_here("cct", *flags)
    run_here("cct", *flags)  # resumed
    state = torch.load(tmp_path / "run/last.pt")
    assert state["config"]["stem"] == "deep" and "encoder.backbone.conv1.6.weight" in state["net"]
    run_here("cct", "--evaluate", tmp_path / "run/last.pt", "--device", "cpu")
    final, again = re.findall(r"mIoU (\d+\.\d)", capsys.readouterr().out)[-2:]
    assert final == again
    flags = [*bare["s4gan_mlmt"], "--out", tmp_path / "s4", "--weights", tmp_path / "deep.pth"]
    with pytest.raises(UserError, match="missing or differ in shape"):
        run_here("s4gan_mlmt", *flags, "--backbone-layers", 4)


def test_input_scales_of_the_authors_code():
    pixels = torch.randint(0, 256, (2, 3, 4, 5)).float()
    x = T.normalise(pixels / 255)
    caffe = pixels - torch.tensor((122.67891434, 116.66876762, 104.00698793))[:, None, None]
    torch.testing.assert_close(Rescale("caffe")(x), caffe, rtol=1e-5, atol=1e-4)
    bgr = (pixels.flip(1) - torch.tensor((73.15835921, 82.90891754, 72.39239876))[:, None, None]) / 255
    torch.testing.assert_close(Rescale("bgr")(x), bgr, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCRIPTS)
def test_released_sets_what_flags_do_not(name, capsys):
    script = importlib.import_module(name)
    assert {data for data in script.PRESETS if "+" not in data} == set(DATASETS)
    for data in script.PRESETS:
        cfg, given = parse(script.Config, script.PRESETS, ["--data", data, "--released"],
                           released=script.RELEASED_SETTINGS)
        settings = script.RELEASED_SETTINGS["all"] | script.RELEASED_SETTINGS.get(data, {})
        assert settings and all(getattr(cfg, n) == value for n, value in settings.items())
        assert given.keys() == {"data", "released"} and (cfg.steps or cfg.epochs)
        script.settle(cfg, given)
        assert re.match(rf"runs/{name}-.*-released$", cfg.out)
        assert capsys.readouterr().out.startswith("--released: --")


def test_flags_win_over_released():
    flags = "--data voc --released --drop-range 0.5 0.6 --no-vat-released --steps 7".split()
    cfg, _ = parse(cct.Config, cct.PRESETS, flags, released=cct.RELEASED_SETTINGS)
    assert (cfg.drop_range, cfg.vat_released, cfg.steps, cfg.epochs) == ((0.5, 0.6), False, 7, None)
    flags = "--data voc --released --cons mse".split()
    cfg, _ = parse(s4.Config, s4.PRESETS, flags, released=s4.RELEASED_SETTINGS)
    assert (cfg.cons, cfg.cons_on, cfg.aspp_rates, cfg.flip) == ("mse", "unlabelled", (6, 12), False)
