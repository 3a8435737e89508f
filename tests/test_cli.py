"""The command line: help, errors, presets, and the promises of the documentation."""
import ast
import dataclasses
import importlib
import inspect
import re
import typing

import pytest
import torch
from conftest import ROOT

import cct
from common.command_line import check_needs, parse, run, run_name
from common import checkpoint
from common.run_folder import keep_config
from common.settings import BaseConfig, Size, UserError, from_saved, kinds_of, option, to_save

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


@pytest.mark.parametrize("text", ['{"theme": "dark"}', "{"])
def test_somebody_elses_or_a_damaged_config_is_kept(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="is damaged, or of another script"):
        keep_config(tmp_path, Toy())
    assert (tmp_path / "config.json").read_text() == text


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
            "shapes-40-seed0-weights=a_b.pth-perturbations=f_drop,i_vat",
        "--data folder --root /x/mine": "folder-x_mine-all-seed0", "--data folder --root /x": "folder-_x-all-seed0"}
    for flags, name in names.items():
        assert run_name("cct", *parse(cct.Config, cct.PRESETS, flags.split())) == f"runs/cct-{name}"
    long = [run_name("cct", cct.Config(weights="x" * 300, lr=lr), dict(weights=0, lr=0)) for lr in (1, 2)]
    assert long[0] != long[1] and {*map(len, long)} == {205}


@each_script
def test_every_number_has_limits_and_needs_are_fields(script):
    kinds = kinds_of(script.Config)
    for field in dataclasses.fields(script.Config):
        assert field.metadata["needs"].keys() <= kinds.keys(), field.name
        kind = typing.get_args(kinds[field.name])[:1] or (kinds[field.name],)
        if kind[0] in (int, float) and not field.metadata["choices"]:
            assert field.metadata["within"], field.name


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
    assert "] [" not in " ".join(text.split())  # one default each
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("command, said", [
    ("cct --lamda-u 3", "unrecognized arguments: --lamda-u"), ("cct --data voc --root /nowhere", "/nowhere"),
    ("cct --evaluate nothing.pt", "no checkpoint at nothing.pt"), ("cct --evaluate README.md", "not a"),
    ("cct --device cuda", "no CUDA device"), ("cct --precision fp16", "needs a CUDA"),
    ("cct --weights nowhere.pth", "no such file"), ("cct --weights README.md", "README.md is not"),
    ("cct --data voc --size 64 --long-side 80", "exclude each other"), ("cct --eval-every 0", "at least 1"),
    ("cct --labeled 100000", "100000"), ("cct --batch 1", "at least 2"), ("cct --background 99", "ground 99"),
    ("cct --split list.txt --labeled 3", "--labeled has no effect with a list of images in --split"),
    ("cct --evaluate a.pt --predict b.pt --images .", "--evaluate and --predict exclude each other"),
    ("cct --eval-size train", "train scores at --size"), ("cct --download", "no effect with --data shapes"),
    ("cct --perturbations f_drop --noise 1", "--noise has no effect with --perturbations f_drop"),
    ("cct --method mean_teacher --vat-eps 1", "--vat-eps has no effect with --method mean_teacher"),
    ("cct --supervised --k 2", "--k has no effect with --supervised"),
    ("cct --format voc", "no effect without --predict"),
    ("cct --data voc+camvid --split list.txt", "--split list.txt: expected 2 with +"),
    ("cct --data voc+camvid --labeled 1+2+3", "--labeled 1+2+3: expected 2 with +"),
    ("cct --data voc --lambda-adv 1", "--lambda-adv has no effect with --data voc, a single domain"),
    ("three_stage --batch 3 --batch-l 3", "expected at least one image"),
    ("three_stage --branch-stage3 ghat --lambda-pl 0", "--branch-stage3 has no effect"),
    ("three_stage --scale 0.25 0.75", "--scale 0.25 0.75: expected multiples of 0.1"),
    ("c3_semiseg --batch 2 --groups 3", "a multiple of --groups 3"),
    ("c3_semiseg --skip-classes 9", "classes 0 to 8"),
    ("c3_semiseg --dcrs 1 --dcrs-beta 0.5", "--dcrs-beta has no effect")])
def test_a_users_mistake_is_one_sentence(tmp_path, capsys, command, said):
    if said in ("no CUDA device", "needs a CUDA") and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    script, *flags = command.split()
    out = [] if "--evaluate" in flags else ["--out", str(tmp_path / "run")]
    try:
        status = run(lambda: SCRIPTS[script].main([*flags, *out]))
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and said in error and "Traceback" not in error


def test_a_gpu_without_room_is_one_sentence(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity "
                                     "of 79.10 GiB of which 1.50 GiB is free. Including non-PyTorch memory, ..")
    assert run(main) == 2
    assert capsys.readouterr().err.endswith("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
                                            "capacity of 79.10 GiB of which 1.50 GiB is free: a smaller --batch, "
                                            "--crop or --size needs less\n")


def test_presets_of_cct_are_the_papers():
    voc, camvid = (parse(cct.Config, cct.PRESETS, ["--data", d])[0] for d in ("voc", "camvid"))
    assert (voc.batch, voc.crop, voc.epochs, voc.lr, voc.lambda_u) == (10, (320, 320), 50, 0.01, 30)
    assert (camvid.size, camvid.flip, camvid.scale) == ((360, 480), False, (1.0, 1.0))


SYMBOLS = {"w_u", "lambda_u", "lambda_con", "lambda_adv", "g_d"}  # with an underscore, but no names of functions


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


COPIED = {
    "cct": "cross_entropy without_easy_pixels distance pairwise domain_loss", "three_stage": "cross_entropy",
    "c3_semiseg": "cross_entropy consistency class_thresholds contrastive",
    "s4gan_mlmt": "cross_entropy feature_matching self_training adversarial discriminator_loss multi_label "
                  "consistency fuse"}


@each_script
def test_a_loss_can_be_copied_alone(script):
    """It uses nothing of its script but torch and torch.nn.functional."""
    for name in COPIED[script.__name__].split():
        tree = ast.parse(inspect.getsource(getattr(script, name)))
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert used & vars(script).keys() <= {"torch", "F"}, name


def test_scripts_stay_apart():
    """No script imports another, common/ imports no script, and nothing runs at import."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ImportFrom) and node.module in SCRIPTS), path
            assert not (isinstance(node, ast.Import) and SCRIPTS.keys() & {alias.name for alias in node.names}), path
        loose = [node for node in tree.body if isinstance(node, (ast.For, ast.While, ast.With))]
        started = path.stem in {*SCRIPTS, "schedules", "summary"}
        assert not loose and path.read_text().count('__name__ == "__main__"') == started, path
