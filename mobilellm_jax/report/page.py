"""Renders the report as one HTML page, which loads no scripts, fonts or other files."""

import base64
import dataclasses
from typing import Any

from mobilellm_jax.report.colors import DARK, LIGHT

_VERDICTS = {"same direction": "good", "opposite": "bad"}


def page(**values: Any) -> str:
    """Returns the page as HTML; jinja2 escapes every value, so no file name can become markup.

    `values` are the names in the template below. The section `How to read it` is only on a page
    `with_grids`, which compares runs with the paper.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["data_url"] = _data_url
    themes = {"light": dataclasses.asdict(LIGHT), "dark": dataclasses.asdict(DARK)}
    return environment.from_string(_TEMPLATE).render(**values, **themes, verdicts=_VERDICTS)


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
{% if with_grids %}
<p>The paper MobileLLM (Liu et al. 2024, arXiv:2402.14905) compares small language models that
differ in one thing: depth against width, kinds of attention heads, shared embeddings, shared
layers. This page repeats those comparisons{% if smaller %} with much smaller models{% endif %} and
shows the paper's numbers next to ours.</p>
{% endif %}
{% for text in lead %}
<p>{{ text }}</p>
{% endfor %}
<nav aria-label="Contents"><ul>
{% if with_grids %}
<li><a href="#reading">How to read it</a></li>
<li><a href="#caveats">What it does not show</a></li>
{% endif %}
{% for section in sections %}
<li><a href="#{{ section.name }}">{{ section.title }}</a></li>
{% endfor %}
{% if unfinished %}<li><a href="#unfinished">Not finished</a></li>{% endif %}
</ul></nav>
{% if with_grids %}
<section id="reading">
<h2>How to read it</h2>
<ul><li>Loss is the validation loss at the end of training in nats per token; lower is better. Each
value is the mean over seeds, which set the initial weights and the order of the data. SE is the
standard error of the mean.</li>
<li>The difference is the loss of a row minus the loss of its reference row, taken seed by seed; a
negative difference is better. The roadmap compares each step with the step before it. Every other
table compares its rows with one reference row, which has no difference.</li>
<li>The paper's score is the mean accuracy in percent on eight zero-shot tasks of the paper's row
that our row stands for; higher is better. The paper's difference is taken the same way.</li>
<li>Direction: 'same direction' or 'opposite' if the 95% interval of our difference (Student's t)
does not contain zero, and 'within the spread' if it does. 'of one seed' tells no
direction.</li></ul>
</section>
<section id="caveats">
<h2>What it does not show</h2>
<ul><li>Loss on a held-out text is not accuracy on tasks. The paper trains on 0.25 to 1 trillion
tokens. Models of a few million parameters on a few million tokens may rank differently, and
agreement on this page does not prove the paper's results.</li>
<li>The paper gives one run per row and no spread. Two of its models differ only in having 14 or 16
heads and are 1.6 points apart (Tables 11 and 13, 8 blocks). Most of its differences below one point
may therefore be noise.</li>
<li>The 125M baseline of Table 10 equals OPT-125M of Table 3 in all eight tasks. Its step to SwiGLU
may therefore compare models that were trained on different data.</li>
<li>With few seeds an interval is wide: with three seeds it is 4.3 standard errors to each side. One
comparison in twenty excludes zero by chance.</li>
<li>One learning rate for all shapes may favour some shapes. If rates were tuned, on the same
validation text, the table shows the rate of each row.</li></ul>
</section>
{% endif %}
{% for section in sections %}
<section id="{{ section.name }}">
<h2>{{ section.title }}</h2>
{% for text in section.texts %}
<p>{{ text }}</p>
{% endfor %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ section.title }}"><table>
<thead><tr>
{%- for name in section.rows[0] %}<th scope="col">{{ name }}</th>{% endfor -%}
</tr></thead>
<tbody>
{% for row in section.rows %}
{% set cells = row.values() | list %}
<tr><th scope="row">{{ cells[0] }}</th>
{%- for cell in cells[1:] %}
<td{% if cell in verdicts %} class="{{ verdicts[cell] }}"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="files">This table as <a href="{{ section.name }}.csv">CSV</a> and
<a href="{{ section.name }}.md">Markdown</a>.</p>
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
{% if unfinished %}
<section id="unfinished">
<h2>Not finished</h2>
<ul>{% for text in unfinished %}<li>{{ text }}</li>{% endfor %}</ul>
</section>
{% endif %}
<footer><p>{{ made }}</p></footer>
</main>
</body>
</html>
"""
