import asyncio
import contextlib
import gc
import threading
import time
import weakref

import pytest

from bitgrain.engine import LLM, Engine, EngineOptions, SamplingParams
from bitgrain.errors import ConflictingConfigError, PromptTooLongError, RequestError, RunError
from tests.engine.fakes import BOS, EOS, VOCAB, FakeModel, byte_backend, byte_tokenizer, ids_of

TEXT = "naïve 東京 answer: 42\nEND of it"


@pytest.fixture
def start():
    """Make engines that are closed at the end of the test."""
    engines = []

    def make(model=None, tokenizer=True, **options):
        engines.append(Engine(model or FakeModel(), byte_tokenizer() if tokenizer else None, EngineOptions(**options)))
        return engines[-1]

    yield make
    for engine in engines:
        if engine.model.gate:
            engine.model.gate.set()
        engine.close()


def speaking(text=TEXT, **settings):
    return FakeModel(script=ids_of(text), **settings)


def run(engine, text="hello", **params):
    return engine.submit(engine.tokenizer.encode(text), SamplingParams(**params)).collect()


def test_completion_ends_at_the_end_token_which_counts_but_shows_nothing(start):
    whole = run(start(speaking()), temperature=0)
    assert (whole.text, whole.finish.reason, whole.finish.matched) == (TEXT, "stop", EOS)
    assert whole.token_ids == [*ids_of(TEXT), EOS]


def test_completion_of_max_tokens_ends_with_length(start):
    whole = run(start(speaking()), temperature=0, max_tokens=3)
    # the third token is the first half of ï: at the end even an incomplete character is shown
    assert (whole.token_ids, whole.finish.reason, whole.text) == (ids_of(TEXT)[:3], "length", "na\ufffd")


def test_stream_pieces_are_whole_characters_and_join_to_the_text(start):
    engine = start(speaking())
    deltas = list(engine.submit(ids_of("x"), SamplingParams(temperature=0)))
    assert "".join(d.text for d in deltas) == TEXT
    assert not any("\ufffd" in d.text for d in deltas)
    assert len([d for d in deltas if d.text]) == len(TEXT)
    assert [d.finish is None for d in deltas] == [True] * (len(deltas) - 1) + [False]


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("END", "naïve 東京 answer: 42\n"),
        ("京 a", "naïve 東"),
        (["zzz", "42\nE"], "naïve 東京 answer: "),
        ("absent", TEXT),
        ("END of it!", TEXT),
    ],
)
def test_stop_string_across_tokens_is_cut_off_and_never_shown_in_part(start, stop, shown):
    engine = start(speaking())
    deltas = list(engine.submit(ids_of("x"), SamplingParams(temperature=0, stop=stop)))
    assert "".join(d.text for d in deltas) == shown
    finish = deltas[-1].finish
    assert finish.matched == (EOS if shown == TEXT else stop if isinstance(stop, str) else "42\nE")


def test_stop_token_ends_even_when_end_tokens_are_ignored(start):
    engine = start(FakeModel(script=[*ids_of("a"), EOS, *ids_of("b!c")]))
    whole = engine.submit(ids_of("x"), SamplingParams(temperature=0, ignore_eos=True, stop_token_ids=ids_of("!"))).collect()
    assert (whole.text, whole.finish.matched) == ("ab", ids_of("!")[0])


def test_prompts_are_read_in_chunks_mixed_with_running_sequences(start):
    model = FakeModel(gate=threading.Event())
    engine = start(model, chunked_prefill_size=8)
    requests = [engine.submit([BOS] * n, SamplingParams(max_tokens=4, ignore_eos=True)) for n in (3, 20, 2)]
    while engine.statistics.waiting or engine.statistics.running < 1:
        time.sleep(0.001)
    model.gate.set()
    for request in requests:
        assert len(request.collect().token_ids) == 4
    sizes = [b for b in model.batches if b != [3]]  # the first may have started before the others came
    assert sizes[0] in ([3, 5], [1, 8])
    assert all(sum(size for size in batch if size > 1) <= 8 for batch in model.batches)
    assert any(1 in batch and max(batch) > 1 for batch in model.batches)
    assert sum(map(sum, model.batches)) == 25 + 3 * 3


