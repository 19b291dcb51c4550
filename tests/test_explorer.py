"""docs/explorer.html: its JavaScript gives the scripts' numbers, and a reader can use the page.

A test is skipped if what it needs is missing: node, or chromium with chromedriver and the package selenium."""

import json
import random
import re
import shutil
import subprocess

import pytest
import torch
from helpers import ROOT, SCRIPTS
from test_main import CHANGES

from experiments import credit

PAGE = ROOT / "docs" / "explorer.html"
METHODS = list(SCRIPTS)
CASES = 100  # random batches for each method


def scripts_of(page):
    """The page's scripts that need no document: the methods' functions, and the steps of a formula."""
    return "\n".join(re.findall(r'<script id="(?:methods|formulas)">(.*?)</script>', page, re.S))


def content_of(page):
    return json.loads(re.search(r'id="content">(.*?)</script>', page, re.S).group(1))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium to drive."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the package selenium is missing")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver_path = shutil.which("chromedriver")
    if not binary or not driver_path:
        pytest.skip("chromium or chromedriver is missing")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    folder = tmp_path_factory.mktemp("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", f"user-data-dir={folder}"):  # fmt: skip
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    yield driver
    driver.quit()


def javascript(code, data):
    """What the code returns. It sees `data` and the page's functions, and runs in node."""
    if not shutil.which("node"):
        pytest.skip("node is missing")
    program = f"""{scripts_of(PAGE.read_text(encoding="utf-8"))}
        const result = (data => {{ {code} }})(JSON.parse(require('fs').readFileSync(0)));
        console.log(JSON.stringify(result));"""
    done = subprocess.run(["node", "-e", program], input=json.dumps(data), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def random_batch(rng):
    """Rewards [B], entropy [B, T], mask [B, T] and group [B], as lists. The rows of a group stand anywhere."""
    group = [g for g in range(rng.randint(1, 4)) for _ in range(rng.randint(2, 6))]
    rng.shuffle(group)
    width = rng.randint(1, 9)
    real_valued = rng.random() < 0.2
    rewards = [rng.random() if real_valued else float(rng.random() < 0.5) for _ in group]
    if rng.random() < 0.2:  # a group with one outcome
        rewards = [1.0 if g == 0 else r for r, g in zip(rewards, group, strict=True)]
    lengths = [rng.randint(1, width) for _ in group]
    mask = [[float(t < n) for t in range(width)] for n in lengths]
    entropy = [[rng.choice([0.0, 1e-5, rng.random(), 3 * rng.random()]) * m for m in row] for row in mask]
    return {"rewards": rewards, "entropy": entropy, "mask": mask, "group": group}


def random_case(rng, method):
    """A random batch, and settings: each option of token_advantages at its default or as test_main.py changes it."""
    case = random_batch(rng)
    settings = {option["name"]: option["default"] for option in credit.method_options()[method]}
    for name in settings:
        if name == "max_new_tokens":
            settings[name] = len(case["mask"][0]) + rng.randint(0, 4)
        else:
            settings[name] = rng.choice([settings[name], *CHANGES[method][name]])
    return {**case, "settings": settings}


@pytest.mark.parametrize("method", METHODS)
def test_the_page_gives_the_scripts_numbers_and_the_steps_of_a_formula_end_at_them(method):
    rng = random.Random(method)
    cases = [random_case(rng, method) for _ in range(CASES)]
    code = f"""return data.map(c => {{
        const credit = {method}.token_advantages(c.rewards, c.entropy, c.mask, c.group, ...Object.values(c.settings));
        return [credit, each_token(c.mask, (i, t) => steps.{method}(c, c.settings, i, t).at(-1).value)];
    }});"""
    for case, (ours, last_step) in zip(cases, javascript(code, cases), strict=True):
        # JavaScript has float64 alone. EGSW and GTPO compute in float32, and GTPO divides by what may be a small std.
        dtype = torch.float32 if method in ("egsw", "gtpo") else torch.float64
        batch = [torch.tensor(case[name], dtype=dtype) for name in ("rewards", "entropy", "mask")]
        settings = case["settings"]
        expected = SCRIPTS[method].token_advantages(*batch, torch.tensor(case["group"]), **settings)
        tolerance = 1e-4 if method == "gtpo" else 1e-5
        torch.testing.assert_close(torch.tensor(ours, dtype=dtype), expected, atol=tolerance, rtol=tolerance)
        # the page has no control for these two
        if settings.get("entropy_max", 1e3) == 1e3 and settings.get("overlong_gamma") is None:
            torch.testing.assert_close(torch.tensor(last_step), torch.tensor(ours), atol=1e-5, rtol=0)


def test_the_page_has_todays_options():
    page = PAGE.read_text(encoding="utf-8")
    stored = content_of(page)
    assert page == credit.page(stored["tasks"]), "stale: run python docs/build.py"
    assert len(page.encode()) <= 400_000
    assert {len(task["groups"]) for task in stored["tasks"]} == {2}


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


def click(browser, selector, text):
    next(element for element in all_of(browser, selector) if text in element.text).click()


def number(text):
    return float(text.replace("−", "-"))


def means(browser, method):
    """The mean credit of each completion that is shown, as the page writes it."""
    return [number(element.text) for element in all_of(browser, f'#score .mean[data-method="{method}"]')]


def value(browser, script):
    return browser.execute_script(f"return {script}")


@pytest.mark.slow
def test_every_preset_shows_what_its_sentence_says_on_a_page_that_fits_the_screen(browser):
    browser.get(PAGE.as_uri())
    for prompt in range(len(all_of(browser, "#prompts button"))):
        all_of(browser, "#prompts button")[prompt].click()
        click(browser, "#presets button", "As sampled")
        assert sum(means(browser, "grpo")) == pytest.approx(0, abs=0.04)
        assert means(browser, "egsw") != means(browser, "grpo")
        click(browser, "#presets button", "P → ∞")
        assert means(browser, "egsw") == pytest.approx(means(browser, "grpo"), abs=0.011)
        click(browser, "#presets button", "zero-sum")
        assert sum(means(browser, "egsw")) > 0.3
        click(browser, "#presets button", "own")
        assert set(means(browser, "gtpo")) == {0}
        click(browser, "#presets button", "confident")
        at_its_position = value(
            browser,
            "state.shown.filter(i => state.batch.rewards[i] < 1 && state.batch.mask[i][state.t])"
            ".map(i => state.credit.gtpo[i][state.t]).sort((a, b) => a - b)",
        )
        assert at_its_position[0] == value(browser, "state.credit.gtpo[state.row][state.t]")
        assert at_its_position[0] < at_its_position[1] - 0.5
        click(browser, "#presets button", "One outcome")
        assert {mean for method in METHODS for mean in means(browser, method)} == {0}

        for width in (390, 1280):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 800}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            assert value(browser, "document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    assert value(browser, "performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
