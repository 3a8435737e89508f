"""Mean-field inference in the fully connected CRF; imports torch alone, made to be copied.

Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
Potentials", NIPS 2011. Every pixel i, of position p_i and colour I_i, is joined with every other:

    E(x) = sum_i psi_u(x_i) + sum_{i < j} [x_i != x_j] k(f_i, f_j)                  (Eq. 1, 2)
    k(f_i, f_j) = w1 exp(-|p_i - p_j|^2 / (2 s_xy^2) - |I_i - I_j|^2 / (2 s_rgb^2))
                + w2 exp(-|p_i - p_j|^2 / (2 s_gamma^2))                               (Eq. 3)

As in the authors' C++ code, each kernel's matrix K becomes D^-1/2 K D^-1/2 with D = diag(K 1),
and the sum over all pixels contains the pixel itself, which the paper leaves out.
"""
import math

import torch
import torch.nn.functional as F


def unary_of_labels(labels, num_classes, certainty=0.7):
    """psi_u = -log p of a labelling that is right with probability certainty, in (0, 1).

    labels: int64 [H, W] in 0..C-1. -> float [C, H, W]: p = certainty at the pixel's label, and
    (1 - certainty) / (C - 1) at each of the others.
    """
    other = -math.log((1 - certainty) / max(num_classes - 1, 1))
    unary = torch.full((num_classes, *labels.shape), other, device=labels.device)
    return unary.scatter_(0, labels[None], -math.log(certainty))


@torch.no_grad()
def dense_crf(image, unary, iterations=10, gaussian=(3.0, 3.0), bilateral=(50.0, 5.0, 10.0)):
    """Algorithm 1 with the Potts model: -> Q float [C, H, W], the pixels' class probabilities.

    Q_i(l) <- softmax over l of -psi_u(l) + sum_m w_m sum_j K_m[i, j] Q_j(l). The paper subtracts
    the sums of all labels but l; adding the sum of l instead changes all labels alike.
    image: uint8 [H, W, 3]. unary: float [C, H, W], -log probabilities. gaussian: s_gamma in
    pixels, w2. bilateral: s_xy in pixels, s_rgb in grey levels of 0..255, w1. All s > 0.
    """
    _, height, width = unary.shape
    if image.shape != (height, width, 3):
        raise ValueError(f"image {list(image.shape)}, but unary asks for [{height}, {width}, 3]")
    s_gamma, w2 = gaussian
    s_xy, s_rgb, w1 = bilateral
    features = bilateral_features(image, s_xy, s_rgb)
    alike = Lattice(features)
    near = Lattice(features[:, :2] * (s_xy / s_gamma))
    score = -unary.float().flatten(1).T.contiguous()  # [H * W, C]
    q = score.softmax(1)
    for _ in range(iterations):
        q = (score + w1 * alike.filter(q) + w2 * near.filter(q)).softmax(1)
    return q.T.reshape(unary.shape)


def weighted_sums(rows, index, weights, start=None):
    """sum_k weights[n, k] rows[index[n, k]]: rows [M, C], index and weights [N, K] -> [N, C].

    With start [N], index and weights are flat, and the n-th sum's part of them begins at start[n].
    In one pass; rows[index] would write [N, K, C] first, and take many times as long.
    """
    return F.embedding_bag(index, rows, start, mode="sum", per_sample_weights=weights)


def bilateral_features(image, s_xy, s_rgb):
    """x, y, red, green, blue in units of their sigmas: uint8 [H, W, 3] -> float64 [H * W, 5]"""
    height, width, _ = image.shape
    y = torch.arange(height, device=image.device).repeat_interleave(width)
    x = torch.arange(width, device=image.device).repeat(height)
    colours = image.reshape(-1, 3).double()
    return torch.cat([torch.stack([x, y], 1) / s_xy, colours / s_rgb], 1)


