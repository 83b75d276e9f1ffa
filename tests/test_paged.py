"Chapter 4: the simulated two-tier memory. Invariants on random programs, a naive model beside it, and exact counts on spikes."

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_train_course.qlora import OutOfMemory, PagedMemory, paged_steps

more = settings(max_examples=200, deadline=None)
sizes = st.integers(1, 40)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.sampled_from("ab"), st.integers(0, 60)),
        st.tuples(st.just("allocate"), st.sampled_from("xyz"), sizes),
        st.tuples(st.just("touch"), st.sampled_from("xyz"), st.just(0)),
    ),
    max_size=25,
)


def apply(memory, operation):
    "Runs one operation; says whether it was refused."
    kind, name, nbytes = operation
    try:
        getattr(memory, kind)(*((name,) if kind == "touch" else (name, nbytes)))
    except (OutOfMemory, ValueError) as e:
        return e
    return None


def state(memory):
    return dict(memory.fixed), list(memory.device.items()), dict(memory.host), memory.resident, list(memory.moves)


def sum_moved(moves, direction):
    return sum(m.nbytes for m in moves if m.direction == direction)


class Naive:
    "The rules once more, with a clock for each page instead of an order, and everything counted afresh."

    def __init__(self, capacity, page_size):
        self.capacity, self.page_size, self.clock = capacity, page_size, 0
        self.fixed, self.pages, self.moves = {}, {}, []  # (tensor, page) -> [bytes, last used, on the device]

    def used(self):
        return sum(self.fixed.values()) + sum(size for size, _, here in self.pages.values() if here)

    def evict_until(self, room):
        while self.used() + room > self.capacity:
            key = min((k for k, p in self.pages.items() if p[2]), key=lambda k: self.pages[k][1])
            self.pages[key][2] = False
            self.moves.append(("out", *key))

    def reserve(self, name, nbytes):
        others = sum(v for k, v in self.fixed.items() if k != name)
        if nbytes > self.fixed.get(name, 0) and others + nbytes > self.capacity:
            raise OutOfMemory
        if nbytes > self.fixed.get(name, 0):
            self.evict_until(nbytes - self.fixed.get(name, 0))
        self.fixed[name] = nbytes

    def allocate(self, name, nbytes):
        if any(k[0] == name for k in self.pages):
            raise ValueError
        for n in range(math.ceil(nbytes / self.page_size)):
            size = min(self.page_size, nbytes - n * self.page_size)
            self.clock += 1
            self.pages[name, n] = [size, self.clock, self.used() + size <= self.capacity]

    def touch(self, name):
        keys = sorted(k for k in self.pages if k[0] == name)
        if not keys:
            raise ValueError
        for key in keys:
            if not self.pages[key][2]:
                if sum(self.fixed.values()) + self.pages[key][0] > self.capacity:
                    raise OutOfMemory
                self.evict_until(self.pages[key][0])
                self.pages[key][2] = True
                self.moves.append(("in", *key))
            self.clock += 1
            self.pages[key][1] = self.clock


@more
@given(capacity=st.integers(1, 100), page_size=st.integers(1, 20), program=operations)
def test_invariants_hold_after_every_operation(capacity, page_size, program):
    memory, allocated = PagedMemory(capacity, page_size), {}
    for step, operation in enumerate(program):
        before_device, n_moves = sum(memory.device.values()), len(memory.moves)
        memory.step = step
        refused = apply(memory, operation)
        if refused is None and operation[0] == "allocate":
            allocated[operation[1]] = operation[2]
        assert memory.resident == sum(memory.fixed.values()) + sum(memory.device.values()) <= capacity
        assert not memory.device.keys() & memory.host.keys()  # every byte in exactly one tier, none lost, none made
        where = {**memory.device, **memory.host}
        assert {name: sum(v for k, v in where.items() if k[0] == name) for name in allocated} == allocated
        assert all(0 < v <= page_size for v in where.values())
        new = memory.moves[n_moves:]
        if operation[0] != "allocate":  # what was copied is the difference
            assert sum(memory.device.values()) - before_device == sum_moved(new, "in") - sum_moved(new, "out")
        else:
            assert not new
        assert all(m.step == step and m.nbytes == where[m.tensor, m.page] for m in new)


