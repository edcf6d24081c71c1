"""lm-eval's model `adms` on the tiny model: it scores and writes as `hf` does, and as the cache given by hand does."""

from __future__ import annotations

import functools
import inspect
import json
import sys

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from streaming_llm import ADMSConfig  # noqa: E402
from streaming_llm.evaluation import lm_eval as command  # noqa: E402
from streaming_llm.evaluation import ruler  # noqa: E402
from streaming_llm.evaluation.lm_eval_model import ADMSLM, ArgumentError  # noqa: E402
from streaming_llm.evaluation.methods import METHODS  # noqa: E402
from streaming_llm.evaluation.ruler import Ruler  # noqa: E402

SMALL = {"recent_size": 24, "compressed_budget": 12, "sketch_budget": 8, "replay_budget": 4, "rank": 4}
SMALL |= {"compression_interval": 16, "chunk_size": 16}
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife. "


def scoring(*pairs):
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


def writing(*texts, tokens=12):
    options = {"until": [], "max_gen_toks": tokens, "do_sample": False}
    return [Instance("generate_until", {}, (text, dict(options)), 0) for text in texts]


@pytest.fixture(scope="module")
def folder(tiny_model_folder, tmp_path_factory):
    """The tiny model with a tokenizer that has an end of sequence, which lm-eval's `hf` needs."""
    folder = tmp_path_factory.mktemp("with_an_end")
    AutoModelForCausalLM.from_pretrained(tiny_model_folder).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(2)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plain(folder):
    return HFLM(pretrained=folder, device="cpu", dtype="float32")


def test_with_the_full_cache_it_scores_and_writes_what_hf_does(folder, plain):
    model = ADMSLM(pretrained=folder, method="full", chunk_size=16, device="cpu")
    pairs = scoring((TEXT, "But"), (TEXT, "But a longer one"), ("", TEXT), (TEXT * 3, " x"))
    for found, expected in zip(model.loglikelihood(pairs), plain.loglikelihood(pairs), strict=True):
        assert found[0] == pytest.approx(expected[0], abs=1e-3)
        assert found[1] == expected[1]
    texts = [Instance("loglikelihood_rolling", {}, (TEXT * 4,), 0)]
    assert model.loglikelihood_rolling(texts) == pytest.approx(plain.loglikelihood_rolling(texts), abs=1e-3)
    assert model.generate_until(writing(TEXT, TEXT * 2)) == plain.generate_until(writing(TEXT, TEXT * 2))


def test_the_likeliest_continuation_is_known_for_one_and_any_other_is_not(folder, plain):
    model = ADMSLM(pretrained=folder, method="full", chunk_size=16, device="cpu")
    ids = torch.tensor([plain.tok_encode(TEXT)])
    said = plain.model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :].tolist()
    other = [*said[:2], (said[2] + 1) % 200 + 3]
    answers = model._loglikelihood_tokens([(None, ids[0].tolist(), said), (None, ids[0].tolist(), other)])
    assert [likeliest for _, likeliest in answers] == [True, False]


def test_a_bounded_cache_scores_what_it_scores_when_it_is_fed_by_hand(folder):
    model = ADMSLM(pretrained=folder, device="cpu", **SMALL)
    [(found, _)] = model.loglikelihood(scoring((TEXT * 4, TEXT)))
    context, continuation = model._encode_pair(TEXT * 4, TEXT)
    cache, rows = model.make_cache(), []
    with torch.no_grad():
        for part in (context, continuation[:-1]):
            for start in range(0, len(part), 16):
                ids = torch.tensor([part[start : start + 16]])
                rows.append(model.model(input_ids=ids, past_key_values=cache).logits[0])
    log_p = torch.cat(rows)[len(context) - 1 :].log_softmax(-1)
    expected = log_p.gather(-1, torch.tensor(continuation)[:, None]).sum()
    assert found == pytest.approx(float(expected), abs=1e-3)
    [(whole, _)] = ADMSLM(pretrained=folder, method="full", device="cpu").loglikelihood(scoring((TEXT * 4, TEXT)))
    assert abs(found - whole) > 0.1


