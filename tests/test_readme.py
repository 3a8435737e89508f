"""The README's lists of commands run, each in its order, with small presets on small data."""
import glob
import importlib
import pickle
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, SCRIPTS, TINY

import fixtures
from common.command_line import parse
from common.datasets import labelled, open_dataset

SMALL = ("--steps 2 --backbone resnet18 --backbone-layers 2 --weights none --device cpu --workers 0 "
         "--eval-every 100 --save-every 100")
MAKERS = (fixtures.make_sbd, fixtures.make_cityscapes, fixtures.make_camvid, fixtures.make_sunrgbd,
          fixtures.make_pcontext, fixtures.make_bdd100k, fixtures.make_folder)


def lists_of_commands():
    """{heading: code} of the README's blocks of commands, less those that install and test"""
    text = (ROOT / "README.md").read_text()
    lists = {}
    for block in re.finditer(r"^```\n(.*?)^```$", text, re.M | re.S):
        heading = re.findall(r"^(?:##+ |<details><summary>)([^<\n]+)", text[:block.start()], re.M)[-1]
        if re.match(r"(python|torchrun|for) (?!-m venv|-m pytest)", block[1]):
            lists[heading] = lists.get(heading, "") + block[1]
    return lists


def commands(code):
    """[[file or -m, flag, ..]] of lines for a shell, which reads loops, quotes and comments itself"""
    shell = """python() { printf '%s\\n' "$@" ''; }
               torchrun() { while [[ $1 == --* ]]; do shift; done; python "$@"; }"""
    said = subprocess.check_output(["bash", "-euc", f"{shell}\n{code}"], text=True)
    return [words.split("\n") for words in said.strip().split("\n\n")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to be in, with all datasets in data/; the scripts' presets are small"""
    monkeypatch.chdir(tmp_path)
    for make in MAKERS:
        make("data")
    count = labelled._count

    def fitting(labeled, total):
        return total if labeled == "all" else min(count(labeled, 20210), total // 2)
    monkeypatch.setattr(labelled, "_count", fitting)
    for name in SCRIPTS:
        script = importlib.import_module(name)
        fields = script.Config.__dataclass_fields__
        for data, preset in script.PRESETS.items():
            flags = f"{' '.join(TINY[name])} {SMALL}{' --size 40x56' if preset.get('size') else ''}"
            flags = re.sub("--long-side [0-9]+", "--size 40x56", flags)
            _, small = parse(script.Config, {}, flags.split())
            replaced = {fields[flag].metadata["replaces"]: None for flag in small}
            replaced = {flag: None for flag in replaced if flag in fields}
            small |= dict(eval_pad=None) if "eval_pad" in fields else {}
            monkeypatch.setitem(script.PRESETS, data, preset | replaced | small)
    return tmp_path


def make_files(flags):
    """The files that a command reads, but no command writes, and that depend on its dataset"""
    names = flags.get("--data", "shapes").split("+")
    roots = flags.get("--root", "data").split("+")
    for k, name in enumerate(names):
        root = Path(roots[k % len(roots)])
        if not root.exists():
            root.symlink_to("." if root.parent == Path("data") else "data")
        data = open_dataset(name, root)
        keys = data.train.keys
        if "--split" in flags:
            path = Path(flags["--split"].split("+")[k])
            if path.suffix == ".pkl":
                path.write_bytes(pickle.dumps(np.random.RandomState(0).permutation(len(keys))))
            else:
                fixtures.save_lines(path, keys[:3])
        if "--tags" in flags:
            fixtures.save_lines(Path(flags["--tags"]), [f"{key}, {data.classes[1]}" for key in keys])
    if flags.get("--weights", "none") not in ("none", "imagenet"):  # as DeepLab's authors store them
        state = {f"Scale.{key}": value for key, value in torchvision.models.resnet18().state_dict().items()}
        torch.save(state, flags["--weights"])
    if "--images" in flags:
        for k in range(2):
            fixtures.save_picture(Path(flags["--images"], f"{k}.jpg"), np.full((40, 50, 3), 60 * k, np.uint8))


def test_every_script_has_a_list():
    lists = lists_of_commands()
    assert all(f"python {name}.py --data" in lists[f"{name}.py"] for name in SCRIPTS)
    assert len(commands(lists["Train, resume, evaluate, predict"])) > 8


@pytest.mark.slow
@pytest.mark.parametrize("heading", lists_of_commands())
def test_the_commands_of_the_readme_run_one_after_the_other(place, capsys, heading):
    """Each reads what those before it have written."""
    for words in commands(lists_of_commands()[heading]):
        print(*words)
        words = [name for word in words for name in sorted(glob.glob(word)) or [word]]
        if words[0] == "-m":
            importlib.import_module(words[1]).main(words[2:])
            assert capsys.readouterr().out.count("\n") > 1, words
            continue
        flags = dict(zip(words, words[1:]))
        make_files(flags)
        importlib.import_module(Path(words[0]).stem).main(words[1:])
        said = capsys.readouterr().out.splitlines()
        if "--predict" in flags:
            out = flags.get("--out") or Path(flags["--predict"]).parent / "predictions"
            assert len(list(Path(out).rglob("*.png"))) == 2
        elif "--evaluate" in flags:
            assert re.search("mIoU|AUC", said[-1]) and "images" in said[-1]
        else:
            assert said[-1].startswith("final: ") and any(Path(said[-1].split()[-1]).rglob("last.pt"))