@more
@given(capacity=st.integers(1, 100), page_size=st.integers(1, 20), program=operations)
def test_the_same_moves_as_a_naive_model(capacity, page_size, program):
    memory, naive = PagedMemory(capacity, page_size), Naive(capacity, page_size)
    for operation in program:
        ours, theirs = apply(memory, operation), apply(naive, operation)
        assert type(ours) is type(theirs)
        assert [(m.direction, m.tensor, m.page) for m in memory.moves] == naive.moves
        assert memory.resident == naive.used()


@more
@given(data=st.data(), page_size=st.integers(1, 50), weights=st.integers(0, 500), moments=st.integers(1, 500))
def test_nothing_moves_while_everything_fits(data, page_size, weights, moments):
    room = data.draw(st.integers(0, 300))
    activations = data.draw(st.lists(st.integers(0, room), min_size=1, max_size=8))
    memory = PagedMemory(weights + moments + room, page_size)
    memory.reserve("weights", weights)
    memory.allocate("moments", moments)
    rows = paged_steps(memory, activations)
    assert not memory.moves and not memory.host
    assert [row["peak"] for row in rows] == [weights + moments + a for a in activations]


@more
@given(page_size=st.integers(1, 50), weights=st.integers(0, 500), moments=st.integers(1, 500), room=st.integers(0, 50), data=st.data())
def test_a_spike_moves_what_is_lacking_and_only_then(page_size, weights, moments, room, data):
    lack = data.draw(st.integers(1, moments))
    memory = PagedMemory(weights + moments + room, page_size)
    memory.reserve("weights", weights)
    memory.allocate("moments", moments)
    rows = paged_steps(memory, [room, room, room + lack, room, room])
    assert [row["out"] for row in rows] == [row["in"] for row in rows]
    assert [row["out"] > 0 for row in rows] == [False, False, True, False, False]
    assert rows[2]["out"] == min(moments, math.ceil(lack / page_size) * page_size)  # whole pages, from the front
    assert {m.step for m in memory.moves} == {3}


@more
@given(pages=st.integers(1, 30), lacking=st.integers(1, 30), page_size=st.integers(1, 9), steps=st.integers(2, 5))
def test_moments_that_do_not_fit_all_move_at_every_step(pages, lacking, page_size, steps):
    lacking = min(lacking, pages)
    memory = PagedMemory(10 + max(1, pages - lacking) * page_size, page_size)
    memory.reserve("weights", 10)
    memory.allocate("moments", pages * page_size)
    rows = paged_steps(memory, [0] * steps)
    expected = pages * page_size if pages > 1 else 0  # a single page has room
    assert [row["in"] for row in rows[1:]] == [expected] * (steps - 1)


@more
@given(capacity=st.integers(1, 100), page_size=st.integers(1, 20), program=operations, extra=st.integers(1, 50))
def test_a_refused_request_moves_nothing(capacity, page_size, program, extra):
    memory = PagedMemory(capacity, page_size)
    for operation in program:
        apply(memory, operation)
    before = state(memory)
    others = sum(v for k, v in memory.fixed.items() if k != "c")
    with pytest.raises(OutOfMemory, match=rf"c needs .* the device has {capacity}"):
        memory.reserve("c", capacity - others + extra)
    assert state(memory) == before


def test_touched_last_is_evicted_last():
    memory = PagedMemory(6, 2)
    for name in "xyz":
        memory.allocate(name, 2)
    memory.touch("x")
    memory.reserve("a", 2)
    memory.reserve("a", 4)
    assert [(m.direction, m.tensor) for m in memory.moves] == [("out", "y"), ("out", "z")]
    assert list(memory.device) == [("x", 0)]


def test_memory_that_is_given_back_moves_nothing():
    memory = PagedMemory(10, 3)
    memory.allocate("moments", 7)
    memory.reserve("activations", 3)
    memory.reserve("activations", 1)
    memory.reserve("activations", 0)
    assert not memory.moves and memory.resident == 7


@pytest.mark.parametrize("arguments, named", [((0, 1), "capacity"), ((10, 0), "page_size"), ((10.5, 1), "10.5"), ((10, -3), "-3")])
def test_nonsense_is_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        PagedMemory(*arguments)


def test_names_and_sizes_are_checked():
    memory = PagedMemory(10, 3)
    memory.allocate("moments", 7)
    for call, named in ((lambda: memory.allocate("moments", 2), "moments"), (lambda: memory.allocate("x", 0), "'x' of 0"),
                        (lambda: memory.touch("y"), "'y'"), (lambda: memory.reserve("a", -1), "-1")):
        with pytest.raises(ValueError, match=named):
            call()
