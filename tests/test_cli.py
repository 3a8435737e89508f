"""The command line: help, errors, presets, and the promises of the documentation."""
import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from conftest import ROOT, run_script

import cct
from common import checkpoint
from common.settings import Size, UserError, exclusive, from_dict, keep_config, option, parse, run

SCRIPTS = {path.stem: importlib.import_module(path.stem) for path in sorted(ROOT.glob("*.py"))}


@dataclasses.dataclass
class Toy:
    data: str = option("a", "dataset", ("a", "b"), group="run")
    size: Size | None = option(None, "size 50%")
    scale: tuple[float, float] = option((0.5, 2.0), "range")
    kinds: tuple[str, ...] = option(("x",), "kinds", ("x", "y"))
    ids: tuple[int, ...] = option((0,), "ids")
    flip: bool = option(False, "mirror", group="images")
    steps: int = option(5, "steps")
    lr: float | None = option(None, "rate", within=(0, 1))
    rates: tuple[int, ...] = option((6, 12), "rates", within=(1, None))


def test_precedence_of_default_preset_and_flag():
    presets = {"b": dict(steps=7, lr=0.1)}
    assert parse(Toy, presets, [])[0] == Toy()
    assert parse(Toy, presets, ["--data", "b"])[0] == Toy(data="b", steps=7, lr=0.1)
    config, given = parse(Toy, presets, ["--data", "b", "--steps", "9"])
    assert config.steps == 9 and config.lr == 0.1 and given == dict(data="b", steps=9)


def test_every_kind_of_value():
    config, _ = parse(Toy, {}, "--size 36x48 --scale 1 1.5 --kinds y,x --ids 0,3 --flip --lr 1e-3".split())
    assert config == Toy(size=(36, 48), scale=(1.0, 1.5), kinds=("y", "x"), ids=(0, 3), flip=True, lr=1e-3)
    assert parse(Toy, {}, ["--size", "40", "--no-flip"])[0].size == (40, 40)
    assert parse(Toy, {}, ["--ids", "none"])[0].ids == () and from_dict(Toy, dict(ids=[])).ids == ()


@pytest.mark.parametrize("flags, said", [
    ("--unknown 1", "unrecognized arguments: --unknown"), ("--step 3", "unrecognized arguments: --step"),
    ("--steps many", "invalid int value: 'many'"), ("--data c", "invalid choice: 'c'"),
    ("--size 36by48", "HEIGHTxWIDTH"), ("--size 0", "HEIGHTxWIDTH"), ("--kinds z", "list of x, y"), ("--ids a", "list of numbers"),
    ("--scale 1", "expected 2 arguments"), ("--scale 2 1", "--scale: expected the smaller number first, not 2.0 1.0"),
    ("--lr -1", "-1: expected at least 0 and at most 1"), ("--lr nan", "at least 0"), ("--lr 2", "at most 1"),
    ("--rates 0,6", "0: expected at least 1"), ("--rates none", "list of numbers, such as 1,2")])
