"""Judges: an endpoint on this machine that misbehaves, and recorded judgments."""

from __future__ import annotations

import time

import pytest

from basisadapt import InputError
from basisadapt.tasks.judge import ATTEMPTS, MAX_BYTES, EndpointJudge, Judge, RecordedJudge, configured_judge
from tests.tasks.endpoint import says

ASKED = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "An answer."}]
KEY = "sk-secret"


def judge(endpoint, **values):
    return EndpointJudge(endpoint.url, "tester", **{"key": KEY, "pause": 0.001, **values})


def test_what_is_asked(endpoint):
    endpoint.replies = [says("Rating: [[7]]")]
    assert judge(endpoint).ask(ASKED) == "Rating: [[7]]"
    ((path, headers, body),) = endpoint.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {"model": "tester", "messages": ASKED, "temperature": 0, "max_tokens": 2048}


def test_without_a_key_none_is_sent(endpoint):
    endpoint.replies = [says("ok")]
    judge(endpoint, key="").ask(ASKED)
    assert "Authorization" not in endpoint.requests[0][1]


@pytest.mark.parametrize(
    "trouble",
    [
        (429, "slow down"),
        (500, ""),
        (503, "<html>"),
        (200, "no json"),
        (200, "[]"),
        (200, '{"choices": []}'),
        (200, '{"choices": [{"message": {"content": null}}]}'),
    ],
)
def test_what_may_pass_is_tried_again(endpoint, trouble):
    endpoint.replies = [trouble, trouble, says("ok")]
    assert judge(endpoint).ask(ASKED) == "ok"
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize("trouble", [(429, f"{KEY} is\nover its quota"), (200, "no json")])
def test_it_gives_up_at_last(endpoint, trouble):
    endpoint.replies = [trouble]
    with pytest.raises(InputError, match=f"judge 'tester' gave no answer in {ATTEMPTS} attempts") as raised:
        judge(endpoint).ask(ASKED)
    assert len(endpoint.requests) == ATTEMPTS
    assert KEY not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_refusal_is_not_repeated_and_hides_the_key(endpoint):
    endpoint.replies = [(401, f"Incorrect key: {KEY}")]
    with pytest.raises(
        InputError, match=r"judge 'tester' refuses: HTTP 401 Unauthorized Incorrect key: \*\*\*"
    ) as raised:
        judge(endpoint).ask(ASKED)
    assert len(endpoint.requests) == 1
    assert KEY not in str(raised.value)
    assert KEY not in repr(judge(endpoint))


def test_no_redirection_takes_the_key_along(endpoint):
    endpoint.replies = [(302, "", ("Location", f"{endpoint.url}/elsewhere")), says("ok")]
    with pytest.raises(InputError, match="refuses: HTTP 302"):
        judge(endpoint).ask(ASKED)
    assert len(endpoint.requests) == 1


def test_retry_after_is_heard(endpoint, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    endpoint.replies = [(429, "", ("Retry-After", "7")), (429, "", ("Retry-After", "3600")), (429, ""), says("ok")]
    assert judge(endpoint, pause=2.0).ask(ASKED) == "ok"
    assert [pause for pause in slept if pause] == [7, 60, 8]


def test_silence_is_not_waited_for(endpoint):
    endpoint.replies, endpoint.sleep = [says("late")], 0.5
    with pytest.raises(InputError, match="timed out"):
        judge(endpoint, timeout=0.02).ask(ASKED)


def test_nobody_there(endpoint):
    with pytest.raises(InputError, match="gave no answer"):
        EndpointJudge("http://127.0.0.1:1/v1", "tester", pause=0.001).ask(ASKED)


def test_only_http():
    with pytest.raises(InputError, match="http:// or https://, got 'file:///etc/passwd'"):
        EndpointJudge("file:///etc/passwd", "tester")


@pytest.mark.parametrize(
    "rest", ["me:word12@host/v1", "host/v1?key=word12", "me@corp:word12@host", "me/c:word12@host/v1"]
)
def test_an_address_holds_no_secret(rest):
    with pytest.raises(InputError, match="no user, password, query or space: the key goes into") as raised:
        EndpointJudge(f"https://{rest}", "tester")
    assert "word12" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["https://api.openai.com/v1", "http://[::1]:8000", "http://host:80/a/b/", "https://host"]
)
def test_addresses(url):
    assert EndpointJudge(url, "tester").url == url


def test_space_around_the_key_is_none_of_it(endpoint):
    endpoint.replies = [says("ok")]
    assert judge(endpoint, key=f" {KEY}\r\n").ask(ASKED) == "ok"
    assert endpoint.requests[0][1]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", ["sk-two words", "sk-two\nlines", "sk-schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused(key):
    with pytest.raises(InputError, match="BASISADAPT_JUDGE_KEY must be one word of ASCII") as raised:
        EndpointJudge("http://127.0.0.1:1", "tester", key)
    assert "sk-" not in str(raised.value)


