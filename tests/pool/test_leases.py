"""The sums over leases are those of the leases, whatever changes."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from headrace.core.request import AnyRequest, GenerateRequest
from headrace.pool.leases import Leases, Tally


@dataclass(eq=False)
class Lease:
    request: AnyRequest
    cost: float
    size: int
    choices: int
    prompt_cost: float
    has_begun: bool = False
    is_alone: bool = False


requests = st.builds(
    lambda client, batch: GenerateRequest(model="m", prompt="x", client=client, batch=batch),
    st.sampled_from(["", "a", "b"]),
    st.booleans(),
)
leases = st.builds(
    Lease,
    requests,
    st.integers(0, 99),
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(0, 9),
    is_alone=st.booleans(),
)
steps = st.lists(st.tuples(st.sampled_from(["add", "begin", "end", "remove"]), leases), max_size=40)


@given(steps)
def test_sums_are_those_of_the_leases(steps: list[tuple[str, Lease]]) -> None:
    held, known = Leases[Lease](), list[Lease]()
    for number, (step, lease) in enumerate(steps):
        if step == "add" or not known:
            held.add(lease)
            known.append(lease)
        else:
            lease = known[number % len(known)]
            if step == "begin":
                held.change(lease, has_begun=True, size=1)
            elif step == "end":
                held.change(lease, choices=max(0, lease.choices - 1))
            else:
                held.remove(lease)
                # A worker that has died has taken it away already.
                held.remove(lease)
                held.change(lease, has_begun=True)
                known.remove(lease)
        assert {*held} == {*known}
        assert held.all == _summed(known)
        assert held.batch == _summed([each for each in known if each.request.batch])
        for client in ("", "a", "b"):
            own = [each for each in known if each.request.client == client]
            assert held.of_client(client) == _summed(own)
    held.clear()
    assert held.all == held.of_client("a") == Tally()
    assert not held


def _summed(leases: list[Lease]) -> Tally:
    starting = [lease for lease in leases if not lease.has_begun]
    return Tally(
        requests=len(leases),
        size=sum(lease.size for lease in leases),
        choices=sum(lease.choices for lease in leases),
        taken=sum(max(lease.size, lease.choices) for lease in leases),
        cost=sum(lease.cost for lease in leases),
        starting=len(starting),
        starting_cost=sum(lease.prompt_cost for lease in starting),
        several=sum(lease.choices > 1 for lease in leases),
        awaited=sum(lease.is_alone for lease in starting),
    )
