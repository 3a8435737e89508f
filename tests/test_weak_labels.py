"""Class activation maps, pseudo-labels, maps of the cluster assumption, each against a slow version."""
import contextlib
import types
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CTX, batch_of, normal
from PIL import Image

from common import cam
from common.crf import dense_crf, unary_of_labels
from common.datasets import open_dataset
from common.datasets.pseudo import PseudoLabelled
from common.datasets.voc import voc_palette
from common.pictures import save_mask
from common.random import mix
from common.settings import UserError
from common.smoothness import neighbour_distance, smoothness_picture
from common.streams import Stream
from common.transforms import to_tensors


def net(pretrained=True):
    torch.manual_seed(0)
    return cam.CamNet("resnet18", 4, 5, pretrained)


def test_classifier_is_the_mean_of_its_maps_without_their_relu():
    network = net().eval()
    x = normal(0, 2, 3, 64, 96)
    features = network.body(x)
    assert features.shape == (2, 512, 4, 6)  # stride 16
    weights = network.classifier.weight[:, :, 0, 0]
    torch.testing.assert_close(network(x), features.mean((2, 3)) @ weights.T)
    torch.testing.assert_close(network.maps(x), torch.einsum("bdhw,cd->bchw", features, weights).clamp(min=0))


@pytest.mark.parametrize("pretrained", [True, False])
def test_pretrained_layers_that_do_not_learn(pretrained):
    network = net(pretrained).train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network(normal(0, 2, 3, 64, 64)).sum().backward()
    learning = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"body.layer4.1.conv2.weight", "body.layer4.1.bn2.weight", "classifier.weight"} <= learning
    parts = ("body.conv1", "body.bn1", "body.layer1", "body.layer2")
    early = [name for name in learning if name.startswith(parts)]
    assert bool(early) != pretrained
    moved = any(not torch.equal(before[name], buffer) for name, buffer in network.named_buffers())
    assert moved != pretrained


class Images(list):
    """20 images and their tags"""
    image = list.__getitem__

    def mask(self, i):
        return np.arange(6) % 3 == i % 3


def test_two_steps_of_the_classifier_equal_plain_pytorch(tmp_path):
    """SGD without momentum on the binary cross-entropy of the objects' tags; the last layer's rate is tenfold."""
    images = Images(np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8))
    objects = [1, 2, 3, 5]
    cfg = types.SimpleNamespace(weak_epochs=1, weak_lr=0.05, weights="none", backbone="resnet18", backbone_layers=3,
                                stem="7x7", seed=3, workers=0, save_every=9, compile=False)
    log = types.SimpleNamespace(waiting=contextlib.nullcontext, **dict.fromkeys(("add", "curves", "close"), Mock()))
    part = types.SimpleNamespace(path=tmp_path / "weak", is_new=True, resume=Mock(return_value=0), log=log,
                                 stop_if_asked=Mock(), save=Mock())
    data = types.SimpleNamespace(train=images, name="clouds")

    def plain(image, tags, rng):
        return to_tensors(image, None)[0], tags if tags is None else torch.from_numpy(tags[objects])
    trained = cam.train_classifier(data, images, objects, plain, part, cfg, CTX)
    torch.manual_seed(mix(3, "init", "weak"))
    network = cam.CamNet("resnet18", 3, 4, pretrained=False).train()
    stream = Stream(images, range(20), plain, 3, "weak", True)
    for step in range(2):
        x, t = batch_of(stream, step, 16)
        p = network(x).sigmoid()
        loss = -torch.where(t, p, 1 - p).log().mean()
        names, parameters = zip(*network.named_parameters())
        for name, w, gradient in zip(names, parameters, torch.autograd.grad(loss, parameters)):
            rate = 0.05 * (1 - step / 2) ** 0.9 * (10 if name == "classifier.weight" else 1)
            w.data -= rate * (gradient + 1e-4 * w.data)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_activation_maps_sum_scales_and_mirror_images_of_the_present_classes():
    network = net().eval()
    x = normal(1, 1, 3, 48, 64)
    total = torch.zeros(48, 64)
    for size in ((48, 64), (24, 32), (72, 96), (96, 128)):
        scaled = F.interpolate(x, size, mode="bilinear", align_corners=False)
        for image, mirrored in ((scaled, False), (scaled.flip(3), True)):
            one = network.maps(image)[:, 3:4]
            one = one.flip(3) if mirrored else one
            total += F.interpolate(one, (48, 64), mode="bilinear", align_corners=False)[0, 0]
    maps = cam.activation_maps(network, x, torch.tensor([1, 3]))
    torch.testing.assert_close(maps[1], total / (total.max() + 1e-5), rtol=1e-4, atol=1e-5)
    nothing = cam.activation_maps(network, x, torch.tensor([]).long())
    assert maps.shape == (2, 48, 64) and nothing.shape == (0, 48, 64)


def test_thresholds_divide_into_classes_background_and_ignored():
    maps = torch.tensor([[[0.9, 0.2, 0.04, 0.31, 0.0]], [[0.1, 0.25, 0.01, 0.32, 0.06]]])
    label = cam.pseudo_label(maps, torch.tensor([7, 4]), 2, (0.05, 0.3))
    assert label.tolist() == [[7, 255, 2, 4, 255]] and label.dtype == torch.uint8
    assert cam.pseudo_label(maps, torch.tensor([7, 4]), 255, (0.05, 0.3)).tolist() == [[7, 255, 255, 4, 255]]
    nothing = cam.pseudo_label(maps[:0], torch.tensor([]).long(), 2, (0.05, 0.3), torch.zeros(1, 5, 3).byte())
    assert nothing.tolist() == [[2] * 5]


