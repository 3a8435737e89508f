"""Whole runs of all scripts: exact resume, processes, signals, flags, the files of a run folder."""
import contextlib
import errno
import fcntl
import importlib
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (ROOT, SCRIPTS, STEPS, column, end, last, run_here, run_script, same_run, same_state,
                      start_script, steps_done, wait_for)
from PIL import Image

import cct
import fixtures
from common import checkpoint
from common.datasets.shapes import open_shapes
from common.runtime import Runtime
from common.settings import UserError
from common.streams import Stream, endless
from common.transforms import to_tensors

each_script = pytest.mark.parametrize("script", SCRIPTS)


@each_script
def test_run_folder_and_output(whole, script):
    folder, output, _ = whole(script)
    files = {"config.json", "log.csv", "last.pt", "best.pt", "curves.png", "predictions.png"}
    assert files <= set(os.listdir(folder)) and not list(folder.rglob("*.tmp"))
    final = output.strip().splitlines()[-1]
    assert final.startswith("final: mIoU ") and final.endswith(str(folder))
    assert "tall tree" in output and "pixel accuracy" in output  # the per-class table
    assert steps_done(folder) == STEPS[script]


@each_script
def test_finished_run_is_not_trained_again(whole, tiny, capsys, script):
    folder, output, _ = whole(script)
    before = {path: path.read_bytes() for path in folder.rglob("log.csv")}
    state = last(folder)
    run_here(script, *tiny[script], "--out", folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("log.csv")}
    assert capsys.readouterr().out.strip().splitlines()[-1] == output.strip().splitlines()[-1]
    assert same_state(state, last(folder))


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_a_signal_and_then_kill_9_then_resume_is_bit_equal(whole, tiny, tmp_path, script):
    """The signal as torchrun, Slurm or a closed terminal send it, to the loader's workers too. The kill falls
    between steps, inside them or inside saves (a checkpoint is written after every step)."""
    folder = tmp_path / "run"
    for number, every in ((signal.SIGTERM, 100), (signal.SIGKILL, 1)):
        done = steps_done(folder)
        process = start_script(script, *tiny[script], "--save-every", every, "--workers", 1, "--out", folder)
        wait_for(lambda: process.poll() is not None or steps_done(folder) > done + 1)
        time.sleep(random.Random(script).uniform(0, 0.1) * (number == signal.SIGKILL))
        output = end(process, number)
        if number == signal.SIGTERM:
            assert process.returncode == 143 and "stopped by a signal" in output and "Traceback" not in output
    run_here(script, *tiny[script], "--out", folder)
    same_run(whole(script)[0], folder)


def test_deaths_in_each_phase_of_weak_labels_then_resume_is_bit_equal(tiny, folder_data, tmp_path):
    """By kill -9 while the classifier trains, beside a pseudo-label of one that is gone, and while pseudo-labels
    are written; in the training with them by a signal, to which it listens again"""
    tags = shutil.copy(folder_data / "tags.txt", tmp_path)
    arguments = [*tiny["cct"], "--weak", "--tags", tags, "--weak-epochs", 5]
    run_here("cct", *arguments, "--out", tmp_path / "whole")
    assert min(Image.open(tmp_path / "whole/weak/pseudo.png").size) > 200
    folder = tmp_path / "run"
    fixtures.save_gray(folder / "weak/pseudo/unlabeled/new0.png", np.ones((5, 6)))
    for number, reached in ((signal.SIGKILL, lambda: steps_done(folder) > 3),
                            (signal.SIGKILL, lambda: list((folder / "weak/pseudo").rglob("*.png"))),
                            (signal.SIGHUP, lambda: (folder / "last.pt").exists())):
        process = start_script("cct", *arguments, "--workers", 1, "--out", folder)
        wait_for(lambda: process.poll() is not None or reached())
        output = end(process, number)
    assert process.returncode == 143 and "saved at step" in output and "Traceback" not in output
    finished = (folder / "weak/finished.pt").stat().st_mtime
    run_here("cct", *arguments, "--out", folder)
    same_run(tmp_path / "whole", folder)
    assert (folder / "weak/finished.pt").stat().st_mtime == finished  # a phase that is done is not repeated
    with pytest.raises(UserError, match="is a classifier, which segments nothing"):
        run_here("cct", "--evaluate", folder / "weak/last.pt")
    with open(tags, "a") as file:
        file.write("# edited\n")
    with pytest.raises(UserError, match="or of other --tags"):
        run_here("cct", *arguments, "--out", folder)


