"""What a trained network is used for: examples for the panel of a run, predictions for a folder."""
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.datasets import bdd100k, cityscapes, voc
from common.datasets.masks import IMAGE_SUFFIXES, find_files, read_image
from common.files import make_folder
from common.pictures import save_mask, save_picture
from common.settings import UserError, say
from common.smoothness import smoothness_picture
from common.streams import once, to_device
from common.transforms import centre_square, denormalise, for_scoring

SERVERS = {  # --format: the names that the test server knows, and the palette of its classes
    "voc": (voc.KEY, voc.voc_palette()[:21]),
    "cityscapes": (cityscapes.KEY, cityscapes.PALETTE),
    "bdd100k": (bdd100k.KEY, cityscapes.PALETTE),
}


class Examples:
    """Six images spread over this process's share of the scored split, with truth and prediction.

    rows: list of [image uint8 [H, W, 3], truth [H, W], prediction [H, W]], numpy.
    """

    def __init__(self, count, ctx):
        self.every = max(1, len(range(ctx.rank, count, ctx.world)) // 6)
        self.seen = 0
        self.rows = []

    def add(self, x, y, prediction):
        """The next batch: normalised images [B, 3, H, W], masks and predictions [B, H, W]"""
        for image, truth, predicted in zip(x, y, prediction):
            if self.seen % self.every == 0 and len(self.rows) < 6:
                image = (255 * denormalise(image)).round().clamp(0, 255).permute(1, 2, 0)
                self.rows.append([part.byte().cpu().numpy() for part in (image, truth, predicted)])
            self.seen += 1


def scored_batches(data, cfg, ctx):
    """Iterator of (images, masks) of the scored split, each image once: at its own size, cfg.size
    or as its central square, as cfg.eval_size says; in batches if all have one size"""
    one_size = cfg.eval_size != "full" or data.one_size
    transform = partial(for_scoring, size=cfg.scoring_size)
    if cfg.eval_size == "centre":
        transform = partial(centre_square, side=512)
    return once(data.val, transform, cfg.batch if one_size else 1, cfg.workers, ctx)


def predict_folder(network, cfg, palette, ctx):
    """Predict every image below cfg.images, shared out over the processes, into the folder cfg.out,
    or `predictions` beside the checkpoint cfg.predict.

    network: images [1, 3, H, W] -> logits [1, C, H, W]; for cfg.format smoothness -> features.
    palette: uint8 tensor [C, 3].
    cfg.scoring_size: (H, W) to which images are resized; None: they keep their own.
    cfg.format: what is written, see `targets_of` and `save_prediction`.
    If an image cannot be read, the others are predicted; a UserError at the end names it.
    """
    palette = palette.cpu().numpy()
    out = Path(cfg.out or Path(cfg.predict).parent / "predictions")
    targets = targets_of(cfg.images, out, cfg.format, palette)
    make_folder(out)
    paths = list(targets)
    failed = torch.zeros(len(paths), device=ctx.device)
    mine = range(ctx.rank, len(paths), ctx.world)
    every = max(10, len(mine) // 10)
    torch.backends.cudnn.benchmark = False  # images have many sizes
    for count, i in enumerate(mine, 1):
        try:
            image = read_image(paths[i], upright=True)
            x, _ = for_scoring(image, None, cfg.scoring_size)
            x = to_device(x[None], ctx.device)
            if cfg.format == "smoothness":
                picture = Image.fromarray(smoothness_picture(image, x, network(x)))
                save_picture(picture, targets[paths[i]])
            else:
                size = (1024, 2048) if cfg.format == "cityscapes" else image.shape[:2]
                save_prediction(label_map(network(x), size), palette, targets[paths[i]], cfg.format)
        except (UserError, OSError) as error:
            say(error)
            failed[i] = 1
        if count % every == 0:
            ctx.say(f"predicted {100 * count // len(mine)} % of {len(paths)} images")
    lost = [path for path, is_lost in zip(paths, ctx.sum(failed).tolist()) if is_lost]
    ctx.say(f"{len(paths) - len(lost)} predictions in {out}")
    if lost:
        raise UserError(f"--images {cfg.images}: {len(lost)} of {len(paths)} images could not be "
                        f"predicted: {', '.join(lost)}")


def label_map(logits, size):
    """Logits [1, C, h, w], resized if they have another size -> class ids, uint8 [H, W]"""
    if logits.shape[2:] != size:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    return logits.argmax(1)[0].byte().cpu().numpy()


def targets_of(images, out, form, palette):
    """{image: file of its prediction}, sorted. Predictions keep the images' tree of folders, unless
    the test server wants one folder. Raises UserError if names or classes do not fit the server, or
    if a prediction would overwrite an image or another prediction."""
    found = find_files(images, IMAGE_SUFFIXES, with_folders=True)
    if not found:
        raise UserError(f"--images {images or '(not given)'}: expected a folder with images "
                        f"({', '.join(IMAGE_SUFFIXES)}) to predict")
    folders = [Path(os.path.realpath(folder)) for folder in (images, out)]
    if folders[0].is_relative_to(folders[1]) or folders[1].is_relative_to(folders[0]):
        raise UserError(f"--out {out}: expected a folder that is not in --images {images} and "
                        f"does not contain it, so that no image is overwritten")
    key_pattern, classes = SERVERS.get(form, ("", palette))
    if not np.array_equal(palette, classes):
        raise UserError(f"--format {form} is for its {len(classes)} classes, but the network of "
                        f"this checkpoint has learned {len(palette)} others")
    targets, keys = {}, {}
    for name, path in sorted(found.items()):
        match = re.search(key_pattern, Path(name).name)
        if not match:
            raise UserError(f"{path}: --format {form} expected the name of one of its images")
        key = match[0] or name
        if key in keys:
            raise UserError(f"{path} and {keys[key]}: --format {form} takes one of them only")
        keys[key] = path
        places = {"voc": f"results/VOC2012/Segmentation/comp6_test_cls/{key}", "bdd100k": key}
        targets[path] = out / f"{places.get(form, name)}.png"
    inputs = {os.path.realpath(path) for path in found.values()}
    if hit := [path for path in targets.values() if os.path.realpath(path) in inputs]:
        raise UserError(f"--out {out}: {hit[0]} is one of the images, and would be overwritten")
    return targets


def save_prediction(ids, palette, path, form):
    """ids uint8 [H, W] as a palette PNG; in gray for bdd100k (trainIds) and cityscapes (7..33)."""
    if form == "cityscapes":
        ids = np.array([kind.id for kind in cityscapes.TRAINED], np.uint8)[ids]
    if form in ("cityscapes", "bdd100k"):
        save_picture(Image.fromarray(ids), path)
    else:
        save_mask(ids, palette, path)
