"""A run's log: progress lines, log.csv, curves.png, and TensorBoard if it is installed."""
import csv
import datetime
import math
import time
from contextlib import contextmanager, suppress

import torch

from common.files import replacing
from common.pictures import line_plot, short
from common.settings import UserError, say

PANELS = {  # title of a plot: how its columns begin
    "losses": "loss", "mIoU or AUC": ("miou", "auc", "best"), "weights": "w_",
    "learning rate": "lr", "shares and scores": ("kept", "threshold", "passed", "d_")}


class Log:
    """What a run says and writes down. Every process calls every method; `main` prints and writes.

    A row has means over the steps since the last one, images_per_s, data_wait (share of the time
    inside `waiting`; both count the start-up in the first row) and gpu_gb (the peak since then).
    Every row has `seconds` since the one before, whose sum is the time that a run took, all in all.
    folder: an existing Path. start_step: steps already done; later rows of log.csv are dropped.
    images_per_step: over all processes. mean: tensor -> its mean over them, None if there is one.
    clock: [time of the last row], a list that the logs of one run share.
    """

    def __init__(self, folder, total_steps, every, start_step, images_per_step, device,
                 main=True, mean=None, clock=None):
        self.folder = folder
        self.total_steps = total_steps
        self.every = every
        self.start_step = start_step
        self.images_per_step = images_per_step
        self.device = torch.device(device)
        self.main = main
        self._mean = mean or (lambda tensor: tensor)
        self._kept = []  # (step, {name: 0-d tensor}) since the last row
        self._writer = None
        self._begin = self._since = time.perf_counter()  # of the run, and of the last row
        self._clock = clock or [self._begin]
        self._waited = 0.0
        if not main:
            return
        self._columns, rows = read_rows(folder / "log.csv")
        self._rows = [row for row in rows if int(row["step"]) <= start_step]
        self._rewrite()
        with suppress(ImportError):  # without TensorBoard
            from torch.utils.tensorboard import SummaryWriter
            self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    @contextmanager
    def waiting(self):
        """`with log.waiting(): batch = next(batches)`: time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, step, **values):
        """Keep a step's values, 0-d tensors or numbers; tensors stay on the device until a flush.

        step: number of finished steps, from 1. Flushes if it is a multiple of `every`, or the last.
        """
        if self._kept and values.keys() != self._kept[0][1].keys():
            self.flush()
        copies = {name: torch.as_tensor(value, dtype=torch.float64).detach().clone()
                  for name, value in values.items()}  # as the caller may change a tensor in place
        self._kept.append((step, copies))
        if step % self.every == 0 or step == self.total_steps:
            self.flush()

    def flush(self):
        """Print a line and write a row for the steps since the last row; nothing if there are none.

        Called by `add` every few steps, by `evaluated`, before a checkpoint is written, and by who
        changes the columns. Raises UserError, on all processes, naming the first step with terms
        that are not finite, and those terms.
        """
        if not self._kept:
            return
        names = [*self._kept[0][1]]
        table = torch.stack([values[name].to(self.device) for _, values in self._kept
                             for name in names])
        table = self._mean(table).view(-1, len(names)).tolist()  # the one wait for the device
        for (step, _), row in zip(self._kept, table):
            wrong = [f"{name} = {x}" for name, x in zip(names, row) if not math.isfinite(x)]
            if wrong:
                raise UserError(f"training diverged at step {step} ({', '.join(wrong)}); the last "
                                "checkpoint is from before: try a smaller --lr or --precision fp32")
        values = {name: sum(column) / len(table) for name, column in zip(names, zip(*table))}
        now = time.perf_counter()
        values["images_per_s"] = len(table) * self.images_per_step / (now - self._since)
        values["data_wait"] = self._waited / (now - self._since)
        if self.device.type == "cuda":
            values["gpu_gb"] = torch.cuda.max_memory_allocated(self.device) / 2 ** 30
            torch.cuda.reset_peak_memory_stats(self.device)
        left = (now - self._begin) / (step - self.start_step) * (self.total_steps - step)
        self._record(step, values, f"ETA {datetime.timedelta(seconds=round(left))}")
        self._kept = []

    def evaluated(self, step, **values):
        """Print and write results of an evaluation; only `seconds` includes the time it took."""
        self.flush()
        self._record(step, values, "evaluation")

    def curves(self):
        """Write curves.png, a plot for each of PANELS that has columns."""
        if not self.main:
            return
        points = {key: [(int(row["step"]), float(row[key])) for row in self._rows if row.get(key)]
                  for key in self._columns}
        drawn = [(title, {key: points[key] for key in points if key.startswith(starts)})
                 for title, starts in PANELS.items()]
        line_plot([panel for panel in drawn if panel[1]] or drawn, self.folder / "curves.png")

    def close(self):
        """End TensorBoard's file. Does not flush: safe after any exception."""
        if self._writer:
            self._writer.close()

    def _record(self, step, values, note):
        """Print a line, append a row to log.csv (new names: new columns) and restart the clock."""
        self._since = time.perf_counter()
        self._waited = 0.0
        words = "  ".join(f"{name} {short(value)}" for name, value in values.items())
        if self.main:
            say(f"step {step}/{self.total_steps}  {words}  {note}")
        row = {"step": str(step)} | {name: f"{value:.6g}" for name, value in values.items()}
        if not self.main or any(row.items() <= old.items() for old in self._rows):
            return  # a finished run that is scored again keeps the row that it has
        row["seconds"] = f"{self._since - self._clock[0]:.6g}"
        self._clock[0] = self._since
        self._rows.append(row)
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._rewrite()
        else:
            with open(self.folder / "log.csv", "a", newline="") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        for name, value in values.items():
            if self._writer:
                self._writer.add_scalar(name, value, step)

    def _rewrite(self):
        """Write log.csv anew, with its header, atomically."""
        with replacing(self.folder / "log.csv") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)


def read_rows(path):
    """-> (names of the columns, rows: {name: text}) of log.csv; no rows if there is no file. Raises
    UserError for a damaged one."""
    data = path.read_bytes() if path.exists() else b""
    whole_lines = data[:data.rfind(b"\n") + 1]  # without one that a kill has cut short
    reader = csv.DictReader(whole_lines.decode(errors="replace").splitlines())
    rows = list(reader)
    if any(None in [*row, *row.values()] or not row.get("step", "").isdigit() for row in rows):
        raise UserError(f"{path}: expected a step in each line, and lines of equal length")
    return reader.fieldnames or ["step"], rows
