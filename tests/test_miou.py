"""The confusion matrix against brute force and hand numbers, alone and over two processes."""
import math

import pytest
import torch
import torch.distributed as dist

from common.miou import ConfusionMatrix


def random_maps(seed, classes, shape=(3, 7, 9)):
    """Predictions 0..classes-2 and targets 0..classes-2 or 255: the last class is absent."""
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(0, classes - 1, shape, generator=generator)
    target = torch.randint(0, classes - 1, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.2] = 255
    return prediction, target


def scored(prediction, target, classes):
    confusion = ConfusionMatrix(classes, "cpu")
    confusion.update(prediction, target)
    return confusion


def test_equals_a_loop_over_pixels():
    prediction, target = random_maps(0, 21)  # 20 * 21 overflows the uint8 of masks
    confusion = ConfusionMatrix(21, "cpu")
    for p, t in zip(prediction, target):
        confusion.update(p.to(torch.uint8), t.to(torch.uint8))
    pairs = zip(prediction.flatten().tolist(), target.flatten().tolist())
    pixels = [(p, t) for p, t in pairs if t != 255]
    ious = []
    for c in range(20):
        both = sum(p == t == c for p, t in pixels)
        ious.append(both / sum(c in pair for pair in pixels))
    assert confusion.iou() == pytest.approx([*ious, math.nan], nan_ok=True)
    assert confusion.miou() == pytest.approx(sum(ious) / 20)


def test_hand_numbers():
    # truth 0: two right, one called 1; truth 1: one right, one called 2; class 3 nowhere
    target = torch.tensor([0, 0, 0, 1, 1, 255, 255])
    prediction = torch.tensor([0, 0, 1, 1, 2, 0, 3])
    confusion = scored(prediction, target, 4)
    assert confusion.matrix.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert confusion.iou() == pytest.approx([2 / 3, 1 / 3, 0.0, math.nan], nan_ok=True)
    assert confusion.miou() == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert confusion.accuracy() == pytest.approx(3 / 5)


def test_nothing_scored_is_nan():
    confusion = scored(torch.zeros(4, dtype=torch.long), torch.full((4,), 255), 3)
    assert all(math.isnan(x) for x in [*confusion.iou(), confusion.miou(), confusion.accuracy()])


@pytest.mark.parametrize("prediction, target", [(0, 3), (0, -1), (3, 0), (-1, 1)])
def test_an_illegal_id_is_reported_and_touches_no_other_count(prediction, target):
    confusion = scored(torch.tensor([0, 1, prediction]), torch.tensor([0, 1, target]), 3)
    assert confusion.matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"1 pixels .* neither a class 0\.\.2"):
        confusion.miou()


def test_the_table_has_every_class_and_the_means():
    confusion = scored(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 255]), 3)
    words = [line.split() for line in confusion.table(["sky", "road", "tree"]).splitlines()[1:]]
    assert words == [["sky", "75.00", "75.00"], ["road", "0.00", "25.00"], ["tree", "nan", "0.00"],
                     ["mean", "of", "2", "classes", "37.50"], ["pixel", "accuracy", "75.00"]]


def _count_a_half(rank, address, folder):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    prediction, target = random_maps(7, 6, (5, 8))
    confusion = scored(prediction[rank::2], target[rank::2], 6)  # 3 rows and 2 rows
    confusion.reduce()
    torch.save(confusion.matrix, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_count_as_one(tmp_path):
    arguments = (f"file://{tmp_path}/store", str(tmp_path))
    torch.multiprocessing.spawn(_count_a_half, arguments, nprocs=2)
    alone = scored(*random_maps(7, 6, (5, 8)), 6)
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), alone.matrix)
