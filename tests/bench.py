"""Benchmark of the real training commands: speed, peak memory and data wait, printed as the README's table.

    python tests/bench.py                                   # cct.py, ResNet-50, 2+2 images of 320x320 and 160x160, fp32
    python tests/bench.py --script s4gan_mlmt.py --backbone resnet101 --size 321
    python tests/bench.py --images 20 --size 320 --precision bf16 fp32 --steps 60 --workers 4

Each row runs the script in a process of its own on random images of 21 classes, reads its log.csv (first interval left
out), and its peak memory from the system (the process's largest resident set on the CPU, allocated memory on CUDA).
The semi-supervised row and the supervised one train the network on the same number of images per step.
"""
import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {  # flags of a script, of its semi-supervised step on N images (half of them unlabelled), of the supervised one
    "cct.py": ("--decoder-init icnr --long-side {size} --scale 1 1", "--batch {half}", "--batch {images}"),
    "s4gan_mlmt.py": ("--branch s4gan --scale 1 1 --bn affine", "--batch {half}", "--batch {images}"),
    "c3_semiseg.py": ("--long-side {size} --scales 1 1 1 --bn frozen --groups 1", "--batch {half} --burn-in 0",
                      "--batch {images}"),
    "three_stage.py": ("--scale 1 1 --bn frozen --batch {images}", "--stages 2 --masks {root}/masks", "--stages 1"),
}


def make_data(root, size, count=24, classes=21):
    """A folder dataset of random images whose masks are blocks of classes."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 2)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(number):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(root / f"images/{split}/{i:03d}.jpg")
            mask = rng.integers(0, classes, (size // 16, size // 16), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
            Image.fromarray(mask).save(root / f"masks/{split}/{i:03d}.png")
    (root / "classes.txt").write_text("".join(f"class{c}\n" for c in range(classes)))


def measure(script, flags, steps, every, images):
    """Run the script, whose steps read so many images. -> dict of steps per second, data-wait share and peak memory in GB"""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, *map(str, flags), "--steps", str(steps), "--log-every", str(every),
                   "--save-every", str(10 ** 9), "--eval-every", str(10 ** 9), "--out", f"{folder}/run"]
        with open(f"{folder}/output", "w+") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
            output.seek(0)
            if status:
                raise SystemExit(f"{' '.join(command)}\n{output.read()}")
        with open(f"{folder}/run/log.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["images_per_s"]][1:]
    steps_per_s = len(rows) / sum(images / float(row["images_per_s"]) for row in rows)
    gpu = [float(row["gpu_gb"]) for row in rows if row["gpu_gb"]]
    return dict(steps_per_s=steps_per_s, wait=sum(float(row["data_wait"]) for row in rows) / len(rows),
                gb=max(gpu) if gpu else usage.ru_maxrss / 2 ** 20)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--script", default="cct.py", choices=SCRIPTS)
    parser.add_argument("--size", type=int, nargs="+", default=[320, 160], help="side of the square images")
    parser.add_argument("--images", type=int, default=4, help="images per step, half of them unlabelled")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0, help="data processes per stream")
    parser.add_argument("extra", nargs="*", help="further flags of the script, after --")
    args = parser.parse_args()
    every = max(2, args.steps // 5)
    print("| script | images x size | precision | images/s | steps/s | peak GB | data wait | step time, times supervised |")
    print("|--|--|--|--|--|--|--|--|")
    for size in args.size:
        with tempfile.TemporaryDirectory() as root:
            make_data(Path(root), size)
            common, semi, supervised = (text.format(size=size, images=args.images, half=args.images // 2, root=root).split()
                                        for text in SCRIPTS[args.script])
            for precision in args.precision:
                flags = ["--data", "folder", "--root", root, "--labeled", 12, "--weights", "none", "--crop", size, "--backbone",
                         args.backbone, "--precision", precision, "--device", args.device, "--workers", args.workers,
                         *common, *args.extra]
                read = args.images * 3 // 2 if args.script == "s4gan_mlmt.py" else args.images  # D sees other true maps
                baseline = measure(args.script, [*flags, *supervised, "--supervised"], args.steps, every, args.images)
                method = measure(args.script, [*flags, *semi], args.steps, every, read)
                for name, row in ((args.script, method), (f"{args.script} --supervised", baseline)):
                    print(f"| {name} | {args.images} x {size} | {precision} | {args.images * row['steps_per_s']:.2f} | "
                          f"{row['steps_per_s']:.3f} | {row['gb']:.2f} | {100 * row['wait']:.0f}% | "
                          f"{baseline['steps_per_s'] / row['steps_per_s']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
