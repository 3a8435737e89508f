"""The folder of one run, which holds its settings, checkpoints, log and pictures. The training loop
calls it; it calls nothing in a script."""
import copy
import dataclasses
import fcntl
import json
import shutil
import signal
import time
from pathlib import Path

import torch

from common import checkpoint
from common.files import make_folder, replacing
from common.log import Log
from common.pictures import prediction_panel, save_picture
from common.settings import UserError, flag, kinds_of, say, show, to_save


class RunFolder:
    """One training's place on the disk. Every process calls every method; only one writes.

    path: holds config.json, log.csv, last.pt, best.pt, curves.png, predictions.png.
    SIGTERM and SIGHUP are caught from here on, for `stop_if_asked`.
    """

    def __init__(self, script, cfg, ctx, *datasets, free=()):
        """Make cfg.out, or reopen it. free: more settings that may differ when a run is resumed.

        Raises UserError if the folder holds a run with other settings, or one that is going on.
        """
        self.path = self.log_path = Path(cfg.out)
        cfg.precision = ctx.precision  # not `auto`: a resumed run must have the same precision
        self.cfg = cfg
        self.datasets = datasets
        self.ctx = ctx
        domains = [dict(name=data.name, classes=list(data.classes), images=data.train.fingerprint,
                        labelled=data.labelled, palette=torch.from_numpy(data.palette))
                   for data in datasets]
        self.about = dict(script=script, config=to_save(cfg), domains=domains)
        self.stop = []  # signals that came in; a list, so that the parts of a run share it
        self.clock = [time.perf_counter()]  # of the last row of a log; shared as well
        if ctx.main:
            for data in datasets:
                data.val.check_sizes()  # told now, not after the first steps
            make_folder(self.path)
            self.lock = lock(self.path)
            keep_config(self.path, cfg, free)
        ctx.barrier()
        self.catch_signals()

    def part(self, name, own_log=True):
        """A RunFolder for one of several trainings of this run, in a subfolder called `name`."""
        part = copy.copy(self)
        part.about = self.about | dict(part=name)
        part.path = self.path / name
        if own_log:
            part.log_path = part.path
        make_folder(part.path)
        return part

    def introduce(self, labelled, unlabelled, step, text="", data=None):
        """Say what is about to be trained on: machine, images, steps; the dataset's notes."""
        data = data or self.datasets[0]
        resumed = f", resumed at {step}" if step else ""
        self.ctx.say(f"{self.ctx}; {data.name}: {len(labelled)} labelled and {len(unlabelled)} "
                     f"unlabelled images, {len(data.val)} to score ({data.scored_on}); "
                     f"{text or f'{self.cfg.steps} steps'}{resumed}")
        for note in data.notes:
            self.ctx.say(note)

    # ------------------------------------------------------------------ checkpoints

    @property
    def is_new(self):
        """Is there no checkpoint yet, so that pretrained weights have to be loaded?"""
        return not (self.path / "last.pt").exists()

    def resume(self, images_per_step, steps, first_step=0, **parts):
        """Fill `parts` from last.pt, if there is one, and open the log. -> the step to go on from

        parts: what has state: tensors, or objects with state_dict and load_state_dict; None is
        left out. `net` must be given: --evaluate scores it. first_step: number of steps of earlier
        trainings in the same log; steps: the last step of the log.
        """
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.first_step = first_step
        self.steps = steps
        self.best, self.best_step, step = 0.0, 0, first_step
        if not self.is_new:
            state = checkpoint.load(self.path / "last.pt", self.ctx.device)
            try:
                for data, domain in zip(self.datasets, state["domains"], strict=True):
                    checkpoint.same_classes(data, domain, self.path / "last.pt")
                    if domain["images"] != data.train.fingerprint:
                        raise UserError(f"{self.path / 'last.pt'} was trained on other images than "
                                        f"those of {data.name} in --root {self.cfg.root}: choose "
                                        f"another folder with --out")
                    if domain["labelled"] != data.labelled:
                        raise UserError(f"{self.path / 'last.pt'} was trained with other labelled "
                                        f"images: since then the list of --split, or the masks in "
                                        f"--root, have changed; choose another folder with --out")
                step, self.best, self.best_step = state["step"], state["best"], state["best_step"]
                for name, part in self.parts.items():
                    if isinstance(part, torch.Tensor):
                        part.copy_(state[name])
                    else:
                        part.load_state_dict(state[name])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{self.path / 'last.pt'} does not fit this run ({error}): choose "
                                f"another folder with --out, or move this one away") from error
        self.log = Log(self.log_path, steps, self.cfg.log_every, step, images_per_step,
                       self.ctx.device, self.ctx.main, self.ctx.mean, self.clock)
        return step - first_step

    def save(self, step):
        """Write last.pt, from which a run goes on as if nothing had happened."""
        states = {name: part if isinstance(part, torch.Tensor) else part.state_dict()
                  for name, part in self.parts.items()}
        self.write("last.pt", step, best=self.best, best_step=self.best_step, **states)

    def write(self, name, step, **state):
        """Write a checkpoint. A loss or a weight that is not finite ends the run with a UserError
        instead; weights are checked too, as the loss shows them only one step later."""
        self.log.flush()
        weights = self.parts["net"].state_dict().values()
        if not torch.stack([weight.isfinite().all() for weight in weights]).all():
            raise UserError(f"training diverged before step {step}: weights are not finite; the "
                            f"last checkpoint is from before: try a smaller --lr, or --precision "
                            f"fp32")
        if self.ctx.main:
            state = self.about | dict(step=step + self.first_step, steps=self.steps) | state
            checkpoint.save(self.path / name, state)

    # ------------------------------------------------------------------ results

    def scored(self, step, score, examples=(), name="miou", **columns):
        """Note an evaluation: a row of log.csv, best.pt, the panel predictions.png, curves.png.

        score: 0..1, the larger the better; name: its column; columns: further ones.
        examples: rows of the panel, as inference.Examples keeps them.
        """
        if score > self.best:
            self.best, self.best_step = score, step + self.first_step
            self.write("best.pt", step, net=self.parts["net"].state_dict(), **{name: score})
        self.log.evaluated(step + self.first_step, **{name: score}, **columns, best=self.best)
        self.show(examples)
        self.log.curves()

    def show(self, examples, data=None):
        """Write predictions.png (predictions-<name>.png if there are several datasets)."""
        data = data or self.datasets[0]
        name = f"predictions-{data.name}.png" if len(self.datasets) > 1 else "predictions.png"
        if self.ctx.main and examples:
            panel = prediction_panel(examples, data.palette, data.classes)
            save_picture(panel, self.path / name)

    def finish(self, confusion=None, result=""):
        """End a run with its last lines: the table, if there is one, and `final: mIoU .. <folder>`,
        or another result"""
        self.log.close()
        if confusion:
            self.ctx.say(confusion.table(self.datasets[0].classes))
            result = result or f"mIoU {100 * confusion.miou():.1f} ({self.best_score})"
        self.ctx.say(f"final: {result} {self.cfg.out}")
        self.ctx.close()

    def take_over(self, part):
        """Copy the networks of a part, without its optimiser, and its panel into this folder."""
        for name in ("last.pt", "best.pt"):
            if self.ctx.main and (part.path / name).exists():
                state = checkpoint.load(part.path / name)
                kept = {key: state[key] for key in (*self.about, "step", "steps", "net")}
                checkpoint.save(self.path / name, kept)
        if self.ctx.main:
            shutil.copy(part.path / "predictions.png", self.path)

    @property
    def best_score(self):
        """The best evaluation in words, for the last line"""
        return f"best {100 * self.best:.1f} at step {self.best_step}"

    # ------------------------------------------------------------------ signals

    def catch_signals(self, catch=True):
        """From now on SIGTERM and SIGHUP are only noted, for stop_if_asked. With catch=False they
        end the process at once; if one was noted before, the process ends here."""
        if self.stop and not catch:
            self.ctx.say("stopped by a signal; the same command resumes")
            raise SystemExit(143)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                handler = (lambda n, _: self.stop.append(n)) if catch else signal.SIG_DFL
                signal.signal(number, handler)

    def stop_if_asked(self, step):
        """Save and end the process if one of the processes got a signal. Several processes ask one
        another every --log-every steps only."""
        asked = len(self.stop)
        if self.ctx.world > 1 and step % self.cfg.log_every == 0:
            asked = self.ctx.sum(torch.tensor(asked, device=self.ctx.device))
        elif self.ctx.world > 1:
            asked = 0
        if asked:
            self.save(step)
            self.ctx.say(f"stopped by a signal: saved at step {step}; the same command resumes")
            self.log.close()
            self.ctx.barrier()  # a process that ends has torchrun end the others
            self.ctx.close()
            raise SystemExit(143)


