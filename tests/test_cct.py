"""cct.py against the paper: each piece versus a slow, obvious version, or numbers worked out by hand."""
import copy
import math
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

import cct
from common.regions import find_blobs
from common.runtime import CpuSyncBatchNorm, Random, Runtime
from common.schedules import RAMPS, poly, ramp, set_lr, update_ema

C, CHANNELS, SIDE = 5, 16, 8  # classes, channels of z, and z's height and width in most tests


def config(**values):
    small = dict(backbone="resnet18", backbone_layers=2, weights="none", decoder_init="icnr", steps=1000,
                 backbone_lr_mult=0.1, device="cpu", precision="fp32", workers=0)
    return cct.Config(**{**small, **values})


def context(rank=0, world=1, scale=None):
    """A CPU context that may stand for one rank of several, or carry a loss scale as fp16 does"""
    ctx = Runtime("cpu", "fp32")
    ctx.rank, ctx.world = rank, world
    if scale:
        ctx.scaler = types.SimpleNamespace(scale=lambda loss: scale * loss)
    return ctx


CTX = context()


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def features(b=2, seed=0):
    """z >= 0 with large smooth regions, so that the decoders see blobs, and with some exact zeros"""
    coarse = F.interpolate(normal(seed, b, CHANNELS, 3, 3), (SIDE, SIDE), mode="bilinear", align_corners=True)
    return F.relu(coarse + 0.2 * normal(seed + 1, b, CHANNELS, SIDE, SIDE))


def networks(cfg):
    """Main and auxiliary decoders with lively weights: at initialisation many logits are dead"""
    main, auxiliary = cct.Decoder(CHANNELS, C, last_relu=cfg.last_relu), cct.Auxiliary(cfg, CHANNELS, C)
    for seed, parameter in enumerate([*main.parameters(), *auxiliary.parameters()]):
        parameter.data = 0.4 * normal(seed, *parameter.shape) + 0.5 * (parameter.dim() == 1)
    return main, auxiliary


def grads(*modules):
    return [p.grad for module in modules for p in module.parameters()]


def as_columns(image):
    return image.transpose(0, 1).reshape(image.shape[1], -1)  # [B, C, H, W] -> [C, N]


def norms(r):
    return r.flatten(1).norm(dim=1).tolist()


def naive_distance(kind, p, q):
    """Eq. 7-9 at every pixel, summed over the classes: [B, C, H, W] -> [B, H, W]"""
    def kl(a, b):
        return (a * (a / b).log()).sum(1)
    m = (p + q) / 2
    return {"mse": ((p - q) ** 2).sum(1), "kl": kl(p, q), "js": kl(p, m) / 2 + kl(q, m) / 2}[kind]


def naive_perturbation(name, z, decoder, objects, rng, cfg):
    def logits_of(z):
        return as_columns(decoder(z))
    return {"f_noise": lambda: cct.f_noise(z, rng, cfg.noise),
            "f_drop": lambda: cct.f_drop(z, rng, *cfg.drop_range),
            "dropout": lambda: cct.dropout(z, rng, cfg.dropout),
            "con_msk": lambda: cct.con_msk(z, objects),
            "obj_msk": lambda: cct.obj_msk(z, objects),
            "g_cutout": lambda: cct.g_cutout(z, find_blobs(objects), rng, cfg.cutout, cfg.cutout_of),
            "i_vat": lambda: cct.i_vat(z, logits_of, rng, cfg.vat_xi, cfg.vat_eps)}[name]()


def naive_consistency(main, auxiliary, z, step, cfg):
    """Eq. 2 and Eq. 10 as one graph over all K <= 8 decoders. -> (L_u, L_P-Wise), plain sums"""
    logits = main(z).detach()
    p, objects = logits.softmax(1), ~torch.isin(logits.argmax(1), torch.tensor(cfg.background))
    total, qs = 0, []
    for k, decoder in enumerate(auxiliary.decoders):
        rng = Random((cfg.seed, "perturb", step, k))
        qs.append(decoder(naive_perturbation(auxiliary.names[k], z, decoder, objects, rng, cfg)).softmax(1))
        d = naive_distance(cfg.distance, p, qs[-1]) / C  # D1: mean over the classes
        total = total + (d[p.amax(1) > cfg.confidence].mean() if cfg.confidence else d.mean())
    qs = torch.stack(qs)
    return total / len(qs), ((qs - qs.mean(0)) ** 2).sum(2).mean()  # the mean prediction has its gradient


# ---- network

@pytest.fixture(scope="module")
def full_size():
    """The paper's network for VOC, without storage"""
    with torch.device("meta"):
        cfg = cct.Config(decoder_init="icnr")
        return cct.Segmenter(cfg, 21), cct.Auxiliary(cfg, 512, 21)


@pytest.mark.parametrize("size", [(321, 321), (320, 320), (360, 480), (512, 1024), (375, 500)])
def test_inv1_shapes(full_size, size):
    net, h, w = full_size[0], math.ceil(size[0] / 8), math.ceil(size[1] / 8)
    z = net.encode(torch.empty(2, 3, *size, device="meta"))
    assert z.shape == (2, 512, h, w) and net.main(z).shape == (2, 21, 8 * h, 8 * w)
    assert net.decode(z, size).shape == (2, 21, *size)


def test_inv2_inv3_parameters(full_size):
    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())
    net, auxiliary = full_size
    assert [count(cct.Decoder(512, c)) for c in (21, 19, 13, 11)] == [16_296, 14_288, 8_840, 7_216]
    assert count(net.backbone) == 23_508_032 and count(net.psp) == 23_073_792
    assert count(net.psp, net.main, auxiliary) == 23_578_968 and len(auxiliary.decoders) == 30
    assert {name: auxiliary.names.count(name) for name in auxiliary.names} == dict(
        i_vat=2, dropout=6, g_cutout=6, con_msk=2, obj_msk=2, f_drop=6, f_noise=6)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_inv3_inv21_optimizer_groups(kind):
    cfg = config(optimizer=kind, k=1)
    net, auxiliary = cct.Segmenter(cfg, C), cct.Auxiliary(cfg, 32, C)
    optimizer = cct.make_optimizer(net, auxiliary, cfg)
    body, rest = optimizer.param_groups
    assert {id(p) for p in body["params"]} == {id(p) for p in net.backbone.parameters()}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in [*net.parameters(), *auxiliary.parameters()])
    assert body["weight_decay"] == rest["weight_decay"] == 1e-4
    assert kind == "adam" or body["momentum"] == rest["momentum"] == 0.9 and not body["nesterov"]
    set_lr(optimizer, 0.01 * poly(500, 1000))
    assert (body["lr"], rest["lr"]) == (pytest.approx(0.000535887, 1e-5), pytest.approx(0.00535887, 1e-5))


