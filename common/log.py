"""A run's log: the progress line, log.csv, curves.png, and TensorBoard if it is installed."""
import csv
import importlib.util
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager

import torch

from common.pictures import line_plot, short
from common.settings import UserError

PANELS = {"losses": "loss", "mIoU": ("miou", "best"), "weights and learning rates": ("w_", "lr")}  # title: columns


def _read_csv(path):
    """(columns, rows as dicts of strings) of a log.csv. A last line cut short by a kill is dropped."""
    data = path.read_bytes()
    lines = list(csv.reader(data[:data.rfind(b"\n") + 1].decode().splitlines()))
    columns, rows = lines[0] if lines else ["step"], lines[1:]
    for number, row in enumerate(rows, 2):
        if columns[0] != "step" or len(row) != len(columns) or not row[0].isdigit():
            raise UserError(f"{path}, line {number} is not a row of a log: expected a step and then "
                            f"{len(columns) - 1} more columns; mend that line, or move the file away")
    return columns, [dict(zip(columns, row)) for row in rows]


def _show(values):
    return "  ".join(f"{name} {short(value)}" for name, value in values.items())


def _duration(seconds):
    minutes = math.ceil(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f}s"
    if minutes < 60:
        return f"{minutes}min"
    return f"{minutes // 60}h{minutes % 60:02d}"


