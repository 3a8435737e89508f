"""The table and the picture of run folders: by hand, from logs written here, and of real tiny runs."""
import importlib
import json

import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from PIL import Image

from common import summary
from common.settings import UserError, to_save

TITLES = "step,loss_s,gpu_gb,seconds,miou,best\n"


def write(folder, script="cct", miou=0.5, log=None, step=10, steps=10, domains=("voc",), **settings):
    """The folder of a run of 1.5 hours, whose last checkpoint is of `step`"""
    config = to_save(importlib.import_module(script).Config(**dict(data="voc", precision="fp32") | settings))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = dict(script=script, step=step, steps=steps, config=config)
    torch.save(state | dict(domains=[dict(name=name) for name in domains]), folder / "last.pt")
    rows = f"4,1.5,2.5,3600,,\n4,,,900,0.6,0.6\n10,1.2,3.25,600,,\n10,,,300,{miou:.6g},0.6\n"
    (folder / "log.csv").write_text(TITLES + rows if log is None else log)
    return folder


def printed(capsys, *arguments):
    summary.main([*map(str, arguments)])
    return capsys.readouterr().out.splitlines()


def test_mean_and_standard_deviation_of_a_sample_as_markdown(tmp_path, capsys):
    folders = [write(tmp_path / f"{k}-{seed}", miou=miou, seed=seed, k=k, workers=seed, root=f"there/{seed}")
               for k, seed, miou in ((6, 0, 0.7), (2, 0, 0.51), (2, 1, 0.53), (2, 7, 0.58))]
    assert printed(capsys, *folders, folders[0], "--markdown") == [  # a folder given twice counts once
        "| k | mIoU | best | seeds | steps | hours | GPU GB |",
        "|--|--|--|--|--|--|--|",  # mean 54, squares of -3, -1, 4 over 2: 13
        "| 2 | 54.0 +- 3.6 | 60.0 +- 0.0 | 3 | 10 | 1.5 | 3.25 |",
        "| 6 | 70.0 | 60.0 | 1 | 10 | 1.5 | 3.25 |"]


def test_columns_are_the_settings_that_differ_and_old_folders_may_lack_some(tmp_path, capsys):
    same = write(tmp_path / "a", size=(8, 16))
    write(tmp_path / "b", supervised=True, labeled="1/8", log=TITLES + "10,1,,20,,\n10,,,10,0.25,0.5\n")
    write(tmp_path / "c", "c3_semiseg", lr=0.5)  # lr, dcrs, .. differ between scripts only
    old = json.loads((same / "config.json").read_text())
    del old["vat_xi"]
    (write(tmp_path / "d", size=(8, 16)) / "config.json").write_text(json.dumps(old | dict(seed=3)))
    lines = [line.split("  ") for line in printed(capsys, *sorted(tmp_path.iterdir()))]
    cells = [[cell.strip() for cell in line if cell] for line in lines]
    assert cells == [
        [*"script labeled supervised size vat_xi mIoU best seeds steps hours".split(), "GPU GB"],
        ["c3_semiseg", "all", "off", "-", "-", "50.0", "60.0", "1", "10", "1.5", "3.25"],
        ["cct", "1/8", "on", "-", "0.1", "25.0", "50.0", "1", "10", "<0.01", "-"],  # 30 s, on a CPU
        ["cct", "all", "off", "8x16", "0.1", "50.0", "60.0", "1", "10", "1.5", "3.25"],
        ["cct", "all", "off", "8x16", "-", "50.0", "60.0", "1", "10", "1.5", "3.25"]]


def test_gain_is_over_the_one_supervised_run_of_the_same_labels_and_seed(tmp_path, capsys):
    for name, seed, miou, settings in (
            ("a0", 0, 0.6, {}), ("a1", 1, 0.5, {}),  # gains 10 and 2
            ("b0", 0, 0.5, dict(supervised=True)), ("b1", 1, 0.48, dict(supervised=True)),
            ("c0", 0, 0.7, dict(labeled="8")),  # none with 8 labels and this network
            ("c1", 0, 0.4, dict(labeled="8", supervised=True, backbone="resnet18")),
            ("d0", 0, 0.7, dict(split="x")), ("e0", 0, 0.6, dict(split="x", supervised=True)),
            ("f0", 0, 0.6, dict(split="x", supervised=True, lr=0.5))):  # which of two?
        write(tmp_path / name, miou=miou, seed=seed, **settings)
    fused = TITLES.strip() + ",miou_fused\n10,1,,20,0.5,0.5,0.75\n"
    write(tmp_path / "g", "s4gan_mlmt", log=fused, branch="both")
    write(tmp_path / "g/mlmt", "s4gan_mlmt", log=TITLES)
    write(tmp_path / "h", "s4gan_mlmt", log=TITLES + "10,1,,20,0.4,0.4\n", branch="s4gan", supervised=True)
    rows = [line.strip("| ").split(" | ") for line in printed(capsys, *sorted(tmp_path.iterdir()), "--markdown")]
    gains = {tuple(row[:4]): row[rows[0].index("gain")] for row in rows[2:]}
    assert rows[0][:4] == ["script", "labeled", "split", "supervised"]
    assert {key: gain for key, gain in gains.items() if gain != "-"} == {
        ("cct", "all", "-", "off"): "6.0 +- 5.7", ("s4gan_mlmt", "all", "-", "off"): "35.0"}


