"""cct.py against the paper: each piece versus a slow, obvious version, or numbers worked out by hand."""
import copy
import dataclasses
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CTX, column, count, normal
from scipy import ndimage

import cct
import s4gan_mlmt
import three_stage
from common.command_line import parse
from common.datasets.masks import SegmentationData, Split
from common.datasets.shapes import open_shapes
from common.random import Random
from common.regions import find_blobs
from common.schedules import RAMPS, momentum_sgd, poly, ramp, set_lr
from common.vat import unit

C, CHANNELS, SIDE = 5, 16, 8  # classes, channels of z, and z's height and width in most tests


def config(**values):
    small = dict(backbone="resnet18", backbone_layers=2, weights="none", steps=1000,
                 backbone_lr_mult=0.1, device="cpu", precision="fp32", workers=0)
    return cct.Config(**{**small, **values})


def features(b=2, seed=0):
    """z >= 0 with large smooth regions, so that the decoders see blobs, and with some exact zeros"""
    coarse = F.interpolate(normal(seed, b, CHANNELS, 3, 3), (SIDE, SIDE), mode="bilinear")
    return F.relu(coarse + 0.2 * normal(seed + 1, b, CHANNELS, SIDE, SIDE))


def lively_decoder():
    """At initialisation many logits are dead."""
    decoder = cct.Decoder(CHANNELS, C)
    for seed, parameter in enumerate(decoder.parameters()):
        parameter.data = 0.4 * normal(seed, *parameter.shape) + 0.5 * (parameter.dim() == 1)
    return decoder


def small_net():
    torch.manual_seed(0)
    return cct.Segmenter(config(), [C])


def norms(r):
    return r.flatten(1).norm(dim=1).tolist()


# ---- network

def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        cfg = cct.Config()
        net, auxiliary = cct.Segmenter(cfg, [21]), cct.Auxiliary(cfg, 512, 21)
    assert count(net.encoder.backbone) == 23_508_032
    assert count(net.encoder.psp, net.decoders, auxiliary) == 23_578_968
    assert count(cct.Discriminator(512, 2)) == 1_845_186  # Table 8
    assert {name: auxiliary.names.count(name) for name in auxiliary.names} == dict(
        i_vat=2, dropout=6, g_cutout=6, con_msk=2, obj_msk=2, f_drop=6, f_noise=6)


def test_optimizer_holds_every_parameter_once_at_its_rate():
    net = small_net()
    auxiliaries = torch.nn.ModuleList([cct.Auxiliary(config(k=1), 128, C)])
    discriminator = cct.Discriminator(128, 2)
    heads = torch.nn.ModuleList([net.decoders, auxiliaries, discriminator])
    optimizer = cct.make_optimizer(net, heads, config())
    set_lr(optimizer, 0.01 * poly(500, 1000))
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    others = [p for module in (auxiliaries, discriminator) for p in module.parameters()]
    expected = dict.fromkeys([*net.parameters(), *others], 0.00535887)
    expected |= dict.fromkeys(net.encoder.backbone.parameters(), 0.000535887)
    assert rates == pytest.approx(expected, rel=1e-5)


