"""The report as one HTML page that needs nothing else: no script, no font, no network."""

import base64
import dataclasses
import html
from collections.abc import Sequence

from mobilellm_jax.report.colors import DARK, LIGHT, Theme
from mobilellm_jax.report.figures import Picture
from mobilellm_jax.report.tables import TextTable

_NAMES = ("background", "surface", "text", "muted", "link", "line", "good", "bad")
_VERDICTS = {"same direction": "good", "opposite": "bad"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page under a heading."""

    anchor: str
    title: str
    paragraphs: tuple[str, ...] = ()
    table: TextTable | None = None
    pictures: tuple[Picture, ...] = ()
    bullets: tuple[str, ...] = ()


def page(title: str, lead: Sequence[str], sections: Sequence[Section], made: str) -> str:
    """Returns the page; every text is escaped, so that names of files cannot be markup."""
    contents = "".join(
        f'<li><a href="#{section.anchor}">{html.escape(section.title)}</a></li>'
        for section in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # An icon of nothing: without one a browser asks for /favicon.ico.
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style()}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n"
        + "".join(f"<p>{html.escape(text)}</p>\n" for text in lead)
        + f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n'
        + "".join(map(_section, sections))
        + f"<footer><p>{html.escape(made)}</p></footer>\n</main>\n</body>\n</html>\n"
    )


def style() -> str:
    """Returns the page's CSS."""
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
        "*{box-sizing:border-box}"
        "body{margin:0;background:var(--background);color:var(--text);"
        "font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}"
        "main{max-width:76rem;margin:0 auto;padding:1.5rem 1rem 3rem}"
        "h1{font-size:1.7rem;line-height:1.25;margin:.5rem 0 1rem}"
        "h2{font-size:1.25rem;margin:2.5rem 0 .5rem;padding-top:.75rem;"
        "border-top:1px solid var(--line)}"
        "p,li{max-width:44rem}a{color:var(--link)}"
        "nav ul{columns:18rem;padding-left:1.2rem}"
        ".scroll{overflow-x:auto;border:1px solid var(--line);border-radius:6px;margin:1rem 0}"
        "table{border-collapse:collapse;width:100%;font-size:.85rem;"
        "font-variant-numeric:tabular-nums}"
        "th,td{padding:.4rem .6rem;text-align:right;white-space:nowrap;"
        "border-bottom:1px solid var(--line)}"
        "thead th{background:var(--surface);vertical-align:bottom;white-space:normal;"
        "min-width:4rem}"
        # The row's name stays in sight while a phone scrolls the numbers.
        "th:first-child{text-align:left;position:sticky;left:0;background:var(--surface)}"
        "tbody th{font-weight:600;white-space:normal;min-width:7.5rem}"
        "tbody tr:last-child>*{border-bottom:0}"
        ".good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}"
        ".files,figcaption,footer{color:var(--muted);font-size:.85rem}"
        ".figures{display:grid;gap:1.5rem;"
        "grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}"
        "figure{margin:0;max-width:34rem}"
        "figure img{width:100%;height:auto;display:block;border-radius:6px}"
        "figure h3{font-size:1rem;margin:.5rem 0}"
        "footer{margin-top:3rem;border-top:1px solid var(--line);overflow-wrap:anywhere}"
        "li,p{overflow-wrap:anywhere}"
    )


def _variables(theme: Theme) -> str:
    return "".join(f"--{name}:{getattr(theme, name)};" for name in _NAMES)


def _section(section: Section) -> str:
    parts = [f'<section id="{section.anchor}">\n<h2>{html.escape(section.title)}</h2>\n']
    parts += [f"<p>{html.escape(text)}</p>\n" for text in section.paragraphs]
    if section.bullets:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in section.bullets)
        parts.append(f"<ul>{items}</ul>\n")
    if section.table is not None:
        parts.append(_table(section.table))
    if section.pictures:
        parts.append(f'<div class="figures">{"".join(map(_figure, section.pictures))}</div>\n')
    return "".join([*parts, "</section>\n"])


def _table(table: TextTable) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>{"".join(map(_cell, row[1:]))}</tr>'
        for row in table.rows
    )
    # A keyboard can scroll what can have the focus.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n"
        f'<p class="files">This table as <a href="{table.name}.csv">CSV</a> and '
        f'<a href="{table.name}.md">Markdown</a>.</p>\n'
    )


def _cell(text: str) -> str:
    kind = _VERDICTS.get(text)
    return (
        f'<td class="{kind}">{html.escape(text)}</td>' if kind else f"<td>{html.escape(text)}</td>"
    )


def _figure(picture: Picture) -> str:
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        for png in (picture.light, picture.dark)
    )
    return (
        f"<figure><h3>{html.escape(picture.title)}</h3><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(picture.title)}: {html.escape(picture.caption)}">'
        f"</picture><figcaption>{html.escape(picture.caption)} "
        f'<a href="{picture.name}.png">PNG</a></figcaption></figure>'
    )