def test_a_crash_with_workers_ends_the_process():
    """Workers do not get the SIGTERM with which Python would end them, and then wait for them."""
    code = ("from common.datasets.shapes import open_shapes; from common.runtime import Runtime\n"
            "from common.streams import Stream, endless; from common.transforms import to_tensors\n"
            "stream = Stream(open_shapes().val, range(9), lambda x, y, rng: to_tensors(x, y), 0, 's', True)\n"
            "batches = endless(stream, 2, 0, 2, Runtime('cpu'))\n"
            "next(batches); raise RuntimeError('crash')")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, stderr=subprocess.PIPE)
    assert process.returncode == 1 and b"RuntimeError: crash" in process.stderr


def test_signals_are_blocked_in_workers_from_their_birth_on(monkeypatch):
    """A worker that is told to end before it could say that it will not, would end the run with it."""
    fork, seen = os.fork, []

    def forked():
        seen.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return fork()
    monkeypatch.setattr(os, "fork", forked)
    multiprocessing.set_start_method("forkserver", force=True)  # the default of Python 3.14
    stream = Stream(open_shapes().val, range(9), lambda x, y, rng: to_tensors(x, y), 0, "s", True)
    try:
        next(endless(stream, 2, 0, 2, Runtime("cpu")))
    finally:
        multiprocessing.set_start_method(None, force=True)  # Python's own default again
    assert len(seen) == 2
    assert all({signal.SIGTERM, signal.SIGHUP, signal.SIGINT} <= mask for mask in seen)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_signal_to_torchrun_saves(tiny, tmp_path):
    folder = tmp_path / "run"
    arguments = [*tiny["cct"], "--steps", 4000, "--save-every", 10000, "--workers", 1, "--out", folder]
    process = start_script("cct", *arguments, processes=2)
    wait_for(lambda: steps_done(folder) > 1)
    output = end(process, signal.SIGTERM)
    assert "saved at step" in output and "is killed by signal" not in output
    assert 1 < last(folder)["step"] < 4000


def test_a_terminal_that_lacks_a_letter_does_not_end_the_run():
    code = r"from common.settings import say; say('\u4e2d'); say('y')"
    environment = os.environ | dict(PYTHONIOENCODING="latin-1")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment) == b"?\ny\n"


@pytest.mark.parametrize("make", [os.pipe, os.openpty])
def test_a_reader_that_goes_away_does_not_end_the_run(make):
    """`| head -1`, or a terminal that is closed"""
    code = "import sys; from common.settings import say; say('x'); sys.stdin.read(); say('y'); say('z')"
    reader, writer = make()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=writer, stderr=-1)
    os.close(writer)
    os.read(reader, 9)
    os.close(reader)
    process.stdin.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""


def test_folders_that_cannot_be_made_or_written_are_told(tmp_path, whole, tiny, folder_data, monkeypatch):
    (tmp_path / "file").write_text("mine")
    predict = ["--predict", whole("cct")[0] / "last.pt", "--images", folder_data / "images/val"]
    evaluate = ["--evaluate", whole("s4gan_mlmt")[0] / "mlmt/last.pt"]
    for script, flags in (("cct", tiny["cct"]), ("cct", predict), ("s4gan_mlmt", evaluate)):
        with pytest.raises(UserError, match="file/run: cannot make this folder"):
            run_here(script, *flags, "--out", tmp_path / "file/run")
    monkeypatch.setattr(os, "access", lambda *_: False)  # chmod would not keep root from writing
    with pytest.raises(UserError, match="run: this folder is read-only"):
        run_here("cct", *tiny["cct"], "--out", tmp_path / "run")


