"""Whole runs: exact resume, processes, precision, signals, the files of a run folder."""
import contextlib
import csv
import io
import json
import os
import random
import signal

import pytest
import torch
from conftest import kill, run_here, run_script, same_state, start_script, wait_for
from PIL import Image

import cct
import fixtures
from common import checkpoint
from common.runtime import Runtime
from common.settings import UserError


def last(folder):
    state = checkpoint.load(folder / "last.pt")
    state["config"].pop("out")
    return state


def column(folder, name):
    with open(folder / "log.csv") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """A run of 8 steps that nobody disturbed."""
    folder, output = tmp_path_factory.mktemp("whole") / "run", io.StringIO()
    with contextlib.redirect_stdout(output):
        run_here(*tiny, "--steps", 8, "--out", folder)
    return folder, output.getvalue()


def test_run_folder_and_output(whole):
    folder, output = whole
    assert {"config.json", "log.csv", "last.pt", "best.pt", "curves.png", "predictions.png"} <= set(os.listdir(folder))
    final = output.strip().splitlines()[-1]
    assert final.startswith("final: mIoU ") and "(best " in final and final.endswith(str(folder))
    assert "tall tree" in output and "pixel accuracy" in output  # the per-class table
    assert json.loads((folder / "config.json").read_text())["steps"] == 8
    assert min(Image.open(folder / "predictions.png").size) > 200 and min(Image.open(folder / "curves.png").size) > 200
    assert sorted(column(folder, "loss_s")) == list(range(1, 9)) and sorted(column(folder, "miou")) == [8]


def test_finished_run_is_not_trained_again(whole, tiny, capsys):
    folder, output = whole
    before, log = last(folder), (folder / "log.csv").read_text()
    run_here(*tiny, "--steps", 8, "--out", folder)
    assert (folder / "log.csv").read_text() == log
    assert capsys.readouterr().out.strip().splitlines()[-1] == output.strip().splitlines()[-1]
    assert same_state(before, last(folder))


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_kill_9_at_random_moments_then_resume_is_bit_equal(whole, tiny, tmp_path, workers):
    """Kills fall between steps, inside them and inside saves (a checkpoint is written after every step)."""
    rng, folder, arguments = random.Random(workers), tmp_path / "run", [*tiny, "--steps", 8, "--workers", workers]
    for done in (1, 3, 6):  # so far
        process = start_script(*arguments, "--out", folder)
        wait_for(lambda: process.poll() is not None or (folder / "log.csv").exists()
                 and len((folder / "log.csv").read_text().splitlines()) > done)
        try:
            process.wait(rng.uniform(0, 0.15))
        except Exception:
            kill(process)
    run_here(*arguments, "--out", folder)
    expected, got = last(whole[0]), last(folder)
    assert expected["config"].pop("workers") == 0 and got["config"].pop("workers") == workers
    assert same_state(expected, got)
    assert column(whole[0], "loss_s") == column(folder, "loss_s")  # each step once, with the same losses


