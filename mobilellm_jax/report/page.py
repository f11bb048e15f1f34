"""Renders the report as one HTML page, which loads no scripts, fonts or other files."""

import base64
import dataclasses
from collections.abc import Sequence

from mobilellm_jax.report.colors import DARK, LIGHT
from mobilellm_jax.report.figures import Picture
from mobilellm_jax.report.tables import TextTable

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
    """Returns the page as HTML; jinja2 escapes every text, so no file name can become markup."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["data_url"] = _data_url
    return environment.from_string(_TEMPLATE).render(
        title=title,
        lead=lead,
        sections=sections,
        made=made,
        light=dataclasses.asdict(LIGHT),
        dark=dataclasses.asdict(DARK),
        verdicts=_VERDICTS,
    )


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


# The empty icon keeps a browser from requesting /favicon.ico. The first column of a table stays
# visible when the user scrolls to the right. With `tabindex`, the user can scroll by keyboard.
_TEMPLATE = """\
{% macro variables(theme) %}
{% for name in theme if name != "series" %}--{{ name }}:{{ theme[name] }};{% endfor %}
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root{color-scheme:light dark;{{ variables(light) }}}
@media(prefers-color-scheme:dark){:root{ {{- variables(dark) -}} }}
*{box-sizing:border-box}
body{margin:0;background:var(--background);color:var(--text);
font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:76rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.7rem;line-height:1.25;margin:.5rem 0 1rem}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
p,li{max-width:44rem;overflow-wrap:anywhere}
a{color:var(--link)}
nav ul{columns:18rem;padding-left:1.2rem}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:6px;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
thead th{background:var(--surface);vertical-align:bottom;white-space:normal;min-width:4rem}
th:first-child{text-align:left;position:sticky;left:0;background:var(--surface)}
tbody th{font-weight:600;white-space:normal;min-width:7.5rem}
tbody tr:last-child>*{border-bottom:0}
.good{color:var(--good);font-weight:600}
.bad{color:var(--bad);font-weight:600}
.files,figcaption,footer{color:var(--muted);font-size:.85rem}
.figures{display:grid;gap:1.5rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
figure{margin:0;max-width:34rem}
figure img{width:100%;height:auto;display:block;border-radius:6px}
figure h3{font-size:1rem;margin:.5rem 0}
footer{margin-top:3rem;border-top:1px solid var(--line);overflow-wrap:anywhere}
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% for text in lead %}
<p>{{ text }}</p>
{% endfor %}
<nav aria-label="Contents"><ul>
{% for section in sections %}
<li><a href="#{{ section.anchor }}">{{ section.title }}</a></li>
{% endfor %}
</ul></nav>
{% for section in sections %}
<section id="{{ section.anchor }}">
<h2>{{ section.title }}</h2>
{% for text in section.paragraphs %}
<p>{{ text }}</p>
{% endfor %}
{% if section.bullets %}
<ul>{% for text in section.bullets %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}
{% if section.table %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ section.table.title }}"><table>
<thead><tr>
{%- for name in section.table.columns %}<th scope="col">{{ name }}</th>{% endfor -%}
</tr></thead>
<tbody>
{% for row in section.table.rows %}
<tr><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}
<td{% if cell in verdicts %} class="{{ verdicts[cell] }}"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="files">This table as <a href="{{ section.table.name }}.csv">CSV</a> and
<a href="{{ section.table.name }}.md">Markdown</a>.</p>
{% endif %}
{% if section.pictures %}
<div class="figures">
{% for picture in section.pictures %}
<figure><h3>{{ picture.title }}</h3><picture>
<source media="(prefers-color-scheme: dark)" srcset="{{ picture.dark | data_url }}">
<img src="{{ picture.light | data_url }}" alt="{{ picture.title }}: {{ picture.caption }}">
</picture><figcaption>{{ picture.caption }} <a href="{{ picture.name }}.png">PNG</a></figcaption>
</figure>
{% endfor %}
</div>
{% endif %}
</section>
{% endfor %}
<footer><p>{{ made }}</p></footer>
</main>
</body>
</html>
"""
