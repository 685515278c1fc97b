"""The cache: what it keeps, for how long, and what it never keeps."""

from __future__ import annotations

import gc
import math
import random
import sys
import threading
import tracemalloc
from collections import OrderedDict

import anyio
import psutil
import pytest

from fastapi_topaz import ConnectionLost, Decision, DecisionCache
from fastapi_topaz._decisions import invalidation
from fastapi_topaz._decisions.cache import Cached
from fastapi_topaz._decisions.invalidation import Invalidations
from fastapi_topaz._decisions.store import Entry, Limits, Store
from fastapi_topaz._decisions.tokens import expiry
from kit.decisions import HeldAuthorizer, OpenHere, Subject, jwt


WALL = 1_700_000_000.0
ALICE = Subject(resource={"id": "1"})


class Scripted:
    """An `Ask` that gives its answers in turn; an exception is raised."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    async def __call__(self, question, /):
        self.asked.append(question)
        answer = self.answers.pop(0) if self.answers else True
        if isinstance(answer, Exception):
            raise answer
        return Decision(allowed=answer)


def layer_of(ask, **options):
    """Return the layer of a new cache on the clock of the loop."""
    cache = DecisionCache(**{"jitter": 0, **options})
    layer = Cached(ask, cache, OpenHere())
    layer.freshness.clock = anyio.current_time
    layer.freshness.wall = lambda: WALL
    return layer, cache


async def origins(layer, *subjects, **options):
    return [(await layer(each.question(**options))).origin for each in subjects]


# -- parameters -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"ttl_seconds": -1}, ValueError, "ttl_seconds"),
        ({"ttl_seconds": math.inf}, ValueError, "ttl_seconds"),
        ({"denied_ttl_seconds": "5"}, TypeError, "denied_ttl_seconds"),
        ({"stale_ttl_seconds": math.nan}, ValueError, "stale_ttl_seconds"),
        ({"max_size": 0}, ValueError, "max_size"),
        ({"max_size": True}, TypeError, "max_size"),
        ({"jitter": 1.1}, ValueError, "jitter"),
        ({"jitter": math.nan}, ValueError, "jitter"),
        ({"jitter": "0"}, TypeError, "jitter"),
        ({"exclude": "*.DELETE"}, TypeError, "exclude"),
        ({"exclude": [1]}, TypeError, "exclude"),
        ({"exclude": [""]}, ValueError, "exclude"),
        ({"max_request_bytes": -1}, ValueError, "max_request_bytes"),
    ],
)
def test_a_wrong_argument_is_named(options, error, text):
    with pytest.raises(error, match=text):
        DecisionCache(**options)


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"identity": "alice"}, TypeError),
        ({"policy_path": "no path"}, ValueError),
        ({"policy_path": 1}, TypeError),
        ({"resource": ["id"]}, TypeError),
        ({"resource": {"id": object()}}, TypeError),
    ],
)
async def test_a_wrong_invalidation_is_an_error_that_shows_no_value(arguments, error):
    with pytest.raises(error) as caught:
        DecisionCache().invalidate(**arguments)
    assert "alice" not in str(caught.value)


# -- ages -----------------------------------------------------------------------------


@pytest.mark.parametrize("allowed, ttl", [(True, 30), (False, 5)])
async def test_an_answer_is_used_until_its_age_ends(allowed, ttl):
    layer, _ = layer_of(Scripted(allowed, allowed))
    first = await layer(ALICE.question())
    await anyio.sleep(ttl - 0.01)
    again = await layer(ALICE.question())
    assert (again.allowed, again.origin, again.id) == (allowed, "cache", first.id)
    assert again.age == pytest.approx(ttl - 0.01)
    await anyio.sleep(0.01)
    assert await origins(layer, ALICE) == ["authorizer"]


async def test_an_age_counts_from_asking():
    async def slow(question, /):
        await anyio.sleep(4)
        return Decision(allowed=False)

    layer, _ = layer_of(slow)
    await layer(ALICE.question())
    await anyio.sleep(1)
    assert await origins(layer, ALICE) == ["authorizer"]


async def test_the_jitter_only_shortens():
    layer, cache = layer_of(Scripted(), jitter=0.5, max_size=2000)
    subjects = [Subject(resource={"n": n}) for n in range(500)]
    await origins(layer, *subjects)
    await anyio.sleep(14.99)
    assert set(await origins(layer, *subjects)) == {"cache"}
    await anyio.sleep(7.5)
    ages = (await origins(layer, *subjects)).count("cache")
    assert 150 < ages < 350
    await anyio.sleep(30)
    assert set(await origins(layer, *subjects)) == {"authorizer"}
    assert cache.status().evictions == 0


async def test_a_clock_that_goes_back_makes_no_answer_younger():
    layer, _ = layer_of(Scripted())
    now = [100.0]
    layer.freshness.clock = lambda: now[0]
    await layer(ALICE.question())
    now[0] = 99.0
    assert await origins(layer, ALICE) == ["authorizer"]


async def test_max_age_limits_what_is_used_and_0_always_asks():
    script = Scripted(True, True, False, True)
    layer, _ = layer_of(script)
    await layer(ALICE.question())
    await anyio.sleep(2)
    assert await origins(layer, ALICE, max_age=2.5) == ["cache"]
    assert await origins(layer, ALICE, max_age=1.5) == ["authorizer"]
    decision = await layer(ALICE.question(max_age=0))
    assert (decision.allowed, decision.origin) == (False, "authorizer")
    # It replaces the older answer.
    assert (await layer(ALICE.question())).allowed is False
    assert len(script.asked) == 3


async def test_an_older_answer_does_not_replace_a_later_one():
    server = HeldAuthorizer()
    layer, _ = layer_of(server)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(layer, ALICE.question())
        await anyio.sleep(1)
        tasks.start_soon(layer, ALICE.question(max_age=0))
        await anyio.sleep(1)
        first, second = server.calls
        second.answer(allowed=False)
        await anyio.sleep(1)
        first.answer(allowed=True)
    assert (await layer(ALICE.question())).allowed is False


# -- what is not kept -----------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, path, excluded",
    [
        ("*.DELETE.*", "app.DELETE.documents", True),
        ("*.DELETE.*", "app.delete.documents", False),
        ("app.GET", "app.GET", True),
        ("app.GET", "app.GET.x", False),
        ('app.GET["user-profiles"]', 'app.GET["user-profiles"]', True),
        ('app.*["user-profiles"].*', 'app.GET["user-profiles"].x', True),
        ('app.GET["user-profiles"]', "app.GET", False),
        ("app.G[EX]T", "app.GET", True),
    ],
)
async def test_excluded_policies_always_ask(pattern, path, excluded):
    layer, cache = layer_of(Scripted(), exclude=["nothing", pattern])
    subject = Subject(path)
    origin = "authorizer" if excluded else "cache"
    assert await origins(layer, subject, subject) == ["authorizer", origin]
    assert cache.status().size == (not excluded)


async def test_large_requests_are_not_kept():
    size = len(ALICE.question().request)
    layer, cache = layer_of(Scripted(), max_request_bytes=size)
    larger = Subject(resource={"id": "12"})
    assert await origins(layer, ALICE, ALICE) == ["authorizer", "cache"]
    assert await origins(layer, larger, larger) == ["authorizer"] * 2
    assert cache.status().size == 1


@pytest.mark.parametrize(
    "error",
    [lambda: ConnectionLost("x"), lambda: ValueError("x"), lambda: TimeoutError("x")],
)
async def test_errors_are_not_kept(error):
    layer, cache = layer_of(Scripted(error(), True))
    with pytest.raises(type(error())):
        await layer(ALICE.question())
    assert cache.status().size == 0
    assert await origins(layer, ALICE) == ["authorizer"]


@pytest.mark.parametrize("given", [1, "yes", None, [True]])
async def test_only_a_bool_is_kept(given):
    layer, cache = layer_of(Scripted(given))
    await layer(ALICE.question())
    assert cache.status().size == 0


# -- tokens ---------------------------------------------------------------------------


async def test_an_answer_for_a_token_ends_at_its_expiry():
    layer, _ = layer_of(Scripted())
    subject = Subject(token=jwt(exp=WALL + 10))
    await layer(subject.question())
    layer.freshness.wall = lambda: WALL + 9.9
    assert await origins(layer, subject) == ["cache"]
    layer.freshness.wall = lambda: WALL + 10
    assert await origins(layer, subject) == ["authorizer"]


TOKENS = [
    (jwt(exp=5), 5.0),
    (jwt(exp=5.5), 5.5),
    (jwt(sub="x"), None),
    (jwt(exp="5"), None),
    (jwt(exp=True), None),
    (jwt(exp=None), None),
    (jwt(exp=[5]), None),
    (jwt(inner={"exp": 5}), None),
    (jwt(exp=9, inner={"exp": 5}), 9.0),
    (jwt(exp=10**400), None),
    (jwt(exp=math.inf), None),
    (jwt(exp=math.nan), None),
    *((text, None) for text in ("", ".", "..", "a.b.c", "a.é.c", "x" * 1000, "a.e30.")),
    ("a.eyJleHAiOjksImV4cCI6NX0.", 5.0),  # two of them: the earliest counts
    ("a." + "W1tb" * 50_000 + ".", None),
]


@pytest.mark.parametrize("number", range(len(TOKENS)))
async def test_the_expiry_of_a_token_is_read_or_there_is_none(number):
    token, expected = TOKENS[number]
    assert expiry(token) == expected


async def test_an_answer_for_a_token_without_expiry_is_not_kept():
    layer, cache = layer_of(Scripted())
    subject = Subject(token=jwt(sub="alice"))
    assert await origins(layer, subject, subject) == ["authorizer"] * 2
    assert cache.status().size == 0


# -- invalidation ---------------------------------------------------------------------


MATCHING = [
    {},
    {"identity": ALICE.identity},
    {"policy_path": ALICE.path},
    {"resource": {"id": "1"}},
    {"resource": {}},
    {"identity": Subject(user="bob").identity, "resource": {"id": "1"}},
]
OTHERS = [
    {"identity": Subject(user="bob").identity},
    {"identity": Subject(token="alice").identity},
    {"policy_path": "app.GET"},
    {"resource": {"id": 2}},
    {"resource": {"id": "1", "owner": "x"}},
    {"resource": {"key": "1"}},
]


@pytest.mark.parametrize("number", range(len(MATCHING)))
async def test_what_an_invalidation_concerns_is_asked_again(number):
    layer, cache = layer_of(Scripted())
    await layer(ALICE.question())
    cache.invalidate(**MATCHING[number])
    assert await origins(layer, ALICE, ALICE) == ["authorizer", "cache"]


@pytest.mark.parametrize("number", range(len(OTHERS)))
async def test_what_an_invalidation_does_not_concern_is_kept(number):
    layer, cache = layer_of(Scripted())
    await layer(ALICE.question())
    cache.invalidate(**OTHERS[number])
    assert await origins(layer, ALICE) == ["cache"]


async def test_clear_forgets_everything():
    layer, cache = layer_of(Scripted())
    await layer(ALICE.question())
    await cache.clear()
    assert cache.status().size == 0
    assert await origins(layer, ALICE) == ["authorizer"]


@pytest.mark.parametrize("how", ["invalidate", "clear"])
async def test_an_answer_under_way_does_not_survive_an_invalidation(how):
    server = HeldAuthorizer()
    layer, cache = layer_of(server)
    got = []

    async def ask():
        got.append(await layer(ALICE.question()))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.sleep(0.1)
        if how == "clear":
            await cache.clear()
        else:
            cache.invalidate(identity=ALICE.identity)
        tasks.start_soon(ask)
        await anyio.sleep(0.1)
        # The later caller does not join the earlier call.
        first, second = server.calls
        first.answer(allowed=True)
        await anyio.sleep(0.1)
        assert len(got) == 1
        second.answer(allowed=False)
    assert [each.allowed for each in got] == [True, False]
    assert (await layer(ALICE.question())).allowed is False


FEW_MARKS = 100


@pytest.fixture
def few_marks(monkeypatch):
    """Let a cache have few marks: the time of an invalidation grows with them."""
    monkeypatch.setattr(invalidation, "MOST_MARKS", FEW_MARKS)


@pytest.mark.usefixtures("few_marks")
async def test_many_marks_become_one_for_everything():
    layer, cache = layer_of(Scripted())
    await layer(ALICE.question())
    for number in range(FEW_MARKS):
        cache.invalidate(resource={"id": f"other {number}"})
    marks = layer.freshness.invalidations
    assert marks.marks.count == FEW_MARKS
    assert await origins(layer, ALICE) == ["cache"]
    cache.invalidate(resource={"id": "one more"})
    assert marks.marks.count == 0
    assert await origins(layer, ALICE) == ["authorizer"]


@pytest.mark.usefixtures("few_marks")
async def test_old_marks_are_dropped():
    layer, cache = layer_of(Scripted())
    for number in range(FEW_MARKS):
        cache.invalidate(resource={"id": f"other {number}"})
    await anyio.sleep(30)
    cache.invalidate(resource={"id": "one more"})
    assert layer.freshness.invalidations.marks.count == 1


async def test_invalidations_of_several_threads_are_all_kept():
    marks = Invalidations(60)
    tags = [frozenset({b"%d" % n}) for n in range(800)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(
                target=lambda part=part: [
                    marks.invalidate([each], 0.0) for each in tags[part::8]
                ]
            )
            for part in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    numbers = {marks.valid_from(each, 0.0) for each in tags}
    assert len(numbers) == 800
    assert 0 not in numbers


# -- size and memory ------------------------------------------------------------------


async def test_the_answer_that_was_not_used_longest_makes_room():
    layer, cache = layer_of(Scripted(), max_size=2)
    one, two, three = (Subject(user=name) for name in ("a", "b", "c"))
    await origins(layer, one, two, one, three)
    assert cache.status().evictions == 1
    assert await origins(layer, one, three, two) == ["cache", "cache", "authorizer"]


def test_ten_thousand_entries_take_at_most_4_mb():
    source = random.Random(1)
    store = Store(Limits(30, 5, 0, 0.1), 10_000)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        # Many more than there is room for, so that removed ones count as well.
        for number in range(25_000):
            entry = Entry(
                True, 1.5 * number, 10**6 + number, 1.5 + number, source.randbytes(16)
            )
            store.put(source.randbytes(16), entry)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(store) == 10_000
    assert after - before <= 4_000_000


async def fresh_questions(number, used_now):
    """Return how much the memory grows while the second half is asked."""
    layer, cache = layer_of(Scripted(), max_size=100)
    layer.ask.asked = type("Nothing", (), {"append": lambda *_: None})()
    used = []
    for n in range(number):
        await layer(Subject(resource={"n": n}).question())
        if n in (number // 2, number - 1):
            gc.collect()
            used.append(used_now())
    assert cache.status().size == 100
    return used[1] - used[0]


@pytest.mark.costly
async def test_fresh_questions_leave_memory_flat():
    tracemalloc.start()
    try:
        grown = await fresh_questions(3_000, lambda: tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert grown < 50_000


@pytest.mark.nightly
@pytest.mark.timeout(1200)
async def test_a_million_fresh_questions_leave_memory_flat():
    # The whole process, because tracing a million questions takes very long.
    process = psutil.Process()
    assert await fresh_questions(1_000_000, lambda: process.memory_info().rss) < 5e6


def reachable(root):
    """Yield each object that *root* leads to, except modules, types and functions."""
    seen, left = set(), [root]
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, type | type(sys)):
            continue
        seen.add(id(each))
        yield each
        if not callable(each) or hasattr(each, "__self__"):
            left.extend(gc.get_referents(each))


async def test_no_identity_token_or_context_is_reachable_from_the_cache():
    layer, cache = layer_of(Scripted(True, False, ConnectionLost("x")))
    secret = "s3cr3t"
    token = jwt(exp=WALL + 10, sub=secret)
    subjects = [
        Subject(user=secret),
        Subject(token=token, resource={secret: {"x": [secret]}}),
        Subject(resource={"id": secret}, metadata=(("key", secret),)),
    ]
    for subject in subjects:
        try:
            await layer(subject.question())
        except ConnectionLost:
            continue
    cache.invalidate(identity=subjects[0].identity, resource={"id": secret})
    found = list(reachable(cache))
    texts = [each for each in found if isinstance(each, str | bytes)]
    kinds = [type(each).__name__ for each in found]
    assert (kinds.count("Entry"), kinds.count("Mark")) == (2, 2)
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        assert secret.encode() not in data
        assert token.encode() not in data
    assert not {"Question", "Identity", "Request"}.intersection(kinds)
    assert secret not in repr(cache)


# -- counts ---------------------------------------------------------------------------


async def test_each_check_is_a_hit_a_miss_or_shared():
    server = HeldAuthorizer()
    layer, cache = layer_of(server)
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(layer, ALICE.question())
        await anyio.sleep(0.1)
        server.calls[0].answer(allowed=True)
    await origins(layer, ALICE, ALICE)
    status = cache.status()
    assert (status.misses, status.shared, status.hits) == (1, 4, 2)
    assert (status.size, status.stale, status.evictions) == (1, 0, 0)


async def test_a_new_opening_of_the_pool_begins_with_an_empty_cache():
    layer, cache = layer_of(Scripted())
    await layer(ALICE.question())
    layer._openings.reopen()
    assert await origins(layer, ALICE) == ["authorizer"]
    assert cache.status().size == 1


async def test_without_an_opening_the_pool_is_asked():
    layer, cache = layer_of(Scripted())
    layer._openings.opening = None
    assert await origins(layer, ALICE, ALICE) == ["authorizer"] * 2
    assert cache.status().misses == 0


# -- threads --------------------------------------------------------------------------


class Raced(OrderedDict):
    """Entries that another thread removes in each moment in which one is moved."""

    def move_to_end(self, key, last=True):
        self.clear()
        super().move_to_end(key, last)


async def test_an_entry_that_another_thread_removes_fails_no_check():
    """Two configurations on two loops may share a cache, and one clears it."""
    layer, cache = layer_of(Scripted())
    await origins(layer, Subject(user="other"))
    cache._store._entries = Raced()
    assert await origins(layer, ALICE) == ["authorizer"]
    assert cache.status().size == 0
    cache._store._entries = kept = OrderedDict()
    assert await origins(layer, ALICE) == ["authorizer"]
    cache._store._entries = Raced(kept)
    assert await origins(layer, ALICE, ALICE) == ["cache", "authorizer"]


def test_entries_that_all_threads_evict_at_once_are_no_error():
    class Empty(OrderedDict):
        def __len__(self):
            return 2  # before the other thread evicted its entry

        def popitem(self, last=True):
            self.clear()
            return super().popitem(last)

    store = Store(Limits(30, 5, 0, 0), 1)
    store._entries = Empty()
    store.put(b"a", Entry(True, 0.0, 1))
    assert store.evictions == 0