def test_inv4_dilations(full_size):
    for layer, dilations in (("layer3", [1, 2, 2, 2, 2, 2]), ("layer4", [2, 4, 4])):
        modules = getattr(full_size[0].backbone, layer).modules()
        convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
        assert [m.dilation for m in convolutions if m.kernel_size == (3, 3)] == [(d, d) for d in dilations]
        assert all(m.stride == (1, 1) for m in convolutions)


def test_inv5_decoder_layers():
    decoder, z = cct.Decoder(512, 21), normal(0, 2, 512, 3, 4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in decoder.modules())
    assert decoder.adapt.bias is None and all(conv.bias.shape == (84,) for conv in decoder.subpixel)
    assert decoder.adapt.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.05)
    linear_end = cct.Decoder(512, 21, last_relu=False)
    linear_end.load_state_dict(decoder.state_dict())
    assert linear_end(z).min() < 0 and torch.equal(F.relu(linear_end(z)), decoder(z))


def test_inv6_icnr():
    decoder = cct.Decoder(CHANNELS, 64)
    for conv in decoder.subpixel:
        rows = conv.weight.view(64, 4, 64)  # output channels 4c .. 4c+3
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
        assert rows.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
        nn.init.zeros_(conv.bias)
    cells = decoder(features()).unfold(2, 8, 8).unfold(3, 8, 8)
    assert torch.equal(cells, cells[..., :1, :1].expand_as(cells)) and cells.std() > 0


def test_identity_initialisation_is_nearest_upsampling():
    torch.manual_seed(0)
    decoder, z = cct.Decoder(CHANNELS, C, init="identity"), features()
    logits = decoder.adapt(z).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert -4 < logits.min() < 0  # a plain ReLU would have cut these
    torch.testing.assert_close(decoder(z).softmax(1), logits.softmax(1))


@pytest.mark.parametrize("last_relu", [True, False])
def test_columns_are_forward_in_another_order(last_relu):
    decoder, z = networks(config(last_relu=last_relu))[0], features(3)[..., :5]
    columns = decoder.columns(z)
    image = cct.columns_to_image(columns, 3, SIDE, 5)  # [C, B, 8h, 8w]
    assert columns.shape == (C, 64 * 3 * SIDE * 5) and (image < 0).any() != last_relu
    torch.testing.assert_close(image.transpose(0, 1), decoder(z))
    assert torch.equal(cct.columns_to_image(columns.argmax(0), 3, SIDE, 5), image.argmax(0))


def small_net():
    torch.manual_seed(0)
    return cct.Segmenter(config(decoder_init="identity"), C)


@pytest.mark.parametrize("size", [(37, 50), (8, 9), (5, 9), (1, 1), (16, 24)])
def test_inv23_predict_keeps_any_size(size):
    net, x = small_net().eval(), normal(0, 2, 3, *size)
    pad = [(0, 0), (0, 0), (0, -size[0] % 8), (0, -size[1] % 8)]  # bottom and right only
    padded = torch.from_numpy(np.pad(x.numpy(), pad, mode="reflect" if min(size) > 7 else "edge"))
    whole = net.main(net.psp(net.backbone(padded)))
    torch.testing.assert_close(cct.predict(net, x, config(), CTX), whole[:, :, :size[0], :size[1]])


def test_inv24_multi_scale():
    net, x, cfg, seen = small_net().eval(), normal(0, 1, 3, 16, 37), config(multi_scale=True), []
    assert torch.equal(cct.predict(net, x, config(), CTX), net(x))
    assert cct.predict(net, x, cfg, CTX).shape == (1, C, 16, 37)

    def fake(x):  # logits that tell the scale, the order of the columns, and the input
        seen.append(x)
        plane = torch.ones_like(x[:, 0])
        w = x.shape[3]
        return torch.stack([w ** 2 * plane, torch.linspace(0, 1, w) * plane, x[:, 0]], 1)
    logits, widths = cct.predict(fake, x, cfg, CTX), [18, 27, 37, 46, 55]
    assert [tuple(s.shape[2:]) for s in seen[::2]] == list(zip([8, 12, 16, 20, 24], widths))
    assert all(torch.equal(a.flip(3), b) for a, b in zip(seen[::2], seen[1::2])) and torch.equal(seen[4], x)
    torch.testing.assert_close(logits[0, 0], torch.full((16, 37), sum(w ** 2 for w in widths) / 5))
    torch.testing.assert_close(logits[0, 1], torch.full((16, 37), 0.5))  # columns and their mirror image
    back = [F.interpolate(s[:, :1], (16, 37), mode="bilinear", align_corners=True) for s in seen[::2]]
    torch.testing.assert_close(logits[:, 2:], sum(back) / 5)


def test_two_passes_have_their_own_batch_statistics():
    together, apart = small_net(), small_net()
    x_l, x_u = normal(0, 2, 3, 16, 21), 3 + normal(1, 2, 3, 16, 21)
    logits, z = together(x_l, x_u)
    torch.testing.assert_close(logits, apart(x_l))
    torch.testing.assert_close(z, apart.encode(x_u))
    for a, b in zip(together.buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert together.backbone.bn1.num_batches_tracked == 2 and z.min() == 0 and z.max() > 0
    torch.testing.assert_close(together.eval()(x_l, x_u, True)[1], apart.eval()(x_u))


# ---- losses and ramps

def labels(seed, *shape):
    y = torch.randint(0, C, shape, generator=torch.Generator().manual_seed(seed))
    y[normal(seed, *shape) < -0.5] = 255
    return y


def pixels(logits, y):
    """(probability of the true class, cross-entropy) of every valid pixel, in float64"""
    log_p = logits.double().log_softmax(1)
    values = [log_p[b, y[b, i, j], i, j] for b, i, j in np.ndindex(*y.shape) if y[b, i, j] != 255]
    return [(value.exp(), -value) for value in values]


def test_eq1_cross_entropy():
    logits, y = normal(0, 2, C, 4, 5).requires_grad_(), labels(1, 2, 4, 5)
    losses, loss = [loss for _, loss in pixels(logits, y)], cct.cross_entropy(logits, y, CTX)
    expected = sum(losses) / len(losses)
    assert 0 < len(losses) < y.numel() and loss.item() == pytest.approx(expected.item())
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (loss, expected)))


