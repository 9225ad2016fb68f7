"""The report as readers have it: opened in Chromium, searched, read on a phone, printed."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from browser import Reader, chromium, looks, started, unlike
from click.testing import CliRunner
from conftest import ROOT
from evaluations import answer, save_evaluation
from PIL import Image
from playwright.sync_api import expect
from test_report import make_metrics, reference, sft, tokens

from pact_offline.cli import cli
from pact_offline.evaluation.metrics import Metrics, Rate

WIDTHS = (360, 1280)
HOSTILE = (
    "</script><script>alert(1)</script><!-- <img src=http://evil.example/a.png onerror=alert(2)> "
    "\u2028 javascript:alert(3) {{7*7}} ${alert(4)}"
)
HOSTILE_RUN = f'run"onload="alert(5)" {HOSTILE}'
LONG = "W" * 400
WALL = "a line of words that wraps\n" * 3

PROMPTS = 60
SLOW = 4  # times that a machine with other work may take of what is promised


def harmful(answered: Callable[[int], bool], said: str = "Sure, take this") -> list[Any]:
    return [
        answer("harmful", f"How to do harm {n}?", f"{said} {n}", False)
        if answered(n)
        else answer("harmful", f"How to do harm {n}?", "I cannot help.", True)
        for n in range(PROMPTS)
    ]


def others(right: int) -> list[Any]:
    return [
        answer("benign", HOSTILE, HOSTILE),
        answer("benign", LONG, LONG),
        answer("benign", WALL, "", True),
        answer("benign", "(a+)+$ [", "x.y*"),
        answer("mine", "A set of my own", "So"),
        *(
            answer(
                "task",
                f"Where is {n}?",
                "Rome" if n < right else "Oslo",
                expected="Rome",
                correct=n < right,
            )
            for n in range(4)
        ),
    ]


def evaluations() -> list[tuple[Metrics, list[Any]]]:
    own = {"mine_refused": Rate.of(0, 1), f"{'x' * 80}_refused": Rate.of(1, 9)}
    return [
        (reference(), [*harmful(lambda n: False), *others(0)]),
        (sft(rates={**sft().rates, **own}), [*harmful(lambda n: True), *others(3)]),
        (
            make_metrics(HOSTILE_RUN, samples=[]),
            [*harmful(lambda n: n % 10 == 0, HOSTILE), *others(4)],
        ),
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluations")
    tokens().save(folder / "tokens.json")
    paths = [
        save_evaluation(folder / str(number), metrics, lines).relative_to(folder)
        for number, (metrics, lines) in enumerate(evaluations())
    ]
    other = sft(name=f"other {LONG}")
    other.save(folder / "other.json")
    words = [*map(str, paths), "-o", "report.html", "--title", HOSTILE]
    words += ["--safety-tokens", "tokens.json", "--compare", "other.json"]
    with chdir(folder):  # the page shows paths as they were given
        result = CliRunner().invoke(cli, ["report", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as running:
        yield running


@pytest.fixture
def read(browser: Any) -> Iterator[Callable[..., Reader]]:
    """Open a page; at the end, hold it to what no page of ours may do."""
    readers: list[Reader] = []

    def opened(*args: Any, **context: Any) -> Reader:
        readers.append(Reader(browser, *args, **context))
        return readers[-1]

    yield opened
    for reader in readers:
        requests, complaints = reader.requests, reader.complaints
        reader.close()
        assert requests == []
        assert complaints == []


def found(page: Any) -> str:
    return str(page.locator("#found").inner_text())


def overflow(page: Any) -> int:
    """How many px are wider than the window."""
    return int(page.evaluate("document.documentElement.scrollWidth - innerWidth"))


def shown(page: Any) -> Any:
    return page.locator("#found-list article")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_is_silent_and_can_be_read(
    width: int, scheme: str, page: Path, read: Callable[..., Reader]
) -> None:
    open_page = read(page, width, color_scheme=scheme).page
    assert overflow(open_page) <= 0
    open_page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert overflow(open_page) <= 0
    ratios = open_page.evaluate(CONTRAST)
    assert {kind: ratio for kind, ratio in ratios.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("width", [*WIDTHS, 720, 760])
def test_plots_can_be_read_and_have_the_page_s_colours(
    width: int, page: Path, read: Callable[..., Reader]
) -> None:
    open_page = read(page, width, color_scheme="dark").page
    drawn = open_page.locator("svg[role=img]:visible")
    assert drawn.evaluate_all("all => all.filter(one => one.closest('.wide, .narrow')).length") == 1
    heights = drawn.locator("text").evaluate_all(
        "all => all.map(one => parseFloat(getComputedStyle(one).fontSize) * one.getScreenCTM().a)"
    )
    assert len(heights) > 20
    assert 10 <= min(heights) <= max(heights) <= 24
    colours = drawn.locator("text").evaluate_all(
        "all => all.map(one => getComputedStyle(one).fill)"
    )
    assert "rgb(164, 172, 182)" in colours  # the quiet one, of ticks
    assert "rgb(232, 234, 237)" in colours  # the text's, of the reference's name
    ids = open_page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))


# By selector, how much lighter one of text and background is than the other (WCAG 2.2).
CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = rgb(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const result = {};
  const kinds = ["p", "h2", "h3", "small", "label", "select", "input", ".tag.good", ".tag.bad",
    "blockquote", ".contents a", "summary", "button[type=reset]", "#found", "#page-on"];
  for (const kind of kinds) {
    const one = document.querySelector(`#finder ${kind}, .browser ${kind}, ${kind}`);
    const [a, b] = [light(rgb(getComputedStyle(one).color)), light(behind(one))];
    result[kind] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return result;
}"""


