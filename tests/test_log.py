"""log.csv, progress lines, resuming, several processes."""
import csv
import math
import types

import pytest
import torch

import common.log
from common.log import Log
from common.settings import UserError


def new_log(folder, total=100, every=10, start=0, **more):
    return Log(folder, total, every, start, 4, "cpu", **more)


def rows(folder, *names):
    with open(folder / "log.csv", newline="") as file:
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


def train(log, first, last):
    """Steps first..last with loss = step, a tensor that changes in place, and a number, lr"""
    loss = torch.tensor(first - 1.0, dtype=torch.float64)
    for step in range(first, last + 1):
        loss += 1
        log.add(step, loss=loss, lr=0.5)


def test_a_row_holds_the_means_since_the_last_row(tmp_path):
    train(new_log(tmp_path, total=25), 1, 25)  # the last step flushes the rest
    expected = [("10", "5.5", "0.5"), ("20", "15.5", "0.5"), ("25", "23", "0.5")]
    assert rows(tmp_path, "step", "loss", "lr") == expected


def test_new_columns_keep_the_old_rows_and_start_a_row_of_their_own(tmp_path):
    log = new_log(tmp_path, every=4)
    train(log, 1, 2)
    for step in (3, 4):
        log.add(step, lr=0.25, loss=torch.tensor(9.0), loss_u=math.pi)
    log.evaluated(4, miou=torch.tensor(0.25))
    assert rows(tmp_path, "step", "loss", "lr", "loss_u", "miou") == [
        ("2", "1.5", "0.5", "", ""), ("4", "9", "0.25", "3.14159", ""), ("4", "", "", "", "0.25")]


def test_a_resumed_run_has_every_step_once(tmp_path):
    log = new_log(tmp_path)
    train(log, 1, 20)
    log.evaluated(20, miou=0.5)
    before = rows(tmp_path, "step", "loss", "lr", "miou")
    train(log, 21, 39)  # killed after 39 steps, whose last checkpoint is of step 20
    train(new_log(tmp_path, start=20), 21, 40)
    assert rows(tmp_path, "step", "loss", "lr", "miou") == [
        *before, ("30", "25.5", "0.5", ""), ("40", "35.5", "0.5", "")]
    for _ in range(2):  # the second time, a finished run is scored again
        new_log(tmp_path, start=40).evaluated(40, miou=1 / 3)
        assert rows(tmp_path, "miou")[5:] == [("0.333333",)]
    new_log(tmp_path)  # begun anew
    assert rows(tmp_path) == []


def test_a_line_that_a_kill_has_torn_is_dropped(tmp_path):
    train(new_log(tmp_path), 1, 20)
    whole = (tmp_path / "log.csv").read_bytes()
    third_line = whole.splitlines(keepends=True)[2]
    for kept in (1, 3, len(third_line) - 1):
        (tmp_path / "log.csv").write_bytes(whole + third_line[:kept])
        new_log(tmp_path, start=20)
        assert (tmp_path / "log.csv").read_bytes() == whole


@pytest.mark.parametrize("line", ["20,1.5", "x,1,2", "20,1,2,3"])
def test_a_file_that_is_no_log_is_named(tmp_path, line):
    (tmp_path / "log.csv").write_text(f"step,loss,lr\n10,1,1\n{line}\n30,1,1\n")
    with pytest.raises(UserError, match=r"log\.csv: expected a step"):
        new_log(tmp_path, start=30)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_term_that_is_not_finite_stops_the_run_and_is_named_with_its_step(tmp_path, value):
    log = new_log(tmp_path)
    with pytest.raises(UserError, match=rf"step 4 \(loss_u = {value}\)"):
        for step, loss_u in enumerate([1.0, 1.0, 1.0, value, 1.0, math.nan, 1.0, 1.0, 1.0, 1.0], 1):
            log.add(step, loss_s=torch.tensor(1.0), loss_u=torch.tensor(loss_u))
    assert rows(tmp_path) == []


def test_clocks(tmp_path, monkeypatch):
    """The seconds of all rows are the time that a run took; speed and wait are of training alone."""
    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(common.log, "time", clock)
    shared = [clock.now]  # with the logs of other parts of the run
    clock.now += 3
    log = new_log(tmp_path, total=20, clock=shared)
    with log.waiting():
        clock.now += 5
    clock.now += 15
    train(log, 1, 10)
    clock.now += 100
    log.evaluated(10, miou=0.5)
    log = new_log(tmp_path, total=20, start=10)  # resumed, and scored once more
    with log.waiting():
        clock.now += 7
    log.evaluated(10, miou=0.5)
    clock.now += 20
    train(log, 11, 20)
    assert rows(tmp_path, "step", "seconds", "images_per_s", "data_wait") == [
        ("10", "23", "2", "0.25"), ("10", "100", "", ""), ("20", "27", "2", "0")]


def test_only_the_main_process_writes_but_all_take_part_in_the_mean(tmp_path, capsys):
    log = new_log(tmp_path, main=False, mean=lambda table: table + math.nan)
    log.curves()
    with pytest.raises(UserError, match=r"step 1 \(loss = nan, lr = nan\)"):  # on another process
        train(log, 1, 10)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
    train(new_log(tmp_path, every=2, mean=lambda table: table + 1), 1, 2)
    assert rows(tmp_path, "loss", "lr") == [("2.5", "1.5")]
