"""ROC curves of scores per image and class, and the areas under them; used by s4gan_mlmt.py."""
import math

import torch
import torch.nn.functional as F

from common.pictures import line_plot


def roc(score, truth):
    """One point per distinct threshold, from (0, 0) on: -> (fpr, tpr, area under the curve)

    score [N], truth [N] of 0 and 1. All NaN if all or none are true.
    """
    order = score.argsort(descending=True)
    score = score[order]
    truth = truth[order].double()
    ends_group = torch.ones(len(score), dtype=torch.bool)  # of equal scores, which pass together
    ends_group[:-1] = score[1:] != score[:-1]
    tp = F.pad(truth.cumsum(0)[ends_group], (1, 0))
    fp = F.pad((1 - truth).cumsum(0)[ends_group], (1, 0))
    tpr = tp / tp[-1]
    fpr = fp / fp[-1]
    return fpr, tpr, torch.trapezoid(tpr, fpr).item()


def auc(scores, truth):
    """Areas for scores, truth [N, C]: -> (macro, micro, (fpr, tpr) of the latter)

    macro: mean over the classes; those that all or no images have are left out. micro: of all
    (image, class) pairs pooled. NaN if not defined.
    """
    areas = [roc(score, true)[2] for score, true in zip(scores.T, truth.T)]
    fpr, tpr, micro = roc(scores.flatten(), truth.flatten())
    return torch.tensor(areas, dtype=torch.float64).nanmean().item(), micro, (fpr, tpr)


def in_words(macro, micro):
    """The areas as a line for the user"""
    if math.isnan(macro):
        return ("AUC macro not defined, because every class is in all scored images or in none; "
                f"micro {micro:.4f}")
    return f"AUC macro {macro:.4f}, micro {micro:.4f}"


def roc_picture(fpr, tpr, area, path):
    """Write the curve as a PNG; none where it is not defined."""
    if not math.isnan(area):
        points = torch.stack([fpr, tpr], 1).tolist()
        line_plot([("true positive rate, all classes pooled", {f"AUC {area:.4f}": points})], path,
                  "false positive rate")