def test_kill_during_a_save_keeps_the_old_checkpoint(tmp_path):
    """A process killed in the middle of writing leaves the old file whole; the next save replaces the torn one."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, dict(step=1))
    code = ("import os, torch; from common import checkpoint\n"
            "os.fsync = lambda fd: os.kill(os.getpid(), 9)\n"
            f"checkpoint.save({str(path)!r}, dict(step=2, big=torch.zeros(1000)))")
    import subprocess
    import sys
    from conftest import ROOT
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert (tmp_path / "last.pt.tmp").exists() and checkpoint.load(path) == dict(step=1)
    checkpoint.save(path, dict(step=3))
    assert checkpoint.load(path) == dict(step=3) and not (tmp_path / "last.pt.tmp").exists()


def test_sigterm_saves_and_exits(whole, tiny, tmp_path):
    folder, arguments = tmp_path / "run", [*tiny, "--steps", 8, "--save-every", 100]
    process = start_script(*arguments, "--out", folder)
    wait_for(lambda: (folder / "log.csv").exists() and len((folder / "log.csv").read_text().splitlines()) > 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "saved at step" in output
    assert 0 < last(folder)["step"] < 8
    run_here(*arguments, "--out", folder)
    assert same_state(last(whole[0])["net"], last(folder)["net"])


def test_contradicting_flags_are_refused(whole, tiny):
    folder, _ = whole
    before = last(folder)
    with pytest.raises(UserError) as error:
        run_here(*tiny, "--steps", 8, "--out", folder, "--lr", 0.5, "--supervised")
    output = str(error.value)
    assert "--lr was 0.01, now 0.5" in output and "--supervised was off, now on" in output
    assert same_state(before, last(folder))


def test_two_processes_equal_one(tiny, tmp_path, capsys):
    """Same losses as one process with the same global batch (BN synchronised), and every image scored once."""
    arguments = [*tiny, "--batch", 4, "--steps", 4, "--supervised-loss", "ab_ce", "--confidence", 0.2, "--optimizer", "sgd",
                 "--lr", 0.02]  # Adam's division would blow the float error of tiny gradients up
    run_here(*arguments, "--out", tmp_path / "one")
    output = run_script(*arguments, "--out", tmp_path / "two", processes=2)
    assert "2 x CPU" in output and output.count("final: mIoU") == 1
    for name in ("loss_s", "loss_u"):
        one, two = column(tmp_path / "one", name), column(tmp_path / "two", name)
        assert list(one) == [1, 2, 3, 4] == list(two)
        assert list(one.values()) == pytest.approx(list(two.values()), rel=5e-5), name
    one, two = last(tmp_path / "one")["net"], last(tmp_path / "two")["net"]
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), rtol=1e-3, atol=1e-4), name
    # the number of scored pixels is what the table's shares are shares of; both runs score the same checkpoint alike
    capsys.readouterr()
    run_here("--evaluate", tmp_path / "one/last.pt", "--device", "cpu")
    scored = run_script("--evaluate", tmp_path / "one/last.pt", "--device", "cpu", processes=2)
    assert capsys.readouterr().out.strip().splitlines()[-13:] == scored.strip().splitlines()[-13:]


class Killed(Exception):
    pass


@pytest.mark.parametrize("flags", [
    ["--supervised"], ["--method", "mean_teacher"], ["--method", "vat"],
    ["--precision", "bf16", "--pairwise", "1", "--distance", "js"], ["--supervised-loss", "ab_ce", "--distance", "kl"],
    ["--optimizer", "adam", "--shift", "3", "--flip", "--cutout-of", "area", "--drop-quantile"]])
def test_other_settings_train_and_resume(tiny, tmp_path, monkeypatch, flags):
    """Cut off after the second checkpoint and started again, every setting ends with the same bits."""
    arguments, saves, save = [*tiny, *flags, "--steps", 4], [], checkpoint.save
    run_here(*arguments, "--out", tmp_path / "whole")

    def save_and_die(path, state):
        save(path, state)
        saves.append(path)
        if len(saves) == 2:
            raise Killed
    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(Killed):
        run_here(*arguments, "--out", tmp_path / "torn")
    assert last(tmp_path / "torn")["step"] == 2
    run_here(*arguments, "--out", tmp_path / "torn")
    assert same_state(last(tmp_path / "whole"), last(tmp_path / "torn"))


def test_every_flag_of_the_method_changes_the_training(tiny, tmp_path, monkeypatch):
    """No dead option: each of these leads to other weights than the default after two steps."""
    monkeypatch.setattr(cct, "panel", lambda *_: Image.new("RGB", (1, 1)))  # pictures take most of the time
    monkeypatch.setattr(cct.Log, "curves", lambda *_: None)
    run_here(*tiny, "--steps", 2, "--out", tmp_path / "default")
    default = last(tmp_path / "default")["net"]
    for k, flags in enumerate([
            ["--lambda-u", 300], ["--ramp", "linear"], ["--ramp-length", 1], ["--distance", "kl"], ["--confidence", 0.6],
            ["--pairwise", 1], ["--perturbations", "f_noise"], ["--k", 2], ["--drop-range", 0.2, 0.3], ["--drop-quantile"],
            ["--noise", 0.9], ["--dropout", 0.9], ["--background", "1,2"], ["--vat-eps", 40], ["--vat-xi", 10],
            ["--vat-released"], ["--supervised-loss", "ab_ce"], ["--weight-decay", 0.1], ["--backbone-lr-mult", 0.1],
            ["--decoder-init", "icnr"], ["--no-last-relu"], ["--seed", 1], ["--no-flip"], ["--shift", 5], ["--scale", 0.8, 0.9],
            ["--long-side", 64], ["--crop", 40], ["--labeled", 4], ["--supervised"], ["--method", "vat"],
            ["--method", "mean_teacher"], ["--optimizer", "adam"]]):
        run_here(*tiny, *flags, "--steps", 2, "--save-every", 2, "--out", tmp_path / str(k))
        net = last(tmp_path / str(k))["net"]
        assert any(not torch.equal(net[name], default[name]) for name in net), flags


def test_batch_must_split_over_processes():
    ctx = Runtime("cpu")
    ctx.world = 2
    assert ctx.share(4) == 2
    with pytest.raises(UserError, match="--batch 3 cannot be split over 2 processes"):
        ctx.share(3)


def test_non_finite_loss_stops_the_run(tiny, tmp_path):
    with pytest.raises(UserError, match=r"diverged at step \d.*loss_s"):
        run_here(*tiny, "--steps", 8, "--lr", 1e30, "--save-every", 1, "--out", tmp_path / "run")
    assert last(tmp_path / "run")["step"] < 8  # the last one that was saved before


@pytest.mark.parametrize("data", ["voc", "cityscapes", "camvid", "folder"])
def test_real_formats_train_evaluate_and_predict(tmp_path, capsys, data):
    """Trees in the datasets' real formats, through the command line of the README."""
    root = {"voc": fixtures.make_voc, "cityscapes": fixtures.make_cityscapes, "camvid": fixtures.make_camvid,
            "folder": fixtures.make_folder}[data](tmp_path / "data")
    if data == "voc":
        fixtures.make_sbd(tmp_path / "data")
    small = ["--backbone", "resnet18", "--backbone-layers", 2, "--weights", "none", "--k", 1, "--batch", 2, "--steps", 2,
             "--workers", 1]
    small += ["--long-side", 64, "--crop", "48x56"] if data in ("voc", "folder") else ["--size", "40x56"]
    run_here("--data", data, "--root", root, "--labeled", 2, *small, "--out", tmp_path / "run")
    assert "final: mIoU" in capsys.readouterr().out
    run_here("--evaluate", tmp_path / "run/last.pt", "--root", root, "--multi-scale")
    assert "5 scales + flips" in capsys.readouterr().out
    images = next(path for path in sorted(tmp_path.rglob("*")) if path.suffix in (".jpg", ".png") and path.is_file()
                  and "run" not in path.parts and Image.open(path).mode == "RGB").parent
    run_here("--predict", tmp_path / "run/last.pt", "--images", images, "--out", tmp_path / "predicted")
    for path in (tmp_path / "predicted").iterdir():
        original = next(images.glob(path.stem + ".*"))
        assert Image.open(path).mode == "P" and Image.open(path).size == Image.open(original).size


def test_evaluate_repeats_the_final_line(whole, capsys):
    folder, output = whole
    run_here("--evaluate", folder / "last.pt")
    scored = capsys.readouterr().out
    assert scored.strip().splitlines()[-1].split("mIoU ")[1].split()[0] == output.split("final: mIoU ")[1].split()[0]


@pytest.mark.slow
def test_compile(tiny, tmp_path):
    run_here(*tiny, "--steps", 2, "--out", tmp_path / "eager")
    run_here(*tiny, "--steps", 2, "--compile", "--out", tmp_path / "compiled")
    eager, compiled = column(tmp_path / "eager", "loss_s"), column(tmp_path / "compiled", "loss_s")
    assert list(eager.values()) == pytest.approx(list(compiled.values()), rel=1e-3)
