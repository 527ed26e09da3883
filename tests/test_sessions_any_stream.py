"""Any stream of bins: answered once under a revision, and credits balance."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from ilqr_service.sessions.effects import Effects
from ilqr_service.solving.policy import Cost, Policy
from ilqr_service.work import Insert
from ilqr_vae.protocol import messages
from test_sessions import MS, answer, bin_, open_, table


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_stream_is_answered_once_under_a_revision_and_credits_balance(data: Any) -> None:
    limit, grant = 4, 3
    t = table(gap_limit=limit, credits=grant)
    t.receive(b"f", open_(), 0)
    policy, now, sent, returned = Policy(lambda _: Cost(50 * MS, 5, 1)), 0, 0, 0
    answered: list[tuple[int, int]] = []
    accepted: list[int] = []
    resets: list[tuple[int, int]] = []
    newest = -1

    def finish(limit_: int) -> None:
        nonlocal returned
        for _ in range(limit_):
            for work in policy.take(1):
                one = replace(answer(work), revised=isinstance(work, Insert))
                for message in t.answered(one, now).published:
                    assert isinstance(message, messages.Result)
                    answered.append((message.index, message.revision))
        returned += sum(c.credits for _, c in t.credits())

    def take(effects: Effects) -> None:
        nonlocal newest
        came = [w for w in effects.work if not w.missing]
        assert len(came) <= 2  # the second bears the first out
        assert len(effects.work) <= 2 * (limit + 1)
        for work in came:
            assert work.index not in accepted
            accepted.append(work.index)
            if work.index - newest - 1 > limit:
                resets.append((newest + 1, work.index))
            newest = max(newest, work.index)
        for work in effects.work:
            policy.push(work)

    for index in data.draw(st.lists(st.integers(0, 24), max_size=40)):
        now += 1
        take(t.receive(b"f", bin_(index), now))
        sent += 1
        finish(data.draw(st.integers(0, 3)))
    take(t.tick(now + 250 * MS))
    finish(1000)
    unanswered = {i for a, b in resets for i in range(a, b)}
    assert [i for i, r in answered if r == 0] == [
        i for i in range(newest + 1) if i not in unanswered
    ]
    assert len(answered) == len(set(answered))
    assert {i for i, r in answered if r} <= set(accepted)
    assert returned == sent  # every bin's credit came back
    (info,) = t.infos(now)
    assert info.next_index == newest + 1
