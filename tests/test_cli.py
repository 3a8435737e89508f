"""The command line: help, errors, presets, and the promises of the documentation."""
import ast
import dataclasses
import importlib
import inspect
import re
import typing

import pytest
import torch
from conftest import ROOT, run_script

import cct
from common.command_line import check_needs, parse, run, run_name
from common import checkpoint
from common.datasets import DATASETS
from common.run_folder import keep_config
from common.settings import ANY, BaseConfig, Size, UserError, from_saved, kinds_of, option, to_save

SCRIPTS = {path.stem: importlib.import_module(path.stem) for path in sorted(ROOT.glob("*.py"))}
each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


@dataclasses.dataclass
class Toy:
    data: str = option("a", "dataset", ("a", "b"), group="run")
    size: Size | None = option(None, "size 50%")
    scale: tuple[float, float] = option((0.5, 2.0), "range", within=(0, 9))
    kinds: tuple[str, ...] = option(("x",), "kinds", ("x", "y"))
    ids: tuple[int, ...] = option((0,), "ids", within=(0, 254))
    flip: bool = option(False, "mirror", group="images")
    steps: int | None = option(5, "steps", within=(0, 99), replaces="lr")
    lr: float | None = option(None, "rate", within=(0, 1), replaces="steps", free=True)
    rates: tuple[int, ...] = option((6, 12), "rates", within=(1, 99))
    eval_size: str = option("full", "as in BaseConfig")


def test_precedence_of_default_preset_and_flag():
    presets = {"b": dict(steps=7)}
    assert parse(Toy, presets, [])[0] == Toy()
    assert parse(Toy, presets, ["--data", "b"])[0] == Toy(data="b", steps=7)
    config, given = parse(Toy, presets, ["--data", "b", "--steps", "9"])
    assert config.steps == 9 and given == dict(data="b", steps=9)


def test_every_kind_of_value():
    config, _ = parse(Toy, {}, "--size 36x48 --scale 1 1.5 --kinds y,x --ids 0,3 --flip --steps 3".split())
    assert config == Toy(size=(36, 48), scale=(1.0, 1.5), kinds=("y", "x"), ids=(0, 3), flip=True, steps=3)
    assert parse(Toy, {}, ["--size", "40", "--no-flip"])[0].size == (40, 40)
    assert parse(Toy, {}, ["--ids", "none"])[0].ids == () and from_saved(Toy, dict(ids=[])).ids == ()


@pytest.mark.parametrize("flags, said", [
    ("--unknown 1", "unrecognized arguments: --unknown"), ("--step 3", "unrecognized arguments: --step"),
    ("--steps many", "'many': expected a whole number"), ("--data c", "invalid choice: 'c'"),
    ("--size 36by48", "HEIGHTxWIDTH"), ("--size 0", "HEIGHTxWIDTH"), ("--size 1x2x3", "HEIGHTxWIDTH"),
    ("--kinds z", "some of x, y"), ("--kinds x,x", "some of x, y"), ("--ids a", "expected a whole number"),
    ("--scale 1", "expected 2 arguments"), ("--scale 2 1", "expected the smaller number first, not 2.0 1.0"),
    ("--scale nan nan", "expected a finite number"), ("--lr inf", "expected a finite number"),
    ("--lr -1", "-1: expected at least 0"), ("--lr 2", "2: expected at most 1"),
    ("--rates 0,6", "0: expected at least 1"), ("--rates none", "expected a whole number"),
    ("--steps 1.5", "expected a whole number")])
