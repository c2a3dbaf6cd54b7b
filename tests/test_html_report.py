"""The page about a run: what it says, that it is valid, and that it loads nothing."""

import base64
import html.parser
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from crossmae_jax import train
from crossmae_jax.commands import flags
from crossmae_jax.commands import report as command
from crossmae_jax.distributed import environment
from crossmae_jax.report import run_page, svg
from crossmae_jax.runs import workdir
from tests import tiny

ROOT = Path(__file__).parents[1]
HOSTILE = "<script>alert(\"1\")</script> & 'x' é </pre>"
VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Reads a page, of which every tag must close in the order of opening.

    Attributes:
      text: of each section by its id; "" for what stands outside of sections.
    """

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.ids, self.links = [], [], [], []
        self.images, self.text, self.command = [], {"": ""}, ""
        self._section = ""
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open
        assert len(set(self.ids)) == len(self.ids)
        for link in self.links:
            assert link.startswith("data:") or link[1:] in self.ids, link
        assert not {"script", "link", "iframe", "object", "base"} & set(self.tags)
        assert "@import" not in self.source

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self._section = attributes["id"]
            self.text[self._section] = ""
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.links += [attributes[k] for k in ("href", "src") if k in attributes]
        self.links += re.findall(r"url\((.*?)\)", " ".join(
            value or "" for value in attributes.values()
        ))
        assert not any(name.startswith("on") for name in attributes), attributes
        if tag in ("img", "svg"):
            assert attributes["alt" if tag == "img" else "aria-label"]
        if tag == "img":
            self.images.append(attributes["src"])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data):
        self.text[self._section] += data
        if self.open[-1:] == ["pre"]:
            self.command += data


@pytest.fixture(scope="module")
def finished(digits_dir, tmp_path_factory):
    """A run of six steps, with evaluations on the way and baselines."""
    config = tiny.config(
        digits_dir, epochs=0.4, optim__warmup_epochs=0.1, log_every_steps=2,
        checkpoint__every_epochs=0.2, baselines=True,
        evals=dict(
            knn=dict(every_epochs=0.2, k=(3,), pools=("mean", "cls"),
                     temperature=0.07, max_train_images=100),
            reconstruction=dict(every_epochs=0.0, num_images=2),
        ),
    )
    directory = tmp_path_factory.mktemp("runs") / "one"
    return directory, train.run(config, directory)


@pytest.fixture
def interrupted(finished, tmp_path):
    """The same without what came after step 3, and with no evaluations to come."""
    directory = tmp_path / "interrupted"
    shutil.copytree(finished[0], directory)
    shutil.rmtree(directory / "checkpoints" / "6")
    for name in ("report.html", "results.json", "panels/step_00000006.png"):
        (directory / name).unlink()
    config = json.loads((directory / "config.json").read_text())
    config |= {"evals": {}, "baselines": False}
    (directory / "config.json").write_text(json.dumps(config))
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 3]
    (directory / "metrics.jsonl").write_text("".join(kept) + '{"step": 4, "tra')
    time = json.loads((directory / "time.json").read_text())
    (directory / "time.json").write_text(json.dumps(time | {"finished": False}))
    return directory


def test_a_run_ends_with_a_page_of_all_there_is_to_know(finished):
    directory, found = finished
    page = Page(directory / run_page.FILE)
    assert list(page.text) == [
        "", "results", "curves", "reconstructions", "numbers", "time", "resume",
        "configuration", "data", "environment",
    ]
    contents = [f"#{name}" for name in list(page.text)[1:]]
    assert page.links[:len(contents)] == contents
    assert "CrossMAE W16-D2-H2/4, digits" in page.text[""]
    assert str(directory) in page.text[""]
    assert "Finished: step 6 of 6" in page.text[""]
    for row in ("eval", "random_init", "pixels"):
        assert f"{100 * found[f'{row}/knn/top1']:.1f} %" in page.text["results"]
        assert f"{found[f'{row}/knn/top1']:.6g}" in page.text["numbers"]
    assert f"{found['train/loss_trivial']:.4f}" in page.text["results"]
    for title in ("Loss", "Learning rate", "Gradient norm", "Images a second",
                  "Goodput", "Evaluation: knn top1"):
        assert title in page.text["curves"]
    assert "reconstruction" not in page.text["curves"]  # a single value
    assert page.tags.count("svg") == 6
    for name in found:
        assert name in page.text["numbers"]
    assert "colours and contrast are not evidence" in page.text["reconstructions"]
    config = json.loads((directory / "config.json").read_text())
    assert f"optim.base_lr{config['optim']['base_lr']}" in page.text["configuration"]
    assert json.loads((directory / "dataset.json").read_text())["fingerprint"] in (
        page.text["data"]
    )
    assert "8 x cpu" in page.text["environment"]
    assert f"{directory}/checkpoints, of steps: 3, 6." in page.text["resume"]


def test_the_picture_is_the_newest_panel(finished):
    directory, _ = finished
    image, = Page(directory / run_page.FILE).images
    start = "data:image/png;base64,"
    data = base64.b64decode(image.removeprefix(start), validate=True)
    assert image.startswith(start)
    assert data == (directory / "panels" / "step_00000006.png").read_bytes()
    PIL.Image.open(io.BytesIO(data)).load()


def test_a_large_panel_becomes_a_smaller_picture(interrupted):
    noise = np.random.default_rng(0).integers(0, 256, (2400, 1500, 3), np.uint8)
    path = interrupted / "panels" / "step_00000002.png"
    PIL.Image.fromarray(noise).save(path)
    page = Page(run_page.write(interrupted))
    start = "data:image/jpeg;base64,"
    image = PIL.Image.open(io.BytesIO(base64.b64decode(page.images[0][len(start):])))
    assert image.size == (1125, 1800) and page.images[0].startswith(start)
    assert len(page.source) < 3_000_000 < path.stat().st_size


def test_the_command_of_an_interrupted_run_makes_it_go_on(interrupted, capsys):
    assert command.main([str(interrupted)]) == 0
    assert capsys.readouterr().out == f"{interrupted}/report.html\n"
    page = Page(interrupted / "report.html")
    assert "Interrupted, or still running: step 3 of 6 last heard of" in page.text[""]
    assert "goes on from step 3" in page.text["resume"]
    assert "reconstructions" not in page.text
    assert "random initialisation" not in page.text["results"]
    python, flag, code = shlex.split(page.command)
    assert (python, flag) == ("python", "-c")
    exec(code)
    assert "RESUMED at step 3 of 6" in capsys.readouterr().out
    assert "Finished: step 6 of 6" in Page(interrupted / "report.html").text[""]


def test_what_stands_in_files_is_text_and_no_html(interrupted, tmp_path):
    directory = tmp_path / "a <b> & \"c\" 'd' $x$"
    interrupted.rename(directory)
    config = json.loads((directory / "config.json").read_text())
    config["data"]["name"] = HOSTILE
    config["data"]["source"] = "tfds"
    (directory / "config.json").write_text(json.dumps(config))
    noted = json.loads((directory / "environment.json").read_text())
    noted |= {"git_commit": HOSTILE, "devices": [HOSTILE], "command": [
        "python", "-m", "crossmae_jax.main", f"--config.data.name={HOSTILE}",
        "--workdir", str(directory), "",
    ]}
    (directory / "environment.json").write_text(json.dumps(noted))
    (directory / "metrics.jsonl").write_text("".join(
        json.dumps({
            "step": step, "train/loss": 1 / step, f"eval/{HOSTILE}/x": step,
            "eval/$a_b$/x/y": 0.5, "eval/$a_b$/<z>/y": 0.7, "train/lr": None,
        }) + "\n" for step in (1, 2, 3)
    ))
    page = Page(run_page.write(directory))
    assert str(directory) in page.text[""] and HOSTILE in page.text[""]
    assert repr(HOSTILE) in page.text["configuration"]
    assert page.text["environment"].count(HOSTILE) == 2
    assert HOSTILE in page.text["numbers"]
    assert "$a_b$ y" in page.text["curves"] and "<z>" in page.text["curves"]
    assert "Learning rate" not in page.text["curves"]  # its values are not finite
    typed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {page.command}"], capture_output=True, text=True
    )
    assert typed.stdout.split("\0")[:-1] == noted["command"]


TITLES = {
    "vitb_mae_prmim": "PR-MIM on MAE B/16, imagenet2012",
    "vitb_mff": "MFF B/16, imagenet2012",
    "vitb_mff_prmim": "PR-MIM on MFF B/16, imagenet2012",
    "vitb_simmim": "SimMIM B/16, imagenet2012",
    "vitb_local_prmim": "PR-MIM on LocalMIM B/16, imagenet2012",
    "folder_cross": "CrossMAE S/16, where/photos &",
    "finetune_vitb": "Fine-tuning of B/16, imagenet2012",
    "partialft_vitb": "Partial fine-tuning (1 block) of B/16, imagenet2012",
    "linprobe_vitb": "Linear probe of B/16, imagenet2012",
}


@pytest.mark.parametrize("name", TITLES)
def test_a_run_that_has_just_begun_has_a_page(name, tmp_path):
    config = flags.load_config(ROOT / "configs" / f"{name}.py")
    config.data.dir = "/some/where/photos &/"
    workdir.claim(tmp_path, config, dataset={}, resuming=False)
    page = Page(run_page.write(tmp_path))
    assert TITLES[name] in page.text[""]
    assert "Interrupted, or still running: step 0" in page.text[""]
    assert "No step has been logged yet." in page.text["results"]
    assert list(page.text) == ["", "results", "resume", "configuration"]


def test_what_is_no_run_or_is_damaged_is_an_error(interrupted, tmp_path, capsys):
    assert command.main([str(tmp_path / "nothing")]) == 1
    assert "give the --workdir that a run was started with" in capsys.readouterr().err
    (interrupted / "metrics.jsonl").write_text('{"loss": 1}\n')
    assert command.main([str(interrupted)]) == 1
    assert "metrics.jsonl, line 1 is not an object with a step" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit, match="2"):
        command.main([])


def test_the_command_of_a_run_is_noted_if_it_is_one_of_ours(monkeypatch):
    assert environment.command() is None  # these tests are none
    program = types.ModuleType("__main__")
    program.__spec__ = types.SimpleNamespace(name="crossmae_jax.main")
    monkeypatch.setitem(sys.modules, "__main__", program)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "crossmae_jax.main", "-x"])
    assert environment.command() == ["python", "-m", "crossmae_jax.main", "-x"]


def test_curves_of_a_long_run_stay_small():
    random = np.random.default_rng(0)
    line = dict(enumerate(random.random(100_000).tolist()))
    assert len(svg.curves({"loss": line}, alt="noise", name="a")) < 250_000
    with pytest.raises(ValueError, match="Curves 'a, b' have no values"):
        svg.curves({"a": {}, "b": {}}, alt="", name="a")
