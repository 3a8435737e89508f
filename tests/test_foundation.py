"""Backbones, transforms, streams, schedules, checkpoints, shapes: what all scripts stand on."""
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from common import checkpoint, transforms
from common.backbones import (ASPP, PSP, RESNETS, DeepLabResNet, DeepLabV2, DeepLabV3Plus, ResNet, hold_bn, load_matching,
                              load_weights, upsample)
from common.runtime import Random, Runtime, mix
from common.schedules import poly, set_lr, update_ema
from common.settings import UserError
from common.shapes import CLASSES, draw, open_shapes
from common.streams import Scored, Steps, Stream, endless, once


def dilations(layer):
    return [m.dilation[0] for m in layer.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


def test_resnet_is_torchvisions_dilated_one():
    for name in ("resnet50", "resnet101"):
        with torch.device("meta"):
            theirs = getattr(torchvision.models, name)(replace_stride_with_dilation=[False, True, True])
            ours = ResNet(name)
        for (n, a), (m, b) in zip(ours.named_modules(), theirs.named_modules()):
            assert n == m
            if isinstance(a, nn.Conv2d):
                assert (a.stride, a.dilation, a.padding) == (b.stride, b.dilation, b.padding), n
    with torch.no_grad():
        torch.manual_seed(0)
        ours, theirs = ResNet("resnet50").eval(), torchvision.models.resnet50(
            replace_stride_with_dilation=[False, True, True]).eval()
        theirs.load_state_dict(ours.state_dict(), strict=False)
        x = torch.rand(1, 3, 40, 33)
        y = nn.Sequential(*list(theirs.children())[:-2])(x)
        assert torch.equal(ours(x), y) and y.shape[2:] == (5, 5)


@pytest.mark.parametrize("name", RESNETS)
def test_dilation_and_output_stride(name):
    with torch.device("meta"):
        net = ResNet(name)
        out = net(torch.empty(1, 3, 321, 480))
    assert dilations(net.layer3)[:3] == [1, 2, 2] and set(dilations(net.layer3)[1:]) == {2}
    assert dilations(net.layer4)[:3] == [2, 4, 4] and set(dilations(net.layer4)[1:]) == {4}
    assert all(m.stride == (1, 1) for layer in (net.layer3, net.layer4) for m in layer.modules() if isinstance(m, nn.Conv2d))
    assert out.shape == (1, net.out_channels, 41, 60)


def test_truncated_resnet():
    with torch.device("meta"):
        for layers, channels in ((2, 128), (3, 256), (4, 512)):
            net = ResNet("resnet18", layers)
            assert net.out_channels == channels and net(torch.empty(1, 3, 64, 64)).shape == (1, channels, 8, 8)
            assert hasattr(net, f"layer{layers}") and not hasattr(net, f"layer{layers + 1}")


def test_deeplab_sizes_and_parameters():
    """Parameter counts and feature sizes of the authors' networks (torchvision's would give 40 and 32x64 cells)."""
    with torch.device("meta"):
        for classes, count in ((21, 44_048_532), (60, 46_924_080), (19, 43_901_068)):
            net = DeepLabV2(classes, bn="affine")
            assert sum(p.numel() for p in net.parameters()) == count
            assert sum(p.numel() for p in net.parameters() if not p.requires_grad) == 105_344
        assert sum(p.numel() for p in net.head.parameters()) == 1_400_908
        for size, cells in (((321, 321), (41, 41)), ((505, 505), (64, 64)), ((256, 512), (33, 65)), ((512, 1024), (65, 129))):
            x = torch.empty(2, 3, *size)
            assert net.body(x).shape == (2, 2048, *cells) and net(x).shape == (2, 19, *size)
        net = DeepLabV3Plus(21)
        assert net(x).shape == (2, 21, 512, 1024) and net.body(x).shape == (2, 2048, 32, 64)
        assert sum(p.numel() for p in net.body.parameters()) == 42_500_160


@pytest.mark.parametrize("name", RESNETS)
def test_deeplab_dilates_every_block_and_strides_on_the_first_1x1(name):
    with torch.device("meta"):
        net, other, plain = DeepLabResNet(name), DeepLabResNet(name, stride_on="3x3"), ResNet(name)
        assert list(net.state_dict()) == list(plain.state_dict())
    assert set(dilations(net.layer2)) == {1} and set(dilations(net.layer3)) == {2} and set(dilations(net.layer4)) == {4}
    first, same = net.layer2[0], other.layer2[0]
    strided = [n for n, m in first.named_children() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert strided == ["conv1"] and net.maxpool.ceil_mode and first.downsample[0].stride == (2, 2)
    assert [n for n, m in same.named_children() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)] == [
        "conv2" if name in ("resnet50", "resnet101") else "conv1"]
    for layer in (net.layer3, net.layer4):
        assert all(m.stride == (1, 1) and m.padding[0] in (0, m.dilation[0]) for m in layer.modules() if isinstance(m, nn.Conv2d))
    with torch.device("meta"):
        for layers, channels in ((2, 128), (3, 256)):
            assert DeepLabResNet("resnet18", layers)(torch.empty(1, 3, 96, 96)).shape == (1, channels, 13, 13)


def test_aspp_sums_all_its_branches():
    """The released code stops after two of the four: here every branch gets a gradient."""
    torch.manual_seed(0)
    head, x = ASPP(8, 3), torch.randn(2, 8, 9, 9)
    slow = sum(nn.functional.conv2d(x, c.weight, c.bias, padding=r, dilation=r) for c, r in zip(head.branches, (6, 12, 18, 24)))
    assert torch.equal(head(x), slow)
    head(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters()) and len(list(head.parameters())) == 8
    assert ASPP(512, 64).branches[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert len(ASPP(8, 3, (6, 12)).branches) == 2


def test_upsampling_maps_corners_to_corners():
    x = torch.rand(1, 1, 3, 5)
    up = upsample(x, (9, 17))  # 4 pixels to a cell
    assert torch.allclose(up[..., ::4, ::4], x, atol=1e-6)


@pytest.mark.parametrize("make", [lambda bn: DeepLabV2(3, "resnet18", bn=bn), lambda bn: DeepLabV3Plus(3, "resnet18", bn=bn)])
def test_policies_of_batch_normalisation(make):
    """frozen: statistics and affine fixed even in train mode. affine: batch statistics. learn: ordinary."""
    torch.manual_seed(0)
    x = torch.randn(3, 3, 33, 33)
    for policy, statistics, affine in (("frozen", False, False), ("affine", True, False), ("learn", True, True)):
        net = make(policy).eval().train()
        norm, before = net.body.bn1, net.body.bn1.running_mean.clone()
        net(x).square().sum().backward()
        assert norm.training == statistics == (not torch.equal(norm.running_mean, before)), policy
        assert (norm.weight.grad is not None) == affine == norm.weight.requires_grad, policy
        assert net.body.conv1.weight.grad is not None
    with pytest.raises(ValueError, match="frozen, affine or learn"):
        hold_bn(net, "eval")


def test_psp_pools_projects_and_concatenates():
    with torch.device("meta"):
        psp = PSP(2048)
        assert psp(torch.empty(2, 2048, 41, 41)).shape == (2, 512, 41, 41)
        assert sum(p.numel() for p in psp.parameters()) == 23_073_792
    psp, x = PSP(8).eval(), torch.randn(1, 8, 12, 12)
    branch = psp.branches[1]  # bin 2: each quarter's mean, then 1x1, BN, ReLU
    quarters = x.view(1, 8, 2, 6, 2, 6).mean((3, 5))
    assert torch.allclose(branch(x), branch[1:](quarters), atol=1e-6)
    assert [b[0].output_size for b in psp.branches] == [1, 2, 3, 6] and (psp(x) >= 0).all()


def test_weights_from_a_file(tmp_path, capsys):
    source = ResNet("resnet18")
    wrapped = {f"module.backbone.{k}": v for k, v in source.state_dict().items()} | {"module.fc.weight": torch.zeros(3, 3)}
    torch.save({"state_dict": wrapped}, tmp_path / "weights.pth")
    net = ResNet("resnet18")
    load_weights(net, "resnet18", str(tmp_path / "weights.pth"))
    said = capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), source.state_dict().values()))
    assert "1 skipped (fc.weight)" in said and "0 missing" in said
    with pytest.raises(UserError, match="missing or differ in shape"):
        load_matching(ResNet("resnet34"), wrapped, "weights.pth", lambda _: None)
    with pytest.raises(UserError, match="no such file"):
        load_weights(net, "resnet18", str(tmp_path / "other.pth"))
    before = [p.clone() for p in net.parameters()]
    load_weights(net, "resnet18", "none")
    assert all(map(torch.equal, before, net.parameters()))


