"""Mean intersection over union: a confusion matrix that stays on the device until the end."""
import torch
import torch.distributed as dist

from common.transforms import IGNORE


class ConfusionMatrix:
    """Counts of (true class, predicted class) over all scored pixels of a split.

    matrix: int64 [C, C] on the device, rows = truth, columns = prediction. All images are pooled;
    IoUs are never averaged over images. A class in neither truth nor predictions has no IoU (NaN)
    and is left out of the mean; one that is predicted but never true scores 0.
    """

    def __init__(self, num_classes, device):
        self.num_classes = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction, target):
        """Add pixels: integer tensors of one shape, on the matrix's device, of 0..C-1; target 255
        is ignored. Nothing here waits for the device, as a boolean index or bincount would."""
        counts = target != IGNORE
        pair = (target.long() * self.num_classes + prediction).where(counts, 0).flatten()
        self.matrix.view(-1).scatter_add_(0, pair, counts.flatten().long())

    def reduce(self):
        """Sum over all processes. To be called once, by every process, after the last update."""
        if dist.is_initialized():
            dist.all_reduce(self.matrix)

    def iou(self):
        """Per class, hits / (truth + prediction - hits), 0..1; NaN for an absent class."""
        counts = self.matrix.cpu().double()
        hits = counts.diagonal()
        return (hits / (counts.sum(0) + counts.sum(1) - hits)).tolist()  # 0 / 0 = NaN

    def miou(self):
        """Mean over the classes that have an IoU, 0..1; NaN if nothing was scored."""
        return torch.tensor(self.iou(), dtype=torch.float64).nanmean().item()

    def accuracy(self):
        """Share of the scored pixels whose class is right, 0..1; NaN if nothing was scored."""
        counts = self.matrix.cpu().double()
        return (counts.trace() / counts.sum()).item()

    def table(self, names):
        """Per class IoU (nan: absent) and share of the true pixels, in percent; then the means."""
        ious = self.iou()
        truth = self.matrix.sum(1)
        width = max(len(name) for name in [*names, "mean of 000 classes"])
        lines = [f"{'class':{width}}   IoU %  pixels %"]
        for name, iou, share in zip(names, ious, (truth / truth.sum()).tolist(), strict=True):
            lines.append(f"{name:{width}}  {100 * iou:6.2f}  {100 * share:8.2f}")
        present = f"mean of {sum(iou >= 0 for iou in ious)} classes"  # nan >= 0 is false
        lines.append(f"{present:{width}}  {100 * self.miou():6.2f}")
        lines.append(f"{'pixel accuracy':{width}}  {100 * self.accuracy():6.2f}")
        return "\n".join(lines)