class Log:
    """What a run says and writes down. Every process calls every method; only `main` prints and writes.

    Tensors given to `add` stay on the device and are fetched together, once per `every` steps, so that no
    step waits for the device. The progress line and a row of log.csv hold the means over the steps since the
    last row; images_per_s and data_wait (the share of the time spent inside `waiting`, 0..1) leave out the
    first step and evaluations. The ETA goes by the clock on the wall, so that it has room for evaluations.

    folder: an existing Path. start_step: number of steps already done when a run is resumed; rows of log.csv
    beyond it are dropped, since these steps are taken again. images_per_step: over all processes.
    mean: tensor -> its mean over the processes, None when there is one.
    """

    def __init__(self, folder, total_steps, every, start_step, images_per_step, device, main=True, mean=None):
        self.folder, self.total_steps, self.every, self.main = folder, total_steps, every, main
        self.images_per_step, self.device = images_per_step, torch.device(device)
        self._mean = mean or (lambda tensor: tensor)
        self._kept = []                            # (step, {name: 0-d tensor or float}) since the last flush
        self._live = main and sys.stdout.isatty()  # then the progress line is rewritten in place
        self._line_open = False                    # the cursor stands behind such a line
        self._warm = None                          # (time, step) at the end of the first step
        self._last_add = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._restart_clock()
        self._path, self._writer = folder / "log.csv", None
        if not main:
            return
        columns, rows = _read_csv(self._path) if self._path.exists() else ([], [])
        rows = [row for row in rows if int(row["step"]) <= start_step]
        self._columns = columns if rows else ["step"]
        self._rewrite(rows)
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
            self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    @contextmanager
    def waiting(self):
        """`with log.waiting(): batch = next(batches)`: the time spent inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, step, **values):
        """Keep a step's values, 0-d tensors on any device or numbers; the names are the same every time.

        step: number of finished steps, from 1. Flushes if it is a multiple of `every`, or the last.
        """
        if self._kept and values.keys() != self._kept[0][1].keys():
            raise ValueError(f"step {step} logs {[*values]}, but the step before {[*self._kept[0][1]]}")
        for name, value in values.items():  # copied, as the caller may change the tensor in place afterwards
            is_tensor = isinstance(value, torch.Tensor)
            values[name] = value.detach().to(torch.float64, copy=True) if is_tensor else float(value)
        self._kept.append((step, values))
        self._last_add = time.perf_counter()
        self._timed_steps += 1
        if self._warm is None:  # the first step tunes kernels and fills queues: no measure of the others
            self._warm = self._last_add, step
            self._restart_clock(self._last_add)
        if step % self.every == 0 or step == self.total_steps:
            self.flush()

    def flush(self):
        """Write a row for the steps kept since the last one; nothing if there are none.

        To be called before an evaluation, and before a checkpoint is saved, lest a diverged network be saved.
        Raises UserError, on all processes, naming the first step with terms that are not finite, and those.
        """
        self._flush()

    def evaluated(self, step, **values):
        """Write a row, and print a line, with the results of an evaluation, whose time is not counted.

        A finished run that is only scored again keeps the row it has.
        """
        self._flush(end=self._last_add)
        if self.main:
            values = {name: float(value) for name, value in values.items()}
            self.say(f"step {step}/{self.total_steps}  evaluation:  {_show(values)}")
            again = self._last_add is None and any(
                int(row["step"]) == step and row.get(name) for row in _read_csv(self._path)[1] for name in values)
            if not again:
                self._write(step, values)
        self._restart_clock()

    def say(self, text):
        """Print a line for the user."""
        if self.main:
            print(("\r\x1b[K" if self._line_open else "") + text, flush=True)
            self._line_open = False

    def curves(self, panels=PANELS):
        """Write curves.png from log.csv: the columns that begin with a panel's words, for every panel that has some."""
        if not self.main:
            return
        columns, rows = _read_csv(self._path)
        series = {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]]
                  for name in columns}
        panels = [(title, {name: series[name] for name in columns if name.startswith(starts)})
                  for title, starts in panels.items()]
        line_plot([panel for panel in panels if panel[1]] or panels[:1], self.folder / "curves.png")

    def close(self):
        """End the progress line and TensorBoard's file. Does not flush: safe after any exception."""
        if self._line_open:
            print(flush=True)
            self._line_open = False
        if self._writer:
            self._writer.close()

    def _restart_clock(self, now=None):
        self._since = time.perf_counter() if now is None else now
        self._timed_steps, self._waited = 0, 0.0

    def _flush(self, end=None):
        """end: the time at which the last step ended; None when it has only just done so."""
        if not self._kept:
            return
        names = list(self._kept[0][1])
        table = torch.stack([torch.as_tensor(values[name], dtype=torch.float64, device=self.device)
                             for _, values in self._kept for name in names])
        table = self._mean(table).view(-1, len(names)).tolist()  # the one wait for the device
        end = time.perf_counter() if end is None else end
        steps, self._kept = [step for step, _ in self._kept], []
        for step, row in zip(steps, table):
            wrong = [f"{name} = {value}" for name, value in zip(names, row) if not math.isfinite(value)]
            if wrong:
                raise UserError(f"training diverged at step {step} ({', '.join(wrong)}); the checkpoints in "
                                f"{self.folder} are from before; try a smaller --lr, or --precision fp32")
        if self.main:
            means = {name: sum(column) / len(column) for name, column in zip(names, zip(*table))}
            self._report(steps[-1], means, end)
        self._restart_clock(end)

    def _report(self, step, means, end):
        """Print the progress line and write the row of the interval that ended at the time `end`."""
        seconds, speed = end - self._since, {"images_per_s": None, "data_wait": None, "gpu_gb": None}
        line = [f"step {step}/{self.total_steps}", _show(means)]
        if self._timed_steps and seconds > 0:
            speed["images_per_s"] = self._timed_steps * self.images_per_step / seconds
            speed["data_wait"] = self._waited / seconds
            line.append(f"{short(speed['images_per_s'])} img/s  wait {100 * speed['data_wait']:.0f}%")
        warm_time, warm_step = self._warm
        if warm_step < step < self.total_steps:
            pace = (end - warm_time) / (step - warm_step)
            line.append("ETA " + _duration(pace * (self.total_steps - step)))
        if self.device.type == "cuda":
            speed["gpu_gb"] = torch.cuda.max_memory_allocated(self.device) / 2 ** 30
            line.append(f"{speed['gpu_gb']:.1f} GB")
        line = "  ".join(line)
        if self._live:  # cut to the terminal's width: a wrapped line could not be rewritten
            print("\r\x1b[K" + line[:shutil.get_terminal_size().columns - 1], end="", flush=True)
            self._line_open = True
        else:
            print(line, flush=True)
        self._write(step, means | speed)

    def _write(self, step, values):
        """Append a row to log.csv: blanks for None and for columns without a value; new columns are added."""
        new = [name for name in values if name not in self._columns]
        if new:
            rows = _read_csv(self._path)[1]
            self._columns = self._columns + new
            self._rewrite(rows)
        known = {name: value for name, value in values.items() if value is not None}
        with open(self._path, "a", newline="") as file:
            cells = [f"{known[name]:.6g}" if name in known else "" for name in self._columns[1:]]
            self._put(file, [[step, *cells]])
        for name, value in known.items() if self._writer else ():
            self._writer.add_scalar(name, value, step)

    def _rewrite(self, rows):
        """Replace log.csv, header and all, in one stroke."""
        temporary = self._path.with_name("log.csv.tmp")
        with open(temporary, "w", newline="") as file:
            self._put(file, [self._columns, *([row.get(name, "") for name in self._columns] for row in rows)])
        os.replace(temporary, self._path)

    @staticmethod
    def _put(file, lines):
        csv.writer(file, lineterminator="\n").writerows(lines)
        file.flush()
        os.fsync(file.fileno())
