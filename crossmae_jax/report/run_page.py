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
from crossmae_jax import paths, visualize
from crossmae_jax.paths import AnyPath
from crossmae_jax.report import html, svg
from crossmae_jax.report.html import Section
from crossmae_jax.runs import reading, results, workdir
from crossmae_jax.runs.reading import Run, Series

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
      FileNotFoundError: if the directory is not that of a run.
      ValueError: if a line of `metrics.jsonl` is damaged.
    """
    directory = paths.path(directory)
    page = _page(reading.read(directory, name=name))
    if paths.is_remote(directory):
        (directory / FILE).write_text(page)  # an object appears whole
    else:
        workdir.write_whole(directory / FILE, page)
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
    """Returns the method, the model and the data, such as "CrossMAE B/16, digits"."""
    if config.get("objective", "pretrain") == "pretrain":
        method = {"cross": "CrossMAE", "mae": "MAE"}[config["model.decoder"]]
        if config["model.aggregator.kind"] != "none":
            method = f"PR-MIM on {method}"
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
    return f"{method} {config['model.size']}, {names.get(source) or source}"


def _state(run: Run) -> str:
    """Says how far the run came, and when that was."""
    of = "" if run.total is None else f" of {_count(run.total)}"
    said, css = ("Finished", "good") if run.finished else (
        "Interrupted, or still running", "open"
    )
    state = f"{said}: step {_count(run.reached)}{of}"
    seen = ""
    if "until" in run.time:
        until = datetime.datetime.fromtimestamp(run.time["until"], datetime.UTC)
        seen = f"last heard of on {until:%Y-%m-%d} at {until:%H:%M} UTC"
    return (
        f"<p>{html.element('span', state, css=f'state {css}')} "
        f"{html.element('span', seen, css='soft')}</p>"
    )


def _results(run: Run) -> str:
    found, cards = run.found, []
    if "train/loss" in found:
        trivial = found.get("train/loss_trivial")
        cards.append(("Loss", f"{found['train/loss']:.4f}", "" if trivial is None else (
            f"predicting the mean of each patch: {trivial:.4f}"
        )))
    if "eval/accuracy/top1" in found:
        images = int(found["eval/accuracy/images"])
        cards.append((
            "Accuracy, top-1", f"{100 * found['eval/accuracy/top1']:.1f} %",
            f"on {_count(images)} images",
        ))
    if run.best:
        share = run.best["metric"].endswith(("top1", "top5"))
        value = run.best["value"]
        cards.append((
            f"Best {run.best['metric'].removeprefix('eval/')}",
            f"{100 * value:.1f} %" if share else f"{value:.4g}",
            f"at step {_count(run.best['step'])}",
        ))
    if "train/images_per_second" in found:
        speed = f"{found['train/images_per_second']:,.0f}".replace(",", " ")
        cards.append(("Images a second", speed, "at the last log point"))
    if seconds := run.time.get("seconds"):
        total = sum(seconds.values())
        remark = f"goodput {seconds['steps'] / total:.0%}" if total else ""
        cards.append(("Time", _duration(total), remark))
    parts = [html.tiles(cards)] if cards else []
    if compared := results.table(found):
        header, _, *rows = (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in compared.splitlines()
        )
        parts += [
            html.table(header, rows),
            html.element(
                "p", "Of frozen features, on the evaluation split. Trained features "
                "have to beat those of the same network at random initialisation; raw "
                "pixels show how hard the images are without a model.", css="soft",
            ) if len(rows) > 1 else "",
        ]
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
         dict(percent=title.endswith(("top1", "top5"))))
        for title, lines in charts.items()
    ]


def _alt(title: str, lines: Series) -> str:
    told = []
    for label, values in lines.items():
        first, last = min(values), max(values)
        told.append(
            f"{label} from {values[first]:.4g} at step {first} to {values[last]:.4g} "
            f"at step {last}"
        )
    return f"{title} over steps: " + "; ".join(told)


def _panel(run: Run) -> str:
    if run.panel is None:
        return ""
    data, kind = run.panel.read_bytes(), "png"
    if len(data) > _LARGEST_PNG:
        image, kind = PIL.Image.open(io.BytesIO(data)).convert("RGB"), "jpeg"
        image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
        file = io.BytesIO()
        image.save(file, format="jpeg", quality=88)
        data = file.getvalue()
    number = re.search(r"\d+", run.panel.stem)
    step = f" at step {_count(int(number[0]))}" if number else ""
    said = visualize.caption(normalize=run.config["target.normalize"])
    return html.picture(
        data, kind=kind, caption=f"Evaluated{step}. {said}",
        alt=f"Reconstructions{step}, a row per image: the original, the masked input, "
        "the prediction of hidden patches, the prediction with the visible patches.",
    )


def _numbers(run: Run) -> str:
    rows = []
    for name in sorted(run.found.keys() | run.series.keys()):
        values = run.series.get(name)
        step = _count(max(values)) if values else "end"
        rows.append((name, f"{run.found[name]:.6g}", step))
    return html.table(("name", "value", "step"), rows) if rows else ""


def _time(run: Run) -> str:
    seconds = run.time.get("seconds", {})
    total = sum(seconds.values())
    if not total:
        return ""
    rows = [
        (kind, f"{spent:,.1f} s".replace(",", " "), f"{spent / total:.1%}")
        for kind, spent in seconds.items()
    ]
    return html.table(("kind", "time", "share"), rows) + html.element(
        "p", "Over all launches. Restart is what launches that ended early cost: steps "
        "made twice, and the time until the next launch.", css="soft",
    )


def _resume(run: Run) -> str:
    folder = html.element("code", f"{run.name}/checkpoints")
    kept = ", ".join(map(_count, run.saved)) or "none yet"
    parts = [f"<p>Checkpoints in {folder}, of steps: {kept}.</p>"]
    if run.best:
        parts.append(
            f"<p>Best state: {html.element('code', f'{run.name}/best')}, step "
            f"{_count(run.best['step'])}.</p>"
        )
    if command := run.environment.get("command"):
        said = "The run was last started with this command. Given again in the same "
        said += "directory, it "
    else:
        said = "No command is recorded. This one reads the settings of the run, and "
        command = ["python", "-c", (
            "from crossmae_jax import train, workdir; "
            f"train.run(workdir.read_config({run.name!r}), {run.name!r})"
        )]
    if run.finished:
        said += "evaluates once more; the run is finished and trains no further."
    else:
        said += f"goes on from step {_count(max(run.saved, default=0))}."
    return "".join([
        *parts, html.element("p", said),
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
        (name.replace("_", " "), _count(value) if name == "num_images" else value)
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


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _duration(seconds: float) -> str:
    """Returns a time such as "42 s", "12 min 5 s", "3 h 20 min"."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