def test_continuations_of_one_context_are_scored_as_each_alone(folder):
    model = ADMSLM(pretrained=folder, device="cpu", **SMALL)
    pairs = [(TEXT * 3, ending) for ending in ("But", TEXT, "a", TEXT + "z")]
    together = model.loglikelihood(scoring(*pairs))
    assert together == [model.loglikelihood(scoring(pair))[0] for pair in pairs]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_a_comparison_reads_past_the_trained_length(folder, method):
    # The byte-level tokens are more than the 4,096 positions of the model.
    text = TEXT * 36
    more = {"max_length": 6000} if method == "full" else {}
    model = ADMSLM(pretrained=folder, method=method, device="cpu", **{**SMALL, "chunk_size": 512}, **more)
    [(score, _)] = model.loglikelihood(scoring((text, "But")))
    assert score < 0
    assert len(model.tok_encode(text)) > 4096
    [said] = model.generate_until(writing(text, tokens=3))
    assert isinstance(said, str)


def test_what_is_written_is_what_generate_gives_with_the_cache_in_chunks(folder):
    model = ADMSLM(pretrained=folder, device="cpu", **SMALL)
    ids = torch.tensor([model.tok_encode(TEXT * 4)])
    said = model.model.generate(
        ids, past_key_values=model.make_cache(), prefill_chunk_size=16, max_new_tokens=8, do_sample=False
    )
    assert model.generate_until(writing(TEXT * 4, tokens=8)) == [model.tok_decode(said[0, ids.shape[1] :])]


def test_rows_of_a_batch_are_written_as_alone_where_their_chunks_are_the_same(folder):
    texts, given = [TEXT[:90], TEXT[:50]], SMALL | {"chunk_size": 1}
    alone = ADMSLM(pretrained=folder, device="cpu", **given).generate_until(writing(*texts))
    assert ADMSLM(pretrained=folder, device="cpu", batch_size=2, **given).generate_until(writing(*texts)) == alone


