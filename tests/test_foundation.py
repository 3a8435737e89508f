"""Backbones, transforms, streams, schedules, checkpoints, shapes: what all scripts stand on."""
import copy
import os
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from PIL import Image
from torch import nn

from common import transforms
from common.backbones import ASPP, PSP, DeepLabV2, DeepLabV3Plus, ResNet, hold_bn, upsample
from common.datasets.shapes import open_shapes
from common.random import Random, mix
from common.runtime import Runtime
from common.schedules import update_ema
from common.settings import RESNETS, UserError
from common.streams import Stream, endless, once, to_device
from common.weights import load_weights


def dilations(layer):
    return [m.dilation[0] for m in layer.modules()
            if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


@torch.no_grad()
def test_resnet_is_torchvisions_dilated_one():
    torch.manual_seed(0)
    ours = ResNet("resnet50").eval()
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = torch.rand(1, 3, 40, 33)
    y = nn.Sequential(*list(theirs.children())[:-2])(x)
    assert torch.equal(ours(x), y) and y.shape[2:] == (5, 5)


@pytest.mark.parametrize("name", RESNETS)
def test_dilations_and_output_sizes(name):
    x = torch.empty(1, 3, 321, 480, device="meta")
    with torch.device("meta"):
        net = ResNet(name)
        deeplab = DeepLabV2(19, name).body
        truncated = ResNet(name, 2)
        plus = DeepLabV3Plus(19, name).body
    assert net(x).shape == (1, net.out_channels, 41, 60)
    assert deeplab(x).shape == (1, net.out_channels, 41, 61)
    assert plus(x).shape == (1, net.out_channels, 21, 30)
    assert truncated(x).shape == (1, net.out_channels // 4, 41, 60)
    assert dilations(net.layer3)[:3] == [1, 2, 2] and set(dilations(net.layer3)[1:]) == {2}
    assert dilations(net.layer4)[:3] == [2, 4, 4] and set(dilations(net.layer4)[1:]) == {4}
    assert set(dilations(deeplab.layer3)) == {2} and set(dilations(deeplab.layer4)) == {4}


@pytest.mark.parametrize("stride_on, strided", [("1x1", "conv1"), ("3x3", "conv2")])
def test_deeplab_strides_where_its_weights_were_trained_to(stride_on, strided):
    with torch.device("meta"):
        block = DeepLabV2(19, "resnet101", stride_on=stride_on).body.layer2[0]
    convolutions = {name: m for name, m in block.named_children() if isinstance(m, nn.Conv2d)}
    assert [name for name, m in convolutions.items() if m.stride == (2, 2)] == [strided]


def test_aspp_sums_all_its_branches():
    """The released code stops after two of the four."""
    head = ASPP(8, 3)
    x = torch.randn(2, 8, 9, 9)
    slow = sum(nn.functional.conv2d(x, conv.weight, conv.bias, padding=rate, dilation=rate)
               for conv, rate in zip(head.branches, (6, 12, 18, 24), strict=True))
    assert torch.equal(head(x), slow)


def test_upsampling_maps_corners_to_corners():
    x = torch.rand(1, 1, 3, 5)
    up = upsample(x, (9, 17))  # 4 pixels to a cell
    assert torch.allclose(up[..., ::4, ::4], x, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_batch_normalisation_is_pytorchs_but_keeps_no_input(dtype):
    ours = nn.BatchNorm2d(5).eval()
    nn.init.uniform_(ours.weight, -1, 1)
    nn.init.uniform_(ours.bias)
    ours.running_mean.uniform_()
    ours.running_var.uniform_(0.1, 2)
    theirs = copy.deepcopy(ours).requires_grad_(False)
    hold_bn(ours, "frozen")
    x = torch.randn(2, 5, 3, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    saved, grads = [], []
    for norm, kept in ((ours, saved), (theirs, [])):
        mine = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = norm(mine)
        assert y.dtype == dtype and torch.equal(y, theirs(x))
        dy = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        grads.append(torch.autograd.grad(y, mine, dy)[0])
    torch.testing.assert_close(*grads)
    assert grads[0].dtype == dtype and grads[0].abs().sum() > 0 and max(t.numel() for t in saved) == 5


def test_psp_pools_projects_and_concatenates():
    with torch.device("meta"):
        psp = PSP(2048)
        assert psp(torch.empty(2, 2048, 41, 41)).shape == (2, 512, 41, 41)
        assert sum(p.numel() for p in psp.parameters()) == 23_073_792
    branches = PSP(8).eval().branches
    x = torch.randn(1, 8, 12, 12)
    for branch, bins in zip(branches, (1, 2, 3, 6), strict=True):
        means = x.view(1, 8, bins, 12 // bins, bins, 12 // bins).mean((3, 5))
        torch.testing.assert_close(branch(x), branch[1:](means))  # then 1x1, BN, ReLU


def test_weights_from_a_file(tmp_path, capsys):
    source = ResNet("resnet18")
    wrapped = {f"module.backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    wrapped["module.fc.weight"] = torch.zeros(3, 3)
    torch.save({"state_dict": wrapped}, tmp_path / "weights.pth")
    net = ResNet("resnet18")
    load_weights(net, "resnet18", str(tmp_path / "weights.pth"))
    said = capsys.readouterr().out
    assert all(map(torch.equal, net.state_dict().values(), source.state_dict().values()))
    assert "1 skipped (fc.weight)" in said and "0 missing" in said
    with pytest.raises(UserError, match="missing or differ in shape"):
        load_weights(ResNet("resnet34"), "resnet34", str(tmp_path / "weights.pth"), lambda _: None)


def test_imagenet_weights_come_from_torchvision(monkeypatch):
    theirs = torchvision.models.resnet18()
    failures = OSError("no route to host"), RuntimeError("invalid hash value")  # a part of the file
    download = Mock(side_effect=[theirs.state_dict(), *failures])
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", download)
    net = ResNet("resnet18")
    load_weights(net, "resnet18", "imagenet", lambda _: None)
    assert torch.equal(net.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    for failure in failures:
        with pytest.raises(UserError, match=f"{failure}.*--weights none"):
            load_weights(net, "resnet18", "imagenet")


def coordinates(height, width):
    """An image whose channels are y, x and the mask, and the mask: different almost everywhere"""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    mask = 7 * y + x
    return transforms.to_tensors(np.stack([y, x, mask], 2), mask)


def test_crop_flip_shift_keep_image_and_mask_together():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image, mask = transforms.random_crop(*coordinates(20, 30), (12, 17), rng)
        image, mask = transforms.random_flip(*transforms.random_shift(image, mask, 5, rng), rng)
        inside = mask != 255
        assert image.shape == (3, 12, 17) and 0.3 < inside.float().mean()
        assert torch.equal(image[2][inside], mask[inside])


def test_images_of_many_sizes_are_not_benchmarked():
    split = open_shapes().val
    for batch in (1, 2):
        for _ in once(split, transforms.for_scoring, batch, 0, Runtime("cpu")):
            assert torch.backends.cudnn.benchmark == (batch > 1)
        torch.backends.cudnn.benchmark = False
        next(endless(Stream(Numbers(), [0, 1], noisy, 0, "u", False), 2, 0, 0, Runtime("cpu")))
        assert torch.backends.cudnn.benchmark  # batches of training have one size


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_many_sizes_make_no_batch(workers):
    def cropped(image, mask, rng):
        image, mask = noisy(image, mask, rng)
        return image[:, :1 + int(image[0, 0, 0]) % 4], mask

    stream = Stream(Numbers(), range(7), cropped, 0, "u", False)
    with pytest.raises(UserError, match="different sizes: give a --crop"):
        next(endless(stream, 7, 0, workers, Runtime("cpu")))


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", Mock(side_effect=RuntimeError("invalid device ordinal")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="cannot use GPU 1 of 1 .*--nproc_per_node"):
        Runtime()


def test_batches_are_normalised_on_the_device():
    image, mask = coordinates(5, 6)
    image[0] = 100
    x, y, valid, tags = to_device([image[None], mask[None], mask[None] > 0, mask[:1]], "cpu")
    assert x[0, 0, 0, 0].item() == pytest.approx((100 / 255 - 0.485) / 0.229)
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(255 * transforms.denormalise(x[0]), image.float(), atol=1e-4)
    assert y.dtype == torch.int64 and torch.equal(y[0].byte(), mask)
    assert valid.dtype == torch.bool and tags.dtype == torch.uint8


def test_resize_agrees_with_pillow_on_masks():
    image, mask = coordinates(21, 35)
    for size in ((10, 17), (42, 70), (21, 20)):
        _, ours = transforms.resize(image, mask, size)
        theirs = Image.fromarray(mask.numpy()).resize(size[::-1], Image.NEAREST)
        assert np.array_equal(ours.numpy(), np.array(theirs))


class Numbers:
    """A split whose image i is filled with i."""

    def image(self, i):
        return np.full((4, 4, 3), i, np.uint8)

    def mask(self, i):
        return np.full((4, 4), i, np.uint8)


def noisy(image, mask, rng):
    image, mask = transforms.to_tensors(image, mask)
    return image + rng.random(), mask


def test_stream_is_a_function_of_seed_name_and_position():
    stream = Stream(Numbers(), [0, 2, 4, 6], noisy, 5, "labelled", True)
    epochs = [[stream.index(p) for p in range(e * 4, e * 4 + 4)] for e in range(6)]
    assert all(sorted(epoch) == [0, 2, 4, 6] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    again = Stream(Numbers(), [0, 2, 4, 6], noisy, 5, "labelled", True)
    twin = Stream(Numbers(), [0, 2, 4, 6], noisy, 5, "unlabelled", True)
    assert all(torch.equal(stream[p][0], again[p][0]) for p in (7, 2, 5))
    noise = {round(one[p][0].max().item() % 1, 5) for one in (stream, twin) for p in range(8)}
    assert len(noise) == 16  # in each stream two epochs, each image with numbers of its own


@pytest.mark.parametrize("world", [2, 3])
def test_draws_of_a_rank_are_its_rows_of_the_single_process_draw(world):
    ranks = [Random((5, "perturb", 7), "cpu", rank, world) for rank in range(world)]
    alone = Random((5, "perturb", 7))
    for _ in range(2):  # and the streams stay in step
        assert torch.equal(torch.cat([r.uniform(2, 3) for r in ranks]), alone.uniform(2 * world, 3))
        assert torch.equal(torch.cat([r.normal(2, 3) for r in ranks]), alone.normal(2 * world, 3))
        shared = alone.shared(1, 5)
        assert all(torch.equal(r.shared(1, 5), shared) for r in ranks)


def test_keys_give_streams_of_their_own():
    assert len({mix(1, 23), mix(12, 3), *(mix(0, "a", k) for k in range(98))}) == 100


NORMS = {  # of two processes: the samples' dtype and mean, then what holds
    "float32": (torch.float32, 0, ""), "float64": (torch.float64, 0, ""),
    "bfloat16": (torch.bfloat16, 0, ""), "far from 0": (torch.float32, 300, ""),
    "affine": (torch.float32, 0, "affine"), "frozen": (torch.float32, 0, "frozen"),
    "no statistics": (torch.float32, 0, "statistics")}


def normalise(case, ctx):
    """Two training steps on this process's share of four samples
    -> {of each sample}, {summed over processes}, {the same on each}"""
    dtype, mean, held = NORMS[case]
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(3, momentum=0.3), nn.BatchNorm2d(5)]
    for norm in norms:
        nn.init.uniform_(norm.weight, -1, 1)
        nn.init.uniform_(norm.bias)
        norm.track_running_stats = held != "statistics"
    net = nn.Sequential(norms[0], nn.ReLU(), nn.Conv2d(3, 5, 3), norms[1])
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = torch.randn(2, 4, 3, 6, 7, dtype=precision), torch.randn(4, 5, 4, 5, dtype=precision)
    x = x * torch.rand(4, 1, 1, 1) + torch.rand(4, 1, 1, 1) + mean
    net = ctx.place(net.to(precision))
    hold_bn(net, held if held in ("affine", "frozen") else "learn")
    share = slice(ctx.rank * 4 // ctx.world, (ctx.rank + 1) * 4 // ctx.world)
    for step in range(2):
        mine = x[step, share].contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = net(mine)
        y.backward(dy[share].to(dtype))
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    in_eval = copy.deepcopy(net).eval()(mine)
    return dict(y=y, dx=mine.grad, eval=in_eval), gradients, net.state_dict()


def norms_of_two_processes(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    ctx = Runtime("cpu")
    found = {}
    for case in NORMS:
        samples, gradients, state = normalise(case, ctx)
        both = {name: ctx.gather(value[None]) for name, value in state.items()}
        assert all(torch.equal(*values) for values in both.values())
        found[case] = ({name: ctx.gather(value) for name, value in samples.items()},
                       {name: ctx.sum(value) for name, value in gradients.items()}, state)
    if ctx.main:
        torch.save(found, folder / "found.pt")
    ctx.close()


def test_batch_normalisation_of_two_processes_is_that_of_all_samples(tmp_path):
    mp.spawn(norms_of_two_processes, (tmp_path,), nprocs=2)
    ctx = Runtime("cpu")
    for case, parts in torch.load(tmp_path / "found.pt").items():
        tolerance = {"float64": 1e-11, "bfloat16": 0.2, "far from 0": 1e-3}.get(case, 1e-5)
        for found, wanted in zip(parts, normalise(case, ctx)):
            assert found.keys() == wanted.keys()
            for name in wanted:
                torch.testing.assert_close(found[name], wanted[name], rtol=tolerance,
                                           atol=tolerance, msg=lambda text: f"{case}, {name}: {text}")


@pytest.mark.parametrize("buffers, mean, counter", [("copy", 7, 1), ("ema", 0.7, 1), ("keep", 0, 0)])
def test_ema_of_parameters_and_buffers(buffers, mean, counter):
    teacher, student = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(student.weight, 3.0)  # the teacher's is 1
    student.running_mean += 7
    student.num_batches_tracked += 1
    update_ema(teacher, student, 0.9, buffers)
    assert teacher.weight.tolist() == pytest.approx([1.2, 1.2])
    assert teacher.running_mean.tolist() == pytest.approx([mean, mean])
    assert teacher.num_batches_tracked == counter


def test_shapes_hold_every_class():
    data = open_shapes()
    assert len(data.classes) == 9 and set(np.unique(data.train.masks)) == set(range(9))
