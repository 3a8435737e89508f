"""Checkpoints that survive a kill at any moment, written beside the target, flushed, renamed; and
opening one to score it or to predict with it."""
import dataclasses
import io
import os
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from common.command_line import check_needs, released_settings
from common.datasets import open_dataset
from common.domains import saved_domains
from common.files import replacing
from common.settings import UserError, flag, from_saved, kinds_of, show


def save(path, state):
    """Write `state` (nested dicts of tensors, numbers, strings); `path` is always a whole file.

    Raises UserError when it cannot be written, as on a full disk; the old file is kept then.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)  # into a file, it would hide the disk's error
    with replacing(path, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(Path(path).parent, os.O_RDONLY)
    with suppress(OSError):  # some file systems cannot do this for a folder
        os.fsync(folder)  # the rename itself must reach the disk
    os.close(folder)


NUMBERS = [np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType,
           *[(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")  # 1.x and 2.x
             for core in ("core", "_core")]]  # NumPy's scores in the authors' files: mere numbers


def load(path, device="cpu"):
    """Read a checkpoint without running any code of it (weights_only).

    Raises UserError for a missing or foreign file.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: expected a file such as runs/.../last.pt")
    try:
        with torch.serialization.safe_globals(NUMBERS):
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a file that is not its own
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path} holds objects beside tensors ({foreign[1]}), which are not "
                            f"loaded, as that may run code: expected tensors alone; if you "
                            f"trust the file, load it in its own project, and save its "
                            f"state_dict") from error
        raise UserError(f"{path} is not a checkpoint that can be loaded safely "
                        f"({type(error).__name__})") from error


def open_checkpoint(script, path, cfg, given, ctx, tables, released):
    """For --evaluate and --predict. -> (config, state): the settings in the checkpoint with the
    flags `given` on top, and its contents. Raises UserError for another script's file, and for
    flags without effect.

    cfg: settings of the command line. tables: formats of the authors' files, see of_release. Such
    files hold no settings: they get those of cfg, changed by `released` (see released_settings).
    """
    state = load(path, ctx.device)
    config_class = type(cfg)
    useful = {f.name for f in dataclasses.fields(config_class) if f.metadata["scoring"]}
    if isinstance(state, dict) and "script" not in state:
        settings = released_settings(config_class, released, cfg.data, given)
        found = [of_release(state, table, settings, path, cfg, ctx) for table in tables]
        if any(found):
            state = next(filter(None, found)) | dict(script=script)
            useful.add("input_scale")
    if not isinstance(state, dict) or state.get("script") != script or "net" not in state:
        raise UserError(f"{path} is not a checkpoint of {script}.py, nor of its authors' code: "
                        f"expected a file such as runs/.../last.pt")
    if useless := sorted(set(given) - useful):
        raise UserError(f"{flag(useless[0])} has no effect on a trained network; {path} brings its "
                        f"own settings")
    try:
        config = from_saved(config_class, state["config"], given)
        each = [one for _, _, one in saved_domains(state, config_class, given, path)]
        state |= state["domains"][0]  # the dataset of all scripts but cct.py, which takes several
        state["step"], state["palette"].tolist(), len(state["classes"])  # an error if missing
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged, or of another version ({error})") from error
    check_needs(given, *each)
    ctx.compute_in(config.precision)  # as in the training, whose scores this repeats
    return config, state


def of_release(state, table, settings, path, cfg, ctx):
    """Convert `state`, read from a file of the authors' code, to a checkpoint of this project; None
    if it does not fit `table`: `names`, {pattern for the start of a tensor's name: our name, or
    None if it is not needed}; `classes`, our name of a tensor with one row per class; optional:
    `part`, `settings`. Raises UserError if --data has another number of classes."""
    state = state.get("state_dict", state)
    net = {}
    for name, tensor in state.items() if isinstance(state, dict) else ():
        name = str(name).removeprefix("module.")
        matches = (re.match(pattern, name) for pattern in table["names"])
        match = next(filter(None, matches), None)
        if match is None or not isinstance(tensor, torch.Tensor):
            return None
        ours = table["names"][match.re.pattern]
        if ours is not None:
            net[match.expand(ours) + name[match.end():]] = tensor
    if table["classes"] not in net:
        return None
    count = len(net[table["classes"]])
    data = open_dataset(cfg.data, cfg.root)
    if len(data.classes) != count:
        raise UserError(f"{path} is of the authors' code and has {count} classes, --data "
                        f"{data.name} has {len(data.classes)}: give the dataset that it was "
                        f"trained on")
    blocks = {re.search(r"layer3\.\d+", name)[0] for name in net if "layer3." in name}
    bottleneck = any("layer1.0.conv3." in name for name in net)
    backbones = {(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50",
                 (23, True): "resnet101"}
    layers = max((int(k) for name in net for k in re.findall(r"layer(\d)\.", name)), default=4)
    backbone = backbones.get((len(blocks), bottleneck), cfg.backbone)
    settings = settings | table.get("settings", {})
    settings |= dict(backbone=backbone, backbone_layers=layers)
    kinds = kinds_of(type(cfg))
    shown = [f"{flag(name)} {show(settings[name], kinds[name])}"
             for name in ("backbone", "stem", "aspp_rates", "input_scale") if name in settings]
    ctx.say(f"{path}: a network of the authors' code for {count} classes: {', '.join(shown)}; "
            f"{len(net)} tensors, {len(state) - len(net)} more not needed")
    domain = dict(name=data.name, classes=list(data.classes),
                  palette=torch.from_numpy(data.palette))
    config = dataclasses.asdict(dataclasses.replace(cfg, **settings))
    return dict(net=net, config=config, domains=[domain], step="unknown", part=table.get("part"))


def load_network(net, state, path, device):
    """The network of a checkpoint, on the device. Raises UserError if its weights do not fit."""
    try:
        net.load_state_dict(state["net"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its weights do not fit its settings; it is damaged, or of "
                        f"another version of this project") from error
    return net.to(device, memory_format=torch.channels_last)


def same_classes(data, state, path):
    """Raises UserError if a checkpoint was trained on other classes than those of the dataset."""
    if list(data.classes) != state["classes"]:
        names = ", ".join(state["classes"][:3])
        raise UserError(f"{path} was trained on {len(state['classes'])} classes ({names}, ..), but "
                        f"--data {data.name} has {len(data.classes)} others: evaluate it on the "
                        f"dataset it was trained on")
