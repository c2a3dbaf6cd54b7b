"""The page about a run, `report.html`: one file to open, show and keep.

It is made from the files of the workdir alone, so it can be made at any time, also of a
run that goes on. Nothing in it is loaded from elsewhere.
"""

import datetime
import io
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image

import crossmae_jax
from crossmae_jax import errors, paths, tables
from crossmae_jax.models import mim
from crossmae_jax.paths import AnyPath
from crossmae_jax.report import html, svg
from crossmae_jax.report.html import Section
from crossmae_jax.runs import confusions, reading, results
from crossmae_jax.runs.reading import Run, Series
from crossmae_jax.tables import Table

FILE = "report.html"
# A panel of more bytes becomes a JPEG of so many pixels at most, and the page stays
# small enough to be sent around.
_LARGEST_PNG, _LARGEST_SIDE = 1_000_000, 1800


def write(directory: str | AnyPath, *, name: str | None = None) -> AnyPath:
    """Writes the page about a run into its workdir, whole; returns the file's path.

    Args:
      directory: a workdir, also in a bucket.
      name: of the workdir where `directory` holds copies of its small files.

    Raises:
      FileError: if the directory is not that of a run.
      SetupError: if a line of `metrics.jsonl` is damaged.
    """
    directory = paths.path(directory)
    with errors.setting_up():
        run = reading.read(directory, name=name)
    paths.write_whole(directory / FILE, _page(run))
    return directory / FILE


def _page(run: Run) -> str:
    title = _title(run.config)
    made = datetime.datetime.now(datetime.UTC)
    header = (
        f"{html.element('h1', title)}<p>{html.element('code', run.name)}</p>"
        f"{_state(run)}"
    )
    parts = [
        Section("results", "Results", _results(run)),
        Section("curves", "Curves", _curves(run)),
        Section("reconstructions", "Reconstructions", _panel(run)),
        Section(
            "numbers", "Final numbers" if run.finished else "Newest numbers",
            _numbers(run),
        ),
        Section("time", "Where the time went", _time(run)),
        Section("resume", "Checkpoints and going on", _resume(run)),
        Section("configuration", "Configuration", html.pairs(
            (name, repr(value)) for name, value in sorted(run.config.items())
        )),
        Section("data", "Data", _data(run)),
        Section("environment", "Environment", _environment(run)),
    ]
    again = shlex.join(["python", "-m", "crossmae_jax", "report", run.name])
    return html.page(
        f"{title}: {run.name}", header=header,
        sections=[part for part in parts if part.content],
        footer=(
            f"<p>Written on {made:%Y-%m-%d} at {made:%H:%M} UTC by crossmae_jax "
            f"{html.text(crossmae_jax.__version__)}. To make it again: "
            f"{html.element('code', again)}</p>"
        ),
    )


def _title(config: Mapping[str, Any]) -> str:
    """Returns the method, the model and the data, such as "CrossMAE B/16, digits".

    "A run" of settings that are not ours, or of a later version.
    """
    try:
        return _described(config)
    except (AttributeError, LookupError, TypeError, ValueError):
        return "A run"


def _described(config: Mapping[str, Any]) -> str:
    if config.get("objective", "pretrain") == "pretrain":
        method = mim.method(**{
            part: config[f"model.{part}.kind"]
            for part in ("fusion", "decoder", "aggregator")
        })
    elif config["tune_blocks"] is None:
        method = "Fine-tuning of"
    elif config["tune_blocks"] == 0:
        method = "Linear probe of"
    else:
        blocks = f"{config['tune_blocks']:g} block"
        plural = "" if config["tune_blocks"] == 1 else "s"
        method = f"Partial fine-tuning ({blocks}{plural}) of"
    source = config["data.source"]
    folder = (config["data.dir"] or "").rstrip("/").split("/")[-2:]
    names = {"tfds": config["data.name"], "folder": "/".join(folder)}
    return f"{method} {config['model.encoder.size']}, {names.get(source) or source}"


def _state(run: Run) -> str:
    """Says how far the run came, and when that was."""
    of = "" if run.total is None else f" of {tables.grouped(run.total)}"
    word, css = ("Finished", "good") if run.finished else (
        "Interrupted, or still running", "open"
    )
    state = f"{word}: step {tables.grouped(run.reached)}{of}"
    last_sign = ""
    if "until" in run.time:
        until = datetime.datetime.fromtimestamp(run.time["until"], datetime.UTC)
        last_sign = f"last heard of on {until:%Y-%m-%d} at {until:%H:%M} UTC"
    return (
        f"<p>{html.element('span', state, css=f'state {css}')} "
        f"{html.element('span', last_sign, css='soft')}</p>"
    )


