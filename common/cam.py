"""Class activation maps (Zhou et al. 2016) of a classifier trained on image-level tags, and
pseudo-labels from them, as in Sec. 3.3 of CCT. Only cct.py uses it."""
import math
import shutil
from functools import partial
from hashlib import sha1
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import checkpoint
from common import transforms as T
from common.backbones import ResNet
from common.crf import dense_crf, unary_of_labels
from common.datasets.pseudo import PseudoLabelled
from common.pictures import prediction_panel, save_mask, save_picture
from common.random import mix
from common.schedules import poly, set_lr
from common.settings import UserError
from common.streams import Stream, endless, to_device
from common.weights import load_weights


class CamNet(nn.Module):
    """A ResNet of output stride 16, and a 1x1 convolution to the classes, which has no bias.

    pretrained: as in the authors' code, BN has constant statistics, and the stem, layer1 and layer2
    are not trained; otherwise everything learns. stem: see ResNet.
    """

    def __init__(self, name, layers, num_classes, pretrained=True, stem="7x7"):
        super().__init__()
        bn = "statistics" if pretrained else "learn"
        self.body = ResNet(name, layers, stride=16, bn=bn, stem=stem)
        self.classifier = nn.Conv2d(self.body.out_channels, num_classes, 1, bias=False)
        for part, module in self.body.named_children():
            if pretrained and part not in ("layer3", "layer4"):
                module.requires_grad_(False)

    def forward(self, x):
        """[B, 3, H, W] -> logits [B, C]: the mean activation of every class"""
        return self.classifier(self.body(x).mean((2, 3), keepdim=True))[:, :, 0, 0]

    def maps(self, x):
        """[B, 3, H, W] -> activations >= 0, [B, C, H/16, W/16]"""
        return F.relu(self.classifier(self.body(x)))


def augment_tagged(image, tags, rng, augment, objects):
    """Training transform of the classifier -> (image, which of the `objects` it holds)

    augment: transform of (image, mask or None, rng). objects: classes that have an output"""
    image, _ = augment(image, None, rng)
    return image, torch.from_numpy(tags[objects])


def train_classifier(data, tags, objects, augment, part, cfg, ctx):
    """Train, or resume, the classifier g_c o h on the tags of all training images; SGD with poly as
    in the authors' code. part: from RunFolder.part. -> CamNet, whose classes are `objects`"""
    everything = range(len(data.train))
    share = math.ceil(16 / ctx.world)  # a process's images per step: 16 in all, as in the code
    steps = cfg.weak_epochs * math.ceil(len(everything) / (share * ctx.world))
    torch.manual_seed(mix(cfg.seed, "init", part.path.name))
    net = CamNet(cfg.backbone, cfg.backbone_layers, len(objects), cfg.weights != "none", cfg.stem)
    if part.is_new:
        load_weights(net.body, cfg.backbone, cfg.weights, ctx.say)
    net = ctx.place(net)
    body = [p for p in net.body.parameters() if p.requires_grad]
    groups = [dict(params=body, lr_mult=1.0),
              dict(params=list(net.classifier.parameters()), lr_mult=10.0)]
    optimizer = torch.optim.SGD(groups, cfg.weak_lr, weight_decay=1e-4, fused=True)
    step = part.resume(share * ctx.world, steps, net=net, optimizer=optimizer, scaler=ctx.scaler)
    wrapped = ctx.wrap(net, cfg.compile)
    transform = partial(augment_tagged, augment=augment, objects=objects)
    stream = Stream(tags, everything, transform, cfg.seed, part.path.name, True)
    batches = endless(stream, share, step, cfg.workers, ctx)
    ctx.say(f"{ctx}; {data.name}: classifier of the tags of {len(everything)} images, {steps} "
            f"steps")
    net.train()
    while step < steps:
        part.stop_if_asked(step)
        lr = cfg.weak_lr * poly(step, steps)
        set_lr(optimizer, lr)
        with part.log.waiting():
            x, t = next(batches)
        optimizer.zero_grad()
        with ctx.autocast():
            logits = wrapped(x)
        loss = F.binary_cross_entropy_with_logits(logits.float(), t.float())
        ctx.scaler.scale(loss).backward()
        ctx.scaler.step(optimizer)
        ctx.scaler.update()
        step += 1
        part.log.add(step, loss_tags=loss, lr=lr)
        if step % cfg.save_every == 0 or step == steps:
            part.save(step)
    part.log.curves()
    part.log.close()
    return net.eval()


def activation_maps(net, x, present):
    """The sum over scales and mirror images, divided by each map's maximum: [n, H, W] in 0..1

    x [1, 3, H, W]; present: the n classes of the image, as its tags say, int64 [n].
    """
    size = x.shape[2:]
    total = x.new_zeros(len(present), *size)
    for scale in (1, 0.5, 1.5, 2) if len(present) else ():
        scaled = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        maps = net.maps(scaled) + net.maps(scaled.flip(3)).flip(3)
        maps = maps[:, present].float()
        total = total + F.interpolate(maps, size, mode="bilinear", align_corners=False)[0]
    return total / (total.amax((1, 2), keepdim=True) + 1e-5)