def test_wrong_flags_exit_2_with_a_sentence(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        parse(Toy, {}, flags.split())
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_config_survives_json_and_checkpoint(tmp_path):
    config = Toy(size=(3, 4), steps=7)
    keep_config(tmp_path, config)
    keep_config(tmp_path, Toy(size=(5, 6)))  # without a checkpoint there is no run to contradict
    keep_config(tmp_path, config)
    (tmp_path / "last.pt").touch()
    keep_config(tmp_path, config)  # the same again is fine
    assert from_saved(Toy, to_save(config), dict(steps=1)) == dataclasses.replace(config, steps=1)
    with pytest.raises(UserError, match=r"--size was 3x4, now 3x5; --ids was 0, now none"):
        keep_config(tmp_path, Toy(size=(3, 5), ids=(), steps=7))
    keep_config(tmp_path, dataclasses.replace(config, lr=0.7))  # declared free
    keep_config(tmp_path, dataclasses.replace(config, ids=()), free=("ids",))


def test_acts_are_not_remembered():
    saved = to_save(BaseConfig(download=True, evaluate="a.pt", predict="b.pt", images="c", out="d", seed=3))
    assert from_saved(BaseConfig, saved) == BaseConfig(seed=3)


def test_a_flag_takes_the_place_of_another():
    presets = {"a": dict(steps=7)}
    assert parse(Toy, presets, [])[0].steps == 7
    config, _ = parse(Toy, presets, ["--lr", "0.5"])
    assert (config.steps, config.lr) == (None, 0.5)
    with pytest.raises(UserError, match="--(steps|lr) and --(steps|lr) exclude each other"):
        parse(Toy, presets, ["--lr", "0.5", "--steps", "3"])


def test_default_run_folder_is_named_by_every_given_setting_that_matters():
    names = {
        "": "shapes-40-seed0",
        "--data voc --labeled 1/8 --seed 2 --workers 3": "voc-1_8-seed2",
        "--split lists/voc/92/labeled.txt --data voc --distance kl": "voc-92_labeled-seed0-distance=kl",
        "--supervised --crop 64 --no-flip": "shapes-40-seed0-supervised-crop=64x64-flip=off",
        "--perturbations f_drop,i_vat --weights a/b.pth":
            "shapes-40-seed0-weights=a_b.pth-perturbations=f_drop,i_vat"}
    for flags, name in names.items():
        assert run_name("cct", *parse(cct.Config, cct.PRESETS, flags.split())) == f"runs/cct-{name}"


@each_script
def test_every_number_has_limits(script):
    kinds = kinds_of(script.Config)
    for field in dataclasses.fields(script.Config):
        kind = typing.get_args(kinds[field.name])[:1] or (kinds[field.name],)
        if kind[0] in (int, float) and not field.metadata["choices"]:
            assert field.metadata["within"], field.name


@each_script
def test_a_flag_without_effect_is_refused(script):
    """Whatever a field declares to need: a config that lacks it refuses the flag, and names both."""
    kinds, names = kinds_of(script.Config), {field.name for field in dataclasses.fields(script.Config)}
    declared = 0
    for field in dataclasses.fields(script.Config):
        for name, wanted in field.metadata["needs"].items():
            assert name in names, name
            others = {bool: (True, False), str: ("", "nothing")}.get(kinds[name], (None, 0, (8, 8)))
            fitting = wanted if isinstance(wanted, tuple) else (wanted,)
            value = next(v for v in others if (not v if wanted is ANY else v not in fitting))
            config = dataclasses.replace(script.Config(), **{name: value})
            for other, needed in field.metadata["needs"].items():
                if other != name and needed is not ANY:
                    setattr(config, other, needed[0] if isinstance(needed, tuple) else needed)
            flags = [text.replace("_", "-") for text in (field.name, name)]
            with pytest.raises(UserError, match=f"--{flags[0]} has no effect with(out)? --{flags[1]}"):
                check_needs({field.name: 1}, config)
            declared += 1
    assert declared > 5


@each_script
def test_a_checkpoint_of_another_script_is_refused(tmp_path, script):
    checkpoint.save(tmp_path / "other.pt", dict(script="another", net={}, config={}, classes=[], palette=[]))
    checkpoint.save(tmp_path / "list.pt", [1, 2])
    for name in ("other.pt", "list.pt"):
        with pytest.raises(UserError, match=f"{name} is not a checkpoint of {script.__name__}.py"):
            script.main(["--evaluate", str(tmp_path / name)])


@each_script
def test_help_is_grouped_and_complete(capsys, monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for group in ("run:", "images:", "network:", "optimisation:", "machine:"):
        assert f"\n{group}\n" in text
    for field in dataclasses.fields(script.Config):
        assert f"--{field.name.replace('_', '-')}" in text and field.metadata["help"]
    assert "[40]" in text and "[on]" in text  # defaults of the preset, of --labeled and --flip
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("flags, said", [
    ("--lamda-u 3", "unrecognized arguments: --lamda-u"), ("--data voc --root /nowhere", "/nowhere"),
    ("--evaluate nothing.pt", "no checkpoint at nothing.pt"), ("--evaluate README.md", "not a checkpoint"),
    ("--device cuda", "no CUDA device"), ("--precision fp16", "needs a CUDA"),
    ("--weights nowhere.pth", "no such file"), ("--weights README.md", "README.md is not"),
    ("--data voc --size 64 --long-side 80", "exclude each other"), ("--background 99", "--background 99"),
    ("--labeled 100000", "100000"), ("--batch 1", "expected at least 2"), ("--eval-every 0", "at least 1"),
    ("--split list.txt --labeled 3", "--labeled has no effect with a list of images in --split"),
    ("--evaluate a.pt --predict b.pt --images .", "--evaluate and --predict exclude each other"),
    ("--eval-size train", "train scores at --size"), ("--download", "no effect with --data shapes"),
    ("--perturbations f_drop --noise 1", "--noise has no effect with --perturbations f_drop"),
    ("--perturbations f_drop --vat-eps 1", "--vat-eps has no effect with --perturbations f_drop")])
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
    assert "error: no checkpoint at nothing.pt" in run_script("cct", "--evaluate", "nothing.pt", check=2)


@each_script
def test_presets_name_real_fields(script):
    names = {field.name for field in dataclasses.fields(script.Config)}
    assert {data for data in script.PRESETS if "+" not in data} == set(DATASETS)
    for data, preset in script.PRESETS.items():
        assert set(preset) <= names
        config, _ = parse(script.Config, script.PRESETS, ["--data", data])
        assert config.steps or config.epochs


def test_presets_of_cct_are_the_papers():
    voc, camvid = (parse(cct.Config, cct.PRESETS, ["--data", d])[0] for d in ("voc", "camvid"))
    assert (voc.batch, voc.crop, voc.epochs, voc.lr, voc.lambda_u) == (10, (320, 320), 50, 0.01, 30)
    assert (camvid.size, camvid.flip, camvid.scale) == ((360, 480), False, (1.0, 1.0))


SYMBOLS = {"w_u", "lambda_u", "lambda_con"}  # with an underscore, but no names of functions


@each_script
def test_the_map_names_what_exists(script):
    table = script.__doc__.partition("Map (")[2].partition("Deviations")[0]
    for name in set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", table)) - SYMBOLS:
        assert hasattr(script, name), name


def commands(text, script):
    """The command lines of a script in a text, as lists of words"""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith(("python ", "torchrun ")):
            line = re.split(r"\s{2,}", line.strip())[0]
            if found := re.search(rf"\b{script.__name__}\.py((?: [^#`|&]+)?)", line):
                yield found[1].split()


@each_script
def test_every_command_of_the_documentation_is_accepted(script):
    text = script.__doc__ + (ROOT / "README.md").read_text()
    lines = list(commands(text, script))
    assert len(lines) > 9
    for words in lines:
        config, given = parse(script.Config, script.PRESETS, words)
        check_needs(given, config)


LOGITS = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))
P, Y, KEEP = LOGITS.flip(1).softmax(1), LOGITS[:, 0].long().clamp(0, 4), LOGITS[:, 1] > 0
COPIED = [
    ("cct", "cross_entropy", (LOGITS, Y)), ("cct", "without_easy_pixels", (LOGITS, Y, 0.3)),
    ("cct", "distance", ("js", P, LOGITS)), ("cct", "pairwise", (LOGITS, P)),
    ("three_stage", "cross_entropy", (LOGITS, Y)),
    ("c3_semiseg", "cross_entropy", (LOGITS, Y, 2)), ("c3_semiseg", "consistency", (LOGITS, P, KEEP)),
    ("c3_semiseg", "contrastive", (LOGITS[:1, 0], LOGITS[1:, 0], Y[:1, :, 0], KEEP[:1, :, 0])),
    ("s4gan_mlmt", "cross_entropy", (LOGITS, Y)), ("s4gan_mlmt", "feature_matching", (P[0], P[1])),
    ("s4gan_mlmt", "self_training", (LOGITS, KEEP[:, 0, 0])),
    ("s4gan_mlmt", "adversarial", (LOGITS[0, 0, 0],)),
    ("s4gan_mlmt", "discriminator_loss", (LOGITS[0, 0, 0], LOGITS[1, 0, 0])),
    ("s4gan_mlmt", "multi_label", (LOGITS[:, :, 0, 0], KEEP[:, :1, 0].expand(2, 5))),
    ("s4gan_mlmt", "consistency", ("mse", LOGITS[:, :, 0, 0], LOGITS[:, :, 1, 1])),
    ("s4gan_mlmt", "fuse", (P, KEEP[:, :1, 0].expand(2, 5)))]


@pytest.mark.parametrize("script, name, arguments", COPIED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_loss_runs_when_it_is_copied_alone(script, name, arguments):
    function = getattr(SCRIPTS[script], name)
    empty_file = dict(torch=torch, F=torch.nn.functional)
    exec(inspect.getsource(function), empty_file)
    assert torch.equal(empty_file[name](*arguments), function(*arguments))


def test_scripts_stay_apart():
    """No script imports another, common/ imports no script, and nothing runs at import."""
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for path in [*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ImportFrom) and node.module in scripts), path
            assert not (isinstance(node, ast.Import) and scripts & {alias.name for alias in node.names}), path
        loose = [node for node in tree.body if isinstance(node, (ast.For, ast.While, ast.With))]
        started = path.stem in {*scripts, "schedules", "summary"}
        assert not loose and path.read_text().count('__name__ == "__main__"') == started, path