def _results(run: Run) -> str:
    numbers, cards = run.numbers, []
    if "train/loss" in numbers:
        trivial = numbers.get("train/loss_trivial")
        remark = "" if trivial is None else (
            f"predicting the mean of each patch: {trivial:.4f}"
        )
        cards.append(("Loss", f"{numbers['train/loss']:.4f}", remark))
    if "eval/accuracy/top1" in numbers:
        images = numbers.get("eval/accuracy/images")
        cards.append((
            "Accuracy, top-1", tables.percent(numbers["eval/accuracy/top1"]),
            "" if images is None else f"on {tables.grouped(int(images))} images",
        ))
    if run.best:
        name = run.best["metric"]
        cards.append((
            f"Best {name.removeprefix('eval/')}",
            tables.short(name, run.best["value"]),
            f"at step {tables.grouped(run.best['step'])}",
        ))
    if "train/images_per_second" in numbers:
        speed = tables.grouped(numbers["train/images_per_second"])
        cards.append(("Images a second", speed, "at the last log point"))
    if seconds := run.time.get("seconds"):
        total = sum(seconds.values())
        remark = f"goodput {seconds['steps'] / total:.0%}" if total else ""
        cards.append(("Time", _duration(total), remark))
    parts = [html.tiles(cards)] if cards else []
    if compared := results.compared(numbers):
        parts += [
            html.table(compared),
            html.element(
                "p", "Of frozen features, on the evaluation split. Trained features "
                "have to beat those of the same network at random initialisation; raw "
                "pixels show how hard the images are without a model.", css="soft",
            ) if len(compared.rows) > 1 else "",
        ]
    if run.confusions:
        parts.append(html.table(confusions.table(run.confusions)))
    return "".join(parts) or html.element("p", "No step has been logged yet.")


# Title, names of metrics and of their curves, caption, and options of the picture.
_CHARTS = (
    ("Loss", {"train/loss": "model", "train/loss_trivial": "mean of each patch",
              "train/loss_retained": "decoded patches",
              "train/loss_thrown": "thrown patches"},
     "Its height says nothing; compare it with that of predicting each patch's mean.",
     dict(from_zero=True)),
    ("Accuracy on training images", {"train/top1": "top-1"},
     "Of augmented images, while they are trained on.", dict(percent=True)),
    ("Learning rate", {"train/lr": "learning rate"}, "", dict(from_zero=True)),
    ("Gradient norm", {"train/grad_norm": "gradient norm"},
     "Before clipping. Single peaks are normal; a steady climb comes before a "
     "divergence.", dict(from_zero=True)),
    ("Images a second", {"train/images_per_second": "images a second"},
     "All devices together, without evaluations and saves.", dict(from_zero=True)),
    ("Goodput", {"train/goodput": "goodput"},
     "Share of all time so far that went into training steps.",
     dict(percent=True, from_zero=True)),
)


def _curves(run: Run) -> str:
    charts = []
    for title, names, caption, options in _CHARTS:
        lines = {
            label: run.series[name] for name, label in names.items()
            if name in run.series
        }
        if "train/loss_trivial" not in run.series and title == "Loss":
            caption = ""
        charts.append((title, lines, caption, options))
    charts += _evaluations(run.series)
    drawn = []
    for number, (title, lines, caption, options) in enumerate(charts):
        lines = {label: values for label, values in lines.items() if len(values) > 1}
        if lines:
            drawn.append(html.chart(title, svg.curves(
                lines, alt=_alt(title, lines), name=f"chart{number}", **options
            ), caption=caption))
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _evaluations(series: Series) -> list[tuple[str, Series, str, dict[str, Any]]]:
    """Returns a chart of each kind of number of each evaluator.

    eval/knn/mean/k20/top1 and eval/knn/cls/k20/top1 share one.
    """
    charts: dict[str, Series] = {}
    for name, values in series.items():
        if name.startswith("eval/") and not name.endswith("/images"):  # a mere count
            _, evaluator, *middle, kind = name.split("/")
            lines = charts.setdefault(f"{evaluator} {kind}", {})
            lines[" ".join(middle) or kind] = values
    for title, lines in charts.items():
        plain = title.split()[-1]  # of several, the first once more
        if any(values == lines.get(plain) for values in list(lines.values())[1:]):
            del lines[plain]
    return [
        (f"Evaluation: {title}", lines, "",
         dict(percent=tables.is_share(title)))
        for title, lines in charts.items()
    ]


