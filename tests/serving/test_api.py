"""The API as OpenAI's own client sees it."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from servers import Running, running
from signbit.serving.detokenize import decode
from tiny import TEXT, tokenizer

PROMPT = TEXT[:60]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def complete(client: openai.OpenAI, **options: Any) -> Any:
    return client.completions.create(
        **{"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 20, **options}
    )


def chat(client: openai.OpenAI, **options: Any) -> Any:
    usual: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 20}
    return client.chat.completions.create(**{"model": "tiny", **usual, **options})


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other/one' is not served"):
        client.models.retrieve("other/one")


def test_completion_is_what_generate_writes(client: openai.OpenAI, server: Running) -> None:
    ids = tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        tokens = server.engine.forward.model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=2)
    written = tokens[0, ids.shape[1] :].tolist()
    answer = complete(client)
    assert answer.choices[0].text == decode(tokenizer(), written)
    assert answer.choices[0].finish_reason == ("stop" if written[-1] == 1 else "length")
    assert answer.usage.prompt_tokens == ids.shape[1]
    assert answer.usage.completion_tokens == len(written)


def test_streams_add_up(client: openai.OpenAI) -> None:
    whole = complete(client, n=2, temperature=1, seed=5)
    texts: dict[int, str] = {0: "", 1: ""}
    finishes = {}
    *chunks, last = list(
        complete(client, n=2, temperature=1, seed=5, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks:
        assert chunk.usage is None
        texts[chunk.choices[0].index] += chunk.choices[0].text
        finishes[chunk.choices[0].index] = chunk.choices[0].finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert finishes == {choice.index: choice.finish_reason for choice in whole.choices}
    assert texts[0] != texts[1]
    assert (last.choices, last.usage) == ([], whole.usage)


def test_chat(client: openai.OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    prompt = "<s>user: Hello</s><s>"
    assert whole.usage.prompt_tokens == len(tokenizer()(prompt)["input_ids"])
    assert (
        chat(client, messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]).usage == whole.usage
    )
    limited = chat(client, max_tokens=openai.omit, max_completion_tokens=3)
    assert limited.usage.completion_tokens <= 3


def test_seeds(client: openai.OpenAI) -> None:
    first, again, other = (complete(client, temperature=1.2, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert first == again != other


def test_stop_strings(client: openai.OpenAI) -> None:
    whole = complete(client, temperature=1, seed=5, max_tokens=40).choices[0].text
    stop = whole[7:10]  # across tokens
    expected = whole[: whole.index(stop)]
    answer = complete(client, temperature=1, seed=5, max_tokens=40, stop=["\0never", stop])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    streamed = complete(client, temperature=1, seed=5, max_tokens=40, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected


def test_logprobs_of_completions(client: openai.OpenAI, server: Running) -> None:
    answer = complete(client, echo=True, logprobs=2, max_tokens=5)
    found = answer.choices[0].logprobs
    ids = tokenizer()(PROMPT)["input_ids"]
    assert answer.choices[0].text.startswith(PROMPT)
    assert "".join(found.tokens[: len(ids)]) == PROMPT
    with torch.inference_mode():
        expected = server.engine.forward.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [float(expected[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(wanted, abs=1e-3)
    assert found.token_logprobs[len(ids)] == pytest.approx(float(expected[-1].max()), abs=1e-3)
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert token.startswith("bytes:") or answer.choices[0].text.startswith(token, offset)
    assert len(found.top_logprobs[3]) == 2
    only_read = complete(client, echo=True, logprobs=0, max_tokens=0)
    assert only_read.choices[0].text == PROMPT
    assert only_read.choices[0].logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=1e-3)


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert (
        b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == answer.choices[0].message.content
    )
    assert all(token.top_logprobs[0].logprob == pytest.approx(token.logprob) for token in content)  # greedy
    streamed = [chunk.choices[0].logprobs for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)]
    assert [token for one in streamed if one for token in one.content] == content


def test_many_prompts(client: openai.OpenAI) -> None:
    """Strings or token ids, more than there are slots; choices are numbered through."""
    prompts = [TEXT[i * 30 : i * 30 + 40] for i in range(6)]
    answer = complete(client, prompt=prompts, n=2, max_tokens=6)
    assert [choice.index for choice in answer.choices] == list(range(12))
    ids = [tokenizer()(prompt)["input_ids"] for prompt in prompts]
    assert [choice.text for choice in complete(client, prompt=ids, n=2, max_tokens=6).choices] == [
        choice.text for choice in answer.choices
    ]
    assert complete(client, prompt=ids[4], max_tokens=6).choices[0].text == answer.choices[8].text


def test_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, prompt=TEXT)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="ask for at most"):
        complete(client, max_tokens=10_000)
    answer = chat(client, max_tokens=openai.omit, temperature=1, seed=1)
    assert answer.usage.total_tokens <= 200
    assert answer.choices[0].finish_reason == ("length" if answer.usage.total_tokens == 200 else "stop")


def test_templates_may_refuse(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(openai.BadRequestError, match="the system prompt comes first"):
        chat(client, messages=messages)


def test_keys() -> None:
    with running(api_key="secret", slots=1) as server:
        good = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        assert complete(good, max_tokens=2).usage.completion_tokens
        bad = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret2", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            complete(bad)
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(server.url).status_code == 200


def test_pages(server: Running) -> None:
    page = httpx.get(server.url)
    assert "text/html" in page.headers["content-type"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not any(word in page.text for word in ("http://", "https://", "innerHTML"))  # nothing from elsewhere
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'signbit_requests_total{route="/health",status="200"}' in metrics
    assert "process_resident_memory_bytes" in metrics
    assert "CompletionRequest" in httpx.get(f"{server.url}/openapi.json").text
