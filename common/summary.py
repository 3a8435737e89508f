"""The table that papers print, of run folders: mean and standard deviation over the seeds.

python -m common.summary runs/cct-camvid-*                 a table; --markdown: for a README
python -m common.summary runs/cct-camvid-* --plot labeled  and a picture of mIoU over --labeled
python -m common.summary runs/*-seed0* --panel             and one of what each row predicts

A row holds the finished runs that differ only in --seed and in flags of the machine (--workers,
..). Its first columns are the settings that differ between runs of one script and dataset, and
those of FIRST that differ between any runs. Scores are in percent, at the last step: mIoU, of
several datasets also that of each, `fused` with MLMT; a classifier's macro AUC; `best`, chosen on
the scored images; `gain`, of mIoU (or fused) over the --supervised run of the same script, data,
labels, seed, --size, --backbone and --steps, if there is one. Hours are the mean time of a run,
evaluations included.
"""
import argparse
import json
import sys
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from common import checkpoint
from common.command_line import run
from common.datasets.labelled import PICKLES
from common.log import read_rows
from common.pictures import join_panels, line_plot, save_picture, short
from common.settings import BaseConfig, UserError, kinds_of, say, show

FIRST = ("script", "data", "labeled", "split", "supervised")
IGNORED = ("seed", *(field.name for field in fields(BaseConfig) if field.metadata["free"]))
KINDS = kinds_of(BaseConfig)
SCORES = {"miou": "mIoU", "miou_fused": "fused", "auc_macro": "AUC", "best": "best"}  # of log.csv
BRANCHES = {"mlmt": ("auc_macro", ["mlmt"]),  # --branch: its final score, and the folders of its
            "both": ("miou_fused", ["mlmt", "."])}  # logs and checkpoints
LEGEND = {"supervised on": "supervised", "supervised off": "semi-supervised"}


@dataclass
class Run:
    path: str
    seed: int
    settings: dict  # name: value in words; those that may matter
    scores: dict    # column of the table: the last value, 0..1
    running: str    # how far the run is; "" if it is finished
    steps: int
    hours: float
    gpu_gb: float   # the largest peak; 0 on the CPU


