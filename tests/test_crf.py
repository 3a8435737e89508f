"""The fully connected CRF against exact sums over all pairs of pixels, and by hand."""
import math

import pytest
import torch
import torch.nn.functional as F

from common.crf import Lattice, bilateral_features, dense_crf, unary_of_labels


def smooth_image(seed, height, width):
    """A few random colours that run into each other, and a little noise: uint8 [H, W, 3]"""
    generator = torch.Generator().manual_seed(seed)
    colours = 255 * torch.rand(1, 3, 4, 5, generator=generator)
    image = F.interpolate(colours, (height, width), mode="bilinear", align_corners=True)[0]
    image = image + 2 * torch.randn(image.shape, generator=generator)
    return image.clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0)


def noisy_labels(image, classes, seed=0):
    """Labels by brightness, a sixth of them drawn at random: int64 [H, W] of 0..classes-1"""
    generator = torch.Generator().manual_seed(seed)
    labels = image.long().sum(2) * classes // 766
    drawn = torch.randint(0, classes, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < 1 / 6, drawn, labels)


def positions(height, width):
    """x, y of every pixel in row order: float64 [H * W, 2]"""
    return torch.tensor([[x, y] for y in range(height) for x in range(width)], dtype=torch.float64)


def exact_kernel(features):
    """exp(-|f_i - f_j|^2 / 2) of all pairs of points [N, d], normalised: [N, N]"""
    kernel = torch.empty(len(features), len(features), dtype=torch.float64)
    for i, point in enumerate(features):
        kernel[i] = torch.exp(-((features - point) ** 2).sum(1) / 2)
    norm = 1 / kernel.sum(1).sqrt()
    return (norm[:, None] * kernel * norm).float()


def exact_crf(unary, kernels, iterations):
    """Algorithm 1 with kernels of all pairs, [(weight, [N, N])], and the Potts model written out"""
    unary = unary.flatten(1)
    potts = 1 - torch.eye(len(unary))
    q = torch.exp(-unary) / torch.exp(-unary).sum(0)
    for _ in range(iterations):
        energy = unary.clone()
        for weight, kernel in kernels:
            energy += weight * potts @ (q @ kernel.T)
        energy -= energy.amin(0)
        q = torch.exp(-energy) / torch.exp(-energy).sum(0)
    return q


def test_unary_by_hand():
    unary = unary_of_labels(torch.tensor([[0, 2], [1, 0]]), 3, certainty=0.6)
    expected = [[[0.6, 0.2], [0.2, 0.6]], [[0.2, 0.2], [0.6, 0.2]], [[0.2, 0.6], [0.2, 0.2]]]
    assert torch.allclose(torch.exp(-unary), torch.tensor(expected))
    of_voc = unary_of_labels(torch.tensor([[20]]), 21).flatten().tolist()
    assert of_voc == pytest.approx(20 * [-math.log(0.3 / 20)] + [-math.log(0.7)])


def test_features_by_hand():
    image = torch.arange(18, dtype=torch.uint8).view(2, 3, 3) * 14  # the last grey level is 238
    features = bilateral_features(image, 4.0, 7.0).tolist()
    assert features == [[0, 0, 0, 2, 4], [0.25, 0, 6, 8, 10], [0.5, 0, 12, 14, 16],
                        [0, 0.25, 18, 20, 22], [0.25, 0.25, 24, 26, 28], [0.5, 0.25, 30, 32, 34]]


@pytest.mark.parametrize("s_xy, s_rgb, off", [(50.0, 5.0, 0.1), (8.0, 40.0, 0.06)])
def test_the_lattice_of_an_image_against_the_exact_sum(s_xy, s_rgb, off):
    image = smooth_image(0, 30, 36)
    features = bilateral_features(image, s_xy, s_rgb)
    values = F.one_hot(noisy_labels(image, 5).flatten(), 5).float()
    exact = exact_kernel(features) @ values
    assert (Lattice(features).filter(values) - exact).norm() < off * exact.norm()


@pytest.mark.parametrize("d, far", [(2, 3000.0), (5, 3000.0), (5, -3000.0)])
def test_a_point_far_away_changes_nothing_here(d, far):
    u = 4 * torch.rand(500, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = torch.cat([u, torch.full((1, d), far)]) @ Lattice.basis(d).inverse()
    values = torch.eye(501)
    here = Lattice(points[:-1]).filter(values[:-1, :-1])  # the lattice points fill their box
    assert torch.allclose(Lattice(points).filter(values)[:-1, :-1], here, atol=1e-6)


def test_too_many_lattice_points_to_number_are_refused():
    image = smooth_image(0, 4, 5)
    with pytest.raises(ValueError, match="sigmas too small"):
        dense_crf(image, unary_of_labels(noisy_labels(image, 2), 2), bilateral=(1e-4, 1e-4, 1.0))


@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_the_steps_are_those_of_algorithm_1(iterations):
    image = smooth_image(1, 12, 17)
    unary = unary_of_labels(noisy_labels(image, 4), 4)
    lattices = Lattice(positions(12, 17) / 2.0), Lattice(bilateral_features(image, 9.0, 20.0))
    kernels = [(w, lattice.filter(torch.eye(12 * 17))) for w, lattice in zip((0.7, 1.1), lattices)]
    q = dense_crf(image, unary, iterations, gaussian=(2.0, 0.7), bilateral=(9.0, 20.0, 1.1))
    assert torch.allclose(q.flatten(1), exact_crf(unary, kernels, iterations), rtol=0, atol=1e-5)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (9, 1), (2, 3), (40, 2)])
def test_small_and_plain_images(height, width):
    plain = torch.full((height, width, 3), 128, dtype=torch.uint8)
    labels = torch.arange(height * width).view(height, width) % 3
    kernels = [(1.0, exact_kernel(positions(height, width) / 3)),
               (1.0, exact_kernel(positions(height, width) / 9))]  # all colours are the same
    unary = unary_of_labels(labels, 3)
    q = dense_crf(plain, unary, 5, gaussian=(3.0, 1.0), bilateral=(9.0, 5.0, 1.0))
    assert q.shape == (3, height, width)
    assert torch.allclose(q.flatten(1), exact_crf(unary, kernels, 5), rtol=0, atol=0.02)
    of_one_class = unary_of_labels(0 * labels, 1)
    assert torch.equal(dense_crf(plain, of_one_class), torch.ones(1, height, width))


def test_an_image_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[5, 4, 3\].* \[4, 5, 3\]"):
        dense_crf(torch.zeros(5, 4, 3, dtype=torch.uint8), torch.zeros(2, 4, 5))


def test_two_calls_are_bit_equal_and_leave_their_arguments_alone():
    image = smooth_image(2, 60, 70)
    unary = unary_of_labels(noisy_labels(image, 6), 6).requires_grad_()
    before = image.clone(), unary.detach().clone()
    q = dense_crf(image, unary)
    assert torch.equal(q, dense_crf(image, unary, 10, (3.0, 3.0), (50.0, 5.0, 10.0)))  # the defaults
    assert torch.equal(image, before[0]) and torch.equal(unary, before[1])
    assert not q.requires_grad
