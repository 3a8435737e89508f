"""Benchmark of the real training commands: speed, peak memory and data wait.

    python tests/bench.py --size 320 160    cct.py, ResNet-50, 2 + 2 images of these sizes
    python tests/bench.py --script s4gan_mlmt.py --backbone resnet101 --size 321
    python tests/bench.py --images 20 --size 320 --precision bf16 --steps 60 --workers 4
    python tests/bench.py --loader          what the images of a step cost the CPU, for all scripts
    python tests/bench.py --decoders        cct.py's decoders, one by one (Table 13)

Each row runs the script in a process of its own on random images of 21 classes, reads its log.csv
(first interval left out), and its peak memory (on the CPU the process's largest resident set). The
method and its supervised baseline train the network on the same number of images per step. Flags
that the benchmark does not know go to the script.
"""
import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import c3_semiseg  # noqa: E402
import cct  # noqa: E402
import s4gan_mlmt as s4  # noqa: E402
import three_stage  # noqa: E402
from common.cache import cached  # noqa: E402
from common.datasets import open_dataset  # noqa: E402
from common.datasets.pseudo import mask_path  # noqa: E402
from common.datasets.tags import Tagged  # noqa: E402
from common.regions import find_blobs  # noqa: E402
from common.runtime import Runtime  # noqa: E402
from common.streams import Stream, endless  # noqa: E402

SCRIPTS = {  # flags of a script; of its semi-supervised step on N images, half of them unlabelled
    "cct.py": ("--long-side {size} --scale 1 1", "--batch {half}"),
    "s4gan_mlmt.py": ("--branch s4gan --scale 1 1", "--batch {half}"),
    "c3_semiseg.py": ("--long-side {size} --scales 1 1 1 --groups 1", "--batch {half} --burn-in 0"),
    "three_stage.py": ("--scale 1 1 --bn frozen",
                       "--batch {images} --stages 2 --masks {root}/masks"),
}
ON_DISK = {"voc": (375, 500, "jpg"), "cityscapes": (1024, 2048, "png")}
LOADER = (  # rows of --loader: method, its script, preset
    ("cct", cct, "voc"), ("three_stage", three_stage, "voc"),
    ("three_stage", three_stage, "cityscapes"), ("c3_semiseg", c3_semiseg, "cityscapes"),
    ("s4gan", s4, "voc"), ("s4gan", s4, "cityscapes"), ("mlmt", s4, "voc"))


def make_data(root, height, width, ending="jpg", count=24, classes=21):
    """A folder dataset of coloured clouds with some noise, whose masks are blocks of classes."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 2)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(number):
            clouds = Image.fromarray(rng.integers(0, 256, (8, 16, 3), dtype=np.uint8))
            image = np.array(clouds.resize((width, height), Image.BICUBIC), np.int16)
            image = image + rng.integers(-4, 5, image.shape)
            image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
            image.save(root / f"images/{split}/{i:03d}.{ending}")
            cells = rng.integers(0, classes, (height // 16 + 1, width // 16 + 1), dtype=np.uint8)
            mask = Image.fromarray(cells.repeat(16, 0).repeat(16, 1)[:height, :width])
            mask.save(root / f"masks/{split}/{i:03d}.png")
    (root / "classes.txt").write_text("".join(f"class{c}\n" for c in range(classes)))


def measure(script, flags, every):
    """Run the script. -> steps per second, share of the time that they wait for data, peak memory
    in GB. every: steps of an interval, of which the first does not count"""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*flags, "--log-every", every, "--out", folder]
        command = [sys.executable, script, *map(str, flags)]
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
            output.seek(0)
            if status:
                raise SystemExit(f"{' '.join(command)}\n{output.read()}")
        with open(next(Path(folder).rglob("log.csv"))) as file:
            rows = [row for row in csv.DictReader(file) if row["images_per_s"]][1:]
    steps_per_s = every * len(rows) / sum(float(row["seconds"]) for row in rows)
    wait = sum(float(row["data_wait"]) for row in rows) / len(rows)
    gpu = [float(row["gpu_gb"]) for row in rows if row.get("gpu_gb")]
    return steps_per_s, wait, max(gpu) if gpu else usage.ru_maxrss / 2 ** 20


def batches_of(name, script, cfg, data, root, ctx):
    """The iterators of a training step's batches"""
    labelled, unlabelled = [0, 1], [*range(2, len(data.train))]
    if name == "cct":
        domain = SimpleNamespace(cfg=cfg, data=data, number=0, labelled=labelled,
                                 unlabelled=unlabelled, pseudo=None)
        return cct.streams(domain, 0, ctx)
    if name == "three_stage":
        for i, path in enumerate(data.train.masks):
            pseudo = mask_path(root / "pseudo", data.train, i)
            pseudo.parent.mkdir(parents=True, exist_ok=True)
            mask = Image.open(path)
            mask.resize(cfg.size[::-1] if cfg.size else mask.size, Image.NEAREST).save(pseudo)
        minibatches = three_stage.Minibatches(data, labelled, 1, root / "pseudo", 2, cfg)
        return [endless(minibatches, cfg.batch, 0, 0, ctx)]
    if name == "mlmt":
        tagged = Tagged(data, labelled)
        stream_l = Stream(tagged, labelled, partial(s4.two_views, cfg), 0, "labelled", True)
        stream_u = Stream(tagged, unlabelled, partial(s4.two_views, cfg), 0, "unlabelled", False)
        return [endless(stream_l, cfg.mlmt_batch, 0, 0, ctx),
                endless(stream_u, cfg.mlmt_batch_u, 0, 0, ctx)]
    return script.streams(data, labelled, unlabelled, 0, cfg, ctx)


