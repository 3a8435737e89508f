"""Connected regions of a batch of masks, on the device."""
import math

import torch
import torch.nn.functional as F


def find_blobs(objects, min_area=64):
    """Bounding boxes of the connected foreground regions (8 neighbours), for a whole batch at once.

    objects: bool [B, H, W]. -> (box, valid): box int64 [4, B*H*W] = y0, x0, y1, x1 (inclusive), valid bool [B*H*W].
    A region's entry stands at the index of its first pixel in row order; all other entries are not valid.
    Labels spread by hooking trees of pixels onto their neighbours' roots and halving the paths, which needs about
    log(pixels) rounds, a fixed number of them, so that the device never waits for the host.
    """
    b, height, width = objects.shape
    n, device = objects.numel(), objects.device
    index = torch.arange(n, device=device)
    parent, outside = index.clone(), n
    inside = objects.flatten()
    for _ in range(2 + math.ceil(math.log2(height * width))):
        root = parent[parent]
        grid = torch.where(inside, root, outside).view(b, height, width)
        lowest = F.pad(grid, (1, 1, 1, 1), value=outside)
        lowest = torch.minimum(torch.minimum(lowest[:, :-2], lowest[:, 1:-1]), lowest[:, 2:])
        lowest = torch.minimum(torch.minimum(lowest[..., :-2], lowest[..., 1:-1]), lowest[..., 2:]).flatten()
        lowest = torch.where(inside, lowest, index)  # lowest root among the 3 x 3 pixels
        parent = parent.scatter_reduce(0, parent, lowest, "amin")  # hook my parent's tree,
        parent = torch.minimum(torch.minimum(parent, lowest), root)  # myself, and shorten the path
    root = torch.where(inside, parent[parent], index)
    y, x = index % (height * width) // width, index % width
    first, last = torch.stack([y, x]), torch.full((2, n), -1, device=device)
    first = first.scatter_reduce(1, root.expand(2, n), first, "amin")
    last = last.scatter_reduce(1, root.expand(2, n), torch.stack([y, x]), "amax")
    area = torch.zeros(n, dtype=torch.int64, device=device).scatter_add(0, root, inside.long())
    return torch.cat([first, last]), (area >= min_area) & (root == index)
