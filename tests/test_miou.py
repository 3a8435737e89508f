"""The confusion matrix against brute force and hand numbers."""
import math

import pytest
import torch

from common.miou import ConfusionMatrix


def scored(prediction, target, classes):
    confusion = ConfusionMatrix(classes, "cpu")
    confusion.update(prediction, target)
    return confusion


def test_hand_numbers():
    # truth 0: two right, one called 1; truth 1: one right, one called 2; class 3 nowhere
    target = torch.tensor([0, 0, 0, 1, 1, 255, 255])
    prediction = torch.tensor([0, 0, 1, 1, 2, 0, 3])
    confusion = scored(prediction, target, 4)
    assert confusion.matrix.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert confusion.iou() == pytest.approx([2 / 3, 1 / 3, 0.0, math.nan], nan_ok=True)
    assert confusion.miou() == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert confusion.accuracy() == pytest.approx(3 / 5)


def test_ids_of_masks_do_not_overflow_and_batches_add_up():
    ids = torch.arange(21, dtype=torch.uint8)  # 20 * 21 does not fit
    confusion = scored(ids, ids, 21)
    confusion.update(ids[1:], ids[:-1])
    assert confusion.matrix.tolist() == (torch.eye(21) + torch.eye(21, 21).roll(1, 1).triu()).tolist()


def test_nothing_scored_is_nan():
    confusion = scored(torch.zeros(4, dtype=torch.long), torch.full((4,), 255), 3)
    assert all(math.isnan(x) for x in [*confusion.iou(), confusion.miou(), confusion.accuracy()])


def test_the_table_has_every_class_and_the_means():
    confusion = scored(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 255]), 3)
    words = [line.split() for line in confusion.table(["sky", "road", "tree"]).splitlines()[1:]]
    assert words == [["sky", "75.00", "75.00"], ["road", "0.00", "25.00"], ["tree", "nan", "0.00"],
                     ["mean", "of", "2", "classes", "37.50"], ["pixel", "accuracy", "75.00"]]
