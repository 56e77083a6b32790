"""A load on servers that play the API with known delays; sizes and prompts are exact."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from fake_server import Played, playing

from kvquant_hf.benchmark.load.answers import REFUSED, Answer, Arrival, most_at_once
from kvquant_hf.benchmark.load.client import Prompt, Target, _Stream, drive, send_times
from kvquant_hf.benchmark.load.gate import Verdict, judge_servers
from kvquant_hf.benchmark.load.rows import LoadRow, Turn, ratio_between, summarize_turns
from kvquant_hf.benchmark.load.table import load_table
from kvquant_hf.benchmark.status import FAILED, OK

Play = Callable[[str, Played], Target]

# -- arithmetic --------------------------------------------------------------------------------------------------------


def answer(*arrivals: tuple[float, int], tokens: int, sent: float = 0.0, place: int = 0) -> Answer:
    times = tuple(Arrival(*arrival) for arrival in arrivals)
    return Answer(place, OK, "", sent, times, times[-1].at_s, 10, tokens, "text")


def test_times_of_one_answer() -> None:
    one = answer((3.0, 1), (3.5, 1), (5.0, 2), tokens=4, sent=1.0)
    assert one.ttft_s == 2.0
    assert one.tpot_s == pytest.approx(2 / 3)
    assert one.itl_s == [0.5, 0.75, 0.75], "what came together shares the time"
    half = answer((3.0, 1), (5.0, 1), tokens=4)  # every other token has no text
    assert half.itl_s == [1.0]


def test_answers_at_once() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (9.0, 9.5)]
    assert most_at_once([answer((a, 1), (b, 1), tokens=2) for a, b in spans]) == 2, "one ends as another begins"
    assert most_at_once([]) == 0


def test_a_row_of_two_rounds() -> None:
    first = Turn([answer((1.0, 1), (2.0, 1), tokens=3), answer((1.0, 1), (4.0, 1), tokens=5)])
    again = Turn([answer((1.0, 1), (2.0, 1), tokens=3), Answer(1, REFUSED, "full"), Answer(2, FAILED, "gone")])
    row = LoadRow("int4")
    summarize_turns(row, [first, again])
    assert (row.rounds, row.requests, row.refused, row.failed) == (2, 3, 1, 1)
    assert row.round_tokens_per_s == [8 / 4, 3 / 2] and row.output_tokens_per_s == 1.75
    assert row.requests_per_s == 0.5 and row.total_tokens_per_s == pytest.approx((28 / 4 + 13 / 2) / 2)
    assert row.tpot["p50"] == 0.5 and row.most_at_once == 2
    assert ratio_between([first], [first, again]) == 1.0
    assert ratio_between([first, first], [first, again]) is None, "another mix"
    assert ratio_between([first], []) is None
    nothing = LoadRow("int8")
    summarize_turns(nothing, [Turn([Answer(0, FAILED, "HTTP 500")])])
    assert nothing.status == FAILED and "HTTP 500" in nothing.reason and nothing.output_tokens_per_s is None


def test_arrivals_of_a_poisson_process() -> None:
    times = send_times(4000, 5.0, seed=1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert times[0] == 0 and min(gaps) >= 0
    assert abs(mean - 0.2) < 4 * 0.2 / len(gaps) ** 0.5  # an exponential's deviation is its mean
    assert times == send_times(4000, 5.0, seed=1) != send_times(4000, 5.0, seed=2)
    assert send_times(3, None, seed=0) == [0.0] * 3


def test_events_cut_anywhere() -> None:
    events = (
        b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [{"text": "b"}]}\n\n'
        b'data: {"choices": [{"text": ""}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}\r\n\r\n'
        b"data: [DONE]\n\n"
    )
    for cut in range(1, len(events)):
        stream = _Stream()
        stream.read(events[:cut], 1.0)
        stream.read(events[cut:], 2.0)
        assert "".join(stream.texts) == "ab" and sum(arrival.events for arrival in stream.arrivals) == 2
        assert stream.usage == {"prompt_tokens": 1, "completion_tokens": 2} and stream.end_s in (1.0, 2.0)
    for error in (b'"broke"', b'{"message": "broke"}'):
        stream = _Stream()
        stream.read(b'data: {"error": ' + error + b"}\n\n", 1.0)
        assert stream.error == "broke"


# -- against a server that plays ---------------------------------------------------------------------------------------


@pytest.fixture
def play() -> Iterator[Play]:
    """Start servers; ``play(name, Played(..))`` is where one is."""
    with ExitStack() as stack:
        yield lambda name, played: Target(name, stack.enter_context(playing(played)), "fake")


def test_times_are_those_that_were_played(play: Play) -> None:
    played = Played(first=0.05, gap=0.01, silent=3)
    target = play("int4", played)
    prompts = [Prompt("p" * (i + 1), 10) for i in range(3)]
    seen: list[Answer] = []
    begin = time.perf_counter()
    answers = drive(target, prompts, [0.0, 0.1, 0.2], answered=seen.append)
    wall = time.perf_counter() - begin
    assert [a.place for a in answers] == [0, 1, 2] and sorted(a.place for a in seen) == [0, 1, 2]
    for place, (one, prompt) in enumerate(zip(answers, prompts, strict=True)):
        came, first, end = played.spans[prompt.text]
        assert one.sent_s >= place * 0.1
        assert max(first - came, 0.05) <= one.ttft_s < wall
        assert one.end_s - one.sent_s >= end - came - 0.001 and one.end_s < wall
        assert (one.status, one.prompt_tokens, one.output_tokens) == (OK, place + 1, 10)
        assert one.text == "a " * 7 and sum(arrival.events for arrival in one.arrivals) == 7
        assert one.tpot_s <= (one.end_s - one.sent_s - 0.05) / 9
        mean = sum(one.itl_s) / len(one.itl_s)
        assert mean <= wall / 6, "10 tokens are spread over 7 events"
    body = played.bodies[0]
    assert body["stream"] is True and body["model"] == "fake" and body["max_tokens"] == 10
    assert '"eos_token_id": -1' in body["generation_config"] and '"do_sample": false' in body["generation_config"]


def test_connections_are_bounded(play: Play) -> None:
    played = Played(first=0.02)
    answers = drive(play("x", played), [Prompt(str(i), 2) for i in range(9)], [0.0] * 9, concurrency=3)
    assert all(one.status == OK for one in answers) and played.most_running <= 3


def test_what_goes_wrong_is_an_answer(play: Play) -> None:
    prompts = [Prompt("a", 3)] * 4
    refused = drive(play("x", Played(statuses=[429, 500])), prompts, [0.0] * 4, concurrency=1)
    assert [one.status for one in refused] == [REFUSED, FAILED, OK, OK]
    assert "queue is full" in refused[0].reason and "HTTP 500" in refused[1].reason
    broken = drive(play("x", Played(error="no memory")), prompts[:1], [0.0])
    assert (broken[0].status, broken[0].reason) == (FAILED, "no memory")
    mute = drive(play("x", Played(text="")), prompts[:1], [0.0])
    assert (mute[0].status, mute[0].reason) == (FAILED, "no text was sent")
    slow = drive(play("x", Played(first=5.0)), prompts[:1], [0.0], timeout=0.05)
    assert slow[0].status == FAILED and "ReadTimeout" in slow[0].reason
    gone = drive(Target("x", "http://127.0.0.1:9", "fake"), prompts[:1], [0.0])
    assert gone[0].status == FAILED and "ConnectError" in gone[0].reason


def test_the_gate(play: Play) -> None:
    prompts = [Prompt("a", 4), Prompt("b", 4)]
    stock, other = play("stock", Played()), play("exact", Played(text="b "))

    def judge(*targets: Target, rounding: bool = False) -> dict[str, Verdict]:
        return judge_servers(targets, prompts, rounding=rounding, timeout=60)

    assert judge(stock, play("exact", Played())) == {"stock": ("", 2), "exact": ("", 2)}
    assert judge(stock, other)["exact"] == ("2 of 2 greedy answers differ from those of stock", 0)
    assert judge(stock, other, rounding=True)["exact"].reason, "more than a third"
    lossy = judge(stock, play("int4", Played(text="c ")), play("int8", Played(missing=1)))
    assert lossy["int4"] == ("", 0) and lossy["int8"] == ("an answer has 3 tokens instead of 4", None)
    ill = judge(play("stock", Played(statuses=[500])), other)
    assert "HTTP 500" in ill["stock"].reason and ill["exact"] == ("", None)
    nearly = [stock, play("exact", Played(texts={"a": "x "}))]
    more = [*prompts, Prompt("c", 4)]
    assert judge_servers(nearly, more, rounding=True, timeout=60)["exact"] == ("", 2)
    assert judge_servers(nearly, more, rounding=False, timeout=60)["exact"].reason


def test_what_a_table_says_of_what_went_other_than_asked() -> None:
    machine = {"device": "cpu", "processor": "P", "threads": 2}
    conditions = {"model": "M", "machine": machine, "requests": 4, "prompt_tokens": 40, "output_tokens": 9}
    conditions |= {"workload": "w", "rate_per_s": None, "concurrency": None, "rounds": 1, "kv_budget_bytes": None}
    conditions["checked_answers"] = 12
    rows = [
        LoadRow("a", requests=3, refused=1, prompt_tokens=30, output_tokens=7, output_tokens_per_s=2.0),
        LoadRow("b", requests=4, prompt_tokens=40, output_tokens=8, output_tokens_per_s=1.0, same_answers=11),
        LoadRow("c", FAILED, "an answer has 3 tokens instead of 4"),
    ]
    table = load_table(conditions, rows)
    assert [line[0] for line in table.lines] == ["a", "b"] and table.markdown().count("|--:") == 13
    notes = "\n".join(table.notes)
    assert "c failed: an answer has 3 tokens" in notes and "the same as from a: b 11" in notes
    assert "a: of 4 requests 1 were refused and 0 failed" in notes
    assert "b: counts 8 output tokens where 9 were asked for" in notes