def test_imagenet_weights_come_from_torchvision(monkeypatch):
    """The download itself is faked: a state dict with torchvision's names, classifier included."""
    theirs = torchvision.models.resnet18()
    asked = {}

    class Weights:
        def get_state_dict(self, **words):
            asked.update(words)
            return theirs.state_dict()
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: type("W", (), {"IMAGENET1K_V1": Weights()}))
    net = ResNet("resnet18")
    load_weights(net, "resnet18", "imagenet", lambda _: None)
    assert torch.equal(net.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight) and asked["check_hash"]

    class Offline:
        def get_state_dict(self, **words):
            raise OSError("no route to host")
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: type("W", (), {"IMAGENET1K_V1": Offline()}))
    with pytest.raises(UserError, match="--weights none"):
        load_weights(net, "resnet18", "imagenet")


def coordinates(height, width):
    """An image whose pixels are their own coordinates, and a mask that says the same."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return transforms.to_tensors(np.stack([y, x, y + x], 2), y * 7 % 200 + x % 50)


def aligned(image, mask):
    inside = mask != 255
    y, x = image[0][inside].long(), image[1][inside].long()
    return torch.equal((y * 7 % 200 + x % 50), mask[inside].long())


def test_crop_flip_shift_keep_image_and_mask_together():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image, mask = coordinates(20, 30)
        image, mask = transforms.random_crop(image, mask, (12, 17), rng)
        image, mask = transforms.random_flip(*transforms.random_shift(image, mask, 5, rng), rng)
        assert image.shape == (3, 12, 17) and mask.shape == (12, 17) and aligned(image, mask)


def test_pad_is_zero_and_ignore_after_normalisation():
    image, mask = coordinates(5, 6)
    padded, labels = transforms.pad_to(transforms.normalise(image), mask, (8, 8))
    assert padded.shape == (3, 8, 8) and (padded[:, 5:] == 0).all() and (padded[:, :, 6:] == 0).all()
    assert (labels[5:] == 255).all() and (labels[:, 6:] == 255).all() and torch.equal(labels[:5, :6], mask)
    assert np.array_equal(transforms.denormalise(padded)[:5, :6], image.permute(1, 2, 0).numpy())
    value = (torch.tensor(100.0) / 255 - 0.485) / 0.229
    assert transforms.normalise(torch.full((3, 1, 1), 100, dtype=torch.uint8))[0, 0, 0] == pytest.approx(float(value))


def test_resize_agrees_with_pillow_on_masks():
    _, mask = coordinates(21, 35)
    for size in ((10, 17), (42, 70), (21, 20)):
        ours = transforms.resize(torch.zeros(3, 21, 35, dtype=torch.uint8), mask, size)[1]
        theirs = Image.fromarray(mask.numpy()).resize(size[::-1], Image.NEAREST)
        assert np.array_equal(ours.numpy(), np.array(theirs))
    image, mask = transforms.resize_long_side(torch.zeros(3, 50, 100, dtype=torch.uint8), None, 60)
    assert image.shape == (3, 30, 60) and mask is None


class Numbers:
    """A split whose image i is filled with i."""

    def __len__(self):
        return 7

    def image(self, i):
        return np.full((4, 4, 3), i, np.uint8)

    def mask(self, i):
        return np.full((4, 4), i, np.uint8)


class NoMask(Numbers):
    def mask(self, i):
        raise AssertionError("an unlabelled stream opened a mask")


def noisy(image, mask, rng):
    image, mask = transforms.to_tensors(image, mask)
    return image + rng.random(), mask


def test_stream_is_a_function_of_seed_name_and_position():
    stream = Stream(Numbers(), [0, 2, 4, 6], noisy, 5, "labelled", True)
    epochs = [[stream.index(p) for p in range(e * 4, e * 4 + 4)] for e in range(6)]
    assert all(sorted(epoch) == [0, 2, 4, 6] for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    again = Stream(Numbers(), [0, 2, 4, 6], noisy, 5, "labelled", True)
    for p in (13, 2, 7):
        assert torch.equal(stream[p][0], again[p][0]) and stream[p][1].dtype == torch.int64
    twin = Stream(Numbers(), [0, 2, 4, 6], noisy, 5, "unlabelled", True)
    assert all(not torch.equal(stream[p][0] % 1, twin[p][0] % 1) for p in range(8))  # other random numbers
    assert isinstance(Stream(NoMask(), [1], noisy, 0, "u", False)[0], torch.Tensor)


def test_loader_resumes_and_shares_out_over_processes_and_workers():
    ctx, stream = Runtime("cpu"), Stream(Numbers(), range(7), noisy, 0, "u", False)

    def batches(start, workers, count, batch=4, rank=0, world=1):
        ctx.rank, ctx.world = rank, world
        iterator = endless(stream, batch, start, workers, ctx)
        return [next(iterator) for _ in range(count)]
    whole = batches(0, 0, 5)
    assert all(map(torch.equal, whole[3:], batches(3, 2, 2)))
    halves = [batches(0, 0, 5, 2, rank, 2) for rank in (0, 1)]
    assert all(torch.equal(torch.cat(pair), one) for pair, one in zip(zip(*halves), whole))
    assert whole[0].is_contiguous(memory_format=torch.channels_last)
    assert list(zip(range(2), Steps(3, 2, 1, 2))) == [(0, [14, 15]), (1, [18, 19])]


def test_evaluation_shards_hold_each_image_once():
    ctx, seen = Runtime("cpu"), []
    ctx.world = 3
    for ctx.rank in range(3):
        scored = Scored(Numbers(), lambda image, mask, rng: transforms.to_tensors(image, mask), ctx)
        seen += [int(y[0, 0, 0]) for _, y in once(scored, 1, 0, ctx)]
    assert sorted(seen) == list(range(7))


def test_random_rows_do_not_depend_on_the_number_of_processes():
    one = Random((1, "x", 2)).uniform(6, 3)
    shares = [Random((1, "x", 2), rank=rank, world=3).uniform(2, 3) for rank in range(3)]
    assert torch.equal(torch.cat(shares), one) and not torch.equal(one, Random((1, "x", 3)).uniform(6, 3))
    assert torch.equal(Random((0,), rank=1, world=2).shared(4), Random((0,)).shared(4))
    assert len({mix(0, "a", k) for k in range(1000)}) == 1000 and mix(1, 23) != mix(12, 3)


def test_poly_set_lr_and_ema():
    assert poly(0, 100) == 1 and poly(100, 100) == 0 and poly(50, 100) == pytest.approx(0.535887, abs=1e-6)
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([dict(params=[a], lr_mult=0.1), dict(params=[b])], 1.0)
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.5]
    teacher, student = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(student.weight, 3.0)
    student.running_mean += 7
    for _ in range(4):
        update_ema(teacher, student, 0.9)
    assert torch.allclose(teacher.weight, torch.full((2,), 3 + (1 - 3) * 0.9 ** 4)) and (teacher.running_mean == 7).all()
    student.running_mean += 1
    student.num_batches_tracked += 5
    update_ema(teacher, student, 0.9, buffers="keep")
    assert (teacher.running_mean == 7).all() and teacher.num_batches_tracked == 0
    update_ema(teacher, student, 0.9, buffers="ema")
    assert torch.allclose(teacher.running_mean, torch.full((2,), 7.1)) and teacher.num_batches_tracked == 5


def test_global_mean_of_nothing_is_zero_with_a_graph():
    ctx, x = Runtime("cpu"), torch.ones(3, requires_grad=True)
    loss = ctx.global_mean((x * 0).sum(), torch.zeros((), dtype=torch.int64))
    loss.backward()
    assert loss == 0 and torch.equal(x.grad, torch.zeros(3))
    assert ctx.global_mean(x.sum(), torch.tensor(2)) == 1.5


def test_checkpoint_refuses_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("never",)
    torch.save(dict(x=Evil()), tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt"):
        checkpoint.load(tmp_path / "evil.pt")


def test_shapes_are_the_same_everywhere_and_hold_every_class():
    data = open_shapes()
    again = draw(np.random.default_rng([1, len("train")]))
    assert np.array_equal(data.train.image(0), again[0]) and np.array_equal(data.train.mask(0), again[1])
    assert len(data.classes) == 9 == len(CLASSES) and set(np.unique(data.train.masks)) == set(range(9))
    share = np.bincount(data.val.masks.ravel(), minlength=9) / data.val.masks.size
    assert share[0] < 0.85 and share[1:].min() > 0.005
    assert data.train.keys == sorted(data.train.keys) and not set(data.train.keys) & set(data.val.keys)
    data.train.image(0)[:] = 0  # a caller may write into what it got
    assert data.train.image(0).any()