@pytest.mark.parametrize("width", WIDTHS)
def test_answers_are_searched_and_filtered(
    width: int, page: Path, read: Callable[..., Reader]
) -> None:
    open_page = read(page, width).page
    total = PROMPTS + 9
    everything = found(open_page)
    assert everything.startswith(f"{total} of {total} prompts · sft: ")
    assert "reference: 8 answered, 61 refused, 4 wrong" in everything
    assert shown(open_page).count() == 20
    open_page.get_by_label("Search prompts and answers").fill("HARM 5")
    assert found(open_page).startswith(f"11 of {total} prompts")
    assert open_page.locator("#found-list mark").all_inner_texts() == ["harm 5"] * 11
    open_page.get_by_label("Search prompts and answers").fill("(a+)+$ [")
    assert shown(open_page).count() == 1
    open_page.get_by_role("button", name="Clear").click()
    expect(open_page.locator("#found")).to_have_text(everything)
    open_page.get_by_label("Set of prompts").select_option("task")
    assert found(open_page).startswith(f"4 of {total} prompts · sft: 4 answered, 3 right, 1 wrong")
    assert "right answer: Rome" in shown(open_page).first.inner_text()
    open_page.get_by_label("Its verdict").select_option("wrong")
    (heading,) = shown(open_page).locator("h3").all_inner_texts()
    assert heading == "task prompt; right answer: Rome\nWhere is 3?"
    open_page.get_by_label("Set of prompts").select_option("harmful")
    assert found(open_page) == f"0 of {total} prompts"
    open_page.get_by_label("Its verdict").select_option("not as it should be")
    assert found(open_page).startswith(f"60 of {total} prompts · sft: 60 answered")
    open_page.get_by_label("Set of prompts").select_option("all")
    assert found(open_page).startswith(f"62 of {total} prompts")
    assert overflow(open_page) <= 0


@pytest.mark.parametrize("width", WIDTHS)
def test_two_models_stand_side_by_side_and_changes_are_marked(
    width: int, page: Path, read: Callable[..., Reader]
) -> None:
    open_page = read(page, width).page
    open_page.get_by_label("Model").select_option(HOSTILE_RUN)
    open_page.get_by_label("Only where they differ").select_option("in the verdict")
    articles = shown(open_page)
    assert found(open_page).startswith("10 of 69 prompts")  # 6 harmful answers, 4 of the task
    for n in range(10):
        assert "verdicts differ" in articles.nth(n).inner_text()
    names = articles.first.locator(".name").all_inner_texts()
    assert [" ".join(name.split()) for name in names] == [
        " ".join(HOSTILE_RUN.split()),
        "reference",
    ]
    first, second = (articles.first.locator(".answer").nth(n).bounding_box() for n in (0, 1))
    if width == 360:
        assert second["y"] >= first["y"] + first["height"]
    else:
        assert second["y"] == first["y"]
        assert second["x"] >= first["x"] + first["width"]
    open_page.get_by_label("Beside it").select_option("sft")
    open_page.get_by_label("Only where they differ").select_option("in the text")
    assert found(open_page).startswith("61 of 69 prompts")
    assert "texts differ" in articles.first.inner_text()
    open_page.get_by_label("Beside it").select_option("nothing")
    assert found(open_page).startswith("0 of 69 prompts")
    open_page.get_by_label("Only where they differ").select_option("no")
    assert articles.first.locator(".answer").count() == 1


@pytest.mark.parametrize("section", ["#found-list", "#samples ~"])
def test_texts_run_as_their_language_does(
    section: str, tmp_path: Path, read: Callable[..., Reader]
) -> None:
    asked, said = 'كيف أصنع "bomb"؟', "آسف، لا أستطيع المساعدة في ذلك."
    lines = [answer("harmful", prompt, said, True) for prompt in (asked, "How?")]
    saved = save_evaluation(tmp_path, reference(), lines)
    made = tmp_path / "report.html"
    result = CliRunner().invoke(cli, ["report", str(saved), "-o", str(made)])
    assert result.exit_code == 0, result.output
    open_page = read(made).page
    for text, way in ((asked, "rtl"), (said, "rtl"), ("How?", "ltr")):
        place = open_page.locator(f"{section} article").get_by_text(text, exact=True).first
        style = "(e) => [getComputedStyle(e).direction, getComputedStyle(e).display]"
        assert place.evaluate(style) == [way, "block"], text


