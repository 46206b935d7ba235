"""diagnose.html in a real browser, of a made diagnosis."""

from __future__ import annotations

import pytest

from pipeline.diagnose.bench import Setting
from pipeline.diagnose.breakdown import Calibration, WorstToken
from pipeline.diagnose.diagnosis import Diagnosis
from pipeline.diagnose.exchanges import Trial
from pipeline.diagnose.page import write_page
from tests.support.browser import CONTRAST, CONTRAST_OF, Browser, new_page

GAP = {"abs_logprob": 0.4, "max_abs_logprob": 3.0, "k3": 0.2, "f2": 0.1, "nonfinite": 0.0}
TEMPERATURE = Trial("temperature", "the trainer's log-probs are taken at temperature 1", Setting(), 3e-7, 1e-13)
FOUND = Diagnosis(
    agree=False,
    sentence="The engines disagree: the largest part is temperature <b>&",
    bound=1e-3,
    gap=GAP,
    rollouts=2,
    tokens=90,
    weight_version=3,
    routes="rollout",
    parts=(TEMPERATURE, Trial("LM head", "the trainer's LM head is bf16", Setting(), 0.41, 0.21)),
    not_measured={"rotary embedding": "it is scaled"},
    findings=(TEMPERATURE,),
    rest=3e-7,
    weights=("model.layers.0.mlp.gate.weight (differs)",),
    calibration=Calibration(-0.2, 0.01, 0.01),
    by_position=tuple(
        {"start": 4 * k, "tokens": 8.0, "abs_logprob": 0.1 * k, "max_abs_logprob": 1.0} for k in range(9)
    ),
    by_layer=(1.0, float("nan"), 0.75),
    by_lag=({"lag": 1, "tokens": 90.0, "abs_logprob": 0.4, "max_abs_logprob": 3.0},),
    worst=(WorstToken(1, 7, "sort\n3 1", "<script>", -0.1, -3.1),),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with new_page(tmp_path_factory.mktemp("profile")) as page:
        yield Browser(page)


def test_the_page_shows_the_sentence_every_part_and_where_the_gap_lies(browser, tmp_path):
    write_page(FOUND, tmp_path / "diagnose.html", name="runs/x")
    browser.look_at(tmp_path / "diagnose.html")
    assert browser.texts("#sentence") == [FOUND.sentence]
    assert browser.drawn().keys() == {"exchanged", "position", "layer"}
    assert all(browser.drawn().values())
    rows = browser.texts("#parts tr")
    assert [row.split("\t")[0] for row in rows] == ["part", "none", "temperature", "LM head", "rotary embedding"]
    assert "not measured: it is scaled" in rows[-1]
    assert browser.texts("#weights li") == ["model.layers.0.mlp.gate.weight (differs)"]
    assert browser.texts("#worst td:nth-child(4)") == ["<script>"]
    assert "Lowest in layer 2: 75.00%." in browser.texts(".now")


def test_its_text_can_be_read_in_light_and_dark_and_fits_a_narrow_window(browser, tmp_path):
    write_page(FOUND, tmp_path / "diagnose.html", name="runs/x")
    for scheme in ("light", "dark"):
        page = browser.look_at(tmp_path / "diagnose.html", scheme, width=360)
        contrasts = page.locator("h1, h2, p, td, th, dt, dd, li span, .xtick text").evaluate_all(
            f"all => all.filter(e => e.getClientRects().length).map(e => [({CONTRAST_OF})(e), e.textContent])"
        )
        assert min(contrasts)[0] >= CONTRAST, (scheme, min(contrasts))
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
