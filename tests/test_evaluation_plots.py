"""The pictures: a method keeps its colour, what is drawn is what the cache holds, and what was recalled is lit."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import make_tiny_llama, stream, token_ids

from streaming_llm import ADMSConfig, ADMSKVCache, enable_adms_llm
from streaming_llm.evaluation import METHODS, plots
from streaming_llm.evaluation.pictures import Pictures

matplotlib = pytest.importorskip("matplotlib.figure")


class Words:
    """A tokenizer that only decodes."""

    def decode(self, ids):
        return "".join(f" <{token}>" for token in ids)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = matplotlib.Figure.savefig
    monkeypatch.setattr(matplotlib.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


@pytest.fixture(scope="module")
def read():
    """A cache that read 300 tokens, and what was watched meanwhile."""
    settings = {"recent_size": 24, "compressed_budget": 16, "compression_interval": 16, "rank": 4, "sketch_budget": 4}
    model = make_tiny_llama()
    settings |= {"replay_budget": 4, "enable_recall": True, "recall_rank": 4, "recall_budget": 8}
    cache = enable_adms_llm(model, ADMSConfig.adm_plus_plus(**settings))
    watch = plots.Watch()
    for chunk in token_ids(300).split(16, dim=1):
        stream(model, chunk, cache, chunk=16)
        watch.sample(cache)
    return cache, watch


def test_every_method_has_one_look_of_its_own_whatever_is_drawn_beside_it():
    assert set(METHODS) <= set(plots.METHOD_LOOKS)
    assert len(set(plots.METHOD_LOOKS.values())) == len(plots.METHOD_LOOKS)
    alone, beside = plots.line_looks(["adms"]), plots.line_looks(["mine", "full", "other", "adms"])
    assert alone["adms"] == beside["adms"]
    looks = [(look["color"], look["linestyle"]) for look in beside.values()]
    assert len(set(looks)) == 4
    assert not {looks[0], looks[2]} & set(plots.METHOD_LOOKS.values())


def test_colours_differ_in_lightness_too_where_they_are_drawn_side_by_side():
    def lightness(colour):
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    order = list(plots.TIER_COLOURS.values())
    assert set(order) <= set(plots.COLOURS)
    for one, other in itertools.pairwise(order):
        assert abs(lightness(one) - lightness(other)) > 30, (one, other)


def test_the_memory_map_draws_every_token_held_at_its_layer_head_and_tier(read, drawn, tmp_path):
    cache, _ = read
    plots.plot_memory_map(tmp_path / "map.png", cache, "A title")
    numbers, counts = plots.tiers_by_head(cache)
    held = torch.stack([layer.held.valid[0].sum(-1) for layer in cache.layers])
    assert numbers == list(range(len(cache.layers)))
    assert counts.sum(-1).tolist() == held.tolist()
    left, right = drawn[0].axes
    assert sum(bar.get_width() for bar in left.patches) == held.sum()
    assert sum(len(dots.get_offsets()) for dots in right.collections) == held.sum()
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_budgets_and_energies_are_drawn_for_every_head_and_sample(read, drawn, tmp_path):
    cache, watch = read
    assert watch.tokens[-1] == 300
    assert {head: series[-1] for head, series in watch.budgets.items()} == dict(cache.controller_budgets.items())
    assert all(len(series) == len(watch.tokens) for series in (*watch.budgets.values(), *watch.energies.values()))
    plots.plot_watch(tmp_path / "budgets.png", watch)
    images = [axes.collections[0].get_array() for axes in drawn[0].axes[:2]]
    assert [image.shape for image in images] == [(len(watch.budgets), len(watch.tokens))] * 2
    assert images[0][:, -1].tolist() == [watch.budgets[head][-1] for head in sorted(watch.budgets)]


def test_what_the_last_step_recalled_is_lit_in_the_text(read, drawn, tmp_path):
    cache, _ = read
    passages = plots.read_now(cache, Words(), most=2, beside=3)
    assert len(passages) == 2
    seen = token_ids(300)[0].tolist()
    for passage in passages:
        for number, (piece, weight) in enumerate(passage.pieces):
            assert piece == f" <{seen[passage.first + number]}>"
            read_here = any(
                passage.first + number in cache.recalled(layer, head)[0].tolist() for layer in range(2) for head in range(2)
            )
            assert bool(weight) == read_here
    text = plots.reading_html(passages)
    assert "&lt;" in text and " <" not in text.replace(" <span", "")
    shares = [weight for passage in passages for _, weight in passage.pieces]
    assert text.count("<span") == sum(weight >= plots.LEAST_LIT * max(shares) for weight in shares) > 0
    plots.plot_reading(tmp_path / "reading.png", passages)
    assert len(drawn[0].axes[0].patches) == text.count("<span")


def test_what_can_t_be_drawn_is_said(tmp_path):
    cache = ADMSKVCache(ADMSConfig())
    with pytest.raises(ValueError, match="cache holds no token"):
        plots.plot_memory_map(tmp_path / "map.png", cache)
    with pytest.raises(ValueError, match="watch holds no budget"):
        plots.plot_watch(tmp_path / "budgets.png", plots.Watch())
    assert plots.reading_html([]) == "<p>nothing was recalled in the last pass</p>"
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_every_picture(tiny_model_folder, tmp_path):
    pytest.importorskip("rich")
    argv = ["--model_name_or_path", str(tiny_model_folder), "--device", "cpu", "--num_eval_tokens", "300", "--rank", "4"]
    argv += ["--recent_size", "24", "--compressed_budget", "12", "--sketch_budget", "8", "--replay_budget", "4"]
    argv += ["--compression_interval", "16", "--recall_rank", "4", "--chunk_size", "16", "--output_dir", str(tmp_path)]
    assert Pictures.main(argv) == 0
    names = {"memory_map.png", "budgets.png", "reading.png", "results.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert Pictures.main([*argv, "--method", "h2o"]) == 2