def test_wrong_flags_exit_2_with_a_sentence(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        parse(Toy, {}, flags.split())
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_config_survives_json_and_checkpoint(tmp_path):
    config = Toy(size=(3, 4), lr=0.5)
    keep_config(tmp_path, config, free=())
    keep_config(tmp_path, Toy(size=(5, 6), lr=0.1), free=())  # without a checkpoint there is no run to contradict
    keep_config(tmp_path, config, free=())
    (tmp_path / "last.pt").touch()
    keep_config(tmp_path, config, free=())  # the same again is fine
    assert from_dict(Toy, dataclasses.asdict(config), dict(steps=1)) == dataclasses.replace(config, steps=1)
    with pytest.raises(UserError, match=r"--size was 3x4, now 3x5; --ids was 0, now none"):
        keep_config(tmp_path, Toy(size=(3, 5), ids=(), lr=0.5), free=("lr",))
    keep_config(tmp_path, Toy(size=(3, 4), lr=0.7), free=("lr",))


def test_defaults_are_shown_as_they_are_written(capsys):
    with pytest.raises(SystemExit):
        parse(Toy, {}, ["--help"])
    text = capsys.readouterr().out
    assert all(words in text for words in ("rates [6,12]", "ids [0]", "range [0.5 2.0]", "mirror [off]"))


def test_exclusive_flags():
    presets = {"a": dict(steps=7)}
    config, given = parse(Toy, presets, ["--lr", "0.5"])
    exclusive(config, given, "steps", "lr")
    assert (config.steps, config.lr) == (None, 0.5)
    config, given = parse(Toy, presets, [])
    exclusive(config, given, "steps", "lr")
    assert config.steps == 7
    with pytest.raises(UserError, match="--steps and --lr exclude each other"):
        exclusive(config, dict(steps=1, lr=1), "steps", "lr")


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_out_of_range_are_refused(capsys, script):
    module = SCRIPTS[script]
    for flags in ("--eval-every 0", "--save-every 0", "--log-every 0", "--batch 0", "--seed -1", "--workers -1", "--lr -1",
                  "--steps 0"):
        with pytest.raises(SystemExit) as stop:
            module.main(flags.split())
        assert stop.value.code == 2 and "expected at least" in capsys.readouterr().err, flags
    with pytest.raises(UserError, match="--eval-size train scores at --size"):
        module.main("--data voc --eval-size train".split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_of_another_script_is_refused(tmp_path, script):
    checkpoint.save(tmp_path / "other.pt", dict(script="another", branch="s4gan", net={}, config={}, classes=[], palette=[]))
    checkpoint.save(tmp_path / "list.pt", [1, 2])
    for name in ("other.pt", "list.pt"):
        with pytest.raises(UserError, match=f"{name} is not a checkpoint of this script"):
            SCRIPTS[script].main(["--evaluate", str(tmp_path / name)])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_grouped_and_complete(capsys, monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for group in ("run:", "images:", "network:", "optimisation:", "machine:"):
        assert f"\n{group}\n" in text
    for field in dataclasses.fields(SCRIPTS[script].Config):
        assert f"--{field.name.replace('_', '-')}" in text and field.metadata["help"]
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("flags, said", [
    ("--lamda-u 3", "unrecognized arguments: --lamda-u"), ("--perturbations f_drop,vat", "i_vat, dropout"),
    ("--steps 3 --epochs 2", "--steps and --epochs"), ("--supervised --method vat", "--supervised uses no unlabelled"),
    ("--data voc --root /nowhere", "/nowhere"), ("--evaluate nothing.pt", "no checkpoint at nothing.pt"),
    ("--evaluate README.md", "not a checkpoint"), ("--device cuda", "no CUDA device"), ("--precision fp16", "needs a CUDA"),
    ("--weights nowhere.pth --steps 1 ", "no such file"), ("--data voc --size 64 --long-side 80", "exclude each other"),
    ("--weights README.md --steps 1", "README.md is not a checkpoint"), ("--background 99", "--background 99"),
    ("--labeled 100000", "100000"), ("--batch 1", "at least 2 images"), ("--dropout 1", "below 1")])
def test_a_users_mistake_is_one_sentence(tmp_path, capsys, flags, said):
    if said in ("no CUDA device", "needs a CUDA") and cct.torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    out = [] if flags.startswith("--evaluate") else ["--out", str(tmp_path / "run")]
    try:
        status = run(lambda: cct.main([*flags.split(), *out]))
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and said in error and "Traceback" not in error


def test_exit_status_reaches_the_shell():
    assert "error: no checkpoint at nothing.pt" in run_script("--evaluate", "nothing.pt", check=2)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_presets_name_real_fields(script):
    names = {field.name for field in dataclasses.fields(script.Config)}
    assert set(script.FREE) <= names and set(script.PRESETS) == set(script.DATASETS)
    for data, preset in script.PRESETS.items():
        assert set(preset) <= names and data in script.DATASETS
        parse(script.Config, script.PRESETS, ["--data", data])


def test_presets_of_cct_are_the_papers():
    for data in cct.PRESETS:
        config, _ = parse(cct.Config, cct.PRESETS, ["--data", data])
        assert config.steps or config.epochs
    voc, camvid = (parse(cct.Config, cct.PRESETS, ["--data", d])[0] for d in ("voc", "camvid"))
    assert (voc.batch, voc.crop, voc.epochs, voc.lr, voc.lambda_u, voc.ramp_length) == (10, (320, 320), 50, 0.01, 30, 0.1)
    assert (camvid.size, camvid.flip, camvid.scale) == ((360, 480), False, (1.0, 1.0))


SYMBOLS = {"w_u", "lambda_u"}  # with an underscore, but no names of functions


@pytest.mark.parametrize("script", SCRIPTS)
def test_documentation_names_what_exists(script):
    """Every name in the docstring's Map is in the script; every command in its docstring and the README parses."""
    module = SCRIPTS[script]
    table = module.__doc__.partition("Map (")[2].partition("Deviations")[0]
    for name in set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", table)) - SYMBOLS:
        assert hasattr(module, name), name
    commands = 0
    for line in (module.__doc__ + (ROOT / "README.md").read_text()).replace("\\\n", " ").splitlines():
        if line.strip().startswith(("python ", "torchrun ")):
            command = re.search(rf"\b{script}\.py((?: [^#`|&]+)?)", re.split(r"\s{2,}", line.strip())[0])
            if command:
                parse(module.Config, module.PRESETS, command[1].split())
                commands += 1
    assert commands > 5


def test_scripts_stay_apart():
    """No script imports another, common/ imports no script, and nothing runs at import."""
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for path in [*ROOT.glob("*.py"), *(ROOT / "common").glob("*.py")]:
        tree = ast.parse(path.read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not scripts & imported, path
        loose = [node for node in tree.body if isinstance(node, (ast.For, ast.While, ast.With))]
        assert not loose and Path(path).read_text().count('__name__ == "__main__"') == (path.stem in scripts), path