def test_more_requests_than_places_wait_in_order(start):
    model = FakeModel(gate=threading.Event())
    engine = start(model, max_running_requests=2)
    requests = [engine.submit(ids_of("p" * (i + 1)), SamplingParams(max_tokens=2, ignore_eos=True)) for i in range(5)]
    model.gate.set()
    for request in requests:
        request.collect()
    assert max(map(len, model.batches)) == 2
    ends = [request.finished_at for request in requests]
    assert ends == sorted(ends)


def test_result_does_not_depend_on_the_batch(start):
    params = [SamplingParams(seed=i, max_tokens=12, temperature=0.9, top_p=0.95, top_k=40) for i in range(6)]
    prompts = [ids_of("prompt" * (i + 1)) for i in range(6)]
    alone = start(chunked_prefill_size=4, max_running_requests=1)
    one_by_one = [alone.submit(p, s).collect().token_ids for p, s in zip(prompts, params, strict=True)]
    together = start()
    requests = [together.submit(p, s) for p, s in zip(prompts, params, strict=True)]
    assert [r.collect().token_ids for r in requests] == one_by_one
    assert len({tuple(ids) for ids in one_by_one}) == 6


def test_unseeded_results_differ(start):
    engine = start()
    assert run(engine, max_tokens=16, ignore_eos=True).token_ids != run(engine, max_tokens=16, ignore_eos=True).token_ids


def test_logprobs_come_with_every_token(start):
    whole = run(start(speaking("ab")), temperature=0, logprobs=3)
    assert [entry.token_id for entry in whole.logprobs] == whole.token_ids
    assert all(len(entry.top) == 3 and entry.top[0] == (entry.token_id, entry.logprob) for entry in whole.logprobs)


def test_cancelled_request_ends_and_frees_its_place(start):
    model = FakeModel(gate=threading.Event())
    engine = start(model, max_running_requests=1)
    first = engine.submit(ids_of("a"), SamplingParams(max_tokens=400, ignore_eos=True))
    second = engine.submit(ids_of("b"), SamplingParams(max_tokens=2, ignore_eos=True))
    third = engine.submit(ids_of("c"), SamplingParams(max_tokens=2, ignore_eos=True))
    third.cancel()
    model.gate.set()
    first.next_delta(5)
    first.cancel()
    assert first.collect().finish.reason == "cancelled"
    assert second.collect().finish.reason == "length"
    assert third.collect().finish.reason == "cancelled"
    assert engine.statistics.finished == {"cancelled": 2, "length": 1}


def test_error_in_a_step_ends_its_requests_and_the_engine_goes_on(start):
    cursed = ids_of("!")[0]
    engine = start(FakeModel(script=ids_of("fine"), fail_on=cursed))
    bad = engine.submit([cursed], SamplingParams(temperature=0)).collect()
    assert bad.finish.reason == "error"
    assert isinstance(bad.finish.error, RunError) and "is cursed" in bad.finish.error.found
    assert run(engine, temperature=0).text == "fine"


def test_error_in_a_batch_ends_only_the_request_that_causes_it(start):
    cursed = ids_of("!")[0]
    model = FakeModel(script=ids_of("fine"), fail_on=cursed, gate=threading.Event())
    engine = start(model)
    first = engine.submit(ids_of("a"), SamplingParams(temperature=0))
    requests = [engine.submit(p, SamplingParams(temperature=0)) for p in (ids_of("bb"), [cursed], ids_of("c"))]
    model.gate.set()
    assert [r.collect().text for r in (first, requests[0], requests[2])] == ["fine"] * 3
    assert requests[1].collect().finish.reason == "error"
    assert engine.statistics.finished == {"stop": 3, "error": 1}


def test_tokenizer_that_fails_ends_its_request(start, monkeypatch):
    engine = start(speaking("ab"))
    monkeypatch.setattr(engine.tokenizer, "decode", lambda ids: 1 / 0)
    assert "ZeroDivisionError" in run(engine, temperature=0).finish.error.found
    monkeypatch.undo()
    assert run(engine, temperature=0).text == "ab"


