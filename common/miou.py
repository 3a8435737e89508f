"""Mean intersection over union: a confusion matrix that stays on the device until the end."""
import math

import torch
import torch.distributed as dist


class ConfusionMatrix:
    """Counts of (true class, predicted class) over all scored pixels of a split.

    matrix: int64 [C, C] on the device, rows = truth, columns = prediction.

    All images' pixels are pooled first; IoUs are never averaged over images. A class that is neither in the
    truth nor in any prediction has no IoU (NaN) and is left out of the mean. One that is predicted but never
    true scores 0 and counts: leaving it out would reward a network for inventing it.
    """

    def __init__(self, num_classes, device):
        self.num_classes = num_classes
        # C * C pairs, then two bins of pixels that are no pair: truth 255, and ids that are no class
        self._bins = torch.zeros(num_classes ** 2 + 2, dtype=torch.int64, device=device)

    @property
    def matrix(self):
        return self._bins[:-2].view(self.num_classes, self.num_classes)

    def update(self, prediction, target):
        """Add pixels: integer tensors of equal shape, on the matrix's device. Target 255 is ignored.

        Reads no value on the host, hence no boolean indexing and no bincount, which both wait for the device.
        Ids outside 0..C-1 (but for target 255) are therefore only counted here: reading a score then raises.
        A prediction is an argmax over C channels, so only a target can go wrong that way.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"a prediction of shape {tuple(prediction.shape)} does not fit "
                             f"a target of shape {tuple(target.shape)}")
        c, prediction, target = self.num_classes, prediction.long(), target.long()
        legal = (target >= 0) & (target < c) & (prediction >= 0) & (prediction < c)
        bins = torch.where(legal, target * c + prediction, c * c + 1)
        bins = torch.where(target == 255, c * c, bins).flatten()
        self._bins.scatter_add_(0, bins, torch.ones_like(bins))

    def reduce(self):
        """Sum over all processes. To be called once, by every process, after the last update."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._bins)

    def _read(self):
        """The matrix on the host, float64. ValueError if an id that is no class was counted."""
        *pairs, _, illegal = self._bins.tolist()
        if illegal:
            raise ValueError(f"{illegal} pixels have an id that is neither 0..{self.num_classes - 1} nor, in "
                             "the truth, 255: is the number of classes right?")
        return torch.tensor(pairs, dtype=torch.float64).view(self.num_classes, self.num_classes)

    def iou(self):
        """Per class, hits / (truth + prediction - hits), 0..1; NaN for an absent class."""
        counts = self._read()
        hit = counts.diagonal()
        return (hit / (counts.sum(0) + counts.sum(1) - hit)).tolist()  # 0 / 0 = NaN

    def miou(self):
        """Mean over the classes that have an IoU (see above), 0..1; NaN if nothing was scored."""
        present = [value for value in self.iou() if not math.isnan(value)]
        return sum(present) / len(present) if present else math.nan

    def accuracy(self):
        """Share of the scored pixels whose class is right, 0..1; NaN if nothing was scored."""
        counts = self._read()
        return (counts.trace() / counts.sum()).item()

    def table(self, names):
        """Per class its IoU in percent ('-' if absent) and its share of the true pixels; the means below."""
        truth = self._read().sum(1)
        shares = [f"{100 * share:.2f}" for share in (truth / truth.sum().clamp(min=1)).tolist()]
        rows = list(zip(names, self.iou(), shares, strict=True))
        scored = sum(not math.isnan(value) for _, value, _ in rows)
        rows += [(f"mean of {scored} classes", self.miou(), ""), ("pixel accuracy", self.accuracy(), "")]
        cells = [("class", "IoU %", "pixels %")]
        cells += [(name, "-" if math.isnan(iou) else f"{100 * iou:.2f}", share) for name, iou, share in rows]
        width = max(len(name) for name, _, _ in cells)
        return "\n".join(f"{name:<{width}}  {iou:>6}  {share:>8}".rstrip() for name, iou, share in cells)
