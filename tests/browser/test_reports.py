"""Reports in a real browser: nothing is asked for, nothing goes wrong, and everything can be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from torch import nn

import adapters
import weights
from tests.browser.opened import assert_readable, opened
from tests.thinned import exhaustive

HOSTILE = "</script><img src=x onerror=alert(1)><b>\"'&\u202e\x00\x1b]0;x\x07"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.up_proj, self.down_proj = nn.Linear(32, 64), nn.Linear(64, 32)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(32, 50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three adapters for it; of one of them not everything fits."""
    folder = tmp_path_factory.mktemp("pages")
    torch.default_generator.manual_seed(0)
    weights.save(Model().state_dict(), folder / "base.safetensors")
    methods: dict[str, tuple[Any, Any]] = {
        "style": (adapters.LoRA(rank=8), ["q_proj", "v_proj", "up_proj"]),
        "pose": (adapters.DoRA(rank=4), ["q_proj", "k_proj"]),
    }
    for number, (name, (method, targets)) in enumerate(methods.items()):
        model = Model()
        patch = adapters.inject(model, method, targets, name=name, seed=number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for depth, parameter in enumerate(patch.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.002 * (1 + depth))
        patch.save_pretrained(folder / f"{name}.safetensors", format="fluxion")
    file = weights.read_adapter(folder / "style.safetensors")
    first = file.layers["layers.0.q_proj"]
    about = {"title": HOSTILE, HOSTILE: "x", "tags": json.dumps({"a": [HOSTILE] * 40})}
    odd = replace(file, layers={**file.layers, f"layers.{HOSTILE}": first, "layers.0.up_proj": first}, metadata=about)
    reports = {
        "one": adapters.report(folder / "style.safetensors", folder / "base.safetensors"),
        "three": adapters.report(
            [folder / "style.safetensors", folder / "pose.safetensors", odd], folder / "base.safetensors"
        ),
        "alone": adapters.report(odd),
    }
    for name, report in reports.items():
        report.save(folder / f"{name}.html")
    return folder


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [exhaustive("one", 390, "light"), ("three", 390, "dark"), exhaustive("three", 1280, "light")],
)
def test_opens_without_an_error(
    browser: Browser, folder: Path, name: str, width: int, scheme: str, tmp_path: Path
) -> None:
    with opened(browser, folder / f"{name}.html", width, scheme) as page:
        expect(page.locator("#map .heatmaplayer image")).to_have_count(1)
        expect(page.locator("#spectrum .scatterlayer .trace").first).to_be_attached()
        assert_readable(page)
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert_readable(page)
        assert page.screenshot(path=tmp_path / f"{name}-{width}-{scheme}.png", full_page=True)


def test_the_tree_opens_and_closes(browser: Browser, folder: Path) -> None:
    with opened(browser, folder / "one.html") as page:
        group = page.locator("#tree details").first
        inside = group.locator("ul").first
        expect(inside).to_be_visible()
        group.locator("summary").first.click()
        expect(inside).to_be_hidden()
        group.locator("summary").first.press("Enter")
        expect(inside).to_be_visible()
        page.keyboard.press("Space")
        expect(inside).to_be_hidden()
        page.get_by_role("button", name="Open all").click()
        assert page.locator("#tree details:not([open])").count() == 0
        expect(page.locator("#tree .leaf", has_text="v_proj")).to_have_count(12)
        expect(page.locator("#tree .leaf", has_text="v_proj").last).to_be_visible()
        page.get_by_role("button", name="Close all").click()
        assert page.locator("#tree details[open]").count() == 0


@pytest.mark.exhaustive
def test_layers_that_are_left_alone_are_shown_on_request(browser: Browser, folder: Path) -> None:
    with opened(browser, folder / "one.html") as page:
        head = page.locator("#tree .leaf", has_text="head")
        expect(head).to_be_hidden()
        page.get_by_label("Show the 26 matrices").check()
        expect(head).to_be_visible()


@pytest.mark.exhaustive
def test_sizes_are_those_of_the_report(browser: Browser, folder: Path) -> None:
    (found,) = adapters.report(folder / "style.safetensors", folder / "base.safetensors").adapters
    largest = max(found.layers, key=lambda layer: layer.relative or 0)
    assert largest.relative is not None
    with opened(browser, folder / "one.html") as page:
        page.get_by_role("button", name="Open all").click()
        darkest = page.locator("#tree .leaf .step-8")
        shown = f"{100 * largest.relative:#.3g} %"
        assert shown in darkest.all_text_contents()


def column(page: Page, number: int) -> list[str]:
    return page.locator(f"#table tbody tr > :nth-child({number})").all_text_contents()


@pytest.mark.exhaustive
def test_sorting(browser: Browser, folder: Path) -> None:
    with opened(browser, folder / "one.html") as page:
        heads = page.locator("#table thead th")
        size = page.get_by_role("columnheader", name="‖ΔW‖")
        number = heads.all_text_contents().index("‖ΔW‖") + 1
        size.get_by_role("button").click()
        assert size.get_attribute("aria-sort") == "ascending"
        up = [float(text) for text in column(page, number)]
        assert up == sorted(up)
        assert len(set(up)) > 10
        page.keyboard.press("Enter")  # The button has the focus.
        assert size.get_attribute("aria-sort") == "descending"
        assert [float(text) for text in column(page, number)] == up[::-1]
        layer = page.get_by_role("columnheader", name="Layer")
        layer.get_by_role("button").focus()
        page.keyboard.press("Space")
        assert (layer.get_attribute("aria-sort"), size.get_attribute("aria-sort")) == ("ascending", None)
        paths = column(page, 1)
        assert paths.index("layers.2.q_proj") < paths.index("layers.10.q_proj")