@pytest.mark.parametrize(
    ("body", "why"),
    [("x" * (MAX_BYTES + 1), "a reply of more than 1,048,576 bytes"), ("[" * 200_000, "recursion depth")],
)
def test_a_reply_that_fills_the_memory_is_none(endpoint, body, why):
    endpoint.replies = [(200, body), says("ok")]
    assert judge(endpoint).ask(ASKED) == "ok"
    endpoint.replies = [(200, body)]
    with pytest.raises(InputError, match=why):
        judge(endpoint).ask(ASKED)


def test_the_key_is_not_in_what_the_judge_says(endpoint, tmp_path):
    endpoint.replies = [says(f"With {KEY}: [[7]]")]
    assert RecordedJudge(tmp_path / "said.jsonl", "tester", judge(endpoint)).ask(ASKED) == "With ***: [[7]]"
    assert KEY not in (tmp_path / "said.jsonl").read_text()


class Counting(Judge):
    name = "tester"

    def __init__(self):
        self.asked = 0

    def ask(self, messages):
        self.asked += 1
        return f"[[{self.asked}]]"


def test_judgements_are_recorded_and_asked_once(tmp_path):
    path, behind = tmp_path / "new" / "judgements.jsonl", Counting()
    first = RecordedJudge(path, "tester", behind)
    assert [first.ask(ASKED), first.ask(ASKED[:1]), first.ask(ASKED)] == ["[[1]]", "[[2]]", "[[1]]"]
    assert behind.asked == 2
    alone = RecordedJudge(path, "tester")
    assert [alone.ask(ASKED), alone.ask(ASKED[:1])] == ["[[1]]", "[[2]]"]
    with pytest.raises(InputError, match=r"has no judgment by 'tester' of the message that ends in 'Unseen\.'"):
        alone.ask([{"role": "user", "content": "Unseen."}])
    with pytest.raises(InputError, match="no judgment by 'other'"):
        RecordedJudge(path, "other").ask(ASKED)


def test_a_line_that_was_cut_off_is_asked_again(tmp_path):
    path = tmp_path / "judgements.jsonl"
    RecordedJudge(path, "tester", Counting()).ask(ASKED)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(InputError, match=r"judgements.jsonl, line 1: expected an object with judge, messages and text"):
        RecordedJudge(path, "tester")
    behind = Counting()
    again = RecordedJudge(path, "tester", behind)
    assert [again.ask(ASKED), again.ask(ASKED[:1])] == ["[[1]]", "[[2]]"]
    assert RecordedJudge(path, "tester", behind).ask(ASKED) == "[[1]]"
    assert behind.asked == 2
    assert path.read_bytes().endswith(b"\n")


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match="no recorded judgments in"):
        RecordedJudge(tmp_path / "none.jsonl", "tester")
    with pytest.raises(InputError, match="cannot be read"):
        RecordedJudge(tmp_path, "tester")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be read: Not a directory"):
        RecordedJudge(tmp_path / "file" / "judgements.jsonl", "tester", Counting()).ask(ASKED)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in ("URL", "MODEL", "KEY", "DIR"):
        monkeypatch.delenv(f"BASISADAPT_JUDGE_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda **values: [monkeypatch.setenv(f"BASISADAPT_JUDGE_{name}", value) for name, value in values.items()]


def test_the_judge_of_the_environment(environment, endpoint, tmp_path):
    endpoint.replies = [says("[[3]]")]
    environment(URL=endpoint.url, MODEL="tester", KEY=KEY)
    assert configured_judge().name == "tester"
    assert not list(tmp_path.iterdir())
    assert configured_judge().ask(ASKED) == "[[3]]"
    assert KEY not in (tmp_path / "mt_bench" / "judgements.jsonl").read_text()
    environment(URL="", DIR=str(tmp_path / "mt_bench"))
    assert configured_judge().ask(ASKED) == "[[3]]"
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("values", [{}, {"URL": "http://127.0.0.1:1"}, {"MODEL": "tester"}])
def test_no_judge_is_refused(environment, values):
    environment(**values)
    with pytest.raises(InputError, match="MT-Bench needs a judge: set BASISADAPT_JUDGE_URL"):
        configured_judge()


def test_a_place_that_cannot_be_written_is_refused(environment, tmp_path):
    (tmp_path / "file").write_text("")
    environment(URL="http://127.0.0.1:1", MODEL="tester", DIR=str(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match="cannot be written: see"):
        configured_judge()