@pytest.mark.parametrize("function, eta", [(cct.cross_entropy, []), (cct.annealed_cross_entropy, [0.5])])
def test_eq1_eq4_all_ignored(function, eta):
    logits, y = normal(0, 2, C, 4, 5).requires_grad_(), torch.full((2, 4, 5), 255)
    loss = function(logits, y, *eta, CTX)
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def naive_ab_ce(logits, y, eta):
    every = sorted(pixels(logits, y), key=lambda pixel: pixel[0].item())
    floor = every[min(len(y), len(every) - 1)][0]  # the (B+1)-th smallest
    kept = [loss for p, loss in every if p < max(eta, floor)]
    return sum(kept) / len(kept) if kept else 0 * logits.sum(), len(kept)


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("valid", [1, 2, 3, 4, 5, 28])
def test_eq4_annealed_cross_entropy(eta, valid):
    logits, y = (2 * normal(0, 3, C, 4, 5)).requires_grad_(), labels(1, 3, 4, 5)
    y.view(-1)[(y.view(-1) != 255).nonzero()[valid:]] = 255
    (expected, kept), loss = naive_ab_ce(logits, y, eta), cct.annealed_cross_entropy(logits, y, eta, CTX)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (loss, expected)))
    assert valid != 28 or eta != 0.3 or 3 < kept < 28


def test_inv20_annealed_cross_entropy_keeps_one_pixel_per_image():
    y, logits = torch.zeros(3, 4, 5, dtype=torch.long), torch.zeros(3, C, 4, 5)
    logits[:, 0] = 5 + normal(0, 3, 4, 5)  # every pixel is sure of its class,
    logits[0, 0, 0, :2], y[0, 0, :2] = -50, 255  # but for two that are ignored
    losses = sorted((loss.item() for _, loss in pixels(logits, y)), reverse=True)
    assert losses[0] < -math.log(0.2)
    assert cct.annealed_cross_entropy(logits, y, 0.2, CTX).item() == pytest.approx(sum(losses[:3]) / 3)
    assert cct.annealed_cross_entropy(logits, y, 1.0, CTX).item() == pytest.approx(sum(losses) / len(losses))


def measure(kind, p, q):
    """The distance between two distributions, summed over the classes"""
    return cct.distance(kind, torch.tensor(p)[:, None], torch.tensor(q).log()[:, None]).sum().item()


def test_eq7_mse():
    assert measure("mse", [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]) == pytest.approx(2 / 16 + 1 / 4)
    largest = measure("mse", [1.0] + [0.0] * 20, [0.0] * 20 + [1.0]) / 21
    assert largest == pytest.approx(0.0952, abs=1e-4)


def test_eq8_kl():
    assert measure("kl", [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]) == pytest.approx(math.log(2))
    p, q = [0.7, 0.2, 0.1], [0.1, 0.3, 0.6]
    forward, reverse = (sum(a * math.log(a / b) for a, b in zip(*pair)) for pair in ((p, q), (q, p)))
    assert measure("kl", p, q) == pytest.approx(forward) and measure("kl", q, p) == pytest.approx(reverse)
    assert abs(forward - reverse) > 0.05 and measure("kl", p, p) == pytest.approx(0, abs=1e-6)


def test_eq9_js():
    p, q = [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]  # m = 3/8, 3/8, 2/8
    by_hand = math.log(4 / 3) / 2 + (math.log(2 / 3) / 2 + math.log(2) / 2) / 2
    assert measure("js", p, q) == pytest.approx(by_hand) and measure("js", q, p) == pytest.approx(by_hand)
    assert measure("js", [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]) == pytest.approx(math.log(2))  # largest
    assert measure("js", q, q) == 0


@pytest.mark.parametrize("kind", ["mse", "kl", "js"])
def test_eq7_eq8_eq9_gradients_with_probabilities_that_underflow(kind):
    logits = torch.tensor([[0.0, 3.0], [1.0, 0.0], [0.5, 0.0]], requires_grad=True)
    p = torch.tensor([[0.0, 0.0], [150.0, 1.0], [0.0, 200.0]]).softmax(0)
    assert (p == 0).sum() == 4  # a main decoder that is very sure, in float32
    gradient, = torch.autograd.grad(cct.distance(kind, p, logits).sum(), logits)
    p, q = p.double(), logits.detach().double().softmax(0)
    slope = {"mse": 2 * (q - p), "kl": -p / q, "js": (2 * q / (p + q)).log() / 2}[kind]  # d/dq
    torch.testing.assert_close(gradient, (q * (slope - (q * slope).sum(0))).float())


def test_fig8_ramps():
    fig8 = {"gaussian": (0.0067, 0.0601, 0.2865, 0.7316, 1), "exp": (0.0067, 0.0235, 0.0821, 0.2865, 1),
            "log": (0, 0.7135, 0.9179, 0.9765, 0.9933), "linear": (0, 0.25, 0.5, 0.75, 1),
            "cosine": (0, 0.1464, 0.5, 0.8536, 1)}
    assert set(fig8) == set(RAMPS)
    for shape, values in fig8.items():
        assert [ramp(shape, t, 400) for t in range(0, 401, 100)] == pytest.approx(values, abs=5.1e-5)
        assert ramp(shape, 1000, 400) == ramp(shape, 400, 400) and ramp(shape, 0, 0) == 1


