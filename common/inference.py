"""Pictures and files made with a trained network: the panel of a run, and predictions for a folder of images."""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.pictures import prediction_panel, save_mask
from common.settings import UserError
from common.streams import to_device
from common.transforms import ForScoring, denormalise


def panel(predict, data, size, device, count=6):
    """Picture of image | truth | prediction for `count` images spread over the scored split.

    predict: images [1, 3, H, W] -> logits [1, C, H, W]; size: (H, W) at which images are scored, None for their own.
    """
    rows = []
    for i in np.linspace(0, len(data.val) - 1, min(count, len(data.val))).astype(int):
        image, mask = ForScoring(size)(data.val.image(i), data.val.mask(i))
        prediction = predict(to_device(image[None], device)).argmax(1)[0]
        rows.append((denormalise(image), mask.numpy(), prediction.byte().cpu().numpy()))
    return prediction_panel(rows, data.palette, data.classes)


def predict_folder(predict, images, out, palette, size, device):
    """Write a palette PNG of class ids, at the image's own size, for every image of a folder. -> their number

    Where `size` is set, images are resized to it, and their logits (not their labels) back.
    """
    paths = sorted(p for p in Path(images).glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp"))
    if not images or not paths:
        raise UserError(f"--images {images or '(not given)'}: expected a folder with .jpg, .png or .bmp images to predict")
    if len({p.stem for p in paths}) < len(paths):
        raise UserError(f"--images {images}: two images differ in nothing but their suffix, and so would their predictions")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        with Image.open(path) as file:
            image = np.array(file.convert("RGB"))
        x, _ = ForScoring(size)(image, None)
        logits = predict(to_device(x[None], device))
        if logits.shape[2:] != image.shape[:2]:
            logits = F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)
        save_mask(logits.argmax(1)[0].byte().cpu().numpy(), palette.cpu().numpy(), out / f"{path.stem}.png")
    return len(paths)
