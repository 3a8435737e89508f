"""log.csv, progress line, clocks, resuming, several processes: what a run writes and what it prints."""
import csv
import importlib.machinery
import io
import math
import os
import re
import sys
import types

import pytest
import torch
from PIL import Image

import common.log
from common.log import Log
from common.settings import UserError


class Clock:
    """Stands in for the module `time`: it moves only when told to."""
    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(common.log, "time", Clock())
    return common.log.time


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    monkeypatch.setattr(common.log.importlib.util, "find_spec", lambda name: None)


def new_log(folder, total=100, every=10, start=0, **more):
    return Log(folder, total, every, start, 4, "cpu", **more)


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def train(log, first, last, clock=None, seconds=0.0):
    """Steps first..last with loss = step as a tensor and lr as a number."""
    for step in range(first, last + 1):
        if clock:
            clock.now += seconds
        log.add(step, loss=torch.tensor(float(step)), lr=0.5)


class Terminal(io.StringIO):
    def isatty(self):
        return True


# ------------------------------------------------------------------------------------ log.csv

def test_one_row_per_flush_with_the_mean(tmp_path):
    log = new_log(tmp_path, total=25)
    train(log, 1, 25)
    assert [(row["step"], row["loss"], row["lr"]) for row in rows(tmp_path)] == [
        ("10", "5.5", "0.5"), ("20", "15.5", "0.5"), ("25", "23", "0.5")]  # the last step flushes the rest
    assert list(rows(tmp_path)[0]) == ["step", "loss", "lr", "images_per_s", "data_wait", "gpu_gb"]
    assert {row["gpu_gb"] for row in rows(tmp_path)} == {""}
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv"]


def test_the_file_is_complete_after_every_flush(tmp_path):
    log = new_log(tmp_path)
    train(log, 1, 9)
    assert rows(tmp_path) == []
    log.flush()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("9", "5")]
    assert (tmp_path / "log.csv").read_bytes().endswith(b"\n")
    log.flush()  # nothing is kept
    assert len(rows(tmp_path)) == 1


def test_a_value_changed_in_place_afterwards_is_logged_as_it_was(tmp_path):
    log, loss, weight = new_log(tmp_path, every=2), torch.zeros((), dtype=torch.float64), torch.ones(())
    for step in (1, 2):
        loss += step
        log.add(step, loss=loss, w_u=weight.requires_grad_(), n=torch.tensor(3), flag=torch.tensor(True))
    assert [rows(tmp_path)[0][name] for name in ("loss", "w_u", "n", "flag")] == ["2", "1", "3", "1"]


def test_a_row_is_on_the_disk_before_the_next_step(tmp_path, monkeypatch):
    log, sizes = new_log(tmp_path), []
    monkeypatch.setattr(common.log.os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    train(log, 1, 20)
    size = (tmp_path / "log.csv").stat().st_size
    assert len(sizes) == 3 and sizes[-1] == size  # the new header and row 10, then row 20
    assert sizes[-2] == size - len((tmp_path / "log.csv").read_bytes().splitlines(keepends=True)[-1])


def test_no_graph_is_kept(tmp_path):
    log, loss = new_log(tmp_path), torch.ones((), requires_grad=True) * 2
    log.add(1, loss=loss)
    assert loss.requires_grad and not any(value.requires_grad for value in log._kept[0][1].values())


def test_the_names_must_stay_the_same(tmp_path):
    log = new_log(tmp_path)
    log.add(1, loss=1.0, lr=2.0)
    with pytest.raises(ValueError, match="step 2"):
        log.add(2, loss=1.0)
    log.add(2, lr=4.0, loss=3.0)  # in another order they are
    log.flush()
    assert (rows(tmp_path)[0]["loss"], rows(tmp_path)[0]["lr"]) == ("2", "3")


def test_new_columns_keep_the_old_rows(tmp_path):
    log = new_log(tmp_path, every=2)
    train(log, 1, 2)
    log.evaluated(2, miou=0.25, best=0.5)
    train(log, 3, 4)
    table = rows(tmp_path)
    assert list(table[0]) == ["step", "loss", "lr", "images_per_s", "data_wait", "gpu_gb", "miou", "best"]
    assert [(row["step"], row["loss"], row["miou"], row["best"]) for row in table] == [
        ("2", "1.5", "", ""), ("2", "", "0.25", "0.5"), ("4", "3.5", "", "")]


def test_evaluated_flushes_first_and_takes_tensors_and_nan(tmp_path):
    log = new_log(tmp_path)
    train(log, 1, 3)
    log.evaluated(3, miou=torch.tensor(0.25), best=math.nan)
    assert [(row["step"], row["loss"], row["miou"], row["best"]) for row in rows(tmp_path)] == [
        ("3", "2", "", ""), ("3", "", "0.25", "nan")]


# ------------------------------------------------------------------------------------ resuming

def test_a_resumed_run_has_every_step_once(tmp_path):
    log = new_log(tmp_path)
    train(log, 1, 40)
    log.evaluated(40, miou=0.5)
    untouched = (tmp_path / "log.csv").read_text().split("\n")
    log = new_log(tmp_path, start=20)
    assert [row["step"] for row in rows(tmp_path)] == ["10", "20"]
    train(log, 21, 40)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        ("10", "5.5"), ("20", "15.5"), ("30", "25.5"), ("40", "35.5")]
    assert (tmp_path / "log.csv").read_text().split("\n")[:3] == untouched[:3]


