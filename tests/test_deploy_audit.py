"""Clients send what the audit says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deploys import ROWS, squares

import fax
from fax import deploy


def test_what_moves():
    plan = deploy.cut(squares, 1.0, ROWS, held=["x"])
    (exchange,) = plan.audit().exchanges
    assert (exchange.clients, exchange.times) == (3, 1)
    assert exchange.bytes("down") == exchange.bytes("sum") == 8
    assert exchange.bytes("stays") == 32
    text = str(plan.audit())
    assert "[1]['x']  only through sums over 3" in text


def test_what_moves_has_the_bits_of_jax():
    """Without 64 bits, what the server has in NumPy's float64 is sent in float32."""
    received = []

    class Seen(deploy.InProcess):
        def run(self, stage, clients, operands):
            received.extend(x for x, mode in zip(operands, stage.inputs) if mode == "server")
            raise deploy.ClientError("seen")

    with jax.enable_x64(False):
        plan = deploy.cut(squares, np.float64(1.0), ROWS, held=["x"])
        with pytest.raises(deploy.ClientError, match="seen"):
            plan.run(Seen(), np.float64(1.0), ROWS)
    assert [x.nbytes for x in received] == [plan.audit().exchanges[0].bytes("down")] == [4]


def statement(fn, **args):
    plan = deploy.cut(fn, *args.values(), held=["x"], pull=True)
    return plan.audit()


def test_a_sum_under_a_mask_of_the_server_is_flagged():
    @fax.program(clients=3)
    def of_one(rows, who):
        return fax.sum(rows["x"], where=who)

    audit = statement(of_one, rows=ROWS, who=np.arange(3) == 1)
    assert audit.chosen == {"[0]['x']": ("bool[]",)}

    thrice = fax.program(clients=3)(lambda rows, at: fax.sum(rows["x"][at]))
    audit = statement(thrice, rows=ROWS, at=np.array([1, 1, 1]))
    assert audit.chosen == {"[0]['x']": ("rows chosen by number",)}
    assert "rows chosen by number are all of one client" in str(audit)


def test_a_cohort_of_one_sends_rows():
    @fax.program(clients=1)
    def total(rows):
        return fax.sum(rows["x"])

    assert statement(total, rows={"x": np.ones((1, 2))}).statements == {"[0]['x']": "as rows"}


def test_what_leaves_in_a_loop_that_carries_it():
    """What is carried depends on the input only from the second iteration on."""

    @fax.program(clients=3)
    def slow(rows):
        def step(carry, _):
            late, later = carry
            return (fax.map(jnp.add, late, rows["x"]), late), fax.sum(later)

        zeros = jnp.zeros((3, 4))
        return jax.lax.scan(step, (zeros, zeros), None, length=3)[1]

    assert statement(slow, rows=ROWS).statements == {"[0]['x']": "only through sums over 3"}


class Replay(deploy.InProcess):
    """Clients whose input changed, while the server still gets what it may have depended on."""

    def __init__(self, attributed, before=None):
        super().__init__()
        self.attributed, self.before, self.now = attributed, before, []

    def run(self, stage, clients, operands):
        found = super().run(stage, clients, operands)
        totals = [None if mode == "placed" else x for x, mode in zip(found, stage.outputs)]
        self.now.append(totals)
        if self.before is None:
            return found
        old = self.before.now[len(self.now) - 1]
        sent = [k for k, mode in enumerate(stage.outputs) if mode != "placed"]
        for place, k in enumerate(sent):
            if (stage.name, place) in self.attributed:
                found[k] = old[k]
            else:
                np.testing.assert_array_equal(found[k], old[k])
        return found

    def fetch(self, rows):
        found = super().fetch(rows)
        self.now.append(found)
        if self.before is None or "fetched" in self.attributed:
            return found if self.before is None else self.before.now[len(self.now) - 1]
        np.testing.assert_array_equal(found, self.before.now[len(self.now) - 1])
        return found


def random_program(rng, names):
    """A program of random operations, whose inputs may leave in any way or not at all."""
    kinds = ("map", "map", "mix", "sum", "max", "mask", "loop", "branch", "collect", "hide")
    plan = [(kinds[rng.integers(len(kinds))], rng.integers(100, size=3).tolist()) for _ in range(7)]

    @fax.program(clients=4)
    def program(rows, who):
        placed, server = [rows[name] for name in names], [jnp.ones(2)]
        for kind, (i, j, k) in plan:
            x, y, s = placed[i % len(placed)], placed[j % len(placed)], server[k % len(server)]
            if kind == "map":
                placed.append(fax.map(lambda x, s: jnp.sin(x + s), x, fax.broadcast(s)))
            elif kind == "mix":
                placed.append(x * y)
            elif kind == "sum":
                server.append(fax.sum(x))
            elif kind == "max":
                server.append(fax.max(x, where=y[:, 0] > 0) if j % 2 else fax.min(x))
            elif kind == "mask":
                server.append(fax.mean(x, weights=who))
            elif kind == "loop":
                step = lambda c, _: ((fax.map(jnp.add, c[1], c[0]), c[0]), fax.sum(c[1]))  # noqa: E731
                (x, _), sums = jax.lax.scan(step, (x, y), None, length=2)
                placed.append(x)
                server.append(sums[1])
            elif kind == "branch":
                placed.append(jax.lax.cond(s[0] > 1, lambda x, y: x, lambda x, y: y, x, y))
            elif kind == "collect":
                server.append(fax.collect(x)[k % 4])
            else:
                placed.append(fax.map(lambda x: jnp.zeros_like(x) + 1, x))
        return placed, server

    return program


@pytest.mark.always(*map(str, range(6)))
@pytest.mark.parametrize("seed", range(12))
def test_the_audit_of_random_programs(seed):
    """An input changes only what the audit says, given the old values of that."""
    rng = np.random.default_rng(seed)
    names = ["a", "b", "c"]
    rows = {name: rng.normal(size=(4, 2)) for name in names}
    who = rng.random(4)
    program = random_program(rng, names)
    plan = deploy.cut(program, rows, who, held=names, pull=True)
    audit = plan.audit()
    before = Replay(set())
    server = plan.run(before, rows, who)[1]
    for name in names:
        path = f"[0]['{name}']"
        attributed = set()
        for exchange in audit.exchanges:
            leaving = [m for m in exchange.messages if m.mode in ("sum", "max", "min", "fetched")]
            for place, message in enumerate(leaving):
                if path in message.depends_on:
                    own = message.mode == "fetched"
                    attributed.add("fetched" if own else (exchange.stage, place))
        assert bool(attributed) == (audit.statements[path] != "never")
        changed = dict(rows) | {name: rows[name].copy()}
        changed[name][rng.integers(4)] += rng.normal(size=2)
        found = plan.run(Replay(attributed, before), changed, who)[1]
        for own, other in zip(found, server, strict=True):
            np.testing.assert_array_equal(own, other)


def test_every_statement_occurs():
    """The random programs would not test much otherwise."""
    found = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        names = ["a", "b", "c"]
        rows = {name: jax.ShapeDtypeStruct((4, 2), float) for name in names}
        rng.normal(size=(3, 4, 2)), rng.random(4)
        program = random_program(rng, names)
        plan = deploy.cut(program, rows, np.ones(4), held=names, pull=True)
        found |= set(plan.audit().statements.values())
    assert {"never", "as rows"} < found
    assert any(s.startswith("only through sums") for s in found)
