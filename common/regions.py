"""Pixels and connected regions of a batch of masks, on the device."""
import math

import torch
import torch.nn.functional as F


def find_blobs(objects, min_area=64):
    """Bounding boxes of the connected foreground regions (8 neighbours), for a whole batch at once.

    objects: bool [B, H, W]. -> (box, valid): box int64 [4, B*H*W] = y0, x0, y1, x1 (inclusive),
    valid bool [B*H*W]. A region's entry stands at the index of its first pixel in row order; all
    other entries are not valid. Algorithm: union-find on all pixels in parallel. A round hooks the
    trees of neighbouring pixels together and halves the paths to the roots; the number of rounds,
    about log2(pixels), is fixed, so that the host never waits for the device.
    """
    b, height, width = objects.shape
    n = objects.numel()
    device = objects.device
    index = torch.arange(n, device=device)
    parent = index.clone()
    inside = objects.flatten()
    for _ in range(2 + math.ceil(math.log2(height * width))):
        root = parent[parent]
        grid = torch.where(inside, root, n).view(b, height, width)
        lowest = F.pad(grid, (1, 1, 1, 1), value=n)
        rows = torch.minimum(lowest[:, :-2], lowest[:, 2:])
        lowest = torch.minimum(rows, lowest[:, 1:-1])
        columns = torch.minimum(lowest[..., :-2], lowest[..., 2:])
        lowest = torch.minimum(columns, lowest[..., 1:-1]).flatten()
        lowest = torch.where(inside, lowest, index)  # lowest root among the 3 x 3 pixels
        parent = parent.scatter_reduce(0, parent, lowest, "amin")  # hook my parent's tree,
        parent = torch.minimum(torch.minimum(parent, lowest), root)  # myself, and shorten the path
    root = torch.where(inside, parent[parent], index)
    place = torch.stack([index % (height * width) // width, index % width])  # y, x
    root_twice = root.expand(2, n)
    first = place.scatter_reduce(1, root_twice, place, "amin")
    last = torch.full((2, n), -1, device=device).scatter_reduce(1, root_twice, place, "amax")
    area = torch.zeros(n, dtype=torch.int64, device=device).scatter_add(0, root, inside.long())
    return torch.cat([first, last]), (area >= min_area) & (root == index)


def random_rectangles(blobs, u, share, shape):
    """Is a pixel inside a random rectangle in the box of one of the blobs? -> bool [B, H, W]

    blobs: from find_blobs on [B, H, W], the `shape`. u: U[0, 1), [2, B*H*W], where in the box of a
    blob its rectangle is; share: of each side of the box. All are painted at once: with +1 and -1
    at their corners, cumulative sums over rows and columns count those that cover a pixel.
    """
    box, valid = blobs
    b, height, width = shape
    side = box[2:] - box[:2]
    room = (side * (1 - share)).long() + 1
    start = box[:2] + (u * room).long()
    top, left = start
    bottom, right = start + (side * share).long()
    y = torch.stack([top, top, bottom, bottom])
    x = torch.stack([left, right, left, right])
    one = valid.int()
    sign = torch.stack([one, -one, -one, one])
    sample = torch.arange(b, device=u.device).repeat_interleave(height * width)
    at = (sample * (height + 1) + y) * (width + 1) + x
    corners = torch.zeros(b * (height + 1) * (width + 1), dtype=torch.int32, device=u.device)
    corners.index_add_(0, at.flatten().clamp(0, len(corners) - 1), sign.flatten())
    covers = corners.view(b, height + 1, width + 1).cumsum(1).cumsum(2)
    return covers[:, :-1, :-1] > 0


def count_pixels(ids, num_classes):
    """Pixels of each class in each mask: int64 [B, H, W], 255 ignored -> int64 [B, C]."""
    counts = torch.zeros(len(ids), 256, dtype=torch.int64, device=ids.device)
    ids = ids.flatten(1)
    return counts.scatter_add_(1, ids, torch.ones_like(ids))[:, :num_classes]