def test_unfinished_runs_are_listed_and_do_not_count(tmp_path, capsys):
    write(tmp_path / "a")
    write(tmp_path / "b", seed=1, step=7, log=TITLES + "7,1,,1,,\n7,,,1,0.6,0.6\n8,1,,2,,\n1")  # cut short
    write(tmp_path / "c", seed=2, log=TITLES + "10,1,,20,,\n")  # without its last score
    (write(tmp_path / "d", seed=3) / "last.pt").unlink()
    assert printed(capsys, *sorted(tmp_path.iterdir()))[1:] == [
        "50.0  60.0  1      10     1.5    3.25",
        *(f"{tmp_path}/{run}" for run in ("b: unfinished, step 7/10", "c: unfinished, step 10/10",
                                          "d: unfinished, step 0/?"))]


def test_stages_branches_domains(tmp_path, capsys):
    """Each with a log and checkpoints of its own"""
    log = "step,seconds,miou,best\n4,1800,0.3,0.3\n14,1800,0.2,0.41\n"
    stages = write(tmp_path / "a", "three_stage", log=log, stages=2, step=14, steps=14)
    more = write(tmp_path / "b", "three_stage", log=log, stages=2, step=14, steps=14)  # and now --stages 3
    config = json.loads((more / "config.json").read_text())
    (more / "config.json").write_text(json.dumps(config | dict(stages=3)))
    third = write(tmp_path / "c", "three_stage", log=log, stages=3, step=14, steps=14)
    write(third / "stage3", "three_stage", stages=3, step=18, steps=24)
    log = "step,seconds,miou,best,miou_fused\n10,3600,0.5,0.5,\n"
    fused = write(tmp_path / "d", "s4gan_mlmt", log=log + "10,3600,,,0.55\n")
    begun = write(tmp_path / "e", "s4gan_mlmt", log=log)
    alone = write(tmp_path / "f", "s4gan_mlmt", log="", branch="mlmt")
    log = "step,seconds,auc_macro,best\n8,1800,0.75,0.8\n"
    for folder in fused, begun, alone:
        write(folder / "mlmt", "s4gan_mlmt", log=log, step=8, steps=8)
    write(tmp_path / "g", domains=("voc", "camvid"), data="voc+camvid",
          log="step,miou,miou_voc,miou_camvid,best\n10,0.5,0.6,0.4,0.5\n")
    lines = printed(capsys, *sorted(tmp_path.iterdir()), "--markdown")
    assert lines[0] == ("| script | data | branch | camvid | voc | mIoU | fused | AUC | best "
                        "| seeds | steps | hours | GPU GB |")
    assert lines[2:] == [
        "| cct | voc+camvid | - | 40.0 | 60.0 | 50.0 | - | - | 50.0 | 1 | 10 | <0.01 | - |",
        "| s4gan_mlmt | voc | both | - | - | 50.0 | 55.0 | 75.0 | 50.0 | 1 | 10 | 2.5 | - |",
        "| s4gan_mlmt | voc | mlmt | - | - | - | - | 75.0 | 80.0 | 1 | 8 | 0.5 | - |",
        "| three_stage | voc | - | - | - | 20.0 | - | - | 41.0 | 1 | 14 | 1 | - |",
        f"{more}: unfinished, step 14/14", f"{third}: unfinished, step 18/24",
        f"{begun}: unfinished, step 10/10, 8/8"]
    assert summary.read_run(stages).settings["stages"] == "2"
    assert summary.read_run(write(tmp_path / "h", split="lists/1000.txt")).settings["labeled"] == "-"


def test_two_commands_in_one_folder(tmp_path, capsys):
    """The baselines of both branches; a finished run of both, repeated for one"""
    log = "step,seconds,auc_macro,best\n8,1800,0.75,0.8\n"
    for name, branch in ("a", "mlmt"), ("b", "s4gan"):
        folder = write(tmp_path / name, "s4gan_mlmt", branch=branch, log=TITLES + "10,,,300,0.5,0.6\n10,,,9,,\n")
        write(folder / "mlmt", "s4gan_mlmt", log=log, step=8, steps=8)
    [titles, *rows] = [line.split()[1:4] for line in printed(capsys, *sorted(tmp_path.iterdir()))]
    assert titles == ["mIoU", "AUC", "best"] and rows == [["50.0", "75.0", "60.0"]] * 2