def read_run(path):
    """Raises UserError if it is no run folder, or damaged."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} is no run folder: expected config.json in it")
    try:
        config = json.loads((folder / "config.json").read_text())
        score, asked = BRANCHES.get(config.get("branch"), ("miou", ["."]))
        states = {branch: newest(folder / branch) for branch in ("mlmt", ".")}
        state = states[asked[-1]]
        branches = [branch for branch, one in states.items()  # or finished by another command
                    if branch in asked or one["step"] == one["steps"]]
        files = [*folder.glob("log.csv"), *folder.glob("*/log.csv")]
        logs = {file.parent: [{name: float(text) for name, text in row.items() if text}
                              for row in read_rows(file)[1]] for file in files}
        rows = [row for branch in branches for row in logs.get(folder / branch, [])]
        last = ([row for row in rows if score in row] or [{}])[-1]
        running = ", ".join("{step}/{steps}".format(**states[branch]) for branch in reversed(asked))
        if (last.get("step") == state["steps"]
                and config.get("stages") == state["config"].get("stages")):  # no stage was added
            running = ""
        settings = {name: "-" if value in (None, "") else show(value, KINDS.get(name))
                    for name, value in config.items() if name not in IGNORED}
        if settings.get("split", "-") != "-" and not settings["split"].endswith(PICKLES):
            settings["labeled"] = "-"  # the list says it
        titles = {f"miou_{data['name']}": data["name"] for data in state["domains"]} | SCORES
        scores = {titles[name]: row[name] for row in rows for name in titles if name in row}
        every = [row for log in logs.values() for row in log]
        return Run(path, config["seed"], dict(script=state["script"]) | settings, scores, running,
                   state["steps"], sum(row.get("seconds", 0) for row in every) / 3600,
                   max([row.get("gpu_gb", 0) for row in every], default=0))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} has a file that is damaged, or of another version "
                        f"({type(error).__name__}: {error})") from error


def newest(folder):
    """The checkpoint of a training, or of its last stage"""
    files = [*folder.glob("last.pt"), *folder.glob("stage*/last.pt")]
    states = [checkpoint.load(file, "meta") for file in files]  # without the tensors' values
    none = dict(script="?", step=0, steps="?", domains=[])
    return max(states, key=lambda state: state["step"], default=none)


def chosen(one, names):
    """Settings of a run; `-` stands for none, and for one that its script lacks."""
    return tuple(one.settings.get(name, "-") for name in names)


def group(runs):
    """-> (names of the settings that differ, {their values: runs})"""
    def count(*names):
        return len({chosen(one, names) for one in runs})

    found = [name for one in runs for name in one.settings]
    names = [name for name in dict.fromkeys([*FIRST, *found])
             if count("script", "data", name) > count("script", "data")
             or name in FIRST and count(name) > 1]
    groups = {}
    for one in runs:
        groups.setdefault(chosen(one, names), []).append(one)
    return names, dict(sorted(groups.items(), key=lambda item: [*map(order, item[0])]))


def order(words):
    """Sort key: numbers and fractions by their size, before all other words"""
    try:
        return 0, Fraction(words), ""
    except (ValueError, ZeroDivisionError):
        return 1, 0, words


def add_gains(runs):
    """Put a gain into the scores of those that have exactly one supervised counterpart."""
    def key(one):
        return *chosen(one, (*FIRST[:4], "size", "backbone", "steps")), one.seed

    baselines = {}
    for one in runs:
        if one.settings.get("supervised") == "on" and "mIoU" in one.scores:
            baselines.setdefault(key(one), []).append(one.scores["mIoU"])
    for one in runs:
        score = one.scores.get("fused", one.scores.get("mIoU"))
        found = baselines.get(key(one), [])
        if one.settings.get("supervised") == "off" and score is not None and len(found) == 1:
            one.scores["gain"] = score - found[0]


def mean_and_std(runs, score):
    """In percent; the standard deviation of a sample (n - 1), 0 of one run"""
    values = [100 * one.scores[score] for one in runs]
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0


def table(names, groups):
    """-> rows of words, titles first"""
    shown = [i for i, name in enumerate(names) if name != "steps"]  # it has a column in any case
    found = {score for runs in groups.values() for one in runs for score in one.scores}
    last = (*SCORES.values(), "gain")
    scores = [*sorted(found - {*last}), *(score for score in last if score in found)]
    rows = [[*(names[i] for i in shown), *scores, "seeds", "steps", "hours", "GPU GB"]]
    for values, runs in groups.items():
        row = [values[i] for i in shown]
        for score in scores:
            words = "-"
            if all(score in one.scores for one in runs):
                words = "{:.1f} +- {:.1f}".format(*mean_and_std(runs, score))
            row.append(words if len(runs) > 1 else words.partition(" ")[0])
        hours = np.mean([one.hours for one in runs])
        gpu_gb = max(one.gpu_gb for one in runs)
        rows.append([*row, str(len({one.seed for one in runs})), str(runs[0].steps),
                     short(round(hours, 2)) if hours >= 0.01 else "<0.01",
                     short(gpu_gb) if gpu_gb else "-"])
    return rows


def in_words(settings):
    """{name: value}, as a line of a plot and a column of a panel are called"""
    words = [f"{name} {value}" for name, value in settings.items() if value != "-"]
    return ", ".join(LEGEND.get(word, word).removeprefix("script ") for word in words)


def plot(names, groups, x, path):
    """Write a picture of mIoU over the setting x, a line for each combination of the others."""
    groups = {values: runs for values, runs in groups.items() if "mIoU" in runs[0].scores}
    if x not in names or not groups:
        raise UserError(f"--plot {x}: expected a setting that differs between finished runs with "
                        f"an mIoU; those that differ: {', '.join(names) or 'none'}")
    found = sorted({values[names.index(x)] for values in groups}, key=order)
    try:
        places = {words: float(words) for words in found}
    except ValueError:  # fractions and words stand at equal distances
        places = {words: i for i, words in enumerate(found, 1)}
    lines = {}
    for values, runs in groups.items():
        settings = dict(zip(names, values))
        place = places[settings.pop(x)]
        line = in_words(settings) or runs[0].settings["script"]
        for score, name in dict(mIoU=line, fused=f"{line}, fused with MLMT").items():
            if all(score in one.scores for one in runs):
                lines.setdefault(name, []).append((place, *mean_and_std(runs, score)))
    line_plot([("mIoU in %, mean and standard deviation over seeds", lines)], path,
              "labelled images" if x == "labeled" else x, dict(zip(places.values(), places)))


def panel(names, groups, path):
    """Write a picture of some scored images, their truth, and what a run of each row predicts."""
    panels, titles = [], []
    for values, (one, *_) in groups.items():
        settings = dict(zip(names, values))
        first = {name: settings[name] for name in FIRST if name in settings}
        titles.append(in_words(first or settings) or one.settings["script"])
        file = Path(one.path, "predictions.png")
        if not file.is_file():
            raise UserError(f"--panel: expected {file}, as a run on one dataset writes it")
        with Image.open(file) as picture:
            panels.append(picture.convert("RGB"))
    if not panels:
        raise UserError("--panel: expected finished runs")
    try:
        save_picture(join_panels(panels, titles), path)
    except ValueError as error:
        raise UserError(f"--panel: {error}; expected runs on one dataset, scored alike") from error


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m common.summary", allow_abbrev=False,
                                     description=__doc__.partition("\n\n")[0])
    parser.add_argument("folders", nargs="+", metavar="RUN", help="run folders: runs/cct-camvid-*")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    picture = parser.add_mutually_exclusive_group()
    picture.add_argument("--plot", metavar="SETTING", help="draw mIoU over it: k, labeled, ..")
    picture.add_argument("--panel", action="store_true", help="join the rows' predictions.png")
    parser.add_argument("--out", metavar="FILE", help="that picture [summary.png]")
    args = parser.parse_args(argv)
    if args.out and not (args.plot or args.panel):
        raise UserError("--out has no effect without --plot or --panel")
    folders = {Path(folder).resolve(): folder for folder in args.folders}  # each of them once
    runs = [read_run(folder) for folder in folders.values()]
    finished = [one for one in runs if not one.running]
    add_gains(finished)
    names, groups = group(finished)
    rows = table(names, groups) if groups else []
    widths = [max(map(len, column)) for column in zip(*rows)]
    for i, row in enumerate(rows):
        line = "  ".join(map(str.ljust, row, widths)).rstrip()
        say(f"| {' | '.join(row)} |" if args.markdown else line)
        if args.markdown and i == 0:
            say("|" + "--|" * len(row))
    for one in runs:
        if one.running:
            say(f"{one.path}: unfinished, step {one.running}")
    path = args.out or "summary.png"
    if args.plot:
        plot(names, groups, args.plot.replace("-", "_"), path)
    if args.panel:
        panel(names, groups, path)
    if args.plot or args.panel:
        say(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(run(main))
