"""The page about a run in a real browser: all is seen, and nothing is too wide.

Chromium is started without a network, from the command line.
"""

import html
import json
import re
import subprocess

import PIL.Image
import pytest

from crossmae_jax import visualize
from crossmae_jax.report import run_page
from crossmae_jax.runs import results, workdir
from crossmae_jax.targets import pixels
from tests import conftest, saved_runs, test_visualize

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
)
PHONE, DESKTOP = 390, 1280
# What a page in a frame says of itself, as the title of the page around it.
PROBE = """<script>
addEventListener("load", () => {
  const width = document.documentElement.clientWidth;
  const wide = [...document.querySelectorAll("body *")].filter(e =>
    !e.closest(".scroll, pre, svg") && e.getBoundingClientRect().right > width + 0.5);
  parent.document.title = JSON.stringify({
    width, scroll: document.documentElement.scrollWidth,
    images: [...document.images].map(i => i.complete && i.naturalWidth),
    charts: [...document.querySelectorAll("figure svg")].map(s =>
      s.getBoundingClientRect().width),
    wide: wide.map(e => e.outerHTML.slice(0, 80)), text: document.body.innerText,
    paper: getComputedStyle(document.body).backgroundColor,
    requests: performance.getEntriesByType("resource").map(r => r.name)
      .filter(name => !name.startsWith("data:")),
  });
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run whose files are written here, with long names and values."""
    directory = tmp_path_factory.mktemp("runs") / ("a_run_with_a_long_name" * 4)
    config = saved_runs.tiny_config("digits_cross", "data.batch_size=8")
    config.data.data_dir = "/a/long/path/without/a/space" * 4
    workdir.claim(
        directory, config, resuming=False,
        dataset={"num_images": 1831, "fingerprint": "0123456789abcdef" * 4},
    )
    lines = [{
        "step": step, "train/loss": 1 / step, "train/loss_trivial": 0.6,
        "train/lr": 1e-4, "train/grad_norm": step % 7, "train/goodput": 0.9,
        "train/images_per_second": 12345.6, "eval/knn/top1": 1 - 1 / step,
        "eval/an_evaluator_with_a_long_name/and_a_part_of_it/mse": step,
    } for step in range(1, 12_000, 100)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)
    (directory / "time.json").write_text(json.dumps({
        "seconds": {"steps": 98765.4, "data": 1234.5}, "saved_steps": 98765.4,
        "until": 2e9, "finished": True,
    }))
    results.write(directory, {
        f"{name}/{kind}/top1": 0.5 for name in ("eval", "random_init", "pixels")
        for kind in ("knn", "linear")
    })
    (directory / "environment.json").write_text(json.dumps({"command": [
        "python", "-m", "crossmae_jax.main", "--config=configs/digits_cross.py",
        f"--workdir={directory}",
    ]}))
    visualize.reconstruction_panel(
        test_visualize.pictures(), directory / "panels" / "step_00011901.png",
        caption=pixels.caption(normalize=True),
    )
    return run_page.write(directory)


def browse(tmp_path, path, *flags, width):
    """Opens a file in a browser of its own, without a network; returns its output."""
    found = subprocess.run(
        [conftest.BROWSER, *FLAGS, f"--window-size={width},900",
         f"--user-data-dir={tmp_path / 'profile'}", *flags, path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def look(tmp_path, path, *, width):
    """Returns what the browser made of a copy of the page.

    The copy lies in a frame, as no window can be as narrow as a phone's.
    """
    copy = html.escape(path.read_text().replace("</body>", f"{PROBE}</body>"))
    around = tmp_path / "around.html"
    around.write_text(
        '<meta charset="utf-8"><title></title><body style="margin: 0"><iframe '
        f'style="border: 0" width="{width}" height="900" srcdoc="{copy}"></iframe>'
    )
    dom = browse(tmp_path, around, "--dump-dom", width=width)
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.S)[1]))


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_everything_is_there_and_nothing_is_too_wide(page, width, tmp_path):
    seen = look(tmp_path, page, width=width)
    assert (seen["width"], seen["scroll"], seen["wide"]) == (width, width, [])
    image, = seen["images"]
    with PIL.Image.open(page.parent / "panels" / "step_00011901.png") as panel:
        assert image == panel.width
    assert len(seen["charts"]) == 7 and min(seen["charts"]) > 300
    assert max(seen["charts"]) <= width - 40
    assert seen["requests"] == []
    for text in (
        "CrossMAE W16-D1-H2/4", "raw pixels",
        "Finished: step 11 901 of 11 901 last heard of on 2033-05-18",
        "predicting the mean of each patch: 0.6000", "Evaluation: knn top1",
        "colours and contrast are not evidence", "0123456789abcdef" * 4,
        f"--workdir={page.parent}", "27 h 46 min",
    ):
        assert text in seen["text"], text


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_it_can_be_seen_in_light_and_dark(page, width, tmp_path):
    shades = []
    for scheme, dark in (("light", 1), ("dark", 0)):
        path = tmp_path / f"{scheme}.png"
        browse(
            tmp_path, page, f"--screenshot={path}",
            f"--blink-settings=preferredColorScheme={dark}", width=width,
        )
        picture = PIL.Image.open(path).convert("L")
        assert picture.size == (width, 900)
        shades.append(picture.getpixel((2, 2)))
        darkest, lightest = picture.getextrema()
        assert lightest - darkest > 180  # text on paper
    assert shades[0] > 230 and shades[1] < 40


def test_it_can_be_printed(page, tmp_path):
    path = tmp_path / "page.pdf"
    browse(tmp_path, page, f"--print-to-pdf={path}", width=DESKTOP)
    assert path.read_bytes().startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", path.read_bytes())) <= 8