def loader(steps):
    """What one core needs for the images of a step of the published setting, decoded anew, and from
    the cache of decoded ones. Workers, whose number is for each stream, share the work."""
    ctx = Runtime("cpu")
    ctx.device = torch.device("meta")  # what a GPU would do is not counted
    print("| | ms per step on one core, stream by stream | with the cache |\n|--|--|--|")
    for name, script, preset in LOADER:
        with tempfile.TemporaryDirectory() as root:
            make_data(Path(root), *ON_DISK[preset], count=8)
            columns = []
            for cache in ("none", f"{root}/cache"):
                cfg = script.Config(**script.PRESETS[preset] | dict(workers=0, cache=cache))
                quiet = SimpleNamespace(say=lambda text: None)
                data = cached(open_dataset("folder", root), cfg.size, cfg, quiet)
                times = []
                for batches in batches_of(name, script, cfg, data, Path(root), ctx):
                    for _ in range(3):  # all images are in the cache then
                        next(batches)
                    start = time.perf_counter()
                    for _ in range(steps):
                        next(batches)
                    times.append(f"{1000 * (time.perf_counter() - start) / steps:.0f}")
                columns.append(" + ".join(times))
        if not cfg.size:
            columns[1] = ""
        print(f"| {name}, {preset} | {' | '.join(columns)} |", flush=True)


def forward(call, ctx, repeats=5):
    """-> (median time of a call in ms, MB of tensors that it keeps for the backward pass)"""
    times, kept = [], {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    for _ in range(1 + repeats):
        kept.clear()
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = call()
        if ctx.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
        del output
    return statistics.median(times[1:]), sum(kept.values()) / 2 ** 20


def decoders(precision, channels=512, classes=21):
    """Table 13: the main decoder, and each type of auxiliary ones, on one z of two sizes. The blobs
    of G-Cutout, found once for all decoders of a step, have a row of their own."""
    ctx = Runtime("auto", precision)
    torch.backends.cudnn.benchmark = True  # as in a training
    print(f"{ctx}, z of {channels} channels, {classes} classes")
    print("| decoder | z | MB kept | ms |\n|--|--|--|--|")
    for height, width in ((96, 96), (256, 128)):
        z = torch.rand(1, channels, height, width, device=ctx.device)
        z = z.to(memory_format=torch.channels_last).requires_grad_()
        main = ctx.place(cct.Decoder(channels, classes))
        coarse = (torch.rand(1, 1, 6, 6, device=ctx.device) > 0.6).float()
        objects = F.interpolate(coarse, (8 * height, 8 * width))[:, 0] > 0
        guides = objects, find_blobs(objects)

        def clean(main=main, z=z):
            with ctx.autocast():
                return main(z)
        rows = {"main": clean, "find_blobs": lambda: find_blobs(objects)[0]}
        for name in cct.PERTURBATIONS:
            cfg = cct.Config(k=1, perturbations=(name,))
            auxiliary = ctx.place(cct.Auxiliary(cfg, channels, classes))
            arguments = (0, auxiliary, z, guides, 0, cfg, ctx)
            rows[name] = lambda arguments=arguments: cct.auxiliary_logits(*arguments)
        for name, call in rows.items():
            ms, megabytes = forward(call, ctx)
            print(f"| {name} | {height}x{width} | {megabytes:.0f} | {ms:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--script", default="cct.py", choices=SCRIPTS)
    parser.add_argument("--size", type=int, nargs="+", default=[320, 160], help="of square images")
    parser.add_argument("--images", type=int, default=4, help="per step, half of them unlabelled")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--loader", action="store_true", help="time the reading of images instead")
    parser.add_argument("--decoders", action="store_true", help="time cct.py's decoders instead")
    args, others = parser.parse_known_args()
    print("bench.py", *sys.argv[1:], flush=True)
    if args.loader:
        loader(args.steps)
        return
    if args.decoders:
        decoders(args.precision)
        return
    print("| script | images x size | precision | images/s | steps/s | peak GB | data wait | "
          "step time, times supervised |\n" + 8 * "|--" + "|")
    for size in args.size:
        with tempfile.TemporaryDirectory() as root:
            make_data(Path(root), size, size)
            values = dict(size=size, images=args.images, half=args.images // 2, root=root)
            common, semi = (text.format(**values).split() for text in SCRIPTS[args.script])
            flags = ["--data", "folder", "--root", root, "--labeled", 12, "--weights", "none",
                     "--crop", size, "--backbone", "resnet50", "--precision", args.precision,
                     "--workers", 0, "--save-every", 10**6, "--eval-every", 10**6,
                     "--steps", args.steps, *common, *others]
            every = max(2, args.steps // 5)
            method = measure(args.script, [*flags, *semi], every)
            baseline = measure(args.script, [*flags, "--batch", args.images, "--supervised"], every)
        for name, row in ((args.script, method), (f"{args.script} --supervised", baseline)):
            speed, wait, memory = row
            print(f"| {name} | {args.images} x {size} | {args.precision} | "
                  f"{args.images * speed:.2f} | {speed:.3f} | {memory:.2f} | {100 * wait:.0f}% | "
                  f"{baseline[0] / speed:.2f} |", flush=True)


if __name__ == "__main__":
    main()