@contextlib.contextmanager
def room(size):
    """As on a full disk, no file may have more bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_files_without_room_are_told_and_the_old_ones_stay(tmp_path, tiny, folder_data, capsys):
    for size, name in ((9, "config.json"), (2000, "last.pt"), (1_000_000, "last.pt")):
        with room(size), pytest.raises(UserError, match=f"{name} cannot be written .*File too large"):
            run_here("cct", *tiny["cct"], "--out", tmp_path / "run")
    run_here("cct", *tiny["cct"], "--out", tmp_path / "run")  # with room it runs
    with room(100_000), pytest.raises(UserError, match="last.pt cannot be written .*File too large"):
        checkpoint.save(tmp_path / "run/last.pt", dict(big=torch.zeros(1_000_000)))
    assert last(tmp_path / "run")["step"] == 6
    images = folder_data / "images/val"
    with room(99), pytest.raises(UserError, match="2 of 2 images could not be predicted"):
        run_here("cct", "--predict", tmp_path / "run/last.pt", "--images", images, "--out", tmp_path / "p")
    assert "img0.png cannot be written" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_scored_mask_of_another_size_is_told_before_training(tmp_path, tiny):
    root = fixtures.make_folder(tmp_path / "data")
    path = next((root / "masks/val").rglob("*.png"))
    Image.new("L", (6, 5)).save(path)
    with pytest.raises(UserError, match=f"^{path}: the mask has .*5, 6.*its image .*one size"):
        run_here("cct", *tiny["cct"], "--root", root, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@each_script
def test_split_list_that_has_changed_is_told(bare, tmp_path, script):
    """It would make labelled images of unlabelled ones, in the midst of a training."""
    def run(order):
        (tmp_path / "order.pkl").write_bytes(pickle.dumps(order))
        run_here(script, *bare[script], "--steps", 1, "--supervised", "--split", tmp_path / "order.pkl",
                 "--out", tmp_path / "run")
    run([*range(9)])
    with pytest.raises(UserError, match="other labelled images: since then the list of --split"):
        run([1, 2, 3, 4, 5, 0, 6, 7, 8])


def test_other_images_or_classes_or_a_damaged_checkpoint_are_told(tiny, tmp_path):
    """--root may change, as data move; but these are others."""
    def run(root):
        run_here("cct", *tiny["cct"], "--steps", 1, "--root", root, "--out", tmp_path / "run")
    run(fixtures.make_folder(tmp_path / "data"))
    root = (tmp_path / "data").rename(tmp_path / "moved")
    run(root)
    (root / "images/train/img0.jpg").rename(root / "images/train/new.jpg")
    with pytest.raises(UserError, match="was trained on other images than those of folder in --root .*moved"):
        run(root)
    fixtures.save_lines(root / "classes.txt", (root / "classes.txt").read_text().splitlines()[::-1])
    with pytest.raises(UserError, match="was trained on 4 classes"):
        run(root)
    (tmp_path / "run/last.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="last.pt is not a checkpoint"):
        run(root)


def test_kill_during_a_save_keeps_the_old_checkpoint(tmp_path):
    """The old file stays whole; the next save replaces the torn one."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, dict(step=1))
    code = ("import os, torch; from common import checkpoint\n"
            "os.fsync = lambda fd: os.kill(os.getpid(), 9)\n"
            f"checkpoint.save({str(path)!r}, dict(step=2, big=torch.zeros(1000)))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert (tmp_path / "last.pt.tmp").exists() and checkpoint.load(path) == dict(step=1)
    checkpoint.save(path, dict(step=3))
    assert checkpoint.load(path) == dict(step=3) and not (tmp_path / "last.pt.tmp").exists()


def test_file_systems_without_locks_and_flushed_folders_will_do(tiny, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    fsync = os.fsync
    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(os, "fsync", lambda fd: refuse() if stat.S_ISDIR(os.fstat(fd).st_mode) else fsync(fd))
    run_here("cct", *tiny["cct"], "--out", tmp_path / "run")
    assert last(tmp_path / "run")["step"] == 6


def test_a_folder_belongs_to_one_run_at_a_time(tiny, tmp_path):
    folder = tmp_path / "run"
    process = start_script("cct", *tiny["cct"], "--steps", 4000, "--out", folder)
    wait_for(lambda: steps_done(folder) > 1)
    try:
        with pytest.raises(UserError, match="another process is training in this folder"):
            run_here("cct", *tiny["cct"], "--steps", 4000, "--out", folder)
    finally:
        end(process, signal.SIGKILL)


def test_a_checkpoint_is_scored_in_its_own_precision(whole, tmp_path):
    state = checkpoint.load(whole("cct")[0] / "last.pt")
    checkpoint.save(tmp_path / "last.pt", state | dict(config=state["config"] | dict(precision="bf16")))
    for given, wanted in ({}, "bf16"), (dict(precision="fp32"), "fp32"):
        ctx = Runtime("cpu")
        checkpoint.open_checkpoint("cct", tmp_path / "last.pt", cct.Config(), given, ctx, [], {})
        assert ctx.precision == wanted


TWO = {  # flags whose result does not hang on float error, and the columns to compare
    "cct": ("--batch 4 --steps 3 --confidence 0.2 --optimizer sgd --lr 0.02", "loss_s loss_u"),
    "three_stage": ("--batch-l 1 --lr 1e-4 --stages 2", "loss_seg loss_con loss_pl"),
    "c3_semiseg": ("--batch 4 --groups 2 --lr 1e-4 --steps 4",
                   "loss_sup loss_consist loss_contrast threshold"),
    "s4gan_mlmt": ("--batch 4 --lr 0.02 --lambda-fm 20 --optimizer sgd --gamma 0.511",
                   "loss_ce loss_fm loss_st loss_d passed mlmt/loss_cce mlmt/loss_cons"),
}


@pytest.mark.parametrize("script, more", [*((script, "") for script in SCRIPTS), *(
    pytest.param("cct", more, marks=pytest.mark.slow) for more in (
        "--data folder+folder --lambda-adv 0.02 --steps 4",
        "--weak --tags {root}/tags.txt --weak-epochs 2 --weak-lr 0.01"))])
def test_two_processes_equal_one(tiny, folder_data, tmp_path, capsys, script, more):
    """Same losses as one process with the same global batch (BN synchronised), every image scored once."""
    flags, columns = TWO[script]
    root = shutil.copytree(folder_data, tmp_path / "data")
    for kind, ending in (("images", "jpg"), ("masks", "png")):  # an odd number to score
        shutil.copy(root / f"{kind}/train/img0.{ending}", root / f"{kind}/val/odd.{ending}")
    arguments = [*tiny[script], "--root", root, *flags.split(), *more.format(root=root).split()]
    run_here(script, *arguments, "--out", tmp_path / "one")
    output = run_script(script, *arguments, "--out", tmp_path / "two", processes=2)
    assert "2 x CPU" in output and output.count("final: mIoU") == 1
    classifier = ["--classifier", tmp_path / "two/mlmt/last.pt"] if script == "s4gan_mlmt" else []
    capsys.readouterr()
    run_here(script, "--evaluate", tmp_path / "two/last.pt", *classifier)
    assert capsys.readouterr().out.rpartition(f"\n{tmp_path}")[0] in output  # the table of all classes
    for name in columns.split():
        *part, name = name.split("/")
        one, two = (column(Path(tmp_path, run, *part), name) for run in ("one", "two"))
        assert one and list(one) == list(two), name
        assert list(one.values()) == pytest.approx(list(two.values()), rel=2e-3, abs=1e-5), name
    one, two = last(tmp_path / "one")["net"], last(tmp_path / "two")["net"]
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), rtol=2e-3, atol=1e-3), name
    masks = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("weak/pseudo/**/*.png")]
    assert bool(masks) == ("--weak" in more)
    for path in masks:
        one, two = (np.array(Image.open(tmp_path / run / path)) for run in ("one", "two"))
        assert (one == two).mean() > 0.99, path