def test_nan_logits_end_one_request_of_the_batch(start):
    poison = ids_of("!")[0]
    model = FakeModel(script=ids_of("fine"), nan_on=poison, gate=threading.Event())
    engine = start(model)
    requests = [engine.submit(p, SamplingParams(temperature=0)) for p in (ids_of("a"), [poison], ids_of("b"))]
    model.gate.set()
    good, bad, also_good = [r.collect() for r in requests]
    assert (good.text, also_good.text) == ("fine", "fine")
    assert "NaN" in bad.finish.error.found


def test_cache_that_cannot_be_made_ends_its_request_only(start):
    engine = start(FakeModel(script=ids_of("fine"), fail_caches=1))
    assert "no room for a cache" in run(engine, temperature=0).finish.error.found
    assert run(engine, temperature=0).text == "fine"


@pytest.mark.parametrize("prompt", [[], [VOCAB], [-1], [1.5], [True], ["a"]], ids=str)
def test_prompt_that_cannot_be_is_refused(start, prompt):
    with pytest.raises(RequestError, match="prompt"):
        start().submit(prompt)


def test_stated_tokens_that_do_not_fit_are_refused_with_the_numbers(start):
    engine = start(FakeModel(max_context=16))
    with pytest.raises(
        PromptTooLongError, match=r"prompt of 10 tokens and 7 tokens to generate are 17 tokens.*context is 16(.|\n)*at most 6"
    ):
        engine.submit([BOS] * 10, SamplingParams(max_tokens=7))
    with pytest.raises(PromptTooLongError, match="shorten the prompt by 1 or more"):
        engine.submit([BOS] * 16, SamplingParams(max_tokens=None))


@pytest.mark.parametrize("params", [SamplingParams(ignore_eos=True), SamplingParams(max_tokens=None, ignore_eos=True)])
def test_unstated_tokens_use_the_room_that_is_left(start, params):
    engine = start(FakeModel(max_context=16))
    assert len(engine.submit([BOS] * 10, params).collect().token_ids) == 6


def test_stop_string_without_tokenizer_is_refused(start):
    engine = start(tokenizer=False)
    with pytest.raises(RequestError, match="stop"):
        engine.submit([BOS], SamplingParams(stop="x"))
    assert engine.submit([BOS], SamplingParams(max_tokens=2)).collect().text == ""


def test_wrong_tokenizer_is_refused_at_start():
    with pytest.raises(ConflictingConfigError, match="vocabulary of 100"):
        Engine(FakeModel(vocab_size=100), byte_tokenizer())


@pytest.mark.parametrize("options", [{"max_running_requests": 0}, {"chunked_prefill_size": 1.5}])
def test_impossible_engine_option_is_refused(options):
    with pytest.raises(RequestError, match=next(iter(options))):
        EngineOptions(**options)


def test_closing_ends_everything_and_refuses_more():
    model = FakeModel(gate=threading.Event())
    engine = Engine(model, None, EngineOptions(max_running_requests=1))
    requests = [engine.submit([BOS], SamplingParams(max_tokens=300, ignore_eos=True)) for _ in range(2)]
    closer = threading.Thread(target=engine.close)
    closer.start()
    model.gate.set()
    closer.join(10)
    assert [r.collect().finish.reason for r in requests] == ["cancelled", "cancelled"]
    assert not engine.is_alive
    with pytest.raises(RunError, match="has stopped"):
        engine.submit([BOS])
    engine.close()


def test_waiting_reader_times_out(start):
    model = FakeModel(gate=threading.Event())
    request = start(model).submit([BOS])
    with pytest.raises(TimeoutError):
        request.next_delta(0.02)


def test_coroutines_read_streams_side_by_side(start):
    engine = start(speaking())

    async def read(prompt):
        request = engine.submit(ids_of(prompt), SamplingParams(temperature=0))
        return "".join([delta.text async for delta in request])

    async def read_all():
        return await asyncio.gather(*(read("x" * (i + 1)) for i in range(4)))

    assert asyncio.run(read_all()) == [TEXT] * 4