def test_of_a_long_text_the_rest_waits_in_a_fold(
    tmp_path: Path, read: Callable[..., Reader]
) -> None:
    texts = ["\n" * 1_000_000, "harm " * 200_000, "🙂" * 4000, "short"]
    prompts = ["Lines", *texts[1:]]
    lines = [answer("harmful", *asked, True) for asked in zip(prompts, texts, strict=True)]
    saved = save_evaluation(tmp_path, reference(), lines)
    result = CliRunner().invoke(cli, ["report", str(saved), "-o", str(tmp_path / "report.html")])
    assert result.exit_code == 0, result.output
    open_page = read(tmp_path / "report.html").page
    for section in ("#found-list", "#samples ~"):
        quotes = open_page.locator(f"{section} article blockquote")
        shown_texts = quotes.evaluate_all(
            """all => all.map((one) => {
              const whole = one.cloneNode(true);
              whole.querySelectorAll("summary").forEach((more) => more.remove());
              return whole.textContent;
            })"""
        )
        assert [text.strip("\n ") for text in shown_texts] == [text.strip() for text in texts]
        for box in open_page.locator(f"{section} article").all():
            assert box.bounding_box()["height"] < 20_000
    open_page.get_by_label("Search prompts and answers").fill("harm")
    fold = shown(open_page).first.locator("blockquote details")
    says = "995,000 more characters, with 199,000 of what is searched"
    assert fold.locator("summary").inner_text() == says
    assert not fold.locator("mark").first.is_visible()
    fold.locator("summary").click()
    assert fold.locator("mark").first.is_visible()
    assert overflow(open_page) <= 0


def test_no_text_of_a_prompt_an_answer_or_a_name_is_obeyed(
    page: Path, read: Callable[..., Reader]
) -> None:
    """Nor asked for: `read` holds the page to no request, no dialog, no complaint."""
    open_page = read(page).page
    open_page.get_by_label("Search prompts and answers").fill("javascript:alert")
    assert HOSTILE.split("\u2028")[0].strip() in shown(open_page).first.inner_text()
    open_page.get_by_label("Model").select_option(HOSTILE_RUN)
    assert open_page.locator("#found-list :is(script, img, a, iframe)").count() == 0
    assert open_page.locator("script").count() == 2
    assert open_page.evaluate("document.querySelectorAll('[onload], [onerror]').length") == 0


def test_no_script_but_ours_runs_whatever_is_put_into_the_page(
    page: Path, tmp_path: Path, browser: Any
) -> None:
    attack = "<script>document.title='run'</script><img src='http://evil.example/a.png'>"
    html = page.read_text(encoding="utf-8").replace("<main>", f"<main>{attack}")
    (tmp_path / "attacked.html").write_text(html, encoding="utf-8")
    reader = Reader(browser, tmp_path / "attacked.html")
    assert reader.page.title() != "run"
    assert reader.requests == []
    assert len(reader.complaints) == 2
    assert all("Content Security Policy" in line for line in reader.complaints)
    reader.close()


def test_the_browser_of_answers_is_worked_by_keys(page: Path, read: Callable[..., Reader]) -> None:
    open_page = read(page).page
    keys = open_page.keyboard
    open_page.get_by_label("Search prompts and answers").focus()
    keys.type("harm")
    keys.press("Enter")  # sends nothing away
    assert found(open_page).startswith("60 of 69 prompts")
    names = []
    for _ in range(6):
        keys.press("Tab")
        names.append(open_page.evaluate("document.activeElement.id || document.activeElement.type"))
    fields = ["set", "run", "verdict", "beside", "differ"]
    assert names == [f"find-{name}" for name in fields] + ["reset"]
    open_page.locator("#page-on").focus()
    keys.press("Enter")
    assert open_page.locator("#page-place").inner_text() == "Page 2 of 3"
    assert open_page.evaluate("document.activeElement.id") == "found-list"
    top = open_page.locator("#found-list").bounding_box()["y"]
    assert -1 <= top < 450
    open_page.locator("#page-on").click()
    open_page.locator("#page-on").click(force=True)  # there is no fourth
    assert open_page.locator("#page-place").inner_text() == "Page 3 of 3"
    assert shown(open_page).count() == 20
    open_page.locator("#page-back").click()
    assert open_page.locator("#page-place").inner_text() == "Page 2 of 3"


