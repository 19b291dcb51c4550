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


# --- the functions are those of the scripts ---------------------------------------------------------------------------


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


def random_value(rng, method, name, batch):
    """A value of an option. Every word of a choice, both switches, and numbers over the range that makes sense."""
    option = next(option for option in credit.method_options()[method] if option["name"] == name)
    if option["choices"]:
        return rng.choice(option["choices"])
    if isinstance(option["default"], bool):
        return rng.random() < 0.5
    numbers = {
        "max_new_tokens": lambda: len(batch["mask"][0]) + rng.randint(0, 4),
        "overlong_cache": lambda: rng.choice([0.0, 1.0, rng.random()]),
        "weight_temperature": lambda: 10 ** rng.uniform(-1, 3),
        "entropy_min": lambda: 10 ** rng.uniform(-4, -0.5),
        "entropy_max": lambda: rng.choice([1e3, rng.uniform(0.5, 2)]),
        "overlong_gamma": lambda: rng.choice([None, 0.75, rng.uniform(0.51, 1)]),
    }
    amounts = ("alpha", "alpha1", "alpha2", "beta1", "beta2")  # 0 or more
    return rng.choice([0.0, 3 * rng.random()]) if name in amounts else numbers[name]()


def random_cases(method, n):
    rng = random.Random(method)
    names = [option["name"] for option in credit.method_options()[method]]
    cases = []
    for _ in range(n):
        batch = random_batch(rng)
        cases.append({**batch, "settings": {name: random_value(rng, method, name, batch) for name in names}})
    return cases


def tensors(case, dtype):
    numbers = [torch.tensor(case[name], dtype=dtype) for name in ("rewards", "entropy", "mask")]
    return [*numbers, torch.tensor(case["group"])]


@pytest.mark.parametrize("method", METHODS)
def test_the_page_gives_the_scripts_numbers_and_the_steps_of_a_formula_end_at_them(method):
    """For random batches and options."""
    cases = random_cases(method, CASES)
    code = f"""return data.map(c => {{
        const credit = {method}.token_advantages(c.rewards, c.entropy, c.mask, c.group, ...Object.values(c.settings));
        return [credit, each_token(c.mask, (i, t) => steps.{method}(c, c.settings, i, t).at(-1).value)];
    }});"""
    for case, (ours, last_step) in zip(cases, javascript(code, cases), strict=True):
        # JavaScript has float64 alone. EGSW and GTPO compute in float32, and GTPO divides by what may be a small std.
        rewards, entropy, mask, group = tensors(case, torch.float32 if method in ("egsw", "gtpo") else torch.float64)
        tolerance = 1e-4 if method == "gtpo" else 1e-5
        settings = case["settings"]
        expected = SCRIPTS[method].token_advantages(rewards, entropy, mask, group, **settings)
        closeness = dict(atol=tolerance, rtol=tolerance, msg=lambda text, settings=settings: f"{settings}: {text}")
        torch.testing.assert_close(torch.tensor(ours, dtype=expected.dtype), expected, **closeness)
        # the page has no control for these two
        if settings.get("entropy_max", 1e3) == 1e3 and settings.get("overlong_gamma") is None:
            torch.testing.assert_close(torch.tensor(last_step), torch.tensor(ours), atol=1e-5, rtol=0)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_page_has_todays_options():
    page = PAGE.read_text(encoding="utf-8")
    stored = content_of(page)
    assert page == credit.page(stored["tasks"]), "stale: run python docs/build.py"
    assert len(page.encode()) <= 400_000
    assert {len(task["groups"]) for task in stored["tasks"]} == {2}


# --- a reader at the page ---------------------------------------------------------------------------------------------


def visit(browser, width=1280, height=900):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 800}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(PAGE.as_uri())


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
def test_every_preset_shows_what_its_sentence_says(browser):
    visit(browser)
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


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_page_fits_the_screen_loads_nothing_and_reports_no_error(browser, width, height):
    visit(browser, width, height)
    for k in range(len(all_of(browser, "#prompts button"))):
        browser.execute_script("arguments[0].click()", all_of(browser, "#prompts button")[k])
        assert value(browser, "document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    assert value(browser, "performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
