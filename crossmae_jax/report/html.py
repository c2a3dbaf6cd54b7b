"""A page of HTML in one file: style and pictures inside, no script, no request.

What these functions take is text, which they escape; what they return is HTML. They
follow the reader's choice of light or dark, fit a phone, and print.
"""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from crossmae_jax.tables import Table

_STYLE = """
:root { color-scheme: light dark;
  --paper: #f6f7f9; --card: #fff; --ink: #1d2430; --soft: #566072; --rule: #d9dde4;
  --link: #1a55a3; --good: #14713d; --open: #8a5a00;
  --line-1: #1f5fa8; --line-2: #c2571a; --line-3: #2c8a57; --line-4: #8350a8; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #12151b; --card: #1b2029; --ink: #e8ebf0; --soft: #a3adbd; --rule: #384151;
  --link: #8dbcf5; --good: #63cd92; --open: #eab54d;
  --line-1: #74aef5; --line-2: #f0995f; --line-3: #6fcf97; --line-4: #c79bea; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
body > * { max-width: 76rem; margin-inline: auto; padding-inline: 1.25rem; }
header { padding-top: 2.25rem; }
h1 { margin: 0; font-size: clamp(1.6rem, 4vw, 2.4rem); line-height: 1.2; }
h2 { margin: 0 0 .8rem; font-size: 1.3rem; }
h3 { margin: 0 0 .3rem; font-size: 1rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--link); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  font-size: .9em; overflow-wrap: anywhere; }
pre { margin: .6rem 0; padding: .8rem 1rem; border: 1px solid var(--rule);
  border-radius: .5rem; background: var(--card); overflow-x: auto;
  overflow-wrap: normal; }
.soft, figcaption, dt { color: var(--soft); }
.soft { font-size: .95rem; }
.state { display: inline-block; padding: .1rem .75rem; border: 1px solid;
  border-radius: 1rem; font-weight: 600; }
.good { color: var(--good); } .open { color: var(--open); }
nav ul { display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; margin: 1.2rem 0;
  padding: .7rem 0; list-style: none; border-block: 1px solid var(--rule); }
section { padding-block: 1.1rem; scroll-margin-top: .5rem; }
.tiles { display: grid; gap: .9rem; margin: 0 0 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(10rem, 100%), 1fr)); }
.tiles > div, figure { background: var(--card); border: 1px solid var(--rule);
  border-radius: .6rem; padding: .8rem 1rem; }
.tiles dd { margin: 0; }
.tiles .value { font-size: 1.6rem; font-weight: 650; line-height: 1.25; }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); }
figure { margin: 0; break-inside: avoid; min-width: 0; }
figcaption { font-size: .92rem; }
figure svg { display: block; width: 100%; max-width: 44rem; height: auto; }
figure svg * { stroke-linejoin: round; }
figure img { display: block; max-width: min(50rem, 100%); height: auto;
  margin: 0 auto .6rem; border-radius: .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1.6rem .35rem 0; border-bottom: 1px solid var(--rule);
  text-align: left; vertical-align: top; }
:is(th, td):last-child { padding-right: 0; }
:is(th, td):first-child { min-width: 8rem; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
.best { font-weight: 650; }
.pairs { columns: 21rem; column-gap: 2.5rem; margin: 0; font-size: .95rem; }
.pairs > div { display: flex; justify-content: space-between; gap: 1rem;
  padding: .28rem 0; border-bottom: 1px solid var(--rule); break-inside: avoid; }
.pairs dt { flex: 0 1 auto; min-width: 0; overflow-wrap: break-word; }
.pairs dd { flex: 1 1 4rem; margin: 0; text-align: right; overflow-wrap: anywhere;
  min-width: 0; }
footer { padding-block: 1.5rem 2.5rem; color: var(--soft); font-size: .9rem; }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444;
    --rule: #ccc; --link: #000; --good: #14713d; --open: #8a5a00; --line-1: #1f5fa8;
    --line-2: #c2571a; --line-3: #2c8a57; --line-4: #8350a8; color-scheme: light; }
  body { font-size: 10pt; } pre { white-space: pre-wrap; }
  nav { display: none; } h2, h3 { break-after: avoid; }
  section { padding-block: .6rem; } tr { break-inside: avoid; }
  .pairs { columns: 2 15rem; font-size: 9pt; }
  .charts { grid-template-columns: 1fr 1fr; } figure img { max-height: 20cm; } }
"""


class Section(NamedTuple):
    """A part of the page: the name of its anchor, its title, and its HTML."""

    name: str
    title: str
    content: str


def text(value: object) -> str:
    """Returns text as HTML, also inside quotes."""
    return html.escape(str(value), quote=True)


def element(tag: str, value: object, *, css: str = "") -> str:
    """Returns text in an element."""
    style = f' class="{css}"' if css else ""
    return f"<{tag}{style}>{text(value)}</{tag}>"


def _breakable(value: object) -> str:
    """Returns text that may go on in the next line inside of a long name."""
    return re.sub(r"([/_.])(?=\w)", r"\1<wbr>", text(value))


def pairs(values: Iterable[tuple[str, object]]) -> str:
    """Lays out names and values, in columns where there is room for them."""
    rows = (
        f"<div><dt>{_breakable(name)}</dt><dd>{element('code', value)}</dd></div>"
        for name, value in values
    )
    return f'<dl class="pairs">{"".join(rows)}</dl>'


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """Lays out a few numbers in large type: what, how much, and a remark or ""."""
    rows = (
        f"<div>{element('dt', name)}{element('dd', value, css='value')}"
        f"{element('dd', remark, css='soft') if remark else ''}</div>"
        for name, value, remark in values
    )
    return f'<dl class="tiles">{"".join(rows)}</dl>'


def table(content: Table) -> str:
    """Lays out a table, its numbers to the right."""
    def cells(tag: str, row: Sequence[str]) -> str:
        first, *others = row
        return f"<tr><{tag}>{_breakable(first)}</{tag}>" + "".join(
            element(tag, cell, css="number") for cell in others
        ) + "</tr>"

    body = "".join(cells("td", row) for row in content.rows)
    return (
        f'<div class="scroll"><table><thead>{cells("th", content.header)}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def chart(title: str, svg: str, *, caption: str) -> str:
    """Puts a picture of `visualize.svg.curves` on a card."""
    below = element("figcaption", caption) if caption else ""
    return f"<figure>{element('h3', title)}{svg}{below}</figure>"


def picture(data: bytes, *, kind: str, alt: str, caption: str) -> str:
    """Puts the bytes of a picture on a card.

    Args:
      kind: "png" or "jpeg".
    """
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure><img src="{source}" alt="{text(alt)}">'
        f"{element('figcaption', caption)}</figure>"
    )


def page(title: str, *, header: str, sections: Sequence[Section], footer: str) -> str:
    """Returns the whole page, with a table of its sections; in ASCII for any locale.

    Args:
      header, footer: HTML; the header holds the `h1`.
    """
    contents = "".join(
        f'<li><a href="#{part.name}">{text(part.title)}</a></li>' for part in sections
    )
    body = "\n".join(
        f'<section id="{part.name}">\n{element("h2", part.title)}\n{part.content}\n'
        "</section>" for part in sections
    )
    whole = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>{header}</header>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
{body}
</main>
<footer>{footer}</footer>
</body>
</html>
"""
    return whole.encode("ascii", "xmlcharrefreplace").decode("ascii")