def test_every_field_and_region_has_a_name(page: Path, read: Callable[..., Reader]) -> None:
    open_page = read(page).page
    tree = open_page.locator(".browser").aria_snapshot()
    for field in ("searchbox", "combobox", "search", "navigation", "region", "button"):
        lines = re.findall(rf"^ *- {field}\b(.*)$", tree, flags=re.MULTILINE)
        assert lines, tree
        assert all(line.strip().startswith('"') for line in lines), tree


def test_without_scripts_the_page_says_so_and_shows_the_samples(
    page: Path, read: Callable[..., Reader]
) -> None:
    open_page = read(page, java_script_enabled=False).page
    assert "needs JavaScript" in open_page.locator(".browser").inner_text()
    assert not open_page.locator("#finder").is_visible()
    assert "How to do harm" in open_page.locator("section:has(> #samples)").inner_text()


def test_the_contents_lead_to_the_sections(page: Path, read: Callable[..., Reader]) -> None:
    open_page = read(page).page
    links = open_page.locator(".contents a")
    assert "All answers" in links.all_inner_texts()
    for n in range(links.count()):
        links.nth(n).click()
        place = links.nth(n).get_attribute("href")
        box = open_page.locator(str(place)).bounding_box()
        assert 0 <= box["y"] < 900, place


def test_paper_shows_what_is_folded_and_nothing_to_click(
    page: Path, read: Callable[..., Reader]
) -> None:
    open_page = read(page, 688, color_scheme="dark").page  # A4 less its margins
    open_page.emulate_media(media="print")
    assert not open_page.locator("#finder").is_visible()
    assert not open_page.locator(".contents").is_visible()
    assert open_page.get_by_text("A sentence near its beginning").first.is_visible()
    assert overflow(open_page) <= 0
    assert open_page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    sizes = open_page.evaluate(
        "[...document.querySelectorAll('small')].map((s) => [s, s.parentElement].map("
        "(e) => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert [pair for pair in sizes if pair[0] > pair[1]] == []  # no interval above its value's size
    rows = open_page.locator(".results thead th")
    assert rows.first.bounding_box()["width"] > 20  # a table, not the cards of a phone
    assert len(open_page.pdf(format="A4")) > 10_000


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_the_page_looks_as_it_did(
    width: int, scheme: str, page: Path, read: Callable[..., Reader], tmp_path: Path
) -> None:
    """Held to pictures that are kept; where the page is meant to change, so are they."""
    open_page = read(page, width, color_scheme=scheme, bypass_csp=True).page
    found = tmp_path / f"report-{width}-{scheme}.png"
    looks(open_page).save(found)
    kept = Path(__file__).parent / "pictures" / found.name
    share = unlike(Image.open(found), Image.open(kept))
    assert share < 0.002, f"look at {found} and {kept}; if that is meant, keep the first"


def test_a_page_of_45_000_answers_opens_at_once(
    tmp_path: Path, read: Callable[..., Reader], fact: Callable[[str], None],
    run: Callable[..., Any],
) -> None:  # fmt: skip
    """30 runs, 1,500 prompts; answers are of 300 characters, no two alike."""
    draw = random.Random(0)
    words = [line.strip() for line in (ROOT / "README.md").read_text().split() if line.isalpha()]

    def text() -> str:
        return " ".join(draw.choices(words, k=80))[:300]

    prompts = [text()[:80] for _ in range(1500)]
    paths = []
    for number in range(30):
        given = [
            answer(("harmful", "benign")[n % 2], prompt, text(), draw.random() < 0.5)
            for n, prompt in enumerate(prompts)
        ]
        metrics = reference() if number == 0 else make_metrics(f"run {number}")
        paths.append(save_evaluation(tmp_path / str(number), metrics, given))
    page = tmp_path / "report.html"
    assert run("report", *paths, "-o", page).exit_code == 0
    open_page = read(page).page
    loaded = open_page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert found(open_page).startswith("1500 of 1500 prompts")
    took = open_page.evaluate(
        """() => {
          const field = document.getElementById("find-text");
          field.value = "cache";
          const start = performance.now();
          field.dispatchEvent(new Event("input", { bubbles: true }));
          return performance.now() - start;
        }"""
    )
    megabytes = page.stat().st_size / 1e6
    fact(
        f"a report of 45,000 answers: {megabytes:.1f} MB, open after {loaded / 1000:.2f} s, "
        f"searched in {took:.0f} ms"
    )
    assert megabytes < 20
    assert loaded < 2000 * SLOW
    assert took < 500 * SLOW


def test_where_there_is_no_browser_a_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    with pytest.raises(FileNotFoundError, match="found none of no-such-browser: apt-get install"):
        chromium()
    checked = subprocess.run(
        ["sh", "-n", ROOT / "tests" / "install_browser.sh"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