class Lattice:
    """The normalised kernel exp(-|f_i - f_j|^2 / 2) of points f [N, d], approximately.

    Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice",
    Eurographics 2010: splat each value onto the d + 1 corners of the simplex that its point is in,
    blur by (1/2, 1, 1/2) along the lattice's d + 1 directions in turn, and slice: read each point
    with the weights of its splat. Lattice points that are no simplex's corner count as zero.
    The directions are v_1 .. v_d, a basis, and v_1 + .. + v_d. In coordinates u of that basis the
    lattice is Z^d. The corners around u: floor(u), then plus the v_i of u's largest fraction, then
    plus that of the second largest, and so on.
    Like the authors' code, whose lattice this is up to rounding, it is not exact. For photographs
    of 128 x 96 and the defaults above, filtered values are off by 3 to 5 % (rms), and after ten
    iterations 1 to 3 % of noisy labels are other than with exact sums. K is symmetric to 2 to 6 %
    only, since blurs do not commute next to lattice points that are missing.
    """

    def __init__(self, features):
        n, d = features.shape
        device = features.device
        u = features.double() @ self.basis(d).to(device)
        cell = u.floor()
        fraction, order = (u - cell).sort(1, descending=True)
        path = F.pad(F.pad(fraction, (1, 0), value=1.0), (0, 1))  # 1, fractions, 0
        self.weights = (path[:, :-1] - path[:, 1:]).float()  # [N, d + 1], barycentric

        # Lattice points are numbered like the pixels of a d-dimensional image, so a step along v_i
        # adds steps[i]. Each line ends with a number for no point: no step leads into the next one.
        lowest = cell.amin(0)
        sizes = [int(size) for size in (cell.amax(0) - lowest + 3).tolist()]
        if math.prod(sizes) >= 2 ** 63:
            raise ValueError(f"sigmas too small: {sizes} lattice points are more than int64 counts")
        steps = torch.tensor([math.prod(sizes[i + 1:]) for i in range(d)], device=device)
        first = ((cell - lowest).long() * steps).sum(1, keepdim=True)
        number = torch.cat([first, first + steps[order].cumsum(1)], 1)  # [N, d + 1]

        number, entry = number.flatten().sort(stable=True)
        points, rank, count = number.unique_consecutive(return_inverse=True, return_counts=True)
        self.corners = torch.empty_like(rank).scatter_(0, entry, rank).view(n, d + 1)
        self.members = entry // (d + 1)  # the points around lattice point 0, around 1, ..
        self.member_weights = self.weights.flatten()[entry]
        self.start = count.cumsum(0) - count
        self.blurs = [self.neighbours(points, step) for step in [*steps, steps.sum()]]
        self.norm = torch.ones(n, 1, device=device)
        self.norm = self.filter(self.norm).rsqrt()  # D^-1/2

    @staticmethod
    def basis(d):
        """[d, d]: features @ basis = u, scaled so that splat, blur and slice have variance 1.

        Derivation: rotate the features into the hyperplane of R^(d+1) whose coordinates add up to
        0, multiply them by sqrt(2 / 3) (d + 1); there v_i has -d at place i and 1 elsewhere.
        """
        i = torch.arange(1.0, d + 1, dtype=torch.float64)
        hyperplane = torch.ones(d + 1, d, dtype=torch.float64).triu()
        hyperplane[1:] -= torch.diag(i)
        hyperplane *= math.sqrt(2 / 3) * (d + 1) / (i * (i + 1)).sqrt()
        return (hyperplane[-1] - hyperplane[:-1]).T / (d + 1)

    @staticmethod
    def neighbours(points, step):
        """Index and weights, [points, 3], of the blur along one direction"""
        line = torch.stack([points, points - step, points + step], 1)
        index = torch.searchsorted(points, line).clamp(max=len(points) - 1)
        exists = points[index] == line
        return index, exists * torch.tensor([1.0, 0.5, 0.5], device=points.device)

    def filter(self, values):
        """[N, C] -> [N, C]"""
        lattice = weighted_sums(self.norm * values, self.members, self.member_weights, self.start)
        for index, weights in self.blurs:
            lattice = weighted_sums(lattice, index, weights)
        return self.norm * weighted_sums(lattice, self.corners, self.weights)