def lock(path):
    """Claim a run folder for this process until it ends. Raises UserError if another one has it."""
    file = open(path / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"--out {path}: another process is training in this folder: wait for it, "
                        f"or choose another folder. If its machine has crashed, delete .lock in "
                        f"this folder") from error
    except OSError:  # such as Lustre mounted without flock
        say(f"{path}: a file system without locks: do not train in this folder twice at a time")
    return file  # open as long as the lock is held


def keep_config(folder, config, free=()):
    """Write config.json; if the folder holds a run already, refuse settings that contradict it.

    free: fields that may differ beside those declared so. A folder without a checkpoint holds no
    run yet. Raises UserError naming every difference, or for somebody else's config.json.
    """
    path = folder / "config.json"
    now = json.loads(json.dumps(to_save(config)))
    if path.exists():
        try:
            before = json.loads(path.read_text())
            before = {name: before[name] for name in now}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged, or of another script or version: choose another "
                            f"folder with --out, or move this one away") from error
        kinds = kinds_of(type(config))
        free = {f.name for f in dataclasses.fields(config) if f.metadata["free"]} | set(free)
        differences = [f"{flag(name)} was {show(before[name], kinds[name])}, now "
                       f"{show(now[name], kinds[name])}" for name in now
                       if name not in free and before[name] != now[name]]
        if differences and any(folder.rglob("*.pt")):
            raise UserError(f"{folder} holds a run with other settings ({'; '.join(differences)}): "
                            f"repeat its command, or give its settings and --out, to resume it; or "
                            f"choose another folder with --out")
    with replacing(path) as file:
        file.write(json.dumps(now, indent=1) + "\n")