SETTINGS = {
    "cct": ["--method mean_teacher", "--method vat",
            "--k 1 --precision bf16 --pairwise 1 --distance js",
            "--k 1 --supervised-loss ab_ce --distance kl --optimizer adam --shift 3 --flip",
            "--k 1 --data folder+folder --labeled 5+4 --lambda-adv 0.02",
            "--data folder+folder --supervised",
            "--k 1 --steps 2 --weak --tags {root}/tags.txt --weak-epochs 3 --no-crf"],
    "three_stage": ["--supervised",
                    "--batch-l 2 --ema 0.5 --con-target soft --precision bf16 --writer student",
                    "--batch-l 2 --lambda-pl 0", "--batch-l 2 --ema 0 --branch-stage3 ghat --bn frozen"],
    "c3_semiseg": ["--burn-in 0.5 --mix intra --batch 4", "--burn-in 0.5 --precision bf16",
                   "--burn-in 0.1 --contrast none --dcrs 1", "--supervised"],
    "s4gan_mlmt": ["--supervised --steps 8 --batch 2 --crop 32 --scale 0.5 0.7 --lr 0.01",
                   "--branch mlmt --weak --tags {root}/tags.txt --mlmt-size 32 --mlmt-batch 2 --mlmt-batch-u 2 "
                   "--mlmt-epochs 3",
                   "--branch s4gan --d-width 4 --steps 6 --batch 2 --crop 32 --scale 0.5 0.7 "
                   "--network deeplabv3plus --backbone-layers 4 --precision bf16"],
}