@pytest.mark.exhaustive
def test_layers_without_numbers_come_last(browser: Browser, folder: Path) -> None:
    with opened(browser, folder / "three.html") as page:
        size = page.get_by_role("columnheader", name="‖ΔW‖")
        number = page.locator("#table thead th").all_text_contents().index("‖ΔW‖") + 1
        for _ in range(2):
            size.get_by_role("button").click()
            values = column(page, number)
            assert values.count("–") == 2
            assert values[-2:] == ["–", "–"]


@pytest.mark.exhaustive
def test_filtering(browser: Browser, folder: Path) -> None:
    with opened(browser, folder / "one.html") as page:
        page.get_by_role("searchbox").fill(r"\.1\..*(q|v)_proj")
        expect(page.locator("#table tbody tr:visible")).to_have_count(2)
        expect(page.locator("#count")).to_have_text("2 rows")
        page.get_by_role("searchbox").fill("q_proj(")
        expect(page.locator("#count")).to_have_text("0 rows")


@pytest.mark.exhaustive
def test_light_and_dark(browser: Browser, folder: Path) -> None:
    with opened(browser, folder / "one.html") as page:

        def ground() -> int:
            return page.evaluate(
                "Number(getComputedStyle(document.documentElement).backgroundColor.match(/[0-9]+/)[0])"
            )

        label = page.locator("#map .ytick text").first
        light = label.evaluate("one => getComputedStyle(one).fill")
        assert ground() > 200
        page.get_by_role("button", name="Switch between light and dark").click()
        assert ground() < 50
        assert label.evaluate("one => getComputedStyle(one).fill") != light
        page.keyboard.press("Enter")
        assert ground() > 200
        page.emulate_media(color_scheme="dark")
        assert ground() > 200  # What was chosen stays.


@pytest.mark.exhaustive
def test_charts_follow_what_is_chosen(browser: Browser, folder: Path) -> None:
    with opened(browser, folder / "three.html") as page:
        lines = page.locator("#spectrum .scatterlayer .trace")
        page.locator("#spectrum-layer").select_option("layers.3.q_proj")
        expect(lines).to_have_count(3)
        page.locator("#spectrum-layer").select_option("layers.3.k_proj")
        expect(lines).to_have_count(1)
        picture = page.locator("#map .heatmaplayer image")
        before = picture.get_attribute("href")
        page.locator("#map-value").select_option("Effective rank")
        assert picture.get_attribute("href") != before
        before = page.locator("#pairs .heatmaplayer image").get_attribute("href")
        page.get_by_label("Pair").select_option(index=1)
        assert page.locator("#pairs .heatmaplayer image").get_attribute("href") != before


def test_everything_is_reached_by_the_keyboard(browser: Browser, folder: Path) -> None:
    with opened(browser, folder / "three.html", width=390) as page:
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the report")).to_be_focused()
        wanted = page.evaluate(
            "[...document.querySelectorAll('a, button, select, input, summary, [tabindex]')]"
            ".filter(one => one.checkVisibility() && !one.closest('.plot')).length"
        )
        reached = set()
        for _ in range(wanted + 5):
            spot = page.evaluate(
                "(() => { const one = document.activeElement; const style = getComputedStyle(one);"
                " return [[...document.querySelectorAll('*')].indexOf(one), style.outlineStyle, one.tagName]; })()"
            )
            if spot[2] != "BODY":
                reached.add(spot[0])
                assert spot[1] != "none", spot
            page.keyboard.press("Tab")
        assert len(reached) >= wanted


@pytest.mark.exhaustive
def test_what_does_not_fit_is_said(browser: Browser, folder: Path) -> None:
    with opened(browser, folder / "three.html") as page:
        expect(page.locator("#fit .verdict").first).to_contain_text("style: 36 of 36 layers fit, and it would load")
        expect(page.locator("#fit .bad")).to_contain_text("35 of 37 layers fit; 2 problems")
        expect(page.locator("#fit .lines")).to_contain_text(
            "layers.0.up_proj: lora_B is (32, 8) in the file, (64, 8) in the model"
        )


def test_nothing_in_a_file_is_more_than_text(browser: Browser, folder: Path) -> None:
    """Also in the charts, whose labels know some HTML."""
    with opened(browser, folder / "alone.html") as page:
        page.get_by_role("button", name="Open all").click()
        assert page.locator("img, b:has-text('x')").count() == 0
        expect(page.locator("#metadata")).to_contain_text("</script><img src=x onerror=alert(1)>")
        text = page.evaluate("document.body.textContent")
        assert not {"\u202e", "\x00", "\x1b", "\x07"} & set(text)
        page.locator("#map").hover()


def test_scripts_that_are_not_of_the_page_do_not_run(browser: Browser, folder: Path, tmp_path: Path) -> None:
    text = (folder / "one.html").read_text("utf-8")
    path = tmp_path / "changed.html"
    path.write_text(text.replace("</main>", "<script>document.title = 'taken'</script></main>"), "utf-8")
    with pytest.raises(AssertionError, match="Content Security Policy"), opened(browser, path) as page:
        assert page.title() != "taken"