def pseudo_label(maps, classes, background, thresholds, image=None):
    """Sec. 3.3: the class of the largest map where it is above the foreground threshold, background
    where all are below the background threshold, else 255. -> uint8 [H, W]

    maps [n, H, W] of these classes, int64 [n]; background: a class, or 255. thresholds: of the
    background and of the foreground, 0.05 and 0.3. image: uint8 [H, W, 3]; with it a dense CRF
    first refines the labels that either threshold alone gives, as in the authors' code.
    """
    labels = []
    for threshold in thresholds:
        scores = torch.cat([maps.new_full((1, *maps.shape[1:]), threshold), maps])
        label = scores.argmax(0)  # 0: background; k: classes[k - 1]
        if image is not None and len(maps):
            label = dense_crf(image, unary_of_labels(label, len(scores))).argmax(0)
        labels.append(label)
    low, high = labels
    ids = torch.cat([classes.new_tensor([background]), classes])
    return torch.where(high > 0, ids[high], torch.where(low == 0, background, 255)).byte()


@torch.no_grad()
def write_pseudo_label(i, net, pseudo, tags, objects, palette, cfg, ctx):
    """Write y_p of training image i (Sec. 3.3) at the image's size. It is computed at --size; or,
    without one, at the image's size, its longer side reduced to 1024 pixels"""
    image, _ = T.to_tensors(tags.image(i))
    size = image.shape[1:]
    if cfg.size:
        image, _ = T.resize(image, None, cfg.size)
    elif max(size) > 1024:
        image, _ = T.resize_long_side(image, None, 1024)
    present = torch.from_numpy(tags.mask(i)[objects]).nonzero()[:, 0].to(ctx.device)
    x = to_device(image[None], ctx.device)
    with ctx.autocast():
        maps = activation_maps(net, x, present)
    rgb = image.permute(1, 2, 0).to(ctx.device) if cfg.crf else None
    classes = torch.tensor(objects, device=ctx.device)[present]
    background = cfg.background[0] if cfg.background else T.IGNORE
    label = pseudo_label(maps, classes, background, cfg.thresholds, rgb).cpu()
    _, label = T.resize(image, label, size)
    save_mask(label.numpy(), palette, pseudo.path(i))


def weak_labels(domain, augment, part, ctx):
    """Sec. 3.3: pseudo-labels of a Domain's unlabelled images from image-level tags, made once, in
    a part of a run's folder. -> the training images with these labels as masks, for Stream

    augment: transform of the classifier's images. domain.cfg: a script's settings; background,
    backbone, backbone_layers, compile, crf, save_every, seed, size, stem, tags, thresholds,
    weak_epochs, weak_lr, weights and workers count.
    """
    cfg = domain.cfg
    data = domain.data
    finished = part.path / "finished.pt"
    pseudo = PseudoLabelled(data, part.path / "pseudo")
    origin = dict(images=data.train.fingerprint,
                  tags=sha1(Path(cfg.tags).read_bytes()).hexdigest() if cfg.tags else "")
    if finished.exists():
        if checkpoint.load(finished) != origin:
            raise UserError(f"{pseudo.folder} holds the pseudo-labels of other images than those "
                            f"of {data.name} in --root {cfg.root}, or of other --tags: choose "
                            f"another folder with --out")
        return pseudo
    tags = domain.tags
    objects = [c for c in range(len(data.classes)) if c not in cfg.background]
    if part.is_new and ctx.main:
        shutil.rmtree(pseudo.folder, ignore_errors=True)  # other weights wrote them
    net = train_classifier(data, tags, objects, augment, part, cfg, ctx)
    part.catch_signals(False)  # a kill here loses nothing: the command goes on writing
    make = partial(write_pseudo_label, net=net, pseudo=pseudo, tags=tags, objects=objects,
                   palette=data.palette, cfg=cfg, ctx=ctx)
    pseudo.write(make, domain.unlabelled, cfg.workers, ctx)
    confusion, share, rows = pseudo.compare(domain.unlabelled, ctx)
    if rows and ctx.main:
        ctx.say(confusion.table(data.classes))
        ctx.say(f"pseudo-labels: {100 * share:.0f} % of the pixels have one; on these mIoU "
                f"{100 * confusion.miou():.1f}; {part.path / 'pseudo.png'}")
        titles = ("image", "truth", "pseudo-labels")
        save_picture(prediction_panel(rows, data.palette, data.classes, titles),
                     part.path / "pseudo.png")  # Fig. 9
    if ctx.main:
        checkpoint.save(finished, origin)
    part.catch_signals()
    part.parts = {}  # frees the network's memory
    ctx.new_scaler()
    ctx.barrier()
    return pseudo