def test_only_what_keeps_its_positions_is_cut_at_the_trained_length(folder):
    assert ADMSLM(pretrained=folder, method="full", device="cpu").max_length == 4096
    assert ADMSLM(pretrained=folder, enable_pos_shift=False, device="cpu", **SMALL).max_length == 4096
    assert ADMSLM(pretrained=folder, device="cpu", **SMALL).max_length > 10**6
    assert ADMSLM(pretrained=folder, device="cpu", max_length=100, **SMALL).max_length == 100


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"method": "best"}, "method 'best' is not known; choose from full"),
        ({"recent_sise": 5}, "recent_sise=5 is not known: did you mean recent_size"),
        ({"recent_size": "many"}, "recent_size"),
        ({"chunk_size": 0}, "chunk_size=0 must be a whole number, at least 1"),
        ({"batch_size": "auto"}, "batch_size='auto' must be a whole number"),
        ({"backend": "seq2seq"}, "backend='seq2seq' can't be"),
        ({"sketch_budget": 400}, "leave nothing of the 256 middle tokens"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_is_loaded(given, told, monkeypatch):
    refuse = functools.wraps(HFLM.__init__)(lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(HFLM, "__init__", refuse)
    with pytest.raises(ArgumentError) as error:
        ADMSLM(pretrained="no/model", **given)
    assert told in str(error.value)


def test_a_setting_is_never_taken_for_an_argument_of_hf():
    assert not set(ADMSConfig.setting_names()) & set(inspect.signature(HFLM.__init__).parameters)


def test_the_command_gives_the_table_of_a_task(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    arguments = ",".join(f"{name}={value}" for name, value in {"pretrained": folder, "method": "tova", **SMALL}.items())
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_target: 0\ndoc_to_choice: ['yes', 'no']\n"
        "metric_list: [{metric: acc}]\n" % (tmp_path / "tiny.json")
    )
    (tmp_path / "tiny.json").write_text("\n".join(json.dumps({"text": TEXT * n}) for n in (1, 3)))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    tasks = ["--tasks", "tiny", "--include_path", str(tmp_path), "--device", "cpu"]
    assert command.main(["--model", "adms", "--model_args", arguments, *tasks]) == 0
    assert "|tiny " in capsys.readouterr().out
    assert sys.argv == ["pytest"]
    assert get_model("adms") is ADMSLM


def test_the_command_tells_a_wrong_argument_on_one_line(folder, capsys):
    tasks = ["--tasks", "arc_easy", "--device", "cpu"]
    assert command.main(["--model", "adms", "--model_args", f"pretrained={folder},methd=x", *tasks]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("adms-lm-eval: error: methd='x' is not known: did you mean method?")


def test_the_own_model_s_name_becomes_its_folder(monkeypatch):
    monkeypatch.setattr(command.models, "model_folder", lambda known: f"/{known.name}")
    assert command.with_own_model(["--model_args", "method=tova,pretrained=smollm2-135m-instruct,rank=4"]) == [
        "--model_args",
        "method=tova,pretrained=/smollm2-135m-instruct,rank=4",
    ]
    assert command.with_own_model(['{"pretrained": "gemma3-270m"}']) == ['{"pretrained": "/gemma3-270m"}']
    assert command.with_own_model(["pretrained=gemma3-270m-it"]) == ["pretrained=gemma3-270m-it"]


def test_the_sentence_tokenizer_is_fetched_when_a_text_is_cut_and_not_before(monkeypatch):
    nltk = pytest.importorskip("nltk")
    fetched = []
    monkeypatch.setattr(nltk, "download", lambda name: fetched.append(name))
    monkeypatch.setattr(nltk, "sent_tokenize", lambda text: text.split("."))
    before = nltk.download
    with command.tokenizer_on_demand():
        nltk.download("punkt_tab")
        assert fetched == []
        assert nltk.sent_tokenize("a.b") == ["a", "b"]
        assert fetched == ["punkt_tab"]
    assert nltk.download is before


# -- RULER -------------------------------------------------------------------------------------------------------------


def test_ruler_gives_a_table_of_tasks_that_fetch_nothing(folder, tmp_path, capsys, monkeypatch):
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("wonderwords")
    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("something was to be fetched"))
    settings = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    tasks = ["--tasks", "niah_single_1", "niah_multivalue_noise", "--methods", "full,adms_recall"]
    argv = ["--model_name_or_path", str(folder), "--device", "cpu", "--output_dir", str(tmp_path)]
    assert Ruler.main([*argv, *settings, *tasks, "--lengths", "2048", "--limit", "2", "--markdown"]) == 0
    assert "| method | length | single 1 | multivalue noise | mean | of full |" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(line["task"], line["method"]) for line in results] == [
        ("niah_single_1", "full"),
        ("niah_single_1", "adms_recall"),
        ("niah_multivalue_noise", "full"),
        ("niah_multivalue_noise", "adms_recall"),
    ]
    assert all(len(line["scores"]) == 2 for line in results)


def test_a_variant_hides_as_many_needles_as_its_task(folder):
    pytest.importorskip("wonderwords")
    for name, needles, asked in (("niah_multivalue_noise", 4, 4), ("niah_multikey_1_noise", 4, 1)):
        (task,) = ruler.load_task(name, 2048, str(folder), 0)["tasks"].values()
        doc = task.test_docs()[0]
        assert doc["input"].count("One of the special magic numbers for") == needles
        assert len(doc["outputs"]) == asked
        assert all(answer in doc["input"] for answer in doc["outputs"])


def test_the_score_is_the_share_of_what_was_asked_for_that_is_in_the_answer(folder, monkeypatch):
    pytest.importorskip("wonderwords")
    model = ADMSLM(pretrained=str(folder), device="cpu", **SMALL)
    task = ruler.load_task("niah_multivalue_noise", 2048, str(folder), 0)
    (inner,) = task["tasks"].values()
    docs = [inner.test_docs()[number]["outputs"] for number in (0, 1)]
    monkeypatch.setattr(model, "generate_until", lambda requests: [", ".join(docs[0]), docs[1][2]])
    found = ruler.score(model, task, "niah_multivalue_noise", 2048, "adms", 2)
    assert found.scores == (1.0, 0.25)
    assert found.mean == 0.625


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--tasks", "niah_single_2"], "tasks: 'niah_single_2' needs a download"),
        (["--tasks", "niah_zero"], "tasks: 'niah_zero' is not known"),
        (["--limit", "501"], "limit=501 is too large"),
        (["--limit", "0"], "limit=0 is too small"),
        (["--lengths", "100"], "lengths: 100 is too small"),
    ],
)
def test_ruler_tells_a_wrong_flag(argv, told, capsys):
    assert Ruler.main(argv) == 2
    assert told in capsys.readouterr().err
