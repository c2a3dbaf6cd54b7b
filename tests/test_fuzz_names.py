"""Names of files, which may be anything that a file system takes, stay text."""

import ast
import copy
import html.parser
from pathlib import Path

from hypothesis import strategies as st

from crossmae_jax.report import run_page
from tests.fuzzing import fuzzed, text_of
from tests.test_fuzz_records import run_files

__all__ = ["run_files"]  # a fixture


class _Tags(html.parser.HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.found, self.attributes = [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.attributes += [name for name, _ in attributes]


_NAMES = st.one_of(
    st.sampled_from([
        "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='x",
        "a\nb", "&lt;", "</pre><iframe>", "$(touch x)", "`x`", "; rm x", "-x", "%00",
    ]),
    st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1),
)


@fuzzed(30, name=_NAMES, metric=_NAMES)
def test_names_are_text_on_a_page(run_files, tmp_path_factory, name, metric):
    home = tmp_path_factory.mktemp("named")
    for file in ("config.json", "dataset.json", "environment.json", "results.json"):
        tree = copy.deepcopy(run_files[file])
        if file == "config.json":
            tree["data"].update(source="folder", dir=f"/{name}")
        if file == "dataset.json":
            tree["classes"] = [name, "b"]
        if file == "environment.json":
            tree["command"] += [f"--config={name}"]
        if file == "results.json":
            tree[metric] = 0.5
        home.mkdir(exist_ok=True)
        (home / file).write_bytes(text_of(tree))
    page = run_page.write(home, name=name).read_text()
    plain = run_page.write(home, name="plain").read_text()
    tags = _Tags(page)
    expected = {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p",
        "code", "span", "nav", "ul", "li", "a", "main", "section", "dl", "div", "dt",
        "dd", "table", "thead", "tbody", "tr", "th", "td", "wbr", "pre", "footer",
    }
    assert set(tags.found) <= expected
    assert set(tags.attributes) <= {
        "lang", "charset", "name", "content", "class", "id", "href", "aria-label",
    }
    assert len(page) and _Tags(plain).found.count("section") == (
        tags.found.count("section")
    )


def test_nothing_that_is_started_is_read_by_a_shell():
    """Programs get lists of arguments, so names of files are never commands."""
    root = Path(__file__).parents[1] / "crossmae_jax"
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("os.system", "os.popen", "exec", "eval"), path
                assert not any(key.arg == "shell" for key in node.keywords), path
                if called.startswith("subprocess."):
                    first = node.args[0]
                    assert isinstance(first, (ast.List, ast.Name)), path