@pytest.mark.parametrize("shape, half", [("gaussian", 8.5951), ("exp", 2.4625)])
def test_eq16_consistency_weight(shape, half):
    cfg = cct.Config(steps=45600, ramp=shape)
    weights = [cct.consistency_weight(t, cfg) for t in (0, 2280, 4560, 45599)]
    assert weights == pytest.approx([0.20214, half, 30, 30], abs=5e-5)
    assert cct.consistency_weight(4559, cfg) < 30


def test_table12_is_the_default():
    cfg = cct.Config()
    table12 = dict(lr=1e-2, weight_decay=1e-4, optimizer="sgd", lambda_u=30, ramp_length=0.1, eta_final=0.9,
                   vat_eps=2, dropout=0.5, cutout=0.4, drop_range=(0.6, 0.9), noise=0.3)
    assert {name: getattr(cfg, name) for name in table12} == table12
    assert all(cct.PRESETS[name]["epochs"] == 50 for name in ("voc", "camvid", "cityscapes"))


def test_eq17_eta():
    cfg = cct.Config(steps=72960)  # 80 epochs of 912
    values = [cct.eta(t, cfg, 21) for t in (0, 14592, 29184)]
    assert values == pytest.approx([0.04762, 0.83003, 0.89426], abs=5e-6)
    sooner = config(steps=cfg.steps, eta_length=cfg.eta_length / 2, eta_final=0.8)
    assert cct.eta(7296, sooner, 21) == pytest.approx((1 - math.exp(-2.5)) * (0.8 - 1 / 21) + 1 / 21)
    values = [cct.eta(t, cfg, 21) for t in range(0, 72961, 4560)]
    assert values == sorted(values) and 0.8999 < values[-1] < 0.9  # Eq. 17 does not stop at T


# ---- perturbations

class Fixed:
    """A rng that always draws the same number"""

    def __init__(self, u):
        self.u = u

    def shared(self, *shape):
        return torch.full(shape, self.u)

    uniform = shared


def test_inv8_f_noise():
    z = F.relu(normal(0, 3, 64, 40, 40)) + (normal(1, 3, 64, 40, 40) > 0)
    out, on = cct.f_noise(z, Random(("noise",))), z > 0
    factor = out / z
    assert torch.equal(out > 0, on)
    assert 0.6999 < factor[on].min() < 0.701 and 1.299 < factor[on].max() < 1.3001
    torch.testing.assert_close(*(factor[b][on[0] & on[1]] for b in (0, 1)))  # one noise for the batch
    assert factor[on].mean().item() == pytest.approx(1, abs=1e-2)
    assert factor[on].std().item() == pytest.approx(0.6 / math.sqrt(12), rel=0.02)  # it is uniform


def test_inv9_f_drop():
    z, shares = features(3, seed=4), []
    for u in (0.0, 0.25, 0.5, 0.75, 0.999):
        out, gamma, kept = cct.f_drop(z, Fixed(u)), 0.6 + 0.3 * u, 0
        for b, i, j in np.ndindex(3, SIDE, SIDE):
            activity = z[b].double().sum(0)
            keep = bool(activity[i, j] / activity.max() < gamma)
            assert torch.equal(out[b, :, i, j], z[b, :, i, j] * keep)
            kept += keep
        assert not any(out[b].flatten(1)[:, z[b].sum(0).argmax()].any() for b in range(3))
        shares.append(kept)
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] < 3 * 64
    assert torch.equal(cct.f_drop(0 * z, Fixed(0.5)), 0 * z)


def test_inv9_f_drop_draws_one_gamma_for_the_batch():
    z, gammas = features(16, seed=4), []
    ratio = z.sum(1) / z.sum(1).amax((1, 2), keepdim=True)
    for seed in range(40):
        kept = cct.f_drop(z, Random((seed,))).sum(1) > 0
        assert ratio[kept].max() < ratio[~kept].min()  # over all samples
        gammas.append(ratio[kept].max().item())
    assert 0.58 < min(gammas) < 0.64 and 0.86 < max(gammas) < 0.9


def test_inv9_f_drop_quantile():
    z = features(3, seed=4) + 0.1
    for u, dropped in ((0.0, 26), (0.5, 16), (0.999, 7)):  # ceil((1 - gamma) * 64)
        out = cct.f_drop(z, Fixed(u), quantile=True)
        for b in range(3):
            expected = z[b].flatten(1).clone()
            expected[:, z[b].sum(0).flatten().argsort(descending=True)[:dropped]] = 0
            assert torch.equal(out[b].flatten(1), expected)


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_inv10_dropout(p):
    z = 1 + features(8, seed=1).repeat(1, 32, 1, 1)  # 8 x 512 channels, none zero
    out = cct.dropout(z, Random(("d",)), p)
    kept = (out != 0).any(3).any(2)
    torch.testing.assert_close(out, torch.where(kept[:, :, None, None], z / (1 - p), 0))
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=0.03) and not torch.equal(kept[0], kept[1])


def test_inv11_inv12_guided_masks():
    z, objects = 1 + features(), normal(3, 2, 8 * SIDE, 8 * SIDE) > 0
    kept_objects, kept_context = cct.con_msk(z, objects), cct.obj_msk(z, objects)
    assert torch.equal(kept_objects + kept_context, z) and not (kept_objects * kept_context).any()
    for b, i, j in np.ndindex(2, SIDE, SIDE):
        assert torch.equal(kept_objects[b, :, i, j], z[b, :, i, j] * objects[b, 8 * i, 8 * j])
    nothing = torch.zeros_like(objects)
    assert not cct.con_msk(z, nothing).any() and torch.equal(cct.obj_msk(z, nothing), z)


def spiral(n):
    mask, (y, x), (dy, dx) = np.zeros((n, n), bool), (0, 0), (0, 1)
    for length in [n - 1] + [k for k in range(n - 1, 1, -2) for _ in (0, 1)]:
        for _ in range(length):
            mask[y, x] = True
            y, x = y + dy, x + dx
        dy, dx = dx, -dy
    return mask