def test_a_run_started_anew_drops_what_another_left(tmp_path):
    train(new_log(tmp_path), 1, 20)
    new_log(tmp_path)
    assert (tmp_path / "log.csv").read_text() == "step\n"


@pytest.mark.parametrize("kept", range(1, 12))
def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path, kept):
    train(new_log(tmp_path), 1, 20)
    whole = (tmp_path / "log.csv").read_bytes()
    line = whole.splitlines(keepends=True)[-1]
    assert len(line) > 12
    (tmp_path / "log.csv").write_bytes(whole + line[:kept])  # a third row, cut short
    log = new_log(tmp_path, start=20)
    assert (tmp_path / "log.csv").read_bytes() == whole
    train(log, 21, 30)
    assert [row["loss"] for row in rows(tmp_path)] == ["5.5", "15.5", "25.5"]


@pytest.mark.parametrize("content", [b"", b"st", b"step,loss", b"step,loss\n10,0."])
def test_a_file_torn_at_its_start_is_begun_again(tmp_path, content):
    (tmp_path / "log.csv").write_bytes(content)
    train(new_log(tmp_path, start=10), 11, 20)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("20", "15.5")]


@pytest.mark.parametrize("line", ["20,1.5", "x,1,2", "20,1,2,3"])
def test_a_spoilt_line_in_the_middle_is_named(tmp_path, line):
    (tmp_path / "log.csv").write_text(f"step,loss,lr\n10,1,1\n{line}\n30,1,1\n")
    with pytest.raises(UserError, match=r"log\.csv, line 3 "):
        new_log(tmp_path, start=30)


# ------------------------------------------------------------------------------------ terms not finite

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_term_that_is_not_finite_stops_the_run_and_is_named_with_its_step(tmp_path, value):
    log = new_log(tmp_path)
    train_loss = {4: value, 6: math.nan}
    with pytest.raises(UserError) as error:
        for step in range(1, 11):
            log.add(step, loss_s=torch.tensor(1.0), loss_u=torch.tensor(train_loss.get(step, 0.5)),
                    loss=train_loss.get(step, 1.5))
    text = str(error.value)
    assert step == 10  # found when the values were fetched, not by waiting for each
    assert f"step 4 (loss_u = {value}, loss = {value})" in text
    assert "loss_s" not in text and "step 6" not in text
    assert rows(tmp_path) == []
    log.flush()  # the error is raised once, and closing is safe after it
    log.close()


def test_a_term_that_is_not_finite_on_another_process_stops_this_one(tmp_path):
    log = new_log(tmp_path, main=False, mean=lambda table: table + math.nan)  # the mean with a NaN is NaN
    log.add(1, loss=1.0)
    with pytest.raises(UserError, match=r"step 1 \(loss = nan\)"):
        log.flush()


# ------------------------------------------------------------------------------------ waiting for the device

