"""The command line: `parse` reads the flags that the fields of a script's Config describe.

Order of precedence: the dataclass's defaults < the preset of `--data` < --released < the flags
given. An unknown flag, a value of the wrong type, a number out of its limits or a flag that has no
effect beside the others ends with exit status 2 and one sentence.
"""
import argparse
import dataclasses
import math
import os
import re
import sys
import typing
from hashlib import sha1
from pathlib import Path

import torch

from common.datasets.labelled import PICKLES
from common.settings import ANY, Size, UserError, flag, is_list, kinds_of, say, show


def _size(text):
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write HEIGHTxWIDTH (360x480) or one number (320)")
    return int(sides[0]), int(sides[-1])


def _number(kind, within):
    low, high = within or (None, None)

    def parse_number(text):
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            expected = "a whole number" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
        if low is not None and number < low:
            raise argparse.ArgumentTypeError(f"{text}: expected at least {low}")
        if high is not None and number > high:
            raise argparse.ArgumentTypeError(f"{text}: expected at most {high}")
        return number
    return parse_number


def _list(kind, within, choices):
    """Parser of a comma-separated list. `none` is the empty list, where 0 is the lower limit."""
    def parse_list(text):
        if choices is None and text == "none" and within[0] == 0:
            return ()
        parts = [part.strip() for part in text.split(",")]
        if choices is None:
            return tuple(_number(kind, within)(part) for part in parts)
        if not set(parts) <= set(choices) or len(set(parts)) < len(parts):
            raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(choices)}")
        return tuple(parts)
    return parse_list


def _add_flag(group, field, kind, value):
    """Add the flag of one field. value: the default, which --help shows, unless it is None or "",
    which a user cannot type."""
    meta = field.metadata
    text = meta["help"]
    if value not in (None, ""):
        text = re.sub(r" \[.*?\]", "", text) + f" [{show(value, kind)}]"  # instead of a rule
    words = dict(help=text.replace("%", "%%"), default=argparse.SUPPRESS, dest=field.name)
    if kind is bool:
        words |= dict(action=argparse.BooleanOptionalAction)
    elif kind is Size:
        words |= dict(type=_size, metavar="HxW")
    elif is_list(kind):
        item = _list(typing.get_args(kind)[0], meta["within"], meta["choices"])
        words |= dict(type=item, metavar="A,B,..")
    elif typing.get_origin(kind) is tuple:
        number, *others = typing.get_args(kind)
        words |= dict(type=_number(number, meta["within"]), nargs=1 + len(others))
        words |= dict(metavar=number.__name__.upper())
    elif kind is str:
        words |= dict(choices=meta["choices"], metavar=None if meta["choices"] else "TEXT")
    else:
        words |= dict(type=_number(kind, meta["within"]), choices=meta["choices"])
        words |= dict(metavar=None if meta["choices"] else {int: "N", float: "X"}[kind])
    group.add_argument(flag(field.name), **words)


def preset_of(presets, data):
    """The preset of a dataset. For `a+b`: a preset of its own if there is one, else that of a."""
    in_order = "+".join(sorted(data.split("+")))
    return presets.get(in_order, presets.get(data.partition("+")[0], {}))


def released_settings(config_class, released, data, given=()):
    """The settings of --released: released["all"] and released[data], without those in `given`"""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    settings = released.get("all", {}) | preset_of(released, data)
    return {name: value for name, value in settings.items()
            if name not in given and fields[name].metadata["replaces"] not in given}