def _alt(title: str, lines: Series) -> str:
    courses = []
    for label, values in lines.items():
        first, last = min(values), max(values)
        courses.append(
            f"{label} from {values[first]:.4g} at step {first} to {values[last]:.4g} "
            f"at step {last}"
        )
    return f"{title} over steps: " + "; ".join(courses)


def _panel(run: Run) -> str:
    if run.panel is None:
        return ""
    data, kind = run.panel.read_bytes(), "png"
    panel = PIL.Image.open(io.BytesIO(data), formats=("PNG",))
    remark = panel.info.get("Description", "")
    if len(data) > _LARGEST_PNG:
        image, kind = panel.convert("RGB"), "jpeg"
        image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
        file = io.BytesIO()
        image.save(file, format="jpeg", quality=88)
        data = file.getvalue()
    number = re.search(r"\d+", run.panel.stem)
    step = f" at step {tables.grouped(int(number[0]))}" if number else ""
    return html.picture(
        data, kind=kind, caption=f"Evaluated{step}. {remark}".strip(),
        alt=f"Reconstructions{step}, a row per image: the original, the masked input, "
        "the target where it is no image, the prediction of hidden patches, the "
        "prediction with the visible patches.",
    )


def _numbers(run: Run) -> str:
    rows = []
    for name in sorted(run.numbers.keys() | run.series.keys()):
        values = run.series.get(name)
        step = tables.grouped(max(values)) if values else "end"
        rows.append((name, tables.exact(run.numbers[name]), step))
    if not rows:
        return ""
    return html.table(Table(("name", "value", "step"), tuple(rows)))


def _time(run: Run) -> str:
    seconds = run.time.get("seconds", {})
    total = sum(seconds.values())
    if not total:
        return ""
    rows = tuple(
        (kind, f"{tables.grouped(spent, decimals=1)} s", f"{spent / total:.1%}")
        for kind, spent in seconds.items()
    )
    return html.table(Table(("kind", "time", "share"), rows)) + html.element(
        "p", "Over all launches. Restart is what launches that ended early cost: steps "
        "made twice, and the time until the next launch.", css="soft",
    )


def _resume(run: Run) -> str:
    folder = html.element("code", f"{run.name}/checkpoints")
    kept = ", ".join(map(tables.grouped, run.saved)) or "none yet"
    parts = [f"<p>Checkpoints in {folder}, of steps: {kept}.</p>"]
    if run.best:
        parts.append(
            f"<p>Best state: {html.element('code', f'{run.name}/best')}, step "
            f"{tables.grouped(run.best['step'])}.</p>"
        )
    if command := run.environment.get("command"):
        what = "The run was last started with this command. Given again in the same "
        what += "directory, it "
    else:
        what = "No command is recorded. This one reads the settings of the run, and "
        command = ["python", "-c", (
            "from crossmae_jax import train; from crossmae_jax.runs import workdir; "
            f"train.run(workdir.read_config({run.name!r}), {run.name!r})"
        )]
    if run.finished:
        what += "evaluates once more; the run is finished and trains no further."
    else:
        what += f"goes on from step {tables.grouped(max(run.saved, default=0))}."
    return "".join([
        *parts, html.element("p", what),
        f"<pre>{html.text(_typed(command))}</pre>",
    ])


def _typed(command: Sequence[str]) -> str:
    """Returns a command as for a shell, its settings on lines of their own."""
    return "".join(
        (" \\\n    " if argument.startswith("--") else " ") + shlex.quote(argument)
        for argument in command
    ).strip()


def _data(run: Run) -> str:
    return html.pairs(
        (
            name.replace("_", " "),
            tables.grouped(value) if name == "num_images" else value,
        )
        for name, value in run.dataset.items()
    ) if run.dataset else ""


def _environment(run: Run) -> str:
    known = dict(run.environment)
    known.pop("command", None)
    rows = list(known.pop("versions", {}).items())
    devices = Counter(known.pop("devices", []))
    if devices:
        rows.append(("devices", ", ".join(f"{n} x {d}" for d, n in devices.items())))
    rows += [(name.replace("_", " "), value) for name, value in known.items()]
    rows = [(name, "-" if value in (None, "") else value) for name, value in rows]
    return html.pairs(rows) if rows else ""


def _duration(seconds: float) -> str:
    """Returns a time such as "42 s", "12 min 5 s", "3 h 20 min"."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
