"""The confusion matrix against brute force and hand numbers, alone and summed over two processes."""
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


def same(a, b):
    return len(a) == len(b) and all(x == pytest.approx(y, nan_ok=True) for x, y in zip(a, b))


def test_equals_a_loop_over_pixels():
    prediction, target = random_maps(0, 5)
    matrix = [[0] * 5 for _ in range(5)]
    for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist()):
        if t != 255:
            matrix[t][p] += 1
    ious = []
    pixels = [(p, t) for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist()) if t != 255]
    for c in range(5):
        both, either = sum(p == t == c for p, t in pixels), sum(c in (p, t) for p, t in pixels)
        ious.append(both / either if either else math.nan)
    confusion = scored(prediction, target, 5)
    assert confusion.matrix.tolist() == matrix and confusion.matrix.dtype == torch.int64
    assert same(confusion.iou(), ious) and math.isnan(ious[4])
    assert confusion.miou() == pytest.approx(sum(ious[:4]) / 4)


def test_hand_numbers():
    # truth 0: two right, one called 1; truth 1: one right, one called 2 (never true); class 3 nowhere
    target = torch.tensor([0, 0, 0, 1, 1, 255, 255])
    prediction = torch.tensor([0, 0, 1, 1, 2, 0, 3])
    confusion = scored(prediction, target, 4)
    assert confusion.matrix.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert same(confusion.iou(), [2 / 3, 1 / 3, 0.0, math.nan])
    assert confusion.miou() == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert confusion.accuracy() == pytest.approx(3 / 5)


def test_updates_add_up_and_take_any_integer_type():
    (p1, t1), (p2, t2) = random_maps(1, 21), random_maps(2, 21, (40, 50))
    confusion = scored(p1.to(torch.uint8), t1.to(torch.uint8), 21)  # 20 * 21 + 20 overflows uint8
    confusion.update(p2.int(), t2.to(torch.uint8))
    whole = scored(torch.cat([p1.flatten(), p2.flatten()]), torch.cat([t1.flatten(), t2.flatten()]), 21)
    assert torch.equal(confusion.matrix, whole.matrix)


def test_nothing_scored_is_nan():
    confusion = scored(torch.zeros(4, dtype=torch.long), torch.full((4,), 255), 3)
    assert math.isnan(confusion.miou()) and math.isnan(confusion.accuracy())
    assert all(math.isnan(iou) for iou in confusion.iou())
    assert "mean of 0 classes" in confusion.table(["a", "b", "c"])


@pytest.mark.parametrize("prediction, target", [(0, 3), (0, -1), (0, 254), (3, 0), (-1, 1)])
def test_an_illegal_id_is_reported_and_touches_no_other_count(prediction, target):
    confusion = scored(torch.tensor([0, 1, prediction]), torch.tensor([0, 1, target]), 3)
    assert confusion.matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    for read in (confusion.iou, confusion.miou, confusion.accuracy, lambda: confusion.table("abc")):
        with pytest.raises(ValueError, match=r"1 pixels .* neither 0\.\.2"):
            read()


def test_an_illegal_prediction_under_255_does_not_matter():
    assert scored(torch.tensor([0, 99]), torch.tensor([0, 255]), 3).accuracy() == 1


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        scored(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, dtype=torch.long), 3)


def test_update_reads_no_value_on_the_host():
    # tensors on the meta device have no values, so that whatever asks for one fails
    ids = torch.zeros(4, 4, dtype=torch.long, device="meta")
    for waits in (lambda: ids[ids != 255], lambda: bool(ids.max() > 3), lambda: ids.sum().item()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            waits()
    confusion = ConfusionMatrix(5, "meta")
    confusion.update(ids, ids)
    assert confusion.matrix.shape == (5, 5)


def test_table():
    target, prediction = torch.tensor([0, 0, 0, 1, 255]), torch.tensor([0, 0, 0, 0, 1])
    lines = scored(prediction, target, 3).table(["sky", "a long name", "tree"]).split("\n")
    assert [line.split() for line in lines] == [
        ["class", "IoU", "%", "pixels", "%"], ["sky", "75.00", "75.00"],
        ["a", "long", "name", "0.00", "25.00"], ["tree", "-", "0.00"],
        ["mean", "of", "2", "classes", "37.50"], ["pixel", "accuracy", "75.00"]]
    ends = {line.index(iou) + len(iou) for line, iou in zip(lines[1:], ["75.00", "0.00", "-", "37.50"])}
    assert len(ends) == 1  # the IoUs stand one below the other
    with pytest.raises(ValueError):
        scored(prediction, target, 3).table(["one name too few", "b"])


def _count_a_half(rank, address, folder):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    prediction, target = random_maps(7, 6, (5, 8))
    confusion = ConfusionMatrix(6, "cpu")
    confusion.update(prediction[rank::2], target[rank::2])  # 3 rows and 2 rows: unequal shares
    confusion.reduce()
    torch.save(confusion.matrix.clone(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_count_as_one(tmp_path):
    torch.multiprocessing.spawn(_count_a_half, (f"file://{tmp_path}/store", str(tmp_path)), nprocs=2)
    alone = scored(*random_maps(7, 6, (5, 8)), 6)
    alone.reduce()  # one process: changes nothing
    assert alone.matrix.sum() == (random_maps(7, 6, (5, 8))[1] != 255).sum()
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), alone.matrix)