def test_reader_whose_event_loop_is_gone_does_not_stop_the_engine(start):
    model = FakeModel(gate=threading.Event(), script=ids_of("a" * 50))
    engine = start(model)
    request = engine.submit(ids_of("x"), SamplingParams(temperature=0))

    async def begin():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(anext(aiter(request)), 0.05)

    asyncio.run(begin())
    model.gate.set()
    assert run(engine, temperature=0).finish.reason == "stop"
    assert request.is_cancelled


# ---- LLM ----


def test_llm_completes_prompts_in_order():
    with LLM.from_parts(speaking(), byte_tokenizer()) as llm:
        texts, tokens = llm.generate(["a", [BOS]], [SamplingParams(temperature=0), SamplingParams(temperature=0, max_tokens=2)])
    assert (texts.prompt, texts.text, texts.prompt_tokens, texts.completion_tokens) == ("a", TEXT, 2, len(ids_of(TEXT)) + 1)
    assert (tokens.prompt, tokens.token_ids, tokens.finish_reason) == (None, tuple(ids_of(TEXT)[:2]), "length")


def test_llm_takes_one_text_or_one_list_of_tokens():
    with LLM.from_parts(speaking(), byte_tokenizer()) as llm:
        assert [c.text for c in llm.generate("a", SamplingParams(temperature=0))] == [TEXT]
        assert [c.prompt_tokens for c in llm.generate([BOS, BOS], SamplingParams(temperature=0))] == [2]
        assert llm.generate([]) == []


def test_llm_choices_with_a_seed_differ_and_repeat():
    with LLM.from_parts(FakeModel(), byte_tokenizer()) as llm:
        params = SamplingParams(n=3, seed=2**63 - 1, max_tokens=8)
        first, again = ([c.token_ids for c in llm.generate("a", params)] for _ in range(2))
    assert first == again and len(set(first)) == 3


def test_llm_chat_renders_the_template():
    with LLM.from_parts(speaking(), byte_tokenizer()) as llm:
        done = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(temperature=0))
    assert (done.text, done.prompt_tokens) == (TEXT, len("[user] hi[assistant]"))


def test_llm_refuses_all_when_one_prompt_is_wrong():
    model = FakeModel()
    with LLM.from_parts(model, byte_tokenizer()) as llm:
        with pytest.raises(RequestError, match="sampling_params"):
            llm.generate(["a", "b"], [SamplingParams()])
        with pytest.raises(RequestError, match="prompts"):
            llm.generate(["a", 3.5])
        with pytest.raises(PromptTooLongError):
            llm.generate(["a", "b" * 600])


def test_llm_raises_the_error_of_a_failed_step():
    cursed = ids_of("!")[0]
    with LLM.from_parts(FakeModel(fail_on=cursed), byte_tokenizer()) as llm, pytest.raises(RunError, match="cursed"):
        llm.generate("oh!")


def test_stream_that_is_left_early_is_cancelled():
    with LLM.from_parts(FakeModel(max_context=10**6), byte_tokenizer()) as llm:
        stream = llm.stream("a", SamplingParams(max_tokens=None, ignore_eos=True))
        next(stream)
        stream.close()
        deadline = time.monotonic() + 5
        while llm.engine.statistics.finished["cancelled"] < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert llm.engine.statistics.finished["cancelled"] == 1


def test_forgotten_llm_stops_its_thread():
    llm = LLM.from_parts(FakeModel(), byte_tokenizer())
    thread, gone = llm.engine._thread, weakref.ref(llm)
    del llm
    gc.collect()
    thread.join(5)
    assert gone() is None and not thread.is_alive()


def test_llm_loads_tokenizer_and_model_from_a_folder(tmp_path, monkeypatch):
    import torch
    from safetensors.torch import save_file

    import bitgrain

    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    seen = {}
    monkeypatch.setattr(bitgrain, "load_model", lambda path, **options: seen.update(options, path=path) or speaking(), raising=False)
    with LLM(tmp_path, max_running_requests=3, dtype="float32") as llm:
        assert llm.generate("a", SamplingParams(temperature=0))[0].text == TEXT
        assert llm.engine.options.max_running_requests == 3
    assert seen == {"path": tmp_path, "dtype": "float32"}