def test_a_score_that_does_not_exist_is_shown(tmp_path, capsys):
    for seed in (0, 1):
        write(tmp_path / str(seed), miou=float("nan"), seed=seed)
    assert printed(capsys, *tmp_path.iterdir())[1].startswith("nan +- nan")


def test_a_picture_has_a_line_for_each_combination_of_the_other_settings(tmp_path, capsys, monkeypatch):
    for seed in (0, 1):
        for labeled in ("1/8", "1/20", "all"):
            for supervised in (False, True):
                miou = 0.3 + 0.1 * supervised + 0.02 * seed + 0.05 * (labeled == "all")
                write(tmp_path / f"{labeled[-1]}{supervised}{seed}", labeled=labeled, supervised=supervised,
                      seed=seed, miou=miou)
    seen = []
    draw = summary.line_plot
    monkeypatch.setattr(summary, "line_plot", lambda *values: (seen.append(values), draw(*values)))
    path = tmp_path / "plot.png"
    assert printed(capsys, *tmp_path.iterdir(), "--plot", "labeled", "--out", path)[-1] == f"wrote {path}"
    [([(title, lines)], _, x_label, ticks)] = seen
    assert "mIoU in %" in title and x_label == "labelled images" and ticks == {1: "1/20", 2: "1/8", 3: "all"}
    assert list(lines) == ["semi-supervised", "supervised"]
    assert np.allclose(lines["supervised"], [(1, 41, 2 ** 0.5), (2, 41, 2 ** 0.5), (3, 46, 2 ** 0.5)])
    for k in (4, 12):
        write(tmp_path / f"k{k}", k=k, miou=k / 20)
    printed(capsys, *tmp_path.glob("k*"), "--plot", "k", "--out", path)
    assert seen[1][0][0][1] == {"cct": [(4, 20, 0), (12, 60, 0)]}


def test_a_panel_has_a_column_for_each_row_of_the_table(tmp_path, capsys, monkeypatch):
    for script in SCRIPTS[:2]:
        for seed, supervised in ((0, False), (1, False), (0, True)):
            folder = write(tmp_path / f"{script}{seed}{supervised}", script, seed=seed, supervised=supervised)
            Image.new("RGB", (312, 316)).save(folder / "predictions.png")
    seen = []
    draw = summary.join_panels
    monkeypatch.setattr(summary, "join_panels", lambda *values: (seen.append(values), draw(*values))[1])
    path = tmp_path / "panel.png"
    assert printed(capsys, *tmp_path.iterdir(), "--panel", "--out", path)[-1] == f"wrote {path}"
    assert seen[0][1] == [f"{script}, {kind}" for script in sorted(SCRIPTS[:2])
                          for kind in ("semi-supervised", "supervised")]
    assert Image.open(path).width == 312 + 3 * 100  # columns of 100 pixels


@pytest.mark.parametrize("arguments, said", [
    (["nothing-*"], "nothing-\\* is no run folder: expected config.json"),
    (["a", "--out", "x.png"], "--out has no effect without --plot or --panel"),
    (["a", "--panel"], "--panel: expected a/predictions.png"),
    (["b", "other", "--panel"], "--panel: these panels show different images; expected runs on one dataset"),
    (["a", "b", "--plot", "colour"], "--plot colour: expected a setting that differs .* differ: k$"),
    (["a", "--plot", "k"], "differ: none$"), (["lines"], "lines/log.csv: expected .*lines of equal length"),
    (["words"], "words has a file that is damaged"), (["list"], "list has a file that is damaged"),
    (["half"], "half/last.pt is not a checkpoint"), (["older"], "older has .*another version .*'steps'")])
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("a", "b", "lines", "words", "list", "half", "older")):
        write(tmp_path / name, k=k + 1)
    write(tmp_path / "other", k=9)
    for name, colour in (("b", "red"), ("other", "blue")):
        Image.new("RGB", (312, 316), colour).save(tmp_path / name / "predictions.png")
    (tmp_path / "lines/log.csv").write_text(TITLES + "1,2\n")
    (tmp_path / "words/log.csv").write_text(TITLES + "1,a,,,,\n")
    (tmp_path / "list/config.json").write_text("[]")
    (tmp_path / "half/last.pt").write_bytes(b"half")
    torch.save(dict(script="cct", step=10), tmp_path / "older/last.pt")
    with pytest.raises(UserError, match=said):
        summary.main(arguments)


@pytest.mark.parametrize("script", SCRIPTS)
def test_real_runs(whole, capsys, script):
    folder, output, took = whole(script)
    final = output.split("final: mIoU ")[1].split()
    one = summary.read_run(folder)
    assert one.settings["script"] == script and one.running == "" and one.gpu_gb == 0
    assert f"{100 * one.scores['fused' if script == 's4gan_mlmt' else 'mIoU']:.1f}" == final[0]
    assert 0.5 * took < 3600 * one.hours < took
    [titles, row] = printed(capsys, folder)
    assert final[0] in row and titles.split()[-6:] == ["best", "seeds", "steps", "hours", "GPU", "GB"]
