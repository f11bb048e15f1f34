"""The files of the page, and the page in a browser."""

import csv
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

from mobilellm_jax.cli.main import main
from mobilellm_jax.report.colors import DARK, LIGHT, Theme

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def page(all_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page") / "report"
    assert main(["report", f"--runs={all_tiny}", f"--output={output}"]) == 0
    return output / "index.html"


class Parsed(html.parser.HTMLParser):
    """Anchors, links and sources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids += [values["id"]] if "id" in values else []
        if tag == "a":
            self.links.append(values["href"])
        self.sources += [values[n] for n in ("src", "srcset") if n in values]
        self.sources += [values["href"]] if tag == "link" else []

    def handle_data(self, data: str) -> None:
        self.text += data


def test_links_work_and_nothing_is_loaded_from_the_network(page: Path) -> None:
    parsed = Parsed(page.read_text())
    assert len(parsed.links) > 20 and len(parsed.ids) == len(set(parsed.ids))
    for link in parsed.links:
        found = link[1:] in parsed.ids if link.startswith("#") else (page.parent / link).is_file()
        assert found, link
    assert all(source.startswith("data:") for source in parsed.sources)
    assert "://" not in re.sub(r"data:[^\"]*", "", page.read_text())


def test_the_page_explains_itself(page: Path) -> None:
    text = Parsed(page.read_text()).text
    for words in (
        "MobileLLM's ablations, trained again",
        "How to read it",
        "What it does not show",
        "Depth against width (Table 11, tiny)",
        "Differences compared with the paper's: ",
        "20 models of 1.24 to 1.42 million parameters, 4.10 million tokens each, 3 seeds",
        "late-s0, step 1500 of 2000, under way or stopped",
        "broken-s0, step 1500 of 2000, failed: <b>OSError</b>: & full",  # shown as text
    ):
        assert words in text, words


@pytest.mark.parametrize("package", ["jinja2", "matplotlib", "scipy"])
def test_a_missing_package_is_named_with_its_extra(
    package: str,
    all_tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["report", f"--runs={all_tiny}", f"--output={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err
    assert package in message and "pip install 'mobilellm-jax[report]'" in message
    assert not (tmp_path / "out").exists()


def test_tables_are_also_files(page: Path) -> None:
    with (page.parent / "1-depth_width.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows][:2] == ["2 blocks, width 176", "4 blocks, width 128"]
    assert rows[0]["paper's score"] == "43.3" and rows[0]["seeds"] == "3"
    assert rows[2]["difference"] == "" and float(rows[0]["difference"]) > 0
    assert rows[0]["paper's difference"] == "-0.6" and rows[0]["direction"] == "same direction"
    markdown = (page.parent / "1-depth_width.md").read_text().splitlines()
    assert markdown[1] == "|" + "---|" * len(rows[0])
    assert len(markdown) == 2 + len(rows)


def test_pictures_are_also_files(page: Path) -> None:
    names = sorted(file.name for file in page.parent.glob("*.png"))
    assert names == [
        *("1-depth_width-curves.png", "1-depth_width-depth.png", "2-roadmap-curves.png"),
        *("3-embedding-curves.png", "4-heads-curves.png", "5-sharing-curves.png"),
        *("6-repeats-curves.png", "memory.png", "speed.png"),
    ]
    for name in names:
        picture = matplotlib.image.imread(page.parent / name)[..., :3]
        assert picture.shape[1] == 960
        assert picture.std() > 0.05, "something is drawn"


def contrast(one: str, other: str) -> float:
    """Returns the contrast ratio of two colours "#rrggbb" (WCAG 2.1, 1 to 21)."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_contrast_is_enough(theme: Theme) -> None:
    """WCAG 2.1 AA asks for a contrast of 4.5 for text and of 3 for graphics."""
    # Black on white has 21, and WCAG names this grey as a colour that just passes.
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)
    for name in ("text", "muted", "link", "good", "bad"):
        for behind in (theme.background, theme.surface):
            assert contrast(getattr(theme, name), behind) >= 4.5, name
    for color in theme.series:
        assert contrast(color, theme.background) >= 3, color
    assert len(set(theme.series)) == len(theme.series)


def test_the_style_has_no_other_colors(page: Path) -> None:
    known = {getattr(theme, n) for theme in (LIGHT, DARK) for n in theme.__dataclass_fields__
             if n != "series"}  # fmt: skip
    [style] = re.findall(r"<style>(.*?)</style>", page.read_text(), re.DOTALL)
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", style)) == known


_LOOK = """
<script>
addEventListener("load", () => {
  const shown = getComputedStyle(document.body).backgroundColor;
  const pictures = [...document.images].every(i => i.complete && i.naturalWidth > 0);
  const wide = document.documentElement.scrollWidth;
  const small = Math.min(...[...document.querySelectorAll("p,li,td,th,h1,h2,a")]
    .map(e => parseFloat(getComputedStyle(e).fontSize)));
  const view = innerWidth, tables = document.querySelectorAll("td").length;
  document.title = JSON.stringify({shown, pictures, wide, small, view, tables});
  console.log("LOOKED");
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH")
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [500, 1280])  # a headless window has at least 500 pixels
def test_in_a_browser(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """The page fits the screen, shows every picture in the right colours and logs no error."""
    assert CHROMIUM is not None
    looked = page.with_name("looked.html")
    looked.write_text(page.read_text().replace("</body>", f"{_LOOK}</body>"))
    # This page fails on purpose, to prove that the browser reports errors.
    failing = page.with_name("failing.html")
    failing.write_text("<script>throw new Error('seen')</script>")
    mode = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]

    def load(file: Path) -> "subprocess.CompletedProcess[str]":
        flags = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", "--v=0", "--hide-scrollbars", "--dump-dom"),
            *(f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},900", *mode),
        ]
        command = [str(CHROMIUM), *flags, file.as_uri()]
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    assert "Uncaught Error: seen" in load(failing).stderr
    result = load(looked)
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1 and "LOOKED" in console[0], console
    found = re.search(r"<title>(.*?)</title>", result.stdout)
    assert found is not None, result.stderr
    seen = json.loads(html.unescape(found[1]))
    theme = DARK if dark else LIGHT
    rgb = ", ".join(str(int(theme.background[i : i + 2], 16)) for i in (1, 3, 5))
    assert seen["shown"] == f"rgb({rgb})"
    assert seen["view"] == width and seen["wide"] <= width
    assert seen["pictures"] and seen["small"] >= 13
    assert seen["tables"] > 300
