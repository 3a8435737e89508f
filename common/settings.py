"""A dataclass becomes the command line: `option` describes a field, `parse` reads the flags over a preset.

Order of precedence: the dataclass's defaults < the preset of `--data` < the flags given. Every flag is a field,
every field a flag; an unknown flag or a value of the wrong type ends with exit status 2 and one sentence.
"""
import argparse
import dataclasses
import json
import os
import sys
import types
import typing
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend: one sentence saying what is wrong, where, and what was expected."""


Size = typing.NewType("Size", tuple)  # (height, width), written `360x480`, or `320` for a square


def option(default, help, choices=None, group=None, within=None):
    """A dataclass field with its one-line help; `group` opens a new headed section of `--help`; `within` is the smallest
    and the largest number that is accepted (None: no limit)."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "group": group, "within": within})


def _size(text):
    height, _, width = text.partition("x")
    if not height.isdigit() or (width and not width.isdigit()) or int(height) < 1 or (width and int(width) < 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write HEIGHTxWIDTH (360x480) or one number (320)")
    return int(height), int(width or height)


def _number(kind, within):
    low, high = within or (None, None)

    def parse_number(text):
        number = kind(text)
        if low is not None and not number >= low or high is not None and not number <= high:
            limits = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
            raise argparse.ArgumentTypeError(f"{text}: expected {' and '.join(limits)}")
        return number
    parse_number.__name__ = kind.__name__  # argparse names it in "invalid float value"
    return parse_number


def _ids(within):
    number = _number(int, within)

    def parse_ids(text):
        if text == "none" and not within:
            return ()
        if not all(part.strip().isdigit() for part in text.split(",")):
            raise argparse.ArgumentTypeError(f"{text!r}: expected a comma-separated list of numbers, such as 1,2"
                                             + ("" if within else ", or none"))
        return tuple(number(part) for part in text.split(","))
    return parse_ids


def _names(choices):
    def parse_names(text):
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        unknown = [name for name in names if choices and name not in choices]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a comma-separated list of {', '.join(choices)}")
        return names
    return parse_names


def _add_flag(group, field, kind):
    """Turn one field into one flag. Fields typed `X | None` accept X; None stands for 'decided by the preset or run'."""
    kind = _bare(kind)
    flag, meta = "--" + field.name.replace("_", "-"), field.metadata
    default = "" if field.default is None or field.default == "" else f" [{_show(field.default, kind)}]"
    words = {"help": (meta["help"] + default).replace("%", "%%"), "default": argparse.SUPPRESS, "dest": field.name}
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **words)
    elif kind is Size:
        group.add_argument(flag, type=_size, metavar="HxW", **words)
    elif typing.get_origin(kind) is tuple and typing.get_args(kind)[-1] is Ellipsis:
        items = _ids(meta["within"]) if typing.get_args(kind)[0] is int else _names(meta["choices"])
        group.add_argument(flag, type=items, metavar="A,B,..", **words)
    elif typing.get_origin(kind) is tuple:
        numbers = typing.get_args(kind)
        group.add_argument(flag, type=_number(numbers[0], meta["within"]), nargs=len(numbers),
                           metavar=numbers[0].__name__.upper(), **words)
    else:
        metavar = None if meta["choices"] else {int: "N", float: "X", str: "TEXT"}[kind]
        group.add_argument(flag, type=kind if kind is str else _number(kind, meta["within"]), choices=meta["choices"],
                           metavar=metavar, **words)


def _bare(kind):
    """`X | None` -> X"""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


def _show(value, kind):
    """A value as its flag takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if not isinstance(value, (tuple, list)):
        return str(value)
    sign = "x" if _bare(kind) is Size else "," if typing.get_args(_bare(kind))[-1] is Ellipsis else " "
    return sign.join(map(str, value)) or "none"


def parse(config_class, presets, argv=None, description=""):
    """Read the command line. -> (config, given): the dataclass filled in, and the fields that were given as flags."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, usage="%(prog)s [--flag value ..]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=120),
        epilog="Values not given come from the preset of --data, then from the defaults in [brackets].")
    kinds, group = typing.get_type_hints(config_class), parser
    for field in dataclasses.fields(config_class):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        _add_flag(group, field, kinds[field.name])
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}
    for name, value in given.items():
        items = typing.get_args(_bare(kinds[name]))
        if len(items) == 2 and Ellipsis not in items and value[0] > value[1]:  # two numbers are a range
            parser.error(f"argument --{name.replace('_', '-')}: expected the smaller number first, not {value[0]} {value[1]}")
    data = given.get("data", config_class().data)
    return config_class(**{**presets.get(data, {}), **given}), given


def exclusive(config, given, *names):
    """Of these fields one may be given as a flag; it takes the place of the others that a preset has set.

    Raises UserError when several are given.
    """
    chosen = [name for name in names if name in given]
    if len(chosen) > 1:
        flags = " and ".join("--" + name.replace("_", "-") for name in chosen)
        raise UserError(f"{flags} exclude each other: give one of them")
    for name in names if chosen else ():
        if name not in chosen:
            setattr(config, name, None)


def from_dict(config_class, saved, given=()):
    """Rebuild a config from a checkpoint's or config.json's dictionary, with the flags `given` on top."""
    names = {field.name for field in dataclasses.fields(config_class)}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items() if name in names}
    return config_class(**{**values, **dict(given)})


def keep_config(folder, config, free):
    """Write `config.json`, or, when the folder has one already, refuse a run that contradicts it.

    free: names of the fields that may change between a run and its resumption (they do not alter its result).
    A folder without a checkpoint holds no run yet. Raises UserError naming every difference.
    """
    path, now = Path(folder) / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists() and next(Path(folder).rglob("*.pt"), None):
        before = json.loads(path.read_text())
        changed = [name for name in now if name not in free and before.get(name) != now[name]]
        if changed:
            kinds = typing.get_type_hints(type(config))
            differences = "; ".join(f"--{name.replace('_', '-')} was {_show(before.get(name), kinds[name])}, "
                                    f"now {_show(now[name], kinds[name])}" for name in changed)
            raise UserError(f"{folder} holds a run with other settings ({differences}): "
                            f"repeat its command to resume it, or choose another folder with --out")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(now, indent=1) + "\n")
    os.replace(temporary, path)


def run(main):
    """Call a script's main; a user's mistake becomes one sentence and exit status 2, Ctrl-C a hint and status 130."""
    try:
        return main()
    except UserError as error:  # from a worker process the message comes wrapped in that process's traceback
        print(f"{Path(sys.argv[0]).name}: error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
