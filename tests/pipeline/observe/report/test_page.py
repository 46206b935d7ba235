"""The report in a real browser: what a person sees of a finished, a running, an empty and an odd run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from playwright.sync_api import Page

from pipeline.commands.main import main
from pipeline.observe.report.page import write_report
from tests.support.browser import CONTRAST, CONTRAST_OF, Browser, new_page
from tests.support.runs import LAYERS, MadeRun, routing

FIGURES = {
    "reward", "length", "entropy", "wasted", "mismatch", "agreement", "proximal_rollout_histogram",
    "proximal_rollout_by_step", "clipped", "grad_norm", "current_proximal_histogram", "current_proximal_by_step",
    "time", "throughput", "evaluation_held", "components", "pass_rates", "failures",
}  # fmt: skip
SOMETIMES = {"evaluation_held", "components", "failures"}
"""Of runs that have them."""


class Reports(Browser):
    """A browser that looks at runs."""

    def __init__(self, page: Page):
        super().__init__(page)
        self.written: set[Path] = set()
        self.shown: Path | None = None

    def open(self, run: Path, scheme: str = "light", width: int = 1366) -> Page:
        """Write a run's report, where that is not done yet, and look at it."""
        file = run / "report.html"
        if file not in self.written:
            self.written.add(write_report(run))
        self.shown = file if (scheme, width) == ("light", 1366) else None
        return self.look_at(file, scheme, width)

    def see(self, run: Path) -> Page:
        """The report as `open` shows it; what a test has pointed at or chosen since is as it left it."""
        return self.page if self.shown == run / "report.html" else self.open(run)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with new_page(tmp_path_factory.mktemp("profile")) as page:
        yield Reports(page)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Twelve steps of twelve; a mismatch that grows along each answer, and one layer that disagrees more and more."""
    run = MadeRun(tmp_path_factory.mktemp("finished"))
    for step in range(1, 13):
        parts = {
            "reward/number": 0.05 * step,
            "reward/format": 0.9,
            "reward/failed": 1.0,
            "reward/failures_timeout": 1.0,
        }
        run.write(step, **parts)
    for step in (0, 6, 12):
        scores = {"pass@1": [step / 20, step / 24, step / 16], "pass@4": [0.5, 0.4, 0.6]}
        run.directory.record_evaluation({"step": step, "set": "held", "scores": scores}, [{"question": 0}])
    run.directory.record_evaluation({"step": 9, "set": "held", "skipped": "SIGTERM"}, None)
    run.directory.finish()
    return run.path


def test_evaluations_are_drawn_with_their_intervals_and_what_was_left_out_is_said(browser, finished):
    page = browser.see(finished)
    figure = page.locator("#figure-evaluation_held")
    assert figure.locator(".scatterlayer .trace").count() == 2
    assert figure.locator(".errorbars").count() == 2
    assert "Left out after step 9: SIGTERM." in figure.inner_text()
    assert "pass@1: 0.000 in the first step, 0.600 in the last." in figure.inner_text()


def test_every_figure_of_a_finished_run_is_drawn_without_a_complaint_and_without_a_network(browser, finished):
    browser.see(finished)  # where it was opened, by this test or another, nothing was complained about or asked for
    drawn = browser.drawn()
    assert drawn.keys() == FIGURES
    assert all(marks > 0 for marks in drawn.values()), drawn
    assert browser.texts(".missing") == []
    assert browser.texts(".state")[0].startswith("Finished: 12 of 12 steps.")
    assert "0.900" in browser.texts(".tiles li")[0]


def test_the_heat_map_has_a_cell_for_every_layer_and_step_with_the_agreement_that_was_written(browser, finished):
    browser.see(finished)
    x, y, z = browser.heatmap("agreement")
    # Plotly keeps the edges of cells, one more than there are.
    assert (len(x), len(y)) == (12 + 1, LAYERS + 1)
    expected = [[routing(step)[layer, 1] / 100 for step in range(1, 13)] for layer in range(LAYERS)]
    assert np.array(z) == pytest.approx(np.array(expected))


def test_every_figure_says_what_is_good_what_is_bad_and_what_this_run_shows(browser, finished):
    browser.see(finished)
    assert browser.page.locator("figure").count() == len(FIGURES)
    assert browser.texts("figure dt") == ["Good", "Bad"] * len(FIGURES)
    assert all(len(text) > 5 for text in browser.texts("figure dd"))
    assert browser.texts("#figure-reward .now") == ["0.375 in the first 5 steps, 0.783 in the last 5."]
    assert browser.page.locator("#reward").get_attribute("aria-label").startswith("Reward. 0.375")


def test_pointing_at_a_figure_gives_the_value(browser, finished):
    page = browser.see(finished)
    box = page.locator("#reward .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#reward .hoverlayer .legendtext, #reward .hoverlayer text")
    text = " ".join(page.locator("#reward .hoverlayer text").all_text_contents())
    assert "each step" in text
    assert re.search(r"0\.[56]\d", text)


def test_answers_stand_side_by_side_and_their_tokens_are_coloured_by_the_log_ratio(browser, finished):
    page = browser.see(finished)
    cards = page.locator("#answers details[open] .card")
    assert cards.count() == 4
    tops = [cards.nth(k).bounding_box()["y"] for k in range(4)]
    assert tops[0] == tops[1] < tops[2] == tops[3]
    assert "reward 1" in cards.nth(0).inner_text().replace("\n", " ")
    assert "reward 0" in cards.nth(1).inner_text().replace("\n", " ")
    assert browser.texts("#answers details[open] .card:first-child .answer") == ["01289<|eos|>"]
    tokens = page.locator("#answers details[open] .card:first-child .token")
    assert [tokens.nth(k).get_attribute("class").split()[1] for k in range(1, 6)] == ["m-3", "m4", "m-5", "m6", "m-7"]
    assert "trainer - server +1.50e-02" in tokens.nth(4).get_attribute("title")
    shades = [tokens.nth(k).evaluate("t => getComputedStyle(t).backgroundColor") for k in range(6)]
    assert len(set(shades)) == 6
    assert page.locator("#answers details").count() == 6


def test_tokens_can_be_coloured_by_the_update_and_by_their_probability(browser, finished):
    page = browser.see(finished)
    shade = "t => getComputedStyle(t).backgroundColor"
    first, last = (page.locator("#answers details[open] .token").nth(k) for k in (0, -1))
    legend = page.locator(".scale:not([hidden])")
    seen = {}
    for way in ("m", "u", "s"):
        page.select_option("#colouring", way)
        seen[way] = (first.evaluate(shade), last.evaluate(shade), legend.inner_text())
    assert len({text for *_, text in seen.values()}) == 3
    transparent = "rgba(0, 0, 0, 0)"
    assert seen["u"][0] == transparent != seen["u"][1]  # the first prompt was in the first mini-batch
    assert seen["s"][0] == transparent != seen["s"][1]  # 95% and 5%


def test_every_link_is_relative_and_leads_to_something_that_is_there(browser, finished):
    page = browser.see(finished)
    links = page.locator("a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    files = [link for link in links if not link.startswith("#")]
    assert {
        "config.yaml",
        "metrics.jsonl",
        "records.jsonl",
        "summary.png",
        "rollouts/",
        "rollouts/step_000012.txt",
    } <= {*files}
    assert all((finished / unquote(link)).exists() for link in files)
    assert all(page.locator(link).count() == 1 for link in links if link.startswith("#"))


def to_dark(browser):
    """The scheme changes while the page is open; figures are drawn anew a moment later."""
    fill = "() => getComputedStyle(document.querySelector('#reward .xtick text')).fill"
    page, browser.shown = browser.page, None
    light = page.evaluate(fill)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"before => ({fill})() !== before", arg=light)


def test_all_text_can_be_read_in_light_and_dark_while_the_page_is_open(browser, finished):
    page = browser.see(finished)
    for scheme, way in (("light", "m"), ("light", "u"), ("light", "s"), ("dark", "m"), ("dark", "u"), ("dark", "s")):
        if (scheme, way) == ("dark", "m"):
            to_dark(browser)
        page.select_option("#colouring", way)
        for selector in (
            "h1, h2, h3, p, dt, dd, a, li span, summary, select", ".scale:not([hidden]) .token", ".answer .token",
            "#reward .xtick text, #reward .legendtext, #reward .ytitle",
        ):  # fmt: skip
            contrasts = page.locator(selector).evaluate_all(
                f"all => all.filter(e => e.getClientRects().length).map(e => [({CONTRAST_OF})(e), e.textContent])"
            )
            assert contrasts
            assert min(contrasts)[0] >= CONTRAST, (scheme, way, min(contrasts))
    assert browser.complaints == []


@pytest.mark.parametrize("width", [360, 1280, 1920])
def test_nothing_is_wider_than_the_window(browser, finished, width):
    page = browser.open(finished, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    columns = page.evaluate(
        "getComputedStyle(document.querySelector('.figures')).gridTemplateColumns.split(' ').length"
    )
    assert columns == (1 if width == 360 else 2)
    overflowing = page.evaluate(
        """() => [...document.querySelectorAll('.plot text')].filter(text => {
             const [a, b] = [text.getBoundingClientRect(), text.closest('figure').getBoundingClientRect()];
             return a.width && (a.left < b.left - 1 || a.right > b.right + 1); }).map(text => text.textContent)"""
    )
    assert overflowing == []


def test_a_running_run_is_shown_up_to_its_last_whole_line(browser, tmp_path):
    run = MadeRun(tmp_path)
    for step in range(1, 6):
        run.write(step)
    run.directory.close()
    for name in ("metrics.jsonl", "records.jsonl"):
        file = run.path / name
        file.write_bytes(file.read_bytes()[:-40])
    page = browser.open(run.path)
    assert re.match(
        r"Not finished: 4 of 12 steps, the last recorded \d+ s before this report", browser.texts(".state")[0]
    )
    assert len(browser.heatmap("agreement")[0]) == 4 + 1
    assert page.evaluate("document.getElementById('reward').calcdata[0].length") == 4
    assert page.locator(".notes").count() == 0
    assert all(browser.drawn().values())


def test_a_run_before_its_first_step_says_so(browser, tmp_path):
    run = MadeRun(tmp_path)
    page = browser.open(run.path)
    assert browser.texts(".state")[0].startswith("No step is recorded yet.")
    assert page.locator(".plot").count() == 0
    assert page.locator("figure .missing").count() == len(FIGURES - SOMETIMES)
    assert all("yet" in text for text in browser.texts("figure .missing"))
    assert page.locator("#rollouts .missing").count() == 1
    run.directory.close()


def test_one_step_is_drawn_as_it_is(browser, tmp_path):
    run = MadeRun(tmp_path)
    run.write(1)
    run.directory.close()
    browser.open(run.path)
    assert all(browser.drawn().values())
    assert browser.texts("#figure-reward .now") == ["0.258 in the only step."]


def test_a_dense_model_and_a_single_mini_batch_get_a_sentence_and_not_a_broken_figure(browser, tmp_path):
    run = MadeRun(tmp_path, "train.mini_batches=1", layers=0, update=0.0)
    run.write(1)
    run.write(2)
    run.directory.close()
    page = browser.open(run.path)
    assert "the model is dense, or replay is none" in browser.texts("#figure-agreement .missing")[0]
    for name in ("current_proximal_histogram", "current_proximal_by_step"):
        assert "with one mini-batch a step" in browser.texts(f"#figure-{name} .missing")[0]
        assert page.locator(f"#{name}").count() == 0
    assert all(browser.drawn().values())


def test_odd_values_are_left_out_by_name_and_odd_text_is_only_text(browser, tmp_path):
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = MadeRun(tmp_path)
    run.write(1, prompt=attack)
    run.write(2, **{"mismatch/k3": 0.0, "train/grad_norm": 0.0, "reward/mean": -1e300})
    run.write(3, **{"mismatch/abs_logprob": 1e200, f"time/{attack}_s": 1.0, f"correction/{attack}_cut": 0.5})
    run.directory.close()
    lines = [
        "not json", "[]", "3", '{"reward/mean": 1}', '{"step": "x"}', '{"step": 1e999}',
        json.dumps({"step": 4, "reward/mean": float("nan"), "policy/entropy": "high", "time/step_s": None}),
        json.dumps({"step": 3, "reward/mean": 0.5}), json.dumps({"step": 5, "reward/mean": 10**400}), "",
    ]  # fmt: skip
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write("\n".join(lines))
    (run.path / "logs" / "a b#?.log").write_text("")
    page = browser.open(run.path)
    notes = " ".join(page.locator(".notes li").all_text_contents())
    for said in (
        "line 4,",
        "line 9,",
        "step 3 twice",
        "reward/mean is nan",
        "policy/entropy is high",
        "step_s is None",
    ):
        assert said in notes
    assert "step 5: reward/mean is 1000" in notes
    assert all(browser.drawn().values())
    page.locator("summary", has_text="Step 1").click()
    assert attack in browser.texts("#answers .prompt")
    assert page.locator("img").count() == 0
    assert browser.complaints == []


def test_a_long_run_draws_fewer_columns_and_says_so(browser, tmp_path):
    run = MadeRun(tmp_path, "run.rollouts_shown=0")
    run.directory.rollouts_shown = 0
    run.write(1)
    (record,) = [json.loads(line) for line in (run.path / "records.jsonl").read_text().splitlines()]
    (numbers,) = [json.loads(line) for line in run.directory.metrics_path.read_text().splitlines()]
    for name, row in (("records.jsonl", record), ("metrics.jsonl", numbers)):
        (run.path / name).write_text("".join(json.dumps(row | {"step": step}) + "\n" for step in range(1, 1001)))
    page = browser.open(run.path)
    x, _, _ = browser.heatmap("agreement")
    assert len(x) == 334 + 1
    assert "One step in 3 is drawn." in browser.texts("#figure-agreement figcaption")[0]
    assert "A bar is the mean of 4 steps." in browser.texts("#figure-time figcaption")[0]
    assert page.evaluate("document.getElementById('reward').calcdata[0].length") == 1000
    assert "run.rollouts_shown is 0" in browser.texts("#rollouts .missing")[0]


def test_the_command_names_the_file_or_what_is_no_run(finished, tmp_path, capsys):
    assert main(["report", str(finished)]) == 0
    assert capsys.readouterr().out.strip() == str(finished / "report.html")
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run directory: it has no config.yaml" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_rollout_file_that_is_not_json_is_named(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "rollouts" / "step_000001.json").write_text("{")
    assert main(["report", str(run)]) == 2
    assert "step_000001.json is not JSON" in capsys.readouterr().err
