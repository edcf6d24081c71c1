"""How a cache shows itself: one line, and a table in a notebook."""

from __future__ import annotations

import html.parser
import re

from conftest import make_tiny_llama, stream, token_ids

from streaming_llm import ADMSConfig, ADMSKVCache, enable_adms_llm
from streaming_llm.stats import format_bytes


class Cells(html.parser.HTMLParser):
    """The rows of a table, and the tags and attributes that were used."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.used: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.used.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.rows[-1][-1] += data


def filled():
    settings = {"recent_size": 24, "compressed_budget": 16, "compression_interval": 16, "rank": 4, "sketch_budget": 4}
    model = make_tiny_llama()
    cache = enable_adms_llm(model, ADMSConfig.adm_plus_plus(**settings, replay_budget=4, enable_recall=True, recall_rank=4))
    stream(model, token_ids(300), cache, chunk=16)
    return cache


def test_a_config_names_what_differs_from_the_defaults_and_can_be_read_back():
    assert repr(ADMSConfig()) == "ADMSConfig()"
    assert repr(ADMSConfig(recent_size=8, compressor_type="vq")) == "ADMSConfig(recent_size=8, compressor_type='vq')"
    for config in (ADMSConfig.adm_plus_plus(rank=3), ADMSConfig(enable_dual_fidelity=True, sketch_budget=0)):
        assert eval(repr(config)) == config  # noqa: S307


def test_a_cache_shows_in_one_line_what_it_saw_and_its_settings():
    assert repr(ADMSKVCache(ADMSConfig(rank=4))) == "ADMSKVCache(seen=0, layers=0, config=ADMSConfig(rank=4))"
    assert repr(filled()).startswith("ADMSKVCache(seen=300, layers=")


def test_the_table_of_a_notebook_says_what_the_cache_says():
    cache = filled()
    rows = dict(Cells(cache._repr_html_()).rows)
    report = cache.memory_report()
    archive = report["archive"] + report["index"]
    assert rows["tokens seen"] == "300"
    assert rows["held by a head"] == f"{cache.held_tokens} of at most {cache.config.expected_max_tokens}"
    tiers = {name[-len(tier) :]: float(value) for name, value in rows.items() for tier in ("recent", "sink") if tier in name}
    assert tiers["sink"] == 4
    assert rows["bytes"] == format_bytes(cache.nbytes - archive)
    assert format_bytes(archive) in rows["archive"]
    assert f"{cache.stats['archived_tokens']:,}" in rows["archive"]
    low, high = (int(found) for found in re.findall(r"\d+", rows["budgets of heads"])[:2])
    assert low == min(cache.controller_budgets.values()) and high == max(cache.controller_budgets.values())
    assert rows["recent_size"] == "24" and "start_size" not in rows


def test_an_empty_cache_has_a_table_too():
    assert dict(Cells(ADMSKVCache(ADMSConfig())._repr_html_()).rows)["tokens seen"] == "0"


def test_the_table_is_small_escaped_and_needs_nothing_from_elsewhere(monkeypatch):
    cache = filled()
    monkeypatch.setattr(ADMSConfig, "changed", lambda self: {"compressor_type": "<script>alert(1)</script>"})
    text = cache._repr_html_()
    assert len(text) < 8192
    assert "<script" not in text and "&lt;script&gt;" in text
    for tag, attributes in Cells(text).used:
        assert tag in ("table", "caption", "tr", "td", "span", "div")
        assert set(attributes) <= {"style"} and "url" not in attributes.get("style", "")