def test_each_threshold_is_refined_by_the_crf_alone():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 40, (24, 32, 3), dtype=np.uint8))
    image[:, 16:] += 180
    maps = torch.from_numpy(rng.random((2, 24, 32))).float() * 0.3
    maps[0, :, 16:] += 0.4
    refined = []
    for threshold in (0.05, 0.3):
        labels = torch.cat([torch.full((1, 24, 32), threshold), maps]).argmax(0)
        refined.append(dense_crf(image, unary_of_labels(labels, 3, 0.7)).argmax(0))
    low, high = refined
    expected = torch.full((24, 32), 255)
    expected[low == 0] = 0
    for k, c in ((1, 7), (2, 4)):
        expected[high == k] = c
    label = cam.pseudo_label(maps, torch.tensor([7, 4]), 0, (0.05, 0.3), image)
    assert torch.equal(label.long(), expected) and (label[:, 18:] == 7).float().mean() > 0.9


@pytest.fixture
def pseudo(folder_data, tmp_path):
    return PseudoLabelled(open_dataset("folder", folder_data), tmp_path)


def test_writing_goes_on_where_it_was_and_says_what_went_wrong(pseudo):
    written = []

    def make(i):
        if i == 4:
            raise UserError("broken")
        written.append(i)
        save_mask(pseudo.split.mask(i), voc_palette()[:4], pseudo.path(i))
    with pytest.raises(UserError, match="broken"):
        pseudo.write(make, [1, 2, 4], 1, CTX)
    assert sorted(written) == [1, 2] and (pseudo.folder / "train/img2.png").exists()
    pseudo.write(make, [1, 2, 3, 5], 2, CTX)
    assert sorted(written) == [1, 2, 3, 5]
    assert np.array_equal(pseudo.mask(5), pseudo.split.mask(5))


def test_comparison_counts_the_pixels_that_have_a_label(pseudo):
    """Of image 0 the upper half is right, of image 2 a quarter is wrong; image 7 has no mask."""
    right, wrong = (pseudo.split.mask(i).astype(int) for i in (0, 2))
    right[32:] = 255
    wrong = (wrong + 1) % 4
    wrong[20:] = 255
    for i, label in ((0, right), (2, wrong), (7, right)):
        pseudo.path(i).parent.mkdir(exist_ok=True)
        save_mask(label, voc_palette()[:4], pseudo.path(i))
    confusion, share, rows = pseudo.compare([0, 2, 7], CTX)
    counts = [((label != 255) & (pseudo.split.mask(i) != 255)).sum() for i, label in ((0, right), (2, wrong))]
    assert confusion.accuracy() == pytest.approx(counts[0] / sum(counts))
    assert share == pytest.approx(((right != 255).mean() + 1 / 4) / 2)
    assert len(rows) == 2 and np.array_equal(rows[1][2], pseudo.mask(2))


# ---- Fig. 2, 7

@pytest.mark.parametrize("patch", [1, 3, 4])
def test_neighbour_distance(patch):
    x = normal(2, 1, 70, 7, 9)  # more than one part of the channels
    distance = neighbour_distance(x, (7, 9), patch)
    before = patch // 2
    padded = np.pad(x[0].double().numpy(), ((0, 0), (9, 9), (9, 9)), mode="edge")
    for i, j in ((3, 4), (3, 5)):  # whose patches and neighbours lie inside
        def cut(dy, dx):
            y, x = 9 + i + dy - before, 9 + j + dx - before
            return padded[:, y:y + patch, x:x + patch]
        far = [np.linalg.norm(cut(0, 0) - cut(dy, dx)) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
        assert distance[i, j].item() == pytest.approx(np.mean(far), rel=1e-5)


def test_picture_is_dark_at_the_boundary_of_two_colours():
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, 32:] = 200
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    picture = smoothness_picture(image, x, F.avg_pool2d(x, 8))
    assert picture.shape == (48, 3 * 64, 3) and np.array_equal(picture[:, :64], image)
    for k in (1, 2):
        row = picture[24, 64 * k:64 * (k + 1), 0].astype(int)
        assert row[28:36].min() == 0 and row[:8].min() == 255 and row[-8:].min() == 255


def test_pseudo_labels_are_of_the_tags_alone(tmp_path):
    pseudo = types.SimpleNamespace(path=lambda i: tmp_path / f"{i}.png")
    tags = types.SimpleNamespace(image=lambda i: np.zeros((20, 24, 3), np.uint8),
                                 mask=lambda i: np.array([True, False, True, True]))
    cfg = types.SimpleNamespace(size=None, crf=False, background=(0,), thresholds=(0.05, 0.3))
    network = cam.CamNet("resnet18", 2, 3, False).eval()
    cam.write_pseudo_label(7, network, pseudo, tags, [1, 2, 3], voc_palette()[:4], cfg, CTX)
    assert set(np.unique(Image.open(tmp_path / "7.png"))) <= {0, 2, 3, 255}