def test_no_value_is_read_between_flushes(tmp_path):
    # a tensor on the meta device has no value: whatever reads it on the host fails
    log, loss = new_log(tmp_path), torch.zeros((), device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()
    for step in range(1, 10):
        log.add(step, loss=loss, loss_u=loss.half(), lr=0.1)
    with pytest.raises((RuntimeError, NotImplementedError)):
        log.add(10, loss=loss, loss_u=loss.half(), lr=0.1)


def test_one_transfer_per_flush(tmp_path, monkeypatch):
    reads, tensor = [], torch.Tensor
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__"):
        def counted(self, *args, _real=getattr(tensor, name), _name=name, **more):
            reads.append(_name)
            return _real(self, *args, **more)
        monkeypatch.setattr(tensor, name, counted)
    log = new_log(tmp_path, total=95)
    for step in range(1, 96):
        log.add(step, loss=torch.tensor(1.0), loss_u=torch.tensor(2.0), lr=0.1)
        assert reads == ["tolist"] * (step // 10 + (step == 95))


# ------------------------------------------------------------------------------------ clocks

def speeds(folder):
    timed = [row for row in rows(folder) if row["images_per_s"]]
    return [(float(row["images_per_s"]), float(row["data_wait"])) for row in timed]


def test_throughput_and_wait_of_the_last_interval_without_the_first_step(tmp_path, clock):
    log = new_log(tmp_path)
    clock.now += 500  # building the network
    with log.waiting():
        clock.now += 50  # the workers start
    clock.now += 30  # kernels are tuned
    train(log, 1, 1)
    for step in range(2, 21):
        with log.waiting():
            clock.now += 0.5 if step <= 10 else 0.0
        clock.now += 1.5 if step <= 10 else 1.0
        train(log, step, step)
    # 4 images a step: 9 timed steps of 2 s, then 10 of 1 s
    assert speeds(tmp_path) == [(pytest.approx(2.0), pytest.approx(0.25)), (pytest.approx(4.0), 0.0)]


@pytest.mark.parametrize("flush_first", [True, False])
@pytest.mark.parametrize("evaluated_at", [10, 14])
def test_the_time_of_an_evaluation_does_not_count(tmp_path, clock, evaluated_at, flush_first):
    log = new_log(tmp_path, total=20)
    for step in range(1, 21):
        train(log, step, step, clock, seconds=2.0)
        if step == evaluated_at:
            if flush_first:
                log.flush()
            with log.waiting():  # the evaluation's own loader must not count either
                clock.now += 1000
            log.evaluated(step, miou=0.5)
    found = speeds(tmp_path)
    assert [speed for speed, _ in found] == [pytest.approx(2.0)] * (2 if evaluated_at == 10 else 3)
    if flush_first or evaluated_at == 10:
        assert all(wait == 0 for _, wait in found)


def test_a_first_step_that_is_due_has_no_speed(tmp_path, clock):
    def perf_counter():  # a clock that also moves by itself
        clock.now += 1e-6
        return clock.now

    clock.perf_counter = perf_counter
    log = new_log(tmp_path, every=1)
    train(log, 1, 2, clock, seconds=2.0)
    assert [row["images_per_s"] for row in rows(tmp_path)] == ["", "2"]


@pytest.mark.parametrize("pace, left", [(2.0, "3min"), (0.25, "22s"), (60.0, "1h30"), (3600.0, "90h00")])
def test_eta_leaves_out_the_first_step(tmp_path, clock, capsys, pace, left):
    log = new_log(tmp_path)
    clock.now += 7000
    train(log, 1, 1)
    train(log, 2, 10, clock, pace)
    assert f"  ETA {left}" in capsys.readouterr().out


def test_eta_after_a_resume_counts_this_processs_steps(tmp_path, clock, capsys):
    log = new_log(tmp_path, total=50000, start=40000)
    train(log, 40001, 40010, clock, seconds=1.0)
    assert "ETA 2h47" in capsys.readouterr().out  # 9,990 steps of a second


# ------------------------------------------------------------------------------------ what is printed

def test_plain_lines_in_a_file(tmp_path, clock, capsys):
    log = new_log(tmp_path, total=45600, start=1190)
    for step in range(1191, 1201):
        with log.waiting():
            clock.now += 0.05
        clock.now += 0.2
        log.add(step, loss_s=0.8123, loss_u=torch.tensor(0.01234), w_u=3.114, lr=0.0098)
    log.evaluated(1200, miou=0.6134, best=0.62)
    log.say("hello")
    log.close()
    assert capsys.readouterr().out.split("\n") == [
        "step 1200/45600  loss_s 0.812  loss_u 0.0123  w_u 3.11  lr 0.0098  16 img/s  wait 20%  ETA 3h05",
        "step 1200/45600  evaluation:  miou 0.613  best 0.62", "hello", ""]


def shown(stream):
    """What stands on a terminal's lines after the stream: carriage return and 'erase line' carried out."""
    return [re.split(r"\r\x1b\[K", line)[-1] for line in stream.split("\n")]


def test_a_live_line_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(common.log.shutil, "get_terminal_size", lambda: types.SimpleNamespace(columns=40))
    log = new_log(tmp_path)
    log.say("start")
    train(log, 1, 10)
    assert "\n" not in sys.stdout.getvalue()[len("start\n"):]
    train(log, 11, 20)
    start, line = shown(sys.stdout.getvalue())
    assert start == "start" and line.startswith("step 20/100  loss 15.5")
    assert len(line) <= 39  # a longer one would wrap, and could not be taken back
    log.evaluated(20, miou=0.5)
    assert shown(sys.stdout.getvalue()) == ["start", "step 20/100  evaluation:  miou 0.5", ""]
    train(log, 21, 30)
    log.close()
    log.close()
    lines = shown(sys.stdout.getvalue())
    assert len(lines) == 4 and lines[2].startswith("step 30/100") and lines[3] == ""


# ------------------------------------------------------------------------------------ several processes

def test_only_the_main_process_writes_and_prints_but_all_take_part_in_the_mean(tmp_path, capsys):
    tables = []

    def mean(table):
        tables.append(table.clone())
        return table

    log = new_log(tmp_path, main=False, mean=mean)
    with log.waiting():
        train(log, 1, 20)
    log.say("hello")
    log.evaluated(20, miou=0.5)
    log.curves()
    log.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
    assert [table.shape for table in tables] == [(20,), (20,)]  # 10 steps of loss and lr, twice


def test_the_mean_over_processes_is_what_is_logged(tmp_path):
    other = torch.tensor([[3.0, 0.5], [5.0, 0.5]], dtype=torch.float64).flatten()
    log = new_log(tmp_path, every=2, mean=lambda table: (table + other) / 2)
    train(log, 1, 2)
    assert rows(tmp_path)[0]["loss"] == "2.75"  # of 1, 2 here and 3, 5 there


# ------------------------------------------------------------------------------------ curves, TensorBoard

def test_curves_have_the_right_columns(tmp_path, monkeypatch):
    plots = []
    monkeypatch.setattr(common.log, "line_plot", lambda panels, path: plots.append((panels, path)))
    log = new_log(tmp_path, every=2)
    log.curves()  # before anything is logged
    log.add(1, loss=1.0, loss_u=0.5, confidence=0.9)
    log.add(2, loss=3.0, loss_u=0.5, confidence=0.9)
    log.evaluated(2, miou=0.25, best=0.5)
    log.curves()
    log.add(3, loss=3.0, loss_u=0.5, confidence=0.9, w_u=2.0, lr_heads=0.1)
    log.add(4, loss=3.0, loss_u=0.5, confidence=0.9, w_u=4.0, lr_heads=0.1)
    log.curves()
    two = [("losses", {"loss": [(2, 2.0)], "loss_u": [(2, 0.5)]}),
           ("mIoU", {"miou": [(2, 0.25)], "best": [(2, 0.5)]})]
    three = [("losses", {"loss": [(2, 2.0), (4, 3.0)], "loss_u": [(2, 0.5), (4, 0.5)]}), two[1],
             ("weights and learning rates", {"w_u": [(4, 3.0)], "lr_heads": [(4, 0.1)]})]
    path = tmp_path / "curves.png"
    assert plots == [([("losses", {})], path), (two, path), (three, path)]
    log.curves({"certainty": "conf", "absent": "zz"})
    assert plots[-1][0] == [("certainty", {"confidence": [(2, 0.9), (4, 0.9)]})]


def test_curves_are_drawn(tmp_path):
    log = new_log(tmp_path)
    train(log, 1, 30)
    log.curves()
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > 700


@pytest.fixture
def tensorboard(monkeypatch):
    """A stand-in for the package, which notes what it is told."""
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def close(self):
            told.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    found = {"tensorboard": importlib.machinery.ModuleSpec("tensorboard", None)}
    monkeypatch.setattr(common.log.importlib.util, "find_spec", found.get)
    return told


def test_tensorboard_gets_every_row_if_it_is_installed(tmp_path, clock, tensorboard):
    log = new_log(tmp_path, start=10)
    train(log, 11, 20, clock, seconds=2.0)
    log.evaluated(20, miou=0.5)
    log.close()
    assert tensorboard == [
        (str(tmp_path), 11), ("loss", 15.5, 20), ("lr", 0.5, 20), ("images_per_s", 2.0, 20),
        ("data_wait", 0.0, 20), ("miou", 0.5, 20), "closed"]


def test_tensorboard_is_not_used_by_other_processes_or_when_missing(tmp_path, monkeypatch, tensorboard):
    train(new_log(tmp_path, main=False), 1, 10)
    monkeypatch.setattr(common.log.importlib.util, "find_spec", lambda name: None)
    log = new_log(tmp_path)
    train(log, 1, 10)
    log.close()
    assert tensorboard == [] and len(rows(tmp_path)) == 1