def parse(config_class, presets, argv=None, description="", released=None):
    """Read the command line. -> (config, given): the dataclass filled in, and the fields that were
    given as flags with their values. released: {dataset, or "all": {field: value}} of --released.
    Raises UserError for flags that exclude each other."""
    argv = sys.argv[1:] if argv is None else list(argv)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    data = fields["data"].default
    if "--data" in argv[:-1]:
        data = argv[argv.index("--data") + 1]
    defaults = config_class(**preset_of(presets, data))
    parser = argparse.ArgumentParser(
        description=description.partition("\n\n")[0], allow_abbrev=False,
        usage="%(prog)s [--flag value ..]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34, width=110),
        epilog=f"In [brackets]: defaults with --data {data}. Eq., Sec., Table: of the paper.\n"
               "D1, D2, ..: deviations, listed at the top of the script, as are example commands.")
    kinds = kinds_of(config_class)
    groups, title = {}, ""
    for field in fields.values():
        title = field.metadata["group"] or title  # of the field before
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_flag(groups[title], field, kinds[field.name], getattr(defaults, field.name))
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, list):  # of two numbers, a range; or of three
            given[name] = tuple(value)
            if len(value) == 2 and value[0] > value[1]:
                parser.error(f"argument {flag(name)}: expected the smaller number first, not "
                             f"{value[0]} {value[1]}")
    preset = preset_of(presets, given.get("data", data))
    if given.get("released"):
        settings = released_settings(config_class, released or {}, given.get("data", data), given)
        preset = preset | settings
        if os.environ.get("RANK", "0") == "0":
            words = [f"{flag(name)} {show(value, kinds[name])}" for name, value in settings.items()]
            say(f"--released: {', '.join(words)}")
    config = config_class(**{**preset, **given})
    for name in given:
        other = fields[name].metadata["replaces"]
        if other in given:
            raise UserError(f"{flag(name)} and {flag(other)} exclude each other: give one of them")
        if other in fields:
            setattr(config, other, None)
    return config, given


def check_needs(given, *configs):
    """Refuse, with a UserError, a flag that was given and has no effect beside the others. configs:
    of each domain; an effect in one of them is enough"""
    def fits(value, wanted):
        if wanted is ANY:
            return bool(value)
        if isinstance(wanted, str) and isinstance(value, tuple):  # one of a list of names
            return wanted in value
        return value in (wanted if isinstance(wanted, tuple) else (wanted,))

    config = configs[0]
    kinds = kinds_of(type(config))
    for field in dataclasses.fields(config):
        needs = field.metadata["needs"] if field.name in given else {}
        for name, wanted in needs.items():
            if not any(fits(getattr(one, name), wanted) for one in configs):
                value = getattr(config, name)
                state = f"with {flag(name)} {show(value, kinds[name])}"
                if value is None or value == "" or isinstance(value, bool):
                    state = f"{'with' if value is True else 'without'} {flag(name)}"
                raise UserError(f"{flag(field.name)} has no effect {state}")
    if "labeled" in given and all(one.split and not one.split.endswith(PICKLES) for one in configs):
        raise UserError("--labeled has no effect with a list of images in --split: drop one of the "
                        "two")
    scoring = config.evaluate or config.predict
    if scoring and "size" in given and all(one.eval_size != "train" for one in configs):
        raise UserError(f"--size has no effect on scoring with --eval-size {config.eval_size}")
    if any(one.eval_size == "train" and not one.size for one in configs):
        raise UserError("--eval-size train scores at --size, which is not set here: give --size, "
                        "or --eval-size full")


def run_name(script, config, given):
    """Default run folder. Every given setting that matters is in its name, so that no two commands
    collide: runs/cct-voc-1464-seed0-distance=kl"""
    kinds = kinds_of(type(config))
    labels = []
    if config.split:  # with its folder: published lists are called 92/labeled.txt
        labels = ["_".join(Path(config.split).with_suffix("").parts[-2:])]
    if not labels or "labeled" in given:
        labels.append(config.labeled)
    words = [script, config.data, *labels, f"seed{config.seed}"]
    if "folder" in config.data and "root" in given:
        words.insert(2, "_".join(Path(config.root).parts[-2:]).strip("/"))
    others = given.keys() - {"data", "labeled", "split", "seed"}
    for field in dataclasses.fields(config):
        if field.name in others and not field.metadata["free"]:
            value = getattr(config, field.name)
            text = show(value, kinds[field.name])
            words.append(field.name if value is True else f"{field.name}={text}")
    name = re.sub(r"[^\w.=,+-]", "_", "-".join(words))
    if len(name) > 200:  # file systems allow 255 bytes
        name = f"{name[:191]}-{sha1(name.encode()).hexdigest()[:8]}"
    return "runs/" + name


def run(main):
    """Call a script's main; a user's mistake becomes one sentence and exit status 2, Ctrl-C a hint
    and status 130."""
    try:
        return main()
    except (UserError, OSError) as error:  # OSError: a disk that is full, a read-only folder
        # from a worker process an error comes wrapped in that process's traceback
        sentence = str(error).rsplit("UserError: ", 1)[-1].strip()
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:3])  # what was asked for, and what is free
        sentence = f"{reason}: a smaller --batch, --crop or --size needs less"
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes a training from its last checkpoint",
              file=sys.stderr)
        return 130
    print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
    return 2