def test_momentum_begins_with_zeros():
    """Torch's own buffers are not initialised if fp16's scaler skips the first step."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = momentum_sgd([dict(params=[p])], 0.1, 0.5)
    assert optimizer.state[p]["momentum_buffer"].tolist() == [0, 0, 0]


def test_decoder_has_the_layers_of_table_11():
    decoder = lively_decoder()
    x = F.conv2d(features(), decoder.adapt.weight)
    for conv in decoder.subpixel:
        before_relu = F.conv2d(x, conv.weight, conv.bias)
        x = F.pixel_shuffle(F.relu(before_relu), 2)
    torch.testing.assert_close(decoder(features()), x)
    decoder.last_relu = False
    torch.testing.assert_close(decoder(features()), F.pixel_shuffle(before_relu, 2))


def test_icnr_starts_as_nearest_upsampling():
    decoder = cct.Decoder(CHANNELS, 64)
    assert decoder.subpixel[0].weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    for conv in decoder.subpixel:
        torch.nn.init.zeros_(conv.bias)
    cells = decoder(features()).unfold(2, 8, 8).unfold(3, 8, 8)
    assert cells.std() > 0
    assert torch.equal(cells, cells[..., :1, :1].expand_as(cells))


def test_identity_initialisation_is_nearest_upsampling():
    torch.manual_seed(0)
    decoder = cct.Decoder(CHANNELS, C, scratch=True)
    logits = decoder.adapt(features()).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert -4 < logits.min() < 0  # a plain ReLU would have cut these
    torch.testing.assert_close(decoder(features()).softmax(1), logits.softmax(1))


@pytest.mark.parametrize("size, mode", [((37, 50), "reflect"), ((5, 9), "edge"), ((16, 24), "edge")])
def test_predict_keeps_any_size(size, mode):
    net = small_net().eval()
    x = normal(0, 2, 3, *size)
    bottom_right = [(0, 0), (0, 0), (0, -size[0] % 8), (0, -size[1] % 8)]
    padded = torch.from_numpy(np.pad(x.numpy(), bottom_right, mode=mode))
    whole = net.decoders[0](net.encoder.psp(net.encoder.backbone(padded)))
    logits = cct.predict(net, x, 0, config(), CTX)
    torch.testing.assert_close(logits, whole[:, :, :size[0], :size[1]])


def test_multi_scale_averages_five_scales_and_their_mirror_images():
    net = small_net().eval()
    x = normal(0, 1, 3, 16, 36)
    total = 0
    for size in ((8, 18), (12, 27), (16, 36), (20, 45), (24, 54)):
        scaled = F.interpolate(x, size, mode="bilinear", align_corners=False)
        for logits in (net(scaled), net(scaled.flip(3)).flip(3)):
            total = total + F.interpolate(logits, (16, 36), mode="bilinear", align_corners=True)
    torch.testing.assert_close(cct.predict(net, x, 0, config(multi_scale=True), CTX), total / 10)


# ---- losses and ramps

def pixels(logits, y):
    """(probability of the true class, cross-entropy) of every valid pixel, in float64"""
    log_p = logits.double().log_softmax(1)
    values = [log_p[b, y[b, i, j], i, j] for b, i, j in np.ndindex(*y.shape) if y[b, i, j] != 255]
    return [(value.exp(), -value) for value in values]


def naive_cross_entropy(logits, y, eta=None):
    """Eq. 1, or Eq. 4 if there is an eta"""
    every = sorted(pixels(logits, y), key=lambda pixel: pixel[0].item())
    if eta is not None and every:
        floor = every[min(len(y), len(every) - 1)][0]  # the (B+1)-th smallest probability
        every = [(p, loss) for p, loss in every if p < max(eta, floor)]
    losses = [loss for _, loss in every]
    return sum(losses) / len(losses) if losses else 0 * logits.sum()


@pytest.mark.parametrize("valid", [0, 1, 3, 28])
def test_eq1_eq4_cross_entropy(valid):
    logits = (2 * normal(0, 3, C, 4, 5)).requires_grad_()
    y = torch.randint(0, C, (3, 4, 5), generator=torch.Generator().manual_seed(1))
    y.view(-1)[torch.randperm(60, generator=torch.Generator().manual_seed(2))[valid:]] = 255
    losses = []
    for script in (cct, three_stage, s4gan_mlmt):  # Eq. 1 of CCT and s4GAN, 2 and 3 of Three-Stage
        losses.append((script.cross_entropy(logits, y), naive_cross_entropy(logits, y)))
        tenth = script.cross_entropy(logits, y, 10)  # by a number that is given
        assert tenth.item() == pytest.approx(losses[-1][1].item() * valid / 10, rel=1e-5)
    for eta in (0.0, 0.3, 1.0):
        hard = cct.without_easy_pixels(logits, y, eta)
        losses.append((cct.cross_entropy(logits, hard), naive_cross_entropy(logits, y, eta)))
    for loss, expected in losses:
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        gradient, = torch.autograd.grad(loss, logits)
        expected_gradient, = torch.autograd.grad(expected, logits, retain_graph=True)
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("kind, by_hand", [
    ("mse", 2 / 16 + 1 / 4), ("kl", math.log(2)),
    ("js", math.log(4 / 3) / 2 + (math.log(2 / 3) / 2 + math.log(2) / 2) / 2)])  # m = 3/8, 3/8, 2/8
def test_eq7_eq8_eq9_distances_and_their_gradients(kind, by_hand):
    p = torch.tensor([0.5, 0.5, 0.0]).view(1, 3, 1, 1)
    q = torch.tensor([0.25, 0.25, 0.5]).view(1, 3, 1, 1)
    assert 3 * cct.distance(kind, p, q.log()).item() == pytest.approx(by_hand)
    logits = torch.tensor([[[[0.0, 3.0]], [[1.0, 0.0]], [[0.5, 0.0]]]], requires_grad=True)
    p = torch.tensor([[[[0.0, 0.0]], [[150.0, 1.0]], [[0.0, 200.0]]]]).softmax(1).double()
    assert (p == 0).sum() == 4  # a main decoder that is very sure: probabilities underflow
    gradient, = torch.autograd.grad(3 * cct.distance(kind, p.float(), logits).sum(), logits)
    q = logits.detach().double().softmax(1)
    slope = {"mse": 2 * (q - p), "kl": -p / q, "js": (2 * q / (p + q)).log() / 2}[kind]  # d/dq
    torch.testing.assert_close(gradient, (q * (slope - (q * slope).sum(1))).float())


def test_fig8_ramps():
    fig8 = {"gaussian": (0.0067, 0.0601, 0.2865, 0.7316, 1),
            "exp": (0.0067, 0.0235, 0.0821, 0.2865, 1),
            "log": (0, 0.7135, 0.9179, 0.9765, 0.9933),
            "linear": (0, 0.25, 0.5, 0.75, 1),
            "cosine": (0, 0.1464, 0.5, 0.8536, 1)}
    assert set(fig8) == set(RAMPS)
    for shape, values in fig8.items():
        assert [ramp(shape, t, 400) for t in range(0, 401, 100)] == pytest.approx(values, abs=5.1e-5)
        assert ramp(shape, 1000, 400) == ramp(shape, 400, 400)
        assert ramp(shape, 0, 0) == 1


def test_eq16_ramped_weight_and_eq17_eta():
    cfg = cct.Config(steps=45600, ramp="exp")
    weights = [cct.ramped_weight(cfg.lambda_u, t, cfg) for t in (0, 2280, 4560, 45599)]
    assert weights == pytest.approx([0.20214, 2.4625, 30, 30], abs=5e-5)
    cfg = cct.Config(steps=72960)  # 80 epochs of 912
    values = [cct.eta(t, cfg, 21) for t in (0, 14592, 29184)]
    assert values == pytest.approx([0.04762, 0.83003, 0.89426], abs=5e-6)
    assert 0.8999 < cct.eta(72960, cfg, 21) < 0.9  # Eq. 17 does not stop at T
    sooner = cct.Config(steps=72960, eta_length=0.2)
    assert cct.eta(7296, sooner, 21) == pytest.approx((1 - math.exp(-2.5)) * (0.9 - 1 / 21) + 1 / 21)


# ---- perturbations

def test_f_noise_is_one_for_the_batch():
    noise = 0.6 * Random((1,)).shared(1, CHANNELS, SIDE, SIDE) - 0.3  # U(-0.3, 0.3)
    torch.testing.assert_close(cct.f_noise(features(), Random((1,))), features() * noise + features())


def test_f_drop_zeroes_the_most_active_cells():
    z = features(3, seed=4)
    for seed in range(8):
        out = cct.f_drop(z, Random((seed,)))
        gamma = 0.6 + 0.3 * Random((seed,)).shared(1).item()  # one for the batch
        for b, i, j in np.ndindex(3, SIDE, SIDE):
            activity = z[b].double().sum(0)
            keep = bool(activity[i, j] / activity.max() < gamma)
            assert torch.equal(out[b, :, i, j], z[b, :, i, j] * keep)
    assert torch.equal(cct.f_drop(0 * z, Random((0,))), 0 * z)


def test_dropout_takes_whole_channels():
    z = features(8)
    out = cct.dropout(z, Random(("d",)), 0.2)
    u = Random(("d",)).uniform(8, CHANNELS)
    for b, channel in np.ndindex(8, CHANNELS):
        expected = z[b, channel] / 0.8 if u[b, channel] >= 0.2 else torch.zeros(SIDE, SIDE)
        torch.testing.assert_close(out[b, channel], expected)


def test_guided_masks_split_z_by_every_8th_pixel():
    z = 1 + features()
    objects = normal(3, 2, 8 * SIDE, 8 * SIDE) > 0
    kept_objects = cct.con_msk(z, objects)
    for b, i, j in np.ndindex(2, SIDE, SIDE):
        assert torch.equal(kept_objects[b, :, i, j], z[b, :, i, j] * objects[b, 8 * i, 8 * j])
    assert torch.equal(kept_objects + cct.obj_msk(z, objects), z)


def slow_blobs(mask, min_area):
    """(first pixel, y0, x0, y1, x1) of every region of a mask [H, W] that is large enough"""
    regions, _ = ndimage.label(mask, np.ones((3, 3)))
    for label, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
        region = regions == label
        if region.sum() >= min_area:
            yield region.argmax(), rows.start, columns.start, rows.stop - 1, columns.stop - 1


@pytest.mark.parametrize("min_area", [1, 64])
def test_find_blobs(min_area):
    density = np.array([0.02, 0.407, 0.407, 0.8])  # 0.407: percolation, the most tangled regions
    masks = np.random.default_rng(0).random((6, 97, 87)) < np.append(density, [0, 1])[:, None, None]
    y, x = np.mgrid[-48:49, -43:44]
    masks[4] = (np.hypot(y, x) / 2 - np.arctan2(y, x) * 2 / np.pi) % 4 < 2  # a spiral
    expected = []
    for b, mask in enumerate(masks):
        expected += [[b * mask.size + first, *box] for first, *box in slow_blobs(mask, min_area)]
    box, valid = find_blobs(torch.from_numpy(masks), min_area)
    found = valid.nonzero()[:, 0]
    assert torch.cat([found[None], box[:, found]]).T.tolist() == sorted(expected)


def slow_g_cutout(z, objects, u):
    """Hides 0.4 of both sides of each box; u [B, 2, pixels], at its first pixel, says where."""
    out = z.clone()
    for b, mask in enumerate(objects.numpy()):
        hidden = np.zeros(mask.shape, bool)
        for first, y0, x0, y1, x1 in slow_blobs(mask, 64):
            top = y0 + int(u[b, 0, first] * ((y1 - y0) * 6 // 10 + 1))
            left = x0 + int(u[b, 1, first] * ((x1 - x0) * 6 // 10 + 1))
            hidden[top:top + (y1 - y0) * 4 // 10, left:left + (x1 - x0) * 4 // 10] = True
        out[b, :, hidden[::8, ::8]] = 0
    return out


def test_g_cutout_hides_a_rectangle_in_every_object():
    z = torch.ones(2, 3, 12, 15)
    for seed in range(40):
        coarse = normal(seed, 2, 1, 3 + seed % 8, 7)
        objects = F.interpolate(coarse, (96, 120), mode="bilinear")[:, 0] > 0.4
        out = cct.g_cutout(z, find_blobs(objects), Random((seed,)))
        assert torch.equal(out, slow_g_cutout(z, objects, Random((seed,)).uniform(2, 2, 96 * 120)))
        assert 0 < out.mean() < 1


@pytest.mark.parametrize("xi", [0.1, 10.0])  # with so long a step it matters which way round the KL is
def test_eq13_eq14_eq15_adversarial(xi):
    decoder = lively_decoder()
    z = features(3, seed=2).requires_grad_()
    r, p = cct.adversarial(z, decoder, Random(("vat",)), xi=xi, eps=2.0)
    assert torch.equal(p, decoder(z).softmax(1))
    perturbed_z = cct.i_vat(z, decoder, Random(("vat",)), xi)
    assert torch.equal(perturbed_z, z + r) and perturbed_z.requires_grad
    assert norms(r) == pytest.approx([2, 2, 2], abs=1e-4)
    assert not r.requires_grad and not p.requires_grad
    assert {p.grad for p in decoder.parameters()} == {None} and z.grad is None
    drawn = Random(("vat",)).normal(3, CHANNELS, SIDE, SIDE).double()
    start = F.normalize(drawn, dim=(1, 2, 3)).requires_grad_()  # Eq. 13
    log_q = decoder.double()(z.detach().double() + xi * start).log_softmax(1)
    gradient, = torch.autograd.grad((p.double() * (p.double().log() - log_q)).sum(), start)
    assert (F.cosine_similarity(r.double().flatten(1), gradient.flatten(1)) > 0.9999).all()


def test_i_vat_survives_tiny_and_absent_gradients_and_is_inert_as_released():
    decoder = lively_decoder()
    assert norms(unit(1e-30 * features())) == pytest.approx([1, 1])  # its square is 0 in float32
    dead, _ = cct.adversarial(features(), lambda z: 0 * decoder(z), Random((1,)))
    assert not dead.any()
    released, _ = cct.adversarial(features(), decoder, Random((1,)), released=True)
    assert max(norms(released)) < 0.05


def test_i_vat_turns_tf32_off_and_leaves_it_as_it_was():
    seen = []

    def logits_of(z):
        seen.append(torch.backends.cudnn.allow_tf32)
        return z
    before = torch.backends.cudnn.allow_tf32
    cct.adversarial(features(), logits_of, Random((1,)))
    assert before and seen == [False, False] and torch.backends.cudnn.allow_tf32 == before


# ---- the training step: Eq. 2, 3, 10, who gets which gradient, and the baselines of Table 4

@pytest.fixture
def trained(scaled, monkeypatch, tmp_path):
    """A function that runs cct.train on six tiny images of each domain, 3 of them labelled, and tells of it:
    the networks before the first step, its gradients, which the momentum is after it, and every checkpoint"""
    def run(ignored=False, domains=(C,), **values):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        short = dict(batch=4, k=1, steps=1, labeled="3", ramp_length=0.0, lambda_u=20.0, weight_decay=0.0,
                     log_every=1, save_every=1)
        cfg = config(**{**short, **values}, out=str(folder))
        states = []
        record = types.SimpleNamespace(cfg=cfg, folder=folder, states=states)
        rng = np.random.default_rng(0)
        datasets = {}
        for number, count in enumerate(domains):
            train = copy.copy(open_shapes().train)
            train.keys = list("abcdef")
            train.images = rng.integers(0, 256, (6, 24, 32, 3), dtype=np.uint8)
            train.masks = rng.integers(0, count, (6, 24, 32), dtype=np.uint8)
            if ignored:
                train.masks[:] = 255
            name = f"domain{number}"
            palette, val = np.zeros((count, 3), np.uint8), Split({}, {}, {})
            datasets[name] = SegmentationData(name, "abcdefg"[:count], palette, train, val, "val")

        def spy(cfg, domains):
            networks = make_networks(cfg, domains)
            record.net, record.auxiliaries, record.discriminator = copy.deepcopy(networks)
            record.domains = domains
            return networks
        make_networks = cct.make_networks
        with monkeypatch.context() as patch:
            patch.setattr(cct, "make_networks", spy)
            patch.setattr("common.domains.open_dataset", lambda name, *_: datasets[name])
            patch.setattr("common.checkpoint.save", lambda _, state: states.append(copy.deepcopy(state)))
            cct.train(cfg, {name: dataclasses.replace(cfg, data=name) for name in datasets})
        record.net.to(memory_format=torch.channels_last)  # as in training, to the last digit
        record.auxiliary = record.auxiliaries[0]
        heads = torch.nn.ModuleList([record.net.decoders, record.auxiliaries, record.discriminator])
        optimizer = cct.make_optimizer(record.net, heads, cfg)
        optimizer.load_state_dict(states[0]["optimizer"])
        record.gradient = {p: optimizer.state[p]["momentum_buffer"] for p in optimizer.state}
        batches_l, batches_u = cct.streams(record.domains[0], 0, CTX)
        record.x_l, record.y_l = next(batches_l)
        record.x_u = next(batches_u)
        return record
    return run


def same_gradient(record, loss):
    """Is the first step's gradient that of `loss`, a function of the networks before it? (The discriminator
    has its own already.)"""
    loss.backward(inputs=[*record.net.parameters(), *record.auxiliaries.parameters()])
    for p, ours in record.gradient.items():
        naive = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(ours, naive, rtol=1e-2, atol=1e-3 * naive.abs().max().item() + 1e-9)


def perturbed(name, z, decoder, objects, rng, cfg):
    arguments = dict(f_noise=(rng, cfg.noise), f_drop=(rng, *cfg.drop_range), dropout=(rng, cfg.dropout),
                     con_msk=(objects,), obj_msk=(objects,),
                     g_cutout=(find_blobs(objects), rng, cfg.cutout),
                     i_vat=(decoder, rng, cfg.vat_xi, cfg.vat_eps))
    return getattr(cct, name)(z, *arguments[name])


def naive_consistency(main, auxiliary, z, cfg):
    """Eq. 2 and Eq. 10 as one graph over all K <= 8 decoders, at step 0. -> (L_u, L_P-Wise, all logits)"""
    p = main(z).detach().softmax(1)
    objects = ~torch.isin(p.argmax(1), torch.tensor(cfg.background))
    logits, distances = [], []
    for k, decoder in enumerate(auxiliary.decoders):
        rng = Random((cfg.seed, "perturb", 0, k))
        logits.append(decoder(perturbed(auxiliary.names[k], z, decoder, objects, rng, cfg)))
        d = cct.distance(cfg.distance, p, logits[k])
        distances.append(d[p.amax(1) > cfg.confidence].mean())
    qs = torch.stack(logits).softmax(2)
    pairwise = ((qs - qs.mean(0)) ** 2).sum(2).mean()  # the mean prediction has its gradient
    return sum(distances) / len(distances), pairwise, logits


@pytest.mark.parametrize("settings", [
    dict(), dict(distance="kl", confidence=0.3, pairwise=0.7),
    dict(distance="js", background=(1, 2), last_relu=False)], ids=str)
def test_step_has_the_gradient_of_the_plain_sum_over_all_decoders(trained, settings):
    record = trained(**settings)
    net = record.net
    loss_s = F.cross_entropy(net(record.x_l), record.y_l, ignore_index=255)
    z = net.encoder(record.x_u)
    loss_u, loss_pairwise, _ = naive_consistency(net.decoders[0], record.auxiliary, z, record.cfg)
    same_gradient(record, loss_s + 20 * loss_u + record.cfg.pairwise * loss_pairwise)
    expected = dict(loss_s=loss_s, loss_u=loss_u)
    if record.cfg.pairwise:
        expected["loss_pairwise"] = loss_pairwise
    for name, value in expected.items():
        assert column(record.folder, name) == {1: pytest.approx(value.item(), rel=1e-4)}


def test_graphs_in_memory_do_not_grow_with_the_number_of_decoders(trained):
    live, peaks = [], []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            live.append(1)
            peaks[-1] = max(peaks[-1], len(live))

        def __del__(self):
            live.pop()

    for k in (1, 4):
        peaks.append(0)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            trained(k=k, pairwise=0.5)
    assert peaks[0] == peaks[1] > 5 and not live


def test_pairwise_loss_takes_eight_random_decoders(trained):
    record = trained(k=2, pairwise=1.0, lambda_u=0.0)
    auxiliary, z = record.auxiliary, record.net.encoder(record.x_u)
    guides = cct.main_prediction(record.net.decoders[0], auxiliary, z, CTX)[1]
    chosen = [cct.pairwise_mean(auxiliary, z, guides, step, record.cfg, CTX)[0] for step in range(4)]
    assert {len(set(numbers)) for numbers in chosen} == {8} and len({*map(frozenset, chosen)}) == 4
    for k, decoder in enumerate(auxiliary.decoders):
        assert any(record.gradient[p].any() for p in decoder.parameters()) == (k in chosen[0])


@pytest.mark.parametrize("ramp_length, decay", [(1.0, 0.99), (0.0, 0.999)])
def test_mean_teacher_step(trained, ramp_length, decay):
    record = trained(method="mean_teacher", ramp_length=ramp_length, ramp="cosine")
    start = [p.detach().clone() for p in record.net.parameters()]
    w_u = 0 if ramp_length else 20
    target = copy.deepcopy(record.net).eval()(record.x_u).softmax(1).detach()
    loss_s = F.cross_entropy(record.net(record.x_l), record.y_l)
    same_gradient(record, loss_s + w_u * F.mse_loss(record.net(record.x_u).softmax(1), target))
    state = record.states[0]
    for (name, _), p in zip(record.net.named_parameters(), start):
        expected = p.lerp(state["net"][name], 1 - decay)
        torch.testing.assert_close(state["teacher"][name], expected, atol=1e-7, rtol=1e-6)


def test_vat_step(trained):
    """Batch normalisation uses the statistics of the passes that find r_adv, but does not keep them."""
    record = trained(method="vat", vat_eps=1.5)
    rng = Random((record.cfg.seed, "vat", 0))
    r, p = cct.adversarial(record.x_u, copy.deepcopy(record.net), rng, 0.1, 1.5)
    loss_s = F.cross_entropy(record.net(record.x_l), record.y_l)
    log_q = record.net(record.x_u + r).log_softmax(1)
    same_gradient(record, loss_s + 20 * (p * (p.log() - log_q)).sum(1).mean() / C)
    for name, buffer in record.net.named_buffers():
        torch.testing.assert_close(record.states[0]["net"][name], buffer)


# ---- domains (Sec. 3.4), their alignment (App. E), weak labels (Sec. 3.3)

def settled(flags):
    return cct.settle(*parse(cct.Config, cct.PRESETS, [*flags.split(), "--out", "x"]))


def test_domains_have_the_settings_of_their_own_presets():
    domains = settled("--data cityscapes+camvid+folder+folder --root a+b+c+d --split e+f+g+h")
    assert list(domains) == ["cityscapes", "camvid", "folder", "folder_4"]
    assert [d.root + d.split for d in domains.values()] == ["ae", "bf", "cg", "dh"]
    assert [d.data for d in domains.values()] == ["cityscapes", "camvid", "folder", "folder"]
    assert [d.size for d in domains.values()] == [(512, 1024), (360, 480), None, None]
    assert [d.long_side for d in domains.values()] == [None, None, 400, 400]
    assert {(d.batch, d.backbone) for d in domains.values()} == {(4, "resnet50")}
    forced = settled("--data camvid+folder --size 64 --labeled 20").values()
    assert {(d.size, d.long_side, d.crop, d.labeled) for d in forced} == {((64, 64), None, None, "20")}
    cropped = settled("--data folder --size 64 --crop 32")["folder"]
    assert (cropped.size, cropped.crop) == ((64, 64), (32, 32))
    table2 = settled("--data cityscapes+camvid --labeled 50+100").values()
    assert [(d.labeled, d.epochs) for d in table2] == [("50", 50), ("100", 50)]
    mixed = settled("--data voc+cityscapes --cache none").values()  # of the second, which has a size
    assert [(d.size, d.cache) for d in mixed] == [(None, "none"), ((512, 1024), "none")]
    both = settled("--data cityscapes+sunrgbd13").values()
    assert [(d.labeled, d.epochs) for d in both] == [("1500", 100), ("1500", 100)]


def test_domains_take_turns_and_the_idle_one_does_not_move(trained):
    record = trained(domains=(C, 3), steps=4, lr=0.1, weight_decay=0.1)
    second = record.net.decoders[1], record.auxiliaries[1].decoders[0]
    assert [decoder.adapt.out_channels for decoder in second] == [3, 3]
    tensors = [{f"{part}.{name}": tensor for part in ("net", "auxiliaries")
                for name, tensor in state[part].items()} for state in record.states]
    for step in (1, 2, 3):
        before, after = tensors[step - 1:step + 1]
        idle = (f"net.decoders.{1 - step % 2}.", f"auxiliaries.{1 - step % 2}.")
        for name in before:  # no weight decay, no momentum
            assert torch.equal(before[name], after[name]) == name.startswith(idle), name


@pytest.mark.parametrize("step, domain", [(1, 0), (2, 1)])
def test_each_domain_has_its_own_images_and_its_term_of_eq11(trained, step, domain):
    record = trained(domains=(C, 3), lambda_adv=0.02, steps=step, lr=0.0)  # moves BN's statistics only
    batches_l, batches_u = cct.streams(record.domains[domain], 0, CTX)
    x, y = next(batches_l)
    z_l, z_u = record.net.encoder(x, next(batches_u))
    loss_s = F.cross_entropy(cct.crop(record.net.decoders[domain](z_l), x), y)
    g = record.discriminator(torch.cat([z_l, z_u])).softmax(1)[:, 1]  # of the second domain
    loss_adv = -(g if domain else 1 - g).log().mean()  # Eq. 11 with log(1 - g)
    assert column(record.folder, "loss_s")[step] == pytest.approx(loss_s.item(), rel=1e-4)
    assert column(record.folder, "loss_adv")[step] == pytest.approx(loss_adv.item(), rel=1e-4)


def test_discriminator_has_the_layers_of_table_8():
    discriminator = cct.Discriminator(CHANNELS, 2)
    x = features()
    for conv, channels in zip(list(discriminator)[:-1:2], (64, 128, 256, 512), strict=True):
        x = F.leaky_relu(F.conv2d(x, conv.weight, conv.bias, padding=1), 0.2)
        assert x.shape == (2, channels, SIDE, SIDE)
    last_layer = discriminator[-1]
    torch.testing.assert_close(discriminator(features()), F.conv2d(x, last_layer.weight, last_layer.bias))


def test_eq12_discriminator_descends_and_the_encoder_ascends_its_loss(trained):
    record = trained(domains=(C, 3), lambda_adv=0.3)
    net, discriminator = record.net, record.discriminator
    z_l, z_u = net.encoder(record.x_l, record.x_u)
    loss_adv = -sum(discriminator(z).log_softmax(1)[:, 0].mean() for z in (z_l, z_u)) / 2
    loss_s = F.cross_entropy(cct.crop(net.decoders[0](z_l), record.x_l), record.y_l)
    loss_u, *_ = naive_consistency(net.decoders[0], record.auxiliary, z_u, record.cfg)
    loss_adv.backward(inputs=list(discriminator.parameters()), retain_graph=True)
    same_gradient(record, loss_s + 20 * loss_u - 0.3 * loss_adv)


def test_eq5_eq6_weak_labels_train_the_auxiliary_decoders_and_the_encoder(trained, monkeypatch):
    """Not the main decoder: with L_s = 0 and lambda_u = 0 nothing reaches it."""
    masks = np.random.default_rng(3).integers(0, C, (6, 24, 32), dtype=np.uint8)
    masks[:, :9] = 255

    def weak_labels(domain, augment, part, ctx):
        assert part.path.name == "weak"
        return types.SimpleNamespace(image=domain.data.train.image, mask=masks.__getitem__)
    monkeypatch.setattr(cct, "weak_labels", weak_labels)
    record = trained(weak=True, lambda_w=0.7, lambda_u=0.0, ignored=True)
    net = record.net
    x_u, y_w = record.x_u
    *_, logits = naive_consistency(net.decoders[0], record.auxiliary, net.encoder(x_u), record.cfg)
    loss_w = sum(F.cross_entropy(one, y_w, ignore_index=255) for one in logits) / len(logits)
    same_gradient(record, 0.7 * loss_w + 0 * net(record.x_l).sum())
    assert not any(p.grad.any() for p in net.decoders.parameters())
    assert column(record.folder, "loss_w") == {1: pytest.approx(loss_w.item(), rel=1e-4)}
    assert column(record.folder, "w_w") == {1: pytest.approx(0.7)}