@pytest.mark.parametrize("script, flags", [(script, one) for script in SETTINGS for one in SETTINGS[script]])
def test_other_settings_train_and_resume(bare, tmp_path, monkeypatch, script, flags):
    """Cut off after some checkpoint and started again, every setting ends with the same bits."""
    flags = flags.format(root=bare[script][-1]).split()
    arguments, saves, save = [*bare[script], *flags], [], checkpoint.save
    run_here(script, *arguments, "--out", tmp_path / "whole")

    def save_and_die(path, state):
        save(path, state)
        saves.append(path)
        if len(saves) in (2, 5):
            raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint, "save", save_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_here(script, *arguments, "--out", tmp_path / "torn")
    run_here(script, *arguments, "--out", tmp_path / "torn")
    same_run(tmp_path / "whole", tmp_path / "torn")


CHANGES = {  # flags; further flags, each of which changes the weights; flags instead of the first ones
    "cct": (
        "--steps 2 --k 1", "--lambda-u 300", "--ramp linear", "--ramp-length 1", "--distance kl",
        "--confidence 0.6", "--pairwise 1", "--perturbations f_noise", "--k 2", "--drop-range 0.2 0.3",
        "--noise 0.9", "--dropout 0.9", "--cutout 0.9", "--background 1,2", "--vat-eps 40", "--vat-xi 10",
        "--vat-released", "--supervised-loss ab_ce", "--weight-decay 0.1", "--backbone-lr-mult 0.1",
        "--no-last-relu", "--stem deep", "--seed 1", "--no-flip", "--shift 5",
        "--scale 0.8 0.9", "--long-side 64", "--crop 40", "--labeled 4", "--optimizer adam",
        ["--steps 2 --supervised", "--steps 2 --method vat", "--steps 2 --method mean_teacher"]),
    "cct, domains": ("--steps 4 --k 1 --data folder+folder --lambda-adv 0.02", "--lambda-adv 9", "--labeled 5+4",
                     ["--steps 4 --k 1 --data folder+folder"]),
    "cct, weak": ("--steps 2 --k 1 --weak --tags {root}/tags.txt --weak-epochs 6 --thresholds 0.3 0.6",
                  "--lambda-w 3", "--weak-epochs 7", "--weak-lr 0.01", "--thresholds 0.4 0.6", "--no-crf",
                  ["--steps 2 --k 1"]),
    "three_stage": (
        "--stages 2 --batch-l 2", "--cutout 8", "--lambda-con 2", "--lambda-con 0", "--lambda-pl 2",
        "--lambda-pl 0", "--con-target soft", "--ema 0", "--no-strong", "--aspp-rates 1,3",
        "--input-scale caffe", "--bn frozen", "--lr-groups nominal", "--batch-l 1", "--lr 0.001", "--seed 1",
        "--no-flip", "--shift 5", "--scale 0.8 0.9", "--crop 40", "--labeled 4", "--stage1-share 2",
        "--stages 3", "--writer student", "--stages 3 --branch-stage3 ghat", "--backbone resnet50",
        "--backbone resnet50 --stride-on 3x3", ["--supervised"]),
    "c3_semiseg": (
        "--steps 3 --burn-in 0.4 --lr 1e-3 --dcrs-beta 0 --anchors 2 --consist-ramp 0 --contrast-ramp 0",
        "--mix none", "--mix intra --batch 4", "--contrast labelled", "--contrast unlabelled",
        "--sampling random", "--lambda-2 9", "--teacher-aug S", "--student-aug W", "--student-aug S",
        "--dcrs 0.3", "--dcrs-beta 0.5", "--skip-classes 0,1", "--tau 0.5", "--anchors 4", "--contrast-scale 1",
        "--divide-by-classes", "--keys teacher", "--ema 0.1", "--no-ema-warmup", "--burn-in 0.7",
        "--no-contrast-burn-in", "--consist-ramp 1", "--contrast-ramp 1", "--groups 2", "--aspp-rates 1,2,3",
        "--backbone-lr-mult 0.1", "--rotate 0", "--no-flip", "--scales 1 1.5 2", "--crop 40",
        "--long-side 64", "--seed 1", "--labeled 4", "--lr 2e-3", "--batch 4",
        ["--steps 3 --supervised", "--steps 3 --burn-in 0.4 --contrast none",
         "--steps 3 --burn-in 0.4 --lambda-1 0", "--steps 3 --burn-in 0.4 --dcrs 1"]),
    "s4gan_mlmt": (
        "--branch s4gan --steps 2 --batch 2 --crop 32 --lr 0.01 --scale 0.3 0.4 --lr-d 0.02 --d-width 4 "
        "--gamma 0.5 --aspp-rates 1,2", "--lambda-fm 5", "--aspp-rates 1", "--lr 0.02", "--batch 3",
        "--lambda-st 5", "--lambda-adv 1", "--gamma 0.9", "--d-dropout elementwise", "--d-width 8",
        "--lr-d 0.1", "--weight-decay 0.1", "--backbone-lr-mult 3", "--head-lr-mult 3", "--optimizer adam",
        "--input-scale caffe", "--input-scale bgr", "--pad-label 0", "--scale 1 1", "--shift 3", "--no-flip",
        "--crop 40", "--size 40", "--seed 1",
        ["--supervised --steps 2 --batch 2 --crop 32 --lr 0.01 --scale 0.3 0.4"]),
    "s4gan_mlmt, branch B": (
        "--branch mlmt --mlmt-size 32 --mlmt-epochs 3 --mlmt-batch 3 --mlmt-batch-u 2", "--mlmt-size 40",
        "--mlmt-epochs 4", "--mlmt-batch 2", "--mlmt-batch-u 3", "--mlmt-lr 0.01",
        "--mlmt-weight-decay 0.1", "--mlmt-blur 1 1", "--weak --tags {root}/tags.txt", "--lambda-cons 5",
        "--cons cosine", "--cons-on unlabelled", "--ema 0.5", "--seed 1",
        ["--branch mlmt --supervised --mlmt-size 32 --mlmt-epochs 3 --mlmt-batch 3"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_every_flag_of_the_method_changes_the_training(bare, tmp_path, monkeypatch, name):
    """No dead option: other weights than the first line's flags give."""
    monkeypatch.setattr("common.run_folder.prediction_panel", lambda *_: Image.new("L", (1, 1)))  # for speed
    monkeypatch.setattr("common.log.Log.curves", lambda *_: None)
    script = name.split(",")[0]

    def trained(flags):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        flags = flags.format(root=bare[script][-1]).split()
        run_here(script, *bare[script], *flags, "--save-every", 100, "--out", out)
        return last(min(out.rglob("last.pt"), key=lambda path: len(path.parts)).parent)["net"]
    common, *changes, alone = CHANGES[name]
    default = trained(common)
    for flags in [*(f"{common} {flags}" for flags in changes), *alone]:
        net = trained(flags)
        assert net.keys() != default.keys() or any(not torch.equal(net[n], default[n]) for n in net), flags


@each_script
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tiny, tmp_path, monkeypatch, script):
    module = importlib.import_module(script)
    cross_entropy, calls = module.cross_entropy, []

    def diverging(*args):
        calls.append(1)
        return cross_entropy(*args) * (math.nan if len(calls) > 2 else 1)
    monkeypatch.setattr(module, "cross_entropy", diverging)
    with pytest.raises(UserError, match=r"diverged at step \d .*loss_"):
        run_here(script, *tiny[script], "--log-every", 100, "--out", tmp_path)
    saved = [last(path.parent) for path in tmp_path.rglob("last.pt")]
    assert saved and all(w.isfinite().all() for state in saved for w in state["net"].values())


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path):
    with pytest.raises(UserError, match="weights are not finite|diverged"):
        run_here("cct", *tiny["cct"], "--lr", 1000, "--steps", 60, "--out", tmp_path)
    assert all(w.isfinite().all() for w in last(tmp_path)["net"].values())


@pytest.mark.parametrize("script, data, make, images", [
    ("cct", "voc", fixtures.make_sbd, "VOCdevkit/VOC2012/JPEGImages"),
    ("c3_semiseg", "cityscapes", fixtures.make_cityscapes, "leftImg8bit/train"),
    ("three_stage", "camvid", fixtures.make_camvid, "CamVid/test")])
def test_real_formats_train_evaluate_and_predict(tmp_path, capsys, tiny, script, data, make, images):
    """Trees in the datasets' real formats, through the command line of the README."""
    root = make(tmp_path / "data")
    flags = [*tiny[script], "--data", data, "--root", root, "--labeled", 2, "--workers", 1]
    if data in ("cityscapes", "camvid"):
        flags = [f for f in flags if f not in ("--long-side", "48")] + ["--size", "40x56"]
    run_here(script, *flags, "--out", tmp_path / "run")
    final = capsys.readouterr().out.split("final: ")[1]
    run_here(script, "--evaluate", tmp_path / "run/last.pt", "--root", root)
    assert re.search(r"mIoU \d+\.\d", capsys.readouterr().out.splitlines()[-1])[0] in final
    images, out = root / images, tmp_path / "masks"
    run_here(script, "--predict", tmp_path / "run/last.pt", "--images", images, "--out", out)
    found = {file.relative_to(images).with_suffix(".png"): file for file in images.rglob("*.*")}
    assert {path.relative_to(out) for path in out.rglob("*.png")} == found.keys()
    for path, original in found.items():
        mask = Image.open(out / path)
        assert mask.mode == "P" and mask.size == Image.open(original).size


@pytest.mark.parametrize("script, world, flags, said", [
    ("cct", 4, "--batch 6", "--batch 6 cannot be split over 4"),
    ("s4gan_mlmt", 3, "--batch 3 --mlmt-batch 3 --mlmt-batch-u 4", "--mlmt-batch-u 4 cannot be split over 3"),
    ("c3_semiseg", 2, "--batch 6 --groups 1 --mix intra", "an even number")])
def test_what_processes_cannot_share_is_told_before_anything_is_written(tiny, tmp_path, monkeypatch, script,
                                                                        world, flags, said):
    ctx = Runtime("cpu")
    ctx.world = world
    monkeypatch.setattr(importlib.import_module(script), "Runtime", lambda *_: ctx)
    with pytest.raises(UserError, match=said):
        run_here(script, *tiny[script], *flags.split(), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@each_script
def test_compile(tiny, tmp_path, script):
    arguments = [*tiny[script], *TWO[script][0].split()]
    if script == "three_stage":
        arguments += ["--bn", "frozen"]
    run_here(script, *arguments, "--out", tmp_path / "eager")
    run_here(script, *arguments, "--compile", "--out", tmp_path / "compiled")
    name = TWO[script][1].split()[0]
    eager, compiled = column(tmp_path / "eager", name), column(tmp_path / "compiled", name)
    assert list(eager.values()) == pytest.approx(list(compiled.values()), rel=1e-2)


def test_domains_of_a_checkpoint_are_scored_and_chosen(tiny, folder_data, tmp_path, capsys):
    second = fixtures.make_folder(tmp_path / "second", classes=("sea", "boat", "sky"), n_val=3)
    out = tmp_path / "run"
    both = ["--data", "folder+folder", "--root", f"{folder_data}+{second}"]
    run_here("cct", *tiny["cct"], *both, "--steps", 2, "--labeled", "5+4", "--out", out)
    trained = capsys.readouterr().out
    assert "folder: 5 labelled" in trained and "folder_2: 4 labelled" in trained
    assert (out / "predictions-folder.png").exists() and (out / "predictions-folder_2.png").exists()
    mious = [column(out, f"miou{name}")[2] for name in ("", "_folder", "_folder_2")]
    assert mious[0] == pytest.approx((mious[1] + mious[2]) / 2, abs=1e-5) and mious[1] != mious[2]
    for flags, score, images in ((both, mious[0], "2 val + 3 val"),
                                 (["--root", f"{folder_data}+{second}"], mious[0], "2 val + 3 val"),
                                 (["--data", "folder_2", "--root", second], mious[2], "3 val images")):
        run_here("cct", "--evaluate", out / "last.pt", *flags)
        said = capsys.readouterr().out.strip().splitlines()[-1]
        assert f"mIoU {100 * score:.1f} on" in said and images in said
    state = checkpoint.load(out / "last.pt")  # the second domain is scored at a --size, the first is not
    state["domains"][1]["own"] |= dict(size=[16, 24], long_side=None, eval_size="train")
    checkpoint.save(tmp_path / "sized.pt", state)
    one = ["--evaluate", tmp_path / "sized.pt", "--data", "folder_2", "--root", second]
    run_here("cct", *one, "--eval-size", "train")
    assert "on 3 val images" in capsys.readouterr().out
    photos = second / "images/val"
    predict = ["--predict", out / "last.pt", "--images", photos]
    for flags, said in ((["--data", "folder_3"], "--data folder_3: .* knows the domains folder, folder_2"),
                        ([], "choose the one whose classes to predict")):
        with pytest.raises(UserError, match=said):
            run_here("cct", *predict, *flags)
    run_here("cct", *predict, "--data", "folder_2", "--out", tmp_path / "p")
    assert max(np.array(Image.open(path)).max() for path in (tmp_path / "p").glob("*.png")) < 3
    run_here("cct", *predict, "--format", "smoothness", "--out", tmp_path / "m")
    picture, photo = (Image.open(next(folder.glob("img0.*"))) for folder in (tmp_path / "m", photos))
    assert picture.size == (3 * photo.width, photo.height)


def test_a_signal_that_is_ignored_stays_ignored(tiny, tmp_path):
    """As after nohup"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run_here("cct", *tiny["cct"], "--steps", 1, "--out", tmp_path)
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN
