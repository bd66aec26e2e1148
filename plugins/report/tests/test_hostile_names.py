"""Names and texts of others are text in every report: no markup, no script, no YAML of theirs."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import yaml
from markdown_it import MarkdownIt
from matplotlib.axes import Axes
from rotdistill_report import _write
from rotdistill_report._card import model_card
from rotdistill_report._data import Advice, Issue, IssueKind, ReportData, StepDiagnostics, collect
from rotdistill_report._findings import with_findings
from rotdistill_report._svg import STYLE, Line, draw_lines, svg_of_axes
from rotdistill_report._templates import code_span, fenced, table_cell, yaml_string, yaml_word
from rotdistill_report._write import html, markdown

from rotdistill_core.characters import visible
from rotdistill_core.evaluation.metrics import METRICS
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.results import Curve
from rotdistill_core.testing import PicoWorkspace

STEPS = """
[[step]]
use = "residuals"
[[step]]
use = "procrustes"
[[step]]
use = "chop"
layers = 1
[[step]]
use = "fidelity"
[[step]]
use = "answers"
[variants]
base = []
full = ["chop"]
"""
ATTACKS = {
    "attribute": "x\" onload=\"document.title=1+1+' INJECTED'//",
    "single quote": "x' onmouseover='alert(1)",
    "script": "</text></svg></style></title><script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "link": "[x](javascript:alert(1)) ![x](http://e/x.png) <http://e>",
    "formula": "$\\frac{1$ $x$ \\$ ^_{",
    "comment": "--><!-- ]]> <![CDATA[ <?xml ?>",
    "template": "{{ 7*7 }} {% raw %} {# #}",
    "terminal": "\x1b]0;pwned\x07 \u202egnp \x00 \x9b2J",
    "columns": "a | b \\| c",
    "fence": "```\n\n# Heading\n\n---\n",
}


PLOT_ATTACK = "\" onload='' $x$ <script>INJECTED</script>"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    workspace = PicoWorkspace(tmp_path_factory.mktemp("hostile"))
    workspace.texts()
    model = workspace.model()
    recipe = workspace.recipe(STEPS, name="reported", teacher=model, student=model)
    return workspace.run(recipe)


@pytest.fixture(scope="module")
def report(outcome: RunResult) -> ReportData:
    recipe = load_recipe(outcome.folder.parents[1] / "reported.toml")
    out = StepOutput(ArtifactStore(outcome.folder.parent), Ledger(outcome.folder), "report")
    data = with_findings(collect(recipe, outcome, out), recipe, outcome)
    curve = Curve("run:one/full", "variant", (0.0, 0.5, 1.0), (1.0, 3.0, 2.0))
    steps = [replace(step, curves=[curve]) for step in data.steps[:1]] + data.steps[1:]
    advice = [Advice("wider", "rotdistill run r.toml")]
    issue = Issue(IssueKind.FAILED, "full", "a check does not hold.", advice)
    rows = {str(k): {"ridge": k, "of": f"layer {k}"} for k in range(5)}
    steps[0] = replace(steps[0], notes={"layers": rows})
    return replace(data, steps=steps, issues=[issue], failures={"full": ["a check"]})


def spoiled(value: Any, attack: str) -> Any:
    """Return a value with the attack at the end of every text in it, keys included.

    Names of metrics are of the program; all others come from files.
    """
    if isinstance(value, Enum) or (isinstance(value, str) and value in METRICS):
        return value
    if isinstance(value, str):
        return value + attack if value else value
    if isinstance(value, dict):
        return {spoiled(key, attack): spoiled(item, attack) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(spoiled(item, attack) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.init]
        return replace(value, **{name: spoiled(getattr(value, name), attack) for name in names})
    return value


def hostile(report: ReportData, attack: str) -> ReportData:
    """Return the report with the attack in everything but the names of files that plots read, and
    the headings of the provenance."""
    provenance = {group: spoiled(lines, attack) for group, lines in report.provenance.items()}
    own = {f"figure{attack}": 1.5, f"name{attack}": attack}
    diagnostics = {
        title + attack: StepDiagnostics(
            measured.step + attack,
            {layer: replace(each, extra=own) for layer, each in measured.layers.items()},
        )
        for title, measured in report.diagnostics.items()
    }
    return replace(spoiled(report, attack), provenance=provenance, diagnostics=diagnostics)


class Structure(HTMLParser):
    """The tags of a page with the names of their attributes, and the values of attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.values: list[tuple[str, str]] = []
        self.declarations: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *sorted(name for name, _ in attrs)))
        self.values += [(name, value or "") for name, value in attrs]

    def handle_comment(self, data: str) -> None:
        self.declarations.append(data)

    def handle_pi(self, data: str) -> None:
        self.declarations.append(data)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
def test_no_text_changes_the_tags_of_the_page(
    outcome: RunResult, report: ReportData, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_write, "plots", lambda *_: [])
    require_same_tags(report, outcome.folder, attack)


def test_no_text_changes_the_tags_of_the_plots(outcome: RunResult, report: ReportData) -> None:
    page = require_same_tags(report, outcome.folder, PLOT_ATTACK)
    assert page.count("<svg ") >= 5
    # In the titles of plots, their names and their legends; the rest of the page has it, too.
    assert page.count("INJECTED") > 50


def output_of(run: Path) -> StepOutput:
    return StepOutput(ArtifactStore(run.parent), Ledger(run), "report")