def maze(n, seed):
    """A random spanning tree: one region whose paths are as long and crooked as they come"""
    rng, mask, stack = np.random.default_rng(seed), np.zeros((n, n), bool), [(0, 0)]
    mask[0, 0] = True
    while stack:
        y, x = stack[-1]
        free = [(a, b) for a, b in ((2, 0), (-2, 0), (0, 2), (0, -2))
                if 0 <= y + a < n and 0 <= x + b < n and not mask[y + a, x + b]]
        if not free:
            stack.pop()
            continue
        a, b = free[rng.integers(len(free))]
        mask[y + a, x + b] = mask[y + a // 2, x + b // 2] = True
        stack.append((y + a, x + b))
    return mask


def patterns(name, n):
    y, x = np.mgrid[:n, :n]
    if name == "random":  # 0.407 is the percolation threshold with 8 neighbours: the most tangled regions
        density = np.array([0.02, 0.1, 0.25, 0.35, 0.407, 0.41, 0.45, 0.593, 0.8, 0.97])
        return np.random.default_rng(0).random((10, n, n)) < density[:, None, None]
    if name == "simple":  # checkerboard, dots, full, empty, two lines, concentric squares
        return np.stack([(x + y) % 2 == 0, (x % 2 == 0) & (y % 2 == 0), x < n, x < 0, (x == 0) | (x == n - 1),
                         np.maximum(abs(x - n // 2), abs(y - n // 2)) % 4 == 0])
    if name == "maze":
        return np.stack([maze(n, seed) for seed in range(4)])
    mask = {"comb": (x % 2 == 0) | (y == n - 1), "spiral": spiral(n),
            "snake": (y % 2 == 0) | (x == (n - 1) * (y // 2 % 2 == 0))}[name]
    return np.stack([mask, mask[::-1], mask.T, mask.T[:, ::-1]])


@pytest.mark.parametrize("size", [8, 24, 97])
@pytest.mark.parametrize("name", ["random", "simple", "comb", "spiral", "snake", "maze"])
def test_find_blobs(name, size):
    masks = patterns(name, size)
    masks = np.concatenate([masks, masks[:, ::-1]])[..., :size - size // 9]  # not square
    for min_area in (1, 64):
        expected = []
        for b, mask in enumerate(masks):
            regions, _ = ndimage.label(mask, np.ones((3, 3)))
            for label, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
                if (regions == label).sum() >= min_area:
                    first = b * mask.size + int((regions == label).argmax())
                    expected.append([first, rows.start, columns.start, rows.stop - 1, columns.stop - 1])
        box, valid = find_blobs(torch.from_numpy(masks.copy()), min_area)
        found = valid.nonzero()[:, 0]
        assert torch.cat([found[None], box[:, found]]).T.tolist() == sorted(expected)


@pytest.mark.parametrize("of, height, width", [("side", 11, 19), ("area", 18, 30)])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2 ** -24])
def test_inv13_g_cutout_rectangle(of, height, width, u):
    y0, x0, y1, x1 = 20, 10, 49, 59  # bh = 29, bw = 49; times 0.4: 11.6, 19.6; times sqrt(0.4): 18.3, 30.99
    h, w, hidden = 10, 12, torch.zeros(88, 104, dtype=torch.bool)
    for dy, dx in np.ndindex(8, 8):  # z shows every 8th pixel only, so the object is moved to show them all
        objects = torch.zeros(1, 8 * h, 8 * w, dtype=torch.bool)
        objects[:, y0 + dy:y1 + dy + 1, x0 + dx:x1 + dx + 1] = True
        out = cct.g_cutout(torch.ones(1, 1, h, w), find_blobs(objects), Fixed(u), of=of)[0, 0]
        hidden[8 - dy::8, 8 - dx::8][:h, :w] = out == 0  # pixels (8i - dy, 8j - dx)
    share = {"side": 0.4, "area": math.sqrt(0.4)}[of]
    top, left = (start + int(u * (math.floor(n * (1 - share)) + 1)) for start, n in ((y0, 29), (x0, 49)))
    expected = torch.zeros_like(hidden)
    expected[8 + top:8 + top + height, 8 + left:8 + left + width] = True
    assert torch.equal(hidden, expected) and top + height <= y1 and left + width <= x1


def test_inv13_g_cutout_rounds_down_exactly():
    box, valid = torch.zeros(4, 64 * 51, dtype=torch.long), torch.zeros(64 * 51, dtype=torch.bool)
    valid[0], hidden = True, {}
    for length in range(5, 400, 5):  # 0.4 of it is a whole number, which float32 must not miss
        for shift in range(8):
            box[:, 0] = torch.tensor([0, shift, 5, shift + length])
            cells = (cct.g_cutout(torch.ones(1, 1, 1, 51), (box, valid), Fixed(0.0)) == 0).sum().item()
            hidden[length] = hidden.get(length, 0) + cells
    assert hidden == {length: length * 2 // 5 for length in hidden}


def test_inv13_g_cutout_of_random_blobs():
    objects, z = torch.zeros(4, 96, 96, dtype=torch.bool), torch.ones(4, 3, 12, 12)
    boxes = ((0, 0, 41, 53), (48, 0, 95, 95), (8, 64, 30, 90))
    for y0, x0, y1, x1 in boxes:
        objects[:2, y0:y1 + 1, x0:x1 + 1] = True
    objects[:2, 10:30, 10:40] = False  # a hole does not matter
    objects[2, 8:15, 8:17] = True  # 63 pixels: too few; sample 3 has no object
    blobs, seen, samples_differ = find_blobs(objects), [set() for _ in boxes], 0
    for draw in range(300):
        out = cct.g_cutout(z, blobs, Random((draw,)))
        assert torch.equal(out[2:], z[2:]) and torch.equal(out[:, 0], out[:, 2])
        samples_differ += not torch.equal(out[0], out[1])
        for b in range(2):
            elsewhere = out[b, 0].clone()
            for (y0, x0, y1, x1), windows in zip(boxes, seen):
                cells = np.s_[-(-y0 // 8):y1 // 8 + 1, -(-x0 // 8):x1 // 8 + 1]  # of the box
                zero, elsewhere[cells] = out[b, 0][cells] == 0, 1
                rows, columns = zero.any(1), zero.any(0)
                assert torch.equal(zero, rows[:, None] & columns)  # one rectangle
                windows.add((tuple(rows.tolist()), tuple(columns.tolist())))
            assert (elsewhere == 1).all()
    assert samples_differ > 250
    for (y0, x0, y1, x1), windows in zip(boxes, seen):
        for axis, (first, last) in enumerate(((y0, y1), (x0, x1))):
            n, sampled = last - first, range(-(-first // 8) * 8, last + 1, 8)
            every_offset = {tuple(first + o <= at < first + o + n * 4 // 10 for at in sampled)
                            for o in range(n * 6 // 10 + 1)}
            assert {window[axis] for window in windows} == every_offset
        alone = [len({window[axis] for window in windows}) for axis in (0, 1)]
        assert len(windows) > sum(alone)  # more pairs than one draw for both coordinates can give


def unit(d):
    return d / d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def divergence(function, z, r):
    """KL(clean || perturbed) of every sample, summed over its pixels"""
    p, log_q = function(z).softmax(1).detach(), function(z + r).log_softmax(1)
    return (p * (p.log() - log_q)).sum((1, 2, 3))


@pytest.mark.parametrize("xi", [0.1, 10.0])  # with so long a step it matters which way round the KL is
def test_eq13_eq14_eq15_adversarial(xi):
    decoder, z = networks(config())[0], features(3, seed=2).requires_grad_()
    r, p = cct.adversarial(z, decoder.columns, Random(("vat",)), xi=xi, eps=2.0)
    assert torch.equal(p, decoder.columns(z).softmax(0)) and norms(r) == pytest.approx([2, 2, 2], abs=1e-4)
    assert not r.requires_grad and not p.requires_grad and z.grad is None
    double, z64 = copy.deepcopy(decoder).double(), z.detach().double()
    start = unit(Random(("vat",)).normal(3, CHANNELS, SIDE, SIDE).double()).requires_grad_()  # Eq. 13
    gradient, = torch.autograd.grad(divergence(double, z64, xi * start).sum(), start)
    assert ((unit(r.double()) * unit(gradient)).sum((1, 2, 3)) > 0.9999).all()
    elsewhere = 2 * unit(normal(5, 3, CHANNELS, SIDE, SIDE))
    assert xi > 1 or (divergence(decoder, z, r) > 3 * divergence(decoder, z, elsewhere)).all()


def test_inv14_i_vat_leaves_gradients_alone_and_passes_z_through():
    decoder, z = networks(config())[0], features().requires_grad_()
    for parameter in decoder.parameters():
        parameter.grad = torch.full_like(parameter, 7)
    out = cct.i_vat(z, decoder.columns, Random((1,)))
    assert all((g == 7).all() for g in grads(decoder)) and z.grad is None
    out.backward(torch.full_like(z, 3))
    assert (z.grad == 3).all() and norms(out - z) == pytest.approx([2, 2], abs=1e-4)
    with torch.no_grad():  # it builds its own graph also where none is recorded (the mean of Eq. 10)
        assert torch.equal(cct.i_vat(z, decoder.columns, Random((1,))), out)


def test_inv14_released_i_vat_is_inert_and_ours_survives_tiny_and_absent_gradients():
    decoder, z = networks(config())[0], features()
    assert max(norms(cct.adversarial(z, decoder.columns, Random((1,)), released=True)[0])) < 0.05
    tiny = cct.adversarial(z, lambda z: 1e-4 * decoder.columns(z), Random((1,)))[0]
    assert norms(tiny) == pytest.approx([2, 2], abs=1e-4)
    assert norms(cct.unit(1e-30 * normal(0, 2, 3, 4, 5))) == pytest.approx([1, 1])  # squares to 0
    assert not cct.adversarial(z, lambda z: 0 * decoder.columns(z), Random((1,)))[0].any()  # a dead decoder


def test_draws_of_a_rank_are_its_rows_of_the_single_process_draw():
    for world in (2, 3):
        ranks = [context(rank, world).random(5, "perturb", 7) for rank in range(world)]
        alone = CTX.random(5, "perturb", 7)
        for _ in range(2):  # and the streams stay in step
            assert torch.equal(torch.cat([r.uniform(2, 3, 4) for r in ranks]), alone.uniform(2 * world, 3, 4))
            assert torch.equal(torch.cat([r.normal(2, 3) for r in ranks]), alone.normal(2 * world, 3))
            shared = alone.shared(1, 5)
            assert all(torch.equal(r.shared(1, 5), shared) for r in ranks)


# ---- Eq. 2 and 10

@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("settings", [
    dict(), dict(distance="kl"), dict(distance="js"),
    dict(confidence=0.4), dict(confidence=0.4, distance="kl"), dict(confidence=0.4, distance="js"),
    dict(pairwise=0.7), dict(pairwise=0.7, distance="js", confidence=0.4),
    dict(cutout_of="area", background=(0, 1), last_relu=False)], ids=str)
def test_eq2_eq10_cross_consistency_is_the_plain_sum(settings, scale):
    cfg, weight, step = config(k=1, **settings), 3.5, 11
    (main, auxiliary), z = networks(cfg), features().requires_grad_()
    expected_u, expected_pairwise = naive_consistency(main, auxiliary, z, step, cfg)
    ((scale or 1) * (weight * expected_u + cfg.pairwise * expected_pairwise)).backward()
    expected = [z.grad, *grads(auxiliary)]
    auxiliary.zero_grad()
    loss_u, loss_pairwise, gradient = cct.cross_consistency(
        main, auxiliary, z, weight, step, cfg, context(scale=scale))
    assert loss_u.item() == pytest.approx(expected_u.item(), rel=1e-4) and expected_u > 1e-3
    assert loss_pairwise.item() == pytest.approx(expected_pairwise.item() if cfg.pairwise else 0, rel=1e-4)
    assert not (loss_u.requires_grad or loss_pairwise.requires_grad or gradient.requires_grad)
    for ours, naive in zip([gradient, *grads(auxiliary)], expected, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-3, atol=1e-4 * naive.abs().max().item())
    assert all(g is None for g in grads(main))


def test_eq2_every_perturbation_and_the_confidence_mask_are_at_work_in_that_test():
    cfg = config(k=1)
    (main, auxiliary), z = networks(cfg), features()
    logits = main(z)
    assert 0.1 < (logits.softmax(1).amax(1) > 0.4).float().mean() < 0.9
    assert find_blobs(logits.argmax(1) != 0)[1].sum() >= 2
    for k, (name, decoder) in enumerate(zip(auxiliary.names, auxiliary.decoders)):
        rng = Random((0, "perturb", 11, k))
        out = naive_perturbation(name, z, decoder, logits.argmax(1) != 0, rng, cfg)
        assert 0.01 < (out != z).any(1).float().mean() and out.any()


def test_eq2_graphs_in_memory_do_not_grow_with_k():
    count = types.SimpleNamespace(live=0, peak=0)

    class Saved:
        def __init__(self, tensor):
            self.tensor, count.live = tensor, count.live + 1
            count.peak = max(count.peak, count.live)

        def __del__(self):
            count.live -= 1

    peaks = []
    for k in (1, 6):
        cfg = config(k=k, pairwise=0.5)
        (main, auxiliary), z, count.peak = networks(cfg), features(), 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            cct.cross_consistency(main, auxiliary, z, 1.0, 0, cfg, CTX)
        peaks.append(count.peak)
    assert peaks[0] == peaks[1] > 5 and count.live == 0


def test_eq2_ranks_together_are_one_process():
    cfg, z = config(k=1), features(4)
    main, auxiliary = networks(cfg)
    loss, _, gradient = cct.cross_consistency(main, auxiliary, z, 3.5, 11, cfg, CTX)
    alone = grads(auxiliary)
    auxiliary.zero_grad()
    parts = [cct.cross_consistency(main, auxiliary, z[2 * rank:2 * rank + 2], 3.5, 11, cfg, context(rank, 2))
             for rank in range(2)]  # .grad adds up over them; averaging then divides by the number of ranks
    assert sum(part[0] for part in parts).item() / 2 == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]) / 2, gradient, rtol=1e-3, atol=1e-6)
    for ours, expected in zip(grads(auxiliary), alone, strict=True):
        torch.testing.assert_close(ours / 2, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind, tolerance", [("mse", 0), ("js", 0), ("kl", 1e-6)])
def test_inv15_no_perturbation_and_equal_weights_give_no_loss(kind, tolerance):
    cfg = config(k=2, perturbations=("f_noise", "dropout"), noise=0.0, dropout=0.0, distance=kind)
    (main, auxiliary), z = networks(cfg), features()
    assert cct.cross_consistency(main, auxiliary, z, 1.0, 0, cfg, CTX)[0] > 1e-3
    for decoder in auxiliary.decoders:
        decoder.load_state_dict(main.state_dict())
    assert abs(cct.cross_consistency(main, auxiliary, z, 1.0, 0, cfg, CTX)[0]) <= tolerance


def test_inv16_confidence_thresholds_one_and_zero():
    cfg = config(k=1, confidence=1.0)
    (main, auxiliary), z = networks(cfg), features()
    loss, _, gradient = cct.cross_consistency(main, auxiliary, z, 1.0, 0, cfg, CTX)
    assert loss == 0 and not gradient.any() and not any(g.any() for g in grads(auxiliary))
    losses = [cct.cross_consistency(main, auxiliary, z, 1.0, 0, config(k=1, confidence=c), CTX)[0].item()
              for c in (0.0, 1e-9)]
    assert losses[0] == pytest.approx(losses[1]) and losses[0] > 1e-3


def test_eq10_pairwise_loss_takes_eight_random_decoders():
    cfg, z, chosen = config(k=2, pairwise=1.0), features(), set()
    for step in range(12):
        main, auxiliary = networks(cfg)
        cct.cross_consistency(main, auxiliary, z, 0.0, step, cfg, CTX)  # w_u = 0 leaves L_P-Wise alone
        trained = [any(g.any() for g in grads(decoder)) for decoder in auxiliary.decoders]
        assert len(trained) == 14 and sum(trained) == 8
        chosen.add(tuple(trained))
    assert len(chosen) > 6 and all(map(any, zip(*chosen)))


def test_inv17_pairwise_loss_of_equal_outputs_is_zero():
    cfg = config(k=5, perturbations=("obj_msk",), pairwise=1.0)
    (main, auxiliary), z = networks(cfg), features()
    assert cct.cross_consistency(main, auxiliary, z, 0.0, 0, cfg, CTX)[1] > 1e-3
    for decoder in auxiliary.decoders:
        decoder.load_state_dict(auxiliary.decoders[0].state_dict())
    _, pairwise, gradient = cct.cross_consistency(main, auxiliary, z, 0.0, 0, cfg, CTX)
    assert pairwise.item() == pytest.approx(0, abs=1e-10) and gradient.abs().max() < 1e-8


# ---- the training step: Eq. 3, who gets which gradient, and the baselines of Table 4

class Split:
    """Six images of 24 x 32 pixels, with masks or with nothing but ignored pixels"""

    def __init__(self, seed, ignored=False):
        rng = np.random.default_rng(seed)
        self.images = rng.integers(0, 256, (6, 24, 32, 3), dtype=np.uint8)
        self.masks = rng.integers(0, C, (6, 24, 32), dtype=np.uint8) | np.uint8(255 * ignored)

    def __len__(self):
        return 6

    def image(self, i):
        return self.images[i].copy()

    def mask(self, i):
        return self.masks[i].copy()


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A function that runs cct.train and records what went into it and what the first steps did"""
    def run(ignored=False, **values):
        record = types.SimpleNamespace(batches=[], grads=[], students=[], decays=[])
        short = dict(batch=4, k=1, steps=1, ramp_length=0.0, log_every=1, out=str(tmp_path))
        cfg = config(**{**short, **values})
        data = types.SimpleNamespace(name="tiny", classes=tuple("abcde"), palette=np.zeros((C, 3), np.uint8),
                                     train=Split(0, ignored), val=Split(1), scored_on="val", notes=())
        make_optimizer, endless = cct.make_optimizer, cct.endless

        def spy_optimizer(net, auxiliary, cfg):
            record.net, record.auxiliary = copy.deepcopy((net, auxiliary))  # before the first step
            optimizer = make_optimizer(net, auxiliary, cfg)
            optimizer.register_step_pre_hook(
                lambda *_: record.grads.append(copy.deepcopy(grads(net, auxiliary))))
            return optimizer

        def spy_endless(*args):
            for batch in endless(*args):
                record.batches.append(batch)
                yield batch

        def spy_ema(teacher, student, decay):
            record.students.append([p.detach().clone() for p in student.parameters()])
            record.decays.append(decay)
            update_ema(teacher, student, decay)
            record.teacher, record.student = teacher, copy.deepcopy(student)

        stubs = dict(open_dataset=lambda *_: data, choose_labelled=lambda *_: ([0, 1, 2], [3, 4, 5]),
                     make_optimizer=spy_optimizer, endless=spy_endless, update_ema=spy_ema)
        for name, stub in stubs.items():
            monkeypatch.setattr(cct, name, stub)
        monkeypatch.setattr(Runtime, "catch_sigterm", lambda self: None)
        cct.train(cfg)
        return record, cfg, *record.batches[0], record.batches[1]  # .., x_l, y_l, x_u
    return run


def same_gradient(record, loss):
    """Does the first step's gradient equal that of `loss`, a function of the networks before it?"""
    loss.backward()
    for ours, naive in zip(record.grads[0], grads(record.net, record.auxiliary), strict=True):
        if naive is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, naive, rtol=1e-2, atol=1e-3 * naive.abs().max().item() + 1e-9)


@pytest.mark.parametrize("pairwise", [0.0, 0.7])
def test_eq3_gradient_of_the_training_step(trained, pairwise):
    record, cfg, x_l, y_l, x_u = trained(pairwise=pairwise, lambda_u=20.0)
    net = record.net
    loss_s = F.cross_entropy(net(x_l), y_l, ignore_index=255)
    loss_u, loss_pairwise = naive_consistency(net.main, record.auxiliary, net.encode(x_u), 0, cfg)
    same_gradient(record, loss_s + 20 * loss_u + pairwise * loss_pairwise)


def learns(record):
    """Which part got a gradient other than zero in the first step"""
    net, auxiliary = record.net, record.auxiliary
    gradient = dict(zip([*net.parameters(), *auxiliary.parameters()], record.grads[0], strict=True))
    return [any(gradient[p] is not None and gradient[p].any().item() for p in part.parameters())
            for part in (net.backbone, net.psp, net.main, *auxiliary.decoders)]


def test_inv7_consistency_trains_encoder_and_auxiliary_decoders_only(trained):
    assert learns(trained(ignored=True)[0]) == [True, True, False] + [True] * 7  # L_s = 0


def test_inv7_supervision_trains_encoder_and_main_decoder_only(trained):
    assert learns(trained(lambda_u=0.0)[0]) == [True, True, True] + [False] * 7


def test_mean_teacher_step(trained):
    record, _, x_l, y_l, x_u = trained(method="mean_teacher", lambda_u=20.0)
    target = copy.deepcopy(record.net).eval()(x_u).softmax(1).detach()
    loss_s = F.cross_entropy(record.net(x_l), y_l)
    same_gradient(record, loss_s + 20 * F.mse_loss(record.net(x_u).softmax(1), target))
    assert not any(p.requires_grad or p.grad is not None for p in record.teacher.parameters())


def test_mean_teacher_is_the_moving_average_of_the_students(trained):
    record, *_ = trained(method="mean_teacher", steps=4, ramp_length=0.5)
    assert record.decays == [0.99, 0.99, 0.999, 0.999] and not record.teacher.training
    teacher, start = record.teacher.parameters(), record.net.parameters()
    for average, start, *students in zip(teacher, start, *record.students, strict=True):
        expected = start.detach().double()
        for student, decay in zip(students, record.decays, strict=True):
            expected = decay * expected + (1 - decay) * student
        torch.testing.assert_close(average.double(), expected, atol=1e-6, rtol=1e-5)
    for copied, buffer in zip(record.teacher.buffers(), record.student.buffers(), strict=True):
        assert torch.equal(copied, buffer)
    assert not torch.equal(record.students[0][0], record.students[-1][0])


def check_input_vat(net):
    """r_adv of the VAT baseline, with nothing learnt and nothing left behind"""
    x = normal(0, 4, 3, 16, 24)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 7)
    buffers = [b.clone() for b in net.buffers()]
    moved, p = cct.input_vat(net, x, Random((1,)), config(vat_eps=1.5))
    assert norms(moved - x) == pytest.approx([1.5] * 4, abs=1e-4)
    assert not moved.requires_grad and not p.requires_grad
    with torch.no_grad():
        elsewhere = 1.5 * unit(normal(5, *x.shape))
        frozen = copy.deepcopy(net)
        assert divergence(frozen, x, moved - x).sum() > 2 * divergence(frozen, x, elsewhere).sum()
    torch.testing.assert_close(p, as_columns(frozen(x).softmax(1)))  # with batch statistics
    assert all((g == 7).all() for g in grads(net)) and net.training
    assert all(torch.equal(*pair) for pair in zip(buffers, net.buffers())), "BN has learnt from it"
    net(x)
    assert not any(torch.equal(*pair) for pair in zip(buffers, net.buffers())), "BN does not learn any more"


def test_input_vat():
    check_input_vat(small_net())


def test_input_vat_with_synchronised_batch_norm():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = context(world=2).synchronise_bn(small_net())
        assert isinstance(net.backbone.bn1, CpuSyncBatchNorm)
        check_input_vat(net)
    finally:
        dist.destroy_process_group()


def test_vat_step(trained):
    record, cfg, x_l, y_l, x_u = trained(method="vat", lambda_u=20.0)
    x_adv, p = cct.input_vat(copy.deepcopy(record.net), x_u, Random((cfg.seed, "vat", 0)), cfg)
    loss_s, log_q = F.cross_entropy(record.net(x_l), y_l), as_columns(record.net(x_adv)).log_softmax(0)
    same_gradient(record, loss_s + 20 * (p * (p.log() - log_q)).sum(0).mean() / C)