def require_same_tags(report: ReportData, folder: Path, attack: str) -> str:
    """Compare the tags of a hostile page with those of a plain one; return the hostile one."""
    # Backquotes in sentences stand for code, which is markup of ours.
    text = attack.replace("`", "'")
    out = output_of(folder)
    plain = Structure(html(hostile(report, "y" * 30), out))
    page = html(hostile(report, text), out)
    found = Structure(page)
    if "<svg " in page:  # where matplotlib puts how many ticks depends on the width of labels
        assert {*found.tags} == {*plain.tags}
    else:
        assert found.tags == plain.tags
    assert found.declarations == plain.declarations
    assert not [tag for tag in found.tags if tag[0] in ("script", "iframe", "object", "base")]
    assert not [name for name, _ in found.values if name.startswith("on")]
    links = [value for name, value in found.values if name in ("href", "xlink:href", "src")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in links)
    assert visible(page) == page
    return page


def test_the_page_forbids_scripts_and_whatever_it_would_load(
    outcome: RunResult, report: ReportData
) -> None:
    page = html(report, output_of(outcome.folder))
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert policy
    assert policy.start() < page.index("<style>")
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def tokens(text: str) -> list[str]:
    """Return the kinds of everything in a Markdown document, HTML allowed."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    return [each.type for block in parser.parse(text) for each in (block, *(block.children or ()))]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
def test_no_text_is_markup_in_markdown(report: ReportData, attack: str) -> None:
    plain = tokens(markdown(hostile(report, "y")))
    text = markdown(hostile(report, attack))
    found = tokens(text)
    for kind in ("html_block", "html_inline", "image", "link_open"):
        assert kind not in found
    for kind in ("fence", "heading_open", "table_open", "tr_open", "hr", "list_item_open"):
        assert found.count(kind) == plain.count(kind), kind
    assert visible(text) == text


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
def test_no_text_leaves_its_place_in_a_card(
    outcome: RunResult, report: ReportData, attack: str
) -> None:
    recipe = load_recipe(outcome.folder.parents[1] / "reported.toml")
    pair = outcome.pair
    assert pair is not None
    name = f"model{attack}"
    student = replace(pair.student, ref=ModelRef(model=name))
    data = replace(hostile(report, attack), figures=report.figures, failures={})
    card = model_card(data, recipe, outcome, replace(pair, student=student), "full")
    _, front_matter, body = card.split("---\n", 2)
    assert yaml.safe_load(front_matter)["base_model"][0] == name
    found = tokens(body)
    for kind in ("html_block", "html_inline", "image", "link_open"):
        assert kind not in found
    assert found.count("fence") == 2  # example, recipe
    assert visible(body) == body


@pytest.mark.parametrize(
    "word",
    ["no", "null", "1.0", "a: b", "- a", "#", "'", '"', "a\nb", "\x7f\x00", "&a", "*a", "{", "!t"],
)
def test_a_string_of_yaml_is_that_string(word: str) -> None:
    for quoted in (yaml_word(word), yaml_string(word)):
        assert yaml.safe_load(f"key: {quoted}\nother: 1") == {"key": word, "other": 1}


def test_a_licence_that_is_a_plain_word_is_not_quoted() -> None:
    assert yaml_word("cc-by-nc-4.0") == "cc-by-nc-4.0"


@pytest.mark.parametrize("text", ["`", "``a`", "a|b", "a\nb", "```", "<b>"])
def test_a_code_span_holds_its_text(text: str) -> None:
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    document = f"| a | b |\n|---|---|\n| {code_span(text)} | x |"
    cells = [block for block in parser.parse(document) if block.type == "inline"]
    assert [child.type for child in cells[2].children or ()] == ["code_inline"]
    assert (cells[2].children or [])[0].content == " ".join(text.split())
    assert cells[3].content == "x"


@pytest.mark.parametrize("text", ["a = 1", "```", "````\n~~~\n```toml", "a\n\n```\n"])
def test_a_fence_holds_its_text(text: str) -> None:
    blocks = MarkdownIt().parse(f"before\n\n{fenced(text, 'toml')}\n\nafter")
    (fence,) = [block for block in blocks if block.type == "fence"]
    assert fence.content == text.rstrip() + "\n"
    assert blocks[-2].content == "after"


def test_backquotes_open_no_code_in_a_cell() -> None:
    assert table_cell("a `b` \\` <c>") == "a \\`b\\` \\\\\\` &lt;c>"


@pytest.mark.parametrize("label", [*ATTACKS.values(), "漢字", "x" * 5000, "$", "$$", "_under"])
def test_a_label_is_shown_as_it_is(label: str) -> None:
    with matplotlib.rc_context(STYLE):
        lines = [Line(label, {0: 1.0, 1: 2.0}), Line("plain", {0: 2.0, 1: 1.0})]
        svg = svg_of_axes(label, lambda axes: draw_lines(axes, lines, x=label, y="y", log=True))
    texts = "".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
    shown = visible(label)[:50].split("\n")[0].split("  ")[0]
    escaped = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert escaped.strip() in texts
    assert re.search("10[⁻⁰¹²]", texts)


def test_powers_of_ten_are_plain_text() -> None:
    def draw(axes: Axes) -> None:
        draw_lines(axes, [Line("e", {0: 1e-9, 1: 1e-3, 2: 10.0})], x="x", y="y", log=True)

    with matplotlib.rc_context(STYLE):
        svg = svg_of_axes("powers", draw)
    assert re.search(">10⁻[⁶⁷⁸⁹]<", svg)
    assert "mathdefault" not in svg


def test_two_plots_whose_names_differ_in_signs_have_different_ids() -> None:
    ids = []
    for name in ("a.b: cosine", "a-b: cosine"):
        svg = svg_of_axes(name, lambda axes: draw_lines(axes, [Line("e", {0: 1.0})], x="x", y="y"))
        ids.append(set(re.findall(r'id="([^"]*)"', svg)))
    assert ids[0].isdisjoint(ids[1])
